"""All-pixel tracks: upstream's cells and order, complete coverage, exactness, and the queries saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.data.scenes import Scene
from fourdperf.reconstruct import dense, recipes
from fourdperf.reconstruct.dense import dense_tracks
from fourdperf.reconstruct.recipes import EncodedVideo
from tests.reconstruct.oracle import Oracle
from tests.reconstruct.upstream_b import UpstreamB

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"


@pytest.mark.parametrize("name, batch, camera", [("rowmajor", 48, None), ("random", 64, None), ("world", 64, 1)])
def test_cells_and_order_are_upstream_s(name, batch, camera, monkeypatch):
    file = np.load(GOLDENS / f"b_dense_{name}.npz")
    order = [torch.from_numpy(file[f"in/perm_{i}"]) for i in range(file["out/num_iterations"])]

    def draw(remaining, batch):
        assert len(remaining) == len(order[0]), "upstream has other cells left"
        return remaining.sort().values[order.pop(0)[:batch]]

    monkeypatch.setattr(dense, "draw", draw)
    model = UpstreamB(file)
    if camera is not None:  # upstream takes a point's visibility from the query in that camera
        decode = model.decode

        def seen_by_camera(encoded, queries):
            there = decode(encoded, queries._replace(t_cam=torch.full_like(queries.t_cam, camera)))
            return decode(encoded, queries)._replace(visibility=there.visibility)

        monkeypatch.setattr(model, "decode", seen_by_camera)
    video = EncodedVideo(model, file["in/video"][0])
    found = dense_tracks(video, (8, 8), batch=batch, camera=camera).tracks
    assert not order
    pixels = torch.stack([found.source[:, 0], 16 * found.source[:, 2] - 1, 16 * found.source[:, 1] - 1], -1)
    assert np.array_equal(pixels, file["out/source_pixels"])  # upstream names a cell of two pixels by its first
    assert np.array_equal(found.visible, file["out/visibility"] > 0.5)
    tolerance = json.loads(str(file["config"]))["atol"]
    for field, key in (("xyz", "out/tracks_3d"), ("uv", "out/tracks_2d")):
        if key in file:  # there are no places in the world's file
            assert np.abs(getattr(found, field).numpy() - file[key]).max() <= tolerance[key]


@pytest.fixture(scope="module")
def scene():
    return Scene(5, num_frames=8, size=(24, 24))


def video_of(scene):
    model = Oracle(scene, scene.num_frames)
    return EncodedVideo(model, model.frames()), model


@pytest.mark.parametrize("camera", [None, 2])
def test_every_cell_is_crossed_and_every_track_is_right(scene, camera):
    video, model = video_of(scene)
    found = dense_tracks(video, camera=camera, batch=64)
    tracks = found.tracks
    visited = torch.zeros(8 * 24 * 24, dtype=torch.bool)
    visited[dense.cells(tracks.uv, (24, 24))[tracks.visible]] = True
    assert visited.all()
    again = recipes.tracks(video, tracks.source, camera)
    assert all(torch.equal(a, b) for a, b in zip(tracks, again))
    factor = 1 if camera is None else 2
    assert found.queries == len(tracks.xyz) * 8 * factor and found.naive_queries == 8 * 8 * 24 * 24 * factor
    assert found.queries < found.naive_queries / 3
    assert video.queries == model.asked


def test_no_source_was_visited_before(scene):
    video, _ = video_of(scene)
    tracks = dense_tracks(video, batch=1, size=(4, 4)).tracks
    cell = dense.cells(tracks.uv, (4, 4))
    own = cell[torch.arange(len(cell)), tracks.source[:, 0].long()]
    visited = torch.zeros(8 * 16, dtype=torch.bool)
    for i in range(len(cell)):
        assert not visited[own[i]]
        visited[cell[i, tracks.visible[i]]] = True
        visited[own[i]] = True
    assert visited.all()


def test_seeds(scene):
    video, _ = video_of(scene)
    a, b, c = (dense_tracks(video, (8, 8), batch=16, seed=seed).tracks for seed in (1, 1, 2))
    assert torch.equal(a.source, b.source) and torch.equal(a.xyz, b.xyz)
    assert not torch.equal(a.source[:16], c.source[:16])


def test_what_was_visited_needs_no_track(scene):
    video, _ = video_of(scene)
    visited = torch.zeros(8, 8, 8, dtype=torch.bool)
    visited[:7] = True
    tracks = dense_tracks(video, (8, 8), visited=visited).tracks
    assert (tracks.source[:, 0] == 7).all() and len(tracks.source) == 64 and visited.all()
    nothing = dense_tracks(video, (8, 8), visited=visited)
    assert nothing.queries == 0 and nothing.tracks.xyz.shape == (0, 8, 3)


def test_predictions_that_are_no_places(scene, monkeypatch):
    video, model = video_of(scene)
    decode = model.decode

    def lost(encoded, queries):
        answers = decode(encoded, queries)
        return answers._replace(uv=torch.where(queries.t_tgt == 3, torch.nan, 9.0)[..., None].expand(-1, -1, 2))

    monkeypatch.setattr(model, "decode", lost)
    tracks = dense_tracks(video, (4, 4), batch=8).tracks
    # the last cell of a frame is where all visible points seem to be, but for frame 3, where they are nowhere
    assert 8 * 16 - 7 <= len(tracks.source) <= 8 * 16 and (tracks.source[:, 0] == 3).sum() == 16


def test_misuse(scene):
    video, _ = video_of(scene)
    with pytest.raises(ValueError, match="batch: wanted at least 1, got 0"):
        dense_tracks(video, batch=0)
    with pytest.raises(ValueError, match=r"visited: wanted bool \(8, 4, 4\), got torch.bool \(8, 4, 5\)"):
        dense_tracks(video, (4, 4), visited=torch.zeros(8, 4, 5, dtype=torch.bool))
