"""How a stock model is told the language of each token."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    XLMConfig,
    XLMWithLMHeadModel,
)

from hf_pretrain.data.documents.tokenizers import frame_by_separators, train_tokenizer
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.embeddings import (
    known_languages,
    language_changes,
    language_input,
    language_inputs,
    set_languages,
)
from hf_pretrain.modeling.losses import GatheredHead

LANGUAGES = {"de": 0, "en": 1, "fr": 2}


def xlm_config(**options):
    return XLMConfig(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2, dropout=0.0, attention_dropout=0.0, **options)


def bert_config(**options):
    return BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **options
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 40, (2, 9), generator=generator)
    langs = torch.tensor([[0] * 4 + [2] * 5, [1] * 6 + [0] * 3])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "langs": langs}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("xlm", {"n_langs": 3}),
        ("flaubert", {"n_langs": 3}),
        ("bert", {"type_vocab_size": 3}),
        ("deberta-v2", {"type_vocab_size": 3}),
        ("distilbert", {}),
        ("modernbert", {}),
    ],
)
def test_a_model_from_scratch_gets_room(model_type, changes):
    assert language_changes(model_type, LANGUAGES) == changes
    assert language_changes("bert", {"de": 0}) == {"type_vocab_size": 2}


def test_xlm_is_a_right_stock_checkpoint(tmp_path):
    config = xlm_config(**language_changes("xlm", LANGUAGES))
    assert set_languages(config, LANGUAGES) == "langs" == language_input(config)
    model = XLMWithLMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.n_langs == 3 and saved.lang2id == LANGUAGES
    assert saved.id2lang == {"0": "de", "1": "en", "2": "fr"}
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    inputs = language_inputs(again.config, **batch())
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    other = inputs | {"langs": inputs["langs"].flip(0)}
    assert not torch.allclose(again(**other).logits, again(**inputs).logits)


def test_xlm_takes_positions_and_gathered_targets():
    config = xlm_config(n_langs=3)
    set_languages(config, LANGUAGES)
    model = XLMWithLMHeadModel(config).eval()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    inputs = language_inputs(config, **batch(), position_ids=positions)
    dense = model(**inputs).logits
    assert not torch.allclose(dense, model(**language_inputs(config, **batch())).logits)
    targets = torch.tensor([1, 4, 17])
    with GatheredHead(model) as head:
        gathered = head(model, targets, **inputs)
    assert torch.allclose(gathered, dense.flatten(0, 1)[targets], atol=1e-6)


def test_bert_reads_languages_as_token_types():
    config = bert_config(**language_changes("bert", LANGUAGES))
    assert set_languages(config, LANGUAGES) == "token_type_ids"
    model = AutoModelForMaskedLM.from_config(config).eval()
    given = batch()
    inputs = language_inputs(config, token_type_ids=torch.zeros_like(given["langs"]), **given)
    assert torch.equal(inputs.pop("token_type_ids"), given["langs"]) and "langs" not in inputs
    expected = model(**inputs, token_type_ids=given["langs"]).logits
    assert torch.equal(model(**language_inputs(config, **given)).logits, expected)
    assert not torch.allclose(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "config",
    [bert_config(), DistilBertConfig(), RobertaConfig(), xlm_config(), XLMConfig(n_langs=5, use_lang_emb=False)],
)
def test_a_model_without_room_is_told_nothing(config):
    assert set_languages(config, LANGUAGES) is None
    assert not hasattr(config, "lang2id")
    given = batch()
    segments = torch.zeros_like(given["langs"])
    inputs = language_inputs(config, token_type_ids=segments, **given)
    assert inputs["token_type_ids"] is segments and "langs" not in inputs


def test_a_batch_without_languages_is_not_changed():
    config = bert_config(type_vocab_size=3)
    set_languages(config, LANGUAGES)
    inputs = {"input_ids": torch.zeros(1, 2), "token_type_ids": torch.ones(1, 2)}
    assert language_inputs(config, **inputs) == inputs


def test_a_checkpoint_keeps_its_numbers():
    config = xlm_config(n_langs=3)
    assert known_languages(config) is None
    set_languages(config, LANGUAGES)
    assert set_languages(config, {"fr": 2}) == "langs"
    assert known_languages(config) == LANGUAGES
    for wrong in ({"fr": 0}, {"es": 1}):
        with pytest.raises(InputError, match="numbers of the model"):
            set_languages(config, wrong)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_trained_tokenizer_with_the_frame_of_xlm_opens_beside_its_model(tmp_path, kind):
    texts = ["The cat sat on the mat.", "Le chat est sur la table.", "Der Hund rennt weg."] * 20
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=320, model_max_length=32)
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    frame_by_separators(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    XLMWithLMHeadModel(xlm_config(n_langs=2)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for one in (tokenizer, again):
        sep = one.sep_token_id
        assert sep == one.cls_token_id == one.eos_token_id
        assert one.bos_token_id not in (None, sep)
        assert one("the cat")["input_ids"] == [sep, *plain, sep]
        assert one("the cat", "the cat")["input_ids"] == [sep, *plain, sep, *plain, sep]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert set(again.all_special_ids) == set(tokenizer.all_special_ids)
    assert (again.is_fast, again.mask_token) == (True, tokenizer.mask_token)
