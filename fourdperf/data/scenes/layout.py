"""What is in the scene of a seed, and how it and the camera move: everything random about the geometry.

A room with the camera on a ring around its middle, looking across it, and two to six objects inside the ring. Each path
is a sum of slow sines within known bounds, so that, however long the clip, the camera stays at least 0.4 away from
the walls and from every object. Objects may pass through each other.
"""

from dataclasses import dataclass

import numpy as np

from fourdperf.data.scenes.motion import Drift, axis_rotations, look_at, random_rotation
from fourdperf.data.scenes.shapes import MAX_WAVE_NUMBER

__all__ = ["Body", "Layout"]

REACH = 1.75  # objects keep to this distance of the room's vertical axis
SOLIDS = ("box", "sphere", "cylinder")


@dataclass(frozen=True)
class Body:
    """A shape and its motion: it drifts, turns, and may breathe or wave.

    kind     one of `shapes.KINDS`
    size     half extents (3,)
    density  textures per unit of length on its surface
    stretch  factors (3,) of the size over time
    wave     amplitude, number and phase (3,) of a sheet over time, less `wave_speed` t in the phase
    """

    kind: str
    size: np.ndarray
    density: float
    path: Drift
    orientation: np.ndarray
    axis: np.ndarray
    turn: Drift
    turn_speed: float
    stretch: Drift
    wave: Drift
    wave_speed: float

    def world_from_body(self, times: np.ndarray) -> np.ndarray:
        """times (T,) -> affine maps (T, 4, 4) from the shape's coordinates."""
        maps = np.tile(np.eye(4), (len(times), 1, 1))
        rotation = axis_rotations(self.axis, self.turn(times)[:, 0] + self.turn_speed * times) @ self.orientation
        maps[:, :3, :3] = rotation * (self.size * self.stretch(times))[:, None, :]
        maps[:, :3, 3] = self.path(times)
        return maps

    def wave_at(self, times: np.ndarray) -> np.ndarray:
        """times (T,) -> amplitude, number and phase (T, 3) of the wave, zeros unless it is a sheet."""
        return self.wave(times) - self.wave_speed * times[:, None] * [0, 0, 1]


@dataclass(frozen=True)
class Layout:
    """The bodies, the room first; the camera's way around the room's middle; the light.

    orbit   angle, radius and height of the camera, the angle growing by `orbit_speed` per second
    target  what the camera looks at
    lens    roll in radians and log focal length, in units of the geometric mean of the frame's width and height
    light   unit vector towards the light
    """

    bodies: tuple[Body, ...]
    orbit: Drift
    orbit_speed: float
    target: Drift
    lens: Drift
    light: np.ndarray

    @classmethod
    def random(cls, seed: int) -> "Layout":
        rng = np.random.default_rng((seed, 0))
        half = rng.uniform((3.6, 1.7, 3.6), (5.0, 2.5, 5.0))
        bodies = [_still("room", half, 1 / rng.uniform(2.5, 5), np.zeros(3), np.eye(3))]
        for _ in range(rng.integers(2, 7)):
            bodies.append(_random_body(rng, half, bodies[1:]))
        start = (rng.uniform(0, 2 * np.pi), rng.uniform(2.6, 2.9), rng.uniform(-0.8, 0.5))
        light = np.array([rng.uniform(-0.7, 0.7), -1, rng.uniform(-0.7, 0.7)])
        return cls(
            bodies=tuple(bodies),
            orbit=Drift.random(rng, start, (0.15, 0.3, 0.35)),
            orbit_speed=rng.uniform(0.15, 0.9) * rng.choice([-1, 1]),
            target=Drift.random(rng, rng.uniform(-0.6, 0.6, 3), (0.3, 0.25, 0.3)),
            lens=Drift.random(rng, (0, rng.uniform(np.log(0.7), np.log(1.4))), (0.12, rng.uniform(0, 0.15))),
            light=light / np.linalg.norm(light),
        )

    def cameras(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """times (T,) -> world_from_camera (T, 4, 4) and focal lengths (T,)."""
        angle, radius, height = self.orbit(times).T
        angle = angle + self.orbit_speed * times
        roll, log_focal = self.lens(times).T
        position = np.stack([radius * np.cos(angle), height, radius * np.sin(angle)], 1)
        return look_at(position, self.target(times), roll), np.exp(log_focal)


def _still(kind: str, size: np.ndarray, density: float, home: np.ndarray, orientation: np.ndarray) -> Body:
    """A body that never moves."""

    def constant(value):
        value = np.asarray(value, np.float64)
        return Drift(value, *np.zeros((3, 1, len(value))))

    return Body(
        kind=kind,
        size=size,
        density=density,
        path=constant(home),
        orientation=orientation,
        axis=np.array([0.0, 1.0, 0.0]),
        turn=constant([0]),
        turn_speed=0.0,
        stretch=constant([1, 1, 1]),
        wave=constant([0, 0, 0]),
        wave_speed=0.0,
    )


def _random_body(rng: np.random.Generator, room: np.ndarray, others: list[Body]) -> Body:
    kind = rng.choice(["box", "sphere", "cylinder", "sheet"], p=[0.3, 0.28, 0.2, 0.22])
    density = 1 / rng.uniform(0.7, 1.6)
    radius = rng.uniform(0.4, 0.85)  # of a ball around it at its largest
    breathes = kind in SOLIDS and rng.random() < 0.3
    breath = rng.uniform(0.15, 0.35, 3) if breathes else np.zeros(3)
    shape = rng.uniform(0.5, 1, 3)
    if kind == "sheet":
        shape[2] = shape[0]
    extent = {"sphere": shape.max(), "cylinder": np.hypot(shape[:2].max(), shape[2])}.get(kind, np.linalg.norm(shape))
    size = shape * radius / extent / (1 + breath.max())
    if kind in SOLIDS and not breathes and rng.random() < 0.25:
        floor = room[1] - size[2]
        home = _home(rng, (REACH - radius, 0), others, floor)
        lying = axis_rotations(np.array([1.0, 0, 0]), np.array([np.pi / 2]))[0]  # z, a cylinder's axis, becomes y
        yaw = axis_rotations(np.array([0, 1.0, 0]), rng.uniform(0, 2 * np.pi, 1))[0]
        return _still(kind, size, density, home, yaw @ lying)
    reach = rng.uniform(0.1, 0.5) * rng.dirichlet(np.ones(3)) ** 0.5  # a vector of this length
    across = REACH - radius - np.hypot(reach[0], reach[2])
    home = _home(rng, (across, min(0.9, room[1] - 0.05 - radius - reach[1])), others)
    axis = rng.normal(size=3)
    wave_centre, wave_reach, wave_speed = np.zeros(3), np.zeros(3), 0.0
    if kind == "sheet":
        wave_centre = np.array([rng.uniform(0.12, 0.28), rng.uniform(0.5, 1) * MAX_WAVE_NUMBER, 0])
        wave_reach[0] = 0.35 * wave_centre[0]
        wave_speed = rng.uniform(1, 4) * rng.choice([-1, 1])
    return Body(
        kind=kind,
        size=size,
        density=density,
        path=Drift.random(rng, home, reach, rates=(1.5, 4)),
        orientation=random_rotation(rng),
        axis=axis / np.linalg.norm(axis),
        turn=Drift.random(rng, [0], [0.3]),
        turn_speed=rng.uniform(-2, 2),
        stretch=Drift.random(rng, np.ones(3), breath, rates=(2, 5)),
        wave=Drift.random(rng, wave_centre, wave_reach),
        wave_speed=wave_speed,
    )


def _home(rng: np.random.Generator, bounds: tuple[float, float], others: list[Body], height: float | None = None):
    """A place within a radius and a height of the room's middle, the one of 4 that leaves most space to `others`."""
    angle, share, y = rng.uniform((0, 0, -1), (2 * np.pi, 1, 1), (4, 3)).T
    radius = bounds[0] * np.sqrt(share)
    y = y * bounds[1] if height is None else np.full(4, height)
    places = np.stack([radius * np.cos(angle), y, radius * np.sin(angle)], 1)
    if not others:
        return places[0]
    gaps = [np.linalg.norm(places - body.path.centre, axis=1) - np.linalg.norm(body.size) for body in others]
    return places[np.min(gaps, 0).argmax()]
