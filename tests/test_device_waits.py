"""No training step may wait for the device: model and batch stand on `meta`, where whatever asks for a value raises."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import build, isolated, programs, tiny_data
from hf_pretrain.modeling.visibility.rules import isolated_inputs

PROGRAMS = programs()
RAGGED, EQUAL = [0, 1, 2, 3], [0, 0, 0, 0]
ISOLATING = ["clm", "distil", "electric", "mlm", "rtd"]
OPTIONS = [
    ("distil", {"prediction_positions": "all"}),
    ("distil", {"distillation_method": "minilm"}),
    ("distil", {"distillation_method": "tinybert"}),
    ("encoder", {"objectives": ["mlm", "span_boundary"], "masking_unit": "span"}),
    ("encoder", {"objectives": ["mlm", "word_order"], "word_order_probability": 0.3}),
    ("encoder", {"objectives": ["mlm", "clm"]}),
    ("encoder", {"objectives": ["mlm", "clm"], "prediction": "same"}),
    ("encoder", {"objectives": ["clm"]}),
    ("rtd", {"training_mode": "decoupled"}),
]


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(part) for part in value]
    return value


def step_on_meta(trainer, rows):
    """Two steps as the Trainer makes them: counts, losses, their weighted total and the sums for the log; then backward."""
    trainer.model.to("meta").train()
    loader = trainer.get_train_dataloader()
    trainer.begin_training()
    for _ in range(2):
        batch = on_meta_batch(loader.collate_fn([trainer.train_dataset[i] for i in rows]))
        counts = trainer._get_num_items_in_batch([batch], torch.device("meta"))
        total = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
        assert total.is_meta
        total.backward()


def on_meta_batch(batch):
    return {name: on_meta(value) for name, value in batch.items()}


@pytest.mark.parametrize("rows", [RAGGED, EQUAL], ids=["padded", "plain"])
@pytest.mark.parametrize("method", sorted(PROGRAMS))
def test_a_step_waits_for_nothing(method, rows, tmp_path):
    step_on_meta(build(PROGRAMS[method], tmp_path), rows)


@pytest.mark.parametrize("method", ISOLATING)
def test_nor_does_a_step_on_isolated_documents(method, tmp_path):
    step_on_meta(build(PROGRAMS[method], tmp_path, isolated(tiny_data())), RAGGED)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_nor_does_a_step_with_options(method, options, tmp_path):
    step_on_meta(build(PROGRAMS[method], tmp_path, **options), RAGGED)


@pytest.mark.parametrize(
    ("method", "model_options", "options"),
    [
        ("clm", {"model_type": "llama", "config_overrides": "{}"}, {}),
        ("clm", {"model_type": "gemma2", "config_overrides": "{}"}, {}),
        ("recurrent-lm", {"cutoffs": [20, 40]}, {}),
        ("rtd", {"embedding_sharing": "gdes"}, {}),
        ("rtd", {"embedding_sharing": "none", "generator_size": 1.0}, {"training_mode": "two_stage"}),
        ("mlm", {"model_type": "modernbert", "config_overrides": "{}"}, {}),
        ("plm", {"model_type": "bert", "config_overrides": "{}"}, {"mem_len": 0}),
    ],
)
def test_nor_does_a_step_of_another_model(method, model_options, options, tmp_path):
    trainer = build(PROGRAMS[method], tmp_path, model_options=model_options, **options)
    step_on_meta(trainer, RAGGED)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "modernbert", "albert"])
def test_what_the_host_knows_changes_no_bit(model_type, backend):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(model_type, **sizes, vocab_size=60, pad_token_id=0, attn_implementation=backend)
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids = torch.arange(5, 53).view(2, 24)
    for num_padding in (0, 7):
        mask = torch.ones_like(ids)
        mask[1, 24 - num_padding :] = 0
        inputs = {"input_ids": ids.where(mask != 0, 0), "attention_mask": mask}
        expected = model(**isolated_inputs(model, **inputs)).logits
        known = isolated_inputs(model, **inputs, is_padded=num_padding > 0)
        # The stock model does not get the mask that it would have to look into.
        assert known["attention_mask"] is not mask
        assert torch.equal(model(**known).logits[mask != 0], expected[mask != 0])
