"""The docstring corpus and the held-out split."""

import sys
import warnings

import datasets
import numpy as np
import pytest

from hf_pretrain.data.text import docstrings as corpus
from hf_pretrain.data.text.docstrings import docstring_dataset, docstring_documents, module_docstrings, split_held_out
from hf_pretrain.errors import InputError

LONG = "A sentence that is repeated so that the docstring is long enough to be kept. " * 4

SOURCE = '''# comment
r"""Module \\d docs.

    Indented line.
"""
import does_not_exist_anywhere

raise SystemExit("never imported")

X = """Not a docstring."""


class A:
    """Class docs."""

    def method(self):
        \'\'\'Method docs.

        Second paragraph.
        \'\'\'

        async def inner():
            """Inner docs."""

    "Not a docstring either."


if X:
    try:
        def conditional():
            """Conditional docs."""
    except ValueError:
        def handled():
            """Handled docs."""
    finally:
        with X:
            def last():
                """Last docs."""

def after():
    "Single-quoted docs."
    match X:
        case 1:
            def cased():
                """Cased docs."""
'''


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Three folders that stand for the environment's, with 12 modules that have docstrings and some that do not."""
    stdlib, purelib, platlib = (tmp_path / name for name in ("lib", "lib/site-packages", "plat"))
    for i in range(12):
        folder = (stdlib, purelib, platlib)[i % 3] / f"package{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{i:02}.py").write_text(f'"""Number {i}.\n\n{LONG * (i + 1)}"""\n')
    (stdlib / "short.py").write_text('"""Short."""\n')
    (stdlib / "copy.py").write_text((stdlib / "package0" / "module00.py").read_text())
    (stdlib / "broken.py").write_text(f'"""{LONG}"""\nthis is no Python')
    (stdlib / "latin.py").write_bytes(f'# coding: latin-1\n"""caf\xe9 {LONG}"""'.encode("latin-1"))
    (stdlib / "bytes.py").write_bytes(f'"""caf\xe9 {LONG}"""'.encode("latin-1"))
    (stdlib / "nul.py").write_bytes(f'"""{LONG}\0"""'.encode())
    (stdlib / "deep.py").write_text(f'"""{LONG}"""\nx = ' + "-" * 100_000 + "1")
    (stdlib / "__pycache__").mkdir()
    (stdlib / "__pycache__" / "stale.py").write_text(f'"""Stale. {LONG}"""')
    paths = {"stdlib": str(stdlib), "purelib": str(purelib), "platlib": str(platlib)}
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_docstrings_of_a_module_in_their_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    assert module_docstrings(path) == "\n\n".join(
        [
            "Module \\d docs.\n\nIndented line.",
            "Class docs.",
            "Method docs.\n\nSecond paragraph.",
            "Inner docs.",
            "Conditional docs.",
            "Handled docs.",
            "Last docs.",
            "Single-quoted docs.",
            "Cased docs.",
        ]
    )


def test_no_text_that_is_no_text(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""Half a pair: \\ud800."""\nclass A:\n    """NUL: \\0."""\nclass B:\n    """Good."""\n')
    assert module_docstrings(path) == "Good."
    assert module_docstrings(tmp_path / "missing.py") == ""


def test_parsing_is_silent(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""Docs with \\d."""\nassert (1, "always")\n1 is 1\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module_docstrings(path) == "Docs with \\d."


def test_each_module_once_and_only_good_ones(environment):
    documents = list(docstring_documents())
    assert len(documents) == 13
    assert {document.split()[1] for document in documents if document.startswith("Number")} == {
        f"{i}." for i in range(12)
    }
    assert sum(document.startswith("café") for document in documents) == 1
    assert all(len(document) >= 200 for document in documents)


def test_order_is_keyed_and_a_subset_passes_over_what_does_not_fit(environment):
    documents = list(docstring_documents(seed=1))
    assert list(docstring_documents(seed=1)) == documents
    other = list(docstring_documents(seed=2))
    assert sorted(other) == sorted(documents) and other != documents
    sizes = np.cumsum([len(document.encode()) for document in documents])
    assert list(docstring_documents(max_bytes=int(sizes[3]), seed=1)) == documents[:4]
    for max_bytes in range(2_000, int(sizes[-1]), 700):
        expected, filled = [], 0
        for document in documents:
            size = len(document.encode())
            if filled + size <= max_bytes:
                expected.append(document)
                filled += size
            elif filled >= 0.9 * max_bytes:
                break
        assert list(docstring_documents(max_bytes=max_bytes, seed=1)) == expected
    with pytest.raises(InputError, match="max_corpus_bytes=10 "):
        list(docstring_documents(max_bytes=10))


def test_order_does_not_depend_on_where_the_environment_lies(environment, monkeypatch):
    documents = list(docstring_documents(seed=1))
    moved = environment / "zzz" / "moved"
    moved.parent.mkdir()
    (environment / "plat").rename(moved)
    paths = corpus.sysconfig.get_paths() | {"platlib": str(moved)}
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: paths)
    assert list(docstring_documents(seed=1)) == documents


def test_dataset_is_read_once_and_follows_the_environment(environment, monkeypatch):
    texts = docstring_dataset(seed=1)
    assert texts["text"][:] == list(docstring_documents(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "module_docstrings", lambda path: pytest.fail("read twice"))
        assert docstring_dataset(seed=1)["text"][:] == texts["text"][:]
    assert len(docstring_dataset(max_bytes=15_000, seed=1)) < 13
    (environment / "lib" / "new.py").write_text(f'"""New. {LONG}"""')
    assert len(docstring_dataset(seed=1)) == 14


def test_this_environment_has_documents():
    documents = list(docstring_documents(max_bytes=100_000))
    assert sum(len(document.encode()) for document in documents) > 30_000
    assert not {"antigravity", "this"} & {*sys.modules}


@pytest.mark.parametrize(
    ("num_documents", "fraction", "expected"), [(1000, 0.02, 20), (10, 0.001, 1), (2, 0.9, None), (7, 0.5, 4)]
)
def test_split(num_documents, fraction, expected):
    if expected is None:
        with pytest.raises(InputError, match="validation_fraction=0.9"):
            split_held_out(num_documents, fraction, seed=1)
        return
    train, held_out = split_held_out(num_documents, fraction, seed=1)
    assert len(held_out) == expected
    assert sorted([*train, *held_out]) == list(range(num_documents))
    assert train.tolist() == sorted(train) and held_out.tolist() == sorted(held_out)
    again = split_held_out(num_documents, fraction, seed=1)
    assert np.array_equal(again[1], held_out)


def test_split_is_keyed_and_spread():
    splits = [split_held_out(1000, 0.1, seed=seed)[1] for seed in (1, 2)]
    assert len({*splits[0].tolist()} & {*splits[1].tolist()}) < 40
    assert 400 < splits[0].mean() < 600


def test_split_of_nothing_and_of_too_little():
    train, held_out = split_held_out(5, 0.0)
    assert (len(train), len(held_out)) == (5, 0)
    with pytest.raises(InputError, match="document_separator"):
        split_held_out(1, 0.02)
    for fraction in (1.0, -0.1):
        with pytest.raises(InputError, match="validation_fraction="):
            split_held_out(10, fraction)
