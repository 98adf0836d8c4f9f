"""D4RT in PyTorch and in Flax on the same clip and queries, for :mod:`fourdperf.cli.compare`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fourdperf.cli.comparison import Comparison, Dtypes, Sides, compare_sides
from fourdperf.cli.measure import Job
from fourdperf.data.queries import Queries
from fourdperf.data.video import VideoReader
from fourdperf.models.checkpoint import read_config
from fourdperf.models.d4rt import D4RT, MODEL, Config

__all__ = ["run"]

Inputs = tuple[np.ndarray, ...]
"""The clip (1, T, H, W, 3) float32, its aspect ratio (1,), and uv, t_src, t_tgt, t_cam of the queries."""


def run(
    folder: Path, video: Path, num_queries: int, seed: int, dtype: Dtypes, tolerance: float, rounds: int
) -> Comparison:
    """Compares the model in ``folder`` on both sides, on the first clip of ``video`` and random queries.

    Raises:
        OSError, ValueError: a file is missing or cannot be read as what it should be.
        ImportError: JAX or Flax is not installed.
    """
    config = Config.from_dict(read_config(folder, MODEL))
    reader = VideoReader(video, config.num_frames, None, config.image_size)
    clip = next(iter(reader)).frames[None].numpy()
    random = np.random.default_rng(seed)
    uv = random.random((1, num_queries, 2), np.float32)
    times = random.integers(clip.shape[1], size=(3, 1, num_queries))
    inputs = (clip, np.full(1, reader.width / reader.height, np.float32), uv, *times)
    sides = Sides(
        ours=lambda name: torch_taps(folder, inputs, name),
        reference=lambda name: jax_taps(folder, inputs, name),
        jobs=lambda name: [
            Job(f"PyTorch {name}", D4RT.__module__, torch_job, (folder, inputs, name)),
            Job(f"JAX jit {name}", "fourdperf.jax.models.d4rt", jax_job, (folder, inputs, name)),
        ],
    )
    title = f"D4RT, {config.num_layers} layers of {config.hidden_size}, {num_queries} queries"
    return compare_sides(title, str(video), clip.shape, sides, dtype, tolerance, rounds)


@torch.inference_mode()
def torch_taps(folder: Path, inputs: Inputs, dtype: str) -> dict[str, np.ndarray]:
    """Every layer's output; all float32."""
    model, video, ratio, queries = _torch(folder, inputs, dtype)
    taps: dict[str, torch.Tensor] = {}
    model(video, queries, ratio, taps=taps)
    return {name: tap.float().numpy() for name, tap in taps.items()}


def jax_taps(folder: Path, inputs: Inputs, dtype: str) -> dict[str, np.ndarray]:
    """The same from the Flax reference, under jit."""
    import jax

    model, variables, video, ratio, queries = _flax(folder, inputs, dtype)

    @jax.jit
    def taps_of(variables, video, queries, ratio):
        taps: dict[str, jax.Array] = {}
        model.apply(variables, video, queries, ratio, taps=taps)
        return taps

    return {name: np.asarray(tap, np.float32) for name, tap in taps_of(variables, video, queries, ratio).items()}


def torch_job(folder: Path, inputs: Inputs, dtype: str) -> Callable[[], object]:
    """Loads the PyTorch model; the function encodes the clip and answers the queries once."""
    model, video, ratio, queries = _torch(folder, inputs, dtype)
    return torch.inference_mode()(lambda: model(video, queries, ratio))


def jax_job(folder: Path, inputs: Inputs, dtype: str) -> Callable[[], object]:
    """Loads the Flax model under jit; the function does the same."""
    import jax

    model, variables, video, ratio, queries = _flax(folder, inputs, dtype)
    forward = jax.jit(model.apply)
    return lambda: jax.block_until_ready(forward(variables, video, queries, ratio))


def _torch(folder: Path, inputs: Inputs, dtype: str):
    video, ratio, *queries = map(torch.from_numpy, inputs)
    model = D4RT.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model, video.to(model.head.weight), ratio.to(model.head.weight), Queries(*queries)


def _flax(folder: Path, inputs: Inputs, dtype: str):
    import jax
    import jax.numpy as jnp

    from fourdperf.jax.models.d4rt import from_pretrained

    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    model, variables = from_pretrained(folder, dtype)
    video, ratio, *queries = map(jnp.asarray, inputs)
    return model, variables, video.astype(dtype), ratio.astype(dtype), Queries(*queries)
