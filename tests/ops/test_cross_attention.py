"""cross_attention: every backend against eager and float64, eager against SDPA and the goldens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import cross_attention, cross_attention_eager, use_backend
from tests.conftest import in_use
from tests.harness import (
    EMULATED,
    TARGETS,
    Target,
    check_op,
    device_of,
    dtypes,
    opcheck,
    same_in_jax,
    same_with_threads,
    strided,
    transposed,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "d4rt"

# B, Q, K, H, D, E, share of the keys that are padding
CASES = {
    "plain": (2, 37, 70, 2, 56, 56, 0),
    "padding": (3, 21, 90, 2, 16, 16, 0.4),
    "odd": (2, 5, 7, 3, 9, 11, 0.3),
    "one_key": (1, 3, 1, 1, 8, 8, 0),
    "one_query": (2, 1, 131, 1, 32, 32, 0),
    "wide_values": (1, 50, 65, 1, 4, 40, 0),
}
SIZES = (64, 80, 88, 96, 104, 112, 128)  # heads of the ViT family


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inputs(batch, queries, keys, heads, size, value_size=None, padding=0.0, seed=0, dtype=torch.float64):
    """q, k, v and a mask, or None; the last row of the batch is padding only."""
    values = {
        "q": sample((batch, queries, heads, size), dtype, seed),
        "k": sample((batch, keys, heads, size), dtype, seed + 1),
        "v": sample((batch, keys, heads, value_size or size), dtype, seed + 2),
        "key_padding_mask": None,
    }
    if padding:
        mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed + 3)) < padding
        mask[-1] = True
        values["key_padding_mask"] = mask
    return values


@pytest.fixture(params=(*(t for t in TARGETS if t.isa != EMULATED), Target("native", "cpu", "amx_bf16")), ids=str)
def target(request) -> Target:
    """Of the ops this one alone has a build for tiles of bf16, and no CUDA kernel: Triton serves."""
    yield from in_use(request.param)


def kernel_target(target: Target, size: int):
    if target.backend == "triton" and target.device == "cpu" and size > 64:
        pytest.skip("slow in the interpreter; the sizes in between cover the tile shapes")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@dtypes
def test_agrees_with_eager(case, dtype, target):
    check_op(cross_attention, inputs(*case), target, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_head_of_the_vit_family(size, dtype, target):
    kernel_target(target, min(size, 64) if size in (64, 88) else size)
    check_op(cross_attention, inputs(1, 17, 66, 1, size), target, dtype)


@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
def test_scale(scale, target):
    function = lambda q, k, v, key_padding_mask, backend: cross_attention(q, k, v, scale=scale, backend=backend)
    check_op(function, inputs(1, 9, 70, 2, 8), target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_memory_and_large_scores(dtype, target):
    """Maxima that keep growing over the blocks, differences that underflow."""
    values = inputs(1, 6, 700, 1, 16)
    values["k"] *= torch.linspace(0, 12, 700).double()[:, None, None]
    check_op(cross_attention, values, target, dtype)


def test_eager_is_scaled_dot_product_attention():
    x = inputs(2, 9, 13, 3, 8, padding=0.3)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    mask = x["key_padding_mask"]
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None, :]).transpose(1, 2)
    got = cross_attention_eager(**x)
    assert torch.allclose(got[:-1], want[:-1], atol=1e-14) and (got[-1] == 0).all()


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("name", ["a_cross_attention", "a_cross_attention_mask"])
def test_goldens(name, backend):
    """The attention inside the genuine layer: its projections in torch, its residual and feed-forward around the op."""
    with np.load(GOLDENS / f"{name}.npz") as golden:
        config = json.loads(str(golden["config"]))
        p = {
            key[7:]: torch.from_numpy(golden[key]).requires_grad_() for key in golden.files if key.startswith("params/")
        }
        queries, features = (
            torch.from_numpy(golden[f"in/{key}"]).requires_grad_() for key in ("queries", "encoder_features")
        )
        mask = torch.from_numpy(golden["in/encoder_mask"]).bool() if "in/encoder_mask" in golden.files else None
        width, heads = config["d_model"], config["nhead"]
        weights, biases = p["cross_attn.in_proj_weight"].split(width), p["cross_attn.in_proj_bias"].split(width)
        x = F.layer_norm(queries, (width,), p["norm1.weight"], p["norm1.bias"])
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (heads, -1)) for y, w, b in zip((x, features, features), weights, biases)
        )
        heads = cross_attention(q, k, v, key_padding_mask=mask, backend=backend).flatten(-2)
        y = queries + F.linear(heads, p["cross_attn.out_proj.weight"], p["cross_attn.out_proj.bias"])
        x = F.layer_norm(y, (width,), p["norm2.weight"], p["norm2.bias"])
        y = y + F.linear(F.gelu(F.linear(x, p["ffn.0.weight"], p["ffn.0.bias"])), p["ffn.3.weight"], p["ffn.3.bias"])
        y.backward(torch.from_numpy(golden["in/cot/y"]))
        got = {"out/y": y, "grad/queries": queries.grad, "grad/encoder_features": features.grad}
        got |= {f"grad/params/{key}": x.grad for key, x in p.items()}
        for key, x in got.items():
            error = np.abs(x.detach().numpy() - golden[key]).max()
            assert error <= config["atol"][key], f"{key}: {error:.2e} > {config['atol'][key]:.2e}"


@pytest.fixture
def jax_on_the_cpu():
    """The native kernel runs there alone, also where JAX has a GPU."""
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.usefixtures("jax_on_the_cpu")
@pytest.mark.parametrize("backend", ["jnp", "ffi"])
@pytest.mark.parametrize("padding", [0, 0.4])
def test_jax(padding, backend):
    """Both JAX backends against torch: value and gradients."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import cross_attention as jax_cross_attention

    x = inputs(2, 19, 70, 2, 24, padding=padding, dtype=torch.float32)
    mask = x.pop("key_padding_mask")
    jax_mask = None if mask is None else jnp.asarray(mask.numpy())
    cotangent = sample((2, 19, 2, 24), torch.float32, seed=9)
    function = lambda *qkv: jax_cross_attention(*qkv, key_padding_mask=jax_mask, backend=backend)
    got, pullback = jax.vjp(jax.jit(function), *(jnp.asarray(y.numpy()) for y in x.values()))
    leaves = [y.requires_grad_() for y in x.values()]
    want = cross_attention(*leaves, key_padding_mask=mask, backend="eager")
    grads = torch.autograd.grad(want, leaves, cotangent)
    for ours, theirs in zip((got, *pullback(jnp.asarray(cotangent.numpy()))), (want, *grads)):
        assert np.abs(np.asarray(ours) - theirs.detach().numpy()).max() <= 3e-6 * theirs.abs().max()


@pytest.mark.usefixtures("jax_on_the_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_ffi_dtypes_and_vmap(dtype):
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import cross_attention as jax_cross_attention

    values = [y.to(getattr(torch, dtype)) for y in list(inputs(3, 9, 40, 2, 16).values())[:3]]
    want = cross_attention(*values, backend="native")
    arrays = [jnp.asarray(y.float().numpy()).astype(dtype) for y in values]
    got = jax_cross_attention(*arrays, backend="ffi")
    assert got.dtype == arrays[0].dtype and same_in_jax(got, want)
    mapped = jax.vmap(lambda q, k, v: jax_cross_attention(q[None], k[None], v[None], backend="ffi")[0])(*arrays)
    assert same_in_jax(mapped, want)


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_non_contiguous(layout, target):
    x = inputs(2, 9, 70, 2, 8, padding=0.3, dtype=torch.float32)
    x = {name: y.to(target.device) for name, y in x.items()}
    mask = x.pop("key_padding_mask")
    want = cross_attention(**x, key_padding_mask=mask, backend=target.backend)
    views = {name: layout(y).requires_grad_() for name, y in x.items()}
    got = cross_attention(**views, key_padding_mask=mask.T.contiguous().T, backend=target.backend)
    assert torch.equal(got, want)
    leaves = [y.requires_grad_() for y in x.values()]
    cotangent = torch.ones(1, 1, 1, 1, device=target.device).expand(want.shape)  # stride 0
    grads = torch.autograd.grad(got, list(views.values()), cotangent)
    wanted = torch.autograd.grad(
        cross_attention(*leaves, key_padding_mask=mask, backend=target.backend), leaves, cotangent
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))


def test_one_memory_for_many_without_a_copy(target):
    """Keys and values expanded along the batch (stride 0)."""
    x = inputs(1, 9, 70, 2, 8, dtype=torch.float32)
    q, k, v = (x[name].to(target.device) for name in "qkv")
    q = q.reshape(3, 3, 2, 8)
    got = cross_attention(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), backend=target.backend)
    want = cross_attention(q.reshape(1, 9, 2, 8), k, v, backend=target.backend)
    # the interpreter's matrix products are numpy's, whose rounding depends on a row's place in its tile
    rounding = 0 if target.backend == "native" else 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.reshape(1, 9, 2, 8), want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 2, 8), (2, 0, 4, 2, 8), (2, 3, 0, 2, 8), (2, 3, 4, 0, 8), (2, 3, 4, 2, 0)], ids=str
)
def test_empty(shape, target):
    x = [y.to(target.device).requires_grad_() for y in list(inputs(*shape, dtype=torch.float32).values())[:3]]
    out = cross_attention(*x, backend=target.backend)
    want = cross_attention(*x, backend="eager")
    assert out.shape == want.shape and torch.equal(out, want) and not out.isnan().any()
    for d_x, x in zip(torch.autograd.grad(out.sum(), x), x):
        assert d_x.shape == x.shape and not d_x.isnan().any()


def test_padding_is_never_read(target):
    """NaN and infinity in padding reach nothing; rows of padding only give zeros and gradient zero."""
    x = inputs(2, 5, 70, 2, 8, padding=0.5, dtype=torch.float32)
    mask = x["key_padding_mask"]
    clean = [x[name].to(target.device).requires_grad_() for name in "qkv"]
    dirty = [x[name].to(target.device) for name in "qkv"]
    dirty[1] = dirty[1].masked_fill(mask.to(target.device)[:, :, None, None], float("nan"))
    dirty[2] = dirty[2].masked_fill(mask.to(target.device)[:, :, None, None], float("inf"))
    dirty = [y.requires_grad_() for y in dirty]
    mask = mask.to(target.device)
    results = []
    for leaves in (clean, dirty):
        out = cross_attention(*leaves, key_padding_mask=mask, backend=target.backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, wanted in zip(*results):
        assert torch.equal(ours, wanted) and (ours[-1] == 0).all()
    assert (results[1][2][0][mask[0]] == 0).all() and (results[1][3][0][mask[0]] == 0).all()


def test_nan_and_infinity_arrive(target):
    x = inputs(1, 3, 70, 1, 8, dtype=torch.float32)
    q, k, v = (x[name].to(target.device) for name in "qkv")
    q[0, 1, 0, 2] = float("nan")
    out = cross_attention(q, k, v, backend=target.backend)
    assert out[0, 1].isnan().all() and not out[0, [0, 2]].isnan().any()
    k[0, 66] = float("nan")
    assert cross_attention(q, k, v, backend=target.backend).isnan().all()


def test_queries_and_threads_are_independent():
    """On the CPU a query's result is the same bits, whatever stands beside it and however many threads there are; so are
    gradients, but for what stands beside it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(1, 150, 300, 2, 64)
        q, k, v = (x[name].to(dtype) for name in "qkv")

        def everything():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = cross_attention(*leaves, backend="native")
            return out, *torch.autograd.grad(out.square().sum(), leaves)

        want = cross_attention(q, k, v, backend="native")
        for chunk in (1, 7, 64, 149):
            parts = [cross_attention(part, k, v, backend="native") for part in q.split(chunk, 1)]
            assert torch.equal(torch.cat(parts, 1), want)
        same_with_threads(everything)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_derivatives_and_registration(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "native" and device == "cuda":
        pytest.skip("native runs on cpu")
    x = inputs(2, 3, 4, 1, 2, 3, padding=0.3)
    mask = x.pop("key_padding_mask").to(device)
    mask[0] = torch.tensor([False, True, False, False])
    leaves = [y.to(device).requires_grad_() for y in x.values()]
    function = lambda *qkv: cross_attention(*qkv, key_padding_mask=mask, backend=backend)
    fast = backend == "triton"  # whose interpreter takes a second for ten calls
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast)
    name = "cross_attention" if backend == "native" else "cross_attention_triton"
    op, d_op = getattr(torch.ops.fourdperf, name), getattr(torch.ops.fourdperf, name + "_backward")
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [y.detach().to(dtype).requires_grad_() for y in leaves]
        opcheck(op, (*leaves, mask, 0.5), dtype)
        opcheck(op, (*leaves, None, 0.5), dtype)
        out, stats = (y.detach() for y in op(*leaves, mask, 0.5))
        opcheck(d_op, (out, *(y.detach() for y in leaves), mask, stats, 0.5), dtype)


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap, func.grad, jvp (eager alone has it, and is chosen), autocast, compile without a graph break."""
    q, k, v = (y.to(device_of(backend)) for y in list(inputs(2, 5, 9, 2, 8, dtype=torch.float32).values())[:3])
    want = cross_attention(q, k, v, backend=backend)
    one = lambda q, k, v: cross_attention(q[None], k[None], v[None], backend=backend)[0]
    assert torch.allclose(torch.vmap(one)(q, k, v), want, atol=1e-6)
    shared = torch.vmap(one, in_dims=(0, None, None), out_dims=1)(q, k[0], v[0])
    assert torch.allclose(shared[:, 0], want[0], atol=1e-6)
    grads = torch.func.grad(lambda *x: cross_attention(*x, backend=backend).square().sum(), argnums=(0, 1, 2))(q, k, v)
    eager = torch.func.grad(lambda *x: cross_attention_eager(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, eager))
    per_sample = torch.vmap(torch.func.grad(lambda *x: one(*x).square().sum()))(q, k, v)
    assert torch.allclose(per_sample, eager[0], atol=1e-5)
    with torch.autocast(device_of(backend), torch.bfloat16):
        half = cross_attention(q, k, v.bfloat16(), backend=backend)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), want, atol=3e-2)
    leaf = q.clone().requires_grad_()
    compiled = torch.compile(
        lambda q, k, v: cross_attention(q * 2, k, v, backend=backend) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(compiled(leaf, k, v), cross_attention(q * 2, k, v, backend=backend) + 1, atol=1e-6)
    compiled(leaf, k, v).square().sum().backward()
    assert leaf.grad.abs().sum() > 0
    tangent = torch.func.jvp(lambda q: cross_attention(q, k, v), (q,), (q,))[1]
    assert tangent.shape == want.shape
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(lambda q: cross_attention(q, k, v, backend=backend), (q,), (q,))


BAD = [
    (
        lambda q, k, v: cross_attention(q.int(), k, v),
        "q must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    (lambda q, k, v: cross_attention(q, k.numpy(), v), "k must be a torch.Tensor, got ndarray"),
    (
        lambda q, k, v: cross_attention(q[0], k, v),
        r"q must be \(batch, tokens, heads, channels\), got shape \(3, 2, 8\)",
    ),
    (
        lambda q, k, v: cross_attention(q, k.double(), v),
        r"k must have the dtype of q \(torch.float32\), got torch.float64",
    ),
    (lambda q, k, v: cross_attention(q, k[..., :4], v), r"k must be \(B, K, H, D\) with the B, H, D of q"),
    (lambda q, k, v: cross_attention(q, k, v[:, 1:]), r"v must be \(B, K, H, E\) with the B, K, H of k"),
    (
        lambda q, k, v: cross_attention(q, k, v, key_padding_mask=torch.zeros(2, 5)),
        "key_padding_mask must be a bool tensor, got",
    ),
    (
        lambda q, k, v: cross_attention(q, k, v, key_padding_mask=torch.zeros(2, 3).bool()),
        r"key_padding_mask must be \(B, K\)",
    ),
    (lambda q, k, v: cross_attention(q, k, v, backend="cuda"), "backend must be one of"),
    (
        lambda q, k, v: cross_attention(q.to("meta"), k.to("meta"), v.to("meta"), backend="native"),
        "the native kernels run on cpu and cuda, not on meta",
    ),
]


@pytest.mark.parametrize("call, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(call, message):
    q, k, v, _ = inputs(2, 3, 5, 2, 8, dtype=torch.float32).values()
    with pytest.raises(ValueError, match=message):
        call(q, k, v)


def test_use_backend():
    q, k, v, _ = inputs(2, 3, 5, 2, 8, dtype=torch.float32).values()
    with use_backend("eager"):
        assert torch.equal(cross_attention(q, k, v), cross_attention_eager(q, k, v))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout, mask and scale: native computes what eager does, forward and backward."""
    batch, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    queries, keys = data.draw(st.integers(0, 130)), data.draw(st.integers(0, 140))
    size, value_size = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from([torch.clone, strided, transposed]))
    scale = data.draw(st.sampled_from([None, 0.7, -0.2]))
    x = inputs(batch, queries, keys, heads, size, value_size, data.draw(st.sampled_from([0, 0.3, 0.9])) if batch else 0)
    mask = x.pop("key_padding_mask")
    leaves = [layout(y.to(dtype)).requires_grad_() for y in x.values()]
    results = []
    for backend in ("native", "eager"):
        out = cross_attention(*leaves, key_padding_mask=mask, scale=scale, backend=backend)
        results.append(
            (out, *torch.autograd.grad(out.sum() if out.numel() else out.sum() * 0, leaves, allow_unused=True))
        )
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    for ours, plain in zip(*results):
        if plain is not None and plain.numel():
            assert ours.shape == plain.shape and ours.dtype == plain.dtype
            bound = tolerance * max(1, plain.double().abs().max().item())
            assert (ours.double() - plain.double()).abs().max().item() <= bound


@pytest.mark.heavy
def test_strides_beyond_2_to_the_31():
    big = torch.zeros(3, 2**30, dtype=torch.bfloat16)
    q = big[:, :16].view(3, 1, 1, 16).transpose(0, 1)  # tokens 2^30 elements apart
    q.copy_(sample((1, 3, 1, 16)))
    assert torch.equal(cross_attention(q, q, q, backend="native"), cross_attention(*[q.clone()] * 3, backend="native"))
