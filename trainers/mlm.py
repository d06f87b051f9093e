"""Pre-train a masked language model, from scratch or from a checkpoint.

    hf-pretrain mlm --train_file corpus.txt --output_dir my-bert
    hf-pretrain mlm --model_name_or_path bert-base-uncased --train_file corpus.txt --output_dir my-domain-bert
    accelerate launch trainers/mlm.py --config trainers/recipes/roberta_base.yaml --train_file corpus.txt --output_dir my-roberta

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForMaskedLM.from_pretrained("my-bert")`.
"""

from __future__ import annotations

from transformers import set_seed

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import ModelArguments
from hf_pretrain.modeling.encoder import EncoderForPreTraining
from hf_pretrain.objectives.masked_lm import MaskedLMTrainer, MaskedLMTrainingArguments
from hf_pretrain.objectives.masking_collator import DataCollatorForMaskedLM
from hf_pretrain.training.parsing import parse_arguments
from hf_pretrain.training.program import load_data, output_directory, run
from hf_pretrain.training.report import print_report

ARGUMENTS = (DataArguments, ModelArguments, MaskedLMTrainingArguments)


def build_trainer(data: PreparedData, model_args: ModelArguments, args: MaskedLMTrainingArguments) -> MaskedLMTrainer:
    """Put the model, the collator and the Trainer together."""
    model = EncoderForPreTraining.from_arguments(model_args, data.tokenizer)
    check_model_fits(model.model, data.tokenizer, block_size=data.block_size)
    return MaskedLMTrainer(
        model,
        args,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        data_collator=DataCollatorForMaskedLM(data.tokenizer, masking=args.masking, seed=args.seed),
        processing_class=data.tokenizer,
        data_description=data.description,
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    options = parse_arguments(ARGUMENTS, argv, prog="hf-pretrain mlm", description=__doc__ or "")
    data_args, model_args, args = options
    with output_directory(args):
        data = load_data(data_args, model_args, args)
        # The Trainer seeds too, but the weights are drawn before it is there.
        set_seed(args.seed)
        trainer = build_trainer(data, model_args, args)
        run(trainer, options)
        if trainer.is_world_process_zero():
            print_report(trainer)
        trainer.end()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
