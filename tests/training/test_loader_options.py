"""How batches are loaded: workers where a GPU would wait for them, pinned memory where there is one, and no warning on a CPU."""

import os
import warnings

import pytest
import torch

from helpers.method_matrix import QUIET, build, data_for, programs, tiny_model_options
from hf_pretrain.errors import InputError
from hf_pretrain.options import all_options, resolved_options
from hf_pretrain.training.arguments import PretrainingArguments, loader_workers

PROGRAMS = programs()


@pytest.fixture
def cores(monkeypatch):
    def have(count, processes=1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(count)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return have


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator that is there until transformers looks for its devices."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(PretrainingArguments, "_setup_devices", torch.device("cpu"))


@pytest.mark.parametrize(
    ("count", "processes", "expected"), [(1, 1, 0), (2, 1, 1), (16, 1, 4), (16, 8, 1), (8, 8, 0), (32, 8, 3)]
)
def test_workers_by_the_cores_of_each_process(cores, count, processes, expected):
    cores(count, processes)
    assert loader_workers() == expected


def test_none_on_a_cpu(cores, tmp_path):
    cores(16)
    args = PretrainingArguments(output_dir=str(tmp_path))
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (0, False)
    assert not args.dataloader_pin_memory


def test_workers_that_stay_and_pinned_batches_with_an_accelerator(cores, accelerator, tmp_path):
    cores(16)
    options = {"output_dir": str(tmp_path), "bf16": False}
    args = PretrainingArguments(**options)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (4, True)
    assert args.dataloader_pin_memory
    # Neither of them is the user's choice, so a recipe for another machine has none.
    assert not [name for name in resolved_options([args]) | all_options([args]) if name.endswith("_workers")]
    args.read_stream()
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (0, False)
    given = PretrainingArguments(dataloader_num_workers=2, **options)
    given.read_stream()
    assert given.dataloader_num_workers == 2 and resolved_options([given])["dataloader_num_workers"] == 2


@pytest.mark.parametrize("is_pinned", [True, False])
def test_pinned_batches_are_copied_while_the_device_computes(is_pinned, tmp_path):
    program = PROGRAMS["mlm"]
    _, model_class, args_class = program.arguments
    args = args_class(**QUIET, output_dir=str(tmp_path))
    args.dataloader_pin_memory = is_pinned
    trainer = program.build_trainer(data_for(program), model_class(**tiny_model_options(program)), args)
    assert trainer.accelerator.non_blocking == is_pinned


def test_workers_that_stay_have_to_be_some(tmp_path):
    with pytest.raises(InputError, match="set dataloader_num_workers too"):
        PretrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=0, dataloader_persistent_workers=True)


def test_no_warning_of_memory_that_is_not_pinned(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(PROGRAMS["mlm"], tmp_path, eval_strategy="steps", eval_steps=1).train()
    assert not [str(one.message) for one in caught if "pin_memory" in str(one.message)]
