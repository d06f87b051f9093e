"""The arms and the options of distillation_quality.py."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_pretrain.errors import InputError

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
class QualityArguments:
    """What is compared."""

    train_file: list[str] = field(
        default_factory=list, metadata={"help": "Text to train on, as for `hf-pretrain mlm`."}
    )
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "Held-out text; without it, documents of train_file are held out."}
    )
    data_dir: str = field(default="data", metadata={"help": "Folder with sst2 and cola."})
    results: str = field(default="distillation_quality.json", metadata={"help": "File that each run adds a row to."})
    table: bool = field(default=False, metadata={"help": "Print the tables of the file instead of running anything."})
    arm: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    seed: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds; each arm runs with each."})
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
    max_corpus_bytes: int | None = field(default=None, metadata={"help": "Train on a random part of the text."})
    document_separator: str = field(default="blank_line", metadata={"help": "As for `hf-pretrain mlm`."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the tokenizer that is trained on the text."})
    block_size: int = field(default=64, metadata={"help": "Most tokens in an example, of the task too."})
    batch_size: int = field(default=16, metadata={"help": "Examples a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate on text."})
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

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: If an arm is unknown, or there is nothing to train on.
        """
        for name in self.arm:
            if name not in ARMS:
                raise InputError(f"arm={name!r} is unknown; choose of {', '.join(ARMS)}")
        if not self.table and not self.train_file:
            raise InputError("train_file is missing: name the text to train on, or print what there is with --table")

    def settings(self) -> dict[str, Any]:
        """Return what the runs of a table have in common: all but which they are and where things lie."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}
        names = {name: [Path(path).name for path in getattr(self, name)] for name in ("train_file", "validation_file")}
        return names | values

    def folder(self, name: str = "") -> Path:
        """Return the folder of a model of these settings."""
        digest = hashlib.blake2b(json.dumps(self.settings()).encode(), digest_size=4).hexdigest()
        path = Path(self.results)
        return path.with_name(f"{path.stem}-runs") / digest / name


_NOT_SETTINGS = ("train_file", "validation_file", "data_dir", "results", "table", "arm", "seed")
