"""The options of distillation: its losses, the layers that they compare, and how the teacher runs.

[`layer_map`] and [`DistillationConfig`] come first: they say which layers are compared, and which outputs both models
return. The options of text and of tasks follow; they fill in weights from a preset, and `building.py` makes a
configuration of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast, get_args

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig
from hf_pretrain.modeling.observing.outputs import OutputRequest
from hf_pretrain.options import check_options, option, schedules_of
from hf_pretrain.tasks.files import Task
from hf_pretrain.training.arguments import PretrainingArguments


def layer_map(spec: str | Sequence[int], *, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher's layer for each of the student's layers 1 to M; embeddings (layer 0) go with embeddings.

    Args:
        spec: "uniform" (every N/M-th layer, up to the last), "last" (the last M layers), or the M layers themselves,
            as numbers or as text such as "3,6,9,12"; layers count from 1 and may repeat, but not fall.
        student_layers: M.
        teacher_layers: N.

    Returns:
        g(1), ..., g(M).

    Raises:
        InputError: If the map has another length, leaves 1 to N or falls, or if "uniform" does not divide N.

    Source: Jiao et al. 2020, "TinyBERT", section 3.1.
    """
    layers = _read(spec, student_layers, teacher_layers)
    if len(layers) != student_layers:
        raise InputError(
            f"layer_map={spec!r} has {len(layers)} entries for {student_layers} student layers: give one a layer"
        )
    if not all(1 <= layer <= teacher_layers for layer in layers):
        raise InputError(f"layer_map={spec!r} leaves the teacher's layers, 1 to {teacher_layers}: map into these")
    if any(below > above for below, above in zip(layers, layers[1:], strict=False)):
        raise InputError(
            f"layer_map={spec!r} falls: a higher student layer learns from no lower teacher layer; sort it"
        )
    return layers


def _read(spec: str | Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    if not isinstance(spec, str):
        return tuple(spec)
    if spec == "last":
        return tuple(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    if spec == "uniform":
        step, rest = divmod(teacher_layers, student_layers)
        if rest:
            raise InputError(
                f"layer_map='uniform': {student_layers} student layers do not divide {teacher_layers} teacher layers; "
                "use 'last' or list the layers, such as layer_map='3,6,9,12'"
            )
        return tuple(step * layer for layer in range(1, student_layers + 1))
    _check_spec(spec)
    return tuple(int(layer) for layer in spec.split(","))


def _check_spec(spec: str) -> None:
    if not re.fullmatch(r"uniform|last|\s*\d+\s*(,\s*\d+\s*)*", spec):
        raise InputError(f"layer_map={spec!r} is unknown: use 'uniform', 'last' or teacher layers such as '3,6,9,12'")


# Losses that relate a layer's queries, keys or values to themselves, and which of them.
RELATIONS = {"relation_qq": "query", "relation_kk": "key", "relation_vv": "value", "value_relation": "value"}
OF_PREDICTIONS = frozenset({"prediction", "mlm", "labels"})
# Losses between the vectors of whole texts.
OF_SENTENCES = ("sentence_cosine", "sentence_mse", "sentence_similarity")


@strict
class DistillationConfig(CompositeConfig):
    """Configuration of [`DistillationModel`].

    Attributes:
        student: Configuration of the student.
        losses: Names of the losses that are computed.
        head: Kind of the head of both models; see [`hf_pretrain.modeling.heads.head_kind`].
        layer_map: Layer of the teacher that each layer of the student learns from; None if no loss needs it.
        teacher_layer: Layer of the teacher that the relations are taken from.
        teacher_size: Width of the teacher.
        teacher_layers: Number of the teacher's layers.
        attention_windows: Largest distance of the tokens that are compared, for each entry of `layer_map`; None for
            all.
        relation_heads: Parts that states are split into for relations.
        temperature: Divisor of the logits.
        prediction_positions: "masked" or "all".
        attention_target: "scores" or "probs".
        projection: "shared" or "per_layer".
        tinybert_official: Whether to follow TinyBERT's code where it differs from the paper.
        sentence_modules: What makes a vector of a text from the hidden states, and goes with the student; see
            [`SentenceModules`]. None if the teacher has nothing of the kind.
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
    tinybert_official: bool = False
    sentence_modules: dict[str, Any] | None = None
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

    def requests(self) -> tuple[OutputRequest, OutputRequest]:
        """Return the outputs of the student and of the teacher that the losses need."""
        names, last = set(self.losses or ()), self.student_config.num_hidden_layers
        hidden = self.pairs * ("hidden" in names) + [(0, 0)] * ("embedding" in names)
        hidden += [(last, self.teacher_layers)] * bool(names & {"cosine", *OF_SENTENCES})
        attention = self.pairs * ("attention" in names)
        attention += [(last, self.teacher_layer)] * bool(names & {*RELATIONS, "attention_distribution"})

        def of_side(side: int, runs_head: bool) -> OutputRequest:
            layers = (tuple(sorted({pair[side] for pair in pairs})) for pairs in (hidden, attention))
            return OutputRequest(runs_head, *layers)

        return of_side(0, bool(names & OF_PREDICTIONS)), of_side(1, "prediction" in names)


Method = Literal["distilbert", "tinybert", "minilm", "minilmv2", "embedding"]
TrainingStage = Literal["intermediate", "prediction"]

_PRESETS: dict[str, dict[str, float]] = {
    # The weights of the released model.
    "distilbert": {"prediction": 5.0, "mlm": 2.0, "cosine": 1.0},
    "tinybert": {"embedding": 1.0, "hidden": 1.0, "attention": 1.0},
    "minilm": {"attention_distribution": 1.0, "value_relation": 1.0},
    "minilmv2": {"relation_qq": 1.0, "relation_kk": 1.0, "relation_vv": 1.0},
    "embedding": {"sentence_cosine": 1.0},
}
_STAGES: dict[str, dict[str, float]] = {"intermediate": _PRESETS["tinybert"], "prediction": {"prediction": 1.0}}


def _weight(what: str) -> Any:
    """Return the option of a loss's weight, a number or a schedule; that of the preset if it is left out."""
    return option(None, f"Weight of {what}; a number, or a schedule such as '0%:1, 50%:0.5'.")


_OF_RELATIONS = "losses~relation_qq|relation_kk|relation_vv"


@dataclass
class DistillationArguments:
    """The options of every distillation: the weights of its losses, the layers, and how the teacher runs.

    A weight that is left out is that of the method's preset, or 0. A loss whose weight is always 0 is not computed.

    Raises:
        InputError: If an option is out of range, or no loss is left.
    """

    loss_names: ClassVar[tuple[str, ...]] = (
        *("prediction", "cosine", "embedding", "hidden", "attention"),
        *("relation_qq", "relation_kk", "relation_vv", "attention_distribution", "value_relation"),
    )
    ranges: ClassVar[dict[str, str]] = {"teacher_layer": "[1, 4096]", "relation_heads": "[1, 65536]"}
    needs: ClassVar[dict[str, str]] = {
        "temperature": "losses~prediction",
        "layer_map": "losses~hidden|attention",
        "teacher_layer": f"{_OF_RELATIONS}|attention_distribution|value_relation",
        "relation_heads": _OF_RELATIONS,
        "attention_target": "losses~attention",
        "projection": "losses~embedding|hidden",
    }

    prediction_weight: float | str | None = _weight(
        "the divergence of the student's predictions from the teacher's; of a regression, the squared difference"
    )
    cosine_weight: float | str | None = _weight("1 - cosine of the last hidden states (DistilBERT)")
    embedding_weight: float | str | None = _weight("the squared difference of the embeddings (TinyBERT)")
    hidden_weight: float | str | None = _weight("the squared differences of the layers' outputs (TinyBERT)")
    attention_weight: float | str | None = _weight("the squared differences of the attention scores (TinyBERT)")
    relation_qq_weight: float | str | None = _weight("the relations between queries (MiniLM v2)")
    relation_kk_weight: float | str | None = _weight("the relations between keys (MiniLM v2)")
    relation_vv_weight: float | str | None = _weight("the relations between values (MiniLM v2)")
    attention_distribution_weight: float | str | None = _weight(
        "the divergence of the last layer's attention (MiniLM)"
    )
    value_relation_weight: float | str | None = _weight("the relations between values, a relation a head (MiniLM)")
    temperature: float | str | None = option(
        None,
        "Divisor of the logits of both models in the prediction loss, which is multiplied by its square; by "
        "default 1, of distilbert 2. A number, or a schedule such as '0%:8, 100%:1'.",
    )
    layer_map: str = option(
        "uniform",
        "The teacher's layer for each layer of the student: 'uniform', 'last', or a list such as '3,6,9,12'.",
    )
    teacher_layer: int | None = option(None, "Layer of the teacher that gives the relations; by default the last.")
    relation_heads: int | None = option(
        None,
        "Parts that states are split into for the relations, a divisor of both widths; by default the teacher's "
        "attention heads. MiniLM v2: 48 for BERT-base.",
    )
    attention_target: Literal["scores", "probs"] = option(
        "scores", "Compare attention before the softmax (TinyBERT) or after it (TextBrewer)."
    )
    projection: Literal["shared", "per_layer"] = option(
        "shared", "Where widths differ: one projection for all layers (and one for the embeddings), or one each."
    )
    tinybert_official: bool = option(
        False,
        "As TinyBERT's code where it differs from the paper: one projection with a bias for embeddings and all "
        "layers, of equal widths too; predictions averaged over classes, without the square of the temperature. Its heads, "
        "which stock classes cannot hold, are left out.",
    )
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Type of the teacher's weights; by default bfloat16 if bf16 is on, else float32."
    )
    teacher_device: str | None = option(
        None, "Device of the teacher, such as cuda:1; by default that of the batch, which is the student's."
    )
    teacher_compile: bool = option(
        False, "Run the teacher's layers under torch.compile; not with losses that look into its attention."
    )

    def weights(self) -> dict[str, float]:
        """Return the weight of every loss that is computed, by name."""
        found = {name: getattr(self, f"{name}_weight") for name in self.loss_names}
        return {name: weight for name, weight in found.items() if weight}

    def resolve(self, preset: Mapping[str, float], *, temperature: float = 1.0) -> None:
        """Fill in the defaults of the preset, and refuse values out of range.

        Args:
            preset: Weights by name; 0 if it does not name a loss.
            temperature: That of the preset.
        """
        check_options(self)
        defaults = {f"{name}_weight": preset.get(name, 0.0) for name in self.loss_names} | {"temperature": temperature}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.layer_map, str):
            _check_spec(self.layer_map)
        if not self.weights():
            raise InputError("all losses have weight 0: give one of them a weight, such as --prediction_weight 1")


@dataclass
class DistillationTrainingArguments(DistillationArguments, MaskingArguments, PretrainingArguments):
    """Options of [`DistillationTrainer`]: general distillation, on text alone."""

    loss_names: ClassVar[tuple[str, ...]] = (
        *("prediction", "mlm", *DistillationArguments.loss_names[1:]),
        *OF_SENTENCES,
    )
    ranges: ClassVar[dict[str, str]] = {"cache_top_k": "[0, 65536]"}
    needs: ClassVar[dict[str, str]] = {"prediction_positions": "losses~prediction"}

    distillation_method: Method = option(
        "distilbert",
        "Whose weights the losses have that are not given: distilbert, tinybert, minilm or minilmv2; or embedding, of a "
        "teacher that is a sentence-transformers folder.",
    )
    mlm_weight: float | str | None = _weight("the student's own masked-language-model loss (DistilBERT)")
    sentence_cosine_weight: float | str | None = _weight(
        "1 - cosine of the vectors of a text, pooled as the teacher's sentence-transformers folder says"
    )
    sentence_mse_weight: float | str | None = _weight("the squared difference of these vectors (Reimers & Gurevych)")
    sentence_similarity_weight: float | str | None = _weight(
        "the squared difference of the cosines between the texts of a batch, for vectors of any width"
    )
    mlm_probability: float | str | None = option(  # type: ignore[assignment]
        None,
        "Share of the tokens of each example that are selected as targets, 0 to 1; by default 0.15 for losses of "
        "predictions, and 0 without them: then both models read the text as it is.",
    )
    prediction_positions: Literal["masked", "all"] = option(
        "masked",
        "Where predictions are compared: at the selected positions, or at all real tokens, as the released "
        "DistilBERT was; that costs several times as much.",
    )
    cache_top_k: int = option(
        0,
        "Run the teacher once for its k likeliest tokens at each selected position, such as 64, with the mass of all "
        "others, and train without it; 0: run it at each step. Needs static_masks, such as the number of epochs.",
    )

    def __post_init__(self) -> None:
        """Fill in the defaults of the preset, and refuse values out of range."""
        check_choice(self.distillation_method, _PRESETS, name="distillation_method")
        temperature = 2.0 if self.distillation_method == "distilbert" else 1.0
        self.resolve(_PRESETS[self.distillation_method], temperature=temperature)
        needs_targets = {"mlm", "prediction"} & self.weights().keys()
        if self.mlm_probability is None:
            self.mlm_probability = 0.15 if needs_targets else 0.0
        of_masked = needs_targets - ({"prediction"} if self.prediction_positions == "all" else set())
        if of_masked and not self.mlm_probability:
            raise InputError(
                f"mlm_probability=0 leaves no target for the {' and '.join(sorted(of_masked))} loss: set it to 0.15"
            )
        self._check_cache()
        super().__post_init__()

    def _check_cache(self) -> None:
        """Refuse a cache if the predictions change in training, or a loss needs more than those at masked positions."""
        if not self.cache_top_k:
            return
        chosen, weights = f"cache_top_k={self.cache_top_k}", self.weights()
        others = sorted(weights.keys() - {"prediction", "mlm"})
        if "prediction" not in weights:
            raise InputError(f"{chosen} is for the prediction loss: leave it out, or give prediction_weight")
        if others:
            raise InputError(
                f"{chosen} keeps the teacher's predictions alone, but the {others[0]} loss needs its states: set "
                f"{others[0]}_weight=0, or leave cache_top_k out"
            )
        if self.prediction_positions != "masked":
            raise InputError(f"{chosen} keeps predictions at masked positions: set prediction_positions=masked")
        for name, schedule in schedules_of(self).items():
            if not name.endswith("_weight"):
                raise InputError(
                    f"{chosen} holds for one temperature and one set of masks: give {name}={schedule!r} one number, or leave "
                    "cache_top_k out"
                )
        if not self.static_masks:
            raise InputError(
                f"{chosen} needs to know how many maskings of an example there are: set static_masks, such as to the number of "
                "epochs"
            )

    @property
    def masking(self) -> MaskingArguments:
        """The options of masking alone, as the collator takes them."""
        return MaskingArguments(**{field.name: getattr(self, field.name) for field in fields(MaskingArguments)})


@dataclass
class TaskDistillationTrainingArguments(DistillationArguments, PretrainingArguments):
    """Options of [`TaskDistillationTrainer`]: a fine-tuned teacher on the examples of its task."""

    loss_names: ClassVar[tuple[str, ...]] = ("prediction", "labels", *DistillationArguments.loss_names[1:])
    also_honoured: ClassVar[Mapping[str, Collection[Any]]] = {"train_sampling_strategy": ("group_by_length",)}

    task: Task = option(
        "sequence-classification",
        "What the teacher predicts: a class or a value of one text or two, 'token-classification': a class of each "
        "word, or 'question-answering': where in a text the answer begins and ends.",
    )
    training_stage: TrainingStage = option(
        "prediction",
        "Which losses have weight 1 if none is given: 'intermediate' (embeddings, hidden states, attention), and "
        "then, from its result, 'prediction'.",
    )
    labels_weight: float | str | None = _weight("the loss against the labels of the data; they are optional")
    cache_teacher: bool = option(
        True, "Run the teacher once for its logits of each example, if no loss needs more of it."
    )
    train_sampling_strategy: str = option(
        "group_by_length", "'group_by_length': the examples of a step are of about one length; 'random': of any."
    )
    learning_rate: float = option(5e-5, "Peak learning rate.")
    per_device_train_batch_size: int = option(32, "Examples a step and device.")

    def __post_init__(self) -> None:
        """Fill in the defaults of the preset, and refuse values out of range."""
        check_choice(self.training_stage, _STAGES, name="training_stage")
        check_choice(self.task, get_args(Task), name="task")
        self.resolve(_STAGES[self.training_stage])
        super().__post_init__()
