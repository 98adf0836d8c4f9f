"""The search of fourdperf.models.quantizer in Flax."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fourdperf.jax.models.token_blocks import TOKEN
from fourdperf.jax.ops import vector_quantize


class VectorQuantizer(nn.Module):
    """The nearest of K codes; see the PyTorch class."""

    number: int
    channels: int
    normalize: bool = True

    def setup(self):
        self.codebook = self.param("codebook", TOKEN, (self.number, self.channels))

    def codes(self) -> Array:
        return unit(self.codebook) if self.normalize else self.codebook

    def __call__(self, z: Array) -> tuple[Array, Array]:
        """Codes `(.., C)` and indices `(..)` of z `(.., C)`."""
        wide = jnp.promote_types(z.dtype, jnp.float32)
        found = vector_quantize(z.astype(wide), self.codes().astype(wide))
        return found.quantized, found.indices

    def lookup(self, indices: Array) -> Array:
        return self.codes()[indices]


def unit(x: Array) -> Array:
    """Vectors along the last axis, to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
