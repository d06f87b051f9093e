"""Load the data and build the model that a list of objectives asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_pretrain.data.lm_mode_views import NUM_MODE_TYPES
from hf_pretrain.data.multilingual import MultilingualDataArguments, prepare_multilingual
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import ModelArguments, from_pretrained
from hf_pretrain.modeling.encoder import EncoderForPreTraining
from hf_pretrain.modeling.isolation import check_isolation
from hf_pretrain.modeling.languages import known_languages, language_changes, set_languages
from hf_pretrain.modeling.lm_modes import check_lm_modes
from hf_pretrain.objectives.encoder.arguments import EncoderTrainingArguments
from hf_pretrain.training.program import load_data
from hf_pretrain.training.recurrence import global_batch_size


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
    model_args: ModelArguments, args: EncoderTrainingArguments, data: PreparedData
) -> EncoderForPreTraining:
    """Load or build the encoder with the heads that the objectives ask for, and refuse one that cannot do as they ask.

    Raises:
        InputError: If the model cannot be loaded or built, does not fit the data, or lets tokens see what they must not.
    """
    model = EncoderForPreTraining.from_arguments(
        model_args,
        data.tokenizer,
        heads=args.heads,
        changes=_config_changes(model_args.model_type, args, data),
        pair_classes=3 if args.pair_objective == "sentence_structure" else 2,
        pair_task=args.pair_objective,
        span_positions=args.span_positions,
        has_bitext="tlm" in args.objectives,
    )
    check_model_fits(model.model, data.tokenizer, block_size=data.block_size)
    if data.languages is not None:
        set_languages(model.model.config, data.languages)
    if data.isolates_documents:
        check_isolation(model.model, length=data.block_size)
    if args.has_modes:
        check_lm_modes(model.model)
    # Once more: which parameters are reached depends on the languages.
    model.try_out()
    return model


def _config_changes(model_type: str, args: EncoderTrainingArguments, data: PreparedData) -> dict[str, Any]:
    """Return the configuration values of a model from scratch that the objectives ask for."""
    changes = {} if data.languages is None else language_changes(model_type, data.languages)
    types = NUM_MODE_TYPES if args.has_modes else 2 if args.pair_objective else 0
    known = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    own = changes.get("type_vocab_size", getattr(known, "type_vocab_size", None))
    # What has token types can tell segments apart, RoBERTa too, which has only one of its own.
    if own and types > own:
        changes["type_vocab_size"] = types
    return changes
