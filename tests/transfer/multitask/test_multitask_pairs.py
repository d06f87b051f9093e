"""Tasks of pairs whose two texts are encoded apart, beside tasks with other heads, over one encoder."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from helpers.multitask_runs import (
    DEFAULTS,
    load_tasks,
    losses,
    moved,
    tokenizer,
    trainer,
    weights,
    write_encoder,
    write_tasks,
)
from hf_pretrain.cli import main
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import read_record
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel
from hf_pretrain.transfer.tuning.heads import open_for_task

SIZES = {"pair": 32, "topic": 24, "tags": 16}
SYMMETRIC = {"architecture": "pair_encoder", "architecture_options": {"symmetric": True}, "mix_layers": True}
# A pair encoder, another architecture for all others, and a stock head.
HEADS = {"architecture": "cnn", "architecture_options": {"num_filters": 4, "widths": [1, 2]}}
HEADS |= {"task_architectures": {"pair": SYMMETRIC, "tags": None}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    write_encoder(place / "encoder")
    write_tasks(place / "tasks", SIZES)
    return place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return load_tasks(tmp_path_factory.mktemp("pairs") / "tasks", SIZES)


def batch_of(data, *, apart, split="validation", count=None):
    rows = data.encoded(split, tokenizer(), max_length=32, apart=apart)
    return data.collator(tokenizer(), apart=apart)([rows[i] for i in range(len(rows) if count is None else count)])


@pytest.mark.parametrize("strategy", ["full", "frozen"])
def test_one_task_of_pairs_is_plain_fine_tuning_to_the_bit(tmp_path, place, tasks, strategy):
    """With dropout, over three passes: the texts, the batches and the gradients are those of `finetune`."""
    data, shared = tasks["pair"], {"strategy": strategy, "num_train_epochs": 3, "learning_rate": 1e-2}
    head = {"architecture": "pair_encoder"}
    mine = trainer(tmp_path / "mine", place / "encoder", {"pair": data}, heads=head, **shared)
    plain = FineTuningTrainer(
        copy.deepcopy(mine.model.task_model("pair")),
        FineTuningArguments(**{"output_dir": str(tmp_path / "plain"), **DEFAULTS, **shared}),
        train_dataset=data.encoded("train", tokenizer(), max_length=32, apart=True),
        data_collator=data.collator(tokenizer(), apart=True),
    )
    for run in (mine, plain):
        set_seed(5)
        run.train()
    assert losses(mine) == losses(plain) and len(losses(mine)) == 24
    assert not moved(weights(plain.model), weights(mine.model.task_model("pair")))


@pytest.mark.parametrize("task", list(SIZES))
def test_a_task_gives_the_heads_of_others_no_gradient(place, tasks, task):
    model = MultiTaskModel.from_tasks(str(place / "encoder"), tasks, **HEADS)
    alone = open_for_task(
        str(place / "encoder"), tasks["pair"], architecture="pair_encoder", architecture_options={"symmetric": True}
    ).model
    assert type(model.task_model("pair").architecture) is type(alone.architecture)
    batch = batch_of(tasks[task], apart=task == "pair", split="train", count=4)
    model.train()(task, **batch).loss.backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in moving if name.startswith("heads.")} == {task}
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.encoder.parameters() if p.grad is not None)
    rows = {int(row) for row in model.encoder.embeddings.word_embeddings.weight.grad.abs().sum(1).nonzero().flatten()}
    # Each word of either text is read.
    read = {int(i) for name, ids in batch.items() if name.endswith("input_ids") for i in ids.flatten()}
    assert rows == read - {0}


def run(place, out, *options, command="multitask", model="encoder", tasks="tasks"):
    given = [command, place / model, "--tasks", place / tasks / "tasks.yaml", "--output_dir", out, *options]
    return main([str(part) for part in given])


COMMAND = "--max_length 32 --per_device_train_batch_size 4 --use_cpu true --learning_rate 0.02".split()
ON_TOP = ["--architecture", "cnn", "--architecture_options", json.dumps(HEADS["architecture_options"])]
ON_TOP += ["--task_architectures", json.dumps(HEADS["task_architectures"])]


SAVE = ["--save_strategy", "steps", "--save_steps", "9", "--save_total_limit", "2", "--max_steps", "18"]


@pytest.fixture(scope="module")
def first(place):
    assert run(place, place / "first", *ON_TOP, *COMMAND, *SAVE) == 0
    return place / "first"


def test_each_folder_opens_with_its_own_head_and_says_what_was_measured(place, first, tmp_path):
    scores = {one.task: one.metrics for one in read_record(first).evaluations}
    bodies = {}
    for name, data in load_tasks(tmp_path / "again", SIZES).items():
        model, info = data.auto_class.from_pretrained(first / name, output_loading_info=True)
        assert not any(info.values())
        kind = getattr(model.config, "architecture", None)
        assert kind == {"pair": "pair_encoder", "topic": "cnn", "tags": None}[name]
        batch = batch_of(data, apart=name == "pair")
        with torch.no_grad():
            found = model.eval()(**batch).logits
        assert data.score("validation", found.numpy(), tokenizer=tokenizer()) == pytest.approx(scores[name], abs=1e-5)
        bodies[name] = weights(model.base_model if kind is None else model.encoder)
        if name == "pair":
            check_symmetric(model, batch, found)
            assert model.scalar_mix is not None and (first / name / "modeling_task_heads.py").is_file()
    shared = bodies["pair"]
    start = weights(AutoModel.from_pretrained(place / "encoder"))
    root = weights(AutoModel.from_pretrained(first))
    assert moved({name: start[name] for name in shared}, shared)
    assert all(not moved(shared, body) for body in (bodies["topic"], bodies["tags"], root))
    card = (first / "README.md").read_text()
    assert "| pair_encoder (symmetric=True, mix_layers) |" in card and "reads two texts apart" in card
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    assert recipe["task_architectures"] == HEADS["task_architectures"]


def check_symmetric(model, batch, found):
    """The order of the texts makes no difference, and the second text does."""
    swapped = {
        name.removeprefix("pair_") if name.startswith("pair_") else f"pair_{name}": value
        for name, value in batch.items()
        if name != "labels"
    }
    rolled = {name: value.roll(1, 0) if name.startswith("pair_") else value for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**swapped).logits, found, rtol=1e-4, atol=1e-5)
        assert (model(**rolled).logits - found).abs().max() > 1e-3


def test_adapters_are_merged_below_each_head(place, tasks, tmp_path):
    trained = trainer(tmp_path / "run", place / "encoder", tasks, heads=HEADS, strategy="lora", max_steps=6)
    trained.train()
    trained.stock_model().export(tmp_path / "out")
    for name, data in tasks.items():
        model, info = data.auto_class.from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        batch = batch_of(data, apart=name == "pair")
        with torch.no_grad():
            inside = trained.model.eval()(task=name, **batch).logits
            torch.testing.assert_close(model.eval()(**batch).logits, inside, rtol=1e-3, atol=1e-4)
        assert not any(info.values())


def test_evaluate_scores_the_head_as_the_run_did_and_finetune_keeps_it(place, first, tmp_path, capsys):
    wanted = {one.task: one.metrics for one in read_record(first).evaluations}["pair"]
    name = f"{place / 'tasks' / 'tasks.yaml'}:pair"
    results = tmp_path / "evaluation.json"
    given = ["evaluate", first / "pair", "--tasks", name, "--how", "head", "--output_file", results]
    assert main([str(part) for part in given]) == 0
    (found,) = json.loads(results.read_text())["models"][str(first / "pair")]
    assert found["metrics"]["accuracy"] == pytest.approx(wanted["accuracy"])
    capsys.readouterr()
    # The folder of the task is what finetune writes too.
    last = [*COMMAND, "--max_steps", "1", "--task", "pair"]
    assert run(place, tmp_path / "next", *last, command="finetune", model=first / "pair") == 0
    assert "EncoderForSequenceClassification of pair_encoder" in (shown := capsys.readouterr().out)
    assert "with the head that the checkpoint has" in shown


def test_a_run_goes_on_from_its_checkpoint_to_the_bit(place, first, tmp_path, capsys):
    shutil.copytree(first, cut := tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-18")
    for name in SIZES:
        (cut / name / "model.safetensors").unlink()
    assert run(place, cut, *ON_TOP, *COMMAND, *SAVE, "--resume_from_checkpoint", "true") == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row.split()[:1] and row.split()[0] in SIZES]
    assert {row[0]: row[2] for row in rows if len(row) > 6} == {
        "pair": "pair_encoder",
        "topic": "cnn",
        "tags": "stock",
    }
    for name in SIZES:
        one, two = (load_file(folder / name / "model.safetensors") for folder in (first, cut))
        assert not moved(one, two)
    found = MultiTaskModel.from_pretrained(first / "checkpoint-18")
    model = AutoModelForSequenceClassification.from_pretrained(first / "pair").eval()
    batch = batch_of(load_tasks(tmp_path / "again", SIZES)["pair"], apart=True)
    with torch.no_grad():
        assert torch.equal(found.eval()("pair", **batch).logits, model(**batch).logits)


def test_pairs_are_found_by_the_usual_names_of_columns(place, tmp_path, capsys):
    write_tasks(tmp_path / "tasks", SIZES)
    path = tmp_path / "tasks" / "tasks.yaml"
    known = yaml.safe_load(path.read_text())
    for name, names in (("pair", {"a": "sentence1", "b": "sentence2"}), ("topic", {"text": "sentence"})):
        known[name].pop("text")
        for part in ("train", "dev"):
            file = tmp_path / "tasks" / f"{name}.{part}.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps({names.get(k, k): v for k, v in row.items()}) + "\n" for row in lines))
    path.write_text(yaml.safe_dump(known, sort_keys=False))
    options = ["--task", "pair", "topic", *COMMAND, "--max_steps", "2"]
    given = ["multitask", place / "encoder", "--tasks", path, *options]
    own = ["--task_architectures", '{"pair": "pair_encoder"}']
    assert main([*map(str, given), *own, "--output_dir", str(tmp_path / "out")]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "pair").architecture.reads_pairs
    capsys.readouterr()
    # That there is one text is known only when the file was read; nothing is trained.
    own = ["--architecture", "pair_encoder"]
    assert main([*map(str, given), *own, "--output_dir", str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert "task 'topic': architecture='pair_encoder' reads two texts apart" in shown
    assert shown.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--architecture", "pair_encoder"], "reads two texts apart, and task 'topic' has one, text"),
        (["--architecture", "pair_encoder"], "--task_architectures gives one to some tasks alone"),
        (["--task_architectures", '{"topic": "pair_encoder"}'], "task 'topic': architecture='pair_encoder' reads two"),
        (
            ["--task_architectures", '{"tags": "pair_encoder"}'],
            "task 'tags': architecture='pair_encoder' has no logits",
        ),
        (
            ["--task_architectures", '{"pairs": "pair_encoder"}'],
            "task_architectures='pairs' must be one of pair, topic",
        ),
        (["--task_architectures", '{"pair": "par_encoder"}'], "did you mean 'pair_encoder'"),
        (["--task_architectures", '{"pair": 3}'], "task_architectures has 3"),
        (["--task_architectures", '{"pair": {"mix_layers": true}}'], "give the name of an architecture"),
        (
            ["--task_architectures", '{"pair": {"architecture": "cnn", "symmetric": true}}'],
            "give the name of an architecture",
        ),
        (
            ["--task_architectures", '{"pair": {"architecture": "cnn", "architecture_options": {"symmetric": true}}}'],
            "'cnn' takes widths",
        ),
        (
            ["--task_architectures", '{"pair": "pair_encoder", "tags": null, "topic": null}', "--architecture", "cnn"],
            "architecture='cnn' has no effect: task_architectures names all",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_opened(place, tmp_path, capsys, options, message):
    assert run(place, tmp_path / "out", *options, model=tmp_path / "no-model") == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()


def test_from_tasks_refuses_it_too(place, tasks):
    with pytest.raises(InputError, match="task 'topic'.*reads two texts apart"):
        MultiTaskModel.from_tasks(str(place / "encoder"), tasks, task_architectures={"topic": "pair_encoder"})
