"""``fourdperf features``: a model's features of a video, layer by layer, as arrays and as pictures.

The video is read twice, clip by clip: once for the features, which go straight to disk, and once for the pictures,
whose colours need the whole video's principal components.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, Dtype, load_scaling4d, pick_device
from fourdperf.cli.show import Panel, frames_shown, frames_with_clips, write_show
from fourdperf.data.files import NpyWriter, atomic_path, output_folder, write_text
from fourdperf.data.pictures import PcaColours, enlarge
from fourdperf.data.video import Fit, VideoReader
from fourdperf.models.scaling4d import Config, Scaling4D

__all__ = ["extract", "features", "parse_layers"]

Format = Literal["npy", "safetensors"]
Layer = int | str

PCA_SAMPLES = 8192
VIDEO_PANELS = 3


def features(
    video: Path,
    checkpoint: Path | None = None,
    variant: str = "B",
    seed: int = 0,
    layers: str = "0.95",
    out: Path | None = None,
    format: Format = "npy",
    stride: int | None = None,
    fit: Fit = "squash",
    dtype: Dtype = "float32",
    device: Device = "auto",
    allow_partial: bool = False,
) -> None:
    """Writes a model's features of a video to arrays and pictures.

    Args:
        video: A video file, an image, or a folder of images.
        checkpoint: A folder written by fourdperf convert, or a released .npz; without one the weights are random.
        variant: The size of the model with random weights.
        seed: The seed of the random weights.
        layers: all, a fraction of the depth as the readouts use it (0.95), or positions in the reference's list of
            features (3,7,11); position 0 is the tokens, i the state that goes into layer i-1; final is the state
            after the last layer.
        out: The folder for the results; by default <video>_features here.
        format: npy writes a file per layer, (clips, time, height, width, features); safetensors a file per clip with
            all layers, (time, height, width, features) each. Both float32.
        stride: Frames from one clip to the next; by default the clip's length.
        fit: squash changes the aspect ratio as the reference does; crop cuts out the centre.
        dtype: Number type of the computation.
        device: Where to compute.
        allow_partial: Go on with the frames that can be read of a video that is cut off.
    """
    where = pick_device(device)
    # The video comes first: it is the cheap one to find missing.
    reader = VideoReader(video, size=None)
    model, origin = load_scaling4d(checkpoint, variant, seed, getattr(torch, dtype), where)
    length, *size = model.config.video_size
    reader = VideoReader(video, length, stride, tuple(size), fit, allow_partial)
    chosen = parse_layers(layers, model.config)
    out = out or Path(f"{video.stem}_features")
    print(f"{video}: {reader.frames or '?'} frames of {reader.height}x{reader.width}, in clips of {length}")
    print(f"weights: {origin}")
    for path in extract(model, reader, chosen, out, format):
        print(f"wrote {path}")


def parse_layers(text: str, config: Config) -> list[Layer]:
    """Positions in the feature list that ``text`` asks for, as :func:`features` describes it.

    Raises:
        ValueError: it asks for nothing that exists.
    """
    last = config.num_layers
    if text == "all":
        return list(range(last + 1))
    wanted = f"wanted all, a fraction in (0, 1] with a point in it, or positions 0 to {last} or final, got {text!r}"
    try:
        if "." in text:
            depth = float(text)
            if not 0 < depth <= 1:
                raise ValueError
            return [(int((last + 1) * depth) - 1) % (last + 1)]
        chosen = [part if part == "final" else int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers: {wanted}") from None
    if any(layer != "final" and not 0 <= layer <= last for layer in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"--layers: {wanted}")
    return chosen


def layer_name(layer: Layer) -> str:
    """The name of a layer's file and array: layer_03, layer_final."""
    return f"layer_{layer}" if isinstance(layer, str) else f"layer_{layer:02d}"


def extract(
    model: Scaling4D, reader: VideoReader, layers: Sequence[Layer], out: Path, format: Format = "npy"
) -> list[Path]:
    """Writes the features of ``layers`` and their pictures to the folder ``out``; returns the files made.

    Raises:
        OSError: a file cannot be written.
        ValueError: the video breaks off, or does not fit the model.
    """
    names = [layer_name(layer) for layer in layers]
    with output_folder(out):
        files, clips = _write_features(model, reader, layers, names, out, format)
        index = {
            "video": str(reader.path),
            "fps": reader.fps,
            "frames_per_clip": reader.length,
            "stride": reader.stride,
            "grid": model.config.grid,
            "layers": list(layers),
            "clips": [{"start": start, "valid": valid} for start, valid in clips],
        }
        write_text(out / "index.json", json.dumps(index, indent=2) + "\n")
        pictures = _write_pictures(reader, names, clips, out, format)
    return [*files, out / "index.json", *pictures]


def _write_features(
    model: Scaling4D, reader: VideoReader, layers: Sequence[Layer], names: list[str], out: Path, format: Format
) -> tuple[list[Path], list[tuple[int, int]]]:
    """Returns the files, and each clip's (start, valid). The files get their names together, after the last clip."""
    clips, files = [], []
    with contextlib.ExitStack() as stack:
        if format == "npy":
            files = [out / f"{name}.npy" for name in names]
            writers = {name: stack.enter_context(NpyWriter(file)) for name, file in zip(names, files)}
        for clip in tqdm(reader, "features", total=len(reader) or None, unit="clip", disable=None):
            found = _encode(model, clip.frames, layers)
            if format == "npy":
                for name, feature in zip(names, found):
                    writers[name].append(feature[None].numpy())
            else:
                files.append(out / f"clip_{len(clips):05d}.safetensors")
                save_file(dict(zip(names, found)), stack.enter_context(atomic_path(files[-1])))
            clips.append((clip.start, clip.valid))
    return files, clips


@torch.inference_mode()
def _encode(model: Scaling4D, frames: torch.Tensor, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """Features of one clip (T, H, W, 3), each float32 (time, height, width, D) on the CPU."""
    parameter = next(model.parameters())
    found = model.encode(frames[None].to(parameter), layers=layers)
    return [feature[0].float().cpu().unflatten(0, model.config.grid).contiguous() for feature in found]


def _write_pictures(
    reader: VideoReader, names: list[str], clips: list[tuple[int, int]], out: Path, format: Format
) -> list[Path]:
    def load(k: int, name: str) -> np.ndarray:
        if format == "npy":
            return np.load(out / f"{name}.npy", mmap_mode="r")[k]
        with safe_open(out / f"clip_{k:05d}.safetensors", "np") as file:
            return file.get_tensor(name)

    frames_per_step = reader.length // len(load(0, names[0]))
    samples = PCA_SAMPLES // len(clips) + 1

    def fit(name: str) -> PcaColours:
        tokens = []
        for k, (_, valid) in enumerate(clips):
            feature = load(k, name)
            real = feature[: -(-valid // frames_per_step)].reshape(-1, feature.shape[-1])
            tokens.append(real[:: -(-len(real) // samples)])
        return PcaColours.fit(np.concatenate(tokens))

    colours = {name: fit(name) for name in names}

    def panels() -> Iterator[Panel]:
        current = -1
        for number, k, i, image in frames_with_clips(reader, clips, "pictures"):
            if k != current:
                current, coloured = k, {name: colours[name](load(k, name)) for name in names}
            step = min(i // frames_per_step, len(coloured[names[0]]) - 1)
            cells = {name: enlarge(pixels[step], *image.shape[:2]) for name, pixels in coloured.items()}
            yield number, {"input": image, **cells}

    spread = np.linspace(0, len(names) - 1, VIDEO_PANELS).round().astype(int)
    in_video = ["input", *(names[i] for i in dict.fromkeys(spread))]
    total = frames_shown(clips, reader.stride)
    return write_show(out / "features", panels(), total, reader.fps, in_video)
