"""A made-up text for the rehearsal of a run, in the shape that the real one will have."""

from __future__ import annotations

import json
from typing import Any, get_args

import datasets
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import multilingual
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents import DOCUMENT_FEATURES
from hf_pretrain.data.mixture import MixtureDataset
from hf_pretrain.data.multilingual_arguments import MultilingualDataArguments
from hf_pretrain.data.packing import BlockDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.streaming import StreamingBlocks
from hf_pretrain.data.tokenizer_frames import frame_by_separators
from hf_pretrain.data.tokenizer_training import TokenizerKind, train_tokenizer
from hf_pretrain.training.arguments import PretrainingArguments

_SENTENCE, _SENTENCES = 6, 5
_TEXTS = ["a ba ab bab aba. b abb bba bb aa."] * 4


def made_up_data(
    args: DataArguments, model_args: Any, training: PretrainingArguments, tokenizer: PreTrainedTokenizerBase | None
) -> PreparedData:
    """Return examples as [`prepare_data`] would, of documents that hold the first words of the vocabulary.

    Args:
        args: How the text is cut, and whether text is held out.
        model_args: Not used; other data may depend on the model.
        training: How many lanes the text must do for, and the seed.
        tokenizer: The tokenizer of the run; None to make one up, of the kind and the size that are asked for.

    Raises:
        InputError: If no text could be cut in this way.
    """
    if tokenizer is None:
        tokenizer = made_up_tokenizer(args)
    # Enough for some windows of every lane of the methods that have a memory.
    lanes = 4 * training.world_size * max(getattr(training, "eval_lanes", None) or 1, 1)
    tokens = max(2000, lanes * 3 * max(args.block_size, getattr(training, "tgt_len", 0)))
    if isinstance(args, MultilingualDataArguments) and args.is_multilingual:
        return _of_languages(args, tokenizer, training.seed)
    documents = _documents(tokenizer, min(tokens, 1 << 22))
    cut: dict[str, Any] = {"tokenizer": tokenizer, "block_size": args.block_size, "mode": args.block_mode}
    blocks = BlockDataset(documents, **cut)
    holds_out = bool(args.validation_file or (args.validation_fraction and not args.streaming))
    train: Any = blocks
    if args.streaming:
        texts = datasets.Dataset.from_dict({args.text_column: _TEXTS}).to_iterable_dataset()
        train = StreamingBlocks(texts, text_column=args.text_column, seed=training.seed, **cut)
    return PreparedData(
        tokenizer,
        train,
        blocks if holds_out else None,
        {"source": "made up", "block_size": args.block_size, "block_mode": args.block_mode},
        args.block_size,
        train_documents=None if args.streaming else documents,
        eval_documents=documents if holds_out else None,
    )


def made_up_tokenizer(args: DataArguments) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the special tokens and the vocabulary size of one that would be trained."""
    kind: Any = args.tokenizer_type if args.tokenizer_type in get_args(TokenizerKind) else "wordpiece"
    size = min(args.vocab_size, 320)
    tokenizer = train_tokenizer(
        _TEXTS, kind=kind, vocab_size=size, lowercase=bool(args.lowercase), model_max_length=args.block_size
    )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    new = [f"word{number}" for number in range(args.vocab_size - len(tokenizer))]
    if isinstance(vocabulary, dict):
        vocabulary.update({word: len(vocabulary) + number for number, word in enumerate(new)})
    else:
        vocabulary.extend([word, -20.0] for word in new)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    if isinstance(args, MultilingualDataArguments) and args.is_multilingual and args.tokenizer_frame == "xlm":
        frame_by_separators(tokenizer)
    return tokenizer


def _documents(tokenizer: PreTrainedTokenizerBase, num_tokens: int, **columns: str) -> datasets.Dataset:
    """Return documents of equal length, in equal sentences of words that are no special tokens."""
    special = set(tokenizer.all_special_ids)
    words = [number for number in range(min(len(tokenizer), 200)) if number not in special] or [0]
    length = _SENTENCE * _SENTENCES
    count = max(8, -(-num_tokens // length))
    table: dict[str, Any] = {
        "input_ids": [[words[(row + place) % len(words)] for place in range(length)] for row in range(count)],
        "word_starts": [[True] * length] * count,
        "sent_starts": [[place % _SENTENCE == 0 for place in range(length)]] * count,
        "doc_id": list(range(count)),
    }
    features = datasets.Features(DOCUMENT_FEATURES)
    for name, value in columns.items():
        features[name] = datasets.Value("string")
        table[name] = [value] * count
    return datasets.Dataset.from_dict(table, features=features)


def _of_languages(args: MultilingualDataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    documents: dict[str, tuple[datasets.Dataset, ...]] = {
        name: (_documents(tokenizer, 2000, lang=name),) for name in args.language_files()
    }
    for pair in args.parallel_files():
        documents[pair] = tuple(_documents(tokenizer, 2000, lang=name) for name in pair.split("-"))
    languages = {name: number for number, name in enumerate(args.languages())}
    parts = multilingual._examples(documents, args=args, tokenizer=tokenizer, languages=languages, seed=seed)
    texts = [sides[0] for name, sides in documents.items() if "-" not in name]
    joined = datasets.concatenate_datasets(texts) if texts else None
    mixture = MixtureDataset(parts, shares=dict.fromkeys(parts, 1.0), seed=seed)
    return PreparedData(
        tokenizer,
        mixture,
        mixture if args.validation_fraction else None,
        {"source": "made up", "block_mode": args.block_mode, "languages": args.languages()},
        args.block_size,
        train_documents=joined,
        eval_documents=joined if args.validation_fraction else None,
        languages=languages,
    )
