"""The options of strategies: their defaults, and those that are refused because they would have no effect."""

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModel

from helpers.strategy_runs import CONFIGS, arguments, classifier, collate, examples, fine_tuner, moved, weights
from hf_pretrain.errors import InputError
from hf_pretrain.options import read_recipe, resolved_options, write_recipe
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.transfer.arguments import Strategy
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer

STRATEGIES = Strategy.__args__
# An option, its value, and the strategies that take it.
EFFECTS = {
    "layerwise_learning_rate_decay": (
        0.5,
        {"layerwise_decay", "discriminative", "gradual", "probe_then_tune", "top_layers", "bitfit", "lora", "dora", "peft"},
    ),
    "head_learning_rate": (1e-3, set(STRATEGIES) - {"frozen", "scalar_mix"}),
    "freeze_embeddings": (
        True, {"full", "layerwise_decay", "discriminative", "gradual", "probe_then_tune", "bitfit"},
    ),
    "reinit_layers": (
        1, {"full", "layerwise_decay", "discriminative", "gradual", "probe_then_tune", "top_layers"},
    ),
    "unfreeze_every": (2, {"gradual"}),
    "probe_share": (0.3, {"probe_then_tune"}),
    "probe_learning_rate": (0.3, {"probe_then_tune"}),
    "frozen_layers": (2, {"top_layers"}),
    "slanted_cut_fraction": (0.2, {"discriminative"}),
    "slanted_ratio": (16, {"discriminative"}),
    "lora_rank": (4, {"lora", "dora"}),
    "lora_alpha": (4, {"lora", "dora"}),
    "lora_dropout": (0.1, {"lora", "dora"}),
    "lora_target_modules": (["query"], {"lora", "dora"}),
    "peft_config": ({"peft_type": "IA3"}, {"peft"}),
    "export": ("adapter", {"lora", "dora", "peft"}),
    "tune_encoder": (True, {"scalar_mix"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS)
def test_an_option_without_effect_is_refused(tmp_path, name):
    value, takers = EFFECTS[name]
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "warmup_steps": 0.1, name: value}
        if strategy == "peft":
            options.setdefault("peft_config", {"peft_type": "IA3"})
        if strategy in takers:
            assert getattr(arguments(tmp_path, **options), name) == value
        else:
            with pytest.raises(InputError, match=f"{name}.*no effect"):
                arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fulll"}, "strategy='fulll' must be one of .*did you mean 'full'"),
        ({"strategy": "gradual", "unfreeze_every": 0}, "unfreeze_every=0 must be a number above 0"),
        ({"strategy": "probe_then_tune", "probe_share": 1.0}, "probe_share=1.0"),
        ({"strategy": "lora", "lora_rank": 0}, "lora_rank=0"),
        ({"strategy": "lora", "export": "both"}, "export='both'"),
        ({"strategy": "peft"}, "needs peft_config"),
        ({"reinit_layers": -1}, "reinit_layers=-1"),
        ({"strategy": "full", "layerwise_decay_mode": "official"}, "layerwise_decay_mode='official' has no effect"),
        ({"strategy": "discriminative", "warmup_steps": 10}, "warmup_steps=10 .*no effect with slanted_triangular"),
        (
            {"slanted_triangular": True, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
            "lr_scheduler_type='cosine'",
        ),
    ],
)
def test_bad_values(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("strategy", ["frozen", "gradual", "probe_then_tune"])
def test_a_model_without_a_head_is_refused(tmp_path, strategy):
    model = AutoModel.from_config(CONFIGS["electra"])
    with pytest.raises(InputError, match="needs a model with a head, and ElectraModel has none"):
        FineTuningTrainer(model, arguments(tmp_path, strategy=strategy))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "gradual"},
        {"strategy": "top_layers"},
        {"strategy": "full", "freeze_embeddings": True},
        {"strategy": "full", "reinit_layers": 1},
        {"strategy": "discriminative", "warmup_steps": 0.1},
    ],
)
def test_shared_layers_are_refused_where_each_layer_counts(tmp_path, options):
    with pytest.raises(InputError, match=r"3 layers of AlbertModel.*strategy"):
        fine_tuner(tmp_path, classifier("albert"), **options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("bert", {"strategy": "top_layers", "frozen_layers": 4}, "frozen_layers=4 must be at most 3"),
        ("bert", {"strategy": "scalar_mix"}, "needs a model with a module scalar_mix"),
        ("modernbert", {"strategy": "bitfit"}, "has no biases"),
        (
            "bert",
            {"strategy": "gradual", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "is no function of the step",
        ),
        ("bert", {"strategy": "top_layers", "reinit_layers": 3}, "reinit_layers=3"),
        ("bert", {"strategy": "full", "reinit_layers": 4}, "reinit_layers=4"),
    ],
)
def test_models_that_a_strategy_does_not_go_with(tmp_path, model, options, message):
    with pytest.raises(InputError, match=message):
        fine_tuner(tmp_path, classifier(model), **options)


def test_an_optimizer_of_the_callers_is_refused_where_stages_need_another(tmp_path):
    model = classifier()
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    with pytest.raises(InputError, match="optimizers: strategy='gradual'"):
        FineTuningTrainer(model, arguments(tmp_path, strategy="gradual"), optimizers=optimizers)


def test_a_strategy_fills_in_its_own_values(tmp_path):
    def values(strategy, *names, **options):
        args = arguments(tmp_path, strategy=strategy, warmup_steps=0.1, **options)
        return tuple(getattr(args, name) for name in names)

    decay, slanted = "layerwise_learning_rate_decay", ("slanted_triangular", "slanted_cut_fraction", "slanted_ratio")
    assert values("full", decay, *slanted) == (1, False, None, None)
    assert values("discriminative", decay, *slanted) == (1 / 2.6, True, 0.1, 32)
    assert values("gradual", decay, *slanted, slanted_triangular=True) == (1, True, 0.1, 32)
    assert values("lora", "lora_rank", "lora_alpha", "export", lora_rank=4) == (4, 8, "merged")


@pytest.mark.parametrize("strategy", ["layerwise_decay", "discriminative", "full", "gradual", "lora", "peft"])
def test_a_recipe_of_the_options_gives_them_again(tmp_path, strategy):
    options = {"peft_config": '{"peft_type": "IA3"}'} if strategy == "peft" else {}
    args = arguments(tmp_path, strategy=strategy, warmup_steps=0.1, **options)
    write_recipe(resolved_options([args]), tmp_path / "recipe.yaml", program="finetune")
    assert read_recipe(str(tmp_path / "recipe.yaml"))[1].get("strategy", "layerwise_decay") == strategy
    argv = ["--config", str(tmp_path / "recipe.yaml")]
    (again,) = parse_arguments((FineTuningArguments,), argv, prog="finetune", description="")
    for name in (*EFFECTS, "strategy", "slanted_triangular", "learning_rate"):
        assert getattr(again, name) == getattr(args, name), name


class Mixed(type(classifier("electra"))):
    """A classifier with a learned mix of the layers."""

    def __init__(self, config):
        super().__init__(config)
        self.scalar_mix = nn.Linear(config.num_hidden_layers + 1, 1, bias=False)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        states = self.electra(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        logits = self.classifier(self.scalar_mix(torch.stack(states, dim=-1)).squeeze(-1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("tunes", [False, True])
def test_a_mix_of_the_layers(tmp_path, tunes):
    model = Mixed(CONFIGS["electra"])
    before = weights(model)
    fine_tuner(tmp_path, model, strategy="scalar_mix", tune_encoder=tunes).train()
    names = moved(before, weights(model))
    assert "scalar_mix.weight" in names and any(name.startswith("classifier") for name in names)
    assert any(name.startswith("electra.") for name in names) == tunes


def test_the_columns_that_a_model_does_not_take_are_left_out_as_ever(tmp_path):
    rows = examples().add_column("text", ["a"] * 24)
    assert isinstance(rows, datasets.Dataset)
    trainer = fine_tuner(tmp_path, train=rows)
    assert set(next(iter(trainer.get_train_dataloader()))) == set(collate(list(examples(2))))
