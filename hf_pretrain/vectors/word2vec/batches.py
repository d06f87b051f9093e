"""Skip-gram and CBOW in torch: large batches on any device, AdaGrad, gradients by formula.

A batch is a stretch of the corpus. Its size follows from the options, so its bounds depend on the position alone. Plain gradient
descent on a large batch sums the steps of thousands of pairs of a frequent word and diverges. AdaGrad takes steps of about the
learning rate.
Runs on the CPU repeat bit for bit; sums on a GPU are added in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from hf_pretrain.data.device_draws import bits, shifted

if TYPE_CHECKING:
    from hf_pretrain.vectors.word2vec.tables import AliasTable, HuffmanCodes
    from hf_pretrain.vectors.word2vec.training import Stretch, Word2VecOptions

_LOW = 0xFFFFFFFF
_EPSILON = 1e-10


def draw_noise(
    keys: torch.Tensor, numbers: torch.Tensor, thresholds: torch.Tensor, aliases: torch.Tensor
) -> torch.Tensor:
    """Return words of noise, the same as the kernel draws.

    Args:
        keys: ``int64``, bits of the keys of centre words.
        numbers: ``int64`` numbers of the draws, from 0; both are broadcast.
        thresholds: ``int64 [V]``, of `AliasTable`.
        aliases: ``int64 [V]``, of the same.

    Returns:
        ``int64`` ids of words.
    """
    drawn = bits(keys, numbers)
    columns = (shifted(drawn, 32) * len(thresholds)) >> 32
    return torch.where((drawn & _LOW) < thresholds[columns], columns, aliases[columns])


class Gradients(NamedTuple):
    """What the rows of both tables are to gain, for the sum of the losses of a batch: the negative gradients.

    Attributes:
        input_rows: ``int64 [N]``, rows of `inputs`; one may occur many times.
        input_steps: ``float32 [N, D]``.
        output_rows: ``int64 [M]``.
        output_steps: ``float32 [M, D]``.
        loss: Sum of the losses, a scalar.
        pairs: Number of pairs.
    """

    input_rows: torch.Tensor
    input_steps: torch.Tensor
    output_rows: torch.Tensor
    output_steps: torch.Tensor
    loss: torch.Tensor
    pairs: int


class TorchBackend:
    """The torch backend: the vectors, and what learns them.

    Args:
        state: `inputs` and `outputs` to begin with; `input_squares` and `output_squares`, AdaGrad's sums, of a resumed run.
        table: Distribution of the noise, or paths of the tree.
        options: The options.
        pairs_per_word: Pairs of skip-gram for a word of the corpus, from which the size of a stretch follows.
    """

    def __init__(
        self,
        state: Mapping[str, np.ndarray],
        table: HuffmanCodes | AliasTable,
        options: Word2VecOptions,
        *,
        pairs_per_word: float,
    ) -> None:
        self.options, self.device = options, torch.device(options.device or "cpu")
        self.positions = max(1, round(options.batch_size / max(pairs_per_word, 1e-9)))
        self.inputs, self.outputs = self._tensor(state["inputs"]), self._tensor(state["outputs"])
        self.squares = [
            self._tensor(state[name]) if name in state else torch.zeros_like(like)
            for name, like in (("input_squares", self.inputs), ("output_squares", self.outputs))
        ]
        self.offsets = self._tensor([*range(-options.window, 0), *range(1, options.window + 1)])
        # Thresholds and aliases, or offsets, nodes and bits.
        self.table = [self._tensor(column.astype(np.int64)) for column in table]
        if options.hierarchical:
            self.depth = self._tensor(np.arange(int(np.diff(table[0]).max())))

    def learn(self, stretch: Stretch) -> tuple[float, int]:
        """Take one step of AdaGrad on the pairs of a stretch."""
        if not len(stretch.keys):
            return 0.0, 0
        found = self.gradients(stretch)
        rate = float(stretch.rates.mean(dtype=np.float64))
        _adagrad(self.inputs, self.squares[0], found.input_rows, found.input_steps, rate)
        _adagrad(self.outputs, self.squares[1], found.output_rows, found.output_steps, rate)
        return float(found.loss), found.pairs

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the vectors, and AdaGrad's sums."""
        names = ("inputs", "outputs", "input_squares", "output_squares")
        tensors = (self.inputs, self.outputs, *self.squares)
        return {name: tensor.cpu().numpy().copy() for name, tensor in zip(names, tensors, strict=True)}

    def gradients(self, stretch: Stretch) -> Gradients:
        """Return the gradients of all pairs of a stretch with the vectors as they are."""
        options = self.options
        words, keys = self._tensor(stretch.words), self._tensor(stretch.keys.view(np.int64))
        before, after = self._tensor(stretch.before)[:, None], self._tensor(stretch.after)[:, None]
        places = torch.arange(stretch.first, stretch.first + len(keys), device=self.device)
        in_window = (self.offsets >= -before) & (self.offsets <= after)
        contexts = words[(places[:, None] + self.offsets).clamp(0, len(words) - 1)].long()
        targets, first = words[places].long(), torch.zeros_like(keys)
        if options.mode == "skipgram" and not options.shared_negatives:
            # Each pair is an example of its own, with its own draws.
            centre, place = in_window.nonzero(as_tuple=True)
            contexts, in_window = contexts[centre, place][:, None], torch.ones_like(centre, dtype=torch.bool)[:, None]
            targets, keys, first = targets[centre], keys[centre], place * options.negatives
        rows, labels, is_used = self._outputs(targets, keys, first)
        hidden, mask = self.inputs[contexts] * in_window[..., None], in_window
        sizes = in_window.sum(1).clamp(min=1)[:, None, None]
        if options.mode == "cbow":
            hidden, mask = hidden.sum(1, keepdim=True) / sizes, in_window.any(1, keepdim=True)
        outputs, used = self.outputs[rows], mask[:, :, None] & is_used[:, None, :]
        scores = hidden @ outputs.mT
        signs = (2 * labels - 1)[:, None, :]
        loss = -(logsigmoid(signs * scores) * used).sum(dtype=torch.float64)
        slopes = signs * torch.sigmoid(-signs * scores) * used
        steps = slopes @ outputs
        if options.mode == "cbow":
            steps = steps / sizes if options.cbow_gradient == "mean" else steps
            steps = steps.expand(-1, in_window.shape[1], -1)
        chosen = in_window.flatten().nonzero()[:, 0]
        return Gradients(
            contexts.flatten()[chosen],
            steps.reshape(-1, steps.shape[-1])[chosen],
            rows.flatten(),
            (slopes.mT @ hidden).flatten(0, 1),
            loss,
            int(mask.sum()),
        )

    def _outputs(
        self, targets: torch.Tensor, keys: torch.Tensor, first: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return which rows each target predicts, their labels, and which of them count, all ``[C, K]``."""
        if self.options.hierarchical:
            offsets, nodes, bits = self.table
            begin, end = offsets[targets][:, None], offsets[targets + 1][:, None]
            places = begin + self.depth
            is_used, places = places < end, places.clamp(max=len(nodes) - 1)
            return nodes[places], 1 - bits[places], is_used
        numbers = first[:, None] + torch.arange(self.options.negatives, device=self.device)
        noise = draw_noise(keys[:, None], numbers, *self.table)
        rows = torch.cat([targets[:, None], noise], 1)
        labels = torch.zeros_like(rows)
        labels[:, 0] = 1
        is_used = (rows != targets[:, None]) | labels.bool()
        return rows, labels, is_used

    def _tensor(self, values: np.ndarray | list[int]) -> torch.Tensor:
        """Copy values to the device."""
        return torch.tensor(values, device=self.device)


def _adagrad(table: torch.Tensor, squares: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, rate: float) -> None:
    """Move each row by the sum of its steps over the root of its squares so far (Duchi, Hazan and Singer 2011, figure 1)."""
    is_touched = torch.zeros(len(table), dtype=torch.int64, device=table.device)
    is_touched[rows] = 1
    own = is_touched.nonzero()[:, 0]
    place = is_touched.cumsum(0) - 1
    sums = torch.zeros(len(own), table.shape[1], device=table.device).index_add_(0, place[rows], steps)
    total = squares[own] + sums * sums
    squares[own] = total
    table[own] += rate * sums / (total.sqrt() + _EPSILON)
