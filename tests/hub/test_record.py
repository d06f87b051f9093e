"""The record of a run: every fact comes back, nothing of the machine goes out, and a card made again keeps what people wrote."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from reference_inputs import MLM, REFERENCE_CARDS, TASKS
from safetensors.torch import save_file

from hf_pretrain.commands import card as command
from hf_pretrain.errors import InputError
from hf_pretrain.files import share_weights, write_text
from hf_pretrain.hub.card import add_evaluation, keep_edits, render_card, write_card
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.record import RECORD, PretrainingCard, read_record, write_record

PLAIN = REFERENCE_CARDS["mlm"]
BARE = PretrainingCard(model_name="bare", model_class="BertForMaskedLM", objective=MLM)
PROBE: dict[str, Any] = {
    "task": "Tones",
    "dataset": "my sentences",
    "split": "test",
    "metrics": {"accuracy": 0.75},
    "method": "linear probe",
}


def _readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def _edit(folder: Path, *changes: tuple[str, str]) -> None:
    text = _readme(folder)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _record(card: PretrainingCard, folder: Path) -> Path:
    return write_record(card, folder, readme="")


class TestRoundTrip:
    @pytest.mark.parametrize("name", REFERENCE_CARDS)
    def test_every_fact_comes_back(self, name: str, tmp_path: Path) -> None:
        card = REFERENCE_CARDS[name]
        path = _record(card, tmp_path)
        back = read_record(tmp_path)
        assert render_card(back) == render_card(card)
        for entry in dataclasses.fields(PretrainingCard):
            was, now = getattr(card, entry.name), getattr(back, entry.name)
            assert list(now) == list(was) if isinstance(was, (list, tuple)) else now == was, entry.name
        first = path.read_bytes()
        _record(back, tmp_path)
        assert path.read_bytes() == first and read_record(tmp_path) == back
        assert json.loads(first)["format"] == 2

    def test_a_record_of_the_first_format_is_read(self, tmp_path: Path) -> None:
        path = _record(PLAIN, tmp_path)
        content = json.loads(path.read_text()) | {"format": 1}
        for name in ("weights_step", "chosen_by", "adapter", "fresh_parameters"):
            del content["card"][name]
        del content["weights"]
        path.write_text(json.dumps(content))
        assert render_card(read_record(tmp_path)) == render_card(PLAIN)

    def test_numbers_that_are_not_finite_come_back_and_the_file_is_strict_json(self, tmp_path: Path) -> None:
        card = dataclasses.replace(
            BARE, metrics_after={"eval_loss": math.inf}, log_history=[{"loss": math.nan, "step": 1}]
        )
        path = _record(card, tmp_path)
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        back = read_record(tmp_path)
        assert back.metrics_after == {"eval_loss": math.inf} and math.isnan(back.log_history[0]["loss"])

    def test_no_path_of_the_machine_is_in_it(self, tmp_path: Path) -> None:
        card = dataclasses.replace(
            BARE,
            base_model="/home/someone/bert",
            datasets=["/home/someone/glue", "org/set"],
            data={"source": "/home/someone/a.txt", "files": ["/home/someone/b.txt"]},
            recipe={"train_file": ["/home/someone/c.txt"]},
        )
        text = _record(card, tmp_path).read_text()
        assert "someone" not in text
        back = read_record(tmp_path)
        assert render_card(back) == render_card(dataclasses.replace(card, data=back.data, recipe=back.recipe))
        assert ModelCard(render_card(back)).data.base_model is None, "a local model must not look like one of the Hub"
        assert back.datasets == ("org/set",)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "has no pretraining/run.json"),
            ("{", "is no JSON"),
            ("[]", "is no record"),
            ('{"format": 3, "card": {}}', "install a newer"),
            ('{"format": 1, "card": {"model_name": "x"}}', "damaged"),
        ],
    )
    def test_what_is_no_record_is_refused(self, content: str | None, words: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "pretraining").mkdir()
            (tmp_path / RECORD).write_text(content)
        with pytest.raises(InputError, match=words):
            add_evaluation(tmp_path, TASKS[0])
        assert not (tmp_path / "README.md").exists()


class TestEvaluation:
    def test_it_is_in_the_table_and_in_the_model_index(self, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path)
        held_out = ModelCard(_readme(tmp_path)).data.eval_results
        for evaluation in TASKS:
            add_evaluation(tmp_path, evaluation)
        text = _readme(tmp_path)
        glue = "[nyu-mll/glue (sst2)](https://huggingface.co/datasets/nyu-mll/glue), validation, 872 examples"
        method = "fine-tuned for 3 epochs, one seed"
        assert f"| SST-2 | {glue} | {method} | Accuracy | 0.875 | 0.5 (most frequent class) |" in text
        assert (
            "| Topics | sentences of the handbook, test, 400 examples | linear probe on mean-pooled states | F1 | 0.625 |"
            in text
        )
        data = ModelCard(text).data
        assert data.eval_results[: len(held_out)] == held_out
        on_tasks = data.eval_results[len(held_out) :]
        assert on_tasks[0] == EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            dataset_type="nyu-mll/glue",
            dataset_name="nyu-mll/glue (sst2)",
            dataset_config="sst2",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name="SST-2: Accuracy",
            metric_value=0.875,
        )
        assert [(result.dataset_type, result.metric_type) for result in on_tasks[1:]] == [
            ("sentences-of-the-handbook", "accuracy"),
            ("sentences-of-the-handbook", "f1"),
        ]
        assert data.metrics == ["accuracy", "f1"]
        assert read_record(tmp_path).evaluations == TASKS
        assert (tmp_path / "plots" / "loss.png").is_file()

    def test_the_same_task_and_split_is_replaced_and_another_split_is_not(self, tmp_path: Path) -> None:
        write_card(BARE, tmp_path)
        for split, accuracy in (("test", 0.5), ("dev", 0.6), ("test", 0.7)):
            add_evaluation(tmp_path, Evaluation(**PROBE | {"split": split, "metrics": {"accuracy": accuracy}}))
        found = {(each.split, each.metrics["accuracy"]) for each in read_record(tmp_path).evaluations}
        assert found == {("test", 0.7), ("dev", 0.6)}
        results = ModelCard(_readme(tmp_path)).data.eval_results
        assert {(result.dataset_split, result.metric_value) for result in results} == found

    def test_two_methods_on_the_same_data_are_two_results(self, tmp_path: Path) -> None:
        """The Hub's library puts them into one entry, and must not lose whose is whose."""
        write_card(BARE, tmp_path)
        for task in ("Tones, probe", "Tones, tuned"):
            add_evaluation(tmp_path, Evaluation(**PROBE | {"task": task}))
        results = ModelCard(_readme(tmp_path)).data.eval_results
        assert [result.metric_name for result in results] == ["Tones, probe: Accuracy", "Tones, tuned: Accuracy"]
        assert not results[0].is_equal_except_value(results[1])

    def test_a_path_tells_its_last_part_only(self) -> None:
        assert Evaluation(**PROBE | {"dataset": "/home/someone/a.tsv"}).dataset == "a.tsv"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"task": " "}, "task=' ' of an evaluation"),
            ({"metrics": {}}, "metrics of 'Tones' are empty"),
            ({"metrics": {"accuracy": math.nan}}, "accuracy=nan is no finite number"),
            ({"metrics": {"accuracy": "0.5"}}, "accuracy='0.5' is no finite number"),
            ({"metrics": {"accuracy": True}}, "accuracy=True is no finite number"),
            ({"baseline": {"f1": 0.5}}, "baseline of 'Tones' has 'f1'"),
            ({"num_examples": 0}, "num_examples=0"),
            ({"task_type": "Text Classification"}, "task_type='Text Classification'"),
            (
                {"metric": {"accuracy": 0.5}},
                "results: unknown field 'metric' of an evaluation: did you mean 'metrics'",
            ),
        ],
    )
    def test_a_wrong_field_is_named(self, change: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=re.escape(words)):
            Evaluation.from_mapping(PROBE | change, source="results")

    def test_a_missing_field_is_named(self) -> None:
        with pytest.raises(InputError, match="results: an evaluation without 'method'"):
            Evaluation.from_mapping({name: PROBE[name] for name in PROBE if name != "method"}, source="results")


def _with_text_around(folder: Path, *, above: str = "", below: str = "") -> None:
    first, last = re.findall(r"^<!-- .* -->$", _readme(folder), flags=re.MULTILINE)
    _edit(folder, (first, f"{above}\n\n{first}"), (last, f"{last}\n\n{below}"))


class TestEdits:
    @pytest.mark.parametrize("name", REFERENCE_CARDS)
    def test_without_edits_the_card_is_what_is_made(self, name: str, tmp_path: Path) -> None:
        card = REFERENCE_CARDS[name]
        write_card(card, tmp_path)
        write_card(card, tmp_path)
        assert _readme(tmp_path) == render_card(card)
        write_card(dataclasses.replace(card, limits="New."), tmp_path)
        assert _readme(tmp_path) == render_card(dataclasses.replace(card, limits="New."))
        assert not list(tmp_path.glob("_README*"))

    def test_the_users_front_matter_and_text_stay(self, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path)
        _edit(
            tmp_path,
            ("- generated_from_trainer\n", "- generated_from_trainer\n- medical\n"),
            ("library_name: transformers\n", "library_name: transformers\nlicense: mit\nthumbnail: a.png\n"),
            ("language:\n- en\n", "language:\n- de\n"),
        )
        below = "## Intended use\n\nOur wards.\n\n```\n# no heading\n```\n\n### Not for\n\nDoses."
        _with_text_around(tmp_path, above="Ask us first.", below=below)
        for number, task in enumerate(TASKS):
            text = add_evaluation(tmp_path, task).read_text(encoding="utf-8")
            data = ModelCard(text).data
            assert (data.license, data.language, data.thumbnail) == ("mit", ["de"], "a.png")
            assert data.tags == ["hf_pretrain", "mlm", "generated_from_trainer", "medical"]
            assert text.endswith(f" -->\n\n{below}\n") and "---\n\nAsk us first.\n\n<!-- " in text
            assert "| SST-2 |" in text and ("| Topics |" in text) == (number > 0)
            assert text.count("## Intended use") == text.count("## Limits") == 1
        assert not list(tmp_path.glob("_README*"))

    def test_line_ends_of_another_system_are_no_edit(self, tmp_path: Path) -> None:
        text = write_card(PLAIN, tmp_path).read_text(encoding="utf-8")
        (tmp_path / "README.md").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
        write_card(PLAIN, tmp_path)
        assert _readme(tmp_path) == text and not list(tmp_path.glob("_README*"))

    def test_an_entry_that_the_user_removed_stays_away(self, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path)
        _edit(tmp_path, ("language:\n- en\n", ""), ("- generated_from_trainer\n", ""))
        add_evaluation(tmp_path, TASKS[0])
        data = ModelCard(_readme(tmp_path)).data
        assert data.language is None and "generated_from_trainer" not in data.tags

    def test_results_of_others_stay_and_ours_are_renewed(self, tmp_path: Path) -> None:
        write_card(dataclasses.replace(BARE, metrics_after={"eval_mlm_loss": 3.0}), tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        theirs = EvalResult(
            task_type="fill-mask", dataset_type="org/set", dataset_name="Set", metric_type="accuracy", metric_value=0.5
        )
        card.data.eval_results.append(theirs)
        card.save(tmp_path / "README.md")
        for metrics, ours in (({"eval_loss": 2.0}, [("loss", 2.0)]), ({}, [])):
            write_card(dataclasses.replace(BARE, metrics_after=metrics), tmp_path)
            results = ModelCard(_readme(tmp_path)).data.eval_results
            assert [(each.metric_type, each.metric_value) for each in results] == [*ours, ("accuracy", 0.5)]

    @pytest.mark.parametrize("edit", [("Old.", "Mine."), ("- mlm\n", "- mlm\n- Mine.\n")])
    def test_words_that_cannot_stay_are_set_aside(
        self, edit: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Text between the marks, and an entry of the front matter that the run has changed too."""
        write_card(dataclasses.replace(PLAIN, limits="Old."), tmp_path)
        _edit(tmp_path, edit)
        _with_text_around(tmp_path, below="Below.")
        edited = _readme(tmp_path)
        objective = dataclasses.replace(PLAIN.objective, name="other")
        write_card(dataclasses.replace(PLAIN, limits="New.", objective=objective), tmp_path)
        text = _readme(tmp_path)
        assert "New." in text and "- other" in text and "Mine." not in text and text.endswith("Below.\n")
        assert (tmp_path / "_README.before.md").read_text(encoding="utf-8") == edited

    @pytest.mark.parametrize("text", ["# Of another origin\n", "---\nlicense: [\n---\n\n# Broken\n"])
    def test_a_readme_that_cannot_be_followed_is_set_aside(self, text: str, tmp_path: Path) -> None:
        if text.startswith("---"):
            marks = write_card(BARE, tmp_path).read_text(encoding="utf-8").partition("---\n\n")[2]
            text += marks
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        write_card(BARE, tmp_path)
        assert _readme(tmp_path) == render_card(BARE)
        assert (tmp_path / "_README.before.md").read_text(encoding="utf-8") == text

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.98])
    def test_a_card_that_was_cut_off_is_made_whole(self, share: float, tmp_path: Path) -> None:
        """Whatever its length; what was left of it is kept."""
        whole = write_card(PLAIN, tmp_path).read_bytes()
        cut = whole[: int(share * len(whole))]
        (tmp_path / "README.md").write_bytes(cut)
        write_card(PLAIN, tmp_path)
        assert (tmp_path / "README.md").read_bytes() == whole
        assert (tmp_path / "_README.before.md").read_bytes() == cut

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
    def test_a_card_in_another_encoding_is_set_aside(self, encoding: str, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path)
        _with_text_around(tmp_path, below="## Zweck\n\nF\u00fcr \u00c4rzte.")
        content = _readme(tmp_path).replace("\U0001f917", "HF").encode(encoding)
        (tmp_path / "README.md").write_bytes(content)
        write_card(PLAIN, tmp_path)
        assert _readme(tmp_path) == render_card(PLAIN)
        assert (tmp_path / "_README.before.md").read_bytes() == content

    def test_a_record_of_before_the_marks_sets_the_readme_aside(self, tmp_path: Path) -> None:
        text = render_card(PLAIN)
        write_record(PLAIN, tmp_path, readme={"metadata": {}, "sections": {}})
        assert keep_edits(text, text, before={}, known=None) == (text, "")
        old = re.sub(r"^<!-- .*\n\n", "", text, flags=re.MULTILINE)
        (tmp_path / "README.md").write_text(old, encoding="utf-8")
        write_card(PLAIN, tmp_path)
        assert _readme(tmp_path) == text and (tmp_path / "_README.before.md").read_text(encoding="utf-8") == old

    def test_nothing_that_was_set_aside_is_written_over(self, tmp_path: Path) -> None:
        for words in ("first", "second", "second"):
            (tmp_path / "README.md").write_text(f"# {words}\n")
            shutil.rmtree(tmp_path / "pretraining", ignore_errors=True)
            write_card(BARE, tmp_path)
        kept = {path.name: path.read_text() for path in tmp_path.glob("_README*")}
        assert kept == {"_README.before.md": "# first\n", "_README.before.2.md": "# second\n"}

    def test_a_new_name_is_no_second_title(self, tmp_path: Path) -> None:
        write_card(BARE, tmp_path)
        write_card(dataclasses.replace(BARE, model_name="renamed"), tmp_path)
        assert re.findall(r"^# .*", _readme(tmp_path), flags=re.MULTILINE) == ["# renamed"]

    def test_a_copy_in_the_cache_of_the_hub_is_not_written_through(self, tmp_path: Path) -> None:
        """There the files are links to what other revisions share."""
        write_card(PLAIN, tmp_path / "blobs")
        snapshot = tmp_path / "snapshot"
        for path in (tmp_path / "blobs").rglob("*.*"):
            link = snapshot / path.relative_to(tmp_path / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        before = {path: path.read_bytes() for path in (tmp_path / "blobs").rglob("*.*")}
        add_evaluation(snapshot, TASKS[0])
        assert "| SST-2 |" in _readme(snapshot)
        assert {path: path.read_bytes() for path in before} == before


class TestFiles:
    def test_a_full_disk_leaves_every_old_file_whole(self, tmp_path: Path) -> None:
        """In a process of its own, whose files may not grow beyond a size, as on a disk without room."""
        write_card(PLAIN, tmp_path)
        _with_text_around(tmp_path, below="My words. " * 6000)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        code = (
            "import resource, sys; from hf_pretrain.commands.card import main; from hf_pretrain.cli import run_program\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            f"sys.exit(run_program(main, [{str(tmp_path)!r}, '--license', 'mit']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before

    def test_permissions_stay_and_weights_get_those_of_other_files(self, tmp_path: Path) -> None:
        path = write_text(tmp_path / "a" / "x.txt", "one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
        path.chmod(0o640)
        assert write_text(path, "two").read_text() == "two" and stat.S_IMODE(path.stat().st_mode) == 0o640
        weights = tmp_path / "model.safetensors"
        save_file({"x": torch.zeros(1)}, weights)
        share_weights(tmp_path)
        assert stat.S_IMODE(weights.stat().st_mode) == 0o666 & ~_umask()

    def test_numbers_do_not_stay_where_the_weights_have_changed(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        write_card(PLAIN, tmp_path)
        add_evaluation(tmp_path, TASKS[0])
        save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
        before = _readme(tmp_path)
        with pytest.raises(InputError, match="the weights in .* are not those that pretraining/run.json tells of"):
            add_evaluation(tmp_path, TASKS[1])
        assert _readme(tmp_path) == before
        (tmp_path / "model.safetensors").unlink()
        add_evaluation(tmp_path, TASKS[1])  # a copy of the card alone
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        assert len(read_record(add_evaluation(tmp_path, TASKS[1]).parent).evaluations) == 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestCommand:
    def test_it_adds_evaluations_and_facts(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_card(PLAIN, tmp_path / "model")
        one, many = tmp_path / "one.json", tmp_path / "many.json"
        one.write_text(json.dumps(PROBE))
        many.write_text(json.dumps([PROBE | {"split": "dev"}, PROBE | {"task": "Topics"}]))
        options = [
            "--license",
            "apache-2.0",
            "--language",
            "en",
            "de",
            "--datasets",
            "org/set",
            "--hub_model_id",
            "me/new",
            "--tags",
            "biomedical",
        ]
        command.main([str(tmp_path / "model"), "--evaluation", str(one), str(many), *options])
        assert capsys.readouterr().out == f"model card  {tmp_path / 'model' / 'README.md'}\n"
        card = ModelCard.load(tmp_path / "model" / "README.md")
        assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en", "de"], ["org/set"])
        assert card.data.tags[-1] == "biomedical"
        assert 'from_pretrained("me/new")' in card.text and "\n# new\n" in card.text
        assert len(read_record(tmp_path / "model").evaluations) == 3
        command.main([str(tmp_path / "model")])
        assert ModelCard.load(tmp_path / "model" / "README.md").content == card.content

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                ["--license", "Apache 2.0"],
                "license='Apache 2.0' is no identifier of the Hub: did you mean 'apache-2.0'?",
            ),
            (["--language", "English"], "language='English' is no code of a language: did you mean 'en'?"),
            (["--datasets", "/data/x"], "datasets='/data/x': give an id"),
            (["--evaluation", "absent.json"], "evaluation='absent.json' cannot be read"),
            (["--evaluations", "x"], "unknown option '--evaluations': did you mean '--evaluation'"),
        ],
    )
    def test_bad_input_is_named_and_changes_nothing(self, options: list[str], words: str, tmp_path: Path) -> None:
        write_card(BARE, tmp_path)
        before = _readme(tmp_path)
        with pytest.raises(InputError, match=re.escape(words)):
            command.main([str(tmp_path), *options])
        assert _readme(tmp_path) == before

    def test_the_front_matter_is_yaml_that_others_read(self, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path)
        command.main([str(tmp_path), "--language", "no"])
        front = _readme(tmp_path).split("---\n")[1]
        assert yaml.safe_load(front)["language"] == ["no"], "Norwegian, not false"


MTEB: dict[str, Any] = {
    "dataset_revision": "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
    "task_name": "STSBenchmark",
    "mteb_version": "2.26.24",
    "scores": {
        "validation": [
            {
                "pearson": 0.7101,
                "spearman": 0.7213,
                "cosine_pearson": 0.7101,
                "cosine_spearman": 0.7213,
                "manhattan_spearman": 0.7209,
                "scores_per_experiment": [{"spearman": 0.7213}],
                "main_score": 0.7213,
                "hf_subset": "default",
                "languages": ["eng-Latn"],
                "mteb_version": "2.26.24",
            }
        ],
        "test": [
            {"cosine_spearman": 0.65, "main_score": 0.65, "hf_subset": "en", "languages": ["eng-Latn"]},
            {"cosine_spearman": 0.5, "main_score": 0.5, "hf_subset": "de-en", "languages": ["deu-Latn", "eng-Latn"]},
        ],
    },
    "evaluation_time": 3.2,
    "kg_co2_emissions": None,
    "date": 1760000000.0,
    "evaluation_phases": None,
}


def _subset(**changes: Any) -> dict[str, Any]:
    """A result of mteb with one subset, changed."""
    entry = MTEB["scores"]["validation"][0] | changes
    return MTEB | {"scores": {"test": [{name: value for name, value in entry.items() if value != "left out"}]}}


class TestResultsOfMteb:
    def test_each_split_and_subset_is_an_evaluation_with_the_main_score_by_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "STSBenchmark.json").write_text(json.dumps(MTEB))
        found = command.read_evaluations(tmp_path / "STSBenchmark.json")
        assert [(each.task, each.split, each.dataset_config, dict(each.metrics)) for each in found] == [
            ("STSBenchmark", "validation", None, {"main_score": 0.7213, "cosine_spearman": 0.7213}),
            ("STSBenchmark (en)", "test", "en", {"main_score": 0.65, "cosine_spearman": 0.65}),
            ("STSBenchmark (de-en)", "test", "de-en", {"main_score": 0.5, "cosine_spearman": 0.5}),
        ]
        assert {(each.dataset, each.method, each.task_type) for each in found} == {
            ("MTEB STSBenchmark", "mteb 2.26.24", "sentence-similarity")
        }

    def test_they_stand_on_the_card_beside_evaluations_of_ours(self, tmp_path: Path) -> None:
        write_card(PLAIN, tmp_path / "model")
        (tmp_path / "mixed.json").write_text(json.dumps([PROBE, MTEB]))
        command.main([str(tmp_path / "model"), "--evaluation", str(tmp_path / "mixed.json")])
        command.main([str(tmp_path / "model"), "--evaluation", str(tmp_path / "mixed.json")])
        kept = read_record(tmp_path / "model").evaluations
        assert [each.task for each in kept] == [
            PROBE["task"],
            "STSBenchmark",
            "STSBenchmark (en)",
            "STSBenchmark (de-en)",
        ]
        card = ModelCard.load(tmp_path / "model" / "README.md")
        results = [result for result in card.data.eval_results or [] if result.dataset_name == "MTEB STSBenchmark"]
        assert {(result.metric_type, result.metric_value) for result in results} == {
            ("main_score", 0.7213),
            ("cosine_spearman", 0.7213),
        }
        assert results[0].task_type == "sentence-similarity" and results[0].dataset_split == "validation"
        assert "| STSBenchmark (de-en) |" in card.text and "mteb 2.26.24" in card.text

    @pytest.mark.parametrize(
        ("result", "kind", "metrics", "method"),
        [
            (
                _subset(main_score=0.9, accuracy=0.9, f1=0.88),
                "text-classification",
                {"main_score": 0.9, "accuracy": 0.9},
                "mteb 2.26.24",
            ),
            (
                _subset(main_score=0.3, ndcg_at_10=0.3, mteb_version="left out") | {"mteb_version": "1.34.0"},
                "text-retrieval",
                {"main_score": 0.3, "ndcg_at_10": 0.3},
                "mteb 1.34.0",
            ),
            (
                _subset(main_score=1, v_measure=0.4, is_public=True, mteb_version="left out") | {"mteb_version": None},
                "feature-extraction",
                {"main_score": 1.0},
                "mteb of an unknown version",
            ),
        ],
    )
    def test_kinds_of_tasks_and_versions(
        self, result: dict[str, Any], kind: str, metrics: dict[str, float], method: str, tmp_path: Path
    ) -> None:
        (tmp_path / "result.json").write_text(json.dumps(result))
        (found,) = command.read_evaluations(tmp_path / "result.json")
        assert (found.task_type, dict(found.metrics), found.method) == (kind, metrics, method)

    @pytest.mark.parametrize(
        ("result", "words"),
        [
            ({"mteb_dataset_name": "STS12", "mteb_version": "1.7", "test": {}}, "mteb 1.11 and later"),
            ({"task_name": "STS12"}, "'task_name' and 'scores'"),
            (MTEB | {"task_name": 7}, "'task_name' and 'scores'"),
            (MTEB | {"scores": {}}, "'task_name' and 'scores'"),
            (MTEB | {"scores": {"test": []}}, "scores of 'test' are no list of subsets"),
            (MTEB | {"scores": {"test": {"default": {"main_score": 0.1}}}}, "scores of 'test' are no list of subsets"),
            (MTEB | {"scores": {"test": [0.1]}}, "a subset in scores of 'test' has no 'hf_subset'"),
            (_subset(hf_subset="left out"), "no 'hf_subset' or no 'main_score'"),
            (_subset(main_score="left out"), "no 'hf_subset' or no 'main_score'"),
            (_subset(main_score=None), "main_score=None is no finite number"),
            (_subset(main_score=math.nan), "main_score=nan is no finite number"),
            (_subset(main_score="0.9"), "main_score='0.9' is no finite number"),
        ],
    )
    def test_other_files_are_refused_in_one_line(self, result: dict[str, Any], words: str, tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            command.read_evaluations(tmp_path / "result.json")
        assert str(caught.value).startswith(str(tmp_path / "result.json")) and "\n" not in str(caught.value)
