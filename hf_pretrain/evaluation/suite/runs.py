"""The model of a run on tasks, before and after its training: `--evaluation_tasks` of each method.

What is measured is an export, opened as a user opens it. So the numbers are those that `hf-pretrain evaluate` finds.
"""

from __future__ import annotations

import dataclasses
import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.detector import is_stock_detector
from hf_pretrain.evaluation.suite.measures import LoadedTask, MeasureOptions, measure_task
from hf_pretrain.evaluation.suite.models import EvaluatedModel
from hf_pretrain.evaluation.suite.results import read_results, table_of, write_results
from hf_pretrain.evaluation.suite.tasks import How, find_tasks
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import PretrainingCard
from hf_pretrain.hub.run import adapter_names
from hf_pretrain.hub.text import cell
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.modeling.heads import DISCRIMINATOR_HEAD_FOLDER
from hf_pretrain.modeling.loading import quiet
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig
from hf_pretrain.training.processes import is_sharded

if TYPE_CHECKING:
    from hf_pretrain.modeling.base import PretrainingModel
    from hf_pretrain.training.arguments import PretrainingArguments
    from hf_pretrain.training.trainer import PretrainingTrainer

logger = logging.get_logger(__name__)

RESULTS = "evaluation.json"
"""File of the results in the output folder, of the form that `hf-pretrain evaluate` writes."""
BEFORE, AFTER = "before training", "after training"
_TITLE = "Tasks, before and after training"
Plan = list[tuple[LoadedTask, How]]


def tasks_of_run(args: PretrainingArguments) -> Plan:
    """Return the tasks of a run, each with its usual measure; only the first rows of their files are read.

    Args:
        args: The options of training.

    Raises:
        InputError: If a task is not found, or can only be measured by fine-tuning.
    """
    most = args.evaluation_max_examples
    # The seed is that of `hf-pretrain evaluate`, not the run's: runs of several seeds are measured alike.
    options = MeasureOptions(max_train_examples=most, max_examples=most)
    plan: Plan = []
    for task in find_tasks(args.evaluation_tasks or (), data_dir=args.evaluation_data_dir):
        (how,) = task.chosen(None)
        if how == "finetune":
            raise InputError(
                f"evaluation_tasks={task.name!r} is measured by fine-tuning, which changes the model: leave it out, and run "
                f"`hf-pretrain evaluate MODEL --tasks {task.name}` afterwards"
            )
        plan.append((LoadedTask(task, options), how))
    return plan


def check_tasks(args: PretrainingArguments) -> None:
    """Read the tasks of a run whole, so that a mistake in them is said before any text is read.

    Raises:
        InputError: If a task is not found, cannot be read, or can only be measured by fine-tuning.
    """
    for loaded, _ in tasks_of_run(args):
        loaded.read()


class _Trained(EvaluatedModel):
    """The model of a run as its export will be, to check it before there is one."""

    adapter = None

    def __init__(self, model: PretrainingModel) -> None:
        super().__init__(f"this run's {type(model.root).__name__}")
        self._model = model

    @property
    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self._model.root.config
        return config

    @property
    def architecture(self) -> str:
        return type(self._model.root).__name__

    @property
    def is_detector(self) -> bool:
        has_head = DISCRIMINATOR_HEAD_FOLDER in self._model.export_parts
        return has_head or is_stock_detector(self.architecture, self.config)

    @property
    def is_energy(self) -> bool:
        name = self._model.export_parts.get(GENERATOR_FOLDER)
        generator: Any = None if name is None else operator.attrgetter(name)(self._model)
        return generator is not None and generator.config.model_type == TwoTowerClozeConfig.model_type


class RunTasks:
    """The tasks that the model of a run is measured on, and what was found.

    Before training, the model and those beside it, such as a teacher, are measured; after training the model again. A run that
    goes on from a checkpoint has the numbers before training from the file `evaluation.json` of its output folder.

    Args:
        run: The Trainer of the run.

    Raises:
        InputError: If a task is not found, or the model cannot be measured on it.
    """

    def __init__(self, run: PretrainingTrainer) -> None:
        self.run = run
        self.plan = tasks_of_run(run.args)
        self.found: dict[str, list[Evaluation]] = {}
        self._weights: dict[str, str | None] = {}
        self._step: int | None = None
        model = _Trained(run.model)
        if adapter_names(run.model.root):
            raise InputError(
                "evaluation_tasks measures a whole model, and adapter_export='adapter' exports an adapter alone: set "
                "adapter_export='merged', or leave evaluation_tasks out"
            )
        for loaded, how in self.plan:
            model.check(how, task=loaded.task.name)

    def begin(self, *, is_new: bool) -> None:
        """Measure what is there before training; called on every process, before the first step.

        Args:
            is_new: Whether the run begins; one that goes on has its numbers in the output folder.
        """
        self.found, self._weights, self._step = {}, {}, None
        args, path = self.run.args, Path(self.run.args.output_dir, RESULTS)
        with args.main_process_first(local=False, desc="tasks"):
            if args.process_index:
                return
            for loaded, _ in self.plan:
                loaded.read()
            if not is_new:
                self.found = self._stored(path)
                return
            self._measure_references()
            with tempfile.TemporaryDirectory() as folder:
                self.run._save(folder)
                self._measure(BEFORE, folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            write_results(path, self.found, weights=self._weights)

    def _measure_references(self) -> None:
        """Measure the models that the trained one is compared with."""
        for label, reference in self.run.reference_models().items():
            if isinstance(reference, str):
                self._measure(label, reference)
                continue
            with tempfile.TemporaryDirectory() as folder:
                reference(Path(folder))
                self._measure(label, folder)

    def _stored(self, path: Path) -> dict[str, list[Evaluation]]:
        """Return what the start of this run has measured; of models that lack one of the tasks nothing."""
        names, found = [loaded.name_of(how) for loaded, how in self.plan], {}
        for label, entries in (read_results(path)["models"] if path.parent.is_dir() else {}).items():
            known = {entry["task"]: Evaluation.from_mapping(entry, source=str(path)) for entry in entries}
            if label != AFTER and set(names) <= known.keys():
                found[label] = [known[name] for name in names]
        return found

    def measure_trained(self) -> None:
        """Measure the weights that the model holds, once; shards are put together, so all processes must call it."""
        step = self.run.held_out.weights_step
        # Of weights that were changed by hand the step is None.
        if self.run.is_in_train or not self.run.state.global_step or (step is not None and self._step == step):
            return
        args = self.run.args
        with tempfile.TemporaryDirectory() as folder:
            if is_sharded(self.run.model):
                self.run.save_model(folder)
            elif not args.process_index:
                self.run._save(folder)
            if not args.process_index:
                self._measure(AFTER, folder)
                write_results(Path(args.output_dir, RESULTS), {AFTER: self.found[AFTER]}, weights=self._weights)
        self._step = step

    def _measure(self, label: str, name: str) -> None:
        print(f"       {label} on {', '.join(loaded.task.name for loaded, _ in self.plan)}", flush=True)
        model = EvaluatedModel(name, batch_size=self.run.args.eval_batch_size, device=str(self.run.args.device))
        # A measure may draw numbers, and training must not depend on it.
        with torch.random.fork_rng(), quiet():
            self.found[label] = [measure_task(model, loaded, how) for loaded, how in self.plan]
        self._weights[label] = model.fingerprint

    def table(self) -> tuple[list[list[str]], list[str]]:
        """Return the rows and the header of a table of all models; ([], []) if nothing was measured."""
        return table_of(self.found, list(self.found)) if self.found else ([], [])

    def on_card(self, card: PretrainingCard) -> PretrainingCard:
        """Return a card with the scores of the trained model, and the table of all models."""
        if AFTER not in self.found or self._step != self.run.held_out.weights_step or self.run.is_in_train:
            return card
        known = {(evaluation.task, evaluation.split): evaluation for evaluation in card.evaluations}
        known |= {(evaluation.task, evaluation.split): evaluation for evaluation in self.found[AFTER]}
        rows, header = self.table()
        return dataclasses.replace(
            card,
            evaluations=tuple(known.values()),
            sections={**card.sections, _TITLE: _markdown(rows, header=header)},
        )


def _markdown(rows: Sequence[Sequence[Any]], *, header: Sequence[str]) -> str:
    lines = [f"| {' | '.join(map(cell, header))} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(map(cell, row))} |" for row in rows])
