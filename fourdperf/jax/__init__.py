"""The JAX side: `ops` (each op as jnp and as an XLA FFI call into the same native kernels) and `models` (Flax references)."""
