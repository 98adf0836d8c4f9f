"""``fourdperf demo d4rt``: a clip reconstructed in 4-D by the small model of the package, without any download.

The clip is a synthetic scene that training never saw, so that every answer can be held against the truth; the model is
compared with its JAX reference on the way.
"""

import json
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

from fourdperf.cli import compare_d4rt
from fourdperf.cli.reconstruct import SHIPPED_WEIGHTS, read_video, throughput, write_results
from fourdperf.cli.report import Table, step
from fourdperf.data.files import write_text
from fourdperf.data.pictures import to_pixels
from fourdperf.data.scenes import Scene
from fourdperf.data.synthetic import scene_seed
from fourdperf.data.video import VideoReader, write_video
from fourdperf.models.d4rt import D4RT
from fourdperf.reconstruct import reconstruct
from fourdperf.train.baselines import training_averages
from fourdperf.train.evaluate_d4rt import evaluate_scenes

__all__ = ["d4rt"]

TOLERANCE = 1e-4
QUERIES = 2048
LONGEST = 48  # frames of a video
SHOWN = 256  # pixels of the clip for the eye; the model sees its own size
DENSER = 2  # points per pixel of the model and axis
FPS = 8.0
AVERAGED = 64  # training scenes in the baselines' averages
MEASURES = {
    "depth": {"abs_rel": "mean relative error of depth"},
    "tracks": {"EPE": "mean error of 3-D tracks", "APD": "share of track points that are close (APD)"},
    "poses": {"ATE": "error of camera positions (ATE)", "RPE_R": "error of camera turns, degrees (RPE-R)"},
    "focal": {"relative_error": "relative error of focal lengths"},
}
ABOUT = (
    "The model in the package is a small one, trained on synthetic rooms alone, at 64 x 64 pixels and 8 frames. It "
    "shows that everything works, from training to this page; of real videos it knows nothing."
)


def d4rt(
    video: Path | None = None,
    weights: Path | None = None,
    out: Path = Path("demo_out"),
    scene: int = 0,
    rounds: int = 3,
) -> int:
    """Reconstructs a clip in 4-D: depth, cameras, coloured points and the tracks of all its pixels, on a page to turn.

    Without --video the clip is a held-out synthetic scene, and its errors against the exact truth are shown beside
    those of baselines. Exits with 1 if a layer differs from the JAX reference by more than the tolerance.

    Args:
        video: A video file, an image, or a folder of images; by default a synthetic scene.
        weights: A folder with a D4RT model; by default the small one of the package.
        out: The folder for the results.
        scene: Which of the held-out scenes, from 0.
        rounds: Timed runs of PyTorch and of JAX; 0 skips the timing.
    """
    start = time.perf_counter()
    if scene < 0 or rounds < 0:
        raise ValueError(f"wanted --scene and --rounds of at least 0, got {scene} and {rounds}")
    synthetic = video is None
    frames = None if synthetic else _beginning(VideoReader(video, size=None))
    folder = weights or SHIPPED_WEIGHTS
    model = D4RT.from_pretrained(folder)
    out.mkdir(parents=True, exist_ok=True)
    if synthetic:
        seed, video = scene_seed("test", scene), out / "clip.mp4"
        rendered = Scene(seed, model.config.num_frames, (SHOWN, SHOWN)).render().video
        frames = to_pixels(rendered)
        write_video(video, frames, FPS)

    step(f"1/3 reconstruction of {video}")
    size = tuple(DENSER * n for n in model.config.image_size)
    found = reconstruct(model, frames, track="all", cloud_size=size, progress=True)
    tables = [throughput(found)]
    print(tables[0].text())

    step("2/3 the errors")
    if synthetic:
        tables.append(_errors(model, Scene(seed, model.config.num_frames, model.config.image_size)))
        print(tables[-1].text())
    else:
        print("skipped: nobody knows the truth about this video")

    step("3/3 the same weights in PyTorch and in JAX")
    compared = compare_d4rt.run(folder, video, QUERIES, 0, "both", TOLERANCE, rounds)
    for table in compared.tables():
        print(table.text(), end="\n\n")
    print(compared.verdict())
    worst = max(error.relative for error in compared.errors if error.dtype == "float32")
    speed = f", {compared.measured[1].median / compared.measured[0].median:.1f}x as fast" if compared.measured else ""
    parity = Table("JAX", ["", ""], [["against JAX, float32", f"largest relative error of a layer {worst:.1e}{speed}"]])

    rows = [row for table in (*tables, parity) for row in table.rows]
    title = f"Held-out synthetic scene {scene}" if synthetic else Path(video).name
    paths = write_results(out, found, FPS if synthetic else VideoReader(video, size=None).fps, title, rows)
    write_text(out / "compare.json", compared.json())
    write_text(out / "results.json", json.dumps({table.caption: list(table.rows) for table in tables}, indent=2) + "\n")
    print()
    print(textwrap.fill(ABOUT, 100))
    print(f"Done in {time.perf_counter() - start:.0f} s. Look at:")
    for path in paths:
        print(f"  {path}")
    return int(compared.first_failure is not None)


def _beginning(reader: VideoReader) -> np.ndarray:
    """The first frames: there are as many tracks as pixels."""
    frames = read_video(reader, slice(LONGEST + 1))
    if len(frames) > LONGEST:
        print(f"the first {LONGEST} frames of {reader.path}; fourdperf reconstruct takes all of them")
    return frames[:LONGEST]


def _errors(model: D4RT, scene: Scene) -> Table:
    """The model's errors on a scene, and below each those of the baselines."""
    config = model.config
    grid = tuple(max(1, n // 2) for n in config.image_size)
    train = [Scene(scene_seed("train", i), config.num_frames, config.image_size) for i in range(AVERAGED)]
    with torch.inference_mode():
        found = evaluate_scenes(model, [scene], training_averages(train, grid), grid)
    rows = []
    for task, measures in MEASURES.items():
        for measure, label in measures.items():
            rows.append([label, f"{found[task]['D4RT'][measure]:.3f}"])
            rows += [[f"- {name}", f"{row[measure]:.3f}"] for name, row in found[task].items() if name != "D4RT"]
    return Table("errors on this scene", ["", "D4RT - and baselines"], rows)
