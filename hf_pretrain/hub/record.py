"""The record of a run: every fact of its card as JSON beside the weights, so that the card can be made again.

It travels with the model, so a copy from the Hub can be given evaluations too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from hf_pretrain.errors import InputError
from hf_pretrain.hub import card_text
from hf_pretrain.hub.compute import Compute
from hf_pretrain.hub.environment import Energy
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.facts import ObjectiveDescription, PretrainingCard
from hf_pretrain.hub.files import weights_digest, write_text
from hf_pretrain.hub.metadata import hub_id
from hf_pretrain.hub.readme import Written

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
    value = card_text.plain(value)
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
