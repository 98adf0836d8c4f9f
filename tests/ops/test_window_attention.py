"""window_attention: every backend against eager and float64, eager against a loop, the goldens and full attention."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import window_attention
from fourdperf.ops.window_attention import BACKENDS, BORDERS
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

# shape (B..., H, W, heads, D), window, dilation, border, extra tokens
CASES = {
    "odd": ((2, 5, 7, 2, 16), 3, 1, "mask", 0),
    "shifted": ((1, 2, 9, 6, 1, 20), (5, 3), 1, "shift", 2),
    "zeros": ((1, 4, 5, 2, 24), (4, 3), 1, "zero", 1),
    "dilated": ((1, 9, 8, 1, 16), 3, (2, 3), "mask", 0),
    "dilated_shift": ((1, 7, 9, 2, 8), (2, 3), (3, 2), "shift", 0),
    "tiny_frame": ((3, 2, 3, 2, 8), 7, 1, "zero", 0),
    "one_token": ((2, 1, 1, 2, 8), 3, 1, "mask", 3),
    "wide_window": ((1, 3, 21, 1, 8), (1, 13), 1, "shift", 0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
NATIVE_ONLY = {  # of several bands and tiles: slow in Triton's interpreter
    "bands": ((1, 40, 20, 1, 8), (3, 9), 1, "mask", 2),
    "bands_shift": ((1, 37, 5, 2, 12), (4, 6), 1, "shift", 0),
    "bands_dilated": ((1, 75, 9, 1, 8), (5, 3), (2, 1), "zero", 1),
    "tiles": ((1, 6, 45, 1, 16), (3, 7), 1, "mask", 0),
}


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inputs_of(shape, extra, dtype=torch.float64):
    tensors = {name: sample(shape, dtype, seed) for seed, name in enumerate("qkv")}
    if extra:
        tensors |= {
            f"extra_{name}": sample((*shape[:-4], extra, *shape[-2:]), dtype, seed) for seed, name in enumerate("kv", 3)
        }
    return tensors


def check(case, target, dtype):
    shape, window, dilation, border, extra = case
    if target.backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 here")
    if (
        str(target) == "triton-cpu"
        and dtype != torch.float32
        and case != CASES["zeros" if dtype == torch.bfloat16 else "one_token"]
    ):
        pytest.skip("the interpreter is slow: one case of each 16-bit type")
    function = lambda q, k, v, extra_k=None, extra_v=None, backend=None: window_attention(
        q, k, v, window, border=border, dilation=dilation, extra_k=extra_k, extra_v=extra_v, backend=backend
    )
    check_op(function, inputs_of(shape, extra), target, dtype)


@cases
@dtypes
def test_agrees_with_eager(case, dtype, target):
    check(case, target, dtype)


@pytest.mark.parametrize("case", NATIVE_ONLY.values(), ids=NATIVE_ONLY.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bands_and_tiles(case, dtype, target):
    if str(target) == "triton-cpu":
        pytest.skip("slow in the interpreter")
    check(case, target, dtype)


@pytest.mark.parametrize("dim", [1, 5, 8, 32, 64, 80, 88, 96, 104, 112, 128, 256])
def test_head_sizes(dim, target):
    if str(target) == "triton-cpu" and dim not in (1, 88, 128):
        pytest.skip("the interpreter is slow: one size of each kind")
    check(((2, 4, 5, 2, dim), 3, 1, "mask", 0), target, torch.float32)


@cases
def test_eager_agrees_with_a_loop(case):
    """The definition, query by query."""
    shape, window, dilation, border, extra = case
    tensors = inputs_of(shape, extra)
    got = window_attention(
        *(tensors[n] for n in "qkv"),
        window,
        border=border,
        dilation=dilation,
        extra_k=tensors.get("extra_k"),
        extra_v=tensors.get("extra_v"),
        backend="eager",
    )
    height, width, heads, dim = shape[-4:]
    q, k, v, got = (x.reshape(-1, *shape[-4:]) for x in (*(tensors[n] for n in "qkv"), got))
    pair = lambda x: (x, x) if isinstance(x, int) else x

    def keys(place, size, w, d):
        if border == "shift":
            residues = list(range(place % d, size, d))
            start = max(0, min(residues.index(place) - w // 2, len(residues) - w))
            return residues[start : start + w]
        return [place + a * d for a in range(-(w // 2), w - w // 2)]

    for f, y, x, h in np.ndindex(q.shape[0], height, width, heads):
        ks, vs = [], []
        for i in keys(y, height, pair(window)[0], pair(dilation)[0]):
            for j in keys(x, width, pair(window)[1], pair(dilation)[1]):
                if 0 <= i < height and 0 <= j < width:
                    ks.append(k[f, i, j, h])
                    vs.append(v[f, i, j, h])
                elif border == "zero":
                    ks.append(torch.zeros(dim, dtype=torch.float64))
                    vs.append(ks[-1])
        for e in range(extra):
            ks.append(tensors["extra_k"].reshape(-1, extra, heads, dim)[f, e, h])
            vs.append(tensors["extra_v"].reshape(-1, extra, heads, dim)[f, e, h])
        weights = (torch.stack(ks) @ q[f, y, x, h] * dim**-0.5).softmax(0)
        assert torch.allclose(weights @ torch.stack(vs), got[f, y, x, h], atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("file", sorted(GOLDENS.glob("a_local_attn_*.npz")), ids=lambda file: file.stem)
def test_goldens(file, backend):
    """LocalAttention of a D4RT port, forward and backward, at the tolerances that came with the numbers."""
    with np.load(file) as golden:
        config = json.loads(str(golden["config"]))
        arrays = {name: torch.from_numpy(golden[name]) for name in golden.files if name != "config"}
    for key, (shape, centre, scale) in config.get("recipe", {}).get("entries", {}).items():
        arrays[f"params/{key}"] = recipe(key, shape, centre, scale, config["recipe"]["seed"])
    params = {
        name.removeprefix("params/"): x.requires_grad_() for name, x in arrays.items() if name.startswith("params/")
    }
    x, frames, heads = arrays["in/x"].requires_grad_(), config["T"], config["num_heads"]
    window = config.get("local_window_size") or config["window"]
    grid = x.unflatten(1, (frames, config["H"], config["W"]))
    qkv = F.linear(grid, params["qkv.weight"], params.get("qkv.bias"))
    out = window_attention(*qkv.unflatten(-1, (3, heads, -1)).unbind(-3), window, border="zero", backend=backend)
    y = F.linear(out.flatten(-2), params["proj.weight"], params["proj.bias"]).flatten(1, 3)
    if "out/y_kept" in arrays:
        got = {"out/y_kept": y[:, arrays["in/keep"]]}
    else:
        y.backward(arrays["in/cot/y"])
        got = {"out/y": y, "grad/x": x.grad} | {f"grad/params/{name}": p.grad for name, p in params.items()}
    for name, x in got.items():
        error = (x.detach() - arrays[name]).abs().max().item()
        assert error <= config["atol"][name], f"{name}: {error:.2e} > {config['atol'][name]:.2e}"


def recipe(key, shape, centre, scale, seed):
    mask = np.uint64(0xFFFFFFFF)
    h = (
        np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B1)
        + np.uint64(zlib.crc32(key.encode()))
        + np.uint64((seed * 0x85EBCA6B) & 0xFFFFFFFF)
    ) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return torch.from_numpy(
        (centre + scale * (2 * (h.astype(np.float64) + 0.5) / 2**32 - 1)).astype(np.float32).reshape(shape)
    )


@pytest.mark.parametrize("border, window", [("mask", 11), ("mask", (40, 12)), ("shift", 6), ("shift", (9, 7))])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_covering_window_is_full_attention(border, window, extra):
    tensors = inputs_of((2, 5, 6, 3, 16), extra, torch.float32)
    flat = {name: x.flatten(1, 2) if x.ndim == 5 else x for name, x in tensors.items()}
    k, v = (torch.cat((flat[n], flat[f"extra_{n}"]), 1) if extra else flat[n] for n in "kv")
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (flat["q"], k, v))).transpose(1, 2)
    function = lambda backend: window_attention(**tensors, window=window, border=border, backend=backend).flatten(1, 2)
    assert torch.equal(function(None), want) and torch.equal(function("sdpa"), want)
    for backend in ("native", "eager"):
        assert torch.allclose(function(backend), want, atol=2e-6)


@pytest.mark.parametrize(
    "args",
    [
        dict(window=10, border="mask"),
        dict(window=5, border="shift"),
        dict(window=11, border="zero"),
        dict(window=11, border="mask", dilation=2),
    ],
    ids=str,
)
def test_a_window_that_does_not_cover_is_not(args):
    tensors = inputs_of((1, 6, 6, 1, 8), 0, torch.float32)
    with pytest.raises(ValueError, match="backend 'sdpa' cannot run"):
        window_attention(**tensors, **args, backend="sdpa")
    assert torch.allclose(
        window_attention(**tensors, **args, backend="native"),
        window_attention(**tensors, **args, backend="eager"),
        atol=2e-6,
    )


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("backend", ["jnp", "ffi"])
def test_jax(border, backend):
    """Both JAX backends against torch: value and gradients, with extra tokens, dilation and vmap."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import window_attention as jax_window_attention

    tensors = inputs_of((2, 7, 9, 2, 20), 2, torch.float32)
    options = dict(window=(3, 4), border=border, dilation=(2, 1))
    function = lambda tensors: jax_window_attention(**tensors, **options, backend=backend)
    arrays = {name: jnp.asarray(x.numpy()) for name, x in tensors.items()}
    got, pullback = jax.vjp(jax.jit(function), arrays)
    cotangent = sample(tensors["q"].shape, torch.float32, seed=9)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    want = window_attention(**leaves, **options)
    gradients = torch.autograd.grad(want, leaves.values(), cotangent)
    assert np.abs(np.asarray(got) - want.detach().numpy()).max() <= 3e-6
    ours = pullback(jnp.asarray(cotangent.numpy()))[0]
    for name, theirs in zip(leaves, gradients, strict=True):
        assert np.abs(np.asarray(ours[name]) - theirs.numpy()).max() <= 1e-5, name
    mapped = jax.vmap(lambda q: function(arrays | {"q": q}))(jnp.stack([arrays["q"], arrays["q"] * 2]))
    assert np.abs(np.asarray(mapped[0]) - np.asarray(got)).max() <= 3e-6


def test_jax_ffi_dtypes():
    jnp = pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import window_attention as jax_window_attention

    for dtype in ("float32", "bfloat16", "float16"):
        tensors = inputs_of((1, 5, 6, 2, 16), 0, getattr(torch, dtype))
        got = jax_window_attention(
            *(jnp.asarray(x.float().numpy()).astype(dtype) for x in tensors.values()), 3, backend="ffi"
        )
        want = window_attention(*(x.to(jax_device()) for x in tensors.values()), 3, backend="native")
        assert same_in_jax(got, want)
    with pytest.raises(ValueError, match="border must be one of"):
        jax_window_attention(
            jnp.zeros((5, 6, 2, 16)), jnp.zeros((5, 6, 2, 16)), jnp.zeros((5, 6, 2, 16)), 3, border="wrap"
        )


def test_views_of_a_fused_projection_are_not_copied(monkeypatch):
    qkv = sample((2, 3, 6, 7, 3, 2, 16), torch.float32)
    q, k, v = qkv.unbind(-3)
    want = window_attention(q.contiguous(), k.contiguous(), v.contiguous(), 3, backend="native")
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args, **kwargs: pytest.fail("copied"))
    assert torch.equal(window_attention(q, k, v, 3, backend="native"), want)


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_non_contiguous(layout, target):
    tensors = {name: x.to(target.device) for name, x in inputs_of((2, 5, 6, 2, 8), 2, torch.float32).items()}
    want = window_attention(**tensors, window=3, backend=target.backend)
    laid_out = {name: layout(x) for name, x in tensors.items()}
    assert torch.equal(window_attention(**laid_out, window=3, backend=target.backend), want)
    heads_first = {name: x.movedim(-2, 1).contiguous().movedim(1, -2) for name, x in tensors.items()}
    assert torch.equal(window_attention(**heads_first, window=3, backend=target.backend), want)
    shared = tensors | {name: tensors[name][:1] for name in ("extra_k", "extra_v")}  # one set for all frames
    spread = tensors | {name: tensors[name][:1].expand(2, -1, -1, -1).contiguous() for name in ("extra_k", "extra_v")}
    assert torch.equal(
        window_attention(**shared, window=3, backend=target.backend),
        window_attention(**spread, window=3, backend=target.backend),
    )


def test_huge_strides(target):
    """Addresses beyond 2^31 elements, without the memory: rows 2^30 elements apart share all of it but their start."""
    if target.device == "cuda" or target.backend == "triton":
        pytest.skip("lazily allocated memory is a matter of the CPU")
    big = torch.UntypedStorage(4 * (3 * 2**30 + 64))
    x = torch.empty(0).set_(big, 0, (1, 4, 1, 1, 8), (0, 2**30, 8, 8, 1))
    values = sample((1, 4, 1, 1, 8), torch.float32)
    x.copy_(values)
    assert torch.equal(
        window_attention(x, x, x, 3, backend=target.backend),
        window_attention(values, values, values, 3, backend=target.backend),
    )


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8)], ids=str)
def test_empty(shape, target):
    tensors = {name: x.to(target.device).requires_grad_() for name, x in inputs_of(shape, 2, torch.float32).items()}
    out = window_attention(**tensors, window=3, border="shift", backend=target.backend)
    assert out.shape == shape
    for name, gradient in zip(tensors, torch.autograd.grad(out.sum(), tensors.values())):
        assert gradient.shape == tensors[name].shape and (gradient == 0).all()


def test_large_scores_and_nan(target):
    tensors = {name: x.to(target.device) for name, x in inputs_of((1, 9, 9, 1, 8), 0, torch.float32).items()}
    big = tensors | {"q": tensors["q"] * 1e4}
    assert window_attention(**big, window=3, backend=target.backend).isfinite().all()
    tensors["v"][0, 4, 4] = float("nan")
    if target.backend == "triton":
        return  # multiplies whole tiles: see the limits in its file
    hit = window_attention(**tensors, window=3, backend=target.backend).isnan()[0, :, :, 0, 0]
    assert hit.sum() == 9 and hit[3:6, 3:6].all()


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("extra", [0, 2])
def test_derivatives_and_registration(backend, extra):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = inputs_of((1, 3, 4, 1, 4), extra)
    if backend == "native":
        leaves = [x.to(device).requires_grad_() for x in tensors.values()]
        function = lambda q, k, v, *e: window_attention(
            q, k, v, (3, 2), border="zero", backend=backend, **dict(zip(("extra_k", "extra_v"), e))
        )
        assert torch.autograd.gradcheck(function, leaves)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
            torch.autograd.grad(first.sum(), leaves[0])
    name = "window_attention" if backend == "native" else "window_attention_triton"
    op, op_backward = getattr(torch.ops.fourdperf, name), getattr(torch.ops.fourdperf, f"{name}_backward")
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors.values()] + [None, None] * (not extra)
        options = ([3, 2], [1, 1], "mask", 0.5)
        opcheck(op, (*leaves, *options), dtype)
        leaves = [x if x is None else x.detach() for x in leaves]
        out, lse = op(*leaves, *options)
        opcheck(op_backward, (out, out, lse, *leaves, *options), dtype)


def test_eager_differentiates_twice():
    leaves = [x.requires_grad_() for x in inputs_of((1, 2, 3, 1, 2), 1).values()]
    function = lambda q, k, v, extra_k, extra_v: window_attention(
        q, k, v, 2, border="zero", extra_k=extra_k, extra_v=extra_v, backend="eager"
    )
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap, func.grad, jvp (eager alone has it, and is chosen), autocast, compile without a graph break."""
    device = device_of(backend)
    q, k, v = (x.to(device) for x in inputs_of((3, 4, 5, 2, 8), 0, torch.float32).values())
    extra_k, extra_v = (sample((2, 2, 8), torch.float32, seed).to(device) for seed in (5, 6))
    function = lambda q, k, v: window_attention(
        q, k, v, 3, border="shift", extra_k=extra_k, extra_v=extra_v, backend=backend
    )
    want = function(q, k, v)
    assert torch.allclose(torch.vmap(function)(q, k, v), want, atol=1e-6)
    assert torch.allclose(torch.vmap(function, in_dims=(0, None, None))(q, k[0], v[0])[0], want[0], atol=1e-6)
    loss = lambda q, k, v: function(q, k, v).square().sum()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    d_q, d_k, d_v = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, (d_q, d_k, d_v)))
    per_sample = torch.vmap(torch.func.grad(loss))(q, k, v)
    assert torch.allclose(per_sample, d_q, atol=1e-5)
    with torch.autocast(device, torch.bfloat16):
        assert function(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert (function(q, k, v).float() - want).abs().max() < 0.05
    compiled = torch.compile(lambda q: function(q * 2, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), function(q * 2, k, v) + 1, atol=1e-6)
    leaf = q.clone().requires_grad_()
    compiled(leaf).sum().backward()
    assert leaf.grad.shape == q.shape
    small = [x[:, :2, :2] for x in (q, k, v)]
    jvp = lambda b: torch.func.jvp(
        lambda q: window_attention(q, *small[1:], 1, border="zero", backend=b), (small[0],), (small[0],)
    )
    assert jvp(None)[1].shape == small[0].shape
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            jvp(backend)


def test_threads_change_nothing():
    tensors = inputs_of((2, 40, 10, 2, 8), 2, torch.float32)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def run():
        out = window_attention(**leaves, window=5, backend="native")
        return [out, *torch.autograd.grad(out.square().sum(), leaves.values())]

    same_with_threads(run)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda q: window_attention(q.int(), q, q, 3),
            "q must be float64, float32, bfloat16 or float16, got torch.int32",
        ),
        (lambda q: window_attention(q, q.numpy(), q, 3), "k must be a torch.Tensor, got ndarray"),
        (lambda q: window_attention(q, q, q.double(), 3), "v must have the dtype of q"),
        (
            lambda q: window_attention(q, q[:, :3], q, 3),
            r"k must have the shape of q, \(2, 4, 5, 2, 8\), got \(2, 3, 5, 2, 8\)",
        ),
        (lambda q: window_attention(q[0, 0], q[0, 0], q[0, 0], 3), r"q must be \(B..., H, W, heads, D\)"),
        (lambda q: window_attention(q, q, q, 0), "window must be a whole number from 1 to 2\\^20"),
        (lambda q: window_attention(q, q, q, (3, 3, 3)), "window must be a whole number"),
        (lambda q: window_attention(q, q, q, 7.0), "window must be a whole number .* got 7.0"),
        (lambda q: window_attention(q, q, q, (3, 3.0)), "window must be a whole number"),
        (lambda q: window_attention(q, q, q, 3, dilation=(1, 0)), "dilation must be a whole number"),
        (
            lambda q: window_attention(q, q, q, 3, border="reflect"),
            "border must be one of 'mask', 'shift', 'zero', got 'reflect'",
        ),
        (lambda q: window_attention(q, q, q, 3, extra_k=q[:, 0]), "extra_k and extra_v must be given together"),
        (
            lambda q: window_attention(q, q, q, 3, extra_k=q[:, 0, :, :1], extra_v=q[:, 0]),
            r"extra_k must be \(B..., E, 2, 8\)",
        ),
        (
            lambda q: window_attention(q, q, q, 3, extra_k=q[0], extra_v=q[0]),
            "the leading axes of extra_k must broadcast",
        ),
        (
            lambda q: window_attention(q, q, q, 3, extra_k=q[:, 0], extra_v=q[:, 0, :3]),
            "extra_v must have as many tokens as extra_k",
        ),
        (
            lambda q: window_attention(q[..., :0], q[..., :0], q[..., :0], 3),
            "q must have at least one element per head",
        ),
        (lambda q: window_attention(q, q, q, 3, backend="cuda"), "backend must be one of"),
        (
            lambda q: window_attention(*[q.to("meta")] * 3, 3, backend="native"),
            "the native kernels run on cpu and cuda, not on meta",
        ),
        (lambda q: window_attention(*[q.double()] * 3, 3, backend="triton"), "backend 'triton' cannot run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, 5, 2, 8))


def test_whole_numbers_of_numpy():
    jnp = pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import window_attention as jax_window_attention

    q, array = sample((4, 5, 2, 8), torch.float32), np.ones((4, 5, 2, 8), np.float32)
    for window in (np.int64(3), [np.int32(3), 3]):
        assert torch.equal(window_attention(q, q, q, window), window_attention(q, q, q, 3))
        assert jnp.allclose(jax_window_attention(array, array, array, window), array)
    for window in (7.0, (3, 3.0)):
        with pytest.raises(ValueError, match="window must be a whole number"):
            jax_window_attention(array, array, array, window)


def test_every_backend_says_why_not():
    args = (*(torch.zeros(1, 4, 4, 1, 8),) * 3, None, None, (3, 3), (1, 1), "mask", 1.0)
    assert {b.name for b in BACKENDS} == {"sdpa", "native", "triton", "eager"}
    assert all(b.why_not(*args) is None or isinstance(b.why_not(*args), str) for b in BACKENDS)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout and option: native computes what eager does, forward and backward, or both raise ValueError."""
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2))) + (
        draw(st.integers(0, 40)),
        draw(st.integers(0, 20)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 20)),
    )
    pairs = lambda high: st.one_of(st.integers(0, high), st.tuples(st.integers(1, high), st.integers(1, high)))
    window, dilation = draw(pairs(11), label="window"), draw(pairs(4), label="dilation")
    border, extra = draw(st.sampled_from(BORDERS)), draw(st.integers(0, 3), label="extra")
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from([torch.clone, strided, transposed]))
    tensors = {name: layout(x.to(dtype)) for name, x in inputs_of(shape, extra).items()}
    results = []
    for backend in ("native", "eager"):
        cast = torch.float64 if backend == "eager" else dtype
        leaves = {name: (x if x.dtype == cast else x.to(cast)).detach().requires_grad_() for name, x in tensors.items()}
        try:
            out = window_attention(**leaves, window=window, border=border, dilation=dilation, backend=backend)
            results.append([out, *torch.autograd.grad(out.double().square().sum(), leaves.values())])
        except ValueError as error:
            results.append(str(error))
    ours, plain = results
    if isinstance(plain, str):
        assert ours == plain
        return
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        if a.numel():
            assert (a.double() - b).abs().max() <= tolerance * max(1, b.abs().max().item())
