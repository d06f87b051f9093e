"""Pre-train a Transformer-XL: a language model that remembers the segments before.

    hf-pretrain recurrent-lm --config transformer_xl_small --train_file corpus.txt --output_dir my-transformer-xl
    accelerate launch trainers/recurrent_lm.py --config transformer_xl_wt103 --train_file corpus.txt --output_dir my-txl

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForCausalLM.from_pretrained("my-transformer-xl", trust_remote_code=True)`, and generates.
"""

from __future__ import annotations

from hf_pretrain.cli import run_program
from hf_pretrain.data.prepare import DataArguments, PreparedData
from hf_pretrain.objectives.recurrent_lm import (
    DataCollatorForRecurrentLM,
    RecurrentLMTrainer,
    RecurrentLMTrainingArguments,
    TransformerXLModelArguments,
    build_model,
    lane_inputs,
)
from hf_pretrain.training.program import train_method

ARGUMENTS = (DataArguments, TransformerXLModelArguments, RecurrentLMTrainingArguments)


def build_trainer(
    data: PreparedData, model_args: TransformerXLModelArguments, args: RecurrentLMTrainingArguments
) -> RecurrentLMTrainer:
    """Put the model, the lanes and the Trainer together."""
    model = build_model(
        model_args,
        data.tokenizer,
        mem_len=args.mem_len,
        clamp_len=args.clamp_len,
        same_length=args.same_length,
    )
    return RecurrentLMTrainer(model, args, data_collator=DataCollatorForRecurrentLM(), **lane_inputs(data, args))


def main(argv: list[str] | None = None) -> None:
    """Train from the command line; see the top of the file."""
    train_method(
        argv,
        name="recurrent-lm",
        description=__doc__ or "",
        arguments=ARGUMENTS,
        build_trainer=build_trainer,
        special_tokens=(),
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
