"""Any stock head of a language model with its cross-entropy, a chunk of positions at a time.

Where the head ends in a linear map, its loss and gradients are those of `linear_cross_entropy`. Elsewhere the stock code runs
chunk by chunk, and computes the logits once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import evaluating, without_autocast
from hf_pretrain.modeling.kernels import OutputMap, chunk_rows, linear_cross_entropy
from hf_pretrain.modeling.losses import token_losses

_TRIAL_POSITIONS = 4


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
