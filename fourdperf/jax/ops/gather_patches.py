"""gather_patches for JAX: see fourdperf/ops/gather_patches.py for maths, conventions, dtypes and errors.

jnp   indexing, then two linear interpolations
ffi   the native kernel. Reverse-mode derivatives of first and second order.
"""

import functools

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform

MODES = ("round", "floor", "bilinear")
COORDINATES = ("scaled", "corners", "centers", "pixels")
BORDERS = ("shift", "replicate")


def gather_patches(
    video: jax.Array,
    t: jax.Array,
    points: jax.Array,
    size: int = 9,
    *,
    mode: str = "round",
    coordinates: str = "scaled",
    border: str = "shift",
    backend: str | None = None,
) -> jax.Array:
    """Square patches around points of a video; arguments and errors as fourdperf.ops.gather_patches."""
    video, t, points = jnp.asarray(video), jnp.asarray(t), jnp.asarray(points)
    if video.ndim != 5 or not (video.dtype == jnp.uint8 or jnp.issubdtype(video.dtype, jnp.floating)):
        raise ValueError(f"video must have shape (B, T, H, W, C), uint8 or floating, got {video.shape}, {video.dtype}")
    fits = points.ndim == 3 and points.shape[0] == video.shape[0] and points.shape[2] == 2
    if not fits or not jnp.issubdtype(points.dtype, jnp.floating):
        raise ValueError(
            f"points must have shape (B, N, 2) with B = {video.shape[0]}, floating, got {points.shape}, {points.dtype}"
        )
    if t.shape != points.shape[:2] or not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"t must have shape (B, N) = {points.shape[:2]}, of integers, got {t.shape}, {t.dtype}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    for name, value, known in (
        ("mode", mode, MODES),
        ("coordinates", coordinates, COORDINATES),
        ("border", border, BORDERS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if t.size:
        if 0 in video.shape[1:4]:
            raise ValueError(f"video must not be empty, got shape {video.shape}")
        if border == "shift" and min(video.shape[2:4]) < size:
            raise ValueError(
                f"border='shift' needs frames of at least {size} x {size} pixels, "
                f"got {video.shape[2]} x {video.shape[3]}"
            )
    points = points if points.dtype == jnp.float64 else points.astype(jnp.float32)
    t = jnp.clip(t, 0, max(video.shape[1] - 1, 0)).astype(jnp.int32)
    options = size, mode, coordinates, border
    if choose("gather_patches", ffi_why_not(platform(video)), backend) == "jnp" or not t.size * video.size:
        return _gather_jnp(video, points, t, *options)
    return _gather(video, points, t, options)


# ---- jnp


def _locate(u, length, size, mode, coordinates, border):
    scale = {"corners": length - 1, "pixels": 1}.get(coordinates, length)
    p = u * scale - 0.5 if coordinates == "centers" else u * scale
    p = p if mode == "bilinear" else jnp.nan_to_num(p)
    low, high = (size // 2, length - size + size // 2) if border == "shift" else (-size - 1, length + size)
    p = jnp.where((p >= low) & (p <= high), p, jax.lax.stop_gradient(jnp.clip(p, low, high)))
    whole = jax.lax.stop_gradient(jnp.round(p) if mode == "round" else jnp.floor(p))
    return jnp.nan_to_num(whole, nan=0.0).astype(jnp.int32) - size // 2, p - whole


def _gather_jnp(video, points, t, size, mode, coordinates, border):
    _, frames, height, width, channels = video.shape
    if not t.size * channels:
        return jnp.zeros((*t.shape, size, size, channels), _out_dtype(video, mode))
    x, f_x = _locate(points[..., 0], width, size, mode, coordinates, border)
    y, f_y = _locate(points[..., 1], height, size, mode, coordinates, border)
    reach = jnp.arange(size + (mode == "bilinear"))
    b = jnp.arange(video.shape[0])[:, None, None, None]
    rows = jnp.clip(y[..., None] + reach, 0, height - 1)[..., :, None]
    columns = jnp.clip(x[..., None] + reach, 0, width - 1)[..., None, :]
    patch = video[b, jnp.clip(t, 0, frames - 1)[..., None, None], rows, columns]
    if mode != "bilinear":
        return patch
    acc = jnp.float64 if video.dtype == jnp.float64 else jnp.float32
    patch, f_x, f_y = patch.astype(acc), f_x.astype(acc)[..., None, None, None], f_y.astype(acc)[..., None, None, None]
    patch = patch[..., :-1, :] + f_x * (patch[..., 1:, :] - patch[..., :-1, :])
    return (patch[..., :-1, :, :] + f_y * (patch[..., 1:, :, :] - patch[..., :-1, :, :])).astype(
        _out_dtype(video, mode)
    )


def _out_dtype(video, mode):
    return jnp.float32 if video.dtype == jnp.uint8 and mode == "bilinear" else video.dtype


# ---- ffi


def _attributes(options):
    size, mode, coordinates, border = options
    return {
        "size": size,
        "mode": MODES.index(mode),
        "coordinates": COORDINATES.index(coordinates),
        "border": BORDERS.index(border),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(video, points, t, options):
    shape = (*t.shape, options[0], options[0], video.shape[-1])
    call = jax.ffi.ffi_call(
        "fourdperf_gather_patches", jax.ShapeDtypeStruct(shape, _out_dtype(video, options[1])), vmap_method="sequential"
    )
    return call(video, points, t, **_attributes(options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _backward(d_out, video, points, t, options):
    call = jax.ffi.ffi_call(
        "fourdperf_gather_patches_backward",
        (
            jax.ShapeDtypeStruct((0,) if video.dtype == jnp.uint8 else video.shape, d_out.dtype),
            jax.ShapeDtypeStruct(points.shape, points.dtype),
        ),
        vmap_method="sequential",
    )
    return call(d_out, video, points, t, **_attributes(options))


def _gather_fwd(video, points, t, options):
    return _gather(video, points, t, options), (video, points, t)


def _gather_bwd(options, saved, d_out):
    video = saved[0]
    d_video, d_points = _backward(d_out, *saved, options)
    return None if video.dtype == jnp.uint8 else d_video, d_points, None


def _backward_fwd(d_out, video, points, t, options):
    return _backward(d_out, video, points, t, options), (d_out, video, points, t)


def _backward_bwd(options, saved, cotangents):
    d_out, video, points, t = saved
    if video.dtype == jnp.uint8:
        first = lambda d_out, points: jax.vjp(lambda points: _gather_jnp(video, points, t, *options), points)[1](d_out)
        d_out, d_points = jax.vjp(first, d_out, points)[1](cotangents[1:])
        return d_out, None, d_points, None
    first = lambda d_out, *args: jax.vjp(lambda *args: _gather_jnp(*args, t, *options), *args)[1](d_out)
    return *jax.vjp(first, d_out, video, points)[1](cotangents), None


_gather.defvjp(_gather_fwd, _gather_bwd)
_backward.defvjp(_backward_fwd, _backward_bwd)
