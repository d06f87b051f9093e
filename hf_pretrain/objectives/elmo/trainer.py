"""ELMo: its batches and Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_utils import EvalPrediction

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.windows import BidirectionalLaneDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import check_range
from hf_pretrain.evaluation.references import neighbour_losses, print_references, reference_rows
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.models.elmo.modeling_elmo import shifted_labels
from hf_pretrain.models.elmo.tokenization_elmo import ElmoTokenizer
from hf_pretrain.objectives.elmo.arguments import ElmoDataArguments, ElmoModelArguments, ElmoTrainingArguments
from hf_pretrain.objectives.elmo.modeling import BidirectionalLMForPreTraining, draw_negatives
from hf_pretrain.objectives.recurrence import RecurrentTrainer, inputs_of_lanes
from hf_pretrain.training.method import Learning, Method


class DataCollatorForElmo:
    """Stacks windows of lanes, or blocks of text, with the neighbours of each word as labels.

    The batch is a dict of tensors, padded on the right with mask 0 and label -100:

    - `input_ids`, `attention_mask`, `labels`: `[B, S]` int64; `labels` is the next word of each;
    - `backward_labels`: `[B, S]`, the word before each; of a window, what follows in the backward direction's own order;
    - of windows: `backward_input_ids` `[B, S]` in that order, and `lanes` and `memory_reset`, `[B]`;
    - `negatives` `[N]` and `num_tries` `[]`, if the softmax is sampled. They are keyed by the first example: micro-batches of one
      time step of the lanes have the same.

    Args:
        num_samples: Words of a sampled softmax that are drawn for a batch; None for a softmax that draws none.
        vocab_size: Number of words; needed with `num_samples`.
        seed: Key of the draws.
        pad_to_multiple_of: S is rounded up to a multiple of this.
        pad_token_id: What blocks are padded with.
    """

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        vocab_size: int | None = None,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        if num_samples is not None:
            check_range(num_samples, "[1, inf)", name="num_samples")
            check_range(
                vocab_size or 0, "[1, inf)", name="vocab_size", hint="a sampled softmax draws from the vocabulary"
            )
        self.num_samples, self.vocab_size, self.seed = num_samples, vocab_size, seed
        self.pad_to_multiple_of, self.pad_token_id = pad_to_multiple_of, pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch."""
        first = examples[0]
        batch = self._windows(examples) if "lane" in first else self._blocks(examples)
        if self.num_samples is not None:
            assert self.vocab_size is not None, "checked when this was made"
            key = {"epoch": first.get("epoch", 0), "number": first.get("time", first.get("example_id", 0))}
            negatives = draw_negatives(self.num_samples, vocab_size=self.vocab_size, seed=self.seed, **key)
            batch |= {"negatives": negatives.ids, "num_tries": negatives.num_tries}
        return batch

    def _blocks(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        ids, valid = stack_column(examples, "input_ids", fill=self.pad_token_id, multiple=self.pad_to_multiple_of or 1)
        own = torch.from_numpy(np.where(valid, ids, IGNORED))
        labels, backward_labels = shifted_labels(own)
        # No word follows padding, in either direction.
        backward_labels = backward_labels.masked_fill(own == IGNORED, IGNORED)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
            "labels": labels,
            "backward_labels": backward_labels,
        }

    def _windows(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of or 1
        # A lane may have ended in one direction alone, so the two may be of other lengths.
        longest = max(len(example[name]) for example in examples for name in ("input_ids", "backward_input_ids"))
        width = -(-longest // multiple) * multiple
        batch: dict[str, torch.Tensor] = {}
        for prefix in ("", "backward_"):
            ids, valid = stack_column(examples, f"{prefix}input_ids", multiple=max(width, 1))
            labels = np.full(ids.shape, IGNORED, dtype=np.int64)
            labels[valid] = np.concatenate([example[f"{prefix}labels"] for example in examples])
            batch |= {f"{prefix}input_ids": torch.from_numpy(ids), f"{prefix}labels": torch.from_numpy(labels)}
            if not prefix:
                batch["attention_mask"] = torch.from_numpy(valid.astype(np.int64))
        batch["lanes"] = torch.tensor([example["lane"] for example in examples])
        batch["memory_reset"] = torch.tensor([example["memory_reset"] for example in examples])
        return batch


class ElmoTrainer(RecurrentTrainer):
    """Trains a [`BidirectionalLMForPreTraining`]: in lanes, where each direction goes on with its states, or in blocks."""

    option_classes = (ElmoModelArguments, ElmoTrainingArguments)
    special_tokens = ("pad",)

    objective = ObjectiveDescription(
        name="elmo",
        title="Language modelling in both directions",
        description=(
            "Two stacks of LSTMs read the text, one from left to right and one from right to left. The first predicts the next "
            "word of each, the second the word before. They share the vectors of words, made from characters, and the softmax; "
            "neither sees a state of the other. The vectors for other tasks are weighted means of all layers."
        ),
        formula=(
            r"\mathcal{L} = -\frac{1}{2N} \sum_{t=1}^{N} \left( \log p_{\overrightarrow{\theta}}(x_t \mid x_{<t}) + "
            r"\log p_{\overleftarrow{\theta}}(x_t \mid x_{>t}) \right)"
        ),
        citations=cite("peters2018elmo"),
        metrics=SHARED_METRICS
        | {
            "forward_loss": "How surprised the model is by the next word, in nats; 0 is certainty.",
            "backward_loss": "How surprised it is by the word before, read from the end, in nats.",
            "perplexity": "As many words, all as likely, would leave both directions as unsure on average; by the vocabulary.",
        },
        headline=("forward_loss", "backward_loss", "perplexity"),
        pipeline_tag="feature-extraction",
        usage="""\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
inputs = tokenizer({beginning}, return_tensors="pt")
layers = model(**inputs).hidden_states  # the words, and each layer of both directions""",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, tokenizer = self.model.root.config, cast(Any, self).processing_class
        if config.embedding_type == "characters" and isinstance(tokenizer, PreTrainedTokenizerFast):
            # It is saved with the model, and makes the characters of words that are not known.
            self.processing_class = ElmoTokenizer.from_fast(tokenizer, max_characters=config.max_characters)

    def build_model(
        self,
        options: ElmoModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> BidirectionalLMForPreTraining:
        """Return the ELMo with its losses."""
        return BidirectionalLMForPreTraining.from_arguments(options, data.tokenizer, stock=stock)

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return how text is cut: as the options say, and without any into whole words."""
        return ElmoDataArguments() if self.inputs.data_args is None else data_args

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForElmo:
        """Return the collator."""
        return DataCollatorForElmo(seed=args.seed, pad_token_id=tokenizer.pad_token_id or 0)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return windows of lanes, or blocks; and let the collator draw words where the softmax is sampled."""
        config = model.model.config
        if config.softmax == "sampled" and isinstance(collator, DataCollatorForElmo):
            collator.num_samples, collator.vocab_size = config.num_samples, config.vocab_size
        if args.stateful:
            cure = ", or set stateful=False"
            return inputs_of_lanes(data, args, partial(BidirectionalLaneDataset, window=args.unroll_length), cure=cure)
        if data.isolates_documents:
            model.check_isolation(length=data.block_size)
        return data.trainer_inputs()

    def loss_weight(self, name: str) -> float:
        """Return one half: the loss is the mean of the two directions."""
        return 0.5

    def _reduce_statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        means = super()._reduce_statistics(prediction)
        return means | {"perplexity": float(np.exp((means["forward_loss"] + means["backward_loss"]) / 2))}

    @cached_property
    def references(self) -> dict[str, float]:
        """Losses that counts of words and of pairs of neighbours reach on the held-out text; see [`neighbour_losses`].

        Counted are up to a million targets of the first epoch. The pairs are counted for each direction.
        """
        parts = (self.train_dataset, self.part_to_evaluate(self.eval_dataset))
        if not all(isinstance(part, EpochDataset) for part in parts):
            return {}
        options = {"vocab_size": len(self.processing_class), "seed": self.args.seed}
        forward, backward = (
            neighbour_losses(self.data_collator, *parts, prefix=prefix, **options) for prefix in ("", "backward_")
        )
        if not forward or not backward:
            return {}
        return {
            "unigram_nll": (forward["unigram_nll"] + backward["unigram_nll"]) / 2,
            "forward_bigram_nll": forward["bigram_nll"],
            "backward_bigram_nll": backward["bigram_nll"],
        }

    def card_facts(self) -> dict[str, Any]:
        """Return what counting reaches on the held-out text."""
        return {"references": reference_rows(self.references)}


def demonstrate(trainer: ElmoTrainer, data: PreparedData) -> None:
    """Print what counting reaches on the held-out text."""
    print_references(trainer.references, counted="Counting words and pairs of neighbours")


METHOD = Method(
    trainer=ElmoTrainer,
    description="""\
Pre-train ELMo: words from their characters, and two LSTM language models in opposite directions.

    hf-pretrain elmo --config elmo_small --train_file corpus.txt --output_dir my-elmo
    accelerate launch trainers/elmo.py --config elmo --train_file corpus.txt --output_dir my-large-elmo

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-elmo", trust_remote_code=True)`, and its tokenizer with `AutoTokenizer`.""",
    arguments=(ElmoDataArguments, ElmoModelArguments, ElmoTrainingArguments),
    learning=Learning(left={"forward_loss": 0.5, "backward_loss": 0.5}),
    demonstrate=demonstrate,
    tiny_options={"cell_size": 64, "stateful": False},
)
