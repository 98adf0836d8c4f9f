"""Tracks of all pixels of a video, from a fraction of the queries: a pixel that a track passed through needs no track
of its own.

An occupancy grid G, T x h x w, says which cells (frame, row, column) were visited. As long as there are others, a batch
of them is drawn at random; each is followed through all T frames, T queries; and in every frame where the point is
visible, its cell is marked:

    row = floor(v h), column = floor(u w), both clamped to the grid; the source's own cell in any case

Asking for every pixel would take T h w T queries. A batch is blind to itself: the smaller it is, the fewer queries.

Source: D4RT (arXiv 2512.08924), Algorithm 1, which speaks of a 5 to 15-fold saving.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fourdperf.reconstruct.recipes import EncodedVideo, Tracks, follow

__all__ = ["DenseTracks", "cells", "dense_tracks"]


class DenseTracks(NamedTuple):
    """The tracks; the queries they took; and those that a track for every pixel would have taken."""

    tracks: Tracks
    queries: int
    naive_queries: int


def dense_tracks(
    video: EncodedVideo,
    size: tuple[int, int] | None = None,
    *,
    camera: int | None = None,
    batch: int | None = None,
    visited: Tensor | None = None,
    seed: int = 0,
) -> DenseTracks:
    """Tracks, each through all frames, such that every cell of every frame is crossed by a visible one or is a source.

    Args:
        size: (h, w) of the grid; by default the model's frames, and then a cell is a pixel.
        camera: as in :func:`fourdperf.reconstruct.recipes.tracks`: None for xyz in the camera of each frame, or the
            frame in whose camera, a world then, all of them are (twice the queries; the cells are those of each frame).
        batch: sources drawn at once; by default a 256th of all cells, at least 512.
        visited: `(T, h, w)` bool, cells that need no track; marked further in place.
        seed: of the order in which cells are drawn; the same seed gives the same tracks.

    Raises:
        ValueError: ``batch`` below 1, or ``visited`` of another shape or dtype.
    """
    size = size or video.size
    shape = (len(video), *size)
    if visited is None:
        visited = torch.zeros(shape, dtype=torch.bool)
    if visited.shape != shape or visited.dtype != torch.bool:
        raise ValueError(f"visited: wanted bool {shape}, got {visited.dtype} {tuple(visited.shape)}")
    number = visited.numel()
    batch = max(512, number // 256) if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch: wanted at least 1, got {batch}")

    # A random order of all cells, once: the first ones left are a random draw from those left.
    remaining = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    flat, before, found = visited.view(-1), video.queries, []
    with tqdm(total=number, desc="all pixels", unit="pixel", unit_scale=True, disable=not video.progress) as bar:
        while len(remaining := remaining[~flat[remaining]]):
            bar.update(number - len(remaining) - bar.n)
            chosen = draw(remaining, batch)
            tracks = follow(video, _sources(chosen, size), camera, None)
            flat[chosen] = True
            flat[cells(tracks.uv, size)[tracks.visible & tracks.uv.isfinite().all(-1)]] = True
            found.append(tracks)
        bar.update(number - bar.n)
    if not found:
        found.append(follow(video, torch.empty(0, 3), camera, None))
    queries = video.queries - before
    naive = number * len(video) * (1 if camera is None else 2)
    return DenseTracks(Tracks(*(torch.cat(parts) for parts in zip(*found))), queries, naive)


def draw(remaining: Tensor, batch: int) -> Tensor:
    """The cells of the next batch, from those that are left, in random order."""
    return remaining[:batch]


def cells(uv: Tensor, size: tuple[int, int]) -> Tensor:
    """Indices into the flat grid of tracks uv `(K, T, 2)`: `(K, T)` int64."""
    height, width = size
    u, v = uv.nan_to_num().unbind(-1)
    row, column = ((place * n).floor().clamp(0, n - 1).long() for place, n in ((v, height), (u, width)))
    frame = torch.arange(uv.shape[1])
    return (frame * height + row) * width + column


def _sources(cell: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    frame, row, column = cell // (height * width), cell // width % height, cell % width
    return torch.stack([frame, (column + 0.5) / width, (row + 0.5) / height], dim=-1)
