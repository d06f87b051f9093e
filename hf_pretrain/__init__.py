"""Pre-training objectives for transformers: every objective, any backbone, one Trainer.

The names below are imported at their first use, so that ``import hf_pretrain`` costs nothing. Architectures
that have no stock class in transformers are registered with its Auto classes: now if those are imported, or once they are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_pretrain.objectives import METHODS
from hf_pretrain.registration import register_architectures

_EXPORTS = {
    "BlockDataset": "hf_pretrain.data.examples.packing",
    "DataCollatorForEncoder": "hf_pretrain.objectives.encoder",
    "DataCollatorForMaskedLM": "hf_pretrain.objectives.masking",
    "DistillationModel": "hf_pretrain.objectives.distillation",
    "DistillationTrainingArguments": "hf_pretrain.objectives.distillation",
    "EncoderForPreTraining": "hf_pretrain.objectives.encoder.modeling",
    "EncoderTrainingArguments": "hf_pretrain.objectives.encoder",
    "EpochDataset": "hf_pretrain.data.examples.epochs",
    "FineTuningArguments": "hf_pretrain.transfer.fine_tuning",
    "FineTuningTrainer": "hf_pretrain.transfer.fine_tuning",
    "InputError": "hf_pretrain.errors",
    "MaskedLMTrainingArguments": "hf_pretrain.objectives.masking",
    "MaskingArguments": "hf_pretrain.corruption.arguments",
    "MixtureDataset": "hf_pretrain.data.examples.epochs",
    "PretrainingArguments": "hf_pretrain.training.arguments",
    "PretrainingTrainer": "hf_pretrain.training.trainer",
    "ReplacedTokenDetectionForPreTraining": "hf_pretrain.objectives.replaced_token_detection",
    "ReplacedTokenDetectionTrainingArguments": "hf_pretrain.objectives.replaced_token_detection",
    "ReplacedTokenScorer": "hf_pretrain.evaluation.detector",
    "SentencePairDataset": "hf_pretrain.data.examples.sentence_pairs",
    "StreamingBlocks": "hf_pretrain.data.streaming.blocks",
    "StudentArguments": "hf_pretrain.objectives.distillation",
    "TaskDistillationTrainingArguments": "hf_pretrain.objectives.distillation",
    "TransformerXLConfig": "hf_pretrain.models.transformer_xl.configuration_transformer_xl",
    "TransformerXLForCausalLM": "hf_pretrain.models.transformer_xl.modeling_transformer_xl",
    "TransformerXLForSequenceClassification": "hf_pretrain.models.transformer_xl.modeling_transformer_xl",
    "TransformerXLModel": "hf_pretrain.models.transformer_xl.modeling_transformer_xl",
    "tokenize_documents": "hf_pretrain.data.documents.documents",
    "train_tokenizer": "hf_pretrain.data.documents.tokenizers",
    # The Trainer of every method.
    **{listed.trainer: listed.place.partition(":")[0] for listed in METHODS.values()},
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-pretrain")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_pretrain' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, "__version__"])


register_architectures()
