"""Which teacher layer a student layer learns from."""

import pytest

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation.arguments import layer_map


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, (3, 6, 9, 12)),
        ("uniform", 6, 12, (2, 4, 6, 8, 10, 12)),
        ("uniform", 3, 3, (1, 2, 3)),
        ("last", 4, 12, (9, 10, 11, 12)),
        ("3,6,9,12", 4, 12, (3, 6, 9, 12)),
        (" 1, 5", 2, 6, (1, 5)),
        ([2, 2, 4], 3, 4, (2, 2, 4)),
        ("21", 1, 24, (21,)),
    ],
)
def test_maps(spec, student, teacher, expected):
    assert layer_map(spec, student_layers=student, teacher_layers=teacher) == expected


@pytest.mark.parametrize(
    ("spec", "student", "teacher", "message"),
    [
        ("uniform", 5, 12, "'uniform': 5 student layers do not divide 12 teacher layers"),
        ("uniform", 12, 4, "do not divide"),
        ("last", 6, 4, "leaves the teacher's layers, 1 to 4"),
        ("3,6", 3, 12, "has 2 entries for 3 student layers"),
        ("3,6,13", 3, 12, "leaves the teacher's layers, 1 to 12"),
        ([0, 6, 12], 3, 12, "leaves the teacher's layers"),
        ("6,3,9", 3, 12, "falls"),
        ("first", 3, 12, "'first' is unknown: use 'uniform', 'last'"),
        ("", 3, 12, "is unknown"),
    ],
)
def test_refusals(spec, student, teacher, message):
    with pytest.raises(InputError, match=message):
        layer_map(spec, student_layers=student, teacher_layers=teacher)
