"""Two-stream attention against the stock XLNet and against what its mathematics says."""

import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from helpers.permuted_batches import PAD_RANK, VOCAB, in_order, labelled, permuted, slots_of
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import RecurrentMemory
from hf_pretrain.objectives.permutation_lm.two_stream import PermutedBatch, XLNetTwoStreams


def xlnet(layers=3, seed=0, scale=8.0, **options):
    """A small XLNet whose weights are large enough for every term of the attention to matter."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layer": layers, "n_head": 4, "d_inner": 48}
    model = XLNetLMHeadModel(XLNetConfig(**{**sizes, "dropout": 0.0, "layer_norm_eps": 1e-6, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.mul_(scale)
    return model


def stock_masks(batch):
    """perm_mask and target_mapping of the stock model, entry by entry."""
    rows, size = batch.input_ids.shape
    perm_mask = torch.zeros(rows, size, size)
    mapping = torch.zeros(rows, batch.target_columns.shape[1], size)
    for b in range(rows):
        for i in range(size):
            for j in range(size):
                sees = batch.key_ranks[b, j] < batch.thresholds[b, i] and batch.attention_mask[b, j] == 1
                perm_mask[b, i, j] = 0.0 if sees else 1.0
        for p, column in enumerate(batch.target_columns[b].tolist()):
            # A filler maps to no column: two queries of one column would add up.
            mapping[b, p, column] = float(p == 0 or column > 0)
    return {"perm_mask": perm_mask, "target_mapping": mapping}


def predict(model, batch, slots=None, **options):
    return XLNetTwoStreams(model)(batch, slots_of(batch) if slots is None else slots, **options)[0]


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("clamp_len", [-1, 4])
def test_logits_and_all_gradients_are_those_of_the_stock_model(segments, clamp_len):
    model, batch = xlnet(clamp_len=clamp_len), permuted(segments=segments)
    slots = labelled(batch)
    assert len(slots) > 8
    types = torch.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
    stock = model(batch.input_ids, token_type_ids=types, **stock_masks(batch)).logits.flatten(0, 1)[slots]
    weights = torch.randn(stock.shape, generator=torch.Generator().manual_seed(1))
    (stock * weights).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ours = predict(model, batch, slots)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - expected[name]).abs().max()) < 1e-5 * scale, name


def gradients_of_content(model, batch, slot):
    """Norm of the gradient of a slot's logits by each token's embedding, ``[B, S]``."""
    found = []
    handle = model.transformer.word_embedding.register_forward_hook(lambda m, a, out: found.append(out))
    logits = predict(model, batch, torch.tensor([slot]))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), found[0])
    return gradient.norm(dim=-1)


def test_left_to_right_order_is_a_causal_language_model():
    model, batch = xlnet(), in_order()
    whole = predict(model, batch).view(2, 9, -1)
    for length in range(1, 10):
        short = PermutedBatch(*(value[:, :length] for value in batch[:4]), torch.full((2, 1), length - 1))
        torch.testing.assert_close(predict(model, short), whole[:, length - 1], atol=1e-5, rtol=0)


def test_a_target_depends_on_what_it_sees_and_on_nothing_else():
    """Through three layers, with functional tokens and padding: exact zeros where nothing may come through."""
    model, batch = xlnet(layers=3), permuted()
    num_targets = batch.target_columns.shape[1]
    for slot in labelled(batch).tolist():
        row, column = slot // num_targets, batch.target_columns.flatten()[slot]
        gradient = gradients_of_content(model, batch, slot)
        sees = (batch.key_ranks[row] < batch.thresholds[row, column]) & (batch.attention_mask[row] == 1)
        assert not sees[column]
        assert (gradient[row][sees] > 0).all()
        assert (gradient[row][~sees] == 0).all()
        assert (gradient[[other for other in range(3) if other != row]] == 0).all()


def test_first_half_depends_on_nothing_in_the_second():
    model, batch = xlnet(), permuted(lengths=(12,), targets=6)
    for slot, column in enumerate(batch.target_columns[0].tolist()):
        gradient = gradients_of_content(model, batch, slot)[0]
        if column < 6:
            assert (gradient[6:] == 0).all()
        else:
            assert (gradient[:6] > 0).all()


def test_queries_at_some_tokens_equal_queries_at_all():
    model, batch = xlnet(), permuted()
    everywhere = batch._replace(target_columns=torch.arange(12).expand(3, -1))
    dense = predict(model, everywhere).view(3, 12, -1)
    chosen = dense.gather(1, batch.target_columns[..., None].expand(-1, -1, VOCAB))
    torch.testing.assert_close(predict(model, batch), chosen.flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [0, 3])
def test_who_sees_nothing_depends_on_nothing(padding):
    model, batch = xlnet(), in_order(1)
    mask = batch.attention_mask.clone()
    mask[:, 9 - padding :] = 0
    batch = batch._replace(attention_mask=mask)
    gradient = gradients_of_content(model, batch, 0)
    assert (gradient == 0).all()
    logits = predict(model, batch, torch.tensor([0]))
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    other = batch._replace(input_ids=batch.input_ids.flip(1))
    assert torch.equal(predict(model, other, torch.tensor([0])), logits)


def test_storage_order_does_not_matter():
    model, batch = xlnet(), permuted()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    places = batch.row_positions()
    stored = batch._replace(
        **{
            name: getattr(batch, name)[:, order]
            for name in ("input_ids", "attention_mask", "key_ranks", "thresholds", "token_type_ids")
        },
        positions=places[:, order],
        target_columns=order.argsort()[batch.target_columns],
    )
    torch.testing.assert_close(predict(model, stored), predict(model, batch), atol=2e-5, rtol=0)


def test_only_equality_of_segments_counts():
    model, batch = xlnet(), permuted()
    with torch.no_grad():
        logits = predict(model, batch)
        for types in (1 - batch.token_type_ids, batch.token_type_ids + 5):
            torch.testing.assert_close(predict(model, batch._replace(token_type_ids=types)), logits, atol=1e-5, rtol=0)
        one_segment = predict(model, batch._replace(token_type_ids=torch.zeros_like(batch.input_ids)))
        assert (one_segment - logits).abs().max() > 1e-2
        torch.testing.assert_close(predict(model, batch._replace(token_type_ids=None)), one_segment, atol=1e-5, rtol=0)


def test_a_backward_row_is_the_forward_row_reversed():
    model, batch = xlnet(), permuted(lengths=(12, 12))
    forward = predict(model, batch).view(2, 4, -1)
    reversed_row = {
        name: torch.cat([value[:1], value[1:].flip(1)])
        for name, value in batch._asdict().items()
        if name not in ("target_columns", "backward", "positions")
    }
    columns = torch.cat([batch.target_columns[:1], 11 - batch.target_columns[1:]])
    turned = PermutedBatch(**reversed_row, target_columns=columns, backward=torch.tensor([False, True]))
    torch.testing.assert_close(predict(model, turned).view(2, 4, -1), forward, atol=1e-5, rtol=0)
    not_told = turned._replace(backward=torch.tensor([False, False]))
    assert (predict(model, not_told).view(2, 4, -1) - forward)[1].abs().max() > 1e-2


def test_backward_rows_are_those_of_the_stock_model():
    """The stock model takes the second half of a batch for backward."""
    model, batch = xlnet(bi_data=True), permuted(lengths=(12, 12, 12, 12))
    stock = model(batch.input_ids, token_type_ids=batch.token_type_ids, **stock_masks(batch)).logits.flatten(0, 1)
    ours = predict(model, batch._replace(backward=torch.tensor([False, False, True, True])))
    slots = labelled(batch)
    torch.testing.assert_close(ours[slots], stock[slots], atol=1e-5, rtol=0)


def test_hidden_tokens_in_front_change_nothing():
    model, batch = xlnet(), permuted()
    for added in (1, 5):
        shifted = {
            name: torch.nn.functional.pad(getattr(batch, name), (added, 0), value=fill)
            for name, fill in (("input_ids", 7), ("attention_mask", 0), ("key_ranks", PAD_RANK), ("thresholds", 0))
        }
        types = torch.nn.functional.pad(batch.token_type_ids, (added, 0))
        moved = PermutedBatch(**shifted, target_columns=batch.target_columns + added, token_type_ids=types)
        slots = labelled(batch)
        torch.testing.assert_close(predict(model, moved, slots), predict(model, batch, slots), atol=1e-5, rtol=0)


# Memory


def empty_memory(model, num_rows, size):
    return RecurrentMemory.empty(model.config.n_layer, num_rows, size, model.config.d_model)


def segments_of(batch, lengths):
    """Cut a left-to-right batch into segments."""
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        ranks = torch.arange(length).expand(len(batch.input_ids), -1)
        yield PermutedBatch(batch.input_ids[:, part], batch.attention_mask[:, part], ranks, ranks, ranks)
        start += length


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("size", [9, 20])
def test_segments_with_memory_equal_one_pass(layers, size):
    """Memory that holds all of the text before, with room to spare or not, at any depth."""
    model, batch = xlnet(layers=layers), in_order(2, 12)
    whole = predict(model, batch).view(2, 12, -1)
    memory, found = empty_memory(model, 2, size), []
    for segment in segments_of(batch, (5, 4, 3)):
        logits, kept = XLNetTwoStreams(model)(
            segment, slots_of(segment), memory=memory, num_kept=segment.input_ids.shape[1]
        )
        memory = memory.append(kept)
        found.append(logits.view(2, -1, VOCAB))
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=0)


def test_memory_is_that_of_the_stock_model_once_it_is_full():
    model, batch = xlnet(), permuted()
    states = torch.randn(3, 3, 6, 32, generator=torch.Generator().manual_seed(5))
    memory = RecurrentMemory(states, torch.full((3,), 6))
    slots = labelled(batch)
    ours, kept = XLNetTwoStreams(model)(batch, slots, memory=memory, num_kept=5)
    stock = model(
        batch.input_ids,
        token_type_ids=batch.token_type_ids,
        mems=[layer.transpose(0, 1) for layer in states],
        use_mems=True,
        **stock_masks(batch),
    )
    torch.testing.assert_close(ours, stock.logits.flatten(0, 1)[slots], atol=1e-5, rtol=0)
    # The stock model keeps all it was given; the newest first positions of this segment are ours.
    stock_kept = torch.stack([layer[6:11].transpose(0, 1) for layer in stock.mems])
    torch.testing.assert_close(kept, stock_kept, atol=1e-5, rtol=0)


def test_memory_carries_no_gradient_and_is_empty_at_first():
    model, batch = xlnet(), permuted()
    plain = predict(model, batch)
    logits, kept = XLNetTwoStreams(model)(batch, slots_of(batch), memory=empty_memory(model, 3, 7), num_kept=6)
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)
    assert kept.shape == (3, 3, 6, 32) and not kept.requires_grad
    far = RecurrentMemory(torch.full((3, 3, 7, 32), 1e4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(predict(model, batch, memory=far), plain, atol=1e-5, rtol=0)


def test_unfilled_memory_is_not_attended_lane_by_lane():
    model, batch = xlnet(), permuted(lengths=(12, 12))
    states = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(6))
    lengths = torch.tensor([4, 2])
    results = []
    for size in (4, 11):
        room = torch.nn.functional.pad(states, (0, 0, size - 4, 0), value=3.0)
        results.append(predict(model, batch, memory=RecurrentMemory(room, lengths)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    short = RecurrentMemory(states[:, 1:, 2:], torch.tensor([2]))
    alone = PermutedBatch(*(None if value is None else value[1:] for value in batch))
    torch.testing.assert_close(results[0][4:], predict(model, alone, memory=short), atol=1e-5, rtol=0)


# Precision, checkpointing, dropout, backends


def test_bf16_weights_and_autocast_run_in_both_streams():
    batch = permuted()
    exact = predict(xlnet(scale=1.0), batch)
    half = xlnet(scale=1.0).to(torch.bfloat16)
    memory = empty_memory(half, 3, 5)
    found = predict(half, batch, memory=memory)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0)
    found.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())
    mixed = xlnet(scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(mixed, batch, memory=memory)
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in mixed.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant):
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    gradients = []
    for function in (None, partial(checkpoint, use_reentrant=use_reentrant)):
        model, batch = xlnet(dropout=0.2).train(), permuted()
        torch.manual_seed(0)
        predict(model, batch, checkpoint=function, memory=empty_memory(model, 3, 4)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_acts_on_probabilities_and_between_layers():
    """With values that are all the same, only dropped probabilities can make a difference."""
    model, batch = xlnet(layers=1, dropout=0.5), permuted()
    streams = XLNetTwoStreams(model)
    layer = model.transformer.layer[0].rel_attn
    terms = streams._terms(batch, None, torch.zeros(3, 12, 32))
    ones = torch.ones(3, 12, 32)
    with torch.no_grad():
        still = streams._attend(layer.eval(), torch.zeros(3, 16, 32), ones, terms)
        dropped = streams._attend(layer.train(), torch.zeros(3, 16, 32), ones, terms)
    sees = ~terms.empty
    ratio = (dropped / still)[sees]
    assert ratio.std() > 0.05
    assert ratio.mean() == pytest.approx(1.0, abs=0.1)
    calls = [predict(model.train(), batch) for _ in range(2)]
    assert not torch.equal(*calls)


def test_dropout_is_where_the_stock_model_has_it():
    """The modules' own; those of probabilities and distances are calls of functions in both."""
    model, batch = xlnet(dropout=0.5).train(), permuted()
    calls = {name: [] for name, module in model.named_modules() if name.endswith("dropout")}
    for name, module in model.named_modules():
        if name in calls:
            module.register_forward_hook(lambda m, args, out, name=name: calls[name].append(out.shape[-1]))
    predict(model, batch)
    assert calls.pop("transformer.dropout") == [32, 32]
    for name, widths in calls.items():
        expected = {"rel_attn.dropout": [32], "ff.dropout": [48, 32], "dropout": []}
        assert widths == expected[name.split(".", 3)[-1]], name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_sdpa_and_is_refused_for_training_on_a_cpu():
    model, batch = xlnet(), permuted()
    memory = RecurrentMemory(torch.randn(3, 3, 4, 32), torch.tensor([4, 0, 2]))
    backward = batch._replace(backward=torch.tensor([True, False, True]))
    flex = XLNetTwoStreams(model, backend="flex_attention")
    with torch.no_grad():
        for case in (batch, in_order(), backward):
            found, _ = flex(case, slots_of(case), memory=memory if len(case.input_ids) == 3 else None, num_kept=1)
            expected = predict(model, case, memory=memory if len(case.input_ids) == 3 else None)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="no backward pass on CPUs"):
        flex(batch, slots_of(batch))


def test_what_cannot_be_right_is_refused():
    with pytest.raises(InputError, match="attn_type"):
        XLNetTwoStreams(xlnet(attn_type="uni"))
    with pytest.raises(InputError, match="sdpa, flex_attention"):
        XLNetTwoStreams(xlnet(), backend="eager")
