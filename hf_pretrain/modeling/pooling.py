"""Vectors of texts: how the states of their tokens are pooled, and the modules of a sentence-transformers folder.

A folder of sentence-transformers has an encoder at its root, and `modules.json` names what follows: pooling over the
tokens, perhaps a linear layer, and perhaps a division by the length. [`SentenceModules`] reads these files, computes the vectors
of rows that are one text each, and writes the files; [`sentence_modules_of`] are those of an encoder that was trained here.
[`pool_states`] is the pooling alone, for states of any layer, and [`pool_texts`] makes the same vectors where several texts share
a row. [`TextPooler`] is a layer behind them, for training alone.
The library itself is not needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_pretrain.errors import InputError, check_choice, one_line
from hf_pretrain.files import write_text
from hf_pretrain.modeling.backbone import shared_options, without_autocast

POOLINGS = {"mean": "mean", "cls": "cls", "cls_mlp": "cls"}
"""How a text becomes a vector in training -> in use: the layer of "cls_mlp" is left behind."""

TEXT_POOLER_FOLDER = "pretraining/text_pooler"
"""Folder of an export that holds the [`TextPooler`]."""

MODULES = "modules.json"
_TRANSFORMER, _LIBRARY, _CONFIG = "sentence_bert_config.json", "config_sentence_transformers.json", "config.json"
# Keys of a pooling configuration, in the order in which their vectors are put side by side.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")
_ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_STATIC_ORDERS = (["StaticEmbedding"], ["StaticEmbedding", "Normalize"])


@dataclass(frozen=True)
class SentenceModules:
    """What follows an encoder in a sentence-transformers folder, as its files say it.

    Attributes:
        pooling: Configuration of the pooling.
        normalizes: Whether vectors are divided by their length.
        transformer: How text is read: `max_seq_length` in tokens, and more.
        library: Prompts and the similarity of the model; {} if the folder does not say.

    Raises:
        InputError: If the configuration has no pooling that is known, or lowers the case of text.
    """

    pooling: dict[str, Any] = field(default_factory=lambda: {"pooling_mode_mean_tokens": True})
    normalizes: bool = False
    transformer: dict[str, Any] = field(default_factory=dict)
    library: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in _MODES.values()]
        if unknown:
            raise InputError(f"pooling_mode={unknown[0]!r} is unknown: choose of {', '.join(_MODES.values())}")
        if self.transformer.get("do_lower_case"):
            raise InputError(
                f"do_lower_case=true of {_TRANSFORMER} is not supported: let the tokenizer lower the case, and set it to false"
            )

    @classmethod
    def read(cls, name_or_path: str) -> SentenceModules | None:
        """Read the files of a folder or a repository; None if it has no `modules.json`.

        Args:
            name_or_path: Folder, or name on the Hub.

        Raises:
            InputError: If a module has no counterpart here, such as `Dense`, or a file is damaged.
        """
        listed = _read_json(name_or_path, MODULES)
        if listed is None:
            return None
        try:
            folders = {entry["type"].rpartition(".")[2]: entry["path"] for entry in listed}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{MODULES} of {name_or_path!r} lists no modules with type and path") from error
        if list(folders) in _STATIC_ORDERS:
            # The table of words is the whole encoder, and the vector of a text their mean.
            return cls(normalizes="Normalize" in folders, library=_read_json(name_or_path, _LIBRARY) or {})
        if list(folders) not in _ORDERS or len(folders) != len(listed) or folders["Transformer"]:
            other = [kind for kind in folders if kind not in _ORDERS[-1]]
            found = other[0] if other else f"the order {', '.join(folders)}, or a Transformer in a folder of its own"
            raise InputError(
                f"{MODULES} of {name_or_path!r} has {found}: give a model of a Transformer at the root, Pooling, Normalize"
            )
        pooling = _read_json(name_or_path, f"{folders['Pooling']}/{_CONFIG}")
        if pooling is None:
            raise InputError(f"{name_or_path!r} has no {folders['Pooling']}/{_CONFIG}: copy the whole model again")
        transformer, library = (_read_json(name_or_path, file) or {} for file in (_TRANSFORMER, _LIBRARY))
        return cls(pooling, "Normalize" in folders, transformer, library)

    @property
    def modes(self) -> tuple[str, ...]:
        """The kinds of pooling, whose vectors are put side by side."""
        mode = self.pooling.get("pooling_mode")
        if mode is None:
            return tuple(name for key, name in _MODES.items() if self.pooling.get(key)) or ("mean",)
        return (mode,) if isinstance(mode, str) else tuple(mode)

    @property
    def max_length(self) -> int | None:
        """Tokens of a text that are read; None if the files do not say."""
        return self.transformer.get("max_seq_length")

    def width(self, hidden_size: int) -> int:
        """Return the width of the vectors of an encoder."""
        return len(self.modes) * hidden_size

    def vectors(
        self, states: torch.Tensor, attention_mask: torch.Tensor, dense: torch.nn.Module | None = None
    ) -> torch.Tensor:
        """Return the vector of each text, as `SentenceTransformer.encode` computes it.

        Args:
            states: ``[B, L, D]`` last hidden states.
            attention_mask: ``[B, L]``, 0 at padding.
            dense: A linear layer behind the pooling.

        Returns:
            ``[B, E]`` in fp32.
        """
        with without_autocast(states.device):
            vectors = torch.cat(
                [pool_states(states.float(), attention_mask, mode=mode) for mode in self.modes], dim=-1
            )
            vectors = vectors if dense is None else dense(vectors)
            return F.normalize(vectors, dim=-1) if self.normalizes else vectors

    def write(
        self, folder: Path, *, hidden_size: int, longest: int | None = None, dense: torch.Tensor | None = None
    ) -> None:
        """Write the files that let `SentenceTransformer(folder)` compute the vectors of an encoder at the root.

        Args:
            folder: Folder of the encoder.
            hidden_size: Its width.
            longest: Tokens that it can read; None for any number.
            dense: ``[E, width]`` weights of a linear layer behind the pooling.
        """
        width_key = next((key for key in _WIDTHS if key in self.pooling), _WIDTHS[0])
        lengths = [length for length in (self.max_length, longest) if length is not None]
        kinds = ["Transformer", "Pooling", *["Dense"] * (dense is not None), *["Normalize"] * self.normalizes]
        paths = ["" if not number else f"{number}_{kind}" for number, kind in enumerate(kinds)]
        listed = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        contents: dict[str, Any] = {
            MODULES: listed,
            _TRANSFORMER: self.transformer | ({"max_seq_length": min(lengths)} if lengths else {}),
            f"{paths[1]}/{_CONFIG}": self.pooling | {width_key: hidden_size},
        }
        if self.library:
            contents[_LIBRARY] = self.library
        if dense is not None:
            sizes = {"in_features": dense.shape[1], "out_features": dense.shape[0], "bias": False}
            contents[f"{paths[2]}/{_CONFIG}"] = sizes | {"activation_function": "torch.nn.modules.linear.Identity"}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, json.dumps(content, indent=2) + "\n")
        if dense is not None:
            weights = {"linear.weight": dense.detach().float().cpu().contiguous()}
            save_file(weights, folder / paths[2] / "model.safetensors", metadata={"format": "pt"})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


def from_config(values: Mapping[str, Any] | None) -> SentenceModules | None:
    """Return the modules that [`SentenceModules.to_dict`] made plain data of; None of None."""
    return None if values is None else SentenceModules(**values)


def sentence_modules_of(pooling: str, *, normalizes: bool, max_seq_length: int) -> SentenceModules:
    """Return the modules behind an encoder that was trained here, of classes that sentence-transformers itself has.

    Args:
        pooling: How the vectors were made in training: "mean" of all tokens, the special ones too; "cls", the first token;
            "cls_mlp", the first token with a [`TextPooler`] behind it, which is left out in use, as in SimCSE.
        normalizes: Whether vectors are divided by their length. They are compared by cosine then, else by their product.
        max_seq_length: Tokens of a text that are read.

    Raises:
        InputError: If the pooling is unknown.
    """
    check_choice(pooling, POOLINGS, name="pooling")
    # The keys of older versions, which newer ones read too.
    chosen = {key: name == POOLINGS[pooling] for key, name in _MODES.items() if name in POOLINGS.values()}
    return SentenceModules(
        pooling=chosen,
        normalizes=normalizes,
        transformer={"max_seq_length": max_seq_length, "do_lower_case": False},
        library={"similarity_fn_name": "cosine" if normalizes else "dot"},
    )


def pool_texts(
    states: torch.Tensor, text_ids: torch.Tensor, first_positions: torch.Tensor, *, mode: str
) -> torch.Tensor:
    """Return the vectors of texts, of which several may lie in one row: those of [`SentenceModules`] for one text a row.

    Args:
        states: ``[P, W, D]`` last hidden states.
        text_ids: ``[P, W]`` number of the text that a token belongs to, from 0; -1 at padding, and at tokens of no text.
        first_positions: ``[R]`` flat position of each text's first token.
        mode: "mean" of all tokens of the text, the special ones too, or "cls", its first token.

    Returns:
        ``[R, D]`` in fp32.

    Raises:
        InputError: If the mode is unknown.
    """
    check_choice(mode, set(POOLINGS.values()), name="mode")
    states_ND, numbers_N = states.flatten(0, 1), text_ids.flatten()
    if mode == "cls":
        return states_ND.index_select(0, first_positions).float()
    num_texts = len(first_positions)
    # Row 0 takes what is of no text: padding may hold values that are not a number, which no product would remove.
    sums_SD = torch.zeros(num_texts + 1, states.shape[2], dtype=torch.float32, device=states.device)
    counts_S = torch.zeros(num_texts + 1, dtype=torch.float32, device=states.device)
    sums_SD = sums_SD.index_add(0, numbers_N + 1, states_ND.float())[1:]
    counts_S = counts_S.index_add(0, numbers_N + 1, torch.ones_like(numbers_N, dtype=torch.float32))[1:]
    return sums_SD / counts_S.clamp(min=1)[:, None]


def pool_states(states: torch.Tensor, attention_mask: torch.Tensor, *, mode: str) -> torch.Tensor:
    """Return the vector of each row of states: those of its tokens pooled in one of the ways of sentence-transformers.

    Args:
        states: ``[B, L, D]`` states, in fp32 where the result is to be exact.
        attention_mask: ``[B, L]``, 0 at padding, which may be on either side and hold anything.
        mode: "cls" for the first token, "lasttoken", "mean", "max", "mean_sqrt_len_tokens", or "weightedmean", where later tokens
            count more.

    Returns:
        ``[B, D]``.
    """
    states_BLD, mask_BL = states, attention_mask
    length = mask_BL.shape[1]
    # Not by a product: padding may hold values that are not a number.
    states_BLD = states_BLD.masked_fill(mask_BL[:, :, None] == 0, 0)
    first_B = mask_BL.int().argmax(1)
    if mode in ("cls", "lasttoken"):
        last_B = length - 1 - mask_BL.flip(1).int().argmax(1)
        chosen_B = first_B if mode == "cls" else last_B
        return states_BLD.gather(1, chosen_B[:, None, None].expand(-1, 1, states_BLD.shape[2])).squeeze(1)
    if mode == "max":
        return states_BLD.masked_fill(mask_BL[:, :, None] == 0, float("-inf")).amax(1)
    weights_BL = mask_BL.float()
    if mode == "weightedmean":
        weights_BL = weights_BL * (torch.arange(1, length + 1, device=mask_BL.device) - first_B[:, None])
    total_B = weights_BL.sum(1, keepdim=True).clamp(min=1e-9)
    return (states_BLD * weights_BL[:, :, None]).sum(1) / (
        total_B.sqrt() if mode == "mean_sqrt_len_tokens" else total_B
    )


@strict
class TextPoolerConfig(PreTrainedConfig):
    """Configuration of [`TextPooler`].

    Attributes:
        hidden_size: Width of the states.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "hf_pretrain_text_pooler"

    hidden_size: int = 256
    initializer_range: float = 0.02


class TextPooler(PreTrainedModel):
    """A layer behind the first token's state, linear and tanh, that training puts before the comparison of texts.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", its ablation of pooling methods:
    without supervision, the vectors are best if the layer is there in training and left out in use.
    """

    config_class = TextPoolerConfig
    main_input_name = "hidden_states"

    def __init__(self, config: TextPoolerConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    @classmethod
    def for_encoder(cls, config: PreTrainedConfig) -> TextPooler:
        """Build a layer for an encoder with this configuration."""
        return cls(TextPoolerConfig(**shared_options(config, "hidden_size", "initializer_range")))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return ``[R, D]`` vectors, in fp32, of the texts' first states, ``[R, D]``."""
        with without_autocast(hidden_states.device):
            return torch.tanh(self.dense(hidden_states.to(self.dense.weight.dtype))).float()


def _read_json(name_or_path: str, file: str) -> Any:
    """Return the content of a file of a model, None if there is no such file."""
    quiet = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = cached_file(name_or_path, file, **quiet)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise InputError(f"{file} of {name_or_path!r} is no JSON ({one_line(error)}): copy it again") from error
