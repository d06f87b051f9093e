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

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.objectives.distillation import (
    DataCollatorForTask,
    StudentArguments,
    TaskDataArguments,
    TaskDistillationTrainer,
    TaskDistillationTrainingArguments,
    ask_once,
    build_model,
    check_labels,
    load_task,
    print_comparison,
    report_label_agreement,
)
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
        **ask_once(model, data, args).trainer_inputs(),
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
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
