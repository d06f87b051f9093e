"""Knowledge distillation: TinyBERT, DistilBERT, MiniLM, and any mixture of their losses."""

from hf_pretrain.objectives.distillation.arguments import (
    DistillationConfig,
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.building import (
    METHOD,
    TASK_METHOD,
    ask_once,
    build_model,
    check_labels,
    general_class,
    join,
    load_task,
    load_text,
)
from hf_pretrain.objectives.distillation.modeling import DistillationModel, Teacher
from hf_pretrain.objectives.distillation.student import StudentArguments
from hf_pretrain.objectives.distillation.targets import (
    DataCollatorForDistillation,
    ask_for_top_k,
    report_label_agreement,
)
from hf_pretrain.objectives.distillation.trainer import DistillationTrainer, TaskDistillationTrainer, print_comparison
from hf_pretrain.tasks.data import TaskDataArguments
from hf_pretrain.tasks.examples import DataCollatorForTask

__all__ = [
    "METHOD",
    "TASK_METHOD",
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
