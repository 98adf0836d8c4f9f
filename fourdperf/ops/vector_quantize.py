"""vector_quantize: the nearest of K codes for every row, without a matrix of all distances, with what training needs.

    indices    = argmin over k of |z - c_k|^2 (metric 'l2'), or of -z . c_k / |c_k| ('cosine', the smallest angle)
    quantized  = c[indices], its gradient handed to z as it is (straight through)
    usage_k    = how many rows have index k
    commitment = mean |z - sg(c[indices])|^2, codebook = mean |c[indices] - sg(z)|^2; means over all numbers, sg: no gradient

z (.., C), codebook (K, C), of one dtype; indices (..) and usage (K) int64; quantized (.., C) in that dtype; commitment and
codebook scalars in float32 (float64 for float64), 0 where z is empty. 'cosine' is of the search alone: codes and losses are
of the codebook as it is given, so normalise z and codebook for losses between directions. A zero code has the cosine 0.

The lowest index wins where scores are equal. Scores are |c_k|^2 / 2 - z . c_k (the rest of the distance is the row's own),
computed in float32, of bfloat16 and float16 inputs too: these give the very indices of their float32 copies. In the native
and Triton kernels equal codes have equal scores wherever they stand; eager's are those of a matrix product. A score of NaN
never wins: a code with NaN is never chosen; a row with NaN (or without any score below infinity) gets index 0, which usage
counts. quantized is NaN where z is NaN or infinite, and the losses are then not finite.

Derivatives: z through quantized and commitment, the codebook through the loss of that name; of any order (the indices are
constants). Sums over the rows of a code are in the order of rows: deterministic, on CUDA too. Autocast changes nothing.

    code_sums(x, indices, K)   sums (K, C) of the rows x (N, C) by code, with which moving averages of codes are kept

Other conventions:
    VQ-VAE, TiTok            z_q, loss = commitment_cost * commitment + codebook, F.normalize of both before where they use it
    taming-transformers      loss = commitment + beta * codebook with legacy=True
    one-hot formulations     usage is the sum of the one-hot rows; perplexity = exp(-sum p log p), p = usage / rows
    vector-quantize-pytorch  use_cosine_sim: normalise both, then either metric

Raises ValueError for shapes that do not fit, K = 0 or C = 0, other dtypes, an unknown metric, or a backend that cannot run.

Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning" (arXiv 1711.00937), section 3.
"""

import functools
from typing import NamedTuple

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
from fourdperf.ops.checks import check_choice, check_floating, check_same, no_autocast, require

METRICS = ("l2", "cosine")
SHORTEST = 1e-12  # what a code's length is taken for at least
EAGER_SCORES = 2**24  # at a time


class Quantization(NamedTuple):
    """quantized (.., C), indices (..), usage (K), and the scalars commitment and codebook; see the module."""

    quantized: torch.Tensor
    indices: torch.Tensor
    usage: torch.Tensor
    commitment: torch.Tensor
    codebook: torch.Tensor


def vector_quantize(
    z: torch.Tensor, codebook: torch.Tensor, *, metric: str = "l2", backend: str | None = None
) -> Quantization:
    """The nearest codes, their use and both losses. See the module for all else.

    Args:
        z: (.., C)
        codebook: (K, C), of the dtype of z.
        metric: 'l2' or 'cosine'.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.
    """
    check_floating("z", z)
    check_floating("codebook", codebook)
    check_same("codebook", codebook, "z", z)
    require(
        codebook.ndim == 2 and 0 not in codebook.shape,
        f"codebook must have shape (K, C) with K and C at least 1, got {tuple(codebook.shape)}",
    )
    channels = codebook.shape[1]
    require(
        z.ndim >= 1 and z.shape[-1] == channels,
        f"z must have shape (.., C) with C = {channels}, as the codebook, got {tuple(z.shape)}",
    )
    check_choice("metric", metric, METRICS)
    args = z, codebook, metric
    return choose("vector_quantize", BACKENDS, args, backend)(*args)


def code_sums(x: torch.Tensor, indices: torch.Tensor, codes: int, *, backend: str | None = None) -> torch.Tensor:
    """Sums of the rows of `x` by their code: x (N, C), indices (N) integers in [0, codes) -> (codes, C) in the dtype of x.

    Differentiable in x. Raises ValueError for shapes that do not fit, other dtypes, or a backend that cannot run.
    """
    check_floating("x", x)
    require(x.ndim == 2, f"x must have shape (N, C), got {tuple(x.shape)}")
    is_integer = isinstance(indices, torch.Tensor) and indices.dtype in (torch.int64, torch.int32)
    require(
        is_integer,
        f"indices must be a tensor of int64 or int32, got {getattr(indices, 'dtype', type(indices).__name__)}",
    )
    require(
        indices.shape == x.shape[:1],
        f"indices must have shape (N,) with N = {x.shape[0]}, as x, got {tuple(indices.shape)}",
    )
    require(indices.device == x.device, f"indices must be on the device of x ({x.device}), got {indices.device}")
    require(codes >= 1, f"codes must be at least 1, got {codes}")
    args = x, indices.long(), codes
    return choose("code_sums", SUMS_BACKENDS, args, backend)(*args)


# ---- what all backends share: everything but the search, and the sums in the gradient of the codebook


def _quantize(search, take, z, codebook, metric):
    wide = _wide(z)
    rows = z.reshape(-1, z.shape[-1])
    with no_autocast(z.device.type):
        indices = search(rows.detach(), codebook.detach(), metric)
        found = take(codebook.to(wide), indices)
        rows = rows.to(wide)
        count = max(rows.numel(), 1)
        commitment = (rows - found.detach()).square().sum() / count
        towards = (found - rows.detach()).square().sum() / count
        usage = indices.new_zeros(len(codebook)).scatter_add(0, indices, torch.ones_like(indices))
        through = found.detach().to(z.dtype).view(z.shape) + (z - z.detach())
    return Quantization(through, indices.view(z.shape[:-1]), usage, commitment, towards)


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


# ---- eager


def vector_quantize_eager(z, codebook, metric="l2"):
    """The reference in plain torch: scores by matrix products, some rows at a time."""
    return _quantize(_search_eager, _take_eager, z, codebook, metric)


def code_sums_eager(x, indices, codes):
    """The reference in plain torch: the sum is the gradient of a look-up."""
    with no_autocast(x.device.type):
        sums = torch.ops.aten.embedding_dense_backward(x.to(_wide(x)), indices, codes, -1, False)
    return sums.to(x.dtype)


def _search_eager(z, codebook, metric):
    z, codebook = z.to(_wide(z)), codebook.to(_wide(z))
    square = codebook.square().sum(1)
    half = square / 2
    if metric == "cosine":
        codebook, half = codebook / square.sqrt().clamp_min(SHORTEST)[:, None], torch.zeros_like(half)
    found = []
    for rows in z.split(max(1, EAGER_SCORES // len(codebook))):
        scores = torch.addmm(half, rows, codebook.T, alpha=-1)
        found.append(scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argmin(1))
    return torch.cat(found)


def _take_eager(codebook, indices):
    return F.embedding(indices, codebook)


# ---- schema, fake, autograd, vmap


def _fake_search(z, codebook, metric):
    return z.new_empty(z.shape[0], dtype=torch.int64)


def _fake_take(codebook, indices):
    return codebook.new_empty(indices.shape[0], codebook.shape[1])


def _fake_sums(x, indices, codes):
    return x.new_empty(codes, x.shape[1])


def _define(suffix, kernels):
    """(search, take, sums) on kernels.search(z, codebook, indices, metric) and kernels.sums(x, indices, out)."""

    def run_search(z, codebook, metric):
        indices = _fake_search(z, codebook, metric)
        if len(z):
            kernels.search(z.contiguous(), codebook.contiguous(), indices, metric)
        return indices

    def run_take(codebook, indices):
        return codebook.index_select(0, indices)

    def run_sums(x, indices, codes):
        out = _fake_sums(x, indices, codes)
        if out.numel():
            kernels.sums(x.contiguous(), indices.contiguous(), out)
        return out

    def save_take(ctx, inputs, output):
        codebook, indices = inputs
        ctx.codes = codebook.shape[0]
        ctx.save_for_backward(indices)

    def backward_take(ctx, d_rows):
        return sums(d_rows, ctx.saved_tensors[0], ctx.codes), None

    def save_sums(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    def backward_sums(ctx, d_sums):
        return take(d_sums, ctx.saved_tensors[0]), None, None

    def vmap_search(info, in_dims, z, codebook, metric):
        if in_dims[1] is None:
            z = z.movedim(in_dims[0], 0)
            return search(z.flatten(0, 1), codebook, metric).unflatten(0, z.shape[:2]), 0
        pairs = zip(*_mapped(info, in_dims, z, codebook))
        return torch.stack([search(*pair, metric) for pair in pairs]), 0

    def vmap_take(info, in_dims, codebook, indices):
        codebook, indices = _mapped(info, in_dims, codebook, indices)
        rows = take(codebook.flatten(0, 1), _apart(indices, codebook.shape[1]))
        return rows.unflatten(0, indices.shape), 0

    def vmap_sums(info, in_dims, x, indices, codes):
        x, indices = _mapped(info, in_dims, x, indices)
        out = sums(x.flatten(0, 1), _apart(indices, codes), len(x) * codes)
        return out.unflatten(0, (len(x), codes)), 0

    search = define(
        f"vector_quantize{suffix}(Tensor z, Tensor codebook, str metric) -> Tensor",
        fake=_fake_search,
        vmap=vmap_search,
        CPU=run_search,
        CUDA=run_search,
    )
    take = define(
        f"vector_quantize{suffix}_take(Tensor codebook, Tensor indices) -> Tensor",
        fake=_fake_take,
        setup_context=save_take,
        backward=backward_take,
        vmap=vmap_take,
        CPU=run_take,
        CUDA=run_take,
    )
    sums = define(
        f"vector_quantize{suffix}_sums(Tensor x, Tensor indices, int codes) -> Tensor",
        fake=_fake_sums,
        setup_context=save_sums,
        backward=backward_sums,
        vmap=vmap_sums,
        CPU=run_sums,
        CUDA=run_sums,
    )
    return functools.partial(_quantize, search, take), sums


def _mapped(info, in_dims, *tensors):
    """The tensors with the mapped axis in front, repeated where there is none."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims)
    ]


def _apart(indices, codes):
    """Indices (B, N) into B codebooks one after the other."""
    return (indices + codes * torch.arange(len(indices), device=indices.device)[:, None]).flatten()


# ---- native and Triton


class _Native:
    """Launches csrc/vector_quantize."""

    @staticmethod
    def search(z, codebook, indices, metric):
        library, launch = where(z)
        terms = codebook.new_empty(2 * len(codebook), dtype=_wide(z)) if z.is_cuda else None
        library.vector_quantize(
            z.data_ptr(),
            codebook.data_ptr(),
            indices.data_ptr(),
            *_sizes(z, codebook),
            METRICS.index(metric),
            0 if terms is None else terms.data_ptr(),
            launch,
        )

    @staticmethod
    def sums(x, indices, out):
        library, launch = where(x)
        order, starts = _by_code(indices, len(out)) if x.is_cuda else (None, None)
        library.code_sums(
            x.data_ptr(),
            indices.data_ptr(),
            out.data_ptr(),
            *_sizes(x, out),
            0 if order is None else order.data_ptr(),
            0 if starts is None else starts.data_ptr(),
            launch,
        )


class _Triton:
    """Launches kernels/vector_quantize.py."""

    @staticmethod
    def search(z, codebook, indices, metric):
        from fourdperf.kernels.vector_quantize import nearest

        nearest(z, codebook, indices, metric == "cosine", SHORTEST)

    @staticmethod
    def sums(x, indices, out):
        from fourdperf.kernels.vector_quantize import sums

        sums(x, *_by_code(indices, len(out)), out)


def _sizes(x, codebook):
    return DTYPE_CODES[x.dtype], x.shape[0], *codebook.shape


def _by_code(indices, codes):
    """Rows sorted by code, in their own order within each, and where each code's rows begin (codes + 1)."""
    ordered, order = indices.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(codes + 1, device=indices.device))


_native, _native_sums = _define("", _Native)
_triton, _triton_sums = _define("_triton", _Triton)

BACKENDS = (
    Backend("native", _native, native_why_not),
    Backend("triton", _triton, triton_why_not),
    Backend("eager", vector_quantize_eager, eager_why_not),
)
SUMS_BACKENDS = (
    Backend("native", _native_sums, native_why_not),
    Backend("triton", _triton_sums, triton_why_not),
    Backend("eager", code_sums_eager, eager_why_not),
)
