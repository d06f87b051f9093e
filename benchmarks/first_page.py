"""The two measurements of the first page of the docs: a batch in pieces, and a checkpoint under other names.

    python benchmarks/first_page.py

`accumulation` gives one batch of 8 examples to the stock Trainer and to `MaskedLMTrainer`, whole and in 2, 4 and 8 pieces. Model,
masks and learning rate (0) are the same, so loss and gradient should be the same too. `export` trains a small ModernBERT on
docstrings and opens the export with transformers alone. Then it opens two copies with a usual mistake of a conversion:
the layers under another name, and the rotary base of the local layers as the research code writes it (-1).
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_pretrain import (
    DataCollatorForMaskedLM,
    EncoderForPreTraining,
    MaskedLMTrainer,
    MaskedLMTrainingArguments,
    train_tokenizer,
)
from hf_pretrain.cli import main as hf_pretrain
from hf_pretrain.training.program import print_table

SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))
QUIET: dict[str, Any] = {
    "learning_rate": 0.0,
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
}
QUIET |= {"use_cpu": True, "bf16": False}


def fresh_model(vocab_size: int) -> BertForMaskedLM:
    """Return a small BERT without dropout, the same each time."""
    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertForMaskedLM(
        BertConfig(vocab_size=vocab_size, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes)
    )


def accumulation(folder: Path) -> None:
    """Print loss and norm of the gradient of one batch, in pieces."""
    texts = ["The model reads a text and finds the hidden words again. " * n for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    tokenizer = train_tokenizer(texts * 20, vocab_size=120)
    examples = [{**tokenizer(text), "example_id": i, "epoch": 0} for i, text in enumerate(texts)]
    collator = DataCollatorForMaskedLM(tokenizer, seed=0)
    masked = collator([dict(example, word_starts=[True] * len(example["input_ids"])) for example in examples])
    stock_rows = Dataset.from_dict({k: masked[k].tolist() for k in ("input_ids", "attention_mask", "labels")})
    our_rows = Dataset.from_list(
        [{"input_ids": e["input_ids"], "word_starts": [True] * len(e["input_ids"])} for e in examples]
    )
    rows = []
    for size, pieces in SPLITS:
        split: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces, **QUIET}
        stock = Trainer(
            fresh_model(len(tokenizer)),
            TrainingArguments(output_dir=str(folder / "stock"), **split),
            train_dataset=stock_rows,
        )
        stock.train()
        ours = MaskedLMTrainer(
            EncoderForPreTraining.from_model(fresh_model(len(tokenizer))),
            MaskedLMTrainingArguments(output_dir=str(folder / f"ours-{size}"), eval_on_start=False, **split),
            train_dataset=our_rows,
            data_collator=collator,
            processing_class=tokenizer,
        )
        ours.train()
        found = [next(row for row in t.state.log_history if "grad_norm" in row) for t in (stock, ours)]
        rows.append((f"{size} x {pieces}", *(f"{row[name]:.4f}" for row in found for name in ("loss", "grad_norm"))))
    header = ("batch x pieces", "stock loss", "stock gradient", "our loss", "our gradient")
    print_table(rows, header=header)


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the loss of a batch."""
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def export(folder: Path) -> None:
    """Print the loss of a batch by an export, and by copies of it with a mistake."""
    out = folder / "modernbert"
    options = {
        "model_type": "modernbert", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128,
        "demo_corpus": True, "max_corpus_bytes": 2_000_000, "vocab_size": 2000, "block_size": 64, "max_steps": 1500,
        "learning_rate": 2e-3,
        "warmup_steps": 20, "per_device_train_batch_size": 16, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "output_dir": out,
    }  # fmt: skip
    status = hf_pretrain(["mlm", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    assert status == 0
    model, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    print(f"missing keys {len(info['missing_keys'])}, unexpected keys {len(info['unexpected_keys'])}")

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (__doc__ or "").split("\n\n") * 8
    batch = dict(tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=64))
    batch.pop("token_type_ids", None)
    torch.manual_seed(0)
    hidden = (torch.rand(batch["input_ids"].shape) < 0.15) & (batch["attention_mask"] == 1)
    batch["labels"] = torch.where(hidden, batch["input_ids"], -100)
    batch["input_ids"] = torch.where(hidden, torch.tensor(tokenizer.mask_token_id), batch["input_ids"])
    rows = [("the export", f"{loss_of(model, batch):.3f}")]

    renamed = folder / "renamed"
    shutil.copytree(out, renamed)
    weights = load_file(renamed / "model.safetensors")
    weights = {name.replace("model.layers.", "bert.encoder.layers."): value for name, value in weights.items()}
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})
    set_seed(0)
    rows.append(
        ("its layers under another name", f"{loss_of(AutoModelForMaskedLM.from_pretrained(renamed), batch):.3f}")
    )

    rotary = folder / "rotary"
    shutil.copytree(out, rotary)
    config = json.loads((rotary / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = -1
    (rotary / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows.append(("a rotary base of -1", f"{loss_of(AutoModelForMaskedLM.from_pretrained(rotary), batch):.3f}"))
    print_table(rows, header=("checkpoint", "loss"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        accumulation(Path(name))
        export(Path(name))
