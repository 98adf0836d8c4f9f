"""Sets of images: small files in the real formats, splits, and one clear error for what is missing or damaged."""

import gzip
import os
import pickle
import struct

import cv2
import numpy as np
import pytest
import torch

from fourdperf.data.images import CIFAR10_CLASSES, open_images


def draw(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """MNIST as torchvision puts it: 30 images to train on, 6 to test; the latter compressed only."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, count in (("train", 30), ("t10k", 6)):
        files = {
            "images-idx3": draw(count, 28, 28),
            "labels-idx1": np.arange(count, dtype=np.uint8) % 10,
        }
        for name, array in files.items():
            content, suffix = idx(array), ""
            if stem == "t10k":
                content, suffix = gzip.compress(content), ".gz"
            (folder / f"{stem}-{name}-ubyte{suffix}").write_bytes(content)
    return tmp_path


CIFAR10_BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def cifar10_batch(number: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(4, 3, 32, 32) ^ np.uint8(number), (np.arange(4) + number) % 10


def python2_pickle(pixels: np.ndarray, labels) -> bytes:
    """The bytes that Python 2 wrote for a batch, opcode by opcode as in CIFAR-10's own files."""
    content = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07K\x00\x85q\x08U\x01bq\t\x87q\nRq\x0b"
    shape = b"(K\x01" + bytes((*b"K", len(pixels))) + b"M\x00\x0c\x86q\x0c"
    dtype = (
        b"cnumpy\ndtype\nq\rU\x02u1q\x0eK\x00K\x01\x87q\x0fRq\x10(K\x03U\x01|q\x11NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    state = shape + dtype + b"\x89T" + struct.pack("<I", len(content)) + content + b"q\x12tb"
    numbers = b"".join(bytes((*b"K", label)) for label in labels)
    head = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(" + numbers + b"e"
    )
    return head + b"U\x04dataq\x13" + array + state + b"U\tfilenamesq\x14]q\x15(U\x05a.pngq\x16U\x05b.pngq\x17eu."


@pytest.fixture
def cifar10_bin(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(CIFAR10_BATCHES):
        pixels, labels = cifar10_batch(number)
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(4, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


@pytest.fixture
def cifar10_py(tmp_path):
    folder = tmp_path / "py" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate(CIFAR10_BATCHES):
        pixels, labels = cifar10_batch(number)
        (folder / name).write_bytes(python2_pickle(pixels.reshape(4, -1), labels))
    return tmp_path / "py"


def pixels(images) -> torch.Tensor:
    return torch.stack([image for image, _ in images])


def items(images):
    return (images[i] for i in range(len(images)))


def test_digits():
    from sklearn.datasets import load_digits

    splits = {split: open_images("digits", split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [1439, 179, 179]
    image, label = splits["val"][3]
    assert image.shape == (8, 8, 1) and image.dtype == torch.float32 and isinstance(label, int)
    assert splits["val"].image_size == (8, 8) and splits["val"].channels == 1 and len(splits["val"].classes) == 10
    # Together they are scikit-learn's, each once.
    everything = torch.cat([pixels(items(images)) for images in splits.values()])
    ours = sorted(map(bytes, (everything * 16).byte().numpy()))
    assert ours == sorted(map(bytes, load_digits().images.astype(np.uint8)[..., None]))
    assert everything.min() == 0 and everything.max() == 1


def test_splits_follow_the_seed():
    first, again, other = (pixels(items(open_images("digits", "val", seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_mnist(mnist, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(mnist))
    splits = {split: open_images("mnist", split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [27, 3, 6]
    assert torch.equal((pixels(items(splits["test"])) * 255).byte()[..., 0], torch.from_numpy(draw(6, 28, 28)))
    assert [label for _, label in items(splits["test"])] == list(range(6))
    wanted = draw(30, 28, 28)
    for image, label in (*items(splits["train"]), *items(splits["val"])):
        found = [i for i in range(30) if np.array_equal((image[..., 0] * 255).byte().numpy(), wanted[i])]
        assert [i % 10 for i in found] == [label]


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10(version, request):
    root = request.getfixturevalue(f"cifar10_{version}")
    splits = {split: open_images("cifar10", split, root) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [18, 2, 4]
    wanted, labels = cifar10_batch(5)
    found = (pixels(items(splits["test"])) * 255).round().byte()
    assert torch.equal(found, torch.from_numpy(wanted).permute(0, 2, 3, 1))
    assert [label for _, label in items(splits["test"])] == labels.tolist()
    assert splits["test"].classes == CIFAR10_CLASSES


def write(path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())


def test_folder_without_splits(tmp_path):
    for i in range(20):
        write(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", np.full((10, 20, 3), (i, 0, 200), np.uint8))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    splits = [open_images("folder", split, tmp_path, image_size=4) for split in ("train", "val", "test")]
    assert [len(images) for images in splits] == [16, 2, 2] and splits[0].classes == ("cat", "dog")
    seen = {}
    for images in splits:
        for image, label in items(images):
            assert image.shape == (4, 4, 3)
            red, green, blue = (image[0, 0] * 255).round().int().tolist()
            assert (red, green) == (200, 0)
            seen[blue] = label
    assert seen == {i: 1 - i % 2 for i in range(20)}


def test_folder_with_splits(tmp_path):
    counts = {"train": 10, "test": 3}
    for split, count in counts.items():
        for i in range(count):
            write(tmp_path / split / "ab"[i % 2] / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    sizes = [len(open_images("folder", split, tmp_path)) for split in ("train", "val", "test")]
    assert sizes == [9, 1, 3]
    write(tmp_path / "val" / "b" / "0.png", np.full((8, 8, 3), 0, np.uint8))
    sizes = [len(open_images("folder", split, tmp_path)) for split in ("train", "val", "test")]
    assert sizes == [10, 1, 3]
    assert open_images("folder", "val", tmp_path)[0][1] == 1  # b, as in train
    write(tmp_path / "val" / "c" / "0.png", np.full((8, 8, 3), 0, np.uint8))
    with pytest.raises(ValueError, match=r"\['a', 'b'\], got \['b', 'c'\]"):
        open_images("folder", "val", tmp_path)


def test_folder_cuts_out_the_middle(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 255  # the middle square, white
    for i in range(3):
        write(tmp_path / f"{i}.png", image)
    for size in (8, 4, 16, (8, 4)):
        images = open_images("folder", "train", tmp_path, image_size=size, channels=1)
        found, label = images[0]
        shape = (size, size) if isinstance(size, int) else size
        assert found.shape == (*shape, 1) and label == 0 and images.classes == ()
        assert found.shape[1] < 4 or (found[:, 1:-1] == 1).all()
    wide = open_images("folder", "train", tmp_path, image_size=(4, 8), channels=1)[0][0]
    assert wide.mean() == pytest.approx(0.5)


# Refusing


@pytest.mark.parametrize(
    ("name", "looked", "source"),
    [("mnist", "MNIST/raw", "ossci-datasets"), ("cifar10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")],
)
def test_missing_files(tmp_path, monkeypatch, name, looked, source):
    with pytest.raises(FileNotFoundError) as error:
        open_images(name, "train", tmp_path)
    assert str(tmp_path / looked) in str(error.value) and source in str(error.value)
    monkeypatch.delenv("DATA_PATH", raising=False)
    with pytest.raises(FileNotFoundError, match="DATA_PATH"):
        open_images(name, "train")


def test_damaged_mnist(mnist):
    images = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    labels = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for damaged, message in (
        (whole[:-1], "cut off or corrupt: wanted 23536 bytes"),
        (whole + b"x", "cut off or corrupt"),
        (whole[:9], "wanted an idx file"),
        (labels.read_bytes(), "wanted an idx file"),
        (b"", "wanted an idx file"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "cut off or corrupt"),
    ):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_images("mnist", "train", mnist)
    images.write_bytes(whole)
    labels.write_bytes(idx(np.zeros(29, np.uint8)))
    with pytest.raises(ValueError, match="wanted a label for each of 30 images, got 29"):
        open_images("mnist", "train", mnist)
    packed = mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = packed.read_bytes()
    for damaged in (content[:-9], content[:30] + b"0000" + content[34:], b"no gzip"):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz: cut off or corrupt"):
            open_images("mnist", "test", mnist)


def test_damaged_cifar10(cifar10_bin):
    batch = cifar10_bin / "cifar-10-batches-bin" / "test_batch.bin"
    whole = batch.read_bytes()
    for damaged, message in ((whole[:-1], "cut off"), (b"", "cut off"), (b"\x0a" + whole[1:], "labels from 0 to 9")):
        batch.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"test_batch.bin: .*{message}"):
            open_images("cifar10", "test", cifar10_bin)
    (cifar10_bin / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        open_images("cifar10", "train", cifar10_bin)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_run_nothing(cifar10_py, tmp_path):
    batch = cifar10_py / "cifar-10-batches-py" / "test_batch"
    made = tmp_path / "made"
    whole = batch.read_bytes()
    data = cifar10_batch(0)[0].reshape(4, -1)
    short = pickle.dumps({b"data": data[:3], b"labels": [1, 2, 3, 4]}, protocol=4)
    for damaged, message in (
        (pickle.dumps({b"data": Evil(made), b"labels": [1]}), "it asks for posix.mkdir, which has no place"),
        (pickle.dumps(np.array([Evil(made)], object)), "it asks for posix.mkdir"),
        (pickle.dumps(np.zeros(3)), "wanted a batch of CIFAR-10 with data and labels, got _Array"),
        (pickle.dumps([1]), "got list"),
        (pickle.dumps({b"labels": [1]}, protocol=4), "wanted a batch of CIFAR-10 with data and labels: b?'data'"),
        (pickle.dumps({b"data": 3, b"labels": [1]}, protocol=4), "wanted a batch of CIFAR-10"),
        (pickle.dumps({b"data": data, b"labels": [1, [2]]}, protocol=4), "CIFAR-10"),
        (short, "wanted 12288 bytes of pixels, got 9216"),
        (whole[:-1], "cut off, corrupt or not CIFAR-10"),
        (whole[:5000], "cut off, corrupt or not CIFAR-10"),
        (b"", "cut off, corrupt or not CIFAR-10"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "cut off, corrupt or not CIFAR-10"),
    ):
        batch.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_images("cifar10", "test", cifar10_py)
    assert not made.exists()


def test_damaged_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        open_images("folder", "train", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no images"):
        open_images("folder", "train", tmp_path)
    for i in range(2):
        write(tmp_path / f"{i}.png", draw(8, 8, 3))
    with pytest.raises(ValueError, match="at least 3 images to split into train, val, test, got 2"):
        open_images("folder", "train", tmp_path)
    cut = cv2.imencode(".png", draw(32, 32, 3))[1].tobytes()[:500]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(cut)
    with pytest.raises(ValueError, match=".png: the image is cut off after 500 bytes"):
        open_images("folder", "train", tmp_path)[0]
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "0.png", draw(8, 8, 3))
    with pytest.raises(FileNotFoundError, match="there is train among .*, but no test"):
        open_images("folder", "test", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "imagenet"}, "name: wanted one of digits, mnist, cifar10, folder, got 'imagenet'"),
        ({"split": "dev"}, "split: wanted one of train, val, test, got 'dev'"),
        ({"image_size": 9}, "image_size: wanted none, since digits has its own, got 9"),
        ({"name": "folder", "image_size": (3, 0)}, r"image_size: wanted \(H, W\), got \(3, 0\)"),
        ({"name": "folder", "channels": 2}, "channels: wanted 1 or 3, got 2"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_images(**{"name": "digits", "split": "train", "root": tmp_path, **options})
