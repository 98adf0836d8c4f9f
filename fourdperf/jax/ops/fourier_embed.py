"""fourier_embed and fourier_linear for JAX: see fourdperf/ops/fourier_embed.py for maths, order, dtypes and errors.

jnp   the formula; the angle is rounded
ffi   the native kernels; angles from the exact product. Reverse-mode derivatives of any order.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform, precise

AXES = ("trig", "dim", "band")


def fourier_embed(x: jax.Array, frequencies: jax.Array, *, backend: str | None = None) -> jax.Array:
    """Sines, then cosines, of every coordinate times every frequency; arguments and errors as fourdperf.ops.fourier_embed."""
    x, frequencies = _checked(x, frequencies)
    if choose("fourier_embed", ffi_why_not(platform(x)), backend) == "jnp" or not x.size * frequencies.size:
        return _embed_jnp(x, frequencies)
    return _embed(x, frequencies)


def fourier_linear(
    x: jax.Array,
    frequencies: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    backend: str | None = None,
) -> jax.Array:
    """fourier_embed, then weight (M, 2 D F, torch's order of axes) and bias; as fourdperf.ops.fourier_linear.

    A Flax kernel is weight.T.
    """
    x, frequencies = _checked(x, frequencies)
    weight = jnp.asarray(weight)
    columns = 2 * x.shape[-1] * frequencies.shape[0]
    if weight.ndim != 2 or weight.shape[1] != columns:
        raise ValueError(f"weight must have shape (M, 2 D F) with 2 D F = {columns}, got {weight.shape}")
    if x.dtype != weight.dtype and not (x.dtype == jnp.float32 and weight.dtype in (jnp.bfloat16, jnp.float16)):
        raise ValueError(
            f"x must have the dtype of weight ({weight.dtype}), or float32 with a 16-bit weight, got {x.dtype}"
        )
    bias = jnp.zeros(weight.shape[0], weight.dtype) if bias is None else jnp.asarray(bias)
    if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) and dtype {weight.dtype}, got {bias.shape}, {bias.dtype}"
        )
    if (
        choose("fourier_linear", ffi_why_not(platform(x)), backend) == "jnp"
        or not x.size * frequencies.size * weight.size
    ):
        return _linear_jnp(x, frequencies, weight, bias)
    return _linear(x.astype(frequencies.dtype), frequencies, weight, bias)


def _checked(x, frequencies):
    x, frequencies = jnp.asarray(x), jnp.asarray(frequencies)
    for name, array in (("x", x), ("frequencies", frequencies)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if x.ndim < 1:
        raise ValueError("x must have shape (..., D), got a scalar")
    if frequencies.ndim != 1:
        raise ValueError(f"frequencies must have shape (F,), got {frequencies.shape}")
    return x, frequencies.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


# ---- frequencies, and foreign orders


def octaves(n: int, *, scale: float = 2 * math.pi, first: int = 0, dtype=jnp.float32) -> jax.Array:
    """scale 2^first, scale 2^(first + 1), ... (n,), computed in float64."""
    return jnp.asarray((scale * 2.0 ** np.arange(first, first + n)).astype(dtype))


def linear_range(low: float, high: float, n: int, *, scale: float = 2 * math.pi, dtype=jnp.float32) -> jax.Array:
    """scale low ... scale high in n equal steps, both ends included, computed in float64."""
    return jnp.asarray((scale * np.linspace(low, high, n)).astype(dtype))


def gaussian(key: jax.Array, n: int, sigma: float, *, scale: float = 2 * math.pi, dtype=jnp.float32) -> jax.Array:
    """n draws from a normal distribution of standard deviation scale sigma."""
    return scale * sigma * jax.random.normal(key, (n,), dtype)


def fourier_columns(dims: int, bands: int, axes: Sequence[str]) -> np.ndarray:
    """(2 D F,) indices such that theirs[..., fourier_columns(...)] is in our order, as fourdperf.ops.fourier_columns."""
    if sorted(axes) != sorted(AXES):
        raise ValueError(f"axes must be an order of {AXES}, got {tuple(axes)}")
    sizes = {"trig": 2, "dim": dims, "band": bands}
    columns = np.arange(2 * dims * bands).reshape([sizes[axis] for axis in axes])
    return columns.transpose([list(axes).index(axis) for axis in AXES]).ravel()


# ---- jnp


def _embed_jnp(x, frequencies):
    angles = x.astype(frequencies.dtype)[..., None] * frequencies
    angles = angles.reshape(*x.shape[:-1], x.shape[-1] * frequencies.shape[0])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).astype(x.dtype)


@precise
def _linear_jnp(x, frequencies, weight, bias):
    return _embed_jnp(x, frequencies).astype(weight.dtype) @ weight.T + bias


def _trig(embedding, x, frequencies):
    pair = embedding.astype(frequencies.dtype).reshape(*x.shape[:-1], 2, x.shape[-1], frequencies.shape[0])
    return pair[..., 0, :, :], pair[..., 1, :, :]


# ---- ffi


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def _embed(x, frequencies):
    shape = (*x.shape[:-1], 2 * x.shape[-1] * frequencies.shape[0])
    call = jax.ffi.ffi_call(
        "fourdperf_fourier_embed",
        jax.ShapeDtypeStruct((math.prod(shape[:-1]), shape[-1]), x.dtype),
        vmap_method="sequential",
    )
    return call(_rows(x), frequencies).reshape(shape)


@jax.custom_vjp
def _backward(d_out, x, frequencies):
    like = lambda array, shape: jax.ShapeDtypeStruct(shape, array.dtype)
    call = jax.ffi.ffi_call(
        "fourdperf_fourier_embed_backward",
        (like(x, _rows(x).shape), like(frequencies, frequencies.shape)),
        vmap_method="sequential",
    )
    d_x, d_frequencies = call(_rows(d_out), _rows(x), frequencies)
    return d_x.reshape(x.shape), d_frequencies


@jax.custom_vjp
def _linear(x, frequencies, weight, bias):
    rows = _rows(x)
    call = jax.ffi.ffi_call(
        "fourdperf_fourier_linear",
        jax.ShapeDtypeStruct((rows.shape[0], weight.shape[0]), weight.dtype),
        vmap_method="sequential",
    )
    return call(rows, frequencies, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def _embed_bwd(saved, d_out):
    return _backward(d_out, *saved)


def _backward_bwd(saved, cotangents):
    (d_out, x, frequencies), (g_x, g_frequencies) = saved, cotangents
    wide, f = x.astype(frequencies.dtype), frequencies
    sines, cosines = _trig(_embed(wide, f), x, f)
    d_sin, d_cos = _trig(d_out, x, f)
    first, second = d_sin * cosines - d_cos * sines, -(d_sin * sines + d_cos * cosines)
    towards = g_x.astype(f.dtype)[..., None] * f + g_frequencies * wide[..., None]  # change of the angle
    g_out = jnp.stack([towards * cosines, -towards * sines], -3).reshape(d_out.shape).astype(d_out.dtype)
    d_x = (g_frequencies * first + towards * second * f).sum(-1).astype(x.dtype)
    across = g_x.astype(f.dtype)[..., None] * first + towards * second * wide[..., None]
    return g_out, d_x, across.reshape(-1, f.shape[0]).sum(0)


@precise
def _linear_bwd(saved, d_out):
    x, frequencies, weight, _ = saved
    rows = d_out.reshape(-1, d_out.shape[-1])
    d_x, d_frequencies = _backward((d_out @ weight).astype(x.dtype), x, frequencies)
    embedding = _embed(x, frequencies).astype(weight.dtype)
    return d_x, d_frequencies, rows.T @ embedding.reshape(-1, weight.shape[1]), rows.sum(0)


_embed.defvjp(lambda *args: (_embed(*args), args), _embed_bwd)
_backward.defvjp(lambda *args: (_backward(*args), args), _backward_bwd)
_linear.defvjp(lambda *args: (_linear(*args), args), _linear_bwd)
