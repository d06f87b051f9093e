"""Count what a corpus holds and how its documents fill the blocks of a training, before a run.

    hf-pretrain statistics --train_file corpus/ --tokenizer_name bert-base-uncased --block_size 512
    hf-pretrain statistics --train_file corpus/ --vocab_size 32000 --output_file statistics.json

Shows the lengths of the documents in bytes, characters, words, sentences and tokens, the longest of them, and for every
--block_mode how many blocks there are and what their places hold. The text is read once, in memory that does not grow with it.
Without --tokenizer_name a tokenizer is trained as the programs do, on the first 268 million characters; it is not kept.

The packing has the numbers of a training that streams nothing and holds nothing out (--validation_fraction 0).
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hf_pretrain.cli import run_program
from hf_pretrain.commands.options import of_data
from hf_pretrain.curation.statistics import corpus_statistics
from hf_pretrain.data.prepare import DataArguments, RepeatableTexts, first_texts, run_tokenizer, word_segmenter
from hf_pretrain.data.text.files import numbered_documents, read_documents
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError
from hf_pretrain.files import write_text
from hf_pretrain.tables import print_table
from hf_pretrain.training.parsing import parse_arguments

_BAR = 40


@dataclass
class StatisticsArguments:
    """What to count, with which tokenizer, and for blocks of which size."""

    train_file: list[str] = field(
        metadata={
            "help": "Text to read: text, JSON, CSV, TSV, Parquet or Arrow files (compressed by gzip, xz, bzip2, zstd or lz4 "
            "too), folders, globs, or - for the standard input."
        }
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file to write all the numbers to as well."})
    overwrite_output_file: bool = field(
        default=False, metadata={"help": "Replace the output_file of an earlier count; never a file that is read."}
    )
    text_column: str = of_data("text_column")
    document_separator: Literal["blank_line", "line", "file"] = of_data("document_separator")
    tokenizer_name: str | None = of_data("tokenizer_name")
    tokenizer_type: Literal["auto", "wordpiece", "bpe", "unigram"] = of_data("tokenizer_type")
    vocab_size: int = of_data("vocab_size")
    lowercase: bool | None = of_data("lowercase")
    strip_accents: bool = of_data("strip_accents")
    word_segmenter: str | None = of_data("word_segmenter")
    block_size: int = of_data("block_size")

    def __post_init__(self) -> None:
        """Refuse what a training would refuse, and a file that cannot be written.

        Raises:
            InputError: If a number is out of range, there is no folder for ``output_file``, or a file would be lost.
        """
        self.data_arguments()
        if self.output_file is None:
            if self.overwrite_output_file:
                raise InputError("overwrite_output_file=True has no effect without an output_file: name one")
            return
        path = Path(self.output_file)
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"output_file={self.output_file!r} is no file in a folder that exists: name another")
        if path.exists() and not self.overwrite_output_file:
            raise InputError(
                f"output_file={self.output_file!r} exists: name another, or replace it with --overwrite_output_file true"
            )

    def check_output(self, files: Sequence[str]) -> None:
        """Refuse an output file that is one of the files that are read, or of the tokenizer.

        Args:
            files: The files that are read.

        Raises:
            InputError: If it is.
        """
        if self.output_file is None or not Path(self.output_file).exists():
            return
        folder = Path(self.tokenizer_name or "")
        others = (
            [path for path in folder.iterdir() if path.is_file()] if self.tokenizer_name and folder.is_dir() else []
        )
        if any(file.exists() and file.samefile(self.output_file) for file in [*map(Path, files), *others]):
            raise InputError(f"output_file={self.output_file!r} is one of the files that are read: name another")

    def data_arguments(self) -> DataArguments:
        """Return the options as those of a training."""
        own = {"train_file", "output_file", "overwrite_output_file"}
        options = {name: value for name, value in vars(self).items() if name not in own}
        return DataArguments(train_file=self.train_file, **options)


ARGUMENTS = (StatisticsArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read, count, print and write; see the top of the file."""
    (args,) = parse_arguments(ARGUMENTS, argv, prog="hf-pretrain statistics", description=__doc__ or "")
    reading: dict[str, Any] = {"document_separator": args.document_separator, "text_column": args.text_column}
    args.check_output(resolve_paths(args.train_file))
    tokenizer = _tokenizer(args, reading)
    documents = numbered_documents(args.train_file, **reading)
    segmenter = word_segmenter(args.data_arguments())
    statistics = corpus_statistics(documents, tokenizer, block_size=args.block_size, word_segmenter=segmenter)
    model = type(tokenizer.backend_tokenizer.model).__name__
    statistics = {"tokenizer": model, "vocab_size": len(tokenizer), "block_size": args.block_size} | statistics
    _print(statistics)
    if args.output_file is not None:
        text = json.dumps(statistics, indent=2, ensure_ascii=False)
        write_text(Path(args.output_file), text + "\n")


def _tokenizer(args: StatisticsArguments, reading: dict[str, Any]) -> PreTrainedTokenizerBase:
    texts = RepeatableTexts(lambda: first_texts(read_documents(args.train_file, **reading)))
    with tempfile.TemporaryDirectory() as folder:
        return run_tokenizer(args.data_arguments(), Path(folder), None, texts, None)


def _print(statistics: dict[str, Any]) -> None:
    print(f"{statistics['documents']:,} documents; {statistics['tokenizer']} of {statistics['vocab_size']:,} tokens\n")
    lengths = statistics["lengths"]
    columns = list(lengths["tokens"])
    rows = [(unit, *(f"{row[name]:,.{name == 'mean':d}f}" for name in columns)) for unit, row in lengths.items()]
    print_table(rows, header=("length in", *columns))
    print(f"\ntokens a word           {statistics['tokens_per_word']:.3f}")
    print(f"unknown tokens          {statistics['unknown_share']:.3%}")
    print(f"unknown characters      {statistics['unknown_character_share']:.3%}")
    size = f"longer than {statistics['block_size']} tokens"
    print(f"{size:<23} {statistics['longer_than_block_share']:.1%} of the documents, special tokens counted")
    _print_histogram(statistics["histogram"], statistics["documents"])
    print("\nThe longest documents:")
    for place in statistics["longest"]:
        print(f"  {place['tokens']:>10,} tokens  {place['source']}:{place['number']}  {place['excerpt']}")
    _print_packing(statistics["packing"], statistics["block_size"])


def _print_histogram(histogram: list[tuple[int, int, int]], num_documents: int) -> None:
    most = max((count for _, _, count in histogram), default=1)
    print("\nDocuments by their length in tokens:")
    rows = [(f"{low:,}" if low == high else f"{low:,}-{high:,}", count) for low, high, count in histogram]
    width = max((len(name) for name, _ in rows), default=0)
    for name, count in rows:
        bar = "#" * -(-count * _BAR // most)
        print(f"  {name:>{width}}  {bar:<{_BAR}}  {count / num_documents:6.1%}")


def _print_packing(packing: dict[str, dict[str, Any] | None], block_size: int) -> None:
    print(f"\nBlocks of {block_size} tokens, and what their places hold:")
    shares = {"text_share": "text", "special_token_share": "special", "separator_share": "separators"}
    shares |= {"padding_share": "padding"}
    rows = [
        (mode, f"{row['blocks']:,}", *(f"{row[name]:.2%}" for name in shares), f"{row['sentences_cut']:,}")
        for mode, row in packing.items()
        if row is not None
    ]
    print_table(rows, header=("--block_mode", "blocks", *shares.values(), "sentences cut"))
    for mode in (mode for mode, row in packing.items() if row is None):
        print(f"  {mode}: the tokenizer has no sep_token and no eos_token to put between documents")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
