"""The program of an encoder's objectives and its named recipes: what they build, mix, normalise, resume and export."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open

from helpers.method_matrix import (
    BLOCK_SIZE,
    NO_DROPOUT,
    TINY,
    build,
    log_of,
    relative_difference,
    tiny_data,
    tiny_tokenizer,
)
from hf_pretrain import cli
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE
from hf_pretrain.data.examples.lm_modes import LMMode
from hf_pretrain.data.multilingual import MultilingualDataArguments, prepare_multilingual
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.objectives.encoder import METHOD as program
from hf_pretrain.objectives.encoder import EncoderTrainingArguments
from hf_pretrain.options import read_recipe
from hf_pretrain.training import program as program_module
from hf_pretrain.training.parsing import parse_arguments

NO_DROPOUT_OF = {"xlm": '{"dropout": 0.0, "attention_dropout": 0.0}'}
# The class at the root of the export, and what lies in `pretraining`.
EXPORTS = {
    "bert": ("BertForPreTraining", set()),
    "roberta": ("RobertaForMaskedLM", set()),
    "albert": ("AlbertForPreTraining", set()),
    "spanbert": ("BertForMaskedLM", {"span_boundary_head"}),
    "structbert": ("BertForMaskedLM", {"pair_head"}),
    "unilm": ("BertForPreTraining", set()),
    "xlm": ("XLMWithLMHeadModel", set()),
}


def recipe_options(name, options_class, **changes):
    """What a recipe says to one class of options."""
    _, values = read_recipe(name)
    known = {key for key in values if key in options_class.__dataclass_fields__}
    argv = [part for key in known for part in _as_words(key, values[key])]
    (options,) = parse_arguments((options_class,), argv, prog="test", description="")
    return {key: getattr(options, key) for key in known} | changes


def _as_words(key, value):
    return [f"--{key}", *(value if isinstance(value, list) else [value])]


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Tiny text of two languages, and translations word by word."""
    folder = tmp_path_factory.mktemp("languages")
    lines = [[(7 * i + j * (i % 5)) % 20 for j in range(3 + i % 6)] for i in range(60)]
    for language, shift in (("en", 0), ("de", 25)):
        text = [" ".join(f"w{word + shift}" for word in line) for line in lines]
        (folder / f"pairs.{language}").write_text("\n".join(text[:40]) + "\n", encoding="utf-8")
        (folder / f"{language}.txt").write_text("\n\n".join(text[40:]) + "\n", encoding="utf-8")
    return folder


def recipe_trainer(name, output_dir, folder, **options):
    """Return a Trainer of a recipe on tiny data and a tiny model."""
    options = recipe_options(f"{name}_small", EncoderTrainingArguments, **options)
    sizes = recipe_options(f"{name}_small", ModelArguments, **TINY)
    if name == "albert":
        sizes["embedding_size"] = 16
    if name == "xlm":
        sizes["intermediate_size"] = 4 * TINY["hidden_size"]
    sizes["config_overrides"] = NO_DROPOUT_OF.get(sizes["model_type"], NO_DROPOUT)
    data = tiny_data()
    if name == "xlm":
        whole = options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
        data = multilingual_data(folder, output_dir, group_size=whole)
    return build(program, output_dir, data, model_options=sizes, **options)


def multilingual_data(folder, output_dir, *, group_size):
    options = {
        "language_file": [f"{language}={folder / language}.txt" for language in ("en", "de")],
        "parallel_file": [f"en-de={folder / 'pairs.en'},{folder / 'pairs.de'}"],
        "validation_fraction": 0.2,
        "block_size": BLOCK_SIZE,
    }
    args = MultilingualDataArguments(**options)
    return prepare_multilingual(
        args, seed=42, output_dir=output_dir, tokenizer=tiny_tokenizer(), step_examples=group_size
    )


@pytest.mark.parametrize("name", EXPORTS)
def test_a_recipe_trains_and_exports_the_stock_class(name, tmp_path, languages):
    trainer = recipe_trainer(name, tmp_path, languages, max_steps=3, learning_rate=1e-3)
    trainer.train()
    evaluated = trainer.evaluate()
    for loss in trainer.args.loss_names:
        assert 0 < evaluated[f"eval_{loss}_loss"] < 10
    trainer.save_model()
    trainer.create_model_card()
    root, heads = EXPORTS[name]
    loaded, info = getattr(transformers, root).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids)[0], trainer.model.model.eval()(ids)[0], atol=1e-6, rtol=0)
    folder = tmp_path / "pretraining"
    assert {path.name for path in folder.glob("*")} == heads | {"run.json"}
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for loss in trainer.args.loss_names:
        assert loss in card


@pytest.mark.parametrize("name", ["spanbert", "structbert", "unilm", "xlm"])
def test_the_gradient_of_a_mixture_does_not_depend_on_how_the_batch_is_cut(name, tmp_path, languages):
    options = {"max_steps": 2, "learning_rate": 0.0}
    whole = recipe_trainer(name, tmp_path / "whole", languages, per_device_train_batch_size=8, **options)
    cut_options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    cut = recipe_trainer(name, tmp_path / "cut", languages, **cut_options, **options)
    whole.train()
    cut.train()
    for ours, theirs in zip(whole.recorder.gradients, cut.recorder.gradients, strict=True):
        assert relative_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["structbert", "unilm", "xlm"])
def test_a_mixture_resumes_bit_equal(name, tmp_path, languages):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3}
    straight = recipe_trainer(name, tmp_path / "straight", languages, **options)
    straight.train()
    for stop in (5, 10):
        resumed = recipe_trainer(name, tmp_path / f"resumed-{stop}", languages, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
        assert log_of(resumed) == log_of(straight)
        for key, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_run_goes_on_from_an_export_with_its_heads(tmp_path, languages):
    first = recipe_trainer("structbert", tmp_path / "first", languages, max_steps=2)
    first.train()
    first.save_model()
    options = recipe_options("structbert", EncoderTrainingArguments, max_steps=1, learning_rate=0.0)
    second = build(
        program,
        tmp_path / "second",
        tiny_data(),
        model_options={"model_name_or_path": str(tmp_path / "first"), "config_overrides": None},
        **options,
    )
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_unilm_mixes_its_modes_in_their_shares(tmp_path, languages):
    trainer = recipe_trainer("unilm", tmp_path, languages)
    modes = [trainer.train_dataset[i]["lm_mode"] for i in range(len(trainer.train_dataset))]
    wanted = {
        LMMode.BIDIRECTIONAL: 1 / 3,
        LMMode.SEQUENCE_TO_SEQUENCE: 1 / 3,
        LMMode.LEFT_TO_RIGHT: 1 / 6,
        LMMode.RIGHT_TO_LEFT: 1 / 6,
    }
    for mode, share in wanted.items():
        assert abs(modes.count(mode) - share * len(modes)) <= 1
    assert trainer.model.model.config.type_vocab_size == 6
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(48)])
    assert set(batch["lm_modes"].tolist()) == {0, 1, 2, 3}
    with torch.no_grad():
        output = trainer.model(**batch)
    per_mode = [output.metrics[f"{mode.name.lower()}_nll"] for mode in LMMode]
    assert float(sum(x.sum.sum() for x in per_mode)) == pytest.approx(float(output.losses["mlm"].sum.sum()), rel=1e-5)


def test_the_end_of_a_target_is_learned_and_no_other_special_token(tmp_path, languages):
    trainer = recipe_trainer("unilm", tmp_path, languages)
    tokenizer, found = tiny_tokenizer(), {mode: 0 for mode in LMMode}
    for epoch in range(4):
        rows = range(epoch * EPOCH_STRIDE, epoch * EPOCH_STRIDE + len(trainer.train_dataset))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        is_special = torch.isin(batch["labels"], torch.tensor(tokenizer.all_special_ids))
        lengths = batch["attention_mask"].sum(dim=1)
        for row, column in is_special.nonzero().tolist():
            assert column == lengths[row] - 1
            found[LMMode(int(batch["lm_modes"][row]))] += 1
    assert found[LMMode.SEQUENCE_TO_SEQUENCE] > 0
    assert sum(found.values()) == found[LMMode.SEQUENCE_TO_SEQUENCE]


def test_each_step_of_xlm_is_of_one_kind_and_each_kind_has_its_own_loss(tmp_path, languages):
    trainer = recipe_trainer("xlm", tmp_path, languages, per_device_train_batch_size=4, max_steps=8)
    trainer.train()
    kinds = set()
    for start in range(0, len(trainer.train_dataset), 4):
        batch = trainer.data_collator([trainer.train_dataset[start + i] for i in range(4)])
        is_bitext = batch.get("is_bitext", torch.zeros(4, dtype=torch.bool))
        assert is_bitext.all() or not is_bitext.any()
        kinds.add(bool(is_bitext.all()))
        counts = trainer.model.count_targets(batch)
        assert (counts["tlm"] > 0) == bool(is_bitext.all()) and (counts["mlm"] > 0) == (not is_bitext.any())
        assert ("position_ids" in batch) == bool(is_bitext.all())
    assert kinds == {True, False}
    assert {"tlm_loss", "mlm_loss"} <= set().union(*trainer.state.log_history)
    config = trainer.model.model.config
    assert config.lang2id == {"de": 0, "en": 1} and config.n_langs == 2


def test_weights_and_their_schedules_are_those_of_the_losses(tmp_path):
    options = {"objectives": ["mlm", "sop"], "learning_rate": 0.0, "max_steps": 3}
    plain = build(program, tmp_path / "plain", **options, pair_weight=0.0)
    plain.train()
    falling = build(program, tmp_path / "falling", **options, pair_weight="0:1, 2:0")
    falling.train()
    rows = [row for row in log_of(falling) if "loss" in row]
    assert [row["pair_weight"] for row in rows] == [1.0, 0.5, 0.0]
    for row in rows:
        assert row["loss"] == pytest.approx(row["mlm_loss"] + row["pair_weight"] * row["pair_loss"], rel=1e-4)
    assert [row["loss"] for row in log_of(plain) if "loss" in row] == pytest.approx(
        [row["mlm_loss"] for row in rows], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ["sop"]}, "leaves out mlm"),
        ({"objectives": ["mlm", "sopp"]}, "objectives='sopp' must be one of .*did you mean 'sop'"),
        ({"objectives": ["mlm", "nsp", "sop"]}, "different questions about the same pairs"),
        ({"objectives": ["mlm", "span_boundary"]}, "masking_unit='token' makes none"),
        ({"objectives": ["mlm", "word_order", "left_to_right"]}, "which left_to_right hides"),
        ({"objectives": ["mlm", "tlm", "right_to_left"]}, "tlm and right_to_left both say"),
        ({"objectives": ["mlm", "nsp"], "objective_shares": "nsp=1"}, "is not NAME:SHARE"),
        ({"objectives": ["mlm", "nsp"], "objective_shares": "sop:1"}, "name each of mlm, nsp once"),
        ({"objectives": ["mlm", "nsp", "left_to_right"], "objective_shares": "nsp:1"}, "gives left_to_right no share"),
        ({"objectives": ["mlm", "nsp"], "objective_shares": "nsp:1/0"}, "divides by 0"),
        ({"objectives": ["mlm", "nsp"], "objective_shares": "mlm:0, nsp:0"}, "draws nothing"),
        ({"pair_weight": -1.0}, "pair_weight=-1.0 must be at least 0"),
        ({"word_order_probability": 1.5}, "must be a number from 0 to 1"),
        ({"word_order_size": 1}, "word_order_size=1 must be at least 2"),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_reason(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        EncoderTrainingArguments(output_dir=str(tmp_path), **options)


def test_shares(tmp_path):
    def shares(*objectives, text=None):
        return EncoderTrainingArguments(
            output_dir=str(tmp_path), objectives=list(objectives), objective_shares=text
        ).shares()

    assert shares("mlm") == {"mlm": 1}
    assert shares("mlm", "sop", "word_order") == {"sop": 1}
    assert shares("mlm", "left_to_right") == {"mlm": 0.5, "left_to_right": 0.5}
    assert shares("mlm", "tlm", "nsp") == {"mlm": 0.5, "nsp": 0.5}
    assert shares("mlm", "nsp", text="mlm:3, nsp:1") == {"mlm": 0.75, "nsp": 0.25}
    assert shares("mlm", "nsp", text="mlm:0, nsp:1/2") == {"nsp": 1}


def test_translations_and_their_objective_come_together(tmp_path, languages, capsys):
    pairs = f"en-de={languages / 'pairs.en'},{languages / 'pairs.de'}"
    common = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert cli.main(["encoder", "--parallel_file", pairs, *common]) == 2
    assert "add tlm to the objectives" in capsys.readouterr().err
    text = ["--train_file", str(languages / "en.txt")]
    assert cli.main(["encoder", "--objectives", "mlm", "tlm", *text, *common]) == 2
    assert "name them with parallel_file" in capsys.readouterr().err


def test_views_that_need_documents_refuse_others(tmp_path):
    data = tiny_data()
    data.description = {"block_mode": "isolated_documents"}
    with pytest.raises(InputError, match="isolated_documents"):
        build(program, tmp_path, data)
    data.description, data.train_documents = {}, None
    with pytest.raises(InputError, match="leave out streaming"):
        build(program, tmp_path, data)


@pytest.mark.parametrize("name", cli.RECIPES)
def test_a_name_is_the_program_with_its_recipe(name, monkeypatch):
    program, seen = cli.load_method(cli.RECIPES[name][0]), []
    monkeypatch.setattr(program_module, "train_method", lambda *given: seen.append(given))
    assert cli.main([name, "--seed", "3"]) == 0
    assert seen == [(program, ["--config", name, "--seed", "3"])]
    parsed = parse_arguments(program.arguments, ["--config", name, "--output_dir", "x"], prog="test", description="")
    assert len(parsed) == 3


def test_the_exported_heads_are_in_safetensors(tmp_path, languages):
    trainer = recipe_trainer("spanbert", tmp_path, languages)
    trainer.save_model()
    with safe_open(tmp_path / "pretraining" / "span_boundary_head" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and not any("word_embeddings" in name for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_plain_text_and_pairs_are_mixed_by_steps_and_evaluated_whole(tmp_path):
    options = {"objectives": ["mlm", "nsp"], "objective_shares": "mlm:3, nsp:1", "per_device_train_batch_size": 4}
    trainer = build(program, tmp_path, **options, max_steps=6, learning_rate=1e-3)
    trainer.train()
    batches = [
        trainer.data_collator([trainer.train_dataset[start + i] for i in range(4)])
        for start in range(0, len(trainer.train_dataset) - 3, 4)
    ]
    are_pairs = [(batch["pair_labels"] != -100).tolist() for batch in batches]
    assert all(all(batch) or not any(batch) for batch in are_pairs)
    assert sum(map(all, are_pairs)) / len(are_pairs) == pytest.approx(0.25, abs=0.02)
    held_out = trainer.eval_dataset
    parts = held_out.parts
    assert len(held_out) == sum(map(len, parts.values())) and len(parts["mlm"]) == 13
    counts = [trainer.model.count_targets(batch) for batch in trainer.get_eval_dataloader()]
    assert sum(int(count["pair"]) for count in counts) == len(parts["nsp"])
    assert 0 < trainer.evaluate()["eval_pair_loss"] < 1
