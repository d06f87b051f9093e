"""Frozen probes: what a linear classifier reads off an encoder that is not trained any further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, matthews_corrcoef
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.metrics import batches_by_length, checked_texts, encode_texts
from hf_pretrain.modeling.backbone import evaluating, longest_sequence
from hf_pretrain.modeling.base import check_model_fits

Pooling = Literal["mean", "cls"]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# One row in so many of the training set chooses the strength of regularisation.
_HELD_OUT_EVERY = 5


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: Pooling = "mean",
    layer: int = -1,
    batch_size: int = 64,
) -> np.ndarray:
    """Return a feature vector of each text from a frozen encoder.

    Args:
        model: A stock model, with a head or without; the head is not used.
        tokenizer: Its tokenizer.
        texts: The texts; what is longer than the model's positions is cut off.
        pooling: "mean" of all tokens' states, special tokens included, or the state of the first token ("cls").
        layer: Which states: 0 for the embeddings, 1 to L for the layers, or counted from the end; -1 is the model's output.
        batch_size: Texts in a batch; they are sorted by length first.

    Returns:
        ``float32 [N, D]``, in the order of the texts.

    Raises:
        InputError: If there is no such pooling or layer, the model lacks ids of the tokenizer, or a text has no token.
    """
    base, texts = model.base_model, checked_texts(texts, batch_size=batch_size)
    num_layers = base.config.num_hidden_layers
    check_choice(pooling, get_args(Pooling), name="pooling")
    if not -num_layers - 1 <= layer <= num_layers:
        raise InputError(f"layer={layer} is none of the {num_layers} of {type(base).__name__}: use 0 to {num_layers}")
    check_model_fits(base, tokenizer, block_size=0)
    longest = min(longest_sequence(base) or tokenizer.model_max_length, tokenizer.model_max_length)
    sequences = [ids[:longest] for ids in encode_texts(tokenizer, texts)["input_ids"]] if texts else []
    empty = next((number for number, ids in enumerate(sequences) if not ids), None)
    if empty is not None:
        raise InputError(f"texts[{empty}]={texts[empty][:40]!r} has no token, and so no features: leave it out")
    features = np.empty((len(sequences), base.config.hidden_size), dtype=np.float32)
    with evaluating(base):
        for rows, batch in batches_by_length(
            sequences, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size, device=base.device, name="Encoding"
        ):
            output = base(**batch, output_hidden_states=layer != -1)
            hidden_BLD = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
            pooled_BD = hidden_BLD[:, 0].float() if pooling == "cls" else _mean(hidden_BLD, batch["attention_mask"])
            features[rows] = pooled_BD.cpu().numpy()
    return features


def _mean(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:  # noqa: N803
    weights_BL1 = mask_BL.unsqueeze(-1).float()
    return (hidden_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1)


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
    labels = np.asarray(train_labels)
    for name, features, given in (("train", train_features, labels), ("test", test_features, test_labels)):
        if len(features) != len(given) or not len(features):
            raise InputError(
                f"{name}_features has {len(features)} rows and {name}_labels {len(given)}: give as many, at least one"
            )
        if not np.isfinite(features).all():
            raise InputError(f"{name}_features has numbers that are not finite: was the model's loss finite?")
    order = draws.permutation(len(labels), seed=seed, stream="probe")
    # By class, so that the fifth has its share of each.
    order = order[np.argsort(labels[order], kind="stable")]
    is_held_out = np.arange(len(order)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    fit, held_out = order[~is_held_out], order[is_held_out]
    if len(np.unique(labels[fit])) < 2:
        raise InputError(f"train_labels has one class in {len(fit)} rows: a probe needs two to tell apart")

    def classifier(strength: float, rows: np.ndarray) -> LogisticRegression:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return probe.fit(train_features[rows], labels[rows])

    gains = [
        matthews_corrcoef(labels[held_out], classifier(strength, fit).predict(train_features[held_out]))
        for strength in _STRENGTHS
    ]
    best = _STRENGTHS[int(np.argmax(gains))]
    predicted = classifier(best, order).predict(test_features)
    return ProbeScore(
        accuracy=float(accuracy_score(test_labels, predicted)),
        matthews_correlation=float(matthews_corrcoef(test_labels, predicted)),
        regularization=best,
    )
