"""A branch: a run that starts from the checkpoint of another one, and goes on in phases of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_pretrain.errors import InputError
from hf_pretrain.files import is_whole, read_marker
from hf_pretrain.training.checkpointing import check_checkpoint
from hf_pretrain.training.processes import list_checkpoints


@dataclass(frozen=True)
class Branch:
    """Where a run branches off.

    Attributes:
        checkpoint: The checkpoint; "" where the branch goes on by itself and needs it no more.
        name: Name of the run that it is a branch of.
        step: Steps of that run until then.
        phase: Name of its phase; "" if it had none.
        phases: Phases that it had begun until then.
        positions: Rotary positions that its phases had set: "rope_theta" and "max_position_embeddings".
    """

    checkpoint: str
    name: str
    step: int
    phase: str = ""
    phases: int = 1
    positions: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what checkpoints and card say of it."""
        facts = {"name": self.name, "step": self.step, "phase": self.phase, "phases": self.phases}
        return facts | {"positions": dict(self.positions)}


def find_branch(path: str | None, *, resumed: str | None) -> Branch | None:
    """Return where a run branches off.

    Args:
        path: The option `branch_from`: folder of a run, or one checkpoint.
        resumed: Checkpoint of the branch itself that it goes on from.

    Raises:
        InputError: If the path holds no checkpoint that is whole.
    """
    if path is None:
        return None
    own = _marks(resumed).get("branch") if resumed is not None else None
    if own:
        return Branch("", **own)
    if resumed is not None:
        raise InputError(
            f"branch_from={path!r} has no effect on a run that goes on from {resumed}, which is of no branch: leave out "
            "one of the two"
        )
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"branch_from={path!r} is no folder: name a run, or one of its checkpoint-* folders")
    checkpoint = folder if read_marker(folder) is not None else _of_run(folder)
    step = check_checkpoint(checkpoint)
    marks = _marks(checkpoint)
    return Branch(
        str(checkpoint),
        checkpoint.resolve().parent.name,
        step,
        marks.get("name", ""),
        marks.get("number", 0) + 1,
        marks.get("positions", {}),
    )


def branch_line(branch: Branch) -> str:
    """Return one line on where a run branches off."""
    phase = f", in its phase {branch.phase!r}" if branch.phase else ""
    return f"branch of {branch.name}: going on from its step {branch.step:,}{phase}: {branch.checkpoint}"


def _of_run(folder: Path) -> Path:
    """Return the checkpoint at the end of the last phase whose rate has not decayed, else the last one, and say so."""
    whole = [checkpoint for checkpoint in list_checkpoints(folder) if is_whole(checkpoint)]
    if not whole:
        raise InputError(f"branch_from={str(folder)!r} holds no whole checkpoint: name a run that has one")
    for checkpoint in whole:
        marks, step = _marks(checkpoint), (read_marker(checkpoint) or {}).get("step")
        if marks and step == marks["end"] and not marks["is_decayed"]:
            return checkpoint
    print(
        f"branch_from={folder} has no checkpoint at the end of a phase whose rate is still high: taking its last one, whose rate "
        "may have decayed",
        flush=True,
    )
    return whole[0]


def _marks(checkpoint: str | Path) -> dict[str, Any]:
    facts = (read_marker(Path(checkpoint)) or {}).get("run") or {}
    marks: dict[str, Any] = facts.get("phase") or {}
    return marks
