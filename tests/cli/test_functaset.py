"""`fourdperf functaset`: what the commands write, that they go on after a kill and share the work, how they refuse."""

import json
import multiprocessing
import os
import socket
import sys

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.functaset import functaset as commands
from fourdperf.cli.main import main
from fourdperf.data import functaset
from fourdperf.data.functaset import open_functaset
from fourdperf.data.images import open_images
from fourdperf.models.functa import Config, Functa, fit

h5py = pytest.importorskip("h5py")
pytest.importorskip("sklearn")

TINY = Config(8, 3, channels=1, image_size=(8, 8), latent_size=2, latent_channels=4, inner_steps=2, inner_rate=10.0)
SMALL = ("--augmentations", "2", "--images", "6", "--block", "4")


def run(*arguments) -> int:
    return main(["functaset", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run's folder with a functa of random weights, and a functaset of digits made with it."""
    folder = tmp_path_factory.mktemp("functaset")
    torch.manual_seed(0)
    Functa(TINY).save_pretrained(folder / "run" / "model")
    (folder / "run" / "options.json").write_text(json.dumps({"dataset": "digits", "data_path": None}))
    assert run("create", "--functa", folder / "run", "--out", folder / "set", *SMALL) == 0
    return folder


def test_create(files, capsys):
    signals = open_functaset(files / "set", "train")
    assert len(signals) == 12 and signals.recipe.dataset == "digits" and signals.recipe.augment.turn == 10
    images = open_images("digits", "val")
    pixels = torch.stack([images[i][0] for i in range(6)])
    latents, labels = open_functaset(files / "set", "val")[:]
    torch.testing.assert_close(latents, fit(Functa.from_pretrained(files / "run/model"), pixels.flatten(1, 2)).latent)
    assert labels.tolist() == [images[i][1] for i in range(6)]
    assert run("create", "--functa", files / "run", "--out", files / "set", *SMALL) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[3:6]] == [["train", "12"], ["val", "6"], ["test", "6"]]


def test_create_options(files, tmp_path):
    augment = ("--augment.shift", "0.25", "--augment.flip", "true", "--augment.zoom", "1", "--augment.turn", "0")
    model = ("--functa", files / "run" / "model", "--dataset", "digits", "--steps", "1", "--seed", "3")
    assert run("create", *model, "--out", tmp_path, *SMALL, *augment) == 0
    recipe = open_functaset(tmp_path, "train").recipe
    assert (recipe.steps, recipe.seed, recipe.augmentations, recipe.images) == (1, 3, 2, 6)
    assert vars(recipe.augment) == {"shift": 0.25, "zoom": 1, "turn": 0, "flip": True, "border": "zeros"}


def test_folder_of_images(tmp_path):
    dice = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), dice.integers(0, 256, (9, 14, 3), np.uint8))
    torch.manual_seed(0)
    Functa(Config(8, 3, image_size=(8, 12), latent_size=2, latent_channels=3)).save_pretrained(tmp_path / "model")
    where = ("--functa", tmp_path, "--dataset", "folder", "--data_path", tmp_path / "images")
    assert run("create", *where, "--out", tmp_path / "set", "--augmentations", "2") == 0
    signals = open_functaset(tmp_path / "set", "train")
    assert len(signals) == 20 and set(signals.labels) == {0, 1} and signals.recipe.augment.flip
    assert run("render", "--functaset", tmp_path / "set", "--split", "train", "--count", "3", "--scale", "2") == 0
    assert cv2.imread(str(tmp_path / "set" / "render_train.png")).shape[2] == 3


def create_as(rank, port, *arguments):
    """Process `rank` of two, with torchrun's environment."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    sys.exit(run(*arguments))


def test_two_processes(files, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fourdperf.data.functaset", "fourdperf.models.functa", "h5py"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ("create", "--functa", str(files / "run"), "--out", str(tmp_path), *SMALL)
    processes = [context.Process(target=create_as, args=(rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for split in ("train", "val", "test"):
        with h5py.File(tmp_path / f"{split}.h5") as ours, h5py.File(files / "set" / f"{split}.h5") as theirs:
            assert all(np.array_equal(x[()], theirs[name][()]) for name, x in ours.items())


def test_more_processes_than_gpus_share_them(files, tmp_path, monkeypatch, capsys):
    """The third process of a machine with two takes the first one's."""

    def to(model, device):
        raise ValueError(f"wanted on {device}")

    monkeypatch.setattr("fourdperf.cli.functaset.pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Functa, "to", to)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert run("create", "--functa", files / "run", "--out", tmp_path, *SMALL) == 2
    assert "wanted on cuda:0" in capsys.readouterr().err


def test_interrupted_and_going_on(files, tmp_path, monkeypatch):
    before, calls = functaset._fit_signals, []

    def second(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return before(*arguments)

    arguments = ("create", "--functa", files / "run", "--out", tmp_path, *SMALL)
    monkeypatch.setattr(functaset, "_fit_signals", second)
    assert run(*arguments) == 130
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1 + 2
    monkeypatch.undo()
    assert run(*arguments) == 0
    assert torch.equal(open_functaset(tmp_path, "train")[:][0], open_functaset(files / "set", "train")[:][0])


def test_render(files, tmp_path, capsys):
    out = tmp_path / "picture.png"
    arguments = ("--functaset", files / "set", "--split", "train", "--first", "1", "--count", "2", "--scale", "3.5")
    assert run("render", *arguments, "--out", out) == 0
    image = cv2.imread(str(out))
    height = 28 * 5  # enlarged to about 128 pixels
    assert image.shape == (2 * (height + 22) + 4, 4 * height + 3 * 4, 3)
    original = functaset.signal_images(
        open_images("digits", "train"), "train", [1], open_functaset(files / "set", "train").recipe
    )[0][0]
    shown = image[22 : 22 + height, :height]
    wanted = cv2.resize(np.rint(255 * original.numpy()), (height, height), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(shown[..., 0], wanted)
    field = Functa.from_pretrained(files / "set" / "model").render(
        open_functaset(files / "set", "train")[1][0][None], 28
    )
    wanted = np.rint(255 * field[0, ..., 0].clamp(0, 1).detach().numpy())
    wanted = cv2.resize(wanted, (height, height), interpolation=cv2.INTER_NEAREST)
    assert np.abs(image[22 : 22 + height, -height:, 1] - wanted).max() <= 1


def test_interpolate(files, tmp_path):
    out = tmp_path / "strip.png"
    assert run("interpolate", "--functaset", files / "set", "--signals", "[0, 3, 4]", "--steps", "4", "--out", out) == 0
    strip = cv2.imread(str(out))
    assert strip.shape == (4 * (128 + 22) + 3 * 4, 5 * 128 + 4 * 2, 3)
    ends = lambda top: (strip[top : top + 128, :128], strip[top : top + 128, -128:])
    rows = [22 + i * (128 + 22 + 4) for i in range(4)]
    assert all(np.array_equal(*pair) for top in rows[::2] for pair in zip(ends(top), ends(top + 154)))
    assert np.array_equal(ends(rows[0])[1], ends(rows[2])[0])  # the second pair begins where the first one ends
    found, walk = cv2.imreadanimation(str(out.with_suffix(".webp")))
    assert found and len(walk.frames) == 9 + 7
    assert run("interpolate", "--functaset", files / "set") == 0
    assert (files / "set" / "interpolate_test.png").exists()


def test_there_are_three():
    assert set(commands) == {"create", "render", "interpolate"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--functa", "/nowhere"), "no such functa: /nowhere; fourdperf fit functa makes one"),
        (("create", "--functa", "{run}/model"), "--dataset: wanted one of digits, mnist, cifar10, folder"),
        (("create", "--functa", "{run}", "--augmentations", "0"), "augmentations: wanted at least 1, got 0"),
        (("create", "--functa", "{run}", "--augment.spin", "0"), "--augment: wanted shift, zoom, turn, flip, border"),
        (("create", "--functa", "{run}", "--batch_size", "0"), "--batch_size: wanted at least 1"),
        (("create", "--functa", "{run}", "--dataset", "mnist"), "mnist: neither a folder was given nor DATA_PATH"),
        (("create", "--functa", "{run}", "--out", "{set}"), "its functaset was begun with augmentations 2"),
        (("render", "--functaset", "/nowhere"), "no functaset in /nowhere; fourdperf functaset create makes one"),
        (("render", "--functaset", "{set}", "--first", "6"), "--first: wanted a signal from 0 to 5, got 6"),
        (("render", "--functaset", "{set}", "--scale", "0"), "a positive --scale, got 6 and 0.0"),
        (("interpolate", "--functaset", "{set}", "--signals", "[1]"), "--signals: wanted two or more from 0 to 5"),
        (("interpolate", "--functaset", "{set}", "--steps", "0"), "--steps of at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(files, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert run(*(argument.format(run=files / "run", set=files / "set") for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())
