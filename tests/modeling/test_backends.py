"""Which attention backend a training takes, and flash attention on padded rows."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.utils import logging

from helpers import flash
from helpers.causal_models import causal_lm
from helpers.method_matrix import TINY, build, programs
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments, attention_options
from hf_pretrain.modeling.visibility import backends, rules
from hf_pretrain.modeling.visibility.backends import (
    OWN_MASKS,
    Attending,
    Choice,
    FastAttention,
    dropout_of,
    flash_backend,
    padded_bounds,
)
from hf_pretrain.modeling.visibility.causal import CausalReader
from hf_pretrain.modeling.visibility.rules import isolated_inputs
from hf_pretrain.training.progress import plan_line

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PROGRAMS = programs()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with packages of flash attention: a function that says which GPU and which packages."""

    def install(*versions, capability=(9, 0), kernels=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for version in (2, 3):
            name = f"is_flash_attn_{version}_available"
            monkeypatch.setattr(backends.import_utils, name, lambda version=version: version in versions)
        monkeypatch.setattr(backends.import_utils, "is_kernels_available", lambda: kernels)

    return install


@pytest.mark.parametrize(
    ("versions", "capability", "dropout", "expected"),
    [
        ((2, 3), (9, 0), 0.0, "flash_attention_3"),
        ((2, 3), (8, 0), 0.0, "flash_attention_2"),
        ((2, 3), (9, 0), 0.1, "flash_attention_2"),
        ((3,), (9, 0), 0.1, "flash attention 3 has no dropout of probabilities (0.1), 2 is not installed"),
        ((2,), (7, 5), 0.0, "flash attention needs a GPU of compute capability 8.0"),
        ((), (9, 0), 0.0, "flash attention is not installed"),
    ],
)
def test_the_fastest_that_can_run(gpu, versions, capability, dropout, expected):
    gpu(*versions, capability=capability)
    found = flash_backend(CUDA, torch.bfloat16, dropout=dropout)
    assert found == (Choice(expected) if expected.startswith("flash_") else Choice(None, expected))


def test_none_in_fp32_or_on_a_cpu(gpu):
    gpu(2, 3)
    assert flash_backend(CUDA, torch.float16).backend is not None
    assert flash_backend(CUDA, torch.float32) == Choice(None, "flash attention needs bf16 or fp16, not float32")
    assert flash_backend(CPU, torch.bfloat16) == Choice(None, "flash attention needs a GPU")


@pytest.mark.parametrize(("offline", "fits", "expected"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_kernel_of_the_hub_where_it_loads(gpu, monkeypatch, offline, fits, expected):
    def load(name):
        if not fits:
            raise OSError(f"no build of {name}")

    gpu(kernels=True)
    monkeypatch.setattr(backends, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(backends, "lazy_import_flash_attention", load)
    found = flash_backend(CUDA, torch.bfloat16).backend
    assert (found is not None and found.startswith("kernels-community/")) == bool(expected)


@pytest.fixture
def calls(monkeypatch):
    return flash.install(monkeypatch)


def fast_attention(model, **options):
    return FastAttention({"model": Attending(model, CPU, torch.float32)}, **{"allowed": ["model"], **options})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_two_sequences_each(side):
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    bounds = padded_bounds(mask)
    first = 2 if side == "left" else 4
    assert bounds["cu_seq_lens_q"].tolist() == [0, 6, 6, 6 + first, 12, 18, 18]
    assert bounds["cu_seq_lens_q"].dtype == torch.int32 and bounds["max_length_k"] == 6
    assert padded_bounds(mask.to("meta"))["cu_seq_lens_q"].shape == (7,), "nothing is read"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_states_of_padded_rows_are_those_under_a_mask(calls, model_type):
    options = (
        {"pad_token_id": 0, "global_attn_every_n_layers": 1} if model_type == "modernbert" else {"pad_token_id": 0}
    )
    config = AutoConfig.for_model(model_type, **TINY, vocab_size=60, attn_implementation="sdpa", **options)
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids, mask = torch.arange(5, 53).view(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, 17:] = 0
    inputs = {"input_ids": ids.where(mask != 0, 0), "attention_mask": mask, "is_padded": True}
    expected = model(**isolated_inputs(model, **inputs)).logits
    with fast_attention(model).running():
        given = isolated_inputs(model, **inputs)
        found = model(**given).logits
    assert given["attention_mask"] is None and "cu_seq_lens_q" in given
    torch.testing.assert_close(found[mask != 0], expected[mask != 0], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_only_the_backend_of_transformers_is_changed(calls, backend):
    config = AutoConfig.for_model("bert", **TINY, attn_implementation=backend)
    model = AutoModelForMaskedLM.from_config(config)
    assert fast_attention(model).names == ("flash_attention_2" if backend == "sdpa" else "eager")


def test_a_model_without_flash_attention_keeps_its_own(calls):
    config = AutoConfig.for_model("deberta-v2", **TINY)
    model = AutoModelForMaskedLM.from_config(config)
    assert str(fast_attention(model)) == "eager (DebertaV2ForMaskedLM has no flash attention)"


def test_dropout_of_probabilities_has_other_names_and_may_be_that_of_a_part():
    assert dropout_of(causal_lm("gpt2", attn_pdrop=0.1)) == 0.1
    model = causal_lm("llama")
    assert dropout_of(model) == 0.0
    model.model.layers[0].self_attn.config = AutoConfig.for_model("llama", attention_dropout=0.2)
    assert dropout_of(model) == 0.2


def test_heads_that_no_kernel_has(calls):
    wide = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **TINY | {"hidden_size": 516}))
    assert str(fast_attention(wide)) == "sdpa (flash attention has no heads wider than 256)"


def test_a_frozen_model_drops_nothing(gpu):
    gpu(3)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **TINY))
    for drops in (True, False):
        part = Attending(model, CUDA, torch.bfloat16, drops=drops)
        assert FastAttention({"teacher": part}, allowed=["teacher"]).is_faster == (not drops)


def test_a_model_that_mixes_documents_goes_back_to_its_own_attention(calls, monkeypatch, caplog):
    config = AutoConfig.for_model("bert", **TINY, vocab_size=60)
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids, documents = torch.arange(5, 29)[None], torch.tensor([[0] * 10 + [1] * 14])
    positions = torch.tensor([[*range(10), *range(14)]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "document_ids": documents,
        "position_ids": positions,
    }
    expected = model(**isolated_inputs(model, **batch)).logits
    fast = fast_attention(model)
    # As of an architecture that does not hand the bounds on.
    monkeypatch.setattr(rules, "sequence_bounds", lambda ids: padded_bounds(torch.ones_like(ids)))
    logging.set_verbosity_warning()
    logging.enable_propagation()
    for _ in range(2):
        with fast.running():
            torch.testing.assert_close(model(**isolated_inputs(model, **batch)).logits, expected)
            assert model.config._attn_implementation == "sdpa"
    assert fast.names == "sdpa" and not fast.is_faster and "cannot isolate documents" in str(fast)
    assert sum("attention of the model: sdpa (" in line.message for line in caplog.records) == 1
    named = copy.deepcopy(model)
    named.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2"):
        isolated_inputs(named, **batch)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_model_whose_states_change_goes_back_to_its_own_attention(calls, monkeypatch, kind):
    ids = torch.arange(4, 44).view(2, 20)
    if kind == "encoder":
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **TINY, vocab_size=60)).eval()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "is_padded": False}
        read = lambda: model(**isolated_inputs(model, **batch)).logits  # noqa: E731
    else:
        model = causal_lm("llama")
        reader = CausalReader(model)
        read = lambda: reader(ids)  # noqa: E731
    expected = read()
    monkeypatch.setattr(flash, "flash_attn_func", lambda query, key, value, **options: 100 * value)
    fast = fast_attention(model)
    with fast.running():
        torch.testing.assert_close(read(), expected)
        assert model.config._attn_implementation == "sdpa"
    assert calls and "its states are not those of its own attention" in str(fast)


@pytest.mark.parametrize("method", ["encoder", "mlm", "rtd"])
def test_a_step_runs_on_flash_attention_and_nothing_else_does(calls, method, tmp_path):
    losses = {}
    for wanted in ("auto", "sdpa"):
        trainer = build(PROGRAMS[method], tmp_path / wanted, model_options={"attn_implementation": wanted})
        seen = []

        def note(module, args, seen=seen):
            seen.append(module.config._attn_implementation)

        for part in trainer.model.backbones.values():
            part.register_forward_pre_hook(note)
        trainer.train()
        assert set(seen) == {"sdpa" if wanted == "sdpa" else "flash_attention_2"}
        losses[wanted] = trainer.state.log_history[0]["loss"]
        assert trainer.attention == seen[0]
        assert {part.config._attn_implementation for part in trainer.model.backbones.values()} == {"sdpa"}
    assert losses["auto"] == pytest.approx(losses["sdpa"], rel=1e-4)


def test_methods_with_masks_of_their_own_stay_on_theirs(calls, tmp_path):
    trainer = build(PROGRAMS["electric"], tmp_path)
    reason = "a tower reads in one direction, by a mask"
    assert trainer.attention == "flash_attention_2, sdpa"
    assert str(trainer.runner.fast_attention({})) == (
        f"flash_attention_2 of the discriminator, sdpa ({reason}) of the generator.left_tower, "
        f"sdpa ({reason}) of the generator.right_tower"
    )
    batch = {"is_causal": torch.zeros(1, dtype=torch.bool)}
    mixed = build(PROGRAMS["encoder"], tmp_path / "mixed", objectives=["mlm", "clm"])
    assert str(mixed.runner.fast_attention(batch)) == f"sdpa ({OWN_MASKS})" and mixed.attention == "flash_attention_2"


def test_auto_is_the_default_and_leaves_the_choice_to_transformers():
    assert ModelArguments().attn_implementation == "auto"
    assert attention_options(ModelArguments()) == attention_options(ModelArguments(attn_implementation=None)) == {}


def test_the_plan_and_the_card_name_the_backend(tmp_path, capsys):
    trainer = build(PROGRAMS["mlm"], tmp_path, model_options={"attn_implementation": "eager"})
    trainer.train()
    assert "fp32 on cpu, attention eager\n" in capsys.readouterr().out
    assert "attention sdpa (flash attention needs a GPU)" in plan_line(build(PROGRAMS["mlm"], tmp_path), 1)
    assert trainer.describe().compute.attention == "eager"
    trainer.save_model()
    trainer.create_model_card()
    assert "| Attention | eager |" in (tmp_path / "README.md").read_text()
