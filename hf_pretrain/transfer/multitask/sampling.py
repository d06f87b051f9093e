"""Which task a step is of, and which rows it has: both are functions of the seed and the step, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import datasets
import numpy as np
from torch.utils.data import Dataset, Sampler

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, check_choice, check_range

Sampling = Literal["proportional", "equal", "temperature", "capped", "annealed", "weights"]
TASK = "task"
"""Entry of an example and of a batch with the name of its task."""

_ANNEALED_BY = 0.8
# Orders of passes that a task keeps: a step may end one and begin the next.
_KEPT_PASSES = 2


def task_probabilities(
    sizes: Sequence[int],
    *,
    sampling: Sampling = "proportional",
    temperature: float = 2.0,
    cap: int = 2**16,
    weights: Sequence[float] | None = None,
    progress: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return how probable each task is for a step.

    Args:
        sizes: ``[T]`` examples of each task, n.
        sampling: "proportional" to n, "equal", "temperature" (n^(1/temperature)), "capped" (min(n, cap)), "annealed" (from n at
            the beginning to n^0.2 at the end), or "weights".
        temperature: Of "temperature"; 1 is proportional, and more is more even.
        cap: Of "capped": a larger task counts as one of so many examples.
        weights: ``[T]`` of "weights": any positive numbers.
        progress: Share of training that is done, from 0 to 1, for "annealed"; a number, or ``[S]``.

    Returns:
        ``[T]`` probabilities, or ``[S, T]`` for ``[S]`` shares.

    Raises:
        InputError: If a task has no examples, or an option is out of range.

    Sources: Raffel et al. 2020, section 3.5.2 (temperature, cap); Stickland and Murray 2019, "BERT and PALs", section 4.1
        (annealed; there it changes with the epoch, here with the step).
    """
    check_choice(sampling, get_args(Sampling), name="sampling")
    sizes_T = np.asarray(sizes, dtype=np.float64)
    if sizes_T.ndim != 1 or not len(sizes_T) or (sizes_T < 1).any():
        raise InputError(f"sizes={list(sizes)} must be one number of examples a task, each 1 or more")
    progress_S = np.asarray(progress, dtype=np.float64)
    check_range(float(progress_S.min()), "[0, 1]", name="progress")
    check_range(float(progress_S.max()), "[0, 1]", name="progress")
    if sampling == "weights":
        found = np.asarray(() if weights is None else weights, dtype=np.float64)
        if found.shape != sizes_T.shape or not np.isfinite(found).all() or (found <= 0).any():
            raise InputError(f"weights={weights} must be {len(sizes_T)} positive numbers, one a task")
    elif sampling == "capped":
        check_range(cap, "[1, inf)", name="cap")
        found = np.minimum(sizes_T, cap)
    else:
        check_range(temperature, "(0, inf)", name="temperature")
        powers = {"proportional": 1.0, "equal": 0.0, "temperature": 1.0 / temperature}
        power = 1.0 - _ANNEALED_BY * progress_S[..., None] if sampling == "annealed" else powers[sampling]
        # The largest task is 1, so that no power overflows.
        found = (sizes_T / sizes_T.max()) ** power
    found = np.broadcast_to(found, (*progress_S.shape, len(sizes_T)))
    return found / found.sum(axis=-1, keepdims=True)


def tasks_of_steps(sizes: Sequence[int], *, num_steps: int, total_steps: int, seed: int, **options: Any) -> np.ndarray:
    """Draw the task of each step.

    Args:
        sizes: ``[T]`` examples of each task.
        num_steps: Steps to draw, from the first one on; a longer draw begins with a shorter one.
        total_steps: Steps of the whole training, in which "annealed" ends.
        seed: Seed of the run.
        **options: Those of [`task_probabilities`].

    Returns:
        ``[num_steps]`` numbers of tasks.
    """
    steps = np.arange(num_steps)
    progress_S = np.minimum(steps / max(total_steps - 1, 1), 1.0)
    limits_ST = task_probabilities(sizes, progress=progress_S, **options).cumsum(axis=-1)
    draws_S1 = draws.uniforms(draws.row_keys(steps, seed=seed, stream="task of a step"), 1)
    # The last limit may be a rounding below 1.
    return (draws_S1 >= limits_ST[:, :-1]).sum(axis=-1)


class TaskRows(Dataset[dict[str, Any]]):
    """The encoded examples of one task, each with its name as the entry `task`."""

    def __init__(self, name: str, rows: datasets.Dataset) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example."""
        return {**self.rows[index], TASK: self.name}


class MultiTaskRows(Dataset[dict[str, Any]]):
    """The encoded examples of several tasks, one task after the other.

    Args:
        tasks: The examples of each task by its name.

    Attributes:
        names: The names in their order.
        offsets: ``[T + 1]`` index of the first example of each task, and the number of all.
    """

    def __init__(self, tasks: Mapping[str, datasets.Dataset]) -> None:
        self.tasks = dict(tasks)
        self.names = list(self.tasks)
        self.offsets = np.cumsum([0, *(len(rows) for rows in self.tasks.values())])

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each task."""
        return [len(rows) for rows in self.tasks.values()]

    def __len__(self) -> int:
        """Return the number of examples of all tasks."""
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example with the name of its task."""
        number = int(np.searchsorted(self.offsets, index, side="right")) - 1
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        name = self.names[number]
        return {**self.tasks[name][index - int(self.offsets[number])], TASK: name}


class MultiTaskSampler(Sampler[int]):
    """Yields the rows of each step from one task, as indices of [`MultiTaskRows`].

    A task goes on where its last step ended: each of its rows comes once a pass, whatever the other tasks do. The rows that are
    left at the end of a pass begin a step that the next pass fills up.

    Args:
        sizes: ``[T]`` examples of each task.
        orders: The order of the rows of a task in a pass: functions of the number of the pass, one a task.
        tasks: ``[num_epochs * steps_per_epoch]`` the task of each step; see [`tasks_of_steps`].
        batch_size: Examples of a step, over all devices and accumulation steps.
        steps_per_epoch: Steps of an epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        orders: Sequence[Callable[[int], np.ndarray]],
        *,
        tasks: np.ndarray,
        batch_size: int,
        steps_per_epoch: int,
    ) -> None:
        self.sizes, self.orders, self.tasks = list(sizes), orders, tasks
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.offsets = np.cumsum([0, *sizes])
        self.epoch = 0
        self._kept: list[dict[int, np.ndarray]] = [{} for _ in self.sizes]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of indices that an epoch yields."""
        return self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the current epoch."""
        return self._indices(self.epoch)

    def _indices(self, epoch: int) -> Iterator[int]:
        first = epoch * self.steps_per_epoch
        done = np.bincount(self.tasks[:first], minlength=len(self.sizes))
        for task in self.tasks[first : first + self.steps_per_epoch].tolist():
            yield from self._step(task, int(done[task]))
            done[task] += 1

    def _step(self, task: int, number: int) -> list[int]:
        """Return the indices of a step of a task, of which so many steps (`number`) were before."""
        rows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        passes, places = np.divmod(rows, self.sizes[task])
        found = [self._order(task, one)[places[passes == one]] for one in range(int(passes[0]), int(passes[-1]) + 1)]
        return [int(row) for row in np.concatenate(found) + self.offsets[task]]

    def _order(self, task: int, number: int) -> np.ndarray:
        kept = self._kept[task]
        if number not in kept:
            while len(kept) >= _KEPT_PASSES:
                del kept[min(kept)]
            kept[number] = self.orders[task](number)
        return kept[number]
