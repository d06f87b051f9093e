"""The published ELMo weights, an `options.json` and a file in HDF5, as a model of ours.

    >>> load_elmo_weights("options.json", "weights.hdf5").save_pretrained("elmo-original")

The original goes on from the text before, row by row: give `stateful=True` for its very numbers. It clips cells and projections
inside the recurrence, which is kept. The vocabulary of its softmax is not published: the model reads `character_ids` alone, which
[`ElmoTokenizer.without_vocabulary`] makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_pretrain.errors import InputError, one_line
from hf_pretrain.models.elmo.configuration_elmo import ElmoConfig
from hf_pretrain.models.elmo.layers_elmo import NUM_CHARACTERS
from hf_pretrain.models.elmo.modeling_elmo import ElmoModel

# Order of TensorFlow's gates (input, new, forget, output) in that of torch (input, forget, new, output).
_GATES = (0, 2, 1, 3)
_FORGET = 2
_DIRECTIONS = ("forward", "backward")


def convert_elmo_weights(
    weights: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[ElmoConfig, dict[str, torch.Tensor]]:
    """Convert published weights.

    Args:
        weights: Arrays by their path in the file, such as `CNN/W_cnn_0`.
        options: The content of `options.json`.

    Returns:
        The configuration and the state of an [`ElmoModel`].

    Raises:
        InputError: If an option or an array is missing.
    """
    try:
        config = _config_of(options)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"options={one_line(error)}: these are no options of an ELMo model") from error

    def array(name: str) -> torch.Tensor:
        if name not in weights:
            raise InputError(f"weights have no {name!r}: they are not those of an ELMo with these options")
        return torch.from_numpy(np.array(weights[name], dtype=np.float32))

    characters = array("char_embed")
    state = {"embeddings.table.weight": torch.cat([torch.zeros(1, characters.shape[1]), characters])}
    for number in range(len(config.filters or [])):
        name = f"embeddings.convolutions.{number}"
        state[f"{name}.weight"] = array(f"CNN/W_cnn_{number}")[0].permute(2, 1, 0)
        state[f"{name}.bias"] = array(f"CNN/b_cnn_{number}")
    linears = {"embeddings.projection": ("CNN_proj", "proj")}
    for number in range(config.num_highway_layers):
        name = f"embeddings.highways.{number}"
        linears |= {f"{name}.gate": (f"CNN_high_{number}", "carry")}
        linears |= {f"{name}.transform": (f"CNN_high_{number}", "transform")}
    for name, (group, kind) in linears.items():
        state[f"{name}.weight"] = array(f"{group}/W_{kind}").T
        state[f"{name}.bias"] = array(f"{group}/b_{kind}")
    for number, direction in enumerate(_DIRECTIONS):
        for layer in range(config.num_hidden_layers):
            group = f"RNN_{number}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            parts = (array(f"{group}/{part}") for part in ("W_0", "B", "W_P_0"))
            for name, weight in _layer_state(*parts).items():
                state[f"{direction}_layers.{layer}.{name}"] = weight
    return config, {name: weight.contiguous() for name, weight in state.items()}


def load_elmo_weights(
    options_file: str | Path, weights_file: str | Path, *, stateful: bool = False, **changes: Any
) -> ElmoModel:
    """Load published weights as a model that can be saved.

    Args:
        options_file: The `options.json`.
        weights_file: The weights in HDF5.
        stateful: Whether to go on, row by row, from where the last call ended, as the original does.
        **changes: Further values of the configuration.

    Returns:
        The model, in evaluation.

    Raises:
        InputError: If a file cannot be read, its content is something else, or h5py is not installed.
    """
    try:
        options = json.loads(Path(options_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"options_file={str(options_file)!r} cannot be read ({one_line(error)})") from error
    config, state = convert_elmo_weights(_read_arrays(weights_file), options)
    for name, value in (changes | {"stateful": stateful}).items():
        if not hasattr(config, name):
            raise InputError(f"{name}={value!r}: ElmoConfig has no such value")
        setattr(config, name, value)
    model = ElmoModel(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(error, line=1)
        raise InputError(f"weights_file={str(weights_file)!r} does not fit the options ({reason})") from error
    return model.eval()


def _read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise InputError("the weights are in HDF5, which h5py reads: pip install 'hf-pretrain[elmo]'") from error
    arrays: dict[str, np.ndarray] = {}

    def keep(name: str, part: Any) -> None:
        if hasattr(part, "dtype"):
            arrays[name] = np.array(part[...])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(keep)
    except OSError as error:
        raise InputError(f"weights_file={str(path)!r} cannot be read as HDF5 ({one_line(error)})") from error
    return arrays


def _config_of(options: Mapping[str, Any]) -> ElmoConfig:
    lstm, characters = options["lstm"], options["char_cnn"]
    if characters["n_characters"] != NUM_CHARACTERS:
        raise ValueError(f"n_characters={characters['n_characters']} of char_cnn, which must be {NUM_CHARACTERS}")
    return ElmoConfig(
        hidden_size=2 * lstm["projection_dim"],
        cell_size=lstm["dim"],
        num_hidden_layers=lstm["n_layers"],
        use_skip_connections=lstm["use_skip_connections"],
        cell_clip=lstm["cell_clip"],
        projection_clip=lstm["proj_clip"],
        max_characters=characters["max_characters_per_token"],
        character_embedding_size=characters["embedding"]["dim"],
        filters=characters["filters"],
        num_highway_layers=characters["n_highway"],
        character_activation=characters["activation"],
        # A model that is not trained further has none of it.
        hidden_dropout_prob=options.get("dropout", 0.1),
    )


def _layer_state(kernel: torch.Tensor, bias: torch.Tensor, projection: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an LSTM's weights by torch's names.

    Args:
        kernel: ``[input + output, 4C]``.
        bias: ``[4C]``; the original adds one to what is forgotten while it runs.
        projection: ``[C, P]``.
    """
    gates = torch.stack(kernel.T.chunk(4))
    biases = torch.stack(bias.chunk(4))
    biases[_FORGET] += 1.0
    order, width = list(_GATES), projection.shape[1]
    both = gates[order].flatten(0, 1)
    return {
        "weight_ih_l0": both[:, :-width],
        "weight_hh_l0": both[:, -width:],
        "bias_ih_l0": biases[order].flatten(),
        "bias_hh_l0": torch.zeros_like(bias),
        "weight_hr_l0": projection.T,
    }
