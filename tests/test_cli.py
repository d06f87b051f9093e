"""The command line: what it lists, how it finds a method, and how a program ends."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModel

from helpers.fresh_process import run_fresh
from hf_pretrain import cli
from hf_pretrain.errors import InputError, StoppedError, Terminated
from hf_pretrain.help import RARE
from hf_pretrain.names import MODELS, described_recipes, model_hint
from hf_pretrain.options import read_recipes, recipe_names
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.method import Method
from hf_pretrain.training.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES, EXAMPLE = ROOT / "trainers", ROOT / "examples" / "token_deletion"


def test_help_lists_every_method_and_command_with_one_line(capsys):
    for argv in ([], ["-h"], ["--help"]):
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        commands = lines[lines.index("commands:") + 1 :][: len(cli.COMMANDS)]
        assert [line.split()[0] for line in commands] == list(cli.COMMANDS)
        summaries = {name: listed.line for name, listed in cli.METHODS.items()}
        for name, summary in (
            summaries | {name: line for name, (_, line) in (cli.RECIPES | cli.COMMANDS).items()}
        ).items():
            assert sum(line.split()[:1] == [name] and summary in line for line in lines) == 1


def test_help_and_a_mistake_need_no_torch():
    program = (
        "import sys; from hf_pretrain import cli; cli.main(['--help']); cli.main(['--version']); cli.main(['rdt']); "
        "cli.main(['statistic']); cli.main(['electra']); "
        "assert not any(cli.main([name, '--help']) for name in (*cli.METHODS, *cli.RECIPES, *cli.COMMANDS)); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "error: unknown method 'rdt': did you mean 'rtd'?",
        "error: unknown method 'statistic': did you mean 'statistics'?",
        "error: unknown method 'electra': ELECTRA is `hf-pretrain rtd --config electra_small`, or `hf-pretrain rtd --config "
        "electra_base`",
    ]


def test_a_training_starts_without_what_only_measures_and_draws(tmp_path):
    """Each of these takes up to half a second; transformers and datasets themselves import the rest."""
    unused = ("sklearn", "scipy.stats", "matplotlib", "evaluate", "tensorboard", "torch.utils.tensorboard")
    program = f"""
import sys
def found():
    return [name for name in sys.modules if any(name == part or name.startswith(part + ".") for part in {unused})]
# Other tests' programs have them from the start.
for name in found():
    del sys.modules[name]
sys.path.insert(0, {str(ROOT / "tests")!r})
from hf_pretrain.cli import METHODS, load_method
for name in METHODS:
    load_method(name)
    print(name, found())
from helpers.method_matrix import build
trainer = build(load_method("mlm"), {str(tmp_path / "run")!r}, eval_on_start=True)
trainer.train()
trainer.evaluate()
# transformers imports scikit-learn with the classes of many architectures.
print("run", [name for name in found() if not name.startswith(("sklearn", "scipy.stats"))])
"""
    lines = run_fresh({"start": program}, tmp_path)["start"].splitlines()
    assert [line for line in lines if line.endswith("]")] == [f"{name} []" for name in (*cli.METHODS, "run")], lines


class TestIdleThreads:
    """OpenMP's threads sleep soon, unless the user or an imported torch has decided."""

    @pytest.mark.parametrize(
        ("given", "spins"), [({}, cli._SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
    )
    def test_a_choice_of_the_user_stays(self, given, spins, monkeypatch):
        monkeypatch.setattr(os, "environ", dict(given))
        monkeypatch.delitem(sys.modules, "torch")
        assert cli.main(["--help"]) == 0
        assert os.environ.get("GOMP_SPINCOUNT") == spins

    def test_nothing_is_set_where_torch_has_read_it_already(self, monkeypatch):
        monkeypatch.setattr(os, "environ", {})
        assert cli.main(["--help"]) == 0
        assert "GOMP_SPINCOUNT" not in os.environ


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["hf-pretrain", __import__("hf_pretrain").__version__]


@pytest.mark.parametrize("module", ["hf_pretrain", "hf_pretrain.cli"])
def test_the_package_is_a_program_too(module):
    found = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("hf-pretrain ")


def test_a_method_without_a_near_name_is_answered_with_all(capsys):
    assert cli.main(["zzzz"]) == 2
    assert f"choose from {', '.join([*cli.METHODS, *cli.RECIPES, *cli.COMMANDS])}" in capsys.readouterr().err


def test_a_method_gets_the_arguments_after_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(Method, "run", lambda method, argv: seen.append((method.name, argv)))
    assert cli.main(["mlm", "--share", "0.2", "--help"]) == 0
    assert cli.main(["electra_small", "--seed", "3"]) == 0
    monkeypatch.setattr(sys, "argv", ["hf-pretrain", "plm", "--from-process"])
    assert cli.main() == 0
    by_name = ("rtd", ["--config", "electra_small", "--seed", "3"])
    assert seen == [("mlm", ["--share", "0.2", "--help"]), by_name, ("plm", ["--from-process"])]


@pytest.mark.parametrize("name", cli.METHODS)
def test_a_record_has_the_name_that_it_is_listed_under_and_a_page(name):
    method = cli.load_method(name)
    assert (method.name, method.trainer.__name__) == (name, cli.METHODS[name].trainer)
    page = PAGES / f"{name.replace('-', '_')}.py"
    assert f'launch(__name__, "{name}")' in page.read_text(encoding="utf-8")


class TestMethodsOfOtherPackages:
    """As pip leaves them: a module, and beside it the folder with what the package registers."""

    @pytest.fixture
    def install(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)

        def install(package, *, summary="Doubles words.", **entry_points):
            folder = tmp_path / f"{package}-1.0.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nSummary: {summary}\n"
            )
            lines = [f"{name.replace('_', '-')} = {place}" for name, place in entry_points.items()]
            (folder / "entry_points.txt").write_text("\n".join(["[hf_pretrain.methods]", *lines]))

        return install

    def test_one_is_listed_with_its_package_and_not_imported(self, install, capsys):
        install("doubling", double_words="no_such_module:METHOD")
        assert cli.main(["--help"]) == 0
        assert re.search(r"^  double-words +Doubles words. \(doubling\)$", capsys.readouterr().out, flags=re.M)
        assert cli.main(["double-word"]) == 2
        assert "did you mean 'double-words'?" in capsys.readouterr().err

    def test_the_example_trains_two_steps(self, install, tmp_path):
        project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        install(project["name"], summary=project["description"], **project["entry-points"]["hf_pretrain.methods"])
        (tmp_path / "corpus.txt").write_text("\n\n".join(f"Sentence number {i} has some words." for i in range(200)))
        options = {
            "config": EXAMPLE / "token_deletion.yaml",
            "train_file": tmp_path / "corpus.txt",
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "warmup_steps": 0,
            "hidden_size": 32,
            "eval_strategy": "no",
        }
        assert (
            cli.main(
                ["token-deletion", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
            )
            == 0
        )
        assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "roformer"
        assert (tmp_path / "out" / "recipe.yaml").read_text().startswith("# hf-pretrain token-deletion\n")

    @pytest.mark.parametrize("name", ["mlm", "bert", "card"])
    def test_a_name_that_there_is_already_is_refused(self, install, capsys, name):
        install("doubling", **{name: "no_such_module:METHOD"})
        assert cli.main(["rtd", "--help"]) == 2
        assert capsys.readouterr().err == (
            f"error: {name!r} is a name of hf-pretrain and of a method of doubling: uninstall one of the two\n"
        )

    def test_two_packages_with_one_name_are_refused(self, install, capsys):
        install("doubling", double="no_such_module:METHOD")
        install("twice", double="no_such_module:METHOD")
        assert cli.main(["--help"]) == 2
        assert "'double' is a name of " in (err := capsys.readouterr().err) and "doubling" in err and "twice" in err

    @pytest.mark.parametrize(
        ("place", "found"),
        [("hf_pretrain.objectives.encoder:MASKED_LM", "the Method 'mlm'"), ("hf_pretrain.cli:main", "a function")],
    )
    def test_what_is_no_record_of_that_name_is_refused(self, install, capsys, place, found):
        install("doubling", double=place)
        assert cli.main(["double"]) == 2
        assert f"method 'double' of doubling: {place} is {found}: register" in capsys.readouterr().err


def raising(error):
    def program(argv):
        raise error

    return program


def test_bad_input_is_one_line_and_status_2(capsys):
    assert cli.run_program(raising(InputError("train_file='x'\n  is empty: name another"))) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: train_file='x' is empty: name another\n")


def test_bad_input_is_found_behind_the_error_of_another_library(capsys):
    wrapped = RuntimeError("generating the dataset failed")
    wrapped.__cause__ = InputError("train_file='x' is empty")
    assert cli.run_program(raising(wrapped)) == 2
    assert capsys.readouterr().err == "error: train_file='x' is empty\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), AssertionError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        cli.run_program(raising(error))


def test_what_merely_happened_after_bad_input_is_still_a_bug():
    bug = ValueError("a bug")
    bug.__context__ = InputError("handled already")
    with pytest.raises(ValueError, match="a bug"):
        cli.run_program(raising(bug))


def test_an_interrupt_is_status_130(capsys):
    assert cli.run_program(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_is_status_143(capsys):
    assert cli.run_program(raising(Terminated())) == 143
    assert cli.run_program(raising(StoppedError("stopped after step 3"))) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\nerror: stopped after step 3\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/home/x/out"),
            2,
            "/home/x/out cannot be .*Permission denied",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/out"), 2, "a.txt/out cannot be"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/none"), 2, "/proc/none cannot be"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), 2, "/mnt/x cannot be written: Read-only"),
        (OSError(errno.ENOSPC, "No space left on device", "/mnt/x"), 1, "the disk of /mnt/x is full"),
        (OSError(errno.EFBIG, "File too large"), 1, "the disk of .* is full"),
        (OSError(errno.EMFILE, "Too many open files"), 1, r"too many files are open .*ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), 1, "too many files are open"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, status, said, capsys):
    for raised in (error, wrapping(error)):
        assert cli.run_program(raising(raised)) == status
        err = capsys.readouterr().err
        assert re.match(f"error: {said}", err) and err.count("\n") == 1


def wrapping(error):
    wrapped = RuntimeError("generating the dataset failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error", [OSError("no number"), ConnectionError("refused"), OSError(errno.EPIPE, "Broken pipe")]
)
def test_other_errors_of_the_system_keep_their_traceback(error):
    with pytest.raises(OSError):
        cli.run_program(raising(error))


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_status_of_a_program_is_passed_on(returned, status):
    assert cli.run_program(lambda argv: returned) == status


def test_an_exit_is_passed_on():
    with pytest.raises(SystemExit):
        cli.run_program(raising(SystemExit(0)))


@pytest.mark.parametrize("method", cli.METHODS)
def test_every_method_refuses_a_mistyped_option(method, capsys):
    assert cli.main([method, "--learning_rat", "1"]) == 2
    assert capsys.readouterr().err == "error: unknown option '--learning_rat': did you mean '--learning_rate'?\n"


GROUPS = ["objective", "model", "data", "optimisation", "logging", "Hub"]


def shown_options(text):
    return re.findall(r"^  --(\w+) ", text, flags=re.MULTILINE)


def titles(text):
    return [title for title in re.findall(r"^(\w+):$", text, flags=re.MULTILINE) if title in (*GROUPS, "advanced")]


@pytest.mark.parametrize("method", cli.METHODS)
def test_the_help_of_a_method_is_grouped_and_lists_its_recipes(method, capsys):
    assert cli.main([method, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"hf-pretrain {method}" in shown and titles(shown) == GROUPS
    record = cli.load_method(method)
    own = [field.name for field in fields(record.arguments[2])]
    inherited = {field.name for field in fields(PretrainingArguments)}
    objective, _, rest = shown.partition("\nmodel:\n")
    assert set(shown_options(objective)) == set(own) - inherited - RARE
    assert {"learning_rate", "output_dir", "train_file"} <= set(shown_options(rest))
    assert not {"neftune_noise_alpha", "local_rank", "dataloader_pin_memory"} & set(shown_options(shown))
    recipes = [name for name, (owner, _) in described_recipes().items() if owner == method]
    assert re.findall(r"^  (\w+) {2,}\S", shown.partition("recipes, for --config:")[2], flags=re.MULTILINE) == recipes


def test_the_whole_help_has_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rtd", "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert titles(shown) == [*GROUPS, "advanced"]
    options = [field.name for cls in cli.load_method("rtd").arguments for field in fields(cls) if field.init]
    assert sorted(shown_options(shown.replace("--config RECIPE", ""))) == sorted(options)


def test_the_help_after_a_recipe_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["rtd", "--config", "electra_small", "--help"])
    assert re.search(r"--hidden_size VALUE +.*default: 256", capsys.readouterr().out)
    assert cli.main(["bert_small", "--help"]) == 0
    assert capsys.readouterr().out.startswith(
        "`hf-pretrain bert_small` is `hf-pretrain encoder --config bert_small`: BERT"
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("electra", "hf-pretrain rtd --config electra_small"),
        ("google/electra-base-discriminator", "hf-pretrain rtd"),
        ("modernbert", "hf-pretrain mlm --model_type modernbert"),
        ("ModernBERT-base", "hf-pretrain mlm --model_type modernbert"),
        ("modernbrt", "hf-pretrain mlm --model_type modernbert"),
        ("deberta", "hf-pretrain rtd --config deberta_v3_small"),
        ("xlnet", "hf-pretrain plm --config xlnet_base"),
        ("tinybert", "hf-pretrain distil --config tinybert_general"),
        ("minilm", "hf-pretrain distil --config minilmv2"),
        ("MiniLMv2", "hf-pretrain distil --config minilmv2"),
        ("transformer-xl", "hf-pretrain recurrent-lm"),
        ("bert-base-uncased", "hf-pretrain bert"),
        ("xlm-roberta-base", "hf-pretrain roberta"),
        ("t5-small", "T5 is `hf-pretrain t5`"),
        ("google/t5-v1_1-base", "T5 is `hf-pretrain t5`"),
        ("mt5-small", "hf-pretrain t5 --model_type mt5"),
        ("google/flan-t5-xl", "its pre-training is `hf-pretrain t5`"),
        ("google/flan-ul2", "its pre-training is `hf-pretrain ul2`"),
        ("facebook/bart-large-cnn", "BART is `hf-pretrain bart`"),
        ("mbart-large-50", "hf-pretrain bart --model_type mbart"),
        ("google/pegasus-xsum", "hf-pretrain denoise --model_type pegasus"),
        ("Helsinki-NLP/opus-mt-en-de", "hf-pretrain denoise --model_type marian"),
        ("mass-base-uncased", "hf-pretrain mass"),
        ("span-corruption", "hf-pretrain t5"),
        ("seq2seq", "hf-pretrain denoise"),
        ("gpt2", "hf-pretrain clm --config gpt2_small"),
        ("openai-community/gpt2", "hf-pretrain clm --config gpt2_small"),
        ("run_clm", "hf-pretrain clm"),
        ("gpt-neox", "hf-pretrain clm --model_type gpt_neox"),
        ("word2vec", "word2vec is `hf-pretrain vectors --method skipgram`"),
        ("llama-3", "hf-pretrain clm --model_type llama"),
    ],
)
def test_a_name_that_people_know_leads_to_the_right_place(typed, said, capsys):
    assert cli.main([typed, "--train_file", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: unknown method {typed!r}: ") and said in err and "did you mean" not in err


def test_every_hint_names_a_command_that_there_is(capsys):
    commands = {command for text in MODELS.values() for command in re.findall(r"`hf-pretrain ([^`]+)`", text)}
    assert len(commands) > 20
    for command in commands:
        name, *options = command.replace("...", "bert").split()
        assert name in (*cli.METHODS, *cli.RECIPES, *cli.COMMANDS), command
        if name not in cli.COMMANDS:
            method = cli.RECIPES[name][0] if name in cli.RECIPES else name
            for recipe in recipe_names(options):
                assert described_recipes()[recipe][0] == method, command
            arguments = cli.load_method(method).arguments
            assert parse_arguments(arguments, [*options, "--output_dir", "x"], prog=name, description="")
    for name, text in MODELS.items():
        assert model_hint(name) == text and name not in cli.METHODS


@pytest.mark.parametrize(
    "name", [name for name, (method, _) in described_recipes().items() if method != "distil-task"]
)
def test_a_small_recipe_has_the_objective_of_its_paper(name):
    assert described_recipes()[name][0] in cli.METHODS
    if name.endswith("_small") and name.removesuffix("_small") in cli.RECIPES:
        paper = dict(pair for _, recipe in read_recipes([name.removesuffix("_small")]) for pair in recipe.items())
        small = dict(pair for _, recipe in read_recipes([name]) for pair in recipe.items())
        what = "noise" if described_recipes()[name][0] == "denoise" else "objectives"
        assert small[what] == paper[what]
        sizes = {"hidden_size", "num_hidden_layers"}
        assert sizes <= paper.keys() or "model_name_or_path" in paper
        assert paper.keys() >= {"max_steps", "learning_rate"} and not small.keys() & (sizes | {"max_steps"})
        built_here = small.keys() - {"model_type", "tokenizer_type", "vocab_size"}
        assert {option: small[option] for option in built_here} == {option: paper[option] for option in built_here}


@pytest.mark.parametrize("method", ["mlm", "rtd", "plm", "encoder"])
def test_a_program_without_text_says_what_to_give(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([method, "--use_cpu", "true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no text to train on: give --train_file") and "--demo_corpus true" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_refuses_a_mistyped_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"hf-pretrain {command}" in capsys.readouterr().out
    assert cli.main([command, "--zzzz", "1"]) == 2
    assert capsys.readouterr().err == f"error: unknown option '--zzzz': see `hf-pretrain {command} --help`\n"


def test_no_command_has_the_name_of_a_method():
    assert not cli.COMMANDS.keys() & (cli.METHODS | cli.RECIPES).keys()
