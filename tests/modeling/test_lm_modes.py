"""Who sees whom in the four modes: tables by hand, the reach of every token, stock causal runs, and who is refused."""

import pytest
import torch
from transformers import AttentionMaskInterface, AutoConfig, AutoModelForMaskedLM, BertModel
from transformers.masking_utils import flash_attention_mask

from helpers.method_matrix import TINY, VOCAB_SIZE
from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.visibility import rules
from hf_pretrain.modeling.visibility.lm_modes import check_lm_modes, lm_mode_inputs, mode_visibility

RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "legacy": False}
BACKBONES = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {**RELATIVE, "position_biased_input": False},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    # One layer sees everything, the next one only two tokens to each side.
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpnet": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 1},
    "roformer": {"embedding_size": 32},
}
EAGER_ONLY = {"deberta", "deberta-v2", "mpnet", "roformer"}
SOURCE_LENGTH = 5

# Rows see columns marked x: twelve tokens, of which from sequence to sequence the first five are the source.
TABLES = {
    "bidirectional": """
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx
        xxxxxxxxxxxx""",
    "left_to_right": """
        x...........
        xx..........
        xxx.........
        xxxx........
        xxxxx.......
        xxxxxx......
        xxxxxxx.....
        xxxxxxxx....
        xxxxxxxxx...
        xxxxxxxxxx..
        xxxxxxxxxxx.
        xxxxxxxxxxxx""",
    "right_to_left": """
        xxxxxxxxxxxx
        .xxxxxxxxxxx
        ..xxxxxxxxxx
        ...xxxxxxxxx
        ....xxxxxxxx
        .....xxxxxxx
        ......xxxxxx
        .......xxxxx
        ........xxxx
        .........xxx
        ..........xx
        ...........x""",
    "sequence_to_sequence": """
        xxxxx.......
        xxxxx.......
        xxxxx.......
        xxxxx.......
        xxxxx.......
        xxxxxx......
        xxxxxxx.....
        xxxxxxxx....
        xxxxxxxxx...
        xxxxxxxxxx..
        xxxxxxxxxxx.
        xxxxxxxxxxxx""",
}
TABLES = {
    LMMode.of(mode): torch.tensor([[mark == "x" for mark in row] for row in rows.split()])
    for mode, rows in TABLES.items()
}


def tiny_model(name, backend="eager", **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    dropout = {key: 0.0 for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    sizes = {**TINY, "max_position_embeddings": 40, **special, **dropout, "vocab_size": VOCAB_SIZE}
    config = AutoConfig.for_model(name, **{**sizes, **BACKBONES.get(name, {}), **options})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad * torch.randn_like(parameter))
    return model.eval()


def cases(names=BACKBONES):
    for name in names:
        for backend in ("eager",) if name in EAGER_ONLY else ("eager", "sdpa"):
            yield pytest.param(name, backend, id=f"{name}-{backend}")


def tokens_of(count, *, seed=1):
    return torch.randint(5, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def batch_of(rows, *, width=None, left=False):
    """Rows of (tokens, mode, source length) as the collator writes them."""
    width = width or max(len(tokens) for tokens, _, _ in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    for number, (tokens, _, _) in enumerate(rows):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        batch["input_ids"][number, place] = tokens
        batch["attention_mask"][number, place] = 1
    modes, lengths = zip(*((int(mode), length) for _, mode, length in rows), strict=True)
    return batch | {"lm_modes": torch.tensor(modes), "source_lengths": torch.tensor(lengths)}


def states_of(model, batch):
    with torch.no_grad():
        return model.base_model(**lm_mode_inputs(model, **batch))[0]


def four_rows(tokens):
    return [(tokens, mode, SOURCE_LENGTH * (mode == LMMode.SEQUENCE_TO_SEQUENCE)) for mode in LMMode]


@pytest.mark.parametrize("mode", list(LMMode))
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_masks_equal_the_table(backend, mode):
    row = (tokens_of(12), mode, SOURCE_LENGTH)
    mask = lm_mode_inputs(tiny_model("bert", backend), **batch_of([row]))["attention_mask"]
    assert mask.shape == (1, 1, 12, 12)
    assert mask.dtype == (torch.bool if backend == "sdpa" else torch.float32), "eager adds its mask"
    assert torch.equal(mask[0, 0] if backend == "sdpa" else mask[0, 0] == 0, TABLES[mode])
    if backend == "eager":
        assert (mask[0, 0][~TABLES[mode]] < -1e30).all()
    for left in (False, True):
        mask = lm_mode_inputs(tiny_model("bert", "sdpa"), **batch_of([row], width=15, left=left))["attention_mask"]
        inside, padding = (slice(3, 15), slice(0, 3)) if left else (slice(0, 12), slice(12, 15))
        assert torch.equal(mask[0, 0, inside, inside], TABLES[mode])
        assert mask[0, 0, padding, padding].all() and not mask[0, 0, inside, padding].any()
        assert not mask[0, 0, padding, inside].any()


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_each_token_reaches_those_that_the_table_says(name, backend):
    """Through all layers: the relation of the table is transitive."""
    model, tokens = tiny_model(name, backend), tokens_of(12)
    table = torch.stack(list(TABLES.values()))
    edited = tokens.repeat(12, 1)
    edited.diagonal().copy_(5 + (tokens - 4) % (VOCAB_SIZE - 5))
    before = states_of(model, batch_of(four_rows(tokens)))
    after = states_of(model, batch_of([row for one in edited for row in four_rows(one)])).unflatten(0, (12, 4))
    # The same rows in another batch: sums may be rounded differently.
    moved = (after - before).abs().amax(-1).permute(1, 2, 0)  # mode, who moved, who was edited
    assert torch.equal(moved > 1e-5, table), (moved > 1e-5).int()


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_states_equal_those_computed_for_each_row_of_the_table(name, backend):
    """One layer, where a token's state follows from the tokens that it sees: a stock call for each, with a mask of padding."""
    model, tokens = tiny_model(name, backend, num_hidden_layers=1, n_layers=1), tokens_of(12)
    states = states_of(model, batch_of(four_rows(tokens)))
    for mode, table in TABLES.items():
        with torch.no_grad():
            stock = model.base_model(input_ids=tokens.repeat(12, 1), attention_mask=table.long())[0]
        expected = stock.diagonal(dim1=0, dim2=1).T
        assert (states[mode] - expected).abs().max() < 1e-5


def test_editing_a_target_token_changes_no_bit_of_the_source_nor_of_earlier_targets():
    for name, backend in (("bert", "sdpa"), ("bert", "eager"), ("deberta-v2", "eager"), ("modernbert", "sdpa")):
        model, tokens = tiny_model(name, backend), tokens_of(12)
        edited = tokens.clone()
        edited[8] = 5 + (tokens[8] - 4) % (VOCAB_SIZE - 5)
        rows = [[(row, LMMode.SEQUENCE_TO_SEQUENCE, SOURCE_LENGTH)] for row in (tokens, edited)]
        before, after = (states_of(model, batch_of(row))[0] for row in rows)
        assert torch.equal(before[:8], after[:8])
        assert (before[8:] != after[8:]).any(-1).all()


def causal(model):
    """The stock body with the same weights, as a decoder."""
    config = model.config.__class__.from_dict(model.config.to_dict() | {"is_decoder": True})
    decoder = BertModel(config, add_pooling_layer=False).eval()
    decoder.load_state_dict(model.bert.state_dict())
    return decoder


def test_left_to_right_equals_a_causal_run_and_right_to_left_its_mirror():
    model, tokens = tiny_model("bert", "sdpa"), tokens_of(12)
    decoder, places = causal(model), torch.arange(12)
    with torch.no_grad():
        forward = decoder(input_ids=tokens[None], position_ids=places[None])[0][0]
        mirrored = decoder(input_ids=tokens.flip(0)[None], position_ids=places.flip(0)[None])[0][0].flip(0)
    states = states_of(model, batch_of(four_rows(tokens)))
    torch.testing.assert_close(states[LMMode.LEFT_TO_RIGHT], forward, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[LMMode.RIGHT_TO_LEFT], mirrored, rtol=1e-5, atol=1e-5)
    assert (forward - mirrored).abs().max() > 0.1
    # A source of one token leaves no other order than left to right.
    alone = states_of(model, batch_of([(tokens, LMMode.SEQUENCE_TO_SEQUENCE, 1)]))
    torch.testing.assert_close(alone[0], forward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_rows_of_mixed_modes_and_lengths_equal_each_alone_with_padding_on_either_side(name, backend):
    model = tiny_model(name, backend)
    rows = [(tokens_of(9 + 2 * mode, seed=mode), mode, 4 * (mode == 3)) for mode in LMMode]
    alone = [states_of(model, batch_of([row]))[0] for row in rows]
    for left in (False, True):
        for width in (None, 20):
            batch = batch_of(rows, width=width, left=left)
            states = states_of(model, batch)
            assert states.isfinite().all()
            found = states[batch["attention_mask"].bool()]
            torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_bidirectional_rows_are_those_of_the_stock_model():
    for name in BACKBONES:
        model, tokens = tiny_model(name), tokens_of(12)
        with torch.no_grad():
            stock = model.base_model(input_ids=tokens[None], attention_mask=torch.ones(1, 12))[0]
        states = states_of(model, batch_of([(tokens, LMMode.BIDIRECTIONAL, 0)]))
        torch.testing.assert_close(states, stock, rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_alone_and_gradients_are_finite():
    for backend in ("eager", "sdpa"):
        model = tiny_model("bert", backend)
        batch = batch_of([*four_rows(tokens_of(12)), (tokens_of(0), LMMode.RIGHT_TO_LEFT, 0)], width=16)
        model(**lm_mode_inputs(model, **batch)).logits.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert states_of(model, batch).isfinite().all()


def test_other_inputs_go_through_and_positions_may_be_given():
    model, batch = tiny_model("roberta"), batch_of(four_rows(tokens_of(12)), width=14, left=True)
    inputs = lm_mode_inputs(model, **batch, token_type_ids="types")
    assert inputs["token_type_ids"] == "types"
    assert inputs["position_ids"][0].tolist() == [2, 2, *range(2, 14)], "counted from where the model begins"
    given = torch.arange(14).expand(4, -1)
    assert torch.equal(lm_mode_inputs(model, **batch, position_ids=given)["position_ids"], given + 2)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fnet", {}, "the states of tokens change when one that they must not see is edited"),
        ("convbert", {"embedding_size": 32}, "the states of tokens change"),
        ("deberta-v2", {"conv_kernel_size": 3}, "its forward fails"),
        ("nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 28}, "its forward fails"),
        ("longformer", {"attention_window": 8}, "its forward fails"),
        ("xlm", {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "n_words": VOCAB_SIZE}, "its forward fails"),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, ""),
    ],
)
def test_a_backbone_that_cannot_is_refused_by_name(name, options, reason):
    model, batch = tiny_model(name, **options), batch_of(four_rows(tokens_of(28)))
    with pytest.raises(InputError, match=f"{type(model).__name__} with .*cannot read text in one direc.*{reason}"):
        lm_mode_inputs(model, **batch)


def test_flash_attention_is_refused_and_an_unknown_backend():
    AttentionMaskInterface.register("flash_reference", flash_attention_mask)
    for backend in ("flash_reference", "maskless"):
        model = tiny_model("bert")
        model.config._attn_implementation = backend
        with pytest.raises(InputError, match=f"no mask is known for attn_implementation='{backend}'"):
            check_lm_modes(model)


def test_the_trial_finds_wrong_masks(monkeypatch):
    """The silent traps: a boolean mask under eager, which BERT and MPNet add as a number; none; one turned around; too much."""
    mask_inputs = rules.mask_inputs

    def as_booleans(*args, **kwargs):
        return mask_inputs(*args, **kwargs) == 0

    def transposed(*args, **kwargs):
        return mask_inputs(*args, **kwargs).transpose(2, 3)

    def only_itself(backbone, plan, visible, *, like):
        return mask_inputs(backbone, plan, lambda row, head, query, key: query == key + 0 * row, like=like)

    def no_padding(backbone, plan, visible, *, like):
        rows = torch.ones_like(like)
        modes = torch.arange(4) if len(like) == 4 else torch.zeros(len(like), dtype=torch.int64)
        return mask_inputs(
            backbone,
            plan,
            mode_visibility(rows, lm_modes=modes, source_lengths=torch.full_like(modes, 10)),
            like=like,
        )

    for wrong in (as_booleans, transposed, only_itself, no_padding, lambda *args, **kwargs: None):
        for name in ("bert", "mpnet"):
            with monkeypatch.context() as patch:
                patch.setattr(rules, "mask_inputs", wrong)
                with pytest.raises(InputError, match="cannot read text in one direction"):
                    check_lm_modes(tiny_model(name))
                    pytest.fail(f"{wrong} {name}")
            check_lm_modes(tiny_model(name))
    with monkeypatch.context() as patch:
        patch.setattr(rules, "given_first_position", lambda body: 0)
        with pytest.raises(InputError, match="the states of a row that sees all of itself"):
            check_lm_modes(tiny_model("roberta"))


def test_the_trial_happens_once_for_a_backend_and_leaves_no_trace():
    model, batch = tiny_model("bert", "sdpa", hidden_dropout_prob=0.5), batch_of(four_rows(tokens_of(12)))
    model.train()
    model.base_model.encoder.layer[0].eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    calls = []
    model.base_model.register_forward_hook(lambda *args: calls.append(1))
    lm_mode_inputs(model, **batch)
    tried = len(calls)
    assert tried > 0 and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    lm_mode_inputs(model, **batch)
    assert len(calls) == tried
    model.set_attn_implementation("eager")
    assert lm_mode_inputs(model, **batch)["attention_mask"].dtype == torch.float32
    assert len(calls) > tried


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "roberta"])
def test_half_precision(name):
    """Rounding is no leak."""
    tokens = tokens_of(12)
    edited = torch.cat([tokens[:8], tokens[8:].flip(0)])
    rows = [[(row, mode, 5 * (mode == 3)) for mode in (1, 3)] for row in (tokens, edited)]
    states = [states_of(tiny_model(name).to(torch.bfloat16), batch_of(row))[:, :8] for row in rows]
    assert torch.equal(*states)
    with torch.autocast("cpu", torch.bfloat16):
        states = [states_of(tiny_model(name), batch_of(row))[:, :8] for row in rows]
    assert torch.equal(*states)
