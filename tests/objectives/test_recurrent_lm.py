"""Language modelling with a memory: what recurrence promises, at the level of the Trainer and of the text."""

import itertools
import json
import math

import datasets
import numpy as np
import pytest
import torch

from helpers.method_matrix import NO_DROPOUT, build, tiny_data, tiny_tokenizer
from hf_pretrain.data import draws
from hf_pretrain.data.documents.documents import DOCUMENT_FEATURES
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.streams import stream_evaluate
from hf_pretrain.modeling.losses import RecurrentMemory
from hf_pretrain.objectives.recurrent_lm import METHOD as program
from hf_pretrain.objectives.recurrent_lm import (
    RecurrentLMForPreTraining,
    RecurrentLMTrainingArguments,
    TransformerXLModelArguments,
    build_model,
)

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 32}


def small_model(*, mem_len=8, same_length=False, seed=0, **sizes):
    """Three layers, scaled up so that attention matters before any training."""
    torch.manual_seed(seed)
    args = TransformerXLModelArguments(**SMALL | sizes, config_overrides=NO_DROPOUT)
    model = build_model(args, tiny_tokenizer(), mem_len=mem_len, same_length=same_length)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def stream_of_tokens(length, *, seed=0, batch=2):
    """Keyed tokens ``[batch, length + 1]``: inputs and, one place on, targets."""
    keys = draws.row_keys(range(batch), seed=seed, stream="tokens")
    return torch.from_numpy(draws.integers(keys, length + 1, high=55).astype(np.int64) + 5)


def read_in_windows(model, tokens, lengths, *, memory=None):
    """Return the summed loss of each row and the losses window by window, the memory handed on."""
    total, place = torch.zeros(len(tokens)), 0
    for length in lengths:
        window = tokens[:, place : place + length + 1]
        output = model(input_ids=window[:, :-1], labels=window[:, 1:], memory=memory)
        memory, place = output.memory, place + length
        total = total + output.losses["lm"].sum
    assert place == tokens.shape[1] - 1
    return total


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(24,), (12, 12), (5, 1, 11, 7), (1,) * 24])
def test_a_memory_of_all_that_was_read_is_one_pass(lengths):
    tokens = stream_of_tokens(24)
    whole = read_in_windows(small_model(mem_len=0), tokens, (24,))
    torch.testing.assert_close(read_in_windows(small_model(mem_len=23), tokens, lengths), whole, rtol=1e-5, atol=1e-4)
    if len(lengths) > 1:
        short = read_in_windows(small_model(mem_len=2), tokens, lengths)
        assert (short - whole).abs().max() > 1e-2


@torch.no_grad()
def test_with_same_length_no_cut_changes_the_total():
    tokens, model = stream_of_tokens(24), small_model(mem_len=6, same_length=True)
    expected = read_in_windows(model, tokens, (1,) * 24)
    for lengths in ((24,), (12, 12), (5, 1, 11, 7)):
        torch.testing.assert_close(read_in_windows(model, tokens, lengths), expected, rtol=1e-5, atol=1e-4)
    model.model.config.same_length = False
    assert (read_in_windows(model, tokens, (12, 12)) - expected).abs().min() > 1e-2


@torch.no_grad()
def test_room_that_is_not_filled_is_not_seen():
    tokens = stream_of_tokens(10)
    expected = read_in_windows(small_model(mem_len=10), tokens, (5, 5))
    for mem_len in (5, 11, 100):
        assert torch.allclose(read_in_windows(small_model(mem_len=mem_len), tokens, (5, 5)), expected, atol=1e-5)
    # Neither is what an earlier text left there.
    model = small_model(mem_len=10)
    used = model(input_ids=tokens[:, :9], labels=tokens[:, 1:10]).memory
    assert used.lengths.tolist() == [9, 9]
    reset = used.reset(torch.tensor([True, True]))
    assert torch.allclose(read_in_windows(model, tokens, (5, 5), memory=reset), expected, atol=1e-5)
    junk = RecurrentMemory(torch.full_like(used.states, 1e3), torch.zeros(2, dtype=torch.long))
    assert torch.allclose(read_in_windows(model, tokens, (5, 5), memory=junk), expected, atol=1e-5)


@torch.no_grad()
def test_a_reset_is_for_the_lanes_that_are_named():
    tokens, model = stream_of_tokens(12), small_model()
    first, second = tokens[:, :7], tokens[:, 6:]
    memory = model(input_ids=first[:, :-1], labels=first[:, 1:]).memory
    inputs = {"input_ids": second[:, :-1], "labels": second[:, 1:]}
    fresh = model(**inputs).losses["lm"].sum
    remembered = model(**inputs, memory=memory, memory_reset=torch.tensor([False, False])).losses["lm"].sum
    mixed = model(**inputs, memory=memory, memory_reset=torch.tensor([True, False])).losses["lm"].sum
    torch.testing.assert_close(mixed, torch.stack([fresh[0], remembered[1]]), rtol=1e-5, atol=1e-5)
    assert (fresh - remembered).abs().min() > 1e-3


def test_no_gradient_goes_through_the_memory():
    """The window before is remembered as it was: its tokens get no gradient from this one, but their memory has an effect."""
    model = small_model(mem_len=8).train()
    # Tokens of the two windows differ, so the rows of the table that get a gradient tell which window it came from.
    first, second = torch.arange(5, 14)[None], torch.arange(30, 39)[None]
    memory = model(input_ids=first[:, :-1], labels=first[:, 1:]).memory
    assert not memory.states.requires_grad and memory.lengths.tolist() == [8]
    model.model.config.tie_word_embeddings = False
    output = model(input_ids=second[:, :-1], labels=second[:, 1:], memory=memory)
    hidden = []
    model.model.model.embeddings.register_forward_hook(lambda module, args, result: hidden.append(args[0]))
    output.losses["lm"].sum.sum().backward()
    gradient = model.model.model.embeddings.tables[0].weight.grad
    # Tied to the output table, whose gradient every token has: it is that of the softmax alone.
    states = model.model.model(second[:, :-1], mems=memory.states, mem_lengths=memory.lengths).last_hidden_state[0]
    probabilities = model.model.lm_head(states).softmax(-1)
    probabilities[torch.arange(8), second[0, 1:]] -= 1
    expected = (probabilities.T @ states)[5:13]
    torch.testing.assert_close(gradient[5:13], expected, rtol=1e-4, atol=1e-5)


CHANGES = (
    {},
    {"eval_mem_len": 14},
    {"eval_clamp_len": 2},
    {"eval_same_length": True},
    {"eval_lanes": 2},
    {"eval_tgt_len": 7},
)


class TestEvaluation:
    """Every token of the held-out text is scored once, however it is cut."""

    def evaluate(self, folder, **options):
        return build(program, folder, data=tiny_data(train=96, held_out=9), **options).evaluate()

    def test_windows_do_not_change_the_result_with_same_length(self, tmp_path):
        losses = []
        for window in (1, 3, 16, 200):
            options = {"eval_same_length": True, "eval_mem_len": 7, "eval_clamp_len": 5, "eval_lanes": 1}
            losses.append(self.evaluate(tmp_path, eval_tgt_len=window, **options)["eval_lm_loss"])
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)

    def loss_and_calls(self, folder, change):
        """Evaluate with some options; return the loss and what the first layer was given, window by window."""
        trainer, calls = build(program, folder, **{"mem_len": 8, "eval_mem_len": 8, "eval_tgt_len": 4} | change), []
        with torch.no_grad():
            # Wide weights, so that attention and distance matter.
            for parameter in trainer.model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        trainer.model.model.model.layers[0].register_forward_pre_hook(lambda layer, given: calls.append(given))
        loss = trainer.evaluate()["eval_lm_loss"]
        config = trainer.model.model.config
        assert (config.mem_len, config.clamp_len, config.same_length) == (8, -1, False)
        return loss, calls

    def test_each_option_changes_the_loss(self, tmp_path):
        losses = sorted(self.loss_and_calls(tmp_path, change)[0] for change in CHANGES)
        assert min(more - less for less, more in itertools.pairwise(losses)) > 1e-5

    @pytest.mark.parametrize("change", CHANGES, ids=str)
    def test_each_option_reaches_the_attention(self, tmp_path, change):
        _, calls = self.loss_and_calls(tmp_path, change)
        tgt_len, mem_len, clamp_len = (
            change.get(f"eval_{name}", default)
            for name, default in (("tgt_len", 4), ("mem_len", 8), ("clamp_len", -1))
        )
        assert max(hidden.shape[1] for hidden, *_ in calls) == tgt_len
        assert {len(hidden) for hidden, *_ in calls} == {min(change.get("eval_lanes", 8), 4)}
        assert {memory.shape[1] for _, memory, *_ in calls} == {mem_len}
        hidden, _, table, visible, *_ = calls[-1]
        keys = mem_len + hidden.shape[1]
        distances = torch.arange(keys - 1, -1, -1)
        if clamp_len > 0:
            assert keys - 1 > clamp_len
            distances = distances.clamp(max=clamp_len)
        assert torch.equal(table, table[keys - 1 - distances])
        assert len(table.unique(dim=0)) == len(distances.unique())
        # At the end of the text the memory is full.
        seen = 1 if change.get("eval_same_length") else torch.arange(1, hidden.shape[1] + 1)
        assert (visible.sum(-1) == mem_len + seen).all()

    @pytest.mark.parametrize("change", CHANGES, ids=str)
    def test_the_same_options_score_the_same_text_alike(self, tmp_path, change):
        """`stream_evaluate` tokenizes and cuts by itself."""
        trainer = build(program, tmp_path, **{"mem_len": 8, "eval_mem_len": 8, "eval_tgt_len": 4} | change)
        texts = [" ".join(f"w{i - 5}" for i in row) for row in tiny_data().eval_documents["input_ids"]]
        args = trainer.args
        (score,) = stream_evaluate(
            trainer.model.model,
            tiny_tokenizer(),
            texts,
            window=args.eval_tgt_len,
            mem_lens=[args.eval_mem_len],
            clamp_lens=[args.eval_clamp_len],
            same_length=args.eval_same_length,
            num_lanes=args.eval_lanes,
        )
        assert trainer.evaluate()["eval_lm_loss"] == pytest.approx(score.nats_per_token, rel=1e-6)

    def test_perplexity_is_that_of_the_loss(self, tmp_path):
        metrics = self.evaluate(tmp_path)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_lm_loss"]))
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"])

    def test_documents_that_are_forgotten_can_come_in_any_order(self, tmp_path):
        losses = []
        for order in (list(range(9)), [4, 2, 8, 0, 1, 7, 3, 6, 5]):
            data = tiny_data(held_out=9)
            data.eval_documents = data.eval_documents.select(order)
            trainer = build(program, tmp_path, data, reset_at_documents=True, eval_lanes=1)
            losses.append(trainer.evaluate()["eval_lm_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        # With a memory that goes on, the order matters.
        data.eval_documents = data.eval_documents.select(range(9))
        assert build(program, tmp_path, data, eval_lanes=1).evaluate()["eval_lm_loss"] != pytest.approx(
            losses[0], rel=1e-6
        )


def copies(num_blocks, *, length=4, symbols=8, times=4, seed=0):
    """Random blocks, each several times in a row, as one document: all but the first can be known from the window before."""
    keys = draws.row_keys(range(num_blocks), seed=seed, stream="blocks")
    blocks = draws.integers(keys, length, high=symbols) + 5
    ids = np.tile(blocks, (1, times)).flatten().tolist()
    row = {"input_ids": ids, "word_starts": [True] * len(ids), "sent_starts": [True] * len(ids), "doc_id": 0}
    return datasets.Dataset.from_list([row], features=DOCUMENT_FEATURES)


@pytest.mark.parametrize("mem_len", [4, 0])
def test_memory_finds_what_lies_in_the_window_before(tmp_path, mem_len):
    data = PreparedData(tiny_tokenizer(), None, None, {"source": "copies"}, 8, copies(16 * 30), copies(32, seed=1))
    options = {"tgt_len": 4, "mem_len": mem_len, "eval_tgt_len": 4, "eval_mem_len": mem_len, "eval_lanes": 1}
    options |= {"per_device_train_batch_size": 16, "max_steps": 100, "learning_rate": 2e-2, "logging_steps": 50}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    sizes |= {"pre_layer_norm": True, "config_overrides": NO_DROPOUT.replace("{", '{"initializer_range": 0.1, ')}
    trainer = build(program, tmp_path, data, model_options=sizes, **options)
    trainer.train()
    loss = trainer.evaluate()["eval_lm_loss"] / math.log(8)
    # The first block of four is chance; of each other one, a window alone shows the last token, which is its first input.
    without_memory = (4 + 3 * 3) / 16
    assert loss < 0.6 if mem_len else loss > without_memory


class TestBadInput:
    def test_lengths_out_of_range(self, tmp_path):
        for name, value in (
            ("tgt_len", 0),
            ("mem_len", -1),
            ("eval_lanes", 0),
            ("clamp_len", 0),
            ("eval_clamp_len", -2),
        ):
            with pytest.raises(InputError, match=f"{name}={value}"):
                RecurrentLMTrainingArguments(output_dir=str(tmp_path), **{name: value})
        with pytest.raises(InputError, match="eval_same_length=True needs a memory"):
            RecurrentLMTrainingArguments(output_dir=str(tmp_path), eval_mem_len=0)

    def test_a_stream_and_too_little_text(self, tmp_path):
        data = tiny_data()
        data.train_documents = None
        with pytest.raises(InputError, match="streaming=True"):
            build(program, tmp_path, data)
        with pytest.raises(InputError, match="do not fill windows of 8"):
            build(program, tmp_path, tiny_data(train=5), per_device_train_batch_size=16)

    def test_models_that_cannot_be_built(self):
        for options, message in (
            ({"cutoffs": [70]}, "cutoffs"),
            ({"hidden_size": 15}, "hidden_size=15"),
            ({"config_overrides": '{"hidden": 3}'}, "no option hidden"),
        ):
            with pytest.raises(InputError, match=message):
                build_model(TransformerXLModelArguments(**SMALL | options), tiny_tokenizer(), mem_len=8)


def test_the_program_runs_from_text_to_export(tmp_path, capsys):
    from hf_pretrain.cli import main

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Sentence number {i} has some more words than the last one." for i in range(300)))
    options = ["--train_file", str(corpus), "--vocab_size", "150", "--max_steps", "3", "--report_to", "none"]
    options += ["--tgt_len", "8", "--mem_len", "16", "--eval_mem_len", "16", "--save_steps", "2"]
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["recurrent-lm", *options, *sizes, "--output_dir", str(tmp_path / "out")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mem_len"] == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Transformer-XL" in card and "Perplexity" in card and "Blocks" not in card
    # What was exported goes on, and a checkpoint too.
    further = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "further")]
    assert main(["recurrent-lm", *options, *further]) == 0
    again = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    assert main(["recurrent-lm", *options, *sizes, *again]) == 0


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a gpt2, not a transformer_xl"):
        build_model(TransformerXLModelArguments(model_name_or_path=str(tmp_path)), tiny_tokenizer(), mem_len=8)


def test_the_composite_opens_again(tmp_path):
    model = small_model(cutoffs=[20, 40], div_val=2)
    model.save_pretrained(tmp_path)
    loaded = RecurrentLMForPreTraining.from_pretrained(tmp_path)
    assert loaded.memory_size == 8
    tokens = stream_of_tokens(12)
    with torch.no_grad():
        assert torch.equal(read_in_windows(loaded.eval(), tokens, (6, 6)), read_in_windows(model, tokens, (6, 6)))
