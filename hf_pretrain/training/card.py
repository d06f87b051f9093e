"""The facts of a run, for its model card, and of which weights each number is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.files import weights_digest
from hf_pretrain.hub.card import recipe_options
from hf_pretrain.hub.environment import Compute, hardware, measured_energy, versions
from hf_pretrain.hub.evaluation import hub_id
from hf_pretrain.hub.record import PretrainingCard, read_record, read_weights
from hf_pretrain.hub.text import OTHER_DATA, OTHER_WEIGHTS, evaluated_steps, evaluation_at
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import resolved_options

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from hf_pretrain.training.trainer import PretrainingTrainer
else:
    _Base = object

logger = logging.get_logger(__name__)

_LIMITS = (
    "The model knows only the text described above and repeats its biases. It was trained to restore text, not to follow "
    "instructions or to tell truth from falsehood; fine-tune it on the task at hand and evaluate it there before use."
)
# A model of one of these has a task already.
_TASKS = {"text-classification", "token-classification", "question-answering"}


class HeldOutMixin(_Base):
    """Knows of which weights each held-out number of a Trainer is, so that none stands beside others.

    A row of the log keeps the step of the weights that it measured. A row of other data than the Trainer's own, or of weights
    that were changed by hand, is marked, and is no part of the card.
    """

    _loaded_step: int | None = None
    _settled: tuple[int, torch.Tensor] | None = None
    _by_hand: tuple[torch.Tensor, dict[str, Any]] | None = None
    _is_own_data: bool | None = None

    @property
    def weights_step(self) -> int | None:
        """Step of the weights that the model holds, the best or the last one; None if they were changed since, by hand."""
        settled = self._settled
        if settled is not None and settled[0] == self.state.global_step and not _alike(settled[1], self._norms()):
            return None
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def measured_after(self) -> dict[str, Any]:
        """Return what was measured of the weights that the model holds; {} if nothing was, or before the first step."""
        step = self.weights_step
        if step is not None:
            return evaluation_at(self.state.log_history, step) if step else {}
        norms, metrics = self._by_hand or (None, {})
        return metrics if norms is not None and _alike(norms, self._norms()) else {}

    def evaluate_export(self) -> None:
        """Evaluate the weights that will be exported, if there is held-out text and they were not evaluated so far."""
        if self.eval_dataset is None:
            return
        is_last = self.weights_step == self.state.global_step
        if not is_last or self.state.global_step not in evaluated_steps(self.state.log_history):
            self.evaluate()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        self._loaded_step = self._settled = self._by_hand = None
        output = super().train(*args, **kwargs)
        self._settled = (self.state.global_step, self._norms())
        best, held = self.state.best_global_step, self._loaded_step or self.state.global_step
        if self.args.load_best_model_at_end and best not in (None, held):
            logger.warning(
                f"step {best} was the best by {self.args.metric_for_best_model}, but has no checkpoint: the weights are those of "
                f"step {held}; set save_steps to eval_steps to keep the best"
            )
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; see `transformers.Trainer.evaluate`."""
        if self._is_own_data is not None:  # one of several sets, called from below
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        is_own = (eval_dataset is None or eval_dataset is self.eval_dataset) and metric_key_prefix == "eval"
        first, self._is_own_data = len(self.state.log_history), is_own
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._is_own_data = None
        self._attribute(self.state.log_history[first:], metrics, is_own=is_own)
        return metrics

    def _attribute(self, rows: Sequence[dict[str, Any]], metrics: Mapping[str, float], *, is_own: bool) -> None:
        step = self.weights_step
        if is_own and step is None:
            self._by_hand = (self._norms(), dict(metrics))
        for row in rows:
            if not is_own:
                row[OTHER_DATA] = True
            elif step is None:
                row[OTHER_WEIGHTS] = True
            elif step != row["step"]:
                row["epoch"] = row.get("epoch", 0) * step / row["step"]
                row["step"] = step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", best.name)
        if found and best.is_dir():
            self._loaded_step = int(found[1])

    def _norms(self) -> torch.Tensor:
        """Return the norm of each parameter, of sharded ones the part of this process."""
        tensors = (parameter.detach() for parameter in self.model.parameters())
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        floating = (tensor for tensor in local if tensor.is_floating_point())
        return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32).cpu() for tensor in floating])


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    # On another device the sums are rounded otherwise.
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=0.0, equal_nan=True)


def describe_run(trainer: PretrainingTrainer, **changes: Any) -> PretrainingCard:
    """Gather what a run logged and measured.

    Args:
        trainer: A Trainer, usually after training.
        **changes: Fields of [`PretrainingCard`] that are known better elsewhere, such as `license` or `language`.
    """
    args, model, log = trainer.args, trainer.model, trainer.state.log_history
    root = getattr(model, model.export_parts[""])
    weights_step = trainer.weights_step
    is_earlier = weights_step is not None and weights_step < trainer.state.global_step
    # The Trainer knows the whole name once the repository exists.
    repo = trainer.hub_model_id or args.hub_model_id
    facts: dict[str, Any] = {
        "model_name": Path(repo or args.output_dir).name,
        "model_class": type(root).__name__,
        "has_own_code": not _is_stock(root),
        "adapter": ", ".join(adapter_names(root).values()),
        "fresh_parameters": _fresh_parameters(root, model),
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
        "metrics_before": evaluation_at(log, 0),
        "metrics_after": trainer.measured_after(),
        "weights_step": weights_step if is_earlier else None,
        "chosen_by": args.metric_for_best_model or "" if is_earlier else "",
        "compute": _compute(trainer, root_parameters=root.num_parameters()),
        "parts": {
            folder: (_importable(getattr(model, attribute)), f"the {attribute}, needed to go on training")
            for folder, attribute in model.export_parts.items()
            if folder
        },
        "limits": _LIMITS,
        "versions": versions(),
    }
    earlier = _told_before(trainer, weights_step=facts["weights_step"])
    facts |= {name: value for name, value in earlier.items() if value and not facts.get(name)} | changes
    if facts["objective"].pipeline_tag not in _TASKS and not facts["adapter"]:
        facts.setdefault("fine_tuning_class", _fine_tuning_class(root.config))
    return PretrainingCard(**facts)


def adapter_names(part: nn.Module) -> dict[str, str]:
    """Return the adapters of a stock model, each with its kind; where it has some, they alone are what it saves."""
    if not getattr(part, "_hf_peft_config_loaded", False):
        return {}
    kinds = {
        name: getattr(config.peft_type, "value", config.peft_type)
        for name, config in cast(Any, part).peft_config.items()
    }
    return {name: str(kind) for name, kind in kinds.items()}


def _fresh_parameters(*models: nn.Module) -> str:
    """Return what began anew in a model that was continued, as its building noted it; "" if that was nothing."""
    for model in models:
        fresh = getattr(model, "fresh_parameters", None)
        if fresh:
            return fresh if isinstance(fresh, str) else ", ".join(map(str, fresh))
    return ""


def _defaults(args: PretrainingArguments) -> dict[str, Any]:
    """Return the options that were left as they are; no other arguments are made, which would reset what accelerate knows."""
    changed = resolved_options([args])
    return {name: value for name, value in args.to_dict().items() if name not in changed}


def _told_before(trainer: PretrainingTrainer, *, weights_step: int | None) -> dict[str, Any]:
    """Return what was added to the card of this run by hand, and what was measured of these very weights."""
    folder = trainer.args.output_dir
    try:
        before = read_record(folder)
    except InputError:
        return {}
    told: dict[str, Any] = {name: getattr(before, name) for name in ("license", "language", "datasets")}
    is_same = (before.compute.steps, before.weights_step) == (trainer.state.global_step or None, weights_step)
    is_same = is_same and read_weights(folder) in (None, weights_digest(folder))
    return told | ({"evaluations": before.evaluations} if is_same else {})


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
