"""`fourdperf fit functa` from end to end: it learns, goes on after anything, two processes equal one, NaN stops it."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.data import images
from fourdperf.models.functa import Functa, fit, psnr
from fourdperf.train.checkpoint import read_run

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"hidden_size": 16, "num_layers": 3, "latent_size": 2, "latent_channels": 2, "inner_steps": 2}
MODEL = [f"--model.{name}={value}" for name, value in SMALL.items()]
TINY = [*MODEL, "--accelerator=cpu", "--batch_size=2", "--log_every=1", "--val_every=100", "--val_images=4"]
EIGHT = ("--max_steps=8", "--accumulate_grad_batches=2")


def run(*options) -> int:
    return main(["fit", "functa", *TINY, *map(str, options)])


def curve(out, name: str = "train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def weights(out) -> dict[str, torch.Tensor]:
    return Functa.from_pretrained(out / "model").state_dict()


def same(a, b) -> bool:
    equal = [torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)]
    return curve(a) == curve(b) and all(equal)


def close(a, b) -> bool:
    """To the rounding of sums in another order, which Adam divides by where a gradient is next to nothing."""
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a) < 2e-5


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of eight steps that nothing interrupted, two batches each."""
    out = tmp_path_factory.mktemp("plain")
    assert run(*EIGHT, "--save_every=3", f"--out={out}") == 0
    return out


def test_it_learns(tmp_path):
    options = ("--batch_size=8", "--max_steps=40", "--lr=3e-3", "--val_images=32")
    assert run(*options, f"--out={tmp_path}") == 0
    losses = [float(row["loss"]) for row in curve(tmp_path)]
    assert len(losses) == 40 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
    model = Functa.from_pretrained(tmp_path / "model")
    val = images.open_images("digits", "val")
    target = torch.stack([val[i][0] for i in range(32)]).flatten(1, 2)
    (row,) = curve(tmp_path, "val")
    assert float(row["psnr"]) == pytest.approx(psnr(fit(model, target).recon, target).mean().item(), abs=1e-3)


@pytest.mark.parametrize("option", ["--order=1", "--chunk=1", "--model.rates=none"])
def test_ways_to_the_same_end(plain, tmp_path, option):
    assert run(*EIGHT, option, f"--out={tmp_path}") == 0
    losses = [[float(row["loss"]) for row in curve(out)] for out in (tmp_path, plain)]
    if option == "--chunk=1":
        assert close(tmp_path, plain)
    else:
        assert losses[0] != pytest.approx(losses[1], rel=1e-3) and all(0 < loss < 1 for loss in losses[0])


def test_learned_rates_move(tmp_path):
    """By Adam's steps of rates_lr lr, times the multiplier."""
    assert run("--max_steps=4", "--lr=1e-3", "--final_lr=1e-3", "--rates_lr=20", f"--out={tmp_path}") == 0
    rows = curve(tmp_path)
    assert 0.0015 <= float(rows[0]["rate_min"]) < float(rows[0]["rate_max"]) <= 0.03
    moved = [abs(float(rows[1][name]) - float(rows[0][name])) for name in ("rate_min", "rate_max")]
    assert max(moved) == pytest.approx(0.3 * 20e-3, rel=0.1)


# Going on


def accident(monkeypatch, number: int, happen) -> None:
    """At the `number`-th image that is asked for, `happen` gets it and gives another, or raises."""
    ask, asked = images.ArrayImages.__getitem__, [0]

    def item(self, index):
        asked[0] += 1
        image, label = ask(self, index)
        return (happen(image) if asked[0] == number else image), label

    monkeypatch.setattr(images.ArrayImages, "__getitem__", item)


PICTURED, PER_STEP = 8, 4  # images that the pictures take before the first step; then two batches of two


def test_killed_run_goes_on_as_if_nothing_had_happened(plain, tmp_path, monkeypatch):
    """In the middle of the sixth step; step 3 is on disk."""

    class Killed(BaseException):
        pass

    def kill(_):
        raise Killed

    options = (*EIGHT, "--save_every=3", f"--out={tmp_path}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        accident(patch, PICTURED + 5 * PER_STEP + 3 + 2, kill)  # Lightning fetches a batch ahead
        run(*options)
    assert [row["step"] for row in curve(tmp_path)] == ["1", "2", "3", "4", "5"]
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
    assert run(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_time_limit_and_going_on(plain, tmp_path, capsys):
    options = (*EIGHT, f"--out={tmp_path}")
    assert run(*options, "--minutes=0") == 0
    assert "1 steps done" in capsys.readouterr().out
    assert run(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_workers_change_nothing(plain, tmp_path):
    assert run(*EIGHT, f"--out={tmp_path}", "--workers=1") == 0
    assert same(tmp_path, plain)


def test_accumulated_batches_equal_one(plain, tmp_path):
    assert run("--max_steps=8", "--batch_size=4", f"--out={tmp_path}") == 0
    assert close(tmp_path, plain)


def test_two_processes_equal_one(plain, tmp_path):
    """Gloo on the CPU, with as many threads as this process has; each its share of the validation too."""
    options = ("--max_steps=8", "--strategy=ddp", "--devices=2", f"--out={tmp_path / 'two'}")
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "fourdperf", "fit", "functa", *TINY, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert close(tmp_path / "two", plain)
    norms = [[float(row["grad_norm"]) for row in curve(out)] for out in (tmp_path / "two", plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    more = ("--max_steps=9", "--batch_size=4", f"--ckpt={tmp_path / 'two' / 'last.ckpt'}")
    assert run(*more, f"--out={tmp_path / 'one'}") == 0
    (both,), model = curve(tmp_path / "two", "val"), Functa.from_pretrained(tmp_path / "two" / "model")
    val = images.open_images("digits", "val")
    target = torch.stack([val[i][0] for i in range(4)]).flatten(1, 2)
    assert float(both["psnr"]) == pytest.approx(psnr(fit(model, target).recon, target).mean().item(), abs=1e-3)


def test_bfloat16(plain, tmp_path):
    assert run(*EIGHT, "--precision=bf16-mixed", f"--out={tmp_path}") == 0
    losses = [[float(row["loss"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
    assert {x.dtype for x in weights(tmp_path).values()} == {torch.float32}


# Refusing


def fails(capsys, *options) -> str:
    capsys.readouterr()
    assert run(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf fit: error: ")
    return error


def test_nan_stops_the_run_and_the_last_checkpoint_is_good(plain, tmp_path, capsys, monkeypatch):
    options = (*EIGHT, "--save_every=3", f"--out={tmp_path}")
    with monkeypatch.context() as patch:
        accident(patch, PICTURED + 5 * PER_STEP + 1, lambda image: image * torch.nan)
        assert "step 5: the gradient's norm is nan; nothing was changed" in fails(capsys, *options)
    assert run(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_checkpoints_that_are_none(plain, tmp_path, capsys):
    out = f"--out={tmp_path / 'run'}"
    assert "no such file" in fails(capsys, f"--ckpt={tmp_path / 'no'}", out)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((plain / "last.ckpt").read_bytes()[:2000])
    assert "cut.ckpt: not a complete checkpoint" in fails(capsys, "--max_steps=9", f"--ckpt={cut}", out)
    other = ["--max_steps=9", f"--ckpt={plain / 'last.ckpt'}", "--model.omega_0=20", out]
    assert "its model has omega_0 30.0; give the options" in fails(capsys, *other)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_options_are_kept(plain):
    kept = json.loads((plain / "options.json").read_text())
    assert kept["model"] == SMALL and kept["accumulate_grad_batches"] == 2
