"""Likelihoods of continuations against plain forward passes, one text and one token at a time."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, XLNetConfig, XLNetLMHeadModel, set_seed

from helpers.scored_texts import (
    SPECIALS,
    WORDS,
    decoder,
    encoder_decoder,
    framed,
    masked_lm,
    unframed,
    wordpiece,
)
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.likelihood import (
    BidirectionalLM,
    FewShotTask,
    LikelihoodScorer,
    Request,
    cloze_accuracy,
    few_shot_accuracy,
    rolling_perplexity,
    score_options,
)
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    denoising_log_likelihoods,
    pseudo_log_likelihoods,
)

PAIRS = [
    ("the cat", " sat unhappiness"),
    ("the cats ", "sat."),
    ("", "the dog sat"),
    ("the dog x1 x2 x3 x4", " x5"),
    ("the cat", " dog"),
    ("the cat", " sat"),
]
# What each continuation is in tokens.
TARGETS = [["sat", "un", "##happi", "##ness"], ["sat", "."], ["the", "dog", "sat"], ["x5"], ["dog"], ["sat"]]
CONTEXTS = [
    ["the", "cat"],
    ["the", "cat", "##s"],
    [],
    ["the", "dog", "x1", "x2", "x3", "x4"],
    ["the", "cat"],
    ["the", "cat"],
]
LONG = "the cat sat . the dogs sat unhappiness x1 x2 x3 x4 x5 x6 x7 x8 the cats ."


def ids_of(tokenizer, tokens):
    return tokenizer.convert_tokens_to_ids(tokens)


def causal_tokenizer(kind):
    return unframed(eos_token="x39") if kind == "gpt2" else framed("bart")


@torch.no_grad()
def next_tokens(model, context, targets):
    """Log-probabilities of targets after a context by one forward pass of one row, and which are the most probable."""
    logits = model.eval()(torch.tensor([context + targets])).logits[0].double().log_softmax(-1)[len(context) - 1 : -1]
    return [float(row[token]) for row, token in zip(logits, targets, strict=True)], logits.argmax(
        -1
    ).tolist() == targets


@torch.no_grad()
def masked_tokens(model, ids, columns, hidden=None):
    """Log-probability of each column's token where it alone is masked, or what `hidden` says."""
    found = []
    for column in columns:
        row = list(ids)
        for other in (hidden or {}).get(column, [column]):
            row[other] = SPECIALS.index("[MASK]")
        logits = model.eval()(torch.tensor([row])).logits[0, column]
        found.append(float(logits.double().log_softmax(-1)[ids[column]]))
    return found


class TestCausal:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_sums_are_those_of_plain_forward_passes(self, kind):
        """GPT-2's tokenizer begins no text, so that only an empty context has a token before it; Llama's begins each."""
        model, tokenizer = decoder(kind), causal_tokenizer(kind)
        begin = ids_of(tokenizer, ["x39"] if kind == "gpt2" else ["[CLS]"])
        expected = []
        for context, targets in zip(CONTEXTS, TARGETS, strict=True):
            before = begin if kind == "llama" or not context else []
            expected.append(next_tokens(model, before + ids_of(tokenizer, context), ids_of(tokenizer, targets)))
        for batch_size in (1, 4, 64):
            scores = LikelihoodScorer(model, tokenizer, batch_size=batch_size).score(PAIRS)
            np.testing.assert_allclose(scores.log_likelihoods, [sum(values) for values, _ in expected], rtol=1e-5)
            assert scores.is_greedy.tolist() == [is_greedy for _, is_greedy in expected]
            assert scores.num_tokens.tolist() == list(map(len, TARGETS))

    def test_the_greedy_continuation_is_the_one_that_is_marked(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        ids = ids_of(tokenizer, ["the", "cat"])
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        request = Request(np.array(ids[:2]), np.array(ids[2:]), np.zeros(3, dtype=np.int64))
        others = [
            request._replace(continuation=np.array([*ids[2:4], 9])),
            request._replace(continuation=np.array([9, *ids[3:]])),
        ]
        scores = LikelihoodScorer(model, tokenizer).score_tokens([request, *others])
        assert scores.is_greedy.tolist() == [True, False, False]

    def test_a_whole_text_scores_as_a_minimal_pair_does(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        texts = ["the cats sat.", "the dog"]
        scores = LikelihoodScorer(model, tokenizer).score([("", text) for text in texts])
        np.testing.assert_allclose(scores.log_likelihoods, causal_log_likelihoods(model, tokenizer, texts), rtol=1e-6)

    def test_equal_inputs_are_read_once(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        scorer, rows = LikelihoodScorer(model, tokenizer), []
        model.register_forward_pre_hook(
            lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
        )
        scorer.score([("the cat", " dog"), ("the cat", " sat"), ("the cat", " sat"), ("the dog", " sat")])
        assert rows == [2]

    def test_a_context_that_is_too_long_loses_its_first_tokens(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        context = [f"x{i % 30}" for i in range(30)]
        scores = LikelihoodScorer(model, tokenizer).score([(" ".join(context), " sat .")])
        # 20 positions read all but the last token.
        expected, _ = next_tokens(model, ids_of(tokenizer, context[-19:]), ids_of(tokenizer, ["sat"]))
        with torch.no_grad():
            row = (
                model(torch.tensor([ids_of(tokenizer, [*context[-19:], "sat"])]))
                .logits[0, -1]
                .double()
                .log_softmax(-1)
            )
        last = float(row[tokenizer.convert_tokens_to_ids(".")])
        assert scores.log_likelihoods[0] == pytest.approx(expected[0] + last, rel=1e-5)

    def test_what_cannot_be_scored_is_refused(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        scorer = LikelihoodScorer(model, tokenizer)
        with pytest.raises(InputError, match="has no token of its own"):
            scorer.score([("the cat", "")])
        with pytest.raises(InputError, match="has no token of its own"):
            scorer.score([("zeb", "ra")])
        with pytest.raises(InputError, match="has 21 tokens, more than the model reads"):
            scorer.score([("the", " x1" * 21)])
        assert np.isfinite(scorer.score([("the", " x1" * 20)]).log_likelihoods).all()
        with pytest.raises(InputError, match="no token that begins a text"):
            LikelihoodScorer(model, unframed()).score([("", "the cat")])
        assert not len(scorer.score([]).log_likelihoods)


class TestMasked:
    def test_each_token_of_the_continuation_is_masked_alone(self):
        model, tokenizer = masked_lm(), wordpiece()
        expected = []
        for context, targets in zip(CONTEXTS, TARGETS, strict=True):
            ids = ids_of(tokenizer, ["[CLS]", *context, *targets, "[SEP]"])
            columns = range(1 + len(context), len(ids) - 1)
            expected.append(sum(masked_tokens(model, ids, columns)))
        for batch_size in (1, 64):
            scores = LikelihoodScorer(model, tokenizer, batch_size=batch_size).score(PAIRS)
            np.testing.assert_allclose(scores.log_likelihoods, expected, rtol=1e-5)

    def test_the_end_of_a_word_may_be_hidden(self):
        model, tokenizer = masked_lm(), wordpiece()
        ids = ids_of(tokenizer, ["[CLS]", "the", "cat", "sat", "un", "##happi", "##ness", "[SEP]"])
        expected = sum(masked_tokens(model, ids, range(3, 7), hidden={4: [4, 5, 6], 5: [5, 6]}))
        scores = LikelihoodScorer(model, tokenizer, within_word="l2r").score(PAIRS[:1])
        assert scores.log_likelihoods[0] == pytest.approx(expected, rel=1e-5)
        visible = LikelihoodScorer(model, tokenizer).score(PAIRS[:1])
        assert abs(scores.log_likelihoods[0] - visible.log_likelihoods[0]) > 1e-3

    def test_greedy_is_the_most_probable_token_of_each_mask(self):
        model, tokenizer = masked_lm(), wordpiece()
        with torch.no_grad():
            ids = torch.tensor([ids_of(tokenizer, ["[CLS]", "the", "cat", "[MASK]", "[SEP]"])])
            best = int(model.eval()(ids).logits[0, 3].argmax())
        before = np.array(ids_of(tokenizer, ["the", "cat"]))
        requests = [Request(before, np.array([token]), np.zeros(1, np.int64)) for token in (best, best - 1)]
        assert LikelihoodScorer(model, tokenizer).score_tokens(requests).is_greedy.tolist() == [True, False]

    def test_a_text_without_context_scores_as_a_minimal_pair_does(self, monkeypatch):
        model, tokenizer = masked_lm(), wordpiece()
        texts = ["unhappiness sat.", "the cats sat unhappiness the dogs.", "the"]
        # Copies are made portion by portion.
        monkeypatch.setattr("hf_pretrain.evaluation.likelihood.scorer._MOST_COPIED", 50)
        scores = LikelihoodScorer(model, tokenizer, within_word="l2r").score([("", text) for text in texts])
        expected = pseudo_log_likelihoods(model, tokenizer, texts, within_word="l2r")
        np.testing.assert_allclose(scores.log_likelihoods, expected, rtol=1e-6)


class TestEncoderDecoder:
    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_the_decoder_writes_the_continuation_after_the_context_in_the_encoder(self, kind):
        model, tokenizer = encoder_decoder(kind), framed(kind)
        start, expected = model.config.decoder_start_token_id, []
        for context, targets in zip(CONTEXTS, TARGETS, strict=True):
            source = ids_of(tokenizer, [*([] if kind == "t5" else ["[CLS]"]), *context, "[SEP]"])
            ids = ids_of(tokenizer, targets)
            with torch.no_grad():
                output = model.eval()(torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *ids[:-1]]]))
            rows = output.logits[0].double().log_softmax(-1)
            expected.append(sum(float(row[token]) for row, token in zip(rows, ids, strict=True)))
        for batch_size in (1, 4):
            scores = LikelihoodScorer(model, tokenizer, batch_size=batch_size).score(PAIRS)
            np.testing.assert_allclose(scores.log_likelihoods, expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("kind", "hiding"), [("t5", "sentinel"), ("t5", "rest"), ("bart", "mask"), ("bart", "fragment")]
    )
    def test_hidden_tokens_add_up_to_those_of_a_minimal_pair(self, kind, hiding):
        model, tokenizer = encoder_decoder(kind), framed(kind)
        scorer = LikelihoodScorer(model, tokenizer, hiding=hiding)
        whole, context = "the cats sat unhappiness.", "the cats"
        parts = scorer.score([("", whole), (context, " sat unhappiness.")])
        expected = denoising_log_likelihoods(model, tokenizer, [whole], hiding=hiding)
        assert parts.log_likelihoods[0] == pytest.approx(expected[0], rel=1e-6)
        # The tokens of the context are read, and not scored.
        begin = scorer.requests([("", whole)])[0]
        first = begin._replace(continuation=begin.continuation[:3], words=begin.words[:3])
        assert parts.num_tokens.tolist() == [8, 5] and abs(parts.log_likelihoods[1]) < abs(parts.log_likelihoods[0])
        if hiding == "rest":
            heads = scorer.score_tokens([first])
            assert heads.log_likelihoods[0] + parts.log_likelihoods[1] == pytest.approx(expected[0], rel=1e-5)

    def test_the_mode_stands_before_the_context(self):
        model, tokenizer = encoder_decoder("t5"), framed("t5")
        source = torch.tensor([ids_of(tokenizer, ["[NLU]", "the", "cat", "[SEP]"])])
        with torch.no_grad():
            row = model.eval()(source, decoder_input_ids=torch.tensor([[0]])).logits[0, 0].double().log_softmax(-1)
        scores = LikelihoodScorer(model, tokenizer, mode_token="[NLU]").score([("the cat", " sat")])
        assert scores.log_likelihoods[0] == pytest.approx(float(row[tokenizer.convert_tokens_to_ids("sat")]), rel=1e-5)


def xlnet():
    set_seed(0)
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "initializer_range": 0.3}
    return XLNetLMHeadModel(XLNetConfig(vocab_size=len(SPECIALS) + len(WORDS), **sizes))


def test_a_permutation_model_sees_the_context_and_what_is_left_of_a_token():
    model, tokenizer = xlnet().eval(), wordpiece()
    ids = ids_of(tokenizer, ["[CLS]", "the", "cat", "sat", "un", "##happi", "##ness", "[SEP]"])
    columns, expected, greedy = [3, 4, 5, 6], [], True
    for column in columns:
        # Of stock XLNet a one hides a token; the query of a column sees what comes before it and the special tokens.
        hidden = torch.zeros(1, len(ids), len(ids))
        for row in range(len(ids)):
            hidden[0, row, [other for other in columns if other > (row if row in columns else 2)]] = 1
            if row in columns:
                hidden[0, row, row] = 1
        mapping = torch.zeros(1, 1, len(ids))
        mapping[0, 0, column] = 1
        with torch.no_grad():
            row = model(torch.tensor([ids]), perm_mask=hidden, target_mapping=mapping).logits[0, 0]
        expected.append(float(row.double().log_softmax(-1)[ids[column]]))
        greedy &= int(row.argmax()) == ids[column]
    for batch_size in (1, 8):
        scores = LikelihoodScorer(model, tokenizer, batch_size=batch_size).score(PAIRS)
        assert scores.log_likelihoods[0] == pytest.approx(sum(expected), rel=1e-4)
        assert bool(scores.is_greedy[0]) == greedy


class Half(torch.nn.Module):
    """A recurrent language model of one direction."""

    def __init__(self, seed, *, is_backward):
        super().__init__()
        set_seed(seed)
        size = len(SPECIALS) + len(WORDS)
        self.table, self.rnn = torch.nn.Embedding(size, 8), torch.nn.GRU(8, 8, batch_first=True)
        self.head, self.is_backward = torch.nn.Linear(8, size), is_backward
        torch.nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, ids, mask):
        states = torch.zeros(*ids.shape, 8)
        for row, length in enumerate(mask.sum(1).tolist()):
            read = self.table(ids[row, :length])
            read = read.flip(0) if self.is_backward else read
            found = self.rnn(read[None])[0][0]
            states[row, :length] = found.flip(0) if self.is_backward else found
        return self.head(states)


def test_two_directions_are_averaged():
    forward, backward, tokenizer = Half(0, is_backward=False), Half(1, is_backward=True), wordpiece()
    ids = ids_of(tokenizer, ["[CLS]", "the", "cat", "##s", "sat", ".", "[SEP]"])
    with torch.no_grad():
        left, right = (
            half(torch.tensor([ids]), torch.ones(1, 7, dtype=torch.long)).double().log_softmax(-1)[0]
            for half in (forward, backward)
        )
    expected = sum(float(left[column - 1, ids[column]] + right[column + 1, ids[column]]) / 2 for column in (4, 5))
    model = BidirectionalLM(forward, backward)
    for batch_size in (1, 8):
        scores = LikelihoodScorer(model, tokenizer, batch_size=batch_size).score(PAIRS)
        assert scores.log_likelihoods[1] == pytest.approx(expected, rel=1e-5)
    # Behind the last token the backward model reads the separator alone.
    with torch.no_grad():
        alone = backward(torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.long)).double().log_softmax(-1)[0, 0]
    mean = (left[3] + alone) / 2
    best = int(mean.argmax())
    request = Request(np.array(ids[1:4]), np.array([best]), np.zeros(1, np.int64))
    scores = LikelihoodScorer(model, tokenizer).score_tokens(
        [request, request._replace(continuation=np.array([best - 1]))]
    )
    assert scores.is_greedy.tolist() == [True, False]
    np.testing.assert_allclose(scores.log_likelihoods, [float(mean[best]), float(mean[best - 1])], rtol=1e-5)


class TestKinds:
    def test_the_kind_follows_from_the_class(self):
        tokenizer = framed("t5")
        models = {
            "causal": (decoder("bert"), wordpiece()),
            "masked": (masked_lm(), wordpiece()),
            "permutation": (xlnet(), wordpiece()),
            "encoder-decoder": (encoder_decoder("t5"), tokenizer),
            "bidirectional": (BidirectionalLM(Half(0, is_backward=False), Half(1, is_backward=True)), wordpiece()),
        }
        for kind, (model, own) in models.items():
            assert LikelihoodScorer(model, own).kind == kind

    def test_a_masked_model_may_be_read_as_a_permutation_model(self):
        scorer = LikelihoodScorer(masked_lm(), wordpiece(), kind="permutation")
        assert np.isfinite(scorer.score(PAIRS).log_likelihoods).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "causal"}, "sees the tokens that follow"),
            ({"kind": "encoder-decoder"}, "is no encoder-decoder"),
            ({"kind": "bidirectional"}, "give a BidirectionalLM"),
            ({"kind": "autoregressive"}, "must be one of causal"),
            ({"hiding": "mask"}, "hiding='mask' is for an encoder-decoder"),
            ({"mode_token": "[NLU]"}, "mode_token='\\[NLU\\]' is for an encoder-decoder"),
            ({"kind": "permutation", "within_word": "l2r"}, "within_word='l2r' is for masked tokens"),
            ({"batch_size": 0}, "batch_size=0"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            LikelihoodScorer(masked_lm(BertConfig), wordpiece(), **options)


class TestRolling:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_text_that_fits_is_read_at_once(self, kind):
        model, tokenizer = decoder(kind), causal_tokenizer(kind)
        text = "the cat sat . the dogs sat unhappiness"
        begin = ids_of(tokenizer, ["x39"] if kind == "gpt2" else ["[CLS]"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected, _ = next_tokens(model, begin, ids)
        for batch_size in (1, 8):
            found = rolling_perplexity(model, tokenizer, text, batch_size=batch_size)
            assert found.nats == pytest.approx(-sum(expected), rel=1e-5)
            assert (found.num_tokens, found.num_words, found.num_bytes) == (len(ids), 8, len(text))
            assert found.perplexity == pytest.approx(math.exp(-sum(expected) / len(ids)), rel=1e-5)
            assert found.word_perplexity == pytest.approx(math.exp(-sum(expected) / 8), rel=1e-5)
            assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte)

    @pytest.mark.parametrize("window", [6, 9])
    def test_windows_overlap_by_what_the_stride_leaves(self, window):
        """Written out: the tokens of a window follow on the `window` tokens before its last one."""
        model, tokenizer = decoder(), unframed(eos_token="x39")
        row = [*ids_of(tokenizer, ["x39"]), *tokenizer(LONG)["input_ids"]]
        for stride in range(1, window + 1):
            expected, begin, end = 0.0, 1, window + 1
            while begin < len(row):
                end = min(end, len(row))
                first = max(0, end - window - 1)
                assert begin == 1 or begin - first >= window - stride
                values, _ = next_tokens(model, row[first:begin], row[begin:end])
                expected, begin, end = expected + sum(values), end, end + stride
            for batch_size in (1, 64):
                found = rolling_perplexity(model, tokenizer, LONG, window=window, stride=stride, batch_size=batch_size)
                assert found.num_tokens == len(row) - 1
                assert found.nats == pytest.approx(-expected, rel=1e-5)

    @pytest.mark.parametrize("kind", ["masked", "t5", "xlnet"])
    def test_every_kind_scores_each_token_once(self, kind):
        models = {"masked": masked_lm, "t5": lambda: encoder_decoder("t5"), "xlnet": xlnet}
        tokenizer = framed("t5") if kind == "t5" else wordpiece()
        model, texts = models[kind](), [LONG, "the cat", ""]
        num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        for stride in (1, 3, 8):
            found = [
                rolling_perplexity(model, tokenizer, texts, window=10, stride=stride, batch_size=size)
                for size in (1, 64)
            ]
            assert found[0].num_tokens == num_tokens and found[0].log_likelihoods[2] == 0
            np.testing.assert_allclose(found[0].log_likelihoods, found[1].log_likelihoods, rtol=1e-4)
        whole = LikelihoodScorer(model, tokenizer).score([("", "the cat")])
        assert found[0].log_likelihoods[1] == pytest.approx(whole.log_likelihoods[0], rel=1e-5)

    def test_a_window_of_a_masked_model_counts_its_special_tokens(self):
        model, tokenizer = masked_lm(), wordpiece()
        words = ["the", "cat", "sat", "x1", "x2", "x3"]
        found = rolling_perplexity(model, tokenizer, " ".join(words), window=6, stride=2)
        frames = (["[CLS]", *words[:4], "[SEP]"], range(1, 5)), (["[CLS]", *words[2:], "[SEP]"], range(3, 5))
        expected = sum(sum(masked_tokens(model, ids_of(tokenizer, ids), columns)) for ids, columns in frames)
        assert found.nats == pytest.approx(-expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"window": 21}, "window=21"), ({"window": 8, "stride": 9}, "stride=9"), ({"stride": 0}, "stride=0")],
    )
    def test_windows_that_do_not_fit_are_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            rolling_perplexity(decoder(), unframed(eos_token="x39"), LONG, **options)

    def test_blank_texts_are_refused(self):
        with pytest.raises(InputError, match="no text to score"):
            rolling_perplexity(decoder(), unframed(eos_token="x39"), ["", " "])


class TestOptions:
    def test_normalisations_by_hand(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        prompts, options = ["the cat", "the dog sat"], [["sat", "unhappiness"], ["x1", "x2 x3", "cats"]]
        blanks = [["x7 cat", "x8 cat"], ["x7 sat", "x8 sat"]]
        scores = score_options(model, tokenizer, prompts, options, unconditional="x9", content_free=blanks)
        for number, (prompt, own) in enumerate(zip(prompts, options, strict=True)):

            def sums(context, own=own):
                parts = [
                    next_tokens(model, tokenizer(context)["input_ids"], tokenizer(option)["input_ids"])[0]
                    for option in own
                ]
                return np.array([sum(part) for part in parts]), np.array([len(part) for part in parts])

            total, counts = sums(prompt)
            np.testing.assert_allclose(scores["sum"][number], total, rtol=1e-5)
            np.testing.assert_allclose(scores["tokens"][number], total / counts, rtol=1e-5)
            np.testing.assert_allclose(scores["bytes"][number], total / [len(option) for option in own], rtol=1e-5)
            np.testing.assert_allclose(scores["unconditional"][number], total - sums("x9")[0], rtol=1e-4, atol=1e-5)
            shares = np.mean(
                [np.exp(found) / np.exp(found).sum() for found in (sums(text)[0] for text in blanks[number])], 0
            )
            calibrated = np.exp(total) / np.exp(total).sum() / shares
            np.testing.assert_allclose(np.exp(scores["calibrated"][number]), calibrated, rtol=1e-4)

    def test_options_of_all_prompts_are_needed(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        with pytest.raises(InputError, match="options has 1 entries for 2 prompts"):
            score_options(model, tokenizer, ["the", "cat"], [["sat"]])
        with pytest.raises(InputError, match="options\\[1\\] is empty"):
            score_options(model, tokenizer, ["the", "cat"], [["sat"], []])
        assert set(score_options(model, tokenizer, ["the"], [["sat"]], unconditional=None)) == {
            "sum",
            "tokens",
            "bytes",
        }


TRAIN = [{"text": f"x{i}", "label": i % 2} for i in range(12)]


class TestFewShot:
    def test_the_prompt_has_the_examples_with_their_answers(self):
        task = FewShotTask(
            template="{text} is", options=["cat", "dog"], train=TRAIN[:1], shots=1, description="the", separator=" . "
        )
        assert task.prompt({"text": "x5", "label": 1}, 0) == "thex0 is cat . x5 is"
        assert task.prompt({"text": "x5", "label": 1}, 0, content="") == "thex0 is cat .  is"
        own = FewShotTask(template="{text}", options="endings", label="gold")
        assert own.choices({"text": "a", "endings": ["b", "c"], "gold": "c"}) == ["b", "c"]
        assert own.answer({"text": "a", "endings": ["b", "c"], "gold": "c"}) == 1

    def test_examples_are_drawn_by_seed_and_number_and_never_the_example_itself(self):
        task = FewShotTask(template="{text}", options=["cat", "dog"], train=TRAIN, shots=11)
        for number, example in enumerate(TRAIN):
            drawn = task.drawn(example, number)
            assert example not in drawn and len({shot["text"] for shot in drawn}) == 11
        few = [
            FewShotTask(template="{text}", options=["cat", "dog"], train=TRAIN, shots=3, seed=seed)
            for seed in (0, 0, 1)
        ]
        prompts = [[task.prompt({"text": "x", "label": 0}, number) for number in range(20)] for task in few]
        assert prompts[0] == prompts[1]
        assert len(set(prompts[0])) > 15 and len(set(prompts[0]) & set(prompts[2])) < 5
        # Each example is drawn about as often as any other.
        counts = np.zeros(12)
        for number in range(400):
            for shot in few[0].drawn({"text": "x", "label": 0}, number):
                counts[int(shot["text"][1:])] += 1
        assert counts.sum() == 1200 and (np.abs(counts - 100) < 40).all()

    def test_a_task_that_the_model_knows_is_solved(self):
        tokenizer, answers = unframed(eos_token="x39"), ["cat", "dog"]
        examples = [{"text": f"x{i}", "label": i % 2} for i in range(12, 30)]
        model = trained_decoder(tokenizer, [(f"x{i}", answers[i % 2]) for i in range(30)])
        task = FewShotTask(template="{text}", options=answers, train=TRAIN, shots=2, separator=" . ")
        found = few_shot_accuracy(model, tokenizer, task, examples, unconditional=None, content_free=("x1", "x2"))
        # A word of each kind in place of the content: no option is likelier than the other.
        assert found.accuracy == dict.fromkeys(("sum", "tokens", "bytes", "calibrated"), 1.0)
        assert found.labels.tolist() == [i % 2 for i in range(12, 30)]
        wrong = [example | {"label": 1 - example["label"]} for example in examples]
        assert few_shot_accuracy(model, tokenizer, task, wrong).accuracy["sum"] == 0

    def test_tasks_that_cannot_be_posed_are_refused(self):
        model, tokenizer = decoder(), unframed(eos_token="x39")
        with pytest.raises(InputError, match="shots=3 but train has 2 examples"):
            FewShotTask(template="{text}", options=["cat"], train=TRAIN[:2], shots=3)
        task = FewShotTask(template="{text}", options=["cat", "dog"], train=TRAIN[:2], shots=2)
        with pytest.raises(InputError, match="no column 'text'.*did you mean 'test'"):
            task.prompt({"test": "x1", "label": 0}, 0)
        with pytest.raises(InputError, match="only 1 other examples"):
            task.prompt(TRAIN[0], 0)
        with pytest.raises(InputError, match="label=2 is none of the options"):
            few_shot_accuracy(model, tokenizer, task, [{"text": "x1", "label": 2}])
        with pytest.raises(InputError, match="examples is empty"):
            few_shot_accuracy(model, tokenizer, task, [])


def trained_decoder(tokenizer, pairs):
    """A decoder that has learned which word follows on which, three pairs in a row, other ones in each step."""
    model = decoder().train()
    ids = torch.tensor([tokenizer(f"{first} {second} .")["input_ids"] for first, second in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        rows = [draws.permutation(len(ids), seed=0, epoch=step, stream=f"pairs {place}") for place in range(3)]
        batch = torch.cat([ids[part] for part in rows], dim=1)
        logits = model(batch).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_last_word_is_all_of_its_tokens():
    model, tokenizer = decoder(), unframed(eos_token="x39")
    expected = [
        next_tokens(model, ids_of(tokenizer, context), ids_of(tokenizer, targets))
        for context, targets in ((["the", "cat"], ["un", "##happi", "##ness"]), (["dog"], ["cat", "##s", "."]))
    ]
    found = cloze_accuracy(model, tokenizer, ["the cat  unhappiness ", "dog\ncats."])
    np.testing.assert_allclose(found.log_likelihoods, [sum(values) for values, _ in expected], rtol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-np.mean([sum(values) for values, _ in expected])), rel=1e-5)
    assert found.accuracy == np.mean([is_greedy for _, is_greedy in expected])
    with pytest.raises(InputError, match="passages\\[0\\]='the' has fewer than two words"):
        cloze_accuracy(model, tokenizer, ["the"])


def test_a_greedy_last_word_counts():
    model, tokenizer = decoder(), unframed(eos_token="x39")
    with torch.no_grad():
        best = int(model.eval()(torch.tensor([ids_of(tokenizer, ["the", "cat"])])).logits[0, -1].argmax())
    word = tokenizer.convert_ids_to_tokens(best)
    assert word in WORDS and not word.startswith("##")
    assert cloze_accuracy(model, tokenizer, [f"the cat {word}", "the cat x38"]).accuracy == 0.5
