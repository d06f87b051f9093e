"""Architectures without a stock class in transformers, each with code that is exported with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

# Folder here -> name of its configuration, which names its classes in `auto_map`.
_CONFIGURATIONS = {
    "elmo": "ElmoConfig",
    "sparse_text": "SparseTextConfig",
    "static_embedding": "StaticEmbeddingConfig",
    "task_heads": "TaskHeadConfig",
    "transformer_xl": "TransformerXLConfig",
}
# Folder here -> name of its tokenizer, where it has one of its own.
_TOKENIZERS = {"elmo": "ElmoTokenizer"}


def _configurations() -> Iterator[tuple[str, Any]]:
    for folder, name in _CONFIGURATIONS.items():
        package = f"hf_pretrain.models.{folder}"
        yield package, getattr(import_module(f"{package}.configuration_{folder}"), name)


def register_configurations() -> None:
    """Make `AutoConfig` know the architectures."""
    from transformers import AutoConfig

    for _, config_class in _configurations():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Make `AutoModel` and its kin know the architectures' classes."""
    import transformers

    for package, config_class in _configurations():
        for auto_class, reference in config_class().auto_map.items():
            module, name = reference.split(".")
            if auto_class != "AutoConfig":
                model_class = getattr(import_module(f"{package}.{module}"), name)
                getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)


def register_tokenizers() -> None:
    """Make `AutoTokenizer` know the tokenizers of the architectures that have one of their own."""
    from transformers import AutoTokenizer

    for package, config_class in _configurations():
        folder = package.rpartition(".")[2]
        if folder in _TOKENIZERS:
            tokenizer_class = getattr(import_module(f"{package}.tokenization_{folder}"), _TOKENIZERS[folder])
            AutoTokenizer.register(config_class, fast_tokenizer_class=tokenizer_class, exist_ok=True)


def register_models_and_tokenizers() -> None:
    """Make the Auto classes of models and tokenizers know the architectures."""
    register_models()
    register_tokenizers()
