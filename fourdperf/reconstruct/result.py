"""What comes out of a video: depth, cameras, a coloured point cloud and tracks, as NumPy arrays in one `.npz` file.

Conventions are those of :mod:`fourdperf.data.queries`. The world is the camera of frame 0.
"""

import dataclasses
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourdperf.data.files import atomic_path

__all__ = ["Reconstruction"]

# field: shape and dtype; equal letters are equal sizes
LAYOUT = {
    "video": ("THWc", np.uint8),
    "depth": ("Thw", np.float32),
    "depth_confidence": ("Thw", np.float32),
    "world_from_camera": ("T44", np.float32),
    "intrinsics": ("T33", np.float32),
    "distortion": ("T2", np.float32),
    "points": ("P3", np.float32),
    "point_colors": ("Pc", np.uint8),
    "point_frame": ("P", np.int64),
    "tracks": ("KT3", np.float32),
    "tracks_uv": ("KT2", np.float32),
    "tracks_visible": ("KT", np.bool_),
    "track_colors": ("Kc", np.uint8),
    "track_source": ("K3", np.float32),
}
FIXED = {"c": 3, "2": 2, "3": 3, "4": 4}


@dataclass(frozen=True)
class Reconstruction:
    """Everything that was reconstructed from a video of T frames: P points, K tracks.

    video              (T, H, W, 3) uint8    the frames, RGB
    depth              (T, h, w) float32     z in the camera of the frame, in the units of the world
    depth_confidence   (T, h, w) float32     in [0, 1]
    world_from_camera  (T, 4, 4) float32     rigid motions; the first is the identity
    intrinsics         (T, 3, 3) float32     normalised
    distortion         (T, 2) float32        k1, k2 of :func:`fourdperf.geometry.distort`; zeros for a pinhole
    points             (P, 3) float32        world coordinates
    point_colors       (P, 3) uint8
    point_frame        (P,) int64            the frame that shows the point
    tracks             (K, T, 3) float32     world coordinates; NaN where a track is not known
    tracks_uv          (K, T, 2) float32     the place in frame t, which may lie outside of it; NaN likewise
    tracks_visible     (K, T) bool           False where a track is not known
    track_colors       (K, 3) uint8
    track_source       (K, 3) float32        (t, u, v): the pixel that was asked for
    stats              how it was made: queries, seconds and so on; whatever JSON can hold

    Arrays are converted to these dtypes. Raises ValueError where a shape does not fit the others.
    """

    video: np.ndarray
    depth: np.ndarray
    depth_confidence: np.ndarray
    world_from_camera: np.ndarray
    intrinsics: np.ndarray
    distortion: np.ndarray
    points: np.ndarray
    point_colors: np.ndarray
    point_frame: np.ndarray
    tracks: np.ndarray
    tracks_uv: np.ndarray
    tracks_visible: np.ndarray
    track_colors: np.ndarray
    track_source: np.ndarray
    stats: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sizes = dict(FIXED)
        for name, (axes, dtype) in LAYOUT.items():
            array = np.asarray(getattr(self, name))
            if array.ndim != len(axes) or any(sizes.setdefault(a, n) != n for a, n in zip(axes, array.shape)):
                wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
                raise ValueError(f"{name}: wanted shape ({wanted}), got {array.shape}")
            object.__setattr__(self, name, array.astype(dtype, copy=False))

    @property
    def num_frames(self) -> int:
        return len(self.video)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one compressed `.npz`, all of it or nothing; ``stats`` becomes a JSON string in it.

        Raises:
            ValueError: ``path`` does not end in .npz, or ``stats`` is not JSON.
            OSError: the file cannot be written.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"path: wanted a name that ends in .npz, got {path}")
        try:
            stats = json.dumps(self.stats)
        except TypeError as error:
            raise ValueError(f"stats: wanted what JSON can hold: {error}") from error
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, stats=np.array(stats), **{name: getattr(self, name) for name in LAYOUT})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Reconstruction":
        """Reads what :meth:`save` wrote.

        Raises:
            OSError: the file is missing or cannot be read.
            ValueError: it is no reconstruction, or broken.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                fields = {name: file[name] for name in LAYOUT}
                return cls(**fields, stats=json.loads(str(file["stats"])))
        except KeyError as error:
            raise ValueError(f"{path}: not a reconstruction: {error.args[0]}") from error
        except (ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
            raise ValueError(f"{path}: not a reconstruction, or broken: {error}") from error
