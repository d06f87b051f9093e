"""Fine-tuning on SST-2's sentences beside the stock Trainer's batches, and the memory of LoRA beside full fine-tuning.

    python benchmarks/fine_tuning_steps.py --data_dir data [--batches 40] [--repeats 5] [--model small base]

Time: one classifier (BERT, 4 layers of width 256), batches of 32, fp32. A step is forward and backward. "stock" is a random order
padded by `DataCollatorWithPadding`, as `Trainer` does by default. "ours" is what `FineTuningTrainer` makes of the same
sentences: examples of about one length in a step. Both see as many sentences, and run in one process, in turn, the best of the
repeats. The batches are made beforehand.

Memory: a step of AdamW on 8 rows of 512 tokens, with adapters of rank 8 on all linear layers or with all weights. "Resident" is
the rise of the peak of the resident set in a forked process, after two steps: the model, gradients, moments and activations.
Large blocks are given back to the system at once (MALLOC_MMAP_THRESHOLD_), because otherwise the peak counts holes between
blocks. "Tensors" is the most bytes of tensors that exist at a time in the same two steps. "LoRA, all kept" computes nothing
twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import datasets
import torch
from torch.utils.data import Sampler
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from hf_pretrain import FineTuningArguments, FineTuningTrainer, train_tokenizer
from hf_pretrain.modeling.observing.profile import peak_of_tensors
from results import read_rows
from timing import as_trained, in_child, interleaved, load_of_machine, options_parser, peak_memory, print_table

VOCABULARY, BATCH_SIZE, LENGTH = 8192, 32, 512
SIZES = {"small": (4, 256), "base": (12, 768)}


def classifier(layers: int, width: int) -> BertForSequenceClassification:
    """Return a BERT for two classes with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes)).train()


def trainer(model: Any, **options: Any) -> FineTuningTrainer:
    """Return a Trainer that writes nothing."""
    datasets_ = {"train_dataset": options.pop("train_dataset", None)}
    args = FineTuningArguments(
        output_dir=tempfile.gettempdir(), report_to="none", per_device_train_batch_size=BATCH_SIZE, **options
    )
    return FineTuningTrainer(model, args, **datasets_)


def batches_of(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the batches of each side, drawn from all of the training data."""
    table = read_rows(args.data_dir, "sst2", "train")
    sentences = table[0].tolist()
    tokenizer = train_tokenizer(sentences, kind="wordpiece", vocab_size=VOCABULARY, lowercase=True)
    ids = tokenizer(sentences, truncation=True, max_length=LENGTH)["input_ids"]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": table[1].astype(int).tolist()})
    order = list(cast(Sampler, trainer(classifier(1, 64), train_dataset=rows)._get_train_sampler()))
    random = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    pad = DataCollatorWithPadding(tokenizer)
    firsts = range(0, args.batches * BATCH_SIZE, BATCH_SIZE)
    return {
        name: [dict(pad([rows[row] for row in numbers[first : first + BATCH_SIZE]])) for first in firsts]
        for name, numbers in (("stock", random), ("ours", order))
    }


def passes(model: torch.nn.Module, batches: list[Any], *, side: str) -> Callable[[], None]:
    """Return what does a forward and a backward for each batch of a side."""

    def run() -> None:
        for batch in batches:
            with as_trained(side):
                model(**batch).loss.backward()
            model.zero_grad()

    return run


def two_steps(strategy: str, sizes: tuple[int, int], is_checkpointed: bool, keeps_all: bool) -> None:
    """Make a model and take two steps of AdamW, of 8 rows of 512 tokens; in the second, the moments are there."""
    tuned = trainer(classifier(*sizes), strategy=strategy)
    if keeps_all:
        tuned._recomputes = lambda: False  # type: ignore[method-assign]
    ids = torch.randint(0, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    if is_checkpointed:
        tuned.model.activation_checkpointing_enable()
    tuned.create_optimizer()
    tuned.model.train()
    for _ in range(2):
        with as_trained("ours"):
            tuned.compute_loss(tuned.model, {"input_ids": ids, "labels": torch.zeros(8, dtype=torch.long)}).backward()
        tuned.optimizer.step()
        tuned.optimizer.zero_grad()


def memory(names: list[str]) -> None:
    """Print how much memory a step takes, for models by name, with all activations kept or with checkpoints."""
    rows: list[list[object]] = []
    sides = {"full": ("full", False), "LoRA": ("lora", False), "LoRA, all kept": ("lora", True)}
    for name in names:
        for is_checkpointed in (False, True):
            first = None
            for side, (strategy, keeps_all) in sides.items():
                if is_checkpointed and keeps_all:
                    continue
                run = partial(two_steps, strategy, SIZES[name], is_checkpointed, keeps_all)
                found = (peak_memory(run), in_child(partial(peak_of_tensors, run)) / 2**20)
                first = first or found
                kept = "recomputed" if is_checkpointed else "kept"
                rows.append(
                    [name, kept, side, *found, *(mine / full for mine, full in zip(found, first, strict=True))]
                )
    print_table(rows, ["Model", "Layers", "Strategy", "Resident, MiB", "Tensors, MiB", "Of full", "Of full, tensors"])


def main() -> None:
    """Print the tables."""
    parser = options_parser(__doc__, batches=40, repeats=5)
    parser.add_argument("--data_dir", default="data", help="folder with sst2/train.tsv")
    parser.add_argument(
        "--model", nargs="*", default=["small", "base"], choices=list(SIZES), help="models of the memory"
    )
    parser.add_argument("--memory_only", action="store_true", help="measure no time")
    args = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    print(load_of_machine())
    # Memory first: a child of a process that has freed memory would use that unseen.
    memory(args.model)
    if args.memory_only:
        return
    batches = batches_of(args)
    model = classifier(*SIZES["small"])
    best = interleaved({name: passes(model, some, side=name) for name, some in batches.items()}, args.repeats)
    counts = {name: [batch["attention_mask"] for batch in some] for name, some in batches.items()}
    columns = {name: sum(mask.numel() for mask in masks) for name, masks in counts.items()}
    real = {name: sum(int(mask.sum()) for mask in masks) for name, masks in counts.items()}
    rows: list[list[Any]] = [
        [name, best[name] / args.batches * 1e3, real[name] / columns[name], real[name] / best[name]] for name in best
    ]
    print_table(rows, ["SST-2, a step of 32", "ms", "real tokens", "tokens/s"])
    print(f"Speed-up: {best['stock'] / best['ours']:.2f} a step, {rows[1][3] / rows[0][3]:.2f} a token")


if __name__ == "__main__":
    main()
