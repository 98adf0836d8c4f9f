"""Augmentations of a training clip (arXiv 2512.08924, appendix): colours, blur, crop, zoom and temporal stride.

A `View` is what a model gets to see of a longer or larger video: which frames, and which box of each. It maps queries
about the view to queries about the video, and the answers back, so that a box changes uv, intrinsics, visibility and
aspect ratio consistently, whatever answers the queries. Colours and blur change pixels only.

The paper gives names and probabilities; the ranges and the reading of "zoom 0.05" are ours: with probability 0.05 the
box grows or shrinks steadily over the clip, which is a change of focal length.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fourdperf.data.queries import Queries, Targets

__all__ = ["PhotometricConfig", "View", "ViewConfig", "photometric", "sample_view"]


@dataclass(frozen=True)
class PhotometricConfig:
    """One draw per clip, the same for all its frames.

    brightness, contrast, saturation: a factor in [1 - x, 1 + x]; hue: a rotation of up to x turns; drop: the
    probability of no colour at all; blur: the probability of a Gaussian blur, its sigma in [0.1, `sigma`] pixels of a
    64-pixel frame and in proportion otherwise.
    """

    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.1
    drop: float = 0.2
    blur: float = 0.4
    sigma: float = 0.6


@dataclass(frozen=True)
class ViewConfig:
    """crop: the smallest share of the frame's area, 1 for no crop (the paper: 0.3), and then the largest factor on its
    aspect ratio, log-uniform; zoom: the probability of a zoom; stride: the largest step between frames, 1 for none."""

    crop: float = 1.0
    aspect: float = 4 / 3
    zoom: float = 0.0
    stride: int = 1


class View(NamedTuple):
    """frames `(T,)` int64 of the video; box `(T, 4)` of each, (left, top, width, height) in the frame's uv."""

    frames: Tensor
    box: Tensor

    def to_video(self, queries: Queries) -> Queries:
        """The same questions about the video."""
        box = self.box[queries.t_src]
        uv = box[..., :2] + queries.uv * box[..., 2:]
        return Queries(uv, *(self.frames[t] for t in queries[1:]))

    def to_view(self, queries: Queries, targets: Targets, uv_at_target: Targets | None = None) -> Targets:
        """The video's answers to `to_video(queries)` as answers about the view.

        Points and normals stay (a crop does not move the camera). A visible point that falls outside the box of frame
        t_tgt is not visible in the view; where it falls is `targets.uv` if t_tgt = t_cam and otherwise the uv of
        `uv_at_target`, the answers with t_cam = t_tgt. Without these such a visibility is not known.
        """
        box = self.box[queries.t_cam]
        uv = (targets.uv - box[..., :2]) / box[..., 2:]
        here = queries.t_tgt == queries.t_cam
        there = targets if uv_at_target is None else uv_at_target
        box = self.box[queries.t_tgt]
        place = (there.uv - box[..., :2]) / box[..., 2:]
        inside = ((place >= 0) & (place <= 1)).all(-1)
        known = targets.has_visibility
        if uv_at_target is None and not self.whole:
            known = known & (here | (targets.visibility == 0))
            inside = inside | ~here
        visibility = targets.visibility * inside if not self.whole else targets.visibility
        return targets._replace(uv=uv, visibility=visibility, has_visibility=known)

    def intrinsics(self, intrinsics: Tensor) -> Tensor:
        """The view's normalised intrinsics `(T, 3, 3)` from the video's `(F, 3, 3)`."""
        k = intrinsics[self.frames].clone()
        k[:, :2] /= self.box[:, 2:, None].to(k)
        k[:, :2, 2] -= (self.box[:, :2] / self.box[:, 2:]).to(k)
        return k

    def aspect_ratio(self, ratio: float) -> float:
        """The view's width / height before the squeeze, of its middle frame."""
        _, _, width, height = self.box[len(self.box) // 2].tolist()
        return ratio * width / height

    def video(self, video: Tensor, size: tuple[int, int]) -> Tensor:
        """The view's pixels `(T, *size, 3)` of the video `(F, H, W, 3)` in [0, 1], antialiased where it shrinks."""
        picked = video[self.frames]
        if self.whole and tuple(video.shape[1:3]) == size:
            return picked
        left, top, width, height = self.box[:, :, None, None].unbind(1)  # (T, 1, 1)
        # so many samples per output pixel and axis that a box is never read more coarsely than pixel by pixel
        samples = [
            max(1, math.ceil(float(extent.max()) * pixels / out))
            for extent, pixels, out in zip((height, width), video.shape[1:3], size)
        ]
        rows, columns = (((torch.arange(out * n) + 0.5) / (out * n)).to(video) for out, n in zip(size, samples))
        u, v = torch.broadcast_tensors(left + columns * width, top + rows[:, None] * height)
        grid = torch.stack([u, v], -1) * 2 - 1
        seen = F.grid_sample(
            picked.movedim(-1, 1), grid.to(video), mode="bilinear", padding_mode="border", align_corners=False
        )
        return F.avg_pool2d(seen, samples).movedim(1, -1).contiguous()

    @property
    def whole(self) -> bool:
        """Whether every box is the whole frame."""
        return bool((self.box == torch.tensor([0.0, 0.0, 1.0, 1.0])).all())


def sample_view(video_frames: int, num_frames: int, config: ViewConfig, generator: Generator) -> View:
    """A view of `num_frames` frames, evenly spaced by at most `config.stride`, of a video that has `video_frames`.

    Raises:
        ValueError: the video is shorter than that.
    """
    if video_frames < num_frames:
        raise ValueError(f"video: wanted at least {num_frames} frames, got {video_frames}")
    largest = min(config.stride, (video_frames - 1) // max(1, num_frames - 1))
    step = 1 + _integer(max(1, largest), generator)
    start = _integer(video_frames - (num_frames - 1) * step, generator)
    frames = start + step * torch.arange(num_frames)

    size = _box_size(config, generator)
    zoom = torch.rand(2, generator=generator)
    sizes = size.expand(num_frames, 2)
    if zoom[0] < config.zoom:
        other = _box_size(ViewConfig(crop=0.5, aspect=1.0), generator)
        ends = (size, size * other) if zoom[1] < 0.5 else (size * other, size)
        sizes = torch.lerp(*ends, torch.linspace(0, 1, num_frames)[:, None])
    corner = torch.rand(2, generator=generator) * (1 - sizes.amax(0)) + (sizes.amax(0) - sizes) / 2
    return View(frames, torch.cat([corner, sizes], -1))


def _integer(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _box_size(config: ViewConfig, generator: Generator) -> Tensor:
    """(width, height) of a box with a uniform area and a log-uniform aspect, inside the frame."""
    area, aspect = torch.rand(2, generator=generator).tolist()
    area = config.crop + (1 - config.crop) * area
    stretch = math.exp((2 * aspect - 1) * math.log(config.aspect) / 2) if config.crop < 1 else 1.0
    side = math.sqrt(area)
    return torch.tensor([min(1.0, side * stretch), min(1.0, side / stretch)])


LUMA = torch.tensor([0.299, 0.587, 0.114])
# RGB to luma and two chroma axes (YIQ), where hue is an angle
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def photometric(video: Tensor, config: PhotometricConfig, generator: Generator) -> Tensor:
    """A new video `(T, H, W, 3)` in [0, 1] with other colours, and perhaps blurred."""
    draw = torch.rand(7, generator=generator).tolist()
    brightness, contrast, saturation = (
        1 + (2 * x - 1) * extent for x, extent in zip(draw, (config.brightness, config.contrast, config.saturation))
    )
    angle = 2 * math.pi * (2 * draw[3] - 1) * config.hue
    if draw[4] < config.drop:
        saturation = 0.0
    rotation = torch.tensor(
        [
            [1, 0, 0],
            [0, saturation * math.cos(angle), -saturation * math.sin(angle)],
            [0, saturation * math.sin(angle), saturation * math.cos(angle)],
        ]
    )
    colour = torch.linalg.inv(TO_YIQ) @ rotation @ TO_YIQ
    grey = (video.mean((0, 1, 2)) @ LUMA).item()
    # contrast about the clip's mean grey, then brightness, then hue and saturation: one affine map
    out = video @ (contrast * brightness * colour).T + (1 - contrast) * brightness * grey
    out = out.clamp_(0, 1)
    if draw[5] < config.blur:
        largest = config.sigma * video.shape[2] / 64
        out = _blur(out, 0.1 + draw[6] * max(0.0, largest - 0.1))
    return out


def recoloured(videos: list[Tensor], config: PhotometricConfig | None, generator: Generator) -> list[Tensor]:
    """`photometric` of the same frames in several resolutions, with the same draws; themselves without a config."""
    if config is None:
        return videos
    draws = [*(generator.clone_state() for _ in videos[1:]), generator]
    return [photometric(video, config, draw) for video, draw in zip(videos, draws)]


def _blur(video: Tensor, sigma: float) -> Tensor:
    """A Gaussian of `sigma` pixels over H and W."""
    reach = min(max(1, math.ceil(3 * sigma)), *(n - 1 for n in video.shape[1:3]))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).to(video)
    planes = F.pad(video.movedim(-1, 1), (reach,) * 4, mode="reflect")  # (T, 3, H + 2r, W + 2r)
    height, width = video.shape[1:3]
    planes = sum(w * planes[..., i : i + height, :] for i, w in enumerate(weights))
    planes = sum(w * planes[..., i : i + width] for i, w in enumerate(weights))
    return planes.movedim(1, -1).contiguous()
