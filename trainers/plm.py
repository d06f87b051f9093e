"""Pre-train a permutation language model: an XLNet, or another encoder that takes its positions as an input.

    hf-pretrain plm --train_file corpus.txt --output_dir my-xlnet
    hf-pretrain plm --model_type modernbert --train_file corpus.txt --output_dir my-modernbert
    accelerate launch trainers/plm.py --config trainers/recipes/xlnet_base.yaml --train_file corpus.txt --output_dir my-xlnet

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-xlnet")`.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.objectives.permutation_lm import (
    DataCollatorForPermutationLM,
    PermutationLMForPreTraining,
    PermutationLMModelArguments,
    PermutationLMTrainer,
    PermutationLMTrainingArguments,
    plm_inputs,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, PermutationLMModelArguments, PermutationLMTrainingArguments)


def build_trainer(
    data: PreparedData, model_args: PermutationLMModelArguments, args: PermutationLMTrainingArguments
) -> PermutationLMTrainer:
    """Put the model, the collator and the Trainer together."""
    reuse_len = (data.block_size + 1) // 2 if args.reuse_len is None else args.reuse_len
    model = PermutationLMForPreTraining.from_arguments(
        model_args, data.tokenizer, mem_len=args.mem_len, reuse_len=reuse_len
    )
    check_model_fits(model.model, data.tokenizer, block_size=data.block_size)
    return PermutationLMTrainer(
        model,
        args,
        data_collator=DataCollatorForPermutationLM(data.tokenizer, permutation=args.permutation, seed=args.seed),
        **plm_inputs(data, args),
    )


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(argv, name="plm", description=__doc__ or "", arguments=ARGUMENTS, build_trainer=build_trainer)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
