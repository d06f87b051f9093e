"""One head for masked and for next tokens: what a step sees, what it predicts from where, and the sums of both losses."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, BertLMHeadModel

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.lm_modes import CausalView
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.losses import GatheredHead, masked_lm_loss
from hf_pretrain.objectives.encoder import DataCollatorForEncoder
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM

CLS, SEP, MASK = 2, 3, 4


def tiny_model(name="bert", **options):
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), 0.0)
    sizes = TINY | special | dropout | {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3} | options
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **sizes))


def hybrid(name="bert", *, shifted=True, **options):
    return EncoderForPreTraining.from_model(tiny_model(name, **options), has_clm=True, shifted=shifted).eval()


def examples_of(kinds, *, seed=0, frame=True, length=None):
    """Examples of 4 to 20 tokens, causal where the kind is 1; with [CLS] and [SEP] or without a special token."""
    draw, found = np.random.default_rng(seed), []
    for number, kind in enumerate(kinds):
        words = draw.integers(5, VOCAB_SIZE, length or draw.integers(4, 21))
        ids = [CLS, *words.tolist(), SEP] if frame else words.tolist()
        found.append({"input_ids": ids, "example_id": number, "epoch": 0, "is_causal": bool(kind)})
    return found


def collator(side="right", *, shifted=True, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForEncoder(tokenizer, shifted=shifted, **options)


def columns_of(batch):
    """Row -> columns of its targets, counted from its first token."""
    width, first = batch["labels"].shape[1], batch["attention_mask"].argmax(dim=1)
    found = {row: [] for row in range(len(first))}
    labels = batch["labels"].flatten()
    for flat in batch["target_positions"].tolist():
        if labels[flat] != -100:
            found[flat // width].append(flat % width - int(first[flat // width]))
    return found


# Batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_end_of_a_causal_row_that_is_cut_is_no_target(side, shifted):
    """What packing puts behind the last token is none of the text; one between two documents is."""
    rows = [[CLS, 7, SEP, 8, SEP], [CLS, 7, 8], [CLS, 9, SEP, SEP]]
    examples = [{"input_ids": ids, "example_id": n, "epoch": 0, "is_causal": True} for n, ids in enumerate(rows)]
    found = {}
    for ends in (True, False):
        batch = pickle.loads(pickle.dumps(collator(side, shifted=shifted, predicts_end=ends)))(examples)
        found[ends] = columns_of(batch)
    assert found[True] == {0: [1, 2, 3, 4], 1: [1, 2], 2: [1, 2, 3]}
    assert found[False] == {0: [1, 2, 3], 1: [1, 2], 2: [1, 2]}
    # The masked rows of the same batch are as they were.
    mixed = [examples_of([1, 0] * 20), examples_of([1, 0] * 20)]
    kept, dropped = (columns_of(collator(side, predicts_end=ends)(mixed[ends])) for ends in (True, False))
    lengths = [len(example["input_ids"]) for example in mixed[0]]
    for row, length in enumerate(lengths):
        assert dropped[row] == (kept[row] if row % 2 else [column for column in kept[row] if column != length - 1])


@pytest.mark.parametrize("frame", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shifted", [True, False])
def test_all_but_the_first_token_of_a_causal_row_are_targets_and_nothing_of_it_is_hidden(side, shifted, frame):
    kinds = [1, 0] * 60
    examples = examples_of(kinds, frame=frame)
    batch = pickle.loads(pickle.dumps(collator(side, shifted=shifted)))(examples)
    assert batch["is_causal"].tolist() == [bool(kind) for kind in kinds] and "token_type_ids" not in batch
    firsts = 0
    for row, columns in columns_of(batch).items():
        ids = torch.tensor(examples[row]["input_ids"])
        valid = batch["attention_mask"][row].bool()
        shown, labels = batch["input_ids"][row][valid], batch["labels"][row][valid]
        assert (batch["labels"][row][~valid] == -100).all(), "padding is no target"
        assert sorted(columns) == (labels != -100).nonzero().flatten().tolist()
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        if kinds[row]:
            assert torch.equal(shown, ids)
            assert columns == list(range(1, len(ids)))
        else:
            assert columns and (shown != ids).sum() <= len(columns)
            firsts += 0 in columns
    # Without a special token in front, a masked first token is a target only where it is predicted from itself.
    assert (firsts > 0) == (not shifted and not frame)


def test_masked_rows_are_those_of_the_collator_without_causal_ones():
    examples = examples_of([0, 1] * 20)
    batch = collator()(examples)
    alone = DataCollatorForMaskedLM(tiny_tokenizer())(examples)
    rows = ~batch["is_causal"]
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][rows], alone[name][rows])
    unmarked = [{key: value for key, value in row.items() if key != "is_causal"} for row in examples]
    plain = DataCollatorForEncoder(tiny_tokenizer())(unmarked)
    assert plain.keys() == alone.keys() and all(torch.equal(plain[name], alone[name]) for name in alone)


def test_the_first_token_of_an_isolated_document_is_not_hidden_where_the_token_before_it_would_predict_it():
    def firsts(shifted):
        examples = examples_of([0] * 200, frame=False, length=12)
        for row in examples:
            row |= {"document_ids": [0] * 5 + [1] * 7}
            del row["is_causal"]
        columns = columns_of(collator(shifted=shifted)(examples)).values()
        return sum(5 in row for row in columns), sum(4 in row for row in columns)

    assert firsts(True)[0] == 0 and firsts(True)[1] > 0 and firsts(False)[0] > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_fillers_change_no_loss(side):
    model = hybrid()
    for kinds in ([1, 0, 1], [1], [0]):
        examples = examples_of(kinds)
        plain, filled = (collator(side, target_slots=slots)(examples) for slots in (None, 64))
        assert len(filled["target_positions"]) == 64 > len(plain["target_positions"])
        with torch.no_grad():
            outputs = [model(**batch).losses for batch in (plain, filled)]
        for name in ("mlm", "clm"):
            torch.testing.assert_close(outputs[0][name].sum, outputs[1][name].sum)
            assert torch.equal(outputs[0][name].count, outputs[1][name].count)


def test_a_causal_view_keeps_types_and_refuses_isolated_documents():
    base = EpochDataset([{"input_ids": [2, 7, 3], "token_type_ids": [0, 1, 1]}])
    views = [CausalView(base, is_causal=kind)[0] for kind in (True, False)]
    assert [view["is_causal"] for view in views] == [True, False]
    assert all(view["token_type_ids"] == [0, 1, 1] for view in views)
    with pytest.raises(InputError, match="its documents are isolated"):
        CausalView(EpochDataset([{"input_ids": [2, 7, 3], "document_ids": [0, 0, 1]}]), is_causal=True)[0]


# What is seen


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_loss_of_a_next_token_does_not_depend_on_it_or_what_follows(name, shifted):
    """The derivative of one target's loss by the embeddings of all tokens, through the whole step."""
    model = hybrid(name, shifted=shifted)
    batch = collator(shifted=shifted)(examples_of([1, 0], length=10))
    length, kept = batch["labels"].shape[1], []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad_()) or output)

    def reached(row, column):
        labels = torch.full_like(batch["labels"], -100)
        labels[row, column] = batch["labels"][row, column]
        one = batch | {"labels": labels, "target_positions": torch.tensor([row * length + column])}
        kept.clear()
        output = model(**one)
        loss = output.losses["clm" if row == 0 else "mlm"].sum.sum()
        (gradient,) = torch.autograd.grad(loss, kept[-1])
        return gradient.abs().amax(dim=-1)

    for column in range(1, length):
        found = reached(0, column)
        assert (found[0, :column] > 0).all(), "all before it is seen"
        assert (found[0, column:] == 0).all(), "the token itself and what follows are not"
        assert (found[1] == 0).all()
    for column in (batch["labels"][1] != -100).nonzero().flatten().tolist():
        found = reached(1, column)
        assert (found[1] > 0).all() and (found[0] == 0).all()


# Losses


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shifted", [True, False])
def test_both_losses_are_those_of_the_stock_classes(side, shifted):
    """Next tokens: the stock decoder with the same weights and its own shift. Masked ones: the stock logits, by hand."""
    model, kinds = hybrid(shifted=shifted), [1, 0, 0, 1, 1, 0]
    examples = examples_of(kinds)
    batch = collator(side, shifted=shifted)(examples)
    config = copy.deepcopy(model.model.config)
    config.is_decoder = True
    decoder = BertLMHeadModel(config).eval()
    decoder.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        output = model(**batch)
        for row, kind in enumerate(kinds):
            valid = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][valid][None], batch["labels"][row][valid][None]
            if kind:
                wanted, count = decoder(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1), ids.shape[1] - 1
            else:
                logits = model.model(input_ids=ids).logits
                if shifted:
                    logits, labels = logits[:, :-1], labels[:, 1:]
                wanted = F.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
                count = int((labels != -100).sum())
            for name, is_own in (("clm", kind), ("mlm", not kind)):
                loss = output.losses[name]
                assert float(loss.sum[row]) == pytest.approx(float(wanted) if is_own else 0.0, rel=1e-4)
                assert int(loss.count[row]) == (count if is_own else 0)
    counts = model.count_targets(batch)
    assert {name: int(count) for name, count in counts.items()} == {
        name: int(loss.count.sum()) for name, loss in output.losses.items()
    }
    assert set(output.metrics) == {"mlm_accuracy", "clm_accuracy"}
    assert float(output.metrics["clm_accuracy"].count.sum()) == int(counts["clm"])


def test_a_batch_of_one_kind_has_a_loss_of_zero_for_the_other():
    model = hybrid()
    for kinds, empty in (([1, 1], "mlm"), ([0, 0], "clm")):
        batch = collator()(examples_of(kinds))
        losses = model(**batch).losses
        assert not losses[empty].sum.any() and not losses[empty].count.any()
        assert int(model.count_targets(batch)[empty]) == 0
        del batch["is_causal"]
        if kinds[0] == 0:
            torch.testing.assert_close(model(**batch).losses["mlm"].sum, losses["mlm"].sum, rtol=1e-5, atol=1e-5)
            assert int(model.count_targets(batch)["clm"]) == 0


def test_the_same_prediction_is_unchanged_to_the_bit():
    """The step without this objective is the stock model with its head at the targets."""
    stock = tiny_model()
    model = EncoderForPreTraining.from_model(stock).eval()
    examples = examples_of([0] * 8)
    for row in examples:
        del row["is_causal"]
    batch = collator(shifted=False)(examples)
    with torch.no_grad():
        loss = model(**batch).losses["mlm"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with GatheredHead(stock) as head:
            logits = head(stock, batch["target_positions"], **inputs)
    targets = batch["labels"].flatten()[batch["target_positions"]]
    wanted = masked_lm_loss(logits, targets, positions=batch["target_positions"], shape=batch["labels"].shape)
    assert torch.equal(loss.sum, wanted.sum) and torch.equal(loss.count, wanted.count)
    assert not hasattr(stock.config, "shifted_prediction")


def test_pairs_and_next_tokens_share_a_batch():
    """The head on the first token reads column 0, where padding on the left is moved away: the states of targets move along."""
    examples = examples_of([1, 0, 1, 0])
    for number, row in enumerate(examples):
        row["pair_label"] = -100 if row["is_causal"] else number % 2
    args = ModelArguments(**TINY | {"model_type": "bert"})
    composite = EncoderForPreTraining.from_arguments(
        args, tiny_tokenizer(), heads=["mlm", "pair"], has_clm=True, shifted=True
    ).eval()
    right, left = (collator(side, heads=["mlm", "pair"])(examples) for side in ("right", "left"))
    with torch.no_grad():
        outputs = [composite(**batch).losses for batch in (right, left)]
    for name in ("mlm", "clm", "pair"):
        assert float(outputs[0][name].sum.sum()) > 0
        torch.testing.assert_close(outputs[0][name].sum, outputs[1][name].sum, rtol=1e-4, atol=1e-4)


def test_a_target_without_a_token_before_it_is_refused_on_the_host():
    model = hybrid()
    for side in ("right", "left"):
        batch = collator(side)(examples_of([1, 0, 1]))
        assert model.host_inputs(batch, model.config) == {"is_padded": True}
        row = int((~batch["is_causal"]).nonzero()[0])
        first = int(batch["attention_mask"][row].argmax())
        batch["labels"][row, first] = 7
        with pytest.raises(InputError, match="is to be predicted from the token before it"):
            model.host_inputs(batch, model.config)
        same = hybrid(shifted=False)
        assert same.host_inputs(batch, same.config) == {"is_padded": True}, "it is predicted from itself"


def test_a_model_that_cannot_read_in_one_direction_is_refused_by_name():
    model = EncoderForPreTraining.from_model(tiny_model("fnet"), has_clm=True, shifted=True)
    with pytest.raises(InputError, match="FNetForMaskedLM with .*cannot read text in one direction"):
        model(**collator()(examples_of([1, 0])))


def test_the_stock_configuration_says_how_masked_tokens_are_predicted():
    stock = tiny_model()
    EncoderForPreTraining.from_model(stock, shifted=True)
    assert stock.config.shifted_prediction is True
    again = type(stock.config).from_dict(stock.config.to_dict())
    assert again.shifted_prediction is True
    EncoderForPreTraining.from_model(stock)
    assert not hasattr(stock.config, "shifted_prediction")
