"""Prepared data against what a run makes of the same text: equal to the bit, however many processes and machines made it."""

import contextlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import xxhash
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from hf_pretrain import cli
from hf_pretrain.commands.corpus.prepare import PrepareArguments, prepare_folder
from hf_pretrain.data import arguments, draws, prepared
from hf_pretrain.data.arguments import MultilingualDataArguments
from hf_pretrain.data.documents.documents import tokenize_documents
from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.data.prepare import DataArguments, prepare_data, read_texts
from hf_pretrain.data.prepared import PieceWriter, open_documents, read_manifest
from hf_pretrain.errors import InputError, RunError

WORDS = "the a Model reader text corpus learns reads writes long short new old good word sentence über naïve".split()
MODES = ["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"]
# No text to train on is forgotten, empty or unknown.
ODD = ["", "   ", "\u4e2d\u4e2d\u4e2d", None, "one", "\u200b"]


def make_texts(count=60, *, seed=0, huge=()):
    keys = draws.row_keys(np.arange(count), seed=seed, stream="prepared")
    numbers = draws.integers(keys, 61, high=1 << 20).tolist()
    texts = []
    for k, row in enumerate(numbers):
        words = WORDS * 80 if k in huge else [WORDS[n % len(WORDS)] for n in row[1 : 2 + row[0] % 60]]
        texts.append(". ".join(" ".join(words[i : i + 6]) for i in range(0, len(words), 6)) + f". {k}")
        if k % 10 == 9:
            texts.append(ODD[k // 10 % len(ODD)])
    return texts


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Many pieces, and many groups in each, of little text; a cache of its own."""
    monkeypatch.setattr(prepared, "_LEAST_BYTES", 900)
    monkeypatch.setattr(prepared, "_GROUP_BYTES", 300)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl", make_texts(huge=(7,)))


@pytest.fixture
def named(tmp_path):
    trained = train_tokenizer([text or "" for text in make_texts()], kind="bpe", vocab_size=300)
    trained.save_pretrained(tmp_path / "bpe")
    return str(tmp_path / "bpe")


@contextlib.contextmanager
def recorded():
    """The warnings of the options."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    arguments.logger.addHandler(handler)
    try:
        yield lines
    finally:
        arguments.logger.removeHandler(handler)


def prepare(corpus, folder, **options):
    options = {"num_workers": 1, "max_unknown_share": 0.5, **options}
    return prepare_folder(PrepareArguments(output_dir=str(folder), train_file=[corpus] if corpus else None, **options))


def run_of(corpus, folder, **options):
    """What a run makes of the text itself."""
    files = [corpus] if corpus else None
    options = {"train_file": files, "block_size": 32, "max_unknown_share": 0.5, **options}
    return prepare_data(DataArguments(**options), seed=1, output_dir=folder)


def opened(folder, **options):
    args = DataArguments(prepared_data=str(folder), **{"block_size": 32, "max_unknown_share": 0.5, **options})
    return prepare_data(args, seed=1, output_dir=folder.parent / "out")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def assert_equal_data(found, expected):
    assert prepared.key_of(found.tokenizer) == prepared.key_of(expected.tokenizer)
    assert found.tokenizer.model_max_length == expected.tokenizer.model_max_length
    for part in ("train", "eval"):
        documents, others = (getattr(data, f"{part}_documents") for data in (found, expected))
        assert (documents is None) == (others is None)
        if others is not None:
            assert documents.features == others.features
            assert documents.to_list() == others.to_list()
        blocks, others = (getattr(data, f"{part}_dataset") for data in (found, expected))
        for block, other in zip(blocks or [], others or [], strict=True):
            assert block.keys() == other.keys()
            assert all(np.array_equal(block[name], other[name]) for name in other)
            assert [block[name].dtype for name in other] == [other[name].dtype for name in other]
    facts, others = ({k: v for k, v in data.description.items() if k != "options"} for data in (found, expected))
    assert facts == others


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "auto"])
def test_documents_and_blocks_are_those_of_a_run(corpus, tmp_path, kind):
    options = {"tokenizer_type": kind, "vocab_size": 300, "validation_fraction": 0.1}
    manifest = prepare(corpus, tmp_path / "prepared", **options)
    assert len(manifest["train"]["documents_of_pieces"]) > 4
    for mode in MODES:
        expected = run_of(corpus, tmp_path / "out", block_mode=mode, **options)
        found = opened(tmp_path / "prepared", block_mode=mode)
        assert_equal_data(found, expected)
        for name in options:
            assert found.description["options"][name] == expected.description["options"][name]
    assert any(len(ids) > 1000 for ids in found.train_documents["input_ids"])


@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 0.0},
        {"split_seed": 3, "validation_fraction": 0.2},
        {"max_corpus_bytes": 4000, "split_seed": 2},
        {"validation_file": ["held_out.jsonl"]},
        {"document_separator": "line", "lowercase": True, "strip_accents": True},
        {"word_segmenter": "helpers.tiny_text:one_word"},
    ],
)
def test_every_choice_of_text_is_that_of_a_run(corpus, tmp_path, options, monkeypatch):
    import helpers.tiny_text

    monkeypatch.setattr(helpers.tiny_text, "one_word", lambda text: [text], raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "held_out.jsonl", make_texts(9, seed=5))
    if "document_separator" in options:
        corpus = tmp_path / "lines.txt"
        corpus.write_text("\n".join(text for text in make_texts() if text), encoding="utf-8")
    options = {"vocab_size": 150, **options}
    prepare(str(corpus), tmp_path / "prepared", **options)
    assert_equal_data(opened(tmp_path / "prepared"), run_of(str(corpus), tmp_path / "out", **options))


def test_any_number_of_processes_and_machines_writes_the_same_bytes(corpus, named, tmp_path):
    options = {"tokenizer_name": named, "validation_fraction": 0.1}
    prepare(corpus, tmp_path / "one", **options)
    prepare(corpus, tmp_path / "two", **options, num_workers=2)
    for shard in ("3/3", "1/3"):
        assert prepare(corpus, tmp_path / "shards", **options, shard=shard) is None
        assert not (tmp_path / "shards" / "prepared.json").exists()
    with pytest.raises(InputError, match="is not finished: start hf-pretrain prepare"):
        opened(tmp_path / "shards")
    assert prepare(corpus, tmp_path / "shards", **options, shard="2/3") is not None
    # More machines than pieces: some have nothing to do, and a last call makes what is missing.
    assert prepare(corpus, tmp_path / "many", **options, shard="999/1000") is None
    assert not list((tmp_path / "many").rglob("*.arrow"))
    assert prepare(corpus, tmp_path / "many", **options, num_workers=2) is not None
    files = contents(tmp_path / "one")
    assert sum(name.startswith("train/") and name.endswith(".arrow") for name in files) > 4
    for folder in ("two", "shards", "many"):
        assert contents(tmp_path / folder) == files
    assert_equal_data(opened(tmp_path / "two"), run_of(corpus, tmp_path / "out", **options))


def test_text_is_measured_and_cut_as_a_plain_loop_does(monkeypatch):
    texts = make_texts() + ["", "\U0001f600 naïve", None]
    monkeypatch.setattr(prepared, "_BATCH_ROWS", 7)
    plain = datasets.Dataset.from_dict({"text": texts})
    large = plain.cast(datasets.Features({"text": datasets.Value("large_string")}))
    rows = list(range(len(texts)))
    sizes = [len((text or "").encode()) for text in texts]
    for dataset, order in ((plain, rows), (large, rows), (plain.select(rows[9:50]), rows[9:50]), (plain, rows[::-3])):
        measured = prepared.measure(dataset if order in (rows, rows[9:50]) else dataset.select(order))
        assert measured.num_bytes.tolist() == [sizes[row] for row in order]
        assert measured.facts["bytes"] == sum(measured.num_bytes)
        assert measured.facts["characters"] == sum(len(texts[row] or "") for row in order)
        digest = xxhash.xxh3_128()
        for low in range(0, len(order), 7):
            batch = order[low : low + 7]
            digest.update(np.array([sizes[row] for row in batch], dtype=np.int64).tobytes())
            digest.update(b"".join((texts[row] or "").encode() for row in batch))
        assert measured.facts["digest"] == digest.hexdigest()
        for size in (1, 50, 300, 1 << 20):
            bounds, begin = [0], 0
            for number, num_bytes in enumerate(measured.num_bytes.tolist()):
                if number and begin // size != (begin - measured.num_bytes[number - 1]) // size:
                    bounds.append(number)
                begin += num_bytes
            assert prepared.cuts(measured.num_bytes, size) == [*bounds, len(order)]
    assert prepared.cuts(np.empty(0, np.int64), 5) == [0, 0]


def test_the_first_shard_trains_the_tokenizer_for_the_others(corpus, tmp_path):
    folder = tmp_path / "shards"
    with pytest.raises(InputError, match=r"shard='2/2' finds no tokenizer in output_dir=.*start shard 1/2 first"):
        prepare(corpus, folder, shard="2/2", vocab_size=150)
    assert prepare(corpus, folder, shard="1/2", vocab_size=150) is None
    assert prepare(corpus, folder, shard="2/2", vocab_size=150) is not None
    prepare(corpus, tmp_path / "one", vocab_size=150)
    assert contents(folder) == contents(tmp_path / "one")


def test_a_stopped_run_goes_on_with_what_is_missing(corpus, named, tmp_path, monkeypatch):
    options = {"tokenizer_name": named, "validation_fraction": 0.1}
    prepare(corpus, tmp_path / "whole", **options)
    document_rows, calls = prepared.document_rows, []

    def stopping(texts, *args, **others):
        calls.append(len(texts))
        if len(calls) > 9:
            raise KeyboardInterrupt
        return document_rows(texts, *args, **others)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "document_rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "stopped", **options)
    written = {name: data for name, data in contents(tmp_path / "stopped").items() if name.startswith("train/")}
    assert 2 <= len(written) < 12
    # As a kill leaves it: a file that was being written, one without its counts, and one that was cut.
    first, *_ = sorted((tmp_path / "stopped" / "train").glob("*.arrow"))
    (tmp_path / "stopped" / "train" / "00003.arrow.host.1.part").write_bytes(first.read_bytes()[:50])
    shutil.copy(first, tmp_path / "stopped" / "train" / "00004.arrow")
    first.write_bytes(first.read_bytes()[:-8])
    made = []
    write_one = PieceWriter.write
    monkeypatch.setattr(
        PieceWriter, "write", lambda self, *piece: made.append(piece) or write_one(self, *piece), raising=True
    )
    prepare(corpus, tmp_path / "stopped", **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert ("train", 0) in made and ("train", 1) not in made and ("train", 4) in made
    made.clear()
    prepare(corpus, tmp_path / "stopped", **options)
    assert not made


def test_a_killed_worker_is_one_line(corpus, named, tmp_path, monkeypatch):
    parent, write_one = os.getpid(), PieceWriter.write

    def killed(self, part, number):
        return os._exit(9) if os.getpid() != parent and number == 3 else write_one(self, part, number)

    with monkeypatch.context() as patch:
        patch.setattr(PieceWriter, "write", killed)
        with pytest.raises(RunError, match="was killed.*fewer --num_workers than 2"):
            prepare(corpus, tmp_path / "prepared", tokenizer_name=named, num_workers=2)
    prepare(corpus, tmp_path / "prepared", tokenizer_name=named, num_workers=2)
    prepare(corpus, tmp_path / "whole", tokenizer_name=named)
    assert contents(tmp_path / "prepared") == contents(tmp_path / "whole")


def test_other_text_or_options_are_refused_or_made_anew(corpus, tmp_path):
    folder = tmp_path / "prepared"
    before = prepare(corpus, folder, vocab_size=150)
    files = contents(folder)
    for options, message in (
        ({"vocab_size": 160}, "was begun with vocab_size=150, not 160"),
        ({"vocab_size": 150, "split_seed": 1}, "was begun with split_seed=0, not 1"),
        ({"vocab_size": 150, "max_corpus_bytes": 900}, "was begun with max_corpus_bytes=None, not 900"),
        ({"vocab_size": 150, "added_tokens": ["<x>"]}, "another tokenizer"),
    ):
        with pytest.raises(InputError, match=f"{message}.*--overwrite_output_dir true"):
            prepare(corpus, folder, **options)
        if "added_tokens" not in options:
            assert contents(folder) == files
    prepare(corpus, folder, vocab_size=150)
    assert contents(folder) == files
    # Same size, other letters.
    texts = make_texts(huge=(7,))
    texts[3] = texts[3][::-1]
    write(tmp_path / "corpus.jsonl", texts)
    with pytest.raises(InputError, match="was begun with other text, or the text has changed since"):
        prepare(corpus, folder, vocab_size=150)
    assert contents(folder) == files
    after = prepare(corpus, folder, vocab_size=150, overwrite_output_dir=True)
    assert [after[part]["digest"] for part in prepared.PARTS] != [before[part]["digest"] for part in prepared.PARTS]
    assert_equal_data(opened(folder), run_of(corpus, tmp_path / "out", vocab_size=150))
    # A file that is written anew, but the same, is not another text.
    write(tmp_path / "corpus.jsonl", texts)
    assert prepare(corpus, folder, vocab_size=150) == after


def test_a_folder_of_others_is_left_alone(corpus, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds letter\.txt, which is not of prepare"):
            prepare(corpus, folder, vocab_size=150, overwrite_output_dir=overwrite)
    assert contents(folder) == {"letter.txt": b"dear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/2"}, "shard='0/2' is none of 2"),
        ({"shard": "3/2"}, "shard='3/2' is none of 2: number them from 1/2 to 2/2"),
        ({"shard": "two"}, "shard='two': write I/N"),
        ({"shard": "1/2", "overwrite_output_dir": True}, "leave one of them out"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"train_file": None}, "no text to train on"),
        ({"dataset_name": "other"}, "give one of the two"),
        ({"tokenizer_name": "bpe", "added_tokens": ["<x>"]}, "leave one of them out"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_reading(options, message):
    with pytest.raises(InputError, match=message):
        PrepareArguments(output_dir="prepared", **{"train_file": ["nowhere.txt"], **options})


def test_text_of_which_the_tokenizer_knows_little_is_refused_as_in_a_run(corpus, tmp_path):
    train_tokenizer(["x"], kind="wordpiece", vocab_size=20).save_pretrained(tmp_path / "other")
    options = {"tokenizer_name": str(tmp_path / "other"), "max_unknown_share": 0.05}
    with pytest.raises(InputError, match=r"more than max_unknown_share=0\.05") as in_a_run:
        run_of(corpus, tmp_path / "out", **options)
    with pytest.raises(InputError, match="more than max_unknown_share=0.05"):
        prepare(corpus, tmp_path / "prepared", **options)
    # Little more than is allowed shows in the end only, and nothing is lost by it.
    share = float(str(in_a_run.value).split("%")[0]) / 100
    options["max_unknown_share"] = 0.9 * share
    with pytest.raises(InputError, match="more than max_unknown_share="):
        prepare(corpus, tmp_path / "prepared", **options)
    assert not (tmp_path / "prepared" / "prepared.json").exists()
    prepare(corpus, tmp_path / "prepared", **options | {"max_unknown_share": 1.0})
    with pytest.raises(InputError, match="are unknown to its tokenizer"):
        opened(tmp_path / "prepared", max_unknown_share=0.9 * share)
    expected = run_of(corpus, tmp_path / "out", **options | {"max_unknown_share": 1.0})
    assert opened(tmp_path / "prepared", max_unknown_share=1.0).description["unknown_share"] == pytest.approx(
        expected.description["unknown_share"], abs=1e-12
    )


def test_text_without_tokens_is_refused_as_in_a_run(tmp_path):
    corpus = write(tmp_path / "empty.jsonl", ["\u200b", "\u200b\u200b"] * 4)
    train_tokenizer(["a text"], kind="wordpiece", vocab_size=40).save_pretrained(tmp_path / "words")
    for make in (prepare, run_of):
        with pytest.raises(InputError, match="texts have no tokens in 7 rows"):
            make(corpus, tmp_path / make.__name__, tokenizer_name=str(tmp_path / "words"))


def test_documents_are_mapped_and_travel_by_name(corpus, named, tmp_path):
    prepare(corpus, tmp_path / "prepared", tokenizer_name=named)
    documents = open_documents(tmp_path / "prepared", "train")
    texts = read_texts(DataArguments(train_file=[corpus])).train
    expected = tokenize_documents(texts, AutoTokenizer.from_pretrained(named))
    assert documents.to_list() == expected.to_list()
    assert documents["doc_id"] == list(range(len(documents)))
    # Nothing of the tokens is in a pickle: a worker opens the files.
    tokens = 4 * sum(map(len, documents["input_ids"]))
    assert len(pickle.dumps(documents)) < tokens / 2
    assert pickle.loads(pickle.dumps(documents)).to_list() == expected.to_list()
    assert {file["filename"].rsplit("/", 1)[-1] for file in documents.cache_files} >= {"00000.arrow", "doc_id.arrow"}
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "prepared", moved)
    again = open_documents(moved, "train")
    assert again.to_list() == expected.to_list() and again._fingerprint == documents._fingerprint


class TestOptions:
    @pytest.fixture
    def folder(self, corpus, tmp_path):
        prepare(corpus, tmp_path / "prepared", vocab_size=150, validation_fraction=0.1, document_separator="line")
        return tmp_path / "prepared"

    def test_options_of_the_text_are_those_it_was_made_with(self, folder):
        args = DataArguments(prepared_data=str(folder))
        assert (args.vocab_size, args.validation_fraction, args.document_separator) == (150, 0.1, "line")
        again = replace(args, block_size=64)
        assert again.validation_fraction == 0.1 and again.block_size == 64
        with pytest.raises(
            InputError, match="split_seed=4, but prepared_data=.* was made with 0: leave split_seed out"
        ):
            DataArguments(prepared_data=str(folder), split_seed=4)
        # As a recipe has them, for runs with and without prepared data.
        with recorded() as lines:
            args = DataArguments(prepared_data=str(folder), vocab_size=30000, validation_fraction=0.005)
            replace(args, block_size=64)
        assert (args.vocab_size, args.validation_fraction) == (150, 0.1)
        assert [line.split(",")[0] for line in lines] == ["validation_fraction=0.005", "vocab_size=30000"]

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            (DataArguments, {"train_file": ["a.txt"]}, r"train_file=\['a.txt'\] does not go with prepared_data"),
            (DataArguments, {"validation_file": ["a.txt"]}, "validation_file"),
            (DataArguments, {"dataset_name": "other"}, "dataset_name='other' does not go with"),
            (DataArguments, {"demo_corpus": True}, "demo_corpus=True does not go with"),
            (DataArguments, {"streaming": True}, "streaming=True does not go with"),
            (MultilingualDataArguments, {"language_file": ["en=a.txt"]}, "does not go with language_file"),
        ],
    )
    def test_text_of_two_sources_is_refused(self, folder, kind, options, message):
        with pytest.raises(InputError, match=message):
            kind(prepared_data=str(folder), **options)

    def test_folders_that_are_none_or_not_whole(self, folder, tmp_path):
        with pytest.raises(InputError, match="is no folder of hf-pretrain prepare"):
            DataArguments(prepared_data=str(tmp_path))
        with pytest.raises(InputError, match="is no folder of hf-pretrain prepare"):
            DataArguments(prepared_data="nowhere")
        path = folder / "train" / "00001.arrow"
        kept = path.read_bytes()
        path.write_bytes(kept[:-1])
        with pytest.raises(InputError, match=r"is damaged, for train/00001\.arrow has"):
            DataArguments(prepared_data=str(folder))
        path.write_bytes(kept)
        manifest = read_manifest(folder)
        (folder / "prepared.json").write_text(json.dumps(manifest | {"version": 0}))
        with pytest.raises(InputError, match="another version"):
            DataArguments(prepared_data=str(folder))

    def test_another_tokenizer_is_refused(self, folder, named):
        with pytest.raises(InputError, match="the tokens of another tokenizer than .*bpe"):
            opened(folder, tokenizer_name=named)
        own = opened(folder, tokenizer_name=str(folder / "tokenizer"))
        assert len(own.train_dataset) == len(opened(folder).train_dataset)

    def test_text_is_asked_for_where_tokens_do_not_do(self, folder):
        args = DataArguments(prepared_data=str(folder))
        with pytest.raises(InputError, match="has the tokens of a text, and the text itself is needed"):
            read_texts(args)
        with pytest.raises(InputError, match="dataset and prepared_data="):
            prepare_data(args, seed=0, output_dir=folder, dataset=["a text", "another"])

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("mlm --train_file a.txt", "does not go with prepared_data"),
            ("mlm --text_column body", "text_column='body'"),
            ("mlm --document_separator file", "document_separator='file'"),
            ("mlm --tokenizer_type bpe", "has no effect beside prepared_data"),
            ("mlm --preprocessing_num_workers 2", "has no effect beside prepared_data"),
            ("mlm --tokenizer_name {named}", "the tokens of another tokenizer"),
            ("mlm --streaming true --max_steps 2", "streaming=True does not go with prepared_data"),
            ("t5_small", "prepare the text with --added_tokens <extra_id_0> ... <extra_id_"),
            (
                "denoise --noise ul2",
                "prepare the text with --added_tokens [NLU] [NLG] [S2S] <extra_id_0> ... <extra_id_",
            ),
            ("elmo", "knows pieces of words"),
            ("contrastive --views pairs --model_name_or_path {model}", "name CSV, TSV or JSON lines with train_file"),
            (
                "distil --teacher_name_or_path {model} --student_layers 0 --trim_vocabulary true",
                "trim_vocabulary=True tokenizes the text once",
            ),
            ("mlm --model_name_or_path {model}", "the tokens of another tokenizer"),
        ],
    )
    def test_programs_refuse_what_prepared_data_cannot_do(self, folder, named, tmp_path, argv, message, capsys):
        config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertForMaskedLM(BertConfig(vocab_size=300, **config)).save_pretrained(tmp_path / "model")
        own = folder / "tokenizer" if "mlm" not in argv else named
        AutoTokenizer.from_pretrained(own).save_pretrained(tmp_path / "model")
        words = argv.format(named=named, model=tmp_path / "model").split()
        words += ["--prepared_data", str(folder), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
        assert cli.main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1] and lines[-1].startswith("error: ")
        assert not (tmp_path / "run").exists()


SIZES = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --max_position_embeddings 64"
SHORT = "--max_steps 3 --logging_steps 1 --per_device_train_batch_size 4 --save_strategy no --use_cpu true --seed 3"


SENTINELS = " ".join(f"<extra_id_{number}>" for number in range(100))
TEXT = "--vocab_size 150 --validation_fraction 0.1 --max_unknown_share 0.5"


@pytest.mark.parametrize(
    ("method", "tokenizer"),
    [
        ("mlm", ""),
        pytest.param("encoder --objectives mlm sop", "", marks=pytest.mark.slow),
        pytest.param("denoise --noise t5", f"--added_tokens {SENTINELS}", marks=pytest.mark.slow),
    ],
)
def test_a_training_has_the_losses_of_one_that_reads_the_text(corpus, tmp_path, capsys, method, tokenizer):
    text = f"{TEXT} --train_file {corpus}".split()
    folder = str(tmp_path / "prepared")
    assert cli.main(["prepare", *text, *tokenizer.split(), "--output_dir", folder, "--num_workers", "2"]) == 0
    shown = capsys.readouterr().out
    assert "held out" in shown and f"prepared  {folder}  (for --prepared_data)" in shown
    found = []
    for name, given in (("read", text), ("opened", f"--prepared_data {folder} --max_unknown_share 0.5".split())):
        argv = f"{method} {SIZES} {SHORT} --block_size 32 --output_dir {tmp_path / name}".split()
        assert cli.main([*argv, *given]) == 0, capsys.readouterr().err
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses = [{key: value for key, value in row.items() if "loss" in key or key == "grad_norm"} for row in history]
        data = json.loads((tmp_path / name / "pretraining" / "run.json").read_text())["card"]["data"]
        found.append((losses, (tmp_path / name / "model.safetensors").read_bytes(), data))
    assert len(found[0][0]) >= 4
    assert found[0] == found[1]
    if method == "mlm":
        assert AutoTokenizer.from_pretrained(tmp_path / "opened").model_max_length == 32
        # Its recipe starts it again.
        argv = ["mlm", "--config", str(tmp_path / "opened" / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]
        assert cli.main(argv) == 0, capsys.readouterr().err
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == found[0][1]


def test_adapt_refuses_new_words_of_prepared_data(corpus, named, tmp_path, capsys):
    prepare(corpus, tmp_path / "prepared", tokenizer_name=named)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, **config)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(named).save_pretrained(tmp_path / "model")
    argv = ["adapt", str(tmp_path / "model"), "--prepared_data", str(tmp_path / "prepared"), "--use_cpu", "true"]
    assert cli.main([*argv, "--new_words", "auto:5", "--output_dir", str(tmp_path / "run")]) == 2
    assert "the text itself is needed: give train_file" in capsys.readouterr().err
