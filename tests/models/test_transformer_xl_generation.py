"""Generation: with a cache as without, whatever the length, the batch and the search."""

import pytest
import torch
from transformers import DynamicCache, set_seed

VARIANTS = {
    "paper": {},
    "same_length": {"same_length": True, "mem_len": 5},
    "pre_layer_norm": {"pre_layer_norm": True, "untie_r": True, "same_length": True, "mem_len": 5},
    "clamped_adaptive": {"clamp_len": 4, "cutoffs": [10, 25], "div_val": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
GENERATE = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": 59}


def prompts(*shape, seed=1):
    """Tokens that are neither padding nor the end."""
    return torch.randint(1, 59, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(*rows):
    length = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def both_ways(model, inputs, **options):
    outputs = []
    for use_cache in (True, False):
        set_seed(0)
        settings = GENERATE | options | {"use_cache": use_cache}
        outputs.append(model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True))
    return outputs


@variants
@pytest.mark.parametrize("length", [3, 20], ids=["short", "longer_than_mem_len"])
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_greedy_search_with_a_cache_is_that_without(transformer_xl, options, length, is_padded):
    model = transformer_xl(**options)
    row = prompts(length)
    inputs = (
        left_padded(row, prompts(2, seed=2), prompts(length + 4, seed=3)) if is_padded else {"input_ids": row[None]}
    )
    cached, recomputed = both_ways(model, inputs)
    assert torch.equal(cached.sequences, recomputed.sequences)
    assert cached.cache is not None and recomputed.cache is None
    for step, expected in zip(cached.logits, recomputed.logits, strict=True):
        torch.testing.assert_close(step, expected, atol=1e-5, rtol=0)
    assert len({tuple(row) for row in cached.sequences[:, -9:].tolist()}) == len(cached.sequences)


@variants
@torch.no_grad()
def test_other_searches_with_a_cache_are_those_without(transformer_xl, options):
    model, inputs = transformer_xl(**options), left_padded(prompts(12), prompts(7, seed=2))
    for search in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}):
        cached, recomputed = both_ways(model, inputs, **search)
        assert torch.equal(cached.sequences, recomputed.sequences)
    assert cached.sequences[:, -9:].unique().numel() > 3


@variants
@torch.no_grad()
def test_a_row_is_continued_as_if_it_were_alone(transformer_xl, options):
    model, rows = transformer_xl(**options), [prompts(12), prompts(5, seed=2)]
    together = model.generate(**left_padded(*rows), **GENERATE)
    for row, continued in zip(rows, together, strict=True):
        alone = model.generate(row[None], **GENERATE)
        assert torch.equal(alone[0, -9:], continued[-9:])


@variants
@torch.no_grad()
def test_reading_piece_by_piece_is_reading_at_once(transformer_xl, options):
    model, tokens = transformer_xl(**options), prompts(2, 16)
    whole, cache, parts = model(tokens).logits, DynamicCache(config=model.config), []
    for piece in tokens.split([7, 1, 1, 7], dim=1):
        outputs = model(piece, cache=cache)
        assert outputs.cache is cache
        parts.append(outputs.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    last = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_cache_is_bounded_with_same_length(transformer_xl):
    for same_length, kept in ((True, 5), (False, 28)):
        model = transformer_xl(same_length=same_length, mem_len=5)
        outputs = model.generate(prompts(1, 20), **GENERATE, return_dict_in_generate=True)
        assert {layer.keys.shape[-2] for layer in outputs.cache.layers} == {kept}


@torch.no_grad()
def test_generation_goes_on_from_a_cache(transformer_xl):
    model, text = transformer_xl(same_length=True), prompts(1, 9)
    cache = DynamicCache(config=model.config)
    first = model.generate(text, **GENERATE, cache=cache)
    question = torch.cat([first, prompts(1, 4, seed=2)], dim=1)
    assert torch.equal(model.generate(question, **GENERATE, cache=cache), model.generate(question, **GENERATE))


@torch.no_grad()
def test_the_cache_goes_by_its_older_name_too_with_a_warning(transformer_xl):
    model, text = transformer_xl(), prompts(1, 9)
    expected = model(text, use_cache=True)
    for part in (model, model.model):
        cache = DynamicCache(config=model.config)
        with pytest.warns(FutureWarning, match="Use `cache` instead"):
            outputs = part(text, past_key_values=cache)
        assert outputs.cache is cache and outputs.past_key_values is cache
        assert cache.get_seq_length() == expected.cache.get_seq_length() == 9


def test_mems_are_not_mistaken_for_a_cache(transformer_xl):
    model = transformer_xl()
    mems, lengths = model.model.empty_mems(1)
    with pytest.raises(ValueError, match="^cache, mems"):
        model.generate(prompts(1, 4), mems=mems, mem_lengths=lengths, **GENERATE)
