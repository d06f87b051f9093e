"""Tokenize a corpus once, on all cores and on several machines, for any number of runs.

    hf-pretrain prepare --train_file corpus/ --tokenizer_name bert-base-uncased --output_dir prepared
    hf-pretrain prepare --train_file corpus/ --tokenizer_name bert-base-uncased --output_dir prepared --shard 3/16
    hf-pretrain mlm --prepared_data prepared --output_dir my-bert

A run with --prepared_data has the same tokenizer, documents, held-out documents and examples, to the bit, as one that reads the
text with the same options. All of its processes open the folder at once, map it into memory and wait for nothing. Blocks are cut
by the run: --block_size and --block_mode are its options.

The text is cut into pieces of 4 to 256 MB. A piece is written whole or not at all, so a stopped command, started again, makes
those that are missing. With --shard each of several machines makes a part of the pieces in one shared folder; the last one to
end, or the same command without --shard, joins them. The bytes do not depend on the number of processes or machines. Every
machine reads all of the text. Other text or other options are refused.

Memory: about 80 bytes a document, most while the held-out ones are chosen, and a megabyte of text with its tokens a process. The
stored text is mapped: its pages count as resident memory, and the system takes them back where it needs them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.commands import of_data, parse_command
from hf_pretrain.data.arguments import OF_PREPARING, OF_TOKENIZER, DataArguments
from hf_pretrain.data.documents.documents import UnknownCount
from hf_pretrain.data.prepare import Texts, common_description, read_texts
from hf_pretrain.data.prepared import (
    MANIFEST,
    PARTS,
    PLAN,
    TOKENIZER,
    VERSION,
    PieceWriter,
    check_plan,
    join_pieces,
    key_of,
    measure,
    piece_bounds,
    pieces_of,
    plan_key,
    start_worker,
    total_unknown,
    write_piece,
    written_piece,
)
from hf_pretrain.data.run_tokenizer import (
    RepeatableTexts,
    adding,
    check_unknown,
    count_unknown,
    first_texts,
    run_tokenizer,
    shuffled_texts,
    word_segmenter,
)
from hf_pretrain.errors import InputError, RunError, check_numbers
from hf_pretrain.files import PART, held_folder, write_text
from hf_pretrain.options import option
from hf_pretrain.training.program import print_table

_LOCK = "_lock"
_OWN = (PLAN, MANIFEST, TOKENIZER, *PARTS)


@dataclass
class PrepareArguments:
    """What to read, with which tokenizer, where to write and in how many processes."""

    ranges: ClassVar[dict[str, str]] = {"num_workers": "[1, 1024]"}

    output_dir: str = option(
        help="Folder to write to, for --prepared_data; on several machines one that all of them see."
    )
    train_file: list[str] | None = of_data("train_file")
    validation_file: list[str] | None = of_data("validation_file")
    dataset_name: str | None = of_data("dataset_name")
    dataset_config_name: str | None = of_data("dataset_config_name")
    dataset_split: str = of_data("dataset_split")
    demo_corpus: bool = of_data("demo_corpus")
    text_column: str = of_data("text_column")
    document_separator: Literal["blank_line", "line", "file"] = of_data("document_separator")
    on_bad_text: Literal["refuse", "skip"] | None = of_data("on_bad_text")
    validation_fraction: float = of_data("validation_fraction")
    split_seed: int = of_data("split_seed")
    max_corpus_bytes: int | None = of_data("max_corpus_bytes")
    tokenizer_name: str | None = of_data("tokenizer_name")
    tokenizer_type: Literal["auto", "wordpiece", "bpe", "unigram", "word"] = option(
        "auto",
        "Kind of tokenizer to train: as BERT's, RoBERTa's or SentencePiece's, or whole words (ELMo); 'auto' takes the one that "
        "suits the text.",
    )
    vocab_size: int = of_data("vocab_size")
    lowercase: bool | None = of_data("lowercase")
    strip_accents: bool = of_data("strip_accents")
    added_tokens: list[str] | None = option(
        None, "Special tokens of a tokenizer to train beside its vocabulary, such as the sentinels of T5's noise."
    )
    max_unknown_share: float = of_data("max_unknown_share")
    word_segmenter: str | None = of_data("word_segmenter")
    num_workers: int | None = option(None, "Processes that tokenize; by default one a core.")
    shard: str | None = option(
        None,
        "Make the part I/N of the pieces, on the I-th of N machines; without --tokenizer_name the first trains one.",
    )
    overwrite_output_dir: bool = option(False, "Replace what prepare wrote to output_dir with other text or options.")

    def __post_init__(self) -> None:
        """Refuse what a training would refuse, and a shard that is none.

        Raises:
            InputError: If two options contradict each other, a number is out of range, or no text is named.
        """
        check_numbers(self)
        self.data.check_named()
        if self.added_tokens and self.tokenizer_name is not None:
            raise InputError(
                f"added_tokens={self.added_tokens} are of a tokenizer to train, and tokenizer_name={self.tokenizer_name!r} is "
                "there: leave one of them out"
            )
        number, of = self.shard_number
        if not 1 <= number <= of:
            raise InputError(f"shard={self.shard!r} is none of {of}: number them from 1/{of} to {of}/{of}")
        if self.overwrite_output_dir and self.shard is not None:
            raise InputError(
                f"overwrite_output_dir=True would remove what the other shards wrote, and shard={self.shard!r}: leave one of "
                "them out"
            )

    @property
    def data(self) -> DataArguments:
        """The options as those of a training."""
        known = {known.name for known in fields(DataArguments)} & vars(self).keys()
        return DataArguments(**{name: getattr(self, name) for name in known})

    @property
    def shard_number(self) -> tuple[int, int]:
        """The number of the shard, from 1, and how many there are."""
        if self.shard is None:
            return 1, 1
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        if found is None:
            raise InputError(f"shard={self.shard!r}: write I/N, such as 3/16 for the third of 16 machines")
        return int(found[1]), int(found[2])


ARGUMENTS = (PrepareArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read, tokenize, write and report; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="prepare", description=__doc__)
    manifest = prepare_folder(args)
    if manifest is not None:
        _print_report(manifest, args.output_dir)


def prepare_folder(args: PrepareArguments) -> dict[str, Any] | None:
    """Write the pieces of a corpus that are missing, or those of a shard, and join them if all are there.

    Args:
        args: The options.

    Returns:
        The manifest; None if pieces of other shards are missing.

    Raises:
        InputError: If the text cannot be read, the folder was begun with other text or options, or it is in use.
        RunError: If a process that tokenizes was killed.
    """
    folder = Path(args.output_dir)
    _check_folder(folder)
    number, of = args.shard_number
    if number > 1 and args.tokenizer_name is None and not (folder / PLAN).is_file():
        raise InputError(
            f"shard={args.shard!r} finds no tokenizer in output_dir={args.output_dir!r}: start shard 1/{of} first, which trains "
            "one, or name one with --tokenizer_name"
        )
    with held_folder(folder, lock=_LOCK if args.shard is None else f"{_LOCK}-{number}-of-{of}"):
        if args.overwrite_output_dir:
            _remove(folder)
        texts = read_texts(args.data)
        sample = RepeatableTexts(lambda: first_texts(shuffled_texts(texts.train, seed=args.split_seed)))
        writer, facts = _planned(args, folder, texts, sample)
        pieces = pieces_of(writer.plan)
        key = plan_key(writer.plan)
        _write(
            writer,
            [piece for piece in pieces[number - 1 :: of] if written_piece(folder, *piece, key=key) is None],
            args,
        )
        missing = sum(written_piece(folder, *piece, key=key) is None for piece in pieces)
        if missing:
            print(
                f"{len(pieces) - missing:,} of {len(pieces):,} pieces are written: the other shards write the rest",
                flush=True,
            )
            return None
        check_unknown(args.data, writer.tokenizer, _unknown(folder, writer.plan), sample)
        return join_pieces(folder, writer.plan, **facts)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything else than prepared data."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={str(folder)!r} is a file: name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    other = next(
        (name for name in names if name not in _OWN and not name.startswith(_LOCK) and PART not in name), None
    )
    if other is not None:
        raise InputError(f"output_dir={str(folder)!r} holds {other}, which is not of prepare: name another")


def _remove(folder: Path) -> None:
    # The manifest first: a folder without it is not opened.
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)
    for name in (TOKENIZER, *PARTS):
        shutil.rmtree(folder / name, ignore_errors=True)


def _planned(
    args: PrepareArguments, folder: Path, texts: Texts, sample: RepeatableTexts
) -> tuple[PieceWriter, dict[str, Any]]:
    """Return the writer of the pieces, with the plan that it follows, and facts for the manifest."""
    parts = dict(zip(PARTS, (texts.train, texts.held_out), strict=True))
    found = {name: part for name, part in parts.items() if part is not None}
    measured = {name: measure(part) for name, part in found.items()}
    names = [*OF_PREPARING, *(OF_TOKENIZER if args.tokenizer_name is None else ())]
    plan: dict[str, Any] = {
        "version": VERSION,
        "options": {name: getattr(args, name) for name in names},
        "text": {name: part.facts for name, part in measured.items()},
    }
    # Before a tokenizer is trained on another text in the place of that which is there.
    check_plan(folder, plan)
    tokenizer = _tokenizer(args, folder, sample, plan["text"]["train"]["digest"])
    plan |= {"tokenizer": key_of(tokenizer), "pieces": piece_bounds(measured)}
    check_plan(folder, plan)
    sampled = count_unknown(sample, tokenizer)
    if sampled.share > 2 * args.max_unknown_share:
        # Far too much: it would be refused in the end.
        check_unknown(args.data, tokenizer, sampled, sample, "the first of the text")
    if not (folder / PLAN).is_file():
        write_text(folder / PLAN, json.dumps(plan) + "\n")
    facts = common_description(args.data, tokenizer, texts.source, texts.held_out_source, folder / TOKENIZER)
    noted = ("source", "held_out_source", "tokenizer_reason")
    num_bytes = {name: part.num_bytes for name, part in measured.items()}
    writer = PieceWriter(folder, plan, found, num_bytes, tokenizer, word_segmenter(args.data))
    return writer, {name: facts[name] for name in noted if name in facts}


def _tokenizer(args: PrepareArguments, folder: Path, sample: RepeatableTexts, digest: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which is written to the folder."""
    path = folder / TOKENIZER
    tokenizer = run_tokenizer(args.data, path, None, sample, *adding(digest, args.added_tokens or ()))
    if args.tokenizer_name is not None and not (folder / PLAN).is_file():
        tokenizer.save_pretrained(path)
    return tokenizer


def _write(writer: PieceWriter, pieces: list[tuple[str, int]], args: PrepareArguments) -> None:
    """Write pieces in several processes."""
    if not pieces:
        return
    for part in PARTS:
        # Of processes that were killed; those of machines that still run have another name.
        for unfinished in (writer.folder / part).glob(f"*{PART}"):
            if args.shard is None:
                unfinished.unlink(missing_ok=True)
    num_workers = min(args.num_workers or num_cores(), len(pieces))
    total = sum(int(writer.num_bytes[part][slice(*writer.bounds(part, number))].sum()) for part, number in pieces)
    pool = None if num_workers == 1 else _pool(writer, num_workers)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="Tokenizing", delay=2, disable=None) as progress,
        nullcontext() if pool is None else pool,
    ):
        if pool is None:
            for piece in pieces:
                progress.update(writer.write(*piece))
            return
        futures = [pool.submit(write_piece, piece) for piece in pieces]
        try:
            for future in as_completed(futures):
                progress.update(future.result())
        except BrokenProcessPool as error:
            raise RunError(
                "a process that tokenizes was killed, perhaps for its memory: start the same command again, with fewer "
                f"--num_workers than {num_workers}; the pieces that are written stay"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(writer: PieceWriter, num_workers: int) -> ProcessPoolExecutor:
    """Return processes that write pieces."""
    # As 🤗 datasets does: a fork has the imports and the texts, which take another start seconds.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker, initargs=(writer,))


def _unknown(folder: Path, plan: Mapping[str, Any]) -> UnknownCount:
    """Return the counts of the text to train on."""
    key, (part, *_) = plan_key(plan), PARTS
    found = [written_piece(folder, part, number, key=key) for number in range(len(plan["pieces"][part]) - 1)]
    return total_unknown([piece for piece in found if piece is not None])


def _print_report(manifest: dict[str, Any], output_dir: str) -> None:
    rows = []
    for name in PARTS:
        if part := manifest.get(name):
            sizes = (part["documents"], part["unknown"]["tokens"], part["bytes"], part["characters"])
            share = UnknownCount(**part["unknown"]).share
            rows.append((name.replace("_", " "), *(f"{size:,}" for size in sizes), f"{share:.2%}"))
    print_table(rows, header=("", "documents", "tokens", "bytes", "characters", "unknown"))
    print(f"\nprepared  {output_dir}  (for --prepared_data)")
