"""A model under evaluation: it is opened with the parts that a measure needs, and refused where it lacks them.

[`EvaluatedModel`] opens each part once: the encoder, the language model with the score of a text that fits it, or the vectors of
words. A word-vector file, an adapter alone and a folder of sentence-transformers are models too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.detector import is_detector, open_detector
from hf_pretrain.evaluation.probes import Inputs, encode, encoder_of
from hf_pretrain.evaluation.similarity import text_vectors
from hf_pretrain.evaluation.suite.adapters import open_with_adapter, read_adapter, trained_class
from hf_pretrain.evaluation.suite.language import (
    AUTO_CLASSES,
    NO_LIKELIHOOD,
    LanguageModel,
    is_electric,
    kind_of,
    language_model_of,
)
from hf_pretrain.evaluation.suite.tasks import How
from hf_pretrain.files import weights_digest
from hf_pretrain.hub.record import RECORD
from hf_pretrain.modeling.loading import find_file, from_config, from_pretrained
from hf_pretrain.modeling.pooling import MODULES, SentenceModules
from hf_pretrain.vectors.folder import WordVectors

# A pooler is not read: pooling is done here.
_POOLER = "pooler"
# Architectures of vectors without a context.
_STATIC, _SPARSE = "static_embedding", "sparse_text"
_WORDS_AT_A_TIME = 256
_DECODERS = ("decoder", "lm_head")
_TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")


class EvaluatedModel:
    """A model by its name, opened with the parts that a measure needs.

    Args:
        name: Folder, name on the Hub, or a file of word vectors. The folder may hold an adapter alone.
        untrained: Draw all weights anew, by the architecture's own initialisation.
        seed: Key of these weights.
        batch_size: Texts in a batch.
        device: Where it computes; by default a GPU if there is one.

    Attributes:
        remembers: Whether the features of a text are kept for another call.
    """

    def __init__(
        self,
        name: str,
        *,
        untrained: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        self.name, self.untrained, self.seed, self.batch_size = name, untrained, seed, batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.remembers = False
        self._known: dict[tuple[int | None, str], np.ndarray] = {}

    @property
    def label(self) -> str:
        """The name as a table shows it: of a folder the last part."""
        return Path(self.name.rstrip("/")).name if os.path.exists(self.name) else self.name

    @property
    def has_record(self) -> bool:
        """Whether the model is a folder with the record of its run, and so has a card that can be made again."""
        return Path(self.name, RECORD).is_file()

    @cached_property
    def fingerprint(self) -> str | None:
        """A digest of the weights, by which its numbers are known as its own; None of weights that are no safetensors."""
        if Path(self.name).is_file():
            with open(self.name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        files = (find_file(self.name, file) for file in ("config.json", "adapter_config.json", MODULES))
        path = next(filter(None, files), None)
        return None if path is None else weights_digest(Path(path).parent)

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The configuration of an adapter that lies alone; None of a whole model."""
        return read_adapter(self.name)

    @property
    def source(self) -> str:
        """The model that is opened: itself, or the one below an adapter."""
        return self.name if self.adapter is None else str(self.adapter["base_model_name_or_path"])

    @cached_property
    def config(self) -> PreTrainedConfig | None:
        """The configuration; None of a file of word vectors and of a folder that has vectors alone.

        Raises:
            InputError: If there is no such model, or the name has a revision.
        """
        if Path(self.name).is_file():
            return None
        repository, _, revision = self.name.partition("@")
        if revision and not os.path.exists(self.name):
            raise InputError(
                f"model={self.name!r}: revisions are not opened by name: download it with `hf download {repository} --revision "
                f"{revision} --local-dir FOLDER`, and name the folder"
            )
        if self.adapter is None and self.has_static_modules:
            return None
        config: PreTrainedConfig = from_pretrained(AutoConfig, self.source)
        return config

    @cached_property
    def has_static_modules(self) -> bool:
        """Whether the folder is one of model2vec or of sentence-transformers' `StaticEmbedding`, with no architecture."""
        path = find_file(self.name, "config.json")
        if path is None:
            return find_file(self.name, MODULES) is not None
        return "model_type" not in Path(path).read_text(encoding="utf-8", errors="replace")

    @property
    def is_static(self) -> bool:
        """Whether it has one vector a word, whatever stands around it."""
        return self.config is None or self.config.model_type == _STATIC

    @property
    def makes_vectors(self) -> bool:
        """Whether it makes one vector of a text in a way of its own: static vectors, or modules of sentence-transformers."""
        return self.is_static or find_file(self.name, MODULES) is not None

    @cached_property
    def architecture(self) -> str:
        """Name of the class that the weights were saved from; "" if nothing says it."""
        if self.adapter is not None and self.config is not None:
            return trained_class(self.adapter, self.config)
        names = [] if self.config is None else self.config.architectures or []
        return str(names[0]) if names else ""

    @property
    def is_detector(self) -> bool:
        """Whether it tells replaced words from others."""
        return self.config is not None and is_detector(self.source, self.config)

    @property
    def is_energy(self) -> bool:
        """Whether it is a discriminator whose logits are energies, Electric's."""
        return is_electric(self.source)

    def check(self, how: How, *, task: str) -> None:
        """Refuse a model without the parts that a measure needs, before anything is computed.

        Args:
            how: The measure.
            task: Name of the task, for the message.

        Raises:
            InputError: Naming the model, the task and the way on.
        """
        why = self._fault(how)
        if why is not None:
            raise InputError(f"model={self.name!r} cannot be measured on {task!r} by how={how!r}: it {why}")

    def _fault(self, how: How) -> str | None:
        """Return why a model cannot be measured, with the way on; None if it can."""
        if self.config is not None and self.config.model_type == _SPARSE:
            return "counts words and has no vectors: evaluate it by hf-pretrain features"
        is_alone = self.adapter is not None
        if self.untrained:
            if self.is_static or is_alone:
                return "has no architecture to draw untrained weights of: leave untrained out"
            if how in ("finetune", "head"):
                return f"would be measured untrained by {how}: leave untrained out, and use hf-pretrain compare"
        if how in ("finetune", "head"):
            if self.is_static:
                return "has one vector a word: give an encoder, or choose another how"
            if is_alone:
                return "is an adapter alone: merge it (merge_and_unload, or --export merged) and name the whole model"
        if how == "head" and not self.architecture.endswith(_TASK_HEADS):
            has = self.architecture or "no architecture that its configuration names"
            return f"has no head of a task ({has}): name a model that was fine-tuned, or choose finetune"
        if how not in ("pairs", "likelihood"):
            return None
        kind = self.language_model_kind
        if kind is None:
            has = f"has the architecture {self.architecture or 'none'}"
            return f"{has}, which does not score text: name a checkpoint with a language-modelling head"
        if kind in NO_LIKELIHOOD and how == "likelihood":
            return f"is of the kind {kind}, which does not score one text after another: name a language model"
        if kind in NO_LIKELIHOOD and self.untrained:
            return f"is of the kind {kind}, of which none is made untrained: leave untrained out"
        return None

    def open(self, hows: Sequence[How]) -> None:
        """Open now what measures need, so that a file that is missing or damaged is said before anything is computed.

        Args:
            hows: The measures.

        Raises:
            InputError: If a part cannot be opened.
        """
        for how in hows:
            if how in ("pairs", "likelihood"):
                _ = self.language_model
            elif how in ("probe", "similarity") or (how == "words" and not self.is_static):
                _ = self.encoder, self.tokenizer, self.modules
            else:
                _ = self.is_static or self.tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; of an adapter its own, or that of the model below."""
        if self.config is None:
            return self._static[1]
        files = ("tokenizer.json", "tokenizer_config.json")
        is_own = self.adapter is None or any(find_file(self.name, file) for file in files)
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, self.name if is_own else self.source)
        return tokenizer

    @cached_property
    def encoder(self) -> PreTrainedModel:
        """The encoder, without a head."""
        if self.config is None:
            return self._static[0]
        return encoder_of(self._opened(self._body_class(), only_encoder=True)).eval()

    def _body_class(self) -> Any:
        """Return the Auto class that opens the encoder: an architecture may be known by its head alone."""
        assert self.config is not None, "vectors of words have none"
        if self.architecture.endswith("EncoderModel"):
            # The encoder of an encoder-decoder alone.
            is_known = self.architecture in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values()
            return AutoModelForTextEncoding if is_known else AutoModel
        if type(self.config) in AutoModel._model_mapping:
            return AutoModel
        named = getattr(self.config, "auto_map", None) or {}
        for auto_class, reference in named.items():
            if str(reference).endswith(f".{self.architecture}") and hasattr(transformers, auto_class):
                return getattr(transformers, auto_class)
        return AutoModel

    @cached_property
    def _static(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The mean of words' vectors as a model, with the tokenizer that finds the words."""
        vectors = WordVectors.open(self.name)
        with tempfile.TemporaryDirectory() as folder:
            vectors.save(folder, method="read from a file", training={}, lowercase=vectors.is_lowercase)
            model = from_pretrained(AutoModel, folder)
            return model.eval().to(self.device), from_pretrained(AutoTokenizer, folder)

    @cached_property
    def modules(self) -> SentenceModules:
        """What follows the encoder in a sentence-transformers folder; the mean of the states where there is nothing."""
        is_file = Path(self.name).is_file()
        return (None if is_file else SentenceModules.read(self.name)) or SentenceModules()

    @property
    def vectors_in_words(self) -> str:
        """How the vector of a text is made, for a card."""
        if self.is_static:
            kind = "mean of static word vectors"
        else:
            kind = f"{'+'.join(self.modules.modes)}-pooled states"
        return f"{kind}, of length one" if self.modules.normalizes else kind

    def features(self, texts: Inputs, *, max_length: int | None = None) -> np.ndarray:
        """Return a vector of each text or pair of texts, ``float32 [N, D]``, for a probe.

        An encoder reads a pair together, and the vector is the mean of its states. Of a model that makes vectors of texts, they
        are its own; of a pair of vectors u and v, the probe reads abs(u - v) and u * v, ``[N, 2 D]``.

        Args:
            texts: The texts, or pairs of texts.
            max_length: Most tokens of a text.
        """
        given: list[Any] = list(texts)
        if self.makes_vectors and given and not isinstance(given[0], str):
            first, second = (self.features([pair[side] for pair in given], max_length=max_length) for side in (0, 1))
            return np.concatenate([np.abs(first - second), first * second], axis=1)
        if not self.remembers:
            return self._features(given, max_length)
        keys = [(max_length, json.dumps(text)) for text in given]
        missing = {key: text for key, text in zip(keys, given, strict=True) if key not in self._known}
        if missing:
            made = self._features(list(missing.values()), max_length)
            self._known |= dict(zip(missing, made, strict=True))
        return np.stack([self._known[key] for key in keys])

    def forget(self) -> None:
        """Drop the features that are kept."""
        self._known.clear()

    def _features(self, texts: list[Any], max_length: int | None) -> np.ndarray:
        options: dict[str, Any] = {"max_length": max_length, "batch_size": self.batch_size}
        if self.makes_vectors:
            return text_vectors(self.encoder, self.tokenizer, texts, modules=self.modules, **options)
        return encode(self.encoder, self.tokenizer, texts, **options)

    @cached_property
    def language_model_kind(self) -> str | None:
        """The kind of the language model by the architecture; None if it is none."""
        if self.config is None:
            return None
        if self.is_detector:
            return "energy" if self.is_energy else "discriminator"
        return kind_of(self.config, self.architecture)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model with its head, and the score that fits what it was trained for.

        Raises:
            InputError: If it is no language model.
        """
        kind, head = self.language_model_kind, None
        if kind is None:
            raise InputError(f"model={self.name!r} has no head that scores text: name one with such a head")
        if kind in NO_LIKELIHOOD:
            model, head = open_detector(self.name)
            model, head = model.to(self.device), None if head is None else head.to(self.device)
        else:
            model = self._opened(AUTO_CLASSES[kind])
        return language_model_of(kind, model, self.tokenizer, head=head, batch_size=self.batch_size)

    def word_vectors(self, words: Sequence[str]) -> tuple[WordVectors, str]:
        """Return vectors of words, and in words how they were made.

        Static vectors are those of the model's own vocabulary. An encoder reads each of the words alone, and the vector is the
        mean of its states, or its own vector of a text.

        Args:
            words: The words that a task asks for.
        """
        if self.is_static:
            return WordVectors.open(self.name), "of static vectors"
        known, size = list(dict.fromkeys(words)), max(self.batch_size, _WORDS_AT_A_TIME)
        if self.makes_vectors:
            vectors = text_vectors(self.encoder, self.tokenizer, known, modules=self.modules, batch_size=size)
        else:
            vectors = encode(self.encoder, self.tokenizer, known, batch_size=size)
        return WordVectors(tuple(known), vectors), f"of {self.vectors_in_words}, each word read alone"

    def _opened(self, auto_class: Any, *, only_encoder: bool = False) -> PreTrainedModel:
        """Open the model, or make an untrained one; raise InputError if a part would be drawn at random unasked."""
        if self.untrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(draws.generator_seed(seed=self.seed, stream="untrained model"))
                model: PreTrainedModel = from_config(auto_class, self.config)
            return _without_memory(model.eval().to(self.device))
        if self.adapter is not None:
            model = open_with_adapter(self.name, self.adapter, self.architecture)
        else:
            model = from_pretrained(auto_class, self.name, announce=False)
        unread = {_POOLER, *(_DECODERS if only_encoder and model.config.is_encoder_decoder else ())}
        fresh = [name for name in getattr(model, "fresh_parameters", ()) if unread.isdisjoint(name.split("."))]
        if fresh:
            raise InputError(
                f"model={self.name!r} has no {fresh[0]}, which would be drawn at random: name a whole checkpoint, or leave the "
                "task out"
            )
        return _without_memory(model.eval().to(self.device))


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model that goes on from text to text, as the original ELMo does, begin each text anew."""
    if getattr(model.config, "stateful", False):
        model.config.stateful = False
    return model
