"""The repository that a run is pushed to: found fit before any step is trained, and how to push to it by hand.

Pushing a run to the Hub, while it goes on and at its end.
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
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, hf_api, logging

from hf_pretrain.errors import InputError, RunError
from hf_pretrain.files import MARKER, PART, plain, read_marker, write_marker, write_text
from hf_pretrain.hub.text import last_part, portable_options
from hf_pretrain.training.checkpointing import SavingMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


_AGAIN_LATER = (408, 429)


def open_repository(
    api: HfApi, name: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Create a repository, or find that what is there may be written to; no file of it is touched.

    Args:
        api: The client.
        name: Name of the repository, in the user's own namespace unless it has another.
        token: Token with write permission; by default the one that the user has logged in with.
        private: Whether it must be private; by default as the Hub makes it, or as it is.
        revision: Branch that will be written to; made from the main one if it is not there.

    Returns:
        The whole name.

    Raises:
        InputError: If the token, the name or the rights do not allow it, or what should be private is not.
        RunError: If the Hub does not answer.
    """
    try:
        repo_id = api.create_repo(name, token=token, private=private, exist_ok=True).repo_id
        # Of a repository that can be read, the client says that it exists, whether or not it may be written to.
        api.auth_check(repo_id, token=token, write=True)
        if revision is not None and revision != constants.DEFAULT_REVISION:
            _make_branch(api, repo_id, revision, token=token)
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


def _make_branch(api: HfApi, repo_id: str, branch: str, *, token: str | None) -> None:
    try:
        api.model_info(repo_id, revision=branch, token=token)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=branch, token=token, exist_ok=True)


def _refusal(error: Exception, name: str, *, has_token: bool) -> InputError | RunError:
    """Return what the user is told when the Hub will not open a repository."""
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


def upload_command(
    repo_id: str,
    folder: Path | str,
    *,
    path_in_repo: str = ".",
    revision: str | None = None,
    ignore_patterns: Sequence[str] = (),
) -> str:
    """Return the command line that uploads a folder, for the user to run.

    Args:
        repo_id: The repository.
        folder: What to upload.
        path_in_repo: Where to put it.
        revision: Branch to write to.
        ignore_patterns: What to leave out, as shell patterns.
    """
    parts = ["hf", "upload", repo_id, str(folder), path_in_repo]
    parts += [] if revision is None else ["--revision", revision]
    for pattern in ignore_patterns:
        parts += ["--exclude", pattern]
    return shlex.join(parts)


logger = logging.get_logger(__name__)

# What lies in the output folder and is no part of the export. CodeCarbon's file tells where the machine stands, and the logs of
# TensorBoard and its kin what it is called.
_NOT_EXPORTED = (
    *("_*", f"{PREFIX_CHECKPOINT_DIR}-*", "emissions*.csv", "runs/*", "wandb/*", "mlruns/*", "*tfevents*", f"*{PART}"),
)
# They tell of the machine as they lie here; a push has them without its folders.
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


class _Push(PushInProgress):
    """Uploads of one moment, in the background.

    Args:
        uploads: The uploads, each with the command that does the same by hand.
        step: The step they are of.
    """

    def __init__(self, uploads: Mapping[Future, str], *, step: int) -> None:
        super().__init__(list(uploads))
        self.uploads = uploads
        self.step = step

    def failed(self) -> dict[str, BaseException]:
        """Return the error of each upload that failed, by its command; all must be done."""
        errors = {command: job.exception() for job, command in self.uploads.items()}
        return {command: error for command, error in errors.items() if error is not None}


class PushingMixin(SavingMixin, _Base):
    """Pushing for a Trainer of composites: what the Hub gets is the export, with its card, not the checkpoint.

    That it may push is found out before training. A push that fails while training is told and does not end it: the next one
    sends what is new then. One that fails at the end is an error, and the export lies whole on the disk.
    """

    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find that what is there may be written to; called when the Trainer is made.

        Raises:
            InputError: If token, name or rights do not allow it.
            RunError: If the Hub does not answer.
        """
        if self.is_world_process_zero():
            self.hub_model_id = repository_of(self.args, token=token, private=private)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        # A checkpoint holds the arguments, and may be pushed for all to read; a resume does not read them.
        kinds = (str, dict, list, os.PathLike)
        values = {name: value for name, value in vars(self.args).items() if isinstance(value, kinds)}
        portable = portable_options(values)
        changed = {name: portable[name] for name, value in values.items() if portable[name] != plain(value)}
        output_dir = output_dir or self.args.output_dir
        with self._options(hub_token=None, **changed):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the export; see `transformers.Trainer.save_model`."""
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            # The upload reads the files that would be written over.
            self._finish_current_push()
        super().save_model(output_dir, _internal_call)

    # At the end

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """Push the export with its card; see `transformers.Trainer.push_to_hub`.

        Args:
            commit_message: What the commit says of itself.
            blocking: Wait for the upload; otherwise return its future.
            token: Token with write permission, instead of the arguments'.
            revision: Branch to write to, instead of the arguments'; made if it is not there.
            private: Whether a new repository is private, instead of the arguments'.
            **facts: Facts for the card, as [`create_model_card`] takes them.

        Raises:
            InputError: If there was no repository or branch so far, and token, name or rights do not allow one.
            RunError: If the Hub does not answer or the upload fails; the message says how to repeat it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None or revision is not None:
            self._open_late(token=token, private=private, revision=revision, facts=facts)
        self.create_model_card(**facts)
        options = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        command = self._command(self.args.output_dir, revision=options["revision"])
        shutil.rmtree(Path(self.args.output_dir) / _UPLOADING, ignore_errors=True)
        job = self._upload_export(commit_message=commit_message, **options)
        if not blocking:
            self.push_in_progress = _Push({job: command}, step=self.state.global_step)
            return job
        try:
            return job.result()
        # Of connections, of the Hub, of its storage: many kinds.
        except Exception as error:
            raise RunError(
                f"the model is trained and lies whole in {self.args.output_dir}, but was not pushed to {self.hub_model_id} "
                f"({reason(error)}): push it with `{command}`"
            ) from error
        finally:
            shutil.rmtree(Path(self.args.output_dir) / _UPLOADING, ignore_errors=True)

    def _open_late(
        self, *, token: str | None, private: bool | None, revision: str | None, facts: Mapping[str, Any]
    ) -> None:
        try:
            self.hub_model_id = repository_of(self.args, token=token, private=private, revision=revision)
        except (InputError, RunError) as error:
            self.create_model_card(**facts)
            raise type(error)(f"{error}; the model lies whole in {self.args.output_dir}") from error

    # While training

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push while training: the export of this moment, not the composite that the checkpoint holds."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return
        # Leaves the checkpoint's layout for the time of the export.
        self._in_checkpoint = False
        self.save_model(_internal_call=True)
        self._in_checkpoint = True
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        shutil.rmtree(Path(self.args.output_dir) / _UPLOADING, ignore_errors=True)
        uploads = {self._upload_export(): self._command(self.args.output_dir)}
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            job = self._upload(self._kept(checkpoint_folder), path_in_repo=place, delete_patterns=["*"])
            uploads[job] = self._command(checkpoint_folder, path_in_repo=place)
        self.push_in_progress = _Push(uploads, step=self.state.global_step)

    def _is_pushing(self) -> bool:
        """Return whether an upload is going on, on every rank: only the first one knows, but all have to export."""
        push = self.push_in_progress
        return self._any_rank(push is not None and not push.is_done())

    def _finish_current_push(self) -> None:
        """Wait for the uploads that go on, and tell which failed: the stock Trainer never asks."""
        super()._finish_current_push()
        push, self.push_in_progress = self.push_in_progress, None
        if push is None:
            return
        shutil.rmtree(Path(self.args.output_dir) / _UPLOADING, ignore_errors=True)
        failed = push.failed() if isinstance(push, _Push) else {}
        if failed:
            logger.warning(
                f"step {push.step} was not pushed to {self.hub_model_id} ({reason(next(iter(failed.values())))}): it lies on "
                f"the disk, the next push sends what is new then, or push by hand: {' && '.join(failed)}"
            )

    # Both

    def _kept(self, source: Path | str, *, ignore: Sequence[str] = ()) -> Path:
        """Return another folder of the same files, without the paths of this machine.

        A checkpoint may be removed, for a newer one, before it is uploaded, and what lies here must start the run again.
        """
        folder = Path(self.args.output_dir) / _UPLOADING / Path(source).absolute().name
        folder.mkdir(parents=True)
        for path in Path(source).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in ignore):
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=_link)
            else:
                _link(str(path), str(folder / path.name))
        remove_paths(folder)
        return folder

    def _upload_export(self, **options: Any) -> Any:
        patterns = {"ignore_patterns": list(_NOT_EXPORTED), "delete_patterns": list(_REPLACED)}
        return self._upload(self._kept(self.args.output_dir, ignore=_NOT_EXPORTED), **patterns, **options)

    def _upload(self, folder: Path | str, **options: Any) -> Any:
        defaults = {
            "commit_message": f"Training in progress, step {self.state.global_step}",
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
        }
        return hf_api().upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, run_as_future=True, **defaults | options
        )

    def _command(self, folder: Path | str, *, path_in_repo: str = ".", revision: str | None = None) -> str:
        return upload_command(
            str(self.hub_model_id),
            folder,
            path_in_repo=path_in_repo,
            revision=revision or self.args.hub_revision,
            ignore_patterns=(*_NOT_EXPORTED, *_WITH_PATHS) if path_in_repo == "." else (),
        )


def repository_of(
    args: TrainingArguments, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """Create the repository that a run's arguments name, or find that what is there may be written to; return its whole name.

    Args:
        args: The arguments.
        token: Token with write permission, instead of the arguments'.
        private: Whether a new repository is private, instead of the arguments'.
        revision: Branch that will be written to, instead of the arguments'.

    Raises:
        InputError: If token, name or rights do not allow it.
        RunError: If the Hub does not answer.
    """
    return open_repository(
        hf_api(),
        args.hub_model_id or Path(args.output_dir).absolute().name,
        token=token or args.hub_token,
        private=args.hub_private_repo if private is None else private,
        revision=revision or args.hub_revision,
    )


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
        facts = {name: value for name, value in facts.items() if name != "files"}
        (folder / MARKER).unlink()
        write_marker(folder, **facts)


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
