"""The model card: plain facts about a run in, a README for the Hub out.

A card holds numbers that were measured and nothing else: what is not known is left out, never guessed.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain, write_bytes, write_text
from hf_pretrain.hub import plots
from hf_pretrain.hub import text as card_text
from hf_pretrain.hub.environment import compute_rows
from hf_pretrain.hub.evaluation import Evaluation, card_metadata, evaluation_table, hub_id
from hf_pretrain.hub.record import (
    PretrainingCard,
    Written,
    check_weights,
    describe_written,
    merge,
    read_record,
    read_written,
    was_cut_off,
    write_record,
)
from hf_pretrain.hub.text import label

logger = logging.get_logger(__name__)

_TEMPLATE = "pretraining.md.jinja"
# A leading underscore keeps a file out of what is pushed to the Hub.
_SET_ASIDE = "_README.before.md"


def render_card(card: PretrainingCard, *, plots_folder: str = plots.PLOTS_FOLDER) -> str:
    """Return the card as Markdown with the Hub's metadata in front; nothing is read or written.

    Args:
        card: The facts.
        plots_folder: Folder of the pictures that [`write_card`] draws, relative to the card.

    Returns:
        The text of a README.md.
    """
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    source = files("hf_pretrain.model_cards").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # Markdown, not HTML: what users name is escaped for it in `card_text`, and code blocks must stay as they are.
    template = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).from_string(source)
    text = template.render(
        card=card,
        title=card_text.escaped(card.model_name),
        evaluation_name=card_text.escaped(card.evaluation_name),
        metadata=card_metadata(card).to_yaml(),
        origin=card.origin or card_text.origin(card.base_model, hub_id=hub_id(card.base_model)),
        fresh=f"; {card_text.cell(card.fresh_parameters)} began anew" if card.fresh_parameters else "",
        root=card_text.root_sentence(
            model_class=card.model_class, has_own_code=card.has_own_code, adapter=card_text.cell(card.adapter)
        ),
        snippets=_loading_snippets(card),
        fine_tuning=card_text.fine_tuning_snippet(
            card.repo,
            auto_class=card.fine_tuning_class,
            model_class=card.model_class,
            has_own_code=card.has_own_code,
        ),
        parts=card_text.part_rows(card.parts),
        part_snippet=card_text.parts_snippet(card.repo, parts=card.parts),
        data=card_text.rows(card_text.without_folders(plain(card.data))),
        recipe=card_text.yaml_block(card_text.without_folders(plain(card.recipe))),
        metrics=card_text.metric_table(
            card.metrics_before,
            card.metrics_after,
            after_title=card_text.after_title(card.metrics_after, card.compute.steps),
        ),
        chosen_by=label(card.chosen_by) if card.chosen_by else "",
        tasks=evaluation_table(tuple(card.evaluations)),
        compute=compute_rows(card.compute),
        figures=plots.training_figures(card.log_history),
        plots_folder=plots_folder,
        versions=card_text.rows(card.versions, as_is=True),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _loading_snippets(card: PretrainingCard) -> list[str]:
    if card.adapter:
        return [card_text.adapter_snippet(card.repo, model_class=card.model_class, base_model=hub_id(card.base_model))]
    return card_text.loading_snippets(
        card.repo, model_class=card.model_class, usage=card.objective.usage, has_own_code=card.has_own_code
    )


def write_card(card: PretrainingCard, output_dir: Path | str) -> Path:
    """Write README.md, the pictures it shows and the record of the run into a folder.

    What the user changed in a card that was written before stays; see [`hf_pretrain.hub.record`]. A README.md of another origin,
    or words of the user about what the run has changed too, are set aside in `_README.before.md`, with a warning.

    Args:
        card: The facts.
        output_dir: Folder of the model.

    Returns:
        The path of README.md.
    """
    path = Path(output_dir, "README.md")
    text = render_card(card)
    written = describe_written(text)
    if path.is_file():
        text = _with_edits(path, text, read_written(output_dir))
    plots.plot_training(card.log_history, output_dir, exported_step=card.weights_step)
    write_text(path, text)
    write_record(card, output_dir, written=written)
    return path


def add_evaluation(folder: Path | str, evaluation: Evaluation) -> Path:
    """Add what was measured on a task to the card of a model, and make the card again.

    An evaluation of the same task and split takes the place of the earlier one.

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
        InputError: If the folder has no record of its run, or a damaged one, or weights that the record does not tell of.
    """
    card = read_record(folder)
    check_weights(folder)
    known = {(evaluation.task, evaluation.split): evaluation for evaluation in card.evaluations}
    known |= {(evaluation.task, evaluation.split): evaluation for evaluation in evaluations}
    return write_card(dataclasses.replace(card, evaluations=tuple(known.values()), **changes), folder)


def _with_edits(path: Path, text: str, written: Written | None) -> str:
    """Return a card with what the user changed in the one that is there, which is kept if words of it would be lost."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        old, reason = content.decode(encoding), ""
    except UnicodeDecodeError:
        # Any byte has a meaning there, so nothing is lost.
        old, reason = content.decode("latin-1"), "it is not UTF-8, and was read as Latin-1"
    old = re.sub(r"\r\n?", "\n", old)
    if written is None:
        reason = "it was not written here"
    else:
        is_cut_off = was_cut_off(old, written, made=_made_before(path.parent))
        try:
            text, replaced = merge(old, text, written, is_cut_off=is_cut_off)
        except ValueError as error:
            reason = str(error)
        else:
            if is_cut_off and replaced:
                reason = "it was cut off, and what it lacked is made again"
            elif replaced:
                reason = f"the run has changed what you did: {', '.join(replaced)}"
            if not reason:
                return text
    logger.warning(f"{path} is replaced, and kept as {_set_aside(path, content)}: {reason}")
    return text


def _made_before(folder: Path) -> str | None:
    try:
        return render_card(read_record(folder))
    except InputError:
        return None


def _set_aside(path: Path, content: bytes) -> str:
    """Keep the bytes of a card under a name that no other one has; return the name."""
    number, name = 1, _SET_ASIDE
    while (kept := path.with_name(name)).exists() and kept.read_bytes() != content:
        number += 1
        name = _SET_ASIDE.replace(".before", f".before.{number}")
    write_bytes(path.with_name(name), content)
    return name


def recipe_options(options: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make up a recipe: those that differ from their defaults, and the essential ones.

    Left out are options without a value and those that say where and how to save, log and push. Paths keep only their last part,
    so that a card tells nothing of the machine.

    Args:
        options: All options of the run, such as `args.to_dict()`.
        defaults: The same of arguments made with nothing set.

    Returns:
        The chosen options in the order of `options`.
    """
    chosen = {}
    for name, value in plain(options).items():
        changed = value != plain(defaults.get(name))
        if value is None or not (changed or name in _ESSENTIAL_OPTIONS) or name.startswith(_HOUSEKEEPING_OPTIONS):
            continue
        chosen[name] = value
    return card_text.portable_options(chosen)


def snippets(markdown: str) -> list[str]:
    """Return the Python code blocks of a Markdown text, in order; the tests of the cards run them."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


_ESSENTIAL_OPTIONS = {
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
}
_HOUSEKEEPING_OPTIONS = (
    *("output_dir", "overwrite_output_dir", "logging_", "log_level", "save_", "hub_", "push_to_hub", "report_to"),
    *(
        "run_name",
        "resume_from_checkpoint",
        "disable_tqdm",
        "accelerator_config",
        "dataloader_pin_memory",
        "do_train",
        "do_eval",
        "config",
        "local_rank",
    ),
)
