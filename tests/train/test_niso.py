"""Training of Neural Isometries: going on, two processes, what stops a run, and the measures against what is known."""

import csv
import json
import math
import subprocess
import sys

import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.data import niso
from fourdperf.data.toric import eigenspaces, toric_eigs
from fourdperf.models.niso import Autoencoder, Config
from fourdperf.train.checkpoint import read_run
from tests.models.niso_cases import exact_basis
from tests.train.processes import ENVIRONMENT, kill_after_checkpoint

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

from fourdperf.train import niso_runs  # noqa: E402
from fourdperf.train.evaluate_niso import (  # noqa: E402
    PlainNet,
    chain,
    clusters,
    essential_poses,
    pose_errors,
    torus_tables,
    wave_power,
)
from fourdperf.train.niso import NisoTraining, encode_objective  # noqa: E402
from fourdperf.train.niso_runs import evened  # noqa: E402

TINY = ["--size=8", "--digit=6", "--accelerator=cpu", "--batch_size=2", "--log_every=1", "--val_every=100"]
TINY += ["--val_items=4", "--max_steps=6", "--save_every=3", "--model.encoder_channels=[4,4]", "--model.op_dim=6"]
TINY += ["--model.latent_channels=6", "--model.stem_channels=4"]
TINY += ["--gamma=0"]  # its term is of a process's own batch, so that two of them differ from one


def run(*options) -> int:
    return main(["train", "niso.hmnist_encode", *TINY, *map(str, options)])


def curve(out, name: str = "train") -> list[dict[str, str]]:
    with open(out / f"{name}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "pairs_per_second"} for row in csv.DictReader(file)]


def weights(out) -> dict[str, torch.Tensor]:
    return Autoencoder.from_pretrained(out / "model").state_dict()


def same(a, b) -> bool:
    equal = [torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True)]
    return curve(a) == curve(b) and all(equal)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("plain")
    assert run(f"--out={out}") == 0
    return out


def accident(monkeypatch, number: int, happen) -> None:
    """At the `number`-th training batch that is asked for, `happen` gets the pairs and may change them."""
    ask, asked = niso.HomographyPairs._batch, [0]

    def batch(self, indices, generators):
        items = ask(self, indices, generators)
        if self.shuffle:
            asked[0] += 1
            if asked[0] == number:
                happen(items)
        return items

    monkeypatch.setattr(niso.HomographyPairs, "_batch", batch)


def command(*options) -> list[str]:
    return [sys.executable, "-m", "fourdperf", "train", "niso.hmnist_encode", *TINY, *map(str, options)]


@pytest.mark.heavy
def test_killed_run_goes_on_as_if_nothing_had_happened(plain, tmp_path):
    """kill -9 after the first checkpoint, wherever the run is then."""
    kill_after_checkpoint(command(f"--out={tmp_path}"), tmp_path)
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
    assert run(f"--out={tmp_path}", f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_going_on_in_another_folder(plain, tmp_path):
    """It is a run as any other, with options and results."""
    assert run(f"--out={tmp_path}", f"--ckpt={plain / 'last.ckpt'}", "--max_steps=8") == 0
    assert json.loads((tmp_path / "options.json").read_text())["max_steps"] == 8
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 8


def test_two_processes_equal_one(plain, tmp_path):
    options = ("--batch_size=1", "--strategy=ddp", "--devices=2", f"--out={tmp_path}")
    done = subprocess.run(command(*options), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path), weights(plain)
    for state in (a, b):  # the first moves all eigenvalues alike: its gradient is nothing but rounding
        state["operator.Lambda"] = state["operator.Lambda"][1:]
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 2e-5
    norms = [[float(row["grad_norm"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_bfloat16(plain, tmp_path):
    assert run(f"--out={tmp_path}", "--precision=bf16-mixed") == 0
    losses = [[float(row["loss"]) for row in curve(out)] for out in (tmp_path, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]
    assert {x.dtype for x in weights(tmp_path).values()} == {torch.float32}


def fails(capsys, *options) -> str:
    capsys.readouterr()
    assert run(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fourdperf train: error: ")
    return error


def test_nan_stops_the_run_and_the_last_checkpoint_is_good(plain, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        accident(patch, 6, lambda items: items[0]["x"].mul_(torch.nan))  # Lightning fetches a batch ahead
        assert "step 5: a: expected finite numbers" in fails(capsys, f"--out={tmp_path}")
    assert read_run(tmp_path / "last.ckpt")["global_step"] == 3
    assert run(f"--out={tmp_path}", f"--ckpt={tmp_path / 'last.ckpt'}") == 0
    assert same(tmp_path, plain)


def test_what_validation_does_not_take_is_told_as_in_training():
    model = Autoencoder(Config(image_size=8, channels=1, encoder_channels=(4,), encoder_depth=(1,), op_dim=4))
    module = NisoTraining(model, encode_objective(0.5, 0.1), 10, lr=1e-3, final_lr=1e-4)
    with pytest.raises(ValueError, match="step 0: a: expected finite numbers, .* The last checkpoint is good"):
        module.validation_step((torch.full((2, 8, 8, 1), torch.nan), torch.rand(2, 8, 8, 1)), 0)


def test_what_is_not_finite_is_named():
    """In a forward pass, and where only a gradient is."""
    model = Autoencoder(Config(image_size=8, channels=1, encoder_channels=(4,), encoder_depth=(1,), op_dim=4))
    module = NisoTraining(model, encode_objective(0.5, 0.1), 10, lr=1e-3, final_lr=1e-4)
    module._batch = (torch.rand(2, 8, 8, 1), torch.rand(2, 8, 8, 1))
    model.encoder.out.weight.grad = torch.full_like(model.encoder.out.weight, torch.inf)
    assert module.not_finite(torch.tensor(torch.nan)).startswith("gradient of encoder.out.weight has ")
    with torch.no_grad():
        model.decoder.norm.weight[1] = torch.nan
    assert module.not_finite(torch.tensor(torch.nan)).startswith("decoder/out has ")


def test_checkpoints_of_another_model(plain, tmp_path, capsys):
    other = (f"--ckpt={plain / 'last.ckpt'}", "--model.op_dim=7", f"--out={tmp_path}")
    assert "its model has op_dim 6; give the options" in fails(capsys, *other)
    assert not (tmp_path / "last.ckpt").exists()


# Measures


def test_exact_functions_are_recognised_however_they_are_turned():
    basis = exact_basis(8, 21)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    functions = basis.functions.clone()
    functions[:, 1:5] = functions[:, 1:5] @ turn
    tables = torus_tables(basis._replace(functions=functions), (8, 8))
    rows = tables["eigenspaces"].values()
    assert [row["learned"] for row in rows] == [1, 4, 4, 4, 8] == [row["exact"] for row in rows]
    assert max(row["degrees"] for row in rows) < 1e-4
    assert tables["functions"]["eigenspace"]["least"] == pytest.approx(1)
    assert tables["clusters"]["exact"] == {
        **dict.fromkeys(("2", "3", "5", "6", "7", "more"), 0),
        "1": 1,
        "4": 3,
        "8": 1,
    }


def test_functions_between_eigenspaces_are_told():
    """Two functions turned into each other by 30 degrees."""
    basis = exact_basis(8, 5)
    functions, (c, s) = basis.functions.clone(), (math.cos(math.pi / 6), math.sin(math.pi / 6))
    functions[:, :2] = functions[:, :2] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    tables = torus_tables(basis._replace(functions=functions), (8, 8))
    assert [row["degrees"] for row in tables["eigenspaces"].values()] == pytest.approx([30, 30])
    assert tables["functions"]["eigenspace"]["least"] == pytest.approx(0.75)


def test_waves_are_what_shifts_rotate():
    x, y = torch.meshgrid(*[torch.arange(8) * math.pi / 4] * 2, indexing="ij")
    both = torch.stack([torch.cos(x + 2 * y + 0.3), torch.cos(x) + torch.cos(y), torch.ones(8, 8)], -1).flatten(0, 1)
    assert wave_power(both, (8, 8)).amax(0).tolist() == pytest.approx([1, 0.5, 1])
    assert clusters(torch.tensor([0, 0.05, 0.12, 1, 3, 3.05])) == [3, 1, 2]
    assert [s.stop - s.start for s in eigenspaces(toric_eigs(16, 16)[0])][:5] == [1, 4, 4, 4, 8]


def test_evened_frequencies_are_as_strong_as_is_asked_for():
    images = torch.rand(64, 8, 8, 3).cumsum(1)
    strength = lambda x: torch.fft.rfft2(x, dim=(1, 2)).abs().square().mean((0, 3)).sqrt()
    found = strength(evened(images, images, 2.0))
    assert strength(images)[0, 1] < 0.5 * strength(images)[1, 0]
    assert found[0, 1] == pytest.approx(found[1, 0].item(), rel=1e-3)  # 1 + f^2 of 2, and of 1
    assert found[0, 0] == pytest.approx(2 * found[0, 1].item(), rel=1e-3)
    assert evened(images, images, 0.0).square().mean() == pytest.approx(1, rel=1e-4)


def test_processes_share_the_rendering(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(niso_runs, "write_shards", lambda *_, **options: asked.update(options))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    niso_runs.prepare({"experiment": "pose_encode", "data_path": None, "videos": 2, "size": 8, "out": tmp_path})
    assert (asked["rank"], asked["ranks"], asked["wait"]) == (1, 2, True)


def test_slowest_waves():
    """Orthonormal, the constant first, then those of half a wave, along the longer side before the other."""
    waves = niso_runs.slowest_waves((6, 8), 48)
    assert (waves.T @ waves - torch.eye(48)).abs().max() < 1e-5
    first, across, down = waves[:, :3].unflatten(0, (6, 8)).unbind(-1)
    assert first.std() < 1e-6 and across.std(0).max() < 1e-6 and down.std(1).max() < 1e-6
    assert (across[0].diff() < 0).all() and (down[:, 0].diff() < 0).all()


def test_functions_mass_and_eigenvalues_have_their_own_rates():
    model = Autoencoder(Config(image_size=4, channels=3, op_dim=4))
    rates = {"lr": 1e-2, "final_lr": 1e-3, "functions_lr": 0.2, "mass_lr": 0.1, "eigenvalues_lr": 0.5}
    module = NisoTraining(model, encode_objective(0.5, 0.1), 10, warmup_steps=5, **rates)
    groups = module.configure_optimizers()["optimizer"].param_groups
    found = {name: g["lr"] for g in groups for p in g["params"] for name, q in model.named_parameters() if p is q}
    wanted = {"operator.Phi": 2e-4, "operator.M": 1e-4, "operator.Lambda": 5e-4}
    assert found == pytest.approx(wanted)


def test_plain_net_has_the_size_that_is_asked_for():
    net = PlainNet.of_size(1, 10, 60_000)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(60_000, rel=0.1)
    assert net(torch.rand(2, 24, 24, 1)).shape == (2, 10)


def test_pose_errors():
    turn = torch.eye(4).repeat(3, 1, 1)
    turn[:, :2, :2] = torch.tensor([[math.cos(0.1), -math.sin(0.1)], [math.sin(0.1), math.cos(0.1)]])
    turn[:, :3, 3] = torch.tensor([[1.0, 0, 0], [2, 0, 0], [1, 1, 0]])
    half = turn.clone()
    half[:, :3, 3] *= 0.5
    assert pose_errors(half, turn) == pytest.approx(dict(rotation=0, direction=0, axis=0, position=0, ATE=0), abs=1e-4)
    half[:, :3, 3] *= -1
    back = pose_errors(half, turn)
    assert (back["direction"], back["axis"], back["position"]) == pytest.approx((180, 0, 1), abs=1e-4)
    still = pose_errors(torch.eye(4).expand(3, 4, 4), turn)
    assert still["rotation"] == pytest.approx(math.degrees(0.1), rel=1e-4) and still["direction"] == 90
    assert still["position"] == pytest.approx(1)
    assert chain(turn)[1:2].equal(turn[:1]) and chain(turn).shape == (4, 4, 4)


def test_essential_matrices_find_a_camera_that_moves():
    """Of a textured scene with exact poses, at a size where SIFT has something to hold on to."""
    from fourdperf.data.scenes import Scene

    scene = Scene(4, 2, (160, 160), time_step=0.125, still=True)
    truth = torch.linalg.inv(scene.world_from_camera[:1]) @ scene.world_from_camera[1:]
    found = essential_poses(scene.render().video, scene.intrinsics, enlarge=1)
    ours, still = pose_errors(found, truth), pose_errors(torch.eye(4)[None], truth)
    assert ours["rotation"] < 0.4 * still["rotation"] and ours["direction"] < 45
    assert essential_poses(torch.zeros(3, 32, 32, 3), torch.eye(3).expand(3, 3, 3)).equal(torch.eye(4).expand(2, 4, 4))
