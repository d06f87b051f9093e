"""From options to examples in several languages."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from hf_pretrain.data import draws, run_tokenizer
from hf_pretrain.data.documents.documents import tokenize_documents
from hf_pretrain.data.examples.bitext import BitextDataset
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochDataset, MixtureDataset, language_shares
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.multilingual import (
    LanguageDataset,
    MultilingualDataArguments,
    balanced_texts,
    prepare_multilingual,
)
from hf_pretrain.data.text.datasets import text_dataset
from hf_pretrain.errors import InputError
from hf_pretrain.training.parsing import parse_arguments

SYLLABLES = {"de": "zu mit ver", "en": "the of ing", "fr": "le que oux"}


def sentences(language, count, *, length=6, stream=""):
    """Sentences of words that belong to one language, all different."""
    parts = SYLLABLES[language].split()
    picks = draws.integers(
        draws.row_keys(range(count), seed=1, stream=language + stream), length, high=len(parts)
    ).tolist()
    return [
        " ".join(parts[p] + parts[q] for p, q in zip(row, row[1:], strict=False)) + f" {i}."
        for i, row in enumerate(picks)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path):
    """Documents of three languages, 70 : 20 : 10, and translations of two pairs."""
    paths = {}
    for language, count in (("en", 70), ("de", 20), ("fr", 10)):
        paths[language] = tmp_path / f"{language}.txt"
        lines = sentences(language, 4 * count)
        paths[language].write_text("\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4)))
    for pair, count in (("en-de", 60), ("en-fr", 15)):
        for language in pair.split("-"):
            paths[f"{pair}.{language}"] = tmp_path / f"{pair}.{language}"
            paths[f"{pair}.{language}"].write_text("\n".join(sentences(language, count, length=5, stream=pair)))
    return {name: str(path) for name, path in paths.items()}


def arguments(files, *, languages=("en", "de", "fr"), pairs=("en-de", "en-fr"), **options):
    parallel = [f"{pair}=" + ",".join(files[f"{pair}.{side}"] for side in pair.split("-")) for pair in pairs]
    return MultilingualDataArguments(
        language_file=[f"{language}={files[language]}" for language in languages] or None,
        parallel_file=parallel or None,
        **{"vocab_size": 150, "block_size": 24, "validation_fraction": 0.1, "mixture_unit": "example", **options},
    )


def prepared(files, tmp_path, *, options=None, **rest):
    return prepare_multilingual(arguments(files, **(options or {})), seed=1, output_dir=tmp_path / "out", **rest)


def words_of(example, tokenizer, number):
    return tokenizer.decode(example["input_ids"][example["langs"] == number], skip_special_tokens=True)


def is_of(text, language):
    """Whether all words are of a language, but numbers and stops."""
    words = [word for word in text.replace(".", " ").split() if not word.isdigit()]
    parts = SYLLABLES[language].split()
    return all(word in {p + q for p in parts for q in parts} for word in words) and bool(words)


def test_files_to_examples(files, tmp_path):
    data = prepared(files, tmp_path)
    assert data.languages == {"de": 0, "en": 1, "fr": 2}
    assert isinstance(data.train_dataset, MixtureDataset) and data.train_dataset.in_order
    assert list(data.train_dataset.parts) == ["en", "de", "fr", "en-de", "en-fr"]
    examples = [data.train_dataset[row] for row in range(len(data.train_dataset))]
    kinds = Counter()
    for example in examples:
        numbers = sorted(set(example["langs"].tolist()))
        kinds[tuple(numbers)] += 1
        assert len(example["langs"]) == len(example["input_ids"]) <= 24
        assert example.get("is_bitext", False) == (len(numbers) == 2)
        assert ("position_ids" in example) == (len(numbers) == 2)
        assert np.count_nonzero(np.diff(example["langs"])) == len(numbers) - 1
        if len(numbers) == 1:
            (language,) = (name for name, number in data.languages.items() if number == numbers[0])
            assert is_of(words_of(example, data.tokenizer, numbers[0]), language)
    assert set(kinds) == {(0,), (1,), (2,), (0, 1), (1, 2)}
    assert sum(count for numbers, count in kinds.items() if len(numbers) == 2) == pytest.approx(
        len(examples) / 2, abs=2
    )


def test_shares_of_languages_and_pairs(files, tmp_path):
    data = prepared(files, tmp_path, options={"bitext_share": 0.25})
    shares = data.description["sampling_shares"]
    tokens = Counter()
    for document in data.train_documents:
        tokens[document["lang"]] += len(document["input_ids"])
    expected = {name: 0.75 * share for name, share in language_shares(tokens, alpha=0.5).items()}
    expected |= {name: 0.25 * share for name, share in language_shares({"en-de": 54, "en-fr": 13}, alpha=0.5).items()}
    assert shares == pytest.approx(expected, abs=1e-4)
    counts = data.train_dataset.counts
    assert all(abs(counts[name] - share * len(data.train_dataset)) < 1 for name, share in expected.items())
    even = prepared(files, tmp_path, options={"pairs": (), "language_sampling_alpha": 0.0})
    assert even.description["sampling_shares"] == pytest.approx(dict.fromkeys(("en", "de", "fr"), 1 / 3), abs=1e-4)


def test_what_is_held_out_is_read_once_and_not_trained_on(files, tmp_path):
    data = prepared(files, tmp_path)

    def found(dataset):
        """By language, the texts of all examples."""
        return Counter(
            (number, words_of(example, data.tokenizer, number))
            for example in (dataset[row] for row in range(len(dataset)))
            for number in set(example["langs"].tolist())
        )

    held_out = found(data.eval_dataset)
    assert set(held_out.values()) == {1}
    assert not set(held_out) & set(found(data.train_dataset))
    assert sum(isinstance(part, BitextDataset) for part in data.eval_dataset.parts.values()) == 2
    pairs = [
        example
        for example in map(data.eval_dataset.__getitem__, range(len(data.eval_dataset)))
        if "is_bitext" in example
    ]
    assert len(pairs) == 6 + 2 == data.description["held_out_translations"]


def test_documents_keep_their_language(files, tmp_path):
    data = prepared(files, tmp_path)
    counts = Counter(document["lang"] for document in data.train_documents)
    assert counts == {"en": 63, "de": 18, "fr": 9}
    assert Counter(data.eval_documents["lang"]) == {"en": 7, "de": 2, "fr": 1}
    for document in data.train_documents.select(range(60, 90)):
        assert is_of(data.tokenizer.decode(document["input_ids"]), document["lang"])


def test_texts_keep_their_language_through_tokenization(files, tokenizer):
    texts = text_dataset(files["de"], language="de")
    assert set(tokenize_documents(texts, tokenizer)["lang"]) == {"de"}
    assert set(tokenize_documents(text_dataset(texts, language="nl"), tokenizer)["lang"]) == {"nl"}
    assert "lang" not in tokenize_documents(text_dataset(files["de"]), tokenizer).column_names


def test_description(files, tmp_path):
    data = prepared(files, tmp_path)
    description = data.description
    assert json.loads(json.dumps(description)) == description
    assert description["languages"] == ["de", "en", "fr"]
    assert (
        description["source"]
        == "en: en.txt; de: de.txt; fr: fr.txt; en-de: en-de.en, en-de.de; en-fr: en-fr.en, en-fr.fr"
    )
    # The options hold paths; the card takes them without.
    assert str(tmp_path) not in json.dumps({name: value for name, value in description.items() if name != "options"})
    assert (description["documents"], description["held_out_documents"]) == (90, 10)
    assert description["translations"] == 54 + 13
    assert description["tokens"] == sum(
        part.num_tokens if isinstance(part, BitextDataset) else part.base.base.num_tokens
        for part in data.train_dataset.parts.values()
    )
    whole = prepared(files, tmp_path, options={"validation_fraction": 0.0})
    assert whole.eval_dataset is None and whole.eval_documents is None
    assert not [name for name in whole.description if name.startswith("held_out_") and name != "held_out_source"]
    total = sum(len(text) for name in files for text in (open(files[name]).read().replace("\n", ""),))
    assert whole.description["characters"] == total


def test_everything_is_done_once(files, tmp_path, monkeypatch):
    first = prepared(files, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_tokenizer, "train_tokenizer", lambda *_, **__: pytest.fail("trained twice"))
        patch.setattr(
            "hf_pretrain.data.documents.documents.tokenize_texts", lambda *_, **__: pytest.fail("tokenized twice")
        )
        again = prepared(files, tmp_path)
    for index in (0, 7, EPOCH_STRIDE + 3):
        one, other = first.train_dataset[index], again.train_dataset[index]
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_only_translations(files, tmp_path):
    data = prepared(files, tmp_path, options={"languages": ()})
    assert list(data.train_dataset.parts) == ["en-de", "en-fr"]
    assert data.train_documents is None
    assert all(data.train_dataset[row]["is_bitext"] for row in range(len(data.train_dataset)))
    none = prepared(files, tmp_path, options={"bitext_share": 0.0})
    assert list(none.train_dataset.parts) == ["en", "de", "fr"]


def test_steps_of_one_part(files, tmp_path):
    data = prepared(files, tmp_path, options={"mixture_unit": "step"}, step_examples=4)
    assert len(data.train_dataset) % 4 == 0
    for begin in range(0, len(data.train_dataset), 4):
        group = data.train_dataset.__getitems__(range(begin, begin + 4))
        assert len({tuple(sorted(set(example["langs"].tolist()))) for example in group}) == 1
    with pytest.raises(InputError, match="mix by examples"):
        prepared(files, tmp_path, options={"mixture_unit": "step"}, step_examples=64)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_frames_of_tokenizer_and_bitext(files, tmp_path, kind):
    options = {"tokenizer_type": kind, "tokenizer_frame": "xlm", "vocab_size": 400}
    data = prepared(files, tmp_path, options=options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pair = data.train_dataset.parts["en-de"][0]["input_ids"]
    separator = tokenizer.sep_token_id
    assert tokenizer.cls_token_id == separator == pair[0] == pair[-1]
    assert np.count_nonzero(pair == separator) == 4
    assert tokenizer("the")["input_ids"][0] == separator
    other = prepared(files, tmp_path, options=options | {"bitext_frame": "pair"})
    assert np.count_nonzero(other.train_dataset.parts["en-de"][0]["input_ids"] == separator) == 3
    own = prepared(files, tmp_path, options=options | {"tokenizer_frame": "own"})
    assert own.tokenizer.cls_token_id != own.tokenizer.sep_token_id, "another frame is another tokenizer"


def test_numbers_of_a_model_to_continue(files, tmp_path):
    lang2id = {"ar": 0, "en": 4, "fr": 2, "de": 9}
    data = prepared(files, tmp_path, lang2id=lang2id)
    assert data.languages == {"de": 9, "en": 4, "fr": 2}
    assert set(data.train_dataset.parts["en-de"][0]["langs"].tolist()) == {9, 4}
    assert set(data.train_dataset.parts["fr"][0]["langs"].tolist()) == {2}
    with pytest.raises(InputError, match="'de' is none of the model's: en, fr"):
        prepared(files, tmp_path, lang2id={"en": 0, "fr": 1})


def test_one_text_without_languages_is_prepared_as_ever(files, tmp_path):
    args = MultilingualDataArguments(train_file=[files["en"]], vocab_size=150, block_size=24)
    data = prepare_multilingual(args, seed=1, output_dir=tmp_path / "out")
    assert isinstance(data.train_dataset, BlockDataset)
    assert data.languages is None and "languages" not in data.description


def test_tokenizers_text_has_the_shares_of_the_languages():
    texts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i:05d}" for i in range(count)]})
        for name, count in (("en", 7000), ("de", 2000), ("fr", 1000))
    }
    found = Counter(text[:2] for text in balanced_texts(texts, alpha=0.5, seed=1))
    assert sum(found.values()) == 10_000
    for name, share in (("en", 0.523), ("de", 0.279), ("fr", 0.198)):
        assert found[name] / 10_000 == pytest.approx(share, abs=0.01)
    read = Counter(text for text in balanced_texts(texts, alpha=0.5, seed=1) if text.startswith("fr"))
    assert len(read) == 1000 and set(read.values()) <= {1, 2}, "all of it is read before any is read again"
    assert len({text for text in balanced_texts(texts, alpha=1.0, seed=1)}) == 10_000


class Lengths(Dataset):
    """Examples of growing lengths."""

    def __len__(self):
        return 5

    def __getitem__(self, row):
        return {"input_ids": np.arange(row + 1)}


def test_language_dataset_hands_the_index_through():
    class Epochs(EpochDataset):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"seen": index}

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    view = LanguageDataset(Epochs(Lengths()), language=3)
    index = 2 * EPOCH_STRIDE + 4
    assert len(view) == 5
    for example in (view[index], *view.__getitems__([index])):
        assert (example["seen"], example["example_id"], example["epoch"]) == (index, 4, 2)
        assert example["langs"].tolist() == [3] * 5


def test_options_come_from_the_command_line():
    (args,) = parse_arguments(
        (MultilingualDataArguments,),
        [
            "--language_file",
            "en=a.txt,b.txt",
            "de=c",
            "en=d",
            "--parallel_file",
            "en-de=x.en,x.de",
            "en-de=y.tsv",
            "de-fr=z",
        ],
        prog="test",
        description="",
    )
    assert args.language_files() == {"en": ["a.txt", "b.txt", "d"], "de": ["c"]}
    assert args.parallel_files() == {"en-de": [["x.en", "x.de"], ["y.tsv"]], "de-fr": [["z"]]}
    assert args.languages() == ["de", "en", "fr"]
    assert (args.language_sampling_alpha, args.bitext_share) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language_file": ["a.txt"]}, "LANGUAGE=FILE"),
        ({"language_file": ["=a.txt"]}, "LANGUAGE=FILE"),
        ({"language_file": ["en="]}, "LANGUAGE=FILE"),
        ({"language_file": ["en=a,,b"]}, "LANGUAGE=FILE"),
        ({"language_file": ["zh-Hant=a"]}, "letters, digits and _"),
        ({"parallel_file": ["en=a,b"]}, "FIRST-SECOND=FILE"),
        ({"parallel_file": ["zh-Hant-en=a,b"]}, "FIRST-SECOND=FILE"),
        ({"parallel_file": ["en-de=a,b,c"]}, "names 3 files"),
        ({"parallel_file": ["en-en=a,b"]}, "of one language"),
        ({"parallel_file": ["en-de=a,b", "de-en=c,d"]}, "keep to one order"),
        ({"language_file": ["en=a"], "train_file": ["b"]}, "train_file=.* does not go with language_file"),
        ({"language_file": ["en=a"], "validation_file": ["b"]}, "validation_file"),
        ({"parallel_file": ["en-de=a"], "dataset_name": "b"}, "dataset_name='b' does not go with parallel_file"),
        ({"language_file": ["en=a"], "max_corpus_bytes": 5}, "max_corpus_bytes=5"),
        ({"language_file": ["en=a"], "streaming": True}, "streaming"),
        ({"language_file": ["en=a"], "block_mode": "isolated_documents"}, "doc_sentences"),
        ({"language_file": ["en=a"], "language_sampling_alpha": 1.5}, "language_sampling_alpha=1.5"),
        ({"language_file": ["en=a"], "bitext_share": -0.5}, "bitext_share=-0.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MultilingualDataArguments(**options)


def test_bad_text_is_refused_by_name(files, tmp_path):
    (tmp_path / "one.txt").write_text("One document.")
    with pytest.raises(InputError, match="text of en: validation_fraction=0.1"):
        prepared(files | {"en": str(tmp_path / "one.txt")}, tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        prepared(files | {"en": str(tmp_path / "nowhere")}, tmp_path)
    with pytest.raises(InputError, match="has 60 lines, but .* has 15"):
        prepared(files | {"en-de.de": files["en-fr.fr"]}, tmp_path)
