"""Batches and runs of replaced token detection, for its tests."""

import torch

from method_matrix import programs

PROGRAM = programs()["rtd"]
BERT = {"model_type": "bert", "generator_size": 1.0}
ROBERTA = {"model_type": "roberta", "generator_size": 1.0}
UNTIED = {"embedding_sharing": "none"}
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
    """Make the generator all but sure of these tokens, everywhere."""
    with torch.no_grad():
        model.generator.get_output_embeddings().bias[token_ids] = LIKELY


def embeddings(model):
    return dict(model.base_model.embeddings.named_parameters())


def assert_stock(folder, auto_class, **options):
    """Open a checkpoint with stock transformers; nothing may be missing or left over."""
    loaded, info = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return loaded.eval()


# Plain gradient descent: Adam would blow up the rounding of gradients that are all but zero.
STEPS = {"max_steps": 4, "learning_rate": 0.02, "optim": "sgd", "adam_bias_correction": True}
MODES = {
    "joint": {},
    "decoupled": {"training_mode": "decoupled", "model_options": {"embedding_sharing": "gdes"}},
    "two_stage": {
        "training_mode": "two_stage",
        "model_options": {"embedding_sharing": "none", "generator_size": 1.0},
    },
}
