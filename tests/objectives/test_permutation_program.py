"""`hf-pretrain plm` from text to export: the sizes of the command line, memory, continuation, scores."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_pretrain.cli import main
from hf_pretrain.objectives.permutation_lm import log_likelihood

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(f"Sentence {i} has more words. It ends with {i * i}." for i in range(400)))
    return path


def plm(corpus, folder, **options):
    values = {"train_file": corpus, "output_dir": folder, "vocab_size": 150, "max_steps": 3, "report_to": "none"}
    values |= {"block_size": 32, "per_device_train_batch_size": 4, "save_steps": 2, "validation_fraction": 0.1}
    sizes = {} if "model_name_or_path" in options else SIZES
    return main(["plm", *(f"--{name}={value}" for name, value in (values | sizes | options).items())])


def test_a_fresh_xlnet_has_the_sizes_of_the_command_line_and_goes_on(corpus, tmp_path, capsys):
    memory = {"mem_len": 24, "bidirectional": True, "eval_lanes": 4, "config_overrides": '{"dropout": 0.2}'}
    assert plm(corpus, tmp_path / "out", **memory) == 0
    assert "plm_accuracy" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {"d_model": 24, "n_layer": 3, "n_head": 2, "d_head": 12, "d_inner": 40, "dropout": 0.2}
    assert config["model_type"] == "xlnet" and {name: config[name] for name in sizes} == sizes
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert config["vocab_size"] == len(tokenizer) <= 150 and config["pad_token_id"] == tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.transformer.layer[2].ff.layer_1.weight.shape == (40, 24)
    assert "Permutation language modelling" in (tmp_path / "out" / "README.md").read_text()
    scores = log_likelihood(model, tokenizer, ["Sentence 3 has more words."], order="random", num_orders=3)
    assert torch.isfinite(scores).all() and scores < 0
    # What was exported goes on with its own sizes; others on the command line are refused.
    del memory["config_overrides"]
    other = memory | {"model_name_or_path": tmp_path / "out"}
    assert plm(corpus, tmp_path / "further", **other, hidden_size=48) == 2
    assert "hidden_size=48 has no effect beside model_name_or_path=" in capsys.readouterr().err
    assert plm(corpus, tmp_path / "further", **other) == 0
    assert json.loads((tmp_path / "further" / "config.json").read_text())["d_model"] == 24


def test_another_architecture_has_them_too(corpus, tmp_path):
    assert plm(corpus, tmp_path, model_type="bert", max_position_embeddings=40, max_steps=1) == 0
    model = AutoModel.from_pretrained(tmp_path)
    config = model.config
    assert config.model_type == "bert" and {name: getattr(config, name) for name in SIZES} == SIZES
    assert model.embeddings.position_embeddings.num_embeddings == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 5}, "xlnet cannot be built"),
        ({"model_type": "gpt_neox"}, "is no masked language model"),
        ({"model_type": "deberta-v2"}, "only 'sdpa' can hide everything"),
        ({"model_type": "bert", "mem_len": 8}, "no relative positions"),
        ({"mem_len": 8, "block_mode": "isolated_documents", "halves": False}, "halves=False"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(corpus, tmp_path, capsys, options, message):
    assert plm(corpus, tmp_path / "out", **options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list((tmp_path / "out").glob("*.safetensors"))
