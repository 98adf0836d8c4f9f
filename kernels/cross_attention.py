"""cross_attention in Triton, for tensor cores.

maths     as csrc/cross_attention/cross_attention.h: online softmax in powers of two, c = scale log2(e); stats hold (m, 1 / sum)
shapes    q (B, Q, H, D), k (B, K, H, D), v (B, K, H, E), d_out (B, Q, H, E), any strides; mask (B, K) bytes, 1 = padding;
          out (B, Q, H, E), stats (B, H, 2, Q), delta (B, H, Q), d_q, d_k, d_v contiguous. D and E are padded to powers of two.
work      forward and d_q: one program = BM queries of one head, all keys BN at a time; d_k and d_v: one program = BN keys,
          all queries BM at a time. d_q walks twice: delta comes before the differences that it is subtracted from.
numerics  float32 sums (float64 for float64), no TF32; weights and differences are rounded to 16 bits before the second
          product where the inputs are 16-bit; deterministic: no atomics
limits    D, E <= 256; 64-bit addressing; one compilation per scale
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _load(p, o_row, o_col, m_row, m_col, stride_row, stride_col, ALIGNED: tl.constexpr):
    """A tile (rows, columns), zero outside. ALIGNED: every row starts at a multiple of 16 bytes."""
    p_tile = p + o_row[:, None] * stride_row + o_col[None, :] * stride_col
    if ALIGNED:
        p_tile = tl.multiple_of(p_tile, [16, 16])
    return tl.load(p_tile, mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def _kept(p_mask, o_n, left, HAS_MASK: tl.constexpr):
    """Which keys exist (`left` do) and take part."""
    m_n = o_n < left
    if HAS_MASK:
        m_n = m_n & (tl.load(p_mask + o_n, mask=m_n, other=1) == 0)
    return m_n


@triton.jit
def _dot(b_x, b_y, ACC: tl.constexpr, DOT: tl.constexpr):
    """x y; DOT is their own type, but float32 for bfloat16 in Triton's interpreter, which multiplies the bits as integers."""
    return tl.dot(b_x.to(DOT), b_y.to(DOT), out_dtype=ACC, input_precision="ieee")


@triton.jit
def _scores(b_q, b_k, C: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr):
    """q . k with the sign of the scale."""
    b_x = _dot(b_q, tl.trans(b_k), ACC, DOT)
    return b_x if C >= 0 else -b_x


@triton.jit
def _power(b_difference, C: tl.constexpr):
    """Differences first, then the factor: what rounding loses is small beside the difference."""
    b_power = b_difference * (C if C >= 0 else -C)
    return tl.exp2(b_power if C != 0 else tl.where(b_difference == float("-inf"), b_difference, b_power))


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_out,
    p_stats,
    q_b,
    q_t,
    q_h,
    q_c,
    k_b,
    k_t,
    k_h,
    k_c,
    v_b,
    v_t,
    v_h,
    v_c,
    queries,
    keys,
    heads,
    size: tl.constexpr,
    value_size: tl.constexpr,
    ALIGNED: tl.constexpr,
    C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    tiles = (queries + BM - 1) // BM
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    start = (tl.program_id(0) % tiles).to(tl.int64) * BM
    o_m, o_d, o_e = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    m_m, m_d, m_e = o_m < queries - start, o_d < size, o_e < value_size
    b_q = _load(p_q + b * q_b + h * q_h + start * q_t, o_m, o_d, m_m, m_d, q_t, q_c, ALIGNED)
    p_k_tile = p_k + b * k_b + h * k_h
    p_v_tile = p_v + b * v_b + h * v_h
    o_n = tl.arange(0, BN)
    b_largest = tl.full([BM], float("-inf"), dtype=ACC)
    b_total = tl.zeros([BM], dtype=ACC)
    b_out = tl.zeros([BM, BE], dtype=ACC)
    for first in range(0, keys, BN):
        m_n = _kept(p_mask + b * keys + first, o_n, keys - first, HAS_MASK)
        b_k = _load(p_k_tile, o_n, o_d, m_n, m_d, k_t, k_c, ALIGNED)
        b_x = tl.where(m_n[None, :], _scores(b_q, b_k, C, ACC, DOT), float("-inf"))
        b_new = tl.maximum(b_largest, tl.max(b_x, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink = _power(b_largest - b_safe, C)
        b_p = _power(b_x - b_safe[:, None], C)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        b_v = _load(p_v_tile, o_n, o_e, m_n, m_e, v_t, v_c, ALIGNED)
        b_out = b_out * b_shrink[:, None] + _dot(b_p.to(b_v.dtype), b_v, ACC, DOT)
        b_largest = b_new
        p_k_tile += BN * k_t
        p_v_tile += BN * v_t
    b_any = b_largest != float("-inf")  # (NaN counts)
    b_factor = tl.where(b_any, 1 / tl.where(b_any, b_total, 1.0), 0.0)
    p_out += ((b * queries + start) * heads + h) * value_size
    tl.store(
        p_out + o_m[:, None] * heads * value_size + o_e[None, :],
        (b_out * b_factor[:, None]).to(p_out.dtype.element_ty),
        mask=m_m[:, None] & m_e[None, :],
    )
    p_stats += head * 2 * queries + start
    tl.store(p_stats + o_m, tl.where(b_any, b_largest, 0.0), mask=m_m)
    tl.store(p_stats + queries + o_m, b_factor, mask=m_m)


@triton.jit
def _weights(b_q, b_k, b_do, b_v, b_largest, b_factor, m_n, C: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr):
    """p and d_out . v of a tile, (queries, keys)."""
    b_x = _scores(b_q, b_k, C, ACC, DOT)
    b_p = tl.where(m_n[None, :], _power(b_x - b_largest[:, None], C) * b_factor[:, None], 0.0)
    return b_p, _dot(b_do, tl.trans(b_v), ACC, DOT)


@triton.jit
def d_q_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_do,
    p_stats,
    p_delta,
    p_dq,
    q_b,
    q_t,
    q_h,
    q_c,
    k_b,
    k_t,
    k_h,
    k_c,
    v_b,
    v_t,
    v_h,
    v_c,
    do_b,
    do_t,
    do_h,
    do_c,
    queries,
    keys,
    heads,
    size: tl.constexpr,
    value_size: tl.constexpr,
    ALIGNED: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    tiles = (queries + BM - 1) // BM
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    start = (tl.program_id(0) % tiles).to(tl.int64) * BM
    o_m, o_d, o_e = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    m_m, m_d, m_e = o_m < queries - start, o_d < size, o_e < value_size
    b_q = _load(p_q + b * q_b + h * q_h + start * q_t, o_m, o_d, m_m, m_d, q_t, q_c, ALIGNED)
    b_do = _load(p_do + b * do_b + h * do_h + start * do_t, o_m, o_e, m_m, m_e, do_t, do_c, ALIGNED)
    p_k_tile = p_k + b * k_b + h * k_h
    p_v_tile = p_v + b * v_b + h * v_h
    p_stats += head * 2 * queries + start
    b_largest = tl.load(p_stats + o_m, mask=m_m, other=0.0)
    b_factor = tl.load(p_stats + queries + o_m, mask=m_m, other=0.0)
    o_n = tl.arange(0, BN)
    b_delta = tl.zeros([BM], dtype=ACC)
    for first in range(0, keys, BN):
        m_n = _kept(p_mask + b * keys + first, o_n, keys - first, HAS_MASK)
        b_k = _load(p_k_tile, o_n, o_d, m_n, m_d, k_t, k_c, ALIGNED)
        b_v = _load(p_v_tile, o_n, o_e, m_n, m_e, v_t, v_c, ALIGNED)
        b_p, b_dp = _weights(b_q, b_k, b_do, b_v, b_largest, b_factor, m_n, C, ACC, DOT)
        b_delta += tl.sum(b_p * b_dp, 1)
        p_k_tile += BN * k_t
        p_v_tile += BN * v_t
    tl.store(p_delta + head * queries + start + o_m, b_delta, mask=m_m)
    b_dq = tl.zeros([BM, BD], dtype=ACC)
    p_k_tile = p_k + b * k_b + h * k_h
    p_v_tile = p_v + b * v_b + h * v_h
    for first in range(0, keys, BN):
        m_n = _kept(p_mask + b * keys + first, o_n, keys - first, HAS_MASK)
        b_k = _load(p_k_tile, o_n, o_d, m_n, m_d, k_t, k_c, ALIGNED)
        b_v = _load(p_v_tile, o_n, o_e, m_n, m_e, v_t, v_c, ALIGNED)
        b_p, b_dp = _weights(b_q, b_k, b_do, b_v, b_largest, b_factor, m_n, C, ACC, DOT)
        b_t = b_p * (b_dp - b_delta[:, None])
        b_dq += _dot(b_t.to(b_k.dtype), b_k, ACC, DOT)
        p_k_tile += BN * k_t
        p_v_tile += BN * v_t
    p_dq += ((b * queries + start) * heads + h) * size
    tl.store(
        p_dq + o_m[:, None] * heads * size + o_d[None, :],
        (b_dq * SCALE).to(p_dq.dtype.element_ty),
        mask=m_m[:, None] & m_d[None, :],
    )


@triton.jit
def d_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_do,
    p_stats,
    p_delta,
    p_dk,
    p_dv,
    q_b,
    q_t,
    q_h,
    q_c,
    k_b,
    k_t,
    k_h,
    k_c,
    v_b,
    v_t,
    v_h,
    v_c,
    do_b,
    do_t,
    do_h,
    do_c,
    queries,
    keys,
    heads,
    size: tl.constexpr,
    value_size: tl.constexpr,
    ALIGNED: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    tiles = (keys + BN - 1) // BN
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    start = (tl.program_id(0) % tiles).to(tl.int64) * BN
    o_m, o_n, o_d, o_e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    m_n, m_d, m_e = _kept(p_mask + b * keys + start, o_n, keys - start, HAS_MASK), o_d < size, o_e < value_size
    b_k = _load(p_k + b * k_b + h * k_h + start * k_t, o_n, o_d, m_n, m_d, k_t, k_c, ALIGNED)
    b_v = _load(p_v + b * v_b + h * v_h + start * v_t, o_n, o_e, m_n, m_e, v_t, v_c, ALIGNED)
    p_q += b * q_b + h * q_h
    p_do += b * do_b + h * do_h
    p_stats += head * 2 * queries
    p_delta += head * queries
    b_dk = tl.zeros([BN, BD], dtype=ACC)
    b_dv = tl.zeros([BN, BE], dtype=ACC)
    for first in range(0, queries, BM):
        m_m = o_m < queries - first
        b_q = _load(p_q, o_m, o_d, m_m, m_d, q_t, q_c, ALIGNED)
        b_do = _load(p_do, o_m, o_e, m_m, m_e, do_t, do_c, ALIGNED)
        b_largest = tl.load(p_stats + o_m, mask=m_m, other=0.0)
        b_factor = tl.load(p_stats + queries + o_m, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
        b_p, b_dp = _weights(b_q, b_k, b_do, b_v, b_largest, b_factor, m_n, C, ACC, DOT)
        b_dv += _dot(tl.trans(b_p.to(b_do.dtype)), b_do, ACC, DOT)
        b_t = b_p * (b_dp - b_delta[:, None])
        b_dk += _dot(tl.trans(b_t.to(b_q.dtype)), b_q, ACC, DOT)
        p_q += BM * q_t
        p_do += BM * do_t
        p_stats += BM
        p_delta += BM
    m_n = o_n < keys - start
    p_dk += ((b * keys + start) * heads + h) * size
    p_dv += ((b * keys + start) * heads + h) * value_size
    tl.store(
        p_dk + o_n[:, None] * heads * size + o_d[None, :],
        (b_dk * SCALE).to(p_dk.dtype.element_ty),
        mask=m_n[:, None] & m_d[None, :],
    )
    tl.store(
        p_dv + o_n[:, None] * heads * value_size + o_e[None, :],
        b_dv.to(p_dv.dtype.element_ty),
        mask=m_n[:, None] & m_e[None, :],
    )


def _tiles(size, value_size, itemsize, backward):
    """Block sizes and launch options, by the bytes that a row of q takes."""
    bd, be = (max(16, triton.next_power_of_2(n)) for n in (size, value_size))
    row = max(bd, be) * itemsize
    if itemsize == 2 and not backward:
        bm, bn, warps, stages = (128, 64, 8, 3) if row <= 128 else (128, 64, 8, 2) if row <= 256 else (64, 32, 8, 2)
    elif itemsize == 2:
        bm, bn, warps, stages = (64, 64, 4, 2) if row <= 128 else (64, 32, 8, 1) if row <= 256 else (32, 32, 8, 1)
    else:
        bm, bn, warps, stages = (
            (32, 32, 8 if backward else 4, 1) if row <= (256 if backward else 512) else (16, 16, 4, 1)
        )
    return {"BM": bm, "BN": bn, "BD": bd, "BE": be}, {"num_warps": warps, "num_stages": stages}


_DOT = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _constants(q, mask, scale):
    dot = tl.float32 if q.dtype == torch.bfloat16 and not q.is_cuda else _DOT[q.dtype]
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    return {"C": float(scale * math.log2(math.e)), "HAS_MASK": mask is not None, "ACC": acc, "DOT": dot}


def _mask_bytes(q, mask):
    return q if mask is None else mask.contiguous().view(torch.uint8)


def _aligned(*tensors):
    """Whether every row of channels is contiguous and starts at a multiple of 16 bytes."""
    return all(
        x.stride(3) == 1 and all(n % 16 == 0 for n in (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:3])))
        for x in tensors
    )


def _near(x):
    """`x` itself, or a copy where the offsets inside a tile of 128 rows would not fit 32 bits."""
    return x.contiguous() if 256 * max(abs(x.stride(1)), abs(x.stride(3))) >= 2**31 else x


def forward(q, k, v, mask, scale, out, stats):
    """Writes out (B, Q, H, E) and stats (B, H, 2, Q)."""
    q, k, v = (_near(x) for x in (q, k, v))
    blocks, options = _tiles(q.shape[3], v.shape[3], q.element_size(), False)
    sizes = (q.shape[1], k.shape[1], q.shape[2], q.shape[3], v.shape[3], _aligned(q, k, v))
    programs = q.shape[0] * q.shape[2] * triton.cdiv(q.shape[1], blocks["BM"])
    if programs:
        forward_kernel[(programs,)](
            q,
            k,
            v,
            _mask_bytes(q, mask),
            out,
            stats,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *sizes,
            **_constants(q, mask, scale),
            **blocks,
            **options,
        )


def backward(d_out, q, k, v, mask, scale, stats, d_q, d_k, d_v):
    """Writes d_q, d_k, d_v; allocates delta (B, H, Q)."""
    d_out, q, k, v = (_near(x) for x in (d_out, q, k, v))
    blocks, options = _tiles(q.shape[3], v.shape[3], q.element_size(), True)
    sizes = (q.shape[1], k.shape[1], q.shape[2], q.shape[3], v.shape[3], _aligned(q, k, v, d_out))
    delta = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=stats.dtype, device=q.device)
    common = (*q.stride(), *k.stride(), *v.stride(), *d_out.stride(), *sizes)
    constants = _constants(q, mask, scale) | {"SCALE": scale} | blocks | options
    inputs, heads = (q, k, v, _mask_bytes(q, mask), d_out, stats, delta), q.shape[0] * q.shape[2]
    if heads and q.shape[1]:
        d_q_kernel[(heads * triton.cdiv(q.shape[1], blocks["BM"]),)](*inputs, d_q, *common, **constants)
    if heads and k.shape[1]:
        d_kv_kernel[(heads * triton.cdiv(k.shape[1], blocks["BN"]),)](*inputs, d_k, d_v, *common, **constants)


def aot():
    """(kernel, signature, constexprs, options) of what runs on a GPU, for compilation ahead of time."""
    for dtype, itemsize, size in (("bf16", 2, 64), ("bf16", 2, 128), ("fp16", 2, 64), ("fp32", 4, 64), ("fp64", 8, 64)):
        acc = "fp64" if dtype == "fp64" else "fp32"
        for kernel in (forward_kernel, d_q_kernel, d_kv_kernel):
            blocks, options = _tiles(size, size, itemsize, kernel is not forward_kernel)
            dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}[dtype]
            constants = {
                "C": 0.18,
                "SCALE": 0.125,
                "HAS_MASK": False,
                "ALIGNED": True,
                "DOT": dot,
                "ACC": tl.float64 if acc == "fp64" else tl.float32,
                "size": size,
                "value_size": size,
            } | blocks
            constants = {name: constants[name] for name in kernel.arg_names if name in constants}
            pointers = {"p_stats": f"*{acc}", "p_delta": f"*{acc}", "p_mask": "*u8"}
            signature = {
                name: "constexpr"
                if name in constants
                else pointers.get(name, f"*{dtype}")
                if name.startswith("p_")
                else "constexpr"
                if name.endswith("_c")
                else "i32"
                for name in kernel.arg_names
            }
            strides = {name: 1 for name, kind in signature.items() if kind == "constexpr" and name not in constants}
            yield kernel, signature, constants | strides, options
