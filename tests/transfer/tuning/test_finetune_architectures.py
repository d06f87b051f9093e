"""Architectures on top of an encoder, from the command line and `fine_tune` to the folder that opens again."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BartConfig, GPT2Config

from helpers.fresh_process import WITHOUT_LIBRARY
from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from helpers.task_runs import QUICK, rows, write_encoder, write_tasks
from hf_pretrain import EncoderForSequenceClassification, EncoderForTokenClassification, InputError
from hf_pretrain.cli import main
from hf_pretrain.hub.card import snippets
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.tasks.spec import load_task, read_tasks
from hf_pretrain.training.output_folder import check_replaceable
from hf_pretrain.transfer.fine_tuning import FineTuningArguments
from hf_pretrain.transfer.tuning.export import export_fine_tuned
from hf_pretrain.transfer.tuning.fine_tune import fine_tune, task_trainer
from hf_pretrain.transfer.tuning.heads import open_for_task

COMMAND = (
    "--learning_rate 5e-3 --max_steps 40 --per_device_train_batch_size 16 --use_cpu true --disable_tqdm true".split()
)
SMALL = {"bilstm": {"lstm_size": 8}, "cnn": {"num_filters": 8, "widths": [1, 2]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    write_encoder(place / "encoder")
    # The second text alone says the class, so a model that does not read it learns nothing.
    lines = {"type": "classification", "text": ["text", "other"]}
    for name, count, seed in (("train", 128, 0), ("dev", 40, 1)):
        found = [
            {"text": row["text"].split()[0], "other": row["text"], "label": row["label"]}
            for row in rows("pair", count, seed=seed)
        ]
        (place / f"second_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    files = {"train_file": "second_train.jsonl", "validation_file": "second_dev.jsonl"}
    with (place / "tasks.yaml").open("a") as stream:
        stream.write(f"second: {json.dumps(lines | files)}\n")
    return place


def arguments(folder, **options):
    return FineTuningArguments(**QUICK | {"output_dir": str(folder)} | options)


def task_of(place, name):
    return read_tasks(place / "tasks.yaml")[name]


def run(place, out, *options, task="classification", architecture="bilstm", strategy="full", model=None):
    given = ["--tasks", place / "tasks.yaml", "--task", task, "--strategy", strategy, "--output_dir", out]
    given += ["--architecture", architecture] if architecture else []
    if architecture in SMALL and "--architecture_options" not in options:
        given += ["--architecture_options", json.dumps(SMALL[architecture])]
    return main(["finetune", *map(str, (model or place / "encoder", *given, *COMMAND, *options))])


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logits_of(model, data, tokenizer, *, apart):
    """The logits of each validation row by itself, so without padding."""
    encoded = data.encoded("validation", tokenizer, max_length=40, apart=apart)
    names = [name for name in encoded.column_names if name.endswith(("input_ids", "token_type_ids"))]
    collate, model = data.collator(tokenizer, apart=apart), model.eval()
    with torch.no_grad():
        return [model(**collate([row])).logits[0].numpy() for row in encoded.select_columns(names)]


@pytest.mark.parametrize(
    ("task", "architecture", "options"),
    [
        ("classification", "bilstm", ("--mix_layers", "true")),
        ("second", "pair_encoder", ()),
        ("regression", "cnn", ()),
        ("entities", "bilstm", ()),
        ("tokens", "scalar_mix", ()),
    ],
)
def test_the_command_learns_and_its_folder_gives_the_predictions_of_the_file(
    place, tmp_path, capsys, monkeypatch, task, architecture, options
):
    out = tmp_path / "out"
    assert run(place, out, *options, task=task, architecture=architecture) == 0
    shown = capsys.readouterr().out
    assert f" of {architecture}" in shown and "trust_remote_code=True" in shown
    data, tokenizer = load_task(task_of(place, task)), AutoTokenizer.from_pretrained(out)
    assert f"columns: {data.columns}" in shown
    model, info = data.auto_class.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.architecture == architecture and (model.scalar_mix is not None) == (
        bool(options) or architecture == "scalar_mix"
    )
    found = logits_of(model, data, tokenizer, apart=architecture == "pair_encoder")
    longest = max(len(row) for row in found)
    if data.spec.type == "tokens":
        found = [np.pad(row, [(0, longest - len(row)), (0, 0)]) for row in found]
    decoded = data.decode("validation", np.stack(found), tokenizer=tokenizer)
    lines = predictions(out)
    if task == "regression":
        np.testing.assert_allclose([line["predicted"] for line in lines], decoded, atol=1e-5)
    else:
        assert [line["predicted"] for line in lines] == decoded
    if data.spec.type == "classification":
        np.testing.assert_allclose([line["logits"] for line in lines], found, atol=1e-5)
    results = json.loads((out / "all_results.json").read_text())
    constant = next(iter(results["references"].values())).get(data.main_metric, 0)
    assert results["scores"][data.main_metric] > max(constant + 0.2, 0.7) and results["architecture"] == architecture
    card = (out / "README.md").read_text()
    assert f"the architecture {architecture}" in card and "with its code" in card
    assert (out / "architectures_task_heads.py").is_file() and (out / "scalar_mix.py").is_file()
    check_replaceable(out)
    monkeypatch.chdir(out)
    codes = snippets(card)
    assert codes
    for code in codes:
        assert "trust_remote_code=True" in code
        exec(code, {})


@pytest.mark.slow
def test_the_code_of_the_card_runs_without_this_library(place, tmp_path):
    """Two texts apart need the most of it."""
    out = tmp_path / "out"
    assert run(place, out, task="second", architecture="pair_encoder") == 0
    (code,) = snippets((out / "README.md").read_text())
    (tmp_path / "run.py").write_text(f"{WITHOUT_LIBRARY}\n{code}\nprint(type(model).__module__)\n")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")],
        cwd=out,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers_modules" in done.stdout


def test_every_weight_has_a_gradient_so_that_processes_wait_for_none(place):
    """BERT's pooler is read by no architecture."""
    data, tokenizer = load_task(task_of(place, "classification")), AutoTokenizer.from_pretrained(place / "encoder")
    opened = open_for_task(str(place / "encoder"), data, architecture="bilstm", mix_layers=True)
    rows = data.encoded("train", tokenizer, max_length=40)
    opened.model(**data.collator(tokenizer)([rows[i] for i in range(8)])).loss.backward()
    assert [name for name, weight in opened.model.named_parameters() if weight.grad is None] == []
    assert {name.split(".")[0] for name in opened.fresh} == {"architecture", "scalar_mix"}
    assert "(scalar_mix, architecture)" in opened.note


def test_the_seed_draws_the_head_and_nothing_else_does(place):
    data = load_task(task_of(place, "classification"))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, again, other = (
        weights(open_for_task(str(place / "encoder"), data, seed=seed, architecture="cnn").model) for seed in (3, 3, 4)
    )
    assert torch.equal(state, torch.get_rng_state())
    encoder = AutoModel.from_pretrained(place / "encoder").state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if name.startswith("encoder."):
            assert torch.equal(tensor, encoder[name.removeprefix("encoder.")]), name
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, other[name]), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("strategy", "architecture", "mix"), [("gradual", "bilstm", True), ("lora", "cnn", False), ("frozen", "max", True)]
)
def test_a_resumed_run_ends_where_the_whole_one_does(place, tmp_path, strategy, architecture, mix):
    options = {"strategy": strategy, "save_strategy": "steps", "save_steps": 5, "max_steps": 10, "num_train_epochs": 1}
    options |= {"unfreeze_every": 3} if strategy == "gradual" else {}
    head = {"architecture": architecture, "architecture_options": SMALL.get(architecture), "mix_layers": mix}
    task, model = task_of(place, "classification"), str(place / "encoder")
    whole = fine_tune(model, task, arguments(tmp_path, **options), **head)
    again = arguments(tmp_path, **options, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    resumed = fine_tune(model, task, again, **head)
    np.testing.assert_array_equal(resumed.predictions, whole.predictions)
    left, right = (weights(found.trainer.model) for found in (whole, resumed))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    parts = {part.name for part in whole.trainer.plan.moving}
    assert ("head" in parts) and ("layer 1" in parts) == (strategy != "frozen")


def test_the_best_weights_of_two_texts_apart_are_those_of_the_main_metric(place, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5, "max_steps": 25}
    options |= {"load_best_model_at_end": True, "save_total_limit": 1}
    task = task_of(place, "second")
    found = fine_tune(str(place / "encoder"), task, arguments(tmp_path, **options), architecture="pair_encoder")
    log = [(row["eval_accuracy"], row["step"]) for row in found.trainer.state.log_history if "eval_accuracy" in row]
    best = max(score for score, _ in log)
    assert found.score == best > 0.8 and (best, found.step) == next(row for row in log if row[0] == best)


def test_a_head_is_kept_for_the_same_labels_and_its_encoder_taken_otherwise(place, tmp_path):
    model, task = str(place / "encoder"), task_of(place, "classification")
    head = {"architecture": "bilstm", "architecture_options": SMALL["bilstm"]}
    found = fine_tune(model, task, arguments(tmp_path / "run", max_steps=3), **head)
    folder = str(export_fine_tuned(found, model_name=model))
    trained = weights(found.trainer.model)
    data = load_task(task)
    # Whether it is named again or not, and whether its defaults are.
    named = {"architecture": "bilstm", "architecture_options": {"lstm_size": 8, "num_layers": 1, "pooling": "max"}}
    for asked in ({}, head, named):
        opened = open_for_task(folder, data, **asked)
        assert "with the head that the checkpoint has" in opened.note and "bilstm (lstm_size=8)" in opened.note
        assert not opened.fresh and all(
            torch.equal(tensor, trained[key]) for key, tensor in weights(opened.model).items()
        )
    swapped = load_task(dataclasses.replace(task, labels=("good", "bad")))
    cases = [
        (data, {"architecture": "bilstm", "architecture_options": {"lstm_size": 9}}, EncoderForSequenceClassification),
        (data, head | {"mix_layers": True}, EncoderForSequenceClassification),
        (data, {"architecture": "cnn"}, EncoderForSequenceClassification),
        (swapped, head, EncoderForSequenceClassification),
        (load_task(task_of(place, "entities")), head, EncoderForTokenClassification),
        (swapped, {}, None),
        (load_task(task_of(place, "choice")), {}, None),
    ]
    for other, asked, kind in cases:
        opened = open_for_task(folder, other, **asked)
        assert "fresh head" in opened.note and opened.fresh, asked
        assert type(opened.model) is kind if kind else type(opened.model).__module__.startswith("transformers.")
        body = opened.model.base_model.state_dict()
        for name, tensor in body.items():
            assert name.startswith("pooler.") or torch.equal(tensor, trained[f"encoder.{name}"]), name
        fresh = set(opened.fresh)
        assert all((name in fresh) == (not name.startswith(("encoder.", "bert."))) or "pooler" in name
                   for name, _ in opened.model.named_parameters())  # fmt: skip
    assert "for bad, good, not for good, bad" in open_for_task(folder, swapped, **head).note
    # Other programs read encoders alone.
    with pytest.raises(InputError, match="below an architecture for a task: save the encoder alone"):
        from_pretrained(AutoModel, folder)


def test_a_pair_encoder_is_not_kept_for_one_text_and_a_frozen_encoder_moves_as_the_strategy_says(place, tmp_path):
    pairs = load_task(task_of(place, "second"))
    model = open_for_task(str(place / "encoder"), pairs, architecture="pair_encoder").model
    model.save_pretrained(tmp_path / "pairs")
    tiny_tokenizer().save_pretrained(tmp_path / "pairs")
    assert "with the head that" in open_for_task(str(tmp_path / "pairs"), pairs).note
    opened = open_for_task(str(tmp_path / "pairs"), load_task(task_of(place, "classification")))
    assert "BertForSequenceClassification, with a fresh head" in opened.note

    frozen = EncoderForSequenceClassification.from_encoder(
        str(place / "encoder"), num_labels=2, frozen=True, id2label={0: "bad", 1: "good"}
    )
    frozen.config.problem_type = "single_label_classification"
    frozen.save_pretrained(tmp_path / "frozen")
    tiny_tokenizer().save_pretrained(tmp_path / "frozen")
    found = fine_tune(
        str(tmp_path / "frozen"), task_of(place, "classification"), arguments(tmp_path / "out", max_steps=2)
    )
    assert "with the head that" in found.head and {"head", "layer 1", "embeddings"} <= {
        part.name for part in found.trainer.plan.moving
    }
    assert not found.trainer.model.config.frozen_encoder
    # The pooler, which nothing reads, is gone, and what is saved opens without a missing or an unexpected weight.
    assert frozen.encoder.pooler is not None and found.trainer.model.encoder.pooler is None
    found.trainer.save_model(str(tmp_path / "saved"))
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_alone_has_the_code_that_opens_it(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(place, out, "--export", "adapter", "--mix_layers", "true", strategy="lora") == 0
    assert not (out / "model.safetensors").exists()
    monkeypatch.chdir(out)
    (code, *_) = snippets((out / "README.md").read_text())
    names = {}
    exec(code, names)
    data = load_task(task_of(place, "classification"))
    found = logits_of(names["model"], data, names["tokenizer"], apart=False)
    np.testing.assert_allclose([line["logits"] for line in predictions(out)], found, atol=1e-4)


def test_seeds_and_the_recipe_repeat_the_head(place, tmp_path):
    out = tmp_path / "out"
    assert run(place, out, "--seeds", "3", "4", "--max_steps", "4", task="entities") == 0
    recipe = str(out / "seed-4" / "recipe.yaml")
    assert main(["finetune", "--config", recipe, "--output_dir", str(tmp_path / "again")]) == 0
    left, right = (folder / "model.safetensors" for folder in (out / "seed-4", tmp_path / "again"))
    assert left.read_bytes() == right.read_bytes() != (out / "seed-3" / "model.safetensors").read_bytes()


def test_other_encoders(place, tmp_path):
    """A decoder is below an architecture too; an encoder-decoder is refused by name."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
    AutoModel.from_config(GPT2Config(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(tmp_path / "gpt2")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 40,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 3}
    AutoModel.from_config(BartConfig(vocab_size=VOCAB_SIZE, **sizes, **ids)).save_pretrained(tmp_path / "bart")
    for name in ("gpt2", "bart"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    task, args = task_of(place, "classification"), arguments(tmp_path / "run", max_steps=2)
    found = fine_tune(str(tmp_path / "gpt2"), task, args, architecture="mean")
    alone = logits_of(found.trainer.model, found.data, found.tokenizer, apart=False)
    np.testing.assert_allclose(found.predictions, alone, atol=1e-4)
    with pytest.raises(InputError, match="architecture='mean' on .*BartModel has a decoder"):
        fine_tune(str(tmp_path / "bart"), task, args, architecture="mean")


def test_an_architecture_of_an_installed_package(place, tmp_path, monkeypatch, capsys):
    """It is found by its entry point; the card says what to import, and promises no code."""
    site = tmp_path / "site"
    (site / "my_heads-1.0.dist-info").mkdir(parents=True)
    (site / "my_heads-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my-heads\nVersion: 1.0\n")
    (site / "my_heads-1.0.dist-info" / "entry_points.txt").write_text(
        "[hf_pretrain.architectures]\nfirst_token_of_mine = my_heads\n"
    )
    (site / "my_heads.py").write_text(
        "from torch import nn\nfrom hf_pretrain import Architecture, register_architecture\n\n"
        '@register_architecture("first_token_of_mine")\nclass FirstToken(Architecture):\n'
        "    def __init__(self, hidden_size, num_labels, *, scale=1.0, **options):\n"
        "        super().__init__(hidden_size, num_labels, **options)\n"
        "        self.scale, self.output = scale, nn.Linear(hidden_size, num_labels)\n\n"
        "    def forward(self, states, mask):\n        return self.output(self.scale * states[:, 0])\n"
    )
    monkeypatch.syspath_prepend(str(site))
    out, mine = tmp_path / "out", "first_token_of_mine"
    options = ("--architecture_options", '{"scale": 2.0}', "--max_steps", "4")
    assert run(place, out, *options, architecture=mine) == 0
    card = (out / "README.md").read_text()
    assert "import my_heads" in card and "trust_remote_code" not in card
    assert (
        run(place, tmp_path / "again", *options, architecture=None, model=out) == 2
    )  # an option without an architecture
    assert "architecture_options" in capsys.readouterr().err
    assert run(place, tmp_path / "again", "--max_steps", "2", architecture=None, model=out) == 0
    assert "with the head that the checkpoint has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "choice", "--architecture", "bilstm"], "does not go with type='choice'"),
        (["--task", "span", "--architecture", "mean"], "does not go with type='span'"),
        (
            ["--task", "classification", "--architecture", "pair_encoder"],
            "reads two texts apart, and task 'classification'",
        ),
        (["--task", "classification", "--architecture", "bilsmt"], "did you mean 'bilstm'"),
        (["--task", "classification", "--architecture", "linear"], "'linear' has no logits of texts"),
        (["--task", "tokens", "--architecture", "cls"], "'cls' has no logits of tokens"),
        (["--task", "tokens", "--architecture", "pair_encoder"], "'pair_encoder' has no logits of tokens"),
        (
            ["--task", "pair", "--architecture", "cnn", "--architecture_options", '{"lstm_size": 4}'],
            "'cnn' takes widths",
        ),
        (["--task", "pair", "--architecture", "bilstm", "--architecture_options", '{"lstm_size": 0}'], "at least 1"),
        (
            ["--task", "pair", "--architecture", "bilstm", "--architecture_options", '{"lstm_size": "a"}'],
            "refuses them",
        ),
        (
            ["--task", "pair", "--architecture", "bilstm", "--architecture_options", '{"pooling": "sum"}'],
            "pooling='sum'",
        ),
        (
            ["--task", "tokens", "--architecture", "bilstm", "--architecture_options", '{"pooling": "max"}'],
            "no effect on tokens",
        ),
        (["--task", "pair", "--architecture", "scalar_mix", "--mix_layers", "true"], "mix_layers=True has no effect"),
        (["--task", "pair", "--mix_layers", "true"], "mix_layers"),
        (["--task", "pair", "--architecture_options", '{"lstm_size": 4}'], "architecture_options"),
        (
            ["--task", "pair", "--architecture", "cnn", "--strategy", "scalar_mix"],
            "does not read: set mix_layers",
        ),
    ],
)
def test_refused_in_one_line(options, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    assert main(["finetune", "encoder", "--tasks", "tasks.yaml", *options, "--output_dir", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not out.exists()


def test_a_live_model_has_its_head(place, tmp_path):
    tokenizer, task = AutoTokenizer.from_pretrained(place / "encoder"), task_of(place, "classification")
    model = EncoderForSequenceClassification.from_encoder(
        str(place / "encoder"), architecture="pair_encoder", num_labels=2
    )
    args = arguments(tmp_path, max_steps=1)
    trainer, _, _ = task_trainer(model, task_of(place, "second"), args, tokenizer=tokenizer)
    assert "pair_input_ids" in trainer.train_dataset.column_names
    with pytest.raises(InputError, match="reads two texts apart"):
        fine_tune(model, task, args, tokenizer=tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2)
    with pytest.raises(InputError, match="architecture='cnn' has no effect on a live model"):
        fine_tune(stock, task, args, tokenizer=tokenizer, architecture="cnn")


def test_checkpoints_of_a_run_go_on_with_their_head(place, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    save = ("--save_strategy", "steps", "--save_steps", "20", "--save_total_limit", "2")
    for folder in (whole, cut):
        assert run(place, folder, *save, task="second", architecture="pair_encoder") == 0
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    shutil.rmtree(cut / "checkpoint-40")
    assert run(place, cut, *save, "--resume_from_checkpoint", "true", task="second", architecture="pair_encoder") == 0
    assert "going on from step 20" in capsys.readouterr().out
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
