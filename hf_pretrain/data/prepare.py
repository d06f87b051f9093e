"""The one entry of the programs: from options to a tokenizer, examples to train on and examples held out."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.corpus import docstring_dataset, split_held_out
from hf_pretrain.data.documents import check_offsets, tokenize_documents
from hf_pretrain.data.packing import BlockDataset
from hf_pretrain.data.streaming import StreamingBlocks
from hf_pretrain.data.text import (
    file_stamps,
    load_text_dataset,
    random_subset,
    read_documents,
    resolve_paths,
    text_dataset,
    text_sizes,
)
from hf_pretrain.data.tokenizer_training import train_tokenizer
from hf_pretrain.errors import InputError

__all__ = ["DataArguments", "PreparedData", "prepare_data"]

# Enough text for a vocabulary; more only takes longer.
_TOKENIZER_CHARACTERS = 1 << 28
# Says what the tokenizer in output_dir was trained on; the underscore keeps the file out of what is pushed to the Hub.
_TOKENIZER_RECORD = "_tokenizer_training.json"


@dataclass
class PreparedData:
    """What training needs of the data.

    Args:
        tokenizer: The tokenizer of the run.
        train_dataset: Examples to train on: `BlockDataset` or `StreamingBlocks`.
        eval_dataset: Examples held out, None if there are none.
        description: Names and numbers for the model card.
        block_size: Most tokens in an example.
        train_documents: The tokenized documents behind `train_dataset`, for views of another kind; None for a stream.
        eval_documents: Those behind `eval_dataset`.
        languages: Number of each language, where languages are told apart.
    """

    tokenizer: PreTrainedTokenizerBase
    train_dataset: Any
    eval_dataset: Any
    description: dict[str, Any]
    block_size: int
    train_documents: Any = None
    eval_documents: Any = None
    languages: dict[str, int] | None = None

    @property
    def isolates_documents(self) -> bool:
        """Whether examples hold several documents that must not see each other."""
        return self.description.get("block_mode") == "isolated_documents"

    def trainer_inputs(self) -> dict[str, Any]:
        """Return the arguments that every `PretrainingTrainer` takes from the data."""
        return {
            "train_dataset": self.train_dataset,
            "eval_dataset": self.eval_dataset,
            "processing_class": self.tokenizer,
            "data_description": self.description,
        }


class _Texts(NamedTuple):
    train: datasets.Dataset
    held_out: datasets.Dataset | None
    source: str
    held_out_source: str | None


def prepare_data(
    args: DataArguments,
    *,
    seed: int,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    first: AbstractContextManager[Any] | None = None,
) -> PreparedData:
    """Read the text, hold documents out, tokenize it and cut it into examples; each step is done once and cached.

    Args:
        args: What to read and how to cut it.
        seed: Seed of the run, for the order of a stream; what is held out depends on ``args.split_seed`` only.
        output_dir: Where a trained tokenizer is saved, and found again by other ranks.
        tokenizer: Tokenizer to use; otherwise ``args.tokenizer_name``, otherwise one is trained on the training text.
        first: Entered while files are written, so that one process writes and the others read:
            ``training_args.main_process_first()``.

    Raises:
        InputError: If the text can not be read, is too little to hold documents out, or does not fit the options.
    """
    prepare = _prepare_stream if args.streaming else _prepare_documents
    return prepare(args, seed, Path(output_dir), tokenizer, nullcontext() if first is None else first)


def _prepare_documents(
    args: DataArguments,
    seed: int,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    first: AbstractContextManager[Any],
) -> PreparedData:
    with first:
        texts = _read_texts(args)
        sample = RepeatableTexts(lambda: first_texts(_shuffled(texts.train, seed=args.split_seed)))
        tokenizer = run_tokenizer(args, output_dir, tokenizer, sample, texts.train._fingerprint)
        parts = {"": texts.train} | ({} if texts.held_out is None else {"held_out_": texts.held_out})
        documents = {
            name: tokenize_documents(part, tokenizer, num_proc=args.preprocessing_num_workers)
            for name, part in parts.items()
        }
    blocks = {
        name: BlockDataset(part, tokenizer=tokenizer, block_size=args.block_size, mode=args.block_mode)
        for name, part in documents.items()
    }
    description = common_description(args, tokenizer, texts.source, texts.held_out_source)
    for name, part in parts.items():
        num_bytes, num_characters = text_sizes(part)
        description |= {
            f"{name}documents": len(documents[name]),
            f"{name}tokens": blocks[name].num_tokens,
            f"{name}blocks": len(blocks[name]),
            f"{name}bytes": int(num_bytes.sum()),
            f"{name}characters": int(num_characters.sum()),
        }
    return PreparedData(
        tokenizer,
        blocks[""],
        blocks.get("held_out_"),
        description,
        args.block_size,
        train_documents=documents[""],
        eval_documents=documents.get("held_out_"),
    )


def _read_texts(args: DataArguments) -> _Texts:
    """Return the texts to train on and those held out."""
    if args.train_file:
        texts = _file_texts(args, args.train_file)
    elif args.dataset_name:
        texts = _hub_dataset(args, streaming=False)
    else:
        texts = docstring_dataset(max_bytes=args.max_corpus_bytes, seed=args.split_seed)
    if args.max_corpus_bytes is not None:
        texts = random_subset(texts, max_bytes=args.max_corpus_bytes, seed=args.split_seed)
    if args.validation_file:
        held_out = _file_texts(args, args.validation_file)
        return _Texts(texts, held_out, _source_name(args), file_names(args.validation_file))
    train_rows, held_out_rows = split_held_out(len(texts), args.validation_fraction, seed=args.split_seed)
    if not len(held_out_rows):
        return _Texts(texts, None, _source_name(args), None)
    name = f"{args.validation_fraction:.3g} of the documents of {_source_name(args)}"
    return _Texts(texts.select(train_rows), texts.select(held_out_rows), _source_name(args), name)


def _file_texts(args: DataArguments, paths: list[str]) -> datasets.Dataset:
    return text_dataset(
        paths,
        text_column=args.text_column,
        document_separator=args.document_separator,
        on_bad_text=args.on_bad_text or "refuse",
    )


def _hub_dataset(args: DataArguments, *, streaming: bool) -> Any:
    assert args.dataset_name is not None
    return load_text_dataset(
        args.dataset_name,
        config_name=args.dataset_config_name,
        split=args.dataset_split,
        text_column=args.text_column,
        streaming=streaming,
    )


class RepeatableTexts:
    """Texts that are read anew each time they are iterated over."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        progress = tqdm(self._read(), desc="Reading text for the tokenizer", unit=" documents", delay=2, disable=None)
        return iter(progress)


def _shuffled(texts: datasets.Dataset, *, seed: int) -> Iterator[str]:
    order = draws.permutation(len(texts), seed=seed, stream="tokenizer sample")
    return (text or "" for batch in texts.select(order).iter(batch_size=256) for text in batch["text"])


def run_tokenizer(
    args: DataArguments,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Iterable[str],
    texts_key: Any,
    finish: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was given or named, or train one; a trained one is used as it is read from disk.

    Args:
        args: Which tokenizer is wanted.
        output_dir: Where one that is trained is saved, and found again if texts and options are the same.
        tokenizer: One that is given.
        texts: What to train on.
        texts_key: Whatever decides the texts, and what `finish` does; written as JSON.
        finish: Called with a new tokenizer before it is saved.

    Raises:
        InputError: If it can not be loaded or trained, or gives no offsets.
    """
    if tokenizer is None and args.tokenizer_name is not None:
        tokenizer = _load_tokenizer(args.tokenizer_name)
    if tokenizer is not None:
        check_offsets(tokenizer)
        return tokenizer
    options: dict[str, Any] = {
        "kind": args.tokenizer_type,
        "vocab_size": args.vocab_size,
        "lowercase": args.lowercase,
        "model_max_length": args.block_size,
    }
    record, key = output_dir / _TOKENIZER_RECORD, json.dumps(options | {"texts": texts_key})
    if not record.is_file() or record.read_text(encoding="utf-8") != key:
        trained = train_tokenizer(texts, **options)
        if finish is not None:
            finish(trained)
        # An old record beside a new tokenizer would tell of another text, should the run be cut off here.
        record.unlink(missing_ok=True)
        trained.save_pretrained(output_dir)
        record.write_text(key, encoding="utf-8")
    return _load_tokenizer(str(output_dir))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tokenizer_name={name!r} can not be loaded: {reason}") from error


def _source_name(args: DataArguments) -> str:
    if args.train_file:
        return file_names(args.train_file)
    if args.dataset_name:
        return " ".join(filter(None, (args.dataset_name, args.dataset_config_name, args.dataset_split)))
    return f"docstrings of the installed Python packages (Python {platform.python_version()})"


def file_names(paths: list[str]) -> str:
    """Return the names of files, folders and globs, without folders, because the card goes to the Hub."""
    names = [Path(path).name for path in resolve_paths(paths)]
    return ", ".join(names if len(names) <= 5 else [*names[:4], f"{len(names) - 4} more files"])


def common_description(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, source: str, held_out_source: str | None
) -> dict[str, Any]:
    """Return what the description of any data begins with."""
    model = type(tokenizer.backend_tokenizer.model).__name__
    return {
        "source": source,
        "held_out_source": held_out_source,
        "tokenizer": model,
        "vocab_size": len(tokenizer),
        "block_size": args.block_size,
        "block_mode": args.block_mode,
    }


def _prepare_stream(
    args: DataArguments,
    seed: int,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    first: AbstractContextManager[Any],
) -> PreparedData:
    """Prepare nothing but the tokenizer and the validation file; documents of the stream are not held out."""
    with first:
        source: Any = resolve_paths(args.train_file) if args.train_file else _hub_dataset(args, streaming=True)
        read = partial(read_documents, document_separator=args.document_separator, text_column=args.text_column)
        read = partial(read, on_bad_text=args.on_bad_text or "skip")
        head = RepeatableTexts(
            lambda: first_texts(read(source) if args.train_file else (row[args.text_column] for row in source))
        )
        key = file_stamps(source) if args.train_file else _source_name(args)
        tokenizer = run_tokenizer(args, output_dir, tokenizer, head, key)
        held_out = None
        if args.validation_file:
            held_out = tokenize_documents(_file_texts(args, args.validation_file), tokenizer)
    options: dict[str, Any] = {"tokenizer": tokenizer, "block_size": args.block_size, "mode": args.block_mode}
    train_dataset = StreamingBlocks(
        source,
        document_separator=args.document_separator,
        text_column=args.text_column,
        shuffle_buffer_size=args.shuffle_buffer_size,
        on_bad_text=args.on_bad_text or "skip",
        seed=seed,
        **options,
    )
    eval_dataset = None if held_out is None else BlockDataset(held_out, **options)
    held_out_source = file_names(args.validation_file) if args.validation_file else None
    description = common_description(args, tokenizer, f"{_source_name(args)} (streamed)", held_out_source)
    if held_out is not None and eval_dataset is not None:
        description |= {"held_out_documents": len(held_out), "held_out_tokens": eval_dataset.num_tokens}
        description |= {"held_out_blocks": len(eval_dataset)}
    return PreparedData(tokenizer, train_dataset, eval_dataset, description, args.block_size)


def first_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts, as many as a tokenizer needs."""
    room = _TOKENIZER_CHARACTERS
    for text in texts:
        yield text
        room -= len(text)
        if room <= 0:
            return
