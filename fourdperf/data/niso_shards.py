"""HDF5 shards of images, shapes and videos with cameras: written one by one, whole or not at all; read by rank.

    FOLDER/niso.json         what was asked for: kind, options, items of each split, items per shard, classes
           train-00000.h5    items 0 .. per_shard - 1 of the split, and so on
           val-00000.h5  test-00000.h5

Shard s is written by process s % ranks, under another name until it is on the disk. So whatever is killed when, a shard
is there complete or not at all, and the same command goes on with those that are missing, on as many processes as one
likes.

Kinds "homnist" and "shapes" have items of one size, stacked:
    x        (N, ...) uint8 for [0, 1], or float32
    label    (N,) int64
Kind "sequences" has videos of any length after one another, F = frames.sum():
    video       (F, H, W, 3) uint8
    poses       (F, 4, 4) float32, world from camera
    intrinsics  (F, 3, 3) float32, normalised (`fourdperf.data.queries`)
    frames      (N,) int64
All in chunks with checksums; attributes of a shard: format, kind, split, first (its first item's number).
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from fourdperf.data.files import atomic_path, require_h5py, write_text

__all__ = [
    "ItemSource",
    "Items",
    "Kind",
    "SequenceSource",
    "Sequences",
    "Shards",
    "read_description",
    "write_shards",
]

FORMAT = "fourdperf niso shards 1"
CHUNK_BYTES = 64 * 1024
OPEN_FILES = 8
WAIT = 0.5  # seconds from one look for others' shards to the next
Kind = Literal["homnist", "shapes", "sequences"]
NAMES = {"homnist": ("x", "label"), "shapes": ("x", "label"), "sequences": ("video", "poses", "intrinsics")}


class ItemSource(Protocol):
    """A map-style data set of {"x": float32 in [0, 1], "label": int}."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...


class SequenceSource(Protocol):
    """Videos with cameras. frames(i): how many video i has. read(i, numbers): of these frames, float32 tensors
    {"video": (T, H, W, 3) in [0, 1], "poses": (T, 4, 4) world from camera, "intrinsics": (T, 3, 3) normalised}."""

    def __len__(self) -> int: ...
    def frames(self, index: int) -> int: ...
    def read(self, index: int, numbers: Sequence[int]) -> dict[str, Tensor]: ...


def write_shards(
    out: str | os.PathLike,
    kind: Kind,
    sources: Mapping[str, ItemSource | SequenceSource],
    options: Mapping[str, Any],
    *,
    per_shard: int,
    classes: Sequence[str] = (),
    rank: int = 0,
    ranks: int = 1,
    wait: bool = False,
    progress: bool = False,
) -> int:
    """Writes the shards of `out` that are not there yet and are this process's; returns how many it wrote.

    Args:
        sources: by split.
        options: what made the sources what they are, to be noted and compared.
        per_shard: items in a shard, which is held in memory; a kill costs at most these.
        rank, ranks: this process, and how many share the work.
        wait: come back only when the others' shards are there too.
        progress: show a bar.

    Raises:
        ValueError: `out` was begun with something else, an argument is out of range, or a source's file is corrupt.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    if kind not in get_args(Kind):
        raise ValueError(f"kind: wanted one of {', '.join(get_args(Kind))}, got {kind!r}")
    if per_shard < 1 or not 0 <= rank < ranks:
        raise ValueError(f"wanted per_shard >= 1 and 0 <= rank < ranks, got {per_shard}, {rank}, {ranks}")
    counts = {split: len(source) for split, source in sources.items()}
    if not counts or 0 in counts.values():
        raise ValueError(f"{kind}: wanted at least one item in every split, got {counts}")
    _begin(out, {"kind": kind, "items": counts, "per_shard": per_shard, "options": dict(options)}, classes)
    mine = [(split, shard) for split in sources for shard in range(rank, math.ceil(counts[split] / per_shard), ranks)]
    missing = [(split, shard) for split, shard in mine if not _shard(out, split, shard).exists()]
    for split, shard in tqdm(missing, f"{out.name}", unit="shard", disable=not progress or None):
        path = _shard(out, split, shard)
        for stale in out.glob(f".{path.stem}.*.tmp.h5"):
            stale.unlink(missing_ok=True)  # what a kill left half written
        numbers = range(shard * per_shard, min((shard + 1) * per_shard, counts[split]))
        arrays = _arrays(kind, sources[split], numbers)
        with atomic_path(path) as temporary, require_h5py().File(temporary, "w", libver="v110") as file:
            for name, array in arrays.items():
                row = math.prod(array.shape[1:]) * array.itemsize
                chunk = (max(1, min(len(array), CHUNK_BYTES // max(1, row))), *array.shape[1:])
                file.create_dataset(name, data=array, chunks=chunk, fletcher32=True)
            file.attrs.update(format=FORMAT, kind=kind, split=split, first=numbers.start)
    while wait and any(_missing(out, split, math.ceil(counts[split] / per_shard)) for split in counts):
        time.sleep(WAIT)
    return len(missing)


def _begin(out: Path, identity: dict, classes: Sequence[str]) -> None:
    """Writes what a folder begins with, or checks that it was begun with the same."""
    identity = json.loads(json.dumps({**identity, "classes": list(classes)}))
    if (out / "niso.json").exists():
        known = read_description(out)
        flat = lambda found: {**{k: v for k, v in found.items() if k != "options"}, **found["options"]}
        theirs, ours = flat(known), flat(identity)
        names = sorted(theirs.keys() | ours.keys())
        different = [f"{name} {theirs.get(name)}" for name in names if theirs.get(name) != ours.get(name)]
        if different:
            raise ValueError(
                f"{out}: its shards were begun with {', '.join(different)}; give the options that they were begun "
                f"with, or another folder"
            )
    elif any(out.glob("*-[0-9]*.h5")):
        raise ValueError(f"{out}: holds shards, but no niso.json that says of what; give another folder")
    else:
        write_text(out / "niso.json", json.dumps({"format": FORMAT, **identity}, indent=2) + "\n")


def _arrays(kind: str, source: ItemSource | SequenceSource, numbers: range) -> dict[str, np.ndarray]:
    """The arrays of a shard; values in [0, 1] become bytes where the item is an image."""
    if kind == "sequences":
        frames = [source.frames(i) for i in numbers]
        items = [source.read(i, range(count)) for i, count in zip(numbers, frames)]
        arrays = {name: np.concatenate([np.asarray(item[name]) for item in items]) for name in NAMES[kind]}
        return {**arrays, "video": _bytes(arrays["video"]), "frames": np.asarray(frames, np.int64)}
    items = [source[i] for i in numbers]
    x = np.stack([np.asarray(item["x"], np.float32) for item in items])
    return {
        "x": _bytes(x) if kind == "homnist" else x,
        "label": np.array([int(item["label"]) for item in items], np.int64),
    }


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _shard(out: Path, split: str, number: int) -> Path:
    return out / f"{split}-{number:05d}.h5"


def _missing(out: Path, split: str, count: int) -> list[str]:
    """The names of a split's shards that are not there."""
    return [path.name for path in (_shard(out, split, number) for number in range(count)) if not path.is_file()]


# Reading


def read_description(folder: str | os.PathLike) -> dict:
    """What niso.json of `folder` says: kind, items by split, per_shard, options, classes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours.
    """
    file = Path(folder) / "niso.json"
    if not file.is_file():
        raise FileNotFoundError(f"no shards in {folder}: no niso.json; fourdperf niso_data makes them")
    try:
        known = json.loads(file.read_bytes())
        if known.pop("format") != FORMAT or not all(known["items"].values()) or known["per_shard"] < 1:
            raise ValueError(f"wanted {FORMAT!r} with items")
        return {name: known[name] for name in ("kind", "items", "per_shard", "options", "classes")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a description of shards: {error}") from error


class Shards(Dataset):
    """A split of a folder of shards, or what a process has of it: shards rank, rank + ranks, ...

    Every process opens the files for itself. `kind`, `classes` and `options` are those of niso.json.

    Raises:
        FileNotFoundError: there are no shards, no such split, or some are missing.
        ValueError: niso.json or a shard is not one of ours, or corrupt; there are fewer shards than processes.
    """

    def __init__(self, folder: str | os.PathLike, split: str, rank: int = 0, ranks: int = 1):
        known = read_description(folder)
        self.folder, self.split = Path(folder), split
        self.kind, self.classes, self.options = known["kind"], tuple(known["classes"]), known["options"]
        self.per_shard, items = known["per_shard"], known["items"]
        if split not in items:
            raise FileNotFoundError(f"{folder}: wanted split {split}, got {', '.join(items)}")
        count = math.ceil(items[split] / self.per_shard)
        if missing := _missing(self.folder, split, count):
            raise FileNotFoundError(
                f"{folder}: {missing[0]} is missing ({len(missing)} of {count} shards): the same fourdperf niso_data "
                f"command goes on with them"
            )
        self.shards = range(rank, count, ranks)
        if not 0 <= rank < ranks or not self.shards:
            raise ValueError(f"{folder}: wanted 0 <= rank < ranks and a shard for each, got {rank}, {ranks}, {count}")
        sizes = [min(self.per_shard, items[split] - s * self.per_shard) for s in self.shards]
        self.length, self._open = sum(sizes), {}

    def __len__(self) -> int:
        return self.length

    def number(self, index: int) -> int:
        """The number, in the whole split, of this process's item `index`."""
        if not -self.length <= index < self.length:
            raise IndexError(f"wanted items below {self.length}, got {index}")
        shard, row = divmod(index % self.length, self.per_shard)
        return self.shards[shard] * self.per_shard + row

    def _rows(self, shard: int, name: str, rows: slice | int | list[int]) -> np.ndarray:
        file = self._file(shard)
        try:
            return file[name][rows]
        except (OSError, KeyError, ValueError) as error:
            path = _shard(self.folder, self.split, shard)
            raise ValueError(f"{path}: corrupt: {name}: {error}; delete it and run the command again") from error

    def _file(self, shard: int):
        """A shard as this process has opened it; a few stay open."""
        key = os.getpid(), shard
        if key not in self._open:
            path = _shard(self.folder, self.split, shard)
            try:
                file = require_h5py().File(path, "r")
                found = {name: file.attrs.get(name) for name in ("format", "kind", "split", "first")}
            except OSError as error:
                raise ValueError(f"{path}: cut off or corrupt: {error}; delete it and run the command again") from error
            wanted = {"format": FORMAT, "kind": self.kind, "split": self.split, "first": shard * self.per_shard}
            if found != wanted:
                raise ValueError(f"{path}: wanted a shard with {wanted}, got {found}")
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[key] = file
        return self._open[key]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


class Items(Shards):
    """Images or shapes: `items[i]` is {"x": float32 tensor, bytes as [0, 1], "label": int}."""

    def __getitem__(self, index: int) -> dict:
        shard, row = divmod(self.number(index), self.per_shard)
        x = torch.from_numpy(self._rows(shard, "x", row))
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return {"x": x, "label": int(self._rows(shard, "label", row))}


class Sequences(Shards):
    """Videos with cameras, a `SequenceSource`; read takes only the frames that it is asked for from the disk."""

    def frames(self, index: int) -> int:
        shard, row = divmod(self.number(index), self.per_shard)
        return int(self._rows(shard, "frames", row))

    def read(self, index: int, numbers: Sequence[int]) -> dict[str, Tensor]:
        shard, row = divmod(self.number(index), self.per_shard)
        frames = self._rows(shard, "frames", slice(0, row + 1))
        if len(numbers) and not 0 <= min(numbers) <= max(numbers) < frames[-1]:
            raise IndexError(f"wanted frames below {frames[-1]}, got {min(numbers)} to {max(numbers)}")
        first = int(frames[:-1].sum())
        found = {}
        for name in NAMES["sequences"]:
            low, high = first + min(numbers), first + max(numbers) + 1
            rows = self._rows(shard, name, slice(low, high))[np.asarray(numbers) + first - low]
            found[name] = torch.from_numpy(rows)
        return {**found, "video": found["video"].float() / 255}
