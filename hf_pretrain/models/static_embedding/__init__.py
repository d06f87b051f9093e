"""Static vectors: one vector a word, and the mean of its words' vectors for a text."""

from typing import Any

import hf_pretrain

__all__ = [name for name in hf_pretrain.__all__ if name.startswith("StaticEmbedding")]


def __getattr__(name: str) -> Any:
    # On demand: the configuration is registered while transformers has no models yet.
    if name in __all__:
        return getattr(hf_pretrain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
