"""The Trainers of an encoder, with one objective or several: the examples and the model that these need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.epochs import EpochDataset, MixtureDataset
from hf_pretrain.data.examples.lm_modes import NUM_MODE_TYPES, CausalView, LMModeView
from hf_pretrain.data.examples.packing import JOINING_MODES
from hf_pretrain.data.examples.pairing import PairTask
from hf_pretrain.data.examples.sentence_pairs import SentencePairDataset
from hf_pretrain.data.multilingual import MultilingualDataArguments, prepare_multilingual
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.samples import print_filled_masks, print_next_tokens
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.embeddings import known_languages, language_changes, set_languages
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.modeling.visibility.lm_modes import check_lm_modes
from hf_pretrain.objectives.encoder.arguments import METRICS, ONE_WAY_OBJECTIVES, EncoderTrainingArguments, describe
from hf_pretrain.objectives.encoder.collator import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainingArguments
from hf_pretrain.training.arguments import global_batch_size
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.program import load_data
from hf_pretrain.training.trainer import PretrainingTrainer

_PAIR_TASKS: dict[str, PairTask] = {
    "nsp": "nsp",
    "sop": "sop",
    "sentence_structure": "structural",
    "sequence_to_sequence": "none",
}


def encoder_examples(
    data: PreparedData, args: EncoderTrainingArguments, *, held_out: bool, type_vocab_size: int
) -> Any:
    """Return the examples to train or to evaluate on: those of one kind, or a mixture.

    In training, kinds with the same inputs are mixed within a batch; else all examples of a step are of one kind, on all ranks.
    An evaluation has each example once.

    Args:
        data: Blocks, and the documents that they were cut from.
        args: The objectives and their shares.
        held_out: Whether to evaluate.
        type_vocab_size: Token types of the model, 0 where it has none.

    Returns:
        The examples; None if no text is held out.

    Raises:
        InputError: If the data cannot be read as an objective needs it.
    """
    if held_out and data.eval_dataset is None:
        return None
    shares: Mapping[str, float] = args.shares()
    names = list(shares)
    if names != ["mlm"] and data.train_documents is None:
        raise InputError(
            f"objectives: {names[-1]} reads documents anew each epoch, or examples in an order of its own, which a stream or a "
            "tokenized dataset does not keep: give text, and leave out streaming"
        )
    if names != ["mlm"] and data.isolates_documents:
        raise InputError(
            f"block_mode='isolated_documents' puts several documents into an example, and {names[-1]} looks at one: use "
            "'doc_sentences'"
        )
    parts = {name: _examples(name, data, args, held_out=held_out) for name in names}
    if args.has_modes:
        modes = {name: name if name in ONE_WAY_OBJECTIVES else "bidirectional" for name in names}
        parts = {
            name: LMModeView(part, mode=modes[name], type_vocab_size=type_vocab_size) for name, part in parts.items()
        }
    if args.has_clm:
        parts = {name: CausalView(part, is_causal=name == "clm") for name, part in parts.items()}
    if len(parts) == 1:
        return parts[names[0]]
    if held_out:
        return MixtureDataset(parts, shares={name: len(part) for name, part in parts.items()}, seed=args.seed)
    # Modes differ in what tokens see; other kinds, in their inputs.
    group_size = 1 if args.has_modes or args.has_clm else global_batch_size(args)
    return MixtureDataset(parts, shares=shares, group_size=group_size, seed=args.seed)


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


def load_examples(
    data_args: MultilingualDataArguments,
    model_args: ModelArguments,
    args: EncoderTrainingArguments,
    *,
    special_tokens: Sequence[str] = ("mask", "pad"),
) -> PreparedData:
    """Read text of one language or of several, with the tokenizer of the run; see [`load_data`].

    Raises:
        InputError: As [`prepare_multilingual`]; or if there are translations and no objective for them, or the reverse.
    """
    if bool(data_args.parallel_file) != ("tlm" in args.objectives):
        raise InputError(
            "objectives: tlm learns from translations: name them with parallel_file"
            if "tlm" in args.objectives
            else f"parallel_file={data_args.parallel_file[0]!r} holds translations: add tlm to the objectives"  # type: ignore[index]
        )
    name = model_args.model_name_or_path
    known = None if name is None else known_languages(from_pretrained(AutoConfig, name))
    prepare = partial(prepare_multilingual, step_examples=global_batch_size(args), lang2id=known)
    return load_data(data_args, model_args, args, special_tokens=special_tokens, prepare=prepare)


def build_model(
    model_args: ModelArguments,
    args: EncoderTrainingArguments,
    data: PreparedData,
    *,
    stock: PreTrainedModel | None = None,
) -> EncoderForPreTraining:
    """Load or build the encoder with the heads of the objectives, and refuse one that cannot be trained by them.

    Raises:
        InputError: If the model cannot be loaded or built, does not fit the data, or lets tokens see what they must not.
    """
    model = EncoderForPreTraining.from_arguments(
        model_args,
        data.tokenizer,
        stock=stock,
        heads=args.heads,
        changes=_config_changes(model_args.model_type, args, data),
        pair_classes=3 if args.pair_objective == "sentence_structure" else 2,
        pair_task=args.pair_objective,
        span_positions=args.span_positions,
        has_bitext="tlm" in args.objectives,
        has_clm=args.has_clm,
        shifted=args.shifted,
    )
    if data.languages is not None:
        set_languages(model.model.config, data.languages)
    if args.has_modes or args.has_clm:
        check_lm_modes(model.model)
    # Once more: which parameters are reached depends on the languages.
    model.try_out()
    return model


def _config_changes(model_type: str, args: EncoderTrainingArguments, data: PreparedData) -> dict[str, Any]:
    """Return the configuration values that the objectives need in a model from scratch."""
    changes = {} if data.languages is None else language_changes(model_type, data.languages)
    types = NUM_MODE_TYPES if args.has_modes else 2 if args.pair_objective else 0
    known = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    own = changes.get("type_vocab_size", getattr(known, "type_vocab_size", None))
    # What has token types can tell segments apart, RoBERTa too, which has only one of its own.
    if own and types > own:
        changes["type_vocab_size"] = types
    return changes


_FILL_MASK = """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
predictions = fill_mask({masked})"""


_FILL_SHIFTED_MASK = """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
inputs = fill_mask.tokenizer({masked}, return_tensors="pt")
position = inputs["input_ids"][0].tolist().index(fill_mask.tokenizer.mask_token_id)
# What stands at the mask is predicted at the position before it, where the pipeline alone does not look.
logits = fill_mask.model(**inputs.to(fill_mask.model.device)).logits[0, position - 1]
predictions = fill_mask.tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist())"""


_SCORE_TEXT = """\
from hf_pretrain import causal_log_likelihoods
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
scores = causal_log_likelihoods(model, tokenizer, [{sentence}], left_to_right=True)"""

# With a graph that is compiled, targets are rounded up to this where causal examples add as many as they have tokens.
_COMPILED_TARGETS = 512


class EncoderTrainer(PretrainingTrainer):
    """Trains an [`EncoderForPreTraining`] with any heads that can share it."""

    objective = ObjectiveDescription(
        name="encoder",
        title="Pre-training of an encoder",
        description="One encoder is trained with several objectives, each with a loss of its own.",
        metrics=METRICS,
        pipeline_tag="fill-mask",
        usage=_FILL_MASK,
    )

    option_classes = (ModelArguments, EncoderTrainingArguments)

    def build_model(
        self, options: ModelArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> EncoderForPreTraining:
        """Return the encoder with the heads that the objectives ask for."""
        return build_model(options, args, data, stock=stock)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForEncoder:
        """Return the collator of all heads."""
        return DataCollatorForEncoder(
            tokenizer,
            heads=args.heads,
            word_order_probability=args.word_order_probability,
            word_order_size=args.word_order_size,
            keep_identity_order=args.keep_identity_order,
            span_positions=args.span_positions,
            shifted=args.shifted,
            masking=args.masking,
            seed=args.seed,
            target_slots=_COMPILED_TARGETS if args.torch_compile and args.has_clm else None,
        )

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return the examples of each objective, mixed in their shares."""
        # As of causal language modelling: where text is cut at the end of a row, no token of it stands there.
        if isinstance(collator, DataCollatorForEncoder) and data.description.get("block_mode") in JOINING_MODES:
            collator.predicts_end = False
        types = getattr(model.model.config, "type_vocab_size", None) or 0
        train, held_out = (
            encoder_examples(data, args, held_out=held_out, type_vocab_size=types) for held_out in (False, True)
        )
        return data.trainer_inputs() | {"train_dataset": train, "eval_dataset": held_out}

    def card_facts(self) -> dict[str, Any]:
        """Return the description of this run's objectives."""
        args = cast(EncoderTrainingArguments, self.args)
        weights = {name: getattr(args, f"{name}_weight", 1.0) for name in args.loss_names}
        objective = self.objective
        if args.shifted:
            # The pipeline and the Hub would read the state of the mask itself.
            usage = _FILL_SHIFTED_MASK if "mlm" in args.objectives else _SCORE_TEXT
            objective = dataclasses.replace(objective, pipeline_tag="feature-extraction", usage=usage)
        return {"objective": describe(objective, args.objectives, weights, shifted=args.shifted)}


def demonstrate(trainer: EncoderTrainer, data: PreparedData) -> None:
    """Print held-out sentences with what the run has learned to find in them: masked tokens, next tokens, or both."""
    args = cast(EncoderTrainingArguments, trainer.args)
    if "mlm" in args.objectives:
        print_filled_masks(trainer, data)
    if args.has_clm:
        print_next_tokens(trainer, data, left_to_right=True)


METHOD = Method(
    trainer=EncoderTrainer,
    description="""\
Pre-train an encoder with any combination of objectives, from scratch or from a checkpoint.

    hf-pretrain encoder --objectives mlm sop --train_file corpus.txt --output_dir my-encoder
    hf-pretrain albert_small --train_file corpus.txt --output_dir my-albert
    hf-pretrain structbert_small --train_file corpus.txt --output_dir my-structbert --word_order_weight 0.5
    hf-pretrain encoder --objectives mlm clm --train_file corpus.txt --output_dir my-gpt-bert
    hf-pretrain xlm --language_file en=en.txt de=de.txt --parallel_file en-de=a.en,a.de --output_dir my-xlm
    accelerate launch trainers/encoder.py --config trainers/recipes/spanbert.yaml --train_file corpus.txt --output_dir my-spanbert

bert, roberta, albert, spanbert, structbert, unilm, xlm and gpt_bert are this program with the recipe of a paper; bert_small and
the like have its objectives at the default sizes. With `--demo_corpus true` it trains on the docstrings of the installed Python
packages.""",
    arguments=(MultilingualDataArguments, ModelArguments, EncoderTrainingArguments),
    learning=Learning(left={"mlm_loss": 0.44}),
    tiny_options={"objectives": ["mlm", "sop", "word_order"], "word_order_probability": 0.3},
    load=load_examples,
    demonstrate=demonstrate,
)


class MaskedLMTrainer(PretrainingTrainer):
    """Trains an [`EncoderForPreTraining`] to fill in masked tokens, and nothing else."""

    objective = describe(
        ObjectiveDescription(
            name="mlm", title="Masked language modelling", description="", pipeline_tag="fill-mask", usage=_FILL_MASK
        ),
        ["mlm"],
        {"mlm": 1.0},
    )
    option_classes = (ModelArguments, MaskedLMTrainingArguments)

    def build_model(
        self, options: ModelArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> EncoderForPreTraining:
        """Return the masked language model."""
        return EncoderForPreTraining.from_arguments(options, data.tokenizer, stock=stock)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForMaskedLM:
        """Return the collator of masking."""
        return DataCollatorForMaskedLM(tokenizer, masking=args.masking, seed=args.seed)


MASKED_LM = Method(
    trainer=MaskedLMTrainer,
    description="""\
Pre-train a masked language model, from scratch or from a checkpoint.

    hf-pretrain mlm --train_file corpus.txt --output_dir my-bert
    hf-pretrain mlm --model_name_or_path bert-base-uncased --train_file corpus.txt --output_dir my-domain-bert
    accelerate launch trainers/mlm.py --config trainers/recipes/roberta_base.yaml --train_file corpus.txt --output_dir my-roberta

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForMaskedLM.from_pretrained("my-bert")`.""",
    arguments=(DataArguments, ModelArguments, MaskedLMTrainingArguments),
    learning=Learning(left={"mlm_loss": 0.44}),
    demonstrate=print_filled_masks,
)
