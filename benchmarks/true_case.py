"""What do frozen vectors of words in their context know? A probe says which words of lower-cased text had a capital.

    python benchmarks/true_case.py --elmo my-elmo --vectors my-vectors --text_file held-out.txt [--sentences 2500]

The text is cut into sentences of 5 to 40 words, and lower-cased. The first word of a sentence does not count. A logistic
regression reads the vector of each other word: of an ELMo of lower-cased text, the layers side by side and each alone, and of
word vectors, the word's own vector with those of the words before and after it, or alone. A word without a vector has zeros.
Three quarters of the sentences train the probe. The table has the Matthews correlation and the share of right answers on the
others.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hf_pretrain import WordVectors, probe_accuracy
from hf_pretrain.data import draws
from timing import print_table

_WORD = re.compile(r"\w+|[^\w\s]")


def sentences_of(path: Path, number: int) -> list[list[str]]:
    """Return some sentences of a text as words, in a keyed order."""
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
    found = [_WORD.findall(part) for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)]
    found = [words for words in found if 5 <= len(words) <= 40]
    return [found[row] for row in draws.permutation(len(found), seed=0, stream="sentences")[:number]]


def elmo_features(folder: str, sentences: list[list[str]]) -> dict[str, list[np.ndarray]]:
    """Return the vectors ``[T, D]`` of each sentence, by what they are of."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[np.ndarray]] = {}
    for words in sentences:
        inputs = tokenizer([[word.lower() for word in words]], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            layers = [layer[0, 1 : len(words) + 1].numpy() for layer in model(**inputs).hidden_states]
        assert len(layers[0]) == len(words)
        named = {f"ELMo, layer {number}": layer for number, layer in enumerate(layers)}
        for name, value in {"ELMo, all layers": np.concatenate(layers, axis=1), **named}.items():
            found.setdefault(name, []).append(value)
    return found


def static_features(folder: str, sentences: list[list[str]]) -> dict[str, list[np.ndarray]]:
    """Return the vectors of each word, alone and with those of its neighbours."""
    vectors = WordVectors.open(folder)
    rows = dict(zip(vectors.words, vectors.vectors, strict=True))
    zeros = np.zeros(vectors.vectors.shape[1], dtype=np.float32)
    alone = [np.stack([rows.get(word.lower(), zeros) for word in words]) for words in sentences]
    padded = [np.pad(part, ((1, 1), (0, 0))) for part in alone]
    return {
        "word vectors": alone,
        "word vectors, with both neighbours": [np.concatenate([p[:-2], p[1:-1], p[2:]], axis=1) for p in padded],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elmo", required=True, help="folder of an ELMo of lower-cased text")
    parser.add_argument("--vectors", required=True, help="folder of word vectors of the same text")
    parser.add_argument("--text_file", required=True, help="text that neither has read")
    parser.add_argument("--sentences", type=int, default=2500, help="sentences of the probe")
    args = parser.parse_args()
    sentences = sentences_of(Path(args.text_file), args.sentences)
    labels = [[int(word[0].isupper()) for word in words][1:] for words in sentences]
    train = len(sentences) * 3 // 4
    both = [np.concatenate(part) for part in (labels[:train], labels[train:])]
    rows = []
    features = elmo_features(args.elmo, sentences) | static_features(args.vectors, sentences)
    for name, parts in features.items():
        inner = [part[1:] for part in parts]
        score = probe_accuracy(np.concatenate(inner[:train]), both[0], np.concatenate(inner[train:]), both[1])
        rows.append([name, f"{100 * score.matthews_correlation:.1f}", f"{100 * score.accuracy:.1f}"])
    rows.append(["no capital", "0.0", f"{100 * (1 - both[1].mean()):.1f}"])
    print(f"{train} sentences to train, {len(sentences) - train} to test, {len(both[1])} words of them\n")
    print_table(rows, ["vectors", "Matthews correlation", "accuracy"])


if __name__ == "__main__":
    main()
