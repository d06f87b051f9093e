"""A model goes to the loopback Hub and comes back through the real client, in a process that knows no other Hub."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from helpers.loopback_hub import READ_TOKEN, LoopbackHub, connected, hub_environment

PUSH = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, create_repo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModel, BertConfig, BertModel

work = Path(sys.argv[1])
assert str(create_repo("tester/notes")) and str(create_repo("tester/notes", exist_ok=True))
folder = work / "folder"
(folder / "sub").mkdir(parents=True)
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# Notes\\n")
(folder / "sub" / "table.bin").write_bytes(bytes(range(256)) * 16)
api = HfApi()
first = api.upload_folder(repo_id="tester/notes", folder_path=folder)
again = api.upload_folder(repo_id="tester/notes", folder_path=folder)
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# More notes\\n")
second = api.upload_folder(repo_id="tester/notes", folder_path=folder)
old = Path(hf_hub_download("tester/notes", "README.md", revision=first.oid)).read_text()
new = Path(hf_hub_download("tester/notes", "README.md")).read_text()
table = Path(hf_hub_download("tester/notes", "sub/table.bin")).read_bytes() == bytes(range(256)) * 16
errors = []
for repo, name in (("tester/notes", "absent.txt"), ("tester/nowhere", "README.md")):
    try:
        hf_hub_download(repo, name)
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        errors.append(type(error).__name__)
api.delete_file("sub/table.bin", repo_id="tester/notes")

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = BertModel(config).eval()
model.push_to_hub("tester/tiny-bert")
loaded = AutoModel.from_pretrained("tester/tiny-bert", cache_dir=work / "cache_of_reader").eval()
outputs, after = (each(torch.arange(10)[None]).last_hidden_state for each in (model, loaded))
assert torch.equal(outputs, after), "outputs differ after the round trip"
facts = {"oids": [first.oid, again.oid, second.oid], "old": old, "new": new, "table": table, "errors": errors}
(work / "facts.json").write_text(json.dumps(facts))
"""

Pushed = tuple[LoopbackHub, dict[str, Any]]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    """Push from a process, load there into an empty cache, and return the hub and what the process saw."""
    work = tmp_path_factory.mktemp("work")
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        environment = hub_environment(hub.url, work / "home_of_writer")
        command = [sys.executable, "-c", PUSH, str(work)]
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        yield hub, json.loads((work / "facts.json").read_text())


def test_every_request_was_of_a_known_kind(pushed: Pushed) -> None:
    hub, _ = pushed
    assert hub.unknown == []


def test_an_unchanged_folder_makes_no_commit_and_a_changed_one_does(pushed: Pushed) -> None:
    _, facts = pushed
    first, again, second = facts["oids"]
    assert first == again != second


def test_each_revision_keeps_its_own_content(pushed: Pushed) -> None:
    hub, facts = pushed
    assert "# Notes" in facts["old"] and "# More notes" in facts["new"] and facts["table"]
    assert set(hub.files("tester/notes", revision=facts["oids"][2])) >= {"README.md", "sub/table.bin"}
    assert "sub/table.bin" not in hub.files("tester/notes")


def test_what_is_missing_is_named_as_the_hub_names_it(pushed: Pushed) -> None:
    _, facts = pushed
    assert facts["errors"] == ["RemoteEntryNotFoundError", "RepositoryNotFoundError"]


def test_weights_went_through_lfs_and_text_did_not(pushed: Pushed) -> None:
    hub, _ = pushed
    tree = hub.commits["tester/tiny-bert"][hub.head("tester/tiny-bert")]
    assert {path: lfs for path, (_, lfs) in tree.items() if path != "README.md"} == {
        "config.json": False,
        "model.safetensors": True,
    }


def fetch(url: str, **request: Any) -> tuple[bytes, dict[str, str]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, **request)) as answer:
        return answer.read(), dict(answer.headers)


def test_a_write_without_the_token_is_refused(pushed: Pushed) -> None:
    hub, _ = pushed
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(f"{hub.url}/api/repos/create", data=b'{"name": "x"}', method="POST")
    assert "tester/x" not in hub.commits


class TestInThisProcess:
    """The client of this process, as the Trainers of the tests use it."""

    @pytest.fixture
    def hub(self, tmp_path):
        with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
            yield hub

    @pytest.fixture
    def api(self, hub):
        api = HfApi(endpoint=hub.url)
        api.create_repo("tester/notes")
        api.create_repo("tester/secrets", private=True)
        return api

    def upload(self, api, repo="tester/notes", content=b"text", path="a.txt", **options):
        return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo, **options)

    def test_a_branch_has_commits_of_its_own(self, hub, api):
        self.upload(api)
        api.create_branch("tester/notes", branch="v1")
        api.create_branch("tester/notes", branch="v1", exist_ok=True)
        self.upload(api, path="b.bin", content=b"\0" * 9, revision="v1")
        self.upload(api, content=b"later")
        assert {path: file.read_bytes() for path, file in hub.files("tester/notes").items()} == {"a.txt": b"later"}
        assert api.list_repo_files("tester/notes", revision="v1") == ["a.txt", "b.bin"]
        assert api.model_info("tester/notes", revision="v1").sha == hub.head("tester/notes", "v1")
        assert len(hub.said("tester/notes")) == 4
        with pytest.raises(RevisionNotFoundError):
            self.upload(api, revision="v2")
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_branch("tester/notes", branch="v1")
        assert hub.unknown == []

    @pytest.mark.parametrize("token", [False, "hf_old"])
    def test_what_is_private_is_hidden(self, hub, api, token):
        assert api.model_info("tester/secrets").private and not api.model_info("tester/notes").private
        with pytest.raises(RepositoryNotFoundError if token is False else HfHubHTTPError, match="401"):
            api.model_info("tester/secrets", token=token)
        hub.append("stranger/secrets", {})
        api.model_info("stranger/secrets")
        hub.private.add("stranger/secrets")
        with pytest.raises(RepositoryNotFoundError, match="404"):
            api.model_info("stranger/secrets")

    def test_who_may_not_write(self, hub, api):
        hub.append("stranger/model", {})
        hub.read_only.add("tester/secrets")
        for repo, token in (("stranger/model", None), ("tester/secrets", None), ("tester/notes", READ_TOKEN)):
            api.auth_check(repo, token=token)
            with pytest.raises(HfHubHTTPError, match="403"):
                api.auth_check(repo, token=token, write=True)
            with pytest.raises(HfHubHTTPError, match="403"):
                self.upload(api, repo, token=token)
            with pytest.raises(HfHubHTTPError, match="403"):
                api.create_branch(repo, branch="v1", token=token)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("stranger/mine")
        hub.namespaces.add("stranger")
        self.upload(api, "stranger/model")
        assert api.whoami()["orgs"] == [{"name": "stranger"}]

    def test_a_part_of_a_file(self, hub, api):
        self.upload(api, content=b"0123456789")
        address = f"{hub.url}/tester/notes/resolve/main/a.txt"
        for asked, part, told in (("2-4", b"234", "2-4/10"), ("7-", b"789", "7-9/10"), ("8-99", b"89", "8-9/10")):
            content, headers = fetch(address, headers={"Range": f"bytes={asked}"})
            assert (content, headers["Content-Range"]) == (part, f"bytes {told}")
        with pytest.raises(urllib.error.HTTPError, match="416"):
            fetch(address, headers={"Range": "bytes=10-"})

    def test_faults_come_when_they_are_asked_for(self, hub, api):
        hub.fail_next("commit", skip=1, times=2)
        self.upload(api, content=b"1")
        for content in (b"2", b"3"):
            with pytest.raises(HfHubHTTPError, match="503"):
                self.upload(api, content=content)
        self.upload(api, content=b"4")
        assert len(hub.said("tester/notes")) == 3
        hub.cut_next("lfs_put", times=6, after=10)
        with pytest.raises(RuntimeError, match="Error while uploading"):
            self.upload(api, content=b"\0" * 100_000)
        assert len(list(hub.root.iterdir())) == 2
        self.upload(api, content=b"\0" * 100_000)
        assert len(list(hub.root.iterdir())) == 3

    def test_what_it_does_not_know_is_written_down(self, hub, api):
        with pytest.raises(HfHubHTTPError):
            api.list_repo_likers("tester/notes").__next__()
        assert hub.unknown == ["GET /api/models/tester/notes/likers"]
