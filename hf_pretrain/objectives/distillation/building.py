"""From options to data and model: the examples in the student's vocabulary, then student and teacher with their losses.

[`load_text`] and [`load_task`] make the examples. [`build_model`] loads the teacher, builds the student, and joins
them; [`check_fit`] refuses a pair that the losses cannot compare, before any step is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.data.arguments import DataArguments, one_text_in_a_row
from hf_pretrain.data.documents.tokenizers import check_tokenizer
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import refuse_shifted, window_of
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import dtype_option
from hf_pretrain.modeling.heads import head_kind, with_head
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.modeling.observing.capture import check_capture
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.modeling.surgery.vocabulary import match_vocabulary, trim_vocabulary, used_ids
from hf_pretrain.objectives.distillation.arguments import (
    OF_PREDICTIONS,
    OF_SENTENCES,
    RELATIONS,
    DistillationArguments,
    DistillationConfig,
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
    layer_map,
)
from hf_pretrain.objectives.distillation.losses import check_relation_heads, check_same_heads
from hf_pretrain.objectives.distillation.modeling import DistillationModel, Teacher
from hf_pretrain.objectives.distillation.sentence_embeddings import load_sentence_modules
from hf_pretrain.objectives.distillation.student import StudentArguments, build_student, choose_layers
from hf_pretrain.objectives.distillation.trainer import (
    DistillationTrainer,
    TaskDistillationTrainer,
    describe_origin,
    print_comparison,
)
from hf_pretrain.tasks.data import TaskDataArguments, prepare_task
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.method import Learning, Method

_LAST_LAYER = {*RELATIONS, "attention_distribution"}
_OF_ATTENTION = {"attention", *_LAST_LAYER}
_OF_EQUAL_HEADS = ("attention", "attention_distribution", "value_relation")


def auto_class_for(args: DistillationArguments) -> Any:
    """Return the Auto class of both models in distillation on text: with a head only if a loss compares predictions."""
    return AutoModelForMaskedLM if args.weights().keys() & OF_PREDICTIONS else AutoModel


def load_teacher(args: StudentArguments, *, auto_class: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the teacher, with the vocabulary of the tokenizer.

    Args:
        args: Names the teacher.
        auto_class: Its Auto class.
        tokenizer: Tokenizer of the run; the teacher must know each of its tokens.

    Raises:
        InputError: If no teacher is named, or it cannot be loaded, or has no trained head, or does not know a token.
    """
    name = teacher_name(args)
    teacher, info = from_pretrained(auto_class, name, output_loading_info=True)
    untrained = {key for key in info["missing_keys"] if auto_class is not AutoModel or not key.startswith("pooler.")}
    if untrained:
        raise InputError(
            f"teacher_name_or_path={name!r} is no trained {type(teacher).__name__}, it has no {sorted(untrained)[0]}: "
            + (
                "fine-tune it on the task first"
                if auto_class not in (AutoModel, AutoModelForMaskedLM)
                else "name one with its head, or choose losses without predictions (--distillation_method minilmv2)"
            )
        )
    return match_vocabulary(teacher, from_pretrained(AutoTokenizer, name), to=tokenizer)


def teacher_name(args: StudentArguments) -> str:
    """Return the checkpoint of the teacher; raise InputError if none is named."""
    if args.teacher_name_or_path is None:
        raise InputError("teacher_name_or_path is missing: name the checkpoint to learn from")
    return args.teacher_name_or_path


def build_model(
    model_args: StudentArguments,
    args: DistillationArguments,
    *,
    auto_class: Any,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    stock: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
) -> DistillationModel:
    """Load the teacher and build the student that the options describe.

    Args:
        model_args: The teacher and the student.
        args: The losses between them.
        auto_class: The Auto class of both.
        tokenizer: The tokenizer of both.
        block_size: Longest sequence of the data, in tokens.
        stock: The student, if it is there; it takes the class of both.
        teacher: The teacher, if it is there.

    Returns:
        The composite to train.
    """
    name = teacher_name(model_args) if teacher is None else "a teacher in memory"
    modules, source = None, name if teacher is None else teacher.config.name_or_path or name
    if auto_class in (AutoModel, AutoModelForMaskedLM):
        needed = sorted(args.weights().keys() & set(OF_SENTENCES))
        modules = load_sentence_modules(source, needed_by=needed, block_size=block_size)
    if teacher is None:
        teacher = load_teacher(model_args, auto_class=auto_class, tokenizer=tokenizer)
    else:
        teacher = given_teacher(teacher, auto_class)
    refuse_shifted(teacher, option="teacher_name_or_path")
    if stock is None:
        student = build_student(model_args, teacher=teacher, tokenizer=tokenizer, auto_class=auto_class)
    else:
        student = bare(stock) if auto_class is AutoModel else with_head(stock, auto_class)
    for model in (student, teacher):
        check_model_fits(model, tokenizer, block_size=block_size)
    model = join(student, teacher, args, sentence_modules=modules, **dtype_option(model_args))
    model.origin, model.teacher_name = _origin(model_args, teacher, name), source
    return model


def given_teacher(teacher: PreTrainedModel, auto_class: Any) -> PreTrainedModel:
    """Return a teacher in the class of both models.

    Raises:
        InputError: If it has no head and a loss compares predictions: a fresh head has nothing to teach.
    """
    if auto_class is AutoModel:
        return bare(teacher)
    if not isinstance(teacher, auto_class._model_mapping.get(type(teacher.config), ())):
        raise InputError(
            f"teacher={type(teacher).__name__} has no head of {auto_class.__name__}: give one with its head, or choose losses "
            "without predictions (distillation_method='minilmv2')"
        )
    return teacher


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder below a head."""
    return model.base_model


def _origin(args: StudentArguments, teacher: PreTrainedModel, name: str) -> str:
    depth = teacher.config.num_hidden_layers
    layers: tuple[int, ...] = ()
    if args.student_layers is not None:
        layers = choose_layers(args.student_layers, teacher_layers=depth, student_layers=args.num_hidden_layers)
    return describe_origin(args, teacher=name, layers=layers, last_layer=depth - 1)


def join(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    args: DistillationArguments,
    *,
    dtype: str = "float32",
    sentence_modules: SentenceModules | None = None,
) -> DistillationModel:
    """Let a student learn from a teacher; the student is trained in place, the teacher is frozen.

    Args:
        student: A stock model: an encoder, a masked language model, a classifier of sequences or tokens, or one of
            questions.
        teacher: Another, of the same kind and with the same vocabulary.
        args: The losses between them. Weights that no loss reaches are frozen, such as a head without a loss of
            predictions.
        dtype: Type of the student's weights.
        sentence_modules: What makes a vector of a text, of both.

    Raises:
        InputError: If a loss cannot be computed between the two.
    """
    if student is teacher:
        raise InputError("student and teacher are one model: give the student a copy, or weights of its own")
    config = _config(student, teacher, args)
    config.dtype = dtype
    config.sentence_modules = None if sentence_modules is None else sentence_modules.to_dict()
    check_fit(student, teacher, config)
    if config.head == "none":
        for model in (student, teacher):
            if getattr(model, "pooler", None) is not None:
                model.pooler = None  # No loss reaches it, and it is no part of the encoder.
    precision = getattr(args, "teacher_dtype", None) or ("bfloat16" if getattr(args, "bf16", False) else "float32")
    frozen = Teacher(
        teacher,
        config.requests()[1],
        gathers=config.gathers,
        dtype=getattr(torch, precision),
        device=args.teacher_device,
        compiles=args.teacher_compile,
    )
    model = DistillationModel(config, student, frozen)
    model.try_out()
    return model


def _config(student: PreTrainedModel, teacher: PreTrainedModel, args: DistillationArguments) -> DistillationConfig:
    names = list(args.weights())
    depths = {"student_layers": student.config.num_hidden_layers, "teacher_layers": teacher.config.num_hidden_layers}
    mapped = list(layer_map(args.layer_map, **depths)) if {"hidden", "attention"} & set(names) else None
    last = depths["teacher_layers"]
    if args.teacher_layer is not None and args.teacher_layer > last:
        raise InputError(
            f"teacher_layer={args.teacher_layer}: the teacher has {last} layers: set --teacher_layer {last} or less"
        )
    pairs = list(enumerate(mapped or (), start=1))
    assert args.temperature is not None, "the options were resolved"
    return DistillationConfig(
        student=student.config,
        losses=names,
        head=head_kind(student),
        layer_map=mapped,
        teacher_layer=args.teacher_layer or last,
        teacher_size=teacher.config.hidden_size,
        teacher_layers=last,
        attention_windows=[_window(student, m, teacher, n) for m, n in pairs] or None,
        relation_heads=args.relation_heads or teacher.config.num_attention_heads,
        temperature=float(args.temperature),
        prediction_positions=getattr(args, "prediction_positions", "masked"),
        attention_target=args.attention_target,
        projection=args.projection,
        tinybert_official=args.tinybert_official,
    )


def _window(student: PreTrainedModel, layer: int, teacher: PreTrainedModel, teacher_layer: int) -> int | None:
    """Return the largest distance at which tokens see each other in both layers, None if all do."""
    windows = [window_of(student.config, layer), window_of(teacher.config, teacher_layer)]
    return min((window for window in windows if window is not None), default=None)


def check_fit(student: PreTrainedModel, teacher: PreTrainedModel, config: DistillationConfig) -> None:
    """Refuse two models that the losses of a configuration cannot compare.

    Raises:
        InputError: Naming the loss and what to change.
    """
    names = set(config.losses or ())
    if names & set(OF_SENTENCES) and config.sentence_modules is None:
        raise InputError(
            f"the {sorted(names & set(OF_SENTENCES))[0]} loss needs sentence_modules: give SentenceModules.read(teacher)"
        )
    sizes = [model.get_input_embeddings().num_embeddings for model in (student, teacher)]
    if config.head == "masked_lm" and "prediction" in names and sizes[0] != sizes[1]:
        raise InputError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}: both need the teacher's vocabulary"
        )
    is_classifier = config.head in ("classification", "token_classification")
    if config.head != head_kind(teacher) or (is_classifier and student.config.num_labels != teacher.config.num_labels):
        raise InputError(
            f"the student is a {type(student).__name__} with {student.config.num_labels} labels, the teacher a "
            f"{type(teacher).__name__} with {teacher.config.num_labels}: both need the same task"
        )
    if getattr(teacher.config, "problem_type", None) == "multi_label_classification":
        raise InputError("the teacher's problem_type is multi_label_classification, which has no loss here yet")
    if config.tinybert_official and config.head == "question_answering" and "prediction" in names:
        raise InputError(
            "tinybert_official=True: TinyBERT's code averages over classes, of which spans have none; leave it out"
        )
    if names & _OF_ATTENTION:
        for model in (student, teacher):
            check_capture(model)
    if names & set(_OF_EQUAL_HEADS):
        check_same_heads(student.config.num_attention_heads, teacher.config.num_attention_heads)
    if names & (set(RELATIONS) - {"value_relation"}):
        widths = {"student_width": student.config.hidden_size, "teacher_width": teacher.config.hidden_size}
        check_relation_heads(config.relation_heads, **widths)


def load_text(
    data_args: DataArguments,
    model_args: StudentArguments,
    args: PretrainingArguments,
    *,
    special_tokens: Sequence[str] = ("mask", "pad"),
) -> PreparedData:
    """Read text and cut it into examples, with the teacher's tokenizer or the student's.

    Raises:
        InputError: As [`hf_pretrain.data.prepare.prepare_data`].
    """
    if model_args.trim_vocabulary and data_args.prepared_data:
        raise InputError(
            f"trim_vocabulary=True tokenizes the text once more, of which prepared_data={data_args.prepared_data!r} has the "
            "tokens alone: give train_file, or leave trim_vocabulary out"
        )
    if isinstance(args, DistillationArguments) and args.weights().keys() & set(OF_SENTENCES):
        data_args = one_text_in_a_row(data_args)

    def prepare(tokenizer: PreTrainedTokenizerBase) -> PreparedData:
        first = args.main_process_first(local=False, desc="data")
        return prepare_data(data_args, seed=args.seed, output_dir=args.output_dir, tokenizer=tokenizer, first=first)

    return _in_vocabulary(prepare, data_args.tokenizer_name, model_args, special_tokens)


def load_task(
    data_args: TaskDataArguments,
    model_args: StudentArguments,
    args: TaskDistillationTrainingArguments,
    *,
    special_tokens: Sequence[str] = ("pad",),
) -> PreparedData:
    """Read the examples of a task; see [`prepare_task`]."""
    config = from_pretrained(AutoConfig, teacher_name(model_args))

    def prepare(tokenizer: PreTrainedTokenizerBase) -> PreparedData:
        first = args.main_process_first(local=False, desc="data")
        return prepare_task(data_args, tokenizer=tokenizer, config=config, task=args.task, seed=args.seed, first=first)

    return _in_vocabulary(prepare, data_args.tokenizer_name, model_args, special_tokens)


def _in_vocabulary(
    prepare: Callable[[PreTrainedTokenizerBase], PreparedData],
    tokenizer_name: str | None,
    model_args: StudentArguments,
    special_tokens: Sequence[str],
) -> PreparedData:
    """Prepare examples, and once more with a trimmed tokenizer for `trim_vocabulary`."""
    name = tokenizer_name or model_args.model_name_or_path or teacher_name(model_args)
    tokenizer = from_pretrained(AutoTokenizer, name)
    check_tokenizer(tokenizer, roles=special_tokens)
    if model_args.trim_vocabulary and name != model_args.teacher_name_or_path:
        raise InputError(
            f"trim_vocabulary=True trims the teacher's vocabulary, but the tokenizer is that of {name!r}: leave out one"
        )
    data = prepare(tokenizer)
    if not model_args.trim_vocabulary:
        return data
    if data.train_documents is None:
        raise InputError("trim_vocabulary=True has to know all the text: leave out streaming")
    teacher = from_pretrained(AutoModel, name)
    _, trimmed = trim_vocabulary(teacher, tokenizer, used_ids(data.train_documents))
    trimmed_data = prepare(trimmed)
    trimmed_data.description["trimmed_from"] = len(tokenizer)
    return trimmed_data


def check_labels(data: PreparedData, args: TaskDistillationTrainingArguments) -> None:
    """Refuse examples without labels for a loss that needs them."""
    for dataset in (data.train_dataset, data.eval_dataset):
        if "labels" in args.weights() and dataset is not None and "labels" not in EpochDataset.wrap(dataset)[0]:
            raise InputError(
                f"labels_weight={args.labels_weight}, but the examples have no labels: name their label_column, or leave it out"
            )


_TINY_OPTIONS = {f"{name}_weight": 1.0 for name in ("cosine", "embedding", "hidden", "relation_vv")}
_TINY_OPTIONS |= {"attention_weight": 0.1}


METHOD = Method(
    trainer=DistillationTrainer,
    description="""\
Distil a trained encoder into a smaller one on raw text: DistilBERT, TinyBERT's general stage, MiniLM.

    hf-pretrain distil --teacher_name_or_path my-bert --student_layers every_other --train_file corpus.txt \\
        --output_dir my-student
    hf-pretrain distil --config minilmv2 --teacher_name_or_path my-bert --train_file corpus.txt --output_dir my-minilm
    hf-pretrain distil --distillation_method embedding --teacher_name_or_path my-sentence-transformer \\
        --student_layers every_other --train_file sentences.txt --document_separator line --output_dir my-encoder
    accelerate launch trainers/distil.py --config trainers/recipes/tinybert_general.yaml \\
        --teacher_name_or_path my-bert ...

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The student opens with
`AutoModelForMaskedLM.from_pretrained("my-student")`, or where no loss compares predictions, with `AutoModel`;
that of a model of sentence-transformers with `SentenceTransformer` too.""",
    arguments=(DataArguments, StudentArguments, DistillationTrainingArguments),
    learning=Learning(left={"prediction_loss": 0.44}),
    tiny_options=_TINY_OPTIONS,
    load=load_text,
    demonstrate=print_comparison,
    left_out={"cache_top_k": 0},
)


AUTO_CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}


def made_up_examples(
    data_args: TaskDataArguments,
    model_args: StudentArguments,
    args: TaskDistillationTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreparedData:
    """Return examples of the task for the rehearsal: a few tokens, with the first label of the teacher."""
    config = from_pretrained(AutoConfig, teacher_name(model_args))
    assert tokenizer is not None, "there is a teacher, so there is a tokenizer"
    ids = tokenizer("a b c", truncation=True, max_length=data_args.max_length)["input_ids"]
    row: dict[str, Any] = {"input_ids": ids, "labels": 0.0 if config.num_labels == 1 else 0}
    if args.task != "sequence-classification":
        labels = [0] * len(ids) if args.task == "token-classification" else [0, 0]
        row |= {"is_target": [True] * len(ids), "labels": labels}
    examples = datasets.Dataset.from_list([row] * 8)
    holds_out = data_args.validation_file or data_args.validation_split or data_args.validation_fraction
    held_out = examples if holds_out else None
    return PreparedData(tokenizer, examples, held_out, {"source": "made up"}, data_args.max_length)


TASK_METHOD = Method(
    trainer=TaskDistillationTrainer,
    description=r"""Distil a fine-tuned model into a smaller one, on the examples of its task: TinyBERT's task stages.

    hf-pretrain distil-task --config tinybert_intermediate --teacher_name_or_path my-classifier \
        --model_name_or_path my-tinybert --train_file train.tsv --validation_file dev.tsv --output_dir stage-1
    hf-pretrain distil-task --config tinybert_prediction --teacher_name_or_path my-classifier \
        --model_name_or_path stage-1 --train_file train.tsv --validation_file dev.tsv --output_dir stage-2

The teacher says what the labels are; the examples need none. The student opens with
`AutoModelForSequenceClassification.from_pretrained("stage-2")`. With `--task token-classification` examples are texts,
or lists of words (`tokens`) with their classes (`labels`); with `--task question-answering` files of SQuAD's form, or
rows of `question`, `context` and `answers`.""",
    arguments=(TaskDataArguments, StudentArguments, TaskDistillationTrainingArguments),
    learning=Learning(left={"prediction_loss": 0.44}),
    tiny_options=_TINY_OPTIONS | {"labels_weight": 0.1},
    load=load_task,
    made_up=made_up_examples,
    demonstrate=print_comparison,
    left_out={"cache_teacher": False},
)
