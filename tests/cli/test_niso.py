"""`fourdperf train niso.*` and `evaluate niso`: every command from stand-ins or shards, encode to pred, the pictures,
what is written, how they refuse."""

import json
import math

import cv2
import numpy as np
import pytest
import torch

from fourdperf.cli.main import main
from fourdperf.models.niso import MODELS, Config
from tests.models.niso_cases import exact_basis

pytest.importorskip("lightning")
pytest.importorskip("h5py")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

from fourdperf.train.niso_pictures import (  # noqa: E402
    functions_picture,
    isometries_picture,
    torus_functions_picture,
    torus_operator_picture,
    trajectories_picture,
)
from fourdperf.train.niso_runs import split_pairs  # noqa: E402

RUN = ["--accelerator=cpu", "--batch_size=2", "--max_steps=2", "--log_every=1", "--val_items=3"]
NET = ["--model.encoder_channels=[4,4]", "--model.encoder_depth=[1,1]", "--model.op_dim=6", "--model.stem_channels=4"]
NET += ["--model.latent_channels=6"]
HEAD = ["--model.head_features=4", "--model.gram_features=3"]
COMMANDS = {
    "laplacian": ["--size=4"],
    "hmnist_encode": ["--size=8", "--digit=6", *NET],
    "hmnist_pred": HEAD,
    "shrec_encode": ["--shapes=20", "--height=8", "--width=16", *NET],
    "shrec_pred": HEAD,
    "pose_encode": ["--videos=2", "--size=16", *NET],
    "pose_pred": ["--frames=3", "--model.head_features=8"],
}
PICTURES = {
    "laplacian": {"eigenvalues", "functions", "isometries", "operator"},
    "encode": {"functions", "isometries", "operator", "reconstructions"},
    "classes": {"answers"},
    "pose_pred": {"trajectories"},
}


def train(command: str, *options) -> int:
    return main(["train", f"niso.{command}", *RUN, *map(str, options)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every command once, a _pred on its _encode."""
    folder = tmp_path_factory.mktemp("runs")
    for command, options in COMMANDS.items():
        backbone = command.replace("_pred", "_encode")
        more = [f"--encoder={folder / backbone}"] * command.endswith("_pred")
        assert train(command, *options, *more, f"--out={folder / command}") == 0, command
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_run_leaves_behind(runs, command):
    out, kind = runs / command, command.partition("_")[2]
    family = {"encode": "encode", "pred": "pose_pred" if "pose" in command else "classes"}.get(kind, command)
    wanted = {"last.ckpt", "options.json", "results.json", "train.csv", "val.csv", "curves.png"}
    wanted |= {f"{name}.png" for name in PICTURES[family]}
    assert wanted <= {path.name for path in out.iterdir()}
    assert {path.name for path in (out / "pictures").iterdir()} == {f"{name}_000002.png" for name in PICTURES[family]}
    for path in out.glob("*.png"):
        picture = cv2.imread(str(path))
        assert picture.shape[0] >= 80 and picture.shape[1] >= 100 and picture.std() > 1
    fields = json.loads((out / "model" / "config.json").read_text())
    model = MODELS[fields["kind"]].from_pretrained(out / "model")
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert json.loads((out / "results.json").read_text())["steps"] == 2


def test_heads_stand_on_their_encoders(runs):
    for command in ("hmnist_pred", "shrec_pred", "pose_pred"):
        backbone, kind = runs / command.replace("_pred", "_encode"), "pose" if "pose" in command else "classifier"
        below = MODELS["autoencoder"].from_pretrained(backbone / "model").state_dict()
        above = MODELS[kind].from_pretrained(runs / command / "model").state_dict()
        frozen = [name for name in above if name in below]
        assert len(frozen) > 10 and all(torch.equal(above[name], below[name]) for name in frozen)


def test_where_poses_begin(runs):
    """From smooth functions and a mask of nearly one; a head on motion."""
    basis = MODELS["autoencoder"].from_pretrained(runs / "pose_encode" / "model").operator.basis()
    assert basis.mask.min() > 0.5
    assert basis.functions[:, 0].std() < 0.1 * basis.functions[:, 0].mean().abs()
    assert json.loads((runs / "pose_pred" / "model" / "config.json").read_text())["head_input"] == "motion"
    for name in ("pose_encode", "pose_pred"):
        options = json.loads((runs / name / "options.json").read_text())
        train, val = (split_pairs(options, (0,), split) for split in ("train", "val"))
        assert options["augment"] and train.augment and not val.augment


def test_measures(runs):
    found = {name: json.loads((runs / name / "results.json").read_text()) for name in COMMANDS}
    assert sum(row["learned"] for row in found["laplacian"]["eigenspaces"].values()) == 16
    assert found["pose_pred"]["poses"]["identity"]["direction"] == 90
    assert {"tau of the pair", "a in place of b"} <= set(found["shrec_encode"]["views"])
    for name in ("hmnist_pred", "shrec_pred"):
        assert 0 <= found[name]["accuracy"]["isometries"]["warped"] <= 1


def test_evaluate(runs, tmp_path, capsys):
    options = ["--items=16", "--baseline_steps=2", f"--out={tmp_path / 'found.json'}"]
    assert main(["evaluate", "niso", f"--run={runs / 'hmnist_pred'}", *options]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    names = {"isometries", "plain net, trained on images as they are", "plain net, trained on images warped"}
    assert set(found["accuracy"]) == names and "plain net" in capsys.readouterr().out
    assert main(["evaluate", "niso", f"--run={runs / 'pose_pred'}", "--items=2"]) == 0
    assert "essential matrix" in capsys.readouterr().out
    assert main(["evaluate", "niso", f"--run={tmp_path}"]) == 2


def test_shards_and_yaml(tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["niso_data", "homnist", f"--out={shards}", "--size=12", "--digit=8"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(f"data_path: {shards}\nbeta: 0.2\nmodel:\n  op_dim: 5\n")
    encode, pred = tmp_path / "encode", tmp_path / "pred"
    assert train("hmnist_encode", f"--config={file}", *NET[:2], *NET[3:], f"--out={encode}") == 0
    kept = json.loads((encode / "options.json").read_text())
    assert (kept["beta"], kept["model"]["op_dim"], kept["data_path"]) == (0.2, 5, str(shards))
    assert train("hmnist_pred", *HEAD, f"--encoder={encode}", "--in_memory=false", f"--out={pred}") == 0
    assert json.loads((pred / "options.json").read_text())["data_path"] == str(shards)
    assert train("hmnist_pred", *HEAD, f"--encoder={encode / 'model'}", f"--out={tmp_path / 'b'}") == 2
    assert "--data_path: wanted one" in capsys.readouterr().err
    assert train("hmnist_pred", *HEAD, f"--encoder={encode / 'model'}", f"--data_path={shards}", f"--out={tmp_path / 'b'}") == 0
    assert train("pose_encode", f"--data_path={shards}", f"--out={tmp_path / 'c'}") == 2
    assert "wanted shards of sequences, got homnist" in capsys.readouterr().err


def fails(capsys, command: str, *options) -> str:
    capsys.readouterr()
    assert train(command, *options) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_wrong_folders_and_numbers(runs, tmp_path, capsys):
    out = f"--out={tmp_path / 'run'}"
    assert "--encoder: no such folder" in fails(capsys, "hmnist_pred", f"--encoder={tmp_path / 'no'}", out)
    assert "wanted a folder that fourdperf train niso" in fails(capsys, "hmnist_pred", f"--encoder={tmp_path}", out)
    other = fails(capsys, "hmnist_pred", f"--encoder={runs / 'shrec_encode'}", out)
    assert "wanted a run of niso.hmnist_encode, got one of niso.shrec_encode" in other
    assert "no shards in" in fails(capsys, "shrec_encode", f"--data_path={tmp_path / 'no'}", out)
    assert "op_dim: expected at most 16" in fails(capsys, "laplacian", "--size=4", "--model.op_dim=17", out)
    for command, field in (("pose_pred", "op_dim"), ("hmnist_pred", "num_classes")):
        backbone = f"--encoder={runs / command.replace('pred', 'encode')}"
        error = fails(capsys, command, backbone, f"--model.{field}=5", out)
        assert f"--model.{field}: wanted a head's own head_features, head_layers" in error
    assert "--lr: wanted a positive number" in fails(capsys, "laplacian", "--lr=0", out)
    assert "--basis_lr: wanted a positive number" in fails(capsys, "pose_encode", "--basis_lr=0", out)
    assert "--frames: wanted at least 2" in fails(capsys, "pose_pred", "--frames=1", out)
    assert "--ckpt: no such file" in fails(capsys, "laplacian", f"--ckpt={tmp_path / 'no.ckpt'}", out)
    assert main(["train", "niso.nothing"]) == 2


# Pictures


def test_functions_stand_beside_the_exact_ones_turned_towards_them():
    exact = exact_basis(8, 9)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    functions = exact.functions.clone()
    functions[:, 1:5] = functions[:, 1:5] @ turn
    picture = torus_functions_picture(exact._replace(functions=functions), (8, 8))
    assert picture.shape == (2 * (22 + 64) + 4, 64 + 2 * (4 * 68 - 4) + 24, 3)
    above, below = picture[22:86], picture[112:176]
    assert np.abs(above.astype(int) - below).max() <= 1


def test_operator_pictures_of_the_exact_basis_are_alike():
    picture = torus_operator_picture(exact_basis(8, 21), (8, 8))
    assert picture.shape == (246, 4 * 224 + 12, 3)
    assert np.array_equal(picture[22:, 456:680], picture[22:, 684:])


def test_isometries_show_minus_one_blue_and_one_red():
    picture = isometries_picture(torch.diag(torch.tensor([1.0, -1]))[None])
    assert picture[30, 10].tolist() == [178, 24, 43] and picture[-10, -10].tolist() == [33, 102, 172]
    assert picture[30, -10].tolist() == [255] * 3


def test_trajectories_lie_on_each_other_when_only_the_length_is_wrong():
    poses = torch.eye(4).repeat(1, 4, 1, 1)
    poses[0, :, 0, 3], poses[0, :, 2, 3] = torch.arange(4) ** 0.5, torch.arange(4.0)
    relative = torch.linalg.inv(poses[:, :-1]) @ poses[:, 1:]
    truth = trajectories_picture(relative, poses)
    relative[..., :3, 3] *= 3
    assert np.array_equal(trajectories_picture(relative, poses), truth) and truth.shape == (300, 460, 3)


def test_functions_picture_has_the_mass_and_a_panel_for_each():
    config = Config(image_size=(6, 12), channels=1, op_dim=13)
    model = MODELS["autoencoder"](config)
    picture = functions_picture(model.operator.basis(), config.grid)
    assert picture.shape == (2 * 86 + 4, 12 * 132 - 4, 3) and math.prod(config.grid) == 72
