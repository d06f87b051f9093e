"""Trimmed vocabularies: kept text is cut into the same tokens, and the logits on them are the same."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.surgery.vocabulary import (
    match_vocabulary,
    trim_model,
    trim_vocabulary,
    used_ids,
)
from hf_pretrain.objectives.distillation.student import cut_student

CORPUS = [
    "the quick brown foxes were jumping over many lazy dogs and quickly jumped back again",
    "unhappily the happiest unhappy fox unjumped; quicker, quickest, laziest dogginess (again)!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, 1234567890 times",
    "reading, reader, reads, unread, rereading: the reading rooms of readers are readable",
] * 5
TEXTS = ["the unhappy fox reads again", "quickly, the readers jumped over 12 dogs!"]
KINDS = ["wordpiece", "bpe", "unigram"]


@pytest.fixture(scope="module", params=KINDS)
def full(request):
    return train_tokenizer(CORPUS, kind=request.param, vocab_size=500, min_frequency=1, model_max_length=64)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(CORPUS, kind="bpe", vocab_size=500, min_frequency=1, model_max_length=64)


def model_for(tokenizer, kind="bert", auto_class=AutoModelForMaskedLM, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 70,
    }
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    model = auto_class.from_config(AutoConfig.for_model(kind, **(sizes | ids | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids_of(tokenizer, texts=TEXTS):
    return sorted({token for row in tokenizer(texts)["input_ids"] for token in row})


def trimmed_pair(full, **options):
    model = model_for(full, **options)
    return model, *trim_vocabulary(model, full, ids_of(full))


def logits(model, tokenizer, texts=TEXTS):
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_kept_text_is_cut_into_the_same_tokens(full, tmp_path):
    _, _, trimmed = trimmed_pair(full)
    assert type(trimmed) is type(full)
    assert len(trimmed) < 0.75 * len(full)
    trimmed.save_pretrained(tmp_path)
    for small in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*TEXTS, " ".join(reversed(TEXTS[0].split())), f"the fox {full.mask_token} again", ""]:
            assert small.tokenize(text) == full.tokenize(text)
            encoded, before = small(text, text), full(text, text)
            assert small.convert_ids_to_tokens(encoded["input_ids"]) == full.convert_ids_to_tokens(before["input_ids"])
            assert {k: v for k, v in encoded.items() if k != "input_ids"} == {
                k: v for k, v in before.items() if k != "input_ids"
            }
            assert small.decode(encoded["input_ids"]) == full.decode(before["input_ids"])
        assert small.special_tokens_map == full.special_tokens_map
        assert small.model_max_length == full.model_max_length
        assert sorted(small.get_vocab().values()) == list(range(len(small)))
        order = sorted(small.get_vocab(), key=small.get_vocab().get)
        assert order == sorted(order, key=full.get_vocab().get)


def test_trimming_again_changes_nothing(full):
    _, small, trimmed = trimmed_pair(full)
    again, twice = trim_vocabulary(small, trimmed, ids_of(trimmed))
    assert twice.get_vocab() == trimmed.get_vocab()
    assert match_vocabulary(again, twice, to=trimmed) is again


def test_other_text_is_still_read(full):
    _, _, trimmed = trimmed_pair(full)
    # The last word begins with the end of a word in use, and goes on with the beginning of another; a snowman is three bytes.
    text = "rooftops under the sea xq" + " ☃" * (type(full.backend_tokenizer.model) is models.BPE)
    assert len(trimmed.tokenize(text)) > len(full.tokenize(text))
    assert trimmed.unk_token not in trimmed.tokenize(text)
    assert trimmed.decode(trimmed(text)["input_ids"], skip_special_tokens=True) == text


def check_logits(model, full, small, tokenizer):
    """The small model computes what the other does, on the tokens that were kept."""
    expected = logits(model, full)
    if expected.shape[-1] != model.config.num_labels:
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        expected = expected[..., full.convert_tokens_to_ids(names)]
    torch.testing.assert_close(logits(small, tokenizer), expected, rtol=0, atol=1e-6)


ARCHITECTURES = {
    "bert": {},
    "roberta": {},
    "electra": {"embedding_size": 12},
    "modernbert": {"local_attention": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": {"embedding_size": 12},
    "distilbert": {},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_on_kept_ids_are_the_same(kind, bpe, tmp_path):
    model, small, tokenizer = trimmed_pair(bpe, kind=kind, **ARCHITECTURES[kind])
    check_logits(model, bpe, small, tokenizer)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    names = [name for name in small.config.to_dict() if name.endswith("_token_id")]
    assert all(getattr(small.config, name) in (None, getattr(tokenizer, name)) for name in names)
    assert small.config.vocab_size == len(tokenizer)
    small.save_pretrained(tmp_path)
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(loaded, tokenizer), logits(small, tokenizer), rtol=0, atol=0)


def test_models_of_every_tokenizer_with_any_head(full):
    for auto_class in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        model, small, tokenizer = trimmed_pair(full, auto_class=auto_class)
        check_logits(model, full, small, tokenizer)


def test_the_model_keeps_its_dtype_and_is_not_changed(bpe):
    model = model_for(bpe).to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, _ = trim_vocabulary(model, bpe, ids_of(bpe))
    assert (small.dtype, small.training) == (torch.bfloat16, True)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.vocab_size == len(bpe)


@pytest.mark.parametrize("tokenizer_class", [RobertaTokenizer, XLMRobertaTokenizer, DebertaV2Tokenizer])
def test_stock_tokenizer_classes(tokenizer_class, bpe, tmp_path):
    if tokenizer_class is RobertaTokenizer:
        model = json.loads(bpe.backend_tokenizer.to_str())["model"]
        full = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    else:
        names = (
            ["<s>", "<pad>", "</s>", "<unk>"]
            if tokenizer_class is XLMRobertaTokenizer
            else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        )
        pieces = json.loads(train_tokenizer(CORPUS, kind="unigram", vocab_size=400).backend_tokenizer.to_str())
        full = tokenizer_class(vocab=[(n, 0.0) for n in names] + [tuple(p) for p in pieces["model"]["vocab"][5:]])
    model, small, trimmed = trimmed_pair(full)
    assert type(trimmed) is tokenizer_class
    assert len(trimmed) < 0.75 * len(full) or tokenizer_class is RobertaTokenizer
    check_logits(model, full, small, trimmed)
    trimmed.save_pretrained(tmp_path)
    for tokenizer in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            encoded, before = (t(text, text)["input_ids"] for t in (tokenizer, full))
            assert tokenizer.convert_ids_to_tokens(encoded) == full.convert_ids_to_tokens(before)


def test_tokens_that_were_added_stay_and_rows_of_padding_go():
    full = train_tokenizer(CORPUS, vocab_size=500, min_frequency=1)
    full.add_tokens(["<entity>"])
    full.add_special_tokens({"extra_special_tokens": ["<e1>"]})
    model = model_for(full, vocab_size=len(full) + 13)
    small, tokenizer = trim_vocabulary(model, full, ids_of(full))
    assert tokenizer.convert_ids_to_tokens([len(tokenizer) - 2, len(tokenizer) - 1]) == ["<entity>", "<e1>"]
    assert tokenizer.tokenize("the <entity> fox<e1>") == full.tokenize("the <entity> fox<e1>")
    assert "<e1>" in tokenizer.all_special_tokens
    assert small.get_input_embeddings().num_embeddings == len(tokenizer)
    check_logits(model, full, small, tokenizer)


PROCESSORS = {
    "template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 6), ("[SEP]", 7)]
    ),
    "bert": processors.BertProcessing(("[SEP]", 7), ("[CLS]", 6)),
    "sequence": processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.RobertaProcessing(("[SEP]", 7), ("[CLS]", 6))]
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_what_refers_to_an_id_goes_with_it(kind, processor):
    words = ["▁a", "▁b", "▁c", "▁d", "[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    if kind == "Unigram":
        backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=4))
    else:
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = PROCESSORS[processor]
    backend.enable_padding(pad_id=5, pad_token="[PAD]", length=8)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    full = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    _, trimmed = trim_vocabulary(model_for(full), full, [0, 3])
    assert len(trimmed) == 6
    # Padding by the backend itself, and by the class around it.
    for options in ({}, {"padding": "max_length", "max_length": 6}):
        tokens = trimmed.convert_ids_to_tokens(trimmed("d x", **options)["input_ids"])
        assert tokens == full.convert_ids_to_tokens(full("d x", **options)["input_ids"])
        assert tokens[:4] == ["[CLS]", "▁d", "[UNK]", "[SEP]"]
        assert set(tokens[4:]) == ({"[PAD]"} if options else set())
    encoded = trimmed.backend_tokenizer.encode("d x")
    assert encoded.ids == trimmed.convert_tokens_to_ids(encoded.tokens)


def wordlevel(words):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def test_positions_that_are_numbered_from_padding_stay():
    full = wordlevel(["a", "b", "c", "d", "[UNK]", "[PAD]", "e", "f"])
    model = model_for(full, kind="roberta")
    small, tokenizer = trim_vocabulary(model, full, full("d f")["input_ids"])
    assert list(tokenizer.get_vocab()) == ["a", "b", "c", "d", "[UNK]", "[PAD]", "f"] or len(tokenizer) == 7
    texts = ["d f f d", "f"]
    torch.testing.assert_close(
        logits(small, tokenizer, texts), logits(model, full, texts)[..., [0, 1, 2, 3, 4, 5, 7]], rtol=0, atol=1e-6
    )
    _, tokenizer = trim_vocabulary(model_for(full), full, full("d f")["input_ids"])
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == ["d", "[UNK]", "[PAD]", "f"]
    with pytest.raises(InputError, match="the padding token of RobertaForMaskedLM would move from 5 to 1"):
        trim_model(model, torch.tensor([4, 5]))


def test_an_unknown_character_costs_what_it_did():
    # "ab c d" scores -27 and unknown + "bcd" -31, but -20 if the price of an unknown went by the pieces that are in use.
    pieces = [("[UNK]", 0.0), ("[PAD]", 0.0), ("▁", -1.0), ("ab", -9.0), ("b", -9.0), ("c", -9.0), ("d", -9.0)]
    backend = Tokenizer(models.Unigram([*pieces, ("bcd", -1.0), ("idle", -12.0), ("rare", -20.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    full = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    assert full.tokenize("abcd bcd") == ["▁", "ab", "c", "d", "▁", "bcd"]
    _, trimmed = trim_vocabulary(model_for(full), full, full("abcd bcd")["input_ids"])
    assert "idle" not in trimmed.get_vocab()
    assert trimmed.tokenize("abcd bcd") == full.tokenize("abcd bcd")


def test_a_pair_is_merged_only_if_it_was():
    # "abc" is made from "ab", which no text in use has; "bc" must not be merged first for want of it.
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("x", "y")]
    tokens = ["[UNK]", "[PAD]", "a", "b", "c", "x", "y", "ab", "bc", "abc", "xy"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    full = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    _, trimmed = trim_vocabulary(model_for(full), full, full("abc bc")["input_ids"])
    assert trimmed.tokenize("abc bc abx xy") == ["abc", "bc", "ab", "[UNK]", "[UNK]", "[UNK]"]


def test_a_student_shares_the_trimmed_vocabulary_with_its_teacher(full, tmp_path):
    teacher, small, tokenizer = trimmed_pair(full)
    student = cut_student(small, [0, 1], model_type="distilbert")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    torch.testing.assert_close(student(**inputs).logits, small(**inputs).logits, rtol=1e-5, atol=1e-5)
    tokenizer.save_pretrained(tmp_path)
    matched = match_vocabulary(teacher, full, to=AutoTokenizer.from_pretrained(tmp_path))
    torch.testing.assert_close(logits(matched, tokenizer), logits(small, tokenizer), rtol=0, atol=0)


def test_vocabularies_are_matched_by_token():
    full = wordlevel(["[PAD]", "[UNK]", "a", "b", "c"])
    model = model_for(full)
    assert match_vocabulary(model, full, to=wordlevel(["[PAD]", "[UNK]", "a", "b", "c"])) is model
    other = wordlevel(["[PAD]", "[UNK]", "c", "b", "a"])
    matched = match_vocabulary(model, full, to=other)
    expected = logits(model, full, ["a b b"])[..., [0, 1, 4, 3, 2]]
    torch.testing.assert_close(logits(matched, other, ["a b b"]), expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="does not know the student's token 'd'"):
        match_vocabulary(model, full, to=wordlevel(["[PAD]", "[UNK]", "a", "d"]))


def test_the_ids_in_use():
    examples = Dataset.from_dict({"input_ids": [[3, 1, 3], [], [900]], "other": [[7], [7], [7]]})
    assert used_ids(examples) == [1, 3, 900]
    assert used_ids(examples.select([1, 2])) == [900]
    assert used_ids(examples, column="other") == [7]
    assert used_ids(examples.select([1])) == []


def test_what_cannot_be_trimmed_is_refused(bpe):
    model = model_for(bpe)
    with pytest.raises(InputError, match=f"keep_ids holds {len(bpe)}, which is none"):
        trim_vocabulary(model, bpe, [7, len(bpe)])
    with pytest.raises(InputError, match="ByT5Tokenizer is not a WordPiece, BPE, Unigram or WordLevel"):
        trim_vocabulary(model, ByT5Tokenizer(), [7])
