"""Who gets which clip: numbered clips handed to processes and workers, so that a run can go on from any step.

A run visits clips 0, 1, 2, ... of its data set. Step s of a run with `ranks` processes and batches of B takes the
numbers from s B ranks on; process r the r-th B of them. Workers only fetch what they are told.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fourdperf.data.queries import Clip, stack_clips

__all__ = ["BatchNumbers", "Shuffled", "loader"]


class BatchNumbers(Sampler[list[int]]):
    """Endless batches of clip numbers for one of several processes; `first` tells, when an iteration begins, how many
    batches each process has had."""

    def __init__(self, batch_size: int, rank: int, ranks: int, first: Callable[[], int]):
        self.batch_size, self.rank, self.ranks, self.first = batch_size, rank, ranks, first

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first()
        while True:
            start = (batch * self.ranks + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))
            batch += 1


class Shuffled(Dataset[Clip]):
    """A finite data set as an endless one: number i is the (i mod n)-th item of pass i // n, in an order of its own."""

    def __init__(self, dataset: Dataset[Clip], seed: int):
        self.dataset, self.seed, self.count = dataset, seed, len(dataset)
        if not self.count:
            raise ValueError("dataset: wanted at least one clip, got none")

    def __getitem__(self, number: int) -> Clip:
        visit, position = divmod(number, self.count)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + visit))
        return self.dataset[int(order[position])]


def loader(
    dataset: Dataset[Clip], batch_size: int, workers: int, rank: int, ranks: int, first: Callable[[], int]
) -> DataLoader:
    """Endless batches of this process."""
    return DataLoader(
        dataset,
        batch_sampler=BatchNumbers(batch_size, rank, ranks, first),
        collate_fn=stack_clips,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
