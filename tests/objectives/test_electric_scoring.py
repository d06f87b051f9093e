"""Scores of whole texts, against their definition."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, ElectraConfig, ElectraForPreTraining
from transformers.modeling_outputs import TokenClassifierOutput

from helpers.method_matrix import TINY, build, programs
from helpers.replaced_tokens import run
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.minimal_pairs import pseudo_log_likelihoods
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.objectives.electric import score_texts

PROGRAM = programs()["electric"]


class Cloze(nn.Module):
    """Energies as they should be: what a masked language model says of each token where that one is masked, one at a time."""

    def __init__(self, masked_lm, mask_token_id):
        super().__init__()
        self.masked_lm, self.mask_token_id = masked_lm, mask_token_id

    @property
    def device(self):
        return self.masked_lm.device

    def forward(self, input_ids, attention_mask):
        energies = torch.zeros(input_ids.shape)
        for row, place in attention_mask.nonzero().tolist():
            ids = input_ids[row, : attention_mask[row].sum()]
            masked = ids.index_fill(0, torch.tensor([place]), self.mask_token_id)
            energies[row, place] = -self.masked_lm(masked[None]).logits[0, place].log_softmax(-1)[ids[place]]
        return TokenClassifierOutput(logits=energies[..., None])


class TestScores:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return ElectraForPreTraining(ElectraConfig(**TINY, vocab_size=60, embedding_size=16)).eval()

    def test_a_score_is_the_sum_of_the_negated_energies_of_the_words(self, model, tokenizer):
        texts = ["w1 w2 w3", "w4", "w5 nothing w6 w7", ""]
        scores = score_texts(model, tokenizer, texts)
        for text, score in zip(texts, scores, strict=True):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            energies = model(ids).logits[0].detach()
            assert score == pytest.approx(-float(energies[ids[0] >= 5].sum()), abs=1e-5)
        assert scores[3] == 0

    def test_batches_and_order_change_nothing(self, model, tokenizer):
        texts = [" ".join(f"w{i}" for i in range(n)) for n in (7, 1, 20, 3, 3)]
        scores = score_texts(model.train(), tokenizer, texts, batch_size=2)
        assert model.training
        one_by_one = [score_texts(model, tokenizer, [text])[0] for text in texts]
        assert scores == pytest.approx(one_by_one, abs=1e-4)

    def test_what_cannot_be_scored_is_refused(self, model, tokenizer):
        with pytest.raises(InputError, match=r"texts\[1\] has 42 tokens, more than the 32"):
            score_texts(model, tokenizer, ["w1", "w1 " * 40])
        classifier = BertForTokenClassification(BertConfig(**TINY, vocab_size=60, num_labels=2))
        with pytest.raises(InputError, match="gives 2 logits a token"):
            score_texts(classifier.train(), tokenizer, ["w1 w2"])
        assert classifier.training

    def test_right_energies_give_the_pseudo_log_likelihood(self, tokenizer):
        """In one pass what a masked language model takes as many for as there are tokens."""
        torch.manual_seed(0)
        masked_lm = BertForMaskedLM(BertConfig(**TINY, vocab_size=60, initializer_range=0.3)).eval()
        texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w3 w2 w1"]
        expected = pseudo_log_likelihoods(masked_lm, tokenizer, texts)
        scores = score_texts(Cloze(masked_lm, tokenizer.mask_token_id), tokenizer, texts, batch_size=3)
        assert scores == pytest.approx(expected, rel=1e-5)
        assert len({round(score, 3) for score in scores}) == 4

    def test_a_score_counts_what_training_gives_an_energy(self, tmp_path):
        """Without noise, the energies that a run logs of a text are those of its score."""
        trainer = build(PROGRAM, tmp_path)
        texts = ["w1 w2 w3", "w5 nothing w6 w7"]
        rows = [{"input_ids": trainer.processing_class(text)["input_ids"], "epoch": 0} for text in texts]
        batch = trainer.data_collator([row | {"example_id": i} for i, row in enumerate(rows)])
        batch["labels"].fill_(IGNORED)
        output, _ = run(trainer.model, batch)
        energies, counts = output.metrics["energy"]
        assert counts.tolist() == [3, 3]
        scores = score_texts(trainer.model.discriminator, trainer.processing_class, texts)
        assert scores == pytest.approx((-energies).tolist(), abs=1e-5)
