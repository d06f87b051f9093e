"""The model: attention by content and distance, recurrence over segments, padding, gradients."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.layers_transformer_xl import distance_table
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
)

VARIANTS = {
    "paper": {},
    "pre_layer_norm": {"pre_layer_norm": True},
    "own_biases": {"untie_r": True, "head_dim": 5},
    "clamped": {"clamp_len": 3},
    "adaptive": {"cutoffs": [10, 25], "div_val": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def ids(*shape, seed=1, vocab=60):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def read_stream(model, tokens, widths, *, mem_len=None):
    """The states of a text read segment by segment, and the memory after it."""
    mems, lengths = model.empty_mems(len(tokens), mem_len=mem_len)
    parts = []
    for segment in tokens.split(widths, dim=1):
        outputs = model(segment, mems=mems, mem_lengths=lengths)
        mems, lengths = outputs.mems, outputs.mem_lengths
        parts.append(outputs.last_hidden_state)
    return torch.cat(parts, dim=1), mems, lengths


def literal_states(model, tokens, *, window=None):
    """The model's equations, pair by pair of positions, without memory."""
    config, length = model.config, tokens.shape[1]
    heads, width = config.num_attention_heads, config.hidden_size
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    hidden = model.embeddings(tokens) * width**0.5
    for index, layer in enumerate(model.layers):
        u, v = (bias[index if config.untie_r else 0] for bias in (model.content_bias, model.position_bias))
        attention, source = layer.attention, layer.attention_norm(hidden) if config.pre_layer_norm else hidden
        query, key, value = (
            getattr(attention, f"{kind}_proj")(source).unflatten(-1, (heads, config.head_dim)) for kind in "qkv"
        )
        read = torch.zeros_like(query)
        for i in range(length):
            seen = range(max(0, i - window + 1) if window else 0, i + 1)
            scores = []
            for j in seen:
                distance = min(i - j, config.clamp_len) if config.clamp_len > 0 else i - j
                angles = distance * frequencies
                r = attention.r_proj(torch.cat([angles.sin(), angles.cos()])).unflatten(-1, (heads, config.head_dim))
                scores.append(((query[:, i] + u) * key[:, j]).sum(-1) + ((query[:, i] + v) * r).sum(-1))
            weights = (torch.stack(scores, dim=-1) / config.head_dim**0.5).softmax(-1)
            read[:, i] = torch.einsum("bhj,bjhd->bhd", weights, value[:, list(seen)])
        attended = attention.o_proj(read.flatten(2))
        if config.pre_layer_norm:
            hidden = hidden + attended
            hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        else:
            hidden = layer.attention_norm(hidden + attended)
            hidden = layer.feed_forward_norm(hidden + layer.feed_forward(hidden))
    return hidden


@variants
@torch.no_grad()
def test_the_states_are_those_of_the_equations(transformer_xl, options):
    model, tokens = transformer_xl(TransformerXLModel, **options), ids(2, 9)
    torch.testing.assert_close(model(tokens).last_hidden_state, literal_states(model, tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_position_sees_itself_and_mem_len_before_it_with_same_length(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel, same_length=True, mem_len=3), ids(2, 9)
    banded = literal_states(model, tokens, window=4)
    torch.testing.assert_close(model(tokens).last_hidden_state, banded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_few_queries_give_what_many_give(transformer_xl):
    # Below head_dim queries in the batch the position term is computed in another order.
    model, token = transformer_xl(TransformerXLModel), ids(1, 3)
    many = model(token.repeat(8, 1)).last_hidden_state
    torch.testing.assert_close(model(token).last_hidden_state, many[:1], atol=1e-5, rtol=1e-5)


@variants
@torch.no_grad()
def test_a_memory_of_all_history_is_one_pass(transformer_xl, options):
    model, tokens = transformer_xl(TransformerXLModel, num_hidden_layers=4, **options), ids(2, 12)
    whole = model(tokens).last_hidden_state
    for widths in ([6, 6], [1, 5, 2, 4]):
        states, _, lengths = read_stream(model, tokens, widths, mem_len=12)
        torch.testing.assert_close(states, whole, atol=1e-5, rtol=1e-5)
        assert lengths.tolist() == [12, 12]


@torch.no_grad()
def test_a_short_memory_is_one_pass_as_far_as_it_reaches(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel), ids(2, 12)
    whole = model(tokens).last_hidden_state
    states, _, lengths = read_stream(model, tokens, [4, 4, 4], mem_len=4)
    torch.testing.assert_close(states[:, :8], whole[:, :8], atol=1e-5, rtol=1e-5)
    assert (states[:, 8:] - whole[:, 8:]).abs().amax() > 1e-2
    assert lengths.tolist() == [4, 4]


@torch.no_grad()
def test_with_same_length_the_segments_do_not_matter(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel, same_length=True, mem_len=5), ids(2, 16)
    whole = model(tokens).last_hidden_state
    for width in (1, 2, 4, 8):
        torch.testing.assert_close(read_stream(model, tokens, width)[0], whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_unfilled_memory_is_not_there(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel), ids(2, 10)
    short, *_ = read_stream(model, tokens, [3, 3, 4], mem_len=6)
    long, *_ = read_stream(model, tokens, [3, 3, 4], mem_len=50)
    torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-5)
    mems, lengths = model.empty_mems(2)
    filled_by_chance = model(tokens, mems=mems + 1e3, mem_lengths=lengths).last_hidden_state
    torch.testing.assert_close(filled_by_chance, model(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert (model(tokens, mems=mems).last_hidden_state - filled_by_chance).abs().amax() > 1e-2  # zeros that are there


@torch.no_grad()
def test_each_example_has_its_own_history(transformer_xl):
    model, tokens, past = transformer_xl(TransformerXLModel), ids(2, 4), ids(2, 5, seed=2)
    mems, lengths = model.empty_mems(2)
    read = model(past, mems=mems, mem_lengths=lengths)
    both = model(tokens, mems=read.mems, mem_lengths=torch.tensor([5, 0])).last_hidden_state
    torch.testing.assert_close(
        both[0], model(torch.cat([past, tokens], 1)).last_hidden_state[0, 5:], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(both[1], model(tokens).last_hidden_state[1], atol=1e-5, rtol=0)


def test_the_future_has_no_gradient(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel), ids(1, 7)
    mems, lengths = model.empty_mems(1)
    past = model(ids(1, 4, seed=3), mems=mems, mem_lengths=lengths)
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    states = model(inputs_embeds=embeds, mems=past.mems, mem_lengths=past.mem_lengths).last_hidden_state
    for position in range(7):
        (gradient,) = torch.autograd.grad(states[0, position].square().sum(), embeds, retain_graph=True)
        reached = gradient[0].abs().amax(-1)
        assert (reached[: position + 1] > 0).all()
        assert (reached[position + 1 :] == 0).all()


def test_no_gradient_crosses_the_border_of_segments(transformer_xl):
    model = transformer_xl(TransformerXLModel)
    first = model.get_input_embeddings()(ids(1, 4)).detach().requires_grad_()
    mems, lengths = model.empty_mems(1)
    before = model(inputs_embeds=first, mems=mems, mem_lengths=lengths)
    assert not before.mems.requires_grad
    # Even a memory that would have a gradient gets none.
    given = before.mems.clone().requires_grad_()
    second = model(ids(1, 4, seed=2), mems=given, mem_lengths=before.mem_lengths)
    parameters = [model.content_bias, first, given]
    gradients = torch.autograd.grad(second.last_hidden_state.square().sum(), parameters, allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None and gradients[2] is None and not second.mems.requires_grad


def test_an_empty_memory_is_none(transformer_xl):
    model, tokens = transformer_xl(), ids(2, 8)
    losses = model.token_losses(model.model(tokens).last_hidden_state, tokens)
    nll, mems, lengths = model.token_nll(tokens, tokens)
    torch.testing.assert_close(nll, losses)
    assert mems.shape == (3, 2, 6, 16) and lengths.tolist() == [6, 6]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, plain in zip(
        torch.autograd.grad(nll.sum(), parameters), torch.autograd.grad(losses.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_text_has_one_likelihood_however_it_is_cut(transformer_xl):
    model, text = transformer_xl(same_length=True, cutoffs=[20, 40], div_val=2), ids(2, 17)
    totals = []
    for width in (1, 3, 16):
        total, (mems, lengths) = 0, model.model.empty_mems(2)
        for segment, targets in zip(text[:, :-1].split(width, 1), text[:, 1:].split(width, 1), strict=True):
            nll, mems, lengths = model.token_nll(segment, targets, mems=mems, mem_lengths=lengths)
            assert (nll > 0).all()
            total = total + nll.sum(1)
        totals.append(total)
    torch.testing.assert_close(totals[0], totals[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(totals[0], totals[2], atol=1e-4, rtol=1e-5)
    log_probs = model(text).logits.log_softmax(-1)[:, :-1].gather(2, text[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(totals[0], -log_probs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("has_past", [False, True])
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(transformer_xl, side, has_past):
    model, tokens = transformer_xl(TransformerXLModel), ids(1, 5)
    mems, lengths = model.empty_mems(1)
    past = model(ids(1, 4, seed=2), mems=mems, mem_lengths=lengths)
    memory = {"mems": past.mems, "mem_lengths": past.mem_lengths} if has_past else {}
    alone = model(tokens, **memory)
    for padding in (ids(1, 3, seed=3), ids(1, 3, seed=4)):
        parts = [(padding, 0), (tokens, 1)] if side == "left" else [(tokens, 1), (padding, 0)]
        padded = torch.cat([part for part, _ in parts], dim=1)
        mask = torch.cat([torch.full_like(part, value) for part, value in parts], dim=1)
        outputs = model(padded, mask, **memory, output_hidden_states=True)
        torch.testing.assert_close(
            outputs.last_hidden_state[mask.bool()], alone.last_hidden_state[0], atol=1e-5, rtol=0
        )
        assert len(outputs.hidden_states) == 4
        torch.testing.assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
        if has_past:
            torch.testing.assert_close(outputs.mems, alone.mems, atol=1e-5, rtol=0)
            assert outputs.mem_lengths.tolist() == alone.mem_lengths.tolist() == [6]


def test_a_row_of_padding_is_finite(transformer_xl):
    model, tokens = transformer_xl(), ids(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    mems, lengths = model.model.empty_mems(2)
    for memory in ({}, {"mems": mems, "mem_lengths": lengths}):
        outputs = model(tokens, mask, **memory)
        outputs.logits.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert outputs.mem_lengths.tolist() == [5, 0]


def test_distances_from_clamp_len_on_are_one(transformer_xl):
    like = torch.zeros(1)
    free = distance_table(8, TransformerXLConfig(hidden_size=10), like)
    clamped = distance_table(8, TransformerXLConfig(hidden_size=10, clamp_len=5), like)
    assert torch.equal(clamped[3:], free[3:])
    assert torch.equal(clamped[:3], free[2].expand(3, -1))
    assert torch.equal(distance_table(8, TransformerXLConfig(hidden_size=10, clamp_len=7), like), free)
    tokens = ids(1, 8)
    states = [transformer_xl(TransformerXLModel, clamp_len=length)(tokens).last_hidden_state for length in (-1, 7, 5)]
    assert torch.equal(states[0], states[1])
    assert (states[0] - states[2])[:, -1].abs().amax() > 1e-3


@variants
def test_every_parameter_has_a_gradient(transformer_xl, options):
    model, tokens = transformer_xl(tie_word_embeddings=False, **options), ids(4, 30)
    nll, *_ = model.token_nll(tokens, tokens.roll(-1, 1))
    nll.sum().backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(transformer_xl, use_reentrant):
    model, tokens = transformer_xl(hidden_dropout_prob=0.0, untie_r=True).train(), ids(2, 8)
    _, mems, lengths = model.token_nll(ids(2, 4, seed=5), tokens[:, :4])
    found = []
    for is_on in (False, True):
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        nll, *_ = model.token_nll(tokens, tokens, mems=mems, mem_lengths=lengths)
        nll.sum().backward()
        found.append([nll.detach(), *(parameter.grad for parameter in model.parameters())])
    assert model.model.layers[0].gradient_checkpointing
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


def test_it_runs_in_bfloat16(transformer_xl):
    model, tokens = transformer_xl(cutoffs=[10, 25], div_val=2), ids(2, 8)
    exact, mems, _ = model.token_nll(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        nll, half_mems, lengths = model.token_nll(
            tokens, tokens, mems=torch.zeros_like(mems), mem_lengths=torch.zeros(2, dtype=torch.int64)
        )
        again, half_mems, _ = model.token_nll(tokens, tokens, mems=half_mems, mem_lengths=lengths)
    assert half_mems.dtype == mems.dtype == torch.float32
    torch.testing.assert_close(nll, exact, atol=0.3, rtol=0.1)
    (nll.sum() + again.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model = model.to(torch.bfloat16)
    nll, half_mems, lengths = model.token_nll(tokens, tokens)
    nll, half_mems, _ = model.token_nll(tokens, tokens, mems=half_mems, mem_lengths=lengths)
    assert nll.dtype == torch.float32 and half_mems.dtype == torch.bfloat16
    assert nll.isfinite().all()


def test_the_steps_of_a_stream_compile_to_one_graph(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel), ids(2, 12)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    mems, lengths = model.empty_mems(2)
    states = []
    for segment in tokens.split(4, dim=1):
        outputs = compiled(segment, mems=mems.clone(), mem_lengths=lengths.clone())
        mems, lengths = outputs.mems, outputs.mem_lengths
        states.append(outputs.last_hidden_state)
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(states, 1), read_stream(model, tokens, 4)[0])


def test_the_initial_weights(transformer_xl):
    options = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 3000, "initializer_range": 0.02}
    options |= {"cutoffs": [1000, 2000], "div_val": 2, "projection_initializer_range": 0.01, "untie_r": True}
    model = transformer_xl(**options)
    spreads = {"projections": 0.01, "bias": 0.0, "content_bias": 0.02, "position_bias": 0.02}
    for name, parameter in model.state_dict().items():
        last = name.rpartition(".")[2]
        spread = spreads["projections"] if "projections" in name else spreads.get(last, 0.02)
        center = 1.0 if name.endswith("norm.weight") else 0.0
        spread = 0.0 if last == "cluster_bias" else spread
        assert abs(parameter.mean() - center) < 0.01, name
        assert parameter.std().item() == pytest.approx(spread, rel=0.35, abs=1e-9), name


def test_the_biases_are_shared_or_each_layers_own(transformer_xl):
    assert transformer_xl(TransformerXLModel).content_bias.shape == (1, 2, 8)
    assert transformer_xl(TransformerXLModel, untie_r=True).position_bias.shape == (3, 2, 8)


def test_the_loss_is_the_next_tokens(transformer_xl):
    model, tokens = transformer_xl(), ids(3, 8)
    labels = tokens.masked_fill(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.4, -100)
    outputs = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(outputs.loss, expected / count)
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=count * 4).loss, expected / count / 4)
    assert model.train()(tokens, labels=labels).logits is None  # nobody asks for them
    assert model(tokens, labels=torch.full_like(tokens, -100)).loss == 0


@torch.no_grad()
def test_embeddings_can_be_given_instead_of_tokens(transformer_xl):
    for options in VARIANTS.values():
        model, tokens = transformer_xl(**options), ids(2, 5)
        embeds = model.get_input_embeddings()(tokens)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(tokens).logits)


def test_a_sequence_is_classified_by_its_last_token(transformer_xl):
    model = transformer_xl(TransformerXLForSequenceClassification, num_labels=3, pad_token_id=0)
    tokens = ids(1, 4, vocab=59) + 1
    alone = model(tokens, labels=torch.tensor([2]))
    assert alone.logits.shape == (1, 3)
    torch.testing.assert_close(alone.loss, -alone.logits.log_softmax(-1)[0, 2])
    padding = torch.zeros(1, 2, dtype=torch.int64)
    for padded in (torch.cat([padding, tokens], 1), torch.cat([tokens, padding], 1)):
        torch.testing.assert_close(model(padded).logits, alone.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(padded, (padded > 0).long()).logits, alone.logits, atol=1e-5, rtol=0)
    assert (model(tokens.flip(1)).logits - alone.logits).abs().amax() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size=15 is odd"),
        ({"cutoffs": [20, 10]}, "cutoffs=.20, 10. do not divide the 32000 tokens"),
        ({"cutoffs": [40000]}, "do not divide"),
        ({"cutoffs": [10, 20, 30], "div_val": 8, "embedding_size": 64}, "div_val=8 leaves no width"),
        ({"div_val": 0}, "div_val=0"),
        ({"mem_len": -1}, "mem_len=-1"),
        ({"mem_len": 0, "same_length": True}, "mem_len=0.*at least 1 with same_length"),
        ({"clamp_len": 0}, "clamp_len=0"),
        ({"mem_len": "many"}, "mem_len"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(Exception, match=message):
        TransformerXLConfig(**options)


def test_inputs_that_contradict_each_other_are_refused(transformer_xl):
    model, tokens = transformer_xl(TransformerXLModel), ids(1, 4)
    mems, lengths = model.empty_mems(1)
    for options, message in (
        ({}, "give one of the two"),
        ({"input_ids": tokens, "inputs_embeds": torch.zeros(1, 4, 16)}, "give one of the two"),
        ({"input_ids": tokens, "mems": mems, "use_cache": True}, "^cache, mems"),
        ({"input_ids": tokens, "mems": mems[:2]}, r"give \[3, batch, length, hidden\]"),
        ({"input_ids": tokens, "cache": StaticCache(model.config, 9)}, "static cache"),
        ({"input_ids": tokens, "attention_mask": tokens[:, :3]}, r"attention_mask has shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**options)
    cache = model(tokens, cache=DynamicCache(config=model.config)).cache
    with pytest.raises(ValueError, match=r"give \(1, 8\)"):
        model(tokens, torch.ones(1, 4), cache=cache)


def test_no_memory_at_all(transformer_xl):
    model, tokens = transformer_xl(mem_len=0), ids(2, 6)
    nll, mems, lengths = model.token_nll(tokens, tokens)
    assert mems.shape == (3, 2, 0, 16) and lengths.tolist() == [0, 0]
    torch.testing.assert_close(nll, transformer_xl().token_nll(tokens, tokens)[0])


def test_positions_are_relative(transformer_xl):
    # Tokens that repeat the same window are seen alike, wherever they are in the text.
    model = transformer_xl(TransformerXLModel, same_length=True, mem_len=2, num_hidden_layers=2)
    pattern = ids(1, 3)
    states = model(pattern.repeat(1, 6)).last_hidden_state[0].unflatten(0, (6, 3))
    for earlier, later in itertools.pairwise(states[2:]):
        torch.testing.assert_close(earlier, later, atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training(transformer_xl):
    model, tokens = transformer_xl(TransformerXLForCausalLM, attention_probs_dropout_prob=0.5), ids(2, 6)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(model(tokens).logits, model(tokens).logits)  # that of the attention is left
