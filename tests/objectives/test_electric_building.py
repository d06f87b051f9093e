"""Electric as one model: how it is built, what its parts share, what is exported and continued."""

import pytest
import torch
from transformers import AutoModel, ElectraConfig, ElectraForPreTraining, ElectraModel

from helpers.method_matrix import NO_DROPOUT, TINY, build, programs
from helpers.replaced_tokens import BERT, UNTIED, batch_of, run
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.electric import (
    ElectricForPreTraining,
    ElectricModelArguments,
    TwoTowerClozeModel,
    build_model,
)

PROGRAM = programs()["electric"]


class TestModels:
    @pytest.mark.parametrize(
        "options",
        [{}, BERT, {**BERT, "model_type": "roberta"}, {"model_type": "albert", "embedding_size": 16}, UNTIED],
        ids=["electra", "bert", "roberta", "albert", "untied"],
    )
    def test_sharing_and_export(self, tmp_path, options):
        trainer = build(PROGRAM, tmp_path, save_strategy="steps", save_steps=1, model_options=options)
        trainer.train()
        reloaded = ElectricForPreTraining.from_pretrained(tmp_path / "checkpoint-1")
        trainer.save_model()
        for model in (trainer.model, reloaded):
            tables = [part.get_input_embeddings().weight for part in (model.generator, model.discriminator)]
            assert (tables[0] is tables[1]) == (options is not UNTIED)
            assert model.generator.right_tower.get_input_embeddings().weight is tables[0]
        discriminator = trainer.model.discriminator
        stock, info = type(discriminator).from_pretrained(tmp_path, output_loading_info=True)
        assert type(stock).__module__.startswith("transformers.")
        assert not info["missing_keys"] and not info["unexpected_keys"]
        generator, info = TwoTowerClozeModel.from_pretrained(
            tmp_path, subfolder="pretraining/generator", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ids = torch.arange(5, 25).reshape(2, 10)
        for loaded, part in ((stock, discriminator), (generator, trainer.model.generator)):
            torch.testing.assert_close(loaded.eval()(ids).logits, part.eval()(ids).logits, atol=1e-6, rtol=0)
        assert AutoModel.from_pretrained(tmp_path) is not None

    def test_an_export_is_continued_as_it_was(self, tmp_path, tokenizer):
        trainer = build(PROGRAM, tmp_path)
        trainer.train()
        trainer.save_model()
        model = build_model(ElectricModelArguments(model_name_or_path=str(tmp_path)), tokenizer)
        expected, _ = run(trainer.model, batch_of(trainer))
        output, _ = run(model, batch_of(trainer))
        for name in expected.losses:
            torch.testing.assert_close(output.losses[name], expected.losses[name])

    def test_a_stock_checkpoint_gets_a_fresh_generator_and_keeps_its_embeddings(self, tmp_path, tokenizer, caplog):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = ElectraConfig(**{name: TINY[name] for name in names}, vocab_size=60, embedding_size=16)
        published = ElectraForPreTraining(config)
        published.save_pretrained(tmp_path)
        # Such as a generator of masked tokens, which replaced token detection leaves there.
        ElectraModel(config).save_pretrained(tmp_path / "pretraining" / "generator")
        args = ElectricModelArguments(model_name_or_path=str(tmp_path), generator_size=0.5)
        model = build_model(args, tokenizer)
        assert model.generator.config.tower.hidden_size == TINY["hidden_size"] // 2
        assert model.generator.excluded_tokens.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
        for name, value in published.state_dict().items():
            torch.testing.assert_close(model.discriminator.state_dict()[name], value, msg=name)
        assert model.get_input_embeddings().weight is model.discriminator.get_input_embeddings().weight
        with pytest.raises(InputError, match="is no two-tower generator"):
            build_model(
                ElectricModelArguments(model_name_or_path=str(tmp_path), generator_name_or_path=str(tmp_path)),
                tokenizer,
            )

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"embedding_sharing": "gdes"}, "embedding_sharing='gdes'"),
            ({"generator_size": 0.0}, "generator_size=0.0"),
            ({"model_type": "bert", **TINY}, "embedding_sharing='tied' needs equal parameters"),
            ({**TINY, "num_attention_heads": 4, "generator_size": 0.7}, "generator_size=0.7"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tokenizer, option, message):
        with pytest.raises(InputError, match=message):
            build_model(ElectricModelArguments(**option), tokenizer)

    def test_the_backend_is_that_which_was_asked_for(self, tokenizer):
        args = ElectricModelArguments(**TINY, config_overrides=NO_DROPOUT, attn_implementation="eager")
        model = build_model(args, tokenizer)
        bodies = (model.generator.left_tower, model.generator.right_tower, model.discriminator)
        assert [body.config._attn_implementation for body in bodies] == ["eager"] * 3
