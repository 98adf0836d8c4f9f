"""The generic folder: every way to say the same, videos, tracks alone, memory, and what can be wrong."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.folder import Folder
from fourdperf.data.scene_files import MemoryFiles
from fourdperf.data.sources import load_window
from fourdperf.data.video import VideoReader, write_video
from tests.data.conftest import FRAMES, HEIGHT, WIDTH, asked_and_answered, errors, the_scene

EVERYTHING = ["depth", "normals", "moving bodies", "3-D tracks", "poses", "intrinsics"]


def note(folder: Path, **changes) -> None:
    """Changes keys of scene.json; None takes one out."""
    notes = json.loads((folder / "scene.json").read_text()) | changes
    (folder / "scene.json").write_text(json.dumps({key: value for key, value in notes.items() if value is not None}))


def rewrite(folder: Path, name: str, **changes) -> None:
    """Changes arrays of an .npz; None takes one out."""
    with np.load(folder / name) as file:
        arrays = {key: file[key] for key in file.files} | changes
    np.savez(folder / name, **{key: array for key, array in arrays.items() if array is not None})


def array(folder: Path, name: str, key: str) -> np.ndarray:
    with np.load(folder / name) as file:
        return file[key].copy()


def each(folder: Path, what: str, change) -> None:
    """Replaces the maps of every frame: change(array) gives the new one, an array for .npy, or (suffix, image)."""
    for path in sorted((folder / what).iterdir()):
        stored = np.load(path) if path.suffix == ".npy" else cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        made = change(stored)
        path.unlink()
        if isinstance(made, tuple):
            cv2.imwrite(str(path.with_suffix(made[0])), made[1])
        else:
            np.save(path.with_suffix(".npy"), made)


def assert_same(a: Folder, b: Folder, atol: float = 1e-6, **other: float) -> None:
    """The same scene, up to rounding."""
    first, second = (load_window(source, range(FRAMES)) for source in (a, b))
    for field in ("depth", "normal", "instances", "motion", "intrinsics", "world_from_camera"):
        one, two = getattr(first, field), getattr(second, field)
        assert (one is None) == (two is None), field
        if one is not None:
            np.testing.assert_allclose(one, two, atol=other.get(field, atol), err_msg=field)
    for one, two in zip(first.tracks, second.tracks):
        np.testing.assert_allclose(one, two, atol=atol)


def test_answers_are_those_of_the_scene(stored):
    source = Folder(stored("folder"))
    assert source.contents() == EVERYTHING and source.size == (HEIGHT, WIDTH) and source.num_frames == FRAMES
    asked, found = asked_and_answered(source)
    exact = the_scene().answer(asked.queries)
    for field, limit in {"xyz": 1e-5, "uv": 1e-5, "displacement": 1e-5, "visibility": 0}.items():
        assert getattr(found, f"has_{field}").float().mean() > (0.85 if field == "visibility" else 0.99), field
        assert errors(found, exact, field).max() <= limit, field
    # those of tracks are the mean of four pixels around
    normal = errors(found, exact, "normal")
    assert len(normal) > 500 and normal.quantile(0.95) < 1e-4 and normal.max() < 0.2
    frames = np.stack(source.frames(range(FRAMES)))
    assert np.array_equal(frames, (the_scene().render().video * 255).round().byte().numpy())


def intrinsics_in_pixels(folder):
    pixels = array(folder, "cameras.npz", "intrinsics") * np.array([WIDTH, HEIGHT, 1])[:, None]
    rewrite(folder, "cameras.npz", intrinsics=pixels)
    note(folder, intrinsics="pixels")


def intrinsics_of_opencv(folder):
    intrinsics_in_pixels(folder)
    pixels = array(folder, "cameras.npz", "intrinsics")
    pixels[:, :2, 2] -= 0.5
    rewrite(folder, "cameras.npz", intrinsics=pixels)
    note(folder, intrinsics="pixels_integer_centres")


def poses_the_other_way(folder):
    poses = array(folder, "cameras.npz", "poses") @ np.diag([1.0, -1, -1, 1])
    rewrite(folder, "cameras.npz", poses=np.linalg.inv(poses))
    note(folder, poses="camera_from_world", axes="opengl")


def depth_as_distance(folder):
    k = the_scene().intrinsics.numpy()
    for i, path in enumerate(sorted((folder / "depth").iterdir())):
        y, x = ((np.arange(n) + 0.5) / n - 0.5 for n in (HEIGHT, WIDTH))
        stretch = np.sqrt(1 + (x / k[i, 0, 0]) ** 2 + (y[:, None] / k[i, 1, 1]) ** 2)
        np.save(path, (np.load(path) * stretch).astype(np.float32))
    note(folder, depth="distance")


def depth_in_millimetres(folder):
    each(folder, "depth", lambda z: (".png", np.rint(z * 1000).astype(np.uint16)))
    note(folder, depth_scale=0.001)


def depth_as_tiff(folder):
    each(folder, "depth", lambda z: (".tiff", z))


def maps_in_one_file(folder):
    for what in ("depth", "normals", "instances"):
        source = Folder(folder)
        maps = {"depth": source.depth, "normals": source.normal, "instances": source.instances}[what]
        np.save(folder / f"{what}.npy", np.stack([maps(i) for i in range(FRAMES)]))
        for path in (folder / what).iterdir():
            path.unlink()


def normals_in_the_world(folder):
    pose = the_scene().world_from_camera.numpy()
    for i, path in enumerate(sorted((folder / "normals").iterdir())):
        np.save(path, np.load(path) @ pose[i, :3, :3].T)
    note(folder, normals="world")


def normals_as_images(folder):
    each(folder, "normals", lambda n: (".png", np.rint((n[..., ::-1] + 1) * 32767.5).astype(np.uint16)))


def normals_as_small_images(folder):
    each(folder, "normals", lambda n: (".png", np.rint((n[..., ::-1] + 1) * 127.5).astype(np.uint8)))


def tracks_in_pixels(folder):
    uv = array(folder, "tracks.npz", "uv") * np.array([WIDTH, HEIGHT])
    rewrite(folder, "tracks.npz", uv=uv - 0.5)
    note(folder, tracks="pixels_integer_centres")


WAYS = {
    intrinsics_in_pixels: {},
    intrinsics_of_opencv: {},
    poses_the_other_way: {"world_from_camera": 1e-5},
    depth_as_distance: {},
    depth_in_millimetres: {"depth": 5.1e-4},
    depth_as_tiff: {},
    maps_in_one_file: {},
    normals_in_the_world: {"normal": 1e-5},
    normals_as_images: {"normal": 1e-4},
    normals_as_small_images: {"normal": 1e-2},
    tracks_in_pixels: {},
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_other_ways_to_say_the_same(stored, copied, way):
    folder = copied("folder")
    way(folder)
    assert_same(Folder(stored("folder")), Folder(folder), **WAYS[way])


def test_in_memory(stored):
    folder = stored("folder")
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert_same(Folder(folder), Folder(MemoryFiles("scene", contents)), atol=0)
    del contents["depth/00003.npy"]
    with pytest.raises(FileNotFoundError, match=r"scene/depth/00003.\*: the map of this frame is missing"):
        Folder(MemoryFiles("scene", contents))


def test_videos_are_read_at_the_right_frames(copied, tmp_path):
    folder = copied("folder")
    for path in (folder / "frames").iterdir():
        path.unlink()
    # frame i is grey 10 i: compression does not blur this
    write_video(folder / "video.mp4", [np.full((HEIGHT, WIDTH, 3), 40 * i, np.uint8) for i in range(FRAMES)])
    source = Folder(folder)
    assert (source.num_frames, source.size) == (FRAMES, (HEIGHT, WIDTH))
    for numbers in ([0], [5], [3, 4], [1, 3, 5], list(range(FRAMES))):
        found = [int(frame.mean()) for frame in source.frames(numbers)]
        assert np.abs(np.array(found) - 40 * np.array(numbers)).max() < 6, numbers
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    memory = Folder(MemoryFiles("scene", contents))
    assert np.array_equal(memory.frames([2])[0], source.frames([2])[0])
    asked, found = asked_and_answered(memory, 100)
    assert found.has_xyz.all()
    (folder / "video.mp4").write_bytes((folder / "video.mp4").read_bytes()[:500])
    with pytest.raises(ValueError, match="video.mp4: wanted a video that OpenCV can read"):
        Folder(folder)


def test_long_videos_seek(tmp_path):
    (tmp_path / "scene").mkdir()
    count = 300
    ramp = np.arange(64, dtype=np.uint8)[None, :, None] * 4
    write_video(
        tmp_path / "scene/video.mp4", (np.roll(ramp, 3 * i, 1).repeat(32, 0).repeat(3, 2) for i in range(count))
    )
    in_order = list(VideoReader(tmp_path / "scene/video.mp4", size=None).read())
    np.savez(tmp_path / "scene/tracks.npz", uv=np.full((count, 1, 2), 0.5), visible=np.ones((count, 1), bool))
    (tmp_path / "scene/scene.json").write_text('{"tracks": "normalised"}')
    source = Folder(tmp_path / "scene")
    for start in (0, 11, 12, 13, 137, 290):
        numbers = [start, start + 1, start + 9]
        for number, frame in zip(numbers, source.frames(numbers)):
            assert np.array_equal(frame, in_order[number]), number
    assert not np.array_equal(in_order[12], in_order[13])


def test_static_scenes_can_be_followed(copied):
    folder = copied("folder")
    for path in [*(folder / "instances").iterdir(), folder / "bodies.npz", folder / "tracks.npz"]:
        path.unlink()
    note(folder, static=True, tracks=None)
    source = Folder(folder)
    assert "static" in source.contents()
    asked, found = asked_and_answered(source)
    assert (asked.queries.t_src != asked.queries.t_tgt).float().mean() > 0.6
    assert found.has_xyz.all() and (found.displacement == 0).all() and found.has_displacement.all()
    room = the_scene().render().instance[asked.queries.t_src, asked.row, asked.column] == 0
    exact = the_scene().answer(asked.queries)
    assert (found.xyz - exact.xyz)[room].abs().max() < 1e-5


def test_without_poses_everything_stays_in_its_own_camera(copied):
    folder = copied("folder")
    rewrite(folder, "cameras.npz", poses=None)
    source = Folder(folder)
    assert "poses" not in source.contents()
    asked, found = asked_and_answered(source)
    pixel = asked.track < 0
    _, t_src, t_tgt, t_cam = asked.queries
    assert torch.equal(t_src[pixel], t_tgt[pixel]) and torch.equal(t_tgt, t_cam)
    assert found.has_xyz[pixel].all() and not found.has_xyz[~pixel].any() and found.has_uv.float().mean() > 0.95
    exact = the_scene().answer(asked.queries)
    for field, limit in {"xyz": 1e-5, "uv": 1e-5, "visibility": 0}.items():
        assert errors(found, exact, field).max() <= limit, field


def test_tracks_alone(copied):
    folder = copied("folder")
    for path in [
        *folder.glob("*/*.npy"),
        *(folder / "instances").iterdir(),
        folder / "cameras.npz",
        folder / "bodies.npz",
    ]:
        path.unlink()
    valid = np.random.default_rng(0).random((FRAMES, 200)) < 0.8
    rewrite(folder, "tracks.npz", xyz=None, valid=valid)
    source = Folder(folder)
    assert source.contents() == ["2-D tracks"]
    asked, found = asked_and_answered(source)
    assert (asked.track >= 0).all() and torch.equal(asked.queries.t_tgt, asked.queries.t_cam)
    assert torch.from_numpy(valid)[asked.queries.t_src, asked.track].all()
    known = torch.from_numpy(valid)[asked.queries.t_tgt, asked.track]
    assert not found.has_uv[~known].any() and 0.9 < found.has_uv[known].float().mean()
    assert not (found.has_xyz | found.has_normal).any()
    exact = the_scene().answer(asked.queries)
    assert errors(found, exact, "uv").max() < 1e-5 and errors(found, exact, "visibility").max() == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_pose(folder: Path) -> None:
    poses = array(folder, "cameras.npz", "poses")
    poses[2, 0, 3] = np.nan
    rewrite(folder, "cameras.npz", poses=poses)


BROKEN = {
    "no frames": (lambda f: [p.unlink() for p in (f / "frames").iterdir()], "wanted images in frames/, or a video.mp4"),
    "frames and a video": (lambda f: (f / "video.mp4").touch(), "got both frames/ and video.mp4"),
    "two videos": (lambda f: [(f / f"video.{s}").touch() for s in ("mp4", "mov")], "wanted one video"),
    "no scene.json": (lambda f: (f / "scene.json").unlink(), "scene.json: wanted 'depth', one of .*; it is missing"),
    "scene.json cut off": (lambda f: cut(f / "scene.json"), "scene.json: wanted JSON"),
    "a misspelt key": (lambda f: note(f, dpeth="z"), "scene.json: no key 'dpeth'"),
    "a wrong value": (lambda f: note(f, depth="metres"), "scene.json: depth: wanted one of .*, got 'metres'"),
    "a wrong scale": (lambda f: note(f, depth_scale=-1), "depth_scale: wanted a number above 0"),
    "no units of intrinsics": (lambda f: note(f, intrinsics=None), "scene.json: wanted 'intrinsics'"),
    "no direction of poses": (lambda f: note(f, poses=None), "scene.json: wanted 'poses'"),
    "no axes": (lambda f: note(f, axes=None), "scene.json: wanted 'axes'"),
    "no units of tracks": (lambda f: note(f, tracks=None), "scene.json: wanted 'tracks'"),
    "no kind of normals": (lambda f: note(f, normals=None), "scene.json: wanted 'normals'"),
    "whole numbers without a scale": (
        lambda f: each(f, "depth", lambda z: z.astype(np.uint16)),
        "scene.json: wanted 'depth_scale', a number",
    ),
    "static, with bodies": (lambda f: note(f, static=True), "instances and bodies.npz, or static"),
    "instances without bodies": (lambda f: (f / "bodies.npz").unlink(), "instances needs bodies.npz, which is missing"),
    "a depth map is missing": (
        lambda f: (f / "depth/00004.npy").unlink(),
        r"depth/00004.\*: the map of this frame is missing",
    ),
    "a depth map is cut off": (lambda f: cut(f / "depth/00004.npy"), "depth/00004.npy: wanted an intact .npy"),
    "a depth map of another shape": (
        lambda f: np.save(f / "depth/00004.npy", np.ones((4, 5, 2))),
        r"depth/00004.npy: wanted a map \(h, w\), got float64 \(4, 5, 2\)",
    ),
    "a depth map of another size": (
        lambda f: np.save(f / "depth/00004.npy", np.ones((4, 5))),
        r"depth of frame 4: wanted \(40, 60\) as before, got \(4, 5\)",
    ),
    "two kinds of depth": (lambda f: np.save(f / "depth.npy", np.ones((6, 4, 5))), "wanted depth/ or depth.npy"),
    "a frame is cut off": (lambda f: cut(f / "frames/00002.png"), "frames/00002.png: the image is cut off"),
    "a frame of another size": (
        lambda f: cv2.imwrite(str(f / "frames/00002.png"), np.zeros((4, 5, 3), np.uint8)),
        r"frames/00002.png: wanted \(40, 60\) as the first frame, got \(4, 5\)",
    ),
    "an extra frame": (
        lambda f: cv2.imwrite(str(f / "frames/00009.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        r"depth/00009.\*: the map of this frame is missing",
    ),
    "cameras cut off": (lambda f: cut(f / "cameras.npz"), "cameras.npz: no .npz, or a corrupt or cut off one"),
    "cameras without either": (
        lambda f: rewrite(f, "cameras.npz", poses=None, intrinsics=None, k=np.eye(3)),
        "cameras.npz: wanted intrinsics or poses, got only",
    ),
    "NaN pose": (nan_pose, "cameras.npz: poses: pose 2 holds values that are not finite"),
    "too few poses": (
        lambda f: rewrite(f, "cameras.npz", poses=np.tile(np.eye(4), (5, 1, 1))),
        r"poses: wanted shape \(6, 4, 4\), got \(5, 4, 4\)",
    ),
    "intrinsics of another shape": (
        lambda f: rewrite(f, "cameras.npz", intrinsics=np.ones((2, 3, 3))),
        r"intrinsics: wanted \(3, 3\) or \(6, 3, 3\), got \(2, 3, 3\)",
    ),
    "tracks of another length": (
        lambda f: rewrite(f, "tracks.npz", uv=np.zeros((5, 200, 2))),
        r"tracks.npz: uv: wanted shape \(6, N, 2\), got \(5, 200, 2\)",
    ),
    "tracks without visibility": (lambda f: rewrite(f, "tracks.npz", visible=None), "wanted an array 'visible'"),
    "an id of no body": (
        lambda f: cv2.imwrite(str(f / "instances/00003.png"), np.full((HEIGHT, WIDTH), 99, np.uint8)),
        "instances/00003.png: wanted whole numbers from 0 to",
    ),
    "a body that grows": (
        lambda f: rewrite(f, "bodies.npz", world_from_body=np.tile(np.diag([2.0, 2, 2, 1]), (6, 9, 1, 1))),
        "world_from_body: pose 0: wanted a rigid motion",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(copied, capfd, case):
    folder = copied("folder")
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        asked_and_answered(Folder(folder), 50)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "frames").mkdir()
    cv2.imwrite(str(tmp_path / "frames/0.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="wanted depth maps .* or tracks.npz, found neither"):
        Folder(tmp_path)


def test_the_documented_conversion(tmp_path):
    """docs/data.md: the function that converts a static scan, on files of its kind."""
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def convert" in block)
    exec(code, names := {})
    scan = tmp_path / "scan"
    for what in ("color", "depth", "pose", "intrinsic"):
        (scan / what).mkdir(parents=True)
    for i in range(4):
        cv2.imwrite(str(scan / f"color/{i}.jpg"), np.full((30, 40, 3), 40 * i, np.uint8))
        cv2.imwrite(str(scan / f"depth/{i}.png"), np.full((15, 20), 2500, np.uint16))
        pose = np.eye(4)
        pose[0, 3] = 0.1 * i
        np.savetxt(scan / f"pose/{i}.txt", pose)
    np.savetxt(scan / "intrinsic/intrinsic_color.txt", [[40, 0, 19.5, 0], [0, 40, 14.5, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    names["convert"](scan, tmp_path / "out", 4)
    source = Folder(tmp_path / "out")
    assert source.contents() == ["depth", "static", "poses", "intrinsics"]
    np.testing.assert_allclose(source.intrinsics([0])[0], [[1, 0, 0.5], [0, 4 / 3, 0.5], [0, 0, 1]])
    asked, found = asked_and_answered(source, 200)
    (uv, _, _, t_cam) = asked.queries
    exact = torch.stack([(uv[:, 0] - 0.5) * 2.5, (uv[:, 1] - 0.5) * 1.875, torch.full((200,), 2.5)], -1)
    exact[:, 0] += 0.1 * (asked.queries.t_src - t_cam)
    assert (found.xyz - exact).abs().max() < 1e-5
