"""Sentences with their translations."""

import gzip
import json
import lzma
import pickle

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, XLMConfig, XLMWithLMHeadModel

from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.data import draws
from hf_pretrain.data.examples.bitext import BitextDataset, bitext_dataset, read_bitext, tokenize_bitext
from hf_pretrain.data.examples.epochs import EPOCH_STRIDE, EpochSampler
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.embeddings import set_languages
from hf_pretrain.objectives.encoder.collator import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

SPECIALS = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]"]
SEP, CLS_BERT, SEP_BERT = 1, 5, 6
NUM_WORDS = 400


def word_tokenizer(kind="xlm"):
    """Words w0, w1, ... with the special tokens of XLM or of BERT."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *(f"w{i}" for i in range(NUM_WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cls, sep = ("</s>", "</s>") if kind == "xlm" else ("[CLS]", "[SEP]")
    if kind != "bare":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(name, vocabulary[name]) for name in {cls, sep}],
        )
    names = {"cls_token": cls, "sep_token": sep, "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(lengths):
    """Pairs whose sides have the given numbers of words; those of the second side are odd, those of the first even."""
    rows = {"first": [], "second": []}
    for number, (first, second) in enumerate(lengths):
        for name, count, odd in (("first", first, 0), ("second", second, 1)):
            rows[name].append(" ".join(f"w{(2 * (7 * number + i) + odd) % NUM_WORDS}" for i in range(count)))
    return datasets.Dataset.from_dict(rows)


def bitext(lengths, *, tokenizer=None, block_size=64, languages=(3, 5), **options):
    tokenizer = tokenizer or word_tokenizer()
    sides = tokenize_bitext(texts(lengths), tokenizer, languages=("en", "de"))
    return BitextDataset(*sides, tokenizer=tokenizer, block_size=block_size, languages=languages, seed=1, **options)


LENGTHS = [(5, 7), (3, 3), (9, 2), (1, 1), (6, 8), (4, 4), (2, 9), (8, 5)]


def sides_of(example):
    """The tokens of both sides with their special tokens, cut where positions start anew."""
    border = int(np.flatnonzero(example["position_ids"] == 0)[1])
    return [
        {name: example[name][part] for name in ("input_ids", "langs", "position_ids", "word_starts")}
        for part in (slice(border), slice(border, None))
    ]


def test_frame_of_xlm_has_four_separators_and_starts_anew_at_the_translation():
    dataset = bitext(LENGTHS)
    assert len(dataset) == len(LENGTHS)
    for row, lengths in enumerate(LENGTHS):
        example = dataset[row]
        assert np.count_nonzero(example["input_ids"] == SEP) == 4
        first, second = sides_of(example)
        order = [0, 1] if first["langs"][0] == 3 else [1, 0]
        for side, number in zip((first, second), order, strict=True):
            ids = side["input_ids"]
            assert len(ids) == lengths[number] + 2
            assert ids[0] == ids[-1] == SEP and not (ids[1:-1] == SEP).any()
            assert set(ids[1:-1].tolist()) <= set(range(len(SPECIALS) + number, 10**6, 2))
            assert set(side["langs"].tolist()) == {(3, 5)[number]}
            assert side["position_ids"].tolist() == list(range(len(ids)))
            assert side["word_starts"].all()
        assert example["is_bitext"] is True
        assert (example["example_id"], example["epoch"]) == (row, 0)


def test_the_sides_are_translations_of_each_other():
    for row in range(len(LENGTHS)):
        for side in sides_of(bitext(LENGTHS)[row]):
            assert side["input_ids"][1] == len(SPECIALS) + 14 * row + (side["langs"][0] == 5)


def test_pair_frame_of_xlm_has_three_separators():
    example = bitext([(3, 4)], frame="pair")[0]
    assert np.count_nonzero(example["input_ids"] == SEP) == 3
    first, second = sides_of(example)
    assert first["input_ids"][[0, -1]].tolist() == [SEP, SEP] and second["input_ids"][-1] == SEP
    assert second["input_ids"][0] != SEP
    assert np.count_nonzero(np.diff(example["langs"])) == 1


@pytest.mark.parametrize(("frame", "special"), [("each", [5, 6, 5, 6]), ("pair", [5, 6, 6])])
def test_frames_of_bert(frame, special):
    example = bitext([(3, 4)], tokenizer=word_tokenizer("bert"), frame=frame)[0]
    ids = example["input_ids"]
    assert ids[ids < len(SPECIALS)].tolist() == special
    assert ids[0] == CLS_BERT and ids[-1] == SEP_BERT
    assert np.count_nonzero(example["position_ids"] == 0) == 2


@pytest.mark.parametrize("block_size", [6, 13, 14, 24])
def test_what_is_too_long_is_cut_fairly(block_size):
    lengths = [(30, 30), (30, 2), (2, 30), (30, 7), (1, 40), (40, 1), (8, 9), (1, 1)]
    dataset = bitext(lengths, block_size=block_size)
    room = block_size - 4
    for row, pair in enumerate(lengths):
        example = dataset[row]
        assert len(example["input_ids"]) == dataset.lengths[row] == min(sum(pair) + 4, block_size)
        kept = {int(side["langs"][0]): len(side["input_ids"]) - 2 for side in sides_of(example)}
        kept = [kept[3], kept[5]]
        assert min(kept) >= 1 and kept[0] <= pair[0] and kept[1] <= pair[1]
        if sum(pair) > room:
            # Nothing is cut from a side that is not the longer one of what is left.
            cut = [whole > rest for whole, rest in zip(pair, kept, strict=True)]
            assert not (cut[0] and kept[0] < kept[1] - 1) and not (cut[1] and kept[1] < kept[0] - 1)
        # The ends are cut off.
        for side in sides_of(example):
            assert side["input_ids"][1] == len(SPECIALS) + 14 * row + (side["langs"][0] == 5)


def test_the_side_that_comes_first_is_drawn_and_changes_with_the_epoch():
    dataset = bitext([(2, 2)] * 400)
    first = np.array([[dataset[epoch * EPOCH_STRIDE + row]["langs"][0] for row in range(400)] for epoch in range(3)])
    assert (first[0] != first[1]).all()
    assert (first[0] == first[2]).all()
    assert (first[0] == 3).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_pickling_change_nothing(workers):
    dataset = bitext(LENGTHS)
    sampler = EpochSampler(len(dataset), seed=3)
    sampler.set_epoch(1)
    loader = DataLoader(
        pickle.loads(pickle.dumps(dataset)), batch_size=3, sampler=sampler, collate_fn=list, num_workers=workers
    )
    found = [example for batch in loader for example in batch]
    assert [example["order_index"] for example in found] == list(range(len(dataset)))
    for example in found:
        expected = dataset[EPOCH_STRIDE + example["example_id"]]
        assert all(np.array_equal(example[name], expected[name]) for name in expected)


def test_both_sides_are_masked_alike_and_separators_never():
    keys = draws.integers(draws.row_keys(range(1500), seed=4, stream="lengths"), 2, high=16) + 15
    tokenizer = word_tokenizer()
    dataset = bitext(keys.tolist(), tokenizer=tokenizer)
    collator = DataCollatorForMaskedLM(tokenizer, masking=MaskingArguments(masking_count="bernoulli"), seed=2)
    examples = [dataset[epoch * EPOCH_STRIDE + row] for epoch in range(2) for row in range(1500)]
    batch = collator(examples)
    selected = (batch["labels"] != -100).numpy()
    rates = {}
    for language in (3, 5):
        is_side = np.zeros_like(selected)
        for row, example in enumerate(examples):
            words = (example["langs"] == language) & (example["input_ids"] >= len(SPECIALS))
            is_side[row, : len(words)] = words
        rates[language] = selected[is_side].mean()
    assert rates == {3: pytest.approx(0.15, abs=0.006), 5: pytest.approx(0.15, abs=0.006)}
    assert not (selected & (batch["labels"].numpy() == SEP)).any()


def toy_translations():
    """Random words, each translated by the word after it in the vocabulary: context tells nothing but the translation."""
    words = draws.integers(draws.row_keys(range(400), seed=3, stream="toy"), 6, high=20).tolist()
    return datasets.Dataset.from_dict(
        {
            "first": [" ".join(f"w{2 * word}" for word in row) for row in words],
            "second": [" ".join(f"w{2 * word + 1}" for word in row) for row in words],
        }
    )


def test_a_model_learns_to_look_at_the_translation():
    tokenizer = word_tokenizer()
    sides = tokenize_bitext(toy_translations(), tokenizer, languages=("en", "de"))
    dataset = BitextDataset(*sides, tokenizer=tokenizer, block_size=32, languages=(0, 1))
    config = XLMConfig(
        vocab_size=len(tokenizer), emb_dim=32, n_layers=2, n_heads=2, dropout=0.0, attention_dropout=0.0, n_langs=2
    )
    set_languages(config, {"en": 0, "de": 1})
    torch.manual_seed(0)
    model = EncoderForPreTraining.from_model(XLMWithLMHeadModel(config), has_bitext=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    collator = DataCollatorForEncoder(tokenizer, seed=1)

    def loss_of(batch):
        loss = model(**batch).losses["tlm"]
        return loss.sum.sum() / loss.count.sum()

    for step in range(300):
        epoch, begin = divmod(64 * step, 384)
        loss = loss_of(collator([dataset[epoch * EPOCH_STRIDE + begin + row] for row in range(64)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    batch = collator([dataset[99 * EPOCH_STRIDE + row] for row in range(384, 400)])
    with torch.no_grad():
        with_translation = loss_of(batch)
        behind = batch["input_ids"].shape[1] // 2
        batch["labels"][:, behind:] = -100
        batch["input_ids"][:, behind:] = tokenizer.mask_token_id
        without = loss_of(batch)
    assert with_translation < 0.5 < np.log(20) * 0.9 < without


def test_words_are_marked_as_in_the_text():
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, "ab", "##c", "d", "."])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="</s>", sep_token="</s>", unk_token="<unk>"
    )
    rows = datasets.Dataset.from_dict({"first": ["abc d."], "second": ["d abc"]})
    sides = tokenize_bitext(rows, tokenizer, languages=("x", "y"))
    example = BitextDataset(*sides, tokenizer=tokenizer, block_size=20, languages=(0, 1), seed=0)[0]
    joined = {int(side["langs"][0]): side["word_starts"].tolist() for side in sides_of(example)}
    assert joined == {0: [True, True, False, True, True, True], 1: [True, True, True, False, True]}


def test_languages_are_kept_and_pairs_without_tokens_are_left_out():
    rows = datasets.Dataset.from_dict(
        {"first": ["w1 w2", "\u200b", "w5", "w7"], "second": ["w3", "w4", "\ufeff", "w8"]}
    )
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    sides = tokenize_bitext(rows, tokenizer, languages=("en", "de"))
    assert [set(side["lang"]) for side in sides] == [{"en"}, {"de"}]
    assert len(sides[0]) == len(sides[1])
    whole = tokenize_bitext(
        datasets.Dataset.from_dict({"first": ["w1", "   ", "w5"], "second": ["w3", "w4", "w6"]}),
        tokenizer,
        languages=("en", "de"),
    )
    dataset = BitextDataset(*whole, tokenizer=tokenizer, block_size=16, languages=(0, 1), seed=0)
    assert len(dataset) == 2
    words = [sorted(set(dataset[row]["input_ids"].tolist()) - {SEP}) for row in (0, 1)]
    assert words == [[8, 10], [12, 13]]
    blank = datasets.Dataset.from_dict({"first": [" ", "w1"], "second": ["w1", " "]})
    with pytest.raises(InputError, match="no pair of en-de has tokens"):
        tokenize_bitext(blank, tokenizer, languages=("en", "de"))


PAIRS = [("one", "eins"), ("two words", "zwei Wörter"), ("three", "drei")]


def write(path, text):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write(text)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_two_files(tmp_path, suffix):
    paths = [
        write(tmp_path / f"text.{name}{suffix}", "".join(f"{pair[side]}\n" for pair in PAIRS))
        for side, name in enumerate(("en", "de"))
    ]
    assert list(read_bitext(paths, languages=("en", "de"))) == PAIRS
    dataset = bitext_dataset(paths, languages=("en", "de"))
    assert list(zip(dataset["first"], dataset["second"], strict=True)) == PAIRS
    assert bitext_dataset(paths, languages=("en", "de"))._fingerprint == dataset._fingerprint


@pytest.mark.parametrize("suffix", [".tsv", ".txt", ".tsv.gz"])
def test_columns(tmp_path, suffix):
    rows = [*("\t".join(pair) for pair in PAIRS), "", "\tohne", "without\t", "\t\t"]
    path = write(tmp_path / f"pairs{suffix}", "\n".join([rows[0] + "\tsource", *rows[1:]]))
    assert list(read_bitext([path], languages=("en", "de"))) == PAIRS


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".parquet"])
def test_fields_named_by_the_languages(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_dict({"de": [b for _, b in PAIRS], "en": [a for a, _ in PAIRS]}).to_parquet(path)
    else:
        write(path, "\n".join(json.dumps({"de": b, "en": a}, ensure_ascii=False) for a, b in PAIRS))
    assert list(read_bitext([path], languages=("en", "de"))) == PAIRS
    with pytest.raises(InputError, match="'fr'"):
        list(read_bitext([path], languages=("en", "fr")))


def test_blank_lines_are_left_out_with_their_translations(tmp_path):
    first, second = write(tmp_path / "a", "one\n\nthree\nfour"), write(tmp_path / "b", "eins\nzwei\n  \nvier\n")
    assert list(read_bitext([first, second], languages=("en", "de"))) == [("one", "eins"), ("four", "vier")]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (("one\ntwo\n", "eins\n"), "a has 2 lines, but .*b has 1"),
        (("one\n", "eins\nzwei\n\n"), "a has 1 lines, but .*b has 3"),
        (("one\n\n", "\nzwei\n"), "no line has text in both of en and de"),
        (("", ""), "no line has text"),
        (("no tab\n",), "line 1 has no tab"),
        (("a\tb\n", "c", "d"), "3 files are given"),
        ((None, "b"), "is no file"),
        (("one\0\n", "eins\n"), "byte 3"),
    ],
)
def test_bad_files_are_refused(tmp_path, contents, message):
    paths = [
        str(tmp_path / name) if content is None else write(tmp_path / name, content)
        for name, content in zip("abc", contents, strict=False)
    ]
    with pytest.raises(InputError, match=message):
        bitext_dataset(paths, languages=("en", "de"))


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="block_size=5 has no room"):
        bitext([(3, 3)], block_size=5)
    with pytest.raises(InputError, match="bitext_frame='double'"):
        bitext([(3, 3)], frame="double")
    with pytest.raises(InputError, match="nothing would separate"):
        bitext([(3, 3)], tokenizer=word_tokenizer("bare"))
    tokenizer = word_tokenizer()
    first, second = tokenize_bitext(texts(LENGTHS), tokenizer, languages=("en", "de"))
    with pytest.raises(InputError, match="8 sentences and 7 translations"):
        BitextDataset(first, second.select(range(7)), tokenizer=tokenizer, block_size=32, languages=(0, 1))


def test_numbers_and_repr():
    dataset = bitext(LENGTHS, block_size=14)
    assert dataset.num_tokens == sum(map(sum, LENGTHS))
    assert "8 pairs of at most 14 tokens" in repr(dataset)
    assert f"{sum(sum(pair) > 10 for pair in LENGTHS) / 8:.1%}" in repr(dataset)


class TestLines:
    """The n-th lines of two files belong together, as `wc -l` counts them."""

    def write(self, folder, name, content):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def pairs(self, *paths, **options):
        return list(read_bitext(paths, languages=("en", "de"), **options))

    def test_only_line_feeds_end_lines(self, tmp_path):
        english = [f"en {number}" for number in range(9)]
        english[2], english[5], english[7] = "e\rn\r\r2", "e\u2028n\x855", "\ufeffe\x0bn\x1c7"
        german = [f"de {number}" for number in range(9)]
        german[4] = "d\r4"
        first = self.write(tmp_path, "a.en", "\r\n".join(english) + "\r\n")
        second = self.write(tmp_path, "a.de", "\n".join(german))
        found = self.pairs(first, second)
        assert [pair[1].split()[-1] for pair in found] == [str(n) for n in range(4)] + ["4"] + [
            str(n) for n in range(5, 9)
        ]
        assert found[2] == ("e\nn\n\n2", "de 2") and found[7] == ("e\x0bn\x1c7", "de 7")

    def test_text_of_the_old_mac_is_one_line_and_refused(self, tmp_path):
        mac = self.write(tmp_path, "a.en", "one\rtwo\r")
        with pytest.raises(InputError, match="carriage returns, but no line feeds"):
            self.pairs(mac, mac)

    def test_tables_and_arrays_have_a_field_for_each_language(self, tmp_path):
        expected = [("a, b", "c"), ("d", "e\tf")]
        table = self.write(tmp_path, "a.csv", 'en,n,de\n"a, b",1,c\nd,2,e\tf\n')
        assert self.pairs(table) == expected
        rows = [{"en": first, "de": second} for first, second in expected]
        assert self.pairs(self.write(tmp_path, "a.json", json.dumps(rows, indent=1))) == expected
        headed = self.write(tmp_path, "b.tsv", "de\ten\nx\ty\n")
        assert self.pairs(headed) == [("y", "x")]
        assert self.pairs(self.write(tmp_path, "c.tsv", 'y\tx\n"y\tx\t3\n')) == [("y", "x"), ('"y', "x")]

    def test_a_bad_side_costs_the_pair(self, tmp_path, capsys):
        first = self.write(tmp_path, "a.en", b"one\nb\xffd\nthree\n")
        second = self.write(tmp_path, "a.de", "eins\nzwei\ndrei\n")
        with pytest.raises(InputError, match="a.en is not text in UTF-8: byte 5"):
            self.pairs(first, second)
        assert self.pairs(first, second, on_bad_text="skip") == [("one", "eins"), ("three", "drei")]
        assert "skipped a document (1 so far)" in capsys.readouterr().out

    def test_markup_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="XML or HTML"):
            self.pairs(self.write(tmp_path, "a.tmx", "<tmx></tmx>"))
