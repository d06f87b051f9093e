"""Heads beside the masked-LM head: their formulas, whose weights they use, and which stock classes have them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining

from helpers.method_matrix import TINY
from hf_pretrain.modeling.heads import (
    PairHead,
    PairHeadConfig,
    SpanBoundaryHead,
    SpanBoundaryHeadConfig,
    load_head,
    stock_class,
)


def stirred(module):
    """Away from the initial values: zero biases and unit norms would hide a layer that is left out."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("table_width", [16, 8])
def test_span_boundary_head_is_its_formula_token_by_token(table_width):
    sizes = {"vocab_size": 11, "hidden_size": 16, "embedding_size": table_width, "span_positions": 5}
    head = stirred(SpanBoundaryHead(SpanBoundaryHeadConfig(**sizes)))
    assert head.position_embeddings.weight.shape == (5, 200)
    states, table = torch.randn(2, 12, 16), torch.randn(11, table_width)
    spans = [(0, 2, 5), (0, 9, 10), (1, 1, 6)]  # row, start, end

    def layer(vector, dense, norm):
        hidden = dense.weight @ vector + dense.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + norm.eps).sqrt()
        return hidden * norm.weight + norm.bias

    expected, left, right, offsets = [], [], [], []
    head.requires_grad_(False)
    for row, start, end in spans:
        for i in range(end - start):
            place = head.position_embeddings.weight[i]
            hidden = torch.cat([states[row, start - 1], states[row, end], place])
            hidden = layer(layer(hidden, head.dense_in, head.norm_in), head.dense_out, head.norm_out)
            expected.append([float(table[v] @ hidden + head.bias[v]) for v in range(11)])
            left.append(states[row, start - 1])
            right.append(states[row, end])
            offsets.append(i)
    found = head(torch.stack(left), torch.stack(right), torch.tensor(offsets), table)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_span_boundary_head_trains_the_word_table_of_the_encoder_and_has_none():
    encoder = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("albert", **TINY, vocab_size=60, embedding_size=16)
    )
    head, table = SpanBoundaryHead.for_encoder(encoder, span_positions=20), encoder.get_input_embeddings().weight
    assert (head.config.hidden_size, head.config.embedding_size) == (32, 16)
    assert not [name for name, value in head.state_dict().items() if value.shape == table.shape]
    head(torch.randn(3, 32), torch.randn(3, 32), torch.arange(3), table).sum().backward()
    assert table.grad is not None and table.grad.any()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_pair_head_is_its_formula_and_drops_only_in_training():
    head = stirred(PairHead(PairHeadConfig(num_classes=3, hidden_size=16, hidden_dropout_prob=0.5)))
    states = torch.randn(4, 16)
    pooled = torch.tanh(states @ head.dense.weight.T + head.dense.bias)
    torch.testing.assert_close(head(states), pooled @ head.classifier.weight.T + head.classifier.bias)
    assert torch.equal(head(states), head(states)) and not torch.equal(head.train()(states), head(states))


def test_weights_of_another_form_are_left_alone(tmp_path):
    source = stirred(PairHead(PairHeadConfig(num_classes=3, hidden_size=16)))
    source.save_pretrained(tmp_path / "pretraining" / "pair_head")
    same, other = PairHead(source.config), PairHead(PairHeadConfig(num_classes=2, hidden_size=16))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert load_head(same, str(tmp_path), folder="pretraining/pair_head")
    assert not load_head(other, str(tmp_path), folder="pretraining/pair_head")
    assert not load_head(same, str(tmp_path), folder="pretraining/other")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("model_type", "has_pair_head"),
    [
        *dict.fromkeys(("albert", "bert", "big_bird", "ernie", "fnet", "megatron-bert", "mobilebert"), True).items(),
        # ELECTRA's and Funnel's class of that name finds replaced tokens; others have a masked-LM head alone, or none.
        *dict.fromkeys(("electra", "funnel", "roberta", "deberta-v2", "modernbert", "xlm", "roc_bert"), False).items(),
    ],
)
def test_classes_with_a_pair_head_are_found(model_type, has_pair_head):
    config = AutoConfig.for_model(model_type)
    expected = AutoModelForPreTraining if has_pair_head else AutoModelForMaskedLM
    assert stock_class(config, heads=["mlm", "pair"]) is expected
    assert stock_class(config, heads=["mlm", "pair"], pair_classes=3) is AutoModelForMaskedLM
    assert stock_class(config, heads=["mlm", "word_order"]) is AutoModelForMaskedLM
