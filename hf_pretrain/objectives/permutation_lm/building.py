"""Build or load the stock model of permutation language modelling."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    from_config,
    from_pretrained,
)


@dataclass
class PermutationLMModelArguments(ModelArguments):
    """Which stock model is trained by permutation language modelling; an XLNet unless told otherwise."""

    model_type: str = field(
        default="xlnet",
        metadata={
            "help": "Architecture built from scratch: xlnet, or one that takes position_ids (bert, roberta, modernbert, ...)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend: sdpa or, for xlnet on GPUs, flex_attention."}
    )


def stock_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that opens an architecture with its head: XLNet's is listed as a causal one."""
    return AutoModelForCausalLM if config.model_type == "xlnet" else AutoModelForMaskedLM


def build_stock_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the checkpoint that the arguments name, or build the model that they describe.

    Raises:
        InputError: If there is no such checkpoint, or the sizes do not fit the architecture.
    """
    if args.model_name_or_path is not None:
        config = from_pretrained(AutoConfig, args.model_name_or_path)
    else:
        auto_class = AutoModelForCausalLM if args.model_type == "xlnet" else AutoModelForMaskedLM
        config = build_config(args, tokenizer, auto_class=auto_class)
    # XLNet's attention is replaced, so that its own class need not know the backend.
    options = {} if config.model_type == "xlnet" else attention_options(args)
    if args.model_name_or_path is not None:
        return from_pretrained(stock_class(config), args.model_name_or_path, **options)
    return from_config(stock_class(config), config, **options)
