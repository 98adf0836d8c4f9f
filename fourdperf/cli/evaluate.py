"""``fourdperf evaluate``: how good a trained model is, on held-out scenes against baselines, or on recorded videos."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from fourdperf.cli.checkpoints import Device, pick_device
from fourdperf.cli.evaluate_niso import niso
from fourdperf.cli.evaluate_tokenizer import tokenizer
from fourdperf.cli.reconstruct import SHIPPED_WEIGHTS
from fourdperf.cli.training import check_at_least_one
from fourdperf.data.files import write_text
from fourdperf.data.queries import Clip

__all__ = ["d4rt", "evaluate"]


def d4rt(
    ckpt: Path | None = None,
    test_data_path: str | None = None,
    num_queries: int = 2048,
    img_size: int | None = None,
    patch_img_size: int | None = None,
    num_frames: int | None = None,
    clips: int = 64,
    average_clips: int = 200,
    out: Path | None = None,
    intrinsics: Literal["normalised", "pixels", "pixels_integer_centres"] = "pixels",
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Prints the metrics of a D4RT, and writes them as JSON.

    Args:
        ckpt: A model's folder, a run's folder, or a run's last.ckpt; by default the small model of this package.
        test_data_path: A folder of videos in a known layout, or module:name of a data set of your own; without it,
            held-out synthetic scenes, where depth, tracks, poses and focal lengths are compared with baselines.
        num_queries: Queries per clip.
        img_size: Height and width of the frames; the model's own by default, and no other fits.
        patch_img_size: Height and width of the frames that the queries' colour patches are cut from; of synthetic
            scenes the baselines see them, too. By default the frames themselves.
        num_frames: Frames per clip; the model's own by default, at most.
        clips: How many clips; of videos at most as many as there are.
        average_clips: Training scenes that the baselines' averages come from.
        out: The JSON file.
        intrinsics: The unit of intrinsics in the dictionaries of a data set of your own.
        seed: Of the queries.
        device: Where to compute.
    """
    from fourdperf.data.scenes import Scene
    from fourdperf.data.synthetic import SyntheticClips, scene_seed
    from fourdperf.data.video_dataset import ClipConfig
    from fourdperf.train.baselines import training_averages
    from fourdperf.train.checkpoint import load_d4rt
    from fourdperf.train.data import open_clips
    from fourdperf.train.evaluate_d4rt import evaluate_queries, evaluate_scenes, format_table

    counts = {"num_queries": num_queries, "clips": clips, "average_clips": average_clips}
    counts["patch_img_size"] = patch_img_size
    check_at_least_one(counts, *counts)
    ckpt = ckpt or SHIPPED_WEIGHTS
    model = load_d4rt(ckpt).to(pick_device(device)).eval()
    size, frames = model.config.image_size, num_frames or model.config.num_frames
    if img_size is not None and size != (img_size, img_size):
        raise ValueError(f"--img_size: wanted the model's {size[0]} x {size[1]}, got {img_size}")
    if not 1 <= frames <= model.config.num_frames:
        raise ValueError(f"--num_frames: wanted 1 to the model's {model.config.num_frames}, got {frames}")
    patch = None if patch_img_size is None else (patch_img_size, patch_img_size)
    result: dict[str, Any] = {"ckpt": str(ckpt), "data": test_data_path or "synthetic, test split", "seed": seed}
    if test_data_path is not None:
        if size[0] != size[1]:
            raise ValueError(f"--test_data_path: wanted a model of square frames, got one of {size[0]} x {size[1]}")
        config = ClipConfig(num_queries, frames, size[0], patch_size=patch)
        dataset = open_clips(test_data_path, config, seed=seed, endless=False, intrinsics=intrinsics)
        result["queries"] = evaluate_queries(model, itertools.islice(_each(dataset), clips))
    else:
        dataset = SyntheticClips("test", num_queries, frames, size, patch_size=patch, seed=seed, scenes=clips)
        result["queries"] = evaluate_queries(model, _each(dataset))
        grid = tuple(max(1, n // 2) for n in size)
        train = [Scene(scene_seed("train", i), num_frames=frames, size=size) for i in range(average_clips)]
        test = [dataset.scene(i) for i in range(clips)]
        result |= evaluate_scenes(model, test, training_averages(train, grid), grid)
    for name, part in result.items():
        if isinstance(part, dict):
            print(f"\n{name}")
            print(format_table(part if name != "queries" else {key: {"": value} for key, value in part.items()}))
    if out is not None:
        write_text(out, json.dumps(result, indent=2) + "\n")
        print(f"\nwrote {out}")


evaluate = {"d4rt": d4rt, "niso": niso, "tokenizer": tokenizer}


def _each(dataset: torch.utils.data.Dataset) -> Iterator[Clip]:
    """A finite data set's clips, or a stream's."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        yield from dataset
    else:
        yield from (dataset[i] for i in range(len(dataset)))
