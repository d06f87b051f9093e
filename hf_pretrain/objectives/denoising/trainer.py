"""The Trainer of encoder-decoders: the noise that its options name, the examples, and the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.denoising import BartNoise
from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.evaluation.references import (
    MOST_COUNTED,
    MOST_SCORED,
    first_batches,
    print_references,
    reference_losses,
    reference_rows,
)
from hf_pretrain.evaluation.samples import print_rebuilt, rebuilt_sentences
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments, DenoisingTrainingArguments
from hf_pretrain.objectives.denoising.building import cut_text, load_examples, longest_pair, made_up_examples
from hf_pretrain.objectives.denoising.collator import DataCollatorForDenoising
from hf_pretrain.objectives.denoising.modeling import DenoisingForPreTraining
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.trainer import PretrainingTrainer

# Noise -> what it does, and the paper that it is from.
_NOISES = {
    "bart": (
        "The text is noised by {steps}, and the decoder writes the untouched text.",
        "lewis2020bart",
    ),
    "t5": (
        "Spans of the text are cut out, a sentinel in place of each, and the decoder writes each sentinel and its span.",
        "raffel2020t5",
    ),
    "ul2": (
        "Each text is noised in one of several ways, which its first token names: short spans, long or many spans, or its end. "
        "The decoder writes what is cut out.",
        "tay2022ul2",
    ),
    "prefix_lm": ("The encoder reads the beginning of a text, and the decoder writes the rest.", "raffel2020t5"),
    "mass": (
        "A fragment of the text is masked, and the decoder writes it, seeing the tokens of the fragment alone, at the positions "
        "that they have in the text.",
        "song2019mass",
    ),
}


class DenoisingTrainer(PretrainingTrainer):
    """Trains a [`DenoisingForPreTraining`] to undo noise."""

    option_classes = (DenoisingModelArguments, DenoisingTrainingArguments)
    # Which others the tokenizer needs depends on the noise.
    special_tokens = ("pad",)

    def build_model(
        self,
        options: DenoisingModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> DenoisingForPreTraining:
        """Return the encoder-decoder."""
        kinds = args.make_noise(data.tokenizer).kinds
        return DenoisingForPreTraining.from_arguments(options, data.tokenizer, stock=stock, kinds=kinds)

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return how text is cut: longer where span corruption makes it shorter."""
        known = self.inputs.processing_class
        return cut_text(data_args, training, tokenizer=known if isinstance(known, PreTrainedTokenizerBase) else None)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForDenoising:
        """Return the collator of pairs."""
        return DataCollatorForDenoising(
            tokenizer, noise=args.make_noise(tokenizer), seed=args.seed, static_masks=args.static_masks
        )

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the blocks, with the starts of their sentences where the noise needs them."""
        inputs, targets = longest_pair(args, data.tokenizer, data.block_size)
        model.check_lengths(data.tokenizer, inputs=inputs, targets=targets)
        if args.torch_compile and isinstance(collator, DataCollatorForDenoising):
            collator.fix_sides(num_rows=args.per_device_train_batch_size, inputs=inputs, targets=targets)
        found = data.trainer_inputs()
        if isinstance(collator.noise, BartNoise):
            # A model may have no position behind the longest text.
            room = data.block_size - collator.template.num_special_tokens
            collator.noise = replace(collator.noise, longest_input=room)
        if not collator.noise.needs_sentences:
            return found
        sets = {name: with_sentences(found[name]) for name in ("train_dataset", "eval_dataset")}
        return found | sets

    @cached_property
    def references(self) -> dict[str, float]:
        """What counting tokens and copying the input reach on the held-out pairs; see [`reference_losses`].

        Counted are up to a million targets of the first epoch. Nothing, of a stream or where no one text is held out.
        """
        parts = (self.train_dataset, self.part_to_evaluate(self.eval_dataset))
        if not all(isinstance(part, EpochDataset) for part in parts):
            return {}

        def pairs_of(dataset: Any, most: int) -> Iterator[Mapping[str, Any]]:
            rows = range(len(dataset))
            order = rows if dataset.in_order else draws.permutation(len(rows), seed=self.args.seed).tolist()
            return first_batches(
                self.data_collator, dataset, order, most=most, count=lambda batch: len(batch["target_positions"])
            )

        counted, held_out = map(pairs_of, parts, (MOST_COUNTED, MOST_SCORED))
        return reference_losses(counted, held_out, vocab_size=len(self.processing_class))

    def card_facts(self) -> dict[str, Any]:
        """Return the description of this run's noise, what it is measured against, and a sample."""
        args = cast(DenoisingTrainingArguments, self.args)
        words, citation = _NOISES[args.noise]
        steps = " and ".join(name.replace("_", " ") for name in args.noise_steps)
        said = f"{self.objective.description} {words.format(steps=steps)}"
        return {
            "objective": replace(self.objective, description=said, citations=cite(citation)),
            "references": reference_rows(self.references, title="held-out pairs"),
            "samples": rebuilt_sentences(self),
        }

    objective = ObjectiveDescription(
        name="denoise",
        title="Sequence-to-sequence denoising",
        description=(
            "An encoder reads text with noise. A decoder writes what is missing, or the whole text, one token after the other, "
            "each from the encoder's states and the tokens before it."
        ),
        formula=r"\mathcal{L} = -\frac{1}{|y|} \sum_t \log p_\theta(y_t \mid y_{<t}, \tilde{x})",
        citations=cite("lewis2020bart"),
        metrics=SHARED_METRICS
        | {
            "denoising_loss": "How surprised the decoder is by a target, in nats; 0 is certainty.",
            "denoising_accuracy": "Share of the targets where the first guess is right.",
            "hidden_nll": "The same surprise at targets that the input does not show: copying does not help there.",
            "hidden_accuracy": "Share of these where the first guess is right.",
            "spans_exact": "Share of the hidden spans in which every first guess is right.",
        },
        headline=("denoising_loss", "hidden_nll", "hidden_accuracy", "spans_exact"),
        usage="""\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForSeq2SeqLM.from_pretrained("{repo}")
inputs = tokenizer({sentence}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40)))""",
    )


def with_sentences(dataset: Any) -> Any:
    """Return blocks that also say where sentences begin; examples of another kind as they are."""
    if isinstance(dataset, EpochDataset):
        return dataset if not isinstance(dataset.base, BlockDataset) else EpochDataset(with_sentences(dataset.base))
    if not isinstance(dataset, BlockDataset | StreamingBlocks):
        return dataset
    dataset = copy.copy(dataset)
    dataset.with_sentences = True
    return dataset


def demonstrate(trainer: DenoisingTrainer, data: PreparedData) -> None:
    """Print what counting and copying reach on the held-out text, and sentences that the model has rebuilt."""
    print_references(trainer.references, counted="Counting and copying", title="held-out pairs")
    print_rebuilt(trainer, data)


METHOD = Method(
    trainer=DenoisingTrainer,
    description="""\
Pre-train an encoder-decoder to undo noise, from scratch, from a checkpoint, or from an encoder and a decoder.

    hf-pretrain denoise --train_file corpus.txt --output_dir my-bart
    hf-pretrain t5_small --train_file corpus.txt --output_dir my-t5
    hf-pretrain denoise --encoder_name_or_path my-bert --train_file corpus.txt --output_dir my-bert2bert
    accelerate launch trainers/denoise.py --config trainers/recipes/bart.yaml --train_file corpus.txt --output_dir my-bart

bart, t5, ul2, prefix_lm and mass are this program with the recipe of a paper; bart_small and the like have its noise at the
default sizes. With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForSeq2SeqLM.from_pretrained("my-bart")`.""",
    arguments=(DataArguments, DenoisingModelArguments, DenoisingTrainingArguments),
    learning=Learning(left={"denoising_loss": 0.44}),
    load=load_examples,
    made_up=made_up_examples,
    demonstrate=demonstrate,
)
