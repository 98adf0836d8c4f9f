"""Cameras, rigid motions and the best similarity: against upstream's numbers, LAPACK, exact cases and misuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf import geometry
from fourdperf.geometry import Sim3

GOLDENS = Path(__file__).parent / "goldens" / "d4rt"


class Golden:
    def __init__(self, name):
        self.file = np.load(GOLDENS / f"{name}.npz")
        self.tolerance = json.loads(str(self.file["config"]))["atol"]

    def __getitem__(self, key):
        return torch.from_numpy(self.file[f"in/{key}"])

    def check(self, key, value):
        wanted = torch.from_numpy(self.file[f"out/{key}"])
        assert value.reshape(wanted.shape).sub(wanted).abs().max() <= self.tolerance[f"out/{key}"], key


def rotations(*shape, dtype=torch.float64, seed=0):
    q = torch.randn((*shape, 4), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def about_z(angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def rotation_by_lapack(matrix):
    u, s, vh = torch.linalg.svd(matrix)
    signs = torch.cat([torch.ones_like(s[..., :2]), torch.linalg.det(u @ vh)[..., None]], -1)
    return (u * signs[..., None, :]) @ vh


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# Upstream's numbers


def test_projection_matches_upstream():
    a = Golden("a_geometry")
    uv, depth = geometry.project(a["points_3d"], a["intrinsics"])
    a.check("points_2d", uv)
    a.check("depth", depth)
    uv, depth = geometry.project(a["points_behind"], a["intrinsics"])
    a.check("behind_2d", uv)
    a.check("behind_depth", depth.clamp_min(1e-6))  # upstream returns the clamped one
    assert torch.equal(depth, a["points_behind"][..., 2])
    a.check("apply_4x4", geometry.transform(a["transforms"], a["points_s"]))
    moved = geometry.transform(a["transforms"], a["points_s"])
    a.check("apply_pix_T_cam", geometry.project(moved, a["intrinsics_s"])[0])

    b = Golden("b_camera")
    b.check("project", geometry.project(b["points"], b["K"])[0])
    b.check("project_ext", geometry.project(geometry.transform(b["E"], b["points"]), b["K"])[0])
    points = geometry.unproject(b["pix"], b["depth"], b["K"])
    b.check("unproject", points)
    b.check("unproject_ext", geometry.transform(geometry.invert_rigid(b["E"]), points))


@pytest.mark.parametrize("case", ["plain", "weighted", "noscale", "mirrored"])
def test_umeyama_matches_upstream(case):
    b = Golden("b_camera")
    target = b["target_mirrored" if case == "mirrored" else "target"]
    weights = b["weights"] if case in ("weighted", "noscale") else None
    found = geometry.umeyama(b["source"], target, weights, with_scale=case != "noscale")
    for name, value in zip("sRt", found):
        b.check(f"umeyama_{case}/{name}", value)


def test_poses_match_upstream():
    b = Golden("b_camera")
    found = geometry.umeyama(b["pred_poses"][:, :3, 3], b["gt_poses"][:, :3, 3])
    for name, value in zip("sRt", found):
        b.check(f"sim3/{name}", value)
    b.check("relpose/rotation_error", geometry.rotation_angle(b["E"][:3, :3].T @ b["R2"]).rad2deg())


def test_camera_recovery_matches_upstream():
    b = Golden("b_pose_intrinsics")
    confidence = b["conf_i"] * b["conf_j"]
    found = geometry.umeyama(b["points_j"], b["points_i"], confidence * (confidence > 0.5))
    b.check("R", found.rotation.T)
    b.check("t", -(found.rotation.T @ found.translation) / found.scale)  # upstream's sign and scale
    axis = torch.linspace(0.1, 0.9, 8)
    uv = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    intrinsics = geometry.pinhole_intrinsics(b["points_i"], uv, b["conf_i"] > 0.5)
    b.check("fx", intrinsics[0, 0])
    b.check("fy", intrinsics[1, 1])


# The nearest rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "planar", "mirrored", "small", "large", "stretched"])
def test_rotations_are_as_exact_as_lapack(dtype, kind):
    matrix = normal(2000, 3, 3)
    matrix = {
        "random": matrix,
        "planar": matrix * torch.tensor([1.0, 1, 0]),
        "mirrored": -torch.linalg.det(matrix).sign()[:, None, None] * matrix,
        "small": 1e-30 * matrix,
        "large": 1e30 * matrix,
        "stretched": matrix @ torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)),
    }[kind].to(dtype)
    found, unit = geometry.nearest_rotation(matrix), torch.finfo(dtype).eps
    assert (found.mT @ found - torch.eye(3)).abs().max() < 8 * unit
    assert (torch.linalg.det(found) - 1).abs().max() < 8 * unit
    # It is the best one where R^T M is symmetric and its trace s1 + s2 +- s3.
    matrix = matrix.double()
    s = torch.linalg.svdvals(matrix) * torch.cat([torch.ones(2000, 2), torch.linalg.det(matrix).sign()[:, None]], 1)
    stretch = found.double().mT @ matrix
    assert ((stretch - stretch.mT).abs().amax((-2, -1)) <= 8 * unit * s[:, 0]).all()
    assert ((stretch.diagonal(dim1=-2, dim2=-1).sum(-1) - s.sum(-1)).abs() <= 8 * unit * s[:, 0]).all()
    if dtype == torch.float32:
        exact = rotation_by_lapack(matrix)
        error, lapack = ((r - exact).abs().amax((-2, -1)) for r in (found, rotation_by_lapack(matrix.float())))
        assert (error <= 4 * unit * s[:, 0] / (s[:, 1] + s[:, 2])).all() and error.median() <= lapack.median()


def test_singular_matrices_give_the_smallest_rotation():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(geometry.nearest_rotation(zero), torch.eye(3, dtype=torch.float64))
    x = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    for angle in (0.0, 1e-9, 0.3, 2.0, 3.1, math.pi):
        y = about_z(angle) @ x
        found = geometry.nearest_rotation(torch.outer(y, x))
        assert torch.allclose(found @ x, y, atol=1e-15)
        assert abs(geometry.rotation_angle(found) - angle) < 1e-12
        assert abs(torch.linalg.det(found) - 1) < 1e-14


def test_nan_and_infinity_stay_in_their_matrix():
    matrix = normal(3, 3, 3)
    clean = geometry.nearest_rotation(matrix)
    matrix[1, 0, 2] = math.nan
    matrix[2, 1, 1] = math.inf
    found = geometry.nearest_rotation(matrix)
    assert torch.equal(found[0], clean[0]) and found[1:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 3), (2, 0, 5, 3, 3), (2, 4, 3, 3)])
def test_any_leading_axes(shape):
    matrix = normal(*shape)
    found = geometry.nearest_rotation(matrix)
    assert found.shape == shape
    assert torch.allclose(found, rotation_by_lapack(matrix), atol=1e-12)
    assert torch.allclose(geometry.nearest_rotation(matrix.mT.contiguous().mT), found, atol=1e-15)


def test_gradients_of_the_rotation():
    matrix = torch.stack([normal(3, 3, seed=1), normal(3, 3, seed=2) * torch.tensor([[1.0], [1], [-1]])])
    matrix = torch.cat([matrix, (normal(3, 3, seed=3) * torch.tensor([1.0, 1, 0]))[None]]).requires_grad_()
    assert torch.autograd.gradcheck(geometry.nearest_rotation, matrix)
    assert torch.autograd.gradgradcheck(geometry.nearest_rotation, matrix)
    each = torch.func.vmap(torch.func.jacrev(geometry.nearest_rotation))(matrix)
    whole = torch.stack([torch.autograd.functional.jacobian(geometry.nearest_rotation, m) for m in matrix])
    assert torch.allclose(each, whole)


# Umeyama


def similarity(seed, *shape):
    scale = normal(*shape, seed=seed).exp()
    return Sim3(scale, rotations(*shape, seed=seed + 1), normal(*shape, 3, seed=seed + 2))


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("points", [3, 4, 100])
def test_umeyama_recovers_the_motion(points, with_scale):
    true = similarity(points, 6)
    if not with_scale:
        true = true._replace(scale=torch.ones(6, dtype=torch.float64))
    source = normal(6, points, 3, seed=9)
    found = geometry.umeyama(source, true(source), with_scale=with_scale)
    for value, wanted in zip(found, true):
        assert torch.allclose(value, wanted, atol=1e-10)


def test_umeyama_broadcasts_and_keeps_dtypes():
    true = similarity(0, 4)
    source = normal(50, 3)
    found = geometry.umeyama(source, true(source))
    assert found.rotation.shape == (4, 3, 3) and torch.allclose(found.rotation, true.rotation)
    assert geometry.umeyama(source.half(), true(source).half()).scale.dtype == torch.float32
    assert torch.allclose(
        geometry.umeyama(source.half(), true(source).half()).rotation.double(), true.rotation, atol=2e-3
    )
    assert geometry.umeyama(source.float(), true(source)).scale.dtype == torch.float64


def test_weights_are_repetitions_and_zero_is_absence():
    true = similarity(5)
    source = normal(8, 3)
    target = true(source) + 0.1 * normal(8, 3, seed=7)
    counts = torch.tensor([1, 2, 0, 3, 1, 1, 0, 2])
    repeated = geometry.umeyama(source.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0))
    source[counts == 0] = math.nan
    target[counts == 0] = math.inf
    for weights in (counts, 1e-9 * counts.double()):
        for value, wanted in zip(geometry.umeyama(source, target, weights), repeated):
            assert torch.allclose(value, wanted, atol=1e-12)
    masked = geometry.umeyama(source, target, counts > 0)
    plain = geometry.umeyama(source[counts > 0], target[counts > 0])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(masked, plain))


def test_the_fit_is_the_best_one():
    source, target = normal(30, 3), normal(30, 3, seed=1)
    weights = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def cost(found):
        return (weights * (target - found(source)).square().sum(-1)).sum()

    found = geometry.umeyama(source, target, weights)
    best = cost(found)
    for step in range(50):
        nudge = Sim3(
            1 + 0.01 * normal(1, seed=step)[0],
            geometry.nearest_rotation(torch.eye(3) + 0.01 * normal(3, 3, seed=step)),
            0.01 * normal(3, seed=100 + step),
        )
        assert cost(nudge @ found) > best


def test_points_that_do_not_determine_the_motion():
    line = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2, 3])
    true = similarity(11)
    found = geometry.umeyama(line, true(line))
    assert torch.allclose(found(line), true(line), atol=1e-12)
    moved = line + torch.tensor([1.0, 0, 0])
    assert geometry.rotation_angle(geometry.umeyama(line, moved).rotation) < 1e-7  # no spin about the line

    place, here = torch.ones(5, 3, dtype=torch.float64), torch.tensor([1.0, 2, 3], dtype=torch.float64)
    single = geometry.umeyama(place, here.expand(5, 3))
    assert torch.equal(single.rotation, torch.eye(3, dtype=torch.float64)) and single.scale == 1
    assert torch.allclose(single.translation, here - 1, atol=1e-15)
    assert geometry.umeyama(normal(5, 3), place).scale.abs() < 1e-15

    for source, weights in ((normal(0, 3), None), (normal(4, 3), torch.zeros(4)), (normal(4, 3) / 0, torch.zeros(4))):
        scale, rotation, translation = geometry.umeyama(source, source, weights)
        assert scale == 1 and torch.equal(rotation, torch.eye(3, dtype=torch.float64)) and not translation.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_where_the_motion_is_not_determined(dtype):
    line = (torch.linspace(-1, 2, 7)[:, None] * torch.tensor([1.0, 2, 3])).to(dtype)
    cases = [
        (line, line + 1),
        (line, 2 * line),
        (torch.ones(5, 3, dtype=dtype),) * 2,
        (torch.zeros(1, 3, dtype=dtype),) * 2,
    ]
    cases += [(normal(5, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)), (normal(0, 3, dtype=dtype),) * 2]
    for source, target in cases:
        source, target = source.clone().requires_grad_(), target.clone().requires_grad_()
        weights = torch.ones_like(source[:, 0], requires_grad=True)
        found = geometry.umeyama(source, target, weights)
        value = sum((part * normal(*part.shape, dtype=dtype)).sum() for part in found)
        for gradient in torch.autograd.grad(value, (source, target, weights)):
            assert gradient.isfinite().all()


def test_gradients_of_the_fit():
    source = normal(2, 6, 3).requires_grad_()
    target = normal(2, 6, 3, seed=1).requires_grad_()
    weights = normal(2, 6, seed=2).exp().requires_grad_()
    assert torch.autograd.gradcheck(geometry.umeyama, (source, target, weights))
    assert torch.autograd.gradcheck(lambda *args: geometry.umeyama(*args, with_scale=False), (source, target, weights))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"source, target: wanted \(..., N, 3\) both, got \(4, 3\), \(5, 3\)"):
        geometry.umeyama(normal(4, 3), normal(5, 3))
    with pytest.raises(ValueError, match=r"source, target"):
        geometry.umeyama(normal(4, 2), normal(4, 2))
    for matrix in (normal(3, 3).half(), normal(3, 4)):
        with pytest.raises(ValueError, match=r"matrix: wanted float32 or float64 \(..., 3, 3\), got"):
            geometry.nearest_rotation(matrix)
    with pytest.raises(ValueError, match=r"weights: wanted \(..., 4\), got \(3,\)"):
        geometry.umeyama(normal(4, 3), normal(4, 3), torch.ones(3))


# Motions


def test_similarities_compose_and_invert():
    a, b = similarity(1, 5), similarity(2, 5)
    points = normal(5, 9, 3)
    assert torch.allclose((a @ b)(points), a(b(points)))
    assert torch.allclose(a.inverse()(a(points)), points)
    assert torch.allclose(geometry.transform(a.matrix(), points), a(points))


def test_poses_move_with_their_world():
    move, pose = similarity(3, 4), geometry.rigid(rotations(4, seed=8), normal(4, 3))
    seen = normal(4, 6, 3)
    after = geometry.transform(move.pose(pose), move.scale[:, None, None] * seen)
    assert torch.allclose(after, move(geometry.transform(pose, seen)))
    assert torch.allclose(move.pose(pose)[:, :3, :3].mT @ move.pose(pose)[:, :3, :3], torch.eye(3, dtype=torch.float64))


def test_rigid_motions():
    pose, other = (geometry.rigid(rotations(4, seed=s), normal(4, 3, seed=s)) for s in (1, 2))
    points = normal(4, 6, 3)
    assert torch.allclose(geometry.transform(geometry.invert_rigid(pose), geometry.transform(pose, points)), points)
    through_world = geometry.transform(geometry.invert_rigid(pose), geometry.transform(other, points))
    assert torch.allclose(geometry.transform(geometry.relative_pose(pose, other), points), through_world)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 0.5, math.pi / 2, 3.0, math.pi])
def test_rotation_angles(angle):
    basis = rotations(seed=4)
    assert abs(geometry.rotation_angle(basis @ about_z(angle) @ basis.T) - angle) < 1e-14


def test_autocast_changes_nothing():
    a, b = (Sim3(*(part.float() for part in similarity(seed, 3))) for seed in (1, 2))
    points, pose = normal(3, 9, 3).float(), geometry.rigid(b.rotation, b.translation)

    def everything():
        yield from geometry.umeyama(points, a(points))
        yield from (a @ b.inverse())
        yield from (a.pose(pose), geometry.relative_pose(pose, pose), geometry.transform(pose, points))

    plain = list(everything())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(everything(), plain, strict=True))


def test_on_meta():
    pose = torch.empty(3, 4, 4, device="meta")
    assert geometry.relative_pose(pose, pose).shape == (3, 4, 4)


@pytest.mark.heavy
def test_umeyama_compiles():
    points, target = normal(3, 9, 3).requires_grad_(), normal(3, 9, 3, seed=1)

    def step(points):
        scale, rotation, translation = geometry.umeyama(points, target)
        return scale.sum() + rotation[:, 0].sum() + translation.sum()

    wanted = torch.autograd.grad(step(points), points)[0]
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(points), points)[0]
    assert torch.allclose(found, wanted)


# Cameras

CAMERA = torch.tensor([[1.3, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], dtype=torch.float64)


def view(points=64, seed=0):
    """Points in front of CAMERA, all over its frame."""
    uv = torch.rand(points, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return geometry.unproject(uv, 1 + 4 * normal(points, seed=seed).square(), CAMERA), uv


def test_projection_and_back():
    points, uv = view()
    found, depth = geometry.project(points, CAMERA)
    assert torch.allclose(found, uv) and torch.equal(depth, points[:, 2])
    ahead = geometry.project(torch.tensor([[0.0, 0, 1], [1, -1, 2]], dtype=torch.float64), CAMERA)[0]
    assert torch.allclose(ahead, torch.tensor([[0.5, 0.5], [0.5 + 1.3 / 2, 0.5 - 0.9 / 2]], dtype=torch.float64))


def test_points_behind_the_camera_are_finite():
    points = torch.tensor([[1.0, 2, -3], [1, 2, 0], [0, 0, 0]], requires_grad=True)
    uv, depth = geometry.project(points, CAMERA.float())
    assert (depth <= 0).all() and uv.isfinite().all()
    assert torch.autograd.grad(uv.sum() + depth.sum(), points)[0].isfinite().all()


def test_intrinsics_from_points():
    points, uv = view()
    assert torch.allclose(geometry.pinhole_intrinsics(points, uv), CAMERA)
    points[:20] *= torch.tensor([-3.0, 0.2, 1])  # a minority of outliers
    assert torch.allclose(geometry.pinhole_intrinsics(points, uv), CAMERA)
    weights = torch.ones(64).index_fill(0, torch.arange(20, 64), 0.0)
    assert not torch.allclose(geometry.pinhole_intrinsics(points, uv, weights), CAMERA)
    centre = torch.full((1, 2), 0.5, dtype=torch.float64)
    with_centre = geometry.pinhole_intrinsics(torch.cat([points, points[:1]]), torch.cat([uv, centre]), None)
    assert torch.allclose(with_centre, CAMERA)
    unknown = geometry.pinhole_intrinsics(-points, uv)
    assert unknown[[0, 1], [0, 1]].isnan().all() and unknown[2].tolist() == [0, 0, 1]


@pytest.mark.parametrize("k", [(0.0, 0.0), (-0.2, 0.05), (0.15, 0.0)])
def test_distortion_is_recovered(k):
    points, _ = view(400)
    k = torch.tensor(k, dtype=torch.float64)
    uv, _ = geometry.project(points, CAMERA, k)
    uv[:40] += 0.3 * normal(40, 2)  # outliers
    points = torch.cat([points, -points[:5]])
    uv = torch.cat([uv, uv[:5]])
    start = geometry.pinhole_intrinsics(points, uv)
    intrinsics, found = geometry.fit_distortion(points[None], uv[None], start[None])
    assert torch.allclose(intrinsics[0], CAMERA, atol=1e-5) and torch.allclose(found[0], k, atol=1e-4)
    unknown, _ = geometry.fit_distortion(points, uv, torch.full((3, 3), torch.nan, dtype=torch.float64))
    assert unknown[0, 0].isnan()
    nothing, k = geometry.fit_distortion(points, uv, CAMERA, torch.zeros(405))
    assert torch.equal(nothing, CAMERA) and not k.any()


def test_distortion_is_opencv_s():
    cv2 = pytest.importorskip("cv2")
    points, _ = view()
    uv, _ = geometry.project(points, CAMERA, torch.tensor([-0.2, 0.05], dtype=torch.float64))
    wanted, _ = cv2.projectPoints(
        points.numpy(), np.zeros(3), np.zeros(3), CAMERA.numpy(), np.array([-0.2, 0.05, 0, 0])
    )
    assert np.allclose(uv, wanted[:, 0])
