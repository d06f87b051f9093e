from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertTokenizer, PreTrainedTokenizerFast, XLNetConfig, XLNetLMHeadModel

from hf_pretrain.corruption.permutation import PADDING_RANK
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.permutation_lm.collator import DataCollatorForPermutationLM, PermutationArguments
from hf_pretrain.objectives.permutation_lm.modeling import stock_inputs

PAD, UNK, CLS, SEP, EOD = 0, 1, 2, 3, 5
NUM_TOKENS = 60
OPTIONS = [
    {},
    {"target_unit": "word"},
    {"halves": False},
    {"perm_size": 5, "context_factor": 3.0},
    {"reuse_len": 20},
    {"target_unit": "given"},
]


def make_tokenizer(**options) -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eod>", *(f"w{i}" for i in range(NUM_TOKENS - 6))]
    return BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        additional_special_tokens=["<eod>"],
        **options,
    )


def make_examples(num_examples: int, *, least: int = 3, most: int = 70, epoch: int = 0) -> list[dict]:
    """Examples ... SEP ... SEP CLS of differing lengths; the same id gives the same example."""
    examples = []
    for example_id in range(num_examples):
        rng = np.random.default_rng(example_id)
        length = int(rng.integers(least, most + 1))
        input_ids = rng.integers(5, NUM_TOKENS, length).astype(np.int32)
        input_ids[[length // 2, -2, -1]] = SEP, SEP, CLS
        examples.append(
            {
                "input_ids": input_ids,
                "word_starts": rng.random(length) < 0.7,
                "targets": rng.permutation(length)[: length // 3],
                "order": rng.permutation(length),
                "example_id": example_id,
                "epoch": epoch,
            }
        )
    return examples


def collate(examples: list[dict], *, tokenizer: BertTokenizer | None = None, **options) -> dict[str, torch.Tensor]:
    names = ("seed", "pad_to_multiple_of", "target_slots")
    others = {name: options.pop(name) for name in names if name in options}
    collator = DataCollatorForPermutationLM(
        tokenizer or make_tokenizer(), permutation=PermutationArguments(**options), **others
    )
    return collator(examples)


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple]:
    """Each example of the batches without padding: tokens, ranks, thresholds, and its targets as (place, label)."""
    rows = []
    for batch in batches:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            first = int(mask.nonzero()[0])
            is_used = batch["labels"][row] != -100
            places = (batch["target_columns"][row][is_used] - first).tolist()
            values = [batch[name][row][mask].tolist() for name in ("input_ids", "key_ranks", "thresholds")]
            rows.append((*values, list(zip(places, batch["labels"][row][is_used].tolist(), strict=True))))
    return rows


class TinyDataset(Dataset):
    def __init__(self, examples: list[dict]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_holds_what_it_says(options, side):
    examples = make_examples(48)
    batch = collate(examples, tokenizer=make_tokenizer(padding_side=side), **options)
    width = max(len(example["input_ids"]) for example in examples)
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "key_ranks",
        "thresholds",
        "target_columns",
        "labels",
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["target_columns"].shape == batch["labels"].shape
    for name in ("input_ids", "attention_mask", "key_ranks", "thresholds"):
        assert batch[name].shape == (48, width)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        assert batch["attention_mask"][row].sum() == batch["attention_mask"][row, columns].sum() == length
        # The tokens are the real ones, at the targets too.
        assert batch["input_ids"][row, columns].tolist() == example["input_ids"].tolist()
        is_pad = batch["attention_mask"][row] == 0
        assert (batch["input_ids"][row][is_pad] == PAD).all()
        assert (batch["key_ranks"][row][is_pad] == PADDING_RANK).all() and not batch["thresholds"][row][is_pad].any()
        is_used = batch["labels"][row] != -100
        targets = batch["target_columns"][row][is_used]
        assert is_used.int().diff().le(0).all() and targets.diff().gt(0).all(), "ascending, fillers last"
        assert not batch["target_columns"][row][~is_used].any()
        assert torch.equal(batch["input_ids"][row, targets], batch["labels"][row][is_used])
        assert not np.isin(batch["labels"][row], [SEP, CLS, PAD]).any()
        if options.get("target_unit") != "given":
            num_candidates = int((~np.isin(example["input_ids"], [SEP, CLS])).sum())
            budget = max(round(length / options.get("context_factor", 6)), 1)
            assert is_used.sum() == min(budget, num_candidates)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_company_padding_and_workers_change_no_bit(options):
    examples = make_examples(32)
    collator = DataCollatorForPermutationLM(make_tokenizer(), permutation=PermutationArguments(**options))
    wanted = rows_of([collator(examples)])
    for size in (1, 4, 16):
        assert rows_of([collator(examples[start : start + size]) for start in range(0, 32, size)]) == wanted
    order = np.random.default_rng(0).permutation(32)
    assert rows_of([collator([examples[i] for i in order])]) == [wanted[i] for i in order]
    left = collate(examples, tokenizer=make_tokenizer(padding_side="left"), pad_to_multiple_of=32, **options)
    assert left["input_ids"].shape[1] == 96 and rows_of([left]) == wanted
    listed = [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in example.items()}
        for example in examples
    ]
    assert rows_of([pickle.loads(pickle.dumps(collator))(listed)]) == wanted


def test_workers_change_no_bit():
    dataset, collator = TinyDataset(make_examples(16)), DataCollatorForPermutationLM(make_tokenizer())
    alone, with_workers = (
        rows_of(list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collator)))
        for workers in (0, 2)
    )
    assert alone == with_workers


def test_another_epoch_or_seed_draws_anew():
    first, epoch = (rows_of([collate(make_examples(16, least=60, epoch=number))]) for number in range(2))
    seed = rows_of([collate(make_examples(16, least=60), seed=1)])
    for other in (epoch, seed):
        for mine, yours in zip(first, other, strict=True):
            assert mine[0] == yours[0] and mine[1] != yours[1] and mine[3] != yours[3]
    assert rows_of([collate(make_examples(16, least=60))]) == first


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("unit", ["official", "word"])
def test_short_rows_have_a_target_and_rows_of_specials_none(halves, unit):
    examples = [
        {"input_ids": [*[9] * (length - 1), CLS], "word_starts": [True] * length, "example_id": length, "epoch": 0}
        for length in range(2, 11)
    ]
    batch = collate(examples, halves=halves, target_unit=unit)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [1] * 7 + [2, 2]
    bare = [{"input_ids": [SEP, CLS], "word_starts": [True] * 2, "example_id": i, "epoch": 0} for i in range(2)]
    empty = collate([*bare, examples[3]], halves=halves, target_unit=unit)
    assert (empty["labels"] != -100).sum(dim=1).tolist() == [0, 0, 1]
    alone = collate(bare, halves=halves, target_unit=unit)
    assert alone["labels"].tolist() == [[-100], [-100]] and alone["target_columns"].tolist() == [[0], [0]]
    for converted in (empty, alone):
        assert stock_model()(**stock_inputs(converted)).logits.isfinite().all()


def test_documents_ends_and_unknown_tokens_are_ordinary():
    ids = [UNK, EOD] * 6
    examples = [{"input_ids": [*ids, SEP, CLS], "word_starts": [True] * 14, "example_id": 0, "epoch": 0}]
    batch = collate(examples, context_factor=1.0)
    assert batch["labels"].tolist() == [ids]


def test_tokenizers_without_separator_have_no_functional_tokens():
    backend = make_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    examples = [{"input_ids": [7, SEP, CLS], "word_starts": [True] * 3, "example_id": 0, "epoch": 0}]
    assert collate(examples, tokenizer=tokenizer, context_factor=1.0)["labels"].tolist() == [[7, SEP, CLS]]


def test_target_slots_round_up():
    examples = make_examples(16)
    plain, wide = collate(examples), collate(examples, target_slots=8)
    most = plain["labels"].shape[1]
    assert (plain["labels"] != -100).sum(dim=1).max() == most
    assert wide["labels"].shape[1] == -(-most // 8) * 8 > most
    assert torch.equal(wide["labels"][:, :most], plain["labels"]) and (wide["labels"][:, most:] == -100).all()
    assert torch.equal(wide["target_columns"][:, :most], plain["target_columns"])


def test_given_targets_in_a_given_order():
    example = {"input_ids": [9, 10, SEP, 11, 12, CLS], "example_id": 0, "epoch": 0}
    example |= {"targets": [4, 0, 1, 5], "order": [4, 1, 0, 2, 3, 5]}
    batch = collate([example], target_unit="given", halves=False)
    assert batch["target_columns"].tolist() == [[0, 1, 4]] and batch["labels"].tolist() == [[9, 10, 12]]
    sees = batch["key_ranks"][0, None, :] < batch["thresholds"][0, :, None]
    assert sees[4].nonzero().flatten().tolist() == [3]
    assert sees[1].nonzero().flatten().tolist() == [3, 4]
    assert sees[0].nonzero().flatten().tolist() == [1, 3, 4]
    del example["order"]
    orders = {
        tuple(collate([example | {"epoch": epoch}], target_unit="given")["key_ranks"][0].tolist())
        for epoch in range(9)
    }
    assert len(orders) > 1


def test_lanes_travel_and_backward_rows_are_sampled_in_reading_order():
    examples = make_examples(4, least=40)
    for lane, example in enumerate(examples):
        example |= {"lane": lane + 8, "memory_reset": lane == 1, "backward": lane % 2 == 1}
        example["token_type_ids"] = np.arange(len(example["input_ids"])) % 3
    batch = collate(examples, tokenizer=make_tokenizer(padding_side="left"))
    assert batch["lanes"].tolist() == [8, 9, 10, 11] and batch["lanes"].dtype == torch.int64
    assert batch["memory_reset"].tolist() == [False, True, False, False] and batch["memory_reset"].dtype == torch.bool
    assert batch["backward"].tolist() == [False, True] * 2 and batch["backward"].dtype == torch.bool
    for row, example in enumerate(examples):
        mask = batch["attention_mask"][row].bool()
        assert batch["token_type_ids"][row][mask].tolist() == example["token_type_ids"].tolist()
    forwards = collate([{name: example[name] for name in example if name != "backward"} for example in examples])
    same = [mine[3] == yours[3] for mine, yours in zip(rows_of([batch]), rows_of([forwards]), strict=True)]
    assert same == [True, False] * 2


@pytest.mark.parametrize("unit", ["official", "word"])
def test_a_backward_row_gets_the_targets_of_its_mirror(unit):
    # Spans alone, no filling: with so few targets every draw lies in a span, and only where spans lie is compared.
    length, num_rows = 240, 200
    at_start = {False: 0, True: 0}
    for backward in at_start:
        examples = []
        for example_id in range(num_rows):
            starts = np.random.default_rng(example_id).random(length) < 0.25
            ids = np.where(starts, 10, 20)  # a word start by its id
            step = -1 if backward else 1
            examples.append({"input_ids": ids[::step], "word_starts": starts[::step], "example_id": example_id})
            examples[-1] |= {"epoch": 0, "backward": backward}
        batch = collate(examples, target_unit=unit)
        mask = torch.zeros_like(batch["input_ids"]).scatter_(1, batch["target_columns"], 1).bool()
        if backward:
            mask, ids = mask.flip(1), batch["input_ids"].flip(1)
        else:
            ids = batch["input_ids"]
        first_of_run = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        at_start[backward] = float((ids[first_of_run] == 10).float().mean())
    assert abs(at_start[True] - at_start[False]) < 0.03
    assert min(at_start.values()) > 0.6  # a quarter of the tokens start a word


# Stock XLNet


def stock_model(layers: int = 3) -> XLNetLMHeadModel:
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=NUM_TOKENS, d_model=24, n_layer=layers, n_head=2, d_inner=32, dropout=0.0, initializer_range=0.3
    )
    return XLNetLMHeadModel(config).eval()


@pytest.mark.parametrize("side", ["right", "left"])
def test_converted_inputs_are_those_of_a_plain_loop(side):
    examples = make_examples(6)
    for example in examples:
        example["token_type_ids"] = np.zeros_like(example["input_ids"])
    batch = collate(examples, tokenizer=make_tokenizer(padding_side=side), context_factor=3.0)
    inputs = stock_inputs(batch)
    size, width = batch["input_ids"].shape
    perm_mask = torch.zeros(size, width, width)
    mapping = torch.zeros(size, batch["labels"].shape[1], width)
    for row in range(size):
        for i in range(width):
            for j in range(width):
                perm_mask[row, i, j] = float(batch["key_ranks"][row, j] >= batch["thresholds"][row, i])
        for slot, column in enumerate(batch["target_columns"][row].tolist()):
            if batch["labels"][row, slot] != -100:
                mapping[row, slot, column] = 1.0
    assert torch.equal(inputs["perm_mask"], perm_mask) and torch.equal(inputs["target_mapping"], mapping)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert torch.equal(inputs[name], batch[name])
    assert stock_inputs(batch, dtype=torch.bfloat16)["perm_mask"].dtype == torch.bfloat16


def dependence(
    batch: dict[str, torch.Tensor], *, change: Callable[[torch.Tensor], None] | None = None
) -> torch.Tensor:
    """`[B, P, L]`: how strongly each target's logits depend on each token, in a stock model of three layers."""
    model, inputs = stock_model(), stock_inputs(batch)
    if change is not None:
        change(inputs["perm_mask"])
    del inputs["labels"]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **inputs).logits
    weights = torch.linspace(-1, 1, NUM_TOKENS)
    slots = [
        torch.autograd.grad((logits[:, slot] * weights).sum(), embeds, retain_graph=True)[0].abs().amax(-1)
        for slot in range(logits.shape[1])
    ]
    return torch.stack(slots, dim=1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"halves": False}, {"target_unit": "word", "perm_size": 4}], ids=str)
def test_in_stock_xlnet_no_target_depends_on_itself_or_on_what_comes_later(side, options):
    examples = make_examples(5, least=12, most=31)
    batch = collate(examples, tokenizer=make_tokenizer(padding_side=side), context_factor=3.0, **options)
    depends = dependence(batch)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        is_used = batch["labels"][row] != -100
        targets, ranks = batch["target_columns"][row][is_used], batch["key_ranks"][row]
        assert not depends[row, :, ~mask].any()
        for slot, column in enumerate(targets.tolist()):
            later = targets[ranks[targets] >= ranks[column]]  # itself among them
            assert (depends[row, slot, later] == 0).all()
            earlier = targets[ranks[targets] < ranks[column]]
            assert (depends[row, slot, earlier] > 0).all()
        if options.get("halves", True):
            border = int(mask.nonzero()[0]) + (int(mask.sum()) + 1) // 2
            first = targets < border
            assert first.any() and not first.all()
            assert (depends[row, : len(targets)][first][:, border:] == 0).all()
            is_real = mask.clone()
            is_real[border:] = False
            assert (depends[row, : len(targets)][~first][:, is_real] > 0).all()


def test_functional_tokens_that_all_may_see_would_leak():
    batch = collate(make_examples(5, least=12, most=31), context_factor=3.0)
    is_functional = (batch["input_ids"] == SEP) | (batch["input_ids"] == CLS)

    def show_functional(perm_mask: torch.Tensor) -> None:
        perm_mask.masked_fill_(is_functional[:, None, :], 0.0)

    own = dependence(batch, change=show_functional).gather(2, batch["target_columns"][..., None])[..., 0]
    assert (own[batch["labels"] != -100] > 0).any()


def test_backward_rows_are_not_converted():
    examples = [example | {"backward": True} for example in make_examples(2)]
    with pytest.raises(InputError, match="backward is set for some rows"):
        stock_inputs(collate(examples))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_unit": "span"}, "target_unit='span' must be one of official, word, given"),
        ({"context_factor": 0.5}, "context_factor=0.5 must be at least 1"),
        ({"context_factor": "6"}, "context_factor='6' must be a number"),
        ({"max_span_length": 0}, "max_span_length=0 must be at least 1"),
        ({"max_span_length": None}, "max_span_length=None must be"),
        ({"reuse_len": 0}, "reuse_len=0 must be"),
        ({"perm_size": 2.5}, "perm_size=2.5 must be"),
        ({"perm_size": 9, "reuse_len": 8}, "perm_size=9 is more than reuse_len=8"),
        ({"halves": False, "reuse_len": 8}, "reuse_len=8 has no meaning for halves=False"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PermutationArguments(**options)


def test_examples_and_tokenizers_that_cannot_work_are_refused():
    examples = make_examples(2)
    for missing, options, fix in (
        ("word_starts", {}, "target_unit='official' needs"),
        ("targets", {"target_unit": "given"}, "target_unit='given' needs"),
        ("epoch", {}, "EpochDataset"),
    ):
        kept = [{name: example[name] for name in example if name != missing} for example in examples]
        with pytest.raises(InputError, match=f"'{missing}'.*{fix}"):
            collate(kept, **options)
    with pytest.raises(InputError, match="targets holds 70 in an example of"):
        collate([examples[0] | {"targets": [70]}], target_unit="given")
    with pytest.raises(InputError, match="order="):
        collate([examples[0] | {"order": [0]}], target_unit="given")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(InputError, match="no padding token"):
        collate(examples, tokenizer=tokenizer)
    for name in ("pad_to_multiple_of", "target_slots"):
        with pytest.raises(InputError, match=f"{name}=0"):
            collate(examples, **{name: 0})
