"""What a model says about sentences of the held-out text, at the end of a run: in the text's own language, with probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.documents.words import is_letters, letter_share
from hf_pretrain.data.examples.packing import BlockTemplate
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.hub.examples import find_examples
from hf_pretrain.modeling.backbone import decoder_start_id, evaluating, is_shifted, longest_sequence
from hf_pretrain.modeling.visibility.lm_modes import left_to_right_inputs
from hf_pretrain.training.processes import is_sharded

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


def _logits(output: Any) -> torch.Tensor:
    """Return the logits of tokens ``[B, L, V]``, also of a class with a second head."""
    logits: torch.Tensor = output.logits if "logits" in output else output.prediction_logits
    return logits


def print_filled_masks(trainer: Any, data: PreparedData) -> None:
    """Print held-out sentences with a masked token and what the model fills in."""
    model = trainer.model.root.eval()
    shift = int(is_shifted(model))

    def guess(ids: list[int], position: int) -> torch.Tensor:
        masked = torch.tensor([ids], device=model.device)
        masked[0, position] = data.tokenizer.mask_token_id
        # A tokenizer that puts nothing before a text leaves its first token without a state to predict it.
        return _logits(model(masked))[0, max(position - shift, 0)]

    print_guesses(
        data, guess, seed=trainer.args.seed, title="Held-out sentences with a masked token, and what is filled in:"
    )


def print_next_tokens(trainer: Any, data: PreparedData, *, left_to_right: bool = False) -> None:
    """Print beginnings of held-out sentences and the tokens with which a left-to-right model goes on.

    Args:
        trainer: The Trainer of the run.
        data: Its examples.
        left_to_right: Whether the model is an encoder that has to be made to read from left to right.
    """
    model = trainer.model.root.eval()
    prefix = BlockTemplate.of(data.tokenizer).prefix if left_to_right else ()

    def guess(ids: list[int], position: int) -> torch.Tensor:
        input_ids = torch.tensor([[*prefix, *ids[:position]]], device=model.device)
        inputs = left_to_right_inputs(model, input_ids=input_ids) if left_to_right else {"input_ids": input_ids}
        return _logits(model(**inputs))[0, -1]

    title = "Beginnings of held-out sentences, and the tokens that are likeliest to follow:"
    print_guesses(data, guess, seed=trainer.args.seed, title=title, reads_all=False)


class Rebuilt(NamedTuple):
    """A sentence with noise as an encoder reads it, what the decoder writes, and the sentence."""

    noised: str
    written: str
    original: str


def print_rebuilt(trainer: Any, data: PreparedData) -> None:
    """Print held-out sentences with noise, what an encoder-decoder writes, and the sentences."""
    found = list(islice(rebuilt(trainer, held_out_sentences(data, seed=trainer.args.seed)), _SENTENCES))
    if found:
        print("\nHeld-out sentences with noise, what the decoder writes, and the sentences themselves:")
    for number, sample in enumerate(found):
        print(
            "\n" * (number > 0)
            + "\n".join(f"  {name:9}{text or '(nothing)'}" for name, text in sample._asdict().items())
        )


def rebuilt_sentences(trainer: Any) -> tuple[Rebuilt, ...]:
    """Return a held-out sentence for the card that an encoder-decoder has rebuilt.

    Args:
        trainer: The Trainer of a denoising run.

    Returns:
        One, or none: of private text, or where no sentence is held out, or the model lies in shards.
    """
    args = trainer.args
    if args.private_text or args.hub_private_repo or is_sharded(trainer.model):
        return ()
    sentences = find_examples(trainer.eval_dataset, trainer.processing_class, seed=args.seed)
    return tuple(islice(rebuilt(trainer, [sentence.replace("|", "") for sentence in sentences]), 1))


def rebuilt(trainer: Any, sentences: Iterable[str]) -> Iterator[Rebuilt]:
    """Yield sentences after the noise of a run, and what its encoder-decoder writes, the likeliest token each time.

    Args:
        trainer: The Trainer of a denoising run: its collator makes the noise, by the seed of the run.
        sentences: Sentences; one that the model has no positions for is left out.
    """
    model, collator = trainer.model.root, trainer.data_collator
    tokenizer = trainer.processing_class
    lengths = [longest_sequence(side) for side in (model.get_encoder(), model.get_decoder())]
    longest = min((length for length in lengths if length is not None), default=None)
    for number, text in enumerate(sentences):
        batch = collator([_as_example(text, tokenizer, number=number)])
        input_ids = batch["input_ids"][:, batch["attention_mask"][0] != 0]
        targets = batch["labels"][batch["labels"] >= 0]
        start, ends = decoder_start_id(model), collator.noise.ends_target
        read, mask = _beginning(batch, start=start)
        # A wrong text may be longer, and a fragment has no end of its own.
        room = 2 * len(targets) + 8 if ends else len(targets)
        if longest is not None:
            room = min(room, longest - read.shape[1])
        if room < 1 or (longest is not None and input_ids.shape[1] > longest):
            continue
        with evaluating(model):
            written = model.generate(
                input_ids.to(model.device),
                attention_mask=torch.ones_like(input_ids).to(model.device),
                decoder_input_ids=read.to(model.device),
                decoder_attention_mask=mask.to(model.device),
                # BART is told to end with the end token, which is then cut off.
                max_new_tokens=room + 1,
                min_new_tokens=0 if ends else room,
                do_sample=False,
                num_beams=1,
                decoder_start_token_id=start,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=int(targets[-1]) if ends else tokenizer.eos_token_id,
            )
        shown = (input_ids[0].tolist(), written[0, read.shape[1] :][:room].tolist())
        noised, said = (_readable(ids, tokenizer) for ids in shown)
        yield Rebuilt(noised, said, text)


def _as_example(text: str, tokenizer: PreTrainedTokenizerBase, *, number: int) -> dict[str, Any]:
    """Return a sentence as an example of a dataset, with the special tokens around it."""
    from hf_pretrain.evaluation.metrics import encode_texts, words_of_tokens  # which needs seconds to import

    options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoding = encode_texts(tokenizer, [text], add_special_tokens=False, **options)
    template, ids = BlockTemplate.of(tokenizer), encoding["input_ids"][0]
    words = words_of_tokens(text, encoding["offset_mapping"][0])[1] if options else np.arange(len(ids))
    is_first = (np.diff(words, prepend=-2) != 0).tolist()
    around = [True] * len(template.prefix), [True] * len(template.suffix)
    first_sentence = [False] * len(template.prefix) + [True] + [False] * (len(ids) - 1 + len(template.suffix))
    return {
        "input_ids": [*template.prefix, *ids, *template.suffix],
        "word_starts": [*around[0], *is_first, *around[1]],
        "sent_starts": first_sentence,
        "example_id": number,
        "epoch": 0,
    }


def _beginning(batch: dict[str, torch.Tensor], *, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the decoder reads before it writes, ``[1, D]``, and what of it it sees.

    That is one token. The one before a fragment has its position in the text, by hidden start tokens before it.
    """
    first = batch["decoder_input_ids"][:, :1]
    column = int(batch["decoder_position_ids"][0, 0]) if "decoder_position_ids" in batch else 0
    read = torch.cat([first.new_full((1, column), start), first.masked_fill(first < 0, start)], dim=1)
    mask = torch.ones_like(read)
    mask[:, :column] = 0
    return read, mask


def _readable(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return tokens as text, with masks and sentinels, without the special tokens around a text."""
    template = BlockTemplate.of(tokenizer)
    names = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    around = {*template.prefix, *template.suffix, *names}
    text = tokenizer.decode([token for token in ids if token not in around], skip_special_tokens=False)
    # A token of bytes may be a part of a character.
    return re.sub("\ufffd+", "\ufffd", " ".join(text.split()))
