"""Answers of a span head: the decoder against all pairs, windows against the whole text, and the text that offsets cut out."""

import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.tasks.answers import answer_questions, best_null_threshold, best_spans, read_answers
from hf_pretrain.tasks.questions import question_windows

TEXTS = {
    "de": "Die Grüße kamen aus Köln, wo Frau Müller 1953 das Café „Zum Bären“ eröffnete.",
    "zh": "北京是中华人民共和国的首都,位于华北平原的北部。人口超过两千万。",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย",
    "emoji": "Sie schrieb 👩‍🚀 und 🇩🇪 hinter  den Namen é.",
}


def greedy(scores, count):
    """All spans by score, then begin, then length; each is kept that shares no token with those before."""
    kept = []
    for (first, last), score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
        if all(last < begin or end < first for begin, end, _ in kept):
            kept.append((first, last, score))
    return kept[:count]


def all_spans(starts, ends, longest, allowed):
    return {
        (i, j): float(starts[i]) + float(ends[j])
        for i, j in itertools.combinations_with_replacement(range(len(starts)), 2)
        if j - i < longest and allowed[i] and allowed[j]
    }


class TestBestSpans:
    @pytest.mark.parametrize("kind", ["ties", "reals"])
    def test_they_are_those_of_all_pairs(self, kind):
        """Few whole numbers make many ties; masks may leave nothing."""
        generator = np.random.default_rng(0)
        lengths = set()
        for _ in range(500):
            size, longest, count = generator.integers((1, 1, 1), (16, 8, 6))
            pair = generator.integers(-2, 3, (2, size)) if kind == "ties" else generator.normal(size=(2, size))
            allowed = generator.random(size) < 0.8
            expected = greedy(all_spans(*pair, longest, allowed), count)
            found = best_spans(*pair, max_answer_tokens=longest, n_best=count, allowed=allowed)
            assert [tuple(span) for span in found] == expected
            assert all(span.first <= span.last for span in found)
            lengths.add(len(found))
        assert lengths >= {0, 1, 2, 3}

    def test_the_best_pair_need_not_be_of_the_best_ends(self):
        """Twenty firsts behind all lasts hide the only span from the usual shortcut."""
        starts, ends = np.zeros(60), np.zeros(60)
        starts[30:55], ends[:25] = 9.0, 9.0
        starts[27], ends[28] = 5.0, 5.0
        assert best_spans(starts, ends, max_answer_tokens=3)[0] == (27, 28, 10.0)

    def test_what_is_no_number_is_refused(self):
        with pytest.raises(InputError, match="no number or infinite"):
            best_spans(np.array([0.0, math.nan]), np.zeros(2))
        with pytest.raises(InputError, match="max_answer_tokens=0"):
            best_spans(np.zeros(2), np.zeros(2), max_answer_tokens=0)
        with pytest.raises(InputError, match="shapes"):
            best_spans(np.zeros(2), np.zeros(3))
        assert best_spans(np.zeros(0), np.zeros(0)) == []


def windows_of(text, tokenizer, *, max_length=12, doc_stride=3, question="w1 w2"):
    return question_windows([question], [text], tokenizer, max_length=max_length, doc_stride=doc_stride)


def scores_of_windows(windows, pairs, longest, owners=None):
    """Score of each span of characters: its highest over the windows, or that of the window that owns its first token."""
    best = {}
    for number, (window, (starts, ends)) in enumerate(zip(windows, pairs, strict=True)):
        inside = np.flatnonzero(window.in_text)
        for i, j in itertools.combinations_with_replacement(inside, 2):
            key = int(window.offsets[i, 0]), int(window.offsets[j, 1])
            if j - i < longest and (owners is None or owners[key[0]] == number):
                best[key] = max(best.get(key, -math.inf), float(starts[i]) + float(ends[j]))
    return best


def owners_of(windows):
    """The window of each first character in which its token has most tokens on the side with fewer."""
    owners = {}
    for number, window in enumerate(windows):
        begins = window.offsets[window.in_text][:, 0].tolist()
        for place, begin in enumerate(begins):
            context = min(place, len(begins) - 1 - place) + 0.01 * len(begins)
            if begin not in owners or context > owners[begin][0]:
                owners[begin] = context, number
    return {begin: number for begin, (_, number) in owners.items()}


class TestWindows:
    text = " ".join(f"w{i}" for i in range(3, 40))

    @pytest.mark.parametrize("rule", ["max", "max_context"])
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_the_answers_are_those_over_all_windows(self, rule, side):
        """Scores, order, places and probabilities; the last window is shorter, and comes first where the left is cut."""
        tokenizer, generator = tiny_tokenizer(), np.random.default_rng(1)
        tokenizer.truncation_side = side
        windows = windows_of(self.text, tokenizer)
        assert len(windows) > 8 and len({len(window.in_text) for window in windows}) == 2
        owners = (
            owners_of(sorted(windows, key=lambda w: w.offsets[w.in_text][0, 0])) if rule == "max_context" else None
        )
        order = np.argsort([window.offsets[window.in_text][0, 0] for window in windows])
        for _ in range(20):
            pairs = [generator.normal(size=(2, len(window.in_text))) * 3 for window in windows]
            expected = scores_of_windows([windows[i] for i in order], [pairs[i] for i in order], 5, owners)
            padded = [np.pad(pair, ((0, 0), (0, 4)), constant_values=99.0) for pair in pairs]
            (found,) = read_answers(
                [self.text],
                windows,
                [pair[0] for pair in padded],
                [pair[1] for pair in padded],
                doc_stride=3,
                n_best=4,
                max_answer_tokens=5,
                window_rule=rule,
            )
            kept = []
            for (begin, end), score in sorted(expected.items(), key=lambda item: -item[1]):
                if all(end <= first or last <= begin for first, last, _ in kept):
                    kept.append((begin, end, score))
            assert [(answer.start, answer.end) for answer in found.answers] == [item[:2] for item in kept[:4]]
            total = np.exp(list(expected.values())).sum()
            for answer, (begin, end, score) in zip(found.answers, kept, strict=False):
                assert answer.text == self.text[begin:end] and answer.score == pytest.approx(score)
                assert answer.probability == pytest.approx(math.exp(score) / total)

    def test_another_stride_than_that_of_the_windows_is_refused(self):
        windows = windows_of(self.text, tiny_tokenizer())
        logits = [np.zeros(len(window.in_text)) for window in windows]
        with pytest.raises(InputError, match="doc_stride=2: the windows share another number"):
            read_answers([self.text], windows, logits, logits, doc_stride=2)
        with pytest.raises(InputError, match="window_rule='best'"):
            read_answers([self.text], windows, logits, logits, doc_stride=3, window_rule="best")

    def test_no_answer_has_the_least_score_of_the_windows(self):
        """A window without the answer says so by right; one with it decides."""
        windows = windows_of(self.text, tiny_tokenizer())
        starts = [np.zeros(len(window.in_text)) for window in windows]
        for number, row in enumerate(starts):
            row[0] = 8.0 if number != 2 else 3.0
        ends = [row.copy() for row in starts]
        starts[2][6] = ends[2][7] = 4.0
        options = {"doc_stride": 3, "n_best": 3}
        for threshold, empty_at in ((-1.0, 1), (-2.5, 0), (None, None)):
            (found,) = read_answers([self.text], windows, starts, ends, null_threshold=threshold, **options)
            assert found.null_difference == 6.0 - 8.0
            texts = [answer.text for answer in found.answers]
            assert (texts.index("") if "" in texts else None) == empty_at and len(texts) == 3
            assert sum(answer.probability for answer in found.answers) < 1


class TestThreshold:
    def test_it_is_the_best_of_all(self):
        generator = np.random.default_rng(2)
        for _ in range(200):
            size = int(generator.integers(1, 9))
            differences = generator.integers(-2, 3, size).astype(float)
            has_answer = generator.random(size) < 0.5
            scores = np.where(has_answer, generator.random(size), 0.0)
            threshold, best = best_null_threshold(differences, scores, has_answer)

            def mean(value):
                return float(np.where(differences > value, ~has_answer, scores).mean())  # noqa: B023

            assert best == pytest.approx(mean(threshold))
            candidates = [-math.inf, *np.unique(differences)]
            assert best == pytest.approx(max(map(mean, candidates)))
            assert threshold == next(value for value in candidates if mean(value) == pytest.approx(best))

    def test_of_nothing_is_refused(self):
        with pytest.raises(InputError, match="null_differences is empty"):
            best_null_threshold([], [], [])


def byte_tokens(*, trim_offsets):
    """Tokens of bytes: a character may be several, and a token may begin with a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(list(TEXTS.values()), trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=trim_offsets)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def pieces_with_spaces():
    """SentencePiece's tokens, which hold the space before a word."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["[CLS]", "[SEP]", "[PAD]"], unk_token="[PAD]")
    backend.train_from_iterator(list(TEXTS.values()), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize(
    "make", [lambda: byte_tokens(trim_offsets=True), lambda: byte_tokens(trim_offsets=False), pieces_with_spaces]
)
def test_answers_are_pieces_of_the_text_in_any_script(make, language):
    """Each span of some characters is asked for by its tokens, and the text comes back as it is written."""
    tokenizer, text = make(), f"  {TEXTS[language]} "
    (window,) = question_windows(["Wo?"], [text], tokenizer, max_length=400, doc_stride=0)
    exact = 0
    for begin, end in itertools.combinations(range(2, len(text), 3), 2):
        tokens = np.flatnonzero(window.in_text & (window.offsets[:, 0] < end) & (window.offsets[:, 1] > begin))
        logits = np.zeros((2, len(window.in_text)))
        logits[0, tokens[0]] = logits[1, tokens[-1]] = 9.0
        (found,) = read_answers([text], [window], logits[:1], logits[1:], doc_stride=0, max_answer_tokens=400)
        (answer,) = found.answers
        assert text[answer.start : answer.end] == answer.text == answer.text.strip()
        if text[begin:end].strip() and answer.score == 18.0:
            assert text[begin:end].strip() in answer.text
            # No token beyond those that were asked for.
            assert window.offsets[tokens[0], 0] <= answer.start and answer.end <= window.offsets[tokens[-1], 1]
            exact += 1
    assert exact > 50


class Planted(BertForQuestionAnswering):
    """Answers with the token behind that of the question's last word, and sees the types of tokens."""

    def forward(self, input_ids, attention_mask, token_type_ids):
        asked = ((token_type_ids == 0) & (attention_mask == 1)).sum(1) - 2
        word = input_ids.gather(1, asked[:, None])
        hits = ((input_ids == word) & (token_type_ids == 1)).float()
        start = hits.roll(1, dims=1) * attention_mask
        end = start.clone() + 0.25 * start.roll(1, dims=1)
        start[:, 0] = end[:, 0] = 0.3
        self.batches = [*getattr(self, "batches", []), tuple(input_ids.shape)]
        return QuestionAnsweringModelOutput(start_logits=start * 8, end_logits=end * 8)


def planted():
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return Planted(BertConfig(**TINY, vocab_size=VOCAB_SIZE)), tokenizer


class TestQuestions:
    texts = [
        " ".join(f"w{i}" for i in range(3, 40)),
        "w5 w6",
        "w9  w10 w11",
        " ".join(f"w{i}" for i in range(40, 2, -1)),
    ]
    questions = ["w1 w30", "w1 w5", "w2 w9", "w33"]
    answers = ["w31", "w6", "w10", "w32"]

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("rule", ["max", "max_context"])
    def test_they_are_answered_by_the_text(self, side, rule):
        model, tokenizer = planted()
        tokenizer.padding_side = side
        options = {"max_length": 14, "doc_stride": 3, "window_rule": rule}
        found = answer_questions(model, tokenizer, self.questions, self.texts, batch_size=3, **options)
        assert [answers[0].text for answers in found] == self.answers
        assert all(len(answers) == 1 for answers in found)
        for text, (answer,) in zip(self.texts, found, strict=True):
            assert text[answer.start : answer.end] == answer.text and 0 < answer.probability <= 1
        lengths = [length for _, length in model.batches]
        assert lengths == sorted(lengths, reverse=True) and tokenizer.padding_side == side

    def test_a_question_without_an_answer(self):
        model, tokenizer = planted()
        (answers,) = answer_questions(model, tokenizer, ["w1 w44"], ["w5 w6"], null_threshold=0.0, n_best=2)
        assert answers[0].text == "" and answers[1].text
        (answers,) = answer_questions(model, tokenizer, ["w1 w44"], ["w5 w6"])
        assert answers[0].text

    def test_a_real_model_does_not_depend_on_the_batch(self):
        torch.manual_seed(0)
        config = BertConfig(**TINY, vocab_size=VOCAB_SIZE, initializer_range=0.3)
        model, tokenizer = BertForQuestionAnswering(config).train(), planted()[1]
        options = {"max_length": 14, "doc_stride": 3, "n_best": 3}
        runs = [
            answer_questions(model, tokenizer, self.questions, self.texts, batch_size=size, **options)
            for size in (1, 7)
        ]
        assert model.training
        for one, other in zip(*runs, strict=True):
            assert [answer.text for answer in one] == [answer.text for answer in other]
            assert [answer.score for answer in one] == pytest.approx([answer.score for answer in other], abs=1e-4)

    def test_what_cannot_work_is_refused(self):
        model, tokenizer = planted()
        with pytest.raises(InputError, match="questions has 1 entries and contexts 2"):
            answer_questions(model, tokenizer, ["w1"], ["w2", "w3"])
        with pytest.raises(InputError, match="max_length=4096: the model takes at most"):
            answer_questions(model, tokenizer, ["w1"], ["w2"], max_length=4096)
        with pytest.raises(InputError, match="texts is one text"):
            answer_questions(model, tokenizer, ["w1"], "w2")
        other = BertForTokenClassification(model.config)
        with pytest.raises(InputError, match="BertForTokenClassification has no start_logits"):
            answer_questions(other, tokenizer, ["w1"], ["w2"])
        assert answer_questions(model, tokenizer, [], []) == []
