"""Write the tables of the README, of objectives.md and of recipes.md, and the pages of `trainers/`: `make docs`.

Their rows come from the methods' records, from the headers of the recipes, and from what the parser of the programs makes of the
recipes. A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.cli import COMMANDS, METHODS, load_method, run_named
from hf_pretrain.modeling.configuration import parse_overrides
from hf_pretrain.names import HELP, described_recipes
from hf_pretrain.options import read_recipes, recipe_names
from hf_pretrain.training.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
RECIPE_FILES = {path.stem: path for path in sorted((ROOT / "trainers" / "recipes").glob("*.yaml"))}
COMMAND = re.compile(r"`(hf-pretrain [^`]+)`")
_SOURCE = re.compile(r"([A-Z]\w+(?: and [A-Z]\w+| et al\.) \d{4}), (https://[^\s,;)]+[^\s,;).])")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end of table -->)", flags=re.DOTALL)


# What a recipe's header says.


def header(recipe: str) -> list[str]:
    """Return the lines of the comment that a recipe begins with."""
    lines = RECIPE_FILES[recipe].read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]


def method_of(recipe: str) -> str:
    """Return the method that a recipe is of: its first line."""
    return header(recipe)[0].split()[-1]


def summary(recipe: str) -> str:
    """Return what a recipe is: the first sentence of its header."""
    text: list[str] = []
    for line in header(recipe)[1:]:
        if text and (not line.strip() or line.startswith("  ")):
            break
        text.append(line.strip())
    return re.split(r"(?<=[^.])\.(?: |$)| Add it to|; add it to", " ".join(text).strip())[0].rstrip(":.")


def sources(recipe: str) -> dict[str, str]:
    """Return the papers that a header names, with their addresses."""
    return dict(_SOURCE.findall(" ".join(line.strip() for line in header(recipe))))


# What a recipe holds.


def expanded(command: str) -> tuple[str, list[str]]:
    """Return the method and the arguments of a command; a recipe's name stands for its method with that recipe."""
    _, name, *rest = shlex.split(command)
    recipe = described_recipes().get(name)
    return (name, rest) if recipe is None else (recipe[0], ["--config", name, *rest])


def stack(command: str) -> tuple[str, ...]:
    """Return the names of a command's recipes, in their order, with those that they begin with."""
    return tuple(path.stem for path, _ in read_recipes(recipe_names(expanded(command)[1])))


@cache
def resolved(command: str, *more: str) -> dict[str, Any]:
    """Return every option of a command by name, as the program sees it."""
    method, argv = expanded(command)
    instances = parse_arguments(
        load_method(method).arguments,
        [*argv, *more, "--use_cpu", "true"],
        prog=f"hf-pretrain {method}",
        description="",
    )
    return {field.name: getattr(instance, field.name) for instance in instances for field in fields(instance)}


def _scientific(number: float) -> str:
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _trained(method: str, options: dict[str, Any]) -> str:
    """Return the losses with their weights; the method where they have none."""
    if "objectives" in options:
        return " + ".join(options["objectives"])
    weights = {
        name.removesuffix("_weight"): value for name, value in options.items() if name.endswith("_weight") and value
    }
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()) or method


def _masked(options: dict[str, Any]) -> tuple[str, str]:
    """Return which tokens are chosen, and what they are replaced by."""
    if "context_factor" in options:
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
    if "nce_weight" in options:
        return chosen, "noise"
    mask, random = 100 * options["mask_share"], 100 * options["random_share"]
    replaced = f"{mask:g}/{random:g}/{100 - mask - random:g}"
    if options["replacement_unit"] != "token":
        replaced += f" by {options['replacement_unit']}"
    return chosen, replaced + (f", {options['static_masks']} frozen" if options["static_masks"] else "")


def _dropout(options: dict[str, Any]) -> str:
    """Return the dropout of states and of attention: the architecture's own unless the recipe says otherwise."""
    if "teacher_name_or_path" in options:
        return "the student's"
    values = options
    if "model_type" in options:
        values = CONFIG_MAPPING[options["model_type"]]().to_dict() | parse_overrides(options["config_overrides"])
    states = next(values[name] for name in ("hidden_dropout_prob", "dropout", "mlp_dropout") if name in values)
    names = ("attention_probs_dropout_prob", "attention_dropout")
    attention = next((values[name] for name in names if name in values), states)
    return f"{states:g} / {attention:g}"


def _options_row(recipes: tuple[str, ...]) -> list[str]:
    methods = [method_of(recipe) for recipe in recipes]
    method = "encoder" if "encoder" in methods else methods[-1]
    options = resolved(f"hf-pretrain {method} " + " ".join(f"--config {name}" for name in recipes))
    length = next(options[name] for name in ("tgt_len", "max_length", "block_size") if name in options)
    has_teacher = "teacher_name_or_path" in options
    if has_teacher or options["model_name_or_path"]:
        text = "the teacher's" if has_teacher else "the checkpoint's"
    else:
        text = f"{options['vocab_size']} {options['tokenizer_type']}"
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    steps, epochs = options["max_steps"], options["num_train_epochs"]
    warmup = options["warmup_steps"]
    warmup = f"{100 * warmup:g} %" if 0 < warmup < 1 else f"{warmup:,.0f}"
    schedule = "product" if options["decay_during_warmup"] else str(options["lr_scheduler_type"].value)
    betas = f"{options['adam_beta1']:g}, {options['adam_beta2']:g}, {_scientific(options['adam_epsilon'])}"
    return [
        " + ".join(_link(name, "recipes.md") for name in recipes),
        _trained(method, options),
        *_masked(options),
        f"{length}, {text}",
        f"{batch} × {f'{steps:,} steps' if steps > 0 else f'{epochs:g} epochs'}",
        f"{_scientific(options['learning_rate'])}, {warmup}, {schedule}",
        f"{betas}, {'yes' if options['adam_bias_correction'] else 'no'}",
        f"{options['weight_decay']:g}, {options['max_grad_norm']:g}",
        _dropout(options),
    ]


# The tables.


def methods_table() -> Iterator[list[str]]:
    """Yield the rows of the README's table: one a method."""
    yield ["Method", "What is trained", "Class", "Recipes", "Papers"]
    for name, listed in METHODS.items():
        recipes = [recipe for recipe in RECIPE_FILES if method_of(recipe) == name]
        papers = {paper: address for recipe in recipes for paper, address in sources(recipe).items()}
        yield [
            f"`{name}`",
            listed.line,
            f"`{load_method(name).trainer.__name__}`",
            ", ".join(_link(recipe, "README.md") for recipe in recipes),
            _linked(papers),
        ]


def recipes_table() -> Iterator[list[str]]:
    """Yield the rows of the table of objectives.md: one a recipe."""
    yield ["Method", "Recipe", "What it is", "Source"]
    for name in METHODS:
        for recipe in RECIPE_FILES:
            if method_of(recipe) == name:
                yield [f"`{name}`", _link(recipe, "docs"), summary(recipe), _linked(sources(recipe))]


def options_table() -> Iterator[list[str]]:
    """Yield the rows of the table of recipes.md: one for each stack of recipes that the page names, in the order of the page."""
    yield [
        "Recipe",
        "Trained",
        "Masked",
        "Replaced",
        "Length, vocabulary",
        "Batch × length of training",
        "Peak rate, warm-up, schedule",
        "Adam",
        "Decay, clip",
        "Dropout",
    ]
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("<!-- end of table -->")[2]
    stacks = dict.fromkeys(stack(command) for command in COMMAND.findall(text))
    yield from (_options_row(recipes) for recipes in stacks if recipes)


TABLES = {
    "README.md": {"methods": methods_table},
    "docs/objectives.md": {"recipes": recipes_table},
    "docs/recipes.md": {"options": options_table},
}


def _link(recipe: str, page: str) -> str:
    return f"[{recipe}]({'' if page == 'README.md' else '../'}trainers/recipes/{recipe}.yaml)"


def _linked(papers: dict[str, str]) -> str:
    return ", ".join(f"[{paper}]({papers[paper]})" for paper in sorted(papers, key=lambda paper: paper[-4:]))


def written(page: str) -> str:
    """Return the text of a page with its tables as they are to be."""

    def table(found: re.Match[str]) -> str:
        head, *rows = TABLES[page][found[2]]()
        lines = [head, ["---"] * len(head), *rows]
        return found[1] + "".join("| " + " | ".join(cells) + " |\n" for cells in lines)

    return _TABLE.sub(table, (ROOT / page).read_text(encoding="utf-8"))


def program_pages() -> dict[Path, str]:
    """Return the text of each method's page in `trainers/`, which `accelerate launch` runs."""
    pages = {}
    for name in METHODS:
        page = ROOT / "trainers" / f"{name.replace('-', '_')}.py"
        source = Path(inspect.getfile(load_method(name).trainer)).resolve().relative_to(ROOT)
        pages[page] = (
            f'"""`accelerate launch trainers/{page.name}` is `hf-pretrain {name}` on several processes.\n\n'
            f"The method is in `{source}`; `hf-pretrain {name} --help` lists its options.\n"
            f'"""\n\nfrom hf_pretrain.cli import launch\n\nlaunch(__name__, "{name}")\n'
        )
    return pages


def help_pages() -> dict[Path, str]:
    """Return the short help of each method and command, which `hf-pretrain METHOD --help` shows without an import of torch."""
    pages = {}
    for name in (*METHODS, *COMMANDS):
        shown = StringIO()
        with redirect_stdout(shown), suppress(SystemExit):
            run_named(name, ["--help"])
        pages[HELP / f"{name}.txt"] = shown.getvalue()
    return pages


if __name__ == "__main__":
    for path, text in (program_pages() | help_pages()).items():
        path.write_text(text, encoding="utf-8")
    for page in TABLES:
        text = written(page)
        if text != (ROOT / page).read_text(encoding="utf-8"):
            (ROOT / page).write_text(text, encoding="utf-8")
            print(f"{page} is written anew")
