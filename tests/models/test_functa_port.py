"""Functa against the numbers of the JAX port "spatial_functa": field, inner loop, training, metric and grids."""

import pytest
import torch
import torch.nn.functional as F

from fourdperf.models.functa import Config, Functa, fit, psnr
from tests.models.functa_cases import Case, names


@pytest.mark.parametrize("name", names("siren_"))
def test_port_field(name):
    """Values, what is inside, and the gradient in every parameter and the latent."""
    case = Case(name)
    model, latent, coords = case.model(), case.inputs["latent"][None].requires_grad_(), case.inputs["coords"]
    config, taps = model.config, {}
    recon = model(latent, coords, taps)
    case.check("out/recon", recon[0])
    if "modulation_map" in case.outputs:
        case.check("out/modulation_map", F.linear(latent[0], model.modulation.weight, model.modulation.bias))
        case.check("out/first_layer_pre_modulation", model.layers[0](taps["input"]))
        maps = torch.stack([taps[f"modulation/{layer:02d}"][0, 0] for layer in range(config.num_layers - 1)])
        kinds = ("scale", "shift") if config.modulate == "both" else (config.modulate,)
        for kind, part in zip(kinds, maps.chunk(len(kinds), -1)):
            case.check(f"out/modulation_{kind}", part + 1 if kind == "scale" else part)
    (recon[0] * case.inputs["weight"]).sum().backward()
    case.check("grad/latent", latent.grad[0])
    grads = {key: p.grad for key, p in model.named_parameters()}
    if "rates" in grads:
        assert not case.grads["params/lrs/lrs"].any() and grads.pop("rates") is None
        case.grads.pop("params/lrs/lrs")
    case.check_all("grad/params/", grads)


@pytest.mark.parametrize("chunk", [1, None])
@pytest.mark.parametrize("name", names("inner_fit_"))
def test_port_inner_loop(name, chunk):
    """All steps, and the exact outer gradient in every parameter, rates included."""
    case = Case(name)
    model, target, coords = case.model(), case.inputs["target"], case.inputs["coords"][0]
    assert torch.equal(case.inputs["coords"], coords.expand_as(case.inputs["coords"]))
    assert (coords - model.grid()).abs().max() <= 1e-7
    fitted = fit(model, target, coords, order=2, chunk=chunk)
    for key in ("latent", "loss", "recon"):
        case.check(f"out/{key}", getattr(fitted, key))
    case.check("out/loss_after_k_steps", fitted.losses)
    for steps, latent in enumerate(case.outputs["latent_after_k_steps"]):
        case.check("out/latent_after_k_steps", fit(model, target, coords, steps=steps, chunk=chunk).latent, latent)
    case.check("out/mean_loss", fitted.loss.mean())
    case.check("out/mse", (fitted.recon - target).square().mean())
    case.check("out/psnr", psnr(fitted.recon, target).mean())
    fitted.loss.mean().backward()
    case.check_all("grad/params/", {key: p.grad for key, p in model.named_parameters()})


@pytest.mark.parametrize("name", names("trajectory_"))
def test_port_training(name):
    """Five steps of Adam, of clipped gradients and of minibatches too: losses, PSNR and where the parameters end."""
    case = Case(name)
    model, train = case.model(), case.spec["train"]
    target, coords = case.inputs["target"], case.inputs["coords"][0]
    adam = torch.optim.Adam(model.parameters(), lr=train["outer_lr"], betas=(0.9, 0.999), eps=1e-8)
    parts = target.chunk(train.get("num_minibatches", 1))
    for step in range(case.spec["steps"]):
        adam.zero_grad()
        loss, decibel = 0, 0
        for part in parts:
            fitted = fit(model, part, coords, order=2)
            (fitted.loss.mean() / len(parts)).backward()
            loss, decibel = loss + fitted.loss.mean(), decibel + psnr(fitted.recon, part).mean()
        case.check("out/loss", loss, case.outputs["loss"][step])
        case.check("out/psnr", decibel, case.outputs["psnr"][step])
        if "clip_grads" in train:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_grads"])
        adam.step()
    case.check_all("out/final/", dict(model.state_dict()))


def test_port_psnr():
    case = Case("psnr")
    case.check("out/psnr", psnr(case.inputs["image"], case.inputs["ground_truth"]))


@pytest.mark.parametrize("size", [(4, 4), (28, 28), (32, 32), (3, 5)], ids=str)
def test_port_grid(size):
    """Pixel centres, upstream's in (row, column)."""
    case, key = Case("coords"), f"centers_{size[0]}x{size[1]}"
    for config, flip in ((Config.upstream(image_size=size), False), (Config(image_size=size), True)):
        grid = Functa(config).grid().unflatten(0, size)
        case.check(f"out/{key}", grid.flip(-1) if flip else grid)
