"""The ops. Every name in OPS is a file stem here, in csrc/, kernels/, fourdperf/jax/ops/, benchmarks/ and tests/ops/.

Axes in the docstrings: B batch, T frames, H, W height and width, N tokens or points, C channels, D size of a head.
"""

from fourdperf.ops.backends import use_backend
from fourdperf.ops.bilinear_sample import bilinear_sample, bilinear_sample_eager
from fourdperf.ops.cross_attention import cross_attention, cross_attention_eager
from fourdperf.ops.fourier_embed import (
    fourier_columns,
    fourier_embed,
    fourier_embed_eager,
    fourier_linear,
    fourier_linear_eager,
    gaussian,
    linear_range,
    octaves,
)
from fourdperf.ops.gather_patches import gather_patches, gather_patches_eager
from fourdperf.ops.modulated_siren import modulated_sine, modulated_sine_eager, modulated_siren
from fourdperf.ops.procrustes import procrustes, procrustes_eager
from fourdperf.ops.resize import resize, resize_eager
from fourdperf.ops.vector_quantize import code_sums, vector_quantize, vector_quantize_eager
from fourdperf.ops.window_attention import window_attention, window_attention_eager

OPS = (
    "bilinear_sample",
    "cross_attention",
    "fourier_embed",
    "gather_patches",
    "modulated_siren",
    "procrustes",
    "resize",
    "vector_quantize",
    "window_attention",
)

__all__ = [
    "OPS",
    "bilinear_sample",
    "bilinear_sample_eager",
    "code_sums",
    "cross_attention",
    "cross_attention_eager",
    "fourier_columns",
    "fourier_embed",
    "fourier_embed_eager",
    "fourier_linear",
    "fourier_linear_eager",
    "gather_patches",
    "gather_patches_eager",
    "gaussian",
    "linear_range",
    "modulated_sine",
    "modulated_sine_eager",
    "modulated_siren",
    "octaves",
    "procrustes",
    "procrustes_eager",
    "resize",
    "resize_eager",
    "use_backend",
    "vector_quantize",
    "vector_quantize_eager",
    "window_attention",
    "window_attention_eager",
]
