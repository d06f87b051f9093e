"""Students of two layers and teachers of four, and the losses between them."""

import torch
from transformers import BertConfig, BertForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_data, tiny_tokenizer
from hf_pretrain.objectives.distillation import DistillationTrainingArguments, join
from hf_pretrain.objectives.distillation.arguments import OF_SENTENCES
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

SIZES = {**TINY, "vocab_size": VOCAB_SIZE}
# Without those of whole texts, which need a teacher with a pooling.
ALL = tuple(name for name in DistillationTrainingArguments.loss_names if name not in OF_SENTENCES)
# Not of equal predictions, where there is nothing to learn.
OF_TEACHER = [name for name in ALL if name != "mlm"]
# Not of all layers, which need equal heads.
OF_STATES = [name for name in OF_TEACHER if name not in ("prediction", "relation_kk")]
# For `build`, which compares layers too: the predictions of a task alone.
PREDICTION = {
    **dict.fromkeys(
        ("cosine_weight", "embedding_weight", "hidden_weight", "attention_weight", "relation_vv_weight"), 0.0
    ),
    "labels_weight": 0.0,
}
# Losses that a cache of the teacher's likeliest tokens has something for, with two maskings of each example.
UNCACHED = {
    **{name: weight for name, weight in PREDICTION.items() if name != "labels_weight"},
    "prediction_weight": 5.0,
    "mlm_weight": 2.0,
    "temperature": 2.0,
    "static_masks": 2,
}


def bert(model_class=BertForMaskedLM, *, seed=0, **sizes):
    torch.manual_seed(seed)
    return model_class(BertConfig(**{**SIZES, "initializer_range": 0.2, **sizes}))


def arguments(*names, **options):
    weights = {f"{name}_weight": float(name in names) for name in ALL}
    return DistillationTrainingArguments(**{"output_dir": "unused", "bf16": False, **weights, **options})


def pair(*names, student=None, teacher=None, **options):
    """A student of two layers and a teacher of four, that differ in width."""
    student = bert(seed=1) if student is None else student
    teacher = bert(num_hidden_layers=4, hidden_size=48) if teacher is None else teacher
    return join(student, teacher, arguments(*names, **options)).eval()


def examples(count=6, *, seed=0):
    data = tiny_data(train=count + seed)
    return [data.train_dataset[i] for i in range(seed, count + seed)]


def collator(**options):
    return DataCollatorForMaskedLM(tiny_tokenizer(), **options)
