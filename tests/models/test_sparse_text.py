"""Sparse vectors of texts as a model: columns, weights, gradients, and the code that lies beside the weights."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from hf_pretrain import SparseTextConfig, SparseTextModel

IDS = torch.tensor([[2, 3, 2, 0], [1, 5, 1, 4], [0, 0, 0, 0]])

# Runs where hf_pretrain cannot be imported: compares with what was saved, and saves again.
ELSEWHERE = (
    WITHOUT_LIBRARY
    + """
import os, pathlib
root = pathlib.Path({root!r})
os.environ["HF_MODULES_CACHE"] = str(root / "modules")
import torch, transformers
model = transformers.AutoModel.from_pretrained(root / "saved", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    found = model(torch.tensor([[2, 3, 2, 0]])).pooler_output.to_dense()
    torch.testing.assert_close(found, torch.load(root / "expected.pt"))
model.save_pretrained(root / "again")
print("all is well")
"""
)


def build(**options):
    model = SparseTextModel(SparseTextConfig(**({"vocab_size": 6, "hidden_size": 4} | options)))
    assert model.weights.eq(1).all()
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.5, 2.0, 3.0, 0.0]))
    return model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "onehot"}, [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]),
        ({"method": "counts"}, [[2, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]),
        ({"method": "counts", "sublinear_tf": True}, [[1 + math.log(2), 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]),
        ({"method": "onehot", "normalize": True}, [[0.5**0.5, 0.5**0.5, 0, 0], [0, 0, 0.5**0.5, 0.5**0.5], [0] * 4]),
        ({"normalize": False}, [[1, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]),
        ({}, [[0.2**0.5, 0.8**0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
    ],
)
def test_a_text_has_its_words_in_their_columns(options, expected):
    pooled = build(**options)(IDS).pooler_output
    assert pooled.is_sparse and pooled.is_coalesced() and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.to_dense(), torch.tensor(expected, dtype=torch.float32))


def test_a_token_is_one_column():
    states = build()(IDS).last_hidden_state
    assert states.is_sparse and states.shape == (3, 4, 4)
    expected = torch.zeros(3, 4, 4)
    expected[0, [0, 2], 0], expected[0, 1, 1], expected[1, 3, 2] = 0.5, 2.0, 3.0
    torch.testing.assert_close(states.to_dense(), expected)


def test_what_is_masked_does_not_count():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    pooled = build(method="counts")(IDS, attention_mask=mask).pooler_output
    assert pooled.to_dense().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert build()(IDS[:, :0]).pooler_output.to_dense().shape == (3, 4)


def test_weights_can_be_learned():
    model = build(normalize=False)
    model(IDS).pooler_output.to_dense().sum().backward()
    assert model.weights.grad.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("sizes", [{"hidden_size": 5}, {"hidden_size": 0, "vocab_size": 2}])
def test_sizes_are_checked(sizes):
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        build(**sizes)


def test_it_opens_where_this_library_is_not(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save(model(IDS[:1]).pooler_output.to_dense(), tmp_path / "expected.pt")
    assert run_fresh({"elsewhere": ELSEWHERE.format(root=str(tmp_path))}, tmp_path)["elsewhere"] == "all is well\n"
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is SparseTextModel
