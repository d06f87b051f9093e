"""A stock model that learns to predict its tokens in random orders.

The order: how the model is built or loaded, the composite with its loss, and a batch as stock XLNet takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetLMHeadModel,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel, trial_tokens
from hf_pretrain.modeling.configuration import (
    CompositeConfig,
    ModelArguments,
    SubModelConfig,
    attention_options,
    dtype_option,
    load_or_build,
)
from hf_pretrain.modeling.kernels import OutputMap
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.modeling.losses import IGNORED, PretrainingOutput, RecurrentMemory, masked_lm_accuracy, sum_of_targets
from hf_pretrain.objectives.permutation_lm.two_stream import (
    PermutedBatch,
    PositionTwoStreams,
    XLNetTwoStreams,
)
from hf_pretrain.options import option


@dataclass
class PermutationLMModelArguments(ModelArguments):
    """Which stock model is trained by permutation language modelling; an XLNet by default."""

    model_type: str = option(
        "xlnet",
        "Architecture built from scratch: xlnet, or one that takes position_ids (bert, roberta, modernbert, ...).",
    )
    attn_implementation: str | None = option(None, "Attention backend: sdpa, which it has by default.")


def stock_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that opens an architecture with its head: XLNet's is listed as a causal one."""
    return AutoModelForCausalLM if config.model_type == "xlnet" else AutoModelForMaskedLM


def build_stock_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, stock: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Take a stock model, load the checkpoint that the arguments name, or build the model that they describe.

    Raises:
        InputError: If there is no such checkpoint, or the sizes do not fit the architecture.
    """
    name = args.model_name_or_path
    known = args if name is None else from_pretrained(AutoConfig, name)
    is_xlnet = (known if stock is None else stock.config).model_type == "xlnet"
    # XLNet's attention is replaced, so that its own class need not know the backend.
    options = {} if is_xlnet else attention_options(args)
    auto_class = AutoModelForCausalLM if is_xlnet else AutoModelForMaskedLM
    model: PreTrainedModel = load_or_build(auto_class, args, tokenizer, stock=stock, options=options)
    return model


@strict
class PermutationLMConfig(CompositeConfig):
    """Configuration of [`PermutationLMForPreTraining`].

    Attributes:
        model: Configuration of the stock model inside.
        mask_token_id: Token that stands for a target in the query stream; XLNet has a vector of its own for that.
        two_stream_attention: Backend of XLNet's attention, "sdpa" or "flex_attention".
        mem_len: Positions that the memory holds; 0 for none.
        reuse_len: How many of the first positions of each segment are kept; all if not given.
    """

    model_type = "hf_pretrain_permutation_lm"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None
    mask_token_id: int | None = None
    two_stream_attention: str = "sdpa"
    mem_len: int = 0
    reuse_len: int | None = None


class PermutationLMForPreTraining(PretrainingModel):
    """A stock model that predicts tokens in a random order, each from those before it in that order.

    Any `XLNetLMHeadModel`, or a masked language model that takes `position_ids` and a mask a row, such as BERT, RoBERTa or
    ModernBERT. Every parameter has a gradient; those of XLNet's segments a gradient of zero where all tokens are of one segment,
    with or without `token_type_ids` that say so.

    Args:
        config: Configuration with the stock model's inside.
        model: The stock model to train; built from the configuration, with fresh weights, when not given.

    Raises:
        InputError: If the architecture cannot be trained this way, or cannot have a memory.

    Source: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", sections 2.2 to 2.5.
    """

    config_class = PermutationLMConfig
    export_parts = {"": "model"}  # noqa: RUF012

    def __init__(self, config: PermutationLMConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = stock_class(config.model).from_config(config.model) if model is None else model
        self.two_streams = build_two_streams(self.model, config)
        self.output_map = OutputMap(self.model)
        self.gradient_checkpointing = False
        self.post_init()

    def check_wrapped(self) -> None:
        """Refuse an encoder that cannot be read in two streams."""
        if isinstance(self.two_streams, PositionTwoStreams):
            self.two_streams.check()

    @classmethod
    def from_arguments(
        cls,
        args: ModelArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stock: PreTrainedModel | None = None,
        **options: Any,
    ) -> PermutationLMForPreTraining:
        """Take a stock model, the checkpoint that the arguments name, or the model that they describe; see [`from_model`]."""
        model = build_stock_model(args, tokenizer, stock=stock)
        if isinstance(model, XLNetLMHeadModel) and attention_options(args):
            options["two_stream_attention"] = args.attn_implementation
        return cls.from_model(model, mask_token_id=tokenizer.mask_token_id, **options, **dtype_option(args))

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens, the last two of each row as targets; see [`PretrainingModel.trial_batch`]."""
        ids = trial_tokens(self.model)
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "key_ranks": columns,
            "thresholds": columns,
            "target_columns": columns[:, -2:],
            "labels": ids[:, -2:],
        }

    def check_gradient_checkpointing(self) -> None:
        """Refuse nothing for XLNet, whose layers are run here; see [`PretrainingModel.check_gradient_checkpointing`]."""
        if not isinstance(self.model, XLNetLMHeadModel):
            super().check_gradient_checkpointing()

    @property
    def memory_size(self) -> int:
        """Positions that the memory holds."""
        return self.config.mem_len

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of targets."""
        return {"plm": (batch["labels"] != IGNORED).sum()}

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return which slots of `labels` hold a target; see [`PretrainingModel.host_inputs`]."""
        return {} if "slots" in batch else {"slots": _used_slots(batch["labels"])}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        key_ranks: torch.Tensor,
        thresholds: torch.Tensor,
        target_columns: torch.Tensor,
        labels: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        backward: torch.Tensor | None = None,
        memory: RecurrentMemory | None = None,
        memory_reset: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> PretrainingOutput:
        """Return the loss summed over the targets.

        Args:
            input_ids: ``[B, S]`` tokens, none of them masked.
            attention_mask: ``[B, S]``.
            key_ranks: ``[B, S]``; position i sees the content of j iff ``key_ranks[j] < thresholds[i]``.
            thresholds: ``[B, S]``.
            target_columns: ``[B, P]`` columns of the targets.
            labels: ``[B, P]`` their ids, -100 where a row has fewer targets.
            token_type_ids: ``[B, S]`` segments.
            backward: ``[B]`` bool, lanes that are read from right to left.
            memory: What the segments before have left; empty if not given.
            memory_reset: ``[B]`` bool, rows that begin without it.
            slots: ``[T]`` flat positions in `labels` that hold a target; read from `labels`, which waits for the device, if not
                given.

        Returns:
            The loss "plm" (nats), in evaluation the metric "plm_accuracy", and the new memory if the model has one.
        """
        batch = PermutedBatch(
            input_ids, attention_mask, key_ranks, thresholds, target_columns, token_type_ids, backward
        )
        slots = _used_slots(labels) if slots is None else slots
        memory = self._begin(memory, memory_reset, len(input_ids))
        with self.output_map.losses(in_chunks=self.training) as judge:
            read_TX, kept = self.predict(batch, slots, memory=memory)
        targets_T = labels.flatten().index_select(0, slots)
        where: dict[str, Any] = {"positions": slots, "shape": labels.shape}
        loss = sum_of_targets(judge(read_TX, targets_T), targets_T, **where)
        output = PretrainingOutput(losses={"plm": loss}, metrics={})
        if memory is not None and kept is not None:
            output.memory = memory.append(kept)
        if not self.training:
            output.metrics["plm_accuracy"] = masked_lm_accuracy(read_TX.argmax(-1), targets_T, **where)
        return output

    def predict(
        self, batch: PermutedBatch, slots: torch.Tensor, *, memory: RecurrentMemory | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits at targets ``[T]``, and the layers' inputs that the memory keeps; None without a memory."""
        if isinstance(self.two_streams, PositionTwoStreams):
            return self.two_streams(batch, slots), None
        num_kept = batch.input_ids.shape[1] if self.config.reuse_len is None else self.config.reuse_len
        is_checkpointed = self.gradient_checkpointing and self.training
        checkpoint = self._gradient_checkpointing_func if is_checkpointed else None
        return self.two_streams(batch, slots, memory=memory, num_kept=num_kept, checkpoint=checkpoint)

    def _begin(
        self, memory: RecurrentMemory | None, reset: torch.Tensor | None, num_rows: int
    ) -> RecurrentMemory | None:
        """Return the memory to read: with some rows emptied, empty if there is none yet, None for a model without."""
        if not self.memory_size:
            return None
        if memory is None:
            config = self.model.config
            shape = (config.num_hidden_layers, num_rows, self.memory_size, config.hidden_size)
            return RecurrentMemory.empty(*shape, dtype=self.dtype, device=self.device)
        return memory if reset is None else memory.reset(reset)


def _used_slots(labels: torch.Tensor) -> torch.Tensor:
    return (labels != IGNORED).flatten().nonzero().squeeze(1)


def build_two_streams(model: PreTrainedModel, config: PermutationLMConfig) -> PositionTwoStreams | XLNetTwoStreams:
    """Return how a stock model's two streams are run.

    Raises:
        InputError: If there is no way for this architecture, or none with a memory.
    """
    if isinstance(model, XLNetLMHeadModel):
        return XLNetTwoStreams(model, backend=config.two_stream_attention)
    if config.mem_len:
        raise InputError(
            f"mem_len={config.mem_len}: {type(model).__name__} has no relative positions, which a memory needs; use xlnet, "
            "or set mem_len=0"
        )
    return PositionTwoStreams(model, mask_token_id=config.mask_token_id)


def stock_inputs(batch: Mapping[str, torch.Tensor], *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return the arguments with which transformers' `XLNetLMHeadModel` predicts the targets of a batch.

    They take `L` times the memory of the batch: they are for comparison and for code that has only the stock model. Of
    targets that see nothing at all the stock logits are wrong: its softmax then runs over every token.

    Args:
        batch: What `DataCollatorForPermutationLM` made. Lanes and their resets say which `mems` go with it; those are the
            caller's.
        dtype: Type of the masks.

    Returns:
        `input_ids`, `attention_mask` and, if the batch has them, `token_type_ids`, all `[B, L]`; `perm_mask`, `[B, L, L]`,
        1 where `i` does not see `j`; `target_mapping`, `[B, P, L]`, 1 at the column of a target and nowhere for a filler;
        `labels`, `[B, P]`.

    Raises:
        InputError: If some lanes run backwards.
    """
    if "backward" in batch and bool(batch["backward"].any()):
        raise InputError(
            "backward is set for some rows, but stock XLNet reads the direction off the row's number in the batch: convert "
            "a batch without backward lanes"
        )
    is_visible = batch["key_ranks"][:, None, :] < batch["thresholds"][:, :, None]
    target_mapping = is_visible.new_zeros((*batch["labels"].shape, batch["input_ids"].shape[1]), dtype=dtype)
    # A filler must map to no column: all targets of a column would add up there.
    is_target = (batch["labels"] != IGNORED).to(dtype)
    target_mapping.scatter_(2, batch["target_columns"][..., None], is_target[..., None])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return inputs | {
        "perm_mask": (~is_visible).to(dtype),
        "target_mapping": target_mapping,
        "labels": batch["labels"],
    }
