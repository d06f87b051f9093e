"""The table and the plot of a comparison: what was measured, and nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from hf_pretrain.errors import InputError
from hf_pretrain.files import write_bytes
from hf_pretrain.hub.plots import HELD_OUT_COLOURS, style_panel
from hf_pretrain.hub.text import label
from hf_pretrain.transfer.comparison.arms import ComparisonArm
from hf_pretrain.transfer.comparison.grid import Entry, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stands at the beginning of each picture; by it a picture is known again.
_SOFTWARE, _HEADER = "hf_pretrain comparison", 1024
HEADER = ("task", "rows", "model", "strategy", "metric", "score", "±", "examples", "FLOPs", "seconds", "MiB", "rung")
_PANEL_SIZE = (4.6, 3.4)  # inches
_MOST_COLUMNS = 3
_DOTS_PER_INCH = 110


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name of each model for a table: the last part of its path where those differ."""
    last = {name: Path(name.rstrip("/")).name or name for name in models}
    return last if len(set(last.values())) == len(set(models)) else {name: name for name in models}


def table_rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the rows of the table, without the header: of each task the references, then the arms from the best on.

    Arms of a later rung come first: the scores of two rungs are of different numbers of examples.
    """
    names = short_names([arm.model for group in groups for arm in group.rungs[0]])
    rows: list[tuple[str, ...]] = []
    for group in groups:
        what = (group.task, f"{group.rows:,}")
        constant = math.fsum(group.constant) / len(group.constant)
        rows.append((*what, "", "a constant", group.metric, f"{constant:.3f}", "", "", "", "", "", ""))
        if group.tfidf is not None:
            rows.append((*what, "", "TF-IDF + linear", group.metric, *_numbers(group.tfidf), ""))
        for arm in ordered(group):
            number, entry = group.last(arm)
            rung = f"{number} of {len(group.rungs)}"
            rows.append((*what, names[arm.model], arm.name, group.metric, *_numbers(entry), rung))
    return rows


def ordered(group: Group) -> list[ComparisonArm]:
    """Return the arms of a group: by the rung they reached, then by their score there."""
    return sorted(group.rungs[0], key=lambda arm: (-group.last(arm)[0], -group.last(arm)[1].mean))


def _numbers(entry: Entry) -> tuple[str, ...]:
    spread = "" if entry.deviation is None else f"{entry.deviation:.3f}"
    flops = f"{entry.flops:.2e}" if entry.flops else ""
    memory = f"{entry.memory / 2**20:.0f}" if entry.memory else ""
    return f"{entry.mean:.3f}", spread, f"{entry.examples:,}", flops, f"{entry.seconds:.1f}", memory


def plot_comparison(groups: Sequence[Group], path: str | Path) -> Path:
    """Draw scores against FLOPs: a panel for each task and size, a line for each arm, a point for each rung.

    Args:
        groups: What `StrategyComparison.run` returned.
        path: The PNG.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(_MOST_COLUMNS, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = (_PANEL_SIZE[0] * columns, _PANEL_SIZE[1] * lines)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    picture = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout=layout, facecolor="white")
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    for panel, group in zip(panels, groups, strict=False):
        _draw(panel, group)
    for panel in panels[len(groups) :]:
        panel.remove()
    content = io.BytesIO()
    picture.savefig(content, format="png", metadata={"Software": _SOFTWARE})
    return write_bytes(Path(path), content.getvalue())


def check_plot(path: str | Path) -> None:
    """Refuse to replace a picture that no comparison has drawn.

    Raises:
        InputError: If there is a file of that name, and it is not from `plot_comparison`.
    """
    if Path(path).exists() and not (Path(path).is_file() and _SOFTWARE.encode() in Path(path).read_bytes()[:_HEADER]):
        raise InputError(f"plot={str(path)!r} is no picture of a comparison: name another, nothing of it is changed")


def _draw(panel: Axes, group: Group) -> None:
    names = short_names([arm.model for arm in group.rungs[0]])
    has_one = len(names) == 1
    for arm, colour in zip(group.rungs[0], cycle(HELD_OUT_COLOURS), strict=False):
        points = [(rung[arm].flops, rung[arm].mean, rung[arm].deviation or 0.0) for rung in group.rungs if arm in rung]
        flops, means, deviations = zip(*points, strict=True)
        name = arm.name if has_one else f"{names[arm.model]} {arm.name}"
        panel.errorbar(
            flops, means, deviations, label=name, color=colour, linewidth=1.0, marker="o", markersize=3.5, capsize=2
        )
    if group.tfidf is not None:
        panel.axhline(group.tfidf.mean, label="TF-IDF + linear", color="#555555", linestyle="--", linewidth=1.0)
    panel.set_xscale("log")
    panel.set_title(f"{group.task}, {group.rows:,} rows", fontsize=11)
    panel.set_xlabel("FLOPs of a run", fontsize=9)
    panel.set_ylabel(label(group.metric), fontsize=9)
    style_panel(panel)
    panel.legend(fontsize=7, frameon=False)
