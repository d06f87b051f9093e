"""What is installed: the files of the wheel, where programs and templates are found, and how light the import is."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest

import hf_pretrain
from helpers.fresh_process import run_fresh
from hf_pretrain.cli import METHODS

ROOT = Path(__file__).parents[1]
SOURCES = ("hf_pretrain", "trainers", "model_cards", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# Packages under the names that the wheel gives them.
PACKAGES = {
    "hf_pretrain": ROOT / "hf_pretrain",
    "hf_pretrain/trainers": ROOT / "trainers",
    "hf_pretrain/model_cards": ROOT / "model_cards",
}


def kept(folder):
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """A wheel built from the copy, without the network."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_library_the_programs_and_the_cards(contents):
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in kept(folder)
    }
    assert {name for name in expected if name.endswith(".py")}
    assert contents == expected


def test_the_wheel_holds_what_its_users_look_for(contents):
    named = {"py.typed", "cli.py", "trainers/rtd.py", "trainers/mlm.py", "trainers/recipes/demo.yaml"}
    named |= {f"trainers/accelerate/{name}.yaml" for name in ("single", "cpu", "ddp", "fsdp2", "zero2", "zero3")}
    assert {f"hf_pretrain/{name}" for name in named} <= contents
    assert any(name.startswith("hf_pretrain/model_cards/") and name.endswith(".jinja") for name in contents)


def test_the_wheel_installs_one_top_level_name(wheel, contents):
    assert {name.split("/")[0] for name in contents} == {"hf_pretrain"}
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    assert "hf-pretrain = hf_pretrain.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_the_wheel_works_where_the_repository_is_not(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import hf_pretrain, importlib.resources as r, sys; assert hf_pretrain.__file__.startswith(sys.argv[1]); "
        "from hf_pretrain.options import read_recipe; path, options = read_recipe('demo'); "
        "assert str(path).startswith(sys.argv[1]) and options; "
        "assert str(r.files('hf_pretrain.model_cards')).startswith(sys.argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_the_readme_runs_from_the_wheel_where_the_repository_is_not(wheel, tmp_path):
    """`make package` does the same with pip, in environments that have nothing else."""
    installed, place = tmp_path / "installed", tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(installed)
    place.mkdir()
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    check = f"import hf_pretrain\nassert hf_pretrain.__file__.startswith({str(installed)!r})\n"
    (place / "readme.py").write_text(check + block, encoding="utf-8")
    (place / "corpus.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8") * 20, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "readme.py"], cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (place / "my-bert" / "README.md").is_file() and (place / "my-bert" / "model.safetensors").is_file()


def test_the_sdist_makes_the_same_wheel(tree, contents, tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.whl")
    assert {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name} == contents


@pytest.mark.parametrize(("package", "folder"), [("trainers", "recipes"), ("trainers", "accelerate")])
def test_the_installed_package_finds_its_data(package, folder):
    found = {entry.name for entry in (files(f"hf_pretrain.{package}") / folder).iterdir()}
    assert found == {path.name for path in (ROOT / package / folder).iterdir()}


def test_the_installed_package_finds_its_templates():
    assert {entry.name for entry in files("hf_pretrain.model_cards").iterdir()} >= {"__init__.py"}


def test_the_import_is_lazy():
    program = (
        "import sys, hf_pretrain; hf_pretrain.InputError; dir(hf_pretrain); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy', 'yaml') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


ORDERS = {
    "before": "import hf_pretrain; from transformers import AutoConfig, AutoModel",
    "after": "from transformers import AutoConfig, AutoModel; import hf_pretrain",
    # In the middle of this one the Auto classes are imported, when a model could not be imported yet.
    "in_a_circle": "import hf_pretrain; import transformers.modeling_layers; from transformers import AutoConfig, AutoModel",
    # In the middle of these they are imported too, when a model is half done.
    "by_its_package": (
        "from hf_pretrain.models.transformer_xl import TransformerXLModel; from transformers import AutoConfig, AutoModel"
    ),
    "by_its_module": (
        "from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLModel; "
        "from transformers import AutoConfig, AutoModel"
    ),
    "by_its_layers": (
        "import hf_pretrain.models.transformer_xl.layers_transformer_xl; from transformers import AutoConfig, AutoModel"
    ),
}
OPEN = """
import sys
loader = sys.modules[AutoModel.__module__].__spec__.loader
left = [thing for thing in (loader, *sys.meta_path) if type(thing).__module__.startswith("hf_pretrain")]
assert not left, left
sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
AutoModel.from_config(AutoConfig.for_model("transformer_xl", **sizes)).save_pretrained({folder!r})
print(type(AutoModel.from_pretrained({folder!r})).__name__)
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What each order of imports has printed."""
    folder = tmp_path_factory.mktemp("orders")
    programs = {name: imports + OPEN.format(folder=str(folder / name)) for name, imports in ORDERS.items()}
    return run_fresh(programs, folder)


@pytest.mark.parametrize("order", ORDERS)
def test_custom_architectures_open_whatever_is_imported_first(opened, order):
    assert opened[order] == "TransformerXLModel\n"


def modules_by_name():
    """The library's modules, programs and templates included, by the names they are imported by."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (*package.split("/"), *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements_of_an_import(body):
    """The import statements that run when a module is imported: those outside of functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements_of_an_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements_of_an_import(ast.iter_child_nodes(node))


def imported_by(name, path, known):
    """The modules of the library whose code runs before a module's own import is done."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in statements_of_an_import(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = package.rsplit(".", node.level - 1)[0] if node.level else None
            base = ".".join(filter(None, (above, node.module)))
            # Of a package either a module is taken or something that its own code has made.
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        for target in targets:
            found.add(target)
            while target := target.rpartition(".")[0]:
                # A package is imported before its modules; that it waits for its own is no circle.
                if not f"{name}.".startswith(f"{target}."):
                    found.add(target)
    return found & known.keys()


def test_the_modules_import_each_other_in_no_circle():
    """So any of them can be imported first."""
    known = modules_by_name()
    assert len(known) > 100
    graph = {name: imported_by(name, path, known) for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)


@pytest.mark.slow
def test_every_module_can_be_imported_first(tmp_path):
    program = f"""
import importlib, sys
import transformers.trainer
for name in {sorted(modules_by_name())}:
    for module in [module for module in sys.modules if module.partition(".")[0] == "hf_pretrain"]:
        del sys.modules[module]
    importlib.import_module(name)
print("all of them")
"""
    assert run_fresh({"modules": program}, tmp_path)["modules"] == "all of them\n"


def test_the_architectures_packages_have_the_names_of_their_classes():
    package = importlib.import_module("hf_pretrain.models.transformer_xl")
    for name in package.__all__:
        assert getattr(package, name) is getattr(hf_pretrain, name)
    assert set(package.__all__) == {name for name in hf_pretrain.__all__ if re.match("TransformerXL(?!Model.)", name)}
    with pytest.raises(ImportError):
        from hf_pretrain.models.transformer_xl import Nothing  # noqa: F401


@pytest.mark.parametrize("name", hf_pretrain.__all__)
def test_every_exported_name_imports(name):
    value = getattr(hf_pretrain, name)
    assert value.__name__.rpartition(".")[2] == name
    assert name in dir(hf_pretrain)


def test_editors_and_type_checkers_see_the_same_names():
    """They read the imports of `TYPE_CHECKING`; Python reads the table."""
    (block,) = (
        node
        for node in ast.parse(Path(hf_pretrain.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    # "X as X" says that the name is public.
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    seen = [(node.module, alias.name) for node in block.body for alias in node.names]
    listed = [(f"hf_pretrain.{module}", name) for module, names in hf_pretrain._EXPORTS.items() for name in names]
    assert sorted(seen) == sorted(listed) and len({name for _, name in seen}) == len(seen)


@pytest.mark.parametrize("method", METHODS)
def test_all_of_a_method_is_public(method):
    """Its Trainer, and the options that the Trainer takes."""
    record = METHODS[method].load(method)
    for value in (record.trainer, *record.arguments):
        assert getattr(hf_pretrain, value.__name__) is value


NAMES_OF_P3 = (
    "DataArguments prepare_data ModelArguments DataCollatorForReplacedTokenDetection ElectricTrainingArguments "
    "PermutationLMTrainingArguments RecurrentLMTrainingArguments probe_accuracy read_minimal_pairs pseudo_log_likelihoods "
    "Evaluation add_evaluation score_texts stream_evaluate"
).split()


def test_the_names_of_data_evaluation_and_scores_are_public():
    assert set(NAMES_OF_P3) <= set(hf_pretrain.__all__)


@pytest.mark.parametrize(("name", "right"), hf_pretrain._OTHER_NAMES.items())
def test_a_name_of_another_library_is_answered_with_that_of_this_one(name, right):
    with pytest.raises(ImportError, match=f"hf_pretrain has no '{name}': use {re.escape(right)}"):
        exec(f"from hf_pretrain import {name}")
    named = set(re.findall(r"\w+", right)) & set(hf_pretrain.__all__)
    assert (named or name == "build_model") and name not in hf_pretrain.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = hf_pretrain.Nothing
    with pytest.raises(ImportError):
        from hf_pretrain import nothing  # noqa: F401
