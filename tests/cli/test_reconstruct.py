"""``fourdperf reconstruct``: what it writes, and one clear line for what the user got wrong."""

import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli import reconstruct as command
from fourdperf.cli.main import main
from fourdperf.data.video import VideoReader, write_video
from fourdperf.models.d4rt import D4RT, Config
from fourdperf.reconstruct import Reconstruction
from tests.reconstruct.example import example

FILES = ["colmap", "depth.mp4", "depth.png", "page.html", "points.ply", "reconstruction.npz", "tracks.mp4"]
SIZES = {"num_frames": 4, "image_size": 32, "patch_size": (2, 16, 16), "decoder_layers": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with weights/ of a model of 4 frames, random, and a clip of 6 frames of 48 x 64."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    D4RT(Config(32, 2, 2, **SIZES)).save_pretrained(folder / "weights")
    write_video(folder / "clip.mp4", example(6).video, fps=12)
    return folder


def run(files: Path, *arguments) -> int:
    return main(["reconstruct", *(str(argument) for argument in arguments), "--weights", str(files / "weights")])


def only_line(capsys) -> str:
    """The one line on stderr, but for progress bars and warnings."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line and "%|" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".rrd")


def test_everything_is_written_and_agrees(files, tmp_path, capsys):
    out = tmp_path / "сцена"
    assert run(files, files / "clip.mp4", "--out", out, "--grid", 3) == 0
    shown = capsys.readouterr().out
    assert all(f"wrote {out / name}" in shown for name in FILES)
    assert "queries/s" in shown and "FPS" in shown and "2 chunks" in shown
    assert names(out) == FILES
    found = Reconstruction.load(out / "reconstruction.npz")
    video = np.stack(list(VideoReader(files / "clip.mp4", size=None).read()))
    assert np.array_equal(found.video, video) and found.tracks.shape == (9, 6, 3) and found.stats["queries"] > 0
    assert f"{found.stats['queries']:,}" in shown
    page = (out / "page.html").read_text("utf-8")
    assert "clip.mp4" in page and f"<td>{found.stats['queries']:,}</td>" in page
    assert VideoReader(out / "depth.mp4").frames == VideoReader(out / "tracks.mp4").frames == 6
    assert VideoReader(out / "depth.mp4").fps == 12
    assert len(list((out / "colmap/images").iterdir())) == 6
    assert f"element vertex {len(found.points)}\n".encode() in (out / "points.ply").read_bytes()[:200]


def test_frames_points_of_the_user_and_smaller_pictures(files, tmp_path):
    np.savez(tmp_path / "points.npz", source=np.array([[0, 0.5, 0.5], [2, 0.1, 0.9]], np.float32))
    out = tmp_path / "out"
    options = ["--tracks", tmp_path / "points.npz", "--frames", "1::2", "--max_side", 32, "--patch_resolution", "video"]
    assert run(files, files / "clip.mp4", "--out", out, *options, "--keep", 0.25) == 0
    found = Reconstruction.load(out / "reconstruction.npz")
    assert found.video.shape == (3, 24, 32, 3) and len(found.points) == 3 * 32 * 32 // 4
    assert found.track_source[:, 0].tolist() == [0, 2]
    whole = np.stack(list(VideoReader(files / "clip.mp4", size=(24, 32)).read()))
    assert np.array_equal(found.video, whole[1::2])
    assert VideoReader(out / "tracks.mp4").fps == 6


def test_all_pixels_and_no_tracks(files, tmp_path, capsys):
    assert run(files, files / "clip.mp4", "--out", tmp_path / "a", "--tracks", "all", "--frames", ":2") == 0
    assert "saved by the occupancy grid" in capsys.readouterr().out
    assert len(Reconstruction.load(tmp_path / "a/reconstruction.npz").tracks) > 32
    assert run(files, files / "clip.mp4", "--out", tmp_path / "b", "--grid", 0, "--frames", ":1", "--dense", 2) == 0
    found = Reconstruction.load(tmp_path / "b/reconstruction.npz")
    assert found.tracks.shape == (0, 1, 3) and found.depth.shape == (1, 64, 64) and len(found.points) == 64 * 64
    assert names(tmp_path / "b") == FILES


def test_bfloat16(files, tmp_path):
    assert run(files, files / "clip.mp4", "--out", tmp_path / "o", "--dtype", "bfloat16", "--frames", ":2") == 0
    assert np.isfinite(Reconstruction.load(tmp_path / "o/reconstruction.npz").depth).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "1"], "--frames: wanted START:STOP"),
        (["--frames", "a:b"], "--frames: wanted START:STOP"),
        (["--frames=-3:"], "--frames: wanted START:STOP"),
        (["--frames", "::0"], "--frames: wanted START:STOP"),
        (["--frames", "50:"], "--frames: wanted at least one frame"),
        (["--grid", "-1"], "--grid of at least 0, got 640, 1 and -1"),
        (["--max_side", "0"], "--max_side and --dense of at least 1"),
        (["--dense", "0"], "--grid of at least 0, got 640, 0 and 16"),
        (["--keep", "0"], "keep: wanted a share"),
        (["--overlap", "4"], "overlap: wanted 1 to 3 frames"),
        (["--tracks", "none.npz"], "there is no file none.npz"),
        (["--weights", "nowhere"], "no such weights: nowhere"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(files, tmp_path, capsys, options, message):
    arguments = ["reconstruct", files / "clip.mp4", "--out", tmp_path / "out", "--weights", files / "weights", *options]
    assert main([str(argument) for argument in arguments]) == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no .npz file, or broken"),
        ({"points": np.zeros((2, 3))}, "wanted an array named source"),
        ({"source": np.zeros((2, 2))}, "source: wanted (K, 3)"),
        ({"source": np.array([[9.0, 0.5, 0.5]])}, "source: wanted whole t in [0, 5]"),
        ({"source": np.array([[0.0, np.nan, 0.5]])}, "source: wanted u and v in [0, 1]"),
        ({"source": np.array(["a"], dtype=object)}, "is no .npz file, or broken"),
    ],
)
def test_bad_points_to_follow(files, tmp_path, capsys, content, message):
    path = tmp_path / "points.npz"
    path.write_bytes(b"PK nonsense") if content is None else np.savez(path, **content)
    assert run(files, files / "clip.mp4", "--out", tmp_path / "out", "--tracks", path) == 2
    assert message in only_line(capsys)
    assert names(tmp_path) == ["points.npz"]


def test_bad_videos_and_weights(files, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    for video, message in (("none.mp4", "no such video"), (bad, "wanted a video that OpenCV can read")):
        assert run(files, video, "--out", tmp_path / "out") == 2
        assert message in only_line(capsys)
    monkeypatch.setattr(command, "SHIPPED_WEIGHTS", tmp_path / "none")
    assert main(["reconstruct", str(files / "clip.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert "wanted --weights" in only_line(capsys)
    assert names(tmp_path) == ["bad.mp4"]


def test_an_image_is_a_video_of_one_frame(files, tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), example(1).video[0])
    assert run(files, tmp_path / "one.png", "--out", tmp_path / "out", "--grid", 2) == 0
    assert Reconstruction.load(tmp_path / "out/reconstruction.npz").num_frames == 1


def test_a_full_disk_is_one_line_and_keeps_what_is_whole(files, tmp_path):
    paths = [f"{files}/clip.mp4", "--out", f"{tmp_path}/out", "--weights", f"{files}/weights"]
    script = f"""
        import resource, signal, sys
        from fourdperf.cli.main import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # fails a write as a full disk does
        sys.exit(main(["reconstruct", *{paths}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() or not [n for n in names(tmp_path / "out") if ".tmp" in n]


def test_points_that_are_not_finite_are_reported(tmp_path, capsys):
    wanted = example(2, 24, 32)
    wanted.points[:3] = np.nan
    files = command.write_results(tmp_path / "out", wanted, 10, "title", [["a", "b"]])
    assert "3 points are not finite and were left out" in capsys.readouterr().err
    assert all(path.exists() for path in files)
    assert np.isnan(Reconstruction.load(tmp_path / "out/reconstruction.npz").points[:3]).all()
