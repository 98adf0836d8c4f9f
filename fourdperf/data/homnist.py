"""Digits under homographies: homNIST (MacDonald et al., CVPR 2022), and sets of images brought to its form.

homNIST is MNIST with 40 x 40 pixels, its digits in the middle of nothing, and a test set seen through homographies, as
one MATLAB file, homNIST_test.mat. Read is any `.mat` (version 5 by scipy, 7.3, which is HDF5, by h5py) that holds,
under any name or in a struct, one array of images and one of labels, which are known by their shapes:

    labels    N whole numbers from 0 to 9, or (N, 10) or (10, N) with a single 1 each
    images    (N, H, W), (H, W, N), (N, H, W, 1), (N, 1, H, W), (H, W, 1, N), or (N, H H), row by row;
              from 0 to 1, or to 255
"""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from fourdperf.data.files import require_h5py
from fourdperf.data.images import ArrayImages, Images

__all__ = ["PlacedImages", "homnist_file", "read_homnist"]

SOURCE = "get homNIST_test.mat from https://www.kaggle.com/datasets/lachlanemacdonald/homnist"
FILE = "homNIST_test.mat"


class PlacedImages(Dataset):
    """A set of images as items {"x": (S, S, C) float32, "label"}: brought to `digit` x `digit` pixels, in the middle of
    S = `size`, with zeros around.

    Raises:
        ValueError: digit > size.
    """

    def __init__(self, images: Images, size: int = 40, digit: int | None = 28):
        self.images, self.size, self.digit = images, size, size if digit is None else digit
        self.classes = images.classes
        if not 0 < self.digit <= size:
            raise ValueError(f"digit: wanted from 1 to size {size}, got {digit}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        pixels, label = self.images[index]
        pixels, before = pixels.numpy(), (self.size - self.digit) // 2
        if pixels.shape[:2] < (self.digit, self.digit):
            x = _enlarged(pixels, self.size, self.digit, before)
        else:
            pixels = cv2.resize(pixels, (self.digit, self.digit), interpolation=cv2.INTER_AREA)
            after = self.size - self.digit - before
            x = np.pad(pixels.reshape(self.digit, self.digit, -1), ((before, after), (before, after), (0, 0)))
        return {"x": torch.from_numpy(np.ascontiguousarray(x)), "label": label}


def _enlarged(pixels: np.ndarray, size: int, digit: int, before: int) -> np.ndarray:
    """(S, S, C) of smaller pixels (h, w, C), with the zeros around from the start, so that strokes at the border end
    softly."""
    scale = np.array([digit / pixels.shape[1], digit / pixels.shape[0]])
    placed = np.column_stack([np.diag(scale), (scale - 1) / 2 + before])
    return cv2.warpAffine(pixels, placed, (size, size), flags=cv2.INTER_CUBIC).clip(0, 1).reshape(size, size, -1)


def homnist_file(path: Path) -> Path:
    """The `.mat` that `path` is, or that is in the folder `path`.

    Raises:
        FileNotFoundError: there is none; the message says how to get it.
    """
    found = path / FILE if path.is_dir() else path
    if not found.is_file():
        raise FileNotFoundError(f"homnist: no file {found}; {SOURCE}")
    return found


def read_homnist(path: Path) -> Images:
    """The images and labels of a `.mat`; see the module.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: it is cut off, no `.mat`, or does not hold what it should; the message tells what it holds.
        ImportError: scipy, or h5py for version 7.3, is not installed.
    """
    path = homnist_file(Path(path))
    arrays = _read_mat(path)
    pairs = [
        (images, labels)
        for labels_name, array in arrays.items()
        if (labels := _labels(array)) is not None
        for name, candidate in arrays.items()
        if name != labels_name and (images := _images(candidate, len(labels))) is not None
    ]
    if len(pairs) != 1:
        held = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in arrays.items()) or "no arrays"
        found = "several" if pairs else "none"
        raise ValueError(
            f"{path}: wanted one array of images and one of their labels from 0 to 9, got {found}: it has {held}"
        )
    images, labels = pairs[0]
    if not np.isfinite(images).all() or images.min() < 0 or images.max() > 255:
        raise ValueError(
            f"{path}: wanted pixels from 0 to 1 or 255, got {images.min():.4g} to {images.max():.4g} or not finite"
        )
    white = 255 if images.max() > 1 else 1
    return ArrayImages("homnist", images[..., None], labels, tuple("0123456789"), white=white)


def _read_mat(path: Path) -> dict[str, np.ndarray]:
    """The numeric arrays of a file by their names, with MATLAB's order of axes."""
    with open(path, "rb") as file:
        start = file.read(520)
    try:
        if b"\x89HDF\r\n" in start:  # 7.3: HDF5 after 512 bytes of MATLAB's
            return _read_hdf5(path)
        return _numeric(_loadmat(path))
    except ImportError:
        raise
    except Exception as error:  # scipy raises nearly anything at a damaged file
        raise ValueError(f"{path}: cut off, corrupt or no .mat: {error}; {SOURCE}") from error


def _loadmat(path: Path) -> dict:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading .mat needs scipy: pip install 'fourdperf[train]'") from error
    return loadmat(path, simplify_cells=True)


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    h5py, found = require_h5py(), {}
    with h5py.File(path, "r") as file:

        def visit(name: str, what) -> None:
            if isinstance(what, h5py.Dataset) and what.dtype.kind in "iufb" and not name.startswith("#refs#"):
                found[name] = what[()].T  # MATLAB's first axis is HDF5's last

        file.visititems(visit)
    return found


def _numeric(found: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in found.items():
        if isinstance(value, Mapping):
            arrays |= _numeric(value, f"{prefix}{name}.")
        elif not name.startswith("__") and np.asarray(value).dtype.kind in "iufb":
            arrays[prefix + name] = np.asarray(value)
    return arrays


def _labels(array: np.ndarray) -> np.ndarray | None:
    """int64 (N,) if these are labels."""
    if array.ndim == 2 and 10 in array.shape and min(array.shape) > 1:
        one_hot = array if array.shape[1] == 10 else array.T
        fits = np.isin(one_hot, (0, 1)).all() and (one_hot.sum(1) == 1).all()
        return one_hot.argmax(1).astype(np.int64) if fits else None
    if array.size == 0 or array.size != max(array.shape, default=0):
        return None
    labels = array.reshape(-1)
    return labels.astype(np.int64) if np.isin(labels, range(10)).all() else None


def _images(array: np.ndarray, count: int) -> np.ndarray | None:
    """(N, H, W) if these are `count` images."""
    if array.ndim == 4 and 1 in array.shape[1:]:
        array = array.squeeze(1 + array.shape[1:].index(1))
    side = int(np.sqrt(array.size // max(1, count)))
    if array.ndim == 2 and side > 1 and array.shape == (count, side * side):
        return array.reshape(count, side, side)
    if array.ndim != 3 or min(array.shape) < 2:
        return None
    if array.shape[0] == count:
        return array
    return np.moveaxis(array, -1, 0) if array.shape[-1] == count else None
