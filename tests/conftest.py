"""The setting of every test: no network, one thread, a tiny tokenizer and tiny documents."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging as transformers_logging

from helpers.left_files import LeftFiles
from helpers.method_matrix import tiny_data, tiny_tokenizer
from hf_pretrain.files import write_bytes
from hf_pretrain.hub import plots

# Tiny models gain nothing from more threads, and lose much on shared cores.
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


def pytest_collection_finish(session):
    """Let garbage collections skip the imported modules: each training begins with one, which else takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def left_files():
    """What is new in the root of the repository."""
    return LeftFiles()


@pytest.fixture(autouse=True)
def leaves_no_file(left_files):
    """Fail a test, in its teardown, that leaves a file where a commit would take it along; a test beside it may be the one."""
    yield
    left = left_files.new()
    assert not left, (
        f"left in {left_files.folder}: {', '.join(left)}: write to tmp_path, or monkeypatch.chdir(tmp_path) first"
    )


@pytest.fixture(scope="session", autouse=True)
def known_pictures():
    """Give each card the first pictures that were drawn: a picture takes as long as the training of a tiny model."""
    draw, known = plots._draw, {}

    def copy(figure, path, **options):
        if path.name not in known:
            known[path.name] = draw(figure, path, **options).read_bytes()
        return write_bytes(path, known[path.name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_draw", copy)
        yield draw


@pytest.fixture
def own_pictures(known_pictures, monkeypatch):
    """Draw the pictures of each card, for tests that look at them."""
    monkeypatch.setattr(plots, "_draw", known_pictures)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def data():
    return tiny_data()
