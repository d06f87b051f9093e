"""Evaluating a text with memory against a sliding window: the seconds a token takes at the same length of context.

Run ``python benchmarks/stream_evaluation.py``; no network is needed. A Transformer-XL with random weights scores random
text, which costs what trained ones cost. "Memory" reads windows of the context's length once, each position seeing as many
tokens as the context holds (``stream_evaluate``, ``same_length``); "sliding window" reads the whole context anew for each
token and scores its last position alone, in batches of ``--batch_size`` (``sliding_window_evaluate``). A text of that
length would take the sliding window hours, so a sample of its tokens is timed, evenly spread, and the seconds a token are
what is compared: its time for the whole text is extrapolated. The sides are timed in turn, best of several rounds.
"""

from __future__ import annotations

import argparse
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_pretrain import TransformerXLConfig, TransformerXLForCausalLM
from hf_pretrain.data import draws
from hf_pretrain.evaluation.streams import StreamScore, sliding_window_evaluate, stream_evaluate
from timing import interleaved, options_parser, print_table


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of numbers."""
    vocabulary = {"[SEP]": 0, "[UNK]": 1} | {str(number): number for number in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="[SEP]", unk_token="[UNK]")


def random_text(num_tokens: int, vocab_size: int) -> str:
    """Return keyed numbers with spaces between them."""
    keys = draws.row_keys([0], seed=0, stream="random text")
    return " ".join(map(str, (2 + draws.integers(keys, num_tokens, high=vocab_size - 2))[0].tolist()))


def make_model(options: argparse.Namespace) -> TransformerXLForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(0)
    config = TransformerXLConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        intermediate_size=4 * options.hidden_size,
    )
    return TransformerXLForCausalLM(config).to(options.device)


def measure(options: argparse.Namespace, context: int) -> list[list[object]]:
    """Return a row for each side."""
    model, tokenizer = make_model(options), make_tokenizer(options.vocab_size)
    texts = datasets.Dataset.from_dict({"text": [random_text(options.num_tokens, options.vocab_size)]})
    scores: dict[str, StreamScore] = {}
    best: dict[str, float] = {}

    def keep(name: str, score: StreamScore) -> None:
        # The clock of the score leaves out what tokenizes the text.
        scores[name] = score
        best[name] = min(best.get(name, float("inf")), score.seconds / score.num_tokens)

    def with_memory() -> None:
        memory: dict[str, Any] = {"window": context, "mem_lens": [context - 1], "clamp_lens": [-1]}
        keep("memory", stream_evaluate(model, tokenizer, texts, **memory)[0])

    def sliding() -> None:
        sample: dict[str, Any] = {"num_targets": options.num_targets, "batch_size": options.batch_size}
        keep("sliding window", sliding_window_evaluate(model, tokenizer, texts, context=context, **sample))

    interleaved({"memory": with_memory, "sliding window": sliding}, options.repeats)
    return [
        [context, name, scores[name].num_tokens, seconds * 1e3, seconds * options.num_tokens, seconds / best["memory"]]
        for name, seconds in best.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = options_parser(
        __doc__, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=8000, repeats=3
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 512, 1024], help="tokens that a position sees"
    )
    parser.add_argument("--num_tokens", type=int, default=65_536, help="tokens of the text")
    parser.add_argument("--num_targets", type=int, default=64, help="tokens that the sliding window scores")
    parser.add_argument("--batch_size", type=int, default=1, help="tokens that the sliding window scores at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows = [row for context in options.contexts for row in measure(options, context)]
    print(
        f"{options.num_hidden_layers} layers of width {options.hidden_size} on {options.device}; {options.repeats} rounds"
    )
    headers = ["context", "side", "tokens timed", "ms a token", "s for the text (extrapolated)", "ratio"]
    print_table(rows, headers)


if __name__ == "__main__":
    main()
