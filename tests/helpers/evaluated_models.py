"""One tiny checkpoint of each kind of model that `hf-pretrain evaluate` measures, and tasks in all forms that it reads."""

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
    set_seed,
)

from helpers.method_matrix import VOCAB_SIZE, build, programs, tiny_tokenizer
from hf_pretrain import (
    ElmoConfig,
    ElmoForPreTraining,
    ElmoModel,
    ElmoTokenizer,
    EncoderForSequenceClassification,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    WordVectors,
)
from hf_pretrain.data import draws
from hf_pretrain.modeling.pooling import SentenceModules
from hf_pretrain.vectors.formats import write_vectors

SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
WIDE = SIZES | {"initializer_range": 0.3}
MARKS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
WORDS = [f"w{number}" for number in range(50)]


def drawn_words(count, *, seed, length=4):
    keys = draws.row_keys(range(count), seed=seed, stream="evaluate command")
    return draws.integers(keys, length, high=50).tolist()


def sentence(row):
    return " ".join(f"w{number}" for number in row)


def write_tasks(data):
    """Write tasks in the forms that are found by name; return the folder."""
    for name in ("SST-2", "stsb", "blimp", "wordsim", "topics"):
        (data / name).mkdir()
    for split, count, seed in (("train", 90, 0), ("dev", 60, 1)):
        rows = drawn_words(count, seed=seed)
        # No header; every third row of the development set is of class 1.
        (data / "SST-2" / f"{split}.tsv").write_text("".join(f"{sentence(r)}\t{int(r[0] < 20)}\n" for r in rows))
        scored = [(sentence(r), sentence(r[:2] + r[:1] * 2), r[3] / 10) for r in rows]
        (data / "stsb" / f"{split}.csv").write_text("".join(f"{a},{b},{score}\n" for a, b, score in scored))
        lines = [json.dumps({"text": sentence(r), "label": ("sun", "moon", "star")[r[0] % 3]}) for r in rows]
        (data / "topics" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    pairs = [
        {"sentence_good": sentence(r), "sentence_bad": sentence(r[::-1]), "UID": f"p{i % 3}", "field": f"f{i % 2}"}
        for i, r in enumerate(drawn_words(24, seed=2))
    ]
    (data / "blimp" / "all.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    lines = [f"w{a}\tw{b}\t{c / 5}" for a, b, c in drawn_words(40, seed=3, length=3) if a != b]
    (data / "wordsim" / "wordsim353.tsv").write_text("# words\n" + "\n".join(lines) + "\n")
    lines = [sentence(r) for r in drawn_words(30, seed=4) if len(set(r)) == 4]
    (data / "wordsim" / "questions-words.txt").write_text(": family\n" + "\n".join(lines) + "\n")
    (data / "tasks.yaml").write_text(
        "first: {type: choice, text: text, choices: [a, b], label: label, validation_file: choice.jsonl}\n"
        "tags: {type: tokens, text: words, label: tags, train_file: tags.jsonl}\n"
    )
    rows = [
        {"text": sentence(r[:2]), "a": sentence(r[2:]), "b": "w1 w2 w3", "label": i % 2}
        for i, r in enumerate(drawn_words(20, seed=5))
    ]
    (data / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rows = [{"words": ["w1", f"w{r[0]}"], "tags": ["O", "B-X"]} for r in drawn_words(20, seed=6)]
    (data / "tags.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return data


def saved(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def with_sentinels():
    """The tokenizer with T5's sentinels, in a vocabulary that is larger by two."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        **dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"),
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    return tokenizer


def elmo_tokenizer():
    return ElmoTokenizer.from_fast(tiny_tokenizer(), max_characters=10)


def elmo(cls=ElmoForPreTraining, *, vocab_size=VOCAB_SIZE, **options):
    """An ELMo whose states differ from word to word."""
    sizes = {"hidden_size": 24, "cell_size": 14, "character_embedding_size": 4, "filters": [[1, 4], [3, 6]]}
    torch.manual_seed(0)
    model = cls(ElmoConfig(vocab_size=vocab_size, max_characters=10, **sizes | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        if vocab_size:
            letters = torch.tensor(elmo_tokenizer().vocabulary_characters(), dtype=torch.int32)
            model.base_model.embeddings.characters.copy_(letters)
    return model.eval()


def with_adapter(model, folder, base, **options):
    """Save an adapter of a model alone, with weights that change what the model says."""
    with warnings.catch_warnings():
        # peft asks for an old name of transformers.
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"], **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def static_vectors():
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    return WordVectors(tuple(WORDS), table)


def _electric(folder):
    build(programs()["electric"], folder).save_model()
    return saved(ElectraForPreTraining.from_pretrained(folder), folder)


def _sentence_model(folder):
    """A sentence-transformers folder with another pooling than the mean, and vectors of length one."""
    saved(BertModel(BertConfig(**WIDE), add_pooling_layer=False), folder)
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    SentenceModules(pooling=pooling, normalizes=True).write(folder, hidden_size=24, longest=40)
    return folder


def _static_folder(folder):
    static_vectors().save(folder, method="test", training={}, lowercase=True)
    return folder


def _classifier(folder):
    names = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    config = BertConfig(**WIDE, **names, problem_type="single_label_classification")
    return saved(BertForSequenceClassification(config), folder)


def _architecture(folder):
    encoder = BertModel(BertConfig(**WIDE), add_pooling_layer=False)
    names = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}, "num_labels": 2}
    model = EncoderForSequenceClassification.from_encoder(
        encoder, architecture="cnn", problem_type="single_label_classification", **names
    )
    return saved(model, folder)


def _multitask(folder):
    """What `multitask` writes: an encoder, and below it a folder a task."""
    saved(BertModel(BertConfig(**WIDE), add_pooling_layer=False), folder)
    _classifier(Path(folder, "sst2"))
    return folder


def _adapter(folder):
    base = saved(BertForMaskedLM(BertConfig(**WIDE)), folder.parent / f"{folder.name}-base")
    return with_adapter(BertForMaskedLM.from_pretrained(base), folder, base)


def _classifier_adapter(folder):
    base = saved(BertForMaskedLM(BertConfig(**WIDE)), folder.parent / f"{folder.name}-base")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    return with_adapter(model, folder, base, task_type="SEQ_CLS")


_BART = {"d_model": 24, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 40, "init_std": 0.3}
_BART |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 1), ("ffn_dim", 32))}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2} | MARKS
_T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB_SIZE + 2}
_T5 |= {"initializer_factor": 2.0, "decoder_start_token_id": 0}
_GPT2 = {
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
}
_XLNET = {"d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": VOCAB_SIZE, "initializer_range": 0.3}

KINDS = {
    "masked": lambda folder: saved(BertForMaskedLM(BertConfig(**WIDE)), folder),
    "encoder": lambda folder: saved(BertModel(BertConfig(**WIDE)), folder),
    "causal": lambda folder: saved(GPT2LMHeadModel(GPT2Config(**_GPT2, **MARKS)), folder),
    "bart": lambda folder: saved(BartForConditionalGeneration(BartConfig(**_BART)), folder),
    "t5": lambda folder: saved(T5ForConditionalGeneration(T5Config(**_T5)), folder, with_sentinels()),
    "t5 encoder": lambda folder: saved(T5EncoderModel(T5Config(**_T5)), folder, with_sentinels()),
    "xlnet": lambda folder: saved(XLNetLMHeadModel(XLNetConfig(**_XLNET, **MARKS)), folder),
    "transformer-xl": lambda folder: saved(
        TransformerXLForCausalLM(TransformerXLConfig(**WIDE, mem_len=4, clamp_len=-1)), folder
    ),
    "electra": lambda folder: saved(ElectraForPreTraining(ElectraConfig(**WIDE, embedding_size=24)), folder),
    "electric": _electric,
    "elmo": lambda folder: saved(elmo(), folder, elmo_tokenizer()),
    "elmo characters": lambda folder: saved(
        elmo(ElmoModel, vocab_size=0, stateful=True), folder, ElmoTokenizer.without_vocabulary(max_characters=10)
    ),
    "static": _static_folder,
    "sentence": _sentence_model,
    "classifier": _classifier,
    "architecture": _architecture,
    "multitask": _multitask,
    "adapter": _adapter,
    "classifier adapter": _classifier_adapter,
    "vec": lambda folder: write_vectors(folder.with_suffix(".vec"), static_vectors().words, static_vectors().vectors),
    "txt": lambda folder: write_vectors(folder.with_suffix(".txt"), static_vectors().words, static_vectors().vectors),
    "bin": lambda folder: write_vectors(folder.with_suffix(".bin"), static_vectors().words, static_vectors().vectors),
}


def save_kind(kind, folder):
    """Write the checkpoint of a kind; return its name as `hf-pretrain evaluate` takes it."""
    set_seed(0)
    return str(KINDS[kind](Path(folder, kind.replace(" ", "-"))))
