"""A PyTorch model against its JAX reference: error of every layer, time and memory, and the tables that show them.

First every layer's output is compared, once, with taps on. Then each side is timed without taps in a process of its own
(:mod:`fourdperf.cli.measure`), in turn with the other, and its peak memory read.

Both sides run on the CPU. The bounds: in float32, max|difference| / max|reference| of each layer is at most the
tolerance. In bfloat16 the reference is JAX in float32, and our error may be at most twice the error that JAX itself
makes in bfloat16.
"""

import json as json_module
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from fourdperf.cli.measure import Job, Measured, measure
from fourdperf.cli.report import Table, Text, page
from fourdperf.data.files import write_text

__all__ = ["Comparison", "Dtypes", "Sides", "compare_sides", "differences", "show"]

BF16_FACTOR = 2

Dtypes = Literal["float32", "bfloat16", "both"]
Taps = dict[str, np.ndarray]


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


@dataclass(frozen=True)
class Sides:
    """The same weights on both sides, each a function of the dtype's name.

    ours, reference: every layer's output by name, float32. jobs: what is timed, ours and then the reference's.
    """

    ours: Callable[[str], Taps]
    reference: Callable[[str], Taps]
    jobs: Callable[[str], list[Job]]


def compare_sides(
    model: str, video: str, clip: tuple[int, ...], sides: Sides, dtype: Dtypes, tolerance: float, rounds: int
) -> Comparison:
    """Compares the layers in the given dtypes, then times both sides `rounds` times; `clip` is the video's shape."""
    dtypes = ("float32", "bfloat16") if dtype == "both" else (dtype,)
    errors = []
    with tqdm(total=1 + 2 * len(dtypes), desc="layers", disable=None) as progress:
        reference = sides.reference("float32")
        progress.update()
        if "float32" in dtypes:
            errors += differences(reference, sides.ours("float32"), "float32", lambda layer: tolerance)
            progress.update(2)
        if "bfloat16" in dtypes:
            jaxs = {e.layer: e.relative for e in differences(reference, sides.reference("bfloat16"))}
            progress.update()
            errors += differences(
                reference, sides.ours("bfloat16"), "bfloat16", lambda layer: BF16_FACTOR * jaxs[layer]
            )
            progress.update()
    del reference
    measured = [m for name in (dtypes if rounds else ()) for m in measure(sides.jobs(name), rounds)]
    return Comparison(model, video, clip, errors, measured, _versions())


def show(result: Comparison, json: Path | None = None, html: Path | None = None) -> int:
    """Prints the tables, writes them where asked for, and returns the exit code: 1 if a layer is out of tolerance."""
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


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "jax", "flax", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found | {"machine": f"{platform.machine()}, {cores} cores"}
