"""Words come from the text by BERT's rule."""

import pickle
import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers

from hf_pretrain.data.documents import words as words_module
from hf_pretrain.data.documents.words import SPACE, NamedSegmenter, character_kinds, next_visible, word_starts
from hf_pretrain.errors import InputError


def words(text, **options):
    starts = word_starts(text, **options).tolist()
    return [text[a:b].rstrip() for a, b in zip(starts, [*starts[1:], len(text)], strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("state-of-the-art", ["state", "-", "of", "-", "the", "-", "art"]),
        ("novel, really", ["novel", ",", "really"]),
        ("  two\t\n spaces  ", ["two", "spaces"]),
        ("don't pay $5 a_b", ["don", "'", "t", "pay", "$", "5", "a", "_", "b"]),
        ("a<b c|d x^2 ~e `f` 1+1=2", [*"a<b", *"c|d", *"x^2", *"~e", *"`f`", *"1+1=2"]),
        ("€5 a→b", ["€5", "a→b"]),
        ("“naïve”…", ["“", "naïve", "”", "…"]),
        ("中文字abc中", ["中", "文", "字", "abc", "中"]),
        ("カナ漢字かな", ["カナ", "漢", "字", "かな"]),
        ("全角，句。", ["全", "角", "，", "句", "。"]),
        ("\U00020000\U0002a6d6x", ["\U00020000", "\U0002a6d6", "x"]),
        ("𝒳y 😀", ["𝒳y", "😀"]),
        ("", []),
        (" \n\u3000\xa0", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_a_mark_stays_with_its_letter():
    assert words("cafe\u0301s e\u0301") == ["cafe\u0301s", "e\u0301"]
    # After a lone character it belongs to that one, and what follows is a new word.
    assert words("中\u0308x!\u0308\u0301y") == ["中\u0308", "x", "!\u0308\u0301", "y"]
    # After a space it has no base: it is a letter then.
    assert words("a \u0301b \u0301\u0302c") == ["a", "\u0301b", "\u0301\u0302c"]


def test_characters_that_bert_deletes_change_nothing():
    text = "state-of 中文 ab\tc"
    for ignored in "\0\x01\u200d\u200b\ufeff\ue000\ufffd":
        noisy = ignored + ignored.join(text) + ignored
        kept = [i for i, c in enumerate(noisy) if c != ignored]
        assert word_starts(noisy).tolist() == np.array(kept)[word_starts(text)].tolist()


def test_agrees_with_berts_pipeline_on_every_character():
    """Every character between two letters: does BERT make 1, 2 or 3 words of it? Unicode has grown since its tables."""
    normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    different = []
    for point in [*range(0xD800), *range(0xE000, 0x3000), *range(0xF900, 0x10000), *range(0x1F300, 0x1F700)]:
        character = chr(point)
        pieces = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(f"a{character}b"))
        if len(pieces) != len(word_starts(f"a{character}b")):
            different.append(character)
    # BERT deletes these two of C0 and NEL, which separate lines; all others are younger punctuation.
    assert set("\v\f\x85") <= set(different)
    assert all(unicodedata.category(c)[0] in "PC" or c == "\u166d" for c in different)
    assert len(different) < 60


def test_segmenter_cuts_runs_only():
    seen = []

    def pairs(run):
        seen.append(run)
        return [run[i : i + 2] for i in range(0, len(run), 2)]

    assert words("我爱北京天安门 abc漢字カナx, y", segmenter=pairs) == [
        *("我爱", "北京", "天安", "门"),
        *("abc", "漢字", "カナ", "x", ",", "y"),
    ]
    assert seen == ["我爱北京天安门", "漢字カナ"]
    assert words("no run", segmenter=pairs) == ["no", "run"]


def test_segmenter_gets_other_scripts_without_spaces():
    text = "ภาษาไทย 12 ກິນເຂົ້າ, abc မြန်မာ"

    def halves(run):
        return [run[:3], "", run[3:], ""]

    assert words(text, segmenter=halves) == ["ภาษ", "าไทย", "12", "ກິນ", "ເຂົ້າ", ",", "abc", "မြန", "်မာ"]


def loses(run):
    return [run[0]]


def fails(run):
    raise ValueError("no\ndictionary")


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [(loses, "turned"), (lambda run: [1], "strings"), (lambda run: None, "fails"), (fails, "fails")],
)
def test_a_wrong_segmenter_is_refused_by_name(segmenter, message):
    with pytest.raises(InputError, match=f"word_segmenter='.*{segmenter.__name__.strip('<>')}.*{message}") as error:
        word_starts("中文", segmenter=segmenter)
    assert "\n" not in str(error.value)


def test_a_segmenter_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_words.py").write_text("def halves(run):\n    return [run[:1], run[1:]]\nnumber = 5\n")
    monkeypatch.chdir(tmp_path)
    segmenter = pickle.loads(pickle.dumps(NamedSegmenter("my_words:halves")))
    assert words("中文字", segmenter=segmenter) == ["中", "文字"]
    for name in ("my_words:none", "my_words:number", "my_words", "no.such:function", "", ":", "json:"):
        with pytest.raises(InputError, match=f"word_segmenter='{name}'") as error:
            NamedSegmenter(name)
        assert "\n" not in str(error.value)


def test_jieba_finds_chinese_words(monkeypatch):
    assert words("我们训练语言模型。", segmenter=NamedSegmenter("jieba")) == ["我们", "训练", "语言", "模型", "。"]
    words_module._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match=r"pip install 'hf-pretrain\[chinese\]'"):
        NamedSegmenter("jieba")


def test_next_visible():
    text = " ab \u200d \u200bc d  "
    kinds = character_kinds(text)
    expected = [
        next((j for j in range(i, len(text)) if not text[j].isspace() and text[j] not in "\u200d\u200b"), len(text))
        for i in range(len(text) + 1)
    ]
    assert next_visible(kinds, np.arange(len(text) + 1)).tolist() == expected
    assert next_visible(character_kinds("  "), np.array([0, 1, 2])).tolist() == [2, 2, 2]
    assert next_visible(character_kinds(""), np.array([0])).tolist() == [0]


def test_kinds_of_white_space_are_those_of_unicode():
    spaces = {chr(i) for i in range(0x3001) if character_kinds(chr(i))[0] == SPACE}
    assert spaces == {chr(i) for i in range(0x3001) if chr(i).isspace()} - set("\x1c\x1d\x1e\x1f")
