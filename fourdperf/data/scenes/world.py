"""The tensors of a scene and the rays cast into it: which surface a ray meets, and where its points are at any time.

Rays come in G groups of R, each group from the camera of one frame, so that a frame's matrices are read once: a
rendering has G = T and R = H W, queries have R = 1. `frame` is (G,) int64 everywhere, points are (G, R, 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fourdperf.data.scenes import shapes

__all__ = ["Hits", "World"]


class Hits(NamedTuple):
    """What rays met first.

    distance       (G, R) in units of the ray's direction
    body           (G, R) int64
    place, normal  (G, R, 3) in the body's coordinates; the normal is on the camera's side and not of unit length
    texture        (G, R) int64: 0 to 5 for the faces of the room, then one for each body
    drawn          (G, R, 2) the place in the texture
    """

    distance: Tensor
    body: Tensor
    place: Tensor
    normal: Tensor
    texture: Tensor
    drawn: Tensor


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
        """Rays through `uv` (G, R, 2), R or 1, (G, 3, R) in the world, one unit deep in the camera."""
        focal, centre = self._lens(frame)
        x, y = ((uv - centre) / focal).unbind(-1)
        return self.world_from_camera[frame, :3, :3] @ torch.stack([x, y, torch.ones_like(x)], 1)

    def distance(self, frame: Tensor, direction: Tensor) -> Tensor:
        """How far rays along `direction` (G, 3, R) go, in units of it: (G, R)."""
        return self._cast(frame, direction)[0]

    def hits(self, frame: Tensor, direction: Tensor) -> Hits:
        """What rays along `direction` (G, 3, R) meet."""
        distance, body, origins, directions = self._cast(frame, direction)
        bodies, rays = directions.shape[1], directions.shape[3]
        directions = directions.flatten()
        place, normal = distance.new_empty(*distance.shape, 3), distance.new_empty(*distance.shape, 3)
        texture, drawn = torch.empty_like(body), distance.new_empty(*distance.shape, 2)
        for k, kind in enumerate(self.kinds):
            group, ray = (body == k).nonzero(as_tuple=True)
            index = group * rays + ray
            first = group * (3 * bodies * rays) + ray + 3 * k * rays
            along = torch.stack([directions[first + i * rays] for i in range(3)], 1)
            here = origins[:, k][group] + distance.flatten()[index, None] * along
            wave = self.wave[:, k][frame[group]] if kind == "sheet" else None
            towards, mark, face = shapes.surface(kind, here, wave, self.size[k])
            if kind == "sheet":
                towards = torch.where((towards * along).sum(1, keepdim=True) > 0, -towards, towards)
            place.view(-1, 3)[index] = here
            normal.view(-1, 3)[index] = towards
            texture.view(-1)[index] = face if k == 0 else k + 5
            drawn.view(-1, 2)[index] = mark * self.density[k] + 0.37 * face[:, None]
        return Hits(distance, body, place, normal, texture, drawn)

    def _cast(self, frame: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first hits of rays along `direction` (G, 3, R): distance (G, R), body (G, R), and the rays in the
        coordinates of every body, origins (G, K, 3) and directions (G, K, 3, R)."""
        groups, bodies = len(frame), len(self.kinds)
        maps = self.body_from_world[frame].view(groups, 3 * bodies, 4)
        camera = self.world_from_camera[frame, :3, 3:]
        origins = torch.baddbmm(maps[..., 3:], maps[..., :3], camera).view(groups, bodies, 3)
        directions = (maps[..., :3] @ direction).view(groups, bodies, 3, direction.shape[2])
        for k, kind in enumerate(self.kinds):
            wave = self.wave[:, k][frame] if kind == "sheet" else None
            s = shapes.hit(kind, origins[:, k, :, None], directions[:, k], wave)
            if k == 0:
                distance, body = s, torch.zeros_like(s, dtype=torch.int64)
            else:
                body = torch.where(s < distance, k, body)
                distance = torch.minimum(s, distance)
        return distance, body, origins, directions

    def place_at(self, frame: Tensor, body: Tensor, place: Tensor) -> Tensor:
        """The coordinates in their `body`, at the time of `frame`, of points that are at `place` at some time."""
        if "sheet" not in self.kinds:
            return place
        height, _ = shapes.wave_at(place[..., 0], self._of_body(self.wave, frame, body))
        z = torch.where(self._waves(body), height, place[..., 2])
        return torch.cat([place[..., :2], z[..., None]], -1)

    def normal_at(self, frame: Tensor, body: Tensor, place: Tensor, normal: Tensor) -> Tensor:
        """What becomes of the `normal` (G, R, 3) at `place` in its `body` at the time of `frame`; its side stays."""
        if "sheet" not in self.kinds:
            return normal
        _, slope = shapes.wave_at(place[..., 0], self._of_body(self.wave, frame, body))
        x = torch.where(self._waves(body), -slope * normal[..., 2].sign(), normal[..., 0])
        return torch.cat([x[..., None], normal[..., 1:]], -1)

    def to_world(self, frame: Tensor, body: Tensor, place: Tensor) -> Tensor:
        """Points `place` (G, R, 3) of bodies (G, R), in the world at the time of `frame`."""
        rows = self._of_body(self.world_from_body, frame, body)
        x, y, z = place[..., None].unbind(-2)
        return torch.addcmul(rows[..., 3], x, rows[..., 0]).addcmul_(y, rows[..., 1]).addcmul_(z, rows[..., 2])

    def normal_to_world(self, frame: Tensor, body: Tensor, normal: Tensor) -> Tensor:
        """Normals (G, R, 3) of bodies (G, R), of unit length in the world at the time of `frame`."""
        rows = self._of_body(self.body_from_world, frame, body)[..., :3]
        x, y, z = normal[..., None].unbind(-2)
        turned = (x * rows[..., 0, :]).addcmul_(y, rows[..., 1, :]).addcmul_(z, rows[..., 2, :])
        return turned / turned.square().sum(-1, keepdim=True).sqrt()

    def to_camera(self, frame: Tensor, point: Tensor) -> Tensor:
        """Points (G, R, 3) of the world in the cameras of `frame`."""
        return self.turn_to_camera(frame, point - self.world_from_camera[frame, None, :3, 3])

    def turn_to_camera(self, frame: Tensor, vector: Tensor) -> Tensor:
        """Directions (G, R, 3) of the world in the cameras of `frame`."""
        return vector @ self.world_from_camera[frame, :3, :3]

    def project(self, frame: Tensor, point: Tensor, near: float) -> Tensor:
        """Where points (G, R, 3) of the cameras of `frame` appear, (G, R, 2); those nearer than `near` as if there."""
        focal, centre = self._lens(frame)
        return focal * point[..., :2] / point[..., 2:].clamp(min=near) + centre

    def _lens(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Focal lengths and principal points, (G, 1, 2) each."""
        k = self.intrinsics[frame, None]
        return k.diagonal(dim1=-2, dim2=-1)[..., :2], k[..., :2, 2]

    def _of_body(self, table: Tensor, frame: Tensor, body: Tensor) -> Tensor:
        """The rows (G, R, ...) of a table (T, K, ...); several times as fast as table[frame[:, None], body]."""
        index = frame[:, None] * len(self.kinds) + body
        return table.flatten(0, 1).index_select(0, index.flatten()).view(*body.shape, *table.shape[2:])

    def _waves(self, body: Tensor) -> Tensor:
        return torch.tensor([kind == "sheet" for kind in self.kinds], device=body.device)[body]
