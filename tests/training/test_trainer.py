"""The base Trainer: what it refuses, what it logs, how it seeds, streams and evaluates."""

import itertools
import math
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils.memory import release_memory
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, integrations
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from helpers.method_matrix import BLOCK_SIZE, build, isolated, log_of, programs, tiny_data, tiny_examples
from hf_pretrain.data.examples import held_out
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.objectives.distillation.trainer import TaskDistillationTrainer
from hf_pretrain.objectives.recurrence import RecurrentTrainer
from hf_pretrain.objectives.replaced_token_detection.trainer import ReplacedTokenDetectionTrainer
from hf_pretrain.training import progress
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.trainer import PretrainingTrainer

PROGRAMS = programs()
MLM, RTD = PROGRAMS["mlm"], PROGRAMS["rtd"]
DROPOUT = {"config_overrides": None}


def step_rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def eval_rows(trainer, name="eval_loss"):
    return [row for row in trainer.state.log_history if name in row]


def record_batches(trainer):
    """Keep every batch that the collator makes for training; the loader is up to one batch ahead of the model."""
    batches, original = [], trainer.data_collator

    def collate(examples):
        batches.append(original(examples))
        return batches[-1]

    trainer.data_collator = collate
    return batches


class PoisonWeights(TrainerCallback):
    """Makes weights nan after a step, once its checkpoint is written."""

    def __init__(self, after_step):
        self.after_step = after_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.after_step:
            with torch.no_grad():
                model.get_input_embeddings().weight[5::5] = torch.nan


class TestLossThatIsNotFinite:
    def test_a_learning_rate_that_is_much_too_high_ends_the_run(self, tmp_path):
        trainer = build(MLM, tmp_path, learning_rate=1e20, max_steps=50, lr_scheduler_type="constant")
        with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+: lower learning_rate"):
            trainer.train()
        assert trainer.state.global_step < 50
        assert not any("nan" in str(row.get("loss")) for row in trainer.state.log_history)

    @pytest.mark.parametrize("program", [MLM, RTD])
    def test_the_message_names_the_step_and_where_to_go_on(self, tmp_path, program):
        """Broken weights have to reach the log: no sampled token or gathered target may fail on them first."""
        trainer = build(program, tmp_path, max_steps=3, logging_steps=2, save_strategy="steps", save_steps=1)
        trainer.add_callback(PoisonWeights(after_step=1))
        with pytest.raises(RunError) as stop:
            trainer.train()
        message = str(stop.value)
        assert "the loss is nan at step 2" in message
        assert str(tmp_path) in message and "resume_from_checkpoint" in message and "warmup_steps" in message
        assert "\n" not in message

    def test_the_checkpoint_before_it_is_whole(self, tmp_path):
        """The run stops before it would save what is broken."""
        trainer = build(MLM, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
        trainer.add_callback(PoisonWeights(after_step=1))
        with pytest.raises(RunError):
            trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]

    def test_the_filter_of_transformers_still_works_when_asked_for(self, tmp_path):
        trainer = build(MLM, tmp_path, max_steps=2, logging_nan_inf_filter=True)
        trainer.add_callback(PoisonWeights(after_step=1))
        trainer.train()
        assert [row["step"] for row in step_rows(trainer)] == [1, 2]


class TestRefusals:
    @pytest.mark.parametrize("value", [None, lambda prediction: {}])
    def test_compute_metrics(self, tmp_path, value):
        known = build(MLM, tmp_path)
        with pytest.raises(InputError, match="compute_metrics is not used here: override evaluation_metrics"):
            type(known)(known.model, known.args, compute_metrics=value)

    def test_one_process_with_several_gpus(self, tmp_path, monkeypatch):
        known = build(MLM, tmp_path)
        monkeypatch.setattr(PretrainingArguments, "n_gpu", property(lambda self: 2))
        with pytest.raises(InputError, match="2 GPUs: start with `accelerate launch`"):
            type(known)(known.model, known.args)

    def test_batches_that_are_split(self, tmp_path):
        with pytest.raises(InputError, match="split_batches=True would make per_device_train_batch_size"):
            build(MLM, tmp_path, accelerator_config={"split_batches": True})

    def test_a_collator_that_loses_the_documents_to_keep_apart(self, tmp_path):
        trainer = build(MLM, tmp_path, isolated(tiny_data()))
        whole = trainer.data_collator

        class Losing:
            pad_to_multiple_of = None

            def __call__(self, examples):
                return {name: value for name, value in whole(examples).items() if name != "document_ids"}

        inputs = {"train_dataset": trainer.train_dataset, "data_description": trainer.data_description}
        with pytest.raises(InputError, match="the batches of Losing have no document_ids: choose another block_mode"):
            type(trainer)(trainer.model, trainer.args, data_collator=Losing(), **inputs)
        # A stream has no first example to look at: then its first step is refused.
        trainer.data_collator = Losing()
        with pytest.raises(InputError, match="no document_ids"):
            trainer.train()

    def test_a_dataset_without_a_length(self, tmp_path):
        known = build(MLM, tmp_path)
        with pytest.raises(InputError, match="not map-style"):
            type(known)(known.model, known.args, train_dataset=object(), processing_class=known.processing_class)


class TestTableOfOverriddenMethods:
    """The docstring of the Trainer names what is overridden of the stock one, and which method does it."""

    @pytest.fixture(scope="class")
    @classmethod
    def trainers(cls):
        found, new = set(), {PretrainingTrainer}
        while new:
            found |= new
            new = {sub for kind in new for sub in kind.__subclasses__()}
        return {kind for kind in found if kind.__module__.startswith("hf_pretrain.")}

    @pytest.fixture(scope="class")
    @classmethod
    def table(cls):
        return dict(re.findall(r"^ +\| `(\w+)` \| (.+) \|$", PretrainingTrainer.__doc__, flags=re.MULTILINE))

    @staticmethod
    def overridden(trainer):
        return {name for name in vars(trainer) if callable(getattr(Trainer, name, None)) and not name.startswith("__")}

    def test_it_is_complete_and_true(self, trainers, table):
        assert {RecurrentTrainer, ReplacedTokenDetectionTrainer, TaskDistillationTrainer} <= trainers
        assert table.keys() == set().union(*map(self.overridden, trainers))

    def test_it_says_which_methods_override_what(self, trainers, table):
        for trainer in trainers - {PretrainingTrainer}:
            label = trainer.objective.name if hasattr(trainer, "objective") else "memory"
            named = {name for name, reason in table.items() if re.search(rf"(^|; ){label}: ", reason)}
            assert named == self.overridden(trainer), label


class TestLog:
    @pytest.mark.parametrize(
        ("program", "components", "measured"),
        [(MLM, {"mlm_loss"}, set()), (RTD, {"mlm_loss", "rtd_loss"}, {"fake_rate", "disc_gain"})],
    )
    def test_a_row_has_every_component_and_measurement(self, tmp_path, program, components, measured):
        trainer = build(program, tmp_path, max_steps=4, logging_steps=2)
        trainer.train()
        rows = step_rows(trainer)
        assert [row["step"] for row in rows] == [2, 4]
        for row in rows:
            known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
            measured = measured | {"num_tokens", "tokens_per_second", "peak_memory_mib"}
            assert row.keys() - known == components | measured
            weighted = sum(trainer.loss_weight(name.removesuffix("_loss")) * row[name] for name in components)
            # The mean of two steps' means against the mean over two steps' targets.
            assert row["loss"] == pytest.approx(weighted, rel=0.05)
            # A process with torch in it holds at least this, and this machine has no petabyte.
            assert 50 < row["peak_memory_mib"] < 2**30
            assert row["tokens_per_second"] > 0

    def test_a_component_is_the_mean_over_all_targets_since_the_last_row(self, tmp_path):
        """Steps have different numbers of targets: a mean of means would differ."""
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.0}
        each = build(MLM, tmp_path / "each", logging_steps=1, **options)
        batches = record_batches(each)
        each.train()
        together = build(MLM, tmp_path / "together", logging_steps=3, **options)
        together.train()
        counts = [int((batch["labels"] != -100).sum()) for batch in batches[:3]]
        assert len(set(counts)) > 1
        losses = [row["mlm_loss"] for row in step_rows(each)]
        expected = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert step_rows(together)[0]["mlm_loss"] == pytest.approx(expected, rel=1e-5)

    def test_num_tokens_are_the_tokens_seen_without_padding(self, tmp_path):
        trainer = build(MLM, tmp_path, max_steps=8, per_device_train_batch_size=8, gradient_accumulation_steps=2)
        batches = record_batches(trainer)
        trainer.train()
        # 96 examples are an epoch of six steps, each of two micro-batches.
        seen = [int((batch["input_ids"] != 0).sum()) for batch in batches[:16]]
        assert any((batch["input_ids"] == 0).any() for batch in batches)
        steps = [sum(seen[i : i + 2]) for i in range(0, len(seen), 2)]
        assert [row["num_tokens"] for row in step_rows(trainer)] == list(itertools.accumulate(steps))

    @pytest.mark.parametrize("save_steps", [2, 3])
    def test_num_tokens_go_on_after_a_resume(self, tmp_path, save_steps):
        """Also from a checkpoint between two rows of the log (step 3 of 2, 4, 6)."""
        options = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": save_steps}
        straight = build(MLM, tmp_path / "straight", **options)
        straight.train()
        resumed = build(MLM, tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{save_steps}"))
        assert [row["num_tokens"] for row in step_rows(resumed)] == [row["num_tokens"] for row in step_rows(straight)]

    @pytest.mark.parametrize(("sets", "logging_steps"), [(1, 1), (3, 1), (1, 2)])
    def test_evaluation_does_not_count_as_training_time(self, tmp_path, monkeypatch, sets, logging_steps):
        """With a clock that goes one second a training step and a hundred an evaluation of a set."""
        clock = FakeClock()
        monkeypatch.setattr(progress, "time", clock)
        held_out = (
            tiny_data().eval_dataset if sets == 1 else {f"set{i}": tiny_data().eval_dataset for i in range(sets)}
        )
        data = tiny_data()
        data.eval_dataset = held_out
        options = {"max_steps": 4, "logging_steps": logging_steps, "eval_on_start": True}
        trainer = build(MLM, tmp_path, data, eval_strategy="steps", eval_steps=1, **options)
        monkeypatch.setattr(trainer, "training_step", clock.after(1.0, trainer.training_step))
        monkeypatch.setattr(trainer, "evaluation_loop", clock.after(100.0, trainer.evaluation_loop))
        trainer.train()
        rows = step_rows(trainer)
        tokens = [b - a for a, b in itertools.pairwise([0, *(row["num_tokens"] for row in rows)])]
        assert clock.now == 4 + 5 * sets * 100 and len(rows) == 4 // logging_steps
        assert [row["tokens_per_second"] for row in rows] == [round(count / logging_steps, 1) for count in tokens]

    def test_time_between_two_trainings_does_not_count(self, tmp_path, monkeypatch):
        clock = FakeClock()
        monkeypatch.setattr(progress, "time", clock)
        trainer = build(MLM, tmp_path)
        monkeypatch.setattr(trainer, "training_step", clock.after(2.0, trainer.training_step))
        clock.now += 1000.0
        trainer.train()
        (row,) = step_rows(trainer)
        assert row["tokens_per_second"] == round(row["num_tokens"] / 2.0, 1)


class FakeClock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def after(self, seconds, function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            self.now += seconds
            return result

        return wrapped


class TestSeeds:
    def first_row(self, folder, monkeypatch, rank, **options):
        trainer = build(MLM, folder, **options)
        batches = record_batches(trainer)
        monkeypatch.setattr(PretrainingArguments, "process_index", property(lambda self: rank))
        trainer.train()
        monkeypatch.undo()
        return step_rows(trainer)[0]["loss"], batches

    def test_each_rank_has_its_own_dropout(self, tmp_path, monkeypatch):
        losses = [
            self.first_row(tmp_path / str(i), monkeypatch, rank, model_options=DROPOUT)[0]
            for i, rank in enumerate((0, 1, 1))
        ]
        assert losses[0] != losses[1] == losses[2]

    def test_and_nothing_else_of_its_own(self, tmp_path, monkeypatch):
        losses, batches = zip(*(self.first_row(tmp_path / str(r), monkeypatch, r) for r in (0, 1)), strict=True)
        assert losses[0] == losses[1]
        assert all(torch.equal(batches[0][0][name], batches[1][0][name]) for name in batches[0][0])

    def test_no_rank_has_the_dropout_of_another_rank_of_another_seed(self, tmp_path, monkeypatch):
        trainer, seeds = build(MLM, tmp_path), set()
        monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: seeds.add(torch.initial_seed()))
        for trainer.args.seed, rank in itertools.product(range(4), range(4)):
            monkeypatch.setattr(PretrainingArguments, "process_index", property(lambda self, rank=rank: rank))
            trainer.train()
        assert len(seeds) == 16

    def test_the_data_seed_orders_and_the_seed_masks(self, tmp_path):
        def first_batch(**seeds):
            trainer = build(MLM, tmp_path, **seeds)
            return next(iter(trainer.get_train_dataloader()))

        def original(batch):
            return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])

        plain, ordered, masked = (
            first_batch(seed=1),
            first_batch(seed=1, data_seed=2),
            first_batch(seed=2, data_seed=1),
        )
        assert original(plain).shape != original(ordered).shape or not torch.equal(original(plain), original(ordered))
        assert torch.equal(original(plain), original(masked))
        assert not torch.equal(plain["labels"], masked["labels"])


class TestEvaluation:
    def test_at_the_start_it_measures_the_untrained_model(self, tmp_path):
        trainer = build(MLM, tmp_path, eval_on_start=True, learning_rate=1e-2)
        expected = build(MLM, tmp_path / "fresh").evaluate()["eval_loss"]
        trainer.train()
        (row,) = eval_rows(trainer)
        assert (row["step"], row["eval_loss"]) == (0, pytest.approx(expected, rel=1e-6))
        assert trainer.evaluate()["eval_loss"] < row["eval_loss"]

    def test_at_the_start_it_is_left_out_without_held_out_data(self, tmp_path):
        data = tiny_data()
        data.eval_dataset = None
        trainer = build(MLM, tmp_path, data, eval_on_start=True)
        trainer.train()
        assert len(step_rows(trainer)) == 1 and not eval_rows(trainer)

    def test_training_does_not_depend_on_it(self, tmp_path):
        options = {"max_steps": 4, "learning_rate": 1e-2, "model_options": DROPOUT}
        without = build(MLM, tmp_path / "without", **options)
        without.train()
        often = build(MLM, tmp_path / "often", eval_on_start=True, eval_strategy="steps", eval_steps=1, **options)
        often.train()
        assert len(eval_rows(often)) == 5
        assert [row["loss"] for row in step_rows(often)] == [row["loss"] for row in step_rows(without)]

    @pytest.mark.parametrize("program", [MLM, RTD])
    def test_several_sets_have_their_names_in_their_metrics(self, tmp_path, program):
        sets = {"news": tiny_examples(13, seed=2), "law": tiny_examples(9, seed=5)}
        data = tiny_data()
        data.eval_dataset = dict(sets)
        metrics = build(program, tmp_path, data).evaluate()
        assert "eval_loss" not in metrics
        for name, dataset in sets.items():
            data.eval_dataset = EpochDataset(dataset)
            alone = build(program, tmp_path, data).evaluate()
            measured = [key for key in alone if not key.endswith(("time", "per_second"))]
            assert {"eval_loss", "eval_mlm_loss", "eval_mlm_accuracy"} <= set(measured)
            for key in measured:
                assert metrics[key.replace("eval_", f"eval_{name}_", 1)] == pytest.approx(alone[key], rel=1e-6), key

    def test_the_best_model_at_the_end_is_the_whole_composite(self, tmp_path):
        """The best is made to be the first checkpoint: the one of the highest loss."""
        trainer = build(
            RTD,
            tmp_path,
            max_steps=4,
            learning_rate=1e-2,
            decay_during_warmup=False,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="mlm_loss",
            greater_is_better=True,
        )
        trainer.train()
        rows = eval_rows(trainer)
        best = max(rows, key=lambda row: row["eval_mlm_loss"])
        assert best["step"] != 4
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
        saved = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
        last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
        state = trainer.model.state_dict()
        for part in ("generator.", "discriminator."):
            assert any(name.startswith(part) and not torch.equal(saved[name], last[name]) for name in saved)
        for name, value in saved.items():
            assert torch.equal(state[name], value), name
        tied = trainer.model.all_tied_weights_keys
        assert tied and all(state[ours].data_ptr() == state[theirs].data_ptr() for ours, theirs in tied.items())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


class TestPartThatIsEvaluated:
    @staticmethod
    def measured(trainer):
        """The ids of the examples that the collator sees in an evaluation."""
        seen, collate = [], trainer.data_collator

        def record(examples):
            seen.extend(example["example_id"] for example in examples)
            return collate(examples)

        trainer.data_collator = record
        metrics = trainer.evaluate()
        trainer.data_collator = collate
        return seen, metrics

    @staticmethod
    def trainer(folder, *, held_out=200, **options):
        return build(MLM, folder, tiny_data(held_out=held_out), **options)

    def test_it_is_spread_and_the_same_each_time(self, tmp_path):
        trainer = self.trainer(tmp_path, max_eval_tokens=250, max_steps=3, learning_rate=1e-2)
        before, metrics = self.measured(trainer)
        assert 10 < len(before) < 40 and max(before) > 180
        assert np.array_equal(np.array(before) * len(before) // 200, np.arange(len(before)))
        trainer.train()
        after, later = self.measured(trainer)
        assert after == before and later["eval_loss"] != metrics["eval_loss"]
        # Neither seed nor batch changes what is measured.
        other = self.trainer(tmp_path / "other", max_eval_tokens=250, seed=7, per_device_eval_batch_size=3)
        assert self.measured(other)[0] == before

    def test_its_numbers_are_those_of_these_examples(self, tmp_path):
        trainer = self.trainer(tmp_path, max_eval_tokens=250)
        seen, metrics = self.measured(trainer)
        batch = trainer.data_collator([trainer.eval_dataset[row] for row in seen])
        with torch.no_grad():
            loss = trainer.model.eval()(**batch).losses["mlm"]
        assert metrics["eval_mlm_loss"] == pytest.approx((loss.sum.sum() / loss.count.sum()).item(), rel=1e-5)
        # The stock loop cuts what it gathers at the length of the dataset, and times it by the same.
        rate = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
        assert rate == pytest.approx(len(seen), abs=1)

    @pytest.mark.parametrize(("option", "expected"), [(0, 200), (10**6, 200), (None, 200)])
    def test_all_is_measured_if_asked_for_or_if_it_is_little(self, tmp_path, option, expected):
        seen, _ = self.measured(trainer := self.trainer(tmp_path, max_eval_tokens=option))
        assert seen == list(range(expected))
        assert not any("measured" in name for name in trainer.data_description)

    def test_by_default_it_is_a_share_of_the_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(held_out, "LEAST_TOKENS", 100)
        run = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        tokens = held_out.mean_tokens(tiny_data().train_dataset)
        for steps, options in (
            (2, {}),
            (400, {}),
            (400, {"max_minutes": 2.0}),
            (600, {"max_steps": -1, "num_train_epochs": 50}),
        ):
            trainer = self.trainer(tmp_path, **run | {"max_steps": steps} | options)
            wanted = max(100, 0.025 * steps * 8 * tokens) if "max_minutes" not in options else 200
            mean = held_out.mean_tokens(trainer.eval_dataset)
            assert trainer.measured_examples() == (math.ceil(math.ceil(wanted) / mean), 200)

    def test_another_dataset_is_measured_whole(self, tmp_path):
        trainer = self.trainer(tmp_path, max_eval_tokens=100)
        other = EpochDataset(tiny_examples(50, seed=9))
        loader = trainer.get_eval_dataloader(other)
        assert len(loader.dataset) == 50
        metrics = trainer.evaluate(other)
        assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(50, abs=1)
        assert len(trainer.predict(trainer.eval_dataset).predictions[0]) == 200

    def test_several_sets_share_the_tokens(self, tmp_path):
        data = tiny_data()
        data.eval_dataset = {name: tiny_examples(100, seed=seed) for name, seed in (("news", 2), ("law", 5))}
        trainer = build(MLM, tmp_path, data, max_eval_tokens=200)
        sizes = [len(trainer.part_to_evaluate(part)) for part in trainer.eval_dataset.values()]
        assert all(5 <= size <= 13 for size in sizes)
        metrics = trainer.evaluate()
        assert trainer.data_description["held_out_measured_examples"] == sum(sizes)
        alone = {name: build(MLM, tmp_path / name, tiny_data(), max_eval_tokens=100) for name in data.eval_dataset}
        for name, one in alone.items():
            one.eval_dataset = EpochDataset(data.eval_dataset[name])
            assert one.evaluate()["eval_loss"] == pytest.approx(metrics[f"eval_{name}_loss"], rel=1e-6)

    def test_persistent_workers_keep_the_sets_apart(self, tmp_path):
        data = tiny_data()
        data.eval_dataset = {name: tiny_examples(60, seed=seed) for name, seed in (("news", 2), ("law", 5))}
        options = {"max_eval_tokens": 100, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        trainer = build(MLM, tmp_path, data, **options)
        first, again = trainer.evaluate(), trainer.evaluate()
        assert first["eval_news_loss"] == again["eval_news_loss"] != first["eval_law_loss"] == again["eval_law_loss"]

    def test_rows_of_a_task_are_all_measured(self, tmp_path, monkeypatch):
        monkeypatch.setattr(held_out, "LEAST_TOKENS", 10)
        task = build(PROGRAMS["distil-task"], tmp_path, tiny_data(held_out=50))
        assert task.measured_examples() == (50, 50)
        fewer = build(PROGRAMS["distil-task"], tmp_path, tiny_data(held_out=50), max_eval_tokens=100)
        assert fewer.measured_examples()[0] < 15

    def test_the_plan_and_the_card_say_so(self, tmp_path, capsys):
        trainer = self.trainer(tmp_path, max_eval_tokens=250, eval_on_start=True)
        trainer.train()
        count, _ = trainer.measured_examples()
        assert f", evaluated on {count} of 200 held-out examples\n" in capsys.readouterr().out
        found = {name: value for name, value in trainer.describe().data.items() if "measured" in name}
        assert found == {"held_out_measured_examples": count, "held_out_measured_share": round(count / 200, 4)}


class TestStreaming:
    """An iterable dataset of 20 documents of a block each, in steps of eight."""

    @pytest.fixture
    def data(self, tmp_path, tokenizer):
        words = [f"w{i % 50}" for i in range(20 * (BLOCK_SIZE - 2))]
        texts = [" ".join(words[i : i + BLOCK_SIZE - 2]) for i in range(0, len(words), BLOCK_SIZE - 2)]
        (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
        prepared = tiny_data()
        prepared.train_dataset = StreamingBlocks(
            [tmp_path / "corpus.txt"],
            tokenizer=tokenizer,
            block_size=BLOCK_SIZE,
            mode="tokens",
            documents_per_buffer=4,
        )
        return prepared

    @pytest.mark.parametrize("program", [MLM, RTD])
    def test_it_trains_and_counts(self, tmp_path, data, program):
        trainer = build(program, tmp_path / "run", data, max_steps=2)
        batches = record_batches(trainer)
        trainer.train()
        rows = step_rows(trainer)
        assert [row["step"] for row in rows] == [1, 2]
        seen = [int(batch["attention_mask"].sum()) for batch in batches]
        assert rows[0]["num_tokens"] == seen[0] and rows[1]["num_tokens"] == seen[0] + seen[1]
        assert "mlm_loss" in rows[1]

    def test_it_starts_again_with_fresh_masks(self, tmp_path, data):
        trainer = build(MLM, tmp_path / "run", data, max_steps=6)
        seen, original = [], trainer.data_collator

        def collate(examples):
            batch = original(examples)
            seen.extend(
                (e["epoch"], e["example_id"], row.tolist()) for e, row in zip(examples, batch["labels"], strict=True)
            )
            return batch

        trainer.data_collator = collate
        trainer.train()
        assert [epoch for epoch, _, _ in seen[:40]] == [0] * 20 + [1] * 20
        first, second = ({name: labels for _, name, labels in seen[i : i + 20]} for i in (0, 20))
        assert first.keys() == second.keys() and len(first) == 20
        # Rows of other batches are padded otherwise: compare which words were hidden.
        hidden = [
            {name: [x for x in labels if x != -100] for name, labels in rows.items()} for rows in (first, second)
        ]
        assert sum(hidden[0][name] != hidden[1][name] for name in first) > 15

    def test_the_end_of_an_epoch_spoils_no_step(self, tmp_path, data):
        """Five micro-batches an epoch in steps of two: the fifth must not be added to a step that did not count it."""
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
        trainer = build(MLM, tmp_path / "run", data, max_steps=6, **options)
        trainer.train()
        rows = step_rows(trainer)
        assert [row["loss"] for row in rows] == pytest.approx([row["mlm_loss"] for row in rows], rel=1e-4)

    @pytest.mark.parametrize("step", [1, 2, 3, 5])
    def test_resume_is_exact(self, tmp_path, data, step):
        """Steps 1 and 2 lie inside the first epoch of two and a half steps, 3 at its end, 5 inside the second."""
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        straight = build(MLM, tmp_path / "straight", data, **options)
        straight.train()
        resumed = build(MLM, tmp_path / "resumed", data, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        losses = [[(row["step"], row["loss"]) for row in step_rows(run)] for run in (straight, resumed)]
        assert losses[0] == losses[1]
        assert log_of(straight)[-1]["step"] == log_of(resumed)[-1]["step"] == 6


class Trials:
    """Stands for Optuna: goes through given trials as transformers' own loop does, which forgets the model after each."""

    trials: list = []

    @staticmethod
    def ensure_available():
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        results = []
        for number, params in enumerate(self.trials[:n_trials]):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
            trainer.accelerator.clear()
            results.append((trainer.objective, trainer.state.log_history))
        return results


class TestSearch:
    def search(self, monkeypatch, folder, trials, program=MLM, **options):
        """Return what each trial came to, and its log."""
        known = build(program, folder, **options)
        stage = type("Stage", (Trials,), {"trials": trials})
        monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, stage)
        monkeypatch.setitem(sys.modules, "optuna", ModuleType("optuna"))
        monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params)
        state = {name: value.clone() for name, value in known.model.state_dict().items()}

        def model_init():
            known.model.load_state_dict(state)
            return known.model

        trainer = type(known)(
            None,
            known.args,
            model_init=model_init,
            train_dataset=known.train_dataset,
            eval_dataset=known.eval_dataset,
            data_collator=known.data_collator,
        )
        return trainer.hyperparameter_search(
            lambda trial: trial.params, lambda metrics: metrics["eval_loss"], len(trials), backend="optuna"
        )

    @pytest.mark.parametrize("program", [MLM, RTD, PROGRAMS["distil"]])
    def test_trials_begin_anew_with_their_own_options(self, monkeypatch, tmp_path, program):
        """Two equal trials come to the same, with dropout; another learning rate comes to something else."""
        trials = [{"learning_rate": rate} for rate in (1e-3, 1e-2, 1e-3)]
        # The last step comes after the last row of the log, and must not be counted in the next trial's first one.
        options = {"max_steps": 3, "logging_steps": 2, "model_options": DROPOUT}
        (first, log), (second, _), (third, last) = self.search(monkeypatch, tmp_path, trials, program, **options)
        assert first == third != second
        (row,), (other,) = ([row for row in rows if "loss" in row] for rows in (log, last))
        counted = [name for name in row if name.endswith("loss") or name == "num_tokens"]
        assert len(counted) > 2 and all(row[name] == other[name] for name in counted)

    def test_each_rank_has_its_own_dropout(self, monkeypatch, tmp_path):
        """transformers sets the same seed on all ranks before it makes the model of a trial."""
        known = build(MLM, tmp_path)
        trainer = type(known)(None, known.args, model_init=lambda: known.model, data_collator=known.data_collator)
        draws = []
        for rank in (0, 1, 1):
            monkeypatch.setattr(PretrainingArguments, "process_index", property(lambda self, rank=rank: rank))
            torch.manual_seed(known.args.seed)
            trainer.call_model_init()
            draws.append(torch.rand(4).tolist())
        assert draws[0] != draws[1] == draws[2]

    def test_a_weight_of_a_loss_counts(self, monkeypatch, tmp_path):
        results = self.search(monkeypatch, tmp_path, [{"rtd_weight": 50.0}, {"rtd_weight": 1.0}], RTD)
        (first, _), (second, _) = results
        assert first > 5 * second

    def test_checkpoints_of_trials_have_folders_of_their_own(self, monkeypatch, tmp_path):
        trials = [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
        self.search(monkeypatch, tmp_path, trials, save_strategy="steps", save_steps=1)
        assert [path.parent.name for path in sorted(tmp_path.glob("*/checkpoint-1"))] == ["run-0", "run-1"]

    @pytest.mark.parametrize(
        ("program", "params"),
        [
            (MLM, {"mlm_probability": 0.4}),
            (RTD, {"training_mode": "decoupled"}),
            (PROGRAMS["encoder"], {"per_device_train_batch_size": 4}),
        ],
    )
    def test_what_a_trial_cannot_change_is_named(self, monkeypatch, tmp_path, program, params):
        options = {"per_device_train_batch_size": 8}
        if program is PROGRAMS["encoder"]:
            options |= {"objectives": ["mlm", "sop"], "objective_shares": "mlm:0.5, sop:0.5"}
        name = next(iter(params))
        with pytest.raises(InputError, match=f"^{name}.*cannot be searched over"):
            self.search(monkeypatch, tmp_path, [params], program, **options)


class TestBestMetric:
    def options(self, name, **changes):
        return {
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": name,
        } | changes

    @pytest.mark.parametrize("changes", [{"eval_on_start": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
    def test_a_wrong_name_is_refused_before_a_checkpoint(self, tmp_path, changes):
        """With the first evaluation: that before training, or else that after the first step."""
        trainer = build(MLM, tmp_path, **self.options("accuracy", **changes))
        with pytest.raises(InputError) as refused:
            trainer.train()
        message = str(refused.value)
        assert message.startswith("metric_for_best_model='accuracy' is not measured here: choose one of ")
        assert "mlm_accuracy" in message and "runtime" not in message and "\n" not in message
        assert trainer.state.global_step == (0 if changes.get("eval_on_start") else 1)
        assert not list(tmp_path.glob("checkpoint-*"))

    @pytest.mark.parametrize("name", ["mlm_accuracy", "eval_mlm_accuracy"])
    def test_a_right_name_with_and_without_its_prefix(self, tmp_path, name):
        trainer = build(MLM, tmp_path, **self.options(name))
        trainer.train()
        values = [row["eval_mlm_accuracy"] for row in eval_rows(trainer)]
        assert trainer.state.best_metric == max(values)

    def test_of_several_sets_each_has_its_own(self, tmp_path):
        data = tiny_data()
        data.eval_dataset = {"a": data.eval_dataset, "b": data.eval_dataset}
        build(MLM, tmp_path / "right", data, **self.options("b_mlm_loss")).train()
        with pytest.raises(InputError, match="choose one of a_loss.*b_mlm_loss"):
            build(MLM, tmp_path / "wrong", data, **self.options("mlm_loss")).train()
