"""Words of a corpus against a plain count of the tokenizer's words, and folders that are refused."""

import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from hf_pretrain.errors import InputError
from hf_pretrain.vectors import corpus as module
from hf_pretrain.vectors.corpus import SPECIAL_WORDS, WordCorpus, word_tokenizer

TEXTS = [
    "The cat sat.\nThe dog sat on the cat!\n\n  \nA zebra",
    "",
    "Straße, Müller's 3,5 don’t --- ...\n",
    "हिन्दी में लिखा है, हिन्दी\nภาษาไทย ภาษาไทย",
    "我爱北京 我abc\nİstanbul e\u0301te \u00e9te",
    "soft\u00adhyphen a\u200bb nul\x00l form\x0cfeed sep\x1carated nel\x85here \ufeffbom",
]


def plain_words(text, *, lowercase=True):
    tokenizer = word_tokenizer((), lowercase=lowercase)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def built(folder, texts=TEXTS, **options):
    return WordCorpus.build(lambda: iter(texts), folder=folder, **{"min_count": 1} | options)


def lines_of(corpus):
    words = np.array([*corpus.vocabulary.words, ""], dtype=object)
    return [
        words[corpus.tokens[low:high]].tolist() for low, high in zip(corpus.lines[:-1], corpus.lines[1:], strict=True)
    ]


class TestWords:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("Straße, Müller's 3,5", ["straße", ",", "müller", "'", "s", "3", ",", "5"]),
            ("हिन्दी में", ["हिन्दी", "में"]),
            ("ภาษาไทย สวย", ["ภาษาไทย", "สวย"]),
            ("我爱 北京abc", ["我", "爱", "北", "京", "abc"]),
            ("字\ufe00x ❤\ufe0f", ["字", "x", "❤"]),
            ("e\u0301te", ["\u00e9te"]),
            ("می\u200cخواهم", ["می\u200cخواهم"]),
            ("--- 12", ["-", "-", "-", "12"]),
            ("a\u200bb so\u00adft x\x0cy p\x1cq\ufeff", ["a", "b", "soft", "x", "y", "pq"]),
            ("[UNK] [PAD]", ["[", "unk", "]", "[", "pad", "]"]),
        ],
    )
    def test_a_word_is_what_the_docstring_says(self, text, words, tmp_path):
        assert plain_words(text) == words
        assert lines_of(built(tmp_path / "corpus", [text])) == [words]

    def test_the_case_stays_if_it_is_asked_to(self, tmp_path):
        corpus = built(tmp_path / "corpus", ["The the THE"], lowercase=False)
        assert corpus.vocabulary.words == ("THE", "The", "the")
        assert corpus.tokenizer.encode("THE tHE the").ids == [2, 1, 4]


class TestBuild:
    @pytest.mark.parametrize("min_count", [1, 2, 3])
    @pytest.mark.parametrize("pieces", [1, 7, 1 << 18])
    @pytest.mark.parametrize("ids", [1, 9, 1 << 22])
    def test_it_is_a_plain_count(self, min_count, pieces, ids, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_CHARACTERS", pieces)
        monkeypatch.setattr(module, "_CUT", min(pieces, 500))
        monkeypatch.setattr(module, "_KNOWN_PIECES", pieces)
        monkeypatch.setattr(module, "_IDS", ids)
        corpus = built(tmp_path / "corpus", min_count=min_count)
        lines = [[plain_words(line) for line in text.split("\n")] for text in TEXTS]
        counts = Counter(word for document in lines for line in document for word in line)
        words = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        vocabulary = corpus.vocabulary
        assert vocabulary.words == tuple(words)
        assert vocabulary.counts.tolist() == [counts[word] for word in words]
        assert vocabulary.total == sum(counts.values())
        assert vocabulary.documents == len(TEXTS)
        kept = [[[word for word in line if word in set(words)] for line in document] for document in lines]
        assert vocabulary.document_counts.tolist() == [
            sum(any(word in line for line in document) for document in kept) for word in words
        ]
        assert lines_of(corpus) == [line for document in kept for line in document if line]
        assert np.diff(corpus.documents).tolist() == [sum(map(len, document)) for document in kept]
        assert all(vocabulary.words[number] == word for word, number in vocabulary.ids.items())
        assert (corpus.tokens.dtype, corpus.lines.dtype, corpus.documents.dtype) == (np.int32, np.int64, np.int64)
        assert isinstance(corpus.tokens, np.memmap)

    def test_its_tokenizer_gives_the_same_ids(self, tmp_path):
        corpus = built(tmp_path / "corpus", min_count=2)
        tokenizer = pickle.loads(pickle.dumps(corpus.tokenizer))
        assert [tokenizer.id_to_token(number) for number in (0, 1)] == list(SPECIAL_WORDS)
        for number, text in enumerate(TEXTS):
            ids = np.array(tokenizer.encode(text).ids, dtype=np.int64) - 2
            low, high = corpus.documents[number : number + 2]
            assert ids[ids >= 0].tolist() == corpus.tokens[low:high].tolist()

    def test_the_most_frequent_words_are_kept(self, tmp_path):
        corpus = built(tmp_path / "corpus", ["b a b c a d"], max_words=3)
        assert corpus.vocabulary.words == ("a", "b", "c")
        assert corpus.vocabulary.counts.tolist() == [2, 2, 1]
        assert (corpus.vocabulary.total, len(corpus.tokens)) == (6, 5)

    def test_it_is_the_same_when_opened_and_when_built_in_memory(self, tmp_path):
        first = built(tmp_path / "corpus", min_count=2)
        second = WordCorpus.open(tmp_path / "corpus")
        words = [[plain_words(line) for line in text.split("\n")] for text in TEXTS]
        third = WordCorpus.from_words(words, min_count=2)
        for other in (second, third):
            assert other.vocabulary.words == first.vocabulary.words
            for name in ("counts", "document_counts"):
                np.testing.assert_array_equal(getattr(other.vocabulary, name), getattr(first.vocabulary, name))
            for name in ("tokens", "lines", "documents"):
                np.testing.assert_array_equal(getattr(other, name), getattr(first, name))
            assert (other.vocabulary.total, other.vocabulary.documents) == (first.vocabulary.total, len(TEXTS))

    def test_a_huge_line_and_half_of_a_surrogate_pair_pass(self, tmp_path):
        corpus = built(tmp_path / "corpus", ["word " * 300_000 + "\ud800 end"])
        assert corpus.lines.tolist() == [0, len(corpus.tokens)]
        assert corpus.vocabulary.counts[0] == 300_000

    def test_the_folder_holds_no_more_than_the_corpus(self, tmp_path):
        built(tmp_path / "corpus")
        names = {path.name for path in (tmp_path / "corpus").iterdir()}
        arrays = {f"{name}.npy" for name in ("tokens", "lines", "documents", "counts", "document_counts")}
        assert names == arrays | {"tokenizer.json", "complete.json"}
        assert Tokenizer.from_file(str(tmp_path / "corpus" / "tokenizer.json")).encode("cat").ids[0] > 1


class TestRefusals:
    @pytest.mark.parametrize("texts", [[], ["", " \n\t"], ["\x00\ufeff"]])
    def test_no_text(self, texts, tmp_path):
        with pytest.raises(InputError, match="no word"):
            built(tmp_path / "corpus", texts)
        built(tmp_path / "corpus", ["then there is one"])

    def test_no_word_that_is_frequent_enough(self, tmp_path):
        with pytest.raises(InputError, match=r"min_count=4.*min_count=3 "):
            built(tmp_path / "corpus", ["a a a b"], min_count=4)
        assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["complete.json.part"]
        assert len(built(tmp_path / "corpus", ["a a a b"], min_count=3).vocabulary) == 1
        with pytest.raises(InputError, match="min_count=2"):
            WordCorpus.from_words([[["a"]]], min_count=2)

    @pytest.mark.parametrize("option", [{"min_count": 0}, {"max_words": 0}])
    def test_numbers_out_of_range(self, option, tmp_path):
        with pytest.raises(InputError, match=next(iter(option))):
            built(tmp_path / "corpus", **option)

    def test_what_is_no_text(self, tmp_path):
        with pytest.raises(InputError, match="NoneType"):
            built(tmp_path / "corpus", ["a", None])

    def test_a_folder_with_something_else(self, tmp_path):
        built(tmp_path / "corpus")
        with pytest.raises(InputError, match="another corpus"):
            built(tmp_path / "corpus")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("all")
        for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
            with pytest.raises(InputError, match="new"):
                built(folder)
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "all"

    def test_the_tokenizers_own_words(self):
        with pytest.raises(InputError, match=r"\[UNK\]"):
            WordCorpus.from_words([[["a", "[UNK]"]]])

    @pytest.mark.parametrize("damage", ["missing", "short", "id", "bounds", "tokenizer", "marker"])
    def test_a_damaged_folder(self, damage, tmp_path):
        built(tmp_path / "corpus")
        folder = shutil.copytree(tmp_path / "corpus", tmp_path / "copy")
        tokens = folder / "tokens.npy"
        if damage == "missing":
            (folder / "lines.npy").unlink()
        elif damage == "short":
            tokens.write_bytes(tokens.read_bytes()[:-3])
        elif damage == "id":
            tokens.write_bytes(tokens.read_bytes()[:-4] + (1 << 20).to_bytes(4, "little"))
        elif damage == "bounds":
            path = folder / "lines.npy"
            path.write_bytes(path.read_bytes()[:-8] + (3).to_bytes(8, "little"))
        elif damage == "tokenizer":
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace("WordLevel", "WordLeve1"))
        else:
            path = folder / "complete.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
        with pytest.raises(InputError, match="copy") as caught:
            WordCorpus.open(folder)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="holds no"):
            WordCorpus.open(tmp_path / "none")
