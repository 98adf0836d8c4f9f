"""LPIPS against the numbers of the seed's code, its files, and what stands in for it."""

import pytest
import torch

from fourdperf.models import perceptual
from fourdperf.models.perceptual import LPIPS, PyramidL1, perceptual_or_substitute
from tests.models.tokenizer_cases import Case, first


def golden_lpips(case: Case, prefix: str = "") -> LPIPS:
    """With a golden's weights, whose names of VGG16 have slices in torchvision's numbers."""
    model = LPIPS()
    params = {name.removeprefix(prefix): x for name, x in case.params.items() if name.startswith(prefix)}
    convolutions = {name.split(".", 2)[2]: x for name, x in params.items() if name.startswith("net.slice")}
    model.load_vgg({f"features.{name}": x for name, x in convolutions.items()})
    model.load_linear({name: x for name, x in params.items() if name.startswith("lin")})
    for name, ours in (("shift", model.shift), ("scale", model.scale)):
        assert torch.equal(ours.flatten(), params[f"scaling_layer.{name}"].flatten())
    return model.eval()


def test_golden():
    case = Case("c_lpips_recipe")
    model = golden_lpips(case)
    b = case.inputs["b"].requires_grad_()
    a, b_ours = ((first(x) + 1) / 2 for x in (case.inputs["a"], b))
    for index, features in enumerate(model.features(a)):
        case.check(f"feature_mean_{index}", features.mean((2, 3)))
    found = model(a, b_ours)
    case.check("lpips", found.view(2, 1, 1, 1))
    (found * case.inputs["cot/lpips"].flatten()).sum().backward()
    case.check("b", b.grad, "grad")
    assert not any(p.requires_grad for p in model.parameters())


def test_dropout_is_an_option():
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 16, 16, 3)
    plain, dropping = LPIPS(), LPIPS(dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(plain.train()(a, b), plain.eval()(a, b)) and torch.equal(dropping.eval()(a, b), plain(a, b))
    assert not torch.equal(dropping.train()(a, b), dropping(a, b))


def test_places_without_activity_have_gradients():
    model = LPIPS()
    for convolution in model.convolutions.values():
        convolution.weight.zero_().sub_(1)
        convolution.bias.zero_()
    b = torch.rand(1, 16, 16, 3, requires_grad=True)
    model(torch.rand(1, 16, 16, 3), b).sum().backward()
    assert b.grad.isfinite().all()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(perceptual, "_packaged", lambda: [])
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def write_files(folder, model: LPIPS) -> None:
    state = {f"features.{name}": x for name, x in model.convolutions.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16-397923af.pth")
    weights = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(model.weights)}
    torch.save(weights, folder / "vgg.pth")


def test_files(cache, tmp_path):
    torch.manual_seed(1)
    model = LPIPS().eval()
    for weight in model.weights:
        weight.uniform_()
    write_files(cache, model)
    a, b = torch.rand(2, 1, 16, 16, 3)
    found = perceptual_or_substitute()
    assert found.name == "LPIPS (VGG16)" and torch.equal(found(a, b), model(a, b))
    moved = tmp_path / "v.pth"
    (cache / "vgg16-397923af.pth").rename(moved)
    assert torch.equal(LPIPS.from_files(moved)(a, b), model(a, b))
    moved.write_bytes(moved.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"v\.pth: not a complete file"):
        perceptual_or_substitute(moved)
    with pytest.raises(ValueError, match=r"vgg\.pth: missing 0\.weight"):
        LPIPS.from_files(cache / "vgg.pth")


def test_the_linear_layers_come_with_torchmetrics(cache, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.undo()
    paths = [path for path in perceptual._packaged() if path.is_file()]
    model, case = LPIPS(), Case("c_lpips_recipe")
    model.load_linear(perceptual.read_state(paths[-1]))
    for index, weight in enumerate(model.weights):
        assert torch.equal(weight.flatten(), case.params[f"lin{index}.model.1.weight"].flatten())


def test_substitute_is_never_silent(cache):
    with pytest.warns(UserWarning, match=r"vgg16-397923af\.pth is in none of .*Instead of LPIPS \(VGG16\): L1 of Lap"):
        found = perceptual_or_substitute()
    assert isinstance(found, PyramidL1) and "not LPIPS" in found.name
    with pytest.raises(FileNotFoundError, match="vgg: no such file: /nowhere"):
        perceptual_or_substitute(perceptual.Path("/nowhere"))


def test_pyramid():
    """It sees a blur better than L1 does, and every level counts."""
    torch.manual_seed(0)
    a = torch.rand(2, 24, 30, 3)
    measure = PyramidL1()
    assert torch.equal(measure(a, a), torch.zeros(2))
    shift = measure(a, a + 0.1)  # the coarsest level alone
    torch.testing.assert_close(shift, torch.full((2,), 0.1))
    ripple = torch.zeros(24, 30, 1)
    ripple[::2] = 0.2
    torch.testing.assert_close(measure(a, a + ripple)[0], torch.tensor(0.2))  # 0.1 of detail, and 0.1 of the mean
    assert torch.allclose(measure(a[1:], a[:1]), measure(a[:1], a[1:]))


@pytest.mark.parametrize("measure", [LPIPS(), PyramidL1()], ids=["lpips", "pyramid"])
def test_bad_pictures(measure):
    for a, b in (((1, 16, 16, 3), (1, 16, 18, 3)), ((1, 3, 16, 16), (1, 3, 16, 16)), ((16, 16, 3), (16, 16, 3))):
        with pytest.raises(ValueError, match=r"a, b: expected pictures \(B, H, W, 3\)"):
            measure(torch.zeros(a), torch.zeros(b))
