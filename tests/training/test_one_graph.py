"""torch.compile: the batches of a training have one shape, and each method's forward is one graph that is compiled once."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import TrainerCallback

from helpers.method_matrix import all_programs, build, tiny_tokenizer
from hf_pretrain.corruption.masking import MaskingArguments
from hf_pretrain.corruption.rows import few_lengths
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

PROGRAMS = all_programs()
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Methods whose forward is no graph as a whole, and why.
BROKEN = {
    "clm": "the head takes a chunk of logits at a time, in an operation of its own",
    "distil": "a teacher may lie on another device, and the loss of its logits is an operation of its own",
    "distil-task": "as distil",
    "elmo": "dynamo traces no LSTM",
}
# Methods with a second graph, and why.
SECOND = {
    "recurrent-lm": "the first window has no memory",
    "plm": "the first window has no memory",
}
# The others take seconds to trace.
QUICK = ("encoder",)


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches_of(trainer, count=3):
    trainer.begin_training()
    loader = trainer.get_train_dataloader()
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def shapes_of(batch):
    """Shapes of all tensors of a batch, those of lists too."""
    flat = {
        f"{name} {number}": part
        for name, value in batch.items()
        for number, part in enumerate(value if isinstance(value, list) else [value])
    }
    return {name: tuple(part.shape) for name, part in flat.items() if isinstance(part, torch.Tensor)}


# An LSTM's batches have as many targets as words, and its graph is broken anyway.
@pytest.mark.parametrize("method", sorted(PROGRAMS.keys() - {"elmo"}))
def test_all_batches_have_one_shape(method, tmp_path):
    trainer = build(PROGRAMS[method], tmp_path, **COMPILED)
    batches = batches_of(trainer)
    assert len(batches) == 3
    assert [shapes_of(batch) for batch in batches[1:]] == [shapes_of(batches[0])] * 2
    # The tiny models have 32 positions.
    assert all(shape[1] <= 32 for name, shape in shapes_of(batches[0]).items() if name.endswith("input_ids 0"))
    plain = batches_of(build(PROGRAMS[method], tmp_path / "plain"))
    for batch, other in zip(batches, plain, strict=True):
        # Fillers are no targets.
        counts, others = (trainer.model.count_targets(one) for one in (batch, other))
        assert {name: int(count) for name, count in counts.items()} == {n: int(count) for n, count in others.items()}


@pytest.mark.parametrize(
    "method",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(PROGRAMS.keys() - BROKEN.keys())
    ],
)
def test_each_forward_is_one_graph(method, tmp_path):
    trainer = build(PROGRAMS[method], tmp_path, **COMPILED)
    batches, counter = batches_of(trainer), CompileCounter()
    trainer.runner.try_out(batches[0])
    model = torch.compile(trainer.model.train(), backend=counter, fullgraph=True, dynamic=False)
    losses = []
    for number, batch in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=number > (method in SECOND)):
            losses.append(trainer.compute_loss(model, batch))
    assert counter.frame_count == 1 + (method in SECOND)
    # With fillers and without, the loss is the same.
    plain = build(PROGRAMS[method], tmp_path / "plain")
    plain.model.train()
    for loss, batch in zip(losses, batches_of(plain), strict=True):
        torch.testing.assert_close(loss, plain.compute_loss(plain.model, batch), rtol=1e-5, atol=1e-6)


def test_a_compiled_run_is_one_graph_without_a_break(tmp_path):
    """Through the Trainer, which finds out what it needs of the stock model before the graph is made."""
    torch._dynamo.utils.counters.clear()
    trainer = build(PROGRAMS["mlm"], tmp_path, max_steps=3, **COMPILED)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class CountGraphs(TrainerCallback):
    """Keeps how many graphs there are after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *args, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["distil", "distil-task"])
def test_a_broken_graph_is_not_compiled_anew_at_each_step(method, tmp_path):
    torch._dynamo.utils.counters.clear()
    trainer = build(PROGRAMS[method], tmp_path, max_steps=4, **COMPILED)
    graphs = CountGraphs()
    trainer.add_callback(graphs)
    trainer.train()
    assert graphs.counts[0] and graphs.counts[1:] == [graphs.counts[1]] * 3


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 8 * 4),
        ({"mlm_probability": 0.01}, 8 * 1),
        ({"mlm_probability": "0:0.5, 100:0.1"}, 8 * 12),
        ({"masking_unit": "given"}, 8 * 24),
    ],
)
def test_the_number_of_slots_follows_from_length_and_rate(options, bound):
    collator = DataCollatorForMaskedLM(tiny_tokenizer(), masking=MaskingArguments(**options))
    collator.fix_shapes(num_rows=8, length=24)
    assert (collator.pad_to_multiple_of, collator.target_slots) == (24, bound)


@pytest.mark.parametrize("unit", ["token", "word"])
def test_targets_that_are_drawn_one_by_one_fit_the_slots(unit):
    masking = MaskingArguments(masking_count="bernoulli", masking_unit=unit)
    collator = DataCollatorForMaskedLM(tiny_tokenizer(), masking=masking)
    collator.fix_shapes(num_rows=8, length=100)
    words = [position % 3 == 0 for position in range(100)]
    rows = [{"input_ids": [7] * 100, "word_starts": words, "example_id": i, "epoch": 0} for i in range(800)]
    counts = {len(collator(rows[start : start + 8])["target_positions"]) for start in range(0, 800, 8)}
    assert counts == {collator.target_slots} and collator.target_slots < 8 * 50


def test_a_collator_keeps_the_numbers_it_was_made_with():
    collator = DataCollatorForMaskedLM(tiny_tokenizer(), pad_to_multiple_of=32, target_slots=5)
    collator.fix_shapes(num_rows=8, length=24)
    assert (collator.pad_to_multiple_of, collator.target_slots) == (32, 5)


@pytest.mark.parametrize(("longest", "step"), [(512, 64), (500, 50), (24, 24), (509, 509), (8, 8)])
def test_lengths_are_rounded_up_to_few_and_none_beyond_the_longest(longest, step):
    assert few_lengths(longest) == step
