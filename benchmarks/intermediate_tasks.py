"""Does a task with many examples prepare an encoder for one with few? Targets with and without an intermediate task.

    python benchmarks/intermediate_tasks.py --model my-encoder --data_dir data [--target rte] [--intermediate none sst2]
    python benchmarks/intermediate_tasks.py --table

The targets are RTE and STS-B with 300 examples and CoLA with 500. An arm is a target after one intermediate task, such as
`rte_sst2`, or after `none`:

    sst2, cola, rte, stsb    a task of GLUE
    xquad                    spans that answer questions
    capitals                 words of lower-cased novels: which had a capital? A task of tokens, as the recognition of entities is

The stages are those of `hf-pretrain stages`: the encoder is fine-tuned on the intermediate task and exported, and the target
begins with the export, with a fresh head. All arms of a target and a seed learn from the same examples, with the same options.
A seed chooses the examples, the heads and the order. The table has mean and standard deviation over the seeds: of the metric that
counts, on the development set, and of its gain over `none` with the same seed. Beside it are the most frequent class (the mean)
and TF-IDF with a linear model on the same examples. `before` is the score of the intermediate task itself.

Know the model. The sentence encoders all-MiniLM-* were trained on a billion pairs, with natural language inference and questions
among them. So what RTE or STS-B would teach they know in part, and `none` is no encoder of raw text alone. An encoder that
`hf-pretrain mlm` has trained on novels is one.

The folder `data_dir` holds sst2, cola, rte, stsb and xquad as examples/tasks/glue.yaml has them, and for `capitals`
books/train.txt.xz. Each run is a row of the file `results`: what is there is not run again.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from hf_pretrain import FineTuningArguments, export_fine_tuned, fine_tune, load_task, read_tasks
from hf_pretrain.data import draws
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.options import option
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.transfer.tuning.references import constant_reference, tfidf_reference
from results import ComparisonArguments, compare_arms, rows_by_settings
from timing import print_table

TASKS = Path(__file__).parents[1] / "examples" / "tasks" / "glue.yaml"
TARGETS = {"rte": 300, "stsb": 300, "cola": 500}
INTERMEDIATES = ("none", "sst2", "cola", "rte", "stsb", "xquad", "capitals")
ARMS = tuple(f"{target}_{before}" for target, before in itertools.product(TARGETS, INTERMEDIATES) if target != before)
_WORD = re.compile(r"\w+|[^\w\s]")
_CHARACTERS, _HELD_OUT = 4_000_000, 500


@dataclass
class IntermediateArguments(ComparisonArguments):
    """Options of the comparison."""

    arms: ClassVar[tuple[str, ...]] = ARMS
    arms_without_text: ClassVar[tuple[str, ...]] = ARMS

    results: str = option("intermediate_tasks.json", "File that each run adds a row to.")
    model: str = option("", "The encoder: a folder, or a name on the Hub.")
    target: list[str] = option(factory=lambda: [*TARGETS], help="Targets, where arm does not say it.")
    intermediate: list[str] = option(
        factory=lambda: [*INTERMEDIATES], help="Intermediate tasks, where arm does not say it."
    )
    intermediate_examples: int = option(4000, "Examples of an intermediate task, at most.")
    intermediate_epochs: float = option(1.0, "Passes over them.")
    intermediate_steps: int = option(-1, "Steps instead of these passes.")
    epochs: float = option(5.0, "Passes over the examples of a target.")
    steps: int = option(-1, "Steps instead of these passes.")
    strategy: str = option("layerwise_decay", "Strategy of both stages.")
    batch_size: int = option(32, "Examples a step.")
    learning_rate: float = option(2e-4, "Peak rate of both stages.")
    max_length: int = option(128, "Most tokens of an example.")

    def __post_init__(self) -> None:
        """Choose the arms of the targets and intermediate tasks."""
        for name, known in (("target", TARGETS), ("intermediate", INTERMEDIATES)):
            for value in getattr(self, name):
                check_choice(value, known, name=name)
        chosen = [f"{target}_{before}" for target in self.target for before in self.intermediate]
        self.arm = self.arm or [arm for arm in chosen if arm in ARMS]
        super().__post_init__()
        if not self.table and not self.model:
            raise InputError("model is missing: name the encoder, or print what there is with --table")

    def settings(self) -> dict[str, Any]:
        """Return what the runs of a table have in common: not which arms were chosen, and of the model its name alone."""
        found = super().settings() | {"model": Path(self.model).name}
        return {name: value for name, value in found.items() if name not in ("target", "intermediate")}


def capitals(args: IntermediateArguments) -> TaskSpec:
    """Return the task of capitals; its rows are written beside the models once."""
    folder = args.runs_folder() / "capitals"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            text = " ".join(" ".join(read_documents([str(Path(args.data_dir, "books", "train.txt.xz"))])).split())
            parts = [_WORD.findall(part) for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text[:_CHARACTERS])]
            found = [words for words in parts if 5 <= len(words) <= 40]
            order = draws.permutation(len(found), seed=0, stream="capitals").tolist()
            # The first word of a sentence tells nothing.
            rows = [
                {"words": [word.lower() for word in words], "tags": ["small", *map(_case, words[1:])]}
                for words in map(found.__getitem__, order)
            ]
            folder.mkdir()
            for name, part in (("train", rows[_HELD_OUT:]), ("dev", rows[:_HELD_OUT])):
                lines = [json.dumps(row, ensure_ascii=False) for row in part]
                (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files: dict[str, Any] = {f"{name}_file": (str(folder / f"{split}.jsonl"),) for name, split in _SPLITS.items()}
    return TaskSpec(name="capitals", type="tokens", text=("words",), label="tags", metric="macro_f1", **files)


_SPLITS = {"train": "train", "validation": "dev"}


def _case(word: str) -> str:
    return "capital" if word[0].isupper() else "small"


def examples_of(args: IntermediateArguments, task: str, *, count: int, seed: int) -> TaskData:
    """Return the rows of a task, of which the seed chooses some to train on."""
    spec = capitals(args) if task == "capitals" else read_tasks(TASKS, data_dir=args.data_dir)[task]
    return load_task(spec, seed=seed, max_examples=count)


def options_of(
    args: IntermediateArguments, folder: Path, seed: int, *, epochs: float, steps: int
) -> FineTuningArguments:
    """Return the options of a stage."""
    options = args.training(folder, seed, num_train_epochs=epochs, max_steps=steps, strategy=args.strategy)
    for name in ("overwrite_output_dir", "eval_on_start"):
        del options[name]
    return FineTuningArguments(**options)


def prepared(args: IntermediateArguments, task: str, seed: int) -> tuple[str, float | None, float]:
    """Return the encoder after an intermediate task, the score there, and the seconds that it took; it is trained once."""
    if task == "none":
        return args.model, None, 0.0
    amount = (args.intermediate_examples, args.intermediate_epochs, args.intermediate_steps)
    settings = (Path(args.model).name, task, seed, *amount, args.strategy, args.learning_rate, args.batch_size)
    folder = args.runs_folder() / "-".join(map(str, settings))
    noted = folder / "intermediate.json"
    with FileLock(f"{folder}.lock"):
        if not noted.exists():
            data = examples_of(args, task, count=args.intermediate_examples, seed=seed)
            training = options_of(args, folder, seed, epochs=args.intermediate_epochs, steps=args.intermediate_steps)
            length = None if task == "xquad" else args.max_length
            found = fine_tune(args.model, data, training, max_length=length)
            export_fine_tuned(found, model_name=args.model)
            noted.write_text(json.dumps([found.score, found.seconds]), encoding="utf-8")
    score, seconds = json.loads(noted.read_text(encoding="utf-8"))
    return str(folder), score, seconds


def run_arm(arm: str, seed: int, args: IntermediateArguments) -> dict[str, Any]:
    """Fine-tune on the intermediate task and on the target, and measure."""
    target, _, before = arm.partition("_")
    model, score_before, seconds_before = prepared(args, before, seed)
    data = examples_of(args, target, count=TARGETS[target], seed=seed)
    training = options_of(args, args.runs_folder() / f"{arm}-{seed}", seed, epochs=args.epochs, steps=args.steps)
    found = fine_tune(model, data, training, max_length=args.max_length)
    references = {"constant": constant_reference(data), "tfidf": tfidf_reference(data, seed=seed)}
    scores = {name: known.scores[data.main_metric] for name, known in references.items() if known is not None}
    print(f"{arm}, seed {seed}: {data.main_metric} {found.score:.3f}; {found.head}", flush=True)
    row = {"metric": data.main_metric, "score": found.score, "seconds": round(found.seconds, 1)} | scores
    row |= {"seconds_before": round(seconds_before, 1), "examples": len(data.rows("train"))}
    return row | ({} if score_before is None else {"before": score_before})


def print_results(path: Path) -> None:
    """Print a table for each set of settings in the results, and one of the seeds' differences from `none`."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}")
        cells = []
        for arm in ARMS:
            runs = {row["seed"]: row for row in rows if row["arm"] == arm}
            if not runs:
                continue
            target, _, before = arm.partition("_")
            alone = {row["seed"]: row["score"] for row in rows if row["arm"] == f"{target}_none"}
            gains = [
                100 * (row["score"] - alone[seed]) for seed, row in runs.items() if seed in alone and before != "none"
            ]
            columns = {name: [100 * row[name] for row in runs.values() if name in row] for name in _COLUMNS}
            seconds = statistics.mean(row["seconds_before"] + row["seconds"] for row in runs.values())
            metric = next(iter(runs.values()))["metric"]
            cells.append(
                [target, metric, before, str(len(runs)), _spread(columns["score"]), _spread(gains)]
                + [_spread(columns[name]) for name in _COLUMNS[1:]]
                + [f"{seconds:.0f}"]
            )
        header = ["target", "metric", "after", "seeds", "score", "gain", "constant", "TF-IDF", "before", "seconds"]
        print_table(cells, header)


_COLUMNS = ("score", "constant", "tfidf", "before")


def _spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation; "" of nothing."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    compare_arms(IntermediateArguments, description=__doc__, run_arm=run_arm, results=print_results)
