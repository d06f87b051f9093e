"""The page on papers has the values of the recipes: the program's own parser gives the same numbers."""

import re
import shlex
from functools import cache
from pathlib import Path

import make_tables
import pytest
import yaml
from make_tables import expanded, resolved, stack

import hf_pretrain
from hf_pretrain.cli import METHODS, RECIPES, load_method
from hf_pretrain.names import HELP
from hf_pretrain.training.parsing import _OptionParser

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "trainers" / "recipes"
LINES = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
FILES = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}

# Options of a recipe that are no part of its method: what is written down, and when.
RECORDS = set(
    """
    validation_fraction logging_steps eval_strategy eval_steps eval_on_start eval_lanes per_device_eval_batch_size
    save_strategy save_steps save_total_limit
    """.split()
)
# Options that the overview shows; all others are named in the section of the recipe.
SHOWN = set(
    """
    objectives mlm_weight rtd_weight nce_weight cloze_weight prediction_weight cosine_weight distillation_method
    mlm_probability masking_unit masking_count max_ngram max_span_length context_factor
    mask_share random_share replacement_unit static_masks block_size tgt_len max_length vocab_size tokenizer_type
    per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs
    learning_rate warmup_steps lr_scheduler_type decay_during_warmup
    adam_beta1 adam_beta2 adam_epsilon adam_bias_correction weight_decay max_grad_norm
    hidden_dropout_prob attention_probs_dropout_prob
    """.split()
)


@cache
def sections():
    """Return the commands of the page, each with its options and values, and the other values that it names."""
    found, command = [], None
    for before, line in zip(["", *LINES], LINES, strict=False):
        if line.startswith("#"):
            command = None
        if not before and line.startswith("`hf-pretrain "):
            command = line.split("`")[1]
            found.append((command, {}, []))
        for span in re.findall(r"`([^`]+)`", line):
            option = re.fullmatch(r"(\w+)(?:: |=)(.+)", span)
            assert command or not (option or span.startswith("--")), f"{span} is of no command"
            if option:
                assert found[-1][1].setdefault(option[1], option[2]) == option[2], f"{command}: {span}"
            elif span.startswith("--"):
                found[-1][2].append(span)
    return found


def commands():
    """Return every command of the page; those at the head of a section are of a table."""
    return list(dict.fromkeys(make_tables.COMMAND.findall("\n".join(LINES))))


def heads():
    return [section[0] for section in sections()]


# The tables


@pytest.mark.parametrize("page", [*make_tables.TABLES, *make_tables.PAGES])
def test_make_docs_changes_nothing(page):
    assert make_tables.written(page) == (ROOT / page).read_text(encoding="utf-8"), "run make docs"


def test_make_docs_leaves_the_pages_that_are_launched():
    pages = make_tables.program_pages()
    assert {page.name for page in (ROOT / "trainers").glob("*.py")} == {page.name for page in pages} | {"__init__.py"}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, "run make docs"


def test_make_docs_leaves_the_help_that_is_kept():
    pages = make_tables.help_pages()
    assert {page.name for page in HELP.glob("*.txt")} == {page.name for page in pages}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, "run make docs"


def test_every_recipe_is_in_the_tables():
    for page in make_tables.TABLES:
        linked = set(
            re.findall(r"\[(\w+)\]\([^)]*trainers/recipes/\1\.yaml\)", (ROOT / page).read_text(encoding="utf-8"))
        )
        assert linked >= set(FILES), page


def test_every_paper_of_a_recipe_is_in_the_index_with_its_code_and_its_results():
    head, *rows = make_tables.papers_table()
    index = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    text = " ".join(row["Paper and code"] for row in index.values())
    for name in FILES:
        assert all(address in text for address in make_tables.sources(name).values()), name
    electra = index["[ELECTRA](#electra)"]
    assert "electra_small: README: 14M parameters" in electra["Reported"] and "OpenWebText" in electra["Corpus"]
    assert electra["Loss"] == "mlm + 50 rtd" and "google-research/electra" in electra["Paper and code"]
    # Of the recipe's own configuration: BERT-Base without heads has 109 million parameters, RoBERTa-Base 125.
    assert index["[BERT](#bert)"]["Encoder"] == "109 M" and index["[RoBERTa](#roberta)"]["Encoder"] == "125 M"


def test_every_public_name_is_on_one_page_of_the_api():
    shown = [
        name
        for page in make_tables.AREAS
        for name in re.findall(
            r"^::: hf_pretrain\.(\w+)$", (ROOT / f"docs/api/{page}.md").read_text(), flags=re.MULTILINE
        )
    ]
    assert sorted(shown) == sorted(set(hf_pretrain.__all__) - {"__version__"})


# The sections


@pytest.mark.parametrize("command", heads())
def test_the_options_of_a_section_are_those_of_its_command(command, tmp_path):
    named = next(options for name, options, _ in sections() if name == command)
    before = resolved(command)
    assert set(named) <= set(before), sorted(set(named) - set(before))
    recipe = tmp_path / "page.yaml"
    recipe.write_text("".join(f"{option}: {value}\n" for option, value in named.items()), encoding="utf-8")
    after = resolved(command, "--config", str(recipe)) if named else before
    assert {name: after[name] for name in named} == {name: before[name] for name in named}


@pytest.mark.parametrize("command", heads())
def test_other_values_that_a_section_names_are_allowed_and_other(command):
    before = resolved(command)
    for flags in next(others for name, _, others in sections() if name == command):
        argv = shlex.split(flags)
        # The text is still to be added, and options of translations are refused without any.
        text = ["--parallel_file", "en-de=a.en,a.de"] if "--bitext_frame" in argv else []
        after = resolved(command, *argv, *text)
        for option in (part.removeprefix("--") for part in argv if part.startswith("--")):
            assert after[option] != before[option], f"{command}: {flags} is what the recipe has"


@pytest.mark.parametrize("name", FILES)
def test_every_option_of_a_recipe_is_on_the_page(name):
    paper = name.removesuffix("_small") if name.removesuffix("_small") in RECIPES else name
    named = {option for command, options, _ in sections() if paper in stack(command) for option in options} | {
        "config"
    }
    if paper != name:
        named |= {"model_type"}
    assert set(FILES[name]) - RECORDS - SHOWN <= named, sorted(set(FILES[name]) - RECORDS - SHOWN - named)


def test_every_method_and_every_named_recipe_has_a_command():
    assert {expanded(command)[0] for command in commands()} == {*METHODS}
    assert {command.split()[1] for command in commands()} >= {*RECIPES}
    assert len(set(heads())) == len(heads())
    for command in commands():
        assert resolved(command)


def test_every_option_that_the_page_names_is_one_of_some_program():
    known = set()
    for method in METHODS:
        known |= set(_OptionParser(load_method(method).arguments, prog="", description="").options)
    for _, options, others in sections():
        assert set(options) <= known
        assert {option for flags in others for option in re.findall(r"--(\w+)", flags)} <= known
