"""Make a classifier small, and measure what its teacher adds to the labels.

Change the names below. TEACHER is a classifier that is fine-tuned on the task; the tables have the columns sentence and label. A
student of LAYERS layers is cut from it. It learns the teacher's states, then its predictions, in TinyBERT's two stages. The same
student learns from the labels alone, for as many steps. Everything is written to OUT as stock checkpoints.
"""

from datasets import load_dataset
from transformers import pipeline

from hf_pretrain.cli import main

TEACHER, LAYERS = "classifier", 2
TRAIN, VALIDATION, OUT = "train.csv", "dev.csv", "distilled"
STEPS, RATE, BATCH = 500, 1e-4, 32
AUGMENTATION_MODEL = None  # a masked language model: other words in the examples, as in TinyBERT


def run(folder: str, **options: object) -> str:
    """Run `hf-pretrain distil-task`, and return the folder of the student."""
    options |= {
        "teacher_name_or_path": TEACHER,
        "train_file": TRAIN,
        "validation_file": VALIDATION,
        "learning_rate": RATE,
    }
    options |= {"per_device_train_batch_size": BATCH, "save_strategy": "no", "output_dir": f"{OUT}/{folder}"}
    status = main(["distil-task", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    if status:
        raise SystemExit(status)
    return f"{OUT}/{folder}"


cut = {"student_layers": "uniform", "num_hidden_layers": LAYERS}
varied = {"augmentation_model": AUGMENTATION_MODEL} if AUGMENTATION_MODEL else {}
labels = run("labels", **cut, prediction_weight=0.0, labels_weight=1.0, max_steps=2 * STEPS)
states = run("states", **cut, **varied, training_stage="intermediate", max_steps=STEPS)
student = run("student", **varied, training_stage="prediction", model_name_or_path=states, max_steps=STEPS)

rows = load_dataset("csv", data_files=VALIDATION, split="train")
for name, folder in (("teacher", TEACHER), ("student of the labels", labels), ("student of the teacher", student)):
    classify = pipeline("text-classification", model=folder)
    found = [
        answer["label"] == str(label)
        for answer, label in zip(classify(rows["sentence"][:]), rows["label"], strict=True)
    ]
    print(f"{name}: accuracy {sum(found) / len(found):.4f}, {classify.model.num_parameters():,} parameters")
