"""One step at construction: what fails is refused by name, what no loss reaches is frozen, and nothing else is changed."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from helpers.method_matrix import TINY, VOCAB_SIZE
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.base import PretrainingModel, check_trainable, trial_tokens
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.heads import stock_class
from hf_pretrain.modeling.losses import ExampleSum, PretrainingOutput
from hf_pretrain.objectives.electric.trainer import ElectricModelArguments
from hf_pretrain.objectives.electric.trainer import build_model as build_electric
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.permutation_lm.modeling import PermutationLMForPreTraining
from hf_pretrain.objectives.replaced_token_detection import ReplacedTokenDetectionModelArguments
from hf_pretrain.objectives.replaced_token_detection import build_model as build_detection

# With a pooler, a contact head, global attention or entities that no loss reaches, and without.
UNUSED = {"big_bird": "pooler", "esm": "contact_head", "longformer": "_global", "layoutlm": "pooler"}
WHOLE = ["albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta"]


def stock(model_type, **options):
    sizes = {"pad_token_id": 0, "vocab_size": VOCAB_SIZE, **TINY, **options}
    if model_type == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    if model_type == "longformer":
        sizes["attention_window"] = 4
    if model_type in ("esm", "longformer"):
        sizes["max_position_embeddings"] += 1
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **sizes))


def without_gradient(composite, batch):
    """Names of the trainable parameters that a step of training leaves without a gradient."""
    output = composite.train()(**batch)
    torch.stack([loss.sum.sum() for loss in output.losses.values()]).sum().backward()
    return [name for name, p in composite.named_parameters() if p.requires_grad and p.grad is None]


class TestFreezing:
    @pytest.mark.parametrize("model_type", [*UNUSED, *WHOLE])
    def test_a_step_leaves_no_trainable_parameter_without_a_gradient(self, model_type):
        composite = EncoderForPreTraining.from_model(stock(model_type))
        frozen = [name for name, p in composite.named_parameters() if not p.requires_grad]
        assert bool(frozen) == (model_type in UNUSED)
        assert all(UNUSED[model_type] in name for name in frozen)
        batch = composite.trial_batch()
        assert not without_gradient(composite, batch)

    @pytest.mark.parametrize("model_type", ["bert", "albert", "roberta"])
    def test_heads_without_a_target_in_a_batch_are_not_frozen_and_have_gradients_of_zero(self, model_type):
        heads = ["mlm", "pair", "span_boundary", "word_order"]
        config = stock(model_type).config
        model = stock_class(config, heads=heads).from_config(config)
        composite = EncoderForPreTraining.from_model(model, heads=heads)
        assert all(p.requires_grad for p in composite.parameters())
        batch = composite.trial_batch()
        only_mlm = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "target_positions")}
        assert not without_gradient(composite, only_mlm)

    @pytest.mark.parametrize("sharing", ["tied", "gdes", "none"])
    @pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "electra"])
    def test_a_continued_pair_with_a_narrow_generator(self, model_type, sharing, tmp_path, tokenizer):
        sizes = TINY | {"num_attention_heads": 4, "model_type": model_type, "embedding_sharing": sharing}
        first = build_detection(ReplacedTokenDetectionModelArguments(**sizes), tokenizer)
        assert not without_gradient(first, first.trial_batch())
        first.export(tmp_path)
        args = ReplacedTokenDetectionModelArguments(model_name_or_path=str(tmp_path), embedding_sharing=sharing)
        second = build_detection(args, tokenizer)
        assert all(p.requires_grad for p in second.parameters())
        assert not without_gradient(second, second.trial_batch())
        with torch.no_grad():
            before, after = (model.eval()(**first.trial_batch()).losses["mlm"].sum for model in (first, second))
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("model_type", ["bert", "electra", "modernbert"])
    def test_electric(self, model_type, tokenizer):
        sizes = TINY | {"model_type": model_type, "generator_size": 1.0}
        model = build_electric(ElectricModelArguments(**sizes), tokenizer)
        assert all(p.requires_grad for p in model.parameters())
        assert not without_gradient(model, model.trial_batch())

    @pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
    def test_permutation(self, model_type):
        model = PermutationLMForPreTraining.from_model(stock(model_type), mask_token_id=4)
        assert not without_gradient(model, model.trial_batch())

    def test_what_the_user_froze_stays_frozen_and_what_was_tried_is_tried_again(self):
        composite = EncoderForPreTraining.from_model(stock("big_bird"))
        composite.model.bert.encoder.layer[0].requires_grad_(False)
        pooler = composite.model.bert.pooler.weight
        composite.mlm_head.remove()
        composite.trial_batch = lambda: None
        composite.try_out()
        assert pooler.requires_grad
        assert not any(p.requires_grad for p in composite.model.bert.encoder.layer[0].parameters())

    def test_nothing_else_changes(self):
        """A short row would switch BigBird to full attention for good."""
        torch.manual_seed(0)
        model = stock("big_bird").train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        attention = [layer.attention.self for layer in model.bert.encoder.layer]
        drawn = torch.get_rng_state()
        composite = EncoderForPreTraining.from_model(model)
        composite.try_out()
        assert model.bert.attention_type == "block_sparse" and model.training
        assert all(layer.attention.self is own for layer, own in zip(model.bert.encoder.layer, attention, strict=True))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in composite.parameters())
        assert torch.equal(torch.get_rng_state(), drawn)

    def test_an_expert_that_no_token_chose_is_not_frozen(self):
        composite = WithExperts(stock("bert"))
        composite.try_out()
        assert composite.experts[1].weight.requires_grad
        assert not composite.lonely.weight.requires_grad

    def test_a_frozen_parameter_is_exported(self, tmp_path):
        model = stock("big_bird")
        EncoderForPreTraining.from_model(model).export(tmp_path)
        loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(loaded.bert.pooler.weight, model.bert.pooler.weight)

    @pytest.mark.parametrize("model_type", ["big_bird", "bert", "esm", "modernbert"])
    def test_on_the_meta_device(self, model_type):
        with torch.device("meta"):
            composite = EncoderForPreTraining.from_model(stock(model_type))
        frozen = [name for name, p in composite.named_parameters() if not p.requires_grad]
        assert bool(frozen) == (model_type in UNUSED)


class WithExperts(PretrainingModel):
    """One of two experts is chosen, and a layer is left out."""

    def __init__(self, model):
        super().__init__(model.config)
        self.model = model
        self.experts = nn.ModuleList([nn.Linear(TINY["hidden_size"], 1) for _ in range(2)])
        self.lonely = nn.Linear(2, 2)
        self.post_init()

    def trial_batch(self):
        return {"input_ids": trial_tokens(self.model)}

    def forward(self, input_ids):
        scores = self.experts[0](self.model.base_model(input_ids)[0][:, 0]).squeeze(1)
        return PretrainingOutput(losses={"some": ExampleSum(scores, torch.ones_like(scores))}, metrics={})


class TestRefusals:
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize(("width", "heads"), [(33, 2), (32, 3), (7, 2)])
    def test_heads_that_do_not_divide_the_width(self, width, heads, device, tokenizer):
        args = ModelArguments(
            **TINY
            | {"hidden_size": width, "num_attention_heads": heads, "model_type": "electra", "embedding_size": 16}
        )
        with (
            torch.device(device),
            pytest.raises(InputError, match=f"hidden_size={width} .*num_attention_heads={heads}"),
        ):
            EncoderForPreTraining.from_arguments(args, tokenizer)

    def test_a_model_that_fails_is_named_with_its_own_words(self):
        config = AutoConfig.for_model("xmod", **TINY, vocab_size=VOCAB_SIZE, pad_token_id=1)
        with pytest.raises(InputError, match=r"XmodForMaskedLM cannot be trained .*Input language unknown") as caught:
            EncoderForPreTraining.from_model(AutoModelForMaskedLM.from_config(config))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("model_type", "name"), [("albert", "AlbertForMaskedLM"), ("xlm", "XLMWithLMHeadModel")])
    def test_gradient_checkpointing_by_the_backbones_own_name(self, model_type, name):
        composite = EncoderForPreTraining.from_model(stock(model_type))
        with pytest.raises(InputError, match=f"gradient_checkpointing=True: {name} does not support"):
            check_trainable(composite, gradient_checkpointing=True)
        check_trainable(composite, gradient_checkpointing=False)

    def test_gradient_checkpointing_of_a_pair_needs_both(self, tokenizer):
        sizes = TINY | {"model_type": "bert", "generator_type": "albert", "embedding_sharing": "none"}
        sizes |= {"num_attention_heads": 4}
        pair = build_detection(ReplacedTokenDetectionModelArguments(**sizes), tokenizer)
        with pytest.raises(InputError, match="AlbertForMaskedLM does not support"):
            pair.try_out(gradient_checkpointing=True)

    @pytest.mark.parametrize("model_type", ["bert", "modernbert", "roberta", "electra"])
    def test_gradient_checkpointing_where_it_works(self, model_type):
        EncoderForPreTraining.from_model(stock(model_type)).try_out(gradient_checkpointing=True)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    def test_adapters_inside(self):
        adapted = get_peft_model(stock("bert"), LoraConfig(target_modules=["query"]))
        with pytest.raises(InputError, match="adapters of PEFT.*merge_and_unload"):
            EncoderForPreTraining.from_model(adapted)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    def test_adapters_that_were_merged_are_none(self):
        adapted = get_peft_model(stock("bert"), LoraConfig(target_modules=["query"]))
        EncoderForPreTraining.from_model(adapted.merge_and_unload())

    def test_adapters_added_to_the_stock_model(self):
        composite = EncoderForPreTraining.from_model(stock("bert"))
        composite.model._hf_peft_config_loaded = True  # As add_adapter leaves it.
        with pytest.raises(InputError, match="adapters of PEFT"):
            check_trainable(composite, gradient_checkpointing=False)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    def test_adapters_around(self):
        composite = EncoderForPreTraining.from_model(stock("bert"))
        adapted = get_peft_model(composite, LoraConfig(target_modules=["query"]))
        with pytest.raises(InputError, match="adapters of PEFT"):
            check_trainable(adapted, gradient_checkpointing=False)

    def test_a_stock_model_for_a_trainer_and_for_a_constructor(self):
        model = stock("bert")
        with pytest.raises(
            InputError, match=r"model=BertForMaskedLM is no composite.*EncoderForPreTraining\.from_model"
        ):
            check_trainable(model, gradient_checkpointing=False)
        with pytest.raises(InputError, match=r"EncoderForPreTraining\.from_model"):
            EncoderForPreTraining(model)


def test_tokens_of_the_trial_are_spread_and_hold_no_padding():
    embeddings = nn.Embedding(1000, 1)
    for padding in (0, 999, None):
        model = SimpleNamespace(config=SimpleNamespace(pad_token_id=padding), get_input_embeddings=lambda: embeddings)
        tokens = trial_tokens(model).flatten().tolist()
        assert padding not in tokens and len(set(tokens)) >= 15
        assert min(tokens) < 100 and max(tokens) > 900
