"""A Hub on 127.0.0.1 for the tests: the part of the Hub's HTTP protocol that pushing and loading a model uses.

Blobs are stored by their SHA-256 in one directory and a commit is a table from paths to blobs, so that every revision
stays readable, as on the Hub. The client must run with the environment of [`hub_environment`] in a process of its own,
because `huggingface_hub` reads its constants when it is imported.

    with LoopbackHub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "push.py"], env=hub_environment(hub.url, tmp_path / "home"), check=True)
        assert "model.safetensors" in hub.files("tester/my-model")
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"
TOKEN = "hf_loopback"
REGULAR_FILE_LIMIT = 1 << 20  # bytes; larger files go through LFS, as binary ones do

Tree = dict[str, tuple[str, bool]]  # path -> (SHA-256 of the blob, whether it went through LFS)


def hub_environment(url: str, home: Path | str) -> dict[str, str]:
    """Return the whole environment of a process that must see the server at `url` as the Hub, with `home` as cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGG", "TRANSFORMERS"))}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    switches |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**kept, **switches, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}


class LoopbackHub:
    """The server, as a context manager; it listens on a free port of 127.0.0.1 only.

    Attributes:
        url: The endpoint, for `HF_ENDPOINT`.
        commits: For each repository its commits, oldest first: commit id -> tree.
        unknown: Requests that no route answered; a test should find it empty.
    """

    def __init__(self, root: Path | str) -> None:
        """Prepare to store blobs under `root`."""
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.commits: dict[str, dict[str, Tree]] = {}
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        """Start to answer."""
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def head(self, repo_id: str) -> str:
        """Return the id of the last commit of a repository."""
        return next(reversed(self.commits[repo_id]))

    def files(self, repo_id: str, *, revision: str = "main") -> dict[str, Path]:
        """Return each path of a repository at `revision`, and the file that holds its content here."""
        tree = self.commits[repo_id][self.head(repo_id) if revision == "main" else revision]
        return {path: self.root / sha for path, (sha, _) in sorted(tree.items())}

    def append(self, repo_id: str, tree: Tree) -> str:
        """Append a commit, to a new repository if need be, and return its id."""
        commits = self.commits.setdefault(repo_id, {})
        oid = hashlib.sha1(json.dumps([repo_id, len(commits), sorted(tree.items())]).encode()).hexdigest()
        commits[oid] = tree
        return oid

    def store(self, content: bytes) -> str:
        """Store a blob and return its SHA-256."""
        sha = hashlib.sha256(content).hexdigest()
        (self.root / sha).write_bytes(content)
        return sha

    def git_oid(self, sha: str) -> str:
        """Return the id that git gives to a stored blob."""
        content = (self.root / sha).read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _HubError(Exception):
    """An answer other than success; its arguments are the HTTP status and the Hub's error code."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests quiet."""

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            # a PUT to LFS carries no token: on the Hub its address is signed
            writes = self.command == "POST" and path != "/api/validate-yaml"
            if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _HubError(401, "Unauthorized")
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command.replace("HEAD", "GET"):
                    return route(self, **{name: unquote(text or "") for name, text in match.groupdict().items()})
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise _HubError(404, "UnknownRoute")
        except _HubError as error:
            status, code = error.args
            self._send(json.dumps({"error": code}).encode(), status=status, headers={"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: object, *, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status, headers={"Content-Type": "application/json"})

    def _tree(self, repo: str, revision: str) -> tuple[str, Tree]:
        if repo not in self.hub.commits:
            raise _HubError(404, "RepoNotFound")
        commit = self.hub.head(repo) if revision in ("", "main") else revision
        if commit not in self.hub.commits[repo]:
            raise _HubError(404, "RevisionNotFound")
        return commit, self.hub.commits[repo][commit]

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        with self.hub.lock:
            exists = repo in self.hub.commits
            if not exists:
                self.hub.append(repo, {})
        self._send_json({"url": f"{self.hub.url}/{repo}"}, status=409 if exists else 200)

    def preupload(self, repo: str, revision: str) -> None:
        _, tree = self._tree(repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["size"] > REGULAR_FILE_LIMIT or b"\0" in base64.b64decode(file["sample"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if file["path"] in tree:  # by this the client leaves out what has not changed
                sha, _ = tree[file["path"]]
                answers[-1]["oid"] = sha if lfs else self.hub.git_oid(sha)
        self._send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._tree(repo, "main")
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.root / asked["oid"]).exists():
                links = {"upload": f"lfs-storage/{asked['oid']}", "verify": "lfs-verify"}
                answer["actions"] = {name: {"href": f"{self.hub.url}/{link}"} for name, link in links.items()}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.hub.store(self.body) != oid:
            raise _HubError(400, "WrongChecksum")
        self._send(b"")

    def lfs_verify(self) -> None:
        self._send(b"", status=200 if (self.hub.root / json.loads(self.body)["oid"]).exists() else 404)

    def commit(self, repo: str, revision: str) -> None:
        operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            head, tree = self._tree(repo, "main")
            if revision != "main" or operations[0]["value"].get("parentCommit", head) != head:
                raise _HubError(412, "NotTheHead")
            for operation in operations[1:]:
                tree = self._changed(tree, operation["key"], operation["value"])
            oid = self.hub.append(repo, tree)
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _changed(self, tree: Tree, key: str, value: dict[str, Any]) -> Tree:
        path = value["path"]
        if key == "file":
            return {**tree, path: (self.hub.store(base64.b64decode(value["content"], validate=True)), False)}
        if key == "lfsFile" and (self.hub.root / value["oid"]).exists():
            return {**tree, path: (value["oid"], True)}
        if key in ("deletedFile", "deletedFolder"):
            return {name: blob for name, blob in tree.items() if not f"{name}/".startswith(path.rstrip("/") + "/")}
        raise _HubError(400, f"BadOperation {key}")

    def info(self, repo: str, revision: str = "") -> None:
        commit, tree = self._tree(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        self._send_json({"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        _, tree = self._tree(repo, revision)
        recursive, entries = "recursive=true" in self.path.lower(), []
        for path, (sha, lfs) in sorted(tree.items()):
            rest = path.removeprefix(f"{folder}/") if folder else path
            if (rest == path and folder) or ("/" in rest and not recursive):
                continue
            size = (self.hub.root / sha).stat().st_size
            entries.append({"type": "file", "path": path, "oid": self.hub.git_oid(sha), "size": size})
            if lfs:
                entries[-1]["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
        if folder and not entries:
            raise _HubError(404, "EntryNotFound")
        self._send_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, tree = self._tree(repo, revision)
        if path not in tree:
            raise _HubError(404, "EntryNotFound")
        sha, lfs = tree[path]
        etag = f'"{sha if lfs else self.hub.git_oid(sha)}"'
        self._send((self.hub.root / sha).read_bytes(), headers={"X-Repo-Commit": commit, "ETag": etag})


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", lambda handler: handler._send_json({"type": "user", "name": USER, "orgs": []})),
    ("POST", "/api/validate-yaml", lambda handler: handler._send_json({"errors": [], "warnings": []})),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
