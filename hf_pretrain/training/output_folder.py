"""The folder of a run: claimed for it alone, and searched for what an earlier start has left."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_pretrain.errors import InputError
from hf_pretrain.files import damaged_file, is_whole, write_text
from hf_pretrain.options import recipe_names
from hf_pretrain.training.checkpointing import check_checkpoint, was_cut_off
from hf_pretrain.training.processes import done_by_first, list_checkpoints

# A leading underscore keeps a file from being pushed to the Hub.
_LOCK = "_lock"
# Lies in the folder from the start of a run to its end. If it is there without a checkpoint, the run was killed.
_UNFINISHED = "_unfinished"
# The files of an earlier run: until the new one begins to train, and while they are removed.
_REPLACED, _REMOVED = "_replaced", "_removed"
_AUTO, _LAST = "auto", "true"
# Names the folders with models of their own that a run makes in its folder: of tasks, of seeds.
_OWN_FOLDERS = "_folders.json"
_OF_FEATURES = ("feature_head.json", "feature_head.skops")
# Files that a run writes before it trains, and can make again from the same text and options.
_BEFORE_TRAINING = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "spm.model", "sentencepiece*.model", "tokenizer.model"),
    *("chat_template.jinja", "_tokenizer_training.json", "_teacher_top_k", "_teacher_logits"),
)
_OF_A_RUN = (
    *(
        *_BEFORE_TRAINING,
        _LOCK,
        _UNFINISHED,
        _REMOVED,
        "checkpoint-*",
        "last-checkpoint",
        "pretraining",
        "plots",
        "branches",
    ),
    *("config.json", "generation_config.json", "model*.safetensors", "*.index.json", "pytorch_model*.bin"),
    *("adapter_config.json", "adapter_model.*"),
    # The code of architectures.
    *("configuration_*.py", "modeling_*.py", "layers_*.py", "softmax_*.py", "tokenization_*.py", "architectures_*.py"),
    *("scalar_mix.py", "__init__.py"),
    # What sentence-transformers reads.
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("[0-9]_Pooling", "[0-9]_Dense", "[0-9]_Normalize"),
    *("README.md", "_README.before.md", "recipe.yaml", "training_args.bin", "trainer_state.json", ".gitattributes"),
    "profile.json",
    *("all_results.json", "train_results.json", "eval_results.json", "emissions*.csv", "runs", "logs"),
    # Of fine-tuning, and of tasks.
    *("predictions.jsonl", "evaluation.json", _OWN_FOLDERS, *_OF_FEATURES),
)
# The files below the folders of a run.
_BELOW = (
    *(*_OF_A_RUN, "*.safetensors", "*.pt", "*.pth", "*.bin", "*.distcp", ".metadata", "latest", "*.png", "*.npy"),
    *(
        "complete.json*",
        "_branch.json*",
        "_pushed.json",
        "stream_state.json",
        "run.json",
        "zero_to_fp32.py",
        "events.out.tfevents.*",
    ),
)
# Options that may have the name of a file without being one that is read.
_NOT_READ = ("output_dir", "logging_dir", "run_name", "project", "resume_from_checkpoint", "hub_model_id", "hub_token")
_MARKS = ("checkpoint-*", "trainer_state.json", "recipe.yaml", "pretraining", _UNFINISHED, _OWN_FOLDERS, *_OF_FEATURES)


class OutputFolder:
    """The output folder of a run, as long as it is claimed.

    Args:
        args: `output_dir`, `overwrite_output_dir` and `resume_from_checkpoint` decide about the files that are there. A
            command without checkpoints has no `resume_from_checkpoint`.
        inputs: Files and folders that the run reads.
    """

    def __init__(self, args: Any, inputs: Iterable[str] = ()) -> None:
        self.args = args
        self.path = Path(args.output_dir)
        self.inputs = tuple(inputs)
        self.lock = FileLock(self.path / _LOCK)
        self._is_new = False

    def claim(self) -> str | None:
        """Lock the folder, set aside an earlier run that is replaced, and return the checkpoint to go on from.

        Raises:
            InputError: As [`output_directory`].
        """
        try:
            self._lock()
            self._restore()
            return self._checkpoint()
        except OSError as error:
            raise InputError(
                f"output_dir={str(self.path)!r} cannot be written: {error.strerror or error}; name another"
            ) from error

    def _lock(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output_dir={str(self.path)!r} is a file: name a folder")
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        in_use = f"output_dir={str(self.path)!r} is in use by another process: wait for it or name another"
        try:
            self.lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(in_use) from error
        if not (self.path / _LOCK).exists():
            # The other process ended between the opening of the file and its lock: the locked file is gone.
            self.lock.release()
            raise InputError(in_use)

    def _checkpoint(self) -> str | None:
        args, wanted = self.args, getattr(self.args, "resume_from_checkpoint", None)
        if args.overwrite_output_dir and wanted is not None and wanted.lower() != _AUTO:
            raise InputError(
                f"overwrite_output_dir=True would remove what resume_from_checkpoint={wanted} goes on from: leave out one "
                "of the two"
            )
        checkpoint = None if wanted is None else _checkpoint_to_resume(self.path, wanted)
        if checkpoint is None:
            cut_off = (self.path / _UNFINISHED).exists()
            is_used = self._is_used()
            if is_used and args.overwrite_output_dir:
                self._set_aside()
            elif is_used and (wanted is None or not cut_off):
                go_on = (
                    " go on with --resume_from_checkpoint true (auto if a run may have been cut off before its first "
                    "checkpoint),"
                    if hasattr(args, "resume_from_checkpoint")
                    else ""
                )
                raise InputError(
                    f"output_dir={str(self.path)!r} is in use{' and holds no checkpoint' if wanted else ''}: name another,{go_on}"
                    " or replace the run that is there with --overwrite_output_dir"
                )
            elif cut_off and wanted is not None and not self._is_empty():
                print(
                    f"{self.path} holds a run that was cut off before its first checkpoint: starting anew", flush=True
                )
        (self.path / _UNFINISHED).touch()
        return checkpoint

    def _is_empty(self) -> bool:
        return all(path.name in (_LOCK, _UNFINISHED) for path in self.path.iterdir())

    def _is_used(self) -> bool:
        """Whether the folder holds more than the files of a run that never came to train."""
        names = {path.name for path in self.path.iterdir()} - {_LOCK, _REMOVED}
        free: tuple[str, ...] = (_UNFINISHED, *_BEFORE_TRAINING) if _UNFINISHED in names else ()
        return any(not _is_named(name, free) for name in names)

    def check_replaceable(self) -> None:
        """Refuse what is there if `overwrite_output_dir` may not replace it; nothing is touched.

        Raises:
            InputError: As [`check_replaceable`].
        """
        if self.path.is_dir() and self._is_used():
            check_replaceable(self.path, inputs=self.inputs)

    def _set_aside(self) -> None:
        self.check_replaceable()
        shutil.rmtree(self.path / _REMOVED, ignore_errors=True)
        aside = self.path / _REPLACED
        aside.mkdir()
        for path in list(self.path.iterdir()):
            if path.name not in (_LOCK, _REPLACED):
                os.replace(path, aside / path.name)

    def _restore(self) -> None:
        """Bring back the files that a run set aside before it failed to train."""
        aside = self.path / _REPLACED
        if not aside.is_dir():
            return
        for path in list(self.path.iterdir()):
            if path.name != _LOCK and (_is_named(path.name, (*_BEFORE_TRAINING, _UNFINISHED))):
                _remove(path)
        for path in list(aside.iterdir()):
            if os.path.lexists(self.path / path.name):
                _remove(self.path / path.name)
            os.replace(path, self.path / path.name)
        aside.rmdir()

    def training_begins(self) -> None:
        """Remove the run that is replaced: all is read and checked."""
        aside = self.path / _REPLACED
        if self.lock.is_locked and aside.is_dir():
            # A run that is half removed must not come back.
            os.replace(aside, self.path / _REMOVED)
            shutil.rmtree(self.path / _REMOVED, ignore_errors=True)

    def ended(self) -> None:
        """Note that the run has ended."""
        self.training_begins()
        if self.lock.is_locked:
            (self.path / _UNFINISHED).unlink(missing_ok=True)

    def release(self) -> None:
        """Release the folder, and remove it if it is new and empty."""
        # Without the lock the folder was refused: the lock file is another process's.
        if not self.lock.is_locked:
            if self._is_new:
                with suppress(OSError):
                    self.path.rmdir()
            return
        self._restore()
        is_empty = self._is_empty()
        if is_empty:
            (self.path / _UNFINISHED).unlink(missing_ok=True)
        # Before the release: a run that starts in between would hold the lock of a removed file.
        (self.path / _LOCK).unlink(missing_ok=True)
        self.lock.release()
        if is_empty and self._is_new:
            with suppress(OSError):
                self.path.rmdir()


def check_replaceable(folder: Path, *, inputs: Iterable[str] = (), marks: Sequence[str] = _MARKS) -> None:
    """Refuse to replace a folder unless everything in it was written by an earlier run.

    Args:
        folder: An output folder, or one that a run has written beside it.
        inputs: Files and folders that the new run reads.
        marks: Names of files, one of which an earlier run has left.

    Raises:
        InputError: If it is the home folder or the present one, is read by the new run, is no run's, or has a file of others.
    """
    resolved = folder.resolve()
    what = f"overwrite_output_dir=True would remove what {str(folder)!r} holds"
    if resolved == Path.home().resolve() or Path.cwd().resolve().is_relative_to(resolved):
        raise InputError(f"{what}, the home folder or the one that you are in: name another output_dir")
    for name in inputs:
        if Path(name).resolve().is_relative_to(resolved):
            raise InputError(f"{what}, and this run reads {name}: move it or name another output_dir")
    found = _first_foreign(folder, own=marks)
    if found is not None:
        raise InputError(f"{what}, and {found} is not of a run: move it or name another output_dir")
    if not any(_is_named(path.name, marks) for path in folder.iterdir()):
        raise InputError(f"{what}, which is no run: remove it yourself or name another output_dir")


def note_own_folders(folder: str | Path, names: Iterable[str]) -> None:
    """Note which folders in the folder of a run have models of it, so that they may be replaced with the run.

    Args:
        folder: The output folder.
        names: Names of the folders in it; those that are noted already stay.
    """
    known = _own_folders(Path(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder, _OWN_FOLDERS), json.dumps([*known, *(name for name in names if name not in known)]) + "\n")


def has_ended(folder: Path) -> bool:
    """Whether a run came to its end in a folder: it has left files there, and nowhere the mark of a run that is under way.

    Args:
        folder: An output folder, or one around those of several seeds; it need not be there.
    """
    if not folder.is_dir() or (folder / _UNFINISHED).exists() or any(folder.glob(f"*/{_UNFINISHED}")):
        return False
    return any(_is_named(path.name, _MARKS) for path in folder.iterdir())


def is_name_of_a_run(name: str) -> bool:
    """Whether a run writes something of this name into its folder itself, so that no task of it may be called so."""
    return _is_named(name, (*_OF_A_RUN, _REPLACED))


def _own_folders(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / _OWN_FOLDERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


@contextmanager
def output_directory(args: Any, *, inputs: Iterable[str] = ()) -> Iterator[OutputFolder]:
    """Claim the output folder for this run.

    An earlier run that is replaced is only set aside until `training_begins` of the folder is called. It is brought back if
    that never happens.

    Args:
        args: `output_dir`, `overwrite_output_dir` and `resume_from_checkpoint` decide. The last becomes the path of the last
            whole checkpoint if it is "true", and that or None if it is "auto"; where the run goes on is printed. A command of
            one process without checkpoints has the first two alone.
        inputs: Files and folders that the run reads, which are never replaced; see [`paths_in`].

    Raises:
        InputError: If the folder holds an earlier run, or files to be replaced are of no run or read by this one, another
            process writes to it, it cannot be written, or there is nothing to resume from.
    """
    folder = OutputFolder(args, inputs)
    try:
        if hasattr(args, "resume_from_checkpoint"):
            args.resume_from_checkpoint = done_by_first(args, folder.claim)
        else:
            folder.claim()
        yield folder
        folder.ended()
    finally:
        folder.release()


def paths_in(options: Iterable[Any], argv: Sequence[str] = ()) -> list[str]:
    """Return every file or folder that a command reads.

    Args:
        options: Dataclasses; values may be paths, patterns of paths, or text such as ``en-de=a.en,a.de``.
        argv: The words of the command, for its recipes.
    """
    words = recipe_names(argv)
    for instance in options:
        assert is_dataclass(instance)
        values = [getattr(instance, field.name) for field in fields(instance) if field.name not in _NOT_READ]
        for value in values:
            words += [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    found: list[str] = []
    for word in filter(lambda word: isinstance(word, str), words):
        for part in {word, *re.split(r"[=,]", word)} - {""}:
            with suppress(OSError, ValueError):
                found += [part] if Path(part).exists() else glob.glob(part) if glob.has_magic(part) else []
    return found


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _first_foreign(folder: Path, own: Iterable[str] = ()) -> Path | None:
    """Return the first file in a folder that no run writes; some files and folders are its own by their names."""
    own = {*own, *_own_folders(folder)}
    for path in sorted(folder.iterdir()):
        if not _is_named(path.name, _OF_A_RUN) and path.name not in own:
            return path
        below = [] if path.is_symlink() else sorted(path.rglob("*"))
        found = next((file for file in below if not file.is_dir() and not _is_named(file.name, _BELOW)), None)
        if found is not None:
            return found
    return None


def _remove(path: Path) -> None:
    # A link is removed, never its target.
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _checkpoint_to_resume(folder: Path, wanted: str) -> str | None:
    """Return the checkpoint of `resume_from_checkpoint`, and print it; None if there need not be one."""
    if wanted.lower() not in (_AUTO, _LAST):
        print(f"going on from step {check_checkpoint(wanted)}: {wanted}", flush=True)
        return wanted
    skipped: list[Path] = []
    damaged: list[str] = []
    for checkpoint in list_checkpoints(folder):
        if not is_whole(checkpoint):
            skipped.append(checkpoint)
        elif (file := damaged_file(checkpoint)) is not None:
            damaged.append(f"{checkpoint.name} is damaged ({file} is not as it was saved)")
        else:
            step = check_checkpoint(checkpoint, reads_files=False)
            damage = "".join(f"{text}: " for text in damaged)
            print(f"{_incomplete(skipped)}{damage}going on from step {step}: {checkpoint}", flush=True)
            return str(checkpoint)
    if damaged:
        raise InputError(
            f"resume_from_checkpoint={wanted}, but {'; '.join(damaged)} in output_dir={str(folder)!r}, and no other checkpoint "
            "is whole: name another output_dir and start anew"
        )
    earlier = next((checkpoint for checkpoint in skipped if not was_cut_off(checkpoint)), None)
    if wanted.lower() == _AUTO and earlier is None:
        return None
    where = f"resume_from_checkpoint={wanted}, but output_dir={str(folder)!r}"
    if earlier is not None:
        raise InputError(
            f"{where} holds no checkpoint known to be whole: {earlier.name} is of an earlier version, which did not mark them; "
            f"name it, --resume_from_checkpoint {earlier}"
        )
    raise InputError(
        f"{where} holds no checkpoint: {_incomplete(skipped)}start without it, or with auto after a run that was cut off"
    )


def _incomplete(skipped: list[Path]) -> str:
    if not skipped:
        return ""
    names = ", ".join(checkpoint.name for checkpoint in skipped)
    return f"{names} {'is' if len(skipped) == 1 else 'are'} incomplete (killed while saving?): "
