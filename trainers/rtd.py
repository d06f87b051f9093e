"""Pre-train an ELECTRA: a generator replaces tokens, a discriminator finds them.

    hf-pretrain rtd --train_file corpus.txt --output_dir my-electra
    accelerate launch trainers/rtd.py --config trainers/recipes/electra_small.yaml --train_file corpus.txt --output_dir my-electra

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electra")`; the generator is in its folder `pretraining/generator`.
"""

from __future__ import annotations

from transformers import set_seed

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.objectives.replaced_token_detection import (
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionModelArguments,
    ReplacedTokenDetectionTrainer,
    ReplacedTokenDetectionTrainingArguments,
    build_model,
    print_suspicions,
)
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import load_data, output_directory, run
from hf_pretrain.training.report import print_report

ARGUMENTS = (DataArguments, ReplacedTokenDetectionModelArguments, ReplacedTokenDetectionTrainingArguments)


def build_trainer(
    data: PreparedData,
    model_args: ReplacedTokenDetectionModelArguments,
    args: ReplacedTokenDetectionTrainingArguments,
) -> ReplacedTokenDetectionTrainer:
    """Put the pair of models, the collator and the Trainer together."""
    model = build_model(model_args, data.tokenizer)
    for part in (model.generator, model.discriminator):
        check_model_fits(part, data.tokenizer, block_size=data.block_size)
    return ReplacedTokenDetectionTrainer(
        model,
        args,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        data_collator=DataCollatorForReplacedTokenDetection(data.tokenizer, masking=args.masking, seed=args.seed),
        processing_class=data.tokenizer,
        data_description=data.description,
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    options = parse_arguments(ARGUMENTS, argv, prog="hf-pretrain rtd", description=__doc__ or "")
    data_args, model_args, args = options
    with output_directory(args):
        data = load_data(data_args, model_args, args)
        # The Trainer seeds too, but the weights are drawn before it is there.
        set_seed(args.seed)
        trainer = build_trainer(data, model_args, args)
        run(trainer, options)
        if trainer.is_world_process_zero():
            print_report(trainer)
            print_suspicions(trainer, data)
        trainer.end()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
