"""COLMAP: the cameras that a reader of its documented text format recovers."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from fourdperf.data.cameras import quaternion_from_rotation
from fourdperf.reconstruct.colmap import write_colmap
from tests.reconstruct.example import example


def rows(path) -> list[list[str]]:
    lines = path.read_text("utf-8").split("\n")
    assert lines.pop() == ""
    return [line.split() for line in lines if not line.startswith("#")]


def rotation(q: np.ndarray) -> np.ndarray:
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def read(folder):
    """cameras {id: (model, width, height, parameters)}, images [(id, camera_from_world, camera, name, points2D)] and
    points {id: (xyz, rgb, error, track)}."""
    model = folder / "sparse/0"
    cameras = {int(i): (kind, int(w), int(h), np.array(p, float)) for i, kind, w, h, *p in rows(model / "cameras.txt")}
    images = []
    lines = rows(model / "images.txt")
    for head, points in zip(lines[::2], lines[1::2]):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation(np.array(head[1:5], float)), np.array(head[5:8], float)
        images.append((int(head[0]), pose, int(head[8]), head[9], np.array(points, float).reshape(-1, 3)))
    points = {
        int(i): (np.array(p[:3], np.float32), [int(c) for c in p[3:6]], float(p[6]), [int(x) for x in p[7:]])
        for i, *p in rows(model / "points3D.txt")
    }
    return cameras, images, points


def test_cameras_points_and_pictures_come_back(tmp_path):
    wanted = example(4)
    folder = tmp_path / "модель"
    assert write_colmap(folder, wanted) == 0
    cameras, images, points = read(folder)
    height, width = wanted.video.shape[1:3]
    assert {i: camera[:3] for i, camera in cameras.items()} == {1: ("PINHOLE", width, height)}
    k = wanted.intrinsics[0].astype(float)
    assert np.array_equal(cameras[1][3], [k[0, 0] * width, k[1, 1] * height, width / 2, height / 2])
    assert [image[0] for image in images] == [1, 2, 3, 4]
    for t, (_, pose, camera, name, _) in enumerate(images):
        assert camera == 1
        # the stored pose is a rotation to single precision only
        assert np.abs(pose @ wanted.world_from_camera[t].astype(float) - np.eye(4)).max() < 1e-6
        assert np.array_equal(cv2.imread(str(folder / "images" / name), cv2.IMREAD_COLOR_RGB), wanted.video[t])
    assert len(points) == len(wanted.points)
    assert np.array_equal(np.stack([points[i + 1][0] for i in range(len(points))]), wanted.points)
    assert [points[i + 1][1] for i in range(len(points))] == wanted.point_colors.tolist()


def test_poses_are_exact_in_double_precision():
    rng = np.random.default_rng(0)
    random = np.linalg.qr(rng.standard_normal((200, 3, 3)))[0]
    random *= np.linalg.det(random)[:, None, None]
    half_turns = np.array([np.diag(d) for d in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1])], float)
    for r in np.concatenate([random, half_turns]):
        (q,) = quaternion_from_rotation(r[None])
        assert q[0] >= 0 and np.abs(rotation(q) - r).max() < 4e-15


def test_each_point_lies_where_its_picture_shows_it(tmp_path):
    wanted = example(3)
    write_colmap(tmp_path, wanted)
    cameras, images, points = read(tmp_path)
    for i, (xyz, _, error, (image, index)) in points.items():
        x, y, back = images[image - 1][4][index]
        assert back == i and error == -1
        fx, fy, cx, cy = cameras[1][3]
        a, b, z = images[image - 1][1][:3, :3] @ xyz + images[image - 1][1][:3, 3]
        assert abs(fx * a / z + cx - x) < 0.01 and abs(fy * b / z + cy - y) < 0.01
    # the cloud holds every pixel of every frame: so must the places, at pixel centres
    height, width = wanted.video.shape[1:3]
    places = {(round(x * 2), round(y * 2)) for x, y, _ in images[1][4]}
    assert places == {(2 * x + 1, 2 * y + 1) for x in range(width) for y in range(height)}


def test_a_camera_per_focal_length_and_distortion(tmp_path):
    wanted = example(4)
    k, bend = wanted.intrinsics.copy(), wanted.distortion.copy()
    k[2, 0, 0], bend[3] = 1.5, (0.1, -0.02)
    write_colmap(tmp_path, replace(wanted, intrinsics=k, distortion=bend))
    cameras, images, points = read(tmp_path)
    used = [cameras[image[2]] for image in images]
    assert [camera[0] for camera in used] == ["PINHOLE", "PINHOLE", "PINHOLE", "OPENCV"] and len(cameras) == 3
    assert used[0] is used[1] and used[2][3][0] == np.float32(1.5) * 64
    parameters = used[3][3]
    assert parameters[4:].astype(np.float32).tolist() == [*bend[3].tolist(), 0, 0]
    # OpenCV, from which this camera model has its name, sees the points at the same places
    pixels = parameters[:4]
    matrix = np.array([[pixels[0], 0, pixels[2]], [0, pixels[1], pixels[3]], [0, 0, 1]])
    pose, seen = images[3][1], images[3][4]
    world = np.stack([points[int(i)][0] for i in seen[:, 2]]).astype(float)
    shown = cv2.projectPoints(world, cv2.Rodrigues(pose[:3, :3])[0], pose[:3, 3], matrix, parameters[4:])[0][:, 0]
    assert np.abs(shown - seen[:, :2]).max() < 0.01


def test_at_most_so_many_points_and_none_that_is_not_finite(tmp_path):
    wanted = example(3)
    points = wanted.points.copy()
    points[::7] = np.nan
    skipped = write_colmap(tmp_path, replace(wanted, points=points), max_points=100)
    assert skipped == len(points[::7])
    _, images, found = read(tmp_path)
    assert len(found) == 100 == sum(len(image[4]) for image in images)
    assert all(np.isfinite(point[0]).all() for point in found.values())
    assert {point[3][0] for point in found.values()} == {1, 2, 3}


def test_no_points_and_one_frame(tmp_path):
    wanted = example(1)
    wanted = replace(wanted, points=wanted.points[:0], point_colors=wanted.point_colors[:0], point_frame=np.zeros(0))
    write_colmap(tmp_path, wanted)
    cameras, images, points = read(tmp_path)
    assert len(cameras) == len(images) == 1 and not points and np.abs(images[0][1] - np.eye(4)).max() < 1e-12


@pytest.mark.parametrize(("field", "place"), [("world_from_camera", (1, 0, 0)), ("intrinsics", (1, 1, 1))])
def test_what_colmap_cannot_hold_is_an_error_before_anything_is_written(tmp_path, field, place):
    wanted = example(2)
    array = getattr(wanted, field).copy()
    array[place] = np.nan
    with pytest.raises(ValueError, match=field):
        write_colmap(tmp_path / "out", replace(wanted, **{field: array}))
    skew = wanted.intrinsics.copy()
    skew[0, 0, 1] = 0.1
    with pytest.raises(ValueError, match="skew"):
        write_colmap(tmp_path / "out", replace(wanted, intrinsics=skew))
    assert not list(tmp_path.iterdir())
