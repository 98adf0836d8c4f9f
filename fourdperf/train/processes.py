"""Commands under torchrun: each process takes a share of the items, and what they found is put together."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ["gather", "own_gpu", "place", "processes", "started"]

T = TypeVar("T")


def started() -> tuple[int, int]:
    """This process's number and how many torchrun has started, for work that needs no talk between them; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_gpu() -> int:
    """The number of the GPU that is this process's own, or is shared where a machine runs more processes than it has."""
    return int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """This process's number and how many torchrun has started, with torch.distributed (gloo) for them; (0, 1) alone.

    Each takes a GPU of its own, where there are any.
    """
    rank, ranks = started()
    if ranks == 1:
        yield 0, 1
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(own_gpu())
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # shares may take very different times
    try:
        yield rank, ranks
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's number and how many there are in torch.distributed; (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(found: T) -> list[T]:
    """What each process found, in their order, the same in all of them; of this one alone without others."""
    parts: list = [None] * place()[1]
    if len(parts) == 1:
        return [found]
    dist.all_gather_object(parts, found)
    return parts
