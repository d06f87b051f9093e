"""Adapters of PEFT in pre-training: what moves, what stays, and what the export is."""

import functools
import tempfile

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from helpers.method_matrix import build, programs, tiny_data
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.commands.export import export_checkpoint
from hf_pretrain.errors import InputError
from hf_pretrain.hub.run import describe_run
from hf_pretrain.modeling.adapters import adapter_parameters
from hf_pretrain.objectives.replaced_token_detection.building import load_pair
from hf_pretrain.training.program import print_report

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MLM = programs()["mlm"]
LORA = {"adapter": "lora", "adapter_rank": 2, "learning_rate": 1e-2}


@functools.cache
def base_of(name):
    """A folder with the export of a tiny model of a method, which was drawn with large weights; removed in the end."""
    folder = tempfile.TemporaryDirectory()
    trainer = build(programs()[name], folder.name, bf16=False)
    with torch.no_grad():
        for number, parameter in enumerate(dict(trainer.model.named_parameters()).values()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    trainer.save_model()
    return folder


def base():
    return base_of("mlm").name


def continued(output_dir, method="mlm", *, model_options=None, **options):
    """A Trainer that continues the tiny model with adapters."""
    name = {"model_name_or_path": base_of(method).name, "config_overrides": None}
    return build(
        programs()[method], output_dir, tiny_data(24, 8), model_options=name | (model_options or {}), **LORA | options
    )


def stock_state(folder):
    return load_file(f"{folder}/model.safetensors")


def base_state(model):
    """The stock model's own weights, whatever adapters it has."""
    own = adapter_parameters(model)
    return {
        name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters() if name not in own
    }


def logits(model):
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


class TestTraining:
    @pytest.mark.parametrize("adapter", ["lora", "dora"])
    def test_adapters_alone_move_and_have_state(self, tmp_path, adapter):
        trainer = continued(tmp_path, adapter=adapter, max_steps=3, weight_decay=0.1)
        before = base_state(trainer.model.model)
        first = {name: p.detach().clone() for name, p in adapter_parameters(trainer.model.model).items()}
        trainer.train()
        after = base_state(trainer.model.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        moved = {
            name for name, p in adapter_parameters(trainer.model.model).items() if not torch.equal(p, first[name])
        }
        assert moved == first.keys()
        assert {id(p) for p in trainer.optimizer.state} == {
            id(p) for p in adapter_parameters(trainer.model.model).values()
        }
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained == {f"model.{name}" for name in first}

    def test_all_linear_layers_of_the_body_that_a_loss_reaches(self, tmp_path):
        model = continued(tmp_path).model.model
        adapted = {name.partition(".lora_A")[0] for name in adapter_parameters(model) if ".lora_A" in name}
        layers = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        layers += ["intermediate.dense", "output.dense"]
        assert adapted == {f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in layers}
        assert set(model.peft_config["default"].target_modules) == set(layers)

    def test_gradients_are_those_of_pefts_own_model(self, tmp_path):
        """By hand: the same adapter around the stock model, and the mean cross-entropy over the same targets."""
        trainer = continued(tmp_path, max_steps=1)
        torch.manual_seed(3)
        for parameter in adapter_parameters(trainer.model.model).values():
            parameter.data.normal_(std=0.3)
        stock = AutoModelForMaskedLM.from_pretrained(base())
        targets = trainer.model.model.peft_config["default"].target_modules
        ours = {name: p.detach().clone() for name, p in adapter_parameters(trainer.model.model).items()}
        peft_model = get_peft_model(stock, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        own = {
            name.removeprefix("base_model.model."): p for name, p in peft_model.named_parameters() if p.requires_grad
        }
        assert own.keys() == ours.keys()
        for name, parameter in own.items():
            parameter.data.copy_(ours[name])
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        peft_model.eval()
        peft_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        for name, parameter in adapter_parameters(trainer.model.model).items():
            torch.testing.assert_close(parameter.grad, own[name].grad, atol=1e-6, rtol=1e-4)

    def test_the_update_is_alpha_over_rank_times_the_product(self, tmp_path):
        trainer = continued(tmp_path, max_steps=2, adapter_rank=4, adapter_alpha=2.0)
        trainer.train()
        trainer.save_model()
        layer = trainer.model.model.bert.encoder.layer[0].attention.self.query
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape[0] == b.shape[1] == 4
        expected = layer.base_layer.weight + 2.0 / 4 * b @ a
        found = stock_state(tmp_path)["bert.encoder.layer.0.attention.self.query.weight"]
        torch.testing.assert_close(found, expected.detach())
        assert not torch.equal(found, layer.base_layer.weight)

    def test_first_values_depend_on_the_seed_alone(self, tmp_path):
        def first(**options):
            torch.rand(5)
            model = continued(tmp_path, **options).model.model
            return {name: p.detach().clone() for name, p in adapter_parameters(model).items()}

        one, same, other = first(seed=1), first(seed=1), first(seed=2)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)

    def test_resume_to_the_bit(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "adapter_dropout": 0.2}
        whole = continued(tmp_path / "whole", **saving)
        whole.train()
        rest = continued(tmp_path / "whole", **saving)
        rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        assert rest.num_steps_trained == 2
        ends = [dict(trainer.model.named_parameters()) for trainer in (whole, rest)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    def test_a_resume_with_another_rank_is_refused(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        continued(tmp_path, **saving).train()
        with pytest.raises(InputError, match="does not fit the model"):
            continued(tmp_path, adapter_rank=3, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    def test_activations_that_are_computed_again(self, tmp_path):
        trainer = continued(tmp_path, max_steps=1, activation_checkpointing=True)
        trainer.train()
        plain = continued(tmp_path / "plain", max_steps=1)
        plain.train()
        pairs = zip(trainer.recorder.gradients[0].values(), plain.recorder.gradients[0].values(), strict=True)
        assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in pairs)

    def test_a_decided_table_is_trained_and_no_other_weight(self, tmp_path):
        trainer = continued(
            tmp_path, max_steps=2, adapter_train_embeddings=True, adapter_modules_to_save=["LayerNorm"]
        )
        before = base_state(trainer.model.model)
        trainer.train()
        after = base_state(trainer.model.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert "bert.embeddings.word_embeddings.weight" in moved
        assert moved == {name for name in before if "word_embeddings" in name or ".LayerNorm." in name}

    def test_rows_of_new_tokens_alone(self, tmp_path):
        trainer = continued(tmp_path, max_steps=3, adapter_first_new_token=40, weight_decay=0.1)
        before = base_state(trainer.model.model)
        trainer.train()
        after = base_state(trainer.model.model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
        for name in moved:
            is_moved = (before[name] != after[name]).view(60, -1).any(dim=1)
            assert not is_moved[:40].any() and is_moved[40:].any()

    def test_two_ranks_are_one(self, tmp_path):
        base()
        options = {"max_steps": 2, "per_device_train_batch_size": 8}
        one = continued(tmp_path / "one", **options)
        one.train()
        run_on_two_ranks(__name__, tmp_path)
        two = torch.load(tmp_path / "two.pt")
        ours = {name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad}
        assert two.keys() == ours.keys()
        for name, value in ours.items():
            torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)


def main(folder):
    """Train on one of two ranks."""
    trainer = continued(f"{folder}/two", max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    if trainer.is_world_process_zero():
        trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(trained, f"{folder}/two.pt")


class TestExport:
    @pytest.mark.parametrize("adapter", ["lora", "dora"])
    def test_merged_is_a_stock_checkpoint_that_computes_the_same(self, tmp_path, adapter):
        trainer = continued(tmp_path, adapter=adapter, max_steps=3)
        trainer.train()
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.save_model()
        trained = logits(trainer.model.model)
        opened, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert stock_state(tmp_path).keys() == stock_state(base()).keys()
        torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(trained, logits(AutoModelForMaskedLM.from_pretrained(base())), atol=1e-2)
        after = trainer.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items()), "an export changes nothing"

    @pytest.mark.parametrize("beside", [{}, {"adapter_train_embeddings": True}, {"adapter_modules_to_save": ["cls"]}])
    def test_an_adapter_alone_computes_the_same(self, tmp_path, beside, monkeypatch):
        # transformers may ask for a newer peft than there is; what it reads is the same.
        monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        trainer = continued(tmp_path, max_steps=3, adapter_export="adapter", **beside)
        trainer.train()
        trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()
        opened = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base()), tmp_path)
        trained = logits(trainer.model.model)
        torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=1e-5)
        assert opened.peft_config["default"].base_model_name_or_path == base()
        if not beside:
            # transformers puts it into the stock class.
            whole = AutoModelForMaskedLM.from_pretrained(base())
            whole.load_adapter(str(tmp_path))
            torch.testing.assert_close(logits(whole), trained, atol=1e-5, rtol=1e-5)

    def test_the_card_is_of_an_adapter_or_of_a_model(self, tmp_path, capsys):
        trainer = continued(tmp_path / "alone", max_steps=1, adapter_export="adapter")
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        print_report(trainer)
        text = (tmp_path / "alone/README.md").read_text(encoding="utf-8")
        assert "an adapter (LORA)" in text and "is the adapter default alone" in capsys.readouterr().out
        whole = continued(tmp_path / "whole", max_steps=1)
        whole.train()
        card = describe_run(whole)
        stock = AutoModelForMaskedLM.from_pretrained(base()).num_parameters()
        assert card.adapter == "" and card.compute.parameters == stock == card.sizes[""]["parameters"]
        assert card.compute.trained_parameters < stock / 2

    def test_a_checkpoint_of_the_run_is_exported_by_the_command(self, tmp_path):
        trainer = continued(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model()
        export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "again")
        ours, again = stock_state(tmp_path / "run"), stock_state(tmp_path / "again")
        assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


ADAPTED = ["mlm", "encoder", "rtd", "electric", "plm", "clm", "recurrent-lm", "denoise", "contrastive"]


class TestEveryMethod:
    def test_all_are_here(self):
        assert {*ADAPTED, "distil", "distil-task"} == programs().keys()

    @pytest.mark.parametrize("method", ADAPTED)
    def test_base_weights_stay_and_the_export_is_stock(self, method, tmp_path):
        trainer = continued(tmp_path, method, max_steps=2)
        root = trainer.model.root
        assert adapter_parameters(root)
        before = base_state(root)
        trainer.train()
        fresh = set(getattr(root, "fresh_parameters", ()))
        after = base_state(root)
        assert all(torch.equal(before[name], after[name]) for name in before if name not in fresh)
        gradients = trainer.recorder.gradients[-1]
        assert all(f"{trainer.model.export_parts['']}.{name}" in gradients for name in adapter_parameters(root))
        trainer.save_model()
        start, end = stock_state(base_of(method).name), stock_state(tmp_path)
        assert start.keys() == end.keys()
        assert any(not torch.equal(start[name], end[name]) for name in start)
        AutoTokenizer.from_pretrained(tmp_path)
        opened, info = type(root).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], type(opened)

    @pytest.mark.parametrize("method", ["distil", "distil-task"])
    def test_a_student_is_refused_by_name(self, method, tmp_path):
        with pytest.raises(InputError, match="adapter='lora': DistillationModel makes a student"):
            build(programs()[method], tmp_path, **LORA)

    def test_a_fresh_generator_is_trained_whole(self, tmp_path):
        trainer = continued(tmp_path, "rtd", max_steps=1, model_options={"model_name_or_path": discriminator()})
        generator = trainer.model.generator
        assert not adapter_parameters(generator) and adapter_parameters(trainer.model.discriminator)
        body = [p.requires_grad for name, p in generator.named_parameters() if ".layer." in name]
        assert body and all(body)
        assert not trainer.model.discriminator.get_input_embeddings().weight.requires_grad, "it is tied, and not fresh"


@functools.cache
def discriminator():
    """A folder with the discriminator of the tiny pair alone."""
    folder = f"{base_of('rtd').name}-alone"
    load_pair(base_of("rtd").name, None).discriminator.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_of("rtd").name).save_pretrained(folder)
    return folder


class TestRefusals:
    def test_a_model_from_scratch(self, tmp_path):
        with pytest.raises(InputError, match="adapter='lora' leaves the weights of a model as they are"):
            build(MLM, tmp_path, **LORA)

    @pytest.mark.parametrize("option", ["adapter_targets", "adapter_modules_to_save"])
    def test_a_name_that_fits_none(self, tmp_path, option):
        with pytest.raises(InputError, match=rf"{option}='quary'.*did you mean 'query'"):
            continued(tmp_path, **{option: ["quary"]})

    def test_the_output_layer_that_is_the_table(self, tmp_path):
        with pytest.raises(InputError, match="cls.predictions.decoder is the word table too"):
            continued(tmp_path, adapter_targets=["query", "decoder"])

    def test_an_adapter_alone_with_new_rows(self, tmp_path):
        with pytest.raises(InputError, match="adapter_first_new_token=2"):
            continued(tmp_path, adapter_first_new_token=2, adapter_export="adapter")

    def test_layers_of_two_models(self, tmp_path):
        with pytest.raises(InputError, match="is a layer of two models"):
            continued(
                tmp_path,
                "rtd",
                model_options={"embedding_sharing": "full", "model_name_or_path": discriminator()},
            )


def test_a_configuration_of_peft_in_python(tmp_path):
    """Any method of PEFT that is put into layers, on a model that opens by its name."""
    trainer = MLM.trainer(
        base(),
        MLM.arguments[2](str(tmp_path), max_steps=2, bf16=False, report_to=[], disable_tqdm=True, learning_rate=0.1),
        train_dataset=tiny_data(24, 8),
        peft_config=IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    )
    trainer.train()
    trainer.save_model()
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(opened), logits(trainer.model.model), atol=1e-5, rtol=1e-5)
    key = "bert.encoder.layer.1.attention.self.key.weight"
    assert not torch.equal(stock_state(tmp_path)[key], stock_state(base())[key])
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "bert"
