"""A set of pictures that needs no download: rooms of the synthetic scenes, and pieces of scikit-learn's photographs.

Of every four pictures three are frames of one scene (label 0) and one is a piece of a photograph (label 1). The splits
have neither a scene nor a part of a photograph in common: the left 60% of both photographs are for training, the next
20% for val and the rest for test, also on the surfaces of the scenes. The pictures depend on the split and on their
size alone. They are made once, and then read from a cache: `offline_images` in the folder fourdperf of
XDG_CACHE_HOME, by default ~/.cache.
"""

import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from fourdperf.data.files import NpyWriter
from fourdperf.data.images import Split, crop
from fourdperf.data.pictures import to_pixels
from fourdperf.data.scenes import Scene
from fourdperf.data.scenes.textures import load_photographs
from fourdperf.data.synthetic import scene_seed
from fourdperf.data.video import write_png

__all__ = ["CLASSES", "cache_folder", "offline_images", "offline_labels"]

VERSION = 1  # of the pictures: another one makes them anew
CLASSES = ("scene", "photograph")
COUNTS: dict[str, int] = {"train": 3072, "val": 256, "test": 512}
BANDS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
GROUP = 4  # the last is a photograph
TIME_STEP = 0.6  # seconds from frame to frame
SIDES = (48, 128)  # pixels of the longer side of a piece


def cache_folder() -> Path:
    """Where the pictures are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourdperf" / "offline_images"


def offline_images(split: Split, image_size: tuple[int, int]) -> np.ndarray:
    """The pictures of a split, uint8 (N, H, W, 3), RGB, mapped from the cache; made first if they are not there.

    Raises:
        ImportError: they are not there, and neither is scikit-learn.
        OSError: the cache cannot be written.
    """
    count, (height, width) = COUNTS[split], image_size
    path = cache_folder() / f"{split}-{count}-{height}x{width}-v{VERSION}.npy"
    wanted = (count, height, width, 3)
    try:
        pictures = np.load(path, mmap_mode="r", allow_pickle=False)
        if (pictures.shape, pictures.dtype) == (wanted, np.uint8):
            return pictures
    except (FileNotFoundError, ValueError, EOFError):  # not there yet, or cut off
        pass
    regions = _regions(split)
    with tempfile.TemporaryDirectory(prefix="fourdperf-") as folder, NpyWriter(path) as writer:
        for name, region in enumerate(regions):
            write_png(Path(folder) / f"{name}.png", region)
        for group in tqdm(range(count // GROUP), f"offline images, {split}", unit="scene", disable=None):
            writer.append(_group(scene_seed(split, group), image_size, regions, folder))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def offline_labels(split: Split) -> np.ndarray:
    """The label of each picture of a split, int64 (N,): of CLASSES."""
    return np.int64(np.arange(COUNTS[split]) % GROUP == GROUP - 1)


def _regions(split: Split) -> list[np.ndarray]:
    """What a split has of each photograph, uint8."""
    photographs = load_photographs(None)
    if not photographs:
        raise ImportError("the offline images need scikit-learn's photographs: pip install 'fourdperf[train]'")
    regions = []
    for photograph in photographs:
        left, right = (round(share * photograph.shape[1]) for share in BANDS[split])
        regions.append(np.rint(255 * photograph[:, left:right]).astype(np.uint8))
    return regions


def _group(seed: int, size: tuple[int, int], regions: list[np.ndarray], folder: str) -> np.ndarray:
    """Frames of a scene whose photographs are those in the folder, and a piece of a region: uint8 (GROUP, H, W, 3)."""
    video = Scene(seed, GROUP - 1, size, time_step=TIME_STEP, photographs=folder).render().video
    frames = to_pixels(video)
    rng = np.random.default_rng((seed, 2))
    region = regions[rng.integers(len(regions))]
    pieces = [_piece(rng, region, size) for _ in range(4)]
    return np.concatenate([frames, max(pieces, key=np.std)[None]])  # skies and shadows have little to show


def _piece(rng: np.random.Generator, region: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A piece of the shape of `size`, of any scale and from anywhere, perhaps mirrored."""
    side = np.exp(rng.uniform(*np.log(SIDES)))
    height, width = (max(1, round(side * n / max(size))) for n in size)
    top, left = (int(rng.integers(n - m + 1)) for n, m in zip(region.shape, (height, width)))
    piece = crop(region[top : top + height, left : left + width], size)
    return cv2.flip(piece, 1) if rng.random() < 0.5 else piece
