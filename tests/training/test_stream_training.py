"""Training on a stream: each process reads its own part, and a resume goes on where the stream was left."""

import json

import pytest
import torch

from helpers.method_matrix import BLOCK_SIZE, VOCAB_SIZE, build, log_of
from helpers.stream_worker import MLM, OPTIONS, streamed, watch
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.data.streaming.blocks import StreamProgress
from hf_pretrain.data.streaming.reader import STREAM_STATE
from hf_pretrain.errors import InputError


def write_corpus(folder, *, num_files=5, documents=7):
    """Write files of documents of two blocks each."""
    folder.mkdir()
    for file in range(num_files):
        texts = []
        for document in range(documents):
            first = file * documents + document
            words = [f"w{(first * (k + 1) + k * k) % (VOCAB_SIZE - 5)}" for k in range(2 * (BLOCK_SIZE - 2))]
            texts.append(" ".join(words))
        (folder / f"{file}.txt").write_text("\n\n".join(texts))


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    write_corpus(folder)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, text, workers):
    data, options = streamed(text), OPTIONS | {"dataloader_num_workers": workers}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3}
    straight = build(MLM, tmp_path / "straight", data, **options, **evaluation)
    straight.train()
    for stop in (2, 5) if workers == 0 else (3,):
        resumed = build(MLM, tmp_path / f"resumed-{stop}", data, **options, **evaluation)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_resume_reads_on_and_takes_every_example_once(tmp_path, text):
    """Three legs; the second with two workers for one, so the parts are dealt out anew."""
    data, seen = streamed(text), []
    checkpoint = None
    for leg, workers in enumerate((0, 2, 0), start=1):
        options = OPTIONS | {"max_steps": 4 * leg, "lr_scheduler_type": "constant"}
        if workers:
            # What workers read ahead is not seen from here: look where the checkpoint says that they are.
            trainer = build(MLM, tmp_path / "run", data, **options, dataloader_num_workers=workers)
            trainer.train(resume_from_checkpoint=checkpoint)
            states = [json.loads((tmp_path / "run" / f"checkpoint-{n}" / STREAM_STATE).read_text()) for n in (4, 8)]
            before, after = (StreamProgress.from_json(state["progress"]) for state in states)
            assert (before.num_readers, after.num_readers) == (1, 2)
            assert after.num_batches == 8
        else:
            trainer = build(MLM, tmp_path / "run", data, **options)
            noted = watch(trainer)
            trainer.train(resume_from_checkpoint=checkpoint)
            seen.append(noted)
        checkpoint = str(tmp_path / "run" / f"checkpoint-{4 * leg}")
    assert len(seen[0]) == len(seen[1]) == 4 * 6
    assert not set(seen[0]) & set(seen[1])
    assert all(len(set(part)) == len(part) for part in seen)


def test_another_text_is_refused(tmp_path, text):
    build(MLM, tmp_path / "run", streamed(text), **OPTIONS | {"max_steps": 1}).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    for other in ({"shuffle_buffer_size": 6}, {"block_size": BLOCK_SIZE - 1}, {"seed": 1}):
        trainer = build(MLM, tmp_path / "other", streamed(text, **other), **OPTIONS)
        with pytest.raises(InputError, match="another text, or with other options"):
            trainer.train(resume_from_checkpoint=checkpoint)
    (text / "0.txt").unlink()
    data = streamed(text)
    with pytest.raises(InputError, match="another text"):
        build(MLM, tmp_path / "other", data, **OPTIONS).train(resume_from_checkpoint=checkpoint)


def test_a_text_that_was_mended_goes_on_and_says_so(tmp_path, text, capsys):
    path = text / "3.txt"
    path.write_bytes(path.read_bytes() + b"\n\nb\xffd")
    build(MLM, tmp_path / "run", streamed(text), **OPTIONS | {"max_steps": 2}).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    path.write_bytes(path.read_bytes().replace(b"b\xffd", b"w1 w2 w3"))
    trainer = build(MLM, tmp_path / "other", streamed(text), **OPTIONS | {"max_steps": 3})
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=checkpoint)
    assert f"changed since {checkpoint} was made: 3.txt" in capsys.readouterr().out
    assert trainer.state.global_step == 3


def test_a_checkpoint_of_stored_text_is_refused(tmp_path, text):
    build(MLM, tmp_path / "run", **OPTIONS | {"max_steps": 1}).train()
    trainer = build(MLM, tmp_path / "other", streamed(text), **OPTIONS)
    with pytest.raises(InputError, match="not trained on a stream"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


class TestTwoRanks:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("streams")
        write_corpus(folder / "text")
        run_on_two_ranks("helpers.stream_worker", folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, results):
        """What each rank trained on in four steps."""
        notes = [json.loads((results / f"straight-seen-{rank}.json").read_text()) for rank in range(2)]
        return [[tuple(key) for key in note[: 4 * 6]] for note in notes]

    def test_each_rank_reads_other_examples(self, seen):
        assert len(set(seen[0]) | set(seen[1])) == 2 * 4 * 6

    def test_resume_is_bit_exact(self, results):
        weights = [torch.load(results / f"{run}-{rank}.pt") for run in ("straight", "resumed") for rank in range(2)]
        for other in weights[1:]:
            assert all(torch.equal(other[name], value) for name, value in weights[0].items())

    def test_one_process_goes_on_for_two(self, results, seen, tmp_path):
        before = set(seen[0]) | set(seen[1])
        data = streamed(results / "text")
        everything = {(row["epoch"], row["example_id"]) for row in data.train_dataset}
        trainer = build(MLM, tmp_path, data, **OPTIONS | {"max_steps": 12})
        noted = watch(trainer)
        trainer.train(resume_from_checkpoint=str(results / "straight" / "checkpoint-4"))
        assert not before & set(noted)
        assert everything <= before | set(noted)
