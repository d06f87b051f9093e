"""A checkpoint is whole or is not: a marker, written last, knows every file."""

import json
import os
import shutil

import datasets
import pytest
import torch
from safetensors.torch import save_file

from helpers.method_matrix import build, programs, tiny_data, tiny_documents, tiny_tokenizer
from helpers.toy_recurrence import build_toy
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.errors import InputError
from hf_pretrain.files import begin_folder, damaged_file, is_whole, read_marker, write_marker
from hf_pretrain.hub.pushing import remove_paths
from hf_pretrain.training.checkpointing import (
    check_checkpoint,
    remove_old_checkpoints,
    text_fingerprint,
    was_cut_off,
)
from hf_pretrain.training.processes import last_whole_checkpoint

MLM = programs()["mlm"]
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, with a folder inside as some ways to shard make it."""
    folder = tmp_path / "checkpoint-4"
    begin_folder(folder)
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    torch.save({"state": torch.ones(100)}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    (folder / "shards").mkdir()
    (folder / "shards" / "0.bin").write_bytes(b"")
    return folder


@pytest.fixture
def whole(folder):
    write_marker(folder, step=4, world_size=2)
    return folder


class TestMarker:
    def test_it_names_every_file_with_its_size(self, whole):
        sizes = {
            path.relative_to(whole).as_posix(): path.stat().st_size
            for path in whole.rglob("*")
            if path.is_file() and path.name != "complete.json"
        }
        assert json.loads((whole / "complete.json").read_text()) == {
            "step": 4,
            "world_size": 2,
            "files": sizes,
        }
        assert "shards/0.bin" in sizes and not list(whole.glob("*.part"))
        assert is_whole(whole) and not was_cut_off(whole)

    def test_it_is_right_without_the_paths_of_the_machine_too(self, folder):
        """What is pushed is another file then, of another size and hash; a run must go on from it."""
        state = {"global_step": 4, "best_model_checkpoint": str(folder)}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        write_marker(folder, has_hashes=True, step=4, world_size=2)
        remove_paths(folder)
        assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] == "checkpoint-4"
        assert check_checkpoint(folder) == 4

    def test_without_it_nothing_is_whole(self, folder):
        assert not is_whole(folder) and was_cut_off(folder)
        assert not is_whole(folder / "nowhere")

    @pytest.mark.parametrize("name", ["model.safetensors", "scheduler.pt", "trainer_state.json", "shards/0.bin"])
    def test_a_file_that_is_gone_or_changed_its_size_is_noticed(self, whole, name):
        path = whole / name
        before = path.read_bytes()
        path.write_bytes(before + b"x")
        assert not is_whole(whole)
        path.write_bytes(before)
        assert is_whole(whole)
        path.unlink()
        assert not is_whole(whole)

    @pytest.mark.parametrize("text", ["", "{", "[]", '"files"', "{}", '{"files": 3}'])
    def test_a_marker_that_is_none_marks_nothing(self, whole, text):
        (whole / "complete.json").write_text(text)
        assert not is_whole(whole) and read_marker(whole) is None

    def test_it_is_there_at_once_and_after_the_files_are_on_the_disk(self, folder, monkeypatch):
        done = []
        replace, fsync = os.replace, os.fsync
        names = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731
        monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(names(descriptor)), fsync(descriptor)))
        monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
        write_marker(folder, step=4, world_size=1)
        at = done.index("replaced")
        assert {"model.safetensors", "scheduler.pt", "trainer_state.json", "0.bin"} == set(done[: at - 1])
        assert done[at - 1 :] == ["complete.json.part", "replaced", folder.name]

    def test_a_folder_that_is_begun_again_keeps_nothing(self, whole):
        begin_folder(whole)
        assert [path.name for path in whole.iterdir()] == ["complete.json.part"]
        assert was_cut_off(whole)


class TestChoice:
    def test_the_latest_step_that_is_whole(self, tmp_path):
        assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "nowhere") is None
        for step in (9, 10, 100):
            begin_folder(tmp_path / f"checkpoint-{step}")
            write_marker(tmp_path / f"checkpoint-{step}", step=step, world_size=1)
        begin_folder(tmp_path / "checkpoint-200")
        for name in ("checkpoint-x", "checkpoint-300-old", "my-checkpoint-400"):
            (tmp_path / name).mkdir()
            write_marker(tmp_path / name, step=1, world_size=1)
        (tmp_path / "checkpoint-500").touch()
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
        (tmp_path / "checkpoint-100" / "complete.json").unlink()
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"

    def test_a_run_can_go_on_from_a_whole_one(self, whole):
        assert check_checkpoint(whole) == 4

    def test_one_of_an_earlier_version_has_files_that_open(self, folder):
        (folder / "complete.json.part").unlink()
        (folder / "shards" / "0.bin").unlink()
        assert not was_cut_off(folder) and check_checkpoint(folder) == 4

    @pytest.mark.parametrize("name", ["model.safetensors", "scheduler.pt"])
    @pytest.mark.parametrize("is_marked", [True, False])
    def test_a_file_that_was_cut_is_named(self, whole, name, is_marked):
        if not is_marked:
            (whole / "complete.json").unlink()
            (whole / "shards" / "0.bin").unlink()
        data = (whole / name).read_bytes()
        (whole / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=f"is incomplete .{name} ") as refused:
            check_checkpoint(whole)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("text", [None, "", "{}", "[]"])
    def test_a_state_that_cannot_be_read(self, folder, text):
        (folder / "trainer_state.json").unlink()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
        write_marker(folder, step=4, world_size=1)
        with pytest.raises(InputError, match=r"no readable trainer_state\.json"):
            check_checkpoint(folder)

    def test_weights_alone_are_no_start(self, tmp_path):
        """The stock Trainer would begin with a fresh optimizer and at the first step's learning rate."""
        build(MLM, tmp_path, save_only_model=True, **SAVING).train()
        checkpoint = last_whole_checkpoint(tmp_path)
        assert checkpoint == tmp_path / "checkpoint-3"
        with pytest.raises(InputError, match="holds the weights alone"):
            check_checkpoint(checkpoint)


class TestRemoval:
    @pytest.fixture
    def steps(self, tmp_path):
        """Three whole checkpoints, and the oldest half removed by a run that was killed at it, which makes it look new."""
        for step in (1, 2, 3, 4):
            folder = tmp_path / f"checkpoint-{step}"
            begin_folder(folder)
            (folder / "a").write_text("a")
            write_marker(folder, step=step, world_size=1)
            os.utime(folder, (step * 100, step * 100))
        (tmp_path / "checkpoint-1" / "a").unlink()
        os.utime(tmp_path / "checkpoint-1", (900, 900))
        return tmp_path

    @pytest.mark.parametrize(
        ("limit", "best", "left"),
        [
            (None, None, {1, 2, 3, 4}),
            (0, None, {1, 2, 3, 4}),
            (4, None, {1, 2, 3, 4}),
            (3, None, {2, 3, 4}),
            (2, None, {3, 4}),
            (1, None, {4}),
            (1, 2, {2, 4}),
            (2, 2, {2, 4}),
            (3, 1, {1, 3, 4}),
        ],
    )
    def test_the_oldest_go_first_and_before_them_what_is_not_whole(self, steps, limit, best, left, monkeypatch):
        monkeypatch.chdir(steps)
        best = None if best is None else f"checkpoint-{best}"
        remove_old_checkpoints(steps, limit=limit, keep=(steps / "checkpoint-4", best))
        assert {int(path.name.partition("-")[2]) for path in steps.iterdir()} == left


class TestTraining:
    def test_a_checkpoint_is_marked_before_it_is_pushed_and_before_others_go(self, tmp_path, monkeypatch):
        trainer = build(MLM, tmp_path, save_total_limit=1, **SAVING)
        trainer.args.push_to_hub = True
        seen = []

        def push(folder):
            seen.append((is_whole(folder), sorted(path.name for path in tmp_path.glob("checkpoint-*"))))

        monkeypatch.setattr(trainer.pushing, "push_checkpoint", push)
        trainer.train()
        assert seen == [
            (True, ["checkpoint-1"]),
            (True, ["checkpoint-1", "checkpoint-2"]),
            (True, ["checkpoint-2", "checkpoint-3"]),
        ]
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
        marker = read_marker(tmp_path / "checkpoint-3")
        assert (marker["step"], marker["world_size"]) == (3, 1)

    def test_the_arguments_are_saved_as_they_were_asked_for(self, tmp_path):
        trainer = build(MLM, tmp_path, save_total_limit=2, **SAVING)
        trainer.train()
        saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
        assert saved.save_total_limit == trainer.args.save_total_limit == 2

    def test_nothing_of_an_earlier_run_stays_in_it(self, tmp_path):
        left = tmp_path / "checkpoint-2"
        left.mkdir()
        (left / "rng_state_7.pth").touch()
        build(MLM, tmp_path, **SAVING).train()
        assert is_whole(left) and not (left / "rng_state_7.pth").exists()

    def test_what_a_method_saves_besides_is_part_of_it(self, tmp_path):
        build_toy(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        assert "lane_memory-0-of-1.safetensors" in read_marker(tmp_path / "checkpoint-2")["files"]

    def test_the_best_one_stays(self, tmp_path):
        trainer = build(
            *(MLM, tmp_path),
            **SAVING,
            **{"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
            metric_for_best_model="eval_mlm_loss",
            greater_is_better=True,
            learning_rate=1e-2,
        )
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best == str(tmp_path / "checkpoint-1") and is_whole(best)


class TestGoingOn:
    def test_true_passes_over_what_was_cut_off(self, tmp_path):
        first = build(MLM, tmp_path, **SAVING)
        first.train()
        (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
        again = build(MLM, tmp_path, **SAVING)
        again.train(resume_from_checkpoint=True)
        assert again.num_steps_trained == 1 and again.state.global_step == 3
        assert all(
            torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items()
        )

    def test_true_needs_one(self, tmp_path):
        with pytest.raises(InputError, match="holds no whole checkpoint"):
            build(MLM, tmp_path).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("max_steps", [12, 14, 3])
    def test_a_run_that_is_done_trains_no_further(self, tmp_path, max_steps):
        """96 examples in batches of 8: an epoch ends with step 12; the stock Trainer takes one more step inside one."""
        options = {"save_strategy": "steps", "save_steps": max_steps, "max_steps": max_steps}
        first = build(MLM, tmp_path, **options)
        first.train()
        again = build(MLM, tmp_path, eval_on_start=True, **options)
        output = again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{max_steps}"))
        assert again.state.global_step == max_steps and again.num_steps_trained == 0
        assert all(
            torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items()
        )
        rows = again.state.log_history
        assert [row["step"] for row in rows] == [row["step"] for row in first.state.log_history]
        assert not any(name.startswith("train_") for name in (*rows[-1], *output.metrics))

    def test_it_is_not_evaluated_again_before_the_first_step(self, tmp_path):
        options = SAVING | {"eval_on_start": True}
        build(MLM, tmp_path, **options).train()
        again = build(MLM, tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert [row["step"] for row in again.state.log_history if "eval_loss" in row] == [0]


class TestAnotherRun:
    """A resume says what is not as it was, and refuses what makes another run."""

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("first")
        build(MLM, folder, **SAVING).train()
        return folder / "checkpoint-2"

    def going_on(self, checkpoint, folder, capsys, data=None, **options):
        build(MLM, folder, data, **SAVING, **options).train(resume_from_checkpoint=str(checkpoint))
        return [line for line in capsys.readouterr().out.splitlines() if "differs" in line]

    def test_nothing_is_said_of_the_same_run(self, checkpoint, tmp_path, capsys):
        same = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 5}
        assert self.going_on(checkpoint, tmp_path, capsys, **same) == []

    def test_options_and_the_size_of_a_step(self, checkpoint, tmp_path, capsys):
        (line,) = self.going_on(
            *(checkpoint, tmp_path, capsys), learning_rate=1e-2, per_device_train_batch_size=4, mlm_probability=0.3
        )
        assert line == (
            f"this run differs from {checkpoint}: a step had 8 examples, and has 4; learning_rate was its default, and is 0.01; "
            "mlm_probability was its default, and is 0.3"
        )

    @pytest.mark.parametrize("train", [95, 97])
    def test_a_text_that_was_edited(self, checkpoint, tmp_path, capsys, train):
        (line,) = self.going_on(checkpoint, tmp_path, capsys, tiny_data(train=train))
        assert "the text has changed" in line

    def test_another_seed_or_model_is_refused(self, checkpoint, tmp_path, capsys):
        with pytest.raises(InputError, match="with the seed 42, and this run has 43"):
            self.going_on(checkpoint, tmp_path, capsys, seed=43)
        trainer = build(MLM, tmp_path, model_options={"model_type": "electra"}, **SAVING)
        with pytest.raises(InputError, match=r"with the model \['bert'\], and this run has \['electra'\]"):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def test_a_file_that_has_changed_is_noticed(self, checkpoint, tmp_path, capsys):
        copy = tmp_path / "checkpoint-2"
        shutil.copytree(checkpoint, copy)
        content = bytearray((copy / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "optimizer.pt").write_bytes(content)
        assert is_whole(copy) and damaged_file(copy) == "optimizer.pt" and damaged_file(checkpoint) is None
        with pytest.raises(InputError, match=r"is damaged \(optimizer.pt is not as it was saved\)"):
            self.going_on(copy, tmp_path, capsys)

    def test_one_of_an_earlier_version_is_taken(self, checkpoint, tmp_path, capsys):
        copy = tmp_path / "checkpoint-2"
        shutil.copytree(checkpoint, copy)
        marker = json.loads((copy / "complete.json").read_text())
        (copy / "complete.json").write_text(
            json.dumps({name: marker[name] for name in ("step", "world_size", "files")})
        )
        assert self.going_on(copy, tmp_path, capsys, learning_rate=1e-2) == []


class TestTextFingerprint:
    def test_one_token_that_is_another_changes_it(self):
        def fingerprint(edited, wrap=lambda documents: documents):
            rows = [[7, 8, 9], [10, 11], [12]]
            rows[1][0] += edited
            return text_fingerprint(wrap(tiny_documents({"input_ids": [[2, *row, 3] for row in rows]})))

        assert fingerprint(0) == fingerprint(0) != fingerprint(1)
        # Through whatever the examples are made by.
        for wrap in (
            EpochDataset,
            lambda documents: BlockDataset(documents, tokenizer=tiny_tokenizer(), block_size=8),
        ):
            assert fingerprint(0, wrap) == fingerprint(0, wrap) != fingerprint(1, wrap)

    def test_it_does_not_depend_on_how_the_text_was_stored(self):
        rows = [[2, 7, 8, 3], [2, 9, 3], [2, 10, 3]]
        parts = [tiny_documents({"input_ids": rows[:1]}), tiny_documents({"input_ids": rows[1:]})]
        joined = datasets.concatenate_datasets(parts)
        assert text_fingerprint(joined) == text_fingerprint(tiny_documents({"input_ids": rows}))

    def test_borders_and_the_choice_of_rows_count(self):
        one = tiny_documents({"input_ids": [[2, 7, 8, 3], [2, 9, 3]]})
        other = tiny_documents({"input_ids": [[2, 7, 3], [2, 8, 9, 3]]})
        assert len({text_fingerprint(part) for part in (one, other, one.select([1, 0]))}) == 3

    def test_a_large_text_is_looked_at_in_parts(self, monkeypatch):
        monkeypatch.setattr("hf_pretrain.training.checkpointing._MOST_HASHED", 100)
        rows = [[2, *range(1000), 3]]
        whole = text_fingerprint(tiny_documents({"input_ids": rows}))
        rows[0][500] += 1
        assert text_fingerprint(tiny_documents({"input_ids": rows})) != whole

    def test_what_is_not_stored_has_none(self):
        assert text_fingerprint(None) is None and text_fingerprint([]) is None
