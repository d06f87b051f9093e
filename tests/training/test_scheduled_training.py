"""Loss weights and mask rates that change in the course of training."""

import copy
import pickle
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from helpers.method_matrix import BLOCK_SIZE, build, programs, step_rows, tiny_tokenizer
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import MaskedLMTrainingArguments
from hf_pretrain.options import resolved_options, schedules_of
from hf_pretrain.schedules import TrainingSteps
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import parse_arguments

MLM = programs()["mlm"]


@dataclass
class WeightedArguments(MaskedLMTrainingArguments):
    mlm_weight: float | str = field(default=2.0)


WEIGHTED = replace(MLM, arguments=(*MLM.arguments[:2], WeightedArguments))


def record_steps(trainer):
    """Keep the rows of every step that is trained, without padding: what is masked, and the labels."""
    steps, original = {}, trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, counts = original(*args)
        rows = steps.setdefault(trainer.state.global_step, [])
        for batch in batches:
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                rows.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
        return batches, counts

    trainer.get_batch_samples = get_batch_samples
    return steps


class TestLossWeight:
    OPTIONS = {"max_steps": 4, "learning_rate": 0.0}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("schedule", "weights"), [("1:2, 3:6", [2, 2, 4, 6]), ("0%:1, 50%:3", [1, 2, 3, 3]), ("2:0.5", [0.5] * 4)]
    )
    def test_the_gradient_of_each_step_has_its_weight(self, tmp_path, schedule, weights):
        plain = build(MLM, tmp_path / "plain", **self.OPTIONS)
        plain.train()
        trainer = build(WEIGHTED, tmp_path / "scheduled", mlm_weight=schedule, **self.OPTIONS)
        trainer.train()
        for step, weight in enumerate(weights):
            unweighted, row = plain.recorder.gradients[step], step_rows(trainer)[step]
            for name, gradient in trainer.recorder.gradients[step].items():
                torch.testing.assert_close(gradient, weight * unweighted[name], rtol=1e-4, atol=1e-7)
            assert row["mlm_weight"] == pytest.approx(weight)
            assert row["loss"] == pytest.approx(weight * row["mlm_loss"], rel=1e-4)

    def test_evaluation_uses_the_last_weight(self, tmp_path):
        trainer = build(WEIGHTED, tmp_path, mlm_weight="0:0, 1:5", eval_strategy="steps", eval_steps=1, **self.OPTIONS)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "eval_loss" in row]
        assert len(rows) == 4
        assert all(row["eval_loss"] == pytest.approx(5.0 * row["eval_mlm_loss"]) for row in rows)

    def test_a_resume_goes_on_with_the_schedule(self, tmp_path):
        options = {**self.OPTIONS, "mlm_weight": "0:0, 4:4", "save_strategy": "steps", "save_steps": 2}
        build(WEIGHTED, tmp_path, **options).train()
        resumed = build(WEIGHTED, tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert [row["mlm_weight"] for row in step_rows(resumed)] == [0, 1, 2, 3]

    def test_without_a_schedule_nothing_is_added_to_the_log(self, tmp_path):
        trainer = build(WEIGHTED, tmp_path)
        trainer.train()
        (row,) = step_rows(trainer)
        assert "mlm_weight" not in row and row["loss"] == pytest.approx(2 * row["mlm_loss"])


class TestMaskRate:
    """96 examples in steps of 20: five steps an epoch, of which the last has 16."""

    SCHEDULE = "0:0.5, 5:0.25, 10:0.1"
    RATES = (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.22, 0.19)

    @classmethod
    def build(cls, folder, *, batch=20, accumulation=1, **options):
        return build(
            MLM,
            folder,
            **{
                "mlm_probability": cls.SCHEDULE,
                "max_steps": 8,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                **options,
            },
        )

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole")
        trainer = cls.build(folder, save_strategy="steps", save_steps=1)
        steps = record_steps(trainer)
        trainer.train()
        return SimpleNamespace(folder=folder, steps=steps, trainer=trainer)

    def test_every_step_masks_its_share_of_each_example(self, whole):
        assert [len(rows) for rows in whole.steps.values()] == [20, 20, 20, 20, 16, 20, 20, 20]
        for rate, rows in zip(self.RATES, whole.steps.values(), strict=True):
            for ids, labels in rows:
                n = len(ids)
                assert sum(label != -100 for label in labels) == min(n - 2, max(1, round(rate * n)))
        logged = [row["mlm_probability"] for row in step_rows(whole.trainer)]
        assert logged == pytest.approx(self.RATES)

    @pytest.mark.parametrize(("batch", "accumulation", "workers"), [(5, 4, 0), (4, 5, 2)])
    def test_cuts_and_workers_change_no_bit(self, whole, tmp_path, batch, accumulation, workers):
        trainer = self.build(tmp_path, batch=batch, accumulation=accumulation, dataloader_num_workers=workers)
        steps = record_steps(trainer)
        trainer.train()
        assert steps == whole.steps

    @pytest.mark.parametrize("stop", [2, 5, 7])
    def test_a_resume_changes_no_bit(self, whole, tmp_path, stop):
        trainer = self.build(tmp_path)
        steps = record_steps(trainer)
        trainer.train(resume_from_checkpoint=str(whole.folder / f"checkpoint-{stop}"))
        assert steps == {step: rows for step, rows in whole.steps.items() if step >= stop}

    def test_ranks_change_no_bit(self, whole, tmp_path):
        """Two ranks of ten examples a step, as accelerate deals them out."""
        trainer = self.build(tmp_path)
        trainer.data_collator.training_steps = TrainingSteps(examples_per_step=20, per_epoch=5, total=8)
        ranks = []
        for rank in range(2):
            loader = DataLoader(
                trainer.train_dataset,
                batch_size=10,
                sampler=trainer._get_train_sampler(trainer.train_dataset),
                collate_fn=trainer.data_collator,
            )
            loader = prepare_data_loader(loader, num_processes=2, process_index=rank)
            loader.set_epoch(1)
            ranks.append(list(loader))
        for step in range(3):
            labels = [row for rank in ranks for row in rank[step]["labels"]]
            masks = [row for rank in ranks for row in rank[step]["attention_mask"]]
            rows = [label[mask.bool()].tolist() for label, mask in zip(labels, masks, strict=True)]
            assert rows == [row_labels for _, row_labels in whole.steps[5 + step]]

    def test_evaluation_uses_the_last_rate(self, whole, tmp_path):
        constant = build(MLM, tmp_path, mlm_probability=0.1)
        examples = [constant.eval_dataset[i] for i in range(len(constant.eval_dataset))]
        expected, batch = constant.data_collator(examples), whole.trainer.data_collator(examples)
        assert all(torch.equal(values, expected[name]) for name, values in batch.items())

    def test_shares_are_of_all_steps(self, tmp_path):
        trainer = self.build(tmp_path, mlm_probability="0%:0.5, 100%:0.1", max_steps=4)
        steps = record_steps(trainer)
        trainer.train()
        for rate, rows in zip((0.5, 0.4, 0.3, 0.2), steps.values(), strict=True):
            ids, labels = max(rows, key=lambda row: len(row[0]))
            assert sum(label != -100 for label in labels) == round(rate * len(ids))

    def test_a_stream_is_refused(self, tmp_path):
        known = self.build(tmp_path)
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("w1 w2 w3.\n")
        stream = StreamingBlocks([corpus], tokenizer=tiny_tokenizer(), block_size=BLOCK_SIZE)
        with pytest.raises(InputError, match="mlm_probability='.*' needs each example's step"):
            type(known)(known.model, known.args, train_dataset=stream, data_collator=known.data_collator)


class TestOptions:
    @pytest.mark.parametrize("name", ["mlm_weight", "mlm_probability"])
    def test_a_wrong_schedule_is_refused_with_the_options(self, tmp_path, name):
        with pytest.raises(InputError, match=f"{name}='0.3x' is no number and no schedule"):
            WeightedArguments(output_dir=str(tmp_path), **{name: "0.3x"})

    def test_recipes_and_the_command_line_hold_schedules(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("mlm_weight: 0%:1, 50%:2\nmlm_probability: '0:0.3, 10:0.15'\n")
        options = ["--config", str(recipe), "--output_dir", str(tmp_path)]
        args = parse_arguments([WeightedArguments], options, prog="toy", description="A toy.")[0]
        schedules = schedules_of(args)
        assert sorted(schedules) == ["mlm_probability", "mlm_weight"]
        assert schedules["mlm_weight"].at(1, 4) == 1.5
        given = ["--mlm_probability", "0%:0.4,100%:0.2"]
        args = parse_arguments([WeightedArguments], [*options, *given], prog="toy", description="A toy.")[0]
        assert args.masking.mlm_probability.at(5, 10) == pytest.approx(0.3)
        assert resolved_options([args])["mlm_probability"] == "0%:0.4,100%:0.2"

    def test_a_number_is_a_number_from_everywhere(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("mlm_weight: 3\n")
        options = ["--config", str(recipe), "--mlm_probability", "0.25", "--output_dir", str(tmp_path)]
        args = parse_arguments([WeightedArguments], options, prog="toy", description="A toy.")[0]
        assert (args.mlm_weight, args.mlm_probability) == (3.0, 0.25) and not schedules_of(args)
        assert WeightedArguments(output_dir=str(tmp_path), mlm_weight="0.5").mlm_weight == 0.5

    @pytest.mark.parametrize("name", ["mlm_weight", "mlm_probability"])
    def test_the_option_of_earlier_versions_is_answered_with_the_new_one(self, tmp_path, name):
        with pytest.raises(InputError, match=f"give the schedule to '--{name}', which takes a number or a schedule"):
            parse_arguments([WeightedArguments], [f"--{name}_schedule", "0:1, 2:0"], prog="toy", description="A toy.")

    def test_a_copy_is_the_same_schedule(self, tmp_path):
        args = WeightedArguments(output_dir=str(tmp_path), mlm_weight="0:0, 4:1")
        for again in (copy.deepcopy(args).mlm_weight, pickle.loads(pickle.dumps(args.mlm_weight))):
            assert again == args.mlm_weight and again.at(1, 4) == 0.25 and float(again) == 1.0

    def test_none_is_set_by_default(self, tmp_path):
        assert schedules_of(PretrainingArguments(output_dir=str(tmp_path))) == {}
