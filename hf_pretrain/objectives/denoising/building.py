"""What denoising needs before its first step: tokens, examples and an encoder-decoder; what does not fit is refused here.

The order: the tokens that a noise puts into texts, the length of a text whose input fits, the examples, and the stock model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.fragments import MODE_TOKENS, sentinels_needed
from hf_pretrain.corruption.masking import special_table
from hf_pretrain.corruption.sentinels import SENTINEL_NAMES, sentinel_ids
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.tokenizers import add_special_tokens
from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.data.prepare import PreparedData, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.configuration import (
    attention_options,
    build_encoder_decoder_config,
    check_without_vectors,
    fill_word_table,
    special_ids,
)
from hf_pretrain.modeling.encoder_decoders import (
    check_encoder_decoder,
    fill_special_ids,
    join_halves,
    open_encoder_decoder,
)
from hf_pretrain.modeling.loading import from_config
from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments, DenoisingTrainingArguments
from hf_pretrain.training.program import load_data
from hf_pretrain.training.rehearsal import made_up_data, made_up_tokenizer

# As many as T5 has, so that the texts may become longer later.
_LEAST_SENTINELS = 100
# Special tokens around a text, in every tokenizer that a run trains.
_FRAME = 2


class NoiseTokens(NamedTuple):
    """Ids that noises put into texts; one that a noise does not need is -1 or empty.

    Attributes:
        mask: The mask token.
        sentinels: `[S]` int64, the sentinels in order.
        modes: The token of each mode of UL2.
        ordinary: `[N]` int64, all tokens that are not special.
    """

    mask: int = -1
    sentinels: np.ndarray = np.zeros(0, dtype=np.int64)
    modes: Mapping[str, int] = {}  # noqa: RUF012 (never changed)
    ordinary: np.ndarray = np.zeros(0, dtype=np.int64)


def noise_tokens(args: DenoisingTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> NoiseTokens:
    """Return the ids that the noise of a run puts into texts.

    Raises:
        InputError: If the tokenizer lacks one, or a token to pad, or one to end a target.
    """
    ids = special_ids(tokenizer)
    for role, instead, use in (
        ("pad", "", "batches are padded with"),
        ("eos", " and no sep_token", "a decoder ends with"),
    ):
        if ids[role] is None:
            raise _lacks(tokenizer, f"{role}_token{instead}", use, f"{{'{role}_token': ...}}")
    if args.noise in ("t5", "ul2") and not len(sentinel_ids(tokenizer)):
        use = f"noise={args.noise!r} puts in the place of spans"
        raise _lacks(tokenizer, "sentinels (<extra_id_0>, <extra_id_1>, ...)", use, "{'extra_special_tokens': [...]}")
    needs_mask = {"bart": {"token_masking", "infilling"} & set(args.noise_steps), "mass": {"mass"}}.get(args.noise)
    if needs_mask and tokenizer.mask_token_id is None:
        use = f"noise={args.noise!r} puts in the place of tokens"
        raise _lacks(tokenizer, "mask_token", use, "{'mask_token': '<mask>'}")
    vocabulary, modes = tokenizer.get_vocab(), _modes(args)
    for token in modes.values():
        if token not in vocabulary:
            use = "noise='ul2' puts in front of texts"
            raise _lacks(tokenizer, f"token {token}", use, f"{{'extra_special_tokens': {[*modes.values()]}}}")
    is_special = special_table(tokenizer)[: len(tokenizer)]
    return NoiseTokens(
        mask=-1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id,
        sentinels=sentinel_ids(tokenizer),
        modes={mode: vocabulary[token] for mode, token in modes.items()},
        ordinary=np.flatnonzero(~is_special),
    )


def _modes(args: DenoisingTrainingArguments) -> dict[str, str]:
    """Return the token of each mode that a denoiser of the run has."""
    used = {denoiser.mode for denoiser in args.parsed_denoisers()} if args.noise == "ul2" else set()
    return {mode: token for mode, token in MODE_TOKENS.items() if mode in used}


def _lacks(tokenizer: PreTrainedTokenizerBase, what: str, use: str, addition: str) -> InputError:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return InputError(
        f"tokenizer={name!r} has no {what}, which {use}: add it with tokenizer.add_special_tokens({addition}) and give a model "
        "that is continued more rows (resize_token_embeddings), choose another noise, or name no tokenizer, to train one"
    )


def check_tokens(
    args: DenoisingTrainingArguments, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> None:
    """Refuse a tokenizer without what the noise needs for the texts that the options cut; no text is needed for it.

    Args:
        args: The noise.
        tokenizer: The tokenizer of the run.
        data_args: How text is cut, as the user wishes it; see [`cut_text`].

    Raises:
        InputError: Naming what is missing, how many are needed, and the fix.
    """
    if data_args.prepared_data is not None and data_args.tokenizer_name is None:
        _check_prepared_tokens(args, tokenizer, data_args)
    noise: Any = args.make_noise(tokenizer)
    if args.noise not in ("t5", "ul2"):
        return
    length = _text_length(cut_text(data_args, args, tokenizer=tokenizer), tokenizer)
    try:
        noise.check_length(length)
    except InputError as error:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        needed, found = sentinels_for(args, length), len(noise.sentinels)
        upto = "up to " if args.span_choice == "iid" and args.noise == "t5" else ""
        raise InputError(
            f"noise={args.noise!r} needs {upto}{needed} sentinels for block_size={data_args.block_size}, and tokenizer={name!r} "
            f"has {found}: add <extra_id_{found}> to <extra_id_{needed - 1}> to it (tokenizer.add_special_tokens, and rows for "
            "them to a model that is continued), lower block_size, or name no tokenizer, to train one"
        ) from error


def _check_prepared_tokens(
    args: DenoisingTrainingArguments, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments
) -> None:
    """Refuse a tokenizer of prepared data without the tokens of the noise, which nobody can add any more."""
    wanted, known = added_tokens(args, data_args), tokenizer.get_vocab()
    modes = [token for token in wanted if token in MODE_TOKENS.values()]
    if wanted and (not known.keys() >= set(modes) or not any(form.format(0) in known for form in SENTINEL_NAMES)):
        names = " ".join([*modes, wanted[len(modes)], "...", wanted[-1]])
        raise InputError(
            f"noise={args.noise!r} needs tokens that the tokenizer of prepared_data={data_args.prepared_data!r} lacks, such as "
            f"sentinels: prepare the text with --added_tokens {names}, or with a --tokenizer_name that has them"
        )


def sentinels_for(args: DenoisingTrainingArguments, length: int) -> int:
    """Return how many sentinels texts of up to `length` tokens may need; 0 for a noise without them."""
    if args.noise == "ul2":
        denoisers = args.parsed_denoisers()
        return max(sentinels_needed(length, density=d.density, mean_length=d.mean_length) for d in denoisers)
    if args.noise != "t5":
        return 0
    if args.span_choice == "iid":
        return (length + 1) // 2
    rates_of_t5: dict[str, Any] = {"density": args.noise_density, "mean_length": args.mean_span_length}
    return sentinels_needed(length, **rates_of_t5, random_roll=args.random_roll)


def added_tokens(args: DenoisingTrainingArguments, data_args: DataArguments) -> list[str]:
    """Return the special tokens that the noise needs in a tokenizer that the run trains, beside those of every one."""
    if args.noise not in ("t5", "ul2"):
        return []
    length = cut_text(data_args, args).block_size - _FRAME
    count = max(_LEAST_SENTINELS, sentinels_for(args, length))
    return [*_modes(args).values(), *(SENTINEL_NAMES[0].format(number) for number in range(count))]


def cut_text(
    data_args: DataArguments, args: DenoisingTrainingArguments, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> DataArguments:
    """Return how text is cut so that the encoder's input has `block_size` tokens: longer where spans become sentinels.

    With T5's noise, a text of 568 tokens and its end token become an input of 512. UL2's texts are as long as they can be for the
    denoiser with the longest input. Other noises leave a text about as long as it is.

    Args:
        data_args: How text is cut, where `block_size` is the most tokens of an input.
        args: The noise.
        tokenizer: Puts special tokens around a text; by default two, as all tokenizers do that a run trains.

    Returns:
        The options with the `block_size` of the text, special tokens included.
    """
    if args.noise not in ("t5", "ul2"):
        return data_args
    frame = _FRAME if tokenizer is None else BlockTemplate.of(tokenizer).num_special_tokens
    room = data_args.block_size - frame
    noise = _noise_without_ids(args)
    # No text has a shorter input than a shorter text; at the least, a token of 100 stays in it.
    longest = bisect_right(range(1, 100 * max(room, 1)), room, key=lambda length: noise.longest_pair(length)[0])
    # Not shorter than other noises have it: the mode token alone may be too much for texts of a few tokens.
    return replace(data_args, block_size=max(longest, room) + frame)


def longest_pair(
    args: DenoisingTrainingArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> tuple[int, int]:
    """Return the most tokens of an input and of what the decoder reads, special tokens included.

    Args:
        args: The noise.
        tokenizer: Puts special tokens around a text.
        block_size: Most tokens of a block that is cut from text, special tokens included; see [`cut_text`].
    """
    if args.noise == "bart":
        return block_size, block_size
    frame = BlockTemplate.of(tokenizer).num_special_tokens
    noise = _noise_without_ids(args)
    inputs, targets = noise.longest_pair(max(block_size - frame, 0))
    # A fragment's positions are those of the text.
    return inputs + frame, block_size if args.noise == "mass" else targets + noise.ends_target


def _noise_without_ids(args: DenoisingTrainingArguments) -> Any:
    """Return the noise of a run to ask it for lengths; it cannot be called."""
    modes = dict.fromkeys(MODE_TOKENS, -1)
    return args.noise_with(
        mask_token_id=-1, sentinels=np.zeros(0, np.int64), mode_ids=modes, random_ids=np.zeros(1, np.int64)
    )


def _text_length(cut: DataArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    return cut.block_size - BlockTemplate.of(tokenizer).num_special_tokens


def load_examples(
    data_args: DataArguments,
    model_args: DenoisingModelArguments,
    args: DenoisingTrainingArguments,
    *,
    special_tokens: Sequence[str] = ("pad",),
) -> PreparedData:
    """Read text and cut it for the noise, with a tokenizer that has the tokens of the noise; see [`load_data`].

    A tokenizer that is trained gets them beside its vocabulary. The description says the `block_size` of the options, the data
    that of the text.

    Raises:
        InputError: As [`check_tokens`], before any text is read; or as [`load_data`].
    """

    def prepare(options: DataArguments, *, tokenizer: PreTrainedTokenizerBase | None, **others: Any) -> PreparedData:
        if tokenizer is not None:
            check_tokens(args, tokenizer, options)
        cut = cut_text(options, args, tokenizer=tokenizer)
        data = prepare_data(cut, tokenizer=tokenizer, added_tokens=added_tokens(args, options), **others)
        return _as_wished(data, options)

    return load_data(data_args, model_args, args, special_tokens=special_tokens, prepare=prepare)


def made_up_examples(
    data_args: DataArguments,
    model_args: DenoisingModelArguments,
    args: DenoisingTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreparedData:
    """Return examples as [`load_examples`] would, of a text that is none; see [`made_up_data`].

    Raises:
        InputError: As [`check_tokens`].
    """
    if tokenizer is None:
        tokenizer = made_up_tokenizer(data_args)
        add_special_tokens(tokenizer, added_tokens(args, data_args))
    check_tokens(args, tokenizer, data_args)
    cut = cut_text(data_args, args, tokenizer=tokenizer)
    return _as_wished(made_up_data(cut, model_args, args, tokenizer), data_args)


def _as_wished(data: PreparedData, data_args: DataArguments) -> PreparedData:
    """Return data whose description has the `block_size` of the options, and not that of the text."""
    wished = {"block_size": data_args.block_size}
    options = data.description.get("options")
    found = data.description | wished | ({} if options is None else {"options": options | wished})
    if data.block_size != data_args.block_size:
        found["text_block_size"] = data.block_size
    return replace(data, description=found)


def build_stock_model(
    options: DenoisingModelArguments, tokenizer: PreTrainedTokenizerBase, *, stock: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Open, join or build the encoder-decoder of the options, or check the one that is there.

    Args:
        options: What to open, to join or to build.
        tokenizer: The tokenizer of the run: a new model gets its special ids and as many rows as it has tokens.
        stock: A stock encoder-decoder that is there, with its language-model head.

    Returns:
        A stock model that `AutoModelForSeq2SeqLM` opens once it is saved.

    Raises:
        InputError: If a checkpoint is no encoder-decoder, or cannot be joined, or sizes do not fit the architecture.
    """
    attention = attention_options(options)
    if stock is not None:
        check_encoder_decoder(stock)
        check_without_vectors(options)
        model = stock
    elif options.encoder_name_or_path is not None:
        decoder = options.decoder_name_or_path
        model = join_halves(options.encoder_name_or_path, decoder, tokenizer=tokenizer, **attention)
    elif options.model_name_or_path is not None:
        model = open_encoder_decoder(options.model_name_or_path, **attention)
    else:
        config = build_encoder_decoder_config(options, tokenizer, num_decoder_layers=options.num_decoder_layers)
        model = fill_word_table(from_config(AutoModelForSeq2SeqLM, config, **attention), options, tokenizer)
    fill_special_ids(model, tokenizer)
    return model


def check_decoder_length(model: PreTrainedModel, length: int) -> None:
    """Refuse targets that are longer than a decoder's table of positions.

    Args:
        model: A stock encoder-decoder.
        length: Most tokens that the decoder reads, special tokens included; see [`longest_pair`].

    Raises:
        InputError: Naming the length, the positions, and the fix.
    """
    positions = longest_sequence(model.get_decoder())
    if positions is not None and length > positions:
        raise InputError(
            f"targets of up to {length} tokens are longer than the {positions} positions of the decoder of "
            f"{type(model).__name__}: set --block_size lower, or raise --max_position_embeddings when training from scratch"
        )
