"""Films and pictures: what they show is where the reconstruction says."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from fourdperf.data.video import VideoReader
from fourdperf.reconstruct.movie import track_hues, write_depth_movie, write_depth_sheet, write_track_movie
from tests.reconstruct.example import example


def film(path) -> np.ndarray:
    return np.stack(list(VideoReader(path, size=None).read())).astype(int)


def one_track(frames: int = 6):
    """A grey video with a single track that moves to the right along row 24.5 of 48 and is hidden in frame 4."""
    wanted = example(frames)
    uv = np.stack([np.linspace(0.1, 0.9, frames), np.full(frames, 0.5)], -1)[None]
    return replace(
        wanted,
        video=np.full_like(wanted.video, 90),
        tracks=np.zeros((1, frames, 3)),
        tracks_uv=uv,
        tracks_visible=np.arange(frames)[None] != 4,
        track_colors=np.full((1, 3), 255),
        track_source=np.array([[0, 0.1, 0.5]]),
    )


def test_depth_film(tmp_path):
    wanted = example(3)
    path = tmp_path / "tiefe é.mp4"
    write_depth_movie(path, wanted, fps=5)
    reader = VideoReader(path, size=None)
    assert (reader.frames, reader.fps) == (3, 5)
    frames = film(path)
    scale = 7  # of 48 x 64 to about 320
    assert frames.shape[2] >= 2 * 64 * scale
    left = frames[:, -48 * scale :, : 64 * scale]
    small = np.stack([cv2.resize(f.astype(np.uint8), (64, 48), interpolation=cv2.INTER_AREA) for f in left])
    assert np.abs(small.astype(int) - wanted.video).mean() < 12
    right = frames[:, -48 * scale :, 64 * scale + 4 :]
    # Turbo: near is blue, far is red
    far = wanted.depth[0] > 6
    at = right[0, scale // 2 :: scale, scale // 2 :: scale][:48, :64]
    assert at[far][:, 0].mean() > at[far][:, 2].mean() + 50
    near = wanted.depth[0] < 3.6
    assert at[near][:, 2].mean() > at[near][:, 0].mean() + 50


def test_a_track_is_drawn_where_it_is_with_a_trail_behind_it(tmp_path):
    wanted = one_track()
    write_track_movie(tmp_path / "t.mp4", wanted)
    frames = film(tmp_path / "t.mp4")
    marked = np.abs(frames - 90).max(-1) > 40
    height, width = marked.shape[1:]
    for t in (0, 1, 2, 3, 5):
        row, column = height // 2, int(wanted.tracks_uv[0, t, 0] * width)
        assert marked[t, row - 2 : row + 3, column - 2 : column + 3].mean() > 0.9
        assert not marked[t, :, column + 8 :].any(), "nothing lies ahead"
    middle = lambda t, a, b: marked[t, height // 2 - 2 : height // 2 + 2, int(a * width) : int(b * width)].any(0).mean()
    assert middle(3, 0.27, 0.57) > 0.95, "the trail"
    assert not marked[4, :, int(0.65 * width) :].any(), "no disc where it is hidden"
    assert not marked[5, :, int(0.65 * width) : int(0.85 * width)].any(), "no trail from where it was hidden"


def test_hues_differ_across_the_frame():
    hues = track_hues(example(2, spacing=12)).astype(int)
    assert len(np.unique(hues, axis=0)) > 10 and (hues.max(1) > 200).all()
    assert track_hues(replace_tracks(example(2), 0)).shape == (0, 3)


def replace_tracks(wanted, count):
    names = ("tracks", "tracks_uv", "tracks_visible", "track_colors", "track_source")
    return replace(wanted, **{name: getattr(wanted, name)[:count] for name in names})


def test_unknown_and_far_places_no_tracks_and_one_frame(tmp_path):
    wanted = one_track()
    uv = wanted.tracks_uv.copy()
    uv[0, 1], uv[0, 2] = np.nan, (1e30, 0.5)
    write_track_movie(tmp_path / "a.mp4", replace(wanted, tracks_uv=uv))
    assert not (np.abs(film(tmp_path / "a.mp4")[1:3] - 90) > 40)[:, :, 200:].any()
    write_track_movie(tmp_path / "b.mp4", replace_tracks(example(1), 0))
    assert len(film(tmp_path / "b.mp4")) == 1
    blank = np.full_like(example(1).depth, np.nan)
    write_depth_movie(tmp_path / "c.mp4", replace(example(1), depth=blank))
    write_depth_sheet(tmp_path / "c.png", replace(example(1), depth=blank, depth_confidence=blank))
    assert np.abs(film(tmp_path / "c.mp4")[0, -20:, -20:] - 128).max() < 12


def test_only_so_many_tracks(tmp_path):
    wanted = replace(example(2, spacing=4), video=np.full((2, 48, 64, 3), 90))
    marked = []
    for limit in (5, 50):
        write_track_movie(tmp_path / "t.mp4", wanted, max_tracks=limit)
        marked.append((np.abs(film(tmp_path / "t.mp4")[0] - 90).max(-1) > 40).sum())
    assert 5 * 40 < marked[0] < 5 * 80 and 8 < marked[1] / marked[0] < 12


def test_sheet(tmp_path):
    write_depth_sheet(tmp_path / "s.png", example(12))
    sheet = cv2.imread(str(tmp_path / "s.png"))
    assert sheet.shape[1] == 8 * 160 + 7 * 4 and sheet.shape[0] > 3 * 120


def test_no_frame_and_no_place_to_write(tmp_path):
    wanted = example(2)
    none = replace(
        replace_tracks(wanted, 0),
        **{n: getattr(wanted, n)[:0] for n in ("video", "depth", "depth_confidence")},
        **{n: getattr(wanted, n)[:0] for n in ("world_from_camera", "intrinsics", "distortion")},
        tracks=np.zeros((0, 0, 3)),
        tracks_uv=np.zeros((0, 0, 2)),
        tracks_visible=np.zeros((0, 0)),
    )
    for write in (write_depth_movie, write_track_movie, write_depth_sheet):
        with pytest.raises(ValueError, match="wanted at least one frame"):
            write(tmp_path / "x.mp4", none)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_depth_movie(tmp_path / "file" / "x.mp4", wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
