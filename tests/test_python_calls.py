"""Calls in Python as users write them: a wrong one names the right one, and callbacks, reports and searches work."""

import sys
from types import ModuleType

import optuna
import pytest
from datasets import Dataset, DatasetDict
from transformers import (
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    ElectraForPreTraining,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from helpers.method_matrix import tiny_tokenizer
from helpers.python_calls import BLOCKS, MIXED, bert, built, electra, options, stream, texts, tokenized, transformer_xl
from hf_pretrain import (
    DataArguments,
    DataCollatorForMaskedLM,
    DistillationTrainer,
    EncoderForPreTraining,
    EncoderTrainer,
    InputError,
    MaskedLMTrainer,
    MaskedLMTrainingArguments,
    ModelArguments,
    PretrainingArguments,
    RecurrentLMTrainer,
    ReplacedTokenDetectionTrainer,
    TaskDistillationTrainer,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from hf_pretrain.training import inputs as trainer_inputs


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
