"""GloVe: vectors of words whose products are the logarithms of how often the words occur together.

[`train_glove`] takes the counts of [`hf_pretrain.vectors.counts`]. One epoch visits every count once, in batches. Their
order follows from seed and epoch. [`batch_gradient`] is the mathematics of one batch, [`entry_batches`] the order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from hf_pretrain.data import draws
from hf_pretrain.errors import InputError, RunError, check_choice, check_numbers
from hf_pretrain.files import write_bytes

if TYPE_CHECKING:
    from hf_pretrain.vectors.counts import Cooccurrences

UPDATES = ("torch", "stanford")
CHECKPOINT = "glove.safetensors"
# Entries that lie side by side in the file are read as one block; the blocks of a pool are mixed in memory.
_BLOCK = 1 << 12
_POOL = 1 << 20
# Of update="stanford".
_CLIP = 100.0
# Of update="torch": the squares begin at 0.
_EPSILON = 1e-10
# Rows of a table that are drawn at once.
_ROWS_DRAWN = 1 << 14


@dataclass(frozen=True)
class GloVeOptions:
    """Options of [`train_glove`].

    Attributes:
        dimensions: Width D of the vectors.
        x_max: Count from which on all counts weigh the same: 10 for small corpora, 100 in the paper (6 billion words).
        alpha: Exponent of the weight of smaller counts.
        learning_rate: Step of AdaGrad; the program's is 0.05.
        epochs: Times that each count is visited; 50 in the paper for less than 300 dimensions, else 100.
        batch_size: Counts in a batch.
        seed: Seed of the first vectors and of the order.
        device: Where the vectors are while they are trained.
        update: "torch" is AdaGrad on the gradient of a batch; its sums of squares begin at 0. "stanford" is the rule of the GloVe
            program: the sums begin at 1 and hold the squares of learning rate times gradient, gradients are cut at 100, and
            biases move without learning rate and cut. It equals the program with `batch_size=1`, and needs small batches.

    Raises:
        InputError: If a number is out of range or the update unknown.
    """

    ranges: ClassVar[dict[str, str]] = {
        "dimensions": "[1, 65536]",
        "x_max": "(0, inf)",
        "alpha": "[0, 1]",
        "learning_rate": "(0, inf)",
        "epochs": "[1, 1000000]",
        "batch_size": "[1, 16777216]",
    }

    dimensions: int = 100
    x_max: float = 10.0
    alpha: float = 0.75
    learning_rate: float = 0.1
    epochs: int = 25
    batch_size: int = 65536
    seed: int = 0
    device: str = "cpu"
    update: Literal["torch", "stanford"] = "torch"

    def __post_init__(self) -> None:
        """Refuse numbers out of range and unknown updates."""
        check_numbers(self)
        check_choice(self.update, UPDATES, name="update")


class GloVeResult(NamedTuple):
    """What [`train_glove`] returns.

    Attributes:
        vectors: ``float32 [V, D]`` sum of `words` and `contexts`, the vectors to use.
        words: ``float32 [V, D]`` of the words as rows of the counts.
        contexts: ``float32 [V, D]`` of the words as columns.
        biases: ``float32 [2, V]`` of the rows and of the columns.
        costs: Mean of ``f(x) (w·c + b + b' - ln x)² / 2`` over the counts, one an epoch, each as its batch found it.
    """

    vectors: np.ndarray
    words: np.ndarray
    contexts: np.ndarray
    biases: np.ndarray
    costs: tuple[float, ...]


class Side(NamedTuple):
    """Vectors of one side of the counts, rows or columns, and AdaGrad's sums of squares.

    Attributes:
        vectors: ``[V, D]``.
        biases: ``[V]``.
        vector_squares: ``[V, D]``.
        bias_squares: ``[V]``.
    """

    vectors: torch.Tensor
    biases: torch.Tensor
    vector_squares: torch.Tensor
    bias_squares: torch.Tensor


class SideGradient(NamedTuple):
    """Gradient of the cost of a batch for the words of one side that occur in it.

    Attributes:
        rows: ``int64 [U]`` the words, ascending.
        vectors: ``[U, D]``.
        biases: ``[U]``.
    """

    rows: torch.Tensor
    vectors: torch.Tensor
    biases: torch.Tensor


def train_glove(
    cooccurrences: Cooccurrences, options: GloVeOptions | None = None, *, checkpoint_folder: Path | str | None = None
) -> GloVeResult:
    """Train GloVe's vectors.

    A run with a checkpoint goes on after its last whole epoch, with the bits that it would have had; it may have more epochs.

    Args:
        cooccurrences: Counts of words with words, `[V, V]`, each above 0. Memory-mapped ones are read block by block.
        options: Options; by default those of [`GloVeOptions`].
        checkpoint_folder: Folder for the state after each epoch. Without it nothing is kept.

    Returns:
        The vectors, see [`GloVeResult`].

    Raises:
        InputError: If the counts are not square, none or not above 0, or a checkpoint is one of other counts or options.
        RunError: If the cost is not finite.

    Source:
        Pennington, Socher and Manning, "GloVe: Global Vectors for Word Representation", EMNLP 2014, section 3 and 4.2.
    """
    options = GloVeOptions() if options is None else options
    _check_counts(cooccurrences)
    identity = _identity(cooccurrences, options)
    file = None if checkpoint_folder is None else Path(checkpoint_folder) / CHECKPOINT
    if file is not None and file.exists():
        words, contexts, costs = _read_checkpoint(file, identity, options)
    else:
        words, contexts = (_first_side(cooccurrences.shape[0], options, stream) for stream in ("words", "contexts"))
        costs = []
    for epoch in range(len(costs), options.epochs):
        costs.append(_run_epoch(cooccurrences, words, contexts, options, epoch=epoch))
        if file is not None:
            _write_checkpoint(file, words, contexts, costs, identity)
    arrays = [side.vectors.cpu().numpy() for side in (words, contexts)]
    biases = np.stack([side.biases.cpu().numpy() for side in (words, contexts)])
    return GloVeResult(arrays[0] + arrays[1], arrays[0], arrays[1], biases, tuple(costs))


def batch_gradient(
    words: Side,
    contexts: Side,
    rows: torch.Tensor,
    columns: torch.Tensor,
    counts: torch.Tensor,
    options: GloVeOptions,
) -> tuple[torch.Tensor, SideGradient, SideGradient]:
    """Return the cost of a batch and its gradients, summed over the batch.

    Args:
        words: Vectors of the rows.
        contexts: Vectors of the columns.
        rows: ``int64 [B]`` row of each count.
        columns: ``int64 [B]`` column of each count.
        counts: ``[B]`` the counts.
        options: `x_max` and `alpha` are used, and `update`, as "stanford" cuts each component of each count's gradient.

    Returns:
        Sum of ``f(x) (w·c + b + b' - ln x)² / 2``, ``float64 []``; and the gradients of both sides.
    """
    used_rows, at_rows = torch.unique(rows, return_inverse=True)
    used_columns, at_columns = torch.unique(columns, return_inverse=True)
    # Rows are gathered by index_select: on a CPU, indexing takes many times as long.
    words_BD = words.vectors.index_select(0, used_rows).index_select(0, at_rows)  # noqa: N806
    contexts_BD = contexts.vectors.index_select(0, used_columns).index_select(0, at_columns)  # noqa: N806
    error = torch.einsum("bd,bd->b", words_BD, contexts_BD)
    error += words.biases.index_select(0, rows) + contexts.biases.index_select(0, columns) - counts.log()
    slope = (counts / options.x_max).clamp_(max=1).pow_(options.alpha) * error
    cost = 0.5 * torch.dot(slope.double(), error.double())
    by_word, by_context = contexts_BD.mul_(slope[:, None]), words_BD.mul_(slope[:, None])
    if options.update == "stanford":
        by_word.clamp_(-_CLIP, _CLIP)
        by_context.clamp_(-_CLIP, _CLIP)
    return (
        cost,
        SideGradient(used_rows, _sums(by_word, at_rows, used_rows), _sums(slope, at_rows, used_rows)),
        SideGradient(
            used_columns, _sums(by_context, at_columns, used_columns), _sums(slope, at_columns, used_columns)
        ),
    )


def _sums(values: torch.Tensor, at: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Sum the values of each word, in a fixed order."""
    sums = values.new_zeros(len(used), *values.shape[1:])
    if values.is_cuda:  # where index_add_ adds in any order
        return sums.index_put_((at,), values, accumulate=True)
    return sums.index_add_(0, at, values)


def update_side(side: Side, gradient: SideGradient, options: GloVeOptions) -> None:
    """Make one step of AdaGrad, in place, on the words that have a gradient.

    Args:
        side: Vectors and sums of squares.
        gradient: Gradient of a batch.
        options: `learning_rate` and `update` are used.
    """
    rows, rate = gradient.rows, options.learning_rate
    if options.update == "stanford":
        # A step divides by the sum before its own square; biases move without the rate.
        pairs = (
            (side.vectors, side.vector_squares, gradient.vectors * rate),
            (side.biases, side.bias_squares, gradient.biases),
        )
        for table, squares, step in pairs:
            known = squares.index_select(0, rows)
            table.index_copy_(0, rows, table.index_select(0, rows).addcdiv_(step, known.sqrt(), value=-1))
            squares.index_copy_(0, rows, known.addcmul_(step, step))
        return
    for table, squares, slope in (
        (side.vectors, side.vector_squares, gradient.vectors),
        (side.biases, side.bias_squares, gradient.biases),
    ):
        known = squares.index_select(0, rows).addcmul_(slope, slope)
        squares.index_copy_(0, rows, known)
        root = known.sqrt_().add_(_EPSILON)
        table.index_copy_(0, rows, table.index_select(0, rows).addcdiv_(slope, root, value=-rate))


def entry_batches(
    cooccurrences: Cooccurrences, *, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield each count of an epoch once, in an order that follows from seed and epoch.

    Blocks of neighbours are taken in a random order, as many as fill a pool; the counts of a pool are mixed in memory. So counts
    on disk are read in long stretches and never copied as a whole.

    Args:
        cooccurrences: The counts.
        batch_size: Most counts in a batch; the last batch of a pool may have fewer.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Yields:
        Rows ``int32 [B]``, columns ``int32 [B]`` and counts ``float32 [B]``.
    """
    num_entries = len(cooccurrences.values)
    blocks = draws.permutation(-(-num_entries // _BLOCK), seed=seed, epoch=epoch, stream="glove_blocks")
    blocks_of_pool = max(1, _POOL // _BLOCK)
    for number, begin in enumerate(range(0, len(blocks), blocks_of_pool)):
        ends = [(block * _BLOCK, (block + 1) * _BLOCK) for block in blocks[begin : begin + blocks_of_pool].tolist()]
        pool_seed = draws.generator_seed(number, seed=seed, stream="glove_pool")
        arrays = (cooccurrences.rows, cooccurrences.columns, cooccurrences.values)
        rows, columns, values = (np.concatenate([array[start:end] for start, end in ends]) for array in arrays)
        order = draws.permutation(len(rows), seed=pool_seed, epoch=epoch, stream="glove_entries")
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            yield rows[batch], columns[batch], values[batch].astype(np.float32, copy=False)


def _run_epoch(
    cooccurrences: Cooccurrences, words: Side, contexts: Side, options: GloVeOptions, *, epoch: int
) -> float:
    """Train on each count once and return the mean cost."""
    num_entries, device, seen = len(cooccurrences.values), torch.device(options.device), 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    batches = entry_batches(cooccurrences, batch_size=options.batch_size, seed=options.seed, epoch=epoch)
    what = f"GloVe, epoch {epoch + 1} of {options.epochs}"
    with tqdm(total=num_entries, desc=what, unit=" counts", unit_scale=True, delay=2, disable=None) as bar:
        for arrays in batches:
            rows, columns, counts = (torch.from_numpy(array).to(device) for array in arrays)
            rows, columns = rows.long(), columns.long()
            cost, of_words, of_contexts = batch_gradient(words, contexts, rows, columns, counts, options)
            update_side(words, of_words, options)
            update_side(contexts, of_contexts, options)
            total += cost
            seen += len(rows)
            # A read waits for the device, so only the bar's own refreshes cause one.
            if bar.update(len(rows)):
                bar.set_postfix(cost=f"{total.item() / seen:.4f}", refresh=False)
    mean = total.item() / num_entries
    if not np.isfinite(mean):
        raise RunError(
            f"the cost of epoch {epoch + 1} is not finite: lower learning_rate={options.learning_rate}"
            + (f" or batch_size={options.batch_size}" if options.update == "stanford" else "")
        )
    return mean


def _first_side(num_words: int, options: GloVeOptions, stream: str) -> Side:
    """Draw first vectors and biases, uniform on ±1/2D."""
    width = options.dimensions
    table = np.empty((num_words, width + 1), dtype=np.float32)
    for begin in range(0, num_words, _ROWS_DRAWN):
        ids = np.arange(begin, min(begin + _ROWS_DRAWN, num_words))
        keys = draws.row_keys(ids, seed=options.seed, stream=f"glove_{stream}")
        table[ids] = (draws.uniforms(keys, width + 1) - 0.5) / width
    drawn = torch.from_numpy(table).to(options.device)
    start = 1.0 if options.update == "stanford" else 0.0
    vectors, biases = drawn[:, :width].contiguous(), drawn[:, width].contiguous()
    return Side(vectors, biases, torch.full_like(vectors, start), torch.full_like(biases, start))


def _check_counts(cooccurrences: Cooccurrences) -> None:
    """Refuse counts that have no logarithm or no square table."""
    rows, columns = cooccurrences.shape
    if rows != columns:
        raise InputError(
            f"cooccurrences of shape {rows} x {columns}: GloVe adds the vectors of rows and columns, so count with the direction "
            "'both', 'left' or 'right'"
        )
    num_entries = len(cooccurrences.values)
    if not num_entries:
        raise InputError("cooccurrences has no count: give more text, or lower min_count")
    for begin in range(0, num_entries, _POOL):
        lowest = cooccurrences.values[begin : begin + _POOL].min()
        if not lowest > 0:
            raise InputError(
                f"cooccurrences holds the count {lowest}, which has no logarithm: leave out all that are not above 0"
            )


def _identity(cooccurrences: Cooccurrences, options: GloVeOptions) -> dict[str, Any]:
    """Return what has to be equal for a run to go on from a checkpoint."""
    values = cooccurrences.values
    total = sum(float(values[begin : begin + _POOL].sum(dtype=np.float64)) for begin in range(0, len(values), _POOL))
    known = {name: value for name, value in asdict(options).items() if name not in ("epochs", "device")}
    return known | {"words": int(cooccurrences.shape[0]), "counts": len(values), "sum_of_counts": total}


def _write_checkpoint(
    file: Path, words: Side, contexts: Side, costs: list[float], identity: Mapping[str, Any]
) -> None:
    tensors = {
        f"{name}.{field}": tensor.cpu()
        for name, side in (("words", words), ("contexts", contexts))
        for field, tensor in side._asdict().items()
    }
    write_bytes(file, save(tensors, {"state": json.dumps({"costs": costs, "identity": identity})}))


def _read_checkpoint(file: Path, identity: Mapping[str, Any], options: GloVeOptions) -> tuple[Side, Side, list[float]]:
    with safe_open(file, framework="pt") as content:
        state = json.loads(content.metadata()["state"])
        sides = [
            Side(*(content.get_tensor(f"{name}.{field}").to(options.device) for field in Side._fields))
            for name in ("words", "contexts")
        ]
    changed = next((name for name, value in identity.items() if state["identity"].get(name) != value), None)
    if changed is not None:
        raise InputError(
            f"{file} was written with {changed}={state['identity'].get(changed)!r}, and this run has {identity[changed]!r}: use "
            "the same options and counts, or another folder"
        )
    if len(state["costs"]) > options.epochs:
        raise InputError(
            f"epochs={options.epochs} are fewer than the {len(state['costs'])} of {file}: raise them, or use another folder"
        )
    return sides[0], sides[1], state["costs"]
