"""Trains one step of a contrastive loss on two ranks with unequal numbers of examples, from whole and from cached gradients."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_pretrain.objectives.contrastive.losses import (
    ContrastiveObjective,
    VectorBatch,
    gather_batch,
    surrogate,
    vector_gradients,
)

OBJECTIVES = {
    "infonce": ContrastiveObjective(hard_negative_weight=0.7),
    "ranking": ContrastiveObjective(loss="ranking", similarity="dot", margin=1.0),
}
# Sizes of the micro-batches of each rank. The fourth example does not count.
CUTS = ([3, 1], [1, 2])
# The most examples that a rank has: asked for, exact, and more than that.
LARGEST = (None, 4, 6)
FEATURES = 5


def whole_batch():
    """Seven examples of three texts each, whose vectors are inputs of `encoder`."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(21, FEATURES, generator=generator)
    documents = torch.tensor([0, 1, 2, -1, 1, 3, 4])
    # The positive of the last example on the second rank equals that of the first one on the first rank.
    keys = torch.arange(21)
    keys[13] = keys[7]
    return VectorBatch(texts, documents, keys)


def encoder():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())


def encoded(model, batch):
    return batch._replace(vectors=model(batch.vectors))


def share_of_loss(losses, documents):
    """What a Trainer makes of the losses: DDP averages gradients over the ranks, so that they are multiplied by their number."""
    return losses.sum() / (documents != -1).sum() * dist.get_world_size()


def train_whole(objective, batch, largest):
    """Return losses, right answers and gradients; all own examples are one batch."""
    model = DistributedDataParallel(encoder())
    own = encoded(model, batch)
    everyone, offset = gather_batch(own, largest=largest)
    assert everyone.num_examples == 2 * (largest or max(map(sum, CUTS))) and everyone.num_roles == own.num_roles
    result = objective(own, everyone, offset)
    share_of_loss(result.losses, whole_batch().documents).backward()
    return result.losses.detach(), result.correct, [weight.grad for weight in model.parameters()]


def train_cached(objective, batch, largest, sizes):
    """Return the same, where only a micro-batch at a time is encoded with gradient."""
    model = DistributedDataParallel(encoder())
    parts = batch.take_apart(sizes)
    with torch.no_grad():
        vectors = [encoded(model, part) for part in parts]
    found = vector_gradients(objective, vectors, largest=largest)
    assert not any(one.requires_grad for values in found for one in values)
    for number, part in enumerate(parts):
        model.require_backward_grad_sync = number == len(parts) - 1
        losses = surrogate(found.losses[number], encoded(model, part).vectors, found.gradients[number])
        assert torch.equal(losses, found.losses[number])
        share_of_loss(losses, whole_batch().documents).backward()
    return torch.cat(found.losses), torch.cat(found.correct), [weight.grad for weight in model.parameters()]


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert rank == int(os.environ["RANK"])
    own = whole_batch().take_apart([sum(cut) for cut in CUTS])[rank]
    for name, objective in OBJECTIVES.items():
        for largest in LARGEST:
            torch.save(train_whole(objective, own, largest), folder / f"whole-{name}-{largest}-{rank}.pt")
            torch.save(
                train_cached(objective, own, largest, CUTS[rank]), folder / f"cached-{name}-{largest}-{rank}.pt"
            )
