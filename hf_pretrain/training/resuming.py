"""Going on with a run as if nothing had cut it off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.training.checkpoints import last_whole_checkpoint
from hf_pretrain.training.faults import reported_faults

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


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
        with reported_faults(self.args.output_dir):
            return super().train(resume_from_checkpoint, **kwargs)

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
