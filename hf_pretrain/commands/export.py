"""Export a checkpoint of a run, as the run itself does with its last step: a stock checkpoint that transformers opens.

    hf-pretrain export my-electra/checkpoint-1000 --output_dir my-electra-1000

A checkpoint holds everything as it is trained, for a resume. This command writes the model that is shared, with its tokenizer,
and in pretraining/ what only training needs. Without --output_dir it goes to export-1000 beside the checkpoint. A folder that
holds something is refused. There is no model card: the run itself writes one at its end.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError
from hf_pretrain.files import MARKER, damaged_file, is_whole
from hf_pretrain.modeling.base import PretrainingModel
from hf_pretrain.modeling.surgery.adapters import restore_adapters
from hf_pretrain.options import option
from hf_pretrain.training.checkpointing import was_cut_off

_HEADS = {
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "none": AutoModel,
}


@dataclass
class ExportArguments:
    """Options of ``hf-pretrain export``."""

    checkpoint: str = option(help="A checkpoint-* folder of a run; it may be given without the name of the option.")
    output_dir: str | None = option(None, "Folder to write to; by default export-STEP beside the checkpoint.")


ARGUMENTS = (ExportArguments,)


def main(argv: list[str] | None = None) -> None:
    """Export from the command line; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="export", description=__doc__, first="checkpoint")
    checkpoint = Path(os.path.abspath(args.checkpoint))
    folder = checkpoint.with_name(f"export-{checkpoint.name.removeprefix('checkpoint-')}")
    if args.output_dir is not None:
        folder = Path(args.output_dir)
    name = export_checkpoint(checkpoint, folder)
    print(f"{name}  {folder}  (opens with stock transformers)")


def export_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> str:
    """Write the export of a checkpoint into a new folder, all of it or nothing.

    Args:
        checkpoint: Folder of the checkpoint, of any method.
        output_dir: Folder to write to; it does not exist, or is empty.

    Returns:
        The name of the class of the exported model.

    Raises:
        InputError: If the folder is no checkpoint, or not whole, or `output_dir` is in use.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"output_dir={str(output_dir)!r} is in use: name a folder that is empty or does not exist")
    model = load_composite(checkpoint)
    part = output_dir.with_name(output_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        model.export(part)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(part)
        os.replace(part, output_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return type(model.root).__name__


def load_composite(checkpoint: str | Path) -> PretrainingModel:
    """Return the composite of a checkpoint, in fp32 and evaluation mode; of a distillation, without its teacher.

    Raises:
        InputError: If the folder is no checkpoint, or not whole.
    """
    checkpoint = Path(checkpoint)
    given = f"checkpoint={str(checkpoint)!r}"
    if not checkpoint.is_dir():
        raise InputError(f"{given} is no folder: name a checkpoint-* folder of a run")
    model_class = _composite_class(checkpoint)
    if model_class is None:
        raise InputError(f"{given} is no checkpoint of a run of hf-pretrain: name one of its checkpoint-* folders")
    is_marked = (checkpoint / MARKER).exists()
    if was_cut_off(checkpoint) or (is_marked and not is_whole(checkpoint)):
        raise InputError(f"{given} is incomplete (killed while saving?): name another")
    if (damaged := damaged_file(checkpoint)) is not None:
        raise InputError(f"{given} is damaged ({damaged} is not as it was saved): name another")
    model = _build(model_class, model_class.config_class.from_pretrained(checkpoint))
    restore_adapters(model)
    found = model.load_state_dict(_state(checkpoint, given), strict=False)
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    if missing or found.unexpected_keys:
        first = sorted(missing or found.unexpected_keys)[0]
        raise InputError(f"{given} does not fit its own configuration ({first}): it is of another version, or damaged")
    model.tie_weights()
    return model.eval()


def _composite_class(checkpoint: Path) -> Any:
    """Return the class of a method's model by its configuration; None if that is of no method."""
    values = PreTrainedConfig.get_config_dict(checkpoint)[0] if (checkpoint / "config.json").is_file() else {}
    method = re.fullmatch(r"hf_pretrain_(\w+)", values.get("model_type", ""))
    if method is None or find_spec(f"hf_pretrain.objectives.{method[1]}") is None:
        return None
    module = import_module(f"hf_pretrain.objectives.{method[1]}.modeling")
    return getattr(module, (values.get("architectures") or [""])[0], None)


def _build(model_class: Any, config: Any) -> PretrainingModel:
    parts = []
    if "student" in config.sub_configs:
        parts = [_HEADS[config.head].from_config(config.student, dtype=torch.float32)]
        if config.head == "none" and getattr(parts[0], "pooler", None) is not None:
            parts[0].pooler = None
    built: PretrainingModel = model_class(config, *parts)
    return built


def _state(checkpoint: Path, given: str) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files:
        raise InputError(
            f"{given} has no model.safetensors: it was written in shards (FSDP, DeepSpeed); go on with the run to its last step, "
            "which exports"
        )
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{given}: {file.name} cannot be read ({error}): name another checkpoint") from error
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
