"""The ops for JAX, same names and arguments as in fourdperf.ops. Backends: 'ffi' (native kernels), 'jnp'."""

from fourdperf.jax.ops.cross_attention import cross_attention
from fourdperf.jax.ops.resize import resize

__all__ = ["cross_attention", "resize"]
