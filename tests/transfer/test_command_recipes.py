"""Recipes of commands: those of papers hold the papers' values, and every command takes a recipe for its options."""

import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers.task_runs import write_encoder, write_tasks
from hf_pretrain import cli
from hf_pretrain.commands import finetune, parse_command
from hf_pretrain.names import described_recipes, packaged_recipes
from hf_pretrain.transfer.fine_tuning import FineTuningTrainer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "trainers" / "recipes" / "finetune"
LINEAR = {"warmup_steps": 0.1, "lr_scheduler_type": "linear", "num_train_epochs": 3.0}
LINEAR |= {"per_device_train_batch_size": 32, "weight_decay": 0.01, "max_length": 128}
# Of each recipe what its sources say, and a part with its rate, as a share of the head's.
PAPERS = {
    "finetune_bert": (LINEAR | {"strategy": "full", "learning_rate": 2e-5}, {}),
    "finetune_electra": (
        LINEAR | {"strategy": "layerwise_decay", "learning_rate": 1e-4},
        {"layer 2": 0.8, "layer 1": 0.8**2, "embeddings": 0.8**3},
    ),
    "finetune_ulmfit": (
        {"strategy": "gradual", "slanted_triangular": True, "slanted_cut_fraction": 0.1, "slanted_ratio": 32.0},
        {"layer 2": 1 / 2.6, "layer 1": 1 / 2.6**2, "embeddings": 1 / 2.6**3},
    ),
}
GIVEN = ["my-encoder", "--tasks", "tasks.yaml", "--task", "pair", "--output_dir", "out", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipes")
    write_tasks(place)
    write_encoder(place / "encoder", hidden_size=16, intermediate_size=16)
    return place


def options_of(*words):
    found = parse_command(
        finetune.ARGUMENTS, [*GIVEN, *words], name="finetune", description="", first="model_name_or_path"
    )
    return {field.name: getattr(part, field.name) for part in found for field in dataclasses.fields(part)}


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_values_of_its_paper(name):
    found = options_of("--config", name)
    for option, value in PAPERS[name][0].items():
        assert getattr(found[option], "value", found[option]) == value, option
    # The command line replaces what a recipe says.
    assert options_of("--config", name, "--learning_rate", "3e-5")["learning_rate"] == 3e-5
    header = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    assert header.startswith("# hf-pretrain finetune\n") and re.search(r"# Source +[A-Z].*https://arxiv", header)
    assert f"hf-pretrain finetune my-{name.split('_')[1].replace('ulmfit', 'encoder')} --config {name} " in header


def test_every_recipe_of_a_command_is_known_by_name_and_none_is_a_method():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == PAPERS.keys() and names <= packaged_recipes().keys()
    assert not names & (described_recipes().keys() | cli.METHODS.keys() | cli.COMMANDS.keys())
    table = (ROOT / "docs" / "transfer.md").read_text()
    assert all(f"| `{name}` |" in table for name in names)


@pytest.mark.parametrize("name", ["finetune_electra", "finetune_ulmfit"])
def test_a_recipe_moves_what_its_paper_does_and_its_own_recipe_starts_it_again(place, tmp_path, monkeypatch, name):
    seen, train = [], FineTuningTrainer.train

    def watched(trainer, *args, **kwargs):
        seen.append(trainer)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(FineTuningTrainer, "train", watched)
    words = ["--tasks", place / "tasks.yaml", "--task", "classification", "--max_length", 16, "--tfidf", "false"]
    words += ["--config", name, "--num_train_epochs", 4, "--use_cpu", "true", "--disable_tqdm", "true"]
    words += ["--output_dir", tmp_path / "out", "--learning_rate", 1e-2]
    assert cli.main(["finetune", *map(str, [place / "encoder", *words])]) == 0
    rates = {part.name: part.learning_rate for part in seen[0].plan.parts}
    for part, share in PAPERS[name][1].items():
        assert rates[part] == pytest.approx(share * rates["head"], rel=1e-3), part
    begins = {part.name: part.begin.value for part in seen[0].plan.parts}
    wanted = {"head": 0, "layer 2": 1, "layer 1": 2, "embeddings": 3}
    assert begins == (wanted if name == "finetune_ulmfit" else dict.fromkeys(wanted, 0))
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["strategy"] == PAPERS[name][0]["strategy"] if name == "finetune_ulmfit" else "config" not in written
    again = [
        "--config",
        str(tmp_path / "out" / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "again"),
        "--use_cpu",
        "true",
    ]
    assert cli.main(["finetune", *again]) == 0
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert all(tensor.equal(two[key]) for key, tensor in one.items())


# Of each command: its options by a recipe, and the name of the one that comes first.
COMMANDS = {
    "finetune": ("model_name_or_path", {"tasks": "t.yaml", "output_dir": "out", "seeds": [1, 2], "strategy": "lora"}),
    "multitask": ("model_name_or_path", {"tasks": "t.yaml", "output_dir": "out", "loss_weights": {"a": 2}}),
    "features": ("model_name_or_path", {"tasks": "t.yaml", "layer": [-1, -2], "classifier": "all"}),
    "evaluate": ("models", {"tasks": ["a", "b"], "how": ["finetune"], "strategy": "full", "max_examples": 7}),
    "compare": (
        "models",
        {"tasks": ["a"], "strategies": ["full", "lora:lora_rank=4"], "budget": "1e15", "seeds": [3]},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_its_options_from_a_recipe(name, tmp_path):
    first, options = COMMANDS[name]
    arguments = import_module(cli.COMMANDS[name][0]).ARGUMENTS
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options))

    def parsed(*words):
        found = parse_command(arguments, ["my-model", *words], name=name, description="", first=first)
        return found if isinstance(found, tuple) else (found,)

    given = parsed("--config", str(tmp_path / "mine.yaml"))
    for option, value in options.items():
        (found,) = {repr(getattr(part, option)) for part in given if hasattr(part, option)}
        assert found == repr(float(value) if option == "budget" else value), option
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options | {"tsak": "x"}))
    with pytest.raises(cli.InputError, match="tsak"):
        parsed("--config", str(tmp_path / "mine.yaml"))
