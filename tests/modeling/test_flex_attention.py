"""FlexAttention, which the option names: the states, gradients and losses of SDPA, and who is refused.

torch has no backward pass of it on a CPU, and compiles it elsewhere. Here it runs uncompiled, with its check of the device off.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModelForMaskedLM, masking_utils
from transformers.integrations import flex_attention as integration

from helpers.causal_models import causal_lm
from helpers.method_matrix import NO_DROPOUT, NO_DROPOUT_OF, TINY, build, isolated, programs, tiny_data
from helpers.method_matrix import relative_difference as difference
from hf_pretrain import cli
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.visibility import backends
from hf_pretrain.modeling.visibility.backends import Attending, Choice, FastAttention
from hf_pretrain.modeling.visibility.causal import CausalReader
from hf_pretrain.modeling.visibility.lm_modes import lm_mode_inputs
from hf_pretrain.modeling.visibility.rules import isolated_inputs
from hf_pretrain.training.progress import plan_line

CPU, GPU, PROGRAMS = torch.device("cpu"), torch.device("cuda", 0), programs()
VOCAB_SIZE, LENGTH = 60, 24
# Of two layers, the second sees two tokens on each side; documents are longer.
MODELS = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
}
ROWS = {"full": [[24], [24]], "padded": [[24], [15]], "documents": [[9, 15], [8, 4, 7]]}
CAUSAL = {"llama": {}, "gpt_neox": {}, "mistral": {"sliding_window": 5}, "modernbert-decoder": {"local_attention": 8}}


@pytest.fixture
def calls(monkeypatch):
    """FlexAttention on a CPU: a list of the masks that it was called with, which grows."""
    seen = []

    def plain(query, key, value, *, training=False, **options):
        seen.append(options["block_mask"])
        return torch_flex.flex_attention(query, key, value, **options)

    def make(**options):
        return torch_flex.create_block_mask(**options | {"_compile": False})

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(masking_utils, "create_block_mask", make)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(backends, "_WITHOUT_FLEX_BACKWARD", ())
    return seen


def on_flex(model, **options):
    part = Attending(model, **{"device": CPU, "dtype": torch.float32, **options})
    return FastAttention({"model": part}, allowed=["model"], wanted="flex_attention")


def encoder(model_type, **changes):
    torch.manual_seed(0)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    options = TINY | special | MODELS.get(model_type, {}) | changes
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(sizes):
    """Rows of documents; without documents and positions where each row has one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB_SIZE, (len(sizes), LENGTH), generator=generator)
    document_ids, position_ids = torch.full_like(ids, -1), torch.zeros_like(ids)
    for row, lengths in enumerate(sizes):
        numbers = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
        document_ids[row, : len(numbers)] = numbers
        position_ids[row, : len(numbers)] = torch.cat([torch.arange(length) for length in lengths])
    mask = (document_ids >= 0).long()
    batch = {"input_ids": ids.where(mask != 0, 0), "attention_mask": mask}
    documents = {"document_ids": document_ids, "position_ids": position_ids}
    return batch | (documents if max(map(len, sizes)) > 1 else {"is_padded": not bool(mask.all())})


def states_and_gradients(model, read, is_token):
    """The states of the tokens, and the gradients of a sum of them in which no two weigh the same."""
    model.zero_grad()
    states = read()[is_token]
    weights = torch.linspace(-1.0, 1.0, states.numel()).view_as(states)
    (weights * states).sum().backward()
    return states.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def compare(model, read, is_token, monkeypatch, *, wanted):
    """Compare FlexAttention with another backend: states and each gradient to 1e-5 of the largest."""
    own = model.config._attn_implementation
    model.set_attn_implementation(wanted)
    expected, right = states_and_gradients(model, read, is_token)
    with monkeypatch.context() as patch, on_flex(model).running():
        # The first call compares with the model's own attention.
        read()
        patch.setattr(F, "scaled_dot_product_attention", no_sdpa)
        found, gradients = states_and_gradients(model, read, is_token)
    assert model.config._attn_implementation == wanted
    model.set_attn_implementation(own)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    scale = max(float(one.abs().max()) for one in right.values())
    assert gradients.keys() == right.keys()
    for name, one in gradients.items():
        torch.testing.assert_close(one, right[name], rtol=0, atol=1e-5 * scale, msg=name)


def no_sdpa(*args, **kwargs):
    raise AssertionError("SDPA was called")


@pytest.mark.parametrize("wanted", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model_type", MODELS)
def test_an_encoder(calls, monkeypatch, model_type, rows, wanted):
    model, batch = encoder(model_type).train(), batch_of(ROWS[rows])
    is_token = batch["attention_mask"] != 0

    def read():
        return model.base_model(**isolated_inputs(model.base_model, **batch))[0]

    compare(model, read, is_token, monkeypatch, wanted=wanted)
    assert calls and all(isinstance(mask, BlockMask) for mask in calls)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_causal_model(calls, monkeypatch, model_type, rows):
    # Of documents, Mistral's mask of a window is not made on SDPA.
    changes = CAUSAL[model_type] if rows != "documents" or model_type != "mistral" else {"sliding_window": None}
    model, batch = causal_lm(model_type, **changes).train(), batch_of(ROWS[rows])
    reader, is_token = CausalReader(model), batch["attention_mask"] != 0
    documents = {name: batch[name] for name in ("document_ids", "position_ids") if name in batch}
    compare(model, lambda: reader(batch["input_ids"], **documents), is_token, monkeypatch, wanted="sdpa")
    assert calls and all(isinstance(mask, BlockMask) for mask in calls)


@pytest.mark.parametrize("model_type", [*MODELS, "llama", "gpt_neox"])
def test_documents_do_not_see_each_other(calls, model_type):
    batch = batch_of([[9, 15], [8, 16]])
    model = encoder(model_type) if model_type in MODELS else causal_lm(model_type)
    reader = None if model_type in MODELS else CausalReader(model)

    def read(ids):
        if reader is not None:
            return reader(ids, document_ids=batch["document_ids"], position_ids=batch["position_ids"])
        return model.base_model(**isolated_inputs(model.base_model, **batch | {"input_ids": ids}))[0]

    with on_flex(model.eval()).running(), torch.no_grad():
        for edited in (0, 1):
            is_edited = batch["document_ids"] == edited
            before, after = (read(ids) for ids in (batch["input_ids"], batch["input_ids"] - is_edited.long()))
            assert torch.equal(before[~is_edited], after[~is_edited])
            assert not torch.isclose(before[is_edited], after[is_edited]).all()


def test_what_the_models_get(calls, monkeypatch):
    """No mask where nothing is padded; else blocks, for which no mask is looked at."""
    model = encoder("modernbert")

    def no_look(*args):
        raise AssertionError("a mask was looked at, for which a step waits")

    with on_flex(model).running():
        given = {name: isolated_inputs(model, **batch_of(sizes))["attention_mask"] for name, sizes in ROWS.items()}
        assert given["full"] is None
        for name in ("padded", "documents"):
            assert set(given[name]) == {"full_attention", "sliding_attention"}
            assert all(isinstance(mask, BlockMask) for mask in given[name].values())
        monkeypatch.setattr(masking_utils, "fast_all", no_look)
        calls.clear()
        for sizes in ROWS.values():
            model(**isolated_inputs(model, **batch_of(sizes)))
    assert len(calls) == 2 * len(ROWS)


def test_text_that_is_read_in_modes(calls):
    """A batch that flash attention cannot take."""
    model, batch = encoder("bert").eval(), batch_of([[24], [15], [24], [24]])
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    modes = {"lm_modes": torch.arange(4), "source_lengths": torch.full((4,), 7)}
    is_token = batch["attention_mask"] != 0
    expected = model(**lm_mode_inputs(model, **batch, **modes)).logits
    assert not calls
    with on_flex(model).running():
        found = model(**lm_mode_inputs(model, **batch, **modes)).logits
    assert calls
    torch.testing.assert_close(found[is_token], expected[is_token], rtol=0, atol=1e-5)


TRAINED = ["clm", "contrastive", "denoise", "distil", "distil-task", "encoder", "mlm", "rtd"]


def options_of(method, wanted):
    options = {"attn_implementation": wanted}
    # T5 and GPT-2, their defaults, cannot run on it.
    others = {"denoise": {"model_type": "bart", "config_overrides": NO_DROPOUT_OF["bart"]}}
    others |= {"clm": {"model_type": "llama", "config_overrides": "{}"}, "rtd": {"generator_size": 0.5}}
    return options | others.get(method, {})


@pytest.mark.parametrize(
    ("method", "kind"),
    # A text of "contrastive" or of a task is a document, and sentence order, which "encoder" has, looks at one.
    [(method, "padded") for method in TRAINED]
    + [(method, "documents") for method in ("clm", "denoise", "mlm", "rtd")],
)
def test_a_step_and_an_evaluation(calls, method, kind, tmp_path):
    data = isolated(tiny_data()) if kind == "documents" else tiny_data()
    found = {}
    for wanted in ("sdpa", "flex_attention"):
        calls.clear()
        trainer = build(PROGRAMS[method], tmp_path / wanted, data, model_options=options_of(method, wanted))
        assert not calls, "it is built on its own attention"
        trainer.train()
        assert bool(calls) == (wanted == "flex_attention")
        metrics = trainer.evaluate()
        losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
        assert {part.config._attn_implementation for part in trainer.model.backbones.values()} == {"sdpa"}
        found[wanted] = trainer.recorder.gradients[0], losses, trainer.state.log_history[0]["loss"]
    (gradients, losses, first), (right, expected, first_right) = found["flex_attention"], found["sdpa"]
    assert difference(gradients, right) < 2e-5
    assert first == pytest.approx(first_right, rel=1e-5) and losses == pytest.approx(expected, rel=1e-3)
    choices = trainer.runner.fast_attention({}).choices
    assert set(choices.values()) == {Choice("flex_attention")}, "the teacher too"


def test_the_plan_and_the_card_name_it(calls, tmp_path, capsys):
    trainer = build(PROGRAMS["mlm"], tmp_path, model_options={"attn_implementation": "flex_attention"})
    trainer.train()
    assert "fp32 on cpu, attention flex_attention\n" in capsys.readouterr().out
    assert "attention flex_attention" in plan_line(trainer, 1)
    assert trainer.describe().compute.attention == "flex_attention"
    trainer.save_model()
    trainer.create_model_card()
    assert "| Attention | flex_attention |" in (tmp_path / "README.md").read_text()
    # The export is opened on any machine.
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_batches_in_modes_stay_on_it(calls, tmp_path):
    options = {"attn_implementation": "flex_attention"}
    trainer = build(PROGRAMS["encoder"], tmp_path, model_options=options, objectives=["mlm", "clm"])
    batch = {"is_causal": torch.zeros(1, dtype=torch.bool)}
    assert trainer.runner.fast_attention(batch) is trainer.runner.fast_attention({})
    trainer.train()
    assert calls


@pytest.mark.slow
def test_all_of_a_run_is_compiled(calls, monkeypatch, tmp_path):
    """torch would compile eight graphs of a function, and run the rest as it is, in memory for all scores."""
    uncompiled, compiled = [], torch.compile(torch_flex.flex_attention, backend="eager")

    def attend(query, key, value, *, training=False, **options):
        calls.append(None)
        return compiled(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    # What torch says of a call that is not compiled.
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *args, **options: uncompiled.append(args))
    overrides = '{"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}'
    options = {"attn_implementation": "flex_attention", "model_type": "modernbert", "config_overrides": overrides}
    torch.compiler.reset()
    trainer = build(PROGRAMS["mlm"], tmp_path, isolated(tiny_data(24)), model_options=options, max_steps=2)
    trainer.train()
    trainer.evaluate()
    torch.compiler.reset()
    assert len(calls) > 10 and not uncompiled


def test_a_step_has_room_for_more_graphs():
    before = torch._dynamo.config.recompile_limit
    with on_flex(encoder("bert"), device=GPU).running():
        assert torch._dynamo.config.recompile_limit > before
    assert torch._dynamo.config.recompile_limit == before


def test_it_is_never_chosen_by_itself(calls, tmp_path):
    trainer = build(PROGRAMS["mlm"], tmp_path)
    trainer.train()
    assert not calls and trainer.attention == "sdpa"


# Who is refused


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: encoder("bert", attention_probs_dropout_prob=0.1),
            {"device": GPU},
            r"drops no attention probabilities, and BertForMaskedLM has attention_probs_dropout_prob=0.1 \(config_over",
        ),
        (
            lambda: causal_lm("llama", attention_dropout=0.2),
            {"device": GPU},
            "LlamaForCausalLM has attention_dropout=0.2",
        ),
        (lambda: causal_lm("gpt2"), {"device": GPU}, "GPT2LMHeadModel has no flex_attention"),
        (lambda: encoder("bert"), {}, "no backward pass on the device 'cpu'"),
        (lambda: encoder("deberta-v2"), {"device": GPU}, "DebertaV2ForMaskedLM has no flex_attention"),
        (
            lambda: encoder("bert", num_attention_heads=4),
            {"device": GPU},
            "narrower than 16, .*BertForMaskedLM have 8",
        ),
    ],
)
def test_a_model_that_cannot_run_on_it(model, options, message):
    with pytest.raises(InputError, match=f"^attn_implementation='flex_attention': .*{message}.*; choose 'auto'$"):
        on_flex(model(), **options)


def test_a_frozen_model_that_cannot_keeps_its_own():
    model = encoder("deberta-v2")
    fast = on_flex(model, drops=False)
    assert not fast.is_faster and str(fast) == "eager (DebertaV2ForMaskedLM has no flex_attention)"
    dropping = encoder("bert", attention_probs_dropout_prob=0.1)
    assert on_flex(dropping, device=GPU, drops=False).names == "flex_attention", "it drops nothing"


WRONG = {
    "mlm": {
        "": "has attention_probs_dropout_prob=0.1",
        f"config_overrides={NO_DROPOUT}": "no backward pass on the device 'cpu'",
        "model_type=deberta-v2": "DebertaV2ForMaskedLM has no flex_attention",
    },
    "denoise": {"model_type=t5": "T5ForConditionalGeneration adds a bias of positions"},
    "plm": {"": "the model keeps its own attention, as the method has masks of its own"},
    "electric": {"": "the generator.left_tower keeps its own attention, as a tower reads in one direction"},
}


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [(method, option, message) for method, rows in WRONG.items() for option, message in rows.items()],
)
def test_a_program_refuses_it_before_it_reads_text(method, option, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = TINY | {
        "attn_implementation": "flex_attention",
        "train_file": "nowhere.txt",
        "output_dir": "out",
        "vocab_size": 500,
        "block_size": 32,
        "report_to": "none",
        "bf16": "false",
        "use_cpu": "true",
    }
    name, _, value = option.partition("=")
    options |= {name: value} if name else {}
    options = {name: value for name, value in options.items() if method != "denoise" or name != "block_size"}
    argv = [method, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert re.match(f"error: attn_implementation='flex_attention': .*{message}.*; choose 'auto'", said.err), said.err


@pytest.mark.parametrize("rows", ["full", "documents"])
def test_a_model_that_computes_something_else_is_refused(calls, monkeypatch, rows):
    """It does not go back to its own attention: the backend was named."""
    model, batch = encoder("bert").eval(), batch_of(ROWS[rows])

    def forgetful(query, key, value, *, training=False, **options):
        options["block_mask"] = None
        return torch_flex.flex_attention(query, key, 2 * value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", forgetful)
    with on_flex(model).running(), pytest.raises(InputError, match="BertForMaskedLM .*flex_attention"):
        isolated_inputs(model, **batch)
