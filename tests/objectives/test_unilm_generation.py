"""Writing a text from another one: against a loop that recomputes everything, all targets by force, and a model that copies."""

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.visibility.lm_modes import lm_mode_inputs
from hf_pretrain.objectives.encoder.generation import generate

UNKNOWN, CLS, SEP, MASK = 1, 2, 3, 4
ALLOWED = [SEP, *range(5, VOCAB_SIZE)]  # the end, and all words
SOURCES = ["w1 w2 w3", "w4", "w30 w31 w32 w33 w34 w35 w36", "w7 w8", "w50 w1 w50 w1", "w9 w9 w10"]


def tiny_model(kind="bert", **options):
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    sizes = {**TINY, **special, "vocab_size": VOCAB_SIZE, "initializer_range": 0.3, "type_vocab_size": 6}
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    torch.manual_seed(1)
    return AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()


def naive_log_probs(model, source, target, *, types):
    """Of the token after a target: one row, a mask by hand, logits of the whole row."""
    ids = [CLS, *source, SEP, *target, MASK]
    num_source, length = len(source) + 2, len(ids)
    mask = torch.ones(length, length).tril().bool()
    mask[:, :num_source] = True
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask[None, None]}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([[types[0]] * num_source + [types[1]] * (length - num_source)])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    barred = torch.full_like(logits, float("-inf"))
    barred[ALLOWED] = 0
    return (logits + barred).log_softmax(-1)


def naive_greedy(model, source, *, types, most):
    target, score = [], 0.0
    for _ in range(most):
        log_probs = naive_log_probs(model, source, target, types=types)
        token = int(log_probs.argmax())
        score += float(log_probs[token])
        if token == SEP:
            return target, score, True
        target.append(token)
    return target, score, False


def ids_of(source, tokenizer):
    return tokenizer(source, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("kind", "options", "types"),
    [
        ("bert", {}, (4, 5)),
        ("electra", {"type_vocab_size": 2, "embedding_size": 16}, (0, 1)),
        ("roberta", {"type_vocab_size": 1, "max_position_embeddings": 40}, None),
    ],
)
def test_greedy_equals_a_loop_that_recomputes_every_row(kind, options, types, tokenizer):
    model = tiny_model(kind, **options)
    expected = [naive_greedy(model, ids_of(source, tokenizer), types=types, most=12) for source in SOURCES]
    found = generate(model, tokenizer, SOURCES, max_new_tokens=12)
    for one, (target, score, has_ended), source in zip(found, expected, SOURCES, strict=True):
        assert one.token_ids == target, source
        assert one.text == tokenizer.decode(target) and one.has_ended == has_ended
        assert one.score == pytest.approx(score, abs=1e-4)
    assert len({tuple(target) for target, _, _ in expected}) > 1


def test_a_target_ends_where_its_end_is_the_likeliest(tokenizer):
    model = tiny_model()
    lengths = set()
    for bias in (0.0, 4.0, 8.0, 100.0):
        with torch.no_grad():
            model.cls.predictions.bias[SEP] = bias
        expected = [naive_greedy(model, ids_of(source, tokenizer), types=(4, 5), most=12) for source in SOURCES]
        found = generate(model, tokenizer, SOURCES, max_new_tokens=12)
        assert [(one.token_ids, one.has_ended) for one in found] == [(t, ended) for t, _, ended in expected]
        lengths |= {len(one.token_ids) for one in found if one.has_ended}
    assert all(one.token_ids == [] and one.text == "" and one.score > -1e-3 for one in found)
    assert len(lengths) > 2, "targets of one batch end at different steps"


def test_beams_that_hold_everything_find_the_best_target(tokenizer):
    model, sources = tiny_model(), SOURCES[:3]
    with torch.no_grad():
        model.cls.predictions.bias[SEP] = 4.0
    for penalty in (0.0, 1.0, 3.0):
        found = generate(model, tokenizer, sources, max_new_tokens=2, num_beams=60, length_penalty=penalty)
        for one, source in zip(found, sources, strict=True):
            ids, best = ids_of(source, tokenizer), []
            first = naive_log_probs(model, ids, [], types=(4, 5))
            for token in ALLOWED:
                if token == SEP:
                    best.append((float(first[SEP]), float(first[SEP]), []))
                    continue
                second = naive_log_probs(model, ids, [token], types=(4, 5))
                for end in ALLOWED:
                    score = float(first[token] + second[end])
                    best.append((score / 2**penalty, score, [token] + [end] * (end != SEP)))
            _, score, target = max(best)
            assert one.token_ids == target and one.score == pytest.approx(score, abs=1e-4)


def test_beams_find_likelier_targets_than_the_greedy_walk(tokenizer):
    model = tiny_model()
    sources = [f"w{i} w{(7 * i) % 50} w{(3 * i) % 50}" for i in range(30)]
    greedy = generate(model, tokenizer, sources, max_new_tokens=6)
    for penalty in (0.0, 1.0):
        walked = np.array([one.score / (len(one.token_ids) + one.has_ended) ** penalty for one in greedy])
        for num_beams in (2, 4):
            options = {"max_new_tokens": 6, "num_beams": num_beams, "length_penalty": penalty}
            found = generate(model, tokenizer, sources, **options)
            beams = np.array([one.score / (len(one.token_ids) + one.has_ended) ** penalty for one in found])
            assert (beams >= walked - 1e-5).all() and (beams > walked + 1e-3).mean() > 0.2


def test_the_other_sources_change_nothing(tokenizer):
    model = tiny_model()
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        together = generate(model, tokenizer, SOURCES, max_new_tokens=8, **options)
        alone = generate(model, tokenizer, SOURCES[:1], max_new_tokens=8, **options)
        assert together[0].token_ids == alone[0].token_ids
        assert together[0].score == pytest.approx(alone[0].score, abs=1e-4)


def test_samples_follow_the_distribution_and_the_seed(tokenizer):
    model, source = tiny_model(), "w1 w2 w3"
    options = {"max_new_tokens": 1, "do_sample": True}
    log_probs = naive_log_probs(model, ids_of(source, tokenizer), [], types=(4, 5))
    for temperature in (1.0, 2.0):
        drawn = generate(model, tokenizer, [source] * 4000, temperature=temperature, **options)
        counts = np.bincount([SEP if one.has_ended else one.token_ids[0] for one in drawn], minlength=VOCAB_SIZE)
        expected = (log_probs / temperature).softmax(-1).numpy()
        assert (np.abs(counts / 4000 - expected) < 5 * np.sqrt(expected / 4000) + 1e-3).all()
        assert drawn[0].score == pytest.approx(float(log_probs[(drawn[0].token_ids or [SEP])[0]]), abs=1e-4)
    options["max_new_tokens"] = 8
    first, again, other = (
        [one.token_ids for one in generate(model, tokenizer, SOURCES, seed=seed, **options)] for seed in (0, 0, 1)
    )
    assert first == again and first != other
    cold = generate(model, tokenizer, SOURCES, temperature=1e-4, **options)
    assert [one.token_ids for one in cold] == [
        one.token_ids for one in generate(model, tokenizer, SOURCES, max_new_tokens=8)
    ]


def test_what_is_written_is_no_special_token_and_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.cls.predictions.bias[[0, UNKNOWN, CLS, MASK]] = 50.0
    model.train()
    ids = torch.tensor([[CLS, 9, 10, SEP]])
    state = torch.get_rng_state()
    for options in ({}, {"num_beams": 4}, {"do_sample": True, "temperature": 5.0}):
        for one in generate(model, tokenizer, SOURCES, max_new_tokens=6, **options):
            assert not {0, UNKNOWN, CLS, SEP, MASK} & set(one.token_ids)
            assert len(one.text.split()) == len(one.token_ids)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert model(input_ids=ids).logits.shape == (1, 4, VOCAB_SIZE)


def test_numbers_that_are_no_token_are_not_written():
    """Of a table longer than the vocabulary, and of a vocabulary with a gap."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.get_vocab = lambda: {f"w{i}": i for i in range(VOCAB_SIZE - 5) if i != 9}
    with torch.no_grad():
        model.cls.predictions.bias[[9, VOCAB_SIZE - 5, VOCAB_SIZE - 1]] = 50.0
    for one in generate(model, tokenizer, SOURCES, max_new_tokens=6):
        assert not {9, *range(VOCAB_SIZE - 5, VOCAB_SIZE)} & set(one.token_ids)


def test_bad_input_is_refused(tokenizer):
    model = tiny_model()
    assert generate(model, tokenizer, []) == []
    for options, problem in (
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True"),
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0 must be above 0"),
        ({"max_new_tokens": 28}, "has 5 tokens, .* more than the 32 positions of BertForMaskedLM"),
    ):
        with pytest.raises(InputError, match=problem):
            generate(model, tokenizer, SOURCES, **options)
    with pytest.raises(InputError, match=r"source 1 \('  '\) has no tokens"):
        generate(model, tokenizer, ["w1", "  "], max_new_tokens=2)
    endless = tiny_tokenizer()
    endless.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    with pytest.raises(InputError, match="nothing behind the second sequence"):
        generate(model, endless, ["w1"], max_new_tokens=2)


def test_a_model_trained_to_copy_copies_and_stops(tokenizer):
    model = tiny_model(
        hidden_size=64, initializer_range=0.05, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    modes, lengths = torch.full((32,), 3), torch.full((32,), 6)
    types = (torch.arange(11) >= 6).long() + 4
    for step in range(300):
        words = torch.randint(5, 25, (32, 4), generator=generator)
        ids = torch.cat(
            [torch.full((32, 1), CLS), words, torch.full((32, 1), SEP), words, torch.full((32, 1), SEP)], 1
        )
        # Half of the target is hidden, its end like any other.
        hidden = (torch.rand(32, 11, generator=generator) < 0.5) & (torch.arange(11) >= 6)
        inputs = lm_mode_inputs(
            model,
            input_ids=ids.masked_fill(hidden, MASK),
            attention_mask=torch.ones_like(ids),
            lm_modes=modes,
            source_lengths=lengths,
            token_type_ids=types.expand(32, -1),
        )
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[hidden], ids[hidden])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 30, (300 - step) / 100)
        optimizer.step()
        optimizer.zero_grad()
    words = torch.randint(0, 20, (20, 4), generator=generator)
    sources = [" ".join(f"w{number}" for number in row) for row in words.tolist()]
    for num_beams in (1, 3):
        written = generate(model, tokenizer, sources, max_new_tokens=10, num_beams=num_beams)
        assert np.mean([one.text == source for one, source in zip(written, sources, strict=True)]) >= 0.9, loss
        assert all(one.has_ended for one in written)
