"""Generator and discriminator as one model: how it is built, what its parts share, what is exported and continued."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    ElectraForMaskedLM,
    ElectraForPreTraining,
)

from helpers.method_matrix import TINY, build
from helpers.replaced_tokens import BERT, PROGRAM, ROBERTA, UNTIED, batch_of, embeddings, run
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.replaced_token_detection import (
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionForPreTraining,
    ReplacedTokenDetectionModelArguments,
    build_model,
)


@pytest.fixture
def trainer(tmp_path):
    return build(PROGRAM, tmp_path)


def assert_tied(model):
    ours, theirs = embeddings(model.discriminator), embeddings(model.generator)
    assert ours.keys() == theirs.keys()
    assert {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"} < ours.keys()
    assert {"LayerNorm.weight", "LayerNorm.bias"} < ours.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert model.generator.get_output_embeddings().weight is model.generator.get_input_embeddings().weight


class TestSharing:
    @pytest.mark.parametrize("options", [{}, BERT, ROBERTA], ids=["electra", "bert", "roberta"])
    def test_tied_parameters_are_one_from_start_to_reload(self, tmp_path, options):
        model = build(PROGRAM, tmp_path, model_options=options).model
        assert_tied(model)
        outside = set(map(id, model.discriminator.parameters())) & set(map(id, model.generator.parameters()))
        assert outside == set(map(id, embeddings(model.generator).values()))
        model.save_pretrained(tmp_path)
        loaded, info = ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_tied(loaded)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert_tied(loaded.to(torch.float64))
        assert_tied(copy.deepcopy(loaded))
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}

    def test_a_step_moves_both(self, trainer):
        before = trainer.model.discriminator.get_input_embeddings().weight.detach().clone()
        trainer.train()
        assert_tied(trainer.model)
        assert not torch.equal(before, trainer.model.discriminator.get_input_embeddings().weight)

    def test_none_shares_nothing(self, tmp_path):
        model = build(PROGRAM, tmp_path, model_options=UNTIED).model
        model.save_pretrained(tmp_path)
        for one in (model, ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path)):
            ours, theirs = set(map(id, one.discriminator.parameters())), set(map(id, one.generator.parameters()))
            assert not ours & theirs
            words = [part.get_input_embeddings().weight for part in (one.generator, one.discriminator)]
            assert not torch.equal(*words)
            assert one.generator.get_output_embeddings().weight is words[0]

    def test_a_kind_of_sharing_that_does_not_exist_is_refused(self, trainer):
        """In the Python API too: a misspelt kind would silently share nothing."""
        with pytest.raises(ValueError, match="embedding_sharing"):
            ReplacedTokenDetectionForPreTraining.from_models(
                trainer.model.generator, trainer.model.discriminator, embedding_sharing="Tied"
            )

    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    def test_the_attention_backend_is_kept(self, tmp_path, backend):
        model = build(PROGRAM, tmp_path, model_options={"attn_implementation": backend}).model
        for part in (model.generator, model.discriminator):
            assert {m.config._attn_implementation for m in part.modules() if hasattr(m, "config")} == {backend}


class TestExport:
    def test_electra(self, trainer, tmp_path):
        model, batch = trainer.model, batch_of(trainer)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        trainer.train()
        trainer.save_model()
        model.eval()
        for folder, stock, part in (
            (tmp_path, ElectraForPreTraining, model.discriminator),
            (tmp_path / "pretraining" / "generator", ElectraForMaskedLM, model.generator),
        ):
            loaded, info = stock.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            with torch.no_grad():
                expected = part(**inputs).logits
                torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, atol=1e-6, rtol=0)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            expected = model.discriminator.electra(**inputs).last_hidden_state
            torch.testing.assert_close(encoder.eval()(**inputs).last_hidden_state, expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("options", [{}, UNTIED, BERT], ids=["electra", "untied", "bert"])
    def test_an_export_can_be_continued(self, tmp_path, options, tokenizer):
        trainer = build(PROGRAM, tmp_path, model_options=options)
        trainer.save_model()
        kept = {name: value for name, value in options.items() if name == "embedding_sharing"}
        args = ReplacedTokenDetectionModelArguments(model_name_or_path=str(tmp_path), **kept)
        loaded = build_model(args, tokenizer)
        expected = trainer.model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        if not kept:
            assert_tied(loaded)

    def test_the_attention_backend_is_chosen_where_an_export_is_continued(self, trainer, tmp_path, tokenizer):
        trainer.save_model()
        args = ReplacedTokenDetectionModelArguments(model_name_or_path=str(tmp_path), attn_implementation="eager")
        model = build_model(args, tokenizer)
        assert {part.config._attn_implementation for part in (model.generator, model.discriminator)} == {"eager"}

    @pytest.mark.parametrize("size", [0.25, 1.0])
    @pytest.mark.parametrize("sharing", ["tied", "gdes", "none"])
    def test_a_checkpoint_without_a_generator_gets_a_fresh_one(self, sharing, size, tmp_path, tokenizer, caplog):
        """What the checkpoint has learned is kept: a new generator takes its tables, not the reverse."""
        torch.manual_seed(0)
        known = BertForMaskedLM(BertConfig(**TINY, vocab_size=len(tokenizer), initializer_range=0.3))
        known.save_pretrained(tmp_path)
        args = ReplacedTokenDetectionModelArguments(
            model_name_or_path=str(tmp_path), embedding_sharing=sharing, generator_size=size
        )
        model = build_model(args, tokenizer).eval()
        assert "has no generator: a fresh one" in caplog.text and "fresh head" in caplog.text
        assert model.generator.config.hidden_size == TINY["hidden_size"] * size
        ids = torch.arange(5, 25).reshape(2, 10)
        with torch.no_grad():
            expected = known.eval().bert(ids).last_hidden_state
            torch.testing.assert_close(model.discriminator.bert(ids).last_hidden_state, expected, atol=1e-5, rtol=0)

    def test_one_encoder_for_both_is_the_checkpoints(self, tmp_path, tokenizer):
        known = BertForMaskedLM(BertConfig(**TINY, vocab_size=len(tokenizer)))
        known.save_pretrained(tmp_path)
        args = ReplacedTokenDetectionModelArguments(model_name_or_path=str(tmp_path), embedding_sharing="full")
        model = build_model(args, tokenizer)
        assert model.generator.base_model.encoder.layer[0].output.dense.weight.equal(
            known.bert.encoder.layer[0].output.dense.weight
        )
        assert_tied(model)


class TestBertDiscriminator:
    def test_it_is_a_token_classifier_with_one_label(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=BERT)
        model, batch = trainer.model, batch_of(trainer)
        assert type(model.discriminator) is BertForTokenClassification
        trainer.train()
        output, seen = run(model, batch)
        assert output.scores.shape == batch["input_ids"].shape
        trainer.save_model()
        loaded, info = AutoModelForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.num_labels == 1
        with torch.no_grad():
            logits = loaded.eval()(seen["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logits.squeeze(-1), output.scores, atol=1e-6, rtol=0)


class TestBuilding:
    def test_the_generator_is_scaled_in_width_heads_and_layers(self, tokenizer):
        args = ReplacedTokenDetectionModelArguments(
            hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=4, generator_layers=0.5
        )
        model = build_model(args, tokenizer)
        config = model.generator.config
        assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (16, 1, 32)
        assert config.num_hidden_layers == 2
        assert config.embedding_size == model.discriminator.config.embedding_size == 128
        assert model.discriminator.config.hidden_size == 64
        assert isinstance(model.generator, ElectraForMaskedLM) and isinstance(
            model.discriminator, ElectraForPreTraining
        )

    @pytest.mark.parametrize("model_type", ["albert", "deberta-v2", "distilbert", "modernbert"])
    def test_any_backbone(self, model_type, tokenizer):
        args = ReplacedTokenDetectionModelArguments(**TINY, model_type=model_type, generator_size=1.0)
        model = build_model(args, tokenizer)
        collator = DataCollatorForReplacedTokenDetection(tokenizer)
        output = model.train()(**collator([{"input_ids": [2, *range(5, 20), 3], "example_id": 0, "epoch": 0}]))
        sum(loss.sum.sum() for loss in output.losses.values()).backward()
        # Distributed training waits for every gradient.
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"embedding_sharing": "es"}, "embedding_sharing='es'"),
            ({"discriminator_head": "bert"}, "discriminator_head='bert'"),
            ({"generator_size": 0.0}, "generator_size=0.0"),
            ({"generator_layers": -1.0}, "generator_layers=-1.0"),
        ],
    )
    def test_values_out_of_range_are_refused(self, options, match):
        with pytest.raises(InputError, match=match):
            ReplacedTokenDetectionModelArguments(**options)

    def test_a_share_that_splits_heads_is_refused(self, tokenizer):
        args = ReplacedTokenDetectionModelArguments(hidden_size=64, num_attention_heads=8, generator_size=0.3)
        with pytest.raises(InputError, match="generator_size=0.3"):
            build_model(args, tokenizer)
