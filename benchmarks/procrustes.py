"""procrustes: 16 matrices of the sizes of Neural Isometries' operators, with prescribed singular values.

    OPENBLAS_NUM_THREADS=1 fourdperf bench procrustes

Peers: torch.linalg.svd and the same gradient formula (the eager backend), and the JAX mirror under jit. On two busy cores
JAX's SVD, of SciPy's OpenBLAS, takes 100 times as long with more than one thread, hence the setting. Floor: n^3
multiply-adds times 6 forward and 12 in all, see csrc/procrustes/procrustes_cpu.cpp.
"""

import torch
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops import procrustes

BATCH, SIZES, CONDITION = 16, (32, 128, 256), 100.0


def cases(device: str):
    for n in SIZES:
        for backward in (False, True):
            yield _case(n, device, backward)


def _case(n: int, device: str, backward: bool) -> Case:
    generator = torch.Generator().manual_seed(n)
    u, v = (torch.linalg.qr(torch.randn(BATCH, n, n, generator=generator)).Q for _ in range(2))
    x = (u * torch.logspace(0, -torch.tensor(CONDITION).log10().item(), n)) @ v.mT
    weight = torch.randn(BATCH, n, n, generator=generator)
    name = f"{BATCH} rotations of {n} x {n}, condition {CONDITION:g}"
    return rotation_case("procrustes", name, x.to(device), weight.to(device), backward, tolerance=1e-2)


def rotation_case(op: str, name: str, x: torch.Tensor, weight: torch.Tensor, backward: bool, tolerance: float) -> Case:
    """The nearest rotations to x (B, n, n), or with them the gradient of sum(weight rotations)."""
    x = x.requires_grad_(backward)

    def torch_case(backend):
        def run():
            with torch.set_grad_enabled(backward):
                out = procrustes(x, special=True, backend=backend)
                return (out, *torch.autograd.grad((out * weight).sum(), x)) if backward else out

        return run

    return Case(
        op,
        name,
        "float32",
        {
            "fourdperf": torch_case(None),
            "torch.linalg.svd": torch_case("eager"),
            "JAX jit": _jax(x.detach(), weight, backward),
        },
        flops=2 * len(x) * x.shape[-1] ** 3 * (12 if backward else 6),
        tolerance=tolerance,
        direction="forward+backward" if backward else "forward",
    )


def _jax(x: torch.Tensor, weight: torch.Tensor, backward: bool):
    if why_not := jax_why_not(x.device.type):
        return why_not
    import jax

    from fourdperf.jax.ops import procrustes as mirror

    function = lambda x: mirror(x, special=True, backend="jnp")
    if backward:
        pair = lambda x, weight: (lambda out: ((out * weight).sum(), out))(function(x))
        both = jax.jit(jax.value_and_grad(pair, has_aux=True))
        run = lambda x, weight: (lambda value, gradient: (value[1], gradient))(*both(x, weight))
    else:
        run = jax.jit(lambda x, weight: function(x))
    arrays = [jax.numpy.asarray(array.cpu().numpy()) for array in (x, weight)]
    return lambda: run(*arrays)
