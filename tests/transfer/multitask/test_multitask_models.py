"""The model of several tasks: the encoder is shared, and each task is exported as a stock checkpoint."""

import pytest
import torch
from transformers import (
    AutoModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from helpers.multitask_runs import SIZES, TASKS, load_tasks, moved, tokenizer, trainer, weights, write_encoder
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.transfer.multitask.modeling import MultiTaskModel

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": None,
    "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=8),
    "distilbert": DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=16, pad_token_id=0),
    "deberta": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": ModernBertConfig(**SIZES, **SPECIAL, attn_implementation="eager"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return load_tasks(tmp_path_factory.mktemp("models"), dict.fromkeys(TASKS, 16))


def batch_of(data):
    rows = data.encoded("validation", tokenizer(), max_length=32, doc_stride=8)
    return data.collator(tokenizer())([rows[i] for i in range(5)])


def outputs(model, batch):
    with torch.no_grad():
        out = model.eval()(**batch)
    return [out[name] for name in ("loss", "logits", "start_logits", "end_logits") if name in out]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "full") for name in CONFIGS if name != "electra"), ("bert", "lora"), ("electra", "lora")],
)
def test_each_task_opens_as_the_stock_model_that_was_trained(tmp_path, tasks, name, strategy):
    encoder = write_encoder(tmp_path / "encoder", CONFIGS[name])
    run = trainer(tmp_path / "out", encoder, tasks, strategy=strategy, learning_rate=0.05)
    start = {task: outputs(run.stock_model().task_model(task), batch_of(data)) for task, data in tasks.items()}
    run.train()
    run.save_model()
    composite = run.stock_model()
    for task, data in tasks.items():
        found, info = data.auto_class.from_pretrained(tmp_path / "out" / task, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert type(found) is type(composite.task_model(task))
        assert all(p.dtype == torch.float32 for p in found.parameters())
        batch = batch_of(data)
        assert not moved(weights(found), weights(composite.task_model(task)))
        wanted = outputs(composite.task_model(task), batch)
        inside = outputs(run.model, {**batch, "task": task})
        for one, two, before, three in zip(outputs(found, batch), wanted, start[task], inside, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
            assert not torch.equal(one, before)
            torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-4)
        if data.labels is not None:
            assert list(found.config.id2label.values()) == data.labels
    root, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # The encoder is the same one everywhere, but for the poolers that tasks have of their own.
    for task, data in tasks.items():
        body = data.auto_class.from_pretrained(tmp_path / "out" / task).base_model
        shared = {key: value for key, value in weights(root).items() if not key.startswith("pooler.")}
        assert shared and not moved(shared, weights(body))
    before = weights(AutoModel.from_pretrained(encoder))
    changed = moved(before, weights(root))
    assert changed and not any(key.startswith("pooler.") for key in changed)


def test_a_checkpoint_opens_as_the_whole(tmp_path, tasks):
    encoder = write_encoder(tmp_path / "encoder")
    run = trainer(
        tmp_path / "out",
        encoder,
        tasks,
        save_strategy="steps",
        save_steps=4,
        max_steps=4,
        loss_weighting="uncertainty",
    )
    run.train()
    found = MultiTaskModel.from_pretrained(tmp_path / "out" / "checkpoint-4")
    assert found.tasks == list(tasks) and not moved(weights(run.model), weights(found))
    for task, data in tasks.items():
        batch = {**batch_of(data), "task": task}
        for one, two in zip(outputs(found, batch), outputs(run.model, batch), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(InputError, match="checkpoint of a run"):
        from_pretrained(AutoModel, str(tmp_path / "out" / "checkpoint-4"))


def test_the_encoder_is_held_once(tmp_path, tasks):
    encoder = write_encoder(tmp_path / "encoder")
    model = MultiTaskModel.from_tasks(str(encoder), tasks)
    body = sum(p.numel() for p in model.encoder.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    assert sum(p.numel() for p in model.parameters()) == body + heads < 2 * body
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    # A weight that one task's model changes is changed for all.
    with torch.no_grad():
        model.task_model("tags").base_model.embeddings.word_embeddings.weight[0, 0] = 9.0
    assert all(model.task_model(name).base_model.embeddings.word_embeddings.weight[0, 0] == 9.0 for name in tasks)
    model.train()
    assert all(module.training for name in tasks for module in model.task_model(name).modules())
    model.eval()
    assert not any(module.training for name in tasks for module in model.task_model(name).modules())


def test_a_head_depends_on_its_name_and_the_seed_alone(tmp_path, tasks):
    encoder = str(write_encoder(tmp_path / "encoder"))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = MultiTaskModel.from_tasks(encoder, tasks)
    assert torch.equal(state, torch.get_rng_state())
    part = MultiTaskModel.from_tasks(encoder, {name: tasks[name] for name in ("span", "pair")})
    other = MultiTaskModel.from_tasks(encoder, {"pair": tasks["pair"]}, seed=1)
    assert not moved(weights(part.head("pair")), weights(whole.head("pair")))
    assert "classifier.weight" in moved(weights(other.head("pair")), weights(whole.head("pair")))
    # The poolers that came with the encoder are kept.
    assert torch.equal(whole.head("pair")["encoder_pooler"].dense.weight, whole.encoder.pooler.dense.weight)
    assert whole.head("pair")["encoder_pooler"] is not whole.head("topic")["encoder_pooler"]


@pytest.mark.parametrize("name", ["a.b", "../up", "checkpoint-3", "forward", ""])
def test_a_task_whose_name_cannot_be_a_folder_is_refused(tmp_path, tasks, name):
    encoder = write_encoder(tmp_path / "encoder")
    with pytest.raises(InputError, match="task '"):
        MultiTaskModel.from_tasks(str(encoder), {name: tasks["topic"]})


def test_no_such_task(tmp_path, tasks):
    model = MultiTaskModel.from_tasks(str(write_encoder(tmp_path / "encoder")), {"topic": tasks["topic"]})
    with pytest.raises(InputError, match="task='pair' must be one of topic"):
        model.task_model("pair")
    with pytest.raises(InputError, match="tasks is empty"):
        MultiTaskModel.from_tasks(str(tmp_path / "encoder"), {})


def test_a_task_whose_stock_model_has_another_encoder_is_refused(tmp_path, tasks):
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    encoder = write_encoder(tmp_path / "encoder", config)
    with pytest.raises(InputError, match="T5EncoderModel inside, and the shared encoder is a T5Model"):
        MultiTaskModel.from_tasks(str(encoder), {"tags": tasks["tags"]})
    # An architecture without a head of a type is refused by the opening.
    gpt = write_encoder(tmp_path / "gpt", GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    with pytest.raises(InputError):
        MultiTaskModel.from_tasks(str(gpt), {"choice": tasks["choice"]})
