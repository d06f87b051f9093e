"""Curves: what of a log is drawn, and that the pictures show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from hf_pretrain.hub import plots
from hf_pretrain.hub.plots import plot_training, training_figures

pytestmark = pytest.mark.usefixtures("own_pictures")

LOG: list[dict[str, Any]] = [
    {"eval_loss": 45.0, "eval_mlm_loss": 9.0, "eval_rtd_loss": 0.72, "eval_rtd_auc": 0.5, "step": 0},
    {"loss": 40.0, "mlm_loss": 8.0, "rtd_loss": 0.64, "learning_rate": 1e-4, "grad_norm": 3.0, "step": 10},
    {
        "loss": 30.0,
        "mlm_loss": 7.0,
        "rtd_loss": 0.46,
        "learning_rate": 2e-4,
        "num_tokens": 9,
        "peak_memory_mib": 9.0,
        "step": 20,
    },
    {
        "eval_loss": 29.0,
        "eval_mlm_loss": 6.5,
        "eval_rtd_loss": 0.45,
        "eval_rtd_auc": 0.7,
        "eval_runtime": 1,
        "step": 20,
    },
    {"train_loss": 35.0, "train_runtime": 9.0, "total_flos": 1.0, "epoch": 0.2, "step": 20},
]


def _curves(log: list[dict[str, Any]]) -> dict[str, dict[str, plots.Curve]]:
    return {figure.file: {curve.name: curve for curve in figure.curves} for figure in training_figures(log)}


def test_a_log_is_sorted_into_figures_and_series() -> None:
    figures = _curves(LOG)
    assert {file: list(curves) for file, curves in figures.items()} == {
        "loss.png": ["loss", "mlm_loss", "rtd_loss"],
        "quality.png": ["rtd_auc"],
        "learning_rate.png": ["learning_rate"],
    }
    assert figures["loss.png"]["loss"].train == {10: 40.0, 20: 30.0}, "the summary row is not a point of the curve"
    assert figures["loss.png"]["mlm_loss"].held_out == {"": {0: 9.0, 20: 6.5}}
    assert figures["quality.png"]["rtd_auc"].train == {}


def test_a_single_loss_is_one_panel_whatever_its_weight() -> None:
    alone = [{"loss": 2.0, "mlm_loss": 2.000001, "step": 1}, {"eval_loss": 3.0, "eval_mlm_loss": 3.0, "step": 1}]
    weighted = [{"loss": 100.0, "rtd_loss": 2.0, "step": 1}]
    total = [{"loss": 100.0, "step": 1}]
    assert list(_curves(alone)["loss.png"]) == ["mlm_loss"]
    assert list(_curves(weighted)["loss.png"]) == ["rtd_loss"]
    assert list(_curves(total)["loss.png"]) == ["loss"]
    assert list(_curves(LOG)["loss.png"]) == ["loss", "mlm_loss", "rtd_loss"]


def test_a_warm_up_that_ends_before_the_first_row_is_in_the_curve() -> None:
    log = [{"loss": 2.0, "learning_rate": 0.5, "step": 100}]
    rates = [(1, 0.0), (5, 1.0), (100, 0.5)]
    (curve,) = next(figure for figure in training_figures(log, learning_rates=rates) if "rate" in figure.file).curves
    assert list(curve.train.items()) == [(1, 0.0), (5, 1.0), (100, 0.5)]


@pytest.mark.parametrize("mark", ["other_data", "other_weights"])
def test_what_was_measured_of_other_data_or_weights_is_no_point(mark: str) -> None:
    other = {"eval_mlm_loss": 0.1, "eval_rtd_auc": 0.9, "test_loss": 0.1, "step": 20, mark: True}
    assert training_figures([*LOG, other]) == training_figures(LOG)


def test_each_component_has_one_panel_with_all_held_out_sets(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [{"loss": 6.0 / step, "mlm_loss": 6.0 / step, "step": step} for step in (1, 2, 3)]
    for step in (0, 3):
        for name, value in (("news", 5.0), ("news_old", 3.0)):
            row = {
                f"eval_{name}_loss": value - step,
                f"eval_{name}_mlm_loss": value - step,
                f"eval_{name}_runtime": 1.0,
            }
            log.append(row | {"step": step})
    (figure,) = training_figures(log)
    (curve,) = figure.curves
    assert (curve.name, list(curve.train)) == ("mlm_loss", [1, 2, 3])
    assert curve.held_out == {"news": {0: 5.0, 3: 2.0}, "news_old": {0: 3.0, 3: 0.0}}
    pixels = _pixels(plot_training(log, tmp_path)[0])
    assert all(_shows(pixels, colour) for colour in (plots._TRAIN_COLOUR, *plots.HELD_OUT_COLOURS[:2]))


def test_steps_are_in_order_and_the_last_word_counts() -> None:
    log = [{"loss": 1.0, "step": 30}, {"loss": 3.0, "step": 10}, {"loss": 2.0, "step": 30}]
    assert list(_curves(log)["loss.png"]["loss"].train.items()) == [(10, 3.0), (30, 2.0)]


def test_values_that_are_no_numbers_are_no_points() -> None:
    log = [
        {"loss": float("nan"), "step": 1},
        {"loss": float("inf"), "step": 2},
        {"loss": "2.0", "step": 3},
        {"loss": np.float32(2.0), "step": 4},
        {"loss": 1.0},
    ]
    assert _curves(log)["loss.png"]["loss"].train == {4: 2.0}


@pytest.mark.parametrize(
    "log", [[], [{"train_loss": 1.0, "step": 5}], [{"epoch": 1.0, "eval_runtime": 2.0, "step": 5}]]
)
def test_a_log_with_nothing_to_show_makes_no_file(log: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot_training(log, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float) / 255


def _shows(pixels: np.ndarray, colour: str) -> bool:
    return bool((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.04).sum() > 20)


def test_the_pictures_are_small_and_show_training_light_and_held_out_dark(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    log = LOG + [{"loss": 30.0 + noise[i], "mlm_loss": 7 + noise[i], "step": 20 + i} for i in range(1000)]
    paths = plot_training(log, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/loss.png",
        "plots/quality.png",
        "plots/learning_rate.png",
    ]
    assert max(path.stat().st_size for path in paths) < 100_000
    loss, quality, rate = map(_pixels, paths)
    assert _shows(loss, plots._TRAIN_COLOUR) and _shows(loss, plots.HELD_OUT_COLOURS[0])
    assert not _shows(quality, plots._TRAIN_COLOUR) and _shows(quality, plots.HELD_OUT_COLOURS[0])
    assert _shows(rate, plots._TRAIN_COLOUR) and not _shows(rate, plots.HELD_OUT_COLOURS[0])


def test_places_left_over_in_the_grid_stay_empty(tmp_path: Path) -> None:
    log = [{f"{name}_loss": 1.0 / step, "step": step} for name in "abcde" for step in (1, 2, 3)]
    pixels = _pixels(plot_training(log, tmp_path)[0])
    height, width = pixels.shape[:2]
    assert (pixels[height // 2 + 10 :, 2 * width // 3 + 20 :] == 1).all(), "five panels in two rows of three"
    assert not (pixels[height // 2 + 10 :, : width // 3] == 1).all()


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (plot_training(LOG, tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second
