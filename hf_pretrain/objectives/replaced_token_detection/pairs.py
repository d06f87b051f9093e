"""Open a generator and a discriminator to go on with: an export of this library, two checkpoints, or a published DeBERTa-v3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedModel,
)
from transformers.utils import cached_file

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import from_config, from_pretrained
from hf_pretrain.modeling.loading import first_line, read_safetensors
from hf_pretrain.objectives.replaced_token_detection.heads import DiscriminatorHeadConfig

_GENERATOR = "pretraining/generator"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DEBERTA_GENERATOR = "pytorch_model.generator.bin"
_DEBERTA_TABLE = "deberta.embeddings.word_embeddings"
_DEBERTA_POSITIONS = "deberta.embeddings.position_embeddings.weight"
_DEBERTA_HEAD = "mask_predictions."


class Pair(NamedTuple):
    """What was found.

    Attributes:
        generator: Stock masked language model; None where the checkpoint has none.
        discriminator: Stock model with one logit a token, or the encoder below another head.
        options: Options of the composite that the checkpoint tells: `discriminator_head`, `enhanced_mask_decoder`.
        parts: Names of further modules of the composite -> their state.
    """

    generator: PreTrainedModel | None
    discriminator: PreTrainedModel
    options: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]


def load_pair(name: str, generator_name: str | None, *, head: str | None = None, **options: Any) -> Pair:
    """Open a pair.

    Args:
        name: Folder or repository of the discriminator.
        generator_name: That of the generator; by default `pretraining/generator` in `name`, or the generator that lies beside a
            published DeBERTa-v3.
        head: Kind of the discriminator's head; by default the checkpoint's own.
        **options: Passed on to transformers.

    Raises:
        InputError: If a checkpoint can not be opened, or a published one lacks weights.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    published = _file(generator_name or name, _DEBERTA_GENERATOR)
    found, parts = _head(name, is_published=published is not None)
    head = found if head is None else head
    if head != found:
        parts.clear()
    discriminator = _discriminator(name, head, options)
    chosen: dict[str, Any] = {"discriminator_head": head}
    if published is not None:
        generator, positions = _published_generator(name, published, options)
        chosen["enhanced_mask_decoder"] = True
        parts["generator_decoder"] = {"position_embeddings.weight": positions}
        _add_difference(name, discriminator, generator)
        return Pair(generator, discriminator, chosen, parts)
    decoder = _file(name, "model.safetensors", subfolder="pretraining/generator_decoder")
    if decoder is not None:
        chosen["enhanced_mask_decoder"] = True
        parts["generator_decoder"] = read_safetensors(decoder)
    where: dict[str, Any] = {} if generator_name is not None else {"subfolder": _GENERATOR}
    if generator_name is None and _file(name, "config.json", **where) is None:
        return Pair(None, discriminator, chosen, parts)
    generator = from_pretrained(AutoModelForMaskedLM, generator_name or name, **where, **options)
    return Pair(generator, discriminator, chosen, parts)


def _file(name: str, filename: str, **where: str) -> str | None:
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )


def _weights(name: str) -> dict[str, torch.Tensor]:
    path = next(filter(None, (_file(name, weights) for weights in _WEIGHTS)), None)
    if path is None:
        raise InputError(f"{name!r} holds none of {', '.join(_WEIGHTS)}: name a checkpoint in one piece")
    return read_safetensors(path) if path.endswith("safetensors") else _load(path)


def _load(path: str) -> dict[str, torch.Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path!r} cannot be read ({first_line(error)}): copy it again") from error


def _head(name: str, *, is_published: bool) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """Return the kind of head that a checkpoint has, and its weights if they are not in a stock class."""
    where = "pretraining/discriminator_head"
    weights = _file(name, "model.safetensors", subfolder=where)
    if weights is not None:
        config = from_pretrained(DiscriminatorHeadConfig, name, subfolder=where)
        return config.kind, {"discriminator_head": read_safetensors(weights)}
    if not is_published:
        return "stock", {}
    state = {
        # The official class spells its last layer in two ways.
        key.removeprefix(_DEBERTA_HEAD).replace("classifer", "classifier"): value
        for key, value in _weights(name).items()
        if key.startswith(_DEBERTA_HEAD)
    }
    return "deberta_v3", {"discriminator_head": state} if state else {}


def _discriminator(name: str, head: str, options: Mapping[str, Any]) -> PreTrainedModel:
    if from_pretrained(AutoConfig, name).model_type == "electra" and head != "deberta_v3":
        return from_pretrained(ElectraForPreTraining, name, **options)
    # The head of a token classifier is new with every checkpoint that had another one; one that is dropped is not worth a line.
    classifier = from_pretrained(
        AutoModelForTokenClassification, name, num_labels=1, announce=head == "stock", **options
    )
    return classifier if head == "stock" else classifier.base_model


def _published_generator(name: str, path: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return a published generator and its table of positions; its configuration is the discriminator's, but for its depth."""
    state = {re.sub(r"^bert\.", "deberta.", key): value for key, value in _load(path).items()}
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(r"deberta\.encoder\.layer\.(\d+)\.", key)))
    # Not legacy: the head has the names and the form of the official code.
    config = from_pretrained(AutoConfig, name, num_hidden_layers=depth, legacy=False)
    generator = from_config(AutoModelForMaskedLM, config, **options)
    missing = generator.load_state_dict(state, strict=False).missing_keys
    if missing or _DEBERTA_POSITIONS not in state:
        raise InputError(
            f"{Path(path).name!r} lacks {(missing or [_DEBERTA_POSITIONS])[0]}: it is no generator of a DeBERTa-v3"
        )
    return generator, state[_DEBERTA_POSITIONS]


def _add_difference(name: str, discriminator: PreTrainedModel, generator: PreTrainedModel) -> None:
    """Rebuild the discriminator's table where only its difference to the generator's was saved; it would be random."""
    state = _weights(name)
    if f"{_DEBERTA_TABLE}.weight" not in state and f"{_DEBERTA_TABLE}._weight" in state:
        table = generator.get_input_embeddings().weight + state[f"{_DEBERTA_TABLE}._weight"]
        discriminator.get_input_embeddings().weight.data.copy_(table)
