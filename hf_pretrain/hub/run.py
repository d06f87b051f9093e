"""The facts of a run for its model card, and of which weights each held-out number is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from yaml import YAMLError

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain, read_object, weights_digest
from hf_pretrain.hub.card import ESSENTIAL_OPTIONS, defining_options, recipe_options
from hf_pretrain.hub.environment import Compute, hardware, measured_energy, peak_flops, versions
from hf_pretrain.hub.examples import find_examples
from hf_pretrain.hub.identifiers import as_list
from hf_pretrain.hub.record import PretrainingCard, read_content, read_record, read_weights
from hf_pretrain.hub.text import OTHER_DATA, OTHER_WEIGHTS, Row, evaluated_steps, evaluation_at, hub_id
from hf_pretrain.modeling.backbone import flops_of_weights, sizes
from hf_pretrain.modeling.base import trial_tokens
from hf_pretrain.modeling.observing.profile import Profile, profile_line
from hf_pretrain.modeling.surgery.adapters import adapter_parameters, stock_parameters
from hf_pretrain.options import all_options, resolved_options
from hf_pretrain.training.arguments import REFUSED
from hf_pretrain.training.processes import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_pretrain.modeling.base import PretrainingModel
    from hf_pretrain.training.trainer import PretrainingTrainer

logger = logging.get_logger(__name__)

_LIMITS = (
    "The model knows only the text described above and repeats its biases. It was trained to restore text, not to follow "
    "instructions or to tell truth from falsehood; fine-tune it on the task at hand and evaluate it there before use."
)
# A model of one of these has a task already.
_TASKS = {"text-classification", "token-classification", "question-answering"}


class HeldOutNumbers:
    """Knows of which weights each held-out number of a run is, so that none stands beside others.

    A row of the log keeps the step of the weights that it measured. A row of other data than the run's own, or of weights that
    were changed by hand, is marked, and is no part of the card.

    Args:
        run: The run.
    """

    def __init__(self, run: PretrainingTrainer) -> None:
        self.run = run
        self.begin()

    def begin(self) -> None:
        """Forget an earlier training."""
        self._loaded_step: int | None = None
        self._trained: tuple[int, torch.Tensor] | None = None
        self._by_hand: tuple[torch.Tensor, dict[str, Any]] | None = None

    def end(self) -> None:
        """Note the weights at the end of training."""
        args, state = self.run.args, self.run.state
        self._trained = (state.global_step, self._norms())
        best, held = state.best_global_step, self._loaded_step or state.global_step
        if args.load_best_model_at_end and best not in (None, held):
            logger.warning(
                f"step {best} was the best by {args.metric_for_best_model}, but has no checkpoint: the weights are those of "
                f"step {held}; set save_steps to eval_steps to keep the best"
            )

    def load(self, checkpoint: str | None) -> None:
        """Note that the weights are those of a checkpoint now."""
        folder = Path(str(checkpoint))
        found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if found and folder.is_dir():
            self._loaded_step = int(found[1])

    @property
    def weights_step(self) -> int | None:
        """Step of the weights that the model holds, the best or the last one; None if they were changed since, by hand."""
        step, trained = self.run.state.global_step, self._trained
        if trained is not None and trained[0] == step and not _alike(trained[1], self._norms()):
            return None
        return step if self._loaded_step is None else self._loaded_step

    def is_measured(self) -> bool:
        """Whether the log has the held-out numbers of the weights that the model holds."""
        step = self.run.state.global_step
        return self.weights_step == step and step in evaluated_steps(self.run.state.log_history)

    def after(self) -> dict[str, Any]:
        """Return what was measured of the weights that the model holds; {} if nothing was, or before the first step."""
        step = self.weights_step
        if step is not None:
            return evaluation_at(self.run.state.log_history, step) if step else {}
        norms, metrics = self._by_hand or (None, {})
        return metrics if norms is not None and _alike(norms, self._norms()) else {}

    def note(self, rows: Sequence[dict[str, Any]], metrics: Mapping[str, float], *, is_own: bool) -> None:
        """Mark the rows of an evaluation in the log.

        Args:
            rows: The rows.
            metrics: The metrics of all of them.
            is_own: Whether the data is the run's own held-out text.
        """
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

    def _norms(self) -> torch.Tensor:
        """Return the norm of each parameter; of a sharded one, the norm of the part that this process holds."""
        tensors = (parameter.detach() for parameter in self.run.model.parameters())
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        floating = (tensor for tensor in local if tensor.is_floating_point())
        return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32).cpu() for tensor in floating])


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    # On another device the sums are rounded otherwise.
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=0.0, equal_nan=True)


def _options(trainer: PretrainingTrainer) -> dict[str, Any]:
    """Return every option that defines the run: those of the program, or those of the Trainer and of its data."""
    args: Any = trainer.args
    options = trainer.options or trainer.data_description.get("options", {}) | all_options([args])
    # They can have one value only.
    fixed = {name for name in REFUSED if name not in args.also_honoured}
    return defining_options(options, without=fixed)


def _recipe(trainer: PretrainingTrainer) -> dict[str, Any]:
    """Return the options that make up the run: those of the program, or those that differ from their defaults."""
    if trainer.recipe:
        essential = {name: value for name, value in trainer.options.items() if name in ESSENTIAL_OPTIONS}
        if trainer.course is not None:
            # The phases say how long the run is, and give the rate.
            unused = {"num_train_epochs"} | (
                {"lr_scheduler_type", "warmup_steps"} if trainer.course.has_rates else set()
            )
            essential = {name: value for name, value in essential.items() if name not in unused}
        return recipe_options(essential | trainer.recipe, defaults={})
    options, own = trainer.args.to_dict(), resolved_options([trainer.args])
    return recipe_options(options, defaults={name: value for name, value in options.items() if name not in own})


def describe_run(trainer: PretrainingTrainer, **changes: Any) -> PretrainingCard:
    """Gather what a run logged and measured.

    Args:
        trainer: The Trainer, usually after training.
        **changes: Fields of [`PretrainingCard`] that are known better elsewhere, such as `license` or `language`.
    """
    args, model, log = trainer.args, trainer.model, trainer.state.log_history
    root = model.root
    weights_step = trainer.held_out.weights_step
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
        **_base_model(root.config.name_or_path, is_adapter=bool(adapter_names(root))),
        "language": args.language or _languages(trainer.data_description),
        "license": args.license,
        "datasets": tuple(dict.fromkeys((*_datasets(trainer.recipe), *(args.datasets or ())))),
        "tags": tuple(args.tags or ()),
        "examples": _examples(trainer),
        "data": {name: value for name, value in trainer.data_description.items() if name != "options"},
        "recipe": _recipe(trainer),
        "options": _options(trainer),
        "sizes": {} if is_sharded(model) else {name: _sizes(part) for name, part in _parts(model).items()},
        "log_history": tuple(log),
        "learning_rates": trainer.learning_rates.noted,
        # Another phase may mask other tokens of another text: numbers of two phases are not set side by side as before and after.
        "metrics_before": {} if trainer.course is not None else evaluation_at(log, 0),
        "metrics_after": trainer.held_out.after(),
        "phases": () if trainer.course is None else tuple(trainer.course.described()),
        "branch_of": {} if trainer.course is None else dict(trainer.course.branch),
        "weights_step": weights_step if is_earlier else None,
        "chosen_by": args.metric_for_best_model or "" if is_earlier else "",
        "compute": _compute(trainer, root_parameters=stock_parameters(root)),
        "parts": {
            folder: (
                _importable(model.get_submodule(attribute)),
                f"the {_of_part(attribute)}, needed to go on training",
            )
            for folder, attribute in model.export_parts.items()
            if folder
        },
        "limits": _LIMITS,
        "versions": versions(),
    }
    earlier = _known_before(trainer, weights_step=facts["weights_step"])
    facts |= {name: value for name, value in earlier.items() if value and not facts.get(name)} | changes
    if facts["objective"].pipeline_tag not in _TASKS and not facts["adapter"]:
        has_one = type(root.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        facts.setdefault("fine_tuning_class", "AutoModelForSequenceClassification" if has_one else "")
    return PretrainingCard(**facts)


def _of_part(attribute: str) -> str:
    """Return what a reader calls a part: the last name of its path."""
    return attribute.rpartition(".")[2]


def adapter_names(part: nn.Module) -> dict[str, str]:
    """Return the adapters of a stock model, each with its kind; where it has some, they alone are what it saves."""
    is_saved_alone = getattr(part, "_hf_peft_config_loaded", False) or getattr(part, "exports_adapter", False)
    configs = cast(Any, part).peft_config if is_saved_alone else {}
    return {name: plain(config.peft_type) for name, config in configs.items()}


def _fresh_parameters(*models: nn.Module) -> str:
    """Return what began anew in a model that was continued, as its building noted it; "" if that was nothing."""
    fresh = next(filter(None, (getattr(model, "fresh_parameters", None) for model in models)), "")
    return fresh if isinstance(fresh, str) else ", ".join(map(str, fresh))


def _known_before(trainer: PretrainingTrainer, *, weights_step: int | None) -> dict[str, Any]:
    """Return what was added to the card of this run by hand, and what was measured of these very weights."""
    folder = trainer.args.output_dir
    try:
        before = read_record(folder)
    except InputError:
        return {}
    known: dict[str, Any] = {name: getattr(before, name) for name in ("license", "language", "datasets", "tags")}
    is_same = (before.compute.steps, before.weights_step) == (trainer.state.global_step or None, weights_step)
    is_same = is_same and read_weights(folder) in (None, weights_digest(folder))
    return known | ({"evaluations": before.evaluations} if is_same else {})


def _languages(data: Mapping[str, Any]) -> list[str] | None:
    """Return the languages of multilingual text, if they are named by their codes."""
    names = [str(name) for name in data.get("languages") or ()]
    return names if names and all(re.fullmatch(r"[a-z]{2,3}", name) for name in names) else None


def _datasets(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    name = recipe.get("dataset_name")
    return (name,) if name and hub_id(name) and not Path(name).exists() else ()


def _is_stock(part: nn.Module) -> bool:
    return type(part).__module__.startswith("transformers.")


def _importable(part: nn.Module) -> str:
    """Return the class of a sub-model as a card names it: alone if transformers has it, else with its module."""
    kind = type(part)
    return kind.__name__ if _is_stock(part) else f"{kind.__module__}.{kind.__name__}"


def _base_model(name_or_path: str, *, is_adapter: bool) -> dict[str, Any]:
    """Return the fields of the card on the model that was continued: its name on the Hub, or the absolute path of a local one."""
    if not name_or_path or not Path(name_or_path).exists():
        return {"base_model": name_or_path or None}
    earlier = {"earlier": earlier_trainings(name_or_path)}
    if name := hub_name_of(name_or_path, or_base=False):
        return {"base_model": name} | earlier
    # An adapter is of one model, and not of those that this was made from.
    name = None if is_adapter else hub_name_of(name_or_path)
    if name is None:
        return {"base_model": str(Path(name_or_path).resolve())} | earlier
    linked = f"[{name}](https://huggingface.co/{name})"
    return {
        "base_model": name,
        "origin": f"Pre-trained further from a local checkpoint that names {linked} as its origin",
    } | earlier


def earlier_trainings(folder: str | Path) -> tuple[Row, ...]:
    """Return header and rows of a table of the trainings that have made the model in a folder, as far as records tell.

    Args:
        folder: Folder of a model, or of one task of a model of several; anything else gives ().
    """
    place = next((place for place in (Path(folder), Path(folder).parent) if read_content(place)), None)
    try:
        known = None if place is None else read_record(place)
    except InputError:
        known = None
    if known is None or (place != Path(folder) and known.objective.name != "multitask"):
        return ()
    # Pre-training names its text in one string, a task its files in a list.
    sources = ", ".join(map(str, as_list(known.data.get("sources") or known.data.get("source"))))
    steps = "" if known.compute.steps is None else f"{known.compute.steps:,}"
    header, *before = known.earlier or [("Training", "Data", "Steps")]
    return (header, *before, (known.objective.title, sources, steps))


def hub_name_of(folder: str | Path, *, or_base: bool = True) -> str | None:
    """Return the Hub's name of the model in a folder, or else of the one that it was made from, as the folder names it.

    The record of a run and the path of the Hub's cache have the name of the model; its configuration and the front matter of its
    card have that of its base. A name needs an owner: one without could be any folder's.

    Args:
        folder: Folder of a model.
        or_base: Whether the name of the base will do.
    """
    path = Path(folder).resolve()
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots(?:/|$)", path.as_posix())
    names = [read_content(path).get("card", {}).get("repo"), f"{cached[1]}/{cached[2]}" if cached else None]
    if or_base:
        names += [read_object(path / "config.json").get("_name_or_path")]
        names += as_list(_front_matter_of(path / "README.md").get("base_model"))
    return next((name for name in names if isinstance(name, str) and _has_owner(name)), None)


def _has_owner(name: str) -> bool:
    is_folder = Path(name).exists() or Path(name).name.startswith(PREFIX_CHECKPOINT_DIR)
    return "/" in name and hub_id(name) is not None and not is_folder


def _front_matter_of(path: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except (OSError, ValueError, TypeError, YAMLError):  # a card of somebody's own making
        return {}


def _examples(trainer: PretrainingTrainer) -> tuple[str, ...]:
    """Return sentences of the held-out text for the card; () of private text."""
    args = trainer.args
    if args.private_text or args.hub_private_repo:
        return ()
    return find_examples(trainer.eval_dataset, trainer.processing_class, seed=args.seed)


def _parts(model: PretrainingModel) -> dict[str, PreTrainedModel]:
    """Return the stock models of a run by how the card names them: "" the root, folders of the others, and the teacher."""
    names = {attribute: folder for folder, attribute in model.export_parts.items()}
    parts = {names.get(attribute, _of_part(attribute)): part for attribute, part in model.backbones.items()}
    teacher = getattr(model, "teacher", None)
    return parts if teacher is None else parts | {"teacher": teacher.model}


def _sizes(part: PreTrainedModel) -> dict[str, int]:
    """Return the sizes of a stock model; adapters are none of its parameters."""
    return sizes(part) | {"parameters": stock_parameters(part)}


def _flops(trainer: PretrainingTrainer, tokens: int | None) -> float | None:
    """Return the floating-point operations of a run, at least; None where they cannot be counted."""
    model, args = trainer.model, trainer.args
    # A step of two stages trains one of the two models.
    if not tokens or is_sharded(model) or getattr(args, "training_mode", "") == "two_stage":
        return None
    total = 0.0
    for part in _parts(model).values():
        forward = flops_of_weights(part, trial_tokens(part))
        if forward is None:
            return None
        share = part.num_parameters(only_trainable=True) / part.num_parameters()  # of a teacher none
        # Backward they take as much for the states, and as much again for the weights that are trained. Adapters need the former
        # of all layers.
        total += forward * (1 + share + (1 if adapter_parameters(part) else share)) * tokens
    return total


def _compute(trainer: PretrainingTrainer, *, root_parameters: int) -> Compute:
    args, log, state = trainer.args, trainer.state.log_history, trainer.state
    steps = [row for row in log if "num_tokens" in row]
    # The row at the end of this training, not that of one before a resume.
    ends = [row for row in log if "train_runtime" in row and row["step"] == state.global_step]
    # Between two rows a checkpoint or a branch counts them too.
    tokens = max(state.num_input_tokens_seen, steps[-1]["num_tokens"] if steps else 0) or None
    # The clock of transformers starts anew with each resume; these two are where it started.
    resumed_at = getattr(trainer, "_initial_global_step", 0)
    tokens_before = getattr(trainer, "_initial_num_input_tokens_seen", 0)
    return Compute(
        parameters=root_parameters,
        trained_parameters=trainer.model.num_parameters(only_trainable=True),
        steps=state.global_step or None,
        planned_steps=state.max_steps if state.global_step else None,
        examples_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        tokens=tokens,
        seconds=ends[-1]["train_runtime"] if ends else None,
        resumed_at_step=resumed_at or None,
        timed_tokens=tokens - tokens_before if tokens and resumed_at else None,
        hardware=hardware(device_type=args.device.type, num_devices=args.world_size),
        processes=args.world_size,
        precision=_precision(trainer),
        attention=trainer.attention,
        profile=None if trainer.runner.profiled is None else profile_line(trainer.runner.profiled),
        peak_memory_mib=max((row["peak_memory_mib"] for row in steps), default=None),
        energy=measured_energy(args.output_dir),
        flops=_flops(trainer, tokens),
        peak_flops=_peak_flops(trainer),
    )


def _peak_flops(trainer: PretrainingTrainer) -> float | None:
    args = trainer.args
    if args.device.type != "cuda":
        return None
    # Ranks on other machines are taken to have the same devices.
    peak = peak_flops(torch.cuda.get_device_name(args.device), precision=_precision(trainer))
    return None if peak is None else peak * args.world_size


def profile_of(trainer: PretrainingTrainer) -> Profile:
    """Return the clock of a training; the peak of its device is that of the data sheet, or else measured."""
    args = trainer.args
    peak = _peak_flops(trainer)
    return Profile(
        device=args.device, dtype=trainer.runner.compute_dtype, peak=None if peak is None else peak / args.world_size
    )


def _precision(trainer: PretrainingTrainer) -> str:
    """Return the format of the computation, and that of the weights where it is not fp32."""
    weights = {"float32": "fp32", "bfloat16": "bf16"}.get(str(trainer.model.dtype).removeprefix("torch."), "fp32")
    computed = str(trainer.args.mixed_precision).replace("no", weights)
    return computed if weights == "fp32" else f"{computed} (weights in {weights})"
