"""Replaced token detection under torch.compile: one graph, compiled once, with the losses and gradients of the eager model."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import ElectraForPreTraining

from helpers.method_matrix import build, log_of, relative_difference
from helpers.replaced_tokens import MODES, PROGRAM, assert_stock, batch_of

PAIRS = {
    "tied": {},
    "gdes": {"embedding_sharing": "gdes", "discriminator_head": "deberta_v3"},
    "narrow": {"model_type": "bert", "generator_size": 0.5},
}


@pytest.fixture(autouse=True)
def afresh():
    """A second compilation of anything is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def fix_shapes(trainer):
    trainer.data_collator.target_slots = 64
    trainer.data_collator.pad_to_multiple_of = 24
    return trainer


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    losses = model(**batch).losses
    loss = losses["mlm"].sum.sum() + 50 * losses["rtd"].sum.sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_every_batch_runs_the_one_graph(tmp_path):
    """However many targets the batch has, and whatever the temperature of the step."""
    trainer = fix_shapes(build(PROGRAM, tmp_path))
    model, counter = trainer.model.train(), CompileCounter()
    compiled, counts = torch.compile(model, backend=counter, fullgraph=True), set()
    for start in range(0, 48, 12):
        batch = batch_of(trainer, start=start)
        counts.add(int((batch["labels"] != -100).sum()))
        compiled(**batch, temperature=torch.tensor(1.0 + start))
    assert counter.frame_count == 1 and len(counts) > 1
    table = model.generator.get_input_embeddings().weight
    assert model.generator.get_output_embeddings().weight is table


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_compiled_losses_and_gradients_are_the_eager_ones(tmp_path, name):
    trainer = fix_shapes(build(PROGRAM, tmp_path, model_options=PAIRS[name]))
    model = trainer.model.train()
    compiled = torch.compile(model, fullgraph=True)
    for start in range(0, 48, 12):
        batch = batch_of(trainer, start=start)
        expected, gradients = loss_and_gradients(model, batch)
        model.zero_grad(set_to_none=True)
        loss, compiled_gradients = loss_and_gradients(compiled, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        found = {key.removeprefix("_orig_mod."): value for key, value in compiled_gradients.items()}
        assert relative_difference(gradients, found) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_run_is_the_eager_run(tmp_path, mode):
    """Through the Trainer, in every mode; a half of a step has a graph of its own."""
    rows, options = [], {**MODES[mode], "max_steps": 4, "learning_rate": 1e-3}
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    for extra in ({}, compiling):
        trainer = fix_shapes(build(PROGRAM, tmp_path / str(len(rows)), **options, **extra))
        with torch._dynamo.config.patch(error_on_recompile=False):
            trainer.train()
        rows.append(log_of(trainer))
    for row, other in zip(*rows, strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    trainer.save_model()
    assert_stock(tmp_path / "1", ElectraForPreTraining)
