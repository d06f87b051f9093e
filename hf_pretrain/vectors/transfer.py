"""Word tables from vectors that are there: a new model's from word vectors, and a trained model's for another vocabulary.

[`table_from_vectors`] is behind `--init_embeddings`. [`transfer_vocabulary`] keeps the rows of the tokens that two vocabularies
share, and makes those of the others; [`shares_of_new_words`] makes rows of new words alone. All compare tokens by the text that
they stand for, see [`token_texts`].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.special import ndtri
from sklearn.decomposition import PCA
from tokenizers import models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.backbone import counts_from_padding
from hf_pretrain.modeling.loading import say_once
from hf_pretrain.modeling.surgery.vocabulary import trim_model, vocabulary_tables
from hf_pretrain.vectors.distillation import ids_of_special_tokens
from hf_pretrain.vectors.folder import WordVectors

METHODS = ("focus", "mean", "random")
# A text that every tokenizer knows: what stands behind it shows whether a token begins a word.
_PROBE = "a"
# What a decoder writes for bytes that are no whole character.
_BROKEN = "\ufffd"
# Roles of special tokens, and the one that a vocabulary without the first may have in its place.
_ROLES = {"pad": "pad", "unk": "unk", "mask": "mask", "cls": "bos", "sep": "eos", "bos": "cls", "eos": "sep"}
# Similarities that are in memory at once: 128 MiB.
_CHUNK = 1 << 24
_FIRST_TOP = 256


class TokenText(NamedTuple):
    """What a token stands for.

    Attributes:
        text: Its text. Part of a character is the token's own spelling behind U+FFFD.
        starts_word: Whether a space is before it.
    """

    text: str
    starts_word: bool


class TableReport(NamedTuple):
    """Where the rows of a word table come from, see [`table_from_vectors`].

    Attributes:
        words: Tokens that are words with a vector.
        pieces: Tokens that are pieces of such words.
        kept: Tokens that keep what the model has.
    """

    words: int
    pieces: int
    kept: int

    @property
    def found(self) -> float:
        """Share of the tokens with a vector."""
        return (self.words + self.pieces) / max(1, sum(self))


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, TokenText]:
    """Return the texts of a tokenizer's tokens by their ids, special tokens left out.

    The tokenizer's own decoder says them, so "the" of WordPiece, "Ġthe" of byte-level BPE and "▁the" of SentencePiece are one.

    Args:
        tokenizer: A tokenizer of the tokenizers library.

    Raises:
        InputError: If it is another one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library: convert it with save_pretrained"
        )
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    ids = sorted(names.keys() - ids_of_special_tokens(tokenizer))
    before = backend.encode(_PROBE, add_special_tokens=False).ids
    start = backend.decode(before, skip_special_tokens=False)
    decoded = backend.decode_batch([[*before, number] for number in ids], skip_special_tokens=False)
    texts = {}
    for number, text in zip(ids, decoded, strict=True):
        rest = text.removeprefix(start)
        starts_word = rest.startswith(" ")
        rest = rest[1:] if starts_word else rest
        texts[number] = TokenText(_BROKEN + names[number] if _BROKEN in rest else rest, starts_word)
    return texts


def start_from_vectors(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Fill the word table of a new model from a folder of word vectors, and say what was found; see [`table_from_vectors`].

    Args:
        model: The model, changed in place. Of one without values, only the width is checked.
        tokenizer: Its tokenizer.
        name_or_path: What `WordVectors.open` opens.

    Raises:
        InputError: If the vectors cannot be opened, do not fit, or are of no token of the tokenizer.
    """
    table, vectors = model.get_input_embeddings().weight, WordVectors.open(name_or_path)
    if table.is_meta:  # a rehearsal
        _check_width(vectors.vectors, table.shape[1], model)
        return
    report = table_from_vectors(model, tokenizer, vectors)
    if not report.found:
        raise InputError(
            f"init_embeddings={name_or_path!r}: none of its {len(vectors)} words is made of the tokenizer's tokens: use "
            "vectors of the same language and script"
        )
    say_once(
        f"{name_or_path}: {report.found:.1%} of the word table starts from vectors ({report.words} words, {report.pieces} pieces "
        f"of words; {report.kept} tokens start at random)"
    )


@torch.no_grad()
def table_from_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vectors: WordVectors
) -> TableReport:
    """Fill the word table of a new model from word vectors.

    A token that is a whole word gets its vector, that of the lower-case word if there is no other. A token that is part of words
    gets the mean of their vectors, weighted by how often the words occur. Other tokens, and special ones, keep what the model
    has. The new rows are scaled to the standard deviation of the table as it was. Wider vectors are reduced to their principal
    components. Vectors of another tokenizer's tokens fill those that both have.

    Args:
        model: The model, changed in place; an output layer that is tied to the table changes with it.
        tokenizer: Its tokenizer.
        vectors: Vectors of words, from frequent to rare. Without counts, a word counts one over its rank.

    Returns:
        How many tokens got which row.

    Raises:
        InputError: If the vectors are narrower than the table, or too few for principal components.
    """
    table = model.get_input_embeddings().weight
    _check_width(vectors.vectors, table.shape[1], model)
    values = _of_width(vectors.vectors, table.shape[1])
    from_word, piece_ids, of_pieces = _rows_of_tokens(tokenizer, vectors)
    ids = [*from_word, *piece_ids]
    report = TableReport(len(from_word), len(piece_ids), len(tokenizer) - len(ids))
    if not ids:
        return report
    new = np.concatenate([values[list(from_word.values())], of_pieces @ values]).astype(np.float64)
    spread = new.std()
    if spread > 0:
        new *= table.float().std(correction=0).item() / spread
    table[torch.tensor(ids, device=table.device)] = torch.from_numpy(new).to(table.device, table.dtype)
    return report


def _check_width(vectors: np.ndarray, width: int, model: PreTrainedModel) -> None:
    """Refuse vectors that are narrower than a table, or too few for as many principal components."""
    num_words, own = vectors.shape
    if own < width or (own > width and num_words < width):
        raise InputError(
            f"init_embeddings: {num_words} vectors of width {own} cannot fill the word table of {type(model).__name__}, which is "
            f"{width} wide: make at least {width} vectors of at least that width, or a model with a table of {own}"
        )


def _of_width(vectors: np.ndarray, width: int) -> np.ndarray:
    """Return vectors as wide as a table: themselves or their principal components."""
    if vectors.shape[1] == width:
        return vectors
    return np.asarray(PCA(n_components=width, svd_solver="covariance_eigh").fit_transform(vectors.astype(np.float64)))


def _rows_of_tokens(
    tokenizer: PreTrainedTokenizerBase, vectors: WordVectors
) -> tuple[dict[int, int], list[int], sparse.csr_matrix]:
    """Return which word a token is; and the ids ``[N]`` of pieces, with weights ``[N, V]`` of their words that sum to 1 a row."""
    special, num_words = ids_of_special_tokens(tokenizer), len(vectors.words)
    rows = {word: number for number, word in enumerate(vectors.words)}
    if vectors.tokenizer is not None and not isinstance(vectors.tokenizer.model, models.WordLevel):
        other = PreTrainedTokenizerFast(tokenizer_object=vectors.tokenizer)
        partners = shared_tokens(other, tokenizer).items()
        names = {number: other.convert_ids_to_tokens(match) for number, match in partners if number not in special}
        known = {number: rows[name] for number, name in names.items() if name in rows}
        return known, [], sparse.csr_matrix((0, num_words))
    # A space before, as in the middle of a text: "Ġthe" and "▁the" are tokens of their own.
    encodings = tokenizer.backend_tokenizer.encode_batch([f" {word}" for word in rows], add_special_tokens=False)
    pieces = [encoding.ids for encoding in encodings]
    from_word: dict[int, int] = {}
    for number, ids in enumerate(pieces):
        if len(ids) == 1 and ids[0] not in special:
            from_word.setdefault(ids[0], number)
    for token, text in token_texts(tokenizer).items():
        match = rows.get(text.text.lower())
        if text.starts_word and match is not None:
            from_word.setdefault(token, match)
    counts = 1 / np.arange(1, num_words + 1) if vectors.counts is None else vectors.counts.astype(np.float64)
    pairs = [
        (token, number)
        for number, ids in enumerate(pieces)
        for token in ids
        if token not in special and token not in from_word and counts[number] > 0
    ]
    tokens, numbers = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    found, at = np.unique(tokens, return_inverse=True)
    totals = np.bincount(at, weights=counts[numbers], minlength=len(found))
    weights = sparse.csr_matrix((counts[numbers] / totals[at], (at, numbers)), shape=(len(found), num_words))
    return from_word, found.tolist(), weights


def shared_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the ids of the new tokenizer's tokens that the old one has too -> their ids there.

    Special tokens are paired by role, others by text: as it is, else without regard to case, where a lower-case partner is taken
    first.

    Args:
        old: The tokenizer that a model was trained with.
        new: The other one.
    """
    exact: dict[TokenText, int] = {}
    folded: dict[TokenText, int] = {}
    texts = token_texts(old)
    for number, known in texts.items():
        exact.setdefault(known, number)
        if known == _folded(known):
            folded.setdefault(known, number)
    for number, known in texts.items():
        folded.setdefault(_folded(known), number)
    pairs = _special_pairs(old, new)
    for number, known in token_texts(new).items():
        match = exact.get(known, folded.get(_folded(known)))
        if match is not None and number not in pairs:
            pairs[number] = match
    return pairs


def _folded(known: TokenText) -> TokenText:
    # The spelling of bytes has other letters for other bytes.
    return known if known.text.startswith(_BROKEN) else TokenText(known.text.casefold(), known.starts_word)


def _special_pairs(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the new ids of special tokens -> the old ids, by role, and by name for those without one."""
    pairs: dict[int, int] = {}
    for role, other in _ROLES.items():
        number = getattr(new, f"{role}_token_id")
        matches = (getattr(old, f"{name}_token_id") for name in (role, other))
        match = next((match for match in matches if match is not None), None)
        if number is not None and match is not None:
            pairs.setdefault(number, match)
    names, special = old.get_vocab(), ids_of_special_tokens(old)
    for number in ids_of_special_tokens(new) - pairs.keys():
        match = names.get(new.convert_ids_to_tokens(number))
        if match in special:
            pairs[number] = match
    return pairs


@torch.no_grad()
def transfer_vocabulary(
    model: PreTrainedModel,
    old_tokenizer: PreTrainedTokenizerBase,
    new_tokenizer: PreTrainedTokenizerBase,
    auxiliary: WordVectors | None = None,
    *,
    method: Literal["focus", "mean", "random"] = "focus",
    seed: int = 0,
) -> PreTrainedModel:
    """Return a model for another tokenizer, with word tables, output layers and biases of its tokens.

    Tokens that both vocabularies share keep their rows. With "focus", a new token is a mean of shared ones: those near to it in
    the auxiliary vectors, weighted by the sparsemax of their cosines. A new token without an auxiliary vector is drawn as in
    "random".

    Args:
        model: A stock model, with an output layer over the vocabulary or without; not changed.
        old_tokenizer: Its tokenizer.
        new_tokenizer: The tokenizer that the new model is for.
        auxiliary: Vectors of the new tokenizer's tokens, spelled as in its vocabulary, such as GloVe's on text that it has cut.
        method: "focus"; "mean", where a new row is the mean of the old table; or "random", a normal draw with the mean and the
            standard deviation of each of its columns.
        seed: Seed of the draws.

    Returns:
        The new model, in the same dtype, on the same device and in the same mode.

    Raises:
        InputError: If "focus" has no auxiliary vectors or none of a shared token, or the padding token would move in a model that
            numbers its positions from it.

    Source:
        Dobler and de Melo, "FOCUS: Effective Embedding Initialization for Monolingual Specialization of Multilingual Models",
        EMNLP 2023, section 3.
    """
    check_choice(method, METHODS, name="method")
    if method == "focus" and auxiliary is None:
        raise InputError(
            "auxiliary=None: method='focus' needs vectors of the new tokenizer's tokens; train some on its text"
        )
    if counts_from_padding(model) and new_tokenizer.pad_token_id != model.config.pad_token_id:
        raise InputError(
            f"new_tokenizer has padding token {new_tokenizer.pad_token_id}, and {type(model).__name__} numbers its positions "
            f"from token {model.config.pad_token_id}: make a tokenizer with the padding token there"
        )
    shared = shared_tokens(old_tokenizer, new_tokenizer)
    used = torch.tensor(sorted(old_tokenizer.get_vocab().values()))
    # Rows to be overwritten come from a token that no configured id points at.
    kept = torch.full((max(new_tokenizer.get_vocab().values()) + 1,), int(used[-1]))
    kept[list(shared)] = torch.tensor(list(shared.values()))
    means = None
    if auxiliary is not None and method == "focus":
        means = _focus_means(new_tokenizer, auxiliary, shared, num_old=model.config.vocab_size)
    transferred = trim_model(model, kept)
    old_state, new_state, written = model.state_dict(), transferred.state_dict(), set[int]()
    fresh = np.setdiff1d(np.arange(len(kept)), np.fromiter(shared, dtype=np.int64))
    for name, axis in vocabulary_tables(model).items():
        # BART's bias has its tokens in columns.
        table = new_state[name].movedim(axis, 0)
        if table.data_ptr() in written:  # tied to one before
            continue
        written.add(table.data_ptr())
        old = old_state[name].movedim(axis, 0).float().cpu().numpy()
        rows = _plain_rows(old[used.numpy()], fresh, seed=seed, name=name, is_random=method != "mean")
        if means is not None:
            rows[np.searchsorted(fresh, means[0])] = means[1] @ old
        table[torch.from_numpy(fresh).to(table.device)] = torch.from_numpy(rows).to(table.device, table.dtype)
    by_auxiliary = 0 if means is None else len(means[0])
    say_once(
        f"{len(shared)} of {len(kept)} tokens keep their rows, {by_auxiliary} are means of shared ones, "
        f"{len(fresh) - by_auxiliary} are {'the mean' if method == 'mean' else 'drawn'}"
    )
    return transferred


def _plain_rows(old: np.ndarray, fresh: np.ndarray, *, seed: int, name: str, is_random: bool) -> np.ndarray:
    """Return a row for each new token, the mean of the old ones or drawn as they are spread, ``float32 [N, ...]``."""
    mean, spread = old.mean(axis=0, dtype=np.float64), old.std(axis=0, dtype=np.float64)
    rows = np.broadcast_to(mean, (len(fresh), *old.shape[1:])).astype(np.float32)
    if is_random and len(fresh):
        keys = draws.row_keys(fresh, seed=seed, stream=f"transfer_vocabulary/{name}")
        # Away from 0, where the quantile is not finite.
        normal = ndtri(np.clip(draws.uniforms(keys, max(1, mean.size)), 2.0**-54, None))
        rows += (normal.reshape(rows.shape) * spread).astype(np.float32)
    return rows


def _focus_means(
    tokenizer: PreTrainedTokenizerBase, auxiliary: WordVectors, shared: Mapping[int, int], *, num_old: int
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Return the new tokens with an auxiliary vector, and the weights of the old ones in them, ``[N, V_old]``."""
    vocabulary, special = tokenizer.get_vocab(), ids_of_special_tokens(tokenizer)
    is_zero = np.logical_not(auxiliary.vectors.any(axis=1))
    rows = {
        vocabulary[word]: row for row, word in enumerate(auxiliary.words) if word in vocabulary and not is_zero[row]
    }
    anchors = sorted(rows.keys() & shared.keys() - special)
    fresh = np.array(sorted(rows.keys() - shared.keys()), dtype=np.int64)
    if not anchors:
        raise InputError(
            f"auxiliary: none of its {len(auxiliary.words)} words is a token that both vocabularies share: train it on text cut "
            "by the new tokenizer"
        )
    near = [(shared[token], rows[token]) for token in anchors]
    return fresh, _means_of_near(auxiliary, [rows[int(token)] for token in fresh], near, num_old=num_old)


def shares_of_new_words(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], vectors: WordVectors, *, num_old: int
) -> tuple[list[int], sparse.csr_matrix]:
    """Return which new words have a vector, and the shares of old tokens in each: of whole words that stand near it.

    Args:
        tokenizer: The tokenizer, with the new words among its tokens.
        words: The new words.
        vectors: Vectors of words or of a tokenizer's tokens. A word without one takes that of the lower-case word.
        num_old: Rows of the tables that the model has.

    Returns:
        Numbers of the words with a vector, ascending; and their shares ``[N, V_old]``, each row of sum 1.

    Raises:
        InputError: If no new word or no old token has a vector.
    """
    vocabulary = tokenizer.get_vocab()
    is_zero = np.logical_not(vectors.vectors.any(axis=1))
    rows = {token: row for token, row in _rows_of_tokens(tokenizer, vectors)[0].items() if not is_zero[row]}
    fresh = {
        number: _row_of_word(word, vectors, rows.pop(vocabulary[word], None)) for number, word in enumerate(words)
    }
    found = {number: row for number, row in fresh.items() if row is not None and not is_zero[row]}
    # A word that is new has no row yet, so it is no anchor of another.
    anchors = [(token, row) for token, row in rows.items() if token < num_old]
    if not found or not anchors:
        lacking = f"the {len(words)} new words" if anchors else "the tokenizer's other tokens"
        raise InputError(
            f"vectors: none of {lacking} is among the {len(vectors)} words with a vector: use vectors of the domain's language "
            "and script, or leave them out"
        )
    return list(found), _means_of_near(vectors, list(found.values()), anchors, num_old=num_old)


def _row_of_word(word: str, vectors: WordVectors, row: int | None) -> int | None:
    """Return the row of a new word: `row` if it is known, else that of its spelling, or of the vectors' own token for it."""
    row = vectors.ids.get(word, vectors.ids.get(word.lower())) if row is None else row
    if row is not None or vectors.tokenizer is None:
        return row
    tokens = vectors.tokenizer.encode(f" {word}", add_special_tokens=False).tokens
    unknown = getattr(vectors.tokenizer.model, "unk_token", None)
    return vectors.ids.get(tokens[0]) if len(tokens) == 1 and tokens[0] != unknown else None


def _means_of_near(
    vectors: WordVectors, words: Sequence[int], anchors: Sequence[tuple[int, int]], *, num_old: int
) -> sparse.csr_matrix:
    """Return the shares of old tokens in each of some words: the sparsemax of their cosines, ``[N, V_old]``.

    Args:
        vectors: The vectors.
        words: Row of each word there.
        anchors: Ids of old tokens, and their rows there.
        num_old: Tokens of the old vocabulary.
    """
    columns, rows = np.array(anchors, dtype=np.int64).T
    near, numbers = _unit(vectors.vectors[rows]), np.array(words, dtype=np.int64)
    chunks = [
        sparse.csr_matrix(sparsemax(_unit(vectors.vectors[part]) @ near.T))
        for part in _parts(numbers, max(1, _CHUNK // len(anchors)))
    ]
    shares = sparse.vstack(chunks) if chunks else sparse.csr_matrix((0, len(anchors)))
    cells = (np.ones(len(anchors)), (np.arange(len(anchors)), columns))
    return shares @ sparse.csr_matrix(cells, shape=(len(anchors), num_old))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length one, ``float64 [N, D]``; none is all zeros."""
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)


def _parts(items: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """Return the point of the simplex nearest to each row: shares of at least 0 that sum to 1, most of them 0.

    Args:
        scores: ``float [N, S]``.

    Returns:
        ``float [N, S]``.

    Source:
        Martins and Astudillo, "From Softmax to Sparsemax", ICML 2016, algorithm 1.
    """
    top = min(_FIRST_TOP, scores.shape[1])
    while True:
        # Only the highest scores can have a share, and how many is seen from them alone.
        highest = -np.sort(np.partition(-scores, top - 1, axis=1)[:, :top], axis=1)
        sums = np.cumsum(highest, axis=1)
        support = (1 + np.arange(1, top + 1) * highest > sums).sum(axis=1)
        if top == scores.shape[1] or (support < top).all():
            break
        top = min(4 * top, scores.shape[1])
    threshold = (np.take_along_axis(sums, support[:, None] - 1, axis=1) - 1) / support[:, None]
    return np.maximum(scores - threshold, 0)
