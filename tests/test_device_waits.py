"""No training step may wait for the device: model and batch stand on `meta`, where whatever asks for a value raises."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_pretrain.modeling.visibility import padding
from method_matrix import build, programs

PROGRAMS = programs()
RAGGED, EQUAL = [0, 1, 2, 3], [0, 0, 0, 0]


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(part) for part in value]
    return value


def step_on_meta(trainer, rows):
    """Forward, weighted total and backward of a training step, with every tensor on `meta`."""
    collate = trainer.get_train_dataloader().collate_fn
    batch = collate([trainer.train_dataset[i] for i in rows])
    batch.pop("lanes", None)  # The Trainer takes them out.
    model = trainer.model.to("meta").train()
    batch = {name: on_meta(value) for name, value in batch.items()}
    counts = model.count_targets(batch)
    output = model(**batch)
    total = sum(loss.sum.sum() / counts[name].clamp(min=1) for name, loss in output.losses.items())
    total.backward()


@pytest.mark.parametrize("rows", [RAGGED, EQUAL], ids=["padded", "plain"])
@pytest.mark.parametrize("method", sorted(PROGRAMS))
def test_a_step_waits_for_nothing(method, rows, tmp_path):
    step_on_meta(build(PROGRAMS[method], tmp_path), rows)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "albert", "distilbert", "modernbert"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_host_decides_about_the_mask(model_type, backend):
    """On the very device: the trial accepts our mask, and the states are those under the stock model's own, bit for bit."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}}
    config = AutoConfig.for_model(model_type, vocab_size=60, pad_token_id=0, **names.get(model_type, sizes))
    model = AutoModel.from_config(config, attn_implementation=backend).eval()
    ids = torch.arange(5, 35).reshape(2, 15)
    whole = torch.ones_like(ids)
    padded = whole.clone()
    padded[1, 11:] = 0
    if padding._asks_its_mask(model):
        assert padding.padding_inputs(model, whole, False) is None
        assert padding.padding_inputs(model, padded, True) is not padded
    with torch.no_grad():
        for mask, is_padded in ((whole, False), (padded, True)):
            ours = padding.padding_inputs(model, mask, is_padded)
            found, expected = (model(ids, attention_mask=each)[0][mask != 0] for each in (ours, mask))
            assert torch.equal(found, expected)
