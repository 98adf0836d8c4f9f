"""What a D4RT has to beat on synthetic scenes: answers that need no model, each helped by truths that a model lacks.

depth    a constant; the mean depth of training scenes at each place and time. Both get the best scale per clip.
tracks   the point stays where its camera saw it, at its true depth, or at the model's own; OpenCV's DIS optical
         flow, chained from frame to frame, with the true depth (and intrinsics) of wherever it ends up, or the
         model's own
poses    the camera does not move
focal    the median of training scenes
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.ops import bilinear_sample
from fourdperf.train.pictures import depth_queries

__all__ = ["Averages", "Followed", "chained_flow", "flow_tracks", "still_tracks", "training_averages"]

FLOW_SIZE = 256  # DIS sees little in frames of 64 pixels: they are enlarged for it


class Averages(NamedTuple):
    """depth `(T, h, w)`, of clips divided by their mean depth; focal `(2,)`, the median fx and fy."""

    depth: Tensor
    focal: Tensor


class Followed(NamedTuple):
    """K points over T frames: xyz `(K, T, 3)` in the camera of each frame, visible `(K, T)`, uv `(K, T, 2)`."""

    xyz: Tensor
    visible: Tensor
    uv: Tensor


def training_averages(scenes: list[Scene], size: tuple[int, int]) -> Averages:
    """Of scenes that are not those of the test, on a grid of (h, w) = `size`."""
    queries = depth_queries(scenes[0].num_frames, size)
    total, focals = 0, []
    for scene in scenes:
        depth = scene.answer(queries).xyz[:, 2].double()
        total = total + depth / depth.mean()
        focals.append(scene.intrinsics[:, [0, 1], [0, 1]])
    return Averages((total / len(scenes)).view(-1, *size), torch.cat(focals).median(0).values)


def still_tracks(xyz: Tensor, uv: Tensor, frames: int) -> Followed:
    """Points `(K, 3)` seen at `uv` `(K, 2)` that keep their place in the camera, and stay visible."""
    repeat = lambda x: x[:, None].expand(-1, frames, -1)
    return Followed(repeat(xyz), torch.ones(len(xyz), frames, dtype=torch.bool), repeat(uv))


def flow_tracks(scene: Scene, video: np.ndarray, uv: Tensor) -> Followed:
    """Points at `uv` `(K, 2)` of frame 0 that follow the flow of `video` uint8 `(T, H, W, 3)`; visible while they are
    inside the frame."""
    places = chained_flow(video, uv)  # (K, T, 2)
    inside = ((places >= 0) & (places <= 1)).all(-1)
    t = torch.arange(len(video)).expand(places.shape[:2])
    return Followed(scene.answer(Queries(places.clamp(0, 1), t, t, t)).xyz, inside, places)


def chained_flow(video: np.ndarray, uv: Tensor) -> Tensor:
    """Where DIS optical flow takes places `(K, 2)` of frame 0 of a video uint8 `(T, H, W, 3)`: `(K, T, 2)`."""
    grey = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (FLOW_SIZE,) * 2, interpolation=cv2.INTER_CUBIC)
        for frame in video
    ]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    places = [uv]
    for first, second in zip(grey, grey[1:]):
        flow = torch.from_numpy(dis.calc(first, second, None)) / FLOW_SIZE  # (S, S, 2), u and v
        places.append(places[-1] + bilinear_sample(flow, places[-1], align_corners=False))
    return torch.stack(places, 1)
