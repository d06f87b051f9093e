"""Tiny models, data and runs of any method, for the tests that every method has to pass."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")

from importlib import import_module

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainerCallback

from hf_pretrain.cli import METHODS
from hf_pretrain.data import draws
from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.prepare import PreparedData

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
NO_DROPOUT = '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'


def programs():
    """All methods of the command line, as their modules."""
    return {name: import_module(module) for name, (module, _) in METHODS.items()}


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


def tiny_examples(count, *, seed):
    """Sequences of 3 to BLOCK_SIZE tokens, each one word over and over, so that context tells everything."""
    keys = draws.row_keys(range(count), seed=seed, stream="tiny")
    numbers = draws.integers(keys, 2, high=2**30)
    examples = []
    for length, start in numbers.tolist():
        words = torch.full((1 + length % (BLOCK_SIZE - 2),), start % 11 * 5 + len(SPECIALS))
        examples.append({"input_ids": [2, *words.tolist(), 3], "word_starts": [True] * (len(words) + 2)})
    return Dataset.from_list(examples)


def tiny_data(train=96, held_out=13):
    """What `prepare_data` returns, made in the process."""
    return PreparedData(
        tokenizer=tiny_tokenizer(),
        train_dataset=EpochDataset(tiny_examples(train, seed=1)),
        eval_dataset=EpochDataset(tiny_examples(held_out, seed=2)),
        description={"source": "tiny"},
        block_size=BLOCK_SIZE,
    )


class RecordGradients(TrainerCallback):
    """Keeps the gradients and the log of a run."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def build(program, output_dir, data=None, *, model_options=None, **options):
    """Return a Trainer of a program on tiny data: fp32, quiet, unclipped, no dropout unless told otherwise."""
    _, model_class, args_class = program.ARGUMENTS
    model_args = model_class(**{**TINY, "config_overrides": NO_DROPOUT, **(model_options or {})})
    defaults = {
        "output_dir": str(output_dir),
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
    args = args_class(**{**defaults, **options})
    torch.manual_seed(args.seed)
    trainer = program.build_trainer(tiny_data() if data is None else data, model_args, args)
    trainer.recorder = RecordGradients()
    trainer.add_callback(trainer.recorder)
    return trainer


def log_of(trainer):
    """The log without what depends on the machine."""
    volatile = ("per_second", "runtime", "peak_memory_mib", "flos", "preparation_time", "train_loss")
    return [
        {k: v for k, v in row.items() if not any(name in k for name in volatile)} for row in trainer.state.log_history
    ]


def relative_difference(a, b):
    """Largest difference of two dictionaries of tensors, relative to the largest entry."""
    assert a.keys() == b.keys()
    scale = max(float(v.abs().max()) for v in a.values())
    return max(float((a[k] - b[k]).abs().max()) for k in a) / scale
