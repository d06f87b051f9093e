"""Hooks of mkdocs: links to files of the repository, names of the API, and formulas as MathML."""

from __future__ import annotations

import posixpath
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import hf_pretrain  # noqa: E402

_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]*)")
_NAME = re.compile(r"^::: hf_pretrain\.(\w+)$", flags=re.MULTILINE)
_MENTION = re.compile(r"\[<code>(\w+)(\.\w+)?</code>\]")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def place(name: str) -> str:
    """Return where a public name is defined, as "package.module.Name"."""
    return f"{hf_pretrain._MODULES[name]}.{name}"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn links that leave docs/ into addresses in the repository, and public names into their definitions.

    Raises:
        PluginError: If a file or a name does not exist.
    """
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def address(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[1]))
        if path.startswith("docs/"):
            return found[1]
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: the repository has no file {path}")
        return f"{config.repo_url}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"

    def definition(found: re.Match[str]) -> str:
        if found[1] not in hf_pretrain._MODULES:
            raise PluginError(f"{page.file.src_uri}: hf_pretrain has no {found[1]}; run make docs")
        return f"::: {place(found[1])}"

    return _NAME.sub(definition, _LINK.sub(address, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script, and names in docstrings into links."""

    def formula(found: re.Match[str]) -> str:
        return convert(unescape(found[2]), display="block" if found[1] == "div" else "inline")

    def mention(found: re.Match[str]) -> str:
        code = f"<code>{found[1]}{found[2] or ''}</code>"
        known = found[1] in hf_pretrain._MODULES
        return f'<autoref identifier="{place(found[1])}" optional>{code}</autoref>' if known else code

    return _MENTION.sub(mention, _FORMULA.sub(formula, html))
