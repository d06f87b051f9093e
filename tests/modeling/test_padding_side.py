"""Padding on the left gives every method the losses of padding on the right, with any kind of positions."""

from itertools import product

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
)

from helpers.distilled import arguments
from helpers.method_matrix import TINY, VOCAB_SIZE
from hf_pretrain.objectives.distillation.arguments import TaskDistillationTrainingArguments
from hf_pretrain.objectives.distillation.building import join
from hf_pretrain.objectives.electric.modeling import ElectricForPreTraining
from hf_pretrain.objectives.electric.two_tower import build_two_tower
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.permutation_lm.modeling import PermutationLMForPreTraining
from hf_pretrain.objectives.replaced_token_detection.modeling import ReplacedTokenDetectionForPreTraining

ARCHITECTURES = ["bert", "electra", "roberta", "albert", "deberta-v2", "modernbert", "distilbert"]
LENGTHS = torch.tensor([5, 8, 3])
SIZE = 8
# Flat positions of a batch.
POSITIONS = ("target_positions", "span_left", "span_right", "candidate_positions")


def config(model_type, **options):
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    names = {"intermediate_size": "hidden_dim"} if model_type == "distilbert" else {}
    sizes = {names.get(name, name): value for name, value in TINY.items()}
    return AutoConfig.for_model(model_type, **sizes, **special, pad_token_id=0, vocab_size=VOCAB_SIZE, **options)


def text():
    """Three rows of 5, 8 and 3 tokens, padded on the right."""
    torch.manual_seed(0)
    is_token = torch.arange(SIZE) < LENGTHS[:, None]
    return {
        "input_ids": torch.randint(5, VOCAB_SIZE, is_token.shape) * is_token,
        "attention_mask": is_token.long(),
    }


def masked():
    batch = text()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1:3] = batch["input_ids"][:, 1:3]
    positions = (labels != -100).flatten().nonzero().squeeze(1)
    return batch | {"labels": labels, "target_positions": positions}


def padded_left(batch):
    pads = SIZE - LENGTHS
    moved = {}
    for name, value in batch.items():
        if value.shape == (len(pads), SIZE):
            value = torch.stack([row.roll(int(pad)) for row, pad in zip(value, pads, strict=True)])
        elif name in POSITIONS:
            value = value + pads[value // SIZE]
        elif name == "target_columns":
            value = value + pads[:, None]
        moved[name] = value
    return moved


def encoder(model_type):
    model = AutoModelForMaskedLM.from_config(config(model_type))
    composite = EncoderForPreTraining.from_model(model, heads=["mlm", "span_boundary"])
    some = masked()
    spans = {"span_left": some["target_positions"] - 1, "span_right": some["target_positions"]}
    zeros = torch.zeros_like(some["target_positions"])
    return composite, some | spans | {"span_offsets": zeros, "span_labels": zeros + 7}


def mlm(model_type):
    return EncoderForPreTraining.from_model(AutoModelForMaskedLM.from_config(config(model_type))), masked()


def detection(model_type, *, generator=None, **options):
    generator = AutoModelForMaskedLM.from_config(config(model_type) if generator is None else generator)
    own = ElectraForPreTraining if model_type == "electra" else None
    other = config(model_type, num_labels=1)
    discriminator = own(other) if own else AutoModelForTokenClassification.from_config(other)
    model = ReplacedTokenDetectionForPreTraining.from_models(generator, discriminator, **options)
    batch = masked()
    return model, batch | {"sample_uniforms": torch.linspace(0.1, 0.9, len(batch["target_positions"]))}


def enhanced(model_type):
    """The generator decodes with positions of its own, which its model does not know of."""
    own = config("deberta-v2", position_biased_input=False)
    own.relative_attention, own.pos_att_type = True, ["c2p", "p2c"]
    return detection("deberta-v2", generator=own, enhanced_mask_decoder=True, embedding_sharing="none")


def electric(model_type):
    own = ElectraForPreTraining if model_type == "electra" else None
    other = config(model_type, num_labels=1)
    discriminator = own(other) if own else AutoModelForTokenClassification.from_config(other)
    model = ElectricForPreTraining.from_models(build_two_tower(config(model_type)), discriminator)
    batch = masked()
    candidates = batch["attention_mask"].flatten().nonzero().squeeze(1)
    uniforms = torch.linspace(0.1, 0.9, len(batch["target_positions"]))
    return model, batch | {"candidate_positions": candidates, "sample_uniforms": uniforms}


def permuted(model_type):
    model = PermutationLMForPreTraining.from_model(
        AutoModelForMaskedLM.from_config(config(model_type)), mask_token_id=4
    )
    batch = text()
    columns = torch.arange(SIZE).expand(len(LENGTHS), SIZE).contiguous()
    targets = torch.tensor([[1, 2]] * len(LENGTHS))
    labels = batch["input_ids"].gather(1, targets)
    return model, batch | {"key_ranks": columns, "thresholds": columns, "target_columns": targets, "labels": labels}


def student(model_type):
    models = [AutoModel.from_config(config(model_type)) for _ in range(2)]
    return join(*models, arguments("hidden", "attention", "embedding", "relation_vv")), text()


def classifier(model_type):
    models = [AutoModelForSequenceClassification.from_config(config(model_type, num_labels=3)) for _ in range(2)]
    args = TaskDistillationTrainingArguments(output_dir="unused", bf16=False, prediction_weight=1.0)
    return join(*models, args), text()


CASES = [
    *product((mlm, encoder, detection, electric, student, classifier), ARCHITECTURES),
    # DeBERTa's attention takes no mask of this method.
    *product((permuted,), [model_type for model_type in ARCHITECTURES if model_type != "deberta-v2"]),
    (enhanced, "deberta-v2"),
]


@pytest.mark.parametrize(
    ("method", "model_type"), CASES, ids=[f"{method.__name__}-{model_type}" for method, model_type in CASES]
)
def test_the_losses_of_every_example_are_those_of_padding_on_the_right(method, model_type):
    torch.manual_seed(1)
    model, batch = method(model_type)
    with torch.no_grad():
        right, left = (model.eval()(**side) for side in (batch, padded_left(batch)))
    assert right.losses.keys() == left.losses.keys()
    for name, loss in right.losses.items():
        assert loss.count.sum() > 0
        torch.testing.assert_close(left.losses[name].count, loss.count)
        torch.testing.assert_close(left.losses[name].sum, loss.sum, atol=1e-5, rtol=1e-5)
