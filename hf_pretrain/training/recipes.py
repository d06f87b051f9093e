"""Recipes: flat YAML files of options, read as text that the options convert.

YAML itself would leave ``5e-4`` a string and turn ``no`` into False; so a value is kept as it was typed, and each
option converts it as it would on the command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.hub.files import write_text

# A recipe is flat; a mapping among its values has some depth, never this.
_DEEPEST, _MOST_VALUES = 16, 100_000


def read_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    """Read a recipe from a file, or from among those that come with the library.

    Args:
        name: Path of a YAML file, or the name of a packaged recipe, with or without ``.yaml``.

    Returns:
        The path, and the options by name in the file's order: text, None, a list of these, or a mapping with YAML's
        own types.

    Raises:
        InputError: If there is no such file, or it is not UTF-8 or not a flat YAML mapping of names.
    """
    path = _find_recipe(name)
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except RecursionError as error:
        raise InputError(
            f"--config {path}: nested too deeply: a recipe is flat, one `option: value` a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise InputError(f"--config {path}: a recipe is a mapping, one `option: value` a line")
    recipe: dict[str, Any] = {}
    for key, value in root.value:
        if key.value in recipe:
            raise InputError(f"--config {path}: {key.value} is given twice")
        where = f"--config {path}: {key.value}"
        _check_size(value, where)
        try:
            recipe[key.value] = _node_value(loader, value)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise InputError(f"{where} cannot be read: {one_line(error)}") from error
    return path, recipe


def _check_size(root: yaml.Node, where: str) -> None:
    """Refuse what is nested too deeply or without end, as an alias within its own anchor is, or is too much."""
    waiting, found = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        found += 1
        if depth > _DEEPEST or found > _MOST_VALUES:
            raise InputError(f"{where} is nested too deeply, or without end: give a value, a list or a mapping")
        if not isinstance(node, yaml.ScalarNode):
            parts = (part for child in node.value for part in (child if isinstance(child, tuple) else (child,)))
            waiting.extend((part, depth + 1) for part in parts)


def _find_recipe(name: str) -> Path:
    if Path(name).exists():
        return Path(name)
    folder = Path(str(files("hf_pretrain.trainers") / "recipes"))
    packaged = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in packaged:
        return packaged[stem]
    near = difflib.get_close_matches(stem, packaged, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"packaged recipes are {', '.join(packaged)}"
    raise InputError(f"--config {name}: no such file or recipe: {hint}")


def _node_value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return a scalar's text (None for null), a list of those, or a mapping with YAML's own types."""
    if isinstance(node, yaml.MappingNode):
        _retype_exponents(node)
        return loader.construct_object(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(loader, item) for item in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _retype_exponents(node: yaml.Node) -> None:
    # YAML 1.1 takes 5e-4 for text, because it has no point.
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", node.value):
            node.tag = "tag:yaml.org,2002:float"
        return
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _retype_exponents(part)


def write_recipe(options: Mapping[str, Any], path: str | Path, *, program: str) -> None:
    """Write options to a file that ``--config`` reads.

    Args:
        options: Options by name, as `hf_pretrain.training.parsing.resolved_options` returns them.
        path: The file to write.
        program: The program that the recipe is for, such as "hf-pretrain rtd".
    """
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    write_text(Path(path), f"# {program}\n{text}")
