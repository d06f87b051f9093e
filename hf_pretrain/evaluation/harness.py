"""lm-evaluation-harness for language models of every kind: its tasks and metrics over the scores of `LikelihoodScorer`.

`evaluate_lm` runs tasks. `harness_model` is the adapter alone, for the harness' own `simple_evaluate`. Both need the package:
`pip install 'hf-pretrain[harness]'`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_range, one_line
from hf_pretrain.evaluation.likelihood import LikelihoodScorer
from hf_pretrain.evaluation.metrics import encode_texts
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.modeling.backbone import evaluating

# Names of the Hub for metrics of the harness.
_NAMES = {"acc": "accuracy"}
# Datasets that name a format of files, not where they are.
_FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text")
# Tokens read at a time by a model that has no longest input, as the harness has it.
_USUAL_LENGTH = 2048
# Tokens that it lets a model write where a task names no number.
_USUAL_ANSWER = 256


@dataclass(frozen=True)
class HarnessResults:
    """What tasks of lm-evaluation-harness found.

    Attributes:
        metrics: Task -> metric -> value, of groups of tasks too. A metric after a filter has the filter's name behind its own,
            "exact_match_strict-match".
        evaluations: One record a task, for the model card: `add_evaluation(folder, record)`.
    """

    metrics: dict[str, dict[str, float]]
    evaluations: list[Evaluation]


def evaluate_lm(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 1234,
    **scoring: Any,
) -> HarnessResults:
    """Evaluate a language model of any kind on tasks of lm-evaluation-harness.

    Args:
        model: A model of any kind; see `LikelihoodScorer`. Tasks that generate text need a causal one.
        tokenizer: Its tokenizer, a fast one.
        tasks: Names of tasks, such as "lambada_openai", or configurations of tasks as mappings.
        shots: Examples before each question; by default as the task says.
        limit: At most so many examples of each task, the first ones; all by default.
        batch_size: Sequences in a batch; it does not change the results.
        seed: Seed of the draw of examples, which the harness does.
        **scoring: Other options of `LikelihoodScorer`, such as `kind` or `within_word`.

    Returns:
        The metrics as plain numbers, without standard errors, and records for the model card.

    Raises:
        InputError: If the package is not installed, a task is unknown, or one generates and the model is not causal.
    """
    lm = harness_model(model, tokenizer, batch_size=batch_size, **scoring)
    if shots is not None:
        check_range(shots, "[0, inf)", name="shots")
    if limit is not None:
        check_range(limit, "[1, inf)", name="limit")
    from lm_eval.evaluator import evaluate

    chosen = [tasks] if isinstance(tasks, (str, Mapping)) else list(tasks)
    if not chosen:
        raise InputError("tasks is empty: name at least one, such as 'lambada_openai'")
    loaded = _load(chosen, shots=shots, seed=seed)
    found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    metrics = {task: _plain_metrics(values) for task, values in found["results"].items()}
    records = [_record(task, found, metrics[task], lm.scorer.kind) for task in found["configs"] if task in metrics]
    return HarnessResults(metrics, [record for record in records if record is not None])


def _load(tasks: Sequence[str | Mapping[str, Any]], *, shots: int | None, seed: int) -> Any:
    """Return tasks as the harness has them, with their numbers of examples and the seed of the draw."""
    is_whole = all(isinstance(task, Mapping) and {"dataset_path", "custom_dataset"} & set(task) for task in tasks)
    try:
        loaded = _task_manager(not is_whole).load([task if isinstance(task, str) else dict(task) for task in tasks])
    except KeyError as error:
        raise InputError(f"tasks={list(tasks)} has one that lm-evaluation-harness lacks: {one_line(error)}") from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if shots and own == 0:
            raise InputError(f"shots={shots} but the task {name!r} takes no examples: leave shots out for it")
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        task.set_fewshot_seed(seed=seed)
    return loaded


@cache
def _task_manager(has_tasks: bool) -> Any:
    """Return the harness' list of tasks, which takes it half a minute to read, or an empty one."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=has_tasks)


def _plain_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results; "acc,none" is "acc"."""
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if isinstance(value, (int, float)) and not name.endswith("_stderr") and filtered:
            metrics[name if filtered == "none" else f"{name}_{filtered}"] = float(value)
    return metrics


def _record(task: str, found: Mapping[str, Any], metrics: Mapping[str, float], kind: str) -> Evaluation | None:
    """Return a task's result for the model card; None if it has no finite number."""
    config, shots = found["configs"][task], found["n-shot"].get(task, 0)
    finite = {_NAMES.get(name, name): value for name, value in metrics.items() if math.isfinite(value)}
    if not finite:
        return None
    path, own = config.get("dataset_path"), config.get("output_type") == "multiple_choice"
    return Evaluation(
        task=task,
        dataset=path if isinstance(path, str) and path not in _FORMATS else task,
        dataset_config=config.get("dataset_name"),
        split=config.get("test_split") or config.get("validation_split") or "test",
        metrics=finite,
        method=f"lm-evaluation-harness {version('lm-eval')}, {shots}-shot, {kind} scores",
        task_type="multiple-choice" if own else "text-generation",
        num_examples=found["n-samples"][task]["effective"] or None,
    )


def harness_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64, window: int | None = None, **scoring: Any
) -> Any:
    """Return a model as lm-evaluation-harness takes it.

    `loglikelihood` and `loglikelihood_rolling` work for every kind of model, `generate_until` for causal ones. Results are
    those of the harness' own `HFLM` with one exception. Where a tokenizer begins texts with a token, as Llama's does, `HFLM`
    begins a long text with two of them and scores the second.

    Args:
        model: A model of any kind; see `LikelihoodScorer`.
        tokenizer: Its tokenizer, a fast one.
        batch_size: Sequences in a batch.
        window: Tokens of a window of `loglikelihood_rolling`; by default as many as the model reads. Windows do not overlap.
        **scoring: Other options of `LikelihoodScorer`.

    Returns:
        An instance of `lm_eval.api.model.LM`, with the scorer as `scorer`.

    Raises:
        InputError: If the package is not installed, or the scorer refuses the model.
    """
    return _lm_class()(LikelihoodScorer(model, tokenizer, batch_size=batch_size, **scoring), window)


@cache
def _lm_class() -> type:
    """Return the class of the adapter, whose base is in the package."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise InputError(
            "this needs lm-evaluation-harness, which is not installed: pip install 'hf-pretrain[harness]'"
        ) from error

    class ScorerLM(LM):
        """Answers requests by a `LikelihoodScorer`."""

        def __init__(self, scorer: LikelihoodScorer, window: int | None) -> None:
            super().__init__()
            self.scorer, self.window = scorer, window
            self._device = getattr(scorer.model, "device", torch.device("cpu"))

        @property
        def tokenizer_name(self) -> str:
            """The tokenizer, by which the harness keeps requests."""
            return str(self.scorer.tokenizer.name_or_path).replace("/", "__")

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Score pairs of context and continuation."""
            scores = self.scorer.score([request.args for request in requests])
            found = list(zip(scores.log_likelihoods.tolist(), scores.is_greedy.tolist(), strict=True))
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Score whole texts in windows that do not overlap."""
            window = self.window or self.scorer.longest or _USUAL_LENGTH
            texts = [request.args[0] for request in requests]
            stride = self.scorer.most_stride(window)
            found = self.scorer.rolling(texts, window=window, stride=stride).log_likelihoods.tolist()
            for text, answer in zip(texts, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Continue contexts up to a stop sequence."""
            if self.scorer.kind != "causal" or self.scorer.left_to_right:
                name = type(self.scorer.model).__name__
                kind = "an encoder" if self.scorer.left_to_right else self.scorer.kind
                raise InputError(
                    f"model={name} is {kind} and generates no text, which a task asks for: choose tasks that score "
                    "options, or a causal model"
                )
            answers: list[str] = [""] * len(requests)
            groups: defaultdict[str, list[int]] = defaultdict(list)
            for index, request in enumerate(requests):
                groups[repr(request.args[1])].append(index)
            for group in groups.values():
                options = dict(requests[group[0]].args[1])
                for index, text in zip(
                    group, _continue(self.scorer, [requests[i].args[0] for i in group], options), strict=True
                ):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
            return answers

    return ScorerLM


def _continue(scorer: LikelihoodScorer, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the continuations of contexts by one set of the harness' options."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    tokenizer, kwargs = scorer.tokenizer, normalize_gen_kwargs(dict(options), _USUAL_ANSWER)
    until, num_tokens = kwargs.pop("until", None), kwargs.pop("max_gen_toks")
    eos = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)
    # The harness appends to the list.
    until = [
        text for text in handle_stop_sequences(until if isinstance(until, str) else list(until or []), eos=eos) if text
    ]
    if not kwargs.get("do_sample"):
        kwargs = {"do_sample": False} | {name: value for name, value in kwargs.items() if name != "temperature"}
    rows = [
        scorer.begun(ids) for ids in encode_texts(tokenizer, list(contexts), add_special_tokens=False)["input_ids"]
    ]
    if scorer.longest is not None:
        check_range(
            num_tokens,
            f"[1, {scorer.longest - 1}]",
            name="max_gen_toks",
            hint="with the context the model reads no more",
        )
        rows = [row[-(scorer.longest - num_tokens) :] for row in rows]
    found = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for begin in range(0, len(order), scorer.batch_size):
        part = order[begin : begin + scorer.batch_size]
        written = _generate(scorer, [rows[index] for index in part], until, max_new_tokens=num_tokens, **kwargs)
        for index, own in zip(part, written, strict=True):
            text = tokenizer.decode(own, skip_special_tokens=True)
            found[index] = postprocess_generated_text(generation=text, stop=until, think_end_token=None)
    return found


def _generate(
    scorer: LikelihoodScorer, rows: Sequence[np.ndarray], until: list[str], **options: Any
) -> list[list[int]]:
    """Return the tokens that a causal model writes behind each row until it has written a stop sequence."""
    from lm_eval.models.utils_hf import stop_sequences_criteria

    tokenizer, model = scorer.tokenizer, scorer.model
    fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, rows))
    # The next token follows on the last column: padding stands on the left.
    ids, mask = np.full((len(rows), width), fill), np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :], mask[number, width - len(row) :] = row, 1
    with evaluating(model):
        written = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            stopping_criteria=stop_sequences_criteria(tokenizer, until, width, len(rows)),
            pad_token_id=fill,
            **options,
        )
    return written[:, width:].tolist()
