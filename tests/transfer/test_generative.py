"""GPT-1's fine-tuning: two losses by hand, what each weight does, how a batch may be cut, and what comes back from a folder."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    EvalPrediction,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    OpenAIGPTConfig,
    Trainer,
    TrainingArguments,
)

from helpers.method_matrix import tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.transfer.generative.inputs import DataCollatorForGenerativeTransfer, add_transfer_tokens
from hf_pretrain.transfer.generative.modeling import GenerativeTransferModel
from hf_pretrain.transfer.generative.trainer import (
    GenerativeTransferArguments,
    GenerativeTransferTrainer,
    transfer_metrics,
)

S, D, C = 60, 61, 62
GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=60, **GPT, **ENDS),
    "openai-gpt": OpenAIGPTConfig(vocab_size=60, **GPT),
    "llama": LlamaConfig(vocab_size=60, max_position_embeddings=32, **SIZES, **ENDS),
}
QUIET = {
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "warmup_steps": 0,
}


def build(name="gpt2", *, tokenizer=None, seed=0, **options):
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    options = {"classifier_dropout": 0.0} | options
    return GenerativeTransferModel.from_model(stock, tokenizer or tiny_tokenizer(), seed=seed, **options)


def row(number, length, *, second=0):
    text = [5 + (7 * number + 3 * column) % 50 for column in range(length)]
    return [S, *text[:second], D, *text[second:], C] if second else [S, *text, C]


def examples(count, *, rows=1, labels=2):
    return [
        {
            "input_ids": [row(3 * i + k, 3 + (i + 2 * k) % 5, second=2 * (rows > 1)) for k in range(rows)],
            "labels": i % labels,
        }
        for i in range(count)
    ]


def collate(rows, *, side="right", **options):
    tokenizer = tiny_tokenizer()
    add_transfer_tokens(tokenizer)
    tokenizer.padding_side = side
    return DataCollatorForGenerativeTransfer(tokenizer, **options)(rows)


def trainer(folder, model, rows, **options):
    tokenizer = tiny_tokenizer()
    add_transfer_tokens(tokenizer)
    data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows)}
    args = GenerativeTransferArguments(output_dir=str(folder), **QUIET | {"max_steps": 1} | options)
    return GenerativeTransferTrainer(model, args, processing_class=tokenizer, **data)


def by_hand(model, rows, *, weight=0.5):
    """The loss from a plain forward of each row alone, and the logits."""
    kind = model.config.transformation
    task, lm, all_logits = [], [], []
    for example in rows:
        last, of_rows = [], []
        for ids in example["input_ids"]:
            ids = torch.tensor([ids])
            last.append(model.model.base_model(input_ids=ids)[0][0, -1])
            predicted = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            of_rows.append(-sum(predicted[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)) / (ids.shape[1] - 1))
        lm.append(sum(of_rows) / len(of_rows))
        if kind == "multiple_choice":
            logits = torch.stack([model.score.weight[0] @ state for state in last])
        else:
            logits = model.score.weight @ sum(last)
        all_logits.append(logits)
        if model.config.is_regression:
            task.append((logits[0] - example["labels"]) ** 2)
        else:
            task.append(-logits.log_softmax(-1)[example["labels"]])
    return torch.stack(task).mean() + weight * torch.stack(lm).mean(), all_logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["classification", "entailment", "similarity", "multiple_choice"])
def test_the_loss_is_the_tasks_plus_the_weighted_language_models(name, kind):
    model = build(name, transformation=kind).train()
    rows = examples(4, rows={"similarity": 2, "multiple_choice": 3}.get(kind, 1))
    for weight in (0.5, 2.0):
        found = model(**collate(rows), lm_loss_weight=weight)
        loss, logits = by_hand(model, rows, weight=weight)
        torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logits, torch.stack(logits), rtol=1e-5, atol=1e-6)
    default = model(**collate(rows)).loss
    torch.testing.assert_close(default, by_hand(model, rows, weight=0.5)[0], rtol=1e-5, atol=1e-6)


def test_a_regression_takes_the_squared_error_and_leaves_out_what_has_no_value():
    model = build(transformation="similarity", num_labels=1)
    rows = examples(3, rows=2)
    for example, value in zip(rows, (0.5, 4.0, 2.0), strict=True):
        example["labels"] = value
    torch.testing.assert_close(model(**collate(rows)).loss, by_hand(model, rows)[0], rtol=1e-5, atol=1e-6)
    missing = [rows[0], rows[1] | {"labels": float("nan")}]
    found = model(**collate(missing))
    found.loss.backward()
    assert found.losses["task"].count.tolist() == [1, 0]
    assert found.losses["lm"].count.tolist() == [1, 1]
    assert model.score.weight.grad.isfinite().all()
    torch.testing.assert_close(found.losses["task"].sum.sum(), (found.logits[0, 0] - 0.5) ** 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_the_weight_it_is_a_plain_classifier_and_no_token_is_predicted(name):
    model, rows = build(name), examples(6)
    stock = model.to_sequence_classifier()
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *call: calls.append(call))
    batch = collate(rows)
    flat = {key: batch[key][:, 0] for key in ("input_ids", "attention_mask")}
    plain = stock.train()(**flat, labels=batch["labels"])
    found = model.train()(**batch, lm_loss_weight=0.0)
    assert not calls
    assert list(found.losses) == ["task"]
    torch.testing.assert_close(found.loss, plain.loss, rtol=0, atol=1e-6)
    found.loss.backward()
    plain.loss.backward()
    own = dict(model.model.named_parameters()) | {"score.weight": model.score.weight}
    for key, parameter in stock.named_parameters():
        torch.testing.assert_close(own[key].grad, parameter.grad, rtol=0, atol=1e-6)


def test_tokens_are_predicted_where_one_follows_and_nowhere_else():
    model, rows, seen = build(), examples(5), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch = collate(rows, pad_to_multiple_of=32)
    model(**batch)
    (shape,) = seen
    assert shape[:-1].numel() == sum(len(ids) - 1 for example in rows for ids in example["input_ids"])
    # Without positions they come from the mask; without labels nothing is predicted.
    torch.testing.assert_close(
        model(**{key: value for key, value in batch.items() if key != "target_positions"}).loss, model(**batch).loss
    )
    seen.clear()
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None
    assert not seen


@pytest.mark.parametrize("name", CONFIGS)
def test_side_and_amount_of_padding_do_not_matter(name):
    model, rows = build(name, transformation="multiple_choice").eval(), examples(4, rows=3)
    rows[1]["input_ids"] = rows[1]["input_ids"][:2]
    expected = model(**collate(rows))
    for options in ({"side": "left"}, {"pad_to_multiple_of": 16}, {"side": "left", "pad_to_multiple_of": 16}):
        found = model(**collate(rows, **options))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    # An example with fewer answers is what it is alone.
    alone = model(**collate(rows[1:2]))
    torch.testing.assert_close(expected.logits[1, :2], alone.logits[0], rtol=1e-5, atol=1e-6)
    assert expected.logits[1].softmax(-1)[2] == 0
    for part in ("task", "lm"):
        torch.testing.assert_close(expected.losses[part].sum[1], alone.losses[part].sum[0], rtol=1e-5, atol=1e-6)


def test_the_order_of_two_similar_texts_does_not_matter():
    model, rows = build(transformation="similarity").eval(), examples(3, rows=2)
    swapped = [example | {"input_ids": example["input_ids"][::-1]} for example in rows]
    torch.testing.assert_close(model(**collate(rows)).logits, model(**collate(swapped)).logits)
    # The states are added: the first row alone says something else.
    first = [example | {"input_ids": example["input_ids"][:1]} for example in rows]
    assert not torch.allclose(model(**collate(rows)).logits, model(**collate(first)).logits)


def test_the_order_of_the_answers_is_that_of_the_scores_and_they_share_a_dropout_mask():
    model, rows = build(transformation="multiple_choice", classifier_dropout=0.5), examples(6, rows=3)
    order = [2, 0, 1]
    permuted = [example | {"input_ids": [example["input_ids"][i] for i in order]} for example in rows]
    model.eval()
    torch.testing.assert_close(model(**collate(permuted)).logits, model(**collate(rows)).logits[:, order])
    model.train()
    same = [example | {"input_ids": [example["input_ids"][0]] * 3} for example in rows[:1] * 6]
    logits = model(**collate(same)).logits
    torch.testing.assert_close(logits, logits[:, :1].expand(-1, 3))
    # Each example has a mask of its own.
    assert len(set(logits[:, 0].tolist())) > 3


def test_head_and_new_rows_are_the_seeds_alone():
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    old = {key: value.clone() for key, value in stock.state_dict().items()}
    first = GenerativeTransferModel.from_model(copy.deepcopy(stock), tiny_tokenizer(), num_labels=3)
    torch.manual_seed(99)
    again = GenerativeTransferModel.from_model(copy.deepcopy(stock), tiny_tokenizer(), num_labels=3)
    other = GenerativeTransferModel.from_model(copy.deepcopy(stock), tiny_tokenizer(), num_labels=3, seed=1)
    state = first.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, state[key]), key
    fresh = ["model.model.embed_tokens.weight", "model.lm_head.weight", "score.weight"]
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]) != (key in fresh), key
        if key.removeprefix("model.") in old:
            assert torch.equal(value[:60] if key in fresh else value, old[key.removeprefix("model.")]), key
    drawn = [state[fresh[0]][60:], state[fresh[1]][60:], state["score.weight"]]
    values = torch.cat([part.flatten() for part in drawn])
    assert values.std().item() == pytest.approx(0.02, rel=0.15)
    assert len(set(values.tolist())) == len(values) == 9 * 16


def test_tokens_that_are_known_keep_their_rows():
    tokenizer = tiny_tokenizer()
    model = build(tokenizer=tokenizer)
    table = model.get_input_embeddings().weight.detach().clone()
    again = GenerativeTransferModel.from_model(model.model, tokenizer, transformation="entailment", seed=5)
    assert torch.equal(again.get_input_embeddings().weight, table)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_opens_again(name, tmp_path):
    model, batch = build(name, num_labels=3).eval(), collate(examples(4, labels=3))
    model.save_pretrained(tmp_path / "own")
    again = GenerativeTransferModel.from_pretrained(tmp_path / "own").eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    stock = model.to_sequence_classifier()
    stock.save_pretrained(tmp_path / "stock")
    opened, report = type(stock).from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = opened.eval()(input_ids=batch["input_ids"][:, 0], attention_mask=batch["attention_mask"][:, 0]).logits
    torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_one_batch(tmp_path):
    """Rows of any length, an example without a label, and micro-batches of which the last one is smaller."""
    rows = examples(8)
    rows[5]["labels"] = -100
    found = {}
    for size, parts in ((8, 1), (2, 4), (3, 3)):
        run = trainer(
            tmp_path,
            build(),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            weight_decay=0.0,
        )
        run.train()
        found[size] = (run.model.state_dict(), run.state.log_history[0])
    expected = build()(**collate(rows))
    task = expected.losses["task"].sum.sum() / 7
    lm = expected.losses["lm"].sum.sum() / 8
    for state, log in found.values():
        assert log["task_loss"] == pytest.approx(task.item(), rel=1e-5)
        assert log["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
        assert log["loss"] == pytest.approx((task + 0.5 * lm).item(), rel=1e-4)
        for key, value in state.items():
            torch.testing.assert_close(value, found[8][0][key], rtol=1e-4, atol=1e-6)
    # The step is that of the gradient by hand.
    model = build()
    by_hand_rows = [example for example in rows if example["labels"] >= 0]
    loss = by_hand(model, by_hand_rows, weight=0.0)[0] + 0.5 * model(**collate(rows)).losses["lm"].sum.mean()
    (gradient,) = torch.autograd.grad(loss, model.score.weight)
    torch.testing.assert_close(found[3][0]["score.weight"], model.score.weight - gradient, rtol=1e-4, atol=1e-6)


def test_an_evaluation_has_both_losses(tmp_path):
    rows = examples(5)
    run = trainer(tmp_path, build(), rows, lm_loss_weight=0.25, per_device_eval_batch_size=5)
    metrics = run.evaluate()
    expected = build().eval()(**collate(rows), lm_loss_weight=0.25)
    assert metrics["eval_task_loss"] == pytest.approx(expected.losses["task"].sum.mean().item(), rel=1e-5)
    assert metrics["eval_lm_loss"] == pytest.approx(expected.losses["lm"].sum.mean().item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert {"eval_accuracy", "eval_matthews_correlation"} <= metrics.keys()
    assert run.predict(run.eval_dataset.remove_columns("labels")).predictions.shape == (5, 2)


def test_the_head_moves_and_stock_models_of_two_heads_never_move_theirs(tmp_path):
    """The stock Trainer optimises the first loss that a model returns, which is the language model's."""
    rows = examples(8, rows=2)
    run = trainer(tmp_path, build(transformation="multiple_choice"), rows, max_steps=3, learning_rate=1e-2)
    head = run.model.score.weight.detach().clone()
    run.train()
    assert (run.model.score.weight - head).abs().min() > 1e-3

    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.vocab_size, config.pad_token_id = 63, 0
    stock = GPT2DoubleHeadsModel(config)
    head = copy.deepcopy(stock.multiple_choice_head.state_dict())
    body = stock.transformer.wte.weight.detach().clone()

    def collator(given):
        batch = collate(given)
        last = batch["attention_mask"].sum(-1) - 1
        ids = batch["input_ids"]
        return {"input_ids": ids, "labels": ids, "mc_labels": batch["labels"], "mc_token_ids": last}

    args = TrainingArguments(str(tmp_path), **QUIET, max_steps=3, learning_rate=1e-2, remove_unused_columns=False)
    Trainer(stock, args, train_dataset=Dataset.from_list(rows), data_collator=collator).train()
    assert not torch.equal(stock.transformer.wte.weight, body)
    for key, value in stock.multiple_choice_head.state_dict().items():
        assert torch.equal(value, head[key]), key


def test_a_toy_task_is_learned(tmp_path):
    """Of two answers, the one with an even token is right; the contexts of the evaluation are new ones."""
    rows = []
    for i in range(160):
        context, right, wrong = 20 + i % 40, 6 + 2 * (i % 5), 5 + 2 * (i // 5 % 5)
        answers = [[S, context, D, answer, C] for answer in (right, wrong)]
        rows.append({"input_ids": answers[::-1] if i % 3 else answers, "labels": int(i % 3 > 0)})
    model = build(transformation="multiple_choice", classifier_dropout=0.1)
    options = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 60, "per_device_train_batch_size": 16}
    run = trainer(tmp_path, model, rows[:120], **options)
    held_out = Dataset.from_list(rows[120:])
    assert run.evaluate(held_out)["eval_accuracy"] < 0.8
    run.train()
    metrics = run.evaluate(held_out)
    assert metrics["eval_accuracy"] > 0.95
    assert metrics["eval_lm_loss"] < 3


# peft asks for it by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_head_and_new_rows_alone_move_and_open_again(name, tmp_path):
    model = build(name)
    options = {
        "target_modules": ["q_proj", "v_proj"] if name == "llama" else ["c_attn"],
        "fan_in_fan_out": name != "llama",
    }
    adapted = get_peft_model(model, LoraConfig(r=2, **options, **model.adapter_options()))
    before = {key: value.detach().clone() for key, value in adapted.state_dict().items()}
    rows, batch = examples(8), collate(examples(8))
    start = adapted.eval()(**batch)
    torch.testing.assert_close(start.logits, build(name).eval()(**batch).logits)
    run = trainer(tmp_path / "run", adapted, rows, max_steps=3, learning_rate=1e-2)
    run.train()
    moved = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
    assert moved, "something was trained"
    assert all("lora_" in key or "trainable_tokens" in key or "score.modules_to_save" in key for key in moved)
    parts = ("lora_B", "trainable_tokens_delta", "score.modules_to_save")
    assert all(any(part in key for key in moved) for part in parts)
    run.save_model(str(tmp_path / "adapter"))
    opened = PeftModel.from_pretrained(build(name), tmp_path / "adapter").eval()
    end = adapted.eval()(**batch)
    found = opened(**batch)
    assert torch.equal(found.logits, end.logits)
    assert torch.equal(found.loss, end.loss)
    assert not torch.allclose(end.logits, start.logits)
    # New rows count where a token is read and where it is predicted.
    merged = opened.merge_and_unload()
    torch.testing.assert_close(merged(**batch).loss, end.loss, rtol=1e-4, atol=1e-5)
    tables = [part().weight for part in (merged.get_input_embeddings, merged.get_output_embeddings)]
    for table, fresh in zip(
        tables, (build(name).get_input_embeddings, build(name).get_output_embeddings), strict=True
    ):
        assert torch.equal(table[:60], fresh().weight[:60])
        assert not torch.equal(table[60:], fresh().weight[60:])


def test_matrices_alone_are_decayed(tmp_path):
    model = build()
    run = trainer(tmp_path, model, examples(2))
    names = dict(model.named_parameters())
    decayed = set(run.get_decay_parameter_names(model))
    assert decayed == {name for name, value in names.items() if value.ndim == 2}
    assert {"score.weight", "model.transformer.wte.weight"} <= decayed
    defaults = GenerativeTransferArguments(output_dir=str(tmp_path), report_to=[])
    assert (defaults.learning_rate, defaults.weight_decay, defaults.warmup_steps) == (6.25e-5, 0.01, 0.002)
    assert (defaults.num_train_epochs, defaults.per_device_train_batch_size, defaults.max_grad_norm) == (3, 32, 1)
    assert (defaults.lm_loss_weight, defaults.lr_scheduler_type) == (0.5, "linear")
    assert (defaults.adam_beta1, defaults.adam_beta2) == (0.9, 0.999)


def test_metrics_are_those_of_glue():
    logits, labels = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 5.0]]), np.array([0, 1, 1, -100])
    found = transfer_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    assert found == pytest.approx({"accuracy": 2 / 3, "matthews_correlation": 0.5})
    values = EvalPrediction(
        predictions=np.array([[1.0], [2.0], [9.0], [0.0]]), label_ids=np.array([1.0, 2.0, 3.0, np.nan])
    )
    assert transfer_metrics(values) == pytest.approx({"spearmanr": 1.0, "pearsonr": 0.9176629})
    assert transfer_metrics(EvalPrediction(predictions=np.ones((3, 1)), label_ids=np.arange(3.0)))["spearmanr"] == 0


def test_what_cannot_work_is_refused(tmp_path):
    encoder = BertConfig(vocab_size=60, **SIZES, pad_token_id=0)
    with pytest.raises(InputError, match="sees the tokens that follow"):
        GenerativeTransferModel.from_model(AutoModelForCausalLM.from_config(encoder), tiny_tokenizer())
    body = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).transformer
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        GenerativeTransferModel.from_model(body, tiny_tokenizer())
    with pytest.raises(InputError, match="transformation='classify' must be one of"):
        build(transformation="classify")
    with pytest.raises(InputError, match="lm_loss_weight=-1"):
        GenerativeTransferArguments(output_dir=str(tmp_path), lm_loss_weight=-1)
    with pytest.raises(InputError, match="label_smoothing_factor"):
        GenerativeTransferArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="GenerativeTransferModel"):
        trainer(tmp_path, AutoModelForCausalLM.from_config(CONFIGS["gpt2"]), examples(2))
    with pytest.raises(InputError, match="40 tokens"):
        trainer(tmp_path, build(), [{"input_ids": [row(0, 38)], "labels": 0}])
    unlabelled = [{"input_ids": [row(0, 3)]}]
    with pytest.raises(InputError, match="no labels"):
        trainer(tmp_path, build(), unlabelled).train()
