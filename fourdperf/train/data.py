"""Which clips a run trains on, and who gets which.

A run visits clips 0, 1, 2, ... of its data set. Batch s of a run with `ranks` processes and batches of B takes the
numbers from s ranks B on; process r the r-th B of them. Workers only fetch what they are told. So a run can go on from
any step, and does not depend on the number of workers.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from fourdperf.data.open_dataset import open_dataset
from fourdperf.data.queries import Clip, stack_clips
from fourdperf.data.seed_dataset import IntrinsicsUnits, SeedDataset
from fourdperf.data.synthetic import clip_generator
from fourdperf.data.video_dataset import ClipConfig

__all__ = ["BatchNumbers", "Shuffled", "collate", "loader", "open_clips", "stream_loader"]


def open_clips(
    path: str, config: ClipConfig, *, seed: int = 0, endless: bool = True, intrinsics: IntrinsicsUnits = "pixels"
) -> Dataset[Clip]:
    """Clips of a folder of videos (`fourdperf.data.open_dataset`), or of a user's own data set, `package.module:name`:
    a class or function that takes no arguments and gives a map-style data set of Clips or of the seed's dictionaries.

    endless: for training, where finite data sets are visited pass after pass. intrinsics: the unit of those in
    dictionaries; `config` is the data set's own affair there, but its clips must have the config's shape.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a module.
        ValueError: the folder or the data set does not hold what it should; of the data set's items, the first is read.
    """
    if os.path.exists(path) or ":" not in path:
        clips = open_dataset(path, config, seed)
        if isinstance(clips, IterableDataset) and not endless:
            clips.passes = 1
        return clips
    clips = _own_clips(path, intrinsics)
    shape, wanted = tuple(clips[0].video.shape), (config.num_frames, config.image_size, config.image_size, 3)
    if shape != wanted:
        raise ValueError(f"{path}: its clips have a video {shape}, but --num_frames and --img_size ask for {wanted}")
    return Shuffled(clips, seed) if endless else clips


def _own_clips(path: str, intrinsics: IntrinsicsUnits) -> Dataset[Clip]:
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not look where it is called
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"{path}: no folder of this name, and no module: {error}") from error
    if not callable(factory):
        raise ValueError(f"{path}: wanted a class or function {name!r} in {module}, got {factory!r}")
    dataset = factory()
    for method in ("__getitem__", "__len__"):
        if not hasattr(dataset, method):
            raise ValueError(f"{path}: wanted a data set with {method}, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"{path}: wanted at least one clip, got none")
    return dataset if isinstance(dataset[0], Clip) else SeedDataset(dataset, intrinsics=intrinsics)


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


class Shuffled(Dataset):
    """A finite data set as an endless one: number i is item i mod n of pass i // n, each pass in an order of its own;
    its length is that of a pass. Where the data set has `visited(item, visit)`, it gives the item of each pass."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed, self.last = dataset, seed, (-1, None)
        if not len(dataset):
            raise ValueError("dataset: wanted at least one clip, got none")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int):
        visit, position = divmod(number, len(self.dataset))
        if self.last[0] != visit:
            generator = clip_generator(self.seed, 2**32 - 1 - visit)
            self.last = visit, torch.randperm(len(self.dataset), generator=generator)
        item, visited = int(self.last[1][position]), getattr(self.dataset, "visited", None)
        return self.dataset[item] if visited is None else visited(item, visit)


def collate(clips: Sequence[Clip]) -> Clip:
    """A batch of clips.

    Raises:
        ValueError: they differ in size or in the number of queries.
    """
    for name, get in {
        "video (T, H, W, 3)": lambda clip: clip.video,
        "patch_video (T, H, W, 3)": lambda clip: clip.patch_video,
        "queries' uv (N, 2)": lambda clip: clip.queries.uv,
    }.items():
        shapes = sorted({tuple(get(clip).shape) for clip in clips})
        if len(shapes) > 1:
            raise ValueError(f"clips of a batch: wanted {name} of one shape, got {shapes}; --batch_size 1 takes any")
    return stack_clips(clips)


def loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    rank: int,
    ranks: int,
    first: Callable[[], int],
    collate_fn: Callable | None = collate,
) -> DataLoader:
    """Endless batches of this process, from its `first()`-th on; collate_fn: None is torch's own."""
    return DataLoader(
        dataset,
        batch_sampler=BatchNumbers(batch_size, rank, ranks, first),
        collate_fn=collate_fn,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def stream_loader(dataset: IterableDataset[Clip], batch_size: int, workers: int) -> DataLoader:
    """Batches of a stream, which shares itself out among processes and workers."""
    return DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers, drop_last=False)
