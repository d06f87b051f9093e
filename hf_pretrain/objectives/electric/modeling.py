"""Electric: the generator of noise and the model of the text in one, and the scores of whole texts that the latter gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.metrics import batches_by_length
from hf_pretrain.modeling.backbone import evaluating, longest_sequence, row_position_inputs
from hf_pretrain.modeling.base import GENERATOR_FOLDER, masked_trial_batch
from hf_pretrain.modeling.embeddings import shared_embedding_names
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, sum_by_example
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeModel
from hf_pretrain.objectives.generators import PairConfig, PairForPreTraining, build_discriminator

EMBEDDING_SHARING = ("tied", "none")


@strict
class ElectricConfig(PairConfig):
    """Configuration of [`ElectricForPreTraining`].

    The generator is a two-tower model. `embedding_sharing` is "tied" (word, position and type tables and their layer norm are
    one) or "none".
    """

    model_type = "hf_pretrain_electric"

    def __post_init__(self, **kwargs: Any) -> None:
        """Keep the attention backend of the towers too, which lie one level deeper."""
        tower = getattr(self.generator, "tower", None)
        backend = getattr(tower, "_attn_implementation", None)
        super().__post_init__(**kwargs)
        if tower is not None:
            tower._attn_implementation = backend


def noise_logits(
    energies: torch.Tensor, noise_log_probs: torch.Tensor, noise_share: torch.Tensor | float
) -> torch.Tensor:
    """Return the logit of "this token is noise" for tokens of known noise probability.

    A token is noise with odds k q(x) : (1 - k) p(x), so at the optimum the energy is -log p(x): no constant is left open.

    Args:
        energies: ``[C]`` energies; the lower, the likelier the token is as text.
        noise_log_probs: ``[C]`` log q of the tokens, in nats.
        noise_share: k, the share of the tokens that are noise: ``[C]`` or one number. Where it is 0 or 1 there is nothing to
            tell apart: the logit is then so far out that neither loss nor gradient is left.

    Returns:
        ``[C]`` logits in fp32, positive for noise.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models", section 2.
    """
    share = torch.as_tensor(noise_share, dtype=torch.float32, device=energies.device)
    log_odds = share.clamp(min=1e-30).log() - (1 - share).clamp(min=1e-30).log()
    return energies.float() + noise_log_probs.float() + log_odds


class ElectricForPreTraining(PairForPreTraining):
    """Electric: the energy of every token given its context, learned by telling text from noise of known probability.

    Args:
        config: Configuration with those of both models inside.
        generator: Two-tower model; built from the configuration, with fresh weights, when not given.
        discriminator: Stock model with one logit a token; built likewise.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models", section 2.
    """

    config_class = ElectricConfig
    why_not_flash = "a tower reads in one direction, by a mask"
    export_parts = {"": "discriminator", GENERATOR_FOLDER: "generator"}  # noqa: RUF012

    def __init__(
        self,
        config: ElectricConfig,
        generator: TwoTowerClozeModel | None = None,
        discriminator: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        check_choice(config.embedding_sharing, EMBEDDING_SHARING, name="embedding_sharing")
        self.generator = TwoTowerClozeModel(config.generator) if generator is None else generator
        self.discriminator = build_discriminator(config.discriminator) if discriminator is None else discriminator
        if config.embedding_sharing == "tied":
            shared = shared_embedding_names(self.discriminator, self.generator.left_tower)
            self._tied_weights_keys = {
                f"discriminator.{ours}": f"generator.left_tower.{theirs}" for ours, theirs in shared.items()
            }
        self.post_init()

    @property
    def backbones(self) -> dict[str, PreTrainedModel]:
        """The discriminator and both towers; see [`PretrainingModel.backbones`]."""
        towers = {f"generator.{side}_tower": getattr(self.generator, f"{side}_tower") for side in ("left", "right")}
        return {"discriminator": self.discriminator} | towers

    def check_isolation(self, *, length: int) -> None:
        """Refuse a model of the two that cannot keep the documents of a row apart."""
        self.generator.check_isolation(length=length)
        rules.check_isolation(self.discriminator, length=length)

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens, all of them candidates, two a row with noise; see [`PretrainingModel.trial_batch`]."""
        batch = masked_trial_batch(self.discriminator)
        ordinary = (~self.generator.excluded_tokens).long().argmax()
        batch["input_ids"] = torch.where(
            self.generator.excluded_tokens[batch["input_ids"]], ordinary, batch["input_ids"]
        )
        candidates = torch.arange(batch["input_ids"].numel(), device=self.device)
        uniforms = torch.full(batch["target_positions"].shape, 0.5, device=self.device)
        return batch | {"candidate_positions": candidates, "sample_uniforms": uniforms}

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the discriminator, which sees the whole text."""
        return ("discriminator",)

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the candidates, which both losses are about."""
        count = batch.get("num_candidates", torch.tensor(len(batch["candidate_positions"])))
        return {"cloze": count, "nce": count}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        candidate_positions: torch.Tensor,
        sample_uniforms: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        is_padded: bool | None = None,
        num_candidates: torch.Tensor | None = None,
        **inputs: Any,
    ) -> PretrainingOutput:
        """Run one joint step.

        Args:
            input_ids: ``[B, L]`` the text.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]``, -100 where the text stays, anything else where noise is put.
            target_positions: ``[T]`` flat positions of the noise; one with label -100 is a filler.
            candidate_positions: ``[C]`` flat positions of all tokens that may be noise, those of the noise among them. One
                whose token the generator excludes, so that q = 0, counts for nothing.
            sample_uniforms: ``[T]`` keyed uniforms that decide what the generator puts there.
            document_ids: ``[B, L]`` documents that do not see each other, see [`TwoTowerClozeModel.context_states`].
            position_ids: ``[B, L]`` position of a token in its document, needed with `document_ids`.
            is_padded: Whether any row has padding.
            num_candidates: ``[]`` the candidates without the fillers behind them, which `count_targets` reads; not used here.
            **inputs: Further inputs of both models, such as `token_type_ids`.

        Returns:
            The losses over all candidates (nats): "cloze" of the generator, and "nce" of the discriminator, whose label is 1 for
            noise even if the sample is what stood there. The metrics tell the share of noise ("fake_rate"), how often it is the
            text ("sampled_accuracy"), and the mean "energy" of the text's own tokens, an estimate of their -log p. In evaluation
            also the logits (positive = noise) with their labels.
        """
        shape, text, positions = labels.shape, input_ids.flatten(), candidate_positions
        has_density = ~self.generator.excluded_tokens[text]
        is_noise = (labels.flatten() != IGNORED) & has_density
        is_candidate_C, is_noise_C = has_density[positions], is_noise[positions]

        inputs |= {"attention_mask": attention_mask, "document_ids": document_ids, "position_ids": position_ids}
        states = self.generator.context_states(input_ids, **inputs).flatten(0, 1)
        log_q_C = self.generator.log_probs(
            states.index_select(0, positions), text[positions].where(is_candidate_C, IGNORED)
        )
        samples_T, samples_log_q_T = self.generator.sample(states.index_select(0, target_positions), sample_uniforms)
        put = partial(_put, positions=target_positions, where=is_noise)
        given = put(samples_T, into=text)
        given_log_q = torch.zeros_like(text, dtype=torch.float32).index_copy(0, positions, log_q_C.detach())
        given_log_q = put(samples_log_q_T, into=given_log_q)
        energies_C = self._energies(given.view(shape), is_padded=is_padded, **inputs).index_select(0, positions)

        total = partial(_sum_where, positions=positions, shape=shape)
        num_noise, num_candidates = total(is_noise_C, is_candidate_C)
        # Where there is no candidate it is 0 already, and its gradient has to be that of the others.
        cloze = ExampleSum(sum_by_example(-log_q_C, positions, shape), num_candidates)
        shares = num_noise / num_candidates.clamp(min=1)
        logits_C = noise_logits(energies_C, given_log_q[positions], shares[positions // shape[1]])
        nce_C = F.binary_cross_entropy_with_logits(logits_C, is_noise_C.float(), reduction="none")
        output = PretrainingOutput(
            losses={"cloze": cloze, "nce": total(nce_C, is_candidate_C)},
            metrics={
                "fake_rate": ExampleSum(num_noise, num_candidates),
                "sampled_accuracy": total(given[positions] == text[positions], is_noise_C),
                "energy": total(energies_C.detach(), is_candidate_C & ~is_noise_C),
            },
        )
        if not self.training:
            output.scores = torch.zeros_like(given_log_q).index_copy(0, positions, logits_C).view(shape)
            score_labels = torch.full_like(text, IGNORED).index_copy(0, positions, is_noise_C.long())
            output.score_labels = score_labels.masked_fill(~has_density, IGNORED).view(shape)
        return output

    def _energies(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor,
        document_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the discriminator's logit of every position, ``[B * L]``."""
        if document_ids is None:
            inputs |= row_position_inputs(self.discriminator, attention_mask, whatever_the_ids=True)
        else:
            inputs |= {"document_ids": document_ids, "position_ids": position_ids}
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        model_inputs = rules.isolated_inputs(self.discriminator, **inputs)
        logits: torch.Tensor = self.discriminator(**model_inputs).logits
        return logits.flatten()


def _put(values: torch.Tensor, *, positions: torch.Tensor, into: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    # Fillers of a fixed shape point at positions that were not selected: those stay as they are.
    return torch.where(where, into.index_copy(0, positions, values), into)


def _sum_where(
    values: torch.Tensor, counted: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Sum the counted ones of values at flat positions, by example."""
    sums = sum_by_example(values.float() * counted, positions, shape)
    return ExampleSum(sums, sum_by_example(counted, positions, shape))


def score_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 32
) -> list[float]:
    """Return the pseudo-log-likelihood of each text, for example to choose among several.

    An energy estimates -log p of its token given all the others, so their sum, negated, is what masking the tokens one by one
    would give, in one pass instead of as many as there are tokens. Special tokens, the unknown one among them, add nothing:
    training gives them no energy.

    Args:
        model: The exported discriminator, with one logit a token.
        tokenizer: Its tokenizer.
        texts: The texts; each must fit the model.
        batch_size: Texts a pass; those of similar length go together.

    Returns:
        Sums of log p in nats, in the order of the texts: the higher, the likelier.

    Raises:
        InputError: If the model has more than one logit a token, or a text is longer than the model's positions.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models", section 3.
    """
    rows = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]
    longest = longest_sequence(model)
    for number, row in enumerate(rows):
        if longest is not None and len(row) > longest:
            raise InputError(
                f"texts[{number}] has {len(row)} tokens, more than the {longest} that the model takes: split it"
            )
    special = torch.tensor(tokenizer.all_special_ids, device=model.device)
    scores = np.zeros(len(rows))
    options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": batch_size, "device": model.device}
    with evaluating(model):
        for numbers, batch in batches_by_length(rows, **options, name="Scoring"):
            logits = model(**batch).logits.float()
            if logits.numel() != batch["input_ids"].numel():
                raise InputError(
                    f"model={type(model).__name__} gives {logits.shape[-1]} logits a token: Electric has one"
                )
            counted_BL = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], special)
            scores[numbers] = -(logits.view_as(counted_BL) * counted_BL).sum(dim=1).cpu().numpy()
    return scores.tolist()
