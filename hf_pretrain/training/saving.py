"""What a run leaves behind: whole checkpoints to resume from, and the export to share."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.facts import PretrainingCard
from hf_pretrain.hub.files import share_weights
from hf_pretrain.modeling.base import tokenizer_for
from hf_pretrain.training.card import HeldOutMixin, describe_run
from hf_pretrain.training.checkpoints import are_finite, begin_folder, remove_old_checkpoints, write_marker
from hf_pretrain.training.faults import full_disk, is_full_disk, not_finite
from hf_pretrain.training.resuming import ResumingMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


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
