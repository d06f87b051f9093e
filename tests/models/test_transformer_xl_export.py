"""Export: a saved folder opens with the Auto classes, here by registration and elsewhere by the code that lies beside it."""

import ast
import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.fresh_process import WITHOUT_LIBRARY, run_fresh
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
)

AUTO_CLASSES = {
    "AutoConfig": "configuration_transformer_xl.TransformerXLConfig",
    "AutoModel": "modeling_transformer_xl.TransformerXLModel",
    "AutoModelForCausalLM": "modeling_transformer_xl.TransformerXLForCausalLM",
    "AutoModelForSequenceClassification": "modeling_transformer_xl.TransformerXLForSequenceClassification",
}
MODELS = {
    AutoModel: TransformerXLModel,
    AutoModelForCausalLM: TransformerXLForCausalLM,
    AutoModelForSequenceClassification: TransformerXLForSequenceClassification,
}
# Runs where hf_pretrain cannot be imported: compares with what was saved, and saves again.
ELSEWHERE = (
    WITHOUT_LIBRARY
    + """
import os, pathlib
os.environ["HF_MODULES_CACHE"] = {modules!r}
import torch, transformers
torch.set_grad_enabled(False)
root = pathlib.Path({root!r})
tokens = torch.arange(3, 15)[None]
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
    model, info = getattr(transformers, name).from_pretrained(
        root / name, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules")
    expected = torch.load(root / (name + ".pt"))
    torch.testing.assert_close(model(tokens)[0], expected, atol=1e-5, rtol=0)
    model.save_pretrained(root / "again" / name)
model = transformers.AutoModelForCausalLM.from_pretrained(root / "AutoModelForCausalLM", trust_remote_code=True)
generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
assert torch.equal(generated, torch.load(root / "generated.pt"))
# A head was saved, and the others open all the same.
base = transformers.AutoModel.from_pretrained(root / "AutoModelForCausalLM", trust_remote_code=True)
torch.testing.assert_close(base(tokens)[0], model.model(tokens)[0])
transformers.AutoModelForSequenceClassification.from_pretrained(root / "AutoModelForCausalLM", trust_remote_code=True)
print("all is well")
"""
)


@pytest.fixture
def saved(transformer_xl, tmp_path):
    """The folders of the three classes by the names of their Auto classes, with their outputs."""
    tokens = torch.arange(3, 15)[None]
    for auto_class, cls in MODELS.items():
        model = transformer_xl(cls, cutoffs=[10, 25], div_val=2, same_length=True)
        model.save_pretrained(tmp_path / auto_class.__name__)
        with torch.no_grad():
            torch.save(model(tokens)[0], tmp_path / f"{auto_class.__name__}.pt")
        if cls is TransformerXLForCausalLM:
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
            torch.save(generated, tmp_path / "generated.pt")
    return tmp_path


def test_every_folder_names_every_class_and_has_the_code(saved):
    for auto_class in MODELS:
        folder = saved / auto_class.__name__
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_CLASSES
        assert "sliding_window" not in config
        assert {path.name for path in folder.glob("*.py")} == {
            "configuration_transformer_xl.py",
            "layers_transformer_xl.py",
            "modeling_transformer_xl.py",
        }


def test_the_code_needs_no_other_package(saved):
    for path in (saved / "AutoModel").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                names = [node.module] if node.level == 0 else []
            known = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
            assert {name.partition(".")[0] for name in names} <= known


@torch.no_grad()
def test_it_opens_here_without_further_ado(saved):
    for auto_class, cls in MODELS.items():
        folder = saved / auto_class.__name__
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(model) is cls and not any(info.values())
        expected = torch.load(saved / f"{auto_class.__name__}.pt")
        assert torch.equal(model(torch.arange(3, 15)[None])[0], expected)
        assert type(auto_class.from_config(AutoConfig.from_pretrained(folder))) is cls


def test_code_that_has_aged_is_renewed_by_opening_and_saving_here(saved):
    """An export keeps the code of its day; where this library is imported, the library's own is taken instead."""
    for auto_class, cls in MODELS.items():
        folder = saved / auto_class.__name__
        for path in folder.glob("*.py"):
            path.write_text("raise RuntimeError('written for an older transformers')\n")
        for trust in (None, False, True):
            options = {} if trust is None else {"trust_remote_code": trust}
            assert type(auto_class.from_pretrained(folder, **options)) is cls
            assert type(AutoConfig.from_pretrained(folder, **options)) is cls.config_class
        auto_class.from_pretrained(folder).save_pretrained(folder)
        assert not [path for path in folder.glob("*.py") if "RuntimeError" in path.read_text()]
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_CLASSES


def test_it_opens_where_this_library_is_not(saved, monkeypatch):
    # As after any test that has loaded remote code in this process.
    (saved / "of_others" / "transformers_modules").mkdir(parents=True)
    (saved / "of_others" / "transformers_modules" / "__init__.py").touch()
    monkeypatch.syspath_prepend(saved / "of_others")
    program = ELSEWHERE.format(root=str(saved), modules=str(saved / "modules"))
    assert run_fresh({"elsewhere": program}, saved)["elsewhere"] == "all is well\n"
    assert (saved / "modules" / "transformers_modules").is_dir()
    # What was saved there opens here, and is as complete.
    for auto_class, cls in MODELS.items():
        folder = saved / "again" / auto_class.__name__
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_CLASSES
        assert len(list(folder.glob("*.py"))) == 3
        assert type(auto_class.from_pretrained(folder)) is cls


def test_a_configuration_of_another_repository_names_this_folders_classes(saved):
    path = saved / "AutoModel" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {name: f"someone/else--{reference}" for name, reference in AUTO_CLASSES.items()}
    path.write_text(json.dumps(config))
    AutoModel.from_pretrained(saved / "AutoModel").save_pretrained(saved / "mine")
    assert json.loads((saved / "mine" / "config.json").read_text())["auto_map"] == AUTO_CLASSES
