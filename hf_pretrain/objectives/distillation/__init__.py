"""Knowledge distillation: TinyBERT, DistilBERT, MiniLM, and any mixture of their losses.

`arguments.py` has the options and the configuration, `student.py` the student, `building.py` brings data, student and
teacher together. A step runs `modeling.py` with the losses of `losses.py` and `predictions.py`; `targets.py` replaces
the teacher by a cache of its predictions, and `sentence_embeddings.py` is for teachers of sentence-transformers.
`trainer.py` logs and describes the run, `comparison.py` measures the student beside its teacher.
"""

from hf_pretrain.objectives.distillation.arguments import (
    DistillationConfig,
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.building import (
    METHOD,
    TASK_METHOD,
    auto_class_for,
    build_model,
    check_labels,
    join,
    load_task,
    load_text,
)
from hf_pretrain.objectives.distillation.comparison import compare
from hf_pretrain.objectives.distillation.modeling import DistillationModel, Teacher
from hf_pretrain.objectives.distillation.student import StudentArguments
from hf_pretrain.objectives.distillation.targets import (
    DataCollatorForDistillation,
    cache_teacher_logits,
    cache_teacher_top_k,
    report_label_agreement,
)
from hf_pretrain.objectives.distillation.trainer import DistillationTrainer, TaskDistillationTrainer, print_comparison
from hf_pretrain.tasks.batches import DataCollatorForTask
from hf_pretrain.tasks.data import TaskDataArguments

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
    "auto_class_for",
    "build_model",
    "cache_teacher_logits",
    "cache_teacher_top_k",
    "check_labels",
    "compare",
    "join",
    "load_task",
    "load_text",
    "print_comparison",
    "report_label_agreement",
]
