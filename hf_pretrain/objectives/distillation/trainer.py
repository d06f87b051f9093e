"""The Trainers of distillation: on text, and on the examples of a task."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.students import compare, comparison_rows
from hf_pretrain.hub.card_text import Row
from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.modeling.outputs import PretrainingOutput
from hf_pretrain.objectives.distillation.arguments import DistillationArguments
from hf_pretrain.objectives.distillation.configuration import OF_PREDICTIONS
from hf_pretrain.objectives.distillation.description import DISTILBERT, TINYBERT, describe
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.distillation.task_examples import LengthGroupedSampler
from hf_pretrain.training.recurrence import global_batch_size
from hf_pretrain.training.report import print_table
from hf_pretrain.training.trainer import PretrainingTrainer

# Both models predict these once more, to be timed and compared for the card.
_EXAMPLES_TO_COMPARE = 128
_ENCODER_ONLY = "**Encoder only**: this run trained no head; go on with a loss of predictions, or fine-tune it."


class DistillationTrainer(PretrainingTrainer):
    """Trains the student of a [`DistillationModel`] on text."""

    model: DistillationModel

    objective = ObjectiveDescription(
        name="distil",
        title="Knowledge distillation",
        description=(
            "A small model, the student, is trained to compute what a larger one, the teacher, computes on the same text. The "
            "teacher is not changed."
        ),
        citations=(DISTILBERT,),
    )

    def __init__(self, model: DistillationModel | None, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        missing = set(self.model.config.losses or ()) - set(args.loss_names)
        if missing:
            raise InputError(
                f"{type(self).__name__} has no {sorted(missing)[0]} loss: build the model with its options"
            )
        self._comparison: dict[str, float] | None = None
        self._compared_at: tuple[int, int | None] | None = None

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Run the model, at this step's temperature where it is scheduled; see `PretrainingTrainer.run_model`."""
        if model.training and "temperature" in self._schedules:
            value = self.scheduled("temperature", self.model.config.temperature)
            # A tensor: a compiled model would be compiled anew for every number.
            inputs = inputs | {"temperature": torch.tensor(value, device=self.args.device)}
        return super().run_model(model, inputs)

    def loss_weight(self, name: str) -> float:
        """Return the weight of a loss in the total; what was measured beside the losses has none."""
        return super().loss_weight(name) if name in (self.model.config.losses or ()) else 0.0

    # The student against its teacher

    def compare(self) -> dict[str, float]:
        """Measure the student beside its teacher on held-out examples; {} where there are none, or the student is in shards.

        Returns:
            See [`hf_pretrain.evaluation.students.compare`].
        """
        held_out = self.eval_dataset
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()))
        teacher = self.model.teacher
        if (
            not isinstance(held_out, EpochDataset)
            or teacher is None
            or self.is_fsdp_enabled
            or self.is_deepspeed_enabled
        ):
            return {}
        student, answers = self.model.student, bool(OF_PREDICTIONS & set(self.model.config.losses or ()))
        models = (student, teacher.model.to(student.device))
        ours, theirs = (model if answers else model.base_model for model in models)
        with self.compute_loss_context_manager(), torch.random.fork_rng(devices=[]):
            return compare(
                ours,
                theirs,
                held_out,
                collator=self._collate_to_compare,
                max_examples=_EXAMPLES_TO_COMPARE,
            )

    def _collate_to_compare(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self.data_collator(examples)
        return {name: value for name, value in batch.items() if name != "teacher_logits"}

    def comparison_rows(self) -> list[Row]:
        """Return the header and the rows of a table of the student beside its teacher, measured once training has ended."""
        # A card that is pushed while training has measured other weights.
        now = (self.state.global_step, self.weights_step)
        if self._comparison is None or self._compared_at != now or now[1] is None:
            self._comparison, self._compared_at = self.compare(), now
        return comparison_rows(self._comparison) if self._comparison else []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        self._comparison = None
        return super().train(*args, **kwargs)

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write the model card, with the student beside its teacher; see `SavingMixin.create_model_card`."""
        if not self.is_world_process_zero():
            return
        config, args = self.model.config, cast(DistillationArguments, self.args)
        own = {
            "objective": describe(self.objective, args.weights(), head=config.head),
            "origin": self.model.origin,
            "note": "" if OF_PREDICTIONS & args.weights().keys() else _ENCODER_ONLY,
            "comparison": self.comparison_rows(),
        }
        super().create_model_card(model_name, **(own | facts))


class TaskDistillationTrainer(DistillationTrainer):
    """Trains the student of a [`DistillationModel`] on the examples of a task, of which the labels are optional."""

    objective = ObjectiveDescription(
        name="distil-task",
        title="Task distillation",
        description=(
            "A small model, the student, is trained to compute what a larger one, the teacher, computes on the examples of a "
            "task that the teacher was fine-tuned for. The teacher is not changed, and the examples need no labels."
        ),
        citations=(TINYBERT,),
        pipeline_tag="text-classification",
        usage="""\
from transformers import pipeline

classify = pipeline("text-classification", model="{repo}")
predictions = classify("The chef made a fine meal.")""",
    )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Shuffle by the seed and the epoch, with examples of about one length in a step where that is asked for."""
        dataset = cast(EpochDataset, self.train_dataset if train_dataset is None else train_dataset)
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler.of(dataset, seed=seed, batch_size=global_batch_size(self.args))


def print_comparison(trainer: DistillationTrainer, data: PreparedData) -> None:
    """Print the student beside its teacher."""
    rows = trainer.comparison_rows()
    if rows:
        header, *body = rows
        print("\nThe student beside its teacher, on held-out examples:")
        print_table(body, header=header)
