"""``fourdperf reconstruct``: a video to depth, cameras, coloured points and tracks, with a D4RT model.

Everything goes into one folder: the arrays, files for other programs, films, and a page to turn with the mouse.
"""

import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import fourdperf
from fourdperf.cli.checkpoints import Device, Dtype, pick_device
from fourdperf.cli.report import Table
from fourdperf.data.files import output_folder
from fourdperf.data.video import VideoReader, resize_frame
from fourdperf.models.d4rt import D4RT
from fourdperf.reconstruct import Reconstruction
from fourdperf.reconstruct import reconstruct as run_recipes
from fourdperf.reconstruct.colmap import write_colmap
from fourdperf.reconstruct.movie import write_depth_movie, write_depth_sheet, write_track_movie
from fourdperf.reconstruct.page import write_page
from fourdperf.reconstruct.ply import write_ply
from fourdperf.reconstruct.rerun import write_rerun

__all__ = ["SHIPPED_WEIGHTS", "read_video", "reconstruct", "throughput", "write_results"]

MAX_SIDE = 640
SHIPPED_WEIGHTS = Path(fourdperf.__file__).parent / "weights" / "d4rt"


def reconstruct(
    video: Path,
    out: Path | None = None,
    weights: Path | None = None,
    tracks: str = "grid",
    grid: int = 16,
    frames: str = "::",
    overlap: int | None = None,
    dense: int = 1,
    patch_resolution: Literal["model", "video"] = "model",
    max_side: int = MAX_SIDE,
    shared_intrinsics: bool = False,
    distortion: bool = False,
    keep: float = 1.0,
    seed: int = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    allow_partial: bool = False,
) -> None:
    """Reconstructs a video: depth, cameras, coloured points and tracks, as arrays, files, films and a page.

    Writes reconstruction.npz (everything), points.ply, colmap/ (images and sparse/0), depth.mp4, depth.png, tracks.mp4,
    page.html and, where rerun-sdk is installed, recording.rrd. The world is the camera of the first frame.

    Args:
        video: A video file, an image, or a folder of images.
        out: The folder for the results; by default <video>_reconstruction here.
        weights: A folder with a D4RT model (config.json, model.safetensors); by default the small one that comes with
            the package.
        tracks: grid follows points spread over the first frame, all every pixel of every frame; or an .npz with an
            array source (K, 3): the frame, u and v of each point to follow.
        grid: Points per side for tracks grid; 0 follows none.
        frames: START:STOP:STEP, which frames to take, as Python counts; every second one of the first 100 is :100:2.
        overlap: Frames that neighbouring chunks share where a video is longer than the model's clip; by default half
            the clip.
        dense: How many times the rows and columns of the model's frames depth maps and point cloud have (and tracks all
            follows); 4 asks 16 times as many queries.
        patch_resolution: Cut the queries' colour patches from the frames as the model sees them, or from the video's.
        max_side: Frames whose longer side has more pixels are shrunk to this, in the results as well.
        shared_intrinsics: One camera for the whole video, without zoom.
        distortion: Fit radial distortion as well.
        keep: The share of the points to keep, the most confident ones.
        seed: The seed of the order in which tracks all takes the pixels.
        dtype: Number type of the computation.
        device: Where to compute.
        allow_partial: Go on with the frames that can be read of a video that is cut off.
    """
    where = pick_device(device)
    chosen = _slice(frames)
    if min(max_side, dense) < 1 or grid < 0:
        wanted = "wanted --max_side and --dense of at least 1 and --grid of at least 0"
        raise ValueError(f"{wanted}, got {max_side}, {dense} and {grid}")
    # The video comes first: it is the cheap one to find missing.
    reader = VideoReader(video, size=None, allow_partial=allow_partial)
    track = {"grid": grid, "all": "all"}.get(tracks)
    track = _sources(Path(tracks)) if track is None else track
    model = _load(weights, where)
    pictures = read_video(reader, chosen, max_side)
    out = out or Path(f"{video.stem}_reconstruction")
    size, dense_size = f"{pictures.shape[1]}x{pictures.shape[2]}", tuple(dense * n for n in model.config.image_size)
    print(f"{video}: {len(pictures)} frames, taken as {size}; the model's clip is {model.config.num_frames} frames")
    print(f"weights: {weights or 'those of the package'}")
    with torch.autocast(where.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        found = run_recipes(
            model,
            pictures,
            track=track,
            depth_size=dense_size,
            cloud_size=dense_size,
            high_resolution=patch_resolution == "video",
            overlap=overlap,
            shared_intrinsics=shared_intrinsics,
            distortion=distortion,
            keep=keep,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    table = throughput(found)
    print(table.text())
    for path in write_results(out, found, reader.fps / (chosen.step or 1), video.name, table.rows):
        print(f"wrote {path}")


def read_video(reader: VideoReader, chosen: slice = slice(None), max_side: int = MAX_SIDE) -> np.ndarray:
    """The chosen frames, uint8 (T, H, W, 3), the longer side at most ``max_side``."""
    scale = min(1.0, max_side / max(reader.height, reader.width))
    size = tuple(max(1, round(side * scale)) for side in (reader.height, reader.width))
    # reading to the end tells whether the file is whole; nothing after the last chosen frame is asked for
    frames = islice(reader.read(), chosen.start, chosen.stop, chosen.step)
    total = len(range(reader.frames)[chosen]) if reader.frames else None
    bar = tqdm(frames, "reading", total=total, unit="frame", disable=None)
    pictures = [frame if scale == 1 else resize_frame(frame, size) for frame in bar]
    if not pictures:
        raise ValueError(f"--frames: wanted at least one frame of {reader.path}, which has {reader.frames or 'few'}")
    return np.stack(pictures)


def throughput(reconstruction: Reconstruction) -> Table:
    """What was done, and how fast: rows of a name and a value."""
    stats = reconstruction.stats
    chunks = f" in {stats['chunks']} chunks" * (stats["chunks"] > 1)
    rows = [
        ["frames", f"{stats['frames']:,}{chunks}"],
        ["points", f"{len(reconstruction.points):,}"],
        ["tracks", f"{len(reconstruction.tracks):,}"],
        ["queries", f"{stats['queries']:,}"],
        ["seconds", f"{stats['seconds']:.2f} on {stats['device']}"],
        ["queries/s", f"{stats['queries_per_second']:,.0f}"],
        ["FPS", f"{stats['fps']:.2f}"],
    ]
    if stats.get("naive_queries"):
        saved = stats["naive_queries"] / max(1, stats["track_queries"])
        rows.insert(4, ["saved by the occupancy grid", f"{saved:.1f}x"])
    return Table("throughput", ["", ""], rows)


def write_results(
    out: Path, reconstruction: Reconstruction, fps: float, title: str, table: Sequence[Sequence[str]] = ()
) -> list[Path]:
    """Writes every file that the command is documented to write into ``out``, with ``title`` and ``table`` on the page;
    returns them. Points that are not finite are left out of all but the .npz, and reported on stderr.

    Raises:
        OSError: a file cannot be written; those before it are complete.
    """
    r = reconstruction
    writers: dict[str, Callable[[Path], object]] = {
        "reconstruction.npz": r.save,
        "page.html": lambda path: write_page(path, r, title=title, table=table, fps=fps),
        "points.ply": lambda path: write_ply(path, r.points, r.point_colors),
        "colmap": lambda path: write_colmap(path, r),
        "depth.mp4": lambda path: write_depth_movie(path, r, fps),
        "depth.png": lambda path: write_depth_sheet(path, r),
        "tracks.mp4": lambda path: write_track_movie(path, r, fps),
    }
    if find_spec("rerun"):
        writers["recording.rrd"] = lambda path: write_rerun(path, r)
    with output_folder(out):
        for name, write in tqdm(writers.items(), "files", unit="file", disable=None):
            left_out = write(out / name)
            if left_out and name == "points.ply":
                print(f"{left_out:,} points are not finite and were left out", file=sys.stderr)
    return [out / name for name in writers]


def _slice(text: str) -> slice:
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(parts) not in (2, 3) or any(n is not None and n < (i == 2) for i, n in enumerate(numbers)):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--frames: wanted START:STOP or START:STOP:STEP, counted from 0, each may be left out, got {text!r}"
        ) from None
    return slice(*numbers)


def _sources(path: Path) -> np.ndarray:
    """Array `source` of an .npz file."""
    if not path.exists():
        raise FileNotFoundError(f"--tracks: wanted grid, all or an .npz file, and there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file)
            if "source" in names:
                return file["source"]
    except (ValueError, EOFError, OSError, TypeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise ValueError(f"--tracks: {path} is no .npz file, or broken: {error}") from error
    raise ValueError(f"--tracks: wanted an array named source in {path}, got {', '.join(names) or 'none'}")


def _load(weights: Path | None, device: torch.device) -> D4RT:
    if weights is None and not SHIPPED_WEIGHTS.exists():
        raise FileNotFoundError(f"wanted --weights: this copy of the package has none of its own ({SHIPPED_WEIGHTS})")
    if weights is not None and not weights.exists():
        raise FileNotFoundError(f"no such weights: {weights}")
    return D4RT.from_pretrained(weights or SHIPPED_WEIGHTS, device=device)
