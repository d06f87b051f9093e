"""Open stock configurations, tokenizers and models; whatever fails arrives as one line that names the file and the way on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available
from transformers.utils import logging as transformers_logging

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import read_object
from hf_pretrain.modeling.backbone import name_of

MODEL_DTYPES = ("float32", "bfloat16")
"""Number formats that weights are trained in."""

_COMPOSITE_PREFIX = "hf_pretrain_"
# Composites that are exported, and opened again, as they are.
_EXPORTED = "two_tower_cloze pair_head span_boundary_head discriminator_head enhanced_mask_decoder"
_EXPORTED_COMPOSITES = frozenset(_COMPOSITE_PREFIX + name for name in _EXPORTED.split())
_OF_SEVERAL_TASKS = _COMPOSITE_PREFIX + "multitask"
_WITH_ARCHITECTURE = "task_head"
_LFS = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Parts of the names of files that hold a vocabulary or say how it is made.
_TOKENIZER_FILES = ("*token*", "*vocab*", "*merges*", "*.model", "*spiece*", "*.bpe")
_SENTENCEPIECE_FILES = ("*.model",)
_KINDS = {
    "AutoModelForMaskedLM": "masked language model",
    "AutoModelForTokenClassification": "token classifier",
    "AutoModelForSequenceClassification": "classifier",
    "AutoModelForQuestionAnswering": "model for questions",
    "AutoModelForCausalLM": "causal language model",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
}
USUAL_ENCODERS = "bert, roberta, electra, albert, deberta-v2 or modernbert"
USUAL_ENCODER_DECODERS = "bart, t5, mt5, mbart or pegasus"
"""The architectures that most people want."""

logger = logging.getLogger(__name__)


def say_once(message: str) -> None:
    """Say something of a model that is built: on the first process alone, and not where a model is built without values."""
    if os.environ.get("RANK", "0") == "0" and torch.empty(0).device.type != "meta":
        logger.warning("%s", message)


def first_line(error: BaseException) -> str:
    """Return what an error says in one line: all of a configuration's check, the first line of any other."""
    return one_line(error, line=None if isinstance(error, StrictDataclassError) else 0)


def refuse_type(model_type: str, auto_class: Any) -> InputError:
    """Return the error for an architecture that an Auto class does not open."""
    if model_type == _WITH_ARCHITECTURE:
        return InputError(
            f"model_type={model_type!r} is an encoder below an architecture for a task: save the encoder alone, by "
            "model.encoder.save_pretrained(folder) and tokenizer.save_pretrained(folder), and name that folder"
        )
    kind = _KINDS.get(auto_class.__name__, auto_class.__name__)
    usual = USUAL_ENCODER_DECODERS if kind == "encoder-decoder" else USUAL_ENCODERS
    return InputError(f"model_type={model_type!r} is no {kind}: choose one such as {usual}")


def from_pretrained(auto_class: Any, name_or_path: str, *, announce: bool = True, **options: Any) -> Any:
    """Open a configuration, a tokenizer or a model.

    A model has float32 weights unless `dtype` is given, whatever the checkpoint is stored in. Parameters that the checkpoint
    does not have are drawn anew; their names are kept as `fresh_parameters` of the model, and said in one line. Where the default
    device is "meta", a model is built without its weights.

    Args:
        auto_class: One of the Auto classes, or a class of transformers.
        name_or_path: Folder or repository.
        announce: Whether to say what was drawn anew.
        **options: Passed on to transformers.

    Raises:
        InputError: In one line, if it cannot be opened; a file that is damaged is named.
    """
    if not _is_tokenizer(auto_class):
        _refuse_checkpoint_of_a_run(name_or_path, options)
    try:
        if not _is_model(auto_class):
            found = auto_class.from_pretrained(name_or_path, **options)
            if _is_tokenizer(auto_class):
                _check_has_tokenizer(name_or_path)
            return found
        if torch.empty(0).device.type == "meta":
            return _without_weights(auto_class, name_or_path, **options)
        return _load_model(auto_class, name_or_path, announce=announce, **options)
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise _refusal(auto_class, name_or_path, options, error) from error


def from_config(auto_class: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """Build through one of the Auto classes, in float32 unless `dtype` is given; raise InputError for what cannot be built."""
    options = {"dtype": torch.float32} | options
    build = auto_class._from_config if not _is_auto(auto_class) else auto_class.from_config
    if _is_auto(auto_class) and type(config) not in auto_class._model_mapping:
        raise refuse_type(config.model_type, auto_class)
    try:
        return build(config, **options)
    except InputError:
        raise
    except Exception as error:  # each architecture fails in its own way
        raise InputError(
            f"model_type={config.model_type!r} cannot be built with {auto_class.__name__}: {_cause(error)}"
        ) from error


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file; raise InputError if it is damaged."""
    try:
        return load_file(path)
    except Exception as error:  # a damaged file may raise anything
        damage = _damage_of(Path(path)) or f"cannot be read ({first_line(error)})"
        raise InputError(f"{str(path)!r} {damage}") from error


def find_file(name_or_path: str, filename: str, **where: Any) -> str | None:
    """Return the path of a file of a checkpoint, None if it has none or the Hub is out of reach.

    Args:
        name_or_path: Folder or repository.
        filename: Name of the file.
        **where: `subfolder` and `revision`, as transformers takes them.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path: str | None = cached_file(name_or_path, filename, **quiet, **where)
    return path


def _cause(error: BaseException) -> str:
    """Return one line that can be understood without the kind of the error."""
    text = first_line(error)
    speaks = isinstance(error, ValueError | ImportError | OSError | StrictDataclassError)
    return text if speaks else f"{type(error).__name__}: {text}"


def _is_auto(auto_class: Any) -> bool:
    return isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)


def _is_model(auto_class: Any) -> bool:
    return _is_auto(auto_class) or (isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel))


def _is_tokenizer(auto_class: Any) -> bool:
    return "Tokenizer" in auto_class.__name__


def _load_model(auto_class: Any, name: str, *, announce: bool, **options: Any) -> Any:
    wants_info = options.pop("output_loading_info", False)
    options = {"dtype": torch.float32} | options
    with _own_report():
        model, info = auto_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ShapesDiffer(
            f"{name!r} cannot be loaded with {auto_class.__name__}: {key} has the shape {tuple(found)} in its weights, and "
            f"{tuple(expected)} by its config.json"
        )
    model.fresh_parameters = tuple(sorted(info["missing_keys"]))
    if wants_info:
        return model, info
    _check_body(model, name)
    if announce and model.fresh_parameters:
        say_once(_fresh(model, name))
    return model


def _check_body(model: PreTrainedModel, name: str) -> None:
    """Refuse a checkpoint that holds no weight of the encoder."""
    body = model.base_model
    prefix = name_of(model, body)
    names = {key for key, _ in model.named_parameters() if not prefix or key.startswith(f"{prefix}.")}
    if names and names <= set(model.fresh_parameters):
        raise InputError(
            f"{name!r} holds no weights of a {type(body).__name__}, such as {min(names)}: name the checkpoint of that "
            "architecture, or mend model_type in its config.json"
        )


def _fresh(model: PreTrainedModel, name: str) -> str:
    """Return the line that says what was drawn anew."""
    fresh, body = model.fresh_parameters, model.base_model
    own = {id(parameter) for parameter in body.parameters()} if body is not model else set()
    in_body = [key for key, parameter in model.named_parameters() if key in fresh and id(parameter) in own]
    what = "these weights" if in_body else "a fresh head"
    shown = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
    return f"{name!r} has no {shown}: {type(model).__name__} begins with {what}, drawn at random"


class ShapesDiffer(InputError):
    """Raised where a weight of a checkpoint has another shape than its configuration, or an option, says."""


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log nothing but errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Iterator[None]:
    """Let neither transformers nor datasets draw progress bars: those of much that is small would bury the lines between."""
    library = transformers_logging
    has_bars = library.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    library.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if has_bars[0]:
            library.enable_progress_bar()
        if has_bars[1]:
            datasets.enable_progress_bars()


@contextmanager
def _own_report() -> Iterator[None]:
    """Drop transformers' table of missing and unexpected weights, for which this module has one line."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    report = logging.getLogger("transformers.modeling_utils")
    report.addFilter(is_other)
    try:
        yield
    finally:
        report.removeFilter(is_other)


def _without_weights(auto_class: Any, name: str, **options: Any) -> Any:
    """Build the model of a checkpoint on the meta device."""
    wants_info = options.pop("output_loading_info", False)
    given = {key: options.pop(key) for key in ("attn_implementation", "dtype") if key in options}
    folder = Path(name, options.get("subfolder") or "")
    damage = _damage(folder) if _is_folder(folder) else None
    if damage is not None:
        raise InputError(f"{name!r} cannot be loaded with {auto_class.__name__}: {damage}")
    config_class = AutoConfig if _is_auto(auto_class) else auto_class.config_class
    config = config_class.from_pretrained(name, **options)
    try:
        model = from_config(auto_class, config, **given)
    except InputError as error:
        raise InputError(f"{name!r} cannot be loaded with {auto_class.__name__}: {error}") from error
    model.fresh_parameters = ()
    return (model, {"missing_keys": set(), "unexpected_keys": set()}) if wants_info else model


def _refuse_checkpoint_of_a_run(name: str, options: dict[str, Any]) -> None:
    """Refuse the folder in which a run keeps its state: it holds a composite, which no stock class opens."""
    folder = Path(name, options.get("subfolder") or "")
    model_type = _model_type(folder / "config.json")
    if not model_type.startswith(_COMPOSITE_PREFIX) or model_type in _EXPORTED_COMPOSITES:
        return
    begin = f"{str(folder)!r} is a checkpoint of a run, from which its models have to be exported: "
    way = f"write them with `hf-pretrain export {folder}`, or go on with that run by --resume_from_checkpoint {folder}"
    if model_type == _OF_SEVERAL_TASKS:
        way = f"open it with `hf_pretrain.MultiTaskModel.from_pretrained({str(folder)!r})`, and call its `export`"
    raise InputError(begin + way)


def _model_type(path: Path) -> str:
    return str(read_object(path).get("model_type", ""))


def _check_has_tokenizer(name: str) -> None:
    """Refuse a folder without any file of a tokenizer, for which transformers makes up a vocabulary of special tokens."""
    folder = Path(name)
    if _is_folder(folder) and not _any_file(folder, _TOKENIZER_FILES):
        raise InputError(
            f"{name!r} holds no tokenizer (tokenizer.json, vocab.txt, spm.model, ...): copy the model's tokenizer into it, or "
            "name one with --tokenizer_name"
        )


def _is_folder(path: Path) -> bool:
    """Whether there is a folder that can be looked into; a name that is none, or one too long, is no error here."""
    return os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)


def _any_file(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _refusal(auto_class: Any, name: str, options: dict[str, Any], error: Exception) -> InputError:
    """Return the line for whatever opening a checkpoint raised."""
    folder = Path(name, options.get("subfolder") or "")
    what = f"{name!r} cannot be loaded with {auto_class.__name__}"
    if _is_tokenizer(auto_class):
        can_read = is_sentencepiece_available() and is_protobuf_available()
        if not can_read and (_any_file(folder, _SENTENCEPIECE_FILES) or not _is_folder(folder)):
            begin = "its" if _is_folder(folder) else f"{_cause(error)}; a"
            return InputError(
                f"{what}: {begin} SentencePiece model needs the packages sentencepiece and protobuf: "
                "pip install 'hf-pretrain[sentencepiece]'"
            )
        _check_has_tokenizer(str(folder))
    if os.path.isfile(folder):
        return InputError(f"{what}: it is a file; name the folder that holds it, or a repository")
    damage = _damage(folder) if _is_folder(folder) else None
    if damage is not None:
        return InputError(f"{what}: {damage}")
    if "Unrecognized configuration class" in str(error):
        return InputError(f"{what}: {refuse_type(_model_type(folder / 'config.json') or name, auto_class)}")
    return InputError(f"{what}: {_cause(error)}")


def _damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint in a folder, None if they can be read."""
    paths = [path for pattern in ("config.json", "*.json", *_WEIGHTS) for path in sorted(folder.glob(pattern))]
    for path in paths:
        if path.is_file() and (damage := _damage_of(path)) is not None:
            return f"{path.name} {damage}"
    return None


def _damage_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not begin:
        return "is empty: copy it again"
    if begin == _LFS:
        return "is a pointer of git-lfs, not the file: fetch it with `git lfs pull`, or download the repository anew"
    if path.suffix == ".json":
        return _damage_of_json(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        is_pickle = path.suffix != ".safetensors"
        why = "it is damaged, or holds more than weights" if is_pickle else "it is cut off or damaged"
        return f"cannot be read, {why} ({first_line(error)[:80]}): copy it again"
    return None


def _damage_of_json(path: Path) -> str | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is not JSON ({first_line(error)})"
    except RecursionError:
        return "is not JSON that can be read: it is nested too deep"
    if path.name == "config.json" and not isinstance(values, dict):
        return f"holds a {type(values).__name__}, not the JSON object of a configuration"
    return None
