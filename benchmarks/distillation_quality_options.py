"""The arms and the options of distillation_quality.py."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from results import ComparisonArguments

TEXT_ARMS: dict[str, dict[str, Any]] = {
    "mlm": {"prediction_weight": 0.0, "cosine_weight": 0.0, "mlm_weight": 1.0},
    "distilbert": {"distillation_method": "distilbert"},
    "distilbert_free": {"distillation_method": "distilbert"},
    "tinybert": {"distillation_method": "tinybert"},
}


class TaskArm(NamedTuple):
    """Whether the labels teach, whether sentences are augmented, and the arm whose student is gone on with."""

    by_labels: bool = False
    is_augmented: bool = False
    origin: str | None = None


TASK_ARMS = {
    "labels": TaskArm(by_labels=True),
    "distilled": TaskArm(),
    "augmented": TaskArm(is_augmented=True),
    "general": TaskArm(origin="tinybert"),
    "both": TaskArm(is_augmented=True, origin="tinybert"),
    "pretrained": TaskArm(by_labels=True, origin="mlm"),
}
ARMS = (*TASK_ARMS, *TEXT_ARMS)


@dataclass
class QualityArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = field(default="distillation_quality.json", metadata={"help": "File that each run adds a row to."})
    teacher_model: str | None = field(
        default=None, metadata={"help": "A masked language model that this library pre-trained, instead of a new one."}
    )
    teacher_flops: float = field(default=6e13, metadata={"help": "Training budget of a new teacher."})
    model_type: str = field(
        default="modernbert", metadata={"help": "Architecture of a new teacher and of the students."}
    )
    teacher_layers: int = field(default=4, metadata={"help": "Its layers."})
    teacher_size: int = field(default=256, metadata={"help": "Its width; a head for every 32."})
    student_layers: int = field(default=4, metadata={"help": "Layers of the students."})
    flops: float = field(default=6e12, metadata={"help": "Training budget of a student on text."})
    teacher_rate: float = field(default=1e-3, metadata={"help": "Its peak rate on the task."})
    teacher_epochs: float = field(default=3.0, metadata={"help": "Passes of the teacher over the task."})
    intermediate_steps: int = field(default=800, metadata={"help": "Steps of TinyBERT's first stage on the task."})
    intermediate_rate: float = field(default=5e-4, metadata={"help": "Their peak rate."})
    prediction_steps: int = field(
        default=400, metadata={"help": "Steps of its second stage; of labels alone, as many as of both."}
    )
    prediction_rate: float = field(default=3e-4, metadata={"help": "Their peak rate."})
    augmentation_rows: int = field(default=8, metadata={"help": "Tries a sentence."})
    probe_rows: int = field(default=10_000, metadata={"help": "Most sentences that a probe is trained on."})

    def folder(self, name: str = "") -> Path:
        """Return the folder of a model of these settings."""
        digest = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=4).hexdigest()
        return self.runs_folder() / digest / name
