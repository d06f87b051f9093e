"""Token deletion detection: the model, the options, the Trainer, and the record by which `hf-pretrain` finds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForTokenClassification, PreTrainedModel

from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.configuration import ModelArguments, load_or_build
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, binary_token_loss
from hf_pretrain.options import option
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.trainer import PretrainingTrainer
from token_deletion.collator import DataCollatorForTokenDeletion


class TokenDeletionForPreTraining(PretrainingModel):
    """A stock token classifier with two labels: nothing (0) or something (1) is missing behind a token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config)
        self.model = model
        self.post_init()

    @staticmethod
    def count_targets(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the number of tokens that are judged."""
        return {"deletion": (batch["labels"] != IGNORED).sum()}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> PretrainingOutput:
        """Return the loss as a sum over the tokens of each example; in evaluation the scores too. All inputs are ``[B, L]``."""
        logits_BLC = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        logits_BL = logits_BLC[..., 1] - logits_BLC[..., 0]
        is_target_BL = labels != IGNORED
        loss = binary_token_loss(logits_BL, labels.clamp(min=0), mask=is_target_BL)
        output = PretrainingOutput(losses={"deletion": loss}, metrics={})
        if not self.training:
            is_right_BL = ((logits_BL > 0) == (labels == 1)) * is_target_BL
            output.metrics["deletion_accuracy"] = ExampleSum(is_right_BL.float().sum(1), loss.count)
            output.scores, output.score_labels = logits_BL, labels
        return output


@dataclass
class TokenDeletionTrainingArguments(PretrainingArguments):
    """Options of [`TokenDeletionTrainer`]."""

    ranges: ClassVar[dict[str, str]] = {"deletion_probability": "(0, 1)"}

    deletion_probability: float = option(0.15, "Share of the tokens that is deleted.")


class TokenDeletionTrainer(PretrainingTrainer):
    """Trains a [`TokenDeletionForPreTraining`]."""

    objective = ObjectiveDescription(
        name="token-deletion",
        title="Token deletion detection",
        description=(
            "Some tokens are deleted and the gaps are closed. The model says of each token that is left whether something is "
            "missing behind it."
        ),
        formula=r"\mathcal{L} = \frac{1}{n} \sum_{i=1}^{n} \mathrm{BCE}(f(\tilde{x})_i, y_i)",
    )

    option_classes = (ModelArguments, TokenDeletionTrainingArguments)
    special_tokens = ("pad",)

    def build_model(
        self, options: ModelArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> TokenDeletionForPreTraining:
        """Return the model with its head."""
        model = load_or_build(AutoModelForTokenClassification, options, data.tokenizer, stock=stock)
        return TokenDeletionForPreTraining(model)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForTokenDeletion:
        """Return the collator that deletes tokens."""
        return DataCollatorForTokenDeletion(tokenizer, deletion_probability=args.deletion_probability, seed=args.seed)

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the area under the ROC curve: 0.5 for a guess at the base rate, 1 for a perfect order."""
        return {"deletion_auc": float(roc_auc_score(labels, scores))} if len(set(labels.tolist())) == 2 else {}


METHOD = Method(
    trainer=TokenDeletionTrainer,
    description="""\
Pre-train an encoder that says of each token whether something is missing behind it.

    hf-pretrain token-deletion --train_file corpus.txt --output_dir my-encoder

The result opens with `AutoModel.from_pretrained("my-encoder")`.""",
    arguments=(DataArguments, ModelArguments, TokenDeletionTrainingArguments),
    # Among equal words no gap would show. That the next token counts is learned late, and then at once.
    learning=Learning(
        text="counts",
        left={"deletion_loss": 0.3},
        least={"deletion_auc": 0.9},
        steps=500,
        learning_rate=1e-3,
        examples=384,
    ),
    tiny_options={"model_type": "roformer", "hidden_size": 64, "num_attention_heads": 4},
)
