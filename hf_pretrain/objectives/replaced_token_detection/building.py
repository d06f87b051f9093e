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
)
from hf_pretrain.objectives.replaced_token_detection.modeling import (
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
        if self.embedding_sharing not in ("tied", "none"):
            raise InputError(f"embedding_sharing={self.embedding_sharing!r} must be 'tied' or 'none'")
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
        generator, discriminator = _loaded_pair(args.model_name_or_path, args.generator_name_or_path)
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
    values: dict[str, Any] = config.to_dict()
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        values[name] = max(1, round(values[name] * args.generator_size))
    values["num_hidden_layers"] = max(1, round(values["num_hidden_layers"] * args.generator_layers))
    if values["hidden_size"] % values["num_attention_heads"]:
        raise InputError(
            f"generator_size={args.generator_size} makes {values['hidden_size']} wide states with "
            f"{values['num_attention_heads']} heads, which do not divide: choose a share that gives whole heads"
        )
    return AutoConfig.for_model(**values)


def _loaded_pair(discriminator_name: str, generator_name: str | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    config = from_pretrained(AutoConfig, discriminator_name)
    is_electra = config.model_type == "electra"
    head = ElectraForPreTraining if is_electra else AutoModelForTokenClassification
    discriminator = from_pretrained(head, discriminator_name, **({} if is_electra else {"num_labels": 1}))
    if generator_name is None:
        generator = from_pretrained(AutoModelForMaskedLM, discriminator_name, subfolder="pretraining/generator")
    else:
        generator = from_pretrained(AutoModelForMaskedLM, generator_name)
    return generator, discriminator
