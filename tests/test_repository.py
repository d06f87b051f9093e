"""The repository's own files agree with each other: versions, pins, and the commands that they name."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def wanted():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for part in lists for line in part if not line.startswith(PROJECT["name"])]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)


def test_every_pin_is_exact_and_named_once():
    for pin in PINS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
    assert len({canonicalize_name(pin.name) for pin in PINS}) == len(PINS)
    assert "torch==2.13.0" in map(str, PINS)


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement):
    (pin,) = (pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(requirement.name))
    assert next(iter(pin.specifier)).version in requirement.specifier


def test_the_first_screen_of_the_readme_names_the_two_commands():
    screen = "\n".join(README.splitlines()[:30])
    assert "make demo" in screen
    assert "make test" in screen


def test_commands_in_the_documents_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"\bmake ([a-z][a-z-]*)\b", " ".join(re.findall(r"`[^`]+`|^    .*", text)))) <= targets
        assert set(re.findall(r"^ *make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_continuous_integration_runs_the_test_command():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert "make test" in path.read_text(encoding="utf-8")


def test_lint_goes_before_the_tests():
    assert re.search(r"^test: lint\b", MAKEFILE, flags=re.MULTILINE)
    commands = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    order = [commands.index(tool) for tool in ("ruff check", "mypy", "codespell", "pytest")]
    assert order == sorted(order)
    assert "install" not in commands


def test_a_second_run_installs_nothing(tmp_path):
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)

    def plan():
        return subprocess.run(["make", "-n", "test"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "venv" in plan()
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert " install " in plan()  # an environment alone is not an installation
    (tmp_path / ".venv" / ".installed").touch()
    assert " install " not in plan()
    os.utime(tmp_path / "constraints.txt", (4e9, 4e9))
    assert " install " in plan()


def test_the_newest_versions_have_an_environment_of_their_own(tmp_path):
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def plan(*options):
        command = ["make", "-n", "test-newest", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert ".venv/" not in plan() and "constraints" not in plan() and "torch==2.13.0" in plan()
    assert "-m venv .venv-newest" in plan() and ".venv-newest/bin/python -m pytest" in plan()
    assert "torch==" not in plan("TORCH=torch")
    (tmp_path / ".venv-newest" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-newest" / "bin" / "python").touch()
    # What is newest is asked at each call.
    assert "-m venv" not in plan() and "install --upgrade --upgrade-strategy eager" in plan()


def test_the_other_environment_is_nobodys_concern():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert ".venv-newest" in settings["ruff"]["extend-exclude"]
    assert ".venv-newest" in settings["codespell"]["skip"].split(",")
    assert ".venv-newest/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "-path './.venv*' -prune" in MAKEFILE and "rm -rf .venv .venv-newest" in MAKEFILE


@pytest.mark.parametrize("name", ["accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers"])
def test_what_we_override_parts_of_is_asked_for_as_it_was_tested(name):
    (floor,) = (s.version for r in wanted() if r.name == name for s in r.specifier if s.operator == ">=")
    (pin,) = (
        next(iter(pin.specifier)).version for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(name)
    )
    assert pin.split(".")[:2] == floor.split(".")[:2]


def test_links_of_the_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
