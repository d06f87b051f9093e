"""Documents of several files with the place that each came from, one after the other or in groups of about one size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_pretrain.data.file_search import pipe_digest
from hf_pretrain.data.text_files import DocumentSeparator, read_documents, resolve_paths


class NumberedDocument(NamedTuple):
    """A document: its text, the name of its file and which of the file's documents it is, from 0."""

    source: str
    number: int
    text: str


def numbered_documents(
    paths: str | Path | Sequence[str | Path],
    *,
    document_separator: DocumentSeparator = "blank_line",
    text_column: str = "text",
) -> Iterator[NumberedDocument]:
    """Read documents as `read_documents` does, each with its place.

    Args:
        paths: Files, folders and globs.
        document_separator: What ends a document of a text file.
        text_column: Name of the field or column that holds the text.

    Yields:
        The documents; ``source`` is the path below the folder that all the files lie in.

    Raises:
        InputError: As `read_documents`.
    """
    files = resolve_paths(paths)
    places = [Path(file).resolve() for file in files if pipe_digest(file) is None]
    root = os.path.commonpath([place.parent for place in places]) if places else ""
    for file in files:
        is_piped = pipe_digest(file) is not None
        source = Path(file).name if is_piped else Path(file).resolve().relative_to(root).as_posix()
        texts = read_documents(file, document_separator=document_separator, text_column=text_column)
        for number, text in enumerate(texts):
            yield NumberedDocument(source, number, text)


def in_groups(documents: Iterable[NumberedDocument], *, num_characters: int) -> Iterator[list[NumberedDocument]]:
    """Yield neighbouring documents together, until they reach so many characters."""
    group: list[NumberedDocument] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= num_characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def excerpt(text: str, *, num_characters: int = 72) -> str:
    """Return the beginning of a text on one line, with an ellipsis where something is left out."""
    line = " ".join(text[: 4 * num_characters].split())
    return (
        line if len(line) <= num_characters and len(text) <= 4 * num_characters else f"{line[: num_characters - 1]}…"
    )
