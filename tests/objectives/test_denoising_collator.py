"""The batches of pairs: frames, what the decoder reads, pairs that share a row, fixed shapes."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_pretrain.corruption.denoising import BartNoise
from hf_pretrain.corruption.fragments import Denoiser, MassNoise, PrefixLM, SpanCorruption, UL2Noise
from hf_pretrain.corruption.texts import Noise, NoisedTexts
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.denoising.collator import START, DataCollatorForDenoising

PAD, UNK, CLS, SEP, MASK, EOS = range(6)
SENTINELS = np.arange(6, 26)
MODES = {"R": 26, "X": 27, "S": 28}
FIRST_WORD = 29


def tokenizer(frame="bert"):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *(f"<extra_id_{i}>" for i in range(20))]
    names += ["[NLU]", "[NLG]", "[S2S]", *(f"w{i}" for i in range(100))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = {"bert": "[CLS] $A [SEP]", "t5": "$A </s>", "bare": "$A"}[frame]
    special = [(name, names.index(name)) for name in ("[CLS]", "[SEP]", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "</s>"}
    if frame == "bert":
        roles |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=[*names[6:26], *names[26:29]], **roles
    )


class Untouched(Noise):
    """Input and target are the text."""

    def __call__(self, texts):
        hidden = np.zeros_like(texts.valid)
        kinds = np.zeros(len(texts.rows), dtype=np.int64)
        return NoisedTexts(texts.input_ids, texts.valid, texts.input_ids, texts.valid, hidden, kinds)


def example(words, number, *, frame="bert", epoch=0, documents=None):
    """A block of words, or of several documents, each in the frame."""
    before, behind = {"bert": ([CLS], [SEP]), "t5": ([], [EOS]), "bare": ([], [])}[frame]
    parts = [words] if documents is None else documents
    rows = [[*before, *part, *behind] for part in parts]
    ids = [token for row in rows for token in row]
    made = {
        "input_ids": ids,
        "word_starts": [True] * len(ids),
        "sent_starts": [token % 4 == 1 and token >= FIRST_WORD for token in ids],
        "example_id": number,
        "epoch": epoch,
    }
    if documents is not None:
        made["document_ids"] = [i for i, row in enumerate(rows) for _ in row]
    return made


def words(count, start=0):
    return [FIRST_WORD + (start + 3 * i) % 100 for i in range(count)]


NOISES = {
    "bart": BartNoise(steps=("sentence_permutation", "infilling"), mask_token_id=MASK),
    "t5": SpanCorruption(sentinels=SENTINELS),
    "ul2": UL2Noise(denoisers=(Denoiser("R", 0.15, 3.0), Denoiser("S", 0.25)), sentinels=SENTINELS, mode_ids=MODES),
    "prefix_lm": PrefixLM(),
    "mass": MassNoise(share=0.5, mask_token_id=MASK, random_ids=np.arange(FIRST_WORD, 129)),
}


def rows_of(batch, *names):
    """The real part of each row."""
    side = "decoder_attention_mask" if "label" in names[0] or "decoder" in names[0] else "attention_mask"
    lengths = batch[side].sum(1).tolist()
    return [[batch[name][i, :length].tolist() for name in names] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("frame", ["bert", "t5", "bare"])
def test_both_sides_are_framed_as_the_tokenizer_frames_a_text(frame):
    class Whole(Untouched):
        has_whole_target = True

    noise = Whole(has_whole_target=True)
    collator = DataCollatorForDenoising(tokenizer(frame), noise=noise)
    examples = [example(words(n, n), n, frame=frame) for n in (5, 2, 9)]
    batch = collator(examples)
    for made, ((ids,), (labels, moved)) in zip(
        examples,
        zip(rows_of(batch, "input_ids"), rows_of(batch, "labels", "decoder_input_ids"), strict=True),
        strict=True,
    ):
        assert ids == labels == made["input_ids"]
        assert moved == [START, *labels[:-1]]
    assert set(batch["labels"][batch["decoder_attention_mask"] == 0].tolist()) == {-100}
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {PAD}


@pytest.mark.parametrize(("frame", "end"), [("bert", [SEP]), ("t5", [EOS]), ("bare", [EOS])])
def test_a_target_that_is_no_whole_text_has_its_end_alone(frame, end):
    collator = DataCollatorForDenoising(tokenizer(frame), noise=Untouched())
    (row,) = rows_of(collator([example(words(4), 0, frame=frame)]), "labels")
    assert row == [words(4) + end]


def test_text_without_its_frame_is_taken_as_it_is():
    made = example(words(4), 0, frame="bare")
    batch = DataCollatorForDenoising(tokenizer(), noise=Untouched())([made])
    assert batch["input_ids"].tolist() == [[CLS, *words(4), SEP]]


@pytest.mark.parametrize("name", NOISES)
def test_a_pair_does_not_depend_on_the_batch_and_changes_with_the_epoch(name):
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES[name], seed=3)
    examples = [example(words(n, n), n) for n in (30, 7, 50, 3)]
    together = collator(examples)
    sides = {
        "input_ids": "attention_mask",
        "decoder_input_ids": "decoder_attention_mask",
        "labels": "decoder_attention_mask",
        "is_hidden": "decoder_attention_mask",
        "target_kinds": "decoder_attention_mask",
    }
    for i, made in enumerate(examples):
        alone = collator([made])
        for column, mask in sides.items():
            assert alone[column][0].tolist() == together[column][i, : together[mask][i].sum()].tolist()
    again = collator([example(words(n, n), n, epoch=1) for n in (30, 7, 50, 3)])
    assert again["input_ids"].tolist() != together["input_ids"].tolist()
    frozen = DataCollatorForDenoising(tokenizer(), noise=NOISES[name], seed=3, static_masks=1)
    later = frozen([example(words(n, n), n, epoch=5) for n in (30, 7, 50, 3)])
    assert all(torch.equal(later[column], together[column]) for column in together)
    other = DataCollatorForDenoising(tokenizer(), noise=NOISES[name], seed=4)(examples)
    assert other["input_ids"].tolist() != together["input_ids"].tolist()


@pytest.mark.parametrize("name", NOISES)
def test_targets_are_moved_by_one_and_gathered(name):
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES[name])
    batch = collator([example(words(n, n), n) for n in (30, 7, 50, 3)])
    moved, labels = batch["decoder_input_ids"], batch["labels"]
    real = labels[:, 1:] != -100
    assert torch.equal(moved[:, 1:][real], labels[:, :-1][real])
    if name != "mass":
        assert set(moved[:, 0].tolist()) == {START}
    assert batch["target_positions"].tolist() == (labels.flatten() != -100).nonzero().flatten().tolist()
    assert torch.equal(batch["decoder_attention_mask"] == 1, labels != -100)
    assert not batch["is_hidden"][labels == -100].any()


def test_a_fragment_begins_behind_its_own_token_and_keeps_its_positions():
    """The decoder's input is what stock BART would read at these positions, were it given the whole text."""
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES["mass"])
    examples = [example(words(n, n), n) for n in (30, 8, 50, 3)]
    batch = collator(examples)
    for i, made in enumerate(examples):
        whole = made["input_ids"]
        length = int(batch["decoder_attention_mask"][i].sum())
        positions = batch["decoder_position_ids"][i, :length].tolist()
        assert positions == list(range(positions[0], positions[0] + length))
        assert batch["labels"][i, :length].tolist() == whole[positions[0] : positions[0] + length]
        assert batch["decoder_input_ids"][i, :length].tolist() == whole[positions[0] - 1 : positions[0] + length - 1]


@pytest.mark.parametrize("frame", ["bert", "t5"])
@pytest.mark.parametrize("name", NOISES)
def test_pairs_of_a_row_are_those_of_rows_of_their_own(name, frame):
    """Each pair of isolated documents, at its own positions, with the draws of its place in the example."""
    noise = NOISES[name]
    collator = DataCollatorForDenoising(tokenizer(frame), noise=noise)
    documents = [words(20, 1), words(5, 40), words(13, 70)]
    made = example(None, 9, frame=frame, documents=documents)
    batch = collator([made, example(None, 10, frame=frame, documents=[words(45)])])
    texts, isolates = collator.read([made])
    assert isolates
    pairs = noise(texts)
    alone = collator.assemble(type(texts)(**{**vars(texts), "rows": np.arange(3)}), pairs, num_rows=3, isolates=False)
    for side, ids, documents_name in (
        ("attention_mask", ("input_ids",), "document_ids"),
        ("decoder_attention_mask", ("decoder_input_ids", "labels", "is_hidden"), "decoder_document_ids"),
    ):
        lengths = alone[side].sum(1).tolist()
        numbers = [i for i, length in enumerate(lengths) for _ in range(length)]
        row = batch[documents_name][0].tolist()
        assert row == numbers + [-1] * (len(row) - len(numbers))
        for column in ids:
            found = [value for i, length in enumerate(lengths) for value in alone[column][i, :length].tolist()]
            assert batch[column][0, : len(numbers)].tolist() == found
    positions = [i for length in alone["attention_mask"].sum(1).tolist() for i in range(length)]
    assert batch["position_ids"][0, : len(positions)].tolist() == positions
    starts = batch["decoder_position_ids"][0, : int(alone["decoder_attention_mask"].sum())].tolist()
    if name == "mass":
        alone_positions = alone["decoder_position_ids"]
    else:
        alone_positions = torch.arange(alone["labels"].shape[1]).expand_as(alone["labels"])
    lengths = alone["decoder_attention_mask"].sum(1).tolist()
    assert starts == [value for i, n in enumerate(lengths) for value in alone_positions[i, :n].tolist()]


def test_sides_of_a_document_between_others_are_its_own_text():
    collator = DataCollatorForDenoising(tokenizer("t5"), noise=Untouched())
    documents = [words(3, 1), words(1, 40), words(4, 70)]
    batch = collator([example(None, 0, frame="t5", documents=documents)])
    assert batch["input_ids"][0].tolist() == [token for part in documents for token in [*part, EOS]]
    starts = [i for i, token in enumerate(batch["decoder_input_ids"][0].tolist()) if token == START]
    assert starts == [0, 4, 6]


def test_shapes_are_fixed_where_they_are_to_be():
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES["t5"], pad_to_multiple_of=16, target_slots=32)
    batches = [collator([example(words(n, k), k * n) for k in range(3)]) for n in (33, 40, 37)]
    for batch in batches:
        assert batch["input_ids"].shape[1] % 16 == batch["labels"].shape[1] % 16 == 0
        assert len(batch["target_positions"]) % 32 == 0
        real = int((batch["labels"] != -100).sum())
        filled = batch["target_positions"][real:]
        assert (batch["labels"].flatten()[filled] == -100).all()
        assert not batch["is_hidden"].flatten()[filled].any()
    full = DataCollatorForDenoising(tokenizer(), noise=Untouched(), target_slots=7)([example(words(4), 0)])
    assert (full["labels"].flatten()[full["target_positions"][5:]] == -100).all()


@pytest.mark.parametrize(("name", "column"), [("bart", "sent_starts"), ("bart", "word_starts")])
def test_a_column_that_the_noise_reads_is_asked_for(name, column):
    made = example(words(5), 0)
    del made[column]
    with pytest.raises(InputError, match=column):
        DataCollatorForDenoising(tokenizer(), noise=NOISES[name])([made])


@pytest.mark.parametrize("name", ["t5", "ul2", "prefix_lm", "mass"])
def test_tokens_alone_do_where_the_noise_reads_no_words(name):
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES[name])
    whole = [example(words(n, n), n) for n in (30, 7)]
    alone = [{key: made[key] for key in ("input_ids", "example_id", "epoch")} for made in whole]
    expected, found = collator(whole), collator(alone)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_separator_inside_a_text_stays_a_token_of_its_own():
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES["bart"])
    inside = [*words(6), SEP, *words(6, 50)]
    texts, _ = collator.read([example(inside, 0)])
    assert texts.is_special[0].tolist() == [token == SEP for token in inside]
    assert texts.input_ids[0].tolist() == inside
