"""Adaptive embeddings and adaptive softmax: one distribution, in the order of the tokens, tied where it should be."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from hf_pretrain.models.transformer_xl.modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
)

LAYOUTS = {
    "plain": {},
    "factorized": {"embedding_size": 6},
    "blocks": {"cutoffs": [10, 25]},
    "factorized_blocks": {"cutoffs": [10, 25], "embedding_size": 6},
    "narrowing": {"cutoffs": [10, 25], "div_val": 2},
    "narrowing_from_wider": {"cutoffs": [10, 25], "div_val": 4, "embedding_size": 32},
    "narrowing_alone": {"div_val": 2},
}
layouts = pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)


def states(*shape, seed=1):
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def literal_log_prob(model, hidden, token):
    """log p(token | hidden), a `[D]` vector, from the definition: p(cluster) p(token | cluster)."""
    config, head = model.config, model.lm_head
    bounds = [0, *config.cutoffs, config.vocab_size]
    cluster = max(index for index, first in enumerate(bounds[:-1]) if token >= first)

    def softmax_of(index):
        if config.div_val == 1:
            rows = slice(bounds[index], bounds[index + 1])
            weight, bias = head.tables[0].weight[rows], head.tables[0].bias[rows]
        else:
            weight, bias = head.tables[index].weight, head.tables[index].bias
        if index == 0 and config.cutoffs:
            weight, bias = torch.cat([weight, head.cluster_weight]), torch.cat([bias, head.cluster_bias])
        narrow = head.projections[index].T @ hidden if len(head.projections) else hidden
        return (weight @ narrow + bias).softmax(0)

    if cluster == 0:
        return softmax_of(0)[token].log()
    return softmax_of(0)[bounds[1] + cluster - 1].log() + softmax_of(cluster)[token - bounds[cluster]].log()


@layouts
@torch.no_grad()
def test_the_probabilities_are_those_of_the_definition(transformer_xl, options):
    model, hidden = transformer_xl(**options), states(3)
    log_prob = model.lm_head.log_prob(hidden)
    assert log_prob.shape == (3, 60)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(3), atol=1e-5, rtol=0)
    for token in (0, 9, 10, 24, 25, 59):
        for row in range(3):
            torch.testing.assert_close(
                log_prob[row, token], literal_log_prob(model, hidden[row], token), atol=1e-5, rtol=1e-5
            )
    torch.testing.assert_close(model.lm_head(hidden).log_softmax(-1), log_prob, atol=1e-5, rtol=1e-5)


@layouts
@torch.no_grad()
def test_losses_come_in_the_order_of_the_tokens(transformer_xl, options):
    model, hidden = transformer_xl(**options), states(2, 40)
    targets = torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = -model.lm_head.log_prob(hidden).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(model.token_losses(hidden, targets), expected, atol=1e-5, rtol=1e-5)
    some = targets.masked_fill(targets % 3 == 0, -100)
    losses = model.token_losses(hidden, some)
    torch.testing.assert_close(losses, expected * (some != -100), atol=1e-5, rtol=1e-5)
    assert (losses[some == -100] == 0).all()
    assert (model.token_losses(hidden, torch.full_like(targets, -100)) == 0).all()


@torch.no_grad()
def test_without_cutoffs_it_is_a_plain_softmax(transformer_xl):
    model, tokens = transformer_xl(), torch.arange(8)[None]
    logits = model(tokens).logits
    hidden = model.model(tokens).last_hidden_state
    torch.testing.assert_close(
        logits, hidden @ model.model.embeddings.tables[0].weight.T + model.lm_head.tables[0].bias
    )
    nll, *_ = model.token_nll(tokens, tokens)
    torch.testing.assert_close(nll[0], F.cross_entropy(logits[0], tokens[0], reduction="none"))


@torch.no_grad()
def test_without_narrowing_the_embeddings_are_one_table(transformer_xl):
    plain, blocks = transformer_xl(TransformerXLModel), transformer_xl(TransformerXLModel, cutoffs=[10, 25])
    tokens = torch.arange(60)[None]
    assert torch.equal(plain.embeddings(tokens), blocks.embeddings(tokens))
    assert torch.equal(plain.embeddings(tokens)[0], plain.embeddings.tables[0].weight)


@torch.no_grad()
def test_each_token_is_embedded_by_its_cluster(transformer_xl):
    embeddings = transformer_xl(TransformerXLModel, cutoffs=[10, 25], div_val=2).embeddings
    assert [tuple(table.weight.shape) for table in embeddings.tables] == [(10, 16), (15, 8), (35, 4)]
    for token, cluster, row in ((0, 0, 0), (9, 0, 9), (10, 1, 0), (24, 1, 14), (25, 2, 0), (59, 2, 34)):
        expected = embeddings.projections[cluster] @ embeddings.tables[cluster].weight[row]
        torch.testing.assert_close(embeddings(torch.tensor(token)), expected)


@layouts
def test_an_id_that_is_none_is_refused(transformer_xl, options):
    model = transformer_xl(TransformerXLModel, **options)
    for token in (-1, 60):
        with pytest.raises(IndexError):
            model(torch.tensor([[3, token]]))


def test_a_tail_is_computed_for_its_own_targets_alone(transformer_xl, monkeypatch):
    model, hidden = transformer_xl(cutoffs=[10, 25], div_val=2), states(1, 9)
    rows, compute = [], model.lm_head.cluster_logits
    monkeypatch.setattr(
        model.lm_head, "cluster_logits", lambda some, cluster: rows.append(len(some)) or compute(some, cluster)
    )
    model.token_losses(hidden, torch.tensor([[3, 12, -100, 30, 31, 59, 9, -100, 5]]))
    assert rows == [7, 1, 3]


def test_a_cluster_without_targets_has_a_gradient_of_zeros(transformer_xl):
    # No gradient at all would stop data-parallel training.
    model = transformer_xl(cutoffs=[10, 25], div_val=2, tie_word_embeddings=False)
    tokens = torch.tensor([[1, 2, 3]])
    nll, *_ = model.token_nll(tokens, tokens)
    nll.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (model.lm_head.tables[2].weight.grad == 0).all() and (
        model.model.embeddings.tables[1].weight.grad == 0
    ).all()
    assert model.lm_head.cluster_weight.grad.abs().sum() > 0


def tied_pairs(model):
    """Names of the head's weights that are weights of the embeddings."""
    own = {id(parameter): name for name, parameter in model.model.embeddings.named_parameters()}
    head = model.lm_head.named_parameters(remove_duplicate=False)
    return {name: own[id(parameter)] for name, parameter in head if id(parameter) in own}


TABLES = {f"tables.{index}.weight": f"tables.{index}.weight" for index in range(3)}
TAILS = {f"projections.{index}": f"projections.{index}" for index in (1, 2)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"tables.0.weight": "tables.0.weight"}),
        ({"cutoffs": [10, 25], "div_val": 2}, TABLES | TAILS),
        ({"cutoffs": [10, 25], "div_val": 2, "tie_tail_projections": False}, TABLES),
        ({"cutoffs": [10, 25], "div_val": 2, "tie_word_embeddings": False}, {}),
        (
            {"cutoffs": [10, 25], "embedding_size": 6},
            {"tables.0.weight": "tables.0.weight"} | dict.fromkeys(TAILS, "projections.0"),
        ),
    ],
)
@torch.no_grad()
def test_what_is_tied_stays_tied(transformer_xl, tmp_path, options, expected):
    model, tokens = transformer_xl(**options), torch.arange(0, 60, 7)[None]
    assert tied_pairs(model) == expected
    model.save_pretrained(tmp_path)
    loaded, info = TransformerXLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tied_pairs(loaded) == expected
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert tied_pairs(TransformerXLForCausalLM(model.config)) == expected


@layouts
@torch.no_grad()
def test_the_vocabulary_can_be_resized(transformer_xl, tmp_path, options):
    model, tokens = transformer_xl(**options), torch.arange(0, 60, 7)[None]
    before, tied = model.lm_head.log_prob(model.model(tokens).last_hidden_state), tied_pairs(model)
    model.resize_token_embeddings(63)
    assert model.config.vocab_size == 63 and tied_pairs(model) == tied
    hidden = model.model(tokens).last_hidden_state
    after = model.lm_head.log_prob(hidden)
    assert after.shape[-1] == 63
    torch.testing.assert_close(after.exp().sum(-1), torch.ones(1, 9), atol=1e-5, rtol=0)
    # Among the old tokens of the last cluster nothing has changed, and nothing at all before it.
    first = model.config.cutoffs[-1] if model.config.cutoffs else 0
    torch.testing.assert_close(after[..., :first], before[..., :first], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        after[..., first:60].log_softmax(-1), before[..., first:].log_softmax(-1), atol=1e-5, rtol=1e-5
    )
    assert model(torch.tensor([[62]]), labels=torch.tensor([[62]])).logits.shape == (1, 1, 63)
    model.save_pretrained(tmp_path)
    assert torch.equal(TransformerXLForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    model.resize_token_embeddings(60)
    torch.testing.assert_close(model.lm_head.log_prob(hidden), before, atol=1e-5, rtol=1e-5)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 64
    with pytest.raises(ValueError, match=f"new_num_tokens={first} leaves no token"):
        model.resize_token_embeddings(first)


def test_models_without_a_language_model_head_are_resized_too(transformer_xl):
    for cls in (TransformerXLModel, TransformerXLForSequenceClassification):
        model = transformer_xl(cls, cutoffs=[10, 25], div_val=2)
        assert model.resize_token_embeddings(61).num_embeddings == 61
        model(torch.tensor([[60]]))
