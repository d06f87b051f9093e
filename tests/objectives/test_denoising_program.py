"""The recipes of denoising as programs: each trains on text, and its export opens with stock transformers and writes."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helpers.tiny_text import write_models, write_text
from hf_pretrain import cli

# The others go through the same program, and their noises and models have tests of their own.
DEFAULT_RECIPES = {"bart", "ul2"}
RECIPES = [
    pytest.param(name, marks=[] if name in DEFAULT_RECIPES else [pytest.mark.slow])
    for name, (method, _) in cli.RECIPES.items()
    if method == "denoise"
]
SIZES = """--vocab_size 300 --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --block_size 96
    --max_steps 3 --save_strategy no --logging_steps 1 --eval_strategy no --use_cpu true""".split()


def run(folder, *argv):
    """Run the program on text in a folder; return the model and the tokenizer of its export, and the row of its evaluation."""
    write_text(folder)
    out = folder / "out"
    assert cli.main([*argv, "--train_file", str(folder / "corpus.txt"), "--output_dir", str(out)]) == 0
    model, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return model, AutoTokenizer.from_pretrained(out), [row for row in log if "eval_loss" in row][-1]


def writes(model, tokenizer):
    """What the export writes of a sentence."""
    inputs = tokenizer("The ship was fine today.", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_its_export_writes(name, tmp_path, capsys):
    model, tokenizer, row = run(tmp_path, f"{name}_small", *SIZES)
    assert model.config.model_type == ("bart" if name in ("bart", "mass") else "t5")
    assert 0 < row["eval_denoising_loss"] < 12
    assert 0 <= row["eval_spans_exact"] <= 1
    kinds = [key for key in row if key.endswith("_nll") and key != "eval_hidden_nll"]
    assert bool(kinds) == (name == "ul2")
    assert writes(model, tokenizer).shape[1] > 1
    out = capsys.readouterr().out
    assert "hidden_bigram_nll" in out and out.count("  noised ") == out.count("  original ") > 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Beside counting" in card and "## Samples" in card


def test_an_encoder_becomes_an_encoder_decoder(tmp_path, caplog):
    """Its weights are those of the checkpoint before the first step; the export is a stock EncoderDecoderModel."""
    write_models(tmp_path)
    sizes = [option for option in SIZES if option not in ("--vocab_size", "300")]
    sizes = sizes[: sizes.index("--hidden_size")] + sizes[sizes.index("--block_size") :]
    model, tokenizer, row = run(
        tmp_path, "denoise", "--encoder_name_or_path", str(tmp_path / "my-bert"), *sizes, "--learning_rate", "1e-9"
    )
    assert model.config.model_type == "encoder-decoder" and 0 < row["eval_denoising_loss"] < 12
    assert writes(model, tokenizer).shape[1] > 1
    assert "decoder's attention to the encoder" in caplog.text
    before = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").encoder
    stock = type(before).from_pretrained(tmp_path / "my-bert", add_pooling_layer=True).state_dict()
    for key, value in before.state_dict().items():
        if "pooler" not in key:
            torch.testing.assert_close(value, stock[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--noise", "t5", "--noise_steps", "infilling"], "noise_steps"),
        (["--noise", "ul2", "--denoisers", "Q:3:0.1"], "Q:3:0.1"),
        (["--noise_steps", "infillin"], "infilling"),
        (["--model_name_or_path", "my-bert"], "--encoder_name_or_path"),
        (["--noise", "t5", "--tokenizer_name", "my-bert"], "extra_id"),
        (["--max_position_embeddings", "16"], "positions"),
    ],
)
def test_bad_input_is_one_line_before_any_text_is_read(argv, said, tmp_path, monkeypatch, capsys):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("")  # Reading it would be refused otherwise.
    assert cli.main(["denoise", "--train_file", "corpus.txt", "--output_dir", "out", "--block_size", "32", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error, error
