"""The student of a distillation: cut from its teacher, new, or loaded; always a stock model."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import feed_forward_name, longest_sequence, per_layer_values, position_tables
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    fill_word_table,
    parse_overrides,
)
from hf_pretrain.modeling.loading import ShapesDiffer, from_config, from_pretrained
from hf_pretrain.modeling.surgery.cutting import changed_config, check_layers, cut_student
from hf_pretrain.objectives.distillation.arguments import layer_map
from hf_pretrain.options import option

_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "embedding_size", "max_position_embeddings")
_LABELS = ("id2label", "label2id", "problem_type")
_CHOICES = ("every_other", "uniform", "first", "last")


@dataclass
class StudentArguments(ModelArguments):
    """The teacher, and the student: layers of the teacher, a new model, or a checkpoint."""

    model_name_or_path: str | None = option(
        None, "Checkpoint of a student to go on with, such as one of general distillation."
    )
    model_type: str | None = option(None, "Architecture of a new student; by default the teacher's.")  # type: ignore[assignment]
    hidden_size: int | None = option(None, "Width of a new student; by default the teacher's.")  # type: ignore[assignment]
    num_hidden_layers: int | None = option(  # type: ignore[assignment]
        None, "Layers of the student; by default as many as the teacher's, or half of them if it is cut."
    )
    num_attention_heads: int | None = option(  # type: ignore[assignment]
        None, "Attention heads a layer of a new student; by default the teacher's."
    )
    intermediate_size: int | None = option(  # type: ignore[assignment]
        None, "Width of a new student's feed-forward layers; by default the teacher's."
    )
    max_position_embeddings: int | None = option(  # type: ignore[assignment]
        None, "Longest sequence of a new student, in tokens; by default the teacher's."
    )
    teacher_name_or_path: str | None = option(None, "Checkpoint of the teacher.")
    student_layers: str | None = option(
        None,
        "Cut the student from the teacher: 'every_other' (spread from the first layer to the last), 'uniform' (the "
        "last of each of num_hidden_layers equal groups), 'first' or 'last'; or the layers, counted from 0, such as "
        "0,2,4,7,9,11. Without it the student is new and has the sizes that are given.",
    )
    student_type: str | None = option(None, "'distilbert' makes a DistilBERT of what is cut from a BERT.")
    trim_vocabulary: bool = option(
        False, "Drop the tokens that the training text does not use, from tokenizer, teacher and student."
    )
    freeze_position_embeddings: bool = option(
        False, "Hold the student's position embeddings constant, as DistilBERT's were."
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        super().__post_init__()
        excluded = {"student_layers": sorted(("init_embeddings", "model_type", *_SIZES))}
        excluded["model_name_or_path"] = sorted(
            ("student_layers", "num_hidden_layers", "config_overrides", *excluded["student_layers"])
        )
        for way in ("model_name_or_path", "student_layers"):
            wrong = next((name for name in excluded[way] if getattr(self, name) is not None), None)
            if getattr(self, way) is not None and wrong is not None:
                raise InputError(
                    f"{wrong}={getattr(self, wrong)!r} is for another student than {way}={getattr(self, way)!r}: "
                    "leave out one of the two"
                )
        if self.student_type is not None and self.student_layers is None:
            raise InputError(
                f"student_type={self.student_type!r} is for a student that is cut from its teacher: "
                "give student_layers too, or model_type for a new student"
            )


def build_student(
    args: StudentArguments, *, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, auto_class: Any
) -> PreTrainedModel:
    """Load, cut or build the student that the arguments describe.

    Args:
        args: The options of the student.
        teacher: The teacher; with the trimmed vocabulary, if the student is to have one.
        tokenizer: The tokenizer of both.
        auto_class: The Auto class of both, such as `AutoModelForMaskedLM`.

    Returns:
        A stock model in float32 and evaluation mode, with the teacher's labels.

    Raises:
        InputError: If the arguments name no student, or one that cannot be built.
    """
    if args.model_name_or_path is not None:
        student = _load_student(args, teacher, auto_class)
    elif args.student_layers is not None:
        depths: dict[str, Any] = {
            "teacher_layers": teacher.config.num_hidden_layers,
            "student_layers": args.num_hidden_layers,
        }
        layers = choose_layers(args.student_layers, **depths)
        overrides = parse_overrides(args.config_overrides)
        student = cut_student(teacher, layers, model_type=args.student_type, overrides=overrides)
        for backend in attention_options(args).values():
            student.set_attn_implementation(backend)
    else:
        student = fresh_student(teacher, args=args, tokenizer=tokenizer, auto_class=auto_class)
    if args.freeze_position_embeddings:
        freeze_position_embeddings(student)
    return student


def _load_student(args: StudentArguments, teacher: PreTrainedModel, auto_class: Any) -> PreTrainedModel:
    assert args.model_name_or_path is not None
    options = attention_options(args) | _labels(teacher)
    try:
        student: PreTrainedModel = from_pretrained(auto_class, args.model_name_or_path, **options)
    except ShapesDiffer as error:
        # The number of labels is all that can make the sizes differ from the checkpoint's own.
        raise InputError(
            f"model_name_or_path={args.model_name_or_path!r} has other labels than the teacher's "
            f"{teacher.config.num_labels}: name a student without a head, or one of this task"
        ) from error
    return student


def choose_layers(spec: str, *, teacher_layers: int, student_layers: int | None = None) -> tuple[int, ...]:
    """Return which of the teacher's layers a student is cut from.

    Args:
        spec: "every_other", "uniform", "first", "last", or indices such as "0,2,4,7,9,11".
        teacher_layers: Layers of the teacher.
        student_layers: Layers of the student; by default as many as indices, or half of the teacher's.

    Returns:
        Indices from 0, ascending. "every_other" spreads them evenly from the first layer to the last, which gives
        DistilBERT's 0, 2, 4, 7, 9, 11 of 12; "uniform" gives those that a uniform layer map compares with: 1, 3, 5, 7,
        9, 11.

    Raises:
        InputError: If these are not layers of the teacher in ascending order, or not as many as `student_layers`.

    Source:
        Sanh et al. 2019, "DistilBERT", section 2; the list is that of the published training code.
    """
    if spec not in _CHOICES:
        layers = _listed_layers(spec, student_layers)
    else:
        count = max(1, teacher_layers // 2) if student_layers is None else student_layers
        if not 1 <= count <= teacher_layers:
            raise InputError(
                f"num_hidden_layers={count} must be 1 to {teacher_layers}: the teacher has that many layers to copy"
            )
        if spec == "uniform":
            layers = tuple(n - 1 for n in layer_map(spec, student_layers=count, teacher_layers=teacher_layers))
        elif spec == "every_other":
            layers = tuple(round(i * (teacher_layers - 1) / max(1, count - 1)) for i in range(count))
        else:
            layers = tuple(range(count) if spec == "first" else range(teacher_layers - count, teacher_layers))
    check_layers(layers, teacher_layers=teacher_layers)
    return layers


def _listed_layers(spec: str, student_layers: int | None) -> tuple[int, ...]:
    try:
        layers = tuple(int(part) for part in spec.split(","))
    except ValueError:
        raise InputError(
            f"student_layers={spec!r} is none of {', '.join(_CHOICES)}, and no list of layers such as 0,2,4,7,9,11"
        ) from None
    if student_layers not in (None, len(layers)):
        raise InputError(
            f"num_hidden_layers={student_layers}, but student_layers={spec!r} names {len(layers)}: leave out one"
        )
    return layers


def fresh_student(
    teacher: PreTrainedModel, *, args: StudentArguments, tokenizer: PreTrainedTokenizerBase, auto_class: Any
) -> PreTrainedModel:
    """Build a student with new weights.

    A student of the teacher's architecture has the teacher's configuration but for the sizes that are given; one of
    another architecture has the teacher's sizes where none are given, its vocabulary and its labels.

    Args:
        teacher: The teacher.
        args: Sizes and architecture.
        tokenizer: The tokenizer of both.
        auto_class: The Auto class of the student.

    Raises:
        InputError: If no size is given, or sizes do not fit.
    """
    names = ("num_hidden_layers", *_SIZES)
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not sizes and args.model_type is None and args.config_overrides is None:
        raise InputError(
            "no student is named: cut one from the teacher with --student_layers every_other, give the sizes of a new one "
            "(--num_hidden_layers 4 --hidden_size 312 ...), or --model_name_or_path of a checkpoint"
        )
    if args.model_type in (None, teacher.config.model_type):
        config = _resized_config(teacher, sizes, parse_overrides(args.config_overrides))
    else:
        config = build_config(
            dataclasses.replace(args, **(_sizes_of(teacher) | sizes)),
            tokenizer,
            auto_class=auto_class,
            vocab_size=teacher.config.vocab_size,
            **_labels(teacher),
        )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size={config.hidden_size} does not divide into num_attention_heads={config.num_attention_heads}: "
            "give both, such as 312 and 12"
        )
    student: PreTrainedModel = from_config(auto_class, config, **attention_options(args))
    fill_word_table(student, args, tokenizer)
    return student.eval()


def _resized_config(teacher: PreTrainedModel, sizes: dict[str, Any], overrides: dict[str, Any]) -> Any:
    config, longest = teacher.config, longest_sequence(teacher)
    if longest is not None and "max_position_embeddings" in sizes:
        # Rows before the first position, in RoBERTa and its kin.
        before = config.max_position_embeddings - longest
        sizes = sizes | {"max_position_embeddings": sizes["max_position_embeddings"] + before}
    depth = sizes.get("num_hidden_layers", config.num_hidden_layers)
    for name, values in per_layer_values(config).items():
        # The pattern goes on where the student is deeper than the teacher.
        sizes = sizes | {name: [values[i % len(values)] for i in range(depth)]}
    config = changed_config(config, sizes | overrides)
    config.name_or_path = ""
    return config


def _sizes_of(teacher: PreTrainedModel) -> dict[str, Any]:
    config = teacher.config
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes["intermediate_size"] = getattr(config, feed_forward_name(config.model_type), None)
    sizes["max_position_embeddings"] = longest_sequence(teacher) or config.max_position_embeddings
    return sizes


def _labels(teacher: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(teacher.config, name) for name in _LABELS}


def freeze_position_embeddings(model: PreTrainedModel) -> None:
    """Hold the table of positions constant.

    Raises:
        InputError: If the model has none.
    """
    tables = position_tables(model, learned=True).values()
    if not tables:
        raise InputError(f"freeze_position_embeddings: {type(model).__name__} has no table of positions; leave it out")
    for table in tables:
        table.weight.requires_grad_(False)
