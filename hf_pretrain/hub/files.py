"""Writing beside a model: a file is there whole or as it was, and others may read it as far as the user lets them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

PART = ".part"
"""How the name of a file ends that is still being written; no such file is pushed."""


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


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Of file systems that have no such call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


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
