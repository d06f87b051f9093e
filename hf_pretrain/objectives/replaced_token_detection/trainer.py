"""Options and Trainer of replaced token detection."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hf_pretrain.evaluation.detection import detection_metrics
from hf_pretrain.hub.card import ObjectiveDescription
from hf_pretrain.objectives.masked_lm import MaskedLMTrainingArguments
from hf_pretrain.training.trainer import PretrainingTrainer


@dataclass
class ReplacedTokenDetectionTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`ReplacedTokenDetectionTrainer`]; the defaults are the recipe of ELECTRA-Small, but for its length.

    Source: the paper's table 6 and `configure_pretraining.py` of the official code.
    """

    mlm_weight: float = field(default=1.0, metadata={"help": "Weight of the generator's loss."})
    rtd_weight: float = field(default=50.0, metadata={"help": "Weight of the discriminator's loss (lambda)."})
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


class ReplacedTokenDetectionTrainer(PretrainingTrainer):
    """Trains a [`ReplacedTokenDetectionForPreTraining`]: generator and discriminator jointly, in one step."""

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
    replaced = model(**inputs).logits.sigmoid()  # [1, length]: probability that a token is a replacement""",
    )

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the discriminator's metrics, padding left out."""
        return detection_metrics(scores, labels, loss=means["rtd_loss"])
