"""Tiny encoders with several heads, and batches for them."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.objectives.encoder import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining, EncoderForPreTrainingConfig

ALL = ["mlm", "pair", "span_boundary", "word_order"]
BACKBONES = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False},
    "electra": {"embedding_size": 16},
    "modernbert": {},
    "roberta": {},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
}


def stock_model(model_type, auto_class=AutoModelForMaskedLM, **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    values = {**TINY, **special, "vocab_size": VOCAB_SIZE, **BACKBONES.get(model_type, {}), **options}
    if model_type == "xlm":
        values = {name: value for name, value in values.items() if name not in TINY} | {"max_position_embeddings": 32}
    return auto_class.from_config(AutoConfig.for_model(model_type, **values))


def stirred(model):
    """Away from the initial values: zero biases and unit norms would hide a layer that is left out."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def encoder_of(model_type, heads=ALL, *, pair_classes=2, **options):
    config = stock_model(model_type, **options).config
    torch.manual_seed(0)
    return stirred(
        EncoderForPreTraining(
            EncoderForPreTrainingConfig(model=config, heads=list(heads), pair_classes=pair_classes, span_positions=4)
        )
    )


def batch_of(model=None, *, num_examples=6, side="right", with_types=True, seed=0, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rng, examples = np.random.default_rng(seed), []
    for i in range(num_examples):
        ids = rng.integers(5, VOCAB_SIZE, rng.integers(14, 25))
        ids[[0, -1]] = 2, 3
        example = {"input_ids": ids, "word_starts": np.ones(len(ids), bool), "example_id": i, "epoch": 0}
        if with_types:
            example["token_type_ids"] = (np.arange(len(ids)) > 8).astype(int)
        examples.append(example | {"pair_label": -100 if i == 2 else i % 2})
    masking = MaskingArguments(masking_unit="span", mlm_probability=0.3)
    collator = DataCollatorForEncoder(
        tokenizer, heads=ALL, masking=masking, word_order_probability=0.3, span_positions=4, **options
    )
    batch = collator(examples)
    assert min(len(batch["span_labels"]), len(batch["order_labels"])) >= 10
    return batch


def takes_types(model_type):
    # To XLM a token type is another word, and these two have none.
    return model_type not in ("xlm", "modernbert", "roberta", "deberta-v2")


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def summed(output):
    """Every loss with a weight of its own."""
    return sum((2 + i) * output.losses[name].sum.sum() for i, name in enumerate(sorted(output.losses)))
