"""Features of a frozen encoder as a transformer of scikit-learn, with a cache on the disk.

[`PretrainedFeatures`] takes its place in a `Pipeline` or a `GridSearchCV` like any other transformer. How texts become
features is told in [`hf_pretrain.evaluation.probes`]; [`FeatureCache`] keeps them. [`hf_pretrain.transfer.feature_heads`] puts
classifiers behind them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Self

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import extract_commit_hash

from hf_pretrain.errors import InputError, check_range, one_line
from hf_pretrain.evaluation.probes import (
    Inputs,
    Pooling,
    Tokenized,
    check_features,
    encode_tokenized,
    encoder_of,
    tokenize_inputs,
)
from hf_pretrain.evaluation.suite.adapters import open_encoder
from hf_pretrain.files import PART, plain
from hf_pretrain.modeling.base import has_adapters
from hf_pretrain.modeling.loading import find_file, from_pretrained

# Of another way to make features, this has to be another number.
_FORMAT = 1
# Texts whose features are written at once: what a run that is cut off has lost at most.
_CHUNK = 8192
# A configuration says these of where it comes from, not of what the model computes.
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")
# It reads the states of an encoder and is no part of it; a checkpoint of a masked language model has none.
_POOLER = "pooler."

logger = logging.getLogger(__name__)


class PretrainedFeatures(TransformerMixin, BaseEstimator):
    """Vectors of texts, or of pairs of texts, from a frozen encoder.

    `fit` opens the encoder and learns nothing. A fitted instance is pickled without its weights: it opens them by their name when
    they are needed, and refuses others than those that it was fitted with. A clone shares the model.

    Args:
        model: A folder, a name on the Hub, or a live model in float32. A live model cannot be pickled.
        tokenizer: The tokenizer of a live model, or the name of another than the model's own.
        revision: Branch, tag or commit of a model on the Hub.
        pooling: How the states of the tokens become one vector: `"mean"`, `"cls"`, `"max"`, `"last"` or `"eos"`; this and the
            next three as in [`encode`].
        layer: One layer, or several, such as `(-4, -3, -2, -1)`: 0 is the embeddings, -1 the model's output.
        combination: How several layers are combined: `"concat"`, `"sum"`, `"mean"`, or a weight for each.
        max_length: Most tokens of a text, special ones included.
        batch_size: Texts in a batch; they are sorted by length first.
        bf16: Compute in bfloat16. By default on a GPU that has it, and not on a CPU.
        device: Where to compute: `"cpu"`, `"cuda"`, ... By default a live model stays where it is, and a named one goes to the
            GPU if there is one.
        cache_dir: Folder that keeps the features, see [`FeatureCache`]. By default nothing is kept.

    Attributes:
        model_digest_: Digest of the encoder's weights.
        commit_: Commit of a model on the Hub; None of any other.
        n_features_out_: Width of the vectors.

    Source:
        Devlin et al., "BERT" (2019), section 5.3: the feature-based approach, and which layers serve it best.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        pooling: Pooling = "mean",
        layer: int | Sequence[int] = -1,
        combination: str | Sequence[float] = "concat",
        max_length: int | None = None,
        batch_size: int = 32,
        bf16: bool | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.revision = revision
        self.pooling = pooling
        self.layer = layer
        self.combination = combination
        self.max_length = max_length
        self.batch_size = batch_size
        self.bf16 = bf16
        self.device = device
        self.cache_dir = cache_dir

    def fit(self, texts: Any = None, y: Any = None) -> Self:
        """Open the encoder, and check that it can give these features.

        Args:
            texts: Not used.
            y: Not used.

        Returns:
            The transformer.

        Raises:
            InputError: If the encoder cannot be opened, an option is not right, or one has no effect.
        """
        self._encoder: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        base, _ = self._opened()
        self.model_digest_ = model_digest(base)
        self.commit_ = commit_of(self.model, self.revision) if isinstance(self.model, str) else None
        self.n_features_out_ = self._width(self._layers())
        return self

    def transform(self, texts: Inputs) -> np.ndarray:
        """Return the vectors of texts.

        Args:
            texts: The texts, or pairs of texts.

        Returns:
            `float32 [N, n_features_out_]`, in the order of the texts.

        Raises:
            InputError: If something is no text, or the encoder has other weights than at `fit`.
        """
        check_is_fitted(self, "model_digest_")
        base, tokenizer = self._opened()
        layers = self._layers()
        tokenized = tokenize_inputs(base, tokenizer, texts, max_length=self.max_length)
        if self.cache_dir is None or not tokenized["input_ids"]:
            return self._encode(tokenized, layers)
        if has_adapters(base):
            raise InputError(
                f"cache_dir={str(self.cache_dir)!r}: {type(base).__name__} has adapters, which can be switched without a change "
                "of its weights: merge them (merge_and_unload), or leave cache_dir out"
            )
        cache = FeatureCache(self.cache_dir, key=self._key(base, tokenizer, layers))
        return cache.features(tokenized, lambda rest: self._encode(rest, layers), width=self._width(layers))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the name of each column, such as "mean_layer-1_0"; of combined layers "mean_0".

        Args:
            input_features: Not used.
        """
        check_is_fitted(self, "model_digest_")
        layers = self._layers()
        blocks = (
            [f"{self.pooling}_layer{layer}" for layer in layers] if self.combination == "concat" else [self.pooling]
        )
        width = self.n_features_out_ // len(blocks)
        return np.array([f"{block}_{number}" for block in blocks for number in range(width)], dtype=object)

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, opened if need be, on its device."""
        return self._opened()[0]

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the encoder."""
        return self._opened()[1]

    def _opened(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if getattr(self, "_encoder", None) is None:
            model, tokenizer = self._open()
            known = getattr(self, "model_digest_", None)
            if known is not None and model_digest(model) != known:
                raise InputError(
                    f"model={self.model!r} has other weights than those that these features were fitted with: put them back, or "
                    "fit again"
                )
            self._encoder = model, tokenizer
        assert self._encoder is not None, "it was opened"
        return self._encoder

    def _open(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Open the encoder and its tokenizer by what the options say."""
        if self.bf16 and self.device == "mps":
            raise InputError("bf16=True does not work on device='mps': leave it out")
        if isinstance(self.model, (str, os.PathLike)):
            name = str(self.model)
            model, tokenizer = _named(name, self.revision, _state_of(name, self.revision))
            model = model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            if self.revision is not None:
                raise InputError(f"revision={self.revision!r} has no effect with a live model: leave it out")
            if self.tokenizer is None:
                raise InputError(f"model={type(self.model).__name__} is live: give its tokenizer too")
            model = encoder_of(self.model if self.device is None else self.model.to(self.device))
            if model.dtype != torch.float32:
                raise InputError(
                    f"model={type(model).__name__} has weights in {model.dtype}: give it in float32 (model.float()), and "
                    "bf16=True to compute in bfloat16"
                )
            tokenizer = None
        if self.tokenizer is not None:
            is_name = isinstance(self.tokenizer, (str, os.PathLike))
            tokenizer = from_pretrained(AutoTokenizer, str(self.tokenizer)) if is_name else self.tokenizer
        return model, tokenizer

    def _layers(self) -> tuple[int, ...]:
        base, tokenizer = self._opened()
        check_range(self.batch_size, "[1, inf)", name="batch_size")
        return check_features(base, tokenizer, pooling=self.pooling, layer=self.layer, combination=self.combination)

    def _width(self, layers: Sequence[int]) -> int:
        width: int = self.encoder.config.hidden_size
        return width * len(layers) if self.combination == "concat" else width

    def _encode(self, tokenized: Tokenized, layers: Sequence[int]) -> np.ndarray:
        base, tokenizer = self._opened()
        return encode_tokenized(
            base,
            tokenizer,
            tokenized,
            pooling=self.pooling,
            layers=layers,
            combination=self.combination,
            batch_size=self.batch_size,
            bf16=self._uses_bf16(base),
        )

    def _uses_bf16(self, base: PreTrainedModel) -> bool:
        if self.bf16 is None:
            return base.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.bf16

    def _key(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int]) -> dict[str, Any]:
        """Return all that decides on the features of token ids."""
        return {
            "format": _FORMAT,
            "weights": model_digest(base),
            "class": type(base).__name__,
            "config": {k: v for k, v in base.config.to_dict().items() if k not in _NO_PART_OF_A_MODEL},
            "end_tokens": [tokenizer.eos_token_id, tokenizer.sep_token_id] if self.pooling == "eos" else None,
            "pooling": self.pooling,
            "layers": layers,
            "combination": self.combination,
            "bf16": self._uses_bf16(base),
            "device": base.device.type,
        }

    def __sklearn_clone__(self) -> PretrainedFeatures:
        """Return an unfitted instance with the same options; a live model is shared, not copied."""
        return type(self)(**self.get_params(deep=False))

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: no weights."""
        if not isinstance(self.model, (str, os.PathLike)):
            raise InputError(
                f"model={type(self.model).__name__} is live, and features are pickled by the model's name: save it "
                "(save_pretrained), and give the folder; or set n_jobs=1 in GridSearchCV, which then pickles nothing"
            )
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_encoder"}


def model_digest(model: PreTrainedModel) -> str:
    """Return a digest of an encoder's weights: of their names, shapes, number formats and values, without a pooler's."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(_POOLER):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit that a branch of a repository of the Hub is at; None of a folder."""
    path = (
        None
        if os.path.isdir(name)
        else find_file(name, "config.json", **({} if revision is None else {"revision": revision}))
    )
    commit: str | None = extract_commit_hash(path, None)
    return commit


def _state_of(name: str, revision: str | None) -> Any:
    """Return what changes when a model changes: its commit, or the names, sizes and times of the files in its folder."""
    if not os.path.isdir(name):
        return commit_of(name, revision)
    found = [(entry.name, entry.stat()) for entry in os.scandir(name) if entry.is_file()]
    return tuple(sorted((file, state.st_size, state.st_mtime_ns) for file, state in found))


# The many clones of a grid search open the same model one after another.
@lru_cache(maxsize=1)
def _named(name: str, revision: str | None, state: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open an encoder and its tokenizer; raise InputError if weights of it would be drawn at random."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    model: Any = open_encoder(name, **options)
    fresh = [weight for weight in model.fresh_parameters if not weight.startswith(_POOLER)]
    if fresh:
        raise InputError(f"model={name!r} has no {fresh[0]}, which would be drawn at random: name a whole encoder")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return encoder_of(model).eval(), from_pretrained(AutoTokenizer, name, **options)


class FeatureCache:
    """Features of texts on the disk, for one encoder with one set of options.

    An entry is found by the token ids of the text, so that whatever a tokenizer or `max_length` makes of it is in its key. Files
    appear whole and are never changed: several processes can read and write at once.

    Args:
        folder: Folder of the caches of all encoders; made if need be.
        key: All that decides on the features of token ids, as plain data.
    """

    def __init__(self, folder: str | Path, *, key: Any) -> None:
        text = json.dumps(plain(key), sort_keys=True)
        self.folder = Path(folder, xxhash.xxh3_128_hexdigest(text.encode()))

    def features(self, tokenized: Tokenized, encode: Any, *, width: int) -> np.ndarray:
        """Return the features of texts; those that are not there are computed, and kept.

        Args:
            tokenized: Token ids of the texts.
            encode: Returns the features of token ids.
            width: Width of the features.

        Returns:
            `float32 [N, width]`, in the order of the texts.
        """
        rows: dict[bytes, list[int]] = {}
        for row, digest in enumerate(_digests(tokenized)):
            rows.setdefault(digest, []).append(row)
        features = np.empty((len(tokenized["input_ids"]), width), dtype=np.float32)
        missing = self._read(rows, features)
        for begin in range(0, len(missing), _CHUNK):
            digests = missing[begin : begin + _CHUNK]
            first = [rows[digest][0] for digest in digests]
            made = encode({name: [column[row] for row in first] for name, column in tokenized.items()})
            self._write(digests, made)
            for digest, vector in zip(digests, made, strict=True):
                features[rows[digest]] = vector
        return features

    def _read(self, rows: dict[bytes, list[int]], features: np.ndarray) -> list[bytes]:
        """Fill in the features that the files have, and return the digests of the texts that they do not have."""
        missing = dict.fromkeys(rows)
        for path in sorted(self.folder.glob("*.safetensors")):
            if not missing:
                break
            try:
                known = load_file(path)
                pairs = [(row.tobytes(), number) for number, row in enumerate(known["digests"])]
                found = [(digest, number) for digest, number in pairs if digest in missing]
                for digest, number in found:
                    features[rows[digest]] = known["features"][number]
                    del missing[digest]
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                logger.warning("%s is damaged, and its features are computed anew: %s", path, one_line(error))
        return list(missing)

    def _write(self, digests: list[bytes], features: np.ndarray) -> None:
        table = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1)
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(table.tobytes())}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole: threads and processes may write the same.
        with NamedTemporaryFile(dir=self.folder, suffix=PART, delete=False) as file:
            try:
                file.write(save({"digests": table, "features": np.ascontiguousarray(features)}))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def _digests(tokenized: Tokenized) -> list[bytes]:
    """Return a digest of the token ids of each text, and of all else that is read of it."""
    columns = [tokenized[name] for name in ("input_ids", "token_type_ids", "character_ids") if name in tokenized]
    return [
        xxhash.xxh3_128_digest(b"|".join(np.asarray(ids, dtype=np.int64).tobytes() for ids in row))
        for row in zip(*columns, strict=True)
    ]
