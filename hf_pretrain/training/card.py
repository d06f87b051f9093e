"""The facts of a run, for its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_pretrain.hub.card import Compute, PretrainingCard, recipe_options
from hf_pretrain.hub.environment import hardware, versions

if TYPE_CHECKING:
    from hf_pretrain.training.trainer import PretrainingTrainer

_LIMITS = (
    "The model knows only the text described above and repeats its biases. It was trained to restore text, not to follow "
    "instructions or to tell truth from falsehood; fine-tune it on the task at hand and evaluate it there before use."
)


def describe_run(trainer: PretrainingTrainer, **changes: Any) -> PretrainingCard:
    """Gather what a run logged and measured.

    Args:
        trainer: A Trainer, usually after training.
        **changes: Fields of [`PretrainingCard`] that are known better elsewhere, such as `license` or `language`.
    """
    args, model, log = trainer.args, trainer.model, trainer.state.log_history
    root = getattr(model, model.export_parts[""])
    evaluations = [row for row in log if "eval_loss" in row]
    # The Trainer knows the whole name once the repository exists.
    repo = trainer.hub_model_id or args.hub_model_id
    facts: dict[str, Any] = {
        "model_name": Path(repo or args.output_dir).name,
        "model_class": type(root).__name__,
        "has_own_code": not _is_stock(root),
        "repo": repo or ".",
        "objective": trainer.objective,
        "base_model": _base_model(root.config.name_or_path),
        "data": trainer.data_description,
        # The options of the program are those that differ from their defaults already.
        "recipe": recipe_options(trainer.recipe, defaults={})
        if trainer.recipe
        else recipe_options(args.to_dict(), defaults=type(args)().to_dict()),
        "log_history": log,
        "metrics_before": next((row for row in evaluations if row["step"] == 0), {}),
        "metrics_after": next((row for row in reversed(evaluations) if row["step"] > 0), {}),
        "compute": _compute(trainer, root_parameters=root.num_parameters()),
        "parts": {
            folder: (_importable(getattr(model, attribute)), f"the {attribute}, needed to go on training")
            for folder, attribute in model.export_parts.items()
            if folder
        },
        "limits": _LIMITS,
        "versions": versions(),
    }
    return PretrainingCard(**(facts | changes))


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
    args, log = trainer.args, trainer.state.log_history
    steps = [row for row in log if "num_tokens" in row]
    return Compute(
        parameters=root_parameters,
        trained_parameters=trainer.model.num_parameters(only_trainable=True),
        steps=trainer.state.global_step or None,
        tokens=steps[-1]["num_tokens"] if steps else None,
        seconds=next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None),
        hardware=hardware(device_type=args.device.type, num_devices=args.world_size),
        precision=args.mixed_precision.replace("no", "fp32"),
        peak_memory_mib=max((row["peak_memory_mib"] for row in steps), default=None),
    )
