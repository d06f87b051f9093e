"""Runs of Electric: how the batch is cut, where a run goes on, and what is learned."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import ElectraForPreTraining

from helpers.method_matrix import NO_DROPOUT, build, log_of, programs, relative_difference, tiny_data
from helpers.replaced_tokens import batch_of, run
from hf_pretrain.corruption.arguments import MaskingArguments
from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.objectives.electric import ElectricModelArguments, score_texts
from hf_pretrain.training.parsing import parse_arguments

PROGRAM = programs()["electric"]
CLS, SEP = 2, 3


@pytest.fixture
def trainer(tmp_path):
    return build(PROGRAM, tmp_path)


class TopicCorpus:
    """Texts of 20 words, drawn independently from one of four distributions: all the others tell which."""

    def __init__(self):
        weights = np.array([35, 25, 15, 10, 5, 4, 2, 1, 1, 1, 0.5, 0.5])
        self.topics = np.stack([np.roll(weights / weights.sum(), 3 * topic) for topic in range(4)])
        self.words = self._draw(100, seed=2)

    def _draw(self, count, *, seed):
        uniforms = draws.uniforms(draws.row_keys(range(count), seed=seed, stream="topics"), 21)
        cumulative = self.topics[(uniforms[:, 0] * 4).astype(int)].cumsum(1)
        return (cumulative[:, None, :] <= uniforms[:, 1:, None]).sum(-1).clip(max=11)

    def _ids(self, words):
        ids = np.pad(words + 5, ((0, 0), (1, 1)), constant_values=CLS)
        ids[:, -1] = SEP
        return ids

    def input_ids(self):
        """The held-out texts."""
        return self._ids(self.words)

    def data(self, count):
        train, held_out = (
            Dataset.from_list([{"input_ids": row, "word_starts": [True] * 22} for row in ids.tolist()])
            for ids in (self._ids(self._draw(count, seed=1)), self.input_ids())
        )
        return replace(tiny_data(), train_dataset=EpochDataset(train), eval_dataset=EpochDataset(held_out))

    def marginal_log_probs(self):
        """Of each held-out word by itself."""
        return np.log(self.topics.mean(0)[self.words])

    def log_probs(self):
        """Of each held-out word given all the others of its text, by Bayes."""
        each = np.log(self.topics[:, self.words])
        others = each.sum(-1, keepdims=True) - each
        posterior = np.exp(others - others.max(0))
        return np.log((posterior * np.exp(each)).sum(0) / posterior.sum(0))


def make_noise(generator):
    """Let a generator draw the corpus' twelve words with fixed odds, whatever stands around."""
    generator.excluded_tokens.fill_(True)
    generator.excluded_tokens[5:17] = False
    with torch.no_grad():
        generator.norm.weight.zero_()
        generator.bias[5:17] = torch.linspace(-0.5, 0.5, 12)


# A standard deviation of 0.02 is made for widths of hundreds: at 32, contexts would move no energy for a thousand steps.
WIDE = {"config_overrides": json.dumps({**json.loads(NO_DROPOUT), "initializer_range": 0.15})}
LEARNING = {
    "learning_rate": 2e-3,
    "max_grad_norm": 1.0,
    "warmup_steps": 20,
    "adam_bias_correction": True,
    "per_device_train_batch_size": 32,
}


def energies_of(model, corpus):
    """Of the held-out words, by a discriminator alone."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(corpus.input_ids())).logits[:, 1:-1].numpy()


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


class TestRuns:
    def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(self, tmp_path):
        runs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            runs.append(build(PROGRAM, tmp_path / str(batch), **options))
            runs[-1].train()
        whole, *cut = runs
        for other in cut:
            assert relative_difference(whole.recorder.gradients[0], other.recorder.gradients[0]) < 1e-4
            for name in ("loss", "cloze_loss", "nce_loss"):
                assert log_of(other)[0][name] == pytest.approx(log_of(whole)[0][name], rel=1e-5)

    def test_resume_is_bit_exact(self, tmp_path):
        options = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "learning_rate": 1e-3,
            "model_options": {"config_overrides": None},
        }
        straight = build(PROGRAM, tmp_path / "straight", **options)
        straight.train()
        resumed = build(PROGRAM, tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert log_of(resumed) == log_of(straight)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name

    def test_the_generator_learns_what_the_context_tells(self, tmp_path):
        corpus = TopicCorpus()
        options = {"max_steps": 200, "learning_rate": 3e-3, "model_options": {"num_hidden_layers": 1}}
        trainer = build(PROGRAM, tmp_path, corpus.data(3200), per_device_train_batch_size=16, **options)
        trainer.train()
        after = trainer.evaluate()
        unigram, best = -corpus.marginal_log_probs().mean(), -corpus.log_probs().mean()
        assert best < after["eval_cloze_loss"] < best + 0.3 < unigram - 0.3
        assert {"eval_energy", "eval_disc_gain", "eval_fake_rate"} <= after.keys()

    def test_energies_tell_the_text_from_noise_of_known_probability(self, tmp_path):
        """From scratch, against what Bayes' rule makes of the corpus; the noise has the same unequal odds everywhere."""
        corpus, options = TopicCorpus(), {**WIDE, "embedding_sharing": "none", "num_hidden_layers": 1}
        training = {**LEARNING, "max_steps": 200, "mlm_probability": 0.25, "cloze_weight": 0.0}
        trainer = build(PROGRAM, tmp_path, corpus.data(6400), model_options=options, **training)
        make_noise(trainer.model.generator)
        trainer.train()
        energies, expected = energies_of(trainer.model.discriminator, corpus), -corpus.log_probs()
        # Who knows how frequent each word is, but not what its context tells, has a correlation of .35.
        assert correlation(-corpus.marginal_log_probs(), expected) < 0.45
        assert correlation(energies, expected) > 0.65
        # Their level is no matter of taste: without log q it would be off by 2 nats, without the odds of noise by 1.
        assert energies.mean() == pytest.approx(expected.mean(), abs=0.4)
        assert trainer.evaluate()["eval_disc_gain"] > 0.13

    @pytest.mark.slow
    def test_energies_are_the_negative_log_probabilities_of_the_text(self, tmp_path):
        """Both models learn, and the noise becomes as likely as the text; of a clean text, from the exported model alone."""
        corpus = TopicCorpus()
        options = {"model_options": WIDE, **LEARNING, "max_steps": 600}
        trainer = build(PROGRAM, tmp_path, corpus.data(20_000), **options)
        trainer.train()
        trainer.save_model()
        expected, ids = corpus.log_probs(), torch.from_numpy(corpus.input_ids())
        model = ElectraForPreTraining.from_pretrained(tmp_path)
        energies = energies_of(model, corpus)
        assert energies.mean() == pytest.approx(-expected.mean(), abs=0.05)
        assert correlation(energies, -expected) > 0.97
        # Nothing but the noise makes the probabilities of all words that may stand at a place add up to one.
        words = torch.arange(5, 17)
        at_ten = ids[:, None].repeat(1, len(words), 1)
        at_ten[:, :, 10] = words
        with torch.no_grad():
            sums = (-model(at_ten.flatten(0, 1)).logits[:, 10]).exp().view(len(ids), len(words)).sum(1)
        assert float(sums.mean()) == pytest.approx(1, abs=0.05) and float(sums.std()) < 0.1
        texts = trainer.processing_class.batch_decode(ids[:, 1:-1])
        scores = score_texts(model, trainer.processing_class, texts)
        # Of four seeds it is .950 to .971.
        assert correlation(np.array(scores), expected.sum(1)) > 0.93

    def test_bf16_loss_is_near_fp32(self, trainer):
        """And the probabilities are taken in fp32."""
        losses = []
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output, _ = run(trainer.model, batch_of(trainer))
            losses.append(sum(float(loss.sum.sum()) for loss in output.losses.values()))
            assert output.scores.dtype == output.losses["cloze"].sum.dtype == torch.float32
        assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)

    def test_the_recipe_is_accepted(self, tmp_path):
        argv = ["--config", "electric_small", "--output_dir", str(tmp_path), "--bf16", "false"]
        data_args, model_args, args = parse_arguments(PROGRAM.arguments, argv, prog="electric", description="")
        masking = MaskingArguments(mask_share=0.0, random_share=0.0, mask_unknown=False)
        assert args.max_steps == 1_000_000 and args.nce_weight == 50 and args.masking == masking
        assert model_args == ElectricModelArguments(embedding_size=128)
