"""vector_quantize: every backend against definitions, eager and float64; ties, NaN, derivatives, JAX alike."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fourdperf import native
from fourdperf.ops import code_sums, vector_quantize
from fourdperf.ops.vector_quantize import METRICS
from tests.harness import check_op, device_of, dtypes, same, strided, transposed

# rows, codes, channels: on either side of tiles, vectors and blocks of every instruction set
CASES = [(7, 5, 3), (1, 1, 1), (13, 33, 12), (6, 64, 16), (25, 31, 17), (4, 130, 40)]
metrics = pytest.mark.parametrize("metric", METRICS)
backends = pytest.mark.parametrize("backend", ["eager", "native", "triton"])


def sample(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def apart(rows, codes, channels, seed=0):
    """Rows close to one of the codes, codes apart in distance and direction: no rounding changes an index."""
    codebook = 4 * F.normalize(sample(codes, channels, seed=seed), dim=-1)
    chosen = torch.randint(codes, (rows,), generator=torch.Generator().manual_seed(seed))
    return codebook[chosen] + 0.02 * sample(rows, channels, seed=seed + 1), codebook


def whole(*shape, largest=4, seed=0):
    """Whole numbers: every product and sum is exact in every dtype, and many distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def everything(metric):
    """One tensor that hangs on z and codebook through everything that has a derivative."""

    def run(z, codebook, backend):
        found = vector_quantize(z, codebook, metric=metric, backend=backend)
        return found.quantized + (2 * found.commitment + 3 * found.codebook).to(z.dtype)

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
@metrics
@dtypes
def test_agrees_with_eager(case, metric, dtype, target):
    z, codebook = apart(*case)
    check_op(everything(metric), {"z": z, "codebook": codebook}, target, dtype)


@pytest.mark.parametrize("case", [*CASES, (3, 5000, 16), (9, 300, 260)], ids=str)
@dtypes
def test_the_nearest_and_the_first_of_equals(case, dtype, target):
    """Against all distances, in numbers without rounding; 5000 codes are more than one panel."""
    if str(target) == "triton-cpu" and case[1] * case[2] > 10000:
        pytest.skip("minutes in Triton's interpreter")
    rows, codes, channels = case
    z, codebook = whole(rows, channels), whole(codes, channels, seed=1)
    distances = (z[:, None] - codebook).square().sum(-1)
    found = vector_quantize(z.to(dtype).to(target.device), codebook.to(dtype).to(target.device), backend=target.backend)
    assert torch.equal(found.indices.cpu(), distances.argmin(1))
    assert torch.equal(found.usage.cpu(), torch.bincount(found.indices.cpu(), minlength=codes))


@metrics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gives_the_indices_of_its_copy_in_float32(metric, dtype, target):
    z, codebook = (x.to(target.device, dtype) for x in (sample(40, 12), sample(150, 12, seed=1)))
    half = vector_quantize(z, codebook, metric=metric, backend=target.backend)
    full = vector_quantize(z.float(), codebook.float(), metric=metric, backend=target.backend)
    assert torch.equal(half.indices, full.indices) and torch.equal(half.quantized, codebook[half.indices])
    assert half.commitment.dtype == torch.float32 and torch.equal(half.commitment, full.commitment)


@metrics
def test_equal_codes_are_the_first_of_them_wherever_they_stand(metric, target):
    codebook, z = (x.to(target.device, torch.float32) for x in (sample(23, 13), sample(40, 13, seed=1)))
    once = vector_quantize(z, codebook, metric=metric, backend=target.backend).indices
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    thrice = torch.cat([codebook, codebook[order], codebook])
    assert torch.equal(vector_quantize(z, thrice, metric=metric, backend=target.backend).indices, once)


def test_cosine_is_of_directions(target):
    z, codebook = sample(50, 8, dtype=torch.float32), sample(20, 8, dtype=torch.float32, seed=1)
    codebook *= torch.logspace(-3, 3, 20)[:, None]
    codebook[7] = 0
    z, codebook = z.to(target.device), codebook.to(target.device)
    found = vector_quantize(z, codebook, metric="cosine", backend=target.backend)
    cosines = F.cosine_similarity(z[:, None].double(), codebook.double(), dim=-1)
    assert torch.equal(found.indices, cosines.argmax(1))
    assert torch.equal(found.quantized, codebook[found.indices])
    torch.testing.assert_close(found.commitment, (z - codebook[found.indices]).square().mean())


@metrics
@dtypes
def test_nan_and_infinity(metric, dtype, target):
    z, codebook = (x.to(target.device, dtype) for x in (whole(6, 3), whole(9, 3, seed=1) + 0.5))
    plain = vector_quantize(z, codebook, metric=metric, backend=target.backend).indices
    z[1, 2], z[2] = torch.nan, torch.inf
    codebook = torch.cat([codebook.new_full((1, 3), torch.nan), codebook, codebook.new_full((1, 3), -torch.inf)])
    found = vector_quantize(z, codebook, metric=metric, backend=target.backend)
    assert found.indices[1] == 0 and found.quantized[1].isnan().all() and found.commitment.isnan()
    assert torch.equal(found.indices[[0, 3, 4, 5]], plain[[0, 3, 4, 5]] + 1)
    scores = -(z[2].double() * codebook.double()).sum(1)
    wanted = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argmin()
    assert found.indices[2] == wanted
    alone = vector_quantize(z[1:2], codebook[:1], metric=metric, backend=target.backend)
    assert alone.indices.tolist() == [0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_quantized_is_nan_where_z_is_not_finite(bad, target):
    z, codebook = (x.float().to(target.device) for x in (whole(4, 3), whole(9, 3, seed=1)))
    z[1, 2] = bad
    found = vector_quantize(z, codebook, backend=target.backend)
    wanted = codebook[found.indices]
    wanted[1, 2] = torch.nan
    torch.testing.assert_close(found.quantized, wanted, equal_nan=True, rtol=0, atol=0)
    assert not found.commitment.isfinite() and not found.codebook.isfinite()
    assert found.indices[1] == 0 or bad == torch.inf


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)])
def test_shapes(shape, target):
    z, codebook = (x.to(target.device).requires_grad_() for x in (sample(*shape, 6), sample(9, 6, seed=1)))
    found = vector_quantize(z, codebook, backend=target.backend)
    assert found.quantized.shape == z.shape and found.indices.shape == shape and found.indices.dtype == torch.int64
    assert found.usage.shape == (9,) and found.usage.sum() == max(z.numel() // 6, 0)
    if not z.numel():
        assert found.commitment == found.codebook == 0
    (found.quantized.sum() + found.commitment + found.codebook).backward()
    assert z.grad.isfinite().all() and codebook.grad.isfinite().all()


@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts(layout, target):
    z, codebook = (x.to(target.device, torch.float32) for x in (sample(4, 5, 7), sample(11, 7, seed=1)))
    ours = vector_quantize(layout(z), layout(codebook), backend=target.backend)
    for a, b in zip(ours, vector_quantize(z, codebook, backend=target.backend)):
        assert same(a, b, target) if a.is_floating_point() else torch.equal(a, b)


# ---- derivatives


@backends
def test_where_gradients_go(backend):
    """Straight through to z alone, commitment to z alone, the codebook's loss to the codebook alone."""
    z, codebook = (x.to(device_of(backend)).requires_grad_() for x in apart(10, 6, 4))
    found = vector_quantize(z, codebook, backend=backend)
    grads = lambda x: torch.autograd.grad(x, (z, codebook), torch.ones_like(x), retain_graph=True, allow_unused=True)
    d_z, d_codebook = grads(found.quantized)
    assert torch.equal(d_z, torch.ones_like(z)) and d_codebook is None
    d_z, d_codebook = grads(found.commitment)
    torch.testing.assert_close(d_z, 2 * (z - codebook[found.indices]).detach() / z.numel())
    assert d_codebook is None
    d_z, d_codebook = grads(found.codebook)
    one_hot = F.one_hot(found.indices, 6).double()
    torch.testing.assert_close(d_codebook, -2 * one_hot.T @ (z - one_hot @ codebook).detach() / z.numel())
    assert d_z is None


@backends
@metrics
def test_gradients(backend, metric):
    z, codebook = (x.to(device_of(backend)).requires_grad_() for x in apart(7, 5, 3))

    def losses(z, codebook):
        found = vector_quantize(z, codebook, metric=metric, backend=backend)
        return found.commitment, found.codebook

    fast = backend == "triton"  # random directions: the interpreter is slow
    # both losses have gradients for one argument alone, whatever finite differences say
    for i, (first, second) in enumerate([(z, codebook.detach()), (codebook, z.detach())]):
        function = (lambda x: losses(x, second)[0]) if i == 0 else (lambda x: losses(second, x)[1])
        assert torch.autograd.gradcheck(function, (first,), fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, (first,), fast_mode=fast)


@backends
def test_code_sums(backend):
    x, indices = sample(20, 5), torch.randint(7, (20,), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(9, 5, dtype=torch.float64).index_add(0, indices, x)
    x, indices = x.to(device_of(backend)), indices.to(device_of(backend))
    torch.testing.assert_close(code_sums(x, indices, 9, backend=backend).cpu(), wanted, atol=1e-15, rtol=1e-14)
    assert not code_sums(x[:0], indices[:0].int(), 9, backend=backend).any()
    x.requires_grad_()
    function = lambda x: code_sums(x, indices, 9, backend=backend).sin()
    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, (x,), fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=fast)


@dtypes
@pytest.mark.parametrize("channels", [1, 12, 37])
def test_code_sums_agrees_with_eager(dtype, channels, target):
    indices = torch.randint(6, (50,), generator=torch.Generator().manual_seed(0))
    function = lambda x, backend: code_sums(x, indices.to(x.device), 6, backend=backend)
    check_op(function, {"x": sample(50, channels)}, target, dtype)


def test_code_sums_leaves_out_indices_of_no_code(target):
    x, indices = sample(5, 3, dtype=torch.float32), torch.tensor([0, -1, 2, 2**40, 3])
    out = code_sums(x.to(target.device), indices.to(target.device), 3, backend=target.backend).cpu()
    assert torch.equal(out, torch.stack([x[0], torch.zeros(3), x[2]]))


@metrics
def test_opcheck(metric):
    z, codebook = sample(9, 4, dtype=torch.float32), sample(6, 4, dtype=torch.float32, seed=1)
    op = torch.ops.fourdperf
    torch.library.opcheck(op.vector_quantize.default, (z, codebook, metric))
    indices = op.vector_quantize(z, codebook, metric)
    torch.library.opcheck(op.vector_quantize_take.default, (codebook.clone().requires_grad_(), indices))
    torch.library.opcheck(op.vector_quantize_sums.default, (z.clone().requires_grad_(), indices, 6))


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_transforms(backend):
    z, codebook = apart(12, 5, 4)
    z = z.view(3, 4, 4)
    books = torch.stack([codebook, codebook.flip(0), 2 * codebook])

    def loss(z, codebook):
        found = vector_quantize(z, codebook, backend=backend)
        return found.quantized.sin().sum() + 2 * found.commitment + found.codebook

    gradient = torch.func.grad(loss, argnums=(0, 1))
    for in_dims in ((0, None), (0, 0), (None, 0)):
        args = z if in_dims[0] == 0 else z[0], books if in_dims[1] == 0 else codebook
        pick = lambda i: tuple(x[i] if dim == 0 else x for x, dim in zip(args, in_dims))
        for function in (lambda *args: tuple(vector_quantize(*args, backend=backend)), gradient):
            mapped = torch.func.vmap(function, in_dims)(*args)
            for i in range(3):
                for a, b in zip(mapped, function(*pick(i))):
                    torch.testing.assert_close(a[i], b)
    for a, b in zip(
        gradient(z, codebook), torch.autograd.grad(loss(z.requires_grad_(), codebook.requires_grad_()), (z, codebook))
    ):
        torch.testing.assert_close(a, b)


def test_forward_mode():
    z, codebook = apart(6, 4, 3)
    function = lambda z: vector_quantize(z, codebook).quantized
    assert torch.equal(torch.func.jvp(function, (z,), (torch.ones_like(z),))[1], torch.ones_like(z))


@pytest.mark.parametrize("backend", ["native", pytest.param("eager", marks=pytest.mark.heavy)])
def test_compiled(backend):
    z, codebook = (x.float().requires_grad_() for x in apart(12, 5, 4))

    def function(z, codebook):
        found = vector_quantize(z, codebook, backend=backend)
        return *found, *torch.autograd.grad(found.quantized.sum() + found.commitment + found.codebook, (z, codebook))

    def forward(z, codebook):
        return tuple(vector_quantize(z, codebook, backend=backend))

    compiled = torch.compile(forward, fullgraph=True)(z, codebook)
    grads = torch.autograd.grad(compiled[0].sum() + compiled[3] + compiled[4], (z, codebook))
    for a, b in zip((*compiled, *grads), function(z, codebook)):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing():
    z, codebook = (x.float().requires_grad_() for x in apart(20, 9, 5))
    for backend in ("eager", "native"):
        plain = vector_quantize(z, codebook, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = vector_quantize(z, codebook, backend=backend)
            (d_codebook,) = torch.autograd.grad(found.codebook, codebook)
        assert all(torch.equal(a, b) for a, b in zip(plain, found)) and d_codebook.dtype == torch.float32


def test_the_number_of_threads_changes_nothing(target):
    z, codebook = (x.to(target.device, torch.float32) for x in (sample(100, 12), sample(70, 12, seed=1)))
    z, codebook = z.requires_grad_(), codebook.requires_grad_()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        ours = vector_quantize(z, codebook, backend=target.backend)
        found.append((*ours, *torch.autograd.grad(ours.commitment + ours.codebook, (z, codebook))))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


# ---- JAX


@metrics
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax(metric, dtype):
    jax = pytest.importorskip("jax")
    from fourdperf.jax import ops

    z, codebook = apart(26, 37, 6)
    z, codebook = (jax.numpy.asarray(x.view(-1, 6).numpy(), dtype) for x in (z, codebook))
    z = z.reshape(2, 13, 6)
    as_torch = lambda x: torch.from_numpy(np.array(x, np.float32))
    theirs = [as_torch(x).requires_grad_() for x in (z, codebook)]
    found = vector_quantize(*theirs, metric=metric, backend="eager")
    grads = torch.autograd.grad(2 * found.commitment + found.codebook + found.quantized.sum(), theirs)

    for backend in ("jnp", "ffi"):

        def loss(z, codebook):
            ours = ops.vector_quantize(z, codebook, metric=metric, backend=backend)
            return 2 * ours.commitment + ours.codebook + ours.quantized.astype("float32").sum(), ours

        (_, ours), our_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(z, codebook)
        assert ours.quantized.dtype == dtype and ours.indices.dtype == "int32"
        for a, b in zip((*ours, *our_grads), (*found, *grads)):
            tolerance = 2e-2 if a.dtype == "bfloat16" else 1e-5
            torch.testing.assert_close(as_torch(a), b.detach().float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
def test_jax_ties_nan_and_chunks(backend):
    """2500 codes are three chunks of the mirror."""
    pytest.importorskip("jax")
    from fourdperf.jax import ops

    z, codebook = whole(9, 3, largest=9).float(), whole(2500, 3, largest=9, seed=1).float()
    codebook[1], z[4, 1] = torch.nan, torch.nan
    wanted = vector_quantize(z, codebook, backend="native")
    found = ops.vector_quantize(z.numpy(), codebook.numpy(), backend=backend)
    assert np.array_equal(found.indices, wanted.indices) and np.array_equal(found.usage, wanted.usage)
    assert np.array_equal(found.quantized, wanted.quantized, equal_nan=True) and np.isnan(found.quantized).sum() == 1
    empty = ops.vector_quantize(z[:0].numpy(), codebook.numpy(), backend=backend)
    assert empty.quantized.shape == (0, 3) and empty.commitment == 0


def test_jax_code_sums():
    jax = pytest.importorskip("jax")
    from fourdperf.jax import ops

    x, indices = sample(20, 5, dtype=torch.float32), torch.randint(7, (20,), generator=torch.Generator().manual_seed(0))
    far = indices.clone()
    far[:3] = torch.tensor([-1, 7, 2**30])
    for some in (indices, far):
        wanted = code_sums(x, some, 7, backend="native")
        found = ops.code_sums(x.numpy(), some.int().numpy(), 7)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    gradient = jax.grad(lambda x: jax.numpy.sin(ops.code_sums(x, indices.int().numpy(), 7)).sum())(x.numpy())
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(code_sums(x, indices, 7).sin().sum(), x)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    assert ops.code_sums(jax.numpy.zeros((0, 5), "bfloat16"), jax.numpy.zeros(0, int), 7).dtype == "bfloat16"
    for args, message in (
        ((x[0], indices, 7), "x must have"),
        ((x, indices[1:], 7), "N = 20"),
        ((x, indices, 0), "codes"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.code_sums(*(a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in args))
    with pytest.raises(ValueError, match="'ffi' cannot run: there is no native one"):
        ops.code_sums(x.detach().numpy(), indices.numpy(), 7, backend="ffi")


# ---- errors, and anything at all


@pytest.mark.parametrize(
    "z, codebook, options, message",
    [
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(4, 2), {}, "z must be"),
        (torch.ones(3, 2), torch.ones(4, 2, dtype=torch.float64), {}, "codebook must have the dtype of z"),
        (torch.ones(3, 2), torch.ones(4, 3), {}, r"z must have shape \(.., C\) with C = 3"),
        (torch.ones(()), torch.ones(4, 3), {}, r"z must have shape \(.., C\)"),
        (torch.ones(3, 2), torch.ones(2), {}, r"codebook must have shape \(K, C\)"),
        (torch.ones(3, 2), torch.ones(0, 2), {}, "K and C at least 1"),
        (torch.ones(3, 0), torch.ones(4, 0), {}, "K and C at least 1"),
        (torch.ones(3, 2), torch.ones(4, 2), {"metric": "l1"}, "metric must be one of 'l2', 'cosine'"),
        (torch.ones(3, 2), torch.ones(4, 2), {"backend": "jnp"}, "backend must be one of"),
    ],
)
def test_errors(z, codebook, options, message):
    with pytest.raises(ValueError, match=message):
        vector_quantize(z, codebook, **options)


@pytest.mark.parametrize(
    "x, indices, codes, message",
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), 2, r"x must have shape \(N, C\)"),
        (torch.ones(3, 2), torch.zeros(3), 2, "indices must be a tensor of int64 or int32"),
        (torch.ones(3, 2), torch.zeros(4, dtype=torch.int64), 2, "with N = 3"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), 0, "codes must be at least 1"),
    ],
)
def test_code_sums_errors(x, indices, codes, message):
    with pytest.raises(ValueError, match=message):
        code_sums(x, indices, codes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fuzz(data):
    """Any shape, layout, dtype and instruction set: the nearest in whole numbers."""
    draw = data.draw
    rows, codes, channels = draw(st.integers(0, 40)), draw(st.integers(1, 140)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    z, codebook = whole(rows, channels, seed=rows), whole(codes, channels, seed=codes)
    layouts = [draw(st.sampled_from([torch.clone, transposed, strided])) for _ in range(2)]
    library = native.library("cpu")[0]
    before = library.cpu_isa()
    library.set_cpu_isa(draw(st.sampled_from(library.cpu_isas())))
    try:
        found = vector_quantize(layouts[0](z.to(dtype)), layouts[1](codebook.to(dtype)), backend="native")
    finally:
        library.set_cpu_isa(before)
    assert torch.equal(found.indices, (z[:, None] - codebook).square().sum(-1).argmin(1))
