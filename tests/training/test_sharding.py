"""FSDP2: what is a unit of its own, and every method trained so on two ranks of a CPU, like one process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertModel,
)

from helpers.method_matrix import TINY, VOCAB_SIZE, build, log_of, programs, relative_difference
from helpers.sharded_worker import options_of
from helpers.two_ranks import run_on_ranks
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.training.processes import is_sharded, sharded_blocks, sharded_by_blocks

PROGRAMS = programs()
FAST = ["mlm", "rtd", "recurrent-lm"]
METHODS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
BERT = BertConfig(**TINY, vocab_size=VOCAB_SIZE)


def test_blocks_are_units():
    bert = BertForMaskedLM(BERT)
    assert sharded_blocks(bert) == {"BertLayer"} and not is_sharded(bert)
    modernbert = ModernBertConfig(**TINY, vocab_size=VOCAB_SIZE, pad_token_id=0, cls_token_id=2, sep_token_id=3)
    assert sharded_blocks(ModernBertModel(modernbert)) == {"ModernBertEncoderLayer"}


def test_a_model_without_blocks_of_its_own_is_one_unit():
    """Where layers share their parameters, or transformers does not know them as blocks, there is nothing to take apart."""
    albert = AlbertForMaskedLM(AlbertConfig(**TINY, embedding_size=16, vocab_size=VOCAB_SIZE))
    assert sharded_blocks(albert) == set()
    pair = torch.nn.ModuleList([BertForMaskedLM(BERT), BertForMaskedLM(BERT)])
    assert sharded_blocks(pair) == {"BertLayer"}
    first, second = (model.bert.encoder.layer[0].output.dense for model in pair)
    second.weight = first.weight
    assert sharded_blocks(pair) == set()


def test_a_model_is_as_it_was_afterwards():
    model = EncoderForPreTraining.from_model(BertForMaskedLM(BERT))
    named = set(model._no_split_modules)
    with pytest.raises(RuntimeError, match="inside"), sharded_by_blocks(model):
        assert model.get_input_embeddings() is None
        assert model._no_split_modules == {"BertLayer"}
        raise RuntimeError("inside")
    assert model._no_split_modules == named
    assert model.get_input_embeddings() is model.model.bert.embeddings.word_embeddings


def test_fsdp_where_nothing_would_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        InputError, match=r"FSDP was asked for.* num_processes=1 on device='cpu': launch with cpu.yaml"
    ):
        build(PROGRAMS["mlm"], tmp_path)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Return a function of a method: the folder of its run on two ranks, which is one for those that always run."""
    folders = {}

    def sharded(method):
        group = [name for name in PROGRAMS if (name in FAST) == (method in FAST)]
        if group[0] not in folders:
            folders[group[0]] = folder = tmp_path_factory.mktemp("sharded")
            (folder / "methods.json").write_text(json.dumps(group))
            run_on_ranks("helpers.sharded_worker", folder, world_size=2)
        return folders[group[0]]

    return sharded


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_that_share_the_parameters_train_as_one_process(sharded, tmp_path, method):
    folder = sharded(method)
    alone = build(PROGRAMS[method], tmp_path, per_device_train_batch_size=8, **options_of(method))
    alone.train()
    alone.save_model()
    log, evaluation = log_of(alone), alone.evaluate()["eval_loss"]
    expected = {name: value.double() for name, value in alone.model.state_dict().items()}
    for rank in range(2):
        found = torch.load(folder / f"{method}-{rank}.pt")
        assert found["is_sharded"] and found["is_sharded_whole"]
        assert found["units"] == {f"FSDP{name}" for name in (type(alone.model).__name__, *sharded_blocks(alone.model))}
        state = {name: value.double() for name, value in found["state"].items()}
        assert relative_difference(expected, state) < 1e-5
        for row, other in zip(log, found["log"], strict=True):
            assert other == pytest.approx(row, rel=1e-5)
        assert found["evaluation"] == pytest.approx(evaluation, rel=1e-5)
    for part in alone.model.export_parts:
        one, other = (load_file(path / part / "model.safetensors") for path in (tmp_path, folder / method))
        assert relative_difference(*({n: v.double() for n, v in file.items()} for file in (one, other))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_shared_parameters_is_taken_up_bit_for_bit(sharded, method):
    folder = sharded(method)
    for rank in range(2):
        found = torch.load(folder / f"{method}-{rank}.pt")
        assert found["resumed_log"] == found["log"]
        assert all(torch.equal(value, found["resumed_state"][name]) for name, value in found["state"].items())
    files = {path.name for path in (folder / method / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"} <= files
