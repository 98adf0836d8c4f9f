"""homNIST, SHREC and CO3D: files in their layouts, written here, are read as what they are; damage is one error."""

import gzip
import itertools
import json

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.co3d import open_co3d, world_from_pytorch3d
from fourdperf.data.homnist import read_homnist
from fourdperf.data.meshes import Mesh, read_mesh
from fourdperf.data.shrec import Shrec, heat_kernel_signatures, rasterise
from fourdperf.data.warps import sphere_grid

h5py, scipy_io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")


# homNIST


def digits(count=12, side=9):
    random = np.random.default_rng(0)
    return random.integers(256, size=(count, side, side), dtype=np.uint8), np.arange(count) % 10


LAYOUTS = {
    "(N, H, W)": lambda x: x,
    "(H, W, N)": lambda x: x.transpose(1, 2, 0),
    "(N, H, W, 1)": lambda x: x[..., None],
    "(N, 1, H, W)": lambda x: x[:, None],
    "(H, W, 1, N)": lambda x: x.transpose(1, 2, 0)[:, :, None],
    "(N, H H)": lambda x: x.reshape(len(x), -1),
}


def write_mat73(path, arrays):
    """As MATLAB does: 512 bytes of its own, then HDF5 with the axes the other way round."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = np.asarray(array).T
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mat_files(tmp_path, layout, version):
    pixels, labels = digits()
    path, arrays = tmp_path / "homNIST_test.mat", {"x": LAYOUTS[layout](pixels), "y": labels[None].astype(np.float64)}
    scipy_io.savemat(path, arrays) if version == "5" else write_mat73(path, arrays)
    for given in (path, tmp_path):
        images = read_homnist(given)
        assert len(images) == 12 and images.image_size == (9, 9) and images.classes == tuple("0123456789")
        for i in range(12):
            assert torch.equal(images[i][0], torch.from_numpy(pixels[i, ..., None]).float() / 255)
            assert images[i][1] == labels[i]


@pytest.mark.parametrize("one_hot", [np.eye(10)[np.arange(12) % 10], np.eye(10)[np.arange(12) % 10].T])
def test_mat_with_a_struct_floats_and_one_hot_labels(tmp_path, one_hot):
    pixels, labels = digits()
    content = {"homNIST": {"images": pixels / 255, "labels": one_hot}, "note": "text", "scale": 0.5}
    scipy_io.savemat(tmp_path / "a.mat", content)
    images = read_homnist(tmp_path / "a.mat")
    assert [images[i][1] for i in range(12)] == labels.tolist()
    torch.testing.assert_close(images[3][0][..., 0], torch.from_numpy(pixels[3] / 255).float())


def test_mat_files_that_are_not(tmp_path):
    pixels, labels = digits()
    path = tmp_path / "a.mat"
    with pytest.raises(
        FileNotFoundError, match="no file .*homNIST_test.mat; get homNIST_test.mat from https://www.kaggle"
    ):
        read_homnist(tmp_path)
    for arrays, message in (
        ({"x": pixels}, r"got none: it has x \(12, 9, 9\) uint8"),
        ({"x": pixels, "y": labels + 1}, r"got none: it has x \(12, 9, 9\) uint8, y"),
        ({"x": pixels, "z": pixels, "y": labels}, "got several: it has x"),
        ({"x": pixels - 0.5, "y": labels}, "wanted pixels from 0 to 1 or 255, got -0.5"),
    ):
        scipy_io.savemat(path, arrays)
        with pytest.raises(ValueError, match=message):
            read_homnist(path)
    scipy_io.savemat(path, {"x": pixels, "y": labels})
    whole = path.read_bytes()
    write_mat73(path, {"x": pixels, "y": labels})
    for content in (whole[: len(whole) // 2], path.read_bytes()[:1500], b"", b"PNG and so on" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.mat: (cut off, corrupt or no .mat|wanted one array of images)"):
            read_homnist(path)


# Meshes


def sphere_mesh(levels=3):
    """An octahedron whose triangles are split into four, again and again, on the unit sphere."""
    vertices = [np.array(v, float) for v in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))]
    faces = [(0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5)]
    for _ in range(levels):
        middles, finer = {}, []
        for face in faces:
            m = []
            for pair in itertools.pairwise((*face, face[0])):
                key = tuple(sorted(pair))
                if key not in middles:
                    middle = vertices[pair[0]] + vertices[pair[1]]
                    middles[key] = len(vertices)
                    vertices.append(middle / np.linalg.norm(middle))
                m.append(middles[key])
            a, b, c = face
            finer += [(a, m[0], m[2]), (b, m[1], m[0]), (c, m[2], m[1]), tuple(m)]
        faces = finer
    return np.array(vertices), np.array(faces)


def write_mesh(path, vertices, faces, properties=None, ply="ascii"):
    properties = properties or {}
    if path.suffix == ".obj":
        lines = ["# a mesh", "mtllib none", *(f"v {x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()), "vn 0 0 1"]
        lines += [f"f {a + 1}/1/1 {b + 1}//1 {c - len(vertices)}" for a, b, c in faces.tolist()]
    elif path.suffix == ".off":
        lines = ["OFF", "# counts", f"{len(vertices)} {len(faces)} 0", ""]
        lines += [f"{x!r} {y!r} {z!r}" for x, y, z in vertices.tolist()]
        lines += [f"3 {a} {b} {c} 0.5 0.5 0.5" for a, b, c in faces.tolist()]
    else:
        lines = ["ply", f"format {ply} 1.0", "comment a mesh", f"element vertex {len(vertices)}"]
        lines += [f"property double {name}" for name in ("x", "y", "z", *properties)]
        lines += [f"element face {len(faces)}", "property uchar flags", "property list uchar int vertex_indices"]
        table = np.column_stack([vertices, *properties.values()])
        if ply != "ascii":
            order = "<" if "little" in ply else ">"
            row = np.dtype([("f", "u1"), ("n", "u1"), ("v", order + "i4", 3)])
            body = np.zeros(len(faces), row)
            body["n"], body["v"] = 3, faces
            content = "\n".join([*lines, "end_header\n"]).encode()
            path.write_bytes(content + table.astype(order + "f8").tobytes() + body.tobytes())
            return
        lines += ["end_header", *(" ".join(map(repr, row)) for row in table.tolist())]
        lines += [f"7 3 {a} {b} {c}" for a, b, c in faces.tolist()]
    path.write_text("\n".join(lines) + "\n")


FORMATS = [
    (".obj", ""),
    (".off", ""),
    (".ply", "ascii"),
    (".ply", "binary_little_endian"),
    (".ply", "binary_big_endian"),
]


@pytest.mark.parametrize(("suffix", "ply"), FORMATS)
def test_meshes(tmp_path, suffix, ply):
    vertices, faces = sphere_mesh(1)
    path = tmp_path / f"a{suffix}"
    write_mesh(path, vertices, faces, {"heat": np.arange(len(vertices))}, ply)
    mesh = read_mesh(path)
    assert np.array_equal(mesh.vertices, vertices) and np.array_equal(mesh.faces, faces)
    if suffix == ".ply":
        assert mesh.properties.keys() == {"heat"} and np.array_equal(mesh.properties["heat"], np.arange(len(vertices)))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 3], b"", b"hello " * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"a{suffix}: (cut off, corrupt or no mesh|wanted finite vertices)"):
            read_mesh(path)


def test_polygons_become_triangles(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    assert read_mesh(tmp_path / "a.obj").faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    with pytest.raises(ValueError, match=r"wanted a mesh \(.obj .off .ply\)"):
        read_mesh(tmp_path / "a.stl")


# SHREC


@pytest.mark.parametrize("levels", [0, 3])
def test_maps_go_through_the_corners_and_are_linear_between(levels):
    vertices, faces = sphere_mesh(levels)
    x = rasterise(2.5 * vertices, faces, vertices, (13, 24))
    directions = sphere_grid((13, 24), torch.float64).numpy()
    # the mesh's own points are the features, so that they lie on the rays
    np.testing.assert_allclose(x / np.linalg.norm(x, axis=-1, keepdims=True), directions, atol=1e-9)
    turned = rasterise(vertices, faces[:, ::-1], vertices, (13, 24))
    np.testing.assert_allclose(turned, x, atol=1e-9)
    with pytest.raises(ValueError, match="mesh: the triangles on the sphere leave [0-9]+ of 312 directions free"):
        rasterise(vertices, faces[(faces != 4).all(1)], vertices, (13, 24))  # without the pole


def test_heat_kernel_signatures(tmp_path):
    vertices, faces = sphere_mesh(3)
    write_mesh(tmp_path / "a.obj", vertices, faces)
    write_mesh(tmp_path / "b.obj", vertices * [1, 1, 2], faces)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    write_mesh(tmp_path / "c.obj", 3 * vertices * [1, 1, 2] @ turn + 5, faces)
    ball, long, moved = (heat_kernel_signatures(read_mesh(tmp_path / f"{name}.obj"), 5) for name in "abc")
    assert np.ptp(ball, 0).max() < 0.04 and abs(ball.mean() - 0.5) < 0.005  # h = 1 everywhere
    np.testing.assert_allclose(long, moved, atol=1e-6)
    assert long[4, 2] - long[0, 2] > 0.05  # the tips keep their heat
    two = Mesh(np.concatenate([vertices, vertices + 3]), np.concatenate([faces, faces + len(vertices)]), {})
    with pytest.raises(ValueError, match="cat/T1, copy 0: wanted a surface in one piece, got a second eigenvalue"):
        heat_kernel_signatures(two, name="cat/T1, copy 0")


def make_shrec(root, suffix=".off", classes=("ant", "cat"), shapes=4, copies=2, folders=("",)):
    vertices, faces = sphere_mesh(2)
    for folder, (c, name), i in itertools.product(folders, enumerate(classes), range(shapes)):
        where = root / folder / name
        where.mkdir(parents=True, exist_ok=True)
        stem = f"T{i}"
        write_mesh(where / f"{stem}{suffix}", vertices * [1, 1, 1 + c + 0.1 * i], faces)
        for k in range(copies):
            tail = f"_aug_{k}" if k else ""
            angle = 0.3 * k
            turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
            write_mesh(where / f"{stem}{tail}_sphere{suffix}", vertices @ turn.T, faces)


def test_shrec_folders(tmp_path):
    make_shrec(tmp_path)
    train, test = (Shrec(tmp_path, split, (9, 18), times=3, train_per_class=3) for split in ("train", "test"))
    assert train.classes == ("ant", "cat") and (len(train), len(test), train.copies) == (6, 2, 2)
    assert not set(train.shapes) & set(test.shapes) and len({*train.shapes, *test.shapes}) == 8
    again = Shrec(tmp_path, "train", train_per_class=3, seed=1)
    assert sorted(again.shapes) != sorted(train.shapes)
    item = train[5]
    assert item["x"].shape == (2, 9, 18, 3) and item["label"] == 1 and item["x"].dtype == torch.float32
    assert 0 < item["x"].min() and item["x"].max() < 1 and item["x"].std() > 0.01
    assert not torch.equal(item["x"][0], item["x"][1])
    torch.testing.assert_close(item["x"][0, 0], item["x"][1, 0])  # turned about the poles


def test_shrec_features_of_files(tmp_path):
    vertices, faces = sphere_mesh(2)
    make_shrec(tmp_path, copies=1, folders=("train", "test"))
    for path in tmp_path.glob("*/*/T?.off"):
        np.save(path.with_suffix(".npy"), vertices.astype(np.float32))
    found = Shrec(tmp_path, "test", (7, 12))
    assert len(found) == 8 and found.shapes[0] == "ant/T0"
    directions = sphere_grid((7, 12)).numpy()
    x = found[6]["x"][0].numpy()
    np.testing.assert_allclose(x / np.linalg.norm(x, axis=-1, keepdims=True), directions, atol=1e-5)
    one = tmp_path / "one" / "ant"
    one.mkdir(parents=True)
    places = dict(zip(("sx", "sy", "sz"), vertices.T)) | {"a": vertices[:, 2], "b": vertices[:, 0]}
    for i in range(2):
        write_mesh(one / f"{i}.ply", vertices * [3, 1, 1], faces, places, "binary_little_endian")
    x = Shrec(one.parent, "train", (7, 12), train_per_class=1)[0]["x"][0].numpy()
    assert x.shape == (7, 12, 2) and np.abs(x[:, 0, 0] - np.cos(np.linspace(0, np.pi, 7))).max() < 0.05


def test_shrec_that_is_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="shrec: no folder .*; get SHREC_11_CONF.zip"):
        Shrec(tmp_path / "none", "train")
    with pytest.raises(FileNotFoundError, match="shrec: no shapes .* in folders of classes"):
        Shrec(tmp_path, "train")
    make_shrec(tmp_path, shapes=3)
    with pytest.raises(ValueError, match="no class has more than 10 shapes, so none is for test"):
        Shrec(tmp_path, "test")
    (tmp_path / "cat" / "T1_aug_1_sphere.off").unlink()
    with pytest.raises(ValueError, match=r"cat/T1: wanted copies 0 to 1, got \[0\]"):
        Shrec(tmp_path, "train")
    make_shrec(tmp_path, shapes=3)
    vertices, faces = sphere_mesh(2)
    write_mesh(tmp_path / "ant" / "T0_sphere.off", vertices, faces[::-1])
    with pytest.raises(ValueError, match="T0_sphere.off: wanted the triangles of the surface .*T0, got others"):
        Shrec(tmp_path, "train")[0]
    (tmp_path / "ant" / "T0_sphere.off").unlink()
    with pytest.raises(ValueError, match="ant/T0: wanted T0_sphere, its triangles on the sphere, or properties sx"):
        Shrec(tmp_path, "train")[0]
    np.save(tmp_path / "ant" / "T1.npy", np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"ant/T1: wanted finite features of 66 vertices, got \(5, 2\)"):
        Shrec(tmp_path, "train")[1]


# CO3D


def write_jgz(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def make_co3d(root, categories=("apple", "bench"), sequences=8, frames=4, size=(30, 50), isotropic=True):
    random = np.random.default_rng(0)
    for category in categories:
        annotations, scores, lists = [], [], {"train": [], "val": [], "test": []}
        for s in range(sequences):
            name = f"{category[0]}{s}"
            scores.append({"sequence_name": name, "category": category, "viewpoint_quality_score": float(s % 5)})
            for t in range(1, frames + 1):
                path = f"{category}/{name}/images/frame{t:06d}.jpg"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                image = np.full((*size, 3), (10 * t, 60, 20 * s), np.uint8)  # blue, green, red
                cv2.imwrite(str(root / path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
                rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
                view = {
                    "R": (rotation * np.linalg.det(rotation)).tolist(),
                    "T": random.normal(size=3).tolist(),
                    "focal_length": random.uniform(2, 3, 2).tolist(),
                    "principal_point": random.uniform(-0.2, 0.2, 2).tolist(),
                }
                view |= {"intrinsics_format": "ndc_isotropic"} if isotropic else {}
                entry = {"sequence_name": name, "frame_number": t, "image": {"path": path, "size": list(size)}}
                annotations.append(entry | {"viewpoint": view, "mask": None})
                lists["test" if s == 2 else "train"].append([name, t, path])
        random.shuffle(annotations)
        write_jgz(root / category / "frame_annotations.jgz", annotations)
        write_jgz(root / category / "sequence_annotations.jgz", scores)
        (root / category / "set_lists").mkdir(exist_ok=True)
        (root / category / "set_lists" / "set_lists_some.json").write_text(json.dumps(lists))


def annotation(root, category, name, number):
    entries = json.loads(gzip.decompress((root / category / "frame_annotations.jgz").read_bytes()))
    return next(e for e in entries if e["sequence_name"] == name and e["frame_number"] == number)


def every_split(root, **options):
    found = open_co3d(root, (15, 20), **options)
    return {split: found[split].names if split in found else [] for split in ("train", "val", "test")}


@pytest.mark.parametrize("isotropic", [True, False])
def test_cameras_see_points_where_pytorch3d_does(tmp_path, isotropic):
    make_co3d(tmp_path, ("apple",), 3, isotropic=isotropic)
    videos = open_co3d(tmp_path, (15, 20), set_list="some")["train"]
    assert videos.names == [("apple", "a0"), ("apple", "a1")] and videos.frames(1) == 4
    found = videos.read(1, [2, 0])
    assert found["video"].shape == (2, 15, 20, 3) and found["poses"].shape == (2, 4, 4)
    np.testing.assert_allclose(found["video"][:, 7, 7] * 255, [[20, 60, 30], [20, 60, 10]], atol=2)
    for row, number in enumerate((3, 1)):
        view = annotation(tmp_path, "apple", "a1", number)["viewpoint"]
        r, t, f, p = (np.array(view[key]) for key in ("R", "T", "focal_length", "principal_point"))
        camera = np.random.default_rng(1).uniform((-1, -1, 2), (1, 1, 5), (20, 3))  # axes left, up, forward
        world = (camera - t) @ r.T  # x_camera = x_world R + T
        ndc = f * camera[:, :2] / camera[:, 2:] + p
        pixels = np.array([50, 30]) / 2 - ndc * (15 if isotropic else np.array([25, 15]))
        expected = (pixels - [5, 0]) / [40, 30]  # 40 x 30 pixels are cut out of 50 x 30
        inverse = np.linalg.inv(found["poses"][row].double().numpy())
        mine = (np.c_[world, np.ones(20)] @ inverse.T)[:, :3] @ found["intrinsics"][row].double().numpy().T
        np.testing.assert_allclose(mine[:, :2] / mine[:, 2:], expected, atol=1e-5)


def test_identity_of_pytorch3d_looks_forward():
    pose = world_from_pytorch3d(np.eye(3), np.array([0, 0, 2.0]))
    np.testing.assert_allclose(pose[:3, 2], [0, 0, 1])  # forward
    np.testing.assert_allclose(pose[:3, 0], [-1, 0, 0])  # right is not left
    np.testing.assert_allclose(pose[:3, 3], [0, 0, -2])


def test_best_sequences_and_splits(tmp_path):
    make_co3d(tmp_path, sequences=40, frames=2)
    every = every_split(tmp_path, best=1)
    names = sum(every.values(), [])
    assert len(names) == len(set(names)) == 80 and all(every.values()) and len(every["train"]) > 50
    best = every_split(tmp_path, best=0.2)
    assert sorted(sum(best.values(), [])) == sorted(
        (c, f"{c[0]}{s}") for c in ("apple", "bench") for s in range(4, 40, 5)
    )
    assert all(set(best[split]) <= set(every[split]) for split in best)
    assert every_split(tmp_path, best=1, seed=1) != every
    only = every_split(tmp_path, best=1, categories=["bench"])
    assert {category for names in only.values() for category, _ in names} == {"bench"}


LISTS = [
    ({"train": {"apple": ["a1", "a3"]}, "test": {"bench": ["b2"]}}, False),
    ({"apple": {"train": ["a1", "a3"]}, "bench": {"test": ["b2"]}}, False),
    ({"train": ["apple/a1", "apple/a3"], "test": ["bench/b2"]}, False),
    ({"train": [["a1", 1, "x"], ["a3", 1, "x"]], "test": [["b2", 2, "y"]]}, False),
    ({"apple": {"a1": 0.9, "a3": 0.8}, "bench": {"b2": 0.7}}, True),
    (["a1", "a3", "b2", "of another category"], True),
]


@pytest.mark.parametrize(("content", "drawn"), LISTS)
def test_lists_of_sequences(tmp_path, content, drawn):
    make_co3d(tmp_path, frames=2)
    (tmp_path / "list.json").write_text(json.dumps(content))
    found = every_split(tmp_path, listed=tmp_path / "list.json")
    wanted = {"train": [("apple", "a1"), ("apple", "a3")], "val": [], "test": [("bench", "b2")]}
    if drawn:
        assert sorted(sum(found.values(), [])) == sorted(sum(wanted.values(), []))
    else:
        assert found == wanted


def test_co3d_that_is_not(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="co3d: no CATEGORY/frame_annotations.jgz in .*; get it with the script"
    ):
        open_co3d(tmp_path)
    make_co3d(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"co3d: no \['car'\], only \['apple', 'bench'\]"):
        open_co3d(tmp_path, categories=["car", "apple"])
    with pytest.raises(FileNotFoundError, match="no sequence of those asked for has at least 9 frames"):
        open_co3d(tmp_path, min_frames=9)
    with pytest.raises(FileNotFoundError, match="set_lists_none.json is missing"):
        open_co3d(tmp_path, set_list="none")
    (tmp_path / "list.json").write_text('{"train": ["a1", ')
    with pytest.raises(ValueError, match="list.json: wanted JSON"):
        open_co3d(tmp_path, listed=tmp_path / "list.json")
    videos = open_co3d(tmp_path, set_list="some")["train"]
    image = tmp_path / "apple/a0/images/frame000002.jpg"
    content = image.read_bytes()
    index = videos.names.index(("apple", "a0"))
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="frame000002.jpg: the image is cut off"):
        videos.read(index, range(4))
    image.unlink()
    with pytest.raises(FileNotFoundError, match="frame000002.jpg: the image is missing"):
        videos.read(index, range(4))
    cv2.imwrite(str(image), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frame000002.jpg: wanted \(30, 50\) pixels, as .* says, got \(20, 20\)"):
        videos.read(index, range(4))
    file = tmp_path / "bench" / "frame_annotations.jgz"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"[]", gzip.compress(b'{"a": 1}')):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="bench/frame_annotations.jgz: (cut off or corrupt|wanted a list)"):
            open_co3d(tmp_path)
    for change, message in (
        (lambda entry: entry["viewpoint"]["R"].reverse(), r"bench/frame_annotations.jgz: b4: pose \d: wanted a rigid"),
        (lambda entry: entry["viewpoint"].pop("T"), "b4: wanted a viewpoint, and an image's path and size, of every"),
        (
            lambda entry: entry["viewpoint"].update(focal_length=[0, 1]),
            r"b4: intrinsics \d: wanted focal lengths above",
        ),
        (lambda entry: entry.pop("sequence_name"), "bench/frame_annotations.jgz: wanted sequence_name in every entry"),
    ):
        entries = json.loads(gzip.decompress(content))
        change(next(entry for entry in entries if entry["sequence_name"] == "b4"))
        write_jgz(file, entries)
        with pytest.raises(ValueError, match=message):
            open_co3d(tmp_path)
