"""Students: with all layers a cut student is its teacher; what stock transformers opens is what was cut."""

import copy

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.distillation.student import (
    StudentArguments,
    build_student,
    choose_layers,
    cut_student,
    fresh_student,
)

V, D, N, L = 50, 24, 6, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": N,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
KINDS = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "electra": {"embedding_size": 12},
    "modernbert": {"local_attention": 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "conv_kernel_size": 3,
    },
}
HEADS = [AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel]


def teacher_of(kind, auto_class=AutoModelForMaskedLM, **changes):
    """A teacher all of whose weights are drawn: biases and norms too, that none can be lost unseen."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | KINDS.get(kind, {}) | {"num_labels": 3} | changes))
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch(**more):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, L, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": torch.randint(4, V, (3, L), generator=generator), "attention_mask": mask, **more}


def outputs(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or batch()))[0]


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", [*KINDS, "albert"])
def test_with_all_layers_the_student_is_the_teacher(kind, auto_class):
    teacher = teacher_of(kind, auto_class)
    student = cut_student(teacher, range(N))
    assert type(student) is type(teacher)
    torch.testing.assert_close(outputs(student), outputs(teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert"])
def test_the_encoder_below_a_masked_language_model_has_no_pooler_and_nor_has_its_student(kind):
    teacher = teacher_of(kind).base_model
    assert teacher.pooler is None
    layers = range(N) if kind == "albert" else (1, 3, 5)
    student = cut_student(teacher, layers)
    assert student.pooler is None
    if kind == "albert":
        torch.testing.assert_close(outputs(student), outputs(teacher), rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(outputs(student), outputs(spliced(teacher, layers)), rtol=0, atol=1e-6)


def spliced(teacher, layers):
    """The teacher itself with its other layers taken out: what a cut student has to compute."""
    model = copy.deepcopy(teacher)
    body = model.base_model
    holder = body if hasattr(body, "layers") else body.encoder
    name = "layers" if hasattr(body, "layers") else "layer"
    setattr(holder, name, torch.nn.ModuleList(getattr(holder, name)[n] for n in layers))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_layers_go_with_all_that_belongs_to_them(kind):
    teacher, layers = teacher_of(kind), [0, 2, 3, 5]
    student = cut_student(teacher, layers)
    torch.testing.assert_close(outputs(student), outputs(spliced(teacher, layers)), rtol=0, atol=1e-6)
    assert (outputs(student) - outputs(teacher)).abs().max() > 0.1


def test_modernbert_keeps_which_layers_are_global():
    teacher = teacher_of("modernbert")
    assert teacher.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"] * 2
    student = cut_student(teacher, [0, 2, 3, 5])
    assert student.config.layer_types == ["full_attention", "sliding_attention"] * 2
    with pytest.raises(InputError, match="let student_layers begin with 0"):
        cut_student(teacher, [1, 3, 5])


def test_albert_runs_its_one_layer_as_often_as_it_has_layers():
    teacher = teacher_of("albert")
    student = cut_student(teacher, [0, 3])
    teacher.config.num_hidden_layers = teacher.base_model.encoder.config.num_hidden_layers = 2
    torch.testing.assert_close(outputs(student), outputs(teacher), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="AlbertForMaskedLM shares its 6 layers in 2 groups"):
        cut_student(teacher_of("albert", num_hidden_groups=2), [0, 3])


@pytest.mark.parametrize(
    ("kind", "model_type", "auto_class"),
    [
        *((kind, None, AutoModelForMaskedLM) for kind in (*KINDS, "albert")),
        *(("modernbert", None, auto_class) for auto_class in HEADS[1:]),
        *(("bert", "distilbert", auto_class) for auto_class in HEADS),
    ],
)
def test_stock_transformers_opens_what_was_cut(kind, model_type, auto_class, tmp_path):
    student = cut_student(teacher_of(kind, auto_class), [0, 3, 4], model_type=model_type)
    student.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(student)
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(outputs(loaded), outputs(student), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", [None, "distilbert"])
def test_a_student_is_its_own_model(model_type):
    teacher = teacher_of("bert").to(torch.bfloat16).requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = cut_student(teacher, [0, 3], model_type=model_type)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert student.config.dtype == torch.float32
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == N


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModel])
def test_a_distilbert_with_all_layers_is_its_bert(auto_class):
    teacher = teacher_of("bert", auto_class)
    student = cut_student(teacher, range(N), model_type="distilbert")
    assert type(student).__name__ == type(teacher).__name__.replace("Bert", "DistilBert")
    torch.testing.assert_close(outputs(student), outputs(teacher), rtol=1e-5, atol=1e-5)
    types = teacher.base_model.embeddings.token_type_embeddings.weight
    positions = [m.base_model.embeddings.position_embeddings.weight for m in (student, teacher)]
    torch.testing.assert_close(positions[0] - positions[1], types[:1].expand(32, -1))


def test_a_distilbert_classifier_starts_from_the_pooler():
    teacher = teacher_of("bert", AutoModelForSequenceClassification)
    student = cut_student(teacher, [0, 2, 5], model_type="distilbert")
    states = [m.base_model(**batch()).last_hidden_state for m in (student, cut_student(teacher, [0, 2, 5]))]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    assert torch.equal(student.pre_classifier.weight, teacher.bert.pooler.dense.weight)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert student.config.num_labels == 3


def test_a_distilbert_takes_over_the_dropouts():
    teacher = teacher_of("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, hidden_act="relu")
    config = cut_student(teacher, [0], model_type="distilbert").config
    assert (config.attention_dropout, config.dropout, config.activation) == (0.3, 0.2, "relu")
    config = cut_student(teacher, [0], model_type="distilbert", overrides={"dropout": 0.0}).config
    assert (config.attention_dropout, config.dropout) == (0.3, 0.0)


def test_what_cannot_be_cut_is_refused_by_name():
    teacher = teacher_of("roberta")
    with pytest.raises(InputError, match="only a bert can become a distilbert, and RobertaForMaskedLM is a roberta"):
        cut_student(teacher, [0], model_type="distilbert")
    for layers in ([], [3, 1], [1, 1], [0, 6], [-1, 2]):
        with pytest.raises(InputError, match="must ascend within 0 to 5: the teacher has 6 layers"):
            cut_student(teacher, layers)
    with pytest.raises(InputError, match="leave them out of config_overrides"):
        cut_student(teacher, [0], overrides={"intermediate_size": 41})
    with pytest.raises(InputError, match="no_such=1: roberta has no such option"):
        cut_student(teacher, [0], overrides={"no_such": 1})
    pretraining = transformers.BertForPreTraining(teacher_of("bert").config)
    with pytest.raises(InputError, match="BertForPreTraining has no counterpart DistilBertForPreTraining"):
        cut_student(pretraining, [0], model_type="distilbert")
    assert type(cut_student(pretraining, [0])) is transformers.BertForPreTraining


@pytest.mark.parametrize(
    ("spec", "teacher_layers", "student_layers", "layers"),
    [
        ("every_other", 12, None, (0, 2, 4, 7, 9, 11)),
        ("every_other", 12, 4, (0, 4, 7, 11)),
        ("every_other", 1, None, (0,)),
        ("every_other", 12, 12, tuple(range(12))),
        ("uniform", 12, None, (1, 3, 5, 7, 9, 11)),
        ("uniform", 12, 4, (2, 5, 8, 11)),
        ("first", 12, None, (0, 1, 2, 3, 4, 5)),
        ("last", 12, 3, (9, 10, 11)),
        ("0,2,4,7,9,11", 12, 6, (0, 2, 4, 7, 9, 11)),
        ("5", 6, None, (5,)),
    ],
)
def test_choices_of_layers(spec, teacher_layers, student_layers, layers):
    assert choose_layers(spec, teacher_layers=teacher_layers, student_layers=student_layers) == layers


@pytest.mark.parametrize(
    ("spec", "student_layers", "message"),
    [
        ("every_second", None, "student_layers='every_second' is none of every_other, uniform, first, last"),
        ("0,2", 3, "num_hidden_layers=3, but student_layers='0,2' names 2"),
        ("first", 7, "num_hidden_layers=7 must be 1 to 6: the teacher"),
        ("first", 0, "num_hidden_layers=0"),
        ("uniform", 4, "4"),
        ("0,6", None, "must ascend within 0 to 5"),
    ],
)
def test_layers_that_are_not_there(spec, student_layers, message):
    with pytest.raises(InputError, match=message):
        choose_layers(spec, teacher_layers=N, student_layers=student_layers)


def built(teacher, tokenizer, auto_class=AutoModelForMaskedLM, **options):
    return build_student(StudentArguments(**options), teacher=teacher, tokenizer=tokenizer, auto_class=auto_class)


@pytest.mark.parametrize("kind", [*KINDS, "albert"])
def test_a_new_student_has_the_teachers_configuration_but_for_its_sizes(kind, tokenizer):
    teacher = teacher_of(kind, hidden_size=32)
    student = built(
        teacher, tokenizer, num_hidden_layers=4, hidden_size=16, num_attention_heads=4, intermediate_size=20
    )
    changed = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 20}
    changed |= {"layer_types": teacher.config.layer_types[:4]} if kind == "modernbert" else {}
    expected, values = teacher.config.to_dict() | changed, student.config.to_dict()
    assert {name for name in expected if values.get(name) != expected[name]} <= {"dtype", "architectures"}
    assert outputs(student).shape == (3, L, V)


def test_a_new_student_of_another_architecture(tokenizer):
    teacher = teacher_of("roberta", AutoModelForSequenceClassification, problem_type="regression")
    student = built(
        teacher, tokenizer, AutoModelForSequenceClassification, model_type="modernbert", num_hidden_layers=2
    )
    assert type(student) is transformers.ModernBertForSequenceClassification
    sizes = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "num_labels", "problem_type")
    assert all(getattr(student.config, name) == getattr(teacher.config, name) for name in sizes)
    # A RoBERTa's table of 32 has 30 positions.
    assert (student.config.num_hidden_layers, student.config.max_position_embeddings) == (2, 30)
    assert (
        built(teacher, tokenizer, num_hidden_layers=2, max_position_embeddings=10).config.max_position_embeddings == 12
    )


def test_a_student_that_was_trained_before(tokenizer, tmp_path):
    cut_student(teacher_of("bert"), [0, 3]).to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = teacher_of("bert", AutoModelForSequenceClassification, problem_type="multi_label_classification")
    student = built(teacher, tokenizer, AutoModelForSequenceClassification, model_name_or_path=str(tmp_path))
    assert (student.config.num_hidden_layers, student.config.num_labels, student.dtype) == (2, 3, torch.float32)
    assert student.config.problem_type == "multi_label_classification"
    cut_student(teacher, [1]).save_pretrained(tmp_path / "two")
    other = teacher_of("bert", AutoModelForSequenceClassification, num_labels=4)
    with pytest.raises(InputError, match="has other labels than the teacher.s 4"):
        built(other, tokenizer, AutoModelForSequenceClassification, model_name_or_path=str(tmp_path / "two"))


def test_arguments_that_name_a_cut(tokenizer):
    teacher = teacher_of("bert")
    options = {"student_layers": "every_other", "config_overrides": '{"hidden_dropout_prob": 0.0}'}
    student = built(teacher, tokenizer, **options, attn_implementation="eager", freeze_position_embeddings=True)
    torch.testing.assert_close(outputs(student), outputs(cut_student(teacher, [0, 2, 5])), rtol=0, atol=1e-5)
    assert (student.config.hidden_dropout_prob, student.config._attn_implementation) == (0.0, "eager")
    constant = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert constant == ["bert.embeddings.position_embeddings.weight"]
    with pytest.raises(InputError, match="ModernBertForMaskedLM has no table of positions"):
        built(teacher_of("modernbert"), tokenizer, student_layers="first", freeze_position_embeddings=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no student is named"),
        ({"student_layers": "first", "hidden_size": 8}, "hidden_size=8 is for another student than student_layers"),
        ({"student_layers": "first", "model_name_or_path": "x"}, "student_layers='first' is for another student"),
        ({"num_hidden_layers": 2, "model_name_or_path": "x"}, "num_hidden_layers=2 is for another student"),
        ({"student_type": "distilbert"}, "give student_layers too"),
        ({"hidden_size": 25}, "hidden_size=25 does not divide into num_attention_heads=2"),
        ({"embedding_size": 8}, "embedding_size=8: bert has no such option"),
        ({"config_overrides": '{"hidden_dropout_prob": "much"}'}, "bert cannot have {'hidden_dropout_prob': 'much'}"),
        ({"model_name_or_path": "/nowhere/at/all"}, "cannot be loaded"),
    ],
)
def test_arguments_that_name_no_student(options, message, tokenizer):
    with pytest.raises(InputError, match=message) as caught:
        built(teacher_of("bert"), tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_a_new_student_draws_its_weights(tokenizer):
    teacher = teacher_of("bert")
    student = fresh_student(
        teacher, args=StudentArguments(num_hidden_layers=N), tokenizer=tokenizer, auto_class=AutoModelForMaskedLM
    )
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(student.get_parameter(name), teacher.get_parameter(name))
