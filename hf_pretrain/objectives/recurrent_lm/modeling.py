"""A Transformer-XL with its loss, as the Trainer takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig

from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.memory import RecurrentMemory
from hf_pretrain.modeling.outputs import ExampleSum, PretrainingOutput
from hf_pretrain.modeling.trial import trial_tokens
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM


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

    @classmethod
    def from_model(cls, model: TransformerXLForCausalLM) -> RecurrentLMForPreTraining:
        """Wrap a Transformer-XL; it is trained in place."""
        composite = cls(RecurrentLMConfig(model=model.config), model)
        composite.try_out()
        return composite

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

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the Transformer-XL."""
        return self.model.get_input_embeddings()

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of tokens that are followed by another."""
        return {"lm": (batch["labels"] != IGNORED).sum()}

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: RecurrentMemory | None = None,
        memory_reset: torch.Tensor | None = None,
    ) -> PretrainingOutput:
        """Return the loss summed over the next tokens, and the memory for the windows that follow.

        Args:
            input_ids: ``[B, S]``.
            labels: ``[B, S]`` the next token of each, -100 where there is none.
            attention_mask: ``[B, S]``; not needed, since padding is on the right and the memory of a lane that has ended is
                dropped.
            memory: What the layers read in the windows before; None for nothing.
            memory_reset: ``[B]`` bool, true for lanes that begin anew.

        Returns:
            The loss "lm" (nats) and `memory`.
        """
        if memory is not None and memory_reset is not None:
            memory = memory.reset(memory_reset)
        states, lengths = (None, None) if memory is None else memory
        nll_BS, states, lengths = self.model.token_nll(input_ids, labels, mems=states, mem_lengths=lengths)
        is_target_BS = labels != IGNORED
        loss = ExampleSum((nll_BS * is_target_BS).sum(dim=1), is_target_BS.sum(dim=1).float())
        return PretrainingOutput(losses={"lm": loss}, metrics={}, memory=RecurrentMemory(states, lengths))
