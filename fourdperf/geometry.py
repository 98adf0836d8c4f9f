"""Cameras and rigid motions, batched: projection, similarity transforms and their best fit, intrinsics from points.

Conventions are those of :mod:`fourdperf.data.queries`: OpenCV cameras, depth is z, normalised intrinsics, and matrices
named target_from_source. Leading axes are free everywhere and broadcast. Points are `(..., N, 3)`. Autocast changes
nothing here: positions do not survive bfloat16.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fourdperf.ops.checks import no_autocast

__all__ = [
    "Sim3",
    "distort",
    "fit_distortion",
    "invert_rigid",
    "nearest_rotation",
    "pinhole_intrinsics",
    "project",
    "relative_pose",
    "rigid",
    "rotation_angle",
    "transform",
    "umeyama",
    "unproject",
]

NEAR = 1e-6
SWEEPS = {torch.float32: 4, torch.float64: 5}  # one more than rounding needed, over 180,000 matrices of nine kinds
DISTORTION_STEPS = 20


def _full_precision(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(first, *args, **kwargs):
        device = (first if isinstance(first, Tensor) else first.rotation).device.type
        with no_autocast(device):
            return function(first, *args, **kwargs)

    return wrapped


# Cameras


def project(points: Tensor, intrinsics: Tensor, distortion: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where a camera sees points of its own coordinates: uv `(..., N, 2)` and depth `(..., N)`.

    Args:
        points: `(..., N, 3)`.
        intrinsics: `(..., 3, 3)`; skew is ignored. In pixels in place of normalised, uv are pixels too.
        distortion: `(..., 2)`, as in :func:`distort`.

    A point with z < 1e-6 is not seen: its depth says so, and its uv, taken with z = 1e-6, means nothing but is finite,
    with finite gradients.
    """
    depth = points[..., 2]
    xy = points[..., :2] / depth.clamp_min(NEAR)[..., None]
    if distortion is not None:
        xy = distort(xy, distortion)
    return xy * _focal(intrinsics) + _centre(intrinsics), depth


def unproject(uv: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
    """The points `(..., N, 3)` that a camera sees at uv `(..., N, 2)` in depth `(..., N)`; the inverse of `project`."""
    xy = (uv - _centre(intrinsics)) / _focal(intrinsics)
    return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1) * depth[..., None]


def distort(xy: Tensor, distortion: Tensor) -> Tensor:
    """Radial distortion of xy = (X/Z, Y/Z) `(..., N, 2)`: xy (1 + k1 r^2 + k2 r^4), with (k1, k2) `(..., 2)`.

    These are OpenCV's k1 and k2, and COLMAP's RADIAL model where fx = fy in pixels.
    """
    squared = xy.square().sum(-1, keepdim=True)
    k1, k2 = distortion[..., None, :].split(1, dim=-1)
    return xy * (1 + squared * (k1 + squared * k2))


def pinhole_intrinsics(points: Tensor, uv: Tensor, weights: Tensor | None = None) -> Tensor:
    """Normalised intrinsics `(..., 3, 3)` of a camera that sees points `(..., N, 3)` of its own coordinates at uv
    `(..., N, 2)`, with the principal point in the middle of the frame.

    fx is the median of z (u - 0.5) / x, and fy that of z (v - 0.5) / y, over the points in front of the camera with a
    positive weight `(..., N)` for which the quotient exists (of an even number, the lower of the two in the middle).
    NaN where there is no such point. Source: D4RT (arXiv 2512.08924), section 3.2.
    """
    usable = points[..., 2] > 0
    if weights is not None:
        usable = usable & (weights > 0)
    quotient = points[..., 2:] * (uv - 0.5) / points[..., :2]
    exists = usable[..., None] & quotient.isfinite() & (quotient != 0)
    focal = torch.where(exists, quotient, torch.nan).nanmedian(dim=-2).values
    return _intrinsics(focal)


@_full_precision
def fit_distortion(
    points: Tensor, uv: Tensor, intrinsics: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Refines the focal lengths and fits radial distortion: intrinsics `(..., 3, 3)` and (k1, k2) `(..., 2)` that make
    `project(points, intrinsics, distortion)` meet uv.

    Twenty Gauss-Newton steps from ``intrinsics`` (of :func:`pinhole_intrinsics`, say) without distortion, on residuals
    under Cauchy weights, so that outliers count little, times ``weights`` `(..., N)`. The principal point stays.
    The paper speaks of a "non-linear refinement" and no more; this is ours. NaN intrinsics stay NaN.
    """
    usable = points[..., 2] > NEAR
    weights = usable.to(points.dtype) * (1 if weights is None else weights)
    xy = points[..., :2] / points[..., 2:].clamp_min(NEAR)
    squared = xy.square().sum(-1, keepdim=True)
    wanted = uv - _centre(intrinsics)
    theta = torch.cat([_focal(intrinsics)[..., 0, :], torch.zeros_like(intrinsics[..., 0, :2])], dim=-1)
    for _ in range(DISTORTION_STEPS):
        focal, k = theta[..., None, :2], theta[..., 2:]
        factor = 1 + squared * (k[..., None, :1] + squared * k[..., None, 1:])
        residual = wanted - focal * xy * factor
        along_focal = torch.diag_embed(xy * factor)
        along_k = torch.stack([focal * xy * squared, focal * xy * squared.square()], dim=-1)
        jacobian = torch.cat([along_focal, along_k], dim=-1)  # (..., N, 2, 4)
        theta = theta + _weighted_step(jacobian, residual, weights)
    return _intrinsics(theta[..., :2], _centre(intrinsics)[..., 0, :]), theta[..., 2:]


def _weighted_step(jacobian: Tensor, residual: Tensor, weights: Tensor) -> Tensor:
    distance = residual.square().sum(-1).sqrt()
    typical = torch.where(weights > 0, distance, torch.nan).nanmedian(dim=-1, keepdim=True).values
    spread = (3 * typical.nan_to_num()).clamp_min(1e-4)  # below 1e-4 of a frame there is nothing to tell apart
    weights = weights / (1 + (distance / spread).square())
    normal = torch.einsum("...n,...nci,...ncj->...ij", weights, jacobian, jacobian)
    right = torch.einsum("...n,...nci,...nc->...i", weights, jacobian, residual)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    damping = 1e-6 * diagonal + torch.finfo(normal.dtype).tiny
    return torch.linalg.solve_ex(normal + torch.diag_embed(damping), right).result


def _focal(intrinsics: Tensor) -> Tensor:
    return torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[..., None, :]


def _centre(intrinsics: Tensor) -> Tensor:
    return intrinsics[..., None, :2, 2]


def _intrinsics(focal: Tensor, centre: Tensor | float = 0.5) -> Tensor:
    diagonal = torch.cat([focal, torch.ones_like(focal[..., :1])], dim=-1)
    column = torch.cat([torch.zeros_like(focal) + centre, torch.zeros_like(focal[..., :1])], dim=-1)
    return torch.diag_embed(diagonal) + torch.stack([torch.zeros_like(column)] * 2 + [column], dim=-1)


# Motions


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """The matrix `(..., 4, 4)` of rotation `(..., 3, 3)` (or any linear map) and translation `(..., 3)`."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = torch.tensor([0, 0, 0, 1], dtype=top.dtype, device=top.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


@_full_precision
def transform(matrix: Tensor, points: Tensor) -> Tensor:
    """Points `(..., N, 3)` moved by an affine matrix `(..., 4, 4)`."""
    return points @ matrix[..., :3, :3].mT + matrix[..., None, :3, 3]


@_full_precision
def invert_rigid(pose: Tensor) -> Tensor:
    """The inverse of rigid motions `(..., 4, 4)`, by transposition."""
    rotation = pose[..., :3, :3].mT
    return rigid(rotation, -(rotation @ pose[..., :3, 3:])[..., 0])


@_full_precision
def relative_pose(world_from_a: Tensor, world_from_b: Tensor) -> Tensor:
    """a_from_b `(..., 4, 4)`, from the poses of both in the same world."""
    return invert_rigid(world_from_a) @ world_from_b


def rotation_angle(rotation: Tensor) -> Tensor:
    """The angles `(...)` of rotations `(..., 3, 3)`, radians in [0, pi], exact for small ones too."""
    axis = _vee(rotation - rotation.mT)
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.atan2(torch.linalg.vector_norm(axis, dim=-1), trace - 1)


class Sim3(NamedTuple):
    """Similarities x -> scale rotation x + translation: scale `(...)`, rotation `(..., 3, 3)`, translation `(..., 3)`.

    `a_from_c = a_from_b @ b_from_c` composes.
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Points `(..., N, 3)`, moved."""
        return transform(self.matrix(), points)

    @_full_precision
    def __matmul__(self, other: "Sim3") -> "Sim3":
        moved = (self.rotation @ other.translation[..., None])[..., 0]
        translation = self.scale[..., None] * moved + self.translation
        return Sim3(self.scale * other.scale, self.rotation @ other.rotation, translation)

    @_full_precision
    def inverse(self) -> "Sim3":
        scale, rotation = 1 / self.scale, self.rotation.mT
        return Sim3(scale, rotation, -scale[..., None] * (rotation @ self.translation[..., None])[..., 0])

    def matrix(self) -> Tensor:
        """`(..., 4, 4)`"""
        return rigid(self.scale[..., None, None] * self.rotation, self.translation)

    @_full_precision
    def pose(self, pose: Tensor) -> Tensor:
        """The pose `(..., 4, 4)` of a camera after its world was moved: its centre moves with the points, its axes
        turn, and it stays a rigid motion."""
        centre = self(pose[..., None, :3, 3])[..., 0, :]
        return rigid(self.rotation @ pose[..., :3, :3], centre)


# Best fit


@_full_precision
def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None, with_scale: bool = True) -> Sim3:
    """The similarity (or, without scale, the rigid motion) that brings ``source`` closest to ``target``: it minimises
    sum w |target - (s R source + t)|^2 over rotations R, never a reflection, t and s.

    Args:
        source, target: `(..., N, 3)`. Float16 and bfloat16 are computed, and returned, in float32.
        weights: `(..., N)`, not negative, float or bool; only their ratios matter. Points with weight 0 may hold
            anything, NaN too.

    Differentiable, with finite gradients everywhere. Where the points do not determine the answer, it is: on one line,
    the smallest of the rotations that fit; all in one place (or a single one), no rotation and scale 1, unless only
    the target is in one place, which gives scale 0; no point at all, or only weights 0, the identity.
    Source: S. Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.

    Raises:
        ValueError: shapes that do not fit.
    """
    if source.shape[-1:] != (3,) or target.shape[-1:] != (3,) or source.shape[-2] != target.shape[-2]:
        raise ValueError(f"source, target: wanted (..., N, 3) both, got {tuple(source.shape)}, {tuple(target.shape)}")
    if weights is not None and weights.shape[-1] != source.shape[-2]:
        raise ValueError(f"weights: wanted (..., {source.shape[-2]}), got {tuple(weights.shape)}")
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    source, target = source.to(dtype), target.to(dtype)
    if weights is None:
        weights = torch.ones_like(source[..., 0])
    weights = weights.to(dtype)[..., None]
    source, target = (torch.where(weights > 0, points, 0) for points in (source, target))

    total = weights.sum(-2, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)
    source_mean, target_mean = ((weights * points).sum(-2) for points in (source, target))
    source, target = source - source_mean[..., None, :], target - target_mean[..., None, :]
    covariance = target.mT @ (weights * source)
    rotation = nearest_rotation(covariance)

    scale = torch.ones_like(covariance[..., 0, 0])
    if with_scale:
        variance = (weights * source.square()).sum((-2, -1))
        along = (rotation * covariance).sum((-2, -1))
        scale = torch.where(variance > 0, along / torch.where(variance > 0, variance, 1), scale)
    moved = (rotation @ source_mean[..., None])[..., 0]
    return Sim3(scale, rotation, target_mean - scale[..., None] * moved)


@_full_precision
def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotations R `(..., 3, 3)` that maximise trace(R^T M), M = ``matrix`` `(..., 3, 3)`: the orthogonal factor of
    M where its determinant is positive, and the best rotation, with the smallest singular value's direction turned
    round, where it is negative. With singular vectors M = U S V^T, R = U diag(1, 1, det U V^T) V^T.

    One-sided Jacobi on the columns of M, all matrices of a batch at once in elementwise operations: no LAPACK call per
    matrix, and the same work whatever the numbers. On one CPU core torch.linalg.svd and a determinant are quicker below
    a thousand matrices (0.1 against 1 ms for one) and take twice as long for 20,000 (42 against 21 ms in float32).
    Singular matrices are welcome: rank 2 determines R, and of rank 1 and 0 the smallest of the best rotations is taken.
    NaN and infinity give NaN.

    Gradients are exact (implicit differentiation; also second ones) and finite: where R jumps, because s2 + s3 = 0
    (s3 with the sign of det M), the direction that M does not determine gets none.

    Raises:
        ValueError: another shape, or a dtype other than float32 and float64.
    """
    if matrix.dtype not in SWEEPS or matrix.shape[-2:] != (3, 3):
        raise ValueError(f"matrix: wanted float32 or float64 (..., 3, 3), got {matrix.dtype} {tuple(matrix.shape)}")
    return _NearestRotation.apply(matrix)


class _NearestRotation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix):
        return _jacobi_rotation(matrix)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, gradient):
        # S = R^T M is symmetric. dR = R [w]x with (tr(S) I - S) w = vee(R^T dM - dM^T R).
        matrix, rotation = ctx.saved_tensors
        stretch = rotation.mT @ matrix
        trace = stretch.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
        system = trace * eye - (stretch + stretch.mT) / 2
        pulled = rotation.mT @ gradient
        w = _damped_solve(system, trace, _vee(pulled - pulled.mT))
        return rotation @ _cross_matrix(w)


def _damped_solve(system: Tensor, trace: Tensor, right: Tensor) -> Tensor:
    """A (A^2 + d^2)^-1 b for symmetric A: A^-1 b where A's eigenvalues are above d, towards 0 where they are below."""
    info = torch.finfo(system.dtype)
    eye = torch.eye(3, dtype=system.dtype, device=system.device)
    size = trace.abs().clamp_min(info.tiny**0.25)
    unit = system / size
    damping = info.eps**1.5
    a, b, c = (unit @ unit + damping * eye).unbind(-2)
    adjugate = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-1)
    # with one eigenvalue of zero it is about the damping, and may round to anything near
    determinant = (a * adjugate[..., 0]).sum(-1)[..., None, None].clamp_min(damping)
    return (unit @ (adjugate / determinant) @ right[..., None] / size)[..., 0]


def _jacobi_rotation(matrix: Tensor) -> Tensor:
    info = torch.finfo(matrix.dtype)
    rows = matrix.reshape(-1, 9).T.reshape(3, 3, -1)  # row, column, matrix: elementwise work runs along the last
    rows = rows / rows.abs().amax((0, 1)).clamp_min(info.tiny)
    eye = torch.eye(3, dtype=rows.dtype, device=rows.device)[:, :, None].expand_as(rows)
    columns = list(torch.cat([rows, eye]).unbind(1))  # of M V above those of V
    for _ in range(SWEEPS[matrix.dtype]):
        for p, q in ((0, 1), (0, 2), (1, 2)):
            columns[p], columns[q] = _rotate(columns[p], columns[q], info.tiny)

    # The two longest columns, the longer first, their handedness kept: cyclic order, and (b, -a) for (a, b).
    columns = torch.stack(columns)
    squares = columns[:, :3].square().sum(1)
    shifts = torch.tensor([[1], [2]], device=matrix.device)
    order = (squares.argmin(0) + shifts) % 3
    first, second = columns.gather(0, order[:, None].expand(2, 6, -1))
    swap = torch.lt(*squares.gather(0, order))
    first, second = torch.where(swap, second, first), torch.where(swap, -first, second)

    (a, va), (b, vb) = first.split(3), second.split(3)
    length = torch.linalg.vector_norm(a, dim=0)
    ua = torch.where(length == 0, va, a / length.clamp_min(info.tiny))
    # Rank 1: b is noise; take vb through the smallest rotation from va to ua.
    reflected = (ua * vb).sum(0) / (1 + (ua * va).sum(0)).clamp_min(info.eps)
    is_noise = torch.linalg.vector_norm(b, dim=0) <= 4 * info.eps * length
    ub = torch.where(is_noise, vb - reflected * (ua + va), b)
    left, right = _right_handed(ua, ub), _right_handed(va, vb)
    return (left[:, :, None] * right[:, None]).sum(0).reshape(9, -1).T.reshape(matrix.shape)


def _right_handed(a: Tensor, b: Tensor) -> Tensor:
    """The orthonormal triad of a, b `(3, K)` by Gram-Schmidt: `(3, 3, K)`."""
    a = a / torch.linalg.vector_norm(a, dim=0)
    b = b - (a * b).sum(0) * a
    b = b / torch.linalg.vector_norm(b, dim=0)
    return torch.stack([a, b, torch.linalg.cross(a, b, dim=0)])


def _rotate(x: Tensor, y: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """Turns two columns `(6, K)` in their plane so that their upper halves become orthogonal."""
    a, b = x[:3], y[:3]
    twice = 2 * (a * b).sum(0)
    difference = ((b - a) * (b + a)).sum(0)
    tangent = twice / (difference + torch.copysign(torch.hypot(difference, twice).clamp_min(tiny), difference))
    cosine = torch.rsqrt(1 + tangent.square())
    sine = cosine * tangent
    return torch.addcmul(cosine * x, sine, y, value=-1), torch.addcmul(cosine * y, sine, x)


def _vee(skew: Tensor) -> Tensor:
    return torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], dim=-1)


def _cross_matrix(w: Tensor) -> Tensor:
    x, y, z = w.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
