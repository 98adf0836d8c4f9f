"""Textures: procedural patterns and pieces of photographs, and the atlas in which a scene keeps and filters them."""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from fourdperf.ops import bilinear_sample

__all__ = ["TEXELS", "Atlas", "load_photographs", "random_texture"]

TEXELS = 128  # a texture's width and height
LEVELS = 4  # 128, 64, 32 and 16 texels
PHOTOGRAPH_SHARE = 0.35
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@lru_cache(maxsize=8)
def load_photographs(folder: str | os.PathLike | None) -> tuple[np.ndarray, ...]:
    """The pictures of a folder in the order of their names, float32 (H, W, 3) in [0, 1], the shorter side at most 512.

    None gives the two photographs that come with scikit-learn, or none at all where it is not installed.

    Raises:
        ValueError: the folder does not exist, holds no picture, or one that cannot be read or is too small to use.
    """
    if folder is None:
        if find_spec("sklearn") is None:
            return ()
        sources = [files("sklearn.datasets.images").joinpath(name) for name in ("china.jpg", "flower.jpg")]
    else:
        if not Path(folder).is_dir():
            raise ValueError(f"photographs must be a folder, got {str(folder)!r}")
        sources = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
        if not sources:
            raise ValueError(f"photographs: no picture ({', '.join(SUFFIXES)}) in {str(folder)!r}")
    return tuple(_load(source) for source in sources)


def _load(source) -> np.ndarray:
    content = np.frombuffer(source.read_bytes(), np.uint8)
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if content.size else None
    if picture is None:
        raise ValueError(f"photographs: cannot read {str(source)!r} as a picture")
    shorter = min(picture.shape[:2])
    if shorter < 16:
        raise ValueError(f"photographs: wanted at least 16 x 16 pixels, got {picture.shape[:2]} in {str(source)!r}")
    if shorter > 512:
        picture = cv2.resize(picture, None, fx=512 / shorter, fy=512 / shorter, interpolation=cv2.INTER_AREA)
    return picture.astype(np.float32) / 255


def random_texture(rng: np.random.Generator, photographs: Sequence[np.ndarray]) -> np.ndarray:
    """A texture, float32 (TEXELS, TEXELS, 3) in [0, 1]: a piece of a photograph, or a pattern with stains on it."""
    if rng.random() < PHOTOGRAPH_SHARE and photographs:
        return _piece(rng, photographs[rng.integers(len(photographs))])
    pattern = PATTERNS[rng.integers(len(PATTERNS))](rng)
    stains = _cloud(rng, 4) + 0.5 * _cloud(rng, 12) + 0.35 * _cloud(rng, 40)
    return np.clip(pattern * (1 + 0.28 * stains[..., None]), 0, 1)


def _piece(rng: np.random.Generator, photograph: np.ndarray) -> np.ndarray:
    """A square piece of a photograph, perhaps mirrored, with other gains of its colours; of four pieces the one with
    the most contrast, because skies and shadows show no motion."""
    height, width = photograph.shape[:2]
    pieces = []
    for scale, top, left in rng.random((4, 3)):
        side = max(16, int(min(height, width) * (0.3 + 0.6 * scale)))
        top, left = int(top * (height - side)), int(left * (width - side))
        pieces.append(photograph[top : top + side, left : left + side])
    piece = max(pieces, key=lambda piece: piece[4::8, 4::8].std())
    method = cv2.INTER_AREA if len(piece) > TEXELS else cv2.INTER_LINEAR
    piece = cv2.resize(piece, (TEXELS, TEXELS), interpolation=method)[:, :: rng.choice([-1, 1])]
    return np.clip(piece * rng.uniform(0.7, 1.25, 3).astype(np.float32), 0, 1)


def _cloud(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise around 0, mostly within [-1, 1], with about `cells` bumps across: (TEXELS, TEXELS)."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(grid, (TEXELS, TEXELS), interpolation=cv2.INTER_CUBIC)


def _colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours (count, 3), each well apart from the one before."""
    colours = [rng.uniform(0.08, 0.95, 3)]
    while len(colours) < count:
        colour = rng.uniform(0.08, 0.95, 3)
        if np.abs(colour - colours[-1]).sum() > 0.7:
            colours.append(colour)
    return np.array(colours, np.float32)


def _turned(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (TEXELS, TEXELS) of the texels in [0, 1]^2, turned by a random angle about the middle."""
    angle = rng.uniform(0, np.pi)
    line = (np.arange(TEXELS, dtype=np.float32) + 0.5) / TEXELS - 0.5
    x, y = line[None], line[:, None]
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x - sine * y + 0.5, sine * x + cosine * y + 0.5


def _blend(weight: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return colours[0] + weight[..., None] * (colours[1] - colours[0])


def _checks(rng: np.random.Generator) -> np.ndarray:
    x, y = _turned(rng)
    across = np.float32(rng.uniform(3, 6.5))
    return _blend(((np.floor(x * across) + np.floor(y * across)) % 2).astype(np.float32), _colours(rng, 2))


def _stripes(rng: np.random.Generator) -> np.ndarray:
    x, y = _turned(rng)
    bend = np.float32(rng.uniform(0, 0.08)) * np.sin(np.float32(rng.uniform(5, 14)) * y)
    wave = np.sin(np.float32(2 * np.pi * rng.uniform(2, 5)) * (x + bend))
    return _blend(0.5 + 0.5 * np.clip(wave * np.float32(rng.uniform(1, 4)), -1, 1), _colours(rng, 2))


def _dots(rng: np.random.Generator) -> np.ndarray:
    x, y = _turned(rng)
    across, radius = np.float32(rng.uniform(3, 6.5)), np.float32(rng.uniform(0.22, 0.42))
    distance = np.hypot(x * across % 1 - 0.5, y * across % 1 - 0.5)
    return _blend(np.clip((radius - distance) * 12 + 0.5, 0, 1), _colours(rng, 2))


def _bricks(rng: np.random.Generator) -> np.ndarray:
    line = (np.arange(TEXELS, dtype=np.float32) + 0.5) / TEXELS
    rows, columns, joint = rng.integers(4, 9), rng.integers(2, 5), rng.uniform(0.06, 0.14)
    y = np.broadcast_to(line[:, None] * rows, (TEXELS, TEXELS))
    x = line[None] * columns + 0.5 * (np.floor(y) % 2)
    colours = _colours(rng, 2)
    tints = colours[1] * rng.uniform(0.65, 1.25, (rows, columns + 1, 1)).astype(np.float32)
    bricks = tints[np.floor(y).astype(int), np.floor(x).astype(int)]
    is_joint = (y % 1 < joint) | (x % 1 < joint * columns / rows)
    return np.where(is_joint[..., None], colours[0], bricks)


def _cells(rng: np.random.Generator) -> np.ndarray:
    line = (np.arange(TEXELS, dtype=np.float32) + 0.5) / TEXELS
    count = int(rng.integers(12, 36))
    places, colours = rng.random((2, count), np.float32), _colours(rng, count)
    # |p - c|^2 less |p|^2, which is the same for all cells.
    across = places[0] ** 2 - 2 * line[:, None] * places[0]
    down = places[1] ** 2 - 2 * line[:, None] * places[1]
    return colours[(down[:, None] + across[None]).argmin(-1)]


def _clouds(rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(4, 9))
    height = _cloud(rng, cells) + 0.6 * _cloud(rng, 2 * cells) + 0.4 * _cloud(rng, 4 * cells)
    colours = _colours(rng, 3)
    low, high = np.clip(1.5 * height + 0.8, 0, 1), np.clip(1.5 * height - 0.2, 0, 1)
    return _blend(low, colours[:2]) + high[..., None] * (colours[2] - colours[1])


PATTERNS = (_checks, _stripes, _dots, _bricks, _cells, _clouds)


class Atlas:
    """Textures with their blurred copies, read with trilinear filtering; beyond its borders a texture is mirrored.

    Args:
        textures: (K, TEXELS, TEXELS, 3) float32.
    """

    def __init__(self, textures: Tensor):
        self.count = count = len(textures)
        sides = [(TEXELS >> level) + 2 for level in range(LEVELS)]  # one texel of border keeps textures apart
        tops = [count * sum(sides[:level]) for level in range(LEVELS)]
        self.map = textures.new_zeros(1, count * sum(sides), TEXELS + 2, 3)
        for top, side in zip(tops, sides):
            level = self.map[0, top : top + count * side, :side].unflatten(0, (count, side))
            level[:, 1:-1, 1:-1] = textures
            level[:, 0], level[:, -1] = level[:, 1], level[:, -2]
            level[:, :, 0], level[:, :, -1] = level[:, :, 1], level[:, :, -2]
            rows = textures[:, ::2] + textures[:, 1::2]
            textures = (rows[:, :, ::2] + rows[:, :, 1::2]) / 4

    def read(self, texture: Tensor, place: Tensor, texels: Tensor) -> Tensor:
        """Colours (n, 3) of the textures `texture` (n,) int64 at `place` (n, 2), in units of a texture's width, for
        pixels that are `texels` (n,) texels wide."""
        level = texels.log2().clamp(0, LEVELS - 1)
        fine = level.floor()
        place = 1 - (place - 2 * torch.floor(place / 2) - 1).abs()
        levels = torch.stack([fine, (fine + 1).clamp(max=LEVELS - 1)])  # (2, n)
        side = torch.exp2(-levels) * TEXELS
        top = (2 * (TEXELS - side) + 2 * levels) * self.count  # of all textures at this level: the sum of a series
        x = 0.5 + place[:, 0] * side
        y = top + texture * (side + 2) + 0.5 + place[:, 1] * side
        height, width = self.map.shape[1:3]
        xy = torch.stack([x / (width - 1), y / (height - 1)], -1).view(1, -1, 2)
        fine_colour, coarse_colour = bilinear_sample(self.map, xy).view(2, -1, 3)
        return torch.lerp(fine_colour, coarse_colour, (level - fine)[:, None])
