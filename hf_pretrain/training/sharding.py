"""How a composite is divided where parameters are sharded (FSDP2), and whether it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_pretrain.errors import InputError


def sharded_blocks(model: nn.Module) -> set[str]:
    """Return the names of the classes whose modules are sharded one by one: the blocks that share no parameter with others.

    Args:
        model: A composite of stock models.
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    blocks: dict[str, bool] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            is_alone = all(owners[id(parameter)] == 1 for parameter in module.parameters())
            name = type(module).__name__
            blocks[name] = blocks.get(name, True) and is_alone
    return {name for name, is_alone in blocks.items() if is_alone}


@contextmanager
def sharded_by_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Let accelerate shard each block by itself and everything else together, while this is open.

    It would make units of the word embeddings too, and of what an architecture names in `_no_split_modules`. But FSDP takes a
    parameter into one unit only, and word tables are shared: by embeddings and head, by generator and discriminator. Some are
    read outside of their module as well, which must be while they are gathered; what is in no block is gathered from the
    beginning of the forward pass to the end of the backward pass.

    Args:
        model: A composite of stock models.
    """
    named = model._no_split_modules
    model._no_split_modules = sharded_blocks(model)
    model.get_input_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings
        model._no_split_modules = named


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse a launch that asks for FSDP where accelerate leaves it out without a word: on a CPU, or for one process.

    Raises:
        InputError: If the parameters will not be shared out although that was asked for.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and getattr(accelerator.state, "fsdp_plugin", None) is None:
        raise InputError(
            "FSDP was asked for, but accelerate shares parameters out on several GPUs only, and here "
            f"num_processes={accelerator.num_processes} on device={accelerator.device.type!r}: launch with cpu.yaml, single.yaml "
            "or ddp.yaml"
        )


def check_batches(accelerator: Accelerator) -> None:
    """Refuse a launch in which processes share out each batch instead of taking turns with whole ones.

    Raises:
        InputError: If that was asked for.
    """
    if accelerator.split_batches:
        raise InputError(
            "accelerator_config: split_batches=True would make per_device_train_batch_size the batch of all processes together, "
            "and nothing here counts with that: leave it out, and divide that number by the processes"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a share of the parameters only (FSDP2, DeepSpeed's stage 3): then none can run the model alone.

    Args:
        model: The model, prepared for training.
    """
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters())
