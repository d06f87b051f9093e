"""A few lines of Python: stock models, names and datasets of text go into every Trainer, and a wrong call names the right one."""

import math
import re
import sys
from types import ModuleType

import numpy as np
import optuna
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    TrainerCallback,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
    XLNetModel,
)
from transformers.integrations import integration_utils

import hf_pretrain
from helpers.method_matrix import QUIET, TINY, VOCAB_SIZE, tiny_tokenizer
from hf_pretrain import (
    BlockDataset,
    CausalLMTrainer,
    DataArguments,
    DataCollatorForMaskedLM,
    DistillationTrainer,
    ElectricModelArguments,
    ElectricTrainer,
    ElmoConfig,
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
    PreparedData,
    PretrainingArguments,
    RecurrentLMTrainer,
    ReplacedTokenDetectionModelArguments,
    ReplacedTokenDetectionTrainer,
    StreamingBlocks,
    StudentArguments,
    TaskDistillationTrainer,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLModel,
    prepare_data,
    tokenize_documents,
)
from hf_pretrain.training import inputs as trainer_inputs

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


def stream(count=40):
    return texts(count).to_iterable_dataset(num_shards=2)


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


def long_rows():
    return Dataset.from_dict({"input_ids": [[2, *([7] * 60), 3]] * 8})


class NoModel:
    pass


# The call, and what answers it: a line, or None where it is right. The first rows are those of the table of newcomers' calls.
CALLS = {
    "a stock model": ({}, None),
    "no data_collator": ({"data_collator": None}, None),
    "a Dataset of text": ({"train_dataset": texts}, None),
    "a tokenised Dataset with our collator and from_model": (
        {
            "model": lambda: EncoderForPreTraining.from_model(bert()),
            "train_dataset": tokenized,
            "data_collator": lambda: DataCollatorForMaskedLM(tiny_tokenizer()),
        },
        None,
    ),
    "transformers' collator": (
        {"data_collator": lambda: DataCollatorForLanguageModeling(tiny_tokenizer())},
        "data_collator=DataCollatorForLanguageModeling makes batches of another form: leave it out, MaskedLMTrainer brings",
    ),
    "transformers' collator with our model and tokens": (
        {
            "model": lambda: EncoderForPreTraining.from_model(bert()),
            "train_dataset": tokenized,
            "data_collator": lambda: DataCollatorForLanguageModeling(tiny_tokenizer()),
        },
        "leave it out, MaskedLMTrainer brings its own",
    ),
    "a tokenised stream": (
        {"train_dataset": lambda: tokenized().to_iterable_dataset()},
        "train_dataset is a stream of tokens: give the stream with its column of text",
    ),
    "a tokenised stream with our model": (
        {
            "model": lambda: EncoderForPreTraining.from_model(bert()),
            "train_dataset": lambda: tokenized().to_iterable_dataset(),
        },
        "train_dataset is a stream of tokens: give the stream with its column of text",
    ),
    "compute_metrics": ({"compute_metrics": print}, "compute_metrics is not used here: override evaluation_metrics"),
    "callbacks": ({"callbacks": [TrainerCallback()]}, None),
    "another library's options": (
        {"args": lambda: TrainingArguments(output_dir="unused", use_cpu=True)},
        r"args=TrainingArguments: MaskedLMTrainer takes args=MaskedLMTrainingArguments\(",
    ),
    "options of no method": (
        {"args": lambda: PretrainingArguments(output_dir="unused")},
        r"args=PretrainingArguments: MaskedLMTrainer takes args=MaskedLMTrainingArguments\(",
    ),
    "a model's class": (
        {"model": lambda: BertForMaskedLM},
        "model=BertForMaskedLM: MaskedLMTrainer takes a model of transf",
    ),
    "no model at all": (
        {"model": lambda: NoModel()},
        "model=NoModel: MaskedLMTrainer takes a model of transformers, its name",
    ),
    "options of another model": (
        {"model_args": lambda: TransformerXLConfig()},
        r"model_args=TransformerXLConfig: MaskedLMTrainer takes model_args=ModelArguments\(",
    ),
    "options of a model that is built": (
        {"model": lambda: EncoderForPreTraining.from_model(bert()), "model_args": ModelArguments},
        "model_args has no effect on model=EncoderForPreTraining, which is built",
    ),
    "no tokenizer": (
        {"processing_class": "leave out"},
        "processing_class is missing: give MaskedLMTrainer the tokenizer",
    ),
    "the old name of the tokenizer": (
        {"tokenizer": tiny_tokenizer},
        "is no argument of MaskedLMTrainer: write processing_cl",
    ),
    "TRL's length": (
        {"max_seq_length": 64},
        r"max_seq_length=64 is no argument .*: write data_args=DataArguments\(block_size",
    ),
    "TRL's column": ({"dataset_text_field": "body"}, r"write data_args=DataArguments\(text_column="),
    "an option of the wrong place": (
        {"mlm_probability": 0.3},
        r"write args=MaskedLMTrainingArguments\(mlm_probability=",
    ),
    "the name of a file": (
        {"train_dataset": lambda: "corpus.txt"},
        r"train_dataset='corpus.txt' is a name: load it first",
    ),
    "no such split": (
        {"train_dataset": lambda: DatasetDict(all=texts())},
        r"the dataset has the splits all and no 'train': give one of them, such as train_dataset=dataset\['all'\]",
    ),
    "no text in it": (
        {"train_dataset": lambda: Dataset.from_dict({"n": [1, 2]})},
        "the dataset has the columns 'n', none of them text",
    ),
    "a stream held out": ({"eval_dataset": stream}, "eval_dataset is a stream|streamed|has to have an end"),
    "rows longer than the model": (
        {"train_dataset": long_rows},
        "train_dataset has a row of 62 tokens, and BertForMaskedLM takes 32: give the dataset with its column of text",
    ),
    "a cut of what is cut": (
        {"train_dataset": tokenized},
        "data_args has no effect on train_dataset=Dataset, whose examples are made: leave it out",
    ),
    "blocks longer than the model": (
        {"data_args": lambda: DataArguments(block_size=64)},
        "block_size=64 is longer than the 32 positions of BertForMaskedLM",
    ),
    "another tokenizer's vocabulary": (
        {"model": lambda: bert(vocab_size=30)},
        "the tokenizer has 60 tokens, but BertForMaskedLM embeds only 30",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_each_natural_call_works_or_names_the_right_one(call, tmp_path):
    changes, answer = CALLS[call]
    inputs = {"model": bert, "train_dataset": texts, "processing_class": tiny_tokenizer, "data_args": lambda: BLOCKS}
    inputs |= {"args": lambda: options(MaskedLMTrainer, tmp_path)} | changes
    if call in ("rows longer than the model", "a tokenised Dataset with our collator and from_model"):
        del inputs["data_args"]
    made = {name: value() if callable(value) and value is not print else value for name, value in inputs.items()}
    made = {name: value for name, value in made.items() if not isinstance(value, str) or value != "leave out"}
    if answer is None:
        trainer = MaskedLMTrainer(**made)
        trainer.train()
        assert trainer.state.global_step == 2
        return
    with pytest.raises(InputError, match=answer) as error:
        MaskedLMTrainer(**made)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ({"batch_size": 16}, "did you mean 'per_device_train_batch_size'"),
        ({"lr": 1e-3}, "did you mean 'learning_rate'"),
        ({"block_size": 64}, r"give the Trainer data_args=DataArguments\(block_size=...\)"),
        ({"max_seq_length": 64}, r"give the Trainer data_args=DataArguments\(block_size=...\)"),
        ({"hidden_size": 64}, r"give the Trainer model_args=ModelArguments\(hidden_size=...\)"),
        ({"mlm_probabilty": 0.3}, "did you mean 'mlm_probability'"),
        ({"whole_word_mask": True}, "did you mean masking_unit='word'"),
        ({"line_by_line": True}, r"give the Trainer data_args=DataArguments\(document_separator='line'\)"),
        ({"xyzzy": 1}, "its options are those of transformers.TrainingArguments and of the method"),
    ],
)
def test_an_option_of_another_library_is_answered_with_ours(option, answer):
    (name,) = option
    with pytest.raises(InputError, match=f"MaskedLMTrainingArguments has no option '{name}': {answer}"):
        MaskedLMTrainingArguments(output_dir="unused", **option)


@pytest.mark.parametrize("train_dataset", [texts(), stream()], ids=["a Dataset", "a stream"])
def test_a_model_that_does_not_fit_is_refused_before_any_text_is_read(train_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_inputs, "prepare_data", lambda *args, **kwargs: pytest.fail("the text was read"))
    with pytest.raises(InputError, match="embeds only 30"):
        built(MaskedLMTrainer, tmp_path, model=bert(vocab_size=30), train_dataset=train_dataset)


def test_training_without_data_says_so(tmp_path):
    trainer = MaskedLMTrainer(EncoderForPreTraining.from_model(bert()), options(MaskedLMTrainer, tmp_path))
    with pytest.raises(InputError, match="train_dataset is missing: give the Trainer a dataset with a column of text"):
        trainer.train()


@pytest.mark.parametrize(
    ("trainer", "model", "inputs", "answer"),
    [
        (RecurrentLMTrainer, bert, {}, "model=BertForMaskedLM is a bert, not a transformer_xl"),
        (DistillationTrainer, bert, {}, "teacher_name_or_path is missing"),
        (
            DistillationTrainer,
            bert,
            {"teacher": bert(BertModel)},
            "teacher=BertModel has no head of AutoModelForMaskedLM",
        ),
        (TaskDistillationTrainer, bert, {"teacher": bert()}, "TaskDistillationTrainer learns from labelled examples"),
        (RecurrentLMTrainer, lambda: transformer_xl(TransformerXLForCausalLM), {"train_dataset": tokenized()}, "text"),
        (EncoderTrainer, bert, {"train_dataset": tokenized(), "args": MIXED}, "reads documents anew each epoch"),
    ],
)
def test_a_method_names_what_it_cannot_take(trainer, model, inputs, answer, tmp_path):
    changes = inputs.pop("args", {}) if "args" in inputs else {}
    with pytest.raises(InputError, match=answer):
        built(trainer, tmp_path, model=model(), args=options(trainer, tmp_path, **changes), **inputs)


def test_early_stopping_and_the_best_model(tmp_path):
    changes = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "mlm_loss", "learning_rate": 0.5}
    args = options(MaskedLMTrainer, tmp_path, **changes, greater_is_better=False, save_total_limit=2)
    callbacks = [EarlyStoppingCallback(1, early_stopping_threshold=1.0)]
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), args=args, eval_dataset=texts(10), callbacks=callbacks)
    trainer.train()
    losses = {row["step"]: row["eval_mlm_loss"] for row in trainer.state.log_history if "eval_mlm_loss" in row}
    assert max(losses) < 12, "it was stopped"
    best = min((step for step in losses if step), key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_mlm_loss"] == pytest.approx(losses[best], abs=1e-6)


class Writer:
    """Stands for TensorBoard's writer."""

    scalars: dict = {}  # noqa: RUF012

    def __init__(self, log_dir=None):
        self.scalars.clear()

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append(step)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_each_loss_is_reported(tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    args = options(
        ReplacedTokenDetectionTrainer, tmp_path, eval_strategy="steps", eval_steps=1, report_to=["tensorboard"]
    )
    model = electra(ElectraForPreTraining)
    trainer = built(ReplacedTokenDetectionTrainer, tmp_path, model=model, args=args, eval_dataset=texts(8))
    trainer.train()
    names = {"train/rtd_loss", "train/mlm_loss", "train/disc_gain", "eval/rtd_loss", "eval/disc_auc"}
    assert names | {"train/tokens_per_second"} <= Writer.scalars.keys()
    assert Writer.scalars["train/rtd_loss"] == [1, 2]


@pytest.mark.parametrize("given", ["a name", "options", "model_init"])
def test_a_search_begins_each_trial_anew(given, tmp_path, monkeypatch):
    """Two trials with the same options come to the same, and each to what a training of its own comes to."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = tmp_path / "model"
    bert().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = {"a name": str(folder), "options": ModelArguments(model_name_or_path=str(folder)), "model_init": None}[
        given
    ]
    init = {"model_init": lambda trial=None: bert()} if given == "model_init" else {}
    args = options(MaskedLMTrainer, tmp_path / "out", max_steps=3)
    trainer = built(MaskedLMTrainer, tmp_path, model=model, args=args, eval_dataset=texts(10), **init)
    found = []

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-1])}

    def objective(metrics):
        found.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    rates = [1e-3, 1e-1, 1e-3]
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    for rate in rates:
        study.enqueue_trial({"learning_rate": rate})
    monkeypatch.setattr(optuna, "create_study", lambda **kwargs: study)
    best = trainer.hyperparameter_search(space, objective, n_trials=3, direction="minimize", backend="optuna")
    assert len(found) == 3 and found[0] == found[2] != found[1]
    assert best.hyperparameters["learning_rate"] == (1e-3 if found[0] < found[1] else 1e-1)
    alone = built(
        MaskedLMTrainer,
        tmp_path,
        model=str(folder),
        args=options(MaskedLMTrainer, tmp_path / "alone", max_steps=3, learning_rate=1e-3),
        eval_dataset=texts(10),
    )
    alone.train()
    assert alone.evaluate()["eval_loss"] == pytest.approx(found[0], abs=1e-6)


def test_a_search_without_a_way_to_begin_anew_says_what_to_give(tmp_path):
    trainer = built(MaskedLMTrainer, tmp_path, model=bert(), eval_dataset=texts(5))
    with pytest.raises(
        InputError, match="give the Trainer model_init=, a function that makes the model, or the model's name"
    ):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=2, backend="optuna")


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
