"""window_attention in Triton.

maths     see csrc/window_attention/window_attention.h: softmax over a rectangle of keys and the extra tokens; backward
          recomputes p = exp(score - lse), divided by its own sum (norm), which the rounding of lse leaves a little off 1
shapes    q, k, v, d_out (frames, H, W, heads, dim) with strides, the last axis dense; extra_k, extra_v (frames, extra,
          heads, dim) likewise; out and gradients dense; lse, delta (frames, heads, H, W) float32
work      one program = one tile of BY x BX queries of one residue class of one frame and head; it walks the union of
          their windows in blocks of KY x KX keys. d_k and d_v: one program = one tile of keys, walking the queries that
          see it; extra tokens: 16 of them a program, walking all queries of the frame. No atomics: deterministic.
numerics  scores, softmax and sums in float32, powers of two; weights rounded to the type of v for the tensor cores;
          float32 inputs multiply in full float32
limits    float32, bfloat16, float16; dim <= 256, padded to a power of two; 64-bit addressing. A NaN among the values may
          reach the neighbours of the queries that see it: the weights of a tile's other keys are zeros, and 0 NaN is NaN
"""

import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_BORDERS = {"mask": 0, "shift": 1, "zero": 2}


@triton.jit
def _dot(a, b, c):
    if _INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _first(q, size, window, SHIFT: tl.constexpr):
    first = q - window // 2
    if SHIFT:
        first = tl.minimum(first, size - window)
    return tl.maximum(first, 0)


@triton.jit
def _end(q, size, window, SHIFT: tl.constexpr):
    if SHIFT:
        end = _first(q, size, window, SHIFT) + window
    else:
        end = q - window // 2 + window
    return tl.minimum(end, size)


@triton.jit
def _first_query(k, size, window, SHIFT: tl.constexpr):
    first = tl.maximum(k - window + 1 + window // 2, 0)
    if SHIFT:
        first = tl.where(k < window, 0, first)
    return first


@triton.jit
def _end_query(k, size, window, SHIFT: tl.constexpr):
    end = tl.minimum(k + window // 2 + 1, size)
    if SHIFT:
        end = tl.where(k >= size - window, size, end)
    return end


@triton.jit
def _locate(height, width, dilation_y, dilation_x, BY: tl.constexpr, BX: tl.constexpr):
    """Residues, sizes of the class and first row and column of the tile of this program."""
    tiles_x = tl.cdiv(tl.cdiv(width, dilation_x), BX)
    tiles_y = tl.cdiv(tl.cdiv(height, dilation_y), BY)
    i = tl.program_id(0)
    tile_x, tile_y, cls = i % tiles_x, i // tiles_x % tiles_y, i // tiles_x // tiles_y
    classes_x = tl.minimum(dilation_x, width)
    r_y, r_x = cls // classes_x, cls % classes_x
    rows = (height - r_y + dilation_y - 1) // dilation_y
    columns = (width - r_x + dilation_x - 1) // dilation_x
    return r_y, r_x, rows, columns, tile_y * BY, tile_x * BX


@triton.jit
def _tokens(y, x, r_y, r_x, dilation_y, dilation_x, s_y, s_x):
    return (r_y + y * dilation_y).to(tl.int64) * s_y + (r_x + x * dilation_x).to(tl.int64) * s_x


@triton.jit
def window_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_ek,
    p_ev,
    p_out,
    p_lse,
    q_f,
    q_y,
    q_x,
    q_h,
    k_f,
    k_y,
    k_x,
    k_h,
    v_f,
    v_y,
    v_x,
    v_h,
    ek_f,
    ek_e,
    ek_h,
    ev_f,
    ev_e,
    ev_h,
    height,
    width,
    heads,
    dim,
    extra,
    window_y,
    window_x,
    dilation_y,
    dilation_x,
    scale,
    BORDER: tl.constexpr,
    EXTRA: tl.constexpr,
    BD: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
):
    SHIFT: tl.constexpr = BORDER == 1
    f, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    r_y, r_x, rows, columns, y0, x0 = _locate(height, width, dilation_y, dilation_x, BY, BX)
    if (y0 < rows) & (x0 < columns):
        o_m, o_n, o_d = tl.arange(0, BY * BX), tl.arange(0, KY * KX), tl.arange(0, BD)
        m_d = o_d < dim
        y, x = y0 + o_m // BX, x0 + o_m % BX
        m_m = (y < rows) & (x < columns)
        y_first, y_end = _first(y, rows, window_y, SHIFT), _end(y, rows, window_y, SHIFT)
        x_first, x_end = _first(x, columns, window_x, SHIFT), _end(x, columns, window_x, SHIFT)
        o_q = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, q_y, q_x)
        b_q = tl.load(
            p_q + f * q_f + h * q_h + o_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0
        )
        b_max = tl.full([BY * BX], float("-inf"), tl.float32)
        b_sum = tl.zeros([BY * BX], tl.float32)
        if BORDER == 2:
            zeros = 1.0 * window_y * window_x - 1.0 * (y_end - y_first) * (x_end - x_first)
            b_max = tl.where(zeros > 0, 0.0, b_max)
            b_sum = tl.maximum(zeros, 0.0)
        b_out = tl.zeros([BY * BX, BD], tl.float32)
        last_y, last_x = tl.minimum(y0 + BY, rows) - 1, tl.minimum(x0 + BX, columns) - 1
        from_y, to_y = _first(y0, rows, window_y, SHIFT), _end(last_y, rows, window_y, SHIFT)
        from_x, to_x = _first(x0, columns, window_x, SHIFT), _end(last_x, columns, window_x, SHIFT)
        for key_y in range(from_y, to_y, KY):
            for key_x in range(from_x, to_x, KX):
                j_y, j_x = key_y + o_n // KX, key_x + o_n % KX
                m_n = (j_y < to_y) & (j_x < to_x)
                o_k = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, k_y, k_x)
                o_v = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, v_y, v_x)
                b_k = tl.load(
                    p_k + f * k_f + h * k_h + o_k[None, :] + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0
                )
                b_v = tl.load(
                    p_v + f * v_f + h * v_h + o_v[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
                )
                inside = (
                    (j_y[None, :] >= y_first[:, None])
                    & (j_y[None, :] < y_end[:, None])
                    & (j_x[None, :] >= x_first[:, None])
                    & (j_x[None, :] < x_end[:, None])
                )
                b_s = tl.where(inside, _dot(b_q, b_k, None) * (scale * LOG2E), float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1))
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen so far
                b_p, b_keep = tl.exp2(b_s - b_shift[:, None]), tl.exp2(b_max - b_shift)
                b_sum = b_sum * b_keep + tl.sum(b_p, 1)
                b_out = _dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None])
                b_max = b_new
        if EXTRA:
            o_e = tl.arange(0, 16)
            for e in range(0, extra, 16):
                m_e = e + o_e < extra
                o_k, o_v = (e + o_e).to(tl.int64) * ek_e, (e + o_e).to(tl.int64) * ev_e
                b_k = tl.load(
                    p_ek + f * ek_f + h * ek_h + o_k[None, :] + o_d[:, None],
                    mask=m_e[None, :] & m_d[:, None],
                    other=0.0,
                )
                b_v = tl.load(
                    p_ev + f * ev_f + h * ev_h + o_v[:, None] + o_d[None, :],
                    mask=m_e[:, None] & m_d[None, :],
                    other=0.0,
                )
                b_s = tl.where(m_e[None, :], _dot(b_q, b_k, None) * (scale * LOG2E), float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, 1))
                b_p, b_keep = tl.exp2(b_s - b_new[:, None]), tl.exp2(b_max - b_new)
                b_sum = b_sum * b_keep + tl.sum(b_p, 1)
                b_out = _dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None])
                b_max = b_new
        b_sum = tl.where(m_m, b_sum, 1.0)  # rows beyond the grid have seen no key
        o_t = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, width, 1)
        tl.store(
            p_out + ((f * height * width + o_t[:, None]) * heads + h) * dim + o_d[None, :],
            (b_out / b_sum[:, None]).to(p_out.dtype.element_ty),
            mask=m_m[:, None] & m_d[None, :],
        )
        tl.store(p_lse + (f * heads + h) * height * width + o_t, (b_max + tl.log2(b_sum)) / LOG2E, mask=m_m)


@triton.jit
def window_attention_d_q_kernel(
    p_q,
    p_k,
    p_v,
    p_ek,
    p_ev,
    p_out,
    p_lse,
    p_do,
    p_delta,
    p_norm,
    p_dq,
    q_f,
    q_y,
    q_x,
    q_h,
    k_f,
    k_y,
    k_x,
    k_h,
    v_f,
    v_y,
    v_x,
    v_h,
    do_f,
    do_y,
    do_x,
    do_h,
    ek_f,
    ek_e,
    ek_h,
    ev_f,
    ev_e,
    ev_h,
    height,
    width,
    heads,
    dim,
    extra,
    window_y,
    window_x,
    dilation_y,
    dilation_x,
    scale,
    BORDER: tl.constexpr,
    EXTRA: tl.constexpr,
    ROUNDS: tl.constexpr,
    BD: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
):
    SHIFT: tl.constexpr = BORDER == 1
    f, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    r_y, r_x, rows, columns, y0, x0 = _locate(height, width, dilation_y, dilation_x, BY, BX)
    if (y0 < rows) & (x0 < columns):
        o_m, o_n, o_d = tl.arange(0, BY * BX), tl.arange(0, KY * KX), tl.arange(0, BD)
        m_d = o_d < dim
        y, x = y0 + o_m // BX, x0 + o_m % BX
        m_m = (y < rows) & (x < columns)
        m_md = m_m[:, None] & m_d[None, :]
        y_first, y_end = _first(y, rows, window_y, SHIFT), _end(y, rows, window_y, SHIFT)
        x_first, x_end = _first(x, columns, window_x, SHIFT), _end(x, columns, window_x, SHIFT)
        o_q = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, q_y, q_x)
        o_do = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, do_y, do_x)
        o_t = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, width, 1)
        o_out = ((f * height * width + o_t[:, None]) * heads + h) * dim + o_d[None, :]
        o_lse = (f * heads + h) * height * width + o_t
        b_q = tl.load(p_q + f * q_f + h * q_h + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
        b_do = tl.load(p_do + f * do_f + h * do_h + o_do[:, None] + o_d[None, :], mask=m_md, other=0.0)
        b_delta = tl.sum(b_do.to(tl.float32) * tl.load(p_out + o_out, mask=m_md, other=0.0).to(tl.float32), 1)
        b_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0) * LOG2E
        b_dq = tl.zeros([BY * BX, BD], tl.float32)
        last_y, last_x = tl.minimum(y0 + BY, rows) - 1, tl.minimum(x0 + BX, columns) - 1
        from_y, to_y = _first(y0, rows, window_y, SHIFT), _end(last_y, rows, window_y, SHIFT)
        from_x, to_x = _first(x0, columns, window_x, SHIFT), _end(last_x, columns, window_x, SHIFT)
        for step in tl.static_range(
            ROUNDS
        ):  # the first of two only sums: d_out.out from rounded outputs is not float32's best
            b_sum, b_product = tl.zeros([BY * BX], tl.float32), tl.zeros([BY * BX], tl.float32)
            if BORDER == 2:
                zeros = 1.0 * window_y * window_x - 1.0 * (y_end - y_first) * (x_end - x_first)
                b_sum = tl.maximum(zeros, 0.0) * tl.exp2(-b_lse)
            for key_y in range(from_y, to_y, KY):
                for key_x in range(from_x, to_x, KX):
                    j_y, j_x = key_y + o_n // KX, key_x + o_n % KX
                    m_n = (j_y < to_y) & (j_x < to_x)
                    o_k = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, k_y, k_x)
                    o_v = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, v_y, v_x)
                    m_nd = m_n[:, None] & m_d[None, :]
                    b_k = tl.load(p_k + f * k_f + h * k_h + o_k[:, None] + o_d[None, :], mask=m_nd, other=0.0)
                    b_v = tl.load(p_v + f * v_f + h * v_h + o_v[:, None] + o_d[None, :], mask=m_nd, other=0.0)
                    inside = (
                        (j_y[None, :] >= y_first[:, None])
                        & (j_y[None, :] < y_end[:, None])
                        & (j_x[None, :] >= x_first[:, None])
                        & (j_x[None, :] < x_end[:, None])
                    )
                    b_s = _dot(b_q, tl.trans(b_k), None) * (scale * LOG2E)
                    b_p = tl.exp2(tl.where(inside, b_s - b_lse[:, None], float("-inf")))
                    b_sum += tl.sum(b_p, 1)
                    b_dp = _dot(b_do, tl.trans(b_v), None)
                    if step == ROUNDS - 1:
                        b_ds = tl.where(inside, b_p * (b_dp - b_delta[:, None]), 0.0)
                        b_dq = _dot(b_ds.to(b_k.dtype), b_k, b_dq)
                    else:
                        b_product += tl.sum(tl.where(inside, b_p * b_dp, 0.0), 1)
            if EXTRA:
                o_e = tl.arange(0, 16)
                for e in range(0, extra, 16):
                    m_e = e + o_e < extra
                    o_k, o_v = (e + o_e).to(tl.int64) * ek_e, (e + o_e).to(tl.int64) * ev_e
                    m_ed = m_e[:, None] & m_d[None, :]
                    b_k = tl.load(p_ek + f * ek_f + h * ek_h + o_k[:, None] + o_d[None, :], mask=m_ed, other=0.0)
                    b_v = tl.load(p_ev + f * ev_f + h * ev_h + o_v[:, None] + o_d[None, :], mask=m_ed, other=0.0)
                    b_s = _dot(b_q, tl.trans(b_k), None) * (scale * LOG2E)
                    b_p = tl.exp2(tl.where(m_e[None, :], b_s - b_lse[:, None], float("-inf")))
                    b_sum += tl.sum(b_p, 1)
                    b_dp = _dot(b_do, tl.trans(b_v), None)
                    if step == ROUNDS - 1:
                        b_dq = _dot((b_p * (b_dp - b_delta[:, None])).to(b_k.dtype), b_k, b_dq)
                    else:
                        b_product += tl.sum(b_p * b_dp, 1)
            if step < ROUNDS - 1:
                b_delta = b_product / tl.where(m_m, b_sum, 1.0)
        tl.store(p_delta + o_lse, b_delta, mask=m_m)
        b_norm = 1.0 / tl.where(m_m, b_sum, 1.0)
        tl.store(p_norm + o_lse, b_norm, mask=m_m)
        tl.store(p_dq + o_out, (b_dq * (scale * b_norm)[:, None]).to(p_dq.dtype.element_ty), mask=m_md)


@triton.jit
def window_attention_d_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_lse,
    p_do,
    p_delta,
    p_norm,
    p_dk,
    p_dv,
    q_f,
    q_y,
    q_x,
    q_h,
    k_f,
    k_y,
    k_x,
    k_h,
    v_f,
    v_y,
    v_x,
    v_h,
    do_f,
    do_y,
    do_x,
    do_h,
    height,
    width,
    heads,
    dim,
    window_y,
    window_x,
    dilation_y,
    dilation_x,
    scale,
    BORDER: tl.constexpr,
    BD: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    KY: tl.constexpr,
    KX: tl.constexpr,
):
    SHIFT: tl.constexpr = BORDER == 1
    f, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    r_y, r_x, rows, columns, y0, x0 = _locate(height, width, dilation_y, dilation_x, BY, BX)
    if (y0 < rows) & (x0 < columns):
        o_n, o_m, o_d = tl.arange(0, BY * BX), tl.arange(0, KY * KX), tl.arange(0, BD)
        m_d = o_d < dim
        j_y, j_x = y0 + o_n // BX, x0 + o_n % BX
        m_n = (j_y < rows) & (j_x < columns)
        m_nd = m_n[:, None] & m_d[None, :]
        o_k = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, k_y, k_x)
        o_v = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, v_y, v_x)
        b_k = tl.load(p_k + f * k_f + h * k_h + o_k[:, None] + o_d[None, :], mask=m_nd, other=0.0)
        b_v = tl.load(p_v + f * v_f + h * v_h + o_v[:, None] + o_d[None, :], mask=m_nd, other=0.0)
        b_dk, b_dv = tl.zeros([BY * BX, BD], tl.float32), tl.zeros([BY * BX, BD], tl.float32)
        last_y, last_x = tl.minimum(y0 + BY, rows) - 1, tl.minimum(x0 + BX, columns) - 1
        from_y, to_y = _first_query(y0, rows, window_y, SHIFT), _end_query(last_y, rows, window_y, SHIFT)
        from_x, to_x = _first_query(x0, columns, window_x, SHIFT), _end_query(last_x, columns, window_x, SHIFT)
        for query_y in range(from_y, to_y, KY):
            for query_x in range(from_x, to_x, KX):
                y, x = query_y + o_m // KX, query_x + o_m % KX
                m_m = (y < to_y) & (x < to_x)
                m_md = m_m[:, None] & m_d[None, :]
                o_q = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, q_y, q_x)
                o_do = _tokens(y, x, r_y, r_x, dilation_y, dilation_x, do_y, do_x)
                o_lse = (f * heads + h) * height * width + _tokens(y, x, r_y, r_x, dilation_y, dilation_x, width, 1)
                b_q = tl.load(p_q + f * q_f + h * q_h + o_q[:, None] + o_d[None, :], mask=m_md, other=0.0)
                b_do = tl.load(p_do + f * do_f + h * do_h + o_do[:, None] + o_d[None, :], mask=m_md, other=0.0)
                b_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0) * LOG2E
                b_delta, b_norm = (
                    tl.load(p_delta + o_lse, mask=m_m, other=0.0),
                    tl.load(p_norm + o_lse, mask=m_m, other=0.0),
                )
                y_first, y_end = _first(y, rows, window_y, SHIFT), _end(y, rows, window_y, SHIFT)
                x_first, x_end = _first(x, columns, window_x, SHIFT), _end(x, columns, window_x, SHIFT)
                inside = (
                    (j_y[:, None] >= y_first[None, :])
                    & (j_y[:, None] < y_end[None, :])
                    & m_m[None, :]
                    & (j_x[:, None] >= x_first[None, :])
                    & (j_x[:, None] < x_end[None, :])
                )
                b_s = _dot(b_k, tl.trans(b_q), None) * (scale * LOG2E)
                b_p = tl.exp2(tl.where(inside, b_s - b_lse[None, :], float("-inf"))) * b_norm[None, :]
                b_dv = _dot(b_p.to(b_do.dtype), b_do, b_dv)
                b_dp = _dot(b_v, tl.trans(b_do), None)
                b_ds = tl.where(inside, b_p * (b_dp - b_delta[None, :]), 0.0)
                b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
        o_t = _tokens(j_y, j_x, r_y, r_x, dilation_y, dilation_x, width, 1)
        o_out = ((f * height * width + o_t[:, None]) * heads + h) * dim + o_d[None, :]
        tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_nd)
        tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_nd)


@triton.jit
def window_attention_d_extra_kernel(
    p_q,
    p_ek,
    p_ev,
    p_lse,
    p_do,
    p_delta,
    p_norm,
    p_dek,
    p_dev,
    q_f,
    q_y,
    q_x,
    q_h,
    do_f,
    do_y,
    do_x,
    do_h,
    ek_f,
    ek_e,
    ek_h,
    ev_f,
    ev_e,
    ev_h,
    height,
    width,
    heads,
    dim,
    extra,
    scale,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    f, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    o_e, o_m, o_d = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, BM), tl.arange(0, BD)
    m_d = o_d < dim
    m_ed = (o_e < extra)[:, None] & m_d[None, :]
    b_k = tl.load(p_ek + f * ek_f + h * ek_h + o_e.to(tl.int64)[:, None] * ek_e + o_d[None, :], mask=m_ed, other=0.0)
    b_v = tl.load(p_ev + f * ev_f + h * ev_h + o_e.to(tl.int64)[:, None] * ev_e + o_d[None, :], mask=m_ed, other=0.0)
    b_dk, b_dv = tl.zeros([16, BD], tl.float32), tl.zeros([16, BD], tl.float32)
    for start in range(0, height * width, BM):
        token = start + o_m
        m_m = token < height * width
        m_md = m_m[:, None] & m_d[None, :]
        y, x = (token // width).to(tl.int64), (token % width).to(tl.int64)
        b_q = tl.load(p_q + f * q_f + h * q_h + (y * q_y + x * q_x)[:, None] + o_d[None, :], mask=m_md, other=0.0)
        b_do = tl.load(p_do + f * do_f + h * do_h + (y * do_y + x * do_x)[:, None] + o_d[None, :], mask=m_md, other=0.0)
        o_lse = (f * heads + h) * height * width + token
        b_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0) * LOG2E
        b_delta, b_norm = tl.load(p_delta + o_lse, mask=m_m, other=0.0), tl.load(p_norm + o_lse, mask=m_m, other=0.0)
        b_s = _dot(b_k, tl.trans(b_q), None) * (scale * LOG2E)
        b_p = tl.exp2(tl.where(m_m[None, :], b_s - b_lse[None, :], float("-inf"))) * b_norm[None, :]
        b_dv = _dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_ds = b_p * (_dot(b_v, tl.trans(b_do), None) - b_delta[None, :])
        b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
    o_out = ((f * extra + o_e[:, None]) * heads + h) * dim + o_d[None, :]
    tl.store(p_dek + o_out, (b_dk * scale).to(p_dek.dtype.element_ty), mask=m_ed)
    tl.store(p_dev + o_out, b_dv.to(p_dev.dtype.element_ty), mask=m_ed)


# ---- launches


# queries a tile, keys a block, warps: the largest that spill nothing, by kernel, 16 bits or 32, padded dim
_TILES = {
    "forward": {
        2: {64: (64, 64, 4), 128: (64, 64, 8), 256: (32, 32, 8)},
        4: {64: (32, 16, 4), 128: (16, 16, 8), 256: (16, 16, 8)},
    },
    "backward": {
        2: {64: (32, 64, 8), 128: (32, 32, 8), 256: (16, 32, 8)},
        4: {64: (32, 32, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
    },
}


def _blocks(direction, itemsize, dim, columns, window_x):
    """Constants and options of a launch: padded dim, query tile, key block, warps."""
    padded = max(16, triton.next_power_of_2(dim))
    queries, keys, warps = _TILES[direction][itemsize][max(padded, 64)]
    block_x = 16 if 8 < columns <= 16 else 8
    key_x = min(16, max(8, triton.next_power_of_2(min(columns, block_x + window_x - 1))))
    return dict(BD=padded, BY=queries // block_x, BX=block_x, KY=keys // key_x, KX=key_x), dict(
        num_warps=warps, num_stages=1 if padded > 128 else 2
    )


def _extra_tokens(itemsize, padded):
    """Queries at a time for the gradients of extra tokens."""
    return 32 if itemsize == 2 and padded <= 64 else 16


def _strides(x):
    return x.stride()[:-1]


def _launch(direction, q, extra_k, window, dilation, border):
    frames, height, width, heads, dim = q.shape
    rows, columns = triton.cdiv(height, dilation[0]), triton.cdiv(width, dilation[1])
    window = [min(w, size) if border == "shift" else w for w, size in zip(window, (height, width))]
    blocks, options = _blocks(direction, q.element_size(), dim, columns, window[1])
    classes = min(dilation[0], height) * min(dilation[1], width)
    grid = (triton.cdiv(rows, blocks["BY"]) * triton.cdiv(columns, blocks["BX"]) * classes, frames * heads)
    sizes = (height, width, heads, dim)
    extra = 0 if extra_k is None else extra_k.shape[1]
    return grid, sizes, extra, (*window, *dilation), blocks | options


def forward(tensors, out, lse, window, dilation, border, scale):
    """Launches over tensors = (q, k, v, extra_k, extra_v), the last axis of each dense."""
    q, k, v, extra_k, extra_v = tensors
    grid, sizes, extra, windows, constants = _launch("forward", q, extra_k, window, dilation, border)
    extra_k, extra_v = (k[:, 0], v[:, 0]) if extra_k is None else (extra_k, extra_v)  # not read
    for part in _frames(q):
        q_, k_, v_, ek_, ev_, out_, lse_ = (x[part] for x in (q, k, v, extra_k, extra_v, out, lse))
        window_attention_kernel[(grid[0], q_.shape[0] * q_.shape[3])](
            q_,
            k_,
            v_,
            ek_,
            ev_,
            out_,
            lse_,
            *_strides(q),
            *_strides(k),
            *_strides(v),
            *_strides(extra_k),
            *_strides(extra_v),
            *sizes,
            extra,
            *windows,
            scale,
            BORDER=_BORDERS[border],
            EXTRA=extra > 0,
            **constants,
        )


def backward(tensors, out, lse, gradients, window, dilation, border, scale):
    """Launches over tensors = (d_out, q, k, v, extra_k, extra_v); allocates delta and norm, of the shape of lse."""
    d_out, q, k, v, extra_k, extra_v = tensors
    grid, sizes, extra, windows, constants = _launch("backward", q, extra_k, window, dilation, border)
    extra_k, extra_v = (k[:, 0], v[:, 0]) if extra_k is None else (extra_k, extra_v)
    delta, norm = torch.empty_like(lse), torch.empty_like(lse)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(d_out))
    extra_strides = (*_strides(extra_k), *_strides(extra_v))
    for part in _frames(q):
        do_, q_, k_, v_, ek_, ev_, out_, lse_, delta_, norm_ = (
            x[part] for x in (d_out, q, k, v, extra_k, extra_v, out, lse, delta, norm)
        )
        dq_, dk_, dv_, dek_, dev_ = (x[part] for x in gradients)
        outer = q_.shape[0] * q_.shape[3]
        window_attention_d_q_kernel[(grid[0], outer)](
            q_,
            k_,
            v_,
            ek_,
            ev_,
            out_,
            lse_,
            do_,
            delta_,
            norm_,
            dq_,
            *strides,
            *extra_strides,
            *sizes,
            extra,
            *windows,
            scale,
            BORDER=_BORDERS[border],
            EXTRA=extra > 0,
            ROUNDS=2 if q.dtype == torch.float32 else 1,
            **constants,
        )
        window_attention_d_kv_kernel[(grid[0], outer)](
            q_,
            k_,
            v_,
            lse_,
            do_,
            delta_,
            norm_,
            dk_,
            dv_,
            *strides,
            *sizes,
            *windows,
            scale,
            BORDER=_BORDERS[border],
            **constants,
        )
        if extra:
            window_attention_d_extra_kernel[(triton.cdiv(extra, 16), outer)](
                q_,
                ek_,
                ev_,
                lse_,
                do_,
                delta_,
                norm_,
                dek_,
                dev_,
                *_strides(q),
                *_strides(d_out),
                *extra_strides,
                *sizes,
                extra,
                scale,
                BD=constants["BD"],
                BM=_extra_tokens(q.element_size(), constants["BD"]),
                num_warps=8,
                num_stages=1,
            )


def _frames(q):
    """Slices of the frames, so that a launch's second axis stays below 65536 programs."""
    step = max(1, 65535 // q.shape[3])
    return [slice(i, i + step) for i in range(0, q.shape[0], step)]


# ---- ahead of time


def aot():
    """(kernel, signature, constants, options) of the launches that a ViT makes: for compilation without a GPU."""
    for dtype, dim, border in (("bf16", 64, "zero"), ("bf16", 88, "mask"), ("fp16", 256, "mask"), ("fp32", 64, "mask")):
        itemsize = 4 if dtype == "fp32" else 2
        rounds = dict(EXTRA=True, ROUNDS=2 if dtype == "fp32" else 1)
        for kernel, direction, more in (
            (window_attention_kernel, "forward", dict(EXTRA=True)),
            (window_attention_d_q_kernel, "backward", rounds),
            (window_attention_d_kv_kernel, "backward", {}),
        ):
            blocks, options = _blocks(direction, itemsize, dim, 64, 7)
            constants = blocks | dict(BORDER=_BORDERS[border]) | more
            yield kernel, _signature(kernel, dtype, constants), constants, options
        constants = dict(BD=blocks["BD"], BM=_extra_tokens(itemsize, blocks["BD"]))
        yield (
            window_attention_d_extra_kernel,
            _signature(window_attention_d_extra_kernel, dtype, constants),
            constants,
            dict(num_warps=8, num_stages=1),
        )


def _signature(kernel, dtype, constants):
    kinds = {"p_lse": "*fp32", "p_delta": "*fp32", "p_norm": "*fp32", "scale": "fp32"}
    sizes = ("height", "width", "heads", "dim", "extra", "window_y", "window_x", "dilation_y", "dilation_x")
    return {
        name: "constexpr"
        if name in constants
        else kinds.get(name) or (f"*{dtype}" if name.startswith("p_") else "i32" if name in sizes else "i64")
        for name in kernel.arg_names
    }
