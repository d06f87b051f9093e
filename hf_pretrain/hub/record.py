"""The record of a run: every fact of its card, as JSON beside the weights, so that the card can be made again.

`PretrainingCard` holds the facts; an unknown fact is left out, never guessed. `write_record` stores them in
`pretraining/run.json` without the paths of this machine, and `read_record` reads them. The record travels with the model, so a
copy from the Hub can be given evaluations too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_pretrain.errors import InputError
from hf_pretrain.files import from_plain, plain, weights_digest, write_text
from hf_pretrain.hub.environment import Compute
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.text import Row, hub_id, without_folders

RECORD = "pretraining/run.json"
_FORMAT = 2
# JSON has no such numbers, but the log of a run may.
_NOT_FINITE = "not a finite number"


def cite(*names: str) -> tuple[str, ...]:
    """Return entries of `citations.bib` by their names, as BibTeX."""
    entries = files("hf_pretrain").joinpath("citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    known = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return tuple(known[name] for name in names)


SHARED_METRICS = {
    "loss": "The weighted sum of the losses; it compares runs of the same options alone.",
    "mlm_loss": "How surprised the model is by the true token at a masked position, in nats; 0 is certainty.",
    "mlm_perplexity": "As many tokens, all as likely, would leave the model as unsure; it depends on tokenizer and masks.",
    "mlm_accuracy": "Share of the masked positions where the first guess is the true token.",
    "fake_rate": "Share of the tokens that the generator replaced: how hard the question is, not how good the answer.",
    "sampled_accuracy": "Share of the generator's samples that are the true token.",
    "disc_gain": "Share of the doubt about replacements that the model resolves: 0 is knowing their number alone, 1 is perfect.",
}
"""What a number of several objectives says, in one sentence for an outsider; see `ObjectiveDescription.metrics`."""


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
        usage: Python code that uses the trained head; see [`hf_pretrain.hub.examples.in_code`] for the names in it, such as
            "{repo}".
        metrics: Metric -> what its number says, in one plain sentence for an outsider: {"mlm_loss": "..."}.
        headline: The three to five metrics that the Hub shows, of those that are measured.
        tags: Further tags for the Hub, such as the name of a library that opens the model.
    """

    name: str
    title: str
    description: str
    formula: str = ""
    citations: Sequence[str] = ()
    pipeline_tag: str = "feature-extraction"
    usage: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    headline: Sequence[str] = ()
    tags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PretrainingCard:
    """The facts of a card, as plain data.

    Attributes:
        model_name: Name of the model, the title of the card.
        model_class: transformers class that opens the root of the repository with its head: "ElectraForPreTraining".
        objective: What it was trained to do.
        has_own_code: Whether that class is no stock one and its code lies in the repository.
        loading: Python code that opens the root, where no Auto class does; "" if one does.
        adapter: Kind of adapter, such as "LORA", where the root holds one alone, without the model below it; "" for a model.
        fresh_parameters: What of the model did not come from `base_model` and began anew, in words: "the head cls".
        fine_tuning_class: Auto class that opens the root with a fresh head for a task, "" if there is none.
        repo: What the snippets load: the repository's id, or "." for the folder of the card.
        branch: Branch of `repo` that the snippets load; "" for the main one.
        note: A paragraph to put before all others.
        origin: How the weights began, in Markdown, where `base_model` does not say all of it: "Cut from ...".
        base_model: Hub id of the model whose weights the run began with, or the absolute path of a local one, which is
            not named in the card; `None` if the run began from scratch.
        earlier: Header and rows of a table of the trainings before this one, of which records are there, the first one first.
        language: ISO code or codes of the text.
        license: The Hub's identifier of a license: "apache-2.0".
        datasets: Hub ids of data sets among the training data.
        tags: Tags of the model on the Hub, beside those of every card.
        examples: Two sentences for the code, the first with bars around the word to mask; () for ours, see
            [`hf_pretrain.hub.examples.examples_of`].
        data: The training data, by what each entry is: {"sources": ["a.txt"], "documents": 1200, "tokens": 2_000_000,
            "blocks": 16_000, "tokenizer": "WordPiece", "vocabulary_size": 8000, "held_out_documents": 60, ...}.
        recipe: Options of the run that are not the defaults, and the essential ones; see [`recipe_options`].
        options: All options that define the run, defaults included; see [`defining_options`].
        sizes: Of the root, "", and of each part that was trained, by its sub-folder or name: sizes by what they are.
        learning_rates: (step, learning rate) as training had them, densely enough to draw.
        log_history: `Trainer.state.log_history`.
        metrics_before: Held-out metrics before the first step, keyed as `Trainer.evaluate` returns them; of several
            held-out sets those of all.
        metrics_after: The same of the weights that are exported.
        phases: The phases of the run, each with its "name", its "start" and "end" in steps, and the options that tell it from
            others; () of a run without.
        branch_of: What the run is a branch of: "name", "step" and "phase"; {} if it is none.
        weights_step: Step of these weights, where it is not the last one of the run.
        chosen_by: Key of the metric that they were the best by: "mlm_accuracy".
        evaluation_name: What they were measured on.
        evaluations: What was measured on tasks.
        comparison: Header and rows of a table of the model beside the one that taught it.
        references: Header and rows of a table of what counting and copying reach on the held-out pairs.
        sections: Further sections, in Markdown, by their titles.
        samples: Sentences with noise, what the model makes of each, and the sentence itself.
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
    loading: str = ""
    adapter: str = ""
    fresh_parameters: str = ""
    fine_tuning_class: str = ""
    repo: str = "."
    branch: str = ""
    note: str = ""
    origin: str = ""
    base_model: str | None = None
    earlier: Sequence[Row] = ()
    language: str | Sequence[str] | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    examples: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    learning_rates: Sequence[tuple[float, float]] = ()
    log_history: Sequence[Mapping[str, Any]] = ()
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    phases: Sequence[Mapping[str, Any]] = ()
    branch_of: Mapping[str, Any] = field(default_factory=dict)
    weights_step: int | None = None
    chosen_by: str = ""
    evaluation_name: str = "held-out documents"
    evaluations: Sequence[Evaluation] = ()
    comparison: Sequence[Row] = ()
    references: Sequence[Row] = ()
    samples: Sequence[tuple[str, str, str]] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    compute: Compute = Compute()
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def write_record(card: PretrainingCard, folder: Path | str, *, readme: str) -> Path:
    """Write the facts of a card into the folder of its model, without the paths of this machine.

    Args:
        card: The facts.
        folder: Folder of the model.
        readme: Digest of the card in README.md, by which an edited one is found.

    Returns:
        The path of the record.
    """
    base_model = card.base_model
    if base_model and hub_id(base_model) is None:
        base_model = f"./{Path(base_model).name}"  # still no name on the Hub
    # An id without its folders would look like one of the Hub.
    datasets = tuple(filter(hub_id, card.datasets))
    facts = without_folders(plain(dataclasses.replace(card, base_model=base_model, datasets=datasets)))
    # A copy without its weights keeps the digest of those that it was made with.
    weights = weights_digest(folder) or read_content(folder).get("weights")
    content = {"format": _FORMAT, "weights": weights, "card": facts, "readme": readme}
    strict = json.loads(json.dumps(content), parse_constant=lambda name: {_NOT_FINITE: name})
    return write_text(Path(folder, RECORD), json.dumps(strict, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(folder: Path | str) -> PretrainingCard:
    """Return the facts that [`write_record`] left in the folder of a model.

    Raises:
        InputError: If there is no record, or it cannot be read.
    """
    path = Path(folder, RECORD)
    content = _checked_content(path)
    try:
        card: PretrainingCard = from_plain(PretrainingCard, content["card"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): copy it again from where the model comes from") from error
    return card


def read_content(folder: Path | str) -> dict[str, Any]:
    """Return the record of a folder as it is stored, with the digests of its weights and of its README; {} if there is none."""
    try:
        return _checked_content(Path(folder, RECORD))
    except InputError:
        return {}


def read_weights(folder: Path | str) -> str | None:
    """Return the digest of the weights that the record of a folder describes; None if that is not known."""
    weights = read_content(folder).get("weights")
    return weights if isinstance(weights, str) else None


def check_weights(folder: Path | str) -> None:
    """Refuse a folder whose weights are others than those that its record describes.

    Raises:
        InputError: If they are.
    """
    known, found = read_weights(folder), weights_digest(folder)
    if None not in (known, found) and known != found:
        raise InputError(
            f"the weights in {folder} are not those that {RECORD} tells of, so its numbers are not theirs: put the weights back, "
            "or remove the record and write a card of your own"
        )


def _checked_content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path.parents[1]} has no {RECORD}, the record of its run: name the folder of a model whose card hf_pretrain wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_number_or_mapping)
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): copy it again from where the model comes from") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise InputError(f"{path} is no record of a run: copy it again from where the model comes from")
    if content["format"] > _FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, this version knows up to {_FORMAT}: install a newer hf_pretrain"
        )
    return content


def _number_or_mapping(mapping: dict[str, Any]) -> Any:
    return float(mapping[_NOT_FINITE]) if mapping.keys() == {_NOT_FINITE} else mapping
