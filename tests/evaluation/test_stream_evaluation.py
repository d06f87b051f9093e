"""Scoring a text as a stream: every token once, the same total in any windows, and what a sliding window would give."""

import math

import datasets
import pytest
import torch

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.streams import memory_lengths, sliding_window_evaluate, stream_evaluate
from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM

TOKENIZER = tiny_tokenizer()
# The last document has characters of two and three bytes, which the tokenizer does not know.
TEXTS = [" ".join(f"w{(i * i + 3 * k) % 55}" for i in range(9 + k)) for k in range(4)] + ["w7 é 東"]
NUM_TOKENS = 9 + 10 + 11 + 12 + 3 + 5


def make_model(layers=2):
    """Weights large enough for attention to matter without training."""
    torch.manual_seed(0)
    config = TransformerXLConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        mem_len=5,
    )
    return TransformerXLForCausalLM(config)


def score(model, **options):
    (row,) = stream_evaluate(model, TOKENIZER, TEXTS, **{"mem_lens": [8], "clamp_lens": [-1], **options})
    return row


@torch.no_grad()
def test_a_memory_of_everything_gives_the_loss_of_one_pass():
    model = make_model().eval()
    row = score(model, window=7, mem_lens=[NUM_TOKENS], same_length=False)
    separator = TOKENIZER.sep_token_id
    ids = [separator]
    for text in TEXTS:
        ids += [*TOKENIZER(text, add_special_tokens=False).input_ids, separator]
    whole = torch.tensor([ids])
    nll, _, _ = model.token_nll(whole[:, :-1], whole[:, 1:])
    assert row.nats == pytest.approx(float(nll.sum()), rel=1e-5)
    assert row.num_tokens == NUM_TOKENS == len(ids) - 1


def test_with_same_length_windows_change_nothing():
    model = make_model(layers=3)
    rows = [score(model, window=window) for window in (1, 4, 7, NUM_TOKENS, 200)]
    assert [row.nats for row in rows] == pytest.approx([rows[0].nats] * 5, rel=1e-5)
    assert {row.num_tokens for row in rows} == {NUM_TOKENS}
    free = score(model, window=7, same_length=False)
    assert free.nats != pytest.approx(rows[0].nats, rel=1e-4)


def test_one_layer_sees_what_a_sliding_window_reads_anew():
    """Deeper models see further through what they remember, which a window that is read anew does not."""
    for layers in (1, 2):
        model = make_model(layers)
        cached = score(model, window=6, mem_lens=[7]).nats
        sliding = sliding_window_evaluate(model, TOKENIZER, TEXTS, context=8)
        assert sliding.num_tokens == NUM_TOKENS
        assert (cached == pytest.approx(sliding.nats, rel=1e-5)) == (layers == 1)


def test_a_sample_of_the_sliding_window_in_any_batches():
    model = make_model()
    rows = [
        sliding_window_evaluate(model, TOKENIZER, TEXTS, context=5, num_targets=11, batch_size=batch_size)
        for batch_size in (1, 4, 50)
    ]
    assert [row.nats for row in rows] == pytest.approx([rows[0].nats] * 3, rel=1e-5)
    assert rows[0].num_tokens == 11
    whole = sliding_window_evaluate(model, TOKENIZER, TEXTS, context=5, num_targets=1000)
    assert rows[0].num_characters == pytest.approx(whole.num_characters * 11 / NUM_TOKENS)


def test_a_sweep_has_a_row_for_each_pair_and_leaves_the_model_as_it_was():
    model = make_model()
    model.config.clamp_len = 3
    rows = stream_evaluate(model, TOKENIZER, TEXTS, window=4, mem_lens=[2, 9], clamp_lens=[-1, 1, 50])
    assert [(row.mem_len, row.clamp_len) for row in rows] == [(2, -1), (2, 1), (2, 50), (9, -1), (9, 1), (9, 50)]
    # A clamp that is never reached is none.
    assert rows[0].nats == rows[2].nats and rows[3].nats == rows[5].nats
    assert len({round(row.nats, 4) for row in rows}) == 4
    assert (model.config.mem_len, model.config.clamp_len, model.config.same_length) == (5, 3, False)
    with pytest.raises(KeyError), memory_lengths(model, mem_len=7, clamp_len=-1, same_length=True):
        raise KeyError
    assert (model.config.mem_len, model.config.clamp_len, model.config.same_length) == (5, 3, False)


def test_documents_apart_are_documents_alone():
    model = make_model()
    apart = score(model, window=4, reset_at_documents=True)
    alone = [stream_evaluate(model, TOKENIZER, [text], window=4, mem_lens=[8], clamp_lens=[-1])[0] for text in TEXTS]
    assert apart.nats == pytest.approx(sum(row.nats for row in alone), rel=1e-5)
    assert apart.num_tokens == sum(row.num_tokens for row in alone)
    in_lanes = score(model, window=4, reset_at_documents=True, num_lanes=3)
    assert in_lanes.num_tokens == NUM_TOKENS


def test_units():
    model = make_model()
    row = score(model)
    characters, octets = sum(map(len, TEXTS)), sum(len(text.encode()) for text in TEXTS)
    assert (row.num_characters, row.num_bytes) == (characters, octets) and octets == characters + 3
    assert row.nats_per_token == pytest.approx(row.nats / NUM_TOKENS)
    assert row.perplexity == pytest.approx(math.exp(row.nats / NUM_TOKENS))
    assert row.bits_per_character * characters == pytest.approx(row.nats / math.log(2))
    assert row.bits_per_byte * octets == pytest.approx(row.nats / math.log(2))
    assert row.tokens_per_second == NUM_TOKENS / row.seconds
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    assert stream_evaluate(model, TOKENIZER, dataset, mem_lens=[8], clamp_lens=[-1])[0].nats == row.nats


def test_bad_input():
    model = make_model()
    with pytest.raises(InputError, match="no text to score"):
        stream_evaluate(model, TOKENIZER, [""])
    with pytest.raises(InputError, match="mem_len=0 must be at least 1 with same_length=True"):
        score(model, mem_lens=[0])
    with pytest.raises(InputError, match="clamp_len=0"):
        score(model, clamp_lens=[0])
    with pytest.raises(InputError, match="window=0"):
        score(model, window=0)
    with pytest.raises(InputError, match="context=0"):
        sliding_window_evaluate(model, TOKENIZER, TEXTS, context=0)
