"""Knowledge distillation: TinyBERT, DistilBERT, MiniLM, and any mixture of their losses."""

from hf_pretrain.objectives.distillation.arguments import (
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.building import build_model, general_class, join
from hf_pretrain.objectives.distillation.configuration import DistillationConfig
from hf_pretrain.objectives.distillation.label_agreement import report_label_agreement
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.objectives.distillation.preparation import ask_once, check_labels, load_task, load_text
from hf_pretrain.objectives.distillation.student import StudentArguments
from hf_pretrain.objectives.distillation.task_data import TaskDataArguments
from hf_pretrain.objectives.distillation.task_examples import DataCollatorForTask
from hf_pretrain.objectives.distillation.teacher import Teacher
from hf_pretrain.objectives.distillation.top_k import DataCollatorForDistillation, ask_for_top_k
from hf_pretrain.objectives.distillation.trainer import DistillationTrainer, TaskDistillationTrainer, print_comparison

__all__ = [
    "DataCollatorForDistillation",
    "DataCollatorForTask",
    "DistillationConfig",
    "DistillationModel",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "StudentArguments",
    "TaskDataArguments",
    "TaskDistillationTrainer",
    "TaskDistillationTrainingArguments",
    "Teacher",
    "ask_for_top_k",
    "ask_once",
    "build_model",
    "check_labels",
    "general_class",
    "join",
    "load_task",
    "load_text",
    "print_comparison",
    "report_label_agreement",
]
