"""Opens a folder of recorded videos, whatever its layout, for training.

The layout is told by the names of files, never by sizes or numbers: each scene by itself, in the folder given or up to
three levels below it (train/SEQUENCE, say), so that layouts may be mixed.
"""

import os
from collections import Counter
from pathlib import Path

from fourdperf.data.folder import VIDEO_SUFFIXES, Folder
from fourdperf.data.movi import Movi
from fourdperf.data.pointodyssey import PointOdyssey
from fourdperf.data.shards import ShardDataset, find_shards
from fourdperf.data.sources import Source
from fourdperf.data.video_dataset import ClipConfig, OnDisk, VideoDataset

__all__ = ["LAYOUTS", "describe", "find_scenes", "layout_of", "open_dataset"]

LAYOUTS: dict[str, type[Source]] = {"pointodyssey": PointOdyssey, "movi": Movi, "folder": Folder}
LEVELS = 3


def layout_of(folder: str | os.PathLike) -> str | None:
    """The layout of one scene by the names in its folder; None if it is no scene.

    A scene may lack files; its reader will say so.

    Raises:
        ValueError: the names are those of several layouts.
    """
    names = {entry.name for entry in os.scandir(folder)}
    rgba = any(name.startswith("rgba_") and name.endswith(".png") for name in names)
    videos = {f"video{suffix}" for suffix in VIDEO_SUFFIXES}
    marks = {
        "pointodyssey": bool({"rgbs", "anno.npz"} & names),
        "movi": rgba or {"metadata.json", "data_ranges.json"} <= names,
        "folder": bool(({"scene.json", "frames", "tracks.npz"} | videos) & names),
    }
    found = [layout for layout, marked in marks.items() if marked]
    if len(found) > 1:
        raise ValueError(f"{folder}: wanted the files of one layout, found those of {' and '.join(found)}")
    return found[0] if found else None


def find_scenes(path: str | os.PathLike) -> list[OnDisk]:
    """The scenes in a folder, in the order of their paths.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no scene in it; what was looked for and what there is instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: wanted a folder of scenes, or one scene; there is no such folder")
    scenes, level = [], [path]
    for _ in range(LEVELS + 1):
        below = []
        for folder in level:
            layout = layout_of(folder)
            if layout is not None:
                scenes.append(OnDisk(LAYOUTS[layout], str(folder)))
            else:
                below += [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
        level = [folder for folder in below if not folder.name.startswith(".")]
    if not scenes:
        there = sorted(entry.name for entry in os.scandir(path))
        raise ValueError(
            f"{path}: found no scene in it or up to {LEVELS} levels below. Wanted rgbs/ and anno.npz (PointOdyssey), "
            "rgba_00000.png and metadata.json (Kubric), frames/ or video.mp4 with scene.json (generic folder), or "
            f"*.tar shards; there is {', '.join(there[:8]) + ' ...' * (len(there) > 8) if there else 'nothing'}"
        )
    return sorted(scenes, key=lambda scene: scene.path)


def describe(path: str | os.PathLike) -> str:
    """What :func:`find_scenes` finds and what each layout's scenes hold, in a few lines; opens every scene.

    Raises:
        ValueError, OSError: as the readers do, about the first scene that is wrong.
    """
    names = {reader: layout for layout, reader in LAYOUTS.items()}
    found: Counter[tuple[str, str]] = Counter()
    frames: Counter[tuple[str, str]] = Counter()
    for scene in find_scenes(path):
        source = scene.open()
        key = names[scene.reader], ", ".join(source.contents())
        found[key] += 1
        frames[key] += source.num_frames
    return "\n".join(
        f"{layout}: {count} scene{'s' * (count > 1)}, {frames[layout, contents]} frames; {contents}"
        for (layout, contents), count in found.items()
    )


def open_dataset(
    path: str | os.PathLike, config: ClipConfig, seed: int = 0, check: bool = True
) -> VideoDataset | ShardDataset:
    """Clips of what is in a folder: scenes in known layouts, or `*.tar` shards (also by one file's path).

    Args:
        path: the folder, or a shard.
        config: what a clip is made of.
        seed: of everything random.
        check: open every scene once now, so that what is missing is known at the start and not in the middle of a run.
            For very many scenes, which takes some milliseconds each, this may be left out. Shards are not opened.

    Raises:
        FileNotFoundError: there is no such folder, or a scene lacks a file.
        ImportError: shards need the package webdataset.
        ValueError: no scene was recognised, a scene is wrong or shorter than a clip, or `config` is out of range.
    """
    shards = find_shards(path)
    if shards:
        return ShardDataset(shards, config, seed)
    dataset = VideoDataset(find_scenes(path), config, seed)
    for scene in dataset.scenes if check else []:
        source = scene.open()
        if source.num_frames < config.num_frames:
            raise ValueError(f"{source.name}: wanted at least {config.num_frames} frames, got {source.num_frames}")
    return dataset
