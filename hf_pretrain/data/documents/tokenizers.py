"""Tokenizers: choosing a kind for a text, training one, framing it as XLM does, adding tokens, and checking one that is given.

All kinds split the text as `hf_pretrain.data.documents.words` does before they look for sub-words. So no token reaches
over two words, and a model's vocabulary does not decide what whole-word masking calls a word. Training twice on the
same texts gives the same vocabulary.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_pretrain.data.documents.words import (
    ASCII_SYMBOLS,
    IDEOGRAPH,
    IDEOGRAPH_RANGES,
    IGNORED,
    KANA,
    LETTER,
    MARK,
    PUNCTUATION,
    SPACE,
    character_kinds,
    clipped,
    code_points,
    encodable,
    word_starts,
)
from hf_pretrain.errors import InputError, check_choice

logger = logging.get_logger(__name__)
TokenizerKind = Literal["wordpiece", "bpe", "unigram", "word"]
_BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# One token between documents, as GPT-2 has, serves as the first of a text and as the last.
_WORD_TOKENS = {"pad_token": "<pad>", "unk_token": "<UNK>", "bos_token": "</S>", "eos_token": "</S>"}
_NUM_BYTES = 256
_SPACE = "▁"
# The alphabet holds the characters that are at least this share of the text, the most frequent ones if they are more
# than a quarter of the vocabulary. Where it covers less of the text than that, too much would be unknown.
_LEAST_SHARE, _LEAST_COVERAGE = 1e-6, 0.995
_QUARTER = 4
# Scores are rounded to this, far above the noise of summing in another order, far below what changes a tokenization.
_DECIMALS = 6
_PENALTY_STEP = 1e-4
# The time of a trainer grows with the square of the longest word. Words that are longer are left out of the training of
# the tokenizer; where they are the text, they are cut, and a single one has so many parts at most.
_LONGEST_WORD, _MOST_PARTS = 1000, 100
# Unigram takes about 20 microseconds for each character of text that has no spaces, each of its words being another.
_UNBROKEN_CHARACTERS = 1 << 22
# Below so many characters a training takes no more than about two seconds.
_QUICK_CHARACTERS = {"wordpiece": 1 << 22, "bpe": 1 << 22, "unigram": 1 << 18, "word": 1 << 22}
# A tokenizer is chosen by so many characters of the text, and so many at most of one document.
_LOOKED_AT, _LOOKED_AT_IN_ONE = 1 << 20, 1 << 13
# Words are longer than this in no language that separates them, but for single ones.
_LONG_WORD = 25
_LEAST_LONG_SHARE, _LEAST_KANA_SHARE, _LEAST_JOINER_SHARE = 0.1, 0.1, 1e-3
# Measured: 4 % and more in Python, JavaScript, C and CSS; 2.5 % in docstrings with their examples, 0.4 % in prose.
_LEAST_OPERATOR_SHARE = 0.035
_OPERATORS = re.compile(r"[={};_]|\w\(")
_JOINERS = "\u200c\u200d"
# Control characters, marks of direction and the like, which BERT deletes as well; joiners of letters stay.
_INVISIBLE = (
    r"[\x{0}-\x{8}\x{e}-\x{1f}\x{7f}-\x{84}\x{86}-\x{9f}\x{ad}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2060}-\x{2064}"
    r"\x{2066}-\x{206f}\x{feff}\x{fffd}]"
)


class TokenizerChoice(NamedTuple):
    """A kind of tokenizer that suits a text, whether it lowers the case, and why."""

    kind: TokenizerKind
    lowercase: bool
    reason: str


def choose_tokenizer(texts: Iterable[str | None]) -> TokenizerChoice:
    """Choose the tokenizer to train by the first million characters of the text.

    WordPiece in lower case, as BERT's, where words are separated. Byte-level BPE that keeps the case for program code and
    for long runs of ASCII letters (DNA, proteins, base64), of which it loses nothing. Unigram for scripts that are written
    without spaces, and for letters that are held together by zero-width joiners, which WordPiece would delete.

    Args:
        texts: The texts; the same texts give the same choice.
    """
    look = _look_at(texts)
    shares = {name: getattr(look, name) / max(look.visible, 1) for name in ("long", "operators", "kana", "joiners")}
    if shares["operators"] >= _LEAST_OPERATOR_SHARE:
        reason = f"operators and brackets are {shares['operators']:.0%} of the text, as in program code"
        return TokenizerChoice("bpe", False, reason)
    if shares["long"] >= _LEAST_LONG_SHARE:
        reason = f"{shares['long']:.0%} of the text are runs of more than {_LONG_WORD} characters without a space"
        is_ascii = look.long_ascii > look.long / 2
        return TokenizerChoice("bpe" if is_ascii else "unigram", not is_ascii, reason)
    if shares["kana"] >= _LEAST_KANA_SHARE:
        return TokenizerChoice("unigram", True, f"{shares['kana']:.0%} of the text are kana, written without spaces")
    if shares["joiners"] >= _LEAST_JOINER_SHARE:
        reason = (
            f"zero-width joiners between letters are {shares['joiners']:.1%} of the text, and WordPiece deletes them"
        )
        return TokenizerChoice("unigram", True, reason)
    return TokenizerChoice("wordpiece", True, "spaces or single characters separate the words")


@dataclass
class _Look:
    """Numbers of characters: visible, in long words, ASCII in long words, kana, joiners of letters; and operators."""

    visible: int = 0
    long: int = 0
    long_ascii: int = 0
    kana: int = 0
    joiners: int = 0
    operators: int = 0


def _look_at(texts: Iterable[str | None]) -> _Look:
    look = _Look()
    for part in clipped(((text or "")[:_LOOKED_AT_IN_ONE] for text in texts), _LOOKED_AT):
        kinds = character_kinds(part)
        is_visible = (kinds != SPACE) & (kinds != IGNORED)
        starts = word_starts(part, kinds=kinds)
        counted = np.concatenate([[0], np.cumsum(is_visible)])
        lengths = counted[np.append(starts[1:], len(part))] - counted[starts]
        for start, length in zip(starts[lengths > _LONG_WORD], lengths[lengths > _LONG_WORD], strict=True):
            look.long += int(length)
            look.long_ascii += int(length) if part[start : start + _LONG_WORD].isascii() else 0
        look.visible += int(is_visible.sum())
        look.kana += int((kinds == KANA).sum())
        look.operators += len(_OPERATORS.findall(part))
        if any(joiner in part for joiner in _JOINERS):
            letter = np.concatenate([[False], (kinds == LETTER) | (kinds == MARK), [False]])
            found = np.array([index for index, character in enumerate(part) if character in _JOINERS])
            look.joiners += int((letter[found] & letter[found + 2]).sum())
    return look


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: TokenizerKind = "wordpiece",
    vocab_size: int = 30522,
    lowercase: bool = True,
    strip_accents: bool = False,
    model_max_length: int = 512,
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with the special tokens and the post-processor of a masked language model.

    Nothing of the text is lost but the case if it is lowered, accents if they are stripped, and control characters. Words of
    more than 1000 characters are not learned from, unless they are most of the text; then they are cut.

    Args:
        texts: Texts to learn from; read several times, and kept in memory if they can not be. None is no text.
        kind: ``"wordpiece"`` (BERT's, opens as `BertTokenizer`), ``"bpe"`` (RoBERTa's, on bytes: it loses nothing) or
            ``"unigram"`` (SentencePiece's, with NFC), or ``"word"`` (whole words, from frequent to rare, cut as BERT cuts them
            before it looks for pieces); all but the first are `PreTrainedTokenizerFast`.
        vocab_size: Most tokens in the vocabulary, special tokens included; less come out of a small corpus.
        lowercase: Lower the case.
        strip_accents: Take accents, vowel signs and tones off their letters, as the uncased BERT does.
        model_max_length: Longest sequence of the model, in tokens.
        min_frequency: Least number of times that a merged pair occurs; Unigram has no such limit.

    Returns:
        The tokenizer.

    Raises:
        InputError: If the kind is unknown, there is no text, or the vocabulary is too small for the alphabet.

    Source:
        Schuster and Nakajima (2012) as in BERT; Sennrich et al. (2016) as in GPT-2 and RoBERTa; Kudo (2018).
    """
    check_choice(kind, get_args(TokenizerKind), name="tokenizer_type")
    if iter(texts) is texts:
        texts = list(texts)
    if not any((text or "").strip() for text in texts):
        raise InputError("texts hold no text to train a tokenizer on; check the files")
    learned = _LearnedTexts.of(texts, kind)
    train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram, "word": _train_words}[kind]
    return train(learned, _Options(vocab_size, lowercase, strip_accents, model_max_length, min_frequency))


class _Options(NamedTuple):
    """The options of `train_tokenizer`."""

    vocab_size: int
    lowercase: bool
    strip_accents: bool
    model_max_length: int
    min_frequency: int


@dataclass
class _LearnedTexts:
    """The texts as a trainer gets them: without words that are too long for it.

    Attributes:
        texts: All of the text.
        cut: Whether such words are cut instead of left out.
        room: Most characters to learn from.
        show_progress: Whether the training takes long enough for a bar, and there is a terminal to show it.
    """

    texts: Iterable[str | None]
    cut: bool
    room: int
    show_progress: bool

    @classmethod
    def of(cls, texts: Iterable[str | None], kind: TokenizerKind) -> _LearnedTexts:
        """Look through the texts for words that are too long, and warn of them."""
        total = num_long = num_characters = 0
        for text in texts:
            lengths = [stop - start for start, stop in _too_long(text or "")]
            total += len(text or "")
            num_long += len(lengths)
            num_characters += sum(lengths)
        cut = num_characters > total / 2
        room, look = total, _look_at(texts) if kind == "unigram" else _Look()
        if look.long >= _LEAST_LONG_SHARE * look.visible > 0:
            room = min(total, _UNBROKEN_CHARACTERS * look.visible // look.long)
        if num_long:
            become = f"cut, of each at most {_MOST_PARTS} parts" if cut else "left out"
            logger.warning(
                f"training of the tokenizer: {num_long:,} words of more than {_LONGEST_WORD:,} characters "
                f"({num_characters:,} of {total:,} characters) are {become}; they stay in the text"
            )
        if room < total:
            logger.warning(f"training of the tokenizer: the first {room:,} of {total:,} characters are learned from")
        return cls(texts, cut, room, show_progress=sys.stderr.isatty() and room > _QUICK_CHARACTERS[kind])

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        return map(self._shortened, clipped(self.texts, self.room))

    def _shortened(self, text: str) -> str:
        parts, begin = [], 0
        for start, stop in _too_long(text):
            parts.append(text[begin:start])
            if self.cut:
                ends = range(start, min(stop, start + _MOST_PARTS * _LONGEST_WORD), _LONGEST_WORD)
                parts += [text[low : min(low + _LONGEST_WORD, stop)] for low in ends]
            begin = stop
        return " ".join([*parts, text[begin:]]) if parts else text


def _too_long(text: str) -> list[tuple[int, int]]:
    """Return beginning and end of each run that is too long for a trainer: no space in it, ideograph or wide punctuation."""
    if len(text) <= _LONGEST_WORD or max(map(len, text.split()), default=0) <= _LONGEST_WORD:
        return []
    found = []
    for match in re.finditer(r"\S+", text):
        if match.end() - match.start() > _LONGEST_WORD:
            kinds = character_kinds(match[0])
            is_wide = code_points(match[0]) > 0x7F
            borders = np.flatnonzero((kinds == IDEOGRAPH) | ((kinds == PUNCTUATION) & is_wide))
            edges = np.concatenate([[-1], borders, [len(kinds)]])
            for low, high in itertools.pairwise(edges.tolist()):
                if high - low - 1 > _LONGEST_WORD:
                    found.append((match.start() + low + 1, match.start() + high))
    return found


def _train_wordpiece(learned: _LearnedTexts, wanted: _Options) -> BertTokenizer:
    # The stock class builds the whole pipeline, and AutoTokenizer finds it again under its own name.
    # Left to itself, it strips accents where it lowers the case.
    options: dict[str, Any] = {"do_lower_case": wanted.lowercase, "strip_accents": wanted.strip_accents}
    options |= {"model_max_length": wanted.model_max_length, **_BERT_TOKENS}
    pipeline = BertTokenizer(**options).backend_tokenizer
    fixed = len(_BERT_TOKENS)
    frequency = _character_counts(learned.texts, pipeline.normalizer, each_alone=True)
    alphabet = _alphabet(frequency, vocab_size=wanted.vocab_size, num_fixed=fixed)
    # The trainer numbers continuation characters in the random order of a hash map, and numbers decide between pairs
    # that are equally frequent. Named as special tokens they have their numbers beforehand.
    continued = [f"##{character}" for character in alphabet if _joins_words(character, pipeline)]
    _check_size(wanted.vocab_size, fixed + len(alphabet) + len(continued))
    backend = Tokenizer(models.WordPiece(unk_token=_BERT_TOKENS["unk_token"]))
    backend.normalizer, backend.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=wanted.vocab_size,
        min_frequency=wanted.min_frequency,
        special_tokens=[*_BERT_TOKENS.values(), *alphabet, *continued],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=learned.show_progress,
    )
    backend.train_from_iterator(_batches(learned), trainer)
    return BertTokenizer(vocab=backend.get_vocab(), **options)


def _joins_words(character: str, pipeline: Tokenizer) -> bool:
    """Return whether a pipeline takes a letter and the character after it for one word."""
    return len(pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str("a" + character))) == 1


def _train_bpe(learned: _LearnedTexts, wanted: _Options) -> PreTrainedTokenizerFast:
    _check_size(wanted.vocab_size, len(_ROBERTA_TOKENS) + _NUM_BYTES)
    backend = Tokenizer(models.BPE())
    if steps := _letter_steps(wanted):
        backend.normalizer = normalizers.Sequence(steps)
    # As GPT-2's expression, but with this library's words; a space stays with the word behind it.
    lone = f"[{_lone_characters()}]"
    pattern = (
        rf" ?{lone}\p{{M}}*| ?[\p{{L}}\p{{M}}&&[^{_lone_characters()}]]+| ?\p{{N}}+"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}{_lone_characters()}]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    names = list(_ROBERTA_TOKENS.values())
    trainer = trainers.BpeTrainer(
        vocab_size=wanted.vocab_size,
        min_frequency=wanted.min_frequency,
        special_tokens=[*names[:-1], mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=learned.show_progress,
    )
    backend.train_from_iterator(_batches(learned), trainer)
    sep, cls = ((name, names.index(name)) for name in ("</s>", "<s>"))
    backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=False)
    tokens = _ROBERTA_TOKENS | {"bos_token": "<s>", "eos_token": "</s>", "mask_token": mask}
    return _opened(backend, wanted, tokens, ["input_ids", "attention_mask"])


def _opened(
    backend: Tokenizer, wanted: _Options, tokens: dict[str, Any], inputs: list[str]
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers with these special tokens, and with these inputs for a model."""
    options: dict[str, Any] = {"model_max_length": wanted.model_max_length, "model_input_names": inputs}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens, **options)


def _template(first: tuple[str, int], last: tuple[str, int]) -> Any:
    """Return the post-processor that puts a token before a text, and another behind each of one or two texts."""
    single = f"{first[0]}:0 $A:0 {last[0]}:0"
    pair = f"{single} $B:1 {last[0]}:1"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(dict.fromkeys((first, last))))


def _letter_steps(wanted: _Options) -> list[Any]:
    """Return the normalizers that change letters."""
    stripping = [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
    return [*stripping * wanted.strip_accents, *[normalizers.Lowercase()] * wanted.lowercase]


def _train_unigram(learned: _LearnedTexts, wanted: _Options) -> PreTrainedTokenizerFast:
    fixed = len(_BERT_TOKENS) + len(_SPACE)
    # SentencePiece's rules would also change characters for others that mean the same: NFKC takes the Thai vowel am to
    # pieces, and full-width forms; and they put a space for the joiners of Persian and Sinhala.
    spaces = [normalizers.Replace(Regex(r"[\s\x{200b}]+"), " "), normalizers.Strip()]
    invisible = normalizers.Replace(Regex(_INVISIBLE), "")
    normalizer = normalizers.Sequence([invisible, normalizers.NFC(), *spaces, *_letter_steps(wanted)])
    frequency = _character_counts(learned.texts, normalizer)
    alphabet = _alphabet(frequency, vocab_size=wanted.vocab_size, num_fixed=fixed)
    _check_size(wanted.vocab_size, fixed + len(alphabet))
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    lone = f"{_SPACE}?[{_lone_characters()}]" + r"\p{M}*"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Split(Regex(lone), behavior="isolated")]
    )
    # More pieces than wanted are trained, because the trainer cuts ties at the end of the list at random; and it
    # refuses to leave out a character.
    size = max(wanted.vocab_size + wanted.vocab_size // 20, len(frequency)) + 8
    trainer = trainers.UnigramTrainer(
        vocab_size=size, unk_token="[UNK]", special_tokens=["[UNK]"], show_progress=learned.show_progress
    )
    backend.train_from_iterator(_batches(learned), trainer)
    vocabulary = _settled_vocabulary(backend, [_SPACE, *alphabet], wanted.vocab_size)
    names = list(_BERT_TOKENS.values())
    backend.model = models.Unigram(vocabulary, unk_id=names.index("[UNK]"), byte_fallback=False)
    backend.decoder = decoders.Metaspace(replacement=_SPACE)
    backend.post_processor = _template(*((name, names.index(name)) for name in ("[CLS]", "[SEP]")))
    return _opened(backend, wanted, _BERT_TOKENS, ["input_ids", "token_type_ids", "attention_mask"])


def _train_words(learned: _LearnedTexts, wanted: _Options) -> PreTrainedTokenizerFast:
    special = list(dict.fromkeys(_WORD_TOKENS.values()))
    _check_size(wanted.vocab_size, len(special) + 1)
    backend = Tokenizer(models.WordLevel(unk_token=_WORD_TOKENS["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=wanted.lowercase, strip_accents=wanted.strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=wanted.vocab_size,
        min_frequency=wanted.min_frequency,
        special_tokens=special,
        show_progress=learned.show_progress,
    )
    backend.train_from_iterator(_batches(learned), trainer)
    border = (_WORD_TOKENS["eos_token"], special.index(_WORD_TOKENS["eos_token"]))
    backend.post_processor = _template(border, border)
    return _opened(backend, wanted, _WORD_TOKENS, ["input_ids", "attention_mask"])


def _settled_vocabulary(backend: Tokenizer, alphabet: list[str], vocab_size: int) -> list[tuple[str, float]]:
    """Return special tokens and pieces with their scores, freed of the trainer's random order.

    The trainer gives characters that it had pruned the lowest score, each a step of 0.0001 above the last, in the
    order of a hash map; here they all have the lowest. Characters outside of the alphabet are dropped.
    """
    pieces = dict(json.loads(backend.to_str())["model"]["vocab"])
    del pieces["[UNK]"]
    lowest = min(pieces.values(), default=0.0)
    for step, piece in enumerate(sorted((p for p in pieces if len(p) == 1), key=pieces.__getitem__)):
        if abs(pieces[piece] - lowest - step * _PENALTY_STEP) > _PENALTY_STEP / 100:
            break
        pieces[piece] = lowest
    kept = set(alphabet)
    characters = {c: round(pieces.get(c, lowest), _DECIMALS) for c in alphabet}
    longer = [(round(score, _DECIMALS), p) for p, score in pieces.items() if len(p) > 1 and set(p) <= kept]
    longer.sort(key=lambda item: (-item[0], item[1]))
    num_longer = max(vocab_size - len(_BERT_TOKENS) - len(characters), 0)
    chosen = [*characters.items(), *((piece, score) for score, piece in longer[:num_longer])]
    chosen.sort(key=lambda item: (-item[1], item[0]))
    return [*((name, 0.0) for name in _BERT_TOKENS.values()), *chosen]


def _check_size(vocab_size: int, least: int) -> None:
    if least > vocab_size:
        raise InputError(
            f"vocab_size={vocab_size} is too small for the special tokens and the characters of the text: "
            f"use at least {least}, usually 8000 or more"
        )


def _batches(texts: Iterable[str | None]) -> Iterator[list[str]]:
    known = (encodable(text or "") for text in texts)
    while batch := list(itertools.islice(known, 256)):
        yield batch


def _character_counts(texts: Iterable[str | None], normalizer: Any, *, each_alone: bool = False) -> dict[str, int]:
    """Return how often each visible character occurs in the normalized texts.

    Args:
        texts: The texts.
        normalizer: Changes them.
        each_alone: Whether it writes each character the same whatever stands beside it, so that only distinct ones are written.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for batch in _batches(texts):
        text = "\n".join(batch)
        found = np.bincount(code_points(text if each_alone else normalizer.normalize_str(text)))
        counts[: len(found)] += found
    if each_alone:
        read, counts = counts, np.zeros_like(counts)
        for point in np.flatnonzero(read).tolist():
            for character in normalizer.normalize_str(chr(point)):
                counts[ord(character)] += read[point]
    return {chr(point): int(counts[point]) for point in np.flatnonzero(counts).tolist() if not chr(point).isspace()}


def _alphabet(frequency: dict[str, int], *, vocab_size: int, num_fixed: int) -> list[str]:
    """Return the characters that the vocabulary holds, the most frequent first.

    Raises:
        InputError: If the vocabulary has room for too few of them.
    """
    total = sum(frequency.values())
    ordered = sorted(frequency, key=lambda character: (-frequency[character], character))
    wanted = sum(frequency[character] >= _LEAST_SHARE * total for character in ordered)
    covered = np.cumsum([frequency[character] for character in ordered])
    needed = int(np.searchsorted(covered, _LEAST_COVERAGE * total)) + 1
    size = min(wanted, max(vocab_size - num_fixed, 0) // _QUARTER)
    if size < min(needed, len(ordered)):
        raise InputError(
            f"vocab_size={vocab_size} is too small for the {needed} most frequent characters of the text: "
            f"use at least {needed * _QUARTER + num_fixed}, usually 8000 or more"
        )
    return ordered[:size]


@cache
def _lone_characters() -> str:
    """Return the characters that are words of their own, as the inside of a regular expression's brackets."""
    ranges = "".join(f"{chr(low)}-{chr(high)}" for low, high in IDEOGRAPH_RANGES)
    return r"\p{P}" + "".join(f"\\{symbol}" for symbol in ASCII_SYMBOLS) + ranges


def frame_by_separators(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let a tokenizer put its separator where XLM does: ``</s> x </s>`` around a text, ``</s> x </s> y </s>`` around two.

    As XLM's, it has then the one token for ``cls_token``, ``sep_token`` and ``eos_token``. The former classification token
    is the ``bos_token``, as XLM's ``<s>`` that it never puts anywhere. Saved and opened again it is the same.

    Args:
        tokenizer: A tokenizer as `train_tokenizer` returns it, of any kind; changed in place.

    Source:
        `XLMTokenizer` of transformers, which is written in Python and gives no character offsets.
    """
    separator = tokenizer.sep_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    tokenizer.cls_token = tokenizer.eos_token = separator
    end = (separator, tokenizer.sep_token_id)
    tokenizer.backend_tokenizer.post_processor = _template(end, end)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give a tokenizer more special tokens, in this order; those that it has keep their ids."""
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, roles: Sequence[str] = ("mask", "pad")) -> None:
    """Raise InputError if a tokenizer has no vocabulary or lacks a special token.

    Args:
        tokenizer: Any tokenizer, whatever it puts around a sequence.
        roles: The tokens that are needed; masked language models need a mask and a pad token.
    """
    special = {*tokenizer.all_special_tokens, "▁"}
    special |= {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if all(token in special for token in tokenizer.get_vocab()):
        raise InputError(
            f"{name!r} holds no tokenizer: its vocabulary has special tokens only; name the model's with tokenizer_name, "
            "or save it there with tokenizer.save_pretrained"
        )
    for role in roles:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise InputError(
                f"tokenizer={name!r} has no {role}_token, which masked "
                f"language models need: add it with tokenizer.add_special_tokens({{'{role}_token': ...}}), "
                "or train one with --tokenizer_type"
            )
