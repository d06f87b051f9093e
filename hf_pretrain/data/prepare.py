"""The one entry of the programs: from options to a tokenizer, examples to train on and examples held out."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tokenizers import decoders
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.documents import UnknownCount, check_offsets, tokenize_documents, tokenize_texts
from hf_pretrain.data.documents.tokenizers import (
    TokenizerChoice,
    add_special_tokens,
    check_tokenizer,
    choose_tokenizer,
    train_tokenizer,
)
from hf_pretrain.data.documents.words import NamedSegmenter, Segmenter, clipped, encodable
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.in_memory import Given, given_texts
from hf_pretrain.data.prepared import check_same_tokenizer, open_documents, prepared_tokenizer, read_manifest
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
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import read_object
from hf_pretrain.options import all_options

__all__ = ["DataArguments", "PreparedData", "prepare_data"]

# Enough text for a vocabulary; more only takes longer.
_TOKENIZER_CHARACTERS = 1 << 28
# Names the training text of the tokenizer in output_dir. The underscore keeps the file from being pushed to the Hub.
_TOKENIZER_RECORD = "_tokenizer_training.json"
# Of a stream, so many characters are looked at before training.
_STREAM_CHARACTERS = 1 << 20
_BATCH_TEXTS = 256
# A share of unknown characters that is worth a warning, and how many of them are shown.
_NOTABLE_SHARE, _SHOWN = 0.01, 5
_SHOWN_TOKENS = 16

logger = logging.get_logger(__name__)


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
        tokenizer = prepared_tokenizer(folder, block_size=args.block_size) if name is None else _load_tokenizer(name)
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


class RepeatableTexts:
    """Texts that are read anew each time they are iterated over."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        progress = tqdm(self._read(), desc="Reading text for the tokenizer", unit=" documents", delay=2, disable=None)
        return iter(progress)


def shuffled_texts(texts: datasets.Dataset, *, seed: int, epoch: int = 0) -> Iterator[str]:
    """Return the texts of a dataset in a keyed random order, to train a tokenizer on."""
    order = draws.permutation(len(texts), seed=seed, epoch=epoch, stream="tokenizer sample")
    return (text or "" for batch in texts.select(order).iter(batch_size=_BATCH_TEXTS) for text in batch["text"])


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
        check_tokenizer(tokenizer, roles=())
    if tokenizer is not None:
        check_offsets(tokenizer)
        return tokenizer
    options: dict[str, Any] = {
        "kind": args.tokenizer_type,
        "vocab_size": args.vocab_size,
        "lowercase": args.lowercase,
        "strip_accents": args.strip_accents,
        "model_max_length": args.block_size,
    }
    wanted = json.loads(json.dumps(options | {"texts": texts_key}))
    if _read_record(output_dir).get("wanted") != wanted:
        choice = _choice(args, texts)
        trained = train_tokenizer(texts, **(options | {"kind": choice.kind, "lowercase": choice.lowercase}))
        if finish is not None:
            finish(trained)
        # An old record beside a new tokenizer would tell of another text, should the run be cut off here.
        record = output_dir / _TOKENIZER_RECORD
        record.unlink(missing_ok=True)
        trained.save_pretrained(output_dir)
        record.write_text(json.dumps({"wanted": wanted, "choice": choice._asdict()}), encoding="utf-8")
    choice = TokenizerChoice(**_read_record(output_dir)["choice"])
    say(f"tokenizer: {choice.kind}, {'lower case' if choice.lowercase else 'case kept'}: {choice.reason}")
    return _load_tokenizer(str(output_dir))


def adding(texts_key: Any, tokens: Sequence[str]) -> tuple[Any, Callable[[PreTrainedTokenizerBase], None] | None]:
    """Return the last arguments of `run_tokenizer` for a tokenizer that gets special tokens beside its vocabulary."""
    return ([texts_key, list(tokens)], partial(add_special_tokens, tokens=tokens)) if tokens else (texts_key, None)


def _choice(args: DataArguments, texts: Iterable[str]) -> TokenizerChoice:
    """Return which tokenizer to train: as the options say, and for the rest as it suits the text."""
    if args.tokenizer_type != "auto" and args.lowercase is not None:
        return TokenizerChoice(args.tokenizer_type, args.lowercase, "as the options say")
    kind, lowercase, reason = choose_tokenizer(texts)
    if args.tokenizer_type != "auto":
        kind, reason = args.tokenizer_type, f"as tokenizer_type says; {reason}"
    if args.lowercase is not None:
        lowercase, reason = args.lowercase, f"{reason}; the case as lowercase says"
    return TokenizerChoice(kind, lowercase, reason)


def _read_record(output_dir: Path) -> dict[str, Any]:
    """Return the record of the tokenizer that was trained into a folder; empty if there is none."""
    record = read_object(output_dir / _TOKENIZER_RECORD)
    return record if "choice" in record else {}


def word_segmenter(args: DataArguments) -> Segmenter | None:
    """Return what finds words in text without spaces, None where the options name none."""
    return None if args.word_segmenter is None else NamedSegmenter(args.word_segmenter)


def say(line: str) -> None:
    """Print a line, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def check_unknown(
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    unknown: UnknownCount,
    texts: Iterable[str],
    where: str = "the text to train on",
) -> None:
    """Show how much of the text the tokenizer does not know, and refuse text of which it knows too little.

    Args:
        args: Options with ``max_unknown_share``.
        tokenizer: The tokenizer.
        unknown: The counts of the text.
        texts: The texts, of which the first is shown in tokens, and the first that are unknown in parts.
        where: Which text it is.

    Raises:
        InputError: If the share of unknown characters is greater than ``args.max_unknown_share``.
    """
    share = f"{unknown.share:.2%} of the characters"
    say(f"unknown tokens: {unknown.unknown_tokens:,} of {unknown.tokens:,} in {where}, for {share}")
    first = next((text for text in texts if text and text.strip()), "")
    say(f"a text in tokens: {' '.join(_first_tokens(first, tokenizer))}")
    if unknown.share <= _NOTABLE_SHARE:
        return
    shown = ", ".join(repr(part) for part in _unknown_parts(texts, tokenizer))
    what = f"{share} of {where} are unknown to the tokenizer ({shown})"
    cure = "name a tokenizer that knows them with --tokenizer_name, or train one with --tokenizer_type bpe or unigram"
    if unknown.share > args.max_unknown_share:
        limit = f"max_unknown_share={args.max_unknown_share:g}"
        raise InputError(f"{what}, more than {limit}: {cure}; or allow it with a greater --max_unknown_share")
    logger.warning(f"{what}: {cure}")


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the first tokens of a text, those of bytes as the characters that they are."""
    encoding = tokenizer(encodable(text[:1000]), add_special_tokens=False, verbose=False)
    tokens: list[str] = tokenizer.convert_ids_to_tokens(encoding["input_ids"][:_SHOWN_TOKENS])
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return tokens
    return [tokenizer.convert_tokens_to_string([token]).replace(" ", "Ġ") for token in tokens]


def _unknown_parts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the beginnings of the first different parts of the texts that are unknown."""
    found: dict[str, None] = {}
    for text in itertools.islice(texts, 1000):
        text = encodable((text or "")[:10_000])
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id and stop > start:
                found[text[start : min(stop, start + 20)]] = None
        if len(found) >= _SHOWN:
            break
    return list(found)[:_SHOWN]


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer_name={name!r} can not be loaded: {one_line(error, line=0)}") from error


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
    record = {} if output_dir is None else _read_record(Path(output_dir))
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


def count_unknown(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> UnknownCount:
    """Count the unknown characters in the first million characters of texts."""
    unknown, parts = UnknownCount(), clipped(texts, _STREAM_CHARACTERS)
    while batch := list(itertools.islice(parts, _BATCH_TEXTS)):
        tokenize_texts(batch, tokenizer, unknown=unknown)
    return unknown


class StreamTokenizing:
    """Tokenizes the texts of a stream and counts unknown characters; warns once in each process if there are too many.

    Args:
        args: Options with ``max_unknown_share`` and ``word_segmenter``.
        tokenizer: The tokenizer.
    """

    def __init__(self, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenize = partial(tokenize_texts, tokenizer=tokenizer, word_segmenter=word_segmenter(args))
        self._max_share = args.max_unknown_share
        self.unknown = UnknownCount()
        self._has_warned = False

    def __call__(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        """Return the columns of the texts, as `tokenize_texts` does."""
        columns = self._tokenize(texts, unknown=self.unknown)
        is_much = self.unknown.share > self._max_share and self.unknown.characters >= _STREAM_CHARACTERS
        if is_much and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{self.unknown.share:.1%} of the {self.unknown.characters:,} characters that were read so far are unknown "
                f"to the tokenizer, more than max_unknown_share={self._max_share:g}: the stream is unlike its beginning"
            )
        return columns


def first_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts, as many as a tokenizer needs."""
    room = _TOKENIZER_CHARACTERS
    for text in texts:
        yield text
        room -= len(text)
        if room <= 0:
            return
