"""Pairs of texts that files give: anchors with what is close to them, and perhaps with what only seems to be.

`load_pairs` reads rows by `hf_pretrain.tasks.files`, finds the columns, and tokenizes each column once into the document
schema. `GivenPairs` makes examples of them, of the same form as `hf_pretrain.data.examples.views.TextViewDataset`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import UnknownCount, tokenize_documents
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import Segmenter
from hf_pretrain.data.examples.epochs import DrawnDataset
from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.data.examples.sentence_pairs import PairTemplate
from hf_pretrain.data.examples.views import Scorer, Tokens, draw_partners, frame_pair, frame_text
from hf_pretrain.errors import InputError, check_choice, check_range, nearest
from hf_pretrain.tasks.files import kind_of, read_files

# Usual names of an anchor with those of its positive, as in the data sets of sentence-transformers.
_ANCHORS = ("anchor", "query", "question", "sentence1", "premise")
_POSITIVES = ("positive", "pos", "answer", "passage", "sentence2", "hypothesis")
_NEGATIVE = re.compile(r"(hard_)?(neg|negative)s?(_?\d+)?")
# With these, not every row is a true pair.
_LABELS = ("label", "labels", "score", "similarity_score")
# What a name of a column looks like, and a text does not.
_NAME = re.compile(r"[\w.:/-]{1,40}")
_TABLES = (".tsv", ".csv")


class _Origin(NamedTuple):
    """Rows of a file among those of all: it has the rows `first..`, and their number in the file begins with 1."""

    path: str
    first: int


def load_pairs(
    files: Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str] | None = None,
    block_size: int = 128,
    scorer: Scorer = "bi",
    cross_negatives: int = 3,
    seed: int = 0,
    word_segmenter: Segmenter | None = None,
    num_proc: int | None = None,
    unknown: UnknownCount | None = None,
    option: str = "pairs_file",
) -> GivenPairs:
    """Read pairs of texts and tokenize them, once: the result is an Arrow file that is found again.

    Without `columns`, usual names are looked for: an anchor (anchor, query, question, sentence1, premise), its positive
    (positive, pos, answer, passage, sentence2, hypothesis), and as negatives all columns such as negative, negative_1 or
    neg2; others are left out. If there is no such anchor or positive, the first column is the anchor, the second the
    positive, and all others are hard negatives.

    Args:
        files: Tables with a header (`.tsv`, where a quotation mark is a character, or `.csv`), JSON lines, JSON or Parquet,
            also compressed.
        tokenizer: A fast tokenizer.
        columns: Names of the columns of the anchor, the positive, and the hard negatives if any.
        block_size: Most tokens in a text or pair, special tokens included; the end of a longer one is cut off.
        scorer: Whether texts stand alone (`"bi"`) or in pairs (`"cross"`).
        cross_negatives: False candidates of an example, with the scorer `"cross"`, where no hard negatives are given.
        seed: Seed of the run.
        word_segmenter: Finds words in text without spaces, see `word_starts`.
        num_proc: Processes to work in.
        unknown: The counts of the texts are added to it.
        option: The option that names the files, for messages.

    Returns:
        The pairs.

    Raises:
        InputError: If a file cannot be read, a column is missing, holds no text or labels of pairs, a text is empty, or
            nothing can be told apart: all anchors are equal.
    """
    names = [str(path) for path in files]
    if not names:
        raise InputError(f"{option}=[] names no file: give pairs of texts")
    parts, origins, num_rows = [], [], 0
    chosen: tuple[str, ...] = ()
    for name in names:
        # Of the tasks, this is one whose tables always have a header.
        part = read_files([name], "token-classification", option=option)
        chosen = chosen or _chosen_columns(
            part, columns, where=f"{option}={name!r}", is_table=kind_of(name) in _TABLES
        )
        parts.append(_texts_of(part, chosen, path=name))
        origins.append(_Origin(name, num_rows))
        num_rows += len(part)
    texts = datasets.concatenate_datasets(parts)
    documents = []
    for name in chosen:
        column = texts.select_columns([name]).rename_column(name, "text")
        options: dict[str, Any] = {"word_segmenter": word_segmenter, "num_proc": num_proc, "unknown": unknown}
        documents.append(tokenize_documents(column, tokenizer, keep_empty=True, **options))
        _check_filled(documents[-1], name, origins)
    return GivenPairs(
        documents,
        anchors=_numbered(texts.data.column(chosen[0])),
        columns=chosen,
        tokenizer=tokenizer,
        block_size=block_size,
        scorer=scorer,
        cross_negatives=cross_negatives,
        seed=seed,
    )


def _chosen_columns(
    rows: datasets.Dataset, columns: Sequence[str] | None, *, where: str, is_table: bool
) -> tuple[str, ...]:
    """Return the names of the columns of the anchor, the positive and the negatives."""
    known = rows.column_names
    if columns is not None:
        if len(columns) < 2 or len(set(columns)) < len(columns):
            raise InputError(
                f"columns={list(columns)} must be two names or more, each once: the anchor, the positive, and hard "
                "negatives if any"
            )
        return tuple(columns)
    label = next((name for name in known if name.lower() in _LABELS), None)
    if label is not None:
        raise InputError(
            f"{where} has a column {label!r}, but each row is taken for a true pair: keep the true pairs only and drop it, "
            "or name the columns of the texts"
        )
    text = next((name for name in known if is_table and not _NAME.fullmatch(name)), None)
    if text is not None:
        raise InputError(
            f"{where}: the first line was taken as the header, and holds {text[:60]!r}; put a header above it, such as "
            "anchor<TAB>positive, or name the columns"
        )
    anchor = next((name for name in _ANCHORS if name in known), None)
    positive = next((name for name in _POSITIVES if name in known), None)
    if anchor is not None and positive is not None:
        chosen = anchor, positive, *(name for name in known if _NEGATIVE.fullmatch(name))
        left_out = [name for name in known if name not in chosen]
        if left_out and os.environ.get("RANK", "0") == "0":
            print(f"{where}: taken {', '.join(chosen)}, left out {', '.join(left_out)}", flush=True)
        return chosen
    if len(known) < 2:
        raise InputError(f"{where} has the column {', '.join(known)} only: give an anchor and a positive in each row")
    return tuple(known)


def _texts_of(rows: datasets.Dataset, columns: Sequence[str], *, path: str) -> datasets.Dataset:
    """Return the columns of texts of a file."""
    for name in columns:
        if name not in rows.column_names:
            near = nearest(name, rows.column_names, otherwise="name others, or give all files the same columns")
            raise InputError(f"{path} has no column {name!r}, but {', '.join(rows.column_names)}; {near}")
    table = rows.with_format("arrow")[:]
    for name in columns:
        column = table.column(name)
        kind = column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if not is_text:
            raise InputError(
                f"{path}: column {name!r} holds {kind}, not texts; name the columns of texts, one text in each"
            )
        blank = _blank_rows(column)
        if len(blank):
            raise _empty_text(path, name, int(blank[0]))
    texts = rows.select_columns(list(columns))
    wanted = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return texts if texts.features == wanted else texts.cast(wanted)


def _blank_rows(column: pa.ChunkedArray) -> np.ndarray:
    """Return the numbers of the rows that hold nothing or white space."""
    if pa.types.is_null(column.type):
        return np.arange(len(column))
    is_blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(column)), 0)
    return np.flatnonzero(pc.fill_null(is_blank, True).to_numpy())


def _empty_text(path: str, column: str, row: int) -> InputError:
    return InputError(f"{path}, row {row + 1} (a header does not count): column {column!r} is empty; drop the row")


def _check_filled(documents: datasets.Dataset, column: str, origins: Sequence[_Origin]) -> None:
    """Refuse a text without tokens, such as one of control characters."""
    empty = np.flatnonzero(pc.list_value_length(documents.data.column("input_ids")).to_numpy() == 0)
    if len(empty):
        row = int(empty[0])
        origin = [origin for origin in origins if origin.first <= row][-1]
        raise _empty_text(origin.path, column, row - origin.first)


def _numbered(texts: pa.ChunkedArray) -> np.ndarray:
    """Return equal numbers for texts that are equal but for white space around them: `int64 [n]`."""
    encoded = pc.dictionary_encode(pc.utf8_trim_whitespace(texts)).unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)


class GivenPairs(DrawnDataset):
    """Rows of an anchor, its positive, and as many hard negatives as there are columns of them.

    With the scorer `"cross"` the texts are pairs: the anchor with its positive, then with each hard negative. If there is
    none, positives of other anchors take their place, drawn anew in every epoch.

    Args:
        documents: Of each column its texts in the document schema, one a row: anchor, positive, negatives.
        anchors: Numbers of the anchors, equal where the anchors are: `int64 [num_rows]`.
        columns: Names of the columns.
        tokenizer: Tokenizer that made them.
        block_size: Most tokens in a text or pair, special tokens included.
        scorer: Whether texts stand alone (`"bi"`) or in pairs (`"cross"`).
        cross_negatives: False candidates where none is given, with the scorer `"cross"`.
        seed: Seed of the run.

    Raises:
        InputError: If an option is out of range, `block_size` leaves no room, or nothing can be told apart: all anchors are
            equal, and there are no hard negatives.
    """

    def __init__(
        self,
        documents: Sequence[datasets.Dataset],
        *,
        anchors: np.ndarray,
        columns: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        scorer: Scorer = "bi",
        cross_negatives: int = 3,
        seed: int = 0,
    ) -> None:
        check_choice(scorer, get_args(Scorer), name="scorer")
        check_range(cross_negatives, "[1, inf)", name="cross_negatives", hint="3 is usual")
        self.tokenizer = tokenizer
        self.template = BlockTemplate.of(tokenizer)
        self.pair_template = PairTemplate.of(tokenizer) if scorer == "cross" else None
        self.documents = list(documents)
        self.stores = [TokenStore(side) for side in documents]
        assert {store.num_documents for store in self.stores} == {len(anchors)}, "a text with tokens in each row"
        self.anchors = anchors
        self.columns = tuple(columns)
        self.block_size = block_size
        pair = self.pair_template
        self.room = self.template.budget(block_size) if pair is None else pair.budget(block_size)
        """Most tokens of text in a text, or in both of a pair, without special tokens."""
        self.scorer = scorer
        self.cross_negatives = cross_negatives
        self.seed = seed
        if self.num_negatives == 0 and (anchors == anchors[0]).all():
            raise InputError(
                f"column {columns[0]!r} holds the same text in all of {len(anchors)} rows, so that there is nothing to tell "
                "apart: give other anchors, or hard negatives"
            )
        super().__init__()

    @property
    def num_negatives(self) -> int:
        """Hard negatives that each row gives."""
        return len(self.stores) - 2

    def select(self, rows: np.ndarray) -> GivenPairs:
        """Return some of the rows, by their numbers, as pairs of their own; anchors keep their numbers.

        Raises:
            InputError: If there are none, or nothing can be told apart in them.
        """
        if not len(rows):
            raise InputError(f"rows=[] selects none of {len(self)} pairs: select one at least")
        return GivenPairs(
            [side.select(rows) for side in self.documents],
            anchors=self.anchors[rows],
            columns=self.columns,
            tokenizer=self.tokenizer,
            block_size=self.block_size,
            scorer=self.scorer,
            cross_negatives=self.cross_negatives,
            seed=self.seed,
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.anchors)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch and its index in the order.

        Returns:
            `texts`, a list of dicts of `input_ids` int32 and `word_starts` bool, `[n]` each with special tokens, and of pairs
            `token_type_ids` int64: the anchor, the positive and the hard negatives; or pairs, the true one first.
            `document`, the number of the anchor; `example_id`, `epoch` and, if the index has one, `order_index`.

        Raises:
            IndexError: If there is no such row.
        """
        keys = self._locate(index)
        row = keys["example_id"]
        document = int(self.anchors[row])
        anchor, *others = (self._read(column, row) for column in range(len(self.stores)))
        if self.pair_template is None:
            texts = [frame_text(self.template, text) for text in (anchor, *others)]
        else:
            join = partial(frame_pair, self.pair_template, anchor, block_size=self.block_size)
            texts = [join(other) for other in others]
            if not self.num_negatives:
                texts += self._false_pairs(row, keys["epoch"], texts[0], join)
        return {"texts": texts, "document": document} | keys

    def _read(self, column: int, row: int) -> Tokens:
        """Return as many tokens of a text as fit."""
        start, stop = self.stores[column].begins[row : row + 2].tolist()
        return self.stores[column].read(start, min(stop, start + self.room))

    def _false_pairs(
        self, row: int, epoch: int, true: dict[str, np.ndarray], join: Callable[[Tokens], dict[str, np.ndarray]]
    ) -> list[dict[str, np.ndarray]]:
        """Return the pairs of an anchor with positives of other anchors."""
        order, anchors = self._by_anchor
        return draw_partners(
            true,
            lambda number: join(self._read(1, int(order[number]))),
            own=(
                int(anchors.searchsorted(self.anchors[row])),
                int(anchors.searchsorted(self.anchors[row], side="right")),
            ),
            num_examples=len(self),
            wanted=self.cross_negatives,
            key=draws.row_keys([row], seed=self.seed, epoch=epoch, stream="pair_partners"),
        )

    @cached_property
    def _by_anchor(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the order of their anchors, and the numbers of these: `int64 [num_rows]` each."""
        order = np.argsort(self.anchors, kind="stable")
        return order, self.anchors[order]

    @cached_property
    def num_cut(self) -> int:
        """Texts of which the end is cut off or, with the scorer `"cross"`, given pairs."""
        lengths = [np.diff(store.begins) for store in self.stores]
        if self.pair_template is not None:
            lengths = [lengths[0] + other for other in lengths[1:]]
        return sum(int(np.count_nonzero(length > self.room)) for length in lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, before any is cut off, without special tokens."""
        return sum(store.num_tokens for store in self.stores)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again where the dataset arrives."""
        # `base` is this object.
        return {name: value for name, value in vars(self).items() if name != "_by_anchor"}

    def __repr__(self) -> str:
        """Show how many rows there are, and how many texts are cut."""
        what = "texts" if self.pair_template is None else "pairs"
        return (
            f"{type(self).__name__}({len(self)} rows of {', '.join(self.columns)}, {what} of at most {self.block_size} "
            f"tokens, {self.num_tokens} tokens, {self.num_cut} {what} cut)"
        )
