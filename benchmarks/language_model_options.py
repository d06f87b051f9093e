"""Options of `language_models.py`, and what they mean for each arm."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from results import ComparisonArguments

ARMS = ("plm", "plm_memory", "txl", "txl_no_memory")


@dataclass
class LanguageModelArguments(ComparisonArguments):
    """What is compared."""

    arms: ClassVar = ARMS

    results: str = field(default="language_models.json", metadata={"help": "File that each run adds a row to."})
    seed: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds; each arm runs with each."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer that is trained on the text."})
    max_steps: int = field(default=2500, metadata={"help": "Steps of a run."})
    block_size: int = field(
        default=128, metadata={"help": "Tokens of an example of plm; half of it is txl's segment."}
    )
    mem_len: int = field(default=128, metadata={"help": "Tokens that are remembered by the arms with a memory."})
    dropout: float = field(default=0.0, metadata={"help": "Of all arms; one pass over much text needs none."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers."})
    hidden_size: int = field(default=128, metadata={"help": "Width; a head for every 32."})


def model_options(arm: str, args: LanguageModelArguments) -> dict[str, Any]:
    """Return the options of the arm's model."""
    sizes: dict[str, Any] = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": max(1, args.hidden_size // 32),
        "intermediate_size": 4 * args.hidden_size,
    }
    if arm.startswith("plm"):
        return sizes | {"model_type": "xlnet", "config_overrides": json.dumps({"dropout": args.dropout})}
    # Post-norm layers need the warm-up that all arms have.
    return sizes | {"hidden_dropout_prob": args.dropout}


def training_options(arm: str, args: LanguageModelArguments) -> dict[str, Any]:
    """Return the options of the arm's training."""
    common = {
        "overwrite_output_dir": True,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 8,
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "eval_on_start": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
    }
    if arm == "plm":
        return common
    if arm == "plm_memory":
        return common | {"mem_len": args.mem_len, "eval_lanes": 8}
    # Twice as many segments of half the length: as many tokens a step, and a memory has more to add.
    segment = args.block_size // 2
    mem_len = 0 if arm == "txl_no_memory" else args.mem_len
    lengths = {
        "tgt_len": segment,
        "mem_len": mem_len,
        "eval_tgt_len": segment,
        "eval_mem_len": mem_len,
        "eval_clamp_len": -1,
        "eval_same_length": False,
    }
    return common | lengths | {"per_device_train_batch_size": 2 * args.batch_size, "max_grad_norm": 1.0}
