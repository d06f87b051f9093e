import datasets
import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from helpers.sharded_text import (
    NUM_SHARDS,
    PATHS,
    VOCAB,
    Source,
    as_list,
    make_stream,
    make_tokenizer,
    read,
    rows,
    tokenize,
)
from hf_pretrain.data.documents.documents import tokenize_texts
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.errors import InputError


def load(stream, workers=0, persistent=False, batch_size=3):
    return DataLoader(
        stream, batch_size=batch_size, num_workers=workers, persistent_workers=persistent, collate_fn=as_list
    )


def flat(batches):
    return [
        (example["example_id"], example["epoch"], tuple(example["input_ids"].tolist()))
        for batch in batches
        for example in batch
    ]


@pytest.mark.parametrize("mode", ["full_rows", "full_sentences", "doc_sentences", "tokens"])
def test_blocks_are_those_of_the_stored_documents_buffer_by_buffer(mode):
    got = list(make_stream(mode=mode))
    expected = []
    for shard, path in enumerate(PATHS[:-1]):
        texts, number = list(read(path)), 0
        for begin in range(0, len(texts), 4):
            documents = datasets.Dataset.from_dict(tokenize(texts[begin : begin + 4]))
            for block in BlockDataset(documents, tokenizer=make_tokenizer(), block_size=16, mode=mode):
                expected.append((shard * 2**32 + number, block["input_ids"].tolist(), block["word_starts"].tolist()))
                number += 1
    assert [(e["example_id"], e["input_ids"].tolist(), e["word_starts"].tolist()) for e in got] == expected
    assert all(e["epoch"] == 0 and 0 <= e["example_id"] < 2**62 for e in got)
    assert {type(e["example_id"]) for e in got} == {int}


@pytest.mark.parametrize("shuffle_buffer_size", [0, 7])
def test_examples_do_not_depend_on_workers_and_replay_is_identical(shuffle_buffer_size):
    runs = {}
    for workers in (0, 2):
        loader = load(make_stream(shuffle_buffer_size=shuffle_buffer_size), workers)
        loader.dataset.set_epoch(3)
        runs[workers] = flat(loader)
        again = load(make_stream(shuffle_buffer_size=shuffle_buffer_size), workers)
        again.dataset.set_epoch(3)
        assert flat(again) == runs[workers]
    assert sorted(runs[0]) == sorted(runs[2])
    assert len({example_id for example_id, _, _ in runs[0]}) == len(runs[0])
    assert {epoch for _, epoch, _ in runs[0]} == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_reaches_persistent_workers(workers):
    loader = load(make_stream(shuffle_buffer_size=5), workers, persistent=workers > 0)
    orders = []
    for epoch in (0, 1, 4):
        loader.dataset.set_epoch(epoch)
        seen = flat(loader)
        assert {epoch for _, epoch, _ in seen} == {epoch}
        orders.append([example_id for example_id, _, _ in seen])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]


def test_files_are_read_and_tokenized_like_stored_documents(tmp_path):
    """Without ``read`` and ``tokenize``: the library's own reader and document tokenizer."""
    for path in PATHS[:2]:
        (tmp_path / path).with_suffix(".txt").write_text("\n\n".join(read(path)), encoding="utf-8")
    tokenizer = make_tokenizer()
    stream = StreamingBlocks(sorted(tmp_path.glob("*.txt")), tokenizer=tokenizer, block_size=16)
    expected = []
    for path in PATHS[:2]:
        columns = tokenize_texts(list(read(path)), tokenizer)
        blocks = BlockDataset(datasets.Dataset.from_dict(columns), tokenizer=tokenizer, block_size=16)
        expected += [(block["input_ids"].tolist(), block["word_starts"].tolist()) for block in blocks]
    assert [(e["input_ids"].tolist(), e["word_starts"].tolist()) for e in stream] == expected
    assert any(VOCAB["[SEP]"] in ids[1:-1] for ids, _ in expected)


def test_a_window_is_permuted_by_seed_and_epoch():
    """One shard, in windows: nothing leaves its window, and no window is in order."""

    def order(seed, epoch):
        stream = make_stream(Source(PATHS[:1]), shuffle_buffer_size=6, seed=seed)
        stream.set_epoch(epoch)
        return [example["example_id"] for example in stream]

    ids = order(1, 0)
    assert order(1, 0) == ids
    assert sorted(order(2, 0)) == sorted(order(1, 1)) == sorted(ids) == list(range(len(ids)))
    assert order(2, 0) != ids != order(1, 1)
    assert ids != sorted(ids)
    ends = [k + 1 for k in range(len(ids)) if sorted(ids[: k + 1]) == list(range(k + 1))]
    assert len(ends) > 1, "there is one window only"


def test_shuffle_is_keyed_by_seed_and_mixes():
    one, two, other = (
        [example["example_id"] for example in make_stream(shuffle_buffer_size=10, seed=seed)] for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other
    # Each block once: numbered from 0 in its shard. (Without a shuffle the windows, and so the blocks, are others.)
    assert sorted(one) == sorted(other)
    assert sorted(one) == [
        shard + k for shard in range(0, 2**40, 2**32) for k in range(sum(i >> 32 << 32 == shard for i in one))
    ]
    places = np.argsort(one)
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.5  # neighbours in the text are no longer neighbours


def test_accelerate_loader_sets_the_epoch_of_a_stream():
    loader = prepare_data_loader(load(make_stream(), batch_size=2), num_processes=2, process_index=1)
    assert {epoch for _, epoch, _ in flat(loader)} == {0}
    assert {epoch for _, epoch, _ in flat(loader)} == {1}
    loader.set_epoch(7)
    assert {epoch for _, epoch, _ in flat(loader)} == {7}


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_dataset_gives_the_same_as_files(workers):
    source = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": PATHS})
    assert source.num_shards == NUM_SHARDS
    stream = make_stream(source, text_column="body")
    assert stream.num_shards == NUM_SHARDS
    assert sorted(flat(load(stream, workers))) == flat([list(make_stream())])
    stream.set_epoch(2)
    assert {epoch for _, epoch, _ in flat(load(stream, workers))} == {2}


def test_epoch_reaches_a_shuffled_streaming_dataset():
    source = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": PATHS[:1]})
    stream = make_stream(source.shuffle(seed=1, buffer_size=50), text_column="body")
    orders = []
    for epoch in (0, 1, 1):
        stream.set_epoch(epoch)
        orders.append([tuple(example["input_ids"].tolist()) for example in stream])
    assert orders[0] != orders[1] == orders[2]


def test_spawned_workers_hear_of_the_epoch():
    loader = DataLoader(
        make_stream(),
        batch_size=3,
        num_workers=1,
        multiprocessing_context="spawn",
        persistent_workers=True,
        collate_fn=as_list,
    )
    for epoch in (0, 5):
        loader.dataset.set_epoch(epoch)
        expected = make_stream()
        expected.set_epoch(epoch)
        assert flat(loader) == flat([list(expected)])


def test_idle_workers_are_harmless():
    one = make_stream(Source(PATHS[:1]))
    assert flat(load(one, workers=2)) == flat([list(one)])


def test_reading_is_lazy():
    """The first example costs one buffer, not a shard."""
    taken = []

    def endless(path):
        while True:
            taken.append(path)
            yield "w1 w2 w3 ."

    example = next(iter(make_stream(Source(["x"], endless))))
    assert example["input_ids"][0] == VOCAB["[CLS]"]
    assert len(taken) == 4


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="block_size=2"):
        make_stream(block_size=2)
    with pytest.raises(InputError, match="mode='lines'"):
        make_stream(mode="lines")
    with pytest.raises(InputError, match="source="):
        make_stream([])
    with pytest.raises(InputError, match="source='shard-0'"):
        make_stream("shard-0")
    with pytest.raises(InputError, match="documents_per_buffer=0"):
        make_stream(documents_per_buffer=0)
    with pytest.raises(InputError, match="text_column='text' .*body"):
        make_stream(datasets.Dataset.from_dict({"body": ["a"]}).to_iterable_dataset())
    with pytest.raises(ValueError, match="epoch=-2"):
        make_stream().set_epoch(-2)
