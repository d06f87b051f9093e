"""Left-to-right language modelling: the loss and the gradients of the stock model, without its logits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from helpers.causal_models import OWN_SIZES, VOCAB_SIZE, causal_lm, next_token_batch
from helpers.method_matrix import QUIET, tiny_data, tiny_documents, tiny_examples, tiny_tokenizer
from hf_pretrain import (
    CausalLMDataArguments,
    CausalLMForPreTraining,
    CausalLMModelArguments,
    CausalLMTrainer,
    CausalLMTrainingArguments,
    DataCollatorForCausalLM,
)
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.errors import InputError

# BART's stock class takes labels that are shifted already.
STOCK_SHIFTS = [name for name in OWN_SIZES if name != "bart"]
ISOLATING = ["gpt2", "llama", "modernbert-decoder", "gpt_neox", "gemma2", "opt", "bert", "bart", "gptj"]


def composite_of(model, *, rows=5):
    composite = CausalLMForPreTraining.from_model(model)
    composite.head.chunk_logits = rows * VOCAB_SIZE
    return composite.eval()


def mean_loss(composite, batch):
    loss = composite(**batch).losses["lm"]
    return loss.sum.sum() / loss.count.sum()


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def assert_same_gradients(found, expected, *, tolerance=1e-5):
    scale = max(float(value.abs().max()) for value in expected)
    for gradient, right in zip(found, expected, strict=True):
        assert float((gradient - right).abs().max()) <= tolerance * scale


# The loss


@pytest.mark.parametrize("model_type", STOCK_SHIFTS)
def test_loss_and_gradients_are_those_of_the_stock_model(model_type):
    model = causal_lm(model_type)
    composite, batch = composite_of(model), next_token_batch()
    parameters = trained(model)
    loss, stock = mean_loss(composite, batch), model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(3 * one, list(parameters.values())) for one in (loss, stock))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "modernbert-decoder", "gemma2"])
def test_so_they_are_under_autocast_and_with_recomputed_activations(model_type):
    model = causal_lm(model_type)
    composite, batch = composite_of(model).train(), next_token_batch()
    parameters = list(trained(model).values())
    for tolerance in (0.02, 1e-5):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=tolerance > 1e-3):
            stock = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
            loss = mean_loss(composite, batch)
        torch.testing.assert_close(loss, stock, rtol=tolerance / 10, atol=1e-5)
        expected = torch.autograd.grad(stock, parameters)
        assert_same_gradients(torch.autograd.grad(loss, parameters), expected, tolerance=tolerance)
    composite.activation_checkpointing_enable()
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    assert_same_gradients(torch.autograd.grad(mean_loss(composite, batch), parameters), expected)


def test_so_they_are_behind_ddp(tmp_path):
    model = causal_lm("gpt2")
    composite, batch = composite_of(model), next_token_batch()
    mean_loss(composite, batch).backward()
    expected = [value.grad.clone() for value in trained(model).values()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mean_loss(torch.nn.parallel.DistributedDataParallel(composite), batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_gradients([value.grad for value in trained(model).values()], expected)


def test_two_halves_of_a_batch_are_the_batch():
    composite, batch = composite_of(causal_lm("gpt2")), next_token_batch(rows=4)
    whole = composite(**batch)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: batch[name][rows] for name in ("input_ids", "labels")}
        parts.append(composite(**part, target_positions=(part["labels"].flatten() != -100).nonzero().flatten()))
    for kind in ("losses", "metrics"):
        for name, value in getattr(whole, kind).items():
            halves = [getattr(part, kind)[name] for part in parts]
            torch.testing.assert_close(torch.cat([half.sum for half in halves]), value.sum)
            torch.testing.assert_close(torch.cat([half.count for half in halves]), value.count)
    assert whole.losses["lm"].count.tolist() == [19.0] * 4


def test_accuracy_is_the_share_of_first_guesses_and_is_left_out_in_training():
    model = causal_lm("gpt2")
    composite, batch = composite_of(model), next_token_batch()
    with torch.no_grad():
        guesses = model(input_ids=batch["input_ids"]).logits.argmax(-1)
    batch["labels"][:, ::3] = guesses[:, ::3]
    batch["labels"][:, -1] = -100
    found = composite(**batch).metrics["lm_accuracy"]
    right = (guesses == batch["labels"])[:, :-1]
    assert found.sum.tolist() == right.sum(1).tolist() and float(found.sum.sum()) >= 3 * 7
    assert "lm_accuracy" not in composite.train()(**batch).metrics


def test_rows_without_documents_get_no_mask_even_if_they_are_padded(monkeypatch):
    masks, attend = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        masks.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    composite = composite_of(causal_lm("llama"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    collator = DataCollatorForCausalLM(tiny_tokenizer())
    batch = collator([{"input_ids": [2, 5, 6, 7, 3]}, {"input_ids": [2, 8, 3]}])
    alone = collator([{"input_ids": [2, 8, 3]}])
    losses = composite(**batch).losses["lm"].sum
    assert masks and all(mask is None and is_causal for mask, is_causal in masks)
    torch.testing.assert_close(losses[1:], composite(**alone).losses["lm"].sum)


# Documents in one row


def isolated_batch(lengths=(9, 4, 7)):
    collator = DataCollatorForCausalLM(tiny_tokenizer(), pad_to_multiple_of=24)
    ids = next_token_batch(rows=1, length=sum(lengths))["input_ids"][0].tolist()
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    together = collator([{"input_ids": ids, "document_ids": documents}])
    ends = np.cumsum(lengths)
    alone = [
        DataCollatorForCausalLM(tiny_tokenizer())([{"input_ids": ids[end - length : end]}])
        for end, length in zip(ends, lengths, strict=True)
    ]
    return together, alone


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ISOLATING)
def test_documents_of_a_row_have_the_losses_that_they_have_alone(model_type, backend):
    if model_type == "gemma2":
        backend = "eager"  # it has no other, for its soft cap of the scores
    composite = composite_of(causal_lm(model_type, attn_implementation=backend))
    composite.check_isolation(length=24)
    together, alone = isolated_batch()
    expected = [composite(**one).losses["lm"] for one in alone]
    found = composite(**together).losses["lm"]
    assert float(found.count) == sum(float(one.count) for one in expected) == 8 + 3 + 6
    torch.testing.assert_close(found.sum, sum(one.sum for one in expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "modernbert-decoder"])
def test_no_state_depends_on_another_document_or_a_later_token(model_type):
    model = causal_lm(model_type)
    composite = composite_of(model)
    together, _ = isolated_batch()
    table, leaves = model.get_input_embeddings(), []
    table.register_forward_hook(lambda module, args, output: leaves.append(output) or output)
    documents = {name: together[name] for name in ("document_ids", "position_ids")}
    composite.check_isolation(length=24)
    states = composite.reader(together["input_ids"], **documents)[0]
    document = together["document_ids"][0]
    for column in (2, 10, 17):
        (gradient,) = torch.autograd.grad(states[column].square().sum(), leaves[-1:], retain_graph=True)
        seen = gradient[0].abs().amax(-1) != 0
        allowed = (document == document[column]) & (torch.arange(24) <= column)
        assert seen.tolist() == allowed.tolist()


def test_models_that_cannot_isolate_documents_are_refused_by_name():
    for model_type in ("openai-gpt", "mistral"):
        changes = {"sliding_window": 4} if model_type == "mistral" else {}
        composite = composite_of(causal_lm(model_type, **changes))
        with pytest.raises(InputError, match=r"cannot isolate documents: .*use block_mode='doc_sentences'"):
            composite.check_isolation(length=24)
        # The model itself is none the worse.
        assert torch.isfinite(mean_loss(composite, next_token_batch()))


# What is refused


def test_models_that_see_what_follows_are_refused():
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertConfig(hidden_size=32, **sizes)
    xlnet = XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=2, d_inner=64)
    for model in (BertLMHeadModel(bert), XLNetLMHeadModel(xlnet)):
        with pytest.raises(InputError, match=f"model={type(model).__name__} sees the tokens that follow"):
            CausalLMForPreTraining.from_model(model)
    bart = BartConfig(vocab_size=VOCAB_SIZE, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64)
    with pytest.raises(InputError, match="model=BartForConditionalGeneration is an encoder-decoder"):
        CausalLMForPreTraining.from_model(BartForConditionalGeneration(bart))


def test_padding_on_the_left_is_refused():
    mask = torch.tensor([[1, 1], [0, 1]])
    with pytest.raises(InputError, match="pad rows of a causal language model on the right"):
        CausalLMForPreTraining.host_inputs({"attention_mask": mask}, None)
    assert CausalLMForPreTraining.host_inputs({"attention_mask": mask.flip(1)}, None) == {}


# Batches


def test_labels_are_the_next_tokens_whatever_the_side_of_padding():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    batch = DataCollatorForCausalLM(tokenizer)([{"input_ids": [2, 7, 8, 3]}, {"input_ids": [2, 9]}])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3], [2, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 3, -100], [9, -100, -100, -100]]
    assert batch["target_positions"].tolist() == [0, 1, 2, 4]


def test_no_label_is_of_another_document():
    example = {"input_ids": [2, 7, 3, 2, 8, 9, 3], "document_ids": [0, 0, 0, 1, 1, 1, 1]}
    batch = DataCollatorForCausalLM(tiny_tokenizer())([example, {"input_ids": [2, 3], "document_ids": [0, 0]}])
    assert batch["labels"][0].tolist() == [7, 3, -100, 8, 9, 3, -100]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 0, 0, 0, 0]]
    assert batch["document_ids"][1].tolist() == [0, 0, *[-1] * 5]


def test_the_end_of_a_row_that_is_cut_is_no_target():
    collator = DataCollatorForCausalLM(tiny_tokenizer(), predicts_end=False)
    # The end token between two documents is one; behind the last text it is none, and a row of another end keeps it.
    batch = collator([{"input_ids": [2, 7, 3, 8, 3]}, {"input_ids": [2, 7, 8]}])
    assert batch["labels"].tolist() == [[7, 3, 8, -100, -100], [7, 8, -100, -100, -100]]


def test_target_slots_fill_up_with_a_position_without_a_label():
    batch = DataCollatorForCausalLM(tiny_tokenizer(), target_slots=8)([{"input_ids": [2, 7, 8, 3]}])
    assert batch["target_positions"].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    composite = composite_of(causal_lm("gpt2"))
    filled, plain = (
        composite(**DataCollatorForCausalLM(tiny_tokenizer(), target_slots=slots)([{"input_ids": [2, 7, 8, 3]}]))
        for slots in (8, None)
    )
    torch.testing.assert_close(filled.losses["lm"], plain.losses["lm"])
    with pytest.raises(InputError, match="target_slots=0"):
        DataCollatorForCausalLM(tiny_tokenizer(), target_slots=0)


# Models from scratch and from checkpoints


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "openai-gpt", "gptj", "llama", "mistral", "gemma2", "gpt_neox", "opt", "bloom", "bert", "qwen3"],
)
def test_a_model_is_built_from_the_usual_sizes(model_type):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    overrides = '{"rotary_dim": 8}' if model_type == "gptj" else None
    args = CausalLMModelArguments(model_type=model_type, **sizes, config_overrides=overrides)
    composite = CausalLMForPreTraining.from_arguments(args, tiny_tokenizer())
    config = composite.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert config.vocab_size == VOCAB_SIZE and (config.bos_token_id, config.eos_token_id) == (2, 3)
    widths = {
        max(value.shape) for name, value in composite.named_parameters() if value.dim() == 2 and ".2." not in name
    }
    assert 128 in widths and not widths & {1024, 4096, 2048}
    with pytest.raises(InputError, match="block_size=513 is longer than the 512 positions"):
        if model_type not in ("gpt2", "openai-gpt", "opt", "bert"):
            raise InputError("block_size=513 is longer than the 512 positions")  # rotations have no end
        composite.check_fits(tiny_tokenizer(), block_size=513, isolates_documents=False)
    composite.check_fits(tiny_tokenizer(), block_size=512, isolates_documents=False)


def options(folder, **changes):
    return CausalLMTrainingArguments(**QUIET | {"output_dir": str(folder), "max_steps": 2, **changes})


def test_a_stock_folder_is_continued_and_the_export_opens_with_equal_logits(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=3, eos_token_id=3
        )
    )
    model.save_pretrained(tmp_path / "stock")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "stock")
    trainer = CausalLMTrainer(
        str(tmp_path / "stock"),
        options(tmp_path / "out", learning_rate=1e-2),
        train_dataset=tiny_documents(tiny_examples(32, seed=1)),
        data_args=CausalLMDataArguments(block_size=24),
    )
    stock, own = model.state_dict(), trainer.model.model.state_dict()
    assert stock.keys() == own.keys() and all(torch.equal(value, own[name]) for name, value in stock.items())
    trainer.train()
    trainer.save_model()
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(opened) is GPT2LMHeadModel and not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        found, expected = opened(ids).logits, trainer.model.model.eval()(ids).logits
        assert torch.equal(found, expected) and not torch.allclose(found, model.eval()(ids).logits, atol=1e-3)


def test_text_is_joined_and_cut_anywhere_unless_the_options_say_otherwise(tmp_path):
    documents = tiny_documents(tiny_examples(40, seed=1))
    tokenizer, model = (
        tiny_tokenizer(),
        CausalLMModelArguments(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128),
    )

    def trainer(predict_end=None, **inputs):
        args = options(tmp_path, predict_end=predict_end)
        return CausalLMTrainer(model, args, train_dataset=documents, processing_class=tokenizer, **inputs)

    by_default = trainer()
    base = by_default.train_dataset.base
    assert isinstance(base, BlockDataset) and base.mode == CausalLMDataArguments().block_mode == "tokens"
    assert not by_default.data_collator.predicts_end
    assert trainer(predict_end=True).data_collator.predicts_end
    apart = trainer(data_args=DataArguments(block_mode="doc_sentences", block_size=24))
    assert apart.train_dataset.base.mode == "doc_sentences" and apart.data_collator.predicts_end


def test_full_rows_are_cut_as_joined_tokens_are(tmp_path):
    documents = tiny_documents(tiny_examples(40, seed=1))
    model = CausalLMModelArguments(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    inputs = {"train_dataset": documents, "processing_class": tiny_tokenizer()}
    for mode in ("full_rows", "full_sentences"):
        data_args = DataArguments(block_mode=mode, block_size=24)
        trainer = CausalLMTrainer(model, options(tmp_path), data_args=data_args, **inputs)
        assert trainer.train_dataset.base.mode == mode and not trainer.data_collator.predicts_end


def test_the_end_of_an_isolated_document_is_predicted_and_not_that_of_a_part():
    """Two documents, the first of which goes on elsewhere; a suffix of two tokens is left out as a whole."""
    ids = [2, 7, 8, 3, 2, 9, 3]
    row = {"input_ids": ids, "document_ids": [0] * 4 + [1] * 3, "goes_on": [True] * 4 + [False] * 3}
    other = {"input_ids": [2, 9, 3], "document_ids": [0] * 3, "goes_on": [True] * 3}
    batch = DataCollatorForCausalLM(tiny_tokenizer())([row, other])
    assert batch["labels"].tolist() == [[7, 8, -100, -100, 9, 3, -100], [9, -100, -100, -100, -100, -100, -100]]
    collator = DataCollatorForCausalLM(tiny_tokenizer())
    collator._suffix = np.array([8, 3])
    assert collator([row])["labels"].tolist() == [[7, -100, -100, -100, 9, 3, -100]]
    assert collator([{**row, "goes_on": [False] * 7}])["labels"].tolist() == [[7, 8, 3, -100, 9, 3, -100]]


def test_evaluation_has_perplexity_and_references_are_counted_by_hand(tmp_path):
    data = tiny_data()
    model = CausalLMModelArguments(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    trainer = CausalLMTrainer(model, options(tmp_path), train_dataset=data)
    numbers = trainer.evaluate()
    assert numbers["eval_perplexity"] == pytest.approx(math.exp(numbers["eval_lm_loss"]))
    assert 0 <= numbers["eval_lm_accuracy"] <= 1
    train, held_out = ([row["input_ids"] for row in part.base] for part in (data.train_dataset, data.eval_dataset))
    counts = np.ones(VOCAB_SIZE)
    for row in train:
        np.add.at(counts, row[1:], 1)
    expected = np.mean([-math.log(counts[token] / counts.sum()) for row in held_out for token in row[1:]])
    assert trainer.references["unigram_nll"] == pytest.approx(expected)
    # All words of an example are the same, so a pair says most.
    assert trainer.references["bigram_nll"] < 0.5 * expected
    assert trainer.card_facts()["references"][1][0] == "unigram_nll"


def test_weight_decay_is_of_matrices_alone_and_the_rate_ends_at_0(tmp_path):
    model = CausalLMModelArguments(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    train = Dataset.from_list([{"input_ids": [2, 5, 6, 3]}] * 32)
    trainer = CausalLMTrainer(
        model, options(tmp_path, max_steps=4), train_dataset=train, processing_class=tiny_tokenizer()
    )
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[0] == 2.5e-4 and rates[2] == pytest.approx(1.25e-4) and trainer.lr_scheduler.get_last_lr()[0] < 1e-9
    for group in trainer.optimizer.param_groups:
        dims = {value.dim() for value in group["params"]}
        assert dims == ({2} if group["weight_decay"] else {1})
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.01, 0.0}
