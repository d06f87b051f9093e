"""What an encoder with several heads is built from and leaves behind, and what else its batches say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from helpers.encoder_heads import ALL, batch_of, encoder_of, stirred, stock_model, takes_types
from helpers.method_matrix import TINY, tiny_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.embeddings import set_languages
from hf_pretrain.modeling.heads import PairHead, SpanBoundaryHead
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining, EncoderForPreTrainingConfig


@pytest.mark.parametrize(
    ("model_type", "pair_classes", "stock_name"),
    [
        ("bert", 2, "BertForPreTraining"),
        ("bert", 3, "BertForMaskedLM"),
        ("albert", 2, "AlbertForPreTraining"),
        ("albert", 3, "AlbertForMaskedLM"),
        ("roberta", 2, "RobertaForMaskedLM"),
        ("electra", 3, "ElectraForMaskedLM"),
        ("modernbert", 3, "ModernBertForMaskedLM"),
        ("deberta-v2", 3, "DebertaV2ForMaskedLM"),
    ],
)
def test_the_export_is_stock_and_is_gone_on_with(tmp_path, model_type, pair_classes, stock_name):
    model = encoder_of(model_type, pair_classes=pair_classes)
    model.export(tmp_path)
    stock_type = type(model.model)
    assert stock_type.__name__ == stock_name
    loaded, info = stock_type.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.architectures == [stock_name]
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    if model.pair_head is None:
        assert not info["missing_keys"], "the pooler is trained along"
    batch = batch_of(with_types=takes_types(model_type))
    with torch.no_grad():
        expected = model(**batch).losses
    folders = {"span_boundary_head": SpanBoundaryHead} | ({} if model.pair_head is None else {"pair_head": PairHead})
    assert {path.name for path in (tmp_path / "pretraining").iterdir()} == set(folders)
    for name, head_class in folders.items():
        head, info = head_class.from_pretrained(tmp_path / "pretraining" / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(v, head.state_dict()[k]) for k, v in getattr(model, name).state_dict().items())
    again = EncoderForPreTraining.from_arguments(
        ModelArguments(model_name_or_path=str(tmp_path)),
        tiny_tokenizer(),
        heads=ALL,
        pair_classes=pair_classes,
        span_positions=4,
    )
    with torch.no_grad():
        for name, loss in again.eval()(**batch).losses.items():
            torch.testing.assert_close(loss.sum, expected[name].sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair_classes", [2, 3])
def test_a_checkpoint_of_the_composite_is_whole(tmp_path, pair_classes):
    model = encoder_of("bert", pair_classes=pair_classes)
    model.save_pretrained(tmp_path)
    loaded, info = EncoderForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded.model) is type(model.model) and loaded.export_parts == model.export_parts
    assert (loaded.config.heads, loaded.config.pair_classes) == (ALL, pair_classes)
    batch = batch_of()
    with torch.no_grad():
        expected, found = model(**batch).losses, loaded.eval()(**batch).losses
    assert all(torch.equal(found[name].sum, loss.sum) for name, loss in expected.items())


def test_a_model_from_arguments_has_the_heads():
    sizes = ModelArguments(model_type="bert", **TINY)
    model = EncoderForPreTraining.from_arguments(
        sizes, tiny_tokenizer(), heads=("mlm", "pair"), pair_task="nsp", changes={"type_vocab_size": 6}
    )
    assert type(model.model).__name__ == "BertForPreTraining" and model.model.config.type_vocab_size == 6
    assert (model.config.heads, model.config.pair_task) == (["mlm", "pair"], "nsp")
    plain = EncoderForPreTraining.from_arguments(sizes, tiny_tokenizer())
    assert type(plain.model).__name__ == "BertForMaskedLM" and plain.export_parts == {"": "model"}


def test_translations_have_a_loss_of_their_own():
    stock = stirred(stock_model("bert"))
    together, apart = (EncoderForPreTraining.from_model(stock, has_bitext=flag).eval() for flag in (False, True))
    batch = {name: value for name, value in batch_of().items() if not name.startswith(("order", "span", "pair"))}
    whole, none = together(**batch), apart(**batch)
    is_bitext = torch.tensor([True, False, False, True, False, True])
    output = apart(**batch, is_bitext=is_bitext)
    assert set(output.losses) == {"mlm", "tlm"} and set(output.metrics) == {"mlm_accuracy", "tlm_accuracy"}
    for part in (0, 1):
        for wanted, found, name in ((whole.losses, output.losses, ""), (whole.metrics, output.metrics, "_accuracy")):
            assert torch.equal(found[f"tlm{name}"][part], wanted[f"mlm{name}"][part] * is_bitext)
            assert torch.equal(found[f"mlm{name}"][part], wanted[f"mlm{name}"][part] * ~is_bitext)
    assert torch.equal(none.losses["mlm"].sum, whole.losses["mlm"].sum) and not none.losses["tlm"].count.any()
    for entries, found in ((batch, none), (batch | {"is_bitext": is_bitext}, output)):
        counts = {name: int(count) for name, count in apart.count_targets(entries).items()}
        assert counts == {name: int(loss.count.sum()) for name, loss in found.losses.items()}


@pytest.mark.parametrize(("model_type", "name"), [("xlm", "langs"), ("bert", "token_type_ids")])
def test_languages_and_places_reach_the_stock_model(model_type, name):
    stock = stirred(stock_model(model_type, **({"n_langs": 2} if model_type == "xlm" else {})))
    set_languages(stock.config, {"en": 0, "de": 1})
    model = EncoderForPreTraining.from_model(stock).eval()
    names = ("input_ids", "attention_mask", "labels", "target_positions")
    batch = {name: value for name, value in batch_of(with_types=False).items() if name in names}
    places = torch.arange(batch["input_ids"].shape[1]).expand(6, -1)
    langs, places = (places > 9).long(), places % 10
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": places}
    dense = stock(**inputs, **{name: langs}).logits
    expected = F.cross_entropy(dense.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    found = model(**batch, langs=langs, position_ids=places).losses["mlm"].sum.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for other in (model(**batch, langs=langs), model(**batch, position_ids=places)):
        assert (other.losses["mlm"].sum.sum() - found).abs() > 1e-3


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_places_count_from_0_whatever_the_first_of_the_table(model_type):
    """RoBERTa counts from its padding id on."""
    model = encoder_of(model_type, ["mlm"])
    batch = {
        name: v for name, v in batch_of(with_types=False).items() if not name.startswith(("order", "span", "pair"))
    }
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected, found = model(**batch).losses["mlm"], model(**batch, position_ids=places).losses["mlm"]
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=1e-5)


def test_the_loss_of_each_mode_is_a_metric():
    model, batch = encoder_of("bert"), batch_of()
    modes = {"lm_modes": torch.tensor([0, 1, 2, 3, 0, 0]), "source_lengths": torch.tensor([0, 0, 0, 9, 0, 0])}
    output, plain = model(**batch, **modes), model(**batch)
    of_mode = {name: part for name, part in output.metrics.items() if name.endswith("_nll")}
    assert list(of_mode) == ["bidirectional_nll", "left_to_right_nll", "right_to_left_nll", "sequence_to_sequence_nll"]
    loss = output.losses["mlm"]
    for mode, (total, count) in enumerate(of_mode.values()):
        chosen = modes["lm_modes"] == mode
        assert not total.requires_grad
        assert torch.equal(total, loss.sum.detach() * chosen) and torch.equal(count, loss.count * chosen)
    same = (loss.sum - plain.losses["mlm"].sum).abs() < 1e-4
    assert same.tolist() == [True, False, False, False, True, True]


def test_a_copy_has_heads_of_its_own():
    model, batch = encoder_of("roberta"), batch_of(with_types=False)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.pair_head.classifier.bias.add_(torch.tensor([1.0, 0.0]))
        losses = [each(**batch).losses for each in (model, copied)]
    assert torch.equal(losses[0]["mlm"].sum, losses[1]["mlm"].sum)
    assert not torch.equal(losses[0]["pair"].sum, losses[1]["pair"].sum)


def test_what_cannot_be_is_refused():
    for heads, message in ((["mlm", "nsp"], "holds 'nsp'"), (["pair"], "leaves out 'mlm'"), ([], "leaves out 'mlm'")):
        with pytest.raises(InputError, match=f"heads=.*{message}"):
            EncoderForPreTrainingConfig(heads=heads)
    with pytest.raises(InputError, match="pair_classes=4"):
        EncoderForPreTrainingConfig(pair_classes=4)
    with pytest.raises(InputError, match="BertForMaskedLM has no pair head: open .* AutoModelForPreTraining"):
        EncoderForPreTraining.from_model(stock_model("bert"), heads=["mlm", "pair"])
