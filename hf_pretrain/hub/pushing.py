"""Pushing a run to the Hub, while it goes on and at its end.

The repository is opened before any step is trained, so that missing rights are known at once. [`Pushing`] uploads the export
with its card, and checkpoints if asked; the functions at the end leave the folders of this machine out of what is uploaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, hf_api, logging

from hf_pretrain.errors import InputError, RunError
from hf_pretrain.files import MARKER, PART, read_marker, write_marker, write_text
from hf_pretrain.hub.text import last_part, portable_options

logger = logging.get_logger(__name__)

# The repository

_AGAIN_LATER = (408, 429)


def repository_of(
    args: TrainingArguments, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Create the repository that a run's arguments name, or find that it may be written to; no file of it is touched.

    Args:
        args: The arguments.
        token: Token with write permission, instead of the arguments'; by default the one that the user has logged in with.
        private: Whether it must be private, instead of the arguments'; by default as the Hub makes it, or as it is.
        revision: Branch to write to, instead of the arguments'; made from the main one if it is not there.

    Returns:
        The whole name.

    Raises:
        InputError: If the token, the name or the rights do not allow it, or what should be private is not.
        RunError: If the Hub does not answer.
    """
    api, name = hf_api(), args.hub_model_id or Path(args.output_dir).absolute().name
    token, revision = token or args.hub_token, revision or args.hub_revision
    private = args.hub_private_repo if private is None else private
    try:
        repo_id: str = api.create_repo(name, token=token, private=private, exist_ok=True).repo_id
        # Of a repository that can be read, the client says that it exists, whether or not it may be written to.
        api.auth_check(repo_id, token=token, write=True)
        if revision is not None and revision != constants.DEFAULT_REVISION:
            try:
                api.model_info(repo_id, revision=revision, token=token)
            except RevisionNotFoundError:
                api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        is_exposed = private and not api.model_info(repo_id, token=token).private
    # The client lets its transport's errors through, whatever that is.
    except Exception as error:
        raise _refusal(error, name, has_token=bool(token or get_token())) from error
    if is_exposed:
        raise InputError(
            f"hub_private_repo=True, but {repo_id} is there and public: make it private in its settings, or name another "
            "with hub_model_id"
        )
    return repo_id


def _refusal(error: Exception, name: str, *, has_token: bool) -> InputError | RunError:
    """Return the error of a repository that the Hub does not open."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return InputError(
            f"hub_model_id={name!r} (by default the name of output_dir) cannot be a repository's: {error}"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("push_to_hub=True, but HF_HUB_OFFLINE is set: unset it, or leave out push_to_hub")
    if status == 401:
        found = "the Hub does not accept the token" if has_token else "there is no token"
        return InputError(
            f"push_to_hub=True, but {found}: log in with `hf auth login`, or give a token with write permission as HF_TOKEN or "
            "hub_token (https://huggingface.co/settings/tokens)"
        )
    if status in (403, 404):
        return InputError(
            f"push_to_hub=True, but the token may not write to hub_model_id={name!r} ({reason(error)}): take a token with write "
            "permission (https://huggingface.co/settings/tokens), or a name of your own"
        )
    if status is not None and 400 <= status < 500 and status not in _AGAIN_LATER:
        return InputError(f"push_to_hub=True, but the Hub refuses hub_model_id={name!r}: {reason(error)}")
    return RunError(
        f"push_to_hub=True, but the Hub cannot be reached ({reason(error)}): start again when it can, or without push_to_hub "
        "and push afterwards with `hf upload`"
    )


def reason(error: BaseException) -> str:
    """Return in a few words why a request failed: the Hub's answer if it gave one, else what broke the connection."""
    innermost = error
    while True:
        response = getattr(innermost, "response", None)
        if response is not None:
            said = " ".join((getattr(innermost, "server_message", None) or "").split())
            return f"{response.status_code} {response.reason_phrase}" + (f": {said}" if said else "")
        if innermost.__cause__ is None:
            break
        innermost = innermost.__cause__
    words = " ".join(str(innermost).split())
    return f"{type(innermost).__name__}: {words}" if words else type(innermost).__name__


# Uploads

BRANCHES = "branches"
"""Folder of the exports that become branches of the repository; see [`hf_pretrain.hub.branches`]."""

# What lies in the output folder and is no part of the export. CodeCarbon's file names the place of the machine, and the logs of
# TensorBoard and its kin name the machine.
_NOT_EXPORTED = (
    *("_*", f"{PREFIX_CHECKPOINT_DIR}-*", "emissions*.csv", "runs/*", "wandb/*", "mlruns/*", "*tfevents*", f"*{PART}"),
    # Texts of the user's.
    *(f"{BRANCHES}/*", "predictions.jsonl"),
)
# They name folders of the machine; a push has them without.
_WITH_PATHS = ("recipe.yaml", "trainer_state.json")
# An earlier export's, which transformers would open instead of the new one's, or which belongs to another model.
_REPLACED = (
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors", "adapter_*"),
    "pretraining/*",
)
# Names in JSON files whose values are names of the Hub, or paths; and files that hold nothing but tokens.
_PATH_KEYS = re.compile(r".*(name_or_path|best_model_checkpoint|_dir|_file)")
_TOKENS = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
# The underscore keeps it out of what is pushed; of the files here, others have the same names.
_UPLOADING = "_uploading"


class Push(PushInProgress):
    """Uploads of one moment, in the background.

    Args:
        uploads: The uploads, each with the command that does the same by hand.
        step: Their step.
    """

    def __init__(self, uploads: Mapping[Future, str], *, step: int) -> None:
        super().__init__(list(uploads))
        self.uploads = uploads
        self.step = step

    def failed(self) -> dict[str, BaseException]:
        """Return the error of each upload that failed, by its command; all must be done."""
        errors = {command: job.exception() for job, command in self.uploads.items()}
        return {command: error for command, error in errors.items() if error is not None}


class Pushing:
    """Uploads what a Trainer has written: the export with its card, and checkpoints if `hub_strategy` says so.

    A push that fails while training is logged and does not end it: the next one sends what is new then. One that fails at the end
    is an error, and the export lies whole on the disk.

    Args:
        trainer: The Trainer; its `hub_model_id` names the repository once that is open.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.push: Push | None = None

    @property
    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / _UPLOADING

    def is_going_on(self) -> bool:
        """Return whether this process is uploading."""
        return self.push is not None and not self.push.is_done()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push while training: the export of this moment, and the checkpoint if asked; called on every process."""
        trainer, args = self.trainer, self.trainer.args
        if args.hub_strategy == HubStrategy.END:
            return
        # Only the first rank knows, but all have to export.
        if trainer.checkpoints.any_rank(self.is_going_on()) and not args.hub_always_push:
            return
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        trainer.create_model_card()
        shutil.rmtree(self._folder, ignore_errors=True)
        uploads = {self._upload_export(): self._command(args.output_dir)}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            job = self.upload(self._kept(checkpoint), path_in_repo=name, delete_patterns=["*"])
            uploads[job] = self._command(checkpoint, path_in_repo=name)
        self.push = Push(uploads, step=trainer.state.global_step)

    def push_export(
        self,
        message: str | None,
        *,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        facts: Mapping[str, Any],
    ) -> Any:
        """Export, write the card and push both; called on every process.

        Args:
            message: Title of the commit.
            blocking: Whether to wait for the upload.
            token: Token with write permission, instead of the arguments'.
            revision: Branch to write to, instead of the arguments'; made if it is not there.
            private: Whether a new repository is private, instead of the arguments'.
            facts: Facts for the card, by name.

        Returns:
            The commit, or the upload's future; None on other processes than the first.

        Raises:
            InputError: If there was no repository or branch so far, and token, name or rights do not allow one.
            RunError: If the Hub does not answer or the upload fails; the message says how to repeat it.
        """
        trainer, args = self.trainer, self.trainer.args
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        try:
            if trainer.hub_model_id is None or revision is not None:
                trainer.hub_model_id = repository_of(args, token=token, private=private, revision=revision)
        except (InputError, RunError) as error:
            raise type(error)(f"{error}; the model lies whole in {args.output_dir}") from error
        finally:
            trainer.create_model_card(**facts)
        revision = revision or args.hub_revision
        command = self._command(args.output_dir, revision=revision)
        shutil.rmtree(self._folder, ignore_errors=True)
        job = self._upload_export(commit_message=message, token=token or args.hub_token, revision=revision)
        if not blocking:
            self.push = Push({job: command}, step=trainer.state.global_step)
            return job
        try:
            return job.result()
        # Of connections, of the Hub, of its storage: many kinds.
        except Exception as error:
            raise RunError(
                f"the model is trained and lies whole in {args.output_dir}, but was not pushed to {trainer.hub_model_id} "
                f"({reason(error)}): push it with `{command}`"
            ) from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def finish(self) -> None:
        """Wait for the uploads that go on, and say which failed; the stock Trainer never asks."""
        push, self.push = self.push, None
        if push is None:
            return
        push.wait_until_done()
        shutil.rmtree(self._folder, ignore_errors=True)
        failed = push.failed()
        if failed:
            logger.warning(
                f"step {push.step} was not pushed to {self.trainer.hub_model_id} ({reason(next(iter(failed.values())))}): it "
                f"lies on the disk, the next push sends what is new then, or push by hand: {' && '.join(failed)}"
            )

    def _kept(self, source: Path | str, *, ignore: Sequence[str] = ()) -> Path:
        """Return another folder of the same files, without the paths of this machine.

        A checkpoint may be removed, for a newer one, before it is uploaded, and what lies here must start the run again.
        """
        source = Path(source)
        folder = self._folder / source.absolute().name
        folder.mkdir(parents=True)
        for path in source.iterdir():
            # A pattern of all that lies in a folder is one of the folder.
            if any(fnmatch(path.name, pattern.removesuffix("/*")) for pattern in ignore):
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=_link)
            else:
                _link(str(path), str(folder / path.name))
        remove_paths(folder)
        return folder

    def _upload_export(self, **options: Any) -> Future:
        patterns = {"ignore_patterns": list(_NOT_EXPORTED), "delete_patterns": list(_REPLACED)}
        return self.upload(self._kept(self.trainer.args.output_dir, ignore=_NOT_EXPORTED), **patterns, **options)

    def upload(self, folder: Path, **options: Any) -> Future:
        """Begin to upload a folder; the options are those of `HfApi.upload_folder`."""
        args = self.trainer.args
        message = f"Training in progress, step {self.trainer.state.global_step}"
        defaults = {"commit_message": message, "token": args.hub_token, "revision": args.hub_revision}
        return hf_api().upload_folder(
            repo_id=self.trainer.hub_model_id, folder_path=folder, run_as_future=True, **defaults | options
        )

    def _command(self, folder: Path | str, *, path_in_repo: str = ".", revision: str | None = None) -> str:
        """Return the command line that uploads a folder, for the user to run."""
        revision = revision or self.trainer.args.hub_revision
        parts = ["hf", "upload", str(self.trainer.hub_model_id), str(folder), path_in_repo]
        parts += [] if revision is None else ["--revision", revision]
        for pattern in (*_NOT_EXPORTED, *_WITH_PATHS) if path_in_repo == "." else ():
            parts += ["--exclude", pattern]
        return shlex.join(parts)


# Folders of this machine


def remove_paths(folder: Path) -> None:
    """Leave of each path in the files of a folder its last part: in the recipe, in configurations and in the state of a Trainer.

    A file that is changed is written anew, so that one of which this is a second name stays as it is. The marker of a checkpoint
    is renewed.

    Args:
        folder: The folder.
    """
    changed = False
    for path in sorted(folder.rglob("*.json")):
        if path.name in (*_TOKENS, MARKER):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        portable = _without_paths(content)
        if portable != content:
            write_text(path, json.dumps(portable, indent=2, ensure_ascii=False) + "\n")
            changed = True
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        _make_portable(recipe)
    facts = read_marker(folder)
    if changed and facts is not None:
        (folder / MARKER).unlink()
        others = {name: value for name, value in facts.items() if name not in ("files", "hashes")}
        write_marker(folder, has_hashes="hashes" in facts, **others)


def _make_portable(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        return
    comments = [line for line in text.splitlines() if line.startswith("#")]
    comments.append("# Of files and folders it has the names alone.")
    body = yaml.safe_dump(portable_options(options), sort_keys=False, allow_unicode=True)
    write_text(recipe, "\n".join([*comments, body]))


def _without_paths(content: Any, key: str = "") -> Any:
    if isinstance(content, dict):
        return {name: _without_paths(value, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_paths(value, key) for value in content]
    if not isinstance(content, str) or not content:
        return content
    if _PATH_KEYS.fullmatch(key):
        return portable_options({"name_or_path": content})["name_or_path"]
    # A token may look like a path, but none lies there.
    is_here = (PurePath(content).is_absolute() and len(PurePath(content).parts) > 2) and Path(content).exists()
    return last_part(content) if is_here else content


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
