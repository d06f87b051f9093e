"""The model of GPT-1's fine-tuning: a stock causal model with a linear head.

The order: the configuration, the output, the model, the check of a causal model, the draws, and the two losses.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from scipy.special import ndtri
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.modeling.backbone import (
    name_of,
    row_position_inputs,
    takes_input,
    vocabulary_size,
)
from hf_pretrain.modeling.base import ModelOfModels
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.loading import from_config
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, GatheredHead, masked_lm_loss
from hf_pretrain.modeling.surgery.vocabulary import vocabulary_tables
from hf_pretrain.modeling.visibility.causal import causal_body, sees_what_follows
from hf_pretrain.transfer.generative.inputs import (
    TransferTokens,
    Transformation,
    add_transfer_tokens,
    positions_before_tokens,
)

# Standard deviation of the head and of the new rows of the tables.
_SPREAD = 0.02
LM_LOSS_WEIGHT = 0.5
"""GPT-1's weight of the language-model loss."""


@strict
class GenerativeTransferConfig(CompositeConfig):
    """Configuration of [`GenerativeTransferModel`].

    Attributes:
        model: Configuration of the stock causal model.
        transformation: "classification", "entailment", "similarity" or "multiple_choice".
        transfer_token_ids: Ids of `_start_`, `_delimiter_` and `_classify_`.
        classifier_dropout: Dropout of the state that the head reads.
    """

    model_type = "hf_pretrain_generative_transfer"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012
    # A Trainer would gather them beside the logits.
    keys_to_ignore_at_inference = ["losses"]  # noqa: RUF012

    model: SubModelConfig = None
    transformation: str = "classification"
    transfer_token_ids: list[int] | None = None
    classifier_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        """Say whether the causal model ties its tables, which peft asks of the whole."""
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = getattr(self.model, "tie_word_embeddings", False)

    @property
    def is_regression(self) -> bool:
        """Whether the one output is a value; of several answers it is a score."""
        return self.num_labels == 1 and self.transformation != "multiple_choice"


@dataclass
class GenerativeTransferOutput(ModelOutput):
    """Output of [`GenerativeTransferModel`].

    Attributes:
        loss: The mean of the task's loss plus the weighted mean of the language-model loss, over the examples of this batch.
        logits: ``[B, K]`` of classes, ``[B, 1]`` a value, or ``[B, C]`` of answers, in fp32.
        losses: Sums by name: "task", and "lm" if its weight is above 0.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]
    losses: dict[str, ExampleSum] | None = None


class GenerativeTransferModel(ModelOfModels):
    """A stock causal model with a linear head on the state at the last token of a row, `_classify_`.

    For "similarity" the states of both orders are added before the head. For "multiple_choice" the head scores each row, and the
    softmax is over the rows of an example; they share one dropout mask. As in the paper's equation 3, the head has no bias, so
    that it is a stock classifier's: see `to_sequence_classifier`. Build it by `from_model`; `from_pretrained` opens it again.

    Args:
        config: Configuration with that of the causal model inside.
        model: The causal model; built from the configuration when not given.

    Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2; the official
    `train.py`, `model`.
    """

    config_class = GenerativeTransferConfig

    def __init__(self, config: GenerativeTransferConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        check_choice(config.transformation, get_args(Transformation), name="transformation")
        self.model = from_config(AutoModelForCausalLM, config.model) if model is None else model
        body = causal_body(self.model)
        self._body_name = name_of(self.model, body)
        self.lm_head = GatheredHead(self.model, body=body)
        output = self.model.get_output_embeddings()
        table = self.model.get_input_embeddings()
        if output.weight is table.weight:
            # Known of the part already; peft asks the whole.
            names = [f"model.{name_of(self.model, part)}.weight" for part in (output, table)]
            self._tied_weights_keys = {names[0]: names[1]}
        self.score = nn.Linear(output.weight.shape[1], config.num_labels, bias=False, dtype=self.model.dtype)
        self.post_init()

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        transformation: Transformation = "classification",
        num_labels: int = 2,
        classifier_dropout: float = 0.1,
        seed: int = 0,
        **options: Any,
    ) -> GenerativeTransferModel:
        """Put a head on a causal model.

        The tokenizer gets the special tokens that it lacks. Their rows in the tables, and the head, are normal draws with a
        standard deviation of 0.02, the same for the same seed.

        Args:
            model: Any `AutoModelForCausalLM`; it becomes a part of the result.
            tokenizer: Its tokenizer.
            transformation: "classification", "entailment", "similarity" or "multiple_choice".
            num_labels: Number of classes, 1 for a regression; "multiple_choice" always has one output.
            classifier_dropout: Dropout of the state that the head reads.
            seed: Seed of the draws.
            **options: Further values of the configuration, such as `id2label` and `label2id`.

        Raises:
            InputError: If the model is no causal one, or a value is out of range.
        """
        check_choice(transformation, get_args(Transformation), name="transformation")
        check_range(num_labels, "[1, inf)", name="num_labels", hint="1 is a regression")
        check_range(classifier_dropout, "[0, 1)", name="classifier_dropout", hint="0.1 is GPT-1's")
        _check_has_lm_head(model)
        added, old_size = add_transfer_tokens(tokenizer), vocabulary_size(model.get_input_embeddings())
        new_size = max(tokenizer.get_vocab().values()) + 1
        model.config.pad_token_id = tokenizer.pad_token_id
        _check_causal(model)
        if new_size > old_size:
            model.resize_token_embeddings(new_size, mean_resizing=False)
        names = {} if {"id2label", "label2id"} & set(options) else {"num_labels": num_labels}
        config = GenerativeTransferConfig(
            model=model.config,
            transformation=transformation,
            transfer_token_ids=list(TransferTokens.of(tokenizer)),
            classifier_dropout=classifier_dropout,
            **({"num_labels": 1} if transformation == "multiple_choice" else names | options),
        )
        found = cls(config, model)
        found._draw(sorted({*added, *range(old_size, new_size)}), seed=seed)
        return found

    @torch.no_grad()
    def _draw(self, ids: list[int], *, seed: int) -> None:
        """Draw the head, and the rows of new tokens in all tables."""
        tables, written = self.model.state_dict(), set[int]()
        for name in vocabulary_tables(self.model):
            table = tables[name]
            if ids and table.data_ptr() not in written:  # else it is tied to one before
                written.add(table.data_ptr())
                # A value a token is a bias.
                fresh = (
                    _normal(ids, table.shape[1], seed=seed, stream=name) if table.dim() > 1 else torch.zeros(len(ids))
                )
                table[ids] = fresh.to(table)
        classes = list(range(self.config.num_labels))
        self.score.weight.copy_(_normal(classes, self.score.in_features, seed=seed, stream="score"))

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of tokens."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that predicts tokens."""
        return self.model.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        row_mask: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        lm_loss_weight: float = LM_LOSS_WEIGHT,
    ) -> GenerativeTransferOutput:
        """Score examples, and return the losses if there are labels.

        Args:
            input_ids: ``[B, C, L]``, C rows an example, each of which ends with `_classify_`.
            attention_mask: ``[B, C, L]``, 0 at padding, on either side.
            labels: ``[B]`` classes or numbers of right answers, -100 for none; or values, NaN for none.
            row_mask: ``[B, C]``, false at rows that only fill up an example; by default there are none.
            target_positions: ``[T]`` flat positions in ``[B * C, L]`` at which the next token is predicted; by default all those
                whose next token is none of padding.
            lm_loss_weight: Weight of the language-model loss. With 0 the layer that predicts tokens does not run.
        """
        ids_RL = input_ids.flatten(0, 1)
        mask_RL = torch.ones_like(ids_RL) if attention_mask is None else attention_mask.flatten(0, 1)
        rows_BC = torch.ones_like(input_ids[..., 0], dtype=torch.bool) if row_mask is None else row_mask
        inputs: dict[str, Any] = {"input_ids": ids_RL, "attention_mask": mask_RL}
        # Rows may begin with padding, which some models would count.
        inputs |= row_position_inputs(self.model, mask_RL)
        if takes_input(self.model, "use_cache"):
            inputs["use_cache"] = False
        lm_sum = None
        if labels is not None and lm_loss_weight > 0:
            if target_positions is None:
                target_positions = positions_before_tokens(mask_RL * rows_BC.flatten()[:, None])
            logits_TV, states_RLD, _ = self.lm_head.run(self.model, target_positions, **inputs)
            lm_sum = _lm_sum(logits_TV, ids_RL, target_positions, rows_BC)
        else:
            states_RLD = self.model.get_submodule(self._body_name)(**inputs)[0]
        logits = self._logits(states_RLD, ids_RL, rows_BC)
        if labels is None:
            return GenerativeTransferOutput(logits=logits)
        losses = {"task": _task_sum(logits, labels, is_regression=self.config.is_regression)}
        loss = losses["task"].sum.sum() / losses["task"].count.sum().clamp(min=1)
        if lm_sum is not None:
            losses["lm"], loss = lm_sum, loss + lm_loss_weight * lm_sum.sum.mean()
        return GenerativeTransferOutput(loss=loss, logits=logits, losses=losses)

    def _logits(self, states_RLD: torch.Tensor, ids_RL: torch.Tensor, rows_BC: torch.Tensor) -> torch.Tensor:
        """Return the head's output for each example, from the states of its rows at `_classify_`."""
        columns_R = (ids_RL == self.config.transfer_token_ids[-1]).int().argmax(dim=1)
        states_RD = states_RLD[torch.arange(len(ids_RL), device=ids_RL.device), columns_R]
        states_BCD = states_RD.view(*rows_BC.shape, -1)
        if self.config.transformation != "multiple_choice":
            states_BCD = states_BCD.sum(dim=1, keepdim=True)
        # One mask an example, so that its answers are compared by the same units.
        kept_B1D = F.dropout(torch.ones_like(states_BCD[:, :1]), self.config.classifier_dropout, self.training)
        logits_BCK = self.score((states_BCD * kept_B1D).to(self.score.weight.dtype)).float()
        if self.config.transformation != "multiple_choice":
            return logits_BCK.squeeze(1)
        return logits_BCK.squeeze(2).masked_fill(~rows_BC, torch.finfo(torch.float32).min)

    def adapter_options(self) -> dict[str, Any]:
        """Return the options of a `peft.LoraConfig` that train and save the head and the rows of the special tokens too."""
        parts = [self.get_input_embeddings(), self.get_output_embeddings()]
        names = [name_of(self, part) for part in parts]
        if parts[0].weight is parts[1].weight:
            # peft adapts what is tied to a table along with it.
            names = names[:1]
        ids = list(self.config.transfer_token_ids)
        return {"modules_to_save": ["score"], "trainable_token_indices": {name: ids for name in names}}

    def to_sequence_classifier(self) -> PreTrainedModel:
        """Return a stock classifier with these weights, which scores one row.

        Its logits are those of this model where an example has one row. For "similarity", add the logits of both orders; for
        "multiple_choice", compare those of the answers.

        Raises:
            InputError: If transformers has no classifier of this architecture whose head is one linear layer without bias.
        """
        config = copy.deepcopy(self.config.model)
        config.id2label, config.label2id = dict(self.config.id2label), dict(self.config.label2id)
        config.problem_type = "regression" if self.config.is_regression else None
        classifier: PreTrainedModel = from_config(AutoModelForSequenceClassification, config, dtype=self.dtype)
        wanted, own = classifier.state_dict(), self.model.state_dict()
        state = {name: own[name] for name in wanted if name in own} | {"score.weight": self.score.weight}
        if state.keys() != wanted.keys() or state["score.weight"].shape != wanted["score.weight"].shape:
            raise InputError(
                f"{type(classifier).__name__} has no head of one linear layer on the last state: keep this model, and open it by "
                "GenerativeTransferModel.from_pretrained"
            )
        classifier.load_state_dict(state)
        return classifier.to(self.device).train(self.training)


def _check_has_lm_head(model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the tokens of its input."""
    if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise InputError(
            f"model={type(model).__name__} is no left-to-right language model: open one by AutoModelForCausalLM"
        )


def _check_causal(model: PreTrainedModel) -> None:
    """Refuse a model that sees the tokens that follow."""
    if sees_what_follows(model, lambda ids: model(input_ids=ids).logits):
        raise InputError(
            f"model={type(model).__name__} sees the tokens that follow: open a causal model, or set is_decoder=True"
        )


def _normal(ids: list[int], width: int, *, seed: int, stream: str) -> torch.Tensor:
    """Return a row of normal draws for each id, ``[N, D]``."""
    keys = draws.row_keys(ids, seed=seed, stream=f"generative_transfer/{stream}")
    # Away from 0, where the quantile is not finite.
    uniforms = np.clip(draws.uniforms(keys, width), 2.0**-54, None)
    return torch.from_numpy((ndtri(uniforms) * _SPREAD).astype(np.float32))


def _lm_sum(
    logits_TV: torch.Tensor, ids_RL: torch.Tensor, positions: torch.Tensor, rows_BC: torch.Tensor
) -> ExampleSum:
    """Return the language-model loss of each example: the mean over its rows of each row's mean over its tokens."""
    targets_T = ids_RL.flatten().index_select(0, positions + 1)
    rows = masked_lm_loss(logits_TV, targets_T, positions=positions, shape=ids_RL.shape)
    means_BC = (rows.sum / rows.count.clamp(min=1)).view(rows_BC.shape)
    means_B = means_BC.sum(dim=1) / rows_BC.sum(dim=1).clamp(min=1)
    return ExampleSum(means_B, torch.ones_like(means_B))


def is_labelled(labels: torch.Tensor) -> torch.Tensor:
    """Return which examples have a label, ``[B]`` bool."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


def _task_sum(logits: torch.Tensor, labels: torch.Tensor, *, is_regression: bool) -> ExampleSum:
    """Return squared error or cross-entropy of each example with a label."""
    has_label = is_labelled(labels)
    if is_regression:
        # Before the square, whose gradient would not be a number.
        wanted_B = labels.float().masked_fill(~has_label, 0)
        losses_B = (logits.squeeze(1) - wanted_B).square() * has_label
    else:
        losses_B = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return ExampleSum(losses_B, has_label.float())
