"""How should an encoder go on, on text of a domain? By masked, next or replaced tokens; with all weights or LoRA. Equal tokens.

    python benchmarks/domain_adaptation.py --data_dir data [--arm none mlm detour] [--seed 0 1] [--steps 1000]
    python benchmarks/domain_adaptation.py --table

    none      the encoder as it is: a masked language model of novels
    mlm       masked tokens of the domain: 30 % of them, and 15 % in the last fifth of the steps, while the rate decays
    detour    next tokens of the domain for four fifths of the steps; the last fifth is that of `mlm` (recipe clm_detour)
    rtd       replaced tokens, 15 %; the generator is the encoder too, and goes on with the discriminator
    *_lora    the same with LoRA in all linear layers of the body, at a rate of its own
    mlm_words, mlm_vectors
              `mlm`, with a token for each of the 500 words that save most tokens: its row begins as the mean of its pieces, or
              half as a mean of known words near it in vectors of the docstrings (`hf-pretrain adapt --init_embeddings auto`)

The domain is the docstrings of the installed Python packages. The arms of a seed begin with one encoder, a ModernBERT that is
trained on the books by `hf-pretrain mlm`, with its tokenizer. All go on in two phases with one curve of the rate, on as many
tokens of text. Then a logistic regression reads three tasks off the mean of the frozen encoder's output, and the encoder is
fine-tuned on two of them:

    packages  which of eight packages a module's docstrings are from, by 250 modules of each or as many as there are
    sections  whether a passage describes an argument or what a function returns
    order     whether two neighbouring words of a sentence have changed places, which a bag of words cannot see

Three quarters of the examples are trained on. Those of `sections` and `order` are of modules that no arm has read. The bits a
byte are those of held-out docstrings: each token's log-likelihood with what is right of it in its word hidden. The MLM loss is
that of 15 % masked tokens, which does not compare with that of other tokens. Arms of masked tokens are also measured on those 500
words alone: nats a word, at the begin and at the end; masks show how many pieces a word has. TF-IDF with the same classifier
stands beside them, of words, and of words and pairs of them.

The folder `data_dir` holds books/train.txt.xz. Each run is a row of the file `results`: what is there is not run again, and
several processes may fill it, each with arms and seeds of its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import yaml
from filelock import FileLock
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hf_pretrain import FineTuningArguments, encode, fine_tune, probe_accuracy, rolling_perplexity
from hf_pretrain.data import draws
from hf_pretrain.data.documents.words import letter_words
from hf_pretrain.data.text.docstrings import docstring_documents, module_docstrings, split_held_out
from hf_pretrain.evaluation.token_scores import encode_words, masked_scores
from hf_pretrain.options import option
from hf_pretrain.tasks.spec import TaskSpec
from hf_pretrain.transfer.adaptation import (
    choose_words,
    extend_checkpoint,
    extended_tokenizer,
    normalized,
    token_counts,
    token_vectors,
)
from results import (
    Column,
    ComparisonArguments,
    command_line,
    compare_arms,
    sizes_of,
    train_by_program,
)

PACKAGES = ("datasets", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "torch", "transformers")
TASKS = ("packages", "sections", "order")
FINE_TUNED = ("sections", "order")
ARMS = (
    "tfidf",
    "tfidf_pairs",
    "none",
    "mlm",
    "detour",
    "rtd",
    "mlm_lora",
    "detour_lora",
    "rtd_lora",
    "mlm_words",
    "mlm_vectors",
)
_MODULES, _CHARACTERS, _LEAST = 250, 600, 200
# Passages and sentences of a class, and the characters of a passage.
_EXAMPLES, _PASSAGE = 2000, (30, 300)
# Texts, and their characters, of which the bits a byte are measured.
_SCORED_TEXTS, _SCORED_CHARACTERS = 40, 1500
# The first entry of a section, as NumPy and as Google write it: its indented lines.
_NUMPY = re.compile(r"^(Parameters|Returns)\n-{3,}\n\S.*\n(?P<text>(?: {4}.*\n?)+)", re.M)
_GOOGLE = re.compile(r"^(Args|Returns):\n(?P<text> {4}.*\n?(?: {5,}.*\n?)*)", re.M)
# New words, and how many of their occurrences are scored, in passages of so many characters.
_NEW_WORDS, _SCORED_WORDS, _PASSAGE_OF_WORD = 500, 600, 160
_SENTENCE = re.compile(r"(?<![\w.])[A-Z][a-z]+(?: [a-z]+,?){5,20} ?[a-z]+\.(?=\s|$)")


@dataclass
class AdaptationArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = option("domain_adaptation.json", "File that each run adds a row to.")
    start_steps: int = option(3000, "Steps on the books.")
    steps: int = option(1500, "Steps on the docstrings.")
    batch_size: int = option(32, "Examples a step.")
    max_corpus_bytes: int | None = option(20_000_000, "Train on a random part of the books.")
    docstring_bytes: int = option(12_000_000, "Train on a random part of the docstrings.")
    hidden_size: int = option(128, "Width; a head for every 32.")
    num_hidden_layers: int = option(6, "Layers.")
    further_rate: float = option(5e-4, "Peak rate on the docstrings.")
    adapter_rate: float = option(2e-3, "The same, of LoRA.")
    fine_tuning_rate: float = option(3e-4, "Peak rate of the fine-tuning.")

    def __post_init__(self) -> None:
        """Read the books, if no other text is named."""
        if not self.train_file and not self.table:
            self.train_file = [str(Path(self.data_dir, "books", "train.txt.xz"))]
        super().__post_init__()


# Training


def start_folder(seed: int, args: AdaptationArguments) -> Path:
    """Return the folder of the encoder that the arms of a seed begin with; the first process trains it."""
    folder = args.runs_folder() / f"start-{seed}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").exists():
            options = args.training(folder, seed, warmup_steps=0.1, eval_strategy="no")
            options |= sizes_of(args.hidden_size, args.num_hidden_layers, model_type="modernbert")
            options |= {
                "train_file": args.train_file,
                "max_corpus_bytes": args.max_corpus_bytes,
                "document_separator": args.document_separator,
                "vocab_size": args.vocab_size,
                "block_size": args.block_size,
                "mlm_probability": 0.3,
            }
            train_by_program("mlm", command_line(options), steps=args.start_steps)
    return folder


def domain_files(args: ComparisonArguments, *, docstring_bytes: int) -> dict[str, list[str]]:
    """Return a file with docstrings to train on, and one with some that are held out; a document is a line of JSON."""
    folder = args.runs_folder()
    paths = [folder / f"docstrings-{name}.jsonl" for name in ("train", "held-out")]
    with FileLock(folder / "docstrings.lock"):
        if not paths[1].exists():
            texts = list(docstring_documents(max_bytes=docstring_bytes))
            for path, rows in zip(paths, split_held_out(len(texts), 0.01), strict=True):
                path.write_text("\n".join(json.dumps({"text": texts[row]}) for row in rows), encoding="utf-8")
    return {"train_file": [str(paths[0])], "validation_file": [str(paths[1])]}


def documents_of(path: str) -> list[str]:
    """Return the documents of a file with a document in a line of JSON."""
    return [json.loads(line)["text"] for line in Path(path).open(encoding="utf-8")]


def new_words(seed: int, args: AdaptationArguments) -> list[str]:
    """Return the words of the docstrings that save most tokens; the first process chooses them."""
    path, start = args.runs_folder() / f"words-{seed}.json", start_folder(seed, args)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            texts = documents_of(domain_files(args, docstring_bytes=args.docstring_bytes)["train_file"][0])
            chosen = choose_words(texts, AutoTokenizer.from_pretrained(start), _NEW_WORDS)
            path.write_text(json.dumps([word.text for word in chosen]), encoding="utf-8")
    words: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return words


def begin(arm: str, seed: int, args: AdaptationArguments) -> Path:
    """Return the folder of the encoder that an arm begins with: that of its seed, or the same with new words."""
    start = start_folder(seed, args)
    if not arm.endswith(("_words", "_vectors")):
        return start
    folder, words = args.runs_folder() / f"begin-{arm}-{seed}", new_words(seed, args)
    texts = documents_of(domain_files(args, docstring_bytes=args.docstring_bytes)["train_file"][0])
    vectors = None
    if arm.endswith("_vectors"):
        extended = extended_tokenizer(AutoTokenizer.from_pretrained(start), words)
        vectors = token_vectors(lambda: texts, extended, folder.with_name(f"{folder.name}-work"), seed=seed)
    extend_checkpoint(str(start), AutoModelForMaskedLM, words, folder, vectors=vectors)
    return folder


def phases_of(objective: str) -> list[dict[str, Any]]:
    """Return the two phases of an objective: four fifths of the steps, and a last fifth in which the rate decays."""
    stable = {"name": "stable", "share": "80%", "rate": "0%:0, 5%:1"}
    decay = {"name": "decay", "share": "20%", "rate": "0%:1, 100%:0"}
    if objective == "rtd":
        return [stable, decay]
    first = {"objectives": ["clm"]} if objective == "detour" else {"objectives": ["mlm"], "mlm_probability": 0.3}
    return [stable | first, decay | {"objectives": ["mlm"], "mlm_probability": 0.15}]


def go_on(arm: str, seed: int, args: AdaptationArguments) -> tuple[Path, dict[str, Any]]:
    """Train an arm on the docstrings, in two phases."""
    objective, _, kind = arm.partition("_")
    adapter = kind if kind == "lora" else None
    start, folder = begin(arm, seed, args), args.runs_folder() / f"{arm}-{seed}"
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({"phases": phases_of(objective)}), encoding="utf-8")
    rate = args.adapter_rate if adapter else args.further_rate
    options = args.training(folder, seed, learning_rate=rate, save_strategy="steps", save_steps=10**6)
    options |= domain_files(args, docstring_bytes=args.docstring_bytes) | {
        "model_name_or_path": str(start),
        "block_size": args.block_size,
        "block_mode": "doc_sentences",
        "eval_strategy": "no",
        "adapter": adapter,
    }
    if objective == "rtd":
        options |= {"generator_name_or_path": str(start), "mlm_probability": 0.15}
    program = "rtd" if objective == "rtd" else "encoder"
    _, row = train_by_program(program, ["--config", str(recipe), *command_line(options)], steps=args.steps)
    return folder, row


# Tasks


class Exam(NamedTuple):
    """Examples of a task; the first three quarters are trained on."""

    texts: list[str]
    labels: list[int]

    def split(self) -> tuple[Exam, Exam]:
        """Return what is trained on, and the rest."""
        count = len(self.texts) * 3 // 4
        return Exam(self.texts[:count], self.labels[:count]), Exam(self.texts[count:], self.labels[count:])


def labelled_modules() -> tuple[list[str], list[int]]:
    """Return the beginnings of docstrings of modules, and the numbers of their packages."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
        chosen = 0
        for number in draws.permutation(len(files), seed=0, stream=package).tolist():
            text = module_docstrings(files[number])[:_CHARACTERS]
            if len(text) >= _LEAST:
                texts.append(text)
                labels.append(label)
                chosen += 1
            if chosen == _MODULES:
                break
    return texts, labels


def passages(documents: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield what the first entry of a section says, without its name and type, and whether the section is `Returns`."""
    for document in documents:
        for pattern in (_NUMPY, _GOOGLE):
            for match in pattern.finditer(document):
                text = " ".join(match["text"].split())
                text = text.split(": ", 1)[-1] if pattern is _GOOGLE else text
                if _PASSAGE[0] <= len(text) <= _PASSAGE[1] and ": " not in text:
                    yield text, int(match[1] == "Returns")


def sentences(documents: Iterable[str]) -> Iterator[str]:
    """Yield sentences of plain words."""
    for document in documents:
        yield from (match[0] for match in _SENTENCE.finditer(" ".join(document.split())))


def with_swapped_words(sentence: str, number: int) -> str:
    """Return a sentence of which two different neighbours inside have changed places, by a draw for its number."""
    words = sentence.split()
    places = [place for place in range(1, len(words) - 2) if words[place] != words[place + 1]]
    place = places[draws.permutation(len(places), seed=number, stream="swapped words")[0]]
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def unread_examples(args: AdaptationArguments) -> dict[str, tuple[list[str], list[int]]]:
    """Return the examples of `sections` and `order`: of modules that no arm reads, without what the others have too."""
    files = domain_files(args, docstring_bytes=args.docstring_bytes)
    read = [text for name in files.values() for text in documents_of(name[0])]
    unread = sorted(set(docstring_documents()) - set(read))
    known = {text for text, _ in passages(read)} | set(sentences(read))
    texts, labels = [], []
    found = [(text, label) for text, label in dict(passages(unread)).items() if text not in known]
    for label in (0, 1):
        chosen = [text for text, own in found if own == label]
        order = draws.permutation(len(chosen), seed=label, stream="passages")[:_EXAMPLES].tolist()
        texts += [chosen[row] for row in order]
        labels += [label] * len(order)
    whole = sorted(set(sentences(unread)) - known)
    rows = draws.permutation(len(whole), seed=0, stream="sentences")[: 2 * _EXAMPLES].tolist()
    order_texts = [with_swapped_words(whole[row], n) if n % 2 else whole[row] for n, row in enumerate(rows)]
    return {"sections": (texts, labels), "order": (order_texts, [n % 2 for n in range(len(rows))])}


def read_exams(args: AdaptationArguments) -> dict[str, Exam]:
    """Return the tasks, their examples in a random order; the first process makes them."""
    path = args.runs_folder() / "exams.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            found = {"packages": labelled_modules()} | unread_examples(args)
            path.write_text(json.dumps(found), encoding="utf-8")
    exams = {}
    for name, (texts, labels) in json.loads(path.read_text(encoding="utf-8")).items():
        order = draws.permutation(len(texts), seed=0, stream="modules").tolist()
        exams[name] = Exam([texts[row] for row in order], [labels[row] for row in order])
    return exams


# Measures


def tfidf_scores(exams: dict[str, Exam], *, most_words: int) -> dict[str, Any]:
    """Return the accuracy of a logistic regression on TF-IDF of words, and of runs of them, by task."""
    row: dict[str, Any] = {"seconds": 0}
    for name, exam in exams.items():
        train, test = exam.split()
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, most_words))
        model = make_pipeline(vectorizer, LogisticRegression(C=100, max_iter=1000))
        row[name] = float(model.fit(train.texts, train.labels).score(test.texts, test.labels))
    return row


def probe_scores(folder: Path, exams: dict[str, Exam], *, seed: int) -> dict[str, float]:
    """Return the accuracy of a linear probe of the frozen encoder, by task."""
    encoder, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    row = {}
    for name, exam in exams.items():
        train, test = exam.split()
        features = [encode(encoder, tokenizer, part.texts) for part in (train, test)]
        row[name] = probe_accuracy(features[0], train.labels, features[1], test.labels, seed=seed).accuracy
    return row


def fine_tuned_scores(folder: Path, exams: dict[str, Exam], *, seed: int, rate: float) -> dict[str, float]:
    """Return the accuracy after fine-tuning, by task."""
    row = {}
    for name in FINE_TUNED:
        files = []
        for split, part in zip(("train", "test"), exams[name].split(), strict=True):
            path = folder / f"{name}-{split}.jsonl"
            rows = zip(part.texts, part.labels, strict=True)
            path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
            files.append(str(path))
        task = TaskSpec(
            name=name, type="classification", text=("text",), train_file=(files[0],), validation_file=(files[1],)
        )
        options = FineTuningArguments(
            output_dir=str(folder / name),
            learning_rate=rate,
            num_train_epochs=3,
            warmup_steps=0.1,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        row[f"tuned_{name}"] = fine_tune(str(folder), task, options, max_length=64).score
    return row


def bits_per_byte(folder: Path, args: ComparisonArguments, held_out: str) -> float:
    """Return the bits of a byte of held-out docstrings by a masked language model, whatever its tokens are."""
    texts = [text[:_SCORED_CHARACTERS] for text in documents_of(held_out)[:_SCORED_TEXTS]]
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = rolling_perplexity(model, tokenizer, texts, window=args.block_size, within_word="l2r")
    return found.bits_per_byte


def nats_per_new_word(folder: Path, words: Sequence[str], held_out: str) -> float:
    """Return the mean loss of words in held-out docstrings, each the sum of its pieces, from left to right."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    known, passages, spans = set(words), list[str](), list[tuple[int, int]]()
    for text in documents_of(held_out):
        for first, end in letter_words(text):
            if normalized(text[first:end], tokenizer) in known:
                left = max(0, first - _PASSAGE_OF_WORD // 2)
                passages.append(text[left : end + _PASSAGE_OF_WORD // 2])
                spans.append((first - left, end - left))
    rows = draws.permutation(len(spans), seed=0, stream="new words")[:_SCORED_WORDS].tolist()
    chosen = [passages[row] for row in rows]
    encoded = encode_words(tokenizer, chosen)
    offsets = tokenizer(chosen, return_offsets_mapping=True)["offset_mapping"]
    asked = []
    for row, words_of, places in zip(rows, encoded, offsets, strict=True):
        inside = [min(end, spans[row][1]) > max(first, spans[row][0]) for first, end in places]
        asked.append(words_of._replace(scored=np.flatnonzero(inside)))
    found = masked_scores(model, tokenizer, asked, within_word="l2r", batch_size=64)
    return -sum(float(part.log_probabilities.sum()) for part in found) / len(rows)


def tokens_of_text(folder: Path, text: str) -> int:
    """Return how many tokens an encoder's tokenizer makes of the docstrings to train on."""
    return token_counts(documents_of(text), [AutoTokenizer.from_pretrained(folder)])[0]


def masked_measures(arm: str, folder: Path, seed: int, args: AdaptationArguments) -> dict[str, float]:
    """Return what is measured of masked language models: bits a byte, nats a new word, and the tokens of the text."""
    files = domain_files(args, docstring_bytes=args.docstring_bytes)
    held_out, words = files["validation_file"][0], new_words(seed, args)
    row = {
        "bits_per_byte": bits_per_byte(folder, args, held_out),
        "word_nats": nats_per_new_word(folder, words, held_out),
        "tokens_of_text": tokens_of_text(folder, files["train_file"][0]),
    }
    if arm.startswith("mlm_") and not arm.endswith("_lora"):
        row["first_word_nats"] = nats_per_new_word(args.runs_folder() / f"begin-{arm}-{seed}", words, held_out)
    return row


def run_arm(arm: str, seed: int, args: AdaptationArguments) -> dict[str, Any]:
    """Train an arm and measure it."""
    exams = read_exams(args)
    if arm.startswith("tfidf"):
        return tfidf_scores(exams, most_words=1 if arm == "tfidf" else 2)
    row: dict[str, Any]
    folder, row = (start_folder(seed, args), {"seconds": 0}) if arm == "none" else go_on(arm, seed, args)
    row["tokens"] = 0 if arm == "none" else args.steps * args.batch_size * args.block_size
    row |= probe_scores(folder, exams, seed=seed)
    row |= fine_tuned_scores(folder, exams, seed=seed, rate=args.fine_tuning_rate)
    if not arm.startswith("rtd"):
        row |= masked_measures(arm, folder, seed, args)
    if "mlm_loss" in row.get("held_out", {}) and not arm.startswith("rtd"):
        row["mlm_loss"] = row["held_out"]["mlm_loss"]
    return row


COLUMNS = (
    *(Column(f"{name}, frozen", name, 100, 1) for name in TASKS),
    *(Column(f"{name}, fine-tuned", f"tuned_{name}", 100, 1) for name in FINE_TUNED),
    Column("bits a byte", "bits_per_byte", 1, 3),
    Column("nats a new word, at the begin", "first_word_nats", 1, 2),
    Column("nats a new word, at the end", "word_nats", 1, 2),
    Column("tokens of the text", "tokens_of_text"),
    Column("held-out MLM loss", "mlm_loss", 1, 3),
    Column("tokens", "tokens", 1, None),
    Column("seconds", "seconds"),
)


if __name__ == "__main__":
    compare_arms(AdaptationArguments, description=__doc__, run_arm=run_arm, results=COLUMNS)
