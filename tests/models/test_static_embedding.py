"""Static vectors as a model: means, the table, saving, and the code that lies beside the weights."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from hf_pretrain import StaticEmbeddingConfig, StaticEmbeddingModel

# Runs where hf_pretrain cannot be imported: compares with what was saved, and saves again.
ELSEWHERE = (
    WITHOUT_LIBRARY
    + """
import os, pathlib
root = pathlib.Path({root!r})
os.environ["HF_MODULES_CACHE"] = str(root / "modules")
import torch, transformers
model, info = transformers.AutoModel.from_pretrained(root / "saved", trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    found = model(torch.tensor([[2, 5, 0], [3, 3, 9]])).pooler_output
    torch.testing.assert_close(found, torch.load(root / "expected.pt"))
model.save_pretrained(root / "again")
print("all is well")
"""
)


def build(*, seed=0, **options):
    torch.manual_seed(seed)
    return StaticEmbeddingModel(StaticEmbeddingConfig(**({"vocab_size": 12, "hidden_size": 8} | options)))


def test_new_vectors_are_drawn_and_the_special_ones_are_zero():
    model = build(initializer_range=0.5)
    assert not model.embeddings[:2].any() and model.embeddings[2:].ne(0).all()
    assert 0.4 < model.embeddings[2:].std() < 0.6
    assert list(model.state_dict()) == ["embeddings"] and list(dict(model.named_parameters())) == ["embeddings"]


def test_a_text_is_the_mean_of_the_tokens_that_count():
    model = build()
    table = model.embeddings.detach()
    ids = torch.tensor([[2, 3, 0, 0], [4, 0, 5, 6], [1, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]])
    output = model(ids, attention_mask=mask)
    assert torch.equal(output.last_hidden_state, table[ids])
    expected = torch.stack(
        [
            (table[2] + table[3]) / 2,
            (table[4] + table[5] + table[6]) / 3,  # padding never counts, whatever the mask says
            (table[7] + table[9]) / 3,  # an unknown word counts, as zero
        ]
    )
    torch.testing.assert_close(output.pooler_output, expected)
    without_mask = model(ids).pooler_output
    torch.testing.assert_close(without_mask[:2], expected[:2])
    torch.testing.assert_close(without_mask[2], (table[7] + table[8] + table[9]) / 4)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_text_without_words_is_zero(normalize):
    model = build(normalize=normalize)
    ids = torch.tensor([[0, 0], [2, 0], [1, 1]])
    pooled = model(ids, attention_mask=(ids != 0).long()).pooler_output
    assert not pooled[0].any() and not pooled[2].any() and pooled.isfinite().all()
    assert model(torch.zeros(2, 0, dtype=torch.long)).pooler_output.equal(torch.zeros(2, 8))
    pooled.sum().backward()
    assert model.embeddings.grad.isfinite().all()


def test_normalized_vectors_have_length_one():
    ids = torch.tensor([[2, 3], [4, 0]])
    plain, unit = (build(normalize=normalize)(ids).pooler_output for normalize in (False, True))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))


def test_vectors_in_place_of_ids():
    model = build()
    ids, mask = torch.tensor([[2, 3, 4], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = model.get_input_embeddings()(ids)
    given[0, 2] = float("nan")  # what is masked is not read
    output = model(inputs_embeds=given, attention_mask=mask)
    assert torch.equal(output.pooler_output, model(ids, attention_mask=mask).pooler_output)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": given}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_the_states_are_the_vectors_alone():
    model, ids = build(), torch.tensor([[2, 3]])
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 1 and torch.equal(output.hidden_states[0], output.last_hidden_state)
    assert model(ids).hidden_states is None
    assert len(model(ids, return_dict=False)) == 2


def test_it_can_be_fine_tuned():
    model = build()
    before = model.embeddings.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[2, 3, 0]])).pooler_output.sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.embeddings[2:4].detach(), before[2:4] - 0.5)
    assert torch.equal(model.embeddings[4:], before[4:]) and not model.embeddings[0].any()


def test_the_table_is_read_set_and_resized():
    model = build()
    assert model.get_input_embeddings().weight is model.embeddings
    old = model.embeddings.detach().clone()
    table = model.resize_token_embeddings(15)
    assert table.weight is model.embeddings and model.embeddings.shape == (15, 8) and model.config.vocab_size == 15
    assert torch.equal(model.embeddings[:12], old)
    model.resize_token_embeddings(6, mean_resizing=False)
    assert torch.equal(model.embeddings, old[:6])
    model(torch.tensor([[5]])).pooler_output.sum().backward()
    assert model.embeddings.grad[5].eq(1).all()
    # A head may share the table, and a step of either is one of both.
    head = torch.nn.Linear(8, 6, bias=False)
    head.weight = model.get_input_embeddings().weight
    model.tie_weights()
    assert head.weight is model.embeddings
    other = torch.nn.Embedding(6, 8)
    model.set_input_embeddings(other)
    assert model.embeddings is other.weight and torch.equal(
        model(torch.tensor([[4]])).pooler_output[0], other.weight[4]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same(dtype, tmp_path):
    model = build(normalize=True, method="glove", training={"epochs": 3}, seed=3).to(dtype)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True, **options)
        assert type(again) is StaticEmbeddingModel and not any(info.values())
        assert again.dtype == dtype and torch.equal(again.embeddings, model.embeddings)
        ids = torch.tensor([[2, 3, 4]])
        assert again(ids).pooler_output.dtype == dtype
        assert torch.equal(again(ids).pooler_output, model(ids).pooler_output)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.method, config.training, config.normalize) == ("glove", {"epochs": 3}, True)


def test_the_mean_of_half_precision_is_added_in_full():
    model = build(vocab_size=3, hidden_size=1, initializer_range=1.0).to(torch.bfloat16)
    with torch.no_grad():
        model.embeddings[2] = 1.0
    # Ones added up in bf16 stop at 256.
    assert model(torch.full((1, 2000), 2)).pooler_output.item() == 1.0


def test_a_step_waits_for_nothing():
    model = build(normalize=True).to("meta")
    ids = torch.zeros(3, 4, dtype=torch.long, device="meta")
    pooled = model(ids, attention_mask=torch.ones_like(ids)).pooler_output
    pooled.sum().backward()
    assert pooled.shape == (3, 8) and model.embeddings.grad.is_meta


def test_sizes_are_checked():
    with pytest.raises(StrictDataclassError, match="hidden_size=0"):
        StaticEmbeddingConfig(hidden_size=0)


def test_it_opens_where_this_library_is_not(tmp_path):
    model = build(normalize=True)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save(model(torch.tensor([[2, 5, 0], [3, 3, 9]])).pooler_output, tmp_path / "expected.pt")
    assert run_fresh({"elsewhere": ELSEWHERE.format(root=str(tmp_path))}, tmp_path)["elsewhere"] == "all is well\n"
    # What was saved there is as complete, and opens here.
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is StaticEmbeddingModel
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert {"modules.json", "1_Normalize", "modeling_static_embedding.py"} <= names
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_static_embedding.StaticEmbeddingModel"
    # model2vec reads both names; without the second it cuts texts at 512 tokens.
    assert config["normalize"] is True and config["max_length"] is None
