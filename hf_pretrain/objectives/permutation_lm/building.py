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
    XLNetConfig,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    from_pretrained,
    parse_overrides,
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
        config = xlnet_config(args, tokenizer) if args.model_type == "xlnet" else build_config(args, tokenizer)
    # XLNet's attention is replaced, so that its own class need not know the backend.
    options = {} if config.model_type == "xlnet" else attention_options(args)
    if args.model_name_or_path is not None:
        return from_pretrained(stock_class(config), args.model_name_or_path, **options)
    return stock_class(config).from_config(config, **options)


def xlnet_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> XLNetConfig:
    """Build the configuration of an XLNet from scratch, which has no table of positions.

    Raises:
        InputError: If `config_overrides` or `embedding_size` name what an XLNet does not have.
    """
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": args.hidden_size,
        "n_layer": args.num_hidden_layers,
        "n_head": args.num_attention_heads,
        "d_inner": args.intermediate_size,
    }
    values |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")
    }
    overrides, known = parse_overrides(args.config_overrides), XLNetConfig().to_dict()
    unknown = sorted(overrides.keys() - known.keys())
    if unknown:
        raise InputError(f"config_overrides: xlnet has no option {', '.join(unknown)}; its dropout is 'dropout'")
    if args.embedding_size is not None:
        raise InputError(f"embedding_size={args.embedding_size}: xlnet embeds at its full width; leave it out")
    return XLNetConfig(**values | overrides)
