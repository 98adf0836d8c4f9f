"""The evaluation knows a perfect model when it sees one, the baselines do what they say, and the command prints it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fourdperf.cli.main import main
from fourdperf.data.queries import Queries
from fourdperf.data.scenes import Scene
from fourdperf.data.synthetic import SyntheticClips, scene_seed
from fourdperf.models.d4rt import D4RT, Config, Prediction
from fourdperf.train.baselines import Averages, chained_flow, flow_tracks, still_tracks, training_averages
from fourdperf.train.evaluate_d4rt import evaluate_queries, evaluate_scenes, format_table
from fourdperf.train.pictures import depth_queries

FRAMES, SIZE, GRID = 4, (32, 32), (8, 8)


class Oracle(nn.Module):
    """Answers for the next of its scenes each time it is shown a video, in another scale."""

    def __init__(self, scenes, scale=0.3):
        super().__init__()
        self.config = SimpleNamespace(num_frames=FRAMES, image_size=SIZE)
        self.scenes, self.scale, self.nothing = iter(scenes), scale, nn.Parameter(torch.zeros(()))

    def encode(self, video, aspect_ratio=None, patch_video=None):
        assert video.shape == (1, FRAMES, *SIZE, 3) and 0 <= video.min() and video.max() <= 1
        return next(self.scenes)

    def decode(self, scene, queries):
        true = scene.answer(queries)
        return Prediction(
            xyz=self.scale * true.xyz,
            uv=true.uv,
            visibility=20 * true.visibility - 10,
            displacement=self.scale * true.displacement,
            normal=3 * true.normal,
            confidence=torch.full(true.visibility.shape, 10.0),
        )

    def forward(self, video, queries, aspect_ratio=None, patch_video=None):
        return self.decode(self.encode(video), queries)


@pytest.fixture(scope="module")
def scenes():
    return [Scene(scene_seed("test", i), FRAMES, SIZE) for i in range(2)]


@pytest.fixture(scope="module")
def averages():
    return training_averages([Scene(scene_seed("train", i), FRAMES, SIZE) for i in range(3)], GRID)


def test_perfect_model_on_queries(scenes):
    clips = SyntheticClips("test", 200, FRAMES, SIZE, scenes=2)
    order = [scenes[clips.index(i)] for i in range(2)]
    found = evaluate_queries(Oracle(order), (clips[i] for i in range(2)))
    for name in ("abs_rel", "xyz_error", "uv_error", "loss_xyz", "loss_uv", "loss_displacement", "loss_normal"):
        assert found[name] == pytest.approx(0, abs=2e-5), name
    assert found["normal_degrees"] == pytest.approx(0, abs=0.05)
    assert found["visibility_accuracy"] == 1 and 0.3 < found["always_visible"] < 1
    assert found["loss_confidence"] == pytest.approx(np.log1p(np.exp(-10)), rel=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        evaluate_queries(Oracle([]), [])


def test_perfect_model_on_scenes(scenes, averages):
    found = evaluate_scenes(Oracle(scenes), scenes, averages, GRID)
    assert found["depth"]["D4RT"]["abs_rel"] == pytest.approx(0, abs=1e-5)
    tracks = found["tracks"]["D4RT"]
    assert tracks["EPE"] == pytest.approx(0, abs=1e-4) and tracks["pixels"] == pytest.approx(0, abs=1e-2)
    assert tracks["APD"] == tracks["AJ"] == tracks["OA"] == 1
    assert found["poses"]["D4RT"]["ATE"] < 1e-3 and found["poses"]["D4RT"]["RPE_R"] < 0.05
    assert found["focal"]["D4RT"]["relative_error"] < 1e-4
    for task, measure in {"depth": "abs_rel", "tracks": "EPE", "poses": "ATE", "focal": "relative_error"}.items():
        for name, row in found[task].items():
            assert name == "D4RT" or row[measure] > 100 * found[task]["D4RT"][measure], (task, name)
    assert found["poses"]["identity"]["AUC"] < found["poses"]["D4RT"]["AUC"]


def test_constant_and_average_depth(scenes, averages):
    """A constant is as good as any other; the average of one scene alone is perfect on it."""
    only = training_averages(scenes[:1], GRID)
    found = evaluate_scenes(Oracle(scenes[:1]), scenes[:1], only, GRID)["depth"]
    assert found["mean of training scenes"]["abs_rel"] == pytest.approx(0, abs=1e-5)
    true = scenes[0].answer(depth_queries(FRAMES, GRID)).xyz[:, 2].double()
    median = true.median()
    assert found["best constant"]["abs_rel"] == pytest.approx(((true - median).abs() / true).mean().item(), rel=0.02)
    assert averages.depth.shape == (FRAMES, *GRID) and averages.focal.shape == (2,)
    assert averages.depth.mean().item() == pytest.approx(1)


def test_still_points_stay(scenes):
    xyz, uv = torch.rand(5, 3), torch.rand(5, 2)
    tracks = still_tracks(xyz, uv, 3)
    assert all(torch.equal(tracks.xyz[:, t], xyz) and torch.equal(tracks.uv[:, t], uv) for t in range(3))
    assert tracks.visible.shape == (5, 3) and tracks.visible.all()


def test_flow_is_followed(scenes):
    """A picture that moves by (3, 1) of its 64 pixels a frame; the border is left out."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (20, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    video = np.stack([picture[40 - t : 104 - t, 40 - 3 * t : 104 - 3 * t] for t in range(4)])
    uv = 0.25 + 0.4 * torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    places = chained_flow(video, uv)
    wanted = uv[:, None] + torch.arange(4)[:, None] * torch.tensor([3.0, 1.0]) / 64
    assert places.shape == (60, 4, 2) and torch.equal(places[:, 0], uv)
    assert (places - wanted).norm(dim=-1).median() < 0.5 / 64
    still = np.repeat((scenes[0].render().video[:1] * 255).byte().numpy(), FRAMES, 0)
    followed = flow_tracks(scenes[0], still, uv)
    t = torch.arange(FRAMES).expand(60, -1)
    there = scenes[0].answer(Queries(uv[:, None].expand(-1, FRAMES, -1), t, t, t)).xyz
    torch.testing.assert_close(followed.xyz, there, atol=1e-3, rtol=1e-3)
    assert followed.visible.all()


def test_no_scene(averages):
    with pytest.raises(ValueError, match="wanted at least one, got none"):
        evaluate_scenes(Oracle([]), [], averages, GRID)
    assert isinstance(averages, Averages)


def test_table():
    text = format_table({"ours": {"a": 0.5, "b": 1.0}, "another": {"a": 0.25, "b": 2.0}})
    assert text.splitlines() == [
        "                  a           b",
        "ours         0.5000      1.0000",
        "another      0.2500      2.0000",
    ]


# The command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 3, "num_layers": 1, "decoder_layers": 1, "patch_size": (2, 8, 8)}
    path = tmp_path_factory.mktemp("model")
    D4RT(Config(**sizes, num_frames=FRAMES, image_size=16)).save_pretrained(path)
    return path


def test_command(weights, tmp_path, capsys):
    out = tmp_path / "found.json"
    options = ["--num_queries=50", "--clips=2", "--average_clips=2", f"--out={out}"]
    assert main(["evaluate", "d4rt", f"--ckpt={weights}", *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {"queries", "depth", "tracks", "poses", "focal"} <= set(found)
    for name in ("visibility_accuracy", "best constant", "DIS flow, true depth", "identity", "EPE"):
        assert name in printed
    assert f"{found['depth']['D4RT']['abs_rel']:.4f}" in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ckpt=/nowhere"], "no such checkpoint: /nowhere"),
        (["--img_size=32"], "--img_size: wanted the model's 16 x 16, got 32"),
        (["--num_frames=5"], "--num_frames: wanted 1 to the model's 4, got 5"),
        (["--clips=0"], "--clips: wanted at least 1, got 0"),
        (["--test_data_path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_options(weights, options, message, capsys):
    assert main(["evaluate", "d4rt", f"--ckpt={weights}", *options]) == 2
    assert message in capsys.readouterr().err
