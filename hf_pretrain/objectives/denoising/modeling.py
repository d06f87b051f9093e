"""A stock encoder-decoder that is trained to undo noise, with its head at the targets alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.modeling.backbone import decoder_start_id
from hf_pretrain.modeling.base import PretrainingModel, check_model_fits, trial_tokens
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, dtype_option
from hf_pretrain.modeling.kernels import OutputMap
from hf_pretrain.modeling.losses import (
    IGNORED,
    ExampleSum,
    PretrainingOutput,
    masked_lm_accuracy,
    masked_lm_loss,
    sum_by_example,
    sum_of_targets,
)
from hf_pretrain.modeling.visibility.pairs import PairReader
from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments
from hf_pretrain.objectives.denoising.building import build_stock_model, check_decoder_length
from hf_pretrain.objectives.denoising.collator import START


@strict
class DenoisingConfig(CompositeConfig):
    """Configuration of [`DenoisingForPreTraining`].

    Attributes:
        model: Configuration of the stock model.
        kinds: Names of the kinds of pairs, where there are several.
    """

    model_type = "hf_pretrain_denoising"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None
    kinds: list[str] | None = None


class DenoisingForPreTraining(PretrainingModel):
    """Any stock encoder-decoder, trained to write what noise has taken out of its input.

    Several pairs of input and target may share a row: see [`PairReader`].

    Args:
        config: Configuration with the stock model's inside.
        model: The stock model to train, such as one from `AutoModelForSeq2SeqLM.from_pretrained`; built from the configuration,
            with fresh weights, when not given.

    Raises:
        InputError: If the stock model names no token to begin with.
    """

    config_class = DenoisingConfig

    def __init__(self, config: DenoisingConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = AutoModelForSeq2SeqLM.from_config(config.model) if model is None else model
        self._start_id = decoder_start_id(self.model)
        self.reader = PairReader(self.model)
        self.output_map = OutputMap(self.model)
        self.post_init()

    @classmethod
    def from_arguments(
        cls,
        args: DenoisingModelArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stock: PreTrainedModel | None = None,
        kinds: Sequence[str] = (),
    ) -> DenoisingForPreTraining:
        """Take a stock model, the checkpoint or checkpoints that the arguments name, or the model that they describe."""
        model = build_stock_model(args, tokenizer, stock=stock)
        return cls.from_model(model, kinds=list(kinds) if len(kinds) > 1 else None, **dtype_option(args))

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, *, block_size: int, isolates_documents: bool) -> None:
        """Refuse a stock model that lacks tokens; how long inputs and targets are, the noise says: see [`check_lengths`]."""
        super().check_fits(tokenizer, block_size=0, isolates_documents=isolates_documents)

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, *, inputs: int, targets: int) -> None:
        """Refuse a stock model with too few positions for the longest input, or for the longest target.

        Raises:
            InputError: Naming the length and the fix.
        """
        check_model_fits(self.model, tokenizer, block_size=inputs)
        check_decoder_length(self.model, targets)

    def check_isolation(self, *, length: int) -> None:
        """Refuse a stock model that cannot keep the pairs of a row apart."""
        self.reader.check_isolation(length=length)

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens, each of them a target; see [`PretrainingModel.trial_batch`]."""
        ids = trial_tokens(self.model)
        mask = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
            "labels": ids,
            "target_positions": torch.arange(ids.numel(), device=ids.device),
            "is_hidden": mask.bool(),
            "target_kinds": torch.zeros_like(ids),
        }

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of targets."""
        return {"denoising": (batch["labels"] != IGNORED).sum()}

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return whether either side has padding, and how many pairs a row has; see [`PretrainingModel.host_inputs`]."""
        sides = {"is_padded": "attention_mask", "decoder_is_padded": "decoder_attention_mask"}
        found: dict[str, Any] = {name: not bool(batch[mask].all()) for name, mask in sides.items()}
        if "document_ids" in batch:
            # A power of two: a compiled model would be compiled anew for every number.
            found["num_documents"] = 1 << int(batch["document_ids"].max()).bit_length()
        return found

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the stock model: each attention takes bounds; T5's has a bias, and no flash attention."""
        return self.backbones.keys()

    def forward(
        self,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        is_hidden: torch.Tensor,
        target_kinds: torch.Tensor,
        **batch: Any,
    ) -> PretrainingOutput:
        """Return the loss summed over the targets.

        Args:
            labels: ``[B, T]`` targets, -100 at padding.
            target_positions: ``[N]`` flat positions of the targets, and perhaps some of padding, which do not count.
            is_hidden: ``[B, T]`` bool, the targets that the input does not show.
            target_kinds: ``[B, T]`` index of the kind that a target is of.
            **batch: What [`PairReader.run`] takes; -1 in `decoder_input_ids` stands for the start token.

        Returns:
            The loss "denoising" (nats). In evaluation the metrics "denoising_accuracy"; "hidden_nll" and "hidden_accuracy" of
            hidden targets; "spans_exact", the share of their runs in which each guess is right; and "<kind>_nll" of each kind.
        """
        ids = batch.pop("decoder_input_ids")
        batch["decoder_input_ids"] = ids.masked_fill(ids == START, self._start_id)
        targets_N = labels.flatten().index_select(0, target_positions)
        with self.output_map.losses(in_chunks=self.training) as judge:
            read_NX = self.reader.run(target_positions, **batch)
        nll_N = judge(read_NX, targets_N)
        where: dict[str, Any] = {"positions": target_positions, "shape": labels.shape}
        output = PretrainingOutput(losses={"denoising": sum_of_targets(nll_N, targets_N, **where)}, metrics={})
        if not self.training:
            logits_NV = read_NX
            guesses_N = logits_NV.argmax(-1)
            output.metrics["denoising_accuracy"] = masked_lm_accuracy(guesses_N, targets_N, **where)
            hidden_N, kinds_N = (
                part.flatten().index_select(0, target_positions) for part in (is_hidden, target_kinds)
            )
            only_hidden_N = targets_N.masked_fill(~hidden_N, IGNORED)
            output.metrics["hidden_nll"] = masked_lm_loss(logits_NV, only_hidden_N, **where)
            output.metrics["hidden_accuracy"] = masked_lm_accuracy(guesses_N, only_hidden_N, **where)
            output.metrics["spans_exact"] = exact_runs(guesses_N == targets_N, hidden_N, **where)
            for number, kind in enumerate(self.config.kinds or ()):
                of_kind_N = targets_N.masked_fill(kinds_N != number, IGNORED)
                output.metrics[f"{kind}_nll"] = masked_lm_loss(logits_NV, of_kind_N, **where)
        return output


def exact_runs(
    is_right: torch.Tensor, hidden: torch.Tensor, *, positions: torch.Tensor, shape: torch.Size
) -> ExampleSum:
    """Count the runs of hidden targets in which every guess is right.

    Args:
        is_right: ``[N]`` bool.
        hidden: ``[N]`` bool.
        positions: ``[N]`` flat positions of the targets in the batch, ascending but for fillers at the end, which are not hidden.
        shape: ``(B, T)`` of the batch.

    Returns:
        Exact runs and all runs, by example.
    """
    follows = torch.zeros_like(hidden)
    same_row = torch.div(positions[1:], shape[1], rounding_mode="floor") == torch.div(
        positions[:-1], shape[1], rounding_mode="floor"
    )
    follows[1:] = hidden[:-1] & (positions[1:] == positions[:-1] + 1) & same_row
    begins = hidden & ~follows
    run_N = (begins.cumsum(0) - 1).clamp(min=0)
    wrong_R = torch.zeros(len(positions), device=positions.device)
    wrong_R = wrong_R.index_add(0, run_N, (hidden & ~is_right).float())
    exact_N = begins & (wrong_R.index_select(0, run_N) == 0)
    return ExampleSum(sum_by_example(exact_N, positions, shape), sum_by_example(begins, positions, shape))
