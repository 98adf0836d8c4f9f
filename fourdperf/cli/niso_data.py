"""``fourdperf niso_data``: raw data sets, or their stand-ins, as HDF5 shards that Neural Isometries train on."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fourdperf.data.pictures import enlarge, label, side_by_side, stack
from fourdperf.data.video import write_png
from fourdperf.train.processes import started

__all__ = ["co3d", "homnist", "niso_data", "sequences", "shapes", "shrec"]

SHOWN = 8
PANEL = 96


def homnist(
    out: Path = Path("homnist_shards"),
    dataset: Literal["digits", "mnist"] = "digits",
    data_path: Path | None = None,
    mat: Path | None = None,
    size: int = 40,
    digit: int = 28,
    spread: float = 0.5,
    per_shard: int = 4096,
    seed: int = 0,
) -> None:
    """Digits in the middle of nothing, and a test set of digits under homographies.

    train and val are the images as they are, for homographies are drawn anew when they are read. test is homNIST's own
    where --mat names it, else the test images of --dataset, each under one homography.

    Args:
        out: The folder for the shards.
        dataset: digits come with scikit-learn; mnist is read from its usual files below --data_path.
        data_path: Where the files are; by default the environment's DATA_PATH.
        mat: homNIST_test.mat, or the folder with it.
        size: Pixels of an image, along each side; 40 in homNIST.
        digit: Pixels of the digit in it.
        spread: How far the homographies of the test set are from the identity; 0.5 in the original.
        per_shard: Images per file; a kill costs at most one file.
        seed: Of the splits, and of the test set's homographies.
    """
    from fourdperf.data.homnist import PlacedImages, read_homnist
    from fourdperf.data.images import open_images
    from fourdperf.data.niso import WarpedImages

    images = {name: open_images(dataset, name, data_path, seed=seed) for name in ("train", "val", "test")}
    placed = {name: PlacedImages(found, size, digit) for name, found in images.items()}
    test = WarpedImages(placed["test"], spread=spread, seed=seed, shuffle=False)
    if mat is not None:
        own = read_homnist(mat)
        if own.image_size != (size, size):
            raise ValueError(f"--size: wanted {own.image_size[0]} as in {mat}, got {size}")
        test = PlacedImages(own, size, digit=None)
    options = {"dataset": dataset, "size": size, "digit": digit, "spread": spread, "seed": seed, "mat": mat is not None}
    _write(out, "homnist", {**placed, "test": test}, options, per_shard, images["train"].classes)


def shrec(
    data_path: Path | None = None,
    out: Path = Path("shrec_shards"),
    height: int = 96,
    width: int = 192,
    times: int = 16,
    train_per_class: int = 10,
    per_shard: int = 16,
    seed: int = 0,
) -> None:
    """Surfaces that are mapped to the sphere, such as the conformal SHREC'11 set, as equirectangular maps of features.

    Which files and names are wanted is told in fourdperf/data/shrec.py; meshes are .obj, .off or .ply.

    Args:
        data_path: The folder with the classes, or with train and test; by default the environment's DATA_PATH.
        out: The folder for the shards.
        height: Pixels of a map from pole to pole.
        width: Pixels of a map around.
        times: Heat kernel signatures per vertex, where no file has features.
        train_per_class: Shapes of each class for training, where the folder does not say.
        per_shard: Shapes per file; a kill costs at most one file.
        seed: Which shapes are for training.
    """
    from fourdperf.data.shrec import Shrec

    own = {"times": times, "train_per_class": train_per_class, "seed": seed}
    root = _root(data_path)
    sources = {split: Shrec(root, split, (height, width), **own) for split in ("train", "test")}
    options = {"dataset": "shrec", "height": height, "width": width, **own, "copies": sources["train"].copies}
    _write(out, "shapes", sources, options, per_shard, sources["train"].classes)


def shapes(
    out: Path = Path("shapes_shards"),
    count: int = 2000,
    val_count: int = 200,
    test_count: int = 500,
    height: int = 48,
    width: int = 96,
    per_shard: int = 256,
    seed: int = 0,
) -> None:
    """Surfaces of twenty kinds, made here, as maps of radius and curvatures on the sphere: what stands in for SHREC'11.

    Args:
        out: The folder for the shards.
        count: Shapes for training.
        val_count: Shapes of val.
        test_count: Shapes of test.
        height: Pixels of a map from pole to pole.
        width: Pixels of a map around.
        per_shard: Shapes per file; a kill costs at most one file.
        seed: Of the shapes.
    """
    from fourdperf.data.niso_standins import SHAPES, StarShapes

    counts = {"train": count, "val": val_count, "test": test_count}
    sources = {split: StarShapes(split, number, (height, width), seed) for split, number in counts.items()}
    options = {"dataset": "shapes", "height": height, "width": width, "seed": seed}
    _write(out, "shapes", sources, options, per_shard, tuple(SHAPES))


def co3d(
    data_path: Path | None = None,
    out: Path = Path("co3d_shards"),
    height: int = 144,
    width: int = 144,
    categories: list[str] | None = None,
    listed: Path | None = None,
    best: float = 0.25,
    set_list: str | None = None,
    min_frames: int = 16,
    per_shard: int = 8,
    seed: int = 0,
) -> None:
    """Videos of Common Objects in 3D (CO3Dv2) with their cameras.

    Args:
        data_path: The folder with the categories, as the download script leaves it; by default the environment's
            DATA_PATH.
        out: The folder for the shards.
        height: Pixels of a frame, whose middle is cut out.
        width: Pixels of a frame.
        categories: Some of the categories; by default all.
        listed: A JSON file that names sequences, such as the original's co3dv2_top25_splits.json.
        best: Without --listed, this part of each category's sequences, those with the best camera poses.
        set_list: Take sequences, frames and splits from set_lists_NAME.json of each category, such as fewview_train.
        min_frames: Leave shorter sequences out.
        per_shard: Sequences per file; a kill costs at most one file.
        seed: Of the splits, where no list tells them.
    """
    from fourdperf.data.co3d import open_co3d

    own = {"categories": categories, "best": best, "set_list": set_list, "min_frames": min_frames, "seed": seed}
    sources = open_co3d(_root(data_path), (height, width), listed=listed, **own)
    options = {"dataset": "co3d", "height": height, "width": width, **own, "listed": listed and listed.name}
    _write(out, "sequences", sources, options, per_shard)


def sequences(
    out: Path = Path("sequences_shards"),
    count: int = 400,
    val_count: int = 32,
    test_count: int = 64,
    frames: int = 32,
    height: int = 64,
    width: int = 64,
    time_step: float = 0.125,
    per_shard: int = 16,
) -> None:
    """Videos of synthetic scenes in which only the camera moves, with its exact poses: what stands in for CO3D.

    Args:
        out: The folder for the shards.
        count: Videos for training.
        val_count: Videos of val.
        test_count: Videos of test.
        frames: Frames of a video.
        height: Pixels of a frame.
        width: Pixels of a frame.
        time_step: Seconds from one frame to the next; the camera moves by about as many units, and turns by about
            30 degrees in a second.
        per_shard: Videos per file; a kill costs at most one file.
    """
    from fourdperf.data.niso_standins import SceneSequences

    counts = {"train": count, "val": val_count, "test": test_count}
    sources = {name: SceneSequences(name, n, frames, (height, width), time_step) for name, n in counts.items()}
    options = {"dataset": "sequences", "frames": frames, "height": height, "width": width, "time_step": time_step}
    _write(out, "sequences", sources, options, per_shard)


niso_data = {"homnist": homnist, "shrec": shrec, "co3d": co3d, "sequences": sequences, "shapes": shapes}


def _root(data_path: Path | None) -> Path:
    root = os.environ.get("DATA_PATH") if data_path is None else data_path
    if not root:
        raise FileNotFoundError("--data_path: wanted the folder with the data, and DATA_PATH is not set either")
    return Path(root)


def _write(
    out: Path, kind: str, sources: Mapping[str, Any], options: dict, per_shard: int, classes: Sequence[str] = ()
) -> None:
    """Writes the shards of this process, which torchrun may have started, and the picture."""
    from fourdperf.data.niso_shards import Items, Sequences, write_shards

    start = time.monotonic()
    rank, ranks = started()
    written = write_shards(
        out,
        kind,
        sources,
        options,
        per_shard=per_shard,
        classes=classes,
        rank=rank,
        ranks=ranks,
        progress=rank == 0,
    )
    if rank:
        return
    first = next(iter(sources))
    try:
        show = _sequence_row if kind == "sequences" else _item_panel
        found = (Sequences if kind == "sequences" else Items)(out, first)
    except FileNotFoundError:  # another process is not ready yet
        print(f"wrote {written} shards to {out}; other processes go on")
        return
    panels = [show(found, i) for i in range(min(SHOWN, len(found)))]
    write_png(out / "overview.png", stack(panels) if kind == "sequences" else side_by_side(panels))
    counts = ", ".join(f"{len(source):,} {split}" for split, source in sources.items())
    print(f"{kind} of {options['dataset']}: {counts}; {json.dumps(options)}")
    print(f"wrote {written} shards to {out} in {time.monotonic() - start:.0f} s; {out / 'overview.png'} shows some")


def _item_panel(items, index: int) -> np.ndarray:
    item = items[index]
    x = item["x"].numpy()
    return label(_picture(x if x.ndim == 3 else x[0]), items.classes[item["label"]])


def _sequence_row(videos, index: int) -> np.ndarray:
    total = videos.frames(index)
    numbers = np.linspace(0, total - 1, min(total, SHOWN)).round().astype(int).tolist()
    return side_by_side([_picture(frame) for frame in videos.read(index, numbers)["video"].numpy()])


def _picture(x: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of a map (H, W, C): grey, or the first three channels."""
    x = x[..., : 3 if x.shape[-1] >= 3 else 1]
    pixels = np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8).repeat(3 // x.shape[-1], -1)
    return enlarge(pixels, PANEL, PANEL * x.shape[1] // x.shape[0])
