"""The fine-tuning Trainer: what the layers' weights really move by, and how a batch may be cut."""

import pytest
import torch
from datasets import Dataset
from transformers import AlbertConfig, AutoModelForSequenceClassification, BertConfig, Trainer

from hf_pretrain.errors import InputError
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.transfer.fine_tuning import FineTuningArguments, FineTuningTrainer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def examples(count):
    rows = [[(7 * i + 3 * j) % 40 for j in range(6)] for i in range(count)]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * 6] * count, "labels": [i % 3 for i in range(count)]}
    )


def trainer(folder, *, config=None, **options):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config or BertConfig(**SIZES, num_labels=3))
    defaults = {
        "output_dir": str(folder),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = FineTuningArguments(**{**defaults, "max_steps": 1, "warmup_steps": 0, "logging_steps": 1, **options})
    return FineTuningTrainer(model, args, train_dataset=examples(32))


def updates(fine_tuning):
    """How far the first step moves each layer's weights, the embeddings' and the head's: the median, in learning rates."""
    names = [
        "bert.embeddings.word_embeddings",
        *(f"bert.encoder.layer.{i}.output.dense" for i in range(3)),
        "classifier",
    ]
    modules = [fine_tuning.model.get_submodule(name) for name in names]
    before = [module.weight.detach().clone() for module in modules]
    fine_tuning.train()
    moved = [(module.weight.detach() - old).abs() for module, old in zip(modules, before, strict=True)]
    return [float(step[step > 0].median()) / fine_tuning.args.learning_rate for step in moved]


@pytest.mark.parametrize(
    ("options", "powers"),
    [
        ({}, [4, 3, 2, 1, 0]),
        ({"layerwise_decay_mode": "official"}, [5, 4, 3, 2, 0]),
        ({"layerwise_learning_rate_decay": 1.0}, [0, 0, 0, 0, 0]),
    ],
    ids=["paper", "official", "off"],
)
def test_the_measured_update_scales_with_the_depth(tmp_path, options, powers):
    """Adam's first step is one learning rate long, whatever the gradient."""
    options = {"layerwise_learning_rate_decay": 0.5, "weight_decay": 0.0, "max_grad_norm": 0.0} | options
    measured = updates(trainer(tmp_path, adam_epsilon=1e-12, **options))
    assert measured == pytest.approx([0.5**power for power in powers], rel=1e-2)


def test_the_schedule_scales_every_layer_alike_and_the_heads_rate_is_logged(tmp_path):
    fine_tuning = trainer(tmp_path, max_steps=4, warmup_steps=0)
    fine_tuning.train()
    rates = [row["learning_rate"] for row in fine_tuning.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-4 * (1 - step / 4) for step in range(4)])


@pytest.mark.parametrize("cut", [(8, 2), (4, 4)])
def test_the_gradient_does_not_depend_on_accumulation(tmp_path, cut):
    def norm(batch, steps):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        run = trainer(tmp_path, **options)
        run.train()
        return next(row["grad_norm"] for row in run.state.log_history if "grad_norm" in row)

    assert norm(*cut) == pytest.approx(norm(16, 1), rel=1e-4)


def test_weight_decay_spares_norms_and_biases(tmp_path):
    fine_tuning = trainer(tmp_path)
    fine_tuning.create_optimizer()
    decayed = {id(p) for group in fine_tuning.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in fine_tuning.model.named_parameters() if id(p) in decayed}
    assert names == set(fine_tuning.get_decay_parameter_names(fine_tuning.model))


def test_the_defaults_are_those_of_electra(tmp_path):
    (args,) = parse_arguments(
        (FineTuningArguments,), ["--output_dir", str(tmp_path)], prog="fine-tune", description=""
    )
    assert (args.learning_rate, args.layerwise_learning_rate_decay, args.weight_decay) == (1e-4, 0.8, 0.01)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.get_warmup_steps(200)) == (3, 32, 20)
    assert args.layerwise_decay_mode == "paper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise_learning_rate_decay": 0.0}, "above 0"),
        ({"layerwise_decay_mode": "papers"}, "layerwise_decay_mode='papers' must be one of paper, official"),
    ],
)
def test_bad_values_are_refused_with_the_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **options)


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path, monkeypatch):
    fine_tuning = trainer(tmp_path)
    low_rank = (torch.optim.AdamW, {"params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *args: low_rank))
    with pytest.raises(InputError, match="optim=adamw_torch.* groups"):
        fine_tuning.create_optimizer()


def test_albert_is_refused_unless_all_learn_alike(tmp_path):
    sizes = {**SIZES, "num_labels": 3, "embedding_size": 8}
    with pytest.raises(InputError, match="AlbertModel"):
        trainer(tmp_path, config=AlbertConfig(**sizes)).train()
    trainer(tmp_path, config=AlbertConfig(**sizes), layerwise_learning_rate_decay=1.0).train()
