"""Encoder-decoders of transformers: opened, checked, and joined from an encoder and a decoder with fresh attention to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import can_attend_to_encoder, decoder_start, vocabulary_size
from hf_pretrain.modeling.configuration import special_ids
from hf_pretrain.modeling.loading import from_pretrained, say_once

# Architectures that can be the decoder of another encoder, those that most people want.
_DECODERS = "bert, roberta, electra, camembert, xlm-roberta or gpt2"
# Tables are filled up to a round number of rows, never by as many.
_MOST_FILLING = 128


def open_encoder_decoder(name: str, **options: Any) -> PreTrainedModel:
    """Open an encoder-decoder with its language-model head.

    Args:
        name: Folder or repository.
        **options: Passed on to transformers.

    Raises:
        InputError: If the checkpoint is of another kind, or holds one half; with what to do.
    """
    config = from_pretrained(AutoConfig, name)
    if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        raise _no_encoder_decoder(name, config)
    model: PreTrainedModel = from_pretrained(AutoModelForSeq2SeqLM, name, announce=False, **options)
    for half, part in (("an encoder", model.get_encoder()), ("a decoder", model.get_decoder())):
        own = _own_parameters(model, part)
        if own and own <= set(model.fresh_parameters):
            raise InputError(
                f"model_name_or_path={name!r} holds no weights of {half}, such as {min(own)}: name a checkpoint of a whole "
                f"{type(model).__name__}"
            )
    if model.fresh_parameters:
        say_once(
            f"{name!r} is opened as a {type(model).__name__}, with fresh weights in {_summary(model.fresh_parameters)}"
        )
    return model


def _no_encoder_decoder(name: str, config: PreTrainedConfig) -> InputError:
    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping
    if is_encoder:
        kind, fix = "an encoder", f"join it with a decoder by --encoder_name_or_path {name}"
    elif type(config) in AutoModelForCausalLM._model_mapping:
        kind = "a decoder"
        fix = f"name an encoder with --encoder_name_or_path, and this one with --decoder_name_or_path {name}"
    else:
        kind, fix = "none", "name one such as a BART or a T5"
    return InputError(
        f"model_name_or_path={name!r} must be an encoder-decoder, but {config.model_type} is {kind}: {fix}"
    )


def _own_parameters(model: PreTrainedModel, part: Any) -> set[str]:
    """Return the names of a part's parameters, without the table of words, which both halves may share."""
    tables = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    inside = {id(parameter) for parameter in part.parameters()} - tables
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def check_encoder_decoder(model: PreTrainedModel) -> None:
    """Refuse a model that is no encoder-decoder with a language-model head.

    Raises:
        InputError: Naming its class, and one to give instead.
    """
    name = type(model).__name__
    if not getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"model={name} is no encoder-decoder: give one such as BartForConditionalGeneration; an encoder that is saved is "
            "joined with a decoder by DenoisingModelArguments(encoder_name_or_path=...)"
        )
    if model.get_output_embeddings() is None:
        known = AutoModelForSeq2SeqLM._model_mapping.get(type(model.config), None)
        instead = getattr(known, "__name__", "a class with ForConditionalGeneration")
        raise InputError(f"model={name} has no language-model head, which the targets need: give {instead}")


def join_halves(
    encoder_name: str, decoder_name: str | None = None, *, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> EncoderDecoderModel:
    """Join the checkpoints of an encoder and a decoder, whose attention to the encoder is fresh; one line says what is.

    Args:
        encoder_name: Folder or repository of an encoder, or of any model around one.
        decoder_name: The same of a decoder; by default the encoder's own weights, in a copy.
        tokenizer: The tokenizer of both.
        **options: Passed on to transformers.

    Returns:
        The stock model; `fresh_parameters` names what is in neither checkpoint.

    Raises:
        InputError: If one of the two cannot be what it is to be, or has another vocabulary.

    Source:
        Rothe et al. 2020, Leveraging Pre-trained Checkpoints for Sequence Generation Tasks.
    """
    second = decoder_name or encoder_name
    config = from_pretrained(AutoConfig, encoder_name)
    if config.is_encoder_decoder or type(config) not in AutoModel._model_mapping:
        fix = "continue it with model_name_or_path" if config.is_encoder_decoder else "name one such as a BERT"
        raise InputError(f"encoder_name_or_path={encoder_name!r} must be an encoder, not {config.model_type}: {fix}")
    _check_decoder(second, is_encoder=decoder_name is None)
    encoder = from_pretrained(AutoModel, encoder_name, announce=False, **_role(config, False), **options)
    role = _role(from_pretrained(AutoConfig, second), True)
    decoder = from_pretrained(AutoModelForCausalLM, second, announce=False, **role, **options)
    _check_vocabulary(encoder, tokenizer, option="encoder_name_or_path", name=encoder_name)
    _check_vocabulary(decoder, tokenizer, option="decoder_name_or_path", name=second)
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    fresh = [*(f"encoder.{key}" for key in encoder.fresh_parameters)]
    fresh += [*(f"decoder.{key}" for key in decoder.fresh_parameters)]
    if fresh:
        # Where the widths differ.
        fresh += [key for key, _ in model.named_parameters() if key.startswith("enc_to_dec_proj.")]
        say_once(
            f"{encoder_name!r} is the encoder and {second!r} the decoder of an EncoderDecoderModel, with fresh weights in "
            f"{_summary(fresh)}"
        )
    model.fresh_parameters = tuple(fresh)
    return model


def _role(config: PreTrainedConfig, is_decoder: bool) -> dict[str, bool]:
    """Return the options that make a half of an architecture an encoder or a decoder, those that it has."""
    return {name: is_decoder for name in ("is_decoder", "add_cross_attention") if hasattr(config, name)}


def _summary(names: Iterable[str]) -> str:
    """Return the parts that parameters are of, without the numbers of layers, each with how many it has."""
    counts: dict[str, int] = {}
    for name in names:
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        is_cross = any("cross" in part.lower() for part in parts)
        key = "the decoder's attention to the encoder" if is_cross else ".".join(parts)
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{key} ({count} parameters)" for key, count in counts.items())


def _check_decoder(name: str, *, is_encoder: bool) -> None:
    """Refuse a checkpoint whose architecture cannot attend to an encoder."""
    config = from_pretrained(AutoConfig, name)
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if known is not None and can_attend_to_encoder(known, config):
        return
    option = "encoder_name_or_path" if is_encoder else "decoder_name_or_path"
    fix = "name its decoder with decoder_name_or_path" if is_encoder else "name another"
    raise InputError(
        f"{option}={name!r} cannot be a decoder, because {config.model_type} has no attention to an encoder: {fix}, one that can "
        f"have it ({_DECODERS}) and has the same vocabulary"
    )


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, option: str, name: str) -> None:
    """Refuse a half whose tokens are not those of the run's tokenizer."""
    rows, size = vocabulary_size(model.get_input_embeddings()), len(tokenizer)
    if not size <= rows < size + _MOST_FILLING:
        raise InputError(
            f"{option}={name!r} embeds {rows} tokens, and the tokenizer has {size}: name halves with the vocabulary of one "
            "tokenizer, or give the checkpoint its rows (resize_token_embeddings)"
        )
    try:
        own = from_pretrained(AutoTokenizer, name).get_vocab()
    except InputError:
        return  # It has no tokenizer, which the other half may have.
    known = tokenizer.get_vocab()
    other = next((token for token, number in own.items() if known.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"{option}={name!r} has another vocabulary than the tokenizer, its token {own[other]} is {other!r}: name halves with "
            "the vocabulary of one tokenizer"
        )


def fill_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model those special ids that `generate` needs and its configurations do not name."""
    ids = special_ids(tokenizer)
    wanted = {f"{role}_token_id": number for role, number in ids.items()}
    wanted["decoder_start_token_id"] = ids[decoder_start(model.config)]
    for config in (model.config, model.generation_config):
        for name, number in wanted.items():
            if number is not None and getattr(config, name, None) is None:
                setattr(config, name, number)
