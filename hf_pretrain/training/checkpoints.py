"""Checkpoints that can be told from those that were cut off: a marker, written last, names every file, its size and hash."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from hf_pretrain.errors import InputError

MARKER = "complete.json"
_PART = ".part"
_STATE = "trainer_state.json"
# What only training needs: the learning rate, or with DeepSpeed, which keeps it with the rest, the name of that.
_FOR_TRAINING = ("scheduler.pt", "latest")
_HASH_BYTES = 1 << 22
# Of file systems that have no such call.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def begin_folder(folder: str | Path, *, name: str = MARKER) -> None:
    """Make an empty folder that can be told from a whole one until its marker is written; what it held is removed."""
    folder = Path(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / (name + _PART)).touch()


def write_marker(folder: str | Path, *, name: str = MARKER, has_hashes: bool = False, **facts: Any) -> None:
    """Mark a folder as whole, when all that belongs in it has been written.

    The files are on the disk before the marker is, and the marker appears at once, so a folder that has it is whole whenever
    the process, or the machine, stopped.

    Args:
        folder: The folder.
        name: Name of the marker.
        has_hashes: Whether the marker has the hash of every file too, for [`damaged_file`]; each is read once.
        **facts: What the marker tells besides; of a checkpoint its `step` and `world_size`.
    """
    folder = Path(folder)
    part = folder / (name + _PART)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in (folder / name, part))
    for path in paths:
        _flush(path)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    if has_hashes:
        facts["hashes"] = {path.relative_to(folder).as_posix(): _hash(path) for path in paths}
    part.write_text(json.dumps(facts | {"files": files}, indent=1), encoding="utf-8")
    _flush(part)
    os.replace(part, folder / name)
    _flush(folder)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


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
    """Return what the marker of a folder tells, with the sizes of its `files` in bytes; None if there is none."""
    try:
        facts = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("files"), dict) else None


def is_whole(folder: str | Path, *, name: str = MARKER) -> bool:
    """Whether a folder has its marker, and every file that this names has the size it had."""
    facts = read_marker(folder, name=name)
    return facts is not None and _first_difference(Path(folder), facts["files"]) is None


def _first_difference(folder: Path, files: Mapping[str, int]) -> str | None:
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def was_cut_off(folder: str | Path) -> bool:
    """Whether a checkpoint was begun and never became whole; one of an earlier version, without a marker, was not."""
    folder = Path(folder)
    return (folder / (MARKER + _PART)).exists() or not (folder / _STATE).is_file()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the latest step first."""
    numbered = [
        (int(match[1]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the checkpoint of the latest step that is whole, or None."""
    return next(filter(is_whole, list_checkpoints(output_dir)), None)


def check_checkpoint(folder: str | Path, *, reads_files: bool = True) -> int:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        folder: The checkpoint; one without a marker, of an earlier version, must have files that open.
        reads_files: Whether to compare the files with their hashes.

    Returns:
        Its step.

    Raises:
        InputError: If it is incomplete or damaged, or holds weights alone.
    """
    folder = Path(folder)
    asked = f"resume_from_checkpoint={str(folder)!r}"
    if not folder.is_dir():
        raise InputError(f"{asked} is no folder: name a checkpoint-* folder, or `true` for the last")
    facts = read_marker(folder)
    if facts is None:
        _check_files(folder, asked)
    elif (difference := _first_difference(folder, facts["files"])) is not None:
        raise InputError(f"{asked} is incomplete ({difference}): name another, or `true` for the last that is whole")
    elif reads_files:
        check_hashes(folder)
    if not any((folder / name).is_file() for name in _FOR_TRAINING):
        raise InputError(
            f"{asked} holds the weights alone (made with save_only_model?), which a run cannot go on from: name another"
        )
    try:
        return int(json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{asked} has no readable {_STATE}: name a checkpoint-* folder that is whole") from error


def check_hashes(folder: str | Path) -> None:
    """Refuse a checkpoint of which a file is not as it was saved.

    Raises:
        InputError: Naming the file.
    """
    damaged = damaged_file(folder)
    if damaged is not None:
        raise InputError(
            f"resume_from_checkpoint={str(folder)!r} is damaged ({damaged} is not as it was saved): name another, or `true` for "
            "the last that is whole"
        )


def _check_files(folder: Path, asked: str) -> None:
    """Open every file whose end tells whether it is whole."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{asked} is incomplete ({path.name} cannot be read: {error}): name another checkpoint"
            ) from error


def remove_old_checkpoints(output_dir: str | Path, *, limit: int | None, keep: tuple[str | Path | None, ...]) -> None:
    """Remove the oldest checkpoints, those that are not whole before all others.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to leave; no limit if None or not positive.
        keep: Checkpoints that stay whatever the limit: the newest and the best.
    """
    if limit is None or limit <= 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    kept = {Path(path).resolve() for path in keep if path is not None}
    removable = [path for path in found if path.resolve() not in kept]
    # The time of one that was being removed when the run was killed is that of the kill: it would pass for the newest.
    removable.sort(key=is_whole)
    for path in removable[: max(0, len(found) - limit)]:
        shutil.rmtree(path, ignore_errors=True)


def are_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return whether the norm of every tensor is finite, as a tensor; of sharded ones, the part of this process."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in local]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
