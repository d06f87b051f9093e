"""Counts of a corpus, against plain loops over all of it and against the blocks that a training gets."""

import json

import datasets
import numpy as np
import pytest

from hf_pretrain import cli
from hf_pretrain.commands.corpus import statistics
from hf_pretrain.commands.corpus.prepare import PrepareArguments, prepare_folder
from hf_pretrain.commands.corpus.statistics import corpus_statistics
from hf_pretrain.data import draws, prepared
from hf_pretrain.data.documents.documents import sentence_starts, tokenize_documents
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.documents.words import word_starts
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.text.files import NumberedDocument, excerpt, in_groups, numbered_documents
from hf_pretrain.errors import InputError

MODES = ["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"]


def corpus(count=60, *, most_sentences=7, longest=12, seed=0):
    """Documents of a few sentences; some words are in no vocabulary, and some documents have only such."""
    keys = draws.row_keys(np.arange(count), seed=seed, stream="statistics")
    texts = []
    for numbers in draws.integers(keys, 1 + most_sentences * (longest + 1), high=1 << 20).tolist():
        sentences = []
        for k in range(1 + numbers[0] % most_sentences):
            row = numbers[1 + k * (longest + 1) :][: 1 + numbers[1 + k * (longest + 1)] % longest]
            sentences.append(" ".join(f"w{n % 80}" for n in row) + " .")
        texts.append("\n".join(sentence.capitalize() if seed else sentence for sentence in sentences))
    return texts


def dataset(texts):
    return datasets.Dataset.from_dict({"text": texts})


def stored(texts, tokenizer):
    return tokenize_documents(dataset(texts), tokenizer)


def cut_sentences(blocks):
    """Sentences that lie in more than one block, by looking at every token."""
    store = blocks.store
    sentence = np.zeros(store.num_tokens, dtype=np.int64)
    sentence[store.sentence_starts(0, store.num_tokens)] = 1
    sentence = np.cumsum(sentence)
    holders = {}
    for low, high in zip(blocks._bounds[:-1], blocks._bounds[1:], strict=True):
        for number in set(sentence[low:high].tolist()):
            holders[number] = holders.get(number, 0) + 1
    return sum(count > 1 for count in holders.values())


@pytest.mark.parametrize("step", [7, 1 << 20])
@pytest.mark.parametrize("block_size", [5, 16, 64, 1000])
def test_packing_has_the_numbers_of_the_blocks(block_size, step, tokenizer, monkeypatch):
    monkeypatch.setattr(statistics, "_STEP", step)
    texts = corpus(40)
    documents = stored(texts, tokenizer)
    packing = corpus_statistics(dataset(texts), tokenizer, block_size=block_size)["packing"]
    assert list(packing) == MODES
    for mode in MODES:
        blocks = BlockDataset(documents, tokenizer=tokenizer, block_size=block_size, mode=mode)
        counted = packing[mode]
        assert counted["blocks"] == len(blocks)
        assert counted["tokens"] == blocks.num_tokens
        assert counted["fill"] == pytest.approx(blocks.fill)
        used = counted["tokens"] + counted["separators"] + counted["special_tokens"]
        assert used == blocks.lengths.sum() == sum(len(blocks[k]["input_ids"]) for k in range(len(blocks)))
        special = [np.isin(blocks[k]["input_ids"], (2, 3)).sum() for k in range(len(blocks))]
        assert counted["separators"] + counted["special_tokens"] == sum(special)
        assert counted["sentences_cut"] == cut_sentences(blocks)
        shares = [counted[f"{part}_share"] for part in ("text", "separator", "special_token", "padding")]
        assert sum(shares) == pytest.approx(1) and min(shares) >= 0
        assert 1 - counted["padding_share"] == pytest.approx(blocks.fill)
    assert packing["doc_sentences"]["separators"] == packing["isolated_documents"]["separators"] == 0
    assert packing["tokens"]["sentences_cut"] >= packing["full_sentences"]["sentences_cut"]


def test_rows_of_isolated_documents_are_formed_window_by_window(tokenizer, monkeypatch):
    monkeypatch.setattr("hf_pretrain.data.examples.packing.WINDOW_PIECES", 16)
    texts = corpus(100)
    blocks = BlockDataset(stored(texts, tokenizer), tokenizer=tokenizer, block_size=64, mode="isolated_documents")
    assert len(blocks) == corpus_statistics(dataset(texts), tokenizer, block_size=64)["packing"][blocks.mode]["blocks"]


def test_lengths_are_those_of_a_plain_loop(tokenizer):
    texts = [*corpus(), "nothing known here .", "w1", "Ein Satz. Noch einer! \u4e2d\u6587\u3002"]
    result = corpus_statistics(dataset(texts), tokenizer, block_size=32)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = {
        "bytes": [len(text.encode()) for text in texts],
        "characters": [len(text) for text in texts],
        "words": [len(word_starts(text)) for text in texts],
        "sentences": [len(sentence_starts(text)) for text in texts],
        "tokens": [len(row) for row in ids],
    }
    assert result["documents"] == len(texts) and result["documents_without_tokens"] == 0
    for unit, lengths in expected.items():
        quantiles = np.percentile(lengths, [5, 25, 50, 75, 95, 99], method="inverted_cdf")
        assert list(result["lengths"][unit].values()) == pytest.approx(
            [sum(lengths), np.mean(lengths), min(lengths), *quantiles, max(lengths)]
        )
    tokens = sum(expected["tokens"])
    assert result["tokens_per_word"] == tokens / sum(expected["words"])
    assert result["unknown_share"] == sum(row.count(1) for row in ids) / tokens > 0
    assert result["longer_than_block_share"] == np.mean([len(row) > 30 for row in ids])
    assert sum(count for _, _, count in result["histogram"]) == len(texts)
    for low, high, count in result["histogram"]:
        assert count == sum(low <= length <= high for length in expected["tokens"])
    order = sorted(range(len(texts)), key=lambda k: (-len(ids[k]), k))
    assert [place["number"] for place in result["longest"]] == order[:5]
    assert result["longest"][0]["tokens"] == max(expected["tokens"])
    json.dumps(result)


def test_documents_without_tokens(tokenizer):
    result = corpus_statistics(dataset(["w1 w2 .", "\u200b", "w3"]), tokenizer, block_size=8)
    assert result["documents"] == 3
    assert result["packing"]["doc_sentences"]["blocks"] == 3 - result["documents_without_tokens"]


def test_a_tokenizer_without_a_separator_leaves_three_modes_out():
    from transformers import PreTrainedTokenizerFast

    from helpers.method_matrix import tiny_tokenizer

    backend = tiny_tokenizer().backend_tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    packing = corpus_statistics(dataset(corpus()), bare)["packing"]
    assert packing["full_rows"] is packing["full_sentences"] is packing["tokens"] is None
    assert packing["doc_sentences"]["blocks"] > 0 and packing["isolated_documents"]["blocks"] > 0


def test_a_block_without_room_is_refused(tokenizer):
    with pytest.raises(InputError, match="block_size=2 leaves no room"):
        corpus_statistics(dataset(corpus()), tokenizer, block_size=2)


def test_documents_have_their_place(tmp_path):
    for name, texts in {"a.txt": ["one", "two"], "more/a.txt": ["three"]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n\n".join(texts), encoding="utf-8")
    assert list(numbered_documents(tmp_path)) == [
        ("a.txt", 0, "one"),
        ("a.txt", 1, "two"),
        ("more/a.txt", 0, "three"),
    ]
    assert list(numbered_documents(tmp_path / "more" / "a.txt")) == [("a.txt", 0, "three")]


def test_groups_end_where_they_are_large_enough():
    sizes = [3, 4, 5, 20, 1, 1]
    groups = in_groups([NumberedDocument("", 0, "x" * size) for size in sizes], num_characters=7)
    assert [[len(document.text) for document in group] for group in groups] == [[3, 4], [5, 20], [1, 1]]


def test_an_excerpt_is_one_line():
    assert excerpt("one\n two") == "one two"
    assert excerpt("word " * 100, num_characters=12) == "word word w…"
    assert len(excerpt("x" * 10_000)) == 72


class TestPreparedData:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(prepared, "_LEAST_BYTES", 900)
        texts = [*corpus(), "\u200b", "\u4e2d is not known ."]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "corpus.jsonl").write_text(rows)
        train_tokenizer(corpus(), kind="wordpiece", vocab_size=100).save_pretrained(tmp_path / "tokenizer")
        options = {"train_file": [str(tmp_path / "corpus.jsonl")], "tokenizer_name": str(tmp_path / "tokenizer")}
        options |= {"validation_fraction": 0.0, "num_workers": 1, "max_unknown_share": 1.0}
        manifest = prepare_folder(PrepareArguments(output_dir=str(tmp_path / "prepared"), **options))
        assert len(manifest["train"]["documents_of_pieces"]) > 2
        return tmp_path

    def test_what_tokens_tell_is_what_the_text_tells(self, place, capsys):
        shown = {}
        for name, given in (
            ("text", f"--train_file {place}/corpus.jsonl"),
            ("tokens", f"--prepared_data {place}/prepared"),
        ):
            own = f"--tokenizer_name {place}/tokenizer --block_size 32 --output_file {place}/{name}.json"
            assert cli.main(["statistics", *given.split(), *own.split()]) == 0, capsys.readouterr().err
            shown[name] = capsys.readouterr().out
        text, tokens = (json.loads((place / f"{name}.json").read_text()) for name in shown)
        # Those without tokens are in the lengths of the text, and not in those of the tokens.
        empty = text["documents_without_tokens"]
        assert empty and tokens["documents_without_tokens"] == empty and tokens["documents"] == text["documents"]
        assert tokens["packing"] == text["packing"]
        for name in ("tokenizer", "vocab_size", "block_size", "unknown_share", "unknown_character_share"):
            assert tokens[name] == text[name]
        assert 0 < tokens["unknown_share"]
        for unit in ("words", "sentences", "tokens"):
            without = empty if unit == "sentences" else 0
            assert tokens["lengths"][unit]["total"] == text["lengths"][unit]["total"] - without
            assert tokens["lengths"][unit]["max"] == text["lengths"][unit]["max"]
        assert tokens["tokens_per_word"] == text["tokens_per_word"]
        assert [row["tokens"] for row in tokens["longest"]] == [row["tokens"] for row in text["longest"]]
        for unit in ("bytes", "characters"):
            assert tokens[unit] == text["lengths"][unit]["total"] and f"{tokens[unit]:,} {unit}" in shown["tokens"]
        filled = [[row for row in counted["histogram"] if row[1] and row[2]] for counted in (text, tokens)]
        assert filled[0] == filled[1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "no text to count: give --train_file"),
            ("--prepared_data {place}/prepared --train_file a.txt", "does not go with prepared_data"),
            ("--prepared_data {place}/prepared --vocab_size 99", "vocab_size=99 has no effect beside prepared_data"),
            ("--prepared_data {place}/prepared --text_column body", "text_column='body'"),
            ("--prepared_data {place}/nowhere", "is no folder of hf-pretrain prepare"),
            ("--prepared_data {place}/prepared --block_size 2", "block_size=2"),
            ("--prepared_data {place}/prepared --tokenizer_name {place}/other", "the tokens of another tokenizer"),
            (
                "--prepared_data {place}/prepared --output_file {place}/prepared/prepared.json --overwrite_output_file true",
                "is one of the files that are read",
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, place, options, message, capsys):
        train_tokenizer(["other words"], kind="wordpiece", vocab_size=40).save_pretrained(place / "other")
        before = (place / "prepared" / "prepared.json").read_bytes()
        assert cli.main(["statistics", *options.format(place=place).split()]) == 2
        assert message in capsys.readouterr().err
        assert (place / "prepared" / "prepared.json").read_bytes() == before
