"""Files of text that paths, folders, globs and pipes stand for, and the files among them that are not read."""

from __future__ import annotations

import atexit
import functools
import glob
import json
import multiprocessing
import os
import re
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_pretrain.data.text.kinds import TEXT_SUFFIXES, file_kind, file_suffix, text_kind
from hf_pretrain.data.text.lines import has_compressed_name, readable
from hf_pretrain.errors import InputError

STANDARD_INPUT = "-"

# Files that a run writes from its first moment on, or that only a folder of a model or a checkpoint has.
_RUN_MARKS = {
    "_unfinished",
    "_tokenizer_training.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "stream_state.json",
    "training_args.bin",
    "adapter_config.json",
}
_WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
# What may lie in such a folder beside text, if text and a run share one.
_RUN_FILES = _RUN_MARKS | {
    *("_lock", "added_tokens.json", "all_results.json", "chat_template.jinja", "complete.json", "config.json"),
    *("eval_results.json", "generation_config.json", "merges.txt", "recipe.yaml", "special_tokens_map.json"),
    *("tokenizer.json", "train_results.json", "vocab.json", "vocab.txt"),
}
_RUN_FOLDERS = {"pretraining", "runs"}
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SYSTEM_FOLDERS = {"__MACOSX": "a folder of macOS", "__pycache__": "compiled Python"}
_ABOUT_TEXT = re.compile(r"(?:readme|licen[cs]e)(?:\.(?:md|txt|rst))?", re.IGNORECASE)
_REPORTS = {
    "deduplication.json": "a report of deduplicate",
    "dataset_info.json": "about the dataset",
    "dataset_infos.json": "about the dataset",
}
_BACKUP = re.compile(r".*(?:~|\.(?:bak|orig|tmp|swp|part|crdownload))|#.*#", re.IGNORECASE)
_MOST_NAMED, _MOST_KINDS = 8, 6


_shown: set[str] = set()
# Pipe -> its copy; copy -> digest of its bytes.
_copies: dict[tuple[str, int, int], str] = {}
_digests: dict[str, str] = {}


class LeftOut(NamedTuple):
    """A file or folder that is not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class FoundFiles:
    """What paths, folders, globs and pipes stand for.

    Attributes:
        paths: The files to read, each once.
        left_out: Files and folders in the folders, or of the globs, that are not read.
        searched: The folders and globs.
    """

    paths: list[str]
    left_out: list[LeftOut]
    searched: list[str]

    def summary(self) -> str:
        """Return one line that says how many files are read, and which are not."""
        kinds = Counter(_kind_name(path) for path in self.paths).most_common()
        shown = [f"{count:,} {kind}" for kind, count in kinds[:_MOST_KINDS]]
        if len(kinds) > _MOST_KINDS:
            shown.append(f"{sum(count for _, count in kinds[_MOST_KINDS:]):,} others")
        files = "1 file" if len(self.paths) == 1 else f"{len(self.paths):,} files"
        line = f"reading {files} of {_some(self.searched, most=3)} ({', '.join(shown)})"
        if self.left_out:
            line += f"; left out {len(self.left_out):,}: {described(self.left_out)}"
        return line


def described(left_out: Sequence[LeftOut]) -> str:
    """Return the names of files that are not read, with the reasons; of many, the first."""
    return _some([f"{entry.path} ({entry.reason})" for entry in left_out], most=_MOST_NAMED)


def find_files(paths: str | Path | Sequence[str | Path]) -> FoundFiles:
    """Return the files that paths, folders, globs and pipes stand for: in the order given, sorted inside of each.

    A file that is named is read or refused. In a folder or a glob, files are left out that are not
    text, that are empty or hidden, the README and the licence of the folder, copies of editors, and what training writes:
    checkpoints, models and tokenizers. A folder that `datasets.Dataset.save_to_disk` wrote is read as such.

    Args:
        paths: What to look for. ``"-"`` is the standard input; it and other pipes are copied to a file first, into the
            cache of 🤗 datasets, and the copy goes when the process ends.

    Raises:
        InputError: If one stands for no file, or for nothing but files that are not read.
    """
    files: dict[str, None] = {}
    left_out: dict[LeftOut, None] = {}
    searched = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        name = str(path)
        if not name:
            raise InputError(f"paths={paths!r} has an empty path; name a file, or . for the current folder")
        if is_pipe(path):
            files[copied_pipe(path)] = None
            continue
        with readable(name):
            found, others, is_searched = _expand(path)
        if not found:
            if is_searched and others:
                raise InputError(f"{name} has no file that is read; left out {len(others)}: {described(others)}")
            raise InputError(f"{name} is no file, no folder with text in it, and no pattern that a file matches")
        files.update(dict.fromkeys(map(str, found)))
        left_out.update(dict.fromkeys(others))
        if is_searched:
            searched.append(name)
    if not files:
        raise InputError(f"paths={paths!r} names no file")
    return FoundFiles(list(files), list(left_out), searched)


def resolve_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the paths of `find_files`; the first process prints, once, the files found in folders and by globs.

    Raises:
        InputError: As `find_files`.
    """
    found = find_files(paths)
    if found.searched and os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        line = found.summary()
        if line not in _shown:
            _shown.add(line)
            print(line, flush=True)
    return found.paths


def _expand(path: str | Path) -> tuple[list[Path], list[LeftOut], bool]:
    """Return the files of a path, those left out, and whether it is a folder or a glob."""
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} is in the home of a user who does not exist; write the path in full") from error
    if expanded.is_file():
        text_kind(expanded)
        return [expanded], [], False
    if expanded.is_dir():
        return *_folder(expanded, expanded), True
    try:
        matches = sorted(map(Path, glob.glob(str(expanded), recursive=True)))
    except (ValueError, re.error) as error:
        raise InputError(f"{str(path)!r} is no path and no pattern: {error}") from error
    found: list[Path] = []
    left_out: list[LeftOut] = []
    root = next((parent for parent in expanded.parents if not glob.has_magic(str(parent))), Path())
    inside_runs = functools.cache(functools.partial(_is_inside_run, root=root))
    names_beside = functools.cache(lambda folder: set(os.listdir(folder)))
    for match in matches:
        name = match.relative_to(root).as_posix()
        if match.is_dir():
            if "**" not in expanded.parts:
                inside, others = _folder(match, match)
                found += inside
                left_out += [entry._replace(path=f"{_shown_name(name)}/{entry.path}") for entry in others]
            continue
        reason = "of a model or a run" if inside_runs(match.parent) else ""
        reason = reason or _file_of_run(match.name, names_beside(match.parent)) or _why_not(match)
        if reason:
            left_out.append(LeftOut(_shown_name(name), reason))
        else:
            found.append(match)
    return found, left_out, bool(matches)


def _is_inside_run(folder: Path, *, root: Path) -> bool:
    """Return whether a folder below the root is that of a run, or lies in one."""
    return (
        folder != root
        and root in folder.parents
        and (_is_run(set(os.listdir(folder))) or _is_inside_run(folder.parent, root=root))
    )


def _folder(folder: Path, root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Return the files in a folder, at any depth, that are read, sorted, and those that are not."""
    found: list[Path] = []
    left_out: list[LeftOut] = []

    def leave_out(path: str | Path, reason: str, mark: str = "") -> None:
        left_out.append(LeftOut(_shown_name(Path(path).relative_to(root).as_posix()) + mark, reason))

    def refused(error: OSError) -> None:
        leave_out(error.filename, "no permission to read it", "/")

    for path, subfolders, names in os.walk(folder, onerror=refused):
        here = Path(path)
        saved = _saved_dataset(here, names)
        if saved is not None:
            splits, files = saved
            found += files
            for split in splits:
                leave_out(here / split, "another split of the dataset; name its folder", "/")
            subfolders.clear()
            continue
        siblings = {*subfolders, *names}
        for name in sorted(subfolders):
            if reason := _why_not_folder(here / name, siblings):
                subfolders.remove(name)
                leave_out(here / name, reason, "/")
        for name in sorted(names):
            reason = _file_of_run(name, siblings) or _why_not(here / name, is_top=here == root)
            if reason:
                leave_out(here / name, reason)
            else:
                found.append(here / name)
    return sorted(found), sorted(left_out)


def _why_not_folder(folder: Path, siblings: set[str]) -> str:
    """Return why a folder inside of another is not looked into; empty if it is."""
    if folder.name.startswith("."):
        return "hidden"
    if folder.name in _SYSTEM_FOLDERS:
        return _SYSTEM_FOLDERS[folder.name]
    if folder.is_symlink():
        return "a link to a folder; name it"
    if folder.name in _RUN_FOLDERS and _is_run(siblings):
        return "of a model or a run"
    try:
        return "a model or the folder of a run" if _is_run(set(os.listdir(folder))) else ""
    except OSError:
        return ""


def _is_run(names: set[str]) -> bool:
    has_model = "config.json" in names and bool(names & _WEIGHTS)
    return has_model or not names.isdisjoint(_RUN_MARKS) or any(map(_CHECKPOINT.fullmatch, names))


def _file_of_run(name: str, siblings: set[str]) -> str:
    return "of a model or a run" if name in _RUN_FILES and _is_run(siblings) else ""


def _why_not(file: Path, *, is_top: bool = False) -> str:
    """Return why a file of a folder is not read; empty if it is."""
    if file.name.startswith("."):
        return "hidden"
    if not file.is_file():
        return "a broken link" if file.is_symlink() else "no regular file"
    if is_top and _ABOUT_TEXT.fullmatch(file.name):
        return "about the text"
    if file.name in _REPORTS:
        return _REPORTS[file.name]
    if _BACKUP.fullmatch(file.name):
        return "a copy or a part of a file"
    kind = file_kind(file)
    if kind.reason:
        return kind.reason
    if kind.is_empty or (kind.format == "parquet" and _has_no_rows(file)):
        return "empty"
    if not kind.is_utf8 and kind.format in ("text", "marked_text") and file_suffix(file) not in TEXT_SUFFIXES:
        return "not text in UTF-8"
    return ""


def _has_no_rows(file: Path) -> bool:
    try:
        return pq.read_metadata(file).num_rows == 0
    except (pa.ArrowException, OSError):
        return False  # damaged: reading says how


def _saved_dataset(folder: Path, names: Sequence[str]) -> tuple[list[str], list[Path]] | None:
    """Return the splits that are not read and the files of a folder of `save_to_disk`, or None if it is none."""
    if "dataset_dict.json" in names:
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise InputError(f"{folder} is a saved dataset without a split 'train'; name the folder of a split in it")
        inside = folder / "train"
        saved = _saved_dataset(inside, os.listdir(inside) if inside.is_dir() else [])
        return [str(split) for split in splits if split != "train"], saved[1] if saved else []
    if "state.json" not in names or "dataset_info.json" not in names:
        return None
    entries = _json(folder / "state.json").get("_data_files")
    if not isinstance(entries, list):
        return None
    files = [folder / str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"{folder} is a saved dataset that lacks {missing.name}; is it whole?")
    return [], files


def _json(path: Path) -> dict[str, object]:
    with readable(path):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error}); is it whole?") from error
    return value if isinstance(value, dict) else {}


def _kind_name(path: str) -> str:
    suffix = file_suffix(path) or "without a suffix"
    return suffix + Path(path).suffix.lower() if has_compressed_name(path) else suffix


def _shown_name(name: str) -> str:
    """Return a name that can be printed on one line, whatever is in it."""
    return " ".join(os.fsencode(name).decode(errors="replace").split())


def _some(names: Sequence[str], *, most: int) -> str:
    names = [_shown_name(name) for name in names]
    shown = names if len(names) <= most else [*names[: most - 1], f"and {len(names) - most + 1:,} more"]
    return ", ".join(shown)


def is_pipe(path: str | Path) -> bool:
    """Return whether a path is the standard input or a pipe, such as that of ``<(command)``."""
    if str(path) == STANDARD_INPUT:
        return True
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def pipe_digest(path: str) -> str | None:
    """Return a digest of the copy of a pipe; None for any other file."""
    return _digests.get(path)


def copied_pipe(path: str | Path) -> str:
    """Return the file that a pipe was copied to; a pipe is read once.

    Raises:
        InputError: If there is nothing in it, it is a terminal, or this is one of several processes.
    """
    name = str(path)
    is_input = name == STANDARD_INPUT
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        raise InputError(f"{name} is a pipe, which only one of several processes can read; write the text to a file")
    with readable(name):
        status = os.fstat(sys.stdin.fileno()) if is_input else os.stat(path)
        key = (name, status.st_dev, status.st_ino)
        if key in _copies:
            return _copies[key]
        if is_input and sys.stdin.isatty():
            raise InputError(
                f"{name} is the standard input, and nothing is piped into it; pipe text in or name a file"
            )
        with os.fdopen(os.dup(sys.stdin.fileno()), "rb") if is_input else open(path, "rb") as stream:
            _copies[key] = _copy(stream, "standard_input" if is_input else "pipe")
    return _copies[key]


def _copy(stream: IO[bytes], name: str) -> str:
    cache = Path(datasets.config.HF_DATASETS_CACHE, "pipes")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
    except OSError as error:
        raise InputError(f"a pipe is copied to {cache}, which can not be written: set HF_DATASETS_CACHE") from error
    atexit.register(_remove, folder, os.getpid())
    digest = blake2b(digest_size=16)
    copy = os.path.join(folder, name)
    with open(copy, "wb") as file:
        for data in iter(functools.partial(stream.read, 1 << 20), b""):
            digest.update(data)
            file.write(data)
    if not os.path.getsize(copy):
        raise InputError(f"{name.replace('_', ' ')} holds no text: nothing came through the pipe")
    _digests[copy] = digest.hexdigest()
    return copy


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
