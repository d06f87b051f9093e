"""ELMo's tokenizer: the characters of words, known or not."""

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_pretrain import ElmoTokenizer, train_tokenizer
from hf_pretrain.models.elmo.tokenization_elmo import word_characters

TEXTS = ["the cat sat on the mat", "the dog, the cat"] * 2
BEGIN, END, PAD = 259, 260, 261


@pytest.fixture
def tokenizer():
    return ElmoTokenizer.from_fast(train_tokenizer(TEXTS, kind="word", vocab_size=30, lowercase=False))


def test_the_characters_of_a_word_are_its_bytes_between_two_marks():
    assert word_characters("été") == [BEGIN, 0xC3 + 1, 0xA9 + 1, 117, 0xC3 + 1, 0xA9 + 1, END, *[PAD] * 43]
    assert word_characters("") == [BEGIN, END, *[PAD] * 48]
    assert word_characters("a" * 60) == [BEGIN, *[98] * 48, END]
    # 47 bytes and half a letter more.
    assert word_characters("a" * 47 + "é")[48:] == [0xC3 + 1, END]
    assert word_characters(256) == [BEGIN, 257, END, *[PAD] * 47]


def test_a_text_is_words_between_the_marks_of_a_sentence(tokenizer):
    found = tokenizer("the cat, Zürich")
    assert tokenizer.convert_ids_to_tokens(found.input_ids)[1:-1] == ["the", "cat", ",", tokenizer.unk_token]
    expected = [word_characters(word) for word in (257, "the", "cat", ",", "Zürich", 257)]
    assert found.character_ids == expected
    # Without a vocabulary white space separates words, and the two marks are two.
    found = ElmoTokenizer.without_vocabulary()("the cat,")
    assert found.character_ids == [word_characters(word) for word in (256, "the", "cat,", 257)]


def test_words_that_are_given_stay_whole(tokenizer):
    found = tokenizer([["U.S.", "the"], ["cat"], []], is_split_into_words=True, padding=True, return_tensors="pt")
    assert found.character_ids.shape == (3, 4, 50) and found.input_ids.shape == (3, 4)
    rows = [[word_characters(word) for word in words] for words in ((257, "U.S.", "the", 257), (257, "cat", 257))]
    assert found.character_ids[0].tolist() == rows[0] and found.character_ids[1, :3].tolist() == rows[1]
    assert not found.character_ids[1, 3].any() and torch.equal(
        (found.character_ids != 0).any(-1), found.attention_mask > 0
    )
    assert tokenizer(["U.S."], is_split_into_words=True).character_ids[1] == word_characters("U.S.")
    # The text is cut again afterwards.
    assert len(tokenizer("U.S.").input_ids) > 3


def test_words_have_the_case_that_they_are_known_in():
    tokenizer = ElmoTokenizer.from_fast(train_tokenizer(TEXTS, kind="word", vocab_size=30, lowercase=True))
    assert tokenizer("The ZOO").character_ids[1:3] == [word_characters("the"), word_characters("zoo")]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_later_too(tokenizer, side):
    tokenizer.padding_side = side
    texts = ["the cat sat", "new"]
    at_once = tokenizer(texts, padding=True, return_tensors="pt")
    later = DataCollatorWithPadding(tokenizer)([tokenizer(text) for text in texts])
    assert all(torch.equal(at_once[name], later[name]) for name in at_once)
    parts = tokenizer(texts, truncation=True, max_length=3, return_overflowing_tokens=True)
    assert len(parts.character_ids) == 4 and all(len(row) == 3 for row in parts.character_ids)


def test_a_saved_one_is_the_same_and_so_is_its_table(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is ElmoTokenizer and again("the new cat") == tokenizer("the new cat")
    table = again.vocabulary_characters()
    assert len(table) == len(again) and not any(table[again.pad_token_id])
    assert table[again.eos_token_id] == word_characters(257)
    assert table[again.vocab["cat"]] == word_characters("cat")


def test_the_vocabulary_is_sorted_from_frequent_to_rare():
    words = train_tokenizer(["b b b a a c", "b a c d"], kind="word", vocab_size=30, lowercase=False)
    ids = [words.vocab[word] for word in "bac"]
    assert ids == sorted(ids) and "d" not in words.vocab
    small = train_tokenizer(["b b b a a c c"], kind="word", vocab_size=5, lowercase=False)
    assert "b" in small.vocab and "c" not in small.vocab
