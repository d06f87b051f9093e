"""Pairs of text segments for next-sentence and sentence-order prediction, made anew in every epoch.

`PairTemplate` reads off a tokenizer which tokens it puts before, between and behind two sequences, and their token types.
`SentencePairDataset` joins the segments that `hf_pretrain.data.examples.pairing` draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.examples.epochs import DrawnDataset
from hf_pretrain.data.examples.packing import interleaved, probe_texts, text_room
from hf_pretrain.data.examples.pairing import PairRule, PairTable, PairTask, SentenceIndex, draw_pairs
from hf_pretrain.errors import InputError, check_choice, check_range

_Probe = tuple[list[int], list[int], Sequence[int | None]]


_KEPT_EPOCHS = 2


@dataclass(frozen=True)
class PairTemplate:
    """Special tokens around two sequences A and B, and the token types of all five parts.

    Attributes:
        prefix: Ids before A.
        middle: Ids between A and B.
        suffix: Ids behind B.
        prefix_types: Token types of the prefix, one an id.
        middle_types: Those of the middle.
        suffix_types: Those of the suffix.
        types: Token type of the tokens of A, and of those of B.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix_types: tuple[int, ...]
    middle_types: tuple[int, ...]
    suffix_types: tuple[int, ...]
    types: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
        """Read the template off a tokenizer: by its own method where it has one, else by encoding a pair of texts.

        Args:
            tokenizer: Any transformers tokenizer, Rust-backed or Python.

        Returns:
            The template.

        Raises:
            InputError: If the tokenizer puts nothing between the sequences, or around no text of its vocabulary.
        """
        expected = tokenizer.num_special_tokens_to_add(pair=True)
        name = type(tokenizer).__name__
        templates = (cls._from_probe(*probe) for probe in _probes(tokenizer)) if expected else iter(())
        template = next((found for found in templates if found and found.num_special_tokens == expected), None)
        if expected and template is None:
            raise InputError(
                f"tokenizer={name} adds {expected} special tokens to a pair, but none around any token of its "
                "vocabulary; give it a post-processor whose template for pairs holds both sequences"
            )
        if template is None or not template.middle:
            raise InputError(
                f"tokenizer={name} puts nothing between the two sequences of a pair; give it a post-processor with a "
                "template for pairs, such as '[CLS] $A [SEP] $B:1 [SEP]:1'"
            )
        return template

    @classmethod
    def _from_probe(cls, ids: list[int], types: list[int], sequences: Sequence[int | None]) -> PairTemplate | None:
        """Return the template that an encoded pair shows; None if A and B are not each in one piece, A first."""
        if 0 not in sequences or 1 not in sequences:
            return None
        a, b = sequences.index(0), sequences.index(1)
        a_stop, b_stop = a + sequences.count(0), b + sequences.count(1)
        if set(sequences[a:a_stop]) != {0} or set(sequences[b:b_stop]) != {1} or b < a:
            return None
        return cls(
            prefix=tuple(ids[:a]),
            middle=tuple(ids[a_stop:b]),
            suffix=tuple(ids[b_stop:]),
            prefix_types=tuple(types[:a]),
            middle_types=tuple(types[a_stop:b]),
            suffix_types=tuple(types[b_stop:]),
            types=(types[a], types[b]),
        )

    @property
    def num_special_tokens(self) -> int:
        """Tokens around and between the two sequences."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def budget(self, block_size: int) -> int:
        """Return how many tokens of A and B together fit into an example.

        Raises:
            InputError: If a token of each does not fit.
        """
        return text_room(block_size, self.num_special_tokens, least=2, what="a pair")

    def join(self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        """Return an example of two sequences.

        Args:
            a: Ids, and whether each begins a word: `[n]` each.
            b: The same of the second sequence, `[m]`.

        Returns:
            `input_ids` int32, `word_starts` bool and `token_type_ids` int64, each `[n + m + num_special_tokens]`;
            `source_length`, the tokens up to and with the middle. A special token is a word of its own, and so is what
            was left of a word of which a sequence lacks the beginning.
        """
        example: dict[str, Any] = interleaved((self.prefix, self.middle, self.suffix), (a, b))
        types_a, types_b = (np.full(len(text[0]), kind) for text, kind in zip((a, b), self.types, strict=True))
        types = (self.prefix_types, types_a, self.middle_types, types_b, self.suffix_types)
        source_length = len(self.prefix) + len(a[0]) + len(self.middle)
        example["word_starts"][len(self.prefix)] = example["word_starts"][source_length] = True
        example["token_type_ids"] = np.concatenate(types, dtype=np.int64, casting="unsafe")
        return example | {"source_length": source_length}


def _probes(tokenizer: Any) -> Iterator[_Probe]:  # noqa: ANN401 (what a Python tokenizer has, a fast one has not)
    """Yield encoded pairs as (ids, token types, number of the sequence of each token or None), likely ones first."""
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):
        ids = tokenizer.build_inputs_with_special_tokens([-1], [-2])
        types = tokenizer.create_token_type_ids_from_sequences([-1], [-2])
        yield ids, types, [{-1: 0, -2: 1}.get(token) for token in ids]
        return
    for text in probe_texts(tokenizer):
        encoding = tokenizer(text, text, return_token_type_ids=True)
        yield encoding["input_ids"], encoding["token_type_ids"], encoding.sequence_ids(0)


class SentencePairDataset(DrawnDataset):
    """Pairs of segments of whole sentences, made anew from the documents in every epoch.

    A chunk is as many sentences of a document as reach `block_size` without its special tokens, or, in a share
    `short_probability` of the documents, a random shorter length; it is split at a random sentence. By `task` the pair is

    - `"nsp"`: 0 the two parts, 1 the first part and text from another document;
    - `"sop"`: 0 the two parts, 1 the two parts in the other order;
    - `"structural"`: 0 the second part follows, 1 it precedes, 2 text from another document;
    - `"none"`: the two parts, without a label.

    Each label comes as often as the others. Where other text replaces the second part, the next chunk begins with
    that part. A pair that is too long loses tokens of the longer segment, each in front or at the back with equal chances.

    A chunk of one sentence can not be split. With `balanced`, a chunk takes a second sentence, and the last one of a
    document if it would be left alone, even if they are too long; a sentence that is alone all the same, in its document
    or after a random pair, begins no pair (it may still be drawn as text from another document). So the label says nothing
    about the number of sentences, and every label has the same share. Without `balanced`, such a chunk becomes a random
    pair, as in BERT's code; tasks without random pairs, which never take other documents' text, go by the balanced rule.

    The number of pairs differs from epoch to epoch, by less than a hundredth for thousands of documents and by more for a few
    long ones, but a dataset has one length: that of epoch 0. Of an epoch with more pairs a random choice is left out, of one
    with fewer a random choice comes twice. Everything is keyed by the seed and the epoch. The tables of the last two epochs
    are kept, 33 bytes a pair in each process that reads; besides that the memory is 8 bytes a sentence.

    Args:
        documents: Documents in the document schema (`input_ids`, `word_starts`, `sent_starts`).
        tokenizer: Tokenizer that made them; gives the special tokens and the token types.
        block_size: Most tokens in an example, special tokens included.
        task: What the label of a pair says.
        seed: Seed of the run.
        balanced: Whether all labels have the same share; otherwise BERT's rule.
        short_probability: Share of the documents with shorter chunks.
        static_epochs: If not 0, the pairs of an epoch are those of its number modulo this.

    Raises:
        InputError: If an option is out of range, `block_size` leaves no room, or the documents give no pair: there is
            no text, no document with two sentences, or no other document.

    Source:
        `create_training_data.py` of BERT's official code (Devlin et al., "BERT", 2019); for sentence order, Lan et al.,
        "ALBERT" (2020); for three classes, Wang et al., "StructBERT" (2020).
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int = 128,
        task: PairTask = "nsp",
        seed: int = 0,
        balanced: bool = True,
        short_probability: float = 0.1,
        static_epochs: int = 0,
    ) -> None:
        check_choice(task, get_args(PairTask), name="task")
        check_range(short_probability, "[0, 1]", name="short_probability", hint="0.1 is usual")
        check_range(static_epochs, "[0, inf)", name="static_epochs", hint="0 makes new pairs in every epoch")
        self.template = PairTemplate.of(tokenizer)
        self.store = TokenStore(documents)
        self.block_size = block_size
        self.static_epochs = static_epochs
        room = self.template.budget(block_size)
        self.rule = PairRule(task, room, seed=seed, balanced=balanced, short_probability=short_probability)
        self._check_documents()
        super().__init__()
        self._tables: dict[int, PairTable] = {}
        first = self.pairs(0)
        self._num_pairs = len(first.labels)
        self._tables[0] = first

    def _check_documents(self) -> None:
        """Refuse documents that give no pair."""
        num_documents = self.store.num_documents
        if num_documents == 0:
            raise InputError("documents hold no token; check the text they were made from")
        if self.rule.has_random and num_documents == 1:
            raise InputError(
                f"task={self.rule.task!r} takes random text from other documents, but there is one document only: "
                "separate the documents of the text, hold out more of them, or use task='sop'"
            )
        if not self.rule.takes_lone_sentences and np.diff(self.sentences.documents).max() == 1:
            raise InputError(
                f"documents: none of {num_documents} has two sentences to make a pair of; check the sentence "
                "splitter, or let a document be more than a sentence"
            )

    @cached_property
    def sentences(self) -> SentenceIndex:
        """Where sentences and documents begin."""
        return SentenceIndex.of(self.store)

    def pairs(self, epoch: int) -> PairTable:
        """Return all pairs of an epoch, as many as there are: before they are fitted to the length of the dataset."""
        return draw_pairs(self.sentences, rule=self.rule, epoch=epoch)

    def _table(self, epoch: int) -> PairTable:
        """Return the pairs of an epoch, as many as the dataset has rows."""
        epoch = epoch % self.static_epochs if self.static_epochs else epoch
        table = self._tables.pop(epoch, None)
        if table is None:
            table = self._fitted(self.pairs(epoch), epoch)
            for oldest in list(self._tables)[: 1 - _KEPT_EPOCHS]:
                del self._tables[oldest]
        self._tables[epoch] = table
        return table

    def _fitted(self, table: PairTable, epoch: int) -> PairTable:
        count, surplus = len(table.labels), len(table.labels) - self._num_pairs
        if surplus == 0:
            return table
        order = draws.permutation(count, seed=self.rule.seed, epoch=epoch, stream="pair_fit")
        chosen = order[surplus:] if surplus > 0 else np.concatenate([order, np.resize(order, -surplus)])
        return PairTable(*(values[np.sort(chosen)] for values in table))

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return self._num_pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of an index, which may carry its epoch and its index in the order.

        Returns:
            `input_ids` int32, `word_starts` bool and `token_type_ids` int64, `[n]` each; `source_length`, the tokens up to
            and with those between the segments; `pair_label`, unless the task is `"none"`; `example_id`, `epoch`
            and, if the index has one, `order_index`.

        Raises:
            IndexError: If there is no such example.
        """
        keys = self._locate(index)
        table, row = self._table(keys["epoch"]), keys["example_id"]
        a, b = (
            self.store.read(*span) for span in zip(table.starts[row].tolist(), table.stops[row].tolist(), strict=True)
        )
        example = self.template.join(a, b)
        if self.rule.task != "none":
            example["pair_label"] = int(table.labels[row])
        return example | keys

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example of epoch 0, special tokens included: `int64 [num_examples]`."""
        table = self._table(0)
        return (table.stops - table.starts).sum(axis=1) + self.template.num_special_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of text in all pairs of epoch 0, without special tokens."""
        return int(self.lengths.sum()) - len(self) * self.template.num_special_tokens

    @property
    def fill(self) -> float:
        """Mean length of an example as a share of `block_size`, in epoch 0."""
        return float(self.lengths.mean()) / self.block_size

    @property
    def label_shares(self) -> list[float]:
        """Share of each label in epoch 0."""
        counts = np.bincount(self._table(0).labels, minlength=len(self.rule.kinds))
        return (counts / len(self)).tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tables, which are made again where the dataset arrives."""
        state = {name: value for name, value in vars(self).items() if name not in ("sentences", "lengths")}
        # `base` is this object.
        return state | {"_tables": {}}

    def __repr__(self) -> str:
        """Show the pairs and how well they fill."""
        shares = "/".join(f"{share:.3f}" for share in self.label_shares)
        labels = f", labels={shares}" if len(self.rule.kinds) > 1 else ""
        return (
            f"{type(self).__name__}({len(self)} pairs of at most {self.block_size} tokens, task={self.rule.task!r}, "
            f"{self.num_tokens} tokens of {self.store.num_documents} documents, fill={self.fill:.3f}{labels})"
        )
