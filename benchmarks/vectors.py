"""Every way to make static vectors on one text: how fast, and how good at similarity, analogies, sentences and a probe.

    python benchmarks/vectors.py --data_dir data [--arm ppmi skipgram] [--epochs 3]
    python benchmarks/vectors.py --table

    onehot, counts, tfidf    a number for each word of a sentence, no vector of a word
    cooccurrence, ppmi, lsa  tables of counts, factorized
    cbow, cbow_word2vec      word2vec, with the gradient of the mean and with the one of the published program
    skipgram, hierarchical   word2vec, with negative samples (shared by the neighbours of a word) and with a tree
    glove                    GloVe
    gensim_skipgram, gensim_cbow   gensim's word2vec on the same words, if it is installed
    distil                   the tokens of the encoder that `encoder` names, each read alone
    encoder                  that encoder itself: means of its last states
    elmo                     the frozen ELMo that `elmo` names: means of its layers, mixed by weights that SST-2 teaches

All arms but the last three read the words of one corpus, built once and timed by itself. Words a second are those of the text,
unknown ones included, by the passes over it. WordSim-353 and SimLex-999 are rank correlations of cosines, of pairs of known
words. Analogies are answered by 3CosAdd among the 30 000 most frequent words. STS-B is the rank correlation of the cosines
of two sentences, each the mean of its words. SST-2 is the accuracy of a logistic regression on such means.

The folder `data_dir` holds wordsim/, stsb/, sst2/ and books/train.txt.xz, unless `train_file` names other text. Each run is a row
of the file `results`; what is there is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from hf_pretrain import ScalarMix
from hf_pretrain.commands.vectors import VectorArguments, make
from hf_pretrain.evaluation.probes import encode, probe_accuracy
from hf_pretrain.evaluation.similarity import read_scored_pairs, similarity_correlation
from hf_pretrain.evaluation.words import analogy_accuracy, word_similarity
from hf_pretrain.options import option
from hf_pretrain.vectors.corpus import WordCorpus
from hf_pretrain.vectors.folder import WordVectors
from hf_pretrain.vectors.text_vectors import SparseTextVectorizer
from results import Column, ComparisonArguments, compare_arms, read_rows

SPARSE = ("onehot", "counts", "tfidf")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in (*SPARSE, "cooccurrence", "ppmi", "lsa", "skipgram", "cbow", "glove")},
    "cbow_word2vec": {"method": "cbow", "cbow_gradient": "word2vec"},
    "hierarchical": {"method": "skipgram", "hierarchical": True},
}
GENSIM = ("gensim_skipgram", "gensim_cbow")
ENCODER = ("distil", "encoder")
ARMS = (*OPTIONS, *GENSIM, *ENCODER, "elmo")
"""All arms."""
_MIX_STEPS = 300

Sentences = Callable[[list[str]], Any]


@dataclass
class TableArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("vectors.json", "File that each run adds a row to.")
    dimensions: int = option(100, "Width of the vectors.")
    min_count: int = option(5, "Words that occur less often are left out.")
    epochs: int = option(3, "Passes of word2vec over the text; GloVe passes five times as often over its counts.")
    threads: int = option(1, "Threads of word2vec, ours and gensim's.")
    encoder: str = option("", "Folder of an encoder, for distil and encoder.")
    elmo: str = option("", "Folder of an ELMo.")
    seed: list[int] = option(factory=lambda: [0], help="Seeds; each arm runs with each.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        if not self.train_file and not self.table:
            self.train_file = [str(Path(self.data_dir, "books", "train.txt.xz"))]
        super().__post_init__()
        missing = (*(() if self.encoder else ENCODER), *(() if self.elmo else ("elmo",)))
        self.arm = [arm for arm in self.arm if arm not in missing]


def options_of(arm: str, seed: int, args: TableArguments, folder: Path) -> VectorArguments:
    """Return the options of an arm as the program has them."""
    method = OPTIONS.get(arm, {}).get("method", arm)
    options: dict[str, Any] = {"method": method, "output_dir": str(folder), "seed": seed}
    if arm == "distil":
        return VectorArguments(**options, model_name_or_path=args.encoder, dimensions=args.dimensions)
    options |= {"train_file": args.train_file, "min_count": args.min_count}
    if arm not in SPARSE:
        options["dimensions"] = args.dimensions
    if method in ("skipgram", "cbow"):
        options |= {"epochs": args.epochs, "threads": args.threads}
    if method == "glove":
        options["epochs"] = 5 * args.epochs
    return VectorArguments(**options | OPTIONS[arm])


def shared_corpus(args: TableArguments, folder: Path) -> WordCorpus:
    """Return the corpus that all arms read; the first run builds it."""
    path = folder / "corpus"
    if not path.exists():
        reading = options_of("ppmi", 0, args, folder)
        begin = time.perf_counter()
        WordCorpus.build(reading.texts, folder=path, min_count=args.min_count)
        print(f"corpus in {time.perf_counter() - begin:.1f} s")
    return WordCorpus.open(path)


def train_gensim(arm: str, seed: int, args: TableArguments, corpus: WordCorpus) -> WordVectors:
    """Train gensim's vectors on the known words, line by line."""
    from gensim.models import Word2Vec

    words, bounds = np.array(corpus.vocabulary.words, dtype=object), corpus.lines
    lines = [words[corpus.tokens[a:b]].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    is_skipgram = arm.endswith("skipgram")
    model = Word2Vec(
        lines,
        vector_size=args.dimensions,
        sg=int(is_skipgram),
        alpha=0.025 if is_skipgram else 0.05,
        workers=args.threads,
        min_count=1,
        epochs=args.epochs,
        seed=seed,
    )
    order = [model.wv.key_to_index[word] for word in corpus.vocabulary.words]
    return WordVectors(
        corpus.vocabulary.words, model.wv.vectors[order], corpus.vocabulary.counts, None, corpus.tokenizer
    )


def means(vectors: WordVectors, texts: list[str]) -> np.ndarray:
    """Return the mean of the vectors of each text's words, `[N, D]`; zeros where none is known."""
    tokenizer = vectors.tokenizer
    assert tokenizer is not None, "the corpus has one"
    table = np.zeros((tokenizer.get_vocab_size(), vectors.vectors.shape[1]), dtype=np.float32)
    for word, row in zip(vectors.words, vectors.vectors, strict=True):
        table[tokenizer.token_to_id(word)] = row
    found = np.zeros((len(texts), table.shape[1]), dtype=np.float32)
    for number, encoding in enumerate(tokenizer.encode_batch(texts)):
        rows = table[encoding.ids]
        known = rows.any(axis=1)
        if known.any():
            found[number] = rows[known].mean(axis=0)
    return found


@cache
def tasks(data_dir: str) -> tuple[Any, dict[str, tuple[list[str], list[int]]]]:
    """Return the scored pairs of STS-B, and the sentences and classes of SST-2 by split."""
    splits = {}
    for split in ("train", "dev"):
        rows = read_rows(data_dir, "sst2", split)
        splits[split] = rows[0].tolist(), rows[1].astype(int).tolist()
    return read_scored_pairs(Path(data_dir, "stsb", "test.csv")), splits


def judge_sentences(sentences: Sentences, args: TableArguments) -> dict[str, float]:
    """Measure vectors of sentences, dense or sparse."""
    pairs, sst2 = tasks(args.data_dir)
    first, second = sentences(pairs.first), sentences(pairs.second)
    features, tests = (sentences(sst2[split][0]) for split in ("train", "dev"))
    if sparse.issparse(first):
        lengths = [sparse.linalg.norm(side, axis=1) for side in (first, second)]
        cosines = np.asarray(first.multiply(second).sum(axis=1)).ravel() / np.maximum(np.prod(lengths, axis=0), 1e-12)
        probe = LogisticRegression(max_iter=2000).fit(features, sst2["train"][1])
        return {"stsb": float(spearmanr(cosines, pairs.scores)[0]), "sst2": probe.score(tests, sst2["dev"][1])}
    score = probe_accuracy(features, sst2["train"][1], tests, sst2["dev"][1])
    return {"stsb": similarity_correlation(first, second, pairs.scores), "sst2": score.accuracy}


def mixed_layers(folder: str, args: TableArguments) -> Sentences:
    """Return means of the layers of a frozen ELMo, in the mix that a linear classifier of SST-2's training sentences learns."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    layers = tuple(range(model.config.num_hidden_layers + 1))
    texts, labels = tasks(args.data_dir)[1]["train"]
    found = torch.from_numpy(encode(model, tokenizer, texts, layer=layers))
    parts, targets = found.unsqueeze(1).chunk(len(layers), dim=-1), torch.tensor(labels, dtype=torch.float32)
    torch.manual_seed(0)
    mix, head = ScalarMix(len(layers)), torch.nn.Linear(parts[0].shape[-1], 1)
    optimizer = torch.optim.Adam([*mix.parameters(), *head.parameters()], lr=0.05, weight_decay=1e-4)
    for _ in range(_MIX_STEPS):
        optimizer.zero_grad()
        logits = head(mix(parts))[:, 0, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()
    weights = (mix.gamma * mix.weights.softmax(0)).tolist()
    print("weights of the layers:", *(f"{weight:.3f}" for weight in weights))
    return lambda texts: encode(model, tokenizer, texts, layer=layers, combination=weights)


def judge_words(vectors: WordVectors, args: TableArguments) -> dict[str, Any]:
    """Measure vectors of words."""
    folder = Path(args.data_dir, "wordsim")
    found: dict[str, Any] = {}
    for name, file in (("ws353", "wordsim353.tsv"), ("simlex", "simlex999.txt")):
        result = word_similarity(vectors, folder / file)
        found |= {name: result.correlation, f"{name}_pairs": result.pairs}
    answers = analogy_accuracy(vectors, folder / "questions-words.txt")
    known = {"analogies": answers.total.accuracy, "semantic": answers.semantic.accuracy}
    return found | known | {"answered": answers.total.answered / answers.total.total, "candidates": answers.candidates}


def run_arm(arm: str, seed: int, args: TableArguments) -> dict[str, Any]:
    """Make the vectors of an arm and judge them."""
    folder = args.runs_folder() / f"{arm}-{seed}"
    if arm == "encoder":
        model, tokenizer = AutoModel.from_pretrained(args.encoder), AutoTokenizer.from_pretrained(args.encoder)
        size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
        return judge_sentences(lambda texts: encode(model, tokenizer, texts), args) | {"megabytes": size}
    if arm == "elmo":
        return judge_sentences(mixed_layers(args.elmo, args), args)
    corpus = shared_corpus(args, args.runs_folder())
    work = folder / "work"
    begin = time.perf_counter()
    if arm in GENSIM:
        trained = train_gensim(arm, seed, args, corpus)
        seconds = time.perf_counter() - begin
        vectors: WordVectors | None = trained
        size = trained.vectors.nbytes / 1e6
    else:
        work.mkdir(parents=True, exist_ok=True)
        if arm not in (*SPARSE, *ENCODER) and not (work / "corpus").exists():
            (work / "corpus").symlink_to((args.runs_folder() / "corpus").resolve())
        made = make(options_of(arm, seed, args, folder), work)
        seconds = time.perf_counter() - begin
        made.save(folder / "model")
        size = sum(path.stat().st_size for path in (folder / "model").rglob("*") if path.is_file()) / 1e6
        vectors = made.vectors
    row: dict[str, Any] = {"seconds": seconds, "megabytes": size}
    if arm in ("skipgram", "cbow", "cbow_word2vec", "hierarchical", *GENSIM):
        row["words_per_second"] = args.epochs * corpus.vocabulary.total / seconds
    elif arm not in ENCODER:
        row["words_per_second"] = corpus.vocabulary.total / seconds
    if vectors is None:
        vectorizer = SparseTextVectorizer.from_pretrained(folder / "model")
        return row | judge_sentences(vectorizer.transform, args)
    row |= judge_sentences(lambda texts: means(vectors, texts), args)
    return row | (judge_words(vectors, args) if arm != "distil" else {})


COLUMNS = (
    Column("WS353", "ws353", 1, 3),
    Column("SimLex", "simlex", 1, 3),
    Column("analogies", "analogies", 1, 3),
    Column("semantic", "semantic", 1, 3),
    Column("answered", "answered", 1, 2),
    Column("STS-B", "stsb", 1, 3),
    Column("SST-2", "sst2", 1, 3),
    Column("k words/s", "words_per_second", 1e-3, 0),
    Column("seconds", "seconds", 1, 1),
    Column("MB", "megabytes", 1, 1),
)


if __name__ == "__main__":
    compare_arms(TableArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
