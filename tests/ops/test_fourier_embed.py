"""fourier_embed and fourier_linear: every backend against eager and float64, eager against the goldens."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import fourier_columns, fourier_embed, fourier_linear, gaussian, linear_range, octaves
from tests.harness import (
    check_op,
    device_of,
    dtypes,
    jax_device,
    opcheck,
    same_in_jax,
    same_with_threads,
    strided,
    transposed,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"

# shape of x, bands
CASES = {
    "d4rt": ((2, 37, 2), 10),
    "one_band": ((50, 3), 1),
    "one_axis": ((7,), 5),
    "wide": ((3, 2, 1), 130),
    "many_rows": ((301, 2), 3),
}


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer(dims, bands, features, seed=1):
    return {"weight": sample((features, 2 * dims * bands), seed=seed), "bias": sample((features,), seed=seed + 1)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@dtypes
def test_agrees_with_eager(case, dtype, target):
    shape, bands = case
    check_op(fourier_embed, {"x": sample(shape), "frequencies": sample((bands,), seed=1) * 3}, target, dtype)


@pytest.mark.parametrize(
    "shape, bands, features", [((2, 37, 2), 10, 48), ((9, 3), 1, 5), ((1, 1), 9, 67), ((150, 2), 3, 1)], ids=str
)
@dtypes
def test_linear_agrees_with_eager(shape, bands, features, dtype, target):
    inputs = {"x": sample(shape), "frequencies": sample((bands,), seed=3), **layer(shape[-1], bands, features)}
    # what torch errs in one single number is a draw, by which nobody can be measured
    grads = ("x", "weight", "bias") if bands == 1 else None
    check_op(fourier_linear, inputs, target, dtype, grads=grads)


def test_linear_without_bias_and_with_float32_coordinates(target):
    x, f, weight = sample((70, 2), torch.float32), octaves(4), layer(2, 4, 33)["weight"]
    x, f, weight = (t.to(target.device) for t in (x, f, weight))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = F.linear(fourier_embed(x.double(), f.double(), backend="eager"), weight.to(dtype).double())
        got = fourier_linear(x, f, weight.to(dtype), backend=target.backend)
        plain = fourier_linear(x, f, weight.to(dtype), backend="eager")
        assert got.dtype == dtype
        eager_error = (plain.double() - want).abs().max()
        assert (got.double() - want).abs().max() <= 2 * eager_error + torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("torch_multiplies", [False, True])
def test_both_ways_to_a_16_bit_layer(torch_multiplies, dtype, target, monkeypatch):
    """Our fused kernel, which JAX and processors without fast 16-bit products use, and torch's product."""
    if target.backend != "native" or target.device != "cpu":
        pytest.skip("of the native CPU kernels")
    module = importlib.import_module("fourdperf.ops.fourier_embed")
    monkeypatch.setattr(module, "_torch_multiplies", lambda dtype: torch_multiplies)
    x, f, parts = sample((70, 2), torch.float32), octaves(4), layer(2, 4, 33)
    weight, bias = parts["weight"].to(dtype), parts["bias"].to(dtype)
    want = F.linear(fourier_embed(x.double(), f.double(), backend="eager"), weight.double(), bias.double())
    eager_error = (fourier_linear(x, f, weight, bias, backend="eager").double() - want).abs().max()
    got = fourier_linear(x, f, weight, bias, backend="native").double()
    assert (got - want).abs().max() <= 2 * eager_error + torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("scale", [1.0, 5e3, 1.3e5, 1e6, 1e12, 1e30], ids=str)
def test_large_angles(scale, target):
    """The promise of the module: within 2^-23 of the sine and cosine of the exact product, whatever its size."""
    x = (torch.rand(2003, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    x, f = x.to(target.device), torch.tensor([1.0, 1.7, math.pi], device=target.device)
    angle = x.double() * f.double()
    want = torch.cat([angle.sin(), angle.cos()], -1)
    assert (fourier_embed(x, f, backend=target.backend).double() - want).abs().max() <= 2**-23
    twice = fourier_embed(x.double(), f.double(), backend=target.backend)
    assert (twice - want).abs().max() <= 2**-52


def test_near_multiples_of_half_pi(target):
    """x f next to a multiple of pi/2, where a reduction with too few digits of pi fails: relative accuracy too."""
    k = torch.arange(1, 40000, 7, dtype=torch.float64)
    x = (k * math.pi / 2).float()[:, None].to(target.device)
    angle = x.double()
    want = torch.cat([angle.sin(), angle.cos()], -1)
    got = fourier_embed(x, torch.ones(1, device=target.device), backend=target.backend).double()
    assert ((got - want).abs() <= 2**-23 * want.abs() + 2**-31).all()


def test_infinity_and_nan(target):
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 2.0], [-float("inf"), 3.0]], device=target.device)
    out = fourier_embed(x, torch.tensor([1.0, 0.0, 2.0], device=target.device), backend=target.backend)
    out = out.reshape(3, 2, 2, 3)
    assert out[:, :, 0].isnan().all() and out[:, :, 1].isfinite().all()
    zero = fourier_embed(
        torch.zeros(1, 1, device=target.device), torch.ones(1, device=target.device), backend=target.backend
    )
    assert zero.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_goldens(backend):
    """Features, projection and gradients of both D4RT ports; tolerances come with the arrays."""
    for name, axes in (("a_fourier", ("trig", "dim", "band")), ("b_fourier", ("dim", "trig", "band"))):
        with np.load(GOLDENS / f"{name}.npz") as golden:
            array = lambda key: torch.from_numpy(golden[key])
            atol = json.loads(str(golden["config"]))["atol"]
            x = array("in/coords").requires_grad_()
            if name == "a_fourier":
                f = linear_range(0.5, 10, 10)
                assert torch.allclose(f, 2 * math.pi * array("params/freq_bands"), rtol=1e-6)
            else:
                f = octaves(8)
            columns = fourier_columns(2, len(f), axes)
            features = fourier_embed(x, f, backend=backend)
            assert (features - array("out/features")[..., columns]).abs().max() <= atol["out/features"]
            weight, bias = (
                array("params/proj.weight")[:, columns].requires_grad_(),
                array("params/proj.bias").requires_grad_(),
            )
            out = fourier_linear(x, f, weight, bias, backend=backend)
            assert (out - array("out/embedded")).abs().max() <= atol["out/embedded"]
            grads = torch.autograd.grad(out, [x, weight, bias], array("in/cot/embedded"))
            for key, grad in zip(("coords", "params/proj.weight", "params/proj.bias"), grads):
                if f"grad/{key}" in golden:
                    want = array(f"grad/{key}")
                    want = want[:, columns] if key.endswith("weight") else want
                    assert (grad - want).abs().max() <= atol[f"grad/{key}"], key


def test_foreign_orders():
    """fourier_columns reads each codebase's formula, written here as its authors wrote it."""
    x, f = sample((5, 3)), octaves(4, scale=math.pi, dtype=torch.float64)
    ours = fourier_embed(x, f, backend="eager")
    kathirgounder = torch.cat([t(x[:, d : d + 1] * f) for d in range(3) for t in (torch.sin, torch.cos)], -1)
    moog_angles = (x[:, None, :] * f[:, None]).flatten(1)
    moog = torch.cat([moog_angles.sin(), (moog_angles + math.pi / 2).sin()], -1)
    interleaved = torch.stack([(x[..., None] * f).sin(), (x[..., None] * f).cos()], -1).flatten(1)
    for theirs, axes in (
        (kathirgounder, ("dim", "trig", "band")),
        (moog, ("trig", "band", "dim")),
        (interleaved, ("dim", "band", "trig")),
    ):
        columns = fourier_columns(3, 4, axes)
        assert torch.allclose(theirs[:, columns], ours, atol=1e-12)
        weight = sample((7, 24), seed=2)
        assert torch.allclose(theirs @ weight.T, fourier_linear(x, f, weight[:, columns]), atol=1e-12)
    matrix = sample((6, 3), seed=4)
    random = fourier_embed(x @ matrix.T, octaves(1, dtype=torch.float64))
    assert torch.allclose(
        random, torch.cat([(2 * math.pi * x @ matrix.T).sin(), (2 * math.pi * x @ matrix.T).cos()], -1), atol=1e-12
    )


def test_frequencies():
    assert torch.allclose(octaves(3), 2 * math.pi * torch.tensor([1.0, 2.0, 4.0]))
    assert torch.allclose(octaves(2, scale=1, first=-1), torch.tensor([0.5, 1.0]))
    assert torch.allclose(linear_range(0.5, 2, 4, scale=1), torch.tensor([0.5, 1.0, 1.5, 2.0]))
    draws = gaussian(20000, 3.0, scale=1, generator=torch.Generator().manual_seed(0))
    assert abs(draws.std().item() - 3) < 0.1 and draws.dtype == torch.float32
    assert octaves(128, dtype=torch.float64).isfinite().all()


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_non_contiguous(layout, target):
    x, f, parts = sample((6, 5, 2), torch.float32), octaves(3), layer(2, 3, 19)
    x, f, weight, bias = (t.to(target.device, torch.float32) for t in (x, f, parts["weight"], parts["bias"]))
    run = lambda x, f, w, b: fourier_linear(x, f, w, b, backend=target.backend)
    assert torch.equal(run(layout(x), strided(f), layout(weight), strided(bias)), run(x, f, weight, bias))
    one = x[:1].expand(6, -1, -1)  # stride 0
    assert torch.equal(
        fourier_embed(one, f, backend=target.backend), fourier_embed(one.contiguous(), f, backend=target.backend)
    )


@pytest.mark.parametrize("shape, bands", [((0, 2), 3), ((4, 0), 3), ((4, 2), 0), ((0, 0), 0)], ids=str)
def test_empty(shape, bands, target):
    x = torch.zeros(shape, device=target.device, requires_grad=True)
    f = torch.zeros(bands, device=target.device, requires_grad=True)
    out = fourier_embed(x, f, backend=target.backend)
    assert out.shape == (shape[0], 2 * shape[1] * bands) and out.numel() == 0
    d_x, d_f = torch.autograd.grad(out.sum(), (x, f))
    assert d_x.shape == x.shape and d_f.shape == f.shape and not d_x.any() and not d_f.any()
    weight, bias = torch.zeros(3, out.shape[1], device=target.device), torch.arange(3.0, device=target.device)
    assert torch.equal(fourier_linear(x, f, weight, bias, backend=target.backend), bias.expand(shape[0], 3))
    assert fourier_linear(x, f, weight[:0], bias[:0], backend=target.backend).shape == (shape[0], 0)


@pytest.mark.parametrize(
    "shape, bands, features", [((4, 2), 3, 0), ((4, 0), 3, 5), ((4, 2), 0, 5), ((0, 2), 3, 5), ((2,), 3, 0)], ids=str
)
def test_gradients_of_an_empty_layer(shape, bands, features, target):
    shapes = shape, (bands,), (features, 2 * shape[-1] * bands), (features,)
    leaves = [torch.ones(s, device=target.device, requires_grad=True) for s in shapes]
    for args in (leaves, leaves[:3]):
        out = fourier_linear(*args, backend=target.backend)
        assert out.shape == (*shape[:-1], features)
        grads = torch.autograd.grad(out.sum(), args)
        assert [g.shape for g in grads] == list(shapes[: len(args)]) and not any(g.any() for g in grads[:3])
        assert len(args) == 3 or (grads[3] == math.prod(shape[:-1])).all()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_derivatives_and_registration(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suffix = "" if backend == "native" else "_triton"
    x, f = sample((2, 1, 2)).to(device).requires_grad_(), sample((2,), seed=1).to(device).requires_grad_()
    weight, bias = (t.to(device).requires_grad_() for t in layer(2, 2, 3).values())
    embed = lambda x, f: fourier_embed(x, f, backend=backend)
    linear = lambda *args: fourier_linear(*args, backend=backend)
    fast = backend == "triton" and device == "cpu"  # random directions: the interpreter is slow
    for function, args in ((embed, (x, f)), (linear, (x, f, weight, bias))):
        assert torch.autograd.gradcheck(function, args, fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, args, fast_mode=fast)
    first = lambda x, f: torch.autograd.grad(embed(x, f).sum(), x, create_graph=True)[0]
    second = lambda x, f: torch.autograd.grad(first(x, f).sum(), x, create_graph=True)[0]
    assert torch.autograd.gradcheck(second, (x, f), fast_mode=fast)
    ops = torch.ops.fourdperf
    for dtype in (torch.float32, torch.bfloat16):
        x = sample((2, 5, 2)).to(device, dtype).requires_grad_()
        f = sample((3,), torch.float32).to(device).requires_grad_()
        weight, bias = (t.to(device, dtype).requires_grad_() for t in layer(2, 3, 4).values())
        opcheck(getattr(ops, f"fourier_embed{suffix}"), (x, f), dtype)
        wide = x.detach().float().requires_grad_()
        opcheck(getattr(ops, f"fourier_embed_ones{suffix}"), (wide, f, dtype), dtype)
        d_out = sample((2, 5, 12)).to(device, dtype).requires_grad_()
        opcheck(getattr(ops, f"fourier_embed_backward{suffix}"), (d_out, x, f), dtype)
        opcheck(getattr(ops, f"fourier_linear{suffix}"), (x, f, weight, bias), dtype)
        opcheck(getattr(ops, f"fourier_linear{suffix}"), (x, f, weight, None), dtype)


def test_second_derivatives_agree_with_eager(target):
    """A field's gradient trained against: d/dparameters of |d out/d x|^2."""
    results = []
    for backend, dtype in ((target.backend, torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        x, f = (
            sample((40, 2)).to(target.device, dtype).requires_grad_(),
            octaves(3).to(target.device, dtype).requires_grad_(),
        )
        weight, bias = (t.to(target.device, dtype).requires_grad_() for t in layer(2, 3, 16).values())
        out = fourier_linear(x, f, weight, bias, backend=backend).tanh()
        (d_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        results.append(torch.autograd.grad(d_x.square().sum(), (x, f, weight, bias)))
    for ours, plain, exact in zip(*results):
        error, allowed = (
            (ours.double() - exact).abs().max(),
            3 * (plain.double() - exact).abs().max() + 2**-23 * exact.abs().max(),
        )
        assert error <= allowed


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap, per-sample gradients, jvp (eager alone has it), autocast, compile without a graph break."""
    device = device_of(backend)
    x, f = sample((4, 5, 2), torch.float32).to(device), octaves(3).to(device)
    weight, bias = (t.to(device, torch.float32) for t in layer(2, 3, 8).values())
    embed = lambda x, f: fourier_embed(x, f, backend=backend)
    linear = lambda x, f, w, b: fourier_linear(x, f, w, b, backend=backend)
    want = embed(x, f)
    assert torch.equal(torch.vmap(embed, (0, None))(x, f), want)
    assert torch.equal(torch.vmap(embed, (2, None), 1)(x.permute(1, 2, 0), f), want.transpose(0, 1))
    many = torch.stack([f, 2 * f, 3 * f, 4 * f])
    assert torch.allclose(torch.vmap(embed)(x, many), torch.stack([embed(a, b) for a, b in zip(x, many)]), atol=1e-5)
    assert torch.allclose(
        torch.vmap(linear, (0, None, None, None))(x, f, weight, bias), linear(x, f, weight, bias), atol=1e-6
    )
    weights = torch.stack([weight, 2 * weight, -weight, weight])
    assert torch.allclose(
        torch.vmap(linear, (0, None, 0, None))(x, f, weights, bias)[2], linear(x[2], f, -weight, bias), atol=1e-5
    )
    loss = lambda f, x: embed(x, f).square().sum(0).prod()
    each = torch.vmap(torch.func.grad(loss), (None, 0))(f, x)
    assert torch.allclose(each[1], torch.func.grad(loss)(f, x[1]), rtol=1e-3, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype):
            assert embed(x, f).dtype == torch.float32 and linear(x, f, weight, bias).dtype == dtype
    x.requires_grad_()
    compiled = torch.compile(lambda x: linear(x * 2, f, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    plain = linear(x * 2, f, weight, bias) + 1
    assert torch.allclose(compiled(x), plain, atol=1e-5)
    assert torch.allclose(
        torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0], atol=1e-3
    )
    x = x.detach()
    tangent = torch.func.jvp(lambda x: fourier_embed(x, f), (x,), (x,))[1]
    assert tangent.shape == want.shape
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: embed(x, f), (x,), (x,))


def test_samples_have_the_exact_angles_too(target):
    """Gradients and layers of each sample through vmap; angles rounded as eager rounds them err a hundred times as much."""
    x, f = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)), octaves(12)
    d_out, weights = sample((5, 48), torch.float32, 1), sample((3, 7, 48), torch.float32, 2)
    x, f, d_out, weights = (t.to(target.device) for t in (x, f, d_out, weights))

    def everything(x, f, d_out, weights, backend):
        loss = lambda x, f: (fourier_embed(x, f, backend=backend) * d_out).sum()
        layer = lambda weight: fourier_linear(x[0], f, weight, backend=backend)
        return *torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x, f), torch.vmap(layer)(weights)

    ours = everything(x, f, d_out, weights, target.backend)
    exact = everything(*(t.double() for t in (x, f, d_out, weights)), "eager")
    for a, b in zip(ours, exact):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
def test_jax(backend):
    """Both JAX backends against torch: value and gradients, jit, vmap, second order, foreign orders."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import fourier_columns as jax_columns
    from fourdperf.jax.ops import fourier_embed as jax_embed
    from fourdperf.jax.ops import fourier_linear as jax_linear
    from fourdperf.jax.ops import linear_range as jax_range

    x, f, (weight, bias) = (
        sample((3, 7, 2), torch.float32),
        linear_range(0.5, 4, 5),
        (t.float() for t in layer(2, 5, 21).values()),
    )
    args = [jnp.asarray(t.numpy()) for t in (x, f, weight, bias)]
    assert np.array_equal(jax_range(0.5, 4, 5), f.numpy())
    assert np.array_equal(
        jax_columns(2, 5, ("dim", "band", "trig")), fourier_columns(2, 5, ("dim", "band", "trig")).numpy()
    )
    inputs = [t.double().requires_grad_() for t in (x, f, weight, bias)]
    out = fourier_linear(*inputs, backend="eager")
    cotangent = sample(out.shape, torch.float32, seed=9)
    grads = torch.autograd.grad(out, inputs, cotangent.double())
    got, pullback = jax.vjp(jax.jit(lambda *args: jax_linear(*args, backend=backend)), *args)
    for ours, want in zip((got, *pullback(jnp.asarray(cotangent.numpy()))), (out, *grads)):
        want = want.detach().numpy()
        assert np.abs(np.asarray(ours) - want).max() <= 1e-5 * np.abs(want).max()
    embed = lambda x, f: jax_embed(x, f, backend=backend)
    each = jax.vmap(embed, (0, None))(*args[:2])
    assert np.abs(np.asarray(each) - fourier_embed(x.double(), f.double(), backend="eager").numpy()).max() <= 2e-6
    energy = lambda backend: lambda x, f: (jax_embed(x, f, backend=backend) ** 3).sum()
    square = lambda backend: lambda x, f: (jax.grad(energy(backend))(x, f) ** 2).sum()
    second = lambda backend: jax.jit(jax.grad(square(backend), (0, 1)))(*args[:2])
    for ours, want in zip(second(backend), second("jnp")):
        assert np.allclose(ours, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert jax_linear(args[0], args[1], args[2], backend=backend).shape == (3, 7, 21)
    assert embed(args[0][:0], args[1]).shape == (0, 7, 20)
    for dtype in ("bfloat16", "float16"):
        half = jax_linear(args[0], args[1], args[2].astype(dtype), args[3].astype(dtype), backend=backend)
        assert half.dtype == dtype and np.allclose(
            np.asarray(half.astype("float32")), np.asarray(got), rtol=0.05, atol=0.1
        )
    if backend == "ffi":
        assert same_in_jax(embed(*args[:2]), fourier_embed(x.to(jax_device()), f.to(jax_device()), backend="native"))
    with pytest.raises(ValueError, match="frequencies must have shape"):
        embed(args[0], args[1][None])


def test_threads_change_nothing():
    x = sample((20011, 2), torch.float32).requires_grad_()
    f, (weight, bias) = octaves(3).requires_grad_(), (t.float() for t in layer(2, 3, 70).values())

    def everything():
        embedding, out = fourier_embed(x, f, backend="native"), fourier_linear(x, f, weight, bias, backend="native")
        return embedding, out, *torch.autograd.grad(embedding.sum(), (x, f))

    same_with_threads(everything)


def test_large_outputs_take_the_streaming_path(target):
    if target.backend == "triton":
        pytest.skip("one path for all sizes")
    x, f = sample((70001, 2), torch.float32), octaves(2)
    many = octaves(16)
    for y in (x, x[:40001].double()):
        parts = torch.cat([fourier_embed(part, many, backend="native") for part in y.split(1000)])
        assert torch.equal(fourier_embed(y, many, backend="native"), parts)
    for dtype, features in ((torch.float32, 64), (torch.bfloat16, 128)):
        weight, bias = (t.to(dtype) for t in layer(2, 2, features).values())
        whole = fourier_linear(x, f, weight, bias, backend="native")
        parts = torch.cat([fourier_linear(part, f, weight, bias, backend="native") for part in x.split(1000)])
        assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x, f, w, b: fourier_embed(x.int(), f),
            "x must be float64, float32, bfloat16 or float16, got torch.int32",
        ),
        (lambda x, f, w, b: fourier_embed(x[0, 0], f), r"x must have shape \(..., D\)"),
        (lambda x, f, w, b: fourier_embed(x, f[None]), r"frequencies must have shape \(F,\), got \(1, 3\)"),
        (lambda x, f, w, b: fourier_embed(x, f.to("meta")), "frequencies must be on the device of x"),
        (lambda x, f, w, b: fourier_embed(x, 3), "frequencies must be a torch.Tensor, got int"),
        (lambda x, f, w, b: fourier_embed(x, f, backend="cuda"), "backend must be one of"),
        (lambda x, f, w, b: fourier_embed(x.to("meta"), f.to("meta"), backend="native"), "not on meta"),
        (
            lambda x, f, w, b: fourier_linear(x, f, w[:, 1:], b),
            r"weight must have shape \(M, 2 D F\) with 2 D F = 12, got \(5, 11\)",
        ),
        (lambda x, f, w, b: fourier_linear(x.double(), f, w, b), "x must have the dtype of weight"),
        (lambda x, f, w, b: fourier_linear(x, f, w, b[1:]), r"bias must have shape \(5,\)"),
        (lambda x, f, w, b: fourier_linear(x, f, w, b.half()), r"bias must have shape \(5,\) and the dtype"),
        (lambda x, f, w, b: fourier_columns(2, 3, ("dim", "band")), "axes must be an order of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 2), torch.zeros(3), torch.zeros(5, 12), torch.zeros(5))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout and dtype: native computes what eager does, or both raise the same ValueError."""
    shape = data.draw(st.lists(st.integers(0, 6), min_size=0, max_size=3), label="shape")
    bands, features = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 70))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from([torch.clone, strided, transposed]))
    columns = 2 * (shape[-1] if shape else 1) * bands + data.draw(st.sampled_from([0, 0, 0, 1]))
    x, f = layout(sample(shape).to(dtype)), strided(sample((bands,), seed=1))
    weight, bias = layout(sample((features, columns), seed=2).to(dtype)), strided(sample((features,), seed=3).to(dtype))
    scale = 2 * (columns + 1)
    for function, args in ((fourier_embed, (x, f)), (fourier_linear, (x, f, weight, bias))):
        results = []
        for backend in ("native", "eager"):
            try:
                results.append(function(*args, backend=backend))
            except ValueError as error:
                results.append(str(error))
        ours, plain = results
        if isinstance(plain, str):
            assert ours == plain
        else:
            assert ours.shape == plain.shape and ours.dtype == plain.dtype
            tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            assert torch.allclose(ours.double(), plain.double(), rtol=tolerance, atol=tolerance * scale)
