"""Pairs that files give: which column is what, what is refused, and what an example holds."""

import gzip
import json
import pickle

import datasets
import numpy as np
import pytest

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import UnknownCount
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.contrastive.pairs import load_pairs

ROWS = [
    {"anchor": "w1 w2", "positive": "w3", "negative": "w4 w5"},
    {"anchor": "w6", "positive": "w7 w8 w9", "negative": "w10"},
    {"anchor": " w1 w2", "positive": "w11", "negative": "w12"},
]


def write(path, rows):
    """Write rows of texts in the format of the file's name."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    if ".json" in path.name:
        text = "\n".join(map(json.dumps, rows))
    else:
        separator = "\t" if ".tsv" in path.name else ","
        text = "\n".join(separator.join(line) for line in [names, *([row[name] for name in names] for row in rows)])
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as stream:
        stream.write(text + "\n")
    return path


def load(*paths, **options):
    return load_pairs(paths, **({"tokenizer": tiny_tokenizer(), "block_size": 16} | options))


def words(example):
    """The texts of an example, with their special tokens."""
    return [" ".join(tiny_tokenizer().convert_ids_to_tokens(text["input_ids"])) for text in example["texts"]]


def plain(value):
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


class TestReading:
    @pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.json", "x.parquet", "x.tsv.gz", "x.jsonl.gz"])
    def test_a_file_gives_its_rows(self, tmp_path, name):
        pairs = load(write(tmp_path / name, ROWS))
        assert pairs.columns == ("anchor", "positive", "negative") and pairs.num_negatives == 1
        assert [words(example) for example in pairs] == [
            ["[CLS] w1 w2 [SEP]", "[CLS] w3 [SEP]", "[CLS] w4 w5 [SEP]"],
            ["[CLS] w6 [SEP]", "[CLS] w7 w8 w9 [SEP]", "[CLS] w10 [SEP]"],
            ["[CLS] w1 w2 [SEP]", "[CLS] w11 [SEP]", "[CLS] w12 [SEP]"],
        ]
        # Equal anchors have equal numbers, white space apart.
        numbers = [example["document"] for example in pairs]
        assert numbers[0] == numbers[2] != numbers[1]
        for text in pairs[1]["texts"]:
            assert text["input_ids"].dtype == np.int32 and text["word_starts"].dtype == np.bool_
            assert text["word_starts"].tolist() == [True] * len(text["input_ids"])
        assert pairs.num_tokens == 14 and pairs.num_cut == 0 and "3 rows of anchor, positive, negative" in repr(pairs)

    def test_several_files_are_one(self, tmp_path):
        first, second = write(tmp_path / "a.tsv", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[1:])
        pairs = load(first, second)
        numbers = [example["document"] for example in pairs]
        assert len(pairs) == 4 and numbers[0] == numbers[3] and numbers[1] == numbers[2] != numbers[0]
        assert words(pairs[3])[1] == "[CLS] w11 [SEP]"

    @pytest.mark.parametrize(
        ("names", "options", "expected"),
        [
            ("positive anchor", {}, "anchor positive"),
            ("id query positive negative_2 negative_1", {}, "query positive negative_2 negative_1"),
            ("pos query neg", {}, "query pos neg"),
            ("question answer", {}, "question answer"),
            ("premise hypothesis", {}, "premise hypothesis"),
            ("sentence2 sentence1", {}, "sentence1 sentence2"),
            ("one two three four", {}, "one two three four"),
            ("negated anchor other", {}, "negated anchor other"),
            ("one two three four", {"columns": ["three", "one"]}, "three one"),
            ("anchor positive label", {"columns": ["positive", "anchor"]}, "positive anchor"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
    def test_columns(self, tmp_path, capsys, names, options, expected, suffix):
        rows = [{name: f"w{10 * row + at}" for at, name in enumerate(names.split())} for row in range(3)]
        pairs = load(write(tmp_path / f"x.{suffix}", rows), **options)
        assert pairs.columns == tuple(expected.split())
        assert words(pairs[2]) == [f"[CLS] {rows[2][name]} [SEP]" for name in expected.split()]
        # What is left out without being asked for is said.
        left_out = set(names.split()) - set(expected.split()) if not options else set()
        assert ("left out id" in capsys.readouterr().out) == bool(left_out)

    def test_a_quotation_mark_of_a_tsv_is_a_character(self, tmp_path):
        (tmp_path / "x.tsv").write_text('a\tb\n"w1 w2\tw3\nnull\tw4\nNA\tw5\n')
        (tmp_path / "x.csv").write_text('a,b\n"w1, w2",w3\nw6,w7\n')
        assert len(load(tmp_path / "x.tsv")) == 3
        assert len(load(tmp_path / "x.csv")) == 2

    def test_unknown_characters_are_counted(self, tmp_path):
        unknown = UnknownCount()
        load(write(tmp_path / "x.tsv", [{"a": "w1 zzz", "b": "w2"}, {"a": "yyy", "b": "w3"}]), unknown=unknown)
        assert unknown.tokens == 5 and unknown.unknown_tokens == 2

    def test_many_anchors_are_numbered_over_the_chunks_of_a_table(self, tmp_path):
        rows = [{"a": f"w{i % 7}", "b": "w1"} for i in range(1200)]
        pairs = load(*(write(tmp_path / f"{i}.tsv", rows) for i in range(2)))
        anchors = np.tile(np.arange(1200) % 7, 2)
        assert len(np.unique(pairs.anchors)) == 7
        assert all(len(np.unique(pairs.anchors[anchors == anchor])) == 1 for anchor in range(7))


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("anchor\tpositive\nw1\tw2\nw3\t\n", {}, r"x.tsv, row 2 \(a header does not count\): column 'positive'"),
            ("anchor\tpositive\nw1\tw2\n  \tw3\n", {}, "row 2 .*'anchor' is empty; drop the row"),
            ("a\tb\nw1\tw2\n", {"columns": ["a", "c"]}, "x.tsv has no column 'c', but a, b"),
            ("query\tb\nw1\tw2\n", {"columns": ["querx", "b"]}, "no column 'querx'.*did you mean 'query'"),
            ("a\tb\nw1\tw2\n", {"columns": ["a"]}, r"columns=\['a'\] must be two names or more"),
            ("a\tb\nw1\tw2\n", {"columns": ["a", "a"]}, "each once"),
            ("a\nw1\n", {}, "has the column a only"),
            ("a\tb\tlabel\nw1\tw2\t1\n", {}, "has a column 'label', but each row is taken for a true pair"),
            ("How far is it?\tFar.\nw1\tw2\n", {}, "the first line was taken as the header, and holds 'How far is it"),
            ("a\tb\nw1\t1\nw2\t2\n", {}, "column 'b' holds int64, not texts"),
            ("a\tb\nw1\tw2\nw1\tw3\n", {}, "'a' holds the same text in all of 2 rows"),
            ("a\tb\n", {}, "pairs_file="),
            ("a\tb\nw1\tw2\nw2\tw1\n", {"block_size": 2}, "block_size=2 leaves no room"),
            ("a\tb\nw1\tw2\nw2\tw1\n", {"block_size": 4, "scorer": "cross"}, "leaves no room for a pair"),
            ("a\tb\nw1\tw2\nw2\tw1\n", {"scorer": "both"}, "scorer='both' must be one of bi, cross"),
            ("a\tb\nw1\tw2\nw2\tw1\n", {"cross_negatives": 0}, "cross_negatives=0"),
        ],
    )
    def test_what_is_no_pair(self, tmp_path, text, options, message):
        (tmp_path / "x.tsv").write_text(text)
        with pytest.raises(InputError, match=message) as error:
            load(tmp_path / "x.tsv", **options)
        assert "\n" not in str(error.value)

    def test_rows_are_those_of_their_file(self, tmp_path):
        good = write(tmp_path / "a.tsv", ROWS)
        # The second is a character that gives no token.
        tokenizer = train_tokenizer(["w1 w2 w3"], vocab_size=40)
        for text in ("", "\u200b"):
            (tmp_path / "b.tsv").write_text(f"anchor\tpositive\tnegative\nw1\tw2\tw3\nw1\tw2\t{text}\n")
            with pytest.raises(InputError, match="b.tsv, row 2 .*'negative' is empty"):
                load(good, tmp_path / "b.tsv", tokenizer=tokenizer)
        (tmp_path / "b.tsv").write_text("anchor\tpositive\nw1\tw2\n")
        with pytest.raises(InputError, match="b.tsv has no column 'negative'"):
            load(good, tmp_path / "b.tsv")

    def test_what_json_and_no_file_say(self, tmp_path):
        (tmp_path / "x.jsonl").write_text('{"query": "w1", "pos": ["w2"]}\n')
        with pytest.raises(InputError, match=r"column 'pos' holds list<.*, not texts"):
            load(tmp_path / "x.jsonl")
        (tmp_path / "y.jsonl").write_text('{"query": "w1", "pos": "w2"}\n{"query": null, "pos": "w2"}\n')
        with pytest.raises(InputError, match="y.jsonl, row 2 .*'query' is empty"):
            load(tmp_path / "y.jsonl")
        with pytest.raises(InputError, match="pairs_file='.*none.tsv' is no file"):
            load(tmp_path / "none.tsv")
        with pytest.raises(InputError, match="names no file"):
            load()


class TestExamples:
    def test_long_texts_are_cut_and_counted(self, tmp_path):
        rows = [{"a": "w1 w2 w3 w4", "b": "w5"}, {"a": "w6", "b": "w1 w2 w3 w4 w5"}, {"a": "w7 w8 w9", "b": "w1"}]
        path = write(tmp_path / "x.tsv", rows)
        pairs = load(path, block_size=5)
        assert pairs.num_cut == 2 and "2 texts cut" in repr(pairs) and pairs.num_tokens == 15
        assert words(pairs[1]) == ["[CLS] w6 [SEP]", "[CLS] w1 w2 w3 [SEP]"]
        pairs = load(path, block_size=8, scorer="cross")
        assert pairs.num_cut == 1
        assert [words(example)[0] for example in pairs] == [
            "[CLS] w1 w2 w3 w4 [SEP] w5 [SEP]",
            "[CLS] w6 [SEP] w1 w2 w3 w4 [SEP]",
            "[CLS] w7 w8 w9 [SEP] w1 [SEP]",
        ]

    def test_pairs_with_the_given_negatives(self, tmp_path):
        pairs = load(write(tmp_path / "x.tsv", ROWS), scorer="cross")
        assert words(pairs[0]) == ["[CLS] w1 w2 [SEP] w3 [SEP]", "[CLS] w1 w2 [SEP] w4 w5 [SEP]"]
        assert pairs[0]["texts"][1]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]

    def test_pairs_with_positives_of_other_anchors(self, tmp_path):
        """Also where nearly all rows have one anchor; anew in every epoch; never one that the anchor has too."""
        rows = [{"a": "w1" if i % 10 else f"w{20 + i // 10}", "b": f"w{i}"} for i in range(50)]
        pairs = load(write(tmp_path / "x.tsv", rows), scorer="cross", cross_negatives=4, seed=3)
        epochs = [[words(pairs[epoch * EPOCH_STRIDE + row]) for row in range(50)] for epoch in (0, 1)]
        drawn = set()
        for row, texts in enumerate(epochs[0]):
            assert texts[0] == f"[CLS] {rows[row]['a']} [SEP] {rows[row]['b']} [SEP]" and len(set(texts)) == 5
            for text in texts[1:]:
                other = int(text.split()[3][1:])
                assert text.split()[1] == rows[row]["a"] != rows[other]["a"]
                drawn.add(other)
        assert len(drawn) > 20 and epochs[0] != epochs[1]
        again = pickle.loads(pickle.dumps(pairs))
        order = draws.permutation(50, seed=1).tolist()
        assert plain([again[row] for row in order]) == plain([pairs[row] for row in order])
        other_seed = load(tmp_path / "x.tsv", scorer="cross", cross_negatives=4, seed=4)
        assert [words(other_seed[row]) for row in range(50)] != epochs[0]

    def test_hard_negatives_make_up_for_equal_anchors(self, tmp_path):
        rows = [{"a": "w1", "b": f"w{i}", "c": "w9"} for i in range(3)]
        assert {example["document"] for example in load(write(tmp_path / "x.tsv", rows))} == {0}

    @pytest.mark.parametrize("scorer", ["bi", "cross"])
    def test_some_of_the_rows(self, tmp_path, scorer):
        rows = [{"a": f"w{i // 2}", "b": f"w{i + 20}"} for i in range(20)]
        pairs = load(write(tmp_path / "x.tsv", rows), scorer=scorer)
        chosen = np.array([7, 2, 3])
        some = pickle.loads(pickle.dumps(pairs.select(chosen)))
        assert len(some) == 3 and some.num_tokens == 6
        for number, row in enumerate(chosen.tolist()):
            assert some[number]["document"] == pairs[row]["document"]
            assert words(some[number])[0] == words(pairs[row])[0]
        given = {f"w{row + 20}" for row in chosen}
        assert {text.split()[-2] for example in some for text in words(example)[1:]} <= given
        for none, message in ((chosen[:0], "selects none of 20"), (chosen[1:], "the same text in all of 2 rows")):
            with pytest.raises(InputError, match=message):
                pairs.select(none)

    def test_it_is_an_epoch_dataset(self, tmp_path):
        pairs = load(write(tmp_path / "x.tsv", ROWS))
        assert EpochDataset.wrap(pairs) is pairs
        example = pairs[2 * EPOCH_STRIDE + 1 + (6 << 64)]
        assert (example["example_id"], example["epoch"], example["order_index"]) == (1, 2, 5)
        with pytest.raises(IndexError):
            pairs[3]
