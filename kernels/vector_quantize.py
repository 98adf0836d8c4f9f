"""vector_quantize in Triton.

maths     indices[n] = the k with the least score f_k |c_k|^2 / 2 - z_n . f_k c_k; sums of the rows of every code
          (see csrc/vector_quantize/vector_quantize.h)
shapes    z, x (N, C), codebook and out (K, C), indices (N) int64, order (N) and starts (K + 1) int64, all contiguous
work      search: one program = ROWS rows, which go through CODES codes at a time, CHANNELS channels at a time, and keep
          the least score and its index of each row. Sums: one program = one code and CHANNELS channels, row after row
numerics  products in float32 without TF32 (float64 for float64), in the order of channels; no atomics
limits    64-bit addressing, fewer than 2^31 codes
"""

import torch
import triton
import triton.language as tl

TILE, WARPS = {"ROWS": 64, "CODES": 64, "CHANNELS": 16}, 8  # fits the registers of sm_80, of float64 too


@triton.jit
def nearest_kernel(
    p_z,
    p_codebook,
    p_indices,
    rows,
    codes,
    channels,
    shortest,
    COSINE: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_n = n < rows
    b_least = tl.full([ROWS], float("inf"), ACC)
    b_index = tl.zeros([ROWS], dtype=tl.int32)
    for first in range(0, codes, CODES):
        k = first + tl.arange(0, CODES)
        m_k = k < codes
        b_product = tl.zeros([ROWS, CODES], dtype=ACC)
        b_square = tl.zeros([CODES], dtype=ACC)
        for start in range(0, channels, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            m_c = c < channels
            b_z = tl.load(p_z + n[:, None] * channels + c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0)
            p_code = p_codebook + k[None, :].to(tl.int64) * channels + c[:, None]
            b_code = tl.load(p_code, mask=m_k[None, :] & m_c[:, None], other=0.0).to(ACC)
            b_product = tl.dot(b_z.to(ACC), b_code, b_product, input_precision="ieee", out_dtype=ACC)
            b_square += tl.sum(b_code * b_code, 0)
        if COSINE:
            b_length = tl.sqrt(b_square)
            b_score = -b_product / tl.where(b_length > shortest, b_length, shortest)[None, :]
            b_score = tl.where((b_square == b_square)[None, :], b_score, float("inf"))
        else:
            b_score = b_square[None, :] / 2 - b_product
        b_score = tl.where(m_k[None, :] & (b_score == b_score), b_score, float("inf"))
        b_best = tl.min(b_score, 1)
        b_at = tl.min(tl.where(b_score == b_best[:, None], k[None, :], 2147483647), 1)
        closer = b_best < b_least
        b_index = tl.where(closer, b_at, b_index)
        b_least = tl.where(closer, b_best, b_least)
    tl.store(p_indices + n, b_index.to(tl.int64), mask=m_n)


@triton.jit
def sums_kernel(p_x, p_order, p_starts, p_out, channels, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = c < channels
    b_sum = tl.zeros([CHANNELS], dtype=ACC)
    for i in range(tl.load(p_starts + k), tl.load(p_starts + k + 1)):
        n = tl.load(p_order + i)
        b_sum += tl.load(p_x + n * channels + c, mask=m_c, other=0.0).to(ACC)
    tl.store(p_out + k * channels + c, b_sum.to(p_out.dtype.element_ty), mask=m_c)


def _acc(x):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def nearest(z, codebook, indices, cosine, shortest):
    """Launches over at least one row and one code."""
    rows, channels = z.shape
    grid = (triton.cdiv(rows, TILE["ROWS"]),)
    options = {"COSINE": cosine, "ACC": _acc(z), **TILE, "num_warps": WARPS}
    nearest_kernel[grid](z, codebook, indices, rows, len(codebook), channels, shortest, **options)


def sums(x, order, starts, out):
    """Launches over sums that are not empty."""
    codes, channels = out.shape
    size = min(triton.next_power_of_2(channels), 256)
    sums_kernel[(codes, triton.cdiv(channels, size))](
        x, order, starts, out, channels, CHANNELS=size, ACC=_acc(x), num_warps=1
    )


def aot():
    """(kernel, signature, constexprs, options) of what runs hot, for compilation without a GPU."""
    sizes = {"rows": "i64", "codes": "i32", "channels": "i32", "shortest": "fp32"}
    for dtype, acc in (("fp32", tl.float32), ("bf16", tl.float32), ("fp64", tl.float64)):
        for cosine in (False, True):
            constants = {"COSINE": cosine, "ACC": acc, **TILE}
            pointers = {"p_z": f"*{dtype}", "p_codebook": f"*{dtype}", "p_indices": "*i64"}
            names = dict.fromkeys(constants, "constexpr")
            yield nearest_kernel, {**pointers, **sizes, **names}, constants, {"num_warps": WARPS}
        pointers = {"p_x": f"*{dtype}", "p_order": "*i64", "p_starts": "*i64", "p_out": f"*{dtype}"}
        constants = {"CHANNELS": 16, "ACC": acc}
        names = dict.fromkeys(constants, "constexpr")
        yield sums_kernel, {**pointers, "channels": "i32", **names}, constants, {"num_warps": 1}
