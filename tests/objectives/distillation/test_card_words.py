"""What a card tells of a distillation: who is cited for which losses, and where the student began."""

import pytest

from hf_pretrain.objectives.distillation import (
    DistillationTrainer,
    DistillationTrainingArguments,
    StudentArguments,
    TaskDistillationTrainer,
)
from hf_pretrain.objectives.distillation.trainer import describe, describe_origin


def cited(weights, trainer=DistillationTrainer):
    entries = describe(trainer.objective, weights, head="masked_lm").citations
    return [entry[entry.index("{") + 1 : entry.index(",")] for entry in entries]


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("distilbert", ["sanh2019distilbert"]),
        ("tinybert", ["jiao2020tinybert"]),
        ("minilm", ["wang2020minilm"]),
        ("minilmv2", ["wang2021minilmv2"]),
    ],
)
def test_each_method_is_cited(method, keys):
    args = DistillationTrainingArguments(output_dir="unused", bf16=False, distillation_method=method)
    assert cited(args.weights()) == keys


def test_a_mixture_cites_all_that_it_is_made_of():
    assert cited({"prediction": 1.0, "hidden": 1.0, "relation_qq": 1.0}) == [
        "sanh2019distilbert",
        "jiao2020tinybert",
        "wang2021minilmv2",
    ]
    assert cited({"prediction": 1.0, "labels": 1.0}, TaskDistillationTrainer) == ["jiao2020tinybert"]


@pytest.mark.parametrize(
    ("options", "layers", "expected"),
    [
        ({"hidden_size": 32}, (), "Distilled from [a/bert](https://huggingface.co/a/bert) into a new model"),
        (
            {"student_layers": "first"},
            (0, 1, 2),
            "Cut from [a/bert](https://huggingface.co/a/bert), layers 0, 1 and 2 of 0 to 5, and distilled from it",
        ),
        (
            {"student_layers": "5"},
            (5,),
            "Cut from [a/bert](https://huggingface.co/a/bert), layer 5 of 0 to 5, and dis",
        ),
        (
            {"model_name_or_path": "b/tiny"},
            (),
            "Continued from [b/tiny](https://huggingface.co/b/tiny) and distilled from [a/bert](https",
        ),
    ],
)
def test_origins(options, layers, expected):
    found = describe_origin(StudentArguments(**options), teacher="a/bert", layers=layers, last_layer=5)
    assert found.startswith(expected)


def test_local_checkpoints_have_no_names(tmp_path):
    found = describe_origin(StudentArguments(model_name_or_path=str(tmp_path)), teacher=str(tmp_path))
    assert found == "Continued from a local checkpoint and distilled from a local teacher"
