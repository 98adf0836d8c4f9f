"""Whole videos, in one chunk and in several with scales of their own: exact where the model is."""

import json
import warnings

import numpy as np
import pytest
import torch

from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.geometry import transform
from fourdperf.models.d4rt import D4RT, Config
from fourdperf.reconstruct import Reconstruction, long_video, reconstruct
from fourdperf.reconstruct.long_video import Chunk, chunks
from tests.reconstruct.oracle import Oracle, true_poses

SIZE, FRAMES = (20, 24), 17
SCALES = {0: 1.0, 4: 0.4, 8: 3.0, 9: 1.7}
SOURCE = torch.tensor(
    [[t, u, v] for t in (0, 5, 9, 16) for u in (0.13, 0.37, 0.61, 0.87) for v in (0.21, 0.5, 0.83)], dtype=torch.float32
)


@pytest.fixture(scope="module")
def scene():
    return Scene(3, num_frames=FRAMES, size=SIZE)


@pytest.fixture(scope="module")
def joined(scene):
    model = Oracle(scene, 8, SCALES)
    return reconstruct(model, model.frames((40, 48)), track=SOURCE, cloud_size=(10, 12), camera_grid=(8, 8)), model


def truth(scene, source):
    """Tracks in the world of frame 0, their places and where they are seen."""
    k = len(source)
    now = torch.arange(FRAMES).repeat(k)
    start = Queries(source[:, 1:].repeat_interleave(FRAMES, 0), source[:, 0].long().repeat_interleave(FRAMES), now, now)
    own = scene.answer(start)
    world = scene.answer(start._replace(t_cam=0 * now))
    parts = (world.xyz.view(k, FRAMES, 3), own.uv.view(k, FRAMES, 2), own.visibility.view(k, FRAMES) > 0.5)
    return [part.numpy() for part in parts]


# The plan


def test_chunks():
    assert chunks(17, 8, 4) == [Chunk(0, 8, 0, 6), Chunk(4, 12, 6, 10), Chunk(8, 16, 10, 12), Chunk(9, 17, 12, 17)]
    assert chunks(5, 8, 4) == [Chunk(0, 5, 0, 5)] and chunks(8, 8, 1) == [Chunk(0, 8, 0, 8)]
    assert list(Chunk(4, 12, 6, 10).owned) == [2, 3, 4, 5]


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("frames", [1, 2, 8, 9, 15, 16, 40])
def test_every_frame_has_one_owner(frames, length):
    for overlap in range(1, length):
        parts = chunks(frames, length, overlap)
        assert [t for part in parts for t in range(part.first, part.last)] == list(range(frames))
        assert all(part.start <= part.first < part.last <= part.stop for part in parts)
        assert all(part.stop - part.start == min(length, frames) for part in parts)
        assert all(a.stop - b.start >= overlap for a, b in zip(parts, parts[1:]))


# Several chunks


def test_depth_and_cameras_are_the_scene_s(scene, joined):
    found, _ = joined
    assert np.allclose(found.depth, scene.render().depth, rtol=2e-4)
    assert np.abs(found.world_from_camera - true_poses(scene).numpy()).max() < 1e-3
    assert np.array_equal(found.world_from_camera[0], np.eye(4))
    assert np.allclose(found.intrinsics, scene.intrinsics, rtol=1e-4)


def test_points_lie_on_the_surfaces(scene, joined):
    found, _ = joined
    assert found.points.shape == (FRAMES * 120, 3)
    assert np.array_equal(found.point_frame, np.arange(FRAMES).repeat(120))
    v, u = np.meshgrid((np.arange(10) + 0.5) / 10, (np.arange(12) + 0.5) / 12, indexing="ij")
    uv = torch.from_numpy(np.stack([u, v], -1)).float().view(-1, 2).repeat(FRAMES, 1)
    t = torch.arange(FRAMES).repeat_interleave(120)
    wanted = scene.answer(Queries(uv, t, t, 0 * t)).xyz
    assert np.abs(found.points - wanted.numpy()).max() < 2e-3
    assert np.array_equal(found.point_colors, found.point_frame[:, None].repeat(3, 1))  # frame t is grey of level t


def test_tracks_go_on_through_all_chunks(scene, joined):
    found, _ = joined
    xyz, uv, visible = truth(scene, SOURCE)
    known = np.isfinite(found.tracks[..., 0])
    assert np.abs(found.tracks - xyz)[known].max() < 5e-3
    seen = found.tracks_visible
    assert np.array_equal(seen[known], visible[known]) and not seen[~known].any()
    assert np.abs(found.tracks_uv - uv)[seen].max() < 1e-3
    # A track ends only where an overlap never shows it, and that is rare; some of those that last began in the middle.
    assert known.mean() > 0.8 and known.all(1)[12:].any() and known.all(1)[:12].any()
    owner = np.searchsorted([6, 10, 12], np.arange(FRAMES), side="right")
    overlaps = {(0, 1): range(4, 8), (1, 2): range(8, 12), (2, 3): range(9, 16)}
    for k, t in zip(*np.nonzero(~known)):
        here, there = sorted((owner[int(SOURCE[k, 0])], owner[t]))
        between = [overlaps[i, i + 1] for i in range(here, there)]
        assert any(not visible[k, list(shared)].any() for shared in between)
    assert found.track_source.tolist() == SOURCE.tolist()
    assert np.array_equal(found.track_colors[:, 0], SOURCE[:, 0].numpy().astype(np.uint8))


def test_stats(joined, tmp_path):
    found, model = joined
    stats = found.stats
    assert stats["frames"] == FRAMES and stats["chunks"] == 4 and stats["queries"] == model.asked
    assert model.encodings == 4 + 3  # four, and three again to follow tracks backwards
    assert stats["track_queries"] < stats["queries"] and stats["fps"] > 0 and stats["queries_per_second"] > 0
    assert stats["encode_seconds"] + stats["decode_seconds"] < stats["seconds"]
    json.dumps(stats)
    found.save(tmp_path / "a.npz")
    assert np.array_equal(Reconstruction.load(tmp_path / "a.npz").tracks, found.tracks, equal_nan=True)


def test_nonsense_with_little_confidence_is_left_out(scene):
    model = Oracle(scene, 8, SCALES, doubt=0.05)  # of two answers each, below the 15 % that may be wrong
    found = reconstruct(model, model.frames(), track=2, keep=0.9, camera_grid=(8, 8))
    assert np.abs(found.world_from_camera - true_poses(scene).numpy()).max() < 1e-3
    assert len(found.points) == np.ceil(0.9 * FRAMES * SIZE[0] * SIZE[1])
    uv = long_video.pixel_centres(SIZE).repeat(FRAMES, 1)
    t = torch.arange(FRAMES).repeat_interleave(SIZE[0] * SIZE[1])
    wanted = scene.answer(Queries(uv, t, t, 0 * t)).xyz.numpy()
    nearest = [np.abs(wanted[t == f] - p).sum(-1).min() for f, p in zip(found.point_frame[::97], found.points[::97])]
    assert max(nearest) < 5e-3


@pytest.mark.parametrize("overlap", [1, 7])
def test_overlaps(scene, overlap):
    model = Oracle(scene, 8, {start: 1 + 0.1 * start for start in range(FRAMES)})
    found = reconstruct(model, model.frames(), track=3, overlap=overlap, cloud_size=(4, 4), camera_grid=(4, 4))
    assert np.allclose(found.depth, scene.render().depth, rtol=1e-3)


def test_all_pixels_of_a_long_video(scene):
    model = Oracle(scene, 8, SCALES)
    found = reconstruct(model, model.frames(), track="all", depth_size=(2, 2), camera_grid=(2, 2))
    xyz, uv, visible = truth(scene, torch.from_numpy(found.track_source))
    known = np.isfinite(found.tracks[..., 0])
    assert np.abs(found.tracks - xyz)[known].max() < 1e-2
    assert np.array_equal(found.tracks_visible[known], visible[known])
    # Every cell of every frame is crossed by a track.
    t = np.arange(FRAMES)[None].repeat(len(xyz), 0)[found.tracks_visible]
    u, v = found.tracks_uv[found.tracks_visible].T
    crossed = np.zeros((FRAMES, *SIZE), bool)
    crossed[t, np.minimum(v * SIZE[0], SIZE[0] - 1).astype(int), np.minimum(u * SIZE[1], SIZE[1] - 1).astype(int)] = (
        True
    )
    assert crossed.all()
    assert found.stats["track_queries"] < found.stats["naive_queries"] / 2


# One chunk, options, misuse


def test_a_short_video(scene):
    model = Oracle(scene, 32)
    found = reconstruct(model, model.frames(), track=4, depth_size=(5, 6), shared_intrinsics=True)
    assert model.encodings == 1 and found.stats["chunks"] == 1 and found.depth.shape == (FRAMES, 5, 6)
    assert found.points.shape == (FRAMES * 480, 3) and found.tracks.shape == (16, FRAMES, 3)
    assert np.abs(found.world_from_camera - true_poses(scene).numpy()).max() < 1e-5
    assert (found.intrinsics == found.intrinsics[0]).all() and not np.isnan(found.tracks).any()
    # the same world: points of frame t, seen from frame t's pose, have its depth
    frame = torch.from_numpy(found.points[found.point_frame == 5])
    depth = transform(torch.linalg.inv(torch.from_numpy(found.world_from_camera[5])), frame)[:, 2]
    assert torch.allclose(depth, scene.render().depth[5].flatten(), atol=1e-4)


def test_no_tracks_and_distortion(scene):
    model = Oracle(scene, 32)
    found = reconstruct(model, model.frames(), track=0, distortion=True, cloud_size=(2, 2))
    assert found.tracks.shape == (0, FRAMES, 3) and np.abs(found.distortion).max() < 1e-2


@pytest.mark.parametrize("track", [3, "all"])
@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_real_model(frames, track):
    torch.manual_seed(0)
    config = Config(
        hidden_size=32, num_layers=2, num_heads=2, num_frames=4, image_size=16, patch_size=(2, 8, 8), decoder_layers=1
    )
    model = D4RT(config).eval()
    video = np.random.default_rng(0).integers(0, 256, (frames, 24, 40, 3), np.uint8)
    options = {"track": track, "high_resolution": True, "distortion": True, "overlap": 2, "camera_grid": (4, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an untrained model: it may find no focal length
        first, second = (reconstruct(model, video, **options) for _ in range(2))
    assert first.depth.shape == (frames, 16, 16) and np.isfinite(first.depth).all()
    assert np.isfinite(first.world_from_camera).all() and np.isfinite(first.points).all()
    assert np.array_equal(first.tracks, second.tracks, equal_nan=True)


def test_misuse(scene):
    model = Oracle(scene, 8)
    frames = model.frames()
    for overlap in (0, 8):
        with pytest.raises(ValueError, match=f"overlap: wanted 1 to 7 frames of the model's 8, got {overlap}"):
            reconstruct(model, frames, overlap=overlap)
    with pytest.raises(ValueError, match=r"keep: wanted a share in \(0, 1\], got 0"):
        reconstruct(model, frames, keep=0)
    for track in ("dense", -1):
        with pytest.raises(ValueError, match="track: wanted a number of points"):
            reconstruct(model, frames, track=track)
    with pytest.raises(ValueError, match=r"source: wanted whole t in \[0, 16\]"):
        reconstruct(model, frames, track=[[17, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"frames: wanted \(T, H, W, 3\)"):
        reconstruct(model, frames[0])
    assert model.encodings == 0
