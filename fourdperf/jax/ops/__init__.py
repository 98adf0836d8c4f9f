"""The ops for JAX, same names and arguments as in fourdperf.ops. Backends: 'ffi' (native kernels), 'jnp'."""

from fourdperf.jax.ops.bilinear_sample import bilinear_sample
from fourdperf.jax.ops.cross_attention import cross_attention
from fourdperf.jax.ops.fourier_embed import (
    fourier_columns,
    fourier_embed,
    fourier_linear,
    gaussian,
    linear_range,
    octaves,
)
from fourdperf.jax.ops.gather_patches import gather_patches
from fourdperf.jax.ops.modulated_siren import modulated_sine, modulated_siren
from fourdperf.jax.ops.procrustes import procrustes
from fourdperf.jax.ops.resize import resize
from fourdperf.jax.ops.vector_quantize import code_sums, vector_quantize
from fourdperf.jax.ops.window_attention import window_attention

__all__ = [
    "bilinear_sample",
    "code_sums",
    "cross_attention",
    "fourier_columns",
    "fourier_embed",
    "fourier_linear",
    "gather_patches",
    "gaussian",
    "linear_range",
    "modulated_sine",
    "modulated_siren",
    "octaves",
    "procrustes",
    "resize",
    "vector_quantize",
    "window_attention",
]
