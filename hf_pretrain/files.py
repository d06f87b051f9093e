"""Files beside a model: plain data, files and folders that are there whole or as they were, and hashes of weights.

`plain` turns a value into what JSON and YAML hold, and `from_plain` makes it a dataclass again. `write_text` and `write_bytes`
replace a file at once. A folder is marked as whole when all of it is written (`begin_folder`, `write_marker`), and checked later
(`is_whole`, `damaged_file`).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import xxhash
from filelock import FileLock, Timeout

from hf_pretrain.errors import InputError
from hf_pretrain.schedules import Schedule

MARKER = "complete.json"
PART = ".part"
"""How the name of a file ends that is still being written; no such file is pushed."""

_HASH_BYTES = 1 << 22
# Of file systems that have no such call.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def plain(value: Any) -> Any:
    """Return a value as JSON and YAML hold it: mappings, lists, text, numbers, booleans and None.

    A dataclass becomes a mapping of its fields, an enumeration its value, an array of NumPy or torch a list or a number, a set a
    sorted list. A schedule or anything else, such as a path, becomes text.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Schedule):
        return value.text
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "tolist", lambda: value)()  # float64 of NumPy is a float
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def from_plain(kind: Any, value: Any) -> Any:
    """Return a value of a type from what `plain` made of it.

    Args:
        kind: The type: a dataclass, or what the fields of one are annotated with. Sequences become tuples.
        value: The plain value.

    Raises:
        TypeError, AttributeError, KeyError: If the value does not fit a dataclass.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        hints = get_type_hints(kind)
        return make(**{name: from_plain(hints[name], item) for name, item in value.items()})
    if origin in (Union, types.UnionType):
        fitting = [member for member in arguments if (get_origin(member) is Sequence) == isinstance(value, list)]
        return value if value is None or isinstance(value, str) or not fitting else from_plain(fitting[0], value)
    if isinstance(value, list) and arguments:
        return tuple(from_plain(arguments[0], item) for item in value)
    if isinstance(value, dict) and arguments:
        return {key: from_plain(arguments[1], item) for key, item in value.items()}
    return value


def begin_folder(folder: str | Path, *, name: str = MARKER) -> None:
    """Make an empty folder that differs from a whole one until its marker is written; its old content is removed."""
    folder = Path(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / (name + PART)).touch()


def write_marker(folder: str | Path, *, name: str = MARKER, has_hashes: bool = False, **facts: Any) -> None:
    """Mark a folder as whole, when all that belongs in it has been written.

    The files are on the disk before the marker is, and the marker appears at once, so a folder that has it is whole whenever
    the process, or the machine, stopped.

    Args:
        folder: The folder.
        name: Name of the marker.
        has_hashes: Whether the marker has the hash of every file too, for [`damaged_file`]; each is read once.
        **facts: Further facts in the marker; of a checkpoint its `step` and `world_size`.
    """
    folder = Path(folder)
    part = folder / (name + PART)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in (folder / name, part))
    for path in paths:
        flush_path(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    if has_hashes:
        facts["hashes"] = {path.relative_to(folder).as_posix(): _hash(path) for path in paths}
    part.write_text(json.dumps(facts | {"files": files}, indent=1), encoding="utf-8")
    flush_path(part)
    os.replace(part, folder / name)
    flush_path(folder)


def flush_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damaged_file(folder: str | Path, *, name: str = MARKER) -> str | None:
    """Return the first file of a folder that is not as it was when it was marked; None if there is none, or no hash."""
    facts = read_marker(folder, name=name) or {}
    for file, known in facts.get("hashes", {}).items():
        path = Path(folder, file)
        if not path.is_file() or _hash(path) != known:
            return str(file)
    return None


def read_marker(folder: str | Path, *, name: str = MARKER) -> Mapping[str, Any] | None:
    """Return the facts in the marker of a folder, with the sizes of its `files` in bytes; None if there is no marker."""
    facts = read_object(Path(folder, name))
    return facts if isinstance(facts.get("files"), dict) else None


def is_whole(folder: str | Path, *, name: str = MARKER) -> bool:
    """Whether a folder has its marker, and every file that this names has the size it had."""
    facts = read_marker(folder, name=name)
    return facts is not None and first_difference(Path(folder), facts["files"]) is None


def first_difference(folder: Path, files: Mapping[str, int]) -> str | None:
    """Return what is wrong with the first file that is not there or has another size; None if all are right."""
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} where there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: Path, text: str) -> Path:
    """Write a text file as UTF-8, with a question mark for half of a surrogate pair; see [`write_bytes`]."""
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    The content goes to another file of the same folder, is flushed to the disk, and then takes the place of what was there. So a
    full disk, a kill or a power cut leaves the old file as it was. A link is replaced, never what it points to: in the cache of
    the Hub several revisions share that.

    Args:
        path: The file; its folder is made if need be. The permissions of a file that is replaced stay.
        content: What it is to hold.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # a pipe or a device, which nothing can take the place of
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    mode = None if path.is_symlink() or not path.exists() else stat.S_IMODE(path.stat().st_mode)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            _flush(file.fileno())
        if mode is not None:
            part.chmod(mode)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def share_weights(folder: Path | str) -> None:
    """Let others read the weights of a folder, as far as the umask lets them read its other files.

    safetensors makes its files readable for their owner alone.

    Args:
        folder: The folder; those inside it are left alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def weights_digest(folder: Path | str) -> str | None:
    """Return a digest of the weights at the root of a folder; None if there are none."""
    digest, paths = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32] if paths else None


@contextmanager
def held_folder(folder: Path, *, lock: str) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, so that no other process that holds it so writes to it.

    Args:
        folder: The folder.
        lock: Name of the file in it that is locked. It is removed at the end.

    Raises:
        InputError: If another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / lock)
    try:
        held.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"output_dir={str(folder)!r} is in use by another process: wait for it or name another"
        ) from error
    try:
        yield
    finally:
        (folder / lock).unlink(missing_ok=True)
        held.release()
