"""The training curves of a run, drawn from the Trainer's log: losses, learning rate and held-out quality."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_pretrain.hub.card_text import plain
from hf_pretrain.hub.metric_names import bare_name, is_bookkeeping, is_loss, is_quality, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS_FOLDER = "plots"

_TRAIN_COLOUR = "#8fb8de"
_EVALUATION_COLOUR = "#12355b"
_MOST_COLUMNS = 3
_PANEL_SIZE = (3.9, 2.9)  # inches
_DOTS_PER_INCH = 110
_PALETTE = 64  # colours of a PNG
_FEW_POINTS = 12  # a series this short shows its points as marks

Series = dict[int, float]


@dataclass(frozen=True)
class Curve:
    """One quantity over the optimizer steps, in training and on held-out data; either may be empty."""

    name: str
    train: Series
    evaluation: Series


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


def training_figures(log_history: Sequence[Mapping[str, Any]]) -> list[TrainingFigure]:
    """Return the figures that a log has data for.

    Args:
        log_history: Rows as in `Trainer.state.log_history`: training rows with "loss", its components ("mlm_loss",
            ...) and "learning_rate", evaluation rows with "eval_..." keys; each row has "step".

    Returns:
        Up to three figures: losses, learning rate, held-out quality.
    """
    curves = _curves(log_history)
    losses = [curve for name, curve in curves.items() if is_loss(name)]
    if len(losses) == 2 and all(_same(total, part) for total, part in zip(*map(_both, losses), strict=True)):
        losses = losses[1:]  # a lone component is the total
    rates = [curve for name, curve in curves.items() if name == "learning_rate"]
    quality = [curve for name, curve in curves.items() if is_quality(name)]
    figures = [
        TrainingFigure("loss.png", "Loss over the optimizer steps", tuple(losses)),
        TrainingFigure("quality.png", "Quality over the optimizer steps", tuple(quality)),
        TrainingFigure("learning_rate.png", "Learning rate over the optimizer steps", tuple(rates)),
    ]
    return [figure for figure in figures if figure.curves]


def plot_training(
    log_history: Sequence[Mapping[str, Any]], output_dir: Path | str, *, folder: str = PLOTS_FOLDER
) -> list[Path]:
    """Draw the training curves of a run.

    Args:
        log_history: Rows as in `Trainer.state.log_history`; see [`training_figures`].
        output_dir: Folder of the card.
        folder: Folder of the pictures in it.

    Returns:
        The PNG files written, of well under 100 kB each; none if the log has nothing to show.
    """
    return [_draw(figure, Path(output_dir, folder, figure.file)) for figure in training_figures(log_history)]


def _curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Sort the log by quantity, the total loss first; the summary row that ends a training has "train_" keys."""
    curves: dict[str, Curve] = {"loss": Curve("loss", {}, {})}
    for row in log_history:
        for key, value in row.items():
            name, value = bare_name(key), plain(value)
            if "step" not in row or name.startswith("train_") or is_bookkeeping(key) or not _is_number(value):
                continue
            curve = curves.setdefault(name, Curve(name, {}, {}))
            (curve.evaluation if key.startswith("eval_") else curve.train)[int(row["step"])] = float(value)
    return {name: _in_order(curve) for name, curve in curves.items() if curve.train or curve.evaluation}


def _in_order(curve: Curve) -> Curve:
    return Curve(curve.name, dict(sorted(curve.train.items())), dict(sorted(curve.evaluation.items())))


def _both(curve: Curve) -> tuple[Series, Series]:
    return curve.train, curve.evaluation


def _same(one: Series, other: Series) -> bool:
    return one.keys() == other.keys() and all(math.isclose(one[step], other[step], rel_tol=1e-4) for step in one)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw(figure: TrainingFigure, path: Path) -> Path:
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
        _draw_curve(panel, curve)
    for panel in panels[len(figure.curves) :]:
        panel.remove()
    pixels = io.BytesIO()
    picture.savefig(pixels, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(pixels).convert("RGB").quantize(_PALETTE).save(path, optimize=True)  # a third of the size
    return path


def _draw_curve(panel: Axes, curve: Curve) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    series = [(curve.train, "training", _TRAIN_COLOUR, 1.4), (curve.evaluation, "held-out", _EVALUATION_COLOUR, 0.9)]
    for values, name, colour, width in series:
        if values:
            marker = "o" if len(values) <= _FEW_POINTS or name == "held-out" else None
            steps, heights = list(values), list(values.values())
            panel.plot(steps, heights, label=name, color=colour, linewidth=width, marker=marker, markersize=3.5)
    panel.set_title(label(curve.name), fontsize=11)
    panel.set_xlabel("optimizer step", fontsize=9)
    panel.set_ylabel(_axis_title(curve.name), fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.tick_params(labelsize=8)
    panel.grid(True, color="#e6e6e6", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if curve.train and curve.evaluation:
        panel.legend(fontsize=8, frameon=False)


def _axis_title(name: str) -> str:
    if is_loss(name):
        return "loss"
    return "score, 0 to 1" if is_quality(name) else label(name).lower()
