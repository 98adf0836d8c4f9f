"""The Laplacian of the discrete torus, which learned operators of shifted images are compared with, and such images.

The nine-point operator on H x W pixels, whose neighbours wrap around: 3 at the pixel, -1/2 at the four beside it, -1/4
at the four across. It commutes with every shift; its eigenfunctions are products of a sine or cosine of the row and one
of the column, its eigenvalues

    3 - cos a - cos b - cos a cos b        a = 2 pi i / H, b = 2 pi j / W
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

__all__ = [
    "eigenspaces",
    "heat_kernel",
    "random_shifts",
    "shift_images",
    "stack_images",
    "toric_eigs",
    "toric_laplacian",
]


def toric_laplacian(height: int, width: int) -> Tensor:
    """(H W, H W) float64; see the module."""
    near = torch.eye(height * width, dtype=torch.float64).unflatten(1, (height, width))
    rows, columns = (near.roll(1, axis) + near.roll(-1, axis) for axis in (1, 2))
    across = rows.roll(1, 2) + rows.roll(-1, 2)
    return (3 * near - rows / 2 - columns / 2 - across / 4).flatten(1)


def toric_eigs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (H W,), ascending; eigenvectors (H W, H W) in the columns; mass (H W,), which is 1: float64."""
    (a, rows), (b, columns) = _circle(height), _circle(width)
    values = (3 - a.cos()[:, None] - b.cos() - a.cos()[:, None] * b.cos()).flatten()
    values, order = values.sort(stable=True)
    return values.clamp(min=0), torch.kron(rows, columns)[:, order], torch.ones_like(values)


def _circle(length: int) -> tuple[Tensor, Tensor]:
    """The frequencies (n,) in radians per pixel, and the orthonormal sines and cosines (n, n) of them, in columns."""
    k = torch.arange(length, dtype=torch.float64)
    frequency = 2 * math.pi * ((k + 1) // 2) / length
    # cosine of 0, then cosine and sine of each frequency; at an even length the last is a cosine alone
    phase = ((k % 2 == 0) & (k > 0)).double() * math.pi / 2
    waves = torch.cos(k[:, None] * frequency - phase)
    return frequency, waves / waves.norm(dim=0)


def heat_kernel(values: Tensor, vectors: Tensor, time: float = 1.0) -> Tensor:
    """sum_k exp(-time values_k) v_k v_k^T, (N, N)."""
    return vectors * torch.exp(-time * values) @ vectors.mT


def eigenspaces(values: Tensor, tolerance: float = 1e-6) -> list[slice]:
    """The runs of equal values, up to `tolerance` times the largest, among ascending ones (N,)."""
    new = values.diff() > tolerance * values.abs().max()
    ends = [0, *(new.nonzero()[:, 0] + 1).tolist(), len(values)]
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def stack_images(images: Tensor, batch: int) -> Tensor:
    """(batch K, H, W, C) -> (batch, H, W, K C): K consecutive images after one another in the channels.

    Raises:
        ValueError: the number of images is no multiple of `batch`.
    """
    if images.ndim != 4 or len(images) % batch:
        raise ValueError(f"images: wanted (K {batch}, H, W, C), got {tuple(images.shape)}")
    return images.unflatten(0, (batch, -1)).movedim(1, 3).flatten(3)


def random_shifts(count: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """(count, 2) int64, rows below H and columns below W, uniform."""
    return torch.stack([torch.randint(n, (count,), generator=generator) for n in size], -1)


def shift_images(images: Tensor, shifts: Tensor | Sequence) -> Tensor:
    """Images (B, H, W, C) rolled down and to the right by shifts (B, 2) pixels, around the torus."""
    return torch.stack([image.roll((int(r), int(c)), (0, 1)) for image, (r, c) in zip(images, shifts, strict=True)])
