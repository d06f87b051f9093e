"""Distil a trained encoder into a smaller one on raw text: DistilBERT, TinyBERT's general stage, MiniLM.

    hf-pretrain distil --teacher_name_or_path my-bert --student_layers every_other --train_file corpus.txt --output_dir my-student
    hf-pretrain distil --config minilmv2 --teacher_name_or_path my-bert --train_file corpus.txt --output_dir my-minilm
    accelerate launch trainers/distil.py --config trainers/recipes/tinybert_general.yaml --teacher_name_or_path my-bert ...

Without a file or a dataset it trains on the docstrings of the installed Python packages. The student opens with
`AutoModelForMaskedLM.from_pretrained("my-student")`, or where no loss compares predictions, with `AutoModel`.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.visibility.isolation import check_isolation
from hf_pretrain.objectives.distillation import (
    DataCollatorForDistillation,
    DistillationTrainer,
    DistillationTrainingArguments,
    StudentArguments,
    auto_class_for,
    build_model,
    cache_teacher_top_k,
    load_text,
    print_comparison,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, StudentArguments, DistillationTrainingArguments)


def build_trainer(
    data: PreparedData, model_args: StudentArguments, args: DistillationTrainingArguments
) -> DistillationTrainer:
    """Put student and teacher, the collator and the Trainer together."""
    model = build_model(
        model_args,
        args,
        auto_class=auto_class_for(args),
        tokenizer=data.tokenizer,
        block_size=data.block_size,
    )
    if data.isolates_documents:
        for part in model.stock_models():
            check_isolation(part, length=data.block_size)
    collator = DataCollatorForDistillation(data.tokenizer, masking=args.masking, seed=args.seed)
    return DistillationTrainer(
        model,
        args,
        data_collator=collator,
        **cache_teacher_top_k(model, data, args, collator=collator).trainer_inputs(),
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(
        argv,
        name="distil",
        description=__doc__ or "",
        arguments=ARGUMENTS,
        build_trainer=build_trainer,
        load=load_text,
        demonstrate=print_comparison,
        left_out={"cache_top_k": 0},
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
