"""Tokens with the words and sentences of the text marked on them, for every kind of tokenizer."""

import warnings

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer, T5Tokenizer
from transformers.tokenization_python import PythonBackend

from hf_pretrain.data.documents import documents as module
from hf_pretrain.data.documents.documents import (
    DOCUMENT_FEATURES,
    UnknownCount,
    document_rows,
    one_per_line,
    sentence_starts,
    tokenize_documents,
    tokenize_texts,
)
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.errors import InputError

BERT_VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "##s",
    "sat",
    ".",
    "-",
    "[",
    "]",
    "sep",
    "mask",
    "中",
    "文",
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# In every one of the tokenizers below, "cats" is "cat" + "s".
TEXT = " the cats-sat. The  cats\nsat 中文 the."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def bert():
    return BertTokenizer(vocab={token: i for i, token in enumerate(BERT_VOCAB)}, do_lower_case=True)


def byte_level(*, trim_offsets):
    words = ["the", "The", "cat", "sat"]
    merges = [
        (a, b)
        for word in [*("Ġ" + w for w in words), *words]
        for a, b in [(word[:i], word[i]) for i in range(1, len(word))]
    ]
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES]
    vocab += list(dict.fromkeys(a + b for a, b in merges))
    return RobertaTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=merges, trim_offsets=trim_offsets)


def unigram(vocab=(), *, pre_tokenizer=None):
    pieces = ["▁the", "▁The", "▁cat", "▁sat", "sat", "cat", "s", "▁", ".", "-", "中", "文", *vocab]
    specials = ["<pad>", "<unk>", "</s>"]
    backend = Tokenizer(
        models.Unigram([*((t, 0.0) for t in specials), *((p, -float(10 - len(p))) for p in pieces)], unk_id=1)
    )
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def realised(text, tokenizer, column="word_starts", **options):
    """The text from each marked token to the next, without the white space around it."""
    columns = tokenize_texts([text], tokenizer, **options)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    assert columns["input_ids"][0].tolist() == encoding["input_ids"]
    marked = [start for (start, _), flag in zip(encoding["offset_mapping"], columns[column][0], strict=True) if flag]
    return [text[a:b].strip() for a, b in zip(marked, [*marked[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    "tokenizer",
    [
        bert(),
        byte_level(trim_offsets=True),
        byte_level(trim_offsets=False),
        unigram(),
        unigram(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
        unigram(pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
    ],
    ids=["wordpiece", "byte-level", "byte-level untrimmed", "unigram", "unigram no prefix", "unigram unsplit"],
)
def test_words_and_sentences_do_not_depend_on_the_tokenizer(tokenizer):
    words = ["the", "cats", "-", "sat", ".", "The", "cats", "sat", "中", "文", "the", "."]
    assert realised(TEXT, tokenizer) == words
    assert realised(TEXT, tokenizer, "sent_starts") == ["the cats-sat.", "The  cats\nsat 中文 the."]
    by_line = realised(TEXT, tokenizer, "sent_starts", sentence_splitter=one_per_line)
    assert by_line == ["the cats-sat. The  cats", "sat 中文 the."]
    pair = realised(TEXT, tokenizer, word_segmenter=lambda run: [run])
    assert pair == [*words[:8], "中文", *words[10:]]


def test_columns_have_their_types_and_lengths():
    columns = tokenize_texts([TEXT, " \n", "the"], bert())
    assert [len(ids) for ids in columns["input_ids"]] == [14, 0, 1]
    for name, kind in (("input_ids", np.int32), ("word_starts", np.bool_), ("sent_starts", np.bool_)):
        assert [row.dtype for row in columns[name]] == [kind] * 3
        assert [len(row) for row in columns[name]] == [14, 0, 1]
    assert all(columns[name][row][0] for name in ("word_starts", "sent_starts") for row in (0, 2))


def test_tokens_of_one_character_are_one_word():
    tokenizer = byte_level(trim_offsets=True)
    columns = tokenize_texts(["é中 😀x"], tokenizer)
    # é: 2 bytes, 中: 3, the space and the emoji: 1 + 4, x: 1.
    expected = [1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert columns["word_starts"][0].astype(int).tolist() == expected


def test_token_over_two_words_belongs_to_its_first():
    tokenizer = unigram(["▁the▁cat"], pre_tokenizer=pre_tokenizers.Metaspace(split=False))
    assert tokenizer.tokenize("the cats") == ["▁the▁cat", "s"]
    # "s" lies in the second word, the token before it in the first.
    assert tokenize_texts(["the cats"], tokenizer)["word_starts"][0].tolist() == [True, True]


def test_lone_white_space_goes_with_what_follows():
    tokenizer = unigram()
    assert tokenizer.tokenize("cat .") == ["▁cat", "▁", "."]
    assert tokenize_texts(["cat ."], tokenizer)["word_starts"][0].tolist() == [True, True, False]
    trailing = byte_level(trim_offsets=True)
    assert tokenize_texts([" \n cat \n"], trailing)["word_starts"][0].tolist() == [True, *[False] * 4]


@pytest.mark.parametrize(
    "make", [bert, lambda: byte_level(trim_offsets=True), unigram], ids=["bert", "byte-level", "unigram"]
)
def test_names_of_special_tokens_are_text(make):
    tokenizer = make()
    name = tokenizer.sep_token or tokenizer.eos_token
    text = f"the {name} cat {name}{name}"
    columns = tokenize_texts([text, "the cat"], tokenizer)
    # The caller's tokenizer still knows them, its backend too.
    backend_ids = {*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids}
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    assert not special & {*columns["input_ids"][0].tolist()}
    assert columns["input_ids"][1].tolist() == tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert backend_ids & special
    assert {*tokenizer(text)["input_ids"]} & special


def test_model_that_finds_the_name_in_its_vocabulary():
    """split_special_tokens keeps the name from being cut out before, not the model from choosing it."""
    tokenizer = unigram(["<", "/", ">"])
    assert (
        tokenizer.eos_token_id
        in tokenizer("the</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )
    columns = tokenize_texts(["cat", "the</s> cat </s></s>"], tokenizer)
    ids, words = columns["input_ids"][1].tolist(), columns["word_starts"][1].tolist()
    assert tokenizer.eos_token_id not in ids
    tokens = [t.strip("▁") for t in tokenizer.convert_ids_to_tokens(ids)]
    assert "".join(tokens) == "the</s>cat</s></s>"
    marked = "".join(("|" if w else "") + t for t, w in zip(tokens, words, strict=True))
    assert marked == "|the|<|/|s|>|cat|<|/|s|>|<|/|s|>"


def test_long_text_is_tokenized_in_pieces(monkeypatch):
    text = "\n".join([TEXT] * 50)
    for tokenizer in (bert(), byte_level(trim_offsets=False)):
        whole = tokenize_texts(["the", text, "cats"], tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_PIECE_CHARACTERS", 100)
            patch.setattr(module, "_GROUP_CHARACTERS", 250)
            pieces = tokenize_texts(["the", text, "cats"], tokenizer)
        for name in whole:
            assert all(np.array_equal(a, b) for a, b in zip(whole[name], pieces[name], strict=True))


def test_pieces_without_white_space_end_somewhere(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 10)
    ids = tokenize_texts(["中" * 95], bert())["input_ids"][0]
    assert ids.tolist() == [BERT_VOCAB.index("中")] * 95


def test_no_warning_about_length(recwarn, caplog):
    tokenizer = bert()
    tokenizer.model_max_length = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        columns = tokenize_texts(["the cat " * 10], tokenizer)
    assert len(columns["input_ids"][0]) == 20
    assert not caplog.records


def test_tokenizer_without_offsets_is_refused():
    class Slow(PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(InputError, match="Slow gives no character offsets"):
        tokenize_texts(["a"], Slow())


class TestDocuments:
    @pytest.fixture
    def texts(self, tmp_path):
        rows = ["the cat.", " \n", *(f"the cat{'s' * (i % 3)} sat. The cat." for i in range(30)), "", None, "sat"]
        dataset = datasets.Dataset.from_dict({"text": rows, "url": ["u"] * len(rows)})
        dataset.save_to_disk(tmp_path / "texts")
        return datasets.load_from_disk(tmp_path / "texts")

    @pytest.mark.parametrize("num_proc", [None, 3])
    @pytest.mark.parametrize("batch_size", [1, 7, 256])
    def test_schema_order_and_numbers(self, texts, num_proc, batch_size):
        documents = tokenize_documents(texts, bert(), num_proc=num_proc, batch_size=batch_size)
        assert documents.features == DOCUMENT_FEATURES
        assert documents.column_names == list(DOCUMENT_FEATURES)
        schema = documents.data.table.schema
        assert [str(schema.field(name).type) for name in documents.column_names] == [
            *("list<item: int32>", "list<item: bool>", "list<item: bool>"),
            "int64",
        ]
        assert documents["doc_id"][:] == list(range(32))
        columns = tokenize_texts([text for text in texts["text"] if text and text.strip()], bert())
        for name, rows in columns.items():
            assert documents[name][:] == [row.tolist() for row in rows]

    def test_numbers_are_those_of_the_rows_where_none_is_dropped(self, texts):
        full = texts.filter(lambda row: bool(row["text"] and row["text"].strip()))
        documents = tokenize_documents(full, bert(), num_proc=2)
        assert documents["doc_id"][:] == list(range(32))
        assert documents.cache_files

    def test_selection_of_rows(self, texts):
        documents = tokenize_documents(texts.select([34, 5, 1, 0]), bert())
        assert documents["doc_id"][:] == [0, 1, 2]
        assert [len(ids) for ids in documents["input_ids"]] == [1, 7, 3]

    def test_language_is_kept(self, texts):
        languages = ["en", "fr"] * 17 + [None]
        documents = tokenize_documents(texts.add_column("lang", languages), bert())
        kept = [lang for lang, text in zip(languages, texts["text"], strict=True) if text and text.strip()]
        assert documents["lang"][:] == kept
        assert documents.features["lang"] == datasets.Value("string")

    def test_cache_follows_what_decides_the_tokens(self, texts, monkeypatch):
        tokenizer = bert()
        first = tokenize_documents(texts, tokenizer)
        tokenizer(["the cat", "sat"], padding=True, truncation=True, max_length=3)
        calls = []
        original = module._counted_columns
        monkeypatch.setattr(module, "_counted_columns", lambda *a, **k: calls.append(1) or original(*a, **k))
        assert tokenize_documents(texts, tokenizer)["input_ids"][:] == first["input_ids"][:]
        assert not calls
        other = bert()
        other.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        assert tokenize_documents(texts, other)["input_ids"][:] != first["input_ids"][:]
        by_line = tokenize_documents(texts, tokenizer, sentence_splitter=one_per_line)
        assert by_line["sent_starts"][:] != first["sent_starts"][:]

    def test_bad_input(self, texts):
        with pytest.raises(InputError, match="'text'"):
            tokenize_documents(texts.rename_column("text", "body"), bert())
        with pytest.raises(InputError, match="no tokens in 2 rows"):
            tokenize_documents(texts.select([1, 32]), bert())


def test_real_t5_style_prefix_is_no_word_of_its_own():
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁b", -1.0)], extra_ids=0
    )
    assert tokenizer.tokenize("a b") == ["▁", "a", "▁b"]
    assert tokenize_texts(["a b"], tokenizer)["word_starts"][0].tolist() == [True, False, True]


def test_untrimmed_processor_really_includes_the_space():
    """Guards the test above it: without the space in the offsets it would prove nothing."""
    tokenizer = byte_level(trim_offsets=False)
    assert isinstance(tokenizer.backend_tokenizer.post_processor, processors.RobertaProcessing)
    assert tokenizer("the cat", return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"][1] == (3, 7)


def count(texts, tokenizer):
    unknown = UnknownCount()
    tokenize_texts(texts, tokenizer, unknown=unknown)
    return unknown


class TestUnknown:
    def test_characters_are_counted_not_tokens(self):
        # 4 + 3 letters of "cats" and "the" are known; one token stands for the 12 letters of "unknownwords".
        unknown = count(["the cats \u200b", "unknownwords  the"], bert())
        assert (unknown.characters, unknown.unknown_characters, unknown.unknown_tokens) == (22, 12, 1)
        assert unknown.share == 12 / 22 and unknown.tokens == 5

    def test_a_text_that_is_one_unknown_token_is_wholly_unknown(self):
        assert count(["x" * 400, "y" * 3000], bert()).share == 1

    def test_what_is_dropped_without_a_token_is_unknown(self):
        backend = Tokenizer(models.BPE({"a": 0, "b": 1, "é": 2}, []))
        assert count(["ab é", "abc中中"], PreTrainedTokenizerFast(tokenizer_object=backend)).share == 3 / 8

    def test_bytes_accents_and_control_characters_are_not_unknown(self):
        byte_level = train_tokenizer(["plain text"], kind="bpe", vocab_size=270)
        assert count(["é中 😀 हिन्दी \x00\u200d"], byte_level).share == 0
        assert count(["the\u0301 ca\u0301ts"], bert()).share == 0

    def test_one_huge_document_does_not_outweigh_the_others(self):
        unknown = count(["the cats"] * 500 + ["x" * 100_000], bert())
        assert unknown.unknown_characters / unknown.characters > 0.9
        assert unknown.share == pytest.approx(1000 / (1000 + 500 * 7))

    def test_documents_that_are_found_again_tell_it_too(self, tmp_path):
        texts = datasets.Dataset.from_dict({"text": ["the cats", "unknownwords", None, "\u200b", "cats xy"]})
        texts.save_to_disk(tmp_path / "texts")
        texts = datasets.load_from_disk(tmp_path / "texts")
        expected = count(["the cats", "unknownwords", "cats xy"], bert())
        for _ in range(2):
            unknown = UnknownCount()
            documents = tokenize_documents(texts, bert(), unknown=unknown)
            assert unknown == expected and documents.column_names == list(DOCUMENT_FEATURES)

    def test_texts_that_vanish_are_counted(self):
        backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        texts, unknown = datasets.Dataset.from_dict({"text": ["ab", "中文", "a", " "]}), UnknownCount()
        documents = tokenize_documents(texts, PreTrainedTokenizerFast(tokenizer_object=backend), unknown=unknown)
        assert documents["input_ids"][:] == [[0, 1], [0]] and documents["doc_id"][:] == [0, 1]
        assert (unknown.unknown_characters, unknown.characters) == (2, 5)


def pairs_of_characters(run):
    return [run[k : k + 2] for k in range(0, len(run), 2)]


def test_a_segmenter_reaches_every_kind_of_tokenizer_and_process(tmp_path):
    texts = datasets.Dataset.from_dict({"text": ["自然语言处理", "人工智能，语言"] * 20})
    for kind in ("wordpiece", "bpe", "unigram"):
        tokenizer = train_tokenizer(texts["text"], kind=kind, vocab_size=500)
        starts = {}
        for num_proc, segmenter in ((None, None), (None, pairs_of_characters), (2, pairs_of_characters)):
            documents = tokenize_documents(texts, tokenizer, word_segmenter=segmenter, num_proc=num_proc)
            starts[num_proc, segmenter is None] = [sum(row) for row in documents["word_starts"]]
        assert starts[None, True][:2] == [6, 7] and starts[None, False][:2] == [3, 4]
        assert starts[2, False] == starts[None, False]


@settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(st.text(st.characters(), max_size=30), min_size=1, max_size=4))
def test_tokenizing_any_text_never_raises(texts, any_kind):
    columns = tokenize_texts(texts, any_kind, word_segmenter=pairs_of_characters)
    for name, rows in columns.items():
        assert [len(row) for row in rows] == [len(row) for row in columns["input_ids"]], name
    for row in range(len(texts)):
        # What begins a document begins a word and a sentence.
        assert all(columns[name][row][0] for name in ("word_starts", "sent_starts") if len(columns[name][row]))


SENTENCES = [
    "1. The cat. 12. The",
    " the cat. mr. sat b. The",
    "\n the. Cat",
    "The cat.\n",
    "the cat. ",
    "。the。",
    "THE CAT. the cat",
    "mr",
    ". The",
    '."',
    "” The",
    "\v.\n\n",
    "the\n",
    "12",
    "",
    " ",
]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.sampled_from(SENTENCES) | st.text("Aa1. \n\v。”\u200b", max_size=6), min_size=2, max_size=6))
def test_sentences_of_joined_texts_are_those_of_each(texts):
    tokenizer = train_tokenizer(["a b"], kind="bpe", vocab_size=270)
    joined = tokenize_texts(texts, tokenizer)
    apart = tokenize_texts(texts, tokenizer, sentence_splitter=lambda text: sentence_starts(text))
    for text, row, expected in zip(texts, joined["sent_starts"], apart["sent_starts"], strict=True):
        assert row.tolist() == expected.tolist(), text


def test_only_the_text_with_a_name_is_tokenized_again(monkeypatch):
    tokenizer, calls = unigram(["<", "/", ">"]), []
    original = module._encode
    monkeypatch.setattr(
        module, "_encode", lambda texts, *others: calls.append(list(texts)) or original(texts, *others)
    )
    columns = tokenize_texts(["cat", "the</s>", "sat", "</s> cats"], tokenizer)
    assert calls[0] == ["cat", "the</s>", "sat", "</s> cats"] and calls[1:] == [["the<", "/s>", "<", "/s> cats"]]
    tokens = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in columns["input_ids"]]
    assert [[token.strip("▁") for token in row if token != "▁"] for row in tokens] == [
        ["cat"],
        ["the", "<", "/", "s", ">"],
        ["sat"],
        ["<", "/", "s", ">", "cat", "s"],
    ]


def test_rows_for_a_shard_are_those_of_documents():
    texts, unknown = ["the cat. The xyz", None, "\u200b", "sat", "the " * 5000, "\ud83d the"], UnknownCount()
    table = document_rows(texts, bert(), unknown=unknown)
    columns = tokenize_texts([text or "" for text in texts], bert(), unknown=(expected := UnknownCount()))
    kept = [row for row in range(len(texts)) if len(columns["input_ids"][row])]
    assert table.column_names == list(columns) and kept == [0, 3, 4, 5]
    for name, rows in columns.items():
        assert table[name].to_pylist() == [rows[row].tolist() for row in kept]
    assert unknown == expected and unknown.unknown_characters == 3


def test_halves_of_surrogate_pairs_are_text_or_replaced():
    tokenizer = train_tokenizer(["a b 😀"], kind="bpe", vocab_size=270)
    whole, halves, alone = tokenize_texts(["a 😀", "a \ud83d\ude00", "a \ud83d"], tokenizer)["input_ids"]
    assert halves.tolist() == whole.tolist() and tokenizer.decode(alone) == "a \ufffd"


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def any_kind(request):
    return train_tokenizer([TEXT, "中文 हिन्दी é"] * 3, kind=request.param, vocab_size=420)
