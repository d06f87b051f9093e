"""Build the pair of models that a program trains."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    from_pretrained,
    scaled_config,
)
from hf_pretrain.objectives.replaced_token_detection.modeling import (
    EMBEDDING_SHARING,
    ReplacedTokenDetectionForPreTraining,
    build_discriminator,
)


@dataclass
class ReplacedTokenDetectionModelArguments(ModelArguments):
    """The discriminator, given as in [`ModelArguments`], and its generator. The defaults are ELECTRA-Small's."""

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
            "help": "Checkpoint of the generator; by default what an export of this library has in pretraining/generator."
        },
    )
    generator_size: float = field(
        default=0.25,
        metadata={"help": "Width of the generator as a share of the discriminator's (heads and layers' width too)."},
    )
    generator_layers: float = field(
        default=1.0, metadata={"help": "Layers of the generator as a share of the discriminator's."}
    )
    embedding_sharing: str = field(
        default="tied", metadata={"help": "'tied': one set of embeddings for both models; 'none': each has its own."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature at which the generator is sampled."})

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.embedding_sharing not in EMBEDDING_SHARING:
            raise InputError(
                f"embedding_sharing={self.embedding_sharing!r} must be one of {', '.join(EMBEDDING_SHARING)}"
            )
        for name in ("generator_size", "generator_layers", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")


def build_model(
    args: ReplacedTokenDetectionModelArguments, tokenizer: PreTrainedTokenizerBase
) -> ReplacedTokenDetectionForPreTraining:
    """Build or load generator and discriminator and join them.

    Args:
        args: What to build.
        tokenizer: Its vocabulary sizes the tables; its special tokens are never sampled.

    Returns:
        The composite to train.
    """
    if args.model_name_or_path is None:
        generator, discriminator = _fresh_pair(args, tokenizer)
    else:
        generator, discriminator = _loaded_pair(args.model_name_or_path, args)
    vocab_size = generator.config.vocab_size
    never_sampled = {*tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)}
    return ReplacedTokenDetectionForPreTraining.from_models(
        generator,
        discriminator,
        embedding_sharing=args.embedding_sharing,
        temperature=args.temperature,
        excluded_token_ids=sorted(token for token in never_sampled if token < vocab_size),
    )


def _fresh_pair(
    args: ReplacedTokenDetectionModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedModel]:
    width = {"embedding_size": 128} if args.model_type == "electra" and args.embedding_size is None else {}
    config = build_config(args, tokenizer, **width)
    generator = AutoModelForMaskedLM.from_config(generator_config(config, args), **attention_options(args))
    return generator, build_discriminator(config, **attention_options(args))


def generator_config(config: PreTrainedConfig, args: ReplacedTokenDetectionModelArguments) -> PreTrainedConfig:
    """Return the discriminator's configuration, scaled to the generator: width, heads and feed-forward alike, and depth."""
    scaled = scaled_config(config, width=args.generator_size, depth=args.generator_layers)
    if scaled.hidden_size % scaled.num_attention_heads:
        raise InputError(
            f"generator_size={args.generator_size} makes {scaled.hidden_size} wide states with "
            f"{scaled.num_attention_heads} heads, which do not divide: choose a share that gives whole heads"
        )
    return scaled


def _loaded_pair(
    name_or_path: str, args: ReplacedTokenDetectionModelArguments
) -> tuple[PreTrainedModel, PreTrainedModel]:
    options: dict[str, Any] = attention_options(args)
    is_electra = from_pretrained(AutoConfig, name_or_path).model_type == "electra"
    if is_electra:
        discriminator = from_pretrained(ElectraForPreTraining, name_or_path, **options)
    else:
        discriminator = from_pretrained(AutoModelForTokenClassification, name_or_path, num_labels=1, **options)
    if args.generator_name_or_path is None:
        options["subfolder"] = "pretraining/generator"
    return from_pretrained(AutoModelForMaskedLM, args.generator_name_or_path or name_or_path, **options), discriminator
