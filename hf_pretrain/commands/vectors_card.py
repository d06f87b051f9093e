"""The card of vectors: how they were made, what was measured, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_pretrain.evaluation.words import nearest_neighbours, plot_words
from hf_pretrain.hub.card import write_card
from hf_pretrain.hub.environment import Compute, hardware, versions
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.hub.plots import PLOTS_FOLDER
from hf_pretrain.hub.record import ObjectiveDescription, PretrainingCard, cite
from hf_pretrain.hub.text import cell

if TYPE_CHECKING:
    from hf_pretrain.commands.vectors import Made, VectorArguments
    from hf_pretrain.vectors.folder import WordVectors

_PICTURE, _LEAST_IN_PICTURE = f"{PLOTS_FOLDER}/words.svg", 3
# "man is to king as woman is to ...": the card asks those whose words are known.
_QUESTIONS = (
    *(("man", "king", "woman"), ("he", "his", "she"), ("walk", "walked", "see"), ("good", "better", "bad")),
    *(("mann", "könig", "frau"), ("homme", "roi", "femme"), ("hombre", "rey", "mujer")),
)
_COUNTED = "How often words stand near each other is counted"
_DESCRIPTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "onehot": ("One-hot words", "A text has a 1 for each word that it holds.", ()),
    "counts": ("Counts of words", "A text has for each word how often it holds it.", ()),
    "tfidf": (
        "TF-IDF",
        "A text has for each word how often it holds it, times a weight that is greater for words of few documents.",
        ("sparckjones1972tfidf",),
    ),
    "cooccurrence": (
        "Counts of neighbours",
        f"{_COUNTED}, and the logarithms of the counts are factorized by singular values.",
        ("levy2015improving",),
    ),
    "pmi": (
        "Pointwise mutual information",
        f"{_COUNTED}, compared with what chance would give, and factorized by singular values.",
        ("church1990pmi", "levy2015improving"),
    ),
    "ppmi": (
        "Positive pointwise mutual information",
        f"{_COUNTED}, compared with what chance would give, and factorized by singular values; less than chance is chance.",
        ("levy2014implicit", "levy2015improving"),
    ),
    "lsa": (
        "Latent semantic analysis",
        "A table of words and documents, weighted by TF-IDF, is factorized by singular values.",
        ("deerwester1990lsa",),
    ),
    "skipgram": ("Skip-gram", "Each word predicts the words around it (word2vec).", ("mikolov2013distributed",)),
    "cbow": (
        "Continuous bag of words",
        "The mean of the words around a word predicts it (word2vec).",
        ("mikolov2013efficient", "irsoy2021cbow"),
    ),
    "glove": (
        "GloVe",
        "Products of vectors are fitted to the logarithms of how often words stand near each other.",
        ("pennington2014glove",),
    ),
    "distil": (
        "Static vectors of an encoder",
        "Each token went through the encoder alone; the vectors are reduced by principal components and weighted.",
        ("arora2017sif",),
    ),
    "import": ("Imported vectors", "The vectors were made by another program.", ()),
}
"""Title, description and citations by method."""

_USAGE = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}")
vectors = model.encode(["A text.", "Another text."])
"""
_SPARSE_USAGE = """\
from hf_pretrain import SparseTextVectorizer

vectorizer = SparseTextVectorizer.from_pretrained("{repo}")
vectors = vectorizer.transform(["A text.", "Another text."])
"""


def write_vectors_card(
    args: VectorArguments, made: Made, evaluations: Sequence[Evaluation], *, seconds: float, folder: Path
) -> None:
    """Write README.md, its pictures and the record of the run.

    Args:
        args: The options.
        made: What was made.
        evaluations: What was measured.
        seconds: How long the making took.
        folder: Where to write.
    """
    title, description, citations = _DESCRIPTIONS[args.method]
    is_sparse = made.vectors is None
    objective = ObjectiveDescription(
        name="vectors",
        title=title,
        description=description,
        citations=cite(*citations),
        pipeline_tag="feature-extraction" if is_sparse else "sentence-similarity",
        usage=_SPARSE_USAGE if is_sparse else _USAGE,
        tags=("static-vectors", *(() if is_sparse else ("sentence-transformers", "model2vec"))),
    )
    card = PretrainingCard(
        model_name=Path(args.output_dir).resolve().name,
        model_class="SparseTextModel" if is_sparse else "StaticEmbeddingModel",
        has_own_code=True,
        objective=objective,
        data=made.facts,
        recipe=args.recipe,
        evaluations=evaluations,
        sections={} if made.vectors is None else _sections(made.vectors, folder),
        compute=Compute(seconds=seconds, hardware=hardware(device_type="cpu")),
        versions=versions(),
    )
    write_card(card, folder)


def _sections(vectors: WordVectors, folder: Path) -> dict[str, str]:
    """Return the neighbours of some words, answers to analogies, and a picture, which is drawn into the folder."""
    rows = [
        f"| {cell(word)} | {cell(', '.join(other for other, _ in near))} |" for word, near in neighbours_of(vectors)
    ]
    sections = {"Neighbours": "\n".join(["| Word | The nearest words |", "|---|---|", *rows])}
    answers = [
        f"| {a} : {b} = {c} : ? | {cell(', '.join(word for word, _ in vectors.analogy(a, b, c, top=3, restrict=30_000)))} |"
        for a, b, c in _QUESTIONS
        if all(word in vectors for word in (a, b, c))
    ]
    if answers:
        sections["Analogies"] = "\n".join(["| Question | The nearest answers |", "|---|---|", *answers])
    if len(vectors) >= _LEAST_IN_PICTURE and vectors.vectors.shape[1] > 1:
        (folder / _PICTURE).parent.mkdir(parents=True, exist_ok=True)
        plot_words(vectors, folder / _PICTURE)
        sections["Frequent words"] = f"![The words in the plane of their two main directions]({_PICTURE})"
    return sections


def neighbours_of(vectors: WordVectors) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return some words of a vocabulary with the nearest ones and their cosines; none of a single word."""
    return list(nearest_neighbours(vectors).items()) if len(vectors) > 1 else []
