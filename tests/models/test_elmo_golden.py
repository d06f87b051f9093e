"""The published code's own numbers: fixtures of bilm-tf and allennlp, read batch after batch with the state carried on."""

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hf_pretrain import ElmoTokenizer, InputError, load_elmo_weights
from hf_pretrain.models.elmo.conversion import convert_elmo_weights

GOLDEN = os.environ.get("ELMO_GOLDEN", "")
SENTENCES = {"bilm": "lm_embeddings_sentences.json", "allennlp": "sentences.json"}
needs_golden = pytest.mark.skipif(
    not (Path(GOLDEN) / "bilm" / "lm_weights.hdf5").is_file() or not GOLDEN,
    reason="ELMO_GOLDEN names no folder with the fixtures of bilm-tf and allennlp",
)


def read_batches(model, folder):
    """Yield the words and the layers of each batch: the sentences of one number in each of the three texts."""
    tokenizer = ElmoTokenizer.without_vocabulary()
    name = next(name for name in SENTENCES.values() if (folder / name).is_file())
    for batch in zip(*json.loads((folder / name).read_text()), strict=True):
        words = [sentence.split() for sentence in batch]
        inputs = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            yield words, model(**inputs).hidden_states


def largest_difference(model, folder):
    """Largest difference of the top layer from the numbers, borders of sentences left out."""
    found = []
    for step, (words, layers) in enumerate(read_batches(model, folder)):
        for row, sentence in enumerate(words):
            with h5py.File(folder / f"lm_embeddings_{row}.hdf5", "r") as file:
                expected = np.concatenate(np.array(file[str(step)]), axis=1)
            own = layers[-1][row, 1 : len(sentence) + 1].numpy()
            found.append(np.abs(own - expected).max())
    assert len(found) == 30
    return max(found)


@needs_golden
@pytest.mark.parametrize("name", SENTENCES)
def test_the_numbers_are_those_of_the_original(name):
    folder = Path(GOLDEN) / name
    files = (folder / "options.json", folder / "lm_weights.hdf5")
    model = load_elmo_weights(*files, stateful=True)
    assert largest_difference(model, folder) < 1e-5
    # Each of these alone is wrong.
    model.reset_states()
    assert largest_difference(load_elmo_weights(*files), folder) > 0.1
    assert largest_difference(load_elmo_weights(*files, stateful=True, cell_clip=None), folder) > 1e-4
    with pytest.raises(InputError, match="does not fit the options"):
        load_elmo_weights(*files, cell_size=70)


@needs_golden
def test_words_alone_have_the_vectors_of_the_original():
    """The marks of sentences are words of the vocabulary too."""
    folder = Path(GOLDEN) / "allennlp"
    model = load_elmo_weights(folder / "options.json", folder / "lm_weights.hdf5")
    with h5py.File(folder / "elmo_token_embeddings.hdf5", "r") as file:
        expected = np.array(file["embedding"])
    words = (folder / "vocab_test.txt").read_text(encoding="utf-8").split()
    inputs = ElmoTokenizer.without_vocabulary()([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).hidden_states[0][0, 1:-1]
    np.testing.assert_allclose(found, np.tile(expected, (1, 2)), atol=1e-5)


def test_what_is_no_elmo_is_refused(tmp_path):
    (tmp_path / "options.json").write_text("{}")
    with pytest.raises(InputError, match="no options of an ELMo"):
        convert_elmo_weights({}, {})
    with pytest.raises(InputError, match="options_file="):
        load_elmo_weights(tmp_path / "none.json", tmp_path / "none.hdf5")
    options = {
        "lstm": {
            "cell_clip": 3,
            "use_skip_connections": True,
            "n_layers": 2,
            "proj_clip": 3,
            "projection_dim": 4,
            "dim": 8,
        },
        "char_cnn": {
            "embedding": {"dim": 4},
            "filters": [[1, 4]],
            "n_highway": 1,
            "n_characters": 262,
            "max_characters_per_token": 50,
            "activation": "relu",
        },
    }
    with pytest.raises(InputError, match="char_embed"):
        convert_elmo_weights({}, options)
    options["char_cnn"]["n_characters"] = 261
    with pytest.raises(InputError, match="n_characters=261"):
        convert_elmo_weights({}, options)


def test_hdf5_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "options.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"hf-pretrain\[elmo\]"):
        load_elmo_weights(tmp_path / "options.json", tmp_path / "weights.hdf5")
