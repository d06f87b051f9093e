"""Scores of encoder-decoders and of causal language models against the models' own logits, one token at a time."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    XLNetConfig,
)

from helpers.scored_texts import (
    DECODERS,
    SIZES,
    SPECIALS,
    TEXTS,
    WORDS,
    decoder,
    denoiser,
    detector,
    encoder_decoder,
    framed,
    masked_lm,
    unframed,
    wordpiece,
)
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import (
    MinimalPair,
    causal_log_likelihoods,
    denoising_log_likelihoods,
    pair_accuracy,
    pseudo_log_likelihoods,
)

# Word of each token of a text, special tokens left out.
WORDS_OF = [[0, 0, 0, 1, 2], [0, 1], [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6], [0, 1, 2]]


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
        choices = draws.integers(draws.row_keys(range(120), seed=0, stream="steps"), 16, high=len(rows))
        for step, chosen in enumerate(choices.tolist()):
            column, source, target = columns[step % len(columns)], rows[chosen].clone(), rows[chosen]
            source[:, column] = sentinel if kind == "t5" else tokenizer.mask_token_id
            if kind == "t5":
                target = torch.stack([torch.full((16,), sentinel), target[:, column]], dim=1)
            decoder = torch.cat([torch.full((16, 1), start), target[:, :-1]], dim=1)
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


@torch.no_grad()
def token_by_token(model, ids, *, known):
    """The log-likelihood of all but the first `known` tokens, each from its own forward pass over those before it."""
    total = 0.0
    for place in range(known, len(ids)):
        logits = model.eval()(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


class TestCausal:
    @pytest.mark.parametrize("kind", DECODERS)
    def test_each_token_follows_on_those_before_it(self, kind):
        model, tokenizer = decoder(kind), unframed(bos_token="[CLS]", eos_token="[SEP]")
        begin = 3 if kind == "transformer_xl" else 2
        expected = [token_by_token(model, [begin, *tokenizer(text)["input_ids"]], known=1) for text in TEXTS]
        for batch_size in (1, 3, 256):
            scores = causal_log_likelihoods(model, tokenizer, TEXTS, batch_size=batch_size)
            np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert len({round(score, 2) for score in expected}) == len(TEXTS)

    @pytest.mark.parametrize(
        ("names", "begin"),
        [
            ({"bos_token": "[CLS]", "eos_token": "[SEP]"}, [2]),
            ({"eos_token": "[SEP]", "sep_token": "[MASK]"}, [3]),
            ({"sep_token": "[SEP]", "cls_token": "[CLS]"}, []),
        ],
    )
    def test_what_the_first_token_follows_on(self, names, begin):
        model, tokenizer = decoder(), unframed(**names)
        scores = causal_log_likelihoods(model, tokenizer, TEXTS)
        expected = [token_by_token(model, begin + tokenizer(text)["input_ids"], known=1) for text in TEXTS]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)

    @pytest.mark.parametrize("names", [{}, {"bos_token": "[MASK]", "eos_token": "[MASK]"}])
    def test_a_token_that_the_tokenizer_puts_first_is_not_doubled(self, names):
        """And those that it puts behind are not scored."""
        model, tokenizer = decoder(), wordpiece()
        for name, token in names.items():
            setattr(tokenizer, name, token)
        expected = [token_by_token(model, tokenizer(text)["input_ids"][:-1], known=1) for text in TEXTS]
        np.testing.assert_allclose(causal_log_likelihoods(model, tokenizer, TEXTS), expected, rtol=1e-5)

    def test_several_tokens_may_stand_first(self):
        model, tokenizer = decoder(), unframed(bos_token="[CLS]")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] [MASK] $A [SEP]", special_tokens=[("[CLS]", 2), ("[MASK]", 4), ("[SEP]", 3)]
        )
        expected = [token_by_token(model, tokenizer(text)["input_ids"][:-1], known=2) for text in TEXTS]
        np.testing.assert_allclose(causal_log_likelihoods(model, tokenizer, TEXTS), expected, rtol=1e-5)

    def test_a_model_with_a_memory_has_read_documents_with_a_separator_between_them(self):
        model, tokenizer = decoder("transformer_xl"), wordpiece()
        expected = [token_by_token(model, [3, *tokenizer(text)["input_ids"][1:-1]], known=1) for text in TEXTS]
        np.testing.assert_allclose(causal_log_likelihoods(model, tokenizer, TEXTS), expected, rtol=1e-5)
        tokenizer.eos_token = "[PAD]"
        expected = [token_by_token(model, [0, *tokenizer(text)["input_ids"][1:-1]], known=1) for text in TEXTS]
        np.testing.assert_allclose(causal_log_likelihoods(model, tokenizer, TEXTS), expected, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["gpt2", "llama", "transformer_xl"])
    def test_the_score_is_the_loss_of_the_model_itself(self, kind):
        model, tokenizer = decoder(kind).eval(), unframed(bos_token="[SEP]", eos_token="[SEP]")
        scores = causal_log_likelihoods(model, tokenizer, TEXTS)
        for text, score in zip(TEXTS, scores, strict=True):
            ids = torch.tensor([[3, *tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                loss = float(model(input_ids=ids, labels=ids).loss)
            assert score == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-5)

    def test_over_all_texts_of_a_token_the_probabilities_sum_to_one(self):
        model, tokenizer = decoder(), unframed(bos_token="[CLS]")
        words = [word for word in WORDS if not word.startswith("##")]
        scores = causal_log_likelihoods(model, tokenizer, words)
        with torch.no_grad():
            masses = model.eval()(torch.tensor([[2]])).logits[0, -1].softmax(-1)
        rest = masses.sum() - masses[[tokenizer.convert_tokens_to_ids(word) for word in words]].sum()
        assert np.exp(scores).sum() + float(rest) == pytest.approx(1, rel=1e-5)

    def test_the_side_of_padding_of_the_tokenizer_makes_no_difference(self):
        for kind in ("gpt2", "llama"):
            model, tokenizer = decoder(kind), wordpiece()
            right = causal_log_likelihoods(model, tokenizer, TEXTS)
            tokenizer.padding_side = "left"
            assert np.array_equal(causal_log_likelihoods(model, tokenizer, TEXTS), right)

    @pytest.mark.parametrize("kind", ["gpt2", "opt", "transformer_xl"])
    def test_the_head_runs_at_the_tokens_before_a_target_only(self, kind):
        model, shapes = decoder(kind), []
        model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:-1]))
        causal_log_likelihoods(model, unframed(eos_token="[SEP]"), ["the cat sat .", "the"], batch_size=2)
        assert shapes[-1].numel() == 5, "of two rows with four columns"

    def test_as_many_tokens_fit_as_there_are_positions(self):
        """The last one is predicted, not read."""
        model, tokenizer = decoder(), unframed(bos_token="[CLS]")
        assert np.isfinite(causal_log_likelihoods(model, tokenizer, ["cat " * 20])).all()
        with pytest.raises(InputError, match="21 tokens, more than the 20 positions"):
            causal_log_likelihoods(model, tokenizer, ["the", "cat " * 21])

    @pytest.mark.parametrize("kind", ["gpt2", "bart"])
    def test_the_model_is_left_as_it_was(self, kind):
        """Dropout is off in between, and no hook stays behind."""
        model = decoder(kind).train()
        first, second = (causal_log_likelihoods(model, wordpiece(), TEXTS) for _ in range(2))
        assert np.array_equal(first, second) and all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())

    def test_bad_input(self):
        tokenizer = wordpiece()
        refusals = {
            "BertForMaskedLM sees the tokens that follow: score it by pseudo_log_likelihoods": masked_lm(),
            "BertLMHeadModel sees .* or is_decoder=True": AutoModelForCausalLM.from_config(BertConfig(**SIZES)),
            "XLNetLMHeadModel sees .*score_permutations": AutoModelForCausalLM.from_config(
                XLNetConfig(vocab_size=SIZES["vocab_size"], d_model=16, n_layer=2, n_head=2, d_inner=32)
            ),
            "BartForConditionalGeneration is an encoder-decoder: score it by denoising_log": denoiser(),
            "GPT2Model does not predict tokens: open it by AutoModelForCausalLM": AutoModel.from_config(
                DECODERS["gpt2"]()
            ),
            "ElectraForPreTraining does not predict tokens: .*originality_scores": detector(),
        }
        for words, model in refusals.items():
            with pytest.raises(InputError, match=words):
                causal_log_likelihoods(model, tokenizer, TEXTS)
        tokenizer.add_tokens([f"y{i}" for i in range(9)])
        with pytest.raises(InputError, match="embeds only 54"):
            causal_log_likelihoods(decoder(), tokenizer, TEXTS)
