"""Published weights against a model in plain NumPy, written from the layout of the files: every step of a tiny one."""

import json

import h5py
import numpy as np
import pytest
import torch

from hf_pretrain import ElmoTokenizer, load_elmo_weights

CELLS, WIDTH, CHARACTERS = 7, 4, 3
FILTERS = [[1, 4], [2, 5], [3, 6]]
CLIP = 0.3
OPTIONS = {
    "lstm": {
        "cell_clip": CLIP,
        "proj_clip": CLIP,
        "use_skip_connections": True,
        "n_layers": 2,
        "projection_dim": WIDTH,
        "dim": CELLS,
    },
    "char_cnn": {
        "embedding": {"dim": CHARACTERS},
        "filters": FILTERS,
        "n_highway": 2,
        "n_characters": 262,
        "max_characters_per_token": 50,
        "activation": "relu",
    },
}
WORDS = [["Été", "of", "the", "year"], ["a"]]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(3)
    total = sum(number for _, number in FILTERS)

    def draw(*shape):
        return rng.normal(0, 0.7, shape).astype(np.float32)

    made = {"char_embed": draw(261, CHARACTERS), "CNN_proj/W_proj": draw(total, WIDTH), "CNN_proj/b_proj": draw(WIDTH)}
    for number, (width, count) in enumerate(FILTERS):
        made[f"CNN/W_cnn_{number}"] = draw(1, width, CHARACTERS, count)
        made[f"CNN/b_cnn_{number}"] = draw(count)
    for number in range(2):
        for kind in ("carry", "transform"):
            made[f"CNN_high_{number}/W_{kind}"] = draw(total, total) / 3
            made[f"CNN_high_{number}/b_{kind}"] = draw(total)
        for layer in range(2):
            group = f"RNN_{number}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            made |= {
                f"{group}/W_0": draw(2 * WIDTH, 4 * CELLS),
                f"{group}/B": draw(4 * CELLS),
                f"{group}/W_P_0": draw(CELLS, WIDTH),
            }
    return made


def characters_of(word):
    """Numbers of a word's characters, one more than in the vocabulary: 0 is padding of sentences."""
    if word in ("<S>", "</S>"):
        inner = [256 if word == "<S>" else 257]
    else:
        inner = list(word.encode("utf-8"))[:48]
    numbers = [258, *inner, 259]
    return np.array(numbers + [260] * (50 - len(numbers))) + 1


def embed(weights, word):
    table = np.concatenate([np.zeros((1, CHARACTERS)), weights["char_embed"]])
    states = table[characters_of(word)]
    found = []
    for number, (width, _) in enumerate(FILTERS):
        kernel = weights[f"CNN/W_cnn_{number}"][0]
        windows = [
            np.einsum("wc,wcf->f", states[start : start + width], kernel) for start in range(len(states) - width + 1)
        ]
        found.append(np.maximum(np.max(windows, axis=0) + weights[f"CNN/b_cnn_{number}"], 0))
    x = np.concatenate(found)
    for number in range(2):
        group = f"CNN_high_{number}"
        carry = sigmoid(x @ weights[f"{group}/W_carry"] + weights[f"{group}/b_carry"])
        x = (
            carry * np.maximum(x @ weights[f"{group}/W_transform"] + weights[f"{group}/b_transform"], 0)
            + (1 - carry) * x
        )
    return x @ weights["CNN_proj/W_proj"] + weights["CNN_proj/b_proj"]


def read(weights, inputs, direction):
    """Outputs of both layers of a direction, in the order of the text; one pass from a state of zeros."""
    layers, order = [], slice(None, None, -1 if direction else 1)
    below = inputs[order]
    for layer in range(2):
        group = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
        cell, output, outputs = np.zeros(CELLS), np.zeros(WIDTH), []
        for x in below:
            gates = np.concatenate([x, output]) @ weights[f"{group}/W_0"] + weights[f"{group}/B"]
            enter, new, forget, out = np.split(gates, 4)
            cell = sigmoid(forget + 1) * cell + sigmoid(enter) * np.tanh(new)
            cell = np.clip(cell, -CLIP, CLIP)
            output = np.clip((sigmoid(out) * np.tanh(cell)) @ weights[f"{group}/W_P_0"], -CLIP, CLIP)
            outputs.append(output)
        # The first layer's output is added to that of the second, and nothing to its own.
        below = np.array(outputs) + (layers[-1] if layers else 0)
        layers.append(below)
    return [states[order] for states in layers]


def test_the_layers_are_those_of_the_file(weights, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps(OPTIONS))
    with h5py.File(tmp_path / "weights.hdf5", "w") as file:
        for name, value in weights.items():
            file[name] = value
    model = load_elmo_weights(tmp_path / "options.json", tmp_path / "weights.hdf5")
    inputs = ElmoTokenizer.without_vocabulary()(WORDS, is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        layers = model(**inputs).hidden_states
    assert len(layers) == 3
    for row, words in enumerate(WORDS):
        embedded = np.array([embed(weights, word) for word in ["<S>", *words, "</S>"]])
        both = [read(weights, embedded, direction) for direction in (0, 1)]
        expected = [np.tile(embedded, (1, 2)), *(np.concatenate(pair, axis=1) for pair in zip(*both, strict=True))]
        for number, layer in enumerate(expected):
            np.testing.assert_allclose(layers[number][row, : len(embedded)], layer, atol=2e-6, err_msg=str(number))
        # The limits are reached, or they would not be tested.
        assert np.isclose(np.abs(expected[1]), CLIP).any()
