"""The Trainer of encoders for one vector a text: its texts, the cache of a step's gradients, and the card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_pretrain.data import draws
from hf_pretrain.data.arguments import DataArguments, one_text_in_a_row
from hf_pretrain.data.examples.epochs import FILLER
from hf_pretrain.data.examples.views import TextViewDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.similarity import ScoredPairs, read_scored_pairs, similarity_correlation, text_vectors
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.modeling.losses import PretrainingOutput
from hf_pretrain.modeling.pooling import sentence_modules_of
from hf_pretrain.objectives.contrastive.arguments import ContrastiveModelArguments, ContrastiveTrainingArguments
from hf_pretrain.objectives.contrastive.building import load_examples, made_up_examples
from hf_pretrain.objectives.contrastive.collator import DataCollatorForContrastive
from hf_pretrain.objectives.contrastive.losses import NO_DOCUMENT, ContrastiveResult, VectorBatch, vector_gradients
from hf_pretrain.objectives.contrastive.modeling import ContrastiveForPreTraining
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.processes import is_sharded
from hf_pretrain.training.trainer import PretrainingTrainer

logger = logging.get_logger(__name__)

_OF_BLOCKS = ("blocks", "held_out_blocks", "block_mode")
# Objective or views -> what they are, and the paper.
_VIEWS = {
    "same": (
        "Two readings of a text under other dropout are nearer to each other than to other texts.",
        "gao2021simcse",
    ),
    "neighbours": ("A sentence and its neighbour are nearer to each other than to other sentences.", "gao2021simcse"),
    "spans": (
        "Two spans of a document are nearer to each other than to spans of other documents.",
        "giorgi2021declutr",
    ),
    "ict": ("A sentence is nearer to the text around it than to other texts.", "lee2019ict"),
    "title": ("The first sentence of a document is nearer to the body than to other bodies.", "lee2019ict"),
    "pairs": ("The two texts of a given pair are nearer to each other than to those of other pairs.", "gao2021simcse"),
}
_OBJECTIVES = {
    "infoword": (
        "A text in which one n-gram is masked is nearer to that n-gram, read alone, than to other n-grams.",
        "kong2020infoword",
    ),
    "retromae": (
        "The encoder reads a text with few masks, and a weak decoder rebuilds the text from its vector and a part of its tokens.",
        "xiao2022retromae",
    ),
    "tsdae": (
        "The encoder reads a text of which most tokens are deleted, and a weak decoder writes the text from its vector.",
        "wang2021tsdae",
    ),
}
_BESIDE = {
    "mlm": ("Masked tokens are predicted too.", "devlin2019bert"),
    "rtd": ("It also tells replaced tokens from original ones.", "clark2020electra"),
}
_CONTRASTIVE_FORMULA = (
    r"\mathcal{L} = -\frac{1}{n} \sum_i \log \frac{e^{s(x_i, y_i) / \tau}}{e^{s(x_i, y_i) / \tau} + \sum_{j \in N_i} "
    r"e^{s(x_i, y_j) / \tau}}"
)
_BOTTLENECK_FORMULA = r"\mathcal{L} = -\frac{1}{|T|} \sum_{t \in T} \log p(x_t \mid v(\tilde{x}), \tilde{x}'_t)"


class ContrastiveTrainer(PretrainingTrainer):
    """Trains a [`ContrastiveForPreTraining`].

    With `gradient_accumulation_steps`, the texts of all micro-batches of a step are compared with each other: they are read once
    without gradient, the gradient of the step's loss by each vector is kept, and each micro-batch is read once more, under the
    same dropout, and learns from it. So a step of many texts takes the memory of a micro-batch, and the result does not depend
    on how it is cut. It costs one more reading.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3.2.
    """

    model: ContrastiveForPreTraining
    option_classes = (ContrastiveModelArguments, ContrastiveTrainingArguments)
    # Which others the tokenizer needs depends on the objective.
    special_tokens = ("pad",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step: list[dict[str, Any]] = []
        self._found: list[tuple[ContrastiveResult, torch.Tensor]] = []
        self._micro_batch = 0
        super().__init__(*args, **kwargs)
        self.scored_pairs: ScoredPairs | None = None
        if getattr(self.args, "similarity_file", None) is not None:
            self.scored_pairs = read_scored_pairs(self.args.similarity_file)

    # Inputs

    def build_model(
        self,
        options: ContrastiveModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> ContrastiveForPreTraining:
        """Return the encoder with what the objective puts around it."""
        return ContrastiveForPreTraining.from_arguments(
            options, args, data.tokenizer, max_length=data.block_size, stock=stock
        )

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return how text is cut: no text holds parts of two documents."""
        return one_text_in_a_row(data_args)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForContrastive:
        """Return the collator of the objective; whether texts share rows the model says: see `make_examples`."""
        return DataCollatorForContrastive(
            tokenizer,
            objective=args.objective,
            beside=args.beside,
            masking=args.masking,
            deletion_probability=args.deletion_probability,
            decoder_mask_probability=args.decoder_mask_probability,
            enhanced_decoding=args.enhanced_decoding,
            seed=args.seed,
        )

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the views of the documents."""
        mode = data.description.get("block_mode", DataArguments.block_mode)
        if mode not in (DataArguments.block_mode, "doc_sentences"):
            raise InputError(
                f"block_mode={mode!r} has no effect here: texts are taken from documents; use 'doc_sentences', or leave it out"
            )
        # A compiled graph takes one number of rows.
        collator.packed = not args.torch_compile and can_pack(model, data.block_size)
        found = data.trainer_inputs()
        if args.view == "pairs":
            return found
        sets = {"train_dataset": data.train_documents, "eval_dataset": data.eval_documents}
        if sets["train_dataset"] is None:
            raise InputError(
                f"views={args.view!r} reads documents anew each epoch, which a stream or a tokenized dataset does not keep: give "
                "text, and leave out streaming"
            )
        views = {
            name: None if documents is None else self._views(documents, data, args, held_out=name == "eval_dataset")
            for name, documents in sets.items()
        }
        # Texts are taken from documents, and not from blocks.
        facts = {name: value for name, value in data.description.items() if name not in _OF_BLOCKS}
        counts = {"examples": views["train_dataset"], "held_out_examples": views["eval_dataset"]}
        facts |= {name: len(part) for name, part in counts.items() if part is not None}
        return found | views | {"data_description": facts}

    @staticmethod
    def _views(documents: Any, data: PreparedData, args: Any, *, held_out: bool) -> TextViewDataset:
        return TextViewDataset(
            documents,
            tokenizer=data.tokenizer,
            block_size=data.block_size,
            view=args.view,
            text_unit=args.text_unit,
            scorer="cross" if args.is_cross else "bi",
            cross_negatives=args.cross_negatives,
            seed=args.seed,
            static_epochs=args.static_masks,
            held_out=held_out,
            ict_keep_probability=args.ict_keep_probability,
        )

    def check_data(self, args: PretrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
        """Refuse a stream: its texts are compared by their documents, which it does not keep."""
        if isinstance(train_dataset, IterableDataset):
            raise InputError("train_dataset is a stream, whose documents are not kept: leave out streaming")

    # A step

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of a step and their counts, and keep them until the first of them is trained on."""
        batches, counts = super().get_batch_samples(*args)
        self._step, self._found, self._micro_batch = list(batches), [], 0
        return batches, counts

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return this micro-batch's share of the step's loss; a filler is nobody's negative."""
        return super().compute_loss(model, _uncounted(inputs), *args, **kwargs)

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Return the losses of a micro-batch; in training its texts meet those of the whole step."""
        if not model.training or len(self._step) < 2 or self.model.is_additive:
            return super().run_model(model, inputs)
        if not self._found:
            self._found = self._find_gradients(model)
            self._step = [{}] * len(self._step)  # The texts are needed no more.
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        known, gradients = self._found[number]
        self._seed_micro_batch(number)
        if self._micro_batch == len(self._step):
            self._step = []
        return super().run_model(model, inputs | {"known": known, "vector_gradients": gradients})

    @torch.no_grad()
    def _find_gradients(self, model: nn.Module) -> list[tuple[ContrastiveResult, torch.Tensor]]:
        """Read all micro-batches of the step, and return what each is to learn: results, and gradients by its vectors."""
        parts = []
        for number, batch in enumerate(self._step):
            inputs = _uncounted(self._prepare_inputs(batch))
            texts = {name: value for name, value in inputs.items() if name != FILLER}
            self._seed_micro_batch(number)
            output = super().run_model(model, texts | {"only_vectors": True})
            parts.append(VectorBatch(cast(Any, output).vectors, inputs["documents"], inputs["text_keys"]))
        # The weights that autocast has cast know of no gradient.
        torch.clear_autocast_cache()
        largest = self.args.train_batch_size * self.args.gradient_accumulation_steps
        assert self.model.compare is not None, "texts are compared"
        found = vector_gradients(self.model.compare, parts, largest=largest)
        return [
            (ContrastiveResult(losses, (part.documents != NO_DOCUMENT).float(), correct), gradients)
            for part, losses, correct, gradients in zip(
                parts, found.losses, found.correct, found.gradients, strict=True
            )
        ]

    def _seed_micro_batch(self, number: int) -> None:
        """Let both readings of a micro-batch have one dropout, which follows from step, micro-batch and rank alone."""
        place = (self.state.global_step * len(self._step) + number) * self.args.world_size + self.args.process_index
        torch.manual_seed(draws.generator_seed(place, seed=self.args.seed, stream="dropout of a micro-batch"))

    # Evaluation

    def _reduce_statistics(self, prediction: Any) -> dict[str, float]:
        """Return the means of an evaluation, and the correlation with the scores of given pairs."""
        means = super()._reduce_statistics(prediction)
        if self.scored_pairs is not None and not is_sharded(self.model):
            means["similarity_spearman"] = self.similarity_correlation(self.scored_pairs)
        return means

    def similarity_correlation(self, pairs: ScoredPairs) -> float:
        """Return the rank correlation of the cosines of pairs with their scores, by the vectors that an export makes."""
        config = self.model.config
        modules = sentence_modules_of(
            config.pooling, normalizes=config.similarity == "cosine", max_seq_length=config.max_length
        )
        first, second = (
            text_vectors(
                self.model.root.base_model,
                cast(PreTrainedTokenizerBase, self.processing_class),
                texts,
                modules=modules,
                batch_size=self.args.per_device_eval_batch_size,
            )
            for texts in (pairs.first, pairs.second)
        )
        return similarity_correlation(first, second, pairs.scores)

    # The card

    def card_facts(self) -> dict[str, Any]:
        """Return the description of this run's objective."""
        args = cast(ContrastiveTrainingArguments, self.args)
        own = _VIEWS[args.views] if args.objective == "contrastive" else _OBJECTIVES[args.objective]
        parts = [own, *([_BESIDE[args.beside]] if args.beside in _BESIDE else [])]
        objective = replace(
            self.objective,
            description=" ".join([self.objective.description, *(words for words, _ in parts)]),
            formula=_CONTRASTIVE_FORMULA if args.is_contrastive else _BOTTLENECK_FORMULA,
            citations=cite(*dict.fromkeys(citation for _, citation in parts)),
        )
        if args.is_cross:
            objective = replace(objective, tags=(), pipeline_tag="text-ranking", usage="")
        return {"objective": objective}

    objective = ObjectiveDescription(
        name="contrastive",
        title="One vector for a text",
        description="The encoder is trained so that one vector, pooled from its states, says what a text is about.",
        formula=_CONTRASTIVE_FORMULA,
        citations=cite("gao2021simcse"),
        pipeline_tag="sentence-similarity",
        tags=("sentence-transformers",),
        metrics=SHARED_METRICS
        | {
            "contrastive_loss": "How surprised the model is by the right text among those of a batch, whose number counts.",
            "contrastive_accuracy": "Share of the texts whose partner scores highest of all texts of a batch.",
            "alignment": "Mean squared distance of the vectors of two partners, at length 1: 0 is the same, 2 unrelated.",
            "uniformity": "How evenly the vectors are spread: 0 is one point, -4 about the most even.",
            "bottleneck_loss": "How surprised the decoder is by a token of the text that it rebuilds from the vector, in nats.",
            "bottleneck_accuracy": "Share of these tokens where the first guess is right.",
            "similarity_spearman": "Rank correlation of the cosines of pairs with the scores that people gave them.",
            "rtd_loss": "How surprised the model is by whether a token was replaced, in nats; 0 is certainty.",
        },
        headline=("similarity_spearman", "contrastive_accuracy", "contrastive_loss", "bottleneck_loss", "mlm_loss"),
        usage="""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}")
embeddings = model.encode([{sentence}, {another}])
print(model.similarity(embeddings, embeddings))""",
    )


def can_pack(model: ContrastiveForPreTraining, length: int) -> bool:
    """Return whether several texts may share a row of the encoder without seeing each other."""
    try:
        model.check_isolation(length=length)
    except InputError as error:
        logger.info(f"each text has a row of its own: {error}")
        return False
    return True


def _uncounted(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of which no text counts, if it is one that only keeps its process in step."""
    if FILLER not in inputs:
        return inputs
    return inputs | {"documents": torch.full_like(inputs["documents"], NO_DOCUMENT)}


METHOD = Method(
    trainer=ContrastiveTrainer,
    description="""\
Train an encoder for one vector a text, from raw text: from a checkpoint, or from scratch.

    hf-pretrain contrastive --model_name_or_path my-bert --train_file corpus.txt --output_dir my-sentence-encoder
    hf-pretrain simcse --model_name_or_path my-bert --train_file corpus.txt --similarity_file sts.csv --output_dir my-simcse
    hf-pretrain ict --beside mlm --model_name_or_path my-bert --train_file corpus.txt --output_dir my-retriever
    accelerate launch trainers/contrastive.py --config trainers/recipes/tsdae.yaml --train_file corpus.txt --output_dir my-tsdae

simcse, ict, infoword, retromae and tsdae are this program with the recipe of a paper. With `--demo_corpus true` it trains on the
docstrings of the installed Python packages. The result opens with `AutoModel.from_pretrained("my-sentence-encoder")`, and with
`SentenceTransformer("my-sentence-encoder")`, whose trainer goes on from it with labelled pairs.""",
    arguments=(DataArguments, ContrastiveModelArguments, ContrastiveTrainingArguments),
    # A sentence of the tiny text and the next one are alike from the start; masked tokens have to be learned.
    learning=Learning(left={"mlm_loss": 0.44}, least={"contrastive_accuracy": 0.8}),
    tiny_options={"views": "neighbours", "beside": "mlm"},
    load=load_examples,
    made_up=made_up_examples,
)
