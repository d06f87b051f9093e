"""`hf-pretrain evaluate`: its numbers are those of the functions, and they go into the table, the file and the card."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    set_seed,
)

from helpers.evaluated_models import SIZES, saved, write_tasks
from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import WordVectors
from hf_pretrain.cli import main
from hf_pretrain.commands.evaluate import print_evaluations
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import (
    causal_log_likelihoods,
    originality_scores,
    pair_accuracy,
    pseudo_log_likelihoods,
    read_minimal_pairs,
)
from hf_pretrain.evaluation.probes import encode, probe_accuracy
from hf_pretrain.evaluation.similarity import similarity_correlation, text_vectors
from hf_pretrain.evaluation.suite import find_tasks
from hf_pretrain.evaluation.words import analogy_accuracy, word_similarity
from hf_pretrain.files import weights_digest
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, read_record
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.tasks.spec import load_task
from hf_pretrain.transfer.comparison import tuned_scores


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A masked language model with the record of a run."""
    folder = tmp_path_factory.mktemp("model") / "encoder"
    set_seed(0)
    saved(BertForMaskedLM(BertConfig(**SIZES)), folder)
    objective = ObjectiveDescription(name="mlm", title="Masked language modelling", description="Masks.")
    write_card(PretrainingCard(model_name="encoder", model_class="BertForMaskedLM", objective=objective), folder)
    return folder


def run(*argv):
    return main(["evaluate", *map(str, argv)])


def results(tmp_path, model):
    content = json.loads((tmp_path / "out.json").read_text())
    return {entry["task"]: entry for entry in content["models"][str(model)]}


def by_hand(folder, data):
    """Return the numbers of the functions themselves."""
    model, tokenizer = AutoModel.from_pretrained(folder), tiny_tokenizer()
    found = {}
    for task, read in {
        "SST-2": lambda line: line.split("\t"),
        "topics": lambda line: list(json.loads(line).values()),
    }.items():
        rows = {
            split: [read(line) for line in next((data / task).glob(f"{split}.*")).read_text().splitlines()]
            for split in ("train", "dev")
        }
        features = {split: encode(model, tokenizer, [row[0] for row in rows[split]]) for split in rows}
        labels = {split: np.array([row[1] for row in rows[split]]) for split in rows}
        score = probe_accuracy(features["train"], labels["train"], features["dev"], labels["dev"])
        found[task] = score.accuracy
    rows = [line.split(",") for line in (data / "stsb" / "dev.csv").read_text().splitlines()]
    first, second = (
        text_vectors(model, tokenizer, [row[side] for row in rows], modules=SentenceModules()) for side in (0, 1)
    )
    found["stsb"] = similarity_correlation(first, second, [float(row[2]) for row in rows])
    score = partial(pseudo_log_likelihoods, AutoModelForMaskedLM.from_pretrained(folder), tokenizer, within_word="l2r")
    found["blimp"] = pair_accuracy(score, read_minimal_pairs(data / "blimp")).mean
    rows = [line.split("\t") for line in (data / "wordsim" / "wordsim353.tsv").read_text().splitlines()[1:]]
    alone = sorted({word for row in rows for word in row[:2]})
    vectors = WordVectors(tuple(alone), encode(model, tokenizer, alone))
    found["wordsim"] = word_similarity(vectors, [(a, b, float(c)) for a, b, c in rows]).correlation
    return found


TASKS = ("SST-2", "topics", "stsb", "blimp", "wordsim", "analogies")


def test_numbers_are_those_of_the_functions_and_the_card_has_them(encoder, data, tmp_path, capsys):
    assert run(encoder, "--tasks", *TASKS, "--data_dir", data, "--output_file", tmp_path / "out.json") == 0
    shown, found = capsys.readouterr().out, results(tmp_path, encoder)
    assert list(found) == list(TASKS)
    for task, value in by_hand(encoder, data).items():
        assert next(iter(found[task]["metrics"].values())) == pytest.approx(value, abs=1e-6), task
    # The card has exactly the numbers of the table and of the file.
    record = {evaluation.task: evaluation for evaluation in read_record(encoder).evaluations}
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if line.startswith("  ")]
    table = {line[0]: line for line in lines}
    for task, entry in found.items():
        assert dict(record[task].metrics) == entry["metrics"] and record[task].method == entry["method"]
        name, value = next(iter(entry["metrics"].items()))
        assert table[task][1:4] == [name, str(entry["num_examples"]), f"{value:.3f}"]
    assert found["SST-2"]["num_examples"] == 60 and found["blimp"]["num_examples"] == 24
    rows = [int(line.split("\t")[1]) for line in (data / "SST-2" / "dev.tsv").read_text().splitlines()]
    assert found["SST-2"]["baseline"]["accuracy"] == pytest.approx(rows.count(0) / 60)
    assert found["blimp"]["baseline"]["accuracy"] == 0.5 and found["blimp"]["baseline_name"] == "chance"
    assert "frozen" in found["SST-2"]["method"] and "l2r" not in found["blimp"]["method"]


def test_a_second_run_replaces_and_other_tasks_stay(encoder, data, tmp_path):
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json"]
    assert run(encoder, "--tasks", "SST-2", "blimp", *out) == 0
    before = results(tmp_path, encoder)
    assert run(encoder, "--tasks", "blimp", *out, "--max_examples", "2") == 0
    after = results(tmp_path, encoder)
    assert after["SST-2"] == before["SST-2"] and list(after) == ["SST-2", "blimp"]
    assert after["blimp"]["num_examples"] == 6
    record = [evaluation for evaluation in read_record(encoder).evaluations if evaluation.task == "blimp"]
    assert len(record) == 1 and record[0].num_examples == 6
    # The same command gives the same numbers.
    assert run(encoder, "--tasks", "SST-2", *out) == 0 and results(tmp_path, encoder)["SST-2"] == before["SST-2"]


def test_models_side_by_side_and_another_how(encoder, data, tmp_path, capsys):
    set_seed(1)
    other = saved(BertModel(BertConfig(**SIZES)), tmp_path / "other")
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
    text = (encoder / "README.md").read_text()
    assert run(encoder, other, "--tasks", "stsb", "topics", "--how", "probe", "similarity", *out) == 0
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if line.startswith("  task"))
    assert header.split() == ["task", "metric", "examples", "encoder", "other", "baseline"]
    assert (encoder / "README.md").read_text() == text
    first, second = results(tmp_path, encoder), results(tmp_path, other)
    assert list(first) == list(second) == ["stsb", "stsb, probe", "topics"]
    assert first["stsb"]["metrics"] != second["stsb"]["metrics"] and "ridge" in first["stsb, probe"]["method"]
    assert set(first["stsb, probe"]["metrics"]) == {"spearmanr", "pearsonr", "mean_squared_error"}


def test_the_score_of_minimal_pairs_fits_the_model(data, tmp_path):
    set_seed(2)
    common = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    models = {
        "causal": GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, n_positions=40, **common)),
        "detector": ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=24)),
    }
    scores = {"causal": causal_log_likelihoods, "detector": originality_scores}
    for name, model in models.items():
        folder = saved(model.eval(), tmp_path / name)
        assert run(folder, "--tasks", "blimp", "--data_dir", data, "--output_file", tmp_path / "out.json") == 0
        expected = pair_accuracy(partial(scores[name], model, tiny_tokenizer()), read_minimal_pairs(data / "blimp"))
        entry = results(tmp_path, folder)["blimp"]
        assert entry["metrics"]["accuracy"] == pytest.approx(expected.mean), name
        assert {"causal": "log-likelihood;", "detector": "original"}[name] in entry["method"]


def test_static_vectors_and_choices(encoder, data, tmp_path):
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    vectors = WordVectors(tuple(f"w{row}" for row in range(50)), table)
    vectors.save(tmp_path / "static", method="test", training={}, lowercase=True)
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json"]
    assert run(tmp_path / "static", "--tasks", "wordsim", "analogies", "stsb", *out) == 0
    found = results(tmp_path, tmp_path / "static")
    expected = word_similarity(vectors, data / "wordsim" / "wordsim353.tsv")
    assert found["wordsim"]["metrics"]["spearmanr"] == pytest.approx(expected.correlation, abs=1e-6)
    answers = analogy_accuracy(vectors, data / "wordsim" / "questions-words.txt")
    assert found["analogies"]["metrics"]["accuracy"] == pytest.approx(answers.total.accuracy)
    assert run(encoder, "--tasks", f"{data / 'tasks.yaml'}:first", *out) == 0
    assert "by token" in results(tmp_path, encoder)["first"]["method"]


def test_fine_tuned_scores_are_those_of_fine_tuning(encoder, data, tmp_path):
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
    tags = f"{data / 'tasks.yaml'}:tags"
    options = ["--how", "finetune", "--num_train_epochs", "2", "--strategy", "full", "--learning_rate", "0.003"]
    assert run(encoder, "--tasks", "SST-2", tags, *options, *out) == 0
    found = results(tmp_path, encoder)
    tuning = {"strategy": "full", "num_train_epochs": 2.0, "learning_rate": 0.003, "seed": 0}
    specs = [task.spec for task in find_tasks(["SST-2", tags], data_dir=data)]
    for name, spec in zip(("SST-2, finetune", "tags"), specs, strict=True):
        task = load_task(spec, seed=0)
        expected = tuned_scores(str(encoder), task, **tuning).scores[task.main_metric]
        assert next(iter(found[name]["metrics"].values())) == pytest.approx(expected), name
        assert found[name]["method"].startswith("fine-tuned (full) for 2 epochs")
    assert found["tags"]["split"] == "held-out rows" and found["tags"]["num_examples"] == 2
    # What is fine-tuned by default needs no --how.
    assert run(encoder, "--tasks", tags, *out) == 0
    assert "layerwise_decay" in results(tmp_path, encoder)["tags"]["method"]


def test_an_untrained_model_is_the_baseline(encoder, data, tmp_path):
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
    found = []
    for seed in (0, 0, 1):
        assert run(encoder, "--tasks", "SST-2", "stsb", "blimp", "--untrained", "true", "--seed", seed, *out) == 0
        found.append(results(tmp_path, encoder))
    assert found[0] == found[1] and found[0]["stsb"]["metrics"] == found[2]["stsb"]["metrics"]
    assert found[0]["stsb"]["baseline"] != found[2]["stsb"]["baseline"]
    for entry in found[0].values():
        assert entry["baseline_name"] == "the same architecture, untrained"
        assert entry["baseline"] != entry["metrics"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{bare}", "--tasks", "blimp"], "BertModel.*language-modelling head"),
        (["{static}", "--tasks", "blimp"], "how='pairs'.*does not score text"),
        (["{encoder}", "--tasks", "nothing"], "tasks='nothing' is no folder or file"),
        (["{encoder}", "--tasks", "SST-2", "--how", "pairs"], "does not measure the task 'SST-2'.*probe or finetune"),
        (["{encoder}", "--tasks", "SST-2", "--how", "prob"], "how='prob'"),
        (["{encoder}", "--tasks", "SST-2", "SST-2"], "twice"),
        (["{bare}", "--tasks", "SST-2", "--card", "true"], "record of a run"),
        (["{encoder}", "--tasks", "SST-2", "--learning_rate", "1"], "learning_rate=1.0 .*how"),
        (["{encoder}", "--tasks", "wordsim", "--output_file", "{data}/tags.jsonl"], "tags.jsonl"),
        (["{encoder}", "--tasks", "{data}/tasks.yaml:other"], "other"),
        (["{static}", "--tasks", "SST-2", "--untrained", "true"], "leave untrained out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(argv, message, encoder, data, tmp_path, capsys):
    set_seed(0)
    saved(BertModel(BertConfig(**SIZES)), tmp_path / "bare")
    vectors = WordVectors(("w1", "w2"), np.eye(2, dtype=np.float32))
    vectors.save(tmp_path / "static", method="test", training={}, lowercase=True)
    places = {"bare": tmp_path / "bare", "static": tmp_path / "static", "encoder": encoder, "data": data}
    options = [part.format(**places) for part in argv]
    options += [] if "--output_file" in options else ["--output_file", str(tmp_path / "out.json")]
    assert run(*options, "--data_dir", data) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err), shown.err
    assert " by " not in shown.out and not (tmp_path / "out.json").exists()


def test_tasks_are_found_by_name_and_form(data, tmp_path):
    tasks = find_tasks(["sst_2", "STSB", "blimp", "wordsim353", str(data / "tasks.yaml")], data_dir=data)
    assert [task.material for task in tasks] == [
        "examples",
        "examples",
        "minimal pairs",
        "scored words",
        *["examples"] * 2,
    ]
    assert tasks[0].spec.text == ("sentence",) and tasks[0].spec.label == "label"
    assert tasks[1].spec.text == ("sentence1", "sentence2") and tasks[1].spec.type == "regression"
    assert [task.hows[0] for task in tasks] == ["probe", "similarity", "pairs", "words", "likelihood", "finetune"]
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.tsv").write_text("gj04\t1\t\tIt rains.\n")
    assert find_tasks(["cola"], data_dir=tmp_path)[0].spec.text == ("sentence",)
    # Where the first row does not show what its columns are, the name of the task does.
    (tmp_path / "cola" / "train.tsv").write_text("gj04\t1\t?\tIt rains.\n")
    assert find_tasks(["cola"], data_dir=tmp_path)[0].spec.columns == ("source", "label", "star", "sentence")
    # A header says more than the name.
    (tmp_path / "cola" / "train.tsv").write_text("sentence\tlabel\nIt rains.\t1\n")
    assert find_tasks(["cola"], data_dir=tmp_path)[0].spec.columns is None


def changed(folder):
    """Change one weight of a folder, as further training does."""
    model = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7] += 1.0
    model.save_pretrained(folder)


class TestWeights:
    """A number stands beside the weights that it was measured on."""

    @pytest.fixture
    def model(self, encoder, tmp_path):
        copy = shutil.copytree(encoder, tmp_path / "model")
        write_card(replace(read_record(copy), evaluations=()), copy)
        return copy

    def test_numbers_of_earlier_weights_do_not_stay(self, model, data, tmp_path, capsys):
        out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
        assert run(model, "--tasks", "SST-2", "wordsim", *out) == 0
        content = json.loads((tmp_path / "out.json").read_text())
        assert content["weights"] == {str(model): weights_digest(model)}
        assert run(model, "--tasks", "blimp", *out) == 0
        assert list(results(tmp_path, model)) == ["SST-2", "wordsim", "blimp"]
        changed(model)
        capsys.readouterr()
        assert run(model, "--tasks", "blimp", *out) == 0
        assert list(results(tmp_path, model)) == ["blimp"]
        assert "3 earlier results of" in capsys.readouterr().out
        assert json.loads((tmp_path / "out.json").read_text())["weights"] == {str(model): weights_digest(model)}

    def test_a_card_takes_the_numbers_of_its_own_weights_alone(self, model, encoder, data, tmp_path, capsys):
        other = saved(BertForMaskedLM(BertConfig(**SIZES)), tmp_path / "other")
        out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
        assert run(model, other, "--tasks", "SST-2", "blimp", *out) == 0
        # The file names the model by another folder than the copy that gets the card.
        copy = shutil.copytree(model, tmp_path / "copy")
        assert main(["card", str(copy), "--evaluation", str(tmp_path / "out.json")]) == 0
        record = {evaluation.task: evaluation for evaluation in read_record(copy).evaluations}
        expected = results(tmp_path, model)
        assert {name: dict(record[name].metrics) for name in expected} == {
            name: entry["metrics"] for name, entry in expected.items()
        }
        assert list(record) == list(expected)
        assert dict(record["SST-2"].metrics) != results(tmp_path, other)["SST-2"]["metrics"]
        index = ModelCard.load(copy / "README.md").data.to_dict()["model-index"]
        rows = [(row["task"], row["dataset"], metric) for row in index[0]["results"] for metric in row["metrics"]]
        of_sst2 = [metric for task, dataset, metric in rows if dataset["split"] == "validation"]
        assert {metric["type"]: metric["value"] for metric in of_sst2}["accuracy"] == pytest.approx(
            expected["SST-2"]["metrics"]["accuracy"], abs=1e-3
        )
        for task, dataset, metric in rows:
            assert re.fullmatch("[a-z-]+", task["type"]) and re.fullmatch("[a-z0-9-]+", dataset["type"])
            assert dataset["name"] and isinstance(metric["value"], float)
        # Weights that were never measured take nothing, and the card stays as it was.
        text = (copy / "README.md").read_text()
        changed(copy)
        capsys.readouterr()
        assert main(["card", str(copy), "--evaluation", str(tmp_path / "out.json")]) == 2
        assert "has no numbers of the weights in" in capsys.readouterr().err
        assert (copy / "README.md").read_text() == text

    def test_results_that_name_no_weights_are_refused(self, model, data, tmp_path, capsys):
        out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
        assert run(model, "--tasks", "blimp", *out) == 0
        content = json.loads((tmp_path / "out.json").read_text())
        del content["weights"]
        (tmp_path / "out.json").write_text(json.dumps(content))
        assert main(["card", str(model), "--evaluation", str(tmp_path / "out.json")]) == 2
        assert "does not say which weights" in capsys.readouterr().err

    def test_a_card_of_other_weights_is_refused_before_anything_is_computed(self, model, data, tmp_path, capsys):
        changed(model)
        assert run(model, "--tasks", "blimp", "--data_dir", data, "--output_file", tmp_path / "out.json") == 2
        shown = capsys.readouterr()
        assert "are not those that" in shown.err and " by " not in shown.out
        out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false"]
        assert run(model, "--tasks", "blimp", *out) == 0


def test_seeds_give_mean_and_deviation(encoder, data, tmp_path, capsys):
    out = ["--data_dir", data, "--output_file", tmp_path / "out.json", "--card", "false", "--max_train_examples", "30"]
    single = []
    for seed in (0, 3, 4):
        assert run(encoder, "--tasks", "SST-2", "--seed", seed, *out) == 0
        single.append(results(tmp_path, encoder)["SST-2"]["metrics"]["accuracy"])
    assert len(set(single)) > 1
    capsys.readouterr()
    assert run(encoder, "--tasks", "SST-2", "blimp", "--seeds", "0", "3", "4", *out) == 0
    shown, found = capsys.readouterr().out, results(tmp_path, encoder)
    entry = found["SST-2"]
    assert entry["metrics"]["accuracy"] == pytest.approx(np.mean(single), abs=1e-6)
    assert entry["deviation"]["accuracy"] == pytest.approx(np.std(single, ddof=1), abs=1e-6)
    assert f"{np.mean(single):.3f} ± {np.std(single, ddof=1):.3f}" in shown
    assert "mean and deviation of 3 seeds" in entry["method"]
    # What draws nothing is measured once.
    assert found["blimp"]["deviation"] == {} and "seeds" not in found["blimp"]["method"]
    for argv, why in (
        (["blimp", "--seeds", "0", "1"], "none is a probe or fine-tuning"),
        (["SST-2", "--seeds", "1"], "give two or more"),
        (["SST-2", "--seeds", "0", "1", "--seed", "2"], "seed=2 has no effect beside seeds"),
    ):
        assert run(encoder, "--tasks", *argv, *out) == 2
        assert why in capsys.readouterr().err


def test_a_table_fits_the_terminal(capsys):
    header = ["task", "metric", "examples", *(f"a-model-with-a-very-long-name-{i}" for i in range(6)), "baseline"]
    rows = [["SST-2", "matthews_correlation", "872", *(f"0.{i}00 ± 0.010" for i in range(6)), "0.500"]]
    print_evaluations(rows, header, width=80)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 2
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    for title, numbers in zip(cells[::2], cells[1::2], strict=True):
        assert title[:3] == header[:3] and numbers[:3] == rows[0][:3]
    assert [cell for line in cells[1::2] for cell in line[3:]] == rows[0][3:]
    names = [cell for line in cells[::2] for cell in line[3:]]
    assert len(set(names)) == 7 and names[0].endswith("name-0")


def test_tasks_are_found_by_their_paths(data, tmp_path):
    found = find_tasks([f"{data}/SST-2", f"{data}/wordsim/wordsim353.tsv", f"{data}/blimp/all.jsonl"], data_dir="none")
    assert [task.name for task in found] == ["SST-2", "wordsim353", "all"]
    assert [task.hows[0] for task in found] == ["probe", "words", "pairs"]
    assert found[0].spec.validation_file == (f"{data}/SST-2/dev.tsv",)
    (tmp_path / "reviews.csv").write_text("sentence,label\nfine,1\npoor,0\n")
    (tmp_path / "alike.csv").write_text("sentence1,sentence2,score\na,b,0.5\nc,d,1.5\n")
    tables = find_tasks([str(tmp_path / "reviews.csv"), str(tmp_path / "alike.csv")])
    assert [task.spec.type for task in tables] == ["classification", "regression"]
    assert tables[0].spec.train_file == (str(tmp_path / "reviews.csv"),) and tables[0].name == "reviews"
    assert tables[1].hows[0] == "similarity"
    # Of a split, the task has the name of the folder, and its columns.
    (task,) = find_tasks([f"{data}/SST-2/train.tsv"])
    assert task.name == "SST-2" and task.spec.text == ("sentence",) and not task.spec.validation_file
    with pytest.raises(InputError, match="absent.csv' is no file or folder"):
        find_tasks(["absent.csv"], data_dir=data)
    # A table without usual names is refused with those that it has, and other files with all that they could be.
    (tmp_path / "odd.csv").write_text("review,stars\nfine,1\npoor,0\n")
    with pytest.raises(InputError, match="the columns of '.*odd.csv' are review, stars, without usual names"):
        find_tasks([str(tmp_path / "odd.csv")])
    (tmp_path / "notes.txt").write_text("some text\n")
    with pytest.raises(InputError, match="notes.txt' holds neither minimal pairs"):
        find_tasks([str(tmp_path / "notes.txt")])
    # An unknown name is told what there is.
    with pytest.raises(InputError, match="there are SST-2, blimp, questions-words, stsb, topics, wordsim353"):
        find_tasks(["nothing"], data_dir=data)
