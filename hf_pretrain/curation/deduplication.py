"""Deduplication from files to files: JSON lines of the documents that repeat no other, and a report of those left out.

`deduplicate_files` claims the output folder and reads the documents in groups. `Deduplicator` finds those that repeat an earlier
one; the others are written into shards, and the report comes last.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_pretrain.curation.near_duplicates import Deduplicator
from hf_pretrain.data.text.files import (
    DocumentSeparator,
    NumberedDocument,
    excerpt,
    in_groups,
    numbered_documents,
)
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError
from hf_pretrain.files import held_folder

DOCUMENTS = "documents"
"""Folder of the documents that were kept, in the output folder: apart from the report, which is JSON too."""
REPORT = "deduplication.json"

# Written while the documents are; renamed in the end.
_UNFINISHED = "documents.unfinished"
_LOCK = "_lock"
_SHARD = re.compile(r"\d{5,}\.jsonl")
_GROUP_CHARACTERS = 1 << 18
_MOST_CLUSTERS = 10


def deduplicate_files(
    train_file: str | Path | Sequence[str | Path],
    *,
    output_dir: str | Path,
    against: str | Path | Sequence[str | Path] | None = None,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
    shard_bytes: int = 1 << 28,
    **options: Any,
) -> dict[str, Any]:
    """Write the documents that repeat no other and are in no text against which they are held.

    The documents lie in ``documents/00000.jsonl`` and so on, in the order in which they were read, a JSON object each:
    the text as ``text_column``, and the ``source`` and ``number`` of `NumberedDocument`. What is returned is also
    written to ``deduplication.json``, last of all; the same files and options give the same bytes.

    Args:
        train_file: Files, folders or globs to read.
        output_dir: Folder to write to; it is made if need be.
        against: Text, such as that held out for evaluation, that is compared with but not written.
        document_separator: What ends a document of a text file.
        text_column: Name of the field or column that holds the text.
        shard_bytes: Most bytes of a written file, unless a document alone has more.
        options: Of `Deduplicator`.

    Returns:
        The options; how many documents and bytes there are by what became of them; the files written; and the documents
        with the most repetitions. Memory grows with the number of documents that are kept, and with the longest one.

    Raises:
        InputError: As `read_documents` and `Deduplicator`, or if the folder is in use, a file lies in it, or ``against``
            names a file of ``train_file``. What was written by then is removed.
    """
    deduplicator = Deduplicator(**options)
    folder = Path(output_dir)
    # Once, before anything is written: the output folder may lie in a folder that is read.
    files = resolve_paths(train_file)
    references = [] if against is None else resolve_paths(against)
    _check_files(files, references, folder)
    reading: dict[str, Any] = {"document_separator": document_separator, "text_column": text_column}
    collector = _Collector(deduplicator)
    with _claimed(folder):
        for group in _groups(references, "Reading what to hold against", reading):
            collector.add_references(group)
        kept = (document for group in _groups(files, "Comparing", reading) for document in collector.kept(group))
        written = _write(kept, folder / _UNFINISHED, text_column=text_column, shard_bytes=shard_bytes)
        report = {
            "options": deduplicator.options | reading,
            "counts": collector.counts,
            "files": written,
            "clusters": collector.largest_clusters(),
        }
        (folder / _UNFINISHED).rename(folder / DOCUMENTS)
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _check_files(train_file: Sequence[str], against: Sequence[str], folder: Path) -> None:
    files, others = ({Path(path).resolve() for path in paths} for paths in (train_file, against))
    if both := files & others:
        raise InputError(
            f"against={str(min(both))!r} is in train_file too: nothing of it would be left; take it out of one"
        )
    for name, paths in (("train_file", files), ("against", others)):
        inside = [path for path in sorted(paths) if folder.resolve() in path.parents]
        if inside:
            raise InputError(
                f"{name}={str(inside[0])!r} lies in output_dir={str(folder)!r}: name a folder to write to that is not read"
            )


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold an empty folder for this process alone; where what is done in it fails, leave none of its files behind.

    Raises:
        InputError: If the folder is no folder or not empty, or another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={str(folder)!r} is a file: name a folder")
    is_new = not folder.exists()
    try:
        with held_folder(folder, lock=_LOCK), _nothing_left_behind(folder):
            yield
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def _nothing_left_behind(folder: Path) -> Iterator[None]:
    """Refuse a folder that is not empty, and remove what was written where a run fails."""
    try:
        if any(path.name not in (_UNFINISHED, _LOCK) for path in folder.iterdir()):
            raise InputError(f"output_dir={str(folder)!r} is in use, for it is not empty: name another")
        # Left by a process that was killed: it would hold the lock if it still ran.
        _remove_unfinished(folder / _UNFINISHED)
        yield
    except BaseException:
        if (folder / DOCUMENTS).is_dir() and not (folder / REPORT).is_file():
            (folder / DOCUMENTS).rename(folder / _UNFINISHED)
        _remove_unfinished(folder / _UNFINISHED)
        raise


def _remove_unfinished(folder: Path) -> None:
    """Remove what was written by a run that did not come to its end, and nothing else.

    Raises:
        InputError: If there is anything else.
    """
    if not folder.is_dir():
        return
    paths = sorted(folder.iterdir())
    other = next((path for path in paths if not (_SHARD.fullmatch(path.name) and path.is_file())), None)
    if other is not None:
        raise InputError(f"output_dir={str(folder.parent)!r} holds {other}, which is not of deduplicate: name another")
    for path in paths:
        path.unlink()
    folder.rmdir()


def _groups(paths: Sequence[str], what: str, reading: dict[str, Any]) -> Iterator[list[NumberedDocument]]:
    if not paths:
        return iter(())
    documents = numbered_documents(paths, **reading)
    progress = tqdm(documents, desc=what, unit=" documents", delay=2, disable=None)
    return in_groups(progress, num_characters=_GROUP_CHARACTERS)


class _Collector:
    """Counts what becomes of the documents, and which have the most repetitions."""

    def __init__(self, deduplicator: Deduplicator) -> None:
        self._deduplicator = deduplicator
        self._num_references = 0
        self._firsts: list[int] = []  # number of the first document of each source
        self._sources: list[tuple[str, bool]] = []  # and what it is called, and whether it is held against
        self._repetitions: Counter[int] = Counter()
        self._excerpts: dict[int, str] = {}
        names = ("against", "read", "exact_duplicates", "near_duplicates", "in_against", "kept")
        self.counts = {name: {"documents": 0, "bytes": 0} for name in names}

    def add_references(self, documents: Sequence[NumberedDocument]) -> None:
        self._note_sources(documents, are_references=True)
        self._deduplicator.add_references([document.text for document in documents])
        self._num_references = self._deduplicator.num_documents
        for document in documents:
            self._count("against", document)

    def kept(self, documents: Sequence[NumberedDocument]) -> list[NumberedDocument]:
        """Return those of the documents that repeat none before."""
        self._note_sources(documents, are_references=False)
        matches = self._deduplicator.compare([document.text for document in documents])
        for document, match in zip(documents, matches, strict=True):
            self._count("read", document)
            kind = f"{match.kind}_duplicates" if match.kind != "kept" else "kept"
            self._count("in_against" if match.original < self._num_references else kind, document)
            if match.kind != "kept":
                self._repetitions[match.original] += 1
                self._excerpts.setdefault(match.original, excerpt(document.text))
        return [document for document, match in zip(documents, matches, strict=True) if match.kind == "kept"]

    def _count(self, name: str, document: NumberedDocument) -> None:
        self.counts[name]["documents"] += 1
        self.counts[name]["bytes"] += len(document.text.encode())

    def _note_sources(self, documents: Sequence[NumberedDocument], *, are_references: bool) -> None:
        for number, document in enumerate(documents, self._deduplicator.num_documents):
            if document.number == 0:
                self._firsts.append(number)
                self._sources.append((document.source, are_references))

    def largest_clusters(self) -> list[dict[str, Any]]:
        """Return the documents with the most repetitions: where they are, how many, and how one of these begins."""
        order = sorted(self._repetitions, key=lambda number: (-self._repetitions[number], number))
        clusters = []
        for number in order[:_MOST_CLUSTERS]:
            position = bisect_right(self._firsts, number) - 1
            source, is_reference = self._sources[position]
            cluster = {"source": source, "number": number - self._firsts[position], "against": is_reference}
            clusters.append(cluster | {"removed": self._repetitions[number], "excerpt": self._excerpts[number]})
        return clusters


def _write(
    documents: Iterable[NumberedDocument], folder: Path, *, text_column: str, shard_bytes: int
) -> list[dict[str, Any]]:
    """Write documents to JSON-lines files of a new folder; return name, documents and bytes of each file."""
    folder.mkdir(parents=True)
    files: list[dict[str, Any]] = []
    with ExitStack() as opened:
        for document in documents:
            row = {"source": document.source, "number": document.number, text_column: document.text}
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if not files or files[-1]["bytes"] + len(line) > shard_bytes:
                opened.close()
                name = f"{len(files):05d}.jsonl"
                stream = opened.enter_context((folder / name).open("wb"))
                files.append({"name": f"{DOCUMENTS}/{name}", "documents": 0, "bytes": 0})
            stream.write(line)
            files[-1]["documents"] += 1
            files[-1]["bytes"] += len(line)
    return files
