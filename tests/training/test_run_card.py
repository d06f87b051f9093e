"""The facts of a card, as they are gathered from real runs of tiny models."""

import dataclasses
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AlbertConfig, AutoModelForMaskedLM, BertConfig, TrainerState

from helpers.method_matrix import build, programs, tiny_data
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.prepare import DataArguments, prepare_data
from hf_pretrain.hub import run as run_module
from hf_pretrain.hub.card import add_evaluation, render_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.plots import training_figures
from hf_pretrain.hub.record import read_record
from hf_pretrain.hub.run import describe_run, hub_name_of
from hf_pretrain.hub.text import number, with_perplexity
from hf_pretrain.modeling.backbone import flops_of_weights
from hf_pretrain.modeling.base import trial_tokens
from hf_pretrain.training.program import print_report
from hf_pretrain.training.progress import LearningRates

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


def test_before_training_is_step_0_and_after_training_is_the_last_step(finished):
    trainer, folder = finished
    first, *_, last = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert (first["step"], last["step"]) == (0, 2) and first["eval_loss"] != last["eval_loss"]
    for facts in (describe_run(trainer), read_record(folder)):
        assert (facts.metrics_before, facts.metrics_after) == (first, last)


def test_how_full_examples_are_is_in_the_first_line_the_record_and_the_card(tmp_path, capsys):
    data = tiny_data()
    options = {"tokenizer": data.tokenizer, "block_size": 24}
    parts = (
        BlockDataset(data.train_documents, **options),
        BlockDataset(data.eval_documents, mode="doc_sentences", **options),
    )
    trainer = build(MLM, tmp_path, replace(data, train_dataset=parts[0], eval_dataset=parts[1]))
    trainer.train()
    counts = [sum(len(part[index]["input_ids"]) for index in range(len(part))) for part in parts]
    share, held_out = (count / (24 * len(part)) for count, part in zip(counts, parts, strict=True))
    assert f"{len(parts[0])} examples ({share:.1%} full)" in capsys.readouterr().out.splitlines()[0]
    facts = describe_run(trainer)
    assert facts.data["filled_share"] == round(share, 4) > facts.data["held_out_filled_share"] == round(held_out, 4)
    assert f"| Filled share | {number(round(share, 4))} |" in render_card(facts)


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


def measured(facts, name="loss"):
    return {key: value for key, value in facts.items() if key.startswith("eval_") and key.endswith(name)}


BEST = {
    **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    **{"load_best_model_at_end": True, "eval_on_start": True, "learning_rate": 1e-2},
    # The loss falls, so that the "best" is the first: neither the last step nor the last evaluation.
    **{"metric_for_best_model": "loss", "greater_is_better": True},
}


@pytest.mark.parametrize("method", sorted(programs()))
def test_the_numbers_are_those_of_the_best_weights(method, tmp_path, capsys):
    """In the card, its record, its model-index and the report, where these are loaded at the end."""
    # At the rate of the others the loss of the decoder rises at first.
    rate = {"learning_rate": 1e-3} if method == "clm" else {}
    trainer = build(programs()[method], tmp_path, **BEST | rate)
    trainer.train()
    first = next(row for row in trainer.state.log_history if row["step"] == 1 and "eval_loss" in row)
    assert (trainer.held_out.weights_step, trainer.state.global_step) == (1, 4)
    assert describe_run(trainer).metrics_after == first, "even before they are evaluated again"
    trainer.evaluate_export()
    again = trainer.state.log_history[-1]
    assert measured(again) == pytest.approx(measured(first), rel=1e-6)
    assert (again["step"], again["epoch"]) == (1, pytest.approx(first["epoch"]))
    num_rows = len(trainer.state.log_history)
    trainer.save_model()
    trainer.create_model_card()
    capsys.readouterr()
    print_report(trainer)
    out = capsys.readouterr().out
    assert len(trainer.state.log_history) == num_rows
    record, text = read_record(tmp_path), (tmp_path / "README.md").read_text(encoding="utf-8")
    assert record.metrics_after == again and (record.weights_step, record.compute.steps) == (1, 4)
    assert "those of step 1 of 4, the best by" in text and "| At step 1 |" in text
    index = {each.metric_type: each.metric_value for each in ModelCard(text).data.eval_results}
    known = with_perplexity(again)
    assert index and all(value == pytest.approx(known[f"eval_{name}"], rel=1e-3) for name, value in index.items())
    assert "before and at step 1, which is exported" in out
    total = next((line.split() for line in out.splitlines() if line.split()[:1] == ["loss"]), None)
    assert total is None or total[2] == f"{again['eval_loss']:.4f}"


def test_a_run_that_is_done_and_started_again_tells_the_same(tmp_path):
    first = build(MLM, tmp_path, **BEST)
    first.train()
    again = build(MLM, tmp_path, **BEST)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = describe_run(first), describe_run(again)
    assert again.held_out.weights_step == 1 and measured(other.metrics_after) == measured(one.metrics_after)
    assert measured(other.metrics_before) == measured(one.metrics_before) != {}


def test_the_best_without_a_checkpoint_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_pretrain"), "propagate", True)
    trainer = build(MLM, tmp_path, **BEST | {"save_steps": 4})
    trainer.train()
    assert trainer.held_out.weights_step == 4 and "step 1 was the best by loss, but has no checkpoint" in caplog.text
    assert describe_run(trainer).metrics_after["step"] == 4


def test_numbers_of_other_data_are_not_in_the_card(finished):
    trainer, _ = finished
    before, rows = describe_run(trainer), len(trainer.state.log_history)
    trainer.evaluate(trainer.train_dataset)
    trainer.evaluate({"a": trainer.train_dataset, "b": trainer.train_dataset})
    trainer.evaluate(metric_key_prefix="test")
    after = describe_run(trainer)
    assert (after.metrics_before, after.metrics_after) == (before.metrics_before, before.metrics_after)
    assert training_figures(after.log_history) == training_figures(before.log_history)
    del trainer.state.log_history[rows:]


def test_weights_that_were_changed_by_hand_have_numbers_of_their_own_or_none(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trained = trainer.evaluate()
    assert describe_run(trainer).metrics_after["eval_loss"] == trained["eval_loss"]
    with torch.no_grad():
        trainer.model.get_parameter(next(name for name, _ in trainer.model.named_parameters())).mul_(1.5)
    assert describe_run(trainer).metrics_after == {} and trainer.held_out.weights_step is None
    changed = trainer.evaluate()
    assert describe_run(trainer).metrics_after["eval_loss"] == changed["eval_loss"] != trained["eval_loss"]


def test_a_second_training_leaves_nothing_of_the_first(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert describe_run(trainer).metrics_after == {}
    trainer.evaluate_export()
    assert describe_run(trainer).metrics_after["step"] == 2


def test_a_card_in_the_middle_has_no_numbers_of_an_earlier_step(tmp_path):
    trainer = build(MLM, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.state.log_history = [row for row in trainer.state.log_history if row["step"] < 2 or "loss" in row]
    assert describe_run(trainer).metrics_after == {}


def test_evaluations_of_another_run_of_the_folder_are_dropped(tmp_path):
    """As many steps, another seed: the steps alone do not tell whose they are."""
    for seed in (1, 2):
        trainer = build(MLM, tmp_path, max_steps=1, seed=seed)
        trainer.train()
        trainer.save_model()
        assert describe_run(trainer).evaluations == ()
        trainer.create_model_card()
        add_evaluation(tmp_path, PROBE)
        assert describe_run(trainer).evaluations == (PROBE,)


def test_a_student_is_compared_by_the_numbers_of_its_own_weights(tmp_path):
    """The table has the numbers of the log, of the whole held-out text, or none; sizes and times are measured once."""
    trainer = build(programs()["distil"], tmp_path, max_steps=2)
    costs = [row for row in trainer.comparison_rows() if row[0] != ""]
    assert {"Parameters", "Speed-up, batch of 1"} <= {row[0] for row in costs}
    assert "MLM loss" not in {row[0] for row in costs}
    trainer.train()
    metrics = trainer.evaluate()
    rows = {row[0]: row[1:] for row in trainer.comparison_rows()}
    assert rows["MLM loss"] == (number(metrics["eval_mlm_loss"]), number(metrics["eval_teacher_mlm_loss"]))
    assert rows["Same prediction as the teacher"] == (number(metrics["eval_agreement"]), "")
    assert rows["Divergence from the teacher, nats"] == (number(metrics["eval_kl"]), "")
    assert all(rows[row[0]] == row[1:] for row in costs)
    with torch.no_grad():
        trainer.model.student.get_input_embeddings().weight.mul_(1.5)
    assert trainer.comparison_rows() == [("", "Student", "Teacher"), *costs]


def test_an_adapter_is_called_one(tmp_path, capsys, monkeypatch):
    """A stock model with an adapter saves the adapter alone, which no stock class opens by itself."""
    # transformers may ask for a newer peft than there is; what it saves is the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    trainer = build(MLM, tmp_path, max_steps=1)
    trainer.model.model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    print_report(trainer)
    out, text = capsys.readouterr().out, (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    assert "is the adapter default alone, without the model below it" in out and "stock" not in out
    assert "an adapter (LORA)" in text and "stock" not in text and "## How to fine-tune" not in text


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


# Warm-up over the first four of twelve steps, and one row of the log at the end.
FEW_ROWS = {"max_steps": 12, "warmup_steps": 4, "logging_steps": 12, "learning_rate": 1e-3}


def drawn_rates(trainer):
    """Return step -> learning rate as the card draws it."""
    card = describe_run(trainer)
    figures = training_figures(card.log_history, learning_rates=card.learning_rates)
    return next(figure.curves[0].train for figure in figures if figure.file == "learning_rate.png")


def test_the_warm_up_shows_although_it_ends_before_the_first_row_of_the_log(tmp_path):
    trainer = build(MLM, tmp_path, **FEW_ROWS, save_strategy="steps", save_steps=8)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "learning_rate" in row] == [12]
    rates = drawn_rates(trainer)
    # The first step has the rate 0, and the fifth is the first after the warm-up.
    assert rates == pytest.approx({step: 1e-3 * min((step - 1) / 4, (13 - step) / 8) for step in range(1, 13)})
    logged = next(row for row in trainer.state.log_history if "learning_rate" in row)
    assert rates[12] == logged["learning_rate"]
    resumed = build(MLM, tmp_path, **FEW_ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert drawn_rates(resumed) == pytest.approx(rates), "the steps before are those of the schedule"


def test_few_points_draw_a_long_run_with_its_warm_up_its_levels_and_its_fall():
    noted, state = LearningRates(), TrainerState()
    noted.on_train_begin(None, state, None)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    true = np.interp(range(20_000), [0, 1000, 9000, 9001, 19_000, 20_000], [0.0, 1.0, 1.0, 0.5, 0.5, 0.0])
    for step, rate in enumerate(true):
        state.global_step = step
        optimizer.param_groups[0]["lr"] = float(rate)
        noted.on_optimizer_step(None, state, None, optimizer=optimizer)
    steps, rates = zip(*noted.noted, strict=True)
    assert (steps[0], steps[-1]) == (1, 20_000) and len(steps) < 1024
    np.testing.assert_allclose(np.interp(range(1, 20_001), steps, rates), true, atol=0.02)


def test_rates_that_the_log_contradicts_are_not_made_up():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for logged, is_known in ((0.1, True), (0.2, False)):
        state = TrainerState(global_step=10, log_history=[{"step": 10, "learning_rate": logged}])
        noted = LearningRates()
        noted.on_train_begin(None, state, None, lr_scheduler=schedule)
        assert bool(noted.noted) is is_known
        assert not is_known or dict(noted.noted)[2] == 0.5


def test_the_front_matter_has_what_the_options_of_the_training_say(tmp_path):
    facts = {"language": ["de", "nds"], "license": "cc-by-4.0", "datasets": ["org/more"], "tags": ["biomedical"]}
    trainer = build(MLM, tmp_path, **facts)
    trainer.recipe = {"dataset_name": "org/texts"}
    trainer.create_model_card()
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.language, data.license) == (["de", "nds"], "cc-by-4.0")
    assert data.datasets == ["org/texts", "org/more"]
    assert data.tags == ["hf_pretrain", "mlm", "generated_from_trainer", "biomedical"]
    assert not {"language", "license", "tags"} & describe_run(trainer).options.keys()


@pytest.mark.parametrize("options", [{}, {"private_text": True}, {"hub_private_repo": True}])
def test_private_text_gives_no_sentence(tmp_path, options, monkeypatch):
    trainer = build(MLM, tmp_path, **options)
    monkeypatch.setattr(run_module, "find_examples", lambda *args, **kwargs: ("A |held-out| one.", "Another."))
    assert describe_run(trainer).examples == (() if options else ("A |held-out| one.", "Another."))
    assert ("held-out one" in render_card(describe_run(trainer))) is not bool(options)


def test_options_of_data_that_was_prepared_in_python_are_in_the_card(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"a text of some words, number {i}." for i in range(50)))
    options = DataArguments(train_file=[str(corpus)], block_size=16, vocab_size=120, lowercase=False)
    data = prepare_data(options, seed=1, output_dir=tmp_path / "out")
    trainer = build(MLM, tmp_path / "out", replace(tiny_data(), description=data.description))
    card = describe_run(trainer)
    known = {"lowercase": False, "validation_fraction": 0.02, "tokenizer_type": "auto", "mlm_probability": 0.15}
    assert known.items() <= card.options.items() and card.options["train_file"] == ["corpus.txt"]
    assert "options" not in card.data and str(tmp_path) not in render_card(card)


def encoder(config):
    return AutoModelForMaskedLM.from_config(config)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 99,
}


def test_operations_are_those_of_the_weights_that_a_token_passes():
    """A layer that is shared counts each time, tables and heads not at all; attention itself on some devices."""
    layers = 3 * 2 * (4 * 64 * 64 + 2 * 64 * 256)
    attention = 3 * 2 * 2 * 8 * 64
    bert, albert = encoder(BertConfig(**SMALL)), encoder(AlbertConfig(**SMALL, embedding_size=16))
    pooler = 2 * 64 * 64 // 8
    found = flops_of_weights(bert, trial_tokens(bert))
    assert found in (layers, layers + attention)
    shared = flops_of_weights(albert, trial_tokens(albert))
    assert (
        shared in (found + 2 * 16 * 64, found + 2 * 16 * 64 + pooler)
        and albert.num_parameters() < bert.num_parameters()
    )


def test_a_teacher_computes_forward_alone_and_tokens_are_those_seen(tmp_path):
    trainer = build(programs()["distil"], tmp_path)
    trainer.train()
    card = describe_run(trainer)
    student, teacher = trainer.model.student, trainer.model.teacher.model
    forward = [flops_of_weights(part, trial_tokens(part)) for part in (student, teacher)]
    # The pooler of the student is not trained.
    share = student.num_parameters(only_trainable=True) / student.num_parameters()
    assert card.compute.flops == pytest.approx(card.compute.tokens * (forward[0] * (1 + 2 * share) + forward[1]))
    assert list(card.sizes) == ["", "teacher"] and card.sizes["teacher"]["layers"] == 6
    assert card.compute.share_of_peak is None, "no data sheet of this device was read"


@pytest.mark.parametrize(
    ("files", "named", "origin"),
    [
        ({"config.json": '{"_name_or_path": "org/base"}'}, "org/base", "names [org/base]"),
        ({"README.md": "---\nbase_model: org/base\n---\n# x\n"}, "org/base", "names [org/base]"),
        ({"README.md": "---\nbase_model:\n- org/a\n- org/b\n---\n"}, "org/a", "names [org/a]"),
        ({"pretraining/run.json": '{"format": 2, "card": {"repo": "me/mine"}}'}, "me/mine", ""),
        ({"config.json": '{"_name_or_path": "bert"}', "README.md": "---\nbase_model: [\n"}, None, ""),
        ({"config.json": '{"_name_or_path": "out/checkpoint-5"}'}, None, ""),
        ({"config.json": "[]", "README.md": "# no front matter"}, None, ""),
    ],
)
def test_a_local_folder_says_which_model_of_the_hub_it_is_or_came_from(tmp_path, files, named, origin):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = run_module._base_model(str(tmp_path), is_adapter=False)
    assert found["base_model"] == (named or str(tmp_path)) and origin in found.get("origin", "")
    assert bool(origin) is ("origin" in found)
    assert run_module._base_model(str(tmp_path), is_adapter=True)["base_model"] == (
        named if named and not origin else str(tmp_path)
    ), "an adapter opens on the very model alone"


def test_a_folder_of_the_hubs_cache_is_the_model_that_it_is_of(tmp_path):
    folder = tmp_path / "models--org--base" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert hub_name_of(folder, or_base=False) == "org/base"
