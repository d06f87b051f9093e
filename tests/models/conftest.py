"""Tiny models of the custom architectures."""

import pytest
import torch

from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM


@pytest.fixture
def transformer_xl():
    """Builds a small Transformer-XL in evaluation; its weights are wide, so that attention and distance matter."""

    def build(cls=TransformerXLForCausalLM, *, seed=0, **options):
        values = {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "mem_len": 6,
            "initializer_range": 0.3,
            "projection_initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        return cls(TransformerXLConfig(**(values | options))).eval()

    return build
