"""Which attention backend a training takes, and flash attention on padded rows."""

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForMaskedLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from helpers.method_matrix import TINY, build, programs
from hf_pretrain.modeling.configuration import ModelArguments, attention_options
from hf_pretrain.modeling.visibility import backends
from hf_pretrain.modeling.visibility.backends import FastAttention, flash_backend, padded_bounds
from hf_pretrain.modeling.visibility.rules import isolated_inputs

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
        ((3,), (9, 0), 0.1, None),
        ((2,), (7, 5), 0.0, None),
        ((), (9, 0), 0.0, None),
    ],
)
def test_the_fastest_that_can_run(gpu, versions, capability, dropout, expected):
    gpu(*versions, capability=capability)
    assert flash_backend(CUDA, torch.bfloat16, dropout=dropout) == expected


def test_none_in_fp32_or_on_a_cpu(gpu):
    gpu(2, 3)
    assert flash_backend(CUDA, torch.float16) is not None
    assert flash_backend(CUDA, torch.float32) is None and flash_backend(CPU, torch.bfloat16) is None


@pytest.mark.parametrize(("offline", "fits", "expected"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_a_kernel_of_the_hub_where_it_loads(gpu, monkeypatch, offline, fits, expected):
    def load(name):
        if not fits:
            raise OSError(f"no build of {name}")

    gpu(kernels=True)
    monkeypatch.setattr(backends, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(backends, "lazy_import_flash_attention", load)
    found = flash_backend(CUDA, torch.bfloat16)
    assert (found is not None and found.startswith("kernels-community/")) == bool(expected)


def reference(module, query, key, value, mask, scaling, cu_seq_lens_q=None, **kwargs):
    """What flash attention computes with bounds of sequences; a sequence may be empty."""
    rows, _, length, _ = query.shape
    bounds = torch.arange(rows + 1) * length if cu_seq_lens_q is None else cu_seq_lens_q
    assert mask is None and len(bounds) == (rows if cu_seq_lens_q is None else 2 * rows) + 1
    query, key, value = (states.transpose(1, 2).flatten(0, 1).transpose(0, 1) for states in (query, key, value))
    parts = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = query[:, start:stop] @ key[:, start:stop].transpose(1, 2) * scaling
        parts.append(scores.softmax(-1) @ value[:, start:stop])
    return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (rows, length)), None


@pytest.fixture
def flash(gpu, monkeypatch):
    """The same, under the name of the package."""
    AttentionInterface.register("flash_attention_2", reference)
    AttentionMaskInterface.register("flash_attention_2", flash_attention_mask)
    gpu(2)
    monkeypatch.setattr(backends, "_HALF", (torch.float32,))
    real = backends.flash_backend
    monkeypatch.setattr(backends, "flash_backend", lambda device, dtype, **options: real(CUDA, dtype, **options))
    yield
    AttentionInterface.register("flash_attention_2", ORIGINALS[0])
    AttentionMaskInterface.register("flash_attention_2", ORIGINALS[1])


ORIGINALS = (AttentionInterface()["flash_attention_2"], AttentionMaskInterface()["flash_attention_2"])


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
def test_states_of_padded_rows_are_those_under_a_mask(flash, model_type):
    options = (
        {"pad_token_id": 0, "global_attn_every_n_layers": 1} if model_type == "modernbert" else {"pad_token_id": 0}
    )
    config = AutoConfig.for_model(model_type, **TINY, vocab_size=60, attn_implementation="sdpa", **options)
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids, mask = torch.arange(5, 53).view(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, 17:] = 0
    inputs = {"input_ids": ids.where(mask != 0, 0), "attention_mask": mask, "is_padded": True}
    expected = model(**isolated_inputs(model, **inputs)).logits
    with FastAttention([model], device=CPU, dtype=torch.float32).running():
        given = isolated_inputs(model, **inputs)
        found = model(**given).logits
    assert given["attention_mask"] is None and "cu_seq_lens_q" in given
    torch.testing.assert_close(found[mask != 0], expected[mask != 0], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_only_sdpa_is_changed(flash, backend):
    config = AutoConfig.for_model("bert", **TINY, attn_implementation=backend)
    model = AutoModelForMaskedLM.from_config(config)
    fast = FastAttention([model], device=CPU, dtype=torch.float32)
    assert fast.backends == (["flash_attention_2"] if backend == "sdpa" else ["eager"])


def test_a_model_without_flash_attention_keeps_its_own(flash):
    config = AutoConfig.for_model("deberta-v2", **TINY)
    model = AutoModelForMaskedLM.from_config(config)
    assert FastAttention([model], device=CPU, dtype=torch.float32).backends == ["eager"]


@pytest.mark.parametrize("method", ["encoder", "mlm", "rtd"])
def test_a_step_runs_on_flash_attention_and_nothing_else_does(flash, method, tmp_path):
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


def test_methods_with_masks_of_their_own_stay_on_theirs(flash, tmp_path):
    trainer = build(PROGRAMS["electric"], tmp_path)
    assert trainer.attention == "sdpa"
    batch = {"is_causal": torch.zeros(1, dtype=torch.bool)}
    mixed = build(PROGRAMS["encoder"], tmp_path / "mixed", objectives=["mlm", "clm"])
    assert mixed.runner.fast_attention(batch).backends == [] and mixed.runner.fast_attention({}).backends == [
        "flash_attention_2"
    ]


def test_auto_is_the_default_and_leaves_the_choice_to_transformers():
    assert ModelArguments().attn_implementation == "auto"
    assert attention_options(ModelArguments()) == attention_options(ModelArguments(attn_implementation=None)) == {}


def test_the_plan_and_the_card_name_the_backend(tmp_path, capsys):
    trainer = build(PROGRAMS["mlm"], tmp_path, model_options={"attn_implementation": "eager"})
    trainer.train()
    assert "fp32 on cpu, attention eager" in capsys.readouterr().out
    assert trainer.describe().compute.attention == "eager"
    trainer.save_model()
    trainer.create_model_card()
    assert "| Attention | eager |" in (tmp_path / "README.md").read_text()
