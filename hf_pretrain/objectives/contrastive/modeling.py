"""A stock encoder that is trained for one vector a text: heads, decoder and generator around it, and the losses of a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.modeling.backbone import longest_sequence, num_token_types
from hf_pretrain.modeling.base import TRIAL_LENGTH, TRIAL_ROWS, PretrainingModel, masked_trial_batch, trial_tokens
from hf_pretrain.modeling.bottleneck import DECODER_FOLDER, BottleneckDecoder
from hf_pretrain.modeling.configuration import CompositeConfig, SubModelConfig, dtype_option, load_or_build
from hf_pretrain.modeling.heads import PairHead, load_head
from hf_pretrain.modeling.losses import (
    IGNORED,
    ExampleSum,
    GatheredHead,
    PretrainingOutput,
    masked_lm_accuracy,
    masked_lm_loss,
    sum_of_targets,
    token_losses,
)
from hf_pretrain.modeling.pooling import POOLINGS, TEXT_POOLER_FOLDER, TextPooler, pool_texts, sentence_modules_of
from hf_pretrain.modeling.visibility.rules import has_padding, isolated_inputs
from hf_pretrain.objectives.contrastive.arguments import ContrastiveModelArguments, ContrastiveTrainingArguments
from hf_pretrain.objectives.contrastive.losses import (
    NO_DOCUMENT,
    ContrastiveObjective,
    ContrastiveResult,
    VectorBatch,
    alignment,
    cross_encoder_loss,
    gather_batch,
    surrogate,
    uniformity,
)
from hf_pretrain.objectives.replaced_token_detection.building import build_model as build_pair
from hf_pretrain.objectives.replaced_token_detection.modeling import ReplacedTokenDetectionForPreTraining

PAIR_HEAD_FOLDER = "pretraining/pair_head"
_RTD = "rtd_"
_DECODER = ("decoder_input_ids", "decoder_mask", "decoder_keys", "decoder_positions")


@strict
class ContrastiveConfig(CompositeConfig):
    """Configuration of [`ContrastiveForPreTraining`].

    Attributes:
        model: Configuration of the stock encoder; None beside replaced token detection, whose discriminator is the encoder.
        pair: Configuration of a [`ReplacedTokenDetectionForPreTraining`] beside it, None if there is none.
        pooling: How a vector is made: "mean", "cls", or "cls_mlp", the first token through a layer of training's own.
        has_mlm: Whether masked tokens are predicted too.
        loss: "infonce" or "ranking", of texts that are compared; None if none are.
        is_cross: Whether a head scores two texts that are read at once.
        similarity: "cosine" or "dot".
        temperature: Divides the similarities, of "infonce".
        margin: Of "ranking".
        hard_negative_weight: Added to the logits of an anchor's own hard negatives.
        same_document_counts: Whether texts of one document are compared.
        decoder_kind: That of the decoder that rebuilds a text from its vector; None if there is none.
        decoder_layers: Its layers.
        decoder_mask_probability: Share of the text that each token of an "enhanced" decoder does not see.
        max_length: Most tokens of a text, special tokens included.
    """

    model_type = "hf_pretrain_contrastive"
    sub_configs = {"model": AutoConfig, "pair": AutoConfig}  # noqa: RUF012

    model: SubModelConfig = None
    pair: SubModelConfig = None
    pooling: str = "mean"
    has_mlm: bool = False
    loss: str | None = "infonce"
    is_cross: bool = False
    similarity: str = "cosine"
    temperature: float = 0.05
    margin: float = 0.2
    hard_negative_weight: float = 0.0
    same_document_counts: bool = False
    decoder_kind: str | None = None
    decoder_layers: int = 1
    decoder_mask_probability: float = 0.5
    max_length: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse a pooling that is unknown."""
        check_choice(self.pooling, POOLINGS, name="pooling")
        super().__post_init__(**kwargs)


@dataclass
class ContrastiveOutput(PretrainingOutput):
    """Output of [`ContrastiveForPreTraining`].

    Attributes:
        vectors: ``[R, D]`` of the texts, in fp32.
    """

    vectors: torch.Tensor | None = None


class ContrastiveForPreTraining(PretrainingModel):
    """A stock encoder whose vectors of texts are compared with each other, or rebuild the texts; perhaps it learns more beside.

    The loss of texts that are compared is not a sum over micro-batches: each text meets those of all. In training the texts of
    all ranks are gathered here; those of several micro-batches by [`ContrastiveTrainer`].

    Args:
        config: Configuration with the stock model's inside.
        model: The stock encoder to train, with a masked-LM head if masked tokens are predicted; built from the configuration,
            with fresh weights, when not given.
        pair: Generator and discriminator, of which the discriminator is the encoder, in place of `model`.

    Source: see [`ContrastiveTrainingArguments`].
    """

    config_class = ContrastiveConfig
    is_additive = False

    def __init__(
        self, config: ContrastiveConfig, model: PreTrainedModel | None = None, *, pair: PretrainingModel | None = None
    ) -> None:
        super().__init__(config)
        self.model: PreTrainedModel | None = None
        self.pair: PretrainingModel | None = None
        self.mlm_head: GatheredHead | None = None
        if config.pair is not None:
            self.pair = ReplacedTokenDetectionForPreTraining(config.pair) if pair is None else pair
            self.export_parts = {folder: f"pair.{name}" for folder, name in self.pair.export_parts.items()}
        else:
            choose = AutoModelForMaskedLM if config.has_mlm else AutoModel
            self.model = choose.from_config(config.model) if model is None else model
            self.export_parts = {"": "model"}
            self.mlm_head = GatheredHead(self.model) if config.has_mlm else None
        encoder = self.root
        self.text_pooler = TextPooler.for_encoder(encoder.config) if config.pooling == "cls_mlp" else None
        self.pair_head = PairHead.for_encoder(encoder.config, num_classes=1) if config.is_cross else None
        self.decoder = None
        if config.decoder_kind is not None:
            self.decoder = BottleneckDecoder.for_encoder(
                encoder,
                kind=config.decoder_kind,
                max_length=config.max_length,
                num_layers=config.decoder_layers,
                mask_probability=config.decoder_mask_probability if config.decoder_kind == "enhanced" else None,
            )
        for folder, name in _HEADS.items():
            if getattr(self, name) is not None:
                self.export_parts[folder] = name
        self.compare = None
        if config.loss is not None and not config.is_cross:
            self.compare = ContrastiveObjective(
                loss=config.loss,  # type: ignore[arg-type]
                similarity=config.similarity,  # type: ignore[arg-type]
                temperature=config.temperature,
                margin=config.margin,
                hard_negative_weight=config.hard_negative_weight,
                same_document_counts=config.same_document_counts,
            )
        self.is_additive = self.compare is None
        self.post_init()

    @classmethod
    def from_model(
        cls, model: PreTrainedModel | None, *, pair: PretrainingModel | None = None, **options: Any
    ) -> ContrastiveForPreTraining:
        """Wrap a stock model, or a pair; it is trained in place. `options` are fields of [`ContrastiveConfig`].

        Raises:
            InputError: If a step on a few tokens fails; see [`PretrainingModel.try_out`].
        """
        parts = {"model": None if model is None else model.config, "pair": None if pair is None else pair.config}
        composite = cls(ContrastiveConfig(**parts, **options), model, pair=pair)
        composite.try_out()
        return composite

    @classmethod
    def from_arguments(
        cls,
        model_args: ContrastiveModelArguments,
        args: ContrastiveTrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        stock: PreTrainedModel | None = None,
    ) -> ContrastiveForPreTraining:
        """Load the checkpoint that the arguments name, or build the model that they describe.

        Args:
            model_args: What to load or to build.
            args: The objective.
            tokenizer: Sizes the vocabulary of a model from scratch.
            max_length: Most tokens of a text, special tokens included.
            stock: A stock model instead, with or without a head.

        Raises:
            InputError: If the model cannot be loaded or built, or is an encoder-decoder.
        """
        options: dict[str, Any] = dtype_option(model_args) | config_options(args) | {"max_length": max_length}
        name = model_args.model_name_or_path
        if args.beside == "rtd":
            model, pair = None, build_pair(model_args, tokenizer, stock=stock)
        else:
            pair = None
            if stock is not None and args.beside == "none":
                model = stock.base_model
            else:
                choose = AutoModelForMaskedLM if args.beside == "mlm" else AutoModel
                model = load_or_build(choose, model_args, tokenizer, stock=stock)
            if model.config.is_encoder_decoder:
                raise InputError(
                    f"{type(model).__name__} is an encoder-decoder: a vector is made of an encoder's states; choose a checkpoint "
                    "or a model_type such as bert, roberta or modernbert"
                )
        joined = cls.from_model(model, pair=pair, **options)
        for folder, head in _HEADS.items():
            if name is not None and getattr(joined, head) is not None:
                load_head(getattr(joined, head), name, folder=folder)
        return joined

    @property
    def needed_roles(self) -> int:
        """Texts of each example that a step needs at least."""
        return 1 if self.config.loss is None else 2

    def trial_batch(self) -> dict[str, torch.Tensor]:
        """Return two texts of each of two examples, with targets of every loss; see [`PretrainingModel.trial_batch`]."""
        encoder = self.root
        ids = trial_tokens(encoder)
        rows = torch.cat([ids, ids.flip(1)])[: TRIAL_ROWS * self.needed_roles]
        numbers = torch.arange(len(rows), device=ids.device)
        batch = {
            "input_ids": rows,
            "attention_mask": torch.ones_like(rows),
            "text_ids": numbers[:, None].expand_as(rows).contiguous(),
            "first_positions": numbers * TRIAL_LENGTH,
            "documents": numbers[:TRIAL_ROWS],
            "text_keys": numbers,
        }
        if self.mlm_head is not None:
            masked = masked_trial_batch(encoder)
            labels = torch.full_like(rows, IGNORED)
            labels[:TRIAL_ROWS] = masked["labels"]
            positions = masked["target_positions"]
            examples = torch.div(positions, TRIAL_LENGTH, rounding_mode="floor")
            batch |= {"labels": labels, "target_positions": positions, "target_examples": examples}
        if self.pair is not None:
            trial = self.pair.trial_batch()
            assert trial is not None, "the pair has a trial of its own"
            batch |= {f"{_RTD}{name}": value for name, value in trial.items()}
        if self.decoder is not None:
            positions = torch.arange(ids.numel(), device=ids.device)
            batch |= {"decoder_input_ids": ids, "decoder_labels": ids, "decoder_mask": torch.ones_like(ids)}
            batch["decoder_positions"] = positions
            if self.config.decoder_kind == "enhanced":
                batch["decoder_keys"] = numbers[:TRIAL_ROWS]
        return batch

    def count_targets(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the number of targets of each loss."""
        counts = {}
        if self.config.loss is not None:
            counts["contrastive"] = (batch["documents"] != NO_DOCUMENT).sum()
        if self.decoder is not None:
            counts["bottleneck"] = (batch["decoder_labels"] != IGNORED).sum()
        if self.mlm_head is not None:
            counts["mlm"] = (batch["labels"] != IGNORED).sum()
        if self.pair is not None:
            counts |= self.pair.count_targets(_of_pair(batch))
        return counts

    def on_flash(self, batch: Mapping[str, Any]) -> Collection[str]:
        """Return the encoder, or the two of a joint replaced token detection; the small decoders have attention of their own."""
        return self.backbones.keys()

    @staticmethod
    def host_inputs(batch: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return whether any row has padding; see [`PretrainingModel.host_inputs`]."""
        own = has_padding(batch)
        return own | {f"{_RTD}{name}": value for name, value in has_padding(_of_pair(batch)).items()}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        text_ids: torch.Tensor,
        first_positions: torch.Tensor,
        documents: torch.Tensor,
        text_keys: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        target_examples: torch.Tensor | None = None,
        decoder_labels: torch.Tensor | None = None,
        known: ContrastiveResult | None = None,
        vector_gradients: torch.Tensor | None = None,
        only_vectors: bool = False,
        **inputs: Any,
    ) -> ContrastiveOutput:
        """Return the sum of each loss over its targets.

        Args:
            input_ids: ``[P, W]``, P rows of one text or of several each.
            attention_mask: ``[P, W]``.
            text_ids: ``[P, W]`` the text that a token belongs to; -1 at padding, and in copies that have no vector.
            first_positions: ``[R]`` flat position of the first token of each text: of all anchors, all positives, and so on.
            documents: ``[B]`` the document of each example; -1 for an example that does not count.
            text_keys: ``[R]`` equal for equal texts.
            labels: ``[P, W]`` original ids at masked positions, -100 elsewhere.
            target_positions: ``[T]`` flat positions of these.
            target_examples: ``[T]`` the example of each.
            decoder_labels: ``[B, L]`` what the decoder writes, -100 where nothing.
            known: What the Trainer has found for these examples among those of all micro-batches.
            vector_gradients: ``[R, D]`` the gradient of the step's loss, found with it.
            only_vectors: Whether to return the vectors and nothing else.
            **inputs: What the decoder reads (`decoder_input_ids`, `decoder_mask`, `decoder_keys`) and where it writes
                (`decoder_positions`, flat); the batch of the pair, under names that begin with "rtd_"; further inputs of the
                encoder, such as `document_ids` and `position_ids` where several texts share a row.

        Returns:
            The losses (nats) "contrastive", "bottleneck", "mlm" and "rtd", those that there are; the metric
            "contrastive_accuracy"; in evaluation "alignment", "uniformity" and an accuracy of each other loss.
        """
        of_pair = _of_pair(inputs)
        of_decoder = {name: inputs[name] for name in _DECODER if name in inputs}
        others = {name: value for name, value in inputs.items() if name not in _DECODER and not name.startswith(_RTD)}
        others |= {"input_ids": input_ids, "attention_mask": attention_mask}
        states, mlm_logits = self._encode(others, target_positions)
        mode = POOLINGS[self.config.pooling]
        vectors_RD = pool_texts(states, text_ids, first_positions, mode=mode)
        if self.text_pooler is not None:
            vectors_RD = self.text_pooler(vectors_RD)
        output = ContrastiveOutput(losses={}, metrics={}, vectors=vectors_RD)
        if only_vectors:
            return output
        if self.config.loss is not None:
            self._compare(output, documents, text_keys, known, vector_gradients)
        if mlm_logits is not None:
            assert labels is not None and target_positions is not None and target_examples is not None
            targets_T = labels.flatten().index_select(0, target_positions)
            where: dict[str, Any] = {"positions": target_examples, "shape": torch.Size((len(documents), 1))}
            output.losses["mlm"] = masked_lm_loss(mlm_logits, targets_T, **where)
            if not self.training:
                output.metrics["mlm_accuracy"] = masked_lm_accuracy(mlm_logits.argmax(-1), targets_T, **where)
        if self.decoder is not None:
            assert decoder_labels is not None, "the collator gives it"
            self._rebuild(output, decoder_labels, of_decoder)
        if self.pair is not None:
            found = self.pair(**of_pair)
            output.losses |= found.losses
            output.metrics |= found.metrics
        return output

    def _encode(
        self, inputs: dict[str, Any], target_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the states ``[P, W, D]``, and the logits of masked tokens ``[T, V]`` if there are any."""
        encoder = self.root
        if num_token_types(encoder.config) < 2:
            inputs.pop("token_type_ids", None)
        given = isolated_inputs(encoder, **inputs)
        if self.mlm_head is None or target_positions is None:
            return encoder.base_model(**given)[0], None
        run = self.mlm_head.run(encoder, target_positions, **given)
        return run.states, run.logits

    def _compare(
        self,
        output: ContrastiveOutput,
        documents: torch.Tensor,
        text_keys: torch.Tensor,
        known: ContrastiveResult | None,
        vector_gradients: torch.Tensor | None,
    ) -> None:
        """Add the loss of texts that are compared, and who was right."""
        assert output.vectors is not None
        result = known
        if self.pair_head is not None:
            scores_BK = self.pair_head(output.vectors).reshape(-1, len(documents)).T
            config = self.config
            result = cross_encoder_loss(
                scores_BK / config.temperature if config.loss == "infonce" else scores_BK,
                documents=documents,
                loss=config.loss,
                margin=config.margin,
            )
        elif result is None:
            assert self.compare is not None, "there is a loss"
            own = VectorBatch(output.vectors, documents, text_keys)
            result = self.compare(own, *(gather_batch(own) if self.training else (own, 0)))
        elif vector_gradients is not None:
            result = result._replace(losses=surrogate(result.losses, output.vectors, vector_gradients))
        output.losses["contrastive"] = ExampleSum(result.losses, result.counts)
        output.metrics["contrastive_accuracy"] = ExampleSum(result.correct, result.counts)
        if not self.training and self.compare is not None:
            anchors, positives = output.vectors[: 2 * len(documents)].chunk(2)
            output.metrics["alignment"] = alignment(anchors, positives, documents=documents)
            output.metrics["uniformity"] = uniformity(anchors, documents=documents)

    def _rebuild(self, output: ContrastiveOutput, labels: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Add the loss of the decoder that rebuilds each text from its vector."""
        assert self.decoder is not None and output.vectors is not None
        positions_T = inputs["decoder_positions"]
        targets_T = labels.flatten().index_select(0, positions_T)
        found = self.decoder(
            output.vectors,
            inputs["decoder_input_ids"],
            inputs["decoder_mask"],
            word_table=self.root.get_input_embeddings().weight,
            positions=positions_T,
            keys=inputs.get("decoder_keys"),
            targets=targets_T if self.training else None,
        )
        where: dict[str, Any] = {"positions": positions_T, "shape": labels.shape}
        losses_T = found if self.training else token_losses(found, targets_T)
        output.losses["bottleneck"] = sum_of_targets(losses_T, targets_T, **where)
        if not self.training:
            output.metrics["bottleneck_accuracy"] = masked_lm_accuracy(found.argmax(-1), targets_T, **where)

    def stock_part(
        self, attribute: str, state: Mapping[str, torch.Tensor] | None
    ) -> tuple[PreTrainedModel, Mapping[str, torch.Tensor] | None]:
        """Return a sub-model with its stock parameters; those of the pair are its own affair."""
        if self.pair is not None and attribute.startswith("pair."):
            return self.pair.stock_part(attribute.removeprefix("pair."), state)
        return super().stock_part(attribute, state)

    def export(self, output_dir: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the encoder, and what makes it a model of sentence-transformers; see [`PretrainingModel.export`]."""
        super().export(output_dir, state_dict=state_dict)
        if self.config.is_cross:
            return
        config, encoder = self.config, self.root
        modules = sentence_modules_of(
            config.pooling, normalizes=config.similarity == "cosine", max_seq_length=config.max_length
        )
        modules.write(Path(output_dir), hidden_size=encoder.config.hidden_size, longest=longest_sequence(encoder))


_HEADS = {TEXT_POOLER_FOLDER: "text_pooler", PAIR_HEAD_FOLDER: "pair_head", DECODER_FOLDER: "decoder"}


def config_options(args: ContrastiveTrainingArguments) -> dict[str, Any]:
    """Return the fields of [`ContrastiveConfig`] that follow from the options."""
    options: dict[str, Any] = {
        "pooling": args.pooling,
        "has_mlm": args.beside == "mlm",
        "loss": args.contrastive_loss if args.is_contrastive else None,
        "is_cross": args.is_cross,
        "decoder_kind": args.decoder,
        "decoder_layers": args.decoder_layers,
        "decoder_mask_probability": args.decoder_mask_probability,
        "margin": args.ranking_margin,
        "hard_negative_weight": args.hard_negative_weight,
        "same_document_counts": args.objective == "infoword",
    }
    given = {"similarity": args.similarity, "temperature": args.contrastive_temperature}
    return options | {name: value for name, value in given.items() if value is not None}


def _of_pair(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the pair's own batch."""
    return {name.removeprefix(_RTD): value for name, value in batch.items() if name.startswith(_RTD)}
