"""What the loopback Hub answers: one method a route, and a table of their addresses at the end."""

from __future__ import annotations

import base64
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from helpers.loopback_hub import MAIN, READ_TOKEN, TOKEN, USER, LoopbackHub, Tree

REGULAR_FILE_LIMIT = 1 << 20  # bytes; larger files go through LFS, as binary ones do


class HubError(Exception):
    """An answer other than success: the HTTP status, the Hub's error code and its words."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message or code


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests quiet."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        method = self.command.replace("HEAD", "GET")
        matches = ((route, re.fullmatch(pattern, path)) for verb, pattern, route in ROUTES if verb == method)
        route, match = next(((route, match) for route, match in matches if match), (None, None))
        name = "" if route is None else route.__name__
        fault = self.hub.take_fault(name, path)
        length = int(self.headers.get("Content-Length", 0))
        if fault is not None and fault.status is None:
            self.rfile.read(min(fault.after, length))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(length)
        self.hub.wait_while_held(name)
        try:
            if fault is not None and fault.status is not None:
                raise HubError(fault.status, "Fault", "out of order")
            if route is None or match is None:
                self.hub.unknown.append(f"{self.command} {self.path}")
                raise HubError(404, "UnknownRoute")
            route(self, **{name: unquote(text or "") for name, text in match.groupdict().items()})
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(json.dumps({"error": error.message}).encode(), status=error.status, headers=headers)

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

    # Permissions

    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return token

    def _check_write(self, repo: str) -> None:
        token = self._token()
        if token is None:
            raise HubError(401, "", "Invalid username or password.")
        is_own = repo.partition("/")[0] in self.hub.namespaces and repo not in self.hub.read_only
        if token != TOKEN or not is_own:
            raise HubError(403, "", f"You don't have the rights to write to {repo}")

    def _check_read(self, repo: str) -> None:
        """Hide private repositories as the Hub does: from other users and from anonymous ones."""
        token = self._token()
        is_hidden = repo in self.hub.private and (token is None or repo.partition("/")[0] not in self.hub.namespaces)
        if repo not in self.hub.commits or is_hidden:
            raise HubError(401 if token is None else 404, "RepoNotFound", "Repository not found")

    def _check_change(self, repo: str) -> None:
        self._check_read(repo)
        self._check_write(repo)

    def _at(self, repo: str, revision: str) -> tuple[str, Tree]:
        self._check_read(repo)
        commit = self.hub.branches[repo].get(revision or MAIN, revision)
        if commit not in self.hub.commits[repo]:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, self.hub.commits[repo][commit]

    # Repositories

    def whoami(self) -> None:
        if self._token() is None:
            raise HubError(401, "", "Invalid username or password.")
        organizations = [{"name": name} for name in sorted(self.hub.namespaces - {USER})]
        self._send_json({"type": "user", "name": USER, "orgs": organizations})

    def validate_card(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def agent_harnesses(self) -> None:
        # What the client compares its environment with before it prints.
        self._send_json({})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        with self.hub.lock:
            exists = repo in self.hub.commits
            if not exists or repo.partition("/")[0] not in self.hub.namespaces:
                self._check_write(repo)
            if not exists:
                self.hub.append(repo, {})
                if asked.get("visibility") == "private":
                    self.hub.private.add(repo)
        self._send_json({"url": f"{self.hub.url}/{repo}"}, status=409 if exists else 200)

    def create_branch(self, repo: str, branch: str) -> None:
        self._check_change(repo)
        if branch in self.hub.branches[repo]:
            raise HubError(409, "", f"Reference already exists: {branch}")
        commit, _ = self._at(repo, json.loads(self.body or b"{}").get("startingPoint", MAIN))
        self.hub.branches[repo][branch] = commit
        self._send_json({})

    def auth_check(self, repo: str, write: str) -> None:
        self._check_read(repo)
        if write:
            self._check_write(repo)
        self._send_json({})

    def info(self, repo: str, revision: str = "") -> None:
        commit, tree = self._at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        is_private = repo in self.hub.private
        self._send_json({"id": repo, "sha": commit, "private": is_private, "tags": [], "siblings": siblings})

    def commits(self, repo: str, revision: str) -> None:
        self._at(repo, revision)
        date = "2026-01-01T00:00:00.000Z"
        told = [(commit, self.hub.summaries[commit]) for commit in self.hub.history(repo, revision)]
        fields = {"authors": [{"user": USER}], "date": date, "message": ""}
        self._send_json([{"id": commit, "title": summary, **fields} for commit, summary in told])

    # Upload

    def preupload(self, repo: str, revision: str) -> None:
        self._check_change(repo)
        _, tree = self._at(repo, revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["size"] > REGULAR_FILE_LIMIT or b"\0" in base64.b64decode(file["sample"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if file["path"] in tree:  # so the client does not upload unchanged files
                sha, _ = tree[file["path"]]
                answers[-1]["oid"] = sha if lfs else self.hub.git_oid(sha)
        self._send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._check_change(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.root / asked["oid"]).exists():
                links = {"upload": f"lfs-storage/{asked['oid']}", "verify": "lfs-verify"}
                answer["actions"] = {name: {"href": f"{self.hub.url}/{link}"} for name, link in links.items()}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        # It carries no token: on the Hub its address is signed.
        if self.hub.store(self.body) != oid:
            raise HubError(400, "WrongChecksum")
        self._send(b"")

    def lfs_verify(self) -> None:
        self._send(b"", status=200 if (self.hub.root / json.loads(self.body)["oid"]).exists() else 404)

    def commit(self, repo: str, revision: str) -> None:
        self._check_change(repo)
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            if revision not in self.hub.branches[repo]:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            head, tree = self._at(repo, revision)
            if header["value"].get("parentCommit", head) != head:
                raise HubError(412, "NotTheHead")
            for operation in operations:
                tree = self._changed(tree, operation["key"], operation["value"])
            oid = self.hub.append(repo, tree, branch=revision, summary=header["value"]["summary"])
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _changed(self, tree: Tree, key: str, value: dict[str, Any]) -> Tree:
        path = value["path"]
        if key == "file":
            return {**tree, path: (self.hub.store(base64.b64decode(value["content"], validate=True)), False)}
        if key == "lfsFile" and (self.hub.root / value["oid"]).exists():
            return {**tree, path: (value["oid"], True)}
        if key in ("deletedFile", "deletedFolder"):
            return {name: blob for name, blob in tree.items() if not f"{name}/".startswith(path.rstrip("/") + "/")}
        raise HubError(400, f"BadOperation {key}")

    # Download

    def tree(self, repo: str, revision: str, folder: str) -> None:
        _, tree = self._at(repo, revision)
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
            raise HubError(404, "EntryNotFound")
        self._send_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, tree = self._at(repo, revision)
        if path not in tree:
            raise HubError(404, "EntryNotFound")
        sha, lfs = tree[path]
        content = (self.hub.root / sha).read_bytes()
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha if lfs else self.hub.git_oid(sha)}"',
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(content, headers=headers)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise HubError(416, "RangeNotSatisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(content[start:stop], status=206, headers=headers)


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", "/api/agent-harnesses", Handler.agent_harnesses),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("GET", f"/api/models/{_REPO}/auth-check(?P<write>/write)?", Handler.auth_check),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    ("GET", "/api/models/(?P<repo>[^/]+(?:/[^/]+)?)", Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    ("GET", f"/api/models/{_REPO}/commits/{_REVISION}", Handler.commits),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
