"""The options of sequence-to-sequence denoising: which noise, with which shares, on which encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.corruption.denoising import BART_STEPS, BartNoise
from hf_pretrain.corruption.fragments import Denoiser, MassNoise, PrefixLM, SpanCorruption, UL2Noise
from hf_pretrain.corruption.texts import Noise
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.options import check_options, option
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import check_changed

NoiseName = Literal["bart", "t5", "ul2", "prefix_lm", "mass"]

_SIZES = """model_type hidden_size num_hidden_layers num_decoder_layers num_attention_heads intermediate_size embedding_size
    max_position_embeddings config_overrides init_embeddings"""
_TOKENIZER = "tokenizer_type lowercase strip_accents vocab_size"


@dataclass
class DenoisingModelArguments(ModelArguments):
    """Which encoder-decoder is trained: a checkpoint to continue, sizes to build one from, or two halves to join."""

    ranges: ClassVar[dict[str, str]] = {"num_decoder_layers": "[1, 4096]"}
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(_SIZES.split(), "!model_name_or_path and !encoder_name_or_path"),
        **dict.fromkeys(_TOKENIZER.split(), "!tokenizer_name and !model_name_or_path and !encoder_name_or_path"),
        "encoder_name_or_path": "!model_name_or_path",
        "decoder_name_or_path": "encoder_name_or_path",
    }

    model_type: str = option(
        "bart", "Architecture built from scratch: bart, t5, mt5, umt5, longt5, mbart, pegasus, marian, t5gemma, ..."
    )
    num_decoder_layers: int | None = option(
        None, "Number of layers of the decoder; by default as many as the encoder's."
    )
    encoder_name_or_path: str | None = option(
        None,
        "Checkpoint of an encoder to begin with, such as one of hf-pretrain mlm; its decoder gets fresh attention to it.",
    )
    decoder_name_or_path: str | None = option(
        None,
        "Checkpoint of the decoder beside that encoder, with the same vocabulary; by default the encoder's own weights.",
    )


@dataclass
class DenoisingTrainingArguments(PretrainingArguments):
    """Options of [`DenoisingTrainer`]: the noise, its shares, and those of every pre-training.

    Raises:
        InputError: If an option is out of range, belongs to another noise, or the noise changes nothing.

    Source:
        BART (Lewis et al. 2020, section 2.2), T5 (Raffel et al. 2020, section 3.3), UL2 (Tay et al. 2022, section 3.1), MASS
        (Song et al. 2019, section 3.2).
    """

    ranges: ClassVar[dict[str, str]] = {
        "infilling_mean_length": "(0, 128]",
        "noise_density": "(0, 1)",
        "mean_span_length": "[1, 65536]",
        "target_share": "(0, 1)",
        "fragment_share": "(0, 1)",
        "static_masks": "[0, 2147483647]",
    }
    needs: ClassVar[dict[str, str]] = {
        "noise_steps": "noise=bart",
        **{f"{step}_probability": f"noise=bart and noise_steps~{step}" for step in BART_STEPS},
        "infilling_mean_length": "noise=bart and noise_steps~infilling",
        **dict.fromkeys(("noise_density", "span_choice"), "noise=t5"),
        **dict.fromkeys(("mean_span_length", "random_roll"), "noise=t5 and span_choice=random"),
        "denoisers": "noise=ul2",
        "target_share": "noise=prefix_lm",
        "fragment_share": "noise=mass",
    }

    noise: NoiseName = option(
        "bart",
        "What the decoder undoes: 'bart' (noised text -> the text), 't5' (spans -> what they hold), 'ul2' (one of several "
        "denoisers a text), 'prefix_lm' (the beginning of a text -> its end) or 'mass' (a masked fragment -> the fragment).",
    )
    noise_steps: list[str] = option(
        factory=lambda: ["sentence_permutation", "infilling"],
        help="BART's noises, in the order in which they are applied: sentence_permutation, token_masking, token_deletion, "
        "infilling, rotation.",
    )
    token_masking_probability: float = option(0.15, "Share of the words that token_masking replaces by a mask.")
    token_deletion_probability: float = option(0.15, "Share of the words that token_deletion removes.")
    infilling_probability: float = option(
        0.3, "Share of the words in the spans that infilling replaces by a mask each."
    )
    infilling_mean_length: float = option(3.0, "Mean words of these spans (Poisson); mBART has 3.5.")
    sentence_permutation_probability: float = option(1.0, "Share of the sentences that are permuted.")
    rotation_probability: float = option(1.0, "Share of the texts that rotation lets begin at another token.")
    noise_density: float = option(0.15, "Share of the tokens in T5's spans.")
    mean_span_length: float = option(3.0, "Mean tokens of T5's spans.")
    span_choice: Literal["random", "iid"] = option(
        "random", "'random': spans of a fixed number and mean length. 'iid': each token by itself; runs are one span."
    )
    random_roll: bool = option(
        False, "Rotate T5's spans by a random offset; without it the first token is never in one, and the last always."
    )
    denoisers: list[str] = option(
        factory=lambda: ["R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25"],
        help="UL2's denoisers, equally often: R or X, mean tokens of a span and share of the tokens; S and the share at the end.",
    )
    target_share: float | None = option(
        None, "Share of the tokens that a prefix language model writes; by default every border is as likely."
    )
    fragment_share: float = option(0.5, "Share of the tokens in MASS's fragment.")
    static_masks: int = option(
        0, "0: fresh noise each epoch. k: k frozen noises of each example, used in turn (epoch modulo k)."
    )

    def __post_init__(self) -> None:
        """Refuse options that are out of range or have no effect beside the others."""
        check_options(self)
        for step in self.noise_steps:
            check_choice(step, BART_STEPS, name="noise_steps")
        twice = next((step for step in self.noise_steps if self.noise_steps.count(step) > 1), None)
        if twice is not None:
            raise InputError(f"noise_steps={' '.join(self.noise_steps)} names {twice} twice: name each once")
        check_changed(self)
        if self.noise == "bart" and not any(getattr(self, f"{step}_probability") for step in self.noise_steps):
            raise InputError(
                f"noise_steps={' '.join(self.noise_steps)!r} leaves the text as it is: name a noise with a probability above 0, "
                "such as infilling"
            )
        if self.noise == "ul2":
            self.parsed_denoisers()
        super().__post_init__()

    def parsed_denoisers(self) -> tuple[Denoiser, ...]:
        """Return UL2's denoisers; raise InputError for one that is none, or if there is none."""
        if not self.denoisers:
            raise InputError("denoisers is empty: name at least one, such as R:3:0.15 or S:0.25")
        return tuple(map(Denoiser.parse, self.denoisers))

    def make_noise(self, tokenizer: PreTrainedTokenizerBase) -> Noise:
        """Return the noise, with the ids that it puts into texts.

        Args:
            tokenizer: The tokenizer of the run, with the tokens that the noise needs.

        Raises:
            InputError: If it lacks one, in one line that names it and how to add it.
        """
        from hf_pretrain.objectives.denoising.building import noise_tokens  # which reads these options

        tokens = noise_tokens(self, tokenizer)
        return self.noise_with(
            mask_token_id=tokens.mask, sentinels=tokens.sentinels, mode_ids=tokens.modes, random_ids=tokens.ordinary
        )

    def noise_with(
        self, *, mask_token_id: int, sentinels: np.ndarray, mode_ids: Mapping[str, int], random_ids: np.ndarray
    ) -> Noise:
        """Return the noise with given ids, of which it takes those that it needs.

        Args:
            mask_token_id: For "bart" and "mass".
            sentinels: `[S]` int64, for "t5" and "ul2".
            mode_ids: Id of the token of each mode, for "ul2".
            random_ids: `[N]` int64, ids of ordinary tokens, for "mass".
        """
        if self.noise == "t5":
            return SpanCorruption(
                density=self.noise_density,
                mean_length=self.mean_span_length,
                sentinels=sentinels,
                choice=self.span_choice,
                random_roll=self.random_roll,
            )
        if self.noise == "ul2":
            return UL2Noise(denoisers=self.parsed_denoisers(), sentinels=sentinels, mode_ids=mode_ids)
        if self.noise == "prefix_lm":
            return PrefixLM(share=self.target_share)
        if self.noise == "mass":
            return MassNoise(share=self.fragment_share, mask_token_id=mask_token_id, random_ids=random_ids)
        shares = {f"{step}_probability": getattr(self, f"{step}_probability") for step in BART_STEPS}
        return BartNoise(
            steps=self.noise_steps,
            mask_token_id=mask_token_id,
            infilling_mean_length=self.infilling_mean_length,
            **shares,
        )
