"""Training a tokenizer whose tokens never reach over two words, and checking one that is given.

All kinds split the text as `hf_pretrain.data.words` does before they look for sub-words, so that a model's vocabulary
does not decide what whole-word masking calls a word. Training twice on the same texts gives the same vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, get_args

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

from hf_pretrain.data.words import ASCII_SYMBOLS, IDEOGRAPH_RANGES
from hf_pretrain.errors import InputError

TokenizerKind = Literal["wordpiece", "bpe", "unigram"]

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
_NUM_BYTES = 256
_SPACE = "▁"
# The alphabet holds the characters that are at least this share of the text, the most frequent ones if they are more
# than a quarter of the vocabulary. Where it covers less of the text than that, too much would be unknown.
_LEAST_SHARE, _LEAST_COVERAGE = 1e-6, 0.995
_QUARTER = 4
# Scores are rounded to this, far above the noise of summing in another order, far below what changes a tokenization.
_DECIMALS = 6
_PENALTY_STEP = 1e-4


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: TokenizerKind = "wordpiece",
    vocab_size: int = 30522,
    lowercase: bool = True,
    model_max_length: int = 512,
    min_frequency: int = 2,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with the special tokens and the post-processor of a masked language model.

    Args:
        texts: Texts to learn from; read twice for WordPiece and Unigram, and kept in memory if they can not be.
        kind: ``"wordpiece"`` (BERT's, opens as `BertTokenizer`), ``"bpe"`` (RoBERTa's, on bytes: it loses nothing) or
            ``"unigram"`` (SentencePiece's, with NFKC); the last two are `PreTrainedTokenizerFast`.
        vocab_size: Most tokens in the vocabulary, special tokens included; less come out of a small corpus.
        lowercase: Lower the case; WordPiece also strips accents then, as BERT does.
        model_max_length: Longest sequence of the model, in tokens.
        min_frequency: Least number of times that a merged pair occurs; Unigram has no such limit.

    Returns:
        The tokenizer.

    Raises:
        InputError: If the kind is unknown, there is no text, or the vocabulary is too small for the alphabet.

    Source:
        Schuster and Nakajima (2012) as in BERT; Sennrich et al. (2016) as in GPT-2 and RoBERTa; Kudo (2018).
    """
    if kind not in get_args(TokenizerKind):
        raise InputError(f"tokenizer_type={kind!r} is unknown; choose one of {', '.join(get_args(TokenizerKind))}")
    if iter(texts) is texts:
        texts = list(texts)
    if not any(text.strip() for text in texts):
        raise InputError("texts hold no text to train a tokenizer on; check the files")
    options: dict[str, Any] = {"vocab_size": vocab_size, "lowercase": lowercase, "model_max_length": model_max_length}
    if kind == "wordpiece":
        return _train_wordpiece(texts, min_frequency=min_frequency, **options)
    if kind == "bpe":
        return _train_bpe(texts, min_frequency=min_frequency, **options)
    return _train_unigram(texts, **options)


def _train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, model_max_length: int, min_frequency: int
) -> BertTokenizer:
    # The stock class builds the whole pipeline, and AutoTokenizer finds it again under its own name.
    options: dict[str, Any] = {"do_lower_case": lowercase, "model_max_length": model_max_length, **_BERT_TOKENS}
    pipeline = BertTokenizer(**options).backend_tokenizer
    fixed = len(_BERT_TOKENS)
    frequency = _character_counts(texts, pipeline.normalizer)
    alphabet = _alphabet(frequency, vocab_size=vocab_size, num_fixed=fixed)
    # The trainer numbers continuation characters in the random order of a hash map, and numbers decide between pairs
    # that are equally frequent. Named as special tokens they have their numbers beforehand.
    continued = [f"##{character}" for character in alphabet if _joins_words(character, pipeline)]
    if fixed + len(alphabet) + len(continued) > vocab_size:
        raise _too_small(vocab_size, fixed + len(alphabet) + len(continued))
    backend = Tokenizer(models.WordPiece(unk_token=_BERT_TOKENS["unk_token"]))
    backend.normalizer, backend.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*_BERT_TOKENS.values(), *alphabet, *continued],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(_batches(texts), trainer)
    return BertTokenizer(vocab=backend.get_vocab(), **options)


def _joins_words(character: str, pipeline: Tokenizer) -> bool:
    """Return whether a pipeline takes a letter and the character after it for one word."""
    return len(pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str("a" + character))) == 1


def _train_bpe(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, model_max_length: int, min_frequency: int
) -> PreTrainedTokenizerFast:
    if vocab_size < len(_ROBERTA_TOKENS) + _NUM_BYTES:
        raise _too_small(vocab_size, len(_ROBERTA_TOKENS) + _NUM_BYTES)
    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    # As GPT-2's expression, but that a word is what this library calls a word; a space stays with what follows it.
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
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*names[:-1], mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_batches(texts), trainer)
    sep, cls = ((name, names.index(name)) for name in ("</s>", "<s>"))
    backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **(_ROBERTA_TOKENS | {"bos_token": "<s>", "eos_token": "</s>", "mask_token": mask}),
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _train_unigram(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, model_max_length: int
) -> PreTrainedTokenizerFast:
    fixed = len(_BERT_TOKENS) + len(_SPACE)
    one_space = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), *one_space, *[normalizers.Lowercase()] * lowercase]
    )
    frequency = _character_counts(texts, normalizer)
    alphabet = _alphabet(frequency, vocab_size=vocab_size, num_fixed=fixed)
    if fixed + len(alphabet) > vocab_size:
        raise _too_small(vocab_size, fixed + len(alphabet))
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    lone = f"{_SPACE}?[{_lone_characters()}]" + r"\p{M}*"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Split(Regex(lone), behavior="isolated")]
    )
    # More pieces than wanted are trained, because the trainer cuts ties at the end of the list at random; and it
    # refuses to leave out a character.
    size = max(vocab_size + vocab_size // 20, len(frequency)) + 8
    trainer = trainers.UnigramTrainer(
        vocab_size=size, unk_token="[UNK]", special_tokens=["[UNK]"], show_progress=False
    )
    backend.train_from_iterator(_batches(texts), trainer)
    vocabulary = _settled_vocabulary(backend, [_SPACE, *alphabet], vocab_size)
    names = list(_BERT_TOKENS.values())
    backend.model = models.Unigram(vocabulary, unk_id=names.index("[UNK]"), byte_fallback=False)
    backend.decoder = decoders.Metaspace(replacement=_SPACE)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, names.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **_BERT_TOKENS,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


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


def _too_small(vocab_size: int, least: int) -> InputError:
    return InputError(
        f"vocab_size={vocab_size} is too small for the special tokens and the characters of the text: "
        f"use at least {least}, usually 8000 or more"
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, 256)):
        yield batch


def _character_counts(texts: Iterable[str], normalizer: Any) -> dict[str, int]:
    """Return how often each visible character occurs in the normalized texts."""
    counts = np.zeros(0x110000, dtype=np.int64)
    for batch in _batches(texts):
        text = normalizer.normalize_str("\n".join(batch))
        found, times = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_counts=True)
        counts[found] += times
    return {chr(point): int(counts[point]) for point in np.flatnonzero(counts).tolist() if not chr(point).isspace()}


def _alphabet(frequency: dict[str, int], *, vocab_size: int, num_fixed: int) -> list[str]:
    """Return the characters that deserve a place, most frequent first.

    Raises:
        InputError: If those that have room are too few for the text.
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
    """Return what stands inside the brackets of a regular expression for characters that are words of their own."""
    ranges = "".join(f"{chr(low)}-{chr(high)}" for low, high in IDEOGRAPH_RANGES)
    return r"\p{P}" + "".join(f"\\{symbol}" for symbol in ASCII_SYMBOLS) + ranges


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, roles: Sequence[str] = ("mask", "pad")) -> None:
    """Raise InputError if a tokenizer lacks a special token that is needed.

    Args:
        tokenizer: Any tokenizer; what stands around a sequence is its own affair.
        roles: The tokens that are needed; masked language models need a mask and a pad token.
    """
    for role in roles:
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise InputError(
                f"tokenizer={tokenizer.name_or_path or type(tokenizer).__name__!r} has no {role}_token, which masked "
                f"language models need: add it with tokenizer.add_special_tokens({{'{role}_token': ...}}), "
                "or train one with --tokenizer_type"
            )
