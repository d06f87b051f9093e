"""What a program shows when it has ended: that the export opens, what was learned, where things are."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import constants
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_pretrain.hub.card_text import measured
from hf_pretrain.hub.metric_names import (
    bare_name,
    evaluated_steps,
    evaluation_at,
    split_by_held_out_set,
    with_perplexity,
)
from hf_pretrain.tables import print_table as print_table
from hf_pretrain.training.card import adapter_names
from hf_pretrain.training.trainer import PretrainingTrainer


def print_report(trainer: PretrainingTrainer) -> None:
    """Open the export as anybody would, print the held-out numbers before and after training, and where everything is."""
    output_dir = Path(trainer.args.output_dir)
    root = getattr(trainer.model, trainer.model.export_parts[""])
    print(f"\nThe export in {output_dir} {_how_it_opens(root, output_dir)}:")
    adapters = adapter_names(root)
    for model_class in () if adapters else (AutoModel, type(root)):
        print(f"  {_loading_line(model_class, output_dir)}")
    weights_step = trainer.weights_step
    rows = held_out_rows(trainer.state.log_history, weights_step=weights_step)
    if rows:
        is_earlier = weights_step is not None and weights_step < trainer.state.global_step
        when = f"at step {weights_step:,}, which is exported" if is_earlier else "after training"
        print(f"\nHeld-out text, before and {when}:")
        print_table(rows, header=("", "before", "after"))
    print(f"\nmodel card  {output_dir / 'README.md'}")
    for plot in sorted((output_dir / "plots").glob("*.png")):
        print(f"plot        {plot}")
    if trainer.args.push_to_hub and trainer.hub_model_id:
        print(f"model page  {constants.ENDPOINT}/{trainer.hub_model_id}")


def held_out_rows(
    log_history: Sequence[dict[str, float]], *, weights_step: int | None = None
) -> list[tuple[str, str, str]]:
    """Return name, value before and value after training of every held-out quantity in the log, but speeds.

    A value is empty where it was not measured: before training is step 0 and no later one. A total that is its only component is
    left out, and language models have their perplexity.

    Args:
        log_history: Rows as in `Trainer.state.log_history`.
        weights_step: Step of the weights that are exported; by default the last one that was evaluated.
    """
    if weights_step is None:
        weights_step = max(evaluated_steps(log_history), default=0)
    before, after = (_by_name(evaluation_at(log_history, step)) for step in (0, weights_step or None))
    return [(name, _number(before.get(name)), _number(after.get(name))) for name in sorted(before | after)]


def _by_name(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the value of each metric by its name, with that of its held-out set in front where there are several."""
    return {
        f"{held_out_set}_{bare_name(key)}" if held_out_set else bare_name(key): value
        for held_out_set, row in split_by_held_out_set(metrics).items()
        for key, value in with_perplexity(measured(row)).items()
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _how_it_opens(root: PreTrainedModel, folder: Path) -> str:
    """Return how the export is opened by somebody who has only transformers."""
    if adapters := adapter_names(root):
        return (
            f"is the adapter {', '.join(adapters)} alone, without the model below it: open that with transformers, and then "
            f"model.load_adapter({str(folder)!r})"
        )
    if type(root).__module__.startswith("transformers."):
        return "opens with stock transformers"
    if any(folder.glob("*.py")):
        return "opens with transformers and the code beside it, where trust_remote_code=True is given"
    return "opens with transformers where hf_pretrain is imported"


def _loading_line(model_class: type[PreTrainedModel] | type[AutoModel], folder: Path) -> str:
    # The stock loader reports the head's weights as unexpected when only the encoder is asked for: said below in one line.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    heads = {name.split(".")[0] for name in info["unexpected_keys"]}
    fresh = {name.split(".")[0] for name in info["missing_keys"]}
    missing = f"{len(info['missing_keys'])} missing keys"
    missing += f" (the {', '.join(sorted(fresh))}, which the objective does not train)" if fresh else ""
    aside = f", the pre-training head {', '.join(sorted(heads))} set aside" if heads else ", 0 unexpected"
    return f"{model_class.__name__}.from_pretrained -> {type(model).__name__}: {missing}{aside}"


def coloured_words(words: Sequence[tuple[str, float]], *, colour: bool | None = None) -> str:
    """Return words with their probabilities made visible.

    Args:
        words: Pairs of a word and a probability.
        colour: Whether to paint the background from white to red by ANSI codes; by default if standard output is a terminal
            (or FORCE_COLOR is set, and NO_COLOR is not). Otherwise, words above one half are marked with their probability.
    """
    if colour is None:
        colour = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    if not colour:
        return " ".join(f"[{word} {probability:.2f}]" if probability >= 0.5 else word for word, probability in words)
    shades = []
    for word, probability in words:
        # The root makes small probabilities visible: a replaced token is rare, so one in five is already much.
        other = round(255 * (1 - math.sqrt(probability)))
        shades.append(f"\x1b[48;2;255;{other};{other}m\x1b[30m {word} \x1b[0m")
    return "".join(shades)
