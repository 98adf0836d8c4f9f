"""The shapes of a scene in their own coordinates: where rays meet them, and normals and texture places there.

    box       |x|, |y|, |z| <= 1, seen from outside          cylinder  x^2 + y^2 <= 1, |z| <= 1, with its caps
    room      the same box, seen from inside                 sphere    x^2 + y^2 + z^2 <= 1
    sheet     z = a sin(w x + p), |x|, |y| <= 1, seen from both sides; a and p change with time

An affine map per frame takes a shape into the world; when its scale changes with time the object breathes. A surface
point keeps its coordinates in the shape, so it is known in closed form at any time; a sheet's point keeps x and y, and
z follows the wave. Rays need no unit direction: the parameter s of o + s d is the same in the shape and in the world.

Solids are convex, intersections of slabs and round parts, each of which a ray passes through in one interval. A sheet's
z(s) - a sin(...) is monotone between the places where its derivative, a cosine plus a constant, is zero: all of them
are known, so the first root is never missed, and Newton's method between bounds finds it.
"""

import math

import torch
from torch import Tensor

__all__ = ["KINDS", "MAX_WAVE_NUMBER", "hit", "surface", "wave_at"]

KINDS = ("room", "box", "sphere", "cylinder", "sheet")
MAX_WAVE_NUMBER = 1.5 * math.pi  # the search for a sheet's roots below looks at three periods
NEWTON_STEPS = 12


def hit(kind: str, origin: Tensor, direction: Tensor, wave: Tensor | None) -> Tensor:
    """The first s > 0 at which the rays origin + s direction meet the shape.

    Args:
        kind: one of KINDS.
        origin: (G, 3, 1), outside of the shape, for a room inside.
        direction: (G, 3, R).
        wave: (G, 3), a sheet's amplitude a, number w <= MAX_WAVE_NUMBER and phase p; None for the others.

    Returns:
        s (G, R), infinite where there is none.
    """
    if kind == "sheet":
        return _hit_sheet(origin, direction, wave)
    if kind == "sphere":
        near, far = _round(origin, direction)
    elif kind == "cylinder":
        near, far = _meet(_round(origin[:, :2], direction[:, :2]), _slab(origin[:, 2], direction[:, 2]))
    else:
        near, far = _box(origin, direction)
    if kind == "room":
        return far
    return torch.where((near < far) & (near > 0), near, math.inf)


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of s where |origin + s direction| <= 1, one coordinate."""
    inverse = _nonzero(direction).reciprocal()
    middle, half = -origin * inverse, inverse.abs()
    return middle - half, middle + half


def _round(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The interval of s where a ray is in the unit ball or disc, coordinates along axis 1; near > far for a miss."""
    scale = _nonzero(direction.square().sum(1)).reciprocal()
    middle = -(origin * direction).sum(1) * scale
    # The distance of the whole ray from the centre: no cancellation, unlike b^2 - ac of the textbook.
    room = 1 - (origin + middle[:, None] * direction).square().sum(1)
    half = torch.where(room > 0, (room.clamp(min=0) * scale).sqrt(), -math.inf)
    return middle - half, middle + half


def _meet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def _box(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    near, far = _slab(origin, direction)
    return near.amax(1), far.amin(1)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-18, 1e-18, x)


def _hit_sheet(origin: Tensor, direction: Tensor, wave: Tensor) -> Tensor:
    groups, _, rays = direction.shape
    flat = torch.ones_like(wave)
    flat[:, 2] = wave[:, 0].clamp(min=1e-6)  # the box that the wave fills
    near, far = _box(origin / flat[..., None], direction / flat[..., None])
    index = ((near < far) & (far > 0)).flatten().nonzero()[:, 0]
    group = index // rays
    o, (a, w, p) = origin[group, :, 0], wave[group].unbind(1)
    d = direction.transpose(1, 2).reshape(-1, 3)[index]
    start, end = near.flatten()[index].clamp(min=0), far.flatten()[index]
    angle, turn = w * o[:, 0] + p, _nonzero(w * d[:, 0])  # the sine's argument is angle + turn s

    def height(s: Tensor) -> Tensor:
        """How far above the wave the ray is at s (..., n)."""
        return o[:, 2] + s * d[:, 2] - a * torch.sin(angle + turn * s)

    flat_spot = torch.acos((d[:, 2] / _nonzero(a * turn)).clamp(-1, 1))
    base = p - torch.remainder(p + math.pi, 2 * math.pi) + math.pi  # the multiple of 2 pi next to the phase
    spots = [base + 2 * math.pi * m + sign * flat_spot for m in (-1, 0, 1) for sign in (-1, 1)]
    knots = [start, end] + [torch.clamp((spot - angle) / turn, start, end) for spot in spots]
    knots = torch.stack(knots).sort(0).values  # (8, n)
    above = height(knots) > 0
    crossing = above[1:] != above[:-1]
    first = crossing.to(torch.uint8).argmax(0, keepdim=True)
    low, high = knots.gather(0, first)[0], knots.gather(0, first + 1)[0]
    rising = ~above.gather(0, first)[0]
    s = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        value = height(s)
        before = (value < 0) == rising
        low, high = torch.where(before, s, low), torch.where(before, high, s)
        step = s - value / _nonzero(d[:, 2] - a * turn * torch.cos(angle + turn * s))
        s = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
    out = direction.new_full((groups * rays,), math.inf)
    out[index] = torch.where(crossing.any(0) & (s > 0), s, math.inf)
    return out.view(groups, rays)


def wave_at(x: Tensor, wave: Tensor) -> tuple[Tensor, Tensor]:
    """Height z and slope dz/dx of sheets with the waves (..., 3) at `x` (...)."""
    a, w, p = wave.unbind(-1)
    return a * torch.sin(w * x + p), a * w * torch.cos(w * x + p)


def surface(kind: str, place: Tensor, wave: Tensor | None, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the surface is like at `place` (n, 3), points on it in the shape's coordinates.

    Args:
        wave: (n, 3) or None, see `hit`.
        size: (3,) half extents of the shape in the world, so that textures are not stretched.

    Returns:
        normals (n, 3) in the shape's coordinates, not of unit length, outward (a room's inward, a sheet's towards +z);
        places in the texture (n, 2), in units of the world; and which face (n,) int64.
    """
    x, y, z = place.unbind(1)
    if kind in ("room", "box"):
        axis = place.abs().argmax(1)
        value = place.gather(1, axis[:, None])
        sign = torch.where(value > 0, 1.0, -1.0).to(place.dtype)
        normal = torch.zeros_like(place).scatter_(1, axis[:, None], -sign if kind == "room" else sign)
        # Walls are drawn upright: (z, y), (x, z), (x, y) across the faces of x, y, z.
        others = torch.tensor([[2, 1], [0, 2], [0, 1]], device=place.device)[axis]
        return normal, (place * size).gather(1, others), 2 * axis + (value[:, 0] > 0)
    if kind == "sheet":
        _, slope = wave_at(x, wave)
        normal = torch.stack([-slope, torch.zeros_like(x), torch.ones_like(x)], 1)
        return normal, place[:, :2] * size[:2], torch.zeros_like(x, dtype=torch.int64)
    # Round sides: both halves of the turn mirror each other, so that there is no seam.
    turn = torch.atan2(y, x).abs() * (size[0] + size[1]) / 2
    if kind == "sphere":
        latitude = torch.asin(z.clamp(-1, 1)) * size[2]
        return place, torch.stack([turn, latitude], 1), torch.zeros_like(x, dtype=torch.int64)
    cap = z.square() > x.square() + y.square()
    zero = torch.zeros_like(x)
    normal = torch.where(cap[:, None], torch.stack([zero, zero, z], 1), torch.stack([x, y, zero], 1))
    side = torch.stack([turn, z * size[2]], 1)
    return normal, torch.where(cap[:, None], place[:, :2] * size[:2], side), cap * (1 + (z > 0).to(torch.int64))
