"""What is measured by likelihoods: perplexity of long texts, the choice among options with and without examples, last words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_range, nearest
from hf_pretrain.evaluation.likelihood.scorer import LikelihoodScorer
from hf_pretrain.evaluation.metrics import checked_texts


@dataclass(frozen=True, kw_only=True)
class RollingPerplexity:
    """How well a model predicts texts.

    Attributes:
        log_likelihoods: ``float64 [N]`` log-likelihood of each text in nats.
        num_tokens: Tokens that were scored; special tokens are not.
        num_words: Words of the texts, as spaces separate them.
        num_bytes: Bytes of the texts in UTF-8.
    """

    log_likelihoods: np.ndarray
    num_tokens: int
    num_words: int
    num_bytes: int

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all texts."""
        return -math.fsum(self.log_likelihoods.tolist())

    @property
    def perplexity(self) -> float:
        """Perplexity a token, comparable for one tokenizer only."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """Perplexity a word, whatever the tokenizer."""
        return math.exp(self.nats / self.num_words)

    @property
    def byte_perplexity(self) -> float:
        """Perplexity a byte, whatever the tokenizer."""
        return math.exp(self.nats / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte takes, whatever the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes


def rolling_perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    **scoring: Any,
) -> RollingPerplexity:
    """Measure the perplexity of long texts in windows that overlap; every token is scored once.

    The first window scores all its tokens. Each later one scores the next `stride` tokens, or the last ones of the text, after at
    least ``window - stride`` tokens. With a stride of the whole window this is what lm-evaluation-harness does. A smaller one
    costs more and gives each token more context.

    Args:
        model: A model of any kind; see `LikelihoodScorer`. The perplexity of a masked model is a pseudo-perplexity.
        tokenizer: Its tokenizer, a fast one.
        texts: One text, or several that know nothing of each other.
        window: Tokens that the model reads at once, with special ones; by default as many as it can.
        stride: Tokens by which the window moves; by default half of the window.
        **scoring: Other options of `LikelihoodScorer`, such as `batch_size`, which does not change the result.

    Returns:
        The perplexity by token, word and byte.

    Raises:
        InputError: If the texts have no token, or the window does not fit the model or the stride the window.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 3.1.
    """
    texts = checked_texts([texts] if isinstance(texts, str) else texts)
    found = LikelihoodScorer(model, tokenizer, **scoring).rolling(texts, window=window, stride=stride)
    num_tokens = int(found.num_tokens.sum())
    words, sizes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    if not num_tokens or not words:
        raise InputError("texts hold no text to score: give at least one that is not blank")
    return RollingPerplexity(
        log_likelihoods=found.log_likelihoods, num_tokens=num_tokens, num_words=words, num_bytes=sizes
    )


def score_options(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    delimiter: str = " ",
    unconditional: str | None = "Answer:",
    content_free: Sequence[Sequence[str]] | None = None,
    **scoring: Any,
) -> dict[str, list[np.ndarray]]:
    """Score the options of each prompt by their likelihood, normalised in several ways; the best option has the highest score.

    Args:
        model: A model of any kind; see `LikelihoodScorer`.
        tokenizer: Its tokenizer, a fast one.
        prompts: ``N`` prompts.
        options: Options of each prompt, at least one.
        delimiter: What stands between a prompt and an option.
        unconditional: Prompt without content, under which options are divided by their probability; None for none.
        content_free: For contextual calibration: for each prompt, the same prompt with something in place of the content.
        **scoring: Other options of `LikelihoodScorer`.

    Returns:
        Name -> scores of the options of each prompt in nats: "sum" of the tokens' log-probabilities; the same by "tokens" and by
        "bytes" of the option; less that after the "unconditional" prompt; and "calibrated", less the log of the mean share that
        the option has after the content-free prompts.

    Raises:
        InputError: If there are more prompts than lists of options or fewer, or a list is empty.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4; Zhao et al. 2021, "Calibrate Before Use",
        section 5.
    """
    prompts = checked_texts(prompts)
    blanks = [[] for _ in prompts] if content_free is None else [list(texts) for texts in content_free]
    if not len(prompts) == len(options) == len(blanks):
        raise InputError(
            f"options has {len(options)} entries for {len(prompts)} prompts: give one list for each, as to content_free"
        )
    if content_free is not None and not all(blanks):
        raise InputError(
            "content_free has a prompt without any text: give at least one, such as the prompt with 'N/A'"
        )
    choices = [checked_texts(own) for own in options]
    if not all(choices):
        raise InputError(
            f"options[{[bool(own) for own in choices].index(False)}] is empty: give each prompt at least one"
        )
    pairs: list[tuple[str, str]] = []
    for prompt, own, texts in zip(prompts, choices, blanks, strict=True):
        contexts = [prompt, *([] if unconditional is None else [unconditional]), *texts]
        pairs += [(context, delimiter + option) for context in contexts for option in own]
    found = LikelihoodScorer(model, tokenizer, **scoring).score(pairs)
    scores: dict[str, list[np.ndarray]] = {"sum": [], "tokens": [], "bytes": []}
    begin = 0
    for own, texts in zip(choices, blanks, strict=True):
        shape = (1 + (unconditional is not None) + len(texts), len(own))
        chosen = slice(begin, begin := begin + shape[0] * shape[1])
        sums, counts = found.log_likelihoods[chosen].reshape(shape), found.num_tokens[chosen].reshape(shape)
        scores["sum"].append(sums[0])
        scores["tokens"].append(sums[0] / counts[0])
        scores["bytes"].append(sums[0] / np.maximum([len(option.encode()) for option in own], 1))
        if unconditional is not None:
            scores.setdefault("unconditional", []).append(sums[0] - sums[1])
        if texts:
            share = logsumexp(log_softmax(sums[-len(texts) :], axis=1), axis=0) - math.log(len(texts))
            scores.setdefault("calibrated", []).append(log_softmax(sums[0]) - share)
    return scores


@dataclass(frozen=True, kw_only=True)
class FewShotTask:
    r"""A task as text: a prompt for each example, options, and some training examples with their answers before it.

    Attributes:
        template: The prompt with names of columns, "{premise}\nQuestion: {hypothesis} True or false?\nAnswer:".
        options: The options of all examples, or the name of the column that has those of each.
        label: Column with the right option: its number from 0, or its text.
        train: Examples to draw from.
        shots: How many examples stand before each prompt.
        description: What stands before them.
        separator: What stands behind each example.
        delimiter: What stands between a prompt and an option.
        seed: Seed of the draw, which depends on it and on the number of the prompt's example alone. That example is never drawn.

    Raises:
        InputError: If there are fewer training examples than shots.

    Source: Brown et al. 2020, section 2.4: examples drawn from the training set for each example of the evaluation set.
    """

    template: str
    options: Sequence[str] | str
    label: str = "label"
    train: Sequence[Mapping[str, Any]] = ()
    shots: int = 0
    description: str = ""
    separator: str = "\n\n"
    delimiter: str = " "
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_range(self.shots, "[0, inf)", name="shots")
        if self.shots > len(self.train):
            raise InputError(
                f"shots={self.shots} but train has {len(self.train)} examples: give more examples or fewer shots"
            )

    def columns(self) -> list[str]:
        """Return the columns that the template names."""
        names = [name for _, name, _, _ in Formatter().parse(self.template) if name]
        return [name.split(".")[0].split("[")[0] for name in names]

    def question(self, example: Mapping[str, Any]) -> str:
        """Return the prompt of an example without others before it."""
        for name in self.columns():
            self._column(example, name)
        return self.template.format_map(dict(example))

    def choices(self, example: Mapping[str, Any]) -> list[str]:
        """Return the options of an example."""
        return list(self._column(example, self.options) if isinstance(self.options, str) else self.options)

    def answer(self, example: Mapping[str, Any]) -> int:
        """Return the number of the right option."""
        label, choices = self._column(example, self.label), self.choices(example)
        if isinstance(label, str) and label in choices:
            return choices.index(label)
        if isinstance(label, str) or not 0 <= int(label) < len(choices):
            raise InputError(
                f"{self.label}={label!r} is none of the options {choices}: give the number of one, or its text"
            )
        return int(label)

    def drawn(self, example: Mapping[str, Any], number: int) -> list[Mapping[str, Any]]:
        """Return the training examples that stand before the example with a number."""
        if not self.shots:
            return []
        key = draws.row_keys([number], seed=self.seed, stream="few-shot examples")
        order = draws.uniforms(key, len(self.train))[0].argsort(kind="stable")
        others = (self.train[index] for index in order if self.train[index] != example)
        found = [other for other, _ in zip(others, range(self.shots), strict=False)]
        if len(found) < self.shots:
            raise InputError(
                f"shots={self.shots} but train has only {len(found)} other examples than {number}: give more"
            )
        return found

    def prompt(self, example: Mapping[str, Any], number: int, *, content: str | None = None) -> str:
        """Return the whole prompt of an example.

        Args:
            example: The example.
            number: Its number, which the draw depends on.
            content: What to put in place of all columns of the example, for contextual calibration.
        """
        shown = dict(example) if content is None else {**example, **dict.fromkeys(self.columns(), content)}
        shots = [
            f"{self.question(shot)}{self.delimiter}{self.choices(shot)[self.answer(shot)]}{self.separator}"
            for shot in self.drawn(example, number)
        ]
        return self.description + "".join(shots) + self.question(shown)

    @staticmethod
    def _column(example: Mapping[str, Any], name: str) -> Any:
        """Return an entry of an example, or say that it has none."""
        if name not in example:
            raise InputError(f"an example has no column {name!r} that the task names: {nearest(name, list(example))}")
        return example[name]


class FewShotScore(NamedTuple):
    """How often the right option has the highest score.

    Attributes:
        accuracy: Share of the examples, by normalisation; see `score_options`.
        predictions: ``int64 [N]`` chosen options, by normalisation.
        labels: ``int64 [N]`` right options.
    """

    accuracy: dict[str, float]
    predictions: dict[str, np.ndarray]
    labels: np.ndarray


def few_shot_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: FewShotTask,
    examples: Sequence[Mapping[str, Any]],
    *,
    unconditional: str | None = "Answer:",
    content_free: Sequence[str] = (),
    **scoring: Any,
) -> FewShotScore:
    """Measure how well a model solves a task from its prompt alone; nothing is trained.

    Args:
        model: A model of any kind; see `LikelihoodScorer`.
        tokenizer: Its tokenizer, a fast one.
        task: How examples become prompts.
        examples: The examples to answer.
        unconditional: Prompt without content, as in `score_options`.
        content_free: For contextual calibration: what stands in place of the content, such as "N/A", "[MASK]" and "".
        **scoring: Other options of `LikelihoodScorer`.

    Returns:
        The accuracy by normalisation. Of equal scores the first option is chosen.

    Raises:
        InputError: If there is no example, or one lacks a column.

    Source: Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4; Zhao et al. 2021, "Calibrate Before Use".
    """
    if not len(examples):
        raise InputError("examples is empty: give at least one")
    labels = np.array([task.answer(example) for example in examples], dtype=np.int64)
    blanks = [
        [task.prompt(example, number, content=text) for text in content_free]
        for number, example in enumerate(examples)
    ]
    scores = score_options(
        model,
        tokenizer,
        [task.prompt(example, number) for number, example in enumerate(examples)],
        [task.choices(example) for example in examples],
        delimiter=task.delimiter,
        unconditional=unconditional,
        content_free=blanks if content_free else None,
        **scoring,
    )
    predictions = {name: np.array([int(own.argmax()) for own in found]) for name, found in scores.items()}
    accuracy = {name: float((chosen == labels).mean()) for name, chosen in predictions.items()}
    return FewShotScore(accuracy, predictions, labels)


class ClozeScore(NamedTuple):
    """How well a model finds the last words of passages.

    Attributes:
        accuracy: Share of the passages whose last word is the greedy choice, token by token.
        perplexity: Perplexity of the last words.
        log_likelihoods: ``float64 [N]`` of each last word, in nats.
    """

    accuracy: float
    perplexity: float
    log_likelihoods: np.ndarray


def cloze_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], **scoring: Any
) -> ClozeScore:
    """Measure how well a model finds the last word of each passage from the words before it.

    Args:
        model: A model of any kind; see `LikelihoodScorer`.
        tokenizer: Its tokenizer, a fast one.
        passages: Texts of at least two words, which spaces separate.
        **scoring: Other options of `LikelihoodScorer`.

    Raises:
        InputError: If there is no passage, or one has fewer than two words.

    Source: Paperno et al. 2016, "The LAMBADA dataset"; Radford et al. 2019, section 3.3.
    """
    if not (texts := checked_texts(passages)):
        raise InputError("passages is empty: give at least one")
    pairs = []
    for number, text in enumerate(texts):
        if len(words := text.split()) < 2:
            raise InputError(f"passages[{number}]={text[:40]!r} has fewer than two words: leave it out")
        whole = text.rstrip()
        pairs.append((whole[: -len(words[-1])], words[-1]))
    found = LikelihoodScorer(model, tokenizer, **scoring).score(pairs)
    perplexity = math.exp(-float(found.log_likelihoods.mean()))
    return ClozeScore(float(found.is_greedy.mean()), perplexity, found.log_likelihoods)
