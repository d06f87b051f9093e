"""Tests of every method: normalisation, resume, export, evaluation, bad input."""

import json

import pytest
import torch
from accelerate import PartialState, skip_first_batches
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from helpers.method_matrix import (
    all_programs,
    build,
    collate,
    forward_in_order,
    isolated,
    log_of,
    relative_difference,
    tiny_data,
    tiny_tokenizer,
)
from helpers.two_rank_worker import PART_TOKENS, UNEVEN_RUNS, build_uneven
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.errors import InputError

PROGRAMS = all_programs()
METHODS = sorted(PROGRAMS)


@pytest.fixture(params=METHODS)
def program(request):
    return PROGRAMS[request.param]


def is_additive(program):
    """Whether the loss of a batch is the sum of those of its parts."""
    return program.name != "contrastive"


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(program, tmp_path, batch, accumulation):
    whole = build(program, tmp_path / "whole", per_device_train_batch_size=8)
    whole.train()
    cut = build(program, tmp_path / "cut", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    cut.train()
    assert relative_difference(whole.recorder.gradients[0], cut.recorder.gradients[0]) < 1e-4
    for name, value in log_of(whole)[0].items():
        if name.endswith("loss"):
            assert log_of(cut)[0][name] == pytest.approx(value, rel=1e-5)


def test_gradient_is_that_of_the_weighted_means(program, tmp_path):
    """The normalisation against a plain mean over one batch, written out."""
    trainer = build(program, tmp_path)
    first = list(trainer._get_train_sampler(trainer.train_dataset))[:8]
    batch = collate(trainer, [trainer.train_dataset[i] for i in first])
    trainer.train()
    fresh = build(program, tmp_path / "fresh")
    fresh.model.train()
    output = fresh.model(**batch)
    loss = sum(fresh.loss_weight(n) * x.sum.sum() / x.count.sum() for n, x in output.losses.items())
    loss.backward()
    expected = {n: p.grad for n, p in fresh.model.named_parameters() if p.grad is not None}
    assert relative_difference(expected, trainer.recorder.gradients[0]) < 1e-5
    counted = fresh.model.count_targets(batch)
    assert {n: int(x.count.sum()) for n, x in output.losses.items()} == {n: int(c) for n, c in counted.items()}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(program, tmp_path, workers):
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
        "learning_rate": 1e-3,
        "model_options": {"config_overrides": None},
    }
    straight = build(program, tmp_path / "straight", **options)
    straight.train()
    # 96 examples in steps of 24: step 4 ends an epoch, step 6 is inside one.
    for stop in (4, 6):
        resumed = build(program, tmp_path / f"resumed-{stop}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_checkpoint_is_whole_and_the_export_is_stock(program, tmp_path):
    trainer = build(program, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    composite = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    expected = set(trainer.model.state_dict()) - set(trainer.model.all_tied_weights_keys)
    assert set(composite) == expected
    trainer.save_model()
    for folder, attribute in trainer.model.export_parts.items():
        part = trainer.model.get_submodule(attribute)
        loaded, info = type(part).from_pretrained(tmp_path / folder, output_loading_info=True)
        # What only training needs may be of our own making.
        assert type(loaded).__module__.startswith(
            ("transformers.", "hf_pretrain." if folder else "hf_pretrain.models.")
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = torch.arange(5, 25).reshape(2, 10)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids)[0], part.eval()(ids)[0], atol=1e-6, rtol=0)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if not name.startswith("pooler")} == set()
    assert trainer.processing_class.get_vocab() == type(trainer.processing_class).from_pretrained(tmp_path).get_vocab()


def test_resume_refuses_another_model(program, tmp_path):
    build_options = {"save_strategy": "steps", "save_steps": 1}
    build(program, tmp_path / "a", **build_options).train()
    other = build(program, tmp_path / "b", model_options={"num_hidden_layers": 3}, max_steps=2)
    with pytest.raises(InputError, match="does not fit"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_evaluation_is_weighted_by_targets_and_repeatable(program, tmp_path):
    # Where texts are compared with those of their batch, all are in one.
    trainer = build(program, tmp_path, per_device_eval_batch_size=4 if is_additive(program) else 512)
    state = torch.random.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    stable = [name for name in second if "runtime" not in name and "per_second" not in name and "time" not in name]
    assert {n: first[n] for n in stable} == {n: second[n] for n in stable}
    trainer.model.eval()
    with torch.no_grad():
        outputs = list(forward_in_order(trainer, trainer.eval_dataset))
    losses = outputs[0].losses
    for name in losses:
        total, count = (
            sum(part.sum() for part in parts) for parts in zip(*(o.losses[name] for o in outputs), strict=True)
        )
        assert first[f"eval_{name}_loss"] == pytest.approx(float(total / count), rel=1e-5)
    weighted = sum(trainer.loss_weight(n) * first[f"eval_{n}_loss"] for n in losses)
    assert first["eval_loss"] == pytest.approx(weighted, rel=1e-6)


def test_padding_changes_nothing(program, tmp_path):
    trainer = build(program, tmp_path)
    model = trainer.model.eval()
    examples = [trainer.eval_dataset[i] for i in range(6)]
    tight = collate(trainer, examples)
    trainer.data_collator.pad_to_multiple_of = 32
    wide = collate(trainer, examples)
    assert wide["input_ids"].shape[1] > tight["input_ids"].shape[1]
    with torch.no_grad():
        for name, loss in model(**tight).losses.items():
            torch.testing.assert_close(model(**wide).losses[name].sum, loss.sum, atol=1e-4, rtol=1e-5)


# The others have masks that say more than where padding is, or noise that changes the lengths of rows; the example package shows
# the fewest lines that make a method, and leaves masks to the stock model.
@pytest.mark.parametrize("method", ["clm", "distil", "distil-task", "electric", "encoder", "mlm", "rtd"])
def test_full_rows_need_no_mask(method, tmp_path):
    """Without padding no stock model gets a mask, so that its attention takes the fastest path; with padding, one does."""
    trainer = build(PROGRAMS[method], tmp_path)
    examples = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    length = max(map(len, (example["input_ids"] for example in examples)))
    full = [example for example in examples if len(example["input_ids"]) == length][:3]
    collator, model = trainer._host_collator(), trainer.model.eval()
    batches = [collator(full), collator([full[0], *examples[:3]])]
    assert [bool(batch["attention_mask"].all()) for batch in batches] == [True, False]
    model(**batches[0])  # The first batch tries out what the stock model does with masks.
    masks = []
    for name, part in model.named_modules():
        if name and isinstance(part, PreTrainedModel) and not name.endswith("_tower"):
            part.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
            )
    model(**batches[0])
    assert masks and all(mask is None for mask in masks)
    model(**batches[1])
    assert method == "clm" or any(mask is not None for mask in masks)


# Examples of a task and lanes of text are no blocks of documents.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("distil-task", "recurrent-lm")])
def test_documents_are_kept_apart_or_refused(method, tmp_path):
    options = {"mem_len": 0} if method == "plm" else {}
    try:
        trainer = build(PROGRAMS[method], tmp_path, isolated(tiny_data()), **options)
    except InputError as error:
        assert "block_mode='isolated_documents'" in str(error)
    else:
        batch = collate(trainer, [trainer.train_dataset[i] for i in range(4)])
        assert batch["document_ids"].amax(1).tolist() == [1] * 4


# Those that take longest, and are in other tests too.
SLOW_TO_LEARN = ("distil", "distil-task", "electric", "encoder", "recurrent-lm", "token-deletion")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_LEARN else name for name in METHODS]
)
def test_learning_reaches_what_the_method_declares(method, tmp_path):
    program = PROGRAMS[method]
    expected = program.learning
    steps = {"max_steps": expected.steps, "logging_steps": expected.steps, "learning_rate": expected.learning_rate}
    data = tiny_data(train=expected.examples, held_out=150, text=expected.text)
    trainer = build(program, tmp_path, data, per_device_train_batch_size=16, **steps)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert expected.left, "a loss that must fall"
    for name, share in expected.left.items():
        assert after[f"eval_{name}"] < share * before[f"eval_{name}"], name
    for name, gain in expected.gained.items():
        assert after[f"eval_{name}"] > before[f"eval_{name}"] + gain, name
    for name, least in expected.least.items():
        assert after[f"eval_{name}"] > least, name


def test_bf16_loss_is_near_fp32(program, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = build(program, tmp_path / str(bf16), bf16=bf16)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("problem", ["empty", "binary", "no_mask", "long", "used"])
def test_bad_input_is_refused_in_one_line(problem, tmp_path, capsys):
    from hf_pretrain.cli import main

    corpus, output = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("\n\n".join(f"Sentence number {i} has some words." for i in range(200)))
    options = ["--train_file", str(corpus), "--output_dir", str(output), "--vocab_size", "200", "--max_steps", "1"]
    options += ["--hidden_size", "32", "--num_attention_heads", "2", "--num_hidden_layers", "1"]
    if problem == "empty":
        corpus.write_text("")
    elif problem == "binary":
        corpus.write_bytes(bytes(range(256)) * 10)
    elif problem == "no_mask":
        tokenizer = tiny_tokenizer()
        tokenizer.mask_token = None
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        options += ["--tokenizer_name", str(tmp_path / "tokenizer")]
    elif problem == "long":
        options += ["--block_size", "64", "--max_position_embeddings", "32"]
    elif problem == "used":
        output.mkdir()
        (output / "model.safetensors").write_text("precious")
    assert main(["mlm", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not list(output.glob("checkpoint-*"))
    if problem == "used":
        assert (output / "model.safetensors").read_text() == "precious"
    else:
        assert not list(output.glob("*.safetensors"))


def batches_of_ranks(trainer, monkeypatch, world_size, *, epoch=0, skip=0):
    """Yield the batches of each rank in an epoch, or in the rest of an epoch after a resume."""
    for rank in range(world_size):
        with monkeypatch.context() as patch:
            for state in (PartialState, AcceleratorState):
                patch.setitem(state._shared_state, "num_processes", world_size)
                patch.setitem(state._shared_state, "process_index", rank)
            loader = trainer.get_train_dataloader()
            # In the order of transformers' own loop.
            loader = skip_first_batches(loader, skip) if skip else loader
            loader.set_epoch(epoch)
            yield list(loader)


# Lanes of text are as many as the examples of a step, so there is nothing to fill. Texts that are compared with those of other
# ranks need these at work: tests/objectives/test_contrastive_modeling.py.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("recurrent-lm", "contrastive")])
@pytest.mark.parametrize(("ranks", "batch", "examples"), [(2, 2, 13), (4, 2, 9), (3, 4, 2)])
def test_the_last_step_of_several_ranks_is_that_of_one(method, tmp_path, monkeypatch, ranks, batch, examples):
    """Also if the last turn leaves ranks without an example, and if an epoch is shorter than one turn."""
    program, data = PROGRAMS[method], tiny_data(train=examples)
    options = {"learning_rate": 0.0, "num_train_epochs": 1, "max_steps": -1}
    options |= {"mem_len": 0} if method == "plm" else {}
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    alone = build(program, tmp_path / "alone", data, per_device_train_batch_size=ranks * batch, **options)
    alone.train()
    trainer = build(program, tmp_path / "ranks", data, **sizes, **options)
    trainer.model.train()
    of_ranks = list(batches_of_ranks(trainer, monkeypatch, ranks))
    for batches in of_ranks:
        trainer.runner.receive(batches)
    assert int(trainer.tokens.new) == alone.state.num_input_tokens_seen
    last = [batches[-1] for batches in of_ranks]
    counts = [trainer._get_num_items_in_batch([inputs], trainer.args.device) for inputs in last]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    for inputs in last:
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=totals).backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert relative_difference(alone.recorder.gradients[-1], found) < 1e-5
    assert sum(int(count) for count in totals.values()) > 0


@pytest.mark.parametrize("options", [{}, {"dataloader_drop_last": True}])
def test_several_ranks_go_on_in_the_middle_of_a_later_epoch(tmp_path, monkeypatch, options):
    """accelerate leaves the sampler in epoch 0 where it skips batches on several processes."""
    trainer = build(PROGRAMS["mlm"], tmp_path, tiny_data(train=13), per_device_train_batch_size=2, **options)
    for epoch in (1, 2):
        wholes, rests = (list(batches_of_ranks(trainer, monkeypatch, 2, epoch=epoch, skip=skip)) for skip in (0, 2))
        assert [len(whole) for whole in wholes] == [3 if options else 4] * 2
        for whole, rest in zip(wholes, rests, strict=True):
            for batch, other in zip(whole[2:], rest, strict=True):
                assert batch.keys() == other.keys()
                assert all(torch.equal(*map(torch.as_tensor, (batch[name], other[name]))) for name in batch)


class TestTwoRanks:
    """One run of two processes serves all the tests here."""

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ranks")
        run_on_two_ranks("helpers.two_rank_worker", folder)
        return folder

    @pytest.mark.parametrize("method", METHODS)
    def test_gradient_equals_one_process(self, results, tmp_path, method):
        alone = build(PROGRAMS[method], tmp_path, per_device_train_batch_size=8)
        alone.train()
        ranks = [torch.load(results / f"{method}-gradients-{rank}.pt") for rank in range(2)]
        for gradients in ranks:
            assert relative_difference(alone.recorder.gradients[0], gradients) < 1e-4

    @pytest.mark.parametrize("run", ["whole", "resumed"])
    @pytest.mark.parametrize("name", UNEVEN_RUNS)
    def test_a_short_last_step_equals_one_process(self, results, tmp_path, name, run):
        """Its gradient, and its logged losses and tokens: examples that fill the last turn do not count."""
        alone = build_uneven(name, tmp_path, per_device_train_batch_size=8)
        alone.train()
        for rank in range(2):
            found = torch.load(results / f"{name}-{run}-{rank}.pt")
            assert relative_difference(alone.recorder.gradients[-1], found["gradients"]) < 1e-5
            for row, other in zip(log_of(alone), found["log"], strict=True):
                assert row.keys() == other.keys()
                for entry in row:
                    if entry.endswith(("loss", "rate", "gain", "num_tokens")):
                        assert other[entry] == pytest.approx(row[entry], rel=1e-5), entry

    @pytest.mark.parametrize("method", METHODS)
    def test_every_rank_logs_every_component(self, results, tmp_path, method):
        logs = [json.loads((results / f"{method}-log-{rank}.json").read_text()) for rank in range(2)]
        alone = build(PROGRAMS[method], tmp_path, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-2)
        alone.train()
        for rank_log in logs:
            train_rows = [row for row in rank_log if "loss" in row]
            for name, value in log_of(alone)[0].items():
                assert train_rows[0][name] == pytest.approx(value, rel=1e-4), name

    @pytest.mark.parametrize(("kind", "tokens"), [("eval", None), ("part", PART_TOKENS)])
    @pytest.mark.parametrize("method", METHODS)
    def test_evaluation_equals_one_process(self, results, tmp_path, method, kind, tokens):
        """13 examples in batches of 4 on 2 ranks: the last batch is filled with repeats, which must not count."""
        trainer = build(PROGRAMS[method], tmp_path, max_eval_tokens=tokens)
        measured, known = trainer.measured_examples()
        # All lanes of plm have one window here.
        assert (measured < known) is (kind == "part" and method != "plm")
        expected = trainer.evaluate()
        for rank in range(2):
            metrics = json.loads((results / f"{method}-{kind}-{rank}.json").read_text())
            for name, value in expected.items():
                if "runtime" not in name and "per_second" not in name and "time" not in name:
                    assert metrics[name] == pytest.approx(value, rel=1e-5), name

    @pytest.mark.parametrize("method", METHODS)
    def test_ranks_stay_equal_after_evaluate_then_train(self, results, method):
        a, b = (torch.load(results / f"{method}-weights-{rank}.pt") for rank in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)

    @pytest.mark.parametrize("method", METHODS)
    def test_examples_have_the_same_bits_on_two_ranks(self, results, tmp_path, method):
        trainer = build(PROGRAMS[method], tmp_path)
        indices = list(trainer._get_train_sampler(trainer.train_dataset))[:8]
        alone = trainer.data_collator([trainer.train_dataset[i] for i in indices])
        rows = {}
        for rank in range(2):
            batch = torch.load(results / f"{method}-batch-{rank}.pt")
            for i in range(4):
                # Batches are dealt in turn: rank 0 gets the first four examples, rank 1 the next four.
                rows[rank * 4 + i] = [
                    # A label of a whole sequence is a number.
                    torch.nn.functional.pad(
                        batch[k][i].reshape(-1), (0, alone[k][0].numel() - batch[k][0].numel()), value=v
                    )
                    for k, v in (("input_ids", 0), ("labels", -100))
                ]
        for i in range(8):
            assert torch.equal(rows[i][0], alone["input_ids"][i])
            assert torch.equal(rows[i][1], alone["labels"][i].reshape(-1))
