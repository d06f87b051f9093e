"""Make a vector for each word of a text, or one for a whole text: by counts, by word2vec, by GloVe, or from an encoder.

    hf-pretrain vectors --train_file corpus.txt --output_dir my-vectors
    hf-pretrain vectors --method skipgram --train_file corpus.txt --dimensions 300 --output_dir my-word2vec
    hf-pretrain vectors --method tfidf --train_file corpus.txt --output_dir my-tfidf
    hf-pretrain vectors --method distil --model_name_or_path my-encoder --output_dir my-static-encoder
    hf-pretrain vectors --method import --vectors_file glove.6B.100d.txt --output_dir my-glove

onehot, counts and tfidf give a text one number for each word. cooccurrence, pmi and ppmi factorize a table of words and their
neighbours, lsa one of words and documents. skipgram and cbow are word2vec, glove is GloVe. distil reads each token of an encoder
by itself. The default is ppmi, the fastest way to good vectors of some millions of words.

The folder opens with `AutoModel.from_pretrained`, `SentenceTransformer` and `model2vec.StaticModel`; that of onehot, counts and
tfidf with `AutoModel.from_pretrained`, whose output is sparse, and with `hf_pretrain.SparseTextVectorizer`.
`hf-pretrain mlm --init_embeddings my-vectors` begins a training with the vectors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import sparse
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.commands import of_data, parse_command
from hf_pretrain.commands.vectors_card import neighbours_of, write_vectors_card
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.words import analogy_accuracy, word_similarity
from hf_pretrain.files import is_whole, plain, write_text
from hf_pretrain.hub.card import recipe_options
from hf_pretrain.hub.evaluation import Evaluation
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.options import check_options, option
from hf_pretrain.training.parsing import check_changed
from hf_pretrain.vectors.corpus import SPECIAL_WORDS, WordCorpus, WordVocabulary
from hf_pretrain.vectors.counts import (
    Window,
    count_cooccurrences,
    document_counts,
    latent_vectors,
    pmi_matrix,
    tfidf_weights,
)
from hf_pretrain.vectors.distillation import bare_tokenizer, distil_vectors, ids_of_special_tokens
from hf_pretrain.vectors.folder import WordVectors
from hf_pretrain.vectors.formats import write_vectors
from hf_pretrain.vectors.glove import GloVeOptions, train_glove
from hf_pretrain.vectors.text_vectors import SparseTextVectorizer
from hf_pretrain.vectors.word2vec.training import Word2VecOptions, train_word2vec

MethodName = Literal[
    "onehot", "counts", "tfidf", "cooccurrence", "pmi", "ppmi", "lsa", "skipgram", "cbow", "glove", "distil", "import"
]
_SPARSE, _WORD2VEC = ("onehot", "counts", "tfidf"), ("skipgram", "cbow")
_FACTORIZED = ("cooccurrence", "pmi", "ppmi", "lsa")
_OF_TEXT = (*_SPARSE, *_FACTORIZED, *_WORD2VEC, "glove")
_DENSE = (*_FACTORIZED, *_WORD2VEC, "glove", "distil")
_WORK, _CHECKPOINTS = "_work", "checkpoints"


@dataclass
class VectorArguments:
    """Which text, which words, and how they get their vectors.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.

    Source:
        Levy, Goldberg and Dagan 2015 (counts), Mikolov et al. 2013 (word2vec), Pennington, Socher and Manning 2014 (GloVe).
    """

    ranges: ClassVar[dict[str, str]] = {
        "min_count": "[1, inf)",
        "max_words": "[1, inf)",
        "dimensions": "[1, inf)",
        "window": "[1, 1000]",
        "shift": "(0, inf)",
        "context_smoothing": "(0, 1]",
        "singular_power": "[0, 1]",
        "negatives": "[1, 1000]",
        "sample": "[0, 1]",
        "epochs": "[1, inf)",
        "learning_rate": "(0, inf)",
        "threads": "[1, inf)",
        "x_max": "(0, inf)",
        "analogy_candidates": "[1, inf)",
    }
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            "train_file demo_corpus text_column document_separator min_count max_words lowercase".split(),
            f"method={'|'.join(_OF_TEXT)}",
        ),
        "tokenizer_name": f"method={'|'.join((*_FACTORIZED, *_WORD2VEC, 'glove'))}",
        "dimensions": f"method={'|'.join(_DENSE)}",
        "window": f"method={'|'.join((*_FACTORIZED[:3], *_WORD2VEC, 'glove'))}",
        **dict.fromkeys(("window_weighting", "crosses_lines"), f"method={'|'.join((*_FACTORIZED[:3], 'glove'))}"),
        "window_direction": f"method={'|'.join(_FACTORIZED[:3])}",
        **dict.fromkeys(("shift", "context_smoothing"), "method=pmi|ppmi"),
        "singular_power": f"method={'|'.join(_FACTORIZED)}",
        "idf": "method=tfidf|lsa",
        **dict.fromkeys(("sample", "hierarchical", "threads", "backend"), f"method={'|'.join(_WORD2VEC)}"),
        **dict.fromkeys(("negatives", "shared_negatives"), f"method={'|'.join(_WORD2VEC)} and !hierarchical"),
        "cbow_gradient": "method=cbow",
        **dict.fromkeys(("epochs", "learning_rate", "resume"), f"method={'|'.join((*_WORD2VEC, 'glove'))}"),
        "x_max": "method=glove",
        **dict.fromkeys(("model_name_or_path", "token_weights"), "method=distil"),
        "vectors_file": "method=import",
        "analogy_candidates": "analogy_file",
        "normalize": "method!=onehot|counts",
        **dict.fromkeys(("word_similarity_file", "analogy_file", "export_file"), f"method!={'|'.join(_SPARSE)}"),
    }

    output_dir: str = option(help="Folder to write to; it does not exist, or is empty.")
    method: MethodName = option("ppmi", "How vectors are made; see above.")
    train_file: list[str] | None = of_data("train_file")
    demo_corpus: bool = of_data("demo_corpus")
    text_column: str = of_data("text_column")
    document_separator: Literal["blank_line", "line", "file"] = of_data("document_separator")
    lowercase: bool = option(True, "Lower the case.")
    tokenizer_name: str | None = option(
        None, "Make vectors of the tokens of this tokenizer in place of words, such as transfer_vocabulary needs."
    )
    min_count: int = option(5, "Words that occur less often are left out.")
    max_words: int | None = option(None, "Keep the most frequent words alone, so many.")
    dimensions: int = option(100, "Width of the vectors.")
    window: int | None = option(
        None, "Words to each side that count as neighbours; by default 5, for glove 10, for word2vec at most."
    )
    window_weighting: Literal["uniform", "linear", "harmonic"] | None = option(
        None,
        "How a neighbour counts by its distance: all alike, less towards the edge of the window as in word2vec, or 1 / distance "
        "as in GloVe; by default linear, for glove harmonic.",
    )
    window_direction: Literal["both", "left", "right", "separate"] = option(
        "both", "Which neighbours count; 'separate' counts those to the left and to the right in columns of their own."
    )
    crosses_lines: bool = option(False, "Let windows cross the ends of lines, and end at those of documents.")
    shift: float = option(1.0, "Its logarithm is subtracted from each PMI, as by so many negative samples.")
    context_smoothing: float = option(0.75, "Counts of neighbours are raised to this power.")
    singular_power: float = option(0.5, "Singular values are raised to this power: 1 is LSA's own, 0 leaves them out.")
    idf: Literal["sklearn", "textbook"] = option(
        "sklearn", "Weights of words by their documents: ln((1 + n) / (1 + df)) + 1, or ln(n / df)."
    )
    negatives: int = option(5, "Words that a true neighbour is compared with.")
    shared_negatives: bool = option(True, "Draw them once for all neighbours of a word, which is faster and as good.")
    hierarchical: bool = option(False, "Hierarchical softmax in place of negative samples.")
    cbow_gradient: Literal["mean", "word2vec"] = option(
        "mean",
        "The gradient of the mean of the neighbours, or what the published program adds to each: all of the error.",
    )
    sample: float = option(
        1e-3, "Words that make up a greater share of the text are left out at random; 0 leaves out none."
    )
    epochs: int | None = option(
        None, "How often the text, or the table of counts, is read; by default 5, for glove 25."
    )
    learning_rate: float | None = option(None, "Highest rate; by default that of the method.")
    threads: int = option(1, "Threads of word2vec; with more than one, two runs differ a little.")
    backend: Literal["auto", "numba", "torch"] = option(
        "auto", "What computes word2vec: 'numba' (pip install 'hf-pretrain[fast]') on a CPU, or 'torch'."
    )
    x_max: float = option(10.0, "Counts from here on weigh as much as any; 100 for some billions of words.")
    model_name_or_path: str | None = option(None, "The encoder to distil.")
    token_weights: Literal["sif", "zipf", "none"] = option(
        "sif", "How much a token counts in the mean of a text: less if it is frequent, or all alike."
    )
    vectors_file: str | None = option(
        None, "Vectors to import: of word2vec (text or binary), GloVe or fastText (.vec)."
    )
    normalize: bool = option(False, "Divide the vector of a text by its length.")
    word_similarity_file: list[str] | None = option(
        None, "Pairs of words with a score, such as WordSim-353 or SimLex-999, to compare the cosines with."
    )
    analogy_file: str | None = option(None, "Questions of the kind 'Athens Greece Oslo Norway', in sections.")
    analogy_candidates: int = option(30_000, "Answers are looked for among so many of the most frequent words.")
    export_file: str | None = option(
        None, "Write the vectors to this file too, as word2vec has them: .bin for binary, .vec or .txt for text."
    )
    seed: int = option(0, "Seed of all that is drawn.")
    resume: bool = option(False, "Go on with a run that was cut off, with the same options.")

    def __post_init__(self) -> None:
        """Fill in what depends on the method, and refuse what has no effect or is missing."""
        check_options(self)
        check_changed(self)
        if self.method in _OF_TEXT and bool(self.train_file) == self.demo_corpus:
            raise InputError(
                f"method={self.method!r} reads text: give --train_file (files, folders or globs), or --demo_corpus true for the "
                "docstrings of the installed Python packages"
            )
        for method, name in (("distil", "model_name_or_path"), ("import", "vectors_file")):
            if self.method == method and getattr(self, name) is None:
                raise InputError(f"method={method!r} needs --{name}")
        # Before hours of training, not behind them.
        for name in (*(self.word_similarity_file or []), *filter(None, [self.analogy_file])):
            if not Path(name).is_file():
                raise InputError(f"word_similarity_file or analogy_file: {name!r} is no file")
        if self.export_file is not None and not Path(self.export_file).absolute().parent.is_dir():
            raise InputError(f"export_file={self.export_file!r} is in no folder that exists: name another")
        if self.tokenizer_name is not None and not self.lowercase:
            raise InputError(
                f"lowercase=False has no effect beside tokenizer_name={self.tokenizer_name!r}: leave it out"
            )

    def word2vec(self) -> Word2VecOptions:
        """Return the options of word2vec."""
        return Word2VecOptions(
            mode=self.method,
            dimensions=self.dimensions,
            window=self.windows.size,
            negatives=self.negatives,
            hierarchical=self.hierarchical,
            sample=self.sample,
            epochs=self.epochs or 5,
            learning_rate=self.learning_rate,
            shared_negatives=self.shared_negatives,
            cbow_gradient=self.cbow_gradient,
            seed=self.seed,
            threads=self.threads,
            backend=self.backend,
        )

    def glove(self) -> GloVeOptions:
        """Return the options of GloVe."""
        rate: dict[str, Any] = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return GloVeOptions(
            dimensions=self.dimensions, x_max=self.x_max, epochs=self.epochs or 25, seed=self.seed, **rate
        )

    @property
    def windows(self) -> Window:
        """The windows in which words are counted."""
        is_glove = self.method == "glove"
        return Window(
            size=self.window or (10 if is_glove else 5),
            weighting=self.window_weighting or ("harmonic" if is_glove else "linear"),
            direction=self.window_direction,
            crosses_lines=self.crosses_lines,
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that are not the defaults, as a card shows them."""
        defaults = {known.name: known.default for known in dataclasses.fields(self)}
        return recipe_options(plain(dataclasses.asdict(self)), defaults=defaults)

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        if self.demo_corpus:
            return docstring_documents()
        assert self.train_file is not None, "the options were checked"
        return read_documents(
            self.train_file, document_separator=self.document_separator, text_column=self.text_column
        )


ARGUMENTS = (VectorArguments,)

# What is made


@dataclass
class Made:
    """What a method has made.

    Attributes:
        save: Writes the model to a folder.
        facts: What the card says of the text and of the model.
        vectors: Vectors of words, where the method has them.
    """

    save: Callable[[Path], None]
    facts: dict[str, Any]
    vectors: WordVectors | None = None


def make(args: VectorArguments, work: Path) -> Made:
    """Make the vectors that the options ask for.

    Args:
        args: The options.
        work: Folder for what is kept until the end: the corpus, and the checkpoints of word2vec and GloVe.
    """
    if args.method in _SPARSE:
        return _sparse(args)
    if args.method == "import":
        assert args.vectors_file is not None, "the options were checked"
        return _of_words(args, WordVectors.open(args.vectors_file), {"imported_from": Path(args.vectors_file).name})
    if args.method == "distil":
        return _distilled(args)
    tokenizer = None if args.tokenizer_name is None else from_pretrained(AutoTokenizer, args.tokenizer_name)
    if is_whole(work / "corpus"):
        corpus = WordCorpus.open(work / "corpus")
    else:
        corpus = WordCorpus.build(
            args.texts,
            folder=work / "corpus",
            min_count=args.min_count,
            max_words=args.max_words,
            lowercase=args.lowercase,
            tokenizer=None if tokenizer is None else tokenizer.backend_tokenizer,
        )
    known = corpus.vocabulary
    facts = {
        "sources": [Path(name).name for name in args.train_file or ["docstrings"]],
        "documents": known.documents,
        "words": known.total,
        "known_words": len(corpus.tokens),
        "vocabulary_size": len(known),
    }
    print(
        f"text   {known.documents:,} documents, {known.total:,} words, {len(known):,} of them different and kept",
        flush=True,
    )
    vectors = _trained(args, corpus, work)
    if tokenizer is not None:
        return _of_words(args, _of_tokens(known, vectors, tokenizer), facts)
    made = WordVectors(known.words, vectors, counts=known.counts, tokenizer=corpus.tokenizer)
    return _of_words(args, made, facts)


def _of_tokens(known: WordVocabulary, vectors: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> WordVectors:
    """Return vectors of all tokens of a tokenizer but special ones; those that the text does not have are zero."""
    special = ids_of_special_tokens(tokenizer)
    ids = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    tokens = tuple(ids[number] for number in sorted(ids) if ids[number] not in SPECIAL_WORDS)
    rows = np.array([known.ids.get(token, -1) for token in tokens])
    table = np.where(rows[:, None] >= 0, vectors[rows], 0).astype(np.float32)
    counts = np.where(rows >= 0, known.counts[rows], 0)
    return WordVectors(tokens, table, counts=counts, tokenizer=bare_tokenizer(tokenizer))


def _trained(args: VectorArguments, corpus: WordCorpus, work: Path) -> np.ndarray:
    """Return the vector of each word of a corpus, `float32 [V, D]`."""
    if args.method in _WORD2VEC:
        return train_word2vec(corpus, args.word2vec(), checkpoint_folder=work / _CHECKPOINTS).vectors
    if args.method == "glove":
        counts = count_cooccurrences(corpus, args.windows, folder=work / "counts")
        return train_glove(counts, args.glove(), checkpoint_folder=work / _CHECKPOINTS).vectors
    if args.method == "lsa":
        known = corpus.vocabulary
        table = document_counts(corpus).T.tocsr().astype(np.float64)
        weights = tfidf_weights(known.document_counts, known.documents, convention=args.idf)
        table = sparse.diags_array(weights).tocsr() @ table
    else:
        table = count_cooccurrences(corpus, args.windows).to_csr()
        if args.method == "cooccurrence":
            # Of plain counts the first direction alone is the frequency of words.
            table.data = np.log1p(table.data)
        else:
            options: dict[str, Any] = {
                "positive": args.method == "ppmi",
                "shift": args.shift,
                "smoothing": args.context_smoothing,
            }
            table = pmi_matrix(table, **options)
    found = latent_vectors(table, dimensions=args.dimensions, power=args.singular_power, seed=args.seed)
    return found.vectors.astype(np.float32)


def _of_words(args: VectorArguments, vectors: WordVectors, facts: dict[str, Any]) -> Made:
    """Return vectors of words as what was made."""
    training = args.recipe

    def save(folder: Path) -> None:
        vectors.save(
            folder, method=args.method, training=training, lowercase=vectors.is_lowercase, normalize=args.normalize
        )

    size = {"vocabulary_size": len(vectors), "dimensions": vectors.vectors.shape[1]}
    return Made(save, facts | size, vectors)


def _sparse(args: VectorArguments) -> Made:
    """Fit vectors with a number for each word."""
    options: dict[str, Any] = {"method": args.method, "idf": args.idf, "normalize": args.normalize or None}
    options |= {"min_df": args.min_count, "max_features": args.max_words, "lowercase": args.lowercase}
    vectorizer = SparseTextVectorizer(**options)
    vectorizer.fit(args.texts())
    facts = {"documents": vectorizer.num_documents_, "vocabulary_size": len(vectorizer.weights_)}
    return Made(vectorizer.save_pretrained, facts)


def _distilled(args: VectorArguments) -> Made:
    """Read each token of an encoder by itself."""
    assert args.model_name_or_path is not None, "the options were checked"
    model = from_pretrained(AutoModel, args.model_name_or_path)
    tokenizer = from_pretrained(AutoTokenizer, args.model_name_or_path)
    found = distil_vectors(model, tokenizer, dimensions=args.dimensions, weighting=args.token_weights)
    facts = {"encoder": Path(args.model_name_or_path).name, "explained_variance": found.explained_variance}
    return _of_words(args, found.to_word_vectors(), facts)


# What is measured


def measure(args: VectorArguments, vectors: WordVectors) -> list[Evaluation]:
    """Compare the vectors with what people said of words, where the options name files."""
    found = []
    for path in args.word_similarity_file or []:
        result = word_similarity(vectors, path)
        if result.correlation is None:
            raise InputError(
                f"word_similarity_file={path}: the vectors know {result.pairs} of {result.total} pairs, too few"
            )
        found.append(
            Evaluation(
                task="Similarity of words",
                dataset=Path(path).name,
                split=f"{result.pairs} of {result.total} pairs",
                metrics={"spearmanr": result.correlation},
                method="rank correlation of cosines",
                task_type="sentence-similarity",
                num_examples=result.pairs,
            )
        )
    if args.analogy_file is not None:
        answers = analogy_accuracy(vectors, args.analogy_file, restrict=args.analogy_candidates)
        parts = {
            "accuracy": answers.total,
            "semantic_accuracy": answers.semantic,
            "syntactic_accuracy": answers.syntactic,
        }
        metrics = {name: score.accuracy for name, score in parts.items() if score.accuracy is not None}
        if metrics:
            found.append(
                Evaluation(
                    task="Analogies",
                    dataset=Path(args.analogy_file).name,
                    split=f"{answers.total.answered} of {answers.total.total} questions, {answers.candidates} candidates",
                    metrics=metrics,
                    method="3CosAdd",
                    task_type="sentence-similarity",
                    num_examples=answers.total.answered,
                )
            )
    return found


# The program


def main(argv: list[str] | None = None) -> None:
    """Make vectors, measure them, and write the folder; see the top of the file."""
    args = parse_command(ARGUMENTS, argv, name="vectors", description=__doc__)
    folder = Path(args.output_dir)
    work = folder / _WORK
    _claim(args, folder)
    begin = time.perf_counter()
    try:
        made = make(args, work)
    except BaseException:
        if not (work / _CHECKPOINTS).exists():
            # There is nothing to go on with.
            shutil.rmtree(work)
        raise
    seconds = time.perf_counter() - begin
    part = work / "model"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    made.save(part)
    evaluations = []
    if made.vectors is not None:
        evaluations = measure(args, made.vectors)
        if args.export_file is not None:
            write_vectors(args.export_file, made.vectors.words, made.vectors.vectors)
    write_vectors_card(args, made, evaluations, seconds=seconds, folder=part)
    for path in part.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(work)
    _report(args, made, evaluations, seconds)


def _claim(args: VectorArguments, folder: Path) -> None:
    """Refuse a folder that is in use, and one of another run that was cut off."""
    begun = folder / _WORK / "options.json"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir={args.output_dir!r} is a file: name a folder")
    if names - {_WORK}:
        raise InputError(f"output_dir={args.output_dir!r} is in use: name a folder that is empty or does not exist")
    options = plain(dataclasses.asdict(args)) | {"resume": False}
    if args.resume and not begun.is_file():
        raise InputError(f"output_dir={args.output_dir!r} holds no run to go on with: leave --resume out")
    if args.resume:
        known = json.loads(begun.read_text(encoding="utf-8"))
        wrong = [name for name, value in options.items() if known.get(name) != value]
        if wrong:
            raise InputError(
                f"{wrong[0]}={options[wrong[0]]!r} was {known.get(wrong[0])!r} in the run that --resume goes on with"
            )
        return
    if (folder / _WORK / _CHECKPOINTS).exists():
        raise InputError(
            f"output_dir={args.output_dir!r} holds a run that was cut off: go on with --resume true, or name another folder"
        )
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    (folder / _WORK).mkdir(parents=True)
    write_text(begun, json.dumps(options))


def _report(args: VectorArguments, made: Made, evaluations: list[Evaluation], seconds: float) -> None:
    """Print what there is now."""
    print(f"made   {args.method}, {made.facts['vocabulary_size']:,} words, in {seconds:.1f} s")
    for evaluation in evaluations:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in evaluation.metrics.items())
        print(f"       {evaluation.task}: {scores}  ({evaluation.dataset}, {evaluation.split})")
    if made.vectors is not None:
        for word, near in neighbours_of(made.vectors):
            print(f"       {word}: {', '.join(other for other, _ in near)}")
    loader = "SparseTextVectorizer" if made.vectors is None else "SentenceTransformer"
    print(f'model  {args.output_dir}  (opens with {loader}("{args.output_dir}"))')
