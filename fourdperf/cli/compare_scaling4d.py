"""4DS in PyTorch and in Flax on the same clip, for :mod:`fourdperf.cli.compare`."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fourdperf.cli.checkpoints import load_scaling4d
from fourdperf.cli.comparison import Comparison, Dtypes, Sides, compare_sides
from fourdperf.cli.measure import Job
from fourdperf.convert import scaling4d as converter
from fourdperf.convert.npz import open_npz
from fourdperf.data.video import Fit, VideoReader
from fourdperf.models.checkpoint import read_config
from fourdperf.models.scaling4d import FINAL, MODEL, Config, Scaling4D

__all__ = ["run", "weights_on_disk"]


@contextlib.contextmanager
def weights_on_disk(checkpoint: Path | None, variant: str, seed: int) -> Iterator[tuple[Path, Path]]:
    """The same weights twice: a folder for PyTorch and an .npz for JAX. What was not given is made for the time."""
    with tempfile.TemporaryDirectory(prefix="fourdperf-") as temporary:
        folder, npz = Path(temporary, "checkpoint"), Path(temporary, "checkpoint.npz")
        if checkpoint is None:
            model, _ = load_scaling4d(None, variant, seed, torch.float32, torch.device("cpu"))
            model.save_pretrained(folder)
            checkpoint = folder
        if not checkpoint.exists():
            raise FileNotFoundError(f"no such checkpoint: {checkpoint}")
        if checkpoint.is_dir():
            converter.export(checkpoint, npz)
            yield checkpoint, npz
        else:
            converter.convert(checkpoint, folder)
            yield folder, checkpoint


def run(
    folder: Path, npz: Path, video: Path, dtype: Dtypes, tolerance: float, rounds: int, fit: Fit = "squash"
) -> Comparison:
    """Compares the PyTorch model in ``folder`` with the JAX model in ``npz`` on the first clip of ``video``.

    Raises:
        OSError, ValueError: a file is missing or cannot be read as what it should be.
        ImportError: JAX or Flax is not installed.
    """
    config = Config.from_dict(read_config(folder, MODEL))
    length, *size = config.video_size
    clip = next(iter(VideoReader(video, length, None, tuple(size), fit))).frames[None].numpy()
    sides = Sides(
        ours=lambda name: torch_taps(folder, clip, name),
        reference=lambda name: jax_taps(config, npz, clip, name),
        jobs=lambda name: [
            Job(f"PyTorch {name}", Scaling4D.__module__, torch_job, (folder, clip, name)),
            Job(f"JAX jit {name}", "fourdperf.jax.models.scaling4d", jax_job, (config, npz, clip, name)),
        ],
    )
    return compare_sides(_name(config), str(video), clip.shape, sides, dtype, tolerance, rounds)


@torch.inference_mode()
def torch_taps(folder: Path, clip: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Every layer's output, the last layer's included, which a model without taps need not run; all float32."""
    model = Scaling4D.from_pretrained(folder, dtype=getattr(torch, dtype))
    video = torch.from_numpy(clip).to(next(model.parameters()))
    taps: dict[str, torch.Tensor] = {}
    model.encode(video, layers=[FINAL], taps=taps)
    if model.config.readout:
        model(video, taps=taps)
    return {name: tap.float().numpy() for name, tap in taps.items()}


def jax_taps(config: Config, npz: Path, clip: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The same from the Flax reference, under jit."""
    import jax

    model, variables, video = _flax(config, npz, clip, dtype)

    @jax.jit
    def taps_of(variables, video):
        taps: dict[str, jax.Array] = {}
        model.apply(variables, video, layers=[FINAL], taps=taps, method="encode")
        if config.readout:
            model.apply(variables, video, taps)
        return taps

    return {name: np.asarray(tap, np.float32) for name, tap in taps_of(variables, video).items()}


def torch_job(folder: Path, clip: np.ndarray, dtype: str) -> Callable[[], None]:
    """Loads the PyTorch model; the function runs it once."""
    model = Scaling4D.from_pretrained(folder, dtype=getattr(torch, dtype))
    video = torch.from_numpy(clip).to(next(model.parameters()))
    return torch.inference_mode()(lambda: model(video))


def jax_job(config: Config, npz: Path, clip: np.ndarray, dtype: str) -> Callable[[], None]:
    """Loads the Flax model under jit; the function runs it once."""
    import jax

    model, variables, video = _flax(config, npz, clip, dtype)
    forward = jax.jit(model.apply)
    return lambda: forward(variables, video).block_until_ready()


def _flax(config: Config, npz: Path, clip: np.ndarray, dtype: str):
    """The Flax model, its variables and the clip, all in ``dtype``."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from fourdperf.jax.models.scaling4d import Scaling4D as Reference

    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    with open_npz(npz) as arrays:
        flat = {name.removeprefix("params/"): jnp.asarray(arrays.read(name), dtype) for name in arrays.shapes}
    variables = {"params": unflatten_dict(flat, sep="/")}
    return Reference(config, jnp.dtype(dtype)), variables, jnp.asarray(clip, dtype)


def _name(config: Config) -> str:
    size = config.variant or f"{config.num_layers} layers of {config.hidden_size}"
    return f"4DS-{size}" + (" with readout" if config.readout else "")
