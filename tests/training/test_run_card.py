"""The facts of a card, as they are gathered from real runs of tiny models."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from hf_pretrain.hub.card import add_evaluation, render_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import read_record
from hf_pretrain.training.card import describe_run
from method_matrix import build, programs, tiny_data

MLM = programs()["mlm"]
PROBE = Evaluation(task="T", dataset="d", split="test", metrics={"accuracy": 0.5}, method="probe")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a card and a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("card") / "run"
    trainer = build(MLM, folder, max_steps=2, eval_on_start=True, save_strategy="steps", save_steps=1)
    trainer.recipe = {"dataset_name": "org/texts", "max_steps": 2}
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    return trainer, folder


def test_the_record_holds_exactly_the_facts_of_the_card(finished):
    trainer, folder = finished
    assert read_record(folder) == describe_run(trainer)
    assert str(folder.parent) not in (folder / "pretraining" / "run.json").read_text()


def test_a_dataset_of_the_hub_is_in_the_metadata(finished):
    assert ModelCard.load(finished[1] / "README.md").data.datasets == ["org/texts"]


def test_facts_of_the_compute_are_the_runs(finished):
    compute = describe_run(finished[0]).compute
    assert (compute.steps, compute.planned_steps, compute.examples_per_step, compute.processes) == (2, 2, 8, 1)
    assert compute.resumed_at_step is None and compute.energy is None


def test_a_resumed_run_says_since_when_its_time_counts(finished, tmp_path):
    first, folder = finished
    trainer = build(MLM, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    compute, whole = describe_run(trainer).compute, describe_run(first).compute
    assert (compute.resumed_at_step, compute.tokens) == (1, whole.tokens)
    assert 0 < compute.timed_tokens < compute.tokens
    assert "Training time, since the resume at step 1 |" in render_card(describe_run(trainer))


def test_what_people_added_stays_and_evaluations_stay_with_the_weights(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=2)
    trainer.train()
    trainer.create_model_card(license="mit", language="de")
    add_evaluation(tmp_path, PROBE)
    again = describe_run(trainer)
    assert (again.license, again.language, again.evaluations) == ("mit", "de", (PROBE,))
    assert describe_run(trainer, license="apache-2.0").license == "apache-2.0"
    trainer.state.global_step = 1
    assert describe_run(trainer).evaluations == (), "other weights than were measured"


def test_several_held_out_sets_are_measured_before_and_after(tmp_path):
    data = tiny_data()
    data = dataclasses.replace(data, eval_dataset={"news": data.eval_dataset, "law": data.eval_dataset})
    trainer = build(MLM, tmp_path, data, max_steps=1, eval_on_start=True)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| Held-out set | Metric | Before training | After training |" in text
    assert text.count("| news | ") == text.count("| law | ") >= 1
    configs = {result.dataset_config for result in ModelCard(text).data.eval_results}
    assert configs == {"news", "law"}


def test_a_card_in_the_middle_of_a_run_says_so(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=2)
    trainer.train()
    trainer.state.max_steps = 1000
    text = render_card(describe_run(trainer))
    assert "after 2 of 1,000 steps" in text and "## Evaluation" not in text


def test_energy_comes_from_what_codecarbon_left(tmp_path):
    trainer = build(MLM, tmp_path)
    tmp_path.joinpath("emissions.csv").write_text("run_id,emissions,energy_consumed\na,0.1,0.25\n")
    assert describe_run(trainer).compute.energy.kwh == 0.25
