"""Documents that are tokenized before training: the folder that `hf-pretrain prepare` writes and any number of runs open.

    tokenizer/               the tokenizer
    plan.json                what is prepared: options, sizes and digests of the text, the pieces that it is cut into
    train/00000.arrow        the documents of a piece as an Arrow stream, and 00000.json, its counts, which is written after it
    train/doc_id.arrow       the numbers of all documents
    held_out/                the same of the documents that are held out
    prepared.json            the manifest, written last

Pieces are the unit of work: each is written by one process, whole or not at all, and its bytes depend on the plan alone. So any
number of processes and machines may write them, a stopped run goes on with those that are missing, and the result is the same.
Training maps the files into memory: no process copies them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES, UnknownCount, document_rows, tokenizer_key
from hf_pretrain.data.documents.words import Segmenter
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import PART, first_difference, flush_path, read_object, write_text

PLAN, MANIFEST, TOKENIZER = "plan.json", "prepared.json", "tokenizer"
PARTS = ("train", "held_out")
"""Folders of the documents to train on and of those held out."""

_DOC_IDS = "doc_id.arrow"
# Raise it when the files of the folder change.
VERSION = 1
_ROWS = datasets.Features({name: kind for name, kind in DOCUMENT_FEATURES.items() if name != "doc_id"})
_NUMBERS = datasets.Features({"doc_id": DOCUMENT_FEATURES["doc_id"]})
# About so many pieces, each of at least and at most so many bytes of text.
_PIECES, _LEAST_BYTES, _MOST_BYTES = 256, 1 << 22, 1 << 28
# Bytes of text that are tokenized together: a worker holds the tokens of these and no more.
_GROUP_BYTES = 1 << 20
# Of long documents a batch is large, and one of a selection is a copy.
_BATCH_ROWS = 256
_BATCH_NUMBERS = 1 << 20
_SECONDS_TO_WATCH = 1.0


# What is prepared


@dataclass(frozen=True)
class Measured:
    """Sizes of a part of the text.

    Attributes:
        num_bytes: Bytes of each text in UTF-8, ``int64 [num_texts]``.
        facts: Number of ``texts``, ``bytes`` and ``characters`` of all, and a ``digest`` of them in their order.
    """

    num_bytes: np.ndarray
    facts: dict[str, Any]


def measure(texts: datasets.Dataset) -> Measured:
    """Read texts once, for their sizes and a digest by which a changed text is known.

    Args:
        texts: Dataset with the column ``text``.
    """
    digest, lengths, characters = xxhash.xxh3_128(), [np.empty(0, np.int64)], 0
    batches = texts.select_columns(["text"]).with_format("arrow").iter(batch_size=_BATCH_ROWS)
    total = -(-len(texts) // _BATCH_ROWS)
    for batch in tqdm(batches, desc="Measuring text", total=total, delay=2, disable=None):
        column = pc.fill_null(batch["text"], "")
        lengths.append(pc.binary_length(column).to_numpy().astype(np.int64))
        characters += pc.sum(pc.utf8_length(column)).as_py() or 0
        digest.update(lengths[-1].data.cast("B"))
        for chunk in column.chunks:
            digest.update(_bytes_of(chunk))
    num_bytes = np.concatenate(lengths)
    facts = {
        "texts": len(texts),
        "bytes": int(num_bytes.sum()),
        "characters": characters,
        "digest": digest.hexdigest(),
    }
    return Measured(num_bytes, facts)


def _bytes_of(texts: pa.Array) -> memoryview:
    """Return the bytes of texts, one after the other."""
    _, offsets, data = texts.buffers()
    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    bounds = np.frombuffer(offsets, dtype=kind)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data or b"")[bounds[0] : bounds[-1]]


def cuts(num_bytes: np.ndarray, size: int) -> list[int]:
    """Return the bounds of runs of texts: one begins with the first text that begins behind each multiple of ``size`` bytes.

    Args:
        num_bytes: Bytes of each text, ``int64 [n]``.
        size: Bytes of a run, about.

    Returns:
        Ascending numbers of texts, the first 0 and the last ``n``.
    """
    starts = np.cumsum(num_bytes)
    starts -= num_bytes
    # None of the others lies behind the last start.
    multiples = np.arange(size, starts[-1] + 1 if len(starts) else 0, size)
    return [0, *np.unique(np.searchsorted(starts, multiples)).tolist(), len(num_bytes)]


def piece_bounds(measured: Mapping[str, Measured]) -> dict[str, list[int]]:
    """Return where the pieces of each part begin and end, which depends on the text alone."""
    total = sum(part.facts["bytes"] for part in measured.values())
    size = min(max(total // _PIECES, _LEAST_BYTES), _MOST_BYTES)
    return {name: cuts(part.num_bytes, size) for name, part in measured.items()}


def key_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what of a tokenizer decides the documents of a text."""
    return hashlib.blake2b(json.dumps(tokenizer_key(tokenizer)).encode(), digest_size=16).hexdigest()


def check_plan(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with other text or options; a new one, or one with the same, is fine.

    Args:
        folder: The folder.
        known: What is known of the plan: all but the tokenizer and the pieces, at least.

    Raises:
        InputError: Naming what differs.
    """
    plan = read_object(folder / PLAN)
    if not plan:
        return
    cure = "name another output_dir, or replace this one with --overwrite_output_dir true"
    where = f"output_dir={str(folder)!r} was begun"
    if plan.get("version") != known["version"]:
        raise InputError(f"{where} by another version of this library: {cure}")
    was, now = plan["options"], known["options"]
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            raise InputError(f"{where} with {name}={was.get(name)!r}, not {now.get(name)!r}: {cure}")
    if plan["text"] != known["text"]:
        raise InputError(f"{where} with other text, or the text has changed since: {cure}")
    if "tokenizer" in known and plan["tokenizer"] != known["tokenizer"]:
        raise InputError(f"{where} with another tokenizer: {cure}")


def plan_key(plan: Mapping[str, Any]) -> str:
    """Return the digest of a plan, by which its pieces are known."""
    return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()


# Writing


@dataclass(frozen=True)
class PieceWriter:
    """Writes pieces of documents into a folder; the same plan, text and tokenizer give the same bytes.

    Args:
        folder: The folder.
        plan: The plan, with the ``pieces`` of each part.
        texts: The texts of each part.
        num_bytes: Bytes of each of them.
        tokenizer: A fast tokenizer.
        word_segmenter: Finds words in text without spaces, see `word_starts`.
    """

    folder: Path
    plan: Mapping[str, Any]
    texts: Mapping[str, datasets.Dataset]
    num_bytes: Mapping[str, np.ndarray]
    tokenizer: PreTrainedTokenizerBase
    word_segmenter: Segmenter | None

    def bounds(self, part: str, number: int) -> tuple[int, int]:
        """Return the first text of a piece and the one behind its last."""
        low, high = self.plan["pieces"][part][number : number + 2]
        return low, high

    def write(self, part: str, number: int) -> int:
        """Write a piece; return its bytes of text."""
        low, high = self.bounds(part, number)
        lengths = self.num_bytes[part][low:high]
        unknown = UnknownCount()

        def tables() -> Iterator[pa.Table]:
            for begin, end in pairwise(cuts(lengths, _GROUP_BYTES)):
                texts = self.texts[part][low + begin : low + end]["text"]
                yield document_rows(texts, self.tokenizer, word_segmenter=self.word_segmenter, unknown=unknown)

        path = piece_path(self.folder, part, number)
        documents, size = _write_stream(path, tables(), features=_ROWS)
        facts = {"plan": plan_key(self.plan), "documents": documents, "size": size, "unknown": asdict(unknown)}
        write_text(path.with_suffix(".json"), json.dumps(facts) + "\n")
        return int(lengths.sum())


def piece_path(folder: Path, part: str, number: int) -> Path:
    """Return the path of the documents of a piece."""
    return folder / part / f"{number:05d}.arrow"


def _write_stream(path: Path, tables: Iterator[pa.Table], *, features: datasets.Features) -> tuple[int, int]:
    """Write tables to an Arrow stream, whole or not at all; return its rows and its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may write the same piece.
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{PART}")
    schema, num_rows = features.arrow_schema, 0
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in tables:
                if len(table):
                    writer.write_table(table.cast(schema))
                    num_rows += len(table)
        flush_path(unfinished)
        size = unfinished.stat().st_size
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return num_rows, size


def written_piece(folder: Path, part: str, number: int, *, key: str) -> dict[str, Any] | None:
    """Return the counts of a piece that is written; None if it is not, or belongs to another plan."""
    path = piece_path(folder, part, number)
    facts = read_object(path.with_suffix(".json"))
    is_here = facts.get("plan") == key and path.is_file() and path.stat().st_size == facts["size"]
    return facts if is_here else None


def pieces_of(plan: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return part and number of every piece."""
    return [(part, number) for part, bounds in plan["pieces"].items() for number in range(len(bounds) - 1)]


_writer: PieceWriter | None = None


def start_worker(writer: PieceWriter) -> None:
    """Make ready a process that writes pieces; it ends when the process that started it does."""
    global _writer  # noqa: PLW0603
    _writer = writer
    # There are as many processes as cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=partial(_end_with, os.getppid()), daemon=True).start()


def _end_with(parent: int) -> None:
    # A killed parent says nothing to its workers, which would wait for work forever.
    while os.getppid() == parent:
        time.sleep(_SECONDS_TO_WATCH)
    os._exit(1)


def write_piece(piece: tuple[str, int]) -> int:
    """Write a piece in a process that `start_worker` made ready; return its bytes of text."""
    assert _writer is not None
    return _writer.write(*piece)


def join_pieces(folder: Path, plan: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Number the documents of all pieces and write the manifest.

    Args:
        folder: A folder with all pieces of the plan.
        plan: The plan.
        **facts: Further facts for the manifest.

    Returns:
        The manifest.

    Raises:
        InputError: If no text of a part has a token.
    """
    key = plan_key(plan)
    manifest: dict[str, Any] = {
        "version": VERSION,
        "options": plan["options"],
        "tokenizer": plan["tokenizer"],
        **facts,
    }
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted((folder / TOKENIZER).iterdir())
    }
    for part, bounds in plan["pieces"].items():
        found = [written_piece(folder, part, number, key=key) for number in range(len(bounds) - 1)]
        pieces = [piece for piece in found if piece is not None]
        assert len(pieces) == len(found), "all pieces are there"
        num_documents = sum(piece["documents"] for piece in pieces)
        if not num_documents:
            raise InputError(
                f"texts have no tokens in {plan['text'][part]['texts']} rows; check the text and the tokenizer"
            )
        sizes = {piece_path(folder, part, number): piece["size"] for number, piece in enumerate(pieces)}
        doc_ids = folder / part / _DOC_IDS
        _, sizes[doc_ids] = _write_stream(doc_ids, _numbers(num_documents), features=_NUMBERS)
        files |= {path.relative_to(folder).as_posix(): size for path, size in sizes.items()}
        manifest[part] = {
            "documents": num_documents,
            **plan["text"][part],
            "unknown": asdict(total_unknown(pieces)),
            "documents_of_pieces": [piece["documents"] for piece in pieces],
        }
    manifest["files"] = files
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def total_unknown(pieces: Sequence[Mapping[str, Any]]) -> UnknownCount:
    """Return the counts of several pieces together."""
    names = [field.name for field in fields(UnknownCount)]
    return UnknownCount(**{name: sum(piece["unknown"][name] for piece in pieces) for name in names})


def _numbers(count: int) -> Iterator[pa.Table]:
    for low in range(0, count, _BATCH_NUMBERS):
        yield pa.table({"doc_id": np.arange(low, min(low + _BATCH_NUMBERS, count))})


# Reading


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of prepared data.

    Raises:
        InputError: If the folder is none, is not finished, lacks a file, or is of another version.
    """
    path, name = Path(folder), f"prepared_data={str(folder)!r}"
    manifest = read_object(path / MANIFEST)
    if not manifest:
        if (path / PLAN).is_file():
            raise InputError(f"{name} is not finished: start hf-pretrain prepare with the same options once more")
        raise InputError(f"{name} is no folder of hf-pretrain prepare: it has no {MANIFEST}")
    if manifest.get("version") != VERSION:
        raise InputError(f"{name} was made by another version of this library: prepare the text anew")
    if wrong := first_difference(path, manifest["files"]):
        raise InputError(f"{name} is damaged, for {wrong}: start hf-pretrain prepare with the same options once more")
    return manifest


def prepared_tokenizer(folder: str | Path, *, block_size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of prepared data.

    Args:
        folder: The folder.
        block_size: Most tokens of an example: the longest input of a tokenizer that was trained on the text, as in a run.
    """
    manifest = read_manifest(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(folder, TOKENIZER))
    except (OSError, ValueError) as error:
        raise InputError(f"prepared_data={str(folder)!r}: {one_line(error, line=0)}") from error
    if "tokenizer_reason" in manifest:
        tokenizer.model_max_length = block_size
    return tokenizer


def check_same_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prepared data of another tokenizer.

    Raises:
        InputError: If the tokens of the folder are those of another.
    """
    if key_of(tokenizer) != read_manifest(folder)["tokenizer"]:
        raise InputError(
            f"prepared_data={str(folder)!r} has the tokens of another tokenizer than {tokenizer.name_or_path!r}, which the run "
            f"uses: prepare the text with --tokenizer_name {tokenizer.name_or_path}"
        )


def open_documents(folder: str | Path, part: str) -> datasets.Dataset:
    """Return documents of prepared data, mapped into memory.

    Args:
        folder: The folder.
        part: One of `PARTS`.

    Returns:
        The dataset that `tokenize_documents` returns of the same texts: the same rows in the same order.
    """
    path, manifest = Path(folder), read_manifest(folder)
    counts = manifest[part]["documents_of_pieces"]
    pieces = [
        datasets.Dataset.from_file(str(piece_path(path, part, number))) for number, count in enumerate(counts) if count
    ]
    rows = datasets.concatenate_datasets(pieces)
    numbers = datasets.Dataset.from_file(str(path / part / _DOC_IDS))
    documents = datasets.concatenate_datasets([rows, numbers], axis=1)
    # By what the rows are made of, and not by where they lie.
    documents._fingerprint = plan_key({"part": part, "tokenizer": manifest["tokenizer"], **manifest[part]})
    return documents
