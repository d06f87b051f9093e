"""The composite of vectors: its losses on packed and padded rows, what it exports, and the cache of a step's gradients."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraForPreTraining,
)

from helpers import contrastive_ranks_worker
from helpers.method_matrix import TINY, VOCAB_SIZE, build, programs, relative_difference, tiny_data, tiny_tokenizer
from helpers.two_ranks import run_on_two_ranks
from hf_pretrain.data.examples.views import TextViewDataset
from hf_pretrain.errors import InputError
from hf_pretrain.objectives.contrastive import (
    ContrastiveForPreTraining,
    ContrastiveModelArguments,
    ContrastiveTrainingArguments,
    DataCollatorForContrastive,
)
from hf_pretrain.objectives.contrastive.losses import VectorBatch
from hf_pretrain.objectives.contrastive.modeling import config_options

PROGRAM = programs()["contrastive"]
OPTIONS = {
    "simcse": {"pooling": "cls_mlp"},
    "mean": {},
    "ranking": {"contrastive_loss": "ranking", "ranking_margin": 2.0, "views": "neighbours"},
    "mlm": {"beside": "mlm", "views": "ict"},
    "infoword": {"objective": "infoword"},
    "retromae": {"objective": "retromae", "pooling": "cls"},
    "enhanced": {"objective": "retromae", "enhanced_decoding": True},
    "tsdae": {"objective": "tsdae", "beside": "mlm"},
}


def stock(cls=BertForMaskedLM, **changes):
    torch.manual_seed(0)
    sizes = TINY | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes
    return cls(BertConfig(**sizes, vocab_size=VOCAB_SIZE))


def model_and_batch(*, packed, rows=6, side="right", **options):
    """A tiny composite of some options, and a batch of tiny documents."""
    args = ContrastiveTrainingArguments(output_dir="unused", **options)
    data = tiny_data()
    dataset = TextViewDataset(
        data.train_documents,
        tokenizer=data.tokenizer,
        block_size=data.block_size,
        view=args.view,
        text_unit=args.text_unit,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    collator = DataCollatorForContrastive(
        tokenizer,
        objective=args.objective,
        beside=args.beside,
        masking=args.masking,
        enhanced_decoding=args.enhanced_decoding,
        decoder_mask_probability=args.decoder_mask_probability,
        packed=packed,
    )
    model = stock() if args.beside == "mlm" else stock(BertModel)
    composite = ContrastiveForPreTraining.from_model(model, max_length=data.block_size, **config_options(args))
    return composite, collator([dataset[row] for row in range(0, 5 * rows, 5)])


def losses_and_gradients(model, batch):
    output = model.train()(**batch)
    sum(loss.sum.sum() for loss in output.losses.values()).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return {name: float(loss.sum.detach().sum()) for name, loss in output.losses.items()}, gradients


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_and_padded_rows_have_the_same_losses_and_gradients(name):
    model, padded = model_and_batch(packed=False, **OPTIONS[name])
    _, left = model_and_batch(packed=False, side="left", **OPTIONS[name])
    _, packed = model_and_batch(packed=True, **OPTIONS[name])
    expected, gradients = losses_and_gradients(model, padded)
    assert all(value > 0 for value in expected.values())
    for batch in (packed, left):
        found, others = losses_and_gradients(model, batch)
        assert found == pytest.approx(expected, rel=1e-5)
        assert relative_difference(gradients, others) < 1e-4
    assert {key: int(value) for key, value in model.count_targets(padded).items()} == {
        key: int(loss.count.sum()) for key, loss in model(**padded).losses.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_by_example_are_those_of_their_own_targets(name):
    """Masked copies and n-grams of one example must not be counted for another: evaluation drops examples that come twice."""
    model, batch = model_and_batch(packed=True, **OPTIONS[name])
    output = model.eval()(**batch)
    assert all(len(part) == len(batch["documents"]) for sums in output.losses.values() for part in sums)
    if "labels" in batch:
        lone_model, lone = model_and_batch(packed=True, rows=1, **OPTIONS[name])
        assert int(output.losses["mlm"].count[0]) == int((lone["labels"] != -100).sum())
        first = lone_model.eval()(**lone).losses["mlm"].sum[0]
        torch.testing.assert_close(output.losses["mlm"].sum[0], first, rtol=1e-5, atol=1e-5)


def test_a_decoder_needs_the_vector_of_its_text():
    """With the vectors of the batch in another order, its loss is another."""
    model, batch = model_and_batch(packed=False, objective="tsdae", rows=8)
    torch.nn.init.normal_(model.decoder.layers[0].vector_out.weight)
    output = model.eval()(**batch)
    batch["first_positions"] = batch["first_positions"].roll(1)
    batch["text_ids"] = torch.where(batch["text_ids"] < 0, batch["text_ids"], (batch["text_ids"] + 1) % 8)
    other = model(**batch)
    # Some texts are equal.
    assert int(((output.losses["bottleneck"].sum - other.losses["bottleneck"].sum).abs() > 1e-2).sum()) > 4


def test_an_encoder_decoder_is_refused(tmp_path):
    bart = BartModel(BartConfig(vocab_size=VOCAB_SIZE, d_model=32, encoder_layers=1, decoder_layers=1))
    args = ContrastiveTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"choose a checkpoint or a model_type such as bert"):
        ContrastiveForPreTraining.from_arguments(
            ContrastiveModelArguments(), args, tiny_tokenizer(), max_length=24, stock=bart
        )


# Exports


@pytest.mark.parametrize("pooling", ["mean", "cls", "cls_mlp"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_export_gives_the_same_vectors_as_a_model_of_sentence_transformers(pooling, similarity, tmp_path):
    trainer = build(PROGRAM, tmp_path, pooling=pooling, similarity=similarity, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    listed = json.loads((tmp_path / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", *["Normalize"] * (similarity == "cosine")]
    assert [entry["type"] for entry in listed] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    texts = ["w1 w2 w3", "w7 w7", "w9"]
    found = torch.tensor(SentenceTransformer(str(tmp_path), device="cpu").encode(texts))
    inputs = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
    weights = inputs["attention_mask"][..., None].float()
    vectors = (states * weights).sum(1) / weights.sum(1) if pooling == "mean" else states[:, 0]
    expected = torch.nn.functional.normalize(vectors) if similarity == "cosine" else vectors
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-5)
    assert (tmp_path / "pretraining" / "text_pooler").exists() == (pooling == "cls_mlp")


def test_the_decoder_is_exported_and_found_again(tmp_path):
    options = {"objective": "retromae", "views": "same", "mlm_probability": 0.3}
    trainer = build(PROGRAM, tmp_path / "a", **options)
    trainer.train()
    trainer.save_model()
    AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    again = build(PROGRAM, tmp_path / "b", model_options={"model_name_or_path": str(tmp_path / "a")}, **options)
    expected = load_file(tmp_path / "a" / "pretraining" / "decoder" / "model.safetensors")
    for name, value in again.model.decoder.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_replaced_tokens_beside_it(tmp_path):
    """The discriminator is the encoder: both losses reach it, and the root is a stock one with its generator beside it."""
    model_options = {"model_type": "electra", "embedding_size": 32, "generator_size": 0.5}
    trainer = build(PROGRAM, tmp_path, model_options=model_options, beside="rtd")
    assert trainer.model.root is trainer.model.pair.discriminator
    trainer.train()
    row = trainer.state.log_history[0]
    assert all(row[f"{name}_loss"] > 0 for name in ("contrastive", "mlm", "rtd"))
    assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["mlm_loss"] + 50 * row["rtd_loss"], rel=1e-4)
    trainer.save_model()
    model, info = ElectraForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "pretraining" / "generator")
    assert SentenceTransformer(str(tmp_path), device="cpu").encode(["w1 w2"]).shape == (1, 32)


def test_a_cross_encoder_learns_which_context_a_sentence_is_from(tmp_path):
    options = {"views": "ict", "scorer": "cross", "max_steps": 250, "learning_rate": 3e-3, "warmup_steps": 10}
    trainer = build(PROGRAM, tmp_path, tiny_data(text="repeats"), **options)
    assert trainer.model.is_additive
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_contrastive_loss"] > 1 and after["eval_contrastive_loss"] < 0.5
    assert after["eval_contrastive_accuracy"] > 0.8
    trainer.save_model()
    assert not (tmp_path / "modules.json").exists()


# Cached gradients


def test_a_step_in_parts_under_dropout_is_that_of_one_graph(tmp_path):
    """All micro-batches read once, each under its own seed, with one graph: plain autograd, for comparison."""
    dropout = '{"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}'
    options = {"model_options": {"config_overrides": dropout}, "views": "neighbours", "beside": "mlm"}
    trainer = build(PROGRAM, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    trainer.train()
    plain = build(PROGRAM, tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
    plain.model.train()
    indices = list(plain._get_train_sampler(plain.train_dataset))[:16]
    batches = [plain.data_collator([plain.train_dataset[i] for i in indices[at : at + 4]]) for at in range(0, 16, 4)]
    plain._step = batches
    parts, masked, targets = [], 0.0, 0
    for number, batch in enumerate(batches):
        plain._seed_micro_batch(number)
        output = plain.model(**batch)
        parts.append(VectorBatch(output.vectors, batch["documents"], batch["text_keys"]))
        masked, targets = masked + output.losses["mlm"].sum.sum(), targets + output.losses["mlm"].count.sum()
    joined = VectorBatch.join(parts)
    (plain.model.compare(joined, joined).losses.mean() + masked / targets).backward()
    expected = {name: value.grad for name, value in plain.model.named_parameters() if value.grad is not None}
    assert relative_difference(expected, trainer.recorder.gradients[0]) < 1e-6


def test_a_step_in_parts_reaches_all_weights_in_bf16(tmp_path):
    """What autocast keeps of the reading without gradient must not be read again."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    exact = build(PROGRAM, tmp_path / "a", views="neighbours", **sizes)
    rough = build(PROGRAM, tmp_path / "b", views="neighbours", bf16=True, use_cpu=True, **sizes)
    exact.train()
    rough.train()
    expected, found = exact.recorder.gradients[0], rough.recorder.gradients[0]
    assert expected.keys() == found.keys()
    assert relative_difference(expected, found) < 0.1


def test_two_ranks_are_one_process(tmp_path):
    """Plain and in parts; of 13 examples an epoch ends with a rank that has one, and one that has none."""
    run_on_two_ranks("helpers.contrastive_ranks_worker", tmp_path)
    for name in contrastive_ranks_worker.SIZES:
        alone = contrastive_ranks_worker.train(tmp_path, name, ranks=1)
        ranks = torch.load(tmp_path / f"{name}-0.pt")
        assert len(alone) == len(ranks) > 2
        for expected, found in zip(alone, ranks, strict=True):
            assert relative_difference(expected, found) < 1e-5, name
