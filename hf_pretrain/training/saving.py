"""What a run leaves behind: whole checkpoints to resume from, and the export to share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_pretrain.errors import InputError
from hf_pretrain.hub.card import PretrainingCard, write_card
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.training.card import describe_run

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SavingMixin(_Base):
    """Saving for a Trainer of composites.

    `checkpoint-*` holds the composite as it is trained, so that a resume is strict; `save_model` and `push_to_hub` write the
    export: stock models with the card.
    """

    model: PretrainingModel
    _in_checkpoint = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self._in_checkpoint:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            self.model.export(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

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
