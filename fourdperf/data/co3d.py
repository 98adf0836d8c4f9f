"""Common Objects in 3D, version 2 (Reizenstein et al., ICCV 2021; github.com/facebookresearch/co3d): videos with
cameras.

    ROOT/CATEGORY/frame_annotations.jgz        gzipped JSON, a list: sequence_name, frame_number,
                                               image {path, size (H, W)}, viewpoint {R, T, focal_length,
                                               principal_point, intrinsics_format}
                  sequence_annotations.jgz     a list: sequence_name, viewpoint_quality_score
                  set_lists/set_lists_NAME.json    {"train" | "val" | "test": [[sequence, frame number, path], ...]}
                  SEQUENCE/images/frame000001.jpg
    masks, depth maps, point clouds            not read

Viewpoints are PyTorch3D's: x_camera = x_world R + T for rows, with axes left, up and forward; focal length and
principal point in units of half the shorter side ("ndc_isotropic"; in a file without the entry, half of each side,
"ndc_norm_image_bounds"), from the middle of the image, to the left and up. They become world_from_camera with axes
right, down and forward, and normalised intrinsics (`fourdperf.data.queries`), of the middle of the image that is cut
out and brought to one size.

Which sequences: all whose viewpoint_quality_score is among the best part of their category, or those of a JSON list,
such as the original's co3dv2_top25_splits.json. Such a list is read whatever its nesting: keys "train", "val" and
"test" (or "valid", "validation") name the split of all below; the first other key above a list or object is the
category, a key below it a sequence. Sequences are also strings, "SEQUENCE" or "CATEGORY/SEQUENCE", and the first of
lists [sequence, frame, path]. Where nothing says so, a tenth of the sequences is val and a tenth test, by a seed.
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from fourdperf.data.cameras import check_poses, normalise_intrinsics
from fourdperf.data.images import crop
from fourdperf.data.scene_files import decode_image
from fourdperf.geometry import invert_rigid

__all__ = ["Co3d", "open_co3d", "world_from_pytorch3d"]

SOURCE = "get it with the script of https://github.com/facebookresearch/co3d"
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Video(NamedTuple):
    """A sequence: images (T paths), size (H, W) of each (T, 2), poses (T, 4, 4), intrinsics (T, 3, 3) of the frames."""

    category: str
    name: str
    images: list[str]
    sizes: np.ndarray
    poses: np.ndarray
    intrinsics: np.ndarray


class Co3d:
    """Sequences, a `fourdperf.data.niso_shards.SequenceSource`, as `open_co3d` finds them; images are read when asked
    for.

    Attributes:
        names: (category, sequence) of each.

    Raises:
        FileNotFoundError: of an item, an image is missing.
        ValueError: of an item, an image is cut off, or of another size than is said.
    """

    def __init__(self, root: Path, videos: Sequence[Video], size: tuple[int, int]):
        self.root, self.videos, self.size = root, list(videos), size
        self.names = [(video.category, video.name) for video in videos]

    def __len__(self) -> int:
        return len(self.videos)

    def frames(self, index: int) -> int:
        return len(self.videos[index].images)

    def read(self, index: int, numbers: Sequence[int]) -> dict[str, Tensor]:
        video, chosen = self.videos[index], list(numbers)
        pixels = np.stack([self._image(video, i) for i in chosen]).astype(np.float32) / 255
        found = {"video": pixels, "poses": video.poses[chosen], "intrinsics": video.intrinsics[chosen]}
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in found.items()}

    def _image(self, video: Video, number: int) -> np.ndarray:
        path, wanted = self.root / video.images[number], tuple(video.sizes[number].tolist())
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the image is missing; {SOURCE}")
        image = decode_image(path.read_bytes(), str(path), cv2.IMREAD_COLOR)
        if image.shape[:2] != wanted:
            raise ValueError(f"{path}: wanted {wanted} pixels, as frame_annotations.jgz says, got {image.shape[:2]}")
        return cv2.cvtColor(crop(image, self.size), cv2.COLOR_BGR2RGB)


def open_co3d(
    root: Path,
    size: tuple[int, int] = (144, 144),
    *,
    categories: Sequence[str] | None = None,
    listed: Path | None = None,
    best: float = 0.25,
    set_list: str | None = None,
    min_frames: int = 2,
    seed: int = 0,
) -> dict[str, Co3d]:
    """The sequences by split; a split without any is not there. Each category's annotations are read once.

    Args:
        root: the folder with the categories.
        size: (H, W) of the frames.
        categories: folders; None for all.
        listed: a JSON file of sequences.
        best: the part of each category's sequences that is taken, by their viewpoint's quality, without `listed`.
        set_list: take sequences, frames and splits from set_lists/set_lists_NAME.json.
        min_frames: shorter sequences are left out.
        seed: of the splits.

    Raises:
        FileNotFoundError: there is no such folder or file, or no sequence.
        ValueError: a file is corrupt, or a camera is not one; an argument is out of range.
    """
    root = Path(root)
    if not 0 < best <= 1 or min_frames < 1:
        raise ValueError(f"wanted 0 < best <= 1 and min_frames from 1, got {best} and {min_frames}")
    there = sorted(path.parent.name for path in root.glob("*/frame_annotations.jgz"))
    unknown = sorted(set(categories or ()) - set(there))
    if not there or unknown:
        missing = f"no {unknown}, only {there}" if there else "no CATEGORY/frame_annotations.jgz"
        raise FileNotFoundError(f"co3d: {missing} in {root}; {SOURCE}")
    picks = None if listed is None else _read_list(Path(listed))
    videos: dict[str, list[Video]] = {split: [] for split in ("train", "val", "test")}
    for category in there if categories is None else sorted(set(categories)):
        frames = _read_frames(root / category)
        if set_list is not None:
            chosen = _by_set_list(root / category, frames, set_list)
        elif picks is not None:
            chosen = _by_list(category, frames, picks, seed)
        else:
            chosen = _draw(category, _best(root / category, sorted(frames), best), seed)
            chosen = [(split, name, frames[name]) for split, name in chosen]
        for split, name, some in chosen:
            if len(some) >= min_frames:
                videos[split].append(_video(root, category, name, some, size))
    if not any(videos.values()):
        raise FileNotFoundError(f"co3d: no sequence of those asked for has at least {min_frames} frames in {root}")
    return {split: Co3d(root, found, tuple(size)) for split, found in videos.items() if found}


def _read_frames(folder: Path) -> dict[str, list[dict]]:
    """The annotations of each sequence's frames, in their order."""
    file, frames = folder / "frame_annotations.jgz", defaultdict(list)
    for entry in _read_jgz(file):
        frames[_field(entry, "sequence_name", file)].append(entry)
    for entries in frames.values():
        entries.sort(key=lambda entry: _field(entry, "frame_number", file))
    return dict(frames)


Choice = list[tuple[str, str, list[dict]]]  # split, sequence, frames


def _by_set_list(folder: Path, frames: dict[str, list[dict]], name: str) -> Choice:
    file = folder / "set_lists" / f"set_lists_{name}.json"
    found, chosen = _read_json(file), []
    for split in ("train", "val", "test"):
        allowed = defaultdict(set)
        try:
            for sequence, number, *_ in found[split]:
                allowed[sequence].add(number)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: wanted lists of [sequence, frame, path] by split: {error!r}") from error
        for sequence in sorted(allowed.keys() & frames.keys()):
            some = [entry for entry in frames[sequence] if entry["frame_number"] in allowed[sequence]]
            chosen.append((split, sequence, some))
    return chosen


def _by_list(category: str, frames: dict[str, list[dict]], picks: list, seed: int) -> Choice:
    mine = [(split, name) for split, what, name in picks if what in (None, category) and name in frames]
    told = {name: split for split, name in mine if split}
    drawn = _draw(category, sorted({name for _, name in mine}), seed)
    return [(told.get(name, split), name, frames[name]) for split, name in drawn]


def _best(folder: Path, names: list[str], best: float) -> list[str]:
    if best == 1:
        return names
    file, scores = folder / "sequence_annotations.jgz", {}
    for entry in _read_jgz(file):
        score = entry.get("viewpoint_quality_score")
        scores[_field(entry, "sequence_name", file)] = -np.inf if score is None else float(score)
    ranked = sorted(names, key=lambda name: (-scores.get(name, -np.inf), name))
    return sorted(ranked[: max(1, round(best * len(names)))])


def _draw(category: str, names: list[str], seed: int) -> list[tuple[str, str]]:
    """(split, sequence), which depends on the sequence's name and the seed alone."""
    dice = [zlib.crc32(f"{seed} {category}/{name}".encode()) % 10 for name in names]
    return [({0: "test", 1: "val"}.get(n, "train"), name) for n, name in zip(dice, names)]


def _video(root: Path, category: str, name: str, entries: list[dict], size: tuple[int, int]) -> Video:
    label = f"{root / category / 'frame_annotations.jgz'}: {name}"
    try:
        view = [entry["viewpoint"] for entry in entries]
        rotation, translation, focal, principal = (
            np.array([v[key] for v in view], np.float64).reshape(len(view), *shape)
            for key, shape in (("R", (3, 3)), ("T", (3,)), ("focal_length", (2,)), ("principal_point", (2,)))
        )
        isotropic = np.array([v.get("intrinsics_format") == "ndc_isotropic" for v in view])
        images = [str(entry["image"]["path"]) for entry in entries]
        sizes = np.array([entry["image"]["size"] for entry in entries], np.int64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{label}: wanted a viewpoint, and an image's path and size, of every frame: {error!r}"
        ) from error
    across = sizes[:, ::-1].astype(np.float64)  # width and height
    unit = np.where(isotropic[:, None], across.min(1, keepdims=True), across) / 2
    # the part of the image that is cut out, in pixels: its sides have the frames' ratio
    wanted = np.array(size[::-1], np.float64)
    part = wanted * (across / wanted).min(1, keepdims=True)
    k = np.zeros((len(entries), 3, 3))
    k[:, [0, 1], [0, 1]] = focal * unit / part
    k[:, [0, 1], [2, 2]] = (part / 2 - principal * unit) / part
    k[:, 2, 2] = 1
    poses = world_from_pytorch3d(rotation, translation, label)
    return Video(category, name, images, sizes, poses, normalise_intrinsics(k, None, label))


def world_from_pytorch3d(rotation: np.ndarray, translation: np.ndarray, name: str = "R, T") -> np.ndarray:
    """world_from_camera (..., 4, 4), axes right, down and forward, of PyTorch3D's R (..., 3, 3) and T (..., 3).

    Raises:
        ValueError: they are no rigid motion.
    """
    flip = np.array([-1.0, -1.0, 1.0])
    camera_from_world = np.zeros((*translation.shape[:-1], 4, 4))
    camera_from_world[..., :3, :3] = flip[:, None] * np.swapaxes(rotation, -1, -2)
    camera_from_world[..., :3, 3] = flip * translation
    camera_from_world[..., 3, 3] = 1
    return invert_rigid(torch.from_numpy(check_poses(camera_from_world, name))).numpy()


def _read_list(file: Path) -> list[tuple[str | None, str | None, str]]:
    """(split, category, sequence) of a JSON list, None for what it does not say."""

    def walk(found: Any, split: str | None, category: str | None) -> Iterator[tuple[str | None, str | None, str]]:
        if isinstance(found, dict):
            for key, value in found.items():
                if key in SPLITS:
                    yield from walk(value, SPLITS[key], category)
                elif category is None and isinstance(value, dict | list):
                    yield from walk(value, split, key)
                else:
                    yield split, category, key
        elif isinstance(found, list):
            triple = len(found) > 1 and isinstance(found[0], str) and not isinstance(found[1], str)
            for value in found[:1] if triple else found:
                yield from walk(value, split, category)
        elif isinstance(found, str):
            before, _, name = found.rpartition("/")
            yield split, before or category, name

    picks = list(walk(_read_json(file), None, None))
    if not picks:
        raise ValueError(f"{file}: wanted names of sequences, got none")
    return picks


def _read_jgz(file: Path) -> list[dict]:
    try:
        found = json.loads(gzip.decompress(_content(file)))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file}: cut off or corrupt: {error}; {SOURCE}") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{file}: wanted a list of objects, got {type(found).__name__}")
    return found


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_content(file))
    except ValueError as error:
        raise ValueError(f"{file}: wanted JSON: {error}") from error


def _content(file: Path) -> bytes:
    if not file.is_file():
        raise FileNotFoundError(f"co3d: the file {file} is missing; {SOURCE}")
    return file.read_bytes()


def _field(entry: dict, name: str, file: Path) -> Any:
    if name not in entry:
        raise ValueError(f"{file}: wanted {name} in every entry, got only {sorted(entry)}")
    return entry[name]
