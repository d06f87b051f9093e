"""Optimizers and the schedule of official recipes against their formulas, and what the Trainer makes of them."""

import copy
import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Adafactor, get_linear_schedule_with_warmup

from helpers.method_matrix import build, log_of, programs
from hf_pretrain.errors import InputError
from hf_pretrain.optimizers import (
    AdamWithoutBiasCorrection,
    AdamWithParameterScale,
    adam,
    check_matrices_are_whole,
    linear_product_schedule,
    optimizer_of,
)
from hf_pretrain.options import resolved_options, write_recipe
from hf_pretrain.training.arguments import PretrainingArguments, check_training_options
from hf_pretrain.training.parsing import parse_arguments

PROGRAM, MLM = programs()["rtd"], programs()["mlm"]
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


@pytest.fixture(params=["on the host", "on the device"])
def rates(request, monkeypatch):
    """Rates as numbers, as on a CPU, and as tensors, as on a GPU."""
    if request.param == "on the device":
        monkeypatch.setattr(adam, "_rates_on_the_host", adam._rates_on_the_device)


@pytest.mark.usefixtures("rates")
class TestAdamWithParameterScale:
    def starts(self):
        """A large matrix, one below the floor, one of three axes, and vectors: usual, zero, and of one number."""
        random = np.random.default_rng(0)
        shapes = {"large": (5, 3), "small": (4, 4), "cube": (2, 3, 2), "norm": (6,), "zero": (3,), "one": ()}
        sizes = {"large": 30.0, "small": 1e-5, "cube": 0.05, "norm": 1.0, "zero": 0.0, "one": 2.0}
        return {name: random.normal(size=shape) * sizes[name] for name, shape in shapes.items()}

    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_equals_the_formula(self, decay):
        """So large an epsilon shows where it is, so large a decay whether it is decoupled and not scaled."""
        random = np.random.default_rng(1)
        starts = self.starts()
        params = {name: torch.nn.Parameter(torch.tensor(value).double()) for name, value in starts.items()}
        rate, eps, (beta_1, beta_2) = 0.02, 0.1, (0.8, 0.95)
        options = {"lr": rate, "eps": eps, "betas": (beta_1, beta_2), "weight_decay": decay}
        optimizer = AdamWithParameterScale(params.values(), **options)
        means, squares = ({name: np.zeros_like(value) for name, value in starts.items()} for _ in range(2))
        for step in range(1, 9):
            for name, parameter in params.items():
                g = random.normal(size=starts[name].shape)
                parameter.grad = torch.tensor(g)
                p = starts[name]
                means[name] = beta_1 * means[name] + (1 - beta_1) * g
                squares[name] = beta_2 * squares[name] + (1 - beta_2) * g**2
                corrected = means[name] / (1 - beta_1**step), squares[name] / (1 - beta_2**step)
                scale = max(np.sqrt(np.mean(p**2)), 1e-3)
                starts[name] = p - rate * (scale * corrected[0] / (np.sqrt(corrected[1]) + eps) + decay * p)
            optimizer.step()
            for name, parameter in params.items():
                # The kernel has some of its numbers in fp32.
                torch.testing.assert_close(
                    parameter.detach(), torch.as_tensor(starts[name]), rtol=1e-6, atol=1e-9, msg=name
                )

    def test_the_first_step_is_the_rate_times_the_size(self):
        matrix, zero = torch.nn.Parameter(torch.full((2, 2), -4.0)), parameter(0.0, 0.0)
        optimizer = AdamWithParameterScale([matrix, zero], lr=0.01)
        for value in (matrix, zero):
            value.grad = torch.full_like(value, 7.0)
        optimizer.step()
        torch.testing.assert_close(matrix.detach(), torch.full((2, 2), -4.04))
        torch.testing.assert_close(zero.detach(), torch.full((2,), -1e-5))

    def test_the_model_in_other_units_moves_by_the_same_share(self):
        """What plain Adam has not: a matrix ten times as large moves ten times as far."""
        found = []
        for unit in (1.0, 10.0):
            weight = torch.nn.Parameter(unit * torch.tensor([[0.2, -0.4], [0.1, 0.3]]))
            optimizer = AdamWithParameterScale([weight], lr=0.05, eps=1e-12)
            for _ in range(5):
                weight.grad = torch.tanh(weight.detach() / unit) / unit
                optimizer.step()
            found.append(weight.detach() / unit)
        torch.testing.assert_close(*found)

    def test_groups_have_rates_and_decays_of_their_own(self):
        first, second = parameter(2.0), parameter(2.0)
        groups = [{"params": [first], "weight_decay": 0.5}, {"params": [second], "lr": 0.2}]
        optimizer = AdamWithParameterScale(groups, lr=0.1)
        for value in (first, second):
            value.grad = torch.ones(1)
        optimizer.step()
        assert float(first.detach()) == pytest.approx(2 - 0.1 * (2 + 0.5 * 2))
        assert float(second.detach()) == pytest.approx(2 - 0.2 * 2)

    def test_the_state_survives_a_round_trip(self, tmp_path):
        def steps(weights, optimizer, numbers):
            for number in numbers:
                for weight in weights[: 1 + number % 2]:  # one of them not always
                    weight.grad = torch.sin(torch.arange(weight.numel()) + number).reshape(weight.shape)
                optimizer.step()
                optimizer.zero_grad()

        straight = [torch.nn.Parameter(torch.linspace(-1, 2, 6).reshape(2, 3)), parameter(1.0, 0.5)]
        optimizer = AdamWithParameterScale(straight, lr=1e-2, weight_decay=0.1)
        steps(straight, optimizer, range(5))
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in straight]
        steps(straight, optimizer, range(5, 10))
        other = AdamWithParameterScale(resumed, lr=1.0)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        steps(resumed, other, range(5, 10))
        assert all(torch.equal(one, two) for one, two in zip(straight, resumed, strict=True))
        assert [int(other.state[weight]["step"]) for weight in resumed] == [10, 5]

    def test_a_closure_gives_the_loss(self):
        weight = parameter(3.0)
        optimizer = AdamWithParameterScale([weight], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = (weight**2).sum()
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) == 9
        assert float(weight.detach()) == pytest.approx(2.7)

    def test_a_gradient_that_is_not_finite_is_left_to_the_scaler(self):
        """A scaler of fp16 skips the step then; the kernel alone would skip it without the decay and the counter."""
        assert not AdamWithParameterScale([parameter(1.0)])._step_supports_amp_scaling

    def test_half_precision_and_sparse_gradients_are_refused(self):
        half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        with pytest.raises(InputError, match=r"a parameter of torch.bfloat16: load the model in float32"):
            AdamWithParameterScale([half])
        table = torch.nn.Embedding(4, 2, sparse=True)
        optimizer = AdamWithParameterScale(table.parameters())
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()


class TestNames:
    def make(self, tmp_path, **options):
        return PretrainingArguments(**{"output_dir": str(tmp_path), "bf16": False, "report_to": []} | options)

    def test_our_name_survives_all_ways_of_writing_and_reading(self, tmp_path):
        args = self.make(tmp_path, optim="adamw_rms")
        assert args.optim == "adamw_rms" == args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"]
        assert (
            f"{args.optim}" == str(args.optim) == args.optim.value == args.to_sanitized_dict()["optim"] == "adamw_rms"
        )
        assert "optim=adamw_rms," in str(args)
        for other in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), dataclasses.replace(args, seed=3)):
            assert other.optim == "adamw_rms" and optimizer_of(other)[0] is AdamWithParameterScale
        write_recipe(resolved_options([args]), tmp_path / "recipe.yaml", program="hf-pretrain mlm")
        assert "\noptim: adamw_rms\n" in (tmp_path / "recipe.yaml").read_text()
        (read,) = self.parse("--config", str(tmp_path / "recipe.yaml"))
        assert read.optim == "adamw_rms" and optimizer_of(read)[0] is AdamWithParameterScale
        (typed,) = self.parse("--output_dir", str(tmp_path), "--optim", "adamw_rms", "--adam_beta2", "0.98")
        assert typed.optim == "adamw_rms" and optimizer_of(typed)[1]["betas"] == (0.9, 0.98)

    def parse(self, *argv):
        return parse_arguments([PretrainingArguments], argv, prog="hf-pretrain mlm", description="")

    def test_the_default_is_that_of_transformers(self, tmp_path):
        args = self.make(tmp_path)
        assert args.optim == PretrainingArguments.optim and "optim" not in resolved_options([args])
        assert optimizer_of(args)[0] is torch.optim.AdamW

    @pytest.mark.parametrize("name", ["adamw_rsm", "adamw-rms", "AdamW_RMS"])
    def test_a_mistyped_name_leads_to_the_nearest(self, tmp_path, name):
        with pytest.raises(InputError, match=f"optim='{name}' is no optimizer: did you mean 'adamw_rms'?"):
            self.make(tmp_path, optim=name)
        with pytest.raises(InputError, match=f"optim='{name}' is no optimizer: did you mean 'adamw_rms'?"):
            self.parse("--output_dir", str(tmp_path), "--optim", name)

    @pytest.mark.parametrize("name", ["adamw_rms", "adafactor"])
    def test_only_adam_has_a_correction_to_leave_out(self, tmp_path, name):
        said = f"adam_bias_correction=False is Adam's, but optim='{name}'"
        with pytest.raises(InputError, match=said):
            self.make(tmp_path, optim=name, adam_bias_correction=False)
        args = self.make(tmp_path, adam_bias_correction=False)
        args.optim = name  # as a search sets it
        with pytest.raises(InputError, match=said):
            optimizer_of(args)

    def test_it_takes_no_optim_args(self, tmp_path):
        with pytest.raises(InputError, match="optim_args='eps=1' has no effect with optim=adamw_rms"):
            check_training_options(self.make(tmp_path, optim="adamw_rms", optim_args="eps=1"))

    def test_adafactor_has_options_of_its_own(self, tmp_path):
        usual = {"lr": 5e-4, "scale_parameter": False, "relative_step": False}
        assert optimizer_of(self.make(tmp_path, optim="adafactor")) == (Adafactor, usual)
        text = "scale_parameter=true, clip_threshold=0.5,decay_rate=-0.9,beta1=0.8"
        args = self.make(tmp_path, optim="adafactor", optim_args=text)
        check_training_options(args)
        own = {"scale_parameter": True, "clip_threshold": 0.5, "decay_rate": -0.9, "beta1": 0.8}
        assert optimizer_of(args) == (Adafactor, usual | own)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("scale_paramter=true", "Adafactor has no option 'scale_paramter': did you mean 'scale_parameter'?"),
            ("scale_parameter=1", "scale_parameter=1 must be true or false"),
            ("clip_threshold=x", "clip_threshold=x must be a number"),
            ("clip_threshold=0", "clip_threshold=0.0 must be a number above 0"),
            (
                "relative_step=true",
                "relative_step=true is not supported: rate and schedule are those of learning_rate",
            ),
            ("beta1", "optim_args='beta1' must be NAME=VALUE"),
        ],
    )
    def test_what_adafactor_does_not_take_is_refused(self, tmp_path, text, said):
        with pytest.raises(InputError) as refused:
            check_training_options(self.make(tmp_path, optim="adafactor", optim_args=text))
        assert said in str(refused.value)

    @pytest.mark.parametrize(
        ("optim", "version", "kind", "said"),
        [
            ("adamw_rms", None, DistributedType.DEEPSPEED, "DeepSpeed gives each process a piece"),
            (
                "adamw_rms",
                1,
                DistributedType.FSDP,
                "FSDP1 gives each process a piece of them: launch with ddp.yaml or fsdp2",
            ),
            ("adamw_rms", 2, DistributedType.FSDP, None),
            ("adamw_rms", None, DistributedType.MULTI_CPU, None),
            ("adafactor", None, DistributedType.DEEPSPEED, "optim='adafactor' needs whole matrices"),
            (
                "adafactor",
                2,
                DistributedType.FSDP,
                "FSDP2 gives each process a piece of them: launch with ddp.yaml, or take",
            ),
            ("adafactor", None, DistributedType.MULTI_GPU, None),
            ("adamw_torch", 1, DistributedType.FSDP, None),
        ],
    )
    def test_pieces_of_matrices_are_refused(self, tmp_path, optim, version, kind, said):
        plugin = None if version is None else SimpleNamespace(fsdp_version=version)
        accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=kind)
        args = self.make(tmp_path, optim=optim)
        if said is None:
            check_matrices_are_whole(args, accelerator)
        else:
            with pytest.raises(InputError, match=said):
                check_matrices_are_whole(args, accelerator)


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


class TestTrainerWithParameterScale:
    OPTIONS = {"optim": "adamw_rms", "learning_rate": 1e-2, "adam_epsilon": 1e-6, "max_grad_norm": 0.5}

    def test_the_first_step_of_a_run_is_that_of_the_formula(self, tmp_path):
        """With gradients that are clipped, in groups with and without decay."""
        trainer = build(MLM, tmp_path, **self.OPTIONS)
        trainer.model.get_input_embeddings().weight.data.mul_(50)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        assert type(trainer.optimizer.optimizer) is AdamWithParameterScale
        (gradients,) = trainer.recorder.gradients
        # The recorder comes after the clipping.
        assert float(torch.cat([g.flatten() for g in gradients.values()]).norm()) == pytest.approx(0.5, rel=1e-4)
        for name, value in trainer.model.named_parameters():
            g, old = gradients[name].double(), before[name].double()
            scale = max(float(old.square().mean().sqrt()), 1e-3)
            decay = 0.0 if "bias" in name or "Norm" in name else 0.01
            expected = old - 1e-2 * (scale * g / (g.abs() + 1e-6) + decay * old)
            torch.testing.assert_close(value.detach().double(), expected, atol=1e-6 * scale, rtol=1e-5, msg=name)

    @pytest.mark.parametrize(
        "options", [OPTIONS, {"optim": "adafactor", "optim_args": "scale_parameter=true", "learning_rate": 1e-2}]
    )
    def test_a_run_is_taken_up_bit_for_bit(self, tmp_path, options):
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options}
        straight = build(MLM, tmp_path / "straight", **steps)
        straight.train()
        resumed = build(MLM, tmp_path / "resumed", **steps)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert log_of(resumed) == log_of(straight)
        expected = straight.model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())

    def test_a_trial_of_a_search_may_choose_it(self, tmp_path):
        trainer = build(MLM, tmp_path)
        trainer.hp_search_backend, trainer.hp_space = "optuna", lambda trial: trial.params
        for name, kind in (("adamw_rms", AdamWithParameterScale), ("adafactor", Adafactor), ("sgd", torch.optim.SGD)):
            trainer._hp_search_setup(SimpleNamespace(params={"optim": name}))
            trainer.optimizer = None
            assert type(trainer.create_optimizer()) is kind
        with pytest.raises(InputError, match="did you mean 'adamw_rms'"):
            trainer._hp_search_setup(SimpleNamespace(params={"optim": "adamw_rmss"}))
