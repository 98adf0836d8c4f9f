"""`fourdperf fit functa`: data sets, YAML, what it writes, what the pictures show, and how it refuses."""

import json
import struct

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.data.chart import line_chart
from fourdperf.models.functa import Config, Functa
from fourdperf.train.functa_pictures import coordinates_picture, latents_picture, reconstructions_picture

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

SMALL = {"hidden_size": 8, "num_layers": 3, "latent_size": 2, "latent_channels": 2, "inner_steps": 1}
TINY = [f"--model.{name}={value}" for name, value in SMALL.items()]
TINY += ["--accelerator=cpu", "--batch_size=2", "--max_steps=1", "--val_images=2", "--log_every=1"]


def fit(*options) -> int:
    return main(["fit", "functa", *TINY, *map(str, options)])


def config(out) -> Config:
    return Functa.from_pretrained(out / "model").config


def test_what_a_run_leaves_behind(tmp_path, capsys):
    out = tmp_path / "run"
    assert fit("--max_steps=3", "--val_every=2", f"--out={out}") == 0
    files = ["coordinates.png", "last.ckpt", "latents.png", "model", "options.json", "pictures", "psnr.png"]
    files += ["reconstructions.png", "tensorboard", "train.csv", "val.csv"]
    if not (out / "tensorboard").exists():
        pytest.importorskip("tensorboard", reason="no TensorBoard logs without tensorboard")
    assert sorted(path.name for path in out.iterdir()) == files
    numbers = ("000002", "000003")
    wanted = [f"{name}_{number}.png" for name in ("latents", "reconstructions") for number in numbers]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == wanted
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("functa, 0 k parameters, latents 2 x 2 x 2; 1439 images of digits; 3 steps; results in")
    at = next(i for i, line in enumerate(lines) if line.endswith(f"wrote {out}:"))
    assert " dB on 2 images held out" in lines[at]
    assert [line.strip().rstrip("/") for line in lines[at + 1 :]] == files
    assert "litlogger" not in shown.err
    assert config(out) == Config(**SMALL, channels=1, image_size=8, rates="full", rate_multiplier=0.3)


def test_tensorboard_has_curves_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert fit(f"--out={tmp_path}") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/psnr", "train/grad_norm", "val/psnr"} <= set(events.Tags()["scalars"])
    assert sorted(events.Tags()["images"]) == ["val/latents", "val/reconstructions"]


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"batch_size: 3\nout: {tmp_path / 'run'}\nmodel:\n  omega_0: 15\n  interpolation: linear\n")
    options = [option for option in TINY if not option.startswith("--batch_size")]
    assert main(["fit", "functa", f"--config={file}", *options, "--inner_steps=2"]) == 0
    found = config(tmp_path / "run")
    assert (found.omega_0, found.interpolation, found.inner_steps) == (15.0, "linear", 2)
    assert json.loads((tmp_path / "run" / "options.json").read_text())["batch_size"] == 3


def test_the_papers_model_is_the_default_for_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 1 + 3072), np.uint8)
    images[:, 0] = 7
    for n in range(1, 6):
        (folder / f"data_batch_{n}.bin").write_bytes(images.tobytes())
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    small = ["--model.hidden_size=4", "--model.num_layers=2", "--model.inner_steps=1"]
    options = ["--accelerator=cpu", "--batch_size=1", "--max_steps=1", "--val_images=1"]
    assert main(["fit", "functa", "--dataset=cifar10", *small, *options, f"--out={tmp_path / 'run'}"]) == 0
    found = config(tmp_path / "run")
    assert (found.latent_size, found.latent_channels, found.channels) == (8, 64, 3) and found.image_size == (32, 32)


def test_mnist(tmp_path):
    for name, array in (
        ("train-images-idx3", np.zeros((10, 28, 28), np.uint8)),
        ("train-labels-idx1", np.zeros(10, np.uint8)),
    ):
        head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"{name}-ubyte").write_bytes(head + array.tobytes())
    assert fit("--dataset=mnist", f"--data_path={tmp_path}", f"--out={tmp_path / 'run'}") == 0
    assert config(tmp_path / "run").image_size == (28, 28)


def test_a_folder_of_images(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(10):
        cv2.imwrite(str(data / f"{i}.png"), np.full((9, 12, 3), 20 * i, np.uint8))
    options = ("--dataset=folder", f"--data_path={data}", "--model.image_size=[4,6]", "--model.channels=1")
    assert fit(*options, f"--out={tmp_path / 'run'}") == 0
    found = config(tmp_path / "run")
    assert found.image_size == (4, 6) and found.channels == 1


# Pictures


def test_reconstructions_show_where_the_error_is():
    images = torch.full((2, 8, 8, 1), 0.5)
    recon = images.clone()
    recon[1, 2, 3] = 1.0
    picture = reconstructions_picture(images, recon)
    first, second = picture[-128:, :128], picture[-128:, 132:]
    assert first.max() == 0 and second[40, 56].tolist() == [255] * 3 and second[8, 8].max() == 0


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_coordinates_are_what_the_network_sees(interpolation):
    model = Functa(Config(**SMALL, channels=1, image_size=8, interpolation=interpolation))
    picture = coordinates_picture(model)
    panels = 2 if interpolation == "nearest" else 3
    assert picture.shape == (150 if panels == 2 else 304, 128 * panels + 4 * (panels - 1), 3)
    x, y = picture[30, 8:128:16], picture[30:150:16, 8]  # the first panel: x, or its lowest bit
    period = 4 if interpolation == "nearest" else 2
    assert np.array_equal(x[:period], x[period : 2 * period]) and len(np.unique(x[:period], axis=0)) == period
    assert len(np.unique(y, axis=0)) == 1


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_latents_are_shown_where_they_are(interpolation):
    model = Functa(Config(**SMALL, channels=1, image_size=8, interpolation=interpolation))
    latent = torch.zeros(2, 2, 2, 2)
    latent[0, 0, 1, 1] = 1.0  # the upper right cell of the first image
    picture = latents_picture(model, latent, torch.zeros(2, 8, 8, 1))
    cells, pixels, channel = (picture[22:150, 132 * i : 132 * i + 128] for i in (1, 2, 3))
    odd, rest = cells[10, 118], cells[118, 118]
    assert np.abs(odd.astype(int) - rest).max() > 50 and np.array_equal(cells[10, 10], rest)
    level = 255 if interpolation == "nearest" else round(255 * (15 / 16) ** 2)  # half a pixel from either border
    colour = cv2.applyColorMap(np.array([[level]], np.uint8), cv2.COLORMAP_VIRIDIS)[0, 0, ::-1]
    assert channel[10, 118].tolist() == colour.tolist()
    assert interpolation == "linear" or channel[118, 10].tolist() == [68, 1, 84]
    smooth = len(np.unique(channel[8::16, 120], axis=0))  # down the right border, a pixel at a time
    assert smooth == (2 if interpolation == "nearest" else 8)


def test_charts():
    picture = line_chart({"a": ([0, 1, 2], [1.0, 2.0, 3.0]), "b": ([0, 2], [3.0, np.nan])}, title="t")
    assert picture.shape == (420, 680, 3)
    blue = np.argwhere((picture == (31, 119, 180)).all(-1))
    (top, right), (bottom, left) = blue[0], blue[-1]
    assert top < bottom and left < right  # rises
    assert line_chart({"a": ([1], [5.0])}).shape == picture.shape
    with pytest.raises(ValueError, match="a: wanted as many x as y, got 1 and 2"):
        line_chart({"a": ([0], [1, 2])})
    with pytest.raises(ValueError, match="at least one finite point"):
        line_chart({"a": ([0], [np.nan])})


# Refusing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=0"], "--batch_size: wanted at least 1, got 0"),
        (["--chunk=0"], "--chunk: wanted at least 1, got 0"),
        (["--lr=0"], "--lr: wanted a positive number, got 0.0"),
        (["--order=3"], "order"),
        (["--dataset=imagenet"], "dataset"),
        (["--model.width=3"], "width: no such option"),
        (["--model.interpolation=cubic"], "interpolation: expected one of nearest, linear, got 'cubic'"),
        (["--model.image_size=9"], "--model.image_size: wanted (8, 8), as digits has it, got 9"),
        (["--model.channels=3"], "--model.channels: wanted 1, as digits has it, got 3"),
        (["--dataset=mnist", "--data_path=/nowhere"], "mnist: no train-images-idx3-ubyte"),
        (["--dataset=cifar10"], "DATA_PATH is set; get https://www.cs.toronto.edu"),
        (["--dataset=folder", "--data_path=/nowhere"], "there is none: /nowhere"),
        (["--ckpt=/nowhere"], "--ckpt: no such file: /nowhere"),
        (["--precision=8-bit"], "precision"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert fit(*options, f"--out={tmp_path / 'run'}") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("fourdperf fit: error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["fit", "functa", "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and "--inner_steps" in shown and "--model.latent_size=8" in shown
