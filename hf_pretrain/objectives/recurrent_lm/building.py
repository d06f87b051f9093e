"""Build or load the Transformer-XL that a program trains."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_numbers
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import (
    check_overrides,
    from_config,
    from_pretrained,
    parse_overrides,
)
from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM
from hf_pretrain.objectives.recurrent_lm.modeling import RecurrentLMForPreTraining


@dataclass
class TransformerXLModelArguments:
    """Which Transformer-XL is trained: a checkpoint to continue, or sizes, by default those of the base model."""

    ranges: ClassVar[dict[str, str]] = {"cutoffs": "[1, 2147483647]", "div_val": "[1, 65536]"}
    needs: ClassVar[dict[str, str]] = {"div_val": "cutoffs"}

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to continue from; without it the model is built from the sizes below."},
    )
    hidden_size: int = field(default=410, metadata={"help": "Width of the layers."})
    num_hidden_layers: int = field(default=16, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=10, metadata={"help": "Attention heads a layer."})
    intermediate_size: int = field(default=2100, metadata={"help": "Width of the feed-forward layers."})
    hidden_dropout_prob: float = field(default=0.1, metadata={"help": "Dropout of embeddings, sub-layers and output."})
    attention_probs_dropout_prob: float = field(default=0.0, metadata={"help": "Dropout of attention probabilities."})
    cutoffs: list[int] | None = field(
        default=None,
        metadata={
            "help": "Ids at which the clusters of an adaptive softmax begin, for a large vocabulary that is sorted by "
            "frequency (20000 40000 200000 for WikiText-103's words); by default a plain softmax."
        },
    )
    div_val: int = field(default=1, metadata={"help": "How much narrower the embeddings of each cluster are."})
    embedding_size: int | None = field(
        default=None, metadata={"help": "Width of the first cluster's embeddings; by default hidden_size."}
    )
    untie_r: bool = field(default=False, metadata={"help": "Give every layer position biases of its own."})
    pre_layer_norm: bool = field(
        default=False, metadata={"help": "Normalize the input of sub-layers, not the output."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'JSON object of further configuration values, e.g. {"tie_word_embeddings": false}.'},
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and overrides that are no JSON object."""
        check_numbers(self)
        check_overrides(self.config_overrides)


def build_model(
    args: TransformerXLModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mem_len: int,
    clamp_len: int = -1,
    same_length: bool = False,
) -> RecurrentLMForPreTraining:
    """Build or load a Transformer-XL.

    Args:
        args: What to build.
        tokenizer: Gives the vocabulary and the special ids.
        mem_len: Slots of the memory in training.
        clamp_len: Distance from which on positions are all alike; -1 for none.
        same_length: Whether every position sees equally many before it.

    Returns:
        The composite to train.

    Raises:
        InputError: If the sizes do not fit together, or the checkpoint does not fit the tokenizer or is none.
    """
    lengths: dict[str, Any] = {"mem_len": mem_len, "clamp_len": clamp_len, "same_length": same_length}
    if args.model_name_or_path is not None:
        model_type = from_pretrained(AutoConfig, args.model_name_or_path).model_type
        if model_type != TransformerXLConfig.model_type:
            raise InputError(f"model_name_or_path={args.model_name_or_path!r} is a {model_type}, not a transformer_xl")
        model = from_pretrained(TransformerXLForCausalLM, args.model_name_or_path, **lengths)
        check_model_fits(model, tokenizer, block_size=1)
    else:
        model = from_config(TransformerXLForCausalLM, _config(args, tokenizer, lengths))
    return RecurrentLMForPreTraining.from_model(model)


def _config(
    args: TransformerXLModelArguments, tokenizer: PreTrainedTokenizerBase, lengths: dict[str, int]
) -> TransformerXLConfig:
    own = {"model_name_or_path", "config_overrides"}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in own} | lengths
    values |= {"vocab_size": len(tokenizer)}
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    overrides = parse_overrides(args.config_overrides)
    known = TransformerXLConfig()
    unknown = sorted(name for name in overrides if not hasattr(known, name))
    if unknown:
        raise InputError(f"config_overrides: transformer_xl has no option {', '.join(unknown)}")
    try:
        return TransformerXLConfig(**(values | overrides))
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"the model cannot be built: {reason}") from error
