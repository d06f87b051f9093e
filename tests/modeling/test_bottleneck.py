"""The decoder of one vector: what each target may know, against its definition, by changes of the input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from helpers.method_matrix import TINY
from hf_pretrain import TransformerXLConfig, TransformerXLModel
from hf_pretrain.data import draws
from hf_pretrain.errors import InputError
from hf_pretrain.modeling import kernels
from hf_pretrain.modeling.bottleneck import (
    DECODER_FOLDER,
    DECODER_KINDS,
    BottleneckDecoder,
    BottleneckDecoderConfig,
    sampled_context,
)
from hf_pretrain.modeling.heads import load_head
from hf_pretrain.modeling.losses import IGNORED

VOCAB_SIZE, WIDTH, TABLE_WIDTH, LENGTH = 23, 16, 8, 7
KEYS = draws.row_keys([3, 4, 5], seed=1, stream="decoder")
KINDS = pytest.mark.parametrize("kind", DECODER_KINDS)
DEPTHS = pytest.mark.parametrize("num_layers", [1, 2])


def decoder(kind, *, num_layers=1, mask_probability=0.5, table_width=TABLE_WIDTH, stir=True, **changes):
    """In double precision and away from the initial values, so that what has an effect has one that is seen."""
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB_SIZE, "embedding_size": table_width, "hidden_size": WIDTH, "intermediate_size": 24}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 12, "num_hidden_layers": num_layers}
    probability = mask_probability if kind == "enhanced" else None
    model = BottleneckDecoder(BottleneckDecoderConfig(kind=kind, mask_probability=probability, **sizes, **changes))
    with torch.no_grad():
        for parameter in model.parameters() if stir else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval() if stir else model


def text(model, *, length=LENGTH, dtype=torch.double):
    """Three texts of five to seven tokens, with targets at all of them but the first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB_SIZE, (3, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([7, 5, 6])[:, None]).long()
    padding = (0, length - LENGTH)
    batch = {"input_ids": F.pad(ids * mask, padding, value=9), "mask": F.pad(mask, padding)}
    batch["positions"] = (batch["mask"] * (torch.arange(length) > 0)).flatten().nonzero()[:, 0]
    batch["vectors"] = torch.randn(3, WIDTH, generator=generator, dtype=dtype)
    batch["word_table"] = torch.randn(VOCAB_SIZE, model.config.embedding_size, generator=generator, dtype=dtype)
    if model.config.kind == "enhanced":
        batch["keys"] = torch.from_numpy(KEYS.view(np.int64))
    return batch


def places(batch):
    """Text and column of each target."""
    return [divmod(int(position), batch["mask"].shape[1]) for position in batch["positions"]]


def context_by_definition(kind, batch, probability=0.5):
    """Whether the token that is read at a column has a say in a target, from the words of the definition."""
    uniforms = draws.uniforms(draws.bits(KEYS, LENGTH), LENGTH)

    def reads(row, target, column):
        if column == 0 or not batch["mask"][row, column]:
            return False  # the vector stands there; padding is not read
        if kind == "causal":
            return column <= target
        return kind == "masked" or (column != target and uniforms[row, target, column] < 1 - probability)

    return reads


class TestWhatATargetKnows:
    @DEPTHS
    @KINDS
    def test_tokens(self, kind, num_layers):
        """Change the token at one column; the logits that move are those of the targets that read it."""
        model = decoder(kind, num_layers=num_layers)
        batch = text(model)
        plain, reads = model(**batch), context_by_definition(kind, batch)
        found, expected = [], []
        for column in range(LENGTH):
            # Into another token: none is its own neighbour modulo the size.
            ids = batch["input_ids"].clone()
            ids[:, column] = (ids[:, column] + 11) % VOCAB_SIZE
            moved = (model(**batch | {"input_ids": ids}) - plain).abs().amax(1)
            assert not ((moved > 1e-12) & (moved < 1e-7)).any(), "between nothing and something"
            found.append((moved > 1e-7).tolist())
            expected.append([reads(row, target, column) for row, target in places(batch)])
        assert found == expected
        assert any(map(any, found))

    @DEPTHS
    @KINDS
    def test_the_vector_of_its_text_and_no_other(self, kind, num_layers):
        model = decoder(kind, num_layers=num_layers)
        batch = text(model)
        plain = model(**batch)
        for number in range(3):
            vectors = batch["vectors"].clone()
            vectors[number] += torch.linspace(-1, 1, WIDTH)
            moved = (model(**batch | {"vectors": vectors}) - plain).abs().amax(1)
            assert [bool(move > 1e-7) for move in moved] == [row == number for row, _ in places(batch)]
            assert float(moved.detach().masked_fill(moved > 1e-7, 0).max()) < 1e-12

    @KINDS
    def test_its_position(self, kind):
        """The first target of "causal" reads nothing but the vector, as position 0 has none of its own."""
        model = decoder(kind)
        batch = text(model)
        plain = model(**batch)
        with torch.no_grad():
            model.position_embeddings.weight[1:] += torch.linspace(-1, 1, WIDTH).double()
        assert float((model(**batch) - plain).detach().abs().amax(1).min()) > 1e-7

    @DEPTHS
    def test_the_first_target_of_causal_has_the_vector_alone(self, num_layers):
        model = decoder("causal", num_layers=num_layers)
        batch = text(model) | {"positions": torch.tensor([0, LENGTH, 2 * LENGTH])}
        other = (batch["input_ids"] + 11) % VOCAB_SIZE
        torch.testing.assert_close(model(**batch | {"input_ids": other}), model(**batch), atol=1e-12, rtol=0)

    @DEPTHS
    @KINDS
    def test_padding_changes_nothing(self, kind, num_layers):
        model = decoder(kind, num_layers=num_layers)
        short, long = text(model), text(model, length=11)
        assert places(short) == places(long)
        torch.testing.assert_close(model(**long), model(**short), atol=1e-6, rtol=0)

    @DEPTHS
    @KINDS
    def test_a_text_does_not_know_its_batch(self, kind, num_layers):
        model = decoder(kind, num_layers=num_layers)
        batch = text(model)
        one = {name: batch[name][1:2] for name in ("input_ids", "mask", "vectors", "keys") if name in batch}
        one |= {"positions": torch.arange(1, 5), "word_table": batch["word_table"]}
        of_text = [number for number, (row, _) in enumerate(places(batch)) if row == 1]
        torch.testing.assert_close(model(**one), model(**batch)[of_text], atol=1e-6, rtol=0)

    @KINDS
    def test_padding_and_rows_without_a_token_are_numbers(self, kind):
        model = decoder(kind)
        batch = text(model)
        batch |= {"mask": batch["mask"] * torch.tensor([[1], [0], [1]]), "positions": torch.arange(3 * LENGTH)}
        assert model(**batch).isfinite().all()


class TestSampledContext:
    def test_it_is_what_the_data_path_would_draw(self):
        keys = np.concatenate([KEYS, np.array([0, 2**63, 2**64 - 1], dtype=np.uint64)])
        for probability in (0.0, 0.3, 0.5, 0.9):
            found = sampled_context(torch.from_numpy(keys.view(np.int64)), 9, mask_probability=probability)
            expected = draws.uniforms(draws.bits(keys, 9), 9) < 1 - probability
            expected[:, np.arange(9), np.arange(9)] = False
            expected[:, :, 0] = True
            assert np.array_equal(found.numpy(), expected)

    @pytest.mark.parametrize("probability", [0.3, 0.5, 0.7])
    def test_shares(self, probability):
        keys = torch.from_numpy(draws.row_keys(list(range(8)), seed=0).view(np.int64))
        seen = sampled_context(keys, 128, mask_probability=probability)
        assert not seen.diagonal(dim1=1, dim2=2)[:, 1:].any() and seen[:, :, 0].all()
        others = ~torch.eye(128, dtype=torch.bool)[1:, 1:]
        shares = seen[:, 1:, 1:].float()
        assert float(shares[:, others].mean()) == pytest.approx(1 - probability, abs=0.01)
        # Each query draws for itself: two of one text agree as often as by chance, and so do two texts.
        chance = probability**2 + (1 - probability) ** 2
        for one, other in ((shares[:, :-1], shares[:, 1:]), (shares[:-1], shares[1:]), (shares, shares.mT)):
            assert float((one == other).float().mean()) == pytest.approx(chance, abs=0.02)

    def test_a_key_has_one_pattern(self):
        keys = torch.tensor([17, -4, 17, 18])
        seen = sampled_context(keys, 16, mask_probability=0.5)
        assert (
            torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[3])
        )
        assert torch.equal(sampled_context(keys[1:2], 11, mask_probability=0.5)[0], seen[1, :11, :11])


class TestFormulas:
    def test_the_map_of_the_vector_is_attention_to_one_key(self):
        """TSDAE's decoder attends to the vector: the weight of one key is 1 whatever the query."""
        torch.manual_seed(0)
        layer = decoder("causal").layers[0].float()
        attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
        of_value, out = attention.in_proj_weight[2 * WIDTH :], attention.out_proj
        with torch.no_grad():
            layer.vector_out.weight.copy_(out.weight @ of_value)
            layer.vector_out.bias.copy_(out.weight @ attention.in_proj_bias[2 * WIDTH :] + out.bias)
            states, vectors = torch.randn(3, 5, WIDTH), torch.randn(3, WIDTH)
            # The layer with attention in place of the map, from its own parts.
            query, key, value = (
                dense(states).unflatten(-1, (2, -1)).transpose(1, 2) for dense in (layer.query, layer.key, layer.value)
            )
            scores = query @ key.mT / (WIDTH // 2) ** 0.5
            read = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1) @ value
            hidden = layer.attention_norm(states + layer.attention_out(read.transpose(1, 2).flatten(2)))
            memory = vectors[:, None]
            hidden = layer.vector_norm(hidden + attention(hidden, memory, memory)[0])
            expected = layer.output_norm(hidden + layer.dense_out(F.gelu(layer.dense_in(hidden))))
            found = layer(states, states, visible=None, vectors=vectors, positions=torch.arange(15))
        torch.testing.assert_close(found.view(3, 5, WIDTH), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("table_width", [TABLE_WIDTH, WIDTH])
    @KINDS
    def test_targets_are_a_choice_of_all(self, kind, table_width):
        model = decoder(kind, num_layers=2, table_width=table_width)
        batch = text(model)
        everywhere = model(**batch | {"positions": torch.arange(3 * LENGTH)})
        assert everywhere.shape == (3 * LENGTH, VOCAB_SIZE)
        for positions in (torch.tensor([20, 1, 1]), torch.tensor([], dtype=torch.long)):
            found = model(**batch | {"positions": positions})
            torch.testing.assert_close(found, everywhere[positions], atol=1e-12, rtol=0)

    @pytest.mark.parametrize("is_early", [True, False])
    @KINDS
    def test_losses_are_those_of_the_logits_which_never_exist_together(self, kind, is_early, monkeypatch):
        monkeypatch.setattr(kernels, "CHUNK_LOGITS", 4 * VOCAB_SIZE)
        if not is_early:
            monkeypatch.setattr(kernels, "compute_dtype", lambda weight: torch.float16)
        model = decoder(kind).float()
        batch = text(model, dtype=torch.float32)
        targets = batch["input_ids"].flatten()[batch["positions"]]
        targets[2] = IGNORED
        leaves = [batch["word_table"].requires_grad_(), batch["vectors"].requires_grad_(), *model.parameters()]
        expected = F.cross_entropy(model(**batch), targets, reduction="none", ignore_index=IGNORED)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(one.shape) or one, lambda one: one):
            found = model(**batch, targets=targets)
        assert (torch.Size((len(targets), VOCAB_SIZE)) in shapes) == (not is_early)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(each.sum() / 5, leaves, allow_unused=True) for each in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)

    @KINDS
    def test_the_output_layer_is_the_word_table_of_the_encoder(self, kind):
        model = decoder(kind)
        assert not [name for name, value in model.state_dict().items() if value.shape == (VOCAB_SIZE, TABLE_WIDTH)]
        batch = text(model)
        batch["word_table"].requires_grad_()
        logits = model(**batch)
        # A token that no text has changes its own logit alone.
        unread = next(token for token in range(VOCAB_SIZE) if token not in batch["input_ids"])
        table = batch["word_table"].detach().clone()
        table[unread] += 1
        moved = (model(**batch | {"word_table": table}) - logits).abs().amax(0) > 1e-9
        assert moved.tolist() == [token == unread for token in range(VOCAB_SIZE)]
        logits.square().sum().backward()
        assert batch["word_table"].grad[unread].any()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

    def test_initial_weights(self):
        model = decoder("causal", stir=False, initializer_range=0.07)
        layer = model.layers[0]
        for weight in (layer.query.weight, layer.dense_in.weight, layer.vector_out.weight, model.projection.weight):
            assert float(weight.detach().std()) == pytest.approx(0.07, rel=0.2)
        assert float(model.position_embeddings.weight.detach().std()) == pytest.approx(0.07, rel=0.2)
        zero = (layer.query.bias, layer.vector_out.bias, model.bias, model.norm_in.bias)
        assert not any(map(torch.any, zero)) and torch.equal(layer.output_norm.weight, torch.ones(WIDTH))


class TestSteps:
    @DEPTHS
    @KINDS
    def test_no_wait_for_the_device(self, kind, num_layers):
        model = decoder(kind, num_layers=num_layers, stir=False, hidden_dropout_prob=0.1).train().to("meta")
        batch = {name: value.to("meta") for name, value in text(model, dtype=torch.float32).items()}
        loss = model(**batch).sum()
        loss.backward()
        assert loss.is_meta

    @KINDS
    def test_one_graph(self, kind):
        torch._dynamo.reset()
        model = decoder(kind, num_layers=2)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        batch = text(model)
        for shift in range(3):
            inputs = batch | {"input_ids": (batch["input_ids"] + shift) % VOCAB_SIZE}
            torch.testing.assert_close(compiled(**inputs), model(**inputs))
        assert counter.frame_count == 1
        torch._dynamo.reset()

    @KINDS
    def test_bf16(self, kind):
        model = decoder(kind, stir=False, initializer_range=0.3)
        batch = text(model, dtype=torch.float32)
        expected = model(**batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(**batch)
        assert mixed.dtype == torch.bfloat16
        # All weights in bf16, and vectors in fp32, as pooling gives them.
        whole = model.bfloat16()(**batch | {"word_table": batch["word_table"].bfloat16()})
        for found in (mixed, whole):
            assert float(((found.float() - expected).norm() / expected.norm()).detach()) < 0.03

    @KINDS
    def test_dropout_in_training_alone(self, kind):
        options = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
        model = decoder(kind, **options)
        batch = text(model)
        assert torch.equal(model(**batch), model(**batch))
        model.train()
        assert not torch.equal(model(**batch), model(**batch))


class TestForEncoder:
    @pytest.mark.parametrize(
        ("model_type", "sizes", "expected"),
        [
            ("bert", TINY, {"intermediate_size": 64, "attention_probs_dropout_prob": 0.1}),
            ("electra", TINY | {"embedding_size": 16}, {"embedding_size": 16}),
            ("albert", TINY | {"embedding_size": 16}, {"embedding_size": 16, "initializer_range": 0.02}),
            ("modernbert", TINY, {"initializer_range": 0.02}),
            ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}, {"intermediate_size": 40}),
            ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 2}, {"intermediate_size": 128}),
            ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}, {"intermediate_size": 48}),
            ("deberta-v2", TINY, {"layer_norm_eps": 1e-7}),
        ],
    )
    def test_any_encoder(self, model_type, sizes, expected):
        padding = {"pad_token_id": 0} if model_type == "modernbert" else {}
        config = AutoConfig.for_model(model_type, **sizes, vocab_size=60, **padding)
        encoder = AutoModelForMaskedLM.from_config(config) if model_type != "xlnet" else AutoModel.from_config(config)
        model = BottleneckDecoder.for_encoder(encoder, kind="causal", max_length=9, num_layers=2)
        wanted = {"hidden_size": 32, "vocab_size": 60, "num_attention_heads": 2, "num_hidden_layers": 2, **expected}
        assert {name: getattr(model.config, name) for name in wanted} == wanted
        assert model.position_embeddings.weight.shape == (9, 32)
        table = encoder.get_input_embeddings().weight
        ids = torch.arange(18).view(2, 9)
        found = model(torch.randn(2, 32), ids, torch.ones_like(ids), word_table=table, positions=torch.arange(4))
        assert found.shape == (4, 60)

    def test_heads_where_the_encoder_has_none_that_fit(self):
        encoder = AutoModel.from_config(AutoConfig.for_model("bert", **TINY, vocab_size=60))
        for width, own, number in ((32, 2, 2), (192, 5, 3), (200, 7, 2)):
            encoder.config.hidden_size, encoder.config.num_attention_heads = width, own
            model = BottleneckDecoder.for_encoder(encoder, kind="masked", max_length=9)
            assert model.config.num_attention_heads == number
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 64}
        fnet = AutoModel.from_config(AutoConfig.for_model("fnet", **sizes, vocab_size=60))
        assert BottleneckDecoder.for_encoder(fnet, kind="masked", max_length=9).config.num_attention_heads == 2

    @KINDS
    def test_it_is_saved_and_loaded(self, tmp_path, kind):
        source = decoder(kind).float()
        source.save_pretrained(tmp_path / DECODER_FOLDER)
        batch = text(source, dtype=torch.float32)
        other = BottleneckDecoder(source.config).eval()
        assert not torch.allclose(other(**batch), source(**batch))
        assert load_head(other, str(tmp_path), folder=DECODER_FOLDER)
        loaded = BottleneckDecoder.from_pretrained(tmp_path / DECODER_FOLDER).eval()
        assert loaded.config.kind == kind
        for found in (other, loaded):
            assert torch.equal(found(**batch), source(**batch))

    def test_decoders_of_another_kind_are_not_filled(self, tmp_path):
        decoder("masked").save_pretrained(tmp_path / DECODER_FOLDER)
        assert not load_head(decoder("causal"), str(tmp_path), folder=DECODER_FOLDER)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kind": "both"}, "kind='both' must be one of masked, enhanced, causal"),
            ({"kind": "masked", "num_layers": 0}, "num_layers=0 must be a number"),
            ({"kind": "masked", "max_length": 0}, "max_length=0 must be a number"),
            ({"kind": "enhanced"}, "mask_probability=None: kind='enhanced' needs it; 0.5 is usual"),
            ({"kind": "enhanced", "mask_probability": 1.0}, r"mask_probability=1\.0 must be a number"),
            ({"kind": "causal", "mask_probability": 0.5}, r"mask_probability=0\.5 has no effect with kind='causal'"),
        ],
    )
    def test_options(self, options, message):
        encoder = AutoModel.from_config(AutoConfig.for_model("bert", **TINY, vocab_size=60))
        with pytest.raises(InputError, match=message):
            BottleneckDecoder.for_encoder(encoder, **{"max_length": 9} | options)

    def test_an_encoder_without_one_table_of_words(self):
        sizes = {name: value for name, value in TINY.items() if name != "max_position_embeddings"}
        encoder = TransformerXLModel(TransformerXLConfig(**sizes, vocab_size=60, cutoffs=[20, 40], div_val=2))
        with pytest.raises(InputError, match="TransformerXLModel has no single table of words"):
            BottleneckDecoder.for_encoder(encoder, kind="masked", max_length=9)

    def test_batches(self):
        model = decoder("masked")
        with pytest.raises(InputError, match="13 tokens a text, the decoder has 12 positions"):
            model(**text(model, length=13))
        with pytest.raises(InputError, match="decoder_keys=a tensor does not fit a decoder of kind='masked'"):
            model(**text(model), keys=torch.arange(3))
        enhanced = decoder("enhanced")
        with pytest.raises(InputError, match="decoder_keys=None does not fit a decoder of kind='enhanced'"):
            enhanced(**text(enhanced) | {"keys": None})


class TestLearning:
    """Four texts, unlike at every position, and four vectors that say which. What a decoder reads says little."""

    TEXTS = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9], [0, 10, 11, 12]])

    def losses(self, kind, *, shuffled):
        """Nats of a text after training, with its vector and with another's."""
        model = decoder(kind, stir=False, mask_probability=0.9)
        torch.manual_seed(0)
        table, vectors = nn.Parameter(0.1 * torch.randn(VOCAB_SIZE, TABLE_WIDTH)), torch.randn(4, WIDTH)
        optimizer = torch.optim.Adam([*model.parameters(), table], lr=1e-2)
        mask = torch.ones(16, 4, dtype=torch.long)
        shift = 1 if kind == "causal" else 0
        columns = torch.arange(3) + (1 - shift)
        positions = (torch.arange(16)[:, None] * 4 + columns).flatten()

        def loss_of(step, which, said):
            read = self.TEXTS[which]
            if kind == "masked":
                read = torch.where(torch.arange(4) > 0, 20, read)
            keys = torch.from_numpy(draws.row_keys(list(range(16)), seed=0, epoch=step).view(np.int64))
            options = {"keys": keys} if kind == "enhanced" else {}
            logits = model(vectors[said], read, mask, word_table=table, positions=positions, **options)
            return F.cross_entropy(logits, self.TEXTS[which][:, 1:].flatten(), reduction="sum") / 16

        for step in range(200):
            generator = torch.Generator().manual_seed(step)
            which, other = (torch.randint(4, (16,), generator=generator) for _ in range(2))
            loss = loss_of(step, which, other if shuffled else which)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        which = torch.arange(16) % 4
        model.eval()
        with torch.no_grad():
            return [float(loss_of(200, which, said)) for said in (which, (which + 1) % 4)]

    @KINDS
    def test_the_text_is_in_the_vector(self, kind):
        own, other = self.losses(kind, shuffled=False)
        assert own < 0.1 and other > 2

    @KINDS
    def test_a_vector_that_says_nothing_is_of_no_use(self, kind):
        """One of four texts is log 4 = 1.39 nats, once where the tokens before are read, and at nearly every token else."""
        for loss in self.losses(kind, shuffled=True):
            assert loss > (1.2 if kind == "causal" else 2)
