"""Pushing a run to the Hub while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, hf_api

from hf_pretrain.training.saving import SavingMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class PushingMixin(SavingMixin, _Base):
    """Pushing for a Trainer of composites: what the Hub gets is the export, with its card, not the checkpoint."""

    push_in_progress: PushInProgress | None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push while training: the export of this moment, not the composite that the checkpoint holds."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing():
            if not self.args.hub_always_push:
                return
            # The upload reads the files that the export would write over.
            self._finish_current_push()
        # Leaves the checkpoint's layout for the time of the export.
        self._in_checkpoint = False
        self.save_model(_internal_call=True)
        self._in_checkpoint = True
        if not self.is_world_process_zero():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        jobs = [self._upload(self.args.output_dir, ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"])]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            jobs.append(self._upload(checkpoint_folder, path_in_repo="last-checkpoint"))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            jobs.append(self._upload(checkpoint_folder, path_in_repo=Path(checkpoint_folder).name))
        self.push_in_progress = PushInProgress(jobs)

    def _is_pushing(self) -> bool:
        """Return whether an upload is going on, on every rank: only the first one knows, but all have to export."""
        push = getattr(self, "push_in_progress", None)
        is_busy = torch.tensor(push is not None and not push.is_done(), dtype=torch.int64, device=self.args.device)
        return bool(self.accelerator.reduce(is_busy, reduction="sum"))

    def _upload(self, folder: str, **options: Any) -> Any:
        return hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
            **options,
        )
