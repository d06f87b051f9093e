"""The order in which generator and discriminator are trained: in one step, one after the other in each step, or in two stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.outputs import PretrainingOutput
from hf_pretrain.modeling.sharing import shared_body_names
from hf_pretrain.objectives.replaced_token_detection.modeling import Stage

if TYPE_CHECKING:
    from hf_pretrain.training.trainer import PretrainingTrainer as _Base
else:
    _Base = object

TRAINING_MODES = ("joint", "decoupled", "two_stage")


class TrainingModesMixin(_Base):
    """Trains a [`ReplacedTokenDetectionForPreTraining`] in the order that the option `training_mode` names.

    One optimizer serves all: it skips what has no gradient, so a step taken after the generator's backward pass moves the
    generator alone, with moments, clipping and weight decay of its own.
    """

    _replaced_ids: torch.Tensor | None = None
    _handed_over = False

    def check_training_mode(self) -> None:
        """Refuse a mode that the models or the launcher do not allow."""
        self._waiting: list[dict[str, Any]] = []
        mode = self.args.training_mode
        if mode != "joint" and self.is_deepspeed_enabled:
            raise InputError(f"training_mode={mode!r} steps by itself, and so does DeepSpeed: use DDP, or 'joint'")
        if mode != "two_stage":
            return
        if self.model.config.embedding_sharing != "none":
            raise InputError(
                "training_mode='two_stage' starts the discriminator from the whole generator, which shares nothing with it "
                "afterwards: set embedding_sharing='none'"
            )
        shared_body_names(self.model.discriminator, self.model.generator, option="training_mode='two_stage'")

    @property
    def generator_steps(self) -> int:
        """Steps of the first stage."""
        share: float = self.args.generator_steps
        return round(share * self.state.max_steps) if share < 1 else int(share)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        # Of an earlier training, which may have been of another model.
        self._handed_over, self._waiting, self._replaced_ids = False, [], None
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch forward and backward."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        if self.args.training_mode == "decoupled":
            return self._decoupled_step(model, step, inputs)
        return step(inputs | {"stage": self._stage()})

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Run the model and keep what the generator sampled, for the discriminator's turn; see `PretrainingTrainer`."""
        outputs = super().run_model(model, inputs)
        self._replaced_ids = outputs.replaced_ids
        return outputs

    # One after the other in each step

    def _decoupled_step(
        self, model: nn.Module, step: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any]
    ) -> torch.Tensor:
        """Run the generator; with the step's last micro-batch also move it, and then run the discriminator on them all."""
        loss = step(inputs | {"stage": "generator"})
        self._waiting.append(inputs | {"stage": "discriminator", "replaced_ids": self._replaced_ids})
        if not self.accelerator.sync_gradients:
            return loss
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        waiting, self._waiting = self._waiting, []
        for number, batch in enumerate(waiting, start=1):
            # The gradients of the ranks are exchanged once, with the last.
            with nullcontext() if number == len(waiting) else self.accelerator.no_sync(model):
                loss = loss + step(batch)
        return loss

    # In two stages

    def _stage(self) -> Stage:
        if self.args.training_mode != "two_stage":
            return "joint"
        if self.state.global_step < self.generator_steps:
            return "generator"
        # A checkpoint of this very step was written before the hand-over, any later one after it.
        is_first = self.state.global_step == self.generator_steps
        if is_first and not self._handed_over:
            body = self.model.generator.base_model.state_dict()
            self.model.discriminator.base_model.load_state_dict(body)
            self._handed_over = True
        return "discriminator"

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule; in two stages, one for each of them."""
        create = partial(super().create_scheduler, optimizer=optimizer)
        if self.args.training_mode != "two_stage" or self.lr_scheduler is not None:
            return create(num_training_steps)
        share = self.args.generator_steps
        first = round(share * num_training_steps) if share < 1 else int(share)
        if not 0 < first < num_training_steps:
            raise InputError(
                f"generator_steps={share} leaves a stage without steps: there are {num_training_steps} in all"
            )
        stages = []
        for steps in (first, num_training_steps - first):
            self.lr_scheduler = None
            stages.append(create(steps))
        if not all(isinstance(stage, LambdaLR) for stage in stages):
            raise InputError(
                f"lr_scheduler_type={self.args.lr_scheduler_type!r} cannot start anew: use 'linear' or 'cosine'"
            )
        factors = [stage.lr_lambdas[0] for stage in stages]
        self.lr_scheduler = LambdaLR(stages[0].optimizer, partial(_one_after_the_other, factors=factors, first=first))
        return self.lr_scheduler

    # A learning rate of the generator's own

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer, with groups of the generator's own if it has a learning rate of its own."""
        is_new, rate = self.optimizer is None, self.args.generator_learning_rate
        optimizer = super().create_optimizer(model)
        if is_new and rate is not None:
            ours = {id(parameter) for parameter in self.model.generator.parameters()}
            for group in list(optimizer.param_groups):
                generator = [parameter for parameter in group["params"] if id(parameter) in ours]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
                optimizer.add_param_group({**group, "params": generator, "lr": rate})
        return optimizer


def _one_after_the_other(step: int, *, factors: list[Callable[[int], float]], first: int) -> float:
    return factors[0](step) if step < first else factors[1](step - first)
