"""The sentences in a card's code: from the held-out text, in its language, or ours where the text is private."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import pytest
from reference_inputs import MLM, REFERENCE_CARDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_pretrain.hub.card import render_card, snippets
from hf_pretrain.hub.examples import examples_of, find_examples, in_code
from hf_pretrain.hub.record import PretrainingCard

BARE = PretrainingCard(model_name="bare", model_class="BertForMaskedLM", objective=MLM)
GERMAN = (
    "Halber Anfang eines Satzes. Der Bäcker hat das Brot geholt. Am Abend war davon nichts mehr übrig. Die Kinder spielten noch "
    "lange im Hof. Und dieses Ende ist"
)
CHINESE = "前面的半句话。厨师今天早上吃了很多新鲜的饭菜。孩子们晚上在院子里玩了很久。后面的半句"


def _tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """One token for a word, or for a character in a text without spaces."""
    words = sorted({word for text in texts for word in (text.replace(".", " .").split() if " " in text else text)})
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[CLS]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    has_spaces = " " in texts[0]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if has_spaces else pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.WordPiece(cleanup=True) if has_spaces else decoders.Fuse()
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _examples(text: str, tokenizer: PreTrainedTokenizerFast, *, copies: int = 1) -> list[dict[str, Any]]:
    return [{"input_ids": [1, *tokenizer(text)["input_ids"]]}] * copies


def test_two_whole_sentences_of_the_held_out_text_are_found_and_a_word_of_one_token_is_chosen() -> None:
    tokenizer = _tokenizer(GERMAN)
    first, second = find_examples(_examples(GERMAN, tokenizer), tokenizer, seed=1)
    assert (first, second) == ("Der |Bäcker| hat das Brot geholt.", "Am Abend war davon nichts mehr übrig.")
    assert find_examples({"a": _examples(GERMAN, tokenizer)}, tokenizer, seed=1) == (first, second)


def test_a_script_without_spaces_has_sentences_too() -> None:
    tokenizer = _tokenizer(CHINESE)
    first, second = find_examples(_examples(CHINESE, tokenizer), tokenizer, seed=1)
    assert first.replace("|", "") == "厨师今天早上吃了很多新鲜的饭菜。" and first.count("|") == 2
    assert second == "孩子们晚上在院子里玩了很久。"


@pytest.mark.parametrize("text", ["w1 w1 w1 w1", "x = {1: 2} ; y = [3] . z = (4) * 5 . q = 6 ^ 7 . r ."])
def test_a_text_without_sentences_gives_none(text: str) -> None:
    tokenizer = _tokenizer(text)
    assert find_examples(_examples(text, tokenizer), tokenizer, seed=1) == ()
    assert find_examples(None, tokenizer, seed=1) == find_examples(_examples(text, tokenizer), None, seed=1) == ()


def test_an_unknown_word_is_no_example() -> None:
    tokenizer = _tokenizer("ganz andere Wörter .")
    assert find_examples(_examples(GERMAN, tokenizer), tokenizer, seed=1) == ()


def test_without_a_sentence_of_the_text_ours_is_in_its_language() -> None:
    assert examples_of(BARE)[0] == "The chef ate the |meal|."
    assert examples_of(dataclasses.replace(BARE, language=["xx", "de-AT"]))[0].startswith("Der Koch")
    mine = dataclasses.replace(BARE, language="de", examples=("Ein |Satz|.", "Noch einer."))
    assert examples_of(mine) == ("Ein |Satz|.", "Noch einer.")


@pytest.mark.parametrize(
    "text",
    ['Er sagte: "|Ja|" {und} \\n ging.', "{repo} {masked} |x| {sentence}.", "```|python|``` ${x}", "Kein Balken."],
)
def test_any_sentence_is_a_literal_of_the_code_letter_by_letter(text: str) -> None:
    card = dataclasses.replace(BARE, repo="me/x", examples=(text, 'B "b".'))
    whole, before, after = text.replace("|", ""), text.split("|")[0], (text.split("|") + ["", ""])[2]
    lines = in_code("a = {sentence}\nb = {another}\nc = {masked}\nd = {beginning}\ne = '{repo}'", card)
    assert [type(node) for node in ast.parse(lines).body] == [ast.Assign] * 5
    found: dict[str, Any] = {"fill_mask": dataclasses.make_dataclass("Mask", ["tokenizer"])(None)}
    found["fill_mask"].tokenizer = dataclasses.make_dataclass("Tokenizer", ["mask_token"])("[MASK]")
    exec(lines, found)
    assert (found["a"], found["b"], found["e"]) == (whole, 'B "b".', "me/x")
    assert found["c"] == f"{before}[MASK]{after}" and whole.startswith(found["d"]) and 0 < len(found["d"]) < len(whole)


@pytest.mark.parametrize("name", REFERENCE_CARDS)
def test_no_card_has_an_english_sentence_where_the_text_is_of_another_language(name: str) -> None:
    card = dataclasses.replace(REFERENCE_CARDS[name], examples=(), language="ja")
    code = "\n".join(snippets(render_card(card)))
    assert "料理人" in code and "chef" not in code and "meal" not in code and "{" + "sentence}" not in code
