"""``fourdperf convert``: a released checkpoint to a folder of ours, or back."""

import json
import math
import time
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from fourdperf.cli.measure import peak_memory
from fourdperf.cli.report import Table
from fourdperf.convert import scaling4d as converter
from fourdperf.models.checkpoint import CONFIG, WEIGHTS
from fourdperf.models.scaling4d import Config

__all__ = ["convert"]

CONVERTERS = {"scaling4d": converter}


def convert(source: Path, target: Path, model: Literal["scaling4d"] | None = None, arrays: bool = False) -> None:
    """Converts a released .npz to a folder with safetensors and config, or such a folder back to an .npz.

    Args:
        source: The .npz, or the folder.
        target: The folder, or the .npz.
        model: The kind of model; by default what the folder says, and scaling4d for an .npz.
        arrays: List every array with its shape.
    """
    if not source.exists():
        raise FileNotFoundError(f"no such checkpoint: {source}")
    back = source.is_dir()
    kind = model or (_kind(source) if back else "scaling4d")
    if back and target.suffix != ".npz":
        raise ValueError(f"{source} is a folder: wanted a target that ends in .npz, got {target}")
    if not back and target.exists() and not target.is_dir():
        raise ValueError(f"wanted a folder as the target, got the file {target}")
    start = time.perf_counter()
    if back:
        CONVERTERS[kind].export(source, target)
    else:
        CONVERTERS[kind].convert(source, target)
    seconds = time.perf_counter() - start
    folder = source if back else target
    print(_describe(folder, arrays))
    print(f"wrote {target} in {seconds:.1f} s; peak memory of the process {peak_memory() / 2**20:.0f} MiB")


def _kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / CONFIG).read_text()).get("model")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{folder}: wanted a folder with {CONFIG} and {WEIGHTS}") from None
    if kind not in CONVERTERS:
        raise ValueError(f"{folder / CONFIG}: wanted a model out of {', '.join(CONVERTERS)}, got {kind!r}")
    return kind


def _describe(folder: Path, arrays: bool) -> str:
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        rows = [(name, "x".join(map(str, part.get_shape())), part.get_dtype()) for name, part in slices.items()]
        parameters = sum(math.prod(part.get_shape()) for part in slices.values())
    config = Config.from_dict({k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if k != "model"})
    readout = config.readout
    lines = {
        "variant": f"{config.variant or 'custom'}" + (" with readout" if readout else ""),
        "parameters": f"{parameters:,} in {len(rows)} arrays",
        "encoder": f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads",
        "video": f"{_by(config.video_size)} with {config.channels} channels, patches of {_by(config.patch_size)}",
    }
    if readout:
        lines["readout"] = f"width {readout.num_params}, {readout.num_heads} heads, {readout.num_queries} queries"
        lines["output"] = _by(readout.output_shape or (readout.num_queries, readout.num_classes))
    text = "\n".join(f"{name:<12}{line}" for name, line in lines.items())
    if arrays:
        text += "\n\n" + Table("arrays", ("name", "shape", "dtype"), rows).text()
    return text


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
