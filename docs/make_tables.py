"""Write the tables of the documents, the pages of the API and of `trainers/`, and llms.txt: `make docs`.

Rows come from the methods' records, from the headers of the recipes, and from what the parser of the programs makes of the
recipes. A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`. A page of the API has the public
names of its area. llms.txt has every page of mkdocs.yml with its first sentence.
"""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_pretrain
from hf_pretrain.cli import COMMANDS, METHODS, load_method, run_named
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    build_config,
    build_encoder_decoder_config,
    parse_overrides,
)
from hf_pretrain.names import HELP, described_recipes
from hf_pretrain.options import read_recipes, recipe_names
from hf_pretrain.training.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
RECIPE_FILES = {path.stem: path for path in sorted((ROOT / "trainers" / "recipes").glob("*.yaml"))}
COMMAND = re.compile(r"`(hf-pretrain [^`]+)`")
_SOURCE = re.compile(r"([A-Z]\w+(?: and [A-Z]\w+| et al\.) \d{4}), (https://[^\s,;)]+[^\s,;).])")
_FACT = re.compile(r"(Source|Corpus|Reported|Expected loss|Hardware|Result|Differences) +(.*)")
_DROPOUT = ("hidden_dropout_prob", "dropout", "mlp_dropout", "dropout_rate", "resid_pdrop")
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


def facts(recipe: str) -> dict[str, str]:
    """Return what a header says under its names, such as "Corpus" and "Reported"."""
    found: dict[str, str] = {}
    name = None
    for line in header(recipe)[1:]:
        start = _FACT.fullmatch(line.strip())
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name is not None and line.startswith("  "):
            found[name] += " " + line.strip()
        else:
            name = None
    return found


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
def parsed(command: str, *more: str) -> tuple[Any, ...]:
    """Return the options of data, model and training of a command, as the program sees them."""
    method, argv = expanded(command)
    arguments = [*argv, *more, "--use_cpu", "true"]
    return parse_arguments(load_method(method).arguments, arguments, prog=f"hf-pretrain {method}", description="")


def resolved(command: str, *more: str) -> dict[str, Any]:
    """Return every option of a command by name."""
    return {field.name: getattr(part, field.name) for part in parsed(command, *more) for field in fields(part)}


class _Words(SimpleNamespace):
    """A tokenizer as far as a configuration asks for it: its size and its special tokens."""

    def __len__(self) -> int:
        return self.size


def parameters(command: str) -> str:
    """Return the number of parameters of the encoder, or encoder-decoder, that a command builds, in millions."""
    data, model, _ = parsed(command)
    if not isinstance(model, ModelArguments) or model.model_name_or_path or not model.model_type:
        return "–"
    special = {
        f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep", "unk", "mask"))
    }
    words = _Words(size=data.vocab_size, **special)
    if hasattr(model, "num_decoder_layers"):
        config = build_encoder_decoder_config(model, words, num_decoder_layers=model.num_decoder_layers)
    else:
        config = build_config(model, words, auto_class=AutoModel)
    with torch.device("meta"):
        count = AutoModel.from_config(config).num_parameters()
    return f"{count / 1e6:.0f} M"


def _scientific(number: float) -> str:
    digits, exponent = f"{number:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _trained(method: str, options: dict[str, Any]) -> str:
    """Return the losses with their weights; the method where they have none."""
    if "objectives" in options:
        return " + ".join(options["objectives"])
    if "views" in options:
        name = options["views"] if options["objective"] == "contrastive" else options["objective"]
        return name if options["beside"] == "none" else f"{name} + {options['beside']}"
    if "noise" in options:
        return " + ".join(options["noise_steps"]) if options["noise"] == "bart" else str(options["noise"])
    weights = {
        name.removesuffix("_weight"): value for name, value in options.items() if name.endswith("_weight") and value
    }
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()) or method


def _masked(options: dict[str, Any]) -> tuple[str, str]:
    """Return which tokens are chosen, and what they are replaced by."""
    if "context_factor" in options:
        return f"1 of {options['context_factor']:g}, spans to {options['max_span_length']}", "–"
    if "noise" in options:
        return _hidden(options)
    if options.get("objective") == "tsdae":
        return f"{100 * options['deletion_probability']:g} % tokens", "deleted"
    if options.get("beside") == "none" and options["objective"] != "retromae":
        return "–", "–"
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


def _hidden(options: dict[str, Any]) -> tuple[str, str]:
    """Return which tokens a noise hides, and what they are replaced by."""
    if options["noise"] == "bart":
        share, mean = 100 * options["infilling_probability"], options["infilling_mean_length"]
        return f"{share:g} % words, spans of {mean:g}", "one mask a span"
    if options["noise"] == "t5":
        share, mean = 100 * options["noise_density"], options["mean_span_length"]
        return f"{share:g} % tokens, spans of {mean:g}", "a sentinel a span"
    if options["noise"] == "ul2":
        return f"by {len(options['denoisers'])} denoisers", "a sentinel a span"
    if options["noise"] == "mass":
        return f"{100 * options['fragment_share']:g} % tokens, one fragment", "80/10/10"
    return "the end", "–"


def _dropout(options: dict[str, Any]) -> str:
    """Return the dropout of states and of attention: the architecture's own unless the recipe says otherwise."""
    if "teacher_name_or_path" in options:
        return "the student's"
    values = options
    if "model_type" in options:
        values = CONFIG_MAPPING[options["model_type"]]().to_dict() | parse_overrides(options["config_overrides"])
    states = next(values[name] for name in _DROPOUT if name in values)
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
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
    masks, rate = _masked(options), f"{_scientific(options['learning_rate'])}, {warmup}, {schedule}"
    if phases := options.get("phases"):
        # What changes with a phase is not the run's.
        masks = ("by phase" if any("mlm_probability" in phase for phase in phases) else masks[0], masks[1])
        rate = f"{_scientific(options['learning_rate'])}, by phase" if "rate" in phases[0] else rate
        length = " → ".join(dict.fromkeys(str(phase.get("block_size", length)) for phase in phases))
    adam = f"{options['adam_beta1']:g}, {options['adam_beta2']:g}, {_scientific(options['adam_epsilon'])}"
    adam += f", {'yes' if options['adam_bias_correction'] else 'no'}"
    return [
        " + ".join(_link(name, "docs/papers.md") for name in recipes),
        _trained(method, options),
        *masks,
        f"{length}, {text}",
        f"{batch} × {f'{steps:,} steps' if steps > 0 else f'{epochs:g} epochs'}",
        rate,
        "Adafactor" if options["optim"] == "adafactor" else adam,
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
    """Yield the rows of the table of options of papers.md: one for each stack of recipes that the page names, in its order."""
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
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").rpartition("<!-- end of table -->")[2]
    stacks = dict.fromkeys(stack(command) for command in COMMAND.findall(text))
    yield from (_options_row(recipes) for recipes in stacks if recipes)


def paper_sections() -> dict[str, list[str]]:
    """Return the sections of papers.md, each with the commands that its paragraphs begin with."""
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").rpartition("<!-- end of table -->")[2]
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    commands = {
        title: [command for command in COMMAND.findall(part) if stack(command)]
        for title, part in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: found for title, found in commands.items() if found}


def papers_table() -> Iterator[list[str]]:
    """Yield the rows of the index of papers: one a section that has a paper."""
    yield ["Section", "Paper and code", "Loss", "Corpus", "Encoder", "Reported", "Recipes"]
    for title, commands in paper_sections().items():
        recipes = list(dict.fromkeys(name for command in commands for name in stack(command)))
        papers = {paper: address for recipe in recipes for paper, address in sources(recipe).items()}
        if not papers or title.startswith("Small"):
            continue
        known = {recipe: facts(recipe) for recipe in recipes}
        first = commands[0]
        yield [
            f"[{title}](#{re.sub(r'[^a-z0-9 -]', '', title.lower()).replace(' ', '-')})",
            _linked(papers) + _code([found.get("Source", "") for found in known.values()]),
            _trained(expanded(first)[0], resolved(first)),
            _told(known, "Corpus"),
            parameters(first),
            _told(known, "Reported"),
            ", ".join(_link(recipe, "docs/papers.md") for recipe in recipes),
        ]


def _told(known: dict[str, dict[str, str]], name: str) -> str:
    """Return a fact of the headers; of each recipe by name, if several have it."""
    found = {recipe: facts[name].rstrip(".") for recipe, facts in known.items() if name in facts}
    return "; ".join(f"{recipe}: {text}" if len(found) > 1 else text for recipe, text in found.items()) or "–"


def _code(texts: list[str]) -> str:
    """Return links to the repositories that sources name."""
    found = dict.fromkeys(
        address.rstrip(".,;:)") for text in texts for address in re.findall(r"https://github\.com/\S+", text)
    )
    return "".join(f"; [{address.split('/')[4]}]({address})" for address in found)


# The pages of the API.

AREAS = {
    "trainers": ("Trainers", "A Trainer trains one method on any suitable model, and writes checkpoint and card."),
    "arguments": (
        "Arguments",
        "Options of a run: fields in Python, and options of the same name on the command line.",
    ),
    "data": ("Data", "Text becomes documents, and documents become the examples of an objective."),
    "collators": ("Collators", "A collator makes a batch of examples, and hides tokens by keyed draws."),
    "models": ("Models", "Models that training wraps around stock models, and architectures without a stock class."),
    "vectors": (
        "Vectors of words",
        "Counts, word2vec, GloVe and the tokens of an encoder, as arrays and as one folder.",
    ),
    "evaluation": ("Evaluation", "Measures of a trained model: probes, minimal pairs, likelihoods, wrong words."),
    "hub": ("Hub", "Model cards from the record of a run."),
}


def area(name: str) -> str:
    """Return the page of the API that a public name belongs on: by its ending, or by the package that defines it."""
    module = hf_pretrain._MODULES[name]
    if name.endswith("Trainer"):
        return "trainers"
    if name.endswith(("Arguments", "Error")):
        return "arguments"
    if "Collator" in name:
        return "collators"
    if name.startswith(("compare", "log_likelihood", "score_")):
        return "evaluation"
    package = module.split(".")[1]
    tables = ("models.static_embedding", "models.sparse_text", "evaluation.words")
    if module.startswith(("hf_pretrain.vectors.", *(f"hf_pretrain.{name}" for name in tables))):
        return "vectors"
    packages = {"data": "data", "tasks": "data", "evaluation": "evaluation", "hub": "hub", "training": "trainers"}
    packages["commands"] = "trainers"
    return packages.get(package, "models")


def api_page(page: str) -> str:
    """Return the text of a page of the API; options of arguments come as tables, with their help."""
    names = sorted(name for name in hf_pretrain.__all__ if name != "__version__" and area(name) == page)
    title, sentence = AREAS[page]
    text = f"# {title}\n\n{sentence} `from hf_pretrain import …` imports every name of this page.\n"
    for name in names:
        text += f"\n::: hf_pretrain.{name}\n"
        if page == "arguments" and is_dataclass(value := getattr(hf_pretrain, name)):
            text += "    options:\n      members: false\n      show_signature: false\n\n" + _options(value)
    return text


def _options(arguments: type) -> str:
    """Return the options that a dataclass adds to the classes it is built on, as a table."""
    inherited = {field.name for base in arguments.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    rows = [field for field in fields(arguments) if field.name not in inherited] or []
    if not rows:
        return ""
    text = "| Option | Default | What it does |\n| --- | --- | --- |\n"
    for field in rows:
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = "" if default is MISSING or default is None else f"`{default}`"
        meaning = str(field.metadata.get("help", "")).replace("%%", "%").replace("|", "\\|")
        text += f"| `{field.name}` | {shown} | {meaning} |\n"
    return text


# llms.txt.


def _entries(nav: list[Any], heading: str = "") -> Iterator[tuple[str, str, str]]:
    for entry in nav:
        ((title, place),) = entry.items()
        if isinstance(place, list):
            yield from _entries(place, title)
        else:
            yield heading, title, place


def llms_text() -> str:
    """Return llms.txt: the pages of the site, with their addresses and first sentences."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("tag:", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=loader)
    groups: dict[str, list[str]] = {}
    for heading, title, place in _entries(site["nav"]):
        address = site["site_url"] + place.removesuffix("index.md").replace(".md", "/")
        groups.setdefault(heading or "Start", []).append(f"- [{title}]({address}): {first_sentence(place)}")
    text = f"# {site['site_name']}\n\n> {site['site_description']}\n"
    return text + "".join(f"\n## {heading}\n\n" + "\n".join(lines) + "\n" for heading, lines in groups.items())


def first_sentence(page: str) -> str:
    """Return the first sentence of a page's text, without links."""
    text = PAGES[f"docs/{page}"]() if f"docs/{page}" in PAGES else (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    prose = next(part for part in paragraphs if part[:1] not in "#<|!-")
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", re.split(r"(?<=[.:?])(?: |$)", prose)[0]).rstrip(":")


TABLES = {
    "README.md": {"methods": methods_table},
    "docs/objectives.md": {"recipes": recipes_table},
    "docs/papers.md": {"papers": papers_table, "options": options_table},
}
PAGES: dict[str, Any] = {f"docs/api/{page}.md": partial(api_page, page) for page in AREAS} | {
    "docs/llms.txt": llms_text
}


def _link(recipe: str, page: str) -> str:
    """Return a link to a recipe: an address in the README, which PyPI shows too, and a path elsewhere."""
    folder = f"{REPOSITORY}/blob/main" if page == "README.md" else ".."
    return f"[{recipe}]({folder}/trainers/recipes/{recipe}.yaml)"


def _linked(papers: dict[str, str]) -> str:
    return ", ".join(f"[{paper}]({papers[paper]})" for paper in sorted(papers, key=lambda paper: paper[-4:]))


def written(page: str) -> str:
    """Return the text of a page as it is to be."""
    if page in PAGES:
        return str(PAGES[page]())

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
    for page in (*TABLES, *PAGES):
        text, path = written(page), ROOT / page
        if not path.exists() or text != path.read_text(encoding="utf-8"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{page} is written anew")
