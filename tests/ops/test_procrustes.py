"""procrustes: every backend against eager and float64, eager against the goldens of Neural Isometries, JAX alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fourdperf.ops import procrustes, use_backend
from fourdperf.ops.procrustes import _newton_schulz, _solve_in_eigenvectors, polar_by_inverses
from tests.harness import EMULATED, check_op, dtypes, same_with_threads, strided, transposed

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "niso").glob("ortho_[!d]*.npz"))
SIZES = [1, 2, 3, 5, 8, 17, 33, 64]  # on either side of rotations alone, and of whole vectors
special = pytest.mark.parametrize("special", [False, True])
ill = pytest.mark.parametrize("condition", [1e2, 1e5])


def sample(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sign(x):
    """Of the determinants, by NumPy: torch's threaded LU goes wrong on some processors for n >= 192."""
    return torch.from_numpy(np.linalg.slogdet(x.numpy()).sign)


def conditioned(singular_values, batch=3, seed=0, negative=False):
    """Matrices with these singular values, det < 0 or > 0."""
    n = len(singular_values)
    u, v = (torch.linalg.qr(sample(batch, n, n, seed=seed + i)).Q for i in (0, 1))
    x = (u * torch.as_tensor(singular_values, dtype=torch.float64)) @ v.mT
    wrong = (sign(x) < 0) != negative
    return torch.where(
        wrong[:, None, None], x * torch.tensor([-1.0] + [1.0] * (n - 1), dtype=torch.float64)[:, None], x
    )


def tall(m, singular_values, batch=3, seed=0):
    """(batch, m, n) with these singular values."""
    n = len(singular_values)
    u, v = (torch.linalg.qr(sample(batch, rows, n, seed=seed + rows)).Q for rows in (m, n))
    return (u * torch.as_tensor(singular_values, dtype=torch.float64)) @ v.mT


def run(**options):
    return lambda backend, x: procrustes(x, backend=backend, **options)


def not_in_triton(target, n, dtype=torch.float32):
    if target.backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton computes in float32")
    if str(target) == "triton-cpu" and (n > 8 or dtype != torch.float32):
        pytest.skip("Triton's interpreter takes minutes for larger matrices")


@pytest.mark.parametrize("n", SIZES)
@special
@dtypes
def test_agrees_with_eager(n, special, dtype, target):
    not_in_triton(target, n, dtype)
    if target.isa == EMULATED and n > 17 and (dtype != torch.float32 or special):
        pytest.skip("the emulator takes a quarter of a minute for as large matrices: once in float32")
    batch = 2 if target.isa == EMULATED and n > 17 else 4 if target.backend == "triton" else 8
    singular = np.linspace(1, 3, n)
    for negative in (False, True):
        x = conditioned(singular, batch=batch, seed=n, negative=negative)
        check_op(run(special=special), {"x": x}, target, dtype, roundings=2 * n)  # n by either side


@pytest.mark.parametrize("m, n", [(2, 1), (9, 4), (60, 17), (300, 33)])
@pytest.mark.parametrize("condition", [3, 1e3])
@dtypes
def test_tall_agrees_with_eager(m, n, condition, dtype, target):
    not_in_triton(target, n, dtype)
    if target.isa == EMULATED and n > 17:
        pytest.skip("the emulator takes a quarter of a minute for as large matrices")
    check_op(run(), {"x": tall(m, np.geomspace(1 / condition, 1, n))}, target, dtype, roundings=2 * n)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_tall_gradients(backend):
    x = tall(7, [2.0, 2.0, 1.0, 0.5], batch=2).requires_grad_()
    function = lambda x: procrustes(x, backend=backend)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_tall_rank_deficient(rank, backend):
    """What x does not determine gets no gradient, and one of the nearest matrices. 4: to rounding alone."""
    singular = [1.0, 2.0, 3.0, 1e-7, 1e-7] if rank == 4 else [2.0] * rank + [0.0] * (5 - rank)
    x = tall(9, singular).float().requires_grad_()
    out = procrustes(x, backend=backend)
    torch.testing.assert_close(out.mT @ out, torch.eye(5).expand_as(out.mT @ out), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(out, x, sample(*x.shape, dtype=torch.float32, seed=3))
    assert gradient.abs().max() < 10


def test_tall_not_finite_is_nan_and_stays_where_it_is():
    x = tall(40, np.linspace(1, 2, 20)).float()
    x[1, 0, 1] = torch.inf
    out = procrustes(x, backend="native")
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("n", [32, 128, 200])
@pytest.mark.parametrize("negative", [False, True])
def test_large(n, negative):
    x = conditioned(np.geomspace(1e-2, 1, n), batch=2, negative=negative)
    got = procrustes(x.float(), special=True, backend="native").double()
    assert (got - procrustes(x, special=True, backend="eager")).abs().max() < 3e-4
    torch.testing.assert_close(got.mT @ got, torch.eye(n, dtype=torch.float64).expand_as(got), atol=2e-5, rtol=0)
    assert (sign(got) == 1).all()


@pytest.mark.parametrize("negative", [False, True])
def test_batched_inverses_for_a_gpu(negative):
    """The iteration in torch that takes over from the CUDA kernels at n > 64, on the CPU; the second has no inverse."""
    x = conditioned(np.geomspace(1e-2, 1, 80), negative=negative)
    x[1] = x[1, :, :1] @ x[1, :1]
    out, flip = torch.empty_like(x), torch.empty_like(x[..., 0])
    polar_by_inverses(x, out, flip, True)
    exact = procrustes(x, special=True, backend="eager")
    torch.testing.assert_close(out[[0, 2]], exact[[0, 2]])
    torch.testing.assert_close(out.mT @ out, torch.eye(80, dtype=torch.float64).expand_as(out))
    # what was turned round is the right singular vector of the smallest singular value
    for i in (0, 2):
        v = torch.linalg.svd(x[i]).Vh[-1]
        assert abs(flip[i] @ v).item() == pytest.approx(float(negative), abs=1e-9)


def test_what_rotations_leave():
    """Triton's turns leave vectors orthogonal to n roundings, here to 1e-5; a step more, and a second pass, to 1e-10."""
    n = 20
    noise = 1e-6 * sample(3, n, n, seed=4)
    r = torch.linalg.qr(sample(3, n, n)).Q
    near = _newton_schulz(r + noise)[0]
    torch.testing.assert_close(near.mT @ near, torch.eye(n, dtype=r.dtype).expand_as(r), atol=1e-10, rtol=0)
    h, p = conditioned(np.linspace(1, 2, n)), sample(3, n, n, seed=5)
    h = h.mT @ h
    s, v = torch.linalg.eigh(h)
    y = _solve_in_eigenvectors(p, v + noise, s, h)
    torch.testing.assert_close(h @ y + y @ h, p - p.mT, atol=1e-9, rtol=0)


@ill
@pytest.mark.parametrize("n", [12, 40])
def test_ill_conditioned_as_exact_as_an_svd(condition, n):
    """The factor itself is as sensitive as its smallest singular values: the measure is what torch's SVD leaves."""
    x = conditioned(np.geomspace(1 / condition, 1, n)).float()
    exact = procrustes(x.double(), backend="eager")
    error = {b: (procrustes(x, backend=b).double() - exact).abs().max() for b in ("native", "eager")}
    assert error["native"] <= 3 * error["eager"] + 1e-6


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_goldens(path, backend):
    """Values on both; derivatives, which are the regularized ones, where those are."""
    with np.load(path) as z:
        config = json.loads(str(z["config"]))
        arrays = {key: torch.from_numpy(z[key]) for key in z.files if key != "config"}
    noise = config["float32_noise"]
    allowed = lambda key: 30 * noise[key]["max_abs"] + 3e-6 * noise[key]["ref_max"]
    x = arrays["in/X"]
    out = procrustes(x, special=config["special"], backend=backend)
    assert (out - arrays["out/R"]).abs().max() <= allowed("out/R")
    if backend == "eager":
        function = run_eager(special=config["special"], gradient="regularized")
        _, jvp = torch.func.jvp(function, (x,), (arrays["in/tangent"],))
        assert (jvp - arrays["out/jvp"]).abs().max() <= allowed("out/jvp")
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((function(x) * arrays["in/weight"]).sum(), x)
        assert (gradient - arrays["grad/X"]).abs().max() <= allowed("grad/X")


def run_eager(**options):
    return lambda x: procrustes(x, backend="eager", **options)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize(
    "singular, turn, negative",
    [
        ((3.0, 2.0, 1.0, 0.5), False, False),
        ((2.0, 2.0, 2.0, 2.0), False, True),
        ((3.0, 2.0, 2.0, 0.5), True, False),
        ((3.0, 2.0, 2.0, 0.5), True, True),
    ],
)
def test_gradients(backend, singular, turn, negative):
    """Also where singular values coincide, and where the last one's vector is turned round."""
    x = conditioned(singular, batch=1, negative=negative).requires_grad_()
    function = lambda x: procrustes(x, special=turn, backend=backend)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-4)


def test_regularized_vanishes_where_exact_is_finite():
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    weight = sample(4, 4)
    grads = {}
    for gradient in ("exact", "regularized"):
        out = procrustes(x, gradient=gradient, backend="eager")
        (grads[gradient],) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(grads["exact"], (weight - weight.mT) / 2)
    assert grads["regularized"].abs().max() == 0


def test_regularized_through_vmap():
    """A tensor that vmap maps says that it requires no gradient: native would give the exact one."""
    x, weight = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1).requires_grad_(), sample(4, 4)
    loss = lambda x: (torch.vmap(lambda x: procrustes(x, gradient="regularized"))(x) * weight).sum()
    assert torch.autograd.grad(loss(x), x)[0].abs().max() == 0
    assert torch.func.grad(loss)(x).abs().max() == 0


@pytest.mark.parametrize("shape", [(9, 4), (2, 3, 7, 3), (4, 7), (0, 3, 3), (2, 0, 0), (5, 0), (1, 1)])
def test_shapes(shape):
    x = sample(*shape).requires_grad_()
    out = procrustes(x)
    assert out.shape == x.shape
    out.sum().backward()
    if x.numel():
        tall = out if shape[-2] >= shape[-1] else out.mT
        torch.testing.assert_close(
            tall.mT @ tall, torch.eye(tall.shape[-1], dtype=x.dtype).expand(*tall.shape[:-2], -1, -1)
        )


@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts(layout, target):
    x = conditioned(np.linspace(1, 2, 6)).float()
    got = procrustes(layout(x.to(target.device)), backend=target.backend)
    torch.testing.assert_close(got.cpu(), procrustes(x, backend="eager"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("n", [3, 24])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_is_nan_and_stays_where_it_is(n, bad, target):
    not_in_triton(target, n)
    x = conditioned(np.linspace(1, 2, n)).float()
    x[1, 0, 1] = bad
    out = procrustes(x.to(target.device), special=True, backend=target.backend)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 5, 7])
@special
def test_rank_deficient(rank, special, target):
    """One of the nearest matrices, and gradients that are finite."""
    x = conditioned([1.0] * 8)[..., :rank] @ sample(3, rank, 8, seed=9)
    x = x.to(target.device, torch.float32).requires_grad_()
    out = procrustes(x, special=special, backend=target.backend)
    torch.testing.assert_close(out.mT @ out, torch.eye(8, device=target.device).expand_as(out), atol=1e-5, rtol=0)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales(scale, target):
    x = conditioned(np.linspace(1, 2, 20 if str(target) != "triton-cpu" else 6)).float()
    got = procrustes((scale * x).to(target.device), backend=target.backend)
    torch.testing.assert_close(got.cpu(), procrustes(x, backend="eager"), atol=3e-6, rtol=0)


def test_opcheck():
    for n in (3, 20):
        x = conditioned(np.linspace(1, 2, n)).float().requires_grad_()
        torch.library.opcheck(torch.ops.fourdperf.procrustes.default, (x, True))
        r, flip = torch.ops.fourdperf.procrustes(x.detach(), True)
        args = [(r.mT @ x).detach().requires_grad_(), sample(3, n, n, dtype=torch.float32).requires_grad_(), flip]
        torch.library.opcheck(torch.ops.fourdperf.procrustes_solve.default, args)
    x = tall(9, [1.0, 2.0, 3.0]).float().requires_grad_()
    torch.library.opcheck(torch.ops.fourdperf.procrustes.default, (x, False))
    torch.library.opcheck(torch.ops.fourdperf.procrustes_inverse.default, ((x.mT @ x).detach().requires_grad_(), 1e-6))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("rows", [5, 8])
def test_transforms(backend, rows):
    x = tall(rows, np.linspace(1, 2, 5))
    function = lambda x: procrustes(x, special=True, backend=backend)
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x))
    together = torch.func.grad(lambda x: function(x).sin().sum())(x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: function(x).sin().sum()))(x), together)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


def test_autocast_changes_nothing(target):
    """66: for a GPU (so in the emulator, too) that is products and inverses of torch's."""
    n = 6 if target.backend == "triton" else 66
    for x in (conditioned(np.linspace(1, 2, n), negative=True), tall(9, [1.0, 2.0, 3.0])):
        x = x.float().to(target.device).requires_grad_()

        def everything():
            out = procrustes(x, special=True, backend=target.backend)
            return out, torch.autograd.grad(out.sin().sum(), x)[0]

        plain = everything()
        with torch.autocast(target.device, torch.bfloat16):
            found = everything()
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_deterministic(target):
    x = conditioned(np.linspace(1, 2, 20 if str(target) != "triton-cpu" else 6)).to(target.device, torch.float32)
    assert torch.equal(procrustes(x, backend=target.backend), procrustes(x, backend=target.backend))


def test_threads_change_nothing():
    x, p = conditioned(np.linspace(1, 2, 12), batch=20), sample(20, 12, 12, seed=5)
    h = x.mT @ x

    def everything():
        r, flip = torch.ops.fourdperf.procrustes(x, True)
        return r, flip, torch.ops.fourdperf.procrustes_solve(h, p, flip)

    same_with_threads(everything)


@pytest.mark.parametrize("n", [6, 24])
@special
def test_jax(n, special):
    jax = pytest.importorskip("jax")
    from fourdperf.jax import ops

    x = conditioned(np.linspace(1, 2, n), negative=True).float()
    weight = sample(3, n, n, dtype=torch.float32, seed=5)
    exact, plain = (_value_gradient_jvp(dtype, x, weight, special) for dtype in (torch.float64, torch.float32))
    for backend in ("jnp", "ffi"):
        function = lambda x: ops.procrustes(x, special=special, backend=backend)
        loss = lambda x: (function(x) * weight.numpy()).sum()
        found = jax.jit(function)(x.numpy()), jax.jit(jax.grad(loss))(x.numpy())
        found += (jax.jvp(function, (x.numpy(),), (weight.numpy(),))[1],)
        for ours, torchs, wanted in zip(found, plain, exact):
            error = np.abs(np.asarray(ours, np.float64) - wanted.numpy()).max()
            assert error <= 3 * (torchs - wanted).abs().max() + 3e-6 * wanted.abs().max()


def _value_gradient_jvp(dtype, x, weight, special):
    x, weight = x.to(dtype), weight.to(dtype)
    function = run_eager(special=special)
    out, jvp = torch.func.jvp(function, (x,), (weight,))
    return out, torch.func.grad(lambda x: (function(x) * weight).sum())(x), jvp


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.ones(3), {}, r"x must have shape \(..., m, n\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, "x must be"),
        (torch.ones(3, 3), {"special": 1}, "special must be a bool"),
        (torch.ones(3, 3), {"gradient": "safe"}, "gradient must be"),
        (torch.ones(4, 3).requires_grad_(), {"backend": "native", "gradient": "regularized"}, "exact gradient alone"),
    ],
)
def test_errors(x, options, message):
    with pytest.raises(ValueError, match=message):
        procrustes(x, **options)


def test_forced_backend_of_a_model_falls_back_to_none():
    with use_backend("eager"):
        assert procrustes(torch.eye(3)).equal(torch.eye(3))
