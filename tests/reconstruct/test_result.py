"""A reconstruction survives the disk, and nothing that does not fit together passes for one."""

import dataclasses

import numpy as np
import pytest

from fourdperf.reconstruct import Reconstruction


def reconstruction(frames=3, points=7, tracks=4) -> Reconstruction:
    random = np.random.default_rng(0)
    return Reconstruction(
        video=random.integers(0, 256, (frames, 6, 8, 3), np.uint8),
        depth=random.uniform(1, 5, (frames, 3, 4)),
        depth_confidence=random.uniform(0, 1, (frames, 3, 4)),
        world_from_camera=np.tile(np.eye(4), (frames, 1, 1)),
        intrinsics=np.tile(np.eye(3), (frames, 1, 1)),
        distortion=np.zeros((frames, 2)),
        points=random.normal(size=(points, 3)),
        point_colors=random.integers(0, 256, (points, 3)),
        point_frame=random.integers(0, frames, points),
        tracks=random.normal(size=(tracks, frames, 3)),
        tracks_uv=random.uniform(0, 1, (tracks, frames, 2)),
        tracks_visible=random.integers(0, 2, (tracks, frames)),
        track_colors=random.integers(0, 256, (tracks, 3)),
        track_source=random.uniform(0, 1, (tracks, 3)),
        stats={"queries": 12, "seconds": 0.5, "note": "β"},
    )


def assert_equal(a: Reconstruction, b: Reconstruction) -> None:
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "stats":
            assert left == right
        else:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("points, tracks", [(7, 4), (0, 0)])
def test_save_and_load(tmp_path, points, tracks):
    made = reconstruction(points=points, tracks=tracks)
    made.save(tmp_path / "new" / "clip.npz")
    assert_equal(made, Reconstruction.load(tmp_path / "new" / "clip.npz"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.npz"]
    assert made.depth.dtype == np.float32 and made.tracks_visible.dtype == bool and made.num_frames == 3


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("depth", (4, 3, 4), r"depth: wanted shape \(3, h, w\), got \(4, 3, 4\)"),
        ("depth_confidence", (3, 4, 3), r"depth_confidence: wanted shape \(3, 3, 4\)"),
        ("intrinsics", (3, 3), r"intrinsics: wanted shape \(3, 3, 3\)"),
        ("point_colors", (6, 3), r"point_colors: wanted shape \(7, 3\)"),
        ("tracks", (4, 3, 2), r"tracks: wanted shape \(4, 3, 3\), got \(4, 3, 2\)"),
        ("video", (3, 6, 8, 4), r"video: wanted shape \(3, 6, 8, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(reconstruction(), **{name: np.zeros(shape)})


def test_files_that_are_not_reconstructions(tmp_path):
    with pytest.raises(FileNotFoundError):
        Reconstruction.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", depth=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz: not a reconstruction"):
        Reconstruction.load(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="text.npz"):
        Reconstruction.load(tmp_path / "text.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match="empty.npz"):
        Reconstruction.load(tmp_path / "empty.npz")
    reconstruction().save(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.npz"):
        Reconstruction.load(tmp_path / "cut.npz")
    damaged = bytearray(content)
    damaged[200:400] = bytes(200)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged.npz"):
        Reconstruction.load(tmp_path / "damaged.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    made = reconstruction()
    made.save(tmp_path / "clip.npz")
    with pytest.raises(ValueError, match="stats: wanted what JSON can hold"):
        dataclasses.replace(made, stats={"bad": object()}).save(tmp_path / "clip.npz")
    with pytest.raises(ValueError, match="ends in .npz"):
        made.save(tmp_path / "clip.zip")
    with pytest.raises(OSError, match="no_folder"):
        (tmp_path / "no_folder").write_text("")
        made.save(tmp_path / "no_folder" / "clip.npz")
    assert_equal(made, Reconstruction.load(tmp_path / "clip.npz"))
