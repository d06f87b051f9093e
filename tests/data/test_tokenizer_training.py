"""Tokenizers that we train: words, determinism, files, special tokens."""

import hashlib
import json
import string
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_pretrain.data import draws
from hf_pretrain.data.documents import tokenizers as tokenizer_training
from hf_pretrain.data.documents.documents import tokenize_texts
from hf_pretrain.data.documents.tokenizers import (
    _LearnedTexts,
    _too_long,
    check_tokenizer,
    choose_tokenizer,
    train_tokenizer,
)
from hf_pretrain.data.documents.words import character_kinds, next_visible, word_starts
from hf_pretrain.errors import InputError

KINDS = ["wordpiece", "bpe", "unigram"]
SUBJECTS = [
    "The state-of-the-art model",
    "A naïve reader",
    "It (e.g. the café's owner)",
    "“Nobody”",
    "中文 and 日本 speakers",
]
VERBS = ["isn't reading", "costs $5.00 and", "a_b += c++ quickly", "doesn't re-state", "répète — always —"]
TEXTS = [
    f"{s} {v} chapter {i}.\nThen it rests, at last!"
    for i, (s, v) in enumerate((s, v) for s in SUBJECTS for v in VERBS)
] * 3
SYLLABLES = ["chap", "ter", "mo", "del", "rea", "ding", "quick", "ly"]
VARIED = [f"{a}{b} {c}{a}, {b}{c}{a}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
HARD = [
    *TEXTS[:25],
    "  leading\t\ttabs, <b>tags</b> &c. \n\n new—line… ",
    "état-major's 3,000 £5 50% x²=4 ½ ﬁne a/b #1 [SEP] <mask> «où»",
    "中文字abc カナ漢字 全角，句。e\u0301te\u0301 1\ufe0f\u20e3 a\u200db 👩\u200d🚀!",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def trained():
    return {
        kind: train_tokenizer(TEXTS, kind=kind, vocab_size=420, lowercase=False, model_max_length=64) for kind in KINDS
    }


def untrimmed_byte_level():
    """A tokenizer that is not ours: offsets that include the space, numbers apart, punctuation apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def metaspace():
    """A tokenizer that is not ours: the space is a piece's first character, or a piece."""
    backend = Tokenizer(models.WordLevel({"?": 0, "▁": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def realised_words(text, tokenizer):
    """Where words start according to the tokens that are marked."""
    columns = tokenize_texts([text], tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    assert encoding["input_ids"] == columns["input_ids"][0].tolist()
    places = next_visible(character_kinds(text), np.array([start for start, _ in encoding["offset_mapping"]]))
    return places[columns["word_starts"][0]].tolist()


@pytest.mark.parametrize("text", HARD)
def test_all_tokenizers_see_the_same_words(trained, text):
    expected = word_starts(text).tolist()
    assert len(expected) > 3
    for name, tokenizer in {**trained, "untrimmed": untrimmed_byte_level(), "metaspace": metaspace()}.items():
        if name == "untrimmed" and any("\u4e00" < c < "\u9fff" for c in text):
            continue  # Its pre-tokenizer leaves runs of ideographs whole: tokens may reach over two words.
        assert realised_words(text, tokenizer) == expected, name


def test_no_token_of_ours_reaches_over_two_words(trained):
    for text in HARD:
        starts = word_starts(text)
        kinds = character_kinds(text)
        for kind, tokenizer in trained.items():
            for begin, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
                first = int(next_visible(kinds, np.array([begin]))[0])
                inside = [s for s in starts if first < s < end]
                assert not inside or text[begin:end].strip() in {*tokenizer.all_special_tokens}, (
                    kind,
                    text[begin:end],
                )


def test_a_mark_stays_with_a_lone_character(trained):
    """BERT's own pre-tokenizer joins the mark to what follows, so WordPiece is left out."""
    text = "中\u0308x !\u0301y #\ufe0f\u20e3z"
    for kind in ("bpe", "unigram"):
        assert realised_words(text, trained[kind]) == word_starts(text).tolist()


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("texts", [TEXTS, VARIED], ids=["few words", "many words"])
def test_training_is_deterministic(kind, texts, lowercase):
    """The trainers iterate over hash maps in an order that changes from run to run."""
    options = {"kind": kind, "vocab_size": 380, "lowercase": lowercase}
    first = train_tokenizer(texts, **options).backend_tokenizer.to_str()
    for _ in range(4):
        assert train_tokenizer(iter(texts), **options).backend_tokenizer.to_str() == first


def test_training_is_deterministic_between_processes(trained):
    program = (
        "import hashlib, json, sys\n"
        "from hf_pretrain.data.documents.tokenizers import train_tokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "for kind in ('wordpiece', 'bpe', 'unigram'):\n"
        "    backend = train_tokenizer(texts, kind=kind, vocab_size=420, lowercase=False).backend_tokenizer\n"
        "    print(hashlib.md5(json.dumps(sorted(backend.get_vocab().items())).encode()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    here = [json.dumps(sorted(trained[kind].backend_tokenizer.get_vocab().items())) for kind in KINDS]
    assert done.stdout.split() == [hashlib.md5(vocab.encode()).hexdigest() for vocab in here]


@pytest.mark.parametrize("model_type", [None, "bert", "electra", "roberta", "deberta-v2", "modernbert", "albert"])
def test_save_and_load(trained, kind, tmp_path, model_type):
    """Also beside a model of another architecture, whose stock tokenizer class is another one."""
    tokenizer = trained[kind]
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        options = {"return_offsets_mapping": True, "truncation": True, "max_length": 50}
        for texts in ((text,), (text, "second " + text)):
            expected, found = dict(tokenizer(*texts, **options)), dict(loaded(*texts, **options))
            if model_type == "modernbert":  # It has no token types, and transformers has its own way with them.
                expected.pop("token_type_ids", None), found.pop("token_type_ids", None)
            assert found == expected
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == 64
    if model_type in (None, "bert"):
        assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert loaded.model_input_names == tokenizer.model_input_names
    check_tokenizer(loaded)


def test_wordpiece_is_the_stock_bert_tokenizer(trained, tmp_path):
    assert type(trained["wordpiece"]) is BertTokenizer
    trained["wordpiece"].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is BertTokenizer


def test_special_tokens_around_one_and_two_sequences(trained):
    for kind, (cls, sep, between, types) in {
        "wordpiece": ("[CLS]", "[SEP]", ["[SEP]"], True),
        "unigram": ("[CLS]", "[SEP]", ["[SEP]"], True),
        "bpe": ("<s>", "</s>", ["</s>", "</s>"], False),
    }.items():
        tokenizer = trained[kind]
        one, two = (tokenizer.tokenize(text) for text in ("The reader", "costs"))
        assert tokenizer.convert_ids_to_tokens(tokenizer("The reader")["input_ids"]) == [cls, *one, sep]
        pair = tokenizer("The reader", "costs")
        assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [cls, *one, *between, *two, sep]
        assert tokenizer.num_special_tokens_to_add(pair=True) == 2 + len(between)
        if types:
            assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)
        else:
            assert "token_type_ids" not in pair


def test_roberta_ids_and_mask_with_its_space(trained):
    tokenizer = trained["bpe"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer("The <mask> reader", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["The", "<mask>"]
    assert trained["wordpiece"].convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert trained["unigram"].convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_bytes_round_trip(trained):
    tokenizer = trained["bpe"]
    for text in HARD:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_spaces_are_joined_to_words_in_bpe(trained):
    """A space before punctuation or a number belongs to it, as in GPT-2, and is not a token of every sentence."""
    texts = [f"see (a) or (b) and 5 or 中 {i}" for i in range(100)]
    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=350, lowercase=False)
    assert {"Ġ(", "Ġ5", "Ġor"} <= {*tokenizer.tokenize(texts[0])}
    assert "Ġ" not in tokenizer.tokenize("see (a) or 5 and")


def test_lowercase(kind):
    for lowercase in (True, False):
        tokenizer = train_tokenizer(TEXTS, kind=kind, vocab_size=420, lowercase=lowercase)
        assert (tokenizer.tokenize("THE Café") == tokenizer.tokenize("the café")) is lowercase


@pytest.mark.parametrize(
    ("kind", "size"), [("wordpiece", 90), ("wordpiece", 130), ("bpe", 270), ("bpe", 300), ("unigram", 90)]
)
def test_vocabulary_has_the_size_asked_for(kind, size):
    assert len(train_tokenizer(VARIED, kind=kind, vocab_size=size)) == size
    assert len(train_tokenizer(["ab"] * 9, kind=kind, vocab_size=size)) < size


def test_frequent_pieces_are_one_token(kind):
    tokenizer = train_tokenizer(VARIED, kind=kind, vocab_size=330 if kind == "bpe" else 110)
    for word in ("chapter", "model"):
        assert len(tokenizer.tokenize(word)) <= 2


def test_min_frequency():
    rare = ["zz yy"] + ["aa bb"] * 5
    for kind in ("wordpiece", "bpe"):
        tokens = [{*train_tokenizer(rare, kind=kind, vocab_size=400, min_frequency=n).get_vocab()} for n in (1, 2)]
        assert "zz" in tokens[0] - tokens[1]
        assert "aa" in tokens[1]


def test_characters_of_the_text_are_known(trained):
    for kind, tokenizer in trained.items():
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, kind


@pytest.mark.parametrize("options", [{}, {"do_lower_case": False}, {"strip_accents": True}])
def test_characters_that_are_counted_alone_are_those_of_the_normalized_text(options):
    """BERT's normalizer writes a character the same whatever stands beside it."""
    normalizer = BertTokenizer(**options).backend_tokenizer.normalizer
    texts = [*HARD, *TEXTS, "ΑΣ ΣΑΣ. İ I\u0307 e\u0301 \u0f43 각 가\u11a8 \u0301e Ⅻ", "", None, "🙂\x00\ufffd"]
    expected = tokenizer_training._character_counts(texts, normalizer)
    assert len(expected) > 50 and expected["e"] > 100
    assert tokenizer_training._character_counts(texts, normalizer, each_alone=True) == expected


def test_rare_characters_do_not_fill_the_vocabulary():
    texts = [*VARIED * 30, *(chr(0x4E00 + i) for i in range(300)), "Ö"]
    for kind in ("wordpiece", "unigram"):
        tokenizer = train_tokenizer(texts, kind=kind, vocab_size=200)
        vocab = tokenizer.get_vocab()
        assert "chap" in {token.strip("▁") for token in vocab}
        assert 10 < sum("\u4e00" <= token[-1] <= "\u9fff" for token in vocab) < 50


@pytest.mark.parametrize(
    ("kind", "vocab_size"), [("wordpiece", 60), ("wordpiece", 3), ("bpe", 260), ("unigram", 60), ("unigram", 4)]
)
def test_vocabulary_too_small(kind, vocab_size):
    with pytest.raises(InputError, match=rf"vocab_size={vocab_size} is too small.*use at least \d+") as error:
        train_tokenizer(TEXTS, kind=kind, vocab_size=vocab_size)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    assert len(train_tokenizer(TEXTS, kind=kind, vocab_size=least)) <= least


def test_bad_input(kind):
    for texts in ([], ["", " \n"], iter([])):
        with pytest.raises(InputError, match="no text"):
            train_tokenizer(texts, kind=kind, vocab_size=400)
    with pytest.raises(InputError, match="tokenizer_type='letters'"):
        train_tokenizer(TEXTS, kind="letters")


@pytest.mark.parametrize("role", ["mask", "pad"])
def test_check_tokenizer_names_what_is_missing(trained, role, tmp_path):
    for kind, tokenizer in trained.items():
        check_tokenizer(tokenizer)
        tokenizer.save_pretrained(tmp_path / kind)
        broken = AutoTokenizer.from_pretrained(tmp_path / kind)
        setattr(broken, f"{role}_token", None)
        with pytest.raises(InputError, match=f"no {role}_token.*add_special_tokens") as error:
            check_tokenizer(broken)
        assert "\n" not in str(error.value)


# Text in lower case, one of each script; nothing of it may be lost.
SCRIPTS = {
    "german": "die bären hören schöne bücher und mögen äpfel in der straße",
    "hindi": "में हूँ हिन्दी भारत की एक प्रमुख भाषा है",
    "thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียง น้ำในแม่น้ำใสสะอาด ทำ",
    "vietnamese": "tiếng việt là ngôn ngữ có thanh điệu",
    "arabic": "اللُّغَةُ العَرَبِيَّةُ جَمِيلَةٌ",
    "hebrew": "שָׁלוֹם עוֹלָם",
    "japanese": "データベースからがぎぐを取り出す。ｶﾞ",
    "korean": "한국어는 아름답다",
    "decomposed": unicodedata.normalize("NFD", "tiếng việt über"),
}
JOINED = {"persian": "من می‌خواهم کتاب‌های خوبی بخوانم", "sinhala": "ශ්‍රී ලංකා ශ්‍රී"}


def read_back(text, kind, folder, **options):
    """A tokenizer that is trained, saved and opened again, and the text as it gives it back, without spaces, in NFC."""
    tokenizer = train_tokenizer([*SCRIPTS.values(), *JOINED.values()] * 3, kind=kind, vocab_size=1200, **options)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    return unicodedata.normalize("NFC", "".join(decoded.split()))


def test_nothing_of_any_script_is_lost(kind, tmp_path):
    for text in (*SCRIPTS.values(), *(JOINED.values() if kind != "wordpiece" else ())):
        expected = unicodedata.normalize("NFC", "".join(text.split()))
        assert read_back(text.upper() if text.isascii() else text, kind, tmp_path) == expected


def test_accents_are_stripped_only_if_asked_for(kind, tmp_path):
    stripped = {name: read_back(SCRIPTS[name], kind, tmp_path, strip_accents=True) for name in ("german", "korean")}
    assert stripped["german"] == "diebarenhorenschonebucherundmogenapfelinderstraße"
    if kind != "wordpiece":  # BERT's normalizer leaves syllables of Hangul in their parts
        assert stripped["korean"] == SCRIPTS["korean"].replace(" ", "")


def keyed_letters(alphabet, count, *, seed=0):
    numbers = draws.integers(draws.row_keys([seed], seed=0, stream="letters"), count, high=len(alphabet))[0]
    return "".join(alphabet[n] for n in numbers)


PROSE = [f"The {a}{b} reads, and it is {c}." for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
BASE64 = string.ascii_letters + string.digits + "+/"
CODE = (
    "def read(path, *, size=0):\n    if size > 0:\n        return open(path)[:size]\n    return {k: v for k, v in x}\n"
)


@pytest.mark.parametrize(
    ("text", "kind", "lowercase"),
    [
        ("The quick readers of the state-of-the-art model don't pay $5.00 (or so).", "wordpiece", True),
        (SCRIPTS["german"], "wordpiece", True),
        (SCRIPTS["hindi"], "wordpiece", True),
        (SCRIPTS["arabic"], "wordpiece", True),
        ("自然语言处理是人工智能的重要方向。", "wordpiece", True),
        ("ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์", "unigram", True),
        ("ភាសាខ្មែរជាភាសាផ្លូវការរបស់ព្រះរាជាណាចក្រកម្ពុជា", "unigram", True),
        ("データベースから情報を取り出すことができます。", "unigram", True),
        (JOINED["persian"], "unigram", True),
        (JOINED["sinhala"], "unigram", True),
        (keyed_letters("ACGT", 400), "bpe", False),
        (keyed_letters("ACDEFGHIKLMNPQRSTVWY", 300), "bpe", False),
        ("\n".join(keyed_letters(BASE64, 76, seed=k) for k in range(20)), "bpe", False),
        (CODE, "bpe", False),
        ("for (int i = 0; i < n; ++i) { total += values[i]; }\n", "bpe", False),
        ("CC(=O)OC1=CC=CC=C1C(=O)O CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "bpe", False),
    ],
)
def test_choice_suits_the_text(text, kind, lowercase):
    choice = choose_tokenizer([None, "", text] * 3)
    assert (choice.kind, choice.lowercase) == (kind, lowercase), choice.reason
    assert choice.reason and choose_tokenizer([None, "", text] * 3) == choice


def test_one_odd_document_does_not_decide_the_choice():
    assert choose_tokenizer([*PROSE * 20, keyed_letters(BASE64, 2_000_000)]).kind == "wordpiece"
    assert choose_tokenizer([CODE, *PROSE * 20]).kind == "wordpiece"


def test_no_word_that_a_trainer_gets_is_longer_than_it_bears(kind):
    """The trainers need the square of the longest word: 20 s for 200,000 hexadecimal digits."""
    for word in (keyed_letters("0123456789abcdef", 3000), "x" * 150_000, keyed_letters(BASE64, 2_000_000)):
        for texts in ([*PROSE * 20, f"see {word}"], [word, None, "x y z"]):
            learned = list(_LearnedTexts.of(texts, kind))
            assert max(len(part) for text in learned for part in text.split()) <= 1000
            assert len(learned[-1]) <= 100_200
    train_tokenizer([*PROSE, "x" * 150_000], kind=kind, vocab_size=400)


def test_unigram_learns_from_a_part_of_text_without_spaces(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "_UNBROKEN_CHARACTERS", 1000)
    lines = [keyed_letters("ACGT", 100, seed=k) for k in range(50)]
    assert "".join(_LearnedTexts.of(lines, "unigram")) == "".join(lines[:10])
    assert list(_LearnedTexts.of(lines, "bpe")) == lines and list(_LearnedTexts.of(PROSE, "unigram")) == PROSE


def test_long_words_are_left_out_and_said_or_cut_where_they_are_the_text(kind, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    word = keyed_letters("ACGT", 3000) + "zq" * 1000
    size = {"wordpiece": 120, "bpe": 420, "unigram": 120}[kind]
    tokenizer = train_tokenizer([*PROSE, f"{word} {word}"], kind=kind, vocab_size=size)
    assert not any("zqzq" in token for token in tokenizer.get_vocab())
    assert "2 words of more than 1,000 characters (10,000 of" in caplog.text and "left out" in caplog.text
    # Its characters are known all the same.
    assert tokenizer.unk_token_id not in tokenizer("zq acgt", add_special_tokens=False)["input_ids"]
    tokenizer = train_tokenizer([word] * 4, kind=kind, vocab_size=size)
    assert any("zqzq" in token for token in tokenizer.get_vocab()) and "are cut" in caplog.text


def test_ideographs_and_wide_punctuation_end_a_long_word():
    chinese = "自然语言处理，" * 500
    assert _too_long(chinese) == []
    assert _too_long(f"{chinese}{'x' * 1001}，{'y' * 1000} z") == [(3500, 4501)]


def test_missing_texts_are_no_text(kind):
    whole = train_tokenizer(TEXTS, kind=kind, vocab_size=420)
    holed = train_tokenizer([text for some in TEXTS for text in (None, some, "")], kind=kind, vocab_size=420)
    assert holed.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "deberta-v2", "xlm-roberta", "albert", "mpnet", "xlnet", "t5"]
)
def test_a_folder_without_a_tokenizer_is_refused(model_type, tmp_path):
    """transformers makes one up whose vocabulary is special tokens."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'.*' holds no tokenizer") as error:
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
