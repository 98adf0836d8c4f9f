"""Sets of pictures for tokenizers: every source gives the same pixels, splits do not overlap, and one clear error says
what is missing or damaged."""

import io
import json
import pickle
import tarfile

import cv2
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fourdperf.data import offline_images
from fourdperf.data.image_sets import open_image_set
from fourdperf.data.scenes import Scene
from fourdperf.data.scenes.textures import load_photographs
from fourdperf.train.data import Shuffled

SPLITS = ("train", "val", "test")


def picture(i: int, height: int = 8, width: int = 8) -> np.ndarray:
    """uint8 RGB whose red tells the number."""
    image = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
    image[..., 0] = i
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def write_files(folder, numbers, **shape) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i:03d}.png").write_bytes(png(picture(i, **shape)))
    return [f"{i:03d}.png" for i in numbers]


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_h5(path, numbers, labels=None) -> None:
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([picture(i) for i in numbers])
        if labels is not None:
            file["labels"] = labels


def make(kind: str, root) -> str:
    """20 pictures of a kind; the shards and HDF5 files are two."""
    numbers = range(20)
    if kind in ("folder", "list"):
        names = write_files(root / "images", numbers)
        (root / "all.txt").write_text("\n".join([f"images/{name}" for name in names[:10]] + [""] * 2) + "\n")
        with open(root / "all.txt", "a") as file:
            file.writelines(f"{root / 'images' / name}\n" for name in names[10:])
        return str(root / ("images" if kind == "folder" else "all.txt"))
    for shard in range(2):
        mine = numbers[10 * shard : 10 * shard + 10]
        if kind == "shards":
            members = {
                f"x/{i:03d}.{suffix}": c for i in mine for suffix, c in (("png", png(picture(i))), ("txt", b"?"))
            }
            write_tar(root / f"part-{shard:02d}.tar", members)
        else:
            write_h5(root / f"part-{shard:02d}.h5", mine)
    return str(root / "part-{00..01}.tar") if kind == "shards" else str(root / "part-*.h5")


def numbers_of(dataset) -> list[int]:
    return [round(255 * float(dataset[i][0][0, 0, 0])) for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["folder", "list", "shards", "hdf5"])
def test_every_source_gives_the_pictures(tmp_path, kind):
    source = make(kind, tmp_path)
    sets = {split: open_image_set(source, split, (8, 8)) for split in SPLITS}
    numbers = {split: numbers_of(dataset) for split, dataset in sets.items()}
    assert [len(numbers[split]) for split in SPLITS] == [16, 2, 2]
    assert sorted(sum(numbers.values(), [])) == list(range(20))
    for split, dataset in sets.items():
        assert dataset.name == kind and dataset.classes == ()
        for i, number in enumerate(numbers[split]):
            image, label = dataset[i]
            assert torch.equal(image, torch.from_numpy(picture(number)).float() / 255) and label == 0
    other = open_image_set(source, "test", (8, 8), seed=1)
    assert numbers_of(other) == numbers["test"]
    with pytest.raises(IndexError):
        other[2]


@pytest.mark.parametrize("kind", ["shards", "hdf5"])
def test_workers_and_pickling(tmp_path, kind):
    dataset = open_image_set(make(kind, tmp_path), "train", (8, 8))
    alone = torch.stack([dataset[i][0] for i in range(16)])  # opens files before the workers are forked
    loaded = torch.cat([images for images, _ in DataLoader(dataset, 4, num_workers=2)])
    assert torch.equal(alone, loaded)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], alone[3])


def test_a_list_finds_its_other_splits(tmp_path):
    counts = {"train": 10, "val": 3}
    for split, count in counts.items():
        names = write_files(tmp_path / split, range(count))
        (tmp_path / f"bdd_{split}.txt").write_text("\n".join(f"{split}/{name}" for name in names))
    for named in counts:
        sets = [open_image_set(tmp_path / f"bdd_{named}.txt", split, (8, 8)) for split in counts]
        assert [len(dataset) for dataset in sets] == [10, 3]
    with pytest.raises(FileNotFoundError, match="there is train, val among .*bdd_val.txt, but no test"):
        open_image_set(tmp_path / "bdd_val.txt", "test", (8, 8))
    (tmp_path / "bdd_val.txt").unlink()
    sizes = [len(open_image_set(tmp_path / "bdd_train.txt", split, (8, 8))) for split in counts]
    assert sizes == [9, 1]


def test_shards_by_name_with_labels(tmp_path):
    for split, numbers in {"train": range(6), "test": range(6, 9)}.items():
        members = {}
        for i in numbers:
            members[f"{i}.png"] = png(picture(i))
            members |= (
                {f"{i}.cls": str(i % 3).encode()} if i % 2 else {f"{i}.json": json.dumps({"label": i % 3}).encode()}
            )
        write_tar(tmp_path / f"{split}-000.tar", members)
    write_tar(tmp_path / "readme.tar", {"9.png": png(picture(9))})
    train, val, test = (open_image_set(tmp_path, split, (8, 8)) for split in SPLITS)
    assert numbers_of(test) == [6, 7, 8] and [test[i][1] for i in range(3)] == [0, 1, 2]
    assert sorted(numbers_of(train) + numbers_of(val)) == list(range(6)) and train.classes == ("0", "1", "2")


def test_a_folder_of_hdf5(tmp_path):
    """Of either suffix, beside what a kill left of a shard."""
    write_h5(tmp_path / "a.h5", range(6))
    write_h5(tmp_path / "b.hdf5", range(6, 10))
    (tmp_path / ".train-000001.7.tmp.tar").write_bytes(b"cut off")
    sets = [open_image_set(tmp_path, split, (8, 8)) for split in SPLITS]
    assert sorted(sum(map(numbers_of, sets), [])) == list(range(10)) and sets[0].name == "hdf5"


def test_hdf5_labels(tmp_path):
    write_h5(tmp_path / "test.h5", range(5), np.array([4, 3, 2, 1, 0]))
    dataset = open_image_set(tmp_path / "test.h5", "test", (8, 8))
    assert [dataset[i][1] for i in range(5)] == [4, 3, 2, 1, 0] and len(dataset.classes) == 5
    for i, labels in enumerate((np.zeros(4, int), np.full(5, -1), np.zeros(5))):
        write_h5(tmp_path / f"{i}.h5", range(5), labels)
        with pytest.raises(ValueError, match=rf"{i}.h5: labels: wanted integers \(5,\) from 0, got"):
            open_image_set(tmp_path / f"{i}.h5", "test", (8, 8))


def test_cuts(tmp_path):
    """Without augment the middle; with it other places and both sides, anew at every visit, the same at every run."""
    write_files(tmp_path / "train", range(3), height=8, width=24)
    write_files(tmp_path / "val", range(1), height=8, width=24)
    middle = open_image_set(tmp_path, "train", (8, 8))[1][0]
    assert torch.equal((255 * middle).round().byte(), torch.from_numpy(picture(1, 8, 24)[:, 8:16]))
    cut = open_image_set(tmp_path, "train", (8, 8), augment=True)
    again = open_image_set(tmp_path, "train", (8, 8), augment=True)
    wide = torch.from_numpy(picture(1, 8, 24))
    places = set()
    for visit in range(60):
        image = (255 * cut.visited(1, visit)[0]).round().byte()
        assert torch.equal(image, (255 * again.visited(1, visit)[0]).round().byte())
        found = [
            (x, side) for x in range(17) for side in (1, -1) if torch.equal(image, sided(wide[:, x : x + 8], side))
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len({x for x, _ in places}) > 12 and {side for _, side in places} == {1, -1}
    assert torch.equal(cut[1][0], cut.visited(1, 0)[0])
    other = open_image_set(tmp_path, "train", (8, 8), augment=True, seed=1)
    assert not all(torch.equal(other[i][0], cut[i][0]) for i in range(3))


def sided(image: torch.Tensor, side: int) -> torch.Tensor:
    return image if side == 1 else image.flip(1)


def test_shuffled_passes_cut_anew(tmp_path):
    write_files(tmp_path / "train", range(2), height=8, width=200)
    write_files(tmp_path / "val", range(1))
    endless = Shuffled(open_image_set(tmp_path, "train", (8, 8), augment=True), seed=0)
    seen = [endless[i][0] for i in range(8)]
    assert [round(255 * float(image[0, 0, 0])) for image in seen[:2]] in ([0, 1], [1, 0])
    assert len({image.numpy().tobytes() for image in seen}) > 6
    assert torch.equal(endless[5][0], seen[5])


# The offline set


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(offline_images, "COUNTS", {"train": 16, "val": 4, "test": 8})
    return tmp_path / "fourdperf" / "offline_images"


def test_offline(offline):
    sets = {split: open_image_set(None, split, (24, 32)) for split in SPLITS}
    assert [len(dataset) for dataset in sets.values()] == [16, 4, 8]
    for dataset in sets.values():
        assert dataset.classes == ("scene", "photograph") and dataset.name == "offline"
        assert [dataset[i][1] for i in range(4)] == [0, 0, 0, 1]
        assert all(dataset[i][0].shape == (24, 32, 3) and dataset[i][0].std() > 0.02 for i in range(len(dataset)))
    everything = [image.tobytes() for dataset in sets.values() for image in dataset.pictures]
    assert len(set(everything)) == 28
    (file,) = offline.glob("test-*.npy")
    before = file.read_bytes()
    file.write_bytes(before[:-100])  # cut off: made anew, the same
    open_image_set(None, "test", (24, 32))
    assert file.read_bytes() == before
    assert sorted(path.name for path in offline.iterdir()) == [
        f"{split}-{count}-24x32-v1.npy" for split, count in (("test", 8), ("train", 16), ("val", 4))
    ]


def test_offline_photographs_are_of_disjoint_regions(offline, monkeypatch):
    """Photographs whose columns tell their place: no split has a column of another's, on surfaces of scenes neither."""
    columns = np.tile(np.linspace(0, 1, 640, dtype=np.float32)[None, :, None], (427, 1, 3))
    monkeypatch.setattr(offline_images, "load_photographs", lambda folder: (columns, columns))
    surfaces = []

    def scene(*args, photographs, **options):
        surfaces.extend(load_photographs(photographs))
        return Scene(*args, photographs=photographs, **options)

    monkeypatch.setattr(offline_images, "Scene", scene)
    for split, (low, high) in {"train": (0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1)}.items():
        surfaces.clear()
        pieces = open_image_set(None, split, (16, 16)).pictures[3::4]
        shown = [pieces / np.float32(255), *surfaces]
        assert len(surfaces) == 2 * len(pieces)
        assert all(low - 0.01 <= picture.min() and picture.max() <= high + 0.01 for picture in shown)


def test_offline_without_scikit_learn(offline, monkeypatch):
    monkeypatch.setattr(offline_images, "load_photographs", lambda folder: ())
    with pytest.raises(ImportError, match="scikit-learn"):
        open_image_set(None, "test", (8, 8))
    assert not list(offline.glob("*"))


# Refusing


def test_damaged_sources(tmp_path):
    (tmp_path / "a.txt").write_text("0.png\n1.png\n2.png\n")
    listed = open_image_set(tmp_path / "a.txt", "train", (8, 8))
    with pytest.raises(FileNotFoundError, match=r"\d.png"):
        listed[0]
    cut = png(picture(0, 32, 32))[:400]
    write_tar(tmp_path / "b.tar", {f"{i}.png": cut for i in range(3)})
    with pytest.raises(ValueError, match=r"b.tar: \d.png: the image is cut off after 400 bytes"):
        open_image_set(tmp_path / "b.tar", "train", (8, 8))[0]
    write_tar(tmp_path / "c.tar", {f"{i}.png": png(picture(i)) for i in range(9)})
    whole = (tmp_path / "c.tar").read_bytes()
    for damaged in (b"", b"no tar file" * 99, whole[:600], whole[: 3 * 1024 + 512 + 10]):
        (tmp_path / "c.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match="c.tar: no tar file, or corrupt or cut off|shards, got none in"):
            open_image_set(tmp_path / "c.tar", "train", (8, 8))
    write_h5(tmp_path / "d.h5", range(9))
    whole = (tmp_path / "d.h5").read_bytes()
    for damaged in (b"", whole[:900]):
        (tmp_path / "d.h5").write_bytes(damaged)
        with pytest.raises(ValueError, match="d.h5: no HDF5 file, or corrupt or cut off"):
            open_image_set(tmp_path / "d.h5", "train", (8, 8))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"] = np.zeros((4, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match=r"d.h5: images: wanted uint8 \(N, H, W, 3\), got float32 \(4, 8, 8, 3\)"):
        open_image_set(tmp_path / "d.h5", "train", (8, 8))
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="e.txt: wanted a list of paths"):
        open_image_set(tmp_path / "e.txt", "train", (8, 8))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_that_end_too_soon(tmp_path, format):
    """After a member, in a header, or at a header that is damaged: all of which tarfile takes for the end."""
    path, ends = tmp_path / "a.tar", []
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(9):
            entry, content = tarfile.TarInfo(f"{'x' * 120 if i % 2 else 'é'}/{i}.png"), png(picture(i))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
            ends.append(tar.offset)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[ends[4] + 150] ^= 1  # in the checksum
    for content in (whole[: ends[4]], whole[: ends[8]], whole[: ends[4] + 100], bytes(damaged)):
        path.write_bytes(content)
        message = f"a.tar: corrupt or cut off at byte ({ends[4]}|{ends[8]}): wanted a header"
        with pytest.raises(ValueError, match=message):
            open_image_set(path, "train", (8, 8))
    path.write_bytes(whole[: ends[8] + 1024])  # without the zeros that fill a record
    assert len(open_image_set(path, "train", (8, 8))) == 7


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"cat", "0.cls: wanted a label"),
        (b"-1", "wanted a label from 0, got -1"),
        (b"1.5", "wanted a label from 0, got 1.5"),
        (None, "has no label, though others have"),
    ],
)
def test_damaged_labels(tmp_path, label, message):
    members = {f"{i}.png": png(picture(i)) for i in range(4)} | {"1.cls": b"1"}
    write_tar(tmp_path / "a.tar", members if label is None else members | {"0.cls": label})
    with pytest.raises(ValueError, match=message):
        open_image_set(tmp_path / "a.tar", "train", (8, 8))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "wanted a folder, or a file or pattern ending in .txt, .tar"),
        ("here.npz", ValueError, "wanted a folder, or a file or pattern ending in .txt, .tar"),
        ("x-{0..2}.tar", FileNotFoundError, r"no such file: .*x-1.tar \(2 of 3 missing\)"),
        ("x-{0..2.tar", ValueError, "x-{0..2.tar"),
        ("none-*.h5", FileNotFoundError, "no such file: .*none-"),
        ("here.txt", ValueError, "wanted at least 3 images to split"),
    ],
)
def test_bad_sources(tmp_path, source, error, message):
    (tmp_path / "here.npz").write_bytes(b"")
    (tmp_path / "here.txt").write_text("\n")
    write_tar(tmp_path / "x-0.tar", {})
    with pytest.raises(error, match=message):
        open_image_set(tmp_path / source, "train", (8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split: wanted one of train, val, test, got 'dev'"),
        ({"image_size": (8,)}, r"image_size: wanted \(H, W\), got \(8,\)"),
        ({"image_size": (8, 0)}, r"image_size: wanted \(H, W\), got \(8, 0\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        open_image_set(**{"source": None, "split": "train", "image_size": (8, 8), **options})
