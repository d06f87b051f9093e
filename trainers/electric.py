"""Pre-train an Electric: an encoder that gives every token an energy, an estimate of -log p given the rest of the text.

    hf-pretrain electric --train_file corpus.txt --output_dir my-electric
    accelerate launch trainers/electric.py --config trainers/recipes/electric_small.yaml --train_file corpus.txt \
        --output_dir my-electric

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electric")`; `hf_pretrain.objectives.electric.score_texts` scores texts with it. The generator
is in its folder `pretraining/generator`.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.visibility.isolation import check_isolation
from hf_pretrain.objectives.electric import (
    DataCollatorForElectric,
    ElectricModelArguments,
    ElectricTrainer,
    ElectricTrainingArguments,
    build_model,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, ElectricModelArguments, ElectricTrainingArguments)


def build_trainer(
    data: PreparedData, model_args: ElectricModelArguments, args: ElectricTrainingArguments
) -> ElectricTrainer:
    """Put the pair of models, the collator and the Trainer together."""
    model = build_model(model_args, data.tokenizer)
    for part in (model.generator, model.discriminator):
        check_model_fits(part, data.tokenizer, block_size=data.block_size)
    if data.isolates_documents:
        model.generator.check_isolation(length=data.block_size)
        check_isolation(model.discriminator, length=data.block_size)
    return ElectricTrainer(
        model,
        args,
        data_collator=DataCollatorForElectric(data.tokenizer, masking=args.masking, seed=args.seed),
        **data.trainer_inputs(),
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(argv, name="electric", description=__doc__ or "", arguments=ARGUMENTS, build_trainer=build_trainer)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
