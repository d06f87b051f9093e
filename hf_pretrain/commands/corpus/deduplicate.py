"""Leave out documents that repeat another, equal or nearly equal, and write the others as JSON lines.

    hf-pretrain deduplicate --train_file corpus/ --output_dir clean
    hf-pretrain deduplicate --train_file corpus/ --against test.txt --output_dir clean
    hf-pretrain rtd --train_file clean/documents --output_dir my-electra

The first of several documents is kept, and the order of the documents stays. Equal are texts that differ in letter case and
white space only; near are those whose runs of words (shingles) have a Jaccard similarity of at least --similarity_threshold,
estimated by MinHash. A document is compared with those kept before it. With --against, what is equal or near to a document of
other files is left out too, for example to keep the text of an evaluation out of that of the training.

Memory: about 4 KB a document that is kept, whatever its length.
Needs the package rensa: pip install 'hf-pretrain[dedup]'.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_pretrain.commands import of_data, parse_command, text_files
from hf_pretrain.curation.deduplication import DOCUMENTS, REPORT, deduplicate_files
from hf_pretrain.curation.near_duplicates import check_options
from hf_pretrain.errors import check_range
from hf_pretrain.options import option
from hf_pretrain.training.program import print_table

_SHARD_BYTES = 1 << 28
_SHOWN_CLUSTERS = 5
_LABELS = {
    "read": "documents read",
    "exact_duplicates": "equal to one before",
    "near_duplicates": "near to one before",
    "in_against": "equal or near to one of --against",
    "kept": "kept",
}


@dataclass
class DeduplicateArguments:
    """What to read, what counts as a repetition and where to write."""

    train_file: list[str] = text_files()
    output_dir: str = option(help="Folder to write to: documents/*.jsonl and deduplication.json.")
    against: list[str] | None = option(
        None, "Text whose repetitions are left out too, such as that of an evaluation; it is not written."
    )
    text_column: str = of_data("text_column")
    document_separator: Literal["blank_line", "line", "file"] = of_data("document_separator")
    similarity_threshold: float = option(
        0.8, "Least Jaccard similarity of the shingles of two near documents, in (0, 1]."
    )
    shingle_size: int = option(5, "Words in a shingle; a shorter document is one shingle.")
    num_permutations: int = option(
        128, "Numbers in a sketch; four times as many halve the error of the similarity, 0.035 at 0.8."
    )
    shard_bytes: int = option(_SHARD_BYTES, "Most bytes of a written file.")

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            InputError: If one is out of range.
        """
        check_options(self.similarity_threshold, self.shingle_size, self.num_permutations)
        check_range(self.shard_bytes, "[1, inf)", name="shard_bytes", hint=f"{_SHARD_BYTES} is usual")


ARGUMENTS = (DeduplicateArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read, compare, write and report; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="deduplicate", description=__doc__)
    report = deduplicate_files(**asdict(args))
    _print_report(report, Path(args.output_dir), with_against=args.against is not None)


def _print_report(report: dict[str, Any], folder: Path, *, with_against: bool) -> None:
    labels = {name: label for name, label in _LABELS.items() if with_against or name != "in_against"}
    counts = {label: report["counts"][name] for name, label in labels.items()}
    total = {unit: max(count, 1) for unit, count in report["counts"]["read"].items()}
    rows = [
        (label, *(text for unit in total for text in (f"{count[unit]:,}", f"{count[unit] / total[unit]:.1%}")))
        for label, count in counts.items()
    ]
    print_table(rows, header=("", "documents", "", "bytes", ""))
    if report["clusters"]:
        print("\nThe documents with the most repetitions, how many were left out, and how one of these begins:")
        for cluster in report["clusters"][:_SHOWN_CLUSTERS]:
            print(f"  {cluster['removed']:>8,}  {cluster['source']}:{cluster['number']}  {cluster['excerpt']}")
    print(f"\ndocuments  {folder / DOCUMENTS}  (for --train_file)\nreport     {folder / REPORT}")
