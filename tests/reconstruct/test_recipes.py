"""Every recipe on a model that knows the truth gives the truth."""

import warnings

import numpy as np
import pytest
import torch

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.reconstruct import recipes
from fourdperf.reconstruct.recipes import EncodedVideo
from tests.reconstruct.oracle import Oracle, angle_degrees, true_poses

SIZE = (24, 32)


@pytest.fixture(scope="module")
def scene():
    return Scene(11, num_frames=6, size=SIZE)


def encoded(scene, size=(48, 64), **oracle):
    model = Oracle(scene, scene.num_frames, **oracle)
    return EncodedVideo(model, model.frames(size)), model


def test_depth_is_the_scene_s(scene):
    video, model = encoded(scene)
    maps = recipes.depth(video)
    assert torch.allclose(maps.depth, scene.render().depth, rtol=1e-5) and maps.depth.shape == (6, *SIZE)
    assert (maps.confidence > 0.999).all()
    coarse = recipes.depth(video, (12, 16), range(2, 5))
    finer = Scene(11, num_frames=6, size=(12, 16), aspect_ratio=scene.aspect_ratio).render().depth
    assert torch.allclose(coarse.depth, finer[2:5], rtol=1e-5)
    assert model.encodings == 1 and video.queries == model.asked == 6 * 24 * 32 + 3 * 12 * 16


def test_point_clouds_lie_on_the_surfaces(scene):
    video, _ = encoded(scene)
    cloud = recipes.point_cloud(video, camera=3)
    camera_from_world = torch.linalg.inv(scene.world_from_camera[3])
    uv = recipes.pixel_centres(SIZE)
    for t, depth in enumerate(scene.render().depth):
        k = scene.intrinsics[t]
        rays = torch.stack([(uv[:, 0] - k[0, 2]) / k[0, 0], (uv[:, 1] - k[1, 2]) / k[1, 1], torch.ones(len(uv))], -1)
        world = (rays * depth.view(-1, 1)) @ scene.world_from_camera[t, :3, :3].T + scene.world_from_camera[t, :3, 3]
        wanted = world @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
        assert torch.allclose(cloud.points[t].view(-1, 3), wanted, atol=2e-5)


@pytest.mark.parametrize("camera", [None, 4])
def test_tracks_are_the_scene_s(scene, camera):
    video, _ = encoded(scene)
    source = torch.cat([recipes.grid(video, 5, 7), recipes.grid(video, 3, 3, frame=4)])
    found = recipes.tracks(video, source, camera)
    for t in range(6):
        now = torch.full((len(source),), t)
        queries = Queries(source[:, 1:], source[:, 0].long(), now, now if camera is None else now * 0 + camera)
        assert torch.equal(found.xyz[:, t], scene.answer(queries).xyz)
        own = scene.answer(queries._replace(t_cam=now))
        assert torch.equal(found.uv[:, t], own.uv) and torch.equal(found.visible[:, t], own.visibility > 0.5)
    assert found.visible[torch.arange(44), source[:, 0].long()].all() and not found.visible.all()
    assert video.queries == 44 * 6 * (1 if camera is None else 2)


def test_no_tracks(scene):
    video, _ = encoded(scene)
    found = recipes.tracks(video, torch.empty(0, 3))
    assert found.xyz.shape == (0, 6, 3) and found.visible.dtype == torch.bool


@pytest.mark.parametrize("doubt", [0.0, 0.3])
@pytest.mark.parametrize("camera", [0, 2])
def test_poses_are_the_scene_s(scene, camera, doubt):
    video, _ = encoded(scene, doubt=doubt)
    poses = recipes.extrinsics(video, camera=camera).double()
    true = torch.linalg.inv(scene.world_from_camera[camera].double()) @ scene.world_from_camera.double()
    assert torch.equal(poses[camera], torch.eye(4).double())
    assert (poses - true).abs().max() < 2e-5
    assert angle_degrees(true_poses(scene)[:, :3, :3]).max() > 1  # it does move


@pytest.mark.parametrize("doubt", [0.0, 0.3])
def test_intrinsics_are_the_scene_s(scene, doubt):
    video, _ = encoded(scene, doubt=doubt)
    found = recipes.intrinsics(video)
    assert torch.allclose(found.matrix, scene.intrinsics, rtol=1e-4) and not found.distortion.any()
    assert scene.intrinsics[:, 0, 0].std() > 1e-3  # it does zoom
    shared = recipes.intrinsics(video, shared=True)
    assert (shared.matrix == shared.matrix[0]).all()
    low, high = scene.intrinsics[:, 0, 0].aminmax()
    assert low <= shared.matrix[0, 0, 0] <= high
    refined = recipes.intrinsics(video, distortion=True)
    assert torch.allclose(refined.matrix, scene.intrinsics, rtol=1e-4) and refined.distortion.abs().max() < 1e-3


def test_a_frame_without_focal_length_takes_the_usual_one(scene, monkeypatch):
    video, model = encoded(scene)
    decode = model.decode
    broken = torch.tensor([1, 4])

    def behind(encoded, queries):
        answers = decode(encoded, queries)
        return answers._replace(xyz=torch.where(torch.isin(queries.t_src, broken)[..., None], -1.0, answers.xyz))

    monkeypatch.setattr(model, "decode", behind)
    found = recipes.intrinsics(video).matrix
    kept = [0, 2, 3, 5]
    assert torch.allclose(found[kept], scene.intrinsics[kept], rtol=1e-4)
    assert torch.equal(found[1], found[4]) and found[1, 0, 0] in found[kept, 0, 0]
    broken = torch.arange(6)
    with pytest.warns(UserWarning, match="no focal length"):
        found = recipes.intrinsics(video).matrix
    assert torch.allclose(found, torch.tensor([[1, 0, 0.5], [0, 64 / 48, 0.5], [0, 0, 1]]))


def test_queries_come_in_blocks(scene, monkeypatch):
    video, model = encoded(scene)
    whole = recipes.depth(video)
    assert model.largest == 6 * 24 * 32
    monkeypatch.setattr(recipes, "BLOCK", 1000)
    video, model = encoded(scene)
    assert torch.equal(recipes.depth(video).depth, whole.depth) and model.largest == 1000


def test_what_the_model_is_shown(scene):
    model = Oracle(scene, 6)
    frames = model.frames((48, 96))
    assert EncodedVideo(model, frames).encoded.length == 6
    assert model.patches is None and model.ratio.tolist() == [2.0]
    EncodedVideo(model, frames, high_resolution=True)
    assert torch.equal(model.patches[0], frames)
    EncodedVideo(model, model.frames(), high_resolution=True)
    assert model.patches is None
    video = EncodedVideo(model, (frames.float() / 255).numpy())
    assert torch.equal(video.frames, frames)


def test_what_has_the_model_s_size_is_shown_as_it_is(scene, monkeypatch):
    model, shown = Oracle(scene, 6), []
    monkeypatch.setattr(model, "encode", lambda video, *rest: shown.append(video))
    frames = torch.rand(3, *SIZE, 3, generator=torch.Generator().manual_seed(0))
    EncodedVideo(model, frames)
    EncodedVideo(model, (255 * frames).round().to(torch.uint8))
    assert torch.equal(shown[0][0], frames) and torch.equal(shown[1][0], (255 * frames).round() / 255)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: f[0], r"frames: wanted \(T, H, W, 3\), at least one frame, got \(24, 32, 3\)"),
        (lambda f: f[..., :2], r"frames: wanted \(T, H, W, 3\)"),
        (lambda f: f[:0], r"at least one frame"),
        (lambda f: f.float(), r"frames: wanted values in \[0, 1\], got 0 to 5"),
        (lambda f: f / 0.0, r"frames: wanted values in \[0, 1\]"),
        (lambda f: f.long(), r"frames: wanted uint8, or floating in \[0, 1\], got torch.int64"),
        (lambda f: torch.cat([f, f]), r"frames: wanted at most the 6 frames that the model takes, got 12"),
    ],
)
def test_frames_that_are_refused(scene, make, message):
    model = Oracle(scene, 6)
    with pytest.raises(ValueError, match=message):
        EncodedVideo(model, make(model.frames()))


@pytest.mark.parametrize(
    "source, message",
    [
        ([[0.0, 0.5]], r"source: wanted \(K, 3\)"),
        ([[6, 0.5, 0.5]], r"source: wanted whole t in \[0, 5\], got 6 to 6"),
        ([[0.5, 0.5, 0.5]], "source: wanted whole t"),
        ([[0, 1.5, 0.5]], r"source: wanted u and v in \[0, 1\], got 0.5 to 1.5"),
        ([[0, float("nan"), 0.5]], "source: wanted u and v"),
    ],
)
def test_sources_that_are_refused(scene, source, message):
    video, _ = encoded(scene)
    with pytest.raises(ValueError, match=message):
        recipes.tracks(video, torch.tensor(source))


def test_arrays_that_torch_does_not_take(scene):
    model = Oracle(scene, 6)
    frames = model.frames().numpy()[..., ::-1]
    frames.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(EncodedVideo(model, frames).frames, frames)


def test_sizes_that_are_refused(scene):
    video, _ = encoded(scene)
    for size in ((0, 4), (4, -1), (4,)):
        with pytest.raises(ValueError, match="size: wanted a height and a width of at least 1, got"):
            recipes.depth(video, size)
        with pytest.raises(ValueError, match="size: wanted"):
            recipes.extrinsics(video, size)


def test_progress_bars(scene, capsys):
    model = Oracle(scene, 6)
    recipes.depth(EncodedVideo(model, model.frames()))
    assert capsys.readouterr().err == ""
    recipes.depth(EncodedVideo(model, model.frames(), progress=True))
    assert "depth: 100%" in capsys.readouterr().err
