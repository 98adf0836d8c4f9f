"""Functa: what its parts compute, and that `fit` is gradient descent with exact outer gradients in bounded memory."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fourdperf.models import functa
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.functa import Config, Functa, fit, psnr
from fourdperf.ops import use_backend
from tests.models.goldens import close, gradients

SMALL = {"hidden_size": 8, "num_layers": 4, "omega_0": 5.0, "latent_channels": 3, "inner_rate": 1.0, "inner_steps": 3}
SIZE = (6, 4)
MODULATE = ("shift", "scale", "both")
INTERPOLATION = ("nearest", "linear")


def make(dtype=torch.float64, seed=0, **overrides):
    """A small functa whose every parameter matters."""
    torch.manual_seed(seed)
    model = Functa(Config(**(SMALL | {"image_size": SIZE, "latent_size": 2} | overrides))).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
        if model.rates is not None:
            model.rates.mul_(8)
    return model


def signal(model, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, math.prod(model.config.image_size), model.config.channels)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(model.layers[0].weight.dtype)


def latents(model, batch, seed=2):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *model.config.latent_shape, generator=generator, dtype=torch.float64)
    return 0.3 * z.to(model.layers[0].weight.dtype)


def plain_fit(model, target, coords, order, steps=3):
    """Gradient descent that keeps every graph: (latent, losses of all steps)."""
    latent, losses = model.zeros(len(target)).requires_grad_(), []
    for step in range(steps + 1):
        losses.append((model(latent, coords) - target).square().mean((1, 2)))
        if step < steps:
            (gradient,) = torch.autograd.grad(losses[-1].sum(), latent, create_graph=order == 2, retain_graph=True)
            latent = latent - model.rates_now() * gradient
    return latent, torch.stack(losses)


# ---- config, start, coordinates


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"hidden_size": 0}, "hidden_size: expected a positive integer"),
        ({"num_layers": 1}, "num_layers: expected at least 2"),
        ({"image_size": (4, 4, 4, 4)}, "image_size: expected 1 or 2 or 3"),
        ({"image_size": (8,)}, "latent_size: expected 1"),
        ({"image_size": (1, 1), "interpolation": "linear"}, "image_size: expected an index"),
        ({"interpolation": "1-NN"}, "interpolation: expected one of nearest, linear"),
        ({"modulate": "none"}, "modulate: expected one of"),
        ({"rates": True}, "rates: expected one of"),
        ({"modulation_layout": "transposed"}, "modulation_layout: expected one of"),
        ({"omega_0": -1.0}, "omega_0: expected a positive number"),
        ({"omega_0": math.nan}, "omega_0: expected a number"),
        ({"inner_rate": "fast"}, "inner_rate: expected a number"),
        ({"rate_range": (1.0, 0.0)}, "rate_range: expected low < high"),
        ({"rate_range": 1.0}, "rate_range: expected"),
        ({"transposed_grid": 1}, "transposed_grid: expected True or False"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config(**overrides)


def test_config_round_trip():
    config = Config.upstream(image_size=28, rates="full", interpolation="linear")
    assert config.image_size == (28, 28) and config.rate_range is None and config.transposed_grid
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="no_such: no such option"):
        Config.from_dict({"no_such": 1})
    assert Config(rate_range=[0, 2]).rate_range == (0.0, 2.0)


@pytest.mark.parametrize("rates", ["one", "pixel", "channel", "full"])
def test_start(rates):
    """SIREN's and functa's: bounds are kept and reached."""
    model = Functa(Config(rates=rates, latent_size=4))
    assert model.rates.shape == {"one": (1, 1, 1), "pixel": (4, 4, 1), "channel": (1, 1, 64), "full": (4, 4, 64)}[rates]
    assert 0.005 <= model.rates.min() and model.rates.max() <= 0.1
    for index, layer in enumerate(model.layers):
        bound = 1 / 2 if index == 0 else math.sqrt(6 / 256) / 30
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert abs(model.modulation.weight.std() * 8 - 1) < 0.02 and not model.modulation.bias.any()
    with torch.no_grad():
        layers = {}
        model(model.zeros(1), model.grid(), layers)
    last = layers["layer/08"]
    assert abs(last.mean()) < 0.2 and 0.4 < last.std() < 0.9


def test_rates_now():
    model = make(rates="full", rate_multiplier=2.0)
    with torch.no_grad():
        model.rates.copy_(torch.linspace(-1, 2, 12).view(2, 2, 3))
    assert torch.equal(model.rates_now(), 2 * model.rates.clamp(0, 1))
    free = make(rates="full", rate_multiplier=2.0, rate_range=None)
    assert torch.equal(free.rates_now(), 2 * free.rates)
    assert make(rate_multiplier=3.0).rates_now() == 3.0


def test_grid():
    """x runs along the width; upstream's columns are (row, column); signals of other axes, backwards."""
    grid = make(image_size=(2, 4)).grid()
    assert grid.tolist() == [[(x + 0.5) / 4, (y + 0.5) / 2] for y in range(2) for x in range(4)]
    assert torch.equal(make(image_size=(2, 4), transposed_grid=True).grid(), grid.flip(-1))
    assert torch.equal(make().grid((2, 4)), grid)
    line, voxels = make(image_size=(3,), latent_size=1).grid(), make(image_size=(2, 3, 4), latent_size=1).grid()
    assert line[:, 0].tolist() == [1 / 6, 0.5, 5 / 6]
    assert voxels.shape == (24, 3) and voxels[1].tolist() == [0.375, 1 / 6, 0.25]
    with pytest.raises(ValueError, match="size: expected 2"):
        make().grid((3, 4, 5))


def test_features():
    model = make(image_size=(4, 12), interpolation="nearest", latent_size=4)
    xy = torch.tensor([[0.0, 0.3], [0.5, 0.99], [1.0, 0.25]]).double()
    close(model.features(xy), torch.tensor([[0.0, 0.2], [0.0, 0.96], [1.0, 0.0]]).double(), 1e-6)
    model = make(image_size=(4, 12), interpolation="linear")
    bits = lambda n: [float(n >> k & 1) for k in range(4)]
    xy = torch.tensor([[0.0, 0.0], [5.5 / 12, 3.5 / 4], [1.0, 1.0], [11.5 / 12, 0.3], [-1.0, 2.0]]).double()
    pixels = [(0, 0), (5, 3), (11, 3), (11, 1), (0, 3)]
    assert model.features(xy).tolist() == [bits(x) + bits(y) for x, y in pixels]
    assert model.config.input_size == 8 and make(interpolation="linear").config.input_size == 6
    assert make(latent_size=1, interpolation="linear").features(xy) is xy


# ---- the field


def field_at(model, latent, point):
    """The values of one signal at one point, from the definition."""
    config, (x, y), s = model.config, point.tolist(), model.config.latent_size
    if config.interpolation == "nearest":
        cell = [min(int(v * s), s - 1) for v in (x, y)]
        code, read = latent[cell[1], cell[0]], point * s - torch.tensor(cell)
    else:
        px, py = x * (s - 1), y * (s - 1)
        x0, y0 = min(int(px), s - 2), min(int(py), s - 2)
        fx, fy = px - x0, py - y0
        top = (1 - fx) * latent[y0, x0] + fx * latent[y0, x0 + 1]
        bottom = (1 - fx) * latent[y0 + 1, x0] + fx * latent[y0 + 1, x0 + 1]
        code = (1 - fy) * top + fy * bottom
        height, width = config.image_size
        index = [min(int(x * width), width - 1), min(int(y * height), height - 1)]
        read = torch.tensor([v >> k & 1 for v in index for k in range(config.bits)]).double()
    if s == 1:
        read = point
    blocks = model.modulation(code).view(config.kinds, config.num_layers - 1, config.hidden_size)
    value = read
    for index, layer in enumerate(model.layers[:-1]):
        pre = layer(value)
        if config.modulate != "shift":
            pre = (1 + blocks[0, index]) * pre
        if config.modulate != "scale":
            pre = pre + blocks[-1, index]
        value = torch.sin(config.omega_0 * pre)
    return model.layers[-1](value) + 0.5


@pytest.mark.parametrize("modulate", MODULATE)
@pytest.mark.parametrize("interpolation", INTERPOLATION)
@pytest.mark.parametrize("side", [2, 3])
def test_field(interpolation, modulate, side):
    """Each point has the modulations of its own place in every layer."""
    model = make(interpolation=interpolation, modulate=modulate, latent_size=side, channels=2)
    latent, points = latents(model, 2), torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(3)).double()
    points[0, 0], points[0, 1] = 1.0, 0.0
    want = torch.stack([torch.stack([field_at(model, z, p) for p in ps]) for z, ps in zip(latent, points)])
    close(model(latent, points), want)
    close(model(latent, points[0])[0], want[0])


@pytest.mark.parametrize("modulate", MODULATE)
def test_plain_functa(modulate):
    """One latent for the whole signal, of one, two or three axes and any number of channels."""
    for image, channels in (((5,), 1), ((3, 4), 5), ((2, 3, 2), 2)):
        model = make(image_size=image, latent_size=1, modulate=modulate, channels=channels)
        latent = latents(model, 3)
        assert latent.shape == (3, *[1] * len(image), 3) and model.zeros(3).shape == latent.shape
        blocks = model.modulation(latent.flatten(1)).view(3, model.config.kinds, 3, 1, 8)
        value = model.grid().expand(3, -1, -1)
        for index, layer in enumerate(model.layers[:-1]):
            scale = 1 + blocks[:, 0, index] if modulate != "shift" else 1
            shift = blocks[:, -1, index] if modulate != "scale" else 0
            value = torch.sin(5 * (scale * layer(value) + shift))
        close(model(latent, model.grid()), model.layers[-1](value) + 0.5)
        assert model.render(latent).shape == (3, *image, channels)


@pytest.mark.parametrize("modulate", MODULATE)
def test_layout(modulate):
    """A value depends on its own coordinate only; with upstream's layout on the company that it is in."""
    right = make(modulate=modulate)
    wrong = make(modulate=modulate, modulation_layout="upstream")
    wrong.load_state_dict(right.state_dict())
    latent, grid = latents(right, 2), right.grid()
    close(right(latent, grid)[:, 5:9], right(latent, grid[5:9]))
    assert (wrong(latent, grid)[:, 5:9] - wrong(latent, grid[5:9])).abs().max() > 1e-3
    assert (wrong(latent, grid) - right(latent, grid)).abs().max() > 1e-3


@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_border(interpolation):
    """A coordinate of exactly 1 reads the last cell and sends its gradient there (upstream's 1-NN drops it)."""
    model = make(interpolation=interpolation)
    latent = latents(model, 1).requires_grad_()
    model(latent, torch.ones(1, 2).double()).sum().backward()
    assert latent.grad[0, -1, -1].all() and latent.grad.count_nonzero() == 3


def test_render():
    """Pixels at twice the resolution lie between: each pixel of four times as many is the field at its centre."""
    model = make(latent_size=3)
    latent = latents(model, 2)
    assert torch.equal(model.render(latent), model(latent, model.grid()).view(2, *SIZE, 3))
    large = model.render(latent, (12, 8))
    close(large[:, 7, 2], model(latent, torch.tensor([[2.5 / 8, 7.5 / 12]]).double())[:, 0])
    assert model.render(latent, 5).shape == (2, 5, 5, 3)


def test_taps():
    model, taps = make(modulate="both"), {}
    model(latents(model, 2), model.grid(), taps)
    shapes = {"input": (24, 2)}
    shapes |= {f"modulation/{k:02d}": (2, 2, 2, 16) for k in range(3)} | {
        f"layer/{k:02d}": (2, 24, 8) for k in range(3)
    }
    assert {key: tuple(x.shape) for key, x in taps.items()} == shapes


@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_coordinates_have_gradients(interpolation):
    model = make(interpolation=interpolation)
    xy = (torch.rand(5, 2, generator=torch.Generator().manual_seed(4)).double() * 0.9 + 0.03).requires_grad_()
    assert torch.autograd.gradcheck(lambda xy: model(latents(model, 1), xy), xy)


def test_errors():
    model = make()
    grid, good, target = model.grid(), latents(model, 2), signal(model, 2)
    for call, message in (
        (lambda: model(good[..., :2], grid), r"latent: expected a tensor \(B, 2, 2, 3\)"),
        (lambda: model(good.long(), grid), "latent: expected a floating point dtype"),
        (lambda: model(good, grid[..., :1]), r"coords: expected a tensor \(N, 2\) or \(B=2, N, 2\)"),
        (lambda: model(good, grid.expand(3, -1, -1)), "coords: expected a tensor"),
        (lambda: fit(model, target, order=3), "order: expected 0, 1 or 2"),
        (lambda: fit(model, target[0]), r"target: expected a tensor \(B, N >= 1, C\)"),
        (lambda: fit(model, target[:, 1:]), r"target: expected a tensor \(B, 24, 3\)"),
        (lambda: fit(model, target[..., :2]), r"target: expected a tensor \(B, 24, 3\)"),
        (lambda: fit(model, (target * 255).byte()), "target: expected a floating point dtype"),
        (lambda: fit(model, target, steps=-1), "steps: expected a positive integer"),
        (lambda: fit(model, target, chunk=0), "chunk: expected a positive integer"),
        (lambda: fit(model, target, grid[:, 0]), "coords: expected a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- the inner loop

FITS = [
    {"interpolation": i, "modulate": m, "rates": r}
    for (i, m), r in zip(
        itertools.product(INTERPOLATION, MODULATE), ("none", "one", "pixel", "channel", "full", "full")
    )
] + [
    {"latent_size": 1, "image_size": (9,), "rates": "channel"},
    {"latent_size": 1, "image_size": (2, 3, 2), "modulate": "both", "channels": 1},
    {"modulation_layout": "upstream", "modulate": "both", "interpolation": "linear", "rates": "pixel"},
    {"modulation_layout": "upstream", "latent_size": 1},
]
fits = pytest.mark.parametrize("overrides", FITS, ids=lambda case: "-".join(map(str, case.values())))


@fits
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("batch, chunk", [(2, None), (5, 2)])
def test_fit_is_gradient_descent(overrides, order, batch, chunk):
    """Of more signals than channels the first step is shared; latents and losses are those of plain gradient descent to
    1e-12, outer gradients, which go through all steps back, to 1e-11."""
    model = make(**overrides)
    target, coords = signal(model, batch), model.grid()
    fitted = fit(model, target, order=order, chunk=chunk)
    latent, losses = plain_fit(model, target, coords, max(order, 1))
    assert ((losses[-1] - losses[0]).abs() > 1e-3 * losses[0]).all()
    close(fitted.latent, latent.detach())
    close(fitted.losses, losses.detach())
    close(fitted.loss, losses[-1].detach())
    close(fitted.recon, model(latent, coords).detach())
    assert not fitted.losses.requires_grad
    if order == 0:
        assert not any(x.requires_grad for x in fitted)
        return
    score = lambda latent, loss: (loss * torch.arange(1, batch + 1)).sum() + latent.square().sum()
    want = gradients(model, score(latent, losses[-1]))
    got = gradients(model, score(fitted.latent, fitted.loss))
    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    for name in want:
        close(got[name], want[name], 1e-11)


@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_outer_gradient_is_the_slope(interpolation):
    """Order 2 against differences of losses, along a direction in all parameters."""
    model, step = make(interpolation=interpolation, modulate="both", rates="full"), 2e-6
    target, start = signal(model, 5), [p.detach().clone() for p in model.parameters()]
    grads = gradients(model, fit(model, target, order=2).loss.mean())
    torch.manual_seed(7)
    along = [torch.randn_like(p) for p in start]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, a, b in zip(model.parameters(), start, along):
                p.copy_(a + sign * step * b)
        losses.append(fit(model, target).loss.mean())
    slope = sum((g * a).sum() for g, a in zip(grads.values(), along))
    assert abs((losses[0] - losses[1]) / (2 * step) - slope) <= 1e-7 * abs(slope)


@pytest.mark.parametrize("interpolation", INTERPOLATION)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_signals_larger_than_a_tile(interpolation, order, monkeypatch):
    model = make(interpolation=interpolation, rates="full")
    target = signal(model, 5)
    want = fit(model, target, order=order)
    grads = gradients(model, want.loss.mean()) if order else {}
    monkeypatch.setattr(functa, "_tile", lambda device: 7)
    got = fit(model, target, order=order, chunk=2)
    for a, b in zip(got, want):
        close(a.detach(), b.detach())
    for name, grad in (gradients(model, got.loss.mean()) if order else {}).items():
        close(grad, grads[name])


@pytest.mark.parametrize("order", [0, 2])
def test_coordinates_of_each_signal(order):
    model = make(rates="one")
    coords = torch.rand(5, 6, 2, generator=torch.Generator().manual_seed(5)).double()
    target = signal(model, 5)[:, :6]
    fitted = fit(model, target, coords, order=order, chunk=2)
    latent, losses = plain_fit(model, target, coords, 2)
    close(fitted.latent, latent.detach())
    if order:
        want = gradients(model, losses[-1].sum())
        for name, grad in gradients(model, fitted.loss.sum()).items():
            close(grad, want[name])


def test_steps():
    model = make()
    target = signal(model, 2)
    none = fit(model, target, steps=0, order=2)
    assert not none.latent.any() and none.losses.shape == (1, 2)
    none.loss.sum().backward()
    assert fit(model, target, steps=5).losses.shape == (6, 2)
    empty = fit(model, target[:0])
    assert empty.latent.shape == (0, 2, 2, 3) and empty.losses.shape == (4, 0) and empty.recon.shape == (0, 24, 3)


def test_clipped_rates_stand_still():
    """A rate beyond its range moves latents by the limit and gets no gradient."""
    model = make(rates="pixel", rate_range=(0.0, 0.5))
    with torch.no_grad():
        model.rates.copy_(torch.tensor([[0.6, 0.3], [-0.1, 0.2]])[..., None])
    fitted = fit(model, signal(model, 2), order=2)
    assert not fitted.latent[:, 1, 0].any() and fitted.latent[:, 0].all()
    fitted.loss.sum().backward()
    assert (model.rates.grad[..., 0] != 0).tolist() == [[False, True], [False, True]]


def test_frozen_parameters():
    """Parameters that want no gradient get none; the others get theirs."""
    model = make(rates="one")
    want = gradients(model, fit(model, signal(model, 5), order=2).loss.sum())
    model.layers[1].requires_grad_(False)
    got = gradients(model, fit(model, signal(model, 5), order=2).loss.sum())
    assert want.keys() - got.keys() == {"layers.1.weight", "layers.1.bias"}
    for name, grad in got.items():
        close(grad, want[name])
    model.requires_grad_(False)
    close(fit(model, signal(model, 5)).latent, fit(model, signal(model, 5), order=1).latent)


def test_stale_parameters_are_noticed():
    """The backward pass reads parameters again: an update in between is an error."""
    model = make()
    loss = fit(model, signal(model, 2), order=2).loss.sum()
    with torch.no_grad():
        model.layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_without_gradients(mode):
    model = make()
    want = fit(model, signal(model, 5))
    with mode():
        got = fit(model, signal(model, 5), model.grid())
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("overrides", FITS[::5], ids=str)
def test_eager_backend(overrides):
    model = make(**overrides)
    target = signal(model, 5)
    want = gradients(model, fit(model, target, order=2).loss.sum())
    with use_backend("eager"):
        got = gradients(model, fit(model, target, order=2).loss.sum())
    for name in want:
        close(got[name], want[name], 1e-10)


def test_fit_is_deterministic():
    model = make(torch.float32, rates="full")
    runs = [gradients(model, fit(model, signal(model, 5), order=2).loss.sum()) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_autocast(order):
    """bf16 activations: fp32 results near those of fp32, in the backward pass too; nothing is left behind."""
    model = make(torch.float32, rates="full", hidden_size=32)
    target = signal(model, 5)
    want = fit(model, target, order=order)
    grads = gradients(model, want.loss.mean()) if order else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fit(model, target, order=order)
        again = fit(model, target, order=max(order, 1))  # no cached cast without a graph
    assert all(x.dtype == torch.float32 for x in got)
    assert (got.recon - want.recon).abs().max() < 0.05 and not torch.equal(got.recon, want.recon)
    assert gradients(model, again.loss.mean()).keys() == dict(model.named_parameters()).keys()
    for name, grad in (gradients(model, got.loss.mean()) if order else {}).items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), grads[name].flatten(), 0) > 0.98, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_model(dtype):
    model = make(torch.float32, hidden_size=32)
    want = fit(model, signal(model, 5))
    got = fit(model.to(dtype), signal(model, 5).float())
    assert got.latent.dtype == dtype and got.recon.dtype == torch.float32
    assert (got.recon - want.recon).abs().max() < 0.05


@pytest.mark.parametrize("overrides", FITS[1::3], ids=str)
def test_compile(overrides):
    """One graph, the same numbers, gradients too."""
    torch.compiler.reset()
    model = make(**overrides)
    latent, coords = latents(model, 2), model.grid()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(latent, coords)
    close(compiled(latent, coords), want)
    close_grads = zip(*(gradients(model, f(latent, coords).square().sum()).values() for f in (compiled, model)))
    for a, b in close_grads:
        close(a, b)


def test_fit_of_a_compiled_model():
    model = make(torch.float32)
    want = fit(model, signal(model, 5))
    model.compile(backend="aot_eager")
    close(fit(model, signal(model, 5)).latent, want.latent, 1e-4)


def test_psnr():
    target = torch.rand(3, 20, 2)
    assert torch.allclose(psnr(target + 0.1, target), torch.full((3,), 20.0))
    assert psnr(target, target).tolist() == [math.inf] * 3


def test_a_picture_is_learnt():
    """A few outer steps of Adam with default options: second order beats no training by 3 dB."""
    torch.manual_seed(0)
    model = Functa(Config(hidden_size=32, num_layers=3, image_size=8, latent_size=2, latent_channels=8, rates="full"))
    waves, grid = 6 * torch.rand(16, 1, 3, 3), model.grid()[:, :, None]
    pictures = 0.5 + 0.4 * torch.sin(waves[:, :, 0] * grid[:, 0] + waves[:, :, 1] * grid[:, 1] + waves[:, :, 2])
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = psnr(fit(model, pictures).recon, pictures).mean()
    for _ in range(30):
        adam.zero_grad()
        fit(model, pictures, order=2).loss.mean().backward()
        adam.step()
    assert psnr(fit(model, pictures).recon, pictures).mean() > first + 3


# ---- checkpoints


def test_save_and_load(tmp_path):
    model = make(torch.float32, rates="pixel", interpolation="linear", modulate="both")
    model.save_pretrained(tmp_path)
    loaded = Functa.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert isinstance(loaded.rates, nn.Parameter)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rates": "none"}))
    with pytest.raises(CheckpointError, match="unknown rates"):
        Functa.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"modulate": "twist"}))
    with pytest.raises(CheckpointError, match="modulate: expected one of"):
        Functa.from_pretrained(tmp_path)


# ---- memory

STEPS = """
import sys, torch
from fourdperf.cli.measure import peak_memory
from fourdperf.models.functa import Config, Functa, fit
torch.set_num_threads(2)
model = Functa(Config(interpolation=sys.argv[1], rates="full"))
adam = torch.optim.Adam(model.parameters())
print(peak_memory() / 2**20)
for batch in map(int, sys.argv[2:]):
    adam.zero_grad()
    fit(model, torch.rand(batch, 1024, 3), order=2).loss.mean().backward()
    adam.step()
    print(peak_memory() / 2**20)
"""


def peaks(interpolation, *batches):
    """MB that a process has held at most before and after each training step of so many signals of 32 x 32 x 3 with the
    default sizes."""
    command = [sys.executable, "-c", STEPS, interpolation, *map(str, batches)]
    return list(map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_memory_of_a_signal(interpolation):
    """Less than 100 MB each, and less than 40 beyond those that a step works on together."""
    none, four, eight = peaks(interpolation, 4, 8)
    assert (eight - four) / 4 < 40
    assert 0 < (four - none) / 4 < 100


@pytest.mark.heavy
@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_memory_of_a_training_step(interpolation):
    assert peaks(interpolation, 16)[-1] < 1500
