"""A stock causal language model with its loss, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel, trial_tokens
from hf_pretrain.modeling.chunked_head import ChunkedHead
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, dtype_option, load_or_build
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, masked_lm_accuracy, sum_by_example
from hf_pretrain.modeling.visibility.causal import CausalReader
from hf_pretrain.objectives.causal_lm.arguments import CausalLMModelArguments


@strict
class CausalLMConfig(CompositeConfig):
    """Configuration of [`CausalLMForPreTraining`]: that of the stock model inside."""

    model_type = "hf_pretrain_causal_lm"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None


class CausalLMForPreTraining(PretrainingModel):
    """Any stock causal language model, trained to predict the next token of each position.

    The logits of all positions never exist together: see `hf_pretrain.modeling.chunked_head.ChunkedHead`.

    Args:
        config: Configuration with the stock model's inside.
        model: The stock model to train, such as one from `AutoModelForCausalLM.from_pretrained`; built from the configuration,
            with fresh weights, when not given.

    Raises:
        InputError: If the model is an encoder-decoder, or has no body apart from its head.
    """

    config_class = CausalLMConfig

    def __init__(self, config: CausalLMConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.model) if model is None else model
        self.reader = CausalReader(self.model)
        self.head = ChunkedHead(self.model, self.reader.body)
        self.post_init()

    def check_wrapped(self) -> None:
        """Refuse a stock model whose tokens see those that follow, or whose head reads more than the last states."""
        self.reader.check_causal()
        self.head.check(trial_tokens(self.model))

    @classmethod
    def from_arguments(
        cls,
        args: CausalLMModelArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stock: PreTrainedModel | None = None,
    ) -> CausalLMForPreTraining:
        """Load the checkpoint that the arguments name, or build the model that they describe.

        Args:
            args: What to load or to build.
            tokenizer: Gives the vocabulary and the special ids of a model from scratch.
            stock: A stock model instead, with or without its head.

        Raises:
            InputError: If the model cannot be loaded or built, or is no causal language model.
        """
        changes = {} if stock is not None or args.model_name_or_path else args.config_changes(tokenizer)
        model = load_or_build(AutoModelForCausalLM, args, tokenizer, stock=stock, **changes)
        return cls.from_model(model, **dtype_option(args))

    def check_isolation(self, *, length: int) -> None:
        """Refuse a stock model that cannot keep the documents of a row apart."""
        self.reader.check_isolation(length=length)

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return a few tokens, each the target of the one before; see [`PretrainingModel.trial_batch`]."""
        ids = trial_tokens(self.model)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        return {
            "input_ids": ids,
            "labels": labels,
            "target_positions": torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten(),
        }

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of tokens that are predicted."""
        return {"lm": (batch["labels"] != IGNORED).sum()}

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the stock model: rows need causality alone, and isolated documents their bounds."""
        return self.backbones.keys()

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Refuse rows that begin with padding, which the tokens behind it would see; nothing is returned.

        Raises:
            InputError: If the attention mask of a row begins with 0.
        """
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask[:, 0].all()):
            raise InputError(
                "attention_mask: a row begins with padding: pad rows of a causal language model on the right"
            )
        return {}

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        target_positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> PretrainingOutput:
        """Return the loss summed over the next tokens.

        Args:
            input_ids: ``[B, L]``, padded on the right.
            labels: ``[B, L]`` the next token of each, -100 where none is predicted.
            target_positions: ``[T]`` flat positions with a label, and perhaps fillers without one.
            attention_mask: ``[B, L]``; not needed, since no token sees the padding behind it.
            document_ids: ``[B, L]`` number of the document in its row that a token belongs to, -1 at padding; the documents of a
                row then do not see each other. None if each row is one text.
            position_ids: ``[B, L]`` position of a token in its document, from 0; needed with `document_ids`.

        Returns:
            The loss "lm" (nats); in evaluation the metric "lm_accuracy".
        """
        states_BLD = self.reader(input_ids, document_ids=document_ids, position_ids=position_ids)
        states_TD = states_BLD.flatten(0, 1).index_select(0, target_positions)
        targets_T = labels.flatten().index_select(0, target_positions)
        found = self.head(states_TD, targets_T, with_guesses=not self.training)
        where: dict[str, Any] = {"positions": target_positions, "shape": labels.shape}
        counts_B = sum_by_example(targets_T != IGNORED, **where)
        output = PretrainingOutput(losses={"lm": ExampleSum(sum_by_example(found.nll, **where), counts_B)}, metrics={})
        if found.guesses is not None:
            output.metrics["lm_accuracy"] = masked_lm_accuracy(found.guesses, targets_T, **where)
        return output
