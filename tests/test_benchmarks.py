"""The benchmarks' own arithmetic: what a process cost, which tokens count, and sides that compute the same."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import stock_mlm  # noqa: E402
import training_steps  # noqa: E402
import whole_program  # noqa: E402

PARTS = {"data": "data ", "first step": "step 1/", "training": r"step (\d+)/\1 .*loss"}
# It burns CPU in itself before the first line, and in a child before the second.
PROGRAM = """
import subprocess, sys, time
def burn(seconds):
    while time.process_time() < seconds: pass
if len(sys.argv) > 1:
    burn(0.5); sys.exit()
burn(0.2); print("other", flush=True); print("data 7", flush=True)
subprocess.run([sys.executable, __file__, "child"], check=True)
print("bar\\rstep 1/12 loss 3.0", flush=True); print("step 2/12 loss 3.0", flush=True)
kept = bytearray(100 << 20)
print("step 12/12 loss 2.0", flush=True); burn(0.4)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The command of a program that prints the lines of the parts."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(path)]


class TestRunProgram:
    def test_cpu_of_each_part_and_of_children_is_counted(self, program):
        found = whole_program.run_program(program, parts=PARTS, env={})
        assert list(found.cpu_of) == [*PARTS, "export"]
        # The kernel counts in hundredths of a second.
        assert found.cpu_of["data"] >= 0.18
        assert found.cpu_of["first step"] >= 0.48
        assert found.cpu_of["export"] >= 0.05
        assert found.cpu == pytest.approx(sum(found.cpu_of.values()))
        assert found.cpu >= 0.9 <= found.wall
        assert found.memory > 100

    def test_it_is_killed_after_the_part_that_is_asked_for(self, program):
        found = whole_program.run_program(program, parts=PARTS, env={}, until="data")
        assert list(found.cpu_of) == ["data"]
        assert found.output[-1] == "data 7"
        assert found.cpu < 0.5

    def test_the_environment_is_given(self):
        command = [sys.executable, "-c", "import os; print('data', os.environ['OMP_NUM_THREADS'])"]
        found = whole_program.run_program(command, parts={"data": "data "}, env={"OMP_NUM_THREADS": "7"})
        assert "data 7" in found.output

    @pytest.mark.parametrize(
        "code", ["print('data 1')", "print('data 1\\nstep 1/1\\nstep 1/1 loss'); raise SystemExit(3)"]
    )
    def test_a_program_that_fails_or_leaves_a_part_out_is_refused(self, code):
        with pytest.raises(RuntimeError, match="ended with"):
            whole_program.run_program([sys.executable, "-c", code], parts=PARTS, env={})


@pytest.mark.parametrize(("steps", "rows"), [(1, 4), (2, 8), (3, 10), (4, 14), (6, 20), (7, 24)])
def test_rows_seen_know_the_short_batch_of_an_epoch(steps, rows):
    assert stock_mlm.rows_seen(10, batch_size=4, steps=steps) == rows


def test_tokens_of_the_stock_side_leave_the_first_step_out(tmp_path):
    found = whole_program.Measured(output=["data 80", "plan 10", "{'loss': 1}", "tokens 5120"])
    assert whole_program.tokens_of("stock", found, tmp_path) == (5120, 4608)


def test_text_is_cut_at_a_paragraph_and_read_packed_or_not(tmp_path):
    import lzma  # noqa: PLC0415

    text = b"one\ntwo\n\nthree\n\nfour\n"
    (tmp_path / "train.txt").write_bytes(text)
    with lzma.open(tmp_path / "valid.txt.xz", "wb") as file:
        file.write(text)
    for name in ("train", "valid"):
        whole_program.write_text(tmp_path / f"{name}.txt", tmp_path / "out.txt", 15)
        assert (tmp_path / "out.txt").read_bytes() == b"one\ntwo"


def test_both_sides_have_the_same_sizes_and_precision(tmp_path):
    args = whole_program.make_parser().parse_args(["--precision", "bf16", "--hidden_size", "128"])
    ours, stock = (
        dict(zip(words[::2], words[1::2], strict=True))
        for side in ("ours", "stock")
        for words in [[part for part in whole_program.command_of(side, tmp_path, args) if part != "-m"][2:]]
        for words in [words[words[0] == "mlm" :]]
    )
    shared = (
        "--bf16",
        "--max_steps",
        "--per_device_train_batch_size",
        "--hidden_size",
        "--num_hidden_layers",
        "--seed",
    )
    assert [ours[name] for name in shared] == [stock[name] for name in shared]
    assert ours["--block_size"] == stock["--max_seq_length"]
    assert ours["--bf16"] == "True"
    args.precision = "own"
    assert not any("--bf16" in whole_program.command_of(side, tmp_path, args) for side in ("ours", "stock"))


def test_least_is_taken_of_each_number_by_itself():
    runs = [whole_program.Measured(wall=3.0, cpu_of={"a": 1.0}), whole_program.Measured(wall=2.0, cpu_of={"a": 4.0})]
    assert whole_program.least(runs, "wall") == 2.0
    assert whole_program.least(runs, "cpu_of", "a") == 1.0


def test_electra_pytorch_asks_of_the_models_what_the_stock_side_asks():
    """The noise of its sampling differs, so only the generator's part of the losses is equal, and all products are."""
    sizes = {"batch_size": 2, "sequence_length": 32, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    args = argparse.Namespace(**sizes, bf16=False)
    sides = training_steps.steps("RTD", args)
    flops = {name: training_steps.count_flops(sides[name]) for name in ("stock", "electra_pytorch", "ours")}
    assert flops["stock"] == flops["electra_pytorch"] > flops["ours"]


def test_electra_pytorch_has_the_losses_of_the_stock_models():
    torch.manual_seed(0)
    args = argparse.Namespace(batch_size=2, sequence_length=32, hidden_size=64, num_hidden_layers=1, vocab_size=300)
    batch = training_steps.make_batch(args)
    batch["input_ids"][1, 20:], batch["labels"][1, 20:], batch["attention_mask"][1, 20:] = 0, -100, 0
    config = ElectraConfig(**training_steps.sizes(args), embedding_size=16)
    generator, discriminator = ElectraForMaskedLM(config).eval(), ElectraForPreTraining(config).eval()
    # Every token is found, so that nothing is replaced.
    wanted = F.one_hot(batch["labels"].clamp(min=0), args.vocab_size).float() * 1e4
    generator.generator_lm_head.register_forward_hook(lambda module, inputs, logits: logits * 1e-9 + wanted)
    with torch.no_grad():
        loss = float(training_steps.electra_pytorch_step(generator, discriminator, batch)())
        is_target = batch["labels"] != -100
        original = torch.where(is_target, batch["labels"], batch["input_ids"])
        inputs = {"attention_mask": batch["attention_mask"], "labels": torch.zeros_like(original)}
        assert loss == pytest.approx(50 * float(discriminator(input_ids=original, **inputs).loss), rel=1e-4)
