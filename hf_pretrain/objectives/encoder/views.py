"""The examples that each objective asks for, and their mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.lm_mode_views import LMModeView
from hf_pretrain.data.mixture import MixtureDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.sentence_pairs import PairTask, SentencePairDataset
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.encoder.arguments import ONE_WAY_OBJECTIVES, EncoderTrainingArguments
from hf_pretrain.training.recurrence import global_batch_size

_PAIR_TASKS: dict[str, PairTask] = {
    "nsp": "nsp",
    "sop": "sop",
    "sentence_structure": "structural",
    "sequence_to_sequence": "none",
}


def training_examples(data: PreparedData, args: EncoderTrainingArguments, *, type_vocab_size: int) -> Any:
    """Return the examples to train on: those of one kind, or a mixture.

    Kinds with the same inputs are mixed within a batch; else all examples of a step are of one kind, on all ranks.

    Args:
        data: Blocks, and the documents that they were cut from.
        args: The objectives and their shares.
        type_vocab_size: Token types of the model, 0 where it has none.

    Raises:
        InputError: If the data cannot be read as an objective asks.
    """
    shares = args.shares()
    parts = _parts(data, args, held_out=False, type_vocab_size=type_vocab_size)
    if len(parts) == 1:
        return next(iter(parts.values()))
    # Modes differ in what tokens see; other kinds, in their inputs.
    group_size = 1 if args.has_modes else global_batch_size(args)
    return MixtureDataset(parts, shares=shares, group_size=group_size, seed=args.seed)


def held_out_examples(data: PreparedData, args: EncoderTrainingArguments, *, type_vocab_size: int) -> Any:
    """Return the examples to evaluate on: those of all kinds, each once; None if no text is held out."""
    if data.eval_dataset is None:
        return None
    parts = _parts(data, args, held_out=True, type_vocab_size=type_vocab_size)
    if len(parts) == 1:
        return next(iter(parts.values()))
    return MixtureDataset(parts, shares={name: len(part) for name, part in parts.items()}, seed=args.seed)


def _parts(
    data: PreparedData, args: EncoderTrainingArguments, *, held_out: bool, type_vocab_size: int
) -> Mapping[str, Any]:
    """Return the examples of each kind that has a share."""
    names = list(args.shares())
    if names != ["mlm"] and data.train_documents is None:
        raise InputError(
            f"objectives: {names[-1]} reads documents anew each epoch, which a stream does not keep: leave out streaming"
        )
    if names != ["mlm"] and data.isolates_documents:
        raise InputError(
            f"block_mode='isolated_documents' puts several documents into an example, and {names[-1]} looks at one: use "
            "'doc_sentences'"
        )
    parts = {name: _examples(name, data, args, held_out=held_out) for name in names}
    if not args.has_modes:
        return parts
    modes = {name: name if name in ONE_WAY_OBJECTIVES else "bidirectional" for name in names}
    return {name: LMModeView(part, mode=modes[name], type_vocab_size=type_vocab_size) for name, part in parts.items()}


def _examples(name: str, data: PreparedData, args: EncoderTrainingArguments, *, held_out: bool) -> Any:
    if name in _PAIR_TASKS:
        return SentencePairDataset(
            data.eval_documents if held_out else data.train_documents,
            tokenizer=data.tokenizer,
            block_size=data.block_size,
            task=_PAIR_TASKS[name],
            seed=args.seed,
            balanced=args.balanced_pairs,
            short_probability=args.short_pair_probability,
            static_epochs=args.static_masks,
        )
    return EpochDataset.wrap(data.eval_dataset if held_out else data.train_dataset)
