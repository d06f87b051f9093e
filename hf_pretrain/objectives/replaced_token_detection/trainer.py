"""Options and Trainer of replaced token detection."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.detection import collapse_warning, detection_metrics, discrimination_gain
from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.modeling.outputs import PretrainingOutput
from hf_pretrain.objectives.masked_lm import MaskedLMTrainingArguments
from hf_pretrain.objectives.replaced_token_detection.training_modes import TRAINING_MODES, TrainingModesMixin
from hf_pretrain.training.trainer import PretrainingTrainer

# No class of transformers has such a head: the root is the encoder alone.
_USAGE_OF_ANOTHER_HEAD = """\
from hf_pretrain.evaluation.suspicion import ReplacedTokenScorer  # opens the encoder with its head

scorer = ReplacedTokenScorer.from_pretrained("{repo}")
words = scorer("The chef ate the meal.")  # of each word: word, start, end, and score, the probability that it is a replacement"""

logger = logging.get_logger(__name__)


@dataclass
class ReplacedTokenDetectionTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`ReplacedTokenDetectionTrainer`]; the defaults are the recipe of ELECTRA-Small, but for its length.

    Source: the paper's table 6 and `configure_pretraining.py` of the official code.
    """

    ranges: ClassVar[dict[str, str]] = {"generator_steps": "(0, 2147483647]"}
    needs: ClassVar[dict[str, str]] = {"generator_steps": "training_mode=two_stage"}

    mlm_weight: float = field(default=1.0, metadata={"help": "Weight of the generator's loss."})
    rtd_weight: float = field(default=50.0, metadata={"help": "Weight of the discriminator's loss (lambda)."})
    rtd_weight_schedule: str | None = field(
        default=None, metadata={"help": "Weight over the steps, e.g. '0:10, 10000:50' or '0%:10, 50%:50'."}
    )
    temperature_schedule: str | None = field(
        default=None, metadata={"help": "Temperature of the generator's samples over the steps, in the same form."}
    )
    training_mode: str = field(
        default="joint",
        metadata={
            "help": "'joint': one step for both models; 'decoupled': in each step first the generator's, then the "
            "discriminator's (DeBERTa-v3); 'two_stage': the generator alone, then the discriminator, started from it."
        },
    )
    generator_steps: float = field(
        default=0.5, metadata={"help": "Steps of the first of two stages, or their share of all steps if below 1."}
    )
    generator_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the generator, if it has one of its own."}
    )
    mask_share: float = field(
        default=0.85, metadata={"help": "Share of the selected tokens that the generator sees masked, 0 to 1."}
    )
    random_share: float = field(
        default=0.0,
        metadata={"help": "Share of the selected tokens that the generator sees replaced at random, 0 to 1."},
    )
    adam_bias_correction: bool = field(
        default=False, metadata={"help": "Adam's bias correction; the official optimizer has none."}
    )
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Adam's epsilon."})
    decay_during_warmup: bool = field(
        default=True, metadata={"help": "Multiply the linear decay and the warm-up, as the official code does."}
    )

    def __post_init__(self) -> None:
        """Check the training mode, then everything else."""
        if self.training_mode not in TRAINING_MODES:
            raise InputError(f"training_mode={self.training_mode!r} must be one of {', '.join(TRAINING_MODES)}")
        if self.training_mode != "joint":
            # A backward pass reaches one of the two models only.
            self.ddp_find_unused_parameters = True
        super().__post_init__()


class ReplacedTokenDetectionTrainer(TrainingModesMixin, PretrainingTrainer):
    """Trains a [`ReplacedTokenDetectionForPreTraining`]: jointly, decoupled or in two stages."""

    objective = ObjectiveDescription(
        name="rtd",
        title="Replaced token detection",
        description=(
            "A small generator fills in masked tokens by sampling from its own predictions; the discriminator, which is this "
            "model, says of every token of the result whether it was replaced. The generator learns by masked language "
            "modelling, and no gradient passes through the sampled tokens."
        ),
        formula=(
            r"\mathcal{L} = -\frac{1}{|M|} \sum_{i \in M} \log p_G(x_i \mid \tilde{x})"
            r" + \lambda \, \frac{1}{n} \sum_{t=1}^{n} \mathrm{BCE}\left(D(\hat{x})_t, [\hat{x}_t \neq x_t]\right)"
        ),
        citations=(
            """\
@inproceedings{clark2020electra,
  title = {{ELECTRA}: Pre-training Text Encoders as Discriminators Rather Than Generators},
  author = {Clark, Kevin and Luong, Minh-Thang and Le, Quoc V. and Manning, Christopher D.},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}""",
        ),
        usage="""\
import torch
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {model_class}.from_pretrained("{repo}")
inputs = tokenizer("The chef ate the meal.", return_tensors="pt")
with torch.no_grad():
    replaced = model(**inputs).logits.squeeze(-1).sigmoid()  # [1, length]: probability that a token is a replacement""",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_training_mode()

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write the card, with code that opens the head at hand; see `SavingMixin.create_model_card`."""
        if self.model.discriminator_head is not None:
            facts = {"objective": replace(self.objective, usage=_USAGE_OF_ANOTHER_HEAD)} | facts
        super().create_model_card(model_name, **facts)

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Run the model, at this step's temperature where it is scheduled; see `PretrainingTrainer.run_model`."""
        if model.training and "temperature" in self._schedules:
            value = self.scheduled("temperature", self.model.config.temperature)
            # A tensor: a compiled model would be compiled anew for every number.
            inputs = inputs | {"temperature": torch.tensor(value, device=self.args.device)}
        return super().run_model(model, inputs)

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the labels' entropy that the discriminator explains."""
        if "rtd_loss" not in means:
            return {}
        return discrimination_gain(means["rtd_loss"], means["fake_rate"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and warn of a discriminator that has learned nothing; see `PretrainingTrainer.evaluate`."""
        metrics = super().evaluate(*args, **kwargs)
        trained = self.state.global_step - (self.generator_steps if self.args.training_mode == "two_stage" else 0)
        if trained > 2 * self.args.get_warmup_steps(max(1, self.state.max_steps)):
            warning = collapse_warning(metrics)
            if warning is not None:
                logger.warning(warning)
        return metrics

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the discriminator's metrics, padding left out."""
        return detection_metrics(scores, labels, loss=means["rtd_loss"])
