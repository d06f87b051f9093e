"""Scoring continuations beside lm-evaluation-harness' own model class, and masked language models beside a plain loop.

    python benchmarks/likelihood.py

A decoder scores short and longer options behind contexts of 20 to 40 tokens: `LikelihoodScorer` through the adapter, and the
harness' `HFLM` at batch 1, which is what its users know, and at batch 64. A masked language model has no class in the harness;
beside it is the usual loop, one masked copy at a time with the head at all positions. The log-likelihoods are compared first.
All sides run in turn in one process, and the best of the repeats counts. It needs the extra `harness`.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import processors
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from hf_pretrain import LikelihoodScorer, harness_model, train_tokenizer
from hf_pretrain.data.text.docstrings import docstring_documents
from timing import interleaved, load_of_machine, options_parser, print_table

Pair = tuple[str, str]


def made_up_pairs(texts: list[str], *, contexts: int, options: int, words: int) -> list[Pair]:
    """Return contexts of 20 to 40 words, each with options of so many words from other texts."""
    cut = [text.split() for text in texts if len(text.split()) > 60]
    pairs = []
    for number, parts in enumerate(cut[:contexts]):
        context = " ".join(parts[: 20 + number % 21])
        for option in range(options):
            other = cut[(number + 7 * option + 1) % len(cut)]
            pairs.append((context, " " + " ".join(other[40 : 40 + words])))
    return pairs


def requests(pairs: list[Pair]) -> Any:
    """Return pairs as the harness asks."""
    return [SimpleNamespace(args=pair) for pair in pairs]


@torch.no_grad()
def plain_loop(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> list[float]:
    """Return pseudo-log-likelihoods of the continuations, one forward pass a token."""
    found = []
    for context, continuation in pairs:
        ids = tokenizer(context + continuation)["input_ids"]
        begin, total = len(tokenizer(context)["input_ids"]) - 1, 0.0
        for column in range(begin, len(ids) - 1):
            row = [*ids[:column], tokenizer.mask_token_id, *ids[column + 1 :]]
            logits = model(torch.tensor([row])).logits[0, column]
            total += float(logits.log_softmax(-1)[ids[column]])
        found.append(total)
    return found


def main() -> None:
    """Measure and print."""
    args = options_parser(__doc__, contexts=24, hidden_size=128, num_hidden_layers=2, repeats=3).parse_args()
    texts = list(itertools.islice(docstring_documents(), 500))
    causal = train_tokenizer(texts, kind="bpe", vocab_size=8192, lowercase=False)
    masked = train_tokenizer(texts, vocab_size=8192)
    # As GPT-2's: nothing is put around a text.
    causal.backend_tokenizer.post_processor = processors.Sequence([])
    causal.bos_token = causal.eos_token = causal.sep_token
    sizes = {"n_embd": args.hidden_size, "n_layer": args.num_hidden_layers, "n_head": 2, "n_positions": 512}
    ids = {"bos_token_id": causal.bos_token_id, "eos_token_id": causal.eos_token_id}
    # A vocabulary of the paper's size: the head matters.
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=50257, **sizes, **ids)).eval()
    width = {"hidden_size": args.hidden_size, "intermediate_size": 4 * args.hidden_size, "num_attention_heads": 2}
    encoder = BertForMaskedLM(BertConfig(vocab_size=30522, num_hidden_layers=args.num_hidden_layers, **width)).eval()
    theirs = {
        size: HFLM(pretrained=decoder, tokenizer=causal, batch_size=size, logits_cache=False) for size in (1, 64)
    }
    ours, scorer = harness_model(decoder, causal), LikelihoodScorer(encoder, masked)
    rows = []
    for options, words in ((4, 1), (2, 4)):
        pairs = made_up_pairs(texts, contexts=args.contexts, options=options, words=words)
        asked = requests(pairs)
        sides = {f"HFLM, batch {size}": lm for size, lm in theirs.items()} | {"ours": ours}
        runs = {name: functools.partial(lm.loglikelihood, asked, disable_tqdm=True) for name, lm in sides.items()}
        values = {name: np.array([score for score, _ in run()]) for name, run in runs.items()}
        assert all(np.allclose(value, values["ours"], atol=1e-3) for value in values.values()), values
        seconds = interleaved(runs, args.repeats)
        rows += [
            [f"decoder, {options} options of {words}", name, f"{value:.2f}", f"{seconds['HFLM, batch 1'] / value:.1f}"]
            for name, value in seconds.items()
        ]
    pairs = made_up_pairs(texts, contexts=args.contexts // 2, options=2, words=4)
    assert np.allclose(scorer.score(pairs).log_likelihoods, plain_loop(encoder, masked, pairs), atol=1e-3)
    runs = {
        "a loop": functools.partial(plain_loop, encoder, masked, pairs),
        "ours": functools.partial(scorer.score, pairs),
    }
    seconds = interleaved(runs, args.repeats)
    rows += [
        ["masked, 2 options of 4", name, f"{value:.2f}", f"{seconds['a loop'] / value:.1f}"]
        for name, value in seconds.items()
    ]
    print(
        f"\n{args.contexts} contexts, {torch.get_num_threads()} threads, best of {args.repeats}; {load_of_machine()}\n"
    )
    print_table(rows, ["task", "side", "seconds", "speed-up"])


if __name__ == "__main__":
    main()
