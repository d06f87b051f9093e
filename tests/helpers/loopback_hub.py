"""A Hub on 127.0.0.1 for the tests: the part of the Hub's HTTP protocol that pushing and loading a model uses.

Blobs are stored by their SHA-256 in one directory and a commit is a table from paths to blobs, so that every revision
stays readable, as on the Hub. A client in a process of its own runs with the environment of [`hub_environment`], because
`huggingface_hub` reads its constants when it is imported; the Trainers of this process push to it within [`connected`].

    with LoopbackHub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "push.py"], env=hub_environment(hub.url, tmp_path / "home"), check=True)
        assert "model.safetensors" in hub.files("tester/my-model")

The Hub can be made to fail: the next requests of a route (a method's name in `loopback_hub_routes.py`) with `fail_next`, in
the middle of what is sent with `cut_next`; and to wait, with `held`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

USER = "tester"
TOKEN = "hf_loopback"
READ_TOKEN = "hf_reader"  # of the same user, without the permission to write
MAIN = "main"

Tree = dict[str, tuple[str, bool]]  # path -> (SHA-256 of the blob, whether it went through LFS)


def hub_environment(url: str, home: Path | str, *, token: str | None = TOKEN) -> dict[str, str]:
    """Return the whole environment of a process that must see the server at `url` as the Hub, with `home` as cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGG", "TRANSFORMERS"))}
    disabled = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
    switches = {f"HF_HUB_DISABLE_{name}": "1" for name in disabled} | {"HF_HUB_OFFLINE": "0"}
    switches |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    switches |= {} if token is None else {"HF_TOKEN": token}
    return {**kept, **switches, "HF_ENDPOINT": url, "HF_HOME": str(home)}


@contextmanager
def connected(url: str, *, token: str | None = TOKEN) -> Iterator[None]:
    """Let this process push to the server at `url`, with no pause where the client tries again."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import _http, close_session, disable_progress_bars
    from transformers.utils import hub as transformers_hub

    environment = hub_environment(url, "unused", token=token)
    settings = {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    settings |= {"HF_TOKEN_PATH": os.devnull}
    with (
        patch.dict(os.environ, environment, clear=True),
        patch.multiple(constants, **settings),
        patch.object(transformers_hub, "_hf_api", HfApi(endpoint=url)),
        patch.object(_http, "time", SimpleNamespace(sleep=lambda seconds: None)),
    ):
        close_session()
        disable_progress_bars()
        yield
    close_session()


@dataclass
class Fault:
    """What becomes of some requests of a route, all of them for the same address: that of the first that comes.

    Attributes:
        route: Name of the route.
        skip: How many of the route go well before.
        times: How many are concerned.
        status: What they are answered, or None to break the connection off.
        after: Where it is broken off, how many bytes of the request are read before.
    """

    route: str
    skip: int
    times: int
    status: int | None = None
    after: int = 0
    address: str | None = None


class LoopbackHub:
    """The server, as a context manager; it listens on a free port of 127.0.0.1 only.

    Attributes:
        url: The endpoint, for `HF_ENDPOINT`.
        commits: For each repository its commits, oldest first: commit id -> tree.
        summaries: What a commit says of itself, by its id.
        parents: The commit before each, by its id; None of the first.
        branches: For each repository the last commit of each of its branches.
        private: Repositories that only who may write to them can see.
        namespaces: Whose repositories the user may write to.
        read_only: Repositories that the user may not write to all the same.
        unknown: Requests that no route answered; a test should find it empty.
    """

    def __init__(self, root: Path | str) -> None:
        """Prepare to store blobs under `root`."""
        from helpers.loopback_hub_routes import Handler

        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.commits: dict[str, dict[str, Tree]] = {}
        self.summaries: dict[str, str] = {}
        self.parents: dict[str, str | None] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.namespaces = {USER}
        self.read_only: set[str] = set()
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._held: dict[str, threading.Event] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        """Start to answer."""
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop and free the port."""
        self._server.shutdown()
        self._server.server_close()

    # What is there

    def head(self, repo_id: str, revision: str = MAIN) -> str:
        """Return the id of a branch's last commit."""
        return self.branches[repo_id][revision]

    def files(self, repo_id: str, *, revision: str = MAIN) -> dict[str, Path]:
        """Return each path of a repository at a branch or commit, and the file that holds its content here."""
        tree = self.commits[repo_id][self.branches[repo_id].get(revision, revision)]
        return {path: self.root / sha for path, (sha, _) in sorted(tree.items())}

    def said(self, repo_id: str) -> list[str]:
        """Return what the commits of a repository say of themselves, oldest first."""
        return [self.summaries[commit] for commit in self.commits[repo_id]]

    def history(self, repo_id: str, revision: str = MAIN) -> list[str]:
        """Return the ids of a branch's commits, newest first."""
        found, commit = [], self.branches[repo_id].get(revision, revision)
        while commit is not None:
            found.append(commit)
            commit = self.parents[commit]
        return found

    def append(self, repo_id: str, tree: Tree, *, branch: str = MAIN, summary: str = "initial commit") -> str:
        """Append a commit to a branch, of a new repository if need be, and return its id."""
        with self.lock:
            commits = self.commits.setdefault(repo_id, {})
            oid = hashlib.sha1(json.dumps([repo_id, len(commits), sorted(tree.items())]).encode()).hexdigest()
            commits[oid], self.summaries[oid] = tree, summary
            branches = self.branches.setdefault(repo_id, {})
            self.parents[oid], branches[branch] = branches.get(branch), oid
        return oid

    def store(self, content: bytes) -> str:
        """Store a blob and return its SHA-256."""
        sha = hashlib.sha256(content).hexdigest()
        # No reader may find half of it.
        part = self.root / f"{sha}.{threading.get_ident()}"
        part.write_bytes(content)
        part.replace(self.root / sha)
        return sha

    def git_oid(self, sha: str) -> str:
        """Return the id that git gives to a stored blob."""
        content = (self.root / sha).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    # What goes wrong

    def fail_next(self, route: str, *, times: int = 1, skip: int = 0, status: int = 503) -> None:
        """Answer the next requests of a route with an error, after some that go well."""
        self._faults.append(Fault(route, skip, times, status))

    def cut_next(self, route: str, *, times: int = 1, skip: int = 0, after: int = 0) -> None:
        """Break the connection off in the next requests of a route, when so many bytes of the body have come."""
        self._faults.append(Fault(route, skip, times, after=after))

    def take_fault(self, route: str, address: str) -> Fault | None:
        """Return what becomes of a request that has just come, if it does not go well."""
        with self.lock:
            for fault in self._faults:
                if fault.route != route or not fault.times or fault.address not in (None, address):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times, fault.address = fault.times - 1, address
                return fault
        return None

    @contextmanager
    def held(self, route: str) -> Iterator[None]:
        """Let the requests of a route wait until the block is left."""
        self._held[route] = threading.Event()
        try:
            yield
        finally:
            self._held.pop(route).set()

    def wait_while_held(self, route: str) -> None:
        """Return when the route is free."""
        gate = self._held.get(route)
        if gate is not None:
            gate.wait()
