"""Documents that share a row against the same documents alone, for every backbone and attention backend."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForMaskedLM
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ModuleUtilsMixin

from helpers.method_matrix import TINY, VOCAB_SIZE, build, programs, relative_difference, tiny_data
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility import rules as isolation
from hf_pretrain.modeling.visibility.lm_modes import check_lm_modes
from hf_pretrain.modeling.visibility.rules import check_isolation, isolated_inputs, padding_inputs, sequence_bounds
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining

RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "legacy": False}
BACKBONES = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**RELATIVE, "position_biased_input": False},
    "deberta-v2 with positions": {**RELATIVE, "position_biased_input": True},
    "deberta-v2 as wide as the row": {**RELATIVE, "hidden_size": 28},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "eurobert": {"mask_token_id": 4},
    # One layer sees everything, the next one only two tokens to each side: less than the documents hold.
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpnet": {"pad_token_id": 1},
    "nomic_bert": {},
    "roberta": {"pad_token_id": 1},
    "roformer": {"embedding_size": 32},
}
EAGER_ONLY = {"deberta", "deberta-v2", "mpnet", "roformer"}
ROWS = [[9, 14, 5], [3, 21]]  # tokens of the documents in each row


def varlen_reference(
    module, query, key, value, mask, scaling, sliding_window=None, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """What flash attention computes: each sequence between two bounds attends to itself, within the window."""
    rows, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        assert mask is None, "these tests give it nothing to unpad"
        cu_seq_lens_q, max_length_q = torch.arange(rows + 1) * length, length
    assert mask is None and cu_seq_lens_q[-1] == rows * length and int(cu_seq_lens_q.diff().max()) <= max_length_q
    query, key, value = (states.transpose(1, 2).flatten(0, 1).transpose(0, 1) for states in (query, key, value))
    parts = []
    for start, stop in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        scores = query[:, start:stop] @ key[:, start:stop].transpose(1, 2) * scaling
        if sliding_window is not None:
            places = torch.arange(stop - start)
            scores = scores.masked_fill((places[:, None] - places).abs() > sliding_window - 1, -torch.inf)
        parts.append(scores.softmax(-1) @ value[:, start:stop])
    return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (rows, length)), None


@pytest.fixture(scope="module", autouse=True)
def flash_on_a_processor():
    AttentionInterface.register("flash_reference", varlen_reference)
    AttentionMaskInterface.register("flash_reference", flash_attention_mask)


def tiny_model(name, backend=None, **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    kind = name.split()[0]
    dropout = {key: 0.0 for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    sizes = {**TINY, "max_position_embeddings": 40, **special, **dropout, "vocab_size": VOCAB_SIZE}
    config = AutoConfig.for_model(kind, **{**sizes, **BACKBONES.get(name, {}), **options})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager" if backend != "sdpa" else "sdpa")
    if backend == "flash_reference":
        model.config._attn_implementation = backend
    with torch.no_grad():
        for parameter in model.parameters():  # not the sinusoids of roformer, which are relative as they are
            parameter.add_(0.1 * parameter.requires_grad * torch.randn_like(parameter))
    return model.eval()


def cases():
    for name in BACKBONES:
        yield pytest.param(name, "eager", id=f"{name}-eager")
        if name.split()[0] not in EAGER_ONLY:
            yield pytest.param(name, "sdpa", id=f"{name}-sdpa")
            yield pytest.param(name, "flash_reference", id=f"{name}-flash")


def documents_of(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(5, VOCAB_SIZE, (length,), generator=generator) for length in row] for row in rows]


def batch_of(rows, *, width=None, left=False):
    """Rows of documents as the collator writes them; a third of the tokens are targets."""
    width = width or max(sum(map(len, row)) for row in rows)
    batch = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "document_ids": -1, "position_ids": 0}
    batch = {name: torch.full((len(rows), width), fill) for name, fill in batch.items()}
    for number, row in enumerate(rows):
        ids = torch.cat(row)
        place = slice(width - len(ids), width) if left else slice(0, len(ids))
        positions = torch.cat([torch.arange(len(document)) for document in row])
        batch["input_ids"][number, place] = ids
        batch["attention_mask"][number, place] = 1
        batch["document_ids"][number, place] = torch.cat([torch.full_like(d, k) for k, d in enumerate(row)])
        batch["position_ids"][number, place] = positions
        batch["labels"][number, place] = torch.where(positions % 3 == 1, ids * 7 % VOCAB_SIZE, IGNORED)
    batch["target_positions"] = (batch["labels"].flatten() != IGNORED).nonzero().flatten()
    return batch


def without_isolation(batch):
    return {name: value for name, value in batch.items() if name not in ("document_ids", "position_ids")}


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).losses["mlm"]
    loss.sum.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.sum.detach(), loss.count, gradients


def states_of(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "position_ids")}
    with torch.no_grad():
        return model.base_model(**isolated_inputs(model, **inputs))[0]


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_packed_equals_separate_in_loss_and_every_gradient(name, backend):
    model = EncoderForPreTraining.from_model(tiny_model(name, backend))
    rows = documents_of()
    # Documents of one length at a time, so that no side has padding but the packed one.
    expected_sums, expected = {}, None
    for number, row in enumerate(rows):
        for document in row:
            sums, _, gradients = loss_and_gradients(model, without_isolation(batch_of([[document]])))
            expected_sums[number] = expected_sums.get(number, 0) + sums.item()
            expected = {n: g + (expected[n] if expected else 0) for n, g in gradients.items()}
    sums, counts, gradients = loss_and_gradients(model, batch_of(rows))
    assert counts.tolist() == [sum((length + 1) // 3 for length in row) for row in ROWS]
    torch.testing.assert_close(sums, torch.tensor(list(expected_sums.values())), rtol=1e-5, atol=0)
    assert relative_difference(expected, gradients) <= 1e-5
    if backend != "flash_reference":  # the reference does not unpad
        leaking, _, gradients = loss_and_gradients(model, without_isolation(batch_of(rows)))
        assert not torch.allclose(sums, leaking, rtol=1e-4), "this test can fail"
        assert relative_difference(expected, gradients) > 1e-3


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_editing_a_document_moves_no_bit_of_the_others(name, backend):
    model, rows = tiny_model(name, backend), documents_of()
    edited = [[d.clone() for d in row] for row in rows]
    edited[0][1][4] = 5 + (edited[0][1][4] - 4) % (VOCAB_SIZE - 5)
    before, after = batch_of(rows), batch_of(edited)
    inside = (before["document_ids"] == 1) & torch.tensor([[True], [False]])
    states, moved = states_of(model, before), states_of(model, after)
    assert torch.equal(states[~inside], moved[~inside])
    assert (states[inside] != moved[inside]).any()
    if backend != "flash_reference":
        with torch.no_grad():
            states, moved = (
                model.base_model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])[0]
                for b in (before, after)
            )
        assert (states - moved)[0, :9].abs().max() > 1e-4, "stock leaks"


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_padding_on_either_side_changes_nothing(name, backend):
    model, rows = tiny_model(name, backend), documents_of()
    expected = states_of(model, batch_of(rows))[batch_of(rows)["attention_mask"].bool()]
    for width, left in ((36, False), (36, True), (None, True)):
        batch = batch_of(rows, width=width, left=left)
        padded = states_of(model, batch)
        assert padded.isfinite().all()
        torch.testing.assert_close(padded[batch["attention_mask"].bool()], expected, rtol=1e-5, atol=1e-5)


def test_masks_of_each_kind_of_layer_and_backend():
    batch = batch_of(documents_of(), width=30)
    ids = batch["document_ids"].tolist()
    same = torch.tensor([[[a == b for b in row] for a in row] for row in ids])[:, None]
    near = torch.tensor([[abs(q - k) <= 2 for k in range(30)] for q in range(30)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "position_ids")}
    masks = isolated_inputs(tiny_model("modernbert", "sdpa"), **inputs)["attention_mask"]
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["full_attention"], same) and torch.equal(masks["sliding_attention"], same & near)
    masks = isolated_inputs(tiny_model("modernbert", "eager"), **inputs)["attention_mask"]
    assert all(mask.dtype == torch.float32 for mask in masks.values()), "eager adds its mask"
    assert torch.equal(masks["sliding_attention"] == 0, same & near) and masks["full_attention"].min() < -1e30
    assert torch.equal(isolated_inputs(tiny_model("bert", "sdpa"), **inputs)["attention_mask"], same)
    assert torch.equal(isolated_inputs(tiny_model("deberta-v2"), **inputs)["attention_mask"], same[:, 0])


def test_positions_begin_where_the_model_counts_from():
    batch = batch_of(documents_of())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "position_ids")}
    for name, first in (("bert", 0), ("roberta", 2), ("mpnet", 2)):
        positions = isolated_inputs(tiny_model(name), **inputs)["position_ids"]
        assert torch.equal(positions, batch["position_ids"] + first)
    assert "position_ids" not in isolated_inputs(tiny_model("roformer"), **inputs)


def test_bounds_for_flash_attention_equal_a_plain_loop():
    for left in (False, True):
        batch = batch_of(documents_of([[4, 3], [9], [9], [1, 1, 1]]), width=9, left=left)
        flat = [(row, number) for row, numbers in enumerate(batch["document_ids"].tolist()) for number in numbers]
        bounds = [i for i in range(len(flat)) if i == 0 or flat[i] != flat[i - 1]]
        kwargs = sequence_bounds(batch["document_ids"])
        assert kwargs["cu_seq_lens_q"].dtype == torch.int32
        assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [*bounds, 36]
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == 9 and isinstance(kwargs["max_length_q"], int)


def test_without_documents_all_that_came_goes_through():
    batch = without_isolation(batch_of(documents_of()))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "token_type_ids": "types"}
    without = isolated_inputs(tiny_model("fnet"), **inputs)
    # Positions are counted in each row, for padding on the left.
    assert without.keys() - {"position_ids"} == inputs.keys()
    assert all(without[name] is value for name, value in inputs.items())
    assert isolated_inputs(tiny_model("fnet"), **inputs, position_ids="places") == inputs | {"position_ids": "places"}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fnet", {}, "the states of a document change"),
        ("convbert", {"embedding_size": 32}, "the states of a document change"),
        ("deberta-v2", {"conv_kernel_size": 3}, "its forward fails"),
        ("nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 28}, "its forward fails"),
        ("longformer", {"attention_window": 8}, "its forward fails"),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "the states of a document"),
    ],
)
def test_a_backbone_that_cannot_is_refused_by_name(name, options, reason):
    model, batch = tiny_model(name, **options), batch_of(documents_of())
    with pytest.raises(InputError, match=f"{type(model).__name__} .*cannot isolate documents: .*{reason}.*doc_senten"):
        isolated_inputs(model, **{n: v for n, v in batch.items() if n not in ("labels", "target_positions")})


def test_a_model_that_attends_sparsely_to_long_rows_only_is_tried_with_a_long_row():
    options = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "num_attention_heads": 2}
    check_isolation(tiny_model("big_bird", **options), length=16)
    with pytest.raises(InputError, match="BigBirdForMaskedLM .*cannot isolate"):
        check_isolation(tiny_model("big_bird", **options), length=36)


def test_an_unknown_backend_is_refused():
    model = tiny_model("bert")
    AttentionInterface.register("maskless", varlen_reference)
    model.config._attn_implementation = "maskless"
    with pytest.raises(InputError, match="'maskless' cannot isolate documents"):
        check_isolation(model)


def test_the_trial_finds_wrong_masks_and_wrong_positions(monkeypatch):
    """The silent traps: a boolean mask under eager, no mask at all, positions that count on or from the wrong place."""
    mask_inputs, attention_inputs = rules.mask_inputs, isolation._attention_inputs

    def as_booleans(*args, **kwargs):
        return mask_inputs(*args, **kwargs) == 0

    def positions_of_the_row(backbone, plan, *, document_ids, position_ids):
        return attention_inputs(backbone, plan, document_ids=document_ids, position_ids=torch.arange(32)[None])

    for name, model, module, attribute, wrong in (
        ("boolean", "bert", rules, "mask_inputs", as_booleans),
        ("none", "bert", rules, "mask_inputs", lambda *args, **kwargs: None),
        ("zero", "roberta", rules, "given_first_position", lambda body: 0),
        ("row", "bert", isolation, "_attention_inputs", positions_of_the_row),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, wrong)
            with pytest.raises(InputError, match="cannot isolate"):
                check_isolation(tiny_model(model))
                pytest.fail(name)
        check_isolation(tiny_model(model))


TRIALS = {
    "isolation": check_isolation,
    "lm_modes": check_lm_modes,
    "padding": lambda model: padding_inputs(model, torch.ones(2, 8, dtype=torch.long), True),
}


@pytest.mark.parametrize("rule", TRIALS)
def test_a_mistake_of_the_library_is_no_answer_of_the_backbone(rule, monkeypatch):
    """It comes through as it is, and nothing is remembered; the same error in the backbone's own code is an answer."""
    check, model = TRIALS[rule], tiny_model("bert")
    for name in ("mask_inputs", "arbitrary_tokens"):
        with monkeypatch.context() as patch:
            patch.delattr(rules, name)
            with pytest.raises((NameError, AttributeError), match=name):
                check(model)
        with monkeypatch.context() as patch:
            patch.setattr(rules, name, None)
            with pytest.raises(TypeError, match="not callable"):
                check(model)
    with monkeypatch.context() as patch:
        patch.delattr(ModuleUtilsMixin, "dtype")  # Torch raises for a module that lacks what a line of ours reads.
        with pytest.raises(AttributeError, match="dtype"):
            check(model)
    assert rules.known_plan(model, rule) is None

    def forward(*args, **kwargs):
        raise TypeError("no such mask")

    broken = tiny_model("bert")
    monkeypatch.setattr(broken.base_model, "forward", forward)
    if rule == "padding":
        check(broken)
        assert not rules.known_plan(broken, rule).takes_masks, "it falls back to the stock model's own mask"
    else:
        with pytest.raises(InputError, match=r"its forward fails with such a mask \(no such mask\)"):
            check(broken)
    check(model)
    assert rules.known_plan(model, rule).takes_masks


def test_the_trial_happens_once_and_leaves_no_trace():
    model, batch = tiny_model("deberta-v2", hidden_dropout_prob=0.5), batch_of(documents_of())
    model.train()
    model.base_model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls = []
    model.base_model.register_forward_hook(lambda *args: calls.append(1))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "document_ids", "position_ids")}
    isolated_inputs(model, **inputs)
    tried = len(calls)
    assert tried > 0 and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    isolated_inputs(model, **inputs)
    assert len(calls) == tried
    # Another backend is another matter.
    model = tiny_model("bert", "sdpa")
    assert isolated_inputs(model, **inputs)["attention_mask"].dtype == torch.bool
    model.set_attn_implementation("eager")
    assert isolated_inputs(model, **inputs)["attention_mask"].dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "roberta"])
def test_half_precision(name):
    """Rounding is no leak: bfloat16 weights and bfloat16 autocast pass the trial and stay isolated to the bit."""
    rows = documents_of()
    edited = [[rows[0][0], rows[0][1].flip(0), rows[0][2]], rows[1]]
    outside = batch_of(rows)["document_ids"] != 1
    states = [states_of(tiny_model(name).to(torch.bfloat16), batch_of(r))[outside] for r in (rows, edited)]
    assert torch.equal(*states)
    with torch.autocast("cpu", torch.bfloat16):
        states = [states_of(tiny_model(name), batch_of(r))[outside] for r in (rows, edited)]
    assert torch.equal(*states)


def test_a_trainer_learns_from_packed_rows_as_from_separate_ones(tmp_path):
    """The whole path: the collator's masks, the Trainer's counts, accumulation, evaluation, another batch shape."""
    program = programs()["mlm"]
    lengths = [4, 9, 11, 3, 8, 12, 6, 7, 5, 9, 4, 10] * 4
    rows = Dataset.from_list(
        [
            {
                "input_ids": [2, *range(5, 3 + length), 3],
                "word_starts": [True] * length,
                "document_ids": [k % 3] * length,
            }
            for k, length in enumerate(lengths)
        ]
    ).batch(3)
    rows = rows.map(lambda row: {name: [token for part in parts for token in part] for name, parts in row.items()})
    data = dataclasses.replace(tiny_data(), train_dataset=EpochDataset(rows), eval_dataset=EpochDataset(rows))
    runs = {}
    for size, steps in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = build(program, tmp_path, data, **options)
        runs[size] = (trainer, copy.deepcopy(trainer.model))
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
    (trainer, model), (other, _) = runs[8], runs[4]
    assert relative_difference(trainer.recorder.gradients[0], other.recorder.gradients[0]) <= 1e-5
    # By hand: the collator's targets, each document in a row of its own.
    batch = next(iter(trainer.get_train_dataloader()))
    count, expected = (batch["labels"] != IGNORED).sum(), None
    for row, number in torch.cartesian_prod(torch.arange(8), torch.arange(3)).tolist():
        own = batch["document_ids"][row] == number
        alone = {name: batch[name][row][own][None] for name in ("input_ids", "attention_mask", "labels")}
        alone["target_positions"] = (alone["labels"].flatten() != IGNORED).nonzero().flatten()
        _, _, gradients = loss_and_gradients(model, alone)
        expected = {name: g / count + (expected[name] if expected else 0) for name, g in gradients.items()}
    assert relative_difference(expected, trainer.recorder.gradients[0]) <= 1e-5
