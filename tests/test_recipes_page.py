"""The page on recipes says what the recipes hold: each of its numbers is what the program's own parser makes of them."""

import importlib
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.cli import METHODS, RECIPES, load_method
from hf_pretrain.modeling.configuration import parse_overrides
from hf_pretrain.training.parsing import _OptionParser, parse_arguments

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "trainers" / "recipes"
LINES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
FILES = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
OVERVIEW = "## All recipes"

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


def expanded(command):
    """Return the method and the arguments of a command of the page; a recipe's name stands for its method."""
    program, method, *rest = shlex.split(command)
    assert program == "hf-pretrain", command
    return (RECIPES[method][0], ["--config", method, *rest]) if method in RECIPES else (method, rest)


@cache
def resolved(command, *more):
    """Return every option of a command, by name, as the program sees it."""
    method, argv = expanded(command)
    instances = parse_arguments(
        load_method(method).arguments,
        [*argv, *more, "--use_cpu", "true"],
        prog=f"hf-pretrain {method}",
        description="",
    )
    return {field.name: getattr(instance, field.name) for instance in instances for field in fields(instance)}


def stack(command):
    """Return the names of a command's recipes."""
    argv = expanded(command)[1]
    return [value for option, value in zip(argv, argv[1:], strict=False) if option == "--config"]


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
    return list(dict.fromkeys(re.findall(r"`(hf-pretrain [^`]+)`", "\n".join(LINES))))


def heads():
    return [section[0] for section in sections()]


# The overview

_ALONE = {"mlm": "mlm", "plm": "plm", "recurrent-lm": "lm"}


def scientific(number):
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def masked(method, options):
    """Return which tokens are chosen, and what becomes of them."""
    if method == "plm":
        return f"1 of {options['context_factor']:g}, spans to {options['max_span_length']}", "–"
    share = options.get("mlm_probability")
    if not share:
        return "–", "–"
    units = {
        "token": "tokens",
        "word": "words",
        "ngram": f"n-grams to {options['max_ngram']} {options['ngram_unit']}s",
        "span": f"spans to {options['max_span_length']} words",
    }
    chosen = f"{100 * share:g} % {units[options['masking_unit']]}"
    if options["masking_count"] != "exact":
        chosen += f", {options['masking_count']}"
    if method == "electric":
        return chosen, "noise"
    mask, random = 100 * options["mask_share"], 100 * options["random_share"]
    replaced = f"{mask:g}/{random:g}/{100 - mask - random:g}"
    if options["replacement_unit"] != "token":
        replaced += f" by {options['replacement_unit']}"
    return chosen, replaced + (f", {options['static_masks']} frozen" if options["static_masks"] else "")


def trained(method, options):
    """Return the losses with their weights."""
    if method in _ALONE:
        return _ALONE[method]
    if method == "encoder":
        return " + ".join(options["objectives"])
    names = {
        name.removesuffix("_weight"): options[name] for name in options if name.endswith("_weight") and options[name]
    }
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in names.items())


def dropout(method, options):
    """Return the dropout of states and of attention: the architecture's own unless the recipe says otherwise."""
    if method.startswith("distil"):
        return "the student's"
    if method == "recurrent-lm":
        values = options
    else:
        values = CONFIG_MAPPING[options["model_type"]]().to_dict() | parse_overrides(options["config_overrides"])
    states = next(values[name] for name in ("hidden_dropout_prob", "dropout", "mlp_dropout") if name in values)
    attention = next(
        (values[name] for name in ("attention_probs_dropout_prob", "attention_dropout") if name in values), states
    )
    return f"{states:g} / {attention:g}"


def row(names):
    """Return the row of the overview for recipes that are put on each other in this order."""
    method = FOLDER.joinpath(f"{names[-1]}.yaml").read_text(encoding="utf-8").split("\n")[0].split()[-1]
    options = resolved(f"hf-pretrain {method} " + " ".join(f"--config {name}" for name in names))
    length = next(options[name] for name in ("tgt_len", "max_length", "block_size") if name in options)
    text = "the teacher's" if method.startswith("distil") else f"{options['vocab_size']} {options['tokenizer_type']}"
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    steps = (
        f"{options['max_steps']:,} steps" if options["max_steps"] > 0 else f"{options['num_train_epochs']:g} epochs"
    )
    warmup = options["warmup_steps"]
    warmup = f"{100 * warmup:g} %" if 0 < warmup < 1 else f"{warmup:,.0f}"
    schedule = "product" if options["decay_during_warmup"] else str(options["lr_scheduler_type"].value)
    betas = f"{options['adam_beta1']:g}, {options['adam_beta2']:g}, {scientific(options['adam_epsilon'])}"
    links = " + ".join(f"[{name}](../trainers/recipes/{name}.yaml)" for name in names)
    return [
        links,
        trained(method, options),
        *masked(method, options),
        f"{length}, {text}",
        f"{batch} × {steps}",
        f"{scientific(options['learning_rate'])}, {warmup}, {schedule}",
        f"{betas}, {'yes' if options['adam_bias_correction'] else 'no'}",
        f"{options['weight_decay']:g}, {options['max_grad_norm']:g}",
        dropout(method, options),
    ]


def overview():
    """Return the rows of the overview: the names of each row's recipes, and its cells."""
    start = LINES.index(OVERVIEW)
    end = next(number for number in range(start + 1, len(LINES)) if LINES[number].startswith("## "))
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in LINES[start:end] if line.startswith("| [")]
    return [(re.findall(r"\[(\w+)\]", cells[0]), cells) for cells in rows]


@pytest.mark.parametrize(("names", "cells"), overview(), ids=lambda value: "+".join(value) if value else "")
def test_a_row_of_the_overview_is_what_the_recipes_hold(names, cells):
    assert cells == row(names)


def test_every_recipe_is_in_the_overview():
    assert {name for names, _ in overview() for name in names} == set(FILES)


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
    named = {option for command, options, _ in sections() if name in stack(command) for option in options}
    assert set(FILES[name]) - RECORDS - SHOWN <= named, sorted(set(FILES[name]) - RECORDS - SHOWN - named)


def test_every_method_and_every_named_recipe_has_a_command():
    assert {command.split()[1] for command in commands()} >= {*METHODS, *RECIPES}
    assert len(set(heads())) == len(heads())
    for command in commands():
        assert resolved(command)


def test_every_option_that_the_page_names_is_one_of_some_program():
    known = set()
    for module, _ in METHODS.values():
        known |= set(_OptionParser(importlib.import_module(module).ARGUMENTS, prog="", description="").options)
    for _, options, others in sections():
        assert set(options) <= known
        assert {option for flags in others for option in re.findall(r"--(\w+)", flags)} <= known
