"""resize: resample a tensor along any of its axes, with the semantics of jax.image.resize.

    out[..., j, ...] = sum_n W[j, n] x[..., n, ...]     for every axis in `dims`, one after the other
    W[j, n] = k(|s_j - n| / a) / sum_m k(|s_j - m| / a)
    s_j = (j + 1/2) n_in / n_out - 1/2                  (half-pixel centres)
    a = max(n_in / n_out, 1) with antialias, else 1     (the filter widens when the axis shrinks)

k is the triangle (linear), Keys' cubic with a = -1/2 (cubic) or a windowed sinc (lanczos3, lanczos5); nearest takes the
source floor((j + 1/2) n_in / n_out). At the borders the taps outside are dropped and the rest renormalised. An axis
whose size does not change is left alone.

Dtypes: float64, float32, bfloat16, float16; weights and sums are float64 for float64 and float32 for the rest, with one
rounding at the end (JAX rounds the weights of 16-bit inputs too). A NaN or infinity reaches the outputs whose window
covers it (eager, like JAX, multiplies by the zeros outside the window too: there it reaches the whole axis).
Non-contiguous inputs are copied. The op is linear: it can be differentiated any number of times.

Other conventions:
    jax.image.resize(x, shape, method, antialias)      resize(x, shape, range(x.ndim), method=..., antialias=...)
    F.interpolate(mode="bicubic", antialias=True)      resize(x, (h, w), (2, 3))       (equal to rounding)
    F.interpolate(mode="bilinear")                     resize(x, (h, w), (2, 3), method="linear", antialias=False)
    F.interpolate(mode="nearest-exact")                resize(x, (h, w), (2, 3), method="nearest")
    F.interpolate(mode="bicubic") is another filter (a = -3/4, clamped borders) and cannot be reached.

Raises ValueError for a dtype that is not floating, an axis that does not exist or comes twice, a negative size, an empty
axis that is to grow, an axis longer than 2^30, an unknown method, or a backend that cannot run.

Source: jax/_src/image/scale.py (semantics); Keys, "Cubic convolution interpolation", 1981.
"""

import math
from collections.abc import Sequence

import torch

from fourdperf.ops.backends import (
    DTYPE_CODES,
    Backend,
    choose,
    define,
    eager_why_not,
    native_why_not,
    triton_why_not,
    where,
)
from fourdperf.ops.checks import check_choice, check_floating, no_autocast, require

METHODS = ("nearest", "linear", "cubic", "lanczos3", "lanczos5")
LONGEST = 2**30  # positions are computed in whole numbers of 64 bits, products of two lengths among them
_HALF = (torch.bfloat16, torch.float16)


def resize(
    x: torch.Tensor,
    sizes: int | Sequence[int],
    dims: int | Sequence[int],
    *,
    method: str = "cubic",
    antialias: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Resamples the axes `dims` of `x` to the lengths `sizes`. See the module for maths, dtypes and errors.

    Args:
        x: any shape, floating.
        sizes: new lengths, one per entry of `dims` (an int for one axis).
        dims: axes, negative ones count from the end.
        method: 'nearest', 'linear', 'cubic', 'lanczos3' or 'lanczos5'.
        antialias: widen the filter along axes that shrink.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        A contiguous tensor of the dtype of `x`.

    Example, a 4DS readout that wants 16 frames from 8:  resize(features, 16, 1)   # (B, 8, S, C) -> (B, 16, S, C)
    """
    check_floating("x", x)
    check_choice("method", method, METHODS)
    sizes = (sizes,) if isinstance(sizes, int | torch.SymInt) else tuple(sizes)
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    require(len(sizes) == len(dims), f"sizes must have one entry per axis in dims {dims}, got {sizes}")
    for dim in dims:
        require(-x.ndim <= dim < x.ndim, f"dims must be axes of x, which has shape {tuple(x.shape)}, got {dims}")
    dims = tuple(dim % x.ndim for dim in dims)
    require(len(set(dims)) == len(dims), f"dims must name each axis once, got {dims}")
    for size, dim in zip(sizes, dims):
        require(size >= 0, f"sizes must be non-negative, got {sizes}")
        require(size <= LONGEST >= x.shape[dim], f"axes must not be longer than 2^30, got {x.shape[dim]} -> {size}")
        require(x.shape[dim] > 0 or size == 0, f"x must not be empty along axis {dim}, got shape {tuple(x.shape)}")
    changed = [(size, dim) for size, dim in zip(sizes, dims) if x.shape[dim] != size]
    sizes, dims = [size for size, _ in changed], [dim for _, dim in changed]
    return choose("resize", BACKENDS, (x, sizes, dims, method, antialias, False), backend)(
        x, sizes, dims, method, antialias, False
    )


# ---- eager


def resize_matrix(n_in: int, n_out: int, method: str, antialias: bool = True, device=None) -> torch.Tensor:
    """W of the module's formula, (n_out, n_in), float64."""
    n, j = torch.arange(n_in, device=device), torch.arange(n_out, device=device)[:, None]
    if method == "nearest":
        return (torch.div((2 * j + 1) * n_in, 2 * n_out, rounding_mode="floor") == n).double()
    # |s_j - n| / a from whole numbers: one rounding, however long the axis
    distance = ((2 * j + 1) * n_in - (2 * n + 1) * n_out).abs()
    weights = _filter(distance.double() / (2 * max(n_in, n_out) if antialias else 2 * n_out), method)
    return weights / weights.sum(1, keepdim=True)


def _filter(x, method):
    if method == "linear":
        return (1 - x).clamp_min(0)
    if method == "cubic":
        near = (1 - x) * (1 + x - 1.5 * x * x)
        far = 0.5 * (1 - x) * (2 - x) ** 2
        return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    radius = int(method.removeprefix("lanczos"))
    safe = x.clamp_min(1e-3)
    window = radius * torch.sin(math.pi * safe) * torch.sin(math.pi * safe / radius) / (math.pi * safe) ** 2
    return torch.where(x > radius, 0.0, torch.where(x > 1e-3, window, 1.0))


def resize_eager(x, sizes, dims, method="cubic", antialias=True, adjoint=False):
    """The reference in plain torch: one small dense matrix per axis. `adjoint` applies its transpose."""
    y = x.float() if x.dtype in _HALF else x
    with no_autocast(x.device.type):
        for size, dim in zip(sizes, dims):
            n = y.shape[dim]
            if size == 0 or n == 0:
                y = y.new_zeros(_replaced(y.shape, (size,), (dim,)))
                continue
            matrix = (
                resize_matrix(size, n, method, antialias, x.device).T
                if adjoint
                else resize_matrix(n, size, method, antialias, x.device)
            )
            y = torch.movedim(torch.tensordot(matrix.to(y.dtype), y, dims=([1], [dim])), 0, dim)
    return y.to(x.dtype).contiguous()


def _replaced(shape, sizes, dims):
    shape = list(shape)
    for size, dim in zip(sizes, dims):
        shape[dim] = size
    return shape


# ---- schema, fake, autograd, vmap

_SCHEMA = "(Tensor x, SymInt[] sizes, int[] dims, str method, bool antialias, bool adjoint) -> Tensor"


def _fake(x, sizes, dims, method, antialias, adjoint):
    return x.new_empty(_replaced(x.shape, sizes, dims))


def _setup_context(ctx, inputs, output):
    x, _, ctx.dims, ctx.method, ctx.antialias, ctx.adjoint = inputs
    ctx.sizes = [x.shape[dim] for dim in ctx.dims]


def _per_axis(resize_axis):
    """An implementation of the op from a kernel that resamples the middle axis of (outer, n, inner)."""

    def implementation(x, sizes, dims, method, antialias, adjoint):
        if not dims:
            return x.clone(memory_format=torch.contiguous_format)
        y = x.contiguous()
        # the axis that shrinks most goes first, and what lies between two axes is not rounded to 16 bits
        order = sorted(zip(sizes, dims), key=lambda axis: axis[0] / max(x.shape[axis[1]], 1))
        for i, (size, dim) in enumerate(order):
            dtype = x.dtype if i == len(order) - 1 else torch.float32 if x.dtype in _HALF else x.dtype
            out = y.new_empty(_replaced(y.shape, (size,), (dim,)), dtype=dtype)
            if y.numel() == 0 or out.numel() == 0:
                out.zero_()
            else:
                outer, n, inner = math.prod(y.shape[:dim]), y.shape[dim], math.prod(y.shape[dim + 1 :])
                n_in, n_out = (size, n) if adjoint else (n, size)
                resize_axis(y, out, outer, n_in, n_out, inner, METHODS.index(method), antialias, adjoint)
            y = out
        return y

    return implementation


# ---- native and Triton


def _native_axis(x, out, outer, n_in, n_out, inner, method, antialias, adjoint):
    library, launch = where(x)
    workspace = (
        x.new_empty(library.resize_workspace(n_in, n_out, method, antialias, adjoint), dtype=torch.float64)
        if x.is_cuda
        else None
    )
    library.resize(
        x.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[out.dtype],
        outer,
        n_in,
        n_out,
        inner,
        method,
        antialias,
        adjoint,
        workspace.data_ptr() if x.is_cuda else 0,
        launch,
    )


def _triton_axis(*args):
    from fourdperf.kernels.resize import resize_axis

    resize_axis(*args)


def _define(name, resize_axis):
    """The op `name` on one kernel; its backward is the op itself with `adjoint` turned over."""
    implementation = _per_axis(resize_axis)

    def backward(ctx, d_out):
        return op(d_out, ctx.sizes, ctx.dims, ctx.method, ctx.antialias, not ctx.adjoint), None, None, None, None, None

    def vmap(info, in_dims, x, sizes, dims, method, antialias, adjoint):
        return op(x.movedim(in_dims[0], 0), sizes, [dim + 1 for dim in dims], method, antialias, adjoint), 0

    op = define(
        name + _SCHEMA,
        fake=_fake,
        setup_context=_setup_context,
        backward=backward,
        vmap=vmap,
        CPU=implementation,
        CUDA=implementation,
    )
    return op


BACKENDS = (
    Backend("native", _define("resize", _native_axis), native_why_not),
    Backend("triton", _define("resize_triton", _triton_axis), triton_why_not),
    Backend("eager", resize_eager, eager_why_not),
)
