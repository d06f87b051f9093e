"""The base Trainer: what it measures on held-out text, and the best model and options by that."""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils.memory import release_memory
from safetensors.torch import load_file
from transformers import integrations
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from helpers.method_matrix import build, eval_rows, programs, step_rows, tiny_data, tiny_examples
from hf_pretrain.data.examples import held_out
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.training.arguments import PretrainingArguments

PROGRAMS = programs()
MLM, RTD = PROGRAMS["mlm"], PROGRAMS["rtd"]
DROPOUT = {"config_overrides": None}


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
        # Workers that a garbage collection ends are not told so, and look for themselves every five seconds.
        for loader in trainer._eval_dataloaders.values():
            loader.base_dataloader._iterator._shutdown_workers()

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
