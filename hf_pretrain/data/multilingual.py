"""From text in several languages and translations to a tokenizer and examples, each language in its share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.arguments import MultilingualDataArguments
from hf_pretrain.data.documents.documents import UnknownCount, tokenize_documents
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.tokenizers import frame_by_separators
from hf_pretrain.data.examples.bitext import BITEXT_FEATURES, BitextDataset, bitext_dataset, tokenize_bitext
from hf_pretrain.data.examples.epochs import EpochDataset, ExampleView, MixtureDataset, language_shares
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.prepare import PreparedData, common_description, file_names, prepare_data
from hf_pretrain.data.run_tokenizer import (
    RepeatableTexts,
    check_unknown,
    first_texts,
    run_tokenizer,
    shuffled_texts,
    word_segmenter,
)
from hf_pretrain.data.text.datasets import text_dataset, text_sizes
from hf_pretrain.data.text.docstrings import split_held_out
from hf_pretrain.errors import InputError

__all__ = ["LanguageDataset", "MultilingualDataArguments", "balanced_texts", "prepare_multilingual"]

_BATCH_ROWS = 256

# The text of each language, by its name, and of each pair of languages, "en-de", with the columns of a bitext.
_Corpus = dict[str, datasets.Dataset]
# The same tokenized: one dataset of a language, two of a pair.
_Documents = dict[str, tuple[datasets.Dataset, ...]]


class LanguageDataset(ExampleView):
    """The examples of another dataset, all of one language: ``langs`` has its number, int32, one entry a token.

    Args:
        dataset: Map-style, with ``input_ids``.
        language: Number of the language.
    """

    def __init__(self, dataset: Any, *, language: int) -> None:  # noqa: ANN401 (as EpochDataset)
        super().__init__(EpochDataset.wrap(dataset))
        self.language = language

    def view(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example with its language."""
        return {**example, "langs": np.full(len(example["input_ids"]), self.language, dtype=np.int32)}


def prepare_multilingual(
    args: MultilingualDataArguments,
    *,
    seed: int,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    first: AbstractContextManager[Any] | None = None,
    step_examples: int = 1,
    lang2id: Mapping[str, int] | None = None,
) -> PreparedData:
    """Prepare text of several languages; where no language is named, `prepare_data` does it.

    Of every language and every pair of languages, a part is held out. In training, each language and each pair has its
    share to the power of ``language_sampling_alpha``, translations and other text are divided by ``bitext_share``. What is
    held out is read once and as it is.

    Args:
        args: What to read, and how to cut and mix it.
        seed: Seed of the run, for the order of the examples; the held-out text depends on ``args.split_seed`` only.
        output_dir: Where a trained tokenizer is saved.
        tokenizer: Tokenizer to use; otherwise ``args.tokenizer_name``, otherwise one is trained on text in which each
            language has its share.
        first: Entered while files are written, see `prepare_data`.
        step_examples: Examples of a step over all devices and accumulation steps, for mixtures by step.
        lang2id: Numbers of the languages, those of a model to continue; by default they are counted in sorted order.

    Returns:
        A `MixtureDataset` of examples with ``langs``, those of translations also with ``position_ids`` and
        ``is_bitext``. The description has ``languages``, the documents have a column ``lang``.

    Raises:
        InputError: If a file can not be read, a language has too little text, or it is not among those of ``lang2id``.
    """
    if not args.is_multilingual:
        return prepare_data(args, seed=seed, output_dir=output_dir, tokenizer=tokenizer, first=first)
    languages = _numbered(args.languages(), lang2id)
    with nullcontext() if first is None else first:
        train, held_out = _read(args)
        tokenizer = _tokenizer(args, Path(output_dir), tokenizer, train)
        documents, unknown = _tokenized(args, train, tokenizer)
        for name, count in unknown.items():
            texts = partial(_texts_of, train[name])
            check_unknown(args, tokenizer, count, RepeatableTexts(texts), f"the text of {name} to train on")
        held_out_documents, held_out_unknown = _tokenized(args, held_out, tokenizer)
    examples = partial(_examples, args=args, tokenizer=tokenizer, languages=languages, seed=seed)
    parts, held_out_parts = examples(documents), examples(held_out_documents)
    shares = _shares(args, documents)
    group_size = step_examples if args.mixture_unit == "step" else 1
    lengths = {name: len(part) for name, part in held_out_parts.items()}
    return PreparedData(
        tokenizer,
        MixtureDataset({name: parts[name] for name in shares}, shares=shares, group_size=group_size, seed=seed),
        MixtureDataset(held_out_parts, shares=lengths, seed=seed) if held_out_parts else None,
        _description(args, tokenizer, shares, output_dir)
        | _unknown_shares("", unknown)
        | _unknown_shares("held_out_", held_out_unknown)
        | _sizes("", train, documents, parts)
        | _sizes("held_out_", held_out, held_out_documents, held_out_parts),
        args.block_size,
        train_documents=_joined(documents),
        eval_documents=_joined(held_out_documents),
        languages=languages,
    )


def _is_pair(name: str) -> bool:
    return "-" in name


def _pair(name: str) -> tuple[str, str]:
    first, second = name.split("-")
    return first, second


def _numbered(languages: Sequence[str], lang2id: Mapping[str, int] | None) -> dict[str, int]:
    """Return the number of each language."""
    if lang2id is None:
        return {language: number for number, language in enumerate(languages)}
    unknown = [language for language in languages if language not in lang2id]
    if unknown:
        raise InputError(
            f"language {unknown[0]!r} is none of the model's: {', '.join(lang2id)}; name it as the model does or leave it out"
        )
    return {language: lang2id[language] for language in languages}


def _read(args: MultilingualDataArguments) -> tuple[_Corpus, _Corpus]:
    """Return the text to train on and the text that is held out."""
    options = args.reading()
    corpus = {
        language: text_dataset(paths, language=language, **options)
        for language, paths in args.language_files().items()
    }
    for name, entries in args.parallel_files().items():
        bad = options["on_bad_text"]
        bitexts = [bitext_dataset(paths, languages=_pair(name), on_bad_text=bad) for paths in entries]
        corpus[name] = datasets.concatenate_datasets(bitexts)
    train, held_out = {}, {}
    for name, texts in corpus.items():
        try:
            rows, held_out_rows = split_held_out(len(texts), args.validation_fraction, seed=args.split_seed)
        except InputError as error:
            raise InputError(f"text of {name}: {error}") from None
        train[name] = texts.select(rows)
        if len(held_out_rows):
            held_out[name] = texts.select(held_out_rows)
    return train, held_out


def _by_language(corpus: _Corpus) -> dict[str, datasets.Dataset]:
    """Return all text of each language, with the one column ``text``."""
    found: dict[str, list[datasets.Dataset]] = {}
    for name, texts in sorted(corpus.items()):
        columns = dict(zip(_pair(name), BITEXT_FEATURES, strict=True)) if _is_pair(name) else {name: "text"}
        for language, column in columns.items():
            side = texts.select_columns([column])
            found.setdefault(language, []).append(side if column == "text" else side.rename_column(column, "text"))
    return {language: datasets.concatenate_datasets(sides) for language, sides in found.items()}


def _tokenizer(
    args: MultilingualDataArguments, output_dir: Path, tokenizer: PreTrainedTokenizerBase | None, corpus: _Corpus
) -> PreTrainedTokenizerBase:
    texts, alpha = _by_language(corpus), args.language_sampling_alpha
    sample = RepeatableTexts(partial(balanced_texts, texts, alpha=alpha, seed=args.split_seed))
    key = [[part._fingerprint for part in texts.values()], alpha, args.tokenizer_frame]
    finish = frame_by_separators if args.tokenizer_frame == "xlm" else None
    return run_tokenizer(args, output_dir, tokenizer, sample, key, finish)


def balanced_texts(texts: Mapping[str, datasets.Dataset], *, alpha: float, seed: int) -> Iterator[str]:
    """Yield documents such that each language has its share of the characters, as many as a tokenizer needs.

    At most, there are as many characters as in all texts. A language whose share is greater than its text is read
    again; of one whose share is less, the rest is left out.

    Args:
        texts: Datasets with a column ``text``, by language.
        alpha: See `language_shares`.
        seed: Key of the order.
    """
    sizes = {language: int(text_sizes(part)[1].sum()) for language, part in texts.items()}
    shares = language_shares(sizes, alpha=alpha)
    sources = {language: _again_and_again(part, seed=seed) for language, part in texts.items()}
    given, room = dict.fromkeys(texts, 0), sum(sizes.values())

    def mixed() -> Iterator[str]:
        nonlocal room
        while room > 0:
            language = min(given, key=lambda name: given[name] / shares[name])
            text = next(sources[language])
            given[language] += len(text)
            room -= len(text)
            yield text

    return first_texts(mixed())


def _again_and_again(texts: datasets.Dataset, *, seed: int) -> Iterator[str]:
    for epoch in itertools.count():
        yield from filter(None, shuffled_texts(texts, seed=seed, epoch=epoch))


def _tokenized(
    args: MultilingualDataArguments, corpus: _Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[_Documents, dict[str, UnknownCount]]:
    """Return the documents of each part, and the count of its unknown characters."""
    unknown = {name: UnknownCount() for name in corpus}
    options: dict[str, Any] = {"num_proc": args.preprocessing_num_workers, "word_segmenter": word_segmenter(args)}
    documents = {
        name: tokenize_bitext(texts, tokenizer, languages=_pair(name), unknown=unknown[name], **options)
        if _is_pair(name)
        else (tokenize_documents(texts, tokenizer, unknown=unknown[name], **options),)
        for name, texts in corpus.items()
    }
    return documents, unknown


def _texts_of(texts: datasets.Dataset) -> Iterator[str]:
    """Yield the texts of a language, or of both sides of a pair."""
    for batch in texts.iter(_BATCH_ROWS):
        for name in ("text", *BITEXT_FEATURES):
            yield from (text or "" for text in batch.get(name, []))


def _unknown_shares(prefix: str, unknown: Mapping[str, UnknownCount]) -> dict[str, Any]:
    """Return the unknown share of all characters, and those of the parts."""
    if not unknown:
        return {}
    total = sum(count.weight for count in unknown.values())
    return {
        f"{prefix}unknown_share": sum(count.unknown_weight for count in unknown.values()) / max(total, 1),
        f"{prefix}unknown_shares": {name: count.share for name, count in unknown.items()},
    }


def _examples(
    documents: _Documents,
    *,
    args: MultilingualDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    languages: Mapping[str, int],
    seed: int,
) -> dict[str, EpochDataset]:
    """Return the examples of each language and of each pair."""
    common: dict[str, Any] = {"tokenizer": tokenizer, "block_size": args.block_size}
    parts: dict[str, EpochDataset] = {}
    for name, sides in documents.items():
        if _is_pair(name):
            (first, second), (one, other) = sides, _pair(name)
            numbers = (languages[one], languages[other])
            parts[name] = BitextDataset(first, second, languages=numbers, frame=args.bitext_frame, seed=seed, **common)
        else:
            blocks = BlockDataset(sides[0], mode=args.block_mode, **common)
            parts[name] = LanguageDataset(blocks, language=languages[name])
    return parts


def _shares(args: MultilingualDataArguments, documents: _Documents) -> dict[str, float]:
    """Return how often examples of each part are drawn: languages by tokens, pairs by sentences; none that never is."""
    texts = {name: TokenStore(sides[0]).num_tokens for name, sides in documents.items() if not _is_pair(name)}
    pairs = {name: len(sides[0]) for name, sides in documents.items() if _is_pair(name)}
    weights = (1 - args.bitext_share, args.bitext_share) if texts and pairs else (1.0, 1.0)
    return {
        name: weight * share
        for counts, weight in zip((texts, pairs), weights, strict=True)
        if weight
        for name, share in language_shares(counts, alpha=args.language_sampling_alpha).items()
    }


def _description(
    args: MultilingualDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    shares: Mapping[str, float],
    output_dir: str | Path,
) -> dict[str, Any]:
    sources = [f"{language}: {file_names(paths)}" for language, paths in args.language_files().items()]
    for name, entries in args.parallel_files().items():
        sources.append(f"{name}: {', '.join(Path(path).name for paths in entries for path in paths)}")
    held_out = (
        f"{args.validation_fraction:.3g} of the documents and translations" if args.validation_fraction else None
    )
    return common_description(args, tokenizer, "; ".join(sources), held_out, output_dir) | {
        "languages": args.languages(),
        "sampling_shares": {name: round(share, 4) for name, share in shares.items()},
    }


def _sizes(prefix: str, corpus: _Corpus, documents: _Documents, parts: Mapping[str, EpochDataset]) -> dict[str, int]:
    """Return how much text there is; nothing where there is none."""
    texts = [text_sizes(part) for part in _by_language(corpus).values()]
    sizes = {
        "documents": sum(len(sides[0]) for name, sides in documents.items() if not _is_pair(name)),
        "tokens": sum(TokenStore(side).num_tokens for sides in documents.values() for side in sides),
        "blocks": sum(len(part) for name, part in parts.items() if not _is_pair(name)),
        "translations": sum(len(part) for name, part in parts.items() if _is_pair(name)),
        "bytes": sum(int(num_bytes.sum()) for num_bytes, _ in texts),
        "characters": sum(int(num_characters.sum()) for _, num_characters in texts),
    }
    return {f"{prefix}{name}": size for name, size in sizes.items() if size}


def _joined(documents: _Documents) -> datasets.Dataset | None:
    """Return the documents of all languages, with their names in the column ``lang``, without translations."""
    texts = [sides[0] for name, sides in documents.items() if not _is_pair(name)]
    return datasets.concatenate_datasets(texts) if texts else None
