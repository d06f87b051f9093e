"""Offsets that are found by the spelling of tokens are those of the tokenizer, and where they cannot be found it says so."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_pretrain.data.documents import documents as module
from hf_pretrain.data.documents import spelling
from hf_pretrain.data.documents.documents import sentence_starts
from hf_pretrain.data.documents.spelling import Spelling, encode_ids, spelling_of
from hf_pretrain.data.documents.tokenizers import train_tokenizer

TEXT = (
    "The cat’s café sat — naïvely — on 3.5 m² of ‘mats’. “Über alles”, it said.\n\n  It was\tThe [MASK] [SEP] end; don't! "
    "the the cats 中文 text\u00a0with\u3000spaces and a so\u00adft hyphen, and a zero\u200bwidth one. \u0130stanbul ΣΑΣ "
)
ODD = "e\u0301 ½ ﬁ ½☃ \x00a\x1cb 한국어 🙂👍🏽 \ufeff ▁x ##y </w> Ġz ไทย "


def bpe(*, suffix=None):
    marks = {} if suffix is None else {"end_of_word_suffix": suffix}
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", **marks))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def trained(backend, trainer_of, **options):
    from tokenizers import trainers

    backend.train_from_iterator(
        [TEXT] * 3, getattr(trainers, trainer_of)(vocab_size=150, show_progress=False, **options)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]")


def byte_level(*, prefix, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return trained(backend, "BpeTrainer", initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace():
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return trained(backend, "UnigramTrainer", unk_token="[UNK]", special_tokens=["[UNK]"])


TOKENIZERS = {
    "wordpiece": lambda: train_tokenizer([TEXT] * 3, kind="wordpiece", vocab_size=400),
    "cased wordpiece": lambda: train_tokenizer([TEXT] * 3, kind="wordpiece", vocab_size=400, lowercase=False),
    "bpe": lambda: train_tokenizer([TEXT] * 3, kind="bpe", vocab_size=400),
    "unigram": lambda: train_tokenizer([TEXT] * 3, kind="unigram", vocab_size=400),
    "word": lambda: train_tokenizer([TEXT] * 3, kind="word", vocab_size=400),
    "bpe of words": lambda: trained(bpe(), "BpeTrainer", special_tokens=["[UNK]"]),
    "bpe with suffix": lambda: trained(
        bpe(suffix="</w>"), "BpeTrainer", end_of_word_suffix="</w>", special_tokens=["[UNK]"]
    ),
    "bytes": lambda: byte_level(prefix=False),
    "bytes with prefix": lambda: byte_level(prefix=True),
    "bytes of NFC": lambda: byte_level(prefix=False, normalizer=normalizers.NFC()),
    "metaspace": metaspace,
    "few letters": lambda: BertTokenizer(
        vocab={t: i for i, t in enumerate(["[UNK]", "[SEP]", "[MASK]", "the", "##s", "cat"])}
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def columns(texts, tokenizer):
    found = module._counted_columns(texts, tokenizer, sentence_starts, None)
    return {**found.rows(), **{name: list(numbers) for name, numbers in found.of_texts.items()}}


def find(known, texts, rows):
    """Where the tokens of each text begin and end; None where it is not found."""
    counts = np.array([len(row) for row in rows])
    starts, ends, is_found = known.find(texts, np.concatenate(rows), counts)
    edges = np.cumsum(counts)[:-1]
    offsets = zip(np.split(starts, edges), np.split(ends, edges), strict=True)
    return [each if right else None for each, right in zip(offsets, is_found, strict=True)]


def rows_of_ids(tokenizer, texts):
    ids, counts = encode_ids(tokenizer, texts)
    return np.split(ids, np.cumsum(counts)[:-1])


def by_the_tokenizer(texts, tokenizer):
    """The columns by the offsets of the tokenizer alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "spelling_of", lambda tokenizer: None)
        return columns(texts, tokenizer)


def check_equal(texts, tokenizer):
    found, expected = columns(texts, tokenizer), by_the_tokenizer(texts, tokenizer)
    for name, rows in expected.items():
        for text, row, other in zip(texts, rows, found[name], strict=True):
            assert np.array_equal(row, other), (name, text)
            assert np.asarray(row).dtype == np.asarray(other).dtype


def test_documents_are_those_of_the_tokenizers_offsets(tokenizer):
    texts = [
        TEXT,
        ODD,
        TEXT + ODD,
        ODD + TEXT,
        "",
        " ",
        "\n",
        "the",
        " the ",
        TEXT[::-1],
        *TEXT.split(),
        *ODD.split(" "),
    ]
    check_equal(texts, tokenizer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.sampled_from(TEXT + ODD + "   \n"), max_size=40), min_size=1, max_size=3))
def test_documents_of_any_text_are_too(texts, tokenizer):
    check_equal(texts, tokenizer)


SHORT = [
    *TEXT.split(),
    *ODD.split(" "),
    "",
    " ",
    "\n",
    "\u0301a e",
    "\u0301",
    "the \xad",
    "\xad",
    "cat ",
    "cat  ",
    " cat",
    "Ġ",
    "[MASK]",
    "[UNK]",
    "The end. The cat",
    "☃",
    "the ☃ cat" + " the cat" * 60,
    "🙂 the ½",
    "中文",
    "a",
]


def test_a_text_has_the_same_columns_whatever_stands_beside_it(tokenizer, monkeypatch):
    check_equal(SHORT, tokenizer)
    monkeypatch.setattr(module, "_JOINED_CHARACTERS", 1)
    alone = columns(SHORT, tokenizer)
    for num_characters, order in ((40, 1), (40, -1), (1 << 15, 1), (1 << 15, -1)):
        monkeypatch.setattr(module, "_JOINED_CHARACTERS", num_characters)
        for name, rows in columns(SHORT[::order], tokenizer).items():
            for text, row, expected in zip(SHORT, rows[::order], alone[name], strict=True):
                assert np.array_equal(row, expected), (name, text)


@pytest.mark.parametrize("name", ["wordpiece", "bpe", "unigram", "metaspace", "bytes with prefix", "bytes of NFC"])
def test_texts_beside_one_that_is_not_found_are_found_as_they_are_alone(name):
    tokenizer = TOKENIZERS[name]()
    texts = [*SHORT, "the cat sat"]
    ids = rows_of_ids(tokenizer, texts)
    (ids[-1],) = rows_of_ids(tokenizer, ["the end sat"])
    known = Spelling(tokenizer)
    together = find(known, texts, ids)
    assert known.tried == sum(map(len, texts))
    assert known.found == sum(len(text) for text, each in zip(texts, together, strict=True) if each is not None)
    assert together[-1] is None and sum(each is not None for each in together) > len(texts) / 3
    for text, row, each in zip(texts, ids, together, strict=True):
        (alone,) = find(Spelling(tokenizer), [text], [row])
        assert (alone is None) == (each is None), text
        assert each is None or all(map(np.array_equal, alone, each)), text


def test_no_texts():
    tokenizer = TOKENIZERS["wordpiece"]()
    assert columns([], tokenizer) == {name: [] for name in columns([], tokenizer)}
    assert [array.tolist() for array in encode_ids(tokenizer, [])] == [[], []]


@pytest.mark.parametrize(
    "name", ["wordpiece", "cased wordpiece", "bpe", "unigram", "bytes", "bytes with prefix", "bytes of NFC"]
)
def test_usual_text_is_found(name):
    """Not only left to the tokenizer, which would be right too."""
    tokenizer = TOKENIZERS[name]()
    text = "The cat’s café sat on 3.5 mats. “Über alles”, it said.\n\nDon't! the  cats"
    (ids,) = rows_of_ids(tokenizer, [text])
    ((starts, ends),) = find(spelling_of(tokenizer), [text], [ids])
    assert len(starts) == len(ends) == len(ids) and (starts[1:] >= starts[:-1]).all()


@pytest.mark.parametrize("word", ["☃☃", "the☃", "☃the"])
def test_a_word_that_is_unknown_is_found_alone(word, monkeypatch):
    tokenizer = TOKENIZERS["wordpiece"]()
    text = f"the cat {word} sat, {word}; the end" + " the cat" * 100
    (ids,) = rows_of_ids(tokenizer, [text])
    assert (ids == tokenizer.unk_token_id).any()
    assert find(Spelling(tokenizer), [text], [ids])[0] is not None
    check_equal([text], tokenizer)


def test_other_ids_than_those_of_the_text_are_not_found(tokenizer):
    texts = [TEXT, TEXT.replace("cat", "mat"), TEXT.replace("the", "he", 1)]
    ids = rows_of_ids(tokenizer, texts)
    known = Spelling(tokenizer)
    for text, other in ((0, 1), (0, 2), (1, 0), (2, 1)):
        if not np.array_equal(ids[text], ids[other]):
            assert find(known, [texts[text]], [ids[other]]) == [None]


def test_it_is_left_alone_where_it_finds_little(monkeypatch):
    tokenizer, texts = TOKENIZERS["few letters"](), ["☃ x y z " * 40] * 4
    monkeypatch.setattr(spelling, "_TRIED", 1000)
    check_equal(texts, tokenizer)
    known = spelling_of(tokenizer)
    assert known.tried > 1000 and not known.is_worth_it
    before = known.tried
    check_equal(texts, tokenizer)
    assert known.tried == before


def test_more_tokens_are_known_at_once():
    tokenizer = TOKENIZERS["wordpiece"]()
    check_equal(["a snow☃man"], tokenizer)
    before = spelling_of(tokenizer)
    tokenizer.add_tokens(["☃"])
    check_equal(["a snow☃man"], tokenizer)
    assert spelling_of(tokenizer) is not before


def test_a_class_that_changes_its_text_is_not_read():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([part.upper() for part in text], *args, **kwargs)

    plain = TOKENIZERS["cased wordpiece"]()
    loud = Shouting(tokenizer_object=plain.backend_tokenizer, unk_token="[UNK]")
    assert spelling_of(plain) is not None and spelling_of(loud) is None


def test_the_state_of_the_tokenizer_is_left_as_it_was():
    tokenizer = TOKENIZERS["wordpiece"]()
    columns(["the [MASK] ☃"], tokenizer)
    assert tokenizer("[MASK]", add_special_tokens=False)["input_ids"] == [tokenizer.mask_token_id]
