"""The composite of an encoder-decoder: its loss against the stock one, pairs that share a row, and its metrics."""

import pytest
import torch
from test_denoising_collator import FIRST_WORD, NOISES, example, tokenizer, words
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.denoising.collator import DataCollatorForDenoising
from hf_pretrain.objectives.denoising.modeling import DenoisingForPreTraining, exact_runs

VOCABULARY = FIRST_WORD + 100
TINY = {"vocab_size": VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 5}


def stock(kind):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(**TINY, **sizes, decoder_start_token_id=0))
    sizes = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("ffn_dim", 48))
    }
    sizes |= {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    }
    return BartForConditionalGeneration(BartConfig(**TINY, **sizes, bos_token_id=2, decoder_start_token_id=5))


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("noise", ["bart", "t5", "ul2", "prefix_lm"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_the_stock_loss(kind, noise):
    batch = DataCollatorForDenoising(tokenizer(), noise=NOISES[noise])([example(words(n, n), n) for n in (40, 8, 23)])
    model = stock(kind)
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    composite = DenoisingForPreTraining.from_model(model)
    loss = composite(**batch).losses["denoising"]
    torch.testing.assert_close(loss.sum.sum() / loss.count.sum(), expected.loss, rtol=1e-5, atol=1e-6)
    counts = (batch["labels"] != -100).sum(1)
    assert loss.count.tolist() == counts.tolist()
    assert composite.count_targets(batch) == {"denoising": counts.sum()}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_pairs_of_a_row_have_loss_and_gradient_of_rows_of_their_own(kind, noise):
    """The same pairs twice: packed by documents, and one a row."""
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES[noise])
    examples = [
        example(None, 9, documents=[words(20, 1), words(5, 40), words(13, 70)]),
        example(None, 10, documents=[words(9, 3), words(30, 8)]),
    ]
    packed = collator(examples)
    texts, _ = collator.read(examples)
    pairs = collator.noise(texts)
    alone = collator.assemble(
        type(texts)(**{**vars(texts), "rows": torch.arange(5).numpy()}), pairs, num_rows=5, isolates=False
    )
    composite = DenoisingForPreTraining.from_model(stock(kind))
    sums, found = [], []
    for batch in (packed, alone):
        composite.zero_grad()
        total = composite(**batch).losses["denoising"].sum.sum()
        total.backward()
        sums.append(float(total.detach()))
        found.append(gradients_of(composite))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    scale = max(float(value.abs().max()) for value in found[1].values())
    assert all(float((found[0][name] - value).abs().max()) < 1e-5 * scale for name, value in found[1].items())


def test_a_fragment_is_read_as_stock_bart_reads_the_end_of_a_whole_target():
    """MASS: what the fragment does not hold is hidden from the decoder, and positions are those of the text."""
    batch = DataCollatorForDenoising(tokenizer(), noise=NOISES["mass"])([example(words(n, n), n) for n in (40, 8, 23)])
    model = stock("bart")
    whole = DataCollatorForDenoising(tokenizer(), noise=NOISES["bart"])([example(words(n, n), n) for n in (40, 8, 23)])
    ids, length = whole["decoder_input_ids"].clamp(min=0), whole["labels"].shape[1]
    ids[:, 0] = 5
    labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (positions, mask) in enumerate(
        zip(batch["decoder_position_ids"], batch["decoder_attention_mask"], strict=True)
    ):
        places = positions[mask == 1]
        labels[row, places], seen[row, places] = whole["labels"][row, places], 1
    assert length == int(whole["attention_mask"].shape[1]) or length > 0
    expected = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=ids,
        decoder_attention_mask=seen,
        labels=labels,
    )
    loss = DenoisingForPreTraining.from_model(model)(**batch).losses["denoising"]
    torch.testing.assert_close(loss.sum.sum() / loss.count.sum(), expected.loss, rtol=1e-5, atol=1e-6)


def test_metrics_against_a_loop():
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES["ul2"], target_slots=16)
    batch = collator([example(words(n, n), n) for n in (40, 8, 23, 31)])
    model = stock("t5")
    # Guesses that are often right, so that runs of all kinds come.
    composite = DenoisingForPreTraining.from_model(model, kinds=list(NOISES["ul2"].kinds))
    optimizer = torch.optim.Adam(composite.parameters(), lr=3e-3)
    for _ in range(11):
        loss = composite(**batch).losses["denoising"]
        optimizer.zero_grad()
        (loss.sum.sum() / loss.count.sum()).backward()
        optimizer.step()
    composite.eval()
    with torch.no_grad():
        output = composite(**batch)
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).logits.log_softmax(-1)
    for row, labels in enumerate(batch["labels"]):
        right, hidden_nll, by_kind, runs = [], [], [0.0, 0.0], []
        for column, target in enumerate(labels.tolist()):
            if target == -100:
                continue
            nll = -float(logits[row, column, target])
            is_right = int(logits[row, column].argmax()) == target
            right.append(is_right)
            by_kind[int(batch["target_kinds"][row, column])] += nll
            if batch["is_hidden"][row, column]:
                hidden_nll.append((nll, is_right))
                if column and batch["is_hidden"][row, column - 1]:
                    runs[-1].append(is_right)
                else:
                    runs.append([is_right])
        metrics = {name: (float(value.sum[row]), float(value.count[row])) for name, value in output.metrics.items()}
        assert metrics["denoising_accuracy"] == (sum(right), len(right))
        assert metrics["hidden_nll"] == (pytest.approx(sum(n for n, _ in hidden_nll), rel=1e-4), len(hidden_nll))
        assert metrics["hidden_accuracy"] == (sum(r for _, r in hidden_nll), len(hidden_nll))
        assert metrics["spans_exact"] == (sum(map(all, runs)), len(runs))
        for kind, total in zip(NOISES["ul2"].kinds, by_kind, strict=True):
            assert metrics[f"{kind}_nll"][0] == pytest.approx(total, rel=1e-4, abs=1e-5)
    exact = output.metrics["spans_exact"]
    assert 0 < exact.sum.sum() < exact.count.sum()


def test_runs_do_not_go_on_into_the_next_row():
    hidden = torch.tensor([True, True, True, True, False, True, False])
    right = torch.tensor([True, True, False, True, True, True, True])
    positions = torch.tensor([2, 3, 4, 5, 6, 7, 0])
    found = exact_runs(right, hidden, positions=positions, shape=torch.Size((2, 4)))
    assert found.count.tolist() == [1, 2]
    assert found.sum.tolist() == [1, 1]


def test_training_gives_no_metrics():
    batch = DataCollatorForDenoising(tokenizer(), noise=NOISES["t5"])([example(words(9), 0)])
    composite = DenoisingForPreTraining.from_model(stock("t5"))
    assert composite.train()(**batch).metrics == {}
    assert composite.eval()(**batch).metrics


def test_a_model_that_names_no_start_is_refused():
    model = stock("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        DenoisingForPreTraining.from_model(model)


def test_padding_makes_no_difference():
    collator = DataCollatorForDenoising(tokenizer(), noise=NOISES["bart"])
    examples = [example(words(n, n), n) for n in (40, 8, 23)]
    composite = DenoisingForPreTraining.from_model(stock("bart")).eval()
    tight = composite(**collator(examples)).losses["denoising"].sum
    collator.pad_to_multiple_of, collator.target_slots = 64, 100
    torch.testing.assert_close(composite(**collator(examples)).losses["denoising"].sum, tight, rtol=1e-5, atol=1e-5)
