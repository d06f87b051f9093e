"""Steps of distillation, ours against stock transformers with the same weights and the same batch: time and peak memory.

    python benchmarks/distillation_steps.py [--bf16] [--base] [--case distilbert sst2] [--data_dir data] [--repeats 5]

A step is the teacher's forward and the student's forward and backward, of these losses:

    distilbert       divergence, MLM and cosine, 15 in 100 tokens masked; stock: logits at all positions, then of the masked
    tinybert 8x512   embeddings, hidden states and attention scores, rows filled by half on average
    tinybert 32x128  the same, full rows
    sst2             the same on the sentences of data_dir/sst2/train.tsv; stock: padded to 64; ours: batches of about one
                     length, as the Trainer makes them. A step is one pass over `sst2_batches` batches
    minilmv2         relations of the queries, keys and values of a layer, 32 rows of 128 tokens; stock: plain softmaxes and
                     divergences of what its projections return
    prediction       divergence of a classifier's logits; the third side has the teacher's logits from a cache
    textbrewer 128   a classifier's hidden states, attention probabilities and logits on the lines of `--text_file`, cut to 128
                     tokens; stock: the loop that TextBrewer documents, batches in random order, padded to their longest line.
                     Ours: the same lines and losses in batches of about one length; also with attention scores, and in bf16
    textbrewer 512   the same, cut to 512

Stock TinyBERT is eager attention that returns its scores, as the official code does, with losses over the real tokens. Both sides
have the same loss (of textbrewer on the same batches; in bf16 nearly so), which is checked before anything is timed. All sides
run in one process, in turn, and the best of the repeats counts. Peak memory is how much the resident set rises during the first
step, each side in a process of its own. "Of peak" is explained in training_steps.py. "By GFLOP" is the speed-up that the matrix
products alone would give, if both sides did as many of them a second; products with padding count.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.nn.functional as F  # noqa: N812
from training_steps import GEMM_SIZE, count_flops, make_batch, matmul_step, mean_loss, rise_of_memory, stepped
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from hf_pretrain.data import draws
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset
from hf_pretrain.modeling.losses import PretrainingOutput
from hf_pretrain.objectives.distillation.arguments import (
    DistillationTrainingArguments,
    TaskDistillationTrainingArguments,
)
from hf_pretrain.objectives.distillation.building import join
from hf_pretrain.objectives.distillation.modeling import DistillationModel
from hf_pretrain.tasks.batches import DataCollatorForTask, LengthGroupedSampler
from results import read_rows
from timing import interleaved, options_parser, print_table

Batch = dict[str, torch.Tensor]
# Of each side, the loss of each batch of a step.
Sides = dict[str, list[Callable[[], torch.Tensor]]]

# The projection of each of MiniLMv2's losses.
MINILM = {"relation_qq": "query", "relation_kk": "key", "relation_vv": "value"}
VOCAB_SIZE = 30522
OFFICIAL_LENGTH = 64
# layers, width, heads, width of the feed-forward layers
SMALL = {"distilbert": ((6, 256, 4, 1024), (3, 256, 4, 1024)), "tinybert": ((8, 256, 4, 1024), (4, 128, 4, 512))}
BASE = {"distilbert": ((12, 768, 12, 3072), (6, 768, 12, 3072)), "tinybert": ((12, 768, 12, 3072), (4, 312, 12, 1200))}


class Pair(NamedTuple):
    """Stock models, and ours around copies of them."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    ours: DistillationModel
    weights: dict[str, float]


def make_pair(auto_class: Any, method: str, args: argparse.Namespace, options: Any, *, length: int) -> Pair:
    """Build teacher and student with random weights, and join copies of them."""
    torch.manual_seed(0)
    models = []
    for layers, width, heads, intermediate in reversed((BASE if args.base else SMALL)[method]):
        config = BertConfig(
            vocab_size=VOCAB_SIZE,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=length,
            hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout,
        )
        models.append(auto_class.from_config(config))
    student, teacher = models
    ours = join(copy.deepcopy(student), copy.deepcopy(teacher), options).train()
    return Pair(student.train(), teacher.eval().requires_grad_(False), ours, options.weights())


def training_options(options_class: type, args: argparse.Namespace, **options: Any) -> Any:
    """Return arguments of training; nothing is written."""
    folder = str(Path(tempfile.gettempdir(), "distillation_steps"))
    return options_class(output_dir=folder, bf16=args.bf16, report_to="none", **options)


def weighted(pair: Pair, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return our loss of a batch."""

    def loss() -> torch.Tensor:
        output: PretrainingOutput = pair.ours(**batch)
        return mean_loss(output, pair.weights)

    return loss


def distilbert_sides(args: argparse.Namespace) -> Sides:
    """DistilBERT's losses at the masked positions."""
    options = training_options(DistillationTrainingArguments, args)
    pair = make_pair(AutoModelForMaskedLM, "distilbert", args, options, length=128)
    batch = make_batch(argparse.Namespace(batch_size=32, sequence_length=128, vocab_size=VOCAB_SIZE))
    del batch["sample_uniforms"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    is_target, temperature = batch["labels"] != -100, options.temperature

    def stock() -> torch.Tensor:
        with torch.no_grad():
            theirs = pair.teacher(**inputs, output_hidden_states=True)
        ours = pair.student(**inputs, output_hidden_states=True)
        student, teacher = ours.logits[is_target].float(), theirs.logits[is_target].float()
        soft = [(logits / temperature).log_softmax(-1) for logits in (student, teacher)]
        prediction = temperature**2 * F.kl_div(soft[0], soft[1], reduction="batchmean", log_target=True)
        cosine = F.cosine_similarity(ours.hidden_states[-1].float(), theirs.hidden_states[-1].float(), dim=-1)
        mlm = F.cross_entropy(student, batch["labels"][is_target])
        found = {"prediction": prediction, "mlm": mlm, "cosine": 1 - cosine.mean()}
        return sum(pair.weights[name] * value for name, value in found.items())

    return {"stock": [stock], "ours": [weighted(pair, batch)]}


def attention_with_scores(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention that returns the scores before the softmax."""
    scores = query @ key.transpose(2, 3) * scaling
    masked = scores if attention_mask is None else scores + attention_mask
    probabilities = F.dropout(masked.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), scores


def stock_tinybert(pair: Pair, batch: Batch, layer_map: list[int]) -> Callable[[], torch.Tensor]:
    """TinyBERT's losses on what the models return, through the projections of ours."""
    valid = batch["attention_mask"].float()
    pairs = (valid[:, :, None] * valid[:, None])[:, None]
    projections = pair.ours.projections

    def state_loss(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (((ours - theirs).float() ** 2).mean(-1) * valid).sum() / valid.sum()

    def loss() -> torch.Tensor:
        wanted = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            theirs = pair.teacher(**batch, **wanted)
        ours = pair.student(**batch, **wanted)
        total = state_loss(projections["embedding"](ours.hidden_states[0]), theirs.hidden_states[0])
        if "prediction" in pair.weights:
            student, teacher = (output.logits.float().log_softmax(-1) for output in (ours, theirs))
            total = total + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        for m, n in enumerate(layer_map):
            total = total + state_loss(projections["hidden"](ours.hidden_states[m + 1]), theirs.hidden_states[n])
            difference = (ours.attentions[m] - theirs.attentions[n - 1]).float()
            total = total + (difference**2 * pairs).sum() / (pairs.sum() * difference.shape[1])
        return total

    return loss


def tinybert_pair(args: argparse.Namespace, *, length: int) -> Pair:
    """TinyBERT's encoders; the stock ones return attention scores."""
    options = training_options(DistillationTrainingArguments, args, distillation_method="tinybert")
    pair = make_pair(AutoModel, "tinybert", args, options, length=length)
    AttentionInterface.register("eager_with_scores", attention_with_scores)
    AttentionMaskInterface.register("eager_with_scores", eager_mask)
    for model in (pair.student, pair.teacher):
        model.set_attn_implementation("eager_with_scores")
    return pair


def tinybert_sides(args: argparse.Namespace, *, batch_size: int, length: int, is_full: bool) -> Sides:
    """TinyBERT's intermediate losses on synthetic rows."""
    pair = tinybert_pair(args, length=length)
    keys = draws.row_keys(range(batch_size), seed=0)
    ids = torch.from_numpy(draws.integers(keys, length, high=VOCAB_SIZE))
    lengths = torch.from_numpy(draws.integers(keys ^ 1, 1, high=length)) + 1
    valid = torch.arange(length) < (lengths * 0 + length if is_full else lengths)
    batch = {"input_ids": ids * valid, "attention_mask": valid.long()}
    stock = stock_tinybert(pair, batch, pair.ours.config.layer_map)
    return {"stock": [stock], "ours": [weighted(pair, batch)]}


def minilm_sides(args: argparse.Namespace) -> Sides:
    """MiniLMv2's relations on full rows."""
    heads = 24 if args.base else 16
    options = training_options(
        DistillationTrainingArguments, args, distillation_method="minilmv2", relation_heads=heads
    )
    pair = make_pair(AutoModel, "tinybert", args, options, length=128)
    ids = torch.from_numpy(draws.integers(draws.row_keys(range(32), seed=0), 128, high=VOCAB_SIZE))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen: dict[tuple[str, str], torch.Tensor] = {}
    layers = {
        "student": pair.student.encoder.layer[-1],
        "teacher": pair.teacher.encoder.layer[pair.ours.config.teacher_layer - 1],
    }
    for side, layer in layers.items():
        for name in MINILM.values():
            projection = getattr(layer.attention.self, name)
            projection.register_forward_hook(
                lambda module, inputs, output, at=(side, name): seen.__setitem__(at, output)
            )

    def relation(states: torch.Tensor) -> torch.Tensor:
        parts = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        return (parts @ parts.mT * parts.shape[-1] ** -0.5).log_softmax(-1)

    def stock() -> torch.Tensor:
        with torch.no_grad():
            pair.teacher(**batch)
        pair.student(**batch)
        total = torch.zeros(())
        for loss, name in MINILM.items():
            student, teacher = (relation(seen[side, name]) for side in ("student", "teacher"))
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            total = total + pair.weights[loss] * divergence / student[..., 0].numel()
        return total

    return {"stock": [stock], "ours": [weighted(pair, batch)]}


def sst2_sides(args: argparse.Namespace) -> Sides:
    """TinyBERT's intermediate losses on real sentences: padded to one length, or as the Trainer batches them."""
    rows = read_rows(args.data_dir, "sst2", "train")
    sentences = rows[0].tolist()
    tokenizer = train_tokenizer(
        sentences, kind="wordpiece", vocab_size=8192, lowercase=True, model_max_length=OFFICIAL_LENGTH
    )
    encoded = tokenizer(sentences, truncation=True, max_length=OFFICIAL_LENGTH)["input_ids"]
    examples = EpochDataset(datasets.Dataset.from_dict({"input_ids": encoded}))
    order = list(LengthGroupedSampler.of(examples, seed=0, batch_size=32))
    collator, batches = DataCollatorForTask(tokenizer), []
    for number in range(args.sst2_batches):
        chosen = [index % EPOCH_STRIDE for index in order[32 * number : 32 * (number + 1)]]
        batches.append(collator(examples.__getitems__(chosen)))
    pair = tinybert_pair(args, length=OFFICIAL_LENGTH)
    padded = [
        {name: F.pad(value, (0, OFFICIAL_LENGTH - value.shape[1])) for name, value in batch.items()}
        for batch in batches
    ]
    layer_map = pair.ours.config.layer_map
    return {
        "stock": [stock_tinybert(pair, batch, layer_map) for batch in padded],
        "ours": [weighted(pair, batch) for batch in batches],
    }


def lines_of(path: str, count: int, *, length: int) -> tuple[list[list[int]], Any]:
    """Return the ids of the first lines of a text that are no headings, each as long as it is, and their tokenizer."""
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if len(line.split()) > 3]
    tokenizer = train_tokenizer(lines, kind="wordpiece", vocab_size=8192, lowercase=True, model_max_length=length)
    return tokenizer(lines[:count], truncation=True, max_length=length)["input_ids"], tokenizer


def textbrewer_sides(args: argparse.Namespace, *, batch_size: int, length: int) -> Sides:
    """All losses of a classifier on real lines: batches in random order, as TextBrewer's users make them, or as ours."""
    encoded, tokenizer = lines_of(args.text_file, batch_size * args.text_batches, length=length)
    examples = EpochDataset(datasets.Dataset.from_dict({"input_ids": encoded}))
    collator, size = DataCollatorForTask(tokenizer), batch_size

    def batches(order: list[int]) -> list[Batch]:
        rows = [order[first : first + size] for first in range(0, len(order) // size * size, size)]
        return [collator(examples.__getitems__(chosen)) for chosen in rows]

    sampler = LengthGroupedSampler.of(examples, seed=0, batch_size=size)
    grouped = batches([index % EPOCH_STRIDE for index in sampler])
    shuffled = batches(draws.permutation(len(encoded), seed=0, epoch=0).tolist())
    weights = dict.fromkeys(("embedding_weight", "hidden_weight", "attention_weight", "prediction_weight"), 1.0)

    def pair_of(target: str, *, bf16: bool = False) -> Pair:
        options = training_options(
            TaskDistillationTrainingArguments,
            argparse.Namespace(bf16=bf16),
            **weights,
            attention_target=target,
            projection="shared",
        )
        pair = make_pair(AutoModelForSequenceClassification, "tinybert", args, options, length=length)
        for model in (pair.student, pair.teacher):
            model.set_attn_implementation("eager")
        return pair

    pair = pair_of("probs")
    layer_map = pair.ours.config.layer_map
    if args.is_check:
        return {
            "stock": [stock_tinybert(pair, batch, layer_map) for batch in shuffled],
            "ours": [weighted(pair, batch) for batch in shuffled],
        }
    reduced = pair_of("probs", bf16=True)
    return {
        "stock": [stock_tinybert(pair, batch, layer_map) for batch in shuffled],
        "stock, teacher alone": [teacher_alone(pair, batch) for batch in shuffled],
        "stock, student alone": [student_alone(pair, batch) for batch in shuffled],
        "ours": [weighted(pair, batch) for batch in grouped],
        "ours, random order": [weighted(pair, batch) for batch in shuffled],
        "ours, scores": [weighted(pair_of("scores"), batch) for batch in grouped],
        "ours, bf16": [in_bf16(weighted(reduced, batch)) for batch in grouped],
    }


def teacher_alone(pair: Pair, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return the teacher's forward pass with states and attention, as a loss of 0."""
    zero = torch.zeros((), requires_grad=True)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            pair.teacher(**batch, output_hidden_states=True, output_attentions=True)
        return zero * 0

    return loss


def student_alone(pair: Pair, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return a loss that costs the student's forward and backward pass, and next to nothing itself."""
    return lambda: pair.student(**batch, output_hidden_states=True, output_attentions=True).logits.sum()


def in_bf16(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a loss that is computed in bf16 autocast."""

    def reduced() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    return reduced


def prediction_sides(args: argparse.Namespace) -> Sides:
    """The divergence of a classifier's logits, of a teacher that runs now or ran before."""
    options = training_options(TaskDistillationTrainingArguments, args)
    pair = make_pair(AutoModelForSequenceClassification, "tinybert", args, options, length=128)
    ids = torch.from_numpy(draws.integers(draws.row_keys(range(32), seed=0), 128, high=VOCAB_SIZE))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        cached = batch | {"teacher_logits": pair.teacher(**batch).logits}

    def stock() -> torch.Tensor:
        with torch.no_grad():
            teacher = pair.teacher(**batch).logits.float()
        student = pair.student(**batch).logits.float()
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)

    return {"stock": [stock], "ours": [weighted(pair, batch)], "ours, cached": [weighted(pair, cached)]}


CASES: dict[str, Callable[[argparse.Namespace], Sides]] = {
    "distilbert": distilbert_sides,
    "tinybert 8x512": lambda args: tinybert_sides(args, batch_size=8, length=512, is_full=False),
    "tinybert 32x128": lambda args: tinybert_sides(args, batch_size=32, length=128, is_full=True),
    "sst2": sst2_sides,
    "minilmv2": minilm_sides,
    "prediction": prediction_sides,
    "textbrewer 128": lambda args: textbrewer_sides(args, batch_size=32, length=128),
    "textbrewer 512": lambda args: textbrewer_sides(args, batch_size=8, length=512),
}
# Whose memory is measured.
SIDES_OF = dict.fromkeys(CASES, ("stock", "ours")) | {"prediction": ("stock", "ours", "ours, cached")}


def step_of(losses: list[Callable[[], torch.Tensor]], *, bf16: bool, side: str) -> Callable[[], None]:
    """Make one step of the losses of several batches of a side, forward and backward of one after the other."""
    steps = [stepped(loss, bf16=bf16, side=side) for loss in losses]

    def step() -> None:
        for part in steps:
            part()

    return step


def check_losses(case: str, args: argparse.Namespace) -> None:
    """Refuse to compare sides that compute different things: without dropout and in fp32 their losses are equal."""
    exact = argparse.Namespace(**vars(args) | {"dropout": 0.0, "bf16": False, "is_check": True})
    sides = CASES[case](exact)
    with torch.no_grad():
        totals = [sum(float(loss()) for loss in losses) for losses in sides.values()]
    assert max(totals) - min(totals) < 1e-3 * abs(totals[0]) + 1e-6, (case, totals)


def memory_of(case: str, side: str) -> float:
    """Run one step in a fresh process and return its rise of memory in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", case, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def rows_of(case: str, args: argparse.Namespace) -> list[list[str]]:
    """Measure all sides of a case: one row a side."""
    check_losses(case, args)
    memory = {side: memory_of(case, side) for side in SIDES_OF[case]}
    steps = {side: step_of(losses, bf16=args.bf16, side=side) for side, losses in CASES[case](args).items()}
    flops = {side: count_flops(step) for side, step in steps.items()}
    seconds = interleaved({**steps, "matmul": matmul_step(bf16=args.bf16)}, repeats=args.repeats)
    peak = 2 * GEMM_SIZE**3 / seconds["matmul"]
    return [
        [
            case,
            side,
            f"{1e3 * seconds[side]:.0f}",
            f"{seconds['stock'] / seconds[side]:.2f}",
            f"{flops[side] / 1e9:.1f}",
            f"{flops['stock'] / flops[side]:.2f}",
            f"{100 * flops[side] / seconds[side] / peak:.0f} % of {peak / 1e9:.0f} GFLOP/s",
            f"{memory[side]:.0f}" if side in memory else "",
            f"{memory[side] / memory['stock']:.2f}" if side in memory else "",
        ]
        for side in steps
    ]


def main() -> None:
    """Print one row a case and side."""
    parser = options_parser(__doc__, repeats=5)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="what to measure")
    parser.add_argument("--base", action="store_true", help="a teacher of 12 layers, 768 wide, in place of small ones")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on all sides")
    parser.add_argument(
        "--data_dir", default="data", help="folder with sst2/train.tsv; without it the case is left out"
    )
    parser.add_argument("--sst2_batches", type=int, default=6, help="batches of sentences in a step")
    parser.add_argument("--text_file", help="text of the cases textbrewer, one a line; without it they are left out")
    parser.add_argument("--text_batches", type=int, default=12, help="batches of its lines in a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the student")
    parser.add_argument("--memory_of", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.is_check = False
    datasets.disable_progress_bars()
    if args.memory_of:
        case, side = args.memory_of
        print(rise_of_memory(step_of(CASES[case](args)[side], bf16=args.bf16, side=side)))
        return
    has_task = (Path(args.data_dir) / "sst2" / "train.tsv").is_file()
    cases = [case for case in args.case if case != "sst2" or has_task]
    cases = [case for case in cases if args.text_file or not case.startswith("textbrewer")]
    rows = [row for case in cases for row in rows_of(case, args)]
    for method, sizes in (BASE if args.base else SMALL).items():
        shown = " and ".join(f"{layers} x {width}" for layers, width, *_ in sizes)
        print(f"{method}: teacher and student of {shown}")
    precision = "bf16 autocast" if args.bf16 else "fp32"
    print(f"{VOCAB_SIZE} tokens, {precision}, {torch.get_num_threads()} threads, best of {args.repeats}\n")
    print_table(rows, ["step", "side", "ms", "speed-up", "GFLOP", "by GFLOP", "of peak", "MiB", "memory"])


if __name__ == "__main__":
    main()
