"""ELMo: what each direction sees, states, padding, the softmaxes, the mean of layers, and the exported code."""

import ast
import json
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer, BertConfig, BertModel

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from hf_pretrain import (
    ElmoConfig,
    ElmoForPreTraining,
    ElmoForSequenceClassification,
    ElmoForTokenClassification,
    ElmoModel,
    ElmoTokenizer,
    ScalarMix,
)
from hf_pretrain.models.elmo.softmax_elmo import Negatives
from hf_pretrain.objectives.elmo import draw_negatives

SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "cell_size": 10,
    "character_embedding_size": 4,
    "filters": [[1, 4], [3, 6]],
    "hidden_dropout_prob": 0.0,
}
# Runs where hf_pretrain cannot be imported.
ELSEWHERE = (
    WITHOUT_LIBRARY
    + """
import os, pathlib
root = pathlib.Path({root!r})
os.environ["HF_MODULES_CACHE"] = str(root / "modules")
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(root / "saved", trust_remote_code=True)
assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
inputs = tokenizer(["a été here", "b"], padding=True, return_tensors="pt")
for name in ("AutoModel", "AutoModelForPreTraining"):
    model, info = getattr(transformers, name).from_pretrained(
        root / "saved", trust_remote_code=True, output_loading_info=True)
    assert name == "AutoModel" or not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules")
    with torch.no_grad():
        found = model(**inputs).hidden_states
    for layer, expected in zip(found, torch.load(root / "expected.pt"), strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-6, rtol=0)
model.save_pretrained(root / "again")
tokenizer.save_pretrained(root / "again")
print("all is well")
"""
)


def build(cls=ElmoModel, *, seed=0, **options):
    """A small model in evaluation whose cells are wide awake."""
    torch.manual_seed(seed)
    model = cls(ElmoConfig(**(SIZES | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_layers." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.6)
        embeddings = model.base_model.embeddings
        if hasattr(embeddings, "characters"):
            embeddings.characters.copy_(torch.randint(1, 262, embeddings.characters.shape))
    return model


LIMITS = [{}, {"cell_clip": 1.5, "projection_clip": 1.0}]


@pytest.mark.parametrize("limits", LIMITS)
def test_no_direction_sees_what_the_other_reads(limits):
    """The derivative of a state by a word on its wrong side is exactly zero, in each layer."""
    model = build(**limits)
    words = torch.randn(1, 6, 6, requires_grad=True)
    layers = model(inputs_embeds=words).hidden_states
    assert len(layers) == 3
    for layer in layers[1:]:
        for half, direction in enumerate(("forward", "backward")):
            for position in range(6):
                state = layer[0, position].chunk(2)[half]
                (found,) = torch.autograd.grad(state.sum(), words, retain_graph=True)
                seen = found[0].abs().sum(-1) > 0
                expected = torch.arange(6) <= position if direction == "forward" else torch.arange(6) >= position
                assert torch.equal(seen, expected)
    assert torch.equal(layers[0], torch.cat([words, words], dim=-1))


def test_the_second_layer_adds_its_input_and_the_first_does_not():
    with_skip, without = build(), build(use_skip_connections=False)
    without.load_state_dict(with_skip.state_dict())
    ids = torch.randint(1, 40, (2, 5))
    with torch.no_grad():
        one, other = with_skip(ids).hidden_states, without(ids).hidden_states
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2] + other[1])


@torch.no_grad()
@pytest.mark.parametrize("limits", LIMITS)
def test_two_halves_with_their_states_are_the_whole(limits):
    model = build(**limits)
    ids = torch.randint(1, 40, (3, 9))
    whole = model(ids, return_states=True)
    first = model(ids[:, :4], return_states=True)
    second = model(ids[:, 4:], states=first.states)
    torch.testing.assert_close(second.last_hidden_state[..., :6], whole.last_hidden_state[:, 4:, :6])
    torch.testing.assert_close(second.states[:, 0], whole.states[:, 0])
    # The backward direction begins at the end.
    second = model(ids[:, 4:], return_states=True)
    first = model(ids[:, :4], states=second.states)
    torch.testing.assert_close(first.last_hidden_state[..., 6:], whole.last_hidden_state[:, :4, 6:])
    torch.testing.assert_close(first.states[:, 1], whole.states[:, 1])
    assert not torch.allclose(model(ids[:, 4:]).last_hidden_state, whole.last_hidden_state[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_the_rest_of_the_batch_change_nothing(limits, side):
    model = build(**limits)
    lengths = (5, 1, 3)
    ids, mask = torch.full((3, 7), 9), torch.zeros(3, 7, dtype=torch.long)
    rows = [torch.randint(1, 40, (length,)) for length in lengths]
    columns = [slice(0, n) if side == "right" else slice(7 - n, 7) for n in lengths]
    for row, (words, places) in enumerate(zip(rows, columns, strict=True)):
        ids[row, places], mask[row, places] = words, 1
    found = model(ids, mask, return_states=True)
    for row, (words, places) in enumerate(zip(rows, columns, strict=True)):
        alone = model(words[None], return_states=True)
        for layer, expected in zip(found.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(layer[row, places], expected[0])
            assert not layer[row][mask[row] == 0].any()
        torch.testing.assert_close(found.states[:, :, row], alone.states[:, :, 0])


@torch.no_grad()
def test_steps_without_limits_are_the_fused_call():
    fused, steps = build(), build(cell_clip=1e9)
    steps.load_state_dict(fused.state_dict())
    ids, mask = torch.randint(1, 40, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    one, other = (model(ids, mask, return_states=True) for model in (fused, steps))
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.states, other.states, atol=1e-6, rtol=0)
    tight = build(cell_clip=0.1)
    tight.load_state_dict(fused.state_dict())
    assert tight(ids, mask, return_states=True).states[..., 6:].abs().max() <= 0.1 < one.states[..., 6:].abs().max()


@torch.no_grad()
def test_a_stateful_model_goes_on_row_by_row_and_forgets_when_told():
    model, plain = build(stateful=True), build()
    long, short = torch.randint(1, 40, (3, 4)), torch.randint(1, 40, (2, 5))
    first = plain(long, return_states=True)
    torch.testing.assert_close(model(long).last_hidden_state, first.last_hidden_state)
    second = plain(short, states=first.states[:, :, :2])
    torch.testing.assert_close(model(short).last_hidden_state, second.last_hidden_state)
    # The third row has waited.
    states = torch.cat([second.states, first.states[:, :, 2:]], dim=2)
    torch.testing.assert_close(model(long).last_hidden_state, plain(long, states=states).last_hidden_state)
    model.reset_states()
    torch.testing.assert_close(model(long).last_hidden_state, first.last_hidden_state)


def test_characters_are_read_as_the_words_of_the_table():
    model = build()
    ids = torch.randint(1, 40, (2, 5))
    characters = model.embeddings.characters[ids].long()
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, model(character_ids=characters).last_hidden_state)
        other = characters.clone()
        other[0, 2] = other[0, 2] % 261 + 1
        assert not torch.equal(model(character_ids=other).last_hidden_state, model(ids).last_hidden_state)
    table = build(embedding_type="tokens")
    with pytest.raises(ValueError, match="needs input_ids"):
        table(character_ids=characters)
    with pytest.raises(ValueError, match="has no vocabulary"):
        build(vocab_size=0)(ids)
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(50)


# The softmax


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"softmax": "adaptive", "cutoffs": [5, 20], "div_value": 2}])
def test_probabilities_sum_to_one_and_are_those_of_the_losses(options):
    model = build(ElmoForPreTraining, **options)
    ids = torch.randint(1, 40, (2, 30))
    found = model(ids, labels=ids)
    means = []
    for logits, labels, places in (
        (found.forward_logits, ids[:, 1:], slice(0, -1)),
        (found.backward_logits, ids[:, :-1], slice(1, None)),
    ):
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 30))
        means.append(-logits[:, places].gather(-1, labels[..., None]).mean())
    torch.testing.assert_close(found.loss, sum(means) / 2)
    assert abs(means[0] - means[1]) > 1e-3


def test_both_directions_train_one_softmax_and_their_own_layers():
    model = build(ElmoForPreTraining)
    halves = model.model(torch.randint(1, 40, (2, 6))).last_hidden_state.chunk(2, dim=-1)
    for half, other in ((0, "backward"), (1, "forward")):
        model.zero_grad()
        model.token_losses(halves[half], torch.randint(1, 40, (2, 6))).sum().backward(retain_graph=True)
        trained = {
            name.split(".")[1]
            for name, value in model.named_parameters()
            if value.grad is not None and value.grad.any()
        }
        assert trained == {"weight", "bias", "embeddings", "forward_layers", "backward_layers"} - {f"{other}_layers"}


@torch.no_grad()
def test_a_sampled_loss_nears_the_full_one_as_the_samples_become_all_words():
    model = build(ElmoForPreTraining, vocab_size=200)
    states, targets = torch.randn(50, 6), torch.randint(0, 200, (50,))
    full = model.softmax.nll(states, targets, [])
    every = Negatives(torch.arange(200), torch.tensor(torch.inf))
    torch.testing.assert_close(model.softmax.nll(states, targets, [], every), full)
    errors = []
    for size in (10, 50, 150):
        found = []
        for seed in range(30):
            drawn = draw_negatives(size, vocab_size=200, seed=seed, epoch=0, number=0)
            found.append(model.softmax.nll(states, targets, [], drawn))
        errors.append(float((torch.stack(found).mean(0) - full).abs().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


# The mean of layers


def test_a_mean_of_layers_weighs_scales_and_normalizes():
    layers = tuple(torch.randn(2, 4, 5) for _ in range(3))
    mix = ScalarMix(3)
    torch.testing.assert_close(mix(layers), sum(layers) / 3)
    with torch.no_grad():
        mix.gamma.fill_(2.5)
        torch.testing.assert_close(mix(layers), sum(layers) / 3 * 2.5)
        mix.weights.copy_(torch.tensor([-9e10, 1.0, -9e10]))
        torch.testing.assert_close(mix(layers), layers[1] * 2.5)
    with pytest.raises(ValueError, match="has 2 layers"):
        mix(layers[:2])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    normed = ScalarMix(3, do_layer_norm=True)
    with torch.no_grad():
        normed.weights.copy_(torch.tensor([-9e10, -9e10, 1.0]))
        found = normed(layers, mask)[mask != 0]
    torch.testing.assert_close(found.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var(correction=0), torch.tensor(1.0))
    # One number for all: not that of each word.
    assert found.mean(-1).abs().max() > 0.1


def test_a_mean_of_layers_takes_those_of_any_model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=30, **sizes)).eval()
    mix = ScalarMix(3, dropout=0.5)
    mixed = mix(bert(torch.randint(0, 30, (2, 5)), output_hidden_states=True).hidden_states)
    mixed.sum().backward()
    assert mixed.shape == (2, 5, 16) and mix.gamma.grad is not None and (mixed == 0).any()


@pytest.mark.parametrize("cls", [ElmoForTokenClassification, ElmoForSequenceClassification])
def test_classifiers_read_the_mean_of_all_layers_and_no_padding(cls):
    model = build(cls, num_labels=3, classifier_dropout=0.0)
    ids, mask = torch.randint(1, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    labels = torch.randint(0, 3, (2, 6) if cls is ElmoForTokenClassification else (2,))
    found = model(ids, mask, labels=labels)
    found.loss.backward()
    assert model.mix.weights.grad.abs().min() > 0 and found.logits.shape == (*labels.shape, 3)
    other = ids.masked_fill(mask == 0, 7)
    words = mask != 0 if cls is ElmoForTokenClassification else slice(None)
    torch.testing.assert_close(model(other, mask).logits[words], found.logits[words])


# Export


def words_tokenizer():
    from hf_pretrain import train_tokenizer

    texts = ["a b c été here there", "a b here", "a b"] * 3
    return ElmoTokenizer.from_fast(train_tokenizer(texts, kind="word", vocab_size=40, lowercase=False))


@pytest.fixture
def saved(tmp_path):
    tokenizer = words_tokenizer()
    model = build(ElmoForPreTraining, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        layers = model(**tokenizer(["a été here", "b"], padding=True, return_tensors="pt")).hidden_states
    torch.save(layers, tmp_path / "expected.pt")
    return tmp_path


def test_it_opens_where_this_library_is_not(saved):
    assert run_fresh({"elsewhere": ELSEWHERE.format(root=str(saved))}, saved)["elsewhere"] == "all is well\n"
    assert type(AutoModelForPreTraining.from_pretrained(saved / "again")) is ElmoForPreTraining
    assert type(AutoTokenizer.from_pretrained(saved / "again")) is ElmoTokenizer


def test_it_opens_here_without_further_ado(saved):
    model, tokenizer = AutoModel.from_pretrained(saved / "saved"), AutoTokenizer.from_pretrained(saved / "saved")
    assert type(model) is ElmoModel and type(tokenizer) is ElmoTokenizer
    with torch.no_grad():
        found = model(**tokenizer(["a été here", "b"], padding=True, return_tensors="pt")).hidden_states
    for layer, expected in zip(found, torch.load(saved / "expected.pt"), strict=True):
        assert torch.equal(layer, expected)
    mapped = json.loads((saved / "saved" / "config.json").read_text())["auto_map"]
    assert mapped["AutoModel"] == "modeling_elmo.ElmoModel"


def test_the_code_needs_no_other_package(saved):
    paths = list((saved / "saved").glob("*.py"))
    assert {"modeling_elmo.py", "tokenization_elmo.py", "configuration_elmo.py"} < {path.name for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module] if node.level == 0 else []
            known = {"torch", "transformers", "tokenizers", "huggingface_hub", *sys.stdlib_module_names}
            assert {name.partition(".")[0] for name in names} <= known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 13}, "must be even"),
        ({"cell_size": 6}, "is projected to 6"),
        ({"softmax": "adaptive"}, "give cutoffs"),
        ({"softmax": "adaptive", "cutoffs": [40]}, "do not divide"),
        ({"softmax": "nce"}, "choose one of"),
        ({"cell_clip": 0.0}, "must be positive"),
        ({"filters": [[51, 2]]}, "width of the filters"),
        ({"embedding_type": "tokens", "vocab_size": 0}, "needs a vocabulary"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        ElmoConfig(**(SIZES | options))
