"""Writing beside a model: a file in the cache of the Hub is a link to what several revisions share."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Write a text file in the place of what is there; a link is replaced, never what it points to."""
    make_room(path)
    path.write_text(text, encoding="utf-8")
    return path


def make_room(path: Path) -> None:
    """Make the folder of a file that is to be written, and remove a link of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
