"""Cards that people have edited: what they changed in a README.md stays when the card is made again.

A card is taken apart into the entries of its front matter and its sections, and each is compared with what was written last: what
the user changed or added stays, unless the run changed the same thing since; what the user removed stays away. A card that was
cut off, by a full disk or a kill, has nothing removed: what it lacks is made again.

The facts of a model card, as plain data: what is not known is left out, never guessed.

The record of a run: every fact of its card as JSON beside the weights, so that the card can be made again.

It travels with the model, so a copy from the Hub can be given evaluations too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_pretrain.errors import InputError
from hf_pretrain.files import plain, weights_digest, write_text
from hf_pretrain.hub import text as card_text
from hf_pretrain.hub.environment import Compute, Energy
from hf_pretrain.hub.evaluation import Evaluation, hub_id
from hf_pretrain.hub.text import Row

_TITLE = "#"
_TOP = ""
_FRONT_MATTER = r"---\n(.*?)^---[ \t]*\n(.*)\Z"
_DOT_AND_LINES = re.DOTALL | re.MULTILINE


class Written(NamedTuple):
    """What a card consisted of when it was written.

    Attributes:
        metadata: Its front matter.
        sections: Heading -> fingerprint of the section.
    """

    metadata: dict[str, Any]
    sections: dict[str, str]


class Merged(NamedTuple):
    """A card made again.

    Attributes:
        text: The new text.
        replaced: What the user had changed and the run too, so that the user's words are not in it.
    """

    text: str
    replaced: list[str]


def describe_written(text: str) -> Written:
    """Return what is to be remembered of a card that was made here."""
    metadata, sections = _take_apart(text)
    return Written(metadata, {heading: _fingerprint(section) for heading, section in sections.items()})


def merge(old: str, new: str, written: Written, *, is_cut_off: bool = False) -> Merged:
    """Return a card made anew, with what the user changed in the old one.

    Args:
        old: The README.md that is there.
        new: The card as it is made from the facts.
        written: What was written last.
        is_cut_off: Whether the old one lacks its end, see [`was_cut_off`]; its last section is then replaced, and so is what
            should stand behind it.

    Raises:
        ValueError: If the old front matter cannot be read.
    """
    if is_cut_off and _front_matter_is_open(old):
        return Merged(new, ["all of it"] if old.strip() else [])
    old_metadata, old_sections = _take_apart(old)
    new_metadata, new_sections = _take_apart(new)
    if is_cut_off:
        missing, last = _missing_at_the_end(old_sections, written), list(old_sections)[-1]
        lost = {*missing, last}
        if last not in written.sections and any(heading.startswith(last) for heading in missing):
            del old_sections[last]  # half of a heading
        kept = {heading: mark for heading, mark in written.sections.items() if heading not in lost}
        written = Written(written.metadata, kept)
    metadata, replaced = _merge_metadata(old_metadata, new_metadata, written.metadata)
    sections, replaced_sections = _merge_sections(old_sections, new_sections, written.sections)
    return Merged(_put_together(metadata, sections), replaced + replaced_sections)


def was_cut_off(old: str, written: Written, *, made: str | None) -> bool:
    """Return whether a card ends before its end, which is no wish of the user.

    Args:
        old: The README.md that is there.
        written: What was written last.
        made: The text that was made last, without what the user changed, if it is known.

    Returns:
        True if nothing but white space or an open front matter is left; or if all sections from some place on are missing and the
        last one that is there breaks off: in a line, in code, or before the end of what was made; or if the last of all does.
    """
    if not old.strip() or (written.metadata and _front_matter_is_open(old)):
        return True
    try:
        _, sections = _take_apart(old)
        _, made_sections = _take_apart(made or "")
    except ValueError:
        return False
    heading, last = list(sections.items())[-1]
    whole, rest = made_sections.get(heading, "").strip(), last.strip()
    is_part, in_a_line = rest != whole and whole.startswith(rest), not old.endswith("\n")
    if not _missing_at_the_end(sections, written):
        return is_part and in_a_line
    return is_part or in_a_line or last.count("\n```") % 2 == 1


def _front_matter_is_open(text: str) -> bool:
    return not text.strip() or (text.startswith("---") and not re.match(_FRONT_MATTER, text, flags=_DOT_AND_LINES))


def _missing_at_the_end(sections: Mapping[str, str], written: Written) -> list[str]:
    """Return the sections that were written behind the last one that is still there."""
    order = list(written.sections)
    last = max((order.index(heading) for heading in sections if heading in written.sections), default=-1)
    return order[last + 1 :]


def _take_apart(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the front matter and the sections by heading, those of each level alike; text before a heading is the top."""
    import yaml

    found = re.match(_FRONT_MATTER, text, flags=_DOT_AND_LINES)
    front, body = found.groups() if found else ("", text)
    try:
        metadata = yaml.safe_load(front) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter is no YAML: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError("the front matter holds no names and values")
    sections = {_TOP: ""}
    heading, is_code = _TOP, False
    for line in body.splitlines():
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code and re.match(r"#{1,6} ", line):
            heading = _unused(line.strip(), sections)
            sections[heading] = ""
        sections[heading] += line + "\n"
    return metadata, sections


def _unused(line: str, sections: Mapping[str, str]) -> str:
    """Return what a heading is known by: the first title as such, whatever it says, and a repeated one with a number."""
    heading = _TITLE if line.startswith("# ") and _TITLE not in sections else line
    count = sum(1 for known in sections if known == heading or re.fullmatch(re.escape(heading) + r" \(\d+\)", known))
    return f"{heading} ({count + 1})" if count else heading


def _put_together(metadata: Mapping[str, Any], sections: Mapping[str, str]) -> str:
    from huggingface_hub import CardData

    body = "\n\n".join(text.strip("\n") for text in sections.values() if text.strip())
    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{body}\n"


def _fingerprint(section: str) -> str:
    lines = "\n".join(line.rstrip() for line in section.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _merge_metadata(
    old: dict[str, Any], new: dict[str, Any], written: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    merged: dict[str, Any] = {}
    replaced = []
    for name in dict.fromkeys((*new, *old)):
        theirs, ours, before = (values.get(name) for values in (old, new, written))
        if name == "model-index":
            value = _merge_results(theirs, ours, before)
        elif isinstance(theirs, list) and isinstance(ours, list):
            value = _merge_lists(theirs, ours, before if isinstance(before, list) else [])
        else:
            value = ours if theirs == before else theirs
            if theirs not in (before, ours) and ours != before:
                value = ours
                replaced.append(f"{name} of the front matter")
        if value not in (None, []):
            merged[name] = value
    return merged, replaced


def _merge_lists(theirs: list[Any], ours: list[Any], before: list[Any]) -> list[Any]:
    removed = [item for item in before if item not in theirs]
    added = [item for item in theirs if item not in before]
    return [item for item in ours if item not in removed] + [item for item in added if item not in ours]


def _merge_results(theirs: Any, ours: Any, before: Any) -> Any:
    """Merge model-indexes result by result: others may have added theirs; one that we changed is ours."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    try:
        own, known, added = (
            model_index_to_eval_results(index)[1] if index else [] for index in (ours, before, theirs)
        )
        name = (ours or theirs or [{"name": ""}])[0]["name"]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return ours
    added = [
        result
        for result in added
        if result not in known and not any(result.is_equal_except_value(other) for other in own)
    ]
    results = [*own, *added]
    return eval_results_to_model_index(name, results) if results else None


def _merge_sections(
    old: dict[str, str], new: dict[str, str], written: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    merged: dict[str, str] = {}
    replaced = []
    for heading, text in new.items():
        theirs = old.get(heading)
        if theirs is None:
            if written.get(heading) != _fingerprint(text):  # else the user removed it
                merged[heading] = text
        elif _fingerprint(theirs) in (written.get(heading), _fingerprint(text)):
            merged[heading] = text
        elif written.get(heading) == _fingerprint(text):
            merged[heading] = theirs
        else:
            merged[heading] = text
            replaced.append(heading)
    order = list(merged)
    before = None  # the heading that the user's section comes behind
    for heading, text in old.items():
        if heading in merged:
            before = heading
        elif heading not in new and heading not in written:
            merged[heading] = text
            order.insert(0 if before is None else order.index(before) + 1, heading)
            before = heading
        elif heading not in new and _fingerprint(text) != written[heading]:
            replaced.append(heading)
    return {heading: merged[heading] for heading in order}, replaced


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
class PretrainingCard:
    """The facts of a card, as plain data.

    Attributes:
        model_name: Name of the model, the title of the card.
        model_class: transformers class that opens the root of the repository with its head: "ElectraForPreTraining".
        objective: What it was trained to do.
        has_own_code: Whether that class is no stock one and its code lies in the repository.
        adapter: Kind of adapter, such as "LORA", where the root holds one alone, without the model below it; "" for a model.
        fresh_parameters: What of the model did not come from `base_model` and began anew, in words: "the head cls".
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
        metrics_after: The same of the weights that are exported.
        weights_step: Step of these weights, where it is not the last one of the run.
        chosen_by: Key of the metric that they were the best by: "mlm_accuracy".
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
    adapter: str = ""
    fresh_parameters: str = ""
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
    weights_step: int | None = None
    chosen_by: str = ""
    evaluation_name: str = "held-out documents"
    evaluations: Sequence[Evaluation] = ()
    comparison: Sequence[Row] = ()
    compute: Compute = Compute()
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    limits: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


RECORD = "pretraining/run.json"
_FORMAT = 2
# JSON has no such numbers, but the log of a run may.
_NOT_FINITE = "not a finite number"


def write_record(card: PretrainingCard, folder: Path | str, *, written: Written) -> Path:
    """Write the facts of a card into the folder of its model, without the paths of this machine.

    Args:
        card: The facts.
        folder: Folder of the model.
        written: What the card consists of, without what the user changed in it.

    Returns:
        The path of the record.
    """
    base_model = card.base_model
    if base_model and hub_id(base_model) is None:
        base_model = f"./{Path(base_model).name}"  # still no name on the Hub
    # What is no id on the Hub would look like one without its folders.
    datasets = tuple(filter(hub_id, card.datasets))
    facts = dataclasses.replace(card, base_model=base_model, datasets=datasets)
    # Of a copy without its weights, those that it was made with.
    weights = weights_digest(folder) or read_weights(folder)
    content = {"format": _FORMAT, "weights": weights, "card": _encode(facts), "readme": written._asdict()}
    return write_text(Path(folder, RECORD), json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(folder: Path | str) -> PretrainingCard:
    """Return the facts that [`write_record`] left in the folder of a model.

    Raises:
        InputError: If there is no record, or it cannot be read.
    """
    path = Path(folder, RECORD)
    try:
        return _decode(_content(path)["card"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error!r}): copy it again from where the model comes from") from error


def read_weights(folder: Path | str) -> str | None:
    """Return the digest of the weights that the record of a folder tells of; None if that is not known."""
    try:
        weights = _content(Path(folder, RECORD)).get("weights")
    except InputError:
        return None
    return weights if isinstance(weights, str) else None


def check_weights(folder: Path | str) -> None:
    """Refuse a folder whose weights are others than those that its record tells of.

    Raises:
        InputError: If they are.
    """
    known, found = read_weights(folder), weights_digest(folder)
    if None not in (known, found) and known != found:
        raise InputError(
            f"the weights in {folder} are not those that {RECORD} tells of, so its numbers are not theirs: put the weights back, "
            "or remove the record and write a card of your own"
        )


def read_written(folder: Path | str) -> Written | None:
    """Return what the card of a folder consisted of when it was written; None if that is not known."""
    try:
        readme = _content(Path(folder, RECORD))["readme"]
        return Written(dict(readme["metadata"]), dict(readme["sections"]))
    except (KeyError, TypeError, ValueError):
        return None


def _content(path: Path) -> dict[str, Any]:
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


def _encode(value: Any) -> Any:
    """Return a fact as JSON has it, absolute paths reduced to their last part."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _encode(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    value = plain(value)
    if isinstance(value, dict):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: repr(value)}
    return card_text.without_folders(value)


def _number_or_mapping(mapping: dict[str, Any]) -> Any:
    return float(mapping[_NOT_FINITE]) if mapping.keys() == {_NOT_FINITE} else mapping


def _decode(facts: dict[str, Any]) -> PretrainingCard:
    objective, compute = dict(facts["objective"]), dict(facts["compute"])
    decoded = {
        "objective": ObjectiveDescription(**objective | {"citations": tuple(objective["citations"])}),
        "compute": Compute(**compute | {"energy": Energy(**compute["energy"]) if compute["energy"] else None}),
        "datasets": tuple(facts["datasets"]),
        "comparison": tuple(tuple(row) for row in facts["comparison"]),
        "parts": {folder: tuple(part) for folder, part in facts["parts"].items()},
        "evaluations": tuple(Evaluation(**evaluation) for evaluation in facts["evaluations"]),
    }
    return PretrainingCard(**facts | decoded)
