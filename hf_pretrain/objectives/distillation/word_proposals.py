"""What may take the place of a word: the likeliest words of a masked language model, or the nearest by their vectors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.words import character_kinds, next_visible, word_starts
from hf_pretrain.evaluation.batches import batches_by_length
from hf_pretrain.modeling.base import longest_sequence
from hf_pretrain.modeling.gathered import GatheredHead
from hf_pretrain.objectives.distillation.word_neighbours import WordNeighbours, is_word, whole_words

_UNLIMITED = 1 << 20
_APOSTROPHES = set("'\u2019")


@dataclass
class ChangeableWord:
    """A word that may be exchanged.

    Attributes:
        row: Which of the texts it is in.
        number: Which of the text's words it is.
        begin: Offset of its first character.
        text: The word itself.
        tokens: Its places among the text's tokens.
        candidates: What may take its place.
    """

    row: int
    number: int
    begin: int
    text: str
    tokens: list[int]
    candidates: list[str] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Offset behind its last character."""
        return self.begin + len(self.text)


class WordProposer:
    """Finds the words of texts that may be exchanged, and what for.

    Args:
        model: A stock masked language model, which proposes for words of one token.
        tokenizer: Its tokenizer, a fast one.
        neighbours: Proposes for words of several tokens.
        stop_words: Words, in lower case, that are left alone.
        num_candidates: Most proposals for a word.
        batch_size: Masked texts in a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        neighbours: WordNeighbours,
        stop_words: Collection[str] = (),
        num_candidates: int = 15,
        batch_size: int = 128,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.neighbours = neighbours
        self.stop_words = stop_words
        self.num_candidates = num_candidates
        self.batch_size = batch_size
        self._longest = min(longest_sequence(model.base_model) or _UNLIMITED, tokenizer.model_max_length, _UNLIMITED)
        self._whole_words = whole_words(tokenizer)
        self._word_ids = torch.tensor(list(self._whole_words), dtype=torch.int64)

    def __call__(self, texts: Sequence[str]) -> list[ChangeableWord]:
        """Return the words that have candidates, in the order of the texts."""
        encoding = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        ids = [np.array(row, dtype=np.int64) for row in encoding["input_ids"]]
        words = [
            word
            for row, text in enumerate(texts)
            for word in _words(row, text, encoding["offset_mapping"][row], encoding["special_tokens_mask"][row])
            if self._may_change(word, text)
        ]
        self._fill_masks([word for word in words if len(word.tokens) == 1], ids)
        self._find_neighbours([word for word in words if len(word.tokens) > 1])
        return [word for word in words if word.candidates]

    def _may_change(self, word: ChangeableWord, text: str) -> bool:
        """Whether a word is of letters, no stop word and no part of a contraction, such as "don't"."""
        around = text[max(word.begin - 1, 0) : word.begin] + text[word.end : word.end + 1]
        return is_word(word.text) and word.text.lower() not in self.stop_words and _APOSTROPHES.isdisjoint(around)

    def _fill_masks(self, words: list[ChangeableWord], ids: list[np.ndarray]) -> None:
        """Give words the model's likeliest ones where each of them is masked."""
        columns = np.array([word.tokens[0] for word in words], dtype=np.int64)
        originals = np.array([ids[word.row][word.tokens[0]] for word in words], dtype=np.int64)
        masked = [ids[word.row].copy() for word in words]
        for row, column in zip(masked, columns, strict=True):
            row[column] = self.tokenizer.mask_token_id
        batches = batches_by_length(
            masked,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            device=self.model.device,
            name="Proposing words",
        )
        with GatheredHead(self.model) as head:
            for rows, batch in batches:
                positions = np.arange(len(rows)) * batch["input_ids"].shape[1] + columns[rows]
                logits_BV = head(self.model, torch.from_numpy(positions).to(self.model.device), **batch).float()
                for row, candidates in zip(rows, self._likeliest(logits_BV, originals[rows]), strict=True):
                    words[row].candidates = candidates

    def _likeliest(self, logits_BV: torch.Tensor, original_B: np.ndarray) -> list[list[str]]:  # noqa: N803
        """Return the likeliest whole words of each row, the original not among them, in the order of their ids."""
        device = logits_BV.device
        penalty_V = torch.full((logits_BV.shape[1],), -torch.inf, device=device)
        penalty_V[self._word_ids.to(device)] = 0.0
        allowed_BV = (logits_BV + penalty_V).scatter_(1, torch.from_numpy(original_B)[:, None].to(device), -torch.inf)
        best = allowed_BV.topk(min(self.num_candidates, logits_BV.shape[1]))
        kept = (best.values > -torch.inf).sum(dim=1).tolist()
        # Not by likelihood: where two are about equal, padding decides which comes first.
        ids = [sorted(row[:count]) for row, count in zip(best.indices.tolist(), kept, strict=True)]
        return [[self._whole_words[index] for index in row] for row in ids]

    def _find_neighbours(self, words: list[ChangeableWord]) -> None:
        names = list({word.text: None for word in words})
        near = dict(zip(names, self.neighbours.nearest(names, count=self.num_candidates), strict=True))
        for word in words:
            word.candidates = near[word.text]


def _words(
    row: int, text: str, offsets: Sequence[tuple[int, int]], is_special: Sequence[int]
) -> Iterator[ChangeableWord]:
    """Yield the words of a text that are whole among its tokens, of which the last may have been cut off."""
    kinds = character_kinds(text)
    starts = word_starts(text, kinds=kinds)
    places = next_visible(kinds, np.array([begin for begin, _ in offsets], dtype=np.int64))
    numbers = np.searchsorted(starts, places, side="right") - 1
    tokens: dict[int, list[int]] = {}
    for column, number in enumerate(numbers.tolist()):
        if not is_special[column]:
            tokens.setdefault(number, []).append(column)
    bounds = [*starts.tolist(), len(text)]
    for number, columns in tokens.items():
        begin, word = bounds[number], text[bounds[number] : bounds[number + 1]].rstrip()
        if offsets[columns[-1]][1] >= begin + len(word):
            yield ChangeableWord(row, number, begin, word, columns)
