"""Neural Isometries: the operator at the original's sizes, the projection in it, and a step of training.

    OPENBLAS_NUM_THREADS=1 fourdperf bench niso

Peers: the Flax mirror under jax.jit from the same weights, and the same torch model with torch.linalg.svd for its
rotations. The second field is the first, rolled around, and noise. A training step is that of niso.hmnist_encode with
the original's loss and weights; what is compared is the first step's loss and the gradient's norm. See benchmarks/procrustes.py for
the setting of JAX's SVD. Floor: matrix products, 6 n^3 multiply-adds for a rotation and 12 with its gradient.
"""

import functools
from unittest import mock

import torch
from fourdperf.benchmarks.harness import Case, jax_why_not
from fourdperf.benchmarks.procrustes import rotation_case

from fourdperf.cli.train_niso import EXPERIMENTS
from fourdperf.models import niso
from fourdperf.models.niso import Autoencoder, Config, IsometricOperator
from fourdperf.ops import procrustes
from fourdperf.train.niso_loss import encode_loss, parameter_groups

OPERATORS = {  # batch, points, channels, functions
    "operator_iso, op_dim 256, 16x16 points, 266 channels, batch 16": (16, (16, 16), 266, 256),
    "operator_iso, op_dim 128, 36x36 points, 128 channels, batch 4": (4, (36, 36), 128, 128),
}
PROJECTION = 4, 256
BATCH, SIZE = 16, 24  # of a training step
ALPHA, BETA, LR, WEIGHT_DECAY, CLIP = 0.5, 0.1, 1e-3, 1e-4, 1.0
by_svd = functools.partial(mock.patch.object, niso, "procrustes", functools.partial(procrustes, backend="eager"))


def cases(device: str):
    for name, sizes in OPERATORS.items():
        for backward in (False, True):
            yield _operator(name, device, backward, *sizes)
    for backward in (False, True):
        yield _projection(device, backward)
    yield _training(device)


# ---- the operator


def _operator(name: str, device: str, backward: bool, batch: int, grid: tuple[int, int], channels: int, k: int) -> Case:
    torch.manual_seed(0)
    operator = IsometricOperator(k, grid[0] * grid[1], clustered=True).to(device)
    with torch.no_grad():
        operator.M.uniform_(0.8, 1.2)
    a = torch.randn(batch, *grid, channels, device=device)
    b = (a.roll((3, 2), (1, 2)) + 0.5 * torch.randn_like(a)).flatten(1, 2)
    a, weight = a.flatten(1, 2).requires_grad_(backward), torch.randn(batch, k, k, device=device)
    b.requires_grad_(backward)
    wanted = (*operator.parameters(), a, b)

    def ours():
        with torch.set_grad_enabled(backward):
            tau = operator.isometry(a, b, operator.basis())
            return (tau, *torch.autograd.grad((tau * weight).sum(), wanted)) if backward else tau

    def svd():
        with by_svd():
            return ours()

    points, times = a.shape[1], 3 if backward else 1
    products = times * 2 * batch * k * channels * (2 * points + k)
    return Case(
        "niso",
        name,
        "float32",
        {
            "fourdperf": ours,
            "torch.linalg.svd": svd,
            "JAX jit": _jax(_flax_operator, wanted, operator, weight, backward),
        },
        flops=products + 2 * (batch * k**3 + points * k**2) * (12 if backward else 6),
        tolerance=1e-2,
        direction="forward+backward" if backward else "forward",
    )


def _flax_operator(jax, flax, wanted, operator, weight, backward):
    k, points = operator.Phi.shape[1], len(operator.M)
    module = flax.IsometricOperator(k, points, clustered=True)

    def isometry(m, phi, values, a, b):
        bound = module.bind({"params": {"M": m, "Phi": phi, "Lambda": values}})
        return bound.isometry(a, b, bound.basis())

    return _with_gradient(jax, isometry, wanted, weight, backward)


def _projection(device: str, backward: bool) -> Case:
    batch, n = PROJECTION
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(batch, n, n, generator=generator).to(device) for _ in range(2))
    return rotation_case("niso", f"projection of {batch} x {n}^2", x, weight, backward, tolerance=5e-2)


def _with_gradient(jax, function, wanted, weight, backward):
    """function(*wanted), or with it the gradient of sum(weight function) in all of `wanted`, jitted."""
    arrays, weight = [_array(jax, x) for x in wanted], _array(jax, weight)
    if not backward:
        forward = jax.jit(function)
        return lambda: forward(*arrays)
    pair = lambda weight, *args: (lambda out: ((out * weight).sum(), out))(function(*args))
    both = jax.jit(jax.value_and_grad(pair, tuple(range(1, len(arrays) + 1)), has_aux=True))
    return lambda: (lambda value, gradient: (value[1], *gradient))(*both(weight, *arrays))


# ---- a training step


def _training(device: str) -> Case:
    torch.manual_seed(0)
    config = Config(image_size=SIZE, channels=1, **EXPERIMENTS["hmnist_encode"].small)
    a = torch.rand(BATCH, SIZE, SIZE, 1, device=device)
    b = a.roll((2, 1), (1, 2))
    models = [Autoencoder(config).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    jitted = _jax(_flax_training, (a, b), models[0])
    ours, other = (_steps(model, a, b) for model in models)

    def svd():
        with by_svd():
            return other()

    providers = {"fourdperf": ours, "torch.linalg.svd": svd, "JAX jit": jitted}
    return Case(
        "niso",
        f"training step of hmnist_encode, {BATCH} pairs {SIZE}x{SIZE}",
        "float32",
        providers,
        tolerance=1e-3,
        direction="step",
    )


def _steps(model: Autoencoder, a: torch.Tensor, b: torch.Tensor):
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, fused=True)

    def step():
        optimizer.zero_grad()
        loss = encode_loss(model(a, b), a, b, alpha=ALPHA, beta=BETA)["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach(), norm

    return step


def _flax_training(jax, flax, pair, model):
    import optax

    network = flax.Autoencoder(model.config)
    params = flax.flax_params({key: x.detach().cpu() for key, x in model.state_dict().items()}, model.config)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: not (path[0].key == "kernel" and path[-1].key in ("M", "Lambda")), params
    )
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=WEIGHT_DECAY, mask=decayed))
    pair = [_array(jax, x) for x in pair]
    kept = [params, optimizer.init(params)]

    def loss(params):
        return flax.encode_loss(network.apply({"params": params}, *pair), *pair, alpha=ALPHA, beta=BETA)["loss"]

    @jax.jit
    def update(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, optax.global_norm(gradient)

    def step():
        *kept[:], value, norm = update(*kept)
        return value, norm

    return step


# ---- JAX


def _array(jax, x: torch.Tensor):
    return jax.numpy.asarray(x.detach().cpu().numpy())


def _jax(make, tensors, *args):
    """make(jax, the mirror, tensors, *args), or why there is none."""
    if why_not := jax_why_not(tensors[0].device.type, "flax"):
        return why_not
    import jax

    from fourdperf.jax.models import niso as flax

    return make(jax, flax, tensors, *args)
