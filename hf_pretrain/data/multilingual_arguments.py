"""Options of text in several languages."""

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError

# Options that say what to read where languages are not told apart.
_OF_ONE_TEXT = ("train_file", "validation_file", "dataset_name", "max_corpus_bytes")


@dataclass
class MultilingualDataArguments(DataArguments):
    """Which text is trained on; with `language_file` or `parallel_file`, text of several languages."""

    language_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text of several languages instead of train_file: LANGUAGE=FILE[,FILE...] for each, such as "
            "'en=a.txt de=b.txt'; files as in train_file."
        },
    )
    parallel_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sentences and their translations: FIRST-SECOND=FILE,FILE for files of parallel lines, such as "
            "'en-de=a.en,a.de', or FIRST-SECOND=FILE for tab-separated columns, or fields (JSON, tables, "
            "Parquet) named by the languages; compressed files too."
        },
    )
    language_sampling_alpha: float = field(
        default=0.5,
        metadata={
            "help": "Languages are sampled proportionally to their share of the text to this power: 1 as they are, 0 "
            "all equally. The same holds for pairs of languages, and for a tokenizer to train."
        },
    )
    bitext_share: float = field(
        default=0.5,
        metadata={"help": "Share of the examples that are translations, where there is text of both kinds."},
    )
    bitext_frame: Literal["each", "pair"] = field(
        default="each",
        metadata={
            "help": "Special tokens of a sentence and its translation: those of 'each' alone (XLM: </s> x </s> </s> y "
            "</s>), or as the tokenizer joins a 'pair'."
        },
    )
    tokenizer_frame: Literal["own", "xlm"] = field(
        default="own",
        metadata={
            "help": "Special tokens around a text, of a tokenizer to train for several languages: its kind's 'own', or "
            "as 'xlm', which has </s> for both ends."
        },
    )
    mixture_unit: Literal["step", "example"] = field(
        default="step",
        metadata={
            "help": "What is of one language or one pair of languages: each training step (XLM), or each example."
        },
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            InputError: If text of one language and of several are asked for, or an entry or a number is wrong.
        """
        super().__post_init__()
        if self.is_multilingual:
            given = "language_file" if self.language_file else "parallel_file"
            wrong = [name for name in _OF_ONE_TEXT if getattr(self, name)]
            if wrong:
                raise InputError(
                    f"{wrong[0]}={getattr(self, wrong[0])!r} does not go with {given}: name all text by its language, of "
                    "which validation_fraction is held out"
                )
            if self.streaming:
                raise InputError(f"streaming does not go with {given}: languages are mixed from stored documents")
            if self.block_mode == "isolated_documents":
                raise InputError(
                    f"block_mode='isolated_documents' does not go with {given}: use 'doc_sentences', where documents do "
                    "not meet either"
                )
        for name in ("language_sampling_alpha", "bitext_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must be from 0 to 1; 0.5 is usual")
        self.language_files()
        self.parallel_files()

    @property
    def is_multilingual(self) -> bool:
        """Whether languages are told apart."""
        return bool(self.language_file or self.parallel_file)

    def language_files(self) -> dict[str, list[str]]:
        """Return the files of each language, by its name."""
        files: dict[str, list[str]] = {}
        for entry in self.language_file or []:
            language, paths = _parse("language_file", entry, pattern=r"\w+", form="LANGUAGE=FILE, such as en=a.txt")
            files.setdefault(language, []).extend(paths)
        return files

    def parallel_files(self) -> dict[str, list[list[str]]]:
        """Return what was given for each pair of languages, such as "en-de": two files, or one with both languages."""
        files: dict[str, list[list[str]]] = {}
        form = "FIRST-SECOND=FILE,FILE or FIRST-SECOND=FILE, such as en-de=a.en,a.de"
        for entry in self.parallel_file or []:
            name, paths = _parse("parallel_file", entry, pattern=r"\w+-\w+", form=form)
            first, second = name.split("-")
            if len(paths) > 2:
                raise InputError(f"parallel_file={entry!r} names {len(paths)} files: write {form}")
            if first == second:
                raise InputError(f"parallel_file={entry!r} is of one language: name the two by different names")
            if f"{second}-{first}" in files:
                raise InputError(
                    f"parallel_file names both {second}-{first} and {name}, which are the same: keep to one order"
                )
            files.setdefault(name, []).append(paths)
        return files

    def languages(self) -> list[str]:
        """Return the names of all languages, sorted."""
        pairs = [pair.split("-") for pair in self.parallel_files()]
        return sorted({*self.language_files(), *itertools.chain.from_iterable(pairs)})


def _parse(option: str, entry: str, *, pattern: str, form: str) -> tuple[str, list[str]]:
    name, _, rest = entry.partition("=")
    paths = rest.split(",")
    if not re.fullmatch(pattern, name) or not all(paths):
        raise InputError(
            f"{option}={entry!r}: write {form}; names are letters, digits and _, and files are divided by commas"
        )
    return name, paths
