"""Does pre-training on your own text help? Continue a model on it, fine-tune the old and the new one alike, compare both.

Change the names below. TEXT has any format of `hf-pretrain mlm`; the tables have the columns sentence and label. Everything is
written to OUT as stock checkpoints. One seed proves little on a small validation set: try several.
"""

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_pretrain import DataArguments, MaskedLMTrainer, MaskedLMTrainingArguments, prepare_data

MODEL = "answerdotai/ModernBERT-base"
TEXT, TRAIN, VALIDATION, OUT = "corpus.txt", "train.csv", "dev.csv", "adapted"
BLOCK_SIZE, EPOCHS, RATE, TASK_EPOCHS, TASK_RATE, SEED = 512, 3, 5e-5, 3, 2e-5, 0

text = DataArguments(train_file=[TEXT], tokenizer_name=MODEL, block_size=BLOCK_SIZE)
data = prepare_data(text, seed=SEED, output_dir=f"{OUT}/continued")  # holds out a part of the documents
args = MaskedLMTrainingArguments(f"{OUT}/continued", num_train_epochs=EPOCHS, learning_rate=RATE, seed=SEED)
trainer = MaskedLMTrainer(model=MODEL, args=args, train_dataset=data)
trainer.train()
trainer.evaluate()
trainer.save_model()
trainer.create_model_card()

task = load_dataset("csv", data_files={"train": TRAIN, "validation": VALIDATION})
labels = sorted(set(task["train"]["label"]))
names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def fine_tune(checkpoint: str, folder: str) -> float:
    """Fine-tune a classifier from a checkpoint; return its accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = task.map(
        lambda row: {**tokenizer(row["sentence"], truncation=True), "labels": labels.index(row["label"])},
        remove_columns=["sentence", "label"],
    )
    tuner = Trainer(
        AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=len(labels), **names),
        TrainingArguments(
            folder, num_train_epochs=TASK_EPOCHS, learning_rate=TASK_RATE, seed=SEED, save_strategy="no"
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    )
    tuner.train()
    tuner.save_model()
    return tuner.evaluate()["eval_accuracy"]


old, new = fine_tune(MODEL, f"{OUT}/classifier-of-the-old"), fine_tune(f"{OUT}/continued", f"{OUT}/classifier")
print(f"accuracy of the old model {old:.4f}, of the new model {new:.4f}")
