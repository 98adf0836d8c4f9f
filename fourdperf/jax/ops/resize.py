"""resize for JAX: see fourdperf/ops/resize.py for maths, shapes and errors.

jnp   jax.image.resize itself
ffi   the native kernel; weights and sums in float32 for 16-bit inputs too. Reverse-mode derivatives of any order.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

METHODS = ("nearest", "linear", "cubic", "lanczos3", "lanczos5")
_HALF = (jnp.bfloat16, jnp.float16)


def resize(
    x: jax.Array,
    sizes: int | Sequence[int],
    dims: int | Sequence[int],
    *,
    method: str = "cubic",
    antialias: bool = True,
    backend: str | None = None,
) -> jax.Array:
    """Resamples the axes `dims` of `x` to the lengths `sizes`; arguments and errors as fourdperf.ops.resize."""
    x = jnp.asarray(x)
    sizes, dims = ((v,) if isinstance(v, int) else tuple(v) for v in (sizes, dims))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got {x.dtype}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if len(sizes) != len(dims) or any(not -x.ndim <= dim < x.ndim for dim in dims):
        raise ValueError(
            f"sizes and dims must pair axes of x, which has shape {x.shape}, with lengths; got {sizes}, {dims}"
        )
    dims = tuple(dim % x.ndim for dim in dims)
    if len(set(dims)) != len(dims) or any(size < 0 or (size and not x.shape[d]) for size, d in zip(sizes, dims)):
        raise ValueError(
            f"dims must name each axis once and sizes be non-negative, x not empty there; got {sizes}, {dims}"
        )
    shape = list(x.shape)
    for size, dim in zip(sizes, dims):
        shape[dim] = size
    if any(max(size, x.shape[dim]) > 2**30 for size, dim in zip(sizes, dims)):
        raise ValueError(f"axes must not be longer than 2^30, got {x.shape} -> {tuple(shape)}")
    if 0 in shape:
        return jnp.zeros(shape, x.dtype)
    if choose("resize", ffi_why_not(platform(x)), backend) == "jnp":
        return jax.image.resize(x, shape, method, antialias)
    changed = sorted(
        ((size, dim) for size, dim in zip(sizes, dims) if x.shape[dim] != size),
        key=lambda axis: axis[0] / x.shape[axis[1]],
    )
    dtype, y = x.dtype, x.astype(jnp.float32) if x.dtype in _HALF and len(changed) > 1 else x
    for size, dim in changed:
        y = _axis(y, dim, y.shape[dim], size, METHODS.index(method), antialias, False)
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5, 6))
def _axis(x, dim, n_in, n_out, method, antialias, adjoint):
    rows = n_in if adjoint else n_out
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    call = jax.ffi.ffi_call(
        "fourdperf_resize", jax.ShapeDtypeStruct((outer, rows, inner), x.dtype), vmap_method="expand_dims"
    )
    out = call(
        x.reshape(outer, x.shape[dim], inner),
        n_in=n_in,
        n_out=n_out,
        filter=method,
        antialias=antialias,
        adjoint=adjoint,
    )
    return out.reshape(*x.shape[:dim], rows, *x.shape[dim + 1 :])


def _axis_fwd(x, *spec):
    return _axis(x, *spec), None


def _axis_bwd(dim, n_in, n_out, method, antialias, adjoint, _, d_out):
    return (_axis(d_out, dim, n_in, n_out, method, antialias, not adjoint),)


_axis.defvjp(_axis_fwd, _axis_bwd)
