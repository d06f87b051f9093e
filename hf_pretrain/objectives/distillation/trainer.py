"""The Trainers of distillation, on text and on the examples of a task, and the words of their model cards.

[`DistillationTrainer`] adds three things to the shared Trainer: the step's temperature, the description of the run's
losses, and a table of the student beside its teacher. The table's numbers of predictions are those of the log; sizes
and times are measured once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from hf_pretrain.data.arguments import DataArguments, one_text_in_a_row
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription
from hf_pretrain.hub.run import hub_name_of
from hf_pretrain.hub.text import Row, bare_name, hub_id, split_by_held_out_set
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.visibility.rules import check_isolation
from hf_pretrain.objectives.distillation.arguments import (
    OF_PREDICTIONS,
    OF_SENTENCES,
    DistillationArguments,
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.comparison import by_side, comparison_rows, measure_costs
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.distillation.student import StudentArguments
from hf_pretrain.objectives.distillation.targets import (
    DataCollatorForDistillation,
    cache_teacher_logits,
    cache_teacher_top_k,
    report_label_agreement,
)
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.schedules import weight_symbol
from hf_pretrain.tasks.batches import DataCollatorForTask, LengthGroupedSampler
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.training.program import print_table
from hf_pretrain.training.trainer import PretrainingTrainer

TINYBERT = """\
@inproceedings{jiao2020tinybert,
  title = {{TinyBERT}: Distilling {BERT} for Natural Language Understanding},
  author = {Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang
  and
            Liu, Qun},
  booktitle = {Findings of {EMNLP}},
  year = {2020}
}"""
DISTILBERT = """\
@article{sanh2019distilbert,
  title = {{DistilBERT}, a distilled version of {BERT}: smaller, faster, cheaper and lighter},
  author = {Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},
  journal = {arXiv preprint arXiv:1910.01108},
  year = {2019}
}"""
MINILM = """\
@inproceedings{wang2020minilm,
  title = {{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author = {Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""
MINILMV2 = """\
@inproceedings{wang2021minilmv2,
  title = {{MiniLMv2}: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author = {Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle = {Findings of {ACL}},
  year = {2021}
}"""

REIMERS = """\
@inproceedings{reimers2020multilingual,
  title = {Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation},
  author = {Reimers, Nils and Gurevych, Iryna},
  booktitle = {Proceedings of {EMNLP}},
  year = {2020}
}"""
JASPER = """\
@article{zhang2024jasper,
  title = {Jasper and Stella: distillation of {SOTA} embedding models},
  author = {Zhang, Dun and Li, Jiacheng and Zeng, Ziyang and Wang, Fulong},
  journal = {arXiv preprint arXiv:2412.19048},
  year = {2024}
}"""

# In words, as a formula ("S" the student, "T" the teacher), and its paper.
_LOSSES: dict[str, tuple[str, str, str]] = {
    "prediction": ("its predictions", r"\tau^2 \, \mathrm{KL}\left(p_T^{1/\tau} \,\|\, p_S^{1/\tau}\right)", ""),
    "mlm": ("the original tokens at masked positions", r"-\log p_S(x \mid \tilde{x})", ""),
    "labels": ("the labels of the data", r"-\log p_S(y \mid x)", ""),
    "cosine": ("the direction of its last hidden states", r"\left(1 - \cos(H_S, H_T)\right)", DISTILBERT),
    "embedding": ("its embeddings", r"\mathrm{MSE}(E_S W_e, E_T)", TINYBERT),
    "hidden": ("its hidden states", r"\sum_m \mathrm{MSE}(H_S^m W_h, H_T^{g(m)})", TINYBERT),
    "attention": (
        "its attention scores",
        r"\sum_m \frac{1}{h} \sum_{a=1}^{h} \mathrm{MSE}(A_{S,a}^m, A_{T,a}^{g(m)})",
        TINYBERT,
    ),
    "relation_qq": ("the relations between its queries", r"\mathrm{KL}(R_T^{QQ} \,\|\, R_S^{QQ})", MINILMV2),
    "relation_kk": ("those between its keys", r"\mathrm{KL}(R_T^{KK} \,\|\, R_S^{KK})", MINILMV2),
    "relation_vv": ("those between its values", r"\mathrm{KL}(R_T^{VV} \,\|\, R_S^{VV})", MINILMV2),
    "attention_distribution": ("the attention of one of its layers", r"\mathrm{KL}(A_T \,\|\, A_S)", MINILM),
    "sentence_cosine": ("the direction of its sentence embeddings", r"\left(1 - \cos(v_S, v_T)\right)", JASPER),
    "sentence_mse": ("its sentence embeddings", r"\mathrm{MSE}(v_S, v_T)", REIMERS),
    "sentence_similarity": (
        "the similarities between sentences",
        r"\left(\cos(v_S, v_S') - \cos(v_T, v_T')\right)^2",
        JASPER,
    ),
    "value_relation": ("the relations between its values", r"\mathrm{KL}(R_T^{VV} \,\|\, R_S^{VV})", MINILM),
}

# The Hub's name of the task, and code, of heads that no Trainer describes.
_HEADS = {
    "masked_lm": (
        "fill-mask",
        """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
predictions = fill_mask({masked})""",
    ),
    "token_classification": (
        "token-classification",
        """\
from transformers import pipeline

classify = pipeline("token-classification", model="{repo}", aggregation_strategy="first")
entities = classify({sentence})""",
    ),
    "question_answering": (
        "question-answering",
        """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForQuestionAnswering.from_pretrained("{repo}")
inputs = tokenizer({another}, {sentence}, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
begin, end = output.start_logits.argmax(), output.end_logits.argmax()
answer = tokenizer.decode(inputs["input_ids"][0, begin : end + 1])""",
    ),
}


_OF_A_SIDE = {name: SHARED_METRICS[name] for name in ("mlm_loss", "mlm_perplexity", "mlm_accuracy")} | {
    "accuracy": "Share of the predictions that are the label.",
    "f1": "Overlap of the predicted and the true parts of a text, from 0 to 1, 1 being all of them and nothing else.",
    "exact_match": "Share of the answers that are the true one to the letter.",
    "squared_error": "Mean square of how far a prediction is from the label; 0 is perfect.",
}
# What the numbers say, for an outsider.
_METRICS = (
    SHARED_METRICS
    | _OF_A_SIDE
    | {f"teacher_{name}": "The same number of the teacher, which the student is to reach." for name in _OF_A_SIDE}
    | {
        "agreement": "Share of the predictions in which the student's first guess is the teacher's.",
        "kl": "How far the student's probabilities are from the teacher's, in nats; 0 is the same.",
        "squared_difference": "Mean square of how far a prediction is from the teacher's; 0 is the same.",
        "prediction_loss": "How far the student's softened probabilities are from the teacher's, in nats; 0 is the same.",
        "labels_loss": "How surprised the student is by the true label, in nats; 0 is certainty.",
        "cosine_loss": "How far the student's last states point elsewhere than the teacher's, from 0, the same, to 2.",
        "embedding_loss": "Mean square of how far the student's embeddings are from the teacher's; 0 is the same.",
        "hidden_loss": "Mean square of how far the student's hidden states are from the teacher's; 0 is the same.",
        "attention_loss": "Mean square of how far the student's attention scores are from the teacher's; 0 is the same.",
        "attention_distribution_loss": "How far attention is from the teacher's, in nats; 0 is the same.",
        "sentence_agreement": "Share of the texts whose nearest other text is the one that is nearest for the teacher.",
        "sentence_cosine_loss": "How far a text's vector points elsewhere than the teacher's, from 0, the same, to 2.",
        "sentence_mse_loss": "Mean square of how far a text's vector is from the teacher's; 0 is the same.",
        "sentence_similarity_loss": "Mean square of how far the likeness of two texts is from the teacher's; 0 is the same.",
        "value_relation_loss": "How far the likeness of tokens, by the values, is from the teacher's, in nats; 0 is the same.",
    }
    | {
        f"relation_{short}_loss": f"How far the likeness of tokens, by the {name}, is from the teacher's, in nats; 0 is the same."
        for short, name in {"qq": "queries", "kk": "keys", "vv": "values"}.items()
    }
)
_HEADLINE = (
    *("sentence_agreement", "sentence_cosine_loss", "sentence_mse_loss", "sentence_similarity_loss"),
    *("agreement", "kl", "squared_difference"),
    *("mlm_loss", "mlm_accuracy", "accuracy", "f1", "exact_match", "squared_error"),
)


def describe(objective: ObjectiveDescription, weights: Mapping[str, float], *, head: str) -> ObjectiveDescription:
    """Return an objective's description with the losses of one run.

    Args:
        objective: The description that all runs have in common.
        weights: The weight of each loss.
        head: See [`hf_pretrain.modeling.heads.head_kind`].
    """
    parts, formulas, sources = zip(*(_LOSSES[name] for name in weights), strict=True)
    description = f"{objective.description} The student learns {_enumerate(parts)}."
    if head == "none" and not weights.keys() & set(OF_SENTENCES):
        description += " It is an encoder only: it has no head, and what no loss reached is as it was at the start."
    terms = [
        formula
        if weight == 1
        else rf"{weight_symbol(weight)} \, \left( {formula} \right)"
        if formula.startswith("-")
        else rf"{weight_symbol(weight)} \, {formula}"
        for weight, formula in zip(weights.values(), formulas, strict=True)
    ]
    changes: dict[str, object] = {
        "description": description,
        "formula": r"\mathcal{L} = " + " + ".join(terms),
        # A loss without a paper of its own is cited by those of the objective.
        "citations": tuple(
            dict.fromkeys(entry for source in sources for entry in ((source,) if source else objective.citations))
        ),
    }
    if head in _HEADS:
        changes["pipeline_tag"], changes["usage"] = _HEADS[head]
    return dataclasses.replace(objective, **changes)  # type: ignore[arg-type]


def describe_origin(args: StudentArguments, *, teacher: str, layers: Sequence[int] = (), last_layer: int = 0) -> str:
    """Return how a student began, for the card; with names of the Hub alone.

    Args:
        args: The options of the student.
        teacher: Name or folder of the teacher.
        layers: The teacher's layers that the student was cut from, if it was; counted from 0.
        last_layer: The number of the teacher's last layer.
    """
    source = _linked(teacher) or "a local teacher"
    if args.model_name_or_path is not None:
        return f"Continued from {_linked(args.model_name_or_path) or 'a local checkpoint'} and distilled from {source}"
    if layers:
        word = "layer" if len(layers) == 1 else "layers"
        return f"Cut from {source}, {word} {_enumerate([str(n) for n in layers])} of 0 to {last_layer}, and distilled from it"
    return f"Distilled from {source} into a new model"


def _linked(name: str) -> str | None:
    """Return a link to a model of the Hub; None of a local one, whose path means nothing to a reader."""
    return None if Path(name).exists() or hub_id(name) is None else f"[{name}](https://huggingface.co/{name})"


def _enumerate(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


_OF_SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "pipeline_tag": "sentence-similarity",
    "tags": ("sentence-transformers",),
    "usage": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}")
embeddings = model.encode([{sentence}, {another}])
similarities = model.similarity(embeddings, embeddings)""",
}
_ENCODER_ONLY = "**Encoder only**: this run trained no head; go on with a loss of predictions, or fine-tune it."


def building() -> Any:
    """Return the module that builds student and teacher, which imports this one."""
    return import_module("hf_pretrain.objectives.distillation.building")


class DistillationTrainer(PretrainingTrainer):
    """Trains the student of a [`DistillationModel`] on text."""

    model: DistillationModel

    objective = ObjectiveDescription(
        name="distil",
        title="Knowledge distillation",
        description=(
            "A small model, the student, is trained to compute what a larger one, the teacher, computes on the same text. The "
            "teacher is not changed."
        ),
        citations=(DISTILBERT,),
        metrics=_METRICS,
        headline=_HEADLINE,
    )

    option_classes = (StudentArguments, DistillationTrainingArguments)

    def __init__(self, model: Any = None, args: Any = None, *inputs: Any, teacher: Any = None, **kwargs: Any) -> None:
        if isinstance(teacher, str | Path):
            options = kwargs.get("model_args") or (
                model if isinstance(model, StudentArguments) else StudentArguments()
            )
            kwargs["model_args"] = dataclasses.replace(options, teacher_name_or_path=str(teacher))
            model, teacher = None if isinstance(model, StudentArguments) else model, None
        self._teacher: PreTrainedModel | None = teacher
        super().__init__(model, args, *inputs, **kwargs)
        missing = set(self.model.config.losses or ()) - set(args.loss_names)
        if missing:
            raise InputError(
                f"{type(self).__name__} has no {sorted(missing)[0]} loss: build the model with its options"
            )
        self._costs: dict[str, float] | None = None

    def auto_class(self, args: Any) -> Any:
        """Return the Auto class of student and teacher."""
        return building().auto_class_for(args)

    def build_model(
        self, options: StudentArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> DistillationModel:
        """Return the student with its teacher."""
        model = building().build_model(
            options,
            args,
            auto_class=self.auto_class(args),
            tokenizer=data.tokenizer,
            block_size=data.block_size,
            stock=stock,
            teacher=self._teacher,
        )
        if data.isolates_documents:
            for part in model.stock_models():
                check_isolation(part, length=data.block_size)
        return model

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return options with which each example is of one text, if a loss compares vectors of texts."""
        compares_texts = training.weights().keys() & set(OF_SENTENCES)
        return one_text_in_a_row(data_args) if compares_texts else data_args

    def make_collator(self, args: Any, tokenizer: Any) -> Any:
        """Return the collator of masks, and of the teacher's likeliest tokens where they are kept."""
        collator_class = DataCollatorForDistillation if args.cache_top_k else DataCollatorForMaskedLM
        return collator_class(tokenizer, masking=args.masking, seed=args.seed)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the examples, with the teacher's likeliest tokens where they are kept."""
        return cache_teacher_top_k(model, data, args, collator=collator).trainer_inputs()

    def comparison_rows(self) -> list[Row]:
        """Return the header and the rows of a table of the student beside its teacher.

        Sizes and times are measured at the first call. The numbers of predictions are those of the last evaluation of
        the very weights that the model holds; they are left out if there is none.
        """
        if self._costs is None:
            self._costs = self._measure_costs()
        if not self._costs:
            return []
        # Of several held-out sets the first.
        metrics = next(iter(split_by_held_out_set(self.held_out.after()).values()), {})
        return comparison_rows(self._costs | by_side({bare_name(key): value for key, value in metrics.items()}))

    def _measure_costs(self) -> dict[str, float]:
        """Return sizes and times on held-out examples; {} where there are none, or the student is in shards."""
        held_out, teacher = self.eval_dataset, self.model.teacher
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()))
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not isinstance(held_out, EpochDataset) or teacher is None or is_sharded:
            return {}
        models: tuple[Any, ...] = (self.model.student, teacher.model.to(self.model.student.device))
        if not OF_PREDICTIONS & set(self.model.config.losses or ()):
            models = tuple(model.base_model for model in models)
        with self.compute_loss_context_manager(), torch.random.fork_rng(devices=[]):
            return measure_costs(models[0], models[1], held_out, collator=self.data_collator)

    def reference_models(self) -> dict[str, str | Callable[[Path], Any]]:
        """Return the teacher by its name, or what writes the one in memory."""
        if self._teacher is None and self.model.teacher_name:
            return {"teacher": self.model.teacher_name}
        teacher = self._teacher or (self.model.teacher and self.model.teacher.model)
        return {} if teacher is None else {"teacher": partial(self._save_teacher, teacher)}

    def _save_teacher(self, teacher: PreTrainedModel, folder: Path) -> None:
        teacher.save_pretrained(folder)
        cast(Any, self.processing_class).save_pretrained(folder)
        modules = self.model.sentence_modules
        if modules is not None:
            modules.write(
                folder, hidden_size=teacher.config.hidden_size, longest=longest_sequence(teacher), dense=None
            )

    def card_facts(self) -> dict[str, Any]:
        """Return the run's losses, how the student began, and the student beside its teacher."""
        config, args = self.model.config, cast(DistillationArguments, self.args)
        objective = describe(self.objective, args.weights(), head=config.head)
        facts: dict[str, Any] = {"origin": self.model.origin, "comparison": self.comparison_rows()}
        if self.model.sentence_modules is not None:
            objective = dataclasses.replace(objective, **_OF_SENTENCE_TRANSFORMERS)
            teacher = self.model.teacher_name
            name = hub_name_of(teacher) if teacher and Path(teacher).exists() else hub_id(teacher)
            if name:
                facts["base_model"] = name
        elif not OF_PREDICTIONS & args.weights().keys():
            facts["note"] = _ENCODER_ONLY
        return facts | {"objective": objective}


class TaskDistillationTrainer(DistillationTrainer):
    """Trains the student of a [`DistillationModel`] on the examples of a task, of which the labels are optional."""

    objective = ObjectiveDescription(
        name="distil-task",
        title="Task distillation",
        description=(
            "A small model, the student, is trained to compute what a larger one, the teacher, computes on the examples of a "
            "task that the teacher was fine-tuned for. The teacher is not changed, and the examples need no labels."
        ),
        citations=(TINYBERT,),
        metrics=_METRICS,
        headline=_HEADLINE,
        pipeline_tag="text-classification",
        usage="""\
from transformers import pipeline

classify = pipeline("text-classification", model="{repo}")
predictions = classify({sentence})""",
    )

    option_classes = (StudentArguments, TaskDistillationTrainingArguments)
    special_tokens = ("pad",)
    reads_instead_of_text = (
        "labelled examples: give train_dataset=prepare_task(TaskDataArguments(train_file=...), ...)"
    )

    def auto_class(self, args: Any) -> Any:
        """Return the Auto class of the task."""
        return building().AUTO_CLASSES[args.task]

    def build_model(
        self, options: StudentArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> DistillationModel:
        """Return the student with its teacher; the examples must have labels if a loss needs them."""
        building().check_labels(data, args)
        return super().build_model(options, args=args, data=data, stock=stock)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForTask:
        """Return the collator of labelled examples."""
        return DataCollatorForTask(tokenizer)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the examples, with the teacher's predictions where they are kept."""
        report_label_agreement(model, data, args)
        return cache_teacher_logits(model, data, args).trainer_inputs()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Shuffle by the seed and the epoch, with examples of about one length in a step for `group_by_length`."""
        dataset = cast(EpochDataset, self.train_dataset if train_dataset is None else train_dataset)
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler.of(dataset, seed=seed, batch_size=global_batch_size(self.args))


def print_comparison(trainer: DistillationTrainer, data: PreparedData) -> None:
    """Print the student beside its teacher."""
    rows = trainer.comparison_rows()
    if rows:
        header, *body = rows
        print("\nThe student beside its teacher, on held-out examples:")
        print_table(body, header=header)
    if trainer.model.sentence_modules is not None:
        print(f"\nSentence embeddings: SentenceTransformer({trainer.args.output_dir!r}).encode(texts)")
