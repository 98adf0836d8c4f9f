"""Shards: the same whatever is killed on the way, on any number of processes; damage is one clear error."""

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from fourdperf.data import niso_shards
from fourdperf.data.niso_shards import Items, Sequences, read_description, write_shards

h5py = pytest.importorskip("h5py")


class Images:
    """Items whose values are bytes already; number i always the same."""

    def __init__(self, length, shape=(5, 4, 1)):
        self.length, self.shape = length, shape

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randint(256, self.shape, generator=generator).float() / 255, "label": index % 10}


class Videos(Images):
    """Videos of 2 to 4 frames."""

    def frames(self, index):
        return 2 + index % 3

    def read(self, index, numbers):
        generator = torch.Generator().manual_seed(index)
        count = self.frames(index)
        video = torch.randint(256, (count, 6, 5, 3), generator=generator).float() / 255
        poses, intrinsics = (torch.rand(count, n, n, generator=generator) for n in (4, 3))
        return {name: x[list(numbers)] for name, x in (("video", video), ("poses", poses), ("intrinsics", intrinsics))}


OPTIONS = {"seed": 3, "size": [5, 4]}


def create(out, **options):
    sources = {"train": Images(11), "test": Images(3)}
    return write_shards(out, "homnist", sources, OPTIONS, **{"per_shard": 4, "classes": "0123456789", **options})


def check(out):
    for split, count in (("train", 11), ("test", 3)):
        items = Items(out, split)
        assert len(items) == count and items.classes == tuple("0123456789") and items.options == OPTIONS
        for i in range(count):
            assert torch.equal(items[i]["x"], Images(11)[i]["x"]) and items[i]["label"] == i % 10
        with pytest.raises(IndexError, match=f"wanted items below {count}, got {count}"):
            items[count]
    assert not list(out.glob(".*"))


def test_round_trip(tmp_path):
    assert create(tmp_path) == 4 and create(tmp_path) == 0
    check(tmp_path)
    assert read_description(tmp_path)["items"] == {"train": 11, "test": 3}
    assert torch.equal(pickle.loads(pickle.dumps(Items(tmp_path, "train")))[-1]["x"], Images(11)[10]["x"])


def test_shapes_stay_float(tmp_path):
    values = Images(3, (2, 3, 4, 2))
    values.__class__ = type(
        "Small", (Images,), {"__getitem__": lambda self, i: {"x": torch.full(self.shape, i / 7), "label": i}}
    )
    write_shards(tmp_path, "shapes", {"train": values}, {}, per_shard=2)
    assert torch.equal(Items(tmp_path, "train")[2]["x"], torch.full((2, 3, 4, 2), 2 / 7))


def test_sequences_of_any_length(tmp_path):
    source = Videos(7)
    write_shards(tmp_path, "sequences", {"train": source}, {}, per_shard=3)
    found = Sequences(tmp_path, "train")
    assert [found.frames(i) for i in range(7)] == [2, 3, 4, 2, 3, 4, 2]
    for i in range(7):
        for numbers in (range(found.frames(i)), [1], [1, 0]):
            mine, theirs = found.read(i, numbers), source.read(i, numbers)
            assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == torch.float32 for name in theirs)
    with pytest.raises(IndexError, match="wanted frames below 2, got 0 to 2"):
        found.read(0, range(3))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_are_disjoint_and_complete(tmp_path, ranks):
    for rank in range(ranks):  # each writes its own
        create(tmp_path, rank=rank, ranks=ranks)
    check(tmp_path)
    parts = [Items(tmp_path, "train", rank, ranks) for rank in range(ranks)]
    numbers = [part.number(i) for part in parts for i in range(len(part))]
    assert sorted(numbers) == list(range(11))
    for part in parts:
        assert all(torch.equal(part[i]["x"], Images(11)[part.number(i)]["x"]) for i in range(len(part)))
    with pytest.raises(ValueError, match="a shard for each, got 3, 4, 3"):
        Items(tmp_path, "train", 3, 4)


def test_a_process_waits_for_the_others(tmp_path, monkeypatch):
    others = []
    monkeypatch.setattr(
        niso_shards.time, "sleep", lambda seconds: others.append(create(tmp_path, rank=len(others) + 1, ranks=3))
    )
    assert create(tmp_path, ranks=3, wait=True) == 2 and others == [1, 1]
    check(tmp_path)


@pytest.mark.parametrize("stage", ["half written", "before its name"])
def test_killed_between_shards_and_resumed(tmp_path, stage):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fourdperf.data.niso_shards", "h5py"])
    process = context.Process(target=die_in, args=(tmp_path, stage))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("[a-z]*.h5")] == ["train-00000.h5"] and len(
        list(tmp_path.glob(".*"))
    ) == 1
    with pytest.raises(FileNotFoundError, match=r"train-00001.h5 is missing \(2 of 3 shards\): the same .* goes on"):
        Items(tmp_path, "train")
    before = (tmp_path / "train-00000.h5").stat()
    assert create(tmp_path) == 3
    after = (tmp_path / "train-00000.h5").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    check(tmp_path)


def die_in(out, stage):
    torch.set_num_threads(1)
    replace, calls = os.replace, []

    def killed(source, target):
        if str(target).endswith("train-00001.h5"):
            if stage == "half written":
                with open(source, "r+b") as file:
                    file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(target)
        return replace(source, target)

    os.replace = killed
    create(out)


def test_begun_with_something_else(tmp_path):
    create(tmp_path)
    with pytest.raises(ValueError, match="its shards were begun with per_shard 4; give the options"):
        create(tmp_path, per_shard=5)
    with pytest.raises(ValueError, match="its shards were begun with seed 3; give"):
        write_shards(
            tmp_path,
            "homnist",
            {"train": Images(11), "test": Images(3)},
            {**OPTIONS, "seed": 4},
            per_shard=4,
            classes="0123456789",
        )
    (tmp_path / "niso.json").unlink()
    with pytest.raises(ValueError, match="holds shards, but no niso.json"):
        create(tmp_path)


def test_damage(tmp_path):
    with pytest.raises(FileNotFoundError, match="no niso.json; fourdperf niso_data makes them"):
        Items(tmp_path, "train")
    create(tmp_path)
    with pytest.raises(FileNotFoundError, match="wanted split val, got train, test"):
        Items(tmp_path, "val")
    path = tmp_path / "train-00001.h5"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="train-00001.h5: cut off or corrupt: .*; delete it and run the command again"):
        Items(tmp_path, "train")[5]
    assert torch.equal(Items(tmp_path, "train")[0]["x"], Images(11)[0]["x"])  # the others are fine
    needle = np.rint(Images(11)[5]["x"].numpy() * 255).astype(np.uint8).tobytes()
    at = content.index(needle)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match="train-00001.h5: corrupt: x: .*delete it"):
        Items(tmp_path, "train")[5]
    path.write_bytes((tmp_path / "train-00002.h5").read_bytes())
    with pytest.raises(ValueError, match="train-00001.h5: wanted a shard with .*'first': 4"):
        Items(tmp_path, "train")[5]
    path.unlink()
    assert create(tmp_path) == 1
    check(tmp_path)
    (tmp_path / "niso.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="niso.json: not a description of shards"):
        Items(tmp_path, "train")


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="kind: wanted one of homnist, shapes, sequences, got 'x'"):
        write_shards(tmp_path, "x", {}, {}, per_shard=1)
    with pytest.raises(ValueError, match="at least one item in every split, got {'train': 0}"):
        write_shards(tmp_path, "homnist", {"train": Images(0)}, {}, per_shard=1)
    with pytest.raises(ValueError, match="per_shard >= 1"):
        write_shards(tmp_path, "homnist", {"train": Images(1)}, {}, per_shard=0)
    assert not list(tmp_path.iterdir())


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(niso_shards, "OPEN_FILES", 2)
    create(tmp_path, per_shard=2)
    items = Items(tmp_path, "train")
    assert [items[i]["label"] for i in (*range(11), 0)] == [*range(10), 0, 0] and len(items._open) == 2
