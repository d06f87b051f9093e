"""Left-to-right language modelling: its batches and Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction

from hf_pretrain.corruption.rows import ends_of_rows, stack_column
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import JOINING_MODES, BlockTemplate
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import check_range
from hf_pretrain.evaluation.references import neighbour_losses, print_references, reference_rows
from hf_pretrain.evaluation.samples import print_next_tokens
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.causal_lm.arguments import (
    CausalLMDataArguments,
    CausalLMModelArguments,
    CausalLMTrainingArguments,
)
from hf_pretrain.objectives.causal_lm.modeling import CausalLMForPreTraining
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.trainer import PretrainingTrainer

# Modes of packing that cut documents at the end of an example.
_CUTTING = JOINING_MODES


class DataCollatorForCausalLM:
    """Stacks examples, and gives each token the next one as its label; nothing is random.

    The examples are dicts with `input_ids`, with `document_ids` where documents are isolated, and with `goes_on` where they may
    be cut, as of [`BlockDataset`]. The batch is a dict of tensors:

    - `input_ids`, `attention_mask`, `labels`: `[B, L]` int64, padded on the right whatever the tokenizer says; `labels` is the
      next token of the same row and document, -100 where there is none;
    - `target_positions`: `[T]` int64, the flat positions that have a label, ascending;
    - `document_ids`, `position_ids`: `[B, L]` int64, if the examples have `document_ids`: which document of the row a token
      belongs to (-1 at padding), and its position in that document.

    Args:
        tokenizer: A transformers tokenizer; one without a padding token is padded with its end token.
        predicts_end: Whether the special tokens that the tokenizer puts behind a text are predicted at the end of a row. Where
            text is cut at the end of a row, they would teach that texts end anywhere. Those behind a document that goes on in
            another row are never predicted.
        pad_to_multiple_of: `L` is rounded up to a multiple of this.
        target_slots: `T` is filled up to a multiple of this, for fixed shapes, with the last position of the first row, which
            has no label.

    Raises:
        InputError: If a number is not positive.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        predicts_end: bool = True,
        pad_to_multiple_of: int | None = None,
        target_slots: int | None = None,
    ) -> None:
        for name, value in (("pad_to_multiple_of", pad_to_multiple_of), ("target_slots", target_slots)):
            if value is not None:
                check_range(value, "[1, inf)", name=name)
        self.predicts_end = predicts_end
        self.pad_to_multiple_of, self.target_slots = pad_to_multiple_of, target_slots
        self._suffix = np.array(BlockTemplate.of(tokenizer).suffix, dtype=np.int64)
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._padding = next(number for number in ids if number is not None)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch."""
        multiple = self.pad_to_multiple_of or 1
        ids_BL, valid_BL = stack_column(examples, "input_ids", fill=self._padding, multiple=multiple)
        follows_BL = np.zeros_like(valid_BL)
        follows_BL[:, :-1] = valid_BL[:, 1:]
        batch: dict[str, np.ndarray] = {"input_ids": ids_BL, "attention_mask": valid_BL.astype(np.int64)}
        if "document_ids" in examples[0]:
            documents_BL, _ = stack_column(examples, "document_ids", valid=valid_BL, fill=-1)
            follows_BL[:, :-1] &= documents_BL[:, 1:] == documents_BL[:, :-1]
            batch |= {"document_ids": documents_BL, "position_ids": _positions(documents_BL, valid_BL)}
        if len(self._suffix) and "goes_on" in examples[0]:
            goes_on_BL, _ = stack_column(examples, "goes_on", valid=valid_BL)
            self._drop_ends_of_parts(follows_BL, goes_on_BL & valid_BL)
        if len(self._suffix) and not self.predicts_end:
            follows_BL[:, :-1] &= ~ends_of_rows(ids_BL, valid_BL, self._suffix)[:, 1:]
        labels_BL = np.full_like(ids_BL, IGNORED)
        labels_BL[:, :-1] = np.where(follows_BL[:, :-1], ids_BL[:, 1:], IGNORED)
        batch |= {"labels": labels_BL, "target_positions": self._filled(np.flatnonzero(follows_BL), ids_BL.shape[1])}
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round up so that all batches of a training have one shape; see [`DataCollatorForMaskedLM.fix_shapes`]."""
        self.pad_to_multiple_of = length if self.pad_to_multiple_of is None else self.pad_to_multiple_of
        self.target_slots = num_rows * length if self.target_slots is None else self.target_slots

    def _drop_ends_of_parts(self, follows: np.ndarray, goes_on: np.ndarray) -> None:
        """Take the special tokens behind documents that go on elsewhere off the targets, in place."""
        ends = goes_on & ~follows
        for number in range(1, 1 + len(self._suffix)):
            follows[:, :-number] &= ~ends[:, number:]

    def _filled(self, positions: np.ndarray, width: int) -> np.ndarray:
        if self.target_slots is None:
            return positions
        missing = -len(positions) % self.target_slots if len(positions) else self.target_slots
        return np.concatenate([positions, np.full(missing, width - 1, dtype=positions.dtype)])


def _positions(documents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the position of each token in its document, 0 at padding: int64 of the shape ``[B, L]`` of the two."""
    columns = np.arange(documents.shape[1])
    begins = np.ones_like(valid)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return (columns - np.maximum.accumulate(columns * begins, axis=1)) * valid


class CausalLMTrainer(PretrainingTrainer):
    """Trains a [`CausalLMForPreTraining`] to predict the next token."""

    option_classes = (CausalLMModelArguments, CausalLMTrainingArguments)
    # GPT-2's tokenizer has no token to pad with.
    special_tokens = ()

    objective = ObjectiveDescription(
        name="clm",
        title="Causal language modelling",
        description=(
            "The model reads text from left to right and predicts each token from those before it. The text is cut into examples "
            "of one length, with a token between documents."
        ),
        formula=r"\mathcal{L} = -\frac{1}{N} \sum_{t=1}^{N} \log p_\theta(x_t \mid x_{<t})",
        citations=cite("radford2018gpt", "radford2019gpt2"),
        metrics=SHARED_METRICS
        | {
            "lm_loss": "How surprised the model is by the next token, in nats; 0 is certainty.",
            "perplexity": "As many tokens, all as likely, would leave the model as unsure; it depends on the tokenizer.",
            "lm_accuracy": "Share of the tokens that are the model's first guess.",
        },
        headline=("lm_loss", "perplexity", "lm_accuracy"),
        pipeline_tag="text-generation",
        usage="""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
inputs = tokenizer({beginning}, return_tensors="pt", add_special_tokens=False)
outputs = model.generate(inputs.input_ids, max_new_tokens=20)
print(tokenizer.decode(outputs[0]))""",
    )

    def build_model(
        self,
        options: CausalLMModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> CausalLMForPreTraining:
        """Return the causal language model."""
        return CausalLMForPreTraining.from_arguments(options, data.tokenizer, stock=stock)

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return how text is cut: as the options say, and without any as GPT-2 does."""
        return CausalLMDataArguments() if self.inputs.data_args is None else data_args

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForCausalLM:
        """Return the collator."""
        return DataCollatorForCausalLM(tokenizer, predicts_end=args.predict_end is not False)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the blocks; where they are cut anywhere, their end is not predicted unless the options say so."""
        is_cut = args.predict_end is None and data.description.get("block_mode") in _CUTTING
        if is_cut and isinstance(collator, DataCollatorForCausalLM):
            collator.predicts_end = False
        return data.trainer_inputs()

    def _reduce_statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        means = super()._reduce_statistics(prediction)
        return means | {"perplexity": float(np.exp(means["lm_loss"]))}

    @cached_property
    def references(self) -> dict[str, float]:
        """Losses that counts of tokens and of pairs of neighbours reach on the held-out text; see [`neighbour_losses`].

        Counted are up to a million targets of the first epoch. Nothing, of a stream or where no one text is held out.
        """
        parts = (self.train_dataset, self.part_to_evaluate(self.eval_dataset))
        if not all(isinstance(part, EpochDataset) for part in parts):
            return {}
        options = {"vocab_size": len(self.processing_class), "seed": self.args.seed}
        return neighbour_losses(self.data_collator, *parts, **options)

    def card_facts(self) -> dict[str, Any]:
        """Return what counting reaches on the held-out text."""
        return {"references": reference_rows(self.references)}


def demonstrate(trainer: CausalLMTrainer, data: PreparedData) -> None:
    """Print what counting reaches on the held-out text, and how the model goes on with beginnings of its sentences."""
    print_references(trainer.references, counted="Counting tokens and pairs of neighbours")
    print_next_tokens(trainer, data)


METHOD = Method(
    trainer=CausalLMTrainer,
    description="""\
Pre-train a left-to-right language model, from scratch or from a checkpoint: GPT-2, or any other AutoModelForCausalLM.

    hf-pretrain clm --train_file corpus.txt --output_dir my-gpt
    hf-pretrain clm --model_name_or_path openai-community/gpt2 --train_file corpus.txt --output_dir my-domain-gpt
    accelerate launch trainers/clm.py --config trainers/recipes/gpt2_small.yaml --train_file corpus.txt --output_dir my-gpt2

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForCausalLM.from_pretrained("my-gpt")`, and generates.""",
    arguments=(CausalLMDataArguments, CausalLMModelArguments, CausalLMTrainingArguments),
    learning=Learning(left={"lm_loss": 0.44}),
    demonstrate=demonstrate,
)
