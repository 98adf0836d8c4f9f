"""PLY: what a reader that knows nothing of the writer finds in the file."""

import numpy as np
import pytest

from fourdperf.reconstruct.ply import write_ply
from tests.reconstruct.example import example

TYPES = {"float": "<f4", "uchar": "u1"}


def read_ply(path) -> np.ndarray:
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    (count,) = (int(line.split()[2]) for line in lines if line.startswith("element vertex "))
    fields = [line.split()[1:] for line in lines if line.startswith("property ")]
    vertices = np.frombuffer(body, [(name, TYPES[kind]) for kind, name in fields])
    assert len(vertices) == count
    return vertices


def test_round_trip(tmp_path):
    wanted = example(3)
    path = tmp_path / "ein Würfel 立方体.ply"
    assert write_ply(path, wanted.points, wanted.point_colors) == 0
    read = read_ply(path)
    assert np.array_equal(np.stack([read[axis] for axis in "xyz"], 1), wanted.points)
    assert np.array_equal(np.stack([read[c] for c in ("red", "green", "blue")], 1), wanted.point_colors)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_points_that_are_not_finite_are_left_out_and_counted(tmp_path):
    points = np.arange(15.0).reshape(5, 3)
    points[1, 2], points[3, 0], points[4, 1] = np.nan, np.inf, 1e300  # the last overflows single precision
    colors = np.arange(15, dtype=np.uint8).reshape(5, 3)
    with np.errstate(over="ignore"):
        assert write_ply(tmp_path / "p.ply", points, colors) == 3
    read = read_ply(tmp_path / "p.ply")
    assert read["x"].tolist() == [0, 6] and read["blue"].tolist() == [2, 8]


def test_an_empty_cloud_is_a_valid_file(tmp_path):
    assert write_ply(tmp_path / "p.ply", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)) == 0
    assert len(read_ply(tmp_path / "p.ply")) == 0


@pytest.mark.parametrize(
    ("points", "colors", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 2), np.uint8), r"points: wanted floats \(P, 3\)"),
        (np.zeros((4, 3), int), np.zeros((4, 3), np.uint8), r"points: wanted floats"),
        (np.zeros((4, 3)), np.zeros((5, 3), np.uint8), r"colors: wanted uint8 \(4, 3\), got uint8 \(5, 3\)"),
        (np.zeros((4, 3)), np.zeros((4, 3)), r"colors: wanted uint8"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, points, colors, message):
    with pytest.raises(ValueError, match=message):
        write_ply(tmp_path / "p.ply", points, colors)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="file"):
        write_ply(tmp_path / "file" / "p.ply", np.zeros((1, 3)), np.zeros((1, 3), np.uint8))
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write_ply(tmp_path, np.zeros((1, 3)), np.zeros((1, 3), np.uint8))
    assert (tmp_path / "file").read_text() == "old"
