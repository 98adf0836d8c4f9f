"""The pictures of a command that goes through a video: an MP4, an animated WebP for browsers, and a contact sheet."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fourdperf.data.pictures import enlarge, label, side_by_side, stack
from fourdperf.data.video import VideoReader, write_animation, write_png, write_video

__all__ = ["Panel", "frames_shown", "frames_with_clips", "write_show"]

Panel = tuple[int, dict[str, np.ndarray]]
"""A frame's number, and its images of one size by their names."""

SHEET_COLUMNS = 8
SHEET_WIDTH = 120
PREVIEW_FRAMES = 64


def frames_with_clips(
    reader: VideoReader, clips: Sequence[tuple[int, int]], what: str
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Each frame of a video once, with the clip that shows it: (number in the video, position of its clip in
    ``clips``, position in the clip, image uint8 (H, W, 3)). Where clips overlap, the later one shows the frame.

    ``clips`` holds (start, valid) of every clip that ``reader`` gives; ``what`` is written before the progress bar.
    """
    for k, clip in enumerate(tqdm(reader, what, total=len(clips), unit="clip", disable=None)):
        for i in range(_shown(k, clips, reader.stride)):
            yield clip.start + i, k, i, np.rint(clip.frames[i].numpy() * 255).astype(np.uint8)


def frames_shown(clips: Sequence[tuple[int, int]], stride: int) -> int:
    """How many frames :func:`frames_with_clips` gives."""
    return sum(_shown(k, clips, stride) for k in range(len(clips)))


def _shown(k: int, clips: Sequence[tuple[int, int]], stride: int) -> int:
    valid = clips[k][1]
    return valid if k == len(clips) - 1 else min(valid, stride)


def write_show(
    path: Path,
    panels: Iterable[Panel],
    total: int,
    fps: float,
    in_video: Sequence[str],
    legend: np.ndarray | None = None,
) -> list[Path]:
    """Writes ``path`` with the suffixes .mp4, .webp (the first frames only) and .png (a contact sheet).

    Args:
        path: where to, without a suffix.
        panels: the frames, taken one by one.
        total: how many there will be.
        fps: frames per second.
        in_video: the images that the video shows, side by side; the sheet has all of them, a row for each.
        legend: an image to put under the sheet.
    """
    columns = set(np.linspace(0, total - 1, min(total, SHEET_COLUMNS)).round().astype(int))
    sheet: list[np.ndarray] = []
    preview: list[np.ndarray] = []

    def shown() -> Iterator[np.ndarray]:
        for i, (number, images) in enumerate(panels):
            if i in columns:
                sheet.append(_column(number, images, with_names=not sheet))
            frame = side_by_side([label(images[name], name) for name in in_video])
            if i < PREVIEW_FRAMES:
                preview.append(frame)
            yield frame

    files = [path.with_suffix(suffix) for suffix in (".mp4", ".webp", ".png")]
    write_video(files[0], shown(), fps)
    write_animation(files[1], preview, fps)
    picture = side_by_side(sheet)
    write_png(files[2], picture if legend is None else stack([picture, legend]))
    return files


def _column(number: int, images: dict[str, np.ndarray], with_names: bool) -> np.ndarray:
    cells = []
    for row, (name, image) in enumerate(images.items()):
        height = max(1, round(SHEET_WIDTH * image.shape[0] / image.shape[1]))
        text = f"frame {number}" if row == 0 else name if with_names else ""
        cells.append(label(enlarge(image, height, SHEET_WIDTH), text))
    return stack(cells)
