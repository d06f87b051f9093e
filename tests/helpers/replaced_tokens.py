"""Batches and runs of replaced token detection, for its tests."""

import dataclasses

import torch
from datasets import Dataset

from helpers.method_matrix import programs, tiny_data
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset, EpochSampler

PROGRAM = programs()["rtd"]
BERT = {"model_type": "bert", "generator_size": 1.0}
ROBERTA = {"model_type": "roberta", "generator_size": 1.0}
UNTIED = {"embedding_sharing": "none"}
DEBERTA = {
    "model_type": "deberta-v2",
    "generator_size": 1.0,
    "generator_layers": 0.5,
    "embedding_sharing": "gdes",
    "discriminator_head": "deberta_v3",
    "enhanced_mask_decoder": True,
    "config_overrides": '{"position_biased_input": false, "relative_attention": true, "position_buckets": 8, '
    '"norm_rel_ebd": "layer_norm", "share_att_key": true, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, '
    '"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}',
}
LIKELY = 1e4


def batch_of(trainer, count=12, *, start=0):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + count)])


def originals(trainer, batch, *, start=0):
    ids = torch.zeros_like(batch["input_ids"])
    for row in range(len(ids)):
        example = trainer.train_dataset[start + row]["input_ids"]
        ids[row, : len(example)] = torch.tensor(example)
    return ids


def run(model, batch):
    """Return the output in evaluation mode and what the discriminator was given."""
    seen = {}
    handle = model.discriminator.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        output = model.eval()(**batch)
    handle.remove()
    return output, seen


def favour(model, token_ids):
    """Make the generator almost certain of these tokens, everywhere."""
    with torch.no_grad():
        model.generator.get_output_embeddings().bias[token_ids] = LIKELY


def embeddings(model):
    return dict(model.base_model.embeddings.named_parameters())


def assert_stock(folder, auto_class, **options):
    """Open a checkpoint with stock transformers; nothing may be missing or left over."""
    loaded, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return loaded.eval()


# Plain gradient descent: Adam would enlarge the rounding errors of nearly zero gradients.
STEPS = {"max_steps": 4, "learning_rate": 0.02, "optim": "sgd", "adam_bias_correction": True}
MODES = {
    "joint": {},
    "decoupled": {"training_mode": "decoupled", "model_options": {"embedding_sharing": "gdes"}},
    "two_stage": {
        "training_mode": "two_stage",
        "model_options": {"embedding_sharing": "none", "generator_size": 1.0},
    },
}


def data_with_an_empty_rank():
    """Eight examples; in a step, the second of two ranks gets the four that have only special tokens."""
    data = tiny_data(train=8)
    rows = [{name: row[name] for name in ("input_ids", "word_starts")} for row in data.train_dataset.base]
    for index in list(EpochSampler(8, seed=42))[4:]:
        rows[index % EPOCH_STRIDE] = {"input_ids": [2, 3], "word_starts": [True, True]}
    return dataclasses.replace(data, train_dataset=EpochDataset(Dataset.from_list(rows)))
