"""Conversion: the same outputs as the old models' equations, written out here, on weights under the old names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_pretrain.errors import InputError
from hf_pretrain.models.transformer_xl.conversion import convert_transfo_xl_checkpoint, load_transfo_xl_checkpoint
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM, TransformerXLModel

CONFIG = {
    "model_type": "transfo-xl",
    "vocab_size": 40,
    "cutoffs": [8, 20],
    "d_model": 12,
    "d_embed": 12,
    "n_head": 2,
    "d_head": 5,
    "d_inner": 18,
    "div_val": 2,
    "pre_lnorm": False,
    "n_layer": 3,
    "mem_len": 5,
    "clamp_len": 4,
    "same_length": True,
    "proj_share_all_but_first": True,
    "attn_type": 0,
    "dropout": 0.1,
    "dropatt": 0.0,
    "untie_r": True,
    "proj_init_std": 0.01,
    "init_std": 0.02,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 0,
}
VARIANTS = {
    "released": {},
    "not_same_length": {"same_length": False, "clamp_len": -1},
    "pre_lnorm_shared_biases": {"pre_lnorm": True, "untie_r": False},
    "one_table": {"div_val": 1, "d_embed": 6},
    "one_wide_table": {"div_val": 1},
    "no_projections_shared": {"proj_share_all_but_first": False},
    "plain_softmax": {"div_val": 1, "cutoffs": []},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def old_checkpoint(**options):
    """A configuration and random weights under the names of transformers 4.35."""
    config = CONFIG | options
    generator, state = torch.Generator().manual_seed(0), {}
    width, inner = config["d_model"], config["n_head"] * config["d_head"]
    bounds = [0, *config["cutoffs"], config["vocab_size"]]
    clusters = len(bounds) - 1

    def draw(name, *shape, center=0.0):
        state[name] = center + 0.4 * torch.randn(*shape, generator=generator)

    tables = [(config["vocab_size"], config["d_embed"])]
    if config["div_val"] > 1:
        tables = [
            (bounds[index + 1] - bounds[index], config["d_embed"] // config["div_val"] ** index)
            for index in range(clusters)
        ]
    is_projected = config["div_val"] > 1 or config["d_embed"] != width
    for index, (rows, narrow) in enumerate(tables):
        draw(f"transformer.word_emb.emb_layers.{index}.weight", rows, narrow)
        draw(f"crit.out_layers.{index}.bias", rows)
        state[f"crit.out_layers.{index}.weight"] = state[f"transformer.word_emb.emb_layers.{index}.weight"]
        if is_projected:
            draw(f"transformer.word_emb.emb_projs.{index}", width, narrow)
    for index in range(clusters if is_projected else 0):
        own = index if config["div_val"] > 1 else 0
        draw(f"crit.out_projs.{index}", width, tables[own][1])
        if index and config["proj_share_all_but_first"]:
            state[f"crit.out_projs.{index}"] = state[f"transformer.word_emb.emb_projs.{own}"]
    if clusters > 1:
        draw("crit.cluster_weight", clusters - 1, config["d_embed"])
        draw("crit.cluster_bias", clusters - 1)
    state["transformer.pos_emb.inv_freq"] = 10000.0 ** (-torch.arange(0.0, width, 2) / width)
    for bias in ("r_w_bias", "r_r_bias"):
        draw(f"transformer.{bias}", config["n_head"], config["d_head"])
    for layer in range(config["n_layer"]):
        prefix = f"transformer.layers.{layer}."
        draw(prefix + "dec_attn.qkv_net.weight", 3 * inner, width)
        draw(prefix + "dec_attn.r_net.weight", inner, width)
        draw(prefix + "dec_attn.o_net.weight", width, inner)
        draw(prefix + "pos_ff.CoreNet.0.weight", config["d_inner"], width)
        draw(prefix + "pos_ff.CoreNet.0.bias", config["d_inner"])
        draw(prefix + "pos_ff.CoreNet.3.weight", width, config["d_inner"])
        draw(prefix + "pos_ff.CoreNet.3.bias", width)
        for norm in ("dec_attn", "pos_ff"):
            draw(f"{prefix}{norm}.layer_norm.weight", width, center=1.0)
            draw(f"{prefix}{norm}.layer_norm.bias", width)
        for bias in ("r_w_bias", "r_r_bias"):
            if config["untie_r"]:
                draw(f"{prefix}dec_attn.{bias}", config["n_head"], config["d_head"])
            else:
                state[f"{prefix}dec_attn.{bias}"] = state[f"transformer.{bias}"]
    if config["untie_r"]:
        del state["transformer.r_w_bias"], state["transformer.r_r_bias"]
    return config, state


def old_forward(config, state, tokens, mems):
    """The old model, time first: log-probabilities ``[B, S, vocabulary]`` and the new memory, from `mems` ``[N, M, B, D]``."""
    width, heads, head = config["d_model"], config["n_head"], config["d_head"]
    bounds, scale = [0, *config["cutoffs"], config["vocab_size"]], width**0.5

    def weight(name):
        return state[f"transformer.{name}"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(
            x, (width,), weight(name + ".weight"), weight(name + ".bias"), config["layer_norm_epsilon"]
        )

    def embed(token):
        cluster = sum(token >= bound for bound in config["cutoffs"]) if config["div_val"] > 1 else 0
        first = bounds[cluster] if config["div_val"] > 1 else 0
        vector = weight(f"word_emb.emb_layers.{cluster}.weight")[token - first]
        name = f"transformer.word_emb.emb_projs.{cluster}"
        return (state[name] @ vector if name in state else vector) * scale

    hidden = torch.stack([torch.stack([embed(int(token)) for token in row]) for row in tokens.T])
    num_queries, num_keys = len(hidden), len(hidden) + mems.shape[1]
    distances = torch.arange(num_keys - 1, -1, -1.0)
    if config["clamp_len"] > 0:
        distances = distances.clamp(max=config["clamp_len"])
    angles = distances[:, None] * weight("pos_emb.inv_freq")
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = torch.arange(num_queries)[:, None] + mems.shape[1], torch.arange(num_keys)
    hides = columns > rows
    if config["same_length"]:
        hides = hides | (columns <= rows - config["mem_len"])
    inputs = []
    for layer in range(config["n_layer"]):
        inputs.append(hidden)
        name = f"layers.{layer}."
        both = torch.cat([mems[layer], hidden])
        source = norm(both, name + "dec_attn.layer_norm") if config["pre_lnorm"] else both
        qkv = (source @ weight(name + "dec_attn.qkv_net.weight").T).unflatten(-1, (3, heads, head))
        query, key, value = qkv[-num_queries:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        relative = (table @ weight(name + "dec_attn.r_net.weight").T).unflatten(-1, (heads, head))
        content = torch.einsum("ibnd,jbnd->ijbn", query + weight(name + "dec_attn.r_w_bias"), key)
        position = torch.einsum("ibnd,jnd->ijbn", query + weight(name + "dec_attn.r_r_bias"), relative)
        padded = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
        shifted = padded.view(num_keys + 1, num_queries, *position.shape[2:])[1:].reshape(position.shape)
        scores = ((content + shifted) / head**0.5).masked_fill(hides[:, :, None, None], -1e30)
        read = torch.einsum("ijbn,jbnd->ibnd", scores.softmax(1), value).flatten(2)
        attended = hidden + read @ weight(name + "dec_attn.o_net.weight").T
        if not config["pre_lnorm"]:
            attended = norm(attended, name + "dec_attn.layer_norm")
        source = norm(attended, name + "pos_ff.layer_norm") if config["pre_lnorm"] else attended
        inner = source @ weight(name + "pos_ff.CoreNet.0.weight").T + weight(name + "pos_ff.CoreNet.0.bias")
        outer = inner.relu() @ weight(name + "pos_ff.CoreNet.3.weight").T + weight(name + "pos_ff.CoreNet.3.bias")
        hidden = attended + outer if config["pre_lnorm"] else norm(attended + outer, name + "pos_ff.layer_norm")
    new_mems = torch.cat([mems, torch.stack(inputs)], dim=1)[:, -mems.shape[1] :]
    return old_log_prob(config, state, bounds, hidden.transpose(0, 1)), new_mems


def old_log_prob(config, state, bounds, hidden):
    def logits(cluster):
        if config["div_val"] > 1:
            weight, bias = (state[f"crit.out_layers.{cluster}.{kind}"] for kind in ("weight", "bias"))
        else:
            block = slice(bounds[cluster], bounds[cluster + 1])
            weight, bias = (state[f"crit.out_layers.0.{kind}"][block] for kind in ("weight", "bias"))
        if cluster == 0 and config["cutoffs"]:
            weight = torch.cat([weight, state["crit.cluster_weight"]])
            bias = torch.cat([bias, state["crit.cluster_bias"]])
        name = f"crit.out_projs.{cluster}"
        return (hidden @ state[name] if name in state else hidden) @ weight.T + bias

    head = logits(0).log_softmax(-1)
    parts = [head[..., : bounds[1]]]
    for cluster in range(1, len(bounds) - 1):
        parts.append(head[..., bounds[1] + cluster - 1, None] + logits(cluster).log_softmax(-1))
    return torch.cat(parts, dim=-1)


def converted_model(config, state):
    new_config, new_state = convert_transfo_xl_checkpoint(state, config)
    model = TransformerXLForCausalLM(new_config)
    model.load_state_dict(new_state)
    return model.eval()


@variants
@torch.no_grad()
def test_the_outputs_are_the_old_models(options):
    config, state = old_checkpoint(**options)
    model, tokens = converted_model(config, state), torch.randint(0, 40, (2, 14), generator=torch.manual_seed(1))
    # As the old models did, from zeros that are attended, through three segments.
    old_mems = torch.zeros(3, config["mem_len"], 2, 12)
    mems, lengths = model.model.empty_mems(2)
    lengths += mems.shape[2]
    for segment in tokens.split([6, 3, 5], dim=1):
        expected, old_mems = old_forward(config, state, segment, old_mems)
        outputs = model(segment, mems=mems, mem_lengths=lengths)
        torch.testing.assert_close(outputs.logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
        mems, lengths = outputs.mems, outputs.mem_lengths
        kept = old_mems[:, config["mem_len"] - mems.shape[2] :].transpose(1, 2)
        torch.testing.assert_close(mems, kept, atol=1e-4, rtol=1e-4)


@variants
@torch.no_grad()
def test_without_memory_too(options):
    config, state = old_checkpoint(**options)
    tokens = torch.randint(0, 40, (2, 5), generator=torch.manual_seed(1))
    expected, _ = old_forward(config, state, tokens, torch.zeros(3, 0, 2, 12))
    logits = converted_model(config, state)(tokens).logits
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_our_memory_starts_empty_and_theirs_with_zeros():
    config, state = old_checkpoint()
    tokens = torch.arange(6)[None]
    zeros, _ = old_forward(config, state, tokens, torch.zeros(3, config["mem_len"], 1, 12))
    logits = converted_model(config, state)(tokens).logits
    assert (logits.log_softmax(-1) - zeros).abs().amax() > 0.1


def test_the_window_is_the_old_one():
    config, _ = convert_transfo_xl_checkpoint(old_checkpoint()[1], CONFIG)
    assert (config.same_length, config.mem_len, config.sliding_window) == (True, 4, 5)
    config, _ = convert_transfo_xl_checkpoint(old_checkpoint()[1], CONFIG | {"same_length": False, "clamp_len": -1})
    assert (config.same_length, config.mem_len, config.clamp_len) == (False, 5, -1)


@pytest.mark.parametrize("kind", ["pickled", "safe"])
@torch.no_grad()
def test_a_folder_is_loaded(tmp_path, kind):
    config, state = old_checkpoint(untie_r=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "pickled":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        # A file that has each shared weight once.
        names = {}
        for name, weight in state.items():
            names.setdefault(weight.data_ptr(), name)
        save_file({name: state[name] for name in names.values()}, tmp_path / "model.safetensors")
    tokens = torch.arange(0, 40, 4)[None]
    expected = converted_model(config, state)(tokens).logits
    model = load_transfo_xl_checkpoint(tmp_path)
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(TransformerXLForCausalLM.from_pretrained(tmp_path / "new")(tokens).logits, expected)


@torch.no_grad()
def test_a_model_without_a_head_is_loaded(tmp_path):
    config, state = old_checkpoint()
    bare = {name.removeprefix("transformer."): weight for name, weight in state.items() if "crit." not in name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(bare, tmp_path / "pytorch_model.bin")
    model, tokens = load_transfo_xl_checkpoint(tmp_path), torch.arange(6)[None]
    assert type(model) is TransformerXLModel
    expected = converted_model(config, state).model(tokens).last_hidden_state
    assert torch.equal(model(tokens).last_hidden_state, expected)


def test_what_cannot_be_converted_is_refused(tmp_path):
    config, state = old_checkpoint()
    with pytest.raises(InputError, match="attn_type=2"):
        convert_transfo_xl_checkpoint(state, config | {"attn_type": 2})
    with pytest.raises(InputError, match="a weight 'score.weight'"):
        convert_transfo_xl_checkpoint(state | {"score.weight": torch.zeros(2)}, config)
    del state["transformer.layers.1.dec_attn.r_w_bias"]
    with pytest.raises(InputError, match="has no r_w_bias"):
        convert_transfo_xl_checkpoint(state, config)
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_transfo_xl_checkpoint(tmp_path)
    config, state = old_checkpoint()
    del state["crit.cluster_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="do not fit config.json .*cluster_bias"):
        load_transfo_xl_checkpoint(tmp_path)
