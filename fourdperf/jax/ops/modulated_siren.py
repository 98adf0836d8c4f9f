"""modulated_siren for JAX: see fourdperf/ops/modulated_siren.py for maths, shapes, dtypes and errors.

jnp   gathers; any order of derivative, forward mode and the derivative with respect to xy too
ffi   the native kernels; reverse mode of first and second order with respect to pre and map (where xy is differentiated
      too, the derivative is that of jnp)
"""

import functools
import math

import jax
import jax.numpy as jnp

from fourdperf.jax.ops.backends import choose, ffi_why_not, platform
from fourdperf.jax.ops.bilinear_sample import bilinear_sample

MODULATE = ("shift", "scale", "both")
MODES = ("nearest", "bilinear")
_HALF = (jnp.bfloat16, jnp.float16)
_SAMPLE = {"nearest": dict(mode="nearest_floor", align_corners=False), "bilinear": {}}


def modulated_sine(
    pre: jax.Array,
    map: jax.Array,
    xy: jax.Array,
    *,
    omega: float = 30.0,
    modulate: str = "shift",
    mode: str = "nearest",
    backend: str | None = None,
) -> jax.Array:
    """sin(omega ((1 + scale) pre + shift)): pre (B, N, H), map (B, Hm, Wm, M), xy (B, N, 2) -> (B, N, H)."""
    pre, map, xy = jnp.asarray(pre), jnp.asarray(map), jnp.asarray(xy)
    for name, x in (("pre", pre), ("map", map), ("xy", xy)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    if pre.ndim not in (2, 3):
        raise ValueError(f"pre must have shape (B, N, H) or (N, H), got {pre.shape}")
    if map.ndim != 4:
        raise ValueError(f"map must have shape (B, H, W, M), got {map.shape}")
    if xy.ndim not in (2, 3) or xy.shape[-1] != 2:
        raise ValueError(f"xy must have shape (B, N, 2) or (N, 2), got {xy.shape}")
    for name, value, choices in (("modulate", modulate, MODULATE), ("mode", mode, MODES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(repr(choice) for choice in choices)}, got {value!r}")
    if not (isinstance(omega, int | float) and math.isfinite(omega)):
        raise ValueError(f"omega must be a finite number, got {omega!r}")
    mixed = jnp.float32 in (pre.dtype, map.dtype) and (pre.dtype in _HALF or map.dtype in _HALF)
    if map.dtype != pre.dtype and not mixed:
        raise ValueError(
            f"map must have the dtype of pre ({pre.dtype}), or one be float32 and the other of 16 bits, got {map.dtype}"
        )
    dtype = jnp.dtype(jnp.float32) if mixed else pre.dtype
    if xy.dtype != dtype and not (dtype in _HALF and xy.dtype == jnp.float32):
        raise ValueError(
            f"xy must be {dtype}{' or float32' if dtype in _HALF else ''}, as pre and map are, got {xy.dtype}"
        )
    channels = pre.shape[-1] * (1 + (modulate == "both"))
    if map.shape[-1] != channels:
        raise ValueError(
            f"map must have {channels} channels ({'2 H' if modulate == 'both' else 'H'} for modulate={modulate!r}), "
            f"got shape {map.shape}"
        )
    pre, xy = (x if x.ndim == 3 else x[None] for x in (pre, xy))
    if pre.shape[1] != xy.shape[1]:
        raise ValueError(f"xy must have the N of pre ({pre.shape[1]}), got {xy.shape}")
    batches = {x.shape[0] for x in (pre, map, xy)} - {1}
    if len(batches) > 1:
        raise ValueError(
            "the batch axes of pre, map and xy must be equal or 1, "
            f"got {pre.shape[0]}, {map.shape[0]} and {xy.shape[0]}"
        )
    b = batches.pop() if batches else 1
    if b * pre.shape[1] * pre.shape[2] == 0:
        return jnp.zeros((b, *pre.shape[1:]), dtype)
    if map.shape[1] * map.shape[2] == 0:
        raise ValueError(f"map must have pixels where xy has points, got shapes {map.shape} and {xy.shape}")
    pre, map = (jnp.broadcast_to(x.astype(dtype), (b, *x.shape[1:])) for x in (pre, map))
    xy = xy.astype(jnp.float32 if dtype in _HALF else dtype)
    run = _ffi if choose("modulated_siren", ffi_why_not(platform(pre)), backend) == "ffi" else _jnp
    return run(pre, map, xy, float(omega), modulate, mode)


def modulated_siren(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    map: jax.Array,
    xy: jax.Array,
    *,
    omega: float = 30.0,
    modulate: str = "shift",
    mode: str = "nearest",
    backend: str | None = None,
) -> jax.Array:
    """modulated_sine(x @ weight.T + bias, map, xy, ...): weight (H, K), as in torch."""
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape (B, N, K) or (N, K), got {x.shape}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape (H, K) with K = {x.shape[-1]}, got {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {bias.shape}")
    pre = jnp.matmul(x, weight.T, precision="highest")
    pre = pre if bias is None else pre + bias
    return modulated_sine(pre, map, xy, omega=omega, modulate=modulate, mode=mode, backend=backend)


# ---- jnp


def _jnp(pre, map, xy, omega, modulate, mode):
    sampled = bilinear_sample(map.astype(xy.dtype), xy, **_SAMPLE[mode], backend="jnp")
    h = pre.shape[-1]
    angle = pre.astype(xy.dtype)
    angle = angle if modulate == "shift" else (1 + sampled[..., :h]) * angle
    angle = angle if modulate == "scale" else angle + sampled[..., -h:]
    return jnp.sin(omega * angle).astype(pre.dtype)


# ---- ffi


def _call(name, results, rule, *tensors):
    """An FFI call; inputs that vmap does not touch have length 1 along its axis, and are shared."""
    omega, modulate, mode = rule
    attributes = dict(omega=omega, modulate=MODULATE.index(modulate), bilinear=mode == "bilinear")
    call = jax.ffi.ffi_call(f"fourdperf_modulated_sine_{name}", results, vmap_method="expand_dims")
    return call(*tensors, **attributes)


def _like(x, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _array(x):
    """A cotangent; one that is known to be zero comes as a symbol."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.custom_derivatives.SymbolicZero) else x


def _saved(*primals):
    """The tensors, and a mark (in the structure, which is static) where xy, the last of them, is differentiated too."""
    return tuple(x.value for x in primals), () if primals[-1].perturbed else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _ffi(pre, map, xy, *rule):
    return _call("fwd", _like(pre), rule, pre, map, xy)


def _ffi_fwd(pre, map, xy, *rule):
    tensors, with_xy = _saved(pre, map, xy)
    return _ffi(*tensors, *rule), (tensors, with_xy)


def _ffi_bwd(*args):
    *rule, (tensors, with_xy), d_out = args
    if with_xy is not None:
        return jax.vjp(lambda *tensors: _jnp(*tensors, *rule), *tensors)[1](_array(d_out))
    return (*_bwd(_array(d_out), *tensors, *rule), jnp.zeros_like(tensors[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _bwd(d_out, pre, map, xy, *rule):
    d_pre, d_map = _call("bwd", (_like(pre), _like(map, xy.dtype)), rule, d_out, pre, map, xy)
    return d_pre, d_map.astype(map.dtype)


def _bwd_jnp(d_out, *tensors, rule):
    return jax.vjp(lambda *tensors: _jnp(*tensors, *rule), *tensors)[1](d_out)[:2]


def _bwd_fwd(d_out, pre, map, xy, *rule):
    tensors, with_xy = _saved(d_out, pre, map, xy)
    return _bwd(*tensors, *rule), (tensors, with_xy)


def _bwd_bwd(*args):
    *rule, (tensors, with_xy), cotangents = args
    cotangents = tuple(_array(x) for x in cotangents)
    if with_xy is not None:
        return jax.vjp(functools.partial(_bwd_jnp, rule=rule), *tensors)[1](cotangents)
    d_out, pre, map, xy = tensors
    results = _like(d_out), _like(pre), _like(map, xy.dtype)
    d_d_out, d_pre, d_map = _call("bwd_bwd", results, rule, *cotangents, *tensors)
    return d_d_out, d_pre, d_map.astype(map.dtype), jnp.zeros_like(xy)


_ffi.defvjp(_ffi_fwd, _ffi_bwd, symbolic_zeros=True)
_bwd.defvjp(_bwd_fwd, _bwd_bwd, symbolic_zeros=True)
