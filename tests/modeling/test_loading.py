"""Stock models are opened in float32; what is wrong with a checkpoint arrives in one line that names the file and the way on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)
from transformers.utils import logging as transformers_logging

from helpers.method_matrix import TINY, VOCAB_SIZE, build, programs, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling import loading
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.loading import from_config, from_pretrained
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a whole BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TINY, vocab_size=VOCAB_SIZE)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def halve(folder, dtype):
    """Store every model of an export in 16 bits, as other tools do."""
    for path in folder.rglob(WEIGHTS):
        state = {
            key: value.to(HALF[dtype]) if value.is_floating_point() else value
            for key, value in load_file(path).items()
        }
        save_file(state, path, metadata={"format": "pt"})
        config = path.with_name("config.json")
        values = json.loads(config.read_text()) | {"dtype": dtype}
        config.write_text(json.dumps(values))


class TestFloat32:
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("name", sorted(set(programs()) - {"recurrent-lm"}))
    def test_every_method_trains_and_exports_a_half_checkpoint_in_float32(self, name, dtype, tmp_path):
        program = programs()[name]
        first = build(program, tmp_path / "first")
        first.save_model()
        halve(tmp_path / "first", dtype)
        cut = dict.fromkeys((*TINY, "config_overrides")) if name.startswith("distil") else {"config_overrides": None}
        options = {"model_name_or_path": str(tmp_path / "first"), **cut}
        model = build(program, tmp_path / "second", model_options=options).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        # What was stored is what is trained.
        state = {key: value for key, value in first.model.state_dict().items() if "projections" not in key}
        same = [
            torch.allclose(state[key], value, atol=1e-2) for key, value in model.state_dict().items() if key in state
        ]
        assert all(same) and len(same) > 10
        model.export(tmp_path / "third")
        for path in (tmp_path / "third").rglob(WEIGHTS):
            assert {value.dtype for value in load_file(path).values() if value.is_floating_point()} == {torch.float32}
            assert json.loads(path.with_name("config.json").read_text())["dtype"] == "float32"

    @pytest.mark.parametrize("wrap", [False, True])
    def test_a_model_in_memory_is_cast_too(self, wrap):
        model = AutoModelForMaskedLM.from_config(BertConfig(**TINY, vocab_size=VOCAB_SIZE), dtype=torch.bfloat16)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        composite = EncoderForPreTraining.from_model(model, heads=["mlm", "span_boundary"] if wrap else ["mlm"])
        assert {parameter.dtype for parameter in composite.parameters()} == {torch.float32}
        assert all(
            torch.equal(value, before[key].float()) for key, value in model.state_dict().items() if key in before
        )

    def test_a_configuration_of_16_bits_builds_float32(self):
        config = BertConfig(**TINY, vocab_size=VOCAB_SIZE, dtype="bfloat16")
        assert from_config(AutoModel, config).dtype == torch.float32

    def test_unless_it_is_asked_for(self, whole, tmp_path, tokenizer):
        args = ModelArguments(model_name_or_path=str(whole), model_dtype="bfloat16")
        composite = EncoderForPreTraining.from_arguments(args, tokenizer)
        assert {parameter.dtype for parameter in composite.parameters()} == {torch.bfloat16}
        composite.export(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).dtype == torch.bfloat16

    def test_any_other_type_that_a_caller_names(self, whole):
        assert from_pretrained(AutoModel, str(whole), dtype=torch.float64).dtype == torch.float64


class TestFreshParameters:
    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
    def test_a_fresh_head_is_told_in_one_line(self, auto_class, whole, tmp_path, tokenizer, caplog, capfd):
        auto_class.from_pretrained(whole).save_pretrained(tmp_path)
        transformers_logging.enable_propagation()
        caplog.clear()
        capfd.readouterr()
        composite = EncoderForPreTraining.from_arguments(ModelArguments(model_name_or_path=str(tmp_path)), tokenizer)
        assert "model.cls.predictions.transform.dense.weight" in composite.fresh_parameters
        (record,) = [record for record in caplog.records if "fresh head" in record.getMessage()]
        assert "\n" not in record.getMessage() and str(tmp_path) in record.getMessage()
        assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err

    def test_nothing_is_said_of_a_whole_checkpoint(self, whole, tokenizer, caplog):
        composite = EncoderForPreTraining.from_arguments(ModelArguments(model_name_or_path=str(whole)), tokenizer)
        assert not composite.fresh_parameters and "fresh" not in caplog.text

    def test_a_checkpoint_without_any_weight_of_the_encoder_is_refused(self, folder):
        state = {f"other.{key}": value for key, value in load_file(folder / WEIGHTS).items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match="holds no weights of a BertModel"):
            from_pretrained(AutoModelForMaskedLM, str(folder))


def write(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


def cut(size):
    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:size])

    return damage


def to_bin(content):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def change(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


DAMAGES = {
    "weights cut in the middle": (cut(5000), "model.safetensors cannot be read, it is cut off"),
    "weights cut in their header": (cut(100), "model.safetensors cannot be read, it is cut off"),
    "no weights": (cut(0), "model.safetensors is empty"),
    "a pointer": (write(WEIGHTS, POINTER), "model.safetensors is a pointer of git-lfs.*git lfs pull"),
    "a pointer to a bin": (to_bin(POINTER), "pytorch_model.bin is a pointer of git-lfs"),
    "an evil bin": (to_bin(b"cos\nsystem\n(S'true'\ntR."), "pytorch_model.bin cannot be read"),
    "an empty configuration": (write("config.json", b""), "config.json is empty"),
    "a list": (write("config.json", b"[1]"), "config.json holds a list"),
    "a number": (write("config.json", b"3"), "config.json holds a int"),
    "no JSON": (write("config.json", b"{"), "config.json is not JSON"),
    "t5": (write("config.json", b'{"model_type": "t5"}'), "model_type='t5' is no masked language model"),
    "gpt2": (write("config.json", b'{"model_type": "gpt2"}'), "model_type='gpt2' is no masked language model"),
    "another width": (change(hidden_size=64), r"has the shape \(32,\) in its weights, and \(64,\) by its config.json"),
    "another activation": (change(hidden_act="bogus"), "bogus"),
    "a width of letters": (change(hidden_size="wide"), "expected int"),
    "heads": (change(num_attention_heads=3), "not a multiple"),
    "a composite": (
        change(model_type="hf_pretrain_encoder"),
        "is a checkpoint of a run.*hf-pretrain export .*--resume_from",
    ),
}


class TestDamage:
    @pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_it_is_named_in_one_line(self, folder, damage, message, device):
        damage(folder)
        if device == "meta" and damage is DAMAGES["another width"][0]:
            return  # The shapes of the weights are not looked at.
        with torch.device(device), pytest.raises(InputError, match=message) as caught:
            from_pretrained(AutoModelForMaskedLM, str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_file_in_place_of_a_folder(self, folder):
        with pytest.raises(InputError, match="it is a file"):
            from_pretrained(AutoModelForMaskedLM, str(folder / "config.json"))

    def test_a_model_without_its_values(self, whole):
        with torch.device("meta"):
            model = from_pretrained(AutoModelForMaskedLM, str(whole), attn_implementation="eager")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.config._attn_implementation == "eager"


class TestTokenizers:
    def test_a_folder_without_one(self, folder):
        for path in folder.glob("*token*"):
            path.unlink()
        with pytest.raises(InputError, match="holds no tokenizer .*--tokenizer_name"):
            from_pretrained(AutoTokenizer, str(folder))

    def test_a_pointer(self, folder):
        (folder / "tokenizer.json").write_bytes(POINTER)
        with pytest.raises(InputError, match=r"tokenizer\.json is a pointer of git-lfs"):
            from_pretrained(AutoTokenizer, str(folder))

    @pytest.mark.parametrize("missing", ["sentencepiece", "protobuf"])
    def test_a_sentencepiece_model_without_its_packages(self, folder, missing, monkeypatch):
        for path in folder.glob("*token*"):
            path.unlink()
        (folder / "spm.model").write_bytes(b"model")
        change(model_type="deberta-v2")(folder)
        for package in ("sentencepiece", "protobuf"):
            monkeypatch.setattr(loading, f"is_{package}_available", lambda package=package: package != missing)
        with pytest.raises(
            InputError, match=r"sentencepiece and protobuf: pip install 'hf-pretrain\[sentencepiece\]'"
        ):
            from_pretrained(AutoTokenizer, str(folder))

    def test_a_run_goes_on_without_a_warning_of_its_own_checkpoint(self, folder, caplog, capfd):
        EncoderForPreTraining.from_model(AutoModelForMaskedLM.from_pretrained(folder)).save_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).model_type == "hf_pretrain_encoder"
        assert len(from_pretrained(AutoTokenizer, str(folder))) == VOCAB_SIZE
        assert "You are using a model of type" not in caplog.text + capfd.readouterr().err
