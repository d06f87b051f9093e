"""Smaller vocabularies: a model and its tokenizer without the tokens that a text does not use.

A multilingual encoder is mostly its word table. What is trimmed is the teacher with its tokenizer, before a student is built from
it: teacher, student and tokenizer then have one vocabulary, and no id is ever translated.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import counts_from_padding

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_TOKENIZER_FILE = "tokenizer.json"


def used_ids(examples: datasets.Dataset, *, column: str = "input_ids") -> list[int]:
    """Return the ids that occur in a tokenized data set, ascending.

    Args:
        examples: Data set with a column of lists of ids, such as `PreparedData.train_documents`.
        column: Name of that column.
    """
    found = np.zeros(0, dtype=np.int64)
    batches = examples.select_columns(column).with_format("arrow").iter(batch_size=1000)
    what, total = "Looking for the tokens in use", -(-len(examples) // 1000)
    for batch in tqdm(batches, desc=what, total=total, delay=2, disable=None):
        ids = batch.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found = np.union1d(found, ids)
    return [int(token) for token in found]


def trim_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep_ids: Iterable[int]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer with the tokens that are named, and those that must stay with them.

    The latter are special and added tokens, the characters of the tokens that stay, what BPE makes them from, and bytes. So a
    text all of whose tokens stay is cut into the same tokens as before, with the same logits on them; other text is cut into
    smaller ones. Tokens keep their order.

    Args:
        model: Stock encoder, with or without an output layer over the vocabulary; not changed.
        tokenizer: Its tokenizer, of kind WordPiece, BPE, Unigram or WordLevel; not changed.
        keep_ids: Tokens to keep, such as [`used_ids`] of the training text.

    Returns:
        The smaller model, in the same dtype, on the same device and in the same mode; and the smaller tokenizer.

    Raises:
        InputError: If an id is not the tokenizer's, or the tokenizer is not of these kinds.
    """
    kept = kept_ids(model, tokenizer, keep_ids)
    return trim_model(model, kept), trim_tokenizer(tokenizer, kept)


def match_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, to: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a teacher that reads and predicts the tokens of a student's tokenizer.

    Args:
        model: The teacher.
        tokenizer: The teacher's tokenizer.
        to: The student's tokenizer.

    Returns:
        The model itself where both have the same tokens in the same order; otherwise one with the student's tokens.

    Raises:
        InputError: If the teacher does not know one of them.
    """
    theirs, ours = tokenizer.get_vocab(), to.get_vocab()
    if ours == theirs:
        return model
    names = {number: token for token, number in ours.items()}
    tokens = [names.get(number, "") for number in range(max(names) + 1)]
    unknown = next((token for token in tokens if token not in theirs), None)
    if unknown is not None:
        raise InputError(
            f"the teacher does not know the student's token {unknown!r}, and predictions can only be compared token by token: "
            "give both one tokenizer, or a student whose vocabulary was trimmed from the teacher's"
        )
    return trim_model(model, torch.tensor([theirs[token] for token in tokens]))


def kept_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keep_ids: Iterable[int]) -> torch.Tensor:
    """Return the ids that stay: those given and those that must stay with them, ``int64 [V']``, ascending."""
    vocabulary = tokenizer.get_vocab()
    known, keep = set(vocabulary.values()), {int(token) for token in keep_ids}
    if keep - known:
        raise InputError(
            f"keep_ids holds {min(keep - known)}, which is none of the tokenizer's {len(known)} ids: "
            "take those of a text that this tokenizer tokenized"
        )
    keep |= _needed_ids(_specification(tokenizer), vocabulary, keep)
    keep |= {*tokenizer.all_special_ids, *_configured_ids(model.config).values()}
    if counts_from_padding(model):
        # The padding id has to stay what it is.
        keep |= set(range(model.config.pad_token_id))
    return torch.tensor(sorted(keep & known))


def _configured_ids(config: Any) -> dict[str, int]:
    values = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: value for name, value in values.items() if isinstance(value, int) and 0 <= value < config.vocab_size}


def trim_model(model: PreTrainedModel, kept: torch.Tensor) -> PreTrainedModel:
    """Return a model whose tables over the vocabulary have the rows `kept`, ``int64 [V']``, in that order.

    Raises:
        InputError: If the padding token would move in a model that numbers its positions from it.
    """
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    config = type(model.config).from_dict(model.config.to_dict() | {"vocab_size": len(kept)})
    for name, token in _configured_ids(model.config).items():
        setattr(config, name, new_ids.get(token))
    if counts_from_padding(model) and config.pad_token_id != model.config.pad_token_id:
        raise InputError(
            f"the padding token of {type(model).__name__} would move from {model.config.pad_token_id} to "
            f"{config.pad_token_id}, and its positions with it: keep the tokens before it"
        )
    config.name_or_path = model.config.name_or_path
    backend = model.config._attn_implementation
    trimmed: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype, attn_implementation=backend)
    state = model.state_dict()
    for name, axis in vocabulary_tables(model).items():
        state[name] = state[name].index_select(axis, kept.to(state[name].device))
    trimmed.load_state_dict(state)
    return trimmed.to(model.device).train(model.training)


def vocabulary_tables(model: PreTrainedModel) -> dict[str, int]:
    """Return what has a row or a value a token, by name: the axis that is longer with a larger vocabulary."""
    config = copy.deepcopy(model.config)
    config.vocab_size += 1
    with torch.device("meta"):
        other = type(model)._from_config(config).state_dict()
    changes = {
        name: [axis for axis, size in enumerate(value.shape) if size != other[name].shape[axis]]
        for name, value in model.state_dict().items()
    }
    return {name: axes[0] for name, axes in changes.items() if axes}


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: torch.Tensor) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the tokens `kept`, ``int64 [V']`` ascending, as it is read from disk."""
    specification = _specification(tokenizer)
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    model = specification["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    else:
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new_ids]
    if "merges" in model:
        model["merges"] = [list(pair) for pair, merged in _merges(model) if {*pair, merged} <= model["vocab"].keys()]
    for holder, key in _id_fields(specification):
        holder[key] = new_ids[holder[key]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / _TOKENIZER_FILE).write_text(json.dumps(specification), encoding="utf-8")
        trimmed: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    trimmed.name_or_path = tokenizer.name_or_path
    expected = {token: new_ids[old] for token, old in tokenizer.get_vocab().items() if old in new_ids}
    assert trimmed.get_vocab() == expected, "tokens that were added do not follow the others"
    return trimmed


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    specification: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = specification.get("model", {}).get("type")
    if kind not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise InputError(
            f"trim_vocabulary: {type(tokenizer).__name__} is not a WordPiece, BPE, Unigram or WordLevel tokenizer of the "
            "tokenizers library; leave it out"
        )
    return specification


def _id_fields(specification: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield what holds an id outside of the vocabulary, and the key under which it does."""
    for token in specification["added_tokens"]:
        yield token, "id"
    if specification["padding"] is not None:
        yield specification["padding"], "pad_id"
    if specification["model"].get("unk_id") is not None:
        yield specification["model"], "unk_id"
    processor = specification["post_processor"] or {}
    for part in processor.get("processors", [processor]):
        for role in ("sep", "cls"):
            if role in part:
                yield part[role], 1
        if part.get("type") == "TemplateProcessing":
            for token in part["special_tokens"].values():
                yield from ((token["ids"], index) for index in range(len(token["ids"])))


def _needed_ids(specification: dict[str, Any], vocabulary: dict[str, int], keep: set[int]) -> set[int]:
    """Return the ids without which the tokens to keep could not be made, or other text not be read."""
    model = specification["model"]
    needed = {holder[key] for holder, key in _id_fields(specification)}
    added = {token["id"] for token in specification["added_tokens"]}
    names = {token for token, number in vocabulary.items() if number in keep - added}
    affixes = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    names |= {
        name
        for character in {c for token in names for c in token.removeprefix(affixes[0]).removesuffix(affixes[1])}
        for name in (character, affixes[0] + character, character + affixes[1], affixes[0] + character + affixes[1])
    }
    names.add(model.get("unk_token") or "")
    if model.get("byte_fallback"):
        names |= {token for token in vocabulary if _BYTE_PIECE.fullmatch(token)}
    if "ByteLevel" in json.dumps([specification["normalizer"], specification["pre_tokenizer"]]):
        names |= set(pre_tokenizers.ByteLevel.alphabet())
    if model["type"] == "Unigram":
        # An unknown character costs a fixed amount more than the rarest piece, so that piece has a part in every tokenization.
        names.add(min(model["vocab"], key=lambda piece: piece[1])[0])
    return needed | {vocabulary[name] for name in _with_parts(names, model) if name in vocabulary}


def _with_parts(names: set[str], model: dict[str, Any]) -> set[str]:
    """Return tokens with all those that BPE merges, step by step, to make them."""
    parts: dict[str, set[str]] = {}
    for pair, merged in _merges(model):
        parts.setdefault(merged, set()).update(pair)
    found, new = set(names), list(names)
    while new:
        fresh = parts.get(new.pop(), set()) - found
        found |= fresh
        new += fresh
    return found


def _merges(model: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the pairs that BPE merges and what they become."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    for merge in model.get("merges", ()):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield (first, second), first + second[prefix:]
