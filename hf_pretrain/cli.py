"""``hf-pretrain <method> [options]``: the programs of ``trainers/``, the commands beside them, and how a program ends.

Nothing heavy is imported here, so that ``hf-pretrain --help`` and a mistyped method are answered at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module

from hf_pretrain.errors import InputError, RunError, StoppedError, Terminated
from hf_pretrain.names import HELP, cut, described_recipes, method_hint
from hf_pretrain.objectives import METHODS
from hf_pretrain.training.method import Listed, Method, registered_methods

RECIPES = {
    "bert": ("encoder", "masked tokens and the next sentence (BERT)"),
    "roberta": ("encoder", "masked tokens alone, whole sentences, byte-level BPE (RoBERTa)"),
    "albert": ("encoder", "masked n-grams and the order of two segments, with shared layers (ALBERT)"),
    "spanbert": ("encoder", "masked spans, each also from its two boundaries (SpanBERT)"),
    "structbert": ("encoder", "masked tokens, shuffled words and the order of sentences (StructBERT)"),
    "unilm": ("encoder", "masked tokens seen from both sides, one side, or as a target of a source (UniLM)"),
    "xlm": ("encoder", "masked tokens in many languages, and in translations (XLM)"),
    "gpt_bert": ("encoder", "masked tokens and next tokens with one head (GPT-BERT)"),
    "bart": ("denoise", "text with infilled spans and permuted sentences, written as it was (BART)"),
    "t5": ("denoise", "spans behind sentinels, written by the decoder (T5)"),
    "ul2": ("denoise", "seven kinds of denoising, each with the token of its mode (UL2)"),
    "prefix_lm": ("denoise", "the rest of a text, written from its beginning (T5's prefix language model)"),
    "mass": ("denoise", "a masked half of a text, written by the decoder (MASS)"),
    "simcse": ("contrastive", "a sentence against itself under other dropout (SimCSE)"),
    "ict": ("contrastive", "a sentence against the text around it (inverse cloze task)"),
    "infoword": ("contrastive", "a text against one of its n-grams, and masked tokens (InfoWord, Deep InfoMax)"),
    "retromae": ("contrastive", "a masked text, rebuilt from its vector and a part of its tokens (RetroMAE)"),
    "tsdae": ("contrastive", "a text with deletions, written from its vector (TSDAE)"),
}
"""Methods that are another with the recipe of their name; a recipe or an option that follows goes before it."""

# Enough for the gaps between the kernels of a step: alone, a step of 300 ms is 2 % slower.
_SPINS = "3000"

COMMANDS = {
    "adapt": (
        "hf_pretrain.commands.adapt",
        "train a model further on text of a domain: whole or with LoRA, with new words",
    ),
    "statistics": (
        "hf_pretrain.commands.corpus.statistics",
        "lengths of a corpus' documents, and how they fill the blocks",
    ),
    "prepare": (
        "hf_pretrain.commands.corpus.prepare",
        "tokenize a corpus once, on all cores and machines, for any number of runs",
    ),
    "deduplicate": (
        "hf_pretrain.commands.corpus.deduplicate",
        "leave out documents that repeat another, nearly or exactly",
    ),
    "vectors": (
        "hf_pretrain.commands.vectors",
        "vectors of words: counts, PMI, LSA, word2vec, GloVe, or those of an encoder",
    ),
    "features": (
        "hf_pretrain.commands.features",
        "features of a frozen encoder, and classic classifiers on them beside TF-IDF",
    ),
    "finetune": (
        "hf_pretrain.commands.finetune",
        "fine-tune an encoder on a task with a strategy, beside TF-IDF",
    ),
    "evaluate": (
        "hf_pretrain.commands.evaluate",
        "measure models on tasks: probes, similarity, minimal pairs, words, likelihoods",
    ),
    "compare": (
        "hf_pretrain.commands.compare",
        "compare strategies of transfer on tasks, under a budget of FLOPs",
    ),
    "multitask": (
        "hf_pretrain.commands.multitask",
        "train one encoder on several labelled tasks, each with a head of its own",
    ),
    "stages": (
        "hf_pretrain.commands.stages.running",
        "run a plan: adapt, fine-tune and measure, each stage on the model of the one before",
    ),
    "export": ("hf_pretrain.commands.export", "export a checkpoint of a run as the run does with its last step"),
    "card": ("hf_pretrain.commands.card", "make the model card of a run anew, with evaluations that came later"),
}
"""Programs that pre-train nothing."""

LAUNCHED = ("finetune", "multitask", "adapt", "stages")
"""Those of them that `accelerate launch` starts in several processes; the others run in one."""

_EXIT_RUN = 1
_EXIT_INPUT = 2
_EXIT_INTERRUPTED = 130
_EXIT_TERMINATED = 143
# Where the first process leaves its last line for the others, and how long these wait for it.
_SAID, _SECONDS_TO_SAY = "hf_pretrain/last_line", 3.0


def main(argv: list[str] | None = None) -> int:
    """Run the method or command that the first argument names, with the arguments after it.

    Args:
        argv: The arguments, without the name of the program; those of the process if not given.

    Returns:
        The exit status; see [`run_program`].
    """
    _let_threads_rest()
    return run_program(_run_named, sys.argv[1:] if argv is None else argv)


def _let_threads_rest() -> None:
    """Have idle threads of GNU's OpenMP wait for work a hundredth of the usual time before they sleep.

    By default each spins for milliseconds and so takes a core from whatever else runs: a step on two threads beside one busy
    process took 2.5 times as long as alone, and 2.0 times with this. A user's own choice stays.
    """
    # The runtime reads it when torch is imported.
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def launch(page: str, method: str) -> None:
    """Run a method if its page in `trainers/` is the program, as under ``accelerate launch trainers/rtd.py``.

    Args:
        page: ``__name__`` of the page; an import of the page runs nothing.
        method: Name of the method.
    """
    if page == "__main__":
        raise SystemExit(main([method, *sys.argv[1:]]))


def methods() -> dict[str, Listed]:
    """Return every method by name: those of this library, then those that installed packages register.

    Raises:
        InputError: If a package registers a method under a name that there is already.
    """
    return registered_methods(METHODS, taken=[*RECIPES, *COMMANDS])


def load_method(name: str) -> Method:
    """Import the record of a method.

    Raises:
        InputError: If there is no method of that name.
    """
    listed = methods()
    if name not in listed:
        hint = method_hint(name, [*listed, *RECIPES, *COMMANDS])
        raise InputError(f"unknown method {name!r}: {hint}")
    return listed[name].load(name)


def run_program(program: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run a program; what is not a mistake of the library ends it with one line, any other error with its traceback.

    That is bad input, a path that cannot be read or written, a full disk, or a run that cannot go on.

    Args:
        program: The program's ``main``, which takes its arguments and returns its exit status, None for 0.
        argv: The arguments, without the name of the program; those of the process if not given.

    Returns:
        The exit status: the program's own, 1 after a `RunError`, 2 after an `InputError`, 130 after an interrupt, 143 after
        SIGTERM.
    """
    try:
        return program(argv) or 0
    except KeyboardInterrupt as error:
        _say("stopped by SIGTERM" if isinstance(error, Terminated) else "interrupted")
        return _EXIT_TERMINATED if isinstance(error, Terminated) else _EXIT_INTERRUPTED
    except Exception as error:
        known = _known_error_within(error) or _system_fault(error)
        if known is None:
            raise
        _say(f"error: {' '.join(str(known).split())}")
        if isinstance(known, StoppedError):
            return _EXIT_TERMINATED
        return _EXIT_INPUT if isinstance(known, InputError) else _EXIT_RUN


def _say(line: str) -> None:
    """Print a line of an end; of several processes that end alike, the first alone does."""
    if not _was_said_by_first(line):
        print(line, file=sys.stderr, flush=True)


def _was_said_by_first(line: str) -> bool:
    rank = os.environ.get("RANK", "0")
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        # Options are the same for all.
        return rank != "0"
    try:
        store = distributed.distributed_c10d._get_default_store()
        if rank == "0":
            store.set(_SAID, line)
            return False
        deadline = time.monotonic() + _SECONDS_TO_SAY
        while not store.check([_SAID]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return bool(store.check([_SAID]) and store.get(_SAID).decode() == line)
    except Exception:
        # The first process, which holds the store, is gone.
        return False


def _system_fault(error: BaseException) -> InputError | RunError | None:
    from hf_pretrain.training.processes import system_fault

    return system_fault(error)


def _known_error_within(error: BaseException | None) -> InputError | RunError | None:
    # datasets wraps what a generator raises, so the user's mistake can be the cause of the error that arrives here.
    while error is not None and not isinstance(error, InputError | RunError):
        error = error.__cause__
    return error


def _run_named(argv: list[str] | None) -> int | None:
    """Run what the first argument names."""
    name, *options = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from hf_pretrain import __version__

        print(f"hf-pretrain {__version__}")
        return 0
    if options in (["-h"], ["--help"]) and (text := _kept_help(name)) is not None:
        print(text, end="")
        return 0
    return run_named(name, options)


def _kept_help(name: str) -> str | None:
    """Return the help of a method, a command, or a recipe's method; None where none is kept, as for other packages."""
    method, line = (name, "") if name in methods() else described_recipes().get(name, (name, ""))
    kept = HELP / f"{method}.txt"
    if not kept.is_file():
        return None
    note = f"`hf-pretrain {name}` is `hf-pretrain {method} --config {name}`: {line}.\n\n" if method != name else ""
    return note + kept.read_text(encoding="utf-8")


def run_named(name: str, options: list[str]) -> int | None:
    """Run a method, a command, or a recipe with its method.

    Args:
        name: The name.
        options: The arguments after it.

    Returns:
        The exit status of a command.

    Raises:
        InputError: If nothing has that name.
    """
    if name in COMMANDS:
        _check_processes(name)
        return import_module(COMMANDS[name][0]).main(options)
    if name not in methods() and name in described_recipes():
        name, options = described_recipes()[name][0], ["--config", name, *options]
    load_method(name).run(options)
    return 0


def _check_processes(name: str) -> None:
    """Refuse to start a command of one process in several: they would do the same, and write the same files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if name not in LAUNCHED and size.isdecimal() and int(size) > 1:
        raise InputError(
            f"WORLD_SIZE={size}: hf-pretrain {name} runs in one process: start it without accelerate launch or torchrun; several "
            f"processes are for methods and {', '.join(LAUNCHED)}"
        )


def _help() -> str:
    """Return the text of ``hf-pretrain --help``."""
    groups = {
        "methods": {name: listed.line for name, listed in methods().items()},
        "recipes of papers, called by name": {name: line for name, (_, line) in RECIPES.items()},
        "other recipes, called by name": {
            name: line for name, (_, line) in described_recipes().items() if name not in RECIPES
        },
        "commands": {name: line for name, (_, line) in COMMANDS.items()},
    }
    width = max(len(name) for lines in groups.values() for name in lines)
    parts = [
        "usage: hf-pretrain <method, recipe or command> [--config RECIPE] [options]",
        "Pre-train a text encoder, a language model, or an encoder-decoder, on your own text.",
    ]
    for title, lines in groups.items():
        parts.append(
            "\n".join([f"{title}:", *(f"  {name:<{width}}  {cut(line, 110 - width)}" for name, line in lines.items())])
        )
    return "\n\n".join([*parts, _OPTIONS])


_OPTIONS = """\
options:
  -h, --help  show this, or after a name: the options that most runs need, by group
  --help-all  after a name: all of its options
  --version   show the version

  hf-pretrain rtd --train_file corpus.txt --output_dir my-electra"""


if __name__ == "__main__":
    raise SystemExit(main())
