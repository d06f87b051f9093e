"""Sentences by punctuation and lines."""

import time

import pytest

from hf_pretrain.data.documents.documents import one_per_line, sentence_starts


def sentences(text, splitter=sentence_starts):
    starts = splitter(text)
    assert all(type(start) is int for start in starts)
    assert starts == sorted(set(starts))
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("“Why?” he said. “No!” The (end.) Then", ["“Why?” he said.", "“No!”", "The (end.)", "Then"]),
        ("Wait... Then?! Go.\" 'So.' And", ["Wait...", "Then?!", 'Go."', "'So.'", "And"]),
        ("Mr. Smith saw Dr. No in St. Ives. He left.", ["Mr. Smith saw Dr. No in St. Ives.", "He left."]),
        ("Read e.g. Austen, i.e. Emma, cf. Fig. 3 on pp. 5.", ["Read e.g. Austen, i.e. Emma, cf. Fig. 3 on pp. 5."]),
        ("J. R. R. Tolkien wrote. So did I. And C.", ["J. R. R. Tolkien wrote.", "So did I.", "And C."]),
        ("It cost 3.5 dollars. 5 more came.", ["It cost 3.5 dollars.", "5 more came."]),
        ("Apples, pears, etc. were eaten etc. Then none.", ["Apples, pears, etc. were eaten etc.", "Then none."]),
        ("他说。“好！”然后走了？是。End", ["他说。", "“好！”", "然后走了？", "是。", "End"]),
        ("「はい。」と言った。次", ["「はい。」", "と言った。", "次"]),
        ("क्या है। हाँ।", ["क्या है।", "हाँ।"]),
        (
            "Heading\nText goes\non here\nNew line\n\nlower paragraph",
            ["Heading", "Text goes\non here", "New line", "lower paragraph"],
        ),
        ("Do:\n1. First thing. Second\n2. Next", ["Do:", "1. First thing.", "Second", "2. Next"]),
        ("Version 2.0.1 of x.y is out.Really", ["Version 2.0.1 of x.y is out.Really"]),
        ("  \n Start here. Next \n", ["Start here.", "Next"]),
        ("One.\r\nTwo.\r\n", ["One.", "Two."]),
        ("Hello", ["Hello"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_text_without_capitals_is_split_before_lower_case():
    text = "the cat sat . the dog ran ! mr. x left ?\nand so on"
    assert sentences(text) == ["the cat sat .", "the dog ran !", "mr. x left ?", "and so on"]
    assert len(sentences("The " + text)) == 1


def test_first_sentence_starts_at_zero_and_all_text_is_in_one():
    text = " \n\n A b. C d.\n\n\n E f? "
    assert sentence_starts(text)[0] == 0
    assert sentences(text) == ["A b.", "C d.", "E f?"]


def test_time_is_linear_in_runs_that_invite_backtracking():
    started = time.perf_counter()
    for run in ("." * 200_000, "\n" * 200_000, ".\n " * 60_000, '."' * 100_000, "a. " * 60_000, "。" * 200_000):
        sentence_starts(f"A{run}b")
    # About 0.1 s; quadratic time takes most of a minute.
    assert time.perf_counter() - started < 10


def test_one_per_line():
    assert sentences("one. still one\n\n  \ntwo\n", one_per_line) == ["one. still one", "two"]
    assert one_per_line("\nab\ncd") == [1, 4]
    assert one_per_line("") == []
