"""WebDataset shards of sets of pictures, written one by one, whole or not at all; `open_image_set` reads them.

    FOLDER/image_shards.json    what was asked for: items of each split, items per shard, classes, options
           train-000000.tar     items 0 .. per_shard - 1 of the split in an order of its own: 000000000.jpg and, where
           val-000000.tar       there are labels, 000000000.cls, after one another
           test-000000.tar

Files go into the shards as they are, unless they are to be smaller; what has no file (HDF5) becomes a PNG. Shard s is
written by process s % ranks. So whatever is killed when, the same command goes on with the shards that are missing, on as
many processes as one likes; a shard's bytes depend on the pictures and the options alone.
"""

import hashlib
import io
import json
import math
import os
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from fourdperf.data.files import atomic_path, write_text
from fourdperf.data.image_sets import DESCRIPTION, FilePictures, ImageSet, TarPictures, open_image_set
from fourdperf.data.images import SPLITS
from fourdperf.data.scene_files import IMAGE_SUFFIXES, decode_image

__all__ = ["open_splits", "write_image_shards"]

FORMAT = "fourdperf image shards 1"
JPEG_QUALITY = 95


def open_splits(source: str | os.PathLike) -> dict[str, ImageSet]:
    """The splits that a source has, as training on it would have them; raises as `open_image_set` where it has none."""
    found: dict[str, ImageSet] = {}
    first: FileNotFoundError | None = None
    for split in SPLITS:
        try:
            found[split] = open_image_set(source, split, (1, 1))
        except FileNotFoundError as error:
            first = first or error
    if not found:
        raise first
    return found


def write_image_shards(
    out: str | os.PathLike,
    sets: Mapping[str, ImageSet],
    *,
    per_shard: int = 1000,
    image_size: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = False,
) -> tuple[int, int]:
    """Writes the shards of `out` that are not there yet and are this process's; returns how many shards it wrote, and
    how many bad pictures it left out.

    Every picture is decoded, so that none can fail when it is read.

    Args:
        sets: by split.
        per_shard: items in a shard; a kill costs at most these.
        image_size: a picture whose shorter side is longer gets this, as a JPEG; by default files stay as they are.
        skip_bad: leave pictures out that are missing, cut off or no pictures, with a warning for each, where otherwise
            the first one is the error.
        seed: of the order.
        rank, ranks: this process, and how many share the work.
        progress: show a bar.

    Raises:
        ValueError: `out` was begun with something else or holds other files, a picture is bad, or an argument is out
            of range.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    for name, value in {"per_shard": per_shard, "image_size": image_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank, ranks: wanted 0 <= rank < ranks, got {rank}, {ranks}")
    orders = {split: np.random.default_rng(seed).permutation(len(images)) for split, images in sets.items()}
    identity = {"items": {split: len(images) for split, images in sets.items()}, "per_shard": per_shard}
    identity |= {"image_size": image_size, "skip_bad": skip_bad, "seed": seed}
    identity |= {"classes": list(next(iter(sets.values())).classes), "pictures": _digest(sets)}
    _begin(out, identity)
    mine = [(split, shard) for split in sets for shard in range(rank, math.ceil(len(sets[split]) / per_shard), ranks)]
    missing = [(split, shard) for split, shard in mine if not _shard(out, split, shard).exists()]
    bad = 0
    for split, shard in tqdm(missing, out.name, unit="shard", disable=not progress or None):
        path = _shard(out, split, shard)
        for stale in out.glob(f".{path.stem}.*.tmp.tar"):
            stale.unlink(missing_ok=True)  # what a kill left half written
        with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number in range(shard * per_shard, min((shard + 1) * per_shard, len(sets[split]))):
                try:
                    members = _members(sets[split], int(orders[split][number]), image_size)
                except (ValueError, FileNotFoundError) as error:
                    if not skip_bad:
                        raise
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    bad += 1
                    continue
                for suffix, content in members.items():
                    entry = tarfile.TarInfo(f"{number:09d}{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return len(missing), bad


def _members(images: ImageSet, index: int, image_size: int | None) -> dict[str, bytes]:
    """The files of item `index` by suffix: the picture, which has been decoded, and its label."""
    number, pictures = int(images.mine[index]), images.pictures
    if isinstance(pictures, FilePictures | TarPictures):
        name, content = pictures.file(number)
        suffix, picture = Path(name).suffix.lower(), decode_image(content, name, cv2.IMREAD_COLOR_RGB)
    else:
        suffix, content, picture = ".png", None, pictures[number]
    if suffix not in IMAGE_SUFFIXES:  # of a list, which may name anything: readers would not know it
        suffix, content = ".png", None
    shorter = min(picture.shape[:2])
    if image_size is not None and shorter > image_size:
        size = tuple(max(image_size, round(side * image_size / shorter)) for side in picture.shape[1::-1])
        suffix, picture = ".jpg", cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        content = None
    if content is None:
        pixels, options = np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        content = cv2.imencode(suffix, pixels, options if suffix == ".jpg" else [])[1].tobytes()
    label = {".cls": str(int(images.labels[number])).encode()} if images.classes else {}
    return {suffix: content, **label}


def _digest(sets: Mapping[str, ImageSet]) -> str:
    """16 digits that tell sets of pictures apart by their names and labels."""
    found = hashlib.sha256()
    for split, images in sets.items():
        for number in map(int, images.mine):
            found.update(f"{split} {images.pictures.name(number)} {int(images.labels[number])}\n".encode())
    return found.hexdigest()[:16]


def _begin(out: Path, identity: dict) -> None:
    """Writes what a folder begins with, or checks that it was begun with the same."""
    file, wanted = out / DESCRIPTION, {"format": FORMAT, **identity}
    found = list(out.iterdir()) if out.is_dir() else [out] * out.exists()
    if not file.exists():  # looked at after the folder: another process writes its first shard after this
        if any(not path.name.startswith(f".{file.stem}.") for path in found):
            raise ValueError(f"{out}: wanted a new or empty folder, or one with {DESCRIPTION}, got other files")
        write_text(file, json.dumps(wanted, indent=2) + "\n")
    try:
        known = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: corrupt: {error}") from error
    if known != wanted:
        names = [name for name in wanted if not isinstance(known, dict) or known.get(name) != wanted[name]]
        different = ", ".join(f"{name} {known.get(name) if isinstance(known, dict) else None}" for name in names)
        raise ValueError(
            f"{out}: its shards were begun with {different}; give the images and options that they were begun with, or "
            f"another folder"
        )


def _shard(out: Path, split: str, shard: int) -> Path:
    return out / f"{split}-{shard:06d}.tar"
