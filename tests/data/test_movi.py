"""Kubric's layout: a synthetic scene written in it, a hand-made one whose geometry is known, and what can be wrong."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.cameras import quaternion_from_rotation, rotation_from_quaternion
from fourdperf.data.export import _palette_png
from fourdperf.data.movi import Movi
from fourdperf.data.sources import load_window
from tests.data.conftest import FRAMES, HEIGHT, WIDTH, asked_and_answered, errors, the_scene


def metadata(folder: Path, change=None) -> dict:
    """Reads metadata.json, and writes it back after a change."""
    path = folder / "metadata.json"
    found = json.loads(path.read_text())
    if change is not None:
        change(found)
        path.write_text(json.dumps(found))
    return found


def test_the_files_are_those_of_the_layout(stored):
    folder = stored("movi")
    kinds = {"rgba": "png", "depth": "tiff", "segmentation": "png", "normal": "png", "forward_flow": "png"}
    wanted = {f"{kind}_{i:05d}.{suffix}" for kind, suffix in kinds.items() for i in range(FRAMES)}
    assert {path.name for path in folder.iterdir()} == wanted | {"metadata.json", "data_ranges.json"}
    assert cv2.imread(str(folder / "rgba_00000.png"), cv2.IMREAD_UNCHANGED).shape == (HEIGHT, WIDTH, 4)
    assert cv2.imread(str(folder / "depth_00000.tiff"), cv2.IMREAD_UNCHANGED).dtype == np.float32
    assert b"PLTE" in (folder / "segmentation_00000.png").read_bytes()
    assert np.shape(metadata(folder)["camera"]["quaternions"]) == (FRAMES, 4)


def test_answers_are_those_of_the_scene(stored):
    source = Movi(stored("movi"))
    assert source.contents() == ["depth", "normals", "flow", "moving bodies", "poses", "intrinsics"]
    asked, found = asked_and_answered(source)
    exact = the_scene().answer(asked.queries)
    for field, limit in {"xyz": 1e-5, "uv": 1e-5, "displacement": 1e-5, "visibility": 0, "normal": 1e-4}.items():
        assert getattr(found, f"has_{field}").float().mean() > (0.85 if field == "visibility" else 0.99), field
        assert errors(found, exact, field).max() <= limit, field
    assert (asked.queries.t_tgt != asked.queries.t_src).float().mean() > 0.6
    moving = found.displacement.norm(dim=-1) > 1e-3
    assert 0.02 < moving.float().mean() and 0 < found.visibility[moving].mean() < 1


def test_frames_and_maps_are_those_of_the_scene(stored):
    window = load_window(Movi(stored("movi")), range(FRAMES))
    rendering = the_scene().render()
    assert np.array_equal(np.stack(window.frames), (rendering.video * 255).round().byte().numpy())
    np.testing.assert_allclose(window.depth, rendering.depth.numpy(), rtol=1e-6)
    np.testing.assert_allclose(window.normal, rendering.normal.numpy(), atol=1e-4)
    assert np.array_equal(window.instances, rendering.instance.numpy())
    span = np.ptp(rendering.flow.numpy() * [WIDTH, HEIGHT])
    np.testing.assert_allclose(
        window.flow * [WIDTH, HEIGHT], rendering.flow.numpy() * [WIDTH, HEIGHT], atol=span / 65535
    )
    np.testing.assert_allclose(window.intrinsics, the_scene().intrinsics.numpy(), atol=1e-6)
    np.testing.assert_allclose(window.world_from_camera, the_scene().world_from_camera.numpy(), atol=1e-5)


def by_hand(folder: Path, depth: str = "tiff") -> Path:
    """Two frames of 8 x 16 of a wall 4 metres away, whose left half is a body that moves by (0.5, 0, 0) and turns about
    the world's z axis by 90 degrees. Blender's camera at (0, 0, 10) looks down the world's -z, its top towards +y; the
    focal length is the sensor's width."""
    folder.mkdir()
    y, x = np.mgrid[:8, :16]
    u, v = (x + 0.5) / 16, (y + 0.5) / 8
    distance = (4 * np.sqrt(1 + (u - 0.5) ** 2 + (0.5 * (v - 0.5)) ** 2)).astype(np.float32)
    ids = (x < 8).astype(np.int64)
    ranges = {"depth": {"min": 3.0, "max": 6.0}}
    for i in range(2):
        cv2.imwrite(str(folder / f"rgba_{i:05d}.png"), np.full((8, 16, 4), 50 * i, np.uint8))
        if depth == "tiff":
            cv2.imwrite(str(folder / f"depth_{i:05d}.tiff"), distance)
        else:
            stored = np.rint((distance - 3) / 3 * 65535).astype(np.uint16)
            cv2.imwrite(str(folder / f"depth_{i:05d}.png"), stored)
        (folder / f"segmentation_{i:05d}.png").write_bytes(_palette_png(ids))
    turn = [np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)]
    content = {
        "metadata": {"num_frames": 2, "resolution": [16, 8], "num_instances": 1},
        "camera": {
            "focal_length": 35.0,
            "sensor_width": 35.0,
            "positions": [[0, 0, 10]] * 2,
            "quaternions": [[1, 0, 0, 0]] * 2,
        },
        "instances": [{"positions": [[0, 0, 6], [0.5, 0, 6]], "quaternions": [[1, 0, 0, 0], turn]}],
    }
    (folder / "metadata.json").write_text(json.dumps(content))
    (folder / "data_ranges.json").write_text(json.dumps(ranges))
    return folder


@pytest.mark.parametrize("depth", ["tiff", "png"])
def test_a_scene_made_by_hand(tmp_path, depth):
    source = Movi(by_hand(tmp_path / "scene", depth))
    np.testing.assert_allclose(source.intrinsics([0])[0], [[1, 0, 0.5], [0, 2, 0.5], [0, 0, 1]], atol=1e-12)
    np.testing.assert_allclose(source.depth(0), 4, atol=1e-6 if depth == "tiff" else 3 / 65535)
    wanted = [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 10], [0, 0, 0, 1]]
    np.testing.assert_allclose(source.world_from_camera([1])[0], wanted, atol=1e-12)
    asked, found = asked_and_answered(source, 500)
    (_, t_src, t_tgt, t_cam), uv = asked.queries, asked.queries.uv.double()
    # in OpenCV's camera: x as in the world, y and z turned; z = 4 is the world's z = 6
    x, y = (uv[:, 0] - 0.5) * 4, (uv[:, 1] - 0.5) * 2
    body = uv[:, 0] < 0.5
    forth, back = body & (t_src == 0) & (t_tgt == 1), body & (t_src == 1) & (t_tgt == 0)
    assert forth.any() and back.any() and (t_cam != t_tgt).any()
    # about z, seen with y down: (x, y) -> (y, -x)
    x1, y1 = torch.where(forth, y + 0.5, x), torch.where(forth, -x, y)
    x1, y1 = torch.where(back, -y, x1), torch.where(back, x - 0.5, y1)
    exact = torch.stack([x1, y1, torch.full_like(x, 4)], -1)
    assert found.has_xyz.all() and (found.xyz - exact).abs().max() < (1e-5 if depth == "tiff" else 2e-4)
    moved = exact - torch.stack([x, y, torch.full_like(x, 4)], -1)
    assert (found.displacement - moved).abs().max() < (1e-5 if depth == "tiff" else 2e-4)
    inside = (x1.abs() <= 2) & (y1.abs() <= 1)
    known = found.has_visibility & (t_src != t_tgt)
    assert known.any() and torch.equal(found.visibility[known] == 1, inside[known])


def test_bodies_that_deform(copied):
    """Positions that are null: nobody knows the motion, and nothing is asked about it."""
    folder = copied("movi")
    ids = Movi(folder).instances(0)
    k = int(np.bincount(ids[ids > 0]).argmax())
    metadata(folder, lambda m: m["instances"][k - 1].update(positions=None, quaternions=None))
    source = Movi(folder)
    asked, found = asked_and_answered(source)
    on_it = (
        torch.from_numpy(np.stack([source.instances(i) for i in range(FRAMES)]))[
            asked.queries.t_src, asked.row, asked.column
        ]
        == k
    )
    assert on_it.any() and torch.equal(asked.queries.t_src[on_it], asked.queries.t_tgt[on_it])
    assert (asked.queries.t_src != asked.queries.t_tgt)[~on_it].float().mean() > 0.6
    assert found.has_xyz.all() and errors(found, the_scene().answer(asked.queries), "xyz").max() < 1e-5


def test_without_segmentation_nothing_is_followed(copied):
    folder = copied("movi")
    for i in range(FRAMES):
        (folder / f"segmentation_{i:05d}.png").unlink()
    asked, found = asked_and_answered(Movi(folder), 300)
    assert torch.equal(asked.queries.t_src, asked.queries.t_tgt) and found.has_xyz.all()


def test_background_and_missing_normals(copied):
    folder = copied("movi")
    distance = np.full((HEIGHT, WIDTH), 5, np.float32)
    distance[0, :4] = 1e10, np.inf, np.nan, 0
    cv2.imwrite(str(folder / "depth_00000.tiff"), distance)
    cv2.imwrite(str(folder / "normal_00000.png"), np.full((HEIGHT, WIDTH, 3), 32768, np.uint16))
    source = Movi(folder)
    assert np.isnan(source.depth(0)[0, :4]).all() and np.isfinite(source.depth(0)).sum() == HEIGHT * WIDTH - 4
    assert np.isnan(source.normal(0)).all()


def test_grey_and_palette_segmentations(copied):
    folder = copied("movi")
    ids = Movi(folder).instances(1)
    cv2.imwrite(str(folder / "segmentation_00001.png"), ids.astype(np.uint16))
    assert np.array_equal(Movi(folder).instances(1), ids)
    many = np.arange(256).reshape(8, 32)
    from fourdperf.data.movi import _indices

    assert np.array_equal(_indices(_palette_png(many), "many"), many)
    with pytest.raises(ValueError, match="at most 255 instances"):
        _palette_png(many + 1)


def test_quaternions():
    q = np.random.default_rng(0).standard_normal((200, 4))
    q[:4] = np.eye(4)
    rotation = rotation_from_quaternion(q, "q")
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.broadcast_to(np.eye(3), (200, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    np.testing.assert_allclose(rotation_from_quaternion(quaternion_from_rotation(rotation), "q"), rotation, atol=1e-12)
    unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    np.testing.assert_allclose(quaternion_from_rotation(rotation), unit * np.where(unit[:, :1] < 0, -1, 1), atol=1e-12)
    # 90 degrees about z takes x to y
    turn = rotation_from_quaternion(np.array([1, 0, 0, 1.0]), "q")
    np.testing.assert_allclose(turn @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    for bad in (np.zeros(4), np.array([np.nan, 0, 0, 1]), np.ones(3)):
        with pytest.raises(ValueError, match="q: "):
            rotation_from_quaternion(bad, "q")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "no metadata": (lambda f: (f / "metadata.json").unlink(), "metadata.json: the file is missing"),
    "metadata cut off": (lambda f: cut(f / "metadata.json"), "metadata.json: wanted JSON"),
    "metadata of a list": (lambda f: (f / "metadata.json").write_text("[]"), "wanted a JSON object, got list"),
    "no camera": (lambda f: metadata(f, lambda m: m.pop("camera")), "metadata.json: wanted camera.focal_length"),
    "no frames": (lambda f: metadata(f, lambda m: m["metadata"].update(num_frames=0)), "num_frames: wanted"),
    "no size": (lambda f: metadata(f, lambda m: m["metadata"].update(resolution=[4])), "resolution: wanted"),
    "no instances": (lambda f: metadata(f, lambda m: m.pop("instances")), "instances: wanted a list"),
    "too few positions": (
        lambda f: metadata(f, lambda m: m["camera"]["positions"].pop()),
        r"camera.positions: wanted finite numbers \(6, 3\)",
    ),
    "NaN pose": (
        lambda f: metadata(f, lambda m: m["camera"]["positions"][2].__setitem__(0, float("nan"))),
        r"camera.positions: wanted finite numbers",
    ),
    "no turn": (
        lambda f: metadata(f, lambda m: m["camera"]["quaternions"].__setitem__(2, [0, 0, 0, 0])),
        "quaternion 2: wanted finite numbers that are not all 0",
    ),
    "half a body": (
        lambda f: metadata(f, lambda m: m["instances"][0].update(positions=None, quaternions=[])),
        r"instances\[0\].positions: wanted",
    ),
    "focal lengths in words": (
        lambda f: metadata(f, lambda m: m["camera"].update(focal_length="wide")),
        "camera.focal_length: wanted numbers",
    ),
    "negative focal length": (
        lambda f: metadata(f, lambda m: m["camera"].update(focal_length=-35)),
        "focal_length, camera.sensor_width: intrinsics 0: wanted focal lengths above 0",
    ),
    "a frame is missing": (lambda f: (f / "rgba_00003.png").unlink(), "rgba_00003.png: the file is missing"),
    "no frame at all": (lambda f: [p.unlink() for p in f.glob("rgba_*")], "rgba_00000.png: the file is missing"),
    "a depth map is missing": (lambda f: (f / "depth_00003.tiff").unlink(), "depth_00003.tiff: the file is missing"),
    "a depth map is cut off": (lambda f: cut(f / "depth_00001.tiff"), "depth_00001.tiff: wanted an image"),
    "a frame is cut off": (lambda f: cut(f / "rgba_00001.png"), "rgba_00001.png: the image is cut off"),
    "an 8-bit normal map": (
        lambda f: cv2.imwrite(str(f / "normal_00001.png"), np.ones((HEIGHT, WIDTH, 3), np.uint8)),
        "normal_00001.png: wanted three 16-bit channels, got uint8",
    ),
    "a frame of another size": (
        lambda f: cv2.imwrite(str(f / "rgba_00001.png"), np.ones((4, 5, 4), np.uint8)),
        r"rgba_00001.png: wanted \(40, 60\), as metadata.json says",
    ),
    "an id of no body": (
        lambda f: cv2.imwrite(str(f / "segmentation_00001.png"), np.full((HEIGHT, WIDTH), 77, np.uint8)),
        "segmentation_00001.png: wanted ids up to",
    ),
    "a segmentation in colour": (
        lambda f: cv2.imwrite(str(f / "segmentation_00001.png"), np.ones((HEIGHT, WIDTH, 3), np.uint8)),
        "segmentation_00001.png: wanted a palette or one grey channel",
    ),
    "no ranges": (lambda f: (f / "data_ranges.json").unlink(), "data_ranges.json: wanted forward_flow.min"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(copied, capfd, case):
    folder = copied("movi")
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        asked_and_answered(Movi(folder), 50)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
