"""The options that every method has: what is chosen for the user, what is refused."""

import pytest
import torch

from hf_pretrain.errors import InputError
from hf_pretrain.training import arguments as arguments_module
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import parse_arguments
from method_matrix import programs


@pytest.fixture
def make(tmp_path):
    return lambda **options: PretrainingArguments(output_dir=str(tmp_path), **options)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(arguments_module, "bf16_is_fast", lambda: request.param)
    return request.param


def test_bf16_is_chosen_where_it_is_fast(make, fast):
    args = make()
    assert args.bf16 is fast
    assert args.mixed_precision == ("bf16" if fast else "no")


@pytest.mark.parametrize("told", [True, False])
def test_what_is_told_wins(make, fast, told):
    assert make(bf16=told).bf16 is told


def test_fp16_keeps_bf16_off(make, fast):
    args = make(fp16=True)
    assert args.bf16 is False
    assert args.mixed_precision == "fp16"


def test_the_command_line_can_tell(tmp_path, fast):
    def parse(*argv):
        options = ["--output_dir", str(tmp_path), *argv]
        return parse_arguments([PretrainingArguments], options, prog="toy", description="A toy.")[0]

    assert parse().bf16 is fast
    assert parse("--bf16").bf16 is True
    assert parse("--bf16", "true").bf16 is True
    assert parse("--bf16", "false").bf16 is False


def test_without_an_accelerator_the_cpu_is_used_without_being_named(make, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    args = make(bf16=True)
    assert args.use_cpu and args.device.type == "cpu" and args.bf16


def test_with_an_accelerator_the_cpu_is_not_forced(make, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert not make(bf16=False).use_cpu
    assert make(bf16=False, use_cpu=True).use_cpu


def test_columns_are_kept(make):
    assert make().remove_unused_columns is False
    with pytest.raises(InputError, match="remove_unused_columns=True is not supported: it would drop example ids"):
        make(remove_unused_columns=True)


def test_tokens_are_counted_once(make):
    with pytest.raises(InputError, match="num_tokens is in every log row"):
        make(include_num_input_tokens_seen="all")


def test_the_product_schedule_is_linear_only(make):
    assert make(decay_during_warmup=True).lr_scheduler_type == "linear"
    with pytest.raises(InputError, match="decay_during_warmup=True is the linear schedule's, not cosine's"):
        make(decay_during_warmup=True, lr_scheduler_type="cosine")
    assert make(lr_scheduler_type="cosine").lr_scheduler_type == "cosine"


def test_the_product_schedule_is_refused_on_the_command_line_too(tmp_path):
    """The default of rtd, with the schedule alone changed."""
    options = ["--output_dir", str(tmp_path), "--lr_scheduler_type", "cosine"]
    with pytest.raises(InputError, match="not cosine's: drop one of the two"):
        parse_arguments(programs()["rtd"].ARGUMENTS, options, prog="hf-pretrain rtd", description="")
    last = parse_arguments(
        programs()["rtd"].ARGUMENTS,
        [*options, "--decay_during_warmup", "false"],
        prog="hf-pretrain rtd",
        description="",
    )[-1]
    assert last.lr_scheduler_type == "cosine"


def test_batches_are_never_sent_from_rank_0(make):
    """Gathered targets are no column that could be cut along the batch."""
    assert make().accelerator_config.dispatch_batches is False
    assert make(accelerator_config={"split_batches": False}).accelerator_config.dispatch_batches is False


def test_defaults_suit_pre_training(make):
    args = make()
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.adam_bias_correction and not args.decay_during_warmup
    assert not args.overwrite_output_dir
    assert args.eval_on_start
