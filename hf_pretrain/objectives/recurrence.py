"""The Trainer of models with a memory.

Text is cut into lanes, and each lane is read in windows, in order. The memory of a lane goes from window to window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from hf_pretrain.data.examples.epochs import EpochDataset
from hf_pretrain.data.examples.windows import LaneStream
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.losses import PretrainingOutput, RecurrentMemory
from hf_pretrain.training.arguments import PretrainingArguments, global_batch_size
from hf_pretrain.training.trainer import PretrainingTrainer


def inputs_of_lanes(
    data: PreparedData, args: Any, window: Callable[[LaneStream], Any], *, unit: str = "windows", cure: str = ""
) -> dict[str, Any]:
    """Return the arguments that a [`RecurrentTrainer`] takes from the data: its documents as lanes.

    Args:
        data: The text.
        args: Options of training, with `eval_lanes`.
        window: Makes the examples of a stream, whose lanes are complete where it is held out.
        unit: What a lane is read in, for the card.
        cure: What else helps where there is no stored text, for the error.

    Raises:
        InputError: If the data is a stream, or too little for the lanes.
    """
    if data.train_documents is None:
        raise InputError(
            "streaming=True, or tokens: lanes are parts of the whole text, which has to be stored; give text and leave streaming "
            f"out{cure}"
        )
    stream = LaneStream(data.train_documents, tokenizer=data.tokenizer, num_lanes=global_batch_size(args))
    train, held_out = window(stream), None
    if data.eval_documents is not None:
        stream = LaneStream(data.eval_documents, tokenizer=data.tokenizer, num_lanes=args.eval_lanes, complete=True)
        held_out = window(stream)
    return describe_lanes(data, train, held_out, unit=unit, without=("block_size",))


def describe_lanes(
    data: PreparedData, train: Any, held_out: Any, *, unit: str, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the arguments that a [`RecurrentTrainer`] takes from the data.

    Args:
        data: The text.
        train: Its lanes to train on.
        held_out: Its lanes to evaluate on; None for no evaluation.
        unit: What a lane is read in, for the card.
        without: Further entries of the description that say nothing of lanes, beside those of blocks.
    """
    of_blocks = ("block_mode", "blocks", "held_out_blocks", *without)
    description = {name: value for name, value in data.description.items() if name not in of_blocks}
    description |= {"lanes": train.num_lanes, f"{unit}_of_a_lane": train.num_windows}
    inputs = {"train_dataset": train, "eval_dataset": held_out, "data_description": description}
    return data.trainer_inputs() | inputs


class LaneMemory:
    """The memory of the lanes that one process reads.

    The processes take batches in turn: of every `batch_size * world_size` lanes in a row, a process reads the same `batch_size`
    at every time step.

    Args:
        num_lanes: Lanes of all processes together.
        batch_size: Lanes in a micro-batch of one process.
        world_size: Number of processes.
        rank: Number of this process.

    Raises:
        InputError: If the batches of all processes do not divide the lanes.
    """

    def __init__(self, num_lanes: int, *, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.stride = batch_size * world_size
        if num_lanes % self.stride:
            raise InputError(
                f"{num_lanes} lanes cannot be read in batches of {batch_size} by {world_size} processes, always the same "
                "by the same: make them a multiple"
            )
        first = torch.arange(0, num_lanes, self.stride) + rank * batch_size
        self.lanes = (first[:, None] + torch.arange(batch_size)).flatten()
        """``[R]`` the lanes of this process, in the order of its rows."""
        self.memory: RecurrentMemory | None = None
        """R lanes; None before the first window."""

    def read(self, lanes: torch.Tensor) -> RecurrentMemory | None:
        """Return a copy of the memory of some lanes ``[B]``, or None if nothing has been written."""
        if self.memory is None:
            return None
        rows = self._rows(lanes)
        return RecurrentMemory(self.memory.states.index_select(1, rows), self.memory.lengths.index_select(0, rows))

    @torch.no_grad()
    def write(self, lanes: torch.Tensor, memory: RecurrentMemory) -> None:
        """Keep the memory of some lanes ``[B]``."""
        if self.memory is None:
            layers, _, size, width = memory.states.shape
            dtype, device = memory.states.dtype, memory.states.device
            self.memory = RecurrentMemory.empty(layers, len(self.lanes), size, width, dtype=dtype, device=device)
        rows = self._rows(lanes)
        self.memory.states.index_copy_(1, rows, memory.states)
        self.memory.lengths.index_copy_(0, rows, memory.lengths)

    def _rows(self, lanes: torch.Tensor) -> torch.Tensor:
        return lanes // self.stride * self.batch_size + lanes % self.batch_size

    def save(self, folder: Path, *, layout: dict[str, str]) -> None:
        """Write the memory into a checkpoint, a file a process.

        Args:
            folder: The checkpoint.
            layout: How the text is cut into lanes; a checkpoint is read only where it is cut in the same way.
        """
        # A process can arrive here before the one that makes the folder.
        folder.mkdir(parents=True, exist_ok=True)
        assert self.memory is not None, "a checkpoint follows a step, which writes all lanes"
        path = folder / f"lane_memory-{self.rank}-of-{self.world_size}.safetensors"
        save_file({"lanes": self.lanes} | self.memory._asdict(), path, metadata=layout)

    def load(self, folder: Path, *, layout: dict[str, str], device: torch.device | str = "cpu") -> None:
        """Fill the memory from a checkpoint, whichever processes wrote it.

        Args:
            folder: The checkpoint.
            layout: How the text is cut into lanes.
            device: Where to put the memory.

        Raises:
            InputError: If the checkpoint has no memory, or the text was cut in another way.
        """
        paths = sorted(folder.glob("lane_memory-*.safetensors"))
        if not paths:
            raise InputError(
                f"resume_from_checkpoint={str(folder)!r} holds no memory of lanes (lane_memory-*.safetensors): "
                "resume from a whole checkpoint of the same method"
            )
        for path in paths:
            with safe_open(path, framework="pt") as file:
                saved = file.metadata()
                lanes, states, lengths = (file.get_tensor(name) for name in ("lanes", "states", "lengths"))
            for name, value in layout.items():
                if saved.get(name) != value:
                    raise InputError(
                        f"resume_from_checkpoint={str(folder)!r} was made with {name}={saved.get(name)}, but this run has "
                        f"{value}: resume with the same text, lengths of segment and memory, and global batch (devices x batch "
                        "x accumulation)"
                    )
            own = torch.isin(lanes, self.lanes)
            if own.any():
                self.write(lanes[own].to(device), RecurrentMemory(states[:, own].to(device), lengths[own].to(device)))


class RecurrentTrainer(PretrainingTrainer):
    """Trains a model with a memory on lanes of text, in order.

    A dataset over lanes has `num_lanes`, and its index is `time * num_lanes + lane`; its batches hold `lanes` and
    `memory_reset` (both ``[B]``). The lanes to train on are as many as the examples of a step on all devices, so every row of
    every micro-batch of every process goes on where it stopped a step before, and the gradient does not depend on how the
    step is cut. The memory lies outside the model, one for training and a fresh one for each evaluation; it is saved with the
    checkpoints by lane, so a run goes on with another number of processes too, as long as the lanes are as many. A dataset
    without lanes is trained on, or evaluated, as by [`PretrainingTrainer`].

    Args:
        model: A composite that takes `memory` and `memory_reset` and returns the new memory.
        args: Options; `per_device_eval_batch_size` is lowered to a number that divides the lanes held out.
        **kwargs: Other arguments of [`PretrainingTrainer`].

    Raises:
        InputError: If lanes and batches do not fit, or an option would tear the lanes apart.
    """

    _lane_memory: LaneMemory | None = None

    def check_data(self, args: PretrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
        """Refuse lanes that are not those of a step, and lower the batch of an evaluation to fit."""
        train_lanes = _num_lanes(train_dataset)
        if train_lanes is not None:
            _check_lanes(train_lanes, args)
        for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            _fit_eval_batch(_num_lanes(dataset), args)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Read windows in the order of time."""
        if _num_lanes(eval_dataset) is None:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(cast(Sized, eval_dataset))

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Run the model with the memory of the batch's lanes, and keep the new one."""
        if "lanes" not in inputs:
            return super().run_model(model, inputs)
        inputs = dict(inputs)
        lanes = inputs.pop("lanes")
        assert self._lane_memory is not None, "there are lanes, so training or evaluation has begun"
        outputs = super().run_model(model, inputs | {"memory": self._lane_memory.read(lanes)})
        if outputs.memory is not None:
            self._lane_memory.write(lanes, outputs.memory)
        return outputs

    def begin_training(self) -> None:
        """Begin with empty memories; a resume fills them."""
        super().begin_training()
        self._lane_memory = self._fresh_memory(self.train_dataset, self.args.train_batch_size)

    def check_trial(self) -> None:
        """Refuse a trial of a search whose steps have not as many examples as there are lanes."""
        num_lanes = _num_lanes(self.train_dataset)
        if num_lanes is not None:
            _check_lanes(num_lanes, self.args)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with a memory of its own; that of training is put aside. See `transformers.Trainer.evaluation_loop`."""
        in_training = self._lane_memory
        self._lane_memory = self._fresh_memory(dataloader.dataset, self.args.eval_batch_size)
        try:
            with self.settings_of_evaluation():
                return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._lane_memory = in_training

    def settings_of_evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the lengths of evaluation."""
        return nullcontext()

    def _fresh_memory(self, dataset: Any, batch_size: int) -> LaneMemory | None:
        num_lanes, args = _num_lanes(dataset), self.args
        if num_lanes is None:
            return None
        return LaneMemory(num_lanes, batch_size=batch_size, world_size=args.world_size, rank=args.process_index)

    # Checkpoints

    def save_progress(self, folder: Path) -> None:
        """Write the memory of the lanes beside everything else."""
        super().save_progress(folder)
        if self._lane_memory is not None:
            self._lane_memory.save(folder, layout=self._layout())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # A phase reads other windows: what lay before them in the phase before is not their past.
        if checkpoint is not None and self._lane_memory is not None and not self.begins_phase:
            self._lane_memory.load(Path(checkpoint), layout=self._layout(), device=self.args.device)

    def _layout(self) -> dict[str, str]:
        base = cast(EpochDataset, self.train_dataset).base
        layout = {"num_lanes": base.num_lanes, "windows_per_lane": len(base) // base.num_lanes}
        return {name: str(value) for name, value in (layout | {"memory_size": self.model.memory_size}).items()}


def _num_lanes(dataset: Any) -> int | None:
    base = dataset.base if isinstance(dataset, EpochDataset) else dataset
    return getattr(base, "num_lanes", None)


def _check_lanes(num_lanes: int, args: PretrainingArguments) -> None:
    if num_lanes != global_batch_size(args):
        raise InputError(
            f"train_dataset has {num_lanes} lanes, but a step has {global_batch_size(args)} examples ({args.world_size} "
            f"processes x per_device_train_batch_size={args.per_device_train_batch_size} x gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}): make as many lanes"
        )
    torn = {
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "ignore_data_skip=True": args.ignore_data_skip,
        "dataloader_in_order=False": not args.dataloader_in_order,
    }
    for name, is_set in torn.items():
        if is_set:
            raise InputError(f"{name} would join the memory of a lane to the text of another: leave it out")


def _fit_eval_batch(num_lanes: int | None, args: PretrainingArguments) -> None:
    """Lower the batch of an evaluation until every process keeps the same lanes."""
    if num_lanes is None:
        return
    if num_lanes % args.world_size:
        raise InputError(
            f"eval_dataset has {num_lanes} lanes, which {args.world_size} processes cannot share: make them a multiple"
        )
    args.per_device_eval_batch_size = math.gcd(args.per_device_eval_batch_size, num_lanes // args.world_size)
