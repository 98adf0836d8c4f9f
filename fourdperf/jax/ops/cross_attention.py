"""cross_attention for JAX: see fourdperf/ops/cross_attention.py for maths, shapes, the mask and errors.

jnp   einsum and softmax on the full (Q, K) matrix, in float32 for 16-bit inputs; differentiable any number of times
ffi   the native kernel (cpu); memory O(tokens); reverse-mode derivatives of first order
"""

import functools

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

_HALF = (jnp.bfloat16, jnp.float16)


def cross_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_padding_mask: jax.Array | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(q k^T scale) v; arguments and errors as fourdperf.ops.cross_attention."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise ValueError(f"{name} must be floating and have the dtype of q ({q.dtype}), got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, tokens, heads, channels), got shape {x.shape}")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q (B, Q, H, D), k (B, K, H, D) and v (B, K, H, E) do not fit: {q.shape}, {k.shape}, {v.shape}"
        )
    mask = key_padding_mask
    if mask is not None and (mask.dtype != jnp.bool_ or mask.shape != k.shape[:2]):
        raise ValueError(f"key_padding_mask must be bool and (B, K) = {k.shape[:2]}, got {mask.dtype} {mask.shape}")
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    if choose("cross_attention", _ffi_why_not(platform(q)), backend) == "jnp":
        return _jnp(q, k, v, mask, scale)
    return _ffi(q, k, v, jnp.zeros(0, bool) if mask is None else mask, scale)


def _ffi_why_not(place):
    if place == "gpu":
        return "the native kernel runs on cpu"
    return ffi_why_not(place)


def _jnp(q, k, v, mask, scale):
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) if dtype in _HALF else x for x in (q, k, v))
    if mask is not None:  # padding may hold NaN
        k, v = (jnp.where(mask[:, :, None, None], 0, x) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * scale
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1) if k.shape[1] else scores
    else:
        padding = mask[:, None, None, :]
        weights = jnp.where(
            padding, 0, jax.nn.softmax(jnp.where(padding, jnp.finfo(scores.dtype).min, scores), axis=-1)
        )
    return jnp.einsum("bhqk,bkhe->bqhe", weights, v, precision="highest").astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ffi(q, k, v, mask, scale):
    return _forward(q, k, v, mask, scale)[0]


def _forward(q, k, v, mask, scale):
    batch, queries, heads, _ = q.shape
    stats = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = (
        jax.ShapeDtypeStruct((batch, queries, heads, v.shape[3]), q.dtype),
        jax.ShapeDtypeStruct((batch, heads, 2, queries), stats),
    )
    return jax.ffi.ffi_call("fourdperf_cross_attention", shapes, vmap_method="sequential")(q, k, v, mask, scale=scale)


def _ffi_fwd(q, k, v, mask, scale):
    out, stats = _forward(q, k, v, mask, scale)
    return out, (q, k, v, mask, stats)


def _ffi_bwd(scale, saved, d_out):
    q, k, v, mask, stats = saved
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    call = jax.ffi.ffi_call("fourdperf_cross_attention_backward", shapes, vmap_method="sequential")
    return *call(d_out, q, k, v, mask, stats, scale=scale), None


_ffi.defvjp(_ffi_fwd, _ffi_bwd)
