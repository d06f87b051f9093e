"""Train a model of the Hub, or of a folder, further on text of a domain, with all its weights or with adapters alone.

    hf-pretrain adapt answerdotai/ModernBERT-base --train_file docs/ --output_dir my-domain-model
    hf-pretrain adapt bert-base-uncased --train_file docs/ --output_dir my-domain-model --adapter lora --new_words auto:500
    hf-pretrain adapt my-electra --objective rtd --train_file docs/ --output_dir my-domain-electra

It is the program of the objective with defaults that suit a model that goes on, and prints that command before it runs it. All
options of that program may follow: `hf-pretrain mlm --help`. The defaults are a learning rate of 5e-5, or 2e-4 with adapters;
and for masked language modelling of ModernBERT, its own share of masked tokens, 0.3. The rates are ours, and not tuned.

--new_words gives words of the domain that the tokenizer cuts into pieces a token each: `auto:500` chooses the 500 that save most
tokens of the text, a file names them, one a line. The row of such a word begins as the mean of its pieces; with
--init_embeddings one half of it is a mean of known words that stand near it in word vectors, which `auto` makes from the text.
--exchange_tokenizer trains another tokenizer on the text, and moves the model to it. Either is written beside the output folder,
as OUTPUT_DIR-start, from which the training begins.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_pretrain.cli import load_method, methods, run_named
from hf_pretrain.commands import parse_command
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.prepare import training_texts
from hf_pretrain.errors import InputError, check_range
from hf_pretrain.files import write_text
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.names import described_recipes
from hf_pretrain.options import option, read_recipes, recipe_names
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.output_folder import OutputFolder, check_replaceable, paths_in
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.processes import done_by_first
from hf_pretrain.transfer.adaptation import (
    NewWord,
    choose_words,
    exchange_tokenizer,
    extend_checkpoint,
    extended_tokenizer,
    normalized,
    read_words,
    replaced_at_once,
    token_counts,
    token_vectors,
)
from hf_pretrain.vectors.folder import WordVectors

_RECORD = "adaptation.json"
# Texts of which the tokens are counted before and after: their first bytes.
_MEASURED_BYTES = 20_000_000
_SHOWN_WORDS = 8
_OF_THE_TEXT = "auto"
_RATE, _ADAPTER_RATE = 5e-5, 2e-4
# Shares of masked tokens that models were trained with, as docs/adapt.md has them.
_MASK_RATES = {"modernbert": 0.3}


@dataclass
class AdaptArguments:
    """Options of ``hf-pretrain adapt``; all others are those of the program of the objective."""

    needs: ClassVar[dict[str, str]] = {"exchange_vocab_size": "exchange_tokenizer", "init_embeddings": "new_words"}
    ranges: ClassVar[dict[str, str]] = {"exchange_vocab_size": "[1, 16777216]"}

    model: str = option(
        help="Model to go on with, on the Hub or in a folder; it may be given without the name of the option."
    )
    objective: Literal["mlm", "rtd", "clm", "clm_detour"] = option(
        "mlm",
        "What is learned: masked tokens, replaced tokens (with the pair's generator, or a fresh one), the next token, or first "
        "the next token and at the end masked ones.",
    )
    new_words: str | None = option(
        None,
        "Words that get a token: auto:500 for those that save most tokens of the text, or a file, one word a line.",
    )
    init_embeddings: str | None = option(
        None,
        "Word vectors that the rows of the new words start from: a folder of hf-pretrain vectors, a model on the Hub, a file of "
        "word2vec, GloVe or fastText, or auto for vectors of the text itself.",
    )
    exchange_tokenizer: Literal["wordpiece", "bpe", "unigram"] | None = option(
        None, "Train a tokenizer of this kind on the text and move the model to it."
    )
    exchange_vocab_size: int | None = option(
        None, "Vocabulary of that tokenizer; by default as large as that of the model's."
    )

    def __post_init__(self) -> None:
        """Refuse two changes of the vocabulary at once, and new words that are neither a number nor a file."""
        if self.new_words is not None and self.exchange_tokenizer is not None:
            raise InputError(
                f"new_words={self.new_words!r} and exchange_tokenizer={self.exchange_tokenizer!r}: a new tokenizer has words of "
                "the text by itself: give one of the two"
            )
        if self.new_words is None or Path(self.new_words).is_file():
            return
        kind, _, count = self.new_words.partition(":")
        if kind != "auto" or not count.isdigit():
            raise InputError(
                f"new_words={self.new_words!r} is no file: name one with a word a line, or write auto:500 to choose 500 words"
            )
        check_range(int(count), "[1, 1048576]", name="new_words")

    @property
    def num_new_words(self) -> int | None:
        """How many words are to be chosen; None where a file names them."""
        assert self.new_words is not None, "asked where there are new words"
        return None if Path(self.new_words).is_file() else int(self.new_words.partition(":")[2])

    @property
    def auto_class(self) -> Any:
        """The Auto class that opens the model; None for a pair."""
        return {"rtd": None, "clm": AutoModelForCausalLM}.get(self.objective, AutoModelForMaskedLM)


ARGUMENTS = (AdaptArguments,)


def main(argv: list[str] | None = None) -> int | None:
    """Make the start, print the command that it comes to, and run it; see the top of the file."""
    own, others = split_options(argv or [])
    if not any(word.partition("=")[0] == "--model" for word in own) and (not own or own[0].startswith("-")):
        # A mistyped option is told before the model that is missing.
        own += _unknown(others)
    args: AdaptArguments = parse_command(ARGUMENTS, own, name="adapt", description=__doc__, first="model")
    if args.objective not in (*methods(), *described_recipes()):
        raise InputError(f"objective={args.objective!r} is no program of this version: choose mlm, rtd or clm")
    command = expanded(args, others)
    if args.new_words is not None or args.exchange_tokenizer is not None:
        command = _with_start(args, command)
    if os.environ.get("RANK", "0") == "0":
        print(f"adapt  hf-pretrain {' '.join(map(_quoted, command))}", flush=True)
    return run_named(command[0], command[1:])


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command line that are of `adapt`, and those of the program of the objective."""
    names = {f"--{known.name}" for known in dataclasses.fields(AdaptArguments)}
    own, others, words = [], [], list(argv)
    if words and not words[0].startswith("-"):
        own.append(words.pop(0))
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--help-all") or word.partition("=")[0] in names:
            own.append(word)
            if word in names and words:
                own.append(words.pop(0))
        else:
            others.append(word)
    return own, others


def _unknown(words: list[str]) -> list[str]:
    """Return the options that masked language modelling does not have, with what follows them."""
    known = {field.name for kind in load_method("mlm").arguments for field in dataclasses.fields(kind)} | {"config"}
    found = []
    for word, after in itertools.pairwise([*words, "--"]):
        if word.startswith("--") and word[2:].partition("=")[0] not in known:
            found += [word, *([] if after.startswith("--") else [after])]
    return found


def expanded(args: AdaptArguments, others: list[str]) -> list[str]:
    """Return the command that `adapt` stands for: the program, the model, our defaults, then the options that were given."""
    defaults: dict[str, Any] = {}
    # A recipe has rates of its own.
    if args.objective in methods():
        given = _given(others)
        defaults["learning_rate"] = _RATE if given.get("adapter", "none") == "none" else _ADAPTER_RATE
        if args.objective == "mlm" and (rate := _mask_rate(args.model)) is not None:
            defaults["mlm_probability"] = rate
        defaults = {name: value for name, value in defaults.items() if name not in given}
    words = itertools.chain.from_iterable((f"--{name}", f"{value:g}") for name, value in defaults.items())
    return [args.objective, "--model_name_or_path", args.model, *words, *others]


def _given(words: list[str]) -> dict[str, Any]:
    """Return the options of recipes and of a command line; of several words of one the first."""
    found: dict[str, Any] = {}
    for _, recipe in read_recipes(recipe_names(words)):
        found |= recipe
    for word, after in itertools.pairwise([*words, ""]):
        if word.startswith("--"):
            name, is_joined, value = word[2:].partition("=")
            found[name] = value if is_joined else after
    return found


def _mask_rate(name: str) -> float | None:
    return _MASK_RATES.get(from_pretrained(AutoConfig, name).model_type)


def _quoted(word: str) -> str:
    return repr(word) if not word or any(character.isspace() for character in word) else word


# The start


def _with_start(args: AdaptArguments, command: list[str]) -> list[str]:
    """Return the command on a model with other words, which is written beside the output folder unless it is there."""
    data_args, training = _parsed(command)
    if data_args.streaming:
        raise InputError(
            "streaming=True: words are counted on stored text: leave it out, or name a file with new_words"
        )
    start = Path(training.output_dir).resolve()
    start = start.with_name(f"{start.name}-start")
    wanted = json.loads(json.dumps(_wanted(args, data_args)))
    record = done_by_first(training, lambda: _found_or_written(start, args, data_args, training, wanted))
    changed = [*command]
    changed[changed.index("--model_name_or_path") + 1] = os.path.relpath(start)
    if training.adapter != "none":
        changed += (
            ["--adapter_first_new_token", str(record["first_new_token"])]
            if args.new_words
            else ["--adapter_train_embeddings", "true"]
        )
    return changed


def _parsed(command: list[str]) -> tuple[DataArguments, PretrainingArguments]:
    """Return the options of text and of training that a command has."""
    name, options = command[0], command[1:]
    if name not in methods():
        name, options = described_recipes()[name][0], ["--config", name, *options]
    method = load_method(name)
    found = parse_arguments(method.arguments, options, prog=f"hf-pretrain {name}", description=method.description)
    found[0].check_named()
    return found[0], found[2]


def _wanted(args: AdaptArguments, data_args: DataArguments) -> dict[str, Any]:
    """Return what decides the start."""
    names = "train_file dataset_name demo_corpus validation_file validation_fraction split_seed max_corpus_bytes text_column"
    text = {name: getattr(data_args, name) for name in [*names.split(), "document_separator"]}
    words = Path(args.new_words).read_text(encoding="utf-8") if args.new_words and args.num_new_words is None else ""
    return dataclasses.asdict(args) | {"text": text, "words": words}


def _found_or_written(
    start: Path,
    args: AdaptArguments,
    data_args: DataArguments,
    training: PretrainingArguments,
    wanted: dict[str, Any],
) -> dict[str, Any]:
    """Return the record of the start, which is written unless it is there; that of another run is replaced if that is wanted."""
    if start.exists() and _record(start).get("wanted") == wanted:
        return _record(start)
    if start.exists():
        if not training.overwrite_output_dir:
            raise InputError(
                f"output_dir={training.output_dir!r}: {start.name} beside it is the start of another run, with other words or "
                "text: replace both with --overwrite_output_dir, or name another output_dir"
            )
        # The earlier run goes with its start: all is checked before one of them goes.
        inputs = paths_in((args, data_args))
        OutputFolder(training, inputs).check_replaceable()
        check_replaceable(start, inputs=inputs, marks=(_RECORD,))
    replaced_at_once(start, lambda folder: _write_start(args, data_args, training, folder, wanted))
    return _record(start)


def _record(start: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((start / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _write_start(
    args: AdaptArguments,
    data_args: DataArguments,
    training: PretrainingArguments,
    folder: Path,
    wanted: dict[str, Any],
) -> None:
    """Write the model with other words, and say what they save."""
    is_of_text = args.init_embeddings == _OF_THE_TEXT
    vectors = None if is_of_text or args.init_embeddings is None else WordVectors.open(args.init_embeddings)
    stored = training_texts(data_args)

    def texts() -> Iterator[str | None]:
        return (text for batch in stored.iter(batch_size=1000) for text in batch["text"])

    if args.new_words is not None:
        words = _words(args, texts())
        _say_words(words)
        names = [word.text for word in words]
        if is_of_text:
            extended = extended_tokenizer(from_pretrained(AutoTokenizer, args.model), names)
            vectors = token_vectors(texts, extended, folder / "_vectors", seed=training.seed)
        old, new = extend_checkpoint(args.model, args.auto_class, names, folder, vectors=vectors)
    else:
        words = []
        old, new = _exchanged(args, texts, folder, seed=training.seed, block_size=data_args.block_size)
    before, after = token_counts(_first_texts(texts()), [old, new])
    print(
        f"tokens {before:,} of the training text before, {after:,} now ({after / max(1, before) - 1:+.1%})", flush=True
    )
    facts = {"words": [word._asdict() for word in words], "tokens_before": before, "tokens_after": after}
    facts |= {"first_new_token": max(old.get_vocab().values()) + 1, "wanted": wanted}
    write_text(folder / _RECORD, json.dumps(facts, ensure_ascii=False, indent=1))


def _words(args: AdaptArguments, texts: Iterable[str | None]) -> list[NewWord]:
    """Return the words that get a token."""
    tokenizer = from_pretrained(AutoTokenizer, args.model)
    assert args.new_words is not None, "the caller has looked"
    if args.num_new_words is None:
        return read_words(args.new_words, tokenizer)
    return choose_words(texts, tokenizer, args.num_new_words)


def _exchanged(
    args: AdaptArguments, texts: Any, folder: Path, *, seed: int, block_size: int
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Return the tokenizer as it was, and the one of the text, which the model in the folder now reads."""
    old = from_pretrained(AutoTokenizer, args.model)
    return exchange_tokenizer(
        args.model,
        args.auto_class,
        texts,
        folder,
        kind=args.exchange_tokenizer,
        vocab_size=args.exchange_vocab_size or len(old),
        lowercase=normalized("A", old) == "a",
        model_max_length=min(old.model_max_length, max(block_size, 512)),
        seed=seed,
    )


def _first_texts(texts: Iterable[str | None]) -> Iterator[str]:
    """Yield the first texts, of about so many bytes as are measured."""
    left = _MEASURED_BYTES
    for text in texts:
        if left <= 0:
            return
        left -= len((text or "").encode())
        yield text or ""


def _say_words(words: list[NewWord]) -> None:
    shown = ", ".join(f"{word.text} ({word.pieces} pieces)" for word in words[:_SHOWN_WORDS])
    print(f"words  {len(words):,} get a token each: {shown}{', ...' if len(words) > _SHOWN_WORDS else ''}", flush=True)
