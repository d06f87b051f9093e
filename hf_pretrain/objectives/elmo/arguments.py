"""The options of ELMo: how text is cut into words, which model is trained, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.trainer_utils import SchedulerType

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import check_numbers
from hf_pretrain.modeling.configuration import parse_overrides
from hf_pretrain.options import option
from hf_pretrain.training.arguments import PretrainingArguments


@dataclass
class ElmoDataArguments(DataArguments):
    """Which text is trained on, and which words are known."""

    tokenizer_type: Literal["word", "auto", "wordpiece", "bpe", "unigram"] = option(  # type: ignore[assignment]
        "word",
        "Kind of tokenizer to train: whole words, sorted from frequent to rare; or pieces of words, for --embedding_type tokens.",
    )
    lowercase: bool | None = option(False, "Lower the case, in a tokenizer to train: the characters show it.")
    vocab_size: int = option(50_000, "Vocabulary of a tokenizer to train: the words that are predicted.")
    max_unknown_share: float = option(
        0.25,
        "Refuse text of which the tokenizer does not know a greater share of the characters: rare words are unknown.",
    )


@dataclass
class ElmoModelArguments:
    """Which ELMo is trained: a checkpoint to continue, or sizes, by default those of the small published model."""

    needs: ClassVar[dict[str, str]] = {
        "cell_size": "!model_name_or_path",
        "embedding_type": "!model_name_or_path",
        "num_highway_layers": "!model_name_or_path",
        "softmax": "!model_name_or_path",
        "num_samples": "softmax=sampled and !model_name_or_path",
        "cutoffs": "softmax=adaptive and !model_name_or_path",
    }
    ranges: ClassVar[dict[str, str]] = {"cutoffs": "[1, 2147483647]", "num_highway_layers": "[0, 64]"}

    model_name_or_path: str | None = option(
        None, "Checkpoint to continue from; without it the model is built from the sizes below."
    )
    embedding_type: Literal["characters", "tokens"] = option(
        "characters", "Make the vectors of words from their characters, or have a table with a row a token."
    )
    hidden_size: int = option(256, "Width of the states of both directions together.")
    cell_size: int = option(1024, "Width of the cells of each LSTM, which are projected to half of hidden_size.")
    num_hidden_layers: int = option(2, "Number of layers of each direction.")
    num_highway_layers: int = option(1, "Highway layers above the convolutions over characters.")
    hidden_dropout_prob: float = option(0.1, "Dropout of the input of each layer and of the output of the last.")
    softmax: Literal["full", "sampled", "adaptive"] = option(
        "full",
        "Compare the right word with all words; in training with some that are drawn by their rank; or in two steps, by clusters "
        "of words.",
    )
    num_samples: int = option(8192, "Words that a step of the sampled softmax draws.")
    cutoffs: list[int] | None = option(None, "Ids at which the clusters of the adaptive softmax begin.")
    config_overrides: str | None = option(
        None, 'JSON object of further configuration values, e.g. {"cell_clip": 3, "filters": [[1, 32], [3, 64]]}.'
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and overrides that are no JSON object."""
        check_numbers(self)
        parse_overrides(self.config_overrides)


@dataclass
class ElmoTrainingArguments(PretrainingArguments):
    """Options of [`ElmoTrainer`]."""

    needs: ClassVar[dict[str, str]] = {
        "unroll_length": "stateful",
        "eval_lanes": "stateful",
        "block_size": "!stateful",
        "block_mode": "!stateful",
        "data_seed": "!stateful",
    }

    stateful: bool = option(
        True,
        "Read the text in lanes, and go on in each window with the states of the one before. Otherwise examples are blocks of "
        "text, and each begins anew.",
    )
    unroll_length: int = option(20, "Words of a window, through which gradients flow.")
    eval_lanes: int = option(
        8,
        "Parts of the held-out text that are read side by side, on all devices together: each begins without "
        "states, so the result depends on it; per_device_eval_batch_size is lowered to fit.",
    )
    learning_rate: float = option(2e-3, "Peak learning rate.")
    lr_scheduler_type: SchedulerType | str = option("linear", "Schedule of the learning rate.")
    warmup_steps: float = option(0.01, "Steps of warm-up, or their share of all steps if below 1.")
    weight_decay: float = option(0.0, "Decoupled weight decay of all but biases and norms.")
    max_grad_norm: float = option(1.0, "Norm that the gradient is clipped to.")
