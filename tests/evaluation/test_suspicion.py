"""From scores of tokens to scores of words."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ElectraConfig, ElectraForPreTraining, PreTrainedTokenizerFast

from hf_pretrain.evaluation.suspicion import word_suspicions


class FixedModel:
    """A discriminator that says the same of a token wherever it stands, as a probability."""

    device = torch.device("cpu")

    def __init__(self, probabilities, *, last_axis=False):
        self.probabilities = probabilities
        self.last_axis = last_axis

    def eval(self):
        return self

    def __call__(self, input_ids, attention_mask):
        assert attention_mask.all() and input_ids.shape[0] == 1
        logits = torch.tensor([[math.log(p / (1 - p)) for p in map(self.probabilities, input_ids[0].tolist())]])
        return SimpleNamespace(logits=logits[..., None] if self.last_axis else logits)


def wordpiece():
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "un",
        "##happi",
        "##ness",
        "of",
        "cats",
        ".",
        "don",
        "'",
        "t",
    ]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def byte_level():
    """RoBERTa's kind: the space before a word belongs to its first token, and the offsets say so."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("c", "a"), ("ca", "t"), ("t", "h"), ("th", "e"), ("Ġ", "cat"), ("Ġ", "the")]
    pieces += [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def by_token(tokenizer, values, *, otherwise=0.01, special=0.99):
    """Probabilities by token; the special tokens' are high, so that one that is not left out shows."""
    vocabulary = tokenizer.get_vocab()
    by_id = {vocabulary[token]: value for token, value in values.items()}
    specials = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}
    return FixedModel(lambda token: special if token in specials else by_id.get(token, otherwise))


def check(result, expected):
    assert [word for word, _ in result] == [word for word, _ in expected]
    assert [p for _, p in result] == pytest.approx([p for _, p in expected], abs=1e-5)


class TestWordPiece:
    def test_a_word_has_the_highest_probability_of_its_pieces(self):
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"un": 0.2, "##happi": 0.7, "##ness": 0.4, "cats": 0.6})
        expected = [("The", 0.01), ("unhappiness", 0.7), ("of", 0.01), ("cats", 0.6), (".", 0.01)]
        check(word_suspicions(model, tokenizer, "The unhappiness of cats."), expected)

    def test_words_are_those_of_the_text(self):
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"don": 0.3, "'": 0.5, "t": 0.2, "[UNK]": 0.8})
        expected = [("Don", 0.3), ("'", 0.5), ("t", 0.2), ("know", 0.8), (".", 0.01)]
        check(word_suspicions(model, tokenizer, "  Don't\n know. "), expected)

    def test_one_logit_on_a_last_axis(self):
        """As a token classifier has it."""
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"cats": 0.6})
        model.last_axis = True
        check(word_suspicions(model, tokenizer, "the cats"), [("the", 0.01), ("cats", 0.6)])


class TestLeadingSpaces:
    def test_the_space_before_a_word_does_not_make_its_token_the_previous_words(self):
        tokenizer = byte_level()
        text = "the cat sat"
        tokens = tokenizer(text, return_offsets_mapping=True)
        assert (3, 7) in tokens["offset_mapping"]
        model = by_token(tokenizer, {"Ġcat": 0.9, "the": 0.2, "a": 0.3, "t": 0.4})
        check(word_suspicions(model, tokenizer, text), [("the", 0.2), ("cat", 0.9), ("sat", 0.4)])

    def test_a_character_of_several_tokens(self):
        tokenizer = byte_level()
        last_byte = tokenizer.tokenize("é")[-1]
        model = by_token(tokenizer, {last_byte: 0.7})
        check(word_suspicions(model, tokenizer, "the é the"), [("the", 0.01), ("é", 0.7), ("the", 0.01)])

    def test_a_lone_space_belongs_to_the_word_after_it(self):
        """As it does where documents are cut into words."""
        tokenizer = byte_level()
        text = "the  cat"
        assert "Ġ" in tokenizer.tokenize(text)
        model = by_token(tokenizer, {"Ġ": 0.9})
        check(word_suspicions(model, tokenizer, text), [("the", 0.01), ("cat", 0.9)])


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_words(text):
    assert word_suspicions(by_token(wordpiece(), {}), wordpiece(), text) == []


def test_a_stock_discriminator():
    tokenizer = wordpiece()
    config = ElectraConfig(
        vocab_size=len(tokenizer),
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    model = ElectraForPreTraining(config).train()
    result = word_suspicions(model, tokenizer, "the cats.")
    with torch.no_grad():
        p = model.eval()(**tokenizer("the cats.", return_tensors="pt")).logits.sigmoid().flatten().tolist()
    check(result, [("the", p[1]), ("cats", p[2]), (".", p[3])])
    assert result == word_suspicions(model, tokenizer, "the cats.")
