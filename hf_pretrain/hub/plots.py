"""The training curves of a run, drawn from the Trainer's log: losses, learning rate and held-out quality."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_pretrain.files import plain, write_bytes
from hf_pretrain.hub.text import (
    bare_name,
    is_bookkeeping,
    is_foreign,
    is_loss,
    is_quality,
    label,
    split_by_held_out_set,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS_FOLDER = "plots"

_TRAIN_COLOUR = "#8fb8de"
HELD_OUT_COLOURS = ("#12355b", "#c4622d", "#3f7d4e", "#7b4b94", "#8a6d1c")
"""Colours of lines that are compared."""

_EXPORTED_COLOUR = "#555555"
_MOST_COLUMNS = 3
_PANEL_SIZE = (3.9, 2.9)  # inches
_DOTS_PER_INCH = 110
_PALETTE = 64  # colours of a PNG
_BANDS = ("#f3f6fa", "#e3eaf3")
_LONGEST_NAME = 22  # of a phase
_FEW_POINTS = 12  # a series this short shows its points as marks

Series = dict[int, float]


@dataclass(frozen=True)
class Curve:
    """One quantity over the optimizer steps, in training and on held-out data; either may be empty.

    Attributes:
        name: The quantity.
        train: Its values in training.
        held_out: Its values on each held-out set, by its name; that of a single set is "".
    """

    name: str
    train: Series
    held_out: dict[str, Series]


@dataclass(frozen=True)
class TrainingFigure:
    """One picture of the card.

    Attributes:
        file: Name of the PNG.
        title: What it shows, in a few words.
        curves: One panel each.
    """

    file: str
    title: str
    curves: tuple[Curve, ...]


def training_figures(
    log_history: Sequence[Mapping[str, Any]], *, learning_rates: Sequence[tuple[float, float]] = ()
) -> list[TrainingFigure]:
    """Return the figures that a log has data for.

    Args:
        log_history: Rows as in `Trainer.state.log_history`: training rows with "loss", its components ("mlm_loss",
            ...) and "learning_rate", evaluation rows with "eval_..." keys; each row has "step".
        learning_rates: (step, rate) between the rows, so that a warm-up shows that ends before the first one.

    Returns:
        Up to three figures: losses, learning rate, held-out quality.
    """
    curves = _curves([*log_history, *({"step": step, "learning_rate": rate} for step, rate in learning_rates)])
    losses = [curve for name, curve in curves.items() if is_loss(name)]
    if len(losses) == 2 and losses[0].name == "loss":
        losses = losses[1:]  # the total is this loss, times its weight
    panels = {
        "loss": losses,
        "quality": [curve for name, curve in curves.items() if is_quality(name)],
        "learning_rate": [curve for name, curve in curves.items() if name == "learning_rate"],
    }
    return [
        TrainingFigure(f"{name}.png", f"{name.replace('_', ' ').capitalize()} over the optimizer steps", tuple(chosen))
        for name, chosen in panels.items()
        if chosen
    ]


def plot_training(
    log_history: Sequence[Mapping[str, Any]],
    output_dir: Path | str,
    *,
    folder: str = PLOTS_FOLDER,
    exported_step: int | None = None,
    learning_rates: Sequence[tuple[float, float]] = (),
    phases: Sequence[tuple[str, int, int]] = (),
) -> list[Path]:
    """Draw the training curves of a run.

    Args:
        log_history: Rows as in `Trainer.state.log_history`; see [`training_figures`].
        output_dir: Folder of the card.
        folder: Folder of the pictures in it.
        exported_step: Step of the weights that are exported, to be marked where it is not the last one.
        learning_rates: See [`training_figures`].
        phases: Name, begin and end in steps of each phase; a band is drawn for each.

    Returns:
        The PNG files written, of well under 100 kB each; none if the log has nothing to show.
    """
    figures = training_figures(log_history, learning_rates=learning_rates)
    return [
        _draw(figure, Path(output_dir, folder, figure.file), exported_step=exported_step, phases=phases)
        for figure in figures
    ]


def _curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Sort the log by quantity, the total loss first; the summary row that ends a training has "train_" keys."""
    curves: dict[str, Curve] = {"loss": Curve("loss", {}, {})}
    rows = [row for row in log_history if "step" in row and not is_foreign(row)]
    # Of two rows of a step the later counts.
    for row in sorted(rows, key=lambda row: int(row["step"])):
        for held_out_set, values in split_by_held_out_set(row).items():
            for key, value in values.items():
                value = plain(value)
                if key.startswith("train_") or is_bookkeeping(key) or not _is_number(value):
                    continue
                curve = curves.setdefault(bare_name(key), Curve(bare_name(key), {}, {}))
                series = curve.held_out.setdefault(held_out_set, {}) if key.startswith("eval_") else curve.train
                series[int(row["step"])] = float(value)
    return {name: curve for name, curve in curves.items() if curve.train or curve.held_out}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw(
    figure: TrainingFigure, path: Path, *, exported_step: int | None, phases: Sequence[tuple[str, int, int]] = ()
) -> Path:
    from matplotlib.figure import Figure  # the object interface: no global state, no display, always Agg
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    rows = math.ceil(len(figure.curves) / _MOST_COLUMNS)
    columns = math.ceil(len(figure.curves) / rows)
    size = (_PANEL_SIZE[0] * columns, _PANEL_SIZE[1] * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    picture = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout=layout, facecolor="white")
    panels = list(picture.subplots(rows, columns, squeeze=False).flat)
    for panel, curve in zip(panels, figure.curves, strict=False):
        _draw_curve(panel, curve, exported_step=exported_step)
        draw_phases(panel, phases)
    for panel in panels[len(figure.curves) :]:
        panel.remove()
    pixels, small = io.BytesIO(), io.BytesIO()
    picture.savefig(pixels, format="png")
    # A third of the size.
    Image.open(pixels).convert("RGB").quantize(_PALETTE).save(small, format="png", optimize=True)
    return write_bytes(path, small.getvalue())


def style_panel(panel: Axes) -> None:
    """Give a panel the small ticks and the light grid of all pictures."""
    panel.tick_params(labelsize=8)
    panel.grid(True, color="#e6e6e6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_curve(panel: Axes, curve: Curve, *, exported_step: int | None) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lines = [(curve.train, "training", _TRAIN_COLOUR, 1.4)] if curve.train else []
    for (name, values), colour in zip(curve.held_out.items(), cycle(HELD_OUT_COLOURS), strict=False):
        lines.append((values, f"held-out: {name}" if name else "held-out", colour, 0.9))
    for values, name, colour, width in lines:
        marker = "o" if len(values) <= _FEW_POINTS or name != "training" else None
        steps, heights = list(values), list(values.values())
        panel.plot(steps, heights, label=name, color=colour, linewidth=width, marker=marker, markersize=3.5)
    if exported_step is not None:
        panel.axvline(exported_step, label="exported", color=_EXPORTED_COLOUR, linestyle="--", linewidth=1.0)
    panel.set_title(label(curve.name), fontsize=11)
    panel.set_xlabel("optimizer step", fontsize=9)
    panel.set_ylabel(_axis_title(curve.name), fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    style_panel(panel)
    if len(lines) > 1 or exported_step is not None:
        panel.legend(fontsize=8, frameon=False)


def draw_phases(panel: Axes, phases: Sequence[tuple[str, int, int]]) -> None:
    """Draw a band with its name for each phase behind the curves of a panel.

    Args:
        panel: The panel, its curves drawn.
        phases: Name, begin and end in steps of each phase.
    """
    for number, (name, start, end) in enumerate(phases):
        panel.axvspan(start, end, color=_BANDS[number % len(_BANDS)], zorder=0, linewidth=0)
        short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        # Of the panel's height, from below: a curve of losses leaves that corner free at first, and names stand upright.
        panel.annotate(
            short,
            ((start + end) / 2, 0.02),
            xycoords=panel.get_xaxis_transform(),
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=7,
            color="#777777",
        )


def _axis_title(name: str) -> str:
    if is_loss(name):
        return "loss"
    return "score, 0 to 1" if is_quality(name) else label(name).lower()
