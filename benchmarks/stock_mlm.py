"""The recipe of transformers' `run_mlm.py`, written anew from its documentation: the stock side of whole_program.py.

    python benchmarks/stock_mlm.py --train_file t.txt --validation_file v.txt --tokenizer_name tok --output_dir out

Lines of text are tokenized and joined into full blocks by `datasets.map`, `DataCollatorForLanguageModeling` masks them, the
stock `Trainer` trains a BERT and evaluates it with the accuracy on the masked tokens, and the model is saved. Nothing of this
library is imported. The lines that begin with `data`, `plan` and `tokens` are for whole_program.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class StockArguments:
    """Text, tokenizer and sizes; a head of attention for every 64 of the width."""

    train_file: str
    validation_file: str
    tokenizer_name: str
    max_seq_length: int = field(default=128)
    hidden_size: int = field(default=256)
    num_hidden_layers: int = field(default=4)


def blocks_of_files(args: StockArguments, tokenizer: PreTrainedTokenizerBase) -> datasets.DatasetDict:
    """Tokenize all lines, join those of a batch of lines, and cut them into blocks; the rest of a batch is dropped."""
    size = args.max_seq_length

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(itertools.chain(*lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // size * size
        return {name: [flat[low : low + size] for low in range(0, end, size)] for name, flat in joined.items()}

    files = {"train": args.train_file, "validation": args.validation_file}
    texts = datasets.load_dataset("text", data_files=files)
    tokenized = texts.map(tokenize, batched=True, remove_columns=["text"])
    return tokenized.map(group_texts, batched=True)


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the most likely token of each position, so that no logits are kept."""
    return logits.argmax(dim=-1)


def masked_accuracy(outputs: EvalPrediction) -> dict[str, float]:
    """Return the share of the masked tokens that were found."""
    predictions, labels = outputs
    is_target = labels != -100
    return {"accuracy": float(np.mean(predictions[is_target] == labels[is_target]))}


def rows_seen(num_rows: int, *, batch_size: int, steps: int) -> int:
    """Return how many rows some steps have: the last batch of an epoch holds what is left."""
    epochs, rest = divmod(steps, -(-num_rows // batch_size))
    return epochs * num_rows + min(rest * batch_size, num_rows)


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and save."""
    args, options = HfArgumentParser((StockArguments, TrainingArguments)).parse_args_into_dataclasses(argv)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    blocks = blocks_of_files(args, tokenizer)
    print("data", blocks["train"].num_rows, flush=True)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=max(1, args.hidden_size // 64),
            intermediate_size=4 * args.hidden_size,
            max_position_embeddings=args.max_seq_length,
        )
    )
    trainer = Trainer(
        model,
        options,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        compute_metrics=masked_accuracy,
        preprocess_logits_for_metrics=most_likely,
    )
    print("plan", options.max_steps, flush=True)
    trainer.train()
    batch_size = options.train_batch_size
    rows = rows_seen(blocks["train"].num_rows, batch_size=batch_size, steps=trainer.state.global_step)
    print("tokens", rows * args.max_seq_length, flush=True)
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
