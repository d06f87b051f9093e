"""Options from dataclasses, recipes and the command line: types, precedence, refusals, and back to a recipe."""

import re
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SchedulerType

from hf_pretrain.cli import METHODS, load_method
from hf_pretrain.errors import InputError
from hf_pretrain.names import SYNONYMS, WITHOUT_OPTION
from hf_pretrain.options import resolved_options, write_recipe
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.parsing import parse_arguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "trainers" / "recipes").glob("*.yaml"))


class Unit(StrEnum):
    TOKEN = "token"
    WORD = "word"


@dataclass
class DataArguments:
    train_file: list[str] | None = field(default=None, metadata={"help": "Text files."})
    vocab_size: int = field(default=1000, metadata={"help": "Entries; 100% of them, or 50 % (half)."})
    lowercase: bool = True
    cache: bool | None = None
    share: float = 0.15
    unit: Unit = field(default=Unit.TOKEN)
    mode: Literal["dynamic", "static"] = "dynamic"
    lengths: list[int] = field(default_factory=lambda: [1, 2])
    extra: dict[str, float] | None = None


@dataclass
class RequiredArguments:
    corpus: str = field(metadata={"help": "A file."})


def parse(*argv, types=(DataArguments,), **kwargs):
    return parse_arguments(types, list(argv), prog="hf-pretrain toy", description="A toy.", **kwargs)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="toy.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(*argv, **kwargs):
    with pytest.raises(InputError) as caught:
        parse(*argv, **kwargs)
    message = str(caught.value)
    assert "usage:" not in message
    return message


def test_recipe_values_take_the_type_of_their_option(recipe, tmp_path):
    path = recipe(
        "train_file: [a.txt, 007]\nvocab_size: 30522\nlowercase: no\ncache: true\nshare: 5e-1\nunit: word\n"
        "mode: static\nlengths: [3, 4]\nextra: {decay: 5e-4, floor: 1}\nlearning_rate: 5e-4\neval_strategy: no\n"
        f"run_name: 007\nlr_scheduler_kwargs: {{min_lr_rate: 1e-1}}\noutput_dir: {tmp_path}\nreport_to: [none]\n"
    )
    data, training = parse("--config", path, types=(DataArguments, TrainingArguments))
    assert data == DataArguments(
        ["a.txt", "007"], 30522, False, True, 0.5, "word", "static", [3, 4], {"decay": 5e-4, "floor": 1}
    )
    assert (training.learning_rate, type(training.learning_rate)) == (5e-4, float)
    assert training.eval_strategy == "no"
    assert training.run_name == "007"
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_a_lone_value_fills_a_list_option(recipe):
    (data,) = parse("--config", recipe("train_file: a.txt\nlengths: 5\n"))
    assert data.train_file == ["a.txt"]
    assert data.lengths == [5]


def test_null_is_none_where_the_option_may_be_none(recipe):
    (data,) = parse("--config", recipe("train_file: null\ncache: ~\n"), defaults={"train_file": ["a.txt"]})
    assert data.train_file is None
    assert data.cache is None
    assert "share is empty" in refusal("--config", recipe("share:\n"))


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
@pytest.mark.parametrize("option_first", [True, False])
def test_the_command_line_beats_the_recipe_which_beats_the_program(recipe, spelling, option_first):
    config = spelling.format(recipe("share: 0.3\nvocab_size: 7\n")).split()
    argv = ["--share", "0.4", *config] if option_first else [*config, "--share", "0.4"]
    (data,) = parse(*argv, defaults={"share": 0.1, "vocab_size": 5, "mode": "static"})
    assert (data.share, data.vocab_size, data.mode, data.lowercase) == (0.4, 7, "static", True)


def test_a_later_recipe_beats_an_earlier_one(recipe):
    first, second = recipe("share: 0.3\nvocab_size: 7\n", "a.yaml"), recipe("share: 0.2\n", "b.yaml")
    (data,) = parse("--config", first, "--config", second)
    assert (data.share, data.vocab_size) == (0.2, 7)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--cache"], (True, True)),
        (["--cache", "false"], (True, False)),
        (["--lowercase", "false", "--cache=yes"], (False, True)),
        (["--no_lowercase"], (False, None)),
        (["--lowercase"], (True, None)),
    ],
)
def test_flags_may_be_bare_or_have_a_value(argv, expected):
    (data,) = parse(*argv)
    assert (data.lowercase, data.cache) == expected


@pytest.mark.parametrize(("given", "expected"), [("true", True), ("false", None), ("full_shard", "full_shard")])
def test_a_word_that_may_be_left_out_is_a_yaml_boolean(recipe, given, expected):
    @dataclass
    class Arguments:
        fsdp: str | None = field(default=None, metadata={"nargs": "?", "const": True})

    assert parse("--config", recipe(f"fsdp: {given}\n"), types=(Arguments,))[0].fsdp == expected


def test_an_option_of_a_word_or_a_flag_takes_both(recipe):
    name = "include_num_input_tokens_seen"
    for given, expected in [("non_padding", "non_padding"), ("true", "all"), ("no", "no")]:
        assert getattr(parse(f"--{name}", given, types=(TrainingArguments,))[0], name) == expected
        assert getattr(parse("--config", recipe(f"{name}: {given}"), types=(TrainingArguments,))[0], name) == expected


def test_a_required_option_may_come_from_the_recipe(recipe):
    types = (RequiredArguments,)
    assert parse("--config", recipe("corpus: a.txt\n"), types=types)[0].corpus == "a.txt"
    assert parse(types=types, defaults={"corpus": "b.txt"})[0].corpus == "b.txt"
    assert "--corpus" in refusal(types=types)


def test_a_mistyped_required_option_is_named_before_what_is_missing():
    assert refusal("--corpsu", "a.txt", types=(RequiredArguments,)) == (
        "unknown option '--corpsu': did you mean '--corpus'?"
    )


def test_unknown_names_are_refused_with_the_nearest(recipe):
    path = recipe("vocabsize: 5\n")
    assert refusal("--config", path) == f"{path}: unknown option 'vocabsize': did you mean 'vocab_size'?"
    assert refusal("--vocabsize=5") == "unknown option '--vocabsize': did you mean '--vocab_size'?"
    assert refusal("--zzzz", "5") == "unknown option '--zzzz': see `hf-pretrain toy --help`"
    assert "did you mean" not in refusal("--config", recipe("zzzz: 5\n"))


def test_a_value_with_blanks_hides_no_unknown_option():
    assert "unknown option '--trian_file'" in refusal("--train_file", "a.txt", "--trian_file=my text.txt")


def test_an_abbreviation_is_not_an_option():
    assert "did you mean '--vocab_size'" in refusal("--vocab", "5")


@pytest.mark.parametrize("option", ["--vocab_size", "--vocab-size"])
def test_both_spellings_of_an_option_work(option):
    assert parse(option, "5")[0].vocab_size == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", "many"), ("share", "half"), ("lowercase", "maybe"), ("mode", "dynam"), ("unit", "wordd")],
)
def test_wrong_values_are_one_line_that_names_option_and_value(recipe, name, value):
    for message in (refusal(f"--{name}", value), refusal("--config", recipe(f"{name}: {value}\n"))):
        assert name in message
        assert value in message
        assert "\n" not in message


def test_the_nearest_of_an_options_words_is_offered(recipe):
    assert refusal("--lr_scheduler_type", "liner", types=(TrainingArguments,)) == (
        "--lr_scheduler_type: invalid choice: 'liner': did you mean 'linear'?"
    )
    assert "mode is 'dynam': did you mean 'dynamic'?" in refusal("--config", recipe("mode: dynam\n"))


@pytest.mark.parametrize("line", ["share: {a: 1}", "share: [1, 2]", "lengths: [[1], [2]]", "lengths: [1, {a: 2}]"])
def test_a_value_of_the_wrong_shape_is_refused(recipe, line):
    assert line.split(":")[0] in refusal("--config", recipe(line + "\n"))


def test_what_the_dataclass_refuses_is_bad_input(tmp_path):
    message = refusal("--fp16", "--bf16", "--use_cpu", "--output_dir", str(tmp_path), types=(TrainingArguments,))
    assert "fp16" in message


def test_a_stray_argument_is_refused():
    assert refusal("--share", "0.2", "corpus.txt").startswith("unexpected argument 'corpus.txt'")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"\xff\xfe\x00", "UTF-8"),
        ("- a\n- b\n", "mapping"),
        ("", "mapping"),
        ("share: [1\n", "YAML"),
        ("share: 1\nshare: 2\n", "share is given twice"),
        ("{a: b}: 1\n", "mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe, content, fragment):
    path = recipe(content)
    message = refusal("--config", path)
    assert fragment in message
    assert path in message


def test_a_missing_recipe_or_a_folder_is_refused(tmp_path):
    assert "no such file" in refusal("--config", str(tmp_path / "none.yaml"))
    assert str(tmp_path) in refusal("--config", str(tmp_path))
    assert "--config" in refusal("--config")


def test_help_survives_a_percent_sign(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help-all", types=(DataArguments, TrainingArguments))
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "100% of them, or 50 % (half). (default: 1000)" in shown
    assert shown.startswith("usage: hf-pretrain toy [--config RECIPE] [--option value ...] A toy.")
    assert "(default: True)" in shown  # of an option without a help text of its own


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit):
        parse_arguments((DataArguments,), ["--help"], prog="toy", description="First.\n\n    toy --share 50%\n")
    assert "\n    toy --share 50%\n" in capsys.readouterr().out


def test_the_arguments_file_beside_a_program_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "toy.args").write_text("--share 0.9")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "toy.py"), "--vocab_size", "3"])
    (data,) = parse_arguments((DataArguments,), prog="toy", description="A toy.")
    assert (data.share, data.vocab_size) == (0.15, 3)


def test_resolved_options_are_what_differs_from_the_defaults(tmp_path):
    types = (DataArguments, TrainingArguments)
    # What follows from the machine is no option of a recipe.
    assert set(resolved_options(parse("--use_cpu", types=types))) == set()
    argv = ["--lengths", "1", "2", "--share", "0.2", "--hub_token", "secret", "--use_cpu", "--mode", "static"]
    options = resolved_options(parse(*argv, types=types))
    assert options == {"share": 0.2, "mode": "static"}


def test_a_written_recipe_gives_the_same_options(tmp_path):
    types = (DataArguments, TrainingArguments)
    argv = (
        "--train_file a.txt b.txt --unit word --lengths 7 --extra {'decay':1e-05} --cache false --no_lowercase "
        "--learning_rate 5e-4 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {'min_lr_rate':0.1} "
        "--eval_strategy steps --logging_steps 10 --save_strategy no --optim adamw_torch --report_to none --bf16 "
        "--activation_checkpointing --include_num_input_tokens_seen non_padding --use_cpu --run_name 1e5 --seed 7 "
        "--accelerator_config {'even_batches':false} --debug underflow_overflow --warmup_steps 0.1 --max_steps 20"
    ).replace("'", '"')
    first = parse(*argv.split(), "--output_dir", str(tmp_path / "naïve: run"), types=types)
    path = tmp_path / "recipe.yaml"
    write_recipe(resolved_options(first), path, program="hf-pretrain toy")
    assert path.read_text(encoding="utf-8").startswith("# hf-pretrain toy\n")
    second = parse("--config", str(path), "--use_cpu", types=types)
    assert second[0] == first[0]
    assert resolved_options(second) == resolved_options(first)
    assert second[1].to_dict() == first[1].to_dict()
    assert second[1].lr_scheduler_type is SchedulerType.COSINE_WITH_MIN_LR
    assert second[1].accelerator_config.even_batches is False
    write_recipe(resolved_options(second), tmp_path / "again.yaml", program="hf-pretrain toy")
    assert (tmp_path / "again.yaml").read_bytes() == path.read_bytes()


def test_none_over_another_default_comes_back_as_none(tmp_path):
    @dataclass
    class Arguments:
        limit: int | None = 5

    write_recipe(resolved_options([Arguments(limit=None)]), tmp_path / "r.yaml", program="toy")
    assert parse("--config", str(tmp_path / "r.yaml"), types=(Arguments,))[0].limit is None


def test_there_are_recipes():
    assert "demo" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_by_path_and_by_name(path, tmp_path):
    program, method = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split()
    assert program == "hf-pretrain"
    arguments = load_method(method).arguments
    beside = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    for spelling in (str(path), path.stem, path.name):
        instances = parse("--config", spelling, *beside, types=arguments)
        assert [type(instance) for instance in instances] == list(arguments)
    given = set(yaml.safe_load(path.read_text(encoding="utf-8"))) - {"config"}
    assert given <= {name for instance in instances for name in vars(instance)}
    text = path.read_text(encoding="utf-8").replace("learning_rate:", "learning_rat:")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text if "learning_rat:" in text else text + "\nlearning_rat: 1\n", encoding="utf-8")
    assert "did you mean 'learning_rate'?" in refusal("--config", str(wrong), types=arguments)


# Options without effect beside others


def program(method, *argv, config=None):
    recipe_option = [] if config is None else ["--config", config]
    arguments = load_method(method).arguments
    return parse_arguments(arguments, [*recipe_option, *argv], prog=f"hf-pretrain {method}", description="")


@pytest.mark.parametrize(
    ("method", "argv", "said"),
    [
        (
            "mlm",
            "--model_name_or_path x --hidden_size 32",
            "hidden_size=32 has no effect beside model_name_or_path='x'",
        ),
        ("mlm", "--model_name_or_path x --model_type bert", "model_type='bert' has no effect"),
        ("plm", "--model_name_or_path x --config_overrides {}", "config_overrides='{}' has no effect"),
        ("recurrent-lm", "--model_name_or_path x --hidden_dropout_prob 0.2", "hidden_dropout_prob=0.2 has no effect"),
        (
            "mlm",
            "--tokenizer_name x --tokenizer_type bpe",
            "tokenizer_type='bpe' has no effect beside tokenizer_name='x'",
        ),
        ("mlm", "--tokenizer_name x --lowercase true", "lowercase=True has no effect beside tokenizer_name='x'"),
        ("mlm", "--shuffle_buffer_size 5", "has no effect without streaming: set it too, or leave this out"),
        ("mlm", "--dataset_split test", "has no effect without dataset_name"),
        ("mlm", "--overwrite_output_dir --resume_from_checkpoint auto", "overwrite_output_dir=True has no effect"),
        ("mlm", "--num_train_epochs 2 --max_steps 9", "num_train_epochs=2.0 has no effect with max_steps=9"),
        (
            "mlm",
            "--eval_steps 5",
            "eval_steps=5.0 has no effect with eval_strategy='no': it is for eval_strategy=steps",
        ),
        ("mlm", "--save_steps 5 --save_strategy epoch", "save_steps=5.0 has no effect with save_strategy='epoch'"),
        (
            "mlm",
            "--metric_for_best_model loss",
            "metric_for_best_model='loss' has no effect without load_best_model_at_end",
        ),
        ("mlm", "--hub_strategy end", "hub_strategy='end' has no effect without push_to_hub"),
        ("mlm", "--do_eval", "do_eval=True has no effect with eval_strategy='no'"),
        ("mlm", "--max_span_length 5", "max_span_length=5 has no effect with masking_unit='token'"),
        ("mlm", "--ngram_unit token --masking_unit span", "ngram_unit='token' has no effect with masking_unit='span'"),
        (
            "rtd",
            "--generator_name_or_path /nope",
            "generator_name_or_path='/nope' has no effect without model_name_or_path",
        ),
        (
            "rtd",
            "--model_name_or_path x --generator_name_or_path y --generator_size 0.5",
            "generator_size=0.5 has no effect beside generator_name_or_path='y'",
        ),
        ("rtd", "--generator_steps 5", "generator_steps=5.0 has no effect with training_mode='joint'"),
        ("electric", "--generator_name_or_path x --generator_layers 0.5", "generator_layers=0.5 has no effect"),
        ("encoder", "--word_order_size 4", "word_order_size=4 has no effect with objectives=['mlm']"),
        ("encoder", "--objectives mlm nsp --tlm_weight 2", "tlm_weight=2.0 has no effect"),
        ("encoder", "--language_sampling_alpha 0.7", "has no effect without language_file"),
        ("plm", "--bidirectional true", "mem_len=0"),
        ("plm", "--eval_lanes 4", "eval_lanes=4 has no effect without mem_len"),
        ("recurrent-lm", "--div_val 2", "div_val=2 has no effect without cutoffs"),
        ("distil", "--distillation_method minilmv2 --temperature 4", "temperature=4.0 has no effect with losses="),
        ("distil", "--layer_map last", "layer_map='last' has no effect"),
        ("distil", "--layer_map bogus", "layer_map='bogus' is unknown"),
        ("distil", "--relation_heads 4", "relation_heads=4 has no effect"),
        ("distil-task", "--augmentation_vectors /nope", "has no effect without augmentation_model"),
        ("distil-task", "--doc_stride 8", "doc_stride=8 has no effect with task='sequence-classification'"),
        ("encoder", "--objectives mlm mlm", "objectives=mlm mlm names mlm twice"),
        ("mlm", "--streaming true --train_file x", "a stream has no known end"),
        (
            "mlm",
            "--streaming true --train_file x --max_steps 5 --eval_strategy epoch",
            "eval_strategy='epoch' without held-out text (streaming holds none out)",
        ),
        (
            "recurrent-lm",
            "--streaming true --train_file x --max_steps 5",
            "streaming=True: a memory needs stored text",
        ),
        ("mlm", "--masking_unit given", "masking_unit='given' needs examples with the column spans"),
        ("rtd", "--training_mode two_stage", "set embedding_sharing='none'"),
        ("mlm", "--eval_strategy epoch --validation_fraction 0", "eval_strategy='epoch' without held-out text"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(method, argv, said, tmp_path):
    with pytest.raises(InputError) as refused:
        program(method, *argv.split(), "--output_dir", str(tmp_path))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("method", "config", "argv"),
    [
        ("rtd", "electra_base", "--model_name_or_path x --tokenizer_name y"),
        ("rtd", "deberta_v3_small", "--model_name_or_path microsoft/deberta-v3-small"),
        ("encoder", "unilm_small", "--model_name_or_path x"),
        ("mlm", "bert_base", "--eval_strategy no --save_strategy no"),
        ("mlm", "bert_base", "--max_steps -1 --num_train_epochs 2"),
        ("distil", "minilmv2", "--prediction_weight 1 --mlm_probability 0.15 --temperature 3"),
        ("mlm", None, "--do_eval --eval_strategy steps --eval_steps 5"),
        ("mlm", None, "--streaming true --train_file x --validation_file y --max_steps 5 --eval_strategy epoch"),
        ("mlm", None, "--streaming true --train_file x --validation_fraction 0 --max_steps 5"),
        ("mlm", None, "--hub_private_repo true --report_to trackio"),
        ("mlm", None, "--overwrite_output_dir false --resume_from_checkpoint auto"),
        ("mlm", None, "--model_name_or_path x --vocab_size 100 --block_size 32 --warmup_steps 3"),
    ],
)
def test_what_a_recipe_says_beside_the_command_line_is_not(method, config, argv, tmp_path):
    assert program(method, *argv.split(), "--output_dir", str(tmp_path), config=config)


def test_what_many_command_lines_share_is_noted_only(tmp_path, caplog):
    program("mlm", "--tokenizer_name", "x", "--vocab_size", "100", "--output_dir", str(tmp_path))
    assert "vocab_size=100 has no effect beside tokenizer_name='x': leave one of them out" in caplog.text


def test_a_run_without_eval_strategy_starts_from_its_own_recipe(tmp_path):
    """transformers sets do_eval by itself, which is no choice to be kept."""
    options = resolved_options(program("mlm", "--eval_strategy", "epoch", "--output_dir", str(tmp_path)))
    assert "do_eval" not in options
    write_recipe(options, tmp_path / "r.yaml", program="toy")
    assert program("mlm", "--eval_strategy", "no", config=str(tmp_path / "r.yaml"))


# What cannot be read, or no constructor takes


@pytest.mark.parametrize(
    "text",
    [
        "train_file: &a [*a]",
        "lr_scheduler_kwargs: &a {x: *a}",
        "train_file: " + "[" * 3000 + "]" * 3000,
        "lr_scheduler_kwargs: " + "{a: " * 50 + "1" + "}" * 50,
        "lr_scheduler_kwargs: {a: !!python/object:os.system x}",
        "lr_scheduler_kwargs: {a: !!int x}",
        "lr_scheduler_kwargs: {[1]: 2}",
        "lr_scheduler_kwargs: {a: .nan}",
        "learning_rate: .inf",
        "seed: 1e3",
        "\n".join([f"a{i}: &b{i} [*b{i - 1}, *b{i - 1}]" if i else "a0: &b0 [x, x]" for i in range(40)]),
    ],
)
def test_a_recipe_that_ends_nowhere_is_refused_in_one_line(recipe, text):
    message = refusal("--config", recipe(text), types=(DataArguments, PretrainingArguments))
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    "argv",
    [
        ["--accelerator_config", "/nope.json"],
        ["--deepspeed", "/nope.json"],
        ["--fsdp_config", "/nope.json", "--fsdp", "full_shard"],
        ["--lr_scheduler_kwargs", "[]"],
        ["--lr_scheduler_kwargs", "{"],
        ["--lr_scheduler_kwargs", '{"a": NaN}'],
        ["--lr_scheduler_kwargs", '{"a":' * 3000],
        ["--activation_checkpointing_kwargs", "word"],
        ["--config_overrides", "[]"],
        ["--config_overrides", '{"a": Infinity}'],
        ["--config_overrides", '{"a": ' + "1" * 5000 + "}"],
        ["--config_overrides", '{"a": ' + "[" * 100_000],
        ["--eval_strategy", "sometimes"],
        ["--debug", "everything"],
        ["--load_best_model_at_end", "true"],
        ["--parallelism_config", "x"],
        ["--liger_kernel_config", "{}"],
        ["--tf32", "true"],
    ],
)
def test_what_transformers_refuses_is_one_line_too(argv, tmp_path):
    with pytest.raises(InputError) as refused:
        program("mlm", *argv, "--output_dir", str(tmp_path))
    assert len(" ".join(str(refused.value).split())) < 1000
    # Nothing of the refused options stays in the process.
    assert not is_deepspeed_zero3_enabled()


def test_a_parser_of_transformers_takes_the_options_too(tmp_path):
    """Scripts use it: no field may carry what argparse does not know."""
    for method in METHODS:
        for cls in load_method(method).arguments:
            assert HfArgumentParser(cls).format_help


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--batch_size", "--per_device_train_batch_size"),
        ("--lr", "--learning_rate"),
        ("--epochs", "--num_train_epochs"),
        ("--max-seq-length", "--block_size"),
        ("--whole_word_mask", "--masking_unit"),
        ("--evaluation_strategy", "--eval_strategy"),
        ("--cache_dir", "HF_DATASETS_CACHE"),
    ],
)
def test_names_of_other_programs_lead_to_the_option_here(typed, meant):
    with pytest.raises(InputError, match=f"unknown option '{typed}': .*{meant}"):
        program("mlm", typed, "8")


RUN_MLM = """model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer
use_slow_tokenizer model_revision token use_auth_token trust_remote_code dtype torch_dtype low_cpu_mem_usage
dataset_name dataset_config_name train_file validation_file overwrite_cache validation_split_percentage
max_seq_length preprocessing_num_workers mlm_probability line_by_line pad_to_max_length max_train_samples
max_eval_samples streaming num_warmup_steps max_train_steps checkpointing_steps with_tracking train_ref_file
validation_ref_file plm_probability"""
FAIRSEQ = """arch criterion max-tokens max-tokens-valid batch-size batch-size-valid max-sentences update-freq max-update
total-num-update max-epoch lr lr-scheduler warmup-updates warmup-init-lr end-learning-rate power clip-norm
weight-decay dropout attention-dropout activation-dropout pooler-dropout adam-betas adam-eps optimizer
tokens-per-sample sample-break-mode mask-prob leave-unmasked-prob random-token-prob mask-whole-words
mask-multiple-length mask-stdev freq-weighted-replacement save-dir restore-file save-interval
save-interval-updates keep-interval-updates keep-last-epochs keep-best-checkpoints no-save
no-epoch-checkpoints no-last-checkpoints validate-interval validate-interval-updates valid-subset train-subset
log-interval log-format log-file no-progress-bar tensorboard-logdir wandb-project fp16 memory-efficient-fp16
bf16 seed cpu num-workers encoder-layers encoder-embed-dim encoder-ffn-embed-dim encoder-attention-heads
max-positions max-source-positions skip-invalid-size-inputs-valid-test shorten-method
required-batch-size-multiple ddp-backend find-unused-parameters distributed-world-size distributed-port
user-dir reset-optimizer reset-dataloader reset-lr-scheduler reset-meters finetune-from-model
best-checkpoint-metric maximize-best-checkpoint-metric patience disable-validation stop-time-hours
checkpoint-activations data-buffer-size dataset-impl share-encoder-input-output-embed model-parallel-size"""
# Of fairseq's denoising task, of run_t5_mlm_flax.py and nanoT5, and of MASS.
DENOISING = """mask mask-random mask-length replace-length poisson-lambda permute-sentences permute insert rotate
max-target-positions decoder-layers mlm_probability mean_noise_span_length adafactor extra_ids input_length base_lr grad_acc
max_source_length max_target_length word_mass n_dec_layers"""
EVERY_OPTION = {
    field.name for method in METHODS for cls in load_method(method).arguments for field in dataclass_fields(cls)
}
OF_METHOD = {
    method: {field.name for cls in load_method(method).arguments for field in dataclass_fields(cls)}
    for method in METHODS
}


def test_every_synonym_leads_to_an_option():
    named = {choice.split()[0] for choices in SYNONYMS.values() for choice in choices.split("|")}
    assert named <= EVERY_OPTION, named - EVERY_OPTION
    # These are options of some methods, and names for something else in others.
    assert not set(SYNONYMS) & EVERY_OPTION - {"max_length", "mlm_probability", "task", "decoder_layers"}
    assert not set(SYNONYMS) & set(WITHOUT_OPTION) and not set(WITHOUT_OPTION) & EVERY_OPTION - {"objective"}
    others = {option for text in WITHOUT_OPTION.values() for option in re.findall(r"--(\w+)", text)}
    assert others and others <= EVERY_OPTION, others - EVERY_OPTION
    for choices in SYNONYMS.values():
        option, _, value = choices.partition(" ")
        if value:
            assert program("mlm", f"--{option}", value, "--output_dir", "x")


@pytest.mark.parametrize("name", [*RUN_MLM.split(), *FAIRSEQ.split(), *DENOISING.split()])
def test_the_options_of_other_programs_are_known(name):
    plain = name.replace("-", "_")
    assert plain in OF_METHOD["mlm"] or plain in SYNONYMS or plain in WITHOUT_OPTION
    for method in ("mlm", "recurrent-lm", "distil-task", "denoise"):
        if plain in OF_METHOD[method]:
            continue
        with pytest.raises(InputError) as refused:
            program(method, f"--{name}", "1")
        hint = str(refused.value).partition(": ")[2]
        if meant := re.match(r"did you mean '--(\w+)( \w+)?'", hint):
            # A near spelling never replaces what the name means elsewhere.
            assert meant[1] in OF_METHOD[method] and (meant[1] + (meant[2] or "")) in SYNONYMS[plain].split("|")
        else:
            assert plain in WITHOUT_OPTION or hint.startswith(("elsewhere it is --", "it is an option of"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--mask", "'--infilling_probability'"),
        ("--poisson-lambda", "'--infilling_mean_length'"),
        ("--permute-sentences", "'--sentence_permutation_probability'"),
        ("--rotate", "'--rotation_probability'"),
        ("--mlm_probability", "'--noise_density'"),
        ("--mean_noise_span_length", "'--mean_span_length'"),
        ("--word_mass", "'--fragment_share'"),
        ("--n_dec_layers", "'--num_decoder_layers'"),
        ("--adafactor", "'--optim adafactor'"),
        ("--mask-length", "--noise_steps"),
        ("--extra_ids", "sentinels"),
    ],
)
def test_names_of_other_denoising_programs_lead_to_the_option_here(typed, meant):
    with pytest.raises(InputError, match=f"unknown option '{typed}': .*{meant}"):
        program("denoise", typed, "1")


def test_a_hint_gives_the_value_too_and_in_a_recipe_as_the_recipe_has_it(recipe):
    with pytest.raises(InputError, match="did you mean '--masking_unit word'"):
        program("mlm", "--whole-word-mask", "true")
    with pytest.raises(InputError, match="did you mean 'masking_unit: word'"):
        program("mlm", "--config", recipe("whole_word_mask: true\n"))


def test_a_recipe_begins_with_those_that_it_names(recipe, tmp_path):
    inner = recipe("hidden_size: 32\nvocab_size: 500\n")
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"config: {Path(inner).name}\nvocab_size: 600\n", encoding="utf-8")
    data, model, _ = program("mlm", "--config", str(outer), "--output_dir", "x")
    assert (model.hidden_size, data.vocab_size) == (32, 600)
    data, *_ = program("mlm", "--config", str(outer), "--config", inner, "--output_dir", "x")
    assert data.vocab_size == 500
    outer.write_text("config: [bert_base, outer.yaml]\n", encoding="utf-8")
    with pytest.raises(InputError, match="outer.yaml: config names this recipe itself"):
        program("mlm", "--config", str(outer))
    outer.write_text("config: [[bert_base]]\n", encoding="utf-8")
    with pytest.raises(InputError, match="is no name of a recipe"):
        program("mlm", "--config", str(outer))
