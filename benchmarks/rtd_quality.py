"""Does replaced token detection pay? Arms of equal training FLOPs, judged by frozen probes and minimal pairs.

    python benchmarks/rtd_quality.py --train_file books.txt --data_dir data [--arm rtd mlm] [--seed 0 1] [--flops 2e13]
    python benchmarks/rtd_quality.py --table

All arms train one encoder of one size on one text, with one tokenizer, one order of the data a seed and one recipe:

    rtd          replaced token detection: the encoder is the discriminator
    mlm          masked language modelling
    argmax       rtd, where the generator's best guess takes the place of a sample
    masked_only  rtd, where the discriminator's loss is taken at the selected tokens alone
    untrained    the encoder as it is before training

FLOPs of forward and backward, generator and heads included, are counted once an arm on a real batch by torch's FlopCounterMode;
the steps are what the budget pays for. Then a logistic regression reads SST-2 and CoLA off the frozen encoder's mean output, and
the model itself chooses between the sentences of BLiMP's minimal pairs: by pseudo-log-likelihood, or by the discriminator's
log-probabilities of "original".

The folder `data_dir` holds sst2/train.tsv and dev.tsv (sentence, label), cola/train.tsv and dev.tsv (source, label, mark,
sentence) and blimp/*.jsonl, which may be compressed. Each run is a row of the file `results`: what is there is not run again, and
several processes may fill it, each with arms and seeds of its own. The models are kept in a folder beside it.
"""

import csv
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_pretrain.cli import run_program
from hf_pretrain.data import draws
from hf_pretrain.data.prepare import DataArguments, PreparedData, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import (
    MinimalPair,
    originality_scores,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)
from hf_pretrain.evaluation.probes import encode, probe_accuracy
from hf_pretrain.hub.text import bare_name, is_bookkeeping
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.losses import IGNORED, ExampleSum, PretrainingOutput, binary_token_loss
from hf_pretrain.objectives.encoder import MaskedLMTrainer
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainingArguments
from hf_pretrain.objectives.replaced_token_detection import (
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionForPreTraining,
    ReplacedTokenDetectionModelArguments,
    ReplacedTokenDetectionTrainer,
    ReplacedTokenDetectionTrainingArguments,
    build_model,
)
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.trainer import PretrainingTrainer
from results import mean_and_spread, rows_by_settings, run_once
from timing import print_table

ARMS = ("untrained", "mlm", "rtd", "argmax", "masked_only")
# Columns of each task's files: text and label.
TASKS = {"sst2": (0, 1), "cola": (3, 1)}


@dataclass
class QualityArguments:
    """What is compared."""

    train_file: list[str] = field(
        default_factory=list, metadata={"help": "Text to train on, as for `hf-pretrain rtd`."}
    )
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "Held-out text; without it, documents of train_file are held out."}
    )
    data_dir: str = field(default="data", metadata={"help": "Folder with sst2, cola and blimp."})
    results: str = field(default="rtd_quality.json", metadata={"help": "File that each run adds a row to."})
    table: bool = field(default=False, metadata={"help": "Print the table of the file instead of running anything."})
    arm: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    seed: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds; each arm runs with each."})
    flops: float = field(default=2e13, metadata={"help": "Training budget of a run."})
    max_corpus_bytes: int | None = field(default=None, metadata={"help": "Train on a random part of the text."})
    document_separator: str = field(default="blank_line", metadata={"help": "As for `hf-pretrain rtd`."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer that is trained on the text."})
    block_size: int = field(default=64, metadata={"help": "Most tokens in an example."})
    batch_size: int = field(default=16, metadata={"help": "Examples a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate."})
    model_type: str = field(
        default="modernbert",
        metadata={"help": "Architecture of both models, without dropout; relative positions learn from little text."},
    )
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the encoder."})
    hidden_size: int = field(default=128, metadata={"help": "Its width; a head for every 32."})
    intermediate_size: int = field(default=256, metadata={"help": "Width of its feed-forward layers."})
    generator_size: float = field(default=0.5, metadata={"help": "The generator's share of the width."})
    generator_layers: float = field(default=0.25, metadata={"help": "The generator's share of the layers."})
    probe_rows: int = field(default=10_000, metadata={"help": "Most sentences that a probe is trained on."})
    pairs: int = field(default=100, metadata={"help": "Minimal pairs of each paradigm."})

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: If an arm is unknown, or there is nothing to train on.
        """
        for name in self.arm:
            if name not in ARMS:
                raise InputError(f"arm={name!r} is unknown; choose of {', '.join(ARMS)}")
        if not self.table and not self.train_file:
            raise InputError("train_file is missing: name the text to train on, or print what there is with --table")

    def settings(self) -> dict[str, Any]:
        """Return what the runs of a table have in common: all but which they are and where things lie."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS}
        names = {name: [Path(path).name for path in getattr(self, name)] for name in ("train_file", "validation_file")}
        return names | values


_NOT_SETTINGS = ("train_file", "validation_file", "data_dir", "results", "table", "arm", "seed")


class SelectedTokensOnly(ReplacedTokenDetectionForPreTraining):
    """Replaced token detection whose discriminator is trained, and evaluated, at the selected tokens alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logits: torch.Tensor | None = None
        self.discriminator.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output.logits

    @staticmethod
    def count_targets(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the selected positions for both losses."""
        count = (batch["labels"] != IGNORED).sum()
        return {"mlm": count, "rtd": count}

    def forward(self, *args: Any, labels: torch.Tensor, **kwargs: Any) -> PretrainingOutput:
        """Run a step and take all that concerns the discriminator anew."""
        output = super().forward(*args, labels=labels, **kwargs)
        is_selected = labels != IGNORED
        is_replaced = (output.replaced_ids != labels) & is_selected
        output.losses["rtd"] = binary_token_loss(self._logits.reshape(labels.shape), is_replaced, mask=is_selected)
        output.metrics["fake_rate"] = ExampleSum(is_replaced.sum(1).float(), output.losses["rtd"].count)
        if output.score_labels is not None:
            output.score_labels = output.score_labels.masked_fill(~is_selected, IGNORED)
        return output


def build_trainer(arm: str, seed: int, args: QualityArguments, data: PreparedData, folder: Path) -> PretrainingTrainer:
    """Put an arm's model, collator and Trainer together; the encoder has the same sizes in all."""
    sizes = {
        "model_type": args.model_type,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": max(1, args.hidden_size // 32),
        "intermediate_size": args.intermediate_size,
        "max_position_embeddings": args.block_size,
    }
    if args.model_type == "electra":
        no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        sizes |= {"embedding_size": args.hidden_size, "config_overrides": json.dumps(no_dropout)}
    # ELECTRA's recipe for all.
    training = {
        "output_dir": str(folder / f"{arm}-{seed}"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "adam_bias_correction": False,
        "adam_epsilon": 1e-6,
        "decay_during_warmup": True,
        "eval_on_start": False,
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "seed": seed,
    }
    set_seed(seed)
    if arm == "mlm":
        model = EncoderForPreTraining.from_arguments(ModelArguments(**sizes), data.tokenizer)
        options = MaskedLMTrainingArguments(**training)
        collator = DataCollatorForMaskedLM(data.tokenizer, masking=options.masking, seed=seed)
        return MaskedLMTrainer(model, options, data_collator=collator, **data.trainer_inputs())
    generator = {"generator_size": args.generator_size, "generator_layers": args.generator_layers}
    # At this temperature all of the probability is with the best guess.
    temperature = 1e-4 if arm == "argmax" else 1.0
    model_args = ReplacedTokenDetectionModelArguments(**sizes, **generator)
    model = build_model(model_args, data.tokenizer, temperature=temperature)
    if arm == "masked_only":
        model = SelectedTokensOnly(model.config, model.generator, model.discriminator)
    options = ReplacedTokenDetectionTrainingArguments(**training, temperature=temperature)
    collator = DataCollatorForReplacedTokenDetection(data.tokenizer, masking=options.masking, seed=seed)
    return ReplacedTokenDetectionTrainer(model, options, data_collator=collator, **data.trainer_inputs())


def flops_of_a_step(trainer: PretrainingTrainer) -> int:
    """Count the floating-point operations of forward and backward on a batch of the text."""
    examples = trainer.train_dataset.__getitems__(range(trainer.args.per_device_train_batch_size))
    model = trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        output = model(**trainer._prepare_inputs(trainer.data_collator(examples)))
        sum(loss.sum.sum() for loss in output.losses.values()).backward()
    model.zero_grad()
    return counter.get_total_flops()


def train(trainer: PretrainingTrainer, budget: float) -> dict[str, float]:
    """Train for as many steps as the budget pays for, evaluate and export."""
    step = flops_of_a_step(trainer)
    trainer.args.max_steps = max(1, round(budget / step))
    begin = time.perf_counter()
    trainer.train()
    row = {"steps": trainer.args.max_steps, "flops": step * trainer.args.max_steps}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    held_out = {bare_name(name): value for name, value in trainer.evaluate().items() if not is_bookkeeping(name)}
    trainer.save_model()
    return row | {"held_out": held_out}


class Exams(NamedTuple):
    """What a trained encoder is judged by: texts and labels by task and split, and minimal pairs."""

    tasks: dict[str, dict[str, tuple[list[str], list[int]]]]
    pairs: list[MinimalPair]


def read_exams(args: QualityArguments) -> Exams:
    """Read them all, before anything is trained."""
    folder = Path(args.data_dir)
    tasks: dict[str, dict[str, tuple[list[str], list[int]]]] = {}
    for task, (text, label) in TASKS.items():
        tasks[task] = {}
        for split in ("train", "dev"):
            path = folder / task / f"{split}.tsv"
            if not path.is_file():
                raise InputError(
                    f"data_dir={args.data_dir} has no {path.relative_to(folder)}: it must hold sst2, cola and blimp"
                )
            rows = pd.read_csv(path, sep="\t", header=None, quoting=csv.QUOTE_NONE, keep_default_na=False)
            if split == "train":
                rows = rows.iloc[draws.permutation(len(rows), seed=0, stream="probe rows")[: args.probe_rows]]
            tasks[task][split] = rows[text].tolist(), rows[label].astype(int).tolist()
    return Exams(tasks, read_minimal_pairs(folder / "blimp", limit=args.pairs))


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exams: Exams, *, is_masked_lm: bool
) -> dict[str, Any]:
    """Measure an encoder by probes, and the model by minimal pairs."""
    row: dict[str, Any] = {}
    for task, splits in exams.tasks.items():
        (texts, labels), (others, answers) = splits["train"], splits["dev"]
        score = probe_accuracy(encode(model, tokenizer, texts), labels, encode(model, tokenizer, others), answers)
        row |= {f"{task}_accuracy": score.accuracy, f"{task}_matthews": score.matthews_correlation}
    score_texts = partial(pseudo_log_likelihoods if is_masked_lm else originality_scores, model, tokenizer)
    accuracy = pair_accuracy(score_texts, exams.pairs)
    return row | {"blimp": accuracy.mean, "blimp_fields": accuracy.fields, "blimp_paradigms": accuracy.paradigms}


def run_arm(arm: str, seed: int, args: QualityArguments, exams: Exams) -> dict[str, Any]:
    """Train an arm and judge it."""
    path = Path(args.results)
    folder = path.with_name(f"{path.stem}-runs")
    folder.mkdir(parents=True, exist_ok=True)
    data_args = DataArguments(
        train_file=args.train_file,
        validation_file=args.validation_file or None,
        document_separator=args.document_separator,
        max_corpus_bytes=args.max_corpus_bytes,
        vocab_size=args.vocab_size,
        block_size=args.block_size,
    )
    # The first process trains the tokenizer and tokenizes the text; the others find both.
    data = prepare_data(data_args, seed=seed, output_dir=folder, first=FileLock(folder / "_lock"))
    trainer = build_trainer(arm, seed, args, data, folder)
    row = {"steps": 0, "flops": 0, "seconds": 0.0} if arm == "untrained" else train(trainer, args.flops)
    model = getattr(trainer.model, trainer.model.export_parts[""])
    row |= judge(model, data.tokenizer, exams, is_masked_lm=arm == "mlm")
    return row | {"threads": torch.get_num_threads()}


# Name in the table, name in the results, what it is multiplied by, and decimal places.
COLUMNS = (
    ("SST-2 accuracy", "sst2_accuracy", 100, 1),
    ("CoLA MCC", "cola_matthews", 100, 1),
    ("CoLA accuracy", "cola_accuracy", 100, 1),
    ("BLiMP", "blimp", 100, 1),
    ("steps", "steps", 1, 0),
    ("seconds", "seconds", 1, 0),
)


def print_results(path: Path) -> None:
    """Print a table for each set of settings in the results: mean and standard deviation over the seeds, in points."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}\n")
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
        cells = [
            [arm, str(len(runs)), f"{statistics.mean(run['flops'] for run in runs):.2e}"]
            + [mean_and_spread([factor * run[name] for run in runs], places) for _, name, factor, places in COLUMNS]
            for arm, runs in by_arm.items()
            if runs
        ]
        print_table(cells, ["arm", "seeds", "FLOPs", *(title for title, *_ in COLUMNS)])


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    (args,) = parse_arguments((QualityArguments,), argv, prog=Path(__file__).name, description=__doc__ or "")
    path = Path(args.results)
    if not args.table:
        exams = read_exams(args)
        for seed, arm in itertools.product(args.seed, args.arm):
            run = partial(run_arm, arm, seed, args, exams)
            run_once(path, arm, seed, settings=args.settings(), run=run)
    print_results(path)


if __name__ == "__main__":
    sys.exit(run_program(main))
