"""resize: every backend against eager and float64, eager against the goldens and jax.image.resize."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf.ops import resize, use_backend
from fourdperf.ops.resize import METHODS
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

GOLDENS = Path(__file__).parents[1] / "goldens" / "scaling4d"

# shape, sizes, dims
CASES = {
    "readout_up": ((2, 8, 5, 48), (16,), (1,)),
    "readout_down": ((1, 16, 3, 70), (5,), (1,)),
    "one_to_many": ((2, 1, 9), (7,), (1,)),
    "many_to_one": ((2, 13, 9), (1,), (1,)),
    "image": ((2, 19, 23, 3), (31, 11), (1, 2)),
    "planar_image": ((2, 3, 20, 18), (7, 40), (2, 3)),
    "last_axis": ((35, 50), (33,), (-1,)),
    "vector": ((50,), (33,), (0,)),
    "three_axes": ((4, 5, 6, 17), (6, 4, 9), (0, 1, 2)),
    "large_ratio": ((3, 300, 2), (7,), (1,)),
}
methods = pytest.mark.parametrize("method", METHODS)
antialiases = pytest.mark.parametrize("antialias", [True, False], ids=["antialias", "plain"])


def sample(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@dtypes
def test_cubic_agrees_with_eager(case, dtype, target):
    shape, sizes, dims = case
    check_op(lambda x, backend: resize(x, sizes, dims, backend=backend), {"x": sample(shape)}, target, dtype)


@pytest.mark.parametrize("case", [((2, 7, 24), (19,), (1,)), ((2, 19, 3), (7,), (1,))], ids=["up", "down"])
@methods
@antialiases
def test_methods_agree_with_eager(case, method, antialias, target):
    shape, sizes, dims = case
    function = lambda x, backend: resize(x, sizes, dims, method=method, antialias=antialias, backend=backend)
    check_op(function, {"x": sample(shape)}, target, torch.float32)


@pytest.mark.parametrize("backend", ["eager", "native"])
@methods
def test_goldens(method, backend):
    """Numbers of jax.image.resize itself; suggested tolerance 2e-5 of the largest value, nearest exact."""
    with np.load(GOLDENS / f"resize_{method}.npz") as golden:
        for name in json.loads(str(golden["config"]))["outputs"]:
            source, antialias = name.rsplit("_antialias_", 1)
            x, want = torch.from_numpy(golden[f"in/{source}"]), torch.from_numpy(golden[f"out/{name}"])
            got = resize(x, want.shape, range(x.ndim), method=method, antialias=antialias == "true", backend=backend)
            error = (got - want).abs().max() / want.abs().max()
            assert error <= (0 if method == "nearest" else 2e-5), f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", [(2, 8, 5, 33), (2, 3, 37, 6)], ids=str)
@methods
@antialiases
@pytest.mark.parametrize("backend", ["jnp", "ffi"])
def test_jax(shape, method, antialias, backend):
    """Both JAX backends against torch: value and gradient."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import resize as jax_resize

    x, sizes, dims = sample(shape, torch.float32), (13, 4), (1, 2)
    cotangent = sample((shape[0], 13, 4, shape[3]), torch.float32, seed=1)
    function = lambda x: jax_resize(x, sizes, dims, method=method, antialias=antialias, backend=backend)
    got, pullback = jax.vjp(jax.jit(function), jnp.asarray(x.numpy()))
    x.requires_grad_()
    want = resize(x, sizes, dims, method=method, antialias=antialias)
    (d_x,) = torch.autograd.grad(want, x, cotangent)
    tolerance = 2e-5 if backend == "jnp" else 2e-6
    assert np.abs(np.asarray(got) - want.detach().numpy()).max() <= tolerance * want.abs().max()
    assert (
        np.abs(np.asarray(pullback(jnp.asarray(cotangent.numpy()))[0]) - d_x.numpy()).max()
        <= tolerance * d_x.abs().max()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_ffi_dtypes_vmap_and_second_order(dtype):
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax.ops import resize as jax_resize

    x = jnp.asarray(sample((3, 8, 4, 5), torch.float32).numpy()).astype(dtype)
    torch_x = torch.from_numpy(np.array(x.astype("float32"))).to(jax_device(), getattr(torch, dtype))
    want = resize(torch_x, (16, 7), (1, 2), backend="native")
    got = jax_resize(x, (16, 7), (1, 2), backend="ffi")
    assert got.dtype == x.dtype and same_in_jax(got, want)
    assert same_in_jax(jax.vmap(lambda x: jax_resize(x, (16, 7), (0, 1), backend="ffi"))(x), want)
    energy = lambda backend: lambda x: (jax_resize(x, 16, 1, backend=backend) ** 3).sum()
    second = lambda backend: jax.grad(lambda x: (jax.grad(energy(backend))(x) ** 2).sum())(x.astype("float32"))
    assert np.allclose(second("ffi"), second("jnp"), rtol=1e-4, atol=1e-3)


def test_torch_interpolate_is_the_same_filter():
    x = sample((2, 3, 17, 20))  # float64: in float32 torch rounds the sampling positions
    assert torch.allclose(
        resize(x, (31, 9), (2, 3)), F.interpolate(x, (31, 9), mode="bicubic", antialias=True), atol=1e-13
    )
    bilinear = F.interpolate(x, (31, 9), mode="bilinear")
    assert torch.allclose(resize(x, (31, 9), (2, 3), method="linear", antialias=False), bilinear, atol=1e-13)
    assert torch.equal(resize(x, (31, 9), (2, 3), method="nearest"), F.interpolate(x, (31, 9), mode="nearest-exact"))


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_non_contiguous(layout, target):
    x = sample((2, 7, 5, 20), torch.float32).to(target.device)
    want = resize(x, (12, 3), (1, 2), backend=target.backend)
    assert torch.equal(resize(layout(x), (12, 3), (1, 2), backend=target.backend), want)
    one_row = x[:, :1].expand(-1, 7, -1, -1)  # stride 0
    assert torch.equal(
        resize(one_row, 3, 1, backend=target.backend), resize(one_row.contiguous(), 3, 1, backend=target.backend)
    )


@pytest.mark.parametrize(
    "shape, sizes, dims", [((0, 8, 3), 16, 1), ((2, 8, 0), 16, 1), ((2, 8, 3), 0, 1), ((2, 0, 3), 0, 1)]
)
def test_empty(shape, sizes, dims, target):
    x = torch.zeros(shape, device=target.device, requires_grad=True)
    out = resize(x, sizes, dims, backend=target.backend)
    assert out.numel() == 0 and out.shape[dims] == sizes
    (d_x,) = torch.autograd.grad(out.sum(), x)
    assert d_x.shape == x.shape and (d_x == 0).all()


def test_same_size_is_a_copy(target):
    x = sample((2, 8, 3), torch.float32).to(target.device)
    out = resize(x, 8, 1, backend=target.backend)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


def test_nan_reaches_only_its_window(target):
    x = torch.zeros(1, 40, 20, device=target.device)
    x[:, 10] = float("nan")
    hit = resize(x, 80, 1, method="linear", backend=target.backend).isnan()[0, :, 0].nonzero().flatten()
    assert hit.min() >= 18 and hit.max() <= 23 and len(hit) >= 4


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_derivatives_and_registration(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = sample((1, 4, 2, 3)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize(x, (7, 3), (1, 3), backend=backend), x)
    assert torch.autograd.gradgradcheck(lambda x: resize(x, (7, 3), (1, 3), backend=backend) ** 2, x)
    op = torch.ops.fourdperf.resize if backend == "native" else torch.ops.fourdperf.resize_triton
    for dtype in (torch.float32, torch.bfloat16):
        x = sample((2, 8, 3, 4)).to(device, dtype).requires_grad_()
        opcheck(op, (x, [16, 3], [1, 3], "cubic", True, False), dtype)


@pytest.mark.parametrize("backend", ["native", "triton", "eager"])
def test_transforms(backend):
    """vmap, func.grad, jvp (eager alone has it, and is chosen), autocast, compile without a graph break."""
    x = sample((2, 8, 3, 4), torch.float32).to(device_of(backend))
    function = lambda x: resize(x, (16, 5), (0, -1), backend=backend)
    want = resize(x, (16, 5), (1, -1), backend=backend)
    assert torch.equal(torch.vmap(function)(x), want)
    assert torch.equal(torch.vmap(function, in_dims=2, out_dims=2)(x.permute(1, 2, 0, 3)), want.permute(1, 2, 0, 3))
    d_x = torch.func.grad(lambda x: resize(x, 16, 1, backend=backend).square().sum())(x)
    assert d_x.shape == x.shape
    with torch.autocast(device_of(backend), torch.bfloat16):
        assert torch.equal(resize(x, (16, 5), (1, -1), backend=backend), want)
    compiled = torch.compile(
        lambda x: resize(x * 2, (16, 5), (1, -1), backend=backend) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(compiled(x), want * 2 + 1, atol=1e-5)
    assert torch.allclose(torch.func.jvp(lambda x: resize(x, 16, 1), (x,), (x,))[1], resize(x, 16, 1), atol=1e-5)
    if backend != "eager":
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: resize(x, 16, 1, backend=backend), (x,), (x,))


def test_threads_change_nothing():
    x = sample((3, 40, 50), torch.float32)
    same_with_threads(lambda: [resize(x, (64, 20), (1, 2), backend="native")])


def test_use_backend_forces_and_restores():
    x = torch.zeros(2, 3)
    with use_backend("eager"):
        assert resize(x, 5, 1).shape == (2, 5)
        with pytest.raises(ValueError, match="native"), use_backend("metal"):
            pass
    with use_backend("native"), pytest.raises(ValueError, match="forward-mode"):
        torch.func.jvp(lambda x: resize(x, 5, 1), (x,), (x,))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: resize(x.int(), 4, 1), "x must be float64, float32, bfloat16 or float16, got torch.int32"),
        (lambda x: resize(x.numpy(), 4, 1), "x must be a torch.Tensor, got ndarray"),
        (lambda x: resize(x.to_sparse(), 4, 1), "x must be a dense tensor"),
        (lambda x: resize(x, 4, 3), r"dims must be axes of x, which has shape \(2, 3, 5\), got \(3,\)"),
        (lambda x: resize(x, (4, 4), (1, -2)), "dims must name each axis once"),
        (lambda x: resize(x, (4, 4), 1), "sizes must have one entry per axis"),
        (lambda x: resize(x, -1, 1), "sizes must be non-negative"),
        (lambda x: resize(x, 2**31, 1), r"axes must not be longer than 2\^30, got 3 -> 2147483648"),
        (lambda x: resize(x[:, :0], 4, 1), "x must not be empty along axis 1"),
        (lambda x: resize(x, 4, 1, method="bicubic"), "method must be one of 'nearest', 'linear', 'cubic'"),
        (lambda x: resize(x, 4, 1, backend="cuda"), "backend must be one of"),
        (lambda x: resize(x.to("meta"), 4, 1, backend="native"), "the native kernels run on cpu and cuda, not on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 5))


def test_triton_launches_fit_the_grid(monkeypatch):
    """CUDA's second and third axis end at 65535 programs."""
    kernels, grids = pytest.importorskip("fourdperf.kernels.resize"), []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("resize_wide_kernel", "resize_narrow_kernel"):
        monkeypatch.setattr(kernels, name, Recorded())
    for outer, rows in ((2, 8 * 65535), (1, 8 * 65535 + 1), (65536, 3)):
        kernels.resize_axis(torch.empty(0), None, outer, 2, rows, 32, 1, False, False)
    assert [len(grid) for grid in grids] == [3, 1, 1] and max(grids[0][1:]) == 65535


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout and option: native computes what eager does, or both raise ValueError."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=0, max_size=4), label="shape")
    dims = data.draw(st.lists(st.integers(-5, 4), max_size=3), label="dims")
    sizes = data.draw(st.lists(st.integers(-1, 40), min_size=len(dims), max_size=len(dims)), label="sizes")
    method = data.draw(st.sampled_from(METHODS))
    antialias = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from([torch.clone, strided, transposed]))
    x = layout(sample(shape).to(dtype))
    results = []
    for backend in ("native", "eager"):
        try:
            results.append(resize(x, sizes, dims, method=method, antialias=antialias, backend=backend))
        except ValueError as error:
            results.append(str(error))
    ours, plain = results
    if isinstance(plain, str):
        assert ours == plain
    else:
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert torch.allclose(
            ours.double(),
            plain.double(),
            rtol=0,
            atol=tolerance * max(1, plain.double().abs().max().item() if plain.numel() else 1),
        )


@pytest.mark.heavy
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(2, 2**30 + 64, dtype=torch.bfloat16)
    x[1, -64:] = 1
    out = resize(x, 3, 0, method="linear", antialias=False, backend="native")
    assert (
        out.shape == (3, 2**30 + 64)
        and (out[2, -64:] == 1).all()
        and (out[1, -64:] == 0.5).all()
        and (out[:, :64] == 0).all()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_more_than_2_to_the_31_elements_on_a_gpu(backend):
    x = torch.zeros(4, 2**30 + 64, dtype=torch.bfloat16, device="cuda")
    x[3, -64:] = 1
    out = resize(x, 1, 0, method="linear", backend=backend)
    assert ((out[0, -64:] - 5 / 24).abs() < 1e-3).all() and not out[0, :-64].any()
