"""Count what a corpus holds and how its documents fill the blocks of a training, before a run.

    hf-pretrain statistics --train_file corpus/ --tokenizer_name bert-base-uncased --block_size 512
    hf-pretrain statistics --train_file corpus/ --vocab_size 32000 --output_file statistics.json
    hf-pretrain statistics --prepared_data prepared --block_size 512

Shows the lengths of the documents in bytes, characters, words, sentences and tokens, the longest of them, and for every
--block_mode how many blocks there are and what their positions hold. The text is prepared as for a training that streams nothing
and holds nothing out (--validation_fraction 0), so the numbers are those of that training, and it finds the text in the cache.
Without --tokenizer_name a tokenizer is trained as the programs do, on the first 268 million characters; it is not kept.
With --prepared_data the documents to train on are counted, without those held out. Words and sentences are those that begin with
a token. Bytes and characters are known of all texts together.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import datasets
import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_pretrain.commands import of_data, parse_command, text_files
from hf_pretrain.data.arguments import OF_TOKENIZER, DataArguments
from hf_pretrain.data.documents.documents import UnknownCount, sentence_starts, tokenize_documents
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import Segmenter, encodable, word_starts
from hf_pretrain.data.examples.packing import JOINING_MODES, BlockTemplate, PackingMode, pack_documents
from hf_pretrain.data.prepared import MANIFEST, check_same_tokenizer, open_documents, prepared_tokenizer, read_manifest
from hf_pretrain.data.run_tokenizer import RepeatableTexts, first_texts, load_tokenizer, run_tokenizer, word_segmenter
from hf_pretrain.data.text.datasets import text_dataset, text_sizes
from hf_pretrain.data.text.files import excerpt
from hf_pretrain.data.text.search import resolve_paths
from hf_pretrain.errors import InputError
from hf_pretrain.files import write_text
from hf_pretrain.options import option
from hf_pretrain.training.program import print_table

_BAR = 40
_QUANTILES = (5, 25, 50, 75, 95, 99)
_NUM_LONGEST = 5
_SHOWN_TOKENS = 30
_STEP = 1 << 24  # positions that are read together


@dataclass
class StatisticsArguments:
    """What to count, with which tokenizer, and for blocks of which size."""

    needs: ClassVar[dict[str, str]] = {"overwrite_output_file": "output_file"}

    train_file: list[str] | None = option(None, str(text_files().metadata["help"]))
    prepared_data: str | None = of_data("prepared_data")
    output_file: str | None = option(None, "JSON file to write all the numbers to as well.")
    overwrite_output_file: bool = option(
        False, "Replace the output_file of an earlier count; never a file that is read."
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
        if self.train_file is None and self.prepared_data is None:
            raise InputError(
                "no text to count: give --train_file (files, folders, globs) or --prepared_data (a folder)"
            )
        self.data_arguments()
        if self.output_file is None:
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
        of_tokenizer = folder.iterdir() if self.tokenizer_name and folder.is_dir() else ()
        if any(file.exists() and file.samefile(self.output_file) for file in [*map(Path, files), *of_tokenizer]):
            raise InputError(f"output_file={self.output_file!r} is one of the files that are read: name another")

    def data_arguments(self) -> DataArguments:
        """Return the options as those of a training."""
        given = {name: value for name, value in vars(self).items() if "output_file" not in name}
        if self.prepared_data is not None:
            for name in OF_TOKENIZER:
                if given[name] != self.__dataclass_fields__[name].default:
                    raise InputError(
                        f"{name}={given[name]!r} has no effect beside prepared_data={self.prepared_data!r}, whose text is "
                        "tokenized: leave it out"
                    )
        return DataArguments(**given)


ARGUMENTS = (StatisticsArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read, count, print and write; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="statistics", description=__doc__)
    options = args.data_arguments()
    count = _count_text if args.prepared_data is None else _count_prepared
    tokenizer, statistics = count(args, options)
    model = type(tokenizer.backend_tokenizer.model).__name__
    statistics = {"tokenizer": model, "vocab_size": len(tokenizer), "block_size": args.block_size} | statistics
    _print(statistics)
    if args.output_file is not None:
        write_text(Path(args.output_file), json.dumps(statistics, indent=2, ensure_ascii=False) + "\n")


def _count_text(args: StatisticsArguments, options: DataArguments) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the tokenizer and the counts of files."""
    assert args.train_file is not None
    args.check_output(resolve_paths(args.train_file))
    texts = text_dataset(args.train_file, text_column=args.text_column, document_separator=args.document_separator)
    sample = RepeatableTexts(lambda: first_texts(text or "" for batch in texts.iter(256) for text in batch["text"]))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_tokenizer(options, Path(folder), None, sample, None)
    segmenter = word_segmenter(options)
    return tokenizer, corpus_statistics(texts, tokenizer, block_size=args.block_size, word_segmenter=segmenter)


def _count_prepared(
    args: StatisticsArguments, options: DataArguments
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the tokenizer and the counts of a folder of `hf-pretrain prepare`."""
    folder = str(args.prepared_data)
    args.check_output([str(Path(folder, name)) for name in (MANIFEST, *read_manifest(folder)["files"])])
    if args.tokenizer_name is not None:
        check_same_tokenizer(folder, load_tokenizer(args.tokenizer_name))
    tokenizer = prepared_tokenizer(folder, block_size=options.block_size)
    return tokenizer, prepared_statistics(folder, tokenizer, block_size=args.block_size)


def corpus_statistics(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int = 128,
    word_segmenter: Segmenter | None = None,
) -> dict[str, Any]:
    """Count documents and what they hold.

    Args:
        texts: The documents, a dataset with the column ``text``.
        tokenizer: A fast tokenizer.
        block_size: Most tokens in a block, special tokens included.
        word_segmenter: Finds words in text without spaces, see `word_starts`.

    Returns:
        - ``documents``, and ``documents_without_tokens``;
        - ``lengths``: of the documents in bytes, characters, words, sentences and tokens: sum, mean, quantiles;
        - ``histogram``: first and last length in tokens and number of documents, for lengths that double;
        - ``tokens_per_word``; ``unknown_share`` of the tokens, ``unknown_character_share`` of the visible characters;
          ``longer_than_block_share`` of the documents, those that do not fit into one block;
        - ``longest``: the documents with the most tokens;
        - ``packing``: by mode, blocks and what their positions hold; None for a mode that needs a separator where the
          tokenizer has none.

    Raises:
        InputError: If the tokenizer gives no offsets, or ``block_size`` leaves no room for text.
    """
    unknown = UnknownCount()
    BlockTemplate.of(tokenizer).budget(block_size)
    documents = tokenize_documents(texts, tokenizer, word_segmenter=word_segmenter, keep_empty=True, unknown=unknown)
    return _statistics(
        documents,
        tokenizer,
        unknown,
        lengths=_lengths(texts, word_segmenter),
        block_size=block_size,
        show=lambda number: texts[number]["text"],
    )


def prepared_statistics(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, block_size: int = 128
) -> dict[str, Any]:
    """Count the documents of a folder of prepared data, those to train on.

    Args:
        folder: The folder.
        tokenizer: Its tokenizer.
        block_size: Most tokens in a block, special tokens included.

    Returns:
        The same as [`corpus_statistics`]. Words and sentences are those that begin with a token. ``bytes`` and ``characters``
        are sums over all texts, beside ``lengths``.

    Raises:
        InputError: If the folder is none, or ``block_size`` leaves no room for text.
    """
    part = read_manifest(folder)["train"]
    documents = open_documents(folder, "train")

    def show(number: int) -> str:
        first = documents[number]["input_ids"][:_SHOWN_TOKENS]
        return str(tokenizer.decode(first))

    counted = _statistics(
        documents,
        tokenizer,
        UnknownCount(**part["unknown"]),
        lengths={"words": _marked(documents, "word_starts"), "sentences": _marked(documents, "sent_starts")},
        block_size=block_size,
        show=show,
    )
    without = part["texts"] - part["documents"]
    sizes = {"bytes": part["bytes"], "characters": part["characters"]}
    return counted | {"documents": part["texts"], "documents_without_tokens": without} | sizes


def _marked(documents: datasets.Dataset, column: str) -> np.ndarray:
    """Return how many tokens of each document have a flag, ``int64 [num_documents]``; every document has a token."""
    counts = [np.empty(0, np.int64)]
    for batch in documents.select_columns([column]).with_format("arrow").iter(1000):
        lists = batch[column].combine_chunks()
        lengths = lists.value_lengths().to_numpy().astype(np.int64)
        flags = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        counts.append(np.add.reduceat(flags, np.cumsum(lengths) - lengths))
    return np.concatenate(counts)


def _statistics(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    unknown: UnknownCount,
    *,
    lengths: dict[str, np.ndarray],
    block_size: int,
    show: Callable[[int], str],
) -> dict[str, Any]:
    """Count tokenized documents, with lengths in other units, the unknown of their text, and what shows one of them."""
    template = BlockTemplate.of(tokenizer)
    budget = template.budget(block_size)
    num_tokens = pc.list_value_length(documents.data.table["input_ids"]).to_numpy().astype(np.int64)
    lengths = lengths | {"tokens": num_tokens}
    longest = np.argsort(-num_tokens, kind="stable")[:_NUM_LONGEST].tolist()
    store = TokenStore(documents)
    return {
        "documents": len(documents),
        "documents_without_tokens": int((num_tokens == 0).sum()),
        "lengths": {unit: _summary(values) for unit, values in lengths.items()},
        "histogram": _doublings(num_tokens),
        "tokens_per_word": float(num_tokens.sum() / max(lengths["words"].sum(), 1)),
        "unknown_share": float(unknown.unknown_tokens / max(num_tokens.sum(), 1)),
        "unknown_character_share": unknown.share,
        "longer_than_block_share": float((num_tokens > budget).mean()),
        "longest": [
            {"number": number, "tokens": int(num_tokens[number]), "excerpt": excerpt(show(number))}
            for number in longest
        ],
        "packing": {
            mode: _packing(store, template, block_size=block_size, mode=mode)
            if template.separator is not None or mode not in JOINING_MODES
            else None
            for mode in get_args(PackingMode)
        },
    }


def _lengths(texts: datasets.Dataset, segmenter: Segmenter | None) -> dict[str, np.ndarray]:
    """Return the lengths of the texts by unit, ``int64 [num_texts]`` each."""
    num_bytes, num_characters = text_sizes(texts)
    counts = [
        (len(word_starts(text, segmenter=segmenter)), len(sentence_starts(text)))
        for batch in tqdm(texts.iter(1000), desc="Counting words", unit=" thousand", delay=2, disable=None)
        for text in (encodable(text or "") for text in batch["text"])
    ]
    num_words, num_sentences = np.array(counts, dtype=np.int64).T
    return {"bytes": num_bytes, "characters": num_characters, "words": num_words, "sentences": num_sentences}


def _summary(lengths: np.ndarray) -> dict[str, float]:
    """Return sum, mean, least, quantiles (the least length that so many per cent do not exceed) and greatest by name."""
    quantiles = np.percentile(lengths, _QUANTILES, method="inverted_cdf").tolist()
    named = {f"p{percent}": int(value) for percent, value in zip(_QUANTILES, quantiles, strict=True)}
    ends = {"min": int(lengths.min()), **named, "max": int(lengths.max())}
    return {"total": int(lengths.sum()), "mean": float(lengths.mean()), **ends}


def _doublings(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return how many lengths are 0, 1, 2 to 3, 4 to 7, and so on: first and last length and count of each range."""
    powers = np.frexp(lengths)[1]
    return [
        (1 << k >> 1, (1 << k) - 1, int((powers == k).sum())) for k in range(int(powers.min()), int(powers.max()) + 1)
    ]


def _packing(store: TokenStore, template: BlockTemplate, *, block_size: int, mode: PackingMode) -> dict[str, Any]:
    """Return the blocks of one mode, as `BlockDataset` makes them, and the shares of what their positions hold."""
    bounds, rows = pack_documents(store, block_size=block_size, num_special=template.num_special_tokens, mode=mode)
    starts, stops = bounds[:-1], bounds[1:]
    special = template.num_special_tokens * len(starts)
    num_blocks = len(starts if rows is None else rows)
    separators = int((store.document_of(stops - 1) - store.document_of(starts)).sum())
    ranges = ((begin, min(begin + _STEP, store.num_tokens)) for begin in range(0, store.num_tokens, _STEP))
    sentences = np.concatenate([store.sentence_starts(*each) for each in ranges])
    holders = np.searchsorted(sentences, stops[:-1], side="right") - 1
    positions, used = num_blocks * block_size, store.num_tokens + separators + special
    return {
        "blocks": num_blocks,
        "tokens": store.num_tokens,
        "separators": separators,
        "special_tokens": special,
        "sentences_cut": len(np.unique(holders[sentences[holders] != stops[:-1]])),
        "fill": used / positions,
        "text_share": store.num_tokens / positions,
        "separator_share": separators / positions,
        "special_token_share": special / positions,
        "padding_share": 1 - used / positions,
    }


def _print(statistics: dict[str, Any]) -> None:
    print(f"{statistics['documents']:,} documents; {statistics['tokenizer']} of {statistics['vocab_size']:,} tokens\n")
    lengths = statistics["lengths"]
    columns = list(lengths["tokens"])
    rows = [(unit, *(f"{row[name]:,.{name == 'mean':d}f}" for name in columns)) for unit, row in lengths.items()]
    print_table(rows, header=("length in", *columns))
    if "bytes" in statistics:
        print(f"\nof all texts            {statistics['bytes']:,} bytes, {statistics['characters']:,} characters")
    print(f"\ntokens a word           {statistics['tokens_per_word']:.3f}")
    print(f"unknown tokens          {statistics['unknown_share']:.3%}")
    print(f"unknown characters      {statistics['unknown_character_share']:.3%}")
    size = f"longer than {statistics['block_size']} tokens"
    print(f"{size:<23} {statistics['longer_than_block_share']:.1%} of the documents, special tokens counted")
    print("\nDocuments by their length in tokens:")
    most = max(count for _, _, count in statistics["histogram"])
    num_documents = sum(count for _, _, count in statistics["histogram"])
    for low, high, count in statistics["histogram"]:
        bar = "#" * -(-count * _BAR // most)
        print(f"  {f'{low:,}-{high:,}':>21}  {bar:<{_BAR}}  {count / num_documents:6.1%}")
    print("\nThe longest documents:")
    for document in statistics["longest"]:
        print(f"  {document['tokens']:>10,} tokens  number {document['number']}  {document['excerpt']}")
    print(f"\nBlocks of {statistics['block_size']} tokens, and what their positions hold:")
    shares = {"text_share": "text", "special_token_share": "special", "separator_share": "separators"}
    shares |= {"padding_share": "padding", "fill": "fill"}
    packing = statistics["packing"]
    rows = [
        (mode, f"{row['blocks']:,}", *(f"{row[name]:.2%}" for name in shares), f"{row['sentences_cut']:,}")
        for mode, row in packing.items()
        if row is not None
    ]
    print_table(rows, header=("--block_mode", "blocks", *shares.values(), "sentences cut"))
    for mode in (mode for mode, row in packing.items() if row is None):
        print(f"  {mode}: the tokenizer has no sep_token and no eos_token to put between documents")
