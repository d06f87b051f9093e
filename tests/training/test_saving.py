"""What a run leaves behind: composites to resume from, stock models to share, the card, and what is pushed."""

import json
import re
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from helpers.method_matrix import build, programs, tiny_data
from hf_pretrain.errors import InputError
from hf_pretrain.hub.text import label, number

PROGRAMS = programs()
MLM, RTD = PROGRAMS["mlm"], PROGRAMS["rtd"]
CHECKPOINT_FILES = {
    *("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("training_args.bin", "tokenizer.json", "tokenizer_config.json", "complete.json"),
}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def contents(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def prefixes(path):
    return {name.split(".")[0] for name in load_file(path)}


class TestLayout:
    def test_a_checkpoint_holds_the_composite_and_the_export_the_parts(self, tmp_path):
        trainer = build(RTD, tmp_path, **SAVING)
        trainer.train()
        assert contents(tmp_path) == {f"checkpoint-1/{name}" for name in CHECKPOINT_FILES}
        assert prefixes(tmp_path / "checkpoint-1" / "model.safetensors") == {
            "generator",
            "discriminator",
            "excluded_tokens",
        }
        trainer.save_model()
        export = {name for name in contents(tmp_path) if not name.startswith("checkpoint-")}
        stock = {"model.safetensors", "config.json"}
        expected = (
            stock | {f"pretraining/generator/{name}" for name in stock} | {"tokenizer.json", "tokenizer_config.json"}
        )
        assert export == expected
        assert prefixes(tmp_path / "model.safetensors") == {"electra", "discriminator_predictions"}
        assert prefixes(tmp_path / "pretraining/generator/model.safetensors") >= {"electra", "generator_predictions"}
        configs = [
            json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("", "pretraining/generator")
        ]
        assert [config["architectures"] for config in configs] == [["ElectraForPreTraining"], ["ElectraForMaskedLM"]]
        assert "auto_map" not in configs[0]
        # The checkpoint is as it was.
        assert "discriminator" in prefixes(tmp_path / "checkpoint-1" / "model.safetensors")

    def test_save_model_writes_where_it_is_told_and_only_there(self, tmp_path):
        trainer = build(MLM, tmp_path / "run")
        trainer.save_model(str(tmp_path / "elsewhere"))
        assert contents(tmp_path) == {
            f"elsewhere/{name}"
            for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
        }

    def test_a_process_that_should_not_save_does_not(self, tmp_path, monkeypatch):
        trainer = build(MLM, tmp_path)
        monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
        trainer.save_model()
        assert contents(tmp_path) == set()

    def test_a_failed_checkpoint_does_not_change_what_save_model_writes(self, tmp_path, monkeypatch):
        trainer = build(RTD, tmp_path, **SAVING)
        monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.save_model()
        assert prefixes(tmp_path / "model.safetensors") == {"electra", "discriminator_predictions"}

    def test_the_export_of_gathered_shards_is_that_of_the_model(self, tmp_path):
        """Where parameters are sharded, the whole state arrives as an argument."""
        trainer = build(RTD, tmp_path / "run")
        state = {name: value + 1 for name, value in trainer.model.state_dict().items()}
        trainer._save(str(tmp_path / "export"), state_dict=state)
        for folder, attribute in trainer.model.export_parts.items():
            saved = load_file(tmp_path / "export" / folder / "model.safetensors")
            part = trainer.model.get_submodule(attribute).state_dict()
            assert saved and all(torch.equal(value, part[name] + 1) for name, value in saved.items())


class TestResume:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        build(RTD, tmp_path / "first", **SAVING).train()
        return tmp_path / "first" / "checkpoint-1"

    @staticmethod
    def without_hashes(checkpoint):
        """Leave out what would already tell that a file was changed; a checkpoint of an earlier version has none."""
        (checkpoint / "complete.json").unlink()

    def refused(self, tmp_path, checkpoint, program=RTD, **options):
        other = build(program, tmp_path / "second", max_steps=2, **options)
        before = {name: value.clone() for name, value in other.model.state_dict().items()}
        with pytest.raises(
            InputError, match="resume_from_checkpoint: the checkpoint does not fit the model"
        ) as refused:
            other.train(resume_from_checkpoint=str(checkpoint))
        assert other.state.global_step in (0, 1)
        assert not [row for row in other.state.log_history if row["step"] > 1]
        assert before.keys() == other.model.state_dict().keys()
        return str(refused.value)

    def test_a_lost_weight_is_refused(self, tmp_path, checkpoint):
        weights = load_file(checkpoint / "model.safetensors")
        del weights["discriminator.discriminator_predictions.dense.weight"]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        self.without_hashes(checkpoint)
        message = self.refused(tmp_path, checkpoint)
        assert "discriminator.discriminator_predictions.dense.weight" in message

    def test_a_strange_weight_is_refused(self, tmp_path, checkpoint):
        weights = load_file(checkpoint / "model.safetensors") | {"discriminator.extra": torch.zeros(2)}
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        self.without_hashes(checkpoint)
        assert "discriminator.extra" in self.refused(tmp_path, checkpoint)

    def test_another_method_is_refused(self, tmp_path, checkpoint):
        with pytest.raises(
            InputError, match=r"made with the model \['electra', 'electra'\], and this run has \['bert'\]"
        ):
            build(MLM, tmp_path / "other", max_steps=2).train(resume_from_checkpoint=str(checkpoint))
        self.without_hashes(checkpoint)
        self.refused(tmp_path, checkpoint, MLM)

    def test_the_export_is_refused(self, tmp_path):
        """It has not what training needs; the stock Trainer would go on from fresh weights."""
        first = build(RTD, tmp_path / "first", **SAVING)
        first.train()
        first.save_model(str(tmp_path / "first" / "checkpoint-1"))
        self.without_hashes(tmp_path / "first" / "checkpoint-1")
        self.refused(tmp_path, tmp_path / "first" / "checkpoint-1")

    def test_another_width_is_refused_in_one_line(self, tmp_path, checkpoint):
        """torch itself refuses other shapes; a user is owed the same words."""
        sizes = {"hidden_size": 64, "embedding_size": 16, "config_overrides": None}
        self.refused(tmp_path, checkpoint, model_options=sizes)

    def test_tied_weights_stay_tied(self, tmp_path, checkpoint):
        resumed = build(RTD, tmp_path / "second", max_steps=2)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        state, tied = resumed.model.state_dict(), resumed.model.all_tied_weights_keys
        assert tied and all(state[ours].data_ptr() == state[theirs].data_ptr() for ours, theirs in tied.items())


class TestCard:
    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("card") / "my-electra"
        trainer = build(RTD, folder, max_steps=3, eval_on_start=True, learning_rate=1e-2, decay_during_warmup=False)
        trainer.train()
        trainer.evaluate()
        trainer.create_model_card()
        return trainer, folder

    def test_its_metadata_is_what_the_hub_reads(self, finished):
        trainer, folder = finished
        card = ModelCard.load(folder / "README.md")
        data = card.data
        assert (data.library_name, data.pipeline_tag, data.model_name) == (
            "transformers",
            "feature-extraction",
            "my-electra",
        )
        assert {"hf_pretrain", "rtd"} <= set(data.tags)
        assert data.base_model is None and data.license is None
        after = [row for row in trainer.state.log_history if "eval_loss" in row][-1]
        results = {result.metric_type: result.metric_value for result in data.eval_results}
        assert results.keys() == {"mlm_loss", "rtd_loss", "disc_gain", "disc_auc"}
        for name, value in results.items():
            assert value == pytest.approx(after[f"eval_{name}"], rel=1e-3)

    def test_its_tables_hold_the_numbers_of_the_log(self, finished):
        trainer, folder = finished
        text = (folder / "README.md").read_text(encoding="utf-8")
        before, after = (row for row in trainer.state.log_history if "eval_loss" in row)
        assert (before["step"], after["step"]) == (0, 3)
        for name in ("eval_loss", "eval_mlm_loss", "eval_rtd_loss", "eval_disc_auc"):
            assert f"| {label(name)} | {number(before[name])} | {number(after[name])} |" in text
        last = [row for row in trainer.state.log_history if "loss" in row][-1]
        runtime = next(row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row)
        facts = {
            "Parameters": f"{trainer.model.discriminator.num_parameters():,}",
            "Optimizer steps": "3",
            "Tokens seen": f"{last['num_tokens']:,}",
            "Tokens per second": f"{round(last['num_tokens'] / runtime):,}",
            "Precision": "fp32",
        }
        for name, value in facts.items():
            assert f"| {name} | {value} |" in text, name
        trained = f"{sum(p.numel() for p in trainer.model.parameters()):,}"
        assert f"| Parameters trained, auxiliary parts included | {trained} |" in text

    def test_nothing_in_it_is_empty(self, finished):
        _, folder = finished
        text = (folder / "README.md").read_text(encoding="utf-8")
        # The tables of facts have a header without words.
        assert not re.search(r"\bNone\b|\bnan\b|\]\(\)|\| +\|", text.replace("\n|  |  |\n", "\n"))
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert sorted(pictures) == ["plots/learning_rate.png", "plots/loss.png", "plots/quality.png"]
        assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)

    def test_facts_that_are_told_win(self, finished, tmp_path, monkeypatch):
        """The arguments of the stock method are taken, and those that only its card knows are ignored."""
        trainer, _ = finished
        monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
        trainer.create_model_card(model_name="Great", language="de", license="mit", finetuned_from="x", tasks=None)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.text.count("\n# Great\n") == 1 and "my-electra" not in card.text
        assert (card.data.license, card.data.language) == ("mit", ["de"])

    @pytest.mark.parametrize("told", ["my-electra", None])
    def test_its_code_names_the_repository_that_it_is_pushed_to(self, tmp_path, told):
        """The Hub makes the full name, out of a short one or the folder's."""
        trainer = build(MLM, tmp_path / "my-electra", hub_model_id=told)
        trainer.hub_model_id = "tester/my-electra"
        trainer.create_model_card()
        text = (tmp_path / "my-electra" / "README.md").read_text(encoding="utf-8")
        assert 'from_pretrained("tester/my-electra")' in text and 'from_pretrained(".")' not in text
        assert "# my-electra\n" in text

    def test_what_was_measured_in_the_middle_is_not_called_before_training(self, tmp_path):
        trainer = build(MLM, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        trainer.train()
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "| After training |" in text
        assert "Before training" not in text

    @pytest.mark.parametrize("trained", [True, False])
    def test_what_was_not_measured_is_absent(self, tmp_path, trained):
        data = tiny_data()
        data.eval_dataset = None
        trainer = build(MLM, tmp_path, data)
        if trained:
            trainer.train()
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "## Evaluation" not in text and "None" not in text
        assert ("Tokens seen" in text) == ("Training time" in text) == ("Optimizer steps" in text) == trained
        assert (tmp_path / "plots").exists() == trained

    def test_only_the_main_process_writes_it(self, tmp_path, monkeypatch):
        trainer = build(MLM, tmp_path)
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
        trainer.create_model_card()
        assert not (tmp_path / "README.md").exists()


class Uploads:
    """Stands for the uploads of a Trainer: keeps what each was asked for, and a future that a test completes."""

    def __init__(self, trainer, monkeypatch):
        self.jobs, self.asked, self.root_weights = [], [], []
        self.trainer = trainer
        trainer.args.push_to_hub, trainer.hub_model_id = True, "tester/model"
        monkeypatch.setattr(trainer.pushing, "upload", self.upload)

    def upload(self, folder, **options):
        self.asked.append((Path(folder).name, options.get("path_in_repo")))
        self.jobs.append(Future())
        return self.jobs[-1]

    def finish(self):
        for job in self.jobs:
            if not job.done():
                job.set_result(None)


class TestPushWhileTraining:
    """What is uploaded and when; the uploads themselves, of every method, are in tests/hub/test_round_trips.py."""

    def save(self, trainer, step):
        trainer.state.global_step = step
        trainer.create_optimizer_and_scheduler(3)
        trainer._save_checkpoint(trainer.model, trial=None)

    @pytest.fixture
    def pushing(self, tmp_path, monkeypatch):
        def make(**options):
            trainer = build(RTD, tmp_path / "run", **options)
            return trainer, Uploads(trainer, monkeypatch), tmp_path / "run"

        return make

    @pytest.mark.parametrize(
        ("strategy", "expected"),
        [
            ("end", []),
            ("every_save", [("run", None)]),
            ("checkpoint", [("run", None), ("checkpoint-1", "last-checkpoint")]),
            ("all_checkpoints", [("run", None), ("checkpoint-1", "checkpoint-1")]),
        ],
    )
    def test_what_is_uploaded(self, pushing, strategy, expected):
        trainer, uploads, folder = pushing(hub_strategy=strategy)
        self.save(trainer, 1)
        assert uploads.asked == expected
        assert (folder / "README.md").exists() == (folder / "model.safetensors").exists() == bool(expected)

    def test_the_checkpoint_keeps_the_composite(self, pushing):
        trainer, uploads, folder = pushing(hub_strategy="every_save")
        self.save(trainer, 1)
        uploads.finish()
        self.save(trainer, 2)
        for step in (1, 2):
            composite = {"generator", "discriminator", "excluded_tokens"}
            assert prefixes(folder / f"checkpoint-{step}" / "model.safetensors") == composite
        assert prefixes(folder / "model.safetensors") == {"electra", "discriminator_predictions"}

    def test_what_is_being_uploaded_is_not_written_over(self, pushing):
        """The upload reads the files in its own time: bytes that change under it give a broken commit."""
        trainer, uploads, folder = pushing(hub_strategy="every_save")
        self.save(trainer, 1)
        before = {
            name: (folder / name).read_bytes() for name in contents(folder) if not name.startswith("checkpoint-")
        }
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.add_(1.0)
        self.save(trainer, 2)
        assert len(uploads.asked) == 1
        assert (folder / "checkpoint-2" / "model.safetensors").exists()
        changed = [name for name, content in before.items() if (folder / name).read_bytes() != content]
        assert changed == []
        uploads.finish()
        self.save(trainer, 3)
        assert len(uploads.asked) == 2
        assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
