"""Functasets: every image of a data set as the latent map of its field, in HDF5 files that survive a kill.

    FOLDER/functaset.json             what was asked for, the field's config and its weights' fingerprint
           model/                     the field that was fitted: config.json, model.safetensors
           train.h5 val.h5 test.h5    complete splits
           parts/SPLIT/00042.safetensors    block 42 of a split that is not complete yet

A split of images 0 .. I - 1 with A augmentations has I A signals; number n is augmentation n % A of image n // A.
Augmentation 0 is the image itself, and all there is outside the training split. Blocks of consecutive signals are
fitted one after the other, block b by process b % ranks; each is written under another name and renamed once it is on
the disk. So whatever is killed when, a part is there complete or not at all, and the same command goes on with the
blocks that are missing, on as many processes as one likes. When all are there the first process copies them, one at a
time, into the split's .h5, which gets its name when it is complete; then the parts go. Until then both need room.

A split's file has the data sets
    latents       (N, s, s, c) float32, in chunks of at most 64 KiB with checksums
    labels        (N,) int64
    image, augmentation    (N,) int32
    psnr          (N,) float32, dB, of the reconstruction from the latent
    mean, std     (c,) float32, of the latents' channels
and the attributes format, recipe (JSON), config (of the field, JSON) and weights (SHA-256, `fingerprint`).
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from fourdperf.data.files import atomic_path, require_h5py, write_text

__all__ = [
    "AUGMENTATIONS",
    "SPLITS",
    "Augmentation",
    "Functaset",
    "PixelMaps",
    "Recipe",
    "augment",
    "create_functaset",
    "fingerprint",
    "open_functaset",
    "read_recipe",
    "signal_images",
]

FORMAT = "fourdperf functaset 1"
SPLITS = ("train", "val", "test")
CHUNK_BYTES = 64 * 1024
STATISTICS = 4096
NAMES = {"latents": np.float32, "labels": np.int64, "image": np.int32, "augmentation": np.int32, "psnr": np.float32}


@dataclass(frozen=True)
class Augmentation:
    """What random copies of an image may differ in.

    shift: the largest one along each axis, as a share of the side; of whole pixels where zoom and turn are off.
    zoom: the largest factor, log-uniform up and down. turn: the largest rotation, degrees. flip: left to right, every
    second time. border: what lies outside, "zeros" or "reflection".
    """

    shift: float = 0.0
    zoom: float = 1.0
    turn: float = 0.0
    flip: bool = False
    border: str = "zeros"

    def __post_init__(self):
        if not (0 <= self.shift < 1 and self.zoom >= 1 and self.turn >= 0 and self.border in ("zeros", "reflection")):
            raise ValueError(
                f"augment: wanted 0 <= shift < 1, zoom >= 1, turn >= 0 and border zeros or reflection, got {self}"
            )


AUGMENTATIONS = {
    "digits": Augmentation(shift=0.1, zoom=1.1, turn=10),
    "mnist": Augmentation(shift=0.1, zoom=1.1, turn=10),
    "cifar10": Augmentation(shift=1 / 8, flip=True, border="reflection"),
    "folder": Augmentation(shift=1 / 8, flip=True, border="reflection"),
}


@dataclass(frozen=True)
class Recipe:
    """What a functaset is made of.

    dataset: a name that `fourdperf.data.images.open_images` knows. augmentations: signals per training image.
    seed: of the augmentations. augment: what these may do. images: at most so many of each split, None for all.
    steps: of the inner loop, None for the field's own. block: signals per part, and so what a kill costs at most.
    """

    dataset: str
    augmentations: int = 50
    seed: int = 0
    augment: Augmentation = Augmentation()
    images: int | None = None
    steps: int | None = None
    block: int = 256

    def __post_init__(self):
        for name in ("augmentations", "images", "steps", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Recipe":
        return cls(**{**fields, "augment": Augmentation(**fields["augment"])})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def copies(self, split: str) -> int:
        """Signals per image."""
        return self.augmentations if split == "train" else 1


class Summary(NamedTuple):
    """Of a split: its signals, and their mean PSNR in dB."""

    signals: int
    psnr: float


def augment(
    images: Tensor, image: Sequence[int], augmentation: Sequence[int], settings: Augmentation, seed: int
) -> Tensor:
    """Copy `augmentation[i]` of `images[i]`, of (B, H, W, C) in [0, 1], which is image number `image[i]` of its split.

    Depends on (seed, image, augmentation) only; copy 0 is the image itself.
    """
    changed = [i for i, number in enumerate(augmentation) if number]
    if not changed:
        return images
    size = images.shape[1:3]
    maps = [_affine(np.random.default_rng((seed, image[i], augmentation[i])), settings, size) for i in changed]
    pixels = images[changed].movedim(-1, 1)
    grid = F.affine_grid(torch.tensor(np.array(maps)).to(pixels), list(pixels.shape), align_corners=False)
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode=settings.border, align_corners=False)
    copies = images.clone()
    copies[changed] = seen.movedim(1, -1).clamp(0, 1)
    return copies


def _affine(random: np.random.Generator, settings: Augmentation, size: tuple[int, int]) -> np.ndarray:
    """From a copy's (x, y, 1) to the image's (x, y), both in [-1, 1]."""
    height, width = size
    zoom, turn, across, down, flip = random.random(5) * 2 - 1
    scale = settings.zoom**-zoom
    angle = math.radians(settings.turn) * turn
    shift = settings.shift * np.array([across * width, down * height])
    if settings.zoom == 1 and settings.turn == 0:
        shift = np.rint(shift)
    mirror = -1 if settings.flip and flip < 0 else 1
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return np.array(
        [
            [mirror * cosine, -sine * height / width, 2 * shift[0] / width],
            [mirror * sine * width / height, cosine, 2 * shift[1] / height],
        ]
    )


def signal_images(dataset: Dataset, split: str, numbers: Sequence[int], recipe: Recipe) -> tuple[Tensor, np.ndarray]:
    """The images (B, H, W, C) that signals `numbers` of a split are fitted to, and their labels (B,)."""
    image, augmentation = np.divmod(np.asarray(numbers, np.int64), recipe.copies(split))
    distinct, where = np.unique(image, return_inverse=True)
    items = [dataset[int(i)] for i in distinct]
    pixels = torch.stack([torch.as_tensor(pixels, dtype=torch.float32) for pixels, _ in items])[where]
    labels = np.array([int(label) for _, label in items], np.int64)[where]
    return augment(pixels, image.tolist(), augmentation.tolist(), recipe.augment, recipe.seed), labels


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Making one


def create_functaset(
    model: nn.Module,
    datasets: Mapping[str, Dataset],
    out: str | os.PathLike,
    recipe: Recipe,
    *,
    rank: int = 0,
    ranks: int = 1,
    barrier: Callable[[], None] = lambda: None,
    batch_size: int = 64,
    root: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Summary]:
    """Fits every signal of `datasets`, map-style ones of (image (H, W, C), label) by split, and writes the folder
    `out`; or goes on with it. Returns a summary of each split where `rank` is 0, and nothing elsewhere.

    Args:
        model: a `fourdperf.models.functa.Functa`, on the device to use.
        rank, ranks: this process, and how many share the work.
        barrier: returns once every process has called it.
        batch_size: signals that are fitted together.
        root: where the data set's files are, noted for who reads the functaset.
        progress: show a bar.

    Raises:
        ValueError: `out` was begun with another recipe, model or data set; an image does not fit the model; a fit
            diverges; a part is corrupt.
        OSError: a file cannot be written.
    """
    out, done = Path(out), {}
    require_h5py()
    counts = {split: _count(dataset, split, recipe) for split, dataset in datasets.items()}
    identity = {"recipe": recipe.to_dict(), "signals": counts, "weights": fingerprint(model)}
    identity["config"] = model.config.to_dict()
    if rank == 0:
        _begin(out, model, identity, root)
    barrier()
    for split, dataset in datasets.items():
        target = out / f"{split}.h5"
        if not target.exists():
            _fit_blocks(model, dataset, out, split, counts[split], recipe, rank, ranks, batch_size, progress)
        barrier()
        if rank == 0:
            if not target.exists():
                _merge(out, split, counts[split], model, identity, progress)
            shutil.rmtree(out / "parts" / split, ignore_errors=True)
            signals = Functaset(target)
            if signals.identity != (identity["recipe"], identity["weights"], counts[split]):
                raise ValueError(f"{target}: of another functaset than {out / 'functaset.json'}")
            done[split] = Summary(len(signals), float(signals.psnr().mean()))
    if rank == 0:
        shutil.rmtree(out / "parts", ignore_errors=True)
    return done


def _count(dataset: Dataset, split: str, recipe: Recipe) -> int:
    images = len(dataset) if recipe.images is None else min(recipe.images, len(dataset))
    if not images:
        raise ValueError(f"{recipe.dataset}: wanted at least one image in split {split}, got none")
    return images * recipe.copies(split)


def _begin(out: Path, model: nn.Module, identity: dict, root: str | os.PathLike | None) -> None:
    """Writes what a functaset begins with, or checks that `out` was begun with the same."""
    file = out / "functaset.json"
    if file.exists():
        flat = lambda found: {**found.pop("recipe"), **found.pop("config", {}), **found}  # older ones have no config
        theirs, ours = flat(read_recipe(out)), flat(dict(identity))
        different = [f"{name} {theirs[name]}" for name in ours if name in theirs and theirs[name] != ours[name]]
        if different:
            raise ValueError(
                f"{out}: its functaset was begun with {', '.join(different)}; give the options that it was begun with, "
                f"or another folder"
            )
        for stale in (*out.glob(".*.tmp.*"), *out.glob("parts/*/.*.tmp.*")):
            stale.unlink(missing_ok=True)  # what a kill left half written
        return
    if (out / "parts").exists() or any(out.glob("*.h5")):
        raise ValueError(f"{out}: holds latents, but no functaset.json that says of what; give another folder")
    model.save_pretrained(out / "model")
    root = None if root is None else str(Path(root).resolve())
    write_text(file, json.dumps({"format": FORMAT, **identity, "root": root}, indent=2) + "\n")


def _fit_blocks(
    model: nn.Module,
    dataset: Dataset,
    out: Path,
    split: str,
    count: int,
    recipe: Recipe,
    rank: int,
    ranks: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Writes the parts of this process that are not there yet."""
    mine = range(rank, math.ceil(count / recipe.block), ranks)
    missing = [block for block in mine if not _part(out, split, block).exists()]
    signals = lambda block: min(recipe.block, count - block * recipe.block)
    total = sum(map(signals, mine))
    bar = tqdm(
        desc=split, total=total, initial=total - sum(map(signals, missing)), unit="signal", disable=not progress or None
    )
    with bar:
        for block in missing:
            numbers = range(block * recipe.block, block * recipe.block + signals(block))
            fitted = []
            for start in range(0, len(numbers), batch_size):
                fitted.append(_fit_signals(model, dataset, split, numbers[start : start + batch_size], recipe))
                bar.update(len(fitted[-1]["labels"]))
            arrays = {name: np.concatenate([part[name] for part in fitted]) for name in NAMES}
            with atomic_path(_part(out, split, block)) as temporary:
                save_file(arrays, temporary)


def _fit_signals(
    model: nn.Module, dataset: Dataset, split: str, numbers: range, recipe: Recipe
) -> dict[str, np.ndarray]:
    from fourdperf.models.functa import fit, psnr

    pixels, labels = signal_images(dataset, split, numbers, recipe)
    wanted, got = (*model.config.image_size, model.config.channels), tuple(pixels.shape[1:])
    if got != wanted:
        raise ValueError(f"{recipe.dataset}: wanted images {wanted} as the field's, got {got}")
    target = pixels.flatten(1, -2).to(next(model.parameters()).device)
    fitted = fit(model, target, steps=recipe.steps, order=0)
    latent, quality = (x.detach().float().cpu() for x in (fitted.latent, psnr(fitted.recon, target)))
    wrong = ~latent.flatten(1).isfinite().all(1)
    image, augmentation = np.divmod(np.asarray(numbers), recipe.copies(split))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{split}: the fit of image {image[i]}, augmentation {augmentation[i]} diverges: its latent is not finite; "
            f"train the field with smaller rates"
        )
    found = (latent.numpy(), labels, image, augmentation, quality.numpy())
    return {name: np.ascontiguousarray(x, dtype) for (name, dtype), x in zip(NAMES.items(), found)}


def _part(out: Path, split: str, block: int) -> Path:
    return out / "parts" / split / f"{block:05d}.safetensors"


def _merge(out: Path, split: str, count: int, model: nn.Module, identity: dict, progress: bool) -> None:
    """Writes a split's file from its parts, holding one of them at a time."""
    recipe = identity["recipe"]
    row = tuple(model.zeros(1).shape[1:])
    chunk = (max(1, min(count, CHUNK_BYTES // (4 * math.prod(row)))), *row)
    total, squares = np.zeros(row[-1]), np.zeros(row[-1])
    with atomic_path(out / f"{split}.h5") as temporary, require_h5py().File(temporary, "w", libver="v110") as file:
        for name, dtype in NAMES.items():
            shape, chunks = ((count, *row), chunk) if name == "latents" else ((count,), (min(count, 8192),))
            file.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=True)
        blocks = range(math.ceil(count / recipe["block"]))
        for block in tqdm(blocks, f"{split}.h5", unit="part", disable=not progress or None):
            first = block * recipe["block"]
            arrays = _read_part(_part(out, split, block), min(recipe["block"], count - first), row)
            for name, array in arrays.items():
                file[name][first : first + len(array)] = array
            values = arrays["latents"].reshape(-1, row[-1]).astype(np.float64)
            total, squares = total + values.sum(0), squares + (values**2).sum(0)
        mean = total / (count * math.prod(row[:-1]))
        variance = squares / (count * math.prod(row[:-1])) - mean**2
        file["mean"], file["std"] = mean.astype(np.float32), np.sqrt(np.maximum(variance, 0)).astype(np.float32)
        file.attrs["recipe"] = json.dumps(recipe)
        file.attrs["config"] = json.dumps(model.config.to_dict())
        file.attrs["weights"] = identity["weights"]
        file.attrs["format"] = FORMAT


def _read_part(path: Path, count: int, row: tuple[int, ...]) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: the part is missing; run the command again") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: corrupt: {error}; delete it and run the command again") from error
    for name in NAMES:
        wanted = (count, *row) if name == "latents" else (count,)
        if name not in arrays or arrays[name].shape != wanted:
            got = arrays[name].shape if name in arrays else "none"
            raise ValueError(f"{path}: wanted {name} {wanted}, got {got}; delete it and run the command again")
    return {name: arrays[name] for name in NAMES}


# Reading one


def read_recipe(folder: str | os.PathLike) -> dict:
    """What functaset.json of `folder` says: recipe, signals, weights, config (not in older ones), root.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours.
    """
    file = Path(folder) / "functaset.json"
    if not file.is_file():
        raise FileNotFoundError(f"no functaset in {folder}; fourdperf functaset create makes one")
    try:
        known = json.loads(file.read_bytes())
        if known.pop("format") != FORMAT:
            raise ValueError("another format")
        Recipe.from_dict(known["recipe"])
        return known
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a description of a functaset: {error}") from error


def open_functaset(folder: str | os.PathLike, split: str, in_memory: bool = False) -> "Functaset":
    """A split of the functaset in `folder`.

    Raises:
        FileNotFoundError: there is no functaset, no such split, or it is not complete yet.
        ValueError: a file is corrupt, or of another functaset than functaset.json.
    """
    known = read_recipe(folder)
    path = Path(folder) / f"{split}.h5"
    if not path.exists():
        if split in known["signals"]:
            raise FileNotFoundError(f"{path}: not complete yet; fourdperf functaset create goes on with it")
        raise FileNotFoundError(f"{folder}: wanted split {split}, got {', '.join(known['signals'])}")
    signals = Functaset(path, in_memory)
    if signals.identity != (known["recipe"], known["weights"], known["signals"].get(split)):
        raise ValueError(f"{path}: of another functaset than {Path(folder) / 'functaset.json'}")
    return signals


class Functaset(Dataset):
    """Latents and labels of a split's file: `signals[i]` is (latent (s, s, c) float32, label int64); a list, array or
    slice of numbers gives a batch of them.

    Every process opens the file for itself and reads what it is asked for; `in_memory` reads all latents at once.

    Attributes:
        labels (N,) int64, image and augmentation (N,) int32: NumPy arrays.
        shape: of a latent. mean, std: tensors (c,). recipe; config: of the field.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a functaset, or corrupt.
    """

    def __init__(self, path: str | os.PathLike, in_memory: bool = False):
        self.path = Path(path)
        self._open: tuple[int, object] | None = None
        if not self.path.is_file():
            raise FileNotFoundError(f"no functaset: {self.path}; fourdperf functaset create makes one")
        try:
            with require_h5py().File(self.path, "r") as file:  # not kept: a worker must not inherit it
                self._describe(file)
                self.latents = torch.from_numpy(file["latents"][:]) if in_memory else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a functaset, or corrupt: {error}") from error

    def _describe(self, file) -> None:
        if file.attrs.get("format") != FORMAT:
            raise ValueError(f"format: wanted {FORMAT!r}, got {file.attrs.get('format')!r}")
        self.recipe = Recipe.from_dict(json.loads(file.attrs["recipe"]))
        self.config = json.loads(file.attrs["config"])
        self.shape = tuple(file["latents"].shape[1:])
        self.mean, self.std = (torch.from_numpy(file[name][:]) for name in ("mean", "std"))
        self.labels, self.image, self.augmentation = (file[name][:] for name in ("labels", "image", "augmentation"))
        lengths = {name: len(file[name]) for name in NAMES}
        if len(set(lengths.values())) > 1 or len(self.shape) < 2 or self.mean.shape != self.shape[-1:]:
            raise ValueError(f"data sets of sizes that do not fit: {lengths}, latents {self.shape}")
        self.identity = (self.recipe.to_dict(), file.attrs["weights"], len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, numbers: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, one = _chosen(numbers, len(self))
        latents = self._read(chosen) if self.latents is None else self.latents[torch.from_numpy(chosen)]
        labels = torch.from_numpy(self.labels[chosen])
        return (latents[0], labels[0]) if one else (latents, labels)

    def psnr(self) -> np.ndarray:
        """Of every signal, (N,) float32 in dB."""
        return self._file()["psnr"][:]

    def _read(self, chosen: np.ndarray) -> Tensor:
        latents = np.empty((len(chosen), *self.shape), np.float32)
        source = self._file()["latents"]
        try:
            if len(chosen) and (np.diff(chosen) == 1).all():
                source.read_direct(latents, np.s_[int(chosen[0]) : int(chosen[-1]) + 1])
            else:
                for row in np.argsort(chosen, kind="stable"):  # front to back, as the chunks lie
                    source.read_direct(latents, np.s_[int(chosen[row])], np.s_[int(row)])
        except OSError as error:
            raise ValueError(f"{self.path}: latents are corrupt: {error}") from error
        return torch.from_numpy(latents)

    def _file(self):
        """The file as this process has opened it."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), require_h5py().File(self.path, "r")
        return self._open[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}


class PixelMaps(Dataset):
    """The images that a functaset was fitted to, as maps of the same sides: `maps[i]` is (map (s, s, p p C), label) of
    signal i, where cell (row, column) holds the p x p pixels of that part of the image; a list or slice gives a batch.

    Images whose sides are no multiples of s are padded with zeros on all sides. mean and std, (p p C,), are those of up
    to 4096 images without augmentation.

    Args:
        signals: the functaset.
        dataset: its images and labels.
        split: which one it is.

    Raises:
        ValueError: the data set does not have the functaset's images or labels.
    """

    def __init__(self, signals: Functaset, dataset: Dataset, split: str):
        self.dataset, self.split, self.recipe, self.labels = dataset, split, signals.recipe, signals.labels
        self.size, copies = signals.shape[0], signals.recipe.copies(split)
        images = len(signals) // copies
        if images > len(dataset):
            raise ValueError(f"{signals.path}: wanted {images} images in its data set, got {len(dataset)}")
        some = range(0, images, math.ceil(images / STATISTICS))
        maps, labels = self[[i * copies for i in some]]
        if not np.array_equal(labels.numpy(), self.labels[:: copies * some.step]):
            raise ValueError(f"{signals.path}: its labels are not those of the data set")
        self.shape = tuple(maps.shape[1:])
        flat = maps.flatten(0, -2)
        self.mean, self.std = flat.mean(0), flat.std(0, correction=0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, numbers: int | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen, one = _chosen(numbers, len(self))
        pixels, labels = signal_images(self.dataset, self.split, chosen, self.recipe)
        maps, labels = _patches(pixels, self.size), torch.from_numpy(labels)
        return (maps[0], labels[0]) if one else (maps, labels)


def _chosen(numbers: int | slice | Sequence[int], length: int) -> tuple[np.ndarray, bool]:
    """Signal numbers (n,) from 0, and whether one was asked for and not a batch."""
    if isinstance(numbers, slice):
        numbers = range(*numbers.indices(length))
    one = not isinstance(numbers, Sequence | np.ndarray | Tensor)
    chosen = np.asarray([numbers] if one else numbers, np.int64).reshape(-1)
    if ((chosen < -length) | (chosen >= length)).any():
        raise IndexError(f"wanted signals below {length}, got {numbers}")
    return chosen % max(1, length), one


def _patches(images: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B, size, size, p q C), padded to multiples of `size`."""
    batch, height, width, channels = images.shape
    p, q = (math.ceil(n / size) for n in (height, width))
    down, across = p * size - height, q * size - width
    padded = F.pad(images, (0, 0, across // 2, across - across // 2, down // 2, down - down // 2))
    return padded.reshape(batch, size, p, size, q, channels).transpose(2, 3).reshape(batch, size, size, -1)
