"""Video in and out: clips of a fixed length, streamed from a file or a folder of images; MP4, WebP and PNG written.

Frames are resized as the 4DS reference demo does it: mediapy's ``resize_video``, that is Pillow's Lanczos, which is
Lanczos-3 with antialiasing, horizontally and then vertically, each pass rounded to 8 bits. The same numbers come out
here, bit for bit, from :func:`fourdperf.ops.resize`. (Pillow 13 takes the other order where that is cheaper, as for
upright videos, and then differs from earlier ones by a few levels of 255.)
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from fourdperf.data.files import atomic_path, write_bytes
from fourdperf.ops import resize

__all__ = ["Clip", "VideoReader", "resize_frame", "write_animation", "write_png", "write_video"]

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DEFAULT_FPS = 20.0

Fit = Literal["squash", "crop"]


@dataclass(frozen=True)
class Clip:
    """A stretch of a video: ``frames`` float32 (T, H, W, 3), RGB in [0, 1]. The first ``valid`` of them are the
    video's frames ``start``, ``start + 1``, ...; the others repeat the last one."""

    frames: torch.Tensor
    start: int
    valid: int


class VideoReader:
    """Iterates over a video in clips of ``length`` frames, reading it once from front to back, however long it is.

    Clip k starts at frame ``k * stride``. The last clip is the first one that reaches the end of the video; where the
    video ends inside it, its last frame is repeated and ``Clip.valid`` says how many frames are real.

    Grey pictures become RGB, and an alpha channel is dropped (the colours under it are kept).

    Args:
        path: a video file, an image, or a folder of images of one size, taken in the order of their names.
        length: frames in a clip.
        stride: frames from the start of one clip to the start of the next; ``length`` by default, so that clips
            neither overlap nor leave gaps.
        size: (height, width) of the frames given out; None leaves them as they are.
        fit: "squash" changes the aspect ratio to fill ``size``, as the reference does; "crop" cuts the largest
            centred part that has the right aspect ratio.
        allow_partial: give a warning, in place of an error, when frames that the file promises cannot be read.

    Attributes:
        frames: number of frames the file promises (a container's header may be wrong or silent: then 0).
        height, width: size of the frames in the file, pixels.
        fps: frames per second; 20, as in the reference's demo, for images and where the file does not say.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: what is there is no video, has no frame, breaks off early (raised when the end is reached), or an
            argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        length: int = 16,
        stride: int | None = None,
        size: tuple[int, int] | None = (224, 224),
        fit: Fit = "squash",
        allow_partial: bool = False,
    ):
        self.path = Path(path)
        self.length = length
        self.stride = length if stride is None else stride
        self.size = size
        self.fit = fit
        self.allow_partial = allow_partial
        if self.length < 1 or self.stride < 1:
            raise ValueError(f"length and stride must be at least 1, got {self.length} and {self.stride}")
        if fit not in ("squash", "crop"):
            raise ValueError(f"fit must be 'squash' or 'crop', got {fit!r}")
        if not self.path.exists():
            raise FileNotFoundError(f"no such video: {self.path}")

        self._images = self._list_images()
        self.fps = DEFAULT_FPS
        self.frames = len(self._images)
        if not self._images:
            capture = _open(self.path)
            self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            fps = capture.get(cv2.CAP_PROP_FPS)
            self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS
            capture.release()
        first = next(self._decode(), None)
        if first is None:
            raise ValueError(f"{self.path}: the video has no frame that can be read")
        self.height, self.width = first.shape[:2]

    def __len__(self) -> int:
        """Number of clips, if the file keeps its promise about the number of frames."""
        beyond_first = max(0, self.frames - self.length)
        clips = 1 + -(-beyond_first // self.stride)
        in_gap = (clips - 1) * self.stride >= self.frames > 0
        return clips - in_gap

    def __iter__(self) -> Iterator[Clip]:
        window: list[np.ndarray] = []
        start = skip = 0
        for frame in self.read():
            if len(window) == self.length:
                yield self._clip(window, start)
                window = window[self.stride :]
                skip = max(0, self.stride - self.length)
                start += self.stride
            if skip:
                skip -= 1
            else:
                window.append(frame)
        if window:
            yield self._clip(window, start)

    def read(self) -> Iterator[np.ndarray]:
        """Every frame in order, uint8 (H, W, 3), RGB, resized. Raises as the class says."""
        count = 0
        for frame in self._decode():
            if frame.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"{self.path}: frame {count} is {frame.shape[0]}x{frame.shape[1]}, "
                    f"the first one {self.height}x{self.width}; wanted frames of one size"
                )
            count += 1
            yield frame if self.size is None else resize_frame(frame, self.size, self.fit)
        self._check_count(count)

    def _check_count(self, count: int) -> None:
        # Some containers state only their duration, so that the promise can be a frame or two off in a sound file.
        missing = self.frames - count
        if missing <= max(1, self.frames // 50):
            return
        message = f"{self.path}: corrupt or cut off: wanted {self.frames} frames, as its header says, but read {count}"
        if not self.allow_partial:
            raise ValueError(f"{message} (allow_partial goes on with those)")
        warnings.warn(f"{message}; going on with those", stacklevel=3)

    def _clip(self, window: list[np.ndarray], start: int) -> Clip:
        frames = np.stack(window + [window[-1]] * (self.length - len(window)))
        return Clip(torch.from_numpy(frames).float() / 255, start, len(window))

    def _list_images(self) -> list[Path]:
        if self.path.is_file() and self.path.suffix.lower() not in IMAGE_SUFFIXES:
            return []
        if self.path.is_file():
            with _quiet():
                pictures = cv2.imcount(str(self.path))
            if pictures > 1:
                raise ValueError(f"{self.path}: wanted one image, or a video, got {pictures} pictures in an image file")
            return [self.path]
        images = sorted(p for p in self.path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"{self.path}: the folder holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return images

    def _decode(self) -> Iterator[np.ndarray]:
        if self._images:
            for path in self._images:
                yield _read_image(path)
            return
        capture = _open(self.path)
        try:
            while True:
                found, frame = capture.read()
                if not found:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB if frame.ndim == 2 else cv2.COLOR_BGR2RGB)
        finally:
            capture.release()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences FFmpeg and OpenCV, whose hundreds of complaints about one broken file would bury the error raised."""
    # FFmpeg's level is read once, by the first reader or writer of the process.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _open(path: Path) -> cv2.VideoCapture:
    with _quiet():
        capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        size = path.stat().st_size
        raise ValueError(f"{path}: wanted a video that OpenCV can read, got {size} bytes that it cannot")
    return capture


def _read_image(path: Path) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if content.size else None
    if image is None:
        raise ValueError(f"{path}: wanted an image that OpenCV can read, got {content.size} bytes that it cannot")
    return image


def resize_frame(frame: np.ndarray, size: tuple[int, int], fit: Fit = "squash") -> np.ndarray:
    """Resizes uint8 (H, W, 3) to uint8 (*size, 3) as Pillow's Lanczos does, bit for bit (see the module).

    ``fit="crop"`` first cuts the largest centred part with the aspect ratio of ``size``.
    """
    if fit == "crop":
        frame = _crop(frame, size)
    x = torch.from_numpy(np.ascontiguousarray(frame)).float()
    for axis in (1, 0):
        if x.shape[axis] != size[axis]:
            x = resize(x, (size[axis],), (axis,), method="lanczos3", antialias=True).round_().clamp_(0, 255)
    return x.to(torch.uint8).numpy()


def _crop(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - h) // 2, (width - w) // 2
    return frame[top : top + h, left : left + w]


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = DEFAULT_FPS) -> int:
    """Writes uint8 (H, W, 3) RGB frames of one size to an MP4 (MPEG-4 part 2) and returns their number. Frames are
    taken one by one; an odd height or width grows by one repeated row or column, which the codec needs.

    Raises:
        OSError: the file cannot be written, or could not be written whole (a full disk).
        ValueError: there is no frame, or frames differ in shape.
    """
    path = Path(path)
    writer, shape, count = None, None, 0
    with atomic_path(path) as temporary:
        temporary.touch()
        try:
            for frame in frames:
                shape = shape or frame.shape
                _check_frame(frame, shape, count)
                frame = _even(frame)
                if writer is None:
                    fourcc = cv2.VideoWriter_fourcc(*"mp4v")
                    with _quiet():
                        writer = cv2.VideoWriter(str(temporary), fourcc, fps, (frame.shape[1], frame.shape[0]))
                    if not writer.isOpened():
                        raise OSError(f"cannot write {path}: OpenCV opened no MP4 writer")
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                count += 1
        finally:
            if writer is not None:
                writer.release()
        if not count:
            raise ValueError(f"cannot write {path}: wanted at least one frame, got none")
        _check_written(temporary, path, count)
    return count


def _check_frame(frame: np.ndarray, shape: tuple[int, ...], index: int) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
        raise ValueError(
            f"frame {index}: wanted uint8 (H, W, 3), the same for all; got {frame.dtype} {frame.shape} after {shape}"
        )


def _even(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _check_written(temporary: Path, path: Path, count: int) -> None:
    # OpenCV's writer reports nothing, a full disk included; what it wrote must be read back.
    try:
        capture = _open(temporary)
        written = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
    except ValueError:
        written = 0
    if written != count:
        raise OSError(f"cannot write {path}: {written} of {count} frames arrived (is the disk full?)")


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 (H, W, 3) RGB to a PNG.

    Raises:
        OSError: the file cannot be written.
        ValueError: ``image`` is not uint8 (H, W, 3).
    """
    _check_frame(image, image.shape, 0)
    found, content = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not found:
        raise ValueError(f"cannot encode {path}: {image.shape}")
    write_bytes(path, content.tobytes())


def write_animation(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = DEFAULT_FPS) -> None:
    """Writes uint8 (H, W, 3) RGB frames to an endless animated WebP, which every browser shows (few show the MP4 of
    :func:`write_video`). All frames are held in memory: for short clips.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no frame, or frames differ in shape.
    """
    frames = list(frames)
    if not frames:
        raise ValueError(f"cannot write {path}: wanted at least one frame, got none")
    for index, frame in enumerate(frames):
        _check_frame(frame, frames[0].shape, index)
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in frames]
    animation.durations = np.full(len(frames), round(1000 / fps), np.int32)
    animation.loop_count = 0
    found, content = cv2.imencodeanimation(".webp", animation, [cv2.IMWRITE_WEBP_QUALITY, 80])
    if not found:
        raise ValueError(f"cannot encode {path}: {len(frames)} frames of {frames[0].shape}")
    write_bytes(path, content.tobytes())
