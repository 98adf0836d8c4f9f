"""Synthetic scenes: a textured room with moving and deforming objects under a moving, zooming camera, and the exact
answer to any query about them.

A scene is made of its seed alone: the same seed gives the same scene whatever was made or rendered before, in any
size; the first frames of a longer clip are those of a shorter one. Rays are cast in closed form (see `shapes`), so
depth, normals, instances, flow and answers are those of the geometry and not of a mesh or a finished frame.

    scene = Scene(seed=7, num_frames=8, size=(64, 64))
    clip = scene.render()              # video (8, 64, 64, 3), depth, normal, instance, flow
    targets = scene.answer(queries)    # exact, for any (u, v, t_src, t_tgt, t_cam)
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourdperf.data.queries import Queries, Targets
from fourdperf.data.scenes.layout import Layout
from fourdperf.data.scenes.textures import TEXELS, Atlas, load_photographs, random_texture
from fourdperf.data.scenes.world import Hits, World

__all__ = ["Rendering", "Scene"]

NEAR = 0.1  # a point less deep than this has no place in the frame; every surface a camera sees is further away
HIDDEN = 1e-3  # a point is occluded by what is nearer by more than this part of its distance
AMBIENT = 0.45
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
RAYS, QUERIES = 2**16, 2**15  # cast at a time


class Rendering(NamedTuple):
    """A clip of T frames.

    video     (T, H, W, 3) float32 in [0, 1]; pixels with an edge in them are the mean of four rays
    depth     (T, H, W) float32 z at the pixel's centre, as everything below
    normal    (T, H, W, 3) float32 unit normal in camera coordinates, towards the camera
    instance  (T, H, W) int64, 0 the room, 1.. the objects
    flow      (T-1, H, W, 2) float32, where the surface point is in the next frame less where it is in this one, in uv
              units, whether or not it is visible there
    """

    video: Tensor
    depth: Tensor
    normal: Tensor
    instance: Tensor
    flow: Tensor


class Scene:
    """The scene of a seed, in frames `time_step` seconds apart.

    Args:
        seed: 0 or more.
        num_frames: T, at least 1.
        size: height and width of the frames in pixels.
        device: where tensors are made and rays are cast.
        aspect_ratio: width / height of what the frame shows; None means that of `size`, so that pixels are square.
        time_step: seconds from one frame to the next; bodies move about a unit, and turn about a radian, per second.
        photographs: a folder of pictures to cut textures from; None takes the two photographs of scikit-learn, where it
            is installed (without it these surfaces get a pattern; the geometry is the same).
        still: only the camera moves, and every body is as it is in the first frame.

    Attributes:
        intrinsics: (T, 3, 3) float32, see fourdperf.data.queries.
        world_from_camera: (T, 4, 4) float32; the world has y pointing down and its origin in the middle of the room.
        aspect_ratio: float.
        num_objects: the room not counted.

    Raises:
        ValueError: an argument is out of range, or `photographs` is no folder with readable pictures.
    """

    def __init__(
        self,
        seed: int,
        num_frames: int = 8,
        size: tuple[int, int] = (64, 64),
        device: str | torch.device = "cpu",
        *,
        aspect_ratio: float | None = None,
        time_step: float = 0.125,
        photographs: str | os.PathLike | None = None,
        still: bool = False,
    ):
        _require(seed >= 0, f"seed must be 0 or more, got {seed}")
        _require(num_frames >= 1, f"num_frames must be at least 1, got {num_frames}")
        _require(len(size) == 2 and min(size) >= 1, f"size must be a height and a width of at least 1, got {size}")
        self.seed, self.num_frames, self.size = int(seed), int(num_frames), (int(size[0]), int(size[1]))
        self.device = torch.device(device)
        self.aspect_ratio = size[1] / size[0] if aspect_ratio is None else float(aspect_ratio)
        _require(0 < self.aspect_ratio < math.inf, f"aspect_ratio must be positive, got {aspect_ratio}")
        _require(0 <= time_step < math.inf, f"time_step must not be negative, got {time_step}")

        layout = Layout.random(self.seed)
        self.num_objects = len(layout.bodies) - 1
        times = np.arange(num_frames) * time_step
        self._exact = _make_world(layout, times, 0 * times if still else times, self.aspect_ratio, self.device)
        self._world = World(self._exact.kinds, *(value.float() for value in self._exact[1:]))
        self._light = torch.tensor(layout.light, dtype=torch.float32, device=self.device)
        pictures = load_photographs(photographs)
        textures = [
            random_texture(np.random.default_rng((self.seed, 1, i)), pictures) for i in range(6 + self.num_objects)
        ]
        self._atlas = Atlas(torch.from_numpy(np.stack(textures)).to(self.device))
        self.intrinsics, self.world_from_camera = self._world.intrinsics, self._world.world_from_camera

    def render(self) -> Rendering:
        """Renders all frames, some at a time so that memory stays bounded."""
        height, width = self.size
        y, x = torch.meshgrid(*(torch.arange(n, device=self.device) for n in self.size), indexing="ij")
        uv = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).view(1, -1, 2)
        frames = torch.arange(self.num_frames, device=self.device)
        parts = [self._render(some, uv) for some in frames.split(max(1, RAYS // (height * width)))]
        return Rendering(*(torch.cat(part).unflatten(1, self.size) for part in zip(*parts)))

    def _render(self, frames: Tensor, uv: Tensor) -> tuple[Tensor, ...]:
        """The fields of a Rendering for some `frames`, their pixels in one axis."""
        world = self._world
        hits = world.hits(frames, world.directions(frames, uv))
        normal = world.normal_to_world(frames, hits.body, hits.normal)
        colour = self._colour(frames, hits, normal)
        self._smooth_edges(frames, colour, hits, uv[0])
        return colour, hits.distance, world.turn_to_camera(frames, normal), hits.body, self._flow(frames, hits, uv)

    def _colour(self, frames: Tensor, hits: Hits, normal: Tensor) -> Tensor:
        """Lambert shading of the texture, wrapped around so that no side is black: (G, R, 3)."""
        focal = self.intrinsics[frames, None, 0, 0] * math.sqrt(self.aspect_ratio * self.size[0] * self.size[1])
        texels = hits.distance / focal * self._world.density[hits.body] * TEXELS
        colour = self._atlas.read(hits.texture.flatten(), hits.drawn.flatten(0, 1), texels.flatten())
        shade = AMBIENT + (1 - AMBIENT) * (0.5 + 0.5 * (normal @ self._light))
        return colour.view(normal.shape) * shade[..., None]

    def _smooth_edges(self, frames: Tensor, colour: Tensor, hits: Hits, uv: Tensor) -> None:
        """Gives the pixels whose neighbour shows another surface the mean colour of four rays, in place."""
        height, width = self.size
        texture = hits.texture.view(-1, height, width)
        edge = torch.zeros_like(texture, dtype=torch.bool)
        down, right = texture[:, 1:] != texture[:, :-1], texture[:, :, 1:] != texture[:, :, :-1]
        edge[:, 1:] |= down
        edge[:, :-1] |= down
        edge[:, :, 1:] |= right
        edge[:, :, :-1] |= right
        group, pixel = edge.flatten(1).nonzero(as_tuple=True)
        if not len(pixel):
            return
        # Frames have different numbers of such pixels: `slot` counts them in each, and the spare slots do pixel 0.
        counts = edge.sum((1, 2))
        slot = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
        pixels = pixel.new_zeros(len(frames), int(counts.max()))
        pixels[group, slot] = pixel
        quarter = torch.tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]], device=uv.device) / 4
        places = uv[pixels, None] + quarter / torch.tensor([width, height], device=uv.device)
        fine = self._world.hits(frames, self._world.directions(frames, places.flatten(1, 2)))
        normal = self._world.normal_to_world(frames, fine.body, fine.normal)
        colour[group, pixel] = self._colour(frames, fine, normal).unflatten(1, (-1, 4)).mean(2)[group, slot]

    def _flow(self, frames: Tensor, hits: Hits, uv: Tensor) -> Tensor:
        """The flow from `frames` to the next ones, without the last of the clip."""
        world, later = self._world, frames[frames < self.num_frames - 1] + 1
        body, place = hits.body[: len(later)], hits.place[: len(later)]
        point = world.to_world(later, body, world.place_at(later, body, place))
        return world.project(later, world.to_camera(later, point), NEAR) - uv

    def answer(self, queries: Queries) -> Targets:
        """The exact answers, computed in float64 and rounded to float32.

        Everything is known except `uv` of points less than 0.1 in front of the camera of t_cam, or behind it. A point
        of a sheet is visible where the side of the sheet that t_src saw is. Places outside of [0, 1] are answered as if
        the frame went on there; visible is only what is inside of it.

        Args:
            queries: uv (..., N, 2) floating, t_src, t_tgt and t_cam (..., N) int64 in [0, T), on any device.

        Raises:
            ValueError: shapes that do not fit, a frame out of range, or uv that is not finite.
        """
        uv, *times = (value.to(self.device) for value in queries)
        self._check(uv, times)
        shape = times[0].shape
        flat = (uv.double().reshape(-1, 1, 2), *(time.reshape(-1).long() for time in times))
        parts = [self._answer(*some) for some in zip(*(value.split(QUERIES) for value in flat))]
        return Targets(*(torch.cat(part).squeeze(1).unflatten(0, shape) for part in zip(*parts)))

    def _answer(self, uv: Tensor, source: Tensor, target: Tensor, camera: Tensor) -> Targets:
        """The answers to queries with uv (n, 1, 2) and frames (n,), each with an axis of 1 after the first."""
        world = self._exact
        hits = world.hits(source, world.directions(source, uv))

        def point_at(frame: Tensor) -> Tensor:
            return world.to_world(frame, hits.body, world.place_at(frame, hits.body, hits.place))

        before, after = point_at(source), point_at(target)
        normal = world.normal_at(target, hits.body, hits.place, hits.normal)
        normal = world.normal_to_world(target, hits.body, normal)
        view = after - world.world_from_camera[target, None, :3, 3]
        there = world.turn_to_camera(target, view)
        uv_there = world.project(target, there, NEAR)
        inside = (there[..., 2] > NEAR) & ((uv_there >= 0) & (uv_there <= 1)).all(-1)
        free = world.distance(target, view.mT) > 1 - HIDDEN
        visible = inside & free & ((normal * view).sum(-1) < 0)
        xyz = world.to_camera(camera, after)
        known = torch.ones_like(visible)
        return Targets(
            xyz=xyz.float(),
            uv=world.project(camera, xyz, NEAR).float(),
            visibility=visible.float(),
            displacement=world.turn_to_camera(camera, after - before).float(),
            normal=world.turn_to_camera(camera, normal).float(),
            has_xyz=known,
            has_uv=xyz[..., 2] > NEAR,
            has_visibility=known,
            has_displacement=known,
            has_normal=known,
        )

    def _check(self, uv: Tensor, times: list[Tensor]) -> None:
        _require(uv.ndim >= 2 and uv.shape[-1] == 2, f"uv must have shape (..., N, 2), got {tuple(uv.shape)}")
        _require(uv.is_floating_point(), f"uv must be of a floating dtype, got {uv.dtype}")
        _require(bool(uv.isfinite().all()), "uv must be finite")
        wanted = tuple(uv.shape[:-1])
        for name, time in zip(("t_src", "t_tgt", "t_cam"), times):
            _require(time.shape == wanted, f"{name} must have shape {wanted}, got {tuple(time.shape)}")
            _require(time.dtype in INTEGERS, f"{name} must be of an integer dtype, got {time.dtype}")
            if time.numel():
                low, high = time.min().item(), time.max().item()
                inside = 0 <= low and high < self.num_frames
                _require(inside, f"{name} must be in [0, {self.num_frames}), got {low} to {high}")


def _make_world(
    layout: Layout, times: np.ndarray, body_times: np.ndarray, aspect_ratio: float, device: torch.device
) -> World:
    maps = np.stack([body.world_from_body(body_times) for body in layout.bodies], 1)
    pose, focal = layout.cameras(times)
    intrinsics = np.tile(np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 1]]), (len(times), 1, 1))
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = focal / math.sqrt(aspect_ratio), focal * math.sqrt(aspect_ratio)
    values = (
        np.stack([body.size for body in layout.bodies]),
        np.array([body.density for body in layout.bodies]),
        maps[..., :3, :],
        np.linalg.inv(maps)[..., :3, :],
        np.stack([body.wave_at(body_times) for body in layout.bodies], 1),
        intrinsics,
        pose,
    )
    kinds = tuple(str(body.kind) for body in layout.bodies)
    return World(kinds, *(torch.from_numpy(np.ascontiguousarray(value)).to(device) for value in values))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
