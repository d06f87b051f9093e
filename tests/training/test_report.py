"""What a program prints when it has ended."""

import re

import pytest
from transformers.utils import logging as transformers_logging

from helpers.method_matrix import build, programs
from hf_pretrain.training.program import (
    _how_it_opens,
    coloured_words,
    held_out_rows,
    print_report,
    print_table,
)

PROGRAMS = programs()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the Trainer of a method that was evaluated before and after, and its folder."""

    def train(method):
        folder = tmp_path_factory.mktemp(method)
        trainer = build(PROGRAMS[method], folder, max_steps=2, eval_on_start=True, learning_rate=1e-2)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        trainer.create_model_card()
        return trainer, folder

    return train


def test_the_report_of_replaced_token_detection(trained, capsys):
    trainer, folder = trained("rtd")
    capsys.readouterr()
    verbosity = transformers_logging.get_verbosity()
    print_report(trainer)
    assert transformers_logging.get_verbosity() == verbosity
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert f"The export in {folder} opens with stock transformers:" in lines
    head = "the pre-training head discriminator_predictions set aside"
    assert f"  AutoModel.from_pretrained -> ElectraModel: 0 missing keys, {head}" in lines
    assert "  ElectraForPreTraining.from_pretrained -> ElectraForPreTraining: 0 missing keys, 0 unexpected" in lines
    # The stock loader's own table would say the same in a dozen lines.
    assert "UNEXPECTED" not in out + err
    before, after = (row for row in trainer.state.log_history if "eval_loss" in row)
    table = {cells[0]: cells[1:] for cells in map(str.split, lines) if len(cells) == 3}
    assert table.keys() >= {"loss", "mlm_loss", "rtd_loss", "mlm_accuracy", "disc_auc", "disc_gain", "fake_rate"}
    for name in ("loss", "mlm_loss", "rtd_loss", "disc_auc"):
        assert table[name] == [f"{before[f'eval_{name}']:.4f}", f"{after[f'eval_{name}']:.4f}"]
    assert table["mlm_loss"][0] != table["mlm_loss"][1]
    assert not any("runtime" in name or "second" in name for name in table)
    paths = [line.split()[-1] for line in lines if line.startswith(("model card", "plot"))]
    assert paths[0] == str(folder / "README.md")
    assert paths[1:] == [str(folder / "plots" / f"{name}.png") for name in ("learning_rate", "loss", "quality")]


def test_the_report_says_where_the_page_of_the_model_is(trained, capsys, monkeypatch):
    trainer, _ = trained("mlm")
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    monkeypatch.setattr(trainer, "hub_model_id", "me/my-bert", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    capsys.readouterr()
    print_report(trainer)
    assert "model page  https://hub.example/me/my-bert" in capsys.readouterr().out.splitlines()


def test_the_report_says_that_code_lies_beside_the_export(trained, capsys):
    """A model of an architecture that transformers has not is no stock one."""
    trainer, folder = trained("mlm")
    own = type("OwnModel", (type(trainer.model.model),), {"__module__": "hf_pretrain.models.own"})
    root = own(trainer.model.model.config)
    assert _how_it_opens(root, folder) == "opens with transformers where hf_pretrain is imported"
    (folder / "modeling_own.py").touch()
    line = _how_it_opens(root, folder)
    assert line == "opens with transformers and the code beside it, where trust_remote_code=True is given"
    assert _how_it_opens(trainer.model.model, folder) == "opens with stock transformers"


def test_the_report_says_what_is_missing(trained, capsys):
    """A masked language model has no pooler: AutoModel makes a fresh one, and that is told."""
    trainer, _ = trained("mlm")
    capsys.readouterr()
    print_report(trainer)
    out = capsys.readouterr().out
    missing = "2 missing keys (the pooler, which the objective does not train)"
    assert f"AutoModel.from_pretrained -> BertModel: {missing}, the pre-training head cls set aside" in out
    assert "BertForMaskedLM.from_pretrained -> BertForMaskedLM: 0 missing keys, 0 unexpected" in out


def test_the_report_without_held_out_text_has_no_table(trained, capsys):
    trainer, _ = trained("mlm")
    trainer.state.log_history = [row for row in trainer.state.log_history if "eval_loss" not in row]
    capsys.readouterr()
    print_report(trainer)
    out = capsys.readouterr().out
    assert "Held-out" not in out and "model card" in out


class TestHeldOutRows:
    BEFORE = {"eval_loss": 4.0, "eval_mlm_loss": 4.0, "eval_runtime": 1.0, "epoch": 0, "step": 0}
    DURING = {"eval_loss": 3.0, "eval_mlm_loss": 3.0, "eval_runtime": 1.0, "epoch": 0.5, "step": 5}
    AFTER = {
        "eval_loss": 2.0,
        "eval_mlm_loss": 2.0,
        "eval_disc_auc": 0.98765,
        "eval_runtime": 1.0,
        "epoch": 1,
        "step": 9,
    }
    STEP = {"loss": 3.5, "mlm_loss": 3.5, "epoch": 0.5, "step": 5}

    def test_first_and_last(self):
        assert held_out_rows([self.BEFORE, self.STEP, self.DURING, self.AFTER]) == [
            ("disc_auc", "", "0.9877"),
            ("mlm_loss", "4.0000", "2.0000"),
            ("mlm_perplexity", "54.5982", "7.3891"),
        ]

    def test_nothing_was_measured(self):
        assert held_out_rows([]) == held_out_rows([self.STEP]) == []

    @pytest.mark.parametrize("earlier", [[], [DURING]])
    def test_before_stays_empty_where_it_was_not_measured(self, earlier):
        """A number after training, or from its middle, is none from before."""
        assert held_out_rows([self.STEP, *earlier, self.AFTER]) == [
            ("disc_auc", "", "0.9877"),
            ("mlm_loss", "", "2.0000"),
            ("mlm_perplexity", "", "7.3891"),
        ]

    def test_after_stays_empty_where_it_was_not_measured(self):
        """Evaluated at the start only."""
        assert held_out_rows([self.BEFORE, self.STEP]) == [
            ("mlm_loss", "4.0000", ""),
            ("mlm_perplexity", "54.5982", ""),
        ]

    def test_the_values_are_those_of_the_exported_step(self):
        rows = held_out_rows([self.BEFORE, self.DURING, self.AFTER], weights_step=5)
        assert rows == [("mlm_loss", "4.0000", "3.0000"), ("mlm_perplexity", "54.5982", "20.0855")]

    def test_a_total_of_several_losses_is_shown(self):
        row = {"eval_loss": 52.0, "eval_mlm_loss": 2.0, "eval_rtd_loss": 1.0, "step": 9}
        assert [name for name, *_ in held_out_rows([row])] == ["loss", "mlm_loss", "mlm_perplexity", "rtd_loss"]

    @pytest.mark.parametrize("mark", ["other_data", "other_weights"])
    def test_numbers_of_other_data_or_weights_are_left_out(self, mark):
        other = self.AFTER | {"eval_mlm_loss": 0.1, mark: True}
        assert held_out_rows([self.BEFORE, self.AFTER, other]) == held_out_rows([self.BEFORE, self.AFTER])

    def test_every_one_of_several_sets_is_shown(self):
        def rows(step, value):
            return [
                {f"eval_{name}_loss": value, f"eval_{name}_runtime": 1.0, "step": step} for name in ("law", "news")
            ]

        assert held_out_rows([*rows(0, 4.0), self.STEP, *rows(9, 2.0)]) == [
            ("law_loss", "4.0000", "2.0000"),
            ("news_loss", "4.0000", "2.0000"),
        ]


def test_table_columns_line_up(capsys):
    print_table([("a", "1.00", "20.00"), ("longer", "", "3.00")], header=("", "before", "after"))
    assert capsys.readouterr().out.splitlines() == [
        "          before  after",
        "  a         1.00  20.00",
        "  longer           3.00",
    ]


class TestColouredWords:
    WORDS = [("The", 0.0), ("chef", 0.25), ("ate", 0.5), ("gravel", 0.987)]

    @pytest.fixture(autouse=True)
    def plain_environment(self, monkeypatch):
        for name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)

    def test_without_colour_the_suspicious_ones_are_marked(self):
        assert coloured_words(self.WORDS, colour=False) == "The chef [ate 0.50] [gravel 0.99]"

    def test_with_colour_the_background_goes_from_white_to_red(self):
        text = coloured_words(self.WORDS, colour=True)
        assert re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+)m", text) == [
            ("255", shade, shade) for shade in ("255", "128", "75", "2")
        ]
        assert re.sub(r"\x1b\[[\d;]*m", "", text).split() == ["The", "chef", "ate", "gravel"]
        # Every word is reset, or the terminal stays red.
        assert text.count("\x1b[0m") == len(self.WORDS) and text.endswith("\x1b[0m")

    def test_by_default_only_a_terminal_is_coloured(self, monkeypatch):
        assert coloured_words(self.WORDS) == coloured_words(self.WORDS, colour=False)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert coloured_words(self.WORDS) == coloured_words(self.WORDS, colour=True)

    def test_the_environment_decides(self, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert coloured_words(self.WORDS) == coloured_words(self.WORDS, colour=True)
        monkeypatch.setenv("NO_COLOR", "1")
        assert coloured_words(self.WORDS) == coloured_words(self.WORDS, colour=False)

    def test_no_words(self):
        assert coloured_words([], colour=True) == coloured_words([], colour=False) == ""
