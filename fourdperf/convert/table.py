"""A conversion table: for each tensor of ours, the source arrays that it is made of, and how; used both ways."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fourdperf.models.checkpoint import CheckpointError


class Row(NamedTuple):
    """One tensor of ours, of the given shape.

    sources: keys and shapes of the source arrays. A Flax kernel (in..., out...) becomes the rows of a linear layer's
        weight (out, in) where `transpose` is set; several sources are joined along our first axis.
    """

    key: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    transpose: bool = False

    def pack(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Source arrays, in the order of `sources`, to ours."""
        if self.transpose:
            arrays = [array.reshape(self.shape[1], -1).T for array in arrays]
        return np.concatenate([array.reshape(-1, *self.shape[1:]) for array in arrays]).reshape(self.shape)

    def unpack(self, array: np.ndarray) -> list[np.ndarray]:
        """Ours to the source arrays, in the order of `sources`."""
        rows = [math.prod(shape) // math.prod(self.shape[1:]) for _, shape in self.sources]
        parts = np.split(array, np.cumsum(rows)[:-1])
        if self.transpose:
            parts = [part.T for part in parts]
        return [part.reshape(shape) for part, (_, shape) in zip(parts, self.sources)]


class ConvRow(Row):
    """A convolution: (height, width, in, out) there, (out, in, height, width) here."""

    def pack(self, arrays: list[np.ndarray]) -> np.ndarray:
        return arrays[0].transpose(3, 2, 0, 1)

    def unpack(self, array: np.ndarray) -> list[np.ndarray]:
        return [array.transpose(2, 3, 1, 0)]


def shape_of(shapes: Mapping[str, tuple[int, ...]], name: str, *axes: int) -> tuple[int, ...]:
    """The shape of an array that must be there; raises CheckpointError unless it has so many axes."""
    if name not in shapes:
        raise CheckpointError(f"missing {name}")
    if len(shapes[name]) not in axes:
        raise CheckpointError(f"{name}: expected {' or '.join(map(str, axes))} axes, got shape {shapes[name]}")
    return shapes[name]
