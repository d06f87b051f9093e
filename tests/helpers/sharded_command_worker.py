"""Runs commands as `command_ranks_worker` does, with FSDP2 on two ranks of a CPU."""

from helpers import command_ranks_worker
from helpers.sharded_worker import shard_on_a_cpu


def main(folder):
    shard_on_a_cpu()
    command_ranks_worker.main(folder)
