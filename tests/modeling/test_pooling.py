"""Vectors of texts: sentence-transformers itself is the oracle of what a folder computes, and one text a row of packed rows."""

import json
import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel

from helpers.distilled import bert
from helpers.method_matrix import TINY, tiny_tokenizer
from hf_pretrain import WordVectors, text_vectors
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.heads import load_head
from hf_pretrain.modeling.pooling import (
    POOLINGS,
    TEXT_POOLER_FOLDER,
    SentenceModules,
    TextPooler,
    pool_texts,
    sentence_modules_of,
)

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Rows of the number of a text and its tokens; no number: the tokens are of no text. The numbers do not follow the rows.
ROWS = [[(3, 2), (0, 5)], [(None, 4), (1, 1)], [(None, 7)], [(4, 3), (2, 1), (5, 2)]]
NUM_TEXTS, WIDTH = 6, 9


def packed(side, *, size=5, dtype=torch.float32):
    """States of the rows, with what is no number at padding, the numbers of the texts, where they begin, and each text alone."""
    torch.manual_seed(0)
    states = torch.full((len(ROWS), WIDTH, size), math.nan, dtype=dtype)
    text_ids = torch.full((len(ROWS), WIDTH), -1)
    first, alone = torch.zeros(NUM_TEXTS, dtype=torch.long), {}
    for row, texts in enumerate(ROWS):
        column = 0 if side == "right" else WIDTH - sum(length for _, length in texts)
        for number, length in texts:
            part = slice(column, column + length)
            states[row, part] = torch.randn(length, size).to(dtype)
            if number is not None:
                text_ids[row, part], first[number] = number, row * WIDTH + column
                alone[number] = states[row, part]
            column += length
    return states, text_ids, first, alone


class TestModules:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("mode", MODES)
    def test_pooling_is_that_of_sentence_transformers(self, mode, side):
        torch.manual_seed(0)
        states, mask = torch.randn(4, 9, 5), torch.ones(4, 9, dtype=torch.long)
        for row, length in enumerate((9, 1, 4, 7)):
            mask[row, slice(length, None) if side == "right" else slice(0, 9 - length)] = 0
        features = {"token_embeddings": states, "attention_mask": mask}
        expected = Pooling(5, pooling_mode=mode)(features)["sentence_embedding"]
        # Padding may hold anything.
        found = SentenceModules({"pooling_mode": mode}).vectors(
            states.masked_fill(mask[..., None] == 0, math.nan), mask
        )
        torch.testing.assert_close(found, expected)

    def test_the_length_is_divided_by_where_the_folder_says_so(self):
        states, mask = torch.randn(3, 4, 5), torch.ones(3, 4)
        plain, unit = (SentenceModules(normalizes=normalizes).vectors(states, mask) for normalizes in (False, True))
        torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
        assert not torch.allclose(plain.norm(dim=1), torch.ones(3))


class TestPackedTexts:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("mode", ["mean", "cls"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_they_have_the_vectors_of_one_text_a_row(self, mode, side, dtype):
        states, text_ids, first, alone = packed(side, dtype=dtype)
        found = pool_texts(states, text_ids, first, mode=mode)
        assert found.dtype == torch.float32 and found.shape == (NUM_TEXTS, 5)
        modules = SentenceModules({"pooling_mode": mode})
        for number, text in alone.items():
            rows = torch.full((1, WIDTH, 5), math.nan, dtype=dtype)
            rows[0, : len(text)] = text
            mask = (torch.arange(WIDTH) < len(text)).long()[None]
            torch.testing.assert_close(found[number : number + 1], modules.vectors(rows, mask), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("mode", "share"), [("mean", [1 / 5] * 5), ("cls", [1, 0, 0, 0, 0])])
    def test_only_the_tokens_of_a_text_have_a_gradient(self, mode, share):
        """Text 0 has five tokens, in row 0 from column 2 on; padding that is no number gives none."""
        states, text_ids, first, _ = packed("right")
        states.requires_grad_()
        pool_texts(states, text_ids, first, mode=mode)[0].sum().backward()
        expected = torch.zeros(states.shape)
        expected[0, 2:7] = torch.tensor(share)[:, None]
        torch.testing.assert_close(states.grad, expected)

    @pytest.mark.parametrize("mode", ["mean", "cls"])
    def test_no_wait_for_the_device(self, mode):
        states, text_ids, first, _ = packed("left")
        found = pool_texts(states.to("meta"), text_ids.to("meta"), first.to("meta"), mode=mode)
        assert found.is_meta and found.shape == (NUM_TEXTS, 5)

    def test_the_layer_of_training_is_no_way_to_pool(self):
        with pytest.raises(InputError, match="mode='cls_mlp' must be one of"):
            pool_texts(*packed("right")[:3], mode="cls_mlp")


class TestTextPooler:
    def test_it_is_its_formula_in_fp32(self):
        pooler = TextPooler.for_encoder(AutoConfig.for_model("distilbert", dim=16, initializer_range=0.5))
        torch.nn.init.normal_(pooler.dense.bias)
        states = torch.randn(4, 16)
        expected = torch.tanh(states @ pooler.dense.weight.T + pooler.dense.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(pooler(states), expected)
        assert 0.4 < float(pooler.dense.weight.detach().std()) < 0.6

    def test_it_is_saved_and_loaded(self, tmp_path):
        config = AutoConfig.for_model("bert", **TINY)
        source, other = TextPooler.for_encoder(config), TextPooler.for_encoder(config)
        source.save_pretrained(tmp_path / TEXT_POOLER_FOLDER)
        assert load_head(other, str(tmp_path), folder=TEXT_POOLER_FOLDER)
        assert torch.equal(other.dense.weight, source.dense.weight)
        assert torch.equal(TextPooler.from_pretrained(tmp_path / TEXT_POOLER_FOLDER).dense.weight, source.dense.weight)


class TestTrainedEncoder:
    TEXTS = ("w3 w7 w9", "w1", " ".join(f"w{i}" for i in range(30)))

    @pytest.mark.parametrize("normalizes", [False, True])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_sentence_transformers_encodes_as_we_do(self, tmp_path, pooling, normalizes):
        bert(BertModel, seed=5, max_position_embeddings=64).save_pretrained(tmp_path)
        tokenizer, model = tiny_tokenizer(), AutoModel.from_pretrained(tmp_path).eval()
        tokenizer.save_pretrained(tmp_path)
        modules = sentence_modules_of(pooling, normalizes=normalizes, max_seq_length=12)
        modules.write(tmp_path, hidden_size=model.config.hidden_size)
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
        assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", *["Normalize"] * normalizes]
        assert theirs.max_seq_length == 12
        assert theirs.similarity_fn_name == ("cosine" if normalizes else "dot")
        types = [entry["type"] for entry in json.loads((tmp_path / "modules.json").read_text())]
        assert types == [f"sentence_transformers.models.{type(module).__name__}" for module in theirs]
        # All texts in one row, of which each is encoded by itself.
        ids = [tokenizer(text, truncation=True, max_length=12)["input_ids"] for text in self.TEXTS]
        lengths = torch.tensor([len(text) for text in ids])
        assert lengths.tolist() == [5, 3, 12]
        with torch.no_grad():
            states = torch.cat([model(input_ids=torch.tensor([text])).last_hidden_state for text in ids], dim=1)
        text_ids = torch.arange(3).repeat_interleave(lengths)[None]
        ours = pool_texts(states, text_ids, lengths.cumsum(0) - lengths, mode=POOLINGS[pooling])
        ours = torch.nn.functional.normalize(ours, dim=-1) if normalizes else ours
        found = torch.tensor(theirs.encode(list(self.TEXTS), show_progress_bar=False))
        torch.testing.assert_close(found, ours, atol=1e-6, rtol=0)
        # And the files say the same to this library.
        assert SentenceModules.read(str(tmp_path)).modes == (POOLINGS[pooling],)

    def test_an_unknown_pooling_is_refused(self):
        with pytest.raises(InputError, match="pooling='max' must be one of mean, cls, cls_mlp"):
            sentence_modules_of("max", normalizes=True, max_seq_length=12)


@pytest.mark.parametrize("normalize", [False, True])
def test_static_vectors_are_pooled_by_their_mean(normalize, tmp_path):
    words = ("the", "ship", "sails")
    vectors = np.array([[1, 0], [0, 2], [3, 1]], dtype=np.float32)
    WordVectors(words, vectors).save(tmp_path, method="ppmi", training={}, lowercase=True, normalize=normalize)
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    found = text_vectors(model, tokenizer, ["The ship", "sails"], modules=SentenceModules.read(str(tmp_path)))
    np.testing.assert_allclose(found, SentenceTransformer(str(tmp_path)).encode(["The ship", "sails"]), atol=1e-7)
    assert np.allclose(np.linalg.norm(found, axis=1), 1) == normalize
