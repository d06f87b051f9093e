"""What every program does around its training: the run leaves its recipe and export."""

import re
from dataclasses import fields

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_output_folder import contents

from helpers.method_matrix import data_for, programs, tiny_data, tiny_model_options
from hf_pretrain.data.prepare import DataArguments
from hf_pretrain.errors import InputError
from hf_pretrain.hub.record import read_record
from hf_pretrain.hub.text import measured, with_perplexity
from hf_pretrain.modeling.backbone import vocabulary_size
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.output_folder import check_replaceable, output_directory
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import run

PROGRAMS = programs()


def ran(program, folder, *argv):
    """Run a program's parts, all but the reading of text, and return its Trainer and options."""
    tiny = []
    for name, value in tiny_options(program).items():
        tiny += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    argv = [*tiny, "--output_dir", str(folder), "--bf16", "false", *argv]
    argv = ["--logging_steps", "1", "--max_steps", "2", "--warmup_steps", "0", "--save_strategy", "no", *argv]
    options = parse_arguments(program.arguments, argv, prog="hf-pretrain", description="")
    with output_directory(options[-1]):
        trainer = program.build_trainer(data_for(program), options[1], options[-1])
        run(trainer, options)
    return trainer, options


def tiny_options(program):
    """What makes a program's model tiny, and its training fit the tiny text."""
    return tiny_model_options(program) | dict(program.tiny_options)


class TestRun:
    @pytest.fixture(scope="class", params=sorted(PROGRAMS))
    @classmethod
    def finished(cls, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run") / "out"
        extra = ["--learning_rate", "3e-4", "--train_file", str(folder.parent / "räume.txt"), "--seed", "7"]
        return *ran(PROGRAMS[request.param], folder, *extra), folder

    def test_it_leaves_everything(self, finished):
        trainer, _, folder = finished
        expected = {
            "README.md",
            "recipe.yaml",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "trainer_state.json",
        }
        assert expected | {"plots/loss.png"} <= contents(folder)
        parts = [part for part in trainer.model.export_parts if part]
        assert {f"{part}/model.safetensors" for part in parts} <= contents(folder)
        assert not (folder / "_lock").exists()
        # The same command may replace all of it.
        check_replaceable(folder)
        # Trained, then evaluated, then exported.
        assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row][-1] == 2
        root = trainer.model.root
        loaded = type(root).from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in root.state_dict().items())

    def test_the_recipe_gives_the_same_options_again(self, finished):
        trainer, options, folder = finished
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        assert text.startswith(f"# hf-pretrain {trainer.objective.name}\n")
        types = [type(option) for option in options]
        again = parse_arguments(types, ["--config", str(folder / "recipe.yaml")], prog="hf-pretrain", description="")
        for first, second in zip(options, again, strict=True):
            for option in fields(first):
                assert plain(getattr(first, option.name)) == plain(getattr(second, option.name)), option.name

    def test_the_recipe_holds_what_was_set_and_nothing_of_the_machine(self, finished):
        trainer, _, folder = finished
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        given = {*tiny_options(PROGRAMS[trainer.objective.name]), "output_dir", "bf16"}
        given |= {"logging_steps", "max_steps", "warmup_steps"}
        given |= {"save_strategy", "learning_rate", "train_file", "seed"}
        # What a preset of losses stands for is written out, and a batch that was lowered to fit the lanes held out.
        given |= {name for name in recipe if name.endswith("_weight")} | {"temperature", "mlm_probability"}
        # What follows from the objective where nothing is given.
        given |= {"similarity", "contrastive_temperature", "text_unit"} if "views" in recipe else set()
        given |= {"per_device_eval_batch_size"} if hasattr(trainer.args, "eval_lanes") else set()
        assert recipe["learning_rate"] == 3e-4 and recipe["max_steps"] == 2
        # Else a recipe written on a machine without a GPU would never use one again.
        assert recipe.keys() <= given

    def test_the_options_in_the_card_are_all_that_define_the_run(self, finished):
        """Saved as a file, they start the same run again, whatever the defaults will be."""
        trainer, options, folder = finished
        card = (folder / "README.md").read_text(encoding="utf-8")
        block = re.search(r"<details>.*?```yaml\n(.*?)```.*?</details>", card, flags=re.DOTALL)[1]
        known = yaml.safe_load(block)
        shown = yaml.safe_load(re.search(r"### Recipe.*?```yaml\n(.*?)```", card, flags=re.DOTALL)[1])
        assert {"learning_rate", "lr_scheduler_type", "optim", "seed", "warmup_steps"} <= shown.keys() < known.keys()
        assert {"learning_rate", "warmup_steps", "adam_epsilon", "optim", "weight_decay", "seed"} <= known.keys()
        defining = {
            "mlm_probability",
            "rtd_weight",
            "generator_size",
            "strip_accents",
            "hidden_size",
            "mem_len",
            "loss_weights",
        }
        for option in options:
            assert {name for name in defining if getattr(option, name, None) is not None} <= known.keys()
        (folder.parent / "all.yaml").write_text(block, encoding="utf-8")
        types = [type(option) for option in options]
        output = ["--output_dir", str(folder)]
        config = ["--config", str(folder.parent / "all.yaml")]
        again = parse_arguments(types, [*config, *output], prog="hf-pretrain", description="")
        # Where and how a run saves, logs and pushes, and what is a path of the machine.
        aside = ("output_dir", "logging_", "save_", "disable_tqdm", "train_file", "teacher_name_or_path")
        for first, second in zip(options, again, strict=True):
            for option in (option for option in fields(first) if not option.name.startswith(aside)):
                assert plain(getattr(first, option.name)) == plain(getattr(second, option.name)), option.name

    def test_the_card_has_the_sizes_of_the_model(self, finished):
        trainer, _, folder = finished
        card = (folder / "README.md").read_text(encoding="utf-8")
        root = trainer.model.root
        rows = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+) \|", card, flags=re.MULTILINE))
        config = root.config
        expected = {"Layers": config.num_hidden_layers, "Width": config.hidden_size}
        # A recurrent model has no heads.
        if hasattr(config, "num_attention_heads"):
            expected["Attention heads"] = config.num_attention_heads
        expected["Vocabulary"] = vocabulary_size(root.get_input_embeddings())
        assert {name: int(rows[name].replace(",", "")) for name in expected} == expected
        assert rows["Parameters"] == f"{root.num_parameters():,}"

    def test_each_number_of_the_card_is_explained_and_the_hub_gets_a_few(self, finished):
        trainer, _, folder = finished
        card = read_record(folder)
        after = {name.removeprefix("eval_") for name in with_perplexity(measured(card.metrics_after))}
        assert after and after <= set(card.objective.metrics), "a sentence for an outsider"
        assert all(text.endswith(".") and len(text) < 110 for text in card.objective.metrics.values())
        index = ModelCard.load(folder / "README.md").data.eval_results
        assert {result.metric_type for result in index} <= set(card.objective.headline)
        assert min(3, len(after)) <= len(index) <= 5
        assert all(float(f"{result.metric_value:.4g}") == result.metric_value for result in index)

    def test_the_card_tells_nothing_of_the_machine(self, finished):
        _, _, folder = finished
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "learning_rate: 0.0003" in card and "räume.txt" in card
        assert str(folder.parent) not in card


def plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


def test_known_tokenizer_of_the_checkpoint_is_used(tmp_path, monkeypatch):
    """On resume the tokenizer of the checkpoint wins, then the one named, then that of the model continued from."""
    from hf_pretrain.training import program as program_module

    seen = []
    monkeypatch.setattr(program_module, "prepare_data", lambda data_args, **options: seen.append(options))
    tokenizer = tiny_data().tokenizer
    for name in ("checkpoint", "model", "named"):
        tokenizer.add_tokens([f"only-{name}"])
        tokenizer.save_pretrained(tmp_path / name)
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    for data_args, resume in (
        (DataArguments(), str(tmp_path / "checkpoint")),
        (DataArguments(tokenizer_name=str(tmp_path / "named")), str(tmp_path / "checkpoint")),
        (DataArguments(), None),
        (DataArguments(tokenizer_name=str(tmp_path / "named")), None),
    ):
        args = PretrainingArguments(
            output_dir=str(tmp_path / "out"), bf16=False, resume_from_checkpoint=resume, seed=5
        )
        program_module.load_data(data_args, model_args, args)
    found = [options["tokenizer"] for options in seen]
    sizes = [len(tokenizer) for tokenizer in found]
    base = len(tiny_data().tokenizer)
    assert sizes == [base + 1, base + 1, base + 2, base + 3]
    assert all(options["seed"] == 5 and options["output_dir"] == str(tmp_path / "out") for options in seen)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    with pytest.raises(InputError, match="no mask_token"):
        options = PretrainingArguments(str(tmp_path / "out"), bf16=False)
        program_module.load_data(DataArguments(tokenizer_name=str(tmp_path / "maskless")), model_args, options)
    assert len(seen) == 4
    nowhere = ModelArguments(model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot be loaded with AutoTokenizer"):
        program_module.load_data(DataArguments(), nowhere, PretrainingArguments(str(tmp_path / "out"), bf16=False))
