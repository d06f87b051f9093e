"""Strategies of fine-tuning: what moves and what stays to the bit, the rate of each part at each step, and exact resumes."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.strategy_runs import (
    CONFIGS,
    DEFAULTS,
    WITHOUT_DROPOUT,
    Rates,
    Weights,
    classifier,
    collate,
    examples,
    fine_tuner,
    moved,
    weights,
)
from hf_pretrain.transfer.fine_tuning import FineTuningTrainer
from hf_pretrain.transfer.layers import reinitialise_layers
from hf_pretrain.transfer.strategies import slanted_triangular, strategy_report

PARTS = {
    "head": ("classifier.", "bert.pooler."),
    "layer 3": ("bert.encoder.layer.2.",),
    "layer 2": ("bert.encoder.layer.1.",),
    "layer 1": ("bert.encoder.layer.0.",),
    "embeddings": ("bert.embeddings.",),
}


def parts_of(names):
    """The parts of a BERT that names of parameters belong to."""
    assert all(any(name.startswith(starts) for starts in PARTS.values()) for name in names)
    return {part for part, starts in PARTS.items() if any(name.startswith(starts) for name in names)}


def each_epoch(trainer):
    """The parts that move in each epoch of a training."""
    kept = Weights()
    trainer.add_callback(kept)
    trainer.train()
    return [parts_of(names) for names in kept.moved()]


GRADUAL = [set(list(PARTS)[: number + 1]) for number in range(5)]


def test_gradual_unfreezing_moves_one_part_more_each_epoch_and_leaves_the_others_to_the_bit(tmp_path):
    assert each_epoch(fine_tuner(tmp_path, strategy="gradual", num_train_epochs=5)) == GRADUAL


def test_the_stock_trainer_never_moves_what_is_unfrozen_later(tmp_path):
    """The oracle above fails where the optimizer is made of what requires a gradient at first."""
    model = classifier()
    ends = list(PARTS.values())

    class Unfreezing(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            starts = sum(ends[: round(state.epoch) + 1], ())
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(starts))

    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.requires_grad_(False)
    args = TrainingArguments(output_dir=str(tmp_path), **{**DEFAULTS, "num_train_epochs": 5})
    stock = Trainer(model, args, train_dataset=examples(), data_collator=collate, callbacks=[Unfreezing()])
    found = each_epoch(stock)
    assert found == [{"head"}] * 5 and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("every", "begins"), [(2, [0, 2, 4, 6, 8]), (0.25, [0, 3, 6, 9, 12]), (None, [0, 3, 6, 9, 12])]
)
def test_when_a_layer_begins_to_move(tmp_path, every, begins):
    rates = Rates()
    trainer = fine_tuner(tmp_path, callbacks=[rates], strategy="gradual", num_train_epochs=4, unfreeze_every=every)
    trainer.train()
    for part, begin in zip(PARTS, begins, strict=True):
        found = [rate for step in rates.steps for rate in {rate for name, rate in step if name == part}]
        assert found == pytest.approx([0.0 if step < begin else 1e-2 * (1 - step / 12) for step in range(12)])
        assert found[:begin] == [0.0] * begin
    assert trainer.learning_rates() == dict.fromkeys(PARTS, 0.0)


ALONE = {"frozen": {"head"}, "top_layers": {"head", "layer 3", "layer 2"}}


@pytest.mark.parametrize("strategy", ALONE)
def test_what_is_frozen_stays_to_the_bit(tmp_path, strategy):
    found = each_epoch(fine_tuner(tmp_path, strategy=strategy, num_train_epochs=2))
    assert found == [ALONE[strategy]] * 2


def test_probe_then_tune(tmp_path):
    found = each_epoch(fine_tuner(tmp_path, strategy="probe_then_tune", num_train_epochs=4, probe_share=0.5))
    assert found == [{"head"}] * 2 + [set(PARTS)] * 2


def test_frozen_embeddings(tmp_path):
    assert each_epoch(fine_tuner(tmp_path, freeze_embeddings=True)) == [set(PARTS) - {"embeddings"}]


def test_bitfit_moves_the_head_and_the_biases_alone(tmp_path):
    kept = Weights()
    fine_tuner(tmp_path, strategy="bitfit", callbacks=[kept]).train()
    (names,) = kept.moved()
    assert names == {name for name in kept.kept[0] if name.endswith("bias") or name.startswith(PARTS["head"])}


def test_a_parameter_that_its_owner_froze_never_moves(tmp_path):
    model = classifier()
    model.bert.encoder.layer[2].output.requires_grad_(False)
    kept = Weights()
    fine_tuner(tmp_path, model, strategy="gradual", unfreeze_every=1, num_train_epochs=2, callbacks=[kept]).train()
    names = set.union(*kept.moved())
    assert (
        not [name for name in names if "layer.2.output" in name]
        and "bert.encoder.layer.2.intermediate.dense.bias" in names
    )


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"strategy": "frozen"}, [True, True, True]),
        ({"strategy": "probe_then_tune", "probe_share": 0.67}, [True, True, False]),
        ({"strategy": "top_layers", "frozen_layers": 3}, [True, True, True]),
        ({"strategy": "top_layers", "frozen_layers": 2}, [False, False, False]),
    ],
    ids=["frozen", "probe", "no layer", "one layer"],
)
def test_an_encoder_that_is_frozen_as_a_whole_has_no_dropout(tmp_path, options, frozen):
    trainer = fine_tuner(tmp_path, **options)
    modes = []
    model = trainer.model
    model.bert.encoder.register_forward_hook(
        lambda *_: modes.append(
            (any(module.training for module in model.bert.encoder.modules()), model.dropout.training)
        )
    )
    trainer.train()
    assert modes == [(not is_frozen, True) for is_frozen in frozen]


@pytest.mark.parametrize("strategy", ["layerwise_decay", "discriminative"])
def test_a_step_of_plain_gradient_descent_is_scaled_by_the_decay(tmp_path, strategy):
    def step(**options):
        still = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 1.0}
        model = classifier(**WITHOUT_DROPOUT)
        before = weights(model)
        fine_tuner(tmp_path, model, **still, **options).train()
        return {name: after - before[name] for name, after in weights(model).items()}

    full = step(strategy="full")
    scaled = step(strategy=strategy, slanted_triangular=False)
    decay = {"layerwise_decay": 0.8, "discriminative": 1 / 2.6}[strategy]
    for power, starts in enumerate(PARTS.values()):
        for name in (name for name in full if name.startswith(starts)):
            torch.testing.assert_close(scaled[name], full[name] * decay**power, rtol=1e-3, atol=2e-7)
    assert all(full[name].abs().max() > 1e-6 for name in full if name.endswith("dense.weight"))


def traced(folder, **options):
    """The rate of each part at each step, as shares of the peak of the head."""
    rates = Rates()
    fine_tuner(folder, callbacks=[rates], num_train_epochs=4, **options).train()
    assert all(len({rate for name, rate in step if name == part}) == 1 for step in rates.steps for part in PARTS)
    return {part: [dict(step)[part] / 1e-2 for step in rates.steps] for part in PARTS}


def test_the_rates_of_ulmfit(tmp_path):
    """Equation 3 of the paper by hand: 12 steps, a quarter of which rise."""
    options = {"warmup_steps": 0.1, "slanted_cut_fraction": 0.25, "slanted_ratio": 32}
    found = traced(tmp_path, strategy="discriminative", **options)
    shares = [step / 3 if step < 3 else 1 - (step - 3) / (3 * (1 / 0.25 - 1)) for step in range(12)]
    for power, part in enumerate(PARTS):
        assert found[part] == pytest.approx([(1 + p * 31) / 32 / 2.6**power for p in shares])
    assert found["head"][3] == 1.0


@pytest.mark.parametrize(("total", "fraction"), [(100, 0.1), (1000, 0.1), (7, 0.1), (15, 0.1), (3, 0.5)])
def test_the_slanted_triangle(total, fraction):
    values = [slanted_triangular(step, total, cut_fraction=fraction, ratio=32) for step in range(total + 1)]
    cut = math.floor(total * fraction)
    assert values[cut] == max(values) == 1 and values[-1] == pytest.approx(1 / 32) and min(values) >= 1 / 32 - 1e-9
    assert values[0] == pytest.approx(1 / 32 if cut else 1)
    falls = [a - b for a, b in zip(values[cut:], values[cut + 1 :], strict=False)]
    assert falls == pytest.approx([falls[0]] * len(falls))


def test_the_rates_of_two_phases(tmp_path):
    """Each phase is a training with a schedule of its own; the head's rate is another in the first."""
    found = traced(tmp_path, strategy="probe_then_tune", probe_share=1 / 3, probe_learning_rate=3e-2, warmup_steps=2)
    first = [3 * share for share in (0, 0.5, 1, 0.5)]
    second = [0, 0.5, *[1 - step / 6 for step in range(6)]]
    assert found["head"] == pytest.approx(first + second)
    for part in list(PARTS)[1:]:
        assert found[part] == pytest.approx([0.0] * 4 + second)


def test_the_rate_of_the_head(tmp_path):
    found = traced(tmp_path, strategy="layerwise_decay", layerwise_learning_rate_decay=0.5, head_learning_rate=5e-2)
    for power, part in enumerate(PARTS):
        peak = 5 if part == "head" else 0.5**power
        assert found[part] == pytest.approx([peak * (1 - step / 12) for step in range(12)])


RESUMED = {
    "gradual": ({"strategy": "gradual"}, [2, 3, 5, 8, 10]),
    "probe": ({"strategy": "probe_then_tune", "freeze_embeddings": True}, [3, 6, 7]),
    "frozen": ({"strategy": "frozen"}, [5]),
    "rates": ({"strategy": "discriminative", "reinit_layers": 1, "warmup_steps": 0.1}, [4]),
    "lora": ({"strategy": "lora", "lora_dropout": 0.1}, [4]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_in_any_stage_is_exact(tmp_path, name):
    options, steps = RESUMED[name]
    saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 4, "logging_steps": 1, **options}
    whole = fine_tuner(tmp_path, **saving)
    whole.train()
    for step in steps:
        again = fine_tuner(tmp_path, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert not moved(weights(whole.model), weights(again.model)), step
        (state, groups), (other, others) = (trainer.optimizer.state_dict().values() for trainer in (whole, again))
        torch.testing.assert_close(state, other, rtol=0, atol=0)
        assert groups == others
        losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, again)]
        assert losses[0] == losses[1]


def test_accumulated_gradients_move_the_same(tmp_path):
    def final(**batch):
        trainer = fine_tuner(tmp_path, classifier(**WITHOUT_DROPOUT), strategy="gradual", num_train_epochs=5, **batch)
        return weights(trainer.model) if trainer.train() else None

    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    torch.testing.assert_close(final(**cut), final(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("strategy", ["gradual", "lora", "top_layers"])
def test_activations_that_are_computed_again_change_nothing(tmp_path, strategy):
    """Below frozen embeddings nothing asks for a gradient, and yet the layers have theirs."""

    def final(**options):
        model = classifier(**WITHOUT_DROPOUT)
        trainer = fine_tuner(tmp_path, model, strategy=strategy, num_train_epochs=3, optim="sgd", **options)
        return weights(trainer.model) if trainer.train() else None

    torch.testing.assert_close(final(activation_checkpointing=True), final(), rtol=1e-5, atol=1e-7)


def test_the_model_is_left_as_it_was_given(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="gradual", freeze_embeddings=True)
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert still and all(name.startswith("bert.embeddings.") for name in still)


def test_a_model_that_was_tuned_opens_as_a_stock_one_with_the_same_predictions(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="gradual", unfreeze_every=1)
    trainer.train()
    trainer.save_model()
    predicted = trainer.predict(examples()).predictions
    batch = {name: tensor for name, tensor in collate(list(examples())).items() if name != "labels"}
    opened = type(trainer.model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(opened(**batch).logits.detach(), torch.tensor(predicted), rtol=0, atol=1e-6)


def test_fresh_layers(tmp_path):
    """The last layers are drawn as those of a new model, the same for one seed; the others and the head stay."""
    model = classifier(hidden_size=64, intermediate_size=64)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 3.0)
        parameter._is_hf_initialized = True  # as those that are read from a file
    before = weights(model)
    reinitialise_layers(model, 2, seed=1)
    first = weights(model)
    assert parts_of(moved(before, first)) == {"layer 2", "layer 3"}
    assert all(
        value.std() == pytest.approx(0.02, rel=0.1)
        for name, value in first.items()
        if "layer.2" in name and name.endswith("weight") and value.ndim == 2
    )
    assert first["bert.encoder.layer.2.output.LayerNorm.weight"].eq(1).all()
    assert not first["bert.encoder.layer.2.output.dense.bias"].any()
    reinitialise_layers(model, 2, seed=1)
    assert not moved(first, weights(model))
    reinitialise_layers(model, 2, seed=2)
    assert moved(first, weights(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_layers_of_every_architecture(name):
    model = classifier(name)
    before = weights(model)
    if name == "albert":
        return
    reinitialise_layers(model, 1, seed=1)
    names = moved(before, weights(model))
    assert names and all(".2." in each for each in names)


def test_fresh_layers_are_drawn_when_training_begins(tmp_path):
    trainer = fine_tuner(tmp_path, reinit_layers=1, learning_rate=0.0)
    before = weights(trainer.model)
    trainer.train()
    once = weights(trainer.model)
    assert parts_of(moved(before, once)) == {"layer 3"}
    trainer.train()
    assert not moved(once, weights(trainer.model))


# What moves, by the beginning of the names: of the head, of the last layer, and of the embeddings.
NAMES = {
    "bert": (("classifier", "bert.pooler"), "bert.encoder.layer.2."),
    "roberta": (("classifier",), "roberta.encoder.layer.2."),
    "modernbert": (("classifier", "head"), "model.layers.2."),
    "distilbert": (("classifier", "pre_classifier"), "distilbert.transformer.layer.2."),
    "electra": (("classifier",), "electra.encoder.layer.2."),
    "albert": (("classifier", "albert.pooler"), None),
    "deberta": (("classifier", "pooler"), "deberta.encoder.layer.2."),
    "xlnet": (("sequence_summary", "logits_proj"), "transformer.layer.2."),
}


@pytest.mark.parametrize("strategy", ["frozen", "top_layers", "probe_then_tune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(tmp_path, name, strategy):
    head, last = NAMES[name]
    if strategy == "top_layers" and last is None:
        with pytest.raises(ValueError, match="AlbertModel"):
            fine_tuner(tmp_path, classifier(name), strategy=strategy)
        return
    options = {"top_layers": {"frozen_layers": 2}, "probe_then_tune": {"probe_share": 0.5, "num_train_epochs": 2}}
    kept = Weights()
    fine_tuner(tmp_path, classifier(name), callbacks=[kept], strategy=strategy, **options.get(strategy, {})).train()
    first, *rest = kept.moved()
    # A last norm, behind the layers, moves with the last of them.
    allowed = (*head, last, "model.final_norm") if strategy == "top_layers" else head
    assert first and all(each.startswith(allowed) for each in first)
    assert any(each.startswith(head) for each in first)
    if strategy == "top_layers":
        assert any(each.startswith(last) for each in first)
    if rest:
        assert any("embedding" in each for each in rest[0]) and len(rest[0]) > len(kept.kept[0]) / 2


def test_a_norm_behind_the_layers_belongs_to_the_encoder(tmp_path):
    report = strategy_report(classifier("modernbert"), fine_tuner(tmp_path, strategy="gradual").args)
    assert [(row.part, row.begins) for row in report][:3] == [
        ("head", "at once"),
        ("behind the layers", "after 1 epochs"),
        ("layer 3", "after 1 epochs"),
    ]


def test_the_report(tmp_path):
    trainer = fine_tuner(tmp_path, strategy="gradual", layerwise_learning_rate_decay=0.5, freeze_embeddings=True)
    report = strategy_report(trainer.model, trainer.args)
    assert [row.part for row in report] == list(PARTS)
    assert [row.learning_rate for row in report] == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3, 0])
    assert [row.begins for row in report] == ["at once", "after 1 epochs", "after 2 epochs", "after 3 epochs", "never"]
    assert sum(row.parameters for row in report) == trainer.model.num_parameters()
    assert report[1].parameters == sum(p.numel() for p in trainer.model.bert.encoder.layer[2].parameters())
    trainer.train()
    assert strategy_report(trainer.model, trainer.args) == report


def test_a_report_changes_nothing(tmp_path):
    model = classifier()
    strategy_report(model, fine_tuner(tmp_path, strategy="frozen").args)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_steps_hold_examples_of_about_one_length_in_an_order_of_their_epoch(tmp_path):
    def order(count=70, **options):
        trainer = fine_tuner(tmp_path, train=examples(count), per_device_train_batch_size=8, **options)
        sampler = trainer._get_train_sampler()
        epochs = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
        return epochs

    lengths = [len(row) for row in examples(70)["input_ids"]]
    first, second = order()
    assert sorted(first) == sorted(second) == list(range(70)) and first != second
    spread = [max(step) - min(step) for step in zip(*[iter([lengths[row] for row in first])] * 8, strict=False)]
    assert sum(spread) / len(spread) <= 1.5
    assert order() == [first, second] and order(seed=6) != [first, second] and order(data_seed=6) == order(seed=6)
    # Two micro-batches of a step share the step's lengths.
    assert order(gradient_accumulation_steps=2)[0] != first
    shuffled = order(train_sampling_strategy="random")[0]
    assert sorted(shuffled) == list(range(70)) and shuffled != first


def test_each_epoch_of_a_training_has_an_order_of_its_own(tmp_path):
    seen = []

    def watching(rows):
        seen.append([tuple(row["input_ids"]) for row in rows])
        return collate(rows)

    trainer = fine_tuner(tmp_path, num_train_epochs=2)
    trainer.data_collator = watching
    trainer.train()
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == sorted(map(tuple, examples()["input_ids"]))
    assert seen[:3] != seen[3:]


def test_any_module_can_be_tuned_as_a_whole(tmp_path):
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.EmbeddingBag(40, 3)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.words(input_ids)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    trainer = FineTuningTrainer(
        Bag(), fine_tuner(tmp_path, strategy="full").args, train_dataset=examples(), data_collator=collate
    )
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, weights(trainer.model)) == {"words.weight"}
