"""Cameras and points as a COLMAP project: what Gaussian splatting, NeRF and multi-view stereo start from.

The text format of https://colmap.github.io/format.html: world-to-camera rotations as quaternions (w, x, y, z) and
translations, focal lengths and principal points in pixels with the centre of the top left pixel at (0.5, 0.5). OpenCV's
axes and this half pixel are our own conventions too, so that only units change.
"""

import os
from pathlib import Path

import numpy as np

from fourdperf.data.cameras import quaternion_from_rotation
from fourdperf.data.files import write_text
from fourdperf.data.video import write_png
from fourdperf.reconstruct.result import Reconstruction

__all__ = ["write_colmap"]


def write_colmap(folder: str | os.PathLike, reconstruction: Reconstruction, max_points: int = 200_000) -> int:
    """Writes images/00000.png ... (the frames) and sparse/0/cameras.txt, images.txt, points3D.txt into ``folder``.

    Frames with the same intrinsics share a camera; it is a PINHOLE, or where there is distortion an OPENCV camera with
    k1 and k2. Image t + 1 is frame t. The points are the cloud's, or an even selection of ``max_points`` of them, each
    with a place in the one image it comes from; COLMAP's error is not known and written as -1.

    Returns:
        How many points were left out since they are not finite.

    Raises:
        OSError: a file cannot be written.
        ValueError: a matrix is not finite, or intrinsics have a skew.
    """
    folder, model = Path(folder), Path(folder) / "sparse" / "0"
    cameras, camera_of = _cameras(reconstruction)
    poses = _camera_from_world(reconstruction)
    points, skipped = _points(reconstruction, max_points)
    for t, frame in enumerate(reconstruction.video):
        write_png(folder / "images" / _name(t), frame)
    write_text(model / "cameras.txt", "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n" + cameras)
    write_text(model / "images.txt", _images(reconstruction, poses, camera_of, points))
    write_text(model / "points3D.txt", _points3d(reconstruction, points))
    return skipped


def _cameras(reconstruction: Reconstruction) -> tuple[str, np.ndarray]:
    """The lines of cameras.txt, and the id of each frame's camera (T,)."""
    height, width = reconstruction.video.shape[1:3]
    k = reconstruction.intrinsics.astype(np.float64)
    bend = reconstruction.distortion.astype(np.float64)
    if not (np.isfinite(k).all() and np.isfinite(bend).all()):
        raise ValueError("intrinsics and distortion: wanted finite numbers")
    if np.abs(k[:, 0, 1]).max(initial=0) > 1e-6:
        raise ValueError(f"intrinsics: COLMAP's cameras have no skew, got {k[:, 0, 1]}")
    pixels = [k[:, 0, 0] * width, k[:, 1, 1] * height, k[:, 0, 2] * width, k[:, 1, 2] * height]
    values, camera = np.unique(np.concatenate([np.stack(pixels, -1), bend], 1), axis=0, return_inverse=True)
    lines = ""
    for i, row in enumerate(values):
        model = f"OPENCV {width} {height} {_join([*row, 0.0, 0.0])}" if row[4:].any() else ""
        lines += f"{i + 1} {model or f'PINHOLE {width} {height} {_join(row[:4])}'}\n"
    return lines, camera.reshape(-1) + 1


def _camera_from_world(reconstruction: Reconstruction) -> np.ndarray:
    poses = reconstruction.world_from_camera.astype(np.float64)
    if not np.isfinite(poses).all():
        raise ValueError("world_from_camera: wanted finite numbers")
    return np.linalg.inv(poses) if len(poses) else poses


def _points(reconstruction: Reconstruction, limit: int) -> tuple[np.ndarray, int]:
    """Which points to write, ordered by frame, and how many are not finite."""
    finite = np.isfinite(reconstruction.points).all(1)
    chosen = np.flatnonzero(finite)
    if len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, limit, replace=False))
    order = np.argsort(reconstruction.point_frame[chosen], kind="stable")
    return chosen[order], int((~finite).sum())


def _images(reconstruction: Reconstruction, poses: np.ndarray, camera_of: np.ndarray, points: np.ndarray) -> str:
    height, width = reconstruction.video.shape[1:3]
    rotations = quaternion_from_rotation(poses[:, :3, :3])
    frame = reconstruction.point_frame[points]
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", "# POINTS2D[] as (X, Y, POINT3D_ID)"]
    for t, pose in enumerate(poses):
        lines.append(f"{t + 1} {_join([*rotations[t], *pose[:3, 3]])} {camera_of[t]} {_name(t)}")
        ids = np.flatnonzero(frame == t)
        seen = reconstruction.points[points[ids]].astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        x, y = np.divide(seen[:, :2].T, seen[:, 2], where=seen[:, 2] != 0, out=np.zeros((2, len(ids))))
        square = x**2 + y**2
        bend = 1 + square * (reconstruction.distortion[t, 0] + square * reconstruction.distortion[t, 1])
        k = reconstruction.intrinsics[t]
        column, row = (k[0, 0] * bend * x + k[0, 2]) * width, (k[1, 1] * bend * y + k[1, 2]) * height
        lines.append(" ".join(f"{c:.2f} {r:.2f} {i + 1}" for c, r, i in zip(column, row, ids)))
    return "\n".join(lines) + "\n"


def _points3d(reconstruction: Reconstruction, points: np.ndarray) -> str:
    lines = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    frame = reconstruction.point_frame[points]
    index = np.arange(len(points)) - np.searchsorted(frame, frame)  # the place in the list of its image
    rows = zip(reconstruction.points[points], reconstruction.point_colors[points], frame, index)
    for i, (xyz, (r, g, b), t, n) in enumerate(rows):
        lines.append(f"{i + 1} {_join(xyz)} {r} {g} {b} -1 {t + 1} {n}")
    return "\n".join(lines) + "\n"


def _name(t: int) -> str:
    return f"{t:05d}.png"


def _join(numbers) -> str:
    # enough digits to read the same number back
    return " ".join(f"{x:.9g}" if isinstance(x, np.float32) else f"{x:.17g}" for x in numbers)
