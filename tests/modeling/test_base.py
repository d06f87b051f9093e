"""What every composite has: the checks of a stock model, and the export of its parts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.base import check_model_fits, tokenizer_for
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from method_matrix import TINY, VOCAB_SIZE


def tiny_model(model_type, **options):
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    values = {**TINY, **special, "pad_token_id": 1, "vocab_size": VOCAB_SIZE, **options}
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **values)).eval()


def runs(model, length):
    with torch.no_grad():
        try:
            model(torch.full((1, length), 7))
        except (IndexError, RuntimeError):
            return False
    return True


class TestLongestSequence:
    @pytest.mark.parametrize(
        ("model_type", "options", "longest"),
        [
            ("albert", {}, 32),
            ("bert", {}, 32),
            ("deberta-v2", {"position_biased_input": True}, 32),
            ("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}, 32),
            ("electra", {}, 32),
            ("big_bird", {}, 32),
            ("roformer", {}, 32),
            # The first position of these is number 2, and their table that much longer.
            ("nystromformer", {}, 32),
            ("yoso", {}, 32),
            # The first position of these is number padding_idx + 1.
            ("esm", {}, 30),
            ("ibert", {}, 30),
            ("mpnet", {}, 30),
            ("roberta", {}, 30),
            ("roberta", {"pad_token_id": 0}, 31),
            ("xlm-roberta", {"pad_token_id": 5}, 26),
        ],
    )
    def test_the_model_takes_that_many_tokens_and_no_more(self, model_type, options, longest):
        model = tiny_model(model_type, **options)
        assert longest_sequence(model) == longest
        assert runs(model, longest) and not runs(model, longest + 1)

    @pytest.mark.parametrize(
        ("model_type", "options"), [("modernbert", {}), ("deberta-v2", {"position_biased_input": False})]
    )
    def test_there_is_none_without_a_table(self, model_type, options):
        model = tiny_model(model_type, **options)
        assert longest_sequence(model) is None
        assert runs(model, 2 * TINY["max_position_embeddings"])


class TestCheckModelFits:
    @pytest.mark.parametrize(("model_type", "longest"), [("bert", 32), ("roberta", 30)])
    def test_the_longest_block(self, model_type, longest, tokenizer):
        model = tiny_model(model_type)
        check_model_fits(model, tokenizer, block_size=longest)
        with pytest.raises(InputError, match=f"block_size={longest + 1} .* {longest} positions") as caught:
            check_model_fits(model, tokenizer, block_size=longest + 1)
        assert "\n" not in str(caught.value)

    def test_any_block_without_a_table(self, tokenizer):
        check_model_fits(tiny_model("modernbert"), tokenizer, block_size=10**6)

    @pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, VOCAB_SIZE, VOCAB_SIZE + 4])
    def test_the_vocabulary(self, vocab_size, tokenizer):
        model = tiny_model("bert", vocab_size=vocab_size)
        if vocab_size >= len(tokenizer):
            check_model_fits(model, tokenizer, block_size=8)
            return
        with pytest.raises(InputError, match=f"{VOCAB_SIZE} tokens.* {vocab_size}"):
            check_model_fits(model, tokenizer, block_size=8)

    def test_tokens_added_to_the_tokenizer_count(self):
        from method_matrix import tiny_tokenizer

        tokenizer = tiny_tokenizer()
        model = tiny_model("bert")
        check_model_fits(model, tokenizer, block_size=8)
        tokenizer.add_tokens(["new"])
        with pytest.raises(InputError, match="61 tokens"):
            check_model_fits(model, tokenizer, block_size=8)


class TestExport:
    def test_a_gathered_state_goes_before_the_parameters_in_memory(self, tmp_path):
        """Where the parameters are sharded, only the state that was gathered is whole."""
        model = tiny_model("bert")
        composite = EncoderForPreTraining.from_model(model)
        state = {name: torch.full_like(value, 0.5) for name, value in composite.state_dict().items()}
        composite.export(tmp_path, state_dict=state)
        loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(bool((parameter == 0.5).all()) for parameter in loaded.parameters())

    def test_the_root_is_the_stock_model(self, tmp_path):
        model = tiny_model("modernbert")
        EncoderForPreTraining.from_model(model).export(tmp_path)
        encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        ids = torch.arange(5, 25).reshape(2, 10)
        with torch.no_grad():
            expected = model.base_model(ids).last_hidden_state
            torch.testing.assert_close(encoder.eval()(ids).last_hidden_state, expected, atol=1e-6, rtol=0)


class TestTokenizerFor:
    """What a tokenizer makes, its model takes: `model(**tokenizer(text))` works for everybody who opens an export."""

    SIZES = {
        **{"vocab_size": 60, "hidden_size": 16, "dim": 16, "num_hidden_layers": 1, "n_layers": 1},
        **{"num_attention_heads": 2, "n_heads": 2, "intermediate_size": 16, "hidden_dim": 16},
        **{"embedding_size": 16, "d_model": 16, "n_head": 2, "n_layer": 1, "d_inner": 16, "pad_token_id": 0},
    }

    @pytest.mark.parametrize(
        ("model_type", "options", "dropped"),
        [
            ("bert", {}, set()),
            ("xlnet", {}, set()),
            ("modernbert", {}, {"token_type_ids"}),
            ("distilbert", {}, {"token_type_ids"}),
            ("esm", {}, {"token_type_ids"}),
            ("fnet", {}, {"attention_mask"}),
            ("roberta", {"type_vocab_size": 1}, {"token_type_ids"}),
            ("deberta-v2", {"type_vocab_size": 0}, {"token_type_ids"}),
        ],
    )
    def test_it_makes_no_input_that_the_model_does_not_take(self, model_type, options, dropped, tokenizer, tmp_path):
        tokenizer = copy.deepcopy(tokenizer)
        names = tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = names
        config = AutoConfig.for_model(model_type, **self.SIZES | options)
        model = AutoModel.from_config(config)
        with tokenizer_for(model, tokenizer):
            tokenizer.save_pretrained(tmp_path)
        opened = AutoTokenizer.from_pretrained(tmp_path)
        encoded = opened(["w1 w2", "w3"], ["w4", "w5 w6"], return_tensors="pt", padding=True)
        assert set(names) - set(encoded) == dropped
        model.eval()(**encoded)
        assert tokenizer.model_input_names == names and "token_type_ids" in tokenizer("w1")
