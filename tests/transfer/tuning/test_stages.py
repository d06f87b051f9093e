"""`hf-pretrain stages`: what it runs, how it goes on after a stop, and what it refuses before anything trains."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.task_runs import rows, write_encoder, write_tasks
from helpers.two_ranks import run_on_ranks
from hf_pretrain.cli import main
from hf_pretrain.commands.stages import running
from hf_pretrain.commands.stages.running import run_stages
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import read_record
from hf_pretrain.options import read_plan
from hf_pretrain.transfer.tuning.fine_tune import TaskTrainer

SHARED = {"max_steps": 10, "learning_rate": "5e-3", "per_device_train_batch_size": 16, "seed": 3}
SHARED |= {"use_cpu": True, "disable_tqdm": True}
ADAPT = {"adapt": {"train_file": "domain.txt", "block_size": 32}}
EXAMPLES = Path(__file__).parents[3] / "examples"


def finetune(task, **options):
    return {"finetune": {"tasks": "tasks.yaml", "task": task} | options}


def evaluate(*tasks, **options):
    return {"evaluate": {"tasks": [f"tasks.yaml:{task}" for task in tasks]} | options}


MANY = {"multitask": {"tasks": "tasks.yaml", "task": ["pair", "entities"], "max_length": 32}}
LAST = [finetune("pair", **{"from": "3-multitask/pair"}), evaluate("pair", "classification")]
ALL = [ADAPT, finetune("classification"), MANY, *LAST]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tasks, a text and an encoder."""
    place = tmp_path_factory.mktemp("stages")
    write_tasks(place)
    write_encoder(place / "encoder")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_encoder(place / "encoder_without_dropout", **none)
    texts = [row["text"] for row in rows("classification", 240, seed=5)]
    documents = ["\n".join(texts[start : start + 8]) for start in range(0, 240, 8)]
    (place / "domain.txt").write_text("\n\n".join(documents))
    return place


def write_plan(place, stages, *, name="plan", **shared):
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "encoder"} | SHARED | shared | {"stages": stages}))
    return path


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def record(out):
    return json.loads((out / "stages.json").read_text())["stages"]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of a plan of every kind of command, and its results."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run_stages(write_plan(place, ALL, name="whole"), output_dir=out)


def test_every_stage_begins_with_what_the_one_before_has_left(whole, place, tmp_path, monkeypatch):
    out, _ = whole
    # The same by hand, from the folder of the plan.
    monkeypatch.chdir(place)
    shared = [word for name, value in SHARED.items() for word in (f"--{name}", str(value))]
    adapted, tuned = str(tmp_path / "adapted"), str(tmp_path / "tuned")
    text = ["--train_file", "domain.txt", "--block_size", "32"]
    assert main(["adapt", "encoder", *text, *shared, "--output_dir", adapted]) == 0
    assert weights(out / "1-adapt") == weights(tmp_path / "adapted")
    task = ["--tasks", "tasks.yaml", "--task", "classification"]
    assert main(["finetune", adapted, *task, *shared, "--output_dir", tuned]) == 0
    assert weights(out / "2-finetune-classification") == weights(tmp_path / "tuned")


def test_the_head_of_a_task_is_kept_by_from(whole, place, tmp_path, monkeypatch):
    out, _ = whole
    monkeypatch.chdir(place)
    shared = [word for name, value in SHARED.items() for word in (f"--{name}", str(value))]
    task = ["--tasks", "tasks.yaml", "--task", "pair", "--output_dir", str(tmp_path / "pair")]
    assert main(["finetune", str(out / "3-multitask" / "pair"), *task, *shared]) == 0
    assert weights(out / "4-finetune-pair") == weights(tmp_path / "pair")


def test_the_table_has_the_scores_of_the_folders(whole, place, capsys):
    out, found = whole
    names = ["1-adapt", "2-finetune-classification", "3-multitask", "4-finetune-pair", "5-evaluate"]
    assert [entry.name for entry in found] == names and all(entry.seconds > 0 for entry in found)
    scores = json.loads((out / names[1] / "all_results.json").read_text())
    assert found[1].scores == {"accuracy": scores["scores"]["accuracy"]}
    log = json.loads((out / names[0] / "trainer_state.json").read_text())["log_history"]
    assert found[0].scores == {"held-out loss": [row["eval_loss"] for row in log if "eval_loss" in row][-1]}
    several = json.loads((out / names[2] / "trainer_state.json").read_text())["log_history"]
    known = {name: value for row in several for name, value in row.items() if name.startswith("eval_")}
    of_tasks = {"pair accuracy": known["eval_pair_accuracy"], "entities entity_f1": known["eval_entities_entity_f1"]}
    assert found[2].scores == {"mean": known["eval_mean"]} | of_tasks
    assert list(found[2].scores)[0] == "mean"
    assert sum(of_tasks.values()) / 2 == pytest.approx(known["eval_mean"])
    (measured,) = json.loads((out / names[4] / "evaluation.json").read_text())["models"].values()
    assert [row["task"] for row in measured] == ["pair", "classification"]
    assert list(found[4].scores.values()) == [next(iter(row["metrics"].values())) for row in measured]
    # Nothing is left to do, and the table is the same.
    capsys.readouterr()
    assert main(["stages", str(place / "whole.yaml"), "--output_dir", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2-finetune-classification", "1-adapt", "done"] in lines
    shown = {line[0]: line[1:] for line in lines if line and line[-1].startswith(str(out))}
    assert list(shown) == names and shown[names[1]][:2] == ["accuracy", f"{found[1].scores['accuracy']:.3f}"]
    assert ["classification", "accuracy", f"{found[4].scores['classification accuracy']:.3f}"] in lines


def test_the_card_tells_the_whole_way(whole):
    out, _ = whole
    header, *before = read_record(out / "4-finetune-pair").earlier
    assert [row[0].split(" (")[0] for row in before] == [
        "Masked language modelling",
        "classification",
        "Multi-task learning",
    ]
    assert [row[1] for row in before[:2]] == ["domain.txt", "classification_train.jsonl"]
    card = (out / "4-finetune-pair" / "README.md").read_text()
    assert "### Before this run" in card and card.index("domain.txt") < card.index("classification_train.jsonl")
    # A model that was not trained here has nothing to tell.
    assert (
        read_record(out / "1-adapt").earlier == ()
        and "Before this run" not in (out / "1-adapt" / "README.md").read_text()
    )


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_finished_stage_is_not_run_again_and_a_stopped_one_goes_on(kill, whole, place, tmp_path, capfd, monkeypatch):
    straight, out = whole[0], tmp_path / "out"
    stages = [ADAPT, finetune("classification", save_steps=4), evaluate("classification")]
    plan = write_plan(place, stages, name=f"stopped-{kill}")
    # What the fixture has trained need not be trained again.
    shutil.copytree(straight / "1-adapt", out / "1-adapt")
    known = {"1-adapt": record(straight)["1-adapt"]}
    (out / "stages.json").write_text(json.dumps({"stages": known}))
    step = TaskTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), kill)
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", interrupted)
        assert forked(lambda: main(["stages", str(plan), "--output_dir", str(out)])) == (
            143 if kill == signal.SIGTERM else -kill
        )
    shown = capfd.readouterr().err
    if kill == signal.SIGTERM:
        assert "stage 2-finetune-classification: stopped by SIGTERM after step 7" in shown
        assert "start again with the same command (" in shown and "resume_from_checkpoint" not in shown
    assert not (out / "3-evaluate").exists() and record(out)["2-finetune-classification"]["state"] == "begun"
    before, seconds = (
        (out / "1-adapt" / "model.safetensors").stat(),
        record(out)["2-finetune-classification"]["seconds"],
    )
    assert main(["stages", str(plan), "--output_dir", str(out)]) == 0
    assert f"going on from step {7 if kill == signal.SIGTERM else 4}" in capfd.readouterr().out
    assert (out / "1-adapt" / "model.safetensors").stat() == before
    assert record(out)["2-finetune-classification"]["seconds"] > seconds
    assert seconds > 0 or kill == signal.SIGKILL
    assert weights(out / "2-finetune-classification") == weights(straight / "2-finetune-classification")
    assert record(out)["3-evaluate"]["state"] == "done"


def forked(run):
    """Return the status of a fork that calls `run`, or the negative number of the signal that killed it."""
    process = os.fork()
    if not process:
        status = 1
        try:
            status = run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_kill_between_the_end_of_a_stage_and_its_note_costs_nothing(place, tmp_path, monkeypatch):
    """Without checkpoints nothing else would tell that the stage has ended; with several seeds each has a folder."""
    out = tmp_path / "out"
    seeds = finetune("pair", seeds=["0", "1"])
    plan = write_plan(place, [finetune("classification"), seeds], name="noted", save_strategy="no", max_steps="2")
    found = run_stages(plan, output_dir=out)
    kept = record(out)
    for entry in kept.values():
        del entry["scores"]
        entry["state"] = "begun"
    (out / "stages.json").write_text(json.dumps({"stages": kept}))
    monkeypatch.setattr(running, "run_named", lambda *words: pytest.fail("it ran again"))
    assert [entry.scores for entry in run_stages(plan, output_dir=out)] == [entry.scores for entry in found]
    assert [entry["state"] for entry in record(out).values()] == ["done", "done"]
    # What was cut off without a checkpoint is run anew.
    second = out / "2-finetune-pair"
    marks = [second / f"seed-{seed}" / "_unfinished" for seed in (0, 1)]
    for mark in marks:
        mark.touch()
    before = weights(second / "seed-1")
    (second / "seed-1" / "model.safetensors").write_bytes(b"cut off")
    kept["1-finetune-classification"]["state"] = "done"
    (out / "stages.json").write_text(json.dumps({"stages": kept}))
    monkeypatch.undo()
    run_stages(plan, output_dir=out)
    assert weights(second / "seed-1") == before and not any(mark.exists() for mark in marks)


def test_a_changed_plan(place, tmp_path, monkeypatch, capsys):
    """What has begun is refused by name, what has not may change, and a stage is run anew where its folder is removed."""
    out, ran = tmp_path / "out", []
    run_named = running.run_named
    monkeypatch.setattr(running, "run_named", lambda name, words: (ran.append(words), run_named(name, words)))
    one, two = finetune("classification"), finetune("pair")

    def start(*stages, **shared):
        ran.clear()
        return run_stages(write_plan(place, list(stages), name="changed", **shared), output_dir=out)

    start(one)
    start(one, two)  # a stage more
    assert len(ran) == 1 and str(out / "1-finetune-classification") in ran[0]
    first, second = out / "1-finetune-classification", out / "2-finetune-pair"
    for stages, shared, message in (
        ([finetune("classification", weight_decay="0.1"), two], {}, "weight_decay was not given, and is 0.1"),
        ([one, two], {"learning_rate": "1e-3"}, "learning_rate was 5e-3, and is 1e-3"),
        ([one, two], {"model_name_or_path": "encoder_without_dropout"}, "begins_with was encoder, and is encoder_"),
        ([one], {}, f"{second} is a stage that the plan no longer has"),
        ([one, ADAPT, two], {}, f"{second} is a stage that the plan no longer has"),
    ):
        with pytest.raises(InputError, match=message):
            start(*stages, **shared)
        assert not ran
    with pytest.raises(InputError, match=f"remove {first} and {second} to run these anew"):
        start(one, two, learning_rate="1e-3")
    # The rows of a task are part of the plan.
    tasks = (place / "tasks.yaml").read_text()
    try:
        (place / "tasks.yaml").write_text(tasks.replace("pair_train", "classification_train"))
        with pytest.raises(InputError, match=r"2-finetune-pair has begun.*train_file was pair_train.jsonl"):
            start(one, two)
    finally:
        (place / "tasks.yaml").write_text(tasks)
    kept = tmp_path / "kept"
    shutil.move(first, kept)
    with pytest.raises(InputError, match=f"{second} was made from a stage that is no longer there"):
        start(one, two)
    shutil.rmtree(second)
    start(one, two, learning_rate="1e-3")
    assert len(ran) == 2 and weights(first) != weights(kept)
    # Files of done stages are not needed any more.
    shutil.rmtree(second)
    (second).mkdir()
    (second / "notes.txt").write_text("mine")
    (out / "stages.json").write_text(json.dumps({"stages": {k: v for k, v in record(out).items() if k[0] == "1"}}))
    with pytest.raises(InputError, match=f"{second} is in use, and not by this plan"):
        start(one, two, learning_rate="1e-3")


def test_messages_name_no_option_that_a_plan_cannot_take(place, tmp_path):
    """A start of other words stays beside a folder that was removed, and the program would have it overwritten."""
    out = tmp_path / "out"
    (out / "1-adapt-start").mkdir(parents=True)
    words = {"adapt": ADAPT["adapt"] | {"new_words": "auto:3"}}
    with pytest.raises(InputError, match=f"stage 1-adapt: .*: remove {out}/1-adapt-start, or name another") as caught:
        run_stages(write_plan(place, [words], name="words"), output_dir=out)
    assert "overwrite" not in str(caught.value)


WRONG = {
    "unknown program": (
        [{"fintune": {"task": "x"}}],
        r"entry 1: unknown program 'fintune': did you mean 'finetune'\?",
    ),
    "no stage": ([{"statistics": {"train_file": "domain.txt"}}], "statistics is no stage"),
    "unknown option": (
        [ADAPT, finetune("pair", lr="1")],
        r"stage 2-finetune-pair: unknown option 'lr': did you mean 'learning_rate'",
    ),
    "option of another": ([ADAPT, finetune("pair", mlm_probability="0.1")], "unknown option 'mlm_probability'"),
    "value": ([ADAPT, finetune("pair", weight_decay="much")], "stage 2-finetune-pair: .*weight_decay.*much"),
    "range": ([ADAPT, finetune("pair", validation_fraction="2")], "stage 2-finetune-pair: .*validation_fraction=2"),
    "strategy": ([ADAPT, finetune("pair", strategy="ful")], "stage 2-finetune-pair: .*'ful'"),
    "no effect": ([ADAPT, finetune("pair", lora_rank="4")], "stage 2-finetune-pair: .*lora_rank"),
    "no task": ([ADAPT, finetune("pear")], "stage 2-finetune-pear: task='pear' must be one of.*did you mean 'pair'"),
    "no task of several": (
        [ADAPT, {"multitask": {"tasks": "tasks.yaml", "task": ["pair", "pear"]}}],
        "stage 2-multitask: task='pear'",
    ),
    "no file": (
        [{"adapt": {"train_file": "nowhere.txt"}}],
        "1-adapt: train_file='nowhere.txt' is neither beside the plan",
    ),
    "no tasks": ([ADAPT, finetune("pair", tasks="none.yaml")], "2-finetune-pair: tasks='none.yaml' is neither"),
    "no rows": ([ADAPT, finetune("broken", tasks="broken.yaml")], "stage 2-finetune-broken: .*missing.jsonl"),
    "no column": ([ADAPT, finetune("strange", tasks="broken.yaml")], "stage 2-finetune-strange: .*nothing"),
    "no evaluation": ([ADAPT, evaluate("pear")], "stage 2-evaluate: .*pear"),
    "no model left": (
        [evaluate("pair"), ADAPT],
        "2-adapt would begin with 1-evaluate, but 1-evaluate leaves no model there",
    ),
    "seeds leave several": (
        [finetune("pair", seeds=["0", "1"]), finetune("pair")],
        "begin with 1-finetune-pair/seed-0 or 1-finetune-pair/seed-1 by `from`",
    ),
    "adapters alone": (
        [finetune("pair", strategy="lora", export="adapter"), finetune("pair")],
        "1-finetune-pair leaves no model there",
    ),
    "from nowhere": ([ADAPT, finetune("pair", **{"from": "1-adopt"})], "from='1-adopt' must be one of 1-adapt"),
    "from no task": ([MANY, finetune("pair", **{"from": "1-multitask/pear"})], "1-multitask leaves no model there"),
    "from before the first": ([finetune("pair", **{"from": "1-adapt"})], "there is no stage before the first"),
    "two models": (
        [ADAPT, finetune("pair", model_name_or_path="encoder")],
        "2-finetune-pair: model_name_or_path='encoder', but",
    ),
    "two first models": (
        [{"adapt": {"model": "encoder", "train_file": "domain.txt"}}],
        "1-adapt: model='encoder', but",
    ),
    "own folder": ([ADAPT, finetune("pair", output_dir="there")], "output_dir is the plan's"),
    "own resume": ([ADAPT, finetune("pair", resume_from_checkpoint="auto")], "resume_from_checkpoint is the plan's"),
    "empty": ([ADAPT, finetune("pair", max_examples=None)], "2-finetune-pair: max_examples is empty"),
    "phases": (
        [{"mlm": {"train_file": "domain.txt", "phases": [{"share": "100%"}]}}],
        "phases are written in a recipe",
    ),
    "recipe": ([ADAPT, finetune("pair", config="none_such")], "none_such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_be_known_is_refused_before_anything_trains(name, place, tmp_path, capsys, monkeypatch):
    stages, message = WRONG[name]
    # From any folder.
    monkeypatch.chdir(tmp_path)
    broken = {"broken": {"type": "classification", "text": "text", "train_file": "missing.jsonl"}}
    broken["strange"] = {"type": "classification", "text": "nothing", "train_file": "pair_train.jsonl"}
    (place / "broken.yaml").write_text(yaml.safe_dump(broken))
    monkeypatch.setattr(running, "run_named", lambda *words: pytest.fail("it ran"))
    with pytest.raises(InputError, match=message):
        run_stages(write_plan(place, stages, name="wrong"), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_options_go_to_the_stages_that_train_and_have_them(place, tmp_path, capsys):
    plan = write_plan(place, [ADAPT, finetune("pair", seed="9"), evaluate("pair")], name="dry", mlm_probability="0.2")
    assert main(["stages", str(plan), "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("hf-pretrain ")]
    assert [command[1] for command in commands] == ["adapt", "finetune", "evaluate"]
    assert "--mlm_probability=0.2" in commands[0] and "--mlm_probability=0.2" not in commands[1]
    assert "--seed=3" in commands[0] and "--seed=9" in commands[1] and "--seed=3" not in commands[2]
    assert f"--train_file={place / 'domain.txt'}" in commands[0] and str(place / "encoder") in commands[0]
    assert not (tmp_path / "out").exists()
    for name, message in (("mlm_probabilty", "did you mean 'mlm_probability'"), ("top_k", "no stage that trains has")):
        with pytest.raises(InputError, match=message):
            run_stages(write_plan(place, [ADAPT], name="dry", **{name: "1"}), output_dir=tmp_path / "out")


@pytest.mark.parametrize("value", [None, "NO"])
def test_what_a_stage_writes_into_the_environment_does_not_reach_another(value, place, tmp_path, monkeypatch):
    """transformers hands options such as FSDP's to accelerate there."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    monkeypatch.setenv(name, "NO")
    if value is None:
        monkeypatch.delenv(name)
    seen = []

    def run(*words):
        seen.append(os.environ.get(name))
        os.environ[name] = "true"

    monkeypatch.setattr(running, "run_named", run)
    run_stages(write_plan(place, [finetune("pair"), finetune("pair")], name="written"), output_dir=tmp_path / "out")
    assert seen == [value, value] and os.environ.get(name) == value


def test_an_encoder_becomes_the_teacher_or_half_of_an_encoder_decoder(place, tmp_path, capsys):
    text = {"train_file": "domain.txt"}
    student = {"distil": text | {"student_layers": "first", "num_hidden_layers": "1"}}
    # Two mappings: YAML would write the second of one as an alias.
    stages = [ADAPT, student, {"denoise": {**text}}, {"denoise": {**text}}]
    plan = write_plan(place, stages, name="kinds")
    assert main(["stages", str(plan), "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("hf-pretrain ")]
    out = str(tmp_path / "out")
    assert commands[1][2:4] == ["--teacher_name_or_path", f"{out}/1-adapt"]
    assert commands[2][2:4] == ["--encoder_name_or_path", f"{out}/2-distil"]
    assert commands[3][2:4] == ["--model_name_or_path", f"{out}/3-denoise"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: encoder", "stages must be one list"),
        ("stages: []", "stages must be one list"),
        ("stages: {adapt: {}}", "stages must be one list"),
        ("stages:\n- adapt", "entry 1 of stages is no mapping"),
        ("stages:\n- finetune:\n  task: pair", "entry 1 of stages has 2 keys, finetune, task"),
        ("stages:\n- finetune:", "entry 1 of stages, finetune, has no options"),
        ("stages:\n- finetune: {task: a, task: b}", "entry 1 of stages, finetune: task is given twice"),
        ("stages:\n- mlm: {a: 1}\nstages:\n- mlm: {a: 1}", "stages must be one list"),
        ("- mlm", "a recipe is a mapping"),
    ],
)
def test_a_file_of_another_form_is_refused(text, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "plan.yaml", entries="stages")


def test_values_are_kept_as_they_were_typed(tmp_path):
    (tmp_path / "plan.yaml").write_text("rate: 5e-4\nstages:\n- mlm: {save_strategy: no, steps: 1_000, seeds: [0, 1]}")
    shared, stages = read_plan(tmp_path / "plan.yaml", entries="stages")
    assert shared == {"rate": "5e-4"} and stages == [
        ("mlm", {"save_strategy": "no", "steps": "1_000", "seeds": ["0", "1"]})
    ]


def test_a_folder_in_use_is_refused(place, tmp_path):
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    plan = write_plan(place, [finetune("pair")], name="locked")
    with FileLock(out / "_lock"), pytest.raises(InputError, match="is in use by another process"):
        run_stages(plan, output_dir=out)
    assert not (out / "stages.json").exists()


@pytest.mark.slow
def test_two_ranks_run_the_same_plan(place, tmp_path):
    for name in ("tasks.yaml", *(path.name for path in place.glob("*.jsonl"))):
        shutil.copy(place / name, tmp_path / name)
    shutil.copytree(place / "encoder_without_dropout", tmp_path / "encoder_without_dropout")
    run_on_ranks("helpers.stages_worker", tmp_path, world_size=[1, 2])
    one, two = record(tmp_path / "stages-1"), record(tmp_path / "stages-2")
    assert list(one) == list(two) == ["1-finetune-classification", "2-finetune-pair", "3-evaluate"]
    assert all(entry["state"] == "done" for entry in two.values())
    left, right = (load_file(tmp_path / f"stages-{size}" / "2-finetune-pair" / "model.safetensors") for size in (1, 2))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_the_example_runs(place, tmp_path):
    text = (EXAMPLES / "stages.yaml").read_text()
    for old, new in (
        ("google-bert/bert-base-uncased", "encoder"),
        ("max_steps: 1000", "max_steps: 2"),
        ("num_train_epochs: 5", "max_steps: 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    text = text.replace("num_train_epochs: 1", "max_steps: 2").replace("block_size: 128", "block_size: 32")
    (tmp_path / "stages.yaml").write_text(text.replace("seed: 0", "seed: 0\nuse_cpu: true\ndisable_tqdm: true"))
    shutil.copytree(EXAMPLES / "tasks", tmp_path / "tasks")
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    shutil.copy(place / "domain.txt", tmp_path / "domain.txt")
    for task, header in (("sst2", None), ("rte", "sentence1\tsentence2\tlabel")):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, count in (("train", 40), ("dev", 12)):
            made = rows("pair", count, seed=len(split))
            lines = [
                f"{row['text']}\t{int(row['label'] == 'good')}"
                if header is None
                else f"{row['text']}\t{row['other']}\t{'entailment' if row['label'] == 'good' else 'not_entailment'}"
                for row in made
            ]
            (tmp_path / "data" / task / f"{split}.tsv").write_text("\n".join([*filter(None, [header]), *lines]) + "\n")
    found = run_stages(tmp_path / "stages.yaml", output_dir=tmp_path / "out")
    assert [entry.name for entry in found] == ["1-adapt", "2-finetune-sst2", "3-finetune-rte"]
    assert [list(entry.scores) for entry in found] == [["held-out loss"], ["accuracy"], ["accuracy"]]
