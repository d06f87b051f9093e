"""Whole programs, `hf-pretrain mlm` against the recipe of transformers' `run_mlm.py` (stock_mlm.py): time, CPU and memory.

    python benchmarks/whole_program.py --data_dir data/books [--precision bf16] [--threads 2] [--max_steps 200] [--repeats 3]
    python benchmarks/whole_program.py --data_dir data/books --what start

Both train the same BERT with one tokenizer on the same text: `megabytes` of it to train on and `held_out_megabytes` held out,
from train.txt and valid.txt (or .txt.xz) of data_dir. Both log the first and the last step, evaluate once after training and
save the model; ours also writes its card and its plots. Each program is a process of its own, with a new cache of data sets.
By default each computes in the number format that it chooses itself: the stock program in fp32, ours in bf16 autocast where the
CPU has matrix units for it. `--precision fp32` or `bf16` is for both.

They run in turn, and the least of the repeats counts for each number. On a busy machine trust the CPU seconds.

Tokens are those of the rows without padding, special tokens included. "Training" is from the first logged step to the last, and
"tokens / CPU s" of it leaves the start of the program out. CPU seconds and memory are those of the process and its children.

`--what start` measures the time from the start of the program to the end of its first step where the data are tokenized already,
and ends the program there.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from timing import load_of_machine, options_parser, print_table

# Of each side, the line of its output that ends a part of the program; what follows the last is the rest. Training runs from
# the end of "first step" to the end of "training".
PARTS = {
    "stock": {
        "imports and data": r"data ",
        "model": r"plan ",
        "first step": r".*'loss'",
        "training": r"tokens ",
        "evaluation": r".*'eval_loss'",
    },
    "ours": {
        "imports and data": r"data ",
        "model": r"plan ",
        "first step": r"step 1/",
        "training": r"step (\d+)/\1 .*loss",
        "evaluation": r"step .* held out:",
    },
}
REST = "export"
# The number format that each program chooses itself.
OWN = "own"


@dataclass
class Measured:
    """What was measured of one run of a program.

    Attributes:
        wall: Seconds from the start of the process to its end.
        cpu: CPU seconds of the process and its children.
        memory: Peak of the resident set in MiB.
        wall_of: Seconds of each part.
        cpu_of: CPU seconds of each part.
        output: The lines of the program.
    """

    wall: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0
    wall_of: dict[str, float] = field(default_factory=dict)
    cpu_of: dict[str, float] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)


def run_program(
    command: Sequence[str], *, parts: Mapping[str, str], env: Mapping[str, str], until: str | None = None
) -> Measured:
    """Run a program and measure it.

    Args:
        command: The program and its arguments.
        parts: Of each part, the pattern of the line that ends it, in their order.
        env: Variables of the environment beside those of this process.
        until: Part after which the program is killed; None lets it end.

    Raises:
        RuntimeError: If the program fails, or a line of a part does not come.
    """
    found, waiting = Measured(), list(parts)
    begin = time.perf_counter()
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env}
    )
    last_wall = last_cpu = 0.0
    assert process.stdout is not None
    for line in _lines(process.stdout.fileno()):
        found.output.append(line)
        if waiting and re.match(parts[waiting[0]], line):
            wall, cpu = time.perf_counter() - begin, _cpu_so_far(process.pid)
            part = waiting.pop(0)
            found.wall_of[part], found.cpu_of[part] = wall - last_wall, cpu - last_cpu
            last_wall, last_cpu = wall, cpu
            if part == until:
                process.kill()
                break
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found.wall, found.cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    found.memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if until is None:
        found.wall_of[REST], found.cpu_of[REST] = found.wall - last_wall, found.cpu - last_cpu
    is_done = not waiting and process.returncode == 0 if until is None else until in found.wall_of
    if not is_done:
        shown = "\n".join(found.output[-30:])
        raise RuntimeError(f"{command} ended with {process.returncode}, before {waiting[:1]}:\n{shown}")
    return found


def _lines(descriptor: int) -> Iterator[str]:
    """Yield lines as soon as they are there; a bar of progress ends its line with a carriage return."""
    rest = b""
    while part := os.read(descriptor, 1 << 16):
        *lines, rest = re.split(rb"[\r\n]", rest + part)
        yield from (line.decode(errors="replace") for line in lines)
    yield rest.decode(errors="replace")


def _cpu_so_far(pid: int) -> float:
    """Return the CPU seconds of a process, of the children that it waited for, and of those that run."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def write_text(source: Path, target: Path, size: int) -> None:
    """Write the first paragraphs of a text file into another, so many bytes.

    Raises:
        FileNotFoundError: If there is neither the file nor the same with .xz.
    """
    packed = source.with_name(f"{source.name}.xz")
    with lzma.open(packed) if packed.exists() else source.open("rb") as file:
        text = file.read(size)
    end = text.rfind(b"\n\n")
    target.write_bytes(text[: end if end > 0 else len(text)])


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the text of both sides and train their tokenizer on it."""
    # Here, so that the numbers of this process's children are those of the programs.
    from hf_pretrain import train_tokenizer  # noqa: PLC0415

    for name, megabytes in (("train", args.megabytes), ("valid", args.held_out_megabytes)):
        write_text(Path(args.data_dir, f"{name}.txt"), folder / f"{name}.txt", round(1e6 * megabytes))
    lines = (folder / "train.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    tokenizer = train_tokenizer(lines, kind="wordpiece", vocab_size=args.vocab_size, lowercase=True)
    tokenizer.save_pretrained(folder / "tokenizer")


def command_of(side: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of a side; what is not named here has the program's default."""
    options: dict[str, object] = {
        "train_file": folder / "train.txt",
        "validation_file": folder / "valid.txt",
        "tokenizer_name": folder / "tokenizer",
        "output_dir": folder / f"model-{side}",
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "learning_rate": 5e-4,
        "logging_first_step": True,
        "logging_steps": args.max_steps,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
    }
    if args.precision != OWN:
        options["bf16"] = args.precision == "bf16"
    if side == "ours":
        program = [sys.executable, "-m", "hf_pretrain.cli", "mlm"]
        heads = max(1, args.hidden_size // 64)
        options |= {"block_size": args.sequence_length, "num_attention_heads": heads, "eval_on_start": False}
        options |= {"intermediate_size": 4 * args.hidden_size, "overwrite_output_dir": True}
        options |= {"max_position_embeddings": args.sequence_length}
    else:
        program = [sys.executable, str(Path(__file__).with_name("stock_mlm.py"))]
        options |= {"max_seq_length": args.sequence_length, "disable_tqdm": True}
    return program + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def tokens_of(side: str, measured: Measured, folder: Path) -> tuple[int, int]:
    """Return the tokens of all steps, and of all but the first."""
    if side == "ours":
        state = json.loads((folder / "model-ours" / "trainer_state.json").read_text(encoding="utf-8"))
        counts = [row["num_tokens"] for row in state["log_history"] if "num_tokens" in row]
        return counts[-1], counts[-1] - counts[0]
    total = next(int(line.split()[1]) for line in measured.output if line.startswith("tokens "))
    steps = next(int(line.split()[1]) for line in measured.output if line.startswith("plan "))
    return total, total - total // steps


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[Measured]]:
    """Run both programs in turn, the first round from the stock one on, the next one backwards."""
    runs: dict[str, list[Measured]] = {side: [] for side in PARTS}
    until = "first step" if args.what == "start" else None
    for number in range(args.repeats + (until is not None)):
        for side in list(PARTS)[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as fresh:
                cache = folder / f"cache-{side}" if until else Path(fresh)
                env = {"PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
                env |= {f"{name}_NUM_THREADS": str(args.threads) for name in ("OMP", "MKL", "RAYON")}
                found = run_program(command_of(side, folder, args), parts=PARTS[side], env=env, until=until)
            # The first round of starts fills the caches.
            if until is None or number:
                runs[side].append(found)
    return runs


def least(runs: Sequence[Measured], name: str, part: str | None = None) -> float:
    """Return the least value of some runs."""
    values = [getattr(run, name) for run in runs]
    return min(values if part is None else (value[part] for value in values))


def print_whole(runs: Mapping[str, list[Measured]], folder: Path) -> None:
    """Print the table of the programs, and that of their parts."""
    tokens = {side: tokens_of(side, runs[side][-1], folder) for side in runs}
    columns: dict[str, dict[str, float]] = {
        "wall s": {side: least(runs[side], "wall") for side in runs},
        "CPU s": {side: least(runs[side], "cpu") for side in runs},
        "MiB": {side: least(runs[side], "memory") for side in runs},
        "tokens": {side: float(tokens[side][0]) for side in runs},
    }
    for name in ("wall", "CPU"):
        key = name.lower()
        columns[f"tokens / {name} s"] = {side: tokens[side][0] / least(runs[side], key) for side in runs}
        columns[f"training, tokens / {name} s"] = {
            side: tokens[side][1] / least(runs[side], f"{key}_of", "training") for side in runs
        }
    rows: list[list[object]] = [[side, *(column[side] for column in columns.values())] for side in runs]
    rows.append(["ours / stock", *(column["ours"] / column["stock"] for column in columns.values())])
    print_table(rows, ["program", *columns])
    print("\nCPU s (wall s) of the parts")
    parts = list(runs["ours"][0].wall_of)
    rows = [
        [
            side,
            *(f"{least(runs[side], 'cpu_of', part):.1f} ({least(runs[side], 'wall_of', part):.1f})" for part in parts),
        ]
        for side in runs
    ]
    print_table(rows, ["program", *parts])


def print_start(runs: Mapping[str, list[Measured]]) -> None:
    """Print the table of the starts."""
    columns = [{side: least(runs[side], name) for side in runs} for name in ("wall", "cpu", "memory")]
    rows: list[list[object]] = [[side, *(column[side] for column in columns)] for side in runs]
    rows.append(["ours / stock", *(column["ours"] / column["stock"] for column in columns)])
    print_table(rows, ["start to first step", "wall s", "CPU s", "MiB"])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = options_parser(
        __doc__,
        megabytes=5.0,
        held_out_megabytes=0.3,
        vocab_size=30522,
        hidden_size=256,
        num_hidden_layers=4,
        batch_size=32,
        eval_batch_size=8,
        sequence_length=128,
        max_steps=200,
        threads=1,
        repeats=2,
    )
    parser.add_argument("--data_dir", default="data", help="folder with train.txt and valid.txt, or the same with .xz")
    parser.add_argument("--what", choices=("whole", "start"), default="whole", help="what to measure")
    parser.add_argument("--precision", choices=(OWN, "fp32", "bf16"), default=OWN, help="number format of both sides")
    return parser


def main() -> None:
    """Measure and print."""
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args)
        runs = measure(folder, args)
        precision = {OWN: "each in its own format", "fp32": "fp32", "bf16": "bf16 autocast"}[args.precision]
        print(
            f"{args.megabytes:g} MB, {args.max_steps} steps of {args.batch_size} x {args.sequence_length}, BERT of "
            f"{args.num_hidden_layers} x {args.hidden_size}, {precision}, {args.threads} threads, best of {args.repeats}"
        )
        print(load_of_machine())
        if args.what == "start":
            print_start(runs)
        else:
            print_whole(runs, folder)


if __name__ == "__main__":
    main()
