"""Training on a stream, and going on with it after a resume where it was left, without reading what was before.

A process reads its own shards of the text. The micro-batches that were trained on say how far each worker has come,
whatever the workers have read ahead; a checkpoint keeps that in `stream_state.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_pretrain.data.streaming.blocks import Stop, StreamingBlocks, StreamPosition, StreamProgress, TrainingStream
from hf_pretrain.errors import InputError

STREAM_STATE = "stream_state.json"
_PROGRESS = "stream_progress"


class StreamReader:
    """Reads a stream for the Trainer of one process, and knows how far it was taken.

    Args:
        stream: The stream.
        args: Options of the run.
    """

    def __init__(self, stream: StreamingBlocks, args: TrainingArguments) -> None:
        self.stream = stream
        self.args = args
        self._own = TrainingStream(stream, rank=args.process_index, world_size=args.world_size)
        self._stops: dict[int, Stop] = {}
        self._num_batches = 0

    def loader(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], *, batch_size: int) -> DataLoader:
        """Return the loader of this process; accelerate would let each process read all of the text and keep its part."""
        args = self.args
        return DataLoader(
            self._own,
            batch_size=batch_size,
            collate_fn=partial(_collate_with_progress, collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            # The seed that a loader draws when it is opened must not come from the state that dropout goes on with.
            generator=torch.Generator(),
        )

    def note(self, batches: Iterable[dict[str, Any]]) -> None:
        """Take the progress out of the micro-batches of a step, and note it."""
        for batch in batches:
            reader, item, *position = batch.pop(_PROGRESS).tolist()
            self._stops[reader] = Stop(item, StreamPosition(*position))
            self._num_batches += 1

    def resume(self, checkpoint: str | None) -> None:
        """Go on where a checkpoint left the stream, or start anew.

        Raises:
            InputError: If the checkpoint was trained on no stream, or on another one.
        """
        shows = self.args.process_index == 0
        self._own.progress = None if checkpoint is None else _read_progress(checkpoint, self.stream, shows=shows)

    def save(self, folder: Path, *, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write into a checkpoint how far all processes have taken the stream.

        Args:
            folder: The checkpoint.
            reduce: Sums a tensor over the processes.
        """
        dealt = self._own.dealt(self.args.dataloader_num_workers)
        # A reader is one process's alone, so the sum over processes is what that one knows.
        known = torch.zeros(
            dealt.num_readers, 2 + len(StreamPosition._fields), dtype=torch.int64, device=self.args.device
        )
        for reader, stop in self._stops.items():
            known[reader] = torch.tensor([1, stop.item, *stop.position])
        rows = reduce(known).tolist()
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
            state = {"stream": self.stream.identity(), "cuts": self.stream.cuts(), "progress": progress.to_json()}
            (folder / STREAM_STATE).write_text(json.dumps(state), encoding="utf-8")


def _collate_with_progress(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], examples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a batch with how far its reader has come with it."""
    reader, stop = examples[-1]["progress"]
    batch = collate([{name: x for name, x in row.items() if name != "progress"} for row in examples])
    return batch | {_PROGRESS: torch.tensor([reader, stop.item, *stop.position])}


class ShareOfSteps(TrainerCallback):
    """Keeps the epoch of a stream, its share of all steps, right after a resume: nothing is skipped, so nothing is counted."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        state.epoch = state.global_step / state.max_steps


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
