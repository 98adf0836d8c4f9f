"""PointOdyssey as it is on disk (Zheng et al., ICCV 2023; github.com/y-zheng18/point_odyssey, release 1.2).

A sequence is a folder; the splits train/, val/ and test/ hold many:

    rgbs/rgb_00000.jpg          frames, W x H (960 x 540)
    depths/depth_00000.png      16 bit; z-depth in metres = value / 65535 * 1000; 0 and 65535 (sky) are not known
    normals/normal_00000.jpg    8 bit; (n + 1) / 2 * 255 in Blender's world axes
    masks/mask_00000.png        instance colours; not read
    anno.npz                    trajs_2d   (T, N, 2) pixels, the first pixel's centre at (0.5, 0.5)
                                trajs_3d   (T, N, 3) world, metres; empty in the sequences without 3-D tracks
                                visibs     (T, N)    the frame shows the point
                                valids     (T, N)    the annotation is to be trusted
                                intrinsics (T, 3, 3) pixels
                                extrinsics (T, 4, 4) camera_from_world, OpenCV
    info.npz                    the shapes of those arrays, for a quick look; not read

Coordinates that are not finite are invalid, whatever `valids` says. Numbers may be float16, whose rounding moves
rotations by up to 5e-4; they are made exactly orthogonal. The world has y up, where Blender's has z: (x, y, z) of a
normal map is (x, z, -y) of the world (upstream's `gen_tracking*.py` folds that turn into the extrinsics only). JPEG
mixes normals across edges; those whose length is off by more than 5 % (edges, sky) are not known.

Loading is by frames: where `anno.npz` was written by ``numpy.savez``, only the frames of a clip are read.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from fourdperf.data.cameras import check_poses, normalise_intrinsics
from fourdperf.data.scene_files import FolderFiles, Npz, decode_image, numbered
from fourdperf.data.sources import Source, Tracks, unit_normals

__all__ = ["MAX_DEPTH", "PointOdyssey", "WORLD_FROM_BLENDER"]

MAX_DEPTH = 1000.0
WORLD_FROM_BLENDER = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
LENGTH_TOLERANCE = 0.05
ROTATION_TOLERANCE = 5e-3


class PointOdyssey(Source):
    """One sequence.

    Raises:
        FileNotFoundError: a frame, or a depth or normal map among others, is missing.
        ValueError: `anno.npz` is corrupt, or an array in it is missing or of a wrong shape.
    """

    def __init__(self, path: str | os.PathLike):
        self.files = FolderFiles(path)
        self.name = str(Path(path))
        self.anno = Npz(self.files, "anno.npz")
        count, points = self.anno.shape("trajs_2d", ("T", "N", 2))[:2]
        for key in ("visibs", "valids"):
            self.anno.shape(key, (count, points))
        self.anno.shape("intrinsics", (count, 3, 3))
        self.anno.shape("extrinsics", (count, 4, 4))
        self.has_xyz = 0 not in self.anno.shapes.get("trajs_3d", (0,)) and self.anno.shapes["trajs_3d"] != ()
        if self.has_xyz:
            self.anno.shape("trajs_3d", (count, points, 3))
        self.num_frames = count
        self.rgbs = numbered(self.files, "rgbs", count, "rgb_{:05d}.jpg")
        if not count:
            raise ValueError(f"{self.anno.label}: wanted at least one frame, got arrays for none")
        if not self.rgbs:
            raise FileNotFoundError(f"{self.files.label('rgbs')}: wanted {count} frames rgb_00000.jpg ..., found none")
        self.depths = numbered(self.files, "depths", count, "depth_{:05d}.png")
        self.normals = numbered(self.files, "normals", count, "normal_{:05d}.jpg")
        self.size = self._image(self.rgbs[0], cv2.IMREAD_COLOR_RGB).shape[:2]
        label = self.anno.label
        self.k = normalise_intrinsics(self.anno.all("intrinsics"), self.size, f"{label}: intrinsics")
        camera_from_world = check_poses(self.anno.all("extrinsics"), f"{label}: extrinsics", ROTATION_TOLERANCE)
        self.poses = np.linalg.inv(camera_from_world)

    def contents(self) -> list[str]:
        there = {"depth": self.depths, "normals": self.normals, f"{3 if self.has_xyz else 2}-D tracks": True}
        return [what for what, found in there.items() if found] + ["poses", "intrinsics"]

    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        frames = []
        for name in (self.rgbs[number] for number in numbers):
            frames.append(self._image(name, cv2.IMREAD_COLOR_RGB))
            if frames[-1].shape[:2] != self.size:
                label = self.files.label(name)
                raise ValueError(f"{label}: wanted {self.size} as the first frame, got {frames[-1].shape[:2]}")
        return frames

    def depth(self, number: int) -> np.ndarray | None:
        if not self.depths:
            return None
        name = self.depths[number]
        stored = self._image(name, cv2.IMREAD_UNCHANGED)
        if stored.dtype != np.uint16 or stored.ndim != 2:
            raise ValueError(f"{self.files.label(name)}: wanted one 16-bit channel, got {stored.dtype} {stored.shape}")
        known = (stored > 0) & (stored < 65535)
        return np.where(known, stored / np.float32(65535) * np.float32(MAX_DEPTH), np.float32(np.nan))

    def normal(self, number: int) -> np.ndarray | None:
        if not self.normals:
            return None
        stored = self._image(self.normals[number], cv2.IMREAD_COLOR_RGB)
        turn = (self.poses[number, :3, :3].T @ WORLD_FROM_BLENDER).astype(np.float32)
        return unit_normals((stored * np.float32(2 / 255) - 1) @ turn.T, LENGTH_TOLERANCE)

    def intrinsics(self, numbers: Sequence[int]) -> np.ndarray:
        return self.k[list(numbers)]

    def world_from_camera(self, numbers: Sequence[int]) -> np.ndarray:
        return self.poses[list(numbers)]

    def tracks(self, numbers: Sequence[int]) -> Tracks:
        uv = self.anno.rows("trajs_2d", numbers).astype(np.float32) / np.float32(self.size[::-1])
        known = self.anno.rows("valids", numbers).astype(bool) & np.isfinite(uv).all(-1)
        xyz = None
        if self.has_xyz:
            xyz = self.anno.rows("trajs_3d", numbers).astype(np.float32)
            xyz[~(known & np.isfinite(xyz).all(-1))] = np.nan
        uv[~known] = np.nan
        inside = ((uv >= 0) & (uv < 1)).all(-1)
        return Tracks(uv, xyz, self.anno.rows("visibs", numbers).astype(bool) & inside)

    def _image(self, name: str, flags: int) -> np.ndarray:
        return decode_image(self.files.read(name), self.files.label(name), flags)
