"""PointOdyssey's layout: a synthetic scene written in it, hand-made annotations, and everything that can be wrong."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.pointodyssey import PointOdyssey
from fourdperf.data.scene_files import Npz
from fourdperf.data.sources import load_window
from tests.data.conftest import FRAMES, HEIGHT, SCALES, WIDTH, asked_and_answered, errors, the_scene

SCALE = SCALES["pointodyssey"]
DEPTH_STEP = 1000 / 65535


def rewrite(folder: Path, compressed: bool = False, **changes) -> None:
    """Changes arrays of anno.npz; None takes one out."""
    with np.load(folder / "anno.npz") as anno:
        arrays = {key: anno[key] for key in anno.files} | changes
    arrays = {key: array for key, array in arrays.items() if array is not None}
    (np.savez_compressed if compressed else np.savez)(folder / "anno.npz", **arrays)


def annotation(folder: Path, key: str) -> np.ndarray:
    with np.load(folder / "anno.npz") as anno:
        return anno[key].copy()


def test_the_files_are_those_of_the_layout(stored):
    folder = stored("pointodyssey")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    numbers = range(FRAMES)
    wanted = {"anno.npz", "info.npz"} | {f"rgbs/rgb_{i:05d}.jpg" for i in numbers}
    wanted |= {f"depths/depth_{i:05d}.png" for i in numbers} | {f"normals/normal_{i:05d}.jpg" for i in numbers}
    wanted |= {f"masks/mask_{i:05d}.png" for i in numbers}
    assert names == wanted
    with np.load(folder / "anno.npz") as anno, np.load(folder / "info.npz") as info:
        shapes = {key: anno[key].shape for key in anno.files}
        assert shapes == {
            "trajs_2d": (FRAMES, 200, 2),
            "trajs_3d": (FRAMES, 200, 3),
            "visibs": (FRAMES, 200),
            "valids": (FRAMES, 200),
            "intrinsics": (FRAMES, 3, 3),
            "extrinsics": (FRAMES, 4, 4),
        }
        assert {key: tuple(info[key]) for key in info.files} == shapes
    depth = cv2.imread(str(folder / "depths/depth_00000.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16 and depth.shape == (HEIGHT, WIDTH)


def test_its_own_annotations_agree_with_each_other(stored):
    """As upstream's documentation has it: K [R | t] of trajs_3d is trajs_2d."""
    anno = {
        key: annotation(stored("pointodyssey"), key) for key in ("trajs_2d", "trajs_3d", "intrinsics", "extrinsics")
    }
    camera = anno["trajs_3d"] @ anno["extrinsics"][:, :3, :3].swapaxes(1, 2) + anno["extrinsics"][:, None, :3, 3]
    pixels = camera @ anno["intrinsics"].swapaxes(1, 2)
    known = np.isfinite(anno["trajs_2d"]).all(-1)
    assert known.mean() > 0.9
    np.testing.assert_allclose((pixels[..., :2] / pixels[..., 2:])[known], anno["trajs_2d"][known], atol=2e-3)


def test_answers_are_those_of_the_scene(stored):
    source = PointOdyssey(stored("pointodyssey"))
    assert source.contents() == ["depth", "normals", "3-D tracks", "poses", "intrinsics"]
    asked, found = asked_and_answered(source)
    exact = the_scene().answer(asked.queries)
    pixel = asked.track < 0
    assert 0.4 < pixel.float().mean() < 0.6
    for field in ("xyz", "uv", "visibility", "displacement"):
        assert getattr(found, f"has_{field}").float().mean() > 0.99, field
    xyz = (found.xyz / SCALE - exact.xyz).norm(dim=-1)
    # a depth is off by half a step at most, and its point by that along a ray of slope below 1
    assert xyz[pixel & found.has_xyz].max() < 0.5 * DEPTH_STEP / SCALE * 3**0.5 + 1e-5
    assert xyz[~pixel & found.has_xyz].max() < 1e-5
    assert errors(found._replace(displacement=found.displacement / SCALE), exact, "displacement").max() < 1e-5
    assert errors(found, exact, "uv").max() < 1e-3
    assert errors(found, exact, "visibility").max() == 0
    # JPEG mixes normals across edges; most are within a few degrees
    assert found.has_normal.float().mean() > 0.3 and errors(found, exact, "normal").median() < 0.03
    # what is about pixels has no other time, for nobody knows how they move
    assert torch.equal(asked.queries.t_tgt[pixel], asked.queries.t_src[pixel])
    assert (asked.queries.t_tgt[~pixel] != asked.queries.t_src[~pixel]).float().mean() > 0.5


def test_normals_are_blenders(copied):
    """Blender's up is the world's y: seen by a camera that is turned by 180 degrees about x, it points to its -y."""
    folder = copied("pointodyssey")
    extrinsics = annotation(folder, "extrinsics")
    extrinsics[0] = np.diag([1, -1, -1, 1])
    extrinsics[1] = np.eye(4)
    rewrite(folder, extrinsics=extrinsics)
    for blender, camera in (((0, 0, 1), (0, -1, 0)), ((1, 0, 0), (1, 0, 0)), ((0, -1, 0), (0, 0, -1))):
        picture = np.rint((np.array(blender) + 1) * 127.5).astype(np.uint8)
        picture = np.broadcast_to(picture[::-1], (HEIGHT, WIDTH, 3))
        for i in (0, 1):
            cv2.imwrite(str(folder / f"normals/normal_{i:05d}.jpg"), picture)
        source = PointOdyssey(folder)
        np.testing.assert_allclose(source.normal(0)[5, 5], camera, atol=0.02)
        np.testing.assert_allclose(source.normal(1)[5, 5], np.multiply(camera, (1, -1, -1)), atol=0.02)


def test_unknown_depths(copied):
    folder = copied("pointodyssey")
    stored = np.full((HEIGHT, WIDTH), 6554, np.uint16)
    stored[0], stored[1] = 0, 65535
    cv2.imwrite(str(folder / "depths/depth_00002.png"), stored)
    depth = PointOdyssey(folder).depth(2)
    assert np.isnan(depth[:2]).all() and depth.dtype == np.float32
    np.testing.assert_allclose(depth[2:], 100.0077, rtol=1e-5)


def test_invalid_tracks(copied):
    folder = copied("pointodyssey")
    source = PointOdyssey(folder)
    before = source.tracks(range(FRAMES))
    seen = np.nonzero(before.visible.all(0))[0][:5]
    uv, xyz, valids = (annotation(folder, key) for key in ("trajs_2d", "trajs_3d", "valids"))
    uv[1, seen[0], 0], xyz[2, seen[1], 1], xyz[3, seen[2] :, 2] = np.inf, np.nan, -np.inf
    valids[4, seen[3]] = False
    uv[5, seen[4]] = WIDTH + 3, 5
    rewrite(folder, trajs_2d=uv, trajs_3d=xyz, valids=valids)
    tracks = PointOdyssey(folder).tracks(range(FRAMES))
    for t, n in ((1, seen[0]), (2, seen[1]), (3, seen[2]), (4, seen[3])):
        assert np.isnan(tracks.xyz[t, n]).all()
    assert np.isnan(tracks.uv[1, seen[0]]).all() and np.isnan(tracks.uv[4, seen[3]]).all()
    assert np.isfinite(tracks.uv[2, seen[1]]).all()
    assert not tracks.visible[5, seen[4]] and before.visible[5, seen[4]]
    asked, found = asked_and_answered(PointOdyssey(folder))
    assert all(part.isfinite().all() for part in found)
    assert found.has_xyz.any() and (~found.has_xyz).any()


def test_half_precision_annotations(copied):
    """As upstream's older releases have them: rotations become exact again."""
    folder = copied("pointodyssey")
    with np.load(folder / "anno.npz") as anno:
        halves = {key: anno[key].astype(np.float16) for key in ("trajs_2d", "trajs_3d", "intrinsics", "extrinsics")}
    rewrite(folder, **halves)
    source = PointOdyssey(folder)
    rotation = source.world_from_camera([0, 3])[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-12)
    asked, found = asked_and_answered(source, 500)
    assert errors(found, the_scene().answer(asked.queries), "uv").max() < 0.03


@pytest.mark.parametrize("empty", [np.zeros((0,)), np.zeros((FRAMES, 0, 3)), np.array(0.0), None])
def test_sequences_without_3d_tracks(copied, empty):
    folder = copied("pointodyssey")
    rewrite(folder, trajs_3d=empty)
    source = PointOdyssey(folder)
    assert "2-D tracks" in source.contents()
    asked, found = asked_and_answered(source)
    about_track = asked.track >= 0
    assert torch.equal(asked.queries.t_tgt[about_track], asked.queries.t_cam[about_track])
    assert not found.has_xyz[about_track].any() and found.has_uv[about_track].float().mean() > 0.9
    exact = the_scene().answer(asked.queries)
    assert errors(found, exact, "uv").max() < 1e-3 and errors(found, exact, "visibility").max() == 0


def test_compressed_annotations_and_parts_of_a_sequence(copied, monkeypatch):
    folder = copied("pointodyssey")
    with monkeypatch.context() as patch:
        patch.delattr(Npz, "_stream_rows")  # not needed: arrays that are not compressed are memory-mapped
        plain = load_window(PointOdyssey(folder), [1, 3, 4])
    rewrite(folder, compressed=True)
    packed = load_window(PointOdyssey(folder), [1, 3, 4])
    everything = load_window(PointOdyssey(folder), range(FRAMES))
    for part in ("uv", "xyz", "visible"):
        assert np.array_equal(getattr(plain.tracks, part), getattr(packed.tracks, part), equal_nan=True)
        rows = getattr(everything.tracks, part)[[1, 3, 4]]
        assert np.array_equal(getattr(plain.tracks, part), rows, equal_nan=True)
    assert np.array_equal(plain.world_from_camera, everything.world_from_camera[[1, 3, 4]])
    fortran = {key: np.asfortranarray(annotation(folder, key)) for key in ("trajs_3d", "extrinsics")}
    rewrite(folder, **fortran)
    assert np.array_equal(load_window(PointOdyssey(folder), [1, 3, 4]).tracks.xyz, plain.tracks.xyz, equal_nan=True)


def test_without_depth_normals_and_masks(copied):
    folder = copied("pointodyssey")
    for what in ("depths", "normals", "masks"):
        for file in (folder / what).iterdir():
            file.unlink()
    source = PointOdyssey(folder)
    assert source.contents() == ["3-D tracks", "poses", "intrinsics"]
    asked, found = asked_and_answered(source, 400)
    assert (asked.track >= 0).all() and found.has_xyz.float().mean() > 0.99 and not found.has_normal.any()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_pose(folder: Path) -> None:
    extrinsics = annotation(folder, "extrinsics")
    extrinsics[3, 1, 2] = np.nan
    rewrite(folder, extrinsics=extrinsics)


def scaled_pose(folder: Path) -> None:
    rewrite(folder, extrinsics=annotation(folder, "extrinsics") * [2, 2, 2, 1])


def zero_focal(folder: Path) -> None:
    rewrite(folder, intrinsics=annotation(folder, "intrinsics") * np.array([0, 1, 1])[:, None])


BROKEN = {
    "no anno": (lambda f: (f / "anno.npz").unlink(), "anno.npz: the file is missing"),
    "anno cut off": (lambda f: cut(f / "anno.npz"), "anno.npz: no .npz, or a corrupt or cut off one"),
    "anno is text": (lambda f: (f / "anno.npz").write_text("no"), "anno.npz: no .npz"),
    "pickled": (lambda f: rewrite(f, visibs=np.array([{}], object)), "visibs holds pickled objects"),
    "no visibs": (lambda f: rewrite(f, visibs=None), "anno.npz: wanted an array 'visibs', got only"),
    "tracks of another shape": (
        lambda f: rewrite(f, trajs_2d=np.zeros((FRAMES, 200, 3))),
        r"trajs_2d: wanted shape \(T, N, 2\), got \(6, 200, 3\)",
    ),
    "poses of another length": (
        lambda f: rewrite(f, extrinsics=np.zeros((FRAMES - 1, 4, 4))),
        r"extrinsics: wanted shape \(6, 4, 4\), got \(5, 4, 4\)",
    ),
    "3-D tracks of another number": (
        lambda f: rewrite(f, trajs_3d=np.zeros((FRAMES, 9, 3))),
        r"trajs_3d: wanted shape \(6, 200, 3\)",
    ),
    "NaN pose": (nan_pose, "anno.npz: extrinsics: pose 3 holds values that are not finite"),
    "scaled pose": (scaled_pose, "extrinsics: pose 0: wanted a rigid motion"),
    "no focal length": (zero_focal, "intrinsics 0: wanted focal lengths above 0"),
    "no frames": (lambda f: [p.unlink() for p in (f / "rgbs").iterdir()], "rgbs: wanted 6 frames"),
    "a frame is missing": (lambda f: (f / "rgbs/rgb_00004.jpg").unlink(), "rgb_00004.jpg: the file is missing"),
    "a depth map is missing": (
        lambda f: (f / "depths/depth_00002.png").unlink(),
        r"depth_00002.png: the file is missing \(and 0 more of 6 frames\)",
    ),
    "a depth map is cut off": (lambda f: cut(f / "depths/depth_00005.png"), "depth_00005.png: the image is cut off"),
    "a frame is cut off": (lambda f: cut(f / "rgbs/rgb_00001.jpg"), "rgb_00001.jpg: the image is cut off"),
    "a frame is empty": (lambda f: (f / "rgbs/rgb_00001.jpg").write_bytes(b""), "rgb_00001.jpg: wanted an image"),
    "a normal map is text": (
        lambda f: (f / "normals/normal_00001.jpg").write_text("text"),
        "normal_00001.jpg: wanted an image that OpenCV can read, got 4 bytes",
    ),
    "an 8-bit depth map": (
        lambda f: cv2.imwrite(str(f / "depths/depth_00001.png"), np.ones((HEIGHT, WIDTH), np.uint8)),
        "depth_00001.png: wanted one 16-bit channel, got uint8",
    ),
    "a smaller depth map": (
        lambda f: cv2.imwrite(str(f / "depths/depth_00001.png"), np.ones((4, 5), np.uint16)),
        r"depth of frame 1: wanted \(40, 60\) as before, got \(4, 5\)",
    ),
    "a smaller normal map": (
        lambda f: [cv2.imwrite(str(p), np.ones((4, 5, 3), np.uint8)) for p in (f / "normals").iterdir()],
        r"normal: wanted \(40, 60\) as depth, got \(4, 5\)",
    ),
    "a smaller frame": (
        lambda f: cv2.imwrite(str(f / "rgbs/rgb_00001.jpg"), np.ones((4, 5, 3), np.uint8)),
        r"rgb_00001.jpg: wanted \(40, 60\) as the first frame, got \(4, 5\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(copied, capfd, case):
    folder = copied("pointodyssey")
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        asked_and_answered(PointOdyssey(folder), 50)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_not_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: wanted a folder, there is none"):
        PointOdyssey(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="anno.npz: the file is missing"):
        PointOdyssey(tmp_path)
