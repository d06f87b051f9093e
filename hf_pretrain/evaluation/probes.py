"""Frozen encoders: the features of texts, and what a linear classifier reads off them.

[`encode`] is the whole way from texts, or pairs of texts, to features. Its two halves are used elsewhere too: [`tokenize_inputs`]
makes token ids, and [`run_encoder`] feeds them to an encoder in batches of about one length. [`probe_predictions`] trains a
linear probe on features and predicts others; [`probe_accuracy`] measures that for classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.metrics import batches_by_length, checked_texts, encode_texts, stack_characters
from hf_pretrain.modeling.backbone import evaluating, longest_sequence, reads_characters, takes_input
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.pooling import pool_states

Pooling = Literal["mean", "cls", "max", "last", "eos"]
"""How the states of a text's tokens become one vector."""
Inputs = Sequence[str] | Sequence[tuple[str, str]]
"""Texts, or pairs of texts."""
Tokenized = Mapping[str, list[Any]]
"""`input_ids` of each text, and where the encoder takes them `token_type_ids`, and `character_ids` ``[L, K]``."""
Batch = dict[str, torch.Tensor]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# One row in so many of the training set chooses the strength of regularisation.
_HELD_OUT_EVERY = 5
# More than any text; tokenizers without a limit name a number that their backend cannot hold.
_NO_LIMIT = 1 << 30
# Names of the kinds of pooling in a sentence-transformers folder, where they are others.
_MODES = {"last": "lasttoken", "eos": "lasttoken"}
_SHOWN = 40
# Texts that are tokenized at once.
_TOKENIZED = 4096


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Inputs,
    *,
    pooling: Pooling = "mean",
    layer: int | Sequence[int] = -1,
    combination: str | Sequence[float] = "concat",
    max_length: int | None = None,
    batch_size: int = 64,
    bf16: bool = False,
) -> np.ndarray:
    """Return a feature vector of each text, or of each pair of texts, from a frozen encoder.

    Args:
        model: A stock model, with a head or without; the head is not used. Of an encoder-decoder the encoder is.
        tokenizer: Its tokenizer.
        texts: The texts, or pairs of texts. The name of a special token in a text is text like any other.
        pooling: "mean" or "max" of all tokens' states, special tokens included, or the state of one token: the first ("cls"),
            the last ("last"), or the end token that the tokenizer adds ("eos").
        layer: Which states: 0 for the embeddings, 1 to L for the layers, or counted from the end; -1 is the model's output.
            Several layers are combined.
        combination: How several layers are combined, before the pooling: side by side ("concat"), by their "sum" or "mean", or a
            weight for each of them. ELMo's mix has the weights γ · softmax(s).
        max_length: Most tokens of a text, special ones included; what goes beyond is cut off, and the special tokens stay. By
            default as many as the model has positions and the tokenizer takes.
        batch_size: Texts in a batch; they are sorted by length first.
        bf16: Compute in bfloat16, by autocast.

    Returns:
        ``float32 [N, D]``, in the order of the texts; of n layers side by side ``[N, n D]``, the first layer first.

    Raises:
        InputError: If an option is not right, the model lacks ids or positions, or a text has no token, or no end token.
    """
    base = encoder_of(model)
    check_range(batch_size, "[1, inf)", name="batch_size")
    layers = check_features(base, tokenizer, pooling=pooling, layer=layer, combination=combination)
    tokenized = tokenize_inputs(base, tokenizer, texts, max_length=max_length)
    return encode_tokenized(
        base,
        tokenizer,
        tokenized,
        pooling=pooling,
        layers=layers,
        combination=combination,
        batch_size=batch_size,
        bf16=bf16,
    )


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a stock model that reads text: the model without its head, or the encoder of an encoder-decoder."""
    base: PreTrainedModel = model.base_model
    if getattr(base.config, "is_encoder_decoder", False) and hasattr(base, "get_encoder"):
        base = base.get_encoder()
    return base


def check_features(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: Pooling,
    layer: int | Sequence[int],
    combination: str | Sequence[float],
) -> tuple[int, ...]:
    """Refuse features that an encoder cannot give, and options without an effect; the arguments are those of [`encode`].

    Returns:
        The layers.
    """
    num_layers = base.config.num_hidden_layers
    check_choice(pooling, get_args(Pooling), name="pooling")
    layers = (int(layer),) if isinstance(layer, Integral) else tuple(layer)  # type: ignore[arg-type]
    for number in layers:
        if not -num_layers - 1 <= number <= num_layers:
            raise InputError(
                f"layer={number} is none of the {num_layers} of {type(base).__name__}: use 0 to {num_layers}"
            )
    if not layers:
        raise InputError("layer=() names no layer: give at least one, -1 for the model's output")
    if isinstance(combination, str):
        check_choice(combination, ("concat", "sum", "mean"), name="combination")
        if len(layers) == 1 and combination != "concat":
            raise InputError(f"combination={combination!r} has no effect with one layer ({layers[0]}): leave it out")
    elif len(combination) != len(layers):
        raise InputError(
            f"combination has {len(combination)} weights for {len(layers)} layers: give one for each layer"
        )
    elif not np.isfinite(np.asarray(combination, dtype=np.float64)).all():
        raise InputError(f"combination={list(combination)} has a weight that is not finite")
    if pooling == "eos" and _end_token(tokenizer) is None:
        raise InputError("pooling='eos' needs a tokenizer with an eos_token or a sep_token: use pooling='last'")
    return layers


def tokenize_inputs(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Inputs,
    *,
    max_length: int | None = None,
    reads_special_tokens: bool = False,
) -> Tokenized:
    """Return the token ids of texts, or of pairs of texts, for an encoder.

    Args:
        base: The encoder.
        tokenizer: Its tokenizer.
        texts: The texts or pairs.
        max_length: Most tokens, special ones included; by default as many as the encoder has positions and the tokenizer takes.
        reads_special_tokens: Whether the name of a special token in a text is that token, as in sentence-transformers.

    Raises:
        InputError: If something is no text, the model lacks ids or positions, or a text has no token.
    """
    length = _longest(base, tokenizer) if max_length is None else max_length
    check_range(length, "[1, inf)", name="max_length")
    spells = reads_characters(base) and "character_ids" in tokenizer.model_input_names
    if not spells:
        check_model_fits(base, tokenizer, block_size=length)
    first, second = _checked_inputs(texts)
    tokenized: dict[str, list[Any]] = {"input_ids": []}
    for begin in range(0, len(first), _TOKENIZED):
        part = slice(begin, begin + _TOKENIZED)
        options: dict[str, Any] = {"truncation": True, "max_length": length}
        options |= {} if second is None else {"text_pair": second[part]}
        encode_part = tokenizer if reads_special_tokens else partial(encode_texts, tokenizer)
        encoding = encode_part(first[part], **options)
        names = ["input_ids"]
        if "token_type_ids" in encoding and takes_input(base, "token_type_ids"):
            names.append("token_type_ids")
        for name in names:
            tokenized.setdefault(name, []).extend(encoding[name])
        if spells:
            # Lists of these would be five times as large.
            rows = [np.asarray(row, dtype=np.int16) for row in encoding["character_ids"]]
            tokenized.setdefault("character_ids", []).extend(rows)
    empty = next((number for number, ids in enumerate(tokenized["input_ids"]) if not ids), None)
    if empty is not None:
        raise InputError(f"texts[{empty}]={first[empty][:_SHOWN]!r} has no token, and so no vector: leave it out")
    return tokenized


def _checked_inputs(texts: Inputs) -> tuple[list[str], list[str] | None]:
    """Return the texts, or the first and the second ones of pairs."""
    if isinstance(texts, (str, bytes)):
        raise InputError("texts is one text: give a list of texts")
    given: list[Any] = list(texts)
    is_pair = [not isinstance(text, (str, bytes)) and hasattr(text, "__len__") and len(text) == 2 for text in given]
    if not any(is_pair):
        return checked_texts(given), None
    if not all(is_pair):
        single = is_pair.index(False)
        raise InputError(
            f"texts[{single}]={str(given[single])[:_SHOWN]!r} is no pair, but others are: give pairs of texts alone"
        )
    return checked_texts([pair[0] for pair in given]), checked_texts([pair[1] for pair in given])


def _longest(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a text are read where nothing says so."""
    limits = (
        longest_sequence(base),
        getattr(base.config, "max_position_embeddings", None),
        tokenizer.model_max_length,
    )
    # Some configurations say -1 for no limit.
    return min(_NO_LIMIT, *(int(limit) for limit in limits if limit is not None and limit > 0))


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode_tokenized(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Tokenized,
    *,
    pooling: Pooling,
    layers: Sequence[int],
    combination: str | Sequence[float],
    batch_size: int,
    bf16: bool,
) -> np.ndarray:
    """Return the features of token ids; the arguments are those of [`encode`], checked by [`check_features`].

    Raises:
        InputError: If a text has no end token, for the pooling "eos".
    """
    ends = _last_ends(tokenized, _end_token(tokenizer)) if pooling == "eos" else None
    is_wide = combination == "concat"

    def pooled(output: Any, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        states = [
            (output.last_hidden_state if layer == -1 else output.hidden_states[layer]).float() for layer in layers
        ]
        mask = batch["attention_mask"]
        if ends is not None:
            columns = torch.arange(mask.shape[1], device=mask.device)
            mask = (columns <= torch.from_numpy(ends[rows]).to(mask.device)[:, None]).to(mask.dtype)
        return pool_states(_combined(states, combination), mask, mode=_MODES.get(pooling, pooling))

    width = base.config.hidden_size * (len(layers) if is_wide else 1)
    hidden = {"output_hidden_states": True} if any(layer != -1 for layer in layers) else {}
    return run_encoder(
        base, tokenizer, tokenized, pooled=pooled, width=width, batch_size=batch_size, bf16=bf16, **hidden
    )


def _last_ends(tokenized: Tokenized, end: int | None) -> np.ndarray:
    """Return the position of the last end token of each text: `int64 [N]`."""
    ends = np.empty(len(tokenized["input_ids"]), dtype=np.int64)
    for number, ids in enumerate(tokenized["input_ids"]):
        found = np.flatnonzero(np.asarray(ids) == end)
        if not len(found):
            raise InputError(
                f"texts[{number}] has no end token (id {end}) for pooling='eos': let the tokenizer add one, or use pooling='last'"
            )
        ends[number] = found[-1]
    return ends


def _combined(states: list[torch.Tensor], combination: str | Sequence[float]) -> torch.Tensor:
    """Combine the states of layers, ``[B, L, D]`` each."""
    if combination == "concat":
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    weights = [1.0] * len(states) if isinstance(combination, str) else combination
    total = torch.stack([weight * layer for weight, layer in zip(weights, states, strict=True)]).sum(0)
    return total / len(states) if combination == "mean" else total


def run_encoder(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenized: Tokenized,
    *,
    pooled: Callable[[Any, Batch, np.ndarray], torch.Tensor],
    width: int,
    batch_size: int,
    bf16: bool = False,
    **options: Any,
) -> np.ndarray:
    """Return the vector of each text of token ids, without dropout and without gradients.

    Padding is on the right, whatever side the tokenizer pads on, so that each token has the position that it has alone.

    Args:
        base: The encoder.
        tokenizer: Its tokenizer.
        tokenized: What [`tokenize_inputs`] returned.
        pooled: Makes the vectors, ``[B, E]``, of the encoder's output, the batch, and the numbers of the texts in it.
        width: Width E of the vectors.
        batch_size: Texts in a batch.
        bf16: Compute in bfloat16, by autocast.
        **options: Further inputs of the encoder, such as `output_hidden_states`.

    Returns:
        ``float32 [N, E]``, in the order of the texts.
    """
    sequences, types, characters = (tokenized.get(name) for name in ("input_ids", "token_type_ids", "character_ids"))
    assert sequences is not None, "tokenize_inputs makes them"
    vectors = np.empty((len(sequences), width), dtype=np.float32)
    batches = batches_by_length(
        sequences, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size, device=base.device, name="Encoding"
    )
    with evaluating(base), torch.autocast(base.device.type, dtype=torch.bfloat16, enabled=bf16):
        for rows, batch in batches:
            if types is not None:
                column, _ = stack_column([{"token_type_ids": types[row]} for row in rows], "token_type_ids")
                batch["token_type_ids"] = torch.from_numpy(column.astype(np.int64)).to(base.device)
            if characters is not None:
                batch["character_ids"] = stack_characters([characters[row] for row in rows]).to(base.device)
            vectors[rows] = pooled(base(**batch, **options), batch, rows).float().cpu().numpy()
    return vectors


class ProbeScore(NamedTuple):
    """How well a probe classifies what it was not trained on.

    Attributes:
        accuracy: Share of right answers.
        matthews_correlation: Zero for any guess that does not look at the features, one if all answers are right.
        regularization: The inverse strength of regularisation that was chosen (scikit-learn's `C`).
    """

    accuracy: float
    matthews_correlation: float
    regularization: float


def probe_accuracy(
    train_features: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test_features: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
) -> ProbeScore:
    """Train a logistic regression on features and measure it on others.

    The features are standardised by the training set. The strength of regularisation is the one with the best Matthews
    correlation on a fifth of the training set, the stronger of equals; then all of it is used. The test set chooses nothing.

    Args:
        train_features: ``[N, D]``.
        train_labels: ``[N]`` classes.
        test_features: ``[M, D]``.
        test_labels: ``[M]`` classes.
        seed: Key of the choice of that fifth.

    Raises:
        InputError: If there is one class only, rows and labels are not as many, or a feature is not finite.
    """
    # Training with pairs encodes texts as a probe does, and starts without it.
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    _check_rows(train=(train_features, train_labels), test=(test_features, test_labels))
    predicted, best = probe_predictions(train_features, train_labels, test_features, seed=seed)
    return ProbeScore(
        accuracy=float(accuracy_score(test_labels, predicted)),
        matthews_correlation=float(matthews_corrcoef(test_labels, predicted)),
        regularization=best,
    )


def probe_predictions(
    train_features: np.ndarray,
    train_targets: Sequence[float] | np.ndarray,
    test_features: np.ndarray,
    *,
    kind: Literal["classification", "regression"] = "classification",
    seed: int = 0,
) -> tuple[np.ndarray, float]:
    """Train a linear probe on features, and predict others: a logistic regression, or of values a ridge regression.

    The strength of regularisation is chosen as [`probe_accuracy`] says; of values by the best R².

    Args:
        train_features: ``[N, D]``.
        train_targets: ``[N]`` classes or values.
        test_features: ``[M, D]``.
        kind: What the targets are.
        seed: Key of the choice of the fifth that chooses the strength.

    Returns:
        ``[M]`` predicted classes or values, and the inverse strength that was chosen.

    Raises:
        InputError: If there is one class only, rows and targets are not as many, or a feature is not finite.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import matthews_corrcoef, r2_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_choice(kind, ("classification", "regression"), name="kind")
    _check_rows(train=(train_features, train_targets), test=(test_features, test_features))
    targets = np.asarray(train_targets)
    order = draws.permutation(len(targets), seed=seed, stream="probe")
    # By class, so that the fifth has its share of each.
    order = order[np.argsort(targets[order], kind="stable")]
    is_held_out = np.arange(len(order)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    fit, held_out = order[~is_held_out], order[is_held_out]
    if len(np.unique(targets[fit])) < 2:
        what = "class" if kind == "classification" else "value"
        raise InputError(f"train_labels has one {what} in {len(fit)} rows: a probe needs two to tell apart")
    is_class = kind == "classification"
    gain = matthews_corrcoef if is_class else r2_score

    def probe(strength: float, rows: np.ndarray) -> Any:
        head = LogisticRegression(C=strength, max_iter=1000) if is_class else Ridge(alpha=1 / strength)
        return make_pipeline(StandardScaler(), head).fit(train_features[rows], targets[rows])

    gains = [
        # A fifth of fewer than five rows is empty, and chooses nothing.
        gain(targets[held_out], probe(strength, fit).predict(train_features[held_out])) if len(held_out) else 0.0
        for strength in _STRENGTHS
    ]
    best = _STRENGTHS[int(np.argmax(gains))]
    return probe(best, order).predict(test_features), best


def _check_rows(**parts: tuple[np.ndarray, Any]) -> None:
    """Refuse features without rows, with another number of labels, or with numbers that are not finite."""
    for name, (features, given) in parts.items():
        if len(features) != len(given) or not len(features):
            raise InputError(
                f"{name}_features has {len(features)} rows and {name}_labels {len(given)}: give as many, at least one"
            )
        if not np.isfinite(features).all():
            raise InputError(f"{name}_features has numbers that are not finite: was the model's loss finite?")
