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

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_pretrain.data import draws
from hf_pretrain.data.prepare import PreparedData, prepare_data
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
from hf_pretrain.options import option
from hf_pretrain.training.trainer import PretrainingTrainer
from results import (
    Column,
    ComparisonArguments,
    compare_arms,
    read_rows,
    sizes_of,
)

ARMS = ("untrained", "mlm", "rtd", "argmax", "masked_only")
# Columns of each task's files: text and label.
TASKS = {"sst2": (0, 1), "cola": (3, 1)}


@dataclass
class QualityArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("rtd_quality.json", "File that each run adds a row to.")
    flops: float = option(2e13, "Training budget of a run.")
    vocab_size: int = option(4096, "Tokens of the tokenizer that is trained on the text.")
    model_type: str = option(
        "modernbert", "Architecture of both models, without dropout; relative positions learn from little text."
    )
    num_hidden_layers: int = option(4, "Layers of the encoder.")
    hidden_size: int = option(128, "Its width; a head for every 32.")
    intermediate_size: int = option(256, "Width of its feed-forward layers.")
    generator_size: float = option(0.5, "The generator's share of the width.")
    generator_layers: float = option(0.25, "The generator's share of the layers.")
    probe_rows: int = option(10_000, "Most sentences that a probe is trained on.")
    pairs: int = option(100, "Minimal pairs of each paradigm.")


class SelectedTokensOnly(ReplacedTokenDetectionForPreTraining):
    """Replaced token detection whose discriminator is trained, and evaluated, at the selected tokens alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logits: torch.Tensor | None = None
        self.discriminator.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output.logits

    @staticmethod
    def count_targets(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the selected positions for both losses."""
        count = (batch["labels"] != IGNORED).sum()
        return {"mlm": count, "rtd": count}

    # A step gives all by name.
    def forward(self, *, labels: torch.Tensor, **inputs: Any) -> PretrainingOutput:  # type: ignore[override]
        """Run a step and take all that concerns the discriminator anew."""
        output = super().forward(labels=labels, **inputs)
        assert self._logits is not None
        is_selected = labels != IGNORED
        is_replaced = (output.replaced_ids != labels) & is_selected
        output.losses["rtd"] = binary_token_loss(self._logits.reshape(labels.shape), is_replaced, mask=is_selected)
        output.metrics["fake_rate"] = ExampleSum(is_replaced.sum(1).float(), output.losses["rtd"].count)
        if output.score_labels is not None:
            output.score_labels = output.score_labels.masked_fill(~is_selected, IGNORED)
        return output


def build_trainer(arm: str, seed: int, args: QualityArguments, data: PreparedData, folder: Path) -> PretrainingTrainer:
    """Put an arm's model, collator and Trainer together; the encoder has the same sizes in all."""
    sizes = sizes_of(args.hidden_size, args.num_hidden_layers, intermediate_size=args.intermediate_size)
    sizes |= {"model_type": args.model_type, "max_position_embeddings": args.block_size}
    if args.model_type == "electra":
        no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        sizes |= {"embedding_size": args.hidden_size, "config_overrides": json.dumps(no_dropout)}
    # ELECTRA's recipe for all.
    recipe: dict[str, Any] = {"adam_bias_correction": False, "adam_epsilon": 1e-6, "decay_during_warmup": True}
    training = args.training(folder / f"{arm}-{seed}", seed, **recipe)
    set_seed(seed)
    if arm == "mlm":
        model = EncoderForPreTraining.from_arguments(ModelArguments(**sizes), data.tokenizer)
        options = MaskedLMTrainingArguments(**training)
        collator = DataCollatorForMaskedLM(data.tokenizer, masking=options.masking, seed=seed)
        return MaskedLMTrainer(model, options, data_collator=collator, **data.trainer_inputs())
    generator: dict[str, Any] = {"generator_size": args.generator_size, "generator_layers": args.generator_layers}
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


def train_for(trainer: PretrainingTrainer, *, budget: float, step: float | None = None) -> dict[str, Any]:
    """Train for as many steps as the budget pays for.

    Args:
        trainer: The Trainer.
        budget: Floating-point operations.
        step: Those of a step; counted by default.
    """
    step = flops_of_a_step(trainer) if step is None else step
    trainer.args.max_steps = max(1, round(budget / step))
    begin = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - begin, 1)
    return {"steps": trainer.args.max_steps, "flops": step * trainer.args.max_steps, "seconds": seconds}


def train(trainer: PretrainingTrainer, budget: float) -> dict[str, Any]:
    """Train for as many steps as the budget pays for, evaluate and export."""
    row = train_for(trainer, budget=budget)
    held_out = {bare_name(name): value for name, value in trainer.evaluate().items() if not is_bookkeeping(name)}
    trainer.save_model()
    return row | {"held_out": held_out}


class Exams(NamedTuple):
    """What a trained encoder is judged by: texts and labels by task and split, and minimal pairs."""

    tasks: dict[str, dict[str, tuple[list[str], list[int]]]]
    pairs: list[MinimalPair]


def read_task(data_dir: str, task: str, split: str) -> tuple[list[str], list[int]]:
    """Return the sentences of a task and their labels."""
    rows = read_rows(data_dir, task, split)
    text, label = TASKS[task]
    return rows[text].tolist(), rows[label].astype(int).tolist()


def read_exams(args: QualityArguments) -> Exams:
    """Read them all."""
    folder = Path(args.data_dir)
    tasks: dict[str, dict[str, tuple[list[str], list[int]]]] = {}
    for task in TASKS:
        texts, labels = read_task(args.data_dir, task, "train")
        chosen = draws.permutation(len(texts), seed=0, stream="probe rows")[: args.probe_rows].tolist()
        train = [texts[row] for row in chosen], [labels[row] for row in chosen]
        tasks[task] = {"train": train, "dev": read_task(args.data_dir, task, "dev")}
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


def run_arm(arm: str, seed: int, args: QualityArguments) -> dict[str, Any]:
    """Train an arm and judge it."""
    exams = read_exams(args)
    folder = args.runs_folder()
    data_args = args.text_data(vocab_size=args.vocab_size)
    # The first process trains the tokenizer and tokenizes the text; the others find both.
    data = prepare_data(data_args, seed=seed, output_dir=folder, first=FileLock(folder / "_lock"))
    trainer = build_trainer(arm, seed, args, data, folder)
    row = {"steps": 0, "flops": 0, "seconds": 0.0} if arm == "untrained" else train(trainer, args.flops)
    model = getattr(trainer.model, trainer.model.export_parts[""])
    row |= judge(model, data.tokenizer, exams, is_masked_lm=arm == "mlm")
    return row | {"threads": torch.get_num_threads()}


COLUMNS = (
    Column("FLOPs", "flops", 1, None),
    Column("SST-2 accuracy", "sst2_accuracy", 100, 1),
    Column("CoLA MCC", "cola_matthews", 100, 1),
    Column("CoLA accuracy", "cola_accuracy", 100, 1),
    Column("BLiMP", "blimp", 100, 1),
    Column("steps", "steps"),
    Column("seconds", "seconds"),
)


if __name__ == "__main__":
    compare_arms(QualityArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
