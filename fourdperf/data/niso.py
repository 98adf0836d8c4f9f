"""What Neural Isometries learn from: pairs of one thing before and after a transformation, and videos with cameras.

    ShiftedImages      {"x": (H, W, K C), "Tx": as x, "shift": (2,) int64}    K images, rolled around the torus
    HomographyPairs    {"x": (H, W, C), "Tx": as x, "label": int}             an image, and seen through a homography
    WarpedImages       {"x": (H, W, C), "label": int}                         an image seen through a homography
    ShapePairs         {"x": (H, W, C), "Tx": as x, "label": int}             two Moebius-warped maps of one shape
    WarpedShapes       {"x": (H, W, C), "label": int}
    SequenceWindows    {"video": (T, H, W, 3), "poses": (T, 4, 4), "intrinsics": (T, 3, 3)}

All float32, in [0, 1] where the source is. Numbers run from 0 without end: number n is item n mod N of pass n // N.
Each pass has an order and warps of its own, which depend on the seed alone, not on workers, processes or batches;
without `shuffle` the order is the source's. The length N is that of a pass. DataLoader asks for batches
(`__getitems__`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from fourdperf.data import warps
from fourdperf.data.niso_shards import ItemSource, SequenceSource
from fourdperf.data.synthetic import clip_generator
from fourdperf.data.toric import random_shifts, shift_images

__all__ = [
    "HomographyPairs",
    "InMemory",
    "SequenceWindows",
    "ShapePairs",
    "ShiftedImages",
    "WarpedImages",
    "WarpedShapes",
    "draw_pairs",
    "mirrored",
    "pair_indices",
]

ORDER = 2**32 - 1  # pass v's order is drawn like number ORDER - v


class InMemory(Dataset):
    """The items of a source, read once; `classes` are its own."""

    def __init__(self, source: ItemSource):
        items = [source[i] for i in range(len(source))]
        self.classes = getattr(source, "classes", ())
        self.x, self.labels = torch.stack([item["x"] for item in items]), [int(item["label"]) for item in items]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "label": self.labels[index]}


class _Visits(Dataset, ABC):
    """Batches of (item, randomness) by number."""

    def __init__(self, source: ItemSource | SequenceSource, seed: int, shuffle: bool):
        if not len(source):
            raise ValueError("source: wanted at least one item, got none")
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> dict:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict]:
        return self._batch([self._index(int(n)) for n in numbers], [clip_generator(self.seed, int(n)) for n in numbers])

    def _index(self, number: int) -> int:
        visit, position = divmod(number, len(self))
        if not self.shuffle:
            return position
        if self._last[0] != visit:
            self._last = visit, torch.randperm(len(self), generator=clip_generator(self.seed, ORDER - visit))
        return int(self._last[1][position])

    @abstractmethod
    def _batch(self, indices: list[int], generators: list[Generator]) -> list[dict]:
        """What the items become, each by its own generator."""


class ShiftedImages(_Visits):
    """Item i begins with image i; the others that are stacked with it are drawn from all.

    Args:
        source: the images.
        stack: K; by default as many as give a few channels more than there are pixels, so that maps of all functions on
            them are determined.
    """

    def __init__(self, source: ItemSource, *, stack: int | None = None, seed: int = 0, shuffle: bool = True):
        super().__init__(source, seed, shuffle)
        height, width, channels = source[0]["x"].shape
        self.stack = math.ceil((height * width + 10) / channels) if stack is None else stack
        if not 1 <= self.stack <= len(source):
            raise ValueError(f"stack: wanted from 1 to the {len(source)} images there are, got {self.stack}")

    def _batch(self, indices, generators):
        batch = []
        for index, generator in zip(indices, generators):
            others = torch.randperm(len(self) - 1, generator=generator)[: self.stack - 1]
            others += others >= index  # all different, lest the channels be dependent
            x = torch.cat([self.source[i]["x"] for i in (index, *others.tolist())], -1)
            shift = random_shifts(1, x.shape[:2], generator)
            batch.append({"x": x, "Tx": shift_images(x[None], shift)[0], "shift": shift[0]})
        return batch


class HomographyPairs(_Visits):
    """Args:
    source: the images.
    spread: how far homographies are from the identity, see `fourdperf.data.warps`.
    upstream_border: of `warps.sample`.
    """

    def __init__(
        self,
        source: ItemSource,
        *,
        spread: float = warps.SPREAD,
        seed: int = 0,
        shuffle: bool = True,
        upstream_border: bool = False,
    ):
        super().__init__(source, seed, shuffle)
        self.spread, self.upstream_border = spread, upstream_border

    def _batch(self, indices, generators):
        x, labels, warped = self._warped(indices, generators)
        return [{"x": a, "Tx": b, "label": label} for a, b, label in zip(x, warped, labels)]

    def _warped(self, indices, generators):
        x, labels = _stack(self.source, indices)
        normal = torch.stack([torch.randn(8, generator=generator) for generator in generators])
        matrices = warps.homographies(warps.homography_coefficients(normal, self.spread))
        return x, labels, warps.warp_homography(x, matrices, upstream_border=self.upstream_border)


class WarpedImages(HomographyPairs):
    """The second of each pair of `HomographyPairs`. With shuffle=False the first N numbers are a fixed test set."""

    def _batch(self, indices, generators):
        _, labels, warped = self._warped(indices, generators)
        return [{"x": x, "label": label} for x, label in zip(warped, labels)]


class ShapePairs(_Visits):
    """Two copies of a shape, drawn from the K that the source has, each seen through a Moebius map of its own.

    Args:
        source: shapes, "x" of (H, W, C) or (K, H, W, C): maps of K conformal copies of a shape, the original first.
        shift: the largest boost, see `fourdperf.data.warps`; None for the copies as they are.
        base_weight: see `pair_indices`.
        upstream_angles: of `warps.mobius_parameters`.
    """

    def __init__(
        self,
        source: ItemSource,
        *,
        shift: float | None = warps.SHIFT,
        base_weight: float | None = None,
        seed: int = 0,
        shuffle: bool = True,
        upstream_angles: bool = False,
    ):
        super().__init__(source, seed, shuffle)
        self.shift, self.base_weight, self.upstream_angles = shift, base_weight, upstream_angles

    def _batch(self, indices, generators):
        pairs, labels = self._copies(indices, generators, 2)
        return [{"x": a, "Tx": b, "label": label} for (a, b), label in zip(pairs, labels)]

    def _copies(self, indices, generators, count: int) -> tuple[Tensor, list[int]]:
        """The first or both of each pair, (B, count, H, W, C), and the labels."""
        copies, labels = _stack(self.source, indices)
        copies = copies[:, None] if copies.ndim == 4 else copies
        drawn = [pair_indices(1, copies.shape[1], self.base_weight, generator) for generator in generators]
        pairs = draw_pairs(copies, torch.cat(drawn)).unflatten(0, (-1, 2))[:, :count]
        if self.shift is not None:
            uniform = torch.stack([torch.rand(2, 6, generator=generator) for generator in generators])[:, :count]
            parameters = warps.mobius_parameters(uniform, self.shift, upstream_angles=self.upstream_angles)
            pairs = warps.warp_mobius(pairs.flatten(0, 1), parameters.flatten(0, 1)).unflatten(0, (-1, count))
        return pairs, labels


class WarpedShapes(ShapePairs):
    """The first of each pair of `ShapePairs`. With shuffle=False the first N numbers are a fixed test set."""

    def _batch(self, indices, generators):
        copies, labels = self._copies(indices, generators, 1)
        return [{"x": x, "label": label} for (x,), label in zip(copies, labels)]


class SequenceWindows(_Visits):
    """Some frames of a video, equally far apart.

    Args:
        source: the videos.
        frames: T.
        stride: the largest distance between frames; it is drawn, but no more than the video is long enough for.
        first_frame: always begin with the video's first frame and take the largest stride, as the original does; else
            the beginning is drawn.
        augment: half of them are run backwards, and half seen in a mirror.

    Raises:
        ValueError: an argument is out of range; of an item: its video is shorter than `frames`.
    """

    def __init__(
        self,
        source: SequenceSource,
        frames: int,
        *,
        stride: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        first_frame: bool = False,
        augment: bool = False,
    ):
        super().__init__(source, seed, shuffle)
        if frames < 1 or stride < 1:
            raise ValueError(f"frames, stride: wanted at least 1, got {frames} and {stride}")
        self.frames, self.stride, self.first_frame, self.augment = frames, stride, first_frame, augment

    def _batch(self, indices, generators):
        return [self._window(i, generator) for i, generator in zip(indices, generators)]

    def _window(self, index: int, generator: Generator) -> dict[str, Tensor]:
        numbers = self._numbers(index, generator)
        if not self.augment:
            return self.source.read(index, numbers)
        back, mirror = (torch.rand(2, generator=generator) < 0.5).tolist()
        window = self.source.read(index, numbers[::-1] if back else numbers)
        return mirrored(window) if mirror else window

    def _numbers(self, index: int, generator: Generator) -> range:
        total = self.source.frames(index)
        if total < self.frames:
            raise ValueError(f"video {index}: wanted at least {self.frames} frames, got {total}")
        largest = min(self.stride, (total - 1) // max(1, self.frames - 1))
        if self.first_frame:
            return range(0, self.frames * largest, largest)
        stride = int(torch.randint(largest, (), generator=generator)) + 1
        span = (self.frames - 1) * stride
        start = int(torch.randint(total - span, (), generator=generator))
        return range(start, start + span + 1, stride)


def mirrored(window: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Frames with left and right exchanged, and the cameras that see them so, in a world where x is -x."""
    sign = torch.tensor([-1.0, 1, 1, 1])
    intrinsics = window["intrinsics"].clone()
    intrinsics[:, 0, 2] = 1 - intrinsics[:, 0, 2]
    poses = sign[:, None] * window["poses"] * sign
    return {"video": window["video"].flip(2), "poses": poses, "intrinsics": intrinsics}


def pair_indices(
    count: int, copies: int, base_weight: float | None = None, generator: Generator | None = None
) -> Tensor:
    """(count, 2) int64 in [0, copies), with replacement: the second uniform; the first is 0 with probability
    `base_weight`, the others sharing the rest, or uniform where that is None.

    Raises:
        ValueError: `base_weight` is not in [0, 1].
    """
    if base_weight is not None and not 0 <= base_weight <= 1:
        raise ValueError(f"base_weight: wanted a probability, got {base_weight}")
    first, second = torch.randint(copies, (2, count), generator=generator)
    if base_weight is not None and copies > 1:
        base = torch.rand(count, generator=generator) < base_weight
        first = torch.where(base, 0, torch.randint(1, copies, (count,), generator=generator))
    return torch.stack([first, second], -1)


def draw_pairs(batch: Tensor, indices: Tensor) -> Tensor:
    """Copies `indices` (B, 2) of a batch (B, K, ...): (2 B, ...), rows 2 i and 2 i + 1 of item i."""
    return batch[torch.arange(len(batch), device=batch.device)[:, None], indices].flatten(0, 1)


def _stack(source: ItemSource, indices: Sequence[int]) -> tuple[Tensor, list[int]]:
    items = [source[i] for i in indices]
    return torch.stack([item["x"] for item in items]), [item["label"] for item in items]
