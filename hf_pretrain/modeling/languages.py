"""How a stock model is told the language of each token: by language embeddings, or by token types in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.errors import InputError

LanguageInput = Literal["langs", "token_type_ids"]


def language_changes(model_type: str, lang2id: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration values by which a model from scratch has room for languages.

    Args:
        model_type: The architecture.
        lang2id: Numbers of the languages, from 0.

    Returns:
        `n_langs` for XLM and its kin, else `type_vocab_size`; {} for an architecture with neither.
    """
    known, num_languages = CONFIG_MAPPING[model_type](), max(lang2id.values()) + 1
    if hasattr(known, "n_langs"):
        return {"n_langs": num_languages}
    if hasattr(known, "type_vocab_size"):
        return {"type_vocab_size": max(num_languages, known.type_vocab_size)}
    return {}


def known_languages(config: PreTrainedConfig) -> dict[str, int] | None:
    """Return the numbers of the languages that a model was trained with, None if it does not say."""
    lang2id = getattr(config, "lang2id", None)
    return None if lang2id is None else dict(lang2id)


def set_languages(config: PreTrainedConfig, lang2id: Mapping[str, int]) -> LanguageInput | None:
    """Write the numbers of the languages into a configuration, where the model has room for them.

    `lang2id` and `id2lang` are those of XLM's published checkpoints; other architectures hand them through. A model
    without room keeps its configuration, and is not told the languages.

    Args:
        config: Stock configuration, of a new model or of a checkpoint.
        lang2id: Numbers of the languages.

    Returns:
        The input that tells the languages, see [`language_input`].

    Raises:
        InputError: If the model was trained with these languages under other numbers, or without some of them.
    """
    known = known_languages(config)
    if known is not None:
        wrong = [name for name, number in lang2id.items() if known.get(name) != number]
        if wrong:
            raise InputError(
                f"the model numbers its languages {known}, and the data has {wrong[0]!r} as {lang2id[wrong[0]]}: prepare "
                "the data with the numbers of the model"
            )
        return language_input(config)
    name: LanguageInput = "langs" if hasattr(config, "n_langs") else "token_type_ids"
    if max(lang2id.values()) >= _room(config):
        return None
    config.lang2id = dict(lang2id)
    config.id2lang = {str(number): name for name, number in lang2id.items()}
    return name


def language_input(config: PreTrainedConfig) -> LanguageInput | None:
    """Return the input that tells a model the language of each token.

    Returns:
        "langs" for XLM and its kin; "token_type_ids" for models with enough token types, which then stand for languages;
        None for a model without room, or to which no languages were given by [`set_languages`].
    """
    lang2id = known_languages(config)
    if lang2id is None or max(lang2id.values()) >= _room(config):
        return None
    return "langs" if hasattr(config, "n_langs") else "token_type_ids"


def _room(config: PreTrainedConfig) -> int:
    """Return how many languages the tables of a model can tell apart."""
    if hasattr(config, "n_langs"):
        return int(config.n_langs) if config.n_langs > 1 and config.use_lang_emb else 0
    return int(getattr(config, "type_vocab_size", None) or 0)


def language_inputs(config: PreTrainedConfig, *, langs: torch.Tensor | None = None, **inputs: Any) -> dict[str, Any]:
    """Turn the languages of a batch into what a stock model takes.

    Args:
        config: Configuration of the stock model, after [`set_languages`].
        langs: ``[B, L]`` number of the language of each token, any at padding; None if the batch does not tell.
        **inputs: Further inputs, handed through.

    Returns:
        The inputs, with the languages under the name that the model has for them. Where that is `token_type_ids`, they
        take the place of segments; a model without room is told nothing.
    """
    name = None if langs is None else language_input(config)
    return inputs if name is None else inputs | {name: langs}
