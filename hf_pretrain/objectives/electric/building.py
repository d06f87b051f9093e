"""Build the pair of models that a program trains."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from hf_pretrain.corruption.vocabulary import Vocabulary
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    dtype_option,
    from_pretrained,
    scaled_config,
)
from hf_pretrain.modeling.loading import say_once
from hf_pretrain.modeling.sharing import shared_embedding_names
from hf_pretrain.objectives.electric.modeling import EMBEDDING_SHARING, ElectricForPreTraining
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig, TwoTowerClozeModel, build_two_tower
from hf_pretrain.objectives.replaced_token_detection.modeling import build_discriminator

_GENERATOR = "pretraining/generator"


@dataclass
class ElectricModelArguments(ModelArguments):
    """The discriminator, given as in [`ModelArguments`], and its generator. The defaults are ELECTRA-Small's."""

    ranges: ClassVar[dict[str, str]] = {"generator_size": "(0, 16]", "generator_layers": "(0, 16]"}
    needs: ClassVar[dict[str, str]] = dict.fromkeys(("generator_size", "generator_layers"), "!generator_name_or_path")

    model_type: str = field(
        default="electra", metadata={"help": "Architecture of both models when built from scratch."}
    )
    embedding_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the embedding tables, where the architecture has one of its own (128 for electra)."
        },
    )
    generator_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of a two-tower generator; by default what model_name_or_path has in "
            "pretraining/generator, and if it has none, fresh weights."
        },
    )
    generator_size: float = field(
        default=0.25,
        metadata={"help": "Width of each tower as a share of the discriminator's (heads and layers too)."},
    )
    generator_layers: float = field(
        default=1.0, metadata={"help": "Layers of each tower as a share of the discriminator's."}
    )
    embedding_sharing: str = field(
        default="tied",
        metadata={"help": "'tied': one set of embeddings for all; 'none': the discriminator has its own."},
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.embedding_sharing not in EMBEDDING_SHARING:
            raise InputError(
                f"embedding_sharing={self.embedding_sharing!r} must be one of {', '.join(EMBEDDING_SHARING)}"
            )
        super().__post_init__()


def build_model(args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase) -> ElectricForPreTraining:
    """Build or load generator and discriminator and join them.

    Args:
        args: What to build.
        tokenizer: Its vocabulary sizes the tables; its special tokens have no probability.

    Returns:
        The composite to train.
    """
    discriminator = _build_discriminator(args, tokenizer)
    generator = _load_generator(args)
    if generator is None:
        generator = build_two_tower(
            tower_config(discriminator.config, args),
            excluded_token_ids=excluded_token_ids(tokenizer, vocab_size=discriminator.config.vocab_size),
            **attention_options(args),
        )
        if args.model_name_or_path is not None and args.embedding_sharing == "tied":
            # Of two tied models the generator keeps its parameters, and the discriminator is the one that has learned.
            _copy_embeddings(discriminator, generator.left_tower)
    options = dtype_option(args)
    return ElectricForPreTraining.from_models(
        generator, discriminator, embedding_sharing=args.embedding_sharing, **options
    )


def excluded_token_ids(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Return the ids that noise never takes: special tokens, the unknown one, and those that the tokenizer does not have."""
    ordinary = set(Vocabulary.from_tokenizer(tokenizer).ordinary_ids.tolist())
    return [token for token in range(vocab_size) if token not in ordinary]


def tower_config(config: PreTrainedConfig, args: ElectricModelArguments) -> PreTrainedConfig:
    """Return the discriminator's configuration, scaled to a tower: width, heads and feed-forward alike, and depth."""
    scaled = scaled_config(config, width=args.generator_size, depth=args.generator_layers)
    if scaled.hidden_size % scaled.num_attention_heads:
        raise InputError(
            f"generator_size={args.generator_size} makes {scaled.hidden_size} wide states with "
            f"{scaled.num_attention_heads} heads, which do not divide: choose a share that gives whole heads"
        )
    return scaled


def _build_discriminator(args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    options, name = attention_options(args), args.model_name_or_path
    if name is None:
        width = {"embedding_size": 128} if args.model_type == "electra" and args.embedding_size is None else {}
        return build_discriminator(
            build_config(args, tokenizer, auto_class=AutoModelForTokenClassification, **width), **options
        )
    if from_pretrained(AutoConfig, name).model_type == "electra":
        return from_pretrained(ElectraForPreTraining, name, **options)
    return from_pretrained(AutoModelForTokenClassification, name, num_labels=1, **options)


def _load_generator(args: ElectricModelArguments) -> TwoTowerClozeModel | None:
    """Return the checkpoint's generator, or None where a fresh one is to be built."""
    options, name = attention_options(args), args.generator_name_or_path
    if name is not None:
        if not isinstance(from_pretrained(AutoConfig, name), TwoTowerClozeConfig):
            raise InputError(
                f"generator_name_or_path={name!r} is no two-tower generator: leave it out for a fresh one"
            )
        return from_pretrained(TwoTowerClozeModel, name, **options)
    name = args.model_name_or_path
    if name is None:
        return None
    options["subfolder"] = _GENERATOR
    has_generator = cached_file(name, f"{_GENERATOR}/config.json", _raise_exceptions_for_missing_entries=False)
    if has_generator and isinstance(from_pretrained(AutoConfig, name, subfolder=_GENERATOR), TwoTowerClozeConfig):
        return from_pretrained(TwoTowerClozeModel, name, **options)
    say_once(f"{name} has no two-tower generator in {_GENERATOR}: it starts from fresh weights")
    return None


@torch.no_grad()
def _copy_embeddings(source: PreTrainedModel, target: PreTrainedModel) -> None:
    for ours, theirs in shared_embedding_names(target, source).items():
        target.get_parameter(ours).copy_(source.get_parameter(theirs))
