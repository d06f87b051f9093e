"""What generator and discriminator share, for pairs of any architecture and width."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, ElectraForPreTraining

from helpers.method_matrix import NO_DROPOUT, TINY, build, tiny_tokenizer
from helpers.replaced_tokens import PROGRAM, assert_stock, batch_of, run
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.embeddings import DisentangledEmbedding, FactorizedEmbedding
from hf_pretrain.objectives.replaced_token_detection import (
    ReplacedTokenDetectionForPreTraining,
    ReplacedTokenDetectionModelArguments,
    build_model,
)

WIDE = {**TINY, "num_attention_heads": 4}
GDES = {"embedding_sharing": "gdes"}


def model_of(**options):
    torch.manual_seed(1)
    return build_model(
        ReplacedTokenDetectionModelArguments(**{**WIDE, "config_overrides": NO_DROPOUT, **options}), tiny_tokenizer()
    )


def words(model):
    return model.get_input_embeddings()


@pytest.mark.parametrize("sharing", ["tied", "gdes", "none"])
@pytest.mark.parametrize("model_type", ["electra", "bert", "roberta", "modernbert", "deberta-v2"])
def test_any_backbone_at_a_quarter_of_the_width_and_half_the_depth(tmp_path, model_type, sharing):
    """Every parameter learns, and what is exported gives the outputs of what was trained, in stock classes."""
    options = {"model_type": model_type, "embedding_sharing": sharing, "generator_layers": 0.5, "generator_size": 0.25}
    trainer = build(
        PROGRAM, tmp_path, model_options={**WIDE, **options, "config_overrides": None}, learning_rate=1e-2, max_steps=3
    )
    model = trainer.model
    assert words(model.discriminator).embedding_dim == words(model.generator).weight.shape[1] or sharing == "none"
    trainer.train()
    missing = [name for name, parameter in model.named_parameters() if name not in trainer.recorder.gradients[0]]
    assert not missing
    batch = batch_of(trainer)
    output, seen = run(model, batch)
    trainer.save_model()
    auto = ElectraForPreTraining if model_type == "electra" else AutoModelForTokenClassification
    discriminator = assert_stock(tmp_path, auto)
    generator = assert_stock(tmp_path / "pretraining" / "generator", AutoModelForMaskedLM)
    mask = batch["attention_mask"]
    with torch.no_grad():
        scores = discriminator(seen["input_ids"], attention_mask=mask).logits.reshape(mask.shape)
        torch.testing.assert_close(scores[mask > 0], output.scores[mask > 0], atol=1e-5, rtol=1e-5)
        expected = model.generator(batch["input_ids"], attention_mask=mask).logits
        logits = generator(batch["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(logits[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)


def test_two_architectures(tmp_path):
    model = model_of(model_type="bert", generator_type="electra", generator_size=0.5, embedding_size=None)
    assert model.generator.config.model_type == "electra" and model.discriminator.config.model_type == "bert"
    assert words(model.generator).weight is words(model.discriminator).weight


class TestOtherWidths:
    OPTIONS = {"model_type": "bert", "generator_size": 0.25}

    def test_only_the_word_table_is_shared_and_a_projection_lies_between(self):
        model = model_of(**self.OPTIONS)
        table = words(model.generator)
        assert isinstance(table, FactorizedEmbedding) and table.weight is words(model.discriminator).weight
        assert model.generator.get_output_embeddings().weight is table.weight
        assert table(torch.tensor([[7]])).shape == (1, 1, 8)
        shared = set(map(id, model.generator.parameters())) & set(map(id, model.discriminator.parameters()))
        assert shared == {id(table.weight)}

    def test_the_fresh_generator_knows_nothing(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options={**WIDE, **self.OPTIONS})
        loss = trainer.evaluate()["eval_mlm_loss"]
        assert loss == pytest.approx(math.log(60), rel=0.01)

    def test_it_is_saved_and_reloaded_as_it_is(self, tmp_path):
        model = model_of(**self.OPTIONS)
        model.save_pretrained(tmp_path)
        loaded, info = ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert words(loaded.generator).weight is words(loaded.discriminator).weight
        assert loaded.generator.get_output_embeddings().weight is words(loaded.generator).weight

    def test_the_projections_are_found_again_in_an_export(self, tmp_path):
        model = model_of(**self.OPTIONS)
        with torch.no_grad():
            words(model.generator).weight.normal_()
        model.export(tmp_path)
        again = model_of(model_name_or_path=str(tmp_path))
        ours, theirs = words(model.generator), words(again.generator)
        torch.testing.assert_close(theirs.projection.weight, ours.projection.weight, atol=1e-5, rtol=1e-4)
        decoders = [part.generator.get_output_embeddings().projection.weight for part in (model, again)]
        torch.testing.assert_close(*decoders, atol=1e-5, rtol=1e-4)
        assert torch.equal(ours.weight, theirs.weight)

    def test_a_pair_that_was_not_trained_as_one_is_refused(self, tmp_path):
        model_of(**self.OPTIONS, embedding_sharing="none").export(tmp_path)
        with pytest.raises(InputError, match="not a projection.*embedding_sharing='none'"):
            model_of(model_name_or_path=str(tmp_path))


def test_tables_that_were_not_trained_as_one_are_not_tied(tmp_path):
    """The generator's would silently take the place of the discriminator's."""
    model_of(embedding_sharing="none").export(tmp_path)
    with pytest.raises(InputError, match="embedding_sharing='tied'.*'gdes'"):
        model_of(model_name_or_path=str(tmp_path))


class TestDisentangled:
    def batch(self, tmp_path):
        return batch_of(build(PROGRAM, tmp_path / "data"))

    def test_the_discriminator_starts_from_the_generators_tables(self):
        model = model_of(**GDES)
        for name in ("word_embeddings", "position_embeddings"):
            ours = model.discriminator.electra.embeddings.get_submodule(name)
            theirs = model.generator.electra.embeddings.get_submodule(name)
            assert isinstance(ours, DisentangledEmbedding) and ours.base_weight is theirs.weight
            assert not ours.weight.any() and ours.weight.requires_grad
            ids = torch.arange(20)[None]
            assert torch.equal(ours(ids), theirs(ids))

    def test_each_loss_moves_its_own_table(self, tmp_path):
        model, batch = model_of(**GDES), self.batch(tmp_path)
        base, difference = words(model.generator).weight, words(model.discriminator).weight
        gradients = {}
        for name in ("mlm", "rtd"):
            model.zero_grad()
            model.train()(**batch).losses[name].sum.sum().backward()
            gradients[name] = [None if p.grad is None else bool(p.grad.any()) for p in (base, difference)]
        assert gradients == {"mlm": [True, None], "rtd": [None, True]}

    def test_two_gathers_are_the_sum_of_the_tables(self):
        model = model_of(**GDES)
        table = words(model.discriminator)
        with torch.no_grad():
            table.weight.normal_()
        ids = torch.arange(60).reshape(6, 10)
        assert torch.equal(table(ids), torch.nn.functional.embedding(ids, table.base_weight + table.weight))

    def test_padding_gets_no_gradient(self):
        table = words(model_of(**GDES).discriminator)
        table(torch.tensor([[0, 7]])).sum().backward()
        assert table.padding_idx == 0 and not table.weight.grad[0].any() and table.weight.grad[7].all()

    def test_without_weight_the_discriminator_follows_the_generator(self, tmp_path):
        """Nothing else moves the difference, and the generator does not feel the weight."""
        runs = {}
        for weight in (0.0, 50.0):
            options = {"model_options": {**WIDE, **GDES}, "rtd_weight": weight, "max_steps": 20, "learning_rate": 1e-2}
            trainer = build(PROGRAM, tmp_path / str(weight), **options)
            before = words(trainer.model.generator).weight.detach().clone()
            trainer.train()
            runs[weight] = trainer.model
            assert not torch.equal(before, words(trainer.model.generator).weight)
        still, moved = (words(model.discriminator) for model in runs.values())
        assert not still.weight.any() and moved.weight.any()
        assert torch.equal(still(torch.arange(60)), words(runs[0.0].generator)(torch.arange(60)))
        generators = [model.generator.state_dict() for model in runs.values()]
        assert all(torch.equal(value, generators[1][name]) for name, value in generators[0].items())

    def test_the_export_has_the_merged_table_and_can_be_continued(self, tmp_path):
        trainer = build(PROGRAM, tmp_path, model_options={**WIDE, **GDES}, max_steps=5, learning_rate=1e-2)
        trainer.train()
        table = words(trainer.model.discriminator)
        trainer.save_model()
        merged = words(assert_stock(tmp_path, ElectraForPreTraining)).weight
        assert torch.equal(merged, table.base_weight + table.weight) and table.weight.any()
        again = words(model_of(model_name_or_path=str(tmp_path), **GDES).discriminator)
        assert torch.equal(again.base_weight, table.base_weight)
        torch.testing.assert_close(again.weight, table.weight, atol=1e-7, rtol=0)

    def test_it_is_saved_and_reloaded_as_it_is(self, tmp_path):
        model = model_of(**GDES)
        with torch.no_grad():
            words(model.discriminator).weight.normal_()
        model.save_pretrained(tmp_path)
        loaded, info = ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for one in (loaded, copy.deepcopy(loaded), loaded.to(torch.float64)):
            assert words(one.discriminator).base_weight is words(one.generator).weight
        assert torch.equal(words(loaded.discriminator).weight, words(model.discriminator).weight.double())

    def test_other_vocabularies_are_refused(self):
        pair = model_of(), model_of(config_overrides='{"vocab_size": 64}')
        with pytest.raises(InputError, match="word table"):
            ReplacedTokenDetectionForPreTraining.from_models(pair[0].generator, pair[1].discriminator, **GDES)


class TestFull:
    OPTIONS = {"embedding_sharing": "full", "generator_size": 1.0}

    @pytest.mark.parametrize("model_type", ["electra", "bert", "modernbert"])
    def test_one_encoder_for_both(self, tmp_path, model_type):
        model = model_of(**self.OPTIONS, model_type=model_type, config_overrides=None)
        ours, theirs = (dict(part.base_model.named_parameters()) for part in (model.discriminator, model.generator))
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
        model.save_pretrained(tmp_path)
        loaded = ReplacedTokenDetectionForPreTraining.from_pretrained(tmp_path)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    def test_other_sizes_are_refused(self):
        with pytest.raises(InputError, match="embedding_sharing='full' needs equal parameters"):
            model_of(embedding_sharing="full", generator_size=0.5)
