"""The model side of the Trainer contract: what every composite of stock models has, and its trial.

A composite returns a sum and a count for each loss, exports its stock models, and is tried out on a few tokens before any text is
read: a step that fails is refused by name, and parameters that no loss reaches are frozen. The order: the batch of the trial, the
composite, how the trial runs, and the checks of a stock model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.files import share_weights
from hf_pretrain.modeling.backbone import (
    input_names,
    is_shifted,
    longest_sequence,
    note_shifted,
    note_what_is_counted,
    vocabulary_size,
)
from hf_pretrain.modeling.configuration import CompositeConfig
from hf_pretrain.modeling.loading import first_line
from hf_pretrain.modeling.losses import IGNORED, PretrainingOutput
from hf_pretrain.modeling.surgery.adapters import Adapters, save_adapter, without_adapters
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.backends import OWN_MASKS, Attending

logger = logging.get_logger(__name__)

GENERATOR_FOLDER = "pretraining/generator"
"""Folder of an export that holds the generator of a pair."""

TRIAL_ROWS, TRIAL_LENGTH = 2, 8
"""Shape of the batch that is tried, in examples and tokens."""

_Scalar = bool | int | float | str | None


def trial_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return ``[TRIAL_ROWS, TRIAL_LENGTH]`` tokens spread over the vocabulary; a padding token is not among them."""
    embeddings = model.get_input_embeddings()
    vocab_size = vocabulary_size(embeddings)
    padding, count = getattr(model.config, "pad_token_id", None), TRIAL_ROWS * TRIAL_LENGTH
    # Distinct where there are enough, and some of each cluster of a divided output layer.
    tokens = [(vocab_size - 1) * number // (count - 1) for number in range(count)]
    other = next((token for token in range(vocab_size - 1, -1, -1) if token != padding), 0)
    tokens = [other if token == padding else token for token in tokens]
    device = next(embeddings.parameters()).device
    return torch.tensor(tokens, device=device).view(TRIAL_ROWS, TRIAL_LENGTH)


def masked_trial_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a batch of masked language modelling: tokens, and the first two of each row as targets."""
    ids = trial_tokens(model)
    columns = torch.arange(TRIAL_LENGTH, device=ids.device)
    positions = (torch.arange(TRIAL_ROWS, device=ids.device)[:, None] * TRIAL_LENGTH + columns[:2]).flatten()
    labels = torch.where(columns < 2, ids, torch.full_like(ids, IGNORED))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "target_positions": positions,
    }


class ModelOfModels(PreTrainedModel):
    """A model around stock models; it has no attention of its own, and each of them checks its own backend."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class PretrainingModel(ModelOfModels):
    """A composite that is trained, around the stock models that are shared.

    A subclass returns a [`PretrainingOutput`] from `forward`, counts its targets in `count_targets`, names in `export_parts`
    which of its sub-models is written where, and makes a batch with every loss in `trial_batch`.

    Its weights are float32, whatever the stock models come in, unless the composite's configuration has another `dtype`: steps
    of a usual size are lost in the rounding of 16-bit weights.

    Attributes:
        export_parts: Folder in the exported checkpoint -> attribute of the sub-model written there, with dots where it is a
            part of a part; "" is the root, which stock transformers opens. What only training needs goes below "pretraining/".
        adapters: The adapters that are trained in its stock models; see [`add_adapters`].
        refuses_adapters: Why the composite takes no adapters, behind its name; "" if it does.
        why_not_flash: Why the stock models that `on_flash` does not name keep their own attention.
        is_additive: Whether the loss of a step is the sum over its micro-batches and ranks; not where texts of one are compared
            with those of another.
    """

    export_parts: dict[str, str] = {"": "model"}  # noqa: RUF012
    adapters: Adapters = Adapters({})
    refuses_adapters = ""
    why_not_flash = OWN_MASKS
    is_additive = True
    # Parameters that `try_out` has frozen.
    _frozen: tuple[str, ...] = ()

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, PreTrainedModel):
            raise InputError(
                f"{type(self).__name__} takes a configuration first: put {type(config).__name__} into it with "
                f"{type(self).__name__}.from_model(model), or from_models for a pair"
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_model(cls, model: PreTrainedModel, **options: Any) -> Self:
        """Wrap a stock model; it is trained in place. A pair of models has `from_models` instead.

        Args:
            model: The stock model.
            **options: Fields of the composite's configuration.

        Raises:
            InputError: If the composite cannot train the model, or a step on a few tokens fails; see `try_out`.
        """
        composite = cls(cls.config_class(model=model.config, **options), model)
        composite.check_wrapped()
        composite.try_out()
        return composite

    def check_wrapped(self) -> None:
        """Refuse a stock model that the composite cannot train, before a step is tried; the base refuses none."""

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
                    _keep_prediction(part, shifted=bool(getattr(own, "shifted", False)))
                    # Before a graph is compiled, which would break at the look into the model.
                    note_what_is_counted(part)
        self.to(dtype)
        super().post_init()

    @property
    def root(self) -> PreTrainedModel:
        """The stock model that is written at the root of an export."""
        return cast(PreTrainedModel, self.get_submodule(self.export_parts[""]))

    @property
    def backbones(self) -> dict[str, PreTrainedModel]:
        """The stock models that are trained, by attribute."""
        names = [name for folder, name in self.export_parts.items() if folder in ("", GENERATOR_FOLDER)]
        return {name: cast(PreTrainedModel, self.get_submodule(name)) for name in names}

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, *, block_size: int, isolates_documents: bool) -> None:
        """Refuse stock models that cannot take the data.

        Args:
            tokenizer: The tokenizer that makes the input.
            block_size: Longest sequence, in tokens.
            isolates_documents: Whether a row holds documents that must not see each other.

        Raises:
            InputError: As [`check_model_fits`] and [`check_isolation`] do.
        """
        for part in self.backbones.values():
            check_model_fits(part, tokenizer, block_size=block_size)
        if isolates_documents:
            self.check_isolation(length=block_size)

    def check_isolation(self, *, length: int) -> None:
        """Refuse stock models that cannot keep the documents of a row apart; see [`rules.check_isolation`]."""
        for part in self.backbones.values():
            rules.check_isolation(part, length=length)

    @property
    def fresh_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the checkpoints did not have, so that they began at random; none from scratch."""
        parts = self.backbones.items()
        return tuple(f"{name}.{key}" for name, part in parts for key in getattr(part, "fresh_parameters", ()))

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the stock model that is exported."""
        return self.root.get_input_embeddings()

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
        own = {id(self.get_submodule(name)) for name in self.adapters.parts}
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and id(part) not in own:
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

    def attending(self, *, device: torch.device, dtype: torch.dtype) -> dict[str, Attending]:
        """Return the stock models that attend in a step, by name: the `backbones`, and others that run but are not trained.

        Args:
            device: Where the composite is trained.
            dtype: Number format of the products of a step.
        """
        return {name: Attending(part, device, dtype) for name, part in self.backbones.items()}

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the names in `attending` that may run on flash attention with a batch; the base has none.

        A method names those that it gives nothing but padding, isolated documents and causality, and no mask of its own.
        """
        return ()

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

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return what `forward` takes beside a collated batch and reads from the batch's values: say, whether it is padded.

        The Trainer calls this in the loader, while the batch is on the host: on the device, the step would wait for the answer.

        Args:
            batch: What the collator made.
            config: The configuration of the model, which itself need not be at hand.

        Returns:
            Further arguments of `forward`. Each may be left out of a call, at the price of a wait.
        """
        return {}

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
            state: Mapping[str, torch.Tensor] | None = self.part_state_dict(attribute, state_dict)
            if attribute in self.adapters.parts:
                part = cast(PreTrainedModel, self.get_submodule(attribute))
                if not folder and self.adapters.export == "adapter":
                    save_adapter(part, self.adapters.parts[attribute], output_dir, state=state)
                    continue
                state = without_adapters(part, state)
            part, state = self.stock_part(attribute, state)
            if state is not None:
                # Gathered one by one, tied parameters are copies, of which transformers would write each.
                state = {name: value for name, value in state.items() if name not in part.all_tied_weights_keys}
            part.save_pretrained(Path(output_dir) / folder, state_dict=state)
            share_weights(Path(output_dir) / folder)

    def stock_part(
        self, attribute: str, state: Mapping[str, torch.Tensor] | None
    ) -> tuple[PreTrainedModel, Mapping[str, torch.Tensor] | None]:
        """Return what is written for a sub-model: a stock model, and its state where that is not in the model itself."""
        return cast(PreTrainedModel, self.get_submodule(attribute)), state

    def part_state_dict(
        self, attribute: str, state_dict: Mapping[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor] | None:
        """Return one sub-model's share of the composite's state, or None to let it use its own parameters."""
        if state_dict is None:
            return None
        prefix = attribute + "."
        return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def _keep_prediction(part: PreTrainedModel, *, shifted: bool) -> None:
    """Let the configuration of a stock model say how masked tokens are predicted in training; tell of a change."""
    if is_shifted(part) == shifted or part.get_output_embeddings() is None:
        return
    if not shifted:
        logger.warning(
            f"{part.config.name_or_path or type(part).__name__} predicts a masked token at the position before it; this run "
            "trains it to predict at the token's own position: to go on as before, run `hf-pretrain encoder --prediction shifted`"
        )
    note_shifted(part.config, shifted)


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters without values; some of a stock model's may have values all the same."""
    return any(parameter.is_meta for parameter in model.parameters())


def unused_parameters(model: PreTrainedModel, batch: Mapping[str, Any], *, name: str) -> list[str]:
    """Run one step in evaluation mode, which leaves no trace, and return the parameters that no loss reaches.

    A parameter of one expert among several is never among them while another expert has a gradient: which are chosen depends on
    the tokens.

    Args:
        model: A composite.
        batch: A collated batch with targets of every loss.
        name: What the stock models are called, for the error.

    Returns:
        Names of trainable parameters without a gradient. On the meta device, where a stock model may need values that are not
        there, possibly none.

    Raises:
        InputError: If the step fails.
    """
    named = {key: value for key, value in model.named_parameters() if value.requires_grad}
    try:
        values = _ValuesOnMeta() if is_on_meta(model) else nullcontext()
        with _untouched(model), torch.random.fork_rng(devices=[]), torch.enable_grad(), values:
            output: PretrainingOutput = model(**batch)
            total = torch.stack([loss.sum.float().sum() for loss in output.losses.values()]).sum()
            if not total.requires_grad:
                return []
            gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    except InputError:
        raise
    except Exception as error:  # a stock model may trip over a size anywhere
        if is_on_meta(model) and not _is_of_sizes(error):
            return []
        raise InputError(f"{name} cannot be trained with these options: {_reason(model, error)}") from error
    found = [key for key, gradient in zip(named, gradients, strict=True) if gradient is None]
    experts = {_kind_of_expert(key) for key in named.keys() - set(found)} - {None}
    return [key for key in found if _kind_of_expert(key) not in experts]


def _is_of_sizes(error: Exception) -> bool:
    """Whether an error on the meta device would come with values too; what only lacks values, or a kernel, would not."""
    text = str(error).lower()
    if isinstance(error, NotImplementedError) or "meta" in text:
        return False
    return isinstance(error, ValueError | AssertionError) or any(word in text for word in ("shape", "size", "dim"))


def _reason(model: PreTrainedModel, error: Exception) -> str:
    """Return why a step failed: the width and heads of a model that do not fit, or the error's own words."""
    for module in model.modules():
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
        width, heads = (getattr(config, size, None) for size in ("hidden_size", "num_attention_heads"))
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            return f"hidden_size={width} does not divide into num_attention_heads={heads}"
    kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
    return f"a step on {TRIAL_LENGTH} tokens fails ({kind}{first_line(error)})"


def _kind_of_expert(name: str) -> str | None:
    """Return a parameter's name without the number of its expert; None for one that belongs to no numbered expert."""
    parts = name.split(".")
    begin = next((i for i, part in enumerate(parts) if "expert" in part.lower()), len(parts))
    if not any(part.isdigit() for part in parts[begin:]):
        return None
    return ".".join([*parts[:begin], *("*" if part.isdigit() else part for part in parts[begin:])])


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore what a forward may set on its modules.

    BigBird, for one, changes its kind of attention for good when it meets a short row.
    """
    modules = list(model.modules())
    before = [({**_scalars(module)}, dict(module._modules)) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, (scalars, children) in zip(modules, before, strict=True):
            vars(module).update(scalars)
            module._modules.clear()
            module._modules.update(children)


def _scalars(module: nn.Module) -> dict[str, _Scalar]:
    return {key: value for key, value in vars(module).items() if isinstance(value, _Scalar)}


class _ValuesOnMeta(TorchDispatchMode):
    """Gives a model on the meta device that reads a value the value 1, as of a mask without padding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that comes with adapters of PEFT, or wrapped by it: an export would hold them alone, or not at all.

    Raises:
        InputError: Saying what to do.
    """
    if not has_adapters(model):
        return
    raise InputError(
        f"{type(model).__name__} has adapters of PEFT, which pre-training does not export: train the model itself "
        "(model.merge_and_unload() gives one with the adapters in its weights), with new adapters by adapter='lora' or "
        "peft_config=..."
    )


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of PEFT that are not merged, or is wrapped by it."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return True
    # Without importing it: where it has not been imported, no model has adapters. A merged model still has its configuration.
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
    known = input_names(model)
    taken = [name for name in names if name in known]
    try:
        if taken != list(names):
            tokenizer.model_input_names, tokenizer.init_kwargs = taken, options | {"model_input_names": taken}
        yield tokenizer
    finally:
        tokenizer.model_input_names, tokenizer.init_kwargs = names, options
