"""What training for vectors needs before its first step: the views of documents, or pairs that files give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.views import TextViewDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.contrastive.arguments import ContrastiveModelArguments, ContrastiveTrainingArguments
from hf_pretrain.objectives.contrastive.pairs import GivenPairs, load_pairs
from hf_pretrain.training.program import load_data
from hf_pretrain.training.rehearsal import made_up_data

logger = logging.get_logger(__name__)


def load_examples(
    data_args: DataArguments,
    model_args: ContrastiveModelArguments,
    args: ContrastiveTrainingArguments,
    *,
    special_tokens: Sequence[str] = ("pad",),
) -> PreparedData:
    """Read text, or the pairs that `train_file` gives; see [`load_data`].

    Raises:
        InputError: As [`load_data`] or [`load_pairs`]; or if pairs come without a tokenizer.
    """
    prepare = partial(_given_pairs, args=args) if args.view == "pairs" else None
    return load_data(data_args, model_args, args, special_tokens=special_tokens, prepare=prepare)


def _given_pairs(
    data_args: DataArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    first: Any,
    args: ContrastiveTrainingArguments,
    **others: Any,
) -> PreparedData:
    """Return the pairs of `train_file`, and those of `validation_file` or a share of the anchors held out."""
    check_pairs(data_args, tokenizer)
    assert tokenizer is not None and data_args.train_file is not None
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "block_size": data_args.block_size,
        "scorer": args.scorer,
        "cross_negatives": args.cross_negatives,
        "seed": args.seed,
        "num_proc": data_args.preprocessing_num_workers,
    }
    held_out: GivenPairs | None = None
    with first:
        train = load_pairs(data_args.train_file, option="train_file", **options)
        if data_args.validation_file:
            held_out = load_pairs(data_args.validation_file, option="validation_file", **options)
    if held_out is None and data_args.validation_fraction:
        train, held_out = split_anchors(train, data_args.validation_fraction, seed=data_args.split_seed)
    if train.num_cut:
        logger.warning(
            f"{train.num_cut:,} texts are longer than block_size={data_args.block_size}: their ends are cut off"
        )
    description = {"sources": list(data_args.train_file), "pairs": len(train), "tokens": train.num_tokens}
    if held_out is not None:
        description["held_out_pairs"] = len(held_out)
    return PreparedData(tokenizer, train, held_out, description, data_args.block_size)


def check_pairs(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse what pairs cannot be read with, before they are.

    Raises:
        InputError: If there is no file of pairs, or no tokenizer.
    """
    if not data_args.train_file:
        raise InputError("views='pairs' reads pairs of texts: name CSV, TSV or JSON lines with train_file")
    if data_args.streaming:
        raise InputError("streaming=True has no effect with views='pairs', which are read at once: leave it out")
    if tokenizer is None:
        raise InputError(
            "views='pairs' needs a tokenizer: name the encoder to start from with model_name_or_path, or a tokenizer with "
            "tokenizer_name"
        )


def split_anchors(pairs: GivenPairs, fraction: float, *, seed: int) -> tuple[GivenPairs, GivenPairs | None]:
    """Hold a share of the anchors out, each with all its rows; one at least, unless there are less than four.

    Args:
        pairs: The pairs.
        fraction: Share of the anchors.
        seed: Of the choice.

    Returns:
        The other pairs, and those held out; None if none are.
    """
    anchors = np.unique(pairs.anchors)
    if len(anchors) < 4:  # noqa: PLR2004 (two on each side, so that each has a negative)
        return pairs, None
    wanted = min(max(2, round(fraction * len(anchors))), len(anchors) - 2)
    chosen = anchors[draws.permutation(len(anchors), seed=seed, stream="held_out_pairs")[:wanted]]
    is_held_out = np.isin(pairs.anchors, chosen)
    return pairs.select(np.flatnonzero(~is_held_out)), pairs.select(np.flatnonzero(is_held_out))


def made_up_examples(
    data_args: DataArguments,
    model_args: ContrastiveModelArguments,
    args: ContrastiveTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreparedData:
    """Return examples as [`load_examples`] would, of a text that is none; see [`made_up_data`].

    Raises:
        InputError: If pairs come without a file or a tokenizer.
    """
    if args.view == "pairs":
        check_pairs(data_args, tokenizer)
    data = made_up_data(data_args, model_args, args, tokenizer)
    if args.view != "pairs":
        return data
    # As many texts an example as pairs with one negative have.
    views = TextViewDataset(
        data.train_documents,
        tokenizer=data.tokenizer,
        block_size=data.block_size,
        view="neighbours",
        scorer=args.scorer,
        cross_negatives=args.cross_negatives,
    )
    return replace(data, train_dataset=views, eval_dataset=None if data.eval_dataset is None else views)
