"""``fourdperf demo scaling4d``: 4DS end to end on a clip, without any download.

Makes a small checkpoint in the released layout, converts it, compares PyTorch with JAX layer by layer, writes features
and depth with their pictures, and gathers everything on one page.
"""

import textwrap
import time
from pathlib import Path

import torch

from fourdperf.cli import compare_scaling4d
from fourdperf.cli.convert import convert
from fourdperf.cli.depth import check_readout, predict
from fourdperf.cli.features import extract
from fourdperf.cli.report import Picture, Text, page, step
from fourdperf.data.demo_clip import demo_clip
from fourdperf.data.files import write_text
from fourdperf.data.video import VideoReader, write_video
from fourdperf.models.scaling4d import Scaling4D

__all__ = ["scaling4d"]

TOLERANCE = 1e-4
FEATURE_ROWS = 5

ABOUT_WEIGHTS = (
    "The weights are random, except for the last layer of the depth readout, which is fitted to the demo clip: no "
    "released weights come with the package. The comparison does not depend on that; what the pictures mean does. "
    "fourdperf demo scaling4d --checkpoint scaling4d_dist_b_depth.npz runs the same on real weights."
)
ABOUT_CLIP = (
    "The clip is made from two photographs that ship with scikit-learn, with a moving camera and a moving flower."
)


def scaling4d(
    video: Path | None = None,
    checkpoint: Path | None = None,
    out: Path = Path("demo_out"),
    rounds: int = 3,
    seed: int = 0,
) -> int:
    """Runs 4DS end to end: converts a checkpoint, compares PyTorch with JAX, and pictures features and depth.

    Exits with 1 if a layer is out of tolerance; the pictures are made all the same.

    Args:
        video: A video file, an image, or a folder of images; by default a clip made from photographs.
        checkpoint: A released .npz, or a folder written by fourdperf convert; by default a small random model is made.
        out: The folder for the results.
        rounds: Timed runs of each side in the comparison; 0 skips the timing.
        seed: The seed of the random weights.
    """
    start = time.perf_counter()
    about = []
    if video is not None:
        VideoReader(video, size=None)
    out.mkdir(parents=True, exist_ok=True)
    if video is None:
        video = out / "clip.mp4"
        write_video(video, demo_clip()[0])
        about.append(ABOUT_CLIP)

    step("1/4 checkpoint")
    if checkpoint is None:
        from fourdperf.cli.demo_weights import write_demo_checkpoint

        checkpoint = out / "scaling4d_demo_depth.npz"
        write_demo_checkpoint(checkpoint, seed)
        about.append(ABOUT_WEIGHTS)
    if checkpoint.is_dir():
        folder, npz = checkpoint, out / "checkpoint.npz"
        convert(folder, npz)
    else:
        folder, npz = out / "checkpoint", checkpoint
        convert(npz, folder)

    step("2/4 the same weights in PyTorch and in JAX")
    compared = compare_scaling4d.run(folder, npz, video, "both", TOLERANCE, rounds)
    for table in compared.tables():
        print(table.text(), end="\n\n")
    print(compared.verdict())
    write_text(out / "compare.json", compared.json())

    step("3/4 features")
    model = Scaling4D.from_pretrained(folder, dtype=torch.float32)
    length, *size = model.config.video_size
    reader = VideoReader(video, length, None, tuple(size))
    last = model.config.num_layers
    layers = sorted({round(i * last / (FEATURE_ROWS - 1)) for i in range(FEATURE_ROWS)})
    extract(model, reader, layers, out / "features")
    pictures = [
        Picture(out / "features" / "features.webp", "Features by layer, coloured by their principal components"),
        Picture(out / "features" / "features.png", "The same over the whole video"),
    ]

    step("4/4 depth")
    if model.config.readout is None:
        print("skipped: the checkpoint has no readout")
    else:
        check_readout(model, checkpoint)
        predict(model, reader, out / "depth")
        pictures += [
            Picture(out / "depth" / "depth.webp", "Depth: small in blue, large in red"),
            Picture(out / "depth" / "depth.png", "The same over the whole video"),
        ]

    text = [Text(paragraph) for paragraph in about]
    source = Text(f"Video: {video}. Model: {compared.model}.")
    parts = [source, *text, *pictures, Text("PyTorch against JAX", 2), *compared.tables(), Text(compared.verdict())]
    write_text(out / "index.html", page("fourdperf demo: Scaling 4D Representations", parts))

    print()
    for paragraph in about:
        print(textwrap.fill(paragraph, 100))
    print(f"\n{compared.verdict()}\nDone in {time.perf_counter() - start:.0f} s. Look at:")
    for path in (out / "index.html", *(picture.path for picture in pictures)):
        print(f"  {path}")
    return int(compared.first_failure is not None)
