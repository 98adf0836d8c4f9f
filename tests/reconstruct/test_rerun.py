"""The Rerun recording: Rerun's own tool reads it; without the library there is one clear line."""

import builtins
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fourdperf.reconstruct.rerun import write_rerun
from tests.reconstruct.example import example


def rerun_tool(*arguments) -> str:
    done = subprocess.run([sys.executable, "-m", "rerun", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_rerun_reads_the_recording(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    wanted = example(3, 24, 32)
    points = wanted.points.copy()
    points[0] = np.nan
    path = tmp_path / "записа.rrd"
    write_rerun(path, replace(wanted, points=points))
    assert "verified without error" in rerun_tool("rrd", "verify", str(path))
    shown = rerun_tool("rrd", "print", str(path))
    for entity in ("camera", "camera/video/image", "camera/depth/image", "points", "tracks", "paths"):
        assert f"/world/{entity}" in shown


def test_empty_ones(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    wanted = example(1, 24, 32)
    arrays = ("points", "point_colors", "point_frame", "tracks", "tracks_uv", "tracks_visible", "track_colors")
    none = {name: getattr(wanted, name)[:0] for name in (*arrays, "track_source")}
    write_rerun(tmp_path / "a.rrd", replace(wanted, **none))
    assert "verified without error" in rerun_tool("rrd", "verify", str(tmp_path / "a.rrd"))
    with pytest.raises(OSError, match="it is a folder"):
        write_rerun(tmp_path, wanted)


def test_without_the_library_the_error_names_it(tmp_path, monkeypatch):
    find = builtins.__import__

    def without(name, *arguments):
        if name == "rerun":
            raise ImportError("no such module")
        return find(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install rerun-sdk"):
        write_rerun(tmp_path / "a.rrd", example(1, 24, 32))
    assert not list(tmp_path.iterdir())
