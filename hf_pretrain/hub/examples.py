"""The sentences of a card's code: one of the held-out text, with a token to mask, and the code that they stand in.

A text that is marked as private gives no sentence; then the code has one of our own, in the language of the text if we have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_pretrain.data import draws
from hf_pretrain.data.documents.words import is_letters, letter_share, letter_words
from hf_pretrain.hub.identifiers import as_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_pretrain.hub.record import PretrainingCard

# Two sentences by language; in the first, the word to mask is between bars.
_OUR_OWN = {
    "en": ("The chef ate the |meal|.", "A dull one, and cold."),
    "ar": ("أكل الطباخ |الطعام|.", "كان الطعام باردا."),
    "de": ("Der Koch hat das |Essen| gekostet.", "Es war leider kalt."),
    "es": ("El cocinero probó la |comida|.", "Por desgracia estaba fría."),
    "fr": ("Le cuisinier a goûté le |repas|.", "Il était froid."),
    "it": ("Il cuoco ha assaggiato la |cena|.", "Purtroppo era fredda."),
    "ja": ("料理人は|食事|を食べた。", "残念ながら冷たかった。"),
    "nl": ("De kok at de |maaltijd|.", "Die was helaas koud."),
    "pt": ("O cozinheiro provou a |comida|.", "Infelizmente estava fria."),
    "ru": ("Повар съел |обед|.", "Он был холодным."),
    "zh": ("厨师吃了|饭|。", "可惜饭是冷的。"),
}
# The end of a sentence, with what may close it; scripts without a space after it are among them.
_END = re.compile(r"(?:[.!?…]+[\"'»”’)]*(?=\s)|[。！？]+[」』”]*|[।۔؟]+)\s*")
_SHORTEST, _LONGEST = 12, 100  # characters
_LETTERS = 0.6  # the least share of letters and spaces
_MOST_EXAMPLES = 64  # that are looked at


def find_examples(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, *, seed: int) -> tuple[str, ...]:
    """Return two short sentences of a dataset, the first with bars around the word to mask; () if it has none.

    The choice follows from the seed alone. A sentence has one line and no unknown token, and is not cut by the end of a block.

    Args:
        dataset: Held-out examples with `input_ids`, or a mapping of several sets, of which the first is taken.
        tokenizer: Their tokenizer.
        seed: Seed of the run.
    """
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    if tokenizer is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return ()
    first = ""
    for number in draws.permutation(len(dataset), seed=seed, stream="card examples")[:_MOST_EXAMPLES].tolist():
        ids = dataset[number].get("input_ids")
        for sentence in () if ids is None else _sentences([int(token) for token in ids], tokenizer):
            if not first:
                first = _with_bars(sentence, tokenizer)
            elif sentence != first.replace("|", ""):
                return first, sentence
    return ()


def _sentences(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    # The first and the last piece may be cut.
    parts = [text[begin:end].strip() for begin, end in _bounds(text)][1:-1]
    for part in parts:
        if _SHORTEST <= len(part) <= _LONGEST and letter_share(part) >= _LETTERS and "|" not in part:
            yield part


def _bounds(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    for end in (found.end() for found in _END.finditer(text)):
        yield begin, end
        begin = end
    yield begin, len(text)


def _with_bars(sentence: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sentence with bars around its longest word of one token, else around its longest token of letters."""
    encoding = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)
    spans = {(begin, end) for begin, end in encoding["offset_mapping"] if is_letters(sentence[begin:end].strip())}
    words = set(letter_words(sentence))
    # A tokenizer of bytes counts the space before a word to it.
    spans = {(begin + len(sentence[begin:end]) - len(sentence[begin:end].lstrip()), end) for begin, end in spans}
    chosen = sorted(spans & words or spans, key=lambda span: (span[0] - span[1], span[0]))
    if not chosen:
        return sentence
    begin, end = chosen[0]
    return f"{sentence[:begin]}|{sentence[begin:end]}|{sentence[end:]}"


def examples_of(card: PretrainingCard) -> tuple[str, str]:
    """Return the two sentences of a card, the first with bars: those of its text, or ours in its language, or in English."""
    if len(card.examples) == 2:
        return card.examples[0], card.examples[1]
    codes = (code.partition("-")[0] for code in as_list(card.language))
    return next((_OUR_OWN[code] for code in codes if code in _OUR_OWN), _OUR_OWN["en"])


def in_code(code: str, card: PretrainingCard) -> str:
    """Return the code of a card with its names and sentences.

    Args:
        code: Python with "{repo}", "{model_class}", and in place of literals "{sentence}", "{another}", "{beginning}" (of the
            sentence) and "{masked}", which has `fill_mask.tokenizer.mask_token` in the middle.
        card: The facts.
    """
    barred, another = examples_of(card)
    before, _, rest = barred.partition("|")
    word, _, after = rest.partition("|")
    sentence = before + word + after
    inner = json.dumps(f"{before}\0{after}", ensure_ascii=False)[1:-1].replace("{", "{{").replace("}", "}}")
    literals = {
        "{sentence}": json.dumps(sentence, ensure_ascii=False),
        "{another}": json.dumps(another, ensure_ascii=False),
        "{beginning}": json.dumps(_beginning(sentence), ensure_ascii=False),
        "{masked}": 'f"' + inner.replace("\\u0000", "{fill_mask.tokenizer.mask_token}") + '"',
        "{repo}": card.repo,
        "{model_class}": card.model_class,
    }
    # At once: a sentence may have such a name in it.
    return re.sub("|".join(map(re.escape, literals)), lambda found: literals[found[0]], code)


def _beginning(sentence: str) -> str:
    """Return the first half of a sentence, in words where it has some."""
    words = sentence.split()
    return " ".join(words[: (len(words) + 1) // 2]) if len(words) > 3 else sentence[: (len(sentence) + 1) // 2]
