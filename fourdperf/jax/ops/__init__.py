"""The ops for JAX, same names and arguments as in fourdperf.ops. Backends: 'ffi' (native kernels), 'jnp'."""

from fourdperf.jax.ops.bilinear_sample import bilinear_sample
from fourdperf.jax.ops.resize import resize

__all__ = ["bilinear_sample", "resize"]
