"""Functa at its default config, 16 images of 32 x 32: the inner loop, and a step of meta-learning.

    fourdperf bench functa

Peers: the Flax mirror under jax.jit, which is given the same weights. Floor: FLOPs of the matrix products that a plain
implementation makes (forward and backward of three steps, a last forward) at the measured matmul rate; ours makes
fewer, since all signals share the first step's field.
"""

import torch
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.models.functa import Config, Functa, fit

BATCH = 16


def cases(device: str):
    for interpolation in ("nearest", "linear"):
        torch.manual_seed(0)
        model = Functa(Config(interpolation=interpolation, rates="full")).to(device)
        target = torch.rand(BATCH, model.grid().shape[0], model.config.channels, device=device)
        yield _inner(model, target)
        yield _outer(model, target)


def _inner(model: Functa, target: torch.Tensor) -> Case:
    return Case(
        "functa",
        f"fit of {BATCH} images 32x32, 3 steps, {model.config.interpolation}",
        "float32",
        {
            "fourdperf": lambda: fit(model, target)[:2],
            "JAX jit": _jax(model, target, lambda jax, flax, network: lambda v, y: flax.fit(network, v, y)[:2]),
        },
        flops=7 * flops(model.config),
        tolerance=1e-3,
    )


def _outer(model: Functa, target: torch.Tensor) -> Case:
    names, parameters = zip(*model.named_parameters())

    def ours():
        loss = fit(model, target, order=2).loss.mean()
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters)))
        return loss, gradients["layers.1.weight"]

    def theirs(jax, flax, network):
        loss = lambda v, y: flax.fit(network, v, y, order=2).loss.mean()
        return jax.value_and_grad(loss)

    peer = _jax(model, target, theirs)
    if not isinstance(peer, str):
        both = peer
        peer = lambda: (lambda loss, tree: (loss, tree["params"]["kernel_net_1"]["linear"]["kernel"].T))(*both())
    return Case(
        "functa",
        f"outer gradient, second order, {BATCH} images 32x32, {model.config.interpolation}",
        "float32",
        {"fourdperf": ours, "JAX jit": peer},
        flops=21 * flops(model.config),
        tolerance=1e-2,
        direction="forward+backward",
    )


def flops(config: Config) -> int:
    """Of the hidden matrix products of one forward pass of the batch."""
    points = BATCH * config.image_size[0] * config.image_size[1]
    return 2 * points * config.hidden_size**2 * (config.num_layers - 2)


def _jax(model: Functa, target: torch.Tensor, make):
    if why_not := jax_why_not(target.device.type, "flax"):
        return why_not
    import jax

    from fourdperf.jax.models import functa as flax

    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    variables = {"params": flax.flax_params(state, model.config)}
    function = jax.jit(make(jax, flax, flax.Functa(model.config)))
    y = jax.numpy.asarray(target.cpu().numpy())
    return lambda: function(variables, y)
