"""ELMo's tokenizer: words, and the characters of each.

The ids of words are those of a fast tokenizer that knows whole words. Beside them it gives `character_ids`, in which every word
is itself, known or not. In the shapes: B texts, T words, K characters of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

BEGIN_OF_SENTENCE, END_OF_SENTENCE, BEGIN_OF_WORD, END_OF_WORD, PADDING = range(256, 261)
"""Marks beside the 256 bytes. All ids are raised by one, so that 0 is a word that is not there."""

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<UNK>", "bos_token": "<S>", "eos_token": "</S>"}


def word_characters(word: str | int, *, max_characters: int = 50) -> list[int]:
    """Return the characters of a word: its bytes between two marks, filled up with padding.

    Args:
        word: The word, of which at most ``max_characters - 2`` bytes count; or one of the two marks of sentences.
        max_characters: K.

    Returns:
        K ids from 1 to 261.

    Source: `bilm-tf`, `UnicodeCharsVocabulary`.
    """
    return list(_characters(word, max_characters))


# Most words of a text have been there before.
@lru_cache(maxsize=1 << 16)
def _characters(word: str | int, max_characters: int) -> tuple[int, ...]:
    symbols = [word] if isinstance(word, int) else list(word.encode("utf-8", "ignore")[: max_characters - 2])
    found = [BEGIN_OF_WORD, *symbols, END_OF_WORD]
    return tuple(number + 1 for number in found + [PADDING] * (max_characters - len(found)))


class ElmoTokenizer(PreTrainedTokenizerFast):
    """Words of a text as ids and as characters, with the marks of a sentence around them.

    A text is cut into words as the tokenizer inside does it. A list of words, given with `is_split_into_words=True`, is not cut
    any further. A word of the vocabulary has the characters of the vocabulary, any other one its own.

    Args:
        *args: As of `PreTrainedTokenizerFast`.
        **kwargs: As of `PreTrainedTokenizerFast`; and `max_characters`, the characters of a word, its two marks included, which
            is 50 and has to be that of the model.
    """

    model_input_names = ["input_ids", "attention_mask", "character_ids"]  # noqa: RUF012
    _auto_class = "AutoTokenizer"

    # There is no __init__ here: for a class that has one, transformers would build another tokenizer from the saved words.

    @property
    def max_characters(self) -> int:
        """Characters of a word, its two marks included."""
        return int(self.init_kwargs.get("max_characters", 50))

    @classmethod
    def without_vocabulary(cls, *, max_characters: int = 50) -> ElmoTokenizer:
        """Return a tokenizer of words between white space, for models that read characters alone; all ids are that of unknown."""
        return cls(tokenizer_object=_without_words(), max_characters=max_characters, **_SPECIAL)

    @classmethod
    def from_fast(cls, tokenizer: PreTrainedTokenizerFast, *, max_characters: int = 50) -> ElmoTokenizer:
        """Return the tokenizer with the words, the special tokens and the options of a fast one."""
        names = ("pad_token", "unk_token", "bos_token", "eos_token", "cls_token", "sep_token", "mask_token")
        special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        sides = {name: getattr(tokenizer, name) for name in ("padding_side", "truncation_side", "model_max_length")}
        return cls(tokenizer_object=backend, max_characters=max_characters, **special, **sides)

    def token_characters(self, token_id: int) -> list[int]:
        """Return the characters of a token of the vocabulary: zeros for padding, a mark for the border of a sentence.

        A tokenizer with one token for both borders gives it the mark of the end.
        """
        if token_id == self.pad_token_id:
            return [0] * self.max_characters
        borders = {
            BEGIN_OF_SENTENCE: (self.bos_token_id, self.cls_token_id),
            END_OF_SENTENCE: (self.eos_token_id, self.sep_token_id),
        }
        marks = [mark for mark, ids in borders.items() if token_id in ids]
        token = self.convert_ids_to_tokens(token_id)
        return word_characters(marks[-1] if marks else str(token), max_characters=self.max_characters)

    def vocabulary_characters(self) -> list[list[int]]:
        """Return the characters ``[V, K]`` of all tokens in the order of their ids."""
        return [self.token_characters(number) for number in range(len(self))]

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Add the characters to what the fast tokenizer returns; there are none where no attention mask is wanted either."""
        is_split, tensors = options.get("is_split_into_words", False), options.pop("return_tensors", None)
        cutter = self.backend_tokenizer.pre_tokenizer
        try:
            if is_split and cutter is not None:
                # A word that is given stays whole. Every other cutter would cut at punctuation.
                self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\0", "removed")
            found = super()._encode_plus(text, text_pair, **options)
        finally:
            if is_split and cutter is not None:
                self.backend_tokenizer.pre_tokenizer = cutter
        if options.get("return_attention_mask") is False:
            return found.convert_to_tensors(tensors) if tensors is not None else found
        is_one = isinstance(text, str) or (is_split and not (len(text) and isinstance(text[0], (list, tuple))))
        sources = [(text, text_pair)] if is_one else list(zip(text, text_pair or [None] * len(text), strict=True))
        # Where a text is returned in several parts, each part names its text.
        owners = found.get("overflow_to_sample_mapping") or range(len(found.encodings))
        rows = [
            list(self._characters_of(encoding, sources[owner], is_split=is_split))
            for encoding, owner in zip(found.encodings, owners, strict=True)
        ]
        is_flat = len(found["input_ids"]) > 0 and isinstance(found["input_ids"][0], int)
        data = dict(found) | {"character_ids": rows[0] if is_flat else rows}
        if tensors is not None and is_flat:
            data = {name: [value] for name, value in data.items()}
        return BatchEncoding(data, found.encodings, tensor_type=tensors)

    def _characters_of(self, encoding: Any, source: Sequence[Any], *, is_split: bool) -> Iterator[list[int]]:
        """Yield the characters of each token of a text, which is given for the words that are not known."""
        normalizer = self.backend_tokenizer.normalizer
        for token, is_word, part, word, (begin, end) in zip(
            encoding.ids,
            encoding.attention_mask,
            encoding.sequence_ids,
            encoding.word_ids,
            encoding.offsets,
            strict=True,
        ):
            if not is_word:
                yield [0] * self.max_characters
            elif token != self.unk_token_id or part is None:
                yield self.token_characters(token)
            else:
                text = source[part][word] if is_split else source[part]
                found = text[begin:end]
                found = found if normalizer is None else normalizer.normalize_str(found)
                yield word_characters(found, max_characters=self.max_characters)

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        length = len(encoded_inputs["input_ids"])
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "character_ids" in padded:
            missing = [[0] * self.max_characters] * (len(padded["input_ids"]) - length)
            rows = [list(row) for row in padded["character_ids"]][:length]
            is_left = (kwargs.get("padding_side") or self.padding_side) == "left"
            padded["character_ids"] = missing + rows if is_left else rows + missing
        return padded


def _without_words() -> Tokenizer:
    """Return a tokenizer of words between white space that knows none of them."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(_SPECIAL.values())}, unk_token="<UNK>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<S> $A </S>", pair="<S> $A </S> $B:1 </S>:1", special_tokens=[("<S>", 2), ("</S>", 3)]
    )
    return backend


__all__ = ["ElmoTokenizer"]
