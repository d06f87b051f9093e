"""Generation against full recomputation by hand, distances beyond the clamp, and the stock Trainer's accumulation."""

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLModel

VARIANTS = {
    "paper": {},
    "same_length": {"same_length": True, "mem_len": 3},
    "clamped_adaptive": {"clamp_len": 4, "cutoffs": [10, 25], "div_val": 2},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
GENERATE = {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


def prompts(*shape, seed=1):
    """Tokens that are not padding."""
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def next_log_probs(model, text):
    """Log-probabilities ``[S, V]`` of what follows each token of one text, read anew in one piece."""
    return model(text[None]).logits[0].log_softmax(-1)


def padded(rows):
    length = max(map(len, rows))
    tokens = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


@variants
@torch.no_grad()
def test_greedy_search_is_the_best_token_of_each_full_pass(transformer_xl, options):
    model, rows = transformer_xl(**options), [prompts(9), prompts(4, seed=2)]
    outputs = model.generate(**padded(rows), max_new_tokens=7, do_sample=False, **GENERATE)
    for number, text in enumerate(rows):
        for logits in outputs.logits:
            expected = next_log_probs(model, text)[-1]
            torch.testing.assert_close(logits[number].log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
            text = torch.cat([text, expected.argmax()[None]])
        assert torch.equal(outputs.sequences[number, -7:], text[-7:])


@variants
@torch.no_grad()
def test_samples_come_from_the_distribution_of_the_full_pass(transformer_xl, options):
    model, rows = transformer_xl(**options), [prompts(9), prompts(4, seed=2)]
    set_seed(0)
    outputs = model.generate(
        **padded(rows), max_new_tokens=7, do_sample=True, temperature=1.5, top_k=0, output_scores=True, **GENERATE
    )
    for number, row in enumerate(rows):
        new = outputs.sequences[number, -7:]
        expected = model(torch.cat([row, new])[None]).logits[0, len(row) - 1 : -1].log_softmax(-1)
        found = torch.stack([logits[number] for logits in outputs.logits]).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        drawn_from = torch.stack([scores[number] for scores in outputs.scores]).softmax(-1)
        torch.testing.assert_close(drawn_from, (expected / 1.5).softmax(-1), atol=1e-5, rtol=1e-4)
        assert not torch.equal(new, expected.argmax(-1))


@variants
@torch.no_grad()
def test_a_beam_has_the_probability_of_its_full_pass(transformer_xl, options):
    model, rows = transformer_xl(**options), [prompts(9), prompts(4, seed=2)]
    outputs = model.generate(
        **padded(rows),
        max_new_tokens=6,
        do_sample=False,
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.0,
        output_scores=True,
        **GENERATE,
    )
    assert len(set(map(tuple, outputs.sequences[:3, -6:].tolist()))) == 3
    for number, new in enumerate(outputs.sequences[:, -6:]):
        row = rows[number // 3]
        log_probs = next_log_probs(model, torch.cat([row, new]))[len(row) - 1 : -1]
        expected = log_probs.gather(1, new[:, None]).sum()
        torch.testing.assert_close(outputs.sequences_scores[number], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_beam_of_the_whole_vocabulary_finds_the_best_continuation(transformer_xl):
    model, row = transformer_xl(vocab_size=10, same_length=True, mem_len=3), prompts(6) % 9 + 1
    pairs = torch.tensor(list(itertools.product(range(10), repeat=2)))
    log_probs = model(torch.cat([row.expand(100, -1), pairs], dim=1)).logits[:, 5:7].log_softmax(-1)
    totals = log_probs.gather(2, pairs[..., None]).sum((1, 2))
    found = model.generate(row[None], max_new_tokens=2, do_sample=False, num_beams=10, **GENERATE)
    assert torch.equal(found.sequences[0, -2:], pairs[totals.argmax()])


@pytest.mark.parametrize("has_memory", [False, True])
@torch.no_grad()
def test_tokens_beyond_the_clamp_can_change_places(transformer_xl, has_memory):
    """Two that the last token sees at distances 10 and 7."""
    tokens = prompts(1, 12)
    swapped = tokens.clone()
    swapped[0, [1, 4]] = swapped[0, [4, 1]]
    for clamp_len, is_alike in ((7, True), (8, False), (-1, False)):
        model = transformer_xl(TransformerXLModel, num_hidden_layers=1, clamp_len=clamp_len, mem_len=6)
        states = []
        for text in (tokens, swapped):
            memory = {}
            if has_memory:
                mems, lengths = model.empty_mems(1)
                before = model(text[:, :6], mems=mems, mem_lengths=lengths)
                memory = {"mems": before.mems, "mem_lengths": before.mem_lengths}
            states.append(model(text[:, 6:] if has_memory else text, **memory).last_hidden_state[:, -1])
        assert torch.allclose(*states, atol=1e-5) == is_alike


def test_the_stock_trainer_gets_one_gradient_however_the_batch_is_cut(transformer_xl, tmp_path):
    """Also outside of this library the loss honours the number of labels of the whole step."""
    lengths = [(5 * i) % 13 + 3 for i in range(8)]
    dataset = Dataset.from_dict({"input_ids": [prompts(n, seed=n).tolist() for n in lengths]})
    norms = []
    for batch, accumulation in ((8, 1), (2, 4)):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = transformer_xl(hidden_dropout_prob=0.0, cutoffs=[20, 40], div_val=2)
        collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
        trainer = Trainer(model, args, train_dataset=dataset, data_collator=collator)
        trainer.train()
        norms.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
