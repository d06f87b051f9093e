"""Masked language modelling."""

from dataclasses import dataclass, fields

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError
from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.trainer import PretrainingTrainer


@dataclass
class MaskedLMTrainingArguments(MaskingArguments, PretrainingArguments):
    """Options of [`MaskedLMTrainer`]: those of masking and of every pre-training."""

    def __post_init__(self) -> None:
        """Refuse to learn from masks where nothing is masked."""
        super().__post_init__()
        if not self.mlm_probability and self.mlm_probability_schedule is None and getattr(self, "mlm_weight", True):
            raise InputError("mlm_probability=0.0 leaves no target: set it to 0.15, or as much as the tokens to find")

    @property
    def masking(self) -> MaskingArguments:
        """The options of masking alone, as the collator takes them."""
        return MaskingArguments(**{field.name: getattr(self, field.name) for field in fields(MaskingArguments)})


class MaskedLMTrainer(PretrainingTrainer):
    """Trains an [`EncoderForPreTraining`] to fill in masked tokens."""

    objective = ObjectiveDescription(
        name="mlm",
        title="Masked language modelling",
        description=(
            "A fraction of the tokens is selected; of those, most are hidden behind the mask token, some are exchanged for a "
            "random token and some are left as they are. The model predicts the original token at every selected position."
        ),
        formula=r"\mathcal{L} = -\frac{1}{|M|} \sum_{i \in M} \log p_\theta(x_i \mid \tilde{x})",
        citations=(
            """\
@inproceedings{devlin2019bert,
  title = {{BERT}: Pre-training of Deep Bidirectional Transformers for Language Understanding},
  author = {Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina},
  booktitle = {Proceedings of {NAACL-HLT}},
  year = {2019}
}""",
        ),
        pipeline_tag="fill-mask",
        usage="""\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
predictions = fill_mask(f"The chef ate the {fill_mask.tokenizer.mask_token}.")""",
    )
