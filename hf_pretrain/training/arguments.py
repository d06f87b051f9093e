"""Options that every method has."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments

from hf_pretrain.errors import InputError
from hf_pretrain.schedules import Schedule
from hf_pretrain.training.precision import bf16_is_fast
from hf_pretrain.training.processes import first_process_first


@dataclass
class PretrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what pre-training needs and the defaults that suit it."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the earlier run in output_dir, once all is read and checked."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the last whole checkpoint in output_dir (`true`), from the checkpoint of this path, or "
            "(`auto`) from the last whole one if there is any and else from the start: for jobs that are started again."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bf16 autocast; by default on machines whose matrix units are fast in it."},
    )
    adam_bias_correction: bool = field(
        default=True, metadata={"help": "Adam's bias correction; the official BERT and ELECTRA optimizers have none."}
    )
    decay_during_warmup: bool = field(
        default=False,
        metadata={"help": "Multiply the linear schedule's decay and warm-up, as the official ELECTRA does."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of all but biases and norms."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(
        default=0.1,
        metadata={
            "help": "Steps of warm-up, or their share of all steps if below 1; recipes of a million steps take 10000."
        },
    )
    eval_on_start: bool = field(
        default=True,
        metadata={"help": "Evaluate before the first step, to compare with; only if there is held-out text."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep off: collators need columns that no model takes."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite, at the price of a device sync a step."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Let DDP look for parameters without gradient; every objective uses all of its own."},
    )

    def __post_init__(self) -> None:
        """Choose the precision, then let transformers check the rest."""
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns=True would drop example ids and word boundaries: leave it False")
        if self.include_num_input_tokens_seen not in (False, "no"):
            raise InputError("include_num_input_tokens_seen is not needed: num_tokens is in every log row")
        if self.decay_during_warmup and self.lr_scheduler_type != "linear":
            raise InputError(
                f"decay_during_warmup=True is the linear schedule's, not {self.lr_scheduler_type}'s: drop one of the two"
            )
        self.parse_schedules()
        optim = str(getattr(self.optim, "value", self.optim))
        if not self.adam_bias_correction and not optim.startswith("adamw_torch"):
            raise InputError(
                f"adam_bias_correction=False is Adam's, but optim={optim!r}: set it to True or leave optim out"
            )
        if torch.accelerator.current_accelerator(check_available=True) is None:
            # transformers refuses bf16 on a CPU that was not asked for by name.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast()
        super().__post_init__()
        # Every rank reads a stream and takes its share; batches sent out from rank 0 would have their gathered targets cut.
        self.accelerator_config.dispatch_batches = False

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """Let one process work while the others wait, however long it takes; see `transformers.TrainingArguments`."""
        return super().main_process_first(local=local, desc=desc) if local else first_process_first(self)

    def parse_schedules(self) -> dict[str, Schedule]:
        """Return the schedules that are set, by the option that they change: `x_schedule` is that of `x`.

        Raises:
            InputError: If the value of one is no schedule.
        """
        texts = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_schedule")}
        return {
            name.removesuffix("_schedule"): Schedule.parse(text, name=name)
            for name, text in texts.items()
            if text is not None
        }


def check_training_options(args: PretrainingArguments) -> None:
    """Refuse options of training that cannot work, before anything else is done."""
