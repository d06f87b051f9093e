"""Architectures of tasks on top of a stock encoder: a recurrent, convolutional, pooling or comparing head reads its states.

`architectures_task_heads.py` has the heads and the register of them, `modeling_task_heads.py` the two models that put one on an
encoder. `scalar_mix.py` stands for ELMo's mean of layers, whose file is exported with the code.
"""

from typing import Any

import hf_pretrain

__all__ = ["Architecture", "EncoderForSequenceClassification", "EncoderForTokenClassification", "TaskHeadConfig"]


def __getattr__(name: str) -> Any:
    # On demand: the configuration is registered while transformers has no models yet.
    if name in __all__:
        return getattr(hf_pretrain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
