"""Every method trains, pushes in every way, and is opened from the Hub where this library is not."""

import json
import math
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi

from helpers.loopback_hub import LoopbackHub, connected, hub_environment
from helpers.method_matrix import build, programs

PROGRAMS = programs()
IDS = torch.arange(5, 25).reshape(2, 10)
# How a run is pushed: at every save with the call at the end, by the option alone, or when it is saved at the end.
SAVING = {"save_strategy": "steps", "save_steps": 1}
WAYS = {
    "call": SAVING | {"hub_strategy": "checkpoint", "hub_always_push": True, "max_steps": 2},
    "option": SAVING | {"hub_strategy": "every_save", "hub_private_repo": True, "hub_revision": "trained"},
    "end": {"hub_strategy": "end"},
}
# The ways do not depend on the method: every method takes one of them, and these two, with two models and with code of its
# own, take all. The slow tests take all with all.
IN_ALL_WAYS = ("rtd", "recurrent-lm")
BRANCHES = {"call": "main", "option": "trained", "end": "main"}
SAID = {
    "call": [f"Training in progress, step {step}" for step in (1, 1, 2, 2)] + ["End of training"],
    "option": ["Training in progress, step 1"],
    "end": ["Model save"],
}

# Runs where hf_pretrain cannot be imported: opens what the plan names, and says what went wrong with what.
PULL = """
import json, sys, traceback
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_pretrain":
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Blocker())
import torch, transformers
from huggingface_hub import ModelCard

torch.set_grad_enabled(False)
ids = torch.arange(5, 25).reshape(2, 10)

def open_all(run):
    at = {"revision": run["branch"]}
    expected = torch.load(run["outputs"])
    for part in run["parts"]:
        options = at | {"subfolder": part["folder"], "trust_remote_code": part["has_own_code"]}
        for auto_class in part["auto_classes"]:
            model = getattr(transformers, auto_class).from_pretrained(run["repo"], **options).eval()
            assert type(model).__module__.startswith("transformers_modules." if part["has_own_code"] else "transformers.models.")
            name = "base" if auto_class == "AutoModel" else "head"
            torch.testing.assert_close(model(ids)[0], expected[part["folder"] + name], atol=1e-6, rtol=0)
    own_code = at | {"trust_remote_code": any(part["has_own_code"] for part in run["parts"])}
    assert transformers.AutoTokenizer.from_pretrained(run["repo"], **own_code)("w1 w2")["input_ids"] == run["tokens"]

def read_card(run):
    data = ModelCard.load(run["repo"]).data
    results = {result.metric_type: result.metric_value for result in data.eval_results or ()}
    return {"results": results, "library": data.library_name, "tags": data.tags, "pipeline": data.pipeline_tag}

found = {}
for label, run in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        open_all(run)
        found[label] = {"problem": None, "card": read_card(run) if run["branch"] == "main" else None}
    except Exception:
        found[label] = {"problem": traceback.format_exc()}
assert not [name for name in sys.modules if name.startswith("hf_pretrain")]
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@dataclass
class Pushed:
    """All that was pushed, by the name of the method and the way."""

    hub: LoopbackHub
    trainers: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def trainer(self, label):
        assert label not in self.problems, self.problems[label]
        return self.trainers[label]


def auto_classes(part):
    """The Auto classes that are to open a model: the one that it was saved for, and the one without a head."""
    names = [name for name in dir(transformers) if name.startswith("AutoModel") and name != "AutoModel"]
    mappings = {name: getattr(getattr(transformers, name), "_model_mapping", {}) for name in names}
    kind = type(part.config)
    heads = [name for name, mapping in mappings.items() if kind in mapping and mapping[kind] is type(part)]
    return [*heads[:1], "AutoModel"]


def has_own_code(part):
    return type(part).__module__.startswith("hf_pretrain.models.")


def plan(label, trainer, outputs):
    """What the other process is to open, and what it should find; parts that only this library has are left out."""
    trainer.model.eval()
    parts, expected = [], {}
    for folder, attribute in trainer.model.export_parts.items():
        part = trainer.model.get_submodule(attribute)
        if not type(part).__module__.startswith(("transformers.", "hf_pretrain.models.")):
            continue
        parts.append({"folder": folder, "has_own_code": has_own_code(part), "auto_classes": auto_classes(part)})
        with torch.no_grad():
            expected |= {f"{folder}head": part(IDS)[0], f"{folder}base": part.base_model(IDS)[0]}
    torch.save(expected, outputs)
    tokens = trainer.processing_class("w1 w2")["input_ids"]
    branch = BRANCHES[label.partition(".")[2]]
    return {"repo": f"tester/{label}", "branch": branch, "parts": parts, "outputs": str(outputs), "tokens": tokens}


def names(*folder):
    """The files of a folder."""
    return {path.name for path in Path(*folder).iterdir()}


def push(program, folder, way):
    # The repository has the name of the folder.
    trainer = build(program, folder, push_to_hub=True, learning_rate=1e-2, **WAYS[way])
    trainer.train()
    if way == "call":
        trainer.evaluate()
        trainer.push_to_hub()
    elif way == "end":
        trainer.save_model()
    return trainer


def labels_of(items):
    """The methods and ways of the tests of this module that are to run."""
    given = [item.callspec.params for item in items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return dict.fromkeys(f"{params['name']}.{params.get('way', 'call')}" for params in given)


@pytest.fixture(scope="module")
def pushed(request, tmp_path_factory):
    work = tmp_path_factory.mktemp("push")
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        pushed, plans = Pushed(hub), {}
        with connected(hub.url):
            for label in labels_of(request.session.items):
                name, _, way = label.partition(".")
                try:
                    trainer = pushed.trainers[label] = push(PROGRAMS[name], work / label, way)
                    plans[label] = plan(label, trainer, work / f"{label}.pt")
                except Exception:
                    pushed.problems[label] = traceback.format_exc()
        (work / "plans.json").write_text(json.dumps(plans))
        command = [sys.executable, "-I", "-c", PULL, str(work / "plans.json"), str(work / "found.json")]
        environment = hub_environment(hub.url, work / "reader") | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        pushed.found = json.loads((work / "found.json").read_text())
        yield pushed


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if way == "call" or name in IN_ALL_WAYS else pytest.mark.slow)
        for name in sorted(PROGRAMS)
        for way in WAYS
    ],
)
class TestEveryWay:
    def test_it_opens_where_only_transformers_is(self, pushed, name, way):
        """Stock models without a word, one of our own by the code that lies beside it; outputs are the trained model's."""
        trainer = pushed.trainer(f"{name}.{way}")
        assert type(trainer.model.root).__module__.startswith(("transformers.", "hf_pretrain.models."))
        assert pushed.found[f"{name}.{way}"]["problem"] is None, pushed.found[f"{name}.{way}"]["problem"]

    def test_what_was_pushed_is_the_export(self, pushed, name, way):
        trainer = pushed.trainer(f"{name}.{way}")
        repo, branch = trainer.hub_model_id, BRANCHES[way]
        assert repo == f"tester/{name}.{way}"
        files = pushed.hub.files(repo, revision=branch)
        expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "plots/loss.png"}
        weights = {f"{folder}/model.safetensors".removeprefix("/") for folder in trainer.model.export_parts}
        assert expected | weights <= files.keys()
        assert not [path for path in files if path.startswith(("checkpoint-", "_", "optimizer", "training_args"))]
        last = {path.removeprefix("last-checkpoint/") for path in files if path.startswith("last-checkpoint/")}
        assert last == (names(trainer.args.output_dir, "checkpoint-2") if way == "call" else set())
        assert f'from_pretrained("{repo}"' in files["README.md"].read_text(encoding="utf-8")
        assert [path.endswith(".py") for path in files].count(True) > 0 or not has_own_code(trainer.model.root)

    def test_where_and_when_it_was_pushed(self, pushed, name, way):
        hub, repo = pushed.hub, pushed.trainer(f"{name}.{way}").hub_model_id
        assert hub.said(repo) == ["initial commit", *SAID[way]]
        assert (repo in hub.private) == (way == "option")
        assert (hub.files(repo) == {}) == (way == "option")


@pytest.mark.parametrize("name", sorted(PROGRAMS))
class TestEveryMethod:
    def test_its_metadata_is_what_the_hub_reads(self, pushed, name):
        trainer = pushed.trainer(f"{name}.call")
        card = pushed.found[f"{name}.call"]["card"]
        row = [row for row in trainer.state.log_history if "eval_loss" in row][-1]
        of_sentences = "sentence-transformers" in trainer.objective.tags
        assert card["library"] == ("sentence-transformers" if of_sentences else "transformers")
        assert {"hf_pretrain", trainer.objective.name} <= set(card["tags"])
        assert card["pipeline"] and card["results"]
        measured = {name.removeprefix("eval_"): value for name, value in row.items()}
        losses = [name.removesuffix("_loss") for name in measured if name.endswith("_loss")]
        measured |= {f"{name}_perplexity": math.exp(measured[f"{name}_loss"]) for name in losses}
        assert card["results"] == pytest.approx({name: measured[name] for name in card["results"]}, rel=1e-3)

    def test_every_part_opens_from_its_folder_here(self, pushed, name, tmp_path):
        """Those too that only this library has a class for."""
        trainer = pushed.trainer(f"{name}.call")
        with connected(pushed.hub.url), torch.no_grad():
            for folder, attribute in trainer.model.export_parts.items():
                part = trainer.model.get_submodule(attribute)
                options = {"subfolder": folder, "cache_dir": tmp_path, "output_loading_info": True}
                loaded, info = type(part).from_pretrained(trainer.hub_model_id, **options)
                assert not info["missing_keys"] and not info["unexpected_keys"]
                assert torch.equal(loaded.eval()(IDS)[0], part.eval()(IDS)[0])

    def test_a_run_goes_on_from_the_last_checkpoint_on_the_hub(self, pushed, name, tmp_path):
        """As it was after the first of two steps: the second from there gives the same weights to the bit."""
        trainer, hub = pushed.trainer(f"{name}.call"), pushed.hub
        repo = trainer.hub_model_id
        first = [commit for commit in hub.commits[repo] if hub.summaries[commit] == SAID["call"][0]][-1]
        options = {"revision": first, "allow_patterns": "last-checkpoint/*", "local_dir": tmp_path / "downloaded"}
        with connected(hub.url):
            folder = HfApi(endpoint=hub.url).snapshot_download(repo, **options)
        resumed = build(PROGRAMS[name], tmp_path / "run", learning_rate=1e-2, max_steps=2)
        resumed.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
        assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2]
        expected = trainer.model.state_dict()
        assert expected.keys() == resumed.model.state_dict().keys()
        assert all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())


def test_every_request_was_of_a_known_kind(pushed):
    assert pushed.hub.unknown == []
