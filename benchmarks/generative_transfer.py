"""Does the language-model loss help fine-tuning? GPT-1's way with and without it, on SST-2 and RTE.

    python benchmarks/generative_transfer.py --data_dir data [--model_name_or_path gpt] [--arm sst2 sst2_lm] [--seed 0 1]
    python benchmarks/generative_transfer.py --table

    sst2      SST-2, the task's loss alone
    sst2_lm   SST-2, with half of the language-model loss
    rte       RTE, the task's loss alone
    rte_lm    RTE, with half of the language-model loss

Both arms of a task see the same rows in the same order, and begin with the same head. Without `model_name_or_path` the model is a
GPT-2 of four layers of width 128 with fresh weights, whose byte pairs are trained on the task: a floor for a pre-trained one. The
table has the accuracy on the development set and both losses there, the mean over the seeds and its standard deviation.

The folder `data_dir` holds sst2/train.tsv and dev.tsv (sentence, label; no header) and rte/train.tsv and dev.tsv (with a header:
sentence1, sentence2, label). Each run is a row of the file `results`: what is there is not run again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_pretrain import (
    GenerativeTransferArguments,
    GenerativeTransferModel,
    GenerativeTransferTrainer,
    train_tokenizer,
    transform_examples,
)
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.options import option
from hf_pretrain.tasks.files import read_files
from results import Column, ComparisonArguments, compare_arms

COLUMNS = {"sst2": ["sentence"], "rte": ["sentence1", "sentence2"]}
TRANSFORMATIONS: dict[str, Any] = {"sst2": "classification", "rte": "entailment"}
LABELS = {"sst2": {"0": 0, "1": 1}, "rte": {"entailment": 0, "not_entailment": 1}}
ARMS = {f"{task}{ending}": (task, weight) for task in COLUMNS for ending, weight in (("", 0.0), ("_lm", 0.5))}


@dataclass
class TransferArguments(ComparisonArguments):
    """Options of the comparison."""

    arms: ClassVar[tuple[str, ...]] = tuple(ARMS)
    arms_without_text: ClassVar[tuple[str, ...]] = tuple(ARMS)

    results: str = option("generative_transfer.json", "File that each run adds a row to.")
    model_name_or_path: str | None = option(None, "Causal language model; by default a new GPT-2.")
    width: int = option(128, "Width of the new GPT-2.")
    layers: int = option(4, "Layers of the new GPT-2.")
    epochs: float = option(3.0, "Passes over the examples.")
    batch_size: int = option(32, "Examples a step.")
    learning_rate: float = option(6.25e-5, "Peak rate; a new model takes a higher one, such as 1e-3.")
    max_length: int = option(128, "Most tokens of a row.")
    max_examples: int | None = option(None, "Train on a random part of the examples.")


def read_split(args: TransferArguments, task: str, split: str) -> datasets.Dataset:
    """Return the rows of a task, with labels as text."""
    path = Path(args.data_dir, task, f"{split}.tsv")
    if not path.is_file():
        raise InputError(f"data_dir={args.data_dir} has no {task}/{split}.tsv: see --help for what it must hold")
    rows = read_files([str(path)], "sequence-classification", option="data_dir", names=[*COLUMNS[task], "label"])
    if split == "train" and args.max_examples is not None:
        rows = rows.select(draws.permutation(len(rows), seed=0)[: args.max_examples])
    return rows.select_columns([*COLUMNS[task], "label"]).cast_column("label", datasets.Value("string"))


def tokenizer_of(args: TransferArguments, task: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model, or one of the task's texts, which is trained once."""
    if args.model_name_or_path is not None:
        return from_pretrained(AutoTokenizer, args.model_name_or_path)
    folder = args.runs_folder() / f"{task}-tokenizer-{args.vocab_size}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            rows = read_split(args, task, "train")
            texts = [text for name in COLUMNS[task] for text in rows[name]]
            train_tokenizer(texts, kind="bpe", vocab_size=args.vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def language_model(args: TransferArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model to fine-tune."""
    if args.model_name_or_path is not None:
        return from_pretrained(AutoModelForCausalLM, args.model_name_or_path)
    sizes = {"n_embd": args.width, "n_layer": args.layers, "n_head": max(1, args.width // 32)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=args.max_length, **sizes, **ends)
    return from_config(AutoModelForCausalLM, config)


def run_arm(arm: str, seed: int, args: TransferArguments) -> dict[str, Any]:
    """Fine-tune a model and evaluate it."""
    task, weight = ARMS[arm]
    set_seed(seed)
    tokenizer = tokenizer_of(args, task)
    model = GenerativeTransferModel.from_model(
        language_model(args, tokenizer),
        tokenizer,
        transformation=TRANSFORMATIONS[task],
        seed=seed,
        label2id=LABELS[task],
        id2label={number: name for name, number in LABELS[task].items()},
    )
    train, dev = (
        transform_examples(
            read_split(args, task, split),
            tokenizer,
            config=model.config,
            text_columns=COLUMNS[task],
            label_column="label",
            max_length=args.max_length,
        )
        for split in ("train", "dev")
    )
    folder = args.runs_folder() / f"{arm}-{seed}"
    options = args.training(folder, seed, num_train_epochs=args.epochs)
    del options["overwrite_output_dir"], options["eval_on_start"]
    trainer = GenerativeTransferTrainer(
        model,
        GenerativeTransferArguments(**options, lm_loss_weight=weight),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - begin)
    # The language-model loss is measured in both arms, though one does not learn from it.
    trainer.args.lm_loss_weight = 0.5
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    kept = {name: metrics[name] for name in ("accuracy", "matthews_correlation", "task_loss", "lm_loss")}
    return kept | {"seconds": seconds, "steps": trainer.state.global_step, "examples": len(train)}


TABLE = (
    Column("accuracy", "accuracy", 100, 1),
    Column("MCC", "matthews_correlation", 100, 1),
    Column("task loss", "task_loss", 1, 3),
    Column("LM loss", "lm_loss", 1, 3),
    Column("steps", "steps"),
    Column("seconds", "seconds"),
)


if __name__ == "__main__":
    compare_arms(TransferArguments, description=__doc__, run_arm=run_arm, results=TABLE)
