"""fourdperf: compiled kernels, and PyTorch models built on them that agree number for number with their JAX references.

    fourdperf.ops       the kernels as torch functions           fourdperf.jax.ops      the same for JAX
    fourdperf.models    scaling4d ...                            fourdperf.jax.models   the Flax references
    fourdperf.convert   checkpoints, both ways                   fourdperf.data         video in and out, pictures

Sub-packages load when first used: importing `fourdperf` compiles nothing, prints nothing, and needs neither JAX,
Triton nor a GPU.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["benchmarks", "cli", "convert", "data", "jax", "kernels", "models", "ops"]


def __getattr__(name):
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
