"""The model side of the Trainer contract."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.hub.files import share_weights
from hf_pretrain.modeling.attention_masks import find_out_what_is_counted
from hf_pretrain.modeling.configuration import CompositeConfig
from hf_pretrain.modeling.trial import unused_parameters, vocabulary_size


class PretrainingModel(PreTrainedModel):
    """A composite that is trained, around the stock models that are shared.

    A subclass returns a [`PretrainingOutput`] from `forward`, counts its targets in `count_targets`, names in `export_parts`
    which of its sub-models is written where, and makes a batch with every loss in `trial_batch`.

    Its weights are float32, whatever the stock models come in, unless the composite's configuration has another `dtype`: steps
    of a usual size are lost in the rounding of 16-bit weights.

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
    # Parameters that `try_out` has frozen.
    _frozen: tuple[str, ...] = ()

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, PreTrainedModel):
            raise InputError(
                f"{type(self).__name__} takes a configuration first: put {type(config).__name__} into it with "
                f"{type(self).__name__}.from_model(model), or from_models for a pair"
            )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Cast the weights, then let transformers tie and register them; see `PreTrainedModel.post_init`."""
        own = self.config if isinstance(self.config, CompositeConfig) else None
        dtype = getattr(own, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                refuse_adapters(part)
                if part is not self:
                    part.config.dtype = dtype
                    # Before a graph is compiled, which would break at the look into the model.
                    find_out_what_is_counted(part)
        self.to(dtype)
        super().post_init()

    @property
    def backbones(self) -> dict[str, PreTrainedModel]:
        """The stock models that are trained, by attribute."""
        names = [name for folder, name in self.export_parts.items() if folder in ("", "pretraining/generator")]
        return {name: getattr(self, name) for name in names}

    @property
    def fresh_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the checkpoints did not have, so that they began at random; none from scratch."""
        parts = self.backbones.items()
        return tuple(f"{name}.{key}" for name, part in parts for key in getattr(part, "fresh_parameters", ()))

    def trial_batch(self) -> dict[str, Any] | None:
        """Return a small batch with targets of every loss, on the model's device; None if there is nothing to try."""
        return None

    def try_out(self, *, gradient_checkpointing: bool = False) -> None:
        """Run one step on a few tokens, refuse a model that cannot, and freeze the parameters that no loss reaches.

        Distributed training waits for the gradient of whatever is not frozen. A frozen parameter keeps its value and is exported.
        What was frozen by an earlier call is tried again.

        Args:
            gradient_checkpointing: Whether activations are to be recomputed in the backward pass.

        Raises:
            InputError: If the step fails, or a stock model cannot recompute its activations.
        """
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                refuse_adapters(part)
        if gradient_checkpointing:
            self.check_gradient_checkpointing()
        parameters = dict(self.named_parameters())
        for name in self._frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)
        self._frozen = ()
        batch = self.trial_batch()
        if batch is None:
            return
        called = " with ".join(dict.fromkeys(type(part).__name__ for part in self.backbones.values()))
        self._frozen = tuple(unused_parameters(self, batch, name=called))
        for name in self._frozen:
            parameters[name].requires_grad_(False)

    def check_gradient_checkpointing(self) -> None:
        """Refuse a stock model that cannot recompute its activations; transformers would name the composite, and late.

        Raises:
            InputError: Naming the class.
        """
        for part in self.backbones.values():
            can = part.supports_gradient_checkpointing and any(
                hasattr(module, "gradient_checkpointing") for module in part.modules()
            )
            if not can:
                raise InputError(
                    f"gradient_checkpointing=True: {type(part).__name__} does not support gradient checkpointing "
                    "(activation_checkpointing is the same option): leave it out, or choose another architecture such as bert, "
                    "roberta, electra or modernbert"
                )

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


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters of PEFT, or wrapped by it: an export would hold them alone, or not at all.

    Raises:
        InputError: Saying what to do.
    """
    if not _has_adapters(model):
        return
    raise InputError(
        f"{type(model).__name__} has adapters of PEFT, which pre-training does not export: train the model itself "
        "(model.merge_and_unload() gives one with the adapters in its weights), and adapt it afterwards"
    )


def _has_adapters(model: nn.Module) -> bool:
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    # Without importing it: where it has not been imported, nobody has used it. A merged model still has its configuration.
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None or getattr(model, "peft_config", None) is None:
        return False
    return isinstance(model, peft.PeftModel) or any(
        isinstance(part, tuners.BaseTunerLayer) for part in model.modules()
    )


def check_trainable(model: Any, *, gradient_checkpointing: bool) -> None:
    """Refuse what a Trainer of composites cannot train, and try out the rest; see [`PretrainingModel.try_out`].

    Raises:
        InputError: If the model is no composite, or has adapters, or a step on a few tokens fails.
    """
    refuse_adapters(model)
    if not isinstance(model, PretrainingModel):
        raise InputError(
            f"model={type(model).__name__} is no composite of this library: wrap a stock model first, such as "
            "EncoderForPreTraining.from_model(model)"
        )
    model.try_out(gradient_checkpointing=gradient_checkpointing)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return how many tokens the position table of a stock model holds, or None where positions are not a table.

    RoBERTa and its kin number positions from `padding_idx + 1`, so their table is shorter than it looks; Nystromformer and its
    kin from 2, which only the configuration tells.
    """
    for name, module in model.named_modules():
        table = getattr(module, "weight", None)
        if name.endswith(_POSITION_TABLES) and isinstance(table, torch.Tensor) and table.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            rows = table.shape[0] - (0 if padding is None else int(padding) + 1)
            own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            return min(rows, own) if isinstance(own, int) and own > 0 else rows
    return None


_POSITION_TABLES = ("position_embeddings", "embed_positions")


def check_model_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, block_size: int) -> None:
    """Refuse a model that cannot take the tokenizer's ids or the blocks' length.

    Args:
        model: A stock model.
        tokenizer: The tokenizer that makes its input.
        block_size: Longest sequence that will be fed, in tokens.

    Raises:
        InputError: If an id has no embedding, or a position has none.
    """
    vocab_size = vocabulary_size(model.get_input_embeddings())
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} embeds only {vocab_size}: "
            "use the tokenizer that the model was trained with, give the model more rows (resize_token_embeddings of the stock "
            "model, then save_pretrained), or train from scratch"
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
