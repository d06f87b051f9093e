"""Small fine-tunings under every strategy: models, examples, and what moved in them."""

import torch
from datasets import Dataset
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    TrainerCallback,
    XLNetConfig,
)

from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer

SMALL = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "pad_token_id": 0,
    "num_labels": 3,
}
OF_MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),
    "modernbert": ModernBertConfig(**SMALL, **OF_MODERN, attn_implementation="eager"),
    "distilbert": DistilBertConfig(
        vocab_size=40, dim=8, n_layers=3, n_heads=2, hidden_dim=8, pad_token_id=0, num_labels=3
    ),
    "electra": ElectraConfig(**SMALL, embedding_size=4),
    "albert": AlbertConfig(**SMALL, embedding_size=4),
    "deberta": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "xlnet": XLNetConfig(vocab_size=40, d_model=8, n_layer=3, n_head=2, d_inner=8, num_labels=3),
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def examples(count=24):
    """Rows of 3 to 9 tokens, of three classes that can be told from the first token."""
    rows = [[3 + (7 * i + 5 * j) % 37 for j in range(3 + i % 7)] for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": [row[0] % 3 for row in rows]})


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def classifier(name="bert", **sizes):
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), **sizes})
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


DEFAULTS = {
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 0,
    "seed": 5,
}


def arguments(folder, **options):
    return FineTuningArguments(**{"output_dir": str(folder), **DEFAULTS, **options})


def fine_tuner(folder, model=None, *, callbacks=(), train=None, **options):
    """Return a Trainer; by default of a BERT of three layers and 24 examples, three steps an epoch."""
    return FineTuningTrainer(
        classifier() if model is None else model,
        arguments(folder, **options),
        train_dataset=examples() if train is None else train,
        data_collator=collate,
        callbacks=list(callbacks),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, after):
    """Names of parameters that are not the same to the bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


class Weights(TrainerCallback):
    """Keeps the weights at the beginning and after each epoch."""

    def __init__(self):
        self.kept = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.kept.append(weights(model))

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.kept.append(weights(model))

    def moved(self):
        """Names of the parameters that moved in each epoch."""
        return [moved(a, b) for a, b in zip(self.kept, self.kept[1:], strict=False)]


class Rates(TrainerCallback):
    """Keeps the learning rate of each group at each step, as the optimizer uses it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.steps.append([(group.get("name"), group["lr"]) for group in optimizer.param_groups])
