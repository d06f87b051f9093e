"""Permutation language modelling: what it learns, how it counts, what it remembers and what it leaves behind."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, XLNetConfig, XLNetLMHeadModel

from helpers.method_matrix import TINY, build, log_of, relative_difference, tiny_data, tiny_tokenizer
from helpers.permuted_batches import VOCAB, in_order, permuted
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.permutation_lm import METHOD as plm
from hf_pretrain.objectives.permutation_lm import (
    DataCollatorForPermutationLM,
    PermutationLMForPreTraining,
    PermutationLMModelArguments,
    PermutationLMTrainingArguments,
    log_likelihood,
    plm_inputs,
    score_permutations,
)
from hf_pretrain.objectives.permutation_lm.scoring import _batch, _log_likelihoods

NO_DROPOUT = {"config_overrides": '{"dropout": 0.0}'}


def xlnet(vocab_size=VOCAB, *, layers=2, width=32, dropout=0.0, scale=1.0, **options):
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=vocab_size,
        d_model=width,
        n_layer=layers,
        n_head=4,
        d_inner=2 * width,
        dropout=dropout,
        pad_token_id=0,
    )
    model = XLNetLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
    return PermutationLMForPreTraining.from_model(model, **options)


def with_labels(batch):
    """Model inputs of a hand-made batch; a second target in column 0 is a filler."""
    filler = (batch.target_columns == 0) & (torch.arange(batch.target_columns.shape[1]) > 0)
    labels = batch.input_ids.gather(1, batch.target_columns).masked_fill(filler, -100)
    return {name: value for name, value in batch._asdict().items() if value is not None} | {"labels": labels}


# The model


def test_loss_is_the_sum_over_labelled_targets():
    model, inputs = xlnet().eval(), with_labels(permuted())
    output = model(**inputs)
    sizes = (inputs["labels"] != -100).sum(dim=1)
    assert output.losses["plm"].count.tolist() == sizes.tolist() == [4, 3, 4]
    assert model.count_targets(inputs) == {"plm": 11}
    logits, _ = model.two_streams(permuted(), torch.arange(12))
    nll = torch.nn.functional.cross_entropy(logits, inputs["labels"].flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(output.losses["plm"].sum, nll.sum(dim=1))
    right = (logits.argmax(-1).view(3, 4) == inputs["labels"]).sum(dim=1)
    assert output.metrics["plm_accuracy"].sum.tolist() == right.tolist()
    assert output.memory is None
    assert model.train()(**inputs).metrics == {}


@pytest.mark.parametrize("segments", [True, False])
def test_every_parameter_has_a_gradient(segments):
    model, inputs = xlnet(), with_labels(permuted(segments=segments))
    model(**inputs).losses["plm"].sum.sum().backward()
    largest = {name: float(parameter.grad.abs().max()) for name, parameter in model.named_parameters()}
    zero = {name for name, value in largest.items() if value < 1e-7}
    # With one segment the softmax does not see the term, so its gradient is nothing, but it is there.
    assert all(name.endswith(("r_s_bias", "seg_embed")) for name in zero)
    assert (len(zero) == 0) == segments


def test_a_batch_without_targets_has_a_gradient_of_zero():
    model, inputs = xlnet(), with_labels(permuted())
    inputs["labels"].fill_(-100)
    loss = model(**inputs).losses["plm"]
    loss.sum.sum().backward()
    assert loss.count.sum() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_checkpointing_is_switched_on_by_the_usual_call():
    gradients = []
    for enable in (False, True):
        model, inputs = xlnet(dropout=0.3).train(), with_labels(permuted())
        if enable:
            model.activation_checkpointing_enable()
        calls = []
        model.model.transformer.layer[0].ff.layer_1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        model(**inputs).losses["plm"].sum.sum().backward()
        assert len(calls) == 1 + enable
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert relative_difference(*gradients) < 1e-5


def test_memory_is_kept_reset_and_detached():
    model = xlnet(scale=5.0, mem_len=8, reuse_len=6).eval()
    inputs = with_labels(permuted(lengths=(12, 12)))
    first = model(**inputs)
    assert first.memory.lengths.tolist() == [6, 6]
    assert first.memory.states.shape == (2, 2, 8, 32) and not first.memory.states.requires_grad
    second = model(**inputs, memory=first.memory, memory_reset=torch.tensor([False, True]))
    assert second.memory.lengths.tolist() == [8, 6]
    plain, remembered = first.losses["plm"].sum, second.losses["plm"].sum
    assert abs(remembered[0] - plain[0]) > 1e-4
    torch.testing.assert_close(remembered[1], plain[1])


def test_what_is_remembered_of_a_segment_has_not_seen_its_second_half():
    model = xlnet(layers=3, scale=5.0, mem_len=6, reuse_len=6).eval()
    batch = permuted(lengths=(12,))
    other = batch._replace(input_ids=torch.cat([batch.input_ids[:, :6], batch.input_ids[:, 6:].flip(1)], dim=1))
    kept = [model(**with_labels(one)).memory.states for one in (batch, other)]
    assert torch.equal(*kept)


@pytest.mark.parametrize("kind", ["xlnet", "bert"])
def test_checkpoint_and_export(kind, tmp_path):
    if kind == "xlnet":
        model = xlnet(mem_len=4)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = PermutationLMForPreTraining.from_model(
            BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes)), mask_token_id=4
        )
    inputs = with_labels(permuted())
    model.eval().save_pretrained(tmp_path / "checkpoint")
    again, info = PermutationLMForPreTraining.from_pretrained(tmp_path / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again(**inputs).losses["plm"].sum, model(**inputs).losses["plm"].sum)
    model.export(tmp_path / "export")
    stock, info = type(model.model).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = inputs["input_ids"]
    torch.testing.assert_close(stock.eval()(ids).logits, model.model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path / "export")).__name__.lower().startswith(kind)


def test_what_cannot_be_trained_is_refused():
    bert = BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(InputError, match="mem_len=8.*relative positions"):
        PermutationLMForPreTraining.from_model(bert, mask_token_id=4, mem_len=8)
    with pytest.raises(InputError, match="needs a mask_token_id"):
        PermutationLMForPreTraining.from_model(bert)


# What it learns


def repeated_text(num_rows, *, symbols, length, hidden, generator):
    """Random symbols written twice; the same places are targets in both copies, in a random order."""
    text = torch.randint(1, symbols + 1, (num_rows, length), generator=generator)
    chosen = torch.rand(num_rows, length, generator=generator).argsort(1)[:, :hidden].sort(1).values
    columns = torch.cat([chosen, chosen + length], dim=1)
    order = torch.rand(columns.shape, generator=generator).argsort(1) + 1
    ids = torch.cat([text, text], dim=1)
    ranks = torch.zeros_like(ids).scatter(1, columns, order)
    thresholds = torch.ones_like(ids).scatter(1, columns, order)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "key_ranks": ranks, "thresholds": thresholds}
    return batch | {"target_columns": columns, "labels": ids.gather(1, columns)}


def learned_loss(*, symbols, length, hidden, steps, rate, rows, masked, layers=1, width=32):
    """Loss on fresh text after training; `masked` hides the targets in the input, as a masked language model does."""
    model = xlnet(symbols + 2, layers=layers, width=width).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    generator = torch.Generator().manual_seed(1)

    def loss(num_rows):
        batch = repeated_text(num_rows, symbols=symbols, length=length, hidden=hidden, generator=generator)
        if masked:
            batch["input_ids"] = batch["input_ids"].scatter(1, batch["target_columns"], symbols + 1)
        found = model(**batch).losses["plm"]
        return found.sum.sum() / found.count.sum()

    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss(1024))


def test_targets_help_each_other():
    """The second copy of a target is certain once the first is known; predicted apart, both cost ln 8 = 2.08."""
    options = {"symbols": 8, "length": 3, "hidden": 1, "steps": 120, "rate": 1e-2, "rows": 32}
    assert learned_loss(**options, masked=False) < 1.9
    assert learned_loss(**options, masked=True) > 2.05


@pytest.mark.slow
def test_the_bound_of_independent_predictions_is_broken():
    """Half of the targets are certain: the optimum is ln 32 / 2 = 1.733, where independent predictions stay at 3.466."""
    options = {"symbols": 32, "length": 8, "hidden": 3, "rate": 2e-3, "rows": 64, "layers": 2, "width": 64}
    assert learned_loss(**options, steps=1000, masked=False) < 1.85
    assert learned_loss(**options, steps=300, masked=True) > 3.4


# Scoring


@pytest.mark.parametrize("kind", ["xlnet", "bert"])
def test_probabilities_of_all_texts_sum_to_one_in_any_order(kind):
    """Three tokens out of a vocabulary of three (four with BERT's mask token)."""
    if kind == "xlnet":
        size, model = 3, xlnet(3, scale=10.0)
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=4, max_position_embeddings=8, initializer_range=0.3, **sizes)
        size, model = 4, PermutationLMForPreTraining.from_model(BertForMaskedLM(config), mask_token_id=3)
    # A special token in front is given: it sees none of what it is seen by.
    texts = [np.array([0, *text]) for text in itertools.product(range(size), repeat=3)]
    columns = [np.arange(1, 4)] * len(texts)
    totals = []
    for order in itertools.permutations(range(3)):
        values = _log_likelihoods(model.eval(), _batch(texts, columns, [np.array(order)] * len(texts)))
        totals.append(values)
        assert np.exp(values).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.ptp(np.array(totals), axis=0).max() > 1e-3


def test_an_early_target_changes_later_predictions():
    model, batch = xlnet(scale=8.0).eval(), in_order(1, 6)
    logits = model.predict(batch, torch.arange(6))[0]
    other = batch.input_ids.clone()
    other[0, 2] = 9 if other[0, 2] != 9 else 10
    changed = (model.predict(batch._replace(input_ids=other), torch.arange(6))[0] - logits).abs().amax(dim=1)
    assert (changed[:3] == 0).all() and (changed[3:] > 1e-4).all()


def test_scores_are_sums_over_the_order_and_do_not_depend_on_the_batch():
    model, tokenizer = xlnet(60, scale=6.0), tiny_tokenizer()
    texts = ["w1 w2 w3", "w7 w8 w9 w10 w11 w12", "w5"]
    scores = score_permutations(model.train(), tokenizer, texts)
    assert model.training
    assert [score.num_tokens for score in scores] == [3, 6, 1]
    alone = log_likelihood(model, tokenizer, texts, batch_size=1)
    assert alone.tolist() == pytest.approx([score.log_likelihood for score in scores], rel=1e-5)
    assert log_likelihood(model.model, tokenizer, texts).tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    given = log_likelihood(model, tokenizer, texts, order=[[0, 1, 2], range(6), [0]])
    assert given.tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    backwards = log_likelihood(model, tokenizer, texts, order=[[2, 1, 0], range(5, -1, -1), [0]])
    assert abs(backwards[1] - given[1]) > 1e-3
    assert backwards[2] == pytest.approx(float(given[2]), rel=1e-5)


def test_random_orders_are_keyed_and_averaged():
    model, tokenizer = xlnet(60, scale=6.0), tiny_tokenizer()
    texts = ["w1 w2 w3 w4 w5", "w7 w8 w9"]
    scores = score_permutations(model, tokenizer, texts, order="random", num_orders=4, seed=5)
    again = score_permutations(model, tokenizer, texts, order="random", num_orders=4, seed=5, batch_size=3)
    for score, other in zip(scores, again, strict=True):
        assert score.by_order == pytest.approx(other.by_order, rel=1e-5)
        assert len({round(value, 4) for value in score.by_order}) > 1
        assert score.log_likelihood == pytest.approx(np.mean(score.by_order))
        assert score.mixture_log_likelihood == pytest.approx(np.log(np.mean(np.exp(score.by_order))))
    assert score_permutations(model, tokenizer, texts, order="random", seed=6)[0].by_order[0] != scores[0].by_order[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "backwards"}, "order='backwards'"),
        ({"order": [[0, 1, 1]]}, "order of text 0"),
        ({"order": []}, "order of text 0"),
        ({"num_orders": 2}, "num_orders=2"),
        ({"texts": [""]}, "no tokens"),
    ],
)
def test_bad_scoring_input_is_refused(options, message):
    texts = options.pop("texts", ["w1 w2 w3"])
    with pytest.raises(InputError, match=message):
        score_permutations(xlnet(60), tiny_tokenizer(), texts, **options)


# Options, data and Trainer


def arguments(**options):
    return PermutationLMTrainingArguments(output_dir="unused", report_to=[], **options)


def test_defaults_are_the_recipe():
    args = arguments()
    assert (args.adam_epsilon, args.weight_decay, args.adam_bias_correction) == (1e-6, 0.01, False)
    assert (args.context_factor, args.mem_len, args.lr_scheduler_type) == (6.0, 0, "linear")
    assert args.permutation.context_factor == 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_len": -1}, "mem_len=-1"),
        ({"bidirectional": True}, "mem_len=0"),
        ({"mem_len": 8, "halves": False}, "halves=False"),
        ({"eval_lanes": 0}, "eval_lanes=0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        arguments(**options)


def test_model_arguments():
    args = PermutationLMModelArguments(**TINY, config_overrides='{"dropout": 0.3, "clamp_len": 9}')
    model = PermutationLMForPreTraining.from_arguments(args, tiny_tokenizer(), mem_len=3)
    config = model.model.config
    sizes = (config.d_model, config.n_layer, config.n_head, config.d_inner, config.vocab_size)
    assert sizes == (32, 2, 2, 64, 60)
    assert (config.dropout, config.clamp_len, config.sep_token_id, model.memory_size) == (0.3, 9, 3, 3)
    bert = PermutationLMForPreTraining.from_arguments(
        PermutationLMModelArguments(**TINY, model_type="bert"), tiny_tokenizer()
    )
    assert type(bert.model).__name__ == "BertForMaskedLM" and bert.config.mask_token_id == 4
    for change, message in (
        ({"config_overrides": '{"hidden_dropout_prob": 0.0}'}, "no option hidden_dropout_prob"),
        ({"embedding_size": 8}, "embedding_size=8"),
        ({"attn_implementation": "eager"}, "sdpa, flex_attention"),
        ({"model_type": "bert", "attn_implementation": "eager"}, "'eager'"),
        ({"model_type": "deberta-v2"}, "DebertaV2ForMaskedLM"),
    ):
        with pytest.raises(InputError, match=message):
            PermutationLMForPreTraining.from_arguments(
                PermutationLMModelArguments(**{**TINY, **change}), tiny_tokenizer()
            )


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("xlnet", '{"dropout": 0.0}'),
        ("roberta", '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'),
        ("modernbert", None),
    ],
)
def test_gradient_does_not_depend_on_how_the_batch_is_cut(model_type, overrides, tmp_path):
    options = {"model_options": {"model_type": model_type, "config_overrides": overrides}, "mem_len": 0}
    gradients = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = build(
            plm,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        trainer.train()
        gradients.append(trainer.recorder.gradients[0])
    assert relative_difference(*gradients) < 1e-4


def documents(count, *, seed):
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = generator.integers(5, 60, size=int(generator.integers(20, 60))).tolist()
        starts = [True] * len(ids)
        sentences = [i % 7 == 0 for i in range(len(ids))]
        rows.append({"input_ids": ids, "word_starts": starts, "sent_starts": sentences, "doc_id": number})
    return Dataset.from_list(rows)


def lane_data():
    data = tiny_data()
    data.train_documents, data.eval_documents = documents(40, seed=1), documents(12, seed=2)
    return data


MEMORY = {"mem_len": 18, "bidirectional": True, "eval_lanes": 4, "per_device_train_batch_size": 4}


def test_recurrent_training_resumes_to_the_bit(tmp_path):
    options = MEMORY | {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    options["model_options"] = {"config_overrides": None}
    straight = build(plm, tmp_path / "straight", lane_data(), **options)
    straight.train()
    resumed = build(plm, tmp_path / "resumed", lane_data(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert log_of(resumed) == log_of(straight)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    composite = load_file(tmp_path / "straight" / "checkpoint-3" / "model.safetensors")
    assert set(composite) == set(straight.model.state_dict()) - set(straight.model.all_tied_weights_keys)


def test_recurrent_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    gradients = []
    for batch, accumulation in ((4, 1), (1, 4)):
        options = MEMORY | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = build(
            plm,
            tmp_path / str(batch),
            lane_data(),
            **options,
            max_steps=3,
            learning_rate=1e-3,
            model_options=NO_DROPOUT,
        )
        trainer.train()
        gradients.append(trainer.recorder.gradients[2])
    assert relative_difference(*gradients) < 1e-3


def test_recurrent_evaluation_is_repeatable_and_remembers(tmp_path):
    trainer = build(plm, tmp_path, lane_data(), **MEMORY, model_options=NO_DROPOUT)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_plm_loss"] == second["eval_plm_loss"]
    windows = trainer.eval_dataset
    assert windows.num_lanes == 4 and windows.num_windows > 2
    states, total, count = None, 0.0, 0.0
    trainer.model.eval()
    for time in range(windows.num_windows):
        batch = trainer.data_collator([windows[time * 4 + lane] for lane in range(4)])
        batch.pop("lanes")
        with torch.no_grad():
            output = trainer.model(**batch, memory=states)
        states = output.memory
        total += float(output.losses["plm"].sum.sum())
        count += float(output.losses["plm"].count.sum())
    assert states.lengths.tolist() == [18] * 4
    assert first["eval_plm_loss"] == pytest.approx(total / count, rel=1e-5)


def test_data_that_does_not_fit_a_memory_is_refused():
    data = lane_data()
    with pytest.raises(InputError, match="even number of examples"):
        plm_inputs(data, arguments(mem_len=8, bidirectional=True, per_device_train_batch_size=3))
    data.train_documents = None
    with pytest.raises(InputError, match="streaming"):
        plm_inputs(data, arguments(mem_len=8))
    plain = plm_inputs(data, arguments())
    assert plain["train_dataset"] is data.train_dataset
    data.description["block_mode"] = "isolated_documents"
    with pytest.raises(InputError, match="isolated_documents"):
        plm_inputs(data, arguments())


def test_held_out_lanes_fit_the_text_and_the_directions():
    data = lane_data()
    for wanted, expected in ((4, 4), (5, 4), (1, 2)):
        inputs = plm_inputs(data, arguments(**MEMORY | {"eval_lanes": wanted}))
        assert inputs["eval_dataset"].num_lanes == expected
    short = plm_inputs(tiny_data(held_out=8), arguments(mem_len=8, eval_lanes=100, per_device_train_batch_size=4))
    assert 1 <= short["eval_dataset"].num_lanes < 10


def test_the_collator_feeds_the_model(tmp_path):
    """No row depends on another, nor on padding: exact zeros from the text on."""
    trainer = build(plm, tmp_path, model_options=NO_DROPOUT, mem_len=0)
    collator = trainer.data_collator
    assert isinstance(collator, DataCollatorForPermutationLM)
    batch = collator([trainer.train_dataset[i] for i in range(6)])
    model, found = trainer.model.eval(), []
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    loss = model(**batch).losses["plm"]
    for row in range(6):
        (gradient,) = torch.autograd.grad(loss.sum[row], found[0], retain_graph=True)
        assert (gradient[[other for other in range(6) if other != row]] == 0).all()
        assert (gradient[row][batch["attention_mask"][row] == 0] == 0).all()
