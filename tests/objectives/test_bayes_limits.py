"""What the two discriminators converge to, on a text of independent tokens of known probabilities.

A discriminator that is one free number a token is fitted to a batch in which every case stands exactly as often as it should.
"""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig, BertForTokenClassification
from transformers.modeling_outputs import TokenClassifierOutput

from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.electric import ElectricForPreTraining
from hf_pretrain.objectives.electric.two_tower import build_two_tower
from hf_pretrain.objectives.replaced_token_detection import ReplacedTokenDetectionForPreTraining

# Of four tokens, in eighths; token 0 is never sampled.
TEXT = torch.tensor([4, 2, 1, 1])
NOISE = torch.tensor([1, 1, 2, 4])
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 5}


class Table(nn.Module):
    """One logit a token of the vocabulary, whatever stands around it."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(SIZES["vocab_size"]))

    def forward(self, input_ids, **inputs):
        return TokenClassifierOutput(logits=self.logits[input_ids][..., None])


def configuration(**options):
    return BertConfig(**SIZES, max_position_embeddings=512, **options)


def batch_of(*selected_quarters):
    """One row for each share: all pairs of a token of the text and a draw of the noise, selected n times out of four."""
    text = torch.arange(1, 5).repeat_interleave(TEXT).tolist()
    # The middles of eighths: the draws meet each token of the noise as often as it is probable.
    draws = [(i + 0.5) / 8 for i in range(8)]
    cases = [list(itertools.product(text, draws, range(4))) for _ in selected_quarters]
    input_ids = torch.tensor([[token for token, _, _ in row] for row in cases])
    pairs = zip(cases, selected_quarters, strict=True)
    selected = torch.tensor([[slot < quarters for _, _, slot in row] for row, quarters in pairs])
    uniforms = torch.tensor([[draw for _, draw, _ in row] for row in cases])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(~selected, IGNORED),
        "target_positions": selected.flatten().nonzero().flatten(),
        "sample_uniforms": uniforms[selected],
    }


def fit(model, name, batch):
    """Minimise the loss over the table, and return its logits."""
    table = model.discriminator.logits
    optimizer = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).losses[name]
        mean = loss.sum.sum() / loss.count.sum()
        mean.backward()
        return mean

    optimizer.step(closure)
    return table.detach()[1:]


@pytest.fixture
def probabilities():
    return TEXT / 8, NOISE / 8


def test_electra_learns_which_share_of_a_token_is_false(probabilities):
    (p, q), k = probabilities, 0.25
    generator = AutoModelForMaskedLM.from_config(configuration())
    for parameter in generator.cls.predictions.transform.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        generator.get_output_embeddings().bias[1:] = q.log()
    discriminator = BertForTokenClassification(configuration(num_labels=1))
    options = {"embedding_sharing": "none", "excluded_token_ids": [0]}
    model = ReplacedTokenDetectionForPreTraining.from_models(generator, discriminator, **options).eval()
    model.discriminator = Table()
    logits = fit(model, "rtd", batch_of(1))
    torch.testing.assert_close(logits.sigmoid(), k * q * (1 - p) / (k * q + (1 - k) * p), atol=1e-4, rtol=0)


@pytest.mark.parametrize("quarters", [(1,), (3,), (1, 2)], ids=str)
def test_electric_learns_the_negative_log_probability_of_the_text(probabilities, quarters):
    """Whatever the share of noise, and also if it differs from row to row."""
    p, q = probabilities
    generator = build_two_tower(configuration(), excluded_token_ids=[0])
    nn.init.zeros_(generator.norm.weight)
    with torch.no_grad():
        generator.bias[1:] = q.log()
    discriminator = BertForTokenClassification(configuration(num_labels=1))
    model = ElectricForPreTraining.from_models(generator, discriminator, embedding_sharing="none").eval()
    model.discriminator = Table()
    batch = batch_of(*quarters)
    batch["candidate_positions"] = torch.arange(batch["input_ids"].numel())
    energies = fit(model, "nce", batch)
    torch.testing.assert_close(energies, -p.log(), atol=1e-3, rtol=0)
    logits, k = model(**batch).scores[0].detach(), quarters[0] / 4
    is_text = batch["labels"][0] == IGNORED
    own = torch.stack([logits[is_text & (batch["input_ids"][0] == token)][0] for token in range(1, 5)])
    torch.testing.assert_close(own.sigmoid(), k * q / (k * q + (1 - k) * p), atol=1e-3, rtol=0)
