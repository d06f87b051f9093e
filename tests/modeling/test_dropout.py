"""Dropout and attention with dropout on a CPU against their definitions, and where torch's own stay."""

import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from helpers.method_matrix import build, programs
from helpers.strategy_runs import classifier, fine_tuner
from hf_pretrain.modeling import kernels
from hf_pretrain.modeling.kernels import fast_dropout
from hf_pretrain.modeling.observing.profile import peak_of_tensors
from hf_pretrain.transfer.recomputing import recomputed

CPU = torch.device("cpu")
SHAPE = (5, 3, 40, 8)  # examples, heads, positions, numbers of a head


@pytest.fixture
def drawn(monkeypatch):
    """The entries that were kept, in the order in which they were drawn."""
    found, draw = [], kernels._draw_kept
    monkeypatch.setattr(kernels, "_draw_kept", lambda *args: found.append(draw(*args)) or found[-1])
    return found


def inputs(shape=SHAPE, keys=None, dtype=torch.float32, size=None, seed=0):
    """Queries, keys and values as the layers of a model hand them over: the heads of a position lie together."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, queries, width = shape
    sizes = [(queries, width), (keys or queries, width), (keys or queries, size or width)]
    made = [torch.randn(batch, n, heads, d, generator=generator, dtype=torch.float64) for n, d in sizes]
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in made]


def defined(query, key, value, kept, p, bias=None, scale=None):
    """Attention with dropout as it is defined, in fp64, with given entries kept."""
    query, key, value = (each.double() for each in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    # A query that sees nothing gets nothing.
    weights = torch.softmax(scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0), -1)
    weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return (weights * kept.view(weights.shape).double() / (1 - p)) @ value


def hidden(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


def masks():
    generator = torch.Generator().manual_seed(3)
    keys = torch.rand(5, 1, 1, 40, generator=generator) < 0.7
    pairs = torch.rand(5, 1, 40, 40, generator=generator) < 0.7
    pairs[2, :, 7] = False  # a query that sees nothing
    each_head = torch.randn(5, 3, 40, 40, generator=generator)
    return {
        "none": (None, None),
        "keys": (keys, hidden(keys)),
        "pairs": (pairs, hidden(pairs)),
        "of all": (pairs[0, 0], hidden(pairs[0, 0])),
        "added": (each_head, each_head),
        "added to all heads": (each_head[:, :1], each_head[:, :1]),
        "added to queries": (each_head[:1, :1, :, :1], each_head[:1, :1, :, :1]),
    }


class TestDraws:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.003])
    def test_the_share_that_is_dropped(self, p):
        size = 1 << 20
        with fast_dropout(CPU):
            found = F.dropout(torch.ones(size), p)
        dropped = int((found == 0).sum())
        assert abs(dropped - p * size) < 5 * math.sqrt(p * (1 - p) * size)
        assert torch.allclose(found[found != 0], torch.tensor(1 / (1 - p)), rtol=2e-5 / (1 - p))

    def test_entries_are_dropped_one_by_one(self):
        """Neither neighbours, nor entries of one draw of 64 bits, nor two calls have to do with one another."""
        with fast_dropout(CPU):
            first, second = (F.dropout(torch.ones(1 << 20), 0.5) == 0 for _ in range(2))
        pairs = [(first[lag:], first[: len(first) - lag]) for lag in (1, 2, 3, 4, 8, 40)]
        lanes = first.view(-1, 4)
        pairs += [(lanes[:, i], lanes[:, j]) for i in range(4) for j in range(i)] + [(first, second)]
        for one, other in pairs:
            both = int((one & other).sum())
            assert abs(both - len(one) / 4) < 5 * math.sqrt(3 / 16 * len(one))
        for lane in lanes.unbind(1):
            assert abs(int(lane.sum()) - len(lane) / 2) < 5 * math.sqrt(len(lane) / 4)

    def test_they_follow_from_the_generator_of_torch(self):
        def draw():
            with fast_dropout(CPU):
                return F.dropout(torch.ones(10_000), 0.3)

        torch.manual_seed(4)
        first, state = draw(), torch.get_rng_state()
        second = draw()
        torch.set_rng_state(state)
        assert torch.equal(draw(), second) and not torch.equal(first, second)
        torch.manual_seed(4)
        assert torch.equal(draw(), first)

    @pytest.mark.parametrize("size", [1 << 13, (1 << 13) + 1, (1 << 13) + 3])
    def test_any_number_of_entries(self, size):
        with fast_dropout(CPU):
            assert F.dropout(torch.ones(size), 0.5).shape == (size,)


class TestDropout:
    def test_a_bit_is_kept_for_each_entry(self):
        x = torch.randn(1 << 20, requires_grad=True)

        def kept(call):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
                call()
            return sum(sizes)

        with fast_dropout(CPU):
            assert kept(lambda: F.dropout(x, 0.1)) == x.numel() / 8
        assert kept(lambda: F.dropout(x, 0.1)) >= x.numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_it_is_the_product_with_what_is_kept(self, dtype, drawn):
        x = torch.randn(40, 300, dtype=dtype, requires_grad=True)
        weight = torch.randn(40, 300, dtype=dtype)
        with fast_dropout(CPU):
            found = torch.nn.Dropout(0.25)(x)
            (found * weight).sum().backward()
        (kept,) = drawn
        assert found.dtype == dtype and x.grad.dtype == dtype
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
        torch.testing.assert_close(found.double(), x.double() * kept / 0.75, **tolerance)
        torch.testing.assert_close(x.grad.double(), weight.double() * kept / 0.75, **tolerance)

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: F.dropout(x, 0.1, training=False),
            lambda x: F.dropout(x, 0.0),
            lambda x: F.dropout(x, 1.0),
            lambda x: F.dropout(x, 1e-7),
            lambda x: F.dropout(x.clone(), 0.1, inplace=True),
            lambda x: F.dropout(x[:10], 0.1),
            lambda x: F.dropout(x.to("meta"), 0.1),
            lambda x: F.alpha_dropout(x, 0.1),
        ],
    )
    def test_what_is_left_to_torch(self, call, drawn):
        x, states = torch.randn(100, 100), []
        with fast_dropout(CPU):
            torch.manual_seed(0)
            found = call(x)
            states.append(torch.get_rng_state())
        torch.manual_seed(0)
        expected = call(x)
        assert found.device == expected.device and (found.is_meta or torch.equal(found, expected))
        assert torch.equal(states[0], torch.get_rng_state()) and drawn == []

    @pytest.mark.parametrize(("device", "is_compiled"), [("cuda", False), ("meta", False), ("cpu", True)])
    def test_elsewhere_nothing_changes(self, device, is_compiled, drawn):
        with fast_dropout(torch.device(device), is_compiled=is_compiled):
            F.dropout(torch.randn(100, 100), 0.1)
        F.dropout(torch.randn(100, 100), 0.1)
        assert drawn == []

    def test_it_ends_with_the_block(self, drawn):
        with pytest.raises(RuntimeError), fast_dropout(CPU):
            raise RuntimeError
        F.dropout(torch.randn(100, 100), 0.1)
        assert drawn == []


class TestAttention:
    @pytest.mark.parametrize("name", masks())
    @pytest.mark.parametrize("examples", [1, 2, 5])
    def test_it_is_as_defined(self, name, examples, drawn, monkeypatch):
        """Values and gradients, in blocks of one head, of some and of all."""
        monkeypatch.setattr(kernels, "_BLOCK_BYTES", examples * 3 * 40 * 40 * 4 - 1)
        mask, bias = masks()[name]
        query, key, value = inputs()
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        with fast_dropout(CPU):
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.25)
            gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
        (kept,) = drawn
        expected = defined(query, key, value, kept, 0.25, bias)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
        wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=5e-6)
        if name == "pairs":
            assert not found[2, :, 7].any() and not gradients[0][2, :, 7].any()

    @pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.5}, {"is_causal": True, "scale": 2.0}])
    @pytest.mark.parametrize("keys", [40, 33, 50])
    def test_options(self, options, keys, drawn):
        query, key, value = inputs(keys=keys, size=5)
        with fast_dropout(CPU):
            found = F.scaled_dot_product_attention(query, key, value, dropout_p=0.25, **options)
        bias = hidden(torch.ones(40, keys, dtype=torch.bool).tril()) if options.get("is_causal") else None
        expected = defined(query, key, value, drawn[0], 0.25, bias, options.get("scale"))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)

    def test_its_mean_is_attention_without_dropout(self):
        query, key, value = inputs()
        plain = F.scaled_dot_product_attention(query, key, value)
        with fast_dropout(CPU), torch.no_grad():
            draws = [F.scaled_dot_product_attention(query, key, value, dropout_p=0.1) for _ in range(400)]
        spread = torch.stack(draws).std(0) / math.sqrt(400)
        assert ((torch.stack(draws).mean(0) - plain).abs() < 5 * spread).all()

    @pytest.mark.parametrize("is_autocast", [True, False])
    def test_in_bf16_it_is_as_near_as_the_eager_attention(self, is_autocast, drawn):
        query, key, value = inputs(dtype=torch.float32 if is_autocast else torch.bfloat16)
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()

        def eager(query, key, value):
            scores = query @ key.transpose(-1, -2) * SHAPE[-1] ** -0.5
            weights = torch.softmax(scores, -1, dtype=torch.float32).bfloat16()
            return (weights * drawn[0].view(scores.shape) / 0.75) @ value

        with fast_dropout(CPU), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            found = F.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
            gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
        low = [each.detach().bfloat16().requires_grad_() for each in (query, key, value)]
        exact = defined(*low, drawn[0], 0.25)
        of_eager = torch.autograd.grad((eager(*low) * weight).sum(), low)
        of_exact = torch.autograd.grad((exact * weight.double()).sum(), low)
        assert found.dtype == torch.bfloat16
        pairs = [
            (found, eager(*low), exact),
            *zip(gradients, of_eager, of_exact, strict=True),
        ]
        for one, other, right in [[each.detach() for each in three] for three in pairs]:
            errors = [float((each.double() - right).norm() / right.norm()) for each in (one, other)]
            assert errors[0] < 1.5 * errors[1] + 1e-3, errors

    def test_a_checkpoint_drops_the_same_again(self):
        query, key, value = inputs()

        def gradients(attend):
            torch.manual_seed(2)
            with fast_dropout(CPU):
                return torch.autograd.grad(attend().square().sum(), (query, key, value))

        def attend():
            return F.dropout(F.scaled_dot_product_attention(query, key, value, dropout_p=0.3), 0.3)

        once, again = gradients(attend), gradients(lambda: checkpoint(attend, use_reentrant=False))
        assert all(map(torch.equal, once, again))

    def test_what_adapters_compute_twice_is_this_too(self, drawn):
        query, key, value = inputs()

        def gradients(context):
            torch.manual_seed(2)
            with fast_dropout(CPU):
                with context:
                    result = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3).square().sum()
                return torch.autograd.grad(result, (query, key, value))

        once, again = gradients(nullcontext()), gradients(recomputed())
        assert len(drawn) == 1 + 2 and all(map(torch.equal, once, again))

    @pytest.mark.parametrize(
        "options",
        [
            {"dropout_p": 0.0},
            {"attn_mask": torch.zeros(40, 40, requires_grad=True)},
            {"enable_gqa": True},
        ],
    )
    def test_what_is_left_to_torch(self, options, drawn):
        query, key, value = inputs()
        with fast_dropout(CPU):
            F.scaled_dot_product_attention(query, key, value, **({"dropout_p": 0.1} | options))
            F.scaled_dot_product_attention(query[0], key[0], value[0], dropout_p=0.1)
            F.scaled_dot_product_attention(query[:1, :1], key[:1, :1], value[:1, :1], dropout_p=0.1)
        assert drawn == []

    def test_a_mask_beside_a_causal_one_is_refused_as_by_torch(self):
        query, key, value = inputs()
        mask = torch.ones(40, 40, dtype=torch.bool)
        with fast_dropout(CPU), pytest.raises(RuntimeError, match="is_causal"):
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.1, is_causal=True)

    def test_a_bit_is_kept_for_each_pair_of_positions(self):
        """Beside queries, keys and values; torch's own keeps three numbers."""
        query, key, value = inputs((8, 4, 256, 8))
        pairs = 8 * 4 * 256 * 256

        def attend():
            return [F.scaled_dot_product_attention(query, key, value, dropout_p=0.1) for _ in range(8)]

        with fast_dropout(CPU):
            held = peak_of_tensors(attend)
        others = 4 * query.numel() * 4 * 8
        # The last one has a byte each, and room for its blocks.
        assert held < others + 8 * pairs / 8 + 3 * pairs, held
        assert peak_of_tensors(attend) > 8 * 3 * 4 * pairs


class TestCasts:
    """Layers that read the same states under autocast."""

    def step(self, read, context):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 8) for _ in range(3)]
        x = torch.randn(40, 16, requires_grad=True)
        kept = {}
        with (
            context,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
            ),
        ):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = read(layers, x * 1)
            weights = torch.randn(len(outputs), *outputs[0].shape)
            sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
        gradients = [x.grad, *(p.grad for layer in layers for p in layer.parameters())]
        copies = [t for t in kept.values() if t.dtype == torch.bfloat16 and t.shape == (40, 16)]
        return outputs, gradients, len(copies)

    @pytest.mark.parametrize(
        ("read", "copies"),
        [
            (lambda layers, x: [layer(x) for layer in layers], 1),
            (lambda layers, x: [layer(x + number) for number, layer in enumerate(layers)], 3),
            (lambda layers, x: [layers[0](x), layers[1](x.add_(1)), layers[2](x)], 2),
        ],
    )
    def test_numbers_are_the_same_and_copies_are_one(self, read, copies):
        outputs, gradients, found = self.step(read, fast_dropout(CPU))
        others, wanted, _ = self.step(read, nullcontext())
        assert all(map(torch.equal, outputs, others)) and all(map(torch.equal, gradients, wanted))
        assert found == copies

    def test_states_are_not_kept_alive(self):
        layer, x = torch.nn.Linear(16, 8), torch.randn(40, 16, requires_grad=True)
        with fast_dropout(CPU), torch.autocast("cpu", dtype=torch.bfloat16):
            states = x * 1
            layer(states)
            left = weakref.ref(states)
            del states
        assert left() is None

    @pytest.mark.parametrize("how", ["no autocast", "no gradients", "half already", "no gradient wanted"])
    def test_what_is_left_to_torch(self, how, monkeypatch):
        monkeypatch.setattr(kernels._SharedCast, "apply", lambda *args: pytest.fail("ours"))
        x = torch.randn(40, 16, requires_grad=how != "no gradient wanted") * 1
        with (
            fast_dropout(CPU),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=how != "no autocast"),
            torch.set_grad_enabled(how != "no gradients"),
        ):
            torch.nn.Linear(16, 8)(x.bfloat16() if how == "half already" else x)


class TestTraining:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(kernels, "_LEAST_ENTRIES", 0)

    @pytest.mark.parametrize("method", ["mlm", "rtd", "clm"])
    def test_a_step_has_it_and_an_evaluation_has_no_dropout(self, tmp_path, drawn, method):
        own = F.dropout, F.scaled_dot_product_attention
        trainer = build(programs()[method], tmp_path / "run", max_steps=1, model_options={"config_overrides": None})
        trainer.train()
        # Of hidden states, and of the pairs of positions of attention.
        assert {kept.dim() for kept in drawn} == {3} and {kept.shape[1] == kept.shape[2] for kept in drawn} == {
            True,
            False,
        }
        assert own == (F.dropout, F.scaled_dot_product_attention)
        drawn.clear()
        trainer.evaluate()
        assert drawn == []

    def test_recomputed_activations_give_the_same_gradients(self, tmp_path, drawn):
        def gradients(name, **options):
            trainer = build(
                programs()["mlm"], tmp_path / name, max_steps=1, model_options={"config_overrides": None}, **options
            )
            trainer.train()
            return trainer.recorder.gradients[0], len(drawn)

        kept, draws = gradients("kept")
        again, twice = gradients("again", activation_checkpointing=True)
        assert twice - draws > draws and kept.keys() == again.keys()
        assert all(torch.equal(kept[name], again[name]) for name in kept)

    def test_fine_tuning_has_it(self, tmp_path, drawn):
        trainer = fine_tuner(tmp_path, classifier(hidden_dropout_prob=0.1), max_steps=1)
        trainer.train()
        assert drawn
