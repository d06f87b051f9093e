"""Documents that share a row without seeing each other: which share one, and what the collator makes of it."""

import pickle

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.sharded_text import Source
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples import packing as bin_packing
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import BlockDataset, pack_rows
from hf_pretrain.data.prepare import prepare_data
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.objectives.replaced_token_detection import DataCollatorForReplacedTokenDetection

CLS, SEP, FIRST_ID = 2, 3, 5
MODE = "isolated_documents"
VOCAB = {"[PAD]": 0, "[UNK]": 1, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": 4, **{f"w{k}": 5 + k for k in range(20_000)}}


def make_tokenizer(template="[CLS] $A [SEP]", **options):
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_documents(num_documents=120, *, longest=70, seed=0):
    """Documents of 0 to `longest` tokens, none of which occurs twice, in sentences of about five."""
    keys = draws.row_keys(np.arange(num_documents), seed=seed, stream="documents")
    lengths = draws.integers(keys, 1, high=longest + 1)[:, 0].tolist()
    starts = draws.uniforms(keys, longest) < 0.2
    words = draws.uniforms(keys ^ np.uint64(1), longest) < 0.6
    ids = np.split(np.arange(FIRST_ID, FIRST_ID + sum(lengths)), np.cumsum(lengths)[:-1])
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "word_starts": [row[:length].tolist() for row, length in zip(words, lengths, strict=True)],
            "sent_starts": [row[:length].tolist() for row, length in zip(starts, lengths, strict=True)],
            "doc_id": list(range(num_documents)),
        }
    )


def pieces_of(block):
    """The pieces of a block, as lists of ids."""
    borders = np.flatnonzero(np.diff(block["document_ids"])) + 1
    return [piece.tolist() for piece in np.split(block["input_ids"], borders)]


def naive_room_left(lengths, capacity):
    """The room that best-fit decreasing leaves in each row, a piece at a time, ascending."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@pytest.mark.parametrize("window", [bin_packing.WINDOW_PIECES, 50])
@pytest.mark.parametrize(("longest", "capacity"), [(1, 1), (3, 4), (20, 20), (20, 64), (60, 64), (64, 64), (100, 512)])
def test_rows_equal_a_plain_loop(longest, capacity, window, monkeypatch):
    monkeypatch.setattr(bin_packing, "WINDOW_PIECES", window)
    for seed, count in enumerate((1, 2, 37, 400)):
        lengths = 1 + draws.integers(draws.row_keys([0], seed=seed), count, high=longest)[0]
        rows = pack_rows(lengths, capacity=capacity)
        assert sorted(rows.order.tolist()) == list(range(count)), "nothing is lost or doubled"
        expected = [
            room for low in range(0, count, window) for room in naive_room_left(lengths[low : low + window], capacity)
        ]
        assert rows.bounds[0] == 0 and rows.bounds[-1] == count and len(rows) == len(expected)
        members = [rows.order[low:high].tolist() for low, high in zip(rows.bounds, rows.bounds[1:], strict=False)]
        assert sorted(capacity - sum(lengths[piece] for piece in row) for row in members) == sorted(expected)
        assert rows.sums(lengths).tolist() == [sum(lengths[piece] for piece in row) for row in members]
        assert all(row == sorted(row) for row in members)
        assert [row[0] for row in members] == sorted(row[0] for row in members)
        assert all(row[0] // window == row[-1] // window for row in members), "rows stay inside a window"


@pytest.mark.parametrize("block_size", [4, 11, 40, 500])
def test_blocks_are_pieces_of_documents_each_token_once(tokenizer, block_size):
    documents = make_documents()
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=MODE)
    packed = [piece for block in blocks for piece in pieces_of(block)]
    number_of = {token: n for n, ids in enumerate(documents["input_ids"]) for token in ids}
    assert all(len({number_of[token] for token in piece[1:-1]}) == 1 for piece in packed)
    assert all(np.diff(piece[1:-1]).tolist() == [1] * (len(piece) - 3) for piece in packed)
    assert all(piece[0] == CLS and piece[-1] == SEP for piece in packed)
    text = sorted(token for piece in packed for token in piece if token >= FIRST_ID)
    assert text == [token for ids in documents["input_ids"] for token in ids]
    assert blocks.num_tokens == len(text)
    lengths = [len(block["input_ids"]) for block in blocks]
    assert max(lengths) <= block_size and blocks.lengths.tolist() == lengths
    assert blocks.fill == pytest.approx(np.mean(lengths) / block_size)
    for block in blocks:
        assert {name: values.dtype for name, values in block.items()} == {
            "input_ids": np.int32,
            "word_starts": np.bool_,
            "document_ids": np.int32,
            "goes_on": np.bool_,
        }
        ids = block["document_ids"]
        assert ids[0] == 0 and set(np.diff(ids).tolist()) <= {0, 1} and len(ids) == len(block["input_ids"])
    batch = blocks.__getitems__([3, 0, 3])
    assert [b["input_ids"].tolist() for b in batch] == [blocks[k]["input_ids"].tolist() for k in (3, 0, 3)]
    assert blocks.__getitems__([]) == []
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_word_starts_go_with_their_tokens_and_no_word_spans_two_pieces():
    documents = make_documents()
    flags = {
        token: flag
        for ids, words in zip(documents["input_ids"], documents["word_starts"], strict=True)
        for token, flag in zip(ids, words, strict=True)
    }
    for template in ("[CLS] $A [SEP]", None):
        blocks = BlockDataset(documents, tokenizer=make_tokenizer(template), block_size=40, mode=MODE)
        for block in blocks:
            begins = np.diff(block["document_ids"], prepend=-1) != 0
            expected = [b or flags.get(t, True) for t, b in zip(block["input_ids"].tolist(), begins, strict=True)]
            assert block["word_starts"].tolist() == expected


def test_rows_are_almost_full(tokenizer):
    """Documents of half a row on average leave half of it empty where each has its own, and next to nothing together."""
    documents = make_documents(400, longest=128)
    alone = BlockDataset(documents, tokenizer=tokenizer, block_size=128, mode="doc_sentences")
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=128, mode=MODE)
    assert alone.fill < 0.6 and blocks.fill > 0.97
    assert f"mode='{MODE}'" in repr(blocks) and f"fill={blocks.fill:.3f}" in repr(blocks)
    assert len(blocks) < 1.03 * alone.lengths.sum() / 128 + 1


def words_in(documents):
    """Whether each token begins a word, or a document."""
    return {
        token: flag or k == 0
        for ids, words in zip(documents["input_ids"], documents["word_starts"], strict=True)
        for k, (token, flag) in enumerate(zip(ids, words, strict=True))
    }


def equal_documents(length, count=40):
    """Documents of one length, in words of one to three tokens."""
    ids = np.arange(FIRST_ID, FIRST_ID + length * count).reshape(count, length)
    words = draws.uniforms(draws.row_keys(np.arange(count), seed=0, stream="equal"), length) < 0.7
    words[:, 2:] |= ~words[:, 1:-1] & ~words[:, :-2]
    rows = {"input_ids": ids.tolist(), "word_starts": words.tolist(), "sent_starts": (ids % 9 == 0).tolist()}
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", None])
@pytest.mark.parametrize("block_size", [64, 128, 512])
@pytest.mark.parametrize("length", [35, 80, 129, 300, 1100])
def test_rows_are_full_whatever_the_lengths(length, block_size, template):
    """Also where two documents do not fit into a row: then some are cut, where a word begins, to fill the others."""
    documents = equal_documents(length)
    tokenizer = make_tokenizer(template)
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=MODE)
    # The last row may hold what is left.
    full = np.sort(blocks.lengths)[1:]
    assert full.mean() / block_size > 0.93 and full.min() >= block_size - max(block_size // 16, 4 + 2) - 3
    begins, seen = words_in(documents), []
    for index in range(len(blocks)):
        block = blocks[index]
        assert len(block["input_ids"]) == blocks.lengths[index] <= block_size
        texts = [[token for token in piece if token >= FIRST_ID] for piece in pieces_of(block)]
        assert all(text and begins[text[0]] for text in texts), "no word is cut"
        assert all(len({(token - FIRST_ID) // length for token in text}) == 1 for text in texts)
        goes_on = [bool(block["goes_on"][block["document_ids"] == number].all()) for number in range(len(texts))]
        assert goes_on == [(text[-1] - FIRST_ID) % length != length - 1 for text in texts]
        assert block["goes_on"].sum() == sum(
            len(piece) for piece, more in zip(pieces_of(block), goes_on, strict=True) if more
        )
        seen += [token for text in texts for token in text]
    assert sorted(seen) == list(range(FIRST_ID, FIRST_ID + 40 * length))


def test_documents_that_fit_stay_whole_where_their_lengths_add_up(tokenizer):
    documents = make_documents(400, longest=60)
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=128, mode=MODE)
    assert blocks.fill > 0.97 and not any(block["goes_on"].any() for block in blocks)


@pytest.mark.parametrize(("length", "are_cut"), [(60, False), (58, False), (57, True)])
def test_documents_that_fit_are_cut_only_for_more_than_a_sixteenth_of_a_row(tokenizer, length, are_cut):
    """Two of 58 tokens leave 8 of 128 positions empty, two of 57 leave 10."""
    blocks = BlockDataset(equal_documents(length), tokenizer=tokenizer, block_size=128, mode=MODE)
    assert any(block["goes_on"].any() for block in blocks) == are_cut


@pytest.mark.parametrize("window", [7, 1 << 16])
def test_rows_are_filled_window_by_window(tokenizer, window, monkeypatch):
    monkeypatch.setattr(bin_packing, "WINDOW_PIECES", window)
    blocks = BlockDataset(equal_documents(80), tokenizer=tokenizer, block_size=128, mode=MODE)
    text = sorted(token for block in blocks for token in block["input_ids"].tolist() if token >= FIRST_ID)
    assert text == list(range(FIRST_ID, FIRST_ID + 40 * 80))
    assert blocks.lengths.max() <= 128 and blocks.fill > (0.95 if window > 7 else 0.75)


def test_documents_need_no_separator_and_blocks_survive_pickling():
    tokenizer = make_tokenizer(sep_token=None)
    blocks = BlockDataset(make_documents(), tokenizer=tokenizer, block_size=40, mode=MODE)
    again = pickle.loads(pickle.dumps(blocks))
    assert all(
        np.array_equal(a[name], b[name])
        for a, b in zip(blocks, again, strict=True)
        for name in ("input_ids", "document_ids")
    )


def test_construction_copies_no_tokens(tokenizer):
    documents = datasets.Dataset.from_dict(
        {"input_ids": [[5] * 60_000], "word_starts": [[True] * 60_000], "sent_starts": [[True] * 60_000]}
    )
    blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=512, mode=MODE)
    held = [*vars(blocks).values(), *vars(blocks._rows).values(), *vars(blocks.store).values()]
    assert sum(value.nbytes for value in held if isinstance(value, np.ndarray)) < 3 * 8 * (len(blocks) + 2) + 100


def tokenize(texts):
    ids = [[VOCAB[word] for word in text.split()] for text in texts]
    return {
        "input_ids": ids,
        "word_starts": [[True] * len(row) for row in ids],
        "sent_starts": [[k % 4 == 0 for k in range(len(row))] for row in ids],
    }


def test_a_stream_packs_buffer_by_buffer(tokenizer):
    texts = [" ".join(f"w{100 * k + i}" for i in range(3 + 7 * k % 30)) for k in range(20)]
    stream = StreamingBlocks(
        Source(["shard"], lambda path: iter(texts)),
        tokenizer=tokenizer,
        block_size=32,
        mode=MODE,
        documents_per_buffer=8,
        tokenize=tokenize,
    )
    expected = [
        block
        for low in range(0, 20, 8)
        for block in BlockDataset(
            datasets.Dataset.from_dict(tokenize(texts[low : low + 8])), tokenizer=tokenizer, block_size=32, mode=MODE
        )
    ]
    got = list(stream)
    assert [e["example_id"] for e in got] == list(range(len(expected)))
    for example, block in zip(got, expected, strict=True):
        assert all(np.array_equal(example[name], values) for name, values in block.items())


def test_prepare_data_takes_the_mode(tmp_path):
    train_file = tmp_path / "corpus.txt"
    train_file.write_text("\n\n".join(f"This is document {k}. It has {k} words." * (1 + k % 3) for k in range(60)))
    args = DataArguments(train_file=[str(train_file)], vocab_size=200, block_size=64, block_mode=MODE)
    data = prepare_data(args, seed=0, output_dir=tmp_path / "out")
    assert data.description["block_mode"] == MODE
    assert data.description["blocks"] == len(data.train_dataset) < data.description["documents"]
    assert data.train_dataset[0]["document_ids"].max() > 0
    assert data.eval_dataset[0]["document_ids"][0] == 0


def examples_of(tokenizer, *, isolated=True):
    blocks = EpochDataset(BlockDataset(make_documents(), tokenizer=tokenizer, block_size=40, mode=MODE))
    examples = [blocks[k] for k in range(len(blocks))]
    if not isolated:
        examples = [{name: v for name, v in example.items() if name != "document_ids"} for example in examples]
    return examples


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 64])
def test_the_batch_says_which_document_and_where_in_it(side, multiple):
    tokenizer = make_tokenizer(padding_side=side)
    examples = examples_of(tokenizer)
    batch = DataCollatorForMaskedLM(tokenizer, pad_to_multiple_of=multiple)(examples)
    assert all(str(batch[name].dtype) == "torch.int64" for name in ("document_ids", "position_ids"))
    assert all(tensor.dim() <= 2 for tensor in batch.values()), "masks are made on the device"
    width = batch["input_ids"].shape[1]
    for row, example in enumerate(examples):
        ids, missing = example["document_ids"].tolist(), width - len(example["document_ids"])
        positions = [ids[:place].count(number) for place, number in enumerate(ids)]
        for name, values, fill in (("document_ids", ids, -1), ("position_ids", positions, 0)):
            padding = [fill] * missing
            assert batch[name][row].tolist() == (padding + values if side == "left" else values + padding)


@pytest.mark.parametrize("unit", ["token", "word", "ngram", "span"])
@pytest.mark.parametrize("collator", [DataCollatorForMaskedLM, DataCollatorForReplacedTokenDetection])
def test_masks_are_those_of_the_row_and_exact(tokenizer, unit, collator):
    collate = collator(tokenizer, masking=MaskingArguments(masking_unit=unit))
    batch, plain = (collate(examples_of(tokenizer, isolated=isolated)) for isolated in (True, False))
    assert set(batch) - set(plain) == {"document_ids", "position_ids"}
    assert all((batch[name] == plain[name]).all() for name in plain)
    labels, lengths = batch["labels"], batch["attention_mask"].sum(1)
    assert not ((labels == CLS) | (labels == SEP)).any()
    if unit == "token":
        counts = [max(1, round(0.15 * length)) for length in lengths.tolist()]
        assert (labels != -100).sum(1).tolist() == counts


def test_words_are_hidden_whole_and_inside_one_document():
    tokenizer = make_tokenizer(template=None)
    examples = examples_of(tokenizer)
    batch = DataCollatorForMaskedLM(tokenizer, masking=MaskingArguments(masking_unit="word"))(examples)
    for row, example in enumerate(examples):
        hidden = (batch["labels"][row] != -100).numpy()[: len(example["input_ids"])]
        words = np.cumsum(example["word_starts"])
        assert len(set(zip(words.tolist(), example["document_ids"].tolist(), strict=True))) == words[-1]
        assert all(len(set(hidden[words == word].tolist())) == 1 for word in range(1, words[-1] + 1))
