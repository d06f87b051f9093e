"""A toy model with a memory, lanes of text to train it on, and a run on two ranks that writes down what it saw."""

import json
import os

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback

from helpers.method_matrix import RecordGradients, log_of, tiny_tokenizer
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, RecurrentMemory
from hf_pretrain.objectives.recurrence import RecurrentTrainer
from hf_pretrain.objectives.recurrent_lm.trainer import DataCollatorForRecurrentLM
from hf_pretrain.training.arguments import PretrainingArguments

VOCAB_SIZE = 60
MEMORY_SIZE = 6


def documents(lengths, *, first=5, vocab_size=VOCAB_SIZE):
    """Documents whose tokens count upwards through the whole text, so that a gap shows."""
    rows, number = [], 0
    for length in lengths:
        ids = [first + (number + i) % (vocab_size - first) for i in range(length)]
        starts = [i % 3 == 0 for i in range(length)]
        rows.append({"input_ids": ids, "word_starts": [True] * length, "sent_starts": starts, "doc_id": len(rows)})
        number += length
    return datasets.Dataset.from_list(rows, features=DOCUMENT_FEATURES)


class ToyRecurrentModel(PretrainingModel):
    """One layer of causal attention without positions, over the memory and the window."""

    config_class = PreTrainedConfig
    memory_size = MEMORY_SIZE

    def __init__(self, config=None, *, width=16, dropout=0.0):
        super().__init__(config or PreTrainedConfig())
        self.model = nn.Embedding(VOCAB_SIZE, width)
        self.attend, self.head, self.dropout = nn.Linear(width, width), nn.Linear(width, VOCAB_SIZE), dropout
        self.post_init()

    @staticmethod
    def count_targets(batch):
        return {"lm": (batch["labels"] != IGNORED).sum()}

    def forward(self, input_ids, labels, attention_mask=None, memory=None, memory_reset=None):
        hidden = F.dropout(self.model(input_ids), self.dropout, self.training)
        if memory is None:
            memory = RecurrentMemory.empty(1, len(hidden), self.memory_size, hidden.shape[-1], device=hidden.device)
        if memory_reset is not None:
            memory = memory.reset(memory_reset)
        keys = torch.cat([memory.states[0], hidden], dim=1)
        size, length = self.memory_size, hidden.shape[1]
        causal = torch.ones(length, size + length, dtype=torch.bool).tril(diagonal=size)
        visible = torch.cat([memory.mask(), torch.ones_like(input_ids, dtype=torch.bool)], dim=1)
        mask = causal & visible[:, None]
        context = F.scaled_dot_product_attention(self.attend(hidden), keys, keys, attn_mask=mask)
        logits = self.head(hidden + context).transpose(1, 2)
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(1)
        loss = ExampleSum(nll, (labels != IGNORED).sum(1).float())
        return PretrainingOutput(losses={"lm": loss}, metrics={}, memory=memory.append(hidden[None]))


class ToyRecurrentTrainer(RecurrentTrainer):
    objective = ObjectiveDescription(name="toy", title="Toy", description="What comes next?")


class RecordLanes(TrainerCallback):
    """Keeps the tokens that every lane was trained on, in order, and how much memory each window had."""

    def __init__(self, model):
        self.tokens, self.filled = {}, {}
        model.register_forward_pre_hook(self._record, with_kwargs=True)
        self.lanes = None

    def _record(self, module, args, kwargs):
        if not module.training:
            return
        memory, reset = kwargs["memory"], kwargs["memory_reset"]
        for row, lane in enumerate(self.lanes.pop(0)):
            filled = 0 if memory is None or reset[row] else int(memory.lengths[row])
            real = kwargs["attention_mask"][row].bool()
            self.tokens.setdefault(lane, []).extend(kwargs["input_ids"][row][real].tolist())
            self.filled.setdefault(lane, []).append(filled)


def build_toy(output_dir, *, train=None, held_out=None, window=4, lanes=8, dropout=0.0, by_document=False, **options):
    """Return a Trainer of the toy on 8 lanes, by default 6 windows an epoch."""
    tokenizer = tiny_tokenizer()
    train = documents([97, 40, 50]) if train is None else train
    held_out = documents([50, 3]) if held_out is None else held_out
    defaults = {"output_dir": str(output_dir), "bf16": False, "disable_tqdm": True, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "max_grad_norm": 0.0, "warmup_steps": 0, "report_to": [], "max_steps": 1}
    defaults |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "eval_on_start": False}
    args = PretrainingArguments(**(defaults | options))
    torch.manual_seed(0)
    model = ToyRecurrentModel(dropout=dropout)
    streams = {
        name: LaneStream(text, tokenizer=tokenizer, num_lanes=lanes, complete=name == "eval_dataset")
        for name, text in (("train_dataset", train), ("eval_dataset", held_out))
    }
    sets = {n: LaneDataset(s, window=window, reset_at_documents=by_document) for n, s in streams.items()}
    collator = DataCollatorForRecurrentLM()
    trainer = ToyRecurrentTrainer(model, args, data_collator=collator, processing_class=tokenizer, **sets)
    trainer.recorder = RecordGradients()
    trainer.add_callback(trainer.recorder)
    return trainer


def watch_lanes(trainer):
    """Record the lanes of a Trainer: it hides their numbers from the model, so they are taken on the way."""
    seen = RecordLanes(trainer.model)
    seen.lanes = []
    run_model = trainer.run_model

    def run_and_note(model, inputs):
        if model.training:
            seen.lanes.append(inputs["lanes"].tolist())
        return run_model(model, inputs)

    trainer.run_model = run_and_note
    return seen


TWO_RANKS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 9, "save_steps": 1}
TWO_RANKS |= {
    "save_strategy": "steps",
    "learning_rate": 1e-2,
    "dropout": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def main(folder):
    """Train straight and from checkpoints in the middle and at the end of an epoch."""
    rank = int(os.environ["RANK"])
    for stop in (None, 4, 6):
        trainer = build_toy(folder / f"run-{stop}", **TWO_RANKS)
        seen = watch_lanes(trainer)
        checkpoint = None if stop is None else str(folder / "run-None" / f"checkpoint-{stop}")
        trainer.train(resume_from_checkpoint=checkpoint)
        torch.save(trainer.model.state_dict(), folder / f"weights-{stop}-{rank}.pt")
        found = {"log": log_of(trainer), "tokens": seen.tokens, "filled": seen.filled}
        (folder / f"found-{stop}-{rank}.json").write_text(json.dumps(found))
