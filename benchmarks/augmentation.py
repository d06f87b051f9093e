"""Proposing words for augmentation: all masked sentences in batches, against one word a forward as in the official code.

    python benchmarks/augmentation.py --data_dir data [--sentences 64] [--base] [--repeats 3]

Sentences of data_dir/sst2/train.tsv, a BERT with random weights (or --model_name_or_path) and the tokenizer that was trained on
them. The official code masks one word at a time, puts the sentence as it was behind, computes the logits at all
positions, and takes the likeliest. The second side leaves out the copy of the sentence, and finds the same words as ours, which
is checked first. "bf16" is ours under bf16 autocast. Sides run in one process, in turn, best of the repeats. Below, the rows a
second of all of `augment`, in fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import datasets
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_pretrain.data.documents.tokenizers import train_tokenizer
from hf_pretrain.modeling.backbone import evaluating
from hf_pretrain.tasks.augmentation import augment
from hf_pretrain.tasks.words import ChangeableWord, WordNeighbours, WordProposer, whole_words
from results import read_rows
from timing import interleaved, options_parser, print_table

CANDIDATES = 15
# layers, width, heads
SMALL, BASE = (4, 256, 4), (12, 768, 12)


def load(args: argparse.Namespace, sentences: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and its tokenizer."""
    if args.model_name_or_path is not None:
        names = args.model_name_or_path
        return AutoModelForMaskedLM.from_pretrained(names), AutoTokenizer.from_pretrained(names)
    tokenizer = train_tokenizer(
        sentences, kind="wordpiece", vocab_size=args.vocab_size, lowercase=True, model_max_length=128
    )
    layers, width, heads = BASE if args.base else SMALL
    torch.manual_seed(0)
    config = BertConfig(
        # The head of the usual vocabulary, however many tokens these sentences have.
        vocab_size=30522,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return AutoModelForMaskedLM.from_config(config), tokenizer


def one_word_a_forward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    words: list[ChangeableWord],
    *,
    with_copy: bool,
) -> list[list[str]]:
    """Return the candidates of each word that is one token."""
    known, found = whole_words(tokenizer), []
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[list(known)] = True
    for word in words:
        text, position = texts[word.row], word.tokens[0]
        inputs = tokenizer(*((text, text) if with_copy else (text,)), return_tensors="pt")
        original = int(inputs["input_ids"][0, position])
        inputs["input_ids"][0, position] = tokenizer.mask_token_id
        logits = model(**inputs).logits[0, position].masked_fill(~allowed, -torch.inf)
        logits[original] = -torch.inf
        found.append([known[index] for index in logits.topk(CANDIDATES).indices.tolist()])
    return found


def main() -> None:
    """Measure and print."""
    parser = options_parser(__doc__, repeats=3)
    parser.add_argument("--data_dir", default="data", help="folder with sst2/train.tsv")
    parser.add_argument("--sentences", type=int, default=64, help="how many of them")
    parser.add_argument("--base", action="store_true", help="12 layers, 768 wide, in place of 4 and 256")
    parser.add_argument("--model_name_or_path", help="a masked language model to load")
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens of the tokenizer")
    parser.add_argument("--batch_size", type=int, default=128, help="masked sentences in a batch")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rows = read_rows(args.data_dir, "sst2", "train")
    model, tokenizer = load(args, rows[0].tolist())
    texts = rows[0].tolist()[: args.sentences]
    propose = WordProposer(
        model,
        tokenizer,
        neighbours=WordNeighbours.from_model(model, tokenizer),
        stop_words=ENGLISH_STOP_WORDS,
        num_candidates=CANDIDATES,
        batch_size=args.batch_size,
    )
    with evaluating(model):
        words = [word for word in propose(texts) if len(word.tokens) == 1]
        expected = one_word_a_forward(model, tokenizer, texts, words, with_copy=False)
        same = sum(set(word.candidates) == set(other) for word, other in zip(words, expected, strict=True))
        assert same > 0.98 * len(words), f"{same} of {len(words)} words have the same candidates"
        sides: dict[str, Callable[[], object]] = {
            name: partial(one_word_a_forward, model, tokenizer, texts, words, with_copy=with_copy)
            for name, with_copy in (("official form", True), ("one word a forward", False))
        }
        in_bf16 = torch.autocast(model.device.type, dtype=torch.bfloat16)(propose.__call__)
        sides |= {"ours": partial(propose, texts), "ours, bf16": partial(in_bf16, texts)}
        seconds = interleaved(sides, args.repeats)
    baseline = seconds["official form"]
    table = [[name, len(words), 1e3 * value / len(words), baseline / value] for name, value in seconds.items()]
    sizes = f"{model.config.num_hidden_layers} layers, {model.config.hidden_size} wide"
    print(f"{len(texts)} sentences, {sizes}, {torch.get_num_threads()} threads, best of {args.repeats}\n")
    print_table(table, ["side", "words", "ms a word", "speed-up"])
    begin = time.perf_counter()
    data = datasets.Dataset.from_dict({"text": texts})
    augmented = augment(data, model=model, tokenizer=tokenizer, text_columns=["text"])
    elapsed = time.perf_counter() - begin
    print(
        f"\naugment: {len(texts)} rows to {len(augmented)} in {elapsed:.1f} s, {len(augmented) / elapsed:.0f} a second"
    )


if __name__ == "__main__":
    main()
