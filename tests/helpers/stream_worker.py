"""Trains on a stream on each rank, straight on and resumed from the middle, and notes what the rank has read."""

import json
import os

import torch

from helpers.method_matrix import BLOCK_SIZE, build, programs, tiny_data, tiny_tokenizer
from hf_pretrain.data.streaming.blocks import StreamingBlocks

MLM = programs()["mlm"]
# With dropout, whose state must not be disturbed.
OPTIONS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "model_options": {"config_overrides": None},
}


def streamed(folder, **options):
    """Tiny data whose training text is streamed from the files of a folder, in windows of six blocks."""
    data = tiny_data()
    defaults = {"block_size": BLOCK_SIZE, "mode": "tokens", "documents_per_buffer": 2, "shuffle_buffer_size": 5}
    files = sorted(folder.glob("*.txt"))
    data.train_dataset = StreamingBlocks(files, tokenizer=tiny_tokenizer(), **(defaults | options))
    return data


def watch(trainer):
    """Note the epoch and the number of each example that is collated."""
    seen, collate = [], trainer.data_collator

    def watched(examples):
        seen.extend((row["epoch"], row["example_id"]) for row in examples)
        return collate(examples)

    trainer.data_collator = watched
    return seen


def main(folder):
    rank = int(os.environ["RANK"])
    for run, checkpoint in (("straight", None), ("resumed", str(folder / "straight" / "checkpoint-4"))):
        trainer = build(MLM, folder / run, streamed(folder / "text"), **OPTIONS)
        seen = watch(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        torch.save(trainer.model.state_dict(), folder / f"{run}-{rank}.pt")
        (folder / f"{run}-seen-{rank}.json").write_text(json.dumps(seen))
