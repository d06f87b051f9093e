"""An adapter alone, as peft writes it: what it was trained on, and the model, or its encoder, with it in the weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.modeling.loading import find_file, from_config, from_pretrained, quiet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# peft's kind of task -> transformers' table of classes.
_TABLES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
_WITH_LABELS = ("SEQ_CLS", "TOKEN_CLS")
_HEADS = frozenset({"classifier", "score", "out_proj"})


def read_adapter(name: str) -> dict[str, Any] | None:
    """Return the configuration of an adapter that lies alone in a folder or repository; None if there is a whole model.

    Raises:
        InputError: If the file is damaged, or names no model below the adapter.
    """
    path = None if Path(name).is_file() else find_file(name, CONFIG)
    if path is None or any(find_file(name, file) for file in ("model.safetensors", "model.safetensors.index.json")):
        return None
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        below = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model={name!r}: its {CONFIG} is damaged ({one_line(error)}): save the adapter again"
        ) from error
    if not isinstance(below, str) or not below:
        raise InputError(
            f"model={name!r} is an adapter whose {CONFIG} names no model below it: set base_model_name_or_path there"
        )
    return config


def trained_class(adapter: dict[str, Any], below: PreTrainedConfig) -> str:
    """Return the name of the class that an adapter was trained on; "" if nothing says it."""
    mapped = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if mapped:
        return str(mapped)
    table = getattr(modeling_auto, _TABLES.get(str(adapter.get("task_type")), ""), {})
    found = table.get(below.model_type) or next(iter(below.architectures or ()), "")
    return str(found if isinstance(found, str) else found[0])


def open_with_adapter(name: str, adapter: dict[str, Any], class_name: str) -> PreTrainedModel:
    """Return the model below an adapter, of the class that it was trained on, with the adapter in its weights.

    Args:
        name: Folder or repository of the adapter.
        adapter: Its configuration.
        class_name: The class, as `trained_class` finds it.

    Raises:
        InputError: If the adapter has weights that the model below has no place for, or cannot be merged.
    """
    import peft  # not at module level: it takes a second to import

    from hf_pretrain.transfer.adapters import merge_for_export

    path, base = find_file(name, WEIGHTS), str(adapter["base_model_name_or_path"])
    if path is None:
        raise InputError(f"model={name!r} is an adapter without {WEIGHTS}: save it again, as safetensors")
    kind = getattr(transformers, class_name, None)
    if kind is None:
        raise InputError(
            f"model={name!r} is an adapter on a {class_name or 'class that it does not name'}, which transformers does not have: "
            "merge it (merge_and_unload) and save the whole model"
        )
    try:
        weights = peft.utils.load_peft_weights(str(Path(path).parent), device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"model={name!r}: {WEIGHTS} cannot be read ({one_line(error)}): save it again") from error
    labels = _num_labels(weights) if adapter.get("task_type") in _WITH_LABELS else None
    try:
        model = from_pretrained(kind, base, announce=False, **({} if labels is None else {"num_labels": labels}))
    except InputError as error:
        raise InputError(
            f"model={name!r} is an adapter on {base!r}, which is not opened as {class_name}: {error}"
        ) from error
    adapted = _adapted(model, name, str(Path(path).parent), base)
    known = peft.utils.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    lost = sorted(set(weights) - set(known) - set(adapted.state_dict()))
    if lost:
        raise InputError(
            f"model={name!r} has {lost[0]}, for which {class_name} of {base!r} has no place: name the model below it"
        )
    fresh = _not_in(getattr(model, "fresh_parameters", ()), weights)
    merged = merge_for_export(adapted)
    setattr(merged, "fresh_parameters", fresh)  # noqa: B010 (no attribute that the type knows)
    return merged


def open_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a checkpoint; of an adapter alone that of the model below it.

    Raises:
        InputError: If it cannot be opened.
    """
    adapter = read_adapter(name)
    found: PreTrainedConfig = from_pretrained(
        AutoConfig, name if adapter is None else str(adapter["base_model_name_or_path"])
    )
    return found


def open_encoder(name: str, **options: Any) -> PreTrainedModel:
    """Return the encoder of a checkpoint as `AutoModel` opens it; of an adapter alone, with the adapter in its weights.

    Args:
        name: Folder or repository.
        **options: Passed on to transformers; not of an adapter.

    Returns:
        The model, with the names of what was drawn anew as `fresh_parameters`.

    Raises:
        InputError: If it cannot be opened, or the model below an adapter has no encoder of its own.
    """
    adapter = read_adapter(name)
    if adapter is None:
        return cast(PreTrainedModel, from_pretrained(AutoModel, name, announce=False, **options))
    class_name = trained_class(adapter, open_config(name))
    body = open_with_adapter(name, adapter, class_name).base_model
    encoder: PreTrainedModel = from_config(AutoModel, body.config)
    if type(encoder) is not type(body):
        raise InputError(
            f"model={name!r} is an adapter on a {class_name}, which has no {type(encoder).__name__} inside: merge it "
            "(merge_and_unload) and save the whole model"
        )
    missing, _ = encoder.load_state_dict(body.state_dict(), strict=False)
    setattr(encoder, "fresh_parameters", tuple(missing))  # noqa: B010 (no attribute that the type knows)
    encoder.config.name_or_path = name
    return encoder.eval()


def _adapted(model: PreTrainedModel, name: str, folder: str, base: str) -> Any:
    """Return a model with an adapter on it."""
    import peft

    with warnings.catch_warnings(), quiet():
        # peft asks for an old name of transformers, and warns of what is checked afterwards.
        warnings.simplefilter("ignore")
        try:
            return peft.PeftModel.from_pretrained(model, folder)
        except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
            raise InputError(
                f"model={name!r} is an adapter that does not go onto {base!r}: {one_line(error)}"
            ) from error


def _num_labels(weights: dict[str, torch.Tensor]) -> int | None:
    """Return the number of classes of the head that an adapter holds."""
    rows = [
        len(tensor)
        for name, tensor in weights.items()
        if tensor.dim() == 2 and name.endswith(".weight") and "lora_" not in name and _HEADS & set(name.split("."))
    ]
    return min(rows, default=None)


def _not_in(fresh: tuple[str, ...], weights: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the parameters drawn anew that the adapter does not hold as a whole either."""
    held = {name.removeprefix("base_model.model.") for name in weights}
    return tuple(name for name in fresh if name not in held)
