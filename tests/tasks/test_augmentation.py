"""Augmented rows: keyed, one word for one, and what stands around the words untouched."""

import itertools
import re

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    set_seed,
)

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.tasks import augmentation
from hf_pretrain.tasks.augmentation import AugmentationArguments, augment
from hf_pretrain.tasks.words import WordNeighbours, whole_words

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Sixty words of two letters that are tokens, and pieces of which longer words are made.
WORDS = ["".join(pair) for pair in itertools.product("bfkpvz", "aioulmnrst")]
PIECES = ["un", "##xo", "##xi"]
MARKS = ["the", "not", "don", "t", "'", ",", ".", "12", "-"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *WORDS, *PIECES, *MARKS])}
    return BertTokenizer(vocab=vocabulary, model_max_length=40)


@pytest.fixture(scope="module")
def model(tokenizer):
    set_seed(0)
    # Large weights, so that the likeliest words differ from place to place.
    config = BertConfig(vocab_size=len(tokenizer) + 3, initializer_range=0.5, **SIZES)
    return AutoModelForMaskedLM.from_config(config)


def sentences(count, *, length=12, seed=0):
    keys = draws.row_keys(range(count), seed=seed, stream="sentences")
    return [" ".join(WORDS[i] for i in row) for row in draws.integers(keys, length, high=len(WORDS)).tolist()]


def table(**columns):
    return datasets.Dataset.from_dict(columns)


def run(rows, model, tokenizer, *, columns=("text",), neighbours=None, seed=0, **options):
    defaults = {"augmentation_rows": 6, "augmentation_candidates": 5}
    args = AugmentationArguments(**{**defaults, **options})
    return augment(
        rows, model=model, tokenizer=tokenizer, text_columns=columns, neighbours=neighbours, args=args, seed=seed
    )


def variants_of(augmented, source, column="text"):
    return [row[column] for row in augmented if row["source_id"] == source]


def test_every_row_comes_once_and_first_and_its_labels_stay(model, tokenizer):
    texts = sentences(9)
    rows = table(text=texts, label=list(range(9)), note=[f"n{i}" for i in range(9)])
    augmented = run(rows, model, tokenizer)
    assert augmented.column_names == ["text", "label", "note", "source_id"]
    assert augmented["source_id"] == sorted(augmented["source_id"])
    for source, text in enumerate(texts):
        found = variants_of(augmented, source)
        assert found[0] == text and found.count(text) == 1
        assert len(set(found)) == len(found) > 4
    for row in augmented:
        assert row["label"] == row["source_id"] and row["note"] == f"n{row['source_id']}"


def test_the_share_of_changed_words_is_the_probability(model, tokenizer):
    """A proposal is never the word itself, so every word that is drawn does change."""
    texts = sentences(60, length=30)
    augmented = run(table(text=texts), model, tokenizer, augmentation_rows=10)
    before, after = [], []
    for row in augmented:
        if row["text"] != texts[row["source_id"]]:
            before += texts[row["source_id"]].split()
            after += row["text"].split()
    assert len(before) == len(after) > 15_000
    changed = np.mean([a != b for a, b in zip(before, after, strict=True)])
    assert abs(changed - 0.4) < 3 * np.sqrt(0.4 * 0.6 / len(before))


def test_batches_and_company_change_nothing(model, tokenizer, monkeypatch):
    """Sentences of all lengths, so that padding differs."""
    texts = [" ".join(text.split()[: 3 + i % 9]) for i, text in enumerate(sentences(12))]
    texts[4] = texts[4] + " unxoxi"
    whole = run(table(text=texts), model, tokenizer)
    one_by_one = run(table(text=texts), model, tokenizer, augmentation_batch_size=1)
    assert whole.to_list() == one_by_one.to_list()
    monkeypatch.setattr(augmentation, "_CHUNK_ROWS", 5)
    assert run(table(text=texts), model, tokenizer).to_list() == whole.to_list()
    # The row keeps its number, whatever the others are.
    others = [texts[3] if i == 3 else text for i, text in enumerate(sentences(12, seed=7))]
    assert variants_of(run(table(text=others), model, tokenizer), 3) == variants_of(whole, 3)


def test_seeds_rows_and_tries_differ(model, tokenizer):
    texts = [sentences(1)[0]] * 2
    one, other = (run(table(text=texts), model, tokenizer, seed=seed) for seed in (0, 1))
    assert one.to_list() == run(table(text=texts), model, tokenizer).to_list()
    assert variants_of(one, 0) != variants_of(other, 0)
    assert variants_of(one, 0) != variants_of(one, 1)


def test_texts_of_a_pair_know_nothing_of_each_other(model, tokenizer):
    texts = sentences(4)
    pairs = run(table(first=texts, second=texts), model, tokenizer, columns=("first", "second"))
    # Equal texts are changed differently, each in both ways and the one where the other is as it was.
    assert any(row["first"] != row["second"] for row in pairs)
    other = run(table(first=texts, second=sentences(4, seed=3)), model, tokenizer, columns=("first", "second"))
    for source, text in enumerate(texts):
        assert variants_of(pairs, source, "first") == variants_of(other, source, "first")
        assert (pairs[pairs["source_id"].index(source)]["first"]) == text
    alone = run(table(first=texts), model, tokenizer, columns=("first",))
    assert variants_of(alone, 0, "first") == variants_of(pairs, 0, "first")


def test_what_is_no_plain_word_stays(model, tokenizer):
    text = "  ba  12, the don't ba-zu NOT  ba. "
    augmented = run(table(text=[text]), model, tokenizer, augmentation_probability=1.0)
    assert len(augmented) > 3
    for variant in variants_of(augmented, 0)[1:]:
        found = re.fullmatch(r"  (\w+)  12, the don't (\w+)-(\w+) NOT  (\w+)\. ", variant)
        assert found is not None, variant
        first, second, third, fourth = found.groups()
        assert "ba" not in (first, second, fourth) and third != "zu"
        assert {first, second, third, fourth} <= {*WORDS, "un", "t", "the", "not", "don"}


def test_stop_words_may_be_let_go(model, tokenizer):
    texts = ["the the not the"]
    assert len(run(table(text=texts), model, tokenizer)) == 1
    assert len(run(table(text=texts), model, tokenizer, augmentation_stop_words="none")) > 3


def test_proposals_are_the_models_likeliest_words_behind_the_mask(model, tokenizer):
    """The masked sentence alone is shown: no special token, no piece, no mark and never the word itself is proposed."""
    text = "ba ki va zu"
    augmented = run(table(text=[text]), model, tokenizer, augmentation_rows=300, augmentation_candidates=3)
    seen = [{row.split()[place] for row in variants_of(augmented, 0)} - {text.split()[place]} for place in range(4)]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    allowed = {index: word for index, word in enumerate([*SPECIALS, *WORDS, *PIECES, *MARKS]) if word.isalpha()}
    for place, found in enumerate(seen):
        masked = ids.clone()
        masked[0, place + 1] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model.eval()(masked).logits[0, place + 1]
        ranked = [
            allowed[i] for i in logits.argsort(descending=True).tolist() if i in allowed and i != ids[0, place + 1]
        ]
        assert found == set(ranked[:3])


def test_a_word_of_several_tokens_gets_its_neighbours(model, tokenizer):
    rows = table(text=["unxo ba Unxoxi unxix unxi"])
    vectors = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0.8, 0.2, 0], [0, 0, 1]])
    near = WordNeighbours(["unxo", "near", "unxoxi", "[SEP]", "far"], vectors)
    augmented = run(rows, model, tokenizer, neighbours=near, augmentation_candidates=1, augmentation_rows=40)
    columns = list(zip(*(text.split() for text in variants_of(augmented, 0)), strict=True))
    assert set(columns[0]) == {"unxo", "near"} and set(columns[2]) == {"Unxoxi", "near"}
    # Without a vector, or of an unknown piece: the first stays, the second is one unknown token, which can be masked.
    assert set(columns[4]) == {"unxi"} and len(set(columns[3])) == 2


def test_neighbours_by_the_models_embeddings(model, tokenizer):
    near = WordNeighbours.from_model(model, tokenizer)
    embeddings = model.get_input_embeddings().weight.detach()
    vector = embeddings[tokenizer.convert_tokens_to_ids(["un", "##xo"])].mean(0)
    cosine = torch.cosine_similarity(embeddings, vector[None], dim=1)
    words = whole_words(tokenizer)
    ranked = sorted(words, key=lambda index: -cosine[index])
    assert near.nearest(["unxo"], count=4) == [[words[index] for index in ranked[:4]]]


def test_vectors_are_read_from_a_file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("4 2\nhot 1 0\nwarm 0.9 0.1\n, 1 0\ncold -1 0\nHot 1 0\n", encoding="utf-8")
    near = WordNeighbours.from_file(path)
    assert near.words == ["hot", "warm", "cold", "Hot"]
    assert near.nearest(["hot", "HOT", "unheard"], count=2) == [["warm", "cold"], ["warm", "cold"], []]
    assert WordNeighbours.from_file(path, limit=2).words == ["hot"]
    path.write_text("hot 1 0\nwarm 0.9\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 2"):
        WordNeighbours.from_file(path)
    with pytest.raises(InputError, match="no file"):
        WordNeighbours.from_file(tmp_path / "missing.txt")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_whole_words_of_tokenizers_that_mark_spaces(kind):
    from hf_pretrain.data.documents.tokenizers import train_tokenizer

    text = ["the chef cooked a meal , and the guests ate it all . chefs cook meals for guests"] * 50
    trained = train_tokenizer(
        text, kind=kind, vocab_size=400 if kind == "bpe" else 100, lowercase=True, model_max_length=32
    )
    assert isinstance(trained, PreTrainedTokenizerFast)
    words = whole_words(trained)
    assert "meal" in words.values()
    assert all(trained(f"a {word}", add_special_tokens=False)["input_ids"][-1] == i for i, word in words.items())


def test_a_text_beyond_the_models_positions_is_changed_in_front_only(model, tokenizer):
    text = " ".join(sentences(1, length=60)) + " unxoxi"
    rows = run(table(text=[text]), model, tokenizer, augmentation_probability=1.0)
    kept = [row.split() for row in variants_of(rows, 0)[1:]]
    for words in kept:
        changed = [a != b for a, b in zip(words, text.split(), strict=True)]
        assert changed == [True] * 38 + [False] * 23


def test_roberta_and_its_positions():
    from hf_pretrain.data.documents.tokenizers import train_tokenizer

    trained = train_tokenizer(sentences(200), kind="bpe", vocab_size=500, lowercase=True, model_max_length=32)
    set_seed(0)
    config = RobertaConfig(**SIZES | {"vocab_size": len(trained), "pad_token_id": trained.pad_token_id})
    augmented = run(table(text=sentences(3)), AutoModelForMaskedLM.from_config(config), trained)
    assert len(augmented) > 12
    assert all(len(row["text"].split()) == 12 and row["text"].replace(" ", "").isalpha() for row in augmented)


def test_data_on_disk_is_augmented_once(model, tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    table(text=sentences(5)).to_json(path)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    first, again = run(rows, model, tokenizer), run(rows, model, tokenizer)
    assert first.to_list() == again.to_list() and first._fingerprint == again._fingerprint
    count = len(calls)
    assert count
    run(rows, model, tokenizer, seed=1)
    assert len(calls) == 2 * count
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    run(rows, model, tokenizer)
    assert len(calls) == 3 * count, "another model proposes other words"
    hook.remove()


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    run(table(text=sentences(2)), model, tokenizer)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not model.base_model._forward_hooks


def test_a_text_without_words_stays_alone(model, tokenizer):
    augmented = run(table(text=["", "12 , ."]), model, tokenizer)
    assert augmented["text"] == ["", "12 , ."] and augmented["source_id"] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation_rows": 0}, "augmentation_rows=0"),
        ({"augmentation_probability": 0.0}, "augmentation_probability=0.0"),
        ({"augmentation_candidates": -1}, "augmentation_candidates=-1"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(InputError, match=message):
        AugmentationArguments(**options)


def test_bad_data_and_models(model, tokenizer):
    rows = table(text=["ba zu"], label=[1])
    with pytest.raises(InputError, match="'sentence', but the data has text, label"):
        run(rows, model, tokenizer, columns=("sentence",))
    with pytest.raises(InputError, match="'label', which holds no text"):
        run(rows, model, tokenizer, columns=("label",))
    with pytest.raises(InputError, match="row 1 has no 'text'"):
        run(table(text=["ba", None]), model, tokenizer)
    with pytest.raises(InputError, match="augmented already"):
        run(run(rows, model, tokenizer), model, tokenizer)
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(InputError, match="cannot fill masks"):
        run(rows, classifier, tokenizer)
    with pytest.raises(InputError, match="2 entries and vectors 3 rows"):
        WordNeighbours(["a", "b"], np.zeros((3, 4)))
