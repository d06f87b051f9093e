"""Training from a teacher that was asked once: as with the teacher beside it, on two ranks and after a resume too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForMaskedLM

from helpers.distilled import UNCACHED, arguments, collator
from helpers.method_matrix import (
    VOCAB_SIZE,
    build,
    log_of,
    relative_difference,
    tiny_data,
    tiny_teacher,
    tiny_tokenizer,
)
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.observing import cache
from hf_pretrain.objectives.distillation import METHOD as distil
from hf_pretrain.objectives.distillation import DataCollatorForDistillation, DistillationTrainingArguments

CACHED = UNCACHED | {"cache_top_k": 8}


@pytest.fixture
def exact(monkeypatch):
    """Log-probabilities in 32 bits on disk: what 16 bits round is no fault of the training."""
    monkeypatch.setattr(cache, "_HALF", np.float32)


def train(folder, **options):
    trainer = build(distil, folder, max_steps=27, learning_rate=1e-3, **options)
    trainer.train()
    return trainer


def run_without_teacher(trainer):
    """Let the teacher fail if it is asked in training."""

    def fail(*args, **kwargs):
        raise AssertionError("the teacher was asked")

    handle = trainer.model.teacher.model.register_forward_pre_hook(fail)
    trainer.train()
    handle.remove()


class TestOfAllTokens:
    @pytest.mark.usefixtures("exact")
    def test_the_run_is_that_with_the_teacher(self, tmp_path):
        """Over three epochs, the third with the masks of the first."""
        live = train(tmp_path / "live", **UNCACHED)
        cached = train(tmp_path / "cached", **UNCACHED, cache_top_k=VOCAB_SIZE)
        first = cached.recorder.gradients[0]
        assert relative_difference(first, live.recorder.gradients[0]) < 1e-5
        for ours, theirs in zip(log_of(cached), log_of(live), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name

    def test_16_bits_round_little(self, tmp_path):
        live, cached = (
            build(distil, tmp_path / str(k), **UNCACHED, cache_top_k=k, max_steps=1) for k in (0, VOCAB_SIZE)
        )
        for trainer in (live, cached):
            trainer.train()
        assert relative_difference(cached.recorder.gradients[0], live.recorder.gradients[0]) < 2e-3


class TestOfSomeTokens:
    def test_the_loss_is_that_of_the_kept_tokens_and_all_others_as_one(self, tmp_path):
        trainer = build(distil, tmp_path, **CACHED)
        model, rows = trainer.model.eval(), [17, 3, 40]
        batch = trainer.data_collator([trainer.train_dataset[EPOCH_STRIDE + row] for row in rows])
        shared = {n: v for n, v in batch.items() if n not in ("teacher_ids", "teacher_log_probs")}
        with torch.no_grad():
            found = model(**batch).losses["prediction"]
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            both = [m(**inputs).logits.flatten(0, 1)[batch["target_positions"]] / 2 for m in model.stock_models()]
            whole = model(**shared).losses["prediction"]
        ours, theirs = (one.double().softmax(-1) for one in both)
        ids = theirs.topk(8).indices
        assert torch.equal(batch["teacher_ids"], ids)
        ours, theirs = (torch.cat([p.gather(1, ids), 1 - p.gather(1, ids).sum(1, True)], 1) for p in (ours, theirs))
        kl = 4 * (theirs * (theirs / ours).log()).sum(1)
        assert found.sum.sum().item() == pytest.approx(kl.sum().item(), rel=2e-3)
        assert torch.equal(found.count, whole.count)
        # What is told apart less diverges less.
        assert 0 < found.sum.sum() < whole.sum.sum()

    def test_the_teacher_is_not_run_in_training_but_in_evaluation(self, tmp_path):
        trainer = build(distil, tmp_path, **CACHED, max_steps=14)
        run_without_teacher(trainer)
        assert {"eval_prediction_loss", "eval_agreement", "eval_teacher_mlm_loss"} <= trainer.evaluate().keys()

    def test_it_is_learned_from(self, tmp_path):
        trainer = build(distil, tmp_path, **CACHED | {"mlm_weight": 0.0}, max_steps=60, learning_rate=5e-3)
        before = trainer.evaluate()["eval_prediction_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_prediction_loss"] < 0.6 * before

    def test_fillers_of_a_fixed_shape_do_not_count(self, tmp_path):
        trainer = build(distil, tmp_path, **CACHED)
        model, rows = trainer.model.eval(), [trainer.train_dataset[row] for row in (5, 2)]
        options = {"masking": trainer.args.masking, "seed": trainer.args.seed, "target_slots": 64}
        filled = DataCollatorForDistillation(tiny_tokenizer(), **options)(rows)
        assert len(filled["target_positions"]) == len(filled["teacher_ids"]) == 64
        expected = model(**trainer.data_collator(rows)).losses
        for name, loss in model(**filled).losses.items():
            torch.testing.assert_close(loss, expected[name])


class TestLawsOfTheTrainer:
    def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(self, tmp_path):
        whole = build(distil, tmp_path / "a", **CACHED)
        cut = build(distil, tmp_path / "b", **CACHED, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        for trainer in (whole, cut):
            trainer.train()
        assert relative_difference(whole.recorder.gradients[0], cut.recorder.gradients[0]) < 1e-4

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resume_is_exact_and_asks_no_more(self, tmp_path, workers):
        options = {
            "max_steps": 16, "save_strategy": "steps", "save_steps": 7, "dataloader_num_workers": workers, **CACHED
        }  # fmt: skip
        straight = build(distil, tmp_path, **options)
        straight.train()
        resumed = build(distil, tmp_path, **options)
        written = (tmp_path / "_teacher_top_k" / "ids.int32").stat().st_mtime_ns
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
        assert written == (tmp_path / "_teacher_top_k" / "ids.int32").stat().st_mtime_ns
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name

    def test_two_ranks_have_the_gradient_of_one_process(self, tmp_path):
        alone = build(distil, tmp_path / "alone", **CACHED)
        alone.train()
        run_on_two_ranks("helpers.top_k_worker", tmp_path)
        for rank in range(2):
            gradients = torch.load(tmp_path / f"gradients-{rank}.pt")
            gradients = {name.removeprefix("module."): value for name, value in gradients.items()}
            assert relative_difference(alone.recorder.gradients[0], gradients) < 1e-4


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"cache_top_k": -1}, "cache_top_k=-1"),
            ({"static_masks": 0}, "set static_masks"),
            ({"cosine_weight": 1.0}, "the cosine loss needs its states: set cosine_weight=0"),
            ({"hidden_weight": "0:0, 5:1"}, "the hidden loss needs its states"),
            ({"prediction_positions": "all"}, "prediction_positions=masked"),
            ({"temperature": "0:2, 5:1"}, "give temperature='0:2, 5:1' one number"),
            ({"mlm_probability": "0:0.3, 5:0.15"}, "give mlm_probability='0:0.3, 5:0.15' one number"),
            ({"prediction_weight": 0.0}, "is for the prediction loss"),
        ],
    )
    def test_what_cannot_be_cached(self, options, match):
        with pytest.raises(InputError, match=match):
            DistillationTrainingArguments(output_dir="unused", bf16=False, **CACHED | options)

    def test_the_preset_of_distilbert_says_which_weight_to_set(self):
        with pytest.raises(InputError, match="cosine_weight=0"):
            DistillationTrainingArguments(output_dir="unused", bf16=False, cache_top_k=64, static_masks=3)

    def test_a_stream(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(())

        data = replace(tiny_data(), train_dataset=Stream())
        with pytest.raises(InputError, match="cache_top_k=8 looks examples up again, which a stream"):
            build(distil, tmp_path, data, **CACHED)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"seed": 7}, "another masking"),
            ({"mlm_probability": 0.3}, "another masking"),
            ({"static_masks": 3}, "another kept and another masking"),
            ({"temperature": 1.0}, "another kept"),
            ({"cache_top_k": 9}, "another kept"),
            ({"teacher_dtype": "bfloat16"}, "another teacher"),
        ],
    )
    def test_a_cache_of_another_run(self, tmp_path, change, match):
        build(distil, tmp_path, **CACHED)
        build(distil, tmp_path, **CACHED, learning_rate=1.0)
        with pytest.raises(InputError, match=match):
            build(distil, tmp_path, **CACHED | change)

    def test_a_cache_of_another_teacher_or_other_text(self, tmp_path):
        build(distil, tmp_path / "run", **CACHED)
        with pytest.raises(InputError, match="another data"):
            build(distil, tmp_path / "run", tiny_data(train=95), **CACHED)
        teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher(AutoModelForMaskedLM).name)
        with torch.no_grad():
            teacher.cls.predictions.bias[3] += 1e-3
        for part in (teacher, tiny_tokenizer()):
            part.save_pretrained(tmp_path / "teacher")
        with pytest.raises(InputError, match="another teacher"):
            options = {"teacher_name_or_path": str(tmp_path / "teacher")}
            build(distil, tmp_path / "run", **CACHED, model_options=options)


def test_without_a_cache_the_collator_is_that_of_masked_language_models():
    rows = [tiny_data().train_dataset[i] for i in range(4)]
    ours, plain = DataCollatorForDistillation(tiny_tokenizer())(rows), collator()(rows)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)
    assert arguments("prediction").cache_top_k == 0
