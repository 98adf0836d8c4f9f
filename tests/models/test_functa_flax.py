"""Functa in Flax: the seed's numbers, PyTorch against it layer by layer, the inner loop and outer gradients."""

import pytest
import torch

from fourdperf.convert.flax_tree import flat
from fourdperf.convert.functa import load_tree, table
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.functa import Config, Functa, fit, psnr
from tests.models.functa_cases import Case, names
from tests.models.scaling4d_cases import TOLERANCE, difference

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
flax_functa = pytest.importorskip("fourdperf.jax.models.functa")

SMALL = {
    **{"hidden_size": 12, "num_layers": 3, "image_size": (6, 10), "latent_size": 3, "latent_channels": 5},
    **{"inner_rate": 0.3, "inner_steps": 2, "omega_0": 8.0},
}
LIVE = {
    "nearest, shift": {},
    "nearest, scale, one channel": {"modulate": "scale", "channels": 1},
    "linear, both": {"interpolation": "linear", "modulate": "both"},
    "rates of pixels": {"rates": "pixel", "rate_multiplier": 3.0},
    "rates of channels, not clipped": {"rates": "channel", "rate_range": None, "interpolation": "linear"},
    "all rates, clipped": {"rates": "full", "rate_range": (0.02, 0.06)},
    "upstream, nearest, both": {"modulation_layout": "upstream", "modulate": "both", "transposed_grid": True},
    "upstream, linear": {"modulation_layout": "upstream", "interpolation": "linear", "rates": "one"},
    "one cell": {"latent_size": 1, "modulate": "both", "rates": "full"},
    "one cell, linear, upstream": {"latent_size": 1, "interpolation": "linear", "modulation_layout": "upstream"},
    "a time series": {"latent_size": 1, "image_size": (15,), "channels": 2, "rates": "channel"},
    "voxels": {"latent_size": 1, "image_size": (3, 4, 5), "channels": 1, "modulate": "scale"},
}


def build(name):
    """A model with biases, and its latents of random numbers, targets and coordinates."""
    torch.manual_seed(0)
    config = Config(**{**SMALL, **LIVE[name]})
    model = Functa(config).eval()
    for key, x in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(x, std=0.1)
    coords = model.grid()
    return model, 0.3 * torch.randn(3, *config.latent_shape), torch.rand(3, len(coords), config.channels), coords


def to_flax(model):
    return flax_functa.Functa(model.config), {"params": flax_functa.flax_params(model.state_dict(), model.config)}


def in_flax(model, tensors):
    """Tensors by our names -> arrays by Flax's paths."""
    return {
        name: part
        for row in table(model.config)
        if row.key in tensors
        for (name, _), part in zip(row.sources, row.unpack(tensors[row.key].detach().numpy()))
    }


def check_gradients(model, tree):
    """The parameters' gradients against a tree of Flax's, each to a share of the largest of its kind."""
    grads = {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in model.named_parameters()}
    ours, theirs = in_flax(model, grads), flat(tree["params"])
    assert ours.keys() == theirs.keys()
    largest = max(abs(x).max() for name, x in ours.items() if not name.startswith("lrs"))
    for name, x in ours.items():
        scale = abs(x).max() if name.startswith("lrs") else largest
        assert abs(x - theirs[name]).max() <= 5 * TOLERANCE * scale, name


# The seed's numbers


def golden(case):
    """The port's own tree, as it is, under the model."""
    params = flax_functa.nested({name: x.numpy() for name, x in case.params.items()})
    return flax_functa.Functa(case.config), {"params": params}


def check(case, key, got, want=None):
    case.check(key, torch.from_numpy(jax.device_get(got).copy()), want)


@pytest.mark.parametrize("name", names("siren_"))
def test_the_seeds_field(name):
    case = Case(name)
    model, variables = golden(case)
    latent, coords, weight = (case.inputs[key].numpy() for key in ("latent", "coords", "weight"))

    def loss(variables, latent):
        recon = model.apply(variables, latent[None], coords)[0]
        return (recon * weight).sum(), recon

    (grads, grad), recon = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, latent)
    check(case, "out/recon", recon)
    check(case, "grad/latent", grad)
    for key, x in flat(grads["params"]).items():
        if key == "lrs/lrs":
            assert not x.any()
        else:
            check(case, f"grad/params/{key}", x)


@pytest.mark.parametrize("name", names("inner_fit_"))
def test_the_seeds_inner_loop(name):
    case = Case(name)
    model, variables = golden(case)
    coords, target = case.inputs["coords"].numpy(), case.inputs["target"].numpy()

    def outer(variables):
        fitted = flax_functa.fit(model, variables, target, coords[0], order=2)
        return fitted.loss.mean(), fitted

    grads, fitted = jax.jit(jax.grad(outer, has_aux=True))(variables)
    for key in ("latent", "loss", "recon"):
        check(case, f"out/{key}", getattr(fitted, key))
    check(case, "out/loss_after_k_steps", fitted.losses)
    check(case, "out/psnr", flax_functa.psnr(fitted.recon, target).mean())
    for key, x in flat(grads["params"]).items():
        check(case, f"grad/params/{key}", x)


@pytest.mark.parametrize("name", names("trajectory_"))
def test_the_seeds_training(name):
    case = Case(name)
    model, variables = golden(case)
    train, coords = case.spec["train"], case.inputs["coords"][0].numpy()
    clip = [optax.clip_by_global_norm(train["clip_grads"])] if "clip_grads" in train else []
    parts = train.get("num_minibatches", 1)
    adam = optax.chain(*clip, optax.adam(train["outer_lr"]))
    optimizer = optax.MultiSteps(adam, parts) if parts > 1 else adam
    state = flax_functa.State(variables["params"], optimizer.init(variables["params"]))
    step = jax.jit(lambda state, target: flax_functa.train_step(model, optimizer, state, target, coords))
    for index in range(case.spec["steps"]):
        totals = {"loss": 0.0, "psnr": 0.0}
        for target in case.inputs["target"].chunk(parts):
            state, metrics = step(state, target.numpy())
            totals = {key: totals[key] + x for key, x in metrics.items()}
        for key, x in totals.items():
            check(case, f"out/{key}", x, case.outputs[key][index])
    for key, x in flat(state.params).items():
        check(case, f"out/final/{key}", x)


# PyTorch against Flax


@pytest.mark.parametrize("name", LIVE)
def test_torch_matches_flax_layer_by_layer(name):
    model, latent, _, coords = build(name)
    flax_model, variables = to_flax(model)
    assert difference(coords, flax_model.grid()) <= 1e-6
    ours = {}
    recon = model(latent, coords, ours)

    @jax.jit
    def apply(variables, latent, coords):
        taps = {}
        return flax_model.apply(variables, latent, coords, taps), taps

    reference, theirs = apply(variables, latent.numpy(), coords.numpy())
    layers = range(model.config.num_layers - 1)
    assert sorted(ours) == sorted(theirs)
    assert set(ours) == {"input", *(f"{x}/{i:02d}" for x in ("modulation", "layer") for i in layers)}
    for tap in ours:
        assert difference(ours[tap], theirs[tap]) <= TOLERANCE, tap
    assert difference(recon, reference) <= TOLERANCE


@pytest.mark.parametrize("name", ["nearest, shift", "linear, both", "voxels"])
def test_points_of_each_signals_own(name):
    model, latent, _, _ = build(name)
    coords = torch.rand(3, 7, model.config.axes)
    flax_model, variables = to_flax(model)
    reference = jax.jit(flax_model.apply)(variables, latent.numpy(), coords.numpy())
    assert difference(model(latent, coords), reference) <= TOLERANCE
    target = torch.rand(3, 7, model.config.channels)
    fitted = jax.jit(lambda *x: flax_functa.fit(flax_model, *x))(variables, target.numpy(), coords.numpy())
    assert difference(fit(model, target, coords).latent, fitted.latent) <= TOLERANCE


@pytest.mark.parametrize("name, size", [("nearest, shift", (9, 4)), ("linear, both", (12, 20)), ("voxels", 2)])
def test_other_resolutions(name, size):
    model, latent, _, _ = build(name)
    flax_model, variables = to_flax(model)
    ours, theirs = model.render(latent, size), flax_model.apply(variables, latent.numpy(), size, method="render")
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(
    "name, order", [*((name, 2) for name in LIVE), ("all rates, clipped", 1), ("upstream, nearest, both", 1)]
)
def test_fit_and_outer_gradients_match(name, order):
    model, _, target, _ = build(name)
    fitted = fit(model, target, order=order)
    (fitted.loss.mean() + psnr(fitted.recon, target).mean() / 100).backward()
    flax_model, variables = to_flax(model)

    def outer(variables):
        fitted = flax_functa.fit(flax_model, variables, target.numpy(), order=order)
        return fitted.loss.mean() + flax_functa.psnr(fitted.recon, target.numpy()).mean() / 100, fitted

    grads, reference = jax.jit(jax.grad(outer, has_aux=True))(variables)
    for field in fitted._fields:
        assert difference(getattr(fitted, field), getattr(reference, field)) <= TOLERANCE, field
    check_gradients(model, grads)


def test_the_order_changes_the_gradient_and_nothing_else():
    model, _, target, _ = build("rates of pixels")
    flax_model, variables = to_flax(model)
    results = {}
    for order in (0, 1, 2):
        loss = lambda variables, order=order: flax_functa.fit(
            flax_model, variables, target.numpy(), order=order
        ).loss.sum()
        results[order] = jax.jit(jax.value_and_grad(loss))(variables)
    values = [float(value) for value, _ in results.values()]
    assert max(values) - min(values) <= TOLERANCE * max(values)
    first, second = (flat(results[order][1]["params"]) for order in (1, 2))
    assert not any(x.any() for x in flat(results[0][1]["params"]).values())
    assert (
        first["lrs/lrs"].any()
        and difference(first["kernel_net_0/linear/kernel"], second["kernel_net_0/linear/kernel"]) > 0.01
    )
    with pytest.raises(ValueError, match="order: expected 0, 1 or 2, got 3"):
        flax_functa.fit(flax_model, variables, target.numpy(), order=3)


@pytest.mark.parametrize("name", LIVE)
def test_flax_initialises_the_same_parameters(name):
    model, latent, _, coords = build(name)
    flax_model, variables = to_flax(model)
    made = jax.eval_shape(flax_model.init, jax.random.key(0), latent.numpy(), coords.numpy())
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)


@pytest.mark.parametrize("name", ["linear, both", "all rates, clipped", "voxels"])
def test_flax_initialises_parameters_to_the_same_size(name):
    model, latent, _, coords = build(name)
    flax_model = flax_functa.Functa(model.config)
    made = jax.jit(flax_model.init)(jax.random.key(0), latent.numpy(), coords.numpy())
    start = in_flax(model, Functa(model.config).state_dict())
    for key, x in flat(made["params"]).items():
        if key == "lrs/lrs":
            assert 0.005 <= x.min() <= x.max() <= 0.1
        else:
            assert abs(x.std() - start[key].std()) <= 0.5 * start[key].std(), key


def test_flax_reads_what_torch_saves(tmp_path):
    model, latent, _, coords = build("linear, both")
    model.save_pretrained(tmp_path)
    flax_model, variables = flax_functa.from_pretrained(tmp_path)
    assert flax_model.config == model.config
    assert difference(model(latent, coords), flax_model.apply(variables, latent.numpy(), coords.numpy())) <= TOLERANCE
    again = load_tree(flat(jax.device_get(variables["params"])), model.config.to_dict())
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    (tmp_path / "config.json").write_text('{"model": "functa", "modulate": "neither"}')
    with pytest.raises(CheckpointError, match="modulate: expected one of shift, scale, both, got 'neither'"):
        flax_functa.from_pretrained(tmp_path)
