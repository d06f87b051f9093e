"""The examples of a task: files, columns and labels as they come; and batches of one length."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
from transformers import BertConfig

from helpers.distilled import PREDICTION
from helpers.method_matrix import build, tiny_tokenizer
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, ORDER_STRIDE
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import TASK_METHOD as distil_task
from hf_pretrain.objectives.distillation import TaskDataArguments
from hf_pretrain.tasks.batches import LengthGroupedSampler
from hf_pretrain.tasks.data import prepare_task


class TestReading:
    def prepare(self, folder, text, *, name="train.tsv", config=None, **options):
        path = folder / name
        path.write_text(text)
        return self.prepare_file(path, config=config, **options)

    def prepare_file(self, path, *, config=None, **options):
        args = TaskDataArguments(
            **{"train_file": [str(path)], "validation_fraction": 0.0, "max_length": 12, **options}
        )
        config = (
            BertConfig(num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
            if config is None
            else config
        )
        tokenizer = tiny_tokenizer()
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        return prepare_task(args, tokenizer=tokenizer, config=config, seed=0)

    def test_a_table_of_sentences_with_names_or_numbers_of_labels(self, tmp_path):
        text = 'sentence\tlabel\nw1 "w2\tgood\nnull\tbad\nw3\t1\nw4\t-1\nw5\t\n'
        rows = self.prepare(tmp_path, text).train_dataset
        assert rows["labels"] == [1, 0, 1, -100, -100]
        # A quotation mark is a character, and "null" a word.
        assert [len(ids) for ids in rows["input_ids"]] == [4, 3, 3, 3, 3]

    def test_pairs_and_their_types(self, tmp_path):
        data = self.prepare(tmp_path, "premise,hypothesis\nw1 w2,w3\n", name="train.csv")
        (row,) = list(data.train_dataset)
        assert row["input_ids"] == tiny_tokenizer()("w1 w2", "w3")["input_ids"]
        assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert "labels" not in row and data.description["labels"] == "none"

    def test_json_lines_and_values(self, tmp_path):
        config = BertConfig(num_labels=1)
        text = '{"a": "w1", "score": 2.5}\n{"a": "w2", "score": null}\n'
        options = {"text_columns": ["a"], "label_column": "score"}
        rows = self.prepare(tmp_path, text, name="x.jsonl", config=config, **options).train_dataset
        assert np.isnan(rows["labels"][1]) and rows["labels"][0] == 2.5

    @pytest.mark.parametrize("labels", [("good", "bad"), ("1", "0")])
    @pytest.mark.parametrize("suffix", ["tsv", "csv", "tsv.gz", "csv.bz2", "tsv.xz"])
    def test_a_table_without_a_header(self, tmp_path, capsys, labels, suffix):
        """The sentences that follow, with a class each, are all examples, and what was made of it is said."""
        good, bad = labels
        rows = [("w1 w2", good), ("w3", bad), ("w4 w5 w6", good)]
        text = "".join(f"{row}{',' if 'csv' in suffix else chr(9)}{label}\n" for row, label in rows)
        kind, _, compression = suffix.partition(".")
        path = tmp_path / f"train.{suffix}"
        opened = {"": open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression]
        with opened(path, "wt") as stream:
            stream.write(text)
        data = self.prepare_file(path)
        assert data.train_dataset["labels"] == [1, 0, 1]
        assert [len(ids) for ids in data.train_dataset["input_ids"]] == [4, 3, 5]
        assert f"train.{suffix} without a header, taken for sentence, label" in capsys.readouterr().out

    def test_a_table_of_pairs_without_a_header(self, tmp_path):
        data = self.prepare(tmp_path, "w1\tw2 w3\t1\nw4\tw5\t0\n")
        assert data.train_dataset["token_type_ids"][0] == [0, 0, 0, 1, 1, 1]
        assert data.train_dataset["labels"] == [1, 0]

    def test_colas_table_without_a_header(self, tmp_path, capsys):
        data = self.prepare(tmp_path, "a1\t1\t\tw1 w2\na2\t0\t*\tw3 w4 w5\n")
        assert data.train_dataset["labels"] == [1, 0]
        assert [len(ids) for ids in data.train_dataset["input_ids"]] == [4, 5]
        assert "without a header, taken for source, label, star, sentence" in capsys.readouterr().out

    @pytest.mark.parametrize("header", ["review\tstars", "review\t1", "0\t1"])
    def test_a_header_that_is_asked_for_is_one(self, tmp_path, header):
        """Also where its names are numbers, as pandas writes them."""
        text, label = header.split("\t")
        options = {"text_columns": [text], "label_column": label}
        data = self.prepare(tmp_path, f"{header}\nw1\t1\nw2\t0\n", **options)
        assert data.train_dataset["labels"] == [1, 0]

    def test_files_that_disagree_about_the_header_are_refused(self, tmp_path):
        for name, header in (("a.tsv", ""), ("b.tsv", "sentence\tlabel\n")):
            (tmp_path / name).write_text(f"{header}w1\t1\nw2\t0\n")
        with pytest.raises(InputError, match="b.tsv has another header than .*a.tsv"):
            self.prepare(tmp_path, "", train_file=[str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")])

    @pytest.mark.parametrize("name", ["train.json", "train.jsonl.gz", "train.json.gz"])
    def test_arrays_and_compressed_json(self, tmp_path, name):
        rows = [{"sentence": "w1 w2", "label": 1}, {"sentence": "w3", "label": 0}]
        lines = "\n".join(map(json.dumps, rows)) if "jsonl" in name else json.dumps(rows)
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt") as stream:
            stream.write(lines)
        assert self.prepare_file(tmp_path / name).train_dataset["labels"] == [1, 0]

    def test_examples_are_held_out_by_a_key(self, tmp_path):
        text = "sentence\n" + "".join(f"w{i}\n" for i in range(40))
        parts = [self.prepare(tmp_path, text, validation_fraction=0.25) for _ in range(2)]
        assert [len(parts[0].train_dataset), len(parts[0].eval_dataset)] == [30, 10]
        assert parts[0].eval_dataset["input_ids"] == parts[1].eval_dataset["input_ids"]
        ids = [tuple(row) for part in (parts[0].train_dataset, parts[0].eval_dataset) for row in part["input_ids"]]
        assert len(set(ids)) == 40

    @pytest.mark.parametrize(
        ("text", "options", "match"),
        [
            ("sentence\tlabel\nw1\tugly\n", {}, "holds 'ugly', but the model's labels are bad, good"),
            ("sentence\tlabel\nw1\t2\n", {}, "holds 2, but"),
            (
                "words\tlabel\nw1\t1\n",
                {},
                "no column of a usual name: the first line was taken as the header, and names words, label",
            ),
            (
                "w1 w2\tugly\nw1\tgood\n",
                {},
                "the first line was taken as the header, and names w1 w2, ugly; .* put a header above it",
            ),
            ("0\t1\nw1\t1\nw2\t0\n", {}, "the first line was taken as the header, and names 0, 1; "),
            (
                "a1\t1\tx\tw1 w2\na2\t0\t\tw3 w4\n",
                {},
                "the first line was taken as the header, and names a1, 1, .* put a header above it",
            ),
            (
                "sentence\ttext\tlabel\nw1\tw2\t1\n",
                {},
                "several columns have usual names of texts, sentence, or text: choose with --text_columns",
            ),
            (
                "sentence\tlabel\tgold_label\nw1\t1\t0\n",
                {},
                "several columns have usual names of labels, label, or gold_label: choose with --label_column",
            ),
            (
                "sentence\nw1\n",
                {"text_columns": ["text"]},
                r"text_columns=\['text'\]: the first line was taken as the header, and names sentence",
            ),
            (
                '{"a": "w1"}\n',
                {"name": "x.jsonl"},
                "no column of a usual name: the examples have a; choose with --text",
            ),
            ("sentence\nw1\n", {"label_column": "y"}, "label_column='y': the examples have sentence"),
            ("sentence\tlabel\n", {}, "cannot be read as csv: there is no example in it"),
            ("", {}, "cannot be read as csv"),
            ("sentence\nw1\n", {"train_file": ["nowhere.tsv"]}, "train_file='nowhere.tsv' is no file"),
            ("sentence\nw1\n", {"name": "x.doc"}, "files of one kind"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, text, options, match):
        with pytest.raises(InputError, match=match):
            self.prepare(tmp_path, text, **options)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        (tmp_path / "x.tsv").write_bytes(b"sentence\n\xff\xfe\xfa\n")
        args = TaskDataArguments(train_file=[str(tmp_path / "x.tsv")])
        with pytest.raises(InputError, match="cannot be read as csv.*decode"):
            prepare_task(args, tokenizer=tiny_tokenizer(), config=BertConfig(), seed=0)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"train_file": ["x"], "dataset_name": "y"}, "give one of the two"),
            ({"train_file": ["x"], "text_columns": ["a", "b", "c"]}, "two of pairs"),
        ],
    )
    def test_bad_options_are_refused(self, options, match):
        with pytest.raises(InputError, match=match):
            TaskDataArguments(**options)

    def test_no_examples_are_refused(self):
        with pytest.raises(InputError, match="train_file and dataset_name are both missing"):
            prepare_task(TaskDataArguments(), tokenizer=tiny_tokenizer(), config=BertConfig(), seed=0)


class TestLengths:
    def sampler(self, lengths, batch_size=4):
        return LengthGroupedSampler(np.asarray(lengths), seed=3, batch_size=batch_size)

    def rows(self, sampler, epoch=0):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert [index // ORDER_STRIDE for index in indices] == list(range(1, len(indices) + 1))
        assert {index % ORDER_STRIDE // EPOCH_STRIDE for index in indices} == {epoch}
        return [index % EPOCH_STRIDE for index in indices]

    def test_each_example_once_in_another_order_each_epoch(self):
        sampler = self.sampler(range(101))
        orders = [self.rows(sampler, epoch) for epoch in (0, 1, 0)]
        assert sorted(orders[0]) == list(range(101))
        assert orders[0] == orders[2] != orders[1]

    def test_a_step_has_one_length_and_steps_come_in_any_order(self):
        lengths = np.arange(400) % 10
        rows = np.array(self.rows(self.sampler(lengths)))
        steps = lengths[rows].reshape(-1, 4)
        assert (np.ptp(steps, axis=1) <= 1).all()
        assert np.ptp(lengths[np.arange(400)].reshape(-1, 4), axis=1).mean() > 2
        assert (np.diff(steps[:, 0]) < 0).any() and (np.diff(steps[:, 0]) > 0).any()

    def test_lengths_come_in_another_order_each_epoch(self):
        """Examples of one length are alike: in two epochs their steps are the same, but for the order of lengths."""
        sampler, lengths = self.sampler(np.repeat(np.arange(50), 4)), np.repeat(np.arange(50), 4)
        first, second, again = (lengths[self.rows(sampler, epoch)][::4].tolist() for epoch in (0, 1, 0))
        assert sorted(first) == sorted(second) == list(range(50))
        assert first == again != second

    @pytest.mark.parametrize("count", [1, 3, 4, 5])
    def test_few_examples(self, count):
        assert sorted(self.rows(self.sampler([5] * count))) == list(range(count))

    def test_the_trainer_groups_unless_told_otherwise(self, tmp_path):
        trainer = build(distil_task, tmp_path, **PREDICTION)
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset.base]
        steps = np.array(lengths)[self.rows(trainer._get_train_sampler())].reshape(-1, 8)
        assert np.ptp(steps, axis=1).mean() < 0.3 * np.ptp(lengths)
        other = build(distil_task, tmp_path / "other", **PREDICTION, train_sampling_strategy="random")
        assert not isinstance(other._get_train_sampler(other.train_dataset), LengthGroupedSampler)
