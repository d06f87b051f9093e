"""Language modelling with a memory: its batches, options and Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction, SchedulerType

from hf_pretrain.corruption.rows import stack_column
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.examples.windows import LaneDataset, LaneStream
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.samples import print_next_tokens
from hf_pretrain.evaluation.streams import memory_lengths
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription
from hf_pretrain.modeling.losses import IGNORED
from hf_pretrain.models.transformer_xl.modeling_transformer_xl import TransformerXLForCausalLM
from hf_pretrain.objectives.recurrence import RecurrentTrainer, inputs_of_lanes
from hf_pretrain.objectives.recurrent_lm.modeling import (
    RecurrentLMForPreTraining,
    TransformerXLModelArguments,
    build_model,
)
from hf_pretrain.options import option
from hf_pretrain.training.arguments import PretrainingArguments
from hf_pretrain.training.method import Learning, Method

# Options that evaluation has a second time, after "eval_".
_LENGTHS = ("mem_len", "clamp_len", "same_length")


class DataCollatorForRecurrentLM:
    """Stacks the windows of a [`LaneDataset`]; nothing is random.

    The batch holds ``input_ids``, ``attention_mask`` and ``labels``, the next token of each, ``[B, S]``; and ``lanes`` and
    ``memory_reset``, ``[B]``. Windows are padded on the right, with mask 0 and label -100.

    Args:
        pad_to_multiple_of: S is rounded up to a multiple of this.
    """

    def __init__(self, *, pad_to_multiple_of: int | None = None) -> None:
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch."""
        input_ids, valid = stack_column(examples, "input_ids", multiple=self.pad_to_multiple_of or 1)
        labels = np.full(input_ids.shape, IGNORED, dtype=np.int64)
        labels[valid] = np.concatenate([example["labels"] for example in examples])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(valid.astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "lanes": torch.tensor([example["lane"] for example in examples]),
            "memory_reset": torch.tensor([example["memory_reset"] for example in examples]),
        }


@dataclass
class RecurrentLMTrainingArguments(PretrainingArguments):
    """Options of [`RecurrentLMTrainer`]; the defaults are the base model's of WikiText-103."""

    tgt_len: int = option(150, "Tokens of a segment in training.")
    mem_len: int = option(150, "Tokens that are remembered in training.")
    clamp_len: int = option(-1, "Distance from which on positions are all alike, in training; -1 for none.")
    same_length: bool = option(False, "Let every position see equally many tokens, in training.")
    reset_at_documents: bool = option(
        False, "Forget at the end of each document; segments end with it and are padded."
    )
    eval_tgt_len: int = option(64, "Tokens of a segment in evaluation.")
    eval_mem_len: int = option(640, "Tokens that are remembered in evaluation.")
    eval_clamp_len: int = option(400, "Distance from which on positions are all alike, in evaluation; -1 for none.")
    eval_same_length: bool = option(
        True, "Let every position see equally many tokens in evaluation, whatever eval_tgt_len."
    )
    eval_lanes: int = option(
        8,
        "Parts of the held-out text that are read side by side, on all devices together: each begins without "
        "memory, so the result depends on it; per_device_eval_batch_size is lowered to fit.",
    )
    learning_rate: float = option(2.5e-4, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = option("cosine", "Schedule of the learning rate; the cosine ends at 0.")
    warmup_steps: float = option(0, "Steps of warm-up, or their share of all steps if below 1; large models need it.")
    weight_decay: float = option(0.0, "Decoupled weight decay of all but biases and norms.")
    max_grad_norm: float = option(0.25, "Norm that the gradient is clipped to.")

    def __post_init__(self) -> None:
        """Refuse lengths out of range."""
        for prefix in ("", "eval_"):
            clamp_len = getattr(self, f"{prefix}clamp_len")
            if clamp_len != -1 and clamp_len < 1:
                raise InputError(f"{prefix}clamp_len={clamp_len} must be at least 1, or -1 for none")
            if getattr(self, f"{prefix}same_length") and not getattr(self, f"{prefix}mem_len"):
                raise InputError(f"{prefix}same_length=True needs a memory: raise {prefix}mem_len or set it to False")
        super().__post_init__()


def lane_inputs(data: PreparedData, args: RecurrentLMTrainingArguments) -> dict[str, Any]:
    """Return the arguments that a [`RecurrentLMTrainer`] takes from the data: its documents as lanes.

    Raises:
        InputError: If the data is a stream, or too little for the lanes.
    """

    def window(stream: LaneStream) -> LaneDataset:
        length = args.eval_tgt_len if stream.complete else args.tgt_len
        return LaneDataset(stream, window=length, reset_at_documents=args.reset_at_documents)

    return inputs_of_lanes(data, args, window, unit="segments")


class RecurrentLMTrainer(RecurrentTrainer):
    """Trains a [`RecurrentLMForPreTraining`] to predict the next token, with the segments before in its memory."""

    objective = ObjectiveDescription(
        name="recurrent-lm",
        title="Language modelling with segment recurrence",
        description=(
            "The text is read in segments, and the model predicts the next token of each position. Its layers also attend "
            "to what they read in the segments before, which is kept without gradient, with positions that are relative; so "
            "the context is several times as long as a segment."
        ),
        formula=r"\mathcal{L} = -\frac{1}{N} \sum_{t=1}^{N} \log p_\theta(x_t \mid x_{<t})",
        citations=(
            """\
@inproceedings{dai2019transformerxl,
  title = {{Transformer-XL}: Attentive Language Models beyond a Fixed-Length Context},
  author = {Dai, Zihang and Yang, Zhilin and Yang, Yiming and Carbonell, Jaime and Le, Quoc and Salakhutdinov, Ruslan},
  booktitle = {Proceedings of {ACL}},
  year = {2019}
}""",
        ),
        metrics=SHARED_METRICS
        | {
            "lm_loss": "How surprised the model is by the next token, in nats; 0 is certainty.",
            "perplexity": "As many tokens, all as likely, would leave the model as unsure; it depends on the tokenizer.",
        },
        headline=("lm_loss", "perplexity"),
        pipeline_tag="text-generation",
        usage="""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)
inputs = tokenizer({beginning}, return_tensors="pt", add_special_tokens=False)
outputs = model.generate(inputs.input_ids, max_new_tokens=20)
print(tokenizer.decode(outputs[0]))""",
    )

    option_classes = (TransformerXLModelArguments, RecurrentLMTrainingArguments)
    special_tokens = ()

    def build_model(
        self,
        options: TransformerXLModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> RecurrentLMForPreTraining:
        """Return the Transformer-XL with the lengths of training."""
        lengths = {name: getattr(args, name) for name in _LENGTHS}
        return build_model(options, data.tokenizer, stock=stock, **lengths)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForRecurrentLM:
        """Return the collator of windows."""
        return DataCollatorForRecurrentLM(pad_to_multiple_of=args.tgt_len if args.torch_compile else None)

    def make_examples(self, data: PreparedData, *, args: Any, model: Any, collator: Any) -> dict[str, Any]:
        """Return windows of lanes."""
        return lane_inputs(data, args)

    def settings_of_evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the lengths of evaluation."""
        model: TransformerXLForCausalLM = self.accelerator.unwrap_model(self.model).model
        return memory_lengths(model, **{name: getattr(self.args, f"eval_{name}") for name in _LENGTHS})

    def _reduce_statistics(self, prediction: EvalPrediction) -> dict[str, float]:
        means = super()._reduce_statistics(prediction)
        return means | {"perplexity": float(np.exp(means["lm_loss"]))}


METHOD = Method(
    trainer=RecurrentLMTrainer,
    description="""\
Pre-train a Transformer-XL: a language model that remembers the segments before.

    hf-pretrain recurrent-lm --config transformer_xl_small --train_file corpus.txt --output_dir my-transformer-xl
    accelerate launch trainers/recurrent_lm.py --config transformer_xl_wt103 --train_file corpus.txt --output_dir my-txl

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModelForCausalLM.from_pretrained("my-transformer-xl", trust_remote_code=True)`, and generates.""",
    arguments=(DataArguments, TransformerXLModelArguments, RecurrentLMTrainingArguments),
    learning=Learning(left={"lm_loss": 0.44}),
    demonstrate=print_next_tokens,
    tiny_options={
        "tgt_len": 8,
        "mem_len": 8,
        "eval_tgt_len": 4,
        "eval_mem_len": 150,
        "eval_clamp_len": -1,
        "eval_same_length": False,
    },
)
