"""What a model says about sentences of the held-out text, at the end of a run: in the text's own language, with probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import is_letters, letter_share
from hf_pretrain.data.prepare import PreparedData

_SHORTEST, _LONGEST = 8, 40  # tokens
_SENTENCES, _CANDIDATES = 3, 3
_LETTERS = 0.7  # the least share of letters and spaces


def held_out_sentences(data: PreparedData, *, seed: int) -> Iterator[str]:
    """Yield sentences of the held-out text in a random order, of 8 to 40 tokens, mostly of letters.

    Args:
        data: The examples of a run; of a stream nothing is held out.
        seed: Seed of the order.
    """
    documents = data.eval_documents
    if documents is None or "input_ids" not in getattr(documents, "column_names", ()):
        return
    store, tokenizer = TokenStore(documents), data.tokenizer
    bounds = np.append(np.flatnonzero(store.sent_starts(0, store.num_tokens)), store.num_tokens)
    for number in draws.permutation(len(bounds) - 1, seed=seed, stream="samples").tolist():
        begin, end = int(bounds[number]), int(bounds[number + 1])
        if not _SHORTEST <= end - begin <= _LONGEST:
            continue
        ids = store.read(begin, end)[0].tolist()
        text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        if tokenizer.unk_token_id not in ids and letter_share(text) >= _LETTERS:
            yield text


def print_guesses(
    data: PreparedData,
    guess: Callable[[list[int], int], torch.Tensor],
    *,
    seed: int,
    title: str,
    reads_all: bool = True,
) -> None:
    """Print held-out sentences, the most probable tokens in place of one of each, and the token that stood there.

    Args:
        data: The examples of a run.
        guess: Takes the ids of a sentence and the position of a token, and returns logits ``[V]`` of that token.
        seed: Seed of the choice of sentences.
        title: What is shown.
        reads_all: Whether the sentence is read on both sides of the token; a left-to-right model reads what is before it.
    """
    tokenizer, lines = data.tokenizer, []
    for text in islice(held_out_sentences(data, seed=seed), _SENTENCES):
        ids, (begin, end), position = _with_target(text, tokenizer, reads_all=reads_all)
        if position < 0:
            continue
        with torch.no_grad():
            probabilities = torch.softmax(guess(ids, position).float().cpu(), dim=-1)
        values, found = probabilities.topk(_CANDIDATES)
        shown = ", ".join(
            f"{_word(tokenizer, token)} {value:.2f}"
            for token, value in zip(found.tolist(), values.tolist(), strict=True)
        )
        rest = text[end:] if reads_all else ""
        true = f"{text[begin:end].strip()} {float(probabilities[ids[position]]):.2f}"
        lines.append(f"  {text[:begin]}[?]{rest}\n    {shown}; in the text: {true}")
    if lines:
        print("\n".join([f"\n{title}", *lines]))


def _with_target(
    text: str, tokenizer: PreTrainedTokenizerBase, *, reads_all: bool
) -> tuple[list[int], tuple[int, int], int]:
    """Return the ids of a text, the characters and the position of its longest token of letters; -1 if it has none.

    For a model that reads from the left, only the second half of the text is searched.
    """
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=reads_all)
    best, span = -1, (0, 0)
    for position, (begin, end) in enumerate(encoding["offset_mapping"]):
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        is_late = reads_all or 2 * position >= len(encoding["input_ids"])
        if is_late and is_letters(text[begin:end]) and end - begin > span[1] - span[0]:
            best, span = position, (begin, end)
    return encoding["input_ids"], span, best


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return tokenizer.decode([token]).strip() or repr(tokenizer.convert_ids_to_tokens(token))


def print_filled_masks(trainer: Any, data: PreparedData) -> None:
    """Print held-out sentences with a masked token and what the model fills in."""
    model = getattr(trainer.model, trainer.model.export_parts[""]).eval()

    def guess(ids: list[int], position: int) -> torch.Tensor:
        masked = torch.tensor([ids], device=model.device)
        masked[0, position] = data.tokenizer.mask_token_id
        output = model(masked)
        logits = output.logits if "logits" in output else output.prediction_logits
        return logits[0, position]

    print_guesses(
        data, guess, seed=trainer.args.seed, title="Held-out sentences with a masked token, and what is filled in:"
    )


def print_next_tokens(trainer: Any, data: PreparedData) -> None:
    """Print beginnings of held-out sentences and the tokens with which a left-to-right model goes on."""
    model = getattr(trainer.model, trainer.model.export_parts[""]).eval()

    def guess(ids: list[int], position: int) -> torch.Tensor:
        return model(torch.tensor([ids[:position]], device=model.device)).logits[0, -1]

    title = "Beginnings of held-out sentences, and the tokens that are likeliest to follow:"
    print_guesses(data, guess, seed=trainer.args.seed, title=title, reads_all=False)
