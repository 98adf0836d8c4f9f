"""Stand-ins: shapes have the curvatures that they should, still scenes stand still and their cameras are exact."""

import numpy as np
import pytest
import torch

from fourdperf.data.niso import ShiftedImages
from fourdperf.data.niso_standins import SHAPES, PhotographPatches, SceneSequences, StarShapes, curvatures
from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.data.synthetic import scene_seed


def test_curvatures_of_spheres_and_ellipsoids():
    directions = np.random.default_rng(0).normal(size=(50, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean, gauss = curvatures(lambda d: np.full(d.shape[:-1], 2.0), 2 * directions)
    np.testing.assert_allclose(mean, 0.5, atol=1e-5)
    np.testing.assert_allclose(gauss, 0.25, atol=1e-5)
    a, b, c = 1.0, 1.5, 2.0
    ellipsoid = lambda d: ((d / [a, b, c]) ** 2).sum(-1) ** -0.5
    mean, gauss = curvatures(ellipsoid, np.diag([a, b, c]))
    first, second = (np.array(k) for k in ((a / b**2, b / a**2, c / a**2), (a / c**2, b / c**2, c / b**2)))
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-3)
    np.testing.assert_allclose(gauss, first * second, rtol=1e-3)


def test_a_closed_surface_has_total_curvature_of_four_pi():
    shapes = StarShapes("train", len(SHAPES), (65, 129))
    polar = np.linspace(0, np.pi, 65)[:, None]
    azimuth = np.linspace(0, 2 * np.pi, 129)[None, :-1]
    d = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar) + 0 * azimuth], -1)
    for kind in (0, 4, 6, 8):
        radius, label = shapes.radius(kind)
        assert label == kind
        r, step = radius(d), 1e-4
        # area per solid angle r^2 / cos(angle between normal and ray), from the slope along two tangents
        axis = np.where(np.abs(d[..., 2:]) < 0.9, [0.0, 0, 1], [1.0, 0, 0])
        u = np.cross(d, axis)
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        slopes = [
            (radius(unit(d + step * t)) - radius(unit(d - step * t))) / (2 * step) / r for t in (u, np.cross(d, u))
        ]
        area = r**2 * np.sqrt(1 + slopes[0] ** 2 + slopes[1] ** 2)
        _, gauss = curvatures(radius, r[..., None] * d)
        weight = np.sin(polar) * (np.pi / 64) * (2 * np.pi / 128)
        assert abs((gauss * area * weight).sum() / (4 * np.pi) - 1) < 0.03, kind


def test_shapes():
    shapes = StarShapes("train", 25, (17, 32), seed=3)
    items = [shapes[i] for i in range(25)]
    assert [item["label"] for item in items] == [i % 20 for i in range(25)] and shapes.classes == tuple(SHAPES)
    x = torch.stack([item["x"] for item in items])
    assert x.dtype == torch.float32 and x.shape == (25, 17, 32, 3) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x[:, :, 0], x[:, :, -1]) and (x[:, [0, -1]] == x[:, [0, -1], :1]).all()
    assert torch.equal(StarShapes("train", 25, (17, 32), seed=3)[7]["x"], x[7])
    for other in (StarShapes("val", 25, (17, 32), seed=3), StarShapes("train", 25, (17, 32), seed=4)):
        assert not torch.equal(other[7]["x"], x[7]) and other[7]["label"] == 7
    assert not torch.equal(x[3], x[23])  # of one kind
    with pytest.raises(IndexError, match="wanted shapes below 25, got 25"):
        shapes[25]
    with pytest.raises(ValueError, match="count, size: wanted at least 1 and 2 x 2"):
        StarShapes("train", 0)


def test_patches_of_photographs():
    pytest.importorskip("sklearn")
    patches = {split: PhotographPatches(split, 300) for split in ("train", "val", "test")}
    x = torch.stack([patches["train"][i]["x"] for i in range(300)])
    assert x.shape == (300, 16, 16, 3) and 0 <= x.min() and x.max() <= 1 and torch.equal(patches["train"][5]["x"], x[5])
    assert not torch.equal(PhotographPatches("train", 300, seed=1)[5]["x"], x[5])
    columns = {split: sum(p.shape[1] for p in found.pictures) for split, found in patches.items()}
    assert columns["train"] > 3 * columns["val"] > 0 and columns["val"] > 50 and columns["test"] > 50
    stacked = ShiftedImages(patches["train"])[0]["x"]
    singular = torch.linalg.svdvals(stacked.flatten(0, 1).double())
    assert stacked.shape == (16, 16, 267) and singular[-1] > 1e-4  # all functions on the torus are there


def test_still_scenes_stand_still():
    queries = Queries(torch.rand(40, 2), *(torch.randint(6, (40,)) for _ in range(3)))
    still, moving = (Scene(5, 6, (16, 16), still=flag) for flag in (True, False))
    assert still.answer(queries).displacement.abs().max() < 1e-5 < moving.answer(queries).displacement.abs().max()
    assert torch.equal(still.world_from_camera, moving.world_from_camera)
    assert torch.equal(still.render().video[0], moving.render().video[0])


def test_sequences_have_exact_cameras():
    """A pixel of one frame, by its depth, poses and intrinsics, is where the scene says it is in the next one."""
    source = SceneSequences("val", 3, length=5, size=(16, 20))
    found = source.read(2, range(5))
    assert found["video"].shape == (5, 16, 20, 3) and 0 <= found["video"].min() <= found["video"].max() <= 1
    scene = Scene(scene_seed("val", 2), 5, (16, 20), still=True)
    rendering = scene.render()
    assert torch.equal(found["video"], rendering.video) and source.frames(2) == 5 and len(source) == 3
    y, x = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(20) + 0.5) / 20, indexing="ij")
    uv = torch.stack([x, y, torch.ones_like(x)], -1)
    points = (uv @ found["intrinsics"][0].inverse().T) * rendering.depth[0, ..., None]
    relative = torch.linalg.inv(found["poses"][1]) @ found["poses"][0]
    there = (points @ relative[:3, :3].T + relative[:3, 3]) @ found["intrinsics"][1].T
    flow = there[..., :2] / there[..., 2:] - uv[..., :2]
    torch.testing.assert_close(flow, rendering.flow[0], rtol=0, atol=1e-4)
    assert flow.abs().max() > 0.01
    assert torch.equal(source.read(2, [3, 1])["video"], found["video"][[3, 1]])
    with pytest.raises(ValueError, match="wanted a split"):
        SceneSequences("train", 0)
