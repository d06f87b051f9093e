"""Sequence-to-sequence denoising: what each noise costs, and training steps against the stock T5 on the same documents.

    python benchmarks/denoising.py [--part collators] [--part steps] [--train_file books.txt]

Collators: one thread, 32 examples of 512 tokens, a vocabulary of 30 522, words of about 1.4 tokens, sentences of about 20.
"Noise" is the noise alone, on texts as the collator gives them to it; "collator" is the whole call. Beside T5's is the usual
NumPy collator for T5, which has the algorithm of the paper and works row by row.

Steps: a step is forward and backward of one T5 on paragraphs of natural length, in fp32. Each side reads the same paragraphs, so
that all have as many real tokens:

    stock            T5ForConditionalGeneration; the usual collator pads to the longest paragraph
    stock, joined    the same on paragraphs that are joined and cut into full rows, so that they see each other
    ours             a row for each paragraph
    ours, packed     several paragraphs in a row that do not see each other

That stock and ours have the same loss on one batch is checked first. All sides run in one process, in turn; the best of the
repeats counts. Peak memory is how much the resident set rises during the first step, each side in a process of its own.
Paragraphs are those of the docstrings on this machine, or the lines of a file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from training_steps import mean_loss, rise_of_memory
from transformers import BertTokenizer, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from hf_pretrain import train_tokenizer
from hf_pretrain.corruption.denoising import BART_STEPS, BartNoise
from hf_pretrain.corruption.fragments import Denoiser, MassNoise, PrefixLM, SpanCorruption, UL2Noise
from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.corruption.texts import Noise, Texts
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import tokenize_documents
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.objectives.denoising import DataCollatorForDenoising, DenoisingForPreTraining
from timing import interleaved, load_of_machine, options_parser, print_table

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MODES = {"R": "[NLU]", "X": "[NLG]", "S": "[S2S]"}
SENTINELS = [f"<extra_id_{index}>" for index in range(200)]
UL2 = ("R:3:0.15", "R:8:0.15", "X:3:0.5", "X:8:0.5", "X:64:0.15", "X:64:0.5", "S:0.25")
IGNORED = -100
STEPS = ("stock", "stock, joined", "ours", "ours, packed")

Examples = Sequence[Mapping[str, Any]]


class UsualCollator:
    """The usual NumPy collator for T5, as the paper describes the noise: row by row, padded to the longest.

    The number of hidden tokens and that of spans follow from the length. Both kinds of tokens are divided at random into as many
    parts, which alternate, beginning with tokens that stay. A part that is hidden becomes a sentinel; the target lists the
    sentinels with what they stand for.

    Args:
        tokenizer: Gives the ids of the sentinels, of the end and of padding, which begins a target.
        seed: Seed of the generator.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
        self.sentinels = np.array(tokenizer.convert_tokens_to_ids(SENTINELS))
        self.end, self.pad = tokenizer.sep_token_id, tokenizer.pad_token_id
        self.random = np.random.default_rng(seed)

    def _parts(self, total: int, count: int) -> np.ndarray:
        """Divide a number into parts of at least 1, each division as likely."""
        cuts = np.sort(self.random.permutation(total - 1)[: count - 1]) + 1
        return np.diff(np.concatenate([[0], cuts, [total]]))

    def _mask(self, length: int) -> np.ndarray:
        hidden = min(max(round(0.15 * length), 1), length - 1)
        spans = min(max(round(hidden / 3), 1), length - hidden)
        sizes = np.stack([self._parts(length - hidden, spans), self._parts(hidden, spans)], axis=1).ravel()
        return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)

    def _collapse(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Put a sentinel in place of each run of the mask, and an end behind all."""
        is_first = mask & ~np.concatenate([[False], mask[:-1]])
        with_sentinels = np.where(is_first, self.sentinels[np.cumsum(is_first) - 1], ids)
        return np.append(with_sentinels[~mask | is_first], self.end)

    def __call__(self, texts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Make a batch of texts without special tokens."""
        inputs, targets = [], []
        for ids in texts:
            mask = self._mask(len(ids))
            inputs.append(self._collapse(ids, mask))
            # Tokens that stay are runs too, each in front of a hidden one.
            targets.append(self._collapse(ids, ~mask))
        input_ids = self._padded(inputs, self.pad)
        labels = self._padded(targets, IGNORED)
        return {"input_ids": input_ids, "attention_mask": (input_ids != self.pad).long(), "labels": labels}

    @staticmethod
    def _padded(rows: Sequence[np.ndarray], fill: int) -> torch.Tensor:
        padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
        for row, ids in enumerate(rows):
            padded[row, : len(ids)] = ids
        return torch.from_numpy(padded)


# Collators


def make_tokenizer(vocab_size: int) -> BertTokenizer:
    """Return a tokenizer of a size, with sentinels and modes; its words do not matter."""
    special = [*SPECIALS, *MODES.values(), *SENTINELS]
    tokens = special + [f"w{index}" for index in range(vocab_size - len(special))]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    tokenizer.add_tokens([*MODES.values(), *SENTINELS], special_tokens=True)
    return tokenizer


def make_noises(tokenizer: PreTrainedTokenizerBase) -> dict[str, Noise]:
    """Return what is measured, with the papers' numbers."""
    sentinels = np.array(tokenizer.convert_tokens_to_ids(SENTINELS))
    modes = {name: tokenizer.convert_tokens_to_ids(token) for name, token in MODES.items()}
    mask, special = tokenizer.mask_token_id, tokenizer.all_special_ids
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    bart = functools.partial(BartNoise, mask_token_id=mask)
    return {
        **{name: bart(steps=(name,)) for name in BART_STEPS},
        "BART's recipe": bart(steps=("sentence_permutation", "infilling")),
        "T5": t5_noise(tokenizer),
        "UL2": UL2Noise(denoisers=tuple(map(Denoiser.parse, UL2)), sentinels=sentinels, mode_ids=modes),
        "prefix_lm": PrefixLM(),
        "mass": MassNoise(mask_token_id=mask, random_ids=ordinary),
    }


def t5_noise(tokenizer: PreTrainedTokenizerBase) -> SpanCorruption:
    """Return T5's noise."""
    return SpanCorruption(sentinels=np.array(tokenizer.convert_tokens_to_ids(SENTINELS)))


def make_examples(batch_size: int, length: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return examples of arrays: one text between special tokens."""
    keys = functools.partial(draws.row_keys, list(range(batch_size)), seed=0)
    first = len(SPECIALS) + len(MODES) + len(SENTINELS)
    input_ids = draws.integers(keys(stream="ids"), length, high=len(tokenizer) - first) + first
    word_starts = draws.uniforms(keys(stream="words"), length) < 0.7
    sent_starts = word_starts & (draws.uniforms(keys(stream="sentences"), length) < 0.07)
    input_ids[:, 0], input_ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    word_starts[:, [0, 1, -1]], sent_starts[:, [0, -1]], sent_starts[:, 1] = True, False, True
    return [
        {
            "input_ids": input_ids[row].astype(np.int32),
            "word_starts": word_starts[row],
            "sent_starts": sent_starts[row],
        }
        | {"example_id": row, "epoch": 0}
        for row in range(batch_size)
    ]


def texts_of(examples: Examples) -> Texts:
    """Return the texts of examples as noise sees them."""
    stacked = {name: np.stack([row[name][1:-1] for row in examples]) for name in ("word_starts", "sent_starts")}
    input_ids = np.stack([row["input_ids"][1:-1] for row in examples]).astype(np.int64)
    return Texts(
        input_ids=input_ids,
        valid=np.ones(input_ids.shape, dtype=np.bool_),
        is_special=np.zeros(input_ids.shape, dtype=np.bool_),
        rows=np.arange(len(examples)),
        offsets=np.ones(len(examples), dtype=np.int64),
        keys=RowKeys.from_examples(examples),
        **stacked,
    )


def measure_collators(args: argparse.Namespace) -> None:
    """Print one row a noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(30522)
    examples = make_examples(32, 512, tokenizer)
    texts, noises = texts_of(examples), make_noises(tokenizer)
    sides: dict[str, Callable[[], Any]] = {}
    for name, noise in noises.items():
        sides[f"{name}, noise"] = functools.partial(noise, texts)
        sides[name] = functools.partial(DataCollatorForDenoising(tokenizer, noise=noise), examples)
    sides["usual"] = functools.partial(UsualCollator(tokenizer), list(texts.input_ids))
    seconds = interleaved(sides, 4 * args.repeats, turn_seconds=0.06)
    torch.set_num_threads(threads)
    print(f"32 x 512 tokens, 1 thread, best of {4 * args.repeats} turns, in turn; {load_of_machine()}")
    rows = [
        [name, 1e3 * seconds[f"{name}, noise"], 1e3 * seconds[name], 1e3 * seconds["usual"] if name == "T5" else ""]
        for name in noises
    ]
    print_table(rows, ["noise", "noise, ms", "collator, ms", "usual collator, ms"])


# Steps


def paragraphs(train_file: str | None) -> Iterator[str]:
    """Yield paragraphs."""
    if train_file:
        yield from read_documents(train_file, document_separator="line")
    else:
        for text in docstring_documents(max_bytes=4_000_000):
            yield from re.split(r"\n\s*\n", text)


class Material:
    """The paragraphs of a step, and the batches that each side makes of them.

    Args:
        args: Options of the program.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        texts = list(itertools.islice(paragraphs(args.train_file), 20_000))
        self.tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=8192, lowercase=False)
        self.tokenizer.add_tokens(SENTINELS, special_tokens=True)
        self.room, num_tokens = args.sequence_length - 2, args.rows * args.sequence_length
        # A window from the middle of the text, of whole paragraphs.
        documents = tokenize_documents(
            datasets.Dataset.from_dict({"text": texts[len(texts) // 2 :][:2000]}), self.tokenizer
        )
        lengths = np.array([len(row) for row in documents["input_ids"]])
        # T5's noise needs a token that stays and one that goes. A few positions stay free, as packing leaves some.
        fitting = np.flatnonzero((lengths >= 2) & (lengths <= self.room))
        count = np.searchsorted(np.cumsum(lengths[fitting] + 2), 0.98 * num_tokens)
        self.documents = documents.select(fitting[:count])
        self.texts = [np.array(ids) for ids in self.documents["input_ids"]]

    def examples(self, mode: Any) -> Examples:
        """Return the paragraphs as examples of a collator of ours."""
        blocks = BlockDataset(self.documents, tokenizer=self.tokenizer, block_size=self.room + 2, mode=mode)
        rows = blocks.__getitems__(range(len(blocks)))
        return [{**row, "example_id": number, "epoch": 0} for number, row in enumerate(rows)]

    def collators(self) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
        """Return what makes the batch of each side."""
        usual = UsualCollator(self.tokenizer)
        ours = DataCollatorForDenoising(self.tokenizer, noise=t5_noise(self.tokenizer))
        joined = np.concatenate(self.texts)
        rows = np.split(joined, np.arange(self.room, len(joined) - 1, self.room))
        alone, packed = self.examples("doc_sentences"), self.examples("isolated_documents")
        return {
            "stock": functools.partial(usual, self.texts),
            "stock, joined": functools.partial(usual, rows),
            "ours": functools.partial(ours, alone),
            "ours, packed": functools.partial(ours, packed),
        }


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """Return the stock model; the same weights in each process."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=args.vocab_size,
        d_model=args.hidden_size,
        d_kv=64,
        d_ff=4 * args.hidden_size,
        num_heads=max(1, args.hidden_size // 64),
        num_layers=args.num_hidden_layers,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config).train()


def stock_loss(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the stock model's loss; it makes the decoder's input of the labels."""
    names = ("input_ids", "attention_mask", "labels")
    return model(**{name: batch[name] for name in names}).loss


def make_steps(
    model: T5ForConditionalGeneration, batches: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Callable[[], None]]:
    """Return forward and backward of each side; all sides share the weights."""
    ours = DenoisingForPreTraining.from_model(model)

    def step(name: str) -> None:
        batch = batches[name]
        if name.startswith("stock"):
            stock_loss(model, batch).backward()
        else:
            mean_loss(ours(**batch), {"denoising": 1.0}).backward()

    return {name: functools.partial(step, name) for name in batches}


@torch.no_grad()
def check_losses(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """Refuse to measure sides whose losses differ on one batch, without dropout."""
    model.eval()
    losses = (
        float(stock_loss(model, batch)),
        float(mean_loss(DenoisingForPreTraining.from_model(model)(**batch), {"denoising": 1.0})),
    )
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
    model.train()


def fill(batch: dict[str, torch.Tensor]) -> str:
    """Return the shapes of a batch and the shares that hold tokens, of inputs and targets."""
    sides = {"": batch["attention_mask"] != 0, " -> ": batch["labels"] != IGNORED}
    return "".join(
        f"{sign}{len(is_real)} x {is_real.shape[1]} ({100 * is_real.float().mean():.0f} %)"
        for sign, is_real in sides.items()
    )


def real_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Return how many tokens are read and written."""
    return int(batch["attention_mask"].sum() + (batch["labels"] != IGNORED).sum())


def memory_of(side: str) -> float:
    """Run one step in a fresh process and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_steps(args: argparse.Namespace) -> None:
    """Print one row a side."""
    memory = {side: memory_of(side) for side in STEPS}
    material = Material(args)
    collators = material.collators()
    batches = {name: collate() for name, collate in collators.items()}
    model = make_model(args, material.tokenizer)
    check_losses(model, batches["ours"])
    steps = make_steps(model, batches)
    seconds = interleaved(steps, args.repeats)
    collating = interleaved(collators, 4 * args.repeats)
    total = {name: seconds[name] + collating[name] for name in STEPS}
    lengths = np.array([len(ids) for ids in material.texts])
    print(
        f"\n{args.num_hidden_layers} + {args.num_hidden_layers} layers, {args.hidden_size} wide, {args.vocab_size} tokens, fp32, "
        f"{torch.get_num_threads()} threads, best of {args.repeats}; {load_of_machine()}\n{len(lengths)} paragraphs of "
        f"{lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average"
    )
    rows = [
        [
            name,
            fill(batches[name]),
            real_tokens(batches[name]),
            1e3 * collating[name],
            f"{1e3 * seconds[name]:.0f}",
            f"{total['stock'] / total[name]:.2f}",
            f"{memory[name]:.0f}",
            f"{memory[name] / memory['stock']:.2f}",
        ]
        for name in STEPS
    ]
    headers = ["side", "inputs -> targets", "real tokens", "collator, ms", "step, ms", "speed-up", "MiB", "memory"]
    print_table(rows, headers)


def main() -> None:
    """Measure and print."""
    parser = options_parser(
        __doc__, rows=8, sequence_length=512, hidden_size=256, num_hidden_layers=4, vocab_size=32128, repeats=5
    )
    parser.add_argument("--train_file", help="text with a paragraph a line; docstrings if not given")
    parser.add_argument(
        "--part", choices=("collators", "steps"), action="append", help="what to measure; by default all"
    )
    parser.add_argument("--memory_of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.memory_of:
        material = Material(args)
        batch = material.collators()[args.memory_of]()
        model = make_model(args, material.tokenizer)
        print(rise_of_memory(make_steps(model, {args.memory_of: batch})[args.memory_of]))
        return
    for part in args.part or ("collators", "steps"):
        {"collators": measure_collators, "steps": measure_steps}[part](args)


if __name__ == "__main__":
    main()
