"""What all ops share: streams and graphs of a GPU, and where JAX's calls of the native kernels go."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from fourdperf import native
from fourdperf.ops import (
    OPS,
    bilinear_sample,
    cross_attention,
    fourier_embed,
    gather_patches,
    modulated_sine,
    procrustes,
    resize,
    vector_quantize,
    window_attention,
)
from tests.harness import Target, same


def _patches(video, points, backend):
    return gather_patches(video, points[..., 0].long(), points, 3, mode="bilinear", backend=backend)


def _codes(z, codebook, backend):
    found = vector_quantize(z, codebook, backend=backend)
    return found.quantized + found.commitment


GPU = Target("native", "cuda")
# op: a call of it, shapes of its tensors; the first is differentiated
CALLS = {
    "bilinear_sample": (bilinear_sample, (2, 5, 6, 8), (2, 9, 2)),
    "cross_attention": (cross_attention, (1, 5, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16)),
    "fourier_embed": (fourier_embed, (7, 2), (3,)),
    "gather_patches": (_patches, (1, 2, 9, 8, 3), (1, 6, 2)),
    "modulated_siren": (modulated_sine, (2, 9, 8), (2, 3, 4, 8), (9, 2)),
    "procrustes": (procrustes, (3, 4, 4)),
    "resize": (lambda x, backend: resize(x, 16, 1, backend=backend), (2, 8, 12)),
    "vector_quantize": (_codes, (20, 6), (9, 6)),
    "window_attention": (lambda *qkv, backend: window_attention(*qkv, 3, backend=backend), *[(1, 4, 5, 2, 16)] * 3),
}


@pytest.fixture(params=[(op, backend) for op in OPS for backend in ("native", "triton")], ids="-".join)
def call(request):
    """(function of the tensors: value and gradient, tensors, other tensors) of an op on the GPU, called once before."""
    op, backend = request.param
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    function, *shapes = CALLS[op]
    tensors, others = (
        [torch.rand(shape, generator=torch.Generator().manual_seed(seed)).cuda() for shape in shapes] for seed in (0, 1)
    )
    offered = importlib.import_module(f"fourdperf.ops.{op}").BACKENDS
    if reason := next(b for b in offered if b.name == backend).device_why_not(tensors[0]):
        pytest.skip(reason)

    def run(first, *rest):
        first = first.detach().requires_grad_()
        out = function(first, *rest, backend=backend)
        return out.detach(), *torch.autograd.grad((out**3).sum(), first)

    run(*tensors)
    return run, tensors, others


def test_launches_go_to_the_current_stream(call):
    """Tensors that are filled late, in order of that stream: another one would read NaN."""
    run, tensors, _ = call
    want, late = run(*tensors), [torch.full_like(x, torch.nan) for x in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # cycles: some 50 ms
        for x, y in zip(late, tensors):
            x.copy_(y)
        got = run(*late)
        torch.cuda.current_stream().synchronize()
    assert all(same(a, b, GPU) for a, b in zip(got, want))


def test_cuda_graphs(call, request):
    """Captured once and replayed with other tensors."""
    if "procrustes-triton" in request.node.name:
        pytest.skip("it asks on the host whether a matrix wants an SVD")
    run, tensors, others = call
    want, static, graph = run(*others), [x.clone() for x in tensors], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(*static)
    for x, y in zip(static, others):
        x.copy_(y)
    graph.replay()
    assert all(same(a, b, GPU) for a, b in zip(got, want))


@pytest.fixture
def jax_with_a_gpu(monkeypatch):
    """fourdperf.jax.ops.backends as on a machine with a GPU: libraries, and the platforms whose targets were registered."""
    jax = pytest.importorskip("jax")
    from fourdperf.jax.ops import backends

    libraries, registered = {"cpu": None, "cuda": None}, set()
    built = SimpleNamespace(ffi_targets={"an_op": None})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(native, "library", lambda device: (None if libraries[device] else built, libraries[device]))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, platform: registered.add(platform))
    monkeypatch.setattr(backends, "_register", backends._register.__wrapped__)  # which remembers the true answer
    before = jax.config.jax_default_device  # the commands that compare set it, for good
    jax.config.update("jax_default_device", None)
    yield backends, libraries, registered
    jax.config.update("jax_default_device", before)


def test_jax_arrays_may_lie_on_the_cpu_beside_a_gpu(jax_with_a_gpu):
    backends, _, registered = jax_with_a_gpu
    assert backends.platform() == "gpu" and backends.ffi_why_not() is None and registered == {"cpu", "CUDA"}


def test_jax_on_the_cpu_needs_no_library_for_the_gpu(jax_with_a_gpu):
    import jax

    backends, libraries, registered = jax_with_a_gpu
    libraries["cuda"] = "the cuda library is not built"
    assert backends.ffi_why_not() == "the cuda library is not built"
    with jax.default_device(jax.devices("cpu")[0]):
        assert backends.platform() == "cpu" and backends.ffi_why_not() is None and registered == {"cpu"}


@pytest.mark.parametrize("backend", ["jnp", "ffi"])
def test_jax_products_are_in_full_precision(backend):
    """Every one in the traces of values and gradients asks for it: JAX's default on a GPU is TF32."""
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    from fourdperf.jax import ops

    x, weight, bias, map, xy = (jnp.zeros(shape) for shape in ((5, 4), (6, 4), (6,), (1, 2, 2, 6), (5, 2)))
    siren = lambda x, weight: ops.modulated_siren(x, weight, bias, map, xy, backend=backend)
    linear = lambda x, weight: ops.fourier_linear(x[:, :2], jnp.ones(1), weight, bias, backend=backend)
    rotation = lambda x, weight: ops.procrustes(x[:4], special=True, backend=backend)
    for function in (siren, linear, rotation):
        trace = str(jax.make_jaxpr(jax.grad(lambda *args: function(*args).sum(), (0, 1)))(x, weight))  # noqa: B023
        assert 0 < 2 * trace.count("dot_general[") == trace.count("Precision.HIGHEST")
