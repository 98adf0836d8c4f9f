"""`fourdperf niso_data`: what the commands write, that they go on and share the work, how they refuse."""

import json

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.data.niso_shards import Items, Sequences
from tests.data.test_niso_readers import make_co3d, make_shrec, write_mat73

pytest.importorskip("h5py")


def run(*arguments) -> int:
    return main(["niso_data", *map(str, arguments)])


SHAPES = ("shapes", "--count", 20, "--val_count", 5, "--test_count", 10, "--height", 9, "--width", 16, "--per_shard", 8)


def test_digits(tmp_path, capsys):
    assert run("homnist", "--out", tmp_path, "--size", 20, "--digit", 14, "--per_shard", 1000) == 0
    train, test = (Items(tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1439, 179) and train[0]["x"].shape == (20, 20, 1)
    assert (tmp_path / "overview.png").is_file() and "1,439 train, 179 val, 179 test" in capsys.readouterr().out
    known = json.loads((tmp_path / "niso.json").read_bytes())
    assert known["options"] == {"dataset": "digits", "size": 20, "digit": 14, "spread": 0.5, "seed": 0, "mat": False}


def test_homnist_file(tmp_path):
    pytest.importorskip("scipy")
    pixels = torch.randint(256, (12, 20, 20), dtype=torch.uint8).numpy()
    write_mat73(tmp_path / "homNIST_test.mat", {"images": pixels, "labels": torch.arange(12).numpy() % 10})
    assert run("homnist", "--out", tmp_path / "a", "--mat", tmp_path, "--size", 20, "--digit", 14) == 0
    test = Items(tmp_path / "a", "test")
    assert len(test) == 12 and torch.equal(test[7]["x"][..., 0] * 255, torch.from_numpy(pixels[7]).float())
    assert run("homnist", "--out", tmp_path / "b", "--mat", tmp_path) == 2


def test_shapes_go_on_and_refuse_other_options(tmp_path, capsys):
    assert run(*SHAPES, "--out", tmp_path) == 0
    assert "wrote 6 shards" in capsys.readouterr().out
    before = Items(tmp_path, "train")[9]
    (tmp_path / "train-00001.h5").unlink()
    assert run(*SHAPES, "--out", tmp_path) == 0
    assert "wrote 1 shards" in capsys.readouterr().out
    after = Items(tmp_path, "train")[9]
    assert torch.equal(before["x"], after["x"]) and after["label"] == 9
    assert run(*SHAPES, "--out", tmp_path, "--seed", 1) == 2
    assert "its shards were begun with seed 0" in capsys.readouterr().err


def test_processes_share_the_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(*SHAPES, "--out", tmp_path) == 0
    assert "wrote 4 shards" in capsys.readouterr().out and not (tmp_path / "train-00001.h5").exists()
    monkeypatch.setenv("RANK", "1")
    assert run(*SHAPES, "--out", tmp_path) == 0
    assert capsys.readouterr().out == "" and len(Items(tmp_path, "train")) == 20


def test_sequences(tmp_path):
    counts = ("--count", 3, "--val_count", 1, "--test_count", 1)
    assert run("sequences", "--out", tmp_path, *counts, "--frames", 4, "--height", 12, "--width", 12) == 0
    found = Sequences(tmp_path, "train")
    assert len(found) == 3 and found.read(2, [1, 3])["video"].shape == (2, 12, 12, 3)


def test_shrec_and_co3d(tmp_path, capsys):
    pytest.importorskip("scipy")
    make_shrec(tmp_path / "shrec", shapes=3)
    size = ("--height", 9, "--width", 18)
    options = ("--data_path", tmp_path / "shrec", "--times", 3, "--train_per_class", 2)
    assert run("shrec", *options, *size, "--out", tmp_path / "a") == 0
    assert Items(tmp_path / "a", "train")[3]["x"].shape == (2, 9, 18, 3) and len(Items(tmp_path / "a", "test")) == 2
    make_co3d(tmp_path / "co3d", sequences=6)
    options = ("--data_path", tmp_path / "co3d", "--min_frames", 4, "--set_list", "some")
    assert run("co3d", *options, *size, "--out", tmp_path / "b") == 0
    assert len(Sequences(tmp_path / "b", "train")) == 10 and len(Sequences(tmp_path / "b", "test")) == 2
    capsys.readouterr()
    assert run("co3d", "--data_path", tmp_path / "none", "--out", tmp_path / "c") == 2
    error = capsys.readouterr().err
    assert "co3d: no CATEGORY/frame_annotations.jgz" in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["homnist", "shrec", "co3d", "sequences", "shapes"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as error:
        run(name, "--help")
    assert error.value.code == 0 and "The folder for the shards" in " ".join(capsys.readouterr().out.split())
