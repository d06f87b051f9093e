"""Examples whose labels stand at words or are spans of a text: which token gets which label, and what is refused."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerFast

from helpers.distilled_tasks import TAGS, question_rows, token_rows, write_rows
from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation import DataCollatorForTask, TaskDataArguments
from hf_pretrain.tasks.batches import count_predictions
from hf_pretrain.tasks.data import prepare_task
from hf_pretrain.tasks.examples import encode_tokens
from hf_pretrain.tasks.questions import encode_questions

CONFIG = BertConfig(id2label=dict(enumerate(TAGS)), label2id={name: i for i, name in enumerate(TAGS)})
WORDS = ["the", "un", "##do", "##ing", "don", "'", "t", "new", "york", "is", "big", "who", "?", "."]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS, QUESTIONS = "token-classification", "question-answering"


def pieces():
    """Words in pieces, as BERT has them."""
    return BertTokenizer(vocab={token: i for i, token in enumerate([*SPECIALS, *WORDS])}, model_max_length=64)


def bytes_with_spaces():
    """Tokens of bytes, each with the space before it, as RoBERTa has them, and without an option for words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the undoing don't of new york is big"] * 9, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
    )


def labelled(tokenizer, tokens, tags, **options):
    examples = Dataset.from_dict({"tokens": [tokens], "labels": [tags]})
    (row,) = encode_tokens(
        examples, tokenizer, column="tokens", labels="labels", config=CONFIG, max_length=64, **options
    )
    return row


class TestTokens:
    @pytest.mark.parametrize("make", [pieces, bytes_with_spaces, tiny_tokenizer])
    def test_a_class_stands_at_the_first_token_of_its_word(self, make):
        tokenizer, words = make(), ["the", "undoing", "don't", "new york", "", "big"]
        row = labelled(tokenizer, words, ["O", "A", "B", "A", "O", "B"])
        text = "the undoing don't new york big"
        starts = [text.index(word) for word in words]
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        # Where the characters of the words begin; a token of bytes holds the space before them.
        expected = [-100] * len(offsets)
        for start, word, tag in zip(starts, words, (0, 1, 2, 1, 0, 2), strict=True):
            if word:
                expected[next(i for i, (begin, end) in enumerate(offsets) if begin <= start < end)] = tag
        assert row["labels"] == expected and row["labels"].count(-100) < len(expected)
        assert row["is_target"] == [False, *[True] * (len(offsets) - 2), False]

    def test_classes_by_number_by_name_and_unknown_ones(self):
        features = Features({"tokens": List(Value("string")), "labels": List(ClassLabel(names=["B", "O"]))})
        examples = Dataset.from_dict({"tokens": [["w1", "w2"]], "labels": [[0, 1]]}, features=features)
        options = {"column": "tokens", "labels": "labels", "config": CONFIG, "max_length": 9}
        assert encode_tokens(examples, tiny_tokenizer(), **options)["labels"][0] == [-100, 2, 0, -100]
        examples = Dataset.from_dict({"tokens": [["w1", "w2", "w3"], ["w1"]], "labels": [[1, -100, 2], None]})
        assert encode_tokens(examples, tiny_tokenizer(), **options)["labels"][:] == [
            [-100, 1, -100, 2, -100],
            [-100] * 3,
        ]

    def test_what_goes_beyond_is_cut_off_with_its_classes(self):
        row = encode_tokens(
            Dataset.from_dict({"tokens": [["w1"] * 9], "labels": [["A"] * 9]}),
            tiny_tokenizer(),
            column="tokens",
            labels="labels",
            config=CONFIG,
            max_length=5,
        )[0]
        assert row["labels"] == [-100, 1, 1, 1, -100] and len(row["input_ids"]) == 5

    def test_plain_texts_have_targets_but_no_labels(self):
        examples = Dataset.from_dict({"text": ["w1 w2", "w3"]})
        rows = encode_tokens(examples, tiny_tokenizer(), column="text", labels=None, config=CONFIG, max_length=9)
        assert "labels" not in rows.column_names and rows["is_target"][1] == [False, True, False]
        assert count_predictions(rows).tolist() == [2, 1]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batches_have_labels_and_targets_at_their_tokens_on_either_side(self, side):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        rows = Dataset.from_list([row for row in token_rows(20) if row["labels"]])
        rows = encode_tokens(rows, tokenizer, column="tokens", labels="labels", config=CONFIG, max_length=24)
        batch = DataCollatorForTask(tokenizer)([rows[i] for i in range(len(rows))])
        # The words tell the classes: w0 is 5.
        words = batch["input_ids"] - 5
        expected = (words % 3).where((batch["attention_mask"] == 1) & (words >= 0), -100)
        assert (batch["labels"] == expected).all()
        assert batch["target_positions"].tolist() == (expected >= 0).flatten().nonzero().squeeze(1).tolist()


def asked(tokenizer, rows, **options):
    settings = {"columns": ("question", "context"), "labels": "answers", "max_length": 64, "doc_stride": 0} | options
    return list(encode_questions(Dataset.from_list(rows), tokenizer, **settings))


def answer_of(tokenizer, row):
    begin, end = row["labels"]
    return tokenizer.decode(row["input_ids"][begin : end + 1]).strip()


class TestQuestions:
    @pytest.mark.parametrize("make", [pieces, bytes_with_spaces])
    def test_the_span_holds_the_answer(self, make):
        text = "the undoing is new york ."
        rows = [
            {"question": "who ?", "context": text, "answers": {"text": [text[i:j]], "answer_start": [i]}}
            for i, j in ((0, 3), (4, 11), (15, 23), (15, 24), (24, 25))
        ]
        tokenizer = make()
        found = [answer_of(tokenizer, row) for row in asked(tokenizer, rows)]
        assert found == ["the", "undoing", "new york", "new york", "."]

    def test_half_a_token_is_answered_by_the_whole(self):
        row = {"question": "who ?", "context": "the undoing", "answers": {"text": ["ndo"], "answer_start": [5]}}
        assert answer_of(pieces(), asked(pieces(), [row])[0]) == "undo"

    def test_no_answer_and_an_unknown_one(self):
        text = {"question": "w1", "context": "w2 w3"}
        nothing = {"text": [], "answer_start": []}
        first, second = asked(tiny_tokenizer(), [text | {"answers": nothing}, text | {"answers": None}])
        assert first["labels"] == [0, 0] and second["labels"] == [-100, -100]
        # The text and [CLS] may be answers, the question may not.
        assert first["is_target"] == [True, False, False, True, True, False]
        assert asked(tiny_tokenizer(), [text], labels=None)[0].keys() == {
            "input_ids",
            "token_type_ids",
            "is_target",
        } - (set() if "token_type_ids" in tiny_tokenizer().model_input_names else {"token_type_ids"})

    @pytest.mark.parametrize("stride", [0, 2])
    def test_windows_cover_the_text_and_know_whether_they_hold_the_answer(self, stride):
        words = [f"w{i}" for i in range(20)]
        text, begin = " ".join(words), len(" ".join(words[:9])) + 1
        row = {"question": "w30", "context": text, "answers": {"text": ["w9 w10"], "answer_start": [begin]}}
        tokenizer = tiny_tokenizer()
        windows = asked(tokenizer, [row], max_length=10, doc_stride=stride)
        shown = [tokenizer.decode(window["input_ids"][3:-1]).split() for window in windows]
        assert all(window["input_ids"][:3] == [2, 35, 3] and len(window["input_ids"]) <= 10 for window in windows)
        assert [word for window in shown for word in window[:None]][0] == "w0" and shown[-1][-1] == "w19"
        for first, second in zip(shown, shown[1:], strict=False):
            assert words.index(second[0]) == words.index(first[-1]) + 1 - stride
        for window, inside in zip(windows, shown, strict=True):
            whole = {"w9", "w10"} <= set(inside)
            assert (answer_of(tokenizer, window) == "w9 w10") if whole else (window["labels"] == [0, 0])
        assert any({"w9", "w10"} <= set(inside) for inside in shown)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batches_have_spans_at_their_tokens_on_either_side(self, side):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        rows = asked(tokenizer, question_rows(20))
        batch = DataCollatorForTask(tokenizer)(rows)
        assert batch["labels"].shape == (20, 2)
        for ids, span, row in zip(batch["input_ids"], batch["labels"].tolist(), rows, strict=True):
            begin, end = row["labels"]
            if begin == -100:
                assert span == [-100, -100]
            else:
                assert ids[span[0] : span[1] + 1].tolist() == row["input_ids"][begin : end + 1]

    @pytest.mark.parametrize(
        ("changes", "options", "match"),
        [
            (
                {"answers": {"text": ["w9"], "answer_start": [1]}},
                {},
                "row 0: the answer 'w9' does not begin at character 1",
            ),
            ({"context": " "}, {}, "row 0 has no text"),
            ({"question": "w1 " * 9}, {"max_length": 12}, "a question of 9 tokens leaves no room"),
            ({}, {"max_length": 8, "doc_stride": 4}, "lower doc_stride"),
        ],
    )
    def test_bad_rows_are_refused(self, changes, options, match):
        row = {"question": "w1", "context": "w2 w3", "answers": {"text": ["w2"], "answer_start": [0]}} | changes
        with pytest.raises(InputError, match=match):
            asked(tiny_tokenizer(), [row], **options)


class TestFiles:
    def prepare(self, task, path, **options):
        args = TaskDataArguments(
            **{"train_file": [str(path)], "validation_fraction": 0.0, "max_length": 24, "doc_stride": 4, **options}
        )
        return prepare_task(args, tokenizer=tiny_tokenizer(), config=CONFIG, seed=0, task=task)

    def test_a_file_of_squads_form(self, tmp_path):
        rows = [row for row in question_rows(30) if row["answers"] is not None]
        listed = [
            [{"text": a, "answer_start": b} for a, b in zip(*row["answers"].values(), strict=True)] for row in rows
        ]
        paragraphs = [
            {"context": row["context"], "qas": [{"id": str(i), "question": row["question"], "answers": answers}]}
            for i, (row, answers) in enumerate(zip(rows, listed, strict=True))
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"version": "2", "data": [{"title": "a", "paragraphs": paragraphs}]}))
        squad = self.prepare(QUESTIONS, path)
        plain = self.prepare(QUESTIONS, write_rows(tmp_path / "rows.jsonl", rows))
        assert list(squad.train_dataset) == list(plain.train_dataset)
        assert squad.description["windows"] == len(rows) and squad.description["labels"] == "answers"
        for paragraph in paragraphs:
            del paragraph["qas"][0]["answers"]
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
        assert "labels" not in self.prepare(QUESTIONS, path).train_dataset.column_names

    def test_words_of_parquet_and_lines_are_the_same(self, tmp_path):
        rows = token_rows(20)
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        both = [
            self.prepare(TOKENS, path).train_dataset
            for path in (tmp_path / "rows.parquet", write_rows(tmp_path / "rows.jsonl", rows))
        ]
        assert list(both[0]) == list(both[1]) and "labels" in both[0].column_names

    @pytest.mark.parametrize(
        ("task", "row", "options", "match"),
        [
            (TOKENS, {"tokens": ["w1", "w2"], "labels": ["A"]}, {}, "row 0 has 2 words and 1 'labels'"),
            (TOKENS, {"tokens": ["w1"], "labels": ["C"]}, {}, "holds 'C', but the model's labels are O, A, B"),
            (TOKENS, {"tokens": ["w1"], "labels": "A"}, {}, "label_column='labels' holds no lists"),
            (TOKENS, {"text": "w1", "labels": ["A"]}, {}, "text_columns names 'text', which holds texts"),
            (
                TOKENS,
                {"a": ["w1"], "b": ["w2"]},
                {"text_columns": ["a", "b"]},
                "token-classification needs one column",
            ),
            (QUESTIONS, {"question": "w1", "text": "w2"}, {}, "no column of a usual name"),
            (QUESTIONS, {"question": "w1"}, {"text_columns": ["question"]}, "needs two columns"),
            (
                TOKENS,
                {"tokens": ["w1"]},
                {"augmentation_model": "x"},
                "augmentation_model: with task='token-classific",
            ),
            (
                QUESTIONS,
                {"question": "w1", "context": "w2"},
                {"augmentation_model": "x"},
                "augmentation_model: with task",
            ),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, task, row, options, match):
        with pytest.raises(InputError, match=match):
            self.prepare(task, write_rows(tmp_path / "rows.jsonl", [row]), **options)

    def test_held_out_examples_need_the_same_columns(self, tmp_path):
        train = write_rows(tmp_path / "train.jsonl", [{"tokens": ["w1"], "labels": ["A"]}])
        dev = write_rows(tmp_path / "dev.jsonl", [{"tokens": ["w1"]}])
        with pytest.raises(InputError, match="have no 'labels'"):
            self.prepare(TOKENS, train, validation_file=[dev])

    def test_a_stride_is_not_negative(self):
        with pytest.raises(InputError, match="doc_stride=-1"):
            TaskDataArguments(doc_stride=-1)
