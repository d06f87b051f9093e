"""The model side of the Trainer contract."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.hub.files import share_weights


class PretrainingModel(PreTrainedModel):
    """A composite that is trained, around the stock models that are shared.

    A subclass returns a [`PretrainingOutput`] from `forward`, counts its targets in `count_targets`, and names in
    `export_parts` which of its sub-models is written where.

    Attributes:
        export_parts: Folder in the exported checkpoint -> attribute of the sub-model written there; "" is the root, which
            stock transformers opens. What only training needs goes below "pretraining/".
    """

    export_parts: dict[str, str] = {"": "model"}  # noqa: RUF012
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # The composite has no attention of its own; each sub-model checks its own backend.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the number of targets of each loss in a collated batch, as scalar tensors; no forward is run."""
        raise AssertionError("a subclass of PretrainingModel counts its targets")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse: transformers would resize one table in place, and leave other models, biases and buffers as they are.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"{type(self).__name__} cannot be resized: call resize_token_embeddings of its stock models before they are joined"
        )

    def export(self, output_dir: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the stock checkpoint at the root and the rest below it.

        Args:
            output_dir: Folder to write to.
            state_dict: Full state of the composite, where the parameters in memory are shards; otherwise taken from the model.
        """
        for folder, attribute in self.export_parts.items():
            part, state = self.stock_part(attribute, self.part_state_dict(attribute, state_dict))
            if state is not None:
                # Gathered one by one, tied parameters are copies, of which transformers would write each.
                state = {name: value for name, value in state.items() if name not in part.all_tied_weights_keys}
            part.save_pretrained(Path(output_dir) / folder, state_dict=state)
            share_weights(Path(output_dir) / folder)

    def stock_part(
        self, attribute: str, state: Mapping[str, torch.Tensor] | None
    ) -> tuple[PreTrainedModel, Mapping[str, torch.Tensor] | None]:
        """Return what is written for a sub-model: a stock model, and its state where that is not in the model itself."""
        part: PreTrainedModel = getattr(self, attribute)
        return part, state

    def part_state_dict(
        self, attribute: str, state_dict: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor] | None:
        """Return one sub-model's share of the composite's state, or None to let it use its own parameters."""
        if state_dict is None:
            return None
        prefix = attribute + "."
        return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return how many tokens the position table of a stock model holds, or None where positions are not a table.

    RoBERTa and its kin number positions from `padding_idx + 1`, so their table is shorter than it looks.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - offset
    return None


def check_model_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> None:
    """Refuse a model that cannot take the tokenizer's ids or the blocks' length.

    Args:
        model: A stock model.
        tokenizer: The tokenizer that makes its input.
        block_size: Longest sequence that will be fed, in tokens.

    Raises:
        InputError: If an id has no embedding, or a position has none.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} embeds only {vocab_size}: "
            "use the tokenizer that the model was trained with, or train from scratch"
        )
    longest = longest_sequence(model)
    if longest is not None and block_size > longest:
        raise InputError(
            f"block_size={block_size} is longer than the {longest} positions of {type(model).__name__}: "
            f"set --block_size {longest} or less, or raise --max_position_embeddings when training from scratch"
        )


def input_names(model: PreTrainedModel) -> set[str]:
    """Return the inputs that a stock model takes by name, with its head and without; types of segments only where it has two."""
    parts = {type(model), type(model.base_model)}
    names = set.intersection(*(set(inspect.signature(part.forward).parameters) for part in parts))
    # A table of one type has no row for a second segment, and one of none is never read.
    return names - ({"token_type_ids"} if getattr(model.config, "type_vocab_size", 2) < 2 else set())


@contextmanager
def tokenizer_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """Let a tokenizer make, and name when it is saved, no input that a stock model does not take.

    Args:
        model: The stock model that is to read what the tokenizer makes.
        tokenizer: The tokenizer; behind the block it is as it was.

    Yields:
        The tokenizer.
    """
    names, options = tokenizer.model_input_names, tokenizer.init_kwargs
    taken = [name for name in names if name in input_names(model)]
    try:
        if taken != list(names):
            tokenizer.model_input_names, tokenizer.init_kwargs = taken, options | {"model_input_names": taken}
        yield tokenizer
    finally:
        tokenizer.model_input_names, tokenizer.init_kwargs = names, options
