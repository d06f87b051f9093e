"""Stock configurations: nested in a composite's, or built for a model from scratch; and how stock models are opened."""

import json
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.errors import InputError, check_choice, check_numbers, nearest, one_line
from hf_pretrain.modeling.backbone import (
    FEED_FORWARD_OF_FOUR_WIDTHS,
    POSITIONS_AFTER_PADDING,
    READ_WITHOUT_DEFAULT,
    WITHOUT_LENGTH,
    decoder_start,
    encoder_decoder_sizes,
    feed_forward_name,
)
from hf_pretrain.modeling.heads import with_head
from hf_pretrain.modeling.loading import (
    MODEL_DTYPES,
    USUAL_ENCODER_DECODERS,
    USUAL_ENCODERS,
    first_line,
    from_config,
    from_pretrained,
    refuse_type,
)
from hf_pretrain.modeling.visibility.backends import AUTO, FLEX
from hf_pretrain.options import option

SubModelConfig = PreTrainedConfig | dict[str, Any] | None


class CompositeConfig(PreTrainedConfig):
    """Configuration of a composite: its fields named in `sub_configs` are stock configurations."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let AutoConfig know the composite, or transformers would warn of each checkpoint that a run goes on from."""
        super().__init_subclass__(**kwargs)
        if cls.model_type:
            AutoConfig.register(cls.model_type, cls, exist_ok=True)

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn saved dictionaries back into stock configurations and keep each one's attention backend."""
        backends = {}
        for name in self.sub_configs:
            config = getattr(self, name)
            if isinstance(config, dict):
                config = AutoConfig.for_model(**config)
                setattr(self, name, config)
            backends[name] = getattr(config, "_attn_implementation", None)
        super().__post_init__(**kwargs)
        # The base class has just overwritten them with the composite's own, which is none.
        for name, backend in backends.items():
            config = getattr(self, name)
            if config is not None:
                config._attn_implementation = backend
                # The Trainer compares these with the tokenizer's, and warns.
                for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
                    setattr(self, special, getattr(config, special, None))


@dataclass
class ModelArguments:
    """Which stock model is trained: a checkpoint to continue, or sizes to build one from."""

    model_name_or_path: str | None = option(
        None, "Checkpoint to continue from; without it the model is built from the sizes below."
    )
    model_type: str = option(
        "bert", "Architecture built from scratch: bert, roberta, electra, albert, modernbert, ..."
    )
    hidden_size: int = option(256, "Width of the encoder.")
    num_hidden_layers: int = option(12, "Number of layers.")
    num_attention_heads: int = option(4, "Attention heads a layer.")
    intermediate_size: int = option(1024, "Width of the feed-forward layers.")
    embedding_size: int | None = option(
        None, "Width of the embedding tables, where the architecture has one of its own."
    )
    max_position_embeddings: int = option(512, "Longest sequence, in tokens.")
    attn_implementation: str | None = option(
        AUTO,
        "Attention backend: auto (flash attention in steps of half precision on a GPU where it is installed, else sdpa or "
        "eager), or one by name (sdpa, eager, flex_attention, flash_attention_2, ...).",
    )
    model_dtype: str = option(
        "float32",
        "Number format of the trained weights, float32 or bfloat16, whatever a checkpoint is stored in. Steps of a "
        "usual learning rate are lost in bfloat16 weights; --bf16 computes in bfloat16 and keeps the weights in float32.",
    )
    config_overrides: str | None = option(
        None, 'JSON object of further configuration values, e.g. {"hidden_dropout_prob": 0.0}.'
    )
    init_embeddings: str | None = option(
        None,
        "Word vectors that the word table of a new model starts from: a folder of hf-pretrain vectors, a model on the Hub, or a "
        "file of word2vec, GloVe or fastText.",
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, overrides that are no JSON object, and word vectors for a table that is there."""
        check_numbers(self)
        parse_overrides(self.config_overrides)
        if self.init_embeddings is not None and self.model_name_or_path is not None:
            raise InputError(
                f"init_embeddings={self.init_embeddings!r} is for a new model, and model_name_or_path="
                f"{self.model_name_or_path!r} has a word table: leave out one of the two"
            )


def build_config(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    auto_class: Any = AutoModelForMaskedLM,
    **changes: Any,
) -> PreTrainedConfig:
    """Build the configuration of a model from scratch.

    Args:
        args: Sizes of the model.
        tokenizer: Gives the vocabulary size and the special ids.
        auto_class: The Auto class that has to know the architecture.
        **changes: Values that go before those of `args`.

    Returns:
        A stock configuration. `max_position_embeddings` is raised by the offset that RoBERTa-like models add to positions.

    Raises:
        InputError: If the architecture or a value is unknown to transformers, or the sizes do not fit together.
    """
    _check_type(args.model_type, auto_class)
    values: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "embedding_size")
        if getattr(args, name) is not None
    }
    if args.model_type in FEED_FORWARD_OF_FOUR_WIDTHS:
        if args.intermediate_size != 4 * args.hidden_size:
            raise InputError(
                f"intermediate_size={args.intermediate_size}: that of {args.model_type} is always four times hidden_size, "
                f"here {4 * args.hidden_size}"
            )
        del values["intermediate_size"]
    if "intermediate_size" in values:
        values[feed_forward_name(args.model_type)] = values.pop("intermediate_size")
    values["vocab_size"] = len(tokenizer)
    if args.model_type not in WITHOUT_LENGTH:
        values["max_position_embeddings"] = args.max_position_embeddings
    values |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")
    }
    overrides = parse_overrides(args.config_overrides)
    values |= overrides | changes
    try:
        known = CONFIG_MAPPING[args.model_type]()
        values = _fused_activation(known) | values
        _check_options(args, values, overrides=overrides, known=known)
        if args.model_type in POSITIONS_AFTER_PADDING:
            values["max_position_embeddings"] += _padding_id(args.model_type, tokenizer) + 1
        # Under its own names: what is set under another comes too late for sizes that follow from it, such as XLNet's d_head.
        values = {known.attribute_map.get(name, name): value for name, value in values.items()}
        return AutoConfig.for_model(args.model_type, **values)
    except InputError:
        raise
    except Exception as error:  # each architecture checks in its own way
        raise InputError(f"{args.model_type} cannot be built: {first_line(error)}") from error


def _fused_activation(known: PreTrainedConfig) -> dict[str, str]:
    """Return the activation of an architecture under the name of its one kernel, where its default is many small ones.

    `gelu_new`, and so GPT-2's default, is nine operations of Python in a pass; `gelu_pytorch_tanh` is the same function.
    """
    names = {known.attribute_map.get(name, name) for name in ("activation_function", "hidden_act")}
    return {name: "gelu_pytorch_tanh" for name in names if getattr(known, name, None) in ("gelu_new", "gelu_fast")}


def build_encoder_decoder_config(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_decoder_layers: int | None = None,
    **changes: Any,
) -> PreTrainedConfig:
    """Build the configuration of an encoder-decoder from scratch.

    Its special ids are the tokenizer's, as `generate` needs them. A tokenizer without `bos_token` or `eos_token` has
    `cls_token` and `sep_token` in their place.

    Args:
        args: Sizes of both halves.
        tokenizer: Gives the vocabulary size and the special ids.
        num_decoder_layers: Layers of the decoder; by default as many as the encoder's.
        **changes: Values that go before those of `args`.

    Returns:
        A stock configuration. `max_position_embeddings` is raised as in [`build_config`].

    Raises:
        InputError: If the architecture is no encoder-decoder or has no such sizes, or these do not fit together.
    """
    _check_type(args.model_type, AutoModelForSeq2SeqLM)
    if args.model_type == EncoderDecoderConfig.model_type:
        raise InputError(
            f"model_type={args.model_type!r} is made of two checkpoints: name them with encoder_name_or_path and "
            "decoder_name_or_path instead"
        )
    try:
        known = CONFIG_MAPPING[args.model_type]()
    except Exception as error:  # some are made of two that have to be named
        raise InputError(f"{args.model_type} cannot be built from sizes: {first_line(error)}") from error
    _check_pair_options(args, known)
    sizes = {
        name: getattr(args, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    sizes |= {"num_decoder_layers": num_decoder_layers or args.num_hidden_layers, "vocab_size": len(tokenizer)}
    sizes["max_position_embeddings"] = args.max_position_embeddings
    if args.model_type in POSITIONS_AFTER_PADDING:
        sizes["max_position_embeddings"] += _padding_id(args.model_type, tokenizer) + 1
    values = encoder_decoder_sizes(known, sizes)
    ids = special_ids(tokenizer)
    special = {f"{role}_token_id": ids[role] for role in ("pad", "bos", "eos")}
    for half in ("encoder", "decoder"):
        values |= {half: values[half] | special} if half in values else {}
    values |= special | {"decoder_start_token_id": ids[decoder_start(known)]}
    values |= {"forced_eos_token_id": ids["eos"]} if getattr(known, "forced_eos_token_id", None) is not None else {}
    overrides = {
        known.attribute_map.get(key, key): value for key, value in parse_overrides(args.config_overrides).items()
    }
    try:
        config = AutoConfig.for_model(args.model_type, **values | overrides | changes)
    except Exception as error:  # each architecture checks in its own way
        raise InputError(f"{args.model_type} cannot be built: {first_line(error)}") from error
    _check_pair(config, sizes["num_decoder_layers"], overrides=overrides)
    return config


def _check_pair(config: PreTrainedConfig, depth: int, *, overrides: dict[str, Any]) -> None:
    """Refuse values that an architecture sets itself, and a decoder for which `generate` would make too few caches."""
    for name, value in overrides.items():
        own = getattr(config, name, None)
        if isinstance(value, bool | int | float | str) and own != value:
            raise InputError(f"config_overrides: {config.model_type} sets {name}={own!r} itself: leave {name} out")
    cached = getattr(config.get_text_config(decoder=True), "num_hidden_layers", depth)
    if cached < depth:
        raise InputError(
            f"num_decoder_layers={depth} is more than the {cached} layers that transformers generates with in a "
            f"{config.model_type}, as many as its encoder has: set num_decoder_layers to at most that, or raise num_hidden_layers"
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return the ids of the tokens `pad`, `bos` and `eos`; the last two may be called `cls_token` and `sep_token`."""
    ids: dict[str, int | None] = {"pad": tokenizer.pad_token_id}
    for role, other in (("bos", "cls"), ("eos", "sep")):
        own = getattr(tokenizer, f"{role}_token_id")
        ids[role] = getattr(tokenizer, f"{other}_token_id") if own is None else own
    return ids


def _check_pair_options(args: ModelArguments, known: PreTrainedConfig) -> None:
    """Refuse options that an encoder-decoder does not have, and heads that do not divide its width."""
    if args.embedding_size is not None:
        raise InputError(
            f"embedding_size={args.embedding_size}: {args.model_type} embeds at its full width; leave it out"
        )
    _known_overrides(args, known)
    if args.hidden_size % args.num_attention_heads:
        raise InputError(
            f"hidden_size={args.hidden_size} does not divide into num_attention_heads={args.num_attention_heads}: change one"
        )


def load_or_build(
    choose: Any,
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stock: PreTrainedModel | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Open the checkpoint that the arguments name, build the model that they describe, or give a stock model its head.

    Args:
        choose: The Auto class, or a function from the configuration to it.
        args: What to open or to build.
        tokenizer: Sizes the vocabulary of a model from scratch.
        stock: A stock model that is there, with or without the head.
        options: Keywords of `from_pretrained` and `from_config`; by default the attention backend of `args`.
        **changes: Arguments of [`build_config`], for a model from scratch.

    Raises:
        InputError: If there is no such checkpoint, the sizes do not fit the architecture, or word vectors do not fit the model.
    """
    name, options = args.model_name_or_path, attention_options(args) if options is None else options
    is_class = isinstance(choose, type)
    if stock is not None:
        check_without_vectors(args)
        return with_head(stock, choose if is_class else choose(stock.config))
    if name is not None:
        auto_class = choose if is_class else choose(from_pretrained(AutoConfig, name))
        return from_pretrained(auto_class, name, **options)
    config = build_config(args, tokenizer, **({"auto_class": choose} if is_class else {}) | changes)
    return fill_word_table(from_config(choose if is_class else choose(config), config, **options), args, tokenizer)


def fill_word_table(model: Any, args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a new model whose word table starts from the vectors that the arguments name, if they name any.

    Args:
        model: The model, changed in place.
        args: Name the vectors in `init_embeddings`.
        tokenizer: Tokenizer of the model.

    Raises:
        InputError: If there are no such vectors, or they are narrower than the table.
    """
    if args.init_embeddings is not None:
        # Vectors are made from models, so that module imports this folder.
        from hf_pretrain.vectors.transfer import start_from_vectors

        start_from_vectors(model, tokenizer, args.init_embeddings)
    return model


def check_without_vectors(args: ModelArguments) -> None:
    """Refuse word vectors for a model that is there."""
    if args.init_embeddings is not None:
        raise InputError(
            f"init_embeddings={args.init_embeddings!r} is for a new model, and one that is given has a word table: leave it out"
        )


def _check_options(
    args: ModelArguments, values: dict[str, Any], *, overrides: dict[str, Any], known: PreTrainedConfig
) -> None:
    """Refuse what an architecture has no option for: one that was given, or one of the usual sizes."""
    further = READ_WITHOUT_DEFAULT.get(args.model_type, frozenset())
    unknown = sorted(
        name for name in values if not hasattr(known, name) and not name.endswith("_token_id") and name not in further
    )
    if unknown == ["embedding_size"]:
        raise InputError(
            f"embedding_size={args.embedding_size}: {args.model_type} embeds at its full width; leave it out"
        )
    if set(unknown) & set(overrides):
        raise InputError(f"config_overrides: {args.model_type} has no option {', '.join(unknown)}")
    if unknown:
        raise InputError(
            f"model_type={args.model_type!r} cannot be built from these sizes, it has no {', '.join(unknown)}: continue one of "
            f"its checkpoints, or choose a model_type such as {USUAL_ENCODERS}"
        )


def _check_type(model_type: str, auto_class: Any) -> None:
    """Refuse an architecture that is unknown or none that a class opens."""
    mapping = auto_class._model_mapping
    if model_type not in CONFIG_MAPPING:
        usual = USUAL_ENCODER_DECODERS if auto_class is AutoModelForSeq2SeqLM else USUAL_ENCODERS
        hint = nearest(model_type, list(mapping._model_mapping), otherwise=f"choose one such as {usual}")
        raise InputError(f"model_type={model_type!r} is not an architecture of transformers: {hint}")
    if CONFIG_MAPPING[model_type] not in mapping:
        raise refuse_type(model_type, auto_class)


def _padding_id(model_type: str, tokenizer: PreTrainedTokenizerBase) -> int:
    padding_id: int | None = tokenizer.pad_token_id
    if padding_id is None:
        raise InputError(f"model_type={model_type!r} numbers positions by padding: give the tokenizer a pad_token")
    if model_type == "mpnet" and padding_id != 1:
        raise InputError(
            f"model_type='mpnet' takes token 1 for padding, but the tokenizer's is {padding_id}: train a bpe one"
        )
    return padding_id


def scaled_config(config: PreTrainedConfig, *, width: float, depth: float) -> PreTrainedConfig:
    """Return a smaller configuration of the same architecture.

    Args:
        config: Configuration to scale.
        width: Share of the hidden width, of the heads and of the feed-forward width that is kept.
        depth: Share of the layers that is kept.

    Raises:
        InputError: If the architecture has no such sizes.
    """
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", feed_forward_name(config.model_type))
    changes = dict.fromkeys(names, width)
    values = config.to_dict()
    for name, share in (changes | {"num_hidden_layers": depth}).items():
        own_name = config.attribute_map.get(name, name)
        # Not every architecture names the width of its feed-forward layers, and few have keys of fewer heads.
        if values.get(own_name) is not None:
            values[own_name] = max(1, round(values[own_name] * share))
    layers = values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    if values.get("layer_types") is not None:
        values["layer_types"] = values["layer_types"][:layers]
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # each architecture checks in its own way
        raise InputError(
            f"a {config.model_type} of {width} of the width and {depth} of the layers cannot be built: {first_line(error)}"
        ) from error


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Read the JSON object of `config_overrides`; raise InputError where it is none, or holds numbers that are not finite."""
    if text is None:
        return {}
    try:
        values = json.loads(text)
        json.dumps(values, allow_nan=False)
    except json.JSONDecodeError as error:
        raise InputError(f'config_overrides={text!r} is not JSON ({error}): write {{"name": value}}') from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"config_overrides={text[:200]!r} is not JSON that can be used: {reason}") from error
    if not isinstance(values, dict):
        raise InputError(f'config_overrides={text!r} is not a JSON object: write {{"name": value}}')
    return values


def check_model_type(config: PreTrainedConfig, wanted: type[PreTrainedConfig], *, name: str) -> None:
    """Refuse a model of another architecture than the wanted one; `name` says which option gave it."""
    if config.model_type != wanted.model_type:
        article = "an" if wanted.model_type[0] in "aeiou" else "a"
        raise InputError(f"{name} is a {config.model_type}, not {article} {wanted.model_type}")


def own_config(config_class: Any, args: Any, tokenizer: PreTrainedTokenizerBase, **values: Any) -> PreTrainedConfig:
    """Return the configuration of one of this library's architectures, from options that have its names.

    Args:
        config_class: Class of the configuration.
        args: The options: its sizes, `model_name_or_path` and `config_overrides`.
        tokenizer: Gives the vocabulary and the special ids.
        **values: Further values.

    Raises:
        InputError: If an override is unknown, or the values do not fit together.
    """
    of_others = {"model_name_or_path", "config_overrides"}
    values = {each.name: getattr(args, each.name) for each in fields(args) if each.name not in of_others} | values
    values |= {"vocab_size": len(tokenizer)}
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    overrides = _known_overrides(args, config_class())
    try:
        return config_class(**(values | overrides))
    except (ValueError, StrictDataclassError) as error:
        raise InputError(f"the model cannot be built: {one_line(error, line=-1)}") from error


def _known_overrides(args: Any, known: PreTrainedConfig) -> dict[str, Any]:
    """Return the `config_overrides`; raise InputError for one that the configuration does not have."""
    overrides = parse_overrides(args.config_overrides)
    unknown = sorted(name for name in overrides if not hasattr(known, name))
    if unknown:
        raise InputError(f"config_overrides: {known.model_type} has no option {', '.join(unknown)}")
    return overrides


def attention_options(args: ModelArguments) -> dict[str, Any]:
    """Return the keyword that chooses the attention backend of a model that is built or opened.

    None where the arguments name no backend, and for FlexAttention, which a model has only while a step runs.
    """
    name = args.attn_implementation
    return {} if name in (None, AUTO, FLEX) else {"attn_implementation": name}


def dtype_option(args: ModelArguments) -> dict[str, str]:
    """Return the keyword that chooses the number format of a composite's weights; raise InputError for an unknown one."""
    check_choice(args.model_dtype, MODEL_DTYPES, name="model_dtype")
    return {"dtype": args.model_dtype}
