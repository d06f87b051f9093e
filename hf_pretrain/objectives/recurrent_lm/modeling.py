"""A Transformer-XL with its loss, as the Trainer takes it; and how it is built or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import check_numbers
from hf_pretrain.modeling.base import PretrainingModel, check_model_fits, trial_tokens
from hf_pretrain.modeling.configuration import (
    CompositeConfig,
    SubModelConfig,
    check_model_type,
    own_config,
    parse_overrides,
)
from hf_pretrain.modeling.heads import with_head
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, RecurrentMemory
from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.layers_transformer_xl import find_target_rows
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM
from hf_pretrain.options import option


@strict
class RecurrentLMConfig(CompositeConfig):
    """Configuration of [`RecurrentLMForPreTraining`]: that of the Transformer-XL inside."""

    model_type = "hf_pretrain_recurrent_lm"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None


class RecurrentLMForPreTraining(PretrainingModel):
    """A Transformer-XL that predicts the next token of each of its lanes.

    Args:
        config: Configuration with the Transformer-XL's inside.
        model: The model to train; built from the configuration, with fresh weights, when not given.
    """

    config_class = RecurrentLMConfig
    export_parts = {"": "model"}  # noqa: RUF012

    def __init__(self, config: RecurrentLMConfig, model: TransformerXLForCausalLM | None = None) -> None:
        super().__init__(config)
        self.model = TransformerXLForCausalLM(config.model) if model is None else model
        self.post_init()

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens, each the target of the one before; see [`PretrainingModel.trial_batch`]."""
        ids = trial_tokens(self.model)
        # Some of each cluster of an adaptive softmax.
        begins = (getattr(self.model.config, "cutoffs", None) or [])[: ids.numel() - 1]
        ids.view(-1)[ids.numel() - len(begins) :] = torch.tensor(begins, dtype=ids.dtype, device=ids.device)
        return {"input_ids": ids, "labels": ids}

    @property
    def memory_size(self) -> int:
        """Slots of a lane's memory, in tokens."""
        return self.model.config.mem_len

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of tokens that are followed by another."""
        return {"lm": (batch["labels"] != IGNORED).sum()}

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return which targets there are in each cluster of tokens; see [`PretrainingModel.host_inputs`]."""
        return {"target_rows": find_target_rows(batch["labels"], config.model)}

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: RecurrentMemory | None = None,
        memory_reset: torch.Tensor | None = None,
        target_rows: list[torch.Tensor] | None = None,
    ) -> PretrainingOutput:
        """Return the loss summed over the next tokens, and the memory for the windows that follow.

        Args:
            input_ids: ``[B, S]``.
            labels: ``[B, S]`` the next token of each, -100 where there is none.
            attention_mask: ``[B, S]``; not needed, since padding is on the right and the memory of a lane that has ended is
                dropped.
            memory: What the layers read in the windows before; None for nothing.
            memory_reset: ``[B]`` bool, true for lanes that begin anew.
            target_rows: See `find_target_rows` of the Transformer-XL. Read from `labels`, which waits for the device, if not
                given.

        Returns:
            The loss "lm" (nats) and `memory`.
        """
        if memory is not None and memory_reset is not None:
            memory = memory.reset(memory_reset)
        states, lengths = (None, None) if memory is None else memory
        nll_BS, states, lengths = self.model.token_nll(
            input_ids, labels, mems=states, mem_lengths=lengths, target_rows=target_rows
        )
        is_target_BS = labels != IGNORED
        loss = ExampleSum((nll_BS * is_target_BS).sum(dim=1), is_target_BS.sum(dim=1).float())
        return PretrainingOutput(losses={"lm": loss}, metrics={}, memory=RecurrentMemory(states, lengths))


@dataclass
class TransformerXLModelArguments:
    """Which Transformer-XL is trained: a checkpoint to continue, or sizes, by default those of the base model."""

    ranges: ClassVar[dict[str, str]] = {"cutoffs": "[1, 2147483647]", "div_val": "[1, 65536]"}
    needs: ClassVar[dict[str, str]] = {"div_val": "cutoffs"}

    model_name_or_path: str | None = option(
        None, "Checkpoint to continue from; without it the model is built from the sizes below."
    )
    hidden_size: int = option(410, "Width of the layers.")
    num_hidden_layers: int = option(16, "Number of layers.")
    num_attention_heads: int = option(10, "Attention heads a layer.")
    intermediate_size: int = option(2100, "Width of the feed-forward layers.")
    hidden_dropout_prob: float = option(0.1, "Dropout of embeddings, sub-layers and output.")
    attention_probs_dropout_prob: float = option(0.0, "Dropout of attention probabilities.")
    cutoffs: list[int] | None = option(
        None,
        "Ids at which the clusters of an adaptive softmax begin, for a large vocabulary that is sorted by "
        "frequency (20000 40000 200000 for WikiText-103's words); by default a plain softmax.",
    )
    div_val: int = option(1, "How much narrower the embeddings of each cluster are.")
    embedding_size: int | None = option(None, "Width of the first cluster's embeddings; by default hidden_size.")
    untie_r: bool = option(False, "Give every layer position biases of its own.")
    pre_layer_norm: bool = option(False, "Normalize the input of sub-layers, not the output.")
    config_overrides: str | None = option(
        None, 'JSON object of further configuration values, e.g. {"tie_word_embeddings": false}.'
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and overrides that are no JSON object."""
        check_numbers(self)
        parse_overrides(self.config_overrides)


def build_model(
    args: TransformerXLModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stock: PreTrainedModel | None = None,
    mem_len: int,
    clamp_len: int = -1,
    same_length: bool = False,
) -> RecurrentLMForPreTraining:
    """Build or load a Transformer-XL.

    Args:
        args: What to build.
        tokenizer: Gives the vocabulary and the special ids.
        stock: A Transformer-XL to train, with or without its head.
        mem_len: Slots of the memory in training.
        clamp_len: Distance from which on positions are all alike; -1 for none.
        same_length: Whether every position sees equally many before it.

    Returns:
        The composite to train.

    Raises:
        InputError: If the sizes do not fit together, or the checkpoint does not fit the tokenizer or is none.
    """
    lengths: dict[str, Any] = {"mem_len": mem_len, "clamp_len": clamp_len, "same_length": same_length}
    if stock is not None:
        check_model_type(stock.config, TransformerXLConfig, name=f"model={type(stock).__name__}")
        model = with_head(stock, AutoModelForCausalLM)
        for name, value in lengths.items():
            setattr(model.config, name, value)
    elif args.model_name_or_path is not None:
        config = from_pretrained(AutoConfig, args.model_name_or_path)
        check_model_type(config, TransformerXLConfig, name=f"model_name_or_path={args.model_name_or_path!r}")
        model = from_pretrained(TransformerXLForCausalLM, args.model_name_or_path, **lengths)
        check_model_fits(model, tokenizer, block_size=1)
    else:
        model = from_config(TransformerXLForCausalLM, own_config(TransformerXLConfig, args, tokenizer, **lengths))
    return RecurrentLMForPreTraining.from_model(model)
