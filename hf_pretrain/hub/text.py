"""From the log of a run to the text of its card: what the keys mean, which weights a number is of, and how a reader sees values.

The keys are losses, metrics of quality, or bookkeeping (`is_loss`, `is_quality`, `is_bookkeeping`, `label`). `evaluation_at` says
which numbers belong to weights. `cell`, `rows`, `metric_table` and `yaml_block` write values as Markdown, and `portable_options`
leaves the paths of the machine out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from hf_pretrain.files import plain

_BOOKKEEPING = ("time", "per_second", "epoch", "step", "steps", "samples", "tokens", "targets", "count", "flos", "mib")
_QUALITY = ("accuracy", "auc", "precision", "recall", "f1", "correlation")
_IN_FULL = {"disc": "discriminator", "qq": "query-query", "kk": "key-key", "vv": "value-value"}
_CAPITALS = {"mlm", "rtd", "plm", "nsp", "sop", "lm", "nce", "auc", "kl", "mse", "f1"}
# Marks of a row of the log whose numbers are no part of the run's course.
OTHER_DATA, OTHER_WEIGHTS = "other_data", "other_weights"
# The mean loss of predicted tokens, whose exponential is a perplexity.
_LANGUAGE_MODELS = ("mlm", "plm", "lm", "tlm", "clm")
_MOST_NATS = 20.0  # a mean loss beyond it is that of a model that has diverged
# What Markdown or HTML would take for a mark in the middle of a line. Letters on both sides leave an underscore alone, as in the
# names of files; GitHub's and the Hub's Markdown agree.
_MARKS = re.compile(r"[\\`*\[\]<>|~$&]|!(?=\[)|(?<![^\W_])_|_(?![^\W_])")
_OF_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MOST_ITEMS = 8  # of a list in a table cell
# Options that name a file or a folder, and those that name it or what lies on the Hub.
_FILES = ("_file", "_files", "_dir", "_path", "_folder", "_vectors", "_checkpoint", "config", "deepspeed")
_NAMES = ("name_or_path", "tokenizer_name", "dataset_name")
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
"""Pattern of what the Hub could call a repository."""
# An absolute path in the middle of a text, such as the value of an entry "name=path".
_PATH_WITHIN = re.compile(
    r"(?:(?<![\w.:/~-])~?/(?:[^\s/\"',;=]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\s\\\"',;=]+\\)+)([^\s/\\\"',;=]+)"
)

Row = tuple[str, ...]
"""The cells of a row of a table, as text."""


def bare_name(key: str) -> str:
    """Return a key of an evaluation row without the Trainer's prefix: "eval_mlm_loss" is "mlm_loss"."""
    return key.removeprefix("eval_")


def split_by_held_out_set(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of an evaluation by held-out set, with the keys that they have where there is one set only.

    Args:
        row: Keys and values as `Trainer.evaluate` returns them: "eval_mlm_loss", or "eval_news_mlm_loss" of the set "news".

    Returns:
        Name of the set -> its metrics; the name is "" where the sets have none.
    """
    # The Trainer times each set, so that key has no more than the name.
    names = [found[1] for key in row if (found := re.fullmatch(r"eval_(.+)_runtime", key, flags=re.DOTALL))]
    split: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in row.items():
        # Of "news" and "news_old" the longer is the right one.
        name = max((name for name in names if key.startswith(f"eval_{name}_")), key=len, default="")
        split.setdefault(name, {})[key.replace(f"eval_{name}_", "eval_", 1) if name else key] = value
    return {name: metrics for name, metrics in split.items() if metrics}


def is_foreign(row: Mapping[str, Any]) -> bool:
    """Whether a row of the log was measured on other data than the run's held-out text, or of weights of no step of it."""
    return bool(row.get(OTHER_DATA) or row.get(OTHER_WEIGHTS))


def evaluated_steps(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps whose weights were measured on the run's held-out text, in the order of the log."""
    return [row["step"] for row in log_history if _is_evaluation(row)]


def evaluation_at(log_history: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, Any]:
    """Return what was measured of the weights of a step on the run's held-out text; {} if nothing was.

    The card, its record and the report of a program all take their numbers from here.

    Args:
        log_history: Rows as in `Trainer.state.log_history`.
        step: The step; None for weights that are of no step.

    Returns:
        One row of the log, or the rows of all held-out sets in one; of two alike, the later.
    """
    rows = [row for row in log_history if row.get("step") == step and _is_evaluation(row)]
    return {key: value for row in rows for key, value in row.items()}


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    is_measured = any(key.startswith("eval_") and is_loss(key) for key in row)
    return "step" in row and is_measured and not is_foreign(row)


def with_perplexity(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with the perplexity behind each loss of a language model, where none was measured."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        found[key] = value
        model = key.removesuffix("_loss").rpartition("_")[2] if key.endswith("_loss") else ""
        has_one = any(name.endswith("perplexity") for name in metrics)
        if model in _LANGUAGE_MODELS and not has_one and isinstance(value, (int, float)) and value < _MOST_NATS:
            found[f"{key.removesuffix('_loss')}_perplexity"] = math.exp(value)
    return found


def is_bookkeeping(key: str) -> bool:
    """Whether the key counts or times the run instead of measuring the model."""
    return bare_name(key).endswith(_BOOKKEEPING)


def is_loss(key: str) -> bool:
    """Whether the key is a loss: "loss" itself, the weighted total, or a component such as "mlm_loss"."""
    return bare_name(key) == "loss" or bare_name(key).endswith("_loss")


def is_quality(key: str) -> bool:
    """Whether the key is a metric of quality that lies between 0 and 1, such as an accuracy or an AUC."""
    return bare_name(key).endswith(_QUALITY)


def label(key: str) -> str:
    """Return the key as a reader says it: "eval_mlm_loss" is "MLM loss", "loss" is "Total loss"."""
    name = bare_name(key)
    if name == "loss":
        return "Total loss"
    words = [word.upper() if word in _CAPITALS else _IN_FULL.get(word, word) for word in name.split("_") if word]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def without_folders(value: Any) -> Any:
    """Return a plain value in which absolute paths keep only their last part: the others describe the machine."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if _is_path(value) else _PATH_WITHIN.sub(r"\1", value)


def portable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a run without the folders of its machine, for others to read.

    Files and folders keep only their last part, also where they are named from the working directory. Names of the Hub stay.

    Args:
        options: Options by name.
    """
    return {name: _portable(name, value) for name, value in plain(options).items()}


def last_part(path: str) -> str:
    """Return the last part of a path of any system; "" stays "", a root too."""
    return PureWindowsPath(path.removeprefix("file://")).name or path


def _portable(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_portable(name, item) for item in value]
    if not isinstance(value, str) or not value:
        return without_folders(value)
    if name.endswith(_NAMES) and not Path(value).exists() and hub_id(value):
        return value
    if name.endswith((*_FILES, *_NAMES)):
        # One may have the name of a language before it, or another behind it.
        return last_part(value) if _is_path(value) else re.sub(r"[^=,;]*[/\\]([^=,;])", r"\1", value.rstrip("/\\"))
    return without_folders(value)


def hub_id(name: str | None) -> str | None:
    """Return `name` if the Hub could have a repository of that name; a local path is of no use to a reader."""
    return name if name and re.fullmatch(HUB_NAME, name) else None


def _is_path(text: str) -> bool:
    path = text.removeprefix("file://")
    return PurePath(path).is_absolute() or PureWindowsPath(path).is_absolute() or path.startswith(("~/", "../"))


def number(value: float) -> str:
    """Return a number for a reader: whole numbers in groups of three digits, others with four significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: "1 d 4 h", "2 h 5 min", "3 min 20 s", "12.5 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size} {lower}"
    return f"{whole} s"


def cell(value: Any) -> str:
    """Return a value as the text of one table cell; "" for nothing."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, list):
        shown = [text for text in map(cell, value[:_MOST_ITEMS]) if text]
        return ", ".join(shown) + (f" and {len(value) - _MOST_ITEMS} more" if len(value) > _MOST_ITEMS else "")
    return escaped(str(value))


def escaped(text: str) -> str:
    """Return a text of the user as Markdown that shows it letter by letter, in one line of a table, a list or a sentence."""
    line = re.sub(r"[\s\x00-\x1f\x7f\u2028\u2029]+", " ", text).strip()
    line = _MARKS.sub(lambda mark: _OF_HTML.get(mark[0], f"\\{mark[0]}"), line)
    # A line that begins like a heading, a list or a quote would be one where the text stands first.
    return re.sub(r"^(\d*)([#+.)-])(?=\s)", r"\1\\\2", line)


def rows(table: Mapping[str, Any], *, as_is: bool = False) -> list[Row]:
    """Return (name, value) rows of what has a value; names are made readable unless they are to stay as they are."""
    pairs = [(cell(name if as_is else _readable(name)), cell(value)) for name, value in table.items()]
    return [(name, text) for name, text in pairs if text]


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row of `Trainer.evaluate`: no bookkeeping, no total that has one component only."""
    found = {key: plain(value) for key, value in metrics.items() if not is_bookkeeping(key)}
    found = {key: value for key, value in found.items() if isinstance(value, (int, float))}
    losses = [key for key in found if is_loss(key)]
    totals = [key for key in losses if key in ("loss", "eval_loss")]
    if len(losses) == 2 and len(totals) == 1 and math.isclose(*(found[key] for key in losses), rel_tol=1e-4):
        del found[totals[0]]
    return found


def metric_table(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    last_step: int | None = None,
    meanings: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return the header and the rows of a table of metrics, in the order of `after`; [] if nothing was measured.

    A side that was not measured at all has no column, and several held-out sets have a column of names.

    Args:
        before: Metrics before training.
        after: Metrics after it; their `step` is named where it is not the last one.
        last_step: The last step of the run.
        meanings: Metric -> what its number says; a column, where one of them has a sentence. A sentence stands once.
    """
    step = plain(after.get("step"))
    is_earlier = isinstance(step, int) and last_step and step < last_step
    after_title = f"At step {step:,}" if is_earlier else "After training"
    sides = {"Before training": _by_set(before), after_title: _by_set(after)}
    sides = {title: metrics for title, metrics in sides.items() if metrics}
    keys = dict.fromkeys(key for metrics in reversed(sides.values()) for key in metrics)
    has_sets = any(name for name, _ in keys)
    body = [
        (
            *((cell(name),) if has_sets else ()),
            cell(label(key)),
            *(number(side[name, key]) if (name, key) in side else "not measured" for side in sides.values()),
        )
        for name, key in keys
    ]
    table: list[Row] = [(*(("Held-out set",) if has_sets else ()), "Metric", *sides), *body] if body else []
    names = [bare_name(key) for _, key in keys]
    sentences = [(meanings or {}).get(name, "") * (name not in names[:i]) for i, name in enumerate(names)]
    if not any(sentences):
        return table
    return [(*row, text) for row, text in zip(table, ["What it says", *sentences], strict=True)]


_OF_A_PHASE = ("name", "start", "end")


def phase_table(phases: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the header and the rows of a table of the phases of a run; [] of a run without.

    Args:
        phases: Each with "name", "start" and "end" in steps, and what tells it from others.
    """
    names = dict.fromkeys(name for phase in phases for name in phase if name not in _OF_A_PHASE)
    # Of these a column is shown where it says something.
    usual = {
        "shape": "linear",
        "gradient_accumulation_steps": 1,
        "block_mode": phases[0].get("block_mode") if phases else "",
    }
    shown = [name for name in names if name not in usual or any(phase.get(name) != usual[name] for phase in phases)]
    titles = {"per_device_train_batch_size": "Batch a device", "mlm_probability": "Mask rate", "rope_theta": "RoPE θ"}
    titles |= {"max_position_embeddings": "Longest sequence"}
    header = ("Phase", "Steps", *(titles.get(name, _readable(name)) for name in shown))
    body = [
        (
            cell(phase["name"]),
            f"{phase['start'] + 1:,} to {phase['end']:,}",
            *(cell(without_folders(phase.get(name))) or "–" for name in shown),
        )
        for phase in map(_named_by_last_part, phases)
    ]
    return [header, *body] if body else []


def _named_by_last_part(phase: Mapping[str, Any]) -> dict[str, Any]:
    text = [last_part(file) if isinstance(file, str) else file for file in phase.get("text", ())]
    return dict(phase) | ({"text": text} if text else {})


def phase_metrics(log_history: Sequence[Mapping[str, Any]], phases: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the header and the rows of a table of what was measured at the begin of a run and at the end of each phase.

    Each column is measured as its phase masks and cuts its own held-out text; the begin as the first phase does.

    Args:
        log_history: Rows as in `Trainer.state.log_history`.
        phases: As of [`phase_table`].
    """
    if not phases:
        return []
    first = phases[0]
    columns = {f"Begin, as in {cell(first['name'])}": first["start"]} if not first["start"] else {}
    columns |= {f"End of {cell(phase['name'])}": phase["end"] for phase in phases}
    sides = {title: _by_set(evaluation_at(log_history, step)) for title, step in columns.items()}
    sides = {title: metrics for title, metrics in sides.items() if metrics}
    keys = dict.fromkeys(key for metrics in reversed(sides.values()) for key in metrics)
    body = [
        (
            f"{cell(name)}: {cell(label(key))}" if name else cell(label(key)),
            *(number(side[name, key]) if (name, key) in side else "–" for side in sides.values()),
        )
        for name, key in keys
    ]
    return [("Metric", *sides), *body] if body else []


def _by_set(metrics: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return the value of each metric of each held-out set, "" being the name of a single one."""
    sets = split_by_held_out_set(metrics)
    return {(name, key): value for name, row in sets.items() for key, value in with_perplexity(measured(row)).items()}


def size_table(sizes: Mapping[str, Mapping[str, int]]) -> list[Row]:
    """Return the header and the rows of a table of sizes, a column for each model.

    Args:
        sizes: Of each model by its name, "" being the one at the root: sizes by what they are.
    """
    names = dict.fromkeys(name for found in sizes.values() for name in found)
    header = ("Size", *("this model" if not name else cell(name.rpartition("/")[2]) for name in sizes))
    return [
        header,
        *((_readable(name), *(cell(found.get(name)) or "–" for found in sizes.values())) for name in names),
    ]


def yaml_block(options: Mapping[str, Any], *, keep_empty: bool = False) -> str:
    """Return options as YAML in their order; "" if none is left.

    Args:
        options: The options.
        keep_empty: Whether those that have no value are among them.
    """
    import yaml

    chosen = {name: value for name, value in plain(options).items() if keep_empty or value is not None}
    # Unbroken lines: one that a long text is broken into might begin like the end of the block.
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=10**6).strip() if chosen else ""


def _readable(name: str) -> str:
    text = name.replace("held_out", "held-out").replace("_", " ").strip()
    return text[:1].upper() + text[1:]
