"""Stand-ins for the data of Neural Isometries, made here: nothing has to be downloaded.

    PhotographPatches    pieces of photographs, for the torus: unlike digits, they span all functions on 16 x 16 pixels
    digits               `fourdperf.data.homnist.PlacedImages` of scikit-learn's digits, for homographies
    StarShapes           closed surfaces of twenty kinds around the origin, as maps on the sphere, for Moebius maps
    SceneSequences       videos of `fourdperf.data.scenes` in which only the camera moves, with its exact poses

The splits are disjoint: photographs are cut into pieces, and seeds of shapes and scenes are 3 i + (0, 1, 2) for item i
of train, val and test. Everything depends on split, number and seed alone.

A star shape is x = r(d) d for directions d, its map the equirectangular one of d -> (radius, mean curvature, Gaussian
curvature), which depend on no rotation of the shape. They are scaled by the shape's mean radius R and squeezed into
[0, 1]:
    r / 2 R        1/2 + atan(H R) / pi        1/2 + atan(K R^2) / pi
Curvatures are those of the level set of f(x) = |x| - r(x / |x|), from differences in double precision. The sphere does
not meet the shape conformally, as SHREC's maps do; a Moebius map moves the values in the same way.

Ten kinds differ in how they are curved; the other ten have six equal bumps each and differ in where these are, the last
two as left and right, so that their values alone tell little.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.scenes import Scene
from fourdperf.data.scenes.motion import random_rotation
from fourdperf.data.scenes.textures import load_photographs
from fourdperf.data.synthetic import SPLITS, Split, scene_seed
from fourdperf.data.warps import sphere_grid

__all__ = ["SHAPES", "PhotographPatches", "SceneSequences", "StarShapes"]

Radius = Callable[[np.ndarray], np.ndarray]  # directions (..., 3) -> (...)
STEP = 2e-3  # of the differences


class PhotographPatches(Dataset):
    """Square pieces of scikit-learn's photographs, of 1 to 4 times `size` pixels, brought to `size`: items {"x": (size,
    size, 3), "label": 0}. Each is the most varied of four. Val and test have the two middle tenths of the pictures,
    train what is left and right of them.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, split: Split, count: int = 4096, size: int = 16, seed: int = 0):
        self.seed, self.size, self.count = scene_seed(split, seed), size, count
        pictures = load_photographs(None)
        if not pictures:
            raise ImportError("patches of photographs need scikit-learn: pip install 'fourdperf[train]'")
        ranges = {"train": ((0, 0.4), (0.6, 1)), "val": ((0.4, 0.5),), "test": ((0.5, 0.6),)}[split]
        self.pictures = [p[:, int(a * p.shape[1]) : int(b * p.shape[1])] for p in pictures for a, b in ranges]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"wanted patches below {self.count}, got {index}")
        random = np.random.default_rng((self.seed, index))
        piece = max((self._piece(random) for _ in range(4)), key=np.var)
        return {"x": torch.from_numpy(cv2.resize(piece, (self.size,) * 2, interpolation=cv2.INTER_AREA)), "label": 0}

    def _piece(self, random: np.random.Generator) -> np.ndarray:
        picture = self.pictures[random.integers(len(self.pictures))]
        side = min(int(self.size * 4 ** random.random()), *picture.shape[:2])
        top, left = (random.integers(n - side + 1) for n in picture.shape[:2])
        return picture[top : top + side, left : left + side]


# Shapes


class StarShapes(Dataset):
    """Items {"x": (H, W, 3) float32 in [0, 1], "label": number of the kind in SHAPES}, the kinds in turn.

    Args:
        count: of the split.
        size: (H, W) of the maps; see `fourdperf.data.warps`.
    """

    def __init__(self, split: Split, count: int = 600, size: tuple[int, int] = (48, 96), seed: int = 0):
        if count < 1 or min(size) < 2:
            raise ValueError(f"count, size: wanted at least 1 and 2 x 2, got {count} and {size}")
        self.split, self.count, self.size, self.seed, self.classes = split, count, tuple(size), seed, tuple(SHAPES)

    def __len__(self) -> int:
        return self.count

    def radius(self, index: int) -> tuple[Radius, int]:
        """The function of a shape, and its kind."""
        if not 0 <= index < self.count:
            raise IndexError(f"wanted shapes below {self.count}, got {index}")
        random = np.random.default_rng((self.seed, scene_seed(self.split, index)))
        kind = index % len(SHAPES)
        return _vary(SHAPES[self.classes[kind]](random), random), kind

    def __getitem__(self, index: int) -> dict:
        radius, kind = self.radius(index)
        directions = sphere_grid(self.size, torch.float64).numpy()
        directions[[0, -1]] = directions[[0, -1], :1]  # a pole is one point
        directions[:, -1] = directions[:, 0]
        r = radius(directions)
        mean, gauss = curvatures(radius, r[..., None] * directions)
        weight = np.sin(np.linspace(0, math.pi, self.size[0]))[:, None]
        scale = (r * weight)[:, :-1].sum() / (weight * np.ones_like(r))[:, :-1].sum()
        squeeze = lambda x: 0.5 + np.arctan(x) / math.pi
        x = np.stack([(r / (2 * scale)).clip(0, 1), squeeze(mean * scale), squeeze(gauss * scale**2)], -1)
        return {"x": torch.from_numpy(x.astype(np.float32)), "label": kind}


def curvatures(radius: Radius, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Gaussian curvature (...) of a star shape at points (..., 3) of it; of a sphere 1 / R and 1 / R^2."""

    def level(offset: np.ndarray) -> np.ndarray:
        moved = points + STEP * offset
        length = np.linalg.norm(moved, axis=-1)
        return length - radius(moved / length[..., None])

    axes, here = np.eye(3), level(np.zeros(3))
    ahead, behind = ([level(sign * axis) for axis in axes] for sign in (1, -1))
    gradient = np.stack([(a - b) / (2 * STEP) for a, b in zip(ahead, behind)], -1)
    hessian = np.empty((*points.shape, 3))
    for i, j in itertools.combinations_with_replacement(range(3), 2):
        if i == j:
            value = (ahead[i] + behind[i] - 2 * here) / STEP**2
        else:
            value = level(axes[i] + axes[j]) - level(axes[i] - axes[j]) - level(axes[j] - axes[i])
            value = (value + level(-axes[i] - axes[j])) / (4 * STEP**2)
        hessian[..., i, j] = hessian[..., j, i] = value
    length = np.linalg.norm(gradient, axis=-1)
    normal = gradient / length[..., None]
    shape = hessian / length[..., None, None]
    along = np.einsum("...i,...ij,...j->...", normal, shape, normal)
    trace = np.trace(shape, axis1=-2, axis2=-1)
    # of the 2 x 2 part across the normal: trace and determinant
    squares = np.einsum("...ij,...ij->...", shape, shape)
    bent = np.einsum("...ij,...j->...i", shape, normal)
    mean = (trace - along) / 2
    gauss = ((trace - along) ** 2 - (squares - 2 * (bent**2).sum(-1) + along**2)) / 2
    return mean, gauss


def _vary(radius: Radius, random: np.random.Generator) -> Radius:
    """The shape scaled by a little along three axes, uneven, and turned."""
    turn, stretch = random_rotation(random), random.uniform(0.83, 1.2, 3)
    waves = random.normal(size=(5, 3)) * 1.6
    size, phase = random.normal(size=5) * 0.027, random.uniform(0, 2 * math.pi, 5)

    def varied(directions: np.ndarray) -> np.ndarray:
        local = directions @ turn / stretch
        length = np.linalg.norm(local, axis=-1)
        local = local / length[..., None]
        return radius(local) * (1 + np.sin(local @ waves.T + phase) @ size) / length

    return varied


def _superquadric(power: tuple[float, float], height: tuple[float, float]) -> Callable[..., Radius]:
    """|x / a|^p + |y / b|^p + |z / c|^p = 1, softened where it is pointed."""

    def make(random: np.random.Generator) -> Radius:
        p, c = random.uniform(*power), random.uniform(*height)
        soft = lambda x: np.sqrt(x**2 + 0.02) ** p
        return lambda d: (soft(d[..., 0]) + soft(d[..., 1]) + soft(d[..., 2] / c)) ** (-1 / p)

    return make


def _cylinder(random: np.random.Generator) -> Radius:
    p, c = random.uniform(7, 10), random.uniform(1.0, 1.5)
    return lambda d: ((d[..., 0] ** 2 + d[..., 1] ** 2 + 1e-4) ** (p / 2) + np.abs(d[..., 2] / c) ** p) ** (-1 / p)


def _lobes(count: int) -> Callable[..., Radius]:
    """Waves around an axis that vanish at its ends, a harmonic of degree and order `count`."""

    def make(random: np.random.Generator) -> Radius:
        size = random.uniform(0.22, 0.34)
        return lambda d: 1 + size * ((d[..., 0] + 1j * d[..., 1]) ** count).real

    return make


def _bumps(centres: np.ndarray, width: float, heights: tuple[float, float]) -> Callable[..., Radius]:
    """Bumps at about the directions (n, 3), all of about one height."""

    def make(random: np.random.Generator) -> Radius:
        height = random.uniform(*heights) * random.uniform(0.85, 1.15, len(centres))
        moved = _unit(centres + 0.06 * random.normal(size=centres.shape))
        return lambda d: 1 + np.exp((d @ moved.T - 1) / width) @ height

    return make


def _six(places: Sequence[tuple[float, float]]) -> Callable[..., Radius]:
    """Six equal bumps at (polar angle, azimuth) in degrees."""
    polar, azimuth = np.radians(np.array(places, np.float64)).T
    centres = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], -1)
    return _bumps(centres, 0.04, (0.3, 0.45))


def _profile(make_coefficients: Callable[[np.random.Generator], Sequence[float]]) -> Callable[..., Radius]:
    """Turned about an axis: r = a polynomial of the cosine of the polar angle."""

    def make(random: np.random.Generator) -> Radius:
        coefficients = make_coefficients(random)
        return lambda d: np.polynomial.polynomial.polyval(d[..., 2], coefficients)

    return make


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


_G = (1 + 5**0.5) / 2
_TETRAHEDRON = _unit(np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))
_ICOSAHEDRON = _unit(np.array([np.roll([0, a, b * _G], i) for i in range(3) for a in (1, -1) for b in (1, -1)]))

SHAPES: dict[str, Callable[[np.random.Generator], Radius]] = {
    "ellipsoid": _superquadric((2, 2), (1.5, 2.0)),
    "box": _superquadric((6, 9), (0.9, 1.2)),
    "octahedron": _superquadric((1.05, 1.25), (0.9, 1.2)),
    "cylinder": _cylinder,
    "three lobes": _lobes(3),
    "five lobes": _lobes(5),
    "four bumps": _bumps(_TETRAHEDRON, 0.12, (0.5, 0.8)),
    "twelve bumps": _bumps(_ICOSAHEDRON, 0.04, (0.25, 0.4)),
    "pear": _profile(lambda random: (1, random.uniform(0.35, 0.5), 0.1, random.uniform(0.1, 0.2))),
    "torus, its hole filled": _profile(lambda random: (1.2, 0, random.uniform(-0.35, -0.15), 0, -0.45)),
    "six: octahedron": _six([(0, 0), (180, 0), *((90, 90 * i) for i in range(4))]),
    "six: prism": _six([(polar, 120 * i) for polar in (50, 130) for i in range(3)]),
    "six: ring": _six([(90, 60 * i) for i in range(6)]),
    "six: pyramid": _six([(0, 0), *((75, 72 * i) for i in range(5))]),
    "six: row": _six([(90, 36 * i) for i in range(6)]),
    "six: cross": _six([(0, 0), (40, 0), (40, 90), (40, 180), (40, 270), (80, 0)]),
    "six: two clusters": _six([(polar, 120 * i) for polar in (22, 158) for i in range(3)]),
    "six: pairs": _six([(90, 120 * i + 16 * j) for i in range(3) for j in (-1, 1)]),
    "six: left": _six([(60, -55), (40, 0), (70, 0), (100, 0), (130, 0), (125, 40)]),
    "six: right": _six([(60, 55), (40, 0), (70, 0), (100, 0), (130, 0), (125, -40)]),
}


# Videos


class SceneSequences:
    """Videos of synthetic scenes whose bodies stand still, a `SequenceSource`; a scene is rendered whenever it is read,
    so write shards of them (`fourdperf.data.niso_shards.write_shards`, or `fourdperf niso_data sequences`).

    Args:
        count: scenes of the split.
        length: frames of each.
        size: (H, W).
        time_step: seconds from one frame to the next, in which the camera moves about as many units.
    """

    def __init__(
        self, split: Split, count: int, length: int = 32, size: tuple[int, int] = (64, 64), time_step: float = 0.125
    ):
        if split not in SPLITS or count < 1 or length < 1:
            raise ValueError(f"wanted a split of {SPLITS}, count and length from 1, got {split!r}, {count}, {length}")
        self.split, self.count, self.length, self.size, self.time_step = split, count, length, size, time_step

    def __len__(self) -> int:
        return self.count

    def frames(self, index: int) -> int:
        return self.length

    def read(self, index: int, numbers: Sequence[int]) -> dict[str, Tensor]:
        seed = scene_seed(self.split, index)
        scene = Scene(seed, self.length, self.size, time_step=self.time_step, still=True)
        some = torch.as_tensor(list(numbers))
        video = scene.render().video if len(some) else torch.zeros(0, *self.size, 3)
        return {
            "video": video[some],
            "poses": scene.world_from_camera[some],
            "intrinsics": scene.intrinsics[some],
        }
