"""The Trainer with lanes: what each window remembers, in whichever pieces the step is cut, and after every stop."""

import json
import shutil

import numpy as np
import pytest
import torch

from helpers.method_matrix import log_of, relative_difference, tiny_tokenizer
from helpers.toy_recurrence import MEMORY_SIZE, TWO_RANKS, build_toy, documents, watch_lanes
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import RecurrentMemory
from hf_pretrain.objectives.recurrence import LaneMemory

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "learning_rate": 1e-2, "dropout": 0.3}


def threaded(trainer, dataset):
    """Return the mean loss of every time step, all lanes in one batch, with the memory handed on by hand."""
    memory, means = None, []
    for start in range(0, len(dataset), dataset.base.num_lanes):
        batch = trainer.data_collator([dataset[start + lane] for lane in range(dataset.base.num_lanes)])
        batch.pop("lanes")
        output = trainer.model(**batch, memory=memory)
        memory = output.memory
        means.append((output.losses["lm"].sum.sum().item(), output.losses["lm"].count.sum().item()))
    return means


def test_lane_memory_finds_the_rows_of_its_lanes():
    memory = LaneMemory(12, batch_size=2, world_size=2, rank=1)
    assert memory.lanes.tolist() == [2, 3, 6, 7, 10, 11]
    assert memory.read(torch.tensor([2, 3])) is None
    for lanes in ([10, 11], [3, 2]):
        states = torch.tensor(lanes, dtype=torch.float32)[None, :, None, None].expand(3, 2, 4, 5)
        memory.write(torch.tensor(lanes), RecurrentMemory(states, torch.tensor([lane % 5 for lane in lanes])))
    read = memory.read(torch.tensor([2, 11, 6]))
    assert read.states[2, :, 3, 4].tolist() == [2, 11, 0] and read.lengths.tolist() == [2, 1, 0]
    # What was read does not change when more is written.
    memory.write(torch.tensor([2, 3]), RecurrentMemory(torch.zeros(3, 2, 4, 5), torch.zeros(2, dtype=torch.long)))
    assert read.states[0, 0, 0, 0] == 2


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_losses_are_those_of_a_memory_handed_on_by_hand(tmp_path, batch, accumulation):
    """Six windows of an epoch and two of the next, which begins without memory."""
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = build_toy(tmp_path, max_steps=8, learning_rate=0.0, weight_decay=0.0, **options)
    trainer.train()
    losses = [row["loss"] for row in log_of(trainer) if "loss" in row]
    expected = [nll / count for nll, count in threaded(trainer, trainer.train_dataset)]
    assert losses == pytest.approx([*expected, *expected[:2]], rel=1e-5)


def test_gradients_with_memory_do_not_depend_on_the_cut(tmp_path):
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = build_toy(tmp_path / str(batch), max_steps=4, learning_rate=1e-2, **options)
        trainer.train()
        gradients.append(trainer.recorder.gradients)
    for whole, cut in zip(*gradients, strict=True):
        assert relative_difference(whole, cut) < 1e-5


def test_every_lane_reads_on_where_it_stopped(tmp_path):
    trainer = build_toy(tmp_path, max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    seen = watch_lanes(trainer)
    trainer.train()
    _check_contiguous(seen.tokens, steps=8)
    assert set(map(tuple, seen.filled.values())) == {(0, 4, 6, 6, 6, 6, 0, 4)}


def _check_contiguous(tokens, *, steps):
    """The stream is known: each lane must hold its part of it, from the front for every epoch."""
    stream = LaneStream(documents([97, 40, 50]), tokenizer=tiny_tokenizer(), num_lanes=8)
    length = stream.lane_length
    assert length == 23 and sorted(map(int, tokens)) == list(range(8))
    for lane, ids in tokens.items():
        epoch = stream.read(int(lane), -1, length - 1)[0].tolist()
        assert ids == (epoch * 2)[: len(ids)] and len(ids) == length * (steps // 6) + 4 * (steps % 6)


def test_evaluation_has_its_own_memory_and_leaves_that_of_training_alone(tmp_path):
    options = {"max_steps": 5, "learning_rate": 1e-2, "dropout": 0.3}
    plain = build_toy(tmp_path / "plain", **options)
    plain.train()
    watched = build_toy(tmp_path / "watched", eval_strategy="steps", eval_steps=1, eval_on_start=True, **options)
    watched.train()
    assert [row for row in log_of(watched) if "loss" in row] == [row for row in log_of(plain) if "loss" in row]
    # The memory of training is full now, and none of it is seen by an evaluation.
    nll, count = np.sum(threaded(watched, watched.eval_dataset), axis=0)
    assert watched.evaluate()["eval_lm_loss"] == pytest.approx(nll / count, rel=1e-6)
    assert count == watched.eval_dataset.base.stream.num_tokens == 55


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_resume_is_bit_exact(tmp_path, batch, accumulation):
    options = STEPS | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    straight = build_toy(tmp_path / "straight", **options)
    straight.train()
    # Step 6 ends an epoch.
    for stop in (4, 6, 7):
        resumed = build_toy(tmp_path / f"resumed-{stop}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_another_layout_is_refused_by_name(tmp_path):
    build_toy(tmp_path / "a", **STEPS | {"max_steps": 2}).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    longer = build_toy(tmp_path / "b", window=5, **STEPS)
    with pytest.raises(InputError, match="windows_per_lane=6, but this run has 5"):
        longer.train(resume_from_checkpoint=str(checkpoint))
    fewer = build_toy(tmp_path / "c", **STEPS | {"lanes": 4, "per_device_train_batch_size": 4})
    with pytest.raises(InputError, match="num_lanes=8, but this run has 4"):
        fewer.train(resume_from_checkpoint=str(checkpoint))
    wider = build_toy(tmp_path / "d", **STEPS)
    wider.model.memory_size = MEMORY_SIZE + 1
    with pytest.raises(InputError, match="memory_size=6, but this run has 7"):
        wider.train(resume_from_checkpoint=str(checkpoint))
    # Of a run that had none.
    for path in [*checkpoint.glob("lane_memory-*"), checkpoint / "complete.json"]:
        path.unlink()
    with pytest.raises(InputError, match="holds no memory of lanes"):
        build_toy(tmp_path / "e", **STEPS).train(resume_from_checkpoint=str(checkpoint))


def test_what_would_tear_lanes_apart_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"8 lanes, but a step has 6 examples"):
        build_toy(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    for name, value in (("auto_find_batch_size", True), ("dataloader_in_order", False), ("ignore_data_skip", True)):
        with pytest.raises(InputError, match=f"{name}={value}"):
            build_toy(tmp_path, **{name: value})
    with pytest.raises(InputError, match="split_batches"):
        build_toy(tmp_path, accelerator_config={"split_batches": True})


def test_the_batch_of_an_evaluation_divides_its_lanes(tmp_path):
    trainer = build_toy(tmp_path, per_device_eval_batch_size=6)
    assert trainer.args.per_device_eval_batch_size == 2
    expected = build_toy(tmp_path, per_device_eval_batch_size=8).evaluate()["eval_lm_loss"]
    assert trainer.evaluate()["eval_lm_loss"] == pytest.approx(expected, rel=1e-6)
    odd = LaneStream(documents([50, 3]), tokenizer=tiny_tokenizer(), num_lanes=3, complete=True)
    with pytest.raises(InputError, match="3 lanes cannot be read in batches of 2 by 1 processes"):
        trainer.evaluate(LaneDataset(odd, window=4))


def test_several_held_out_sets_and_one_without_lanes(tmp_path):
    trainer = build_toy(tmp_path)
    lanes = trainer.eval_dataset
    window = {"input_ids": [7, 8], "labels": [8, 9], "lane": 0, "memory_reset": True}
    collate = trainer.data_collator

    def without_lanes(examples):
        batch = collate(examples)
        if "lane_of_text" in examples[0]:
            batch.pop("lanes")
        return batch

    trainer.data_collator = without_lanes
    trainer.eval_dataset = {"text": lanes, "pieces": EpochDataset([window | {"lane_of_text": False}] * 3)}
    metrics = trainer.evaluate()
    assert metrics["eval_text_lm_loss"] == pytest.approx(build_toy(tmp_path).evaluate()["eval_lm_loss"])
    assert metrics["eval_pieces_lm_loss"] > 0


def test_a_part_is_the_beginning_of_each_lane(tmp_path):
    trainer = build_toy(tmp_path, max_eval_tokens=10)
    whole = trainer.eval_dataset
    (nll, count), *rest = threaded(trainer, whole)
    assert rest and trainer.measured_examples() == (whole.base.num_lanes, len(whole))
    assert trainer.evaluate()["eval_lm_loss"] == pytest.approx(nll / count, rel=1e-6)


def test_documents_are_not_remembered_beyond_their_end(tmp_path):
    """With short documents, each in one window, nothing is ever remembered."""
    text = documents([3] * 60)
    trainer = build_toy(tmp_path, train=text, by_document=True, max_steps=5, learning_rate=0.0, weight_decay=0.0)
    seen = watch_lanes(trainer)
    trainer.train()
    assert set(map(tuple, seen.filled.values())) == {(0,) * 5}


def test_workers_do_not_change_the_order(tmp_path):
    runs = []
    for workers in (0, 2):
        trainer = build_toy(tmp_path / str(workers), max_steps=7, dataloader_num_workers=workers, learning_rate=1e-2)
        trainer.train()
        runs.append(log_of(trainer))
    assert runs[0] == runs[1]


class TestTwoRanks:
    """One launch of two processes serves all the tests here."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("lanes")
        run_on_two_ranks("helpers.toy_recurrence", folder)
        return folder

    def found(self, folder, stop, rank):
        return json.loads((folder / f"found-{stop}-{rank}.json").read_text())

    @pytest.mark.parametrize("stop", [4, 6])
    def test_resume_is_bit_exact(self, folder, stop):
        for rank in range(2):
            assert self.found(folder, stop, rank)["log"] == self.found(folder, None, rank)["log"]
            straight, resumed = (torch.load(folder / f"weights-{run}-{rank}.pt") for run in (None, stop))
            assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    def test_each_lane_is_read_on_by_one_rank(self, folder):
        ranks = [self.found(folder, None, rank) for rank in range(2)]
        assert [sorted(map(int, rank["tokens"])) for rank in ranks] == [[0, 1, 4, 5], [2, 3, 6, 7]]
        _check_contiguous(ranks[0]["tokens"] | ranks[1]["tokens"], steps=9)
        for rank in ranks:
            assert all(filled == [0, 4, 6, 6, 6, 6, 0, 4, 6] for filled in rank["filled"].values())

    def test_one_process_goes_on_with_the_same_lanes(self, folder, tmp_path):
        """Without dropout this is the same run; the order of sums over ranks is all that differs."""
        checkpoint = tmp_path / "checkpoint-4"
        shutil.copytree(folder / "run-None" / "checkpoint-4", checkpoint)
        memories = {}
        for options in ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}):
            trainer = build_toy(
                tmp_path / "out", **TWO_RANKS | {"dropout": 0.0, "gradient_accumulation_steps": 4} | options
            )
            trainer.train(resume_from_checkpoint=str(checkpoint))
            row = next(row for row in log_of(trainer) if row.get("step") == 5 and "loss" in row)
            memories[len(memories)] = row["loss"]
        assert memories[0] == pytest.approx(memories[1], rel=1e-5)
        saved = sorted(path.name for path in checkpoint.glob("lane_memory-*"))
        assert saved == ["lane_memory-0-of-2.safetensors", "lane_memory-1-of-2.safetensors"]


def test_a_later_run_replaces_the_files_of_other_ranks(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for rank in range(2):
        (checkpoint / f"lane_memory-{rank}-of-2.safetensors").touch()
    build_toy(tmp_path / "run", **STEPS | {"max_steps": 2}).train()
    assert [path.name for path in checkpoint.glob("lane_memory-*")] == ["lane_memory-0-of-1.safetensors"]
