"""The official optimizer and schedule against their formulas, and what the Trainer makes of them."""

import copy

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from helpers.method_matrix import build, programs
from hf_pretrain.training.optimizers import AdamWithoutBiasCorrection, linear_product_schedule

PROGRAM = programs()["rtd"]
KERNELS = [{"fused": True}, {"foreach": True}, {"foreach": False}]


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values))


class TestAdamWithoutBiasCorrection:
    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_length_of_the_first_and_the_tenth_step(self, kernel):
        """With bias correction every step is one learning rate long."""
        weight = parameter(0.0, 0.0)
        optimizer = AdamWithoutBiasCorrection([weight], lr=1e-3, weight_decay=0.0, eps=1e-6, **kernel)
        lengths = []
        for _ in range(10):
            before = weight.detach().clone()
            weight.grad = torch.tensor([1.0, -5.0])
            optimizer.step()
            lengths.append((before - weight.detach()) / 1e-3)
        torch.testing.assert_close(lengths[0], torch.tensor([3.1623, -3.1623]), atol=2e-4, rtol=0)
        torch.testing.assert_close(lengths[9], torch.tensor([6.528, -6.528]), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_equals_the_formula_with_weight_decay(self, kernel):
        """So large an epsilon shows whether it is inside the square root, so large a decay whether it is decoupled."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(7, generator=generator)
        weight = torch.nn.Parameter(start.clone())
        rate, decay, eps, (beta_1, beta_2) = 0.01, 0.3, 0.1, (0.8, 0.95)
        optimizer = AdamWithoutBiasCorrection(
            [weight], lr=rate, weight_decay=decay, eps=eps, betas=(beta_1, beta_2), **kernel
        )
        p, m, v = start.double(), torch.zeros(7).double(), torch.zeros(7).double()
        for step in range(20):
            g = torch.randn(7, generator=generator)
            weight.grad = g.clone()
            optimizer.step()
            m = beta_1 * m + (1 - beta_1) * g.double()
            v = beta_2 * v + (1 - beta_2) * g.double() ** 2
            p = p - rate * (m / (v.sqrt() + eps) + decay * p)
            torch.testing.assert_close(weight.detach().double(), p, atol=1e-6, rtol=1e-6, msg=f"step {step}")

    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_the_state_survives_a_round_trip(self, kernel, tmp_path):
        def steps(weight, optimizer, numbers):
            for number in numbers:
                weight.grad = torch.tensor([0.3, -0.2]) * (number + 1)
                optimizer.step()

        options = {"lr": 1e-2, "weight_decay": 0.1, **kernel}
        straight = parameter(1.0, 2.0)
        optimizer = AdamWithoutBiasCorrection([straight], **options)
        steps(straight, optimizer, range(5))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        resumed = torch.nn.Parameter(straight.detach().clone())
        steps(straight, optimizer, range(5, 10))
        other = AdamWithoutBiasCorrection([resumed], **options)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        steps(resumed, other, range(5, 10))
        assert torch.equal(straight, resumed)

    @pytest.mark.parametrize("kernel", KERNELS, ids=str)
    def test_a_parameter_that_joins_late_has_no_correction_either(self, kernel):
        first, late = parameter(0.0), parameter(0.0)
        optimizer = AdamWithoutBiasCorrection([first, late], lr=1.0, weight_decay=0.0, **kernel)
        first.grad = torch.ones(1)
        optimizer.step()
        assert float(late.detach()) == 0
        late.grad = torch.ones(1)
        optimizer.step()
        assert float(late.detach()) == pytest.approx(-3.1623, abs=1e-3)


def factors(schedule):
    (factor,) = schedule.lr_lambdas
    return factor


class TestLinearProductSchedule:
    def make(self, warmup, total):
        optimizer = torch.optim.SGD([parameter(0.0)], lr=1.0)
        return factors(linear_product_schedule(optimizer, num_warmup_steps=warmup, num_training_steps=total))

    def test_values_of_the_official_recipe(self):
        factor = self.make(10_000, 1_000_000)
        expected = {0: 0.0, 1: (1 - 1e-6) * 1e-4, 5_000: 0.4975, 10_000: 0.99, 500_000: 0.5, 1_000_000: 0.0}
        assert {step: factor(step) for step in expected} == pytest.approx(expected)
        assert factor(1_000_001) == 0

    @pytest.mark.parametrize(("total", "at_peak"), [(1_000_000, 0.99), (62_500, 0.84)])
    def test_it_is_not_the_stock_schedule(self, total, at_peak):
        optimizer = torch.optim.SGD([parameter(0.0)], lr=1.0)
        stock = factors(get_linear_schedule_with_warmup(optimizer, 10_000, total))
        assert stock(10_000) == 1
        assert self.make(10_000, total)(10_000) == pytest.approx(at_peak)

    def test_the_mean_rate_of_a_short_run(self):
        factor = self.make(10_000, 62_500)
        assert sum(factor(step) for step in range(62_500)) / 62_500 == pytest.approx(0.4243, abs=1e-3)

    def test_without_warmup_it_starts_at_the_peak(self):
        factor = self.make(0, 10)
        assert [factor(step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]

    def test_it_sets_the_rates(self):
        optimizer = torch.optim.SGD([parameter(0.0)], lr=8.0)
        schedule = linear_product_schedule(optimizer, num_warmup_steps=2, num_training_steps=4)
        rates = []
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == [0.0, 8 * 0.75 * 0.5, 8 * 0.5, 8 * 0.25]


def is_decayed(model):
    """The rule from the modules, not from names: all but biases and the parameters of norms. By the identity of the tensor."""
    decayed = {}
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, value in module.named_parameters(recurse=False):
            decayed[id(value)] = not is_norm and "bias" not in name
    return decayed


class TestTrainer:
    @pytest.mark.parametrize(
        "model_options",
        [
            {},
            {"embedding_sharing": "none"},
            {"model_type": "bert", "generator_size": 1.0},
            {"model_type": "albert", "generator_size": 1.0, "embedding_size": 16},
            {"model_type": "modernbert", "generator_size": 1.0, "config_overrides": None},
            {"model_type": "deberta-v2", "generator_size": 1.0},
        ],
        ids=lambda options: "-".join(str(value) for value in options.values()) or "electra",
    )
    def test_every_parameter_is_in_the_right_group_once(self, model_options, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=model_options)
        optimizer = trainer.create_optimizer()
        grouped = {True: [], False: []}
        for group in optimizer.param_groups:
            assert group["weight_decay"] in (0.01, 0.0)
            grouped[group["weight_decay"] > 0] += [id(value) for value in group["params"]]
        everything = grouped[True] + grouped[False]
        assert len(everything) == len(set(everything))
        expected = is_decayed(trainer.model)
        assert set(everything) == expected.keys() == {id(value) for value in trainer.model.parameters()}
        names = {id(value): name for name, value in trainer.model.named_parameters()}
        assert {names[i] for i in grouped[True]} == {names[i] for i, decays in expected.items() if decays}
        # The tables are decayed, as in the official code.
        words = trainer.model.generator.get_input_embeddings().weight
        assert id(words) in grouped[True]

    def test_frozen_parameters_are_in_no_group(self, tmp_path):
        trainer = build(PROGRAM, tmp_path)
        frozen = trainer.model.generator.get_input_embeddings().weight.requires_grad_(False)
        groups = trainer.create_optimizer().param_groups
        assert id(frozen) not in {id(value) for group in groups for value in group["params"]}

    def test_options_reach_the_optimizer(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, learning_rate=3e-4)
        optimizer = trainer.create_optimizer()
        assert isinstance(optimizer, AdamWithoutBiasCorrection)
        for group in optimizer.param_groups:
            assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-5, 3e-4)

    def test_the_stock_optimizer_on_request(self, tmp_path):
        optimizer = build(PROGRAM, tmp_path, adam_bias_correction=True).create_optimizer()
        assert type(optimizer) is torch.optim.AdamW

    def test_the_defaults_are_those_of_the_official_code(self):
        args = PROGRAM.arguments[2](output_dir="unused", bf16=False, report_to=[])
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-6)
        assert (args.weight_decay, args.max_grad_norm, args.learning_rate) == (0.01, 1.0, 5e-4)
        assert (args.adam_bias_correction, args.decay_during_warmup, args.warmup_steps) == (False, True, 0.1)
        assert (args.mlm_weight, args.rtd_weight) == (1.0, 50.0)
        assert (args.mlm_probability, args.mask_share, args.random_share) == (0.15, 0.85, 0.0)

    def test_the_schedule_is_the_product(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, warmup_steps=10_000)
        trainer.create_optimizer()
        factor, *_ = trainer.create_scheduler(1_000_000).lr_lambdas
        expected = {0: 0.0, 5_000: 0.4975, 10_000: 0.99, 500_000: 0.5}
        assert {step: factor(step) for step in expected} == pytest.approx(expected)

    def test_the_stock_schedule_on_request(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, warmup_steps=10_000, decay_during_warmup=False)
        trainer.create_optimizer()
        factor, *_ = trainer.create_scheduler(1_000_000).lr_lambdas
        assert factor(10_000) == 1.0

    def test_the_first_step_of_a_run_is_that_of_the_formula(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, learning_rate=1e-3)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        gradients = trainer.recorder.gradients[0]
        checked = 0
        for name, value in trainer.model.named_parameters():
            g, old = gradients[name], before[name]
            decay = 0.0 if "bias" in name or "Norm" in name else 0.01
            step = 0.1 * g / (0.001**0.5 * g.abs() + 1e-6) + decay * old
            torch.testing.assert_close(value.detach(), old - 1e-3 * step, atol=2e-6, rtol=1e-5)
            checked += 1
        assert checked == len(gradients)
