"""Smooth motions that stay in bounds for ever: sums of slow sines, and the rotations and cameras made of them.

The world has y pointing down, as OpenCV cameras have, so a level camera is the identity.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["Drift", "axis_rotations", "look_at", "random_rotation"]


@dataclass(frozen=True)
class Drift:
    """centre (n,) + sum_i amplitude_i sin(rate_i t + phase_i), the waves (waves, n); never further from its centre
    than the sum of the amplitudes, for any t."""

    centre: np.ndarray
    amplitude: np.ndarray
    rate: np.ndarray
    phase: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, centre, reach, rates=(0.8, 3.0), waves: int = 2) -> "Drift":
        """A path around `centre` (n,) within `reach` (n,) of it, with the rates of its sines in radians per second."""
        centre = np.atleast_1d(np.asarray(centre, np.float64))
        share = rng.uniform(0.3, 1.0, (waves, len(centre))) * rng.choice([-1, 1], (waves, len(centre)))
        amplitude = share / np.abs(share).sum(0) * np.asarray(reach, np.float64)
        shape = amplitude.shape
        return cls(centre, amplitude, rng.uniform(*rates, shape), rng.uniform(0, 2 * np.pi, shape))

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """times (T,) -> (T, n)."""
        angles = self.rate * times[:, None, None] + self.phase
        return self.centre + (self.amplitude * np.sin(angles)).sum(1)


def axis_rotations(axis: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotations by `angles` (T,), radians, about the unit vector `axis` (3,): (T, 3, 3), Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(angles)[:, None, None], np.cos(angles)[:, None, None]
    return np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random rotation (3, 3): a random unit quaternion."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def look_at(position: np.ndarray, target: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """world_from_camera (T, 4, 4) of cameras at `position` (T, 3) looking at `target` (T, 3), rolled by `roll` (T,)."""
    forward = target - position
    forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    cosine, sine = np.cos(roll)[:, None], np.sin(roll)[:, None]
    pose = np.tile(np.eye(4), (len(position), 1, 1))
    pose[:, :3, 0] = cosine * right + sine * down
    pose[:, :3, 1] = cosine * down - sine * right
    pose[:, :3, 2] = forward
    pose[:, :3, 3] = position
    return pose
