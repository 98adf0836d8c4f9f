"""The tensors of a scene and the rays cast into it: which surface a ray meets, and where its points are at any time."""

from typing import NamedTuple

import torch
from torch import Tensor

from fourdperf.data.scenes import shapes

__all__ = ["Hits", "World"]


class Hits(NamedTuple):
    """What P rays met first: the ray's parameter (P,), the frame (P,) and the body (P,) int64, the place (P, 3) and the
    normal (P, 3), towards the camera and not of unit length, both in the body's coordinates, the texture (P,) int64, and
    the place in it (P, 2)."""

    distance: Tensor
    frame: Tensor
    body: Tensor
    place: Tensor
    normal: Tensor
    texture: Tensor
    texture_place: Tensor


class World(NamedTuple):
    """T frames of K bodies, the room first, in one floating dtype on one device.

    kinds            K names of shapes
    size, density    (K, 3) half extents, (K,) textures per unit of length
    world_from_body  (T, K, 3, 4) affine maps, and body_from_world their inverses
    wave             (T, K, 3) amplitude, number and phase of a sheet
    intrinsics, world_from_camera  (T, 3, 3), (T, 4, 4), see fourdperf.data.queries
    """

    kinds: tuple[str, ...]
    size: Tensor
    density: Tensor
    world_from_body: Tensor
    body_from_world: Tensor
    wave: Tensor
    intrinsics: Tensor
    world_from_camera: Tensor

    def directions(self, frame: Tensor, uv: Tensor) -> Tensor:
        """Rays through `uv` (G, R, 2) of the frames `frame` (G,): (G, 3, R) in the world, one unit deep in the camera."""
        k = self.intrinsics[frame]
        x = (uv[..., 0] - k[:, None, 0, 2]) / k[:, None, 0, 0]
        y = (uv[..., 1] - k[:, None, 1, 2]) / k[:, None, 1, 1]
        return self.world_from_camera[frame, :3, :3] @ torch.stack([x, y, torch.ones_like(x)], 1)

    def _cast(self, frame: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first hits of rays from the cameras of `frame` (G,) along `direction` (G, 3, R): distance (G, R),
        body (G, R), and the rays in the coordinates of every body, origins (G, K, 3) and directions (G, K, 3, R)."""
        maps = self.body_from_world[frame]
        groups, bodies = maps.shape[:2]
        camera = self.world_from_camera[frame, :3, 3]
        origins = (maps[..., :3] @ camera[:, None, :, None])[..., 0] + maps[..., 3]
        directions = (maps[..., :3].reshape(groups, 3 * bodies, 3) @ direction).view(groups, bodies, 3, -1)
        for k, kind in enumerate(self.kinds):
            wave = self.wave[frame, k] if kind == "sheet" else None
            s = shapes.hit(kind, origins[:, k, :, None], directions[:, k], wave)
            if k == 0:
                distance, body = s, torch.zeros_like(s, dtype=torch.int64)
            else:
                closer = s < distance
                distance, body = torch.where(closer, s, distance), torch.where(closer, k, body)
        return distance, body, origins, directions

    def distance(self, frame: Tensor, direction: Tensor) -> Tensor:
        """How far rays from the cameras of `frame` (G,) go along `direction` (G, 3, R), in units of it: (G, R)."""
        return self._cast(frame, direction)[0]

    def hits(self, frame: Tensor, direction: Tensor) -> Hits:
        """What rays from the cameras of `frame` (G,) along `direction` (G, 3, R) meet, P = G R of them in this order."""
        distance, body, origins, directions = self._cast(frame, direction)
        rays = distance.shape[1]
        distance, body = distance.flatten(), body.flatten()
        place, normal = distance.new_empty(len(body), 3), distance.new_empty(len(body), 3)
        texture, texture_place = torch.empty_like(body), distance.new_empty(len(body), 2)
        for k, kind in enumerate(self.kinds):
            index = (body == k).nonzero()[:, 0]
            group = index // rays
            # Flat indices are several times as fast here as a gather along two axes.
            first = (group * len(self.kinds) + k) * (3 * rays) + index % rays
            flat = directions.reshape(-1)
            ray = torch.stack([flat[first], flat[first + rays], flat[first + 2 * rays]], 1)
            here = origins[:, k].index_select(0, group) + distance[index, None] * ray
            wave = self.wave[:, k].index_select(0, frame[group]) if kind == "sheet" else None
            towards, drawn, face = shapes.surface(kind, here, wave, self.size[k])
            if kind == "sheet":
                towards = torch.where((towards * ray).sum(1, keepdim=True) > 0, -towards, towards)
            place[index], normal[index] = here, towards
            texture[index] = face if k == 0 else k + 5
            texture_place[index] = drawn * self.density[k] + 0.37 * face[:, None]
        return Hits(distance, frame.repeat_interleave(rays), body, place, normal, texture, texture_place)

    def place_at(self, frame: Tensor, body: Tensor, place: Tensor) -> Tensor:
        """The coordinates in its body, at the time of `frame` (P,), of the surface points that are or were at `place`."""
        if "sheet" not in self.kinds:
            return place
        height, _ = shapes.wave_at(place[:, 0], self._of(self.wave, frame, body))
        z = torch.where(self._waves(body), height, place[:, 2])
        return torch.cat([place[:, :2], z[:, None]], 1)

    def normal_at(self, frame: Tensor, body: Tensor, place: Tensor, normal: Tensor) -> Tensor:
        """What becomes of normals (P, 3) of bodies at `place` (P, 3) at the time of `frame` (P,); their side stays."""
        if "sheet" not in self.kinds:
            return normal
        _, slope = shapes.wave_at(place[:, 0], self._of(self.wave, frame, body))
        x = torch.where(self._waves(body), -slope * normal[:, 2].sign(), normal[:, 0])
        return torch.cat([x[:, None], normal[:, 1:]], 1)

    def _waves(self, body: Tensor) -> Tensor:
        return torch.tensor([kind == "sheet" for kind in self.kinds], device=body.device)[body]

    def to_world(self, frame: Tensor, body: Tensor, place: Tensor) -> Tensor:
        """Points `place` (P, 3) of bodies, in the world at the time of `frame` (P,): (P, 3)."""
        maps = self._of(self.world_from_body, frame, body)
        return _combine(place, maps[..., :3].mT) + maps[..., 3]

    def normal_to_world(self, frame: Tensor, body: Tensor, normal: Tensor) -> Tensor:
        """Normals (P, 3) of bodies, of unit length in the world at the time of `frame` (P,): (P, 3)."""
        turned = _combine(normal, self._of(self.body_from_world, frame, body)[..., :3])
        return turned / turned.square().sum(1, keepdim=True).sqrt()

    def to_camera(self, frame: Tensor, point: Tensor) -> Tensor:
        """Points (P, 3) of the world in the cameras of `frame` (P,)."""
        return self.turn_to_camera(frame, point - self.world_from_camera[:, :3, 3].index_select(0, frame))

    def turn_to_camera(self, frame: Tensor, vector: Tensor) -> Tensor:
        """Directions (P, 3) of the world in the cameras of `frame` (P,)."""
        return _combine(vector, self.world_from_camera.index_select(0, frame)[:, :3, :3])

    def project(self, frame: Tensor, point: Tensor, near: float) -> Tensor:
        """Where points (P, 3) of the cameras of `frame` (P,) appear, (P, 2); those nearer than `near` count as there."""
        focal = self.intrinsics.diagonal(dim1=1, dim2=2)[:, :2].index_select(0, frame)
        centre = self.intrinsics[:, :2, 2].index_select(0, frame)
        return focal * point[:, :2] / point[:, 2:].clamp(min=near) + centre

    def _of(self, table: Tensor, frame: Tensor, body: Tensor) -> Tensor:
        """The rows (P, ...) of a table (T, K, ...); several times as fast as table[frame, body]."""
        return table.flatten(0, 1).index_select(0, frame * len(self.kinds) + body)


def _combine(weight: Tensor, rows: Tensor) -> Tensor:
    """weight (P, 3) times the rows of rows (P, 3, n): (P, n). A batched matmul takes several times as long."""
    return weight[:, :1] * rows[:, 0] + weight[:, 1:2] * rows[:, 1] + weight[:, 2:] * rows[:, 2]
