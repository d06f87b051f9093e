"""Pre-train an ELECTRA: a generator replaces tokens, a discriminator finds them.

    hf-pretrain rtd --train_file corpus.txt --output_dir my-electra
    accelerate launch trainers/rtd.py --config trainers/recipes/electra_small.yaml --train_file corpus.txt --output_dir my-electra

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electra")`; the generator is in its folder `pretraining/generator`.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.visibility.isolation import check_isolation
from hf_pretrain.objectives.replaced_token_detection import (
    DataCollatorForReplacedTokenDetection,
    ReplacedTokenDetectionModelArguments,
    ReplacedTokenDetectionTrainer,
    ReplacedTokenDetectionTrainingArguments,
    build_model,
    print_suspicions,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, ReplacedTokenDetectionModelArguments, ReplacedTokenDetectionTrainingArguments)


def build_trainer(
    data: PreparedData,
    model_args: ReplacedTokenDetectionModelArguments,
    args: ReplacedTokenDetectionTrainingArguments,
) -> ReplacedTokenDetectionTrainer:
    """Put the pair of models, the collator and the Trainer together."""
    model = build_model(model_args, data.tokenizer, temperature=float(args.temperature))
    for part in (model.generator, model.discriminator):
        check_model_fits(part, data.tokenizer, block_size=data.block_size)
        if data.isolates_documents:
            check_isolation(part, length=data.block_size)
    return ReplacedTokenDetectionTrainer(
        model,
        args,
        data_collator=DataCollatorForReplacedTokenDetection(data.tokenizer, masking=args.masking, seed=args.seed),
        **data.trainer_inputs(),
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(
        argv,
        name="rtd",
        description=__doc__ or "",
        arguments=ARGUMENTS,
        build_trainer=build_trainer,
        demonstrate=print_suspicions,
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
