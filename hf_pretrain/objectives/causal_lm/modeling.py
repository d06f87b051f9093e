"""A stock causal language model with its loss, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating, without_autocast
from hf_pretrain.modeling.base import PretrainingModel, trial_tokens
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, dtype_option, load_or_build
from hf_pretrain.modeling.kernels import OutputMap, chunk_rows, linear_cross_entropy
from hf_pretrain.modeling.losses import (
    IGNORED,
    ExampleSum,
    PretrainingOutput,
    masked_lm_accuracy,
    sum_by_example,
    token_losses,
)
from hf_pretrain.modeling.visibility.causal import CausalReader
from hf_pretrain.objectives.causal_lm.arguments import CausalLMModelArguments


@strict
class CausalLMConfig(CompositeConfig):
    """Configuration of [`CausalLMForPreTraining`]: that of the stock model inside."""

    model_type = "hf_pretrain_causal_lm"
    sub_configs = {"model": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None


_TRIAL_POSITIONS = 4


class CausalLMForPreTraining(PretrainingModel):
    """Any stock causal language model, trained to predict the next token of each position.

    The logits of all positions never exist together: see [`ChunkedHead`].

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


# The head, a chunk of positions at a time


class ChunkedOutput(NamedTuple):
    """What a head makes of states.

    Attributes:
        nll: ``[T]`` fp32 cross-entropy of each target in nats; 0 where there is none.
        guesses: ``[T]`` the likeliest tokens; None if they are not asked for.
    """

    nll: torch.Tensor
    guesses: torch.Tensor | None


class ChunkedHead:
    """The head of a stock language model with its cross-entropy, a chunk of positions at a time.

    Args:
        model: A stock model with a head that reads the last states of its body, each position on its own.
        body: The module whose output the head reads.
        chunk_logits: Logits that exist at a time, at least those of one position; see `linear_cross_entropy`.
    """

    def __init__(self, model: PreTrainedModel, body: PreTrainedModel, *, chunk_logits: int | None = None) -> None:
        self._model, self._body = model, body
        self.chunk_logits = chunk_logits
        self.output_map = OutputMap(model)
        self._output_class: Any = None

    @torch.compiler.disable
    def __call__(self, states: torch.Tensor, targets: torch.Tensor, *, with_guesses: bool = False) -> ChunkedOutput:
        """Return the cross-entropy of targets.

        Args:
            states: ``[T, D]`` of the body.
            targets: ``[T]`` token ids, -100 for a position without a target.
            with_guesses: Whether the likeliest tokens are returned too.
        """
        guesses = None
        if with_guesses or not torch.is_grad_enabled():
            nll, guesses = self._score(states, targets)
            if not torch.is_grad_enabled():
                return ChunkedOutput(nll, guesses if with_guesses else None)
        with self.output_map.watched() as watch:
            if watch is not None:
                self._try_out(watch, states)
        found = self.output_map.find()
        if found is not None:
            weight, bias = found
            with self.output_map.left_out():
                read = self.logits(states)
            nll = linear_cross_entropy(read, weight, targets, bias=bias, chunk_logits=self.chunk_logits)
            return ChunkedOutput(nll, guesses)
        rows = self._rows(states)
        parts = zip(states.split(rows), targets.split(rows), strict=True)
        losses = [checkpoint(self._losses, part, of_part, use_reentrant=False) for part, of_part in parts]
        return ChunkedOutput(torch.cat(losses), guesses)

    def _try_out(self, watch: Callable[[torch.Tensor], None], states: torch.Tensor) -> None:
        with evaluating(self._model), without_autocast(states.device):
            watch(self.logits(states.new_zeros(_TRIAL_POSITIONS, states.shape[1], dtype=self._model.dtype)))

    def _rows(self, states: torch.Tensor) -> int:
        table = self._model.get_output_embeddings()
        size = getattr(table, "out_features", None) or self._model.config.get_text_config(decoder=True).vocab_size
        return chunk_rows(int(size), self.chunk_logits, states.device)

    def check(self, input_ids: torch.Tensor) -> None:
        """Refuse a model whose head reads more than the states of its body.

        Args:
            input_ids: ``[B, L]`` a few tokens.

        Raises:
            InputError: Naming the class.
        """
        if self._body.device.type == "meta":
            return
        with evaluating(self._model), without_autocast(input_ids.device):
            output = self._body(input_ids=input_ids)
            self._output_class = type(output)
            expected = self._model(input_ids=input_ids).logits.flatten(0, 1)
            found = self.logits(output[0].flatten(0, 1))
        if found.shape != expected.shape or not _is_same(found, expected):
            raise InputError(
                f"{type(self._model).__name__} cannot be trained a chunk of positions at a time: its head reads more than the "
                "last states of its body; choose another architecture, such as gpt2 or llama"
            )

    def _losses(self, states_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return token_losses(self.logits(states_CD), targets_C)

    @torch.no_grad()
    def _score(self, states_TD: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cross-entropy and likeliest tokens, without gradients."""
        nll_T = torch.empty(len(targets_T), dtype=torch.float32, device=states_TD.device)
        guesses_T, rows = torch.empty_like(targets_T), self._rows(states_TD)
        for begin in range(0, len(targets_T), rows):
            part = slice(begin, begin + rows)
            logits_CV = self.logits(states_TD[part])
            guesses_T[part] = logits_CV.argmax(dim=-1)
            nll_T[part] = token_losses(logits_CV, targets_T[part])
        return nll_T, guesses_T

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[T, V]`` of states ``[T, D]``, all at once: the stock code with them in place of its body's."""
        if self._output_class is None:
            self._output_class = _output_class(self._body)
        output, own = self._output_class(last_hidden_state=states[None]), vars(self._body)
        before = own.get("forward")
        own["forward"] = lambda *args, **kwargs: output
        try:
            tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            logits: torch.Tensor = self._model(input_ids=tokens).logits[0]
            return logits
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before


def _output_class(body: PreTrainedModel) -> Any:
    """Return the class of a body's output, of one token."""
    with evaluating(body):
        return type(body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=body.device)))


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ by no more than the rounding of kernels."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.03
    if found.shape != expected.shape:
        return False
    return bool((found - expected).float().abs().max() <= tolerance * expected.float().abs().max())
