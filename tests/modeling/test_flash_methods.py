"""Every method on flash attention and on SDPA: the same losses and gradients, of rows padded, full, and of several documents."""

import pytest
import torch
import torch.nn.functional as F

from helpers import flash
from helpers.causal_models import causal_lm, next_token_batch
from helpers.method_matrix import NO_DROPOUT_OF, build, isolated, log_of, programs, relative_difference, tiny_data
from hf_pretrain import CausalLMForPreTraining
from hf_pretrain.modeling.visibility.backends import Attending, FastAttention

CPU, PROGRAMS = torch.device("cpu"), programs()
ON_FLASH = ["clm", "contrastive", "denoise", "distil", "distil-task", "electric", "encoder", "mlm", "rtd"]


@pytest.fixture
def calls(monkeypatch):
    return flash.install(monkeypatch)


def fast_attention(model):
    return FastAttention({"model": Attending(model, CPU, torch.float32)}, allowed=["model"])


def documents_of(batch, lengths):
    """Give each row documents of these lengths, and padding behind them."""
    rows, width = batch["input_ids"].shape
    ids, positions = torch.full((rows, width), -1), torch.zeros(rows, width, dtype=torch.long)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            ids[row, start : start + size] = number
            positions[row, start : start + size] = torch.arange(size)
            start += size
    labels = batch["labels"].masked_fill(ids < 0, -100)
    return batch | {"document_ids": ids, "position_ids": positions, "labels": labels}


def loss_and_gradients(composite, batch):
    parameters = [one for one in composite.parameters() if one.requires_grad]
    loss = composite(**batch).losses["lm"].sum
    return loss, torch.autograd.grad(loss.sum(), parameters, allow_unused=True)


def no_sdpa(*args, **kwargs):
    raise AssertionError("SDPA was called")


ROWS = {"whole": None, "documents": [[9, 8, 3], [20], [4, 10, 2]], "full": [[9, 11], [7, 13], [19, 1]]}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "mistral", "modernbert-decoder", "gpt_neox", "opt", "bert", "gemma2"]
)
def test_a_causal_model(calls, monkeypatch, model_type, rows):
    # Of documents, Mistral's mask of a window is not made on SDPA.
    changes = {
        "modernbert-decoder": {"local_attention": 8},
        "mistral": {"sliding_window": 5 if rows == "whole" else None},
    }
    composite = CausalLMForPreTraining.from_model(causal_lm(model_type, **changes.get(model_type, {})))
    own = composite.model.config._attn_implementation
    batch = next_token_batch()
    batch = batch if ROWS[rows] is None else documents_of(batch, ROWS[rows])
    fast = fast_attention(composite.model)
    for mode in ("train", "eval"):
        getattr(composite, mode)()
        expected, right = loss_and_gradients(composite, batch)
        assert not calls
        with fast.running():
            # The first batch is compared with the own attention.
            loss_and_gradients(composite, batch)
        with monkeypatch.context() as patch, fast.running():
            patch.setattr(F, "scaled_dot_product_attention", no_sdpa)
            found, gradients = loss_and_gradients(composite, batch)
        assert set(calls[-2:]) == ({"plain"} if rows == "whole" else {"varlen"})
        calls.clear()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        scale = max(float(one.abs().max()) for one in right if one is not None)
        for one, other in zip(gradients, right, strict=True):
            assert one is other is None or float((one - other).abs().max()) <= 1e-4 * scale
    assert composite.model.config._attn_implementation == own == ("eager" if model_type == "gemma2" else "sdpa")


def packed(method):
    """Data of a method: rows of two documents where it keeps documents apart, else padded rows of one."""
    data = tiny_data()
    return data if method in ("contrastive", "encoder") else isolated(data)


@pytest.mark.parametrize(
    ("method", "kind"),
    # A text of "contrastive" or of a task is a document, and sentence order, which "encoder" has, looks at one.
    [
        (method, kind)
        for method in ON_FLASH
        for kind in ("padded", "documents")
        if (method, kind) not in (("encoder", "documents"), ("distil-task", "documents"))
    ],
)
def test_a_step_and_an_evaluation(calls, method, kind, tmp_path):
    found = {}
    for wanted in ("sdpa", "auto"):
        data = tiny_data() if kind == "padded" else packed(method)
        # T5, its default, has no flash attention.
        options = {"attn_implementation": wanted} | ({"model_type": "bart"} if method == "denoise" else {})
        options |= {"config_overrides": NO_DROPOUT_OF["bart"]} if method == "denoise" else {}
        trainer = build(PROGRAMS[method], tmp_path / wanted, data, model_options=options)
        trainer.train()
        assert bool(calls) == (wanted == "auto")
        metrics = trainer.evaluate()
        losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
        found[wanted] = trainer.recorder.gradients[0], losses, trainer.state.log_history[0]["loss"], trainer
    (gradients, losses, first, _), (right, expected, first_right, _) = found["auto"], found["sdpa"]
    assert relative_difference(gradients, right) < 2e-4
    assert first == pytest.approx(first_right, rel=1e-4) and losses == pytest.approx(expected, rel=1e-3)
    chosen = {name: choice.backend for name, choice in found["auto"][3].runner.fast_attention({}).choices.items()}
    own = {"generator.left_tower", "generator.right_tower"}
    assert chosen == {name: "sdpa" if name in own else "flash_attention_2" for name in chosen}


LOSSES = {
    "tinybert": {"hidden_weight": 1.0, "attention_weight": 1.0, "embedding_weight": 1.0, "prediction_weight": 1.0},
    "minilm": {"attention_distribution_weight": 1.0, "value_relation_weight": 1.0},
}


@pytest.mark.parametrize("losses", LOSSES)
def test_losses_that_read_states_and_attention(calls, losses, tmp_path):
    found = []
    for wanted in ("sdpa", "auto"):
        options = {"attn_implementation": wanted, "num_attention_heads": 2}
        trainer = build(
            PROGRAMS["distil"], tmp_path / wanted, isolated(tiny_data()), model_options=options, **LOSSES[losses]
        )
        trainer.train()
        found.append((trainer.recorder.gradients[0], log_of(trainer)[0]))
    assert calls and relative_difference(found[1][0], found[0][0]) < 1e-3
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3)
