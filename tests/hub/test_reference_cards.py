"""Every method has a reference card, and its code runs on what the method exports."""

import dataclasses

import pytest
from reference_inputs import REFERENCE_CARDS, REFERENCE_DIR

from hf_pretrain.cli import METHODS
from hf_pretrain.hub.card import snippets, write_card
from hf_pretrain.training.card import describe_run
from method_matrix import build, programs


def test_every_method_has_one_and_nobody_else():
    wanted = sorted(METHODS)
    advice = "give tests/hub/reference_inputs.py an entry for each method, and run it"
    assert sorted(REFERENCE_CARDS) == wanted, advice
    assert sorted(path.stem for path in REFERENCE_DIR.glob("*.md")) == wanted, advice
    assert sorted(path.name for path in (REFERENCE_DIR / "plots").iterdir()) == wanted, advice


@pytest.mark.parametrize("method", sorted(REFERENCE_CARDS))
def test_the_code_of_the_card_runs(method, tmp_path, monkeypatch):
    """With the class that the card names, from the folder that an untrained model of the method leaves."""
    trainer, card = build(programs()[method], tmp_path), REFERENCE_CARDS[method]
    trainer.save_model()
    parts = trainer.model.export_parts
    assert card.objective.name == trainer.objective.name
    assert card.model_class == type(getattr(trainer.model, parts[""])).__name__
    assert sorted(card.parts) == sorted(folder for folder in parts if folder)
    write_card(dataclasses.replace(card, log_history=[]), tmp_path)
    monkeypatch.chdir(tmp_path)
    code = snippets((tmp_path / "README.md").read_text())
    assert card.fine_tuning_class == describe_run(trainer).fine_tuning_class
    assert len(code) == 2 + bool(card.parts) + bool(card.fine_tuning_class)
    for number, each in enumerate(code):
        exec(compile(each, f"{method}-{number}", "exec"), {})
