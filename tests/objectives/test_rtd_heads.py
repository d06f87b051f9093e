"""Heads on any encoder, DeBERTa's decoder, and published pairs."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM

from helpers.method_matrix import NO_DROPOUT, TINY, build, tiny_tokenizer
from helpers.replaced_tokens import DEBERTA, PROGRAM, assert_stock, batch_of, run
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.heads import DiscriminatorHead, DiscriminatorHeadConfig
from hf_pretrain.objectives.replaced_token_detection import ReplacedTokenDetectionModelArguments, build_model


def model_of(**options):
    torch.manual_seed(2)
    return build_model(ReplacedTokenDetectionModelArguments(**{**TINY, **options}), tiny_tokenizer())


class TestHeads:
    def test_electras_is_the_stock_one(self):
        stock = model_of(generator_size=1.0).discriminator.discriminator_predictions
        head = DiscriminatorHead(DiscriminatorHeadConfig(kind="electra", hidden_size=32))
        head.dense.load_state_dict(stock.dense.state_dict())
        head.classifier.load_state_dict(stock.dense_prediction.state_dict())
        states = torch.randn(3, 7, 32)
        assert torch.equal(head(states), stock(states))

    def test_debertas_adds_the_first_state_to_every_other(self):
        head = DiscriminatorHead(DiscriminatorHeadConfig(kind="deberta_v3", hidden_size=32)).eval()
        states = torch.randn(2, 5, 32)
        for row in range(2):
            for column in range(5):
                state = head.LayerNorm(states[row, column] + states[row, 0])
                expected = head.classifier(nn.functional.gelu(head.dense(state)))[0]
                torch.testing.assert_close(head(states)[row, column], expected)

    def test_the_first_state_is_that_of_the_tokens_own_document(self):
        head = DiscriminatorHead(DiscriminatorHeadConfig(kind="deberta_v3", hidden_size=32)).eval()
        first, second = torch.randn(1, 3, 32), torch.randn(1, 4, 32)
        columns = torch.tensor([[0, 0, 0, 3, 3, 3, 3]])
        together = head(torch.cat([first, second], dim=1), columns)
        torch.testing.assert_close(together, torch.cat([head(first), head(second)], dim=1))

    @pytest.mark.parametrize("head", ["electra", "deberta_v3"])
    @pytest.mark.parametrize("model_type", ["electra", "bert", "roberta", "modernbert", "deberta-v2"])
    def test_any_head_on_any_backbone(self, tmp_path, model_type, head):
        options = {
            "model_type": model_type,
            "discriminator_head": head,
            "generator_size": 1.0,
            "config_overrides": None,
        }
        trainer = build(PROGRAM, tmp_path, model_options=options)
        trainer.train()
        model = trainer.model
        assert not [name for name, _ in model.named_parameters() if name not in trainer.recorder.gradients[0]]
        batch = batch_of(trainer)
        output, seen = run(model, batch)
        trainer.save_model()
        again = model_of(model_name_or_path=str(tmp_path), embedding_sharing="tied")
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        if model_type == "electra" and head == "electra":
            assert model.discriminator_head is None and not (tmp_path / "pretraining" / "discriminator_head").exists()
            return
        # The root is the encoder alone; transformers makes a pooler anew where the architecture has one.
        encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"] and all("pooler" in name for name in info["missing_keys"])
        loaded = DiscriminatorHead.from_pretrained(tmp_path, subfolder="pretraining/discriminator_head")
        with torch.no_grad():
            mask = batch["attention_mask"]
            states = encoder.eval()(seen["input_ids"], attention_mask=mask).last_hidden_state
            torch.testing.assert_close(loaded(states)[mask > 0], output.scores[mask > 0], atol=1e-5, rtol=1e-5)

    def test_padding_on_the_left_moves_the_first_state(self, tmp_path):
        options = {
            "discriminator_head": "deberta_v3",
            "model_type": "modernbert",
            "generator_size": 1.0,
            "config_overrides": None,
        }
        trainer = build(PROGRAM, tmp_path, model_options=options)
        right, _ = run(trainer.model, batch_of(trainer))
        trainer.data_collator.tokenizer.padding_side = "left"
        left, _ = run(trainer.model, batch_of(trainer))
        torch.testing.assert_close(left.losses["rtd"].sum, right.losses["rtd"].sum, atol=1e-4, rtol=1e-5)


class TestEnhancedMaskDecoder:
    def test_two_passes_of_the_last_layer_from_positions(self, tmp_path):
        """Against the passes written out on the states that the stock model returns."""
        trainer = build(PROGRAM, tmp_path, model_options=DEBERTA)
        model, batch = trainer.model.eval(), batch_of(trainer)
        generator = model.generator
        mask = batch["attention_mask"]
        with torch.no_grad():
            states = generator.deberta(
                batch["input_ids"], attention_mask=mask, output_hidden_states=True
            ).hidden_states
            encoder = generator.deberta.encoder
            layer, hidden = encoder.layer[-1], states[-2]
            arguments = {
                "attention_mask": encoder.get_attention_mask(mask),
                "relative_pos": encoder.get_rel_pos(hidden),
                "rel_embeddings": encoder.get_rel_embedding(),
            }
            query = hidden + model.generator_decoder.position_embeddings.weight[: hidden.shape[1]]
            for _ in range(2):
                query = layer.forward(hidden, query_states=query, **arguments)[0]
            expected = generator.cls(query).flatten(0, 1)[batch["target_positions"]]
            logits = model.generator_head(
                generator, batch["target_positions"], input_ids=batch["input_ids"], attention_mask=mask
            )
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    def test_absolute_positions_matter_and_learn(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=DEBERTA)
        before, _ = run(trainer.model, batch_of(trainer))
        trainer.train()
        assert trainer.recorder.gradients[0]["generator_decoder.position_embeddings.weight"].any()
        with torch.no_grad():
            trainer.model.generator_decoder.position_embeddings.weight.normal_()
        after, _ = run(trainer.model, batch_of(trainer))
        assert not torch.allclose(before.losses["mlm"].sum, after.losses["mlm"].sum, rtol=1e-2)

    def test_it_is_exported_and_continued(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options=DEBERTA, max_steps=3, learning_rate=1e-2)
        trainer.train()
        trainer.save_model()
        again = model_of(model_name_or_path=str(tmp_path), embedding_sharing="gdes", enhanced_mask_decoder=None)
        (expected, _), (output, _) = (run(model, batch_of(trainer)) for model in (trainer.model, again))
        for name, loss in expected.losses.items():
            torch.testing.assert_close(output.losses[name].sum, loss.sum, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("options", [{"model_type": "bert"}, {"model_type": "deberta-v2"}], ids=["bert", "biased"])
    def test_what_cannot_take_it_is_refused(self, options):
        with pytest.raises(InputError, match="enhanced_mask_decoder=True"):
            model_of(**options, generator_size=1.0, enhanced_mask_decoder=True)


class TestElectraPair:
    def test_two_published_checkpoints(self, tmp_path):
        """As google's: discriminator and generator in repositories of their own, each with the shared tables."""
        model = model_of()
        model.discriminator.save_pretrained(tmp_path / "discriminator")
        model.generator.save_pretrained(tmp_path / "generator")
        again = model_of(
            model_name_or_path=str(tmp_path / "discriminator"), generator_name_or_path=str(tmp_path / "generator")
        )
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class TestDebertaPair:
    @pytest.fixture
    def published(self, tmp_path):
        """A folder with the names of a published DeBERTa-v3, and what its parts give."""
        torch.manual_seed(3)
        options = {
            **TINY, "vocab_size": 60, "pad_token_id": 0, "position_biased_input": False, "relative_attention": True,
            "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0, "legacy": False,
        }  # fmt: skip
        generator = DebertaV2ForMaskedLM(DebertaV2Config(**{**options, "num_hidden_layers": 1}))
        encoder = AutoModel.from_config(DebertaV2Config(**options))
        head = DiscriminatorHead(DiscriminatorHeadConfig(kind="deberta_v3", hidden_size=32, layer_norm_eps=1e-7))
        with torch.no_grad():
            difference = 0.1 * torch.randn(60, 32)
            encoder.embeddings.word_embeddings.weight.copy_(generator.get_input_embeddings().weight + difference)
        positions = torch.randn(32, 32)
        state = {f"deberta.{name}": value for name, value in encoder.state_dict().items()}
        state |= {f"mask_predictions.{name}": value for name, value in head.state_dict().items()}
        state["deberta.embeddings.word_embeddings._weight"] = difference
        state["deberta.embeddings.position_embeddings.weight"] = positions
        encoder.config.save_pretrained(tmp_path)
        torch.save(state, tmp_path / "pytorch_model.bin")
        extra = {"deberta.embeddings.position_embeddings.weight": positions}
        torch.save(generator.state_dict() | extra, tmp_path / "pytorch_model.generator.bin")
        return tmp_path, state, encoder.eval(), generator, head, difference

    def check(self, folder, encoder, generator, head, difference):
        model = model_of(model_name_or_path=str(folder), embedding_sharing="gdes").eval()
        ids = torch.randint(5, 60, (2, 9))
        with torch.no_grad():
            states = model.discriminator(ids).last_hidden_state
            torch.testing.assert_close(states, encoder(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.discriminator_head(states), head(states), atol=1e-6, rtol=1e-6)
        table = model.discriminator.get_input_embeddings()
        torch.testing.assert_close(table.weight, difference, atol=1e-6, rtol=1e-5)
        assert table.base_weight is model.generator.get_input_embeddings().weight
        assert all(
            torch.equal(value, model.generator.state_dict()[name]) for name, value in generator.state_dict().items()
        )
        return model

    def test_head_decoder_and_difference_are_found(self, published, tmp_path):
        folder, state, *parts = published
        model = self.check(folder, *parts)
        positions = state["deberta.embeddings.position_embeddings.weight"]
        assert torch.equal(model.generator_decoder.position_embeddings.weight, positions)
        model.export(tmp_path / "export")
        assert_stock(tmp_path / "export", AutoModel)
        assert_stock(tmp_path / "export" / "pretraining" / "generator", AutoModelForMaskedLM)

    def test_a_discriminator_saved_with_its_difference_alone(self, published):
        """Stock transformers gives it a random table."""
        folder, state, *parts = published
        del state["deberta.embeddings.word_embeddings.weight"]
        torch.save(state, folder / "pytorch_model.bin")
        self.check(folder, *parts)

    def test_the_official_spelling_of_the_head(self, published):
        folder, state, *parts = published
        torch.save(
            {name.replace("classifier", "classifer"): value for name, value in state.items()},
            folder / "pytorch_model.bin",
        )
        self.check(folder, *parts)

    def test_a_generator_that_is_none_is_refused(self, published):
        folder, state, *_ = published
        torch.save(state, folder / "pytorch_model.generator.bin")
        with pytest.raises(InputError, match="lm_predictions"):
            model_of(model_name_or_path=str(folder), embedding_sharing="gdes")


def test_disallowed_correct_tokens_are_replaced_everywhere(tmp_path):
    options = {"disallow_correct": True, "config_overrides": NO_DROPOUT}
    trainer = build(PROGRAM, tmp_path, model_options=options, mlm_probability=0.4)
    batch = batch_of(trainer, 60)
    output, _ = run(trainer.model, batch)
    selected = batch["labels"] != -100
    assert torch.equal(output.score_labels == 1, selected)
    assert not output.metrics["sampled_accuracy"].sum.any()
