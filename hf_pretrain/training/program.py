"""What every program does around its training: claim the output folder, rehearse, load the data, train, export, report."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch.utils.data import IterableDataset
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.data.documents.tokenizers import check_tokenizer
from hf_pretrain.data.prepare import DataArguments, PreparedData, prepare_data
from hf_pretrain.data.prepared import check_same_tokenizer, prepared_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.hub.pushing import repository_of
from hf_pretrain.hub.run import adapter_names
from hf_pretrain.hub.text import (
    bare_name,
    evaluated_steps,
    evaluation_at,
    measured,
    phase_metrics,
    split_by_held_out_set,
    with_perplexity,
)
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.loading import from_pretrained, quiet
from hf_pretrain.options import all_options, resolved_options, write_recipe
from hf_pretrain.training.arguments import PretrainingArguments, check_training_options
from hf_pretrain.training.method import Method
from hf_pretrain.training.output_folder import output_directory, paths_in
from hf_pretrain.training.parsing import parse_run
from hf_pretrain.training.phases.branch import find_branch
from hf_pretrain.training.phases.plan import check_run, plan
from hf_pretrain.training.phases.running import check_files, check_same_model, shapes_of, train_phases
from hf_pretrain.training.processes import (
    StopOnRequest,
    Stopping,
    is_sharded,
    nothing_trained,
    part_at_exit,
    refused_by_libraries,
    reported_faults,
    set_timeout,
    stopped,
    stopping_on_sigterm,
)
from hf_pretrain.training.rehearsal import made_up_data, rehearse
from hf_pretrain.training.trainer import PretrainingTrainer

RECIPE = "recipe.yaml"


def load_data(
    data_args: DataArguments,
    model_args: ModelArguments,
    args: PretrainingArguments,
    *,
    special_tokens: Sequence[str] = ("mask", "pad"),
    prepare: Callable[..., PreparedData] | None = None,
) -> PreparedData:
    """Read the text and cut it into examples, with the tokenizer of the run, of the checkpoint to continue, or a new one.

    Args:
        data_args: What to read.
        model_args: Names the checkpoint.
        args: Seed and output folder.
        special_tokens: Roles of the special tokens that the tokenizer must have.
        prepare: Makes the examples, called as [`prepare_data`] is, which is the default.
    """
    tokenizer = _known_tokenizer(data_args, model_args, args)
    if tokenizer is not None:
        # Check it before hours of tokenizing, not after.
        check_tokenizer(tokenizer, roles=special_tokens)
    return (prepare or prepare_data)(
        data_args,
        seed=args.seed,
        output_dir=args.output_dir,
        tokenizer=tokenizer,
        first=args.main_process_first(local=False, desc="data"),
    )


def _known_tokenizer(
    data_args: Any, model_args: ModelArguments, args: PretrainingArguments
) -> PreTrainedTokenizerBase | None:
    if args.resume_from_checkpoint is not None:
        with quiet():
            # transformers would warn of the composite's configuration, which it does not know.
            return from_pretrained(AutoTokenizer, args.resume_from_checkpoint)
    checkpoints = (getattr(model_args, f"{part}_name_or_path", None) for part in ("model", "teacher", "encoder"))
    name = data_args.tokenizer_name or next(filter(None, checkpoints), None)
    if name is None and (prepared := getattr(data_args, "prepared_data", None)):
        return prepared_tokenizer(prepared, block_size=data_args.block_size)
    return None if name is None else from_pretrained(AutoTokenizer, name)


def train_method(method: Method, argv: list[str] | None = None) -> None:
    """Run a method from its command line to its report.

    Args:
        method: The method.
        argv: The arguments, without the name of the program; those of the process if None.
    """
    parsed = parse_run(method.arguments, argv, prog=f"hf-pretrain {method.name}", description=method.description)
    options, parts = parsed.options, [phase.options for phase in parsed.phases] or [parsed.options]
    args = options[2]
    for data_args, _, training in parts:
        _check_part(data_args, training)
    if parsed.phases:
        check_run(args, parsed.phases)
    set_timeout(args)
    read = dict.fromkeys(path for part in parts for path in paths_in(part, sys.argv[1:] if argv is None else argv))
    with (
        stopping_on_sigterm() as stopping,
        output_directory(args, inputs=read) as folder,
        reported_faults(folder.path),
    ):
        if args.push_to_hub and args.process_index == 0:
            # Missing rights must show before hours of tokenizing.
            repository_of(args)
        branch = find_branch(args.branch_from, resumed=args.resume_from_checkpoint)
        phases = plan(args, parsed.phases, branch=branch) if parsed.phases else []
        rehearsed = [phase.options for phase in phases] or [options]
        _rehearse(method, rehearsed, checkpoint=args.resume_from_checkpoint or (branch and branch.checkpoint) or None)
        if phases:
            trainer, data = train_phases(
                phases,
                checkpoint=args.resume_from_checkpoint,
                branch=branch,
                build=partial(_build, method),
                train=partial(_train, recipe_of=options, stop=StopOnRequest(stopping)),
                begins=folder.training_begins,
            )
            export(trainer)
        else:
            trainer, data = _build(method, options)
            folder.training_begins()
            run(trainer, options, stopping=stopping)
        if trainer.is_world_process_zero():
            # The report opens the export, on this process alone.
            unset_hf_deepspeed_config()
            print_report(trainer)
            if method.demonstrate is not None and not is_sharded(trainer.model):
                method.demonstrate(trainer, data)
        part_at_exit()


def _check_part(data_args: Any, training: PretrainingArguments) -> None:
    """Refuse options of a run, or of a phase, before any text is read."""
    check_training_options(training)
    if isinstance(data_args, DataArguments):
        data_args.check_named()
    if training.evaluation_tasks:
        # Measures are above training, and few runs have tasks.
        from hf_pretrain.evaluation.suite.runs import check_tasks

        check_tasks(training)
    # SIGTERM saves a checkpoint in any case.
    training.enable_jit_checkpoint = False


def _rehearse(method: Method, parts: Sequence[tuple[Any, ...]], *, checkpoint: str | None) -> None:
    """Refuse what the run, or one of its phases, would refuse after its text was read.

    Args:
        method: The method.
        parts: Options of the run, or of each phase.
        checkpoint: What the run goes on from, with its tokenizer.
    """
    shapes: list[dict[str, Any]] = []
    for data_args, model_args, args in parts:
        given, args.resume_from_checkpoint = args.resume_from_checkpoint, checkpoint
        tokenizer = _known_tokenizer(data_args, model_args, args)
        args.resume_from_checkpoint = given
        if tokenizer is not None:
            check_tokenizer(tokenizer, roles=method.special_tokens)
            check_offsets(tokenizer)
        if tokenizer is not None and (prepared := getattr(data_args, "prepared_data", None)):
            check_same_tokenizer(prepared, tokenizer)
        if args.course is not None:
            check_files(data_args)
        rehearse(
            (data_args, model_args, args),
            build_trainer=method.build_trainer,
            tokenizer=tokenizer,
            made_up=method.made_up or made_up_data,
            left_out=method.left_out,
            note=None if args.course is None else lambda trainer: shapes.append(shapes_of(trainer)),
        )
        if shapes and args.course is not None:
            check_same_model(shapes[0], shapes[-1], args.course)


def _build(method: Method, options: tuple[Any, ...]) -> tuple[PretrainingTrainer, PreparedData]:
    """Read the text of a run or of a phase, and make its Trainer."""
    data_args, model_args, args = options
    data = (method.load or load_data)(data_args, model_args, args, special_tokens=method.special_tokens)
    # At DeepSpeed's stage 3 transformers would divide each stock model as it is built, before they are joined; the Trainer
    # sets its configuration again, and the whole is divided then.
    unset_hf_deepspeed_config()
    # The Trainer seeds too, but the weights are drawn before it exists.
    set_seed(args.seed)
    with refused_by_libraries():
        trainer = method.build_trainer(data, model_args, args)
    check_steps(trainer)
    return trainer, data


def _train(trainer: PretrainingTrainer, *, recipe_of: tuple[Any, ...], stop: StopOnRequest) -> None:
    """Train until the end of the run or of the phase.

    Args:
        trainer: The method's Trainer, ready to start.
        recipe_of: The dataclasses that the program was started with.
        stop: Ends the training where it is asked to.

    Raises:
        RunError: If the run was stopped.
    """
    args = trainer.args
    # Bars of saving and loading a model, which takes less than a second here, would only bury the training's.
    transformers_logging.disable_progress_bar()
    trainer.recipe, trainer.options = resolved_options(recipe_of), all_options(recipe_of)
    trainer.add_callback(stop)
    with refused_by_libraries((ValueError, ImportError), unless=lambda: trainer.has_begun):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if stop.has_stopped:
        raise stopped(args.output_dir, trainer.state.global_step)


def run(trainer: PretrainingTrainer, options: tuple[Any, ...], *, stopping: Stopping | None = None) -> None:
    """Train, evaluate, export with card and recipe, and push if asked.

    A run that is finished, started again, is exported and pushed once more.

    Args:
        trainer: The method's Trainer, ready to start.
        options: The dataclasses that the program was started with; saved as a recipe that starts it again.
        stopping: Notes that the run is to stop.

    Raises:
        RunError: If no step was trained, or the run was stopped.
    """
    _train(trainer, recipe_of=options, stop=StopOnRequest(Stopping() if stopping is None else stopping))
    export(trainer)


def export(trainer: PretrainingTrainer) -> None:
    """Evaluate what was trained, export it with card and recipe, and push it if asked.

    Raises:
        RunError: If no step was trained.
    """
    args = trainer.args
    if not trainer.state.global_step:
        raise nothing_trained(len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None)
    if not trainer.num_steps_trained and trainer.is_world_process_zero():
        print(f"all {trainer.state.max_steps} steps are done already: exporting what they trained", flush=True)
    trainer.checkpoints.check_finite()
    trainer.evaluate_export()
    if trainer.tasks is not None:
        trainer.tasks.measure_trained()
    trainer.save_state()
    if args.should_save:
        write_recipe(trainer.recipe, Path(args.output_dir) / RECIPE, program=f"hf-pretrain {trainer.objective.name}")
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_model()
        trainer.create_model_card()


def check_steps(trainer: PretrainingTrainer) -> None:
    """Refuse a text that has no whole batch where only whole ones count.

    Raises:
        InputError: If there are no examples, or fewer than a batch of which `dataloader_drop_last` leaves nothing.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        return
    batch = args.train_batch_size * args.world_size
    if not len(dataset):
        raise InputError("the training text gives no example: name more text")
    if args.dataloader_drop_last and len(dataset) < batch:
        raise InputError(
            f"dataloader_drop_last=True leaves out the only batch: the text gives {len(dataset)} examples, and a batch has "
            f"{batch}; lower per_device_train_batch_size to {max(1, len(dataset) // args.world_size)} or less, or leave it out"
        )


def print_report(trainer: PretrainingTrainer) -> None:
    """Open the export as a user would, and print the held-out numbers before and after training, and where everything is."""
    output_dir = Path(trainer.args.output_dir)
    root = trainer.model.root
    print(f"\nThe export in {output_dir} {_how_it_opens(root, output_dir)}:")
    adapters = adapter_names(root)
    # transformers knows no body of two models that are joined.
    classes = (AutoModel, type(root)) if type(root.config) in AutoModel._model_mapping else (type(root),)
    for model_class in () if adapters else classes:
        print(f"  {_loading_line(model_class, output_dir)}")
    weights_step = trainer.held_out.weights_step
    if trainer.course is not None:
        header, *body = phase_metrics(trainer.state.log_history, trainer.course.described()) or [()]
        if body:
            print("\nHeld-out text, each column with the masks and blocks of its phase:")
            print_table(body, header=("", *header[1:]))
    is_one = trainer.course is None
    rows = held_out_rows(trainer.state.log_history, weights_step=weights_step) if is_one else []
    if rows:
        is_earlier = weights_step is not None and weights_step < trainer.state.global_step
        when = f"at step {weights_step:,}, which is exported" if is_earlier else "after training"
        print(f"\nHeld-out text, before and {when}:")
        print_table(rows, header=("", "before", "after"))
    if trainer.tasks is not None:
        scores, columns = trainer.tasks.table()
        print("\nTasks:")
        print_table(scores, header=columns)
    print(f"\nmodel card  {output_dir / 'README.md'}")
    for plot in sorted((output_dir / "plots").glob("*.png")):
        print(f"plot        {plot}")
    if trainer.args.push_to_hub and trainer.hub_model_id:
        print(f"model page  {constants.ENDPOINT}/{trainer.hub_model_id}")


def held_out_rows(
    log_history: Sequence[dict[str, float]], *, weights_step: int | None = None
) -> list[tuple[str, str, str]]:
    """Return name, value before and value after training of every held-out quantity in the log, but speeds.

    A value is empty where it was not measured: before training is step 0 and no later one. A total that is its only component is
    left out, and language models have their perplexity.

    Args:
        log_history: Rows as in `Trainer.state.log_history`.
        weights_step: Step of the weights that are exported; by default the last one that was evaluated.
    """
    if weights_step is None:
        weights_step = max(evaluated_steps(log_history), default=0)
    before, after = (_by_name(evaluation_at(log_history, step)) for step in (0, weights_step or None))
    return [(name, _number(before.get(name)), _number(after.get(name))) for name in sorted(before | after)]


def _by_name(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each metric by its name, with that of its held-out set in front where there are several."""
    return {
        f"{held_out_set}_{bare_name(key)}" if held_out_set else bare_name(key): value
        for held_out_set, row in split_by_held_out_set(metrics).items()
        for key, value in with_perplexity(measured(row)).items()
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _how_it_opens(root: PreTrainedModel, folder: Path) -> str:
    """Return how the export is opened by somebody who has only transformers."""
    if adapters := adapter_names(root):
        return (
            f"is the adapter {', '.join(adapters)} alone, without the model below it: open that with transformers, and then "
            f"model.load_adapter({str(folder)!r})"
        )
    if type(root).__module__.startswith("transformers."):
        return "opens with stock transformers"
    if any(folder.glob("*.py")):
        return "opens with transformers and the code beside it, where trust_remote_code=True is given"
    return "opens with transformers where hf_pretrain is imported"


def _loading_line(model_class: type[PreTrainedModel] | type[AutoModel], folder: Path) -> str:
    # The stock loader warns of the head's weights when only the encoder is loaded: one line below says it.
    with quiet():
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    heads = {name.split(".")[0] for name in info["unexpected_keys"]}
    fresh = {name.split(".")[0] for name in info["missing_keys"]}
    missing = f"{len(info['missing_keys'])} missing keys"
    missing += f" (the {', '.join(sorted(fresh))}, which the objective does not train)" if fresh else ""
    aside = f", the pre-training head {', '.join(sorted(heads))} set aside" if heads else ", 0 unexpected"
    return f"{model_class.__name__}.from_pretrained -> {type(model).__name__}: {missing}{aside}"


def print_table(rows: Iterable[Sequence[str]], *, header: Sequence[str]) -> None:
    """Print rows of text in columns, the first to the left and the others to the right."""
    table = [tuple(header), *map(tuple, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  " + "  ".join(cells).rstrip())


def coloured_words(words: Sequence[tuple[str, float]], *, colour: bool | None = None) -> str:
    """Return words with their probabilities made visible.

    Args:
        words: Pairs of a word and a probability.
        colour: Whether to paint the background from white to red by ANSI codes; by default if standard output is a terminal
            (or FORCE_COLOR is set, and NO_COLOR is not). Otherwise, words above one half are marked with their probability.
    """
    if colour is None:
        colour = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    if not colour:
        return " ".join(f"[{word} {probability:.2f}]" if probability >= 0.5 else word for word, probability in words)
    shades = []
    for word, probability in words:
        # The root makes small probabilities visible: a replaced token is rare, so one in five is already much.
        other = round(255 * (1 - math.sqrt(probability)))
        shades.append(f"\x1b[48;2;255;{other};{other}m\x1b[30m {word} \x1b[0m")
    return "".join(shades)
