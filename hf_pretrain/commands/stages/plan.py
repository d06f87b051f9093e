"""A plan of stages: its file, the command of each stage, and what can be known of all of them before the first one runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import glob, has_magic
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml

from hf_pretrain.cli import COMMANDS, load_method, methods
from hf_pretrain.commands import adapt, parse_command
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.suite import find_tasks
from hf_pretrain.hub.pushing import repository_of
from hf_pretrain.names import described_recipes, method_hint, option_hint
from hf_pretrain.options import read_plan, read_recipes
from hf_pretrain.tasks.spec import load_task
from hf_pretrain.training.arguments import check_training_options
from hf_pretrain.training.method import Method
from hf_pretrain.training.parsing import ParsedRun, parse_run
from hf_pretrain.training.phases.plan import check_run
from hf_pretrain.training.phases.running import check_files

_COMMANDS = ("adapt", "finetune", "multitask", "features", "evaluate")
MEASURES = ("features", "evaluate")
_FROM = "from"
_ANEW = ("--overwrite_output_dir", "true")
# The plan decides these.
_OF_THE_PLAN = {
    "output_dir": "each stage has a folder of its own in that of the plan",
    "output_file": "the results lie in the folder of the stage",
    "overwrite_output_dir": "remove the folder of the stage to run it anew",
    "resume_from_checkpoint": "a stage that was stopped goes on by itself",
}
# Options that name a file or a folder, which may lie beside the plan. Folders that are written are not among them.
_PATHS = re.compile(
    r"\w*_file|data_dir|\w*_name_or_path|config|tasks|models?|tokenizer_name|dataset_name|new_words|branch_from"
    r"|augmentation_(?:model|stop_words)"
)


@dataclass(frozen=True)
class Stage:
    """An entry of a plan.

    Attributes:
        name: Number, program and task: "2-finetune-mnli".
        program: What runs: a method, a recipe or a command.
        folder: Where it writes.
        options: Its options as the plan has them, those of all stages included.
        words: The same as words of a command line, with files beside the plan; neither model nor folder is among them.
        model: The model that it begins with: a name, or the folder of an earlier stage; None for fresh weights.
        begins_with: The same as the plan has it: a name, or "1-adapt".
        model_option: The option that takes it.
        models: What of its folder a later stage may begin with: "" is the folder itself, and "sst2" one in it.
    """

    name: str
    program: str
    folder: Path
    options: Mapping[str, Any]
    words: Sequence[str]
    model: str | None
    begins_with: str | None
    model_option: str
    models: list[str] = field(default_factory=list)

    def command(self, *, resumes: bool = True) -> list[str]:
        """Return the words of ``hf-pretrain`` that run the stage."""
        found = [self.program, *([] if self.model is None else [f"--{self.model_option}", self.model]), *self.words]
        if self.program == "evaluate":
            return [*found, "--output_file", str(self.folder / "evaluation.json")]
        found += ["--output_dir", str(self.folder)]
        if not resumes:
            return found
        # Features have no checkpoints: they are made anew.
        return [*found, *(_ANEW if self.program in MEASURES else ("--resume_from_checkpoint", "auto"))]

    def wanted(self) -> dict[str, Any]:
        """Return what decides the stage: if it changes, the stage is another one."""
        found: dict[str, Any] = {"program": self.program, "begins_with": self.begins_with, "options": {**self.options}}
        words = dict(_joined(self.words))
        if isinstance(tasks := words.get("tasks"), str) and self.program != "evaluate":
            found["tasks"] = _rows_of(tasks, self.options.get("task"))
        if (recipes := words.get("config")) is not None:
            found["recipes"] = [read for _, read in read_recipes([recipes] if isinstance(recipes, str) else recipes)]
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return plain


def _rows_of(tasks: str, chosen: str | list[str] | None) -> Any:
    """Return what a YAML file says of some tasks; the check of the stage refuses a file that says nothing."""
    try:
        rows = yaml.safe_load(Path(tasks).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    names = [chosen] if isinstance(chosen, str) else chosen
    return (
        {name: row for name, row in rows.items() if names is None or name in names} if isinstance(rows, dict) else None
    )


def read_stages(plan: str | Path, *, output_dir: str | Path) -> list[Stage]:
    """Return the stages of a plan; what their programs say of the options is not yet asked.

    Args:
        plan: YAML file of the stages.
        output_dir: Folder in which each stage has one of its own.

    Raises:
        InputError: If the file is no plan, a program or an option is unknown, a file is missing, or a stage begins with what an
            earlier one does not leave.
    """
    path = Path(plan)
    if not path.is_file():
        raise InputError(f"plan={str(plan)!r} is no file: name a YAML file with `stages`")
    shared, entries = read_plan(path, entries="stages")
    programs = [_program_of(name, where=f"{path}: entry {number}") for number, (name, _) in enumerate(entries, 1)]
    known = [_option_names(program) for program in programs]
    # A learning rate is of no use to what only measures.
    training = [set() if name in MEASURES else names for name, names in zip(programs, known, strict=True)]
    model = shared.pop("model_name_or_path", None)
    if model is not None and not isinstance(model, str):
        raise InputError(
            f"{path}: model_name_or_path={model!r} is no name of a model: give a folder, or a name on the Hub"
        )
    for name in shared:
        if not any(name in names for names in training):
            hint = _hint(name, set().union(*training), "stages")
            raise InputError(f"{path}: no stage that trains has an option {name!r}: {hint}")
    stages: list[Stage] = []
    for number, ((program, own), names) in enumerate(zip(entries, known, strict=True), 1):
        options = {name: value for name, value in shared.items() if name in training[number - 1]} | own
        stages.append(
            _stage_of(number, program, options, names, before=stages, model=model, plan=path, out=Path(output_dir))
        )
    return stages


def _program_of(name: str, *, where: str) -> str:
    """Return the name of a program that can be a stage."""
    known = [*methods(), *described_recipes(), *_COMMANDS]
    if name in COMMANDS and name not in _COMMANDS:
        raise InputError(f"{where}: {name} is no stage, because it trains and measures no model: run it by itself")
    if name not in known:
        raise InputError(f"{where}: unknown program {name!r}: {method_hint(name, known)}")
    return name


def _method_of(program: str) -> Method | None:
    """Return the method that a stage runs; None of a command."""
    return (
        None
        if program in _COMMANDS
        else load_method(described_recipes().get(program, (program,))[0] if program not in methods() else program)
    )


def _arguments_of(program: str) -> tuple[type, ...]:
    method = _method_of(program)
    arguments: tuple[type, ...] = import_module(COMMANDS[program][0]).ARGUMENTS if method is None else method.arguments
    return (*arguments, *load_method("mlm").arguments) if program == "adapt" else arguments


def _option_names(program: str) -> set[str]:
    return {known.name for kind in _arguments_of(program) for known in fields(kind)} | {"config"}


def _hint(name: str, known: Collection[str], program: str) -> str:
    return option_hint(name, known, prog=f"hf-pretrain {program}", dashes="")


def _model_option(program: str, *, before: str | None) -> str:
    """Return the option that takes the model of the stage before."""
    names = _option_names(program)
    choices = ("teacher_name_or_path", "encoder_name_or_path", "models", "model", "model_name_or_path")
    found = next(name for name in choices if name in names)
    method, earlier = _method_of(program), None if before is None else _method_of(before)
    # An encoder-decoder goes on as a whole; of an encoder the first half is made.
    is_whole = (
        found == "encoder_name_or_path" and method is not None and earlier is not None and method.name == earlier.name
    )
    return "model_name_or_path" if is_whole else found


def _stage_of(
    number: int,
    program: str,
    options: dict[str, Any],
    names: Collection[str],
    *,
    before: Sequence[Stage],
    model: str | None,
    plan: Path,
    out: Path,
) -> Stage:
    """Return a stage, after its options were compared with those of its program."""
    task = options.get("task") if program in ("finetune", "features") else None
    name = "-".join([str(number), program, *([re.sub(r"[^\w.-]", "_", task)] if isinstance(task, str) else [])])
    where = f"{plan}: stage {name}"
    # A recipe that has an objective of its own may have options that masked language modelling lacks.
    is_open = program == "adapt" and options.get("objective", "mlm") != "mlm"
    for option_name in options:
        if option_name in _OF_THE_PLAN:
            raise InputError(f"{where}: {option_name} is the plan's: {_OF_THE_PLAN[option_name]}; leave it out")
        if option_name not in names and option_name != _FROM and not is_open:
            raise InputError(f"{where}: unknown option {option_name!r}: {_hint(option_name, names, program)}")
    source = _source(options, before)
    earlier = next((stage.program for stage in before if stage.name == source.partition("/")[0]), None)
    taking = _model_option(program, before=earlier)
    own = options.get(taking)
    if own is not None and (before or model is not None):
        if before:
            what = f"{before[-1].name} has left, or name another stage by `from`"
        else:
            what = "the plan names beside `stages`"
        raise InputError(f"{where}: {taking}={own!r}, but the stage begins with the model that {what}: leave it out")
    if not before and _FROM in options:
        raise InputError(f"{where}: from={options[_FROM]!r}: there is no stage before the first: leave it out")
    begins_with: str | list[str] | None
    found: str | None
    if before:
        check_choice(source.partition("/")[0], [stage.name for stage in before], name=f"{where}: from")
        begins_with, found = source, str(out / source)
    else:
        begins_with, found = own or model, None if model is None else _beside(model, plan.parent)
    given = {name: value for name, value in options.items() if name != _FROM}
    return Stage(
        name=name,
        program=program,
        folder=out / name,
        options=given,
        words=list(_words(given, plan.parent, where=where)),
        model=found,
        begins_with=begins_with if begins_with is None or isinstance(begins_with, str) else ", ".join(begins_with),
        model_option=taking,
    )


def _source(options: Mapping[str, Any], before: Sequence[Stage]) -> str:
    """Return the stage, or the folder in it, whose model a stage begins with."""
    return str(options.get(_FROM) or (before[-1].name if before else ""))


def _words(options: Mapping[str, Any], folder: Path, *, where: str) -> Iterator[str]:
    """Yield options as words of a command line; files are named where they lie."""
    for name, value in options.items():
        if value is None or value == []:
            raise InputError(f"{where}: {name} is empty: give a value or remove the line")
        items = value if isinstance(value, list) else [value]
        if name != "phases" and isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise InputError(f"{where}: {name} is nested too deeply: give a list of single values")
        if name == "phases":
            raise InputError(f"{where}: phases are written in a recipe of their own: name it by `config`")
        if _PATHS.fullmatch(name):
            items = [_found(name, item, folder, where=where) for item in items]
        if isinstance(value, list):
            yield from (f"--{name}", *items)
        else:
            yield f"--{name}={json.dumps(items[0]) if isinstance(items[0], dict) else items[0]}"


def _joined(words: Sequence[str]) -> Iterator[tuple[str, str | list[str]]]:
    """Yield the options that `_words` gave, by name."""
    listed: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, is_single, value = word[2:].partition("=")
            listed = []
            yield name, value if is_single else listed
        else:
            listed.append(word)


def _found(name: str, value: str, folder: Path, *, where: str) -> str:
    """Return the path of a file that an option names, which lies beside the plan or in the current folder.

    Raises:
        InputError: If an option that takes files alone names none.
    """
    if name in ("language_file", "parallel_file"):
        language, _, listed = value.partition("=")
        return f"{language}={','.join(_found('train_file', part, folder, where=where) for part in listed.split(','))}"
    before, after = value, ""
    if name == "tasks" and (match := re.fullmatch(r"(.+\.ya?ml):(\w+)", value)):
        before, after = match[1], f":{match[2]}"
    elif name == "tasks" and not re.search(r"\.ya?ml$", value):
        # A name of a task in data_dir.
        return value
    found = _beside(before, folder)
    if (
        re.fullmatch(r"\w*_file|tasks|data_dir", name)
        and "://" not in found
        and not (_matches(Path(found)) or found == "-")
    ):
        raise InputError(
            f"{where}: {name}={value!r} is neither beside the plan nor in the current folder: give its path"
        )
    return found + after


def _beside(value: str, folder: Path) -> str:
    """Return the path beside the plan if something is there, else the value."""
    return str(folder / value) if not Path(value).is_absolute() and _matches(folder / value) else value


def _matches(path: Path) -> bool:
    return path.exists() or (has_magic(str(path)) and bool(glob(str(path), recursive=True)))


# The check of all stages


def check_stages(stages: Sequence[Stage], *, ended: Mapping[str, Sequence[str]], pushes: bool) -> None:
    """Refuse what a stage would refuse when its turn comes, as far as that can be known now; note what each leaves.

    Args:
        stages: The stages.
        ended: Those that have ended, with the models that they have left; their files may be gone by now.
        pushes: Whether to find out if each model can be pushed to the Hub.

    Raises:
        InputError: Naming the stage.
    """
    for stage in stages:
        if stage.name in ended:
            stage.models.extend(ended[stage.name])
            continue
        try:
            args = _check_options(stage)
            if pushes and getattr(args, "push_to_hub", False):
                repository_of(args)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
    by_name = {stage.name: stage for stage in stages}
    for stage in stages[1:]:
        source, _, part = str(stage.begins_with).partition("/")
        known = [f"{source}/{name}" if name else source for name in by_name[source].models]
        if part not in by_name[source].models:
            advice = (
                f"begin with {' or '.join(known)} by `from`"
                if known
                else f"put {source} last, or give another by `from`"
            )
            raise InputError(
                f"stage {stage.name} would begin with {stage.begins_with}, but {source} leaves no model there: {advice}"
            )


def _check_options(stage: Stage) -> Any:
    """Refuse the options of a stage that its program refuses; note what it leaves, and return how it trains."""
    program, words = stage.program, stage.command(resumes=False)[1:]
    if program == "adapt":
        return _check_adapted(stage, words)
    method = _method_of(program)
    if method is not None:
        if program not in methods():
            words = ["--config", program, *words]
        return _check_method(stage, method, words)
    module = import_module(COMMANDS[program][0])
    parsed = parse_command(module.ARGUMENTS, words, name=program, description="")
    checks: dict[str, Callable[..., None]] = {
        "finetune": _check_finetuning,
        "multitask": _check_tasks,
        "features": _check_features,
        "evaluate": _check_evaluation,
    }
    options, args = parsed if isinstance(parsed, tuple) else (parsed, None)
    checks[program](stage, options, args)
    return args


def _check_adapted(stage: Stage, words: list[str]) -> Any:
    own, others = adapt.split_options(words)
    args = parse_command(adapt.ARGUMENTS, own, name="adapt", description="")
    recipe = [] if args.objective in methods() else ["--config", args.objective]
    method = _method_of(args.objective)
    assert method is not None, "adapt has no other objectives"
    return _check_method(stage, method, [*recipe, "--model_name_or_path", args.model, *others])


def _check_method(stage: Stage, method: Method, words: list[str]) -> Any:
    parsed: ParsedRun = parse_run(method.arguments, words, prog=f"hf-pretrain {method.name}", description="")
    for data_args, _, training in [phase.options for phase in parsed.phases] or [parsed.options]:
        check_training_options(training)
        if hasattr(data_args, "check_named"):
            data_args.check_named()
        check_files(data_args)
    args = cast(Any, parsed.options[2])
    if parsed.phases:
        check_run(args, parsed.phases)
    is_whole = getattr(args, "adapter", "none") == "none" or getattr(args, "adapter_export", "merged") != "adapter"
    stage.models.extend([""] if is_whole else [])
    return args


def _check_finetuning(stage: Stage, options: Any, args: Any) -> None:
    options.load(options.spec(), seed=options.split_seed)
    if options.seeds is not None:
        stage.models.extend(f"seed-{seed}" for seed in options.seeds)
    elif args.export != "adapter":
        stage.models.append("")


def _check_tasks(stage: Stage, options: Any, args: Any) -> None:
    specs = options.specs()
    args.sampling_options(specs)
    for spec in specs.values():
        load_task(spec, seed=options.split_seed, validation_fraction=options.validation_fraction)
    stage.models.extend(["", *specs] if args.export != "adapter" else [])


def _check_features(stage: Stage, options: Any, args: None) -> None:
    spec = options.spec()
    options.heads(spec.type)
    options.load(spec, seed=options.seed)


def _check_evaluation(stage: Stage, options: Any, args: None) -> None:
    if "finetune" in (options.how or ()) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("how=finetune trains on one process: leave it out, or run `hf-pretrain evaluate` afterwards")
    find_tasks(options.tasks, data_dir=options.data_dir)
