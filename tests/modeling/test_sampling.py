"""The sampler against the distribution that it is to draw from."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from hf_pretrain.data import draws
from hf_pretrain.modeling.losses import sample_tokens

LARGEST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def uniforms(count, *, stream):
    """Keyed fp32 uniforms with 24 bits, as the collator makes them."""
    bits = draws.bits(draws.row_keys([0], seed=11, stream=stream), count)[0]
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def sample_many(logits_V, count, *, stream, rows=5000, **options):
    """Draw from one distribution, a slice at a time."""
    parts = uniforms(count, stream=stream).split(rows)
    return torch.cat([sample_tokens(logits_V.expand(len(part), -1), part, **options) for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_calibration_over_many_distributions(dtype):
    """The number of hits of a given token is the sum of its probabilities, up to chance."""
    rows, vocab_size = 120_000, 64
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
    # Half of the tokens that are looked for are the likeliest, half are any.
    chosen = torch.randint(vocab_size, (rows,), generator=generator)
    chosen[::2] = logits[::2].argmax(-1)
    p = logits.double().softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        hits = sample_tokens(logits, uniforms(rows, stream="calibration")) == chosen
    z = (hits.sum() - p.sum()) / (p * (1 - p)).sum().sqrt()
    assert abs(float(z)) < 4
    bottom = p < 0.02
    z = (hits[bottom].sum() - p[bottom].sum()) / (p * (1 - p))[bottom].sum().sqrt()
    assert abs(float(z)) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_the_mass_is_drawn_half_the_time(dtype):
    """Gumbel noise in bf16 draws this argmax 997 times out of 1000."""
    logits = torch.zeros(2000, dtype=dtype)
    logits[777] = math.log(1999)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        drawn = sample_many(logits, 40_000, stream="half")
    assert float((drawn == 777).double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_drawn_at_its_rate(dtype):
    """Running sums in bf16 would give nothing to half of the rare tokens."""
    logits = torch.linspace(-3, 3, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(2))].to(dtype)
    excluded = torch.zeros(60, dtype=torch.bool)
    excluded[[0, 17, 59]] = True
    counts = sample_many(logits, 300_000, stream="rates", excluded=excluded).bincount(minlength=60)
    expected = logits.double().exp() * ~excluded
    expected *= counts.sum() / expected.sum()
    assert counts[excluded].sum() == 0
    assert chisquare(counts[~excluded].numpy(), expected[~excluded].numpy()).pvalue > 1e-3


def test_rates_in_a_vocabulary_of_several_blocks():
    """700 tokens are two whole blocks and a part of one; the last of a block and the first of the next are likely."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(8))
    logits[[0, 255, 256, 511, 512, 699]] += 3
    counts = sample_many(logits, 200_000, stream="blocks").bincount(minlength=700)
    expected = 200_000 * logits.double().softmax(-1)
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_tokens_are_drawn_in_the_order_of_the_vocabulary():
    """The inverse of the cumulative distribution: a greater uniform gives a later token, each as often as is its mass."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(9)).double()
    u = (torch.arange(20_000) / 20_000 + 1e-5).float()
    drawn = sample_tokens(logits.float().expand(len(u), -1), u)
    assert (drawn.diff() >= 0).all()
    expected = torch.searchsorted(logits.softmax(-1).cumsum(-1), u.double(), right=True)
    assert float((drawn != expected).double().mean()) < 5e-4


def test_rows_that_do_not_fit_the_cache_together_are_drawn_like_one(monkeypatch):
    logits, u = torch.randn(50, 300, generator=torch.Generator().manual_seed(10)), uniforms(50, stream="parts")
    barred = logits.argmax(-1)
    whole = sample_tokens(logits, u, disallowed=barred)
    for cached in (7 * 300, 1):
        monkeypatch.setattr("hf_pretrain.modeling.losses._CACHED_LOGITS", cached)
        assert torch.equal(sample_tokens(logits, u, disallowed=barred), whole)


def test_low_temperature_draws_the_argmax():
    logits = torch.randn(2000, 60, generator=torch.Generator().manual_seed(3))
    drawn = sample_tokens(logits, uniforms(2000, stream="cold"), temperature=1e-4)
    assert torch.equal(drawn, logits.argmax(-1))


def test_high_temperature_draws_all_tokens_alike():
    counts = sample_many(50 * torch.randn(100), 200_000, stream="hot", temperature=1e6).bincount(minlength=100)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_temperature_divides_the_logits():
    logits = torch.tensor([0.0, 2.0])
    drawn = sample_many(logits, 100_000, stream="warm", temperature=2.0)
    assert float(drawn.double().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.006)
    assert torch.equal(drawn, sample_many(logits, 100_000, stream="warm", temperature=torch.tensor(2.0)))


class TestDisallowed:
    """The true token of each row is not drawn there, however likely it is."""

    @pytest.mark.parametrize("temperature", [1e-4, 1.0, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_never_drawn(self, temperature, dtype):
        logits = torch.randn(50_000, 40, generator=torch.Generator().manual_seed(11)).to(dtype)
        correct = torch.randint(40, (50_000,), generator=torch.Generator().manual_seed(12))
        logits[torch.arange(0, 50_000, 2), correct[::2]] += 30
        original = logits.clone()
        drawn = sample_tokens(logits, uniforms(50_000, stream="barred"), temperature=temperature, disallowed=correct)
        assert not (drawn == correct).any()
        assert torch.equal(logits, original), "the loss still needs the logits"
        if temperature < 1:
            best = logits.scatter(1, correct[:, None], -torch.inf).amax(-1)
            assert (best - logits.gather(1, drawn[:, None])[:, 0] < 0.01).all()

    def test_its_mass_goes_to_the_others_in_proportion(self):
        logits = torch.tensor([1.0, 9.0, 0.0, 2.0, -1.0, 5.0])
        excluded = torch.tensor([False, False, False, False, False, True])
        barred = torch.ones(100_000, dtype=torch.int64)
        drawn = sample_tokens(
            logits.expand(100_000, -1), uniforms(100_000, stream="mass"), disallowed=barred, excluded=excluded
        )
        counts = drawn.bincount(minlength=6)
        assert counts[1] == counts[5] == 0
        others = [0, 2, 3, 4]
        expected = 100_000 * logits[others].double().softmax(-1)
        assert chisquare(counts[others].numpy(), expected.numpy()).pvalue > 1e-3


class TestExcluded:
    """Tokens that must never be drawn, at the ends and in the middle, and likelier than all others."""

    EXCLUDED = (0, 1, 2, 30, 31, 58, 59)

    @pytest.fixture
    def excluded(self):
        excluded = torch.zeros(60, dtype=torch.bool)
        excluded[list(self.EXCLUDED)] = True
        return excluded

    def test_never_in_a_million_draws(self, excluded):
        logits = torch.randn(60, generator=torch.Generator().manual_seed(4)) + 20 * excluded
        drawn = sample_many(logits, 1_000_000, stream="excluded", excluded=excluded)
        assert not excluded[drawn].any()
        assert len(drawn.unique()) == 60 - len(self.EXCLUDED)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
    def test_never_at_the_ends_of_the_uniforms(self, excluded, scale):
        logits = scale * torch.randn(4000, 60, generator=torch.Generator().manual_seed(5))
        for uniform in (0.0, 2.0**-24, LARGEST_BELOW_ONE):
            drawn = sample_tokens(logits, torch.full((4000,), uniform), excluded=excluded)
            assert drawn.min() >= 3 and drawn.max() <= 57
            assert not excluded[drawn].any()
            if scale <= 1:  # each token has some mass
                assert set(drawn.tolist()) <= ({57} if uniform == LARGEST_BELOW_ONE else {3})

    def test_never_where_the_running_sum_is_not_monotonic(self, monkeypatch):
        """A parallel scan, as on a GPU, adds in another order at each position, so the sum may step at a mass of zero."""

        def parallel_scan(values, dim):
            assert dim in (-1, values.ndim - 1)
            step, values = 1, values.clone()
            while step < values.shape[-1]:
                values[..., step:] = values[..., step:] + values[..., :-step]
                step *= 2
            return values

        monkeypatch.setattr(torch.Tensor, "cumsum", parallel_scan)
        monkeypatch.setattr(torch, "cumsum", parallel_scan)
        generator = torch.Generator().manual_seed(6)
        logits, excluded = torch.randn(1024, generator=generator), torch.rand(1024, generator=generator) < 0.5
        # The uniforms that fall on such a step are few: aim at them.
        scan = parallel_scan(logits.masked_fill(excluded, -torch.inf).softmax(-1), -1)
        aimed = torch.cat([scan / scan[-1] + shift for shift in (-(2.0**-24), 0, 2.0**-24)])
        drawn = sample_tokens(logits.expand(len(aimed), -1), aimed.clamp(0, LARGEST_BELOW_ONE), excluded=excluded)
        assert not excluded[drawn].any()


def test_a_draw_depends_on_its_own_row_only():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(7))
    together = sample_tokens(logits, uniforms(50, stream="rows"))
    alone = torch.cat([sample_tokens(logits[i : i + 1], uniforms(50, stream="rows")[i : i + 1]) for i in range(50)])
    assert torch.equal(together, alone)


def test_samples_are_ids_without_a_graph():
    drawn = sample_tokens(torch.randn(3, 5, requires_grad=True), torch.rand(3))
    assert drawn.shape == (3,) and drawn.dtype == torch.int64 and not drawn.requires_grad
    assert sample_tokens(torch.zeros(0, 5), torch.zeros(0)).shape == (0,)
