"""Foreign cameras brought to this project's conventions (``fourdperf.data.queries``), in numpy.

What is asked for here of every reader's cameras: finite numbers, focal lengths above 0, no skew, rotations that rotate.
"""

from typing import Literal

import numpy as np

__all__ = [
    "OPENCV_FROM_BLENDER",
    "PixelCentre",
    "check_poses",
    "normalise_intrinsics",
    "quaternion_from_rotation",
    "rotation_from_quaternion",
]

PixelCentre = Literal["half", "integer"]

# Blender's and OpenGL's cameras look along -z with y up; OpenCV's along z with y down.
OPENCV_FROM_BLENDER = np.diag([1.0, -1.0, -1.0, 1.0])


def normalise_intrinsics(
    matrices: np.ndarray, size: tuple[int, int] | None, name: str, centre: PixelCentre = "half"
) -> np.ndarray:
    """Pinhole matrices (..., 3, 3) made normalised: u = fx X/Z + cx in [0, 1] across the frame.

    Args:
        matrices: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels, or normalised already.
        size: (height, width) of the frames whose pixels are meant; None where they are normalised.
        name: what an error calls them.
        centre: the coordinates of the first pixel's centre: "half" is (0.5, 0.5), as in COLMAP, Blender and
            PointOdyssey, so that cx = width / 2 is the middle; "integer" is (0, 0), as in OpenCV's calibration.

    Returns:
        float64 (..., 3, 3).

    Raises:
        ValueError: a wrong shape, values that are not finite, a focal length that is not above 0, a skew, or a last row
            other than (0, 0, 1).
    """
    k = np.array(matrices, np.float64)
    if k.shape[-2:] != (3, 3):
        raise ValueError(f"{name}: wanted intrinsics (..., 3, 3), got {k.shape}")
    bad = ~np.isfinite(k).all((-1, -2))
    if bad.any():
        raise ValueError(f"{name}: intrinsics{_where(bad)} hold values that are not finite")
    bad = (k[..., 0, 0] <= 0) | (k[..., 1, 1] <= 0)
    if bad.any():
        raise ValueError(f"{name}: intrinsics{_where(bad)}: wanted focal lengths above 0, got {k[bad][0].tolist()}")
    other = np.stack([k[..., 0, 1], k[..., 1, 0], k[..., 2, 0], k[..., 2, 1], k[..., 2, 2] - 1], -1)
    bad = np.abs(other).max(-1) > 1e-6 * k[..., 0, 0]
    if bad.any():
        raise ValueError(
            f"{name}: intrinsics{_where(bad)}: wanted [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got {k[bad][0].tolist()}"
        )
    if size is not None:
        if centre not in ("half", "integer"):
            raise ValueError(f"pixel centre: wanted 'half' or 'integer', got {centre!r}")
        k[..., :2, 2] += 0.5 if centre == "integer" else 0.0
        k[..., 0, :] /= size[1]
        k[..., 1, :] /= size[0]
    return k


def check_poses(matrices: np.ndarray, name: str, tolerance: float = 1e-3) -> np.ndarray:
    """Rigid motions (..., 4, 4) as float64; rotations, rounded where they were stored, become exactly orthogonal.

    Raises:
        ValueError: a wrong shape, values that are not finite, a last row other than (0, 0, 0, 1), or a matrix whose
            rotation is farther than ``tolerance`` from a rotation in any element (a scale, a mirror image).
    """
    poses = np.array(matrices, np.float64)
    if poses.shape[-2:] != (4, 4):
        raise ValueError(f"{name}: wanted poses (..., 4, 4), got {poses.shape}")
    bad = ~np.isfinite(poses).all((-1, -2))
    if bad.any():
        raise ValueError(f"{name}: pose{_where(bad)} holds values that are not finite")
    u, _, vt = np.linalg.svd(poses[..., :3, :3])
    rotation = u @ vt
    last = poses[..., 3, :] - [0, 0, 0, 1]
    bad = np.abs(rotation - poses[..., :3, :3]).max((-1, -2)) > tolerance
    bad |= (np.linalg.det(rotation) < 0) | (np.abs(last).max(-1) > 1e-6)
    if bad.any():
        raise ValueError(f"{name}: pose{_where(bad)}: wanted a rigid motion, got {poses[bad][0].tolist()}")
    poses[..., :3, :3] = rotation
    return poses


def rotation_from_quaternion(wxyz: np.ndarray, name: str) -> np.ndarray:
    """Rotations (..., 3, 3) float64 of quaternions (..., 4), real part first, of any length but 0.

    Raises:
        ValueError: a wrong shape, values that are not finite, or a quaternion of length 0.
    """
    q = np.asarray(wxyz, np.float64)
    if q.ndim < 1 or q.shape[-1] != 4:
        raise ValueError(f"{name}: wanted quaternions (..., 4), w first, got {q.shape}")
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    bad = ~(np.isfinite(length) & (length > 1e-9))[..., 0]
    if bad.any():
        raise ValueError(f"{name}: quaternion{_where(bad)}: wanted finite numbers that are not all 0, got {q[bad][0]}")
    w, x, y, z = np.moveaxis(q / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def quaternion_from_rotation(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternions (..., 4), real part first and not negative, of rotations (..., 3, 3); the nearest one where a
    matrix is not quite a rotation.

    Source: Bar-Itzhack, J. Guidance 23(6), 2000: the leading eigenvector of a symmetric 4x4.
    """
    r = np.asarray(rotation, np.float64)
    k = np.empty((*r.shape[:-2], 4, 4))
    k[..., 0, 0] = np.trace(r, axis1=-2, axis2=-1)
    odd = r - r.swapaxes(-1, -2)
    k[..., 0, 1:] = k[..., 1:, 0] = odd[..., [2, 0, 1], [1, 2, 0]]
    k[..., 1:, 1:] = r + r.swapaxes(-1, -2) - k[..., :1, :1] * np.eye(3)
    q = np.linalg.eigh(k)[1][..., -1]
    return np.where(q[..., :1] < 0, -q, q)


def _where(bad: np.ndarray) -> str:
    """The place of the first True, in words; nothing for a single matrix."""
    return " " + ", ".join(map(str, np.argwhere(bad)[0])) if bad.ndim else ""
