"""The generic folder: anything can be converted to it with numpy and an image writer (docs/data.md shows how).

    SCENE/
      frames/*.png                frames in the order of their names: PNG, JPEG, TIFF, WebP, BMP; or
      video.mp4                   a video (.mp4 .mov .mkv .avi .webm)
      depth/*, or depth.npy       a map (h, w) per frame, or (T, h, w) in one file, read memory-mapped
      normals/*, normals.npy      (h, w, 3): unit vectors; images hold (n + 1) / 2 of their largest value
      instances/*, instances.npy  (h, w) whole numbers from 0: the rows of world_from_body
      cameras.npz                 intrinsics (3, 3) or (T, 3, 3), and poses (T, 4, 4); one of them may be missing
      bodies.npz                  world_from_body (T, K, 4, 4): how rigid bodies move, NaN where nobody knows
      tracks.npz                  uv (T, N, 2), visible (T, N); optional: xyz (T, N, 3) in the world, valid (T, N)
      scene.json                  what the numbers mean

Only frames must be there, and depth or tracks, since otherwise nothing is known. A map per frame is `.npy`, or an
image of one channel (float TIFF, or whole numbers); it has the name of its frame, or for a video any name that sorts.
Depths that are 0, negative or not finite are not known; so are normals whose length is not about 1, and track
coordinates that are not finite.

`scene.json` says what cannot be told from numbers. Each is needed if the file it is about is there:

    "depth"        "z", or "distance" to the camera's centre
    "depth_scale"  scene units per count, for depth maps of whole numbers (0.001 for millimetres in metres)
    "normals"      "camera" or "world" coordinates
    "intrinsics"   "normalised" (u = fx X/Z + cx), or "pixels" of the frames with the first pixel's centre at
                   (0.5, 0.5), or "pixels_integer_centres", at (0, 0)
    "poses"        "world_from_camera" or "camera_from_world"
    "axes"         of the cameras: "opencv" (x right, y down, z forward) or "opengl" (y up, z backward)
    "tracks"       units of uv, as for intrinsics: "normalised", "pixels", "pixels_integer_centres"
    "static"       optional; true: nothing moves but the camera, so that depth maps can be followed through time

Unknown keys are refused, so that a misspelt one is not overlooked.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from fourdperf.data.cameras import OPENCV_FROM_BLENDER, check_poses, normalise_intrinsics
from fourdperf.data.scene_files import IMAGE_SUFFIXES, FolderFiles, Npz, SceneFiles, decode_image, read_json, read_npy
from fourdperf.data.sources import Source, Tracks, unit_normals, z_from_distance

__all__ = ["VIDEO_SUFFIXES", "Folder", "find_video"]

VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
UNITS = ("normalised", "pixels", "pixels_integer_centres")
CHOICES = {
    "depth": ("z", "distance"),
    "normals": ("camera", "world"),
    "intrinsics": UNITS,
    "poses": ("world_from_camera", "camera_from_world"),
    "axes": ("opencv", "opengl"),
    "tracks": UNITS,
    "static": (True, False),
}


def find_video(files: SceneFiles) -> str | None:
    """The name of the scene's video file, None without one."""
    found = [name for name in files.list() if Path(name).stem == "video" and Path(name).suffix in VIDEO_SUFFIXES]
    if len(found) > 1:
        raise ValueError(f"{files.label(found[1])}: wanted one video, got {', '.join(found)}")
    return found[0] if found else None


class Folder(Source):
    """One scene in the generic layout, in a folder, or in memory as it comes from a tar shard.

    Raises:
        FileNotFoundError: there are no frames, or a frame's map is missing among others.
        ValueError: a file is corrupt or of a wrong shape, or `scene.json` does not say what it must.
    """

    def __init__(self, path: str | os.PathLike | SceneFiles):
        self.files = FolderFiles(path) if isinstance(path, (str, os.PathLike)) else path
        self.name = self.files.label("").rstrip("/")
        self.notes = read_json(self.files, "scene.json") if self.files.has("scene.json") else {}
        self._check_notes()
        self.video = find_video(self.files)
        self.images = [name for name in self.files.list("frames") if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if bool(self.video) == bool(self.images):
            found = f"both frames/ and {self.video}" if self.video else "neither"
            raise FileNotFoundError(f"{self.name}: wanted images in frames/, or a video.mp4, got {found}")
        self._measure()
        self.depths = _Maps(self, "depth")
        self.normals = _Maps(self, "normals")
        self.bodies = _Maps(self, "instances")
        if self.depths:
            self._note("depth")
        if self.normals:
            self._note("normals")
        self._read_cameras()
        self._read_motion()
        self._read_tracks()
        if not self.depths and self.tracks_npz is None:
            raise ValueError(f"{self.name}: wanted depth maps (depth/, depth.npy) or tracks.npz, found neither")

    def _check_notes(self) -> None:
        label = self.files.label("scene.json")
        for key, value in self.notes.items():
            if key == "depth_scale":
                if not isinstance(value, (int, float)) or not 0 < value < np.inf:
                    raise ValueError(f"{label}: depth_scale: wanted a number above 0, got {value!r}")
            elif key not in CHOICES:
                raise ValueError(f"{label}: no key {key!r}; there are depth_scale, {', '.join(CHOICES)}")
            elif value not in CHOICES[key]:
                raise ValueError(f"{label}: {key}: wanted one of {CHOICES[key]}, got {value!r}")

    def _note(self, key: str) -> str:
        if key not in self.notes:
            wanted = "a number" if key == "depth_scale" else f"one of {CHOICES[key]}"
            raise ValueError(f"{self.files.label('scene.json')}: wanted {key!r}, {wanted}; it is missing")
        return self.notes[key]

    def _measure(self) -> None:
        if self.images:
            self.num_frames = len(self.images)
        else:
            capture = self._capture()
            self.num_frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            capture.release()
            if not self.num_frames:
                raise ValueError(f"{self.files.label(self.video)}: the video does not say how many frames it has")
        self.size = self.frames([0])[0].shape[:2]

    def _read_cameras(self) -> None:
        self.k = self.poses = None
        if not self.files.has("cameras.npz"):
            return
        arrays = Npz(self.files, "cameras.npz")
        if not {"intrinsics", "poses"} & set(arrays.shapes):
            raise ValueError(f"{arrays.label}: wanted intrinsics or poses, got only {sorted(arrays.shapes)}")
        if "intrinsics" in arrays:
            units = self._note("intrinsics")
            k = arrays.all("intrinsics")
            if k.shape not in ((3, 3), (self.num_frames, 3, 3)):
                raise ValueError(
                    f"{arrays.label}: intrinsics: wanted (3, 3) or ({self.num_frames}, 3, 3), got {k.shape}"
                )
            size, centre = _units(units, self.size)
            k = normalise_intrinsics(k, size, f"{arrays.label}: intrinsics", centre)
            self.k = np.broadcast_to(k, (self.num_frames, 3, 3))
        if "poses" in arrays:
            direction, axes = self._note("poses"), self._note("axes")
            arrays.shape("poses", (self.num_frames, 4, 4))
            poses = check_poses(arrays.all("poses"), f"{arrays.label}: poses")
            poses = np.linalg.inv(poses) if direction == "camera_from_world" else poses
            self.poses = poses @ OPENCV_FROM_BLENDER if axes == "opengl" else poses

    def _read_motion(self) -> None:
        self.world_from_body = None
        if self.notes.get("static"):
            self.world_from_body = np.broadcast_to(np.eye(4), (self.num_frames, 1, 4, 4))
            if self.bodies or self.files.has("bodies.npz"):
                raise ValueError(f"{self.name}: wanted instances and bodies.npz, or static in scene.json, not both")
            return
        if bool(self.bodies) != self.files.has("bodies.npz"):
            there, missing = ("instances", "bodies.npz") if self.bodies else ("bodies.npz", "instances")
            raise FileNotFoundError(f"{self.name}: {there} needs {missing}, which is missing")
        if self.bodies:
            arrays = Npz(self.files, "bodies.npz")
            arrays.shape("world_from_body", (self.num_frames, "K", 4, 4))
            motion = arrays.all("world_from_body").astype(np.float64)
            known = np.isfinite(motion).all((-1, -2))
            motion[known] = check_poses(motion[known], f"{arrays.label}: world_from_body")
            motion[~known] = np.nan
            self.world_from_body = motion

    def _read_tracks(self) -> None:
        self.tracks_npz = None
        if not self.files.has("tracks.npz"):
            return
        self._note("tracks")
        arrays = self.tracks_npz = Npz(self.files, "tracks.npz")
        points = arrays.shape("uv", (self.num_frames, "N", 2))[1]
        arrays.shape("visible", (self.num_frames, points))
        for key, shape in {"xyz": (points, 3), "valid": (points,)}.items():
            if key in arrays:
                arrays.shape(key, (self.num_frames, *shape))

    def contents(self) -> list[str]:
        there = {
            "depth": self.depths,
            "normals": self.normals,
            "moving bodies": self.bodies,
            "static": self.notes.get("static"),
            "3-D tracks": self.tracks_npz is not None and "xyz" in self.tracks_npz,
            "2-D tracks": self.tracks_npz is not None and "xyz" not in self.tracks_npz,
            "poses": self.poses is not None,
            "intrinsics": self.k is not None,
        }
        return [what for what, found in there.items() if found]

    def frames(self, numbers: Sequence[int]) -> list[np.ndarray]:
        if self.video:
            frames = self._decode(numbers)
        else:
            names = [self.images[number] for number in numbers]
            flags = cv2.IMREAD_COLOR_RGB
            frames = [decode_image(self.files.read(name), self.files.label(name), flags) for name in names]
        wanted = getattr(self, "size", frames[0].shape[:2])
        for number, frame in zip(numbers, frames):
            if frame.shape[:2] != wanted:
                label = self.files.label(self.video or self.images[number])
                raise ValueError(f"{label}: wanted {wanted} as the first frame, got {frame.shape[:2]}")
        return frames

    def depth(self, number: int) -> np.ndarray | None:
        if not self.depths:
            return None
        stored = self.depths.read(number, 2)
        if stored.dtype.kind in "iu":
            stored = stored * np.float32(self._note("depth_scale"))
        depth = np.where(np.isfinite(stored) & (stored > 0), stored, np.nan).astype(np.float32)
        if self._note("depth") == "z":
            return depth
        if self.k is None:
            raise ValueError(f"{self.name}: a depth that is a distance needs intrinsics in cameras.npz")
        return z_from_distance(depth, self.k[number])

    def normal(self, number: int) -> np.ndarray | None:
        if not self.normals:
            return None
        normal = self.normals.read(number, 3)
        if normal.dtype.kind == "u":
            normal = normal * np.float32(2 / np.iinfo(normal.dtype).max) - 1
        normal = normal.astype(np.float32)
        if self._note("normals") == "world":
            if self.poses is None:
                raise ValueError(f"{self.name}: normals in world coordinates need poses in cameras.npz")
            normal = normal @ self.poses[number, :3, :3].astype(np.float32)
        return unit_normals(normal, 0.1)

    def instances(self, number: int) -> np.ndarray | None:
        if not self.bodies:
            return None
        ids = self.bodies.read(number, 2)
        count = self.world_from_body.shape[1]
        if ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < count):
            raise ValueError(
                f"{self.bodies.label(number)}: wanted whole numbers from 0 to {count - 1}, the bodies, "
                f"got {ids.dtype} {ids.min(initial=0)} to {ids.max(initial=0)}"
            )
        return ids.astype(np.int64)

    def motion(self, numbers: Sequence[int]) -> np.ndarray | None:
        return None if self.world_from_body is None else self.world_from_body[list(numbers)]

    def intrinsics(self, numbers: Sequence[int]) -> np.ndarray | None:
        return None if self.k is None else self.k[list(numbers)]

    def world_from_camera(self, numbers: Sequence[int]) -> np.ndarray | None:
        return None if self.poses is None else self.poses[list(numbers)]

    def tracks(self, numbers: Sequence[int]) -> Tracks | None:
        arrays = self.tracks_npz
        if arrays is None:
            return None
        size, centre = _units(self.notes["tracks"], self.size)
        uv = arrays.rows("uv", numbers).astype(np.float32)
        if size is not None:
            uv = (uv + (0.5 if centre == "integer" else 0)) / np.float32(size[::-1])
        known = np.isfinite(uv).all(-1)
        if "valid" in arrays:
            known &= arrays.rows("valid", numbers).astype(bool)
        xyz = None
        if "xyz" in arrays:
            xyz = arrays.rows("xyz", numbers).astype(np.float32)
            xyz[~(known & np.isfinite(xyz).all(-1))] = np.nan
        uv[~known] = np.nan
        inside = ((uv >= 0) & (uv <= 1)).all(-1)
        return Tracks(uv, xyz, arrays.rows("visible", numbers).astype(bool) & inside)

    def _capture(self) -> cv2.VideoCapture:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            capture = cv2.VideoCapture(str(self.files.local(self.video)))
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not capture.isOpened():
            raise ValueError(f"{self.files.label(self.video)}: wanted a video that OpenCV can read")
        return capture

    def _decode(self, numbers: Sequence[int]) -> list[np.ndarray]:
        capture = self._capture()
        try:
            at = numbers[0]
            capture.set(cv2.CAP_PROP_POS_FRAMES, at)
            if capture.get(cv2.CAP_PROP_POS_FRAMES) != at:  # a container that cannot seek to a frame
                capture.release()
                capture, at = self._capture(), 0
            frames = []
            for number in numbers:
                while at < number and capture.grab():
                    at += 1
                found, frame = capture.read()
                if not found:
                    raise ValueError(
                        f"{self.files.label(self.video)}: corrupt or cut off: frame {number} of {self.num_frames} "
                        "cannot be read"
                    )
                at += 1
                frames.append(cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB if frame.ndim == 2 else cv2.COLOR_BGR2RGB))
            return frames
        finally:
            capture.release()


def _units(units: str, size: tuple[int, int]) -> tuple[tuple[int, int] | None, str]:
    return (None if units == "normalised" else size), ("integer" if units == "pixels_integer_centres" else "half")


class _Maps:
    """One map per frame: a folder of files, or one `.npy` with all of them; false if there is neither."""

    def __init__(self, scene: Folder, what: str):
        self.files, self.what = scene.files, what
        self.single = f"{what}.npy" if scene.files.has(f"{what}.npy") else None
        names = scene.files.list(what)
        if self.single and names:
            raise ValueError(f"{scene.name}: wanted {what}/ or {what}.npy, got both")
        if scene.images and names:
            by_stem = {Path(name).stem: name for name in names}
            missing = [Path(name).stem for name in scene.images if Path(name).stem not in by_stem]
            if missing:
                label = scene.files.label(f"{what}/{missing[0]}.*")
                raise FileNotFoundError(f"{label}: the map of this frame is missing ({len(missing)} of {len(names)})")
            names = [by_stem[Path(name).stem] for name in scene.images]
        self.names, self.count = names, scene.num_frames
        if self.single:
            shape = self._open().shape
            if not shape or shape[0] != self.count:
                raise ValueError(f"{scene.files.label(self.single)}: wanted {self.count} maps (T, ...), got {shape}")
        elif names and len(names) != self.count:
            raise FileNotFoundError(
                f"{scene.files.label(what)}: wanted {self.count} maps, one per frame, got {len(names)}"
            )

    def __bool__(self) -> bool:
        return bool(self.single or self.names)

    def label(self, number: int) -> str:
        return self.files.label(self.single or self.names[number])

    def read(self, number: int, ndim: int) -> np.ndarray:
        """The map of a frame, of ``ndim`` axes; the third of an image is RGB."""
        if self.single:
            stored = np.array(self._open()[number])
        elif self.names[number].endswith(".npy"):
            stored = read_npy(self.files, self.names[number])
        else:
            stored = decode_image(self.files.read(self.names[number]), self.label(number))
            stored = stored[..., ::-1] if stored.ndim == 3 else stored
        if stored.ndim != ndim or (ndim == 3 and stored.shape[2] != 3) or stored.dtype.kind not in "iuf":
            wanted = "(h, w)" if ndim == 2 else "(h, w, 3)"
            raise ValueError(f"{self.label(number)}: wanted a map {wanted}, got {stored.dtype} {stored.shape}")
        return stored

    def _open(self) -> np.ndarray:
        if not isinstance(self.files, FolderFiles):
            return read_npy(self.files, self.single)
        try:
            return np.load(self.files.local(self.single), mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.files.label(self.single)}: wanted an intact .npy array: {error}") from error
