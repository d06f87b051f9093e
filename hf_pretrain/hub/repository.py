"""The repository that a run is pushed to: found fit before any step is trained, and how to push to it by hand."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

from hf_pretrain.errors import InputError, RunError

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
