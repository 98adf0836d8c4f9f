"""`fourdperf compare d4rt` and `fourdperf demo d4rt` on a very small model."""

import json

import numpy as np
import pytest
import torch

from fourdperf.cli import compare_d4rt
from fourdperf.cli.main import main
from fourdperf.data.demo_clip import demo_clip
from fourdperf.data.video import write_video
from fourdperf.models.d4rt import D4RT, Config

pytest.importorskip("jax")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of random weights, and a video in another size than the model's."""
    folder = tmp_path_factory.mktemp("d4rt")
    torch.manual_seed(0)
    config = Config(32, 2, 2, num_frames=4, image_size=(16, 16), patch_size=(2, 8, 8), decoder_layers=1)
    D4RT(config).save_pretrained(folder / "model")
    write_video(folder / "clip.mp4", demo_clip(5, 40, 60)[0])
    return folder


def test_compare(files, tmp_path, capsys):
    arguments = ("--checkpoint", files / "model", "--num_queries", "50", "--json", tmp_path / "c.json")
    assert run("compare", "d4rt", "--video", files / "clip.mp4", *arguments, "--rounds", "0") == 0
    assert "layer outputs are within tolerance" in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    names = [error["layer"] for error in found["errors"]]
    assert {error["dtype"] for error in found["errors"]} == {"float32", "bfloat16"}
    assert {"tokens", "encoder/01", "queries", "decoder/00", "outputs"} <= set(names)
    assert found["clip"] == [1, 4, 16, 16, 3] and found["passed"]


def test_compare_names_the_first_layer_that_differs(files, monkeypatch, capsys):
    load = D4RT.from_pretrained

    def perturbed(path, **options):
        model = load(path, **options)
        with torch.no_grad():
            model.decoder.blocks[0].mlp.dense_out.weight[0] += 1
        return model

    monkeypatch.setattr(compare_d4rt.D4RT, "from_pretrained", perturbed)
    arguments = ("--checkpoint", files / "model", "--num_queries", "20", "--rounds", "0")
    assert run("compare", "d4rt", "--video", files / "clip.mp4", *arguments) == 1
    assert "decoder/00 in float32 is the first layer out of tolerance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "d4rt"), "wanted --video"),
        (("compare", "d4rt", "--video", "{clip}", "--num_queries", "0"), "--num_queries"),
        (("compare", "d4rt", "--video", "{clip}", "--checkpoint", "{files}"), "config.json"),
        (("demo", "d4rt", "--video", "no.mp4"), "no such video: no.mp4"),
        (("demo", "d4rt", "--weights", "{files}"), "config.json"),
        (("demo", "d4rt", "--scene", "-1"), "--scene"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(files, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(clip=files / "clip.mp4", files=files) for argument in arguments]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_demo_on_a_scene(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("demo", "d4rt", "--weights", files / "model", "--out", out, "--rounds", "0") == 0
    shown = capsys.readouterr().out
    assert "best constant" in shown and "DIS flow" in shown and "identity" in shown and str(out / "page.html") in shown
    results = json.loads((out / "results.json").read_text())
    rows = dict(results["errors on this scene"])
    assert 0 < float(rows["mean relative error of depth"].split()[0]) < 10
    page = (out / "page.html").read_text()
    assert "against JAX" in page and "mean relative error of depth" in page and "http:" not in page
    with np.load(out / "reconstruction.npz") as found:
        assert found["points"].shape == (4 * 32 * 32, 3) and found["video"].shape == (4, 256, 256, 3)
    assert json.loads((out / "compare.json").read_text())["passed"]


def test_demo_on_a_video(files, tmp_path, capsys):
    out = tmp_path / "out"
    video = files / "clip.mp4"
    assert run("demo", "d4rt", "--video", video, "--weights", files / "model", "--out", out, "--rounds", "1") == 0
    shown = capsys.readouterr().out
    assert "nobody knows the truth" in shown and "as fast" in (out / "page.html").read_text()
