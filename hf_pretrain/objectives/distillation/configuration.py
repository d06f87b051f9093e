"""What a distillation compares: its configuration, and what has to be read off either model."""

from __future__ import annotations

from typing import cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.objectives.distillation.observation import Wanted

# Losses that relate a layer's queries, keys or values to themselves, and which of them.
RELATIONS = {"relation_qq": "query", "relation_kk": "key", "relation_vv": "value", "value_relation": "value"}
OF_PREDICTIONS = frozenset({"prediction", "mlm", "labels"})


@strict
class DistillationConfig(CompositeConfig):
    """Configuration of [`DistillationModel`].

    Attributes:
        student: Configuration of the student.
        losses: Names of the losses that are computed.
        head: What stands on both models; see [`hf_pretrain.modeling.head_kinds.head_kind`].
        layer_map: Layer of the teacher that each layer of the student learns from; None if no loss needs it.
        teacher_layer: Layer of the teacher that the relations are taken from.
        teacher_size: Width of the teacher.
        teacher_layers: Number of the teacher's layers.
        attention_windows: Largest distance of the tokens that are compared, for each entry of `layer_map`; None for all.
        relation_heads: Parts that states are split into for relations.
        temperature: What logits are divided by.
        prediction_positions: "masked" or "all".
        attention_target: "scores" or "probs".
        projection: "shared" or "per_layer".
        official: Whether to follow TinyBERT's code where it differs from the paper.
    """

    model_type = "hf_pretrain_distillation"
    sub_configs = {"student": AutoConfig}  # noqa: RUF012

    student: SubModelConfig = None
    losses: list[str] | None = None
    head: str = "masked_lm"
    layer_map: list[int] | None = None
    teacher_layer: int = 1
    teacher_size: int = 1
    teacher_layers: int = 1
    attention_windows: list[int | None] | None = None
    relation_heads: int = 1
    temperature: float = 1.0
    prediction_positions: str = "masked"
    attention_target: str = "scores"
    projection: str = "shared"
    official: bool = False
    tie_word_embeddings: bool = True

    @property
    def student_config(self) -> PreTrainedConfig:
        """The student's configuration."""
        return cast(PreTrainedConfig, self.student)

    @property
    def gathers(self) -> bool:
        """Whether heads run on chosen positions of the batch."""
        return self.head in ("masked_lm", "token_classification")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Layers of the student and the layers of the teacher that they learn from, embeddings left out."""
        return list(enumerate(self.layer_map or (), start=1))

    def wanted(self) -> tuple[Wanted, Wanted]:
        """Return what the losses need of the student and of the teacher."""
        names, last = set(self.losses or ()), self.student_config.num_hidden_layers
        hidden: list[tuple[int, int]] = self.pairs if "hidden" in names else []
        hidden = hidden + [(0, 0)] * ("embedding" in names) + [(last, self.teacher_layers)] * ("cosine" in names)
        attention: list[tuple[int, int]] = self.pairs if "attention" in names else []
        if names & {*RELATIONS, "attention_distribution"}:
            attention = [*attention, (last, self.teacher_layer)]
        runs_head = (bool(names & OF_PREDICTIONS), "prediction" in names)
        student, teacher = (
            Wanted(runs_head[side], *(tuple(sorted({pair[side] for pair in pairs})) for pairs in (hidden, attention)))
            for side in (0, 1)
        )
        return student, teacher
