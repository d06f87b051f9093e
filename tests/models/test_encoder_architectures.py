"""Architectures on top of an encoder: what each computes, by hand and wherever padding is, and the models that hold them."""

import ast
import json
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from hf_pretrain import (
    Architecture,
    ElmoConfig,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    ScalarMix,
    TaskHeadConfig,
    architectures,
    register_architecture,
)
from hf_pretrain.models.task_heads.architectures_task_heads import BidirectionalLSTM, Pooling

WIDTH = 8
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ENCODERS = {
    "bert": BertConfig(vocab_size=40, **SIZES),
    "roberta": RobertaConfig(vocab_size=40, **(SIZES | {"pad_token_id": 1}), type_vocab_size=1),
    "modernbert": ModernBertConfig(vocab_size=40, **SIZES, **SPECIAL),
}
SMALL = {"bilstm": {"lstm_size": 6}, "cnn": {"num_filters": 7}}
# Name, task, options: every architecture, and the options that change what is computed.
CASES = [(name, task, SMALL.get(name, {})) for name, each in architectures().items() for task in each.tasks] + [
    ("bilstm", "texts", {"lstm_size": 5, "num_layers": 2, "pooling": "attention"}),
    ("scalar_mix", "texts", {"pooling": "cls"}),
    ("attention_pooling", "texts", {"attention_size": 3}),
    ("cnn", "tokens", {"widths": [2, 4], "num_filters": 5}),
    ("pair_encoder", "texts", {"symmetric": True, "cross_attention": True, "pooling": "max"}),
    ("pair_encoder", "texts", {"cross_attention": True, "pooling": "attention"}),
]
each_case = pytest.mark.parametrize(("name", "task", "options"), CASES, ids=lambda value: str(value).replace(" ", ""))
CLASSES = {"texts": EncoderForSequenceClassification, "tokens": EncoderForTokenClassification}


def head(name, task="texts", *, labels=3, width=WIDTH, **options):
    torch.manual_seed(0)
    return architectures()[name](width, labels, per_token=task == "tokens", **options).eval()


def encoder(name="bert", *, seed=0, **options):
    """A small encoder with wide weights, so that order and position matter."""
    torch.manual_seed(seed)
    config = type(ENCODERS[name]).from_dict(ENCODERS[name].to_dict() | {"initializer_range": 0.3} | options)
    return AutoModel.from_config(config).eval()


def model_of(name="mean", task="texts", options=None, *, backbone=None, **settings):
    backbone = encoder() if backbone is None else backbone
    torch.manual_seed(1)
    settings = {"num_labels": 3, "architecture": name, "architecture_options": options} | settings
    return CLASSES[task].from_encoder(backbone, **settings)


def tokens(rows=3, length=9, *, seed=0):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def texts(module_or_name, ids):
    """The inputs of an architecture: the second texts are the first ones turned round."""
    found = module_or_name if isinstance(module_or_name, str) else module_or_name.config.architecture
    return {"input_ids": ids} | ({"pair_input_ids": ids.flip(1)} if architectures()[found].reads_pairs else {})


def padded(rows, side, *, fill):
    """Rows of states of several lengths in one batch, with numbers at padding that would be seen, and its mask."""
    longest = max(len(row) for row in rows) + 2
    states, mask = torch.full((len(rows), longest, rows[0].shape[-1]), fill), torch.zeros(len(rows), longest).bool()
    for number, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        states[number, part], mask[number, part] = row, True
    return states, mask


@each_case
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_a_row_depend_neither_on_padding_nor_on_other_rows(name, task, options, side):
    module = head(name, task, **options)
    rows = [torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length)) for length in (6, 1, 9, 2)]
    if module.reads_pairs:
        others = rows[::-1]
        found = module(*padded(rows, side, fill=99.0), *padded(others, "right", fill=-99.0))
        ones = [torch.ones(1, len(row)).bool() for row in rows]
        alone = [
            module(row[None], mask, other[None], other_mask)[0]
            for row, mask, other, other_mask in zip(rows, ones, others, ones[::-1], strict=True)
        ]
    else:
        states, mask = padded(rows, side, fill=99.0)
        found = module(states, mask)
        found = [each[kept] for each, kept in zip(found, mask, strict=True)] if task == "tokens" else found
        alone = [module(row[None], torch.ones(1, len(row)).bool())[0] for row in rows]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert not torch.allclose(found[0][0], found[2][0], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backbone", list(ENCODERS))
@torch.no_grad()
def test_a_model_reads_a_text_alike_on_either_side_of_padding(backbone, side):
    """BERT counts columns, RoBERTa ids, ModernBERT distances."""
    model = model_of("cls", backbone=encoder(backbone)).eval()
    assert model.config.first_position == (0 if backbone == "bert" else None)
    pad, alone = model.config.pad_token_id, tokens(1, 5)
    room = torch.full((1, 4), pad)
    joined = torch.cat([room, alone] if side == "left" else [alone, room], dim=1)
    found = model(joined, attention_mask=(joined != pad).long()).logits
    torch.testing.assert_close(found, model(alone).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_cnn_is_a_convolution_by_hand():
    module = head("cnn", widths=[2, 3], num_filters=4)
    row = torch.randn(5, WIDTH)
    features = []
    for width, convolution in zip((2, 3), module.convolutions, strict=True):
        zeros = torch.zeros(width - 1, WIDTH)
        longer = torch.cat([zeros, row, zeros])
        windows = [longer[begin : begin + width] for begin in range(len(row) + width - 1)]
        values = [
            [max(0.0, float((window * convolution.weight[f].T).sum() + convolution.bias[f])) for window in windows]
            for f in range(4)
        ]
        features += [max(each) for each in values]
    expected = module.output(torch.tensor(features))
    torch.testing.assert_close(module(row[None], torch.ones(1, 5).bool())[0], expected, atol=1e-5, rtol=0)
    # A window around a token: one before it and one after it.
    tagger = head("cnn", "tokens", widths=[3], num_filters=4)
    middle = (row[1:4] * tagger.convolutions[0].weight.transpose(1, 2)).sum((1, 2)) + tagger.convolutions[0].bias
    torch.testing.assert_close(
        tagger(row[None], torch.ones(1, 5).bool())[0, 2], tagger.output(middle.relu()), atol=1e-5, rtol=0
    )
    # Of an even width: the token and the one after it.
    tagger = head("cnn", "tokens", widths=[2], num_filters=4)
    middle = (row[2:4] * tagger.convolutions[0].weight.transpose(1, 2)).sum((1, 2)) + tagger.convolutions[0].bias
    torch.testing.assert_close(
        tagger(row[None], torch.ones(1, 5).bool())[0, 2], tagger.output(middle.relu()), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_the_lstm_is_torchs_own_of_both_directions_on_each_row_alone():
    torch.manual_seed(0)
    ours = BidirectionalLSTM(WIDTH, 5, num_layers=2).eval()
    stock = nn.LSTM(WIDTH, 5, num_layers=2, bidirectional=True, batch_first=True)
    for layer in range(2):
        for suffix, lstm in (("", ours.forwards[layer]), ("_reverse", ours.backwards[layer])):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(stock, f"{kind}_l{layer}{suffix}").copy_(getattr(lstm, f"{kind}_l0"))
    rows = [torch.randn(length, WIDTH) for length in (3, 7, 1)]
    for side in ("left", "right"):
        states, mask = padded(rows, side, fill=50.0)
        found = ours(states, mask)
        assert not found[~mask].any()
        for number, row in enumerate(rows):
            torch.testing.assert_close(found[number][mask[number]], stock(row[None])[0][0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_weights_of_attention_are_shares_of_the_tokens():
    torch.manual_seed(0)
    pooling = Pooling("attention", WIDTH, attention_size=3)
    states, mask = padded([torch.randn(4, WIDTH), torch.randn(2, WIDTH)], "left", fill=30.0)
    weights = pooling.weights(states, mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert not weights[~mask].any() and (weights[mask] > 0).all()
    scores = torch.stack([pooling.query.weight[0] @ (pooling.key(state).tanh()) for state in states[0][mask[0]]])
    torch.testing.assert_close(weights[0][mask[0]], scores.softmax(0))
    expected = sum(share * state for share, state in zip(weights[0], states[0], strict=True))
    torch.testing.assert_close(pooling(states, mask)[0], expected)


@pytest.mark.parametrize("kind", ["mean", "max", "cls", "last"])
@torch.no_grad()
def test_poolings_are_those_of_the_tokens(kind):
    rows = [torch.randn(4, WIDTH), torch.randn(2, WIDTH)]
    expected = {
        "mean": [row.mean(0) for row in rows],
        "max": [row.amax(0) for row in rows],
        "cls": [row[0] for row in rows],
        "last": [row[-1] for row in rows],
    }[kind]
    for side in ("left", "right"):
        found = Pooling(kind, WIDTH)(*padded(rows, side, fill=7.0))
        torch.testing.assert_close(found, torch.stack(expected))
    assert Pooling(kind, WIDTH)(torch.ones(1, 3, WIDTH), torch.zeros(1, 3).bool()).isfinite().all()


@torch.no_grad()
def test_pairs_are_compared_by_hand_and_symmetric_where_wanted():
    first, second = torch.randn(1, 4, WIDTH), torch.randn(1, 3, WIDTH)
    ones = (torch.ones(1, 4).bool(), torch.ones(1, 3).bool())
    plain = head("pair_encoder")
    u, v = first.mean(1), second.mean(1)
    expected = plain.output(torch.cat([u, v, (u - v).abs(), u * v], dim=1))
    torch.testing.assert_close(plain(first, ones[0], second, ones[1]), expected)
    assert not torch.allclose(plain(second, ones[1], first, ones[0]), expected, atol=1e-3)
    for options in ({}, {"cross_attention": True}):
        module = head("pair_encoder", symmetric=True, **options)
        there, back = module(first, ones[0], second, ones[1]), module(second, ones[1], first, ones[0])
        torch.testing.assert_close(there, back)
    # What a token is compared with comes from the other text alone.
    module = head("pair_encoder", cross_attention=True)
    shares = (first[0] @ second[0].T / WIDTH**0.5).softmax(-1)
    found = shares @ second[0]
    joined = module.compare(torch.cat([first[0], found, first[0] - found, first[0] * found], dim=-1)).relu()
    torch.testing.assert_close(module._compared(first, second, ones[1])[0], joined)


@torch.no_grad()
def test_the_mix_of_layers_is_their_mean_at_first_and_can_be_one_of_them():
    model = model_of("scalar_mix", "tokens").eval()
    ids = tokens()
    layers = model.encoder(ids, output_hidden_states=True).hidden_states
    assert isinstance(model.scalar_mix, ScalarMix) and len(model.scalar_mix.weights) == len(layers) == 3
    torch.testing.assert_close(model(ids).logits, model.architecture.output(sum(layers) / 3))
    for number, layer in enumerate(layers):
        model.scalar_mix.weights.fill_(-1e4)[number] = 1e4
        torch.testing.assert_close(model(ids).logits, model.architecture.output(layer))
    # Every architecture can read the mix instead of the last layer.
    mixing = model_of("cnn", options={"num_filters": 4}, mix_layers=True).eval()
    expected = mixing.architecture(sum(layers) / 3, torch.ones(3, 9).bool())
    torch.testing.assert_close(mixing(ids).logits, expected)
    assert model_of("cnn").scalar_mix is None


@each_case
def test_every_weight_has_a_gradient(name, task, options):
    model = model_of(name, task, options, classifier_dropout=0.0)
    ids = tokens(4)
    labels = torch.arange(4) % 3 if task == "texts" else ids % 3
    model(**texts(name, ids), labels=labels).loss.backward()
    without = {
        key
        for key, weight in model.named_parameters()
        if weight.grad is None or (not weight.grad.any() and "key.bias" not in key)
    }
    assert {key for key in without if "encoder.pooler" not in key} <= (
        # The gradient of keys' biases is zero: a softmax does not see them.
        {f"encoder.encoder.layer.{layer}.attention.self.key.bias" for layer in range(2)}
    )


def order_of_words(ids):
    """Whether the token 3 comes before the token 4."""
    return ((ids == 3).long().argmax(1) < (ids == 4).long().argmax(1)).long()


def train(module, make, *, steps, rate=0.02):
    """Train a head on fixed random vectors of tokens; return its share of right answers on rows that it has not seen."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12, WIDTH, generator=generator)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    module.train()
    for step in range(steps + 1):
        inputs, labels = make(generator, 64 if step < steps else 512)
        masked = [part for ids in inputs for part in (vectors[ids], torch.ones_like(ids).bool())]
        logits = module(*masked)
        if step < steps:
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        module.train(step < steps - 1)
    return (logits.argmax(1) == labels).float().mean().item()


def rows_with(generator, count, contents, *, length=8):
    """Rows of the tokens 6 to 11, with others at given columns."""
    ids = torch.randint(6, 12, (count, length), generator=generator)
    return ids.scatter(1, *contents)


def ordered_rows(generator, count):
    columns = torch.rand(count, 8, generator=generator).argsort(1)[:, :2]
    ids = rows_with(generator, count, (columns, torch.tensor([[3, 4]]).expand(count, 2)))
    return (ids,), order_of_words(ids)


def trigram_rows(generator, count):
    """The tokens 3, 4, 5 side by side in this order, or in another one."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    begin = torch.randint(0, 6, (count, 1), generator=generator)
    others = torch.tensor([[5, 4, 3], [4, 3, 5], [3, 5, 4]])[torch.randint(0, 3, (count,), generator=generator)]
    trigram = torch.where(labels[:, None] == 1, torch.tensor([[3, 4, 5]]), others)
    return (rows_with(generator, count, (begin + torch.arange(3), trigram)),), labels


def equal_rows(generator, count):
    """Two texts of the same tokens in another order, or of others."""
    labels = torch.randint(0, 2, (count,), generator=generator)
    first, other = (torch.randint(3, 12, (count, 5), generator=generator) for _ in range(2))
    return (first, torch.where(labels[:, None] == 1, first.flip(1), other)), labels


@pytest.mark.parametrize(
    ("name", "options", "make"),
    [
        ("bilstm", {"lstm_size": 12}, ordered_rows),
        ("cnn", {"widths": [3], "num_filters": 16}, trigram_rows),
        ("pair_encoder", {}, equal_rows),
        ("pair_encoder", {"cross_attention": True, "symmetric": True}, equal_rows),
    ],
)
def test_it_learns_what_a_linear_layer_on_the_mean_cannot(name, options, make):
    assert train(head(name, labels=2, dropout=0.0, **options), make, steps=150) > 0.9

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = head("mean", labels=2, dropout=0.0, width=WIDTH)

        def forward(self, states, mask, *others):
            joined = torch.cat([states, others[0]], dim=1) if others else states
            return self.mean(joined, torch.ones(joined.shape[:2]).bool())

    assert train(Mean(), make, steps=150) < 0.7


@pytest.mark.parametrize("task", ["classes", "value", "values", "several", "tokens"])
def test_losses_are_those_of_stock_heads(task):
    kind, labels, settings = {
        "classes": ("texts", torch.tensor([0, 2, 1]), {}),
        "value": ("texts", torch.tensor([0.5, 2.0, -1.0]), {"num_labels": 1}),
        "values": ("texts", torch.randn(3, 3), {"problem_type": "regression"}),
        "several": ("texts", torch.eye(3), {"problem_type": "multi_label_classification"}),
        "tokens": ("tokens", (tokens() % 3).index_fill(1, torch.tensor([0, 8]), -100), {}),
    }[task]
    model = model_of("mean" if kind == "texts" else "linear", kind, **settings).eval()
    outputs = model(tokens(), labels=labels)
    expected = {
        "classes": lambda logits: F.cross_entropy(logits, labels),
        "value": lambda logits: F.mse_loss(logits[:, 0], labels),
        "values": lambda logits: F.mse_loss(logits, labels),
        "several": lambda logits: F.binary_cross_entropy_with_logits(logits, labels),
        "tokens": lambda logits: F.cross_entropy(logits[:, 1:8].flatten(0, 1), labels[:, 1:8].flatten()),
    }[task]
    torch.testing.assert_close(outputs.loss, expected(outputs.logits))
    assert model(tokens(), labels=labels, return_dict=False)[0] == outputs.loss


@each_case
def test_a_step_in_bfloat16_with_checkpointing_waits_for_no_device(name, task, options):
    model = model_of(name, task, options, backbone=encoder().to(torch.bfloat16)).train()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    labels = {"labels": tokens() % 3 if task == "tokens" else torch.arange(3)}
    mask = torch.ones(3, 9).long().index_fill(1, torch.tensor([8]), 0)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_activation_checkpointing
    loss = model(**texts(name, tokens()), **labels, attention_mask=mask).loss
    loss.backward()
    assert loss.isfinite() and all(w.grad.isfinite().all() for w in model.architecture.parameters())
    # A wait raises there. An encoder's own mask looks at the padding, so that comes to the architecture alone.
    model.activation_checkpointing_disable()
    model.to("meta")
    model(**{key: value.to("meta") for key, value in (texts(name, tokens()) | labels).items()}).loss.backward()
    read = torch.empty(3, 9, 16, dtype=torch.bfloat16, device="meta"), mask.to("meta") != 0
    model.architecture(*read, *(read if model.architecture.reads_pairs else ())).sum().backward()


# Export.

ELSEWHERE = (
    WITHOUT_LIBRARY
    + """
import os, pathlib
os.environ["HF_MODULES_CACHE"] = {modules!r}
import torch, transformers
torch.set_grad_enabled(False)
root = pathlib.Path({root!r})
for folder in sorted(path for path in root.glob("model*") if path.is_dir()):
    kind = "AutoModelForTokenClassification" if folder.name.endswith("tokens") else "AutoModelForSequenceClassification"
    saved = torch.load(root / (folder.name + ".pt"))
    for place in (folder, root / "again" / folder.name):
        model, info = getattr(transformers, kind).from_pretrained(
            place, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        assert type(model).__module__.startswith("transformers_modules")
        # Weights are the same to the bit. Sums may differ: where weights begin in memory changes how they are added up.
        weights = model.state_dict()
        assert weights.keys() == saved["weights"].keys(), folder
        assert all(torch.equal(weights[key], each) for key, each in saved["weights"].items()), folder
        torch.testing.assert_close(model(**saved["inputs"]).logits, saved["logits"], atol=1e-5, rtol=0)
        if place == folder:
            model.save_pretrained(root / "again" / folder.name)
            model.encoder.save_pretrained(root / "encoder")
            encoder, info = transformers.AutoModel.from_pretrained(root / "encoder", output_loading_info=True)
            assert not any(info.values()), info
            ids = saved["inputs"]["input_ids"]
            torch.testing.assert_close(
                encoder(ids).last_hidden_state, model.encoder(ids).last_hidden_state, atol=1e-5, rtol=0)
print("all is well")
"""
)
FILES = {
    "architectures_task_heads.py",
    "configuration_task_heads.py",
    "modeling_task_heads.py",
    "scalar_mix.py",
}


def test_an_export_opens_where_this_library_is_not(tmp_path):
    for number, (name, task, options) in enumerate(CASES):
        model = model_of(name, task, options, mix_layers=number % 3 == 0).eval()
        folder = tmp_path / f"model-{number}-{task}"
        model.save_pretrained(folder)
        inputs = texts(name, tokens())
        with torch.no_grad():
            saved = {"inputs": inputs, "logits": model(**inputs).logits, "weights": model.state_dict()}
            torch.save(saved, folder.with_suffix(".pt"))
        assert {path.name for path in folder.glob("*.py")} == FILES
        assert set(json.loads((folder / "config.json").read_text())["auto_map"].values()) == {
            "configuration_task_heads.TaskHeadConfig",
            "modeling_task_heads.EncoderForSequenceClassification",
            "modeling_task_heads.EncoderForTokenClassification",
        }
    program = ELSEWHERE.format(root=str(tmp_path), modules=str(tmp_path / "modules"))
    assert run_fresh({"elsewhere": program}, tmp_path)["elsewhere"] == "all is well\n"
    # What was saved there opens here.
    again = next((tmp_path / "again").glob("*tokens"))
    assert type(AutoModelForTokenClassification.from_pretrained(again)) is EncoderForTokenClassification


def test_the_exported_code_needs_no_other_package(tmp_path):
    model_of().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        tree = ast.parse(path.read_text())
        # What is tried, and answered if it fails, is not needed to open an export.
        tried = {id(node) for each in ast.walk(tree) if isinstance(each, ast.Try) for node in ast.walk(each)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                names = [node.module] if node.level == 0 and id(node) not in tried else []
            known = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
            assert {name.partition(".")[0] for name in names} <= known


@pytest.mark.parametrize("backbone", [*ENCODERS, "headed"])
@torch.no_grad()
def test_it_opens_here_as_it_was_with_its_encoder_alone_stock(backbone, tmp_path):
    torch.manual_seed(0)
    headed = AutoModelForMaskedLM.from_config(ENCODERS["bert"]).eval()
    given = headed if backbone == "headed" else encoder(backbone)
    before = {name: weight.clone() for name, weight in given.base_model.state_dict().items()}
    model = model_of("attention_pooling", backbone=given)
    assert model.encoder is given.base_model and model.base_model is model.encoder and not model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.encoder.state_dict().items())
    model.save_pretrained(tmp_path)
    opened, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is EncoderForSequenceClassification and not any(info.values())
    assert torch.equal(opened(tokens()).logits, model(tokens()).logits)
    assert opened.encoder.config is opened.config.encoder
    model.encoder.save_pretrained(tmp_path / "encoder")
    assert not list((tmp_path / "encoder").glob("*.py"))
    alone = AutoModel.from_pretrained(tmp_path / "encoder")
    ids = tokens()
    assert type(alone) is type(given.base_model)
    assert torch.equal(alone(ids).last_hidden_state, model.encoder(ids).last_hidden_state)
    # And a new architecture goes on it, by the folder's name.
    assert EncoderForTokenClassification.from_encoder(str(tmp_path / "encoder"), architecture="bilstm").num_labels == 2


def test_attention_is_that_of_the_encoder_and_can_be_chosen(tmp_path):
    eager = encoder(attn_implementation="eager")
    model = model_of(backbone=eager)
    assert eager.config._attn_implementation == "eager"
    assert len(model(tokens(), output_attentions=True).attentions) == 2
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 3
    model.save_pretrained(tmp_path)
    for wanted in ("eager", "sdpa"):
        opened = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=wanted)
        assert opened.encoder.config._attn_implementation == wanted


def test_a_frozen_encoder_has_no_gradient_and_no_dropout(tmp_path):
    model = model_of("bilstm", options={"lstm_size": 4}, frozen=True, classifier_dropout=0.0).train()
    assert not model.encoder.training and model.architecture.training
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    model(tokens(), labels=torch.arange(3)).loss.backward()
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None} == {
        "architecture"
    }
    model.save_pretrained(tmp_path)
    opened = EncoderForSequenceClassification.from_pretrained(tmp_path)
    assert not any(weight.requires_grad for weight in opened.encoder.parameters())
    tuned = model_of(classifier_dropout=0.0).train()
    assert tuned.encoder.training and not torch.equal(tuned(tokens()).logits, tuned(tokens()).logits)


def test_the_vocabulary_can_grow(tmp_path):
    model = model_of()
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert opened.config.vocab_size == opened.get_input_embeddings().num_embeddings == 50


# The register, and what is refused.


def test_an_architecture_of_ones_own_is_known_by_its_name(tmp_path):
    @register_architecture("tests/first_two")
    class FirstTwo(Architecture):
        def __init__(self, hidden_size, num_labels, *, scale=1.0, **common):
            super().__init__(hidden_size, num_labels, **common)
            self.scale = scale
            self.output = nn.Linear(2 * hidden_size, num_labels)

        def forward(self, states, mask):
            return self.scale * self.output(states[:, :2].flatten(1))

    model = model_of("tests/first_two", options={"scale": 2.0}).eval()
    model.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(opened.architecture) is FirstTwo and opened.architecture.scale == 2.0
    assert torch.equal(opened(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="FirstTwo has this name"):
        register_architecture("tests/first_two")(type("Other", (Architecture,), {}))
    with pytest.raises(ValueError, match="subclass of Architecture"):
        register_architecture("other")(nn.Linear)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("texts", {"architecture": "bilstmm"}, "architecture='bilstmm' is unknown: choose one of attention_pooling"),
        ("tokens", {"architecture": "mean"}, "has no logits of tokens: choose one of bilstm, cnn, linear, scalar_mix"),
        ("texts", {"architecture_options": {"widths": [3]}}, "has widths: 'mean' takes no options"),
        ("texts", {"architecture": "cnn", "architecture_options": {"width": 3}}, "takes widths, num_filters"),
        ("texts", {"architecture": "cnn", "architecture_options": {"widths": []}}, "at least one width"),
        ("texts", {"architecture": "bilstm", "architecture_options": {"pooling": "sum"}}, "pooling='sum': choose one"),
        ("texts", {"mixed_layers": True}, "mixed_layers: TaskHeadConfig has no such option"),
        ("texts", {"classifier_dropout": 1.0}, "classifier_dropout=1.0"),
    ],
)
def test_what_cannot_work_is_refused_by_name(task, settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        CLASSES[task].from_encoder(encoder(), **settings)


def test_encoders_that_an_export_could_not_open_are_refused():
    small = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 8, "num_layers": 1, "vocab_size": 40}
    with pytest.raises(ValueError, match="has a decoder"):
        EncoderForSequenceClassification.from_encoder(AutoModel.from_config(T5Config(**small)))
    elmo = ElmoConfig(vocab_size=9, hidden_size=8, cell_size=8, num_hidden_layers=1, filters=[[1, 4]])
    with pytest.raises(ValueError, match="ElmoModel is no class of transformers"):
        EncoderForSequenceClassification.from_encoder(AutoModel.from_config(elmo))
    bare = BertModel(ENCODERS["bert"], add_pooling_layer=False)
    assert not EncoderForSequenceClassification.from_encoder(bare).config.add_pooling_layer
    assert TaskHeadConfig().encoder.model_type == "bert"


def test_a_second_text_goes_to_those_alone_that_read_two():
    ids = tokens()
    with pytest.raises(ValueError, match="pair_input_ids is missing"):
        model_of("pair_encoder")(ids)
    with pytest.raises(ValueError, match="reads one text.*choose one of pair_encoder"):
        model_of()(ids, pair_input_ids=ids)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model_of()()
    with pytest.raises(ValueError, match=r"\(3, 1, 9, 9\): give \[B, L\]"):
        model_of()(ids, attention_mask=torch.ones(3, 1, 9, 9))
    embedded = model_of().eval()
    found = embedded(inputs_embeds=embedded.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(found, embedded(ids).logits)
