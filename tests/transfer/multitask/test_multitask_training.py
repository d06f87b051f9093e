"""Training on several tasks: one task is plain fine-tuning, tasks leave each other's heads alone, a resume changes nothing."""

import copy
import math

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback, set_seed

from helpers.multitask_runs import (
    DEFAULTS,
    TASKS,
    load_tasks,
    losses,
    moved,
    tokenizer,
    trainer,
    weights,
    write_encoder,
)
from hf_pretrain.errors import InputError
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel
from hf_pretrain.transfer.multitask.trainer import MultiTaskArguments, MultiTaskCollator

ALL = list(TASKS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("multitask") / "encoder")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of every type, of different sizes."""
    sizes = {name: 16 + 8 * number for number, name in enumerate(ALL)}
    return load_tasks(tmp_path_factory.mktemp("multitask") / "tasks", sizes)


def some(tasks, *names):
    return {name: tasks[name] for name in names}


@pytest.mark.parametrize("strategy", ["full", "layerwise_decay", "frozen"])
@pytest.mark.parametrize("name", ["topic", "tags", "span"])
def test_one_task_is_plain_fine_tuning_to_the_bit(tmp_path, encoder, tasks, name, strategy):
    """With dropout, over three passes, in groups of about one length."""
    data, shared = tasks[name], {"strategy": strategy, "num_train_epochs": 3, "learning_rate": 1e-2}
    mine = trainer(tmp_path / "mine", encoder, {name: data}, **shared)
    plain = FineTuningTrainer(
        copy.deepcopy(mine.model.task_model(name)),
        FineTuningArguments(**{"output_dir": str(tmp_path / "plain"), **DEFAULTS, **shared}),
        train_dataset=data.encoded("train", tokenizer(), max_length=32, doc_stride=8),
        data_collator=data.collator(tokenizer()),
    )
    for run in (mine, plain):
        set_seed(5)
        run.train()
    assert len(losses(mine)) == 3 * len(data.rows("train")) // 4
    assert losses(mine) == losses(plain)
    assert not moved(weights(plain.model), weights(mine.model.task_model(name)))


class Steps(TrainerCallback):
    """Keeps, of each step, the parameters with a gradient, the weights around it, and the moments in Adam."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        moving = {name for name, p in model.named_parameters() if p.grad is not None}
        self.step = {"with gradient": moving, "before": weights(model), "moments": self.moments(model, optimizer)}

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        moments = self.moments(model, optimizer)
        self.found.append(self.step | {"after": weights(model), "moments after": moments})

    @staticmethod
    def moments(model, optimizer):
        state = optimizer.state
        found = {}
        for name, parameter in model.named_parameters():
            for key, value in state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value.detach().clone()
        return found


@pytest.mark.parametrize("options", [{}, {"strategy": "layerwise_decay", "gradient_accumulation_steps": 2}])
def test_a_step_leaves_the_heads_of_other_tasks_alone(tmp_path, encoder, tasks, options):
    """To the bit: no gradient, no weight decay, and no decay of the moments."""
    steps = Steps()
    run = trainer(tmp_path, encoder, tasks, callbacks=[steps], sampling="equal", num_train_epochs=2, **options)
    drawn = [run.train_dataset.names[number] for number in run.drawn_tasks()]
    run.train()
    assert set(drawn[: len(steps.found)]) == set(ALL)
    for task, step in zip(drawn, steps.found, strict=False):
        heads = {name.split(".")[1] for name in step["with gradient"] if name.startswith("heads.")}
        assert heads == {task}
        changed = moved(step["before"], step["after"])
        assert {name.split(".")[1] for name in changed if name.startswith("heads.")} <= {task}
        assert any(name.startswith("encoder.") for name in changed)
        assert not any(name.startswith("encoder.pooler") for name in changed)
        before, after = step["moments"], step["moments after"]
        others = [key for key in before if key.startswith("heads.") and key.split(".")[1] != task]
        assert all(torch.equal(before[key], after[key]) for key in others)
        assert set(after) - set(before) <= {key for key in after if not key.startswith("heads.")} | {
            key for key in after if key.startswith(f"heads.{task}.")
        }
    # The heads that learn do move.
    whole = moved(steps.found[0]["before"], steps.found[-1]["after"])
    assert whole >= {f"heads.{name}.classifier.weight" for name in ("topic", "pair", "value", "tags", "choice")}
    # Those that read one vector of a text have a pooler each.
    assert whole >= {f"heads.{name}.encoder_pooler.dense.weight" for name in ("topic", "pair", "value", "choice")}


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "lora"}, {"strategy": "gradual"}, {"loss_weighting": "uncertainty"}]
)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, encoder, tasks, options):
    """From the middle of an epoch, and of a pass of each task, with dropout."""
    shared = {"sampling": "annealed", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 19, **options}
    chosen = some(tasks, "topic", "tags", "choice")
    whole = trainer(tmp_path / "run", encoder, chosen, **shared)
    whole.train()
    resumed = trainer(tmp_path / "run", encoder, chosen, **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-19"))
    assert 19 % resumed.steps_per_epoch and resumed.state.global_step == whole.state.global_step > 2 * 19 - 10
    assert not moved(weights(whole.model), weights(resumed.model))
    logged = [[row for row in run.state.log_history if "loss" in row] for run in (whole, resumed)]
    assert logged[0] == logged[1]


def test_the_loss_of_each_task_is_logged_without_its_weight(tmp_path, encoder, tasks):
    chosen = some(tasks, "topic", "value")
    run = trainer(
        tmp_path, encoder, chosen, logging_steps=5, loss_weights={"value": 3.0}, learning_rate=0.0, num_train_epochs=2
    )
    drawn = [run.train_dataset.names[number] for number in run.drawn_tasks()]
    single = trainer(
        tmp_path, encoder, chosen, logging_steps=1, model=run.model, learning_rate=0.0, num_train_epochs=2
    )
    for one in (run, single):
        set_seed(5)
        one.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    each = [row for row in single.state.log_history if "loss" in row]
    for number, row in enumerate(rows):
        steps = range(5 * number, 5 * number + 5)
        for task in chosen:
            of_task = [each[step][f"loss_{task}"] for step in steps if drawn[step] == task]
            assert (f"loss_{task}" in row) == bool(of_task)
            if of_task:
                assert row[f"loss_{task}"] == pytest.approx(sum(of_task) / len(of_task), rel=1e-5)
    for step, row in enumerate(each):
        factor = 3.0 if drawn[step] == "value" else 1.0
        assert {key for key in row if key.startswith("loss_")} == {f"loss_{drawn[step]}"}
        assert row["loss"] == pytest.approx(factor * row[f"loss_{drawn[step]}"], rel=1e-5)


def batch_of(data, count=4):
    rows = data.encoded("train", tokenizer(), max_length=32, doc_stride=8)
    return data.collator(tokenizer())([rows[i] for i in range(count)])


@pytest.mark.parametrize(("name", "c"), [("topic", 1.0), ("value", 0.5), ("span", 1.0)])
def test_learned_weights_are_those_of_kendall(encoder, tasks, name, c):
    model = MultiTaskModel.from_tasks(str(encoder), some(tasks, name), learns_loss_weights=True)
    plain = model.eval()(name, **batch_of(tasks[name])).loss.item()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    s = model.head(name)["loss_weight"].log_variance
    with torch.no_grad():
        s.fill_(0.7)
    out = model(name, **batch_of(tasks[name]))
    out.loss.backward()
    assert out.unweighted_loss.item() == pytest.approx(plain, rel=1e-5)
    assert out.loss.item() == pytest.approx(c * math.exp(-0.7) * plain + 0.35, rel=1e-5)
    assert s.grad.item() == pytest.approx(0.5 - c * math.exp(-0.7) * plain, rel=1e-4)


def test_learned_weights_do_not_decay(tmp_path, encoder, tasks):
    run = trainer(tmp_path, encoder, some(tasks, "topic"), loss_weighting="uncertainty")
    run.create_optimizer()
    s = run.model.head("topic")["loss_weight"].log_variance
    (group,) = [group for group in run.optimizer.param_groups if any(p is s for p in group["params"])]
    assert group["weight_decay"] == 0.0
    (decayed,) = [group for group in run.optimizer.param_groups if group["weight_decay"]]
    assert decayed["params"]


@pytest.mark.parametrize("strategy", ["full", "layerwise_decay", "gradual"])
def test_a_head_has_the_rate_of_its_task(tmp_path, encoder, tasks, strategy):
    run = trainer(
        tmp_path, encoder, some(tasks, "topic", "tags"), strategy=strategy, task_learning_rates={"tags": 3e-3}
    )
    run.create_optimizer()
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name in rates:
        wanted = 3e-3 if name.startswith("heads.tags.") else 1e-2 if name.startswith("heads.") else None
        assert wanted is None or rates[name] == wanted, name
    assert len(rates) == len([p for p in run.model.parameters() if p.requires_grad])
    run.train()


@pytest.mark.parametrize("strategy", ["frozen", "lora", "top_layers"])
def test_the_strategy_is_that_of_the_shared_encoder(tmp_path, encoder, tasks, strategy):
    run = trainer(tmp_path, encoder, some(tasks, "topic", "span"), strategy=strategy)
    before = weights(run.model)
    run.train()
    changed = moved(before, weights(run.model))
    body = {name for name in changed if "heads." not in name}
    assert changed - body
    if strategy == "frozen":
        assert not body
    elif strategy == "lora":
        assert body and all("lora_" in name for name in body)
    else:
        assert body and all("layer.1" in name for name in body)


def test_evaluation_has_each_tasks_metrics_and_their_mean(tmp_path, encoder, tasks):
    run = trainer(tmp_path, encoder, tasks)
    run.train()
    found = run.evaluate()
    main = {
        "topic": "accuracy",
        "pair": "accuracy",
        "value": "pearson",
        "tags": "accuracy",
        "choice": "accuracy",
        "span": "f1",
    }
    assert found["eval_mean"] == pytest.approx(sum(found[f"eval_{n}_{m}"] for n, m in main.items()) / len(main))
    for name, data in tasks.items():
        rows = data.encoded("validation", tokenizer(), max_length=32, doc_stride=8)
        out = predictions(run.model.task_model(name), rows, data.collator(tokenizer()))
        wanted = data.score("validation", out, tokenizer=tokenizer())
        assert run.scores[name] == pytest.approx(wanted)
        assert {key: found[f"eval_{name}_{key}"] for key in wanted} == pytest.approx(wanted)
        assert found[f"eval_{name}_loss"] > 0
    assert run.state.log_history[-1]["eval_mean"] == found["eval_mean"]


def predictions(model, rows, collate):
    """Predict all rows in one batch."""
    with torch.no_grad():
        out = model.eval()(**collate([rows[i] for i in range(len(rows))]))
    return out.logits.numpy() if "logits" in out else (out.start_logits.numpy(), out.end_logits.numpy())


def test_the_best_checkpoint_is_chosen_by_the_mean(tmp_path, encoder, tasks):
    options = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "num_train_epochs": 3,
    }
    run = trainer(tmp_path, encoder, some(tasks, "topic", "value"), **options)
    run.train()
    means = [row["eval_mean"] for row in run.state.log_history if "eval_mean" in row]
    assert run.args.metric_for_best_model == "eval_mean" and len(means) == 3
    assert run.state.best_metric == max(means)
    assert run.evaluate()["eval_mean"] == pytest.approx(max(means))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_temperature": 3.0}, "sampling_temperature=3.0 has no effect"),
        ({"sampling_cap": 3}, "sampling_cap=3 has no effect"),
        ({"sampling": "weights"}, "needs sampling_weights"),
        ({"sampling_weights": {"topic": 1}}, "sampling_weights=.* has no effect"),
        ({"sampling": "weights", "sampling_weights": {"topic": 1}}, "one weight for each of topic, tags"),
        ({"loss_weights": {"topic": -1}}, "loss_weights of topic=-1"),
        ({"loss_weights": {"topics": 1}}, "loss_weights names 'topics'"),
        ({"loss_weighting": "uncertainty", "loss_weights": {"topic": 2}}, "loss_weights=.* has no effect"),
        ({"task_learning_rates": {"topics": 1}}, "task_learning_rates names 'topics'"),
        ({"strategy": "lora", "export": "adapter"}, "export='adapter'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"strategy": "scalar_mix"}, "scalar_mix"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, encoder, tasks, options, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, encoder, some(tasks, "topic", "tags"), **options)


def test_processes_that_would_wait_for_a_gradient_are_refused(tmp_path, encoder, tasks, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(InputError, match="ddp_find_unused_parameters=False"):
        trainer(tmp_path, encoder, some(tasks, "topic", "tags"), ddp_find_unused_parameters=False)


def test_a_batch_of_two_tasks_is_refused():
    with pytest.raises(InputError, match="a, b"):
        MultiTaskCollator({"a": None, "b": None})([{"task": "a"}, {"task": "b"}])


def test_the_options_may_be_made_again(tmp_path):
    args = MultiTaskArguments(output_dir=str(tmp_path), sampling="temperature", sampling_temperature=4.0)
    assert args.sampling_options(["a", "b"]) == {"sampling": "temperature", "temperature": 4.0}


def test_an_export_leaves_the_state_of_the_processes_alone(tmp_path, encoder, tasks):
    """Options that are made anew on the first process alone would make it believe that it is alone."""
    run = trainer(tmp_path, encoder, some(tasks, "topic"), max_steps=1)
    run.train()
    before = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert all(before)
    run.save_model()
    assert [dict(state._shared_state) for state in (PartialState, AcceleratorState)] == before
