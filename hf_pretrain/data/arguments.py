"""Options of the data path: which text is read, how it is cut, and how several languages are mixed."""

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from transformers.utils import logging

from hf_pretrain.data.documents.words import NamedSegmenter
from hf_pretrain.errors import InputError, check_numbers
from hf_pretrain.options import option

# Options of subclasses that name files of text.
_OTHER_FILES = ("language_file", "parallel_file")


# Options that name text without its language.
_OF_ONE_TEXT = ("prepared_data", "train_file", "validation_file", "dataset_name", "demo_corpus", "max_corpus_bytes")

_OF_TEXT = ("train_file", "validation_file", "dataset_name", "demo_corpus", "streaming")
OF_PREPARING = "text_column document_separator validation_fraction split_seed max_corpus_bytes word_segmenter".split()
"""Options by which text becomes documents; `hf-pretrain prepare` notes them in its folder."""
OF_TOKENIZER = "tokenizer_type vocab_size lowercase strip_accents".split()
"""Options of a tokenizer to train, which it notes where it trains one."""
# Recipes hold these, and suit runs with and without prepared data.
_ONLY_NOTED = (*OF_TOKENIZER, "validation_fraction", "max_corpus_bytes")

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """Which text is trained on and how it is cut.

    Raises:
        InputError: If two options exclude each other, or a number is out of range.
    """

    # A block has room for two special tokens and two of text.
    ranges: ClassVar[dict[str, str]] = {
        "validation_fraction": "[0, 1)",
        "max_corpus_bytes": "[1, 4611686018427387904]",
        "preprocessing_num_workers": "[1, 1024]",
        "block_size": "[4, 1048576]",
        "vocab_size": "[1, 16777216]",
        "shuffle_buffer_size": "[0, 1073741824]",
        "split_seed": "[0, 9223372036854775807]",
    }

    train_file: list[str] | None = option(
        None,
        "Text to train on: text, JSON, CSV, TSV, Parquet or Arrow files (compressed by gzip, xz, bzip2, zstd or lz4 "
        "too), folders, globs, or - for the standard input.",
    )
    validation_file: list[str] | None = option(
        None, "Text to evaluate on; without it, documents are held out from training."
    )
    dataset_name: str | None = option(
        None, "Instead of train_file: a dataset of the Hub, or a folder for load_dataset."
    )
    prepared_data: str | None = option(
        None,
        "Instead of train_file: a folder of `hf-pretrain prepare`, with text that is tokenized already and its tokenizer.",
    )
    demo_corpus: bool = option(
        False, "Instead of train_file: the docstrings of the installed Python packages, to try something out."
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    dataset_split: str = option("train", "Split of the dataset to train on.")
    text_column: str = option("text", "Column or JSON field that holds the text.")
    document_separator: Literal["blank_line", "line", "file"] = option(
        "blank_line", "What ends a document of a text file."
    )
    on_bad_text: Literal["refuse", "skip"] | None = option(
        None,
        "Refuse files with a document that is not UTF-8 or a row that is not JSON, or skip such documents: up to "
        "10, and of more than 1000 up to one in a hundred. By default skip while streaming, else refuse.",
    )
    validation_fraction: float = option(
        0.02, "Share of the documents held out if there is no validation_file; 0 holds none."
    )
    split_seed: int = option(
        0,
        "Seed of the choice of documents to hold out and of max_corpus_bytes; apart from the seed of the "
        "run, so that runs of several seeds see the same data.",
    )
    max_corpus_bytes: int | None = option(None, "Use a random part of the documents, of about so many bytes.")
    tokenizer_name: str | None = option(
        None, "Tokenizer of the Hub or a folder; without it, one is trained on the text."
    )
    tokenizer_type: Literal["auto", "wordpiece", "bpe", "unigram"] = option(
        "auto",
        "Kind of tokenizer to train: as BERT's, RoBERTa's or SentencePiece's; 'auto' takes the one that suits "
        "the text.",
    )
    vocab_size: int = option(30522, "Vocabulary of a tokenizer to train, in tokens.")
    lowercase: bool | None = option(
        None,
        "Lower the case, in a tokenizer to train; by default, unless the text is program code or the like. "
        "Accents stay.",
    )
    strip_accents: bool = option(
        False, "Strip accents, vowel signs and tones, in a tokenizer to train, as the uncased BERT does."
    )
    max_unknown_share: float = option(
        0.05, "Refuse text of which the tokenizer does not know a greater share of the characters."
    )
    word_segmenter: str | None = option(
        None,
        "What finds words in text without spaces (Chinese, Japanese, Thai), for --masking_unit word: 'jieba', "
        "or package.module:function, which returns the words of a text.",
    )
    block_size: int = option(128, "Most tokens in an example, special tokens included.")
    block_mode: Literal["full_rows", "full_sentences", "doc_sentences", "tokens", "isolated_documents"] = option(
        "full_rows",
        "Fill examples with whole words, also across documents; with whole sentences, also across documents or not; or "
        "with tokens, cut anywhere; or put several documents into one that do not see each other.",
    )
    preprocessing_num_workers: int | None = option(
        None, "Processes that tokenize; by default one, which uses threads."
    )
    streaming: bool = option(False, "Read, tokenize and pack while training instead of storing documents first.")
    shuffle_buffer_size: int = option(
        10_000, "With streaming: examples that are shuffled together; 0 keeps the order."
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other; of prepared data, take those it was made with.

        Raises:
            InputError: If two contradict each other, or there is no such prepared data.
        """
        if self.prepared_data is not None:
            self._take_prepared(self.prepared_data)
        if self.train_file and self.dataset_name:
            raise InputError(
                f"train_file={self.train_file} and dataset_name={self.dataset_name!r}: give one of the two"
            )
        if self.dataset_config_name and not self.dataset_name:
            raise InputError(f"dataset_config_name={self.dataset_config_name!r} needs a dataset_name")
        files = (self.train_file, self.validation_file, *(getattr(self, name, None) for name in _OTHER_FILES))
        if self.on_bad_text and not any(files):
            raise InputError(f"on_bad_text={self.on_bad_text!r} is of files, and none is given: leave it out")
        check_numbers(self)
        if self.streaming and not (self.train_file or self.dataset_name):
            raise InputError("streaming=True needs a train_file or a dataset_name: the demo corpus is stored")
        if self.word_segmenter is not None:
            NamedSegmenter(self.word_segmenter)
        if self.streaming and self.max_corpus_bytes is not None:
            raise InputError(
                f"max_corpus_bytes={self.max_corpus_bytes} does not go with streaming: leave one of them out"
            )

    def _take_prepared(self, folder: str) -> None:
        """Take the options that a folder of prepared data was made with; refuse others beside it."""
        # It reads Arrow, which most users of the options do not.
        from hf_pretrain.data.prepared import read_manifest

        for name in _OF_TEXT:
            if getattr(self, name):
                raise InputError(
                    f"{name}={getattr(self, name)!r} does not go with prepared_data={folder!r}, which has its text already: "
                    "leave one of them out"
                )
        for name, value in read_manifest(folder)["options"].items():
            own = getattr(self, name)
            if own not in (self.__dataclass_fields__[name].default, value):
                message = f"{name}={own!r}, but prepared_data={folder!r} was made with {value!r}"
                if name not in _ONLY_NOTED:
                    raise InputError(f"{message}: leave {name} out, or prepare the text anew")
                logger.warning(f"{message}, which counts")
            setattr(self, name, value)

    def check_named(self) -> None:
        """Refuse options that name no text.

        Raises:
            InputError: Naming the options that do.
        """
        if not (self.train_file or self.dataset_name or self.demo_corpus or self.prepared_data):
            raise InputError(
                "no text to train on: give --train_file (files, folders, globs), --dataset_name (of the Hub) or --prepared_data "
                "(a folder of hf-pretrain prepare); --demo_corpus true trains on the docstrings of the installed Python packages"
            )

    def reading(self, on_bad_text: Literal["refuse", "skip"] = "refuse") -> dict[str, Any]:
        """Return how files are read, as `read_documents` takes it.

        Args:
            on_bad_text: What to do with a document that is no text where the option does not say.
        """
        options = {"document_separator": self.document_separator, "text_column": self.text_column}
        return options | {"on_bad_text": self.on_bad_text or on_bad_text}


@dataclass
class MultilingualDataArguments(DataArguments):
    """Which text is trained on; with `language_file` or `parallel_file`, text of several languages."""

    ranges: ClassVar[dict[str, str]] = {"language_sampling_alpha": "[0, 1]"}

    language_file: list[str] | None = option(
        None,
        "Text of several languages instead of train_file: LANGUAGE=FILE[,FILE...] for each, such as "
        "'en=a.txt de=b.txt'; files as in train_file.",
    )
    parallel_file: list[str] | None = option(
        None,
        "Sentences and their translations: FIRST-SECOND=FILE,FILE for files of parallel lines, such as "
        "'en-de=a.en,a.de', or FIRST-SECOND=FILE for tab-separated columns, or fields (JSON, tables, "
        "Parquet) named by the languages; compressed files too.",
    )
    language_sampling_alpha: float = option(
        0.5,
        "Languages are sampled proportionally to their share of the text to this power: 1 as they are, 0 "
        "all equally. The same holds for pairs of languages, and for a tokenizer to train.",
    )
    bitext_share: float = option(
        0.5, "Share of the examples that are translations, where there is text of both kinds."
    )
    bitext_frame: Literal["each", "pair"] = option(
        "each",
        "Special tokens of a sentence and its translation: those of 'each' alone (XLM: </s> x </s> </s> y "
        "</s>), or as the tokenizer joins a 'pair'.",
    )
    tokenizer_frame: Literal["own", "xlm"] = option(
        "own",
        "Special tokens around a text, of a tokenizer to train for several languages: its kind's 'own', or "
        "as 'xlm', which has </s> for both ends.",
    )
    mixture_unit: Literal["step", "example"] = option(
        "step", "What is of one language or one pair of languages: each training step (XLM), or each example."
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            InputError: If the options name text of one language and of several, or an entry or a number is wrong.
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
        self.language_files()
        self.parallel_files()

    def check_named(self) -> None:
        """Refuse options that name no text, of one language or of several."""
        if not self.is_multilingual:
            super().check_named()

    @property
    def is_multilingual(self) -> bool:
        """Whether the text is named by its language."""
        return bool(self.language_file or self.parallel_file)

    def language_files(self) -> dict[str, list[str]]:
        """Return the files of each language, by its name."""
        files: dict[str, list[str]] = {}
        for entry in self.language_file or []:
            language, paths = _parse("language_file", entry, pattern=r"\w+", form="LANGUAGE=FILE, such as en=a.txt")
            files.setdefault(language, []).extend(paths)
        return files

    def parallel_files(self) -> dict[str, list[list[str]]]:
        """Return the files of each pair of languages, such as "en-de": two, or one with both languages."""
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


def one_text_in_a_row(args: DataArguments) -> DataArguments:
    """Return options with which no example has two documents; whole sentences fill it, unless the options cut otherwise.

    Raises:
        InputError: If the options cut text in another way.
    """
    if args.block_mode not in (DataArguments.block_mode, "doc_sentences"):
        raise InputError(
            f"block_mode={args.block_mode!r} puts several texts into a row, which has one vector: use 'doc_sentences'"
        )
    return replace(args, block_mode="doc_sentences")


def _parse(option: str, entry: str, *, pattern: str, form: str) -> tuple[str, list[str]]:
    name, _, rest = entry.partition("=")
    paths = rest.split(",")
    if not re.fullmatch(pattern, name) or not all(paths):
        raise InputError(
            f"{option}={entry!r}: write {form}; names are letters, digits and _, and files are divided by commas"
        )
    return name, paths
