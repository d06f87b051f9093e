"""The card of an encoder that was trained on several tasks, made from what the run logged and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_pretrain.hub.card import recipe_options, write_card
from hf_pretrain.hub.environment import Compute, hardware, versions
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, cite
from hf_pretrain.hub.run import earlier_trainings
from hf_pretrain.hub.text import hub_id
from hf_pretrain.modeling.backbone import sizes
from hf_pretrain.options import all_options, resolved_options
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.transfer.tuning.heads import chosen_head
from hf_pretrain.transfer.tuning.references import constant_reference, evaluation_of

if TYPE_CHECKING:
    from hf_pretrain.transfer.multitask.trainer import MultiTaskTrainer

_METHOD = "a head on the encoder that all tasks share"


def write_multitask_card(trainer: MultiTaskTrainer, folder: Path) -> Path:
    """Write the card of the encoder, the record of its run and the pictures into the folder of an export.

    Args:
        trainer: The Trainer; the scores of its last evaluation are in the card.
        folder: Folder of the export.

    Returns:
        The path of README.md.
    """
    model, args = trainer.stock_model(), trainer.args
    encoder, log = model.encoder, trainer.state.log_history
    name = str(getattr(encoder.config, "name_or_path", "") or "")
    base = hub_id(name) if name and not Path(name).exists() else str(Path(name).resolve()) if name else None
    kind = trainer.tasks[model.tasks[0]].auto_class.__name__
    is_stock, first = (
        type(part).__module__.startswith("transformers.") for part in (encoder, model.task_model(model.tasks[0]))
    )
    trust = "" if first else ", trust_remote_code=True"
    usage = (
        f"from transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("{{repo}}", subfolder="{model.tasks[0]}"{trust})'
    )
    options, own = all_options([args]), resolved_options([args])
    seconds = next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None)
    card = PretrainingCard(
        model_name=folder.resolve().name,
        model_class=type(encoder).__name__,
        has_own_code=not is_stock,
        objective=ObjectiveDescription(
            name="multitask",
            title="Multi-task learning",
            description="The encoder was trained on several labelled tasks, each with a head of its own. A step of training "
            "is of one task. The folder of a task has a checkpoint with its head.",
            citations=cite(*_cited(args)),
            usage=usage,
        ),
        base_model=base,
        earlier=earlier_trainings(name) if name else (),
        data={
            "sources": [source for data in trainer.tasks.values() for source in _sources(data)],
            "examples": sum(len(data.rows("train")) for data in trainer.tasks.values()),
        },
        recipe=recipe_options(options, defaults={name: value for name, value in options.items() if name not in own}),
        log_history=tuple(log),
        sizes={"": sizes(encoder)},
        evaluations=[
            evaluation_of(data, trainer.scores[task], method=_METHOD, reference=constant_reference(data))
            for task, data in trainer.tasks.items()
            if task in trainer.scores
        ],
        sections={"Tasks": _table(trainer)},
        compute=Compute(
            parameters=encoder.num_parameters(),
            trained_parameters=sum(p.numel() for part in trainer.plan.moving for p in part.parameters.values()),
            steps=trainer.state.global_step,
            planned_steps=trainer.state.max_steps or trainer.state.global_step,
            examples_per_step=global_batch_size(args),
            seconds=seconds,
            hardware=hardware(device_type=encoder.device.type),
            processes=args.world_size,
        ),
        versions=versions(),
        **trainer.facts,
    )
    return write_card(card, folder)


def _cited(args: Any) -> list[str]:
    """Return the papers of the options."""
    found = ["stickland2019pals"] if args.sampling == "annealed" else []
    found += ["raffel2020t5"] if args.sampling in ("temperature", "capped") else []
    found += ["kendall2018uncertainty"] if args.loss_weighting == "uncertainty" else []
    return ["caruana1997multitask", *found]


def _sources(data: TaskData) -> list[str]:
    spec = data.spec
    return [Path(file).name for file in spec.train_file] or [str(spec.dataset_name)]


def _table(trainer: MultiTaskTrainer) -> str:
    """Return what the folder of each task has, as a table in Markdown."""
    lines = ["| Folder | Class | Head | Examples to train on | Score |", "| --- | --- | --- | ---: | ---: |"]
    has_code, apart = False, None
    for task, data in trainer.tasks.items():
        model = trainer.plan.inner.task_model(task)
        head = chosen_head(model)
        has_code = has_code or head.architecture is not None
        apart = head.architecture if head.reads_apart else apart
        scores, metric = trainer.scores.get(task, {}), data.main_metric
        score = f"{metric} {scores[metric]:.4f}" if metric in scores else "not measured"
        name = "stock" if head.architecture is None else head
        lines.append(f"| `{task}` | `{data.auto_class.__name__}` | {name} | {len(data.rows('train')):,} | {score} |")
    if has_code:
        lines.append(
            "\nA head that is not stock lies with its code in the folder, which `trust_remote_code=True` runs."
        )
    if apart is not None:
        lines.append(
            f"\nThe head {apart} reads two texts apart: tokenize each alone, and put `pair_` before the names of the inputs "
            "of the second."
        )
    return "\n".join(lines)
