"""Shards of pictures: what is read from them is what was there, a kill costs a shard, and nothing else is touched."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.data.image_sets import open_image_set
from fourdperf.data.image_shards import open_splits, write_image_shards
from fourdperf.data.images import crop
from tests.data.test_image_sets import SPLITS, make, numbers_of, picture, png, write_files


def run(*arguments) -> int:
    return main(["image_shards", *map(str, arguments)])


def pixels(dataset) -> list[bytes]:
    return sorted((255 * dataset[i][0]).round().byte().numpy().tobytes() for i in range(len(dataset)))


@pytest.mark.parametrize("kind", ["folder", "list", "shards", "hdf5"])
def test_the_pictures_of_every_source(tmp_path, kind, capsys):
    source, out = make(kind, tmp_path), tmp_path / "out"
    assert run(source, "--out", out, "--per_shard", 7) == 0
    assert "16 train, 2 val, 2 test images; wrote 5 shards" in capsys.readouterr().out
    names = ["train-000000", "train-000001", "train-000002", "val-000000", "test-000000"]
    assert {path.name for path in out.iterdir()} == {"image_shards.json", "overview.png", *(f"{x}.tar" for x in names)}
    for split in SPLITS:
        ours, theirs = (open_image_set(x, split, (8, 8)) for x in (out, source))
        assert pixels(ours) == pixels(theirs) and ours.classes == ()
    order = numbers_of(open_image_set(out, "train", (8, 8)))
    assert order != sorted(order)
    with tarfile.open(out / "train-000001.tar") as tar:
        assert tar.getnames() == [f"{number:09d}.png" for number in range(7, 14)]
        if kind == "folder":
            assert tar.extractfile("000000007.png").read() == png(picture(order[7]))


def test_labels_and_splits_of_a_folder(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for name in ("day", "night"):
            write_files(tmp_path / "data" / split / name, range(count))
    assert run(tmp_path / "data", "--out", tmp_path / "out") == 0
    for split in ("train", "val"):
        ours, theirs = (open_image_set(tmp_path / x, split, (8, 8)) for x in ("out", "data"))
        pairs = [
            sorted((x.numpy().tobytes(), y) for x, y in (found[i] for i in range(len(found))))
            for found in (ours, theirs)
        ]
        assert pairs[0] == pairs[1] and ours.classes == ("day", "night")
    assert not list((tmp_path / "out").glob("test-*"))
    described = tmp_path / "out" / "image_shards.json"
    assert json.loads(described.read_text())["classes"] == ["day", "night"]
    described.write_text('{"classes": ["day"]}')  # of other shards
    assert open_image_set(tmp_path / "out", "val", (8, 8)).classes == ("0", "1")
    described.write_text("[]")
    with pytest.raises(ValueError, match="image_shards.json: corrupt: no classes"):
        open_image_set(tmp_path / "out", "val", (8, 8))


def test_smaller_pictures(tmp_path):
    """The shorter side gets the size, and small pictures stay."""
    folder = tmp_path / "data" / "train"
    write_files(folder, range(1, 3), height=8, width=8)
    large = cv2.resize(picture(9, 3, 5), (100, 60), interpolation=cv2.INTER_CUBIC)
    (folder / "000.png").write_bytes(png(large))
    write_files(tmp_path / "data" / "val", [0])
    assert run(tmp_path / "data", "--out", tmp_path / "out", "--image_size", 24) == 0
    found = open_image_set(tmp_path / "out", "train", (24, 40))
    shapes = {found.pictures[i].shape: i for i in range(3)}
    assert shapes.keys() == {(24, 40, 3), (8, 8, 3)}
    wanted = torch.from_numpy(crop(large, (24, 40))).float() / 255
    assert (found[shapes[24, 40, 3]][0] - wanted).abs().mean() < 0.02  # a JPEG
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert sorted(name.rpartition(".")[2] for name in tar.getnames()) == ["jpg", "png", "png"]


def test_going_on_and_sharing_the_work(tmp_path, monkeypatch, capsys):
    source = make("folder", tmp_path)
    assert run(source, "--out", tmp_path / "whole", "--per_shard", 4) == 0
    capsys.readouterr()
    for rank in range(2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        assert run(source, "--out", tmp_path / "out", "--per_shard", 4) == 0
    assert "process 0 of 2 wrote 4 shards" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "out" / "train-000001.tar").unlink()
    (tmp_path / "out" / ".train-000001.7.tmp.tar").write_bytes(b"cut off")
    before = os.stat(tmp_path / "out" / "train-000000.tar").st_mtime_ns
    assert run(source, "--out", tmp_path / "out", "--per_shard", 4) == 0
    assert "wrote 1 shards" in capsys.readouterr().out
    assert os.stat(tmp_path / "out" / "train-000000.tar").st_mtime_ns == before
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")]
    assert files[0] == files[1]


def test_processes_that_begin_at_once(tmp_path):
    """Each may find what another has only begun to write."""
    source = make("folder", tmp_path)
    command = [
        sys.executable,
        "-m",
        "fourdperf",
        "image_shards",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--per_shard",
        "4",
    ]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3"}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    assert [(process.communicate()[1], process.returncode)[1] for process in ranks] == [0, 0, 0]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 6


def test_a_folder_that_another_process_has_begun(tmp_path, monkeypatch):
    """The description appears after the folder was listed, beside its own temporary file and a first shard."""
    out, sets = tmp_path / "out", open_splits(make("folder", tmp_path))
    write_image_shards(tmp_path / "done", sets, per_shard=4)
    out.mkdir()
    (out / ".image_shards.77.tmp.json").write_text("{")
    listed = list(out.iterdir())
    for path in (tmp_path / "done").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))
    assert write_image_shards(out, sets, per_shard=4) == (0, 0)
    (out / "image_shards.json").unlink()
    write_image_shards(out, sets, per_shard=4)
    assert (out / "image_shards.json").read_bytes() == (tmp_path / "done" / "image_shards.json").read_bytes()


def test_suffixes_that_readers_do_not_know(tmp_path):
    for number in range(20):
        assert cv2.imwrite(str(tmp_path / f"{number}.ppm"), picture(number)[..., ::-1])
    source = tmp_path / "all.txt"
    source.write_text("".join(f"{number}.ppm\n" for number in range(20)))
    assert run(source, "--out", tmp_path / "out") == 0
    ours, theirs = (open_image_set(x, "train", (8, 8)) for x in (tmp_path / "out", source))
    assert len(ours) == 16 and pixels(ours) == pixels(theirs)


def test_a_split_with_bad_pictures_alone(tmp_path, capsys):
    write_files(tmp_path / "data" / "train", range(3))
    (tmp_path / "data" / "val").mkdir()
    (tmp_path / "data" / "val" / "000.png").write_bytes(b"none")
    assert run(tmp_path / "data", "--out", tmp_path / "out", "--skip_bad", "true") == 0
    assert "1 bad ones left out" in capsys.readouterr().out and (tmp_path / "out" / "overview.png").exists()


def test_another_hdf5_file_is_another_set(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (make("hdf5", tmp_path / name) for name in ("a", "b"))
    assert run(first, "--out", tmp_path / "out") == 0
    assert run(second, "--out", tmp_path / "out") == 2
    assert "its shards were begun with pictures" in capsys.readouterr().err


def test_bad_pictures(tmp_path, capsys):
    source = make("folder", tmp_path)
    (tmp_path / "images" / "003.png").write_bytes(png(picture(3, 32, 32))[:400])
    out = tmp_path / "out"
    assert run(source, "--out", out, "--per_shard", 4) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf image_shards: error: ") and "003.png: the image is cut off after 400" in error
    assert not list(out.glob(".*")) and all(tarfile.open(path).getnames() for path in out.glob("*.tar"))
    assert run(source, "--out", out, "--per_shard", 4, "--skip_bad", "true") == 2
    assert "its shards were begun with skip_bad False" in capsys.readouterr().err
    assert run(source, "--out", tmp_path / "other", "--per_shard", 4, "--skip_bad", "true") == 0
    told = capsys.readouterr()
    assert "1 bad ones left out" in told.out and "003.png: the image is cut off" in told.err
    found = sum((numbers_of(open_image_set(tmp_path / "other", split, (8, 8))) for split in SPLITS), [])
    assert sorted(found) == [n for n in range(20) if n != 3]


def test_other_pictures_and_other_files(tmp_path, capsys):
    source, out = make("folder", tmp_path), tmp_path / "out"
    assert run(source, "--out", out) == 0
    write_files(tmp_path / "images", [77])
    assert run(source, "--out", out) == 2
    assert "its shards were begun with items {'train': 16" in capsys.readouterr().err
    assert run(source, "--out", tmp_path / "images") == 2
    assert "wanted a new or empty folder, or one with image_shards.json" in capsys.readouterr().err
    assert not (tmp_path / "images" / "image_shards.json").exists()
    (out / "image_shards.json").write_text("{")
    assert run(source, "--out", out) == 2
    assert "image_shards.json: corrupt" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", "--out", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
    assert run(source, "--out", tmp_path / "new", "--per_shard", 0) == 2
    assert "per_shard: wanted at least 1, got 0" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_webdataset_reads_them(tmp_path):
    wds = pytest.importorskip("webdataset")
    for name in ("day", "night"):
        write_files(tmp_path / "data" / name, range(8))
    assert run(tmp_path / "data", "--out", tmp_path / "out") == 0
    samples = list(wds.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert len(samples) == 14 and all(sample["png"].shape == (8, 8, 3) for sample in samples)
    assert {sample["cls"] for sample in samples} == {0, 1} and np.any(samples[0]["png"] != samples[1]["png"])
