"""bilinear_sample in Triton, with its first and second derivatives.

maths     see csrc/bilinear_sample/bilinear_sample.h
shapes    map, gg_map (B, H, W, C); xy, gg_xy (B, N, 2); out, d_out, d_d_out (B, N, C). Inputs have a stride along B (0:
          shared) and are contiguous in the rest. xy, gg_xy, d_map and d_xy have the dtype that is summed in.
work      one program = POINTS points of any batch, all their channels, CHANNELS at a time; places and weights are worked
          out once per program. d_map is added to by atomics; or, for sums in a fixed order, sum_by_cell_kernel: one
          program = one pixel, CHANNELS of it, and the points of the four cells around it, one after the other.
numerics  positions round after product and sum (launched without fusion of the two); sums in float32, float64 for float64
limits    64-bit addressing; any coordinates; d_map and d_xy come as zeros
"""

import torch
import triton
import triton.language as tl

MODES = ("bilinear", "nearest_floor", "nearest_round")
BORDERS = ("clamp", "zeros", "reflect")
FWD_AREA, BWD_AREA = 512, 256  # points x channels of a program: no more than its registers hold
_SIZES = ["height", "width", "points"]  # may be 1, which Triton would otherwise turn into a constant


@triton.jit
def locate(x, n, MODE: tl.constexpr, SIGNED: tl.constexpr, ALIGN: tl.constexpr, BORDER: tl.constexpr):
    """Lower neighbour (-2: none), share of the upper one, slope; as `locate` in csrc/bilinear_sample/bilinear_sample.h."""
    ACC: tl.constexpr = x.dtype
    last = n.to(ACC) - 1
    cells = last if ALIGN else n.to(ACC)
    low = 0.0 if ALIGN or MODE == 1 else -0.5
    scale = cells / 2 if SIGNED else cells
    p = ((x + 1) if SIGNED else x) * scale + low
    slope = tl.zeros_like(p) + scale
    if BORDER == 2:
        distance = tl.abs(p - low)
        turn = distance % (2 * tl.maximum(cells, 1))
        slope = tl.where((p < low) != (turn > cells), -slope, slope)
        p = low + tl.where(turn <= cells, turn, 2 * cells - turn)
    p = tl.where(cells == 0, tl.where(x == x, 0.0, x), p)
    somewhere = p == p
    if BORDER == 1:
        outside = (p <= -1) | (p >= n)
        slope = tl.where(outside, 0.0, slope)
        somewhere = somewhere & (outside == 0)
        p = tl.where(outside, -2.0, p)
    else:
        slope = tl.where((p >= last) | (p < 0), 0.0, slope)
        p = tl.where(p >= last, last, p)
        p = tl.where(p < 0, 0.0, p)
    whole = tl.floor(p)
    share = p - whole
    if MODE == 2:  # ties to even
        up = (share > 0.5) | ((share == 0.5) & (whole != 2 * tl.floor(whole / 2)))
        whole = tl.where(up, whole + 1, whole)
    if MODE != 0:
        share = tl.where(p == p, 0.0, p)
        slope = tl.zeros_like(p)
    slope = tl.where(p == p, slope, p)
    return tl.where(somewhere, whole, -2.0).to(tl.int64), share, slope


@triton.jit
def chain(slope, d_position):
    return tl.where(slope == 0, 0.0, slope * d_position)


@triton.jit
def corner(x, y, width, height, K: tl.constexpr):
    """Number of the pixel at corner K of (x, y), and whether the map has it."""
    i, j = x + K % 2, y + K // 2
    return j * width + i, (i >= 0) & (i < width) & (j >= 0) & (j < height)


@triton.jit
def load_corner(p_map, x, y, width, height, channels, o_c, m, K: tl.constexpr, ACC: tl.constexpr):
    pixel, has = corner(x, y, width, height, K)
    return tl.load(p_map + pixel[:, None] * channels + o_c[None, :], mask=m & has[:, None], other=0.0).to(ACC)


@triton.jit
def add_corner(p_map, x, y, width, height, channels, o_c, m, weight, b_g, K: tl.constexpr):
    pixel, has = corner(x, y, width, height, K)
    tl.atomic_add(
        p_map + pixel[:, None] * channels + o_c[None, :], weight[:, None] * b_g, mask=m & has[:, None], sem="relaxed"
    )


@triton.jit(do_not_specialize=_SIZES)
def bilinear_sample_fwd_kernel(
    p_map,
    p_xy,
    p_out,
    map_stride,
    xy_stride,
    height,
    width,
    channels,
    points,
    total,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m_p = o_p < total
    b, n = o_p // points, o_p % points
    p_point = p_xy + b * xy_stride + 2 * n
    x, fx, _ = locate(tl.load(p_point, mask=m_p, other=0.0), width, MODE, SIGNED, ALIGN, BORDER)
    y, fy, _ = locate(tl.load(p_point + 1, mask=m_p, other=0.0), height, MODE, SIGNED, ALIGN, BORDER)
    p_batch = p_map + (b * map_stride)[:, None]
    for first in range(0, channels, CHANNELS):
        o_c = first + tl.arange(0, CHANNELS)
        m = m_p[:, None] & (o_c < channels)[None, :]
        if MODE == 0:
            b_sum = ((1 - fx) * (1 - fy))[:, None] * load_corner(p_batch, x, y, width, height, channels, o_c, m, 0, ACC)
            b_sum += (fx * (1 - fy))[:, None] * load_corner(p_batch, x, y, width, height, channels, o_c, m, 1, ACC)
            b_sum += ((1 - fx) * fy)[:, None] * load_corner(p_batch, x, y, width, height, channels, o_c, m, 2, ACC)
            b_sum += (fx * fy)[:, None] * load_corner(p_batch, x, y, width, height, channels, o_c, m, 3, ACC)
        else:
            b_sum = (1 + fx + fy)[:, None] * load_corner(p_batch, x, y, width, height, channels, o_c, m, 0, ACC)
        tl.store(p_out + o_p[:, None] * channels + o_c[None, :], b_sum.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_sample_bwd_kernel(
    p_d_out,
    p_map,
    p_xy,
    p_d_map,
    p_d_xy,
    d_out_stride,
    map_stride,
    xy_stride,
    height,
    width,
    channels,
    points,
    total,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    SCATTER: tl.constexpr,
    DOTS: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m_p = o_p < total
    b, n = o_p // points, o_p % points
    p_point = p_xy + b * xy_stride + 2 * n
    x, fx, sx = locate(tl.load(p_point, mask=m_p, other=0.0), width, MODE, SIGNED, ALIGN, BORDER)
    y, fy, sy = locate(tl.load(p_point + 1, mask=m_p, other=0.0), height, MODE, SIGNED, ALIGN, BORDER)
    p_batch = p_map + (b * map_stride)[:, None]
    p_g = p_d_out + (b * d_out_stride + n * channels)[:, None]
    if SCATTER:
        p_d_batch = p_d_map + (b * height * width * channels)[:, None]
    b_dx = tl.zeros([POINTS], dtype=ACC)
    b_dy = tl.zeros([POINTS], dtype=ACC)
    for first in range(0, channels, CHANNELS):
        o_c = first + tl.arange(0, CHANNELS)
        m = m_p[:, None] & (o_c < channels)[None, :]
        b_g = tl.load(p_g + o_c[None, :], mask=m, other=0.0).to(ACC)
        if DOTS:
            v0 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 0, ACC)
            v1 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 1, ACC)
            v2 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 2, ACC)
            v3 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 3, ACC)
            b_dx += tl.sum(b_g * ((1 - fy)[:, None] * (v1 - v0) + fy[:, None] * (v3 - v2)), 1)
            b_dy += tl.sum(b_g * ((1 - fx)[:, None] * (v2 - v0) + fx[:, None] * (v3 - v1)), 1)
        if SCATTER and MODE == 0:
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, (1 - fx) * (1 - fy), b_g, 0)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, fx * (1 - fy), b_g, 1)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, (1 - fx) * fy, b_g, 2)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, fx * fy, b_g, 3)
        if SCATTER and MODE != 0:
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, 1 + fx + fy, b_g, 0)
    if DOTS:
        tl.store(p_d_xy + 2 * o_p, chain(sx, b_dx), mask=m_p)
        tl.store(p_d_xy + 2 * o_p + 1, chain(sy, b_dy), mask=m_p)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_sample_bwd_bwd_kernel(
    p_gg_map,
    p_gg_xy,
    p_d_out,
    p_map,
    p_xy,
    p_d_d_out,
    p_d_map,
    p_d_xy,
    gg_map_stride,
    gg_xy_stride,
    d_out_stride,
    map_stride,
    xy_stride,
    height,
    width,
    channels,
    points,
    total,
    SIGNED: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    HAS_H: tl.constexpr,
    SCATTER: tl.constexpr,
    ACC: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    m_p = o_p < total
    b, n = o_p // points, o_p % points
    p_point, p_u = p_xy + b * xy_stride + 2 * n, p_gg_xy + b * gg_xy_stride + 2 * n
    x, fx, sx = locate(tl.load(p_point, mask=m_p, other=0.0), width, 0, SIGNED, ALIGN, BORDER)
    y, fy, sy = locate(tl.load(p_point + 1, mask=m_p, other=0.0), height, 0, SIGNED, ALIGN, BORDER)
    ux, uy = sx * tl.load(p_u, mask=m_p, other=0.0), sy * tl.load(p_u + 1, mask=m_p, other=0.0)
    t0, t1 = -ux * (1 - fy) - uy * (1 - fx), ux * (1 - fy) - uy * fx
    t2, t3 = -ux * fy + uy * (1 - fx), ux * fy + uy * fx
    p_batch = p_map + (b * map_stride)[:, None]
    if HAS_H:
        p_h = p_gg_map + (b * gg_map_stride)[:, None]
    p_g = p_d_out + (b * d_out_stride + n * channels)[:, None]
    if SCATTER:
        p_d_batch = p_d_map + (b * height * width * channels)[:, None]
    b_dx = tl.zeros([POINTS], dtype=ACC)
    b_dy = tl.zeros([POINTS], dtype=ACC)
    for first in range(0, channels, CHANNELS):
        o_c = first + tl.arange(0, CHANNELS)
        m = m_p[:, None] & (o_c < channels)[None, :]
        b_g = tl.load(p_g + o_c[None, :], mask=m, other=0.0).to(ACC)
        v0 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 0, ACC)
        v1 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 1, ACC)
        v2 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 2, ACC)
        v3 = load_corner(p_batch, x, y, width, height, channels, o_c, m, 3, ACC)
        b_sum = t0[:, None] * v0 + t1[:, None] * v1 + t2[:, None] * v2 + t3[:, None] * v3
        b_both = tl.sum(b_g * ((v0 - v1) + (v3 - v2)), 1)
        b_dx += uy * b_both
        b_dy += ux * b_both
        if HAS_H:
            h0 = load_corner(p_h, x, y, width, height, channels, o_c, m, 0, ACC)
            h1 = load_corner(p_h, x, y, width, height, channels, o_c, m, 1, ACC)
            h2 = load_corner(p_h, x, y, width, height, channels, o_c, m, 2, ACC)
            h3 = load_corner(p_h, x, y, width, height, channels, o_c, m, 3, ACC)
            b_sum += ((1 - fx) * (1 - fy))[:, None] * h0 + (fx * (1 - fy))[:, None] * h1
            b_sum += ((1 - fx) * fy)[:, None] * h2 + (fx * fy)[:, None] * h3
            b_dx += tl.sum(b_g * ((1 - fy)[:, None] * (h1 - h0) + fy[:, None] * (h3 - h2)), 1)
            b_dy += tl.sum(b_g * ((1 - fx)[:, None] * (h2 - h0) + fx[:, None] * (h3 - h1)), 1)
        tl.store(p_d_d_out + o_p[:, None] * channels + o_c[None, :], b_sum.to(p_d_d_out.dtype.element_ty), mask=m)
        if SCATTER:
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, t0, b_g, 0)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, t1, b_g, 1)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, t2, b_g, 2)
            add_corner(p_d_batch, x, y, width, height, channels, o_c, m, t3, b_g, 3)
    tl.store(p_d_xy + 2 * o_p, chain(sx, b_dx), mask=m_p)
    tl.store(p_d_xy + 2 * o_p + 1, chain(sy, b_dy), mask=m_p)


@triton.jit(do_not_specialize=_SIZES)
def bilinear_sample_by_cell_kernel(
    p_gg_xy,
    p_d_out,
    p_xy,
    p_d_map,
    p_order,
    p_starts,
    gg_xy_stride,
    d_out_stride,
    xy_stride,
    height,
    width,
    channels,
    points,
    MODE: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    HAS_U: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    i, j, b = pixel % width, pixel // width % height, pixel // width // height
    b_sum = tl.zeros([CHANNELS], dtype=ACC)
    for k in range(4 if MODE == 0 else 1):
        dx, dy = k % 2, k // 2
        cell = (b * (height + 1) + j - dy + 1) * (width + 1) + i - dx + 1
        end = tl.load(p_starts + cell + 1)
        for at in range(tl.load(p_starts + cell), end):
            n = tl.load(p_order + at) - b * points
            p_point = p_xy + b * xy_stride + 2 * n
            _, fx, sx = locate(tl.load(p_point), width, MODE, SIGNED, ALIGN, BORDER)
            _, fy, sy = locate(tl.load(p_point + 1), height, MODE, SIGNED, ALIGN, BORDER)
            wx, wy = dx * fx + (1 - dx) * (1 - fx), dy * fy + (1 - dy) * (1 - fy)
            weight = wx * wy
            if HAS_U:
                p_u = p_gg_xy + b * gg_xy_stride + 2 * n
                weight = sx * tl.load(p_u) * (2 * dx - 1) * wy + sy * tl.load(p_u + 1) * (2 * dy - 1) * wx
            b_sum += weight * tl.load(p_d_out + b * d_out_stride + n * channels + o_c, mask=m_c, other=0.0).to(ACC)
    tl.store(p_d_map + pixel * channels + o_c, b_sum, mask=m_c)


def _rule(mode, coordinates, align_corners, border):
    return dict(
        MODE=MODES.index(mode), SIGNED=coordinates == "signed", ALIGN=align_corners, BORDER=BORDERS.index(border)
    )


def _tile(map, total, area):
    """Points and channels of a program, `area` together; fewer points where there are few. Positions must not be fused."""
    area = area // 2 if map.dtype == torch.float64 else area
    channels = min(triton.next_power_of_2(map.shape[3]), 64)
    few = (
        64 if map.device.type == "cpu" else triton.next_power_of_2(triton.cdiv(total, 512))
    )  # the interpreter: one by one
    points = max(1, min(area // channels, 64, few))
    return dict(
        POINTS=points,
        CHANNELS=channels,
        ACC=tl.float64 if map.dtype == torch.float64 else tl.float32,
        num_warps=4,
        enable_fp_fusion=False,
    )


def fwd(map, xy, out, rule):
    b, h, w, c = map.shape
    total = b * xy.shape[1]
    tile = _tile(map, total, FWD_AREA)
    bilinear_sample_fwd_kernel[(triton.cdiv(total, tile["POINTS"]),)](
        map, xy, out, map.stride(0), xy.stride(0), h, w, c, xy.shape[1], total, **_rule(*rule), **tile
    )


def bwd(d_out, map, xy, d_map, d_xy, rule):
    b, h, w, c = map.shape
    total, bilinear = b * xy.shape[1], rule[0] == "bilinear"
    by_cell = d_map is not None and torch.are_deterministic_algorithms_enabled()
    if by_cell:
        _sum_by_cell(None, d_out, map, xy, d_map, rule)
    scatter, dots = d_map is not None and not by_cell, d_xy is not None and bilinear
    if scatter or dots:
        tile = _tile(map, total, BWD_AREA)
        bilinear_sample_bwd_kernel[(triton.cdiv(total, tile["POINTS"]),)](
            d_out,
            map,
            xy,
            d_map,
            d_xy,
            d_out.stride(0),
            map.stride(0),
            xy.stride(0),
            h,
            w,
            c,
            xy.shape[1],
            total,
            **_rule(*rule),
            SCATTER=scatter,
            DOTS=dots,
            **tile,
        )


def bwd_bwd(gg_map, gg_xy, d_out, map, xy, d_d_out, d_map, d_xy, rule):
    b, h, w, c = map.shape
    total = b * xy.shape[1]
    by_cell = d_map is not None and torch.are_deterministic_algorithms_enabled()
    if by_cell:
        _sum_by_cell(gg_xy, d_out, map, xy, d_map, rule)
    tile, codes = _tile(map, total, BWD_AREA), _rule(*rule)
    codes.pop("MODE")
    bilinear_sample_bwd_bwd_kernel[(triton.cdiv(total, tile["POINTS"]),)](
        gg_map,
        gg_xy,
        d_out,
        map,
        xy,
        d_d_out,
        d_map,
        d_xy,
        0 if gg_map is None else gg_map.stride(0),
        gg_xy.stride(0),
        d_out.stride(0),
        map.stride(0),
        xy.stride(0),
        h,
        w,
        c,
        xy.shape[1],
        total,
        **codes,
        HAS_H=gg_map is not None,
        SCATTER=d_map is not None and not by_cell,
        **tile,
    )


def _sum_by_cell(gg_xy, d_out, map, xy, d_map, rule):
    from fourdperf.ops.bilinear_sample import sorted_by_cell

    b, h, w, c = map.shape
    order, starts = sorted_by_cell(xy, h, w, *rule)
    channels = min(triton.next_power_of_2(c), 256)
    bilinear_sample_by_cell_kernel[(b * h * w, triton.cdiv(c, channels))](
        gg_xy,
        d_out,
        xy,
        d_map,
        order,
        starts,
        0 if gg_xy is None else gg_xy.stride(0),
        d_out.stride(0),
        xy.stride(0),
        h,
        w,
        c,
        xy.shape[1],
        **_rule(*rule),
        HAS_U=gg_xy is not None,
        CHANNELS=channels,
        ACC=tl.float64 if map.dtype == torch.float64 else tl.float32,
        num_warps=1 if channels <= 64 else 4,
        enable_fp_fusion=False,
    )


def aot():
    """(kernel, signature, constexprs, options) of what runs on a GPU, for compilation ahead of time."""
    for dtype, acc in (("fp32", tl.float32), ("bf16", tl.float32), ("fp16", tl.float32), ("fp64", tl.float64)):
        summed = "*fp64" if dtype == "fp64" else "*fp32"
        types = {name: f"*{dtype}" for name in ("p_map", "p_gg_map", "p_out", "p_d_out", "p_d_d_out")}
        types |= {name: summed for name in ("p_xy", "p_gg_xy", "p_d_xy", "p_d_map")} | {
            "p_order": "*i64",
            "p_starts": "*i64",
        }
        rule = {"MODE": 0, "SIGNED": True, "ALIGN": False, "BORDER": 2, "ACC": acc}
        for kernel, area, more in (
            (bilinear_sample_fwd_kernel, FWD_AREA, {}),
            (bilinear_sample_bwd_kernel, BWD_AREA, {"SCATTER": True, "DOTS": True}),
            (bilinear_sample_bwd_bwd_kernel, BWD_AREA, {"SCATTER": True, "HAS_H": True}),
            (bilinear_sample_by_cell_kernel, 64, {"HAS_U": True}),
        ):
            points = (area // 2 if dtype == "fp64" else area) // 64
            constants = {
                name: value
                for name, value in (rule | more | {"CHANNELS": 64, "POINTS": points}).items()
                if name in kernel.arg_names
            }
            signature = {
                name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names
            }
            yield kernel, signature, constants, {"num_warps": 1 if area == 64 else 4, "enable_fp_fusion": False}
