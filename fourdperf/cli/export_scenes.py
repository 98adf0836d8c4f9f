"""``fourdperf export_scenes``: synthetic scenes as files, in the layouts that recorded videos have."""

import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from fourdperf.data.export import export_scene, pack_shard
from fourdperf.data.open_dataset import describe, find_scenes
from fourdperf.data.pictures import DepthColours, label, side_by_side, stack
from fourdperf.data.sources import Source
from fourdperf.data.synthetic import Split, scene_seed
from fourdperf.data.video import write_png

__all__ = ["export_scenes"]

SHOWN_SCENES = 4
SHOWN_FRAMES = 6


def export_scenes(
    out: Path,
    layout: Literal["folder", "pointodyssey", "movi", "shards"] = "folder",
    count: int = 4,
    split: Split = "train",
    seed: int = 0,
    frames: int = 24,
    height: int = 128,
    width: int = 128,
    tracks: int = 1024,
    scale: float = 1.0,
    per_shard: int = 16,
) -> None:
    """Writes synthetic scenes to a new folder, and overview.png, which shows some of them.

    Args:
        out: The folder; a scene is a folder in it, or shards are files in it.
        layout: The generic folder, PointOdyssey's, Kubric's (MOVi), or tar shards of generic folders.
        count: How many scenes.
        split: Which scenes: train, val and test have none in common; fourdperf evaluate d4rt asks about test.
        seed: The number in its split of the first scene; the others follow.
        frames: Frames of a scene.
        height: Pixels.
        width: Pixels.
        tracks: Points that are followed through time; Kubric has none.
        scale: Lengths are multiplied by it; PointOdyssey's depth maps have steps of 1/65.
        per_shard: Scenes in a shard.
    """
    from fourdperf.data.scenes import Scene

    if count < 1 or per_shard < 1:
        raise ValueError(f"--count, --per_shard: wanted at least 1, got {count} and {per_shard}")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise FileExistsError(f"{out}: wanted a new or empty folder, something is there already")
    sharded, picture = layout == "shards", None
    names = [f"{split}_{seed + i:06d}" for i in range(count)]
    with tempfile.TemporaryDirectory(prefix="fourdperf-") as temporary, tqdm(total=count, desc="scenes") as bar:
        folder = Path(temporary) if sharded else out
        for start in range(0, count, per_shard):
            group = range(start, min(start + per_shard, count))
            for i in group:
                scene = Scene(scene_seed(split, seed + i), num_frames=frames, size=(height, width))
                export_scene(scene, folder / names[i], "folder" if sharded else layout, tracks, scale)
                bar.update()
            if picture is None:
                picture = stack([_row(scene.open()) for scene in find_scenes(folder)[:SHOWN_SCENES]])
            if sharded:
                pack_shard(out / f"{start // per_shard:06d}.tar", [folder / names[i] for i in group])
                for i in group:
                    shutil.rmtree(folder / names[i])
    write_png(out / "overview.png", picture)
    print(f"{-(-count // per_shard)} shards of generic folders" if sharded else describe(out))
    print(f"wrote {count} scenes of {frames} frames {height}x{width} to {out}, and {out / 'overview.png'}")


def _row(source: Source) -> np.ndarray:
    """Frames of a scene and their depth below."""
    numbers = np.linspace(0, source.num_frames - 1, min(source.num_frames, SHOWN_FRAMES)).round().astype(int).tolist()
    frames = side_by_side([label(frame, f"frame {n}") for n, frame in zip(numbers, source.frames(numbers))])
    depth = [source.depth(n) for n in numbers]
    if depth[0] is None:
        return frames
    colours = DepthColours.fit(np.stack(depth))
    return stack([frames, side_by_side([colours(image) for image in depth])])
