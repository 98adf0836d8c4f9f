"""window_attention for JAX: see fourdperf/ops/window_attention.py for maths, shapes, borders and errors.

jnp   gathers the keys of every query: O(tokens x window) memory, differentiable any number of times
ffi   the native kernels, O(tokens) memory; reverse-mode first derivatives
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

BORDERS = ("mask", "shift", "zero")
_MOST = 2**20


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | Sequence[int],
    *,
    border: str = "mask",
    dilation: int | Sequence[int] = 1,
    scale: float | None = None,
    extra_k: jax.Array | None = None,
    extra_v: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of every token of a frame to those around it; q, k, v (B..., H, W, heads, D). As fourdperf.ops.window_attention."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v must be given together")
    if q.ndim < 4 or q.shape[-1] < 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating, (B..., H, W, heads, D), got {q.dtype} of shape {q.shape}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} must have the shape and dtype of q, {q.shape} {q.dtype}, got {x.shape} {x.dtype}")
    window, dilation = _pair("window", window), _pair("dilation", dilation)
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(map(repr, BORDERS))}, got {border!r}")
    lead, (heads, dim) = q.shape[:-4], q.shape[-2:]
    frames = math.prod(lead)
    if extra_k is None:
        extra_k = extra_v = jnp.zeros((0, heads, dim), q.dtype)
    extra = []
    for name, x in (("extra_k", jnp.asarray(extra_k)), ("extra_v", jnp.asarray(extra_v))):
        fits = (
            x.ndim >= 3
            and x.shape[-2:] == (heads, dim)
            and x.dtype == q.dtype
            and x.ndim - 3 <= len(lead)
            and all(a in (1, b) for a, b in zip(x.shape[:-3][::-1], lead[::-1]))
        )
        if not fits:
            raise ValueError(
                f"{name} must be (B..., E, {heads}, {dim}) of q's dtype and leading axes, got {x.shape} {x.dtype}"
            )
        extra.append(jnp.broadcast_to(x, lead + x.shape[-3:]).reshape(frames, *x.shape[-3:]))
    if extra[0].shape != extra[1].shape:
        raise ValueError(f"extra_v must have as many tokens as extra_k ({extra[0].shape[1]}), got {extra[1].shape[1]}")
    if q.size == 0:
        return jnp.zeros_like(q)
    scale = dim**-0.5 if scale is None else float(scale)
    folded = [x.reshape(frames, *x.shape[-4:]) for x in (q, k, v)]
    place = platform(q)
    why_not = ffi_why_not(place)
    if why_not is None and place == "gpu" and dim > 256:
        why_not = f"heads have at most 256 elements on a GPU, got {dim}"
    function = _ffi if choose("window_attention", why_not, backend) == "ffi" else _jnp
    return function(*folded, *extra, window, dilation, border, scale).reshape(q.shape)


def _pair(name, value):
    try:
        pair = tuple(map(operator.index, value if isinstance(value, Sequence) else (value, value)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or not all(1 <= v <= _MOST for v in pair):
        raise ValueError(
            f"{name} must be a whole number from 1 to 2^20, or two of them (along H, along W), got {value!r}"
        )
    return pair


# ---- jnp


def _jnp(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    frames, height, width, heads, dim = q.shape
    rows, rows_inside = _axis_keys(height, window[0], dilation[0], border)
    columns, columns_inside = _axis_keys(width, window[1], dilation[1], border)
    tokens, keys = height * width, rows.shape[1] * columns.shape[1]
    index = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(tokens, keys)
    inside = (rows_inside[:, None, :, None] & columns_inside[None, :, None, :]).reshape(tokens, 1, keys)
    spread = lambda e: jnp.broadcast_to(e[:, None], (frames, tokens, *e.shape[1:]))
    k, v = (
        jnp.concatenate((x.reshape(frames, tokens, heads, dim)[:, index], spread(e)), 2)
        for x, e in ((k, extra_k), (v, extra_v))
    )
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    scores = (
        jnp.einsum(
            "fnhd,fnkhd->fnhk",
            q.reshape(frames, tokens, heads, dim),
            k,
            preferred_element_type=wide,
            precision="highest",
        )
        * scale
    )
    seen = np.concatenate((inside, np.ones((tokens, 1, extra_k.shape[1]), bool)), -1)
    scores = jnp.where(seen, scores, -jnp.inf)
    if border == "zero":  # so many keys of score 0 and value 0: one of score log(how many)
        zeros = (window[0] * window[1] - inside.sum(-1, keepdims=True)).astype(wide)
        scores = jnp.concatenate((scores, jnp.broadcast_to(jnp.log(zeros), (frames, tokens, heads, 1))), -1)
    weights = jax.nn.softmax(scores, -1)[..., : k.shape[2]].astype(q.dtype)
    return jnp.einsum("fnhk,fnkhd->fnhd", weights, v, precision="highest").reshape(q.shape)


def _axis_keys(size, window, dilation, border):
    """Keys of every query along one axis, and which of them are inside: (size, keys)."""
    y = np.arange(size)[:, None]
    residue, place = y % dilation, y // dilation
    count = (size - residue + dilation - 1) // dilation  # of the residue class
    if border == "shift":
        place = np.maximum(np.minimum(place - window // 2, count - window), 0) + np.arange(min(window, size))
    else:
        place = place + np.arange(max(-(window // 2), -size), min(window - window // 2, size))
    inside = (place >= 0) & (place < count)
    return np.where(inside, place * dilation + residue, 0), inside


# ---- the native kernels


def _attributes(window, dilation, border, scale):
    return dict(
        window_y=window[0],
        window_x=window[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
        border=BORDERS.index(border),
        scale=np.float64(scale),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _ffi(q, k, v, extra_k, extra_v, window, dilation, border, scale):
    return _ffi_fwd(q, k, v, extra_k, extra_v, window, dilation, border, scale)[0]


def _ffi_fwd(q, k, v, extra_k, extra_v, *options):
    frames, height, width, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((frames, heads, height, width), jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
    call = jax.ffi.ffi_call(
        "fourdperf_window_attention", (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), vmap_method="sequential"
    )
    out, lse = call(q, k, v, extra_k, extra_v, **_attributes(*options))
    return out, (out, lse, q, k, v, extra_k, extra_v)


def _ffi_bwd(window, dilation, border, scale, saved, d_out):
    inputs = saved[2:]
    call = jax.ffi.ffi_call(
        "fourdperf_window_attention_backward",
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs),
        vmap_method="sequential",
    )
    return tuple(call(d_out, *saved, **_attributes(window, dilation, border, scale)))


_ffi.defvjp(_ffi_fwd, _ffi_bwd)
