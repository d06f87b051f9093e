"""The model card: plain facts about a run in, a README for the Hub out.

A card holds numbers that were measured and nothing else: what is not known is left out, never guessed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils import logging

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import plain, write_bytes, write_text
from hf_pretrain.hub import plots
from hf_pretrain.hub.evaluation import Evaluation, card_metadata
from hf_pretrain.hub.examples import in_code
from hf_pretrain.hub.record import PretrainingCard, check_weights, read_content, read_record, write_record
from hf_pretrain.hub.text import (
    cell,
    duration,
    escaped,
    hub_id,
    label,
    metric_table,
    number,
    phase_metrics,
    phase_table,
    portable_options,
    rows,
    size_table,
    without_folders,
    yaml_block,
)

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.get_logger(__name__)

_TEMPLATE = "pretraining.md.jinja"
_FILTERS: tuple[Callable[..., Any], ...] = (
    *(cell, duration, escaped, hub_id, in_code, label, number, plain, rows, size_table, without_folders, yaml_block),
)
# A leading underscore keeps a file out of what is pushed to the Hub.
_SET_ASIDE = "_README.before.md"
_BEGIN = "<!-- hf_pretrain makes the text from here on; what you write above this line stays -->"
_END = "<!-- up to here; what you write below this line stays -->"
_CODE = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_PARTS = re.compile(
    rf"---\n(?P<front>.*?)^---[ \t]*\n(?P<above>.*?)^{re.escape(_BEGIN)}\n(?P<made>.*)^{re.escape(_END)}$(?P<below>.*)",
    flags=re.DOTALL | re.MULTILINE,
)


def render_card(card: PretrainingCard, *, plots_folder: str = plots.PLOTS_FOLDER) -> str:
    """Return the card as Markdown with the Hub's metadata in front; nothing is read or written.

    Args:
        card: The facts.
        plots_folder: Folder of the pictures that [`write_card`] draws, relative to the card.

    Returns:
        The text of a README.md.
    """
    text = _template().render(
        card=card,
        metadata=card_metadata(card).to_yaml(),
        begin=_BEGIN,
        end=_END,
        metrics=metric_table(
            card.metrics_before,
            card.metrics_after,
            last_step=card.compute.steps,
            meanings=card.objective.metrics,
        ),
        phases=phase_table(card.phases),
        phase_metrics=phase_metrics(card.log_history, card.phases),
        figures=plots.training_figures(card.log_history, learning_rates=card.learning_rates),
        plots_folder=plots_folder,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    return _of_branch(text, card) if card.branch and card.repo != "." else text


@cache
def _template() -> Template:
    """Return the template of the card, which takes longer to compile than to render."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML: `cell` and `escaped` treat what users name, and code blocks must stay as they are.
    environment = Environment(
        loader=PackageLoader("hf_pretrain.model_cards", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    return environment.get_template(_TEMPLATE)


def _of_branch(text: str, card: PretrainingCard) -> str:
    """Let the code of a card open its branch: without a revision it would open other weights."""
    name = f'"{card.repo}"'
    return _CODE.sub(lambda code: code[0].replace(name, f'{name}, revision="{card.branch}"'), text)


def write_card(card: PretrainingCard, output_dir: Path | str) -> Path:
    """Write README.md, the pictures it shows and the record of the run into a folder.

    The text that the user wrote before and behind the card stays, and so does the front matter that the user changed; see
    [`keep_edits`]. Where this is not possible, the old file is kept as `_README.before.md`, with a warning.

    Args:
        card: The facts.
        output_dir: Folder of the model.

    Returns:
        The path of README.md.
    """
    path = Path(output_dir, "README.md")
    made = text = render_card(card)
    if path.is_file():
        content, record = path.read_bytes(), read_content(output_dir)
        try:
            old = re.sub(r"\r\n?", "\n", content.decode("utf-8-sig"))
            text, lost = keep_edits(old, made, before=_front_matter(output_dir), known=record.get("readme"))
        except ValueError as error:  # it is not UTF-8, or not our card
            lost = str(error)
        if lost:
            logger.warning(f"{path} is replaced, and kept as {_set_aside(path, content)}: {lost}")
    plots.plot_training(
        card.log_history,
        output_dir,
        exported_step=card.weights_step,
        learning_rates=card.learning_rates,
        phases=[(phase["name"], phase["start"], phase["end"]) for phase in card.phases],
    )
    write_text(path, text)
    write_record(card, output_dir, readme=_digest(_take_apart(made).made))
    return path


def add_evaluation(folder: Path | str, evaluation: Evaluation) -> Path:
    """Add what was measured on a task to the card of a model, and make the card again.

    An evaluation replaces an earlier one of the same task and split.

    Args:
        folder: Folder of the model: what a run left, or a copy from the Hub.
        evaluation: The scores.

    Returns:
        The path of README.md.

    Raises:
        InputError: If the folder has no record of its run, or a damaged one.
    """
    return update_card(folder, evaluations=[evaluation])


def update_card(folder: Path | str, *, evaluations: Sequence[Evaluation] = (), **changes: Any) -> Path:
    """Make the card of a model again, from the record of its run.

    Args:
        folder: Folder of the model.
        evaluations: Evaluations to add; see [`add_evaluation`].
        **changes: Other fields of [`PretrainingCard`] to change, such as `license`.

    Returns:
        The path of README.md.

    Raises:
        InputError: If the folder has no record of its run, or a damaged one, or weights of another run.
    """
    card = read_record(folder)
    check_weights(folder)
    known = {(evaluation.task, evaluation.split): evaluation for evaluation in card.evaluations}
    known |= {(evaluation.task, evaluation.split): evaluation for evaluation in evaluations}
    return write_card(dataclasses.replace(card, evaluations=tuple(known.values()), **changes), folder)


class _Parts(NamedTuple):
    """A README.md: front matter, text of the user, the card, text of the user."""

    front: dict[str, Any]
    above: str
    made: str
    below: str


def _take_apart(text: str) -> _Parts:
    """Return the parts of a README.md.

    Raises:
        ValueError: If the front matter or one of the two marks around the card is missing or damaged.
    """
    import yaml

    found = _PARTS.fullmatch(text)
    if found is None:
        raise ValueError("it was not written here, or a mark around the card is gone")
    try:
        front = yaml.safe_load(found["front"])
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter is no YAML: {one_line(error)}") from error
    if not isinstance(front, dict):
        raise ValueError("the front matter holds no names and values")
    return _Parts(front, found["above"].strip("\n"), found["made"], found["below"].strip("\n"))


def keep_edits(old: str, new: str, *, before: Mapping[str, Any], known: str | None) -> tuple[str, str]:
    """Return a new card with what the user wrote around the old one.

    Text above and below the two marks stays. An entry of the front matter that the user changed stays, unless the run changed
    it too; results that others added to the model-index stay.

    Args:
        old: The README.md that is there.
        new: The card as it is made from the facts.
        before: The front matter that was written last.
        known: Digest of the card that was written last.

    Returns:
        The text; and which words of the user are not in it, "" if all are.

    Raises:
        ValueError: If the old text has no front matter or lacks a mark.
    """
    from huggingface_hub import CardData

    theirs, ours = _take_apart(old), _take_apart(new)
    front, lost = {}, []
    for name in dict.fromkeys((*ours.front, *theirs.front)):
        mine, made, last = (values.get(name) for values in (theirs.front, ours.front, before))
        if name == "model-index":
            front[name] = _with_results_of_others(mine, made, last)
        else:
            front[name] = made if mine == last or made != last else mine
            if mine not in (None, last, front[name]):
                lost.append(f"{name} of the front matter")
    if _digest(theirs.made) not in (known, _digest(ours.made)):
        lost.append("the text between the two marks")
    metadata = CardData(**{name: value for name, value in front.items() if value}).to_yaml()
    body = "\n\n".join(filter(None, (theirs.above, f"{_BEGIN}\n{ours.made}{_END}", theirs.below)))
    return f"---\n{metadata}\n---\n\n{body}\n", f"you have changed {', '.join(lost)}" if lost else ""


def _with_results_of_others(theirs: Any, ours: Any, before: Any) -> Any:
    """Return our model-index with the results of another one that are neither ours nor were."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    try:
        known, added = ([] if not index else model_index_to_eval_results(index)[1] for index in (before, theirs))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the model-index of the front matter is damaged: {error!r}") from error
    own = model_index_to_eval_results(ours)[1] if ours else []
    results = own + [one for one in added if not any(one.is_equal_except_value(other) for other in (*own, *known))]
    return eval_results_to_model_index((ours or theirs)[0]["name"], results) if results else None


def _front_matter(folder: Path | str) -> dict[str, Any]:
    """Return the front matter that the record of a folder makes; {} without a record."""
    try:
        return card_metadata(read_record(folder)).to_dict()
    except InputError:
        return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _set_aside(path: Path, content: bytes) -> str:
    """Keep the bytes of a card under a name that no other one has; return the name."""
    number, name = 1, _SET_ASIDE
    while (kept := path.with_name(name)).exists() and kept.read_bytes() != content:
        number += 1
        name = _SET_ASIDE.replace(".before", f".before.{number}")
    write_bytes(path.with_name(name), content)
    return name


ESSENTIAL_OPTIONS = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
}
# How the names of options begin that say where and how a run saves, logs and pushes.
_HOUSEKEEPING_OPTIONS = (
    *("output_dir", "overwrite_output_dir", "logging_", "log_level", "save_", "hub_", "push_to_hub", "report_to"),
    "evaluation_",
    *("run_name", "resume_from_checkpoint", "disable_tqdm", "accelerator_config", "dataloader_pin_memory"),
    *("do_train", "do_eval", "local_rank"),
)
# Whole names of those that are in the front matter, or say where options come from.
_OF_THE_CARD = {"config", "language", "license", "datasets", "tags", "private_text"}
# The same of those that change neither the model nor its numbers, by their whole name or by its beginning.
_TECHNICAL_OPTIONS = (
    *(
        "dataloader_",
        "ddp_",
        "log_on_",
        "preprocessing_num_workers",
        "project",
        "debug",
        "skip_memory_metrics",
        "ignore_data_skip",
    ),
    *("restore_callback_states", "enable_jit_checkpoint", "use_cpu", "trackio_", "torch_empty_cache_steps"),
)


def recipe_options(options: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make up a recipe: those that differ from their defaults, and the essential ones.

    Left out are options without a value and those that say where and how to save, log and push. Paths keep only their last part,
    so that a card does not describe the machine.

    Args:
        options: All options of the run, such as `args.to_dict()`.
        defaults: The same of arguments made with nothing set.

    Returns:
        The chosen options in the order of `options`.
    """
    return portable_options(
        {
            name: value
            for name, value in plain(options).items()
            if value is not None
            and (name in ESSENTIAL_OPTIONS or value != plain(defaults.get(name)))
            and not _is_housekeeping(name)
        }
    )


def defining_options(options: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the options that define a run, defaults included: all but those of saving, logging, pushing and the machine.

    Args:
        options: All options of the run, such as `hf_pretrain.options.all_options` returns them.
        without: Further ones that are left out, such as those that can have one value only.

    Returns:
        The options in their order, without the folders of the machine.
    """
    kept = {
        name: value
        for name, value in options.items()
        if name not in without
        and not _is_housekeeping(name)
        and (not name.startswith(_TECHNICAL_OPTIONS) or name == "dataloader_drop_last")
    }
    return portable_options(kept)


def _is_housekeeping(name: str) -> bool:
    return name in _OF_THE_CARD or name.startswith(_HOUSEKEEPING_OPTIONS)


def snippets(markdown: str) -> list[str]:
    """Return the Python code blocks of a Markdown text, in order; the tests of the cards run them."""
    return _CODE.findall(markdown)
