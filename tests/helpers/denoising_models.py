"""What the tests of denoising build: texts, options, and tiny checkpoints of encoders, decoders and encoder-decoders."""

from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5EncoderModel,
    set_seed,
)

from hf_pretrain.objectives.denoising.arguments import DenoisingModelArguments

TEXTS = [
    f"The {noun} sat by the {noun}. It was a fine {noun} today." for noun in ("cat", "dog", "river", "garden")
] * 40
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_decoder_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}


def model_options(**others):
    return DenoisingModelArguments(**(SIZES | others))


def extra_ids(count, start=0):
    return [f"<extra_id_{number}>" for number in range(start, count)]


def copy_of(tokenizer, folder):
    """A copy of a tokenizer that a test may change."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_models(tokenizer, folder):
    """Tiny checkpoints in a folder by name, each with the tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    bart |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": len(tokenizer)}
    bart |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 64}
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    special = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "bos", "eos")
    }
    t5 = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    set_seed(0)
    models = {
        "bert": BertForMaskedLM(BertConfig(**sizes)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(**sizes, **special)),
        "gpt2": GPT2LMHeadModel(gpt2),
        "bart": BartForConditionalGeneration(BartConfig(**bart)),
        "bart-decoder": BartForCausalLM(BartConfig(**bart)),
        "t5-encoder": T5EncoderModel(t5),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}
