"""bilinear_sample for JAX: see fourdperf/ops/bilinear_sample.py for maths, borders, derivatives, shapes and errors.

jnp   four gathers (nearest: one); any order of derivative, forward mode too
ffi   the native kernels; reverse mode of first and second order
"""

import functools
import math

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

MODES = ("bilinear", "nearest_floor", "nearest_round")
COORDINATES = ("unit", "signed")
BORDERS = ("clamp", "zeros", "reflect")
_HALF = (jnp.bfloat16, jnp.float16)
_NOWHERE = -2


def bilinear_sample(
    map: jax.Array,
    xy: jax.Array,
    *,
    mode: str = "bilinear",
    coordinates: str = "unit",
    align_corners: bool = True,
    border: str = "clamp",
    backend: str | None = None,
) -> jax.Array:
    """map (..., H, W, C), xy (..., N, 2) -> (..., N, C); arguments and errors as fourdperf.ops.bilinear_sample."""
    map, xy = jnp.asarray(map), jnp.asarray(xy)
    for name, x in (("map", map), ("xy", xy)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    if map.ndim < 3:
        raise ValueError(f"map must have shape (..., H, W, C), got {map.shape}")
    if xy.ndim < 2 or xy.shape[-1] != 2:
        raise ValueError(f"xy must have shape (..., N, 2), got {xy.shape}")
    if xy.dtype != map.dtype and not (map.dtype in _HALF and xy.dtype == jnp.float32):
        raise ValueError(f"xy must have the dtype of map ({map.dtype}), or be float32 for a 16-bit map, got {xy.dtype}")
    for name, value, choices in (
        ("mode", mode, MODES),
        ("coordinates", coordinates, COORDINATES),
        ("border", border, BORDERS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(repr(choice) for choice in choices)}, got {value!r}")
    try:
        lead = jnp.broadcast_shapes(map.shape[:-3], xy.shape[:-2])
    except ValueError:
        raise ValueError(
            f"the leading dimensions of map {map.shape[:-3]} and of xy {xy.shape[:-2]} must broadcast"
        ) from None
    n, c, rank = xy.shape[-2], map.shape[-1], len(lead)
    if math.prod(lead) * n * c == 0:
        return jnp.zeros((*lead, n, c), map.dtype)
    if map.shape[-3] * map.shape[-2] == 0:
        raise ValueError(f"map must have pixels where xy has points, got shapes {map.shape} and {xy.shape}")

    # the axes that the map lacks go to the points, those that xy lacks are repeated there: the map is never repeated
    map_lead = (1,) * (rank - (map.ndim - 3)) + map.shape[:-3]
    points = [axis for axis in range(rank) if map_lead[axis] == 1 and lead[axis] != 1]
    maps = [axis for axis in range(rank) if axis not in points]
    xy = jnp.broadcast_to(xy, (*lead, n, 2)).transpose(*maps, *points, rank, rank + 1)
    batch = math.prod(map_lead)
    flat = map.reshape(batch, *map.shape[-3:]), xy.reshape(batch, -1, 2).astype(_acc(map))
    run = _ffi if choose("bilinear_sample", ffi_why_not(platform(map)), backend) == "ffi" else _jnp
    out = run(*flat, MODES.index(mode), coordinates == "signed", bool(align_corners), BORDERS.index(border))
    order = maps + points
    out = out.reshape(*(lead[axis] for axis in order), n, c)
    return out.transpose(*(order.index(axis) for axis in range(rank)), rank, rank + 1)


def _acc(x):
    return jnp.float32 if x.dtype in _HALF else x.dtype


# ---- jnp


def _locate(x, n, mode, is_signed, align_corners, border):
    """Lower neighbour and share of the upper one along one axis; see the torch file."""
    cells = n - 1 if align_corners else n
    low = 0.0 if align_corners or mode == 1 else -0.5
    scale = cells / 2 if is_signed else float(cells)
    still = jax.lax.stop_gradient(x)
    p = (still + 1 if is_signed else still) * scale + low
    slope = jnp.full_like(p, scale)
    if cells == 0:
        p = jnp.where(jnp.isnan(still), still, 0.0)
    elif border == 2:
        turn = jnp.fmod(jnp.abs(p - low), 2 * cells)
        slope = jnp.where((p < low) != (turn > cells), -slope, slope)
        p = low + jnp.where(turn <= cells, turn, 2 * cells - turn)
    if border == 1:
        outside = (p <= -1) | (p >= n)
        p = jnp.where(outside, float(_NOWHERE), p)
    else:
        outside = (p < 0) | (p >= n - 1)
        p = jnp.clip(p, 0, n - 1)
    slope = jnp.where(jnp.isnan(p), p, jnp.where(outside, 0.0, slope)) if mode == 0 else jnp.zeros_like(p)
    whole = jnp.round(p) if mode == 2 else jnp.floor(p)
    p = p if mode == 0 else whole
    first = jnp.where(jnp.isnan(p), _NOWHERE, whole).astype(jnp.int32)
    step = jnp.where(jnp.isinf(x), 0.0, x)
    return first, jnp.where(slope == 0, p - whole, p - whole + slope * (step - jax.lax.stop_gradient(step)))


def _jnp(map, xy, mode, *rule):
    b, h, w, c = map.shape
    (x, fx), (y, fy) = (_locate(xy[..., axis], n, mode, *rule) for axis, n in ((0, w), (1, h)))
    if mode == 0:
        taps = ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy))
    else:
        taps = ((0, 0, 1 + fx + fy),)
    out, batch = 0, jnp.arange(b)[:, None]
    for dx, dy, weight in taps:
        inside = (x + dx >= 0) & (x + dx < w) & (y + dy >= 0) & (y + dy < h)
        value = map[batch, jnp.where(inside, y + dy, 0), jnp.where(inside, x + dx, 0)].astype(xy.dtype)
        out = out + weight[..., None] * jnp.where(inside[..., None], value, 0.0)
    return out.astype(map.dtype)


# ---- ffi


def _call(name, results, rule, *tensors):
    """An FFI call; inputs that vmap does not touch have length 1 along its axis, and are shared."""
    return jax.ffi.ffi_call(f"fourdperf_bilinear_sample_{name}", results, vmap_method="expand_dims")(*tensors, **rule)


def _rule(mode, is_signed, align_corners, border):
    return dict(mode=mode, is_signed=is_signed, align_corners=align_corners, border=border)


def _like(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _ffi(map, xy, *rule):
    shape = (map.shape[0], xy.shape[1], map.shape[3])
    return _call("fwd", jax.ShapeDtypeStruct(shape, map.dtype), _rule(*rule), map, xy)


def _ffi_fwd(map, xy, *rule):
    return _ffi(map, xy, *rule), (map, xy)


def _ffi_bwd(*args):
    *rule, (map, xy), d_out = args
    return _bwd(d_out, map, xy, *rule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _bwd(d_out, map, xy, *rule):
    d_map, d_xy = _call("bwd", (_like(map, xy.dtype), _like(xy)), _rule(*rule), d_out, map, xy)
    return d_map.astype(map.dtype), d_xy


def _bwd_fwd(d_out, map, xy, *rule):
    return _bwd(d_out, map, xy, *rule), (d_out, map, xy)


def _bwd_bwd(*args):
    mode, *rule, (d_out, map, xy), (gg_map, gg_xy) = args
    if mode != 0:  # d_xy is zero, and d_map is linear in d_out
        return _ffi(gg_map, xy, mode, *rule), jnp.zeros_like(map), jnp.zeros_like(xy)
    attributes = _rule(mode, *rule)
    del attributes["mode"]
    d_d_out, d_map, d_xy = _call(
        "bwd_bwd", (_like(d_out), _like(map, xy.dtype), _like(xy)), attributes, gg_map, gg_xy, d_out, map, xy
    )
    return d_d_out, d_map.astype(map.dtype), d_xy


_ffi.defvjp(_ffi_fwd, _ffi_bwd)
_bwd.defvjp(_bwd_fwd, _bwd_bwd)
