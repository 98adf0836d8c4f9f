"""What D4RT is asked, and what it should answer: queries, their exact answers, and clips that carry both.

Conventions, everywhere in fourdperf:

    uv          a place in a frame, u to the right and v down, in [0, 1]: pixel (row y, column x) of an (H, W) frame has
                its centre at u = (x + 0.5) / W, v = (y + 0.5) / H
    camera      OpenCV: x right, y down, z forward; depth is z
    intrinsics  (3, 3), normalised: u = fx X/Z + cx, v = fy Y/Z + cy, so that the image centre is 0.5 whatever the size
    poses       world_from_camera (4, 4), a rigid motion in the units of the scene

A query names a surface point by where frame `t_src` shows it, (u, v), and asks where this point of the surface is at the
time of frame `t_tgt`, in the coordinates of the camera of frame `t_cam`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["Clip", "Queries", "Targets", "as_tensor", "stack_clips"]


class Queries(NamedTuple):
    """N independent queries, with any leading axes: uv `(..., N, 2)` in [0, 1], the frames `(..., N)` int64 from 0."""

    uv: Tensor
    t_src: Tensor
    t_tgt: Tensor
    t_cam: Tensor


class Targets(NamedTuple):
    """The true answers; where a `has_*` `(..., N)` is False the answer is not known and its values mean nothing.

    xyz           (..., N, 3) the point at time t_tgt in the camera of t_cam, scene units
    uv            (..., N, 2) the projection of xyz into the frame of t_cam; unknown behind the camera
    visibility    (..., N)    1.0 where the frame of t_tgt shows the point (inside the frame, not occluded), else 0.0
    displacement  (..., N, 3) its motion from t_src to t_tgt, both in the camera of t_cam: how far the surface itself went
    normal        (..., N, 3) unit surface normal at time t_tgt in the camera of t_cam, on the side that t_src sees
    """

    xyz: Tensor
    uv: Tensor
    visibility: Tensor
    displacement: Tensor
    normal: Tensor
    has_xyz: Tensor
    has_uv: Tensor
    has_visibility: Tensor
    has_displacement: Tensor
    has_normal: Tensor


class Clip(NamedTuple):
    """A clip with queries about it; unbatched as here, or with a leading batch axis everywhere.

    video         (T, H, W, 3) float32 in [0, 1], squeezed to the model's size
    aspect_ratio  ()           width / height before the squeeze
    patch_video   (T, H', W', 3) the frames that RGB patches are cut from: `video` itself, or the original resolution
    """

    video: Tensor
    aspect_ratio: Tensor
    patch_video: Tensor
    queries: Queries
    targets: Targets


def as_tensor(values: ArrayLike) -> Tensor:
    """torch.as_tensor, which takes neither arrays turned round (BGR to RGB by [..., ::-1]) nor read-only ones."""
    if isinstance(values, np.ndarray):
        values = np.require(values, requirements=["C", "W"])
    return torch.as_tensor(values)


def stack_clips(clips: Sequence[Clip]) -> Clip:
    """A batch of clips of one shape: every tensor gets a leading axis."""
    return Clip(
        video=torch.stack([clip.video for clip in clips]),
        aspect_ratio=torch.stack([clip.aspect_ratio for clip in clips]),
        patch_video=torch.stack([clip.patch_video for clip in clips]),
        queries=Queries(*(torch.stack(parts) for parts in zip(*(clip.queries for clip in clips)))),
        targets=Targets(*(torch.stack(parts) for parts in zip(*(clip.targets for clip in clips)))),
    )
