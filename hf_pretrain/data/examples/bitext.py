"""Sentences with their translations, for translation language modelling: files, tokens and examples."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import UnknownCount, tokenize_documents
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import Segmenter
from hf_pretrain.data.examples.epochs import DrawnDataset
from hf_pretrain.data.examples.packing import BlockTemplate, interleaved, share_room
from hf_pretrain.data.examples.sentence_pairs import PairTemplate
from hf_pretrain.data.text.datasets import file_stamps, generate_dataset, with_language
from hf_pretrain.data.text.files import BadTextCount, OnBadText, read_rows
from hf_pretrain.data.text.kinds import file_kind, text_kind
from hf_pretrain.data.text.lines import BadText
from hf_pretrain.data.text.search import copied_pipe, is_pipe
from hf_pretrain.errors import InputError, check_choice

BitextFrame = Literal["each", "pair"]

# Formats whose fields have names; a table may have a header or none.
_ROW_FORMATS = ("json", "json_lines", "parquet", "arrow")
BITEXT_FEATURES = datasets.Features({"first": datasets.Value("string"), "second": datasets.Value("string")})


def read_bitext(
    paths: Sequence[str | Path], *, languages: tuple[str, str], on_bad_text: OnBadText = "refuse"
) -> Iterator[tuple[str, str]]:
    """Read sentences with their translations, one pair after the other.

    Args:
        paths: Two files whose n-th lines are translations of each other; or one: text with the two in its first two columns,
            separated by a tab, or JSON, Parquet, Arrow, or a table whose header has both languages, with a field for each.
            Compressed files are decompressed on the fly, and pipes are read. Only line feeds end lines.
        languages: Names of the first and the second language.
        on_bad_text: Whether to refuse or skip a pair with a side that is no text, see `hf_pretrain.data.text.files.BadTextCount`.

    Yields:
        Pairs of texts, without those of which one is blank.

    Raises:
        InputError: If files differ in their numbers of lines, a line has no second column, there is no pair, or a file
            cannot be read.
    """
    files = [copied_pipe(path) if is_pipe(path) else str(path) for path in paths]
    missing = [str(path) for path in files if not Path(path).is_file()]
    if missing or not 1 <= len(files) <= 2:
        problem = f"{missing[0]} is no file" if missing else f"{len(files)} files are given"
        raise InputError(f"parallel text of {'-'.join(languages)}: {problem}; give two files, or one with two columns")
    for file in files:
        text_kind(file)
    is_empty, bad = True, BadTextCount(on_bad_text)
    for pair in _rows_of_two(*files) if len(files) == 2 else _rows_of_one(files[0], languages):
        error = next((side for side in pair if isinstance(side, BadText)), None)
        if error is not None:
            bad.skip(error)
            continue
        first, second = (str(side).strip() for side in pair)
        if first and second:
            is_empty = False
            bad.num_documents += 1
            yield first, second
    if is_empty:
        names = ", ".join(map(str, paths))
        raise InputError(f"{names}: no line has text in both of {' and '.join(languages)}; give translations")


def _rows_of_two(*paths: str) -> Iterator[tuple[str | BadText, str | BadText]]:
    # Text of translations has no columns, whatever its suffix says; the fields of other formats are called "text".
    columns = ["text" if file_kind(path).format in _ROW_FORMATS else None for path in paths]
    sides = [read_rows(path, text_column=column) for path, column in zip(paths, columns, strict=True)]
    counts = [0, 0]
    for pair in itertools.zip_longest(*sides):
        for side, text in enumerate(pair):
            counts[side] += text is not None
        if None not in pair:
            yield cast("tuple[str | BadText, str | BadText]", pair)
    if counts[0] != counts[1]:
        raise InputError(
            f"{paths[0]} has {counts[0]} lines, but {paths[1]} has {counts[1]}: translations must be in lines of the same "
            "number"
        )


def _rows_of_one(path: str, languages: tuple[str, str]) -> Iterator[tuple[str | BadText, str | BadText]]:
    form = file_kind(path).format
    if form in _ROW_FORMATS or (form == "csv" and _has_columns(path, languages)):
        columns = (read_rows(path, text_column=language) for language in languages)
        yield from zip(*columns, strict=True)
        return
    for number, line in enumerate(read_rows(path), start=1):
        if isinstance(line, BadText):
            yield line, line
        elif line.strip():
            first, tab, rest = line.partition("\t")
            if not tab:
                raise InputError(f"{path}, line {number} has no tab: put one between a sentence and its translation")
            yield first, rest.partition("\t")[0]


def _has_columns(path: str, languages: tuple[str, str]) -> bool:
    """Return whether a table has a header with both languages."""
    header = next(read_rows(path), "")
    fields = {field.strip(' "\n') for field in re.split("[,;\t|]", str(header))}
    return fields.issuperset(languages)


def bitext_dataset(
    paths: Sequence[str | Path],
    *,
    languages: tuple[str, str],
    on_bad_text: OnBadText = "refuse",
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Return the pairs of `read_bitext` as a dataset with the columns ``first`` and ``second``, read once."""
    # No list: 🤗 datasets would take it for shards, and hand over one file at a time.
    names = tuple(copied_pipe(path) if is_pipe(path) else str(path) for path in paths)
    stamps = file_stamps([name for name in names if Path(name).is_file()])
    options = {"paths": names, "languages": languages, "on_bad_text": on_bad_text}
    key = (stamps, languages, on_bad_text)
    return generate_dataset(read_bitext, options, key=key, features=BITEXT_FEATURES, cache_dir=cache_dir)


def tokenize_bitext(
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    languages: tuple[str, str],
    word_segmenter: Segmenter | None = None,
    num_proc: int | None = None,
    unknown: UnknownCount | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Tokenize both sides of a bitext into the document schema, once.

    Args:
        texts: Dataset with the columns ``first`` and ``second``.
        tokenizer: A fast tokenizer.
        languages: Names of the two languages, for the column ``lang``.
        word_segmenter: Finds words in text without spaces, see `word_starts`.
        num_proc: Processes to work in.
        unknown: The counts of the texts are added to it.

    Returns:
        Two datasets of documents whose n-th rows are translations of each other; none is without tokens.

    Raises:
        InputError: If no pair has tokens on both sides, or as `tokenize_documents`.
    """
    sides = []
    for column, language in zip(BITEXT_FEATURES, languages, strict=True):
        side = with_language(texts.select_columns([column]).rename_column(column, "text"), language)
        options: dict[str, Any] = {"word_segmenter": word_segmenter, "num_proc": num_proc, "unknown": unknown}
        sides.append(tokenize_documents(side, tokenizer, keep_empty=True, **options))
    filled = [pc.list_value_length(side.data.column("input_ids")).to_numpy() > 0 for side in sides]
    kept = np.flatnonzero(filled[0] & filled[1])
    if not len(kept):
        raise InputError(
            f"no pair of {'-'.join(languages)} has tokens on both sides; check the text and the tokenizer"
        )
    first, second = sides if len(kept) == len(texts) else [side.select(kept) for side in sides]
    return first, second


def _frame(tokenizer: PreTrainedTokenizerBase, kind: BitextFrame) -> tuple[tuple[int, ...], ...]:
    """Return the special tokens before and behind the sentence that comes first, and those of the second."""
    check_choice(kind, get_args(BitextFrame), name="bitext_frame")
    if kind == "pair":
        pair = PairTemplate.of(tokenizer)
        return pair.prefix, pair.middle, (), pair.suffix
    each = BlockTemplate.of(tokenizer)
    if not each.num_special_tokens:
        raise InputError(
            f"tokenizer={type(tokenizer).__name__} puts nothing around a sentence, so nothing would separate it from its "
            "translation; give it a post-processor"
        )
    return each.prefix, each.suffix, each.prefix, each.suffix


class BitextDataset(DrawnDataset):
    """Pairs of a sentence and its translation, with positions and a language that start anew at the translation.

    Which of the two comes first is drawn for each pair, and changes from epoch to epoch. A pair that is too long loses
    the ends of both sentences, those of the longer one first, until both fit.

    Args:
        first: Documents in the document schema, one a sentence.
        second: Their translations, row by row.
        tokenizer: Tokenizer that made them; gives the special tokens.
        block_size: Most tokens in an example, special tokens included.
        languages: Numbers of the languages of ``first`` and ``second``.
        frame: ``"each"``: each sentence has special tokens as if it were alone, so that an XLM tokenizer's four are in
            ``</s> x </s> </s> y </s>``; ``"pair"``: as the tokenizer joins two texts: ``</s> x </s> y </s>`` or
            ``[CLS] x [SEP] y [SEP]``. The tokens between the two belong to the first.
        seed: Seed of the run.

    Raises:
        InputError: If the two differ in length, the tokenizer separates nothing, or ``block_size`` has no room for both.

    Source:
        Conneau and Lample, "Cross-lingual Language Model Pretraining" (2019), section 3.4; four separators as in the
        official code, where its figure has three.
    """

    def __init__(
        self,
        first: datasets.Dataset,
        second: datasets.Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        languages: tuple[int, int],
        frame: BitextFrame = "each",
        seed: int = 0,
    ) -> None:
        self.stores = (TokenStore(first), TokenStore(second))
        counts = [store.num_documents for store in self.stores]
        if counts[0] != counts[1] or counts[0] != len(first) or counts[1] != len(second):
            raise InputError(
                f"{len(first)} sentences and {len(second)} translations, of which {counts[0]} and {counts[1]} have tokens, "
                "are no pairs: make them by tokenize_bitext"
            )
        self.frame = _frame(tokenizer, frame)
        self.num_special_tokens = sum(map(len, self.frame))
        self.block_size = block_size
        self.budget = block_size - self.num_special_tokens
        if self.budget < 2:
            raise InputError(
                f"block_size={block_size} has no room for two sentences with {self.num_special_tokens} special tokens; "
                f"use at least {self.num_special_tokens + 2}, usually 128 or 256"
            )
        self.languages = languages
        self.seed = seed
        self._stream = f"bitext {languages}"
        super().__init__()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.stores[0].num_documents

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the pair of an index, which may carry its epoch.

        Returns:
            ``input_ids`` int32, ``word_starts`` bool (True at special tokens), ``position_ids`` int32 and ``langs`` int32,
            ``[n]`` each; ``is_bitext``, True; ``example_id``, ``epoch`` and, if the index has one, ``order_index``.

        Raises:
            IndexError: If there is no such pair.
        """
        keys = self._locate(index)
        row, sides = keys["example_id"], [0, 1]
        coin = draws.integers(draws.row_keys([row], seed=self.seed, stream=self._stream), 1, high=2).item()
        if (coin + keys["epoch"]) % 2:
            sides.reverse()
        spans = [self.stores[side].begins[row : row + 2].tolist() for side in sides]
        kept = share_room(*(stop - start for start, stop in spans), room=self.budget)
        texts = [
            self.stores[side].read(start, start + length)
            for side, (start, _), length in zip(sides, spans, kept, strict=True)
        ]
        return self._joined(texts, [self.languages[side] for side in sides]) | {"is_bitext": True} | keys

    def _joined(self, texts: list[tuple[np.ndarray, np.ndarray]], languages: list[int]) -> dict[str, np.ndarray]:
        before, behind, before_second, behind_second = self.frame
        (ids_1, _), (ids_2, _) = texts
        lengths = [
            len(before) + len(ids_1) + len(behind),
            len(before_second) + len(ids_2) + len(behind_second),
        ]
        return interleaved((before, behind + before_second, behind_second), texts) | {
            "position_ids": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "langs": np.repeat(np.array(languages, dtype=np.int32), lengths),
        }

    @property
    def num_tokens(self) -> int:
        """Tokens of text of both sides, before any is cut off, without special tokens."""
        return sum(store.num_tokens for store in self.stores)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, special tokens included: ``int64 [num_pairs]``."""
        whole = sum(np.diff(store.begins) for store in self.stores)
        return np.minimum(whole, self.budget) + self.num_special_tokens

    def __repr__(self) -> str:
        """Show how many pairs there are, and how many are cut."""
        whole = sum(np.diff(store.begins) for store in self.stores)
        return (
            f"{type(self).__name__}({len(self)} pairs of at most {self.block_size} tokens, {self.num_tokens} tokens, "
            f"{np.mean(whole > self.budget):.1%} of the pairs cut, mean length {self.lengths.mean():.1f})"
        )
