"""The Trainer of an encoder with several objectives."""

from __future__ import annotations

from typing import Any, cast

from torch.utils.data import Dataset, Sampler

from hf_pretrain.data.epochs import EpochDataset, EpochSampler
from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.objectives.encoder.arguments import EncoderTrainingArguments
from hf_pretrain.objectives.encoder.description import describe
from hf_pretrain.objectives.masked_lm import MaskedLMTrainer
from hf_pretrain.training.trainer import PretrainingTrainer


class EncoderTrainer(PretrainingTrainer):
    """Trains an [`EncoderForPreTraining`] with any heads that can share it."""

    objective = ObjectiveDescription(
        name="encoder",
        title="Pre-training of an encoder",
        description="One encoder is trained with several objectives, each with a loss of its own.",
        pipeline_tag="fill-mask",
        usage=MaskedLMTrainer.objective.usage,
    )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Keep the order of a mixture, which is drawn anew each epoch by itself."""
        dataset = cast(EpochDataset, self.train_dataset if train_dataset is None else train_dataset)
        if getattr(dataset, "in_order", False):
            return EpochSampler(len(dataset), seed=self.args.seed, shuffle=False)
        return super()._get_train_sampler(dataset)

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write the model card, with the objectives of this run; see `SavingMixin.create_model_card`."""
        args = cast(EncoderTrainingArguments, self.args)
        weights = {name: self.loss_weight(name) for name in args.loss_names}
        own = {"objective": describe(self.objective, args.objectives, weights)}
        super().create_model_card(model_name, **(own | facts))
