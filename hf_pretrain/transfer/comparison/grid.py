"""The whole comparison: arms × tasks × sizes × seeds under one budget, with every run kept in a file.

[`StrategyComparison`] takes the tasks and sizes one after the other. Each gets an equal share of what is left of the budget, and
shares it out among the arms by successive halving. A run that the file has is not run again, so a stopped comparison goes on.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import weights_digest, write_text
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec, hold_out, load_task
from hf_pretrain.transfer.classic_heads import HEADS
from hf_pretrain.transfer.comparison.arms import ArmCost, ComparisonArm, Outcome, count_cost, run_arm, run_tfidf
from hf_pretrain.transfer.comparison.halving import Rung, better_half, plan_rungs, successive_halving

_FORMAT = "hf_pretrain comparison"
# Rows that the cost of a step is counted on: their mean length stands for all.
_COUNTED_ROWS = 512
# Share of the rows to train on that is held out to choose a rate.
_CHOOSING_SHARE = 0.2
TFIDF = {"classification": "TF-IDF + linear_svc", "regression": "TF-IDF + ridge"}
"""Name of what needs no encoder, by the type of the task."""


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What all runs of a comparison share; a file of runs has one of it.

    Attributes:
        batch_size: Rows of a step.
        num_train_epochs: Passes of a full run over the rows.
        least_steps: Steps that a full run has at least, where rows are few.
        max_length: Most tokens of an example; by default what is usual for the task.
        validation_fraction: Share of the rows that is held out where a task has none to evaluate on.
    """

    batch_size: int = 32
    num_train_epochs: float = 3.0
    least_steps: int = 100
    max_length: int | None = None
    validation_fraction: float = 0.1

    def full(self, rows: int) -> int:
        """Return the examples of a full run on so many rows."""
        return max(math.ceil(self.num_train_epochs * rows), self.least_steps * self.batch_size)


class Runs:
    """A file of runs, which grows by one at a time.

    Args:
        path: The JSON file.
        settings: What all its runs share.

    Raises:
        InputError: If it is no file of runs, or of other settings.
    """

    def __init__(self, path: str | Path, settings: ComparisonSettings) -> None:
        self.path, self.settings = Path(path), asdict(settings)
        self.entries: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise InputError(f"results={str(path)!r} is in no folder: make it, or name another")
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"results={str(path)!r} cannot be read: {one_line(error)}: name another file") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(
                f"results={str(path)!r} is no file of a comparison: name another, nothing of it is changed"
            )
        for name, value in self.settings.items():
            if content["settings"].get(name) != value:
                raise InputError(
                    f"{name}={value}, but the runs in results={str(path)!r} have {name}={content['settings'].get(name)}: give "
                    "the same, or name another file"
                )
        self.entries = {_key(entry["run"]): entry for entry in content["runs"]}

    def outcome(self, run: Mapping[str, Any], make: Callable[[], Outcome]) -> Outcome:
        """Return what a run found: from the file, or by making it and writing it down.

        Args:
            run: All that decides on it, as plain data.
            make: Makes it.
        """
        known = self.entries.get(_key(run))
        if known is None:
            known = {"run": dict(run), **make()._asdict()}
            self.entries[_key(run)] = known
            content = {"format": _FORMAT, "settings": self.settings, "runs": list(self.entries.values())}
            write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return Outcome(
            dict(known["scores"]), float(known["flops"]), float(known["seconds"]), float(known.get("memory", 0.0))
        )


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """An arm in a rung: a run a seed.

    Attributes:
        examples: Examples of each run.
        outcomes: The runs, in the order of the seeds.
        metric: The metric that counts.
    """

    examples: int
    outcomes: tuple[Outcome, ...]
    metric: str

    @property
    def scores(self) -> list[float]:
        """The score of each run."""
        return [outcome.scores[self.metric] for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the scores, None of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def flops(self) -> float:
        """FLOPs of a run."""
        return statistics.fmean(outcome.flops for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """Seconds of a run."""
        return statistics.fmean(outcome.seconds for outcome in self.outcomes)

    @property
    def memory(self) -> float:
        """Bytes of tensors that a step holds at most, 0 where that was not measured."""
        return max(outcome.memory for outcome in self.outcomes)


@dataclass
class Group:
    """The comparison on one task with one number of rows.

    Attributes:
        task: Name of the task.
        rows: Rows to train on.
        metric: The metric that counts.
        constant: Score of the most frequent class or of the mean, by seed.
        tfidf: TF-IDF on these rows; None where the task is none of whole texts.
        rungs: ComparisonArm -> its runs, a mapping a rung.
        choosing: FLOPs of the runs that chose the learning rates.
    """

    task: str
    rows: int
    metric: str
    constant: list[float]
    tfidf: Entry | None
    rungs: list[dict[ComparisonArm, Entry]] = field(default_factory=list)
    choosing: float = 0.0

    def last(self, arm: ComparisonArm) -> tuple[int, Entry]:
        """Return the last rung of an arm, counted from 1, and its runs there."""
        return [(number, rung[arm]) for number, rung in enumerate(self.rungs, start=1) if arm in rung][-1]

    @property
    def flops(self) -> float:
        """FLOPs of all runs."""
        runs = (outcome for rung in self.rungs for entry in rung.values() for outcome in entry.outcomes)
        return self.choosing + math.fsum(outcome.flops for outcome in runs)


class StrategyComparison:
    """Arms on tasks.

    Args:
        arms: The arms, each different.
        tasks: The tasks.
        seeds: Seeds; each run is done with each. A seed draws the rows of a size, the head and the order.
        sizes: Rows to train on, None for all.
        settings: What all runs share.
        results: File of the runs.
        budget: FLOPs of training that all runs may take together; None for no limit.
        rate_factors: Of an arm that names no learning rate its own rate times each of them is tried on a fifth of the rows to
            train on, which is held out for that, with the first seed; the best one is compared. Empty: its own rate.
        say: Called with a line before each task and each rung.

    Raises:
        InputError: If an arm goes with no task, or a task with no arm, or the file is not one of these settings.
    """

    def __init__(
        self,
        arms: Sequence[ComparisonArm],
        tasks: Sequence[TaskSpec],
        *,
        seeds: Sequence[int] = (0,),
        sizes: Sequence[int | None] = (None,),
        settings: ComparisonSettings | None = None,
        results: str | Path = "comparison.json",
        budget: float | None = None,
        rate_factors: Sequence[float] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        for name, values in (("strategies", arms), ("seeds", seeds), ("train_sizes", sizes)):
            if not values or len(set(values)) != len(values):
                raise InputError(f"{name}={list(values)} is empty or has one twice: name each once")
        self.arms, self.tasks, self.seeds, self.sizes = list(arms), list(tasks), list(seeds), list(sizes)
        self.settings, self.budget, self.say = settings or ComparisonSettings(), budget, say
        self.runs = Runs(results, self.settings)
        self._weights = {arm.model: weights_digest(arm.model) for arm in arms}
        self.rate_factors = list(rate_factors)
        if self.rate_factors and budget is not None:
            raise InputError(
                f"rate_factors={self.rate_factors} does not go with a budget: leave one out, or name rates as arms of their own"
            )
        self._arms = {spec.name: self._fitting(spec) for spec in tasks}
        for arm in arms:
            if all(arm not in fitting for fitting in self._arms.values()):
                raise InputError(arm.refusal(tasks[-1]))
        self._costs: dict[tuple[str, ComparisonArm], ArmCost] = {}
        for spec in tasks:
            data = self._load(spec, _COUNTED_ROWS, seeds[0])
            for arm in dict.fromkeys(arm.without_rates() for arm in self._arms[spec.name]):
                self._costs[spec.name, arm] = count_cost(
                    arm, data, batch_size=self.settings.batch_size, max_length=self.settings.max_length
                )

    def _fitting(self, spec: TaskSpec) -> list[ComparisonArm]:
        """Return the arms that go with a task, and say which do not."""
        refusals = {arm: arm.refusal(spec) for arm in self.arms}
        fitting = [arm for arm, refusal in refusals.items() if not refusal]
        if not fitting:
            raise InputError(refusals[self.arms[0]])
        left_out = [arm.name for arm, refusal in refusals.items() if refusal]
        if left_out:
            self.say(f"{spec.name}: without {', '.join(left_out)}, which do not go with a task of type {spec.type!r}")
        return fitting

    def _cost(self, spec: TaskSpec, arm: ComparisonArm, *, rows: int) -> ArmCost:
        return replace(self._costs[spec.name, arm.without_rates()], arm=arm, rows=rows)

    def _load(self, spec: TaskSpec, rows: int | None, seed: int) -> TaskData:
        return load_task(spec, seed=seed, max_examples=rows, validation_fraction=self.settings.validation_fraction)

    def groups(self) -> list[tuple[TaskSpec, int]]:
        """Return the tasks with their numbers of rows; a size beyond what a task has is all of it, once."""
        found: dict[tuple[str, int], tuple[TaskSpec, int]] = {}
        for spec in self.tasks:
            # Where articles are held out, a seed may leave fewer questions than another.
            available = min(len(self._load(spec, None, seed).rows("train")) for seed in self.seeds)
            for size in self.sizes:
                rows = available if size is None else min(size, available)
                found[(spec.name, rows)] = (spec, rows)
        return list(found.values())

    def plan(self, spec: TaskSpec, rows: int, *, budget: float | None) -> list[Rung]:
        """Return the rungs of a task with so many rows under a budget of its own."""
        costs = [self._cost(spec, arm, rows=rows) for arm in self._arms[spec.name]]
        try:
            return plan_rungs(
                costs,
                full=self.settings.full(rows),
                least=self.settings.batch_size,
                budget=budget,
                seeds=len(self.seeds),
            )
        except InputError as error:
            raise InputError(f"task {spec.name!r} with {rows} rows: {error}") from error

    def run(self) -> list[Group]:
        """Run what the file does not have, and return everything.

        Raises:
            InputError: If the budget does not pay for a step of each arm.
        """
        groups, spent, found = self.groups(), 0.0, []
        if self.budget is not None:
            # Each has at least this share: what cannot be paid for is said before anything is run.
            for spec, rows in groups:
                self.plan(spec, rows, budget=self.budget / len(groups))
        for number, (spec, rows) in enumerate(groups):
            share = None if self.budget is None else (self.budget - spent) / (len(groups) - number)
            found.append(self._group(spec, rows, self.plan(spec, rows, budget=share)))
            spent += found[-1].flops
        return found

    def _group(self, spec: TaskSpec, rows: int, rungs: Sequence[Rung]) -> Group:
        data = [self._load(spec, rows, seed) for seed in self.seeds]
        metric, constants = data[0].main_metric, [one.baseline() for one in data]
        self.say(f"{spec.name}: {rows:,} rows to train on, {len(data[0].validation):,} to measure on, {metric}")
        tfidf = None
        if spec.type in HEADS:
            outcomes = [self._tfidf(one, seed) for one, seed in zip(data, self.seeds, strict=True)]
            tfidf = Entry(rows, tuple(outcomes), metric)
            self.say(f"{TFIDF[spec.type]}: {tfidf.mean:.3f}")
        group = Group(spec.name, rows, metric, [constant[metric] for constant in constants], tfidf)
        arms = [self._at_best_rate(arm, data[0], group) for arm in self._arms[spec.name]]
        entries: list[dict[ComparisonArm, Entry]] = [{} for _ in rungs]
        digests = [_digest(one) for one in data]

        def score(arm: ComparisonArm, examples: int) -> float:
            rung = next(i for i, entry in enumerate(entries) if rungs[i].arms > len(entry))
            cost, known, begin = self._cost(spec, arm, rows=rows), len(self.runs.entries), time.perf_counter()
            outcomes = [
                self._outcome(cost, one, digest, examples=examples, seed=seed)
                for one, digest, seed in zip(data, digests, self.seeds, strict=True)
            ]
            entries[rung][arm] = entry = Entry(cost.read(examples), tuple(outcomes), metric)
            is_new = len(self.runs.entries) > known
            took = f"{time.perf_counter() - begin:.1f} s" if is_new else "from an earlier run"
            self.say(f"{Path(arm.model).name} {arm.name}, {entry.examples:,} examples: {entry.mean:.3f}, {took}")
            return entry.mean

        successive_halving(arms, rungs, score)
        group.rungs = entries
        return group

    def _at_best_rate(self, arm: ComparisonArm, data: TaskData, group: Group) -> ComparisonArm:
        """Return an arm with the best of the rates to try, measured on rows to train on that are held out for that."""
        if not self.rate_factors or arm.learning_rate is None or arm.names_rate:
            return arm
        seed, own = self.seeds[0], arm.learning_rate
        inner = replace(data, **hold_out(data.spec, data.rows("train"), fraction=_CHOOSING_SHARE, seed=seed))
        rows, digest, scores = len(inner.rows("train")), _digest(inner), dict[ComparisonArm, float]()
        for tried in (arm.at(own * factor) for factor in self.rate_factors):
            cost = self._cost(data.spec, tried, rows=rows)
            outcome = self._outcome(cost, inner, digest, examples=self.settings.full(rows), seed=seed)
            scores[tried] = outcome.scores[data.main_metric]
            group.choosing += outcome.flops
        (best,) = better_half(scores, keep=1)
        shown = ", ".join(f"{tried.learning_rate:g}: {score:.3f}" for tried, score in scores.items())
        name, held_out = f"{Path(arm.model).name} {arm.name}", f"{len(inner.validation):,} rows of those to train on"
        self.say(f"{name}: {best.learning_rate:g} is the best rate on {held_out} ({shown})")
        return best

    def _outcome(self, cost: ArmCost, data: TaskData, digest: str, *, examples: int, seed: int) -> Outcome:
        arm, rows = cost.arm, len(data.rows("train"))
        if arm.strategy == "features" and examples < rows:
            # Of the same draw: fewer rows are a part of more.
            data = self._load(data.spec, examples, seed)
        run = {
            "model": arm.model,
            "weights": self._weights[arm.model],
            "strategy": arm.name,
            "task": data.spec.name,
            "data": digest,
            "rows": rows,
            "examples": examples,
            "seed": seed,
        }
        max_length = self.settings.max_length
        return self.runs.outcome(run, lambda: run_arm(cost, data, examples=examples, seed=seed, max_length=max_length))

    def _tfidf(self, data: TaskData, seed: int) -> Outcome:
        run = {"strategy": TFIDF[data.spec.type], "task": data.spec.name, "data": _digest(data), "seed": seed}
        return self.runs.outcome(run | {"rows": len(data.rows("train"))}, lambda: run_tfidf(data, seed=seed))


def _digest(data: TaskData) -> str:
    """Return a digest of the rows of a task: the same name may stand for other files tomorrow."""
    digest, spec = xxhash.xxh3_64(), data.spec
    for rows in (data.train, data.validation):
        for name in (*spec.text, *spec.choices, str(spec.label)):
            if rows is not None and name in rows.column_names:
                digest.update(f"{name} {rows[name][:]}\n".encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()
