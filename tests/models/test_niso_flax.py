"""Neural Isometries in Flax: the original's numbers, PyTorch against it layer by layer, losses and gradients."""

import pytest
import torch

from fourdperf.convert.flax_tree import flat
from fourdperf.convert.niso import load_tree
from fourdperf.models.checkpoint import CheckpointError
from fourdperf.models.niso import MODELS
from fourdperf.train import niso_loss
from tests.models.niso_cases import LIVE, Case, build, in_flax, inputs, loss, targets
from tests.models.scaling4d_cases import TOLERANCE, difference

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
flax_niso = pytest.importorskip("fourdperf.jax.models.niso")


def jit(function):
    """Compiled fast rather than to fast code."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def to_flax(model):
    module = flax_niso.FLAX_MODELS[model.config.kind](model.config)
    return module, {"params": flax_niso.flax_params(model.state_dict(), model.config)}


def numpy(tensors):
    return tuple(x.numpy() for x in tensors)


# ---- the original's numbers


def check_tree(case, prefix, tree, stored):
    for key, x in flat(tree).items():
        if f"{prefix}{key}" in case.spec["noise_only_keys"]:
            continue
        case.check(f"{prefix}{key}", jax.device_get(x), stored[key]) if stored[key].any() else not x.any()


@pytest.mark.parametrize("name", ["laplacian_loss_partial_rank", "hmnist_pred_loss"])
def test_the_originals_losses(name):
    """The original's own tree, as it is, under the model."""
    case = Case(name)
    sizes, pairs = case.model, name != "hmnist_pred_loss"
    options = {"image_size": (sizes["H"], sizes["W"]), "channels": sizes["C"]}
    torch_model = load_tree(case.tree(), options)
    model = flax_niso.FLAX_MODELS[torch_model.config.kind](torch_model.config)
    variables = {"params": flax_niso.nested(case.tree())}
    x = case.inputs["x"]
    pair = (x, case.inputs["Tx"]) if "Tx" in case.inputs else (x[0::2], x[1::2])
    given = numpy(pair if pairs else (x,))

    def value(variables):
        found = model.apply(variables, *given)
        if not pairs:
            return flax_niso.classification_loss(found, case.inputs["labels"].numpy())["loss"]
        weights = {key: sizes[key] for key in ("alpha", "beta") if key in sizes}
        function = flax_niso.encode_loss if "alpha" in sizes else flax_niso.laplacian_loss
        return function(found, *given, **weights)["loss"]

    value, grads = jit(jax.value_and_grad(value))(variables)
    case.check("out/loss", jax.device_get(value))
    stored = {key.removeprefix("params/"): x for key, x in case.grads.items()}
    check_tree(case, "grad/params/", grads["params"], stored)


# ---- PyTorch against Flax


@pytest.mark.parametrize("name", LIVE)
def test_torch_matches_flax(name):
    """Layer by layer, the loss and its parts, and the gradient in every parameter."""
    model = build(name)
    flax_model, variables = to_flax(model)
    given, wanted, taps = inputs(model), targets(model), {}
    found = model(*given, taps)
    parts = loss(found, model, niso_loss, wanted)
    parts["loss"].backward()

    @jit
    def reference(variables, given, wanted):
        def value(variables):
            taps = {}
            found = flax_model.apply(variables, *given, taps)
            parts = loss(found, model, flax_niso, wanted)
            return parts["loss"], (found, parts, taps)

        return jax.grad(value, has_aux=True)(variables)

    grads, (flax_found, flax_parts, flax_taps) = reference(variables, numpy(given), numpy(wanted))
    assert set(taps) == set(flax_taps) and len(taps) >= 3
    for key, x in taps.items():
        assert difference(x, flax_taps[key]) <= TOLERANCE, key
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(flax_found), strict=True):
        assert difference(a, b) <= TOLERANCE
    assert set(parts) == set(flax_parts)
    for key, x in parts.items():
        assert difference(x, flax_parts[key]) <= TOLERANCE, key
    ours = in_flax(model, {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in model.named_parameters()})
    theirs = flat(grads["params"])
    assert set(ours) == set(theirs)
    largest = max(abs(x).max() for x in ours.values())
    for key, x in theirs.items():
        assert abs(ours[key] - x).max() <= 5 * TOLERANCE * largest, key


@pytest.mark.parametrize("name", LIVE)
def test_flax_has_the_same_parameters(name):
    model = build(name)
    flax_model, variables = to_flax(model)
    shapes = jax.eval_shape(lambda key: flax_model.init(key, *numpy(inputs(model))), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_flax_starts_alike():
    model = build("classifier")
    flax_model, _ = to_flax(model)
    made = jit(lambda key: flax_model.init(key, *numpy(inputs(model))))(jax.random.key(0))
    torch.manual_seed(3)
    start = in_flax(model, MODELS[model.config.kind](model.config).state_dict())
    for key, x in flat(made["params"]).items():
        if start[key].std() < 1e-6:
            assert abs(x - start[key]).max() == 0, key
        elif x.size > 40:
            assert abs(x.std() - start[key].std()) <= 0.5 * start[key].std(), key


def test_equal_training():
    """Five steps of Adam from the same parameters."""
    model = build("operator alone, few functions")
    flax_model, variables = to_flax(model)
    given, adam = inputs(model), torch.optim.Adam(model.parameters(), 1e-2)
    optimizer = optax.adam(1e-2)
    state = flax_niso.State(variables["params"], optimizer.init(variables["params"]))
    value = lambda params, *pair: flax_niso.laplacian_loss(flax_model.apply({"params": params}, *pair), *pair, beta=0.5)
    step = jit(lambda state, *pair: flax_niso.train_step(value, optimizer, state, *pair))
    for _ in range(5):
        adam.zero_grad()
        parts = niso_loss.laplacian_loss(model(*given), *given, beta=0.5)
        parts["loss"].backward()
        adam.step()
        state, theirs = step(state, *numpy(given))
        assert difference(parts["loss"], theirs["loss"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["autoencoder", "classifier", "pose"])
def test_flax_reads_what_torch_saves(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    flax_model, variables = flax_niso.from_pretrained(tmp_path)
    assert flax_model.config == model.config
    given = inputs(model)
    ours, theirs = model(*given), jit(flax_model.apply)(variables, *numpy(given))
    assert difference(jax.tree.leaves(ours)[-1], jax.tree.leaves(theirs)[-1]) <= TOLERANCE
    (tmp_path / "config.json").write_text('{"model": "niso", "kind": "svm"}')
    with pytest.raises(CheckpointError, match="kind: expected one of autoencoder, classifier, pose, got 'svm'"):
        flax_niso.from_pretrained(tmp_path)
