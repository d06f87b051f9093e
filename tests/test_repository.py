"""The repository's own files agree with each other: versions, pins, and the commands that they name."""

import os
import re
import shlex
import subprocess
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_pretrain
from helpers.left_files import LeftFiles

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def wanted():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for part in lists for line in part if not line.startswith(PROJECT["name"])]


def test_the_version_is_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation
    assert hf_pretrain.__version__ == version("hf-pretrain")
    named = [
        path.name for path in (ROOT / "hf_pretrain").rglob("*.py") if f'"{PROJECT["version"]}"' in path.read_text()
    ]
    assert not named
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licences_and_addresses_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"repo_url: {PROJECT['urls']['Repository']}\n" in site
    assert f"site_url: {PROJECT['urls']['Documentation']}\n" in site


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


TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))


def test_commands_in_the_documents_are_targets_of_the_makefile():
    for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", ".github/RELEASE.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"\bmake ([a-z][a-z-]*)\b", " ".join(re.findall(r"`[^`]+`|^    .*", text)))) <= TARGETS
        assert set(re.findall(r"^ *make ([a-z-]+)", text, flags=re.MULTILINE)) <= TARGETS


def commands_of(workflow):
    """The lines of shell that a workflow runs, and the actions that it uses."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "jobs"} <= set(workflow) and (
        True in workflow or "on" in workflow
    )  # YAML 1.1 reads "on" as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        needed = job.get("needs", [])
        assert {needed} if isinstance(needed, str) else set(needed) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step["uses"]), step
    for line in commands_of(workflow):
        program, *words = shlex.split(line)
        if program == "make":
            assert words[0] in TARGETS, line
            variables = {word.partition("=")[0] for word in words[1:]}
            assert all(re.search(rf"^{name} \?=", MAKEFILE, flags=re.MULTILINE) for name in variables), line
            plan = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
            assert plan.returncode == 0, plan.stderr
        else:
            assert program in ("git", "grep"), line


def test_the_workflows_cover_the_versions():
    tests, release = (
        yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text()) for name in ("tests", "release")
    )
    matrix = tests["jobs"]["test"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.11", "3.12", "3.13", "3.14"], "versions": ["pins", "newest", "main"]}
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    conditions = [step["if"] for step in tests["jobs"]["test"]["steps"] if "if" in step]
    assert conditions == [f"matrix.versions == '{name}'" for name in matrix["versions"]]
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"} and "password" not in str(release)


def test_the_tag_of_a_release_is_the_version():
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    (check,) = (line for line in commands_of(release) if line.startswith("grep"))
    for tag, status in ((f"v{PROJECT['version']}", 0), ("v0.0.0", 1), (PROJECT["version"].replace(".", "x"), 1)):
        run = subprocess.run(["bash", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag})
        assert run.returncode == status, tag


def test_the_script_of_the_packages_is_whole():
    path = ROOT / ".ci" / "package"
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_forms_have_what_they_need():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert set(forms) == {"bug", "objective", "config"}
    assert all(link["url"].startswith("https://") for link in forms.pop("config")["contact_links"])
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)


def test_the_hooks_before_a_commit_have_the_pins():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pins = set(map(str, PINS))
    for hook in hooks:
        assert set(hook["additional_dependencies"]) <= pins
        assert f"$(BIN)/{hook['entry'].split()[0]}" in MAKEFILE


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


def test_files_of_tests_have_names_of_their_own():
    """Two files of one name cannot be imported together: the tests have no packages."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


def test_what_a_test_leaves_in_the_root_is_named_once(tmp_path):
    (tmp_path / "README.md").touch()
    left = LeftFiles(tmp_path)
    assert left.new() == []
    (tmp_path / "results").mkdir()
    for name in (".coverage", "build", "evaluation.json", "README.md"):
        (tmp_path / name).touch()
    assert left.new() == ["evaluation.json", "results"]
    assert left.new() == []
    (tmp_path / "results").rmdir()
    assert left.new() == []
    (tmp_path / "results").mkdir()
    assert left.new() == ["results"]


def test_every_test_is_watched_for_what_it_leaves(left_files, request):
    assert left_files.folder == str(ROOT) and "leaves_no_file" in request.fixturenames
