"""procrustes for JAX: see fourdperf/ops/procrustes.py for maths, shapes, dtypes and errors.

jnp   jnp.linalg.svd; forward and reverse mode, with gradient='exact' of any order ('regularized': the first)
ffi   the native kernels, for m == n and gradient='exact'; the same derivatives

Products ask for full float32: JAX's default on a GPU is TF32.
"""

import functools

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform, precise

GRADIENTS = ("exact", "regularized")
_HALF = (jnp.bfloat16, jnp.float16)
LARGEST_ON_GPU = 64


def procrustes(
    x: jax.Array, *, special: bool = False, gradient: str = "exact", backend: str | None = None
) -> jax.Array:
    """The nearest orthogonal matrices (special, m == n: rotations): x (..., m, n) -> (..., m, n)."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (..., m, n), got {x.shape}")
    if not isinstance(special, bool):
        raise ValueError(f"special must be a bool, got {special!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of 'exact', 'regularized', got {gradient!r}")
    m, n = x.shape[-2:]
    special, exact = special and m == n, gradient == "exact"
    run = _ffi if choose("procrustes", _ffi_why_not(platform(x), m, n, exact), backend) == "ffi" else _jnp
    if x.size == 0:
        return x
    tall = x if m >= n else x.mT
    out = run(tall.astype(jnp.float32) if x.dtype in _HALF else tall, special, exact)[0]
    return (out if m >= n else out.mT).astype(x.dtype)


def _ffi_why_not(place, m, n, exact):
    if m != n:
        return "it takes square matrices"
    if not exact:
        return "it has the exact gradient alone"
    if place != "cpu" and n > LARGEST_ON_GPU:
        return f"its CUDA kernels take n <= {LARGEST_ON_GPU}, got {n}"
    return ffi_why_not(place)


# ---- jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@precise
def _jnp(x, special, exact):
    """x -> R, and (without derivatives) the eigenvectors and eigenvalues of H = R^T x."""
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    if special:
        sign = jnp.ones_like(s).at[..., -1].set(jnp.sign(jnp.linalg.det(u @ vh)))
        u, s = u * sign[..., None, :], s * sign
    return u @ vh, vh.mT, s


@_jnp.defjvp
@precise
def _jnp_jvp(special, exact, primals, tangents):
    (x,), (d_x,) = primals, tangents
    r, v, s = out = _jnp(x, special, exact)
    v, s = jax.lax.stop_gradient((v, s))
    h, p = r.mT @ x, r.mT @ d_x
    smallest = x.shape[-2] * jnp.finfo(s.dtype).eps * s[..., :1, None]
    row, column = s[..., None, :], s[..., :, None]
    total, gap = row + column, row**2 - column**2
    weight = _inverse(total, smallest) if exact else (row - column) * gap / (gap**2 + 1e-8)
    d_r = r @ _solve(lambda y: h @ y + y @ h, lambda c: v @ ((v.mT @ c @ v) * weight) @ v.mT, p - p.mT, exact)
    if x.shape[-2] > x.shape[-1]:
        d_r += _solve(lambda y: y @ h, lambda c: ((c @ v) * _inverse(row, smallest)) @ v.mT, d_x - r @ p, exact)
    return out, (d_r, jnp.zeros_like(v), jnp.zeros_like(s))


def _inverse(x, smallest):
    small = jnp.abs(x) <= smallest
    return jnp.where(small, 0, 1 / jnp.where(small, 1, x))


def _solve(matvec, solve, c, exact):
    """The solution y of matvec(y) = c, differentiable in what matvec closes over as well."""
    if not exact:
        return solve(c)
    return jax.lax.custom_linear_solve(matvec, c, lambda _, c: solve(c), symmetric=True)


# ---- ffi


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _ffi(x, special, exact):
    """x -> R, and (without derivatives) the right singular vector that `special` turned round, or zeros."""
    results = _like(x), jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
    return jax.ffi.ffi_call("fourdperf_procrustes", results, vmap_method="broadcast_all")(x, special=special)


@_ffi.defjvp
@precise
def _ffi_jvp(special, exact, primals, tangents):
    (x,), (d_x,) = primals, tangents
    r, flip = out = _ffi(x, special, exact)
    h, p = r.mT @ x, r.mT @ d_x
    call = jax.ffi.ffi_call("fourdperf_procrustes_solve", _like(h), vmap_method="broadcast_all")
    # the kernel works with p - p^T; what is symmetric of a c that is not skew would cancel in what follows
    w = _solve(lambda y: h @ y + y @ h, lambda c: call(jax.lax.stop_gradient(h), c / 2, flip), p - p.mT, True)
    return out, (r @ w, jnp.zeros_like(flip))
