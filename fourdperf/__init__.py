"""Compiled kernels, and PyTorch models built on them that agree number for number with their JAX references.

    fourdperf.ops       the kernels as torch functions           fourdperf.jax.ops      the same for JAX
    fourdperf.models    scaling4d ...                            fourdperf.jax.models   the Flax references
    fourdperf.convert   checkpoints, both ways                   fourdperf.data         videos, images, data sets
    fourdperf.train     one Lightning module per model           fourdperf.reconstruct  a video to depth and cameras
    fourdperf.metrics   depth, poses, tracks, images             fourdperf.geometry     cameras and their best fits

Sub-packages load when first used: importing `fourdperf` compiles nothing, prints nothing, and needs neither JAX,
Triton nor a GPU.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    *("benchmarks", "cli", "convert", "data", "geometry", "jax", "kernels", "metrics", "models", "ops"),
    *("reconstruct", "train"),
]


def __getattr__(name):
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
