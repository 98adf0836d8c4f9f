"""What a reader of recorded videos gives: frames, and whatever truth comes with them, one frame at a time.

A :class:`Source` is one video. Each format has a reader that makes sources (``pointodyssey``, ``movi``, ``folder``);
``video_dataset`` turns any of them into clips with queries. All follow ``fourdperf.data.queries``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Source", "Tracks", "Window", "load_window", "unit_normals", "z_from_distance"]


class Tracks(NamedTuple):
    """N points of surfaces over T frames.

    uv       (T, N, 2) where the frame of that time shows the point; NaN where not known
    xyz      (T, N, 3) in world coordinates, NaN where not known; None without any
    visible  (T, N) bool; of use only where uv is known
    """

    uv: np.ndarray
    xyz: np.ndarray | None
    visible: np.ndarray


class Source(ABC):
    """One video with its truth. Readers override what their format has; None means that it has none.

    Attributes:
        name: what an error calls it, a path.
        num_frames: frames that can be asked for, from 0.
        size: (height, width) of the frames, pixels.
    """

    name: str
    num_frames: int
    size: tuple[int, int]

    @abstractmethod
    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """The frames, ascending: uint8 (H, W, 3), RGB."""

    def depth(self, number: int) -> np.ndarray | None:
        """z-depth (h, w) float32 in scene units, of any resolution; NaN where not known."""
        return None

    def normal(self, number: int) -> np.ndarray | None:
        """Unit normals (h, w, 3) float32 in the frame's camera, of the depth map's size; NaN where not known."""
        return None

    def flow(self, number: int) -> np.ndarray | None:
        """Forward flow (h, w, 2) float32 in uv units, of the depth map's size; None after the last frame too."""
        return None

    def instances(self, number: int) -> np.ndarray | None:
        """Which rigid body each pixel of the depth map shows, int64 (h, w): rows of :meth:`motion`."""
        return None

    def motion(self, numbers: Sequence[int]) -> np.ndarray | None:
        """world_from_body of K rigid bodies, float64 (T, K, 4, 4); NaN for bodies whose motion is not known. None:
        nobody knows how anything moves. A static scene is one body that stays; without `instances` all is body 0."""
        return None

    def intrinsics(self, numbers: Sequence[int]) -> np.ndarray | None:
        """Normalised, float64 (T, 3, 3)."""
        return None

    def world_from_camera(self, numbers: Sequence[int]) -> np.ndarray | None:
        """float64 (T, 4, 4)."""
        return None

    def tracks(self, numbers: Sequence[int]) -> Tracks | None:
        """Where points of the surfaces are at these times."""
        return None

    @abstractmethod
    def contents(self) -> list[str]:
        """What there is, in words: "depth", "normals", "3-D tracks" ..."""


@dataclass(frozen=True)
class Window:
    """Some frames of a source, loaded; the fields as its methods, stacked over the T frames."""

    name: str
    frames: list[np.ndarray]
    depth: np.ndarray | None
    normal: np.ndarray | None
    flow: np.ndarray | None
    instances: np.ndarray | None
    motion: np.ndarray | None
    intrinsics: np.ndarray | None
    world_from_camera: np.ndarray | None
    tracks: Tracks | None


def load_window(source: Source, numbers: Sequence[int]) -> Window:
    """The frames ``numbers``, ascending.

    Raises:
        ValueError, OSError: a file is missing, corrupt or of another shape than those before it.
    """
    depth = _stack(source, "depth", numbers)
    maps = dict.fromkeys(("normal", "instances", "flow"))
    if depth is not None:
        maps |= {what: _stack(source, what, numbers) for what in ("normal", "instances")}
        # a flow leads to the next frame of the source, which with a stride is not the next one of the window
        if len(numbers) > 1 and (np.diff(numbers) == 1).all():
            maps["flow"] = _stack(source, "flow", numbers[:-1])
    for what, found in maps.items():
        if found is not None and found.shape[1:3] != depth.shape[1:3]:
            raise ValueError(f"{source.name}: {what}: wanted {depth.shape[1:3]} as depth, got {found.shape[1:3]}")
    tracks = source.tracks(numbers)
    return Window(
        source.name,
        source.frames(numbers),
        depth,
        maps["normal"],
        maps["flow"],
        maps["instances"],
        source.motion(numbers),
        source.intrinsics(numbers),
        source.world_from_camera(numbers),
        tracks if tracks is not None and tracks.visible.size else None,
    )


def _stack(source: Source, what: str, numbers: Sequence[int]) -> np.ndarray | None:
    maps = []
    for number in numbers:
        found = getattr(source, what)(number)
        if found is None:
            return None
        if maps and found.shape != maps[0].shape:
            raise ValueError(
                f"{source.name}: {what} of frame {number}: wanted {maps[0].shape} as before, got {found.shape}"
            )
        maps.append(found)
    return np.stack(maps) if maps else None


def unit_normals(normal: np.ndarray, tolerance: float) -> np.ndarray:
    """Normals (h, w, 3) float32 made of length 1; those whose length is farther than that from 1 become NaN."""
    length = np.sqrt(np.einsum("...i,...i", normal, normal))[..., None]
    known = np.abs(length - 1) < tolerance  # NaN is not
    return np.where(known, normal / np.where(known, length, 1), np.float32(np.nan))


def z_from_distance(distance: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """z-depth (h, w) from distances (h, w) to the camera's centre; intrinsics (3, 3) normalised."""
    height, width = distance.shape
    x = ((np.arange(width) + 0.5) / width - intrinsics[0, 2]) / intrinsics[0, 0]
    y = ((np.arange(height) + 0.5) / height - intrinsics[1, 2]) / intrinsics[1, 1]
    return (distance / np.sqrt(1 + x**2 + y[:, None] ** 2)).astype(np.float32)
