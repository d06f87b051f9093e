"""Permutation language modelling from the text to the logits: what no part can promise by itself."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertForMaskedLM, XLNetConfig, XLNetLMHeadModel

from helpers.method_matrix import BLOCK_SIZE, NO_DROPOUT, build, forward_in_order, log_of, tiny_data
from helpers.permuted_batches import VOCAB, in_order, slots_of
from helpers.toy_recurrence import documents
from hf_pretrain.modeling.losses import RecurrentMemory
from hf_pretrain.objectives.permutation_lm import METHOD as plm
from hf_pretrain.objectives.permutation_lm import PermutationLMForPreTraining
from hf_pretrain.objectives.permutation_lm.modeling import stock_inputs
from hf_pretrain.objectives.permutation_lm.two_stream import PermutedBatch

SEP, CLS = 3, 2
REUSE = 10
KINDS = {
    "windows": {"mem_len": 8, "reuse_len": REUSE, "bidirectional": True},
    "xlnet": {"mem_len": 0},
    "bert": {"mem_len": 0},
    "roberta": {"mem_len": 0},
    "modernbert": {"mem_len": 0},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def trainer_of(kind, folder, *, overrides=None, **options):
    """A Trainer of three layers with wide weights on text without repetition."""
    data = tiny_data()
    data.train_documents, data.eval_documents = documents([50, 9, 70, 31, 64, 40]), documents([60, 40], first=9)
    if kind not in ("windows", "xlnet"):
        model = {"model_type": kind, "config_overrides": None if kind == "modernbert" else NO_DROPOUT}
    else:
        model = {"config_overrides": overrides or '{"dropout": 0.0}'}
    trainer = build(
        plm,
        folder,
        data,
        model_options={"num_hidden_layers": 3, **model},
        **{"per_device_train_batch_size": 4, "context_factor": 3.0, **KINDS[kind], **options},
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "norm" not in name.lower():
                parameter.mul_(12)
    trainer.model.eval()
    return trainer


def batch_at(trainer, time, *, size=4):
    return trainer.data_collator([trainer.train_dataset[time * size + row] for row in range(size)])


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "lanes"}


def dependence(model, batch):
    """How strongly each target's logits depend on each token's embedding: ``[B, P, S]``."""
    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: embedded.append(out))
    given = model_batch(batch)
    logits_BPV = model.predict(given, slots_of(given))[0].view(*given.target_columns.shape, -1)
    hook.remove()
    gradients = [
        torch.autograd.grad(logits_BPV[:, slot].square().sum(), embedded[0], retain_graph=True)[0].abs().amax(-1)
        for slot in range(logits_BPV.shape[1])
    ]
    # The queries of an encoder stand behind the text.
    return torch.stack(gradients, dim=1)[..., : given.input_ids.shape[1]]


def model_batch(batch):
    return PermutedBatch(**{name: batch[name] for name in PermutedBatch._fields if name in batch})


def expected_dependence(batch, row, target, *, reuse_len):
    """What a target may depend on, and must, from the rules for tokens, halves and the order among targets."""
    length = int(batch["attention_mask"][row].sum())
    border = (length + 1) // 2 if reuse_len is None else reuse_len
    ids, ranks = batch["input_ids"][row, :length], batch["key_ranks"][row, :length]
    half = torch.arange(length) >= border
    in_order_of_prediction = (ids == SEP) | (ids == CLS)
    in_order_of_prediction[batch["target_columns"][row][batch["labels"][row] != -100]] = True
    comes_before = ~in_order_of_prediction | (ranks < ranks[target])
    reached = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    reached[:length] = (half < half[target]) | (half == half[target]) & comes_before
    return reached


@kinds
def test_a_target_depends_on_what_comes_before_it_and_on_nothing_else(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path)
    batch = batch_at(trainer, 1)
    used, checked = batch["labels"] != -100, 0
    assert (batch["input_ids"] == SEP).any() and (batch["input_ids"] == CLS).any()
    assert kind == "windows" or (batch["attention_mask"] == 0).any()
    depends = dependence(trainer.model, inputs_of(batch))
    for row in range(4):
        for slot, target in enumerate(batch["target_columns"][row][used[row]].tolist()):
            expected = expected_dependence(batch, row, target, reuse_len=KINDS[kind].get("reuse_len"))
            assert not expected[target]
            assert torch.equal(depends[row, slot] > 0, expected), (row, target)
            checked += 1
    assert checked > 12


@pytest.mark.parametrize("reuse_len", [None, REUSE])
def test_what_is_remembered_of_a_window_is_its_first_stretch_alone(reuse_len, tmp_path):
    """Its end, of which the next window predicts a part, is not in it: to the bit."""
    trainer = trainer_of("windows", tmp_path, reuse_len=reuse_len, mem_len=16)
    model, kept = trainer.model, BLOCK_SIZE // 2 if reuse_len is None else reuse_len
    first, second = (inputs_of(batch_at(trainer, time)) for time in (0, 1))
    memory = model(**first).memory
    assert memory.lengths.tolist() == [kept] * 4
    embedded = model.get_input_embeddings()(first["input_ids"][:, :kept])
    assert torch.equal(memory.states[0, :, -kept:], embedded)
    other = first["input_ids"].clone()
    other[:, kept:] = 59 - other[:, kept:]
    assert torch.equal(model(**first | {"input_ids": other}).memory.states, memory.states)
    changed = first["input_ids"].clone()
    changed[:, kept - 1] = 59 - changed[:, kept - 1]
    assert not torch.equal(model(**first | {"input_ids": changed}).memory.states, memory.states)
    # What the next window remembers follows on without a gap.
    joined = model(**second, memory=memory).memory
    assert joined.lengths.tolist() == [16] * 4
    tokens = torch.cat([first["input_ids"][:, :kept], second["input_ids"][:, :kept]], dim=1)[:, -16:]
    assert torch.equal(joined.states[0], model.get_input_embeddings()(tokens))
    stream = trainer.train_dataset.stream
    for lane, row in enumerate(tokens[:2].tolist()):
        assert row == stream.read(lane, 2 * kept - 16, 2 * kept)[0].tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("clamp_len", [-1, 5])
def test_windows_from_text_give_what_stock_xlnet_gives(bidirectional, clamp_len, tmp_path):
    """Collator, conversion, segments, memory and lanes together, forward and all gradients."""
    trainer = trainer_of(
        "windows", tmp_path, bidirectional=bidirectional, overrides=f'{{"dropout": 0.0, "clamp_len": {clamp_len}}}'
    )
    model = trainer.model
    batches = [inputs_of(batch_at(trainer, time)) for time in (0, 1)]
    memory = model(**batches[0]).memory
    assert memory.lengths.tolist() == [8] * 4
    loss = model(**batches[1], memory=memory).losses["plm"].sum.sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    # The stock model tells directions by the place in the batch: backward lanes come second, as here.
    model.model.transformer.bi_data = bidirectional
    assert batches[1].get("backward", torch.zeros(4)).tolist() == [0, 0, bidirectional, bidirectional]
    given = stock_inputs({name: value for name, value in batches[1].items() if name != "backward"})
    labels, mems = given.pop("labels"), [layer.transpose(0, 1) for layer in memory.states]
    logits = model.model(**given, mems=mems, use_mems=True).logits
    stock = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    stock.backward()
    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=0)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.model.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) < 2e-5 * scale, name


def test_training_losses_are_those_of_a_memory_handed_on_by_hand(tmp_path):
    trainer = trainer_of("windows", tmp_path, learning_rate=0.0, weight_decay=0.0, max_steps=5)
    assert trainer.train_dataset.num_windows >= 5
    expected = []
    with torch.no_grad():
        for output in forward_in_order(trainer, trainer.train_dataset):
            loss = output.losses["plm"]
            expected.append(float(loss.sum.sum() / loss.count.sum()))
    trainer.train()
    losses = [row["loss"] for row in log_of(trainer) if "loss" in row]
    assert losses == pytest.approx(expected[:5], rel=1e-5)
    # Without memory they would be others.
    with torch.no_grad():
        alone = trainer.model.eval()(**inputs_of(batch_at(trainer, 2))).losses["plm"]
    assert float(alone.sum.sum() / alone.count.sum()) != pytest.approx(expected[2], rel=1e-3)


# The left-to-right order, by the stock models alone


def wide_xlnet(*, layers=3, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_layer": layers, "n_head": 4, "d_inner": 48}
    model = XLNetLMHeadModel(XLNetConfig(**sizes, dropout=0.0, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:
                parameter.mul_(8)
    return model


def wide_bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=32, initializer_range=0.12, **sizes, **options)
    return BertForMaskedLM(config).eval()


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


@torch.no_grad()
def test_left_to_right_logits_are_stock_xlnets_after_each_prefix():
    """A causal stock XLNet is asked for one token after the other; what stands in the place of that token is not seen."""
    stock, batch = wide_xlnet(), in_order(2, 8)
    model = PermutationLMForPreTraining.from_model(stock)
    whole = model.predict(batch, slots_of(batch))[0].view(2, 8, -1)
    for length in range(1, 8):
        for last in (9, 10):
            ids = torch.cat([batch.input_ids[:, :length], torch.full((2, 1), last)], dim=1)
            hidden = ~causal(length + 1)
            hidden[-1, -1] = True
            mapping = F.one_hot(torch.tensor([length]), length + 1).float()
            expected = stock(
                ids,
                token_type_ids=torch.zeros_like(ids),
                perm_mask=hidden.float().expand(2, -1, -1),
                target_mapping=mapping.expand(2, -1, -1),
            ).logits[:, 0]
            torch.testing.assert_close(whole[:, length], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_to_right_logits_are_a_causal_berts_after_each_prefix():
    """A BERT under a causal mask, whose last token is the mask token and sees all but itself."""
    stock, batch = wide_bert(), in_order(2, 8)
    model = PermutationLMForPreTraining.from_model(stock, mask_token_id=4)
    whole = model.predict(batch, slots_of(batch))[0].view(2, 8, -1)
    for length in range(1, 8):
        ids = torch.cat([batch.input_ids[:, :length], torch.full((2, 1), 4)], dim=1)
        visible = causal(length + 1)
        visible[-1, -1] = False
        expected = stock(ids, attention_mask=visible.expand(2, 1, -1, -1)).logits[:, -1]
        torch.testing.assert_close(whole[:, length], expected, atol=1e-5, rtol=0)


# Memory and distance


def in_segments(model, batch, widths, *, size):
    """Logits ``[B, S, V]`` of a left-to-right batch read segment by segment, all of each remembered."""
    memory, parts = RecurrentMemory.empty(3, len(batch.input_ids), size, 32), []
    for ids in batch.input_ids.split(widths, dim=1):
        segment = in_order(len(ids), ids.shape[1])._replace(input_ids=ids)
        logits, kept = model.predict(segment, slots_of(segment), memory=memory)
        memory = memory.append(kept)
        parts.append(logits.view(len(ids), ids.shape[1], -1))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_a_short_memory_is_one_pass_as_far_as_it_reaches():
    batch = in_order(2, 12)
    model = PermutationLMForPreTraining.from_model(wide_xlnet(), mem_len=4)
    whole = model.predict(batch, slots_of(batch))[0].view(2, 12, -1)
    parts = in_segments(model, batch, [4, 4, 4], size=4)
    torch.testing.assert_close(parts[:, :8], whole[:, :8], atol=1e-5, rtol=0)
    assert (parts[:, 8:] - whole[:, 8:]).abs().amax() > 1e-2


def test_no_gradient_crosses_the_border_of_windows(tmp_path):
    trainer = trainer_of("windows", tmp_path)
    model, embedded = trainer.model, []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: embedded.append(out))
    first, second = (inputs_of(batch_at(trainer, time)) for time in (0, 1))
    before = model(**first)
    loss = model(**second, memory=before.memory).losses["plm"].sum.sum()
    gradients = torch.autograd.grad(loss, embedded, allow_unused=True)
    assert gradients[0] is None and gradients[1].abs().sum() > 0


@pytest.mark.parametrize("backward", [False, True])
@torch.no_grad()
def test_distances_from_clamp_len_on_are_one(backward):
    """A clamp that is not reached is none; two tokens that are both beyond it can change places, and else they cannot."""
    batch = in_order(1, 12)._replace(backward=torch.tensor([backward]), target_columns=torch.tensor([[11]]))
    memory = RecurrentMemory(torch.randn(1, 1, 5, 32), torch.tensor([5]))

    def logits(clamp_len, ids=batch.input_ids):
        model = PermutationLMForPreTraining.from_model(wide_xlnet(layers=1, clamp_len=clamp_len), mem_len=5)
        return model.predict(batch._replace(input_ids=ids), torch.tensor([0]), memory=memory)[0]

    assert torch.equal(logits(16), logits(-1))
    assert not torch.equal(logits(15), logits(-1))
    swapped = batch.input_ids.clone()
    swapped[0, [1, 4]] = swapped[0, [4, 1]]
    for clamp_len, is_alike in ((7, True), (8, False), (-1, False)):
        assert torch.allclose(logits(clamp_len, swapped), logits(clamp_len), atol=1e-5) == is_alike
