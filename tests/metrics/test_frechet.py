"""The Frechet distance on known Gaussians and on the goldens; its features: Inception as pytorch-fid has it."""

import math

import pytest
import torch

from fourdperf.metrics import inception
from fourdperf.metrics.features import RandomConvNet, open_features, still_features
from fourdperf.metrics.frechet import Moments, frechet_distance
from fourdperf.models.scaling4d import Config, Scaling4D
from tests.models.goldens import GOLDENS, Golden
from tests.models.tokenizer_cases import recipe_tensor


def moments(features, batches=1):
    found = Moments(features.shape[1])
    for part in features.chunk(batches):
        found.update(part)
    return found


def gaussian(mean, covariance):
    """Moments as if of so many samples that mean and covariance are exact."""
    found = Moments(len(mean))
    found.count, found.mean, found.scatter = 11, torch.tensor(mean).double(), 10 * torch.tensor(covariance).double()
    return found


@pytest.mark.parametrize("case", ["small", "wide", "singular"])
def test_goldens(case):
    golden = Golden(GOLDENS / "tokenizer" / "c_fid.npz")
    a, b = (moments(golden.inputs[f"{case}/{name}"], 3) for name in "ab")
    want = golden.spec["values_float64"]
    got = frechet_distance(a, b)
    assert got == pytest.approx(want[f"{case}/pytorch_fid"], rel=1e-6 if case == "singular" else 1e-9)
    assert frechet_distance(b, a) == pytest.approx(got, rel=1e-9)


def test_known_gaussians():
    a = gaussian([0.0, 0.0, 0.0], [[4.0, 0, 0], [0, 9, 0], [0, 0, 0]])
    b = gaussian([1.0, 2.0, 2.0], [[1.0, 0, 0], [0, 1, 0], [0, 0, 16]])
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 1) ** 2 + 16, rel=1e-12)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    for x in (a, b):
        x.mean, x.scatter = turn @ x.mean, turn @ x.scatter @ turn.T
    # an eigenvalue of 0 is now one of about 1e-15, and its root counts
    assert frechet_distance(a, b) == pytest.approx(30, abs=1e-6)


def test_the_same_features_are_at_distance_zero_in_few_samples_of_many_features():
    features = torch.randn(20, 100, dtype=torch.float64)
    assert frechet_distance(moments(features), moments(features)) < 1e-12 * features.square().sum().item()


def test_batches_and_merged_parts_are_the_whole():
    features = 1e4 + torch.randn(101, 5, dtype=torch.float64)
    whole, parts = moments(features), moments(features[:40], 4)
    parts.merge(moments(features[40:], 3))
    parts.merge(Moments(5))
    assert parts.count == 101 and torch.allclose(parts.mean, features.mean(0), rtol=1e-13)
    for found in (whole, parts):
        assert torch.allclose(found.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match=r"features: expected \(B, 4\), got \(2, 3\)"):
        Moments(4).update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="features: expected finite numbers, got NaN"):
        Moments(2).update(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(ValueError, match="at least two rows for a covariance, got 1"):
        frechet_distance(moments(torch.zeros(1, 2)), moments(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="b: expected 2 features, got 3"):
        frechet_distance(moments(torch.zeros(3, 2)), moments(torch.zeros(3, 3)))


# Features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the layout of pytorch-fid's, and the golden."""
    golden = Golden(GOLDENS / "inception" / "pool3.npz")
    recipe = golden.spec["recipe"]
    state = {key: recipe_tensor(key, *entry, recipe["seed"]) for key, entry in recipe["entries"].items()}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / inception.FILE
    path.parent.mkdir()
    torch.save(state, path)
    return path, golden


def test_inception_gives_the_numbers_of_pytorch_fid(weights, monkeypatch):
    path, golden = weights
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(path.parents[1]))
    features = open_features()
    assert features.measure == "rFID" and features.size == 2048
    error = (features.of(golden.inputs["images"]) - golden.outputs["features"]).abs().max().item()
    assert error <= golden.spec["atol"]["out/features"]


def test_inception_files_that_do_not_fit_are_refused(weights, tmp_path):
    content = torch.load(weights[0], weights_only=True)
    content["Mixed_7c.branch1x1.conv.weight"] = torch.zeros(2)
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: Mixed_7c.branch1x1.conv.weight: expected shape"):
        open_features(tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(weights[0].read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.pth: not a complete file"):
        open_features(tmp_path / "cut.pth")
    with pytest.raises(OSError, match="none.pth"):
        open_features(tmp_path / "none.pth")


def test_without_weights_a_named_substitute_stands_in(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match="rFID: no Inception weights at .* which is no FID"):
        features = open_features()
    assert features.measure == "Frechet distance on features of a random convolutional net, seed 0"
    images = torch.rand(3, 20, 17, 3)
    assert features.of(images).shape == (3, features.size)
    assert torch.equal(features.of(images), RandomConvNet()(images))


def test_the_substitute_tells_blurred_pictures_from_sharp_ones():
    images = torch.rand(64, 16, 16, 3)
    blurred = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 3, 1, 1).movedim(1, -1)
    net = RandomConvNet()
    sharp = moments(net(images))
    near, far = (frechet_distance(sharp, moments(net(x))) for x in ((images + 0.02).clamp(max=1), blurred))
    assert 0 < near < far


def test_4ds_sees_pictures_as_still_videos(tmp_path):
    config = Config(
        hidden_size=24, num_layers=4, num_heads=2, mlp_size=32, patch_size=(2, 8, 8), video_size=(4, 16, 16)
    )
    model = Scaling4D(config)
    model.save_pretrained(tmp_path / "4ds")
    features = open_features(tmp_path / "4ds")
    assert features.measure.startswith("Frechet distance on features of 4DS") and features.size == 24
    images = torch.rand(2, 16, 16, 3)
    video = images[:, None].repeat(1, 4, 1, 1, 1)
    want = model.eval().encode(video, layers=[4])[0].mean(1)
    assert torch.allclose(features.of(images), want, atol=1e-5)
    assert still_features(model, torch.rand(2, 40, 24, 3)).shape == (2, 24)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pt_inception-2015-12-05-6726825d.pth, or the folder of a scaling4d"):
        open_features(tmp_path / "empty")
