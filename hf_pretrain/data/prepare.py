"""The one entry of the programs: from options to a tokenizer, examples to train on and examples held out."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.documents import UnknownCount, check_offsets, tokenize_documents
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.in_memory import Given, given_texts
from hf_pretrain.data.prepared import check_same_tokenizer, open_documents, prepared_tokenizer, read_manifest
from hf_pretrain.data.run_tokenizer import (
    RepeatableTexts,
    StreamTokenizing,
    adding,
    check_unknown,
    count_unknown,
    first_texts,
    load_tokenizer,
    read_record,
    run_tokenizer,
    shuffled_texts,
    word_segmenter,
)
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.data.text.datasets import (
    file_stamps,
    load_text_dataset,
    random_subset,
    text_dataset,
    text_sizes,
)
from hf_pretrain.data.text.docstrings import docstring_dataset, split_held_out
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError
from hf_pretrain.options import all_options

__all__ = ["DataArguments", "PreparedData", "prepare_data"]


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
        languages: Number of each language, where the options name languages.
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


class Texts(NamedTuple):
    """Texts to train on, those held out (None if there are none), and what a card calls them."""

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
    dataset: Any = None,
    eval_dataset: Any = None,
    added_tokens: Sequence[str] = (),
) -> PreparedData:
    """Read the text, hold documents out, tokenize it and cut it into examples; each step is done once and cached.

    Args:
        args: What to read and how to cut it.
        seed: Seed of the run, for the order of a stream; the held-out text depends on ``args.split_seed`` only.
        output_dir: Where a trained tokenizer is saved, and found again by other ranks.
        tokenizer: Tokenizer to use; otherwise ``args.tokenizer_name``, otherwise one is trained on the training text.
        first: Entered while files are written, so that one process writes and the others read:
            ``training_args.main_process_first()``.
        dataset: Text that is loaded already, instead of the files that `args` name: a `datasets.Dataset`, `DatasetDict` or
            `IterableDataset` with a column of text, or a list of texts.
        eval_dataset: Another that is held out; by default the split "validation", or as `args` say.
        added_tokens: Special tokens that a trained tokenizer gets beside its vocabulary.

    Raises:
        InputError: If the text can not be read, is too little to hold documents out, or does not fit the options.
    """
    given = None
    if dataset is not None:
        if name := next((n for n in ("train_file", "dataset_name", "prepared_data") if getattr(args, n)), None):
            raise InputError(f"dataset and {name}={getattr(args, name)!r}: give one text to train on")
        given = given_texts(dataset, eval_dataset, text_column=args.text_column, split=args.dataset_split)
        args = replace(args, text_column=given.text_column)
    if args.prepared_data is not None:
        return _open_documents(args, args.prepared_data, tokenizer)
    is_stream = args.streaming or isinstance(given and given.train, datasets.IterableDataset)
    prepare = _prepare_stream if is_stream else _prepare_documents
    entered = nullcontext() if first is None else first
    return prepare(args, seed, Path(output_dir), tokenizer, entered, given, added_tokens)


def _prepare_documents(
    args: DataArguments,
    seed: int,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    first: AbstractContextManager[Any],
    given: Given | None,
    added_tokens: Sequence[str],
) -> PreparedData:
    with first:
        texts = read_texts(args, given)
        sample = RepeatableTexts(lambda: first_texts(shuffled_texts(texts.train, seed=args.split_seed)))
        tokenizer = run_tokenizer(args, output_dir, tokenizer, sample, *adding(texts.train._fingerprint, added_tokens))
        parts = {"": texts.train} | ({} if texts.held_out is None else {"held_out_": texts.held_out})
        unknown, documents = {name: UnknownCount() for name in parts}, {}
        for name, part in parts.items():
            documents[name] = tokenize_documents(
                part,
                tokenizer,
                word_segmenter=word_segmenter(args),
                num_proc=args.preprocessing_num_workers,
                unknown=unknown[name],
            )
            if not name:
                check_unknown(args, tokenizer, unknown[name], sample)
    description = common_description(args, tokenizer, texts.source, texts.held_out_source, output_dir)
    sizes = {name: tuple(int(lengths.sum()) for lengths in text_sizes(part)) for name, part in parts.items()}
    return _as_blocks(args, tokenizer, description, documents, sizes, unknown)


def _open_documents(args: DataArguments, folder: str, tokenizer: PreTrainedTokenizerBase | None) -> PreparedData:
    """Return the documents of a folder that `hf-pretrain prepare` wrote, cut as the options say."""
    manifest = read_manifest(folder)
    if tokenizer is None:
        name = args.tokenizer_name
        tokenizer = prepared_tokenizer(folder, block_size=args.block_size) if name is None else load_tokenizer(name)
    check_offsets(tokenizer)
    check_same_tokenizer(folder, tokenizer)
    names = {"": "train"} | ({"held_out_": "held_out"} if "held_out" in manifest else {})
    facts = {name: manifest[part] for name, part in names.items()}
    unknown = {name: UnknownCount(**part["unknown"]) for name, part in facts.items()}
    if unknown[""].share > args.max_unknown_share:
        raise InputError(
            f"{unknown[''].share:.2%} of the characters of prepared_data={folder!r} are unknown to its tokenizer, more than "
            f"max_unknown_share={args.max_unknown_share:g}: prepare the text with another, or allow it with a greater "
            "--max_unknown_share"
        )
    description = common_description(args, tokenizer, manifest["source"], manifest["held_out_source"])
    if "tokenizer_reason" in manifest:
        description["tokenizer_reason"] = manifest["tokenizer_reason"]
    documents = {name: open_documents(folder, part) for name, part in names.items()}
    sizes = {name: (part["bytes"], part["characters"]) for name, part in facts.items()}
    return _as_blocks(args, tokenizer, description, documents, sizes, unknown)


def _as_blocks(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    description: dict[str, Any],
    documents: dict[str, datasets.Dataset],
    sizes: Mapping[str, tuple[int, ...]],
    unknown: dict[str, UnknownCount],
) -> PreparedData:
    """Cut documents into blocks, and describe them; ``""`` are those to train on, ``"held_out_"`` those held out."""
    blocks = {
        name: BlockDataset(part, tokenizer=tokenizer, block_size=args.block_size, mode=args.block_mode)
        for name, part in documents.items()
    }
    for name, (num_bytes, num_characters) in sizes.items():
        description |= {
            f"{name}documents": len(documents[name]),
            f"{name}tokens": blocks[name].num_tokens,
            f"{name}blocks": len(blocks[name]),
            f"{name}bytes": num_bytes,
            f"{name}characters": num_characters,
            f"{name}unknown_share": round(unknown[name].share, 6),
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


def training_texts(args: DataArguments) -> datasets.Dataset:
    """Return the texts that a run with these options trains on, without those held out; a data set with the column text."""
    return read_texts(args).train


def read_texts(args: DataArguments, given: Given | None = None) -> Texts:
    """Return the texts to train on and those held out.

    Args:
        args: What to read and what to hold out.
        given: Text that is loaded already.

    Raises:
        InputError: If the text cannot be read, is too little, or is there as tokens alone.
    """
    if args.prepared_data is not None:
        raise InputError(
            f"prepared_data={args.prepared_data!r} has the tokens of a text, and the text itself is needed: give train_file"
        )
    source = _source_name(args) if given is None else dataset_name(given.train)
    if given is not None:
        texts = given.train
    elif args.train_file:
        texts = text_dataset(args.train_file, **args.reading())
    elif args.dataset_name:
        texts = _hub_dataset(args, streaming=False)
    else:
        args.check_named()
        texts = docstring_dataset(max_bytes=args.max_corpus_bytes, seed=args.split_seed)
    if args.max_corpus_bytes is not None:
        texts = random_subset(texts, max_bytes=args.max_corpus_bytes, seed=args.split_seed)
    if given is not None and given.held_out is not None:
        return Texts(texts, given.held_out, source, dataset_name(given.held_out))
    if args.validation_file:
        held_out = text_dataset(args.validation_file, **args.reading())
        return Texts(texts, held_out, source, file_names(args.validation_file))
    train_rows, held_out_rows = split_held_out(len(texts), args.validation_fraction, seed=args.split_seed)
    if not len(held_out_rows):
        return Texts(texts, None, source, None)
    name = f"{args.validation_fraction:.3g} of the documents of {source}"
    return Texts(texts.select(train_rows), texts.select(held_out_rows), source, name)


def _hub_dataset(args: DataArguments, *, streaming: bool) -> Any:
    assert args.dataset_name is not None
    return load_text_dataset(
        args.dataset_name,
        config_name=args.dataset_config_name,
        split=args.dataset_split,
        text_column=args.text_column,
        streaming=streaming,
    )


def dataset_name(dataset: Any) -> str:
    """Return how a card names a dataset that was given as an object: as the Hub does, if it is from there."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    if name is None or name in ("generator", "pandas", "sql"):
        return "a dataset in memory"
    if name in ("text", "json", "csv", "parquet", "arrow"):
        # A builder of local files, whose names the dataset does not keep.
        return f"{name} files"
    return f"{name} {dataset.split}" if getattr(dataset, "split", None) else str(name)


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
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    held_out_source: str | None,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Return the beginning of every description of data, with the reason for a tokenizer that was trained into a folder."""
    model = type(tokenizer.backend_tokenizer.model).__name__
    record = {} if output_dir is None else read_record(Path(output_dir))
    is_trained = bool(record) and tokenizer.name_or_path == str(output_dir)
    return {
        # Those that define the data, for the card of a Trainer that is made in Python.
        "options": all_options([args]),
        "source": source,
        "held_out_source": held_out_source,
        "tokenizer": model,
        "vocab_size": len(tokenizer),
        "block_size": args.block_size,
        "block_mode": args.block_mode,
        **({"tokenizer_reason": record["choice"]["reason"]} if is_trained else {}),
        **({"word_segmenter": args.word_segmenter} if args.word_segmenter else {}),
    }


def _prepare_stream(
    args: DataArguments,
    seed: int,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    first: AbstractContextManager[Any],
    given: Given | None,
    added_tokens: Sequence[str],
) -> PreparedData:
    """Prepare nothing but the tokenizer and the validation file; documents of the stream are not held out."""
    with first:
        source: Any = None if given is None else given.train
        if source is None:
            source = resolve_paths(args.train_file) if args.train_file else _hub_dataset(args, streaming=True)
        reading = args.reading("skip")

        def texts() -> Iterator[str]:
            rows = (row[args.text_column] or "" for row in source)
            return first_texts(read_documents(source, **reading) if args.train_file else rows)

        head = RepeatableTexts(texts)
        name = _source_name(args) if given is None else dataset_name(given.train)
        key = file_stamps(source) if args.train_file else name
        tokenizer = run_tokenizer(args, output_dir, tokenizer, head, *adding(key, added_tokens))
        unknown = count_unknown(head, tokenizer)
        check_unknown(args, tokenizer, unknown, head, f"the first {unknown.characters:,} characters of the stream")
        held_out, held_out_unknown = None, UnknownCount()
        to_hold = None if given is None else given.held_out
        if to_hold is None and args.validation_file:
            to_hold = text_dataset(args.validation_file, **args.reading())
        if to_hold is not None:
            held_out = tokenize_documents(
                to_hold,
                tokenizer,
                word_segmenter=word_segmenter(args),
                unknown=held_out_unknown,
            )
    options: dict[str, Any] = {"tokenizer": tokenizer, "block_size": args.block_size, "mode": args.block_mode}
    train_dataset = StreamingBlocks(
        source,
        shuffle_buffer_size=args.shuffle_buffer_size,
        seed=seed,
        tokenize=StreamTokenizing(args, tokenizer),
        **reading,
        **options,
    )
    eval_dataset = None if held_out is None else BlockDataset(held_out, **options)
    held_out_source = file_names(args.validation_file) if args.validation_file else None
    if given is not None and given.held_out is not None:
        held_out_source = dataset_name(given.held_out)
    description = common_description(args, tokenizer, f"{name} (streamed)", held_out_source, output_dir)
    description |= {"unknown_share": round(unknown.share, 6), "unknown_counted_in": unknown.characters}
    if held_out is not None and eval_dataset is not None:
        description |= {"held_out_documents": len(held_out), "held_out_tokens": eval_dataset.num_tokens}
        description |= {
            "held_out_blocks": len(eval_dataset),
            "held_out_unknown_share": round(held_out_unknown.share, 6),
        }
    return PreparedData(tokenizer, train_dataset, eval_dataset, description, args.block_size)
