"""Sets of images to fit fields to: scikit-learn's digits, MNIST, CIFAR-10, and any folder of images.

    digits     1797 grey digits of 8x8 pixels, which come with scikit-learn; 8 : 1 : 1 into train, val and test
    mnist      train-images-idx3-ubyte, train-labels-idx1-ubyte, and the same with t10k, as they are or as .gz
    cifar10    cifar-10-batches-bin (data_batch_1.bin ... test_batch.bin), or cifar-10-batches-py
    folder     images in any sub-folders; the first sub-folder's name is the label. Folders train, val and test at the
               top are the splits; without any all images are split 8 : 1 : 1, and without val a tenth of train is val

The test sets of MNIST and CIFAR-10 are their own; a tenth of their training images is val. What is drawn depends on the
seed alone. Files are looked for in `root`, which is the environment's DATA_PATH by default, and in the folders below it
that torchvision and others put them in (`PLACES`). For `folder`, `root` is the folder itself.

The .py version of CIFAR-10 is pickles. They are read by an unpickler that can make numbers, strings, lists and
dictionaries only: names in a pickle never reach an import (`_Plain`).
"""

import gzip
import io
import os
import pickle
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fourdperf.data.scene_files import IMAGE_SUFFIXES, decode_image

__all__ = [
    "SPLITS",
    "ArrayImages",
    "FolderImages",
    "Images",
    "Name",
    "Split",
    "crop",
    "list_images",
    "open_images",
    "part",
    "source_of",
]

Name = Literal["digits", "mnist", "cifar10", "folder"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

PLACES = {
    "mnist": ("", "MNIST/raw", "mnist/raw", "MNIST", "mnist"),
    "cifar10": (
        *("", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", "CIFAR10/cifar-10-batches-bin"),
        *("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "CIFAR10/cifar-10-batches-py"),
    ),
}
SOURCES = {
    "mnist": "get train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files from "
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "cifar10": "get https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and unpack it",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD = 1 + 3 * 32 * 32


class Images(Dataset[tuple[Tensor, int]]):
    """Images of one size with labels: `dataset[i]` is (float32 (H, W, C) in [0, 1], label).

    name: of the set. image_size: (H, W). channels: C. classes: the names of the labels, () where there are none (and
    every label is 0).
    """

    name: str
    image_size: tuple[int, int]
    channels: int
    classes: tuple[str, ...]


class ArrayImages(Images):
    """Images in memory: `pixels` uint8 (N, H, W, C) from 0 to `white`, and `labels` (N,)."""

    def __init__(self, name: str, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], white: int = 255):
        self.name, self.classes, self.white = name, tuple(classes), white
        self.pixels, self.labels = torch.from_numpy(pixels.copy()), labels
        self.image_size, self.channels = tuple(pixels.shape[1:3]), pixels.shape[3]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].float() / self.white, int(self.labels[index])


class FolderImages(Images):
    """Images of files, decoded when asked for: the shorter side resized, then the middle cut out.

    Raises:
        ValueError: of an item: its file is no image, or cut off.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        image_size: tuple[int, int],
        channels: Literal[1, 3],
    ):
        self.name, self.paths, self.labels, self.classes = name, list(paths), list(labels), tuple(classes)
        self.image_size, self.channels = image_size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        colours = cv2.IMREAD_COLOR if self.channels == 3 else cv2.IMREAD_GRAYSCALE
        image = crop(decode_image(path.read_bytes(), str(path), colours), self.image_size)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if self.channels == 3 else image[..., None]
        return torch.from_numpy(image).float() / 255, self.labels[index]


def open_images(
    name: Name,
    split: Split,
    root: str | os.PathLike | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: Literal[1, 3] = 3,
    seed: int = 0,
) -> Images:
    """A split of a set of images.

    Args:
        root: where its files are; by default the environment's DATA_PATH. digits need none.
        image_size: of the images of a folder, (H, W) or a number for a square; 32 by default. Others have their own.
        channels: of the images of a folder.
        seed: of what is drawn to be val and test.

    Raises:
        FileNotFoundError: the files are not there; the message says where they were looked for and how to get them.
        ValueError: a file is cut off or not what it should be, or an argument is wrong.
        ImportError: digits, without scikit-learn.
    """
    if name not in get_args(Name):
        raise ValueError(f"name: wanted one of {', '.join(get_args(Name))}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split: wanted one of {', '.join(SPLITS)}, got {split!r}")
    if name != "folder" and image_size is not None:
        raise ValueError(f"image_size: wanted none, since {name} has its own, got {image_size}")
    if name == "digits":
        return _digits(split, seed)
    root = _root(name, root)
    if name == "mnist":
        return _mnist(split, root, seed)
    if name == "cifar10":
        return _cifar10(split, root, seed)
    return _folder(split, root, _size(image_size), channels, seed)


def _digits(split: Split, seed: int) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    mine = part(len(digits.target), split, SPLITS, seed)
    pixels = digits.images.astype(np.uint8)[mine, ..., None]
    return ArrayImages("digits", pixels, digits.target[mine], tuple("0123456789"), white=16)


# MNIST: https://yann.lecun.com/exdb/mnist, numbers big-endian


def _mnist(split: Split, root: Path, seed: int) -> Images:
    stem = "t10k" if split == "test" else "train"
    images = _idx(_find("mnist", root, f"{stem}-images-idx3-ubyte"), 3)
    labels_file = _find("mnist", root, f"{stem}-labels-idx1-ubyte")
    labels = _idx(labels_file, 1)
    if len(labels) != len(images):
        raise ValueError(f"{labels_file}: wanted a label for each of {len(images)} images, got {len(labels)}")
    if split != "test":
        mine = part(len(images), split, ("train", "val"), seed)
        images, labels = images[mine], labels[mine]
    return ArrayImages("mnist", images[..., None], labels, tuple("0123456789"))


def _idx(path: Path, axes: int) -> np.ndarray:
    content = _content(path)
    header = 4 + 4 * axes
    magic = bytes((0, 0, 8, axes))  # 8: unsigned bytes
    if content[:4] != magic or len(content) < header:
        raise ValueError(f"{path}: wanted an idx file of bytes with {axes} axes, got one that begins {content[:4]!r}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", axes, 4))
    wanted = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != wanted:
        raise ValueError(f"{path}: cut off or corrupt: wanted {wanted} bytes for {shape}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cut off or corrupt: {error}") from error


# CIFAR-10: https://www.cs.toronto.edu/~kriz/cifar.html, a label and 3 x 32 x 32 bytes per image


def _cifar10(split: Split, root: Path, seed: int) -> Images:
    batches = ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
    read = [_cifar10_batch(_find("cifar10", root, batch, ("", ".bin"))) for batch in batches]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*read))
    if split != "test":
        mine = part(len(pixels), split, ("train", "val"), seed)
        pixels, labels = pixels[mine], labels[mine]
    return ArrayImages("cifar10", pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, CIFAR10_CLASSES)


def _cifar10_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) and labels (N,)."""
    content = path.read_bytes()
    if path.suffix == ".bin":
        if not content or len(content) % CIFAR10_RECORD:
            raise ValueError(f"{path}: cut off: wanted images of {CIFAR10_RECORD} bytes, got {len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD)
        pixels, labels = records[:, 1:], records[:, 0]
    else:
        batch = _Plain.read(content, path)
        try:
            labels = np.asarray(batch[b"labels" if b"labels" in batch else "labels"])
            pixels = batch[b"data" if b"data" in batch else "data"].bytes(len(labels) * (CIFAR10_RECORD - 1))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: wanted a batch of CIFAR-10 with data and labels: {error}") from error
        pixels = pixels.reshape(len(labels), CIFAR10_RECORD - 1)
    if labels.dtype.kind not in "iu" or not 0 < labels.size == len(pixels) or not set(labels) <= set(range(10)):
        raise ValueError(f"{path}: wanted images with labels from 0 to 9: this is not CIFAR-10")
    return pixels, labels.astype(np.int64)


class _Array:
    """What the pickle calls an array: its state is kept and never run."""

    def __init__(self, *_):
        self.state: object = None

    def __setstate__(self, state) -> None:
        self.state = state

    def bytes(self, count: int) -> np.ndarray:
        content = self.state[-1] if isinstance(self.state, tuple) and self.state else None
        content = content.encode("latin-1") if isinstance(content, str) else content
        if not isinstance(content, bytes) or len(content) != count:
            got = len(content) if isinstance(content, bytes) else type(content).__name__
            raise ValueError(f"wanted {count} bytes of pixels, got {got}")
        return np.frombuffer(content, np.uint8)


class _Plain(pickle.Unpickler):
    """Reads a pickle of plain values and arrays. The names that stand for arrays give `_Array`, whatever they are
    called with; any other name is an error, so that nothing of the file is ever imported or called."""

    NAMES = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in CIFAR-10")
        return _Array

    @classmethod
    def read(cls, content: bytes, path: Path) -> dict:
        try:
            found = cls(io.BytesIO(content), encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"{path}: cut off, corrupt or not CIFAR-10: {error}; {SOURCES['cifar10']}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: wanted a batch of CIFAR-10 with data and labels, got {type(found).__name__}")
        return found


# Folders


def _folder(split: Split, root: Path, size: tuple[int, int], channels: int, seed: int) -> Images:
    if channels not in (1, 3):
        raise ValueError(f"channels: wanted 1 or 3, got {channels}")
    if not root.is_dir():
        raise FileNotFoundError(f"folder: wanted a folder of images, there is none: {root}")
    splits = [name for name in SPLITS if (root / name).is_dir()]
    source, together = source_of(splits, split, f"folders of {root}")
    top = root / source
    paths = list_images(top)
    names = [path.relative_to(top).parts[:-1] for path in paths]
    classes = sorted({parts[0] for parts in names if parts})
    if "train" in splits and source == split != "train":
        known = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
        if not set(classes) <= set(known):
            raise ValueError(f"{top}: wanted the sub-folders of {root / 'train'}: {known}, got {classes}")
        classes = known
    labels = [classes.index(parts[0]) if parts else 0 for parts in names]
    mine = part(len(paths), split, together, seed)
    return FolderImages("folder", [paths[i] for i in mine], [labels[i] for i in mine], classes, size, channels)


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and below it, by name; raises FileNotFoundError where there is none."""
    found = (Path(where) / name for where, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"folder: no images ({' '.join(IMAGE_SUFFIXES)}) in {folder}")
    return paths


def crop(image: np.ndarray, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A part of an image (h, w, ...), as large as possible, brought to `size`; `place` (down, across) is where, from 0
    to 1: by default the middle."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    enlarged = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = cv2.resize(image, enlarged[::-1], interpolation=method)
    top, left = (int((n - m) * share) for n, m, share in zip(enlarged, size, place))
    return np.ascontiguousarray(image[top : top + size[0], left : left + size[1]])


# Where files are, and who gets which


def _root(name: str, root: str | os.PathLike | None) -> Path:
    root = os.environ.get("DATA_PATH") if root is None else root
    if root is None or str(root) == "":
        how = SOURCES.get(name, "put the images into a folder")
        raise FileNotFoundError(f"{name}: neither a folder was given nor DATA_PATH is set; {how}, and name its folder")
    return Path(root)


def _find(name: str, root: Path, file: str, suffixes: Sequence[str] = ("", ".gz")) -> Path:
    folders = [root / place for place in PLACES[name]]
    for folder in folders:
        for suffix in suffixes:
            if (folder / f"{file}{suffix}").is_file():
                return folder / f"{file}{suffix}"
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    either = " or ".join(f"{file}{suffix}" for suffix in suffixes)
    raise FileNotFoundError(f"{name}: no {either} in any of {looked}; {SOURCES[name]}")


def _size(image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    size = 32 if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"image_size: wanted (H, W), got {image_size}")
    return size


def source_of(found: Collection[str], split: Split, where: str) -> tuple[str, tuple[Split, ...]]:
    """Which of the splits `found` in `where` a split is taken from ("" for all that there is), and the splits that are
    taken from there together: where none is found all of them; without val, train and val from train.

    Raises:
        FileNotFoundError: there are some, but not this one.
    """
    if not found:
        return "", SPLITS
    if split != "test" and "train" in found and "val" not in found:
        return "train", ("train", "val")
    if split not in found:
        raise FileNotFoundError(f"split: there is {', '.join(sorted(found))} among the {where}, but no {split}")
    return split, (split,)


def part(count: int, split: Split, splits: Sequence[Split], seed: int) -> np.ndarray:
    """Which of `count` images are a split's, sorted: a tenth each for all of `splits` but train, at least one."""
    if count < len(splits):
        raise ValueError(f"wanted at least {len(splits)} images to split into {', '.join(splits)}, got {count}")
    if len(splits) == 1:
        return np.arange(count)
    tenth = max(1, count // 10)
    ends = [(i + 1) * tenth for i in range(len(splits) - 1)]
    parts = np.split(np.random.default_rng(seed).permutation(count), ends)
    return np.sort(dict(zip((*splits[1:], "train"), parts))[split])
