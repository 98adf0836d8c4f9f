"""Depth, points, tracks and cameras, each from queries (u, v, t_src, t_tgt, t_cam) to a D4RT model.

    video = EncodedVideo(model, frames)          # encoded once
    maps = depth(video)                          # queries (u, v, t, t, t): z
    cloud = point_cloud(video, camera=0)         # (u, v, t, t, camera)
    paths = tracks(video, grid(video, 16, 16))   # (u, v, t_src, t, t) for all t
    poses = extrinsics(video)                    # (u, v, i, i, i) and (u, v, i, i, j), and the best rigid motion
    cameras = intrinsics(video)                  # (u, v, t, t, t), and the pinhole formula

Any model with D4RT's `encode` and `decode` will do. Queries are made in blocks while they are answered, and answers
wait on the CPU, so that device memory does not grow with their number. Results are tensors on the CPU.

Source: D4RT (arXiv 2512.08924), section 3.2. :func:`fourdperf.reconstruct.reconstruct` puts them together.
"""

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm import tqdm

from fourdperf.data.queries import Queries, as_tensor
from fourdperf.data.video import resize_frame
from fourdperf.geometry import fit_distortion, pinhole_intrinsics, rigid, umeyama

__all__ = [
    "Cloud",
    "DepthMaps",
    "EncodedVideo",
    "Intrinsics",
    "Tracks",
    "depth",
    "extrinsics",
    "grid",
    "intrinsics",
    "pixel_centres",
    "point_cloud",
    "tracks",
]

BLOCK = 1 << 16  # queries in flight; with their answers about 7 MB


def check_frames(frames: ArrayLike) -> Tensor:
    """Frames as uint8 `(T, H, W, 3)` on the CPU, from uint8 or from floating values in [0, 1].

    Raises:
        ValueError: another shape, dtype or range, or values that are not finite.
    """
    frames = as_tensor(frames).cpu()
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.numel():
        raise ValueError(f"frames: wanted (T, H, W, 3), at least one frame, got {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise ValueError(f"frames: wanted uint8, or floating in [0, 1], got {frames.dtype}")
    low, high = frames.aminmax()
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"frames: wanted values in [0, 1], got {low:.4g} to {high:.4g}")
    return (255 * frames).round().to(torch.uint8)


class EncodedVideo:
    """A video that was shown to a model once, for any number of questions.

    Args:
        model: a D4RT; it runs where its parameters are, in the mode (and autocast) it finds.
        frames: `(T, H, W, 3)` of any size, uint8 or floating in [0, 1]; T at most the model's `num_frames`. They are
            squeezed to the model's size (8 bits a colour, but for frames that have this size), and W / H is told to it.
        high_resolution: cut the queries' RGB patches from ``frames`` as they are, in place of the squeezed ones.
        progress: show progress bars.

    Attributes:
        frames: uint8 `(T, H, W, 3)`.
        size: height and width of the model's frames.
        queries: asked so far.
        encode_seconds, decode_seconds: spent so far.

    Raises:
        ValueError: frames that :func:`check_frames` refuses, or more of them than the model takes.
    """

    def __init__(self, model: nn.Module, frames: ArrayLike, *, high_resolution: bool = False, progress: bool = False):
        self.frames = check_frames(frames)
        if len(self.frames) > model.config.num_frames:
            raise ValueError(
                f"frames: wanted at most the {model.config.num_frames} frames that the model takes, got "
                f"{len(self.frames)}; reconstruct() cuts longer videos into chunks"
            )
        self.model, self.progress = model, progress
        self.size = tuple(model.config.image_size)
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.queries, self.decode_seconds = 0, 0.0

        height, width = self.frames.shape[1:3]
        video = self._squeezed(as_tensor(frames))[None].to(self.device)
        patches = self.frames[None].to(self.device) if high_resolution and self.size != (height, width) else None
        start = self._now()
        with torch.inference_mode():
            self.encoded = model.encode(video, torch.tensor([width / height], device=self.device), patches)
        self.encode_seconds = self._now() - start

    def __len__(self) -> int:
        return len(self.frames)

    def _squeezed(self, frames: Tensor) -> Tensor:
        if frames.is_floating_point() and frames.shape[1:3] == self.size:
            return frames.float()  # not rounded to 8 bits
        squeezed = np.stack([resize_frame(frame, self.size) for frame in self.frames.numpy()])
        return torch.from_numpy(squeezed).float() / 255

    def ask(
        self, count: int, make: Callable[[Tensor], Queries], fields: tuple[str, ...], label: str | None = None
    ) -> list[Tensor]:
        """Answers to ``count`` queries, made block by block: the named fields of `Prediction`, each `(count, ...)`.

        Args:
            make: from indices `(n,)` to Queries with uv `(n, 2)` and frames `(n,)`, on the indices' device.
            label: what the progress bar says; without it there is none.
        """
        answers = None
        start = self._now()
        hidden = label is None or not self.progress
        with tqdm(total=count, desc=label, unit="query", unit_scale=True, disable=hidden) as bar:
            for first in range(0, max(count, 1), BLOCK):
                index = torch.arange(first, min(first + BLOCK, count), device=self.device)
                with torch.inference_mode():
                    queries = Queries(*(part[None] for part in make(index)))
                    prediction = self.model.decode(self.encoded, queries)
                parts = [getattr(prediction, field)[0] for field in fields]
                if answers is None:
                    answers = [torch.empty((count, *part.shape[1:]), dtype=torch.float32) for part in parts]
                for answer, part in zip(answers, parts):
                    answer[first : first + len(index)] = part
                bar.update(len(index))
        self.decode_seconds += self._now() - start
        self.queries += count
        return answers

    def forget(self) -> None:
        """Frees what the model made of the video; nothing more can be asked."""
        self.encoded = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def pixel_centres(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """uv of the centres of (height, width) cells, row by row: `(height * width, 2)`. ValueError for less than one."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: wanted a height and a width of at least 1, got {tuple(size)}")
    v, u = ((torch.arange(n, device=device) + 0.5) / n for n in size)
    return torch.stack([u.repeat(len(v)), v.repeat_interleave(len(u))], dim=-1)


def grid(video: EncodedVideo, rows: int, columns: int, frame: int = 0) -> Tensor:
    """Sources (t, u, v) `(rows * columns, 3)` for :func:`tracks`, all over one frame."""
    uv = pixel_centres((rows, columns))
    return torch.cat([torch.full_like(uv[:, :1], frame), uv], dim=-1)


# Depth and points


class DepthMaps(NamedTuple):
    """depth `(T, h, w)`: z in the camera of each frame. confidence `(T, h, w)` in [0, 1]."""

    depth: Tensor
    confidence: Tensor


class Cloud(NamedTuple):
    """points `(T, h, w, 3)`: what pixel (y, x) of frame t shows. confidence `(T, h, w)` in [0, 1]."""

    points: Tensor
    confidence: Tensor


def depth(video: EncodedVideo, size: tuple[int, int] | None = None, frames: range | None = None) -> DepthMaps:
    """Depth maps of (h, w) = ``size``, by default the model's, of all frames or of a range of them."""
    cloud = _own_pixels(video, size, None, frames, "depth")
    return DepthMaps(cloud.points[..., 2], cloud.confidence)


def point_cloud(
    video: EncodedVideo, camera: int = 0, size: tuple[int, int] | None = None, frames: range | None = None
) -> Cloud:
    """The points that every pixel of the frames shows at its own time, all in the camera of frame ``camera``; as many
    pixels as `depth` has."""
    return _own_pixels(video, size, camera, frames, "points")


def _own_pixels(
    video: EncodedVideo, size: tuple[int, int] | None, camera: int | None, frames: range | None, label: str
) -> Cloud:
    size, frames = size or video.size, range(len(video)) if frames is None else frames
    uv = pixel_centres(size, video.device)

    def make(index: Tensor) -> Queries:
        t = frames.start + index // len(uv)
        return Queries(uv[index % len(uv)], t, t, t if camera is None else torch.full_like(t, camera))

    xyz, confidence = video.ask(len(frames) * len(uv), make, ("xyz", "confidence"), label)
    return Cloud(xyz.view(len(frames), *size, 3), confidence.sigmoid().view(len(frames), *size))


# Tracks


class Tracks(NamedTuple):
    """K points over T frames.

    xyz         (K, T, 3) in the camera of each frame, or in one camera
    uv          (K, T, 2) the place in each frame, inside of it or not
    visible     (K, T) bool
    confidence  (K, T) in [0, 1]
    source      (K, 3) the pixel asked for, (t, u, v)
    """

    xyz: Tensor
    uv: Tensor
    visible: Tensor
    confidence: Tensor
    source: Tensor


def tracks(video: EncodedVideo, source: ArrayLike, camera: int | None = None) -> Tracks:
    """Follows points through all frames.

    Args:
        source: `(K, 3)`, (t, u, v) of each point; see :func:`grid`.
        camera: None gives xyz in the camera of each frame; a frame gives all of them in its camera, from as many
            queries again, since uv and visibility are those of each frame in any case.

    Raises:
        ValueError: ``source`` of another shape, or frames or places out of range.
    """
    return follow(video, check_source(source, len(video)), camera, "tracks")


def follow(video: EncodedVideo, source: Tensor, camera: int | None, label: str | None) -> Tracks:
    """`tracks`, with a progress bar of that name, or none."""
    number, device = len(video), video.device
    frame, uv = source[:, 0].long().to(device), source[:, 1:].to(device)

    def make(index: Tensor) -> Queries:
        point, t = index // number, index % number
        return Queries(uv[point], frame[point], t, t)

    def make_in_camera(index: Tensor) -> Queries:
        queries = make(index)
        return queries._replace(t_cam=torch.full_like(queries.t_cam, camera))

    count = len(source) * number
    fields = ("xyz", "uv", "visibility", "confidence")
    xyz, place, visibility, confidence = video.ask(count, make, fields, label)
    if camera is not None:
        xyz, confidence = video.ask(count, make_in_camera, ("xyz", "confidence"), label)
    parts = (xyz, place, visibility > 0, confidence.sigmoid())
    return Tracks(*(part.unflatten(0, (len(source), number)) for part in parts), source)


def check_source(source: ArrayLike, number: int) -> Tensor:
    """Sources (t, u, v) as float32 `(K, 3)`; a ValueError where they are not of a clip of ``number`` frames."""
    source = torch.as_tensor(source).float().cpu()
    if source.ndim != 2 or source.shape[1] != 3:
        raise ValueError(f"source: wanted (K, 3), (t, u, v) of each point, got {tuple(source.shape)}")
    t, uv = source[:, 0], source[:, 1:]
    if not ((t == t.floor()) & (t >= 0) & (t < number)).all():
        raise ValueError(f"source: wanted whole t in [0, {number - 1}], got {t.min():g} to {t.max():g}")
    if not ((uv >= 0) & (uv <= 1)).all():
        raise ValueError(f"source: wanted u and v in [0, 1], got {uv.min():g} to {uv.max():g}")
    return source


# Cameras


class Intrinsics(NamedTuple):
    """matrix `(T, 3, 3)`, normalised. distortion `(T, 2)`: k1, k2."""

    matrix: Tensor
    distortion: Tensor


def extrinsics(video: EncodedVideo, size: tuple[int, int] = (16, 16), camera: int = 0) -> Tensor:
    """Poses `(T, 4, 4)` of all frames in the coordinates of the camera of frame ``camera``, whose pose is the identity.

    Points of a coarse grid of (h, w) = ``size``, at one time, in both cameras: the best rigid motion between them,
    weighted by the product of their confidences. The paper takes the grid of one frame; we take those of both, each at
    its own time, so that something is seen from near whichever way the camera went.
    """
    uv = pixel_centres(size, video.device)
    points, number = len(uv), len(video)

    # Of frame t: its own grid and that of `camera`, each seen by both: index = ((t * 2 + whose) * 2 + by) * points + i.
    def make(index: Tensor) -> Queries:
        rest, by, t = index // points, index // points % 2, index // points // 4
        whose = rest // 2 % 2
        source = torch.where(whose == 0, t, camera)
        return Queries(uv[index % points], source, source, torch.where(by == 0, t, camera))

    xyz, confidence = video.ask(4 * number * points, make, ("xyz", "confidence"), "extrinsics")
    xyz = xyz.view(number, 2, 2, points, 3).transpose(1, 2).flatten(2, 3)  # (T, by, points of both, 3)
    weights = confidence.sigmoid().view(number, 2, 2, points).prod(2).flatten(1)
    motion = umeyama(xyz[:, 0].double(), xyz[:, 1].double(), weights.double(), with_scale=False)
    poses = rigid(motion.rotation, motion.translation)
    poses[camera] = torch.eye(4)
    return poses.float()


def intrinsics(
    video: EncodedVideo, size: tuple[int, int] = (16, 16), *, shared: bool = False, distortion: bool = False
) -> Intrinsics:
    """Normalised intrinsics of all frames, by :func:`fourdperf.geometry.pinhole_intrinsics` on a coarse grid.

    Args:
        size: (h, w) of the grid. Points whose confidence is below a tenth of their frame's highest are left out.
        shared: one camera for all frames, from all their points together.
        distortion: refine, with radial distortion, by :func:`fourdperf.geometry.fit_distortion`.

    A frame whose points give no focal length gets the median of the others; where none does, with a warning, fx = 1.
    """
    cloud, number = _own_pixels(video, size, None, None, "intrinsics"), len(video)
    xyz, confidence = cloud.points.view(number, -1, 3).double(), cloud.confidence.view(number, -1).double()
    uv = pixel_centres(size).double()
    weights = torch.where(confidence >= 0.1 * confidence.amax(1, keepdim=True), confidence, 0)
    if shared:
        xyz, weights, uv = xyz.flatten(0, 1)[None], weights.flatten()[None], uv.repeat(number, 1)
    matrix = pinhole_intrinsics(xyz, uv, weights)
    matrix = _fill_in(matrix, video.frames.shape[2] / video.frames.shape[1])
    k = torch.zeros(len(matrix), 2)
    if distortion:
        matrix, k = fit_distortion(xyz, uv, matrix, weights)
    return Intrinsics(matrix.float().expand(number, 3, 3).clone(), k.float().expand(number, 2).clone())


def _fill_in(matrix: Tensor, aspect_ratio: float) -> Tensor:
    focal = matrix[:, [0, 1], [0, 1]]
    known = (focal > 0).all(1)
    if not known.any():
        warnings.warn("the model's points give no focal length: taking fx = 1, a view 53 degrees wide", stacklevel=3)
    usual = focal[known].median(0).values if known.any() else focal.new_tensor([1, aspect_ratio])
    matrix[:, [0, 1], [0, 1]] = torch.where(known[:, None], focal, usual)
    return matrix
