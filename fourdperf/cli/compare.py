"""``fourdperf compare``: the same weights in PyTorch and in the Flax reference, on the same clip of a video."""

from pathlib import Path

from fourdperf.cli.comparison import Dtypes, show
from fourdperf.data.video import Fit, VideoReader

__all__ = ["compare", "d4rt", "scaling4d"]


def scaling4d(
    video: Path | None = None,
    checkpoint: Path | None = None,
    variant: str = "B",
    seed: int = 0,
    dtype: Dtypes = "both",
    tolerance: float = 1e-4,
    rounds: int = 5,
    fit: Fit = "squash",
    json: Path | None = None,
    html: Path | None = None,
) -> int:
    """Compares 4DS with its JAX reference on the CPU: error of every layer, time, peak memory.

    Exits with 1, naming the first layer that differs, if a layer is out of tolerance.

    Args:
        video: A video file, an image, or a folder of images, of which the first clip is used; required.
        checkpoint: A folder written by fourdperf convert, or a released .npz; without one the weights are random.
        variant: The size of the model with random weights.
        seed: The seed of the random weights.
        dtype: Number types to compare.
        tolerance: Largest max|difference| / max|reference| of a layer in float32.
        rounds: Timed runs of each side; 0 skips the timing.
        fit: squash changes the aspect ratio as the reference does; crop cuts out the centre.
        json: Also write the numbers to this file.
        html: Also write the tables to this page.
    """
    from fourdperf.cli.compare_scaling4d import run, weights_on_disk

    _readable(video)
    with weights_on_disk(checkpoint, variant, seed) as (folder, npz):
        return show(run(folder, npz, video, dtype, tolerance, rounds, fit), json, html)


def d4rt(
    video: Path | None = None,
    checkpoint: Path | None = None,
    num_queries: int = 2048,
    seed: int = 0,
    dtype: Dtypes = "both",
    tolerance: float = 1e-4,
    rounds: int = 5,
    json: Path | None = None,
    html: Path | None = None,
) -> int:
    """Compares D4RT with its JAX reference on the CPU: error of every layer, time, peak memory.

    Exits with 1, naming the first layer that differs, if a layer is out of tolerance.

    Args:
        video: A video file, an image, or a folder of images, of which the first clip is used; required.
        checkpoint: A model's folder; by default the small model of this package.
        num_queries: Random queries about the clip.
        seed: The seed of the queries.
        dtype: Number types to compare.
        tolerance: Largest max|difference| / max|reference| of a layer in float32.
        rounds: Timed runs of each side; 0 skips the timing.
        json: Also write the numbers to this file.
        html: Also write the tables to this page.
    """
    from fourdperf.cli.compare_d4rt import run
    from fourdperf.cli.reconstruct import SHIPPED_WEIGHTS

    _readable(video)
    if num_queries < 1:
        raise ValueError(f"--num_queries: wanted at least 1, got {num_queries}")
    return show(run(checkpoint or SHIPPED_WEIGHTS, video, num_queries, seed, dtype, tolerance, rounds), json, html)


compare = {"scaling4d": scaling4d, "d4rt": d4rt}


def _readable(video: Path | None) -> None:
    if video is None:
        raise ValueError("wanted --video, a video file, an image or a folder of images")
    VideoReader(video, size=None)
