"""Every method on a GPU: does it train there as on a CPU, how fast in each precision, and where does the host wait.

    python benchmarks/gpu.py [--device cuda] [--size base] [--parts anchors checks training] [--methods mlm rtd ...]
        [--precisions bf16 fp32 fp16] [--anchors ...] [--steps 10] [--seconds 150] [--output gpu]

The text is made up: words drawn by Zipf's law, each often followed by the same word. There is no dropout. The work has three
parts, and each has `--seconds`; the whole takes under eight minutes.

- anchors: models of published sizes train in bf16, without and with `torch.compile`: tokens a second, the share of the device's
  peak (the data sheet's, or that of a product of matrices), and what others published for the same size.
- checks: each method is checked with a tiny model in fp32. The program trains, evaluates and exports; the first loss and all
  gradients of the first step are compared with those of a CPU, the losses after a checkpoint with those of a run resumed from it,
  and the hidden states of the export, opened with `AutoModel`, with those of the trained model.
- training: each method trains at the chosen size in bf16, fp32 and fp16, and last, masked language modelling with activation
  checkpointing and with `torch.compile`.

A step is forward, backward and optimizer, between two synchronisations; the best counts. Peak memory is that of the device's
allocations. Waits are the operations in one forward and backward for which the host waits for the device, as PyTorch warns of
them. What fails leaves its last lines in the results and does not end the rest. Results are written after each run.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from hf_pretrain.cli import load_method
from hf_pretrain.hub.environment import hardware
from hf_pretrain.modeling.observing.profile import waits_counted
from hf_pretrain.objectives import METHODS
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import load_data, train_method
from timing import print_table

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
BLOCK_SIZE = {"tiny": 32, "base": 512}
BATCH_SIZE = {"tiny": 8, "base": 32}
WORDS = {"tiny": 500, "base": 30000, "large": 50362}
DOCUMENTS = {"tiny": 300, "base": 4000, "large": 4000}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp32": {"bf16": False},
    "fp16": {"bf16": False, "fp16": True},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "bf16, checkpointing": {"bf16": True, "activation_checkpointing": True},
    "bf16, torch.compile": {"bf16": True, "torch_compile": True},
}
PARTS = ("anchors", "checks", "training")
NO_DROPOUT = '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'
WATCHED_STEP = 2
CHECK_STEPS, CHECKPOINT = 8, 4
LAST_LINES, LINE_LENGTH = 6, 300
MOST_KEPT = 2_000_000

Results = dict[str, Any]


@dataclass(frozen=True)
class Anchor:
    """A model of a published size, and how fast others train it.

    Attributes:
        method: Name of the method.
        options: Sizes of the model.
        block: Tokens of an example.
        batch: Examples of a step.
        text: The text whose vocabulary has about the published size.
        published: Tokens a second, and the device and place of that number; None where no number is known.
    """

    method: str
    options: Mapping[str, object]
    block: int
    batch: int
    text: str = "base"
    published: tuple[float, str] | None = None


MODERNBERT = {
    "model_type": "modernbert",
    # Every third layer sees the whole row, the others 64 tokens on either side: the default.
    "config_overrides": '{"local_attention": 128, "attention_dropout": 0.0}',
}
ANCHORS = {
    "ModernBERT-base, 1024": Anchor(
        "mlm",
        MODERNBERT
        | {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152},
        block=1024,
        batch=32,
        text="large",
        published=(305e3, "H100"),
    ),
    "Ettin-17M, 1024": Anchor(
        "mlm",
        MODERNBERT | {"hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4, "intermediate_size": 384},
        block=1024,
        batch=64,
        text="large",
        published=(985e3, "H100"),
    ),
    "ELECTRA-Small, 128": Anchor(
        "rtd",
        {"hidden_size": 256, "embedding_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
        | {"intermediate_size": 1024, "config_overrides": NO_DROPOUT},
        block=128,
        batch=512,
        published=(47e3, "V100"),
    ),
    "XLNet-base, two streams, 512": Anchor("plm", SIZES["base"] | {"mem_len": 0}, block=512, batch=32),
    "DistilBERT, 512": Anchor("distil", {"num_hidden_layers": 6}, block=512, batch=64),
}


# Text and models to start from


def write_inputs(folder: Path, size: str) -> None:
    """Write a text, its tokenizer, and a teacher that has learned nothing."""
    numbers = np.random.default_rng(0)
    words = [f"w{number}" for number in range(WORDS[size])]
    shares = 1 / np.arange(1, len(words) + 1)
    after = numbers.permutation(len(words))
    documents = []
    for _ in range(DOCUMENTS[size]):
        drawn = numbers.choice(len(words), p=shares / shares.sum(), size=int(numbers.integers(40, 160)))
        follows = numbers.random(len(drawn)) < 0.5
        for position in range(1, len(drawn)):
            if follows[position]:
                drawn[position] = after[drawn[position - 1]]
        ends = [" ." if position % 12 == 11 else "" for position in range(len(drawn))]
        documents.append(" ".join(words[word] + end for word, end in zip(drawn, ends, strict=True)) + " .")
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, ".", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=BLOCK_SIZE[size], **roles)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=BLOCK_SIZE[size], initializer_range=0.1, **SIZES[size]
    )
    BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def options_of(method: str, size: str, inputs: Path) -> dict[str, object]:
    """Return the options of a method at a size, but those of precision, length and output."""
    block = BLOCK_SIZE[size]
    options: dict[str, object] = SIZES[size] | {
        "train_file": inputs / "text.txt",
        "tokenizer_name": inputs / "tokenizer",
        "validation_fraction": 0.05,
        "config_overrides": NO_DROPOUT,
        "per_device_train_batch_size": BATCH_SIZE[size],
        "per_device_eval_batch_size": BATCH_SIZE[size],
        "learning_rate": 1e-3 if size == "tiny" else 2e-4,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
    }
    if method == "recurrent-lm":
        lengths = {
            "tgt_len": block // 2,
            "mem_len": block // 2,
            "eval_tgt_len": block // 2,
            "eval_mem_len": block // 2,
        }
        return options | lengths | {"eval_clamp_len": -1}
    options["block_size"] = block
    if method == "plm":
        return options | {"config_overrides": '{"dropout": 0.0}'}
    if method == "denoise":
        # T5, the default, adds a bias to its attention and has no flash attention.
        return options | {"model_type": "bart", "config_overrides": '{"dropout": 0.0}'}
    if method == "distil":
        del options["tokenizer_name"]
        return options | {"teacher_name_or_path": inputs / "teacher", "num_hidden_layers": len_of_student(size)}
    return options | {"max_position_embeddings": block}


def len_of_student(size: str) -> int:
    """Return the layers of a student: half of its teacher's."""
    return int(SIZES[size]["num_hidden_layers"]) // 2


def command(options: dict[str, object]) -> list[str]:
    """Return options as a command line has them."""
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


# One method


class Watch(TrainerCallback):
    """Keeps the rows of a run's log, the time of its steps, its peak memory and its waits."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.on_cuda = trainer, trainer.args.device.type == "cuda"
        self.gradients: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.waits: Counter[str] = Counter()
        self.peak = self.begin = 0.0
        train = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not (self.on_cuda and len(self.seconds) == WATCHED_STEP):
                return train(*args, **kwargs)
            with waits_counted(self.waits):
                return train(*args, **kwargs)

        trainer.training_step = training_step
        trainer.add_callback(self)

    def _now(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the memory of runs before."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begin = self._now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients of the first step of a small model."""
        parameters = dict(self.trainer.model.named_parameters())
        if not self.seconds and sum(one.numel() for one in parameters.values()) < MOST_KEPT:
            self.gradients = {name: one.grad.cpu() for name, one in parameters.items() if one.grad is not None}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(self._now() - self.begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep a row of training."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.tokens.append(int(logs["num_tokens"]))
            self.peak = logs["peak_memory_mib"]

    def results(self) -> Results:
        """Return what was measured."""
        timed = [seconds for number, seconds in enumerate(self.seconds) if number > WATCHED_STEP] or self.seconds
        # The last batch of an epoch may be smaller.
        tokens = max(np.diff([0, *self.tokens]).tolist(), default=0)
        tail = self.losses[-2:]
        found = {
            "losses": self.losses,
            "falls": bool(np.isfinite(self.losses).all() and sum(tail) / len(tail) < self.losses[0]),
            "seconds": min(timed),
            "all_seconds": self.seconds,
            "tokens_per_step": tokens,
            "tokens_per_second": tokens / min(timed),
            "peak_memory_mib": self.peak,
            "attention": self.trainer.attention,
        }
        profile = self.trainer.profile
        if profile is not None and profile.flops:
            rate = profile.flops / profile.counted_tokens * found["tokens_per_second"]
            found |= {"flops_per_second": rate, "peak_flops": profile.peak, "share_of_peak": rate / profile.peak}
        return found | ({"waits": dict(self.waits.most_common())} if self.on_cuda else {})


class Method:
    """The program of a method, and its data at one size."""

    def __init__(self, name: str, size: str, inputs: Path, out: Path, device: str, **options: object) -> None:
        self.name, self.out, self.device = name, out, device
        self.options = options_of(name, size, inputs) | options
        self.method = load_method(name)
        self.data: Any = None

    def _command(self, out: str, **options: object) -> list[str]:
        shared = self.options | {"use_cpu": self.device == "cpu", "output_dir": self.out / out}
        return command(shared | options)

    def run(self, **options: object) -> tuple[Trainer, Watch]:
        """Run the whole program in fp32."""
        last: list[tuple[Trainer, Watch]] = []

        def build(data: Any, *args: Any) -> Trainer:
            trainer = self.method.build_trainer(data, *args)
            # The rehearsal builds too, before the text is read.
            last[:] = [(trainer, Watch(trainer))]
            self.data = data
            return trainer

        train_method(
            replace(self.method, build_trainer=build), self._command("program", **PRECISIONS["fp32"], **options)
        )
        return last[0]

    def train(self, *, out: str, resume: Path | None = None, **options: object) -> Watch:
        """Train with the data of the program, or load them."""
        data_args, model_args, args = parse_arguments(
            self.method.arguments, self._command(out, **options), prog=self.name, description=self.name
        )
        if self.data is None:
            load = self.method.load or load_data
            self.data = load(data_args, model_args, args, special_tokens=self.method.special_tokens)
        transformers.set_seed(args.seed)
        trainer = self.method.build_trainer(self.data, model_args, args)
        watch = Watch(trainer)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return watch


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference, relative to what is expected."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def checks(method: Method) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the checks of a method by name, to be made in this order."""
    state: dict[str, Any] = {}

    def program() -> Results:
        saving = {"save_strategy": "steps", "save_steps": CHECKPOINT, "max_steps": CHECK_STEPS}
        state["trainer"], state["watch"] = method.run(**saving)
        return state["watch"].results()

    def evaluation() -> float:
        rows = [row["eval_loss"] for row in state["trainer"].state.log_history if "eval_loss" in row]
        again = state["trainer"].evaluate()["eval_loss"]
        if not rows or not np.isfinite([*rows, again]).all():
            raise ValueError(f"evaluation losses {rows}, and then {again}")
        return again

    def export() -> float:
        return export_difference(state["trainer"])

    def cpu() -> float:
        options = PRECISIONS["fp32"] | {"use_cpu": True, "max_steps": 1}
        state["cpu"] = method.train(out="cpu", **options)
        return relative(state["watch"].losses[:1], state["cpu"].losses)

    def gradient() -> float:
        found, expected = state["watch"].gradients, state["cpu"].gradients
        if not expected or found.keys() != expected.keys():
            raise ValueError(f"gradients of {len(found)} parameters, and on the CPU of {len(expected)}")
        largest = max(float(one.abs().max()) for one in expected.values())
        return max(float((found[name] - one).abs().max()) for name, one in expected.items()) / largest

    def resume() -> float:
        checkpoint = method.out / "program" / f"checkpoint-{CHECKPOINT}"
        options = PRECISIONS["fp32"] | {"max_steps": CHECK_STEPS}
        losses = method.train(out="resumed", resume=checkpoint, **options).losses
        return relative(losses, state["watch"].losses[CHECKPOINT:])

    yield "program", program
    yield from {"eval_loss": evaluation, "export": export, "cpu": cpu, "gradient": gradient, "resume": resume}.items()


def export_difference(trainer: Trainer) -> float:
    """Return the largest difference of hidden states between the trained model and its export, over all parts."""
    largest = 0.0
    for folder, attribute in trainer.model.export_parts.items():
        part = getattr(trainer.model, attribute).eval()
        # What only training needs may be of our own making, which AutoModel does not know.
        opens = AutoModel if type(part.base_model) is not type(part) or not folder else type(part)
        opened = opens.from_pretrained(Path(trainer.args.output_dir) / folder).eval().to(trainer.args.device)
        ids = torch.arange(len(SPECIALS), len(SPECIALS) + 40, device=trainer.args.device).reshape(2, 20)
        with torch.no_grad():
            expected, found = (model(ids)[0].float() for model in (part.base_model, opened))
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max()))
    return largest


# All of it


class Bench:
    """Runs what there is time for and keeps the results in a file."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.begin = time.monotonic()
        self.path = Path(args.output) / "gpu.json"
        self.results: Results = {
            "settings": vars(args),
            "device": hardware(device_type=args.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__, "cuda": torch.version.cuda},
            "anchors": {},
            "checks": {},
            "training": {},
            "left_out": [],
        }
        self.inputs: dict[str, Path] = {}

    def text(self, size: str) -> Path:
        """Return the folder of a text, which is written when it is first needed."""
        if size not in self.inputs:
            self.inputs[size] = self.work / size
            write_inputs(self.inputs[size], size)
        return self.inputs[size]

    def all(self) -> None:
        """Measure the parts; each has its own time, and none ends the others."""
        for part in self.args.parts:
            self.begin = time.monotonic()
            {"anchors": self.anchors, "checks": self.checks, "training": self.trainings}[part]()

    def checks(self) -> None:
        """Check each method with a tiny model."""
        for name in self.args.methods:
            method = Method(name, "tiny", self.text("tiny"), self.work / "checks" / name, self.args.device)
            found = self.results["checks"].setdefault(name, {})
            for check, run in checks(method):
                self.guarded(f"{name}, {check}", run, found, check)
                if is_error(found.get("program", {})):
                    break
            del method
            free()

    def trainings(self) -> None:
        """Train each method at the chosen size, and last what masked language modelling is measured on besides."""
        for kind in self.args.precisions:
            for name in self.args.methods:
                self.train(name, {kind: PRECISIONS[kind]})
        if "mlm" in self.args.methods:
            self.train("mlm", EXTRAS)

    def anchors(self) -> None:
        """Train models of published sizes, with and without torch.compile."""
        # A CPU would take minutes to make kernels.
        backend = "eager" if self.args.device == "cpu" else "inductor"
        compiled = {"torch_compile": True, "torch_compile_backend": backend}
        for kind, options in {"bf16": {}, "bf16, torch.compile": compiled}.items():
            for name in self.args.anchors:
                run = partial(self.anchor, name, PRECISIONS["bf16"] | options, kind)
                self.guarded(f"{name}, {kind}", run, self.results["anchors"].setdefault(name, {}), kind)

    def anchor(self, name: str, options: dict[str, Any], kind: str) -> Results:
        """Train a model of a published size."""
        anchor, is_tiny = ANCHORS[name], self.args.size == "tiny"
        block, batch = (BLOCK_SIZE["tiny"], BATCH_SIZE["tiny"]) if is_tiny else (anchor.block, anchor.batch)
        own = {**anchor.options, "block_size": block, "per_device_train_batch_size": batch}
        own |= {key: value for key, value in SIZES["tiny"].items() if key in own} if is_tiny else {}
        own |= {"max_position_embeddings": block} if anchor.method in ("mlm", "rtd") else {}
        out = self.work / "anchors" / "".join(letter for letter in name + kind if letter.isalnum())
        folder, size = self.text("tiny" if is_tiny else anchor.text), "tiny" if is_tiny else "base"
        method = Method(anchor.method, size, folder, out, self.args.device, **own)
        return method.train(out="run", **options, profile=True, max_steps=self.args.steps).results()

    def train(self, name: str, kinds: dict[str, dict[str, Any]]) -> None:
        """Train a method in several ways."""
        size = self.args.size
        method = Method(name, size, self.text(size), self.work / "training" / name, self.args.device)
        found = self.results["training"].setdefault(name, {})
        for kind, options in kinds.items():
            out = kind.replace(", ", "-")

            def run(out: str = out, options: dict[str, Any] = options) -> Results:
                return method.train(out=out, **options, max_steps=self.args.steps).results()

            self.guarded(f"{name}, {kind}", run, found, kind)

    def guarded(self, what: str, run: Callable[[], Any], results: Results, name: str) -> None:
        """Run something if there is time left, and keep its result or its error."""
        begin = time.monotonic()
        if begin - self.begin > self.args.seconds:
            self.results["left_out"].append(what)
            return
        with (Path(self.args.output) / "gpu.log").open("a", encoding="utf-8") as log:
            print(f"== {what}", file=log, flush=True)
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    results[name] = run()
            except (Exception, SystemExit):
                print(traceback.format_exc(), file=log, flush=True)
                lines = traceback.format_exc().splitlines()[-LAST_LINES:]
                results[name] = {"error": [line[:LINE_LENGTH] for line in lines]}
        free()
        torch._dynamo.reset()
        outcome = "failed" if is_error(results[name]) else "done"
        print(f"{begin - self.begin:4.0f} s {what}: {outcome}", file=sys.stderr, flush=True)
        self.path.write_text(json.dumps(self.results, indent=1, default=str), encoding="utf-8")

    def print(self) -> None:
        """Print the tables, the lines that wait and what failed."""
        print(f"machine: {self.results['device']}, torch {torch.__version__}\n")
        if self.results["anchors"]:
            self.print_anchors()
        rows = []
        for name, kinds in ({name: {} for name in self.results["checks"]} | self.results["training"]).items():
            checked = self.results["checks"].get(name, {})
            fp32 = kinds.get("fp32", {}).get("seconds")
            of_program = self._training_cells(checked.get("program", {}), None)
            shown = [_number(checked.get(check)) for check in ("cpu", "gradient", "resume", "export", "eval_loss")]
            rows.append([name, "fp32, tiny", *of_program, *shown])
            rows += [[name, kind, *self._training_cells(found, fp32), *[""] * 5] for kind, found in kinds.items()]
        headers = ["method", "run", "first loss", "last loss", "falls", "ms", "tokens/s", "speed-up", "MiB", "waits"]
        if rows:
            print_table(rows, [*headers, "to CPU", "gradient", "to resumed", "to export", "eval loss"])
        for title in PARTS:
            group = self.results[title]
            for name, kinds in group.items():
                for kind, found in kinds.items():
                    if is_error(found):
                        print(f"\n{title}: {name}, {kind} failed:", *found["error"], sep="\n  ")
        waits: dict[str, list[str]] = {}
        for name, kinds in self.results["training"].items():
            for kind, found in kinds.items():
                for line, count in found.get("waits", {}).items():
                    waits.setdefault(line, []).append(f"{name} {kind} {count}")
        if waits:
            print("\nwaits by line:", *(f"- {line}: {'; '.join(at)}" for line, at in waits.items()), sep="\n")
        if self.results["left_out"]:
            print("\nleft out for time:", ", ".join(self.results["left_out"]))

    def print_anchors(self) -> None:
        """Print the models of published sizes."""
        rows: list[list[object]] = []
        for name, kinds in self.results["anchors"].items():
            published = ANCHORS[name].published
            for kind, found in kinds.items():
                if is_error(found):
                    rows.append([name, kind, "failed", *[""] * 5])
                    continue
                of_others = ["", ""]
                if published is not None and self.args.size != "tiny":
                    of_others = [f"{published[0]:,.0f} ({published[1]})", found["tokens_per_second"] / published[0]]
                share = f"{found['share_of_peak']:.1%}" if "share_of_peak" in found else ""
                rows.append(
                    [
                        name,
                        kind,
                        found["attention"],
                        found["tokens_per_second"],
                        share,
                        *of_others,
                        found["peak_memory_mib"],
                    ]
                )
        print_table(rows, ["model", "run", "attention", "tokens/s", "of peak", "published", "ratio", "MiB"])
        print()

    @staticmethod
    def _training_cells(found: Results, fp32: float | None) -> list[object]:
        if is_error(found):
            return ["failed", *[""] * 7]
        if not found:
            return [""] * 8
        losses, seconds = found["losses"], found["seconds"]
        cells: list[object] = [losses[0], losses[-1], "yes" if found["falls"] else "NO", 1e3 * seconds]
        speed_up = "" if fp32 is None else f"{fp32 / seconds:.2f}"
        waits = sum(found["waits"].values()) if "waits" in found else ""
        return [*cells, found["tokens_per_second"], speed_up, found["peak_memory_mib"], waits]


def is_error(found: object) -> bool:
    """Whether this is what is kept of a failure."""
    return isinstance(found, dict) and "error" in found


def _number(found: object) -> object:
    return "" if found is None else "failed" if is_error(found) else found


def free() -> None:
    """Give back the memory of the run before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Check and measure, and print one table."""
    known = [name for name in METHODS if name != "distil-task"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--anchors", nargs="+", choices=list(ANCHORS), default=list(ANCHORS))
    parser.add_argument("--steps", type=int, default=10, help="of each training at the chosen size")
    parser.add_argument(
        "--seconds", type=float, default=150, help="no run of a part starts later than this after the part's begin"
    )
    parser.add_argument("--output", default="gpu", help="folder of gpu.json and gpu.log")
    args = parser.parse_args()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    # A run that hangs ends all of it; what was measured is in the file.
    faulthandler.dump_traceback_later(len(args.parts) * args.seconds + 60, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        bench = Bench(args, Path(folder))
        bench.all()
        bench.print()


if __name__ == "__main__":
    main()
