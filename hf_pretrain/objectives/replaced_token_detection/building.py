"""The pair of models that a program trains: built from sizes, or opened to go on with.

A pair is opened from an export of this library, from two checkpoints, or from a published DeBERTa-v3, whose generator lies
beside it in the names of the official code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import word_table_name
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.modeling.configuration import (
    attention_options,
    build_config,
    check_without_vectors,
    dtype_option,
    fill_word_table,
)
from hf_pretrain.modeling.embeddings import (
    factorize_embeddings,
    is_factorized,
    shared_embedding_names,
    shared_table_names,
)
from hf_pretrain.modeling.heads import (
    DISCRIMINATOR_HEAD_FOLDER,
    DISCRIMINATOR_HEADS,
    DiscriminatorHeadConfig,
    with_head,
)
from hf_pretrain.modeling.loading import (
    find_file,
    first_line,
    from_config,
    from_pretrained,
    read_safetensors,
    say_once,
)
from hf_pretrain.objectives.generators import (
    GeneratorArguments,
    build_discriminator,
    copy_parameters,
    generator_config,
    load_discriminator,
    stock_discriminator,
    stock_width,
)
from hf_pretrain.objectives.replaced_token_detection.modeling import (
    EMBEDDING_SHARING,
    ReplacedTokenDetectionForPreTraining,
)
from hf_pretrain.options import option

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DEBERTA_GENERATOR = "pytorch_model.generator.bin"
_DEBERTA_TABLE = "deberta.embeddings.word_embeddings"
_DEBERTA_POSITIONS = "deberta.embeddings.position_embeddings.weight"
_DEBERTA_HEAD = "mask_predictions."


class Pair(NamedTuple):
    """What was found.

    Attributes:
        generator: Stock masked language model; None where the checkpoint has none.
        discriminator: Stock model with one logit a token, or the encoder below another head.
        options: Options of the composite that the checkpoint tells: `discriminator_head`, `enhanced_mask_decoder`.
        parts: Names of further modules of the composite -> their state.
    """

    generator: PreTrainedModel | None
    discriminator: PreTrainedModel
    options: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]


def load_pair(name: str, generator_name: str | None, *, head: str | None = None, **options: Any) -> Pair:
    """Open a pair.

    Args:
        name: Folder or repository of the discriminator.
        generator_name: That of the generator; by default `pretraining/generator` in `name`, or the generator that lies beside a
            published DeBERTa-v3.
        head: Kind of the discriminator's head; by default the checkpoint's own.
        **options: Passed on to transformers.

    Raises:
        InputError: If a checkpoint can not be opened, or a published one lacks weights.
    """
    published = find_file(generator_name or name, _DEBERTA_GENERATOR)
    found, parts = _head(name, is_published=published is not None)
    if head not in (None, found):
        parts.clear()
    head = head or found
    discriminator = load_discriminator(name, head, **options)
    chosen: dict[str, Any] = {"discriminator_head": head}
    if published is not None:
        generator, positions = _published_generator(name, published, options)
        chosen["enhanced_mask_decoder"] = True
        parts["generator_decoder"] = {"position_embeddings.weight": positions}
        _add_difference(name, discriminator, generator)
        return Pair(generator, discriminator, chosen, parts)
    decoder = find_file(name, "model.safetensors", subfolder=f"{GENERATOR_FOLDER}_decoder")
    if decoder is not None:
        chosen["enhanced_mask_decoder"] = True
        parts["generator_decoder"] = read_safetensors(decoder)
    where: dict[str, Any] = {} if generator_name is not None else {"subfolder": GENERATOR_FOLDER}
    if generator_name is None and find_file(name, "config.json", **where) is None:
        return Pair(None, discriminator, chosen, parts)
    generator = from_pretrained(AutoModelForMaskedLM, generator_name or name, **where, **options)
    return Pair(generator, discriminator, chosen, parts)


def _weights(name: str) -> dict[str, torch.Tensor]:
    path = next(filter(None, (find_file(name, weights) for weights in _WEIGHTS)), None)
    if path is None:
        raise InputError(f"{name!r} holds none of {', '.join(_WEIGHTS)}: name a checkpoint in one piece")
    return read_safetensors(path) if path.endswith("safetensors") else _load(path)


def _load(path: str) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path!r} cannot be read ({first_line(error)}): copy it again") from error


def _head(name: str, *, is_published: bool) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """Return the kind of head that a checkpoint has, and its weights if they are not in a stock class."""
    where = DISCRIMINATOR_HEAD_FOLDER
    weights = find_file(name, "model.safetensors", subfolder=where)
    if weights is not None:
        config = from_pretrained(DiscriminatorHeadConfig, name, subfolder=where)
        return config.kind, {"discriminator_head": read_safetensors(weights)}
    if not is_published:
        return "stock", {}
    state = {
        # The official class spells its last layer in two ways.
        key.removeprefix(_DEBERTA_HEAD).replace("classifer", "classifier"): value
        for key, value in _weights(name).items()
        if key.startswith(_DEBERTA_HEAD)
    }
    return "deberta_v3", {"discriminator_head": state} if state else {}


def _published_generator(name: str, path: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return a published generator and its table of positions; its configuration is the discriminator's, but for its depth."""
    state = {re.sub(r"^bert\.", "deberta.", key): value for key, value in _load(path).items()}
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"deberta\.encoder\.layer\.(\d+)\.", key)))
    # Not legacy: the head has the names and the form of the official code.
    config = from_pretrained(AutoConfig, name, num_hidden_layers=depth, legacy=False)
    generator = from_config(AutoModelForMaskedLM, config, **options)
    missing = generator.load_state_dict(state, strict=False).missing_keys
    if missing or _DEBERTA_POSITIONS not in state:
        raise InputError(
            f"{Path(path).name!r} lacks {(missing or [_DEBERTA_POSITIONS])[0]}: it is no generator of a DeBERTa-v3"
        )
    return generator, state[_DEBERTA_POSITIONS]


def _add_difference(name: str, discriminator: PreTrainedModel, generator: PreTrainedModel) -> None:
    """Rebuild the discriminator's table where only its difference to the generator's was saved; it would be random."""
    state = _weights(name)
    if f"{_DEBERTA_TABLE}.weight" not in state and f"{_DEBERTA_TABLE}._weight" in state:
        table = generator.get_input_embeddings().weight + state[f"{_DEBERTA_TABLE}._weight"]
        discriminator.get_input_embeddings().weight.data.copy_(table)


@dataclass
class ReplacedTokenDetectionModelArguments(GeneratorArguments):
    """The discriminator and its generator, a stock masked language model; see [`GeneratorArguments`]."""

    needs: ClassVar[dict[str, str]] = {
        "generator_name_or_path": "model_name_or_path",
        "generator_type": "!generator_name_or_path",
    }
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "embedding_sharing": EMBEDDING_SHARING,
        "discriminator_head": DISCRIMINATOR_HEADS,
    }

    generator_type: str | None = option(
        None, "Architecture of the generator, if it is another than the discriminator's."
    )
    embedding_sharing: str = option(
        "tied",
        "'tied': one set of embeddings for both models; 'gdes': the discriminator's are the generator's, held "
        "constant, plus a difference (DeBERTa-v3); 'full': one encoder for both; 'none': each has its own.",
    )
    discriminator_head: str | None = option(
        None,
        "'stock': the head of the architecture's own class in transformers; 'electra' or 'deberta_v3': that head "
        "on any architecture; by default the checkpoint's, from scratch 'stock'.",
    )
    enhanced_mask_decoder: bool | None = option(
        None,
        "Let a DeBERTa generator decode with absolute positions, as DeBERTa-v3 does; by default if the "
        "checkpoint's does.",
    )
    disallow_correct: bool = option(False, "Never draw the true token, so that every selected one is replaced.")


def build_model(
    args: ReplacedTokenDetectionModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float = 1.0,
    stock: PreTrainedModel | None = None,
) -> ReplacedTokenDetectionForPreTraining:
    """Build or load generator and discriminator and join them.

    Args:
        args: What to build.
        tokenizer: Its vocabulary sizes the tables; its special tokens are never sampled.
        temperature: Temperature at which the generator is sampled.
        stock: The discriminator, with or without its head.

    Returns:
        The composite to train.
    """
    if stock is not None:
        check_without_vectors(args)
        head = args.discriminator_head or "stock"
        pair = Pair(_given_generator(args), stock_discriminator(stock, head), {"discriminator_head": head}, {})
    elif args.model_name_or_path is None:
        pair = _fresh_pair(args, tokenizer)
    else:
        name, generator_name = args.model_name_or_path, args.generator_name_or_path
        pair = load_pair(name, generator_name, head=args.discriminator_head, **attention_options(args))
    is_fresh, has_generator = (stock or args.model_name_or_path) is None, pair.generator is not None
    if pair.generator is None:
        pair = pair._replace(generator=_generator_for(pair.discriminator, args))
    assert pair.generator is not None
    options = pair.options | {
        name: getattr(args, name)
        for name in ("embedding_sharing", "enhanced_mask_decoder", "disallow_correct")
        if getattr(args, name) is not None
    }
    options["temperature"] = temperature
    options["generator_embedding_size"] = _prepare_tables(pair, args, is_fresh=is_fresh, is_new=not has_generator)
    if is_fresh:
        for part in (pair.generator, pair.discriminator):
            fill_word_table(part, args, tokenizer)
    options |= dtype_option(args)
    vocab_size = pair.generator.config.vocab_size
    never_sampled = {*tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)}
    options["excluded_token_ids"] = sorted(token for token in never_sampled if token < vocab_size)
    model = ReplacedTokenDetectionForPreTraining.from_models(pair.generator, pair.discriminator, **options)
    for name, state in pair.parts.items():
        if getattr(model, name) is not None:
            getattr(model, name).load_state_dict(state)
    return model


def _given_generator(args: ReplacedTokenDetectionModelArguments) -> PreTrainedModel | None:
    """Return the generator that the options name for a given discriminator, None for a fresh one."""
    name = args.generator_name_or_path
    return None if name is None else from_pretrained(AutoModelForMaskedLM, name, **attention_options(args))


def _fresh_pair(args: ReplacedTokenDetectionModelArguments, tokenizer: PreTrainedTokenizerBase) -> Pair:
    head = args.discriminator_head or "stock"
    config = build_config(args, tokenizer, **stock_width(args, args.model_type))
    if args.generator_type in (None, args.model_type):
        own = config
    else:
        other = dataclasses.replace(args, model_type=args.generator_type, config_overrides=None)
        own = build_config(other, tokenizer, **stock_width(args, other.model_type))
    generator = from_config(AutoModelForMaskedLM, generator_config(own, args), **attention_options(args))
    discriminator = build_discriminator(config, head, **attention_options(args))
    return Pair(generator, discriminator, {"discriminator_head": head}, {})


def _generator_for(discriminator: PreTrainedModel, args: ReplacedTokenDetectionModelArguments) -> PreTrainedModel:
    """Return a generator for a checkpoint that has none: smaller and new, or, to share all, its own weights."""
    name = args.model_name_or_path or type(discriminator).__name__
    if args.generator_type not in (None, discriminator.config.model_type):
        raise InputError(
            f"generator_type={args.generator_type!r}: {name!r} has no generator, and the new one is of its own architecture; "
            "leave it out, or name a generator with --generator_name_or_path"
        )
    if args.embedding_sharing == "full" and args.model_name_or_path is None:
        return with_head(discriminator.base_model, AutoModelForMaskedLM)
    if args.embedding_sharing == "full":
        return from_pretrained(AutoModelForMaskedLM, name, **attention_options(args))
    config = generator_config(discriminator.config, args)
    say_once(
        f"{name!r} has no generator: a fresh one of generator_size={args.generator_size} is trained beside it; "
        "--generator_name_or_path names another"
    )
    return from_config(AutoModelForMaskedLM, config, **attention_options(args))


def _prepare_tables(
    pair: Pair, args: ReplacedTokenDetectionModelArguments, *, is_fresh: bool, is_new: bool
) -> int | None:
    """Make the two models' tables ready to be shared.

    Args:
        pair: The models.
        args: How they share.
        is_fresh: Whether both have new weights.
        is_new: Whether the generator alone has: it then takes the discriminator's tables.

    Returns:
        The width of the generator's word table, where it had to be changed to the discriminator's.
    """
    generator, discriminator, sharing = pair.generator, pair.discriminator, args.embedding_sharing
    assert generator is not None, "one was opened or built"
    if sharing in ("none", "full"):
        return None
    ours, theirs = discriminator.get_input_embeddings(), generator.get_input_embeddings()
    width = ours.weight.shape[1]
    is_wider = width != theirs.weight.shape[1]
    if is_wider:
        factorize_embeddings(generator, width, table=None if is_fresh or is_new else ours.weight)
    if sharing == "gdes" and is_fresh:
        for own, other in shared_table_names(discriminator, generator).items():
            # Then the difference is zero at the start.
            discriminator.get_submodule(own).load_state_dict({"weight": generator.get_submodule(other).weight})
    if is_new:
        _take_tables(generator, discriminator, sharing)
    elif sharing == "tied" and not is_fresh and not ours.weight.is_meta:
        for own, other in shared_embedding_names(discriminator, generator).items():
            if not torch.allclose(discriminator.get_parameter(own), generator.get_parameter(other), atol=1e-4):
                raise InputError(
                    f"embedding_sharing='tied': the discriminator's {own} is not the generator's {other}, so they were not "
                    "trained as one: 'gdes' keeps both, 'none' keeps them apart"
                )
    return width if is_wider else None


def _take_tables(generator: PreTrainedModel, discriminator: PreTrainedModel, sharing: str) -> None:
    """Let a new generator start from the discriminator's tables, of which the trained one is to lose nothing."""
    if sharing == "tied":
        names = shared_embedding_names(discriminator, generator)
    elif is_factorized(generator):
        names = {f"{word_table_name(discriminator)}.weight": f"{word_table_name(generator)}.weight"}
    else:
        tables = shared_table_names(discriminator, generator)
        names = {f"{own}.weight": f"{other}.weight" for own, other in tables.items()}
    copy_parameters(discriminator, generator, {other: own for own, other in names.items()})
