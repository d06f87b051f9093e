"""What a program shows when it has ended: that the export opens, what was learned, where things are."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_pretrain.hub.metric_names import is_bookkeeping
from hf_pretrain.tables import print_table as print_table
from hf_pretrain.training.trainer import PretrainingTrainer


def print_report(trainer: PretrainingTrainer) -> None:
    """Open the export as a stranger would and print the held-out numbers before and after training."""
    output_dir = Path(trainer.args.output_dir)
    print(f"\nThe export in {output_dir} opens with stock transformers:")
    for model_class in (AutoModel, type(getattr(trainer.model, trainer.model.export_parts[""]))):
        print(f"  {_loading_line(model_class, output_dir)}")
    rows = held_out_rows(trainer.state.log_history)
    if rows:
        print("\nHeld-out text, before and after training:")
        print_table(rows, header=("", "before", "after"))
    print(f"\nmodel card  {output_dir / 'README.md'}")
    for plot in sorted((output_dir / "plots").glob("*.png")):
        print(f"plot        {plot}")


def held_out_rows(log_history: Sequence[dict[str, float]]) -> list[tuple[str, str, str]]:
    """Return name, value before and value after training of every held-out quantity in the log, but speeds.

    A value is empty where it was not measured: before training is step 0 and no later one.
    """
    evaluations = [row for row in log_history if any(name.startswith("eval_") for name in row)]
    last_step = max((row["step"] for row in evaluations), default=0)
    before, after = (
        # Each of several held-out sets has a row of its own.
        {name: value for row in evaluations if is_of(row["step"]) for name, value in row.items()}
        for is_of in (lambda step: step == 0, lambda step: step == last_step > 0)
    )
    names = sorted(name for name in before | after if name.startswith("eval_") and not is_bookkeeping(name))
    return [(name.removeprefix("eval_"), _number(before.get(name)), _number(after.get(name))) for name in names]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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
