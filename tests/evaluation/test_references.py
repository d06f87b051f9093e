"""The counts and the rule beside a denoising loss, against plain loops over plain dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation import references
from hf_pretrain.evaluation.references import TokenCounts, copied_tokens, neighbour_losses, reference_losses
from hf_pretrain.modeling.losses import IGNORED

# The collator's beginning of a decoder's input.
START, PAD = -1, 1
NAMES = ("unigram_nll", "bigram_nll", "copy_accuracy")


def batch_of(pairs, *, start=START):
    """The collated batch of pairs (input, target, numbers of the hidden targets)."""
    width, length = max(len(pair[0]) for pair in pairs), max(len(pair[1]) for pair in pairs)
    batch = {
        "input_ids": np.full((len(pairs), width), PAD),
        "attention_mask": np.zeros((len(pairs), width), dtype=np.int64),
        "decoder_input_ids": np.full((len(pairs), length), PAD),
        "labels": np.full((len(pairs), length), -100),
        "is_hidden": np.zeros((len(pairs), length), dtype=bool),
    }
    for row, (source, target, hidden) in enumerate(pairs):
        batch["input_ids"][row, : len(source)] = source
        batch["attention_mask"][row, : len(source)] = 1
        batch["decoder_input_ids"][row, : len(target)] = [start, *target[:-1]]
        batch["labels"][row, : len(target)] = target
        batch["is_hidden"][row, list(hidden)] = True
    return batch


def random_pairs(number, *, vocab_size, seed, longest=12):
    """Pairs of random tokens, so that many pairs of neighbours were never counted."""
    values = draws.integers(draws.row_keys(range(number), seed=seed, stream="pairs"), 3 * longest, high=vocab_size)
    # Drawn apart, or a small vocabulary would have short texts alone.
    lengths = draws.integers(draws.row_keys(range(number), seed=seed, stream="lengths"), 2, high=longest)
    pairs = []
    for row, (first, second) in zip(values.tolist(), lengths.tolist(), strict=True):
        target = row[: 1 + first]
        source = row[longest : longest + 1 + second]
        pairs.append((source, target, [i for i in range(len(target)) if row[2 * longest + i] % 3 == 0]))
    return pairs


def by_loops(train, held_out, vocab_size):
    """The definitions, one target at a time."""
    tokens, pairs = Counter(), Counter()
    for _, target, _ in train:
        tokens.update(target)
        pairs.update(zip([START, *target[:-1]], target, strict=True))
    rows = []
    for source, target, hidden in held_out:
        finger = 0
        for place, token in enumerate(target):
            before = target[place - 1] if place else START
            unigram = (tokens[token] + 1) / (sum(tokens.values()) + vocab_size)
            behind = {pair[1]: count for pair, count in pairs.items() if pair[0] == before}
            bigram = unigram
            if behind:
                bigram = (behind.get(token, 0) + len(behind) * unigram) / (sum(behind.values()) + len(behind))
            if place and before in source:
                while source[finger] != before:
                    finger = (finger + 1) % len(source)
                finger = (finger + 1) % len(source)
            rows.append((-math.log(unigram), -math.log(bigram), source[finger] == token, place in hidden))
    means = {name: float(np.mean([row[i] for row in rows])) for i, name in enumerate(NAMES)}
    return means | {f"hidden_{n}": float(np.mean([row[i] for row in rows if row[3]])) for i, n in enumerate(NAMES)}


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize(("vocab_size", "start"), [(3, -1), (40, -1), (41, 40)])
def test_the_numbers_are_those_of_the_definitions(convert, vocab_size, start):
    train, held_out = (random_pairs(24, vocab_size=min(vocab_size, 40), seed=seed) for seed in (0, 1))
    batches = [
        [
            {name: convert(value) for name, value in batch_of(pairs[i : i + 5], start=start).items()}
            for i in range(0, 24, 5)
        ]
        for pairs in (train, held_out)
    ]
    found = reference_losses(iter(batches[0]), iter(batches[1]), vocab_size=vocab_size)
    expected = by_loops(train, held_out, vocab_size)
    assert list(found) == [*NAMES, *(f"hidden_{name}" for name in NAMES)]
    assert found == pytest.approx(expected, rel=1e-12)
    # Nothing here agrees by chance.
    assert abs(expected["bigram_nll"] - expected["unigram_nll"]) > 1e-3
    assert abs(expected["hidden_unigram_nll"] - expected["unigram_nll"]) > 1e-3


def test_a_case_by_hand():
    """Three targets a pair: 2, 3, 3 and 2, 4, 3; then 2, 3 is held out, of which 3 is hidden."""
    train = [batch_of([([2], [2, 3, 3], []), ([2], [2, 4, 3], [])])]
    found = reference_losses(train, [batch_of([([2, 5], [2, 3], [1])])], vocab_size=6)
    # Tokens: 2 twice, 3 three times, 4 once. Behind the start: 2 twice. Behind 2: 3 and 4.
    of_2, of_3 = 3 / 12, 4 / 12
    assert found["unigram_nll"] == pytest.approx(-(math.log(of_2) + math.log(of_3)) / 2)
    assert found["hidden_unigram_nll"] == pytest.approx(-math.log(of_3))
    behind_start, behind_2 = (2 + 1 * of_2) / 3, (1 + 2 * of_3) / 4
    assert found["bigram_nll"] == pytest.approx(-(math.log(behind_start) + math.log(behind_2)) / 2)
    assert found["hidden_bigram_nll"] == pytest.approx(-math.log(behind_2))
    assert (found["copy_accuracy"], found["hidden_copy_accuracy"]) == (0.5, 0.0)


def test_both_counts_are_distributions(monkeypatch):
    """Behind a token that was seen often, seldom, or never; also where the pairs are merged again and again."""
    vocab_size, once = 50, {}
    keys = draws.row_keys(range(2), seed=3, stream="counted")
    previous, targets = draws.integers(keys, 3000, high=40).astype(np.int64)
    previous = np.minimum(previous, 39 - previous) - 1
    for most in (1 << 20, 64):
        monkeypatch.setattr(references, "_MOST_WAITING", most)
        counts = TokenCounts(vocab_size)
        for begin in range(0, 3000, 50):
            counts.add(previous[begin : begin + 50], targets[begin : begin + 50])
        everything = np.arange(vocab_size)
        table = np.stack([counts.bigram(np.full(vocab_size, v), everything) for v in range(-1, vocab_size)])
        np.testing.assert_allclose(table.sum(1), 1, rtol=1e-12)
        assert (table > 0).all() and counts.unigram().sum() == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(table[46], counts.unigram(), rtol=1e-12)
        once[most] = table
    np.testing.assert_array_equal(once[64], once[1 << 20])


def test_the_bigram_knows_a_text_in_which_each_token_has_one_successor():
    """The weight of the unigram falls as 1 / n, so that the loss falls below any bound; the unigram's stays at log 10."""
    cycle = [2 + i % 10 for i in range(4000)]
    found = reference_losses(
        [batch_of([([2], cycle, [])])], [batch_of([([2], cycle[:200], [7])], start=11)], vocab_size=12
    )
    assert found["bigram_nll"] < 0.003
    assert found["unigram_nll"] == pytest.approx(math.log(10), abs=0.01)


class TestCopying:
    def test_sentences_in_another_order(self):
        """Only the beginning of a sentence is not guessed, and that of the last one not by chance."""
        target = np.array([10, 11, 12, 20, 21, 30, 31, 32, 33])
        source = np.array([20, 21, 30, 31, 32, 33, 10, 11, 12])
        guesses = copied_tokens(source, np.array([START, *target[:-1]]))
        # Behind 12, the end, comes 20, the beginning; behind 21 comes 30.
        assert guesses.tolist() == [20, 11, 12, 20, 21, 30, 31, 32, 33]

    def test_the_nearest_of_several_is_used(self):
        source = [5, 6, 5, 7, 5, 8]
        assert copied_tokens(np.array(source), np.array([START, *source[:-1]])).tolist() == source
        # 8 leads back to the beginning, where the first 5 is nearest again.
        assert copied_tokens(np.array(source), np.array([START, 8, 5, 5, 5])).tolist() == [5, 5, 6, 7, 8]

    def test_a_token_that_is_not_there_moves_nothing(self):
        source, target = [5, 9, 7], [5, 6, 6, 7]
        assert copied_tokens(np.array(source), np.array([START, *target[:-1]])).tolist() == [5, 9, 9, 9]

    def test_an_untouched_text_is_copied_and_what_is_replaced_is_not(self):
        text = list(range(5, 25))
        masked = [3 if i in (4, 11) else token for i, token in enumerate(text)]
        whole, hidden = batch_of([(text, text, [])]), batch_of([(masked, text, [4, 11])])
        assert reference_losses([whole], [whole], vocab_size=30)["copy_accuracy"] == 1
        assert not any("hidden" in name for name in reference_losses([whole], [whole], vocab_size=30))
        found = reference_losses([whole], [hidden], vocab_size=30)
        # A hidden token and the one behind it: the mask is guessed for both.
        assert found["copy_accuracy"] == 16 / 20 and found["hidden_copy_accuracy"] == 0

    def test_pairs_of_one_row_are_copied_each_from_its_own_input(self):
        first, second = ([5, 6, 7], [5, 6, 7], [0]), ([8, 5, 9], [8, 5, 9], [2])
        apart = batch_of([first, second])
        together = {
            "input_ids": np.array([[5, 6, 7, 8, 5, 9, PAD]]),
            "attention_mask": np.array([[1, 1, 1, 1, 1, 1, 0]]),
            "document_ids": np.array([[0, 0, 0, 1, 1, 1, -1]]),
            "decoder_input_ids": np.array([[START, 5, 6, START, 8, 5]]),
            "labels": np.array([[5, 6, 7, 8, 5, 9]]),
            "is_hidden": np.array([[True, False, False, False, False, True]]),
            "decoder_document_ids": np.array([[0, 0, 0, 1, 1, 1]]),
        }
        expected = reference_losses([apart], [apart], vocab_size=10)
        assert reference_losses([together], [together], vocab_size=10) == pytest.approx(expected)
        assert expected["copy_accuracy"] == 1


class TestBadInput:
    def test_an_id_beyond_the_vocabulary(self):
        batch = batch_of([([5], [5, 6], [])])
        with pytest.raises(InputError, match=r"labels holds the id 6, and vocab_size=6"):
            reference_losses([batch], [batch], vocab_size=6)
        for start in (9, -2):
            with pytest.raises(InputError, match=f"decoder_input_ids holds the id {start}"):
                reference_losses([batch], [batch_of([([5], [5, 6], [])], start=start)], vocab_size=8)

    def test_no_targets(self):
        batch, empty = batch_of([([5], [5], [])]), batch_of([([5], [5], [])])
        empty["labels"][:] = -100
        with pytest.raises(InputError, match="train_batches has no target"):
            reference_losses([empty], [batch], vocab_size=6)
        with pytest.raises(InputError, match="held_out_batches has no target"):
            reference_losses([batch], [], vocab_size=6)


@pytest.mark.parametrize("prefix", ["", "backward_"])
def test_neighbours_of_a_text_are_counted_in_the_order_of_a_direction(prefix):
    """With labels of the next token, or of the one before: the previous token of a target is that of its own direction."""
    train, held_out = [[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 2, 3]], [[3, 1, 2], [2, 2, 1]]

    def collate(rows):
        width = max(map(len, rows))
        ids, following, before = (torch.full((len(rows), width), fill) for fill in (0, IGNORED, IGNORED))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            following[number, : len(row) - 1] = torch.tensor(row[1:])
            before[number, 1 : len(row)] = torch.tensor(row[:-1])
        return {"input_ids": ids, "labels": following, "backward_labels": before}

    def pairs(rows):
        steps = [step for row in rows for step in zip(row, row[1:], strict=False)]
        return np.array([step[::-1] if prefix else step for step in steps]).T

    counts = TokenCounts(5)
    counts.add(*pairs(train))
    previous, targets = pairs(held_out)
    found = neighbour_losses(collate, train, held_out, vocab_size=5, seed=0, prefix=prefix)
    assert found["unigram_nll"] == pytest.approx(-np.log(counts.unigram()[targets]).mean())
    assert found["bigram_nll"] == pytest.approx(-np.log(counts.bigram(previous, targets)).mean())
    assert found["bigram_nll"] != pytest.approx(-np.log(counts.bigram(targets, previous)).mean())
    assert neighbour_losses(collate, train, [[1]], vocab_size=5, seed=0, prefix=prefix) == {}
