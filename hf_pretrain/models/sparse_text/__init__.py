"""Sparse vectors of texts: a number for each word, by counts or TF-IDF."""

from typing import Any

import hf_pretrain

__all__ = ["SparseTextConfig", "SparseTextModel"]


def __getattr__(name: str) -> Any:
    # On demand: the configuration is registered while transformers has no models yet.
    if name in __all__:
        return getattr(hf_pretrain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
