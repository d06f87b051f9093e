"""Make the card of a model again from the record of its run, with evaluations and what only people know.

    hf-pretrain card my-electra --evaluation results.json --license apache-2.0 --language en

The folder is that of a run, or a copy from the Hub. A file of evaluations is one JSON object, or a list of them:

    {"task": "SST-2", "dataset": "nyu-mll/glue", "dataset_config": "sst2", "split": "validation", "num_examples": 872,
     "metrics": {"accuracy": 0.91}, "method": "fine-tuned for 3 epochs, one seed",
     "baseline": {"accuracy": 0.51}, "baseline_name": "most frequent class"}

An evaluation replaces an earlier one of the same task and split. Your changes to the front matter of README.md stay, and so
does your text above and below the two comments around the card.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.hub.card import update_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.text import HUB_NAME
from hf_pretrain.options import option

# What the Hub takes, and what to give instead.
_FORMS = {
    "license": (r"[a-z0-9]+([.-][a-z0-9]+)*", "give the Hub's identifier, such as apache-2.0"),
    "language": (r"code|multilingual|[a-z]{2,3}(-[A-Za-z0-9]+)*", "give a code, such as en"),
    "datasets": (HUB_NAME, "give an id on the Hub, such as allenai/c4"),
    "hub_model_id": (HUB_NAME, "give a repository, such as me/my-electra"),
}


@dataclass
class CardArguments:
    """Options of ``hf-pretrain card``."""

    model_folder: str = option(help="Folder of the model; it may be given without the name of the option.")
    evaluation: list[str] | None = option(
        None, "JSON files of evaluations on tasks; one of the same task and split is replaced."
    )
    license: str | None = option(None, "The Hub's identifier of a license: apache-2.0.")
    language: list[str] | None = option(None, "Codes of the languages of the text: en de.")
    datasets: list[str] | None = option(None, "Ids of the training data on the Hub: allenai/c4.")
    hub_model_id: str | None = option(None, "Repository that the code of the card is to name: me/my-electra.")

    def __post_init__(self) -> None:
        """Check what the Hub would refuse."""
        for name, (pattern, advice) in _FORMS.items():
            given = getattr(self, name)
            for value in [given] if isinstance(given, str) else given or ():
                if not re.fullmatch(pattern, value):
                    raise InputError(f"{name}={value!r}: {advice}")


ARGUMENTS = (CardArguments,)


def main(argv: list[str] | None = None) -> None:
    """Make a card again from the command line; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="card", description=__doc__, first="model_folder")
    evaluations = [evaluation for name in args.evaluation or () for evaluation in read_evaluations(name)]
    changes: dict[str, Any] = {name: getattr(args, name) for name in ("license", "language", "datasets")}
    if args.hub_model_id is not None:
        changes |= {"repo": args.hub_model_id, "model_name": args.hub_model_id.rpartition("/")[2]}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        path = update_card(args.model_folder, evaluations=evaluations, **changes)
    except OSError as error:
        where = error.filename or args.model_folder
        raise RunError(
            f"{where} cannot be read or written ({error.strerror or error}): what was there is as it was"
        ) from error
    print(f"model card  {path}")


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """Return the evaluations of a JSON file: one object with the names of the fields, or a list of them.

    Raises:
        InputError: If the file cannot be read, or an evaluation is not right.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"evaluation={str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"evaluation={str(path)!r} is no JSON: {error}") from error
    entries = content if isinstance(content, list) else [content]
    return [Evaluation.from_mapping(entry, source=str(path)) for entry in entries]
