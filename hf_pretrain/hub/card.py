"""The model card: plain facts about a run in, a README for the Hub out.

A card holds numbers that were measured and nothing else: what is not known is left out, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_pretrain.hub import card_text, plots
from hf_pretrain.hub.environment import Energy
from hf_pretrain.hub.evaluation import Evaluation, evaluation_table
from hf_pretrain.hub.files import write_text
from hf_pretrain.hub.metadata import card_metadata, hub_id
from hf_pretrain.hub.readme import Written, merge

logger = logging.get_logger(__name__)

_TEMPLATE = "pretraining.md.jinja"
# A leading underscore keeps a file out of what is pushed to the Hub.
_SET_ASIDE = "_README.before.md"


@dataclass(frozen=True, kw_only=True)
class ObjectiveDescription:
    """What a reader should know of a pre-training objective.

    Attributes:
        name: Name of the method on the command line and as a tag: "rtd".
        title: Its name in the field: "Replaced token detection".
        description: One paragraph, in Markdown.
        formula: The loss in LaTeX, without delimiters.
        citations: BibTeX entries.
        pipeline_tag: The Hub's task for models of this objective: "fill-mask", "feature-extraction", ...
        usage: Python code that uses the trained head, where "{repo}" stands for the repository and
            "{model_class}" for the stock class that opens it.
    """

    name: str
    title: str
    description: str
    formula: str = ""
    citations: Sequence[str] = ()
    pipeline_tag: str = "feature-extraction"
    usage: str = ""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a run took; what was not measured stays `None` and is left out of the card.

    Attributes:
        parameters: Parameters of the model at the root of the repository.
        trained_parameters: All that were trained, those of the auxiliary parts included.
        steps: Optimizer steps.
        planned_steps: Steps until the end of the run.
        examples_per_step: Examples of a step, over all devices and accumulation steps.
        tokens: Tokens seen, padding left out, over all devices.
        seconds: Wall-clock time of the training, since its last resume if it was resumed.
        resumed_at_step: Step of the last resume; `None` if there was none.
        timed_tokens: Tokens seen in `seconds`, where that is not all of them.
        hardware: See [`hf_pretrain.hub.environment.hardware`].
        processes: Processes that trained together.
        precision: "fp32", "bf16", ...
        peak_memory_mib: The most memory in use at a time, in MiB: of one device, or of one process on a CPU.
        energy: What was measured of it.
    """

    parameters: int | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    examples_per_step: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    resumed_at_step: int | None = None
    timed_tokens: int | None = None
    hardware: str | None = None
    processes: int | None = None
    precision: str | None = None
    peak_memory_mib: float | None = None
    energy: Energy | None = None

    @property
    def is_partial(self) -> bool:
        """Whether the run had more steps to go."""
        return bool(self.steps and self.planned_steps and self.steps < self.planned_steps)


@dataclass(frozen=True, kw_only=True)
class PretrainingCard:
    """The facts of a card, as plain data.

    Attributes:
        model_name: Name of the model, the title of the card.
        model_class: transformers class that opens the root of the repository with its head: "ElectraForPreTraining".
        objective: What it was trained to do.
        has_own_code: Whether that class is no stock one and its code lies in the repository.
        fine_tuning_class: Auto class that opens the root with a fresh head for a task, "" if there is none.
        repo: What the snippets load: the repository's id, or "." for the folder of the card.
        note: A paragraph to put before all others.
        origin: How the weights began, in Markdown, where `base_model` does not tell all of it: "Cut from ...".
        base_model: Hub id of the model whose weights the run began with, or the absolute path of a local one, which is
            not named in the card; `None` if the run began from scratch.
        language: ISO code or codes of the text.
        license: The Hub's identifier of a license: "apache-2.0".
        datasets: Hub ids of data sets among the training data.
        data: The training data, by what each entry is: {"sources": ["a.txt"], "documents": 1200, "tokens": 2_000_000,
            "blocks": 16_000, "tokenizer": "WordPiece", "vocabulary_size": 8000, "held_out_documents": 60, ...}.
        recipe: Options of the run; see [`recipe_options`].
        log_history: `Trainer.state.log_history`.
        metrics_before: Held-out metrics before the first step, keyed as `Trainer.evaluate` returns them; of several
            held-out sets those of all.
        metrics_after: The same after the last step.
        evaluation_name: What they were measured on.
        evaluations: What was measured on tasks.
        comparison: Header and rows of a table of the model beside the one that taught it.
        compute: What the run took.
        parts: Sub-folder -> (class that opens it, what it is). The class is a name in transformers or a dotted path,
            or "" where the folder is not a checkpoint.
        limits: What the model should not be trusted with, in Markdown.
        versions: See [`hf_pretrain.hub.environment.versions`].
    """

    model_name: str
    model_class: str
    objective: ObjectiveDescription
    has_own_code: bool = False
    fine_tuning_class: str = ""
    repo: str = "."
    note: str = ""
    origin: str = ""
    base_model: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    evaluation_name: str = "held-out documents"
    evaluations: Sequence[Evaluation] = ()
    comparison: Sequence[card_text.Row] = ()
    compute: Compute = Compute()
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


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
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(source)
    text = template.render(
        card=card,
        metadata=card_metadata(card).to_yaml(),
        origin=card.origin or card_text.origin(card.base_model, hub_id=hub_id(card.base_model)),
        snippets=card_text.loading_snippets(
            card.repo, model_class=card.model_class, usage=card.objective.usage, has_own_code=card.has_own_code
        ),
        fine_tuning=card_text.fine_tuning_snippet(
            card.repo,
            auto_class=card.fine_tuning_class,
            model_class=card.model_class,
            has_own_code=card.has_own_code,
        ),
        parts=card_text.part_rows(card.parts),
        part_snippet=card_text.parts_snippet(card.repo, parts=card.parts),
        data=card_text.rows(card.data),
        recipe=card_text.yaml_block(card.recipe),
        metrics=card_text.metric_table(
            card.metrics_before,
            card.metrics_after,
            after_title=card_text.after_title(card.metrics_after, card.compute.steps),
        ),
        tasks=evaluation_table(tuple(card.evaluations)),
        compute=card_text.compute_rows(card.compute),
        figures=plots.training_figures(card.log_history),
        plots_folder=plots_folder,
        versions=card_text.rows(card.versions, as_is=True),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def write_card(card: PretrainingCard, output_dir: Path | str) -> Path:
    """Write README.md, the pictures it shows and the record of the run into a folder.

    What the user changed in a card that was written before stays; see [`hf_pretrain.hub.readme`]. A README.md of another origin,
    or words of the user about what the run has changed too, are set aside in `_README.before.md`, with a warning.

    Args:
        card: The facts.
        output_dir: Folder of the model.

    Returns:
        The path of README.md.
    """
    from hf_pretrain.hub.record import read_written, write_record  # a record is made of a card

    path = Path(output_dir, "README.md")
    text = render_card(card)
    if path.is_file():
        text = _with_edits(path, text, read_written(output_dir))
    plots.plot_training(card.log_history, output_dir)
    write_text(path, text)
    write_record(card, output_dir)
    return path


def _with_edits(path: Path, text: str, written: Written | None) -> str:
    old = path.read_text(encoding="utf-8-sig", errors="replace")
    if written is None:
        reason = "it was not written here"
    else:
        try:
            text, replaced = merge(old, text, written)
        except ValueError as error:
            reason = str(error)
        else:
            if not replaced:
                return text
            reason = f"the run has changed what you did: {', '.join(replaced)}"
    write_text(path.with_name(_SET_ASIDE), old)
    logger.warning(f"{path} is replaced, and kept as {_SET_ASIDE}: {reason}")
    return text


def recipe_options(options: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make up a recipe: those that differ from their defaults, and the essential ones.

    Left out are options without a value and those that say where and how to save, log and push. Absolute paths keep
    only their last part, so that a card tells nothing of the machine.

    Args:
        options: All options of the run, such as `args.to_dict()`.
        defaults: The same of arguments made with nothing set.

    Returns:
        The chosen options in the order of `options`.
    """
    chosen = {}
    for name, value in card_text.plain(options).items():
        changed = value != card_text.plain(defaults.get(name))
        if value is None or not (changed or name in _ESSENTIAL_OPTIONS) or name.startswith(_HOUSEKEEPING_OPTIONS):
            continue
        chosen[name] = card_text.without_folders(value)
    return chosen


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
