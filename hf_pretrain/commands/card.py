"""Make the card of a model again from the record of its run, with evaluations and what only people know.

    hf-pretrain card my-electra --evaluation results.json --license apache-2.0 --language en

The folder is that of a run, or a copy from the Hub. A file of evaluations is one JSON object, or a list of them:

    {"task": "SST-2", "dataset": "nyu-mll/glue", "dataset_config": "sst2", "split": "validation", "num_examples": 872,
     "metrics": {"accuracy": 0.91}, "method": "fine-tuned for 3 epochs, one seed",
     "baseline": {"accuracy": 0.51}, "baseline_name": "most frequent class"}

A file that mteb writes for a task (STSBenchmark.json) is read too: each split and subset in it is an evaluation. So is the file
that hf-pretrain evaluate writes: of it, the numbers that were measured on the very weights of the folder.

An evaluation replaces an earlier one of the same task and split. Your changes to the front matter of README.md stay, and so
does your text above and below the two comments around the card.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pretrain.commands import parse_command
from hf_pretrain.errors import InputError, RunError
from hf_pretrain.evaluation.suite.results import is_results_file, results_of
from hf_pretrain.hub.card import update_card
from hf_pretrain.hub.evaluation import Evaluation, is_mteb_result, mteb_evaluations
from hf_pretrain.hub.identifiers import check_identifiers
from hf_pretrain.options import option


@dataclass
class CardArguments:
    """Options of ``hf-pretrain card``."""

    model_folder: str = option(help="Folder of the model; it may be given without the name of the option.")
    evaluation: list[str] | None = option(
        None,
        "JSON files of evaluations on tasks, mteb's results, or the evaluation.json of hf-pretrain evaluate; one of the same "
        "task and split is replaced.",
    )
    license: str | None = option(None, "The Hub's identifier of a license: apache-2.0.")
    language: list[str] | None = option(None, "Codes of the languages of the text: en de.")
    datasets: list[str] | None = option(None, "Ids of the training data on the Hub: allenai/c4.")
    tags: list[str] | None = option(None, "More tags of the model on the Hub: biomedical.")
    private_text: bool = option(False, "Leave sentences of the held-out text out of the card's code.")
    hub_model_id: str | None = option(None, "Repository that the code of the card is to name: me/my-electra.")

    def __post_init__(self) -> None:
        """Check what the Hub would refuse."""
        check_identifiers(vars(self))


ARGUMENTS = (CardArguments,)


def main(argv: list[str] | None = None) -> None:
    """Make a card again from the command line; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="card", description=__doc__, first="model_folder")
    evaluations = [
        evaluation for name in args.evaluation or () for evaluation in read_evaluations(name, args.model_folder)
    ]
    changes: dict[str, Any] = {name: getattr(args, name) for name in ("license", "language", "datasets", "tags")}
    if args.private_text:
        changes["examples"] = ()
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


def read_evaluations(path: str | Path, folder: str | Path = ".") -> list[Evaluation]:
    """Return the evaluations of a JSON file: objects with the names of the fields, a result of mteb, or results of `evaluate`.

    Args:
        path: The file.
        folder: Folder of the model. Of results of several models, those of its weights are taken.

    Raises:
        InputError: If the file cannot be read, an evaluation is not right, or none is of these weights.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"evaluation={str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"evaluation={str(path)!r} is no JSON: {error}") from error
    if is_results_file(content):
        return results_of(content, folder, source=str(path))
    entries = content if isinstance(content, list) else [content]
    found: list[Evaluation] = []
    for entry in entries:
        if is_mteb_result(entry):
            found += mteb_evaluations(entry, source=str(path))
        else:
            found.append(Evaluation.from_mapping(entry, source=str(path)))
    return found
