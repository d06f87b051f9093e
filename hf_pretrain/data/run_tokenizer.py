"""The tokenizer of a run: one that is given or named, or is trained on the text; and how much of the text it knows."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tokenizers import decoders
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.documents import UnknownCount, check_offsets, tokenize_texts
from hf_pretrain.data.documents.tokenizers import (
    TokenizerChoice,
    add_special_tokens,
    check_tokenizer,
    choose_tokenizer,
    train_tokenizer,
)
from hf_pretrain.data.documents.words import NamedSegmenter, Segmenter, clipped, encodable
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import read_object

# Enough text for a vocabulary; more only takes longer.
_TOKENIZER_CHARACTERS = 1 << 28
# Names the training text of the tokenizer in output_dir. The underscore keeps the file from being pushed to the Hub.
_TOKENIZER_RECORD = "_tokenizer_training.json"
# Of a stream, so many characters are looked at before training.
_STREAM_CHARACTERS = 1 << 20
_BATCH_TEXTS = 256
# A share of unknown characters that is worth a warning, and how many of them are shown.
_NOTABLE_SHARE, _SHOWN = 0.01, 5
_SHOWN_TOKENS = 16

logger = logging.get_logger(__name__)


class RepeatableTexts:
    """Texts that are read anew each time they are iterated over."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        progress = tqdm(self._read(), desc="Reading text for the tokenizer", unit=" documents", delay=2, disable=None)
        return iter(progress)


def shuffled_texts(texts: datasets.Dataset, *, seed: int, epoch: int = 0) -> Iterator[str]:
    """Return the texts of a dataset in a keyed random order, to train a tokenizer on."""
    order = draws.permutation(len(texts), seed=seed, epoch=epoch, stream="tokenizer sample")
    texts = texts.with_format(None)
    # A selection of all rows would take 100 bytes a row for a while, though the first are enough most times.
    batches = (texts[order[low : low + _BATCH_TEXTS]] for low in range(0, len(order), _BATCH_TEXTS))
    return (text or "" for batch in batches for text in batch["text"])


def first_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first texts, as many as a tokenizer needs."""
    room = _TOKENIZER_CHARACTERS
    for text in texts:
        yield text
        room -= len(text)
        if room <= 0:
            return


def run_tokenizer(
    args: DataArguments,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Iterable[str],
    texts_key: Any,
    finish: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was given or named, or train one; a trained one is used as it is read from disk.

    Args:
        args: Which tokenizer is wanted.
        output_dir: Where one that is trained is saved, and found again if texts and options are the same.
        tokenizer: One that is given.
        texts: What to train on.
        texts_key: Whatever decides the texts, and what `finish` does; written as JSON.
        finish: Called with a new tokenizer before it is saved.

    Raises:
        InputError: If it can not be loaded or trained, or gives no offsets.
    """
    if tokenizer is None and args.tokenizer_name is not None:
        tokenizer = load_tokenizer(args.tokenizer_name)
        check_tokenizer(tokenizer, roles=())
    if tokenizer is not None:
        check_offsets(tokenizer)
        return tokenizer
    options: dict[str, Any] = {
        "kind": args.tokenizer_type,
        "vocab_size": args.vocab_size,
        "lowercase": args.lowercase,
        "strip_accents": args.strip_accents,
        "model_max_length": args.block_size,
    }
    wanted = json.loads(json.dumps(options | {"texts": texts_key}))
    if read_record(output_dir).get("wanted") != wanted:
        choice = _choice(args, texts)
        trained = train_tokenizer(texts, **(options | {"kind": choice.kind, "lowercase": choice.lowercase}))
        if finish is not None:
            finish(trained)
        # An old record beside a new tokenizer would tell of another text, should the run be cut off here.
        record = output_dir / _TOKENIZER_RECORD
        record.unlink(missing_ok=True)
        trained.save_pretrained(output_dir)
        record.write_text(json.dumps({"wanted": wanted, "choice": choice._asdict()}), encoding="utf-8")
    choice = TokenizerChoice(**read_record(output_dir)["choice"])
    say(f"tokenizer: {choice.kind}, {'lower case' if choice.lowercase else 'case kept'}: {choice.reason}")
    return load_tokenizer(str(output_dir))


def adding(texts_key: Any, tokens: Sequence[str]) -> tuple[Any, Callable[[PreTrainedTokenizerBase], None] | None]:
    """Return the last arguments of `run_tokenizer` for a tokenizer that gets special tokens beside its vocabulary."""
    return ([texts_key, list(tokens)], partial(add_special_tokens, tokens=tokens)) if tokens else (texts_key, None)


def _choice(args: DataArguments, texts: Iterable[str]) -> TokenizerChoice:
    """Return which tokenizer to train: as the options say, and for the rest as it suits the text."""
    if args.tokenizer_type != "auto" and args.lowercase is not None:
        return TokenizerChoice(args.tokenizer_type, args.lowercase, "as the options say")
    kind, lowercase, reason = choose_tokenizer(texts)
    if args.tokenizer_type != "auto":
        kind, reason = args.tokenizer_type, f"as tokenizer_type says; {reason}"
    if args.lowercase is not None:
        lowercase, reason = args.lowercase, f"{reason}; the case as lowercase says"
    return TokenizerChoice(kind, lowercase, reason)


def read_record(output_dir: Path) -> dict[str, Any]:
    """Return the record of the tokenizer that was trained into a folder; empty if there is none."""
    record = read_object(output_dir / _TOKENIZER_RECORD)
    return record if "choice" in record else {}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the Hub or of a folder.

    Raises:
        InputError: If it can not be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer_name={name!r} can not be loaded: {one_line(error, line=0)}") from error


def word_segmenter(args: DataArguments) -> Segmenter | None:
    """Return what finds words in text without spaces, None where the options name none."""
    return None if args.word_segmenter is None else NamedSegmenter(args.word_segmenter)


def say(line: str) -> None:
    """Print a line, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def check_unknown(
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    unknown: UnknownCount,
    texts: Iterable[str],
    where: str = "the text to train on",
) -> None:
    """Show how much of the text the tokenizer does not know, and refuse text of which it knows too little.

    Args:
        args: Options with ``max_unknown_share``.
        tokenizer: The tokenizer.
        unknown: The counts of the text.
        texts: The texts, of which the first is shown in tokens, and the first that are unknown in parts.
        where: Which text it is.

    Raises:
        InputError: If the share of unknown characters is greater than ``args.max_unknown_share``.
    """
    share = f"{unknown.share:.2%} of the characters"
    say(f"unknown tokens: {unknown.unknown_tokens:,} of {unknown.tokens:,} in {where}, for {share}")
    first = next((text for text in texts if text and text.strip()), "")
    say(f"a text in tokens: {' '.join(_first_tokens(first, tokenizer))}")
    if unknown.share <= _NOTABLE_SHARE:
        return
    shown = ", ".join(repr(part) for part in _unknown_parts(texts, tokenizer))
    what = f"{share} of {where} are unknown to the tokenizer ({shown})"
    cure = "name a tokenizer that knows them with --tokenizer_name, or train one with --tokenizer_type bpe or unigram"
    if unknown.share > args.max_unknown_share:
        limit = f"max_unknown_share={args.max_unknown_share:g}"
        raise InputError(f"{what}, more than {limit}: {cure}; or allow it with a greater --max_unknown_share")
    logger.warning(f"{what}: {cure}")


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the first tokens of a text, those of bytes as the characters that they are."""
    encoding = tokenizer(encodable(text[:1000]), add_special_tokens=False, verbose=False)
    tokens: list[str] = tokenizer.convert_ids_to_tokens(encoding["input_ids"][:_SHOWN_TOKENS])
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return tokens
    return [tokenizer.convert_tokens_to_string([token]).replace(" ", "Ġ") for token in tokens]


def _unknown_parts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the beginnings of the first different parts of the texts that are unknown."""
    found: dict[str, None] = {}
    for text in itertools.islice(texts, 1000):
        text = encodable((text or "")[:10_000])
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id and stop > start:
                found[text[start : min(stop, start + 20)]] = None
        if len(found) >= _SHOWN:
            break
    return list(found)[:_SHOWN]


def count_unknown(texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> UnknownCount:
    """Count the unknown characters in the first million characters of texts."""
    unknown, parts = UnknownCount(), clipped(texts, _STREAM_CHARACTERS)
    while batch := list(itertools.islice(parts, _BATCH_TEXTS)):
        tokenize_texts(batch, tokenizer, unknown=unknown)
    return unknown


class StreamTokenizing:
    """Tokenizes the texts of a stream and counts unknown characters; warns once in each process if there are too many.

    Args:
        args: Options with ``max_unknown_share`` and ``word_segmenter``.
        tokenizer: The tokenizer.
    """

    def __init__(self, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenize = partial(tokenize_texts, tokenizer=tokenizer, word_segmenter=word_segmenter(args))
        self._max_share = args.max_unknown_share
        self.unknown = UnknownCount()
        self._has_warned = False

    def __call__(self, texts: Sequence[str]) -> dict[str, list[Any]]:
        """Return the columns of the texts, as `tokenize_texts` does."""
        columns = self._tokenize(texts, unknown=self.unknown)
        is_much = self.unknown.share > self._max_share and self.unknown.characters >= _STREAM_CHARACTERS
        if is_much and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{self.unknown.share:.1%} of the {self.unknown.characters:,} characters that were read so far are unknown "
                f"to the tokenizer, more than max_unknown_share={self._max_share:g}: the stream is unlike its beginning"
            )
        return columns
