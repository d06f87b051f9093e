"""The head on gathered positions against the same head on all positions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.made_tensors import MadeTensors
from helpers.method_matrix import NO_DROPOUT, TINY, VOCAB_SIZE, build, programs, relative_difference
from hf_pretrain.modeling import kernels
from hf_pretrain.modeling.kernels import OutputMap
from hf_pretrain.modeling.losses import IGNORED, GatheredHead, masked_lm_loss
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining

NARROW = {"embedding_size": 16}
BACKBONES = {
    "albert": NARROW,
    "bert": {},
    "deberta-v2": {"legacy": True},
    "deberta-v2 without legacy": {"legacy": False},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": NARROW,
    "modernbert": {},
    "mpnet": {},
    "roberta": {},
}


def tiny_model(name, **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = AutoConfig.for_model(name.split()[0], **{**TINY, **special, "vocab_size": VOCAB_SIZE, **BACKBONES[name]})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, **options).eval()
    # Away from the initial values: zero biases and unit norms would hide a head that is called twice or not at all.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def model_and_head(request):
    model = tiny_model(request.param)
    return model, GatheredHead(model)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB_SIZE, (3, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    mask[2, 2:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def labels_at(positions, inputs):
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels.view(-1)[positions] = (inputs["input_ids"].view(-1)[positions] * 7) % VOCAB_SIZE
    return labels


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("fillers", [[], [3, 3, 3], [45, 45]], ids=["none", "a token", "padding"])
def test_loss_and_every_gradient_equal_the_dense_head(model_and_head, inputs, fillers):
    model, head = model_and_head
    targets = torch.tensor([1, 2, 7, 19, 20, 32, 40, 41])
    labels = labels_at(targets, inputs)
    positions = torch.cat([targets, torch.tensor(fillers, dtype=torch.long)])
    dense = F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected = gradients_of(model, dense)
    logits = head(model, positions, **inputs)
    assert logits.shape == (len(positions), VOCAB_SIZE)
    loss = masked_lm_loss(logits, labels.flatten()[positions], positions=positions, shape=labels.shape)
    assert loss.count.tolist() == [4, 2, 2]
    torch.testing.assert_close(loss.sum.sum(), dense, rtol=1e-6, atol=0)
    assert relative_difference(expected, gradients_of(model, loss.sum.sum())) <= 1e-6


def test_no_target_gives_a_zero_loss_with_zero_gradients(model_and_head, inputs):
    """Not none: distributed training waits for every parameter's gradient."""
    model, head = model_and_head
    positions = torch.zeros(0, dtype=torch.long)
    expected = gradients_of(model, model(**inputs).logits.sum())
    logits = head(model, positions, **inputs)
    assert logits.shape == (0, VOCAB_SIZE)
    loss = masked_lm_loss(logits, positions, positions=positions, shape=inputs["input_ids"].shape)
    assert loss.sum.tolist() == loss.count.tolist() == [0, 0, 0]
    gradients = gradients_of(model, loss.sum.sum())
    assert gradients.keys() == expected.keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_the_output_matrix_sees_only_the_targets(inputs):
    model = tiny_model("electra")
    head, widths = GatheredHead(model), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[:-1]))
    head(model, torch.tensor([0, 21]), **inputs)
    assert widths == [(1, 2)]


def test_other_calls_stay_dense(inputs):
    model = tiny_model("bert")
    expected = model(**inputs).logits
    head = GatheredHead(model)
    head(model, torch.tensor([1]), **inputs)
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(IndexError):
        head(model, torch.tensor([10**6]), **inputs)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_model_that_was_borrowed_is_given_back_without_a_hook(inputs):
    """Beside the hook of one who trains it."""
    model = tiny_model("bert")
    trained, expected = GatheredHead(model), model(**inputs).logits
    hooks = dict(model.base_model._forward_hooks)
    with GatheredHead(model) as head:
        assert len(model.base_model._forward_hooks) == 2
        torch.testing.assert_close(head(model, torch.tensor([21]), **inputs)[0], expected[1, 1])
    assert model.base_model._forward_hooks == hooks
    torch.testing.assert_close(trained(model, torch.tensor([21]), **inputs)[0], expected[1, 1])
    with pytest.raises(AssertionError):
        head(model, torch.tensor([21]), **inputs)
    with pytest.raises(IndexError), GatheredHead(model) as head:
        head(model, torch.tensor([10**6]), **inputs)
    head.remove()
    assert model.base_model._forward_hooks == hooks


def test_a_copy_of_the_model_has_a_head_of_its_own(inputs):
    composite = EncoderForPreTraining.from_model(tiny_model("bert"))
    copied = copy.deepcopy(composite)
    copied.mlm_head.remove()
    assert not copied.model.base_model._forward_hooks and composite.model.base_model._forward_hooks
    assert composite.mlm_head(composite.model, torch.tensor([0, 21]), **inputs).shape == (2, VOCAB_SIZE)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_wrapping_keeps_the_attention_backend(backend, tmp_path):
    model = tiny_model("bert", attn_implementation=backend)
    composite = EncoderForPreTraining.from_model(model)
    used = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert used == {backend}
    composite.save_pretrained(tmp_path)
    loaded = EncoderForPreTraining.from_pretrained(tmp_path)
    # A backend is chosen where a model is opened: it is no part of what is saved.
    assert loaded.model.config._attn_implementation == "sdpa"


# The loss in training, a chunk of targets at a time

MAKE_NO_LOGITS = sorted(set(BACKBONES) - {"deberta-v2 without legacy"})
"""Their heads end in a linear map that is a module; the other one multiplies by a table that it is given."""


def step_of(model, batch, *, in_chunks):
    """Loss and gradients of a training step without dropout."""
    model.train()
    model.model.eval()
    model.zero_grad(set_to_none=True)
    before = model.output_map._ends_head
    model.output_map._ends_head = before and in_chunks
    loss = model(**batch).losses["mlm"]
    (0.3 * loss.sum.sum()).backward()
    model.output_map._ends_head = before
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_loss_in_chunks_is_the_loss_of_all_logits(name, inputs, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", 4 * VOCAB_SIZE)
    model = EncoderForPreTraining.from_model(tiny_model(name))
    assert (model.output_map.find() is not None) == (name in MAKE_NO_LOGITS)
    positions = torch.tensor([1, 3, 4, 5, 9, 22, 24, 31, 40])
    labels = labels_at(positions, inputs)
    labels.view(-1)[9] = IGNORED  # a filler
    batch = {**inputs, "labels": labels, "target_positions": positions}
    expected, gradients = step_of(model, batch, in_chunks=False)
    with MadeTensors() as made:
        found, in_chunks = step_of(model, batch, in_chunks=True)
    assert made.has(len(positions), VOCAB_SIZE) == (name not in MAKE_NO_LOGITS)
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.count, expected.count) and found.count.tolist() == [4, 3, 1]
    assert in_chunks.keys() == gradients.keys() and relative_difference(gradients, in_chunks) < 1e-5
    # Evaluation needs the likeliest tokens, and has no gradients whose sum would have to be of one weight.
    scored = model.eval()(**batch)
    torch.testing.assert_close(scored.losses["mlm"].sum, expected.sum, rtol=1e-5, atol=1e-5)
    assert "mlm_accuracy" in scored.metrics


@pytest.mark.parametrize("options", [{"has_clm": True}, {"has_bitext": True}, {"heads": ["mlm", "word_order"]}])
def test_targets_of_several_weights_have_logits(options, inputs):
    model = EncoderForPreTraining.from_model(tiny_model("bert"), **options).train()
    assert not model._weighs_alike()


@pytest.mark.parametrize(
    ("method", "model_options", "options"),
    [
        ("mlm", {}, {}),
        ("encoder", {}, {"objectives": ["mlm", "span_boundary"], "masking_unit": "span"}),
        ("encoder", {}, {"objectives": ["mlm", "sop"]}),
        ("rtd", {}, {}),
        ("rtd", {"embedding_sharing": "gdes"}, {}),
        ("rtd", {"disallow_correct": True}, {"training_mode": "decoupled"}),
        ("plm", {}, {}),
        ("plm", {"model_type": "bert", "config_overrides": NO_DROPOUT}, {"mem_len": 0}),
        ("denoise", {}, {}),
        ("denoise", {"model_type": "t5", "config_overrides": '{"dropout_rate": 0.0}'}, {}),
    ],
)
def test_a_step_of_the_trainer_is_the_same_without_logits(method, model_options, options, tmp_path, monkeypatch):
    trainer = build(programs()[method], tmp_path, model_options=model_options, **options)
    model = trainer.model.train()
    loader = trainer.get_train_dataloader()
    trainer.begin_training()
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", 5 * VOCAB_SIZE)
    assert model.output_map.find() is not None
    if "final_logits_bias" in (buffers := model.root._buffers):
        buffers["final_logits_bias"].normal_()
    before = {name: value.clone() for name, value in model.named_buffers()}
    batch = loader.collate_fn([trainer.train_dataset[i] for i in range(6)])
    num_targets = len(batch["slots" if method == "plm" else "target_positions"])
    totals, gradients, largest = [], [], []
    for find in (lambda self: None, OutputMap.find):
        monkeypatch.setattr(OutputMap, "find", find)
        model.zero_grad(set_to_none=True)
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        with MadeTensors() as made:
            total = trainer.compute_loss(model, dict(batch), num_items_in_batch=counts)
            total.backward()
        totals.append(total)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        largest.append(made.has(num_targets, VOCAB_SIZE))
    assert largest == [True, False]
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert relative_difference(*gradients) < 1e-5
    # What was put aside for a step is there again, and is exported.
    after = dict(model.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert "forward" not in vars(getattr(model, "generator", model.root).get_output_embeddings())
