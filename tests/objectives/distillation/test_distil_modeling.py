"""What the losses compare through the model, what they count, and that a student learns, resumes and is exported."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DebertaV2Config,
    ModernBertConfig,
)

from helpers.distilled import ALL, OF_STATES, OF_TEACHER, SIZES, bert, collator, examples, pair
from helpers.method_matrix import VOCAB_SIZE, build, collate, relative_difference
from hf_pretrain.objectives.distillation import METHOD as distil


class TestOfEqualModels:
    """Oracle: of a teacher that is a copy of the student there is nothing to learn."""

    @pytest.mark.parametrize("projection", ["shared", "per_layer"])
    def test_every_loss_is_zero(self, projection):
        student = bert()
        joined = pair(*OF_TEACHER, student=student, teacher=copy.deepcopy(student), projection=projection)
        assert not joined.projections
        for name, loss in joined(**collator()(examples())).losses.items():
            energy = 1e3 if name == "attention" else 1.0
            assert loss.sum.sum() / loss.count.sum() <= 1e-6 * energy, name

    def test_another_teacher_is_seen_by_every_loss(self):
        joined = pair(*OF_TEACHER, teacher=bert(seed=7))
        for name, loss in joined(**collator()(examples())).losses.items():
            assert loss.sum.sum() / loss.count.sum() > 1e-2, name


class TestWhatIsCompared:
    def test_layers_by_the_map(self):
        """Teacher layers of constant states, 1, 2, ...: the student's layer m is compared with g(m), in states and attention."""
        student, teacher = bert(BertModel, hidden_size=8), bert(BertModel, hidden_size=8, num_hidden_layers=6)
        for number, layer in enumerate(teacher.encoder.layer, start=1):
            layer.output.LayerNorm.weight.data.zero_()
            layer.output.LayerNorm.bias.data.fill_(number)
        for spec, layers in (("uniform", (3, 6)), ("last", (5, 6)), ("1,4", (1, 4)), ("2,2", (2, 2))):
            joined = pair("hidden", "attention", student=student, teacher=copy.deepcopy(teacher), layer_map=spec)
            inputs = {name: collator()(examples())[name] for name in ("input_ids", "attention_mask")}
            seen = joined.teacher(inputs)
            assert sorted(seen.hidden) == sorted(seen.attention) == sorted(set(layers))
            found = joined(**inputs).losses["hidden"]
            own = joined.runner(joined.student, inputs).hidden
            expected = sum(
                ((own[m] - tag) ** 2).mean(-1)[inputs["attention_mask"] == 1].sum() for m, tag in enumerate(layers, 1)
            )
            torch.testing.assert_close(found.sum.sum(), expected)

    def test_embeddings_with_embeddings_behind_their_norm(self):
        joined = pair("embedding", student=bert(BertModel), teacher=bert(BertModel, seed=3))
        batch = collator()(examples())
        ours, theirs = (m.embeddings(batch["input_ids"]) for m in (joined.student, joined.teacher.model))
        expected = ((ours - theirs) ** 2).mean(-1)[batch["attention_mask"] == 1]
        loss = joined(**batch).losses["embedding"]
        torch.testing.assert_close(loss.sum.sum(), expected.sum())
        assert loss.count.sum() == len(expected)

    def test_relations_of_the_last_layer_with_the_chosen_one(self):
        joined = pair(
            "relation_vv", student=bert(BertModel), teacher=bert(BertModel, num_hidden_layers=4), teacher_layer=3
        )
        student, teacher = joined.config.requests()
        assert (student.attention, teacher.attention, student.hidden, teacher.hidden) == ((2,), (3,), (), ())

    @pytest.mark.parametrize("positions", ["masked", "all"])
    def test_predictions_at_the_positions_that_are_asked_for(self, positions):
        joined = pair("prediction", "mlm", prediction_positions=positions, temperature=3.0)
        batch = collator()(examples())
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours, theirs = (m(**inputs).logits / 3 for m in (joined.student, joined.teacher.model))
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1) * 9
        asked = batch["labels"] != -100 if positions == "masked" else batch["attention_mask"] == 1
        losses = joined(**batch).losses
        torch.testing.assert_close(losses["prediction"].sum, (kl * asked).sum(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(losses["prediction"].count, asked.sum(1).float())
        assert torch.equal(losses["mlm"].count, (batch["labels"] != -100).sum(1).float())

    def test_student_and_teacher_read_the_same_corruption(self):
        joined, seen = pair("prediction", "mlm"), []
        for part in (joined.student, joined.teacher.model):
            part.bert.embeddings.register_forward_hook(
                lambda m, a, kwargs, o: seen.append(kwargs["input_ids"]), with_kwargs=True
            )
        batch = collator()(examples())
        joined(**batch)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], batch["input_ids"])

    def test_official_projects_with_one_matrix_and_a_bias_of_equal_widths_too(self):
        joined = pair("embedding", "hidden", "prediction", teacher=bert(seed=7), tinybert_official=True)
        assert {name for name, _ in joined.projections.named_parameters()} == {"shared.weight", "shared.bias"}
        batch = collator()(examples())
        plain = pair("prediction", teacher=bert(seed=7), temperature=2.0)(**batch).losses["prediction"]
        official = pair("prediction", teacher=bert(seed=7), temperature=2.0, tinybert_official=True)(**batch).losses[
            "prediction"
        ]
        torch.testing.assert_close(official.sum, plain.sum / (4 * VOCAB_SIZE))

    @pytest.mark.parametrize(
        ("projection", "names"),
        [("shared", {"embedding", "hidden"}), ("per_layer", {"embedding", "hidden_1", "hidden_2"})],
    )
    def test_projections_have_no_bias(self, projection, names):
        joined = pair("embedding", "hidden", projection=projection)
        assert {name for name, _ in joined.projections.named_parameters()} == {f"{name}.weight" for name in names}

    def test_probabilities_are_another_loss_than_scores(self):
        batch = collator()(examples())
        scores, probs = (
            pair("attention", attention_target=kind)(**batch).losses["attention"] for kind in ("scores", "probs")
        )
        assert probs.sum.sum() < 0.1 * scores.sum.sum()
        assert torch.equal(scores.count, probs.count)


class TestCounts:
    """Padding counts nowhere, and what is counted from the batch is what the losses return."""

    def test_an_example_gives_the_same_alone_in_company_and_behind_padding(self):
        joined, rows = pair(*ALL), examples()
        batches = [collator()([row]) for row in rows]
        together, wide = collator()(rows), collator(pad_to_multiple_of=32)(rows)
        assert wide["input_ids"].shape[1] > together["input_ids"].shape[1]
        other_ids = wide | {"input_ids": wide["input_ids"].masked_fill(wide["attention_mask"] == 0, 17)}
        for name in ALL:
            alone = torch.stack([torch.stack(joined(**batch).losses[name])[:, 0] for batch in batches], dim=1)
            for batch in (together, wide, other_ids):
                torch.testing.assert_close(torch.stack(joined(**batch).losses[name]), alone, rtol=1e-4, atol=1e-4)

    def test_fillers_of_a_fixed_shape_do_not_count(self):
        joined, plain, filled = (
            pair("prediction", "mlm"),
            collator()(examples()),
            collator(target_slots=64)(examples()),
        )
        assert len(filled["target_positions"]) == 64 > len(plain["target_positions"])
        expected = joined(**plain).losses
        for name, loss in joined(**filled).losses.items():
            torch.testing.assert_close(loss, expected[name])

    def test_padding_gets_no_gradient(self):
        joined, batch = pair(*ALL), collator(pad_to_multiple_of=32)(examples())
        table = joined.get_input_embeddings()
        seen = []

        def keep(module, args, output):
            output.retain_grad()
            seen.append(output)

        table.register_forward_hook(keep)
        for name in ALL:
            joined(**batch).losses[name].sum.sum().backward()
            assert not seen[-1].grad[batch["attention_mask"] == 0].any(), name
            assert seen[-1].grad[batch["attention_mask"] == 1].any(), name

    @pytest.mark.parametrize("config", [BertConfig, ModernBertConfig, DebertaV2Config])
    def test_counts_from_the_batch_are_those_of_the_losses(self, config):
        """ModernBERT's local layers see pairs within a window; those of the two models need not agree."""
        options = (
            {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0}
            if config is ModernBertConfig
            else {}
        )
        options |= (
            {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
            if config is DebertaV2Config
            else {}
        )
        torch.manual_seed(0)
        students = [
            AutoModelForMaskedLM.from_config(config(**{**SIZES, **options, "num_hidden_layers": n})) for n in (2, 4)
        ]
        joined = pair(*ALL, student=students[0], teacher=students[1], layer_map="1,3")
        batch = collator()(examples())
        counted, losses = joined.count_targets(batch), joined(**batch).losses
        assert counted.keys() == losses.keys()
        for name, count in counted.items():
            assert float(count) == pytest.approx(float(losses[name].count.sum()), rel=1e-6), name
        if config is ModernBertConfig:
            assert joined.config.attention_windows == [None, 4]
            assert counted["attention"] < (batch["attention_mask"].sum(1) ** 2).sum() * 2

    def test_a_batch_without_targets_gives_zero_with_a_graph(self):
        """Of a rank that has none; the others wait for its gradients."""
        joined, batch = pair(*ALL), collator()(examples())
        nothing = batch | {
            "attention_mask": torch.zeros_like(batch["attention_mask"]),
            "labels": torch.full_like(batch["labels"], -100),
            "target_positions": batch["target_positions"][:0],
        }
        losses = joined(**nothing).losses
        for name, loss in losses.items():
            assert not loss.sum.any() and not loss.count.any(), name
            assert loss.sum.requires_grad, name
        sum(loss.sum.sum() for loss in losses.values()).backward()
        for name, parameter in joined.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and not parameter.grad.any(), name


def test_resume_brings_the_projections_back(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "projection": "per_layer",
    }
    straight = build(distil, tmp_path / "a", **options)
    straight.train()
    state = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    assert {name for name in state if name.startswith("projections.")} == {
        f"projections.{name}.weight" for name in ("cosine", "embedding", "hidden_1", "hidden_2")
    }
    resumed = build(distil, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in straight.model.projections.state_dict().items():
        assert torch.equal(value, resumed.model.projections.state_dict()[name])
        assert not torch.equal(value, state[f"projections.{name}"])


def test_the_export_of_an_encoder_is_stock(tmp_path):
    options = {f"{name}_weight": float(name in ("embedding", "hidden", "attention")) for name in ALL}
    trainer = build(distil, tmp_path, **options)
    trainer.train()
    trainer.save_model()
    assert not {name for name in load_file(tmp_path / "model.safetensors") if "projection" in name}
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"pooler"} and not info["unexpected_keys"]
    inputs = {
        name: value for name, value in collate(trainer, examples()).items() if name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        trained = trainer.model.student.eval()(**inputs).last_hidden_state
        torch.testing.assert_close(loaded.eval()(**inputs).last_hidden_state, trained)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = build(distil, tmp_path / str(checkpointing), activation_checkpointing=checkpointing)
        trainer.train()
        gradients.append(trainer.recorder.gradients[0])
    assert relative_difference(*gradients) < 1e-5


@pytest.mark.parametrize("name", OF_STATES)
def test_each_loss_alone_is_learned(tmp_path, name):
    weights = {f"{other}_weight": float(other == name) for other in ALL}
    options = {"max_steps": 40, "learning_rate": 5e-3, "logging_steps": 40, "per_device_train_batch_size": 16}
    trainer = build(distil, tmp_path, **weights, **options)
    before = trainer.evaluate()[f"eval_{name}_loss"]
    trainer.train()
    assert trainer.evaluate()[f"eval_{name}_loss"] < 0.6 * before
    assert math.isfinite(before)
