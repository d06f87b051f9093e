"""What a stock encoder is like: its layers, tables and positions, what it takes, and what it calls its sizes.

The library looks here and nowhere else. The answer comes from modules and configuration, or else from the name of the
architecture. A new architecture is fitted in this file.

The order: tables for single architectures; names in a configuration; layers; the word table; positions; inputs; sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_pretrain.errors import InputError

# Attention of their own, none of transformers' functions: a mask is boolean and may be square, ``[B, L, L]``.
DISENTANGLED = frozenset({"deberta", "deberta-v2"})

# Architectures whose segments are compared, not looked up in a table, so that their configuration has no number of them.
_COMPARED_SEGMENTS = {"xlnet": 2, "funnel": 2}

# Names for the width of the feed-forward layers.
_FEED_FORWARD_NAMES = {
    "distilbert": "hidden_dim",
    "xlnet": "d_inner",
    **dict.fromkeys(("gpt2", "gptj", "codegen"), "n_inner"),
    "opt": "ffn_dim",
}

FEED_FORWARD_OF_FOUR_WIDTHS = frozenset({"xlm", "flaubert", "openai-gpt", "bloom"})
"""Architectures whose feed-forward layers are always four times as wide as the states."""

WITHOUT_LENGTH = frozenset({"xlnet", "bloom"})
"""Architectures whose configuration refuses a longest sequence, or has none."""

READ_WITHOUT_DEFAULT = {"deberta-v2": frozenset({"position_buckets", "norm_rel_ebd", "share_att_key"})}
"""Options that a model reads from its configuration although the class has no such field: published files have them."""

POSITIONS_AFTER_PADDING = frozenset(
    """roberta xlm-roberta xlm-roberta-xl camembert mpnet data2vec-text longformer roberta-prelayernorm esm ibert luke
    xmod prophetnet""".split()
)
"""Architectures that number positions from the padding id on: RoBERTa and its kin. [`counts_from_padding`] reads it
from a model; this is for the sizes of one that is not built yet."""

# Names of the usual sizes in the configurations of encoder-decoders; one has several where its halves are sized apart.
_NAMES_IN_PAIRS = {
    "vocab_size": ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size"),
    "hidden_size": ("d_model", "hidden_size"),
    "num_hidden_layers": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "num_decoder_layers": ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": (
        *("encoder_attention_heads", "decoder_attention_heads"),
        *("num_encoder_attention_heads", "num_decoder_attention_heads", "num_heads"),
    ),
    "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
    "max_position_embeddings": (
        *("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings"),
    ),
}
# The names of sizes where each half has a configuration of its own.
_OF_A_HALF = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What follows from the width of a head, and from the number of heads, in these configurations.
_HEAD_WIDTHS, _KEY_HEADS = ("d_kv", "head_dim", "query_pre_attn_scalar"), "num_key_value_heads"
# Layers with experts, of which there are no more than layers.
_SPARSE_LAYERS = {
    "num_sparse_encoder_layers": "num_hidden_layers",
    "num_sparse_decoder_layers": "num_decoder_layers",
}
# The token that a decoder begins with, for architectures whose configuration does not say it; the others take the end token.
_DECODER_STARTS = {
    "t5": "pad",
    "longt5": "pad",
    "switch_transformers": "pad",
    "t5gemma": "bos",
    "encoder-decoder": "bos",
}

# Linear layers that are queries, keys and values in one, by the name of the layer: one block after the other, or ("by head") the
# three of each head side by side.
_QUERIES_KEYS_VALUES = {
    "modernbert": ("Wqkv", "in blocks"),
    **dict.fromkeys(("gpt2", "imagegpt", "decision_transformer"), ("c_attn", "in blocks")),
    **dict.fromkeys(("bloom", "gpt_neox", "gpt_neox_japanese"), ("query_key_value", "by head")),
}
# Matrices with an axis for the heads, ``[width, heads, width of a head]``.
_MATRICES_OF_HEADS = {"xlnet": ("q", "k", "v", "o", "r"), "funnel": ("r_kernel",)}

# Names for the same option, BERT's first.
_OTHER_NAMES = {
    "layer_norm_eps": ("norm_eps",),
    "initializer_range": ("init_std",),
    "hidden_act": ("hidden_activation", "activation", "ff_activation"),
    "hidden_dropout_prob": ("dropout", "mlp_dropout"),
}

# Options that are lists with a value a layer.
_PER_LAYER = ("layer_types", "attention_window")
# Entry of a stock configuration that only this library writes.
_SHIFTED = "shifted_prediction"

# GPT-2's and GPT-1's tables have the last two names.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions_embed")


def feed_forward_name(model_type: str) -> str:
    """Return what an architecture calls the width of its feed-forward layers."""
    return _FEED_FORWARD_NAMES.get(model_type, "intermediate_size")


def encoder_decoder_sizes(known: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the usual sizes under the names that an encoder-decoder has for them.

    Args:
        known: Configuration of the architecture with its defaults.
        sizes: `vocab_size`, `hidden_size`, `num_hidden_layers` (of the encoder), `num_decoder_layers`, `num_attention_heads`,
            `intermediate_size` and `max_position_embeddings`; the heads divide the width.

    Returns:
        Values of its configuration, both halves in one; those of `encoder` and `decoder` apart where these have configurations.
        A longest sequence is left out where positions are distances.

    Raises:
        InputError: If the architecture has no name for a size.
    """
    halves: list[Any] = [getattr(known, name, None) for name in ("encoder", "decoder")]
    if all(isinstance(half, PreTrainedConfig) for half in halves):
        _check_names(known, [name for half in halves for name in _OF_A_HALF if name not in half.to_dict()])
        depths = (sizes["num_hidden_layers"], sizes["num_decoder_layers"])
        parts = [
            _of_half(half, {**sizes, "num_hidden_layers": depth}) for half, depth in zip(halves, depths, strict=True)
        ]
        return {"encoder": parts[0], "decoder": parts[1], "vocab_size": sizes["vocab_size"]}
    own = known.to_dict().keys()
    values = {name: size for option, size in sizes.items() for name in _NAMES_IN_PAIRS[option] if name in own}
    needed = [option for option in _NAMES_IN_PAIRS if option != "max_position_embeddings"]
    _check_names(known, [option for option in needed if not values.keys() & set(_NAMES_IN_PAIRS[option])])
    values |= {name: min(getattr(known, name), sizes[of]) for name, of in _SPARSE_LAYERS.items() if name in own}
    return values | head_sizes(known, sizes)


def _of_half(known: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the sizes of one half of an encoder-decoder whose halves have configurations of their own."""
    own = known.to_dict().keys()
    return {name: size for name, size in sizes.items() if name in own} | head_sizes(known, sizes)


def head_sizes(known: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return what follows from width and heads under the names of a configuration: the width of a head, heads of keys.

    Args:
        known: Configuration of the architecture with its defaults.
        sizes: `hidden_size` and `num_attention_heads`, the second of which divides the first.
    """
    heads, own = sizes["num_attention_heads"], known.to_dict().keys()
    widths = {name: sizes["hidden_size"] // heads for name in _HEAD_WIDTHS if name in own}
    return widths | ({_KEY_HEADS: heads} if _KEY_HEADS in own else {})


def _check_names(known: PreTrainedConfig, missing: list[str]) -> None:
    """Refuse an architecture that has no name for a size."""
    if missing:
        raise InputError(
            f"model_type={known.model_type!r} cannot be built from these sizes, it has no {missing[0]}: continue one of its "
            "checkpoints, or choose a model_type such as bart, t5, mt5, mbart or pegasus"
        )


def decoder_start(known: PreTrainedConfig) -> str:
    """Return which special token a decoder begins with: "pad", "bos" or "eos".

    Args:
        known: Configuration of an encoder-decoder with its defaults.
    """
    first = getattr(known, "decoder_start_token_id", None)
    roles = ("eos", "pad", "bos") if first is not None else ()
    found = next((role for role in roles if getattr(known, f"{role}_token_id", None) == first), None)
    return found or _DECODER_STARTS.get(known.model_type, "eos")


def can_attend_to_encoder(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Return whether the layers of a causal language model can be given attention to the states of an encoder."""
    return hasattr(config, "add_cross_attention") and "encoder_hidden_states" in _parameters(cast(Any, model_class))


def shared_options(config: PreTrainedConfig, *names: str) -> dict[str, Any]:
    """Return options that a head takes over from its encoder, under the names that BERT gave them, where it has them."""
    values = {}
    for name in names:
        found = (getattr(config, other, None) for other in (name, *_OTHER_NAMES.get(name, ())))
        value = next((value for value in found if value is not None), None)
        if value is not None:
            values[name] = value
    return values


def num_token_types(config: PreTrainedConfig) -> int:
    """Return the number of a model's token types, 0 where it has none."""
    own = getattr(config, "type_vocab_size", None)
    return _COMPARED_SEGMENTS.get(config.model_type, 0) if own is None else int(own)


def is_shifted(model: PreTrainedModel) -> bool:
    """Return whether a masked language model predicts a masked token from the state of the token before it.

    Its checkpoint says so: transformers has no name for it.
    """
    return bool(getattr(model.config, _SHIFTED, False))


def refuse_shifted(model: PreTrainedModel, *, option: str) -> None:
    """Refuse a model that predicts masked tokens at the position before them, where they are read at their own.

    Args:
        model: A stock model; one without a head for tokens predicts none.
        option: What named the model.

    Raises:
        InputError: Naming the option and the model.
    """
    if is_shifted(model) and model.get_output_embeddings() is not None:
        raise InputError(
            f"{option}={model.config.name_or_path or type(model).__name__} predicts a masked token at the position before it, "
            "but is read at the mask itself: name a model that was trained with --prediction same"
        )


def note_shifted(config: PreTrainedConfig, shifted: bool) -> None:
    """Write into a stock configuration how masked tokens are predicted; see [`is_shifted`]. The usual way has no entry."""
    if shifted:
        setattr(config, _SHIFTED, True)
    elif hasattr(config, _SHIFTED):
        delattr(config, _SHIFTED)


def per_layer_values(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the options of a configuration that have a value for each layer."""
    return {name: value for name in _PER_LAYER if isinstance(value := getattr(config, name, None), list)}


def window_of(config: PreTrainedConfig, layer: int | None = None) -> int | None:
    """Return the largest distance at which tokens see each other in a layer with a window, None where all do.

    Args:
        config: Configuration of a model on transformers' attention functions.
        layer: Number of the layer, from 1; None for any that has a window.
    """
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" not in (kinds if layer is None else kinds[layer - 1 : layer]):
        return None
    return int(config.sliding_window)


def module_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that are not inside of another list, by name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def layers_name(model: PreTrainedModel) -> str | None:
    """Return the name of the one list whose modules are the layers.

    None where no list is as long as the model is deep (ALBERT runs one module again and again, Funnel nests its lists) or
    several are (XLM keeps the parts of a layer apart, BART has an encoder and a decoder).
    """
    depth = model.config.num_hidden_layers
    found = [name for name, modules in module_lists(model).items() if len(modules) == depth]
    nested = [name for name in found if isinstance(model.get_submodule(name)[0], nn.ModuleList)]
    return found[0] if len(found) == 1 and not nested else None


def layer_modules(body: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose calls are the layers, in order; one that is called again is another layer.

    Args:
        body: A stock model without a head.

    Raises:
        InputError: If the architecture does not show them.
    """
    name = layers_name(body)
    if name is not None:
        return list(body.get_submodule(name).children())
    recorded = (getattr(type(body), "_can_record_outputs", None) or {}).get("hidden_states")
    kind = getattr(recorded, "target_class", recorded)
    layers: list[nn.Module]
    if isinstance(kind, type):
        layers = [module for module in body.modules() if isinstance(module, cast(Any, kind))]
    else:
        # The first part of each layer, or an encoder's before its decoder's.
        layers = next((_flat(one) for one in module_lists(body).values() if len(_flat(one)) == _depth(body)), [])
    if not layers:
        raise InputError(f"{type(body).__name__} does not show its layers: distil from and to another architecture")
    return layers


def _depth(body: PreTrainedModel) -> int:
    return int(body.config.num_hidden_layers)


def _flat(modules: nn.ModuleList) -> list[nn.Module]:
    return [inner for one in modules for inner in (_flat(one) if isinstance(one, nn.ModuleList) else [one])]


class HiddenMatrix(NamedTuple):
    """How the matrices of a hidden layer lie in its parameter.

    Attributes:
        parts: Matrices that are stored as one, such as 3 for queries, keys and values; 0 for an axis of experts.
        blocks: How often the parts follow each other: 1, or once a head.
        is_transposed: Whether the parts lie along the columns, as in GPT-2.
    """

    parts: int = 1
    blocks: int = 1
    is_transposed: bool = False

    def pieces(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrices of a tensor of the parameter's shape: ``[K, A, B]``."""
        if self.parts == 0:
            return tensor
        matrix = tensor.flatten(1)
        matrix = matrix.mT if self.is_transposed else matrix
        columns = matrix.shape[1]
        return matrix.reshape(self.blocks, self.parts, -1, columns).transpose(0, 1).reshape(self.parts, -1, columns)

    def joined(self, pieces: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the tensor of the parameter's shape from its matrices ``[K, A, B]``."""
        if self.parts == 0:
            return pieces
        columns = pieces.shape[2]
        matrix = pieces.reshape(self.parts, self.blocks, -1, columns).transpose(0, 1).reshape(-1, columns)
        return (matrix.mT if self.is_transposed else matrix).reshape(shape)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, HiddenMatrix]:
    """Return the matrices of a model's layers: what stands between its tables and its heads.

    They are the weights of linear layers inside of the lists of modules that stock models have, the matrices of experts, and
    XLNet's and Funnel's with an axis for the heads. Adapters are none, and neither are weights that a table shares, convolutions,
    recurrent layers, biases, norms, and rows or columns that stand alone.

    Args:
        model: A stock model, or a composite of some.
    """
    tables = {table.weight for table in model.modules() if isinstance(table, nn.Embedding)}
    found: dict[nn.Parameter, HiddenMatrix] = {}
    # A composite has no prefix: it is no stock model, but has some.
    stock = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.base_model_prefix]
    for body in {part.base_model: None for part in stock}:
        for layers in module_lists(body).values():
            for name, module in _without_adapters(layers):
                found |= _matrices_of(module, name=name.rpartition(".")[2], config=body.config)
    return {parameter: kind for parameter, kind in found.items() if parameter not in tables}


def _without_adapters(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those inside of it by name; of a layer with an adapter the layer alone, by its own name."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        yield from _without_adapters(base, name)
        return
    yield name, module
    for child, inner in module.named_children():
        yield from _without_adapters(inner, f"{name}.{child}")


def _matrices_of(module: nn.Module, *, name: str, config: PreTrainedConfig) -> dict[nn.Parameter, HiddenMatrix]:
    """Return the hidden matrices that a module has itself."""
    if isinstance(module, nn.Linear | Conv1D):
        weight, is_transposed = cast(nn.Parameter, module.weight), isinstance(module, Conv1D)
        if min(weight.shape) < 2:
            return {}
        layer, order = _QUERIES_KEYS_VALUES.get(config.model_type, ("", ""))
        if name != layer:
            return {weight: HiddenMatrix()}
        # Attention to an encoder has two: its queries are of the decoder.
        parts = weight.shape[is_transposed] // weight.shape[not is_transposed]
        heads = config.num_attention_heads if order == "by head" else 1
        return {weight: HiddenMatrix(parts, heads, is_transposed)}
    own = [(key, value) for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
    if type(module).__name__.endswith("Experts"):
        return {value: HiddenMatrix(parts=0) for _, value in own}
    return {value: HiddenMatrix() for key, value in own if key in _MATRICES_OF_HEADS.get(config.model_type, ())}


def vocabulary_size(embeddings: nn.Module) -> int:
    """Return how many tokens a stock model's word embeddings hold; not every kind of them is one table."""
    number = getattr(embeddings, "num_embeddings", None)
    return len(embeddings.get_parameter("weight")) if number is None else int(number)


def name_of(model: nn.Module, part: nn.Module) -> str:
    """Return the name of a module in a model, "" for the model itself."""
    return next(name for name, module in model.named_modules() if module is part)


def word_table_name(model: PreTrainedModel) -> str:
    """Return the name of the table of words in a model."""
    return name_of(model, model.get_input_embeddings())


def position_tables(model: nn.Module, *, learned: bool = False) -> dict[str, Any]:
    """Return the tables of absolute positions by name; most models have one, those with relative positions none.

    Args:
        model: A stock model, with or without a head.
        learned: Whether to leave out what is no `nn.Embedding` with weights that are trained, such as sinusoids.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(_POSITION_TABLES)
        and (isinstance(module, nn.Embedding) or (not learned and getattr(module, "weight", None) is not None))
        and not (learned and name.endswith("embed_positions"))
    }


def counts_from_padding(model: nn.Module) -> bool:
    """Return whether a model gives the first token the position after the padding id's, as RoBERTa and its kin do."""
    table = next(iter(position_tables(model).values()), None)
    return getattr(table, "padding_idx", None) is not None


def first_position(model: nn.Module) -> int:
    """Return the row of the first position in a model's table: 0, the one after the padding id's, or a fixed one.

    Nystromformer and its kin begin with row 2; their configuration says how many rows are positions.
    """
    table = next(iter(position_tables(model).values()), None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        return int(padding) + 1
    own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(0, _rows(table) - own) if table is not None and isinstance(own, int) and own > 0 else 0


def given_first_position(model: nn.Module) -> int:
    """Return the number to give a model for the first position of a row: 0 where the table adds its own offset, as OPT's."""
    table = next(iter(position_tables(model).values()), None)
    return 0 if isinstance(getattr(table, "offset", None), int) else first_position(model)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return how many tokens the position table of a stock model holds, or None where positions are not a table."""
    table = next(iter(position_tables(model).values()), None)
    return None if table is None else _rows(table) - first_position(model)


def longest_text(model: PreTrainedModel) -> int | None:
    """Return how many tokens a stock model can read: as many as its table has, else as its training had; None if unknown."""
    return longest_sequence(model) or getattr(model.config, "max_position_embeddings", None)


def _rows(table: Any) -> int:
    number = getattr(table, "num_embeddings", None)
    return int(table.weight.shape[0] if number is None else number)


def own_backend(model: PreTrainedModel) -> str | None:
    """Return the name of the backend that a model has; None if it chooses none."""
    # A method's own module need be no model of transformers.
    config = getattr(getattr(model, "base_model", model), "config", None)
    own: str | None = getattr(config, "_attn_implementation", None)
    return own


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; the meta device, where only shapes are computed, knows none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def row_position_inputs(
    model: PreTrainedModel, attention_mask: torch.Tensor, *, whatever_the_ids: bool = False
) -> dict[str, torch.Tensor]:
    """Return the positions of rows that may begin with padding, for a model that would count it.

    A stock model with a table of positions numbers the columns, so that the same text has other positions in a longer batch with
    padding on the left. RoBERTa and its kin leave padding out by themselves, and distances are the same on either side.

    Args:
        model: A stock model, with or without a head.
        attention_mask: ``[B, L]``, 0 at padding.
        whatever_the_ids: Whether RoBERTa and its kin are to be given positions too: by themselves they count the ids that are
            not the padding's, so that a token could move all that follow.

    Returns:
        `position_ids` ``[B, L]`` where the model has to be given them; else nothing. Rows that begin with a token have the
        positions that the model gives them by itself.
    """
    known: tuple[bool, int] | None = getattr(model, "_counted_columns", None)
    counts_columns, first = note_what_is_counted(model) if known is None else known
    if counts_columns:
        columns_L = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        first_B1 = (attention_mask != 0).to(torch.int8).argmax(dim=1, keepdim=True)
        return {"position_ids": (columns_L - first_B1).clamp(min=0) + first}
    if whatever_the_ids and counts_from_padding(model):
        return {"position_ids": attention_mask.cumsum(dim=1) * attention_mask + first_position(model) - 1}
    return {}


@torch.compiler.disable
def note_what_is_counted(model: PreTrainedModel) -> tuple[bool, int]:
    """Return, and remember, whether a model numbers the columns of its input but can be given numbers, and the first of them.

    A graph that is compiled would break at the look into the model.
    """
    # DeBERTa's mask decoder has a table that is not part of the model.
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    has_table = bool(position_tables(model)) or model_type in DISENTANGLED
    counts = has_table and not counts_from_padding(model) and takes_input(model, "position_ids")
    found = counts, given_first_position(model)
    setattr(model, "_counted_columns", found)  # noqa: B010 (no attribute that the type knows)
    return found


def takes_input(model: PreTrainedModel, name: str) -> bool:
    """Return whether a stock model's forward has an input of that name, with its head and without."""
    return all(name in _parameters(cast(Any, type(part))) for part in (model, model.base_model))


def reads_characters(model: PreTrainedModel) -> bool:
    """Return whether a model reads words by their characters, as ELMo does: its tokenizer makes `character_ids` for them."""
    has_them = getattr(model.config, "embedding_type", None) == "characters"
    return has_them and "character_ids" in _parameters(cast(Any, type(model.base_model)))


def input_names(model: PreTrainedModel) -> set[str]:
    """Return the inputs that a stock model takes, with its head and without; types of segments only where it has two."""
    names = _parameters(cast(Any, type(model))) & _parameters(cast(Any, type(model.base_model)))
    # A table of one type has no row for a second segment, and one of none is never read.
    return set(names - ({"token_type_ids"} if num_token_types(model.config) < 2 else set()))


@cache
def _parameters(model_class: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models without dropout and without gradients, and leave each module in the mode that it was in.

    No inference mode: a model may keep what it makes here, such as a table of rotations, and needs it in training.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the sizes of a stock model by what they are, those that its architecture has; for a reader."""
    config, embeddings = model.config, model.get_input_embeddings()
    names = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "attention heads": "num_attention_heads",
        "feed-forward width": feed_forward_name(config.model_type),
        "width of the embeddings": "embedding_size",
    }
    found = {name: getattr(config, option, None) for name, option in names.items()}
    if found["width of the embeddings"] == found["width"]:
        del found["width of the embeddings"]
    found["vocabulary"] = None if embeddings is None else vocabulary_size(embeddings)
    found["longest input in tokens"] = longest_sequence(model)
    found["parameters"] = model.num_parameters()
    return {name: value for name, value in found.items() if isinstance(value, int)}


def decoder_start_id(model: PreTrainedModel) -> int:
    """Return the token that the decoder of an encoder-decoder reads first.

    Raises:
        InputError: If its configuration names none.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(model.config, "decoder", None), "bos_token_id", None)
    if start is None:
        raise InputError(
            f"{type(model).__name__} names no decoder_start_token_id: set model.config.decoder_start_token_id, such as "
            "tokenizer.pad_token_id of a T5"
        )
    return int(start)


def flops_of_weights(model: PreTrainedModel, tokens: torch.Tensor) -> int | None:
    """Return the floating-point operations that the products of a body's weights take for a token, forward.

    A layer that runs several times counts each time. The head is left out, and the share of the attention's own products is that
    of a short text.

    Args:
        model: A stock model.
        tokens: ``[B, L]`` tokens to try it with.

    Returns:
        The count, or None where the body does not run on tokens alone.
    """
    body = model.base_model
    # The counter follows gradients, although none are computed.
    with evaluating(body), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        try:
            body(input_ids=tokens)
        except (TypeError, ValueError):
            return None
    return counter.get_total_flops() // tokens.numel()
