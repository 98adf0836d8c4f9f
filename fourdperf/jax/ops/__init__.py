"""The ops for JAX, same names and arguments as in fourdperf.ops. Backends: 'ffi' (native kernels), 'jnp'."""

from fourdperf.jax.ops.resize import resize
from fourdperf.jax.ops.window_attention import window_attention

__all__ = ["resize", "window_attention"]
