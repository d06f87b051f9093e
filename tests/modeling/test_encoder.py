"""An encoder with several heads against stock classes, and against the same heads on all positions."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForPreTraining

from helpers.encoder_heads import (
    ALL,
    BACKBONES,
    batch_of,
    encoder_of,
    gradients_of,
    stirred,
    stock_model,
    summed,
    takes_types,
)
from helpers.method_matrix import relative_difference
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining

WITH_PAIR_HEAD = ("albert", "bert", "ernie", "megatron-bert")


def naive_losses(model, batch):
    """Each head on all positions or in a loop, example by example, padded on the right."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    output = model.model(**inputs, output_hidden_states=True)
    logits = (output.prediction_logits if "prediction_logits" in output else output.logits).flatten(0, 1)
    states = model.model.base_model(**inputs)[0]
    table, width = model.get_input_embeddings().weight, states.shape[1]
    losses = {"mlm": F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")}
    at_order = logits[batch["order_positions"]]
    losses["word_order"] = F.cross_entropy(at_order, batch["order_labels"], reduction="sum")
    spans = []
    for left, right, offset, label in zip(
        *(batch[f"span_{name}"] for name in ("left", "right", "offsets", "labels")), strict=True
    ):
        row = int(left) // width
        around = [states[row, int(flat) % width][None] for flat in (left, right)]
        scores = model.span_boundary_head(*around, offset[None], table)
        spans.append(F.cross_entropy(scores, label[None]))
    losses["span_boundary"] = torch.stack(spans).sum()
    if model.pair_head is None:
        pair = output.sop_logits if "sop_logits" in output else output.seq_relationship_logits
    else:
        pair = torch.cat([model.pair_head(states[row, 0][None]) for row in range(len(states))])
    losses["pair"] = F.cross_entropy(pair, batch["pair_labels"], reduction="sum")
    return losses


@pytest.mark.parametrize("pair_classes", [2, 3])
@pytest.mark.parametrize("model_type", sorted(BACKBONES))
def test_losses_and_every_gradient_are_those_of_the_dense_heads(model_type, pair_classes):
    model = encoder_of(model_type, pair_classes=pair_classes)
    assert (model.pair_head is None) == (pair_classes == 2 and model_type in ("albert", "bert"))
    batch = batch_of(with_types=takes_types(model_type))
    naive, output = naive_losses(model, batch), model(**batch)
    assert set(output.losses) == set(naive)
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss.sum.sum(), naive[name], rtol=1e-5, atol=1e-5)
        assert int(loss.count.sum()) == int(model.count_targets(batch)[name]) > 0
    expected = gradients_of(model, sum((2 + i) * naive[name] for i, name in enumerate(sorted(naive))))
    found = gradients_of(model, summed(output))
    assert set(found) >= {name for name, _ in model.named_parameters() if "head" in name}
    assert relative_difference(expected, found) <= 1e-5


@pytest.mark.parametrize("model_type", WITH_PAIR_HEAD)
def test_losses_are_those_of_the_stock_class(model_type):
    """Which returns the sum of two means."""
    stock = stirred(stock_model(model_type, AutoModelForPreTraining))
    model, batch = EncoderForPreTraining.from_model(stock, heads=["mlm", "pair"]), batch_of()
    name = "sentence_order_label" if model_type == "albert" else "next_sentence_label"
    entries = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    expected = stock(**entries, **{name: batch["pair_labels"]}).loss
    output = model.eval()(**batch)
    means = {key: loss.sum.sum() / loss.count.sum() for key, loss in output.losses.items()}
    assert set(means) == {"mlm", "pair"}
    torch.testing.assert_close(means["mlm"] + means["pair"], expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        alone = stock(**{key: value for key, value in entries.items() if key != "labels"})
    pair = alone.sop_logits if model_type == "albert" else alone.seq_relationship_logits
    right = (pair.argmax(-1) == batch["pair_labels"]).float()
    assert torch.equal(output.metrics["pair_accuracy"].sum, right)
    assert output.metrics["pair_accuracy"].count.tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("model_type", ["albert", "bert", "modernbert"])
def test_sums_of_an_example_do_not_depend_on_its_company(model_type):
    model = encoder_of(model_type)
    whole = model(**batch_of(with_types=takes_types(model_type))).losses
    gradients = gradients_of(model, sum(loss.sum.sum() for loss in whole.values()))
    model.zero_grad(set_to_none=True)
    parts = []
    batch = batch_of(with_types=takes_types(model_type))
    for rows in ([0], [1, 2], [3, 4, 5]):
        part = cut(batch, rows)
        losses = model(**part).losses
        sum(loss.sum.sum() for loss in losses.values()).backward()
        parts.append(losses)
    for name, loss in whole.items():
        torch.testing.assert_close(torch.cat([part[name].sum for part in parts]), loss.sum, rtol=1e-5, atol=1e-5)
        assert torch.cat([part[name].count for part in parts]).tolist() == loss.count.tolist()
    summed_up = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(gradients, summed_up) < 1e-5


def cut(batch, rows):
    """The batch of some of the rows."""
    width, part = batch["input_ids"].shape[1], {}
    new_row = torch.full((len(batch["input_ids"]),), -1)
    new_row[rows] = torch.arange(len(rows))
    groups = {
        "target_positions": ["target_positions"],
        "order_positions": ["order_positions", "order_labels"],
        "span_left": ["span_left", "span_right", "span_offsets", "span_labels"],
    }
    for key, names in groups.items():
        kept = torch.isin(batch[key] // width, torch.tensor(rows))
        for name in names:
            values = batch[name][kept]
            is_place = name in ("target_positions", "order_positions", "span_left", "span_right")
            part[name] = new_row[values // width] * width + values % width if is_place else values
    return part | {name: value[rows] for name, value in batch.items() if name not in part}


@pytest.mark.parametrize("model_type", ["albert", "bert", "deberta-v2", "modernbert", "roberta"])
@pytest.mark.parametrize("pair_classes", [2, 3])
def test_padding_on_the_left_changes_nothing(model_type, pair_classes):
    model = encoder_of(model_type, pair_classes=pair_classes)
    right, left = (batch_of(side=side, with_types=takes_types(model_type)) for side in ("right", "left"))
    assert not torch.equal(right["input_ids"], left["input_ids"])
    with torch.no_grad():
        expected, found = model(**right), model(**left)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[name].sum, loss.sum, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.metrics[f"{name}_accuracy"].sum, expected.metrics[f"{name}_accuracy"].sum)


@pytest.mark.parametrize("model_type", ["albert", "bert", "electra", "modernbert"])
def test_nothing_to_predict_gives_zeros_that_reach_every_parameter(model_type):
    """Distributed training waits for every parameter's gradient."""
    model = encoder_of(model_type).train()
    batch = batch_of(with_types=takes_types(model_type))
    expected = gradients_of(model, summed(model(**batch))).keys()
    empty = {name: batch[name] for name in ("input_ids", "attention_mask")}
    empty |= {"labels": torch.full_like(batch["labels"], -100), "target_positions": batch["target_positions"][:0]}
    none = {"pair_labels": torch.full_like(batch["pair_labels"], -100)}
    none |= {name: batch[name][:0] for name in batch if name.startswith(("order", "span"))}
    for entries in (empty, empty | none):
        output = model(**entries)
        assert set(output.losses) == set(ALL) and not output.metrics
        assert all(loss.sum.tolist() == loss.count.tolist() == [0] * 6 for loss in output.losses.values())
        assert {name: int(count) for name, count in model.count_targets(entries).items()} == dict.fromkeys(ALL, 0)
        gradients = gradients_of(model, summed(output))
        assert gradients.keys() == expected and not any(gradient.any() for gradient in gradients.values())


def test_fillers_change_nothing():
    model = encoder_of("bert")
    plain, filled = model(**batch_of()), model(**batch_of(target_slots=64))
    for name, loss in plain.losses.items():
        assert torch.equal(filled.losses[name].count, loss.count)
        torch.testing.assert_close(filled.losses[name].sum, loss.sum, rtol=1e-6, atol=1e-6)
    before = gradients_of(model, summed(plain))
    assert relative_difference(before, gradients_of(model, summed(filled))) < 1e-6


def test_span_boundaries_train_the_tied_table():
    model = encoder_of("albert")
    gradients = gradients_of(model, model(**batch_of()).losses["span_boundary"].sum.sum())
    table = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    words = batch_of()["span_labels"].unique()
    assert gradients[table][words].abs().sum(dim=1).all()
    assert model.model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("pair_classes", [2, 3])
def test_every_batch_runs_one_graph(pair_classes):
    torch._dynamo.reset()
    model, counter = encoder_of("bert", pair_classes=pair_classes).train(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            compiled(**batch_of(seed=seed, target_slots=96, pad_to_multiple_of=32))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_no_gradient():
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model, batch, calls = encoder_of("bert", **dropouts).train(), batch_of(), []
    expected = gradients_of(model, summed(model(**batch)))
    model.activation_checkpointing_enable()
    model.model.base_model.encoder.layer[0].attention.register_forward_hook(lambda *args: calls.append(1))
    assert relative_difference(expected, gradients_of(model, summed(model(**batch)))) < 1e-6
    assert len(calls) == 2, "it was run again in the backward pass"
