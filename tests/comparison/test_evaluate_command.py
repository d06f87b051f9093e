"""`hf-pretrain evaluate`: its numbers are those of the functions, and they go into the table, the file and the card."""

import json
import re
from functools import partial

import numpy as np
import pytest
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

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import WordVectors
from hf_pretrain.cli import main
from hf_pretrain.data import draws
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
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, read_record
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.tasks.spec import load_task
from hf_pretrain.transfer.comparison import tuned_scores

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}


def words(count, *, seed, length=4):
    keys = draws.row_keys(range(count), seed=seed, stream="evaluate command")
    return draws.integers(keys, length, high=50).tolist()


def sentence(row):
    return " ".join(f"w{number}" for number in row)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tasks in the forms that are found by name."""
    data = tmp_path_factory.mktemp("data")
    for name in ("SST-2", "stsb", "blimp", "wordsim", "topics"):
        (data / name).mkdir()
    for split, count, seed in (("train", 90, 0), ("dev", 60, 1)):
        rows = words(count, seed=seed)
        # No header; every third row of the development set is of class 1.
        (data / "SST-2" / f"{split}.tsv").write_text("".join(f"{sentence(r)}\t{int(r[0] < 20)}\n" for r in rows))
        scored = [(sentence(r), sentence(r[:2] + r[:1] * 2), r[3] / 10) for r in rows]
        (data / "stsb" / f"{split}.csv").write_text("".join(f"{a},{b},{score}\n" for a, b, score in scored))
        lines = [json.dumps({"text": sentence(r), "label": ("sun", "moon", "star")[r[0] % 3]}) for r in rows]
        (data / "topics" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    pairs = [
        {"sentence_good": sentence(r), "sentence_bad": sentence(r[::-1]), "UID": f"p{i % 3}", "field": f"f{i % 2}"}
        for i, r in enumerate(words(24, seed=2))
    ]
    (data / "blimp" / "all.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    lines = [f"w{a}\tw{b}\t{c / 5}" for a, b, c in words(40, seed=3, length=3) if a != b]
    (data / "wordsim" / "wordsim353.tsv").write_text("# words\n" + "\n".join(lines) + "\n")
    lines = [sentence(r) for r in words(30, seed=4) if len(set(r)) == 4]
    (data / "wordsim" / "questions-words.txt").write_text(": family\n" + "\n".join(lines) + "\n")
    (data / "tasks.yaml").write_text(
        "first: {type: choice, text: text, choices: [a, b], label: label, validation_file: choice.jsonl}\n"
        "tags: {type: tokens, text: words, label: tags, train_file: tags.jsonl}\n"
    )
    rows = [
        {"text": sentence(r[:2]), "a": sentence(r[2:]), "b": "w1 w2 w3", "label": i % 2}
        for i, r in enumerate(words(20, seed=5))
    ]
    (data / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rows = [{"words": ["w1", f"w{r[0]}"], "tags": ["O", "B-X"]} for r in words(20, seed=6)]
    (data / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return data


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


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
