"""What every composite has: the checks of a stock model, and the export of its parts."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining


def tiny_model(model_type, **options):
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    values = {**TINY, **special, "pad_token_id": 1, "vocab_size": VOCAB_SIZE, **options}
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **values)).eval()


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
        from helpers.method_matrix import tiny_tokenizer

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
