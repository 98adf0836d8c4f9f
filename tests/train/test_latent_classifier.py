"""Classifiers of functasets: the seed's numbers, a run from end to end, going on after anything, and pixels instead."""

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fourdperf.cli.main import main
from fourdperf.data.functaset import PixelMaps, Recipe, create_functaset, open_functaset
from fourdperf.data.images import open_images
from fourdperf.models.functa import Config as FunctaConfig
from fourdperf.models.functa import Functa
from fourdperf.models.latent_classifier import Config, LatentClassifier
from tests.models.latent_classifier_cases import TRAJECTORY, Case, in_flax

pytest.importorskip("lightning")
pytest.importorskip("h5py")
pytest.importorskip("sklearn")

from lightning import Callback, Trainer  # noqa: E402

from fourdperf.train import latent_classifier  # noqa: E402
from fourdperf.train.latent_classifier import (  # noqa: E402
    ClassifierTraining,
    Passes,
    load_classifier,
    score,
)

MODEL = ("--model.kind=mlp", "--model.hidden_size=16", "--model.num_layers=2")
TINY = (*MODEL, "--batch_size=32", "--accelerator=cpu", "--lr=3e-3", "--log_every=1", "--val_every=4", "--save_every=3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    """A functaset of digits by a functa of random weights, which already tells much of an image."""
    folder = tmp_path_factory.mktemp("signals")
    torch.manual_seed(0)
    model = Functa(FunctaConfig(16, 3, channels=1, image_size=8, latent_size=2, latent_channels=8, inner_rate=1.0))
    images = {split: open_images("digits", split) for split in ("train", "val", "test")}
    create_functaset(model, images, folder, Recipe("digits", augmentations=2, images=400), batch_size=256)
    return folder


def train(functaset, out, *options) -> int:
    arguments = (f"--functaset={functaset}", f"--out={out}", *options)
    return main(["train", "functa_classifier", *TINY, *map(str, arguments)])


def curve(out, name="train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "signals_per_second"} for row in csv.DictReader(file)]


def same_weights(a, b) -> bool:
    a, b = (load_classifier(out).state_dict() for out in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(signals, tmp_path_factory):
    """A run of eight steps that nothing interrupted, two batches each."""
    out = tmp_path_factory.mktemp("plain")
    assert train(signals, out, "--max_steps=8", "--accumulate_grad_batches=2") == 0
    return out


# The seed's numbers


def fit(module, batch, steps) -> list[dict[str, float]]:
    """Trains on one batch; what was logged in each step."""
    logged = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.train(), torch.utils.data.DataLoader([batch] * steps, batch_size=None))
    return logged


def test_three_steps_of_the_seed():
    """AdamW with smoothed labels, the gradient divided by the batch size, and the average of the parameters."""
    case = Case(TRAJECTORY)
    settings, lr = case.config["train"], case.config["lr"]
    options = {"lr": lr, "final_lr": lr, "weight_decay": settings["weight_decay"], "divide_gradient": True}
    options |= {"smoothing": settings["label_smoothing_factor"], "ema": settings["exp_mov_avg_beta"]}
    module = ClassifierTraining(case.model(), 100, ema_warmup=False, **options)
    logged = fit(module, (case.input("x"), case.input("labels").long()), case.config["steps"])
    case.check("out/loss", np.array([row["train/loss"] for row in logged], np.float32))
    for name, network in (("final", module.network), ("ema", module.model)):
        for key, x in in_flax(network.config, network.state_dict()).items():
            case.check(f"out/{name}/{key}", x)


def test_divided_gradients_are_smaller_by_the_batch_size():
    case = Case(TRAJECTORY)
    batch = case.input("x"), case.input("labels").long()
    norms = [
        fit(ClassifierTraining(case.model(), 9, divide_gradient=divide), batch, 1)[0]["train/grad_norm"]
        for divide in (False, True)
    ]
    assert norms[0] == pytest.approx(6 * norms[1], rel=1e-5)


@pytest.mark.parametrize(("warm_up", "shares"), [(True, [0.1, 2 / 11]), (False, [0.5, 0.5])])
def test_average_of_the_parameters(warm_up, shares):
    """With a warm-up, little is left of the initial ones."""
    batch = torch.randn(8, 2, 2, 5), torch.randint(0, 3, (8,))
    seen = []

    class Seen(ClassifierTraining):
        def on_before_optimizer_step(self, optimizer):
            seen.append(self.network.head.weight.detach().clone())

    module = Seen(LatentClassifier(Config("mlp", 2, 5, 3, 8, 1)), 9, lr=0.1, ema=0.5, ema_warmup=warm_up)
    fit(module, batch, 2)
    average, *moved = *seen, module.network.head.weight.detach()
    for share, weight in zip(shares, moved, strict=True):
        average = share * average + (1 - share) * weight
    torch.testing.assert_close(module.model.head.weight.detach(), average)


# Runs


def test_what_a_run_leaves_behind(signals, tmp_path, capsys):
    assert train(signals, tmp_path, "--max_steps=60", "--val_every=20", "--lr=1e-2") == 0
    assert "60 steps done; right on " in capsys.readouterr().out
    rows = curve(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert float(rows[-1]["lr"]) == pytest.approx(1e-5) and float(rows[5]["lr"]) == pytest.approx(1e-2)  # peak at 6
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["on"] == "latents" and results["train_signals"] == 800 and results["test_accuracy"] > 0.3
    val = curve(tmp_path, "val")
    assert [row["step"] for row in val] == ["20", "40", "60"]
    assert float(val[-1]["accuracy"]) == pytest.approx(results["val_accuracy"])
    model = load_classifier(tmp_path)
    train_set = open_functaset(signals, "train")
    assert torch.equal(model.mean, train_set.mean) and torch.equal(model.std, train_set.std)
    assert score(model, open_functaset(signals, "test")) == results["test_accuracy"]
    assert json.loads((tmp_path / "options.json").read_text())["batch_size"] == 32


@pytest.mark.parametrize("kind", ["transformer", "resnet"])
def test_every_kind_on_pixels(signals, tmp_path, kind):
    options = (f"--model.kind={kind}", "--model.num_heads=2", "--model.dropout=0.1", "--max_steps=4", "--on=pixels")
    assert train(signals, tmp_path, *options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["on"] == "pixels" and results["kind"] == kind
    model = load_classifier(tmp_path)
    assert model.model.config.latent_channels == 16 and model.model.config.latent_size == 2
    maps = PixelMaps(open_functaset(signals, "val"), open_images("digits", "val"), "val")
    assert score(model, maps) == results["val_accuracy"]
    train_maps = PixelMaps(open_functaset(signals, "train"), open_images("digits", "train"), "train")
    assert torch.equal(model.mean, train_maps.mean)


def test_a_factor_in_place_of_means_and_deviations(signals, tmp_path):
    assert train(signals, tmp_path / "own", "--normalisation=factor", "--max_steps=1") == 0
    latents = open_functaset(signals, "train")[:][0]
    model = load_classifier(tmp_path / "own")
    assert model.model.config.normalizing_factor == pytest.approx(float(latents.std(correction=0)), rel=1e-3)
    assert not model.mean.any() and (model.std == 1).all()
    options = ("--normalisation=factor", "--model.normalizing_factor=0.08", "--max_steps=1")
    assert train(signals, tmp_path / "seed", *options) == 0
    assert load_classifier(tmp_path / "seed").model.config.normalizing_factor == 0.08


# Going on


def train_and_die(step, *arguments):
    """kill -9 before the optimiser's step."""
    torch.set_num_threads(1)
    before = ClassifierTraining.configure_gradient_clipping

    def die(self, *arguments, **options):
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, *arguments, **options)

    ClassifierTraining.configure_gradient_clipping = die
    sys.exit(train(*arguments))


def test_killed_run_goes_on_as_if_nothing_had_happened(signals, plain, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightning", "fourdperf.train.latent_classifier"])
    options = ("--max_steps=8", "--accumulate_grad_batches=2")
    process = context.Process(target=train_and_die, args=(5, signals, tmp_path, *options))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert [row["step"] for row in curve(tmp_path)] == ["1", "2", "3", "4", "5"]
    assert train(signals, tmp_path, *options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert curve(tmp_path) == curve(plain) and same_weights(tmp_path, plain)


@pytest.mark.parametrize("option", ["--workers=2", "--in_memory=false"])
def test_how_signals_are_read_changes_nothing(signals, plain, tmp_path, option):
    assert train(signals, tmp_path, "--max_steps=8", "--accumulate_grad_batches=2", option) == 0
    assert curve(tmp_path) == curve(plain) and same_weights(tmp_path, plain)


@pytest.mark.heavy
def test_two_processes_equal_one(signals, plain, tmp_path):
    command = [sys.executable, "-m", "fourdperf", "train", "functa_classifier", *TINY, f"--functaset={signals}"]
    command += [f"--out={tmp_path}", "--max_steps=8", "--devices=2", "--strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    norms = [[float(row["grad_norm"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    ours, theirs = (load_classifier(out).state_dict() for out in (tmp_path, plain))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, numbers):
        return list(numbers)


def test_passes_visit_everything_once_each_in_an_order_of_its_own():
    passes = Passes(Numbers(10), seed=3)
    first, second = passes[range(10)], passes[range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert passes[[8, 9, 10, 11]] == first[8:] + second[:2]
    assert Passes(Numbers(10), seed=4)[range(10)] != first and Passes(Numbers(10), seed=3)[range(10)] == first


# Refusing


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert train(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf train: error: ")
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size=0"], "--batch_size: wanted at least 1, got 0"),
        (["--lr=0"], "--lr: wanted a positive number, got 0"),
        (["--ema=1"], "--ema: wanted a number in [0, 1), got 1"),
        (["--label_smoothing=-0.1"], "--label_smoothing: wanted a number in [0, 1), got -0.1"),
        (["--model.latent_size=3"], "--model.latent_size: wanted 2, as the latents have it, got 3"),
        (["--model.width=3"], "width: no such option"),
        (["--model.kind=forest"], "kind: expected one of mlp, transformer, resnet, got 'forest'"),
        (["--ckpt=/nowhere/last.ckpt"], "--ckpt: no such file"),
        (["--functaset=/nowhere"], "no functaset in /nowhere; fourdperf functaset create makes one"),
        (["--on=pixels", "--functaset=/nowhere"], "no functaset in /nowhere"),
    ],
)
def test_bad_options(signals, options, message, tmp_path, capsys):
    assert message in fails(capsys, signals, tmp_path / "run", "--max_steps=1", *options)
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model(signals, plain, tmp_path, capsys):
    ckpt = f"--ckpt={plain / 'last.ckpt'}"
    error = fails(capsys, signals, tmp_path / "run", "--max_steps=9", ckpt, "--model.hidden_size=8")
    assert "its model has hidden_size 16" in error


def test_latents_that_are_not_numbers_stop_the_run(signals, tmp_path, capsys, monkeypatch):
    before = latent_classifier.Passes.__getitem__

    def broken(self, numbers):
        latents, labels = before(self, numbers)
        return latents * math.nan, labels

    monkeypatch.setattr(latent_classifier.Passes, "__getitem__", broken)
    assert "step 0: the gradient's norm is nan" in fails(capsys, signals, tmp_path, "--max_steps=2")


def test_damaged_statistics(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="no normalisation.json"):
        load_classifier(tmp_path)
    for text, message in (("{}", "wanted mean and std"), ('{"mean": [1], "std": [1]}', "wanted 8 numbers each, got 1")):
        (tmp_path / "normalisation.json").write_text(text)
        if not (tmp_path / "model").exists():
            (tmp_path / "model").symlink_to(plain / "model")
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)
