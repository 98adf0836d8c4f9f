"""resize: the 4DS readout along time, and images.

Floor: every element of x and out once. Peers: F.interpolate (bicubic, antialias=True) with the permutes that its NCHW layout
asks for, a product with the small dense matrix, torch.compile of that product, and jax.image.resize under jit.
"""

import math

import torch
import torch.nn.functional as F
from fourdperf.benchmarks.harness import Case, jax_why_not

from fourdperf.ops.resize import resize, resize_matrix

# name: shape, sizes, dims
SHAPES = {
    "4DS-B readout (1, 8, 196, 768) -> 16": ((1, 8, 196, 768), (16,), (1,)),
    "4DS-g readout (1, 8, 1024, 1408) -> 16": ((1, 8, 1024, 1408), (16,), (1,)),
    "long clip (4, 24, 256, 768) -> 48": ((4, 24, 256, 768), (48,), (1,)),
    "video frames (16, 480, 854, 3) -> 224x224": ((16, 480, 854, 3), (224, 224), (1, 2)),
    "feature map (8, 384, 24, 24) -> 48x48": ((8, 384, 24, 24), (48, 48), (2, 3)),
}


def cases(device: str):
    for name, (shape, sizes, dims) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()  # each shape compiled afresh, as in a user's model
            yield _case(name, shape, sizes, dims, dtype, device)
    yield _backward_case(device)


def _case(name, shape, sizes, dims, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    providers = {"fourdperf": lambda: resize(x, sizes, dims)}
    if device == "cuda":
        providers["fourdperf triton"] = lambda: resize(x, sizes, dims, backend="triton")
    interpolate = lambda x: _interpolate(x, sizes, dims)
    if device == "cpu" and dtype != torch.float32:
        # F.interpolate takes no 16-bit floats here: the user converts and converts back
        providers["F.interpolate"] = lambda: interpolate(x.float()).to(dtype)
    else:
        providers["F.interpolate"] = lambda: interpolate(x)
    matrices = [resize_matrix(shape[d], size, "cubic", device=device).to(dtype) for size, d in zip(sizes, dims)]
    providers["matmul"] = lambda: _matmul(x, matrices, dims)
    compiled = torch.compile(_matmul)
    providers["matmul, compiled"] = lambda: compiled(x, matrices, dims)
    providers["JAX jit"] = _jax(x, sizes, dims)
    out_shape = [dict(zip(dims, sizes)).get(d, n) for d, n in enumerate(shape)]
    return Case(
        "resize",
        name,
        str(dtype).removeprefix("torch."),
        providers,
        bytes=(math.prod(shape) + math.prod(out_shape)) * x.element_size(),
        tolerance=5e-5 if dtype == torch.float32 else 3e-2,
    )  # the peers round sampling positions to float32


def _backward_case(device):
    name = "4DS-B readout (1, 8, 196, 768) -> 16"
    shape, sizes, dims = SHAPES[name]
    x = torch.randn(shape, device=device, requires_grad=True)
    d_out = torch.randn(1, 16, 196, 768, device=device)
    matrices = [resize_matrix(8, 16, "cubic", device=device).float()]
    both = lambda function: lambda: (out := function(), *torch.autograd.grad(out, x, d_out))
    providers = {
        "fourdperf": both(lambda: resize(x, sizes, dims)),
        "F.interpolate": both(lambda: _interpolate(x, sizes, dims)),
        "matmul": both(lambda: _matmul(x, matrices, dims)),
    }
    moved = x.nbytes + d_out.nbytes
    return Case("resize", name, "float32", providers, bytes=2 * moved, tolerance=1e-5, direction="forward+backward")


def _interpolate(x, sizes, dims):
    bicubic = lambda x, size: F.interpolate(x, size, mode="bicubic", antialias=True)
    if dims == (1,):  # (B, T, S, C): time becomes the height of an image as wide as S * C
        b, t, s, c = x.shape
        return bicubic(x.reshape(b, 1, t, s * c), (sizes[0], s * c)).reshape(b, sizes[0], s, c)
    if dims == (1, 2):  # channels last
        return bicubic(x.permute(0, 3, 1, 2), sizes).permute(0, 2, 3, 1).contiguous()
    return bicubic(x, sizes)


def _matmul(x, matrices, dims):
    for matrix, dim in zip(matrices, dims):
        x = torch.movedim(torch.tensordot(matrix, x, dims=([1], [dim])), 0, dim)
    return x.contiguous()


def _jax(x, sizes, dims):
    if why_not := jax_why_not(x.device.type):
        return why_not
    import jax
    import jax.numpy as jnp

    array = jnp.asarray(x.float().cpu().numpy()).astype(str(x.dtype).removeprefix("torch."))
    shape = [dict(zip(dims, sizes)).get(d, n) for d, n in enumerate(array.shape)]
    function = jax.jit(lambda x: jax.image.resize(x, shape, "cubic"))
    return lambda: function(array)
