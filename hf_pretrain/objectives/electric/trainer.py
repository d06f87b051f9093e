"""Options and Trainer of Electric."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hf_pretrain.evaluation.detection import discrimination_gain
from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.objectives.masked_lm import MaskedLMTrainingArguments
from hf_pretrain.training.trainer import PretrainingTrainer


@dataclass
class ElectricTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`ElectricTrainer`]; the defaults are ELECTRA-Small's, whose code Electric is trained by too.

    Source: `configure_pretraining.py` of the official code, with `electric_objective`.
    """

    cloze_weight: float = field(default=1.0, metadata={"help": "Weight of the generator's loss."})
    nce_weight: float = field(default=50.0, metadata={"help": "Weight of the discriminator's loss (lambda)."})
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens of each example that noise replaces, 0 to 1."}
    )
    mask_share: float = field(default=0.0, metadata={"help": "Keep at 0: the generator reads the text itself."})
    random_share: float = field(default=0.0, metadata={"help": "Keep at 0: the generator reads the text itself."})
    mask_unknown: bool = field(
        default=False, metadata={"help": "Keep off: the unknown token is never sampled and has no energy."}
    )
    adam_bias_correction: bool = field(
        default=False, metadata={"help": "Adam's bias correction; the official optimizer has none."}
    )
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Adam's epsilon."})
    decay_during_warmup: bool = field(
        default=True, metadata={"help": "Multiply the linear decay and the warm-up, as the official code does."}
    )


class ElectricTrainer(PretrainingTrainer):
    """Trains an [`ElectricForPreTraining`]: generator and discriminator jointly, in one step."""

    objective = ObjectiveDescription(
        name="electric",
        title="Energy-based cloze modelling",
        description=(
            "A generator of two towers, one reading from each side, gives every token a probability q from all the others; "
            "some tokens are replaced by samples of it. This model gives each token an energy, and learns to tell the text "
            "from the noise by noise-contrastive estimation: as the noise's probability is known, the energy becomes an "
            "estimate of the token's negative log-probability given the rest of the text."
        ),
        formula=(
            r"\mathcal{L} = -\frac{1}{n} \sum_{t=1}^{n} \log q(x_t \mid x_{\setminus t})"
            r" + \lambda \, \frac{1}{n} \sum_{t=1}^{n} \mathrm{BCE}\left(E(\hat{x})_t"
            r" + \log q(\hat{x}_t \mid x_{\setminus t}) + \log \frac{k}{1 - k}, [t \in M]\right)"
        ),
        citations=(
            """\
@inproceedings{clark2020electric,
  title = {Pre-Training Transformers as Energy-Based Cloze Models},
  author = {Clark, Kevin and Luong, Minh-Thang and Le, Quoc V. and Manning, Christopher D.},
  booktitle = {Proceedings of {EMNLP}},
  year = {2020}
}""",
        ),
        usage="""\
import torch
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {model_class}.from_pretrained("{repo}")
inputs = tokenizer("The chef ate the meal.", return_tensors="pt")
is_special = torch.isin(inputs["input_ids"][0], torch.tensor(tokenizer.all_special_ids))
with torch.no_grad():
    energies = model(**inputs).logits.flatten()  # [length]: estimates of -log p of each token given all the others
score = -energies[~is_special].sum()  # pseudo-log-likelihood in nats, in one pass: the higher, the likelier the text""",
    )

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the labels' entropy that is explained: near 0 at best where the noise is as likely as the text."""
        return discrimination_gain(means["nce_loss"], means["fake_rate"]) if "nce_loss" in means else {}

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the same of the held-out text; who tells noise from text at sight is no better a model of the text."""
        return self.training_metrics(means)
