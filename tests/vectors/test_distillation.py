"""Vectors of an encoder: its states of single tokens, their reduction, their weights, and the folder that they become."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.vectors.distillation import distil_vectors
from hf_pretrain.vectors.folder import WordVectors

CORPUS = [
    "the quick brown foxes were jumping over many lazy dogs and quickly jumped back again",
    "unhappily the happiest unhappy fox unjumped; quicker, quickest, laziest dogginess (again)!",
    "reading, reader, reads, unread, rereading: the reading rooms of readers are readable",
] * 5
KINDS = {"bert": "wordpiece", "roberta": "bpe", "modernbert": "bpe", "deberta-v2": "unigram"}


@pytest.fixture(scope="module")
def tokenizers():
    return {
        kind: train_tokenizer(CORPUS, kind=kind, vocab_size=400, min_frequency=1, model_max_length=32)
        for kind in set(KINDS.values())
    }


def model_for(tokenizer, kind="bert", auto_class=AutoModel):
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=40,
        **ids,
    )
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def bert(tokenizers):
    return model_for(tokenizers["wordpiece"]), tokenizers["wordpiece"]


@torch.no_grad()
def state(model, tokenizer, word):
    """The mean of the states of a word's own tokens, one text at a time."""
    encoding = tokenizer(word, return_tensors="pt")
    inside = [token not in tokenizer.all_special_ids for token in encoding["input_ids"][0].tolist()]
    states = model.eval()(**encoding).last_hidden_state[0]
    return states[torch.tensor(inside)].mean(0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_state_of_the_token_alone(tokenizers, kind):
    tokenizer = tokenizers[KINDS[kind]]
    model = model_for(tokenizer, kind).train()
    distilled = distil_vectors(model, tokenizer, dimensions=None, weighting="none", batch_size=7)
    assert model.training
    vocabulary, compared = tokenizer.get_vocab(), 0
    assert distilled.vectors.shape == (len(tokenizer), 16) and distilled.vectors.dtype == np.float32
    for word in ("the", "reading", "dogs", "fox", "are", "again", "over"):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            assert distilled.words[ids[0]] == tokenizer.convert_ids_to_tokens(ids[0])
            np.testing.assert_allclose(distilled.vectors[ids[0]], state(model, tokenizer, word), atol=1e-5)
            compared += 1
    assert compared
    special = [vocabulary[token] for token in tokenizer.all_special_tokens]
    assert not distilled.vectors[special].any() and not distilled.weights[special].any()
    assert np.delete(distilled.vectors, special, axis=0).any(axis=1).all()
    assert distilled.explained_variance == 1


def test_words_are_means_over_their_pieces(bert):
    words = ["the", "unreaders", "foxer", "rereader"]
    distilled = distil_vectors(*bert, words=words, dimensions=None, weighting="none", batch_size=2)
    assert distilled.words == tuple(words) and distilled.tokenizer is None
    assert any(len(bert[1].tokenize(word)) > 1 for word in words)
    for word, vector in zip(words, distilled.vectors, strict=True):
        np.testing.assert_allclose(vector, state(*bert, word), atol=1e-5)


def test_a_batch_does_not_matter(bert):
    one, other = (distil_vectors(*bert, dimensions=4, batch_size=size).vectors for size in (1, 1000))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_head_is_not_used(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    model = model_for(tokenizer, auto_class=AutoModelForMaskedLM)
    one, other = (distil_vectors(each, tokenizer, dimensions=4).vectors for each in (model, model.base_model))
    assert np.array_equal(one, other)


def test_the_reduction_is_that_of_the_singular_values(bert):
    full = distil_vectors(*bert, dimensions=None, weighting="none")
    rows = full.weights > 0
    states = full.vectors[rows].astype(np.float64)
    left, values, _ = np.linalg.svd(states - states.mean(0), full_matrices=False)
    reduced = distil_vectors(*bert, dimensions=5, weighting="none")
    assert reduced.vectors.shape == (len(full.words), 5) and not reduced.vectors[~rows].any()
    assert reduced.explained_variance == pytest.approx((values[:5] ** 2).sum() / (values**2).sum())
    # Signs are free.
    np.testing.assert_allclose(np.abs(reduced.vectors[rows]), np.abs(left * values)[:, :5], atol=1e-4)


def test_weights_by_rank(bert):
    plain = distil_vectors(*bert, dimensions=4, weighting="none")
    rows = plain.weights > 0
    ranks = np.arange(1, rows.sum() + 1)
    shares = 1 / ranks / (1 / ranks).sum()
    for weighting, expected in (("sif", 1e-3 / (1e-3 + shares)), ("zipf", np.log(1 + ranks))):
        weighted = distil_vectors(*bert, dimensions=4, weighting=weighting, sif_coefficient=1e-3)
        np.testing.assert_allclose(weighted.weights[rows], expected, rtol=1e-5)
        np.testing.assert_allclose(
            weighted.vectors[rows], plain.vectors[rows] * expected[:, None], rtol=1e-4, atol=1e-6
        )


def test_weights_by_counts(bert):
    words, counts = ["fox", "the", "dogs", "lazy"], [10, 60, 30, 0]
    options = {"words": words, "dimensions": 2, "counts": counts}
    sif = distil_vectors(*bert, weighting="sif", **options)
    np.testing.assert_allclose(sif.weights, 1e-4 / (1e-4 + np.array(counts) / 100), rtol=1e-5)
    zipf = distil_vectors(*bert, weighting="zipf", **options)
    np.testing.assert_allclose(zipf.weights, np.log([4, 2, 3, 5]), rtol=1e-5)
    # Counts of special tokens are not counts of text.
    every = np.ones(len(bert[1]))
    every[bert[1].pad_token_id] = 1e9
    weights = distil_vectors(*bert, dimensions=2, counts=every).weights
    number = (weights > 0).sum()
    np.testing.assert_allclose(weights[weights > 0], 1e-4 / (1e-4 + 1 / number), rtol=1e-5)


def test_unused_tokens_get_no_vector_and_no_rank(tokenizers):
    vocabulary = tokenizers["wordpiece"].get_vocab()
    names = sorted(vocabulary, key=vocabulary.get)
    names[names.index("the")] = "[unused7]"
    tokenizer = type(tokenizers["wordpiece"])(vocab={name: number for number, name in enumerate(names)})
    distilled = distil_vectors(model_for(tokenizer), tokenizer, dimensions=4, weighting="zipf")
    unused = names.index("[unused7]")
    assert not distilled.vectors[unused].any()
    ranked = distilled.weights[distilled.weights > 0]
    np.testing.assert_allclose(ranked, np.log(np.arange(2, len(ranked) + 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_a_folder_of_the_encoders_own_tokens(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    model = model_for(tokenizer)
    distilled = distil_vectors(model, tokenizer, dimensions=4)
    distilled.to_word_vectors().save(tmp_path, method="distil", training={}, lowercase=False)
    saved = AutoModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(saved.embeddings.detach().numpy(), distilled.vectors)
    text = "the unhappy foxes read again"
    ids = distilled.tokenizer.encode(text).ids
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    opened = WordVectors.open(tmp_path)
    assert opened.tokenizer.encode(text).ids == ids


def test_a_folder_of_words_of_ones_own(bert, tmp_path):
    words = ["fox", "the", "dogs", "lazy"]
    distilled = distil_vectors(*bert, words=words, dimensions=2)
    distilled.to_word_vectors().save(tmp_path, method="distil", training={}, lowercase=True)
    np.testing.assert_array_equal(WordVectors.open(tmp_path).vectors, distilled.vectors)


def test_what_cannot_be_is_refused(bert):
    with pytest.raises(InputError, match="dimensions=17 must be at most 16, because the encoder is 16 wide"):
        distil_vectors(*bert, dimensions=17)
    with pytest.raises(InputError, match="dimensions=3 must be at most 2, because there are 2 words"):
        distil_vectors(*bert, words=["the", "fox"], dimensions=3)
    with pytest.raises(InputError, match=r"words\[1\]=' ' has no token"):
        distil_vectors(*bert, words=["the", " "], dimensions=1)
    with pytest.raises(InputError, match=r"words\[2\]='the' is given twice"):
        distil_vectors(*bert, words=["the", "fox", "the"], dimensions=1)
    with pytest.raises(InputError, match="counts"):
        distil_vectors(*bert, words=["the", "fox"], counts=[1], dimensions=1)
    with pytest.raises(InputError, match="weighting='idf'"):
        distil_vectors(*bert, weighting="idf")
