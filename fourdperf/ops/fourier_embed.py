"""fourier_embed: sines and cosines of coordinates times frequencies, alone or in one pass with the linear layer behind it.

    a[..., d, f] = x[..., d] frequencies[f]
    fourier_embed(x, frequencies)[..., t, d, f] = sin a for t = 0, cos a for t = 1;  the axes (t, d, f) are then flattened:
    sin(x_0 f_0), sin(x_0 f_1), ..., sin(x_1 f_0), ..., cos(x_0 f_0), ...
    fourier_linear(x, frequencies, weight, bias) = F.linear(fourier_embed(x, frequencies), weight, bias)

x (..., D), frequencies (F,), out (..., 2 D F); weight (M, 2 D F), bias (M,). Frequencies are angular, in radians per unit of
x: they hold the 2 pi (or pi) of the convention. octaves, linear_range and gaussian make them.

Dtypes: x float64, float32, bfloat16 or float16, out as x. Frequencies are taken in float32 (float64 for a float64 x) and
angles are never kept in 16 bits. fourier_linear computes in, and returns, the dtype of the weight; x has that dtype, or is
float32 in front of a 16-bit weight (the usual thing, and what autocast makes of it): coordinates in 16 bits lose the bands.

Large angles: native and Triton take the exact product x f of the two floats (an FMA gives what rounding it loses) and are
within 2^-23 of its sine and cosine: to |x f| = 2^17 by a fast reduction in float32 (Triton: to 2^20, in float64), beyond by
Payne and Hanek's, about ten times slower (2.5 times on AVX-512) and as accurate for every finite argument. Eager rounds the product,
and so errs by up to |x f| 2^-24. float64 rounds the product. Infinity and NaN give NaN.

First and second derivatives (and higher ones) with respect to x and frequencies, weight and bias. Non-contiguous inputs
are copied.

Other conventions (axes of the 2 D F columns, and frequencies); the next layer's weight in our order is
weight[:, fourier_columns(D, F, axes)]:
    WangXueyang D4RT      ("trig", "dim", "band"), ours    linear_range(0.5, n, n)
    kathirgounder D4RT    ("dim", "trig", "band")          octaves(64); above 2^20 / |x| a float32 x only feeds noise
    opend4rt              ("dim", "trig", "band")          octaves(10); raw (u, v), if wanted, are concatenated in front
    MooG                  ("trig", "band", "dim")          octaves(n, scale=math.pi); cosines as sin(a + pi/2)
    tiny-cuda-nn          ("dim", "band", "trig")          octaves(n, scale=math.pi)
    Tancik et al., sin(2 pi B x) with a matrix B           fourier_embed(x @ B.T, octaves(1)), order as ours

Raises ValueError for a dtype that is not floating, an x without axes, frequencies that are no vector, a weight or bias that
does not fit, mixed devices, or a backend that cannot run.

Sources: Tancik et al., "Fourier features let networks learn high frequency functions", 2020; Payne and Hanek, "Radian
reduction for trigonometric functions", 1983; polynomials of Cephes (float32) and fdlibm (float64).
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

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
from fourdperf.ops.checks import autocasts, check_floating, require

AXES = ("trig", "dim", "band")


def fourier_embed(x: torch.Tensor, frequencies: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Sines, then cosines, of every coordinate times every frequency. See the module for order, dtypes and errors.

    Args:
        x: (..., D) coordinates.
        frequencies: (F,) angular frequencies, for example octaves(10).
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (..., 2 D F), contiguous, of the dtype of `x`.

    Example, the query embedding of D4RT:  fourier_embed(uv, linear_range(0.5, 10, 10))   # (B, N, 2) -> (B, N, 40)
    """
    frequencies = _checked(x, frequencies)
    return choose("fourier_embed", EMBED_BACKENDS, (x, frequencies), backend)(x, frequencies)


def fourier_linear(
    x: torch.Tensor,
    frequencies: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """F.linear(fourier_embed(x, frequencies), weight, bias) without the embedding in memory.

    (On processors with fast 16-bit products torch multiplies for a 16-bit weight, and the embedding is in memory, once.)

    Args:
        x: (..., D) coordinates, of the weight's dtype, or float32 with a 16-bit weight.
        frequencies: (F,) angular frequencies.
        weight: (M, 2 D F), columns in the order of fourier_embed.
        bias: (M,) or None.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (..., M), contiguous, of the dtype of `weight` (of autocast, where that is on).
    """
    frequencies = _checked(x, frequencies)
    check_floating("weight", weight)
    columns = 2 * x.shape[-1] * frequencies.shape[0]
    if weight.ndim != 2 or weight.shape[1] != columns:
        shape = tuple(weight.shape)
        raise ValueError(f"weight must have shape (M, 2 D F) with 2 D F = {columns}, got {shape}")
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if x.dtype != weight.dtype and not (half and x.dtype == torch.float32):
        raise ValueError(
            f"x must have the dtype of weight ({weight.dtype}), or float32 with a 16-bit weight, got {x.dtype}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x ({x.device}), got {weight.device}")
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != x.device:
            raise ValueError(
                f"bias must have shape ({weight.shape[0]},) and the dtype and device of weight ({weight.dtype}, "
                f"{x.device}), got {tuple(bias.shape)}, {bias.dtype}, {bias.device}"
            )
    if autocasts(x.device.type) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    args = x, frequencies, weight, bias
    return choose("fourier_linear", LINEAR_BACKENDS_CUDA if x.is_cuda else LINEAR_BACKENDS, args, backend)(*args)


def _checked(x, frequencies):
    """Checks both and returns the frequencies in the dtype of the angles."""
    check_floating("x", x)
    check_floating("frequencies", frequencies)
    require(x.ndim >= 1, "x must have shape (..., D), got a tensor without axes")
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies must have shape (F,), got {tuple(frequencies.shape)}")
    if frequencies.device != x.device:
        raise ValueError(f"frequencies must be on the device of x ({x.device}), got {frequencies.device}")
    return frequencies.to(_angle_dtype(x))


def _angle_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- frequencies, and foreign orders


def octaves(n: int, *, scale: float = 2 * math.pi, first: int = 0, dtype=torch.float32, device=None) -> torch.Tensor:
    """scale 2^first, scale 2^(first + 1), ... (n,), computed in float64."""
    return (scale * 2.0 ** torch.arange(first, first + n, dtype=torch.float64, device=device)).to(dtype)


def linear_range(
    low: float, high: float, n: int, *, scale: float = 2 * math.pi, dtype=torch.float32, device=None
) -> torch.Tensor:
    """scale low ... scale high in n equal steps, both ends included, computed in float64."""
    return (scale * torch.linspace(low, high, n, dtype=torch.float64, device=device)).to(dtype)


def gaussian(
    n: int,
    sigma: float,
    *,
    scale: float = 2 * math.pi,
    generator: torch.Generator | None = None,
    dtype=torch.float32,
    device=None,
) -> torch.Tensor:
    """n draws from a normal distribution of standard deviation scale sigma."""
    return (scale * sigma * torch.randn(n, dtype=torch.float64, generator=generator)).to(device, dtype)


def fourier_columns(dims: int, bands: int, axes: Sequence[str]) -> torch.Tensor:
    """For an embedding whose columns run over `axes` (outermost first; 'trig', 'dim', 'band'): (2 D F,) indices such that
    theirs[..., fourier_columns(...)] is in our order, and weight[:, fourier_columns(...)] takes our order."""
    require(sorted(axes) == sorted(AXES), f"axes must be an order of {AXES}, got {tuple(axes)}")
    sizes = {"trig": 2, "dim": dims, "band": bands}
    columns = torch.arange(2 * dims * bands).reshape([sizes[axis] for axis in axes])
    return columns.permute([list(axes).index(axis) for axis in AXES]).flatten()


# ---- eager


def fourier_embed_eager(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """The reference in plain torch; the angle is rounded."""
    dtype = _angle_dtype(x)
    angles = (x.to(dtype)[..., None] * frequencies.to(dtype)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)


def fourier_linear_eager(x, frequencies, weight, bias=None):
    """The reference in plain torch."""
    return F.linear(fourier_embed_eager(x, frequencies).to(weight.dtype), weight, bias)


def _trig(embedding, x, frequencies):
    """(..., 2 D F) -> sines and cosines, each (..., D, F), in the dtype of angles."""
    return embedding.to(frequencies.dtype).reshape(*x.shape[:-1], 2, x.shape[-1], frequencies.shape[0]).unbind(-3)


def _backward_eager(d_out, x, frequencies):
    return _gradients(d_out, fourier_embed_eager(x.to(frequencies.dtype), frequencies), x, frequencies)


def _gradients(d_out, embedding, x, frequencies):
    """Of x and frequencies, whose embedding this is."""
    sines, cosines = _trig(embedding, x, frequencies)
    d_sin, d_cos = _trig(d_out, x, frequencies)
    d_angle = d_sin * cosines - d_cos * sines
    d_frequencies = (d_angle * x.to(frequencies.dtype)[..., None]).flatten(0, -2).sum(0)
    return (d_angle * frequencies).sum(-1).to(x.dtype), d_frequencies


def _rows(x):
    """(..., C) -> (N, C), also where C is 0 or no axis is in front."""
    return x[None].flatten(0, -2)


# ---- schema, fake, autograd, vmap


def _embed_fake(x, frequencies):
    return x.new_empty((*x.shape[:-1], 2 * x.shape[-1] * frequencies.shape[0]))


def _backward_fake(d_out, x, frequencies):
    return x.new_empty(x.shape), frequencies.new_empty(frequencies.shape)


def _ones_fake(x, frequencies, dtype):
    return x.new_empty((*x.shape[:-1], 2 * x.shape[-1] * frequencies.shape[0] + 1), dtype=dtype)


def _linear_fake(x, frequencies, weight, bias):
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mapped_first(x, dim):
    """x with the axis `dim` that vmap maps in front, and where it is now; None: there is none."""
    return (x, None) if dim is None else (x.movedim(dim, 0), 0)


def _ones_eager(x, frequencies, dtype):
    return F.pad(fourier_embed_eager(x, frequencies).to(dtype), (0, 1), value=1.0)


def _define(suffix, launch_embed, launch_backward, launch_linear, launch_ones=None):
    """The ops on one set of kernels. What lies behind the first derivative is made of these ops and of torch's own.

    launch_ones runs on the CPU only.
    """

    def run_embed(x, frequencies):
        out = _embed_fake(x, frequencies)
        if out.numel():
            launch_embed(x.contiguous(), frequencies.contiguous(), out)
        return out

    def run_backward(d_out, x, frequencies):
        d_x, d_frequencies = x.new_zeros(x.shape), frequencies.new_zeros(frequencies.shape)
        if d_out.numel():
            launch_backward(d_out.contiguous(), x.contiguous(), frequencies.contiguous(), d_x, d_frequencies)
        return d_x, d_frequencies

    def run_ones(x, frequencies, dtype):
        """The embedding, of coordinates as wide as the frequencies, in `dtype`, with a one behind every row."""
        out = _ones_fake(x, frequencies, dtype)
        if launch_ones is None or x.is_cuda or out.shape[-1] == 1:
            out[..., :-1], out[..., -1] = run_embed(x, frequencies), 1
        elif out.numel():
            launch_ones(x.contiguous(), frequencies.contiguous(), out)
        return out

    def run_linear(x, frequencies, weight, bias):
        out = _linear_fake(x, frequencies, weight, bias)
        if weight.shape[1] == 0:
            return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        if out.numel():
            launch_linear(
                x.to(frequencies.dtype).contiguous(),
                frequencies.contiguous(),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                out,
            )
        return out

    def embed_backward(ctx, d_out):
        return backward(d_out, *ctx.saved_tensors)

    def ones_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    def ones_backward(ctx, d_out):
        x, frequencies = ctx.saved_tensors
        return *backward(d_out[..., :-1].to(x.dtype), x, frequencies), None

    def second_backward(ctx, g_x, g_frequencies):
        d_out, x, frequencies = ctx.saved_tensors
        wide, f = x.to(frequencies.dtype), frequencies
        sines, cosines = _trig(embed(wide, f), x, f)
        d_sin, d_cos = _trig(d_out, x, f)
        first, second = d_sin * cosines - d_cos * sines, -(d_sin * sines + d_cos * cosines)
        towards = g_x.to(f.dtype)[..., None] * f + g_frequencies * wide[..., None]  # change of the angle
        g_out = torch.stack([towards * cosines, -towards * sines], -3).flatten(-3).to(d_out.dtype)
        along = g_frequencies * first + towards * second * f
        across = g_x.to(f.dtype)[..., None] * first + towards * second * wide[..., None]
        return g_out, along.sum(-1).to(x.dtype), across.flatten(0, -2).sum(0)

    def linear_backward(ctx, d_out):
        x, frequencies, weight, bias = ctx.saved_tensors
        d_x = d_frequencies = d_weight = d_bias = None
        rows = _rows(d_out)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_embedding = (d_out @ weight).to(x.dtype)
            d_x, d_frequencies = backward(d_embedding, x, frequencies)
        with_bias = bias is not None and ctx.needs_input_grad[3]
        if ctx.needs_input_grad[2]:
            # with a column of ones d_out, much the largest tensor here, is read once for both
            wide = x.to(frequencies.dtype)
            embedding = (
                ones(wide, frequencies, weight.dtype) if with_bias else embed(wide, frequencies).to(weight.dtype)
            )
            both = _rows(embedding).T @ rows
            d_weight, d_bias = (both[:-1].T, both[-1]) if with_bias else (both.T, None)
        elif with_bias:
            d_bias = rows.sum(0)
        return d_x, d_frequencies, d_weight, d_bias

    def embed_vmap(info, in_dims, x, frequencies):
        if in_dims[1] is not None:
            return torch.vmap(fourier_embed_eager, in_dims)(x, frequencies), 0
        return embed(x.movedim(in_dims[0], 0), frequencies), 0

    def ones_vmap(info, in_dims, x, frequencies, dtype):
        if in_dims[1] is not None:
            return torch.vmap(_ones_eager, in_dims)(x, frequencies, dtype), 0
        return ones(x.movedim(in_dims[0], 0), frequencies, dtype), 0

    def backward_vmap(info, in_dims, d_out, x, frequencies):
        if in_dims[2] is not None:
            return torch.vmap(_backward_eager, in_dims)(d_out, x, frequencies), (0, 0)
        x, dim = _mapped_first(x, in_dims[1])
        embedding = embed(x.to(frequencies.dtype), frequencies)
        # the kernel would add up the frequencies' gradients of all samples
        return torch.vmap(_gradients, (in_dims[0], dim, dim, None))(d_out, embedding, x, frequencies), (0, 0)

    def linear_vmap(info, in_dims, x, frequencies, weight, bias):
        if in_dims[1] is not None:
            return torch.vmap(fourier_linear_eager, in_dims)(x, frequencies, weight, bias), 0
        x, dim = _mapped_first(x, in_dims[0])
        if in_dims[2] is None and in_dims[3] is None:
            return linear(x, frequencies, weight, bias), 0
        embedding = embed(x.to(frequencies.dtype), frequencies).to(weight.dtype)
        return torch.vmap(F.linear, (dim, *in_dims[2:]))(embedding, weight, bias), 0

    embed = define(
        f"fourier_embed{suffix}(Tensor x, Tensor frequencies) -> Tensor",
        fake=_embed_fake,
        setup_context=_save_inputs,
        backward=embed_backward,
        vmap=embed_vmap,
        CPU=run_embed,
        CUDA=run_embed,
    )
    ones = define(
        f"fourier_embed_ones{suffix}(Tensor x, Tensor frequencies, ScalarType dtype) -> Tensor",
        fake=_ones_fake,
        setup_context=ones_context,
        backward=ones_backward,
        vmap=ones_vmap,
        CPU=run_ones,
        CUDA=run_ones,
    )
    backward = define(
        f"fourier_embed_backward{suffix}(Tensor d_out, Tensor x, Tensor frequencies) -> (Tensor, Tensor)",
        fake=_backward_fake,
        setup_context=_save_inputs,
        backward=second_backward,
        vmap=backward_vmap,
        CPU=run_backward,
        CUDA=run_backward,
    )
    linear = define(
        f"fourier_linear{suffix}(Tensor x, Tensor frequencies, Tensor weight, Tensor? bias) -> Tensor",
        fake=_linear_fake,
        setup_context=_save_inputs,
        backward=linear_backward,
        vmap=linear_vmap,
        CPU=run_linear,
        CUDA=run_linear,
    )
    return embed, linear


# ---- native and Triton


def _sizes(x, frequencies):
    return x.numel() // x.shape[-1], x.shape[-1], frequencies.shape[0]


def _native_embed(x, frequencies, out):
    library, launch = where(x)
    library.fourier_embed(
        x.data_ptr(), frequencies.data_ptr(), out.data_ptr(), DTYPE_CODES[x.dtype], *_sizes(x, frequencies), launch
    )


def _native_backward(d_out, x, frequencies, d_x, d_frequencies):
    library, launch = where(x)
    sizes = _sizes(x, frequencies)
    workspace = x.new_empty(library.fourier_workspace(sizes[0], sizes[2]), dtype=torch.float64) if x.is_cuda else None
    library.fourier_embed_backward(
        d_out.data_ptr(),
        x.data_ptr(),
        frequencies.data_ptr(),
        d_x.data_ptr(),
        d_frequencies.data_ptr(),
        DTYPE_CODES[x.dtype],
        *sizes,
        workspace.data_ptr() if x.is_cuda else 0,
        launch,
    )


def _native_linear(x, frequencies, weight, bias, out):
    if not x.is_cuda and _torch_multiplies(weight.dtype):
        embedding = weight.new_empty(x.numel() // x.shape[-1], weight.shape[1] + 1)
        _native_ones(x, frequencies, embedding)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        # the bias as one more product, summed like the others: torch would write it first, and read and write it again
        torch.mm(embedding, torch.cat([weight, bias[:, None]], 1).T, out=out.view(-1, len(weight)))
        return
    library, launch = where(x)
    library.fourier_linear(
        x.data_ptr(),
        frequencies.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[weight.dtype],
        *_sizes(x, frequencies),
        weight.shape[0],
        launch,
    )


def _native_ones(x, frequencies, out):
    library, launch = where(x)
    library.fourier_embed_ones(
        x.data_ptr(), frequencies.data_ptr(), out.data_ptr(), DTYPE_CODES[out.dtype], *_sizes(x, frequencies), launch
    )


@functools.cache
def _torch_multiplies(dtype):
    """Whether torch has fast products of this 16-bit dtype on this processor (AMX, AVX-512): ours have no tiles."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _triton_embed(*args):
    from fourdperf.kernels.fourier_embed import embed

    embed(*args)


def _triton_backward(*args):
    from fourdperf.kernels.fourier_embed import embed_backward

    embed_backward(*args)


def _triton_linear(*args):
    from fourdperf.kernels.fourier_embed import linear

    linear(*args)


_NATIVE = _define("", _native_embed, _native_backward, _native_linear, _native_ones)
_TRITON = _define("_triton", _triton_embed, _triton_backward, _triton_linear)

EMBED_BACKENDS = (
    Backend("native", _NATIVE[0], native_why_not),
    Backend("triton", _TRITON[0], triton_why_not),
    Backend("eager", fourier_embed_eager, eager_why_not),
)
LINEAR_BACKENDS = (
    Backend("native", _NATIVE[1], native_why_not),
    Backend("triton", _TRITON[1], triton_why_not),
    Backend("eager", fourier_linear_eager, eager_why_not),
)
LINEAR_BACKENDS_CUDA = (LINEAR_BACKENDS[1], LINEAR_BACKENDS[0], LINEAR_BACKENDS[2])  # Triton has the tensor cores
BACKENDS = EMBED_BACKENDS
