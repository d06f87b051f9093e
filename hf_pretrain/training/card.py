"""The facts of a run, for its model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from hf_pretrain.errors import InputError
from hf_pretrain.hub.card import recipe_options
from hf_pretrain.hub.compute import Compute
from hf_pretrain.hub.environment import hardware, measured_energy, versions
from hf_pretrain.hub.facts import PretrainingCard
from hf_pretrain.hub.metadata import hub_id
from hf_pretrain.hub.metric_names import bare_name
from hf_pretrain.hub.record import read_record
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import resolved_options

if TYPE_CHECKING:
    from hf_pretrain.training.trainer import PretrainingTrainer

_LIMITS = (
    "The model knows only the text described above and repeats its biases. It was trained to restore text, not to follow "
    "instructions or to tell truth from falsehood; fine-tune it on the task at hand and evaluate it there before use."
)
# A model of one of these has a task already.
_TASKS = {"text-classification", "token-classification", "question-answering"}


def describe_run(trainer: PretrainingTrainer, **changes: Any) -> PretrainingCard:
    """Gather what a run logged and measured.

    Args:
        trainer: A Trainer, usually after training.
        **changes: Fields of [`PretrainingCard`] that are known better elsewhere, such as `license` or `language`.
    """
    args, model, log = trainer.args, trainer.model, trainer.state.log_history
    root = getattr(model, model.export_parts[""])
    # The Trainer knows the whole name once the repository exists.
    repo = trainer.hub_model_id or args.hub_model_id
    facts: dict[str, Any] = {
        "model_name": Path(repo or args.output_dir).name,
        "model_class": type(root).__name__,
        "has_own_code": not _is_stock(root),
        "repo": repo or ".",
        "objective": trainer.objective,
        "base_model": _base_model(root.config.name_or_path),
        "language": _languages(trainer.data_description),
        "datasets": _datasets(trainer.recipe),
        "data": trainer.data_description,
        # The options of the program are those that differ from their defaults already.
        "recipe": recipe_options(trainer.recipe, defaults={})
        if trainer.recipe
        else recipe_options(args.to_dict(), defaults=_defaults(args)),
        "log_history": log,
        "metrics_before": _evaluation_at(0, log),
        "metrics_after": _evaluation_at(
            max((row["step"] for row in log if _is_evaluation(row)), default=0) or None, log
        ),
        "compute": _compute(trainer, root_parameters=root.num_parameters()),
        "parts": {
            folder: (_importable(getattr(model, attribute)), f"the {attribute}, needed to go on training")
            for folder, attribute in model.export_parts.items()
            if folder
        },
        "limits": _LIMITS,
        "versions": versions(),
    }
    facts |= {name: value for name, value in _told_before(trainer).items() if value and not facts.get(name)} | changes
    if facts["objective"].pipeline_tag not in _TASKS:
        facts.setdefault("fine_tuning_class", _fine_tuning_class(root.config))
    return PretrainingCard(**facts)


def _defaults(args: PretrainingArguments) -> dict[str, Any]:
    """Return the options that were left as they are; no other arguments are made, which would reset what accelerate knows."""
    changed = resolved_options([args])
    return {name: value for name, value in args.to_dict().items() if name not in changed}


def _told_before(trainer: PretrainingTrainer) -> dict[str, Any]:
    """Return what was added to the card of this run by hand, and what was measured of these very weights."""
    try:
        before = read_record(trainer.args.output_dir)
    except InputError:
        return {}
    told: dict[str, Any] = {name: getattr(before, name) for name in ("license", "language", "datasets")}
    is_same = before.compute.steps == (trainer.state.global_step or None)
    return told | ({"evaluations": before.evaluations} if is_same else {})


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval_") and bare_name(key).endswith("loss") for key in row)


def _evaluation_at(step: int | None, log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what was measured at a step: one row of the log, or one of each held-out set; of two alike, the later."""
    rows = [row for row in log if row["step"] == step and _is_evaluation(row)]
    return {key: value for row in rows for key, value in row.items()}


def _languages(data: Mapping[str, Any]) -> list[str] | None:
    """Return the languages of multilingual text, if they are named by their codes."""
    names = [str(name) for name in data.get("languages") or ()]
    return names if names and all(re.fullmatch(r"[a-z]{2,3}", name) for name in names) else None


def _datasets(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    name = recipe.get("dataset_name")
    return (name,) if name and hub_id(name) and not Path(name).exists() else ()


def _fine_tuning_class(config: PretrainedConfig) -> str:
    return (
        AutoModelForSequenceClassification.__name__
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        else ""
    )


def _is_stock(part: nn.Module) -> bool:
    return type(part).__module__.startswith("transformers.")


def _importable(part: nn.Module) -> str:
    """Return the class of a sub-model as a card names it: alone if transformers has it, else with its module."""
    kind = type(part)
    return kind.__name__ if _is_stock(part) else f"{kind.__module__}.{kind.__name__}"


def _base_model(name_or_path: str) -> str | None:
    """Return the Hub's name of the model that was continued, or the absolute path that tells the card it is a local one."""
    is_local = bool(name_or_path) and Path(name_or_path).exists()
    return str(Path(name_or_path).resolve()) if is_local else name_or_path or None


def _compute(trainer: PretrainingTrainer, *, root_parameters: int) -> Compute:
    args, log, state = trainer.args, trainer.state.log_history, trainer.state
    steps = [row for row in log if "num_tokens" in row]
    tokens = steps[-1]["num_tokens"] if steps else None
    # The clock of transformers starts anew with each resume; so these two tell what it has seen.
    resumed_at = getattr(trainer, "_initial_global_step", 0)
    tokens_before = getattr(trainer, "_initial_num_input_tokens_seen", 0)
    return Compute(
        parameters=root_parameters,
        trained_parameters=trainer.model.num_parameters(only_trainable=True),
        steps=state.global_step or None,
        planned_steps=state.max_steps if state.global_step else None,
        examples_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        tokens=tokens,
        # The row at the end of this training, not that of one before a resume.
        seconds=next((row["train_runtime"] for row in reversed(log) if _ends(row, state.global_step)), None),
        resumed_at_step=resumed_at or None,
        timed_tokens=tokens - tokens_before if tokens and resumed_at else None,
        hardware=hardware(device_type=args.device.type, num_devices=args.world_size),
        processes=args.world_size,
        precision=_precision(trainer),
        peak_memory_mib=max((row["peak_memory_mib"] for row in steps), default=None),
        energy=measured_energy(args.output_dir),
    )


def _precision(trainer: Any) -> str:
    """Return the format of the computation, and that of the weights where it is not fp32."""
    weights = {"float32": "fp32", "bfloat16": "bf16"}.get(str(trainer.model.dtype).removeprefix("torch."), "fp32")
    computed = str(trainer.args.mixed_precision).replace("no", weights)
    return computed if weights == "fp32" else f"{computed} (weights in {weights})"


def _ends(row: Mapping[str, Any], step: int) -> bool:
    return "train_runtime" in row and row["step"] == step
