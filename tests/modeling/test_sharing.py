"""Which parameters of two models are one."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.embeddings import shared_embedding_names


def tiny_model(model_type, **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    values = {**TINY, **special, "vocab_size": VOCAB_SIZE, **options}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **values))


TABLES = {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"}
NORM = {"LayerNorm.weight", "LayerNorm.bias"}


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("electra", {"embedding_size": 16}, TABLES | NORM),
        ("albert", {"embedding_size": 16}, TABLES | NORM),
        ("bert", {}, TABLES | NORM),
        ("roberta", {}, TABLES | NORM),
        ("deberta-v2", {"position_biased_input": False}, {"word_embeddings.weight"} | NORM),
        ("modernbert", {}, {"tok_embeddings.weight", "norm.weight"}),
    ],
)
def test_tables_and_norm_are_shared_and_nothing_else(model_type, options, expected):
    target, source = tiny_model(model_type, **options), tiny_model(model_type, **options)
    names = shared_embedding_names(target, source)
    assert {name.split(".embeddings.", 1)[1] for name in names} == expected
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    assert all(ours[name].shape == theirs[other].shape for name, other in names.items())
    assert all(name.split(".embeddings.")[1] == other.split(".embeddings.")[1] for name, other in names.items())


def test_models_of_other_depth_and_width_share():
    target = tiny_model("electra", embedding_size=16)
    source = tiny_model("electra", embedding_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    assert len(shared_embedding_names(target, source)) == 5


def test_a_projection_belongs_to_each_model():
    """DeBERTa-v2 keeps its projection among the embeddings."""
    target, source = (tiny_model("deberta-v2", embedding_size=16, position_biased_input=False) for _ in range(2))
    names = {name.split(".embeddings.")[1] for name in shared_embedding_names(target, source)}
    assert names == {"word_embeddings.weight"} | NORM


@pytest.mark.parametrize(
    ("difference", "values"),
    [
        ({"embedding_size": 24}, ("(60, 16)", "(60, 24)")),
        ({"vocab_size": 64}, ("(60, 16)", "(64, 16)")),
        ({"max_position_embeddings": 40}, ("(32, 16)", "(40, 16)")),
        ({"type_vocab_size": 1}, ("(2, 16)", "(1, 16)")),
    ],
)
def test_other_shapes_are_refused_by_name(difference, values):
    target, source = (
        tiny_model("electra", embedding_size=16),
        tiny_model("electra", **{"embedding_size": 16, **difference}),
    )
    with pytest.raises(InputError, match="embedding_sharing='tied'") as caught:
        shared_embedding_names(target, source)
    assert all(value in str(caught.value) for value in values)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_refused():
    with pytest.raises(InputError, match="embedding_sharing"):
        shared_embedding_names(tiny_model("bert"), tiny_model("modernbert"))


def test_the_models_are_left_alone():
    target, source = tiny_model("electra", embedding_size=16), tiny_model("electra", embedding_size=16)
    shared_embedding_names(target, source)
    assert not torch.equal(target.get_input_embeddings().weight, source.get_input_embeddings().weight)
