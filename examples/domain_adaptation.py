"""Does pre-training on your own text help? Continue, export, fine-tune a classifier, and write a card with the results.

    python examples/domain_adaptation.py --train_file my-text.txt --task_train train.tsv --task_validation dev.tsv \
        --output_dir adapted --model_name_or_path google-bert/bert-base-uncased --learning_rate 5e-5

Without --model_name_or_path no network is needed: the example first pre-trains a small BERT on the docstrings of the installed
Python packages. A task is a file of lines "sentence<TAB>label". The classifier and its card are in adapted/classifier.
examples/README.md explains all steps.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.objectives.encoder import MaskedLMTrainer
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainingArguments
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import held_out_rows, load_data, output_directory, print_table, run


@dataclass
class ExampleArguments:
    """Texts, sizes and lengths of the stages."""

    train_file: list[str] = field(metadata={"help": "Your own text, as for `hf-pretrain mlm`."})
    task_train: str = field(metadata={"help": 'Task to learn: lines "sentence<TAB>label".'})
    task_validation: str = field(metadata={"help": "Sentences for the accuracy, in the same format."})
    output_dir: str = field(metadata={"help": "Folder for all results; empty or new."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Masked language model to continue; by default a small one is pre-trained first."},
    )
    base_steps: int = field(default=1000, metadata={"help": "Steps of pre-training of the small model."})
    adaptation_steps: int = field(default=500, metadata={"help": "Steps of pre-training on your own text."})
    batch_size: int = field(default=32, metadata={"help": "Examples a step of pre-training."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak rate of pre-training; lower for a large model."}
    )
    document_separator: Literal["blank_line", "line", "file"] = field(
        default="blank_line", metadata={"help": "What ends a document of train_file, if it is a text file."}
    )
    block_size: int = field(default=128, metadata={"help": "Most tokens in an example."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of the small model."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the small model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the small model."})
    base_corpus_bytes: int = field(default=6_000_000, metadata={"help": "Bytes of docstrings for its pre-training."})
    finetuning_epochs: float = field(default=3.0, metadata={"help": "Passes over the task."})
    finetuning_learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate of fine-tuning."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


@dataclass(frozen=True)
class Task:
    """Sentences with their classes; the columns are `sentence` and `label`."""

    train: Dataset
    validation: Dataset
    labels: list[str]
    name: str


def read_task(train_file: str, validation_file: str) -> Task:
    """Read both files before anything is trained, and number the labels in alphabetical order."""
    rows = {path: _read_rows(path) for path in (train_file, validation_file)}
    labels = sorted({label for _, label in rows[train_file]})
    if len(labels) < 2:
        raise InputError(f"task_train={train_file} has the label {labels[0]!r} only: there is nothing to tell apart")
    unknown = sorted({label for _, label in rows[validation_file]} - set(labels))
    if unknown:
        raise InputError(f"task_validation={validation_file} has labels that task_train lacks: {', '.join(unknown)}")
    parts = [
        Dataset.from_dict({"sentence": [text for text, _ in part], "label": [labels.index(name) for _, name in part]})
        for part in (rows[train_file], rows[validation_file])
    ]
    return Task(*parts, labels=labels, name=Path(validation_file).name)


def _read_rows(path: str) -> list[tuple[str, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can not be read as UTF-8 text: {error}") from error
    rows = [(number, line.rsplit("\t", 1)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in rows:
        if len(row) != 2:
            raise InputError(f'{path}, line {number}: a line is "sentence<TAB>label", but here is no tab')
    if rows and tuple(cell.strip().lower() for cell in rows[0][1]) in (("sentence", "label"), ("text", "label")):
        del rows[0]  # the header
    if not rows:
        raise InputError(f"{path} holds no sentence")
    return [(sentence, label.strip()) for _, (sentence, label) in rows]


def pretrain(
    folder: Path, example: ExampleArguments, data_args: DataArguments, model_args: ModelArguments, *, steps: int
) -> dict[str, tuple[str, str]]:
    """Pre-train a new or a given model and export it; return the held-out numbers before and after, by name."""
    args = MaskedLMTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=example.learning_rate,
        warmup_steps=0.1,
        per_device_train_batch_size=example.batch_size,
        per_device_eval_batch_size=example.batch_size,
        eval_on_start=True,
        logging_steps=max(1, steps // 50),
        save_strategy="no",
        seed=example.seed,
    )
    set_seed(example.seed)
    with output_directory(args):
        data = load_data(data_args, model_args, args)
        model = EncoderForPreTraining.from_arguments(model_args, data.tokenizer)
        check_model_fits(model.model, data.tokenizer, block_size=data.block_size)
        trainer = MaskedLMTrainer(
            model,
            args,
            data_collator=DataCollatorForMaskedLM(data.tokenizer, masking=args.masking, seed=args.seed),
            **data.trainer_inputs(),
        )
        run(trainer, (data_args, model_args, args))
    return {name: (before, after) for name, before, after in held_out_rows(trainer.state.log_history)}


def base_checkpoint(folder: Path, example: ExampleArguments) -> str:
    """Return the checkpoint to continue: the named one, or a small model that is pre-trained into `folder`."""
    if example.model_name_or_path is not None:
        path = Path(example.model_name_or_path)
        return str(path.resolve()) if path.exists() else example.model_name_or_path
    docstrings = DataArguments(
        max_corpus_bytes=example.base_corpus_bytes, vocab_size=example.vocab_size, block_size=example.block_size
    )
    sizes = ModelArguments(
        hidden_size=example.hidden_size,
        num_hidden_layers=example.num_hidden_layers,
        num_attention_heads=max(1, example.hidden_size // 64),
        intermediate_size=4 * example.hidden_size,
        max_position_embeddings=example.block_size,
    )
    pretrain(folder, example, docstrings, sizes, steps=example.base_steps)
    return str(folder)


def fine_tune(checkpoint: str, folder: Path, example: ExampleArguments, task: Task) -> float:
    """Fine-tune a classifier with the stock Trainer, and return its accuracy on the validation set."""
    from hf_pretrain.evaluation.metrics import Accuracy

    set_seed(example.seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    names = {"id2label": dict(enumerate(task.labels)), "label2id": {name: i for i, name in enumerate(task.labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=len(task.labels), **names)

    def encode(rows: Mapping[str, Any]) -> Mapping[str, Any]:
        return tokenizer(rows["sentence"], truncation=True, max_length=example.block_size)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = prediction.predictions.argmax(axis=-1)
        return Accuracy(keep_in_memory=True).compute(predictions=predicted, references=prediction.label_ids)

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=example.finetuning_epochs,
            learning_rate=example.finetuning_learning_rate,
            warmup_steps=0.1,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            save_strategy="no",
            seed=example.seed,
        ),
        train_dataset=task.train.map(encode, batched=True, remove_columns="sentence"),
        eval_dataset=task.validation.map(encode, batched=True, remove_columns="sentence"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()["eval_accuracy"]


def write_card(
    folder: Path,
    example: ExampleArguments,
    task: Task,
    accuracies: dict[str, float],
    losses: dict[str, tuple[str, str]],
) -> None:
    """Write the classifier's card: its origin and the measured numbers."""
    base = example.model_name_or_path
    on_hub = base is not None and not Path(base).exists()
    if base is None:
        base_name = "a small BERT, pre-trained from scratch on the docstrings of the installed Python packages"
    else:
        base_name = (
            f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`, a local checkpoint"
        )
    accuracy = EvalResult(
        task_type="text-classification",
        dataset_type="text",
        dataset_name=task.name,
        metric_type="accuracy",
        metric_value=accuracies["continued"],
    )
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hf_pretrain", "generated_from_trainer"],
        base_model=base if on_hub else None,
        model_name=folder.name,
        eval_results=[accuracy],
    )
    before, after = losses["mlm_loss"]
    text = f"""\
---
{metadata.to_yaml()}
---

# {folder.name}

Tells {", ".join(task.labels)} apart. Base model: {base_name}.

Its pre-training was continued with `hf_pretrain`: {example.adaptation_steps} steps of masked language modelling on
{", ".join(Path(path).name for path in example.train_file)} took the loss on held-out text from {before} to {after}. Then it
was fine-tuned on {len(task.train)} sentences.

Accuracy on the {len(task.validation)} sentences of {task.name}, seed {example.seed}, with the same fine-tuning:

| Fine-tuned from | Accuracy |
|---|---|
| the base model | {accuracies["base"]:.4f} |
| the base model, continued (this model) | {accuracies["continued"]:.4f} |

```python
from transformers import pipeline

classify = pipeline("text-classification", model=".")
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the example from the command line; see the top of the file."""
    (example,) = parse_arguments((ExampleArguments,), argv, prog=Path(__file__).name, description=__doc__ or "")
    folder = Path(example.output_dir).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"output_dir={example.output_dir!r} is in use: name another")
    task = read_task(example.task_train, example.task_validation)

    base = base_checkpoint(folder / "base", example)
    own_text = DataArguments(
        train_file=example.train_file, document_separator=example.document_separator, block_size=example.block_size
    )
    continued = ModelArguments(model_name_or_path=base)
    losses = pretrain(folder / "continued", example, own_text, continued, steps=example.adaptation_steps)

    accuracies = {
        "base": fine_tune(base, folder / "classifier-of-the-base", example, task),
        "continued": fine_tune(str(folder / "continued"), folder / "classifier", example, task),
    }
    write_card(folder / "classifier", example, task, accuracies, losses)
    print("\nAccuracy after fine-tuning:")
    print_table([(name, f"{value:.4f}") for name, value in accuracies.items()], header=("from", task.name))
    print(f"\nclassifier  {folder / 'classifier'}\nmodel card  {folder / 'classifier' / 'README.md'}")


if __name__ == "__main__":
    sys.exit(run_program(main))
