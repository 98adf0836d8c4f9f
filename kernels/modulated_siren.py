"""modulated_siren in Triton, with its first and second derivatives.

maths     see csrc/modulated_siren/modulated_siren.h
shapes    pre, d_out, v_pre, out, d_d_out, d_pre (B, N, H); map, v_map, d_map (B, Hm, Wm, M); xy (B, N, 2). Inputs
          have strides along all axes but the last (xy: along B), 0 where shared; outputs are contiguous. xy and d_map
          have the dtype that is summed in.
work      one program = POINTS points of any batch, all their channels, CHANNELS at a time; places and weights are
          worked out once per program. d_map is added to by atomics; or, for sums in a fixed order, by_cell_kernel: one
          program = one pixel, CHANNELS of it, and the points of the four cells around it, POINTS at a time.
numerics  positions round after product and sum (launched without fusion of the two); the sine of omega a is that of
          fourier_embed; sums in float32, float64 for float64
limits    64-bit addressing; any coordinates; d_map comes as zeros; omega is a constant, one compilation for each
"""

import torch
import triton
import triton.language as tl
from fourdperf.kernels.bilinear_sample import add_corner, corner, locate
from fourdperf.kernels.fourier_embed import _sincos, _table

MODES = ("bilinear", "nearest")
MODULATE = ("shift", "scale", "both")
FWD_AREA, BWD_AREA = 512, 256  # points x channels of a program: no more than its registers hold
_SIZES = ["height", "width", "points"]  # may be 1, which Triton would otherwise turn into a constant


@triton.jit
def place(p_xy, b, n, xy_stride, m_p, height, width, MODE: tl.constexpr):
    """Lower left pixel of points, and the shares of the next ones; see `locate`."""
    p_point = p_xy + b * xy_stride + 2 * n
    x, fx, _ = locate(tl.load(p_point, mask=m_p, other=0.0), width, MODE, False, MODE == 0, 0)
    y, fy, _ = locate(tl.load(p_point + 1, mask=m_p, other=0.0), height, MODE, False, MODE == 0, 0)
    return x, y, fx, fy


@triton.jit
def tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, K: tl.constexpr, ACC: tl.constexpr):
    _, has = corner(x, y, width, height, K)
    p_pixel = p_map + ((y + K // 2) * y_stride + (x + K % 2) * x_stride)[:, None] + o_c[None, :]
    return tl.load(p_pixel, mask=m & has[:, None], other=0.0).to(ACC)


@triton.jit
def sampled(p_map, x, y, fx, fy, y_stride, x_stride, height, width, o_c, m, MODE: tl.constexpr, ACC: tl.constexpr):
    if MODE == 0:
        s = ((1 - fx) * (1 - fy))[:, None] * tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, 0, ACC)
        s += (fx * (1 - fy))[:, None] * tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, 1, ACC)
        s += ((1 - fx) * fy)[:, None] * tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, 2, ACC)
        s += (fx * fy)[:, None] * tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, 3, ACC)
    else:
        s = (1 + fx + fy)[:, None] * tap(p_map, x, y, y_stride, x_stride, height, width, o_c, m, 0, ACC)
    return s


@triton.jit
def modulation(
    p_map,
    x,
    y,
    fx,
    fy,
    y_stride,
    x_stride,
    height,
    width,
    channels,
    o_c,
    m,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    ACC,
):
    """Scale and shift that a map holds at points; the one that it does not hold is zeros."""
    scale, shift = tl.zeros(m.shape, dtype=ACC), tl.zeros(m.shape, dtype=ACC)
    if KIND != 0:
        scale = sampled(p_map, x, y, fx, fy, y_stride, x_stride, height, width, o_c, m, MODE, ACC)
    if KIND != 1:
        p_shift = p_map + channels if KIND == 2 else p_map
        shift = sampled(p_shift, x, y, fx, fy, y_stride, x_stride, height, width, o_c, m, MODE, ACC)
    return scale, shift


@triton.jit
def gradients(g, u, v_scale, v_shift, pre, scale, shift, p_table, OMEGA: tl.constexpr, SECOND: tl.constexpr, ACC):
    """d_d_out (of the second order), d_pre, d_scale and d_shift: bwd or bwd_bwd of the header."""
    omega = tl.full([1, 1], OMEGA, ACC)
    s, c = _sincos((1 + scale) * pre + shift, omega, p_table, ACC)
    slope = omega * c
    first = g * slope
    if SECOND:
        q = u * (1 + scale) + v_scale * pre + v_shift
        e = -g * (omega * omega) * s * q
        return q * slope, e * (1 + scale) + first * v_scale, e * pre + first * u, e
    else:
        return first, first * (1 + scale), first * pre, first


@triton.jit
def add_map(p_map, x, y, fx, fy, height, width, channels, o_c, m, b_g, MODE: tl.constexpr):
    if MODE == 0:
        add_corner(p_map, x, y, width, height, channels, o_c, m, (1 - fx) * (1 - fy), b_g, 0)
        add_corner(p_map, x, y, width, height, channels, o_c, m, fx * (1 - fy), b_g, 1)
        add_corner(p_map, x, y, width, height, channels, o_c, m, (1 - fx) * fy, b_g, 2)
        add_corner(p_map, x, y, width, height, channels, o_c, m, fx * fy, b_g, 3)
    else:
        add_corner(p_map, x, y, width, height, channels, o_c, m, 1 + fx + fy, b_g, 0)


@triton.jit(do_not_specialize=_SIZES)
def sine_kernel(
    p_pre,
    p_map,
    p_xy,
    p_table,
    p_out,
    pre_b,
    pre_n,
    map_b,
    map_y,
    map_x,
    xy_b,
    points,
    channels,
    height,
    width,
    total,
    OMEGA: tl.constexpr,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m_p = o_p < total
    b, n = o_p // points, o_p % points
    x, y, fx, fy = place(p_xy, b, n, xy_b, m_p, height, width, MODE)
    p_batch, p_row = p_map + (b * map_b)[:, None], p_pre + (b * pre_b + n * pre_n)[:, None]
    omega = tl.full([1, 1], OMEGA, ACC)
    for start in range(0, channels, CHANNELS):
        o_c = start + tl.arange(0, CHANNELS)
        m = m_p[:, None] & (o_c < channels)[None, :]
        scale, shift = modulation(p_batch, x, y, fx, fy, map_y, map_x, height, width, channels, o_c, m, KIND, MODE, ACC)
        pre = tl.load(p_row + o_c[None, :], mask=m, other=0.0).to(ACC)
        sine, _ = _sincos((1 + scale) * pre + shift, omega, p_table, ACC)
        tl.store(p_out + o_p[:, None] * channels + o_c[None, :], sine.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def gradients_at(
    p_v_pre,
    p_v_map,
    p_d_out,
    p_pre,
    p_map,
    p_table,
    b,
    n,
    x,
    y,
    fx,
    fy,
    v_pre_b,
    v_pre_n,
    v_map_b,
    v_map_y,
    v_map_x,
    d_out_b,
    d_out_n,
    pre_b,
    pre_n,
    map_b,
    map_y,
    map_x,
    height,
    width,
    channels,
    o_c,
    m,
    OMEGA: tl.constexpr,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    ACC: tl.constexpr,
):
    """`gradients` from memory: points n of signals b, channels o_c."""
    pre = tl.load(p_pre + (b * pre_b + n * pre_n)[:, None] + o_c[None, :], mask=m, other=0.0).to(ACC)
    g = tl.load(p_d_out + (b * d_out_b + n * d_out_n)[:, None] + o_c[None, :], mask=m, other=0.0).to(ACC)
    p_batch = p_map + (b * map_b)[:, None]
    scale, shift = modulation(p_batch, x, y, fx, fy, map_y, map_x, height, width, channels, o_c, m, KIND, MODE, ACC)
    u = tl.zeros(m.shape, dtype=ACC)
    v_scale, v_shift = tl.zeros(m.shape, dtype=ACC), tl.zeros(m.shape, dtype=ACC)
    if HAS_U:
        u = tl.load(p_v_pre + (b * v_pre_b + n * v_pre_n)[:, None] + o_c[None, :], mask=m, other=0.0).to(ACC)
    if HAS_V:
        p_batch = p_v_map + (b * v_map_b)[:, None]
        v_scale, v_shift = modulation(
            p_batch, x, y, fx, fy, v_map_y, v_map_x, height, width, channels, o_c, m, KIND, MODE, ACC
        )
    return gradients(g, u, v_scale, v_shift, pre, scale, shift, p_table, OMEGA, SECOND, ACC)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    p_v_pre,
    p_v_map,
    p_d_out,
    p_pre,
    p_map,
    p_xy,
    p_table,
    p_d_d_out,
    p_d_pre,
    p_d_map,
    v_pre_b,
    v_pre_n,
    v_map_b,
    v_map_y,
    v_map_x,
    d_out_b,
    d_out_n,
    pre_b,
    pre_n,
    map_b,
    map_y,
    map_x,
    xy_b,
    points,
    channels,
    height,
    width,
    total,
    OMEGA: tl.constexpr,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    WANT_PRE: tl.constexpr,
    SCATTER: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m_p = o_p < total
    b, n = o_p // points, o_p % points
    x, y, fx, fy = place(p_xy, b, n, xy_b, m_p, height, width, MODE)
    for start in range(0, channels, CHANNELS):
        o_c = start + tl.arange(0, CHANNELS)
        m = m_p[:, None] & (o_c < channels)[None, :]
        d_d_out, d_pre, d_scale, d_shift = gradients_at(
            p_v_pre,
            p_v_map,
            p_d_out,
            p_pre,
            p_map,
            p_table,
            b,
            n,
            x,
            y,
            fx,
            fy,
            v_pre_b,
            v_pre_n,
            v_map_b,
            v_map_y,
            v_map_x,
            d_out_b,
            d_out_n,
            pre_b,
            pre_n,
            map_b,
            map_y,
            map_x,
            height,
            width,
            channels,
            o_c,
            m,
            OMEGA,
            KIND,
            MODE,
            SECOND,
            HAS_U,
            HAS_V,
            ACC,
        )
        o = o_p[:, None] * channels + o_c[None, :]
        if SECOND:
            tl.store(p_d_d_out + o, d_d_out.to(p_d_d_out.dtype.element_ty), mask=m)
        if WANT_PRE:
            tl.store(p_d_pre + o, d_pre.to(p_d_pre.dtype.element_ty), mask=m)
        if SCATTER:
            row = channels * 2 if KIND == 2 else channels
            p_batch = p_d_map + (b * height * width * row)[:, None]
            if KIND != 0:
                add_map(p_batch, x, y, fx, fy, height, width, row, o_c, m, d_scale, MODE)
            if KIND != 1:
                p_shift = p_batch + channels if KIND == 2 else p_batch
                add_map(p_shift, x, y, fx, fy, height, width, row, o_c, m, d_shift, MODE)


@triton.jit(do_not_specialize=_SIZES)
def by_cell_kernel(
    p_v_pre,
    p_v_map,
    p_d_out,
    p_pre,
    p_map,
    p_xy,
    p_table,
    p_d_map,
    p_order,
    p_starts,
    v_pre_b,
    v_pre_n,
    v_map_b,
    v_map_y,
    v_map_x,
    d_out_b,
    d_out_n,
    pre_b,
    pre_n,
    map_b,
    map_y,
    map_x,
    xy_b,
    points,
    channels,
    height,
    width,
    OMEGA: tl.constexpr,
    KIND: tl.constexpr,
    MODE: tl.constexpr,
    SECOND: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_V: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    i, j, signal = pixel % width, pixel // width % height, pixel // width // height
    b = signal + tl.zeros([POINTS], dtype=tl.int64)
    b_scale = tl.zeros([CHANNELS], dtype=ACC)
    b_shift = tl.zeros([CHANNELS], dtype=ACC)
    for k in range(4 if MODE == 0 else 1):
        dx, dy = k % 2, k // 2
        cell = (signal * (height + 1) + j - dy + 1) * (width + 1) + i - dx + 1
        end = tl.load(p_starts + cell + 1)
        for at in range(tl.load(p_starts + cell), end, POINTS):
            o_s = at + tl.arange(0, POINTS)
            m_p = o_s < end
            n = tl.load(p_order + o_s, mask=m_p, other=0) - b * points
            x, y, fx, fy = place(p_xy, b, n, xy_b, m_p, height, width, MODE)
            m = m_p[:, None] & m_c[None, :]
            _, _, d_scale, d_shift = gradients_at(
                p_v_pre,
                p_v_map,
                p_d_out,
                p_pre,
                p_map,
                p_table,
                b,
                n,
                x,
                y,
                fx,
                fy,
                v_pre_b,
                v_pre_n,
                v_map_b,
                v_map_y,
                v_map_x,
                d_out_b,
                d_out_n,
                pre_b,
                pre_n,
                map_b,
                map_y,
                map_x,
                height,
                width,
                channels,
                o_c,
                m,
                OMEGA,
                KIND,
                MODE,
                SECOND,
                HAS_U,
                HAS_V,
                ACC,
            )
            weight = ((dx * fx + (1 - dx) * (1 - fx)) * (dy * fy + (1 - dy) * (1 - fy)))[:, None]
            b_scale += tl.sum(tl.where(m, weight * d_scale, 0.0), 0)
            b_shift += tl.sum(tl.where(m, weight * d_shift, 0.0), 0)
    row = channels * 2 if KIND == 2 else channels
    p_pixel = p_d_map + pixel * row + o_c
    if KIND != 0:
        tl.store(p_pixel, b_scale, mask=m_c)
    if KIND != 1:
        tl.store(p_pixel + channels if KIND == 2 else p_pixel, b_shift, mask=m_c)


def _acc(pre):
    return tl.float64 if pre.dtype == torch.float64 else tl.float32


def _rule(pre, rule):
    """Constants of every kernel. Positions must not be fused."""
    omega, modulate, mode = rule
    codes = dict(KIND=MODULATE.index(modulate), MODE=MODES.index(mode))
    return dict(OMEGA=omega, ACC=_acc(pre), num_warps=4, enable_fp_fusion=False, **codes)


def _tile(pre, area):
    """Points and channels of a program, `area` together; fewer points where there are few."""
    area = area // 2 if pre.dtype == torch.float64 else area
    channels = min(triton.next_power_of_2(pre.shape[2]), 64)
    total = pre.shape[0] * pre.shape[1]
    few = (
        64 if pre.device.type == "cpu" else triton.next_power_of_2(triton.cdiv(total, 512))
    )  # the interpreter: one by one
    return dict(POINTS=max(1, min(area // channels, 64, few)), CHANNELS=channels)


def _strides(x, axes):
    return (0,) * axes if x is None else x.stride()[:axes]


def fwd(pre, map, xy, out, rule):
    b, n, c = pre.shape
    tile = _tile(pre, FWD_AREA)
    sine_kernel[(triton.cdiv(b * n, tile["POINTS"]),)](
        pre,
        map,
        xy,
        _table(pre.device),
        out,
        *_strides(pre, 2),
        *_strides(map, 3),
        xy.stride(0),
        n,
        c,
        *map.shape[1:3],
        b * n,
        **_rule(pre, rule),
        **tile,
    )


def bwd(d_out, pre, map, xy, d_pre, d_map, rule):
    _gradients(False, None, None, d_out, pre, map, xy, None, d_pre, d_map, rule)


def bwd_bwd(v_pre, v_map, d_out, pre, map, xy, d_d_out, d_pre, d_map, rule):
    _gradients(True, v_pre, v_map, d_out, pre, map, xy, d_d_out, d_pre, d_map, rule)


def _gradients(second, v_pre, v_map, d_out, pre, map, xy, d_d_out, d_pre, d_map, rule):
    b, n, c = pre.shape
    h, w = map.shape[1:3]
    given = v_pre, v_map, d_out, pre, map, xy, _table(pre.device)
    axes = 2, 3, 2, 2, 3
    strides = [stride for x, k in zip(given, axes) for stride in _strides(x, k)]
    sizes = *strides, xy.stride(0), n, c, h, w
    codes = dict(SECOND=second, HAS_U=v_pre is not None, HAS_V=v_map is not None, **_rule(pre, rule))
    by_cell = d_map is not None and torch.are_deterministic_algorithms_enabled()
    if by_cell:
        from fourdperf.ops.bilinear_sample import sorted_by_cell
        from fourdperf.ops.modulated_siren import _RULES

        order, starts = sorted_by_cell(xy, h, w, *_RULES[rule[2]])
        tile = dict(POINTS=2 if pre.dtype == torch.float64 else 4, CHANNELS=min(triton.next_power_of_2(c), 64))
        by_cell_kernel[(b * h * w, triton.cdiv(c, tile["CHANNELS"]))](
            *given, d_map, order, starts, *sizes, **codes, **tile
        )
    scatter = d_map is not None and not by_cell
    if second or d_pre is not None or scatter:
        tile = _tile(pre, BWD_AREA)
        gradient_kernel[(triton.cdiv(b * n, tile["POINTS"]),)](
            *given, d_d_out, d_pre, d_map, *sizes, b * n, WANT_PRE=d_pre is not None, SCATTER=scatter, **codes, **tile
        )


def aot():
    """(kernel, signature, constexprs, options) of what runs on a GPU, for compilation ahead of time."""
    rows = "p_v_pre", "p_v_map", "p_d_out", "p_pre", "p_map", "p_out", "p_d_d_out", "p_d_pre"
    first = dict(SECOND=False, HAS_U=False, HAS_V=False)
    second = dict(SECOND=True, HAS_U=True, HAS_V=True)
    for dtype, acc in (("fp32", tl.float32), ("bf16", tl.float32), ("fp16", tl.float32), ("fp64", tl.float64)):
        summed = "*fp64" if dtype == "fp64" else "*fp32"
        types = {name: f"*{dtype}" for name in rows} | {"p_xy": summed, "p_d_map": summed, "p_table": "*u64"}
        types |= {"p_order": "*i64", "p_starts": "*i64"}
        for mode in (0, 1) if dtype == "fp32" else (0,):
            for kernel, area, order in (
                (sine_kernel, FWD_AREA, {}),
                (gradient_kernel, BWD_AREA, first),
                (gradient_kernel, BWD_AREA, second),
                (by_cell_kernel, BWD_AREA, second),
            ):
                points = (area // 2 if dtype == "fp64" else area) // 64
                constants = dict(OMEGA=30.0, KIND=2, MODE=mode, ACC=acc, POINTS=points, CHANNELS=64, **order)
                constants |= dict(WANT_PRE=True, SCATTER=True) if kernel is gradient_kernel else {}
                signature = {
                    name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names
                }
                yield kernel, signature, constants, {"num_warps": 4, "enable_fp_fusion": False}
