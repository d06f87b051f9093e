"""The folder of a fine-tuned model: weights and tokenizer, predictions, results, the recipe of the run, and the card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain, share_weights, write_bytes, write_text
from hf_pretrain.hub.card import ESSENTIAL_OPTIONS, defining_options, recipe_options, write_card
from hf_pretrain.hub.environment import Compute, hardware, versions
from hf_pretrain.hub.pushing import Pushing
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, cite, read_record
from hf_pretrain.hub.run import earlier_trainings, hub_name_of
from hf_pretrain.hub.text import hub_id
from hf_pretrain.models.task_heads.architectures_task_heads import Architecture
from hf_pretrain.options import all_options, resolved_options, write_recipe
from hf_pretrain.tasks.labelled import TaskData
from hf_pretrain.transfer.strategies import is_adapted
from hf_pretrain.transfer.tuning.fine_tune import FineTuned
from hf_pretrain.transfer.tuning.heads import chosen_head, fresh_modules, reads_apart
from hf_pretrain.transfer.tuning.references import Reference, evaluation_of, task_of_the_hub

PREDICTIONS, RESULTS, RECIPE = "predictions.jsonl", "all_results.json", "recipe.yaml"

_LIMITS = (
    "The model knows the task by the examples described above alone, and repeats their biases and those of its encoder. The "
    "scores are those of one run on the rows that are named; other texts may be harder."
)


def export_fine_tuned(
    found: FineTuned,
    *,
    model_name: str,
    options: Sequence[Any] = (),
    program: str = "hf-pretrain finetune",
    references: Sequence[Reference] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a fine-tuned model into the output folder of its Trainer, and push it if `push_to_hub` is set.

    On several processes all call it; the first one writes.

    Args:
        found: The model.
        model_name: Name or folder of the encoder that it began with.
        options: The dataclasses that the program was started with, for the recipe.
        program: The program, for the recipe.
        references: What was measured without an encoder; the last one stands beside the scores on the card.
        facts: Fields of the card that are known better elsewhere, such as `license`.

    Returns:
        The folder.
    """
    trainer = found.trainer
    folder, recipe = Path(trainer.args.output_dir), resolved_options(options)
    readme = folder / "README.md"
    before = readme.read_bytes() if readme.is_file() else None

    def write() -> None:
        # peft writes a card of its own into an adapter's folder.
        if before is None:
            readme.unlink(missing_ok=True)
        else:
            write_bytes(readme, before)
        _write_card(found, folder, model_name=model_name, options=options, references=references, facts=facts or {})

    trainer.write_card = write
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_text(folder / RESULTS, json.dumps(results_of(found, references), indent=2) + "\n")
        write_predictions(found, folder / PREDICTIONS)
        if recipe:
            write_recipe(recipe, folder / RECIPE, program=program)
    if trainer.args.push_to_hub:
        Pushing(trainer).push_export("End of fine-tuning", blocking=True, facts={})
    else:
        trainer.save_model(_internal_call=True)
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        share_weights(folder)
    return folder


def results_of(found: FineTuned, references: Sequence[Reference] = ()) -> dict[str, Any]:
    """Return the numbers of a run, as `all_results.json` holds them."""
    data, args = found.data, found.trainer.args
    return {
        "task": data.spec.name,
        "strategy": args.strategy,
        **_head_of(found),
        "seed": args.seed,
        "metric": data.main_metric,
        "scores": plain(found.scores),
        "references": {known.name: plain(known.scores) for known in references},
        "train_examples": len(data.rows("train")),
        "validation_examples": len(data.validation),
        "step": found.step,
        "seconds": round(found.seconds, 3),
        "trained_parameters": _trained(found),
    }


def _head_of(found: FineTuned) -> dict[str, Any]:
    """Return the architecture on top with its options; nothing of a stock head."""
    head = chosen_head(found.trainer.plan.inner)
    if head.architecture is None:
        return {}
    return {
        "architecture": head.architecture,
        "architecture_options": dict(head.options),
        "mix_layers": head.mix_layers,
    }


def write_predictions(found: FineTuned, path: Path) -> Path:
    """Write what the model says of each validation row, a line each: texts, label, prediction, and logits of classes.

    Args:
        found: The model.
        path: The file.

    Returns:
        The file.
    """
    data = found.data
    decoded = data.decode("validation", found.predictions, tokenizer=found.tokenizer)
    columns = [*data.spec.text, *data.spec.choices]
    logits: Any = [None] * len(decoded)
    if data.spec.type in ("classification", "choice"):
        predictions = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        logits = np.asarray(predictions, dtype=np.float64).tolist()
    label = str(data.spec.label)
    lines = []
    for row, predicted, numbers in zip(data.validation, decoded, logits, strict=True):
        line = {name: row[name] for name in columns}
        if label in row:
            line["label"] = _label(data, row[label])
        line["predicted"] = predicted
        if numbers is not None:
            line["logits"] = numbers
        lines.append(json.dumps(plain(line), ensure_ascii=False))
    return write_text(path, "\n".join(lines) + "\n")


def _label(data: TaskData, value: Any) -> Any:
    """Return a label by its name."""
    if data.labels is None or value is None:
        return value
    if isinstance(value, list):
        return [None if number < 0 else data.labels[number] for number in value]
    return data.labels[value]


def _trained(found: FineTuned) -> int:
    """Return how many parameters moved at some time."""
    parts = found.trainer.plan.moving
    return sum(parameter.numel() for part in parts for parameter in part.parameters.values())


def _write_card(
    found: FineTuned,
    folder: Path,
    *,
    model_name: str,
    options: Sequence[Any],
    references: Sequence[Reference],
    facts: Mapping[str, Any],
) -> None:
    trainer, data = found.trainer, found.data
    args: Any = trainer.args
    inner: PreTrainedModel = trainer.plan.inner
    is_adapter = args.export == "adapter" and is_adapted(trainer.model)
    repo = getattr(trainer, "hub_model_id", None) or args.hub_model_id
    method = f"fine-tuned ({args.strategy}), seed {args.seed}"
    reference = references[-1] if references else Reference("constant", found.baseline)
    evaluations = [evaluation_of(data, found.scores, method=method, reference=reference)]
    essential = {name: value for name, value in all_options(options).items() if name in ESSENTIAL_OPTIONS}
    card = PretrainingCard(
        model_name=Path(repo or folder.resolve()).name,
        model_class=type(inner).__name__,
        has_own_code=not type(inner).__module__.startswith("transformers."),
        adapter=str(_kind_of_adapter(trainer.model)) if is_adapter else "",
        loading=_opening_an_adapter(data, inner) if is_adapter else _opening_with_code(data, inner),
        fresh_parameters=", ".join(fresh_modules(inner, found.fresh)),
        repo=repo or ".",
        objective=_objective(data, args, inner),
        **_origin(model_name),
        data=_data(data),
        recipe=recipe_options(essential | resolved_options(options), defaults={}) if options else {},
        options=defining_options(all_options(options)) if options else {},
        log_history=tuple(trainer.state.log_history),
        weights_step=found.step if found.step < trainer.state.global_step else None,
        chosen_by=args.metric_for_best_model if found.step < trainer.state.global_step else "",
        evaluation_name="the validation rows",
        evaluations=evaluations,
        compute=Compute(
            parameters=inner.num_parameters(),
            trained_parameters=_trained(found),
            steps=trainer.state.global_step,
            planned_steps=trainer.state.max_steps,
            examples_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seconds=found.seconds,
            hardware=hardware(device_type=args.device.type, num_devices=args.world_size),
            processes=args.world_size,
        ),
        limits=_LIMITS,
        versions=versions(),
        **{name: value for name, value in facts.items() if value},
    )
    write_card(card, folder)


def _data(data: TaskData) -> dict[str, Any]:
    spec = data.spec
    return {
        "sources": [Path(name).name for name in spec.train_file] or [str(spec.dataset_name)],
        "examples": len(data.rows("train")),
        "validation examples": len(data.validation),
        "columns": [*spec.text, *spec.choices],
    } | ({} if data.labels is None else {"labels": data.labels})


def _origin(model_name: str) -> dict[str, Any]:
    """Return the fields of the card on the encoder: its name on the Hub, and its own objective where its card says that."""
    if not Path(model_name).exists():
        base = hub_id(model_name)
        return {"base_model": base, "origin": f"Fine-tuned from {_linked(base) if base else 'a model'}"}
    base = hub_name_of(model_name, or_base=False)
    try:
        known = read_record(model_name)
    except InputError:
        known = None
    what = _linked(base) if base else "a local checkpoint"
    earlier = "" if known is None else f" ({known.objective.title})"
    named = base or hub_name_of(model_name)
    if named and named != base:
        earlier += f" that names {_linked(named)} as its origin"
    facts: dict[str, Any] = {"base_model": named or str(Path(model_name).resolve())}
    facts |= {"origin": f"Fine-tuned from {what}{earlier}", "earlier": earlier_trainings(model_name)}
    return facts | ({"language": known.language} if known is not None and known.language else {})


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _kind_of_adapter(model: Any) -> str:
    return ", ".join(str(plain(config.peft_type)) for config in model.peft_config.values())


def _objective(data: TaskData, args: Any, model: PreTrainedModel) -> ObjectiveDescription:
    spec, head = data.spec, chosen_head(model)
    classes = "" if data.labels is None else f" of {len(data.labels)} classes"
    rate = f"with the strategy `{args.strategy}` at a peak learning rate of {args.learning_rate:g}"
    below = "stock head of the task" if head.architecture is None else f"architecture {head}"
    return ObjectiveDescription(
        name="finetune",
        title=f"{spec.name} ({spec.type}{classes})",
        description=f"An encoder below the {below} was trained on its examples, {rate}.",
        citations=cite("clark2020electra") if args.strategy == "layerwise_decay" else (),
        pipeline_tag=task_of_the_hub(data),
        usage=usage_of(data, trusted=not type(model).__module__.startswith("transformers.")),
    )


def usage_of(data: TaskData, *, trusted: bool = False) -> str:
    """Return Python code that opens an export and uses its head, with the names of `hf_pretrain.hub.examples.in_code`.

    Args:
        data: The task.
        trusted: Whether the code beside the weights is to be run.
    """
    auto, trust = data.auto_class.__name__, ", trust_remote_code=True" if trusted else ""
    opened = _opened(data, trust)
    if data.spec.type == "span":
        return (
            f"from transformers import {auto}, AutoTokenizer\n\nfrom hf_pretrain import answer_questions\n\n{opened}"
            'found = answer_questions(model, tokenizer, ["What is it about?"], [{sentence}])\nprint(found[0][:1])\n'
        )
    if data.spec.type == "choice":
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n{opened}"
            'batch = tokenizer([{sentence}] * 2, [{another}, {sentence}], padding=True, return_tensors="pt")\n'
            "logits = model(**{name: tensor[None] for name, tensor in batch.items()}).logits  # [1, choices]\n"
            "print(logits.argmax(-1))\n"
        )
    task, options = "text-classification", ', function_to_apply="none"' if data.spec.type == "regression" else ""
    text = "{sentence}" if len(data.spec.text) == 1 else '{"text": {sentence}, "text_pair": {another}}'
    if data.spec.type == "tokens":
        task, options = "token-classification", ', aggregation_strategy="simple"'
    options += trust
    return f'from transformers import pipeline\n\npipe = pipeline("{task}", model="{{repo}}"{options})\nprint(pipe({text}))\n'


def _opened(data: TaskData, trust: str) -> str:
    auto = data.auto_class.__name__
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
    return f'{tokenizer}model = {auto}.from_pretrained("{{repo}}"{trust})\n'


def _opening_with_code(data: TaskData, model: PreTrainedModel) -> str:
    """Return code that opens and uses a model with an architecture on top; "" of a stock one, of which the card knows it."""
    head = chosen_head(model)
    if head.architecture is None:
        return ""
    module = type(cast(Any, model).architecture).__module__
    is_ours = module == Architecture.__module__
    before = "" if is_ours else f"import {module}  # registers the architecture {head.architecture}\n"
    if not reads_apart(model):
        return before + usage_of(data, trusted=is_ours)
    auto, ends = data.auto_class.__name__, "" if data.labels is None else ".softmax(-1)"
    return (
        f"{before}from transformers import {auto}, AutoTokenizer\n\n"
        + _opened(data, ", trust_remote_code=True" if is_ours else "")
        + 'first, second = (tokenizer(text, return_tensors="pt") for text in ({sentence}, {another}))\n'
        + 'pair = {f"pair_{name}": tensor for name, tensor in second.items()}\n'
        + f"print(model(**first, **pair).logits{ends})\n"
    )


def _opening_an_adapter(data: TaskData, model: PreTrainedModel) -> str:
    """Return code that opens an adapter with the encoder below it."""
    auto, head = data.auto_class.__name__, chosen_head(model)
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
    below = 'below = PeftConfig.from_pretrained("{repo}").base_model_name_or_path\n'
    if head.architecture is not None:
        options = f"architecture={head.architecture!r}, architecture_options={dict(head.options)!r}, "
        options += f"mix_layers={head.mix_layers}, num_labels={len(data.labels or [0])}"
        name = type(model).__name__
        return (
            "from peft import PeftConfig, PeftModel\nfrom transformers import AutoTokenizer\n\n"
            f"from hf_pretrain import {name}\n\n{tokenizer}{below}"
            f"options = dict({options})\n"
            f'model = PeftModel.from_pretrained({name}.from_encoder(below, **options), "{{repo}}")\n'
        )
    size = "" if data.spec.type in ("choice", "span") else f", num_labels={len(data.labels or [0])}"
    return (
        f"from peft import PeftConfig, PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n{tokenizer}{below}"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained(below{size}), "{{repo}}")\n'
    )
