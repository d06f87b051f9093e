"""Tasks as data: from YAML over files to batches and scores, for every type; and what is refused, by name."""

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertTokenizer, Trainer, TrainingArguments

from helpers.method_matrix import TINY
from hf_pretrain.errors import InputError
from hf_pretrain.tasks.batches import DataCollatorForTaskHead
from hf_pretrain.tasks.spec import TaskSpec, load_task, read_tasks

WORDS = ["the", "un", "##do", "##ing", "new", "york", "is", "big", "who", "?", *(f"w{i}" for i in range(20))]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PASSAGE = " ".join(f"w{i}" for i in range(20))


def pieces():
    return BertTokenizer(vocab={token: i for i, token in enumerate([*SPECIALS, *WORDS])}, model_max_length=64)


def question(answer, *, text=PASSAGE):
    begins = [] if answer is None else [text.index(answer)]
    answers = {"text": [answer] if begins else [], "answer_start": begins}
    return {"question": "who ?", "context": text, "answers": answers}


TAGGED = [
    {"words": ["undoing", "new", "york", "is", "undoing"], "tags": ["B-A", "B-B", "I-B", "O", "S-A"]},
    {"words": ["new", "undoing", "undoing"], "tags": ["S-B", "B-A", "E-A"]},
]
# Type -> options and rows.
TASKS = {
    "classification": (
        {"text": "sentence", "label": "label"},
        [{"sentence": f"w{i} big", "label": ("bad", "good", "none")[i % 3]} for i in range(12)],
    ),
    "regression": (
        {"text": ["a", "b"], "label": "score", "metric": "pearson"},
        [{"a": f"w{i}", "b": "big", "score": i * i / 7} for i in range(12)],
    ),
    "tokens": ({"text": "words", "label": "tags"}, TAGGED),
    "choice": (
        {"text": "context", "choices": ["first", "second", "third"], "label": "answer"},
        [
            {"context": "who ?", "first": "w1", "second": "w2 w3", "third": "w4", "answer": i}
            | {("first", "second", "third")[i]: f"w{n} big"}
            for n in range(5, 8)
            for i in range(3)
        ],
    ),
    "span": (
        {"text": ["question", "context"]},
        [question("w3"), question("w15 w16"), question("w19"), question("undoing", text="the undoing is big")],
    ),
}
TYPES = list(TASKS)


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def task(folder, kind="classification", rows=None, *, validation=None, **options):
    """Write the rows of a task and its YAML, and load it."""
    given, usual = TASKS[kind]
    write(folder, "train.jsonl", usual if rows is None else rows)
    write(folder, "dev.jsonl", (usual if rows is None else rows) if validation is None else validation)
    spec = {"type": kind, **given, "train_file": "train.jsonl", "validation_file": "dev.jsonl", **options}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"mine": {k: v for k, v in spec.items() if v is not ...}}))
    return load_task(read_tasks(folder / "tasks.yaml")["mine"])


def batches(data, tokenizer, *, size=3, **options):
    rows = data.encoded("validation", tokenizer, **options)
    collate = data.collator(tokenizer)
    return [collate([rows[i] for i in range(n, min(n + size, len(rows)))]) for n in range(0, len(rows), size)]


def padded(rows, fill=-100.0):
    """Arrays of other lengths in one, as the Trainer gathers them."""
    width = max(row.shape[1] for row in rows)
    pads = [[(0, 0), (0, width - row.shape[1]), *[(0, 0)] * (row.ndim - 2)] for row in rows]
    return np.concatenate([np.pad(row, pad, constant_values=fill) for row, pad in zip(rows, pads, strict=True)])


def one_hot(numbers, classes):
    return torch.nn.functional.one_hot(numbers, classes).float().numpy()


def perfect(data, made):
    """Logits that are sure of the labels of batches, made of the batches alone."""
    kind, classes = data.spec.type, len(data.labels or [1, 2, 3])
    if kind == "regression":
        return np.concatenate([batch["labels"].numpy() for batch in made])[:, None] * 2 + 1
    if kind == "span":
        # A window without the answer has it at its first token, which is no token of the text.
        return tuple(
            padded([one_hot(batch[name], batch["input_ids"].shape[1] + 1)[:, :-1] * 9 for batch in made])
            for name in ("start_positions", "end_positions")
        )
    logits = [one_hot(batch["labels"].clamp(min=0), classes) for batch in made]
    return padded(logits) if kind == "tokens" else np.concatenate(logits)


def tiny_model(data, **options):
    sizes = {
        **TINY,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "vocab_size": len(SPECIALS) + len(WORDS),
        "initializer_range": 0.3,
    }
    config = BertConfig(**sizes, **data.head_options(), **options)
    torch.manual_seed(0)
    return data.auto_class.from_config(config)


LENGTHS = {"max_length": 14, "doc_stride": 3}


class TestEveryType:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", TYPES)
    def test_perfect_predictions_score_one(self, kind, side, tmp_path):
        """Words are cut into pieces, and a text into windows."""
        data, tokenizer = task(tmp_path, kind), pieces()
        tokenizer.padding_side = side
        made = batches(data, tokenizer, **LENGTHS)
        scores = data.score("validation", perfect(data, made), tokenizer=tokenizer)
        assert scores[data.main_metric] == pytest.approx(1.0)
        wrong = perfect(data, made)
        wrong = tuple(np.roll(part, 2, axis=1) for part in wrong) if kind == "span" else -wrong
        assert data.score("validation", wrong, tokenizer=tokenizer)[data.main_metric] < 0.5
        assert tokenizer.padding_side == side

    @pytest.mark.parametrize("kind", TYPES)
    def test_the_stock_trainer_learns_and_predicts_it(self, kind, tmp_path):
        """The head opens with the options, its loss falls, and its predictions are scored."""
        data, tokenizer = task(tmp_path, kind), pieces()
        args = TrainingArguments(
            tmp_path / "out",
            max_steps=40,
            learning_rate=5e-3,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            report_to="none",
            logging_steps=10,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        encoded = [data.encoded(split, tokenizer, **LENGTHS) for split in ("train", "validation")]
        trainer = Trainer(
            tiny_model(data),
            args,
            train_dataset=encoded[0],
            eval_dataset=encoded[1],
            data_collator=data.collator(tokenizer),
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        output = trainer.predict(encoded[1])
        assert output.metrics["test_loss"] < 0.8 * before
        scores = data.score("validation", output.predictions, tokenizer=tokenizer)
        assert scores[data.main_metric] > 0 and data.main_metric in data.baseline()

    @pytest.mark.parametrize("kind", TYPES)
    def test_it_is_tokenized_once_and_found_again(self, kind, tmp_path):
        spec = task(tmp_path, kind).spec
        one, two = (load_task(spec).encoded("train", pieces(), **LENGTHS) for _ in range(2))
        assert one._fingerprint == two._fingerprint and one.cache_files == two.cache_files
        assert list(one) == list(two)

    @pytest.mark.parametrize("kind", TYPES)
    def test_rows_to_evaluate_on_may_have_no_labels(self, kind, tmp_path):
        _, rows = TASKS[kind]
        label = TASKS[kind][0].get("label", "answers")
        bare = [{name: value for name, value in row.items() if name != label} for row in rows]
        for validation in (bare, [row | {label: None} for row in bare]):
            data = task(tmp_path, kind, validation=validation)
            made = batches(data, pieces(), **LENGTHS)
            assert made and not {"labels", "start_positions"} & made[0].keys()
            with pytest.raises(InputError, match="validation rows have no labels, so nothing can be scored"):
                data.score("validation", np.zeros((len(rows), 3)))
            with pytest.raises(InputError, match="validation rows have no labels"):
                data.baseline()

    @pytest.mark.parametrize("kind", TYPES)
    def test_rows_without_a_label_do_not_count(self, kind, tmp_path):
        _, rows = TASKS[kind]
        label = TASKS[kind][0].get("label", "answers")
        data = task(tmp_path, kind, validation=[*rows, rows[0] | {label: None}])
        tokenizer = pieces()
        made = batches(data, tokenizer, **LENGTHS)
        scores = data.score("validation", perfect(data, made), tokenizer=tokenizer)
        assert scores[data.main_metric] == pytest.approx(1.0)
        loss = tiny_model(data)(**made[0]).loss
        assert torch.isfinite(loss)

    @pytest.mark.parametrize("kind", TYPES)
    def test_predictions_of_other_rows_are_refused(self, kind, tmp_path):
        data, tokenizer = task(tmp_path, kind), pieces()
        logits = perfect(data, batches(data, tokenizer, **LENGTHS))
        fewer = tuple(part[:-1] for part in logits) if kind == "span" else logits[:-1]
        more = (
            tuple(np.concatenate([part, part[:1]]) for part in logits)
            if kind == "span"
            else np.concatenate([logits, logits[:1]])
        )
        for wrong in (fewer, more):
            with pytest.raises(InputError, match="predictions has"):
                data.score("validation", wrong, tokenizer=tokenizer)
        if kind in ("tokens", "span"):
            with pytest.raises(InputError, match="tokenizer is missing"):
                data.score("validation", logits)
            with pytest.raises(InputError, match="train rows were not encoded here"):
                data.score("train", logits, tokenizer=tokenizer)


class TestClasses:
    def test_their_order_does_not_depend_on_the_rows(self, tmp_path):
        rows = TASKS["classification"][1]
        for order in (rows, rows[::-1], rows[5:] + rows[:5]):
            data = task(tmp_path, rows=order)
            assert data.labels == ["bad", "good", "none"]
            assert data.head_options()["label2id"] == {"bad": 0, "good": 1, "none": 2}
        assert task(tmp_path, labels=["none", "good", "bad"]).targets("train").tolist() == [2, 1, 0] * 4
        data = task(tmp_path, max_examples=...)
        few = load_task(data.spec, max_examples=1)
        assert few.labels == data.labels and len(few.train) == 1

    def test_numbers_are_in_the_order_of_numbers(self, tmp_path):
        rows = [{"sentence": "big", "label": i % 12} for i in range(24)]
        data = task(tmp_path, rows=rows)
        assert data.labels == [str(i) for i in range(12)] and data.targets("train").tolist() == [*range(12)] * 2

    def test_numbers_have_the_names_that_are_given(self, tmp_path):
        rows = [{"sentence": "big", "label": i} for i in (1, 0, 1)]
        data = task(tmp_path, rows=rows, labels=["negative", "positive"])
        assert data.labels == ["negative", "positive"] and data.targets("train").tolist() == [1, 0, 1]

    def test_minus_one_is_a_class_only_if_it_is_named(self, tmp_path):
        rows = [{"sentence": "big", "label": i} for i in (1, -1, 1)]
        with pytest.raises(InputError, match=r"label='label' has 1 classes"):
            task(tmp_path, rows=rows)
        with pytest.raises(InputError, match=r"train row 1 has no label \(label=-1\).*if that is a class, name all"):
            task(tmp_path, rows=[*rows, {"sentence": "big", "label": 0}])
        data = task(tmp_path, rows=rows, labels=["-1", "1"])
        assert data.targets("train").tolist() == [1, 0, 1]

    def test_true_and_false_are_classes(self, tmp_path):
        data = task(tmp_path, rows=[{"sentence": "big", "label": i} for i in (True, False)])
        assert data.labels == ["False", "True"] and data.targets("train").tolist() == [1, 0]

    def test_classes_of_a_dataset_keep_their_order(self, tmp_path):
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
        )
        rows = datasets.Dataset.from_dict({"sentence": ["big", "w1"], "label": [1, 0]}, features=features)
        rows.to_parquet(tmp_path / "d" / "train.parquet") if (tmp_path / "d").mkdir() is None else None
        spec = TaskSpec(name="x", type="classification", text=("sentence",), dataset_name=str(tmp_path / "d"))
        data = load_task(spec, validation_fraction=0.5)
        assert data.labels == ["z", "a"] and len(data.train) == len(data.validation) == 1
        row = data.train[0]
        assert row["label"] == {"big": 1, "w1": 0}[row["sentence"]]

    def test_the_baseline_is_the_most_frequent_of_the_training_rows(self, tmp_path):
        train = [{"sentence": "big", "label": i} for i in (0, 0, 1, 1, 1)]
        dev = [{"sentence": "big", "label": i} for i in (0, 0, 0, 1)]
        data = task(tmp_path, rows=train, validation=dev)
        assert data.baseline()["accuracy"] == 0.25
        tagged = task(tmp_path, "tokens", [{"words": ["big"] * 3, "tags": ["O", "O", "B-A"]}])
        assert tagged.baseline()["accuracy"] == pytest.approx(2 / 3) and tagged.baseline()["entity_f1"] == 0
        values = task(tmp_path, "regression", [{"a": "big", "b": "is", "score": i} for i in (0.0, 2.0)])
        assert values.baseline() == {"pearson": 0.0, "spearman": 0.0, "mean_squared_error": 1.0}
        spans = task(tmp_path, "span", [question("w3"), question(None)])
        assert spans.baseline() == {"exact_match": 0.5, "f1": 0.5}


class TestRows:
    def test_fewer_examples_are_a_part_of_more_by_a_key(self, tmp_path):
        spec = task(tmp_path).spec
        found = [[set(load_task(spec, max_examples=n, seed=k).train["sentence"][:]) for n in (3, 8)] for k in range(5)]
        assert all(len(few) == 3 and few < more for few, more in found)
        assert len({frozenset(few) for few, _ in found}) > 1
        assert len(load_task(spec, max_examples=100).train) == 12

    def test_rows_are_held_out_by_a_key_where_there_are_no_others(self, tmp_path):
        spec = task(tmp_path, validation_file=...).spec
        parts = [load_task(spec, validation_fraction=0.25, seed=seed) for seed in (0, 0, 1)]
        held_out = [part.validation["sentence"][:] for part in parts]
        assert held_out[0] == held_out[1] != held_out[2] and len(held_out[0]) == 3
        assert not set(held_out[0]) & set(parts[0].train["sentence"][:]) and len(parts[0].train) == 9
        with pytest.raises(InputError, match="validation_fraction=0.*validation_file or validation_split"):
            load_task(spec, validation_fraction=0)

    @pytest.mark.parametrize("has_titles", [True, False])
    def test_questions_of_one_article_or_else_of_one_text_are_held_out_together(self, tmp_path, has_titles):
        articles = [
            {
                "paragraphs": [
                    {"context": f"w{number} a{article} p{part}", "qas": [{"question": f"q{n}", "answers": [
                        {"text": f"a{article}", "answer_start": 3}]} for n in range(3)]}
                    for part, number in enumerate((1, 2))
                ]
            } | ({"title": f"Article {article}"} if has_titles else {})
            for article in range(8)
        ]  # fmt: skip
        (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
        spec = TaskSpec(
            name="q", type="span", text=("question", "context"), train_file=(str(tmp_path / "squad.json"),)
        )
        parts = [load_task(spec, validation_fraction=0.25, seed=seed) for seed in (0, 0, 1, 2, 3)]
        for data in parts:
            unit = (lambda text: text.split()[1]) if has_titles else str
            kept, held_out = ({unit(text) for text in rows["context"][:]} for rows in (data.train, data.validation))
            assert not kept & held_out and len(held_out) == (2 if has_titles else 4)
            assert len(data.train) == 36 and len(data.validation) == 12
        texts = [set(data.validation["context"][:]) for data in parts]
        assert texts[0] == texts[1] and len(set(map(frozenset, texts))) > 1

    def test_questions_about_a_single_text_are_held_out_one_by_one(self, tmp_path):
        data = task(tmp_path, "span", [question(f"w{n}") for n in range(3, 13)], validation_file=...)
        assert len(data.train) == 9 and len(data.validation) == 1

    def test_tables_without_a_header_have_the_names_that_are_given(self, tmp_path):
        (tmp_path / "train.tsv").write_text("x1\t1\t\tw1 big\nx2\t0\t*\tw2\n")
        options = {"type": "classification", "text": "sentence", "columns": ["id", "label", "star", "sentence"]}
        options |= {"train_file": "train.tsv", "validation_file": "train.tsv"}

        def load(**changed):
            (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"cola": options | changed}))
            return load_task(read_tasks(tmp_path / "tasks.yaml")["cola"])

        data = load()
        assert data.texts("train") == ["w1 big", "w2"] and data.targets("train").tolist() == [1, 0]
        with pytest.raises(InputError, match="has 4 columns, but columns=.* names 2"):
            load(columns=["label", "sentence"])
        (tmp_path / "train.tsv").write_text("id\tlabel\tstar\tsentence\nx1\t1\t\tw1 big\n")
        with pytest.raises(InputError, match="has a header, so leave columns=.* out"):
            load()

    def test_words_of_a_table_are_split_at_spaces(self, tmp_path):
        (tmp_path / "train.tsv").write_text("words\ttags\nundoing new york\tO B-A I-A\nbig\tO\n")
        spec = TaskSpec(
            name="ner",
            type="tokens",
            text=("words",),
            train_file=(str(tmp_path / "train.tsv"),),
            validation_file=(str(tmp_path / "train.tsv"),),
        )
        data = load_task(spec)
        assert data.labels == ["B-A", "I-A", "O"] and data.main_metric == "entity_f1"
        assert data.encoded("train", pieces())["labels"][:] == [[-100, 2, -100, -100, 0, 1, -100], [-100, 2, -100]]

    def test_a_template_joins_columns(self, tmp_path):
        rows = [{"passage": "w1 {x}", "q": "who ?", "a": f"w{i}", "label": i} for i in range(2)]
        data = task(tmp_path, rows=rows, text=["passage", "{q} {a}"])
        assert data.texts("train") == [("w1 {x}", "who ? w0"), ("w1 {x}", "who ? w1")]
        ids = data.encoded("train", pieces())["input_ids"][1]
        assert ids == pieces()("w1 {x}", "who ? w1")["input_ids"]
        with pytest.raises(InputError, match="text names 'answer', which the train rows do not have: .*"):
            task(tmp_path, rows=rows, text=["passage", "{q} {answer}"])

    def test_texts_and_targets_are_those_of_the_files(self, tmp_path):
        data = task(tmp_path, "regression")
        assert data.texts("train")[:2] == [("w0", "big"), ("w1", "big")]
        assert data.targets("train")[2] == pytest.approx(4 / 7)
        with pytest.raises(InputError, match="type='tokens': only classification and regression"):
            task(tmp_path, "tokens").texts("train")
        with pytest.raises(InputError, match="split='test' must be one of train, validation"):
            data.texts("test")

    def test_a_task_may_only_be_evaluated(self, tmp_path):
        data = task(tmp_path, train_file=..., labels=["bad", "good", "none"])
        assert data.train is None and data.baseline()["accuracy"] == pytest.approx(1 / 3)
        with pytest.raises(InputError, match="no rows to train on"):
            data.encoded("train", pieces())
        with pytest.raises(InputError, match="labels must name the classes"):
            task(tmp_path, train_file=...)


class TestWords:
    def test_a_word_that_is_cut_off_counts(self, tmp_path):
        """Two of the five words have tokens; the others are predicted to be O, which one of them is."""
        data, tokenizer = task(tmp_path, "tokens", [TAGGED[0]]), pieces()
        made = batches(data, tokenizer, max_length=6)
        scores = data.score("validation", perfect(data, made), tokenizer=tokenizer)
        assert scores["accuracy"] == pytest.approx(3 / 5) and scores["entity_recall"] == pytest.approx(1 / 3)

    def test_a_word_without_tokens_moves_no_other(self, tmp_path):
        rows = [{"words": ["new", "\u200b", "", "york", "big"], "tags": ["A", "C", "A", "B", "B"]}]
        data, tokenizer = task(tmp_path, "tokens", rows, metric="accuracy"), pieces()
        scores = data.score("validation", perfect(data, batches(data, tokenizer)), tokenizer=tokenizer)
        assert scores["accuracy"] == pytest.approx(3 / 5)
        assert data.main_metric == "accuracy" and "entity_f1" not in scores


class TestSpans:
    def test_the_answer_may_be_in_any_window(self, tmp_path):
        data, tokenizer = task(tmp_path, "span", [question("w19"), question("w0")]), pieces()
        rows = data.encoded("validation", tokenizer, **LENGTHS)
        assert len(rows) > 4 and sum(position > 0 for position in rows["start_positions"]) >= 2

    def test_an_unknown_answer_has_no_part_in_the_loss(self, tmp_path):
        """transformers takes -100 for the first token."""
        data = task(tmp_path, "span", validation=[question("w3"), question("w3") | {"answers": None}])
        (batch,) = batches(data, pieces())
        length = batch["input_ids"].shape[1]
        assert batch["start_positions"][1] == batch["end_positions"][1] == length
        model = tiny_model(data).eval()
        alone = {name: values[:1] for name, values in batch.items()}
        assert model(**batch).loss.item() == pytest.approx(model(**alone).loss.item(), rel=1e-5)

    def test_no_answer_is_one_where_some_question_has_none(self, tmp_path):
        data, tokenizer = task(tmp_path, "span", [question("w3"), question(None)]), pieces()
        made = batches(data, tokenizer)
        logits = perfect(data, made)
        assert data.score("validation", logits, tokenizer=tokenizer)["f1"] == 1.0
        # Of a model that is too sure of answers, a threshold helps.
        for part in logits:
            part[:, 0] -= 12
        scores = data.score("validation", logits, tokenizer=tokenizer)
        assert scores["f1"] == 0.5 and scores["best_f1"] == 1.0 and scores["null_threshold"] < 0

    def test_articles_count_in_other_languages(self, tmp_path):
        rows = [question("w3 a", text="w2 w3 a w4")]
        logits = np.zeros((1, 9))
        logits[0, 5] = 9.0
        for language, expected in (("en", 1.0), ("de", 0.0)):
            data = task(tmp_path, "span", rows, language=language)
            data.encoded("validation", pieces())
            assert data.score("validation", (logits, logits), tokenizer=pieces())["exact_match"] == expected


class TestChoices:
    @pytest.mark.parametrize(
        ("labels", "lists"),
        [
            ([0, 2, 1], False),
            (["first", "third", "second"], False),
            (["w1", "w4", "w2 w3"], True),
            (["0", "2", "1"], True),
        ],
    )
    def test_a_label_is_a_number_a_column_or_a_text(self, labels, lists, tmp_path):
        names = ["first", "second", "third"]
        row = {"context": "who ?", "first": "w1", "second": "w2 w3", "third": "w4"}
        rows = [row | {"answer": label} for label in labels]
        if lists:
            rows = [
                {"context": row["context"], "all": [row[n] for n in names], "answer": row["answer"]} for row in rows
            ]
        data = task(tmp_path, "choice", rows, choices=["all"] if lists else names)
        assert data.targets("train").tolist() == [0, 2, 1]
        (batch,) = batches(data, pieces())
        assert batch["labels"].tolist() == [0, 2, 1] and batch["input_ids"].shape[:2] == (3, 3)
        expected = pieces()("who ?", "w2 w3")["input_ids"]
        assert batch["input_ids"][0, 1].tolist() == expected
        assert batch["attention_mask"][0].sum(1).tolist() == [len(expected) - 1, len(expected), len(expected) - 1]

    def test_a_beginning_stands_before_each_choice(self, tmp_path):
        rows = [{"context": "who ?", "start": "new york", "a": "is", "b": "big", "answer": 1}] * 2
        data = task(tmp_path, "choice", rows, text=["context", "start"], choices=["a", "b"])
        ids = data.encoded("train", pieces())["input_ids"][0]
        assert ids == [pieces()("who ?", f"new york {end}")["input_ids"] for end in ("is", "big")]

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"answer": 3}, "row 0: the label 3 is none of its 3 choices: give a number from 0 to 2"),
            ({"answer": "frist"}, "the label 'frist' .*did you mean 'first'"),
            ({"answer": "w1", "second": "w1"}, "the label 'w1' is the text of two choices"),
            ({"answer": True}, "the label True is none"),
        ],
    )
    def test_other_labels_are_refused(self, changed, match, tmp_path):
        with pytest.raises(InputError, match=match):
            row = {"context": "who ?", "first": "w1", "second": "w2 w3", "third": "w4"}
            task(tmp_path, "choice", [row | changed])

    def test_other_numbers_of_choices_are_refused(self, tmp_path):
        rows = [{"context": "w1", "all": ["w1", "w2", "w3"][:n], "answer": 0} for n in (3, 2)]
        data = task(tmp_path, "choice", rows, choices=["all"])
        with pytest.raises(InputError, match="row 1 has 2 choices, the first row 3"):
            data.encoded("train", pieces())
        with pytest.raises(InputError, match="'context' holds no lists"):
            task(tmp_path, "choice", rows, choices=["context"])


def test_a_batch_of_choices_is_padded_on_the_tokenizers_side():
    tokenizer = pieces()
    tokenizer.padding_side = "left"
    examples = [{"input_ids": [[5, 6, 7], [5]], "labels": 1}, {"input_ids": [[5, 6], [5, 6, 7, 8]], "labels": -100}]
    batch = DataCollatorForTaskHead(tokenizer, pad_to_multiple_of=8)(examples)
    assert batch["input_ids"].shape == (2, 2, 8) and batch["labels"].tolist() == [1, -100]
    assert batch["input_ids"][1, 0].tolist() == [0] * 6 + [5, 6]
    assert batch["attention_mask"].sum(2).tolist() == [[3, 1], [2, 4]]


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("- a\n- b\n", "is no mapping of names to tasks"),
            ("", "is no mapping of names to tasks"),
            ("mine: train.tsv\n", "task 'mine' is 'train.tsv', no mapping"),
            ("mine: [a\n", "cannot be read"),
            ("mine: {typ: classification}\n", "task 'mine' has the unknown option 'typ': did you mean 'type'"),
            ("mine: {text: a}\n", "task 'mine' has no type"),
            ("mine: {type: classification}\n", "task 'mine': give train_file, validation_file or"),
            ("mine: {type: classification, text: {a: b}}\n", "text={'a': 'b'} must be a list of words"),
            ("mine: {type: [tokens], text: a}\n", r"type=\['tokens'\] must be one word"),
            (
                "mine: {type: clasification, text: a}\n",
                "type='clasification' must be one of .*did you mean 'classification'",
            ),
            ("mine: {type: classification, text: a}\n", "give train_file, validation_file or dataset_name=None"),
            ("mine: {type: classification, text: a, train_file: b, dataset_name: c}\n", "give not both of files and"),
            ("mine: {type: classification, text: [a, b, c], train_file: t}\n", "name one column, or two of pairs"),
            ("mine: {type: span, text: a, train_file: t}\n", "two columns, of the question and of the text"),
            ("mine: {type: tokens, text: [a, b], train_file: t}\n", "one column of words"),
            ("mine: {type: choice, text: a, train_file: t}\n", "name the columns of the choices"),
            (
                "mine: {type: regression, text: a, train_file: t, choices: b}\n",
                "choices=.*leave it out with type='regr",
            ),
            ("mine: {type: regression, text: a, train_file: t, labels: [a, b]}\n", "labels=.*has no classes"),
            ("mine: {type: tokens, text: a, train_file: t, labels: [a, a]}\n", "labels=.*name two classes or more"),
            ("mine: {type: tokens, text: a, train_file: t, metric: entityf1}\n", "metric='entityf1'.*'entity_f1'"),
            (
                "mine: {type: regression, text: a, train_file: t, metric: accuracy}\n",
                "metric='accuracy' must be one of",
            ),
            (
                "mine: {type: tokens, text: a, dataset_name: t, columns: [a, b]}\n",
                "columns=.*leave it out without files",
            ),
        ],
    )
    def test_a_file_of_another_form(self, text, match, tmp_path):
        (tmp_path / "tasks.yaml").write_text(text)
        with pytest.raises(InputError, match=match) as caught:
            read_tasks(tmp_path / "tasks.yaml")
        assert "\n" not in str(caught.value)

    def test_no_file_and_no_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_tasks(tmp_path / "tasks.yaml")
        (tmp_path / "tasks.yaml").write_text("mine: {type: classification, text: a, train_file: data/b.tsv}\n")
        with pytest.raises(InputError, match="data_dir='.*nowhere' is no folder"):
            read_tasks(tmp_path / "tasks.yaml", data_dir=tmp_path / "nowhere")
        spec = read_tasks(tmp_path / "tasks.yaml", data_dir=tmp_path)["mine"]
        with pytest.raises(InputError, match=r"task 'mine': train_file='.*data/b.tsv' is no file: .*data_dir"):
            load_task(spec)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"text": "sentense"}, "text names 'sentense', which the train rows do not have: did you mean 'sentence'"),
            ({"label": "labels"}, "label names 'labels', which the train rows do not have: did you mean 'label'"),
            ({"labels": ["bad", "good"]}, "the train rows have label='none', which is none of labels"),
            (
                {"type": "regression"},
                "train row 0 has label='bad', no number: correct it, or say type: classification",
            ),
            (
                {"rows": TASKS["classification"][1], "validation": [{"sentence": "big", "label": "godo"}]},
                "validation rows have label='godo', which is none of the classes of the training rows: did you mean 'good'",
            ),
            (
                {"validation": [{"text": "big", "label": "good"}]},
                "text names 'sentence', which the validation rows do not have",
            ),
            (
                {"rows": [*TASKS["classification"][1], {"sentence": "big", "label": None}]},
                r"train row 12 has no label \(label=None\): leave such rows out",
            ),
            ({"label": ..., "rows": [{"sentence": "a", "x": 1}]}, "no column has a usual name of labels"),
            (
                {"rows": [{"sentence": "a", "label": "x"}] * 2},
                r"has 1 classes in the train rows \(x\): a task needs two",
            ),
        ],
    )
    def test_rows_that_do_not_fit(self, options, match, tmp_path):
        with pytest.raises(InputError, match=match) as caught:
            task(tmp_path, **options)
        assert "\n" not in str(caught.value) and "mine" in str(caught.value)

    def test_values_that_are_no_numbers(self, tmp_path):
        rows = [{"a": "w1", "b": "w2", "score": value} for value in ("1.5", "nan")]
        with pytest.raises(InputError, match="train row 1 has score='nan', no number"):
            task(tmp_path, "regression", rows)
        with pytest.raises(InputError, match="max_examples=0"):
            load_task(task(tmp_path).spec, max_examples=0)
