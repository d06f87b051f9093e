"""Pre-train an encoder with any combination of objectives, from scratch or from a checkpoint.

    hf-pretrain encoder --objectives mlm sop --train_file corpus.txt --output_dir my-encoder
    hf-pretrain albert --train_file corpus.txt --output_dir my-albert
    hf-pretrain structbert --train_file corpus.txt --output_dir my-structbert --word_order_weight 0.5
    hf-pretrain xlm --language_file en=en.txt de=de.txt --parallel_file en-de=a.en,a.de --output_dir my-xlm
    accelerate launch trainers/encoder.py --config trainers/recipes/spanbert.yaml --train_file corpus.txt --output_dir my-spanbert

bert, roberta, albert, spanbert, structbert, unilm and xlm are this program with a recipe of that name. Without a file or a
dataset it trains on the docstrings of the installed Python packages.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.multilingual import MultilingualDataArguments
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.objectives.encoder import (
    DataCollatorForEncoder,
    EncoderTrainer,
    EncoderTrainingArguments,
    build_model,
    held_out_examples,
    load_examples,
    training_examples,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (MultilingualDataArguments, ModelArguments, EncoderTrainingArguments)


def build_trainer(data: PreparedData, model_args: ModelArguments, args: EncoderTrainingArguments) -> EncoderTrainer:
    """Put the model, the examples, the collator and the Trainer together."""
    model = build_model(model_args, args, data)
    type_vocab_size = getattr(model.model.config, "type_vocab_size", None) or 0
    collator = DataCollatorForEncoder(
        data.tokenizer,
        heads=args.heads,
        word_order_probability=args.word_order_probability,
        word_order_size=args.word_order_size,
        keep_identity_order=args.keep_identity_order,
        span_positions=args.span_positions,
        masking=args.masking,
        seed=args.seed,
    )
    return EncoderTrainer(
        model,
        args,
        data_collator=collator,
        **data.trainer_inputs()
        | {
            "train_dataset": training_examples(data, args, type_vocab_size=type_vocab_size),
            "eval_dataset": held_out_examples(data, args, type_vocab_size=type_vocab_size),
        },
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(
        argv,
        name="encoder",
        description=__doc__ or "",
        arguments=ARGUMENTS,
        build_trainer=build_trainer,
        load=load_examples,
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
