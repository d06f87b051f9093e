"""AdamW with clipped updates and Muon against their formulas, which parameter goes where, and warm-up, stable rate and decay."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from helpers.method_matrix import build, log_of, programs
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import HiddenMatrix, hidden_matrices
from hf_pretrain.optimizers import Muon, StableAdamW, optimizer_of, schedule_of
from hf_pretrain.optimizers.muon import orthogonalised
from hf_pretrain.training.arguments import PretrainingArguments, check_training_options
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer

MLM, RTD = programs()["mlm"], programs()["rtd"]
WIDTH = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
}


def arguments(tmp_path, **options):
    return PretrainingArguments(**{"output_dir": str(tmp_path), "bf16": False, "report_to": []} | options)


def resumed_in_the_middle(make, shapes, folder):
    """Ten steps at once, and with a round trip of the state after five; a parameter has a gradient in every other step."""

    def steps(weights, optimizer, numbers):
        for number in numbers:
            for weight in weights[: len(weights) - number % 2]:
                weight.grad = torch.sin(torch.arange(weight.numel()) * 1.7 + number).reshape(weight.shape)
            optimizer.step()
            optimizer.zero_grad()

    straight = [nn.Parameter(torch.linspace(-1, 2, int(np.prod(shape))).reshape(shape)) for shape in shapes]
    optimizer = make(straight)
    steps(straight, optimizer, range(5))
    torch.save(optimizer.state_dict(), folder / "state.pt")
    resumed = [nn.Parameter(weight.detach().clone()) for weight in straight]
    steps(straight, optimizer, range(5, 10))
    other = make(resumed)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    steps(resumed, other, range(5, 10))
    return straight, resumed


class TestStableAdamW:
    SHAPES = ((5, 3), (2, 3, 2), (6,), ())

    @pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.0)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_equals_the_formula(self, betas, dtype):
        """With gradients that jump, so large a decay and so large an epsilon that their places show."""
        random = np.random.default_rng(0)
        (beta_1, beta_2), rate, eps, decay = betas, 0.05, 0.1, 0.3
        starts = [random.normal(size=shape) for shape in self.SHAPES]
        params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in starts]
        optimizer = StableAdamW(params, lr=rate, betas=betas, eps=eps, weight_decay=decay)
        means, squares = ([np.zeros_like(value) for value in starts] for _ in range(2))
        longest = 0.0
        for step in range(1, 9):
            for i, parameter in enumerate(params):
                g = random.normal(size=starts[i].shape) * (30.0 if step in (4, 5) else 0.5)
                parameter.grad = torch.tensor(g, dtype=dtype)
                means[i] = beta_1 * means[i] + (1 - beta_1) * g
                squares[i] = beta_2 * squares[i] + (1 - beta_2) * g**2
                m, v = means[i] / (1 - beta_1**step), squares[i] / (1 - beta_2**step)
                rms = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
                longest = max(longest, rms)
                own = rate / max(1.0, rms)
                starts[i] = starts[i] - own * (m / (np.sqrt(v) + eps) + decay * starts[i])
            optimizer.step()
            for i, parameter in enumerate(params):
                close = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
                expected = torch.as_tensor(starts[i], dtype=dtype)
                torch.testing.assert_close(parameter.detach(), expected, **close, msg=f"step {step}, {i}")
        assert longest > 1.5 or beta_2 == 0

    def test_small_numbers_under_epsilon_do_not_count(self):
        """Where the mean of squares is below epsilon, the gradient is divided by epsilon, as in the paper; no 0 / 0."""
        small, zero = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = StableAdamW([small, zero], lr=0.1, eps=1e-8)
        small.grad, zero.grad = torch.full((3,), 1e-20), torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(small.detach(), torch.ones(3))
        assert torch.equal(zero.detach(), torch.ones(3))

    def test_gradients_of_one_size_are_moved_as_by_adamw(self):
        found = []
        for kind in (StableAdamW, torch.optim.AdamW):
            weight = nn.Parameter(torch.tensor([[0.2, -0.4], [0.1, 0.3]]))
            optimizer = kind([weight], lr=0.05, weight_decay=0.1)
            for step in range(6):
                weight.grad = torch.tensor([[3.0, -3.0], [3.0, 3.0]]) * (-1) ** step
                optimizer.step()
            found.append(weight.detach())
        torch.testing.assert_close(*found)

    def test_a_parameter_that_joins_late_has_a_correction_of_its_own(self):
        first, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = StableAdamW([first, late], lr=0.1, weight_decay=0.0)
        for _ in range(20):
            first.grad = torch.ones(2)
            optimizer.step()
        late.grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(late.detach(), torch.full((2,), 0.9))

    def test_the_state_survives_a_round_trip(self, tmp_path):
        make = lambda params: StableAdamW(params, lr=1e-2, weight_decay=0.1)  # noqa: E731
        straight, resumed = resumed_in_the_middle(make, [(2, 3), (4,)], tmp_path)
        assert all(torch.equal(one, two) for one, two in zip(straight, resumed, strict=True))

    def test_rates_are_found_without_waiting_for_the_device(self):
        """A tensor on this device has no numbers to read."""
        params, grads, squares = ([torch.ones(3, 2, device="meta"), torch.ones(4, device="meta")] for _ in range(3))
        optimizer = StableAdamW([nn.Parameter(torch.ones(1))])
        steps = [torch.ones((), device="meta") for _ in params]
        rates = optimizer._rates(optimizer.param_groups[0], params, grads, squares, steps)
        assert [rate.shape for rate, _ in rates] == [(), ()]

    def test_half_precision_is_refused_and_the_scaler_left_alone(self):
        half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        for make in (StableAdamW, lambda params: Muon(params, matrices={})):
            with pytest.raises(InputError, match=r"a parameter of torch.bfloat16: load the model in float32"):
                make([half])
            assert not make([nn.Parameter(torch.ones(1))])._step_supports_amp_scaling


def reference_step(w, g, mean, *, rate, decay, momentum, nesterov, ns_steps):
    """Muon from its two papers, on one matrix in double precision: the new weight and the new mean."""
    mean = momentum * mean + (1 - momentum) * g
    update = momentum * mean + (1 - momentum) * g if nesterov else mean
    x = update / max(np.linalg.norm(update), 1e-7)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return w * (1 - rate * decay) - rate * 0.2 * np.sqrt(max(w.shape)) * x, mean


class TestMuon:
    @pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"momentum": 0.5, "ns_steps": 2}], ids=str)
    def test_equals_the_formula(self, options):
        random = np.random.default_rng(1)
        shapes = [(4, 6), (6, 4), (5, 5), (4, 6), (2, 9)]
        weights = [random.normal(size=shape) for shape in shapes]
        means = [np.zeros(shape) for shape in shapes]
        params = [nn.Parameter(torch.tensor(value)) for value in weights]
        settings = {"momentum": 0.95, "nesterov": True, "ns_steps": 5} | options
        matrices = dict.fromkeys(params, HiddenMatrix())
        optimizer = Muon(params, matrices=matrices, lr=0.03, weight_decay=0.2, **options)
        for _ in range(4):
            for i, parameter in enumerate(params):
                g = random.normal(size=shapes[i])
                parameter.grad = torch.tensor(g)
                weights[i], means[i] = reference_step(weights[i], g, means[i], rate=0.03, decay=0.2, **settings)
            optimizer.step()
        for parameter, expected in zip(params, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), torch.as_tensor(expected), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
    def test_a_whole_matrix_moves_as_by_torch(self, shape):
        """torch computes in bf16, so the directions agree to its digits."""
        found = []
        for kind in (Muon, torch.optim.Muon):
            generator = torch.Generator().manual_seed(0)
            weight = nn.Parameter(torch.randn(shape, generator=generator))
            own = {"matrices": {weight: HiddenMatrix()}} if kind is Muon else {"adjust_lr_fn": "match_rms_adamw"}
            optimizer = kind([weight], lr=0.1, weight_decay=0.1, **own)
            for _ in range(3):
                weight.grad = torch.randn(shape, generator=generator)
                optimizer.step()
            found.append(weight.detach())
        assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-3

    def test_singular_values_are_about_one_and_zero_stays(self):
        matrices = (
            torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
            * torch.tensor([1e-4, 1.0, 0.0])[:, None, None]
        )
        made = orthogonalised(matrices, steps=5)
        values = torch.linalg.svdvals(made[:2])
        assert 0.6 < float(values.min()) and float(values.max()) < 1.3
        assert torch.equal(made[2], torch.zeros(20, 12))
        # The size of an update is that of AdamW: 0.2.
        assert float((0.2 * 20**0.5 * made[0]).square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
        assert orthogonalised(torch.ones(2, 3, 4, device="meta"), steps=5).shape == (2, 3, 4)

    def test_parameters_that_are_no_matrix_are_adamws(self):
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)]
        found = []
        for kind in (Muon, torch.optim.AdamW):
            table, bias = (nn.Parameter(value.clone()) for value in start)
            own = {"matrices": {}} if kind is Muon else {}
            optimizer = kind([table, bias], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, **own)
            for step in range(4):
                table.grad, bias.grad = torch.cos(start[0] + step), torch.sin(start[1] * step)
                optimizer.step()
            found.append((table.detach(), bias.detach()))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_the_state_survives_a_round_trip_and_is_half_of_adams(self, tmp_path):
        def make(params):
            kinds = {params[0]: HiddenMatrix(), params[1]: HiddenMatrix(3), params[3]: HiddenMatrix()}
            return Muon(params, matrices=kinds, lr=1e-2, weight_decay=0.1)

        straight, resumed = resumed_in_the_middle(make, [(4, 3), (6, 4), (7,), (5, 3)], tmp_path)
        assert all(torch.equal(one, two) for one, two in zip(straight, resumed, strict=True))
        state = torch.load(tmp_path / "state.pt", weights_only=True)["state"]
        sizes = sorted(sum(value.numel() for value in entry.values()) for entry in state.values())
        assert sizes == sorted([12, 24, 15, 2 * 7 + 1])

    def test_matrices_move_without_waiting_for_the_device(self):
        """A tensor on this device has no numbers to read."""
        params = [nn.Parameter(torch.ones(shape, device="meta")) for shape in ((4, 6), (6, 4), (4, 6))]
        optimizer = Muon(params, matrices=dict.fromkeys(params, HiddenMatrix()), lr=0.1, weight_decay=0.1)
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(optimizer.state[parameter]["momentum_buffer"].is_meta for parameter in params)

    def test_many_matrices_give_the_same_as_few_at_once(self, monkeypatch):
        found = []
        for limit in (1 << 25, 1):
            monkeypatch.setattr("hf_pretrain.optimizers.muon._AT_ONCE", limit)
            params = [nn.Parameter(torch.eye(4, 5) * (i + 1)) for i in range(5)]
            optimizer = Muon(params, matrices=dict.fromkeys(params, HiddenMatrix()), lr=0.1)
            for i, parameter in enumerate(params):
                parameter.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
            optimizer.step()
            found.append(torch.stack([parameter.detach() for parameter in params]))
        torch.testing.assert_close(*found)


def stock(model_type, **options):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**WIDTH, "pad_token_id": 0, **options}))


# Endings of the names of hidden matrices in a layer, and of matrices beside them.
SORTED = {
    "bert": ({}, "query key value attention.output.dense intermediate.dense output.dense", "embeddings pooler.dense"),
    "modernbert": ({"cls_token_id": 1, "sep_token_id": 2}, "Wqkv Wo Wi", "tok_embeddings"),
    "albert": (
        {"embedding_size": 8},
        "query key value attention.dense ffn ffn_output",
        "embeddings embedding_hidden_mapping_in pooler",
    ),
    "deberta-v2": (
        {"relative_attention": True, "position_buckets": 4, "max_relative_positions": 8},
        "query_proj key_proj value_proj output.dense intermediate.dense",
        "embeddings",
    ),
    "xlm": ({}, "q_lin k_lin v_lin out_lin lin1 lin2", "embeddings"),
    "t5": ({"d_kv": 8, "d_ff": 24, "num_layers": 2}, "q k v o wi wo", "shared relative_attention_bias"),
    "gpt2": ({}, "c_attn c_proj c_fc", "wte wpe"),
    "xlnet": (
        {"d_inner": 24, "d_head": 8},
        "rel_attn.q rel_attn.k rel_attn.v rel_attn.o rel_attn.r layer_1 layer_2",
        "word_embedding r_w_bias",
    ),
    "switch_transformers": ({"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_experts": 2}, "q k v o wi wo", "shared"),
    "mixtral": (
        {"num_key_value_heads": 2, "num_local_experts": 3},
        "q_proj k_proj v_proj o_proj gate_up_proj down_proj",
        "embed_tokens",
    ),
}


class TestWhichMatrices:
    @pytest.mark.parametrize("model_type", SORTED)
    def test_the_linear_layers_of_a_backbone_and_nothing_else(self, model_type):
        options, inside, outside = SORTED[model_type]
        model = stock(model_type, **options)
        found = hidden_matrices(model)
        names = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
        hidden = {name.removesuffix(".weight") for name, parameter in names.items() if parameter in found}
        beside = {name.removesuffix(".weight") for name in names} - hidden
        for ending in inside.split():
            assert any(name.endswith(ending) for name in hidden), ending
            assert not any(
                name.endswith(f".{ending}") for name in beside if "router" not in name and "pooler" not in name
            )
        for part in outside.split():
            assert any(part in name for name in beside) and not any(part in name for name in hidden), part
        assert not any("norm" in name.lower() or name.endswith("bias") for name in hidden)

    def test_queries_keys_and_values_are_apart(self):
        """As the models themselves cut the output of the layer."""
        order = torch.arange(48.0)
        blocks = [order[:16], order[16:32], order[32:]]
        by_head = [torch.cat([order[first : first + 8], order[first + 24 : first + 32]]) for first in (0, 8, 16)]
        cases = {
            "modernbert": ({"cls_token_id": 1, "sep_token_id": 2}, "Wqkv.weight", blocks),
            "gpt2": ({}, "c_attn.weight", blocks),
            "bloom": ({}, "query_key_value.weight", by_head),
            "gpt_neox": ({}, "query_key_value.weight", by_head),
        }
        for model_type, (options, ending, expected) in cases.items():
            model = stock(model_type, **options)
            weight = next(value for name, value in model.named_parameters() if name.endswith(ending))
            kind = hidden_matrices(model)[weight]
            rows = order[:, None].expand(48, 16)
            pieces = kind.pieces(rows.T if model_type == "gpt2" else rows)
            assert pieces.shape == (3, 16, 16), model_type
            for piece, numbers in zip(pieces, expected, strict=True):
                assert torch.equal(piece[:, 0], numbers), model_type
            tensor = torch.randn(weight.shape)
            assert torch.equal(kind.joined(kind.pieces(tensor), weight.shape), tensor), model_type

    def test_a_fused_matrix_moves_as_three(self):
        random = torch.Generator().manual_seed(0)
        start, g = torch.randn(48, 16, generator=random), torch.randn(48, 16, generator=random)
        # One of them has much larger gradients, which a common scale would let rule.
        g[:16] *= 100
        fused = nn.Parameter(start.clone())
        apart = [nn.Parameter(piece.clone()) for piece in start.split(16)]
        for params, kind in (([fused], HiddenMatrix(3)), (apart, HiddenMatrix())):
            optimizer = Muon(params, matrices=dict.fromkeys(params, kind), lr=0.1)
            for parameter, grad in zip(params, g.split(48 if params[0] is fused else 16), strict=True):
                parameter.grad = grad
            optimizer.step()
        torch.testing.assert_close(fused.detach(), torch.cat([parameter.detach() for parameter in apart]))

    def test_experts_move_one_by_one(self):
        g = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
        experts, apart = nn.Parameter(torch.zeros(3, 4, 6)), [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
        for params, kind in (([experts], HiddenMatrix(parts=0)), (apart, HiddenMatrix())):
            optimizer = Muon(params, matrices=dict.fromkeys(params, kind), lr=0.1)
            for parameter, grad in zip(params, [g] if params[0] is experts else list(g), strict=True):
                parameter.grad = grad
            optimizer.step()
        torch.testing.assert_close(experts.detach(), torch.stack([parameter.detach() for parameter in apart]))

    def test_a_weight_that_a_table_shares_is_none(self):
        model = stock("bert", intermediate_size=50)
        shared = model.encoder.layer[0].output.dense
        shared.weight = model.embeddings.word_embeddings.weight = nn.Parameter(torch.randn(50, 16).T.contiguous())
        assert shared.weight not in hidden_matrices(model)

    def test_heads_are_none(self):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **WIDTH))
        # A head may have a list of layers too.
        model.cls.layers = nn.ModuleList([nn.Linear(16, 16)])
        found = hidden_matrices(model)
        named = {name for name, value in model.named_parameters() if value in found}
        assert len(named) == 12 and all(name.startswith("bert.encoder.layer.") for name in named)


class TestTrainer:
    OPTIONS = {"optim": "muon", "learning_rate": 1e-2, "weight_decay": 0.1}

    def test_the_first_step_of_a_run_is_that_of_the_formula(self, tmp_path):
        trainer = build(MLM, tmp_path, **self.OPTIONS)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        gradients = trainer.recorder.gradients[0]
        found, names = hidden_matrices(trainer.model), []
        for name, value in trainer.model.named_parameters():
            g, old = gradients[name].double(), before[name].double()
            decay = 0.0 if "bias" in name or "Norm" in name else 0.1
            if value in found:
                names.append(name)
                options = {"rate": 1e-2, "decay": decay, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
                expected = torch.as_tensor(reference_step(old.numpy(), g.numpy(), np.zeros(old.shape), **options)[0])
            else:
                expected = old - 1e-2 * (g / (g.abs() + 1e-8) + decay * old)
            # Where a gradient is zero but for rounding, so is its direction.
            close = torch.isclose(value.detach().double(), expected, atol=2e-5, rtol=1e-4) | (g.abs() < 1e-8)
            assert close.all(), name
        assert len(names) == 12

    @pytest.mark.parametrize("optim", ["muon", "stable_adamw"])
    @pytest.mark.parametrize("model_type", ["bert", "modernbert"])
    def test_a_run_is_taken_up_bit_for_bit(self, tmp_path, optim, model_type):
        decay = {"num_decay_steps": 0.5, "decay_type": "1-sqrt"}
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "optim": optim}
        steps |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
        model = {"model_type": model_type, "config_overrides": None}
        straight = build(MLM, tmp_path / "straight", model_options=model, **steps)
        straight.train()
        resumed = build(MLM, tmp_path / "resumed", model_options=model, **steps)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert log_of(resumed) == log_of(straight)
        expected = straight.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
        rates = [row["learning_rate"] for row in straight.state.log_history if "learning_rate" in row]
        assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2 * (1 - 0.5**0.5)])

    def test_groups_of_decay_and_of_a_rate_of_their_own(self, tmp_path):
        trainer = build(RTD, tmp_path, optim="muon", adam_bias_correction=True, generator_learning_rate=1e-4)
        optimizer = trainer.create_optimizer()
        assert isinstance(optimizer, Muon)
        seen = {}
        for group in optimizer.param_groups:
            for value in group["params"]:
                assert value not in seen
                seen[value] = (group["lr"], group["weight_decay"], group["matrix"])
        assert set(seen) == set(trainer.model.parameters())
        matrices = hidden_matrices(trainer.model)
        generator = set(trainer.model.generator.parameters())
        shared = set(trainer.model.discriminator.parameters()) & generator
        for name, value in trainer.model.named_parameters():
            rate, decay, matrix = seen[value]
            assert (matrix is not None) == (value in matrices), name
            assert decay == (0.0 if "bias" in name or "Norm" in name else 0.01), name
            if value in matrices:
                assert rate == (1e-4 if value in generator - shared else 5e-4), name
        rates = {seen[value][0] for value in matrices}
        assert rates == {1e-4, 5e-4}

    def test_a_trial_of_a_search_may_choose_them(self, tmp_path):
        trainer = build(MLM, tmp_path)
        trainer.hp_search_backend, trainer.hp_space = "optuna", lambda trial: trial.params
        for name, kind in (("muon", Muon), ("stable_adamw", StableAdamW)):
            trainer._hp_search_setup(SimpleNamespace(params={"optim": name}))
            trainer.optimizer = None
            assert type(trainer.create_optimizer()) is kind

    def test_a_loss_goes_down(self, tmp_path):
        for optim in ("muon", "stable_adamw"):
            trainer = build(MLM, tmp_path / optim, optim=optim, learning_rate=3e-3, max_steps=30)
            trainer.train()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3, optim


class TestOptions:
    def test_own_options_reach_muon(self, tmp_path):
        args = arguments(tmp_path, optim="muon", optim_args="momentum=0.9, nesterov=false,ns_steps=7", adam_beta2=0.98)
        check_training_options(args)
        kind, kwargs = optimizer_of(args)
        assert kind is Muon and kwargs["betas"] == (0.9, 0.98)
        assert {name: kwargs[name] for name in ("momentum", "nesterov", "ns_steps")} == {
            "momentum": 0.9,
            "nesterov": False,
            "ns_steps": 7,
        }
        assert args.optim == "muon" == args.to_dict()["optim"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("momntum=0.9", "Muon has no option 'momntum': did you mean 'momentum'?"),
            ("momentum=1", "momentum=1.0 must be a number"),
            ("ns_steps=2.5", "ns_steps=2.5 must be a whole number"),
            ("ns_steps=0", "ns_steps=0 must be a number"),
            ("ns_steps=50", "ns_steps=50 must be a number"),
            ("nesterov=1", "nesterov=1 must be true or false"),
        ],
    )
    def test_what_muon_does_not_take_is_refused(self, tmp_path, text, said):
        with pytest.raises(InputError) as refused:
            check_training_options(arguments(tmp_path, optim="muon", optim_args=text))
        assert said in str(refused.value)

    def test_stable_adamw_is_ours_and_takes_no_options(self, tmp_path):
        args = arguments(tmp_path, optim="stable_adamw", adam_beta2=0.98)
        check_training_options(args)
        assert optimizer_of(args) == (StableAdamW, {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-8})
        with pytest.raises(InputError, match="optim_args='kahan_sum=true' has no effect with optim=stable_adamw"):
            check_training_options(arguments(tmp_path, optim="stable_adamw", optim_args="kahan_sum=true"))
        for name in ("muon", "stable_adamw"):
            with pytest.raises(InputError, match=f"adam_bias_correction=False is Adam's, but optim='{name}'"):
                arguments(tmp_path, optim=name, adam_bias_correction=False)


class TestWarmupStableDecay:
    def factors(self, args, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        (factor,) = schedule_of(args, optimizer, steps=steps).lr_lambdas
        return [factor(step) for step in range(steps + 1)]

    def make(self, tmp_path, warmup=0.1, **kwargs):
        return arguments(
            tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs, warmup_steps=warmup
        )

    @pytest.mark.parametrize("steps", [20, 100])
    def test_a_share_of_the_steps_decays(self, tmp_path, steps):
        tenth = steps // 10
        for shape, at_half in (("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)):
            found = self.factors(self.make(tmp_path, num_decay_steps=0.2, decay_type=shape), steps)
            assert found[: tenth + 1] == pytest.approx([step / tenth for step in range(tenth + 1)])
            assert found[tenth : 8 * tenth + 1] == [1.0] * (7 * tenth + 1)
            assert found[9 * tenth] == pytest.approx(at_half) and found[-1] == 0

    def test_a_number_of_steps_is_that_of_transformers(self, tmp_path):
        shares = self.factors(self.make(tmp_path, num_decay_steps=0.25, min_lr_ratio=0.1), 40)
        numbers = self.factors(self.make(tmp_path, 4, num_decay_steps=10, min_lr_ratio=0.1), 40)
        assert shares == numbers and numbers[-1] == pytest.approx(0.1) and numbers[30] == 1.0

    @pytest.mark.parametrize(
        ("kwargs", "said"),
        [
            ({}, "needs the length of the decay"),
            ({"num_decay_step": 5}, "has no option 'num_decay_step': did you mean 'num_decay_steps'?"),
            ({"num_decay_steps": 5, "num_stable_steps": 9}, "num_stable_steps=9 follows from the others"),
            ({"num_decay_steps": 5, "decay_type": "sqrt"}, "decay_type='sqrt' must be one of cosine, linear, 1-sqrt"),
            (
                {"num_decay_steps": 5, "decay_type": "linear", "num_cycles": 1},
                "num_cycles=1 is of decay_type='cosine'",
            ),
            ({"num_decay_steps": "10%"}, "num_decay_steps='10%' must be a number; a share of all steps is below 1"),
            ({"num_decay_steps": -1}, "num_decay_steps=-1 must be a number"),
            ({"num_decay_steps": 2.5}, "num_decay_steps=2.5 must be a whole number of steps"),
            ({"num_decay_steps": 0.2, "min_lr_ratio": 2}, "min_lr_ratio=2 must be a number from 0 to 1"),
            ({"num_decay_steps": 0.95}, "num_decay_steps=0.95 and warmup_steps are 1050 steps, but the run has 1000"),
        ],
    )
    def test_what_would_have_no_effect_or_a_wrong_one_is_refused(self, tmp_path, kwargs, said):
        with pytest.raises(InputError) as refused:
            check_training_options(self.make(tmp_path, **kwargs))
        assert said in str(refused.value)


class TestFineTuning:
    def make(self, tmp_path, **options):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **WIDTH))
        args = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True} | options
        return FineTuningTrainer(model, FineTuningArguments(**args))

    def test_each_layer_has_its_rate_in_both_parts(self, tmp_path):
        trainer = self.make(tmp_path, optim="muon", learning_rate=1e-3, layerwise_learning_rate_decay=0.5)
        optimizer = trainer.create_optimizer()
        assert isinstance(optimizer, Muon)
        rates = {
            value: (group["lr"], group["matrix"]) for group in optimizer.param_groups for value in group["params"]
        }
        matrices = hidden_matrices(trainer.model)
        layers = trainer.model.bert.encoder.layer
        for depth, layer in enumerate(layers):
            for value in layer.parameters():
                rate, matrix = rates[value]
                assert (matrix is not None) == (value in matrices)
                assert rate == pytest.approx(rates[layers[-1].output.dense.weight][0] * 0.5 ** (1 - depth))
        assert rates[trainer.model.classifier.weight] == (1e-3, None)
        assert {group["name"] for group in optimizer.param_groups} >= {"head", "layer 1", "layer 2", "embeddings"}

    def test_parts_that_move_later_have_their_optimizer_from_the_start(self, tmp_path):
        trainer = self.make(tmp_path, optim="muon", strategy="gradual")
        optimizer = trainer.create_optimizer()
        kinds = {value: group["matrix"] for group in optimizer.param_groups for value in group["params"]}
        assert all(kinds[value] is not None for value in hidden_matrices(trainer.model))

    def test_names_and_options_are_checked_as_in_pretraining(self, tmp_path):
        trainer = self.make(tmp_path, optim="stable_adamw", layerwise_learning_rate_decay=1.0)
        assert type(trainer.create_optimizer()) is StableAdamW
        with pytest.raises(InputError, match="optim='moun' is no optimizer: did you mean 'muon'?"):
            self.make(tmp_path, optim="moun")

    @pytest.mark.parametrize("strategy", ["frozen", "lora"])
    def test_where_nothing_is_left_for_muon_it_is_refused(self, tmp_path, strategy):
        """The matrices of an adapter are AdamW's."""
        with pytest.raises(InputError, match="optim='muon' has no matrix to train here"):
            self.make(tmp_path, optim="muon", strategy=strategy).create_optimizer()
