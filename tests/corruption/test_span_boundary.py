"""What the boundaries of hidden spans are asked for, against a loop over the rows."""

import numpy as np
import pytest

from hf_pretrain.corruption.rows import ExampleRows, RowKeys
from hf_pretrain.corruption.spans import span_boundary_targets


def rows_of(input_ids, valid=None, document_ids=None):
    keys = RowKeys(np.arange(len(input_ids)), np.zeros(len(input_ids), dtype=np.int64), 0)
    valid = np.ones(input_ids.shape, dtype=bool) if valid is None else valid
    return ExampleRows(input_ids, valid, keys, document_ids=document_ids)


def by_hand(input_ids, mask, ordinary, span_positions):
    found = []
    for row in range(len(mask)):
        column = 0
        while column < mask.shape[1]:
            if not mask[row, column]:
                column += 1
                continue
            start = column
            while column < mask.shape[1] and mask[row, column]:
                column += 1
            if start == 0 or column == mask.shape[1] or not (ordinary[row, start - 1] and ordinary[row, column]):
                continue
            for place in range(min(column - start, span_positions)):
                found.append((row, start - 1, column, place, input_ids[row, start + place]))
    return found


def as_tuples(targets):
    columns = (targets.rows, targets.left, targets.right, targets.offsets, targets.labels)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("span_positions", [1, 3, 20])
def test_targets_are_those_of_a_loop(span_positions):
    rng = np.random.default_rng(0)
    input_ids = rng.integers(5, 60, (40, 70))
    valid = np.arange(70) < rng.integers(3, 71, 40)[:, None]
    ordinary = valid & (rng.random(valid.shape) < 0.97)
    ordinary[:, 0] = False
    runs = np.repeat(rng.random((40, 14)) < 0.5, 5, axis=1)  # of 5 tokens and more, some beyond 20
    mask = runs & ordinary
    mask[3, 10:40], ordinary[3, :69], mask[3, [9, 40]] = True, True, False
    targets = as_tuples(
        span_boundary_targets(rows_of(input_ids, valid), mask=mask, ordinary=ordinary, span_positions=span_positions)
    )
    assert targets == by_hand(input_ids, mask, ordinary, span_positions)
    assert len(targets) > 30 and max(place for *_, place, _ in targets) == span_positions - 1
    for row, left, right, _, _ in targets:
        assert ordinary[row, [left, right]].all() and not mask[row, [left, right]].any()


def test_a_span_at_an_edge_or_beside_another_document_is_left_out():
    input_ids = np.arange(5, 17)[None]
    mask, ordinary = np.zeros((1, 12), dtype=bool), np.ones((1, 12), dtype=bool)
    mask[0, [0, 4, 5, 11]] = True
    assert as_tuples(span_boundary_targets(rows_of(input_ids), mask=mask, ordinary=ordinary, span_positions=20)) == [
        (0, 3, 6, 0, 9),
        (0, 3, 6, 1, 10),
    ]
    documents = np.array([[0] * 5 + [1] * 7])
    rows = rows_of(input_ids, document_ids=documents)
    assert not as_tuples(span_boundary_targets(rows, mask=mask, ordinary=ordinary, span_positions=20))


def test_nothing_hidden_has_no_target():
    ordinary = np.ones((2, 6), dtype=bool)
    rows = rows_of(np.full((2, 6), 7))
    assert not as_tuples(span_boundary_targets(rows, mask=~ordinary, ordinary=ordinary, span_positions=20))
