"""The documents are correct: their Python runs, their links have targets, their options and names exist."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

import hf_pretrain
from helpers.tiny_text import write_models, write_text
from hf_pretrain import WordVectors, cli, train_tokenizer
from hf_pretrain.cli import COMMANDS, METHODS, load_method
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.training.parsing import _OptionParser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
)
# Options in the documents that are not those of a program: of accelerate, of hf and of the example.
OTHER_OPTIONS = {"config_file", "num_processes", "cpu", "include", "local-dir", "help"}
# Where the repository and its site lie: links to both must lead to files that exist.
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
# Pages that tests/test_doors.py runs.
DOORS = {
    f"docs/{name}.md"
    for name in ("adapt", "adapters", "compare", "from_scratch", "model_cards", "objectives", "tasks", "transfer")
}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def python_blocks(name):
    return re.findall(r"^```python\n(.*?)^```$", text_of(name), flags=re.DOTALL | re.MULTILINE)


def run(name, folder, monkeypatch):
    """Run the Python of a document from top to bottom, in an empty folder; return its names."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    names = {"__name__": "document"}
    for block in python_blocks(name):
        exec(compile(block, name, "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def corpus(tmp_path):
    """The text of the documents' blocks, a document a line, in a folder of its own."""
    lines = (" ".join(text.split()) for text in docstring_documents(max_bytes=60_000))
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_the_example_of_the_readme_makes_what_it_says(corpus, monkeypatch):
    assert len(python_blocks("README.md")) == 1
    names = run("README.md", corpus, monkeypatch)
    assert names["trainer"].state.global_step == 20
    model, info = AutoModelForMaskedLM.from_pretrained("my-bert", output_loading_info=True)
    assert type(model) is BertForMaskedLM and not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained("my-bert").get_vocab() == names["tokenizer"].get_vocab()
    assert "hf_pretrain" in ModelCard.load(corpus / "my-bert" / "README.md").text


def test_the_page_on_python_runs(corpus, monkeypatch, capsys):
    names = run("docs/python.md", corpus, monkeypatch)
    assert set(names["best"].hyperparameters) == {"learning_rate"}
    assert type(AutoModelForMaskedLM.from_pretrained("my-bert")) is BertForMaskedLM
    documents, held_out = names["data"].description["documents"], names["data"].description["held_out_documents"]
    assert held_out and documents + held_out == len(names["dataset"].filter(lambda row: row["text"].strip()))
    assert "my-best-bert" in capsys.readouterr().out


def test_the_example_of_the_readme_is_short():
    (block,) = python_blocks("README.md")
    statements = compile(block, "README.md", "exec", flags=0x400).body  # 0x400: the syntax tree only
    assert sum(type(statement).__name__ != "ImportFrom" for statement in statements) <= 10


def test_the_code_of_the_page_on_objectives_is_that_of_the_example():
    files = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "examples" / "token_deletion" / "token_deletion").glob("*.py")
    ]
    blocks = python_blocks("docs/adding_an_objective.md")
    assert len(blocks) >= 5
    for block in blocks:
        assert any(_lines_of(block) in _lines_of(text) for text in files), block


def _lines_of(code):
    """The lines of code without their indentation, which a page does not have, and without empty ones."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def test_the_page_on_data_runs(tmp_path, monkeypatch, capsys):
    names = run("docs/data.md", tmp_path, monkeypatch)
    assert capsys.readouterr().out.startswith("[CLS] the model reads a text.")
    assert set(names["documents"].column_names) == {"input_ids", "word_starts", "sent_starts", "doc_id"}
    assert names["documents"]["sent_starts"][0][0] and sum(names["documents"]["sent_starts"][0]) == 3


def test_the_page_on_vectors_runs(tmp_path, monkeypatch):
    write_text(tmp_path)
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-bert").rename("my-encoder")
    text = (tmp_path / "corpus.txt").read_text(encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(text + "\n\nthe king and the man and the woman\n" * 2, encoding="utf-8")
    train_tokenizer(text.split("\n"), kind="bpe", vocab_size=300, lowercase=False).save_pretrained("my-tokenizer")
    shared = ["vectors", "--train_file", "corpus.txt", "--min_count", "1"]
    assert cli.main([*shared, "--dimensions", "4", "--output_dir", "my-vectors"]) == 0
    assert cli.main([*shared, "--method", "tfidf", "--output_dir", "my-tfidf"]) == 0
    of_tokens = ["--tokenizer_name", "my-tokenizer", "--output_dir", "my-token-vectors", "--dimensions", "4"]
    assert cli.main([*shared, *of_tokens]) == 0
    names = run("docs/vectors.md", tmp_path, monkeypatch)
    made = WordVectors.open("my-token-vectors")
    words = text.split()[:50]
    cut = names["new"].tokenize(" " + " ".join(words))
    assert set(cut) <= set(made.words) and all(made.vector(token).any() for token in cut)
    saved = AutoModelForMaskedLM.from_pretrained("my-new-encoder")
    assert saved.get_input_embeddings().weight.shape[0] == len(names["new"]) == 300


def test_every_page_with_python_is_run_or_compared():
    known = {"README.md", "docs/adding_an_objective.md", "docs/data.md", "docs/python.md", "docs/vectors.md"} | DOORS
    assert {name for name in DOCUMENTS if python_blocks(name)} == known


def local(target, folder):
    """The file that a link leads to, if it is one of the repository or of its site."""
    if target.startswith(URLS["Documentation"]):
        page = target.removeprefix(URLS["Documentation"]).strip("/")
        return ROOT / "docs" / f"{page or 'index'}.md"
    for kind in ("blob", "tree"):
        if target.startswith(f"{URLS['Repository']}/{kind}/main/"):
            return ROOT / target.removeprefix(f"{URLS['Repository']}/{kind}/main/")
    raw = URLS["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    if target.startswith(raw):
        return ROOT / target.removeprefix(raw)
    return None if target.startswith("https://") else folder / target


def code_of(name):
    """A document or an example as text; of a notebook the cells."""
    text = text_of(name)
    if not name.endswith(".ipynb"):
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.*") if path.suffix != ".md"
)


@pytest.mark.parametrize("name", [*DOCUMENTS, *EXAMPLES])
def test_pages_and_examples_import_from_the_top_alone(name):
    """A user needs `from hf_pretrain import ...` and no other module but the command line's; all of these names exist."""
    form = r"^ *(?:from (hf_pretrain[\w.]*) import (\([^)]*\)|[^\n#]*)|import (hf_pretrain[\w.]+))"
    for module, names, whole in re.findall(form, code_of(name), re.M):
        if (module, names.strip()) == ("hf_pretrain.cli", "main"):
            continue
        assert module == "hf_pretrain" and not whole, f"{name}: {module or whole}"
        for public in re.findall(r"\w+", names):
            assert public in hf_pretrain.__all__, public


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text_of(name)):
        path = local(target, (ROOT / name).parent) if target else ROOT / name
        if path is None:
            continue
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, anchor


def test_the_readme_has_whole_addresses_because_other_sites_show_it():
    for target in re.findall(r"\]\(([^)]*)\)", text_of("README.md")):
        assert target.startswith("https://"), target


@pytest.fixture(scope="module")
def options():
    """Names of the options of each method and command."""
    parsers = {}
    arguments = {method: load_method(method).arguments for method in METHODS}
    arguments |= {command: importlib.import_module(module).ARGUMENTS for command, (module, _) in COMMANDS.items()}
    for method, classes in arguments.items():
        parser = _OptionParser(classes, prog=method, description="")
        parsers[method] = {name for name in parser._option_string_actions if name.startswith("--")}
    # It takes the options of the program that it comes to.
    parsers["adapt"] |= set().union(*(parsers[method] for method in ("mlm", "encoder", "rtd", "clm")))
    return parsers


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_exist(name, options):
    text = text_of(name)
    known = set().union(*options.values()) | {f"--{other}" for other in OTHER_OPTIONS}
    if name == "docs/benchmarks.md":
        for program in sorted((ROOT / "benchmarks").glob("*.py")):
            code = program.read_text(encoding="utf-8")
            fields = re.findall(r"^    (\w+): .*= ?(?:field|option)\(", code, flags=re.M)
            fields += re.findall(r"(\w+)=", " ".join(re.findall(r"options_parser\(([^)]*)\)", code)))
            known |= {f"--{option}" for option in fields} | set(re.findall(r"add_argument\(\s*\"(--\w+)\"", code))
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert option in known, option
    for method, rest in re.findall(
        r"hf-pretrain ({})(?![\w-])((?:[^\n`]|\\\n)*)".format("|".join(METHODS | COMMANDS)), text
    ):
        for option in re.findall(r"(?<![\w-])--[a-z]\w*", rest):
            assert option in options[method] | {"--help"}, f"hf-pretrain {method} {option}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_modules_that_are_named_exist(name):
    text = text_of(name)
    for path in re.findall(r"`((?:hf_pretrain|trainers|model_cards|tests|docs|examples)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for module, attribute in re.findall(r"`(hf_pretrain(?:\.[a-z_]+)*)\.(\w+)`", text):
        owner = importlib.import_module(module)
        assert hasattr(owner, attribute) or importlib.import_module(f"{module}.{attribute}"), f"{module}.{attribute}"
