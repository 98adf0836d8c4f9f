"""The ops for JAX, same names and arguments as in fourdperf.ops. Backends: 'ffi' (native kernels), 'jnp'."""

from fourdperf.jax.ops.bilinear_sample import bilinear_sample
from fourdperf.jax.ops.fourier_embed import (
    fourier_columns,
    fourier_embed,
    fourier_linear,
    gaussian,
    linear_range,
    octaves,
)
from fourdperf.jax.ops.gather_patches import gather_patches
from fourdperf.jax.ops.resize import resize

__all__ = [
    "bilinear_sample",
    "fourier_columns",
    "fourier_embed",
    "fourier_linear",
    "gather_patches",
    "gaussian",
    "linear_range",
    "octaves",
    "resize",
]
