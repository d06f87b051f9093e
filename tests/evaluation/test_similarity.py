"""Vectors as sentence-transformers computes them, and measures of them that a model which knows nothing cannot pass."""

import csv
import gzip
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, DistilBertConfig, ModernBertConfig, set_seed

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation import similarity
from hf_pretrain.evaluation.similarity import (
    alignment_uniformity,
    read_scored_pairs,
    retrieval_recall,
    similarity_correlation,
    text_vectors,
)
from hf_pretrain.modeling.pooling import SentenceModules

SIZES = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 40, "pad_token_id": 0}
BERT = SIZES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "", "w3 w2 [SEP] w1", "w12 " * 30, "w3 w2 w1"]


def saved(folder, modules, config=None, *, max_length=12):
    """A folder of sentence-transformers with a tiny encoder, saved by the stock classes."""
    set_seed(0)
    model = AutoModel.from_config(BertConfig(**BERT) if config is None else config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    modules.write(folder, hidden_size=16, longest=max_length)
    return model


def vectors(count, width, *, stream):
    """Normal draws, keyed."""
    uniforms = draws.uniforms(draws.row_keys(range(count), seed=0, stream=stream), 2 * width)
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, :width]))
    return (radius * np.cos(2 * np.pi * uniforms[:, width:])).astype(np.float32)


class TestVectors:
    @pytest.mark.parametrize(
        "pooling", [{"pooling_mode": "cls"}, {"pooling_mode": "max"}, {"pooling_mode": ["cls", "mean"]}]
    )
    @pytest.mark.parametrize("normalizes", [False, True])
    @pytest.mark.parametrize("max_length", [12, None])
    def test_they_are_those_of_sentence_transformers(self, pooling, normalizes, max_length, tmp_path):
        modules = SentenceModules(pooling, normalizes)
        saved(tmp_path, modules, max_length=max_length)
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
        read = SentenceModules.read(str(tmp_path))
        assert read is not None and read.max_length == max_length
        found = text_vectors(AutoModel.from_pretrained(tmp_path), theirs.tokenizer, TEXTS, modules=read, batch_size=3)
        expected = theirs.encode(TEXTS, show_progress_bar=False)
        assert found.dtype == np.float32 and found.shape == (len(TEXTS), 16 * len(modules.modes))
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_a_default_prompt_stands_before_each_text(self, tmp_path):
        library = {"prompts": {"query": "w9 w8 "}, "default_prompt_name": "query"}
        model = saved(tmp_path, SentenceModules(library=library))
        theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, show_progress_bar=False)
        read = SentenceModules.read(str(tmp_path))
        np.testing.assert_allclose(text_vectors(model, tiny_tokenizer(), TEXTS, modules=read), theirs, atol=1e-5)
        without = SentenceModules(read.pooling | {"include_prompt": False}, library=library)
        with pytest.raises(InputError, match="include_prompt=false"):
            text_vectors(model, tiny_tokenizer(), TEXTS, modules=without)

    def test_segments_are_those_of_the_tokenizer(self):
        """A model that tells segments apart gets those that the tokenizer gives, one that takes none gets none."""
        set_seed(0)
        tokenizer = tiny_tokenizer()
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer._tokenizer.post_processor = _segment_one()
        model = AutoModel.from_config(BertConfig(**BERT))
        found = text_vectors(model, tokenizer, ["w1 w2", "w3"], modules=SentenceModules())
        inputs = tokenizer("w1 w2", return_tensors="pt")
        assert inputs["token_type_ids"].tolist() == [[1, 1, 1, 1]]
        with torch.no_grad():
            expected = model.eval()(**inputs).last_hidden_state.mean(1)[0]
        np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)
        config = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **SIZES)
        text_vectors(AutoModel.from_config(config), tokenizer, ["w1 w2", "w3"], modules=SentenceModules())

    def test_they_do_not_depend_on_the_batch_the_head_or_dropout(self):
        set_seed(0)
        model = AutoModelForMaskedLM.from_config(BertConfig(**BERT)).train()
        one, all_at_once = (
            text_vectors(model, tiny_tokenizer(), TEXTS, modules=SentenceModules(), batch_size=size)
            for size in (1, 64)
        )
        np.testing.assert_allclose(one, all_at_once, atol=1e-6)
        assert model.training and text_vectors(model, tiny_tokenizer(), [], modules=SentenceModules()).shape == (0, 16)

    def test_length_is_that_of_the_argument_then_of_the_modules_then_of_the_model(self):
        set_seed(0)
        model = AutoModel.from_config(BertConfig(**BERT))
        tokenizer, text = tiny_tokenizer(), "w1 w2 w3 w4 w5 w6 w7 w8"
        modules = SentenceModules(transformer={"max_seq_length": 6})

        def vector(text, modules=modules, **options):
            return text_vectors(model, tokenizer, [text], modules=modules, **options)

        # The separator stays.
        np.testing.assert_allclose(vector(text), vector("w1 w2 w3 w4"), atol=1e-6)
        np.testing.assert_allclose(vector(text, max_length=4), vector("w1 w2"), atol=1e-6)
        longer = vector(text, max_length=40)
        np.testing.assert_allclose(longer, vector(text, SentenceModules()), atol=1e-6)
        assert np.abs(longer - vector(text)).max() > 1e-3
        tokenizer.model_max_length = int(1e30)
        for config in (BertConfig(**BERT), ModernBertConfig(**BERT, cls_token_id=2, sep_token_id=3)):
            text_vectors(AutoModel.from_config(config), tokenizer, ["w1 " * 60], modules=SentenceModules())

    @pytest.mark.parametrize(
        ("texts", "options", "words"),
        [
            ("w1", {}, "texts is one text"),
            (["w1"], {"max_length": 0}, "max_length=0 must be"),
            (["w1"], {"max_length": 41}, "longer than the 40 positions"),
            (["w1"], {"batch_size": 0}, "batch_size=0 must be"),
        ],
    )
    def test_bad_input_is_named(self, texts, options, words):
        model = AutoModel.from_config(BertConfig(**BERT))
        with pytest.raises(InputError, match=words):
            text_vectors(model, tiny_tokenizer(), texts, modules=SentenceModules(), **options)

    def test_a_text_without_a_token_is_refused(self):
        tokenizer = tiny_tokenizer()
        tokenizer._tokenizer.post_processor = _segment_one(specials=False)
        with pytest.raises(InputError, match=r"texts\[1\]='' has no token"):
            text_vectors(AutoModel.from_config(BertConfig(**BERT)), tokenizer, ["w1", ""], modules=SentenceModules())


def _segment_one(*, specials=True):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    single = "[CLS]:1 $A:1 [SEP]:1" if specials else "$A:1"
    ids = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    return TemplateProcessing(single=single, special_tokens=ids)


ROWS = [("A man, who runs.", 'She said "no".', 3.5), ("two\nlines", "w2", 0.0), ("w3", "w4", 5.0)]


def write_table(path, *, header=None, delimiter=",", rows=ROWS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *rows] if header else rows)
    return path


class TestReading:
    @pytest.mark.parametrize("header", [None, ("sentence1", "sentence2", "score")])
    def test_tables_with_and_without_a_header(self, header, tmp_path):
        pairs = read_scored_pairs(write_table(tmp_path / "a.csv", header=header))
        assert list(zip(pairs.first, pairs.second, pairs.scores.tolist(), strict=True)) == ROWS
        assert pairs.scores.dtype == np.float64

    def test_columns_are_found_by_their_names(self, tmp_path):
        path = tmp_path / "glue.tsv.gz"
        text = 'score\tindex\tsentence2\tsentence1\n4.2\t7\tsecond\t"first\n\n1\t8\tb\ta\n'
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
        pairs = read_scored_pairs(path)
        assert (pairs.first, pairs.second, pairs.scores.tolist()) == (['"first', "a"], ["second", "b"], [4.2, 1.0])

    def test_json_lines_with_names_of_ones_own(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(
            "".join(json.dumps({"a": a, "b": b, "s": s, "x": 1}) + "\n" for a, b, s in ROWS) + "\n", encoding="utf-8"
        )
        pairs = read_scored_pairs(path, columns=("a", "b", "s"))
        assert list(zip(pairs.first, pairs.second, pairs.scores.tolist(), strict=True)) == ROWS

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("a.csv", 'a,b,1\n\n"c\nd",e\n', "a.csv, line 3: 2 columns, but 3 are needed"),
            (
                "a.csv",
                "a,b\n",
                "line 1: 2 columns, but 3 are needed: two texts and a score, or a header with sentence1",
            ),
            ("a.csv", "a,b,1\nc,d,high\n", "line 2: score='high' is no number$"),
            ("a.csv", "text1,text2,score\na,b,1\n", "line 1: score='score' is no number; in a header"),
            ("a.csv", "a,b,1\nc,d,nan\n", "line 2: score=nan is no finite number"),
            ("a.csv", "a,b,1\nc, ,2\n", "line 2: ' ' is no text"),
            ("a.csv", 'a,b,1\n"c,d,2\ne,f,3\n', "line 2: .*is a quotation mark missing"),
            ("a.csv", "\n", "has no pair"),
            ("a.csv", "sentence1,sentence2,score\n", "has no pair"),
            ("a.csv", "sentence1,sentence2,score,more\na,b,1\n", "line 2: 3 columns, but 4"),
            ("a.tsv", "a\tb\t1\nc,d,2\n", "line 2: 1 columns, but 3"),
            ("a.jsonl", '\n{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1"\n', "line 3: it is no JSON"),
            ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', "line 1: there is no 'score'"),
            ("a.jsonl", '["a", "b", 1]\n', "line 1: there is no 'sentence1'"),
            (
                "a.jsonl",
                '{"sentence1": "a", "sentence2": "b", "score": "1"}\n',
                "line 1: score='1' is no finite number",
            ),
            ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": true}\n', "line 1: score=True is no finite"),
            ("a.jsonl", '{"sentence1": "a", "sentence2": 3, "score": 1}\n', "line 1: 3 is no text"),
            ("a.txt", "a,b,1\n", "must be a table"),
            ("a.csv.gz", "a,b,1\n", "it is not compressed, as its suffix says"),
        ],
    )
    def test_wrong_files_are_refused_in_one_line_with_its_number(self, name, text, words, tmp_path):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words) as caught:
            read_scored_pairs(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_other_bytes_and_no_file(self, tmp_path):
        (tmp_path / "a.csv").write_bytes("a,b,1\né,d,2\n".encode("latin-1"))
        with pytest.raises(InputError, match="line 2: it is not text in UTF-8"):
            read_scored_pairs(tmp_path / "a.csv")
        with pytest.raises(InputError, match="is no file"):
            read_scored_pairs(tmp_path / "b.csv")


class TestCorrelation:
    def test_it_is_that_of_the_ranks_of_the_cosines(self):
        first, second = vectors(50, 8, stream="first"), 3 * vectors(50, 8, stream="second")
        scores = np.round(2 * first[:, 0] + second[:, 0])
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
        expected = np.corrcoef(rankdata(cosines), rankdata(scores))[0, 1]
        assert similarity_correlation(first, second, scores) == pytest.approx(expected, abs=1e-9)
        # Lengths say nothing, nor does the scale of the scores.
        longer = first * (1 + np.arange(50))[:, None]
        assert similarity_correlation(longer, second, np.exp(scores)) == pytest.approx(expected, abs=1e-9)

    def test_a_constant_encoder_knows_nothing(self):
        same = np.tile(vectors(1, 8, stream="one"), (30, 1))
        same += 1e-9 * vectors(30, 8, stream="rounding")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert similarity_correlation(same, same[::-1], np.arange(30)) == 0
            assert similarity_correlation(np.zeros((30, 8)), same, np.arange(30)) == 0

    @pytest.mark.parametrize(
        ("first", "second", "scores", "words"),
        [
            (np.ones((3, 2)), np.ones((3, 2)), [1, 2], "have the shapes"),
            (np.ones((3, 2)), np.ones((2, 2)), [1, 2, 3], "have the shapes"),
            (np.ones((3, 2)), np.ones((3, 2)), [1, 1, 1], "not all equal"),
            (np.ones((3, 2)), np.ones((3, 2)), [1, 2, math.nan], "must be finite"),
            (np.full((3, 2), math.inf), np.ones((3, 2)), [1, 2, 3], "first must be finite"),
            (np.ones((3, 2)), np.ones(3), [1, 2, 3], "second must be finite numbers of two dimensions"),
        ],
    )
    def test_bad_input_is_named(self, first, second, scores, words):
        with pytest.raises(InputError, match=words):
            similarity_correlation(first, second, scores)


class TestRetrieval:
    def test_it_is_that_of_a_plain_ranking(self, monkeypatch):
        documents = vectors(40, 6, stream="documents")
        relevant = draws.integers(draws.row_keys([0], seed=0, stream="relevant"), 25, high=40)[0]
        queries = 5 * documents[relevant] + 4 * vectors(25, 6, stream="noise")
        ranks = []
        for query, chosen in zip(queries, relevant.tolist(), strict=True):
            nearness = [float(query @ row / np.linalg.norm(row)) for row in documents]
            ranks.append(sorted(nearness, reverse=True).index(nearness[chosen]) + 1)
        assert len(set(ranks)) > 4
        expected = {f"recall_at_{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 3, 40)}
        expected["mrr"] = np.mean([1 / rank for rank in ranks])
        for chunk in (1, 130, 1 << 22):
            monkeypatch.setattr(similarity, "_CHUNK", chunk)
            found = retrieval_recall(queries, documents, relevant, at=(1, 3, 40))
            assert found == pytest.approx(expected) and list(found) == list(expected)

    def test_ties_count_against_the_model(self):
        same = np.tile(vectors(1, 64, stream="one"), (200, 1))
        # What rounding does in another batch.
        same = (same + 1e-8 * vectors(200, 64, stream="rounding")).astype(np.float32)
        for documents in (same, np.zeros_like(same)):
            found = retrieval_recall(same, documents, np.arange(200))
            assert found == {"recall_at_1": 0, "recall_at_10": 0, "mrr": pytest.approx(1 / 200)}
        pairs = np.repeat(vectors(20, 8, stream="pairs"), 2, axis=0)
        assert retrieval_recall(pairs, pairs, np.arange(40), at=(1, 2)) == {
            "recall_at_1": 0,
            "recall_at_2": 1,
            "mrr": 0.5,
        }

    def test_no_large_table_is_made(self, monkeypatch):
        documents = vectors(300, 4, stream="documents")
        seen = []
        count = np.count_nonzero
        monkeypatch.setattr(similarity, "_CHUNK", 3000)
        monkeypatch.setattr(
            np, "count_nonzero", lambda table, **options: seen.append(table.size) or count(table, **options)
        )
        assert retrieval_recall(documents, documents, np.arange(300))["recall_at_1"] == 1
        assert max(seen) <= 3000 and sum(seen) == 300 * 300

    @pytest.mark.parametrize(
        ("relevant", "options", "words"),
        [
            ([0, 1, 4], {}, "numbers of the 4 documents"),
            ([0, -1, 2], {}, "numbers of the 4 documents"),
            ([0.0, 1.0, 2.0], {}, "numbers of the 4 documents"),
            ([0, 1], {}, "have the shapes"),
            ([0, 1, 2], {"at": (0,)}, "at=0 must be"),
        ],
    )
    def test_bad_input_is_named(self, relevant, options, words):
        with pytest.raises(InputError, match=words):
            retrieval_recall(np.eye(4)[:3], np.eye(4), relevant, **options)


class TestAlignmentUniformity:
    def test_they_are_the_definitions_of_the_paper(self, monkeypatch):
        first, second = (torch.from_numpy(3 * vectors(60, 5, stream=name)).double() for name in ("first", "second"))
        left, right = (torch.nn.functional.normalize(side, dim=1) for side in (first, second))
        alignment = (left - right).norm(dim=1).pow(2).mean()
        uniformity = [torch.pdist(side).pow(2).mul(-2).exp().mean().log() for side in (left, right)]
        for chunk in (1, 700, 1 << 22):
            monkeypatch.setattr(similarity, "_CHUNK", chunk)
            found = alignment_uniformity(first.numpy(), second.numpy())
            assert found.alignment == pytest.approx(float(alignment), abs=1e-9)
            assert found.uniformity == pytest.approx(float(sum(uniformity)) / 2, abs=1e-9)

    def test_one_point_and_two_poles(self):
        one = np.ones((5, 3))
        assert alignment_uniformity(one, 2 * one) == pytest.approx((0, 0), abs=1e-12)
        poles = np.array([[1.0, 0], [-1, 0]])
        assert alignment_uniformity(poles, -poles) == pytest.approx((4, -8))

    def test_one_row_has_no_other(self):
        with pytest.raises(InputError, match="two rows or more"):
            alignment_uniformity(np.ones((1, 2)), np.ones((1, 2)))
