"""A few lines of Python: stock models, names and datasets of text go into every Trainer."""

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ElectraForPreTraining,
    ElectraModel,
    GPT2LMHeadModel,
    GPT2Model,
    XLNetLMHeadModel,
    XLNetModel,
)

import hf_pretrain
from helpers.method_matrix import TINY, tiny_tokenizer
from helpers.python_calls import (
    BLOCKS,
    MIXED,
    TEXTS,
    bert,
    built,
    electra,
    elmo,
    gpt2,
    options,
    stream,
    texts,
    tokenized,
    transformer_xl,
    xlnet,
)
from hf_pretrain import (
    BlockDataset,
    CausalLMTrainer,
    DataArguments,
    DataCollatorForMaskedLM,
    DistillationTrainer,
    ElectricModelArguments,
    ElectricTrainer,
    ElmoForPreTraining,
    ElmoModel,
    ElmoTrainer,
    EncoderForPreTraining,
    EncoderTrainer,
    EpochDataset,
    InputError,
    MaskedLMTrainer,
    MaskedLMTrainingArguments,
    ModelArguments,
    PermutationLMTrainer,
    RecurrentLMTrainer,
    ReplacedTokenDetectionModelArguments,
    ReplacedTokenDetectionTrainer,
    StreamingBlocks,
    StudentArguments,
    TransformerXLForCausalLM,
    TransformerXLModel,
    prepare_data,
    tokenize_documents,
)

LANES = {"tgt_len": 8, "mem_len": 8, "eval_tgt_len": 4, "eval_mem_len": 16}
STUDENT = {"distillation_method": "tinybert"}


# Method, what is given for `model`, options of training, the class of the export and further arguments of the Trainer.
STOCK = {
    "mlm": (MaskedLMTrainer, lambda: bert(), {}, BertForMaskedLM, {}),
    "mlm-body": (MaskedLMTrainer, lambda: bert(BertModel), {}, BertForMaskedLM, {}),
    "mlm-other-head": (MaskedLMTrainer, lambda: bert(BertForSequenceClassification), {}, BertForMaskedLM, {}),
    "encoder": (EncoderTrainer, lambda: bert(), MIXED, hf_pretrain.PretrainingModel, {}),
    "encoder-body": (EncoderTrainer, lambda: bert(BertModel), MIXED, hf_pretrain.PretrainingModel, {}),
    "rtd": (ReplacedTokenDetectionTrainer, lambda: electra(ElectraForPreTraining), {}, ElectraForPreTraining, {}),
    "rtd-body": (
        ReplacedTokenDetectionTrainer,
        lambda: electra(ElectraModel),
        {},
        ElectraForPreTraining,
        {"model_args": ReplacedTokenDetectionModelArguments(generator_size=0.5)},
    ),
    "rtd-bert": (
        ReplacedTokenDetectionTrainer,
        lambda: bert(BertModel),
        {},
        None,
        {"model_args": ReplacedTokenDetectionModelArguments(generator_size=0.5)},
    ),
    "electric": (
        ElectricTrainer,
        lambda: electra(ElectraForPreTraining),
        {},
        ElectraForPreTraining,
        {"model_args": ElectricModelArguments(generator_size=0.5)},
    ),
    "plm": (PermutationLMTrainer, lambda: xlnet(XLNetLMHeadModel), {}, XLNetLMHeadModel, {}),
    "plm-body": (PermutationLMTrainer, lambda: xlnet(XLNetModel), {"mem_len": 8}, XLNetLMHeadModel, {}),
    "plm-bert": (PermutationLMTrainer, lambda: bert(), {}, BertForMaskedLM, {}),
    "clm": (CausalLMTrainer, lambda: gpt2(GPT2LMHeadModel), {}, GPT2LMHeadModel, {}),
    "clm-body": (CausalLMTrainer, lambda: gpt2(GPT2Model), {}, GPT2LMHeadModel, {}),
    "recurrent-lm": (RecurrentLMTrainer, lambda: transformer_xl(TransformerXLForCausalLM), LANES, None, {}),
    "recurrent-lm-body": (RecurrentLMTrainer, lambda: transformer_xl(TransformerXLModel), LANES, None, {}),
    "elmo": (ElmoTrainer, lambda: elmo(ElmoForPreTraining), {"stateful": False}, ElmoForPreTraining, {}),
    "elmo-body": (ElmoTrainer, lambda: elmo(ElmoModel), {"unroll_length": 8}, ElmoForPreTraining, {}),
    "distil": (
        DistillationTrainer,
        lambda: bert(),
        {},
        BertForMaskedLM,
        {"teacher": bert(seed=1, num_hidden_layers=4, hidden_size=48)},
    ),
    "distil-cut": (
        DistillationTrainer,
        lambda: StudentArguments(student_layers="every_other"),
        {},
        BertForMaskedLM,
        {"teacher": bert(seed=1, num_hidden_layers=4)},
    ),
    "distil-cut-encoder": (
        DistillationTrainer,
        lambda: StudentArguments(student_layers="every_other"),
        {"distillation_method": "minilmv2"},
        None,
        {"teacher": bert(seed=1, num_hidden_layers=4)},
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_is_trained_on_text_as_it_is(name, tmp_path):
    """The weights are those given, the collator and the examples the method's, and the export is a stock model."""
    trainer_class, make, changes, export, inputs = STOCK[name]
    model = make()
    args = options(trainer_class, tmp_path, **changes)
    trainer = built(trainer_class, tmp_path, model=model, args=args, **inputs)
    root = trainer.model.root
    if not isinstance(model, StudentArguments):
        given = model.get_input_embeddings()
        tables = [part for part in given.modules() if isinstance(part, torch.nn.Embedding)]
        found = [part for part in root.get_input_embeddings().modules() if isinstance(part, torch.nn.Embedding)]
        assert tables and all(torch.equal(a.weight, b.weight) for a, b in zip(tables, found, strict=True))
    before = {key: value.clone() for key, value in root.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(before[key], value) for key, value in root.state_dict().items())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if export is not None and export is not hf_pretrain.PretrainingModel:
        trainer.save_model()
        _, info = export.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("name", ["mlm", "encoder", "rtd", "electric", "plm", "clm", "recurrent-lm", "elmo", "distil"])
def test_a_name_brings_its_tokenizer(name, tmp_path):
    trainer_class, make, changes, _, inputs = STOCK[name]
    folder = tmp_path / "model"
    model = make()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    args = options(trainer_class, tmp_path / "out", max_steps=1, **changes)
    trainer = trainer_class(model=str(folder), args=args, train_dataset=texts(), data_args=BLOCKS, **inputs)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_teacher_by_name_brings_the_tokenizer_too(tmp_path):
    bert(seed=1, num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    args = options(DistillationTrainer, tmp_path / "out")
    trainer = DistillationTrainer(
        model=StudentArguments(student_layers="0,3"),
        args=args,
        teacher=str(tmp_path / "teacher"),
        train_dataset=texts(),
        data_args=BLOCKS,
    )
    assert trainer.model.student.config.num_hidden_layers == 2 and trainer.model.teacher is not None
    trainer.train()


def test_options_build_a_model_from_scratch(tmp_path):
    sizes = {name: TINY[name] for name in TINY if name != "max_position_embeddings"}
    first, second = (
        built(MaskedLMTrainer, tmp_path, model=ModelArguments(max_position_embeddings=32, **sizes)) for _ in range(2)
    )
    assert type(first.model.model) is BertForMaskedLM and first.model.model.config.hidden_size == TINY["hidden_size"]
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_short_call_is_the_long_one_bit_by_bit(tmp_path):
    tokenizer = tiny_tokenizer()
    short = built(
        MaskedLMTrainer, tmp_path / "short", model=bert(), args=options(MaskedLMTrainer, tmp_path, max_steps=4)
    )
    args = options(MaskedLMTrainer, tmp_path / "long", max_steps=4)
    long = MaskedLMTrainer(
        EncoderForPreTraining.from_model(bert()),
        args,
        data_collator=DataCollatorForMaskedLM(tokenizer, masking=args.masking, seed=args.seed),
        train_dataset=BlockDataset(tokenize_documents(texts(), tokenizer), tokenizer=tokenizer, block_size=24),
        processing_class=tokenizer,
    )
    for trainer in (short, long):
        trainer.train()
    losses = [[row["mlm_loss"] for row in trainer.state.log_history if "mlm_loss" in row] for trainer in (short, long)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def prepared(folder):
    return prepare_data(BLOCKS, seed=0, output_dir=folder, tokenizer=tiny_tokenizer(), dataset=texts())


# What a user may have -> the documents or rows that are trained on, None for a stream.
DATA = {
    "a Dataset": (lambda folder: texts(), 40),
    "another name of the column": (lambda folder: texts(column="body"), 40),
    "a list of texts": (lambda folder: TEXTS, 40),
    "a DatasetDict": (lambda folder: DatasetDict(train=texts(30), validation=texts(10), test=texts(5)), 30),
    "a stream": (lambda folder: stream(), None),
    "tokens": (lambda folder: tokenized(), 40),
    "documents": (lambda folder: tokenize_documents(texts(), tiny_tokenizer()), 40),
    "what prepare_data returns": (prepared, 40),
    "a file of lines": (lambda folder: load_dataset("text", data_files=str(folder / "a.txt"), split="train"), 40),
}


@pytest.mark.parametrize("kind", DATA)
def test_any_dataset_of_text_is_trained_on(kind, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
    make, count = DATA[kind]
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=make(tmp_path))
    if count is None:
        assert isinstance(trainer.train_dataset, StreamingBlocks)
        ids = [token for block in trainer.train_dataset for token in block["input_ids"]]
    else:
        blocks = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        ids = [token for block in blocks for token in block["input_ids"]]
    # All words of all texts, in blocks with the special tokens around them.
    special = set(tiny_tokenizer().all_special_ids) - {tiny_tokenizer().unk_token_id}
    words = sum(len(text.split()) for text in TEXTS[: count or 40])
    held_out = 1 if kind == "what prepare_data returns" else 0
    assert sum(int(token) not in special for token in ids) == words - 20 * held_out
    assert int(ids[0]) == tiny_tokenizer().cls_token_id
    assert (trainer.eval_dataset is not None) == (kind in ("a DatasetDict", "what prepare_data returns"))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.num_input_tokens_seen > 0


def test_the_card_names_the_source(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
    files = load_dataset("text", data_files=str(tmp_path / "a.txt"), split="train")
    hub = texts()
    hub.info.dataset_name, hub._split = "wikitext", "train"
    for dataset, source in ((files, "text files"), (texts(), "a dataset in memory"), (hub, "wikitext train")):
        trainer = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=dataset)
        assert trainer.data_description["source"] == source
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "wikitext train" in (tmp_path / "README.md").read_text()
    lines = DataArguments(
        train_file=[str(tmp_path / "a.txt")], document_separator="line", validation_fraction=0, block_size=16
    )
    data = prepare_data(lines, seed=0, output_dir=tmp_path, tokenizer=tiny_tokenizer())
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text() + (tmp_path / "pretraining" / "run.json").read_text()
    assert "a.txt" in card and str(tmp_path) not in card


def test_the_column_can_be_chosen(tmp_path):
    both = Dataset.from_dict({"title": ["w1 w2"] * 20, "body": TEXTS[:20], "number": list(range(20))})
    with pytest.raises(InputError, match=re.escape("of text 'title', 'body': name one with data_args=DataArguments(")):
        built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=both)
    chosen = DataArguments(block_size=24, text_column="body")
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=both, data_args=chosen)
    assert trainer.data_description["documents"] == 20 and trainer.data_description["tokens"] == 400


def test_a_share_is_held_out_where_the_options_say_so(tmp_path):
    share = DataArguments(block_size=24, validation_fraction=0.25)
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), data_args=share)
    assert (trainer.data_description["documents"], trainer.data_description["held_out_documents"]) == (30, 10)


def test_several_sets_are_held_out_by_name(tmp_path):
    args = options(MaskedLMTrainer, tmp_path, eval_strategy="steps", eval_steps=1)
    sets = {"near": texts(8), "far": tokenized(5)}
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), args=args, eval_dataset=sets)
    trainer.train()
    found = {key for row in trainer.state.log_history for key in row}
    assert {"eval_near_mlm_loss", "eval_far_mlm_loss"} <= found
    assert len(trainer.eval_dataset["far"]) == 5


def test_the_text_held_out_is_the_same_however_it_is_given(tmp_path):
    """As its own dataset or as a split; a whole dataset to train on loses nothing to it."""
    parts = DatasetDict(train=texts(30), validation=texts(10))
    split = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=parts)
    named = built(MaskedLMTrainer, tmp_path, model=bert(), train_dataset=texts(30), eval_dataset=texts(10))
    whole = built(MaskedLMTrainer, tmp_path, model=bert())
    assert split.evaluate()["eval_mlm_loss"] == named.evaluate()["eval_mlm_loss"]
    assert split.data_description["held_out_documents"] == named.data_description["held_out_documents"] == 10
    assert whole.eval_dataset is None and whole.data_description["documents"] == 40


def test_prepare_data_takes_datasets_and_saved_folders(tmp_path):
    options = {"seed": 0, "output_dir": tmp_path, "tokenizer": tiny_tokenizer()}
    given = prepare_data(BLOCKS, dataset=texts(), **options)
    texts().save_to_disk(str(tmp_path / "saved"))
    saved = prepare_data(DataArguments(dataset_name=str(tmp_path / "saved"), block_size=24), **options)
    for name in ("documents", "held_out_documents", "tokens", "blocks"):
        assert given.description[name] == saved.description[name] and given.description[name]
    rows = [
        [part.train_dataset[i]["input_ids"].tolist() for i in range(len(part.train_dataset))]
        for part in (given, saved)
    ]
    assert rows[0] == rows[1]
    parts = DatasetDict(train=texts(30), validation=texts(10))
    split = prepare_data(BLOCKS, dataset=parts, **options)
    assert split.description["documents"] == 30 and split.description["held_out_documents"] == 10
    assert isinstance(prepare_data(BLOCKS, dataset=stream(), **options).train_dataset, StreamingBlocks)
    with pytest.raises(InputError, match="give one text to train on"):
        prepare_data(DataArguments(train_file=["a.txt"]), dataset=texts(), **options)


def test_the_fewest_words(tmp_path, monkeypatch):
    """A model and a dataset: all the rest has a default."""
    monkeypatch.chdir(tmp_path)
    bert(max_position_embeddings=128).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    trainer = MaskedLMTrainer("model", train_dataset=texts())
    assert type(trainer.args) is MaskedLMTrainingArguments and isinstance(trainer.train_dataset, EpochDataset)
    assert isinstance(trainer.data_collator, DataCollatorForMaskedLM)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert 0.05 < float(np.mean(np.asarray(batch["labels"]) != -100)) < 0.3
