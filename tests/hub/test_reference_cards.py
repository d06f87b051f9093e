"""Every method has a reference card, and its code runs on what the method exports."""

import dataclasses
import inspect
import json

import pytest
from reference_inputs import REFERENCE_CARDS, REFERENCE_DIR

from helpers.fresh_process import run_fresh
from helpers.method_matrix import build, programs
from hf_pretrain.cli import METHODS
from hf_pretrain.hub.card import snippets, write_card
from hf_pretrain.hub.run import describe_run


def test_every_method_has_one_and_nobody_else():
    wanted = sorted(METHODS)
    advice = "give tests/hub/reference_inputs.py an entry for each method, and run it"
    assert sorted(REFERENCE_CARDS) == wanted, advice
    assert sorted(path.stem for path in REFERENCE_DIR.glob("*.md")) == wanted, advice
    assert sorted(path.name for path in (REFERENCE_DIR / "plots").iterdir()) == wanted, advice


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The folder that an untrained model of each method leaves, with the reference card; and its Trainer."""
    found = {}
    for method in sorted(REFERENCE_CARDS):
        folder = tmp_path_factory.mktemp(method)
        trainer = build(programs()[method], folder)
        # As the tokenizers that the programs train.
        trainer.processing_class.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        trainer.save_model()
        write_card(dataclasses.replace(REFERENCE_CARDS[method], log_history=[]), folder)
        found[method] = folder, trainer
    return found


@pytest.fixture(scope="module")
def outcomes(exports, tmp_path_factory):
    """What each block of each card prints, "" if it ran, in a process where transformers alone is imported at first."""
    blocks = {
        f"{method}-{number}": (str(folder), code)
        for method, (folder, _) in exports.items()
        for number, code in enumerate(snippets((folder / "README.md").read_text()))
    }
    work = tmp_path_factory.mktemp("fresh")
    last = sorted(blocks, key=lambda name: "hf_pretrain" in blocks[name][1])
    program = f"""
import json, os, sys, traceback
os.environ["HF_MODULES_CACHE"] = {str(work / "modules")!r}
found = {{}}
for name, (folder, code) in {[(name, blocks[name]) for name in last]!r}:
    os.chdir(folder)
    assert "hf_pretrain" in code or not [name for name in sys.modules if name.partition(".")[0] == "hf_pretrain"]
    try:
        exec(compile(code, name, "exec"), {{}})
        found[name] = ""
    except BaseException:
        found[name] = traceback.format_exc()
open({str(work / "found.json")!r}, "w").write(json.dumps(found))
"""
    log = run_fresh({"blocks": program}, work)["blocks"]
    assert (work / "found.json").exists(), log
    return json.loads((work / "found.json").read_text())


@pytest.mark.parametrize("method", sorted(REFERENCE_CARDS))
def test_the_code_of_the_card_runs(method, exports, outcomes):
    """With the class that the card names, from the folder that an untrained model of the method leaves."""
    (_, trainer), card = exports[method], REFERENCE_CARDS[method]
    parts = trainer.model.export_parts
    assert card.objective.name == trainer.objective.name
    assert card.model_class == type(getattr(trainer.model, parts[""])).__name__
    assert sorted(card.parts) == sorted(folder for folder in parts if folder)
    assert card.fine_tuning_class == describe_run(trainer).fine_tuning_class
    own = {name: problem for name, problem in outcomes.items() if name.rpartition("-")[0] == method}
    assert len(own) == 2 + bool(card.parts) + bool(card.fine_tuning_class)
    assert not any(own.values()), "\n".join(own.values())


@pytest.mark.parametrize("method", sorted(REFERENCE_CARDS))
def test_the_tokenizer_makes_what_the_model_takes(method, exports):
    folder, trainer = exports[method]
    root = getattr(trainer.model, trainer.model.export_parts[""])
    tokenizer = type(trainer.processing_class).from_pretrained(folder)
    for encoded in (tokenizer("w1 w2"), tokenizer("w1 w2", "w3", return_tensors="pt")):
        assert set(encoded) <= set(inspect.signature(root.forward).parameters)
    assert "token_type_ids" in trainer.processing_class.model_input_names, "the tokenizer of the run is as it was"
