"""Digests of models, examples and tokenizers, by which what was computed from them is known again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.epochs import EpochDataset

# What of a configuration does not change what the model computes.
_IRRELEVANT = ("_name_or_path", "architectures", "dtype", "transformers_version")
# What of an example decides what a teacher is asked, and where.
_COLUMNS = ("input_ids", "token_type_ids", "is_target", "document_ids", "word_starts", "spans")
_ROWS = 4096
_SIZE = 16


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of a model's class, configuration and weights."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=_SIZE)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_fingerprint(
    teacher: PreTrainedModel, dataset: Any, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> dict[str, str]:
    """Return what a cache belongs to: digests of the teacher, of the examples' tokens, of the tokenizer and of options.

    Args:
        teacher: The teacher; another dtype is another teacher.
        dataset: Map-style examples with `input_ids`, in the order of their ids; `is_target` says which tokens are asked for.
        tokenizer: What made them.
        **options: Whatever else decides the answers, such as the options of masking, the seed or the temperature.
    """
    return {
        "teacher": weights_fingerprint(teacher),
        "data": _data_fingerprint(EpochDataset.wrap(dataset)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{name: _digest(json.dumps(value, sort_keys=True, default=str)) for name, value in options.items()},
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what decides the tokens of a text: not how the tokenizer was last called."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return _digest(json.dumps(backend, sort_keys=True))


def _data_fingerprint(dataset: EpochDataset) -> str:
    digest = hashlib.blake2b(digest_size=_SIZE)
    for begin in range(0, len(dataset), _ROWS):
        examples = dataset.__getitems__(range(begin, min(begin + _ROWS, len(dataset))))
        for column in _COLUMNS:
            if column in examples[0]:
                rows = [np.asarray(example[column], dtype=np.int64).ravel() for example in examples]
                digest.update(np.array([len(row) for row in rows]).tobytes())
                digest.update(np.concatenate(rows).tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()
