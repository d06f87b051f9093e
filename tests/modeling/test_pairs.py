"""Pairs that share the rows of an encoder-decoder against the same pairs alone, for every architecture and attention backend."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, EncoderDecoderConfig, EncoderDecoderModel

from helpers import flash
from helpers.method_matrix import relative_difference
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import GatheredHead
from hf_pretrain.modeling.visibility import pairs, sides
from hf_pretrain.modeling.visibility.backends import Attending, FastAttention, paired_bounds
from hf_pretrain.modeling.visibility.pairs import PairReader

VOCAB_SIZE = 100
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GEMMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
# The window is shorter than the pairs.
GEMMA |= {"intermediate_size": 64, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
PARTS = {
    "bert": BERT,
    "roberta": {**BERT, "pad_token_id": 1},
    "modernbert": {**BERT, **SPECIAL, "local_attention": 4, "global_attn_every_n_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "bart": BART,
}
OPTIONS = {
    "t5gemma": {"encoder": {**GEMMA, "vocab_size": VOCAB_SIZE}, "decoder": {**GEMMA, "vocab_size": VOCAB_SIZE}},
    "marian": {**BART, "pad_token_id": 0, "decoder_start_token_id": 0},
}
PACKS = ["t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "plbart", "blenderbot", "t5gemma"]
PACKS += ["bert+bert", "bert+gpt2", "modernbert+bert", "roberta+roberta", "bert+bart"]
EAGER_ONLY = {"t5gemma"}
BOTH_BACKENDS = {"t5", "umt5", "bart", "pegasus", "bert+bert", "bert+gpt2", "modernbert+bert"}
# Their code is a copy of T5's or of BART's, and of theirs the second backend says what T5's and BART's say.
COPIES = {"mt5", "mbart", "plbart", "blenderbot"}
SECOND_SLOW = {"umt5", "pegasus", "bert+bert", "modernbert+bert"}
# Tokens of input and target of each pair, by row; the second input row has no padding where its target row has some.
ROWS = [[(9, 5), (4, 7), (6, 3)], [(14, 6), (7, 6)]]


def config_of(name):
    if "+" in name:
        encoder, decoder = (
            AutoConfig.for_model(part, **PARTS[part], vocab_size=VOCAB_SIZE) for part in name.split("+")
        )
        return EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, pad_token_id=0)
    sizes = OPTIONS.get(name, T5 if "t5" in name else BART)
    return AutoConfig.for_model(name, **sizes, vocab_size=VOCAB_SIZE, tie_word_embeddings="t5" in name)


def build(name, backend="sdpa", **options):
    config = config_of(name)
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    if "+" in name:
        model = EncoderDecoderModel(config=config)
    else:
        model = AutoModelForSeq2SeqLM.from_config(config)
    if backend != model.config._attn_implementation:
        model.set_attn_implementation(backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.requires_grad * torch.randn_like(parameter))
    return model.double().eval()


def cases(names=PACKS):
    for number, name in enumerate(names):
        backends = ["sdpa", "eager"] if name in BOTH_BACKENDS else [["sdpa", "eager"][number % 2]]
        for place, backend in enumerate(["eager"] if name in EAGER_ONLY else backends):
            is_slow = name in COPIES or (place == 1 and name in SECOND_SLOW)
            yield pytest.param(name, backend, id=f"{name}-{backend}", marks=[pytest.mark.slow] if is_slow else [])


def pairs_of(rows=ROWS, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        [tuple(torch.randint(5, VOCAB_SIZE, (n,), generator=generator) for n in pair) for pair in row] for row in rows
    ]


def batch_of(rows, *, widths=(21, 18), documents=True):
    """Rows of pairs as a collator writes them, with every real target token as a target."""
    batch = {}
    for side, (prefix, width) in enumerate(zip(("", "decoder_"), widths, strict=True)):
        fills = {"input_ids": 0, "attention_mask": 0, "document_ids": -1, "position_ids": 0}
        batch |= {f"{prefix}{name}": torch.full((len(rows), width), fill) for name, fill in fills.items()}
        for number, row in enumerate(rows):
            parts = [pair[side] for pair in row]
            length = sum(map(len, parts))
            batch[f"{prefix}input_ids"][number, :length] = torch.cat(parts)
            batch[f"{prefix}attention_mask"][number, :length] = 1
            ids = torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)])
            batch[f"{prefix}document_ids"][number, :length] = ids
            batch[f"{prefix}position_ids"][number, :length] = torch.cat([torch.arange(len(part)) for part in parts])
    batch["target_positions"] = batch["decoder_attention_mask"].flatten().nonzero().flatten()
    return batch if documents else without_documents(batch)


def without_documents(batch):
    return {name: value for name, value in batch.items() if "document" not in name and "position_ids" not in name}


def one_pair(pair):
    return batch_of([[pair]], widths=tuple(map(len, pair)), documents=False)


def stock_logits(model, batch):
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    return model(**{name: batch[name] for name in names}).logits.flatten(0, 1)[batch["target_positions"]]


def backward(model, logits, labels):
    """Return the gradients of a loss that weights targets unequally."""
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    model.zero_grad(set_to_none=True)
    (losses * (1 + labels % 3)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def labels_of(pair):
    return (pair[1] * 7 + torch.arange(len(pair[1]))) % VOCAB_SIZE


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_packed_pairs_have_the_logits_and_gradients_that_they_have_alone(name, backend):
    model, rows = build(name, backend), pairs_of()
    expected_logits, expected = [], None
    for pair in (pair for row in rows for pair in row):
        logits = stock_logits(model, one_pair(pair))
        gradients = backward(model, logits, labels_of(pair))
        expected_logits.append(logits.detach())
        expected = {n: g + (expected[n] if expected else 0) for n, g in gradients.items()}
    reader = PairReader(model)
    logits = reader.run(**batch_of(rows))
    torch.testing.assert_close(logits, torch.cat(expected_logits), rtol=1e-5, atol=1e-5)
    labels = torch.cat([labels_of(pair) for row in rows for pair in row])
    assert relative_difference(expected, backward(model, logits, labels)) <= 1e-5
    with torch.no_grad():
        leaking = reader.run(**without_documents(batch_of(rows)))
    assert not torch.allclose(logits, leaking, rtol=1e-3), "this test can fail"


@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_rows_of_one_pair_have_the_stock_logits(name, backend):
    model, (row, _) = build(name, backend), pairs_of()
    padded = batch_of([[pair] for pair in row], widths=(11, 8), documents=False)
    if name in ("t5gemma", "modernbert+bert"):
        # Stock padding that sees nothing within its window is no number in fp64, and in fp32 it is one.
        model = model.float()
    whole = batch_of(
        [[pair] for pair in pairs_of([[(9, 7)], [(9, 7)]])[0] + pairs_of([[(9, 7)]], seed=2)[0]],
        widths=(9, 7),
        documents=False,
    )
    with torch.no_grad():
        for batch, flags in ((padded, (True, None)), (whole, (False, None))):
            expected = stock_logits(model, batch)
            with PairReader(model) as reader:
                for flag in flags:
                    found = reader.run(**batch, is_padded=flag, decoder_is_padded=flag)
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "bert+gpt2", "modernbert+bert", "t5gemma"])
def test_edits_move_nothing_elsewhere(name):
    model, rows = build(name, "eager"), pairs_of()
    reader, before = PairReader(model), batch_of(rows)
    documents = before["decoder_document_ids"].flatten()[before["target_positions"]]
    in_row_0 = before["target_positions"] < before["decoder_input_ids"].shape[1]
    with torch.no_grad():
        logits = reader.run(**before)
        for side in (0, 1):
            edited = [[tuple(part.clone() for part in pair) for pair in row] for row in rows]
            edited[0][1][side][-1] = 5 + (edited[0][1][side][-1] - 4) % (VOCAB_SIZE - 5)
            moved = (reader.run(**batch_of(edited)) != logits).any(dim=1)
            own = (documents == 1) & in_row_0
            assert not moved[~own].any()
            # The last token of a target is seen by nothing but itself.
            assert moved[own].all() if side == 0 else moved[own].tolist() == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("t5", "sdpa"),
        ("bart", "sdpa"),
        ("bart", "eager"),
        ("m2m_100", "sdpa"),
        ("pegasus", "eager"),
        ("roberta+roberta", "sdpa"),
        ("t5gemma", "eager"),
    ],
)
def test_a_fragment_at_its_positions_is_the_end_of_a_row_whose_beginning_is_masked(name, backend):
    model, rows = build(name, backend), pairs_of([[(9, 12)], [(7, 10)]])
    model = model.float() if name == "t5gemma" else model  # as above
    full = batch_of(rows, widths=(9, 12), documents=False)
    starts, width = (5, 3), 7
    full["decoder_attention_mask"] *= torch.arange(12) >= torch.tensor(starts)[:, None]
    full["target_positions"] = full["decoder_attention_mask"].flatten().nonzero().flatten()
    fragments = [[(pair[0], pair[1][start:])] for (pair,), start in zip(rows, starts, strict=True)]
    batch = batch_of(fragments, widths=(9, width), documents=False)
    positions = torch.arange(width) + torch.tensor(starts)[:, None]
    with torch.no_grad(), PairReader(model) as reader:
        expected = stock_logits(model, full)
        for flag in (None, False):
            found = reader.run(**batch, decoder_position_ids=positions, decoder_is_padded=flag)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if name not in ("t5", "t5gemma"):
            assert not torch.allclose(reader.run(**batch), expected, rtol=1e-3), "this test can fail"


def test_a_fragment_may_begin_behind_the_columns_of_its_row_and_share_it():
    model = build("bart")
    whole = pairs_of([[(9, 20)], [(7, 12)]])
    expected = []
    with torch.no_grad(), PairReader(model) as reader:
        for ((source, target),), start in zip(whole, (13, 8), strict=True):
            full = batch_of([[(source, target)]], widths=(len(source), len(target)), documents=False)
            full["decoder_attention_mask"][:, :start] = 0
            full["target_positions"] = torch.arange(start, len(target))
            expected.append(stock_logits(model, full))
        batch = batch_of([[(whole[0][0][0], whole[0][0][1][13:]), (whole[1][0][0], whole[1][0][1][8:])]])
        batch["decoder_position_ids"][0, :11] = torch.cat([torch.arange(13, 20), torch.arange(8, 12)])
        torch.testing.assert_close(reader.run(**batch), torch.cat(expected), rtol=1e-5, atol=1e-5)


REFUSED = {
    "longt5": ({"local_radius": 5}, "its forward fails"),
    "led": ({"attention_window": [8, 8]}, "its forward fails"),
    "bigbird_pegasus": ({"block_size": 2, "num_random_blocks": 1}, "its forward fails"),
    "pegasus_x": ({"block_size": 8, "num_global_tokens": 4}, "its forward fails"),
    "switch_transformers": ({"num_experts": 2}, "the states of a pair change"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_pack_is_refused_by_name_but_reads_rows_of_one_pair(name):
    options, reason = REFUSED[name]
    sizes = {**T5, **options} if name in ("longt5", "switch_transformers") else {**BART, **options}
    if name == "led":
        sizes |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(name, **sizes, vocab_size=VOCAB_SIZE)).eval()
    reader, rows = PairReader(model), pairs_of()
    message = (
        f"^{type(model).__name__} with attn_implementation='eager' cannot keep .* apart: {reason}.*'doc_sentences'"
    )
    with pytest.raises(InputError, match=message) as caught:
        reader.run(**batch_of(rows))
    assert "\n" not in str(caught.value)
    batch = batch_of([[row[0]] for row in rows], documents=False)
    with torch.no_grad():
        torch.testing.assert_close(reader.run(**batch), stock_logits(model, batch), rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_more_than_its_position_is_refused():
    sizes = {"hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 64}
    sizes |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "vocab_size": VOCAB_SIZE}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("prophetnet", **sizes))
    batch = batch_of(pairs_of())
    for inputs in (batch, without_documents(batch)):
        with pytest.raises(InputError, match="^ProphetNetForCond.* its head does not treat each position on its own"):
            PairReader(model).run(**inputs)


def test_positions_that_are_computed_in_place_are_refused():
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("pegasus_x", **BART, vocab_size=VOCAB_SIZE, block_size=8, num_global_tokens=4)
    )
    with pytest.raises(InputError, match="^PegasusXForCond.* cannot be given the positions of a fragment.*'mass'"):
        PairReader(model).check_positions()


def test_other_models_are_refused():
    with pytest.raises(InputError, match="^BertModel is no encoder-decoder"):
        PairReader(build("bert+bert").encoder)
    fsmt = AutoConfig.for_model("fsmt", **BART, langs=["a", "b"], src_vocab_size=VOCAB_SIZE, tgt_vocab_size=VOCAB_SIZE)
    with pytest.raises(InputError, match="^FSMTForConditionalGeneration: its FSMTEncoder is no model of its own"):
        PairReader(AutoModelForSeq2SeqLM.from_config(fsmt))


def test_rows_longer_than_a_table_of_positions_are_refused():
    with pytest.raises(InputError, match=r"BartLearnedPositionalEmbedding has 66 rows, too few for the 80 tokens"):
        PairReader(build("bart")).check_isolation(length=80)


def forgotten_restart(side, position_ids):
    columns = torch.arange(position_ids.shape[1]).expand_as(position_ids)
    original_place(side, columns)


original_place, original_causal, original_write = sides.Side.place, sides.causal_masks, sides.write_mask


def all_visible(row, head, query, key):
    return (query >= 0) & (key >= 0) & (row >= 0)


def all_earlier(row, head, query, key):
    return all_visible(row, head, query, key) & (key <= query)


@pytest.mark.parametrize(
    ("name", "target", "attribute", "wrong"),
    [
        ("bart", sides.Side, "place", forgotten_restart),
        ("bart", sides.Side, "place", lambda side, positions: original_place(side, positions + 1)),
        ("bert+gpt2", sides.Side, "place", forgotten_restart),
        ("t5", pairs, "write_mask", lambda side, visible, **sizes: original_write(side, all_visible, **sizes)),
        ("t5", pairs, "causal_masks", lambda side, visible, **sizes: original_causal(side, all_earlier, **sizes)),
        ("t5", pairs, "sees_within", lambda groups, orders=None: lambda r, h, q, k: groups[r, q] == groups[r, k]),
    ],
)
def test_the_trial_finds_wrong_masks_and_positions(name, target, attribute, wrong, monkeypatch):
    reader = PairReader(build(name))
    monkeypatch.setattr(target, attribute, wrong)
    with pytest.raises(InputError, match="cannot keep the pairs of a row apart: the states of a (pair|target)"):
        reader.check_isolation()
    monkeypatch.undo()
    reader.check_isolation()


def test_the_trial_of_positions_finds_wrong_ones(monkeypatch):
    reader = PairReader(build("bart"))
    monkeypatch.setattr(sides.Side, "place", forgotten_restart)
    with pytest.raises(InputError, match="cannot be given the positions of a fragment: the states of a fragment"):
        reader.check_positions()


def test_between_runs_the_hooks_do_nothing_and_a_failed_run_leaves_no_trace():
    model, batch = build("bart"), batch_of(pairs_of())
    expected = stock_logits(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    reader = PairReader(model)
    reader.run(**batch)
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(IndexError):
        reader.run(**batch | {"decoder_position_ids": batch["decoder_position_ids"] + 1000})
    model.eval()
    assert torch.equal(stock_logits(model, batch), expected)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    reader.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(AssertionError, match="without the hook"):
        reader.run(**batch)


@pytest.mark.parametrize("name", ["t5", "bart", "bert+gpt2"])
def test_copies_have_hooks_of_their_own(name):
    reader, batch = PairReader(build(name)), batch_of(pairs_of())
    expected = reader.run(**batch)
    stream = io.BytesIO()
    torch.save(reader, stream)
    stream.seek(0)
    for other in (copy.deepcopy(reader), torch.load(stream, weights_only=False)):
        assert torch.equal(other.run(**batch), expected)
        with torch.no_grad():
            for parameter in other._model.parameters():
                parameter.zero_()
        assert not torch.equal(other.run(**batch), expected)
    assert torch.equal(reader.run(**batch), expected)


class Looking(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses to tell the host a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero"), "the step waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("t5", "sdpa"), ("bart", "sdpa"), ("m2m_100", "eager"), ("modernbert+bert", "eager"), ("bert+gpt2", "sdpa")],
)
def test_no_step_looks_at_a_value(name, backend):
    # All layers of these take the same steps; on the meta device each step is slow.
    layers = {"t5": ("num_layers", "num_decoder_layers")}.get(name, ("encoder_layers", "decoder_layers"))
    model = build(name, backend, **{} if "+" in name else dict.fromkeys(layers, 1)).float()
    batch = batch_of(pairs_of())
    kinds = [
        batch,
        without_documents(batch),
        without_documents(batch) | {"decoder_position_ids": batch["decoder_position_ids"]},
    ]
    flags = [{"is_padded": flag, "decoder_is_padded": flag} for flag in (None, True, False)]
    reader = PairReader(model)
    for inputs in kinds:
        reader.run(**inputs)
        with Looking():
            for known in flags:
                reader.run(**inputs, **known)
    # Tried out, and then not.
    for other in (copy.deepcopy(reader), PairReader(copy.deepcopy(model))):
        other._model.to("meta").train()
        for inputs, known in zip([*kinds, kinds[1]], [{}, {}, {}, flags[2]], strict=True):
            logits = other.run(**{key: value.to("meta") for key, value in inputs.items()}, **known)
            assert logits.is_meta and logits.shape == (len(batch["target_positions"]), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "left_out"), [("t5", {"encoder", "cross", "decoder"}), ("bart", {"encoder", "cross"})]
)
def test_where_nothing_is_padded_no_mask_is_given_that_is_not_needed(name, left_out):
    """Stock BART makes a mask for its decoder by looking at one, so that it is given one."""
    model = build(name)
    reader, seen = PairReader(model), {}
    batch = batch_of(pairs_of([[(9, 7)], [(9, 7)]]), widths=(9, 7), documents=False)
    reader.run(**batch)
    for side, body in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        body.register_forward_pre_hook(
            lambda module, args, kwargs, side=side: seen.update(
                {side: kwargs["attention_mask"]}
                | ({"cross": kwargs["encoder_attention_mask"]} if side == "decoder" else {})
            ),
            with_kwargs=True,
        )
    reader.run(**batch, is_padded=False, decoder_is_padded=False)
    assert {kind for kind, mask in seen.items() if mask is None} == left_out
    reader.run(**batch, is_padded=True, decoder_is_padded=True)
    assert {kind: tuple(mask.shape) for kind, mask in seen.items()} == {
        "encoder": (2, 1, 9, 9),
        "decoder": (2, 1, 7, 7),
        "cross": (2, 1, 7, 9),
    }


@pytest.mark.parametrize("name", ["t5", "bart", "bert+bert"])
def test_gradient_checkpointing_changes_nothing(name):
    model, batch = build(name), batch_of(pairs_of())
    labels = torch.arange(len(batch["target_positions"])) % VOCAB_SIZE
    reader = PairReader(model)
    expected = backward(model, reader.run(**batch), labels)
    model.activation_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert relative_difference(expected, backward(model, reader.run(**batch), labels)) <= 1e-5


def test_dropout_is_that_of_the_stock_forward():
    model = build("t5").train()
    batch = batch_of(pairs_of([[(9, 7)], [(9, 7)]]), widths=(9, 7), documents=False)
    reader = PairReader(model)
    reader.run(**batch)
    torch.manual_seed(3)
    expected = stock_logits(model, batch)
    torch.manual_seed(3)
    torch.testing.assert_close(reader.run(**batch), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(reader.run(**batch), expected)


def test_a_compiled_step_is_the_same_and_whole():
    model, batch = build("bart", encoder_layers=1, decoder_layers=1), batch_of(pairs_of())
    reader = PairReader(model)
    expected = reader.run(**batch)
    compiled = torch.compile(lambda inputs: reader.run(**inputs), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_head_gathers_from_the_module_that_it_reads():
    model, batch = build("bart"), without_documents(batch_of(pairs_of()))
    positions = batch.pop("target_positions")
    expected = model(**batch).logits.flatten(0, 1)[positions]
    with GatheredHead(model, body=model.get_decoder()) as head:
        torch.testing.assert_close(head(model, positions, **batch), expected)


# Flash attention

ON_FLASH = ["bart", "pegasus", "marian", "m2m_100", "bert+bert", "bert+gpt2", "modernbert+bert", "t5gemma"]


def fast_attention(model):
    part = Attending(model, torch.device("cpu"), torch.float32)
    return FastAttention({"model": part}, allowed=["model"])


@pytest.mark.parametrize("rows", ["documents", "padded", "full"])
@pytest.mark.parametrize("name", ON_FLASH)
def test_flash_attention_gives_the_logits_and_gradients_of_the_own_backend(monkeypatch, name, rows):
    calls = flash.install(monkeypatch)
    model = build(name, "eager" if name in EAGER_ONLY else "sdpa")
    batch = batch_of(pairs_of(), documents=rows == "documents")
    padded = {"is_padded": True, "decoder_is_padded": True} if rows == "padded" else {}
    if rows == "full":
        batch = batch_of([[pair] for pair in pairs_of([[(9, 5)], [(9, 5)]])[0] * 2], widths=(9, 5), documents=False)
        padded = {"is_padded": False, "decoder_is_padded": False}
    parameters, found = [one for one in model.parameters() if one.requires_grad], []
    reader, fast = PairReader(model), fast_attention(model)
    for running in (contextlib.nullcontext, fast.running):
        with running():
            logits = reader.run(**batch, **padded)
            found.append((logits, torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)))
            assert bool(calls) == (running == fast.running)
    if name == "t5gemma":
        # Its encoder has other states there, perhaps because a window of its masks is wider by a token.
        assert not fast.is_faster and "are not those that it has" in str(fast)
    else:
        assert fast.is_faster and calls[-1] == ("plain" if rows == "full" else "varlen")
    torch.testing.assert_close(found[1][0], found[0][0])
    for one, other in zip(found[1][1], found[0][1], strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_t5_has_no_flash_attention(monkeypatch):
    flash.install(monkeypatch)
    assert str(fast_attention(build("t5"))) == "sdpa (T5ForConditionalGeneration has no flash attention)"


@pytest.mark.parametrize("rows", ["documents", "padded"])
def test_a_model_that_does_not_hand_bounds_on_goes_back(monkeypatch, rows):
    flash.install(monkeypatch)
    model, batch = build("bart"), batch_of(pairs_of(), documents=rows == "documents")
    reader, fast = PairReader(model), fast_attention(model)
    expected = reader.run(**batch)
    # The attention to the encoder gets the bounds of the decoder's own.
    for hook in reader._decoder.hooks[1 + len(reader._decoder.tables) :]:
        hook.remove()
    with fast.running():
        torch.testing.assert_close(reader.run(**batch), expected)
        assert model.config._attn_implementation == "sdpa"
    assert "cannot" in str(fast) and not fast.is_faster


def test_bounds_of_pairs_have_as_many_sequences_on_both_sides():
    ids = torch.tensor([[0, 0, 1, 2, 2, -1], [-1, -1, 0, 0, 0, 0]])
    decoder_ids = torch.tensor([[0, 1, 1, 1], [0, 0, -1, -1]])
    first, second = paired_bounds(ids, decoder_ids, num_documents=4)
    # Before, four documents, behind; then the same of the second row.
    assert first.tolist() == [0, 0, 2, 3, 5, 5, 6, 8, 12, 12, 12, 12, 12]
    assert second.tolist() == [0, 0, 1, 4, 4, 4, 4, 4, 6, 6, 6, 6, 8]
    assert first.dtype == torch.int32
    assert paired_bounds(ids.to("meta"), decoder_ids.to("meta"), num_documents=4)[0].shape == (13,), "nothing is read"
