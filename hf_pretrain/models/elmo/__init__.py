"""ELMo: words from their characters, two language models in opposite directions, and the weighted mean of layers."""

from typing import Any

import hf_pretrain

__all__ = [
    "ElmoConfig",
    "ElmoForPreTraining",
    "ElmoForSequenceClassification",
    "ElmoForTokenClassification",
    "ElmoModel",
    "ElmoTokenizer",
    "ScalarMix",
    "load_elmo_weights",
]


def __getattr__(name: str) -> Any:
    # On demand: the configuration is registered while transformers has no models yet.
    if name in __all__:
        return getattr(hf_pretrain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
