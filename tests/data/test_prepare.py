"""From options to examples."""

import contextlib
import dataclasses
import json
import math

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig, BertTokenizer, HfArgumentParser, TrainingArguments
from transformers.utils import logging

from hf_pretrain.data import draws, prepare, run_tokenizer
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.prepare import DataArguments, prepare_data
from hf_pretrain.data.streaming.blocks import StreamingBlocks
from hf_pretrain.data.text import docstrings as corpus
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainingArguments

WORDS = (
    "the a model reader text corpus learns reads writes long short new old good word sentence quickly slowly".split()
)


def make_documents(count, *, seed):
    """Documents of three sentences, all different."""
    picks = draws.integers(draws.row_keys(range(count), seed=seed, stream="test"), 15, high=len(WORDS)).tolist()
    return [
        " ".join(" ".join(WORDS[w] for w in row[k : k + 5]).capitalize() + f" {i}." for k in (0, 5, 10))
        for i, row in enumerate(picks)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(make_documents(120, seed=1)))
    return str(path)


def arguments(train_file=None, **options):
    files = [train_file] if train_file else None
    return DataArguments(**{"train_file": files, "vocab_size": 200, "block_size": 32, **options})


def text_of(dataset, tokenizer):
    return [tokenizer.decode(dataset[i]["input_ids"], skip_special_tokens=True) for i in range(len(dataset))]


def numbers_in(dataset, tokenizer):
    """The number that each sentence of a document ends in, of all documents in a dataset."""
    return {int(n) for text in text_of(dataset, tokenizer) for n in text.replace(".", " ").split() if n.isdigit()}


def test_files_to_blocks(train_file, tmp_path):
    data = prepare_data(arguments(train_file, validation_fraction=0.1), seed=1, output_dir=tmp_path / "out")
    assert isinstance(data.train_dataset, BlockDataset) and isinstance(data.eval_dataset, BlockDataset)
    assert isinstance(data.tokenizer, BertTokenizer)
    assert data.block_size == 32
    example = data.train_dataset[0]
    assert len(example["input_ids"]) <= 32
    assert example["input_ids"][0] == data.tokenizer.cls_token_id
    train, held_out = (numbers_in(d, data.tokenizer) for d in (data.train_dataset, data.eval_dataset))
    assert not train & held_out
    assert train | held_out == set(range(120))
    assert len(held_out) == 12


def test_description_holds_what_is_there(train_file, tmp_path):
    args = arguments(train_file, validation_fraction=0.1)
    data = prepare_data(args, seed=1, output_dir=tmp_path)
    description = data.description
    assert json.loads(json.dumps(description)) == description
    assert description["source"] == "train.txt"
    # The options hold paths; the card takes them without.
    assert str(tmp_path) not in json.dumps({name: value for name, value in description.items() if name != "options"})
    assert (description["documents"], description["held_out_documents"]) == (108, 12)
    assert description["blocks"] == len(data.train_dataset)
    assert description["held_out_blocks"] == len(data.eval_dataset)
    documents = make_documents(120, seed=1)
    assert description["bytes"] + description["held_out_bytes"] == sum(map(len, documents))
    assert description["characters"] + description["held_out_characters"] == sum(map(len, documents))
    ids = data.tokenizer(documents, add_special_tokens=False)["input_ids"]
    assert description["tokens"] + description["held_out_tokens"] == sum(map(len, ids))
    assert (description["tokenizer"], description["vocab_size"]) == ("WordPiece", len(data.tokenizer))


def test_run_seed_does_not_change_the_data(train_file, tmp_path):
    args = arguments(train_file, validation_fraction=0.1)
    texts = []
    for seed, split_seed in ((1, 0), (2, 0), (1, 7)):
        args.split_seed = split_seed
        data = prepare_data(args, seed=seed, output_dir=tmp_path / f"{seed}-{split_seed}")
        texts.append(numbers_in(data.eval_dataset, data.tokenizer))
    assert texts[0] == texts[1] != texts[2]


def test_held_out_text_does_not_reach_the_tokenizer(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(f"{chr(0x4E00 + i)} word" for i in range(20)))
    args = arguments(str(path), validation_fraction=0.25, vocab_size=400)
    data = prepare_data(args, seed=1, output_dir=tmp_path / "out")
    known = {token for token in data.tokenizer.get_vocab() if "\u4e00" <= token <= "\u9fff"}
    assert len(known) == 15
    assert all(data.tokenizer.unk_token_id in block["input_ids"] for block in [data.eval_dataset[0]])


def test_validation_file(train_file, tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("\n\n".join(make_documents(130, seed=1)[120:]))
    data = prepare_data(arguments(train_file, validation_file=[str(path)]), seed=1, output_dir=tmp_path / "out")
    assert data.description["documents"] == 120
    assert data.description["held_out_source"] == "valid.txt"
    assert numbers_in(data.eval_dataset, data.tokenizer) == set(range(120, 130))


def test_nothing_held_out(train_file, tmp_path):
    data = prepare_data(arguments(train_file, validation_fraction=0.0), seed=1, output_dir=tmp_path / "out")
    assert data.eval_dataset is None
    assert data.description["documents"] == 120
    assert "held_out_documents" not in data.description


def test_one_document_can_not_be_split(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("One document.\nOf two lines.")
    with pytest.raises(InputError, match="document_separator"):
        prepare_data(arguments(str(path)), seed=1, output_dir=tmp_path / "out")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_trained_tokenizer_is_saved_and_found_again(train_file, tmp_path, monkeypatch, kind):
    args = arguments(train_file, tokenizer_type=kind, vocab_size=300)
    first = prepare_data(args, seed=1, output_dir=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == first.tokenizer.get_vocab()
    assert first.tokenizer.model_max_length == args.block_size
    with monkeypatch.context() as patch:
        patch.setattr(run_tokenizer, "train_tokenizer", lambda *_, **__: pytest.fail("trained twice"))
        patch.setattr(
            "hf_pretrain.data.documents.documents._counted_columns", lambda *_, **__: pytest.fail("tokenized twice")
        )
        again = prepare_data(args, seed=2, output_dir=tmp_path / "out")
        # A resumed run hands in the tokenizer of its checkpoint.
        first.tokenizer.save_pretrained(tmp_path / "checkpoint")
        resumed = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
        third = prepare_data(args, seed=1, output_dir=tmp_path / "elsewhere", tokenizer=resumed)
    assert text_of(first.train_dataset, first.tokenizer) == text_of(again.train_dataset, again.tokenizer)
    assert text_of(first.train_dataset, first.tokenizer) == text_of(third.train_dataset, third.tokenizer)
    assert not (tmp_path / "elsewhere").exists()


def test_tokenizer_of_other_options_is_not_taken(train_file, tmp_path):
    for options in ({"vocab_size": 200}, {"vocab_size": 180}, {"vocab_size": 180, "lowercase": False}):
        data = prepare_data(arguments(train_file, **options), seed=1, output_dir=tmp_path / "out")
        assert len(data.tokenizer) <= options["vocab_size"]
        assert data.tokenizer.do_lower_case is options.get("lowercase", True)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == data.tokenizer.get_vocab()


def test_named_tokenizer(train_file, tmp_path):
    prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "first")
    args = arguments(train_file, tokenizer_name=str(tmp_path / "first"))
    data = prepare_data(args, seed=1, output_dir=tmp_path / "second")
    assert data.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "first").get_vocab()
    assert not list(tmp_path.glob("second/*"))
    with pytest.raises(InputError, match="tokenizer_name='no/such'") as error:
        prepare_data(arguments(train_file, tokenizer_name="no/such"), seed=1, output_dir=tmp_path / "third")
    assert "\n" not in str(error.value)


def test_everything_is_written_while_the_first_process_works(train_file, tmp_path, monkeypatch):
    state = {"inside": False, "entered": 0}

    @contextlib.contextmanager
    def first():
        state.update(inside=True, entered=state["entered"] + 1)
        yield
        state["inside"] = False

    of_preparing = {"text_dataset": prepare, "train_tokenizer": run_tokenizer, "tokenize_documents": prepare}
    for name, module in of_preparing.items():
        original = getattr(module, name)

        def checked(*args, original=original, **options):
            assert state["inside"]
            return original(*args, **options)

        monkeypatch.setattr(module, name, checked)
    prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "out", first=first())
    assert state == {"inside": False, "entered": 1}


def test_part_of_the_corpus(train_file, tmp_path):
    data = prepare_data(arguments(train_file, max_corpus_bytes=3000), seed=1, output_dir=tmp_path / "out")
    used = data.description["bytes"] + data.description["held_out_bytes"]
    assert 2700 < used <= 3000
    numbers = numbers_in(data.train_dataset, data.tokenizer)
    assert min(numbers) < 40 and max(numbers) > 80


def test_workers_change_nothing(train_file, tmp_path, monkeypatch):
    asked, original = [], prepare.tokenize_documents

    def spy(*args, **options):
        asked.append(options["num_proc"])
        return original(*args, **options)

    monkeypatch.setattr(prepare, "tokenize_documents", spy)
    data = []
    for workers in (None, 2):
        # A cache of its own, or the second would open the documents of the first.
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{workers}")
        args = arguments(train_file, preprocessing_num_workers=workers)
        data.append(prepare_data(args, seed=1, output_dir=tmp_path / f"{workers}"))
    assert asked == [None, None, 2, 2]
    assert text_of(data[0].train_dataset, data[0].tokenizer) == text_of(data[1].train_dataset, data[1].tokenizer)


def test_dataset_by_name(tmp_path):
    folder = tmp_path / "my-data"
    folder.mkdir()
    rows = [json.dumps({"body": text}) for text in make_documents(50, seed=1)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    args = arguments(dataset_name=str(folder), text_column="body", vocab_size=150)
    data = prepare_data(args, seed=1, output_dir=tmp_path / "out")
    assert data.description["documents"] + data.description["held_out_documents"] == 50
    with pytest.raises(InputError, match="text_column='text'"):
        prepare_data(dataclasses.replace(args, text_column="text"), seed=1, output_dir=tmp_path / "out")


def test_docstrings_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_source_files", lambda: [(f"m{i}", tmp_path / f"m{i}.py") for i in range(30)])
    for i, text in enumerate(make_documents(30, seed=1)):
        (tmp_path / f"m{i}.py").write_text(f'"""{text} {text} {text} {text}"""')
    with pytest.raises(InputError, match="no text to train on: give --train_file .*--demo_corpus true"):
        prepare_data(arguments(max_corpus_bytes=8000), seed=1, output_dir=tmp_path / "out")
    data = prepare_data(arguments(demo_corpus=True, max_corpus_bytes=8000), seed=1, output_dir=tmp_path / "out")
    assert "docstrings" in data.description["source"]
    assert 5000 < data.description["bytes"] + data.description["held_out_bytes"] <= 8000


class TestStreaming:
    def test_same_text_as_without(self, train_file, tmp_path):
        valid = tmp_path / "valid.txt"
        valid.write_text("Held out text.")
        stored = prepare_data(arguments(train_file, validation_fraction=0.0), seed=1, output_dir=tmp_path / "a")
        args = arguments(train_file, streaming=True, shuffle_buffer_size=0, validation_file=[str(valid)])
        data = prepare_data(args, seed=1, output_dir=tmp_path / "b")
        assert isinstance(data.train_dataset, StreamingBlocks)
        streamed = [data.tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in data.train_dataset]
        assert streamed == text_of(stored.train_dataset, stored.tokenizer)
        assert data.description["held_out_documents"] == 1
        assert "tokens" not in data.description

    def test_options_reach_the_stream(self, train_file, tmp_path):
        data = prepare_data(arguments(train_file, streaming=True), seed=5, output_dir=tmp_path / "a")
        assert (data.train_dataset.seed, data.train_dataset.shuffle_buffer_size) == (5, 10_000)
        assert data.eval_dataset is None
        ids = [example["example_id"] for example in data.train_dataset]
        assert ids != sorted(ids)

    def test_named_dataset(self, tmp_path):
        (tmp_path / "data").mkdir()
        rows = [json.dumps({"body": text}) for text in make_documents(50, seed=1)]
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
        args = arguments(dataset_name=str(tmp_path / "data"), text_column="body", streaming=True, vocab_size=150)
        data = prepare_data(args, seed=1, output_dir=tmp_path / "out")
        assert len(list(data.train_dataset)) > 20
        with pytest.raises(InputError, match="text_column='text'"):
            prepare_data(dataclasses.replace(args, text_column="text"), seed=1, output_dir=tmp_path / "out")


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"train_file": ["a"], "dataset_name": "b"},
            {"dataset_config_name": "b"},
            {"validation_fraction": 1.0},
            {"validation_fraction": -0.1},
            {"block_size": 0},
            {"vocab_size": 0},
            {"max_corpus_bytes": 0},
            {"preprocessing_num_workers": 0},
            {"streaming": True},
            {"block_size": 3},
            {"block_size": 10**20},
            {"vocab_size": 10**20},
            {"shuffle_buffer_size": -1},
            {"preprocessing_num_workers": 10**6},
            {"validation_fraction": math.nan},
            {"max_unknown_share": math.nan},
            {"max_unknown_share": -0.1},
            {"max_unknown_share": 5.0},
            {"word_segmenter": "no_such_module:function"},
            {"streaming": True, "train_file": ["a"], "max_corpus_bytes": 5},
        ],
    )
    def test_contradictions(self, options):
        with pytest.raises(InputError) as error:
            DataArguments(**options)
        assert "\n" not in str(error.value)
        assert any(f"{name}=" in str(error.value) for name in options)

    def test_command_line(self, capsys):
        parser = HfArgumentParser((DataArguments, TrainingArguments))
        line = "--train_file a.txt b.txt --tokenizer_type bpe --lowercase false --streaming --max_corpus_bytes 5000"
        with pytest.raises(InputError, match="streaming"):
            parser.parse_args_into_dataclasses(line.split())
        args, _ = parser.parse_args_into_dataclasses(line.replace("--streaming ", "").split())
        assert args == DataArguments(
            train_file=["a.txt", "b.txt"], tokenizer_type="bpe", lowercase=False, max_corpus_bytes=5000
        )
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--block_mode", "pages"])
        with pytest.raises(SystemExit):
            parser.parse_args_into_dataclasses(["--help"])
        assert "max_corpus_bytes" in capsys.readouterr().out

    def test_every_field_is_documented_and_no_option_is_taken(self):
        for field in dataclasses.fields(DataArguments):
            assert "%" not in field.metadata["help"] and field.metadata["help"].endswith(".")
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        assert not names & {field.name for field in dataclasses.fields(DataArguments)}


def test_blocks_have_the_arrays_that_collators_take(train_file, tmp_path):
    data = prepare_data(arguments(train_file, block_mode="doc_sentences"), seed=1, output_dir=tmp_path / "out")
    example = data.train_dataset[3]
    assert example["input_ids"].dtype == np.int32 and example["word_starts"].dtype == np.bool_
    assert len(numbers_in([example], data.tokenizer)) == 1


DNA = ["".join("ACGT"[(i * k + k // 7) % 4] for k in range(1, 400)) for i in range(60)]
CYRILLIC = [
    text.translate({ord("a") + k: 0x430 + k for k in range(26)}).lower() for text in make_documents(60, seed=2)
]


@pytest.fixture
def written(tmp_path):
    def write(texts, name="text.txt"):
        (tmp_path / name).write_text("\n\n".join(texts), encoding="utf-8")
        return str(tmp_path / name)

    return write


class TestTokenizerThatSuits:
    def test_prose_has_what_it_had(self, train_file, tmp_path, capsys):
        data = prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "out")
        named = arguments(train_file, tokenizer_type="wordpiece", lowercase=True)
        same = prepare_data(named, seed=1, output_dir=tmp_path / "named").tokenizer
        assert data.tokenizer.backend_tokenizer.to_str() == same.backend_tokenizer.to_str()
        assert data.description["tokenizer_reason"] in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("texts", "kind"), [(DNA, "BPE"), (["ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน"] * 30, "Unigram")]
    )
    def test_text_without_spaces_is_known(self, texts, kind, written, tmp_path, capsys):
        data = prepare_data(arguments(written(texts), vocab_size=300), seed=1, output_dir=tmp_path / "out")
        shown = capsys.readouterr().out
        assert data.description["tokenizer"] == kind
        assert data.description["unknown_share"] == 0 == data.description["held_out_unknown_share"]
        assert (
            f"tokenizer: {kind.lower()}," in shown and "without a space" in shown and "unknown tokens: 0 of" in shown
        )
        assert "without a space" in data.description["tokenizer_reason"]
        again = prepare_data(arguments(written(texts), vocab_size=300), seed=1, output_dir=tmp_path / "out")
        assert again.description == data.description

    def test_options_that_are_given_are_kept(self, written, tmp_path):
        args = arguments(written(DNA), tokenizer_type="unigram", lowercase=True)
        data = prepare_data(args, seed=1, output_dir=tmp_path / "out")
        assert data.description["tokenizer"] == "Unigram" and data.tokenizer.tokenize("A") == data.tokenizer.tokenize(
            "a"
        )

    def test_accents_stay_unless_stripped(self, written, tmp_path):
        path = written(["Die Bären hören schöne Bücher."] * 40)
        for strip, expected in ((False, "die bären hören schöne bücher."), (True, "die baren horen schone bucher.")):
            data = prepare_data(arguments(path, strip_accents=strip), seed=1, output_dir=tmp_path / "out")
            ids = data.train_documents["input_ids"][0]
            assert data.tokenizer.decode(ids).replace(" .", ".") == expected


class TestUnknown:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_text_that_the_tokenizer_does_not_know_is_refused(self, streaming, written, tmp_path, train_file):
        english = prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "english").tokenizer
        for texts, options in (
            (DNA, {"tokenizer_type": "wordpiece"}),
            (CYRILLIC, {"tokenizer_name": str(tmp_path / "english")}),
            (CYRILLIC, {"tokenizer": english}),
        ):
            tokenizer = options.pop("tokenizer", None)
            args = arguments(written(texts), streaming=streaming, **options)
            with pytest.raises(InputError, match=r"unknown to the tokenizer.*max_unknown_share=0.05.*bpe") as error:
                prepare_data(args, seed=1, output_dir=tmp_path / "out", tokenizer=tokenizer)
            assert "\n" not in str(error.value) and float(str(error.value).split("%")[0]) > 80
            args.max_unknown_share = 1.0
            data = prepare_data(args, seed=1, output_dir=tmp_path / "out", tokenizer=tokenizer)
            assert data.description["unknown_share"] > 0.8

    def test_a_little_is_warned_of_and_shown(self, written, tmp_path, train_file, capsys, caplog, monkeypatch):
        monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
        english = prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "english").tokenizer
        path = written([*make_documents(120, seed=1), *CYRILLIC[:4]])
        data = prepare_data(
            arguments(path, validation_fraction=0), seed=1, output_dir=tmp_path / "o", tokenizer=english
        )
        assert 0.01 < data.description["unknown_share"] < 0.05
        assert "unknown to the tokenizer" in caplog.text
        assert any(repr(word) in caplog.text for text in CYRILLIC[:4] for word in text.split())
        assert f"for {data.description['unknown_share']:.2%} of the characters" in capsys.readouterr().out

    def test_a_folder_without_a_tokenizer_is_refused(self, train_file, tmp_path):
        BertConfig().save_pretrained(tmp_path / "model")
        with pytest.raises(InputError, match="holds no tokenizer"):
            prepare_data(arguments(train_file, tokenizer_name=str(tmp_path / "model")), seed=1, output_dir=tmp_path)

    def test_a_stream_goes_on_counting(self, train_file, written, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
        monkeypatch.setattr(run_tokenizer, "_STREAM_CHARACTERS", 1000)
        english = prepare_data(arguments(train_file), seed=1, output_dir=tmp_path / "english").tokenizer
        path = written([*make_documents(30, seed=1), *CYRILLIC])
        args = arguments(path, streaming=True)
        data = prepare_data(args, seed=1, output_dir=tmp_path / "out", tokenizer=english)
        assert data.description["unknown_share"] == 0 and 800 <= data.description["unknown_counted_in"] <= 1000
        list(data.train_dataset)
        assert caplog.text.count("unlike its beginning") == 1


def test_null_rows_of_a_stream_are_no_text(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": text}) for text in [None, *make_documents(30, seed=1), None]]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    args = arguments(dataset_name=str(tmp_path / "data"), streaming=True)
    assert len(prepare_data(args, seed=1, output_dir=tmp_path / "out").tokenizer) > 50


def test_whole_words_of_chinese_are_masked_together(written, tmp_path, monkeypatch):
    path = written(["自然语言处理是人工智能的重要方向。我们训练语言模型。"] * 40)
    data = prepare_data(arguments(path, word_segmenter="jieba"), seed=1, output_dir=tmp_path / "out")
    assert data.description["word_segmenter"] == "jieba"
    blocks = EpochDataset.wrap(data.train_dataset)
    masking = MaskedLMTrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], masking_unit="word").masking
    batch = DataCollatorForMaskedLM(data.tokenizer, masking=masking, seed=0)([blocks[k] for k in range(8)])
    hidden, lengths = (batch["labels"] != -100).numpy(), []
    for row in range(8):
        starts = np.flatnonzero(blocks[row]["word_starts"])
        for low, high in zip(starts, [*starts[1:], len(blocks[row]["word_starts"])], strict=True):
            assert hidden[row, low:high].all() or not hidden[row, low:high].any()
            lengths += [high - low] * bool(hidden[row, low])
    assert max(lengths) >= 2
    streamed = prepare_data(
        arguments(path, word_segmenter="jieba", streaming=True, shuffle_buffer_size=0),
        seed=1,
        output_dir=tmp_path / "s",
    )
    example = next(iter(streamed.train_dataset))
    assert 0 < example["word_starts"].sum() < len(example["input_ids"]) - 5
