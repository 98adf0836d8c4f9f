"""Pictures to train tokenizers on: image folders, lists of files, WebDataset shards, HDF5, or an offline set.

    None                a set made here, which needs no download (`fourdperf.data.offline_images`)
    FOLDER              of images, as `fourdperf.data.images` reads "folder"; or of .tar or .h5 files, as below
    LIST.txt            a path a line, relative to the list's folder or absolute (BDD100K, taming-transformers)
    SHARDS.tar          WebDataset: NAME.jpg or .png, with NAME.cls or NAME.json {"label": 3} where there are labels;
                        also patterns such as train-{0000..0099}.tar and 'bdd/*.tar'. Shards are indexed once, and read
                        in any order; NAME has no dots. `fourdperf image_shards` writes some;
                        a folder of these has the labels' names, too
    PICTURES.h5         data set images, uint8 (N, H, W, 3), RGB, and labels, integers (N,), or none; patterns, too

A list, shard or HDF5 file whose name has the word train, val or test is of that split, and others are then left out; of
bdd_train.txt alone, the other splits are looked for beside it under their names. Where no name has such a word all
pictures are split 8 : 1 : 1; where there is train and no val, a tenth of train is val.

Pictures are resized until one side fits and the other is not too short, then cut: the middle, or with `augment` any
place, mirrored half of the time (what taming-transformers and TiTok do).
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from fourdperf.data.files import require_h5py
from fourdperf.data.images import SPLITS, Images, Split, crop, open_images, part, source_of
from fourdperf.data.offline_images import CLASSES, offline_images, offline_labels
from fourdperf.data.scene_files import IMAGE_SUFFIXES, decode_image
from fourdperf.data.synthetic import clip_generator

__all__ = ["ImageSet", "open_image_set"]

DESCRIPTION = "image_shards.json"  # beside shards of `fourdperf.data.image_shards`
KINDS = {".txt": "list", ".tar": "shards", ".h5": "hdf5", ".hdf5": "hdf5"}
SPLIT_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(SPLITS)})(?![A-Za-z])")
TAR_IMAGES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


class Pictures(Protocol):
    """Pictures of any size by number: uint8 (h, w, 3), RGB."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


class ImageSet(Images):
    """Some of `pictures`, cut to one size: `dataset[i]` is (float32 (H, W, 3) in [0, 1], label).

    With `augment`, `dataset.visited(i, visit)` is another cut of the picture at every visit, which the seed, i and the
    number of the visit decide; `dataset[i]` is visit 0.

    Raises:
        ValueError, OSError: of an item: its file is missing, no image, or cut off.
    """

    channels = 3

    def __init__(
        self,
        name: str,
        pictures: Pictures,
        labels: Sequence[int],
        classes: Sequence[str],
        image_size: tuple[int, int],
        mine: np.ndarray,
        augment: bool = False,
        seed: int = 0,
    ):
        self.name, self.classes, self.image_size = name, tuple(classes), tuple(image_size)
        self.pictures, self.labels, self.mine = pictures, labels, mine
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.visited(index, 0)

    def visited(self, index: int, visit: int) -> tuple[Tensor, int]:
        """Item `index` at a visit, from 0."""
        number = int(self.mine[index])
        picture = self.pictures[number]
        if self.augment:
            generator = clip_generator(self.seed, visit * len(self) + index % len(self))
            down, across, side = torch.rand(3, generator=generator).tolist()
            picture = crop(picture, self.image_size, (down, across))
            picture = picture[:, ::-1] if side < 0.5 else picture
        else:
            picture = crop(picture, self.image_size)
        return torch.from_numpy(picture.copy()).float() / 255, int(self.labels[number])


def open_image_set(
    source: str | os.PathLike | None,
    split: Split,
    image_size: tuple[int, int],
    *,
    augment: bool = False,
    seed: int = 0,
) -> ImageSet:
    """A split of a set of pictures.

    Args:
        source: as above.
        image_size: (H, W) to cut to.
        augment: cut any place, and mirror, differently at every visit; for training.
        seed: of the cuts. What is drawn to be val and test is the same whatever it is, so that no run sees its test.

    Raises:
        FileNotFoundError: there is no such file, folder, or split in it.
        ValueError: a file is corrupt or not what it should be, or an argument is wrong.
        ImportError: HDF5 without h5py, patterns with braces without braceexpand, the offline set without scikit-learn.
        OSError: a file cannot be read, or the offline set's cache not be written.
    """
    if split not in SPLITS:
        raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
    size = tuple(image_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"image_size: wanted (H, W), got {image_size}")
    if source is None:
        pictures, labels = offline_images(split, size), offline_labels(split)
        return ImageSet("offline", pictures, labels, CLASSES, size, np.arange(len(pictures)), augment, seed)
    kind, files = _find(str(source))
    if kind == "folder":
        found = open_images("folder", split, source, image_size=size)
        pictures = FilePictures(found.paths)
        return ImageSet(kind, pictures, found.labels, found.classes, size, np.arange(len(pictures)), augment, seed)
    chosen, together = source_of([word for word in files if word], split, f"files of {source}")
    pictures, labels = READERS[kind](files[chosen] if chosen else [file for some in files.values() for file in some])
    mine = part(len(pictures), split, together, seed=0)
    classes = () if labels is None else _class_names(Path(source), max(labels) + 1)
    labels = [0] * len(pictures) if labels is None else labels
    return ImageSet(kind, pictures, labels, classes, size, mine, augment, seed)


def _find(source: str) -> tuple[str, dict[str, list[Path]]]:
    """What kind of source it is, and its files by split, "" where the name tells none."""
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in KINDS and not file.name.startswith(".")]
        for kind in ("shards", "hdf5"):
            found = sorted(file for file in files if KINDS[file.suffix] == kind)
            if found:
                return kind, _by_split(found)
        return "folder", {}
    kind = KINDS.get(path.suffix)
    if kind is None:
        wanted = f"a folder, or a file or pattern ending in {', '.join(KINDS)}"
        raise (ValueError if path.exists() else FileNotFoundError)(f"images: wanted {wanted}, got {source}")
    files = [Path(file) for pattern in _expand(source) for file in sorted(glob.glob(pattern)) or [pattern]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"images: no such file: {missing[0]} ({len(missing)} of {len(files)} missing)")
    if len(files) == 1 and SPLIT_WORD.search(path.name):
        beside = (path.with_name(SPLIT_WORD.sub(split, path.name)) for split in SPLITS)
        files = [file for file in beside if file.is_file()]
    return kind, _by_split(files)


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern or os.path.exists(pattern):
        return [glob.escape(pattern) if os.path.exists(pattern) else pattern]
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise ImportError("patterns with braces need braceexpand: pip install 'fourdperf[shards]'") from error
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"images: {pattern}: {error}") from error


def _class_names(source: Path, count: int) -> tuple[str, ...]:
    """Of so many labels: as a folder of shards tells them, or else their numbers."""
    file = source / DESCRIPTION
    try:
        names = tuple(map(str, json.loads(file.read_bytes())["classes"])) if file.is_file() else ()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: corrupt: no classes: {error}") from error
    return names if len(names) >= count else tuple(map(str, range(count)))


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        word = SPLIT_WORD.search(file.name)
        found.setdefault(word[1] if word else "", []).append(file)
    return found


class FilePictures:
    """Of image files. name(i): of one, for people; file(i): the same, and its bytes."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def file(self, index: int) -> tuple[str, bytes]:
        return self.name(index), self.paths[index].read_bytes()

    def __getitem__(self, index: int) -> np.ndarray:
        name, content = self.file(index)
        return decode_image(content, name, cv2.IMREAD_COLOR_RGB)


def _read_lists(files: Sequence[Path]) -> tuple[FilePictures, None]:
    paths = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: wanted a list of paths, got no text: {error}") from error
        paths += [file.parent / line.strip() for line in lines if line.strip()]
    return FilePictures(paths), None


class Member(NamedTuple):
    """A file in a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarPictures:
    """Of members of shards; see `FilePictures`."""

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.members[index].shard}: {self.members[index].name}"

    def file(self, index: int) -> tuple[str, bytes]:
        return self.name(index), self.members[index].read()

    def __getitem__(self, index: int) -> np.ndarray:
        name, content = self.file(index)
        return decode_image(content, name, cv2.IMREAD_COLOR_RGB)


def _read_shards(files: Sequence[Path]) -> tuple[TarPictures, list[int] | None]:
    images: list[Member] = []
    labels: list[int | None] = []
    for shard in files:
        for parts in _samples(shard).values():
            image = next((parts[suffix] for suffix in TAR_IMAGES if suffix in parts), None)
            if image is not None:
                images.append(image)
                labels.append(_label(parts))
    if not images:
        raise ValueError(f"images: wanted images ({', '.join(TAR_IMAGES)}) in the shards, got none in {files[0]} ...")
    if None not in labels:
        return TarPictures(images), labels
    if any(label is not None for label in labels):
        member = images[labels.index(None)]
        raise ValueError(f"{member.shard}: {member.name} has no label, though others have")
    return TarPictures(images), None


def _samples(shard: Path) -> dict[str, dict[str, Member]]:
    """The members of a shard by sample and suffix."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                key, _, suffix = entry.name.rpartition("/")[2].partition(".")
                if entry.isfile() and key:
                    key = f"{entry.name.rpartition('/')[0]}/{key}"
                    member = Member(shard, entry.name, entry.offset_data, entry.size)
                    samples.setdefault(key, {})[suffix.lower()] = member
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard}: no tar file, or corrupt or cut off: {error}") from error
    if end != bytes(tarfile.BLOCKSIZE):  # to tarfile a damaged header is the end, and so is none
        raise ValueError(f"{shard}: corrupt or cut off at byte {tar.offset}: wanted a header, or zeros at the end")
    return samples


def _label(parts: dict[str, Member]) -> int | None:
    """What .cls or "label" in .json says; None where neither is there."""
    member = parts.get("cls") or parts.get("json")
    if member is None:
        return None
    try:
        label = json.loads(member.read())
        label = label.get("label") if isinstance(label, dict) else label
    except ValueError as error:
        raise ValueError(f"{member.shard}: {member.name}: wanted a label: {error}") from error
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label < 0):
        raise ValueError(f"{member.shard}: {member.name}: wanted a label from 0, got {label!r}")
    return label


class Hdf5Pictures:
    """Of HDF5 files, which every process opens for itself."""

    def __init__(self, files: Sequence[Path]):
        self.files, self._open = list(files), {}
        self.ends = np.cumsum([len(self._images(number)) for number in range(len(self.files))])
        self._open.clear()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, "right"))
        images = self._images(number)
        try:
            return images[index - (self.ends[number - 1] if number else 0)]
        except OSError as error:
            raise ValueError(f"{self.files[number]}: corrupt: image {index}: {error}") from error

    def name(self, index: int) -> str:
        number = int(np.searchsorted(self.ends, index, "right"))
        return f"{self.files[number]}: image {index - (self.ends[number - 1] if number else 0)}"

    def labels(self) -> list[int] | None:
        """Of all pictures; None where there are none."""
        found = [self._dataset(number, "labels") for number in range(len(self.files))]
        if all(labels is None for labels in found):
            return None
        for number, labels in enumerate(found):
            wanted = (len(self._images(number)),)
            if labels is None or labels.shape != wanted or labels.dtype.kind not in "iu" or labels[:].min() < 0:
                got = None if labels is None else f"{labels.dtype} {labels.shape}"
                raise ValueError(f"{self.files[number]}: labels: wanted integers {wanted} from 0, got {got}")
        labels = [int(label) for labels in found for label in labels[:]]
        self._open.clear()
        return labels

    def _images(self, number: int):
        images = self._dataset(number, "images")
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            got = None if images is None else f"{images.dtype} {images.shape}"
            raise ValueError(f"{self.files[number]}: images: wanted uint8 (N, H, W, 3), got {got}")
        return images

    def _dataset(self, number: int, name: str):
        """A data set of a file as this process has opened it; None where there is none of that name."""
        key = os.getpid(), number
        if key not in self._open:
            try:
                self._open[key] = require_h5py().File(self.files[number], "r")
            except OSError as error:
                raise ValueError(f"{self.files[number]}: no HDF5 file, or corrupt or cut off: {error}") from error
        return self._open[key].get(name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


def _read_hdf5(files: Sequence[Path]) -> tuple[Hdf5Pictures, list[int] | None]:
    pictures = Hdf5Pictures(files)
    return pictures, pictures.labels()


READERS = {"list": _read_lists, "shards": _read_shards, "hdf5": _read_hdf5}
