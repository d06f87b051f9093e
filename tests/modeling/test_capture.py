"""What is captured of a stock encoder is what it computes."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    DebertaConfig,
    DebertaModel,
    EuroBertConfig,
    EuroBertModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.observing.capture import (
    capture_attention,
    capture_hidden_states,
    check_capture,
    run_to_layer,
)
from hf_pretrain.objectives.distillation.losses import attention_loss

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "type_vocab_size": 0,
}
OPTIONS = {
    "bert": {"intermediate_size": 48},
    "roberta": {"intermediate_size": 48},
    "electra": {"intermediate_size": 48, "embedding_size": 16},
    "albert": {"intermediate_size": 48, "embedding_size": 16},
    "modernbert": {"intermediate_size": 48, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    "distilbert": {"hidden_dim": 48},
    "deberta-v2": {"intermediate_size": 48, **DISENTANGLED},
}
ARCHITECTURES = sorted(OPTIONS)


def tiny_config(model_type, **changes):
    return AutoConfig.for_model(model_type, **{**SIZES, **OPTIONS[model_type], **changes})


def tiny_encoder(model_type, *, seed=0, auto_class=AutoModel, **changes):
    """An encoder in evaluation mode; its weights are large enough that scores differ from one another."""
    torch.manual_seed(seed)
    model = auto_class.from_config(tiny_config(model_type, initializer_range=0.3, **changes))
    return model.eval()


def padded_batch(lengths=(9, 5, 12), *, seed=0, width=None, pad_id=0):
    """Token ids and the mask of rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 60, mask.shape, generator=generator)
    return {"input_ids": ids.where(mask, pad_id), "attention_mask": mask.long()}


LAYERS = (1, 2, 3, 4)
NO_DROPOUT = dict.fromkeys(ARCHITECTURES, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}) | {
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {},
}


@contextmanager
def inputs_of_softmax():
    """The scores of eager attention, where it hands them to its softmax."""
    seen, softmax = [], F.softmax

    def spy(scores, *args, **kwargs):
        if scores.dim() == 4:
            seen.append(scores)
        return softmax(scores, *args, **kwargs)

    F.softmax = spy
    try:
        yield seen
    finally:
        F.softmax = softmax


def eager_scores(model, batch):
    model = copy.deepcopy(model)
    if model.config.model_type != "deberta-v2":
        model.set_attn_implementation("eager")
    with inputs_of_softmax() as scores:
        model(**batch)
    return dict(enumerate(scores, start=1))


def captured(model, batch, layers=LAYERS):
    with capture_attention(model, layers) as records:
        model(**batch)
    return records


def pairs_of(scores, batch):
    """Which pairs are real and not masked away by the model."""
    real = batch["attention_mask"].bool()
    return real[:, None, :, None] & real[:, None, None, :] & (scores > -1e9)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestScores:
    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_are_those_of_eager_attention(self, model_type):
        model, batch = tiny_encoder(model_type), padded_batch()
        expected, records = eager_scores(model, batch), captured(model, batch)
        assert sorted(records) == sorted(expected)
        for layer, record in records.items():
            pairs = pairs_of(expected[layer], batch)
            assert expected[layer][pairs].std() > 0.1
            torch.testing.assert_close(record.scores()[pairs], expected[layer][pairs], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_give_the_loss_of_eager_attention(self, model_type):
        student, teacher = tiny_encoder(model_type, seed=1, hidden_size=16), tiny_encoder(model_type)
        batch = padded_batch()
        of_student, of_teacher = eager_scores(student, batch), eager_scores(teacher, batch)
        records, teacher_records = captured(student, batch), captured(teacher, batch)
        for layer in LAYERS:
            loss = attention_loss(records[layer], teacher_records[layer], batch["attention_mask"])
            pairs = pairs_of(of_student[layer], batch)
            expected = ((of_student[layer] - of_teacher[layer]) * pairs).square().sum(dim=(1, 2, 3))
            torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=1e-5 * expected.max().item())
            torch.testing.assert_close(loss.count, pairs.expand_as(of_student[layer]).sum(dim=(1, 2, 3)).float())

    def test_local_layers_say_how_far_they_see(self):
        model, batch = tiny_encoder("modernbert"), padded_batch((12, 12))
        expected, records = eager_scores(model, batch), captured(model, batch)
        assert [records[layer].window for layer in LAYERS] == [None, 3, None, 3]
        places = torch.arange(12)
        sees = (places[:, None] - places).abs() <= 3
        assert torch.equal(expected[2][0, 0] > -1e9, sees)

    def test_of_grouped_heads_are_those_of_every_head(self):
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
        config = EuroBertConfig(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"), 0),
        )
        model, batch = EuroBertModel(config).eval(), padded_batch()
        expected, records = eager_scores(model, batch), captured(model, batch, (1, 2))
        for layer, record in records.items():
            assert record.value.shape == record.query.shape
            pairs = pairs_of(expected[layer], batch)
            torch.testing.assert_close(record.scores()[pairs], expected[layer][pairs], rtol=1e-4, atol=1e-4)


class TestCapture:
    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_changes_nothing_and_leaves_nothing(self, model_type):
        model, batch = tiny_encoder(model_type).train(), padded_batch()
        before = [(name, len(module._forward_hooks), sorted(vars(module))) for name, module in model.named_modules()]
        torch.manual_seed(3)
        expected = model(**batch)[0]
        torch.manual_seed(3)
        with capture_attention(model, LAYERS), capture_hidden_states(model, (0, 4)):
            states = model(**batch)[0]
        assert torch.equal(states, expected)
        after = [(name, len(module._forward_hooks), sorted(vars(module))) for name, module in model.named_modules()]
        assert after == before
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def test_leaves_the_model_on_fast_attention(self, monkeypatch):
        model, batch = tiny_encoder("bert"), padded_batch()
        calls, attention = [], F.scaled_dot_product_attention
        monkeypatch.setattr(
            F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs)
        )
        captured(model, batch)
        assert len(calls) == 4

    def test_keeps_the_layers_asked_for_of_the_last_forward(self):
        model = tiny_encoder("bert")
        with capture_attention(model, [2, 4]) as records:
            model(**padded_batch((3, 4)))
            model(**padded_batch((7, 6, 5)))
        assert sorted(records) == [2, 4]
        assert records[2].query.shape == (3, 4, 7, 8)

    @pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
    def test_two_models_at_once(self, model_type):
        first, second = tiny_encoder(model_type), tiny_encoder(model_type, seed=1)
        batch, other = padded_batch(), padded_batch(seed=1)
        alone = captured(first, batch), captured(second, other)
        with capture_attention(first, LAYERS) as one, capture_attention(second, LAYERS) as two:
            second(**other)
            first(**batch)
        for together, expected in zip((one, two), alone, strict=True):
            for layer in LAYERS:
                assert torch.equal(together[layer].scores(), expected[layer].scores())

    @pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
    def test_a_copy_is_another_model(self, model_type):
        model, batch, other = tiny_encoder(model_type), padded_batch(), padded_batch(seed=1)
        expected = captured(model, batch)
        with capture_attention(model, LAYERS) as records, capture_hidden_states(model, [2]) as hidden:
            model(**batch)
            twin = copy.deepcopy(model)
            state = hidden[2].clone()
            twin(**other)
        assert torch.equal(hidden[2], state)
        assert all(torch.equal(records[layer].scores(), expected[layer].scores()) for layer in LAYERS)
        assert torch.equal(captured(twin, batch)[4].scores(), expected[4].scores())

    @pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES} - {"albert"}))  # which cannot be checkpointed
    def test_under_gradient_checkpointing(self, model_type):
        batch, grads = padded_batch(), []
        with torch.no_grad():
            target = captured(tiny_encoder(model_type, seed=1), batch)
        for checkpointed in (False, True):
            model = tiny_encoder(model_type, **NO_DROPOUT[model_type]).train()
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": False})
            # The backward pass inside of the block runs the layers again.
            with capture_attention(model, (2, 4)) as records, capture_hidden_states(model, (0, 3)) as hidden:
                model(**batch)
                first = dict(records)
                loss = sum(attention_loss(records[n], target[n], batch["attention_mask"]).sum.sum() for n in (2, 4))
                (loss + hidden[3].square().sum()).backward()
            assert all(records[layer] is first[layer] for layer in first)
            grads.append(gradients(model))
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5) for name in grads[0])
        assert any("query" in name or "q_lin" in name or "Wqkv" in name for name in grads[0])

    def test_in_bfloat16_leaves_records_to_be_compared_in_full_precision(self):
        model, batch = tiny_encoder("bert"), padded_batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            records = captured(model, batch)
            assert records[1].query.dtype == torch.bfloat16
            assert records[1].scores().dtype == torch.float32
            scores = records[1].query.float() @ records[1].key.float().mT * records[1].scaling
        torch.testing.assert_close(records[1].scores(), records[1].query.float() @ records[1].key.float().mT * 8**-0.5)
        assert scores.dtype == torch.bfloat16

    @pytest.mark.slow
    def test_of_a_compiled_model(self):
        model, batches = tiny_encoder("bert"), [padded_batch(seed=seed) for seed in (0, 1)]
        expected = [captured(model, batch) for batch in batches]
        model.compile(backend="eager")
        with torch.no_grad():
            for batch, records in zip(batches, expected, strict=True):
                assert torch.allclose(captured(model, batch)[4].scores(), records[4].scores(), atol=1e-5)

    def test_concatenated_heads_are_the_projection(self):
        model, batch = tiny_encoder("bert"), padded_batch()
        with capture_attention(model, [1]) as records, capture_hidden_states(model, [0]) as hidden:
            model(**batch)
        attention = model.encoder.layer[0].attention.self
        for name in ("query", "key", "value"):
            torch.testing.assert_close(records[1].concatenated(name), getattr(attention, name)(hidden[0]))


class TestHiddenStates:
    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_are_those_that_the_model_returns(self, model_type):
        model, batch = tiny_encoder(model_type), padded_batch()
        with capture_hidden_states(model, range(5)) as hidden:
            expected = model(**batch, output_hidden_states=True).hidden_states
        assert [torch.equal(hidden[layer], expected[layer]) for layer in range(5)] == [True] * 5

    @pytest.mark.parametrize("model_type", ["bert", "modernbert", "deberta-v2"])
    def test_beside_a_gathered_head(self, model_type):
        model, batch = tiny_encoder(model_type, auto_class=AutoModelForMaskedLM), padded_batch()
        expected = model(**batch, output_hidden_states=True)
        head, positions = GatheredHead(model), torch.tensor([1, 13, 30])
        with capture_hidden_states(model, [0, 4]) as hidden, capture_attention(model, [4]) as records:
            logits = head(model, positions, **batch)
        torch.testing.assert_close(logits, expected.logits.flatten(0, 1)[positions])
        assert torch.equal(hidden[4], expected.hidden_states[4])
        assert records[4].query.shape[2] == hidden[0].shape[1] == 12

    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_of_a_run_that_ends_early(self, model_type):
        model, batch = tiny_encoder(model_type), padded_batch()
        expected, records = model(**batch, output_hidden_states=True).hidden_states, captured(model, batch)
        for depth in range(5):
            attention = range(1, depth + 1)
            with capture_hidden_states(model, range(depth + 1)) as hidden, capture_attention(model, attention) as seen:
                run_to_layer(model, depth, **batch)
            assert sorted(hidden) == list(range(depth + 1))
            assert all(torch.equal(hidden[layer], expected[layer]) for layer in hidden)
            assert all(torch.equal(seen[layer].scores(), records[layer].scores()) for layer in seen)

    def test_no_layer_runs_behind_the_last(self):
        model = tiny_encoder("bert", auto_class=AutoModelForMaskedLM)
        ran = []
        for number, layer in enumerate(model.bert.encoder.layer, start=1):
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        model.cls.register_forward_hook(lambda *_: ran.append("head"))
        run_to_layer(model, 2, **padded_batch())
        assert ran == [1, 2]
        model(**padded_batch())
        assert ran == [1, 2, 1, 2, 3, 4, "head"]


class TestRefusals:
    def test_no_forward(self):
        with pytest.raises(InputError, match=r"nothing was captured of the layers 1, 3 of BertModel"):
            with capture_attention(tiny_encoder("bert"), [1, 3]):
                pass

    @pytest.mark.parametrize("capture", [capture_attention, capture_hidden_states])
    def test_a_layer_that_there_is_not(self, capture):
        model = tiny_encoder("bert")
        with pytest.raises(InputError, match="layers 5 of BertModel, which has 4"):
            with capture(model, [4, 5]):
                model(**padded_batch())

    def test_an_error_in_the_block_is_not_hidden(self):
        with pytest.raises(KeyError), capture_attention(tiny_encoder("bert"), [1]):
            raise KeyError

    def test_eager_attention(self):
        model = tiny_encoder("bert")
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match="attn_implementation='eager' cannot be captured.*'sdpa'"):
            check_capture(model)

    def test_an_architecture_with_attention_of_its_own(self):
        config = DebertaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pos_att_type=[]
        )
        with pytest.raises(InputError, match="the attention of DebertaModel"):
            check_capture(DebertaModel(config))

    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_others_pass(self, model_type, dtype):
        model = tiny_encoder(model_type, seed=2).to(dtype).train()
        backend = model.config._attn_implementation
        check_capture(model)
        assert model.config._attn_implementation == backend
        assert all(module.training for module in model.modules())

    def test_attention_that_is_not_the_softmax_of_its_scores(self):
        def sharpened(module, query, key, value, attention_mask, **kwargs):
            return sdpa_attention_forward(module, 2 * query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("sharpened", sharpened)
        try:
            model = tiny_encoder("bert")
            model.set_attn_implementation("sharpened")
            with pytest.raises(InputError, match="not the softmax"):
                check_capture(model)
        finally:
            AttentionInterface._global_mapping.pop("sharpened")

    def test_checkpointing_that_hides_the_graph(self):
        model = tiny_encoder("bert").train()
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(InputError, match="use_reentrant"), capture_attention(model, [1]):
            model(**padded_batch())
        with torch.no_grad():
            assert captured(model, padded_batch())
