"""What every program does around its training: claim the output folder, rehearse, load the data, train, export, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from hf_pretrain.data.documents import check_offsets
from hf_pretrain.data.prepare import DataArguments, PreparedData, prepare_data
from hf_pretrain.data.tokenizer_training import check_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments, from_pretrained
from hf_pretrain.training.arguments import PretrainingArguments, check_training_options
from hf_pretrain.training.faults import nothing_trained, refused_by_libraries, reported_faults, stopped
from hf_pretrain.training.made_up import made_up_data
from hf_pretrain.training.output_folder import output_directory, paths_in
from hf_pretrain.training.parsing import parse_arguments, resolved_options
from hf_pretrain.training.processes import Stopping, StopWhenAsked, set_timeout, stopping_on_sigterm
from hf_pretrain.training.pushing import repository_of
from hf_pretrain.training.recipes import write_recipe
from hf_pretrain.training.rehearsal import rehearse
from hf_pretrain.training.report import print_report
from hf_pretrain.training.sharding import is_sharded
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
        special_tokens: What the tokenizer must have.
        prepare: Makes the examples, called as [`prepare_data`] is, which is the default.
    """
    tokenizer = _known_tokenizer(data_args, model_args, args)
    if tokenizer is not None:
        # Before hours of tokenizing, not after.
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
    name = (
        data_args.tokenizer_name or model_args.model_name_or_path or getattr(model_args, "teacher_name_or_path", None)
    )
    return None if name is None else from_pretrained(AutoTokenizer, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing but errors for a while."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def train_method(
    argv: list[str] | None,
    *,
    name: str,
    description: str,
    arguments: tuple[type, type, type],
    build_trainer: Callable[[PreparedData, Any, Any], PretrainingTrainer],
    load: Callable[..., PreparedData] = load_data,
    demonstrate: Callable[[Any, PreparedData], None] | None = None,
    special_tokens: Sequence[str] = ("mask", "pad"),
    made_up: Callable[..., PreparedData] = made_up_data,
    left_out: Mapping[str, Any] | None = None,
) -> None:
    """Run a method from its command line to its report.

    Args:
        argv: The arguments, without the name of the program; those of the process if None.
        name: Name of the method.
        description: Text of the program's help.
        arguments: Dataclasses of the options of data, model and training.
        build_trainer: Puts the method's model, collator and Trainer together.
        load: Makes examples from the options, called as [`load_data`] is.
        demonstrate: Prints more at the end, on the first process, to show what was learned.
        special_tokens: What the tokenizer must have.
        made_up: Makes examples for the rehearsal, called as [`made_up_data`] is.
        left_out: Options of training that the rehearsal has otherwise, because they cost time alone.
    """
    options = parse_arguments(arguments, argv, prog=f"hf-pretrain {name}", description=description)
    data_args, model_args, args = options
    check_training_options(args)
    # SIGTERM saves a checkpoint in any case.
    args.enable_jit_checkpoint = False
    set_timeout(args)
    inputs = paths_in(options, sys.argv[1:] if argv is None else argv)
    with (
        stopping_on_sigterm() as stopping,
        output_directory(args, inputs=inputs) as folder,
        reported_faults(folder.path),
    ):
        if args.push_to_hub and args.process_index == 0:
            # Rights that are missing are told before hours of tokenizing.
            repository_of(args)
        tokenizer = _known_tokenizer(data_args, model_args, args)
        if tokenizer is not None:
            check_tokenizer(tokenizer, roles=special_tokens)
            check_offsets(tokenizer)
        rehearse(options, build_trainer=build_trainer, tokenizer=tokenizer, made_up=made_up, left_out=left_out or {})
        data = load(data_args, model_args, args, special_tokens=special_tokens)
        # At DeepSpeed's stage 3 transformers would divide each stock model as it is built, before they are joined; the Trainer
        # sets its configuration again, and the whole is divided then.
        unset_hf_deepspeed_config()
        # The Trainer seeds too, but the weights are drawn before it is there.
        set_seed(args.seed)
        with refused_by_libraries():
            trainer = build_trainer(data, model_args, args)
        check_steps(trainer)
        folder.training_begins()
        run(trainer, options, stopping=stopping)
        if trainer.is_world_process_zero():
            # The report opens the export, on this process alone.
            unset_hf_deepspeed_config()
            print_report(trainer)
            if demonstrate is not None and not is_sharded(trainer.model):
                demonstrate(trainer, data)
        trainer.end()


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
    args = trainer.args
    # Bars of saving and loading a model, which takes less than a second here, would only bury the training's.
    transformers_logging.disable_progress_bar()
    trainer.recipe = resolved_options(options)
    stop = StopWhenAsked(Stopping() if stopping is None else stopping)
    trainer.add_callback(stop)
    with refused_by_libraries((ValueError, ImportError), unless=lambda: stop.has_begun):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if stop.has_stopped:
        raise stopped(args.output_dir, trainer.state.global_step)
    if not trainer.state.global_step:
        raise nothing_trained(len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None)
    if not trainer.num_steps_trained and trainer.is_world_process_zero():
        print(f"all {trainer.state.max_steps} steps are done already: exporting what they trained", flush=True)
    trainer.check_finite()
    trainer.evaluate_export()
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
