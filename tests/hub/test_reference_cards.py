"""The code of each method's card runs on what the method exports, and the reference cards name the same classes."""

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


def test_every_card_is_of_a_method_and_as_its_entry_says():
    assert REFERENCE_CARDS.keys() <= METHODS.keys()
    wanted, advice = sorted(REFERENCE_CARDS), "run tests/hub/reference_inputs.py"
    assert sorted(path.stem for path in REFERENCE_DIR.glob("*.md")) == wanted, advice
    assert sorted(path.name for path in (REFERENCE_DIR / "plots").iterdir()) == wanted, advice


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The folder that an untrained model of each method leaves, with the card that its record gives; and its Trainer."""
    found = {}
    for method in sorted(METHODS):
        folder = tmp_path_factory.mktemp(method)
        trainer = build(programs()[method], folder)
        # As the tokenizers that the programs train.
        trainer.processing_class.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        trainer.save_model()
        write_card(dataclasses.replace(describe_run(trainer), log_history=[]), folder)
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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_code_of_the_card_runs(method, exports, outcomes):
    """With the class that the card names, from the folder that an untrained model of the method leaves."""
    _, trainer = exports[method]
    parts, card = trainer.model.export_parts, describe_run(trainer)
    reference = REFERENCE_CARDS.get(method, card)
    assert reference.objective.name == trainer.objective.name
    assert reference.model_class == card.model_class == type(getattr(trainer.model, parts[""])).__name__
    assert sorted(reference.parts) == sorted(folder for folder in parts if folder)
    assert reference.fine_tuning_class == card.fine_tuning_class
    own = {name: problem for name, problem in outcomes.items() if name.rpartition("-")[0] == method}
    assert len(own) == 2 + bool(card.parts) + bool(card.fine_tuning_class)
    assert not any(own.values()), "\n".join(own.values())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_tokenizer_makes_what_the_model_takes(method, exports):
    folder, trainer = exports[method]
    root = trainer.model.root
    tokenizer = type(trainer.processing_class).from_pretrained(folder)
    for encoded in (tokenizer("w1 w2"), tokenizer("w1 w2", "w3", return_tensors="pt")):
        assert set(encoded) <= set(inspect.signature(root.forward).parameters)
    assert "token_type_ids" in trainer.processing_class.model_input_names, "the tokenizer of the run is as it was"
