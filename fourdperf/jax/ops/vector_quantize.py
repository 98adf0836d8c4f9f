"""vector_quantize for JAX: see fourdperf/ops/vector_quantize.py for maths, shapes, dtypes, ties, NaN and errors.

jnp   matrix products with some codes at a time, and a running minimum
ffi   the native search; all else, derivatives included, is that of jnp

Indices and usage are int32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

METRICS = ("l2", "cosine")
SHORTEST = 1e-12
CODES = 1024  # at a time


class Quantization(NamedTuple):
    """quantized (.., C), indices (..), usage (K), and the scalars commitment and codebook."""

    quantized: jax.Array
    indices: jax.Array
    usage: jax.Array
    commitment: jax.Array
    codebook: jax.Array


def vector_quantize(
    z: jax.Array, codebook: jax.Array, *, metric: str = "l2", backend: str | None = None
) -> Quantization:
    """The nearest codes, their use and both losses: z (.., C), codebook (K, C)."""
    z, codebook = jnp.asarray(z), jnp.asarray(codebook)
    for name, x in (("z", z), ("codebook", codebook)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    if codebook.dtype != z.dtype:
        raise ValueError(f"codebook must have the dtype of z ({z.dtype}), got {codebook.dtype}")
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook must have shape (K, C) with K and C at least 1, got {codebook.shape}")
    if z.ndim < 1 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(f"z must have shape (.., C) with C = {codebook.shape[1]}, as the codebook, got {z.shape}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of 'l2', 'cosine', got {metric!r}")
    search = _search_ffi if choose("vector_quantize", ffi_why_not(platform(z)), backend) == "ffi" else _search_jnp
    stop, wide = jax.lax.stop_gradient, jnp.promote_types(z.dtype, jnp.float32)
    rows = z.reshape(-1, z.shape[-1])
    indices = search(stop(rows), stop(codebook), metric)
    found, rows = codebook.astype(wide)[indices], rows.astype(wide)
    count = max(rows.size, 1)
    return Quantization(
        stop(found).astype(z.dtype).reshape(z.shape) + (z - stop(z)),
        indices.reshape(z.shape[:-1]),
        jnp.zeros(len(codebook), jnp.int32).at[indices].add(1),
        jnp.square(rows - stop(found)).sum() / count,
        jnp.square(found - stop(rows)).sum() / count,
    )


def code_sums(x: jax.Array, indices: jax.Array, codes: int, *, backend: str | None = None) -> jax.Array:
    """Sums of the rows of `x` by their code: x (N, C), indices (N) integers -> (codes, C). Indices of no code are left out."""
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must have shape (N, C), floating, got {x.shape}, {x.dtype}")
    if indices.shape != x.shape[:1] or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must have shape (N,) with N = {x.shape[0]}, of integers, got {indices.shape}, {indices.dtype}"
        )
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    choose("code_sums", "there is no native one for JAX", backend)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.ops.segment_sum(x.astype(wide), indices, codes).astype(x.dtype)


# ---- jnp


def _search_jnp(z, codebook, metric):
    wide = jnp.promote_types(z.dtype, jnp.float32)
    z, codebook = z.astype(wide), codebook.astype(wide)
    square = jnp.square(codebook).sum(1)
    half = square / 2
    if metric == "cosine":
        codebook, half = codebook / jnp.maximum(jnp.sqrt(square), SHORTEST)[:, None], jnp.zeros_like(half)
    codes = min(CODES, len(codebook))
    missing = -len(codebook) % codes
    codebook = jnp.pad(codebook, ((0, missing), (0, 0))).reshape(-1, codes, codebook.shape[1])
    half = jnp.pad(half, (0, missing), constant_values=jnp.inf).reshape(-1, codes)

    def step(best, chunk):
        first, codebook, half = chunk
        score = half - jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
        score = jnp.where(jnp.isnan(score), jnp.inf, score)
        at = score.argmin(1)
        least = jnp.take_along_axis(score, at[:, None], 1)[:, 0]
        closer = least < best[0]
        return (jnp.where(closer, least, best[0]), jnp.where(closer, first + at.astype(jnp.int32), best[1])), None

    start = jnp.full_like(z, jnp.inf, shape=len(z)), jnp.zeros_like(z, jnp.int32, shape=len(z))
    firsts = jnp.arange(len(half), dtype=jnp.int32) * codes
    return jax.lax.scan(step, start, (firsts, codebook, half))[0][1]


# ---- ffi


def _search_ffi(z, codebook, metric):
    result = jax.ShapeDtypeStruct(z.shape[:1], jnp.int32)
    call = jax.ffi.ffi_call("fourdperf_vector_quantize", result, vmap_method="sequential")
    return call(z, codebook, metric=METRICS.index(metric))
