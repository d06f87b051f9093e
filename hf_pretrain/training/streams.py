"""Training on a stream, and going on with it after a resume where it was left, without reading what was before."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pretrain.data.streaming.blocks import Stop, StreamingBlocks, StreamPosition, StreamProgress, TrainingStream
from hf_pretrain.errors import InputError

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


STREAM_STATE = "stream_state.json"
_PROGRESS = "stream_progress"


class _CollateWithProgress:
    """A collator that tells, beside the batch, how far its reader has come with it."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        reader, stop = examples[-1]["progress"]
        batch = self.collate([{name: x for name, x in row.items() if name != "progress"} for row in examples])
        return batch | {_PROGRESS: torch.tensor([reader, stop.item, *stop.position])}


class _ShareOfSteps(TrainerCallback):
    """Keeps the epoch of a stream, its share of all steps, right after a resume: nothing is skipped, so nothing is counted."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = state.global_step / state.max_steps


class StreamTrainingMixin(_Base):
    """What a Trainer needs for a [`StreamingBlocks`] to train on; other datasets are left to the stock Trainer.

    Every process reads shards of its own. The micro-batches that were trained on tell how far the stream was taken, whatever
    the workers had read ahead; a checkpoint has it in `stream_state.json`.
    """

    _stream: TrainingStream
    _stops: dict[int, Stop]
    _num_batches = 0

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training examples; see `transformers.Trainer`."""
        stream = self.train_dataset
        if not isinstance(stream, StreamingBlocks):
            return super().get_train_dataloader()
        if not any(isinstance(callback, _ShareOfSteps) for callback in self.callback_handler.callbacks):
            self.add_callback(_ShareOfSteps)
        args = self.args
        self._stops, self._num_batches = {}, 0
        self._stream = TrainingStream(stream, rank=args.process_index, world_size=args.world_size)
        # accelerate would let each process read all of the text and keep its part.
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=_CollateWithProgress(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            # The seed that a loader draws when it is opened must not come from the state that dropout goes on with.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the micro-batches of a step and their counts, and note how far the stream is taken."""
        batches, counts = super().get_batch_samples(*args)
        for batch in batches:
            if _PROGRESS in batch:
                reader, item, *position = batch.pop(_PROGRESS).tolist()
                self._stops[reader] = Stop(item, StreamPosition(*position))
                self._num_batches += 1
        return batches, counts

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(*args)
        if not isinstance(self.train_dataset, StreamingBlocks):
            return epochs, steps
        *_, checkpoint, _ = args
        shows = self.args.process_index == 0
        self._stream.progress = (
            None if checkpoint is None else _read_progress(checkpoint, self.train_dataset, shows=shows)
        )
        # The stream goes on by itself: there is nothing for the Trainer to skip.
        return epochs, 0

    def _save_progress(self, folder: Path) -> None:
        """Write how far all processes have taken the stream."""
        super()._save_progress(folder)
        if not isinstance(self.train_dataset, StreamingBlocks):
            return
        dealt = self._stream.dealt(self.args.dataloader_num_workers)
        # A reader is one process's alone, so the sum over processes is what that one knows.
        known = torch.zeros(
            dealt.num_readers, 2 + len(StreamPosition._fields), dtype=torch.int64, device=self.args.device
        )
        for reader, stop in self._stops.items():
            known[reader] = torch.tensor([1, stop.item, *stop.position])
        rows = self.accelerator.reduce(known, reduction="sum").tolist()
        stops = {
            reader: Stop(item, StreamPosition(*position))
            for reader, (seen, item, *position) in enumerate(rows)
            if seen
        }
        progress = StreamProgress(
            dealt.num_readers,
            num_batches=dealt.num_batches + self._num_batches * self.args.world_size,
            pending=dealt.pending,
            tail=dealt.tail,
            stops={**(dealt.stops or {}), **stops},
        )
        if self.args.should_save:
            stream = self.train_dataset
            state = {"stream": stream.identity(), "cuts": stream.cuts(), "progress": progress.to_json()}
            (folder / STREAM_STATE).write_text(json.dumps(state), encoding="utf-8")


def _read_progress(checkpoint: str, stream: StreamingBlocks, *, shows: bool = True) -> StreamProgress:
    """Return where a checkpoint left a stream, and say which files have been changed since.

    Raises:
        InputError: If it was trained on none, or on another one.
    """
    path = Path(checkpoint, STREAM_STATE)
    if not path.is_file():
        raise InputError(f"resume_from_checkpoint={checkpoint!r} was not trained on a stream: leave out streaming")
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["stream"] != stream.identity():
        raise InputError(
            f"resume_from_checkpoint={checkpoint!r} was trained on another text, or with other options of its stream: "
            "give the files and options that it was made with"
        )
    changed = stream.cut_like(state.get("cuts"))
    if changed and shows:
        print(
            f"changed since {checkpoint} was made: {', '.join(changed)}; the run goes on at the same positions, where a document "
            "may be cut, read twice or left out once",
            flush=True,
        )
    return StreamProgress.from_json(state["progress"])
