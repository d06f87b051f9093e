"""`fine_tune`: a model, a task and a strategy joined."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
)

from helpers.method_matrix import VOCAB_SIZE, tiny_tokenizer
from helpers.task_runs import QUICK, TYPES, write_encoder, write_tasks
from hf_pretrain.errors import InputError
from hf_pretrain.files import is_whole
from hf_pretrain.tasks.spec import TaskSpec, load_task, read_tasks
from hf_pretrain.transfer.fine_tuning import FineTuningArguments
from hf_pretrain.transfer.tuning.fine_tune import fine_tune, task_trainer
from hf_pretrain.transfer.tuning.heads import open_for_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    write_encoder(place / "encoder")
    return place


def arguments(folder, **options):
    return FineTuningArguments(**QUICK | {"output_dir": str(folder)} | options)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_learned_and_scored_above_the_constant(place, tmp_path, kind):
    task = read_tasks(place / "tasks.yaml")[kind]
    found = fine_tune(str(place / "encoder"), task, arguments(tmp_path))
    name = found.data.main_metric
    assert found.score > max(found.baseline[name] + 0.2, 0.7), (found.scores, found.baseline)
    # The numbers are those of the predictions, in the rows' order.
    again = found.data.score("validation", found.predictions, tokenizer=found.tokenizer)
    assert again == found.scores and found.step == 60
    assert "fresh head" in found.head and found.fresh


def test_the_head_is_kept_for_the_same_labels_and_fresh_for_others(place, tmp_path):
    """Two stages: the output of one task is the beginning of the next."""
    tasks = read_tasks(place / "tasks.yaml")
    first = fine_tune(str(place / "encoder"), tasks["classification"], arguments(tmp_path / "run"))
    first.trainer.save_model(str(tmp_path / "first"))
    trained = {name: tensor.clone() for name, tensor in first.trainer.model.state_dict().items()}

    same = open_for_task(str(tmp_path / "first"), load_task(tasks["pair"]))
    assert "head that the checkpoint has" in same.note and not same.fresh
    assert all(torch.equal(tensor, trained[name]) for name, tensor in same.model.state_dict().items())

    # As many classes of other names: their rows of the old head mean something else.
    lines = (place / "classification_train.jsonl").read_text().replace('"bad"', '"no"').replace('"good"', '"yes"')
    (tmp_path / "renamed.jsonl").write_text(lines)
    renamed = dataclasses.replace(
        tasks["classification"], train_file=(str(tmp_path / "renamed.jsonl"),), validation_file=()
    )
    swapped = dataclasses.replace(tasks["classification"], labels=("good", "bad"))
    for other in (renamed, swapped, tasks["regression"], tasks["tokens"], tasks["span"], tasks["choice"]):
        data = load_task(other)
        opened, again = (open_for_task(str(tmp_path / "first"), data, seed=seed) for seed in (3, 3))
        assert "fresh head" in opened.note, other
        state = opened.model.state_dict()
        assert set(opened.fresh) <= state.keys() and opened.fresh
        for name, tensor in state.items():
            if name not in opened.fresh:
                assert torch.equal(tensor, trained[name]), name
            elif name in trained and tensor.ndim > 1 and tensor.shape == trained[name].shape:
                assert not torch.equal(tensor, trained[name]), name
            assert torch.equal(tensor, again.model.state_dict()[name])
        assert all(name.startswith(("classifier", "qa_outputs", "bert.pooler")) for name in opened.fresh)
        # A pooler that was trained goes on; a head for tokens has none.
        assert not any(name.startswith("bert.pooler") for name in opened.fresh)
        assert opened.model.config.num_labels == data.head_options().get("num_labels", 2)
    assert "bad, good, not for no, yes" in open_for_task(str(tmp_path / "first"), load_task(renamed)).note


def test_best_weights_are_those_of_the_main_metric(place, tmp_path):
    task = read_tasks(place / "tasks.yaml")["classification"]
    options = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10, "max_steps": 40}
    options |= {"load_best_model_at_end": True, "save_total_limit": 1}
    found = fine_tune(str(place / "encoder"), task, arguments(tmp_path, **options))
    log = [(row["eval_accuracy"], row["step"]) for row in found.trainer.state.log_history if "eval_accuracy" in row]
    best = max(score for score, _ in log)
    assert found.trainer.args.metric_for_best_model == "accuracy" and found.trainer.args.greater_is_better
    assert found.score == best and (best, found.step) == next(row for row in log if row[0] == best)
    assert all(is_whole(folder) for folder in tmp_path.glob("checkpoint-*"))
    by_loss = arguments(tmp_path / "loss", **options | {"metric_for_best_model": "loss"})
    trainer, _, _ = task_trainer(str(place / "encoder"), task, by_loss)
    assert trainer.args.metric_for_best_model == "loss" and not trainer.args.greater_is_better


@pytest.mark.parametrize("strategy", ["layerwise_decay", "lora", "gradual"])
def test_a_resumed_run_ends_where_the_whole_one_does(place, tmp_path, strategy):
    task = read_tasks(place / "tasks.yaml")["entities"]
    options = {
        "strategy": strategy,
        "save_strategy": "steps",
        "save_steps": 10,
        "max_steps": 20,
        "num_train_epochs": 1,
    }
    whole = fine_tune(str(place / "encoder"), task, arguments(tmp_path, **options))
    assert is_whole(tmp_path / "checkpoint-10")
    checkpoint = str(tmp_path / "checkpoint-10")
    resumed = fine_tune(
        str(place / "encoder"), task, arguments(tmp_path, **options, resume_from_checkpoint=checkpoint)
    )
    assert resumed.trainer.state.global_step == 20
    np.testing.assert_array_equal(resumed.predictions, whole.predictions)
    for name, tensor in whole.trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.trainer.model.state_dict()[name]), name


def test_a_live_model_is_used_as_it_is(place, tmp_path):
    task = read_tasks(place / "tasks.yaml")["classification"]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(place / "encoder")
    model = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2)
    found = fine_tune(model, task, arguments(tmp_path, max_steps=1), tokenizer=tokenizer)
    assert found.trainer.model is model and found.head == "" and model.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(InputError, match="tokenizer is missing"):
        fine_tune(model, task, arguments(tmp_path, max_steps=1))
    model = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=3)
    with pytest.raises(InputError, match="num_labels=3.*num_labels=2"):
        fine_tune(model, task, arguments(tmp_path, max_steps=1), tokenizer=tokenizer)


def test_what_cannot_work_is_refused_before_a_step(place, tmp_path):
    task = read_tasks(place / "tasks.yaml")["classification"]
    with pytest.raises(InputError, match="max_length=41: .*at most 40"):
        fine_tune(str(place / "encoder"), task, arguments(tmp_path), max_length=41)
    without = dataclasses.replace(task, train_file=(), labels=("bad", "good"))
    with pytest.raises(InputError, match="no rows to train on"):
        fine_tune(str(place / "encoder"), without, arguments(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(place / "encoder")
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        fine_tune(str(place / "encoder"), task, arguments(tmp_path), tokenizer=tokenizer)
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"text": "w0"}\n')
    with pytest.raises(InputError, match="no labels"):
        fine_tune(
            str(place / "encoder"), dataclasses.replace(task, validation_file=(str(unlabelled),)), arguments(tmp_path)
        )


ARCHITECTURES = {
    "bart": BartConfig(
        vocab_size=VOCAB_SIZE, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40, pad_token_id=0,
        eos_token_id=3, bos_token_id=2, decoder_start_token_id=3,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=40),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=16, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=40
    ),
    "deberta": DebertaV2Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, relative_attention=True, pos_att_type=["p2c", "c2p"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_with_its_own_outputs_and_padding(place, tmp_path, name):
    """Encoder-decoders and decoders return states beside the logits; a decoder must know the padding token."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(ARCHITECTURES[name])
    encoder.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    task = read_tasks(place / "tasks.yaml")["classification"]
    data = load_task(task)
    opened = open_for_task(str(tmp_path / "model"), data, seed=1)
    body = opened.model.base_model.state_dict()
    assert all(torch.equal(tensor, body[key]) for key, tensor in encoder.state_dict().items())
    found = fine_tune(str(tmp_path / "model"), data, arguments(tmp_path, max_steps=2))
    assert found.predictions.shape == (40, 2) and found.trainer.model.config.pad_token_id == 0
    # A row alone, without padding, has the same logits.
    rows = data.encoded("validation", found.tokenizer, max_length=40).select_columns("input_ids")
    with torch.no_grad():
        alone = [
            found.trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows.select(range(5))
        ]
    np.testing.assert_allclose(found.predictions[:5], torch.stack(alone), atol=1e-4)


def test_answers_are_decoded_with_no_answer_where_it_scores_higher(tmp_path):
    lines = [
        {"question": "w4", "context": "w5 w2 w6", "answers": {"text": ["w2"], "answer_start": [3]}},
        {"question": "w4", "context": "w5 w7 w6", "answers": {"text": [], "answer_start": []}},
    ]
    file = tmp_path / "squad.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both, first = tmp_path / "both.jsonl", tmp_path / "first.jsonl"
    both.write_text(file.read_text())
    first.write_text(json.dumps(lines[0]) + "\n")
    tokenizer = tiny_tokenizer()
    for path, said in ((both, ["w2", ""]), (first, ["w2"])):
        options = {"type": "span", "text": ("question", "context"), "validation_file": (str(path),)}
        data = load_task(TaskSpec(name="squad", train_file=(str(file),), **options))
        rows = data.encoded("validation", tokenizer, max_length=20, doc_stride=4)
        starts = np.zeros((len(rows), len(rows[0]["input_ids"])))
        # [CLS] w4 [SEP] w5 w2 w6 [SEP]: the first question's best token is w2, the second's is none of its text.
        starts[0, 4], starts[1:, 0] = 5.0, 9.0
        assert data.decode("validation", (starts, starts.copy()), tokenizer=tokenizer) == said
        scores = data.score("validation", (starts, starts), tokenizer=tokenizer)
        assert scores["exact_match"] == 1.0
        # Where every question has an answer, none stays without one.
        if len(said) == 1:
            starts[0, 0] = 99.0
            assert data.decode("validation", (starts, starts), tokenizer=tokenizer) == said


@pytest.mark.parametrize("kind", ["pair", "regression", "tokens"])
def test_scalar_mix_opens_a_checkpoint_and_its_head_is_kept(place, tmp_path, kind):
    task = read_tasks(place / "tasks.yaml")[kind]
    found = fine_tune(str(place / "encoder"), task, arguments(tmp_path, strategy="scalar_mix", learning_rate=0.05))
    assert found.score > found.baseline[found.data.main_metric] + 0.1, (found.scores, found.baseline)
    assert {name.split(".")[0] for name in found.fresh} == {"scalar_mix", "architecture"}
    stock, trained = (
        AutoModel.from_pretrained(place / "encoder").state_dict(),
        found.trainer.model.encoder.state_dict(),
    )
    # A pooler that nothing reads is left out.
    assert {name for name in stock if not name.startswith("pooler.")} == set(trained)
    assert all(torch.equal(stock[name], trained[name]) for name in trained)
    found.trainer.save_model()
    data = load_task(task)
    again = open_for_task(str(tmp_path), data, architecture="scalar_mix")
    assert not again.fresh and torch.equal(again.model.scalar_mix.weights, found.trainer.model.scalar_mix.weights)
    # The seed draws the head, and nothing else does.
    heads = [
        open_for_task(str(place / "encoder"), data, seed=seed, architecture="scalar_mix").model for seed in (1, 1, 2)
    ]
    drawn = [next(p for n, p in model.architecture.named_parameters() if p.ndim == 2) for model in heads]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_scalar_mix_of_spans_is_refused(place, tmp_path):
    task = read_tasks(place / "tasks.yaml")["span"]
    with pytest.raises(InputError, match="strategy='scalar_mix' does not go with type='span'"):
        fine_tune(str(place / "encoder"), task, arguments(tmp_path, strategy="scalar_mix"))
