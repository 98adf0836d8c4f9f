"""``fourdperf compare``: the same weights in PyTorch and in the Flax reference, on the same clip of a video.

First every layer's output is compared, once, with taps on. Then each side is timed without taps in a process of its own
(:mod:`fourdperf.cli.measure`), in turn with the other, and its peak memory read.

Both sides run on the CPU. The bounds: in float32, max|difference| / max|reference| of each layer is at most the
tolerance. In bfloat16 the reference is JAX in float32, and our error may be at most twice the error that JAX itself
makes in bfloat16.
"""

import contextlib
import json as json_module
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from fourdperf.cli.checkpoints import load_scaling4d
from fourdperf.cli.measure import Job, Measured, measure
from fourdperf.cli.report import Table, Text, page
from fourdperf.convert import scaling4d as converter
from fourdperf.convert.npz import open_npz
from fourdperf.data.files import write_text
from fourdperf.data.video import Fit, VideoReader
from fourdperf.models.scaling4d import FINAL, Config, Scaling4D

__all__ = ["Comparison", "compare", "run"]

BF16_FACTOR = 2

Dtypes = Literal["float32", "bfloat16", "both"]


def compare(
    model: Literal["scaling4d"],
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
    """Compares a model with its JAX reference on the CPU: error of every layer, time, peak memory.

    Exits with 1, naming the first layer that differs, if a layer is out of tolerance.

    Args:
        model: The model.
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
    if video is None:
        raise ValueError("wanted --video, a video file, an image or a folder of images")
    VideoReader(video, size=None)
    with weights_on_disk(checkpoint, variant, seed) as (folder, npz):
        result = run(folder, npz, video, dtype, tolerance, rounds, fit)
    for table in result.tables():
        print(table.text(), end="\n\n")
    print(result.verdict())
    if json:
        write_text(json, result.json())
    if html:
        write_text(html, page("fourdperf compare", [*result.tables(), Text(result.verdict())]))
    if result.first_failure:
        print(f"fourdperf compare: {result.verdict()}", file=sys.stderr)
    return int(result.first_failure is not None)


@dataclass(frozen=True)
class Error:
    """How far one layer of one dtype is from the reference, and how far it may be."""

    layer: str
    dtype: str
    max_abs: float
    relative: float
    cosine: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.bound


@dataclass(frozen=True)
class Comparison:
    """All that was found; ``measured`` is empty where nothing was timed."""

    model: str
    video: str
    clip: tuple[int, ...]
    errors: list[Error]
    measured: list[Measured]
    versions: dict[str, str]

    @property
    def first_failure(self) -> Error | None:
        """The first layer out of tolerance, in the order of the computation."""
        return next((error for error in self.errors if not error.passed), None)

    def verdict(self) -> str:
        """One sentence."""
        failed = self.first_failure
        if failed is None:
            return f"All {len(self.errors)} layer outputs are within tolerance."
        return (
            f"{failed.layer} in {failed.dtype} is the first layer out of tolerance: "
            f"relative error {failed.relative:.3g}, wanted at most {failed.bound:.3g}"
        )

    def tables(self) -> list[Table]:
        """A table of errors per dtype, and one of time and memory."""
        tables = []
        for dtype in dict.fromkeys(error.dtype for error in self.errors):
            reference = "JAX" if dtype == "float32" else "JAX in float32; bound: twice JAX's own error in bfloat16"
            rows = [
                (
                    e.layer,
                    f"{e.max_abs:.2e}",
                    f"{e.relative:.2e}",
                    f"{e.cosine:.2e}",
                    f"{e.bound:.2e}",
                    "ok" if e.passed else "OUT",
                )
                for e in self.errors
                if e.dtype == dtype
            ]
            columns = ("layer", "max abs", "relative", "1 - cosine", "bound", "")
            tables.append(Table(f"{self.model}, {dtype}: error against {reference}", columns, rows))
        if self.measured:
            tables.append(self._timing())
        return tables

    def _timing(self) -> Table:
        medians = {m.name: m.median for m in self.measured}
        rows = [
            (
                m.name,
                f"{m.median * 1e3:.1f} ms",
                f"{min(m.seconds) * 1e3:.1f} - {max(m.seconds) * 1e3:.1f}",
                f"{medians['JAX jit ' + m.name.split()[-1]] / m.median:.2f}x",
                f"{m.peak_bytes / 2**20:.0f} MiB",
            )
            for m in self.measured
        ]
        caption = (
            f"{self.model} on {'x'.join(map(str, self.clip[1:4]))}, batch {self.clip[0]}: "
            f"median of {len(self.measured[0].seconds)} runs in turn; {self.versions['machine']}; "
            "memory beyond the imported libraries, compilation included"
        )
        return Table(caption, ("", "time", "range", "JAX / this", "peak memory"), rows)

    def json(self) -> str:
        """Every number, as JSON."""
        return json_module.dumps(asdict(self) | {"passed": self.first_failure is None}, indent=2) + "\n"


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
    model = Scaling4D.from_pretrained(folder, dtype=torch.float32)
    length, *size = model.config.video_size
    clip = next(iter(VideoReader(video, length, None, tuple(size), fit))).frames[None].numpy()
    dtypes = ("float32", "bfloat16") if dtype == "both" else (dtype,)

    config, errors = model.config, []
    with tqdm(total=1 + 2 * len(dtypes), desc="layers", disable=None) as progress:
        reference = jax_taps(config, npz, clip, "float32")
        progress.update()
        if "float32" in dtypes:
            errors += differences(reference, torch_taps(model, clip), "float32", lambda layer: tolerance)
            progress.update(2)
        if "bfloat16" in dtypes:
            jaxs = {e.layer: e.relative for e in differences(reference, jax_taps(config, npz, clip, "bfloat16"))}
            progress.update()
            ours = torch_taps(model.to(torch.bfloat16), clip)
            errors += differences(reference, ours, "bfloat16", lambda layer: BF16_FACTOR * jaxs[layer])
            progress.update()
    del model, reference

    measured = []
    for name in dtypes if rounds else ():
        jobs = [
            Job(f"PyTorch {name}", Scaling4D.__module__, torch_job, (folder, clip, name)),
            Job(f"JAX jit {name}", "fourdperf.jax.models.scaling4d", jax_job, (config, npz, clip, name)),
        ]
        measured += measure(jobs, rounds)
    return Comparison(_name(config), str(video), clip.shape, errors, measured, _versions())


def differences(
    reference: dict[str, np.ndarray],
    ours: dict[str, np.ndarray],
    dtype: str = "",
    bound: Callable[[str], float] = lambda layer: np.inf,
) -> list[Error]:
    """The error of each layer of ``ours``, in its order.

    Raises:
        ValueError: the two sides tapped different layers, or a layer's shapes differ.
    """
    if ours.keys() != reference.keys():
        raise ValueError(f"the two sides differ in their layers: {sorted(ours.keys() ^ reference.keys())}")
    return [_difference(layer, reference[layer], x, dtype, bound(layer)) for layer, x in ours.items()]


def _difference(layer: str, reference: np.ndarray, x: np.ndarray, dtype: str, bound: float) -> Error:
    if x.shape != reference.shape:
        raise ValueError(f"{layer}: PyTorch gives {x.shape}, JAX {reference.shape}")
    a, b = reference.astype(np.float64).ravel(), x.astype(np.float64).ravel()
    max_abs, scale = np.abs(a - b).max(), np.abs(a).max()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return Error(
        layer,
        dtype,
        max_abs=float(max_abs),
        relative=float(max_abs / scale) if max_abs else 0.0,
        cosine=float(1 - a @ b / norms) if norms else 0.0,
        bound=bound,
    )


@torch.inference_mode()
def torch_taps(model: Scaling4D, clip: np.ndarray) -> dict[str, np.ndarray]:
    """Every layer's output, the last layer's included, which a model without taps need not run; all float32."""
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


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "jax", "flax", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found | {"machine": f"{platform.machine()}, {cores} cores"}
