"""The site builds strictly and without the network, and a browser needs no other site to show it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("adapt", "from_scratch", "make_it_small", "compare")
# What a browser fetches by itself, unlike the target of a link.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?([^"'\s>]+)|<link\b[^>]*?\bhref=["']?([^"'\s>]+)"""
)


def build(folder, *, cwd=ROOT):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run = build(folder)
    assert run.returncode == 0, run.stderr
    return folder


def page(site, name):
    return (site / name / "index.html").read_text(encoding="utf-8")


def test_a_broken_link_fails_the_build(tmp_path):
    for name in ("mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("hf_pretrain", "trainers", "examples", "benchmarks", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    index = tmp_path / "docs" / "index.md"
    whole = index.read_text(encoding="utf-8")
    # The first two are warnings, which come together at the end; the third one ends the build.
    for broken in ({"[gone](gone.md)": "gone.md'", "[gone](data.md#gone)": "#gone"}, {"[no](../no.py)": "no.py"}):
        index.write_text("\n\n".join([whole, *broken]), encoding="utf-8")
        run = build(tmp_path / "site", cwd=tmp_path)
        assert run.returncode != 0
        for text, message in broken.items():
            assert message in run.stderr + run.stdout, text


def test_the_first_page_has_four_doors_and_two_answers(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    start = text.index("<article")
    places = [text.index(f'href="{door}/"', start) for door in DOORS]
    assert places == sorted(places)
    assert "Why your ModernBERT conversion is broken" in text and "Why accumulation changed your loss" in text
    for door in DOORS:
        assert (site / door / "index.html").is_file()


def test_nothing_is_fetched_from_another_site(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        for found in FETCHED.findall(path.read_text(encoding="utf-8")):
            address = found[0] or found[1]
            own = address.startswith("https://hf-pretrain.github.io/")  # canonical, next and previous pages
            assert own or not re.match(r"(https?:)?//", address), f"{path.name}: {address}"


def test_formulas_need_no_script(site):
    text = page(site, "objectives")
    assert text.count("<math") > 10 and "arithmatex" not in text


def test_the_api_has_signatures_and_docstrings(site):
    trainers = page(site, "api/trainers")
    assert "MaskedLMTrainer" in trainers and "train_dataset" in trainers
    assert "[<code>" not in re.sub(r"<pre.*?</pre>", "", trainers, flags=re.DOTALL)
    arguments = page(site, "api/arguments")
    assert "Share of the tokens of each example that are selected as targets" in arguments
    assert "option(" not in arguments


def test_links_to_files_lead_to_the_repository(site):
    assert "https://github.com/hf-pretrain/hf_pretrain/blob/main/trainers/recipes/bert_base.yaml" in page(
        site, "papers"
    )
    assert (site / "llms.txt").read_text(encoding="utf-8") == (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
