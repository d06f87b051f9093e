"""The pages that a newcomer meets first: their commands and their Python run from top to bottom, on made-up text."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

from helpers.tiny_text import write_models, write_text
from hf_pretrain.cli import METHODS, RECIPES, main

DOCS = Path(__file__).parents[1] / "docs"
DOORS = ("adapt", "from_scratch", "make_it_small", "compare")
# Lines of an 80-column terminal in two screens.
TWO_SCREENS = 100
SHORT = (
    "--max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --save_strategy no --use_cpu true"
)
SIZES = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64"
SIZES += " --max_position_embeddings 64"


def blocks(page):
    """The commands and the Python of a page, in their order."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for python, indented in re.findall(
        r"^```python\n(.*?)^```$|((?:^    [^\n]*\n)+)", text, flags=re.DOTALL | re.MULTILINE
    ):
        if python:
            yield "python", python
        for line in indented.replace("\\\n", " ").splitlines():
            if line.strip().startswith("hf-pretrain "):
                yield "command", line


def shortened(command):
    """The arguments of a command, for a tiny model and two steps."""
    argv = shlex.split(command)[1:]
    method = RECIPES[argv[0]][0] if argv[0] in RECIPES else argv[0]
    if method not in METHODS:
        return argv
    if "--num_train_epochs" in argv:
        start = argv.index("--num_train_epochs")
        del argv[start : start + 2]
    argv = [*argv, *SHORT.split()]
    if method != "distil-task":
        argv += ["--block_size", "32"]
    if method not in ("distil", "distil-task") and "--model_name_or_path" not in argv:
        argv += SIZES.split() + ([] if "--tokenizer_name" in argv else ["--vocab_size", "300"])
    return argv


@pytest.mark.parametrize("page", DOORS)
def test_a_page_is_two_screens(page):
    assert len((DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines()) <= TWO_SCREENS


@pytest.mark.parametrize("page", DOORS)
def test_the_commands_and_the_python_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    write_text(tmp_path)
    write_models(tmp_path, layers=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = {"__name__": "document"}
    ran = []
    for kind, text in blocks(page):
        text = text.replace("answerdotai/ModernBERT-base", "modernbert")
        ran.append(kind)
        if kind == "python":
            exec(compile(text, page, "exec", dont_inherit=True), names)
        else:
            assert main(shortened(text)) == 0, f"{text}\n{capsys.readouterr().err[-2000:]}"
    assert ran.count("command") >= 2
    assert "python" in ran or page == "make_it_small"
