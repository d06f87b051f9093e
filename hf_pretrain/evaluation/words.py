"""How good vectors of words are: against scores of similarity, and at analogies; and their neighbours and a picture for a card.

A vocabulary knows only some pairs and questions, and fewer candidates make analogies easier. So the number of pairs, the share
of answered questions and the number of candidates stand beside each figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA

from hf_pretrain.data.text.lines import open_bytes, readable
from hf_pretrain.errors import InputError, check_choice, check_range
from hf_pretrain.evaluation.similarity import similarity_correlation
from hf_pretrain.files import write_bytes
from hf_pretrain.vectors.folder import AnalogyMethod, WordVectors, analogy_scores

# Scores of a chunk of questions: 16 MiB a table.
_CHUNK = 1 << 22
# Scores of fp32 vectors are known to about 1e-7.
_TIE = 1e-6
_SYNTACTIC = "gram"
# Column of the score in the header of SimLex-999's own file.
_SCORE = "SimLex999"
_FORMATS = ("svg", "png")
_SIZE, _DOTS_PER_INCH = (8.0, 6.4), 110  # inches
_COLOUR, _INK = "#8fb8de", "#12355b"


class WordSimilarity(NamedTuple):
    """How well cosines of words agree with scores of people.

    Attributes:
        correlation: Spearman's rank correlation, from -1 to 1; None with fewer than two different scores.
        pairs: Pairs of which both words have a vector; the others are left out.
        total: Pairs asked.
    """

    correlation: float | None
    pairs: int
    total: int


def word_similarity(
    vectors: WordVectors, path_or_rows: str | Path | Iterable[tuple[str, str, float]]
) -> WordSimilarity:
    """Compare cosines of words with scores of their similarity.

    Args:
        vectors: The vectors; words are lower-cased if their vocabulary is.
        path_or_rows: Rows of two words and a score, or a file of them with tabs or commas between, such as WordSim-353 or
            SimLex-999. Lines that begin with # are passed over, and so is a header.

    Returns:
        The correlation, with how many pairs it has.

    Raises:
        InputError: If the file cannot be read, or a row is not right; the message has its line.

    Source: Finkelstein et al. 2002, "Placing Search in Context: The Concept Revisited" (WordSim-353); Hill et al. 2015,
        "SimLex-999: Evaluating Semantic Models with (Genuine) Similarity Estimation".
    """
    rows = list(read_scored_words(path_or_rows) if isinstance(path_or_rows, (str, Path)) else path_or_rows)
    found = [(vectors.find(first), vectors.find(second), float(score)) for first, second, score in rows]
    known = [(first, second, score) for first, second, score in found if first is not None and second is not None]
    if len({score for _, _, score in known}) < 2:
        return WordSimilarity(None, len(known), len(rows))
    left, right, scores = zip(*known, strict=True)
    correlation = similarity_correlation(vectors.unit[list(left)], vectors.unit[list(right)], scores)
    return WordSimilarity(correlation, len(known), len(rows))


def read_scored_words(path: str | Path) -> Iterator[tuple[str, str, float]]:
    """Yield the rows of a file of scored pairs: two words and a score; see [`word_similarity`]."""
    column, is_first = 2, True
    for number, line in _lines(path):
        fields = [field.strip() for field in re.split(r"\t|,", line)]
        if line.startswith("#"):
            continue
        if len(fields) <= column or not all(fields[:2]):
            raise InputError(f"{path}, line {number}: there are no two words and a score, with tabs or commas between")
        try:
            yield fields[0], fields[1], float(fields[column])
        except ValueError as error:
            if not is_first:
                raise InputError(f"{path}, line {number}: score={fields[column]!r} is no number") from error
            column = fields.index(_SCORE) if _SCORE in fields else column
        is_first = False


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers."""
    if not Path(path).is_file():
        raise InputError(f"path={str(path)!r} is no file")
    with readable(path), open_bytes(str(path)) as file:
        content = file.read()
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().rstrip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}: it is not text in UTF-8; convert it, e.g. with iconv") from error
        if text:
            yield number, text


class AnalogyScore(NamedTuple):
    """Answers to questions of analogy.

    Attributes:
        correct: Questions answered right.
        answered: Questions whose four words are all candidates.
        total: Questions asked.
    """

    correct: int
    answered: int
    total: int

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among the answered questions; None if there are none."""
        return self.correct / self.answered if self.answered else None

    @property
    def answered_share(self) -> float:
        """Share of questions that were answered."""
        return self.answered / self.total if self.total else 0.0


class AnalogyAccuracy(NamedTuple):
    """Answers by section, and together.

    Attributes:
        sections: By the names of the sections, in their order.
        semantic: Of all sections but the syntactic ones.
        syntactic: Of the sections whose names begin with "gram".
        total: Of all.
        candidates: Words that could be an answer: the most frequent ones.
        method: "add" or "multiply".
    """

    sections: dict[str, AnalogyScore]
    semantic: AnalogyScore
    syntactic: AnalogyScore
    total: AnalogyScore
    candidates: int
    method: str


def analogy_accuracy(
    vectors: WordVectors,
    path: str | Path,
    *,
    restrict: int | None = 30_000,
    method: AnalogyMethod = "add",
) -> AnalogyAccuracy:
    """Answer questions such as "man is to king as woman is to what?".

    The three words of a question are never its answer. An answer is right if it alone has the best score: ties count against the
    vectors, and scores within 1e-6 are equal. Words are lower-cased if the vocabulary is.

    Args:
        vectors: The vectors, from frequent words to rare ones.
        path: File of questions as word2vec has them: ": name" begins a section, and other lines have four words.
        restrict: Only the first so many words are candidates, and questions with another word are not answered; None for all.
        method: "add" for 3CosAdd, "multiply" for 3CosMul.

    Returns:
        The counts of right, answered and all questions.

    Raises:
        InputError: If the file cannot be read, a line has not four words, or there is no such method.

    Source: Mikolov et al. 2013, "Efficient Estimation of Word Representations in Vector Space", section 4.1 (questions);
        Levy and Goldberg 2014, "Linguistic Regularities in Sparse and Explicit Word Representations" (3CosMul).
    """
    check_choice(method, ("add", "multiply"), name="method")
    if restrict is not None:
        check_range(restrict, "[1, inf)", name="restrict")
    candidates = min(restrict or len(vectors), len(vectors))
    sections: dict[str, AnalogyScore] = {}
    for name, questions in read_questions(path).items():
        found = [[vectors.find(word) for word in question] for question in questions]
        known = [rows for rows in found if all(row is not None and row < candidates for row in rows)]
        right = _right_answers(vectors.unit[:candidates], np.array(known, dtype=np.int64).reshape(-1, 4), method)
        sections[name] = AnalogyScore(right, len(known), len(questions))
    syntactic = [score for name, score in sections.items() if name.startswith(_SYNTACTIC)]
    semantic = [score for name, score in sections.items() if not name.startswith(_SYNTACTIC)]
    return AnalogyAccuracy(
        sections, _sum(semantic), _sum(syntactic), _sum([*semantic, *syntactic]), candidates, method
    )


def _sum(scores: Sequence[AnalogyScore]) -> AnalogyScore:
    return AnalogyScore(*(sum(counts) for counts in zip(*scores, strict=True))) if scores else AnalogyScore(0, 0, 0)


def read_questions(path: str | Path) -> dict[str, list[list[str]]]:
    """Return the questions of each section of a file, four words each; see [`analogy_accuracy`]."""
    sections: dict[str, list[list[str]]] = {}
    name = ""
    for number, line in _lines(path):
        words = line.split()
        if words[0].startswith(":"):
            name = line[1:].strip()
            sections.setdefault(name, [])
            continue
        if len(words) != 4:
            raise InputError(f"{path}, line {number}: a question has four words, not {len(words)}")
        sections.setdefault(name, []).append(words)
    if not any(sections.values()):
        raise InputError(f"{path} has no question: give lines of four words")
    return sections


def _right_answers(unit: np.ndarray, questions: np.ndarray, method: AnalogyMethod) -> int:
    """Return how many questions, rows of four words, are answered right."""
    right, step = 0, max(1, _CHUNK // len(unit))
    for begin in range(0, len(questions), step):
        part = questions[begin : begin + step]
        # The questions of a section share their words.
        words, places = np.unique(part[:, :3], return_inverse=True)
        cosines = unit[words] @ unit.T
        of_a, of_b, of_c = (cosines[column] for column in places.reshape(-1, 3).T)
        scores = analogy_scores(of_a, of_b, of_c, method=method)
        rows = np.arange(len(part))
        own = scores[rows, part[:, 3]]
        scores[rows[:, None], part] = -np.inf
        is_other = ~(part[:, :3] == part[:, 3:]).any(axis=1)
        margin = _TIE * np.maximum(1, np.abs(own))
        # With no other candidate the best of the rest is minus infinity.
        right += int(np.count_nonzero(is_other & (own > scores.max(axis=1) + margin)))
    return right


def nearest_neighbours(
    vectors: WordVectors, words: Sequence[str] | None = None, *, top: int = 5, restrict: int | None = 30_000
) -> dict[str, list[tuple[str, float]]]:
    """Return the nearest words of some words, for a card.

    Args:
        vectors: The vectors.
        words: The words; those without a vector are left out. By default eight between the 100th and the 1000th, evenly
            spread: they are frequent, and mean something.
        top: Neighbours of each.
        restrict: Only the first so many words are neighbours; None for all.

    Returns:
        By word its neighbours and their cosines, the nearest first.
    """
    if words is None:
        first, last = min(100, len(vectors) // 10), min(1000, len(vectors) - 1)
        words = [vectors.words[row] for row in np.unique(np.linspace(first, last, 8).astype(int))]
    known = [word for word in words if word in vectors]
    return {word: vectors.most_similar(word, top=top, restrict=restrict) for word in known}


def plot_words(
    vectors: WordVectors, path: str | Path, *, words: Sequence[str] | None = None, title: str | None = None
) -> Path:
    """Draw words in the plane of their two main directions.

    Args:
        vectors: The vectors.
        path: Picture to write, .svg or .png.
        words: The words; those without a vector are left out. By default 80 frequent ones, without the 50 most frequent.
        title: Title; by default how much of the variance the plane shows.

    Returns:
        The path.

    Raises:
        InputError: If the name of the picture ends otherwise, or fewer than three words have a vector.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    check_choice(kind, _FORMATS, name="suffix of path")
    chosen = _frequent(vectors) if words is None else words
    known = list(dict.fromkeys(word for word in chosen if word in vectors))
    if len(known) < 3:
        raise InputError(f"words has {len(known)} words with a vector: give three or more")
    rows = [row for word in known if (row := vectors.find(word)) is not None]
    plane = PCA(min(2, vectors.vectors.shape[1]), svd_solver="full")
    points = np.zeros((len(known), 2))
    points[:, : plane.n_components] = plane.fit_transform(vectors.unit[rows])
    shown = f"{len(known)} words; the plane shows {plane.explained_variance_ratio_.sum():.0%} of their variance"
    return write_bytes(path, _picture(points, known, kind=kind, title=shown if title is None else title))


def _frequent(vectors: WordVectors) -> list[str]:
    first = min(50, max(0, len(vectors) - 80))
    return [word for word in vectors.words[first : first + 120] if any(map(str.isalpha, word))][:80]


def _picture(points: np.ndarray, words: Sequence[str], *, kind: str, title: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # the object interface: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Names in a picture as they are, and the same file from the same vectors.
    with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "words"}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
        picture = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, layout=layout, facecolor="white")
        panel = picture.subplots()
        panel.scatter(points[:, 0], points[:, 1], s=12, color=_COLOUR)
        for (x, y), word in zip(points, words, strict=True):
            panel.annotate(word, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=8, color=_INK)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("first direction", fontsize=9)
        panel.set_ylabel("second direction", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(True, color="#e6e6e6", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        picture.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return content.getvalue()
