"""`hf-pretrain compare`: the budget holds, a stopped comparison goes on to the same table, and numbers are those of the parts."""

import json
import math
import re
import warnings

import datasets
import numpy as np
import pytest
from transformers import BertConfig, BertModel, set_seed
from transformers.utils import logging as transformers_logging

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.cli import main
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.suite import find_tasks
from hf_pretrain.tasks.spec import load_task
from hf_pretrain.transfer.classic_heads import fit_head, fit_tfidf
from hf_pretrain.transfer.comparison import ComparisonArm, ComparisonSettings, StrategyComparison, grid
from hf_pretrain.transfer.comparison.arms import Outcome, count_cost
from hf_pretrain.transfer.features import PretrainedFeatures
from hf_pretrain.transfer.tuning.fine_tune import task_trainer

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    set_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(place / "encoder")
    tiny_tokenizer().save_pretrained(place / "encoder")
    (place / "sides").mkdir()
    for split, count, seed in (("train", 96, 0), ("dev", 60, 1)):
        keys = draws.row_keys(range(count), seed=seed, stream="compare command")
        rows = draws.integers(keys, 6, high=50).tolist()
        lines = ["sentence\tlabel"]
        lines += [" ".join(f"w{n}" for n in row) + f"\t{('left', 'right')[row[0] % 2]}" for row in rows]
        (place / "sides" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    tags = [{"words": ["w1", f"w{i}"], "tags": ["O", "B-X"]} for i in range(20)]
    (place / "tags.jsonl").write_text("\n".join(map(json.dumps, tags)) + "\n")
    (place / "tags.yaml").write_text("tags: {type: tokens, text: words, label: tags, train_file: tags.jsonl}\n")
    (place / "pairs").mkdir()
    pair = {"sentence_good": "w1 w2", "sentence_bad": "w2 w1", "UID": "a", "field": "b"}
    (place / "pairs" / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return place


def spec_of(place):
    return find_tasks(["sides"], data_dir=place)[0].spec


def run(place, folder, *options):
    usual = ["--tasks", "sides", "--data_dir", place, "--batch_size", 16, "--least_steps", 6, "--num_train_epochs", 1]
    names = {str(option) for option in options}
    usual = [
        part
        for name, value in zip(usual[::2], usual[1::2], strict=True)
        if name not in names
        for part in (name, value)
    ]
    return main(["compare", *map(str, [place / "encoder", *usual, "--results", folder / "runs.json", *options])])


def table(text):
    lines = text[text.index("  task ") :].splitlines()[1:]
    return [line for line in lines if line.startswith("  ") and not line.startswith("       ")]


def test_the_numbers_are_those_of_the_parts_and_the_same_each_time(place, tmp_path, capsys):
    tables = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        # A second run finds the same; one size says so.
        sizes = ["40", "all"] if not number else ["40"]
        options = ["--strategies", "full", "features", "--seeds", "0", "1", "--train_sizes", *sizes]
        assert run(place, tmp_path / str(number), *options) == 0
        shown = capsys.readouterr().out
        assert shown.index("TF-IDF + linear_svc:") < re.search(r"encoder full, \d", shown).start()
        seconds = re.compile(r" +\d+\.\d(?=  +\d+  +1 of 1| *$)")
        tables.append([seconds.sub("", line) for line in table(shown)])
        assert (tmp_path / str(number) / "runs.png").stat().st_size > 1000
    assert (
        len(tables[0]) == 8 and tables[1] == [line for line in tables[0] if "  40  " in line] and len(tables[1]) == 4
    )
    # By hand: the rows of a seed, TF-IDF and features of them.
    scores = {"TF-IDF + linear": [], "features": []}
    for seed in (0, 1):
        data = load_task(spec_of(place), seed=seed, max_examples=40)
        targets, texts = data.targets("train"), data.texts("train")
        features = PretrainedFeatures(str(place / "encoder")).fit()
        heads = {
            "TF-IDF + linear": (fit_tfidf(texts, targets, kind="classification", seed=seed), data.texts("validation")),
            "features": (
                fit_head("logistic", features.transform(texts), targets, kind="classification", seed=seed),
                features.transform(data.texts("validation")).astype(np.float64),
            ),
        }
        for name, (head, inputs) in heads.items():
            scores[name].append(np.mean(head.pipeline.predict(inputs) == data.targets("validation")))
    for name, values in scores.items():
        (line,) = (line for line in tables[0] if f"  {name}  " in line and "  40  " in line)
        assert f"{np.mean(values):.3f}" in line and f"{np.std(values, ddof=1):.3f}" in line, (line, values)


def test_a_line_a_cell_with_its_time_and_nothing_else(place, tmp_path, capfd):
    """No bars and no warnings between the lines; what an earlier run has found is said to be from it."""
    transformers_logging.enable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for seeds in (["0"], ["0"], ["0", "1"]):
                assert run(place, tmp_path, "--strategies", "full", "features", "--seeds", *seeds) == 0
        assert not datasets.are_progress_bars_disabled()
    finally:
        transformers_logging.disable_progress_bar()
    assert not [str(each.message) for each in found]
    shown = capfd.readouterr()
    assert not shown.err and "\r" not in shown.out
    cells = re.findall(
        r"^       encoder (full|features), \d+ examples: \d\.\d{3}, (.*)$", shown.out, flags=re.MULTILINE
    )
    assert [name for name, _ in cells] == ["full", "features"] * 3
    assert [bool(re.fullmatch(r"\d+\.\d s", took)) for _, took in cells] == [True, True, False, False, True, True]
    assert {took for _, took in cells[2:4]} == {"from an earlier run"}
    kinds = ("arms   ", "       ", "  ", "results  ", "plot     ")
    assert all(line.startswith(kinds) for line in filter(None, shown.out.splitlines()))


def made_up(scores, calls):
    """A scorer: the score of an arm by its strategy, with more for each example."""

    def run_arm(cost, data, *, examples, seed, max_length=None):
        calls.append((cost.arm.name, examples, seed))
        found = scores[cost.arm.strategy] + examples * 1e-9
        return Outcome({data.main_metric: found}, cost(examples), 1.0)

    return run_arm


ARMS = ("full", "frozen", "bitfit", "lora", "features")
SCORES = {"full": 0.5, "frozen": 0.9, "bitfit": 0.2, "lora": 0.7, "features": 0.8}
SETTINGS = ComparisonSettings(batch_size=8, num_train_epochs=10, least_steps=1)


def comparison(place, folder, *, budget, **options):
    arms = [ComparisonArm.parse(str(place / "encoder"), text) for text in ARMS]
    return StrategyComparison(
        arms, [spec_of(place)], settings=SETTINGS, results=folder / "runs.json", budget=budget, **options
    )


def cache_by_arm(count):
    """Count what an arm costs once; the tests of the counts are others."""
    known = {}

    def counted(arm, data, **options):
        key = (arm, data.spec.name, len(data.rows("train")), *options.items())
        if key not in known:
            known[key] = count(arm, data, **options)
        return known[key]

    return counted


def test_the_better_half_goes_on_and_the_budget_is_never_exceeded(place, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(grid, "count_cost", cache_by_arm(grid.count_cost))
    monkeypatch.setattr(grid, "run_arm", made_up(SCORES, calls))
    whole = comparison(place, tmp_path, budget=None)
    full = sum(whole._costs["sides", arm](960) for arm in whole.arms)
    for share, number_of_seeds in ((0.9, 1), (0.4, 2), (0.17, 1)):
        folder = tmp_path / str(share)
        folder.mkdir()
        calls.clear()
        budget = share * full * number_of_seeds
        tried = comparison(place, folder, budget=budget, seeds=range(number_of_seeds), sizes=(50, None))
        groups = tried.run()
        assert [group.rows for group in groups] == [50, 96]
        spent = math.fsum(group.flops for group in groups)
        assert spent <= budget
        for group in groups:
            names = [[arm.strategy for arm in rung] for rung in group.rungs]
            assert names in (
                [list(ARMS), ["frozen", "lora", "features"], ["frozen", "features"], ["frozen"]],
                [list(ARMS), ["frozen", "lora", "features"], ["frozen", "features"]],
                [list(ARMS), ["frozen", "lora", "features"]],
                [list(ARMS)],
            )
            assert len(group.rungs) > 1 or share == 0.9
            # Arms of a rung get as much as each other, features at most each row once, and each seed is run.
            for rung in group.rungs:
                of_steps = {entry.examples for arm, entry in rung.items() if arm.strategy != "features"}
                of_features = {entry.examples for arm, entry in rung.items() if arm.strategy == "features"}
                assert len(of_steps) == 1 and of_features <= {min(group.rows, *of_steps)}
                assert all(len(entry.outcomes) == number_of_seeds for entry in rung.values())
        # A first rung with one more step would not have been paid for, or runs could not be longer.
        first = groups[0].rungs[0][tried.arms[0]].examples
        assert first >= 8
    with pytest.raises(InputError, match="'sides' with 96 rows.*does not pay"):
        comparison(place, tmp_path, budget=full / 1e6).run()
    assert comparison(place, tmp_path, budget=None).run()[0].rungs[0].keys() == set(whole.arms)


def test_the_most_costly_arms_going_on_everywhere_stay_within_the_budget(place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        grid, "run_arm", lambda cost, data, *, examples, **rest: Outcome({"accuracy": cost.flops}, cost(examples), 1.0)
    )
    whole = comparison(place, tmp_path, budget=None)
    budget = 0.6 * sum(whole._costs["sides", arm](960) for arm in whole.arms)
    whole.budget, whole.sizes = budget, [50, None]
    spent = math.fsum(group.flops for group in whole.run())
    assert 0.6 * budget < spent <= budget


def test_a_stopped_comparison_goes_on_to_the_same_table(place, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(grid, "run_arm", made_up(SCORES, calls))
    monkeypatch.setattr(grid, "count_cost", cache_by_arm(grid.count_cost))
    options = ["--strategies", *ARMS, "--seeds", "0", "1", "--budget", "1e9", "--least_steps", "40"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert run(place, tmp_path / "whole", *options) == 0
    expected, number = table(capsys.readouterr().out), len(calls)
    assert number > 10 and len(expected) == 7
    finished = grid.run_arm

    def stops(*args, **kwargs):
        if len(calls) == number + 7:
            raise KeyboardInterrupt
        return finished(*args, **kwargs)

    monkeypatch.setattr(grid, "run_arm", stops)
    assert run(place, tmp_path / "parts", *options) == 130
    monkeypatch.setattr(grid, "run_arm", finished)
    capsys.readouterr()
    assert run(place, tmp_path / "parts", *options) == 0
    # What was run before is not run again.
    strip = lambda lines: [line for line in lines if "TF-IDF" not in line]  # noqa: E731 (its seconds are measured)
    assert strip(table(capsys.readouterr().out)) == strip(expected) and len(calls) == 2 * number
    assert calls[:number] == calls[number:]
    assert run(place, tmp_path / "parts", *options) == 0 and len(calls) == 2 * number
    # Other rows under the same name are other runs.
    text = (place / "sides" / "dev.tsv").read_text()
    try:
        (place / "sides" / "dev.tsv").write_text("\n".join(text.splitlines()[:-1]) + "\n")
        assert run(place, tmp_path / "parts", *options) == 0 and len(calls) == 3 * number
    finally:
        (place / "sides" / "dev.tsv").write_text(text)


def test_what_is_frozen_costs_less(place):
    data = load_task(spec_of(place))
    names = ("full", "bitfit", "lora:lora_rank=1", "frozen", "features")
    costs = {
        name: count_cost(ComparisonArm.parse(str(place / "encoder"), name), data, batch_size=16) for name in names
    }
    assert costs["full"].flops > costs["lora:lora_rank=1"].flops > costs["frozen"].flops > 0
    assert costs["full"].flops > costs["bitfit"].flops
    # Backward is twice forward; the head and the attention's own products are the rest.
    assert costs["full"].flops / 16 == pytest.approx(3 * costs["features"].flops, rel=0.2)
    assert costs["full"](160) == 10 * costs["full"].flops == 10 * costs["full"](16)
    assert costs["features"](160) == costs["features"](96) == 96 * costs["features"].flops


def test_an_architecture_is_an_option_of_an_arm_and_costs_its_products(place, tmp_path):
    """Of an LSTM too, whose fused kernel no counter knows: its forward products are the least that a wider one costs more."""
    data, model = load_task(spec_of(place)), str(place / "encoder")
    names = ("full", "full:architecture=bilstm,lstm_size=8", "full:architecture=bilstm,lstm_size=72")
    stock, small, large = (count_cost(ComparisonArm.parse(model, name), data, batch_size=16).flops for name in names)
    arm = ComparisonArm.parse(model, "lora:lora_rank=2,architecture=bilstm,lstm_size=8,mix_layers=true")
    assert arm.head == {"architecture": "bilstm", "mix_layers": True, "architecture_options": {"lstm_size": 8}}
    options = arm.training(str(tmp_path), seed=0, steps=1, batch_size=4)
    assert options.lora_rank == 2
    trainer, _, _ = task_trainer(model, data, options, **arm.head)
    assert trainer.plan.inner.config.mix_layers and trainer.plan.inner.config.architecture_options == {"lstm_size": 8}
    width = trainer.plan.inner.config.hidden_size
    tokens = 16 * min(len(ids) for ids in trainer.train_dataset["input_ids"])
    products = [2 * tokens * 2 * 4 * size * (width + size) for size in (8, 72)]
    assert large - small > products[1] - products[0] and small > stock - products[0]
    for text, message in (
        ("full:architecture=bilstm,num_filters=8", "is no option=value of it"),
        ("full:lstm_size=8", "is no option=value of it"),
        ("features:architecture=bilstm", "is no option=value of it"),
    ):
        with pytest.raises(InputError, match=message):
            ComparisonArm.parse(model, text)
    with pytest.raises(InputError, match="mix_layers=True has no effect without architecture"):
        count_cost(ComparisonArm.parse(model, "full:mix_layers=true"), data, batch_size=16)


def test_a_real_halving_runs_from_the_start_again(place, tmp_path, capsys):
    options = ["--strategies", "full", "full:learning_rate=0.003", "features", "--seeds", "3", "--budget", "5e8"]
    assert run(place, tmp_path, *options, "--least_steps", "40") == 0
    shown = capsys.readouterr().out
    spent, budget = (float(value) for value in re.search(r"(\S+) of (\S+) FLOPs", shown).groups())
    assert budget == 5e8 and 0.1 * budget < spent <= budget
    runs = [entry for entry in json.loads((tmp_path / "runs.json").read_text())["runs"] if "examples" in entry["run"]]
    examples = sorted({entry["run"]["examples"] for entry in runs})
    assert len(examples) > 1 and all(b in (2 * a, 640) for a, b in zip(examples, examples[1:], strict=False))
    assert sum(entry["flops"] for entry in runs) == pytest.approx(spent, rel=1e-2)
    assert {entry["run"]["strategy"] for entry in runs if entry["run"]["examples"] == examples[0]} == {
        "full",
        "full:learning_rate=0.003",
        "features",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "ful"], "strategies='ful'.*full"),
        (["--strategies", "lora:rank=2"], "'rank=2' is no option=value.*lora_rank"),
        (["--strategies", "full:seed=2"], "'seed=2' is no option=value"),
        (["--strategies", "full:lora_rank=2"], "lora_rank=2 has no effect with strategy='full'"),
        (["--strategies", "full", "full"], "one twice"),
        (["--tasks", "{place}/tags.yaml", "--strategies", "features"], "features does not go with the task 'tags'"),
        (["--tasks", "pairs"], "minimal pairs, on which nothing is trained"),
        (["--train_sizes", "many"], "train_sizes='many'"),
        (["--budget", "1"], "'sides' with 96 rows: budget=1 does not pay"),
        (["--budget", "1e12", "--rate_factors", "0.3", "1"], "rate_factors=.0.3, 1.0. does not go with a budget"),
        (["--rate_factors", "0"], "rate_factors"),
        (["--strategies", "features:head=ridge"], "features:head=ridge does not go with the task 'sides'.*logistic"),
        (["--results", "{place}/tags.jsonl"], "tags.jsonl"),
        (["--plot", "plot.svg"], "must end with .png"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_run(options, message, place, tmp_path, capsys):
    assert run(place, tmp_path, *(part.format(place=place) for part in options)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs.json").exists()


def test_rates_are_chosen_on_training_rows_alone(place, tmp_path, monkeypatch):
    calls = []

    def run_arm(cost, data, *, examples, seed, max_length=None):
        arm, rows = cost.arm, (data.train["sentence"][:], data.validation["sentence"][:])
        calls.append((arm.name, examples, seed, rows))
        best = {"full": 1e-5, "lora": 2e-3}.get(arm.strategy, 0.0)
        return Outcome({"accuracy": -abs(math.log((arm.learning_rate or 1) / (best or 1)))}, cost(examples), 1.0, 7.0)

    monkeypatch.setattr(grid, "run_arm", run_arm)
    arms = [
        ComparisonArm.parse(str(place / "encoder"), text)
        for text in ("full", "lora", "frozen:learning_rate=0.5", "features")
    ]
    tried = StrategyComparison(
        arms, [spec_of(place)], settings=SETTINGS, results=tmp_path / "runs.json", seeds=(4, 5), sizes=(50,),
        rate_factors=(0.1, 1, 2),
    )  # fmt: skip
    (group,) = tried.run()
    names = [arm.name for arm in group.rungs[0]]
    assert names == ["full:learning_rate=1e-05", "lora:learning_rate=0.002", "frozen:learning_rate=0.5", "features"]
    data = {seed: load_task(spec_of(place), seed=seed, max_examples=50) for seed in (4, 5)}
    held_out, final = (
        [call for call in calls if len(call[3][0]) == 40],
        [call for call in calls if len(call[3][0]) == 50],
    )
    assert len(held_out) == 6 and len(final) == 8 and len(calls) == 14
    for name, examples, seed, (train, validation) in held_out:
        assert seed == 4 and examples == 400 and name.split(":")[0] in ("full", "lora") and len(validation) == 10
        assert sorted(train + validation) == sorted(data[4].train["sentence"][:])
    for _, examples, seed, (train, validation) in final:
        assert examples == 500 and train == data[seed].train["sentence"][:]
        assert validation == data[seed].validation["sentence"][:]
    # What chose is paid for too, and a second run repeats nothing.
    costs = {arm: tried._cost(spec_of(place), arm, rows=50) for arm in group.rungs[0]}
    expected = 2 * math.fsum(cost(500) for cost in costs.values()) + 3 * (
        tried._cost(spec_of(place), arms[0], rows=40)(400)
    )
    expected += 3 * tried._cost(spec_of(place), arms[1], rows=40)(400)
    assert group.flops == pytest.approx(expected)
    tried.run()
    assert len(calls) == 14


def test_an_arm_is_left_out_where_it_does_not_go_and_named(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        grid,
        "run_arm",
        lambda cost, data, *, examples, **rest: Outcome({data.main_metric: 0.5}, cost(examples), 1.0, cost.memory),
    )
    options = ["--tasks", "sides", place / "tags.yaml", "--strategies", "full", "features", "features:head=ridge"]
    # A head of values goes with none of them.
    assert run(place, tmp_path, *options) == 2
    assert "features:head=ridge does not go with" in capsys.readouterr().err
    assert run(place, tmp_path, *options[:-1]) == 0
    shown = capsys.readouterr().out
    assert (
        "tags: without features, which do not go with a task of type 'tokens'" in shown
        and "sides: without" not in shown
    )
    rows = [re.split(r"  +", line.strip()) for line in table(shown)]
    found = {
        (row[0], next(name for name in ("full", "features", "a constant", "TF-IDF + linear") if name in row))
        for row in rows
    }
    assert found == {("sides", "a constant"), ("sides", "TF-IDF + linear"), ("sides", "full"), ("sides", "features"),
                     ("tags", "a constant"), ("tags", "full")}  # fmt: skip
    memory = {row[0]: row[-2] for row in rows if "full" in row}
    assert all(int(value) >= 0 for value in memory.values()) and rows[0][-1] != "MiB"


def test_the_memory_of_a_step_is_that_of_what_moves(place):
    data = load_task(spec_of(place))
    names = ("full", "full:learning_rate=0.1", "bitfit", "frozen", "features")
    memory = {
        name: count_cost(ComparisonArm.parse(str(place / "encoder"), name), data, batch_size=16).memory
        for name in names
    }
    model = BertModel(BertConfig(**SIZES))
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert (
        memory["full"] == memory["full:learning_rate=0.1"] > memory["bitfit"] > memory["frozen"] > memory["features"]
    )
    # Weights, two moments, and at least the gradients of the last step's layers.
    assert memory["full"] > 3 * weights and memory["full"] - memory["bitfit"] > 1.9 * 0.9 * weights
    assert memory["features"] > weights


def test_files_of_a_yaml_are_relative_to_the_folder_that_is_named(place, tmp_path):
    (tmp_path / "tags.yaml").write_text((place / "tags.yaml").read_text())
    assert len(load_task(find_tasks([str(tmp_path / "tags.yaml")], data_dir=place)[0].spec).train) == 18
    assert len(load_task(find_tasks([str(place / "tags.yaml")])[0].spec).train) == 18
    with pytest.raises(InputError, match="tags.jsonl' is no file"):
        load_task(find_tasks([str(tmp_path / "tags.yaml")])[0].spec)


def test_a_file_of_other_settings_is_refused(place, tmp_path, capsys):
    assert run(place, tmp_path, "--strategies", "features") == 0
    before = (tmp_path / "runs.json").read_bytes()
    assert run(place, tmp_path, "--strategies", "features", "--batch_size", "8") == 2
    assert "batch_size=8, but the runs" in capsys.readouterr().err
    assert (tmp_path / "runs.json").read_bytes() == before


def test_a_picture_of_others_is_not_replaced(place, tmp_path, capsys):
    options = ["--strategies", "features", "--seeds", "0"]
    (tmp_path / "runs.png").write_bytes(b"precious")
    assert run(place, tmp_path, *options) == 2
    assert (
        "runs.png' is no picture of a comparison" in capsys.readouterr().err and not (tmp_path / "runs.json").exists()
    )
    assert (tmp_path / "runs.png").read_bytes() == b"precious"
    assert run(place, tmp_path, *options, "--plot", tmp_path / "own.png") == 0
    drawn = (tmp_path / "own.png").read_bytes()
    # Its own pictures are drawn again; a name that is given is never taken for its own.
    assert run(place, tmp_path, *options, "--plot", tmp_path / "own.png") == 0
    assert (tmp_path / "own.png").read_bytes() == drawn
    assert run(place, tmp_path, *options, "--plot", tmp_path / "runs.png") == 2
    assert (tmp_path / "runs.png").read_bytes() == b"precious"
