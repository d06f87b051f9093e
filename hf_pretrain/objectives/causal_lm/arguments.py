"""The options of left-to-right language modelling: how text is cut, which model is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_utils import SchedulerType

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.modeling.backbone import head_sizes
from hf_pretrain.modeling.configuration import ModelArguments, parse_overrides, special_ids
from hf_pretrain.options import option
from hf_pretrain.training.arguments import PretrainingArguments


@dataclass
class CausalLMDataArguments(DataArguments):
    """Which text is trained on and how it is cut; by default as GPT-2 does, joined and cut anywhere."""

    tokenizer_type: Literal["auto", "wordpiece", "bpe", "unigram"] = option(
        "bpe",
        "Kind of tokenizer to train: as BERT's, RoBERTa's and GPT-2's (on bytes), or SentencePiece's; 'auto' takes the one "
        "that suits the text.",
    )
    lowercase: bool | None = option(
        False, "Lower the case, in a tokenizer to train: a model that writes text keeps it."
    )
    block_mode: Literal["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"] = option(
        "tokens",
        "Fill examples with tokens of all documents, cut anywhere; with whole words, also across documents; with whole "
        "sentences, also across documents or not; or put several documents into one that do not see each other.",
    )


@dataclass
class CausalLMModelArguments(ModelArguments):
    """Which stock causal language model is trained: a checkpoint to continue, or sizes to build one from."""

    model_type: str = option(
        "gpt2", "Architecture built from scratch: gpt2, openai-gpt, llama, gpt_neox, opt, modernbert-decoder, ..."
    )
    hidden_size: int = option(256, "Width of the layers.")

    def config_changes(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return configuration values of a model from scratch that its sizes and the tokenizer do not name.

        Args:
            tokenizer: Gives the tokens that a text begins and ends with. One without `bos_token` or `eos_token` has `cls_token`
                and `sep_token` in their place.
        """
        overrides = parse_overrides(self.config_overrides)
        changes: dict[str, Any] = {f"{role}_token_id": number for role, number in special_ids(tokenizer).items()}
        if self.model_type in CONFIG_MAPPING:
            known = CONFIG_MAPPING[self.model_type]()
            # Architectures have defaults of their own for these, which fit their published sizes alone.
            if self.hidden_size % self.num_attention_heads == 0:
                changes |= head_sizes(known, vars(self))
            if hasattr(known, "is_decoder"):
                changes["is_decoder"] = True
        return {name: value for name, value in changes.items() if name not in overrides}


@dataclass
class CausalLMTrainingArguments(PretrainingArguments):
    """Options of [`CausalLMTrainer`]; the defaults are GPT-1's, but for the share of warm-up."""

    predict_end: bool | None = option(
        None,
        "Predict the special tokens that the tokenizer puts behind a text at the end of an example, unless its document goes on "
        "in another one; by default not where several documents share an example.",
    )
    learning_rate: float = option(2.5e-4, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Schedule of the learning rate; the cosine ends at 0.")
    warmup_steps: float = option(
        0.02, "Steps of warm-up, or their share of all steps if below 1; GPT-1 takes 2000 steps."
    )
    max_grad_norm: float = option(1.0, "Norm that the gradient is clipped to.")
