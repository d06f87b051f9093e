"""Removing near-duplicates: what is found against exact Jaccard similarities, how fast, and in how much memory.

Run ``python benchmarks/near_duplicates.py``; no network is needed. The corpus is synthetic: documents of random words, and
copies of some in which so many words were changed that their exact similarity is one of several. The first table says for each
similarity which share of its copies was removed; a perfect comparison removes all from the threshold on and none below. The
second table compares what a document costs: reading files, comparing and writing; comparing alone; and, where datasketch is
installed, its MinHash and MinHashLSH on the same shingles with the same bands, each candidate verified as ours are. Memory
is the rise of ru_maxrss in a forked child, and per document its growth from the first half of the corpus to all of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hf_pretrain.curation.deduplication import deduplicate_files
from hf_pretrain.curation.near_duplicates import Deduplicator, jaccard, normalized, num_bands, shingle_hashes
from hf_pretrain.data import draws
from timing import interleaved, options_parser, peak_memory, print_table

SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.78, 0.82, 0.85, 0.9, 0.95)
GROUP = 200
FILES, COMPARE, DATASKETCH = "files to files", "comparing", "comparing, datasketch"


def synthetic_documents(count: int, num_words: int) -> list[str]:
    """Return keyed documents of words whose frequencies fall."""
    keys = draws.row_keys(np.arange(count), seed=0, stream="synthetic documents")
    vocabulary = np.array([f"w{np.base_repr(k, 36).lower()}" for k in range(50_000)])
    return [" ".join(vocabulary[(draws.uniforms(key, num_words) ** 3 * 50_000).astype(np.int64)]) for key in keys]


def changed(text: str, similarity: float, *, size: int) -> str:
    """Return a copy of about such a similarity: each changed word takes away as many shingles as a shingle has words."""
    words = text.split()
    shingles = len(words) - size + 1
    num_changes = round(shingles * (1 - similarity) / (1 + similarity) / size)
    for position in np.linspace(size, len(words) - size, num_changes, dtype=np.int64).tolist():
        words[position] = f"changed{position}"
    return " ".join(words)


def print_shares(options: argparse.Namespace) -> None:
    """Print which share of the copies of each similarity is removed, and precision and recall over all of them."""
    originals = synthetic_documents(options.num_pairs, options.pair_words)
    rows, hits, removed_in_all, similar_in_all = [], 0, 0, 0
    for similarity in SIMILARITIES:
        copies = [changed(text, similarity, size=options.shingle_size) for text in originals]
        exact = np.array([jaccard(*pair, size=options.shingle_size) for pair in zip(originals, copies, strict=True)])
        removed = np.array([match.kind != "kept" for match in compare(options, [*originals, *copies])[len(copies) :]])
        is_similar = exact >= options.similarity_threshold
        hits += int((removed & is_similar).sum())
        removed_in_all += int(removed.sum())
        similar_in_all += int(is_similar.sum())
        rows.append([f"{exact.min():.3f} to {exact.max():.3f}", float(is_similar.mean()), float(removed.mean())])
    print_table(rows, ["exact similarity", "to remove", "removed"])
    print(f"precision {hits / max(removed_in_all, 1):.3f}, recall {hits / max(similar_in_all, 1):.3f}\n")


def compare(options: argparse.Namespace, texts: Sequence[str]) -> list:
    """Return our matches."""
    deduplicator = _deduplicator(options)
    return [match for group in groups(texts) for match in deduplicator.compare(group)]


def groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield neighbouring texts together."""
    return (texts[low : low + GROUP] for low in range(0, len(texts), GROUP))


def _deduplicator(options: argparse.Namespace) -> Deduplicator:
    names = ("similarity_threshold", "shingle_size", "num_permutations")
    return Deduplicator(**{name: getattr(options, name) for name in names})


def compare_with_datasketch(options: argparse.Namespace, texts: Sequence[str]) -> int:
    """Return how many texts datasketch keeps."""
    from datasketch import MinHash, MinHashLSH

    bands = num_bands(options.similarity_threshold, options.num_permutations)
    params = (bands, options.num_permutations // bands)
    index = MinHashLSH(num_perm=options.num_permutations, params=params)
    empty = MinHash(options.num_permutations, hashfunc=int)
    kept: dict[int, MinHash] = {}
    for group in groups(texts):
        hashes, bounds = shingle_hashes([normalized(text) for text in group], size=options.shingle_size)
        short_hashes = (hashes >> np.uint64(32)).tolist()
        for low, high in zip(bounds[:-1], bounds[1:], strict=True):
            sketch = empty.copy()
            sketch.update_batch(short_hashes[low:high])
            if all(sketch.jaccard(kept[key]) < options.similarity_threshold for key in index.query(sketch)):
                key = len(kept)
                kept[key] = sketch
                index.insert(key, sketch)
    return len(kept)


def clean_files(options: argparse.Namespace, path: Path) -> None:
    """Read a file and write what is kept to a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("similarity_threshold", "shingle_size", "num_permutations")
        deduplicate_files(path, output_dir=folder, **{name: getattr(options, name) for name in names})


def make_sides(options: argparse.Namespace, texts: Sequence[str], path: Path) -> dict[str, Callable[[], object]]:
    """Return by name what is measured."""
    sides: dict[str, Callable[[], object]] = {FILES: partial(clean_files, options, path)}
    sides[COMPARE] = partial(compare, options, texts)
    if find_spec("datasketch") is not None:
        sides[DATASKETCH] = partial(compare_with_datasketch, options, texts)
    return sides


def print_costs(options: argparse.Namespace, folder: Path) -> None:
    """Print time and memory of each side."""
    texts = synthetic_documents(options.num_documents, options.num_words)
    texts[5::10] = [changed(text, 0.9, size=options.shingle_size) for text in texts[::10][: len(texts[5::10])]]
    halves = texts[: len(texts) // 2]
    paths = {"all": folder / "all.txt", "half": folder / "half.txt"}
    for path, part in zip(paths.values(), (texts, halves), strict=True):
        path.write_text("\n\n".join(part), encoding="utf-8")
    sides = make_sides(options, texts, paths["all"])
    smaller = make_sides(options, halves, paths["half"])
    memory = {name: (peak_memory(side), peak_memory(smaller[name])) for name, side in sides.items()}
    seconds = interleaved(sides, options.repeats)
    num_bytes = sum(len(text) for text in texts)
    rows = [
        [
            name,
            seconds[name],
            len(texts) / seconds[name],
            num_bytes / seconds[name] / 1e6,
            seconds[name] / seconds[COMPARE],
            memory[name][0],
            (memory[name][0] - memory[name][1]) * 2**20 / (len(texts) - len(halves)),
        ]
        for name in sides
    ]
    print(f"{len(texts)} documents, {num_bytes / 1e6:.1f} MB; best of {options.repeats}, in turn")
    print_table(rows, ["side", "s", "documents/s", "MB/s", "ratio", "memory, MiB", "bytes a document"])


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, similarity_threshold=0.8, shingle_size=5, num_permutations=128, repeats=3)
    parser.add_argument("--num_documents", type=int, default=5_000, help="documents whose cost is measured")
    parser.add_argument("--num_words", type=int, default=200, help="words in each of them")
    parser.add_argument("--num_pairs", type=int, default=200, help="documents and copies of each similarity")
    parser.add_argument("--pair_words", type=int, default=1_000, help="words in each of them")
    options = parser.parse_args()
    print_shares(options)
    with tempfile.TemporaryDirectory() as folder:
        print_costs(options, Path(folder))


if __name__ == "__main__":
    main()
