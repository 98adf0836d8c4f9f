"""Homographies of the plane and Moebius maps of the sphere, and images seen through them, batched and channels last.

    warp_homography(images, A)[p] = image at A p       p = (row, column, 1), rows and columns from -1 to 1
    warp_mobius(images, m)[p]     = image at m(p)      p a direction; equirectangular maps

So both read the image where the map takes the pixel: the picture moves by the inverse. In either case -1 and 1 (0 and
pi, 0 and 2 pi) are the centres of the first and last pixel.

Homographies are exponentials of a traceless matrix, coefficients (8,) in `homography_basis`. Every size of the eight is
a normal number times `spread` times `HOMOGRAPHY_SCALES`.

Moebius maps that keep the orientation are rotations after a boost: six numbers, the angles (a, b, c) of the rotation
Rz(a) Ry(b) Rz(c), and azimuth, polar angle and radius (below 1) of a point c in the ball:
    m(p) = R ( (1 - |c|^2) (p + c) / |p + c|^2 + c )
Equirectangular maps have one row per polar angle, from 0 (+z) to pi, and one column per azimuth, from 0 to 2 pi, the
ends included: the first and the last column are the same meridian.

Sources: MacDonald et al., CVPR 2022 (homNIST); Mitchel et al., SIGGRAPH 2022 and arXiv 2405.19296.
"""

import math

import torch
from torch import Tensor

from fourdperf.ops import bilinear_sample

__all__ = [
    "HOMOGRAPHY_SCALES",
    "homographies",
    "homography_basis",
    "homography_coefficients",
    "homography_positions",
    "mobius_parameters",
    "mobius_positions",
    "sample",
    "sphere_grid",
    "warp_homography",
    "warp_mobius",
]

HOMOGRAPHY_SCALES = (0.3, 0.7, 0.34, 0.7, 0.3, 0.34, 0.3, 0.3)
SPREAD, SHIFT = 0.5, 0.2


def sample(images: Tensor, positions: Tensor, *, upstream_border: bool = False) -> Tensor:
    """Images (B, H, W, C) at positions (B, N, 2), rows and columns in pixels: (B, N, C), bilinear, zero outside of
    [0, H - 1] x [0, W - 1].

    upstream_border: zero on the last row and column too, as the original has it.

    Raises:
        ValueError: shapes that do not fit, or dtypes that differ.
    """
    if images.ndim != 4 or positions.ndim != 3 or positions.shape[::2] != (images.shape[0], 2):
        raise ValueError(
            f"images, positions: wanted (B, H, W, C) and (B, N, 2), got {(*images.shape,)} and {(*positions.shape,)}"
        )
    last = torch.tensor(images.shape[1:3]).to(positions) - 1
    inside = (positions >= 0) & (positions < last if upstream_border else positions <= last)
    values = bilinear_sample(images, (positions / last.clamp(min=1)).flip(-1))
    return torch.where(inside.all(-1, keepdim=True), values, 0)


# Homographies


def homography_basis(dtype: torch.dtype = torch.float32) -> Tensor:
    """(8, 3, 3) of the traceless matrices: each entry in turn but the last, less a third of the identity on the
    diagonal."""
    basis = torch.eye(9, dtype=dtype)[:8].unflatten(1, (3, 3)).clone()
    basis[[0, 4]] -= torch.eye(3, dtype=dtype) / 3
    return basis


def homographies(coefficients: Tensor) -> Tensor:
    """Coefficients (..., 8) in `homography_basis` -> matrices (..., 3, 3) of determinant 1."""
    basis = homography_basis(torch.float64).to(coefficients.device)
    algebra = torch.einsum("...k,kij->...ij", coefficients.double(), basis)
    # torch takes series by the batch in float32, so that a matrix would depend on its neighbours, up to 4e-6
    return torch.linalg.matrix_exp(algebra).to(coefficients.dtype)


def homography_coefficients(normal: Tensor, spread: float = SPREAD) -> Tensor:
    """Coefficients (..., 8) from as many normal numbers; see the module."""
    return normal * spread * torch.tensor(HOMOGRAPHY_SCALES).to(normal)


def homography_positions(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Where matrices (..., 3, 3) take the pixels of an image (H, W): (..., H W, 2), rows and columns in pixels."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=matrices.dtype, device=matrices.device) for n in size)
    points = torch.cartesian_prod(rows, columns, torch.ones(1).to(rows))
    seen = points @ matrices.mT
    return (seen[..., :2] / seen[..., 2:] + 1) / 2 * (torch.tensor(size).to(seen) - 1)


def warp_homography(images: Tensor, matrices: Tensor, *, upstream_border: bool = False) -> Tensor:
    """Images (B, H, W, C) seen through matrices (B, 3, 3). What lies outside has the least value of the image's
    channel, its background; see `sample` for the option."""
    positions, background = homography_positions(matrices, images.shape[1:3]), images.amin((1, 2), keepdim=True)
    seen = sample(images - background, positions, upstream_border=upstream_border)
    return seen.unflatten(1, images.shape[1:3]) + background


# Moebius maps


def sphere_grid(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The directions (H, W, 3) of an equirectangular map's pixels."""
    polar = torch.linspace(0, math.pi, size[0], dtype=dtype)[:, None]
    azimuth = torch.linspace(0, 2 * math.pi, size[1], dtype=dtype)[None]
    return torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos() + 0 * azimuth], -1)


def mobius_parameters(uniform: Tensor, shift: float = SHIFT, *, upstream_angles: bool = False) -> Tensor:
    """Six numbers of a map from six in [0, 1): (..., 6); the radius is below `shift`.

    Rotations and directions are uniform. upstream_angles: angles are, as in the original, which is denser at the poles.

    Raises:
        ValueError: `shift` is not in [0, 1).
    """
    if not 0 <= shift < 1:
        raise ValueError(f"shift: wanted a radius in [0, 1), got {shift}")
    turn = 2 * math.pi
    parameters = uniform * torch.tensor([turn, math.pi, turn, turn, math.pi, shift]).to(uniform)
    if not upstream_angles:
        polar = [1, 4]
        parameters[..., polar] = torch.arccos(1 - 2 * uniform[..., polar])
    return parameters


def mobius_positions(parameters: Tensor, size: tuple[int, int]) -> Tensor:
    """Where maps (..., 6) take the pixels of an equirectangular map (H, W): (..., H W, 2), rows and columns in
    pixels."""
    a, b, c, azimuth, polar, radius = parameters.unbind(-1)
    centre = radius * torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()])
    centre = centre.movedim(0, -1)[..., None, :]
    moved = sphere_grid(size, parameters.dtype).to(parameters.device).flatten(0, 1) + centre
    boosted = (1 - centre.square().sum(-1, True)) * moved / moved.square().sum(-1, True) + centre
    x, y, z = (boosted @ (_turn_z(a) @ _turn_y(b) @ _turn_z(c)).mT).unbind(-1)
    rows = torch.atan2(torch.hypot(x, y), z) / math.pi * (size[0] - 1)
    columns = torch.atan2(y, x) / (2 * math.pi) % 1 * (size[1] - 1)
    return torch.stack([rows, columns], -1).clamp(min=0).minimum(torch.tensor(size).to(rows) - 1)


def warp_mobius(images: Tensor, parameters: Tensor) -> Tensor:
    """Equirectangular maps (B, H, W, C) seen through the maps (B, 6)."""
    return sample(images, mobius_positions(parameters, images.shape[1:3])).unflatten(1, images.shape[1:3])


def _turn_z(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, one]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _turn_y(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [[angle.cos(), zero, angle.sin()], [zero, one, zero], [-angle.sin(), zero, angle.cos()]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
