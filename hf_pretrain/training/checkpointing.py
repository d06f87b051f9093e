"""Going on with a run as if nothing had cut it off.

What a run leaves behind: whole checkpoints to resume from, and the export to share.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.files import begin_folder, read_marker, share_weights, write_marker
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.record import PretrainingCard
from hf_pretrain.modeling.base import PretrainingModel, tokenizer_for
from hf_pretrain.training.card import HeldOutMixin, describe_run
from hf_pretrain.training.checkpoints import (
    are_finite,
    check_hashes,
    full_disk,
    is_full_disk,
    last_whole_checkpoint,
    not_finite,
    remove_old_checkpoints,
    reported_faults,
)
from hf_pretrain.training.parsing import resolved_options

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


# Options that change nothing of what is learned, or that are compared in another way; by how their names begin.
_NOT_COMPARED = (
    *("output_dir", "overwrite_", "logging_", "log_", "report_to", "run_name", "project", "save_", "eval_", "hub_"),
    *("push_to_hub", "disable_tqdm", "dataloader_num_", "dataloader_p", "preprocessing_num_", "ddp_", "enable_jit_"),
    *("per_device_", "gradient_accumulation_", "seed", "train_file", "validation_", "language_file", "parallel_file"),
    *("dataset_", "tokenizer_name", "metric_for_", "greater_is_", "load_best_", "torch_compile", "activation_check"),
    *("fsdp", "deepspeed", "accelerator_config", "full_determinism", "teacher_name", "teacher_device", "trackio_"),
    *("model_name", "generator_name", "use_cpu", "include_"),
)
# Bytes of tokens that are hashed; of more, every so many record batches.
_MOST_HASHED = 1 << 33


class ResumingMixin(_Base):
    """Resuming for a Trainer of composites.

    The weights must fit, what was measured before is not measured again, and a run that has done all its steps is not trained
    any more.
    """

    model: PretrainingModel

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: Path of a checkpoint, or True for the last whole one in the output folder.
            **kwargs: Other arguments of the stock method.

        Raises:
            InputError: If there is nothing to resume from, or it does not fit.
            RunError: If a disk is full, a worker died, or what was learned is not finite.
        """
        if resume_from_checkpoint is True:
            found = last_whole_checkpoint(self.args.output_dir)
            if found is None:
                raise InputError(f"resume_from_checkpoint=True, but {self.args.output_dir} holds no whole checkpoint")
            resume_from_checkpoint = str(found)
        if isinstance(resume_from_checkpoint, str):
            if resume_from_checkpoint != self.args.resume_from_checkpoint:
                # Otherwise the program has looked at it.
                check_hashes(resume_from_checkpoint)
            self._compare(resume_from_checkpoint)
        with reported_faults(self.args.output_dir):
            return super().train(resume_from_checkpoint, **kwargs)

    def run_facts(self) -> dict[str, Any]:
        """Return what a checkpoint tells of its run, so that a resume can say what has changed."""
        args = self.args
        options = getattr(self, "recipe", None) or resolved_options([args])
        return {
            "seed": args.seed,
            "draws": draws.VERSION,
            "model": self._model_types(),
            "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "text": self._text_fingerprint,
            "options": {name: value for name, value in options.items() if not name.startswith(_NOT_COMPARED)},
        }

    def _model_types(self) -> list[str]:
        config = self.model.config
        parts = [getattr(config, name, None) for name in config.sub_configs]
        return [part.model_type for part in parts if part is not None]

    @cached_property
    def _text_fingerprint(self) -> str | None:
        return text_fingerprint(self.train_dataset)

    def _compare(self, checkpoint: str) -> None:
        """Refuse the checkpoint of another model or seed, and say what else has changed since it was made.

        Raises:
            InputError: If it is of another model or seed.
        """
        facts = (read_marker(checkpoint) or {}).get("run")
        if facts is None:
            if self.is_world_process_zero():
                print(f"{checkpoint} is of an earlier version: order and masks go on as others", flush=True)
            return
        for name, now in (("seed", self.args.seed), ("model", self._model_types())):
            was = facts[name]
            if was != now:
                raise InputError(
                    f"resume_from_checkpoint={checkpoint!r} was made with the {name} {was}, and this run has {now}: give that of "
                    "the checkpoint, or start anew in another output_dir"
                )
        if not self.is_world_process_zero():
            return
        changes = list(_changes(facts, self.run_facts()))
        if changes:
            print(f"this run differs from {checkpoint}: {'; '.join(changes)}", flush=True)

    @property
    def num_steps_trained(self) -> int:
        """Steps since the last call of `train`, without those of the checkpoint that it went on from."""
        return self.state.global_step - self._initial_global_step

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train for an epoch; the stock method would take one more step where all of them are done."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Only the evaluation before the first step leaves the schedule alone, and a resumed run has had that one.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, but no speed or mean loss of a run that trained no step; see `transformers.Trainer.log`."""
        if "train_runtime" in logs and not self.num_steps_trained:
            for name in [name for name in logs if name.startswith("train_")]:
                del logs[name]
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            # torch lists every parameter of another shape, a line each.
            first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
            if first is None:
                raise
            raise InputError(
                f"resume_from_checkpoint: the checkpoint does not fit the model ({first}): "
                "resume with the options it was made with"
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that does not fit; the stock Trainer would go on from fresh weights with a log line."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise InputError(
                f"resume_from_checkpoint: the checkpoint does not fit the model (missing {sorted(missing)[:3]}, unexpected "
                f"{sorted(load_result.unexpected_keys)[:3]}): resume with the options it was made with"
            )
        self.model.tie_weights()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the facts of two runs, a phrase each."""
    if None not in (before["text"], now["text"]) and before["text"] != now["text"]:
        yield "the text has changed, so the examples that come are others"
    if before.get("draws") != now["draws"]:
        yield "random draws are others in this version, so order and masks go on as others"
    was, is_now = before["examples_per_step"], now["examples_per_step"]
    if was != is_now:
        yield f"a step had {was} examples, and has {is_now}"
    for name in sorted(before["options"].keys() | now["options"].keys()):
        was, is_now = (facts["options"].get(name, "its default") for facts in (before, now))
        if was != is_now:
            yield f"{name} was {was}, and is {is_now}"


def text_fingerprint(dataset: Any) -> str | None:
    """Return a hash of the tokens that a dataset is made from; None where there are none that are stored.

    Args:
        dataset: Examples, or views of them, down to the `datasets.Dataset` that holds the tokens. A stream has an identity of
            its own.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    lengths, tokens, is_empty = xxhash.xxh3_128(), xxhash.xxh3_128(), True
    for table in _stored_tables(dataset, set()):
        if "input_ids" not in table.column_names:
            continue
        is_empty = False
        column = table.data.table.column("input_ids")
        every = 1 + column.nbytes // _MOST_HASHED
        for number, chunk in enumerate(column.chunks):
            if hasattr(chunk, "offsets"):
                lengths.update(_bytes(np.diff(chunk.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)))
                chunk = chunk.flatten()  # noqa: PLW2901
            if number % every == 0:
                tokens.update(_bytes(chunk.to_numpy(zero_copy_only=False)))
        if table._indices is not None:
            lengths.update(_bytes(table._indices.column(0).to_numpy()))
    return None if is_empty else lengths.hexdigest() + tokens.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _stored_tables(value: Any, seen: set[int]) -> Iterator[datasets.Dataset]:
    """Yield the tables that are found behind a dataset, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, datasets.Dataset):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _stored_tables(part, seen)
    elif type(value).__module__.startswith("hf_pretrain."):
        yield from _stored_tables(getattr(value, "__dict__", {}), seen)


class SavingMixin(HeldOutMixin, ResumingMixin, _Base):
    """Saving for a Trainer of composites.

    `checkpoint-*` holds the composite as it is trained, so that a resume is strict; `save_model` and `push_to_hub` write the
    export: stock models with the card. A checkpoint is marked as whole when all processes have written their part; only then
    is it pushed, and older ones are removed. Numbers that are not finite are not saved.
    """

    _in_checkpoint = False
    # What the stock method must not see while it writes a checkpoint, as it was asked for.
    _asked: Mapping[str, Any] = {}
    _failure: Exception | None = None

    def check_finite(self) -> None:
        """Refuse weights, or a loss since the last row of the log, that are not finite on any process.

        Raises:
            RunError: If one is not; it names the last whole checkpoint.
        """
        numbers = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        loss = getattr(self, "_tr_loss", None)
        finite = are_finite(numbers if loss is None else [*numbers, loss])
        if self._any_rank(~finite):
            raise not_finite(
                self.args.output_dir, f"the weights or the loss are not finite at step {self.state.global_step}"
            )

    def _any_rank(self, flag: torch.Tensor | bool) -> bool:
        flag = torch.as_tensor(flag, device=self.args.device).to(torch.int64)
        return bool(self.accelerator.reduce(flag, reduction="sum"))

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._in_checkpoint = True
        try:
            with self._together(remove=folder):
                # No file of a run that was cut off here must pass for one of this run's.
                self._if_writer(begin_folder, folder)
            with self._together(remove=folder), self._options(push_to_hub=False, save_total_limit=None) as self._asked:
                super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                with self._together(remove=folder):
                    self._save_progress(folder)
            self._if_writer(share_weights, folder)
            with self._together(remove=folder):
                self._if_writer(self._mark, folder)
            if self.args.push_to_hub:
                with self._together():
                    self._push_from_checkpoint(str(folder))
        finally:
            self._in_checkpoint = False
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        self._if_writer(remove_old_checkpoints, folder.parent, limit=limit, keep=(folder, best))

    def _mark(self, folder: Path) -> None:
        facts = {"step": self.state.global_step, "world_size": self.args.world_size, "run": self.run_facts()}
        write_marker(folder, has_hashes=True, **facts)

    def _if_writer(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            function(*args, **kwargs)

    def _save_progress(self, folder: Path) -> None:
        """Write what else a resume needs into a checkpoint; called on every process, before it is marked as whole."""

    @contextmanager
    def _options(self, **values: Any) -> Iterator[dict[str, Any]]:
        """Set options of the arguments for a while; yields them as they were."""
        before = {name: getattr(self.args, name) for name in values}
        try:
            self._set_options(values)
            yield before
        finally:
            self._set_options(before)

    def _set_options(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.args, name, value)

    @contextmanager
    def _together(self, *, remove: Path | None = None) -> Iterator[None]:
        """Write on every process, and stop all of them when one finds the disk full.

        Args:
            remove: Folder that then holds nothing whole, and whose room is needed.
        """
        with self._noted_failure():
            yield
        failure, self._failure = self._failure, None
        if self._any_rank(failure is not None):
            if remove is not None:
                self._if_writer(shutil.rmtree, remove, ignore_errors=True)
            raise full_disk(self.args.output_dir, failure) from failure

    @contextmanager
    def _noted_failure(self) -> Iterator[None]:
        """Keep the error of a full disk until all processes know of it: the others would wait for this one forever."""
        try:
            yield
        except Exception as error:
            # Where the processes write together, the next call of the others already needs this one.
            if not is_full_disk(error) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise
            self._failure = self._failure or error

    # Files

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self._in_checkpoint:
            # Here and not later: the stock method has all processes wait for one another next.
            with self._noted_failure(), self._options(**self._asked):
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            self.model.export(folder, state_dict=state_dict)
            if self.processing_class is not None:
                with tokenizer_for(
                    getattr(self.model, self.model.export_parts[""]), self.processing_class
                ) as tokenizer:
                    tokenizer.save_pretrained(folder)

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write the model card and its plots into the output folder, from what was logged.

        Args:
            model_name: Title of the card; by default the name of the repository or the folder.
            **facts: Other fields of [`PretrainingCard`]; those that only the stock card knows are ignored.
        """
        if not self.is_world_process_zero():
            return
        known = {field.name for field in dataclasses.fields(PretrainingCard)}
        chosen = {name: value for name, value in facts.items() if name in known and value is not None}
        if model_name is not None:
            chosen["model_name"] = model_name
        write_card(describe_run(self, **chosen), self.args.output_dir)
