"""The tasks of an evaluation: found by name in a folder of data, or listed in a YAML file.

[`find_tasks`] turns names into [`SuiteTask`]s. What a file holds is seen from its first rows: minimal pairs, words with scores of
their similarity, questions of analogy, or a table of labelled examples with a usual header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hf_pretrain.data.text.lines import open_bytes, readable
from hf_pretrain.errors import InputError, check_choice, nearest
from hf_pretrain.tasks.files import column_names, find_label, find_texts, kind_of
from hf_pretrain.tasks.spec import TaskSpec, read_tasks, with_text_columns

How = Literal["probe", "similarity", "pairs", "words", "likelihood", "finetune", "head"]
"""The ways to measure a model on a task."""
Material = Literal["examples", "minimal pairs", "scored words", "analogies"]
"""What the files of a task hold."""

_SPLITS = {"train": ("train",), "validation": ("dev", "validation", "valid", "val")}
_TABLES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
# Tables without a header, and what their header does not say, by the name of the task.
_KNOWN: dict[str, dict[str, Any]] = {
    "sst2": {"columns": ("sentence", "label")},
    "cola": {"columns": ("source", "label", "star", "sentence"), "metric": "matthews"},
    "stsb": {"columns": ("sentence1", "sentence2", "label"), "type": "regression", "metric": "spearman"},
}
_WORD_FILES = {"wordsim": "wordsim353", "simlex": "simlex999", "analogies": "questions-words"}
_HOWS: dict[str, tuple[How, ...]] = {
    "minimal pairs": ("pairs",),
    "scored words": ("words",),
    "analogies": ("words",),
    "classification": ("probe", "finetune", "head"),
    "regression": ("probe", "finetune", "head"),
    "tokens": ("finetune", "head"),
    "choice": ("likelihood", "finetune", "head"),
    "span": ("finetune", "head"),
}
_FIRST_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """A task that models are measured on.

    Attributes:
        name: Its name in tables and cards.
        material: What its files hold.
        spec: The task of labelled examples; None of the others.
        files: The files of the others.
    """

    name: str
    material: Material
    spec: TaskSpec | None = None
    files: tuple[str, ...] = ()

    @property
    def hows(self) -> tuple[How, ...]:
        """The ways to measure it, the default first."""
        if self.spec is None:
            return _HOWS[self.material]
        is_scored_pairs = self.spec.type == "regression" and len(self.spec.text) == 2
        return (*(("similarity",) if is_scored_pairs else ()), *_HOWS[self.spec.type])

    def chosen(self, hows: Sequence[str] | None) -> tuple[How, ...]:
        """Return the ways that are asked for and measure this task; by default the first one.

        Raises:
            InputError: If none of them does.
        """
        if not hows:
            return self.hows[:1]
        for how in hows:
            check_choice(how, get_args(How), name="how")
        found = tuple(how for how in self.hows if how in hows)
        if not found:
            raise InputError(
                f"how={' '.join(hows)} does not measure the task {self.name!r}: choose {' or '.join(self.hows)}"
            )
        return found


def find_tasks(names: Iterable[str], *, data_dir: str | Path | None = None) -> list[SuiteTask]:
    """Return tasks by their names.

    Args:
        names: Names of tasks in the folder, YAML files of tasks, all of which are taken, or FILE.yaml:NAME for one of them. A
            path of a folder or a file, with a slash in it or the ending of a table, is a task that may lie anywhere.
        data_dir: Folder of the data. A task NAME is a folder NAME with train.* and dev.*, or with minimal pairs, or it is a file
            NAME.*, perhaps in a folder below. Hyphens, underscores and capitals make no difference: SST-2 is sst2. The files
            wordsim353, simlex999 and questions-words are also called wordsim, simlex and analogies. Files of a YAML file are
            relative to it too. By default "data", and the folder of a YAML file.

    Returns:
        The tasks in the order of the names.

    Raises:
        InputError: If one is not found, comes twice, or its files are of no known form.
    """
    found: dict[str, SuiteTask] = {}
    for name in names:
        for task in _named(name, data_dir):
            if task.name in found:
                raise InputError(f"tasks has {task.name!r} twice: name each task once")
            found[task.name] = task
    if not found:
        raise InputError("tasks is empty: name at least one task, or a YAML file of tasks")
    return list(found.values())


def _named(name: str, data_dir: str | Path | None) -> list[SuiteTask]:
    """Return the tasks that a name stands for."""
    if re.search(r"\.ya?ml(:|$)", name):
        return _of_yaml(name, data_dir)
    folder, path = Path("data" if data_dir is None else data_dir), Path(name)
    if "/" not in name and kind_of(name) not in (*_TABLES, ".txt"):
        return [_of_folder(name, folder)]
    if path.is_dir():
        return [_of_task_folder(path.name, path)]
    if not path.is_file():
        raise InputError(f"tasks={name!r} is no file or folder: name one, or a task of data_dir={str(folder)!r}")
    own = path.resolve().parent.name if _is_split(path) else _stem(path)
    material = _seen_material(path)
    # Of a table that is nothing else, the refusal names its columns.
    if kind_of(name) in _TABLES and (material is None or _holds_examples(own, name)):
        return [_of_tables(own, {"train": (name,)})]
    return [SuiteTask(name=own, material=material or _material(path), files=(name,))]


def _holds_examples(name: str, path: str) -> bool:
    """Whether a table has the columns of labelled examples, or those of a known task."""
    if "columns" in _KNOWN.get(_plain(name), {}):
        return True
    header = column_names(path, names=())
    return any(_columns(header, kind, name) is not None for kind in ("classification", "regression"))


def _of_yaml(name: str, data_dir: str | Path | None) -> list[SuiteTask]:
    path, _, chosen = name.rpartition(":") if re.search(r"\.ya?ml:", name) else (name, "", "")
    known = read_tasks(path, data_dir=data_dir)
    if chosen:
        check_choice(chosen, known, name=f"tasks={name}: task")
    return [
        SuiteTask(name=spec.name, material="examples", spec=with_text_columns(spec))
        for spec in known.values()
        if not chosen or spec.name == chosen
    ]


def _plain(name: str) -> str:
    """Return a name as it is compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_folder(name: str, data_dir: Path) -> SuiteTask:
    if not data_dir.is_dir():
        raise InputError(f"data_dir={str(data_dir)!r} is no folder: name that of the task {name!r}, or a YAML file")
    wanted = {_plain(name), _plain(_WORD_FILES.get(_plain(name), name))}
    entries = sorted(data_dir.iterdir())
    inner = [file for entry in entries if entry.is_dir() for file in sorted(entry.iterdir()) if file.is_file()]
    files = [entry for entry in (*entries, *inner) if entry.is_file() and _plain(_stem(entry)) in wanted]
    folders = [entry for entry in entries if entry.is_dir() and _plain(entry.name) in wanted]
    if len(files) > 1:
        raise InputError(
            f"tasks={name!r} are several files: {', '.join(map(str, files))}: keep one, or use a YAML file"
        )
    if files:
        return SuiteTask(name=name, material=_material(files[0]), files=(str(files[0]),))
    if not folders:
        known = sorted(_names_in(entries))
        near = nearest(name, known, otherwise="")
        there = f"there are {', '.join(known)}" if known else "it holds no task"
        raise InputError(
            f"tasks={name!r} is no folder or file of data_dir={str(data_dir)!r}: {' '.join(filter(None, (near, there)))}"
        )
    return _of_task_folder(name, folders[0])


def _names_in(entries: Sequence[Path]) -> set[str]:
    """Return the tasks that a folder of data has by name: folders with splits or pairs, files of words, files of pairs."""
    known = set()
    for entry in entries:
        files = [file for file in sorted(entry.iterdir()) if file.is_file()] if entry.is_dir() else [entry]
        tables = [file for file in files if kind_of(str(file)) in (*_TABLES, ".txt")]
        materials = {file: None if _is_split(file) else _seen_material(file) for file in tables}
        is_task = any(_is_split(file) or materials[file] == "minimal pairs" for file in tables)
        known |= {entry.name} if entry.is_dir() and is_task else set()
        known |= {_stem(file) for file, found in materials.items() if found and not (is_task and entry.is_dir())}
    return known


def _is_split(path: Path) -> bool:
    return any(_stem(path).lower() in stems for stems in _SPLITS.values())


def _seen_material(path: Path) -> Material | None:
    try:
        return _material(path)
    except InputError:
        return None


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _of_task_folder(name: str, folder: Path) -> SuiteTask:
    """Return the task of a folder: of minimal pairs, or of labelled examples with their splits."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and kind_of(str(path)) in _TABLES]
    splits = {
        split: tuple(str(path) for path in files if _stem(path).lower() in stems) for split, stems in _SPLITS.items()
    }
    if not any(splits.values()):
        pairs = [path for path in files if kind_of(str(path)) == ".jsonl" and _material(path) == "minimal pairs"]
        if pairs:
            return SuiteTask(name=name, material="minimal pairs", files=tuple(map(str, pairs)))
        raise InputError(
            f"tasks={name!r}: the folder {str(folder)!r} has no train.* or dev.* ({', '.join(_TABLES)}) and no minimal pairs "
            "(.jsonl): rename its files, or describe the task in a YAML file"
        )
    for split, paths in splits.items():
        if len(paths) > 1:
            raise InputError(f"tasks={name!r}: {split} is several files, {', '.join(paths)}: keep one")
    return _of_tables(name, splits)


def _of_tables(name: str, splits: dict[str, tuple[str, ...]]) -> SuiteTask:
    """Return the task of labelled examples in tables, whose columns the header or the name of the task tells."""
    known = _KNOWN.get(_plain(name), {})
    first = (splits["train"] or splits["validation"])[0]
    options: dict[str, Any] = {"type": "classification"} | known
    given = known.get("columns", ())
    header = column_names(first, names=given)
    # A table with a header of its own needs no names from here.
    is_named = _columns(header, options["type"], name) is not None
    if is_named or not given:
        options.pop("columns", None)
    found = _columns(header if is_named or not given else given, options["type"], name)
    if found is None and "type" not in known:
        # Values have names of their own.
        options["type"] = "regression"
        found = _columns(header, "regression", name)
    if found is None:
        raise InputError(
            f"tasks={name!r}: the columns of {first!r} are {', '.join(map(str, header[:6]))}, without usual names for both the "
            "texts (sentence, or sentence1 and sentence2) and the labels (label): describe the task in a YAML file"
        )
    options |= {f"{split}_file": paths for split, paths in splits.items()}
    spec = TaskSpec(name=name, text=found[0], label=found[1], **options)
    return SuiteTask(name=name, material="examples", spec=spec)


def _columns(header: Sequence[str], kind: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """Return the columns of texts and of labels of a task among those of a table, None if they have no usual names."""
    advice = f"describe the task {name!r} in a YAML file"
    text = find_texts("sequence-classification", header, advice=advice)
    label = find_label("sequence-classification", header, is_value=kind == "regression", advice=advice)
    return None if text is None or label is None else (text, label)


def _lines(path: Path) -> list[str]:
    with readable(path), open_bytes(str(path)) as file:
        lines = [line for _, line in zip(range(_FIRST_ROWS), file, strict=False)]
    return [line.decode("utf-8-sig", errors="replace").strip("\r\n") for line in lines]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _material(path: Path) -> Material:
    """Return what a file holds, as its first rows show it."""
    is_text = kind_of(str(path)) in (*_TABLES, ".txt") and kind_of(str(path)) != ".parquet"
    lines = [line for line in _lines(path) if line.strip() and not line.startswith("#")] if is_text else []
    if kind_of(str(path)) in (".jsonl", ".json"):
        row = _json(lines[0]) if lines else None
        if isinstance(row, dict) and {"sentence_good", "sentence_bad"} <= set(row):
            return "minimal pairs"
    elif lines and lines[0].startswith(":"):
        return "analogies"
    elif lines and len(re.split(r"\t|,", lines[-1])) >= 3:
        return "scored words"
    raise InputError(
        f"{str(path)!r} holds neither minimal pairs (JSON lines with sentence_good and sentence_bad), nor words with scores, nor "
        "questions of analogy: a task of labelled examples is a folder with train.* and dev.*, or is in a YAML file"
    )
