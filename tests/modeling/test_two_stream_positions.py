"""Both streams on stock models whose positions are an input, and the refusal of all others."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.permuted_batches import VOCAB, in_order, labelled, permuted, slots_of
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.permutation_lm.two_stream import PermutedBatch, PositionTwoStreams

MASK = 4
TYPES = ["bert", "roberta", "electra", "albert", "distilbert", "modernbert", "xlm-roberta", "nomic_bert", "eurobert"]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
NAMES = {"distilbert": {"intermediate_size": "hidden_dim"}}


def build(model_type, *, scale=6.0, attn_implementation="sdpa", **options):
    torch.manual_seed(0)
    values = {NAMES.get(model_type, {}).get(name, name): value for name, value in {**SIZES, **options}.items()}
    if model_type in ("electra", "albert"):
        values["embedding_size"] = 16
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def streams(model):
    adapter = PositionTwoStreams(model, mask_token_id=MASK)
    adapter.check()
    return adapter


def predict(adapter, batch, slots=None):
    return adapter(batch, slots_of(batch) if slots is None else slots)


def without_types(batch):
    return batch._replace(token_type_ids=None)


@pytest.mark.parametrize("model_type", TYPES)
def test_left_to_right_order_is_a_causal_language_model(model_type):
    adapter, batch = streams(build(model_type)), in_order()
    with torch.no_grad():
        whole = predict(adapter, batch).view(2, 9, -1)
        assert whole.isfinite().all()
        for length in (1, 2, 6, 9):
            short = PermutedBatch(*(value[:, :length] for value in batch[:4]), torch.full((2, 1), length - 1))
            torch.testing.assert_close(predict(adapter, short), whole[:, length - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_target_depends_on_what_it_sees_and_on_nothing_else(model_type):
    model, batch = build(model_type), without_types(permuted())
    adapter, found = streams(model), []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    for slot in labelled(batch).tolist()[::3]:
        row, column = slot // 4, batch.target_columns.flatten()[slot]
        found.clear()
        (gradient,) = torch.autograd.grad(predict(adapter, batch, torch.tensor([slot])).square().sum(), found[0])
        gradient = gradient.norm(dim=-1)
        sees = (batch.key_ranks[row] < batch.thresholds[row, column]) & (batch.attention_mask[row] == 1)
        assert (gradient[row, :12][sees] > 0).all()
        assert (gradient[row, :12][~sees] == 0).all()
        own = torch.arange(4) == slot % 4
        assert ((gradient[row, 12:] > 0) == own).all()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_who_sees_nothing_depends_on_nothing(model_type):
    model, batch = build(model_type), in_order(1)
    adapter, slot = streams(model), torch.tensor([0])
    logits = predict(adapter, batch, slot)
    assert logits.isfinite().all()
    assert torch.equal(logits, predict(adapter, batch._replace(input_ids=batch.input_ids.flip(1)), slot))
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_on_either_side_changes_nothing(model_type):
    adapter, batch = streams(build(model_type)), without_types(permuted())
    slots = labelled(batch)
    for left, right in ((3, 0), (0, 4)):
        padded = {
            name: torch.nn.functional.pad(getattr(batch, name), (left, right), value=fill)
            for name, fill in (("input_ids", 0), ("attention_mask", 0), ("key_ranks", 1 << 30), ("thresholds", 0))
        }
        wide = PermutedBatch(**padded, target_columns=batch.target_columns + left)
        with torch.no_grad():
            expected = predict(adapter, batch, slots)
            torch.testing.assert_close(predict(adapter, wide, slots), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "modernbert"])
def test_content_rows_are_the_stock_model(model_type):
    """With everything visible, the text without its queries is what the stock model reads."""
    model, batch = build(model_type), permuted()
    batch = without_types(batch)._replace(key_ranks=batch.key_ranks * 0, thresholds=batch.thresholds * 0 + 1)
    adapter, rows = streams(model), torch.arange(3)[:, None] * 16 + torch.arange(12)
    inputs = {
        "input_ids": torch.cat([batch.input_ids, torch.full((3, 4), MASK)], dim=1),
        "attention_mask": adapter._masks(batch, batch.of_rows(batch.row_positions())),
        "position_ids": batch.of_rows(batch.row_positions()) + adapter.plan.first_position,
    }
    with torch.no_grad():
        content = model.base_model(**inputs)[0].flatten(0, 1)[rows]
        stock = model.base_model(batch.input_ids, attention_mask=batch.attention_mask)[0]
    real = batch.attention_mask == 1
    torch.testing.assert_close(content[real], stock[real], atol=1e-4, rtol=1e-4)


def test_windows_of_local_layers_are_kept():
    model = build("modernbert", num_hidden_layers=1, layer_types=["sliding_attention"], local_attention=6)
    adapter, found = streams(model), []
    batch = in_order(1, 12)._replace(target_columns=torch.tensor([[11]]))
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    (gradient,) = torch.autograd.grad(predict(adapter, batch).square().sum(), found[0])
    reached = (gradient.norm(dim=-1)[0, :12] > 0).tolist()
    assert reached == [8 <= column < 11 for column in range(12)]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deberta-v2", "only 'sdpa'"),
        ("mpnet", "only 'sdpa'"),
        ("roformer", "no position_ids"),
        ("esm", "its forward fails with such a mask"),
    ],
)
def test_architectures_that_cannot_are_refused_by_name(model_type, message):
    model = build(model_type, attn_implementation=None)
    with pytest.raises(InputError, match=f"{type(model).__name__}.*{message}.*xlnet"):
        streams(model)


def test_a_model_that_ignores_positions_masks_or_the_mask_token_is_refused():
    with pytest.raises(InputError, match="mask_token"):
        PositionTwoStreams(build("bert"), mask_token_id=None)
    with pytest.raises(InputError, match="'eager'"):
        PositionTwoStreams(build("bert", attn_implementation="eager"), mask_token_id=MASK)
    for ignored, value, problem in (
        ("position_ids", None, "order of its input"),
        ("attention_mask", None, "hidden from it"),
    ):
        model = build("bert")
        stock = model.bert.forward

        def forward(*args, stock=stock, ignored=ignored, value=value, **kwargs):
            return stock(*args, **{**kwargs, ignored: value})

        model.bert.forward = forward
        with pytest.raises(InputError, match=problem):
            streams(model)
        assert not model.training
