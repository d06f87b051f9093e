"""Contrastive training steps beside sentence-transformers', and what a batch costs that does not fit in memory.

    python benchmarks/contrastive_steps.py [--part steps] [--part caching] [--train_file books.txt] [--batch_size 64 256]

Steps: one BERT reads pairs of neighbouring paragraphs, cut to `sequence_length` tokens, in fp32. All sides have the same weights,
and the loss of one batch without dropout is the same; this is checked first.

    sentence-transformers   its MultipleNegativesRankingLoss: two padded batches, anchors and positives, one after the other
    plain                   the same computation written out; it takes the first place if sentence-transformers is not installed
    ours                    anchors and positives are rows of one batch
    ours, packed            several texts share a row and do not see each other

A step is forward and backward. The collator, which makes the batch of texts or tokens, is timed by itself: sentence-transformers
tokenizes in every step, ours reads tokens.

Caching: a step of `cached_batch` pairs in micro-batches of `micro_batch`, by the Trainer, from its first batch to its last
gradient. With the cache of gradients all texts of the step are compared with each other; without it, those of a micro-batch.
Beside them is sentence-transformers' CachedMultipleNegativesRankingLoss.

All sides run in turn, in one process; the best of the repeats counts. Peak memory is how much the resident set rises during the
first step, each side in a process of its own. Paragraphs are those of the docstrings on this machine, or the lines of a file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.nn.functional as F  # noqa: N812
from denoising import paragraphs
from training_steps import mean_loss, rise_of_memory
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, TrainerCallback

from hf_pretrain import train_tokenizer
from hf_pretrain.evaluation.metrics import encode_texts
from hf_pretrain.modeling.loading import quiet
from hf_pretrain.modeling.losses import PretrainingOutput
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.objectives.contrastive import (
    ContrastiveForPreTraining,
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    DataCollatorForContrastive,
)
from hf_pretrain.training.trainer import PretrainingTrainer
from timing import as_trained, interleaved, load_of_machine, options_parser, print_table

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    THEIRS = "sentence-transformers"
except ImportError:
    THEIRS = ""

STEPS = tuple(name for name in (THEIRS, "plain", "ours", "ours, packed") if name)
CACHED = "ours, cached"
CACHING = tuple(name for name in ("ours, plain accumulation", CACHED, THEIRS and f"{THEIRS}, cached") if name)
# Cosines are divided by it: 20 in terms of a scale.
TEMPERATURE = 0.05
# A shorter paragraph is often a heading or a list of names.
LEAST_CHARACTERS = 40

Batch = dict[str, Any]
Sides = dict[str, Callable[[], Any]]


class Material:
    """Pairs of neighbouring paragraphs, of texts and of tokens.

    Args:
        args: Options of the program.
        num_pairs: Pairs; the paragraphs come again if there are too few.
    """

    def __init__(self, args: argparse.Namespace, num_pairs: int) -> None:
        found = (" ".join(text.split()) for text in paragraphs(args.train_file))
        # Equal texts would be nobody's negatives on our side, and everybody's on the other.
        texts = list(dict.fromkeys(text for text in itertools.islice(found, 60_000) if len(text) >= LEAST_CHARACTERS))
        self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts[:20_000], vocab_size=args.vocab_size)
        self.tokenizer.model_max_length = self.length = args.sequence_length
        if len(texts) < 2 * num_pairs:
            raise SystemExit(f"{len(texts)} paragraphs are too few for {num_pairs} pairs: give a longer train_file")
        self.texts = texts[: 2 * num_pairs]
        self.ids = encode_texts(self.tokenizer, self.texts, truncation=True, max_length=self.length)["input_ids"]

    def examples(self, begin: int, count: int) -> list[dict[str, Any]]:
        """Return pairs as examples of our collator."""
        return [
            {
                "texts": [{"input_ids": self.ids[2 * number + role]} for role in (0, 1)],
                "document": number,
                "example_id": number,
                "epoch": 0,
            }
            for number in range(begin, begin + count)
        ]

    def columns(self, begin: int, count: int) -> tuple[list[str], list[str]]:
        """Return pairs as texts: anchors and positives."""
        chosen = self.texts[2 * begin : 2 * (begin + count)]
        return chosen[::2], chosen[1::2]


def make_encoder(args: argparse.Namespace, *, dropout: float = 0.1) -> BertModel:
    """Return the stock encoder; the same weights in each process."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        intermediate_size=4 * args.hidden_size,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False).train()


# Our side. What the method's classes are called with is here alone.


def our_model(encoder: BertModel, length: int) -> ContrastiveForPreTraining:
    """Return our model around a stock encoder."""
    return ContrastiveForPreTraining.from_model(
        encoder, loss="infonce", similarity="cosine", temperature=TEMPERATURE, pooling="mean", max_length=length
    )


def our_collator(material: Material, *, packed: bool) -> DataCollatorForContrastive:
    """Return our collator."""
    return DataCollatorForContrastive(material.tokenizer, objective="contrastive", packed=packed)


def our_loss(model: ContrastiveForPreTraining, batch: Batch) -> torch.Tensor:
    """Return the mean loss of a batch."""
    return mean_loss(model(**batch), {"contrastive": 1.0})


# Their side


class Theirs(NamedTuple):
    """sentence-transformers around an encoder, which it trains in place."""

    model: Any
    loss: Callable[..., torch.Tensor]

    @classmethod
    def around(cls, encoder: BertModel, material: Material, *, micro_batch: int | None = None) -> Theirs:
        """Let it open a folder, and put the encoder in; with `micro_batch` the loss is the one that caches gradients."""
        with tempfile.TemporaryDirectory() as folder:
            encoder.save_pretrained(folder)
            material.tokenizer.save_pretrained(folder)
            modules = SentenceModules({"pooling_mode_mean_tokens": True})
            modules.write(Path(folder), hidden_size=encoder.config.hidden_size, longest=material.length)
            # The encoder has no layer behind its first state, which transformers has a table of warnings for.
            with quiet():
                model = SentenceTransformer(folder, device="cpu")
        # The weights are shared from here on.
        model[0].model = encoder
        if micro_batch is None:
            return cls(model, MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE))
        return cls(
            model, CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=micro_batch)
        )

    def batch(self, columns: Sequence[list[str]]) -> list[Batch]:
        """Tokenize the columns, each by itself, as its collator does."""
        return [self.model.preprocess(texts) for texts in columns]

    def mean_loss(self, batch: Sequence[Batch]) -> torch.Tensor:
        """Return the loss of a batch, whose dicts it writes into."""
        return self.loss([dict(side) for side in batch], None)


def plain_batch(material: Material, columns: Sequence[list[str]]) -> list[Batch]:
    """Tokenize the columns, each by itself."""
    options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    return [dict(material.tokenizer(texts, max_length=material.length, **options)) for texts in columns]


def plain_loss(encoder: BertModel, batch: Sequence[Batch]) -> torch.Tensor:
    """Return the loss of MultipleNegativesRankingLoss, written out: each anchor chooses among all positives."""
    anchors, positives = (
        F.normalize(SentenceModules().vectors(encoder(**side).last_hidden_state, side["attention_mask"]), dim=-1)
        for side in batch
    )
    return F.cross_entropy(anchors @ positives.T / TEMPERATURE, torch.arange(len(anchors)))


# Steps


def collators(args: argparse.Namespace, material: Material, size: int, encoder: BertModel) -> Sides:
    """Return what makes the batch of each side."""
    columns, examples = material.columns(0, size), material.examples(0, size)
    found: Sides = {}
    if THEIRS:
        found[THEIRS] = functools.partial(Theirs.around(encoder, material).batch, columns)
    found["plain"] = functools.partial(plain_batch, material, columns)
    found["ours"] = functools.partial(our_collator(material, packed=False), examples)
    found["ours, packed"] = functools.partial(our_collator(material, packed=True), examples)
    return found


def losses(material: Material, encoder: BertModel, batches: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the loss of each side on its batch; all sides share the weights."""
    ours = our_model(encoder, material.length)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, batch in batches.items():
        if name == THEIRS:
            found[name] = functools.partial(Theirs.around(encoder, material).mean_loss, batch)
        elif name == "plain":
            found[name] = functools.partial(plain_loss, encoder, batch)
        else:
            found[name] = functools.partial(our_loss, ours, batch)
    return found


def steps_of(found: dict[str, Callable[[], torch.Tensor]]) -> Sides:
    """Return forward and backward of each loss."""

    def step(side: str, loss: Callable[[], torch.Tensor]) -> None:
        with as_trained(side):
            loss().backward()

    return {name: functools.partial(step, name, loss) for name, loss in found.items()}


@torch.no_grad()
def check_losses(args: argparse.Namespace, material: Material, size: int) -> None:
    """Refuse to measure sides whose losses differ on one batch, without dropout."""
    encoder = make_encoder(args, dropout=0.0)
    batches = {name: collate() for name, collate in collators(args, material, size, encoder).items()}
    values = {name: float(loss()) for name, loss in losses(material, encoder, batches).items()}
    assert max(values.values()) - min(values.values()) < 1e-4 * values["plain"], values


def fill(batch: Any) -> str:
    """Return the shapes of a batch and the share that holds tokens."""
    masks = [side["attention_mask"] for side in (batch if isinstance(batch, list) else [batch])]
    shapes = " + ".join(f"{len(mask)} x {mask.shape[1]}" for mask in masks)
    return f"{shapes} ({100 * sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks):.0f} %)"


def measure_steps(args: argparse.Namespace) -> None:
    """Print a table a size of the batch, with one row a side."""
    material = Material(args, max(args.batch_size))
    for size in args.batch_size:
        memory = {side: memory_of("steps", side, size) for side in STEPS}
        check_losses(args, material, size)
        encoder = make_encoder(args)
        collating = collators(args, material, size, encoder)
        batches = {name: collate() for name, collate in collating.items()}
        seconds = interleaved(steps_of(losses(material, encoder, batches)), args.repeats)
        collator_seconds = interleaved(collating, 4 * args.repeats, turn_seconds=0.05)
        total = {name: seconds[name] + collator_seconds[name] for name in STEPS}
        print(f"\nbatches of {size} pairs; {setting(args)}")
        rows = [
            [
                name,
                fill(batches[name]),
                1e3 * collator_seconds[name],
                f"{1e3 * seconds[name]:.0f}",
                f"{total[STEPS[0]] / total[name]:.2f}",
                f"{memory[name]:.0f}",
                f"{memory[name] / memory[STEPS[0]]:.2f}",
            ]
            for name in STEPS
        ]
        print_table(rows, ["side", "rows", "collator, ms", "step, ms", "speed-up", "MiB", "memory"])


# Caching


class PlainAccumulation(ContrastiveTrainer):
    """Compares the texts of a micro-batch with each other alone, and needs no cache."""

    def run_model(self, model: torch.nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Return the losses of a micro-batch as any other method does."""
        return PretrainingTrainer.run_model(self, model, inputs)


class StepClock(TrainerCallback):
    """Measures the steps of a Trainer, from the first micro-batch to the last gradient: the best in seconds, and of the CPU's."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = math.inf, math.inf
        self._begin = self._cpu_begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the best step."""
        self.seconds = min(self.seconds, time.perf_counter() - self._begin)
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - self._cpu_begin)


def our_step(side: str, args: argparse.Namespace, material: Material, folder: str, clock: StepClock) -> None:
    """Train one step of many micro-batches by the Trainer."""
    options = ContrastiveTrainingArguments(
        output_dir=folder,
        objective="contrastive",
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.cached_batch // args.micro_batch,
        max_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer_class = ContrastiveTrainer if side == CACHED else PlainAccumulation
    trainer = trainer_class(
        our_model(make_encoder(args), material.length),
        options,
        data_collator=our_collator(material, packed=True),
        train_dataset=material.examples(0, args.cached_batch),
        processing_class=material.tokenizer,
    )
    trainer.add_callback(clock)
    trainer.train()


def their_step(args: argparse.Namespace, material: Material, clock: StepClock) -> None:
    """Run forward and backward of sentence-transformers' cached loss on the whole batch."""
    theirs = Theirs.around(make_encoder(args), material, micro_batch=args.micro_batch)
    batch = theirs.batch(material.columns(0, args.cached_batch))
    clock.on_step_begin()
    theirs.mean_loss(batch).backward()
    clock.on_pre_optimizer_step()


def cached_step(side: str, args: argparse.Namespace, material: Material, clock: StepClock) -> None:
    """Run one step of a side."""
    if side.startswith("ours"):
        with tempfile.TemporaryDirectory() as folder:
            our_step(side, args, material, folder, clock)
    else:
        their_step(args, material, clock)


def measure_caching(args: argparse.Namespace) -> None:
    """Print one row a side."""
    memory = {side: memory_of("caching", side, args.cached_batch) for side in CACHING}
    material, clocks = Material(args, args.cached_batch), {side: StepClock() for side in CACHING}
    interleaved(
        {side: functools.partial(cached_step, side, args, material, clocks[side]) for side in CACHING}, args.repeats
    )
    first = CACHING[0]
    print(f"\n{args.cached_batch} pairs in micro-batches of {args.micro_batch}; {setting(args)}")
    rows = [
        [
            side,
            f"{clocks[side].seconds:.1f}",
            f"{clocks[side].seconds / clocks[first].seconds:.2f}",
            f"{clocks[side].cpu_seconds:.1f}",
            f"{clocks[side].cpu_seconds / clocks[first].cpu_seconds:.2f}",
            f"{memory[side]:.0f}",
            f"{memory[side] / memory[first]:.2f}",
        ]
        for side in CACHING
    ]
    print_table(rows, ["side", "seconds", "of plain", "CPU seconds", "of plain", "MiB", "memory"])


def setting(args: argparse.Namespace) -> str:
    """Return the sizes of the models, and how they are measured."""
    return (
        f"{args.num_hidden_layers} layers, {args.hidden_size} wide, {args.vocab_size} tokens, texts of at most "
        f"{args.sequence_length} tokens, fp32, {torch.get_num_threads()} threads, best of {args.repeats}; {load_of_machine()}"
    )


def memory_of(part: str, side: str, size: int) -> float:
    """Run one step in a fresh process and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", part, side, str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(args: argparse.Namespace) -> None:
    """Print the rise of memory of one step."""
    part, side, size = args.memory_of[0], args.memory_of[1], int(args.memory_of[2])
    material = Material(args, size)
    if part == "caching":
        print(rise_of_memory(functools.partial(cached_step, side, args, material, StepClock())))
        return
    encoder = make_encoder(args)
    batch = collators(args, material, size, encoder)[side]()
    print(rise_of_memory(steps_of(losses(material, encoder, {side: batch}))[side]))


def main() -> None:
    """Measure and print."""
    parser = options_parser(
        __doc__,
        sequence_length=64,
        hidden_size=256,
        num_hidden_layers=4,
        vocab_size=8192,
        cached_batch=4096,
        micro_batch=64,
        repeats=5,
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[64, 256], help="pairs in a step")
    parser.add_argument("--train_file", help="text with a paragraph a line; docstrings if not given")
    parser.add_argument(
        "--part", choices=("steps", "caching"), action="append", help="what to measure; by default all"
    )
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.memory_of:
        print_memory(args)
        return
    if not THEIRS:
        print("sentence-transformers is not installed: 'plain', the same computation written out, stands for it")
    for part in args.part or ("steps", "caching"):
        {"steps": measure_steps, "caching": measure_caching}[part](args)


if __name__ == "__main__":
    main()
