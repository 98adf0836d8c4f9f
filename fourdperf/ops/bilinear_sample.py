"""bilinear_sample: read a channels-last map at points, bilinear or nearest, with derivatives of first and second order.

    map (..., H, W, C), xy (..., N, 2) -> (..., N, C)          xy[..., 0] runs along W, xy[..., 1] along H
    out[n] = (1 - fy) ((1 - fx) map[y, x] + fx map[y, x + 1]) + fy ((1 - fx) map[y + 1, x] + fx map[y + 1, x + 1])
    (x, fx) = whole part and rest of the position px; (y, fy) of py

Leading dimensions broadcast, and the map is never copied for it: one map may be sampled by many point sets, many maps by
one point set. The result is contiguous unless a leading axis that only xy has stands before one that the map has.

Positions, for x in [0, 1] (coordinates='unit') or x in [-1, 1] (coordinates='signed', which is x' = (x + 1) / 2):
    align_corners=True     px = x (W - 1)        0 and 1 are the centres of the first and the last pixel
    align_corners=False    px = x W - 1/2        0 and 1 are the outer edges of the first and the last pixel
Modes: 'bilinear'; 'nearest_round' takes pixel round(px), ties to even; 'nearest_floor' takes pixel floor(x (W - 1)) or
floor(x W), that is, the cell that the point lies in.

Borders, for positions outside of [0, W - 1]:
    'clamp'      px is moved to the nearest of 0 and W - 1; infinities too
    'zeros'      pixels outside of the map count as zeros, each of the four on its own; at infinity the result is 0
    'reflect'    px is mirrored, as often as it takes, at 0 and W - 1 (align_corners; d c b | a b c d | c b a: the border
                 pixel is not repeated) or at -1/2 and W - 1/2 (else; d c b a | a b c d | d c b a), then clamped
A map of one pixel along an axis, with align_corners, has that pixel at every coordinate. A coordinate that is NaN, or
infinite with 'reflect', makes that point's output NaN, and its d_xy too but for a coordinate that the border moved, and it
sends nothing to d_map. No pixel outside of the map is ever read; a pixel inside is multiplied by its weight even where that is zero, so a NaN or infinity there shows.

Derivatives, with respect to map and xy: reverse mode of first and second order (any order for d_map alone). d_xy is the
derivative on the right: at a whole px that between px and px + 1. It is zero where the border moved px, and at px = W - 1
('clamp', 'reflect'). nearest has d_xy = 0. (F.grid_sample has d_xy = 0 at px = 0 too.)

Dtypes: float64, float32, bfloat16, float16. xy has the dtype of map, or is float32 for a 16-bit map, which is better: eight
bits of bfloat16 do not tell one pixel of 512 from the next. Positions, weights, dot products and d_map are summed in
float32 (float64 for float64) and rounded once. Non-contiguous maps are copied, unless it is only leading axes that lie
apart. CPU: the same bits in every run, for any number of threads. CUDA: d_map is summed by atomics, or, with
torch.use_deterministic_algorithms, pixel by pixel over points sorted by cell.

Other conventions:
    F.grid_sample(maps (B, C, H, W), grid (B, h, w, 2), padding_mode='border'|'zeros'|'reflection', align_corners=a)
                               bilinear_sample(maps.permute(0, 2, 3, 1), grid.flatten(1, 2), coordinates='signed',
                               align_corners=a, border='clamp'|'zeros'|'reflect'); mode='nearest' is 'nearest_round'
    spatial functa 'linear'    the defaults: unit, align_corners, clamp (upstream lets negative coordinates wrap round)
    spatial functa '1-NN'      mode='nearest_floor', align_corners=False, which is floor(x W)
    map_coordinates(order=1)   positions in pixels, (row, column): xy = (column / (W - 1), row / (H - 1))
    (row, column) points       xy.flip(-1)

Raises ValueError for a dtype that is not floating, xy of another dtype or device, shapes that do not fit or broadcast, an
empty map with points to sample, an unknown option, or a backend that cannot run.

Source: torch/nn/functional grid_sample (borders); samuelepapa/spatial_functa (functa's two rules).
"""

import math

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
from fourdperf.ops.checks import check_choice, check_floating, require

MODES = ("bilinear", "nearest_floor", "nearest_round")
COORDINATES = ("unit", "signed")
BORDERS = ("clamp", "zeros", "reflect")
_HALF = (torch.bfloat16, torch.float16)
_NOWHERE = -2  # whole part of a position none of whose pixels is in the map


def bilinear_sample(
    map: torch.Tensor,
    xy: torch.Tensor,
    *,
    mode: str = "bilinear",
    coordinates: str = "unit",
    align_corners: bool = True,
    border: str = "clamp",
    backend: str | None = None,
) -> torch.Tensor:
    """Reads `map` at the points `xy`. See the module for maths, borders, derivatives, dtypes and errors.

    Args:
        map: (..., H, W, C), floating.
        xy: (..., N, 2), x along W and y along H; the dtype of `map`, or float32 for a 16-bit map.
        mode: 'bilinear', 'nearest_floor' or 'nearest_round'.
        coordinates: 'unit', the map spans [0, 1], or 'signed', it spans [-1, 1].
        align_corners: the ends of that range are the centres of the border pixels (True) or their outer edges (False).
        border: 'clamp', 'zeros' or 'reflect'.
        backend: 'native', 'triton' or 'eager'; None takes the fastest that can run.

    Returns:
        (..., N, C), the dtype of `map`; leading dimensions as the two broadcast.

    Example, modulations of a spatial functa:  bilinear_sample(latents, xy)   # (B, 8, 8, 64), (B, 1024, 2) -> (B, 1024, 64)
    """
    check_floating("map", map)
    check_floating("xy", xy)
    require(map.ndim >= 3, f"map must have shape (..., H, W, C), got {tuple(map.shape)}")
    require(xy.ndim >= 2 and xy.shape[-1] == 2, f"xy must have shape (..., N, 2), got {tuple(xy.shape)}")
    require(
        xy.dtype == map.dtype or (map.dtype in _HALF and xy.dtype == torch.float32),
        f"xy must have the dtype of map ({map.dtype}){' or float32' if map.dtype in _HALF else ''}, got {xy.dtype}",
    )
    require(xy.device == map.device, f"xy must be on the device of map ({map.device}), got {xy.device}")
    check_choice("mode", mode, MODES)
    check_choice("coordinates", coordinates, COORDINATES)
    check_choice("border", border, BORDERS)
    rule = (mode, coordinates, bool(align_corners), border)
    lead, maps, points, order = _align(map.shape[:-3], xy.shape[:-2])
    require(
        map.shape[-3] * map.shape[-2] > 0 or math.prod(lead) * xy.shape[-2] == 0,
        f"map must have pixels where xy has points, got shapes {tuple(map.shape)} and {tuple(xy.shape)}",
    )

    n_map = math.prod([lead[axis] for axis in maps])
    n_xy = math.prod([lead[axis] for axis in points])
    flat_map = map.reshape(n_map, *map.shape[-3:])
    if map.shape[:-3] == xy.shape[:-2]:
        flat_xy = xy.reshape(n_map, *xy.shape[-2:])
    else:  # the axes that the map lacks go to the points, those that xy lacks are repeated there
        rank = len(lead)
        flat_xy = xy[(None,) * (rank - (xy.ndim - 2))].permute(*maps, *points, rank, rank + 1)
        flat_xy = flat_xy.expand(*(lead[axis] for axis in maps), *flat_xy.shape[len(maps) :])
        flat_xy = flat_xy.reshape(n_map, n_xy * xy.shape[-2], 2)
    args = (flat_map, flat_xy, *rule)
    out = choose("bilinear_sample", BACKENDS, args, backend)(*args)
    out = out.reshape(*(lead[axis] for axis in order), xy.shape[-2], map.shape[-1])
    if order == sorted(order):
        return out
    return out.permute(*(order.index(axis) for axis in range(len(lead))), len(lead), len(lead) + 1)


def _align(map_lead, xy_lead):
    """Broadcast lead, its axes that the map has (or both lack), its axes that only xy has, and the two in a row."""
    rank = max(len(map_lead), len(xy_lead))
    a, b = (1,) * (rank - len(map_lead)) + tuple(map_lead), (1,) * (rank - len(xy_lead)) + tuple(xy_lead)
    require(
        all(m == p or m == 1 or p == 1 for m, p in zip(a, b)),
        f"the leading dimensions of map {tuple(map_lead)} and of xy {tuple(xy_lead)} must broadcast",
    )
    lead = tuple(p if m == 1 else m for m, p in zip(a, b))
    points = [axis for axis in range(rank) if a[axis] == 1 and b[axis] != 1]
    maps = [axis for axis in range(rank) if axis not in points]
    return lead, maps, points, maps + points


# ---- eager


def _locate(x, n, mode, coordinates, align_corners, border):
    """Along one axis of n pixels: the lower neighbour of each coordinate, and the share of the upper one.

    A neighbour outside of [0, n) is not in the map. The share is differentiable once, with the module's slopes; it is NaN
    where the coordinate has no position.
    """
    with torch.no_grad():
        cells = n - 1 if align_corners else n
        low = 0.0 if align_corners or mode == "nearest_floor" else -0.5
        scale = cells / 2 if coordinates == "signed" else float(cells)
        p = (x + 1 if coordinates == "signed" else x) * scale + low
        slope = torch.full_like(p, scale)
        if cells == 0:
            p = torch.where(x.isnan(), x, 0.0)
        elif border == "reflect":
            turn = torch.fmod((p - low).abs(), 2 * cells)
            slope = torch.where((p < low) != (turn > cells), -slope, slope)
            p = low + torch.where(turn <= cells, turn, 2 * cells - turn)
        if border == "zeros":
            outside = (p <= -1) | (p >= n)
            p = torch.where(outside, float(_NOWHERE), p)
        else:
            outside = (p < 0) | (p >= n - 1)
            p = p.clamp(0, n - 1)
        slope = (
            torch.where(p.isnan(), p, torch.where(outside, 0.0, slope)) if mode == "bilinear" else torch.zeros_like(p)
        )
        whole = p.round() if mode == "nearest_round" else p.floor()
        p = p if mode == "bilinear" else whole
        first = torch.where(p.isnan(), float(_NOWHERE), whole).long()
    share = torch.where(slope == 0, p - whole, p - whole + slope * (x - x.detach()))  # where: infinite x - x is NaN
    return first, share


def bilinear_sample_eager(map, xy, mode="bilinear", coordinates="unit", align_corners=True, border="clamp"):
    """The reference in plain torch: map (B, H, W, C), xy (B, N, 2) -> (B, N, C). One gather for each pixel."""
    b, h, w, c = map.shape
    dtype = torch.float32 if map.dtype in _HALF else map.dtype
    if xy.shape[1] == 0 or map.numel() == 0:
        return map.new_zeros(b, xy.shape[1], c) + 0 * (map.sum() + xy.sum())
    xy, pixels = xy.to(dtype), map.reshape(b, h * w, c)
    (x, fx), (y, fy) = (
        _locate(xy[..., axis], n, mode, coordinates, align_corners, border) for axis, n in ((0, w), (1, h))
    )
    if mode == "bilinear":
        taps = ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy))
    else:
        taps = ((0, 0, 1 + fx + fy),)
    out = 0
    for dx, dy, weight in taps:
        inside = (x + dx >= 0) & (x + dx < w) & (y + dy >= 0) & (y + dy < h)
        index = torch.where(inside, (y + dy) * w + x + dx, 0)
        value = pixels.gather(1, index[..., None].expand(-1, -1, c)).to(dtype)
        out = out + weight[..., None] * torch.where(inside[..., None], value, 0.0)
    return out.to(map.dtype)


# ---- schema, fake, autograd, vmap

_RULE = "str mode, str coordinates, bool align_corners, str border"


def _fake(map, xy, *rule):
    return map.new_empty(map.shape[0], xy.shape[1], map.shape[3])


def _fake_bwd(d_out, map, xy, mode, coordinates, align_corners, border, need_map, need_xy):
    return map.new_empty(map.shape if need_map else (0,)), xy.new_empty(xy.shape if need_xy else (0,))


def _fake_bwd_bwd(gg_map, gg_xy, d_out, map, xy, mode, coordinates, align_corners, border, need_map):
    return d_out.new_empty(d_out.shape), map.new_empty(map.shape if need_map else (0,)), xy.new_empty(xy.shape)


def _acc(x):
    """The dtype that `x` is summed in."""
    return torch.float32 if x.dtype in _HALF else x.dtype


def _rows(x):
    """`x` with contiguous entries along its first axis, which may itself have any stride, 0 included."""
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def _define(name, kernels):
    """The op `name` on the three kernels of `kernels`, and the ops that its first and second derivatives are."""

    def forward(map, xy, *rule):
        out = map.new_empty(map.shape[0], xy.shape[1], map.shape[3])
        if out.numel():
            kernels.fwd(_rows(map), _rows(xy.to(_acc(map))), out, rule)
        return out

    def backward(d_out, map, xy, mode, coordinates, align_corners, border, need_map, need_xy):
        rule, acc = (mode, coordinates, align_corners, border), _acc(map)
        points = _rows(xy.to(acc))
        d_map = torch.zeros(map.shape if need_map else (0,), dtype=acc, device=map.device)
        d_xy = torch.zeros(xy.shape if need_xy else (0,), dtype=acc, device=map.device)
        if d_out.numel():
            kernels.bwd(_rows(d_out), _rows(map), points, d_map if need_map else None, d_xy if need_xy else None, rule)
        return d_map.to(map.dtype), d_xy.to(xy.dtype)

    def backward_backward(gg_map, gg_xy, d_out, map, xy, mode, coordinates, align_corners, border, need_map):
        rule, acc = (mode, coordinates, align_corners, border), _acc(map)
        points = _rows(xy.to(acc))
        d_d_out = d_out.new_empty(d_out.shape)
        d_map = torch.zeros(map.shape if need_map else (0,), dtype=acc, device=map.device)
        d_xy = torch.zeros(xy.shape, dtype=acc, device=map.device)
        if d_out.numel():
            kernels.bwd_bwd(
                None if gg_map is None else _rows(gg_map),
                _rows(gg_xy.to(acc)),
                _rows(d_out),
                _rows(map),
                points,
                d_d_out,
                d_map if need_map else None,
                d_xy,
                rule,
            )
        return d_d_out, d_map.to(map.dtype), d_xy.to(xy.dtype)

    def fwd_context(ctx, inputs, output):
        map, xy, *ctx.rule = inputs
        ctx.save_for_backward(map, xy)

    def fwd_backward(ctx, d_out):
        need_map, need_xy = ctx.needs_input_grad[:2]
        d_map, d_xy = bwd(d_out, *ctx.saved_tensors, *ctx.rule, need_map, need_xy)
        return d_map if need_map else None, d_xy if need_xy else None, None, None, None, None

    def bwd_context(ctx, inputs, output):
        d_out, map, xy, *ctx.rule, ctx.need_map, ctx.need_xy = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_out, map, xy)

    def bwd_backward(ctx, gg_map, gg_xy):
        d_out, map, xy = ctx.saved_tensors
        need_d_out, need_map, need_xy = ctx.needs_input_grad[:3]
        gg_map, gg_xy = gg_map if ctx.need_map else None, gg_xy if ctx.need_xy else None
        d_d_out = d_map = d_xy = None
        if gg_xy is not None and ctx.rule[0] == "bilinear":
            d_d_out, d_map, d_xy = bwd_bwd(gg_map, gg_xy, d_out, map, xy, *ctx.rule, need_map)
        elif gg_map is not None:  # <gg_map, d_map> = <d_out, sample of gg_map>: linear in d_out
            d_d_out = fwd(gg_map, xy, *ctx.rule) if need_d_out else None
            d_xy = bwd(d_out, gg_map, xy, *ctx.rule, False, True)[1] if need_xy else None
        return (d_d_out if need_d_out else None, d_map if need_map else None, d_xy if need_xy else None, *[None] * 6)

    def fwd_vmap(info, in_dims, map, xy, *rule):
        if in_dims[0] is None:  # many point sets, one map: the sets stand side by side
            xy = xy.movedim(in_dims[1], 1)
            return fwd(map, xy.flatten(1, 2), *rule).unflatten(1, xy.shape[1:3]), 1
        return fwd(_flat(map, in_dims[0], info), _flat(xy, in_dims[1], info), *rule).unflatten(
            0, (info.batch_size, -1)
        ), 0

    def batched(op, tensors):
        """A vmap rule for an op with a batch axis in front of all its tensors."""

        def rule(info, in_dims, *args):
            outs = op()(*(_flat(x, dim, info) for x, dim in zip(args[:tensors], in_dims)), *args[tensors:])
            # an output that was not asked for is empty, with one axis
            return tuple(
                out.unflatten(0, (info.batch_size, -1)) if out.ndim > 1 else out.expand(info.batch_size, 0)
                for out in outs
            ), (0,) * len(outs)

        return rule

    fwd = define(
        f"{name}(Tensor map, Tensor xy, {_RULE}) -> Tensor",
        fake=_fake,
        setup_context=fwd_context,
        backward=fwd_backward,
        vmap=fwd_vmap,
        CPU=forward,
        CUDA=forward,
    )
    bwd = define(
        f"{name}_bwd(Tensor d_out, Tensor map, Tensor xy, {_RULE}, bool need_map, bool need_xy) -> (Tensor, Tensor)",
        fake=_fake_bwd,
        setup_context=bwd_context,
        backward=bwd_backward,
        vmap=batched(lambda: bwd, 3),
        CPU=backward,
        CUDA=backward,
    )
    bwd_bwd = define(
        f"{name}_bwd_bwd(Tensor? gg_map, Tensor gg_xy, Tensor d_out, Tensor map, Tensor xy, {_RULE}, "
        "bool need_map) -> (Tensor, Tensor, Tensor)",
        fake=_fake_bwd_bwd,
        vmap=batched(lambda: bwd_bwd, 5),
        CPU=backward_backward,
        CUDA=backward_backward,
    )
    return fwd


def _flat(x, dim, info):
    """The axis `dim` that vmap adds, laid beside the batch axis; where x has none it is repeated (not copied if B = 1)."""
    if x is None:
        return None
    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


# ---- native and Triton


def sorted_by_cell(xy, height, width, mode, coordinates, align_corners, border):
    """Points sorted by the cell they lie in, for sums in a fixed order: (order (B N,), starts (B (H + 1) (W + 1) + 1,)).

    Cell (b, y, x) holds the points of batch b whose lower neighbour is pixel (y - 1, x - 1).
    """
    (x, _), (y, _) = (
        _locate(xy[..., i], n, mode, coordinates, align_corners, border) for i, n in ((0, width), (1, height))
    )
    batch = torch.arange(len(xy), device=xy.device)[:, None]
    cells = len(xy) * (height + 1) * (width + 1)
    cell = torch.where((x > _NOWHERE) & (y > _NOWHERE), (batch * (height + 1) + y + 1) * (width + 1) + x + 1, cells)
    cell, order = cell.flatten().sort(stable=True)
    return order, torch.searchsorted(cell, torch.arange(cells + 1, device=xy.device))


def _address(x):
    return 0 if x is None else x.data_ptr()


def _sums_by_cell(d_map, xy, map, rule):
    """(order, starts) of `sorted_by_cell` where d_map is wanted on a GPU with deterministic algorithms, else (None, None)."""
    if d_map is None or not torch.are_deterministic_algorithms_enabled():
        return None, None
    return sorted_by_cell(xy, map.shape[1], map.shape[2], *rule)


def _address(x):
    return 0 if x is None else x.data_ptr()


class _Native:
    """Launches csrc/bilinear_sample. d_map and d_xy hold zeros, in the dtype that is summed in; None: not wanted."""

    @staticmethod
    def fwd(map, xy, out, rule):
        library, launch = where(map)
        library.bilinear_sample_fwd(
            map.data_ptr(),
            xy.data_ptr(),
            out.data_ptr(),
            (map.stride(0), xy.stride(0)),
            *_description(map, xy, rule),
            launch,
        )

    @staticmethod
    def bwd(d_out, map, xy, d_map, d_xy, rule):
        library, launch = where(map)
        order, starts = _sums_by_cell(d_map, xy, map, rule) if map.is_cuda else (None, None)
        strides = [x.stride(0) for x in (map, xy, d_out)]
        library.bilinear_sample_bwd(
            *(_address(x) for x in (d_out, map, xy, d_map, d_xy, order, starts)),
            strides,
            *_description(map, xy, rule),
            launch,
        )

    @staticmethod
    def bwd_bwd(gg_map, gg_xy, d_out, map, xy, d_d_out, d_map, d_xy, rule):
        library, launch = where(map)
        order, starts = _sums_by_cell(d_map, xy, map, rule) if map.is_cuda else (None, None)
        strides = [0 if x is None else x.stride(0) for x in (map, xy, d_out, gg_map, gg_xy)]
        tensors = (gg_map, gg_xy, d_out, map, xy, d_d_out, d_map, d_xy, order, starts)
        library.bilinear_sample_bwd_bwd(*(_address(x) for x in tensors), strides, *_description(map, xy, rule), launch)


def _description(map, xy, rule):
    mode, coordinates, align_corners, border = rule
    codes = MODES.index(mode), coordinates == "signed", align_corners, BORDERS.index(border)
    return DTYPE_CODES[map.dtype], (*map.shape, xy.shape[1]), codes


class _Triton:
    """Launches kernels/bilinear_sample.py, with the same arguments."""

    @staticmethod
    def fwd(*args):
        from fourdperf.kernels.bilinear_sample import fwd

        fwd(*args)

    @staticmethod
    def bwd(*args):
        from fourdperf.kernels.bilinear_sample import bwd

        bwd(*args)

    @staticmethod
    def bwd_bwd(*args):
        from fourdperf.kernels.bilinear_sample import bwd_bwd

        bwd_bwd(*args)


BACKENDS = (
    Backend("native", _define("bilinear_sample", _Native), native_why_not),
    Backend("triton", _define("bilinear_sample_triton", _Triton), triton_why_not),
    Backend("eager", bilinear_sample_eager, eager_why_not),
)
