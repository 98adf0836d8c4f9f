"""``fourdperf depth``: depth maps of a video from a 4DS model with a depth readout, as arrays and as pictures."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fourdperf.cli.checkpoints import Device, Dtype, load_scaling4d, pick_device
from fourdperf.cli.show import Panel, frames_shown, frames_with_clips, write_show
from fourdperf.data.files import NpyWriter, output_folder
from fourdperf.data.pictures import DepthColours, enlarge
from fourdperf.data.video import Fit, VideoReader
from fourdperf.models.scaling4d import Scaling4D

__all__ = ["depth", "predict"]

FIT_VALUES = 1_000_000


def depth(
    video: Path,
    checkpoint: Path | None = None,
    out: Path | None = None,
    stride: int | None = None,
    fit: Fit = "squash",
    dtype: Dtype = "float32",
    device: Device = "auto",
    allow_partial: bool = False,
) -> None:
    """Writes a model's depth maps of a video to an array and pictures.

    Each clip is predicted on its own, so depth may jump where one ends; where clips overlap, the mean is taken.

    Args:
        video: A video file, an image, or a folder of images.
        checkpoint: A folder written by fourdperf convert, or a released .npz, with a depth readout; required.
        out: The folder for the results; by default <video>_depth here.
        stride: Frames from one clip to the next, at most the clip's length, which is the default: no overlap.
        fit: squash changes the aspect ratio as the reference does; crop cuts out the centre.
        dtype: Number type of the computation.
        device: Where to compute.
        allow_partial: Go on with the frames that can be read of a video that is cut off.
    """
    where = pick_device(device)
    if checkpoint is None:
        raise ValueError("wanted --checkpoint, a folder or an .npz with a depth readout")
    # The video comes first: it is the cheap one to find missing.
    reader = VideoReader(video, size=None)
    model, origin = load_scaling4d(checkpoint, "", 0, getattr(torch, dtype), where)
    check_readout(model, checkpoint)
    length, *size = model.config.video_size
    reader = VideoReader(video, length, stride, tuple(size), fit, allow_partial)
    if reader.stride > length:
        raise ValueError(f"--stride: wanted at most the clip's length, {length}, got {reader.stride}")
    out = out or Path(f"{video.stem}_depth")
    print(f"{video}: {reader.frames or '?'} frames of {reader.height}x{reader.width}, in clips of {length}")
    print(f"weights: {origin}")
    for path in predict(model, reader, out):
        print(f"wrote {path}")


def check_readout(model: Scaling4D, checkpoint: Path) -> None:
    """Raises ValueError unless the model predicts one number per pixel of each frame."""
    readout = model.config.readout
    if readout is None:
        raise ValueError(f"{checkpoint}: wanted a checkpoint with a depth readout, got an encoder alone")
    if readout.output_shape is None or (*readout.output_shape, 1)[3] != 1:
        raise ValueError(
            f"{checkpoint}: wanted a depth readout, output_shape (frames, height, width) or (..., 1), "
            f"got {readout.output_shape}"
        )
    if readout.output_shape[0] != model.config.video_size[0]:
        raise ValueError(
            f"{checkpoint}: wanted a depth map for each of the {model.config.video_size[0]} frames of a clip, "
            f"got {readout.output_shape[0]}"
        )


@torch.inference_mode()
def predict(model: Scaling4D, reader: VideoReader, out: Path) -> list[Path]:
    """Writes depth.npy, float32 (frames, height, width), and its pictures to the folder ``out``; returns the files.

    Raises:
        OSError: a file cannot be written.
        ValueError: the video breaks off, or does not fit the model.
    """
    clips: list[tuple[int, int]] = []
    with output_folder(out):
        with NpyWriter(out / "depth.npy") as writer:
            for maps in _averaged(model, reader, clips):
                writer.append(maps)
        return [out / "depth.npy", *_write_pictures(reader, clips, out)]


def _averaged(model: Scaling4D, reader: VideoReader, clips: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The depth of the video's frames in order, float32 (n, H, W), each as soon as no later clip can hold it; fills
    ``clips`` with every clip's (start, valid)."""
    parameter = next(model.parameters())
    total = weight = None
    for clip in tqdm(reader, "depth", total=len(reader) or None, unit="clip", disable=None):
        if total is not None:
            yield total[: reader.stride] / weight[: reader.stride]
            total, weight = (np.concatenate([x[reader.stride :], 0 * x[: reader.stride]]) for x in (total, weight))
        found = model(clip.frames[None].to(parameter))[0, ..., 0].float().cpu().numpy()
        if total is None:
            total, weight = np.zeros_like(found), np.zeros((len(found), 1, 1), np.float32)
        total[: clip.valid] += found[: clip.valid]
        weight[: clip.valid] += 1
        clips.append((clip.start, clip.valid))
    yield total[: clip.valid] / weight[: clip.valid]


def _write_pictures(reader: VideoReader, clips: list[tuple[int, int]], out: Path) -> list[Path]:
    depth = np.load(out / "depth.npy", mmap_mode="r")
    colours = DepthColours.fit(depth.reshape(-1)[:: depth.size // FIT_VALUES + 1])

    def panels() -> Iterator[Panel]:
        for number, _, _, image in frames_with_clips(reader, clips, "pictures"):
            yield number, {"input": image, "depth": enlarge(colours(depth[number]), *image.shape[:2])}

    total = frames_shown(clips, reader.stride)
    return write_show(out / "depth", panels(), total, reader.fps, ["input", "depth"], colours.legend(488))
