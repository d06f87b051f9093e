"""Tiny stock models, texts and short calls: what a user of Python gives a Trainer."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    GPT2Config,
    XLNetConfig,
)

from helpers.method_matrix import QUIET, TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import (
    DataArguments,
    ElmoConfig,
    PreparedData,
    TransformerXLConfig,
)

SIZES = TINY | {"vocab_size": VOCAB_SIZE}
TEXTS = ["\n".join(" ".join(f"w{(row * 7 + i * 3) % 50}" for i in range(5)) for _ in range(4)) for row in range(40)]
BLOCKS = DataArguments(block_size=24)


def texts(count=40, column="text"):
    return Dataset.from_dict({column: TEXTS[:count]})


def tokenized(count=40):
    """Rows as run_mlm makes them."""
    tokenizer = tiny_tokenizer()
    rows = tokenizer(TEXTS[:count], return_special_tokens_mask=True)
    return Dataset.from_dict(dict(rows))


def bert(model_class=BertForMaskedLM, *, seed=0, **options):
    torch.manual_seed(seed)
    return model_class(BertConfig(**SIZES | options))


def electra(model_class):
    torch.manual_seed(0)
    return model_class(ElectraConfig(**SIZES, embedding_size=16))


def xlnet(model_class):
    torch.manual_seed(0)
    return model_class(XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=2, d_inner=64))


def gpt2(model_class):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return model_class(GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=2, eos_token_id=3, **sizes))


def transformer_xl(model_class):
    torch.manual_seed(0)
    sizes = {
        name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    return model_class(TransformerXLConfig(vocab_size=VOCAB_SIZE, **sizes))


def elmo(model_class):
    torch.manual_seed(0)
    return model_class(
        ElmoConfig(vocab_size=VOCAB_SIZE, embedding_type="tokens", hidden_size=32, cell_size=48, num_hidden_layers=1)
    )


def options(trainer, folder, **changes):
    _, args_class = trainer.option_classes
    return args_class(**QUIET | {"output_dir": str(folder), "max_steps": 2, **changes})


def is_text(dataset):
    names = getattr(dataset, "column_names", None) or ()
    return not isinstance(dataset, PreparedData) and ("input_ids" not in names or "sent_starts" in names)


def built(trainer, folder, *, model, train_dataset=None, processing_class=None, args=None, **inputs):
    """A Trainer of the shortest call, with tiny blocks."""
    return trainer(
        model=model,
        args=options(trainer, folder) if args is None else args,
        train_dataset=texts() if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer() if processing_class is None else processing_class,
        **{"data_args": BLOCKS if is_text(train_dataset) else None} | inputs,
    )


MIXED = {"objectives": ["mlm", "sop", "word_order"], "word_order_probability": 0.3}


def stream(count=40):
    return texts(count).to_iterable_dataset(num_shards=2)
