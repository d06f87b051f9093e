"""Do vectors of texts get better than those of the masked language model they start from? Arms of equal training FLOPs.

    python benchmarks/contrastive_quality.py --data_dir data [--arm simcse ict] [--seed 0 1] [--flops 2e13]
    python benchmarks/contrastive_quality.py --table

    untrained   the encoder as it is before training
    start       a masked language model of the budget `start_flops`; each arm below goes on with it for the budget `flops`
    mlm         goes on with masked language modelling
    simcse      a sentence twice; dropout makes the difference
    ict         a sentence and the text around it
    infoword    a text with a masked n-gram, and that n-gram; masked language modelling beside
    retromae    a text is rebuilt from its vector by one layer, which sees half of it
    tsdae       a sentence is rebuilt from the vector of its rest
    mlm_ctl     two spans of a document; masked language modelling beside

All arms train one encoder of one size with one tokenizer, on one text, by the programs `hf-pretrain mlm` and
`hf-pretrain contrastive`. Those of a seed continue one checkpoint. FLOPs of forward and backward, with heads and decoders, are
counted on real batches by torch's FlopCounterMode; the steps are what the budget pays for. The start has to know more than how
often words occur (a loss below the unigram's): else vectors of random words are better than its own. Every arm has dropout, which
SimCSE needs, and one pooling.

Judged are the vectors, before and after `tune_steps` supervised steps on the training pairs of STS-B, which are the same for all
arms: a plain loop with the squared difference of cosine and score.

    STS-B       Spearman correlation of cosines and scores; on the development pairs also alignment, of pairs with a score of 4 or
                more, and uniformity, of all texts
    docstrings  the first line of a Python module's docstrings finds the rest among those of other modules
    novels      a paragraph finds its chapter among all chapters of the held-out text; a chapter is the mean of the unit vectors
                of its other paragraphs, because an encoder of short texts does not read all of it

Nobody labelled the last two, and no training text is in them. Ties count against an arm.

The folder `data_dir` holds stsb/train.csv, dev.csv and test.csv (sentence, sentence, score; no header), and books/train.txt.xz
and valid.txt.xz unless `train_file` and `validation_file` name other text. There, a line is a paragraph and a blank line ends a
chapter. Each run is a row of the file `results`: what is there is not run again, and several processes may fill it, each with
arms and seeds of its own. The models are kept in a folder beside it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_pretrain import train_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.text.docstrings import docstring_documents
from hf_pretrain.data.text.files import read_documents
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.similarity import (
    ScoredPairs,
    alignment_uniformity,
    read_scored_pairs,
    retrieval_recall,
    similarity_correlation,
    text_vectors,
)
from hf_pretrain.modeling.loading import quiet
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.options import option
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    flops_of_a_step,
    held_out_file,
    print_arms,
    rows_by_settings,
    sizes_of,
    train_by_program,
    trainer_of_program,
)

CONTRASTIVE: dict[str, dict[str, str]] = {
    "simcse": {"objective": "contrastive", "views": "same", "beside": "none"},
    "ict": {"objective": "contrastive", "views": "ict", "beside": "none"},
    "infoword": {"objective": "infoword", "beside": "mlm"},
    "retromae": {"objective": "retromae", "beside": "mlm"},
    "tsdae": {"objective": "tsdae", "beside": "none"},
    "mlm_ctl": {"objective": "contrastive", "views": "spans", "beside": "mlm"},
}
"""Options of `hf-pretrain contrastive` by arm."""
ARMS = ("untrained", "start", "mlm", *CONTRASTIVE)
# One document in so many is enough for a vocabulary.
_TOKENIZER_STRIDE = 8
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("embedding_dropout", "attention_dropout", "mlp_dropout"),
)
# Scores of STS-B go from 0 to 5; from here on two sentences mean the same but for details.
_HIGHEST, _ALIKE = 5.0, 4.0
# Shorter texts say little about what they are part of.
_LEAST_WORDS, _LEAST_TITLE = 30, 3


@dataclass
class VectorArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("contrastive_quality.json", "File that each run adds a row to.")
    start_flops: float = option(
        1e14, "Training budget of the masked language model that the arms of a seed start from."
    )
    flops: float = option(2e13, "Training budget of an arm.")
    vocab_size: int = option(4096, "Tokens of the tokenizer, trained once on the text.")
    model_type: str = option("modernbert", "Architecture of the encoder.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(4, "Layers.")
    dropout: float = option(0.1, "Dropout of all arms.")
    batch_size: int = option(32, "Examples a step.")
    learning_rate: float = option(2e-3, "Peak rate of the masked language model that the arms start from.")
    further_rate: float = option(5e-4, "Peak rate of the arms.")
    pooling: str = option("mean", "Pooling of the vectors of all arms: mean or cls.")
    held_out_characters: int = option(
        300_000, "Evaluate on the first documents of validation_file, of so many characters."
    )
    modules: int = option(1000, "Modules whose docstrings are found by their first line.")
    paragraphs: int = option(10, "Most paragraphs of a chapter that look for it.")
    tune_steps: int = option(1000, "Supervised steps.")
    tune_batch_size: int = option(16, "Pairs a supervised step.")
    tune_rate: float = option(3e-4, "Peak rate of the supervised steps.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        books = Path(self.data_dir, "books")
        if not self.train_file and not self.table:
            self.train_file, self.validation_file = [str(books / "train.txt.xz")], [str(books / "valid.txt.xz")]
        super().__post_init__()
        if not self.validation_file and not self.table:
            raise InputError(
                "validation_file is missing: name held-out text, a paragraph a line, for the search of chapters"
            )


# Training


def tokenizer_of(args: VectorArguments) -> str:
    """Return the folder of the tokenizer that all arms share; the first process trains it."""
    folder = args.runs_folder() / f"tokenizer-{args.vocab_size}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            texts = itertools.islice(read_documents(args.train_file), 0, None, _TOKENIZER_STRIDE)
            train_tokenizer(texts, vocab_size=args.vocab_size).save_pretrained(folder)
    return str(folder)


def begin_folder(seed: int, args: VectorArguments) -> Path:
    """Return the folder of the masked language model that the arms of a seed start from."""
    return args.runs_folder() / f"start-{seed}"


def command(arm: str, seed: int, args: VectorArguments, folder: Path) -> tuple[str, list[str]]:
    """Return the method of an arm and its arguments on the command line."""
    options: dict[str, Any] = {
        "train_file": args.train_file,
        "validation_file": held_out_file(args, args.held_out_characters),
        "max_corpus_bytes": args.max_corpus_bytes,
        "document_separator": args.document_separator,
        "tokenizer_name": tokenizer_of(args),
        "block_size": args.block_size,
    }
    options |= args.training(folder, seed, lr_scheduler_type="linear", warmup_steps=0.1)
    if arm in ("untrained", "start"):
        names = [name for name in _DROPOUTS if hasattr(CONFIG_MAPPING[args.model_type](), name)]
        options |= sizes_of(args.hidden_size, args.num_hidden_layers, model_type=args.model_type)
        options["config_overrides"] = json.dumps(dict.fromkeys(names, args.dropout))
    else:
        options |= {"model_name_or_path": str(begin_folder(seed, args)), "learning_rate": args.further_rate}
    if arm in CONTRASTIVE:
        options |= CONTRASTIVE[arm] | {"pooling": args.pooling}
    return "contrastive" if arm in CONTRASTIVE else "mlm", command_line(options)


def train_arm(arm: str, seed: int, args: VectorArguments, folder: Path) -> dict[str, Any]:
    """Train an arm by its program with its budget, or leave it as it is built; its folder has the export."""
    name, argv = command(arm, seed, args, folder)
    trainer = trainer_of_program(name, argv, args)
    if arm == "untrained":
        trainer.save_model()
        return {"steps": 0, "flops": 0, "seconds": 0}
    step = flops_of_a_step(trainer)
    steps = max(1, round((args.start_flops if arm == "start" else args.flops) / step))
    _, row = train_by_program(name, argv, steps=steps)
    return row | {"steps": steps, "flops": steps * step}


def trained_start(seed: int, args: VectorArguments) -> dict[str, Any]:
    """Return what was measured of the masked language model that the arms of a seed start from; the first process trains it."""
    folder = begin_folder(seed, args)
    path = folder / "start.json"
    with FileLock(f"{folder}.lock"):
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if kept.get("settings") != args.settings():
            kept = {"settings": args.settings(), "row": train_arm("start", seed, args, folder)}
            path.write_text(json.dumps(kept), encoding="utf-8")
    return kept["row"]


# What the vectors are judged by


class Search(NamedTuple):
    """A task of finding.

    Attributes:
        queries: Texts that look for something.
        documents: The parts of each document, one or more.
        relevant: Number of the right document of each query.
    """

    queries: list[str]
    documents: list[list[str]]
    relevant: list[int]


def first_line_pairs(texts: Iterable[str], *, limit: int | None = None) -> Search:
    """Return a search of the rest of each text by its first line.

    Texts with a first line of fewer than 3 words, or a rest of fewer than 30, are left out, and so is a text whose first line or
    rest was there before.

    Args:
        texts: Texts of several lines, such as the docstrings of a module.
        limit: Most texts; all by default.
    """
    seen: set[str] = set()
    queries: list[str] = []
    documents: list[list[str]] = []
    for text in texts:
        first, _, rest = text.strip().partition("\n")
        first, rest = first.strip(), rest.strip()
        if len(first.split()) < _LEAST_TITLE or len(rest.split()) < _LEAST_WORDS or {first, rest} & seen:
            continue
        seen |= {first, rest}
        queries.append(first)
        documents.append([rest])
        if len(queries) == limit:
            break
    return Search(queries, documents, list(range(len(queries))))


def paragraph_pairs(chapters: Iterable[str], *, per_chapter: int = 10, seed: int = 0) -> Search:
    """Return a search of chapters by paragraphs that were taken out of them.

    The paragraphs that look for their chapter have 30 words or more. At least half of a chapter's paragraphs stay in it; a
    chapter of one paragraph is no document.

    Args:
        chapters: Chapters, a paragraph a line.
        per_chapter: Most paragraphs that are taken out of a chapter.
        seed: Key of the choice.
    """
    queries: list[str] = []
    documents: list[list[str]] = []
    relevant: list[int] = []
    for chapter in chapters:
        paragraphs = [line.strip() for line in chapter.split("\n") if line.strip()]
        if len(paragraphs) < 2:
            continue
        number = len(documents)
        order = draws.permutation(len(paragraphs), seed=seed, epoch=number, stream="paragraphs").tolist()
        long = [row for row in order if len(paragraphs[row].split()) >= _LEAST_WORDS]
        taken = sorted(long[: min(per_chapter, len(paragraphs) // 2)])
        queries += [paragraphs[row] for row in taken]
        relevant += [number] * len(taken)
        documents.append([text for row, text in enumerate(paragraphs) if row not in taken])
    return Search(queries, documents, relevant)


class Exams(NamedTuple):
    """What the vectors are judged by: scored pairs by split, and searches."""

    pairs: dict[str, ScoredPairs]
    searches: dict[str, Search]


def scored_pairs(args: VectorArguments, split: str) -> ScoredPairs:
    """Return the pairs of a split of STS-B."""
    return read_scored_pairs(Path(args.data_dir, "stsb", f"{split}.csv"))


@cache
def read_exams(data_dir: str, validation_file: tuple[str, ...], *, modules: int, paragraphs: int) -> Exams:
    """Read them all, once in a process."""
    stsb = Path(data_dir, "stsb")
    pairs = {split: read_scored_pairs(stsb / f"{split}.csv") for split in ("dev", "test")}
    searches = {
        "docstrings": first_line_pairs(docstring_documents(), limit=modules),
        "novels": paragraph_pairs(read_documents(validation_file), per_chapter=paragraphs),
    }
    return Exams(pairs, searches)


class Encoder(NamedTuple):
    """A model whose vectors are judged."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modules: SentenceModules
    max_length: int

    @classmethod
    def open(cls, folder: Path, args: VectorArguments) -> Encoder:
        """Open an export by the stock classes."""
        modules = SentenceModules.read(str(folder)) or SentenceModules({"pooling_mode": args.pooling})
        # A masked language model loses its head here, which transformers has a table of warnings for.
        with quiet():
            model = AutoModel.from_pretrained(folder)
        return cls(model, AutoTokenizer.from_pretrained(folder), modules, args.block_size)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Return ``float32 [N, E]``."""
        model, tokenizer, modules, max_length = self
        return text_vectors(model, tokenizer, texts, modules=modules, max_length=max_length)


def means_of_parts(vectors: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return the mean of the unit vectors of each document's parts.

    Args:
        vectors: ``[P, E]`` vectors of all parts, document by document.
        counts: Parts of each document.

    Returns:
        ``[N, E]``.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    begins = np.cumsum([0, *counts[:-1]])
    return np.add.reduceat(unit, begins) / np.array(counts)[:, None]


def judge(encoder: Encoder, exams: Exams) -> dict[str, float]:
    """Measure the vectors of an encoder."""
    found: dict[str, float] = {}
    for split, pairs in exams.pairs.items():
        first, second = encoder.vectors(pairs.first), encoder.vectors(pairs.second)
        found[f"stsb_{split}"] = similarity_correlation(first, second, pairs.scores)
        if split == "dev":
            alike = pairs.scores >= _ALIKE
            found["alignment"] = alignment_uniformity(first[alike], second[alike]).alignment
            found["uniformity"] = alignment_uniformity(first, second).uniformity
    for name, search in exams.searches.items():
        parts = encoder.vectors([part for document in search.documents for part in document])
        documents = means_of_parts(parts, [len(document) for document in search.documents])
        recalls = retrieval_recall(encoder.vectors(search.queries), documents, search.relevant)
        found |= {f"{name}_{metric}": value for metric, value in recalls.items()}
    return found


# Supervised steps


def pair_batches(num_pairs: int, *, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the pairs of each step, ``int64 [batch_size]``; epochs have a keyed order, and what fills no batch is left out."""
    size = min(batch_size, num_pairs)
    epochs = (draws.permutation(num_pairs, seed=seed, epoch=epoch, stream="pairs") for epoch in itertools.count())
    batches = (order[first : first + size] for order in epochs for first in range(0, num_pairs - size + 1, size))
    return itertools.islice(batches, steps)


def tune(encoder: Encoder, pairs: ScoredPairs, *, steps: int, batch_size: int, rate: float, seed: int) -> float:
    """Train an encoder on scored pairs, in place: the cosine is to be the score's share of the highest one.

    Args:
        encoder: The encoder.
        pairs: Pairs with scores from 0 to 5.
        steps: Steps.
        batch_size: Pairs a step.
        rate: Peak rate of AdamW, reached after a tenth of the steps; it falls to zero.
        seed: Seed of the order and of dropout.

    Returns:
        The mean loss of the last tenth of the steps.

    Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3 (regression).
    """
    model, tokenizer, modules, max_length = encoder
    set_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    losses = []
    for rows in pair_batches(len(pairs.scores), batch_size=batch_size, steps=steps, seed=seed):
        texts = [side[row] for side in (pairs.first, pairs.second) for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batch = batch.to(model.device)
        states_BLD = model(**batch).last_hidden_state
        first_BE, second_BE = modules.vectors(states_BLD, batch["attention_mask"]).chunk(2)
        cosines_B = torch.cosine_similarity(first_BE, second_BE)
        target_B = torch.from_numpy(pairs.scores[rows] / _HIGHEST).to(cosines_B)
        loss = (cosines_B - target_B).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def run_arm(arm: str, seed: int, args: VectorArguments) -> dict[str, Any]:
    """Train an arm and judge its vectors, before and after the supervised steps."""
    exams = read_exams(args.data_dir, tuple(args.validation_file), modules=args.modules, paragraphs=args.paragraphs)
    folder = args.runs_folder() / f"{arm}-{seed}"
    # The arms continue it.
    row = {} if arm == "untrained" else trained_start(seed, args)
    if arm != "start":
        row = train_arm(arm, seed, args, folder)
    encoder = Encoder.open(folder, args)
    row |= judge(encoder, exams)
    if args.tune_steps:
        begin = time.perf_counter()
        row["tune_loss"] = tune(
            encoder,
            scored_pairs(args, "train"),
            steps=args.tune_steps,
            batch_size=args.tune_batch_size,
            rate=args.tune_rate,
            seed=seed,
        )
        row["tune_seconds"] = round(time.perf_counter() - begin)
        row |= {f"tuned_{name}": value for name, value in judge(encoder, exams).items()}
    sizes = {name: len(search.documents) for name, search in exams.searches.items()}
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    return row | {"documents": sizes, "parameters": parameters, "threads": torch.get_num_threads()}


MEASURES = (
    Column("STS-B dev", "stsb_dev", 100, 1),
    Column("test", "stsb_test", 100, 1),
    Column("docstrings @1", "docstrings_recall_at_1", 100, 1),
    Column("@10", "docstrings_recall_at_10", 100, 1),
    Column("novels @1", "novels_recall_at_1", 100, 1),
    Column("@10", "novels_recall_at_10", 100, 1),
    Column("alignment", "alignment", 1, 3),
    Column("uniformity", "uniformity", 1, 2),
)
COST = (Column("FLOPs", "flops", 1, None), Column("steps", "steps"), Column("seconds", "seconds"))


def print_results(path: Path) -> None:
    """Print two tables for each set of settings in the results: before and after the supervised steps, in points."""
    for settings, rows in rows_by_settings(path).items():
        print(f"\n{settings}\n\nAs they are trained; FLOPs without those of the start")
        print_arms(rows, ARMS, (*MEASURES, *COST))
        tuned = [row for row in rows if "tune_loss" in row]
        if tuned:
            print("\nAfter the supervised steps")
            columns = [column._replace(name=f"tuned_{column.name}") for column in MEASURES]
            print_arms(tuned, ARMS, (*columns, Column("loss", "tune_loss", 1, 4), Column("seconds", "tune_seconds")))


if __name__ == "__main__":
    compare_arms(VectorArguments, description=__doc__, run_arm=run_arm, results=print_results)
