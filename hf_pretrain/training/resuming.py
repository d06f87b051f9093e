"""Going on with a run as if nothing had cut it off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import xxhash
from torch import nn
from torch.utils.data import IterableDataset

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.training.checkpoints import check_hashes, last_whole_checkpoint, read_marker
from hf_pretrain.training.faults import reported_faults
from hf_pretrain.training.parsing import resolved_options

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
