"""Small batches with an order of prediction, made by hand."""

import torch

from hf_pretrain.objectives.permutation_lm.two_stream import PermutedBatch

PAD_RANK = 1 << 30
VOCAB = 40


def permuted(lengths=(12, 9, 12), *, seed=0, targets=4, functional=2, segments=True):
    """Rows with an order of the official kind: two halves, the last tokens functional, targets in both."""
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    shape = (len(lengths), size)
    ids = torch.randint(8, VOCAB, shape, generator=generator)
    ranks, thresholds = torch.full(shape, PAD_RANK), torch.zeros(shape, dtype=torch.long)
    columns = torch.zeros(len(lengths), targets, dtype=torch.long)
    for row, length in enumerate(lengths):
        ordinary = length - functional
        chosen = torch.randperm(ordinary, generator=generator)[: targets - row % 2].sort().values
        columns[row, : len(chosen)] = chosen
        for part in (range(length // 2), range(length // 2, length)):
            base = 0 if part.start == 0 else size + 1
            order = torch.randperm(len(part), generator=generator).tolist()
            for rank, column in zip(order, part, strict=True):
                is_target, is_functional = column in chosen.tolist(), column >= ordinary
                ranks[row, column] = base + 1 + rank if is_target or is_functional else base
                thresholds[row, column] = base + 1 + (rank + is_functional if is_target or is_functional else 0)
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    types = (torch.arange(size) >= 7).long().expand(shape).clone() if segments else None
    return PermutedBatch(ids, mask, ranks, thresholds, columns, types)


def slots_of(batch):
    return torch.arange(batch.target_columns.numel())


def labelled(batch):
    """Slots whose target sees something, as the stock model needs it; fillers left out."""
    sees = [
        bool((batch.key_ranks[b] < batch.thresholds[b, c]).any()) and (p == 0 or c > 0)
        for b, row in enumerate(batch.target_columns.tolist())
        for p, c in enumerate(row)
    ]
    return torch.tensor(sees).nonzero().squeeze(1)


def in_order(num_rows=2, length=9, *, seed=0):
    """All tokens are targets, predicted from left to right."""
    ids = torch.randint(8, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(seed))
    ranks = torch.arange(length).expand(num_rows, -1)
    return PermutedBatch(ids, torch.ones_like(ids), ranks, ranks, ranks)
