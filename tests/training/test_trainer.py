"""The base Trainer: what it refuses, what it logs, how it seeds and streams."""

import itertools
import re

import pytest
import torch
from transformers import Trainer, TrainerCallback

from helpers.method_matrix import (
    BLOCK_SIZE,
    build,
    isolated,
    log_of,
    programs,
    record_batches,
    step_rows,
    tiny_data,
)
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
