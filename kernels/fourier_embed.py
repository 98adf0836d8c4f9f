"""fourier_embed and fourier_linear in Triton.

maths     a = x[n, d] w[f]; out = (sin a, cos a); d_x = sum_f w g, d_w = sum x g with g = d_sin cos a - d_cos sin a;
          linear: out = embedding weight^T + bias                       (see csrc/fourier_embed/fourier_embed.h)
shapes    x (N, D), frequencies (F,), embedding (N, 2 D F), weight (M, 2 D F), bias (M,), contiguous
work      embed: one program = BLOCK angles. backward: one program = CHUNK coordinates times BANDS bands, ROWS at a time.
          linear: one program = an output tile; it makes the slice of the embedding that it multiplies, DEPTH bands at a time
numerics  angles in float64 from exact products, pi/2 in three parts up to 2^20; beyond, Payne and Hanek in 64-bit integers, for
          a whole tile when one of its angles needs it. Polynomials and sums in float32 (float64 for float64); products of
          float32 tiles as three tf32 ones. Deterministic: gradients of frequencies go through a sum per program.
limits    64-bit addressing
"""

import functools
import os

import torch
import triton
import triton.language as tl

TWO_OVER_PI = (
    0x0000000000000000,
    0xA2F9836E4E441529,
    0xFC2757D1F534DDC0,
    0xDB6295993C439041,
    0xFE5163ABDEBBC561,
    0xB7246E3A424DD2E0,
    0x06492EEA09D1921C,
    0xFE1DEB1CB129A73E,
    0xE88235F52EBB4484,
    0xE99C7026B45F7E41,
    0x3991D639835339F4,
    0x9C845F8BBDF9283B,
    0x1FF897FFDE05980F,
    0xEF2F118B5A0A6D1F,
    0x6D367ECF27CB09B7,
    0x4F463F669E5FEA2D,
    0x7527BAC7EBE5F17B,
    0x3D0739F78A5292EA,
    0x6BFB5FB11F8D5D08,
    0x56033046FC7B6BAB,
    0xF0CFBC209AF4361D,
)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies bf16 as if it were integers


@triton.jit
def _far(p, p_table):
    """r and the quadrant of |p| >= 2^-10 by Payne and Hanek: see csrc/common/sincos.h."""
    bits = p.to(tl.uint64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF).to(tl.int32)
    finite = exponent < 0x7FF
    mantissa = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
    position = tl.minimum(tl.maximum(exponent - 1013, 0), 1033)
    word = position >> 6
    shift = (position & 63).to(tl.uint64)
    rest = (64 - shift) & 63
    w_0 = tl.load(p_table + word)
    w_1 = tl.load(p_table + word + 1)
    w_2 = tl.load(p_table + word + 2)
    w_3 = tl.load(p_table + word + 3)
    v_0 = tl.where(shift > 0, (w_0 << shift) | (w_1 >> rest), w_0)
    v_1 = tl.where(shift > 0, (w_1 << shift) | (w_2 >> rest), w_1)
    v_2 = tl.where(shift > 0, (w_2 << shift) | (w_3 >> rest), w_2)
    carry = tl.umulhi(mantissa, v_2)
    middle = mantissa * v_1 + carry
    top = mantissa * v_0 + tl.umulhi(mantissa, v_1) + (middle < carry).to(tl.uint64)
    quadrant = ((top >> 61) + 1) >> 1
    fraction = (top - (quadrant << 62)).to(tl.int64, bitcast=True)
    r = (fraction.to(tl.float64) + middle.to(tl.float64) * 5.421010862427522e-20) * 3.4061215800865545e-19
    negative = (bits >> 63) != 0
    whole = quadrant.to(tl.int64, bitcast=True)
    return tl.where(finite, tl.where(negative, -r, r), p - p), tl.where(negative, -whole, whole)


@triton.jit
def _sincos(x, f, p_table, ACC: tl.constexpr):
    """sin and cos of x * f, in ACC."""
    p = x.to(tl.float64) * f.to(tl.float64)
    near = tl.abs(p) <= 1048576.0
    safe = tl.where(near, p, 0.0)
    k = tl.floor(safe * 0.6366197723675814 + 0.5)
    r = ((safe - k * 1.5707963267341256) - k * 6.077100506303966e-11) - k * 2.0222662487959506e-21
    quadrant = k.to(tl.int64)
    if tl.min(near.to(tl.int32)) == 0:
        r_far, q_far = _far(tl.where(near, 1048577.0, p), p_table)
        r = tl.where(near, r, r_far)
        quadrant = tl.where(near, quadrant, q_far)
    r = r.to(ACC)
    z = r * r
    if ACC == tl.float64:
        s = (
            (
                ((1.58969099521155010221e-10 * z - 2.50507602534068634195e-8) * z + 2.75573137070700676789e-6) * z
                - 1.98412698298579493134e-4
            )
            * z
            + 8.33333333332248946124e-3
        ) * z - 1.66666666666666324348e-1
        c = (
            (
                ((-1.13596475577881948265e-11 * z + 2.08757232129817482790e-9) * z - 2.75573143513906633035e-7) * z
                + 2.48015872894767294178e-5
            )
            * z
            - 1.38888888888741095749e-3
        ) * z + 4.16666666666666019037e-2
    else:
        s = (-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1
        c = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    s = s * (z * r) + r
    half = 0.5 * z
    most = 1.0 - half
    c = most + (((1.0 - most) - half) + c * (z * z))
    odd = (quadrant & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where((quadrant & 2) == 2, -sine, sine), tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)


@triton.jit
def embed_kernel(p_x, p_f, p_table, p_out, angles, dims, bands, BLOCK: tl.constexpr, ACC: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < angles
    per_row = dims * bands
    x = tl.load(p_x + o // bands, mask=m, other=0.0).to(ACC)
    f = tl.load(p_f + o % bands, mask=m, other=0.0)
    s, c = _sincos(x, f, p_table, ACC)
    p_row = p_out + o // per_row * (2 * per_row) + o % per_row
    tl.store(p_row, s.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_row + per_row, c.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def backward_kernel(
    p_d_out,
    p_x,
    p_f,
    p_table,
    p_d_x,
    p_d_f,
    coordinates,
    dims,
    bands,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BANDS: tl.constexpr,
    ACC: tl.constexpr,
):
    """d_x (band blocks, N D) and d_f (programs, F): parts, to be added along their first axes."""
    o_f = tl.program_id(1) * BANDS + tl.arange(0, BANDS)
    m_f = o_f < bands
    f = tl.load(p_f + o_f, mask=m_f, other=0.0)[None, :]
    b_f = tl.zeros([BANDS], dtype=ACC)
    for start in range(0, CHUNK, ROWS):
        o_x = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        m_x = o_x < coordinates
        x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(ACC)[:, None]
        s, c = _sincos(x, f, p_table, ACC)
        m = m_x[:, None] & m_f[None, :]
        p_d = p_d_out + (o_x // dims * (2 * dims * bands) + o_x % dims * bands)[:, None] + o_f[None, :]
        d_sin = tl.load(p_d, mask=m, other=0.0).to(ACC)
        d_cos = tl.load(p_d + dims * bands, mask=m, other=0.0).to(ACC)
        g = tl.where(m, d_sin * c - d_cos * s, 0.0)
        tl.store(p_d_x + tl.program_id(1).to(tl.int64) * coordinates + o_x, tl.sum(g * f, 1), mask=m_x)
        b_f += tl.sum(tl.where(m, g * x, 0.0), 0)
    tl.store(p_d_f + tl.program_id(0).to(tl.int64) * bands + o_f, b_f, mask=m_f)


@triton.jit
def linear_kernel(
    p_x,
    p_f,
    p_table,
    p_weight,
    p_bias,
    p_out,
    rows,
    dims,
    bands,
    features,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_m = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_n, m_m = o_n < rows, o_m < features
    per_row = dims * bands
    dtype = p_weight.dtype.element_ty
    b_out = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for start in range(0, per_row, DEPTH):
        o_k = start + tl.arange(0, DEPTH)
        m_k = o_k < per_row
        x = tl.load(p_x + o_n[:, None] * dims + (o_k // bands)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        f = tl.load(p_f + o_k % bands, mask=m_k, other=0.0)[None, :]
        s, c = _sincos(x, f, p_table, ACC)
        p_w = p_weight + o_m[None, :] * (2 * per_row) + o_k[:, None]
        m_w = m_k[:, None] & m_m[None, :]
        w_sin = tl.load(p_w, mask=m_w, other=0.0)
        w_cos = tl.load(p_w + per_row, mask=m_w, other=0.0)
        s, c = s.to(dtype), c.to(dtype)
        if WIDEN:
            s, c, w_sin, w_cos = s.to(ACC), c.to(ACC), w_sin.to(ACC), w_cos.to(ACC)
        precision: tl.constexpr = "ieee" if ACC == tl.float64 else "tf32x3"
        b_out = tl.dot(s, w_sin, b_out, input_precision=precision, out_dtype=ACC)
        b_out = tl.dot(c, w_cos, b_out, input_precision=precision, out_dtype=ACC)
    if BIAS:
        b_out += tl.load(p_bias + o_m, mask=m_m, other=0.0).to(ACC)[None, :]
    tl.store(p_out + o_n[:, None] * features + o_m[None, :], b_out.to(dtype), mask=m_n[:, None] & m_m[None, :])


@functools.lru_cache(maxsize=16)
def _table(device):
    signed = [w - 2**64 if w >= 2**63 else w for w in TWO_OVER_PI]
    return torch.tensor(signed, dtype=torch.int64).view(torch.uint64).to(device)


def _acc(frequencies):
    return tl.float64 if frequencies.dtype == torch.float64 else tl.float32


def embed(x, frequencies, out):
    """Launches over contiguous, non-empty tensors."""
    angles, block = x.numel() * frequencies.shape[0], 512
    embed_kernel[(triton.cdiv(angles, block),)](
        x,
        frequencies,
        _table(x.device),
        out,
        angles,
        x.shape[-1],
        frequencies.shape[0],
        BLOCK=block,
        ACC=_acc(frequencies),
    )


def embed_backward(d_out, x, frequencies, d_x, d_frequencies):
    """Launches over contiguous, non-empty tensors. Allocates the parts of both gradients."""
    coordinates, bands = x.numel(), frequencies.shape[0]
    block = max(4, min(64, triton.next_power_of_2(bands)))
    chunk = 1024
    grid = triton.cdiv(coordinates, chunk), triton.cdiv(bands, block)
    x_parts = frequencies.new_empty((grid[1], coordinates))
    f_parts = frequencies.new_empty((grid[0], bands))
    backward_kernel[grid](
        d_out,
        x,
        frequencies,
        _table(x.device),
        x_parts,
        f_parts,
        coordinates,
        x.shape[-1],
        bands,
        CHUNK=chunk,
        ROWS=1024 // block,
        BANDS=block,
        ACC=_acc(frequencies),
    )
    d_x.copy_(x_parts.sum(0).view_as(d_x))
    d_frequencies.copy_(f_parts.sum(0))


def linear(x, frequencies, weight, bias, out):
    """Launches over contiguous, non-empty tensors."""
    dims, bands, features = x.shape[-1], frequencies.shape[0], weight.shape[0]
    rows = x.numel() // dims
    tile = {"ROWS": 64, "COLUMNS": 64 if features > 32 else 32, "DEPTH": 16}
    linear_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(features, tile["COLUMNS"]))](
        x,
        frequencies,
        _table(x.device),
        weight,
        weight if bias is None else bias,
        out,
        rows,
        dims,
        bands,
        features,
        BIAS=bias is not None,
        WIDEN=weight.dtype == torch.bfloat16 and INTERPRETED,
        ACC=_acc(frequencies),
        **tile,
    )


def aot():
    """(kernel, signature, constexprs, options) of what runs hot, for compilation without a GPU."""
    for dtype in ("fp32", "bf16"):
        pointers = {"p_x": f"*{dtype}", "p_f": "*fp32", "p_table": "*u64"}
        yield (
            embed_kernel,
            {
                **pointers,
                "p_out": f"*{dtype}",
                "angles": "i64",
                "dims": "i32",
                "bands": "i32",
                "BLOCK": "constexpr",
                "ACC": "constexpr",
            },
            {"BLOCK": 512, "ACC": tl.float32},
            {},
        )
        for bands in (16, 64):
            yield (
                backward_kernel,
                {
                    "p_d_out": f"*{dtype}",
                    **pointers,
                    "p_d_x": "*fp32",
                    "p_d_f": "*fp32",
                    "coordinates": "i64",
                    "dims": "i32",
                    "bands": "i32",
                    "CHUNK": "constexpr",
                    "ROWS": "constexpr",
                    "BANDS": "constexpr",
                    "ACC": "constexpr",
                },
                {"CHUNK": 1024, "ROWS": 1024 // bands, "BANDS": bands, "ACC": tl.float32},
                {},
            )
        yield (
            linear_kernel,
            {
                **pointers,
                "p_x": "*fp32",
                "p_weight": f"*{dtype}",
                "p_bias": f"*{dtype}",
                "p_out": f"*{dtype}",
                "rows": "i64",
                "dims": "i32",
                "bands": "i32",
                "features": "i32",
                "BIAS": "constexpr",
                "WIDEN": "constexpr",
                "ROWS": "constexpr",
                "COLUMNS": "constexpr",
                "DEPTH": "constexpr",
                "ACC": "constexpr",
            },
            {"BIAS": True, "WIDEN": False, "ROWS": 64, "COLUMNS": 64, "DEPTH": 16, "ACC": tl.float32},
            {},
        )
