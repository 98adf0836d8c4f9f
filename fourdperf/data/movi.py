"""Kubric's own files, of which the MOVi data sets are made (Greff et al., CVPR 2022; google-research/kubric).

A scene is a folder, as Kubric's workers write it (not the TFDS records made from many of them):

    rgba_00000.png              frames; the alpha channel is dropped
    depth_00000.tiff            float32, the distance to the camera's centre, metres; 1e10 is background.
                                Or depth_00000.png, 16 bit: value / 65535 * (max - min) + min of data_ranges.json
    segmentation_00000.png      palette or grey: 0 background, k for instances[k - 1]
    normal_00000.png            16 bit, (n + 1) / 2 * 65535 in world coordinates                           (optional)
    forward_flow_00000.png      16 bit, (rows, columns, 0) in pixels, scaled by data_ranges.json           (optional)
    data_ranges.json            {"forward_flow": {"min", "max"}, "depth": {...}}     (needed by what is scaled by it)
    metadata.json               metadata.num_frames, metadata.resolution (width, height)
                                camera.focal_length, camera.sensor_width in millimetres; focal_length may be a list
                                camera.positions (T, 3), camera.quaternions (T, 4) w first: Blender's camera
                                instances[k].positions (T, 3), .quaternions (T, 4): world_from_body of the rigid body k
    object_coordinates_*, backward_flow_*, events.json                                               not read: no need

Bodies are rigid and the background stands still, so any pixel of a depth map can be followed through time exactly:
world_from_body(t') body_from_world(t) takes its point from time t to t'. (This is what Kubric's point tracking does
with object coordinates and bounding boxes.) A body whose positions and quaternions are null moves in a way nobody
knows; this is an extension for scenes that deform, as is the list of focal lengths. Blender's camera looks along -z
with y up; pixels are square, the principal point is the middle.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fourdperf.data.cameras import OPENCV_FROM_BLENDER, normalise_intrinsics, rotation_from_quaternion
from fourdperf.data.scene_files import FolderFiles, decode_image, numbered, read_json
from fourdperf.data.sources import Source, unit_normals, z_from_distance

__all__ = ["Movi"]

BACKGROUND_DISTANCE = 1e9


class Movi(Source):
    """One scene.

    Raises:
        FileNotFoundError: a frame, or a map among others, is missing.
        ValueError: a file is corrupt or does not say what it must.
    """

    def __init__(self, path: str | os.PathLike):
        self.files = FolderFiles(path)
        self.name = str(Path(path))
        self.metadata = read_json(self.files, "metadata.json")
        self.label = self.files.label("metadata.json")
        count, resolution = self._get("metadata", "num_frames"), self._get("metadata", "resolution")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{self.label}: metadata.num_frames: wanted a whole number above 0, got {count!r}")
        if not isinstance(resolution, list) or len(resolution) != 2 or not all(isinstance(n, int) for n in resolution):
            raise ValueError(f"{self.label}: metadata.resolution: wanted [width, height], got {resolution!r}")
        self.num_frames, self.size = count, (resolution[1], resolution[0])
        self.maps = {
            kind: numbered(self.files, "", count, f"{kind}_{{:05d}}.{suffix}")
            for kind, suffix in (
                ("rgba", "png"),
                ("depth", "tiff"),
                ("segmentation", "png"),
                ("normal", "png"),
                ("forward_flow", "png"),
            )
        }
        if not self.maps["rgba"]:
            raise FileNotFoundError(f"{self.files.label('rgba_00000.png')}: the file is missing")
        self.maps["depth"] = self.maps["depth"] or numbered(self.files, "", count, "depth_{:05d}.png")
        self.ranges = read_json(self.files, "data_ranges.json") if self.files.has("data_ranges.json") else {}
        self._read_cameras()
        self._read_bodies()

    def _read_cameras(self) -> None:
        focal = self._numbers(self._get("camera", "focal_length"), "camera.focal_length", None)
        if focal.shape not in ((), (self.num_frames,)):
            raise ValueError(
                f"{self.label}: camera.focal_length: wanted a number or {self.num_frames}, got {focal.shape}"
            )
        width = self._numbers(self._get("camera", "sensor_width"), "camera.sensor_width", ())
        fx = np.broadcast_to(focal / width, (self.num_frames,))
        k = np.zeros((self.num_frames, 3, 3))
        k[:, 0, 0], k[:, 1, 1] = fx, fx * self.size[1] / self.size[0]
        k[:, 0, 2] = k[:, 1, 2] = 0.5
        k[:, 2, 2] = 1
        self.k = normalise_intrinsics(k, None, f"{self.label}: camera.focal_length, camera.sensor_width")
        self.poses = self._poses(self.metadata["camera"], "camera") @ OPENCV_FROM_BLENDER

    def _read_bodies(self) -> None:
        bodies = self.metadata.get("instances")
        if not isinstance(bodies, list) or not all(isinstance(body, dict) for body in bodies):
            raise ValueError(f"{self.label}: instances: wanted a list of objects, got {type(bodies).__name__}")
        poses = [np.broadcast_to(np.eye(4), (self.num_frames, 4, 4))]
        for k, body in enumerate(bodies):
            unknown = body.get("positions", 0) is None and body.get("quaternions", 0) is None
            poses.append(np.full((self.num_frames, 4, 4), np.nan) if unknown else self._poses(body, f"instances[{k}]"))
        self.bodies = np.stack(poses, 1)  # (T, K + 1, 4, 4)

    def contents(self) -> list[str]:
        names = {"depth": "depth", "normal": "normals", "forward_flow": "flow", "segmentation": "moving bodies"}
        return [name for kind, name in names.items() if self.maps[kind]] + ["poses", "intrinsics"]

    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return [self._image("rgba", number, cv2.IMREAD_COLOR_RGB) for number in numbers]

    def depth(self, number: int) -> np.ndarray | None:
        if not self.maps["depth"]:
            return None
        distance = self._image("depth", number)
        if distance.dtype == np.uint16 and distance.ndim == 2:
            distance = self._scaled("depth", distance)
        elif distance.dtype != np.float32 or distance.ndim != 2:
            label = self.files.label(self.maps["depth"][number])
            raise ValueError(f"{label}: wanted one channel, float32 or 16 bit, got {distance.dtype} {distance.shape}")
        known = np.isfinite(distance) & (distance > 0) & (distance < BACKGROUND_DISTANCE)
        return z_from_distance(np.where(known, distance, np.float32(np.nan)), self.k[number])

    def normal(self, number: int) -> np.ndarray | None:
        if not self.maps["normal"]:
            return None
        stored = self._channels("normal", number)
        normal = (stored * np.float32(2 / 65535) - 1) @ self.poses[number, :3, :3].astype(np.float32)
        return unit_normals(normal, 0.1)  # nothing there is (0, 0, 0), and edges are mixtures

    def flow(self, number: int) -> np.ndarray | None:
        if not self.maps["forward_flow"] or number == self.num_frames - 1:
            return None
        pixels = self._scaled("forward_flow", self._channels("forward_flow", number)[..., 1::-1])
        return pixels / np.float32(pixels.shape[1::-1])

    def instances(self, number: int) -> np.ndarray | None:
        if not self.maps["segmentation"]:
            return None
        label = self.files.label(self.maps["segmentation"][number])
        ids = _indices(self.files.read(self.maps["segmentation"][number]), label)
        if ids.max(initial=0) >= self.bodies.shape[1]:
            raise ValueError(
                f"{label}: wanted ids up to {self.bodies.shape[1] - 1}, the number of instances, got {ids.max()}"
            )
        return ids

    def motion(self, numbers: Sequence[int]) -> np.ndarray | None:
        return self.bodies[list(numbers)] if self.maps["segmentation"] else None

    def intrinsics(self, numbers: Sequence[int]) -> np.ndarray:
        return self.k[list(numbers)]

    def world_from_camera(self, numbers: Sequence[int]) -> np.ndarray:
        return self.poses[list(numbers)]

    def _get(self, part: str, key: str) -> Any:
        section = self.metadata.get(part)
        if not isinstance(section, dict) or key not in section:
            raise ValueError(f"{self.label}: wanted {part}.{key}, it is missing")
        return section[key]

    def _numbers(self, found: Any, what: str, shape: tuple[int, ...] | None) -> np.ndarray:
        try:
            array = np.array(found, np.float64)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        if (shape is not None and array.shape != shape) or not np.isfinite(array).all():
            wanted = "numbers" if shape is None else f"finite numbers {shape}"
            raise ValueError(f"{self.label}: {what}: wanted {wanted}, got {str(found)[:60]}")
        return array

    def _poses(self, section: dict[str, Any], what: str) -> np.ndarray:
        poses = np.broadcast_to(np.eye(4), (self.num_frames, 4, 4)).copy()
        positions = self._numbers(section.get("positions"), f"{what}.positions", (self.num_frames, 3))
        turns = self._numbers(section.get("quaternions"), f"{what}.quaternions", (self.num_frames, 4))
        poses[:, :3, :3] = rotation_from_quaternion(turns, f"{self.label}: {what}.quaternions")
        poses[:, :3, 3] = positions
        return poses

    def _scaled(self, kind: str, stored: np.ndarray) -> np.ndarray:
        bounds = self.ranges.get(kind)
        if not isinstance(bounds, dict) or not all(isinstance(bounds.get(end), (int, float)) for end in ("min", "max")):
            raise ValueError(f"{self.files.label('data_ranges.json')}: wanted {kind}.min and {kind}.max, got {bounds}")
        low, high = bounds["min"], bounds["max"]
        return (stored / 65535 * (high - low) + low).astype(np.float32)

    def _channels(self, kind: str, number: int) -> np.ndarray:
        stored = self._image(kind, number)
        if stored.dtype != np.uint16 or stored.ndim != 3 or stored.shape[2] != 3:
            label = self.files.label(self.maps[kind][number])
            raise ValueError(f"{label}: wanted three 16-bit channels, got {stored.dtype} {stored.shape}")
        return stored[..., ::-1]  # OpenCV gives BGR

    def _image(self, kind: str, number: int, flags: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
        name = self.maps[kind][number]
        image = decode_image(self.files.read(name), self.files.label(name), flags)
        if image.shape[:2] != self.size:
            raise ValueError(f"{self.files.label(name)}: wanted {self.size}, as metadata.json says, got {image.shape}")
        return image


def _indices(content: bytes, label: str) -> np.ndarray:
    """The palette's indices, or the grey values, of a PNG: int64 (H, W)."""
    palette = _palette(content)
    image = decode_image(content, label, cv2.IMREAD_UNCHANGED)
    if palette is None:
        if image.ndim != 2:
            raise ValueError(f"{label}: wanted a palette or one grey channel, got {image.shape}")
        return image.astype(np.int64)
    # OpenCV applies the palette; its colours must be different to find the indices again.
    codes = palette.astype(np.int64) @ [1 << 16, 1 << 8, 1]
    if len(np.unique(codes)) != len(codes):
        raise ValueError(f"{label}: the palette has a colour twice, so that its indices cannot be told apart")
    order = np.argsort(codes)
    pixels = image[..., 2::-1].astype(np.int64) @ [1 << 16, 1 << 8, 1]
    return order[np.searchsorted(codes, pixels, sorter=order)]


def _palette(content: bytes) -> np.ndarray | None:
    """The colours (n, 3) uint8 of a palette PNG, None for another."""
    at = 8
    while content.startswith(b"\x89PNG") and at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind == b"PLTE":
            return np.frombuffer(content, np.uint8, length, at + 8).reshape(-1, 3)
        if kind == b"IDAT":
            break
        at += 12 + length
    return None
