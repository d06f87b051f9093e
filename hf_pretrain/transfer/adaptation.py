"""New words of a domain for a model and its tokenizer, before the model is trained further on the domain's text.

`choose_words` finds words that the tokenizer cuts into many pieces, `add_words` gives each a token and rows in the model's
tables, and `extend_checkpoint` does both for a checkpoint. `exchange_tokenizer` trains another tokenizer on the text and moves
the model to it. [`hf-pretrain adapt`](hf_pretrain/commands/adapt.py) calls them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import sparse
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.documents.words import letter_words
from hf_pretrain.data.text.lines import readable
from hf_pretrain.errors import InputError, check_range
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.modeling.loading import from_pretrained, say_once
from hf_pretrain.modeling.surgery.vocabulary import trim_model, vocabulary_tables
from hf_pretrain.objectives.replaced_token_detection.building import load_pair
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.counts import Window, count_cooccurrences, latent_vectors, pmi_matrix
from hf_pretrain.vectors.folder import WordVectors
from hf_pretrain.vectors.transfer import shares_of_new_words, transfer_vocabulary

LEAST_COUNT = 5
"""How often a word occurs at least to be chosen; of rarer ones a row learns little. The number is ours."""

_MARKS = ("ByteLevel", "Metaspace")
_BATCH = 1000
_DIMENSIONS, _FEW_WORDS = 100, 400
# Share of the words near it in the row of a new word with a vector; the rest is that of its pieces. The number is ours: rows of
# 300 words that were withheld from all-MiniLM-L6-v2 come back with a mean cosine of 0.397, with 0.3 of 0.373, with 0.7 of 0.393;
# with 0, the pieces alone, of 0.330, and with 1 of 0.301. The vectors were those of 8 MB of docstrings; GloVe's gave less.
_NEAR = 0.5


class NewWord(NamedTuple):
    """A word that gets a token.

    Attributes:
        text: The word, as the tokenizer's normalizer leaves it.
        times: How often it occurs in the text; 0 if that was not counted.
        pieces: Tokens that the tokenizer cuts it into in the middle of a text.
    """

    text: str
    times: int
    pieces: int

    @property
    def saved(self) -> int:
        """Tokens that the text has less with the word as one."""
        return self.times * (self.pieces - 1)


def choose_words(
    texts: Iterable[str | None],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    least_count: int = LEAST_COUNT,
) -> list[NewWord]:
    """Return the words that save most tokens of a text if each becomes one token.

    Words are of letters. Each saves its count times the pieces that fall away. Equal ones are in the order of the alphabet, so
    the same text gives the same words.

    Args:
        texts: The text to train on; None is no text.
        tokenizer: The tokenizer, which is not changed.
        count: Most words.
        least_count: How often a word occurs at least.

    Returns:
        The words, those that save most first; fewer than `count` if the text has no more.

    Raises:
        InputError: If `count` is not positive, or no word of the text is cut.
    """
    check_range(count, "[1, 1048576]", name="count")
    found: Counter[str] = Counter()
    for text in texts:
        if text:
            found.update(text[begin:end] for begin, end in letter_words(text))
    counts: Counter[str] = Counter()
    for word, times in found.items():
        counts[normalized(word, tokenizer)] += times
    kept = [word for word, times in counts.items() if times >= least_count and word]
    pieces = dict(zip(kept, _pieces(kept, tokenizer), strict=True))
    chosen = [NewWord(word, counts[word], len(ids)) for word, ids in pieces.items() if len(ids) > 1]
    if not chosen:
        raise InputError(
            f"new_words='auto:{count}': the tokenizer cuts no word that occurs {least_count} times in the text: leave it out"
        )
    return sorted(chosen, key=lambda word: (-word.saved, word.text))[:count]


def read_words(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[NewWord]:
    """Return the words of a file, one a line, that are no token yet.

    Raises:
        InputError: If a line holds two words, or no word is new.
    """
    with readable(path):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    wrong = next((line for line in lines if len(line.split()) > 1), None)
    if wrong is not None:
        raise InputError(f"new_words={str(path)!r} has the line {wrong!r}: write one word a line")
    words = list(dict.fromkeys(word for word in (normalized(line, tokenizer) for line in lines) if word))
    cut = zip(words, _pieces(words, tokenizer), strict=True)
    found = [NewWord(word, 0, len(ids)) for word, ids in cut if len(ids) > 1 or _is_unknown(ids, tokenizer)]
    if not found:
        raise InputError(f"new_words={str(path)!r}: each of its {len(words)} words is one token already: leave it out")
    return found


def _is_unknown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    return list(ids) in ([], [tokenizer.unk_token_id])


def normalized(word: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a word as the tokenizer's normalizer leaves it, such as in lower case."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return word if normalizer is None else str(normalizer.normalize_str(word)).strip("▁ ")


def _pieces(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each word in the middle of a text, without a token that is a space alone."""
    backend = tokenizer.backend_tokenizer
    spaces = {backend.token_to_id(mark) for mark in ("▁", "Ġ")}
    found = backend.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    return [_without_space(encoding.ids, spaces) for encoding in found]


def _without_space(ids: list[int], spaces: set[int | None]) -> list[int]:
    return ids[1:] if len(ids) > 1 and ids[0] in spaces else ids


def extended_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer to which words were added, each found where no letter, digit or underscore is beside it.

    A tokenizer that marks spaces (byte-level BPE, SentencePiece) takes the white space before such a word into its token, as
    those of RoBERTa and XLM-R do with their mask token.

    Args:
        tokenizer: The tokenizer; not changed.
        words: The words, as its normalizer leaves them.
    """
    extended = copy.deepcopy(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    marks_spaces = any(f'"{mark}"' in json.dumps(state["pre_tokenizer"]) for mark in _MARKS)
    tokens = [AddedToken(word, single_word=True, lstrip=marks_spaces, normalized=True) for word in words]
    extended.add_tokens(tokens)
    return extended


@torch.no_grad()
def add_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str],
    *,
    vectors: WordVectors | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model and its tokenizer with a token for each word.

    The row of a word is the mean of the rows of its pieces, in each table over the vocabulary, and so is its output bias. With
    `vectors` that is one half; the other is a mean of the rows of whole words that the model knows: those near to the new one in
    the vectors, weighted by the sparsemax of their cosines. A word without a vector has the mean of its pieces
    alone. All other tokens keep their ids and rows. Other text is cut as before.

    Args:
        model: A stock model, with or without an output layer; not changed.
        tokenizer: Its tokenizer; not changed.
        words: Words that are no tokens yet, as its normalizer leaves them.
        vectors: Vectors of words, of any width.

    Returns:
        The model, in the same dtype, on the same device and in the same mode; and the tokenizer.

    Raises:
        InputError: If a word is a token already, or `vectors` has none of the new words or none of the known ones.

    Source:
        The weights are those of Dobler and de Melo, "FOCUS: Effective Embedding Initialization for Monolingual Specialization of
        Multilingual Models", EMNLP 2023, section 3.
    """
    extended, known = extended_tokenizer(tokenizer, words), tokenizer.get_vocab()
    ids = extended.get_vocab()
    numbers = [ids[word] for word in words]
    first = max(known.values(), default=-1) + 1
    if sorted(numbers) != list(range(first, first + len(words))):
        old = next((word for word in words if word in known), words[0])
        raise InputError(f"words: {old!r} is a token already: leave it out")
    old_rows = int(model.config.vocab_size)
    shares = _shares(tokenizer, extended, words, vectors, num_old=old_rows)
    # Rows to be overwritten come from a token that no configured id points at.
    configured = {value for name, value in model.config.to_dict().items() if name.endswith("_token_id")}
    filler = next(number for number in range(old_rows - 1, -1, -1) if number not in configured)
    kept = torch.cat([torch.arange(old_rows), torch.full((max(0, max(numbers) + 1 - old_rows),), filler)])
    larger = trim_model(model, kept)
    old_state, state, written = model.state_dict(), larger.state_dict(), set[int]()
    for name, axis in vocabulary_tables(model).items():
        table, old = state[name].movedim(axis, 0), old_state[name].movedim(axis, 0)
        if table.data_ptr() in written:  # tied to one before
            continue
        written.add(table.data_ptr())
        rows = torch.from_numpy(shares @ old.flatten(1 if old.ndim > 1 else 0).float().cpu().numpy())
        table[numbers] = rows.reshape(len(numbers), *table.shape[1:]).to(table.device, table.dtype)
    return larger, extended


def _shares(
    tokenizer: PreTrainedTokenizerBase,
    extended: PreTrainedTokenizerBase,
    words: Sequence[str],
    vectors: WordVectors | None,
    *,
    num_old: int,
) -> sparse.csr_matrix:
    """Return the shares of old tokens in each new word, ``[N, V_old]``, and say how many come from vectors."""
    shares = sparse.lil_matrix((len(words), num_old))
    for number, parts in enumerate(_pieces(words, tokenizer)):
        parts = parts or [int(tokenizer.unk_token_id)]
        for part in parts:
            shares[number, part] += 1 / len(parts)
    if vectors is not None:
        found, near = shares_of_new_words(extended, words, vectors, num_old=num_old)
        shares[found] = _NEAR * near + (1 - _NEAR) * shares[found]
        say_once(
            f"{len(found)} of {len(words)} new words begin near known words with such vectors, "
            f"{len(words) - len(found)} as the mean of their pieces"
        )
    return shares.tocsr()


# Checkpoints


def extend_checkpoint(
    name: str,
    auto_class: Any,
    words: Sequence[str],
    output_dir: str | Path,
    *,
    vectors: WordVectors | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Write a checkpoint with new words into a folder; of a pair of replaced token detection both models.

    Args:
        name: Folder or repository of the checkpoint.
        auto_class: The Auto class that opens it; None for a pair.
        words: The words; see [`add_words`].
        output_dir: Folder to write to.
        vectors: Vectors of words, from which the new rows are made.

    Returns:
        The tokenizer as it was, and as it is now.

    Raises:
        InputError: If the checkpoint cannot be opened.
    """
    tokenizer = from_pretrained(AutoTokenizer, name)

    def extend(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return add_words(model, tokenizer, words, vectors=vectors)

    return tokenizer, _rewrite(name, auto_class, extend, Path(output_dir))


def _rewrite(
    name: str,
    auto_class: Any,
    change: Callable[[PreTrainedModel], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    folder: Path,
) -> PreTrainedTokenizerBase:
    """Write the models of a checkpoint anew, each changed; what else `pretraining` holds is copied."""
    models: dict[str, PreTrainedModel]
    if auto_class is None:
        pair = load_pair(name, None)
        if pair.parts and not Path(name).is_dir():
            raise InputError(
                f"new_words: {name!r} has a head of its own beside its models: train it with hf-pretrain rtd first, and name the "
                "folder of that run"
            )
        models = {"": pair.discriminator} | ({} if pair.generator is None else {GENERATOR_FOLDER: pair.generator})
    else:
        models = {"": from_pretrained(auto_class, name)}
    others = Path(name, "pretraining")
    if others.is_dir():
        shutil.copytree(others, folder / "pretraining", ignore=shutil.ignore_patterns(Path(GENERATOR_FOLDER).name))
    for part, model in models.items():
        changed, tokenizer = change(model)
        changed.save_pretrained(folder / part)
    tokenizer.save_pretrained(folder)
    return tokenizer


def exchange_tokenizer(
    name: str,
    auto_class: Any,
    texts: Callable[[], Iterable[str | None]],
    output_dir: str | Path,
    *,
    kind: Any,
    vocab_size: int,
    lowercase: bool,
    model_max_length: int,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Train a tokenizer on texts, and write a checkpoint whose models read its tokens.

    The rows of new tokens are means of shared ones that stand near them in vectors of the text; see
    [`transfer_vocabulary`].

    Args:
        name: Folder or repository of the checkpoint.
        auto_class: The Auto class that opens it; None for a pair.
        texts: Returns the texts to train on.
        output_dir: Folder to write to.
        kind: "wordpiece", "bpe" or "unigram".
        vocab_size: Most tokens.
        lowercase: Whether to lower the case.
        model_max_length: Longest input of the tokenizer.
        seed: Seed of the vectors and of rows that are drawn.

    Returns:
        The tokenizer as it was, and the new one.

    Raises:
        InputError: If the checkpoint cannot be opened, or its model takes no such tokenizer.
    """
    old, folder = from_pretrained(AutoTokenizer, name), Path(output_dir)
    options: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size, "lowercase": lowercase}
    trained = train_tokenizer([text or "" for text in texts()], model_max_length=model_max_length, **options)
    trained.save_pretrained(folder)
    new = from_pretrained(AutoTokenizer, str(folder))
    auxiliary = token_vectors(texts, new, folder / "_vectors", seed=seed)

    def change(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return transfer_vocabulary(model, old, new, auxiliary, seed=seed), new

    _rewrite(name, auto_class, change, folder)
    return old, new


def token_vectors(
    texts: Callable[[], Iterable[str | None]], tokenizer: PreTrainedTokenizerBase, work: Path, *, seed: int
) -> WordVectors:
    """Return vectors of a tokenizer's tokens on texts: their PPMI with their neighbours, factorized.

    Args:
        texts: Returns the texts; None is no text.
        tokenizer: The tokenizer.
        work: Folder for what does not fit into memory; removed at the end.
        seed: Seed of the factorization.

    Raises:
        InputError: If no token occurs often enough.
    """
    try:
        corpus = WordCorpus.build(
            lambda: (text or "" for text in texts()), folder=work / "corpus", tokenizer=tokenizer.backend_tokenizer
        )
        counts = count_cooccurrences(corpus, Window(size=5, weighting="linear"), folder=work / "counts")
        table = pmi_matrix(counts.to_csr(), smoothing=0.75)
        words, counted = corpus.vocabulary.words, corpus.vocabulary.counts
        # Of few words the rows themselves are vectors.
        vectors = (
            latent_vectors(table, dimensions=_DIMENSIONS, seed=seed).vectors
            if len(words) > _FEW_WORDS
            else table.toarray()
        )
        return WordVectors(words, vectors, counts=counted, tokenizer=tokenizer.backend_tokenizer)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def token_counts(texts: Iterable[str | None], tokenizers: Sequence[PreTrainedTokenizerBase]) -> list[int]:
    """Return how many tokens each tokenizer makes of texts, special tokens left out."""
    totals, batch = [0] * len(tokenizers), list[str]()

    def add() -> None:
        for number, tokenizer in enumerate(tokenizers):
            found = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            totals[number] += sum(len(encoding) for encoding in found)
        batch.clear()

    for text in texts:
        batch.append(text or "")
        if len(batch) == _BATCH:
            add()
    add()
    return totals


def replaced_at_once(folder: Path, write: Callable[[Path], Any]) -> Any:
    """Let a function write a folder, all of it or nothing, in the place of one that is there; return what it returns."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        found = write(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found
