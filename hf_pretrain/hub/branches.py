"""Exports by the tokens that a run has read, each a branch of the repository on the Hub: `hub_branches`.

[`BranchMarks`] says at how many tokens; [`Branches`] writes an export when a step has passed a mark, and uploads it in the
background. An export waits in the folder `branches` until it has arrived; there a later start finds it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from transformers.utils import hf_api, logging

from hf_pretrain.errors import InputError, RunError
from hf_pretrain.files import (
    PART,
    begin_folder,
    is_whole,
    read_marker,
    read_object,
    share_weights,
    write_marker,
    write_text,
)
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.pushing import BRANCHES, reason, remove_paths
from hf_pretrain.hub.record import read_record
from hf_pretrain.options import write_recipe

logger = logging.get_logger(__name__)

# The marks


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMB]?)", flags=re.IGNORECASE)
_BABYLM = "babylm"
_BABYLM_MILLIONS = (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))
_FORM = (
    'give "every 1M", a list such as "1M 2M 5M 10M" (K, M and B are a thousand, a million and a billion), or "babylm"'
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", flags=re.ASCII)


@dataclasses.dataclass(frozen=True)
class BranchMarks:
    """Numbers of tokens at which a branch is made.

    Attributes:
        listed: Tokens and label of each mark, rising; () where they recur.
        every: Tokens and label of the first of marks that recur without end, such as (1_000_000, "1M").
    """

    listed: tuple[tuple[int, str], ...] = ()
    every: tuple[int, str] | None = None

    @classmethod
    def parse(cls, text: str) -> BranchMarks:
        """Read the option `hub_branches`.

        Args:
            text: "every 1M"; or a list such as "1M 2M 5M"; or "babylm", which is every million up to 10 M, every ten up to 100 M
                and every hundred up to 1000 M, the scale of the BabyLM challenge.

        Raises:
            InputError: If it is none of these, or a mark is no whole number of tokens or is there twice.
        """
        words = text.replace(",", " ").split()
        if [word.lower() for word in words] == [_BABYLM]:
            return cls(tuple((number * 10**6, f"{number}M") for number in _BABYLM_MILLIONS))
        if words and words[0].lower() == "every":
            if len(words) != 2:
                raise InputError(f"hub_branches={text!r}: {_FORM}")
            return cls(every=_mark(words[1], text))
        marks = sorted(_mark(word, text) for word in words)
        if not marks or len({tokens for tokens, _ in marks}) < len(marks):
            raise InputError(f"hub_branches={text!r} {'has a mark twice' if marks else 'is empty'}: {_FORM}")
        return cls(tuple(marks))

    def between(self, before: int, after: int) -> list[tuple[int, str]]:
        """Return tokens and label of the marks that lie above `before` and not above `after`, rising."""
        if self.every is None:
            return [mark for mark in self.listed if before < mark[0] <= after]
        tokens, label = self.every
        return [(n * tokens, _times(label, n)) for n in range(before // tokens + 1, after // tokens + 1)]


def _mark(word: str, text: str) -> tuple[int, str]:
    found = _COUNT.fullmatch(word)
    tokens = Decimal(found[1]) * _UNITS[found[2].upper()] if found else Decimal(0)
    if tokens < 1 or tokens != int(tokens):
        raise InputError(f"hub_branches={text!r}: {word!r} is no number of tokens: {_FORM}")
    return int(tokens), _times(word.upper(), 1)


def _times(label: str, factor: int) -> str:
    """Return a multiple of a label in its own unit: 1000M and not 1B, so that names of a scale are alike."""
    digits = label.rstrip("KMB")
    number = f"{Decimal(digits) * factor:f}"
    return (number.rstrip("0").rstrip(".") if "." in number else number) + label[len(digits) :]


def check_branches(branches: str | None, name: str) -> None:
    """Refuse options of branches that cannot be.

    Args:
        branches: The option `hub_branches`.
        name: The option `hub_branch_name`.

    Raises:
        InputError: Naming the option.
    """
    if name.count("{}") != 1 or not _NAME.fullmatch(name.replace("{}", "1M")) or name.endswith((".", ".lock")):
        raise InputError(
            f"hub_branch_name={name!r} is no name of a branch with one {{}} for the tokens: give letters, digits, '_', '-' and "
            "'.', such as 'chck_{}'"
        )
    if branches is not None:
        BranchMarks.parse(branches)


# The branches


# Beside the export, with the tokens; an underscore keeps it out of what is pushed. The other one tells what has arrived.
_MARKER, _PUSHED = "_branch.json", "_pushed.json"
# The export has all that a branch holds, whatever else lies in the repository; see `_upload`.
_ALL = ["*"]
_MOST_IN_A_STEP = 16


def _pushed(folder: Path) -> dict[str, Any]:
    """Return what is noted of the branches of a folder that have arrived, by name."""
    return read_object(folder / _PUSHED)


class _Counted:
    """The tokens read up to the end of a step: copied while the device computes, so that no step drains it.

    Args:
        before: Those before the counter `new` began.
        new: Those since, of all processes.
    """

    def __init__(self, before: int, new: torch.Tensor) -> None:
        self.before = before
        self._event: Any = None
        if new.device.type == "cuda":
            # The copy is in front of this step's work: to wait for it is to wait for the step before.
            self._new = new.to("cpu", non_blocking=True)
            self._event = torch.cuda.current_stream(new.device).record_event()
        else:
            self._new = new.detach().clone()

    def total(self) -> int:
        """Return the number."""
        if self._event is not None:
            self._event.synchronize()
        return self.before + int(self._new.item())


class Branches:
    """Writes the export of each mark that a step passes, and uploads it as a branch; does nothing without `hub_branches`.

    An export is written before the checkpoint of its step, so a run that goes on from there has made the branches of all marks
    below. It is removed from the disk once it has arrived, and noted as pushed. What has not arrived is tried again: with the
    next branch, at the next start, and when the run is pushed at its end.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.marks: BranchMarks | None = None
        self._seen: int | None = None
        self._counted: _Counted | None = None
        self._jobs: dict[str, Future] = {}
        self._first_commit: str | None = None

    @property
    def folder(self) -> Path:
        """Where the exports wait, one folder a branch."""
        return Path(self.trainer.args.output_dir) / BRANCHES

    def begin(self, *, is_new: bool) -> None:
        """Begin a training; called on every process.

        Args:
            is_new: Whether it starts from its first step: it then makes all branches anew.
        """
        self.finish()
        args = self.trainer.args
        self.marks = None if args.hub_branches is None else BranchMarks.parse(args.hub_branches)
        self._seen = self._counted = None
        if self.marks is not None and is_new and self.trainer.is_world_process_zero():
            self._remove_all()

    def count(self) -> None:
        """Note the tokens of the step that begins; called on every process, when its batches are counted."""
        if self.marks is None:
            return
        trainer = self.trainer
        before = trainer.state.num_input_tokens_seen
        if self._seen is None:
            self._seen = before
            self._take_up(before)
        self._counted = _Counted(before, trainer.accelerator.reduce(trainer.tokens.new, reduction="sum"))

    def write_passed(self) -> None:
        """Write and push what the step has passed; called on every process at its end, more than once if need be."""
        counted, self._counted = self._counted, None
        if counted is None or self.marks is None:
            return
        before, self._seen = self._seen or 0, counted.total()
        passed = self.marks.between(before, self._seen)
        if not passed:
            return
        if len(passed) > _MOST_IN_A_STEP:
            raise InputError(
                f"hub_branches={self.trainer.args.hub_branches!r} has {len(passed)} marks in a step of "
                f"{self._seen - before:,} tokens: give marks that are further apart"
            )
        with self.trainer.tokens.paused():
            self.trainer.tokens.add_new()
            self.trainer.checkpoints.check_finite()
            for _, label in passed:
                self._write(self.trainer.args.hub_branch_name.format(label))
            if self.trainer.args.push_to_hub:
                self._push()

    def finish(self) -> None:
        """Wait for the uploads that go on, and say which failed."""
        for job in self._jobs.values():
            job.exception()
        self._report()

    def push_rest(self, *, blocking: bool, token: str | None = None) -> None:
        """Push what has not arrived so far; called on every process.

        Args:
            blocking: Whether to wait for the uploads.
            token: Token with write permission, instead of the arguments'.

        Raises:
            RunError: If an upload fails; the message says how to repeat it.
        """
        if not self.trainer.is_world_process_zero():
            return
        self.finish()
        self._push(token)
        jobs, self._jobs = self._jobs, self._jobs if not blocking else {}
        if not blocking:
            return
        failed = {name: error for name, job in jobs.items() if (error := job.exception()) is not None}
        if failed:
            raise RunError(
                f"the model was pushed to {self.trainer.hub_model_id}, but not the branches {', '.join(failed)} "
                f"({reason(next(iter(failed.values())))}): they lie whole in {self.folder}; start again with "
                f"--resume_from_checkpoint true, or push them with `{' && '.join(map(self._command, failed))}`"
            )

    # On the disk

    def _waiting(self) -> Iterator[Path]:
        """Yield the exports that are whole and have not arrived."""
        found = sorted(self.folder.glob(f"*/{_MARKER}"))
        pushed = _pushed(self.folder)
        folders = (marker.parent for marker in found if marker.parent.name not in pushed)
        yield from (folder for folder in folders if is_whole(folder, name=_MARKER))

    def _remove_all(self) -> None:
        for path in self.folder.glob(f"*/{_MARKER}*"):
            shutil.rmtree(path.parent, ignore_errors=True)
        (self.folder / _PUSHED).unlink(missing_ok=True)

    def _take_up(self, tokens: int) -> None:
        """Go on after an earlier start: push what it left, and say what nobody can make any more."""
        trainer = self.trainer
        if not trainer.is_world_process_zero() or self.marks is None or not tokens:
            return
        known = {folder.name for folder in self._waiting()} | _pushed(self.folder).keys()
        for name in _pushed(self.folder):
            # Of one that had arrived when the run was killed.
            shutil.rmtree(self.folder / name, ignore_errors=True)
        wanted = [trainer.args.hub_branch_name.format(label) for _, label in self.marks.between(0, tokens)]
        missing = [name for name in wanted if name not in known]
        if missing:
            names = f"{missing[0]} to {missing[-1]}" if len(missing) > 1 else missing[0]
            logger.warning(
                f"hub_branches: {names} ({len(missing):,} in all) lie before the {tokens:,} tokens of the checkpoint, and "
                f"{self.folder} has no trace of them: only an earlier start elsewhere can have made them"
            )
        if trainer.args.push_to_hub:
            self._push()

    def _write(self, name: str) -> None:
        """Write the export of this moment with its card, on every process."""
        trainer, folder = self.trainer, self.folder / name
        is_first = trainer.is_world_process_zero()
        is_there = is_first and (name in _pushed(self.folder) or is_whole(folder, name=_MARKER))
        # Only the first rank knows, but all have to export.
        if trainer.checkpoints.any_rank(is_there):
            return
        with trainer.checkpoints.together(remove=folder):
            if is_first:
                begin_folder(folder, name=_MARKER)
        with trainer.checkpoints.together(remove=folder):
            trainer.save_model(str(folder), _internal_call=True)
        with trainer.checkpoints.together(remove=folder):
            if is_first:
                self._complete(folder)

    def _complete(self, folder: Path) -> None:
        """Put beside the weights what the push at the end has too, and mark the folder as whole."""
        trainer = self.trainer
        state = trainer.state
        tokens, step = state.num_input_tokens_seen, state.global_step
        card = trainer.describe()
        said = (
            f"> **Branch `{folder.name}`:** the weights after {tokens:,} tokens, read in training by all processes together, at "
            f"step {step:,}."
        )
        compute = dataclasses.replace(card.compute, tokens=tokens)
        note = f"{card.note}\n\n{said}".strip()
        write_card(dataclasses.replace(card, branch=folder.name, note=note, compute=compute), folder)
        state.save_to_json(str(folder / "trainer_state.json"))
        if trainer.recipe:
            write_recipe(trainer.recipe, folder / "recipe.yaml", program=f"hf-pretrain {trainer.objective.name}")
        remove_paths(folder)
        share_weights(folder)
        write_marker(folder, name=_MARKER, tokens=tokens, step=step)

    # On the Hub

    def _push(self, token: str | None = None) -> None:
        """Begin to upload what waits and is not being uploaded."""
        trainer = self.trainer
        if not trainer.is_world_process_zero() or trainer.hub_model_id is None:
            return
        self._report()
        for folder in self._waiting():
            if folder.name in self._jobs:
                continue
            self._name_repository(folder)
            arguments = (trainer.hub_model_id, folder, token or trainer.args.hub_token)
            self._jobs[folder.name] = hf_api().run_as_future(self._upload, *arguments)

    def _name_repository(self, folder: Path) -> None:
        """Write the card anew if it was made before the repository was known: its code would open a folder."""
        card, repo = read_record(folder), self.trainer.hub_model_id
        if card.repo == repo:
            return
        facts = read_marker(folder, name=_MARKER) or {}
        write_card(dataclasses.replace(card, repo=repo, model_name=Path(repo).name), folder)
        write_marker(folder, name=_MARKER, tokens=facts["tokens"], step=facts["step"])

    def _upload(self, repo: str, folder: Path, token: str | None) -> None:
        """Upload an export as a branch, note it and remove it; this runs in the background, one after the other.

        It asks nothing of the Trainer, whose arguments are others while it saves a checkpoint.
        """
        api, name = hf_api(), folder.name
        facts = read_marker(folder, name=_MARKER) or {}
        if not api.revision_exists(repo, name, token=token):
            # Of the first commit, which holds no weights: until the upload is whole, the branch must not open as another model.
            self._first_commit = self._first_commit or api.list_repo_commits(repo, token=token)[-1].commit_id
            api.create_branch(repo, branch=name, revision=self._first_commit, token=token, exist_ok=True)
        said = f"{facts['tokens']:,} tokens, step {facts['step']:,}"
        ignored = {"ignore_patterns": ["_*", f"*{PART}"], "delete_patterns": _ALL}
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=name, token=token, commit_message=said, **ignored
        )
        arrived = {"tokens": facts["tokens"], "step": facts["step"], "repo": repo, "commit": commit.oid}
        noted = _pushed(folder.parent) | {name: arrived}
        write_text(folder.parent / _PUSHED, json.dumps(noted, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)

    def _report(self) -> None:
        """Forget the uploads that are done, and say which failed."""
        done = {name: job for name, job in self._jobs.items() if job.done()}
        self._jobs = {name: job for name, job in self._jobs.items() if name not in done}
        for name, job in done.items():
            if (error := job.exception()) is not None:
                logger.warning(
                    f"branch {name} was not pushed to {self.trainer.hub_model_id} ({reason(error)}): it lies on the disk, the "
                    f"next push tries again, or push by hand: {self._command(name)}"
                )

    def _command(self, name: str) -> str:
        """Return the command line that uploads a branch, for the user to run."""
        parts = ["hf", "upload", str(self.trainer.hub_model_id), str(self.folder / name), ".", "--revision", name]
        return shlex.join([*parts, "--exclude", "_*", "--delete", "*"])
