"""A corpus that is on every machine: the docstrings of the standard library and of the installed packages."""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_pretrain.data import draws
from hf_pretrain.data.text.datasets import generate_dataset
from hf_pretrain.errors import InputError, check_range

_LEAST_CHARACTERS = 200
_NOT_OURS = {"__pycache__", "site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_documents(*, max_bytes: int | None = None, seed: int = 0) -> Iterator[str]:
    """Yield the docstrings of each installed Python module as one document, in a keyed random order.

    The files are parsed, never imported. A document is the docstrings of a module in the order of the source, with
    their indentation removed and blank lines in between. Modules that do not parse, have fewer than 200 characters of
    docstrings or repeat the documents of another are left out. The same environment gives the same documents.

    Args:
        max_bytes: Most bytes of all documents together in UTF-8. One that does not fit any more is passed over until
            nine tenths are filled; then the first that does not fit is the end. What comes before is a sample of all
            in which documents are rarer that are long beside this number.
        seed: Key of the order.

    Raises:
        InputError: If there is no document, or none that fits ``max_bytes``.
    """
    files = _source_files()
    order = draws.permutation(len(files), seed=seed, stream="docstring corpus")
    seen: set[bytes] = set()
    num_bytes = 0
    for number in tqdm(order.tolist(), desc="Reading docstrings", unit=" files", delay=2, disable=None):
        document = module_docstrings(files[number][1])
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if len(document) < _LEAST_CHARACTERS or digest in seen:
            continue
        size = len(document.encode())
        if max_bytes is not None and num_bytes + size > max_bytes:
            if num_bytes >= 0.9 * max_bytes:
                break
            continue
        num_bytes += size
        seen.add(digest)
        yield document
    if not seen:
        raise InputError(
            f"max_corpus_bytes={max_bytes} leaves no docstring of {len(files)} Python files; use more bytes"
        )


def module_docstrings(path: Path) -> str:
    """Return the docstrings of a Python file, cleaned and joined by blank lines; empty if it can not be parsed."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return ""
        with warnings.catch_warnings(), _no_collection():
            warnings.simplefilter("ignore")
            nodes = _documented_nodes(ast.parse(source))
            found = [text for node in nodes if (text := ast.get_docstring(node)) and _is_text(text)]
            del nodes
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return "\n\n".join(found)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Spare the garbage collector the many nodes of a syntax tree, which have no cycles: half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _documented_nodes(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the nodes that may have a docstring in the order of the source; they stand in statements only."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED):
            yield node
        blocks = (getattr(node, name, None) for name in ("body", "handlers", "orelse", "finalbody", "cases"))
        inner = [child for block in blocks if isinstance(block, list) for child in block]
        pending.extend(reversed(inner))


def _is_text(docstring: str) -> bool:
    try:
        return b"\0" not in docstring.encode()
    except UnicodeEncodeError:
        return False


def _source_files() -> list[tuple[str, Path]]:
    """Return all Python files of the environment as (name that does not depend on the machine, path), sorted."""
    paths = sysconfig.get_paths()
    roots = {Path(paths[name]).resolve(): name for name in ("platlib", "purelib", "stdlib")}
    files = []
    for root, name in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [sub for sub in subfolders if sub not in _NOT_OURS]
            inside = Path(folder)
            for file in names:
                # A link may lead nowhere.
                if file.endswith(".py") and (inside / file).is_file():
                    files.append((f"{name}/{(inside / file).relative_to(root).as_posix()}", inside / file))
    return sorted(files)


def docstring_dataset(
    *, max_bytes: int | None = None, seed: int = 0, cache_dir: str | None = None
) -> datasets.Dataset:
    """Return `docstring_documents` as a dataset with the one column ``text``, read once an environment."""
    stamps = [(name, status.st_size, status.st_mtime_ns) for name, path in _source_files() if (status := path.stat())]
    options = {"max_bytes": max_bytes, "seed": seed}
    return generate_dataset(docstring_documents, options, key=(stamps, options), cache_dir=cache_dir)


def split_held_out(num_documents: int, fraction: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose the documents that are held out from training.

    Args:
        num_documents: Documents in the corpus.
        fraction: Share to hold out, at least one document and never all.
        seed: Key of the choice.

    Returns:
        Rows to train on and rows to hold out: ascending ``int64`` arrays that share no row and together have all.

    Raises:
        InputError: If the fraction is not in ``[0, 1)``, or there are too few documents to hold one out.
    """
    check_range(fraction, "[0, 1)", name="validation_fraction", hint="0.02 is usual, 0 holds nothing out")
    num_held_out = max(1, round(num_documents * fraction)) if fraction else 0
    if num_held_out and num_held_out >= num_documents:
        raise InputError(
            f"validation_fraction={fraction} can not hold out a document of {num_documents}: give a validation_file, "
            "separate documents by blank lines, say document_separator=line if each line is one, or hold nothing out with 0"
        )
    order = draws.permutation(num_documents, seed=seed, stream="held out")
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
