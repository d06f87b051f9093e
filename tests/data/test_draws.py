"""Keyed draws: the generator, keys that no two (seed, epoch, id, stream) share, and what follows from them."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest

from hf_pretrain.corruption.rows import RowKeys
from hf_pretrain.data import draws
from hf_pretrain.data.examples.epochs import EpochSampler, MixtureDataset
from hf_pretrain.data.examples.pairing import PairRule
from hf_pretrain.data.streaming.blocks import ShardSampler
from hf_pretrain.objectives.permutation_lm.scoring import _ranks

ROOT = Path(__file__).parents[2]
MASK = 2**64 - 1
STREAMS = ("", "order", "select", "replace", "sample", "pair_kind", "window 0 0", "window 0 1")
SEEDS = (0, 1, 2, 42, 43, 44)


def mix(number):
    """SplitMix64's output function on a Python integer."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


def test_the_generator_is_splitmix64():
    """The first numbers of the reference implementation for the state 1234567, and our own in Python integers."""
    found = draws.bits(np.array([1234567], dtype=np.uint64), 4)[0].tolist()
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    keys = draws.row_keys([3, -1], seed=5, epoch=2)
    for key, row in zip(keys.tolist(), draws.bits(keys, 6).tolist(), strict=True):
        assert row == [mix(key + step * 0x9E3779B97F4A7C15 & MASK) for step in range(1, 7)]


def test_a_grid_of_seeds_epochs_streams_and_ids_has_no_two_equal_keys():
    seeds = [*range(-5, 45), 2**31 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 1, -(2**63)]
    seeds = sorted({seed % 2**64: seed for seed in seeds}.values())
    epochs, ids = np.arange(50), np.array([0, 1, 2, 49, 2**40, 2**40 + 1])
    grid_ids, grid_epochs = (part.ravel() for part in np.meshgrid(ids, epochs))
    keys = np.concatenate(
        [
            draws.row_keys(grid_ids, seed=seed, epoch=grid_epochs, stream=stream)
            for seed, stream in itertools.product(seeds, STREAMS)
        ]
    )
    assert len(np.unique(keys)) == len(keys) == len(seeds) * len(STREAMS) * 50 * 6


def test_a_key_depends_on_its_own_row_alone():
    ids, epochs = np.array([7, 8, 7]), np.array([0, 3, 1])
    together = draws.row_keys(ids, seed=-3, epoch=epochs, stream="select")
    alone = [
        draws.row_keys([i], seed=-3, epoch=int(e), stream="select").item() for i, e in zip(ids, epochs, strict=True)
    ]
    assert together.tolist() == alone and len(set(alone)) == 3
    assert draws.row_keys([], seed=1).shape == (0,)
    assert draws.row_keys(np.array([7]), seed=np.int64(2)).tolist() == draws.row_keys([7], seed=2).tolist()
    draws.row_keys([7], seed=2)[0] = 0
    assert draws.row_keys([7], seed=2)[0] != 0


@pytest.mark.parametrize("part", ["seed", "epoch", "id", "stream"])
def test_neighbours_agree_in_half_of_their_bits(part):
    """2000 pairs of keys that differ by one in one part: 64 bits each, all of which are as often equal as not."""
    first = np.arange(2000)
    if part == "seed":
        keys = np.concatenate([draws.row_keys([5], seed=seed) for seed in range(2001)])
        pairs = keys[:-1], keys[1:]
    elif part == "epoch":
        pairs = draws.row_keys(first * 0, seed=1, epoch=first), draws.row_keys(first * 0, seed=1, epoch=first + 1)
    elif part == "id":
        pairs = draws.row_keys(first, seed=1), draws.row_keys(first + 1, seed=1)
    else:
        pairs = draws.row_keys(first, seed=1, stream="a"), draws.row_keys(first, seed=1, stream="b")
    unequal = np.unpackbits((pairs[0] ^ pairs[1]).view(np.uint8)).reshape(2000, 64).mean(axis=0)
    # Five standard deviations.
    assert np.abs(unequal - 0.5).max() < 5 * 0.5 / 2000**0.5


def test_uniforms_of_all_seeds_and_epochs_are_uniform_and_uncorrelated():
    rows = np.stack(
        [
            draws.uniforms(draws.row_keys([0], seed=seed, epoch=epoch), 500)[0]
            for seed in range(8)
            for epoch in range(8)
        ]
    )
    counts = np.histogram(rows, bins=20, range=(0, 1))[0]
    expected = rows.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # 19 degrees of freedom: one in 10,000 exceeds 49.6
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(correlations).max() < 5.5 / 500**0.5


def order(seed, epoch):
    sampler = EpochSampler(200, seed=seed)
    sampler.set_epoch(epoch)
    return [index % 2**40 for index in sampler]


def masks(stream):
    def of(seed, epoch):
        examples = [{"example_id": row, "epoch": epoch} for row in range(4)]
        return RowKeys.from_examples(examples, seed=seed).bits(stream, length=16)

    return of


def mixture(seed, epoch):
    parts = {"a": [{}] * 60, "b": [{}] * 60}
    mixed = MixtureDataset(parts, shares={"a": 1.0, "b": 1.0}, seed=seed)
    return mixed._order(epoch).parts


CHOICES = {
    "order": order,
    "order of a part": lambda seed, epoch: MixtureDataset({"a": [{}] * 60}, shares={"a": 1.0}, seed=seed)._rows(
        "a", epoch
    ),
    "mixture": mixture,
    "select": masks("select"),
    "replace": masks("replace"),
    "sample": masks("sample"),
    "pairs": lambda seed, epoch: PairRule("nsp", 64, seed=seed).targets(np.arange(400), epoch=epoch),
    "shards": lambda seed, epoch: ShardSampler(50, seed=seed).order(epoch),
    "factorisation orders": lambda seed, epoch: _ranks("random", 3, 40, number=epoch, seed=seed),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_neighbouring_seeds_share_no_epoch(choice):
    """Ten epochs of six seeds are sixty different runs through the data."""
    found = [np.asarray(CHOICES[choice](seed, epoch)) for seed in SEEDS for epoch in range(10)]
    assert len({values.tobytes() for values in found}) == 60
    again = CHOICES[choice](SEEDS[1], 3)
    assert np.array_equal(again, found[13])


def test_permutations_are_permutations_of_equal_chances():
    counts = np.zeros((5, 5))
    for seed, epoch in itertools.product(range(40), range(50)):
        drawn = draws.permutation(5, seed=seed, epoch=epoch)
        assert sorted(drawn.tolist()) == list(range(5))
        counts[np.arange(5), drawn] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 5 * (0.2 * 0.8 / 2000) ** 0.5


def test_generators_of_neighbouring_ranks_and_seeds_are_seeded_apart():
    seeds = {(s, n): draws.generator_seed(n, seed=s, stream="dropout") for s in range(50) for n in range(64)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    # torch's generator on a CPU takes the lower half alone.
    assert len({seed % 2**32 for seed in seeds.values()}) == len(seeds)
    assert draws.generator_seed(0, seed=0, stream="dropout") != draws.generator_seed(0, seed=0, stream="weights")


def test_nobody_computes_a_seed_from_another():
    """A sum of a seed and a number is the seed of another run: such seeds come from `generator_seed`."""
    found = []
    for folder in ("hf_pretrain", "trainers", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [ast.unparse(side) for side in (node.left, node.right)] if isinstance(node, ast.BinOp) else []
                if path.name != "draws.py" and any(name.rpartition(".")[2].endswith("seed") for name in names):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found
