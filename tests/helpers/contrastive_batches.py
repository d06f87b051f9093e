"""Texts that get one vector each, their batches, and the sequences that a loop finds in a batch."""

from typing import NamedTuple

import numpy as np
from test_masking_collator import NUM_TOKENS, make_tokenizer

from hf_pretrain.objectives.contrastive.collator import DataCollatorForContrastive
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

PAD, CLS, SEP, MASK, FIRST = 0, 2, 3, 4, 5
SETTINGS = [
    ("contrastive", "none"),
    ("contrastive", "mlm"),
    ("contrastive", "rtd"),
    ("infoword", "none"),
    ("infoword", "mlm"),
    ("retromae", "none"),
    ("retromae", "mlm"),
    ("tsdae", "none"),
    ("tsdae", "mlm"),
]
NUM_TEXTS = {"contrastive": 3, "infoword": 2, "retromae": 1, "tsdae": 1}


def make_text(rng, *, least=3, most=40, with_types=False):
    length = int(rng.integers(least, most + 1))
    ids = rng.integers(FIRST, NUM_TOKENS, length).astype(np.int32)
    ids[0], ids[-1] = CLS, SEP
    words = rng.random(length) < 0.7
    words[[0, -1]] = True
    text = {"input_ids": ids, "word_starts": words}
    if with_types:
        text["token_type_ids"] = (np.arange(length) > length // 2).astype(np.int64)
    return text


def make_examples(count, *, num_texts=2, epoch=0, first_id=0, least=5, **options):
    """The same id gives the same example, with an n-gram of one to three tokens."""
    examples = []
    for number in range(first_id, first_id + count):
        rng = np.random.default_rng(number)
        texts = [make_text(rng, least=least, **options) for _ in range(num_texts)]
        length = len(texts[0]["input_ids"])
        begin = int(rng.integers(1, length - 1))
        examples.append(
            {
                "texts": texts,
                "ngram": (begin, min(begin + int(rng.integers(1, 4)), length - 1)),
                "document": number // 3,
                "example_id": number,
                "epoch": epoch,
            }
        )
    return examples


def collator_of(objective="contrastive", beside="none", *, side="right", tokenizer=None, **options):
    tokenizer = make_tokenizer(padding_side=side) if tokenizer is None else tokenizer
    return DataCollatorForContrastive(tokenizer, objective=objective, beside=beside, **options)


class Piece(NamedTuple):
    """One sequence of a batch, as a loop over the batch finds it."""

    text: int
    first: int
    ids: list
    labels: list
    types: list


def pieces_of(batch):
    """Cut a batch into its sequences token by token, and check what the entries say of each."""
    pieces = []
    packed = "document_ids" in batch
    assert packed == ("position_ids" in batch)
    entries = {name: values.tolist() for name, values in batch.items()}
    width = batch["input_ids"].shape[1]
    for row, mask in enumerate(entries["attention_mask"]):
        numbers = entries["document_ids"][row] if packed else [real - 1 for real in mask]
        ids, text_ids = entries["input_ids"][row], entries["text_ids"][row]
        labels = entries["labels"][row] if "labels" in entries else [-100] * width
        types = entries["token_type_ids"][row] if "token_type_ids" in entries else [0] * width
        found = {}
        for column, number in enumerate(numbers):
            assert (number >= 0) == (mask[column] == 1)
            if number < 0:
                assert (ids[column], text_ids[column], labels[column]) == (PAD, -1, -100)
                assert not packed or entries["position_ids"][row][column] == 0
            else:
                found.setdefault(number, []).append(column)
        assert list(found) == list(range(len(found)))
        for columns in found.values():
            begin, end = columns[0], columns[-1] + 1
            assert columns == list(range(begin, end))
            if packed:
                assert entries["position_ids"][row][begin:end] == list(range(end - begin))
            (text,) = set(text_ids[begin:end])
            pieces.append(Piece(text, row * width + begin, ids[begin:end], labels[begin:end], types[begin:end]))
    return pieces


def texts_of(batch):
    """The sequences with a vector in the order of their numbers, and the others."""
    pieces = pieces_of(batch)
    texts = sorted(piece for piece in pieces if piece.text >= 0)
    assert [piece.text for piece in texts] == list(range(len(batch["first_positions"])))
    assert [piece.first for piece in texts] == batch["first_positions"].tolist()
    return texts, [piece for piece in pieces if piece.text < 0]


def role_by_role(examples, name="input_ids"):
    num_texts = len(examples[0]["texts"])
    return [example["texts"][role][name].tolist() for role in range(num_texts) for example in examples]


def anchors_of(examples):
    return [
        {**example["texts"][0], "example_id": example["example_id"], "epoch": example["epoch"]} for example in examples
    ]


def masked_anchors(examples, **options):
    """The anchors as the collator of masked language modelling hides them: (ids, labels) each."""
    batch = DataCollatorForMaskedLM(make_tokenizer(), **options)(anchors_of(examples))
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [
        (batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist())
        for row, length in enumerate(lengths)
    ]


def decoder_rows(batch):
    """Each decoder row without its padding: (ids, labels); padding has neither."""
    ids, labels, mask = (batch[f"decoder_{name}"].tolist() for name in ("input_ids", "labels", "mask"))
    rows = []
    for row, length in enumerate(map(sum, mask)):
        assert mask[row] == [1] * length + [0] * (len(mask[row]) - length), "padded on the right"
        assert set(labels[row][length:]) <= {-100} and set(ids[row][length:]) <= {PAD}
        rows.append((ids[row][:length], labels[row][:length]))
    return rows
