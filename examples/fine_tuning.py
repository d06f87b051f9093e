"""Fine-tune a classifier with a learning rate for each layer, and compare it with the most frequent class.

Change the names below. The tables have the columns sentence and label. The classifier in OUT is a stock checkpoint.
"""

from collections import Counter

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_pretrain import FineTuningArguments, FineTuningTrainer

MODEL = "my-electra"
TRAIN, VALIDATION, OUT = "train.csv", "dev.csv", "classifier"
EPOCHS, RATE, DECAY = 3, 1e-4, 0.8  # ELECTRA's; a larger model takes a lower rate and a decay of 0.9

task = load_dataset("csv", data_files={"train": TRAIN, "validation": VALIDATION})
labels = sorted(set(task["train"]["label"]))
names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(labels), **names)
rows = task.map(
    lambda row: {**tokenizer(row["sentence"], truncation=True), "labels": labels.index(row["label"])},
    remove_columns=["sentence", "label"],
)

trainer = FineTuningTrainer(
    model,
    FineTuningArguments(
        output_dir=OUT,
        num_train_epochs=EPOCHS,
        learning_rate=RATE,
        layerwise_learning_rate_decay=DECAY,
        save_strategy="no",
    ),
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],
    processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
)
trainer.train()
trainer.save_model()
rates = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}, reverse=True)
print("peak learning rates, from the head to the embeddings:", *(f"{rate:.1e}" for rate in rates))
most_common = Counter(rows["train"]["labels"]).most_common(1)[0][0]
print("accuracy of the most frequent class", np.mean([label == most_common for label in rows["validation"]["labels"]]))
print("accuracy of the classifier", trainer.evaluate()["eval_accuracy"])
