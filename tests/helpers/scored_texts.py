"""Texts, tokenizers and tiny models of each kind that texts are scored by."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    ElectraConfig,
    ElectraForPreTraining,
    EncoderDecoderConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
    set_seed,
)

from hf_pretrain.models.transformer_xl.configuration_transformer_xl import TransformerXLConfig

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "dog", "sat", "un", "##happi", "##ness", "##s", ".", *(f"x{i}" for i in range(40))]
SIZES = {
    "vocab_size": len(SPECIALS) + len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
TEXTS = ["unhappiness sat.", "the cat", "the cats sat unhappiness the dogs.", "zebra the dog"]


def wordpiece():
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(SPECIALS + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIALS, strict=True)))


def masked_lm(config_class=BertConfig):
    set_seed(0)
    return AutoModelForMaskedLM.from_config(config_class(**SIZES))


def detector():
    set_seed(0)
    return ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=16))


def denoiser():
    return encoder_decoder("bart")


DECODERS = {
    "gpt2": lambda: GPT2Config(**SIZES, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1),
    "mamba": lambda: MambaConfig(**SIZES, state_size=4),
    # The head reads the decoder inside the body, the body in another way, or a body that the class does not name.
    "bart": lambda: BartConfig(
        **SIZES, d_model=16, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2, init_std=0.3
    ),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3),
    "modernbert-decoder": lambda: ModernBertDecoderConfig(**SIZES),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_key_value_heads=1, head_dim=8, num_local_experts=2
    ),
    "bert": lambda: BertConfig(**SIZES, is_decoder=True),
    "transformer_xl": lambda: TransformerXLConfig(**SIZES, mem_len=4, clamp_len=-1),
}


def decoder(kind="gpt2"):
    set_seed(0)
    return AutoModelForCausalLM.from_config(DECODERS[kind]())


SENTINELS = ["<extra_id_0>", "[NLU]"]


def framed(kind):
    """A tokenizer with sentinels, whose texts end on a special token and perhaps begin with one."""
    backend = wordpiece().backend_tokenizer
    single, pieces = ("$A [SEP]", [("[SEP]", 3)]) if kind == "t5" else ("[CLS] $A [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if kind == "t5":
        tokenizer.add_special_tokens({"extra_special_tokens": SENTINELS})
    return tokenizer


def encoder_decoder(kind, *, trained=False):
    """A tiny model whose logits differ from place to place."""
    set_seed(0)
    vocab_size = len(SPECIALS) + len(WORDS) + len(SENTINELS)
    ids = {"vocab_size": vocab_size, "pad_token_id": 0, "decoder_start_token_id": 2 if kind == "bart" else 0}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return AutoModelForSeq2SeqLM.from_config(T5Config(**ids, **sizes, initializer_factor=1.0 if trained else 3.0))
    if kind == "bert2bert":
        half = BertConfig(**SIZES | {"vocab_size": vocab_size})
        config = EncoderDecoderConfig.from_encoder_decoder_configs(half, half, decoder_start_token_id=2)
        return AutoModelForSeq2SeqLM.from_config(config)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.02 if trained else 0.3}
    config = BartConfig(**ids, **sides, **heads, d_model=32, max_position_embeddings=20)
    return AutoModelForSeq2SeqLM.from_config(config)


def unframed(**names):
    """A tokenizer like GPT-2's, that adds no special token by itself."""
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(SPECIALS + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)
