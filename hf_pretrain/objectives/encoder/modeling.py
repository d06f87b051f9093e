"""An encoder with its pre-training heads, all run on gathered positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import first_position, num_token_types
from hf_pretrain.modeling.base import TRIAL_ROWS, PretrainingModel, masked_trial_batch
from hf_pretrain.modeling.configuration import (
    CompositeConfig,
    ModelArguments,
    SubModelConfig,
    dtype_option,
    load_or_build,
)
from hf_pretrain.modeling.embeddings import language_input, language_inputs
from hf_pretrain.modeling.heads import (
    PairHead,
    SpanBoundaryHead,
    load_head,
    pair_logits,
    stock_class,
    takes_pair_labels,
)
from hf_pretrain.modeling.kernels import OutputMap
from hf_pretrain.modeling.losses import (
    IGNORED,
    ExampleSum,
    GatheredHead,
    PretrainingOutput,
    begin_in_column_0,
    masked_lm_accuracy,
    sum_of_targets,
    token_losses,
)
from hf_pretrain.modeling.visibility.lm_modes import lm_mode_inputs
from hf_pretrain.modeling.visibility.rules import has_padding, isolated_inputs

HEADS = ("mlm", "pair", "span_boundary", "word_order")

# Entries of the batch that only a head reads.
_SPAN_ENTRIES = ("span_left", "span_right", "span_offsets", "span_labels")
_ORDER_ENTRIES = ("order_positions", "order_labels")
_HEAD_FOLDERS = {"pair_head": "pretraining/pair_head", "span_boundary_head": "pretraining/span_boundary_head"}


@strict
class EncoderForPreTrainingConfig(CompositeConfig):
    """Configuration of [`EncoderForPreTraining`].

    Attributes:
        model: Configuration of the stock model.
        heads: Names of the heads, of "mlm", "pair", "span_boundary" and "word_order"; "mlm" is one of them.
        pair_classes: Relations between the two segments of an example that are told apart, 2 or 3.
        pair_task: What those are called; for the reader.
        span_positions: Tokens of a hidden span that are predicted from its boundaries.
        has_bitext: Whether some examples are translations, whose masked-LM loss is called "tlm".
        has_clm: Whether some examples are causal, whose loss is called "clm".
        shifted: Whether a masked token is predicted from the state of the token before it; a next token always is. The
            configuration of the stock model says so too.
    """

    model_type = "hf_pretrain_encoder"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None
    heads: list[str] | None = None
    pair_classes: int = 2
    pair_task: str | None = None
    span_positions: int = 20
    has_bitext: bool = False
    has_clm: bool = False
    shifted: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse heads that are unknown."""
        self.heads = ["mlm"] if self.heads is None else self.heads
        unknown = [name for name in self.heads if name not in HEADS]
        if unknown or "mlm" not in self.heads:
            problem = f"holds {unknown[0]!r}" if unknown else "leaves out 'mlm', with which all others are trained"
            raise InputError(f"heads={self.heads!r} {problem}: name some of {', '.join(HEADS)}")
        if self.pair_classes not in (2, 3):
            raise InputError(f"pair_classes={self.pair_classes} must be 2 or 3")
        super().__post_init__(**kwargs)


class EncoderForPreTraining(PretrainingModel):
    """Any stock masked language model with further heads, trained on gathered targets.

    Heads by name: "mlm" restores hidden tokens, and predicts the next tokens of causal examples; "word_order" restores the
    order of shuffled ones, by the same stock head; "pair" says how two segments belong together; "span_boundary" predicts
    hidden tokens from the two around their span. Where transformers has a class with a pair head of two classes for the
    architecture (BERT, ALBERT, ...), that class is trained, else the masked-LM class with a [`PairHead`] beside it.

    Args:
        config: Configuration with the stock model's inside.
        model: The stock model to train, such as one from `AutoModelForMaskedLM.from_pretrained`; built from the configuration,
            with fresh weights, when not given.

    Raises:
        InputError: If the stock model lacks a pair head that its architecture has in another class.
    """

    config_class = EncoderForPreTrainingConfig

    def __init__(self, config: EncoderForPreTrainingConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        assert config.heads is not None, "the configuration fills it in"
        auto_class = stock_class(config.model, heads=config.heads, pair_classes=config.pair_classes)
        self.model = auto_class.from_config(config.model) if model is None else model
        if auto_class is AutoModelForPreTraining and not takes_pair_labels(type(self.model)):
            raise InputError(
                f"{type(self.model).__name__} has no pair head: open the checkpoint with AutoModelForPreTraining"
            )
        self.pair_head: PairHead | None = None
        self.span_boundary_head: SpanBoundaryHead | None = None
        if "pair" in config.heads and auto_class is AutoModelForMaskedLM:
            self.pair_head = PairHead.for_encoder(config.model, num_classes=config.pair_classes)
        if "span_boundary" in config.heads:
            self.span_boundary_head = SpanBoundaryHead.for_encoder(self.model, span_positions=config.span_positions)
        present = {folder: head for head, folder in _HEAD_FOLDERS.items() if getattr(self, head) is not None}
        self.export_parts = {"": "model", **present}
        self._first_position = first_position(self.model.base_model)
        self.mlm_head = GatheredHead(self.model)
        self.output_map = OutputMap(self.model)
        self.post_init()

    @classmethod
    def from_arguments(
        cls,
        args: ModelArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stock: PreTrainedModel | None = None,
        heads: Sequence[str] = ("mlm",),
        changes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EncoderForPreTraining:
        """Load the checkpoint that the arguments name, or build the model that they describe.

        Args:
            args: What to load or to build.
            tokenizer: Sizes the vocabulary of a model from scratch.
            stock: A stock model instead, with or without a head.
            heads: Names of the heads. Those that an export of this library has in `pretraining` are loaded.
            changes: Configuration values of a model from scratch that go before those of `args`.
            **options: Further fields of [`EncoderForPreTrainingConfig`].

        Raises:
            InputError: If the model cannot be loaded or built.
        """
        name, choose = args.model_name_or_path, AutoModelForMaskedLM
        options |= dtype_option(args)
        if "pair" in heads:
            choose = partial(stock_class, heads=heads, pair_classes=options.get("pair_classes", 2))
        model = load_or_build(choose, args, tokenizer, stock=stock, **(changes or {}))
        joined = cls.from_model(model, heads=list(heads), **options)
        for head, folder in _HEAD_FOLDERS.items():
            if name is not None and getattr(joined, head) is not None:
                load_head(getattr(joined, head), name, folder=folder)
        return joined

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the word embeddings of the stock model."""
        return self.model.get_input_embeddings()

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens with targets of every head; see [`PretrainingModel.trial_batch`]."""
        batch = masked_trial_batch(self.model)
        if self.config.shifted:
            # The first token of a row has no state before it.
            batch["target_positions"] = batch["target_positions"] + 1
            batch["labels"] = torch.where(batch["labels"].roll(1, dims=1) == IGNORED, IGNORED, batch["input_ids"])
        some, zeros = batch["target_positions"], torch.zeros_like(batch["target_positions"])
        words = batch["input_ids"].flatten()[some]
        if "pair" in self.config.heads:
            batch["pair_labels"] = zeros[:TRIAL_ROWS]
        if "word_order" in self.config.heads:
            batch |= {"order_positions": some, "order_labels": words}
        if "span_boundary" in self.config.heads:
            batch |= {"span_left": some, "span_right": some, "span_offsets": zeros, "span_labels": words}
        if language_input(self.model.config) is not None:
            batch["langs"] = torch.zeros_like(batch["input_ids"])
        return batch

    def count_targets(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the number of targets of each loss; a loss that the batch has no entries for has none."""
        is_target_BL, heads = batch["labels"] != IGNORED, self.config.heads
        counts = {"mlm": is_target_BL.sum()}
        none = torch.zeros_like(counts["mlm"])
        if self.config.has_bitext:
            is_bitext_B = batch.get("is_bitext")
            counts["tlm"] = none if is_bitext_B is None else (is_target_BL & is_bitext_B[:, None]).sum()
            counts["mlm"] = counts["mlm"] - counts["tlm"]
        if self.config.has_clm:
            is_causal_B = batch.get("is_causal")
            counts["clm"] = none if is_causal_B is None else (is_target_BL & is_causal_B[:, None]).sum()
            counts["mlm"] = counts["mlm"] - counts["clm"]
        for head, entry in (("pair", "pair_labels"), ("span_boundary", "span_labels"), ("word_order", "order_labels")):
            if head in heads:
                counts[head] = (batch[entry] != IGNORED).sum() if entry in batch else none
        return counts

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the encoder, unless the text is read in one direction or in several modes."""
        return () if {"lm_modes", "is_causal"} & batch.keys() else ("model",)

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return whether any row is padded; see [`PretrainingModel.host_inputs`].

        Raises:
            InputError: If a target has no token before it that could predict it.
        """
        is_read_before_BL = batch["labels"] != IGNORED
        if not config.shifted:
            is_causal_B = batch.get("is_causal")
            is_read_before_BL = is_read_before_BL & (False if is_causal_B is None else is_causal_B[:, None])
        is_token_BL = F.pad(batch["attention_mask"][:, :-1], (1, 0)) != 0
        if bool((is_read_before_BL & ~is_token_BL).any()):
            raise InputError(
                "labels: the first token of a row is a target, but is to be predicted from the token before it: make the batch "
                "with DataCollatorForEncoder(shifted=True)"
            )
        return has_padding(batch)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        *,
        is_bitext: torch.Tensor | None = None,
        is_causal: torch.Tensor | None = None,
        lm_modes: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> PretrainingOutput:
        """Return the sum of each loss over its targets; a loss that the batch has no targets of is zero.

        Args:
            input_ids: ``[B, L]`` corrupted tokens.
            attention_mask: ``[B, L]``.
            labels: ``[B, L]`` original ids at the selected positions, -100 elsewhere.
            target_positions: ``[T]`` flat positions of the targets; one with label -100 is a filler.
            is_bitext: ``[B]`` whether an example is a pair of translations.
            is_causal: ``[B]`` whether tokens of an example see only those before them, and its targets are next tokens. Given
                instead of `lm_modes`.
            lm_modes: ``[B]`` of [`LMMode`], with `source_lengths` ``[B]``: what the tokens of an example see.
            **inputs: Targets of further heads: `pair_labels` ``[B]``, -100 for none; `order_positions`, `order_labels` ``[O]``;
                `span_left`, `span_right` (flat positions around the span), `span_offsets`, `span_labels` ``[S]``. Further
                inputs of the stock model, such as `token_type_ids`; `langs` ``[B, L]``, which go under the name that it has
                for them. With `document_ids` and `position_ids`, the documents of a row do not see each other.

        Returns:
            The losses (nats) by the names of the heads, "tlm" where there may be translations, and "clm" where there may be
            causal examples; with the modes of masked tokens the metrics of their loss in each, such as "left_to_right_nll"; in
            evaluation an accuracy for each loss.
        """
        empty = target_positions[:0]
        order_positions, order_labels = [inputs.pop(name, empty) for name in _ORDER_ENTRIES]
        span_left, span_right, span_offsets, span_labels = [inputs.pop(name, empty) for name in _SPAN_ENTRIES]
        pair_labels = inputs.pop("pair_labels", labels.new_full((len(labels),), IGNORED))
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        read_positions = self._read_positions(target_positions, is_causal, length=labels.shape[1])
        positions = [torch.cat([read_positions, order_positions]), span_left, span_right]
        if "pair" in self.config.heads:
            inputs, positions = begin_in_column_0(inputs, positions)
        if is_causal is not None:
            assert lm_modes is None, "causal examples and others are read in modes of their own"
            lm_modes = LMMode.LEFT_TO_RIGHT * is_causal.long()
            inputs["source_lengths"] = torch.zeros_like(lm_modes)
        targets_T = labels.flatten().index_select(0, target_positions)
        with self.output_map.losses(in_chunks=self.training and self._weighs_alike()) as judge:
            run = self.mlm_head.run(self.model, positions[0], **self._stock_inputs(inputs, lm_modes))
        mlm_TX, order_OX = run.logits.split([len(target_positions), len(order_positions)])

        output, shape = PretrainingOutput(losses={}, metrics={}), labels.shape
        mlm_nll_T = judge(mlm_TX, targets_T)
        self._add(output, "mlm", mlm_nll_T, mlm_TX, targets_T, positions=target_positions, shape=shape)
        if self.config.has_bitext:
            _name_rows(output, "tlm", is_bitext)
        if self.config.has_clm:
            _name_rows(output, "clm", is_causal)
        if lm_modes is not None and is_causal is None:
            output.metrics |= _by_mode(output.losses["mlm"], lm_modes)
        if "word_order" in self.config.heads:
            self._judge(output, "word_order", order_OX, order_labels, positions=order_positions, shape=shape)
        if self.span_boundary_head is not None:
            around = [run.states.flatten(0, 1).index_select(0, side) for side in positions[1:]]
            logits_SV = self.span_boundary_head(*around, span_offsets, self.get_input_embeddings().weight)
            self._judge(output, "span_boundary", logits_SV, span_labels, positions=span_left, shape=shape)
        if "pair" in self.config.heads:
            logits_BC = pair_logits(run.output) if self.pair_head is None else self.pair_head(run.states[:, 0])
            rows = torch.arange(len(pair_labels), device=pair_labels.device)
            self._judge(output, "pair", logits_BC, pair_labels, positions=rows, shape=torch.Size((len(rows), 1)))
        return output

    def _weighs_alike(self) -> bool:
        """Return whether all targets of the stock head weigh the same: they belong to one loss."""
        return not (self.config.has_bitext or self.config.has_clm or "word_order" in self.config.heads)

    def _read_positions(
        self, target_positions: torch.Tensor, is_causal: torch.Tensor | None, *, length: int
    ) -> torch.Tensor:
        """Return the flat positions of the states that the head reads to predict the targets, ``[T]``."""
        if self.config.shifted:
            # A filler may stand in column 0; what is read for it does not count.
            return (target_positions - 1).clamp(min=0)
        if is_causal is None:
            return target_positions
        rows = torch.div(target_positions, length, rounding_mode="floor")
        return (target_positions - is_causal.long().index_select(0, rows)).clamp(min=0)

    def _stock_inputs(self, inputs: dict[str, Any], lm_modes: torch.Tensor | None) -> dict[str, Any]:
        """Turn the batch into what the stock model takes."""
        if num_token_types(self.model.config) < 2:
            # One type tells nothing, and a second has no embedding.
            inputs.pop("token_type_ids", None)
        if "langs" in inputs:
            inputs = language_inputs(self.model.config, **inputs)
        if lm_modes is not None:
            inputs.pop("is_padded", None)
            return lm_mode_inputs(self.model, lm_modes=lm_modes, **inputs)
        inputs.pop("source_lengths", None)
        if "position_ids" in inputs and "document_ids" not in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self._first_position
        return isolated_inputs(self.model, **inputs)

    def _judge(
        self, output: PretrainingOutput, name: str, logits: torch.Tensor, targets: torch.Tensor, **where: Any
    ) -> None:
        """Add the loss of a head and, in evaluation, its accuracy."""
        self._add(output, name, token_losses(logits, targets), logits, targets, **where)

    def _add(
        self,
        output: PretrainingOutput,
        name: str,
        nll: torch.Tensor,
        logits: torch.Tensor,
        targets: torch.Tensor,
        **where: Any,
    ) -> None:
        output.losses[name] = sum_of_targets(nll, targets, **where)
        if not self.training:
            output.metrics[f"{name}_accuracy"] = masked_lm_accuracy(logits.argmax(-1), targets, **where)


def _name_rows(output: PretrainingOutput, name: str, is_named: torch.Tensor | None) -> None:
    """Divide what was found of the targets of the head "mlm" between some examples, ``[B]``, and the others, "mlm".

    Args:
        output: Losses and metrics; those of "mlm" are divided.
        name: What those of the examples are called: "tlm" for translations, "clm" for causal ones.
        is_named: ``[B]``; None if no example is one.
    """
    for parts in (output.losses, output.metrics):
        for key in [key for key in parts if key.startswith("mlm")]:
            whole = parts[key]
            share = torch.zeros_like(whole.count) if is_named is None else is_named.to(whole.count.dtype)
            parts[key] = ExampleSum(whole.sum * (1 - share), whole.count * (1 - share))
            parts[key.replace("mlm", name, 1)] = ExampleSum(whole.sum * share, whole.count * share)


def _by_mode(loss: ExampleSum, lm_modes: torch.Tensor) -> dict[str, ExampleSum]:
    """Return the loss of the examples of each mode, without a graph."""
    shares = {mode.name.lower(): (lm_modes == mode).to(loss.count.dtype) for mode in LMMode}
    return {f"{name}_nll": ExampleSum(loss.sum.detach() * share, loss.count * share) for name, share in shares.items()}
