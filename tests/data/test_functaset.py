"""Functasets: the same files whatever is killed on the way, on any number of processes; damage is never silent."""

import json
import multiprocessing
import pickle
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from fourdperf.data import functaset
from fourdperf.data.functaset import (
    AUGMENTATIONS,
    Augmentation,
    Functaset,
    PixelMaps,
    Recipe,
    augment,
    create_functaset,
    fingerprint,
    open_functaset,
    signal_images,
)
from fourdperf.models.functa import Config, Functa, fit, psnr
from tests.memory import growth

h5py = pytest.importorskip("h5py")

RECIPE = Recipe("digits", augmentations=3, seed=5, augment=AUGMENTATIONS["digits"], block=4)
COUNTS = {"train": 33, "val": 5, "test": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are killed: the models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Images(Dataset):
    """Random images; number i always the same."""

    def __init__(self, split: str, length: int, size=(8, 8, 1)):
        self.split, self.length, self.size = split, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(len(self.split) * 1000 + index)
        return torch.rand(self.size, generator=generator), index % 3


def model(seed=0, **fields) -> Functa:
    torch.manual_seed(seed)
    defaults = {"hidden_size": 8, "num_layers": 3, "channels": 1, "image_size": (8, 8), "latent_size": 2}
    return Functa(Config(**{**defaults, "latent_channels": 4, "inner_steps": 2, **fields}))


def datasets() -> dict[str, Images]:
    return {"train": Images("train", 11), "val": Images("val", 5), "test": Images("test", 4)}


def create(out, recipe=RECIPE, seed=0, **options):
    return create_functaset(model(seed), datasets(), out, recipe, **{"batch_size": 3, **options})


def content(folder) -> dict[str, np.ndarray]:
    found = {}
    for split in COUNTS:
        with h5py.File(Path(folder) / f"{split}.h5") as file:
            found |= {f"{split}/{name}": x[()] for name, x in file.items()}
            found |= {f"{split}@{name}": x for name, x in file.attrs.items()}
    return found


def same(a, b) -> bool:
    a, b = content(a), content(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A functaset that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    done = create(out)
    assert {split: summary.signals for split, summary in done.items()} == COUNTS
    return out


# What is in it


def test_signals_are_the_fits_of_augmented_images(whole):
    functa = Functa.from_pretrained(whole / "model")
    signals = open_functaset(whole, "train")
    assert len(signals) == 33 and signals.shape == (2, 2, 4) and signals.recipe == RECIPE
    assert signals.config == functa.config.to_dict()
    assert signals.image.tolist() == [n // 3 for n in range(33)]
    assert signals.augmentation.tolist() == [n % 3 for n in range(33)]
    assert signals.labels.tolist() == [n // 3 % 3 for n in range(33)]
    pixels, _ = signal_images(datasets()["train"], "train", range(33), RECIPE)
    fitted = fit(functa, pixels.flatten(1, 2))
    torch.testing.assert_close(signals[:][0], fitted.latent)
    torch.testing.assert_close(torch.from_numpy(signals.psnr()), psnr(fitted.recon, pixels.flatten(1, 2)))
    flat = fitted.latent.reshape(-1, 4)
    torch.testing.assert_close(signals.mean, flat.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signals.std, flat.std(0, correction=0), rtol=1e-4, atol=1e-6)
    assert not list(whole.glob("parts*")) and not list(whole.glob(".*"))


def test_only_training_images_are_augmented(whole):
    signals = open_functaset(whole, "test")
    assert signals.augmentation.tolist() == [0] * 4 and signals.image.tolist() == [0, 1, 2, 3]
    pixels = torch.stack([image for image, _ in datasets()["test"]])
    torch.testing.assert_close(signals[:][0], fit(model(), pixels.flatten(1, 2)).latent)


def test_fewer_images_and_more_steps(tmp_path):
    recipe = Recipe("digits", augmentations=1, images=4, steps=1, block=3)
    assert create(tmp_path, recipe)["train"].signals == 4
    pixels, _ = signal_images(datasets()["train"], "train", range(4), recipe)
    torch.testing.assert_close(open_functaset(tmp_path, "train")[:][0], fit(model(), pixels.flatten(1, 2), steps=1)[0])


# Going on


@pytest.fixture(scope="module")
def server():
    """Processes that start at once: a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fourdperf.data.functaset", "fourdperf.models.functa", "h5py"])
    return context


def create_slowly(out, seconds=0.0, **options):
    torch.set_num_threads(1)
    before = functaset._fit_signals

    def slow(*arguments):
        time.sleep(seconds)
        return before(*arguments)

    functaset._fit_signals = slow
    create(out, **options)


def test_killed_at_random_points(whole, tmp_path, server):
    """kill -9 again and again; no part is fitted twice, nothing is broken on the way, and the end is the same."""
    dice, kept, kills = random.Random(0), {}, 0
    for attempt in range(60):
        process = server.Process(target=create_slowly, args=(tmp_path, 0.01))
        process.start()
        if attempt < 8:
            wanted = len(parts(tmp_path)) + dice.randint(0, 1)
            while process.is_alive() and len(parts(tmp_path)) < wanted:
                time.sleep(0.001)
            time.sleep(dice.random() * 0.02)
            process.kill()
            kills += 1
        process.join(60)
        now = parts(tmp_path)
        finished = {path.stem for path in tmp_path.glob("[a-z]*.h5")}
        assert all(now[path] == stamp for path, stamp in kept.items() if path.parent.name not in finished)
        assert all(functaset._read_part(path, *expected(path)) for path in now)
        assert all(Functaset(path) for path in tmp_path.glob("[a-z]*.h5"))
        kept = now
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 5
    assert same(tmp_path, whole)
    assert not list(tmp_path.glob("parts*")) and not list(tmp_path.glob(".*"))


def parts(out) -> dict[Path, tuple]:
    """Every part, with what tells whether it is still the same file."""
    while True:
        try:
            found = {path: path.stat() for path in out.glob("parts/*/[0-9]*.safetensors")}
            return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
        except FileNotFoundError:  # some were merged and went meanwhile
            pass


def expected(path: Path) -> tuple[int, tuple[int, ...]]:
    return min(4, COUNTS[path.parent.name] - 4 * int(path.stem)), (2, 2, 4)


@pytest.mark.parametrize("stage", ["save_file", "merge", "rename", "rmtree"])
def test_killed_where_it_hurts(whole, tmp_path, server, stage):
    """In the middle of writing a part, of copying parts, before the new name and before the parts go."""
    process = server.Process(target=die_in, args=(tmp_path, stage))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    left = list(tmp_path.rglob(".*.tmp.*"))
    assert len(left) == (0 if stage == "rmtree" else 1)
    assert (tmp_path / "train.h5").exists() == (stage == "rmtree")
    before = parts(tmp_path)
    create(tmp_path)
    assert before and same(tmp_path, whole) and not list(tmp_path.rglob(".*"))


def die_in(out, stage):
    import os
    import signal

    torch.set_num_threads(1)
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    calls = []

    def half(arrays, path):
        save(arrays, path)
        calls.append(path)
        if len(calls) == 3:
            with open(path, "r+b") as file:
                file.truncate(100)
            die()

    def second(*arguments):
        calls.append(arguments)
        return die() if len(calls) == 2 else read(*arguments)

    def rename(source, target):
        return die() if str(target).endswith("train.h5") else replace(source, target)

    save, read, replace = functaset.save_file, functaset._read_part, os.replace
    if stage == "save_file":
        functaset.save_file = half
    elif stage == "merge":
        functaset._read_part = second
    elif stage == "rename":
        os.replace = rename
    else:
        functaset.shutil.rmtree = die
    create(out)


def test_nothing_is_fitted_twice(whole, tmp_path, monkeypatch):
    count, before = [], functaset._fit_signals

    def stop_after_five(*arguments):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(len(arguments[3]))
        return before(*arguments)

    monkeypatch.setattr(functaset, "_fit_signals", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path)
    with pytest.raises(FileNotFoundError, match="not complete yet; fourdperf functaset create goes on"):
        open_functaset(tmp_path, "train")
    lost = sum(count) - 4 * len(parts(tmp_path))
    monkeypatch.setattr(functaset, "_fit_signals", lambda *a: count.append(len(a[3])) or before(*a))
    create(tmp_path)
    assert len(count) > 5 and sum(count) == sum(COUNTS.values()) + lost and lost < 4
    assert same(tmp_path, whole)
    count.clear()
    create(tmp_path)
    assert not count and same(tmp_path, whole)


def test_two_processes_and_then_another_number(whole, tmp_path, server):
    barrier = server.Barrier(2)
    options = ({"rank": rank, "ranks": 2, "barrier": barrier.wait} for rank in (1, 0))
    processes = [server.Process(target=create_slowly, args=(tmp_path,), kwargs=kwargs) for kwargs in options]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert same(tmp_path, whole)
    half = tmp_path / "half"
    with pytest.raises(RuntimeError, match="gone"):  # the first of three does its share, and the others never come
        create(half, rank=0, ranks=3, barrier=Once())
    assert sorted(path.stem for path in parts(half)) == ["00000", "00003", "00006"]
    create(half)
    assert same(half, whole)


class Once:
    """A barrier that only the first call passes."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("gone")


# Augmentations


def test_augmentations_depend_on_seed_image_and_number_only():
    images = torch.rand(2, 8, 8, 3)
    settings = Augmentation(shift=0.2, zoom=1.2, turn=20, flip=True)
    a = augment(images, [7, 9], [3, 4], settings, 1)
    assert torch.equal(a[1:], augment(images[1:], [9], [4], settings, 1))
    for other in (([8, 9], [3, 4], 1), ([7, 9], [2, 4], 1), ([7, 9], [3, 4], 2)):
        assert not torch.equal(a[0], augment(images, *other[:2], settings, other[2])[0])
    assert torch.equal(augment(images, [7, 9], [0, 4], settings, 1)[0], images[0])
    assert a.min() >= 0 and a.max() <= 1


def test_shifts_without_zoom_are_of_whole_pixels():
    """As padding by reflection, cropping and flipping."""
    image = torch.rand(1, 8, 16, 2)
    copies = augment(image.expand(40, -1, -1, -1), [0] * 40, range(40), AUGMENTATIONS["cifar10"], 0)
    padded = F.pad(image.movedim(-1, 1), (2, 2, 1, 1), mode="replicate")
    padded[:, :, :, :2], padded[:, :, :, -2:] = padded[:, :, :, 2:4].flip(-1), padded[:, :, :, -4:-2].flip(-1)
    crops = {(y, x): padded[0, :, y : y + 8, x : x + 16].movedim(0, -1) for y in range(3) for x in range(5)}
    crops |= {(*key, "flip"): crop.flip(1) for key, crop in crops.items()}
    seen = set()
    for copy in copies:
        matches = [key for key, crop in crops.items() if torch.allclose(copy, crop, atol=1e-5)]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 15 and {len(key) for key in seen} == {2, 3}


def test_turns_keep_circles_round():
    y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    disc = torch.sigmoid(6 - ((y - 10) ** 2 + (x - 20) ** 2).sqrt())[None, ..., None]
    turned = augment(disc.expand(9, -1, -1, -1), [0] * 9, range(9), Augmentation(turn=90), 0)
    assert (turned - disc).abs().max() < 0.05


# Reading


def test_slices_lists_and_memory(whole):
    signals, loaded = (open_functaset(whole, "train", in_memory) for in_memory in (False, True))
    everything, labels = signals[:]
    for numbers in (slice(3, 9), [5, 2, 2, -1], np.array([8]), torch.tensor([4, 5, 6]), slice(0, 0)):
        for source in (signals, loaded):
            latents, some = source[numbers]
            chosen = list(range(33))[numbers] if isinstance(numbers, slice) else [int(n) for n in numbers]
            assert torch.equal(latents, everything[chosen]) and torch.equal(some, labels[chosen])
    latent, label = signals[7]
    assert torch.equal(latent, everything[7]) and label == labels[7] and label.dtype == torch.int64
    with pytest.raises(IndexError, match="wanted signals below 33, got 33"):
        signals[33]


def test_workers_open_the_file_for_themselves(whole):
    signals = open_functaset(whole, "train")
    signals[0]  # this process has it open
    batches = list(DataLoader(signals, batch_size=8, num_workers=2))
    assert torch.equal(torch.cat([latents for latents, _ in batches]), signals[:][0])
    assert torch.equal(pickle.loads(pickle.dumps(signals))[3][0], signals[3][0])


def test_reading_a_little_of_a_large_file(tmp_path, whole):
    """A file of 2 GB, nearly all of it a hole, is read without taking memory for it."""
    path = tmp_path / "large.h5"
    with h5py.File(whole / "train.h5") as small, h5py.File(path, "w") as file:
        for name in small.attrs:
            file.attrs[name] = small.attrs[name]
        count = 2**21
        file.create_dataset("latents", (count, 8, 8, 4), "f4", chunks=(64, 8, 8, 4), fillvalue=0.5)
        file["latents"][count - 1] = 2
        for name in ("labels", "image", "augmentation", "psnr"):
            file.create_dataset(name, (count,), small[name].dtype)
        file["mean"], file["std"] = np.zeros(4, np.float32), np.ones(4, np.float32)

    def read():
        signals = Functaset(path)
        latents, _ = signals[[0, len(signals) - 1, 12345]]
        assert latents.amax((1, 2, 3)).tolist() == [0.5, 2, 0.5]

    assert growth(read) < 200 * 2**20


def test_pixel_maps_show_the_same_signals(whole):
    signals, images = open_functaset(whole, "train"), datasets()["train"]
    maps = PixelMaps(signals, images, "train")
    pixels, labels = signal_images(images, "train", range(33), RECIPE)
    found, some = maps[:]
    assert len(maps) == 33 and maps.shape == (2, 2, 16) and torch.equal(some, labels_of(signals))
    assert torch.equal(found[:, 1, 0].reshape(-1, 4, 4, 1), pixels[:, 4:, :4])
    assert torch.equal(maps[5][0], found[5]) and maps[5][1] == signals.labels[5]
    plain = found[::3].reshape(-1, 16)
    torch.testing.assert_close(maps.mean, plain.mean(0))
    torch.testing.assert_close(maps.std, plain.std(0, correction=0))
    with pytest.raises(ValueError, match="labels are not those of the data set"):
        PixelMaps(signals, torch.utils.data.Subset(images, range(10, -1, -1)), "train")
    with pytest.raises(ValueError, match="wanted 11 images in its data set, got 5"):
        PixelMaps(signals, datasets()["val"], "train")


def labels_of(signals) -> torch.Tensor:
    return torch.from_numpy(signals.labels)


# Refusing


def test_another_recipe_model_or_data_set(whole, tmp_path):
    with pytest.raises(ValueError, match="begun with augmentations 3, signals .*; give the options"):
        create(whole, Recipe("digits", 2, 5, AUGMENTATIONS["digits"], block=4))
    with pytest.raises(ValueError, match="begun with weights"):
        create(whole, seed=1)
    with pytest.raises(ValueError, match="begun with inner_rate 0.01; give"):  # the same weights
        create_functaset(model(inner_rate=0.02), datasets(), whole, RECIPE)
    with pytest.raises(ValueError, match="begun with signals"):
        create_functaset(model(), {**datasets(), "val": Images("val", 6)}, whole, RECIPE)
    with pytest.raises(ValueError, match=r"wanted images \(8, 8, 1\) as the field's, got \(8, 9, 1\)"):
        create_functaset(model(), {"val": Images("val", 6, (8, 9, 1))}, tmp_path / "a", RECIPE)
    with pytest.raises(ValueError, match="wanted at least one image in split val, got none"):
        create_functaset(model(), {"val": Images("val", 0)}, tmp_path / "b", RECIPE)
    assert not (tmp_path / "b").exists()


def test_older_ones_that_have_no_config(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "old")
    known = json.loads((out / "functaset.json").read_text())
    assert known.pop("config") == model().config.to_dict()
    (out / "functaset.json").write_text(json.dumps(known))
    assert len(open_functaset(out, "val")) == 5 and create(out)["val"].signals == 5


def test_a_fit_that_diverges(tmp_path):
    broken = model()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="train: the fit of image 0, augmentation 0 diverges"):
        create_functaset(broken, datasets(), tmp_path, RECIPE)
    assert not parts(tmp_path)


def test_files_that_are_none_or_damaged(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="no functaset in .*; fourdperf functaset create makes one"):
        open_functaset(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="wanted split other, got train, val, test"):
        open_functaset(whole, "other")
    with pytest.raises(FileNotFoundError, match="no functaset: "):
        Functaset(tmp_path / "train.h5")
    good = (whole / "train.h5").read_bytes()
    path = tmp_path / "train.h5"
    for damaged in (b"", b"no HDF5", good[: len(good) // 2], good[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="train.h5: not a functaset, or corrupt"):
            Functaset(path)
    with h5py.File(path, "w") as file:
        file["latents"] = np.zeros((3, 2, 2, 4))
    with pytest.raises(ValueError, match="format: wanted 'fourdperf functaset 1', got None"):
        Functaset(path)
    (tmp_path / "functaset.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not a description of a functaset: another format"):
        open_functaset(tmp_path, "train")


def test_a_flipped_bit_is_noticed(whole, tmp_path):
    signals = open_functaset(whole, "train")
    content = bytearray((whole / "train.h5").read_bytes())
    where = content.find(signals[20][0].numpy().tobytes())
    assert where > 0
    content[where] ^= 1
    (tmp_path / "train.h5").write_bytes(content)
    with pytest.raises(ValueError, match="latents are corrupt"):
        Functaset(tmp_path / "train.h5")[20]
    with pytest.raises(ValueError, match="corrupt"):
        Functaset(tmp_path / "train.h5", in_memory=True)


def test_a_split_of_another_functaset(whole, tmp_path):
    create(tmp_path, seed=1)
    (tmp_path / "val.h5").write_bytes((whole / "val.h5").read_bytes())
    with pytest.raises(ValueError, match="val.h5: of another functaset"):
        open_functaset(tmp_path, "val")
    with pytest.raises(ValueError, match="val.h5: of another functaset"):
        create(tmp_path, seed=1)


def test_latents_of_who_knows_what(tmp_path):
    create(tmp_path)
    (tmp_path / "functaset.json").unlink()
    with pytest.raises(ValueError, match="holds latents, but no functaset.json"):
        create(tmp_path)


def test_a_damaged_part_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(functaset, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path)
    monkeypatch.undo()
    part = tmp_path / "parts" / "train" / "00002.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match="00002.safetensors: corrupt: .*; delete it and run the command again"):
        create(tmp_path)
    part.unlink()
    assert create(tmp_path)["train"].signals == 33


def test_the_fingerprint_sees_every_weight():
    a, b = model(), model()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        next(b.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


def test_what_is_beside_the_files(whole):
    known = json.loads((whole / "functaset.json").read_text())
    assert known["signals"] == COUNTS and known["weights"] == fingerprint(Functa.from_pretrained(whole / "model"))
    assert Recipe.from_dict(known["recipe"]) == RECIPE
