"""Pre-train a masked language model, from scratch or from a checkpoint.

    hf-pretrain mlm --train_file corpus.txt --output_dir my-bert
    hf-pretrain mlm --model_name_or_path bert-base-uncased --train_file corpus.txt --output_dir my-domain-bert
    accelerate launch trainers/mlm.py --config trainers/recipes/roberta_base.yaml --train_file corpus.txt --output_dir my-roberta

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForMaskedLM.from_pretrained("my-bert")`.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.visibility.isolation import check_isolation
from hf_pretrain.objectives.encoder.modeling import EncoderForPreTraining
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM, MaskedLMTrainer, MaskedLMTrainingArguments
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, ModelArguments, MaskedLMTrainingArguments)


def build_trainer(data: PreparedData, model_args: ModelArguments, args: MaskedLMTrainingArguments) -> MaskedLMTrainer:
    """Put the model, the collator and the Trainer together."""
    model = EncoderForPreTraining.from_arguments(model_args, data.tokenizer)
    check_model_fits(model.model, data.tokenizer, block_size=data.block_size)
    if data.isolates_documents:
        check_isolation(model.model, length=data.block_size)
    return MaskedLMTrainer(
        model,
        args,
        data_collator=DataCollatorForMaskedLM(data.tokenizer, masking=args.masking, seed=args.seed),
        **data.trainer_inputs(),
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(argv, name="mlm", description=__doc__ or "", arguments=ARGUMENTS, build_trainer=build_trainer)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
