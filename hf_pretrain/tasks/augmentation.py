"""More sentences for a task: a row and its variants, in which other words replace some of the row's.

A [`WordProposer`] gives candidates; keyed draws choose the words that change and the candidates that replace them.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import check_offsets
from hf_pretrain.errors import InputError, check_numbers
from hf_pretrain.modeling.backbone import evaluating, refuse_shifted
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.observing.cache import tokenizer_fingerprint, weights_fingerprint
from hf_pretrain.options import option
from hf_pretrain.tasks.words import ChangeableWord, WordNeighbours, WordProposer

SOURCE_ID = "source_id"
# Types of a column of text.
TEXT = ("string", "large_string")
# Rows whose masked copies are made and sorted by length together.
_CHUNK_ROWS = 1 << 14
# Options that make no difference to the result, or whose models and vectors are in the fingerprint themselves.
_NO_DIFFERENCE = ("augmentation_model", "augmentation_vectors", "augmentation_batch_size")
# Part of the fingerprint of the result: raise it when the same rows come out otherwise.
_VERSION = 1


@dataclass
class AugmentationArguments:
    """How training sentences are multiplied; the defaults are TinyBERT's."""

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("augmentation_rows", "augmentation_candidates", "augmentation_batch_size"), "[1, 65536]"),
        "augmentation_probability": "(0, 1]",
    }
    needs: ClassVar[dict[str, str]] = {
        f"augmentation_{name}": "augmentation_model"
        for name in ("vectors", "rows", "probability", "candidates", "stop_words", "batch_size")
    }

    augmentation_model: str | None = option(
        None,
        "Masked language model that proposes other words, such as the one that the teacher was fine-tuned from; "
        "without it nothing is augmented.",
    )
    augmentation_vectors: str | None = option(
        None,
        "Text file of word vectors (GloVe, word2vec), the most frequent first, for words of several tokens; "
        "without it, the model's own embeddings.",
    )
    augmentation_rows: int = option(20, "Tries a row, less duplicates. TinyBERT: 20, large tasks 10, small ones 30.")
    augmentation_probability: float = option(0.4, "Share of the words exchanged in a try.")
    augmentation_candidates: int = option(15, "Proposals for a word, all equally likely.")
    augmentation_stop_words: Literal["english", "none"] = option(
        "english", "Words that are left as they are: scikit-learn's list, or none."
    )
    augmentation_batch_size: int = option(128, "Masked sentences in a batch; changes no result.")

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            InputError: If one is.
        """
        check_numbers(self)


def augment(
    dataset: datasets.Dataset,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
    neighbours: WordNeighbours | None = None,
    args: AugmentationArguments | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Multiply the rows of a task by exchanging words, once: the result of data on disk is found again.

    A word of letters that is no stop word and no part of a contraction is exchanged with the given probability: if it
    is one token, for one of the model's likeliest words where it is masked; if it is several, for one of its nearest
    neighbours. The word itself and special tokens are never proposed. Draws are keyed by seed, row, try, column and
    word, so they do not depend on the batch, nor one text of a pair on the other. All other columns, labels too, are
    those of the source.

    Args:
        dataset: Rows of a task.
        model: A stock masked language model.
        tokenizer: Its tokenizer, a fast one.
        text_columns: Columns of text, one or two.
        neighbours: Proposes for words of several tokens; by default the model's embeddings.
        args: How much to exchange.
        seed: Seed of the draws.

    Returns:
        Each row followed by its variants, with the column `source_id`: the number of the row in `dataset`. Words
        behind the model's last position are left as they are.

    Raises:
        InputError: If a column is missing or holds no text, or the model cannot fill masks.

    Source:
        Jiao et al., "TinyBERT" (2020), algorithm 1. The official code shows the model the unmasked sentence too; here,
        as in the paper, it sees the masked one alone.
    """
    args = AugmentationArguments() if args is None else args
    _check_inputs(dataset, model, tokenizer, text_columns)
    neighbours = WordNeighbours.from_model(model, tokenizer) if neighbours is None else neighbours
    proposer = WordProposer(
        model,
        tokenizer,
        neighbours=neighbours,
        stop_words=_stop_words() if args.augmentation_stop_words == "english" else (),
        num_candidates=args.augmentation_candidates,
        batch_size=args.augmentation_batch_size,
    )
    options = {name: value for name, value in asdict(args).items() if name not in _NO_DIFFERENCE}
    sources = (dataset._fingerprint, weights_fingerprint(model), tokenizer_fingerprint(tokenizer), neighbours.key())
    with evaluating(model):
        return dataset.map(
            _Augmenter(proposer, text_columns=text_columns, args=args, seed=seed),
            with_indices=True,
            batched=True,
            batch_size=_CHUNK_ROWS,
            features=datasets.Features(dataset.features | {SOURCE_ID: datasets.Value("int64")}),
            new_fingerprint=Hasher.hash((_VERSION, draws.VERSION, *sources, options, list(text_columns), seed)),
            desc="Augmenting",
        )


def _stop_words() -> Collection[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # Few runs augment.

    return ENGLISH_STOP_WORDS


def _check_inputs(
    dataset: datasets.Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: Sequence[str],
) -> None:
    for name in text_columns:
        if name not in dataset.column_names:
            raise InputError(f"text_columns names {name!r}, but the data has {', '.join(dataset.column_names)}")
        if getattr(dataset.features[name], "dtype", None) not in TEXT:
            raise InputError(f"text_columns names {name!r}, which holds no text but {dataset.features[name]}")
    if SOURCE_ID in dataset.column_names:
        raise InputError(f"the data has a column {SOURCE_ID!r}: it is augmented already, or rename the column")
    if model.get_output_embeddings() is None:
        raise InputError(
            f"augmentation_model: a {type(model).__name__} cannot fill masks; name one for AutoModelForMaskedLM"
        )
    refuse_shifted(model, option="augmentation_model")
    check_offsets(tokenizer)
    check_model_fits(model, tokenizer, block_size=0)


@dataclass
class _Augmenter:
    """Takes rows from `datasets.map` and returns each of them, followed by its variants."""

    propose: WordProposer
    text_columns: Sequence[str]
    args: AugmentationArguments
    seed: int

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        columns = [self._with_variants(name, batch[name], indices) for name in self.text_columns]
        # By row, the different ones of (text of the first column, of the second), the original first.
        texts = [list(dict.fromkeys(zip(*row, strict=True))) for row in zip(*columns, strict=True)]
        sources = [row for row, kept in enumerate(texts) for _ in kept]
        augmented = {name: [values[row] for row in sources] for name, values in batch.items()}
        for i, name in enumerate(self.text_columns):
            augmented[name] = [variant[i] for kept in texts for variant in kept]
        return augmented | {SOURCE_ID: [indices[row] for row in sources]}

    def _with_variants(self, column: str, texts: list[str], indices: list[int]) -> list[list[str]]:
        """Return each text, followed by its variant of every try."""
        for index, text in zip(indices, texts, strict=True):
            if text is None:
                raise InputError(f"row {index} has no {column!r}: leave such rows out")
        words: list[list[ChangeableWord]] = [[] for _ in texts]
        for word in self.propose(texts):
            words[word.row].append(word)
        return [
            [text, *(_rewritten(text, found, choices) for choices in self._choices(found, column, index))]
            for text, found, index in zip(texts, words, indices, strict=True)
        ]

    def _choices(self, words: Sequence[ChangeableWord], column: str, index: int) -> list[list[int]]:
        """Draw for every try and word the number of a candidate, -1 for the word itself."""
        tries = np.arange(self.args.augmentation_rows)
        numbers = np.array([word.number for word in words], dtype=np.int64)
        change, choice = (
            draws.uniforms(
                draws.row_keys(tries * 0 + index, seed=self.seed, epoch=tries, stream=f"augmentation {what} {column}"),
                int(numbers.max(initial=0)) + 1,
            )[:, numbers]
            for what in ("change", "choice")
        )
        candidates = (choice * [len(word.candidates) for word in words]).astype(np.int64)
        return np.where(change < self.args.augmentation_probability, candidates, -1).tolist()


def _rewritten(text: str, words: Sequence[ChangeableWord], choices: Sequence[int]) -> str:
    """Return the text with the chosen candidates in place of words, -1 for the word itself."""
    parts, end = [], 0
    for word, choice in zip(words, choices, strict=True):
        if choice >= 0:
            parts += [text[end : word.begin], word.candidates[choice]]
            end = word.end
    return "".join([*parts, text[end:]])
