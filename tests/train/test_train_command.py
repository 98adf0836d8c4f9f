"""`fourdperf train d4rt` from end to end: what it writes, how it goes on after anything, and how it refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.models.d4rt import D4RT
from fourdperf.models.scaling4d import Config as Config4DS
from fourdperf.models.scaling4d import Scaling4D
from fourdperf.train.checkpoint import load_d4rt
from tests.train import own_clips

pytest.importorskip("lightning")

MODEL = {"hidden_size": 24, "num_heads": 3, "num_layers": 2, "decoder_layers": 1, "patch_size": [2, 8, 8]}
SIZES = ["--img_size=16", "--num_frames=4", "--num_queries=32", f"--model={json.dumps(MODEL)}", "--accelerator=cpu"]
TINY = [*SIZES, "--batch_size=2", "--workers=0", "--log_every=1", "--val_clips=2", "--val_every=100", "--lr=3e-3"]
OWN = f"--train_data_path={own_clips.__name__}:Clips"


def train(*options) -> int:
    return main(["train", "d4rt", *TINY, *map(str, options)])


def start(*options, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, with as many threads as this one has."""
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "fourdperf", "train", "d4rt", *TINY, *map(str, options)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=900)


def curve(out) -> list[dict[str, str]]:
    with open(out / "train.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in csv.DictReader(file)]


def weights(out) -> dict[str, torch.Tensor]:
    return D4RT.from_pretrained(out / "model").state_dict()


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of eight steps that nothing interrupted, two batches each."""
    out = tmp_path_factory.mktemp("plain")
    assert train(OWN, "--max_steps=8", "--accumulate_grad_batches=2", "--save_every=3", f"--out={out}") == 0
    return out


def test_what_a_run_leaves_behind(tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--max_steps=30", "--scenes=1", "--photometric=false", "--val_every=15", f"--cache={tmp_path / 'cache'}")
    assert train(*options, f"--out={out}") == 0
    assert "30 steps done" in capsys.readouterr().out
    rows = curve(out)
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert float(rows[-1]["lr"]) == pytest.approx(1e-6) and float(rows[2]["lr"]) == pytest.approx(3e-3)  # peak at 3
    with open(out / "val.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["15", "30"]
    assert [path.name for path in sorted((out / "pictures").iterdir())] == ["depth_000015.png", "depth_000030.png"]
    assert (out / "depth.png").read_bytes() == (out / "pictures" / "depth_000030.png").read_bytes()
    assert json.loads((out / "options.json").read_text())["scenes"] == 1
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3  # one to train on, two to validate on
    model = load_d4rt(out / "last.ckpt")
    assert model.config.hidden_size == 24 and model.config.image_size == (16, 16)
    assert all(torch.equal(x, weights(out)[name]) for name, x in model.state_dict().items())
    if next(iter((out / "tensorboard").glob("events*")), None) is None:
        pytest.importorskip("tensorboard", reason="no TensorBoard logs without tensorboard")
        pytest.fail("no TensorBoard logs")


def test_tensorboard_has_curves_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(OWN, "--max_steps=2", "--val_every=2", f"--out={tmp_path}") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "val/loss"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/depth"]


# Going on


def test_killed_run_goes_on_as_if_nothing_had_happened(plain, tmp_path):
    """kill -9 in the middle of the sixth step, while its second batch is fetched; step 3 is on disk."""
    options = (OWN, "--max_steps=8", "--accumulate_grad_batches=2", "--save_every=3", f"--out={tmp_path}")
    looked_at, batches = 2, 11
    killed = start(*options, ACCIDENT=f"kill:{looked_at + 2 * batches + 1}")
    assert killed.returncode == -9
    assert [row["step"] for row in curve(tmp_path)] == ["1", "2", "3", "4", "5"]
    assert train(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert curve(tmp_path) == curve(plain)
    assert same_weights(tmp_path, plain)


def test_time_limit_and_going_on(plain, tmp_path, capsys):
    options = (OWN, "--max_steps=8", "--accumulate_grad_batches=2", f"--out={tmp_path}")
    assert train(*options, "--minutes=0") == 0
    assert "1 steps done" in capsys.readouterr().out
    assert train(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert curve(tmp_path) == curve(plain) and same_weights(tmp_path, plain)


def test_workers_change_nothing(plain, tmp_path):
    options = (OWN, "--max_steps=8", "--accumulate_grad_batches=2", f"--out={tmp_path}", "--workers=2")
    assert train(*options) == 0
    assert curve(tmp_path) == curve(plain) and same_weights(tmp_path, plain)


def close_weights(a, b) -> bool:
    """To the rounding of sums in another order. Adam divides by it where a gradient is next to nothing, so: relative to
    how far the weights went."""
    torch.manual_seed(0)
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a) < 2e-5


def test_accumulated_batches_equal_one(plain, tmp_path):
    assert train(OWN, "--max_steps=8", "--batch_size=4", f"--out={tmp_path}") == 0
    assert close_weights(tmp_path, plain)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.heavy)])
def test_two_processes_equal_one(plain, tmp_path, strategy):
    """Gloo on the CPU; then one process goes on from what two have written."""
    options = (OWN, f"--strategy={strategy}", "--devices=2", f"--out={tmp_path}", "--max_steps=8", "--save_every=3")
    done = start(*options)
    assert done.returncode == 0, done.stderr
    assert close_weights(tmp_path, plain)
    norms = [[float(row["grad_norm"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    more = ("--max_steps=9", "--batch_size=4", f"--out={tmp_path}", f"--ckpt={tmp_path / 'last.ckpt'}")
    assert train(OWN, *more) == 0


@pytest.mark.heavy
def test_sharded_run_goes_on(plain, tmp_path):
    options = (OWN, "--strategy=fsdp", "--devices=2", f"--out={tmp_path}", "--max_steps=8")
    assert start(*options, "--minutes=0").returncode == 0
    done = start(*options, f"--ckpt={tmp_path / 'last.ckpt'}")
    assert done.returncode == 0, done.stderr
    assert close_weights(tmp_path, plain)


def test_bfloat16(plain, tmp_path):
    options = (OWN, "--max_steps=8", "--accumulate_grad_batches=2", "--precision=bf16-mixed", f"--out={tmp_path}")
    assert train(*options) == 0
    losses = [[float(row["loss"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    assert {x.dtype for x in weights(tmp_path).values()} == {torch.float32}


def test_start_from_a_model(plain, tmp_path):
    assert train(OWN, f"--init={plain}", "--max_steps=1", "--lr=1e-12", "--final_lr=1e-12", f"--out={tmp_path}") == 0
    assert all(torch.allclose(x, y, atol=1e-9) for x, y in zip(weights(tmp_path).values(), weights(plain).values()))


def test_start_from_the_encoder_of_4ds(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_size": 768}
    source = Scaling4D(Config4DS(**sizes, patch_size=(2, 8, 8), video_size=(4, 16, 16)))
    source.save_pretrained(tmp_path / "4ds")
    options = (OWN, "--max_steps=1", "--lr=1e-12", "--final_lr=1e-12")
    assert train(*options, f"--init={tmp_path / '4ds'}", f"--out={tmp_path / 'run'}") == 0
    assert "4DS: " in capsys.readouterr().out
    layer, theirs = "encoder.layers.1.mlp.dense_in.weight", source.encoder.processor.layers[1].mlp.dense_in.weight
    assert torch.allclose(weights(tmp_path / "run")[layer], theirs, atol=1e-9)


# Data


def test_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"max_steps: 1\nbatch_size: 1\nout: {tmp_path / 'run'}\nmodel:\n  rgb_size: 5\n")
    options = [option for option in TINY if not option.startswith(("--batch_size", "--model"))]
    model = [f"--model.{name}={json.dumps(value)}" for name, value in MODEL.items()]
    assert main(["train", "d4rt", f"--config={config}", *options, *model]) == 0
    assert load_d4rt(tmp_path / "run").config.rgb_size == 5
    assert json.loads((tmp_path / "run" / "options.json").read_text())["batch_size"] == 1


def test_seed_dictionaries(tmp_path):
    path = f"{own_clips.__name__}:Dictionaries"
    options = (f"--train_data_path={path}", f"--val_data_path={path}", "--max_epochs=2", "--val_every=4")
    assert train(*options, f"--out={tmp_path}") == 0
    assert [row["step"] for row in curve(tmp_path)] == ["1", "2", "3", "4"]  # two batches a pass
    assert (tmp_path / "val.csv").exists()


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    """As a console script, which has only its own folder on the path, finds it."""
    (tmp_path / "clips_of_mine.py").write_text(f"from {own_clips.__name__} import Dictionaries\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    assert train("--train_data_path=clips_of_mine:Dictionaries", "--max_steps=1", "--out=run") == 0


def test_large_seeds_and_single_frames(tmp_path):
    options = ("--num_frames=1", "--model.patch_size=[1,8,8]", "--max_steps=1", "--val_every=1", "--val_clips=1")
    assert train(*options, f"--seed={2**32 - 1}", f"--out={tmp_path}") == 0


def test_recorded_videos(tmp_path):
    data = tmp_path / "data"
    options = ["--count=2", "--frames=5", "--height=24", "--width=32", "--tracks=50"]
    assert main(["export_scenes", str(data), *options]) == 0
    out = tmp_path / "run"
    paths = (f"--train_data_path={data}", f"--val_data_path={data}", f"--out={out}")
    finer = "--patch_img_size=24"
    assert train(*paths, "--max_steps=2", "--val_every=2", "--crop=0.5", "--zoom=0.5", finer) == 0
    written = f"--out={tmp_path / 'e.json'}"
    assert main(["evaluate", "d4rt", f"--ckpt={out}", f"--test_data_path={data}", finer, written]) == 0
    found = json.loads((tmp_path / "e.json").read_text())["queries"]
    assert 0 < found["abs_rel"] < 2 and 0 <= found["visibility_accuracy"] <= 1 and found["loss"] > 0


# Refusing


def fails(capsys, *options, code=2) -> str:
    capsys.readouterr()
    assert train(*options) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf train: error: ")
    return error


def test_nan_stops_the_run_and_the_last_checkpoint_is_good(plain, tmp_path, capsys, monkeypatch):
    options = (OWN, "--max_steps=8", "--accumulate_grad_batches=2", "--save_every=3", f"--out={tmp_path}")
    monkeypatch.setenv("ACCIDENT", f"nan:{2 + 5 * 4 + 1}")
    assert "step 5: the gradient's norm is nan" in fails(capsys, *options)
    monkeypatch.delenv("ACCIDENT")
    assert train(*options, f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert curve(tmp_path) == curve(plain) and same_weights(tmp_path, plain)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(28, "No space left on device"), "last.ckpt: No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed"), "is the disk full?"),
    ],
)
def test_full_disk_keeps_the_last_checkpoint(failure, message, tmp_path, capsys, monkeypatch):
    assert train(OWN, "--max_steps=4", "--minutes=0", f"--out={tmp_path}") == 0
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(*_, **__):
        raise failure

    monkeypatch.setattr(torch, "save", full)
    error = fails(capsys, OWN, "--max_steps=4", f"--out={tmp_path}", f"--ckpt={tmp_path / 'last.ckpt'}")
    assert message in error and "last.ckpt" in error
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_run_is_not_written_over(plain, capsys):
    before = {path.name: path.read_bytes() for path in plain.iterdir() if path.is_file()}
    assert f"{plain} holds a run; go on with --ckpt" in fails(capsys, OWN, "--max_steps=1", f"--out={plain}")
    assert {path.name: path.read_bytes() for path in plain.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("left", ["", "step,lo"])
def test_curves_that_were_cut_off_at_their_first_line(plain, tmp_path, left):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "train.csv").write_text(left)
    assert (
        train(OWN, "--max_steps=9", "--accumulate_grad_batches=2", f"--out={run}", f"--ckpt={run / 'last.ckpt'}") == 0
    )
    assert [row["step"] for row in curve(run)] == ["9"]


def test_interrupted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCIDENT", f"interrupt:{2 + 2 * 3 + 1}")
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert train(OWN, "--max_steps=8", "--save_every=1", f"--out={tmp_path}") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from here on
    shown = capsys.readouterr().err
    assert "stopped after step " in shown and f"go on with --ckpt {tmp_path / 'last.ckpt'}" in shown


def test_checkpoints_that_are_none(plain, tmp_path, capsys):
    out = f"--out={tmp_path / 'run'}"
    assert "no such file" in fails(capsys, f"--ckpt={tmp_path / 'no'}", out)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((plain / "last.ckpt").read_bytes()[:2000])
    assert "cut.ckpt: not a complete checkpoint" in fails(capsys, OWN, "--max_steps=9", f"--ckpt={cut}", out)
    other = [OWN, "--max_steps=9", f"--ckpt={plain / 'last.ckpt'}", "--model.num_bands=4", out]
    assert "its model has num_bands 10; give the options" in fails(capsys, *other)
    other = [OWN, "--max_steps=9", f"--init={plain}", "--model.num_bands=4", out]
    assert "--model: wanted the fields of the D4RT in" in fails(capsys, *other)
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch_size=0"], "--batch_size: wanted at least 1, got 0"),
        (["--crop=0"], "--crop: wanted a share in (0, 1], got 0.0"),
        (["--variant=huge"], "variant: expected one of tiny, S, B, L, H, g, got 'huge'"),
        (["--lr=0"], "--lr: wanted a positive number, got 0.0"),
        (["--img_size=20"], "image_size: expected multiples of the patch (2, 8, 8), got (20, 20)"),
        (["--model.width=3"], "width: no such option"),
        (["--init=/nowhere"], "/nowhere"),
        (["--precision=8-bit"], "precision"),
        (["--optimizer=muon", "--strategy=fsdp"], "--optimizer: wanted adamw with --strategy fsdp"),
        (["--train_data_path=/nowhere"], "/nowhere"),
        (["--train_data_path=no.such.module:Clips"], "no folder of this name, and no module: No module named"),
        ([f"--train_data_path={own_clips.__name__}:Nothing"], "wanted a class or function 'Nothing'"),
        ([f"--train_data_path={own_clips.__name__}:not_callable"], "wanted a class or function 'not_callable'"),
        ([f"--train_data_path={own_clips.__name__}:empty"], "wanted at least one clip, got none"),
        (
            [f"--train_data_path={own_clips.__name__}:small"],
            "its clips have a video (2, 8, 8, 3), but --num_frames and",
        ),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    assert message in fails(capsys, *options, "--max_steps=1", f"--out={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
