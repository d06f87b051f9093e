r"""Distil a fine-tuned model into a smaller one, on the examples of its task: TinyBERT's task stages.

    hf-pretrain distil-task --config tinybert_intermediate --teacher_name_or_path my-classifier \
        --model_name_or_path my-tinybert --train_file train.tsv --validation_file dev.tsv --output_dir stage-1
    hf-pretrain distil-task --config tinybert_prediction --teacher_name_or_path my-classifier \
        --model_name_or_path stage-1 --train_file train.tsv --validation_file dev.tsv --output_dir stage-2

The teacher says what the labels are; the examples need none. The student opens with
`AutoModelForSequenceClassification.from_pretrained("stage-2")`. With `--task token-classification` examples are texts, or lists
of words (`tokens`) with their classes (`labels`); with `--task question-answering` files of SQuAD's form, or rows of `question`,
`context` and `answers`.
"""

from __future__ import annotations

from typing import Any

import datasets
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.modeling.configuration import from_pretrained
from hf_pretrain.objectives.distillation import (
    DataCollatorForTask,
    StudentArguments,
    TaskDataArguments,
    TaskDistillationTrainer,
    TaskDistillationTrainingArguments,
    build_model,
    cache_teacher_logits,
    check_labels,
    load_task,
    print_comparison,
    report_label_agreement,
)
from hf_pretrain.objectives.distillation.building import teacher_name
from hf_pretrain.training.program import train_method

ARGUMENTS = (TaskDataArguments, StudentArguments, TaskDistillationTrainingArguments)
AUTO_CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}


def build_trainer(
    data: PreparedData, model_args: StudentArguments, args: TaskDistillationTrainingArguments
) -> TaskDistillationTrainer:
    """Put student and teacher, the collator and the Trainer together."""
    check_labels(data, args)
    model = build_model(
        model_args,
        args,
        auto_class=AUTO_CLASSES[args.task],
        tokenizer=data.tokenizer,
        block_size=data.block_size,
    )
    report_label_agreement(model, data, args)
    return TaskDistillationTrainer(
        model,
        args,
        data_collator=DataCollatorForTask(data.tokenizer),
        **cache_teacher_logits(model, data, args).trainer_inputs(),
    )


def made_up_examples(
    data_args: TaskDataArguments,
    model_args: StudentArguments,
    args: TaskDistillationTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreparedData:
    """Return examples of the task for the rehearsal: a few tokens, with the first label of the teacher."""
    config = from_pretrained(AutoConfig, teacher_name(model_args))
    assert tokenizer is not None, "there is a teacher, so there is a tokenizer"
    row: dict[str, Any] = {
        "input_ids": tokenizer("a b c", truncation=True, max_length=data_args.max_length)["input_ids"]
    }
    row["labels"] = 0.0 if config.num_labels == 1 else 0
    if args.task == "token-classification":
        row["is_target"] = [True] * len(row["input_ids"])
        row["labels"] = [0] * len(row["input_ids"])
    elif args.task == "question-answering":
        row["is_target"] = [True] * len(row["input_ids"])
        row["labels"] = [0, 0]
    examples = datasets.Dataset.from_list([row] * 8)
    holds_out = data_args.validation_file or data_args.validation_split or data_args.validation_fraction
    return PreparedData(
        tokenizer, examples, examples if holds_out else None, {"source": "made up"}, data_args.max_length
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(
        argv,
        name="distil-task",
        description=__doc__ or "",
        arguments=ARGUMENTS,
        build_trainer=build_trainer,
        load=load_task,
        demonstrate=print_comparison,
        special_tokens=("pad",),
        made_up=made_up_examples,
        left_out={"cache_teacher": False},
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
