"""A rehearsal of a run: model and Trainer are made on a made-up text, to find mistakes before the real one is read.

The made-up text has the shape that the real one will have. Parameters are on the `meta` device, which knows shapes and
holds no numbers: it takes a moment and no memory. Small models are tried once more on the CPU where `meta` cannot do
it. Nothing is written, printed or left changed.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, cast, get_args
from unittest.mock import patch

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, masking_utils
from transformers.utils import logging as transformers_logging

from hf_pretrain.data import multilingual
from hf_pretrain.data.arguments import DataArguments, MultilingualDataArguments
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.documents.tokenizers import TokenizerKind, frame_by_separators, train_tokenizer
from hf_pretrain.data.examples.epochs import MixtureDataset
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.training.arguments import PretrainingArguments, check_best_metric
from hf_pretrain.training.processes import is_refused_by_a_library
from hf_pretrain.training.trainer import PretrainingTrainer

_SENTENCE, _SENTENCES = 6, 5
_TEXTS = ["a ba ab bab aba. b abb bba bb aa."] * 4


logger = transformers_logging.get_logger(__name__)
# Parameters of a model that is quickly made for real: 0.2 GB.
_MOST_PARAMETERS = 50_000_000
_OF_META = re.compile(
    r"\bmeta (?:tensor|device)|register_meta|device meta\b|data-independent|\bmeta\b.*\bcpu\b|\bcpu\b.*\bmeta\b"
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
# The keys that `transformers.Trainer.evaluate` adds by itself.
_OF_EVERY_EVALUATION = ("runtime", "samples_per_second", "steps_per_second")
_from_pretrained = PreTrainedModel.from_pretrained.__func__


def made_up_data(
    args: DataArguments, model_args: Any, training: PretrainingArguments, tokenizer: PreTrainedTokenizerBase | None
) -> PreparedData:
    """Return examples as [`prepare_data`] would, of documents that hold the first words of the vocabulary.

    Args:
        args: How the text is cut, and whether text is held out.
        model_args: Not used; other data may depend on the model.
        training: How many lanes the text must do for, and the seed.
        tokenizer: The tokenizer of the run; None to make one up, of the kind and the size in the options.

    Raises:
        InputError: If no text could be cut in this way.
    """
    if tokenizer is None:
        tokenizer = made_up_tokenizer(args)
    # Enough for some windows of every lane of the methods that have a memory.
    lanes = 4 * training.world_size * max(getattr(training, "eval_lanes", None) or 1, 1)
    tokens = max(2000, lanes * 3 * max(args.block_size, getattr(training, "tgt_len", 0)))
    if isinstance(args, MultilingualDataArguments) and args.is_multilingual:
        return _of_languages(args, tokenizer, training.seed)
    documents = _documents(tokenizer, min(tokens, 1 << 22))
    cut: dict[str, Any] = {"tokenizer": tokenizer, "block_size": args.block_size, "mode": args.block_mode}
    blocks = BlockDataset(documents, **cut)
    holds_out = bool(args.validation_file or (args.validation_fraction and not args.streaming))
    train: Any = blocks
    if args.streaming:
        texts = datasets.Dataset.from_dict({args.text_column: _TEXTS}).to_iterable_dataset()
        train = StreamingBlocks(texts, text_column=args.text_column, seed=training.seed, **cut)
    return PreparedData(
        tokenizer,
        train,
        blocks if holds_out else None,
        {"source": "made up", "block_size": args.block_size, "block_mode": args.block_mode},
        args.block_size,
        train_documents=None if args.streaming else documents,
        eval_documents=documents if holds_out else None,
    )


def made_up_tokenizer(args: DataArguments) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the special tokens and the vocabulary size of one that would be trained."""
    kind: Any = args.tokenizer_type if args.tokenizer_type in get_args(TokenizerKind) else "wordpiece"
    size = min(args.vocab_size, 320)
    tokenizer = train_tokenizer(
        _TEXTS, kind=kind, vocab_size=size, lowercase=bool(args.lowercase), model_max_length=args.block_size
    )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    new = [f"word{number}" for number in range(args.vocab_size - len(tokenizer))]
    if isinstance(vocabulary, dict):
        vocabulary.update({word: len(vocabulary) + number for number, word in enumerate(new)})
    else:
        vocabulary.extend([word, -20.0] for word in new)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    if isinstance(args, MultilingualDataArguments) and args.is_multilingual and args.tokenizer_frame == "xlm":
        frame_by_separators(tokenizer)
    return tokenizer


def _documents(tokenizer: PreTrainedTokenizerBase, num_tokens: int, **columns: str) -> datasets.Dataset:
    """Return documents of equal length, in equal sentences of words that are no special tokens."""
    special = set(tokenizer.all_special_ids)
    words = [number for number in range(min(len(tokenizer), 200)) if number not in special] or [0]
    length = _SENTENCE * _SENTENCES
    count = max(8, -(-num_tokens // length))
    table: dict[str, Any] = {
        "input_ids": [[words[(row + position) % len(words)] for position in range(length)] for row in range(count)],
        "word_starts": [[True] * length] * count,
        "sent_starts": [[position % _SENTENCE == 0 for position in range(length)]] * count,
        "doc_id": list(range(count)),
    }
    features = datasets.Features(DOCUMENT_FEATURES)
    for name, value in columns.items():
        features[name] = datasets.Value("string")
        table[name] = [value] * count
    return datasets.Dataset.from_dict(table, features=features)


def _of_languages(args: MultilingualDataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreparedData:
    documents: dict[str, tuple[datasets.Dataset, ...]] = {
        name: (_documents(tokenizer, 2000, lang=name),) for name in args.language_files()
    }
    for pair in args.parallel_files():
        documents[pair] = tuple(_documents(tokenizer, 2000, lang=name) for name in pair.split("-"))
    languages = {name: number for number, name in enumerate(args.languages())}
    parts = multilingual._examples(documents, args=args, tokenizer=tokenizer, languages=languages, seed=seed)
    texts = [sides[0] for name, sides in documents.items() if "-" not in name]
    joined = datasets.concatenate_datasets(texts) if texts else None
    mixture = MixtureDataset(parts, shares=dict.fromkeys(parts, 1.0), seed=seed)
    return PreparedData(
        tokenizer,
        mixture,
        mixture if args.validation_fraction else None,
        {"source": "made up", "block_mode": args.block_mode, "languages": args.languages()},
        args.block_size,
        train_documents=joined,
        eval_documents=joined if args.validation_fraction else None,
        languages=languages,
    )


def rehearse(
    options: tuple[Any, Any, PretrainingArguments],
    *,
    build_trainer: Callable[..., PretrainingTrainer],
    tokenizer: PreTrainedTokenizerBase | None,
    made_up: Callable[..., PreparedData],
    left_out: Mapping[str, Any],
    note: Callable[[PretrainingTrainer], None] | None = None,
) -> None:
    """Refuse now everything that the run would refuse after its text was read.

    Args:
        options: Those of data, model and training.
        build_trainer: Puts the method's model, collator and Trainer together.
        tokenizer: The tokenizer of the run; None if it is to be trained.
        made_up: Makes examples of a text that is none, called as [`made_up_data`] is.
        left_out: Options of training that only cost time here, such as the caching of a teacher.
        note: Looks at the Trainer, whose parameters have shapes and no numbers.

    Raises:
        InputError: If the model cannot be built, does not fit the options, or the Trainer refuses these.
    """
    data_args, model_args, args = options
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        # DeepSpeed's configuration is one for the whole process, and decides how models are built.
        return
    if getattr(options[0], "streaming", False):
        left_out = {}

    def build(rehearsed: PretrainingArguments, device: str, counted: list[int]) -> None:
        try:
            data = made_up(data_args, copy.copy(model_args), rehearsed, tokenizer)
        except InputError:
            raise
        except Exception:
            logger.debug("the rehearsal is left out", exc_info=True)
            return
        with _without_numbers(device, counted):
            trainer = build_trainer(data, copy.copy(model_args), rehearsed)
            if note is not None:
                note(trainer)
            names = _try_forward(trainer, device)
        if names is not None and trainer.eval_dataset is not None and not isinstance(trainer.eval_dataset, dict):
            check_best_metric(trainer.args, names)

    failure, parameters = _attempt(build, args, left_out, device="meta")
    if failure is not None and parameters <= _MOST_PARAMETERS:
        failure, _ = _attempt(build, args, left_out, device="cpu")
    if failure is None or _is_of_meta(failure):
        return
    if isinstance(failure, InputError):
        raise failure
    if is_refused_by_a_library(failure):
        raise InputError(one_line(failure)) from failure


def _attempt(
    build: Callable[[PretrainingArguments, str, list[int]], None],
    args: PretrainingArguments,
    left_out: Mapping[str, Any],
    *,
    device: str,
) -> tuple[Exception | None, int]:
    """Return what went wrong, and how many parameters there were until then."""
    counted = [0]
    with _leaving_no_trace() as folder:
        try:
            build(_smaller(args, folder, left_out), device, counted)
        except Exception as error:
            return error, counted[0]
    return None, counted[0]


def _smaller(args: PretrainingArguments, folder: str, left_out: Mapping[str, Any]) -> PretrainingArguments:
    """Return the options of a rehearsal: another folder, small batches, nothing that reaches out of the process."""
    smaller = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, dict | list):
            setattr(smaller, name, copy.copy(value))
    smaller.accelerator_config = copy.deepcopy(args.accelerator_config)
    changes: dict[str, Any] = {
        "output_dir": folder,
        "push_to_hub": False,
        "hub_branches": None,
        "enable_jit_checkpoint": False,
        "full_determinism": False,
        "resume_from_checkpoint": None,
        "torch_compile": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    for name, value in (changes | {name: value for name, value in left_out.items() if hasattr(args, name)}).items():
        setattr(smaller, name, value)
    return smaller


@contextmanager
def _leaving_no_trace() -> Iterator[str]:
    """Yield a folder that goes again, while nothing is printed and random numbers stay as they are."""
    # The Trainer seeds them all.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    verbosity, own = transformers_logging.get_verbosity(), logging.getLogger(__name__.partition(".")[0])
    level = own.level
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)
        # What is said of a model would be said twice, and of made-up text.
        own.setLevel(logging.CRITICAL)
        try:
            yield folder
        finally:
            transformers_logging.set_verbosity(verbosity)
            own.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _without_numbers(device: str, counted: list[int]) -> Iterator[None]:
    """Build models on a device, from configurations alone, and count their parameters."""
    seen: set[int] = set()

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # A parameter that transformers loads itself has no numbers yet.
        if parameter is None or id(parameter) in seen or parameter.is_meta:
            return None
        counted[0] += parameter.numel()
        on_device = nn.Parameter(parameter.to(device), parameter.requires_grad)
        seen.add(id(on_device))
        alive.append(on_device)
        return on_device

    def moved_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
        return None if buffer is None or buffer.is_meta else buffer.to(device)

    # The id of an object is only its own while the object lives.
    alive: list[nn.Parameter] = []
    handles = [
        # torch's annotations leave out that a hook may return a replacement.
        hooks.register_module_parameter_registration_hook(cast(Any, moved)),
        hooks.register_module_buffer_registration_hook(cast(Any, moved_buffer)),
    ]
    try:
        with (
            patch.object(PreTrainedModel, "from_pretrained", classmethod(_from_configuration)),
            # The rehearsal must not use the device of the run.
            patch.object(Trainer, "_move_model_to_device", lambda self, model, device: None),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _from_configuration(
    cls: type[PreTrainedModel], name_or_path: str, *args: Any, config: Any = None, **options: Any
) -> Any:
    """Build the model of `from_pretrained` without its weights; where these are missing or damaged, let it refuse."""
    if not _has_weights(name_or_path):
        return _from_pretrained(cls, name_or_path, *args, config=config, **options)
    if config is None:
        assert cls.config_class is not None
        config = cls.config_class.from_pretrained(name_or_path)
    attention = {name: options[name] for name in ("attn_implementation",) if name in options}
    model = cls._from_config(copy.deepcopy(config), dtype=torch.float32, **attention).eval()
    info: dict[str, Any] = {
        "missing_keys": set(),
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    return (model, info) if options.get("output_loading_info") else model


def _has_weights(name_or_path: str) -> bool:
    """Whether a local folder has weights whose files open; of a repository on the Hub that is not known."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return True
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, SafetensorError):
            return False
    return bool(files)


def _try_forward(trainer: PretrainingTrainer, device: str) -> set[str] | None:
    """Run the model on two examples; return the names of the metrics of an evaluation, None if they are not known."""
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    batch = trainer.data_collator([dataset[row] for row in range(min(2, len(dataset)))])
    # The Trainer takes the lanes out of a batch.
    batch = {name: value.to(device) for name, value in batch.items() if name != "lanes"}
    try:
        # As when a graph is recorded, transformers then looks at no number of a mask.
        with torch.no_grad(), patch.object(masking_utils, "is_tracing", lambda *args, **options: device == "meta"):
            output = trainer.model.eval()(**batch)
    except (InputError, RuntimeError):
        raise  # Of sizes that do not go together.
    except Exception:
        logger.debug("the forward pass is left out of the rehearsal", exc_info=True)
        return None
    means = {f"{name}_loss": 1.0 for name in output.losses} | dict.fromkeys(output.metrics, 1.0) | {"loss": 1.0}
    if output.scores is not None:
        means |= trainer.evaluation_metrics(np.array([0.5, -0.5]), np.array([1, 0]), means)
    return {*means, *_OF_EVERY_EVALUATION}


def _is_of_meta(error: BaseException | None) -> bool:
    """Whether an error came only from parameters without numbers."""
    while error is not None:
        if isinstance(error, NotImplementedError) or _OF_META.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
