"""Transformer-XL: segment recurrence, relative positions, adaptive softmax."""

from typing import Any

__all__ = [
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLModel",
]


def __getattr__(name: str) -> Any:
    # On demand: the configuration is registered while transformers has no models yet.
    if name in __all__:
        import hf_pretrain

        return getattr(hf_pretrain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
