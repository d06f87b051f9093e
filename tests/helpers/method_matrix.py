"""Tiny models, data and runs of any method, for the tests that every method has to pass."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "token_deletion"))
os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")

from dataclasses import fields, replace
from functools import cache
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from token_deletion.trainer import METHOD as EXAMPLE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_pretrain.cli import METHODS
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.tasks.data import TaskDataArguments

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = 60
BLOCK_SIZE = 24
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
# A quiet run: fp32, one step, no clipping, no output.
QUIET = {
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "max_steps": 1,
    "eval_on_start": False,
    "report_to": [],
}
NO_DROPOUT = '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'
# Architectures with other names for it.
NO_DROPOUT_OF = {
    "xlnet": '{"dropout": 0.0}',
    "bart": '{"dropout": 0.0}',
    "elmo": '{"hidden_dropout_prob": 0.0, "filters": [[1, 16], [2, 16]], "character_embedding_size": 8}',
    "gpt2": '{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}',
}


def programs():
    """All methods of this library, by name."""
    return {name: listed.load(name) for name, listed in METHODS.items()}


def all_programs():
    """The same, and behind them the method of the example package."""
    return programs() | {EXAMPLE.name: EXAMPLE}


def tiny_tokenizer():
    """Words w0, w1, ... by white space, with BERT's special tokens."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIALS, *(f"w{i}" for i in range(VOCAB_SIZE - len(SPECIALS)))])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=BLOCK_SIZE, **names)


def tiny_examples(count, *, seed, text="repeats"):
    """Sequences of 3 to BLOCK_SIZE tokens; their words are all the same, or count to three again and again."""
    keys = draws.row_keys(range(count), seed=seed, stream="tiny")
    numbers = draws.integers(keys, 2, high=2**30)
    examples = []
    for length, start in numbers.tolist():
        words = torch.full((1 + length % (BLOCK_SIZE - 2),), start % 11 * 5)
        if text == "counts":
            words = (words + torch.arange(len(words))) % 3
        words += len(SPECIALS)
        columns = {
            "word_starts": [True] * (len(words) + 2),
            "sent_starts": [i % 3 == 1 for i in range(len(words) + 2)],
        }
        examples.append({"input_ids": [2, *words.tolist(), 3], **columns})
    return Dataset.from_list(examples)


def tiny_documents(examples):
    """The same words as documents, in sentences of three."""
    ids = [row[1:-1] for row in examples["input_ids"]]
    columns = {
        "input_ids": ids,
        "word_starts": [[True] * len(row) for row in ids],
        "sent_starts": [[i % 3 == 0 for i in range(len(row))] for row in ids],
        "doc_id": list(range(len(ids))),
    }
    return Dataset.from_dict(columns, features=DOCUMENT_FEATURES)


@cache
def _tiny_part(count, *, seed, text):
    """Examples, and the same as documents: data sets, which nobody changes."""
    examples = tiny_examples(count, seed=seed, text=text)
    return examples, tiny_documents(examples)


def tiny_data(train=96, held_out=13, *, text="repeats"):
    """What `prepare_data` returns, made in the process."""
    examples, documents = _tiny_part(train, seed=1, text=text)
    held_out_examples, held_out_documents = _tiny_part(held_out, seed=2, text=text)
    return PreparedData(
        tokenizer=tiny_tokenizer(),
        train_dataset=EpochDataset(examples),
        eval_dataset=EpochDataset(held_out_examples),
        description={"source": "tiny"},
        block_size=BLOCK_SIZE,
        train_documents=documents,
        eval_documents=held_out_documents,
    )


def isolated(data):
    """The same examples, each of two documents that must not see each other."""

    def halves(row):
        return {"document_ids": [int(2 * i >= len(row["input_ids"])) for i in range(len(row["input_ids"]))]}

    train, held_out = (EpochDataset(part.base.map(halves)) for part in (data.train_dataset, data.eval_dataset))
    description = data.description | {"block_mode": "isolated_documents"}
    return replace(data, train_dataset=train, eval_dataset=held_out, description=description)


def as_task(data):
    """The same examples with labels, which the words tell."""
    parts = [dataset.base for dataset in (data.train_dataset, data.eval_dataset)]
    labelled = [part.add_column("labels", [row[1] % 3 for row in part["input_ids"]]) for part in parts]
    return replace(data, train_dataset=EpochDataset(labelled[0]), eval_dataset=EpochDataset(labelled[1]))


@cache
def tiny_teacher(auto_class):
    """A folder with a teacher of six layers, wider than the tiny models, with large logits; removed in the end.

    Only the first of several ranks writes a model, so call this before the ranks are forked.
    """
    sizes = TINY | {"hidden_size": 48, "num_hidden_layers": 6, "initializer_range": 0.2}
    folder = TemporaryDirectory()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = auto_class.from_config(BertConfig(**sizes, vocab_size=VOCAB_SIZE, num_labels=3))
    model.save_pretrained(folder.name)
    tiny_tokenizer().save_pretrained(folder.name)
    return folder


def teacher_of(program):
    """The checkpoint of a teacher for a program that asks for one, else None."""
    data_class, model_class, _ = program.arguments
    if not known_options(model_class, {"teacher_name_or_path": None}):
        return None
    is_task = issubclass(data_class, TaskDataArguments)
    return tiny_teacher(AutoModelForSequenceClassification if is_task else AutoModelForMaskedLM).name


def data_for(program, data=None):
    """Tiny data, or those that are given, as a program takes them."""
    data = tiny_data() if data is None else data
    return as_task(data) if issubclass(program.arguments[0], TaskDataArguments) else data


def tiny_model_options(program):
    """Options of a tiny model without dropout, and of its teacher where it has one."""
    _, model_class, _ = program.arguments
    sizes = known_options(model_class, TINY | {"teacher_name_or_path": teacher_of(program)} | program.tiny_options)
    return sizes | {
        "config_overrides": NO_DROPOUT_OF.get(getattr(model_class, "model_type", program.name), NO_DROPOUT)
    }


class RecordGradients(TrainerCallback):
    """Keeps the gradients and the log of a run."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def known_options(options_class, values):
    """The values that are options of a dataclass."""
    return {name: value for name, value in values.items() if name in {field.name for field in fields(options_class)}}


def build(program, output_dir, data=None, *, model_options=None, **options):
    """Return a Trainer of a program on tiny data: fp32, quiet, unclipped, no dropout unless told otherwise."""
    _, model_class, args_class = program.arguments
    model_args = model_class(**tiny_model_options(program) | (model_options or {}))
    defaults = QUIET | {"output_dir": str(output_dir)}
    args = args_class(**{**defaults, **known_options(args_class, program.tiny_options), **options})
    torch.manual_seed(args.seed)
    trainer = program.build_trainer(data_for(program, data), model_args, args)
    trainer.recorder = RecordGradients()
    trainer.add_callback(trainer.recorder)
    return trainer


def collate(trainer, examples):
    """Return the batch without the numbers of lanes, which only the Trainer takes."""
    batch = trainer.data_collator(examples)
    return {name: value for name, value in batch.items() if name != "lanes"}


def forward_in_order(trainer, dataset):
    """Yield the model's outputs over a dataset: at once, or where it has lanes, of all lanes for one time step after another.

    The memory is handed on by hand, to compare with what a Trainer makes of it.
    """
    size = getattr(dataset.base, "num_lanes", len(dataset))
    memory = {}
    for start in range(0, len(dataset), size):
        batch = collate(trainer, [dataset[start + i] for i in range(size)])
        output = trainer.model(**batch, **memory)
        memory = {} if output.memory is None else {"memory": output.memory}
        yield output


def log_of(trainer):
    """The log without values that depend on the machine."""
    volatile = ("per_second", "runtime", "peak_memory_mib", "flos", "preparation_time", "train_loss")
    return [
        {k: v for k, v in row.items() if not any(name in k for name in volatile)} for row in trainer.state.log_history
    ]


def step_rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def eval_rows(trainer, name="eval_loss"):
    return [row for row in trainer.state.log_history if name in row]


def record_batches(trainer):
    """Keep every batch that the collator makes for training; the loader is up to one batch ahead of the model."""
    batches, original = [], trainer.data_collator

    def collate(examples):
        batches.append(original(examples))
        return batches[-1]

    trainer.data_collator = collate
    return batches


def relative_difference(a, b):
    """Largest difference of two dictionaries of tensors, relative to the largest entry."""
    assert a.keys() == b.keys()
    scale = max(float(v.abs().max()) for v in a.values())
    return max(float((a[k] - b[k]).abs().max()) for k in a) / scale
