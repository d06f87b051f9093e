"""The two streams of any stock masked language model that takes its positions as an input."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.gathered import GatheredHead
from hf_pretrain.modeling.memory import RecurrentMemory
from hf_pretrain.modeling.two_stream import PermutedBatch

_INSTEAD = "use one of xlnet, bert, roberta, electra, albert, distilbert, modernbert"


class PositionTwoStreams:
    """Runs both streams of a stock model as one longer sequence: the text, then a mask token for each target at its position.

    The model's own code runs unchanged. Positions, absolute or rotary, are given by `position_ids`, and a boolean mask says
    who sees whom; nobody sees a mask token. Whether a model honours both is tried out, not looked up.

    Args:
        model: A stock masked language model with SDPA attention; trained in place.
        mask_token_id: The token that stands for a target in the query stream.

    Raises:
        InputError: If the model cannot do this.
    """

    supports_memory = False

    def __init__(self, model: PreTrainedModel, *, mask_token_id: int | None) -> None:
        self.name = type(model).__name__
        self._parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in self._parameters:
            raise InputError(
                f"{self.name} takes no position_ids, which permutation language modelling needs: {_INSTEAD}"
            )
        if getattr(model.config, "_attn_implementation", None) != "sdpa":
            raise InputError(
                f"{self.name} runs with attn_implementation={model.config._attn_implementation!r}, but only 'sdpa' can hide "
                f"everything from a token: set it to 'sdpa', or {_INSTEAD}"
            )
        if mask_token_id is None:
            raise InputError(
                f"{self.name} needs a mask_token_id for its query stream: give the tokenizer a mask_token"
            )
        self.model = model
        self.mask_token_id = mask_token_id
        self.head = GatheredHead(model)
        self.first_position = _first_position(model)

    def __call__(
        self,
        batch: PermutedBatch,
        slots: torch.Tensor,
        *,
        memory: RecurrentMemory | None = None,
        num_kept: int = 0,
        checkpoint: Callable[..., torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Predict targets; see [`TwoStreams`]. Checkpointing is the stock layers' own business."""
        assert memory is None, "refused at construction"
        places_BT, num_targets = batch.of_rows(batch.places()), batch.target_columns.shape[1]
        length = places_BT.shape[1]
        queries_BP = torch.full_like(batch.target_columns, self.mask_token_id)
        inputs = {
            "input_ids": torch.cat([batch.input_ids, queries_BP], dim=1),
            "attention_mask": self._masks(batch.visible(), places_BT),
            "position_ids": places_BT + self.first_position,
        }
        if "token_type_ids" in self._parameters:
            # Given always: some models would look them up by the length of the input.
            types = batch.token_type_ids
            inputs["token_type_ids"] = batch.of_rows(torch.zeros_like(batch.input_ids) if types is None else types)
        rows = torch.div(slots, num_targets, rounding_mode="floor")
        positions = rows * length + (length - num_targets) + slots % num_targets
        return self.head(self.model, positions, **inputs), None

    def _masks(self, visible: torch.Tensor, places: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return ``[B, 1, T, T]`` bool, or one a kind of layer where a model has layers with a window."""
        if getattr(self.model.config, "layer_types", None) is None:
            return _square(visible)
        distances = (places[:, :, None] - places[:, None, : visible.shape[2]]).abs()
        near = distances <= (self.model.config.sliding_window or 0)
        return {"full_attention": _square(visible), "sliding_attention": _square(visible & near)}

    def check(self) -> None:
        """Try the model out on a few tokens.

        Raises:
            InputError: If it fails, if a target's own token changes its prediction, if one that is seen does not, or if the
                prediction depends on where tokens are stored.
        """
        if any(parameter.device.type == "meta" for parameter in self.model.parameters()):
            return
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                problem = self._problem()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            problem = f"fails on a mask a row ({str(error).splitlines()[0]})"
        finally:
            self.model.train(was_training)
        if problem is not None:
            raise InputError(
                f"{self.name} cannot be trained by permutation language modelling: it {problem}; {_INSTEAD}"
            )

    def _problem(self) -> str | None:
        words = self.model.get_input_embeddings()
        places = torch.arange(8, device=words.weight.device)[None]
        # Two ordinary tokens by turns; there are special ones at the ends of many vocabularies.
        ids = words.num_embeddings // 2 - places % 3 % 2
        others = 2 * (words.num_embeddings // 2) - 1 - ids
        batch = PermutedBatch(ids, torch.ones_like(ids), places, places, places[:, 5:6], positions=places)
        expected = self._first_logits(batch)

        def change(other: PermutedBatch) -> float:
            return float((self._first_logits(other) - expected).abs().max())

        if change(batch._replace(input_ids=ids.where(places < 5, others))) > 0:
            return "lets a token be seen that is hidden from it"
        seen = change(batch._replace(input_ids=ids.where(places != 4, others)))
        if seen == 0:
            return "does not let a token be seen that is not hidden"
        order = torch.tensor([6, 2, 5, 0, 7, 3, 1, 4], device=ids.device)
        stored = batch._replace(**{name: getattr(batch, name)[:, order] for name in _STORED})
        if change(stored._replace(target_columns=(order == 5).nonzero())) > 1e-2 * seen:
            return "reads positions off the order of its input, not off position_ids"
        return None

    def _first_logits(self, batch: PermutedBatch) -> torch.Tensor:
        return self(batch, torch.zeros(1, dtype=torch.long, device=batch.input_ids.device))[0]


_STORED = ("input_ids", "attention_mask", "key_ranks", "thresholds", "positions")


def _square(visible: torch.Tensor) -> torch.Tensor:
    """Return ``[B, 1, T, T]`` of ``[B, T, S]``: nobody sees a query, but one that sees nothing else has itself for a key."""
    length, num_content = visible.shape[1:]
    square = F.pad(visible, (0, length - num_content))
    queries = torch.arange(num_content, length, device=visible.device)
    square[:, queries, queries] = ~visible[:, num_content:].any(dim=2)
    return square[:, None]


def _first_position(model: PreTrainedModel) -> int:
    """Return the number of the first position: RoBERTa and its kin count from the padding id on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
