"""All heads at once in a Trainer: what every method has to pass."""

from dataclasses import replace

import pytest
import test_methods as matrix

from helpers.method_matrix import build, log_of, tiny_data
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.objectives.encoder import MASKED_LM as mlm
from hf_pretrain.objectives.encoder import DataCollatorForEncoder, MaskedLMTrainer
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining

HEADS = ("mlm", "pair", "span_boundary", "word_order")


def with_pairs(dataset):
    """Every third example is no pair; of the others the word tells the class."""
    labels = [-100 if i % 3 == 0 else ids[1] % 2 for i, ids in enumerate(dataset.base["input_ids"])]
    return EpochDataset(dataset.base.add_column("pair_label", labels))


def program_of(pair_classes):
    def build_trainer(data, model_args, args):
        data = replace(data, train_dataset=with_pairs(data.train_dataset), eval_dataset=with_pairs(data.eval_dataset))
        collator = DataCollatorForEncoder(
            data.tokenizer, heads=HEADS, word_order_probability=0.3, masking=args.masking, seed=args.seed
        )
        model = EncoderForPreTraining.from_arguments(
            model_args, data.tokenizer, heads=HEADS, pair_classes=pair_classes
        )
        return MaskedLMTrainer(model, args, data_collator=collator, **data.trainer_inputs())

    return replace(mlm, build_trainer=build_trainer)


@pytest.fixture(params=[2, 3])
def program(request):
    return program_of(request.param)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(program, tmp_path, batch, accumulation):
    """With one example at a time, some have no target of some head."""
    matrix.test_gradient_does_not_depend_on_how_the_batch_is_cut(program, tmp_path, batch, accumulation)


def test_gradient_is_that_of_the_weighted_means(program, tmp_path):
    matrix.test_gradient_is_that_of_the_weighted_means(program, tmp_path)


def test_resume_is_bit_exact(tmp_path):
    matrix.test_resume_is_bit_exact(program_of(3), tmp_path, 0)


def test_evaluation_is_weighted_by_targets_and_repeatable(program, tmp_path):
    matrix.test_evaluation_is_weighted_by_targets_and_repeatable(program, tmp_path)


def test_padding_changes_nothing(program, tmp_path):
    matrix.test_padding_changes_nothing(program, tmp_path)


def test_bf16_loss_is_near_fp32(program, tmp_path):
    matrix.test_bf16_loss_is_near_fp32(program, tmp_path)


def test_every_head_learns_and_is_logged(tmp_path):
    options = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 120}
    trainer = build(program_of(2), tmp_path, data=tiny_data(train=384, held_out=48), **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    row = next(row for row in log_of(trainer) if "loss" in row)
    for head in HEADS:
        assert f"{head}_loss" in row and f"eval_{head}_accuracy" in after
        assert after[f"eval_{head}_loss"] < before[f"eval_{head}_loss"]
    assert after["eval_pair_accuracy"] > 0.9
