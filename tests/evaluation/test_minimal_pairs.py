"""Minimal pairs: scores against the models' own logits, one token and one text at a time."""

import json
import lzma

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    ElectraConfig,
    ElectraForPreTraining,
    EncoderDecoderConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    set_seed,
)

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import (
    MinimalPair,
    denoising_log_likelihoods,
    originality_scores,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "dog", "sat", "un", "##happi", "##ness", "##s", ".", *(f"x{i}" for i in range(40))]
SIZES = {
    "vocab_size": len(SPECIALS) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
TEXTS = ["unhappiness sat.", "the cat", "the cats sat unhappiness the dogs.", "zebra the dog"]


def wordpiece():
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(SPECIALS + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIALS, strict=True)))


def masked_lm(config_class=BertConfig):
    set_seed(0)
    return AutoModelForMaskedLM.from_config(config_class(**SIZES))


@torch.no_grad()
def one_by_one(model, tokenizer, text, *, words=None):
    """The score by the definition; `words` gives the word of each token where those to its right are masked too."""
    ids = tokenizer(text)["input_ids"]
    total = 0.0
    for place in range(1, len(ids) - 1):
        hidden = [place]
        if words is not None:
            hidden += [other for other in range(place + 1, len(ids) - 1) if words[other - 1] == words[place - 1]]
        masked = [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)]
        logits = model.eval()(torch.tensor([masked])).logits[0, place]
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


class TestPseudoLogLikelihood:
    @pytest.mark.parametrize("config_class", [BertConfig, ElectraConfig, RobertaConfig])
    @pytest.mark.parametrize("batch_size", [1, 3, 256])
    def test_each_token_is_masked_in_turn(self, config_class, batch_size):
        model, tokenizer = masked_lm(config_class), wordpiece()
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, batch_size=batch_size)
        assert scores == pytest.approx([one_by_one(model, tokenizer, text) for text in TEXTS], rel=1e-5)

    def test_the_rest_of_a_word_is_hidden(self):
        """The words of the first text are un|happi|ness, sat and the point; the separator is nobody's."""
        model, tokenizer = masked_lm(), wordpiece()
        words = [[0, 0, 0, 1, 2], [0, 1], [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6], [0, 1, 2]]
        assert [len(part) for part in words] == [len(tokenizer(text)["input_ids"]) - 2 for text in TEXTS]
        scores = pseudo_log_likelihoods(model, tokenizer, TEXTS, within_word="l2r")
        expected = [one_by_one(model, tokenizer, text, words=part) for text, part in zip(TEXTS, words, strict=True)]
        assert scores == pytest.approx(expected, rel=1e-5)
        visible = pseudo_log_likelihoods(model, tokenizer, TEXTS)
        assert (np.abs(scores - visible) > 1e-4).tolist() == [True, False, True, False]

    def test_the_head_runs_at_the_masked_places_only(self):
        model, shapes = masked_lm(), []
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:-1]))
        pseudo_log_likelihoods(model, wordpiece(), ["the cat sat"], batch_size=2)
        assert shapes == [(1, 2), (1, 1)]

    def test_dropout_is_off_and_the_mode_is_left_as_it_was(self):
        model = masked_lm().train()
        first, second = (pseudo_log_likelihoods(model, wordpiece(), TEXTS) for _ in range(2))
        assert np.array_equal(first, second) and model.training

    def test_the_model_is_left_as_it_was(self):
        """No hook stays behind, not after an error either."""
        model = masked_lm()
        pseudo_log_likelihoods(model, wordpiece(), TEXTS)
        assert not any(module._forward_hooks for module in model.modules())
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pseudo_log_likelihoods(model, wordpiece(), TEXTS)
        assert not any(module._forward_hooks for module in model.modules())

    def test_bad_input(self):
        model, tokenizer = masked_lm(), wordpiece()
        with pytest.raises(InputError, match="within_word='left'"):
            pseudo_log_likelihoods(model, tokenizer, TEXTS, within_word="left")
        with pytest.raises(InputError, match="22 tokens, more than the 20 positions"):
            pseudo_log_likelihoods(model, tokenizer, ["cat " * 20])
        tokenizer.mask_token = None
        with pytest.raises(InputError, match="no mask token"):
            pseudo_log_likelihoods(model, tokenizer, TEXTS)


ODD = ["", "   ", "\n", "[MASK] [SEP]", "\u200b", "\U0001f469\u200d\U0001f469", "the cat\r\nsat.", "\x00"]


def detector():
    set_seed(0)
    return ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=16))


def denoiser():
    return encoder_decoder("bart")


@pytest.mark.parametrize(
    ("score", "model"),
    [(pseudo_log_likelihoods, masked_lm), (originality_scores, detector), (denoising_log_likelihoods, denoiser)],
)
class TestOddTexts:
    def test_each_has_the_score_that_it_has_alone(self, score, model):
        together = score(model(), wordpiece(), [*ODD, *TEXTS], batch_size=3)
        alone = [score(model(), wordpiece(), [text])[0] for text in (*ODD, *TEXTS)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        assert together[0] == together[1] == together[2] == 0 and np.isfinite(together).all()

    def test_none_at_all(self, score, model):
        assert score(model(), wordpiece(), []).shape == (0,)

    def test_the_name_of_a_special_token_is_text(self, score, model):
        """As it was in training: three pieces or words that are not known, and no mask."""
        tokenizer = wordpiece()
        first = score(model(), tokenizer, ["[MASK]", "the cat"])
        assert first[0] != 0 and tokenizer("[MASK]")["input_ids"] == [2, 4, 3], "the tokenizer is as it was"
        np.testing.assert_allclose(first[0], score(model(), tokenizer, ["[ MASK ]"])[0], rtol=1e-5)

    @pytest.mark.parametrize(
        ("texts", "batch_size", "words"),
        [
            ("the cat", 1, "texts is one text"),
            (["the", None], 1, r"texts\[1\] is of type NoneType"),
            ([3], 1, r"texts\[0\] is of type int"),
            (["a\ud800b"], 1, "half of a character at 1"),
            (TEXTS, 0, "batch_size=0"),
        ],
    )
    def test_what_is_no_text_is_named(self, score, model, texts, batch_size, words):
        with pytest.raises(InputError, match=words):
            score(model(), wordpiece(), texts, batch_size=batch_size)


class TestOriginality:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_the_sum_of_the_log_probabilities_of_being_original(self, batch_size):
        set_seed(0)
        tokenizer = wordpiece()
        models = [
            ElectraForPreTraining(ElectraConfig(**SIZES)),
            AutoModelForTokenClassification.from_config(BertConfig(**SIZES, num_labels=1)),
        ]
        for model in models:
            scores = originality_scores(model, tokenizer, TEXTS, batch_size=batch_size)
            for text, score in zip(TEXTS, scores, strict=True):
                with torch.no_grad():
                    replaced = model.eval()(**tokenizer(text, return_tensors="pt")).logits.flatten()[1:-1].sigmoid()
                assert score == pytest.approx(float((1 - replaced).log().sum()), rel=1e-4)

    def test_a_suspicious_token_costs(self):
        """The sign: a logit above zero says that a token was replaced."""
        set_seed(0)
        model = ElectraForPreTraining(ElectraConfig(**SIZES))
        model.discriminator_predictions.dense_prediction.weight.data.zero_()
        scores = []
        for bias in (-2.0, 2.0):
            model.discriminator_predictions.dense_prediction.bias.data.fill_(bias)
            scores.append(float(originality_scores(model, wordpiece(), ["the cat"])[0]))
        assert scores == pytest.approx([2 * np.log(1 / (1 + np.exp(-2))), 2 * np.log(1 / (1 + np.exp(2)))], rel=1e-5)


SENTINELS = ["<extra_id_0>", "[NLU]"]
# Word of each token of a text, special tokens left out.
WORDS_OF = [[0, 0, 0, 1, 2], [0, 1], [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6], [0, 1, 2]]


def framed(kind):
    """A tokenizer with sentinels, whose texts end on a special token and perhaps begin with one."""
    backend = wordpiece().backend_tokenizer
    single, pieces = ("$A [SEP]", [("[SEP]", 3)]) if kind == "t5" else ("[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if kind == "t5":
        tokenizer.add_special_tokens({"extra_special_tokens": SENTINELS})
    return tokenizer


def encoder_decoder(kind, *, trained=False):
    """A tiny model whose logits differ from place to place."""
    set_seed(0)
    vocab_size = len(SPECIALS) + len(WORDS) + len(SENTINELS)
    ids = {"vocab_size": vocab_size, "pad_token_id": 0, "decoder_start_token_id": 2 if kind == "bart" else 0}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return AutoModelForSeq2SeqLM.from_config(T5Config(**ids, **sizes, initializer_factor=1.0 if trained else 3.0))
    if kind == "bert2bert":
        half = BertConfig(**SIZES | {"vocab_size": vocab_size})
        config = EncoderDecoderConfig.from_encoder_decoder_configs(half, half, decoder_start_token_id=2)
        return AutoModelForSeq2SeqLM.from_config(config)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.02 if trained else 0.3}
    config = BartConfig(**ids, **sides, **heads, d_model=32, max_position_embeddings=20)
    return AutoModelForSeq2SeqLM.from_config(config)


@torch.no_grad()
def question_by_question(model, tokenizer, text, *, hiding, words=None, mode=()):
    """The score by the definition: one token, one forward pass and one row of logits at a time."""
    ids, total, mode = tokenizer(text)["input_ids"], 0.0, list(mode)
    first = 0 if ids[0] != tokenizer.cls_token_id else 1
    start = model.config.decoder_start_token_id
    for place in range(first, len(ids) - 1):
        run = [place]
        if words is not None:
            run = [other for other in range(first, len(ids) - 1) if words[other - first] == words[place - first]]
        before, behind = ids[first : run[0]], ids[run[-1] + 1 :]
        known = ids[run[0] : place]
        visible = None
        if hiding == "sentinel":
            hole, read = [tokenizer.convert_tokens_to_ids("<extra_id_0>")], [start, len(SPECIALS) + len(WORDS), *known]
        elif hiding == "mask":
            hole, read = [tokenizer.mask_token_id], [start, *ids[:place]]
        elif hiding == "fragment":
            hole = [tokenizer.mask_token_id] * len(run)
            read = [start, *ids[:place]]
            visible = torch.tensor([[int(i >= len(read) - len(known) - 1) for i in range(len(read))]])
        else:
            hole, behind, read = [], ids[-1:], [start, *known]
        source = torch.tensor([ids[:first] + mode + before + hole + behind])
        output = model.eval()(source, decoder_input_ids=torch.tensor([read]), decoder_attention_mask=visible)
        total += float(output.logits[0, -1].log_softmax(-1)[ids[place]])
    return total


class TestEncoderDecoder:
    CASES = (
        *(("t5", hiding) for hiding in ("sentinel", "mask", "fragment", "rest")),
        *(("bart", hiding) for hiding in ("mask", "fragment", "rest")),
        ("bert2bert", "mask"),
    )

    @pytest.mark.parametrize(("kind", "hiding"), CASES)
    def test_each_token_is_hidden_in_turn(self, kind, hiding):
        model, tokenizer = encoder_decoder(kind), framed(kind)
        expected = [question_by_question(model, tokenizer, text, hiding=hiding) for text in TEXTS]
        for batch_size in (1, 3, 256):
            scores = denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=hiding, batch_size=batch_size)
            np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert len({round(score, 2) for score in expected}) == len(TEXTS)

    @pytest.mark.parametrize(("kind", "hiding"), CASES)
    def test_a_word_is_hidden_at_once(self, kind, hiding):
        """Where the model sees only what is before a token, each token has the same probability as alone."""
        model, tokenizer = encoder_decoder(kind), framed(kind)
        scores = denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=hiding, within_word="l2r", batch_size=3)
        expected = [
            question_by_question(model, tokenizer, text, hiding=hiding, words=words)
            for text, words in zip(TEXTS, WORDS_OF, strict=True)
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        visible = denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=hiding)
        assert (np.abs(scores - visible) > 1e-4).tolist() == [True, False, True, False]

    def test_a_fragment_of_relative_positions_needs_no_text_before_it(self):
        """On T5 the token before the fragment may as well be the only one that the decoder is given."""
        model, tokenizer = encoder_decoder("t5").eval(), framed("t5")
        ids, total = tokenizer(TEXTS[0])["input_ids"], 0.0
        for place, token in enumerate(ids[:-1]):
            source = torch.tensor([[*ids[:place], 4, *ids[place + 1 :]]])
            with torch.no_grad():
                logits = model(source, decoder_input_ids=torch.tensor([[ids[place - 1] if place else 0]])).logits[
                    0, -1
                ]
            total += float(logits.log_softmax(-1)[token])
        score = denoising_log_likelihoods(model, tokenizer, TEXTS[:1], hiding="fragment")
        assert score == pytest.approx([total], rel=1e-5)

    def test_the_rest_gives_the_likelihood_of_a_text(self):
        """Over all texts of a word, the probabilities sum to one."""
        model, tokenizer = encoder_decoder("bart"), framed("bart")
        words = [word for word in WORDS if not word.startswith("##")]
        scores = denoising_log_likelihoods(model, tokenizer, words, hiding="rest")
        source = torch.tensor([[2, 3]])
        with torch.no_grad():
            masses = model.eval()(source, decoder_input_ids=torch.tensor([[2]])).logits[0, -1].softmax(-1)
        expected = masses[[tokenizer.convert_tokens_to_ids(word) for word in words]].sum()
        assert np.exp(scores).sum() == pytest.approx(float(expected), rel=1e-5)

    def test_the_way_follows_from_the_tokenizer_unless_it_is_given(self):
        for kind, default in (("t5", "sentinel"), ("bart", "mask")):
            model, tokenizer = encoder_decoder(kind), framed(kind)
            by_default = denoising_log_likelihoods(model, tokenizer, TEXTS)
            assert np.array_equal(by_default, denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=default))
            assert not np.allclose(by_default, denoising_log_likelihoods(model, tokenizer, TEXTS, hiding="rest"))

    @pytest.mark.parametrize(("kind", "hiding"), [case for case in CASES if case[0] != "bert2bert"])
    def test_the_mode_stands_before_the_text_of_the_input(self, kind, hiding):
        model, tokenizer, token = encoder_decoder(kind), framed(kind), "[NLU]" if kind == "t5" else "x9"
        mode = [tokenizer.convert_tokens_to_ids(token)]
        scores = denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=hiding, mode_token=token)
        expected = [question_by_question(model, tokenizer, text, hiding=hiding, mode=mode) for text in TEXTS]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert not np.allclose(scores, denoising_log_likelihoods(model, tokenizer, TEXTS, hiding=hiding), rtol=1e-3)

    def test_the_head_runs_at_the_hidden_tokens_only(self):
        model, shapes = encoder_decoder("bart"), []
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:-1]))
        denoising_log_likelihoods(model, framed("bart"), ["the cat sat"], batch_size=2)
        assert shapes == [(1, 2), (1, 1)]

    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_the_model_is_left_as_it_was(self, kind):
        """Dropout is off in between, and no hook stays behind."""
        model = encoder_decoder(kind).train()
        first, second = (denoising_log_likelihoods(model, framed(kind), TEXTS) for _ in range(2))
        assert np.array_equal(first, second) and all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_a_trained_model_prefers_the_sentences_of_its_language(self, kind):
        """The last word of a sentence follows from its second one, and some words lie between."""
        tokenizer, model = framed(kind), encoder_decoder(kind, trained=True).train()
        verbs, other_verb = {"x1": "x3", "x2": "x4", "x5": "x3", "x6": "x4"}, {"x3": "x4", "x4": "x3"}
        fillers = [(a, b) for a in range(10, 16) for b in range(10, 16)]
        texts = [f"the {noun} x{a} x{b} {verbs[noun]}." for noun in verbs for a, b in fillers if a != b]
        rows = torch.tensor(tokenizer(texts)["input_ids"])
        columns = range(int(kind == "bart"), rows.shape[1] - 1)
        start, sentinel = model.config.decoder_start_token_id, len(SPECIALS) + len(WORDS)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        choices = draws.integers(draws.row_keys(range(120), seed=0, stream="steps"), 32, high=len(rows))
        for step, chosen in enumerate(choices.tolist()):
            column, source, target = columns[step % len(columns)], rows[chosen].clone(), rows[chosen]
            source[:, column] = sentinel if kind == "t5" else tokenizer.mask_token_id
            if kind == "t5":
                target = torch.stack([torch.full((32,), sentinel), target[:, column]], dim=1)
            decoder = torch.cat([torch.full((32, 1), start), target[:, :-1]], dim=1)
            logits = model(source, decoder_input_ids=decoder).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        # Fillers that were not seen together in training.
        beginnings = [(f"the {noun} x{a} x{b}", verb) for noun, verb in verbs.items() for a, b in fillers if a == b]
        pairs = [
            MinimalPair(f"{words} {verb}.", f"{words} {other_verb[verb]}.", "agreement", "syntax")
            for words, verb in beginnings
        ]
        result = pair_accuracy(lambda texts: denoising_log_likelihoods(model, tokenizer, texts), pairs)
        assert result.mean > 0.9

    def test_bad_input(self):
        bart, bart_tokenizer, t5, t5_tokenizer = (
            part for kind in ("bart", "t5") for part in (encoder_decoder(kind), framed(kind))
        )
        with pytest.raises(InputError, match="BartForConditionalGeneration is an encoder-decoder: .*denoising_log"):
            pseudo_log_likelihoods(bart, bart_tokenizer, TEXTS)
        with pytest.raises(InputError, match="BertForMaskedLM has no decoder: .*pseudo_log_likelihoods"):
            denoising_log_likelihoods(masked_lm(), wordpiece(), TEXTS)
        with pytest.raises(InputError, match="hiding='sentinels'.*did you mean 'sentinel'"):
            denoising_log_likelihoods(bart, bart_tokenizer, TEXTS, hiding="sentinels")
        with pytest.raises(InputError, match="has no <extra_id_0>"):
            denoising_log_likelihoods(bart, bart_tokenizer, TEXTS, hiding="sentinel")
        with pytest.raises(InputError, match=r"mode_token='\[S2S\]' is no token"):
            denoising_log_likelihoods(t5, t5_tokenizer, TEXTS, mode_token="[S2S]")
        with pytest.raises(InputError, match="22 tokens, more than the 20 positions"):
            denoising_log_likelihoods(bart, bart_tokenizer, ["cat " * 20])
        with pytest.raises(InputError, match="24 tokens"):
            denoising_log_likelihoods(encoder_decoder("bert2bert"), bart_tokenizer, ["cat " * 22])
        assert np.isfinite(denoising_log_likelihoods(t5, t5_tokenizer, ["cat " * 60])).all()
        t5_tokenizer.mask_token = None
        with pytest.raises(InputError, match="no mask token, which hiding='fragment' needs"):
            denoising_log_likelihoods(t5, t5_tokenizer, TEXTS, hiding="fragment")
        t5.config.decoder_start_token_id = t5.generation_config.decoder_start_token_id = None
        with pytest.raises(InputError, match="set model.config.decoder_start_token_id"):
            denoising_log_likelihoods(t5, t5_tokenizer, TEXTS)


class TestAccuracy:
    PAIRS = (
        MinimalPair("aa", "a", "one", "syntax"),
        MinimalPair("a", "aa", "one", "syntax"),
        MinimalPair("aa", "a", "two", "syntax"),
        MinimalPair("a", "b", "three", "semantics"),
        MinimalPair("aaa", "b", "three", "semantics"),
        MinimalPair("b", "aaa", "three", "semantics"),
        MinimalPair("b", "aaa", "three", "semantics"),
    )

    def test_paradigms_count_alike_and_ties_one_half(self):
        result = pair_accuracy(lambda texts: np.array([len(text) for text in texts]), self.PAIRS)
        assert result.paradigms == {"one": 0.5, "two": 1.0, "three": 0.375}
        assert result.fields == {"syntax": 0.75, "semantics": 0.375}
        assert result.mean == pytest.approx((0.5 + 1.0 + 0.375) / 3)

    @pytest.mark.parametrize("kind", ["masked", "discriminator"])
    def test_an_untrained_model_guesses(self, kind):
        """On pairs of random words; within four standard errors."""
        words = draws.integers(draws.row_keys(range(600), seed=0, stream="pairs"), 8, high=40)
        texts = [" ".join(f"x{word}" for word in row) for row in words.tolist()]
        pairs = [MinimalPair(a, b, "random", "none") for a, b in zip(texts[:300], texts[300:], strict=True)]
        tokenizer = wordpiece()
        if kind == "masked":
            model = masked_lm()
            result = pair_accuracy(lambda texts: pseudo_log_likelihoods(model, tokenizer, texts), pairs)
        else:
            set_seed(0)
            model = ElectraForPreTraining(ElectraConfig(**SIZES))
            result = pair_accuracy(lambda texts: originality_scores(model, tokenizer, texts), pairs)
        assert abs(result.mean - 0.5) < 4 * 0.5 / np.sqrt(300)


class TestReading:
    def rows(self):
        return [
            {
                "sentence_good": f"Good {i}.",
                "sentence_bad": f"Bad {i}.",
                "UID": f"p{i % 2}",
                "field": "syntax",
                "pairID": i,
            }
            for i in range(6)
        ]

    def test_json_lines_compressed_or_not(self, tmp_path):
        text = "".join(json.dumps(row) + "\n" for row in self.rows())
        (tmp_path / "a.jsonl").write_text(text)
        (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(text.encode()))
        plain, packed = read_minimal_pairs(tmp_path / "a.jsonl"), read_minimal_pairs(tmp_path / "b.jsonl.xz")
        assert plain == packed and len(plain) == 6
        assert plain[3] == MinimalPair("Good 3.", "Bad 3.", "p1", "syntax")
        assert len(read_minimal_pairs(tmp_path)) == 12

    def test_the_first_of_each_paradigm(self, tmp_path):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        limited = read_minimal_pairs(tmp_path / "a.jsonl", limit=2)
        assert [pair.good for pair in limited] == ["Good 0.", "Good 1.", "Good 2.", "Good 3."]

    def test_a_field_of_two_spellings_is_one(self, tmp_path):
        spellings = ("syntax/semantics", "syntax_semantics")
        rows = [row | {"field": spellings[i % 2]} for i, row in enumerate(self.rows())]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert {pair.field for pair in read_minimal_pairs(tmp_path)} == {"syntax_semantics"}

    @pytest.mark.parametrize(
        ("change", "message"), [({"sentence_bad": None}, "empty entries .*5 of sentence_bad"), ({"UID": 7}, "'UID'")]
    )
    def test_a_row_that_lacks_an_entry(self, tmp_path, change, message):
        rows = self.rows()
        rows[2] |= change
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=message):
            read_minimal_pairs(tmp_path / "a.jsonl")

    def test_a_column_that_is_not_there(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b", "UID": "c"}\n')
        with pytest.raises(InputError, match="'field'"):
            read_minimal_pairs(tmp_path / "a.jsonl")
