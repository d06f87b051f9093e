"""From scores of tokens to scores of words."""

import math
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForTokenClassification,
    RobertaModel,
)

from helpers.loopback_hub import LoopbackHub, connected
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.detector import ReplacedTokenScorer, _windows
from hf_pretrain.modeling.heads import DISCRIMINATOR_HEAD_FOLDER, DiscriminatorHead


class FixedModel(nn.Module):
    """A discriminator that says the same of a token wherever it stands, as a probability."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=64)

    def __init__(self, probabilities, *, last_axis=False):
        super().__init__()
        self.probabilities = probabilities
        self.last_axis = last_axis

    def forward(self, input_ids, attention_mask):
        assert not self.training
        logits = torch.tensor(
            [[math.log(p / (1 - p)) for p in map(self.probabilities, row)] for row in input_ids.tolist()]
        )
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


def check(model, tokenizer, text, expected):
    result = ReplacedTokenScorer(model, tokenizer)(text)
    assert [word.word for word in result] == [word for word, _ in expected]
    assert [word.score for word in result] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert all(text[word.start : word.end] == word.word for word in result)


class TestWordPiece:
    def test_a_word_has_the_highest_probability_of_its_pieces(self):
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"un": 0.2, "##happi": 0.7, "##ness": 0.4, "cats": 0.6})
        expected = [("The", 0.01), ("unhappiness", 0.7), ("of", 0.01), ("cats", 0.6), (".", 0.01)]
        check(model, tokenizer, "The unhappiness of cats.", expected)

    def test_words_are_those_of_the_text(self):
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"don": 0.3, "'": 0.5, "t": 0.2, "[UNK]": 0.8})
        expected = [("Don", 0.3), ("'", 0.5), ("t", 0.2), ("know", 0.8), (".", 0.01)]
        check(model, tokenizer, "  Don't\n know. ", expected)

    def test_one_logit_on_a_last_axis(self):
        """As a token classifier has it."""
        tokenizer = wordpiece()
        model = by_token(tokenizer, {"cats": 0.6})
        model.last_axis = True
        check(model, tokenizer, "the cats", [("the", 0.01), ("cats", 0.6)])


class TestLeadingSpaces:
    def test_the_space_before_a_word_does_not_make_its_token_the_previous_words(self):
        tokenizer = byte_level()
        text = "the cat sat"
        tokens = tokenizer(text, return_offsets_mapping=True)
        assert (3, 7) in tokens["offset_mapping"]
        model = by_token(tokenizer, {"Ġcat": 0.9, "the": 0.2, "a": 0.3, "t": 0.4})
        check(model, tokenizer, text, [("the", 0.2), ("cat", 0.9), ("sat", 0.4)])

    def test_a_character_of_several_tokens(self):
        tokenizer = byte_level()
        last_byte = tokenizer.tokenize("é")[-1]
        model = by_token(tokenizer, {last_byte: 0.7})
        check(model, tokenizer, "the é the", [("the", 0.01), ("é", 0.7), ("the", 0.01)])

    def test_a_lone_space_belongs_to_the_word_after_it(self):
        """As it does where documents are cut into words."""
        tokenizer = byte_level()
        text = "the  cat"
        assert "Ġ" in tokenizer.tokenize(text)
        model = by_token(tokenizer, {"Ġ": 0.9})
        check(model, tokenizer, text, [("the", 0.01), ("cat", 0.9)])


@pytest.mark.parametrize("text", ["", "   ", "\n", "\u200b", "\x00"])
def test_a_text_without_words(text):
    assert ReplacedTokenScorer(by_token(wordpiece(), {}), wordpiece())([text, "cats", text])[::2] == [[], []]


@pytest.mark.parametrize(
    "text", ["[MASK] [SEP]", "\U0001f469\u200d\U0001f469", "cats\r\nthe cat", "cat " * 3000, "cats\x00the\u200bcat"]
)
def test_words_of_odd_texts_are_those_of_the_text(text):
    words = ReplacedTokenScorer(by_token(wordpiece(), {}), wordpiece(), max_length=16)(text)
    assert all(text[word.start : word.end] == word.word for word in words)
    # What nobody sees makes no word by itself.
    visible = "" if text in ("\u200b", "\x00") else "".join(text.split())
    assert "".join(word.word for word in words) == visible


@pytest.mark.parametrize(
    ("texts", "batch_size", "words"),
    [(["a", None], 1, r"texts\[1\]"), (["\ud800"], 1, "half of a character"), (["a"], 0, "batch_size=0")],
)
def test_what_is_no_text_is_named(texts, batch_size, words):
    with pytest.raises(InputError, match=words):
        ReplacedTokenScorer(by_token(wordpiece(), {}), wordpiece())(texts, batch_size=batch_size)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def electra(tokenizer, **options):
    torch.manual_seed(0)
    config = ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, max_position_embeddings=16, **TINY, **options)
    return ElectraForPreTraining(config)


def roberta(tokenizer, **options):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        max_position_embeddings=18,
        **TINY,
        **options,
    )
    return RobertaModel(config)


TEXTS = ["the cats.", "", "the unhappiness of the cats. don't", "of"]


def alone(model, tokenizer, text):
    """The probabilities of a text's tokens, by the model itself."""
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits.sigmoid().flatten().tolist()[1:-1]


class TestStockDiscriminator:
    def test_scores_are_those_of_the_model_without_dropout(self):
        tokenizer = wordpiece()
        model = electra(tokenizer).train()
        scorer = ReplacedTokenScorer(model, tokenizer)
        result = scorer("the cats.")
        assert model.training, "it is left as it was"
        p = alone(model, tokenizer, "the cats.")
        assert [word.score for word in result] == pytest.approx(p, abs=1e-6)
        assert [word[:3] for word in result] == [("the", 0, 3), ("cats", 4, 8), (".", 8, 9)]
        assert result == scorer("the cats.")

    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_a_text_among_others_has_the_scores_that_it_has_alone(self, batch_size):
        tokenizer = wordpiece()
        scorer = ReplacedTokenScorer(electra(tokenizer), tokenizer)
        together = scorer(TEXTS, batch_size=batch_size)
        assert scorer([]) == []
        for text, words in zip(TEXTS, together, strict=True):
            assert [word[:3] for word in words] == [word[:3] for word in scorer(text)]
            assert [word.score for word in words] == pytest.approx([word.score for word in scorer(text)], abs=1e-6)

    def test_positions_of_roberta_are_not_moved_by_padding(self):
        """They are counted by what is no padding, so filling with another token would move them."""
        tokenizer = byte_level()
        model = RobertaForTokenClassification(roberta(tokenizer, num_labels=1).config)
        scorer = ReplacedTokenScorer(model, tokenizer)
        long, short = scorer(["the cat the cat", "the"])
        assert [word.score for word in short] == pytest.approx([word.score for word in scorer("the")], abs=1e-6)
        assert len(long) == 4


class TestWindows:
    def test_every_token_is_scored_once_where_it_has_most_context(self):
        for size in (1, 2, 5, 8):
            for n in range(0, 40):
                windows = _windows(n, size=size)
                scored = [i for _, first, last in windows for i in range(first, last)]
                assert scored == list(range(n))
                for start, first, last in windows:
                    assert start <= first and last <= start + size
                    margin = (size // 4) // 2
                    assert first == 0 or first - start >= min(margin, size - 1)
                    assert last == n or start + size - last >= margin

    def test_a_long_text_has_the_scores_of_its_windows(self):
        tokenizer = wordpiece()
        model = electra(tokenizer)
        words = ("the un happi of cats . don ' t " * 4).split()
        scores = ReplacedTokenScorer(model, tokenizer, max_length=10)(" ".join(words))
        assert [word.word for word in scores] == words
        # Windows of 8 tokens start at 0, 6, ...; the first decides up to the middle of where it overlaps the second.
        first, second = (alone(model, tokenizer, " ".join(words[a : a + 8])) for a in (0, 6))
        assert [word.score for word in scores[:13]] == pytest.approx(first[:7] + second[1:7], abs=1e-6)
        last = alone(model, tokenizer, " ".join(words[-8:]))
        assert [word.score for word in scores[-3:]] == pytest.approx(last[-3:], abs=1e-6)

    def test_by_default_a_window_is_what_the_model_takes(self, recwarn):
        tokenizer = wordpiece()
        assert ReplacedTokenScorer(electra(tokenizer), tokenizer).window == 14
        assert ReplacedTokenScorer(roberta(byte_level()), byte_level(), head=nn.Identity()).window == 14
        tokenizer.model_max_length = 8
        scorer = ReplacedTokenScorer(electra(tokenizer), tokenizer)
        assert scorer.window == 6
        assert len(scorer("the cats " * 50)) == 100
        assert not recwarn.list

    @pytest.mark.parametrize("max_length", [2, 17])
    def test_a_length_that_cannot_be_is_refused(self, max_length):
        tokenizer = wordpiece()
        with pytest.raises(
            InputError, match=f"max_length={max_length} must be above the 2 special tokens and at most 16"
        ):
            ReplacedTokenScorer(electra(tokenizer), tokenizer, max_length=max_length)


class TestFromPretrained:
    def test_a_stock_discriminator(self, tmp_path):
        tokenizer = wordpiece()
        model = electra(tokenizer)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        scorer = ReplacedTokenScorer.from_pretrained(str(tmp_path), device="cpu", max_length=12)
        assert type(scorer.model) is ElectraForPreTraining and scorer.window == 10
        assert scorer(TEXTS) == ReplacedTokenScorer(model, tokenizer, max_length=12)(TEXTS)

    @pytest.mark.parametrize("kind", ["electra", "deberta_v3"])
    def test_an_encoder_with_a_head_of_its_own(self, tmp_path, kind):
        tokenizer = byte_level()
        encoder = roberta(tokenizer)
        head = DiscriminatorHead.of_kind(kind, encoder.config)
        encoder.save_pretrained(tmp_path)
        head.save_pretrained(tmp_path / "pretraining" / "discriminator_head")
        tokenizer.save_pretrained(tmp_path)
        scorer = ReplacedTokenScorer.from_pretrained(str(tmp_path))
        text = "the cat"
        with torch.no_grad():
            states = encoder.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
            p = head.eval()(states).sigmoid()[0, 1:-1].tolist()
        assert tokenizer.tokenize(text) == ["the", "Ġcat"]
        assert [word.score for word in scorer(text)] == pytest.approx(p, abs=1e-6)

    def test_from_the_hub(self, tmp_path, monkeypatch):
        """The files of a repository alone tell whether the head is a stock one."""
        tokenizer = byte_level()
        encoder = roberta(tokenizer)
        folders = {"export": tmp_path / "export", "stock": tmp_path / "stock"}
        encoder.save_pretrained(folders["export"])
        DiscriminatorHead.of_kind("electra", encoder.config).save_pretrained(
            folders["export"] / DISCRIMINATOR_HEAD_FOLDER
        )
        electra(tokenizer).save_pretrained(folders["stock"])
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with LoopbackHub(tmp_path / "hub") as hub, connected(hub.url):
            api = HfApi(endpoint=hub.url)
            for name, folder in folders.items():
                tokenizer.save_pretrained(folder)
                api.create_repo(f"tester/{name}")
                api.upload_folder(repo_id=f"tester/{name}", folder_path=folder)
                found, expected = (
                    ReplacedTokenScorer.from_pretrained(place)("the cat") for place in (f"tester/{name}", str(folder))
                )
                assert [word.score for word in found] == pytest.approx([word.score for word in expected], abs=1e-6)
            assert hub.unknown == []
        assert {path.name for path in (tmp_path / "cache").glob("models--*")} == {
            "models--tester--export",
            "models--tester--stock",
        }

    @pytest.mark.parametrize("model_class", [ElectraForMaskedLM, ElectraForTokenClassification])
    def test_what_is_no_discriminator_is_refused(self, tmp_path, model_class):
        """A stock class would open it with a random head, and the scores would look like scores."""
        tokenizer = wordpiece()
        model_class(electra(tokenizer).config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"is no discriminator: its architecture is {model_class.__name__}"):
            ReplacedTokenScorer.from_pretrained(str(tmp_path))

    def test_what_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="cannot be loaded with AutoConfig"):
            ReplacedTokenScorer.from_pretrained(str(tmp_path / "nowhere"))

    def test_a_slow_tokenizer_is_refused(self):
        slow = SimpleNamespace(is_fast=False)
        with pytest.raises(InputError, match="is not a fast one"):
            ReplacedTokenScorer(electra(wordpiece()), slow)
